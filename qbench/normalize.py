"""One form for what a network can say in several: constants computed, batch norms folded, LSTMs split by layer."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qbench.attention import simplify_masks, unify_attention
from qbench.recurrent import split_lstms
from qbench.transposed import swapped
from qbench.views import shorten_views

if TYPE_CHECKING:
    from qbench.capture import Network

aten = torch.ops.aten

IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
}
NAMED_PADDING = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}
NAMED_DEFAULTS = (None, None, None, [1], "valid", [1], 1)
ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range.default}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
FOLDABLE = {aten.linear.default, aten.conv1d.default, aten.conv2d.default, *TRANSPOSED}
FILLS: dict[Any, float | None] = {
    aten.new_zeros.default: 0.0,
    aten.zeros_like.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.ones_like.default: 1.0,
    aten.new_full.default: None,  # the last argument
    aten.full_like.default: None,
}


def normalize(network: Network) -> None:
    """Rewrite a captured network in place; tensors that nothing reads any more are dropped."""
    _drop_identities(network.graph)
    _fold_constants(network)
    split_lstms(network)
    unify_attention(network.graph, network.tensors)
    _fold_constants(network)
    shorten_views(network.graph)
    simplify_masks(network.graph, network.tensors)
    _padding_in_numbers(network.graph)
    _fold_batch_norms(network)
    network.graph.eliminate_dead_code()
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    network.tensors = {name: tensor for name, tensor in network.tensors.items() if name in used}
    network.graph.lint()


def _drop_identities(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a view may have relied on a copy that is dropped here
        if node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
        if node.target in IDENTITIES | ASSERTIONS:
            graph.erase_node(node)


def _fold_constants(network: Network) -> None:
    """Compute at once what depends on parameters only: a reshaped bias, a weight norm, a mask.

    Embeddings stay: the rows of a table of positions are its weight.
    """
    for node in network.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or node.target is aten.embedding.default:
            continue
        if (filled := _filled(node)) is not None:
            _replace(network, node, filled)
        elif all(source.op == "get_attr" for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: network.tensors[source.target])
            _replace_results(network, node, node.target(*args, **kwargs))


def _filled(node: fx.Node) -> Tensor | None:
    """What new_zeros and its like make where the sizes are known: it does not depend on their tensor."""
    value = node.meta.get("val")
    if node.target not in FILLS or not all(isinstance(size, int) for size in value.shape):
        return None
    fill = FILLS[node.target]
    return torch.full(value.shape, node.args[-1] if fill is None else fill, dtype=value.dtype)


def _replace_results(network: Network, node: fx.Node, result: Any) -> None:
    """The node's value, or each part that is taken of it, becomes a tensor of the network."""
    if isinstance(result, Tensor):
        _replace(network, node, result)
    elif isinstance(result, list | tuple):
        for part in [user for user in node.users if user.target is operator.getitem]:
            _replace(network, part, result[part.args[1]])


def _replace(network: Network, node: fx.Node, value: Tensor) -> None:
    """The node's value becomes a tensor of the network."""
    name = free_name(f"folded_{node.name}", network.tensors, shared=True)
    network.tensors[name] = value.detach().clone()
    with network.graph.inserting_before(node):
        folded = network.graph.get_attr(name)
    folded.meta = dict(node.meta)
    node.replace_all_uses_with(folded)
    network.graph.erase_node(node)


