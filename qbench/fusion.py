"""Fusion, decided once and before any backend: a layer, its residual and its clamp become one node.

`fuse` rewrites a normalized network into calls of `float_ops`; what has no integer form keeps its aten call and stays
in float. Pure moves of data (reshape, max-pool, ...) keep their aten call too: they work on codes as they are.
"""

from __future__ import annotations

import fnmatch
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops
from qbench.attention import is_attention, only_masks
from qbench.capture import Network
from qbench.normalize import batch_norm_affine, free_name
from qbench.recurrent import RECURRENT, lstm_operands
from qbench.transposed import swapped

aten = torch.ops.aten

CLAMPS: dict[Any, tuple[float | None, float | None] | None] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: None,
    aten.clamp.default: None,
    aten.clamp_min.default: None,
    aten.clamp_max.default: None,
    aten.clip.default: None,
}
LAYERS = (float_ops.linear, float_ops.conv, float_ops.conv_transpose)
CONVOLUTIONS: dict[Any, tuple[Any, int]] = {
    aten.conv1d.default: (float_ops.conv, 1),
    aten.conv2d.default: (float_ops.conv, 2),
    aten.conv_transpose1d.default: (float_ops.conv_transpose, 1),
    aten.conv_transpose2d.input: (float_ops.conv_transpose, 2),
}
CLAMPABLE = {
    *LAYERS,
    float_ops.add,
    float_ops.mul,
    float_ops.mean,
    float_ops.average_pool,
    float_ops.adaptive_average_pool,
    float_ops.channel_affine,
}
REORDERINGS = {aten.transpose.int, aten.permute.default, aten.t.default, aten.flip.default}
MOVES = {
    *REORDERINGS,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.roll.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    operator.getitem,
}
MAC_OPS = {
    "linear", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "mm", "bmm", "addmm", "addbmm", "baddbmm", "matmul", "mv", "dot", "einsum", "bilinear",
    "scaled_dot_product_attention", "embedding_bag", "tensordot", *RECURRENT,
}  # fmt: skip


UNTAGGED_UNARY = {aten.hardswish.default}  # pointwise, though torch does not tag it so


NAMED = {*LAYERS, float_ops.lstm, float_ops.attention, float_ops.layer_norm, float_ops.embedding}


def is_move(node: fx.Node) -> bool:
    """Does the node only move codes (or take their maximum)?"""
    if node.target in (aten.constant_pad_nd.default, aten.pad.default):
        return _pads_zero(node)
    return node.target in MOVES


def _pads_zero(node: fx.Node) -> bool:
    if node.target is aten.pad.default and len(node.args) > 2 and node.args[2] != "constant":
        return True  # reflect and replicate move codes as they are
    values = [*node.args[2:], *node.kwargs.values()]
    return not any(isinstance(value, float | int) and value for value in values)


