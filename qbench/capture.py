"""From a model to a normalized network: torch.export, batch norms folded, identities dropped."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from qbench.structure import Structure, describe

aten = torch.ops.aten

IDENTITIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
}
FOLDABLE = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}


class CaptureError(ValueError):
    """The model cannot be captured; the message says what torch.export said and what to do."""


@dataclass
class Network:
    """A captured network: a graph of functional aten calls over `tensors`, one placeholder for each input tensor.

    `inputs` gives shape (None where any size fits) and dtype of each placeholder; `outputs` how the results are nested.
    A node's meta["layer"] is the name of the module that it comes from.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    inputs: list[dict[str, Any]]
    outputs: Structure

    def module(self) -> fx.GraphModule:
        """The network as a runnable GraphModule that returns its result tensors as a list."""
        return fx.GraphModule(nn.ParameterDict(), self.graph) if not self.tensors else _module(self)


def _module(network: Network) -> fx.GraphModule:
    root = attach(network.tensors)
    return fx.GraphModule(root, network.graph)


def attach(tensors: dict[str, Tensor]) -> nn.Module:
    """A module tree that holds each tensor under its dotted name, as buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
    return root


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Network:
    """Capture `model` in evaluation mode with torch.export, dimension 0 of every input of any size.

    `dynamic_shapes` is passed to torch.export instead, when given. Raises CaptureError.
    """
    leaves = pytree.tree_leaves(example_inputs)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError("example_inputs must be a tuple of tensors (nested allowed)")
    network = _trace(model, example_inputs, leaves, dynamic_shapes)
    _drop_identities(network.graph)
    _fold_batch_norms(network)
    network.graph.eliminate_dead_code()
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    network.tensors = {name: tensor for name, tensor in network.tensors.items() if name in used}
    network.graph.lint()
    return network


def _trace(model: nn.Module, example: tuple[Any, ...], leaves: list[Tensor], dynamic_shapes: Any) -> Network:
    if dynamic_shapes is None:
        doubled = leaves[0].dim() > 0 and leaves[0].shape[0] == 1
        if doubled:  # torch.export takes a size of 1 for a constant
            example = pytree.tree_map(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, example)
        dynamic_shapes = pytree.tree_map(lambda t: {0: torch.export.Dim.DYNAMIC} if t.dim() else {}, example)
    frozen = copy.deepcopy(model).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet("torch._dynamo", "torch.export", "torch.fx"):
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            exported = torch.export.export(frozen, example, dynamic_shapes=dynamic_shapes).run_decompositions({})
    except Exception as error:  # torch.export raises dozens of types, some private
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {said.strip()[:300]}; "
            f"make its forward free of data-dependent Python, or pass dynamic_shapes="
        ) from error
    return _unlift(exported, leaves)


class _quiet:
    """Silence the loggers of torch for the length of a block: their messages repeat the exception's."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)


def _unlift(exported: torch.export.ExportedProgram, leaves: list[Tensor]) -> Network:
    """A graph whose parameters are get_attr nodes again, under their own names."""
    held = {**exported.state_dict, **exported.constants}
    sources = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs):
        raise CaptureError("the model changes its own state in forward; qbench needs a pure function of its inputs")
    graph, tensors, values = fx.Graph(), {}, {}
    for node in exported.graph.nodes:
        spec = sources.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind != InputKind.USER_INPUT:
            assert spec.target is not None
            tensors[spec.target] = held[spec.target].detach()
            values[node] = graph.get_attr(spec.target)
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = {"val": node.meta.get("val"), "layer": _layer(node)}
    results = pytree.tree_unflatten(
        list(range(len(exported.graph_signature.output_specs))), exported.call_spec.out_spec
    )
    inputs = [
        {
            "shape": [None if dim == 0 else int(size) for dim, size in enumerate(leaf.shape)],
            "dtype": str(leaf.dtype)[6:],
        }
        for leaf in leaves
    ]
    return Network(graph, tensors, inputs, describe(results))


def _layer(node: fx.Node) -> str:
    """The name of the module that the node comes from, `` for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _drop_identities(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a view may have relied on a copy that is dropped here
        if node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


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
        if before.target in FOLDABLE and len(before.users) == 1 and before.args[1].op == "get_attr":
            _fold(network, before, gamma, beta)
            result.replace_all_uses_with(before)
        else:
            x, weight, bias, mean, variance, momentum, eps = node.args
            with network.graph.inserting_after(node):
                args = (x, weight, bias, mean, variance, False, momentum, eps, False)
                kept = network.graph.call_function(aten.batch_norm.default, args)
            kept.meta = {"val": result.meta["val"], "layer": node.meta["layer"]}
            result.replace_all_uses_with(kept)


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
    folded = (weight.double() * gamma.reshape(-1, *[1] * (weight.dim() - 1))).float()
    name = free_name(layer.args[1].target, network.tensors, shared=len(layer.args[1].users) > 1)
    network.tensors[name] = folded
    bias_name = free_name(name.removesuffix("weight") + "bias", network.tensors, shared=given is None)
    network.tensors[bias_name] = bias.float()
    with network.graph.inserting_before(layer):
        args = (layer.args[0], network.graph.get_attr(name), network.graph.get_attr(bias_name), *layer.args[3:])
    layer.args = args


def free_name(name: str, taken: dict[str, Tensor], shared: bool) -> str:
    """`name` itself, or with the first free number behind it when it is shared and taken."""
    if not (shared and name in taken):
        return name
    return next(f"{name}_{number}" for number in range(1, len(taken) + 2) if f"{name}_{number}" not in taken)