def _padding_in_numbers(graph: fx.Graph) -> None:
    """`same` and `valid` in numbers; what `same` adds at one end only becomes a pad of its own."""
    for node in graph.nodes:
        if node.target not in NAMED_PADDING:
            continue
        given: Any = (*node.args, *NAMED_DEFAULTS[len(node.args) :])
        x, weight, bias, stride, padding, dilation, groups = given
        taps = weight.meta["val"].shape[2:]
        reach = dilation if len(dilation) == len(taps) else [*dilation] * len(taps)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(reach, taps, strict=True)]
        if any(size % 2 for size in total):
            ends = [end for size in reversed(total) for end in (0, size % 2)]
            with graph.inserting_before(node):
                padded = graph.call_function(aten.constant_pad_nd.default, (x, ends))
            padded.meta = {"val": padded.target(x.meta["val"], ends), "layer": node.meta["layer"]}
            x = padded
        node.args = (x, weight, bias, stride, [size // 2 for size in total], dilation, groups)
        node.target = NAMED_PADDING[node.target]


def _fold_batch_norms(network: Network) -> None:
    """Fold each batch norm that directly follows a layer into it; leave the others as aten.batch_norm."""
    for node in list(network.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        (result,) = [user for user in node.users if user.args[1] == 0] or [None]
        if result is None:
            continue
        before = node.args[0]
        gamma, beta = _affine(network, node)
        if _takes_batch_norm(before):
            _fold(network, before, gamma, beta)
            result.replace_all_uses_with(before)
        else:
            x, weight, bias, mean, variance, momentum, eps = node.args
            with network.graph.inserting_after(node):
                args = (x, weight, bias, mean, variance, False, momentum, eps, False)
                kept = network.graph.call_function(aten.batch_norm.default, args)
            kept.meta = {"val": result.meta["val"], "layer": node.meta["layer"]}
            result.replace_all_uses_with(kept)


def _takes_batch_norm(layer: fx.Node) -> bool:
    """Is the node a layer that nothing else reads, whose output channels are dimension 1 (a linear's are its last)?"""
    if layer.target not in FOLDABLE or len(layer.users) != 1 or layer.args[1].op != "get_attr":
        return False
    return layer.target is not aten.linear.default or layer.meta["val"].dim() == 2


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """gamma, beta (float64, [channels]) with batch_norm(x) = x * gamma + beta."""
    gamma = (variance.double() + eps).rsqrt()
    if weight is not None:
        gamma = gamma * weight.double()
    beta = -mean.double() * gamma
    return gamma, beta if bias is None else beta + bias.double()


def _affine(network: Network, node: fx.Node) -> tuple[Tensor, Tensor]:
    weight, bias, mean, variance = (None if arg is None else network.tensors[arg.target] for arg in node.args[1:5])
    assert mean is not None
    assert variance is not None
    return batch_norm_affine(weight, bias, mean, variance, node.args[6])


def _fold(network: Network, layer: fx.Node, gamma: Tensor, beta: Tensor) -> None:
    """w' = w * gamma, b' = b * gamma + beta, computed in float64 and rounded once."""
    weight = network.tensors[layer.args[1].target]
    given = layer.args[2] if len(layer.args) > 2 else None
    bias = beta if given is None else network.tensors[given.target].double() * gamma + beta
    groups = layer.args[6] if layer.target in TRANSPOSED and len(layer.args) > 6 else 1
    by_output = swapped(weight, groups) if layer.target in TRANSPOSED else weight
    folded = (by_output.double() * gamma.reshape(-1, *[1] * (weight.dim() - 1))).float()
    folded = swapped(folded, groups) if layer.target in TRANSPOSED else folded
    name = free_name(layer.args[1].target, network.tensors, shared=len(layer.args[1].users) > 1)
    network.tensors[name] = folded
    shared = given is None or len(given.users) > 1
    bias_name = free_name(name.removesuffix("weight") + "bias", network.tensors, shared)
    network.tensors[bias_name] = bias.float()
    with network.graph.inserting_before(layer):
        args = (layer.args[0], network.graph.get_attr(name), network.graph.get_attr(bias_name), *layer.args[3:])
    layer.args = args


def free_name(name: str, taken: dict[str, Tensor], shared: bool) -> str:
    """`name` itself, or with the first free number behind it when it is shared and taken."""
    if not (shared and name in taken):
        return name
    return next(f"{name}_{number}" for number in range(1, len(taken) + 2) if f"{name}_{number}" not in taken)