def has_macs(node: fx.Node, operations: set[str] = MAC_OPS) -> bool:
    """Does the aten call multiply and accumulate (and is it one of these operations)?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.split("::")[1] in operations


def is_layer(node: fx.Node) -> bool:
    """Is the aten call one that keep_float can name: with multiply-accumulates, or with a weight to look up?"""
    return has_macs(node) or node.target is aten.embedding.default


def kept_layers(network: Network, patterns: tuple[str, ...]) -> set[str]:
    """The layers that stay in float. Raises ValueError for a pattern that matches none of the layers.

    The name of an nn.LSTM stands for all its layers (`lstm` for `lstm.l0`, `lstm.l1`, ...).
    """
    nodes = [node for node in network.graph.nodes if is_layer(node)]
    names = {(layer := node.meta["layer"]): {layer, node.meta.get("module", layer)} for node in nodes}
    for pattern in patterns:
        if not any(fnmatch.filter(alike, pattern) for alike in names.values()):
            raise ValueError(f"keep_float: {pattern!r} matches no layer; layers are {', '.join(names)}")
    return {layer for layer, alike in names.items() if any(fnmatch.filter(alike, pattern) for pattern in patterns)}


def refuse_float_macs(graph: fx.Graph, kept: set[str], operations: set[str] = MAC_OPS) -> None:
    """Raise ValueError for a node that would multiply and accumulate in float without being named in keep_float."""
    for node in graph.nodes:
        if has_macs(node, operations) and node.meta["layer"] not in kept:
            raise ValueError(
                f"{node.target} in layer {node.meta['layer'] or node.name!r} has no int8 form; "
                f"name the layer in keep_float to leave it in float"
            )


def fuse(network: Network, kept: set[str]) -> Network:
    """A new network over `float_ops`, in which the `kept` layers keep their aten calls."""
    fused = Network(fx.Graph(), dict(network.tensors), network.inputs, network.outputs)
    values: dict[fx.Node, Any] = {}
    masks = only_masks(network.graph, has_macs)
    for node in network.graph.nodes:
        translated = None
        if node.op == "call_function" and node not in masks and not (is_layer(node) and node.meta["layer"] in kept):
            translated = _translate(fused, node, values)
        values[node] = translated or fused.graph.node_copy(node, lambda n: values[n])
        if translated is None:
            values[node].meta = dict(node.meta)
    _fuse_residuals(fused.graph)
    _fuse_clamps(fused.graph)
    fused.graph.eliminate_dead_code()
    for node in fused.graph.nodes:
        if node.target in NAMED:
            node._rename(node.meta["layer"].replace(".", "_") or node.name)
    fused.graph.lint()
    return fused


def _translate(fused: Network, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node | None:
    """The float_ops call for an aten call, None where there is none."""
    call = _call(fused, node, fx.map_arg(node.args, lambda n: values[n]), dict(node.kwargs))
    if call is None:
        return None
    target, args, kwargs = call
    new = fused.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def _call(fused: Network, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]] | None:
    full = _full(node, args, kwargs)
    match node.target:
        case _ if (layer := _layer(node, full)) is not None:
            return *_by_output(fused, *layer), {}
        case aten.add.Tensor | aten.sub.Tensor if _is_arithmetic(node):
            sign = 1.0 if node.target is aten.add.Tensor else -1.0
            return float_ops.add, (*_operands(fused, full, node), sign * full["alpha"]), {}
        case aten.mul.Tensor if _is_arithmetic(node):
            return float_ops.mul, _operands(fused, full, node), {}
        case aten.div.Tensor if _floats(node) and isinstance(full["other"], int | float) and full["other"]:
            return float_ops.mul, _operands(fused, {**full, "other": 1.0 / full["other"]}, node), {}
        case aten.neg.default if _floats(node):
            return float_ops.mul, _operands(fused, {"self": full["self"], "other": -1.0}, node), {}
        case aten.mean.dim if full["dim"] and full["dtype"] is None:
            return float_ops.mean, (full["self"], full["dim"], full["keepdim"]), {}
        case aten.avg_pool1d.default | aten.avg_pool2d.default:
            return float_ops.average_pool, _pool_arguments(full, 1 if "1d" in str(node.target) else 2), {}
        case aten.adaptive_avg_pool1d.default | aten.adaptive_avg_pool2d.default:
            return float_ops.adaptive_average_pool, (full["self"], full["output_size"]), {}
        case aten.layer_norm.default if _floats(node) and _has_constants(full["weight"], full["bias"]):
            names = ("input", "normalized_shape", "weight", "bias", "eps")
            return float_ops.layer_norm, tuple(full[name] for name in names), {}
        case aten.batch_norm.default:
            return float_ops.channel_affine, _batch_norm_arguments(fused, full), {}
        case aten.cat.default if _floats(node):
            return float_ops.cat, (full["tensors"], full["dim"]), {}
        case aten.prelu.default if _is_constant(full["weight"]) and fused.tensors[full["weight"].target].numel() == 1:
            slope = float(fused.tensors[full["weight"].target])
            return float_ops.unary, (full["self"], aten.leaky_relu.default, (slope,), {}), {}
        case target if target in CLAMPS:
            return float_ops.clamp, (full["self"], *_bounds(node.target, full)), {}
        case _ if _is_unary(node):
            _, *rest = node.args
            return float_ops.unary, (args[0], node.target, tuple(rest), dict(node.kwargs)), {}
    return None


def _full(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an aten call by name, defaults included."""
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    return {a.name: a.default_value for a in schema} | dict(zip([a.name for a in schema], args, strict=False)) | kwargs


def layer_call(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The float_ops function and arguments of a layer with constant weights, or an attention; else None."""
    return _layer(node, _full(node, node.args, dict(node.kwargs)))


def _layer(node: fx.Node, full: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    match node.target:
        case aten.linear.default if _is_constant(full["weight"]):
            return float_ops.linear, (full["input"], full["weight"], full["bias"])
        case _ if node.target in CONVOLUTIONS and _is_constant(full["weight"]):
            function, count = CONVOLUTIONS[node.target]
            window = [_wide(full[name], count) for name in ("stride", "padding", "dilation")]
            more = [_wide(full["output_padding"], count)] if "output_padding" in full else []
            return function, (full["input"], full["weight"], full["bias"], *window, full["groups"], *more)
        case aten.lstm.input if (operands := lstm_operands(full)) is not None:
            return float_ops.lstm, operands
        case aten.embedding.default if _is_constant(full["weight"]):
            return float_ops.embedding, (full["indices"], full["weight"])
        case aten.scaled_dot_product_attention.default if is_attention(node) and _floats(node):
            names = ("query", "key", "value", "attn_mask", "is_causal", "scale")
            return float_ops.attention, tuple(full[name] for name in names)
    return None


def layer_weight(network: Network, call: tuple[Any, tuple[Any, ...]]) -> Tensor:
    """The float weight of a `layer_call`, [outputs, inputs / groups, ...] for every kind of layer."""
    function, (_, weight, *more) = call
    held = network.tensors[weight.target]
    return swapped(held, more[4]) if function is float_ops.conv_transpose else held


def _by_output(fused: Network, function: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The layer with a weight in the form of `layer_weight`, a tensor of its own where torch's form is another."""
    if function is not float_ops.conv_transpose:
        return function, args
    name = free_name(args[1].target, fused.tensors, shared=True)
    fused.tensors[name] = layer_weight(fused, (function, args))
    return function, (args[0], fused.graph.get_attr(name), *args[2:])


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _has_constants(*values: Any) -> bool:
    """Is each of the values, where there is one, constant?"""
    return all(value is None or _is_constant(value) for value in values)


def _floats(node: fx.Node) -> bool:
    """Is the result one float tensor?"""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_arithmetic(node: fx.Node) -> bool:
    """Is the result one float tensor, computed from tensors and constants (and not from a size of the input)?"""
    return _floats(node) and all(isinstance(source.meta["val"], torch.Tensor) for source in node.all_input_nodes)


def _wide(size: Any, count: int) -> list[int]:
    """A size for each dimension."""
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * count if len(sizes) == 1 else sizes


def _operands(fused: Network, full: dict[str, Any], node: fx.Node) -> tuple[Any, Any]:
    """Both operands as nodes: a number becomes a constant tensor, quantized later with its own range."""

    def as_node(value: Any) -> Any:
        if not isinstance(value, int | float):
            return value
        name = free_name(f"constant_{node.name}", fused.tensors, shared=True)
        fused.tensors[name] = torch.tensor(float(value))
        return fused.graph.get_attr(name)

    return as_node(full["self"]), as_node(full["other"])


def _pool_arguments(full: dict[str, Any], count: int) -> tuple[Any, ...]:
    kernel = _wide(full["kernel_size"], count)
    stride = _wide(full["stride"], count) if full["stride"] else kernel
    padding, divisor = _wide(full["padding"], count), full.get("divisor_override")
    return full["self"], kernel, stride, padding, full["ceil_mode"], full["count_include_pad"], divisor


def _batch_norm_arguments(fused: Network, full: dict[str, Any]) -> tuple[Any, ...]:
    held = [full[name] for name in ("weight", "bias", "running_mean", "running_var")]
    weight, bias, mean, variance = (None if node is None else fused.tensors[node.target] for node in held)
    assert mean is not None
    assert variance is not None
    nodes = []
    for kind, tensor in zip(
        ("gamma", "beta"), batch_norm_affine(weight, bias, mean, variance, full["eps"]), strict=True
    ):
        name = free_name(f"{held[2].target.removesuffix('.running_mean')}.{kind}", fused.tensors, shared=True)
        fused.tensors[name] = tensor
        nodes.append(fused.graph.get_attr(name))
    return full["input"], *nodes


def _bounds(target: Any, full: dict[str, Any]) -> tuple[float | None, float | None]:
    if (fixed := CLAMPS[target]) is not None:
        return fixed
    low, high = full.get("min_val", full.get("min")), full.get("max_val", full.get("max"))
    return None if low is None else float(low), None if high is None else float(high)


def _is_unary(node: fx.Node) -> bool:
    """A float pointwise function of one tensor and constants."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags and node.target not in UNTAGGED_UNARY:
        return False
    tensors = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
    return _floats(node) and len(tensors) == 1 and tensors[0] is node.args[0] and _floats(tensors[0])


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return [str(size) for size in a.meta["val"].shape] == [str(size) for size in b.meta["val"].shape]


def _fuse_residuals(graph: fx.Graph) -> None:
    """layer -> add becomes the layer with a residual, when nothing else reads the layer's own result."""
    for node in list(graph.nodes):
        if node.target is not float_ops.add or node.args[2] != 1:
            continue
        for layer, residual in (node.args[:2], node.args[1::-1]):
            ready = layer.target in LAYERS and "residual" not in layer.kwargs
            alone = len(layer.users) == 1 and layer is not residual  # y + y reads y itself
            if ready and alone and not _is_constant(residual) and _same_shape(layer, residual):
                with graph.inserting_before(node):
                    fused = graph.call_function(layer.target, layer.args, {"residual": residual})
                fused.meta = dict(layer.meta)
                node.replace_all_uses_with(fused)
                graph.erase_node(node)
                graph.erase_node(layer)
                break


def _fuse_clamps(graph: fx.Graph) -> None:
    """node -> clamp becomes the node with bounds, when nothing else reads the node's own result."""
    for node in list(graph.nodes):
        before = node.args[0] if node.target is float_ops.clamp else None
        if before is None or before.target not in CLAMPABLE or len(before.users) != 1:
            continue
        low, high = _composed((before.kwargs.get("low"), before.kwargs.get("high")), node.args[1:3])
        before.kwargs = {**before.kwargs, "low": low, "high": high}
        node.replace_all_uses_with(before)
        graph.erase_node(node)


def _composed(first: Any, second: Any) -> tuple[float | None, float | None]:
    """The bounds of a clamp to `second` after one to `first`, which need not overlap."""
    low, high = (-math.inf if second[0] is None else second[0]), (math.inf if second[1] is None else second[1])
    bounds = (-math.inf if first[0] is None else first[0]), (math.inf if first[1] is None else first[1])
    both = [min(max(bound, low), high) for bound in bounds]
    return (None if math.isinf(both[0]) else both[0]), (None if math.isinf(both[1]) else both[1])
