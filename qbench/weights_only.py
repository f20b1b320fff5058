"""Programs whose values stay float between the layers: fp32, weight-only (woq) and dynamic (ptdq)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops
from qbench.attention import check_attention
from qbench.capture import Network
from qbench.convert import rows_arguments, weight_arguments
from qbench.fusion import is_layer, kept_layers, layer_call, refuse_float_macs
from qbench.numerics import QWeight, check_accumulator, quantize_weight, require_finite
from qbench.program import Program
from qbench.recipe import Recipe

int8 = torch.ops.qbench


def float_program(network: Network) -> Program:
    """The network as it is, in the same form as the others: what an fp32 file holds."""
    return Program(network.graph, network.tensors, network.inputs, network.outputs)


def weight_only_program(network: Network, recipe: Recipe) -> Program:
    """Each layer reads its int8 weight back as float. Operations without weights stay as they are."""
    return _replace_layers(network, recipe, "weight_only", {})


def dynamic_program(network: Network, recipe: Recipe) -> Program:
    """Each layer quantizes its input at run time and multiplies in int8."""
    options = {"rows": recipe.activation_granularity.name, "scheme": recipe.activation_scheme.name}
    program = _replace_layers(network, recipe, "dynamic", options)
    refuse_float_macs(program.graph, kept_layers(network, recipe.keep_float))
    return program


def _replace_layers(network: Network, recipe: Recipe, kind: str, options: dict[str, Any]) -> Program:
    kept = kept_layers(network, recipe.keep_float)
    calls = {node: call for node in network.graph.nodes if (call := _replaced(node, kept, kind)) is not None}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    tensors = {
        str(node.target): network.tensors[str(node.target)]
        for node in network.graph.nodes
        if node.op == "get_attr" and not all(user in calls and node in _parameters(*calls[user]) for user in node.users)
    }

    def hold(name: str, tensor: Tensor) -> fx.Node:
        known = tensors.setdefault(name, tensor)
        if known is not tensor and not (known.dtype == tensor.dtype and torch.equal(known, tensor)):
            return hold(f"{name}_", tensor)  # a tied weight, or a module that is used twice
        return graph.get_attr(name)

    for node in network.graph.nodes:
        call = calls.get(node)
        if call is None:
            values[node] = graph.node_copy(node, lambda n: values[n])
        else:
            name, sources, arguments = _written(network, node, call, recipe, kind, hold, options)
            values[node] = graph.create_node(
                "call_function",
                getattr(int8, name).default,
                tuple(values[source] for source in sources),
                arguments,
                name=node.meta["layer"].replace(".", "_") or node.name,
            )
        values[node].meta = {"layer": node.meta.get("layer", "")}
    graph.eliminate_dead_code()
    return Program(graph, tensors, network.inputs, network.outputs)


def _replaced(node: fx.Node, kept: set[str], kind: str) -> tuple[Any, tuple[Any, ...]] | None:
    """The layer's function and arguments when the node is one to quantize, else None."""
    if node.op != "call_function" or not is_layer(node) or node.meta["layer"] in kept:
        return None
    call = layer_call(node)
    without_weights = call is not None and call[0] is float_ops.attention
    return None if without_weights and kind == "weight_only" else call


def _parameters(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a layer's operation holds in a form of its own: the weight and the bias."""
    if function is float_ops.attention:
        return ()
    return arguments[1:2] if function is float_ops.embedding else arguments[1:3]


def _written(
    network: Network, node: fx.Node, call: Any, recipe: Recipe, kind: str, hold: Any, options: dict[str, Any]
) -> tuple[str, list[fx.Node], dict[str, Any]]:
    """Name, activations and other arguments of the operation that a layer becomes."""
    function, arguments = call
    if function is float_ops.attention:
        check_attention(node)
        *sources, causal, factor = arguments
        return "dynamic_attention", [s for s in sources if s], {"causal": causal, "factor": factor} | options
    if function is float_ops.embedding:
        indices, weight_node = arguments
        weight, _ = _quantized(network, node, weight_node, None, recipe)
        rows = rows_arguments(hold, node.meta["layer"] or node.name, weight)
        return "embedding", [indices], rows | {"scale": None, "zero_point": 0, "q_min": 0, "q_max": 255}
    x, weight_node, bias_node, *window = arguments
    given: dict[str, Any] = dict(zip(("stride", "padding", "dilation", "groups"), window, strict=False))
    given |= _weight(network, node, weight_node, bias_node, recipe, kind, hold) | options
    return f"{kind}_{'linear' if function is float_ops.linear else 'conv'}", [x], given


def _weight(
    network: Network,
    node: fx.Node,
    weight_node: fx.Node,
    bias_node: fx.Node | None,
    recipe: Recipe,
    kind: str,
    hold: Any,
) -> dict[str, Any]:
    layer = node.meta["layer"] or node.name
    weight, bias = _quantized(network, node, weight_node, bias_node, recipe)
    if kind == "dynamic":
        check_accumulator(layer, weight, None)
    return weight_arguments(hold, layer, weight, bias)


def _quantized(
    network: Network, node: fx.Node, weight_node: fx.Node, bias_node: fx.Node | None, recipe: Recipe
) -> tuple[QWeight, Tensor | None]:
    """The int8 weight and the float bias of a layer. Raises ValueError that names the layer."""
    bias = None if bias_node is None else network.tensors[bias_node.target]
    try:
        if bias is not None:
            require_finite("the bias", bias)
        weight = network.tensors[weight_node.target]
        return quantize_weight(weight, recipe.granularity, recipe.scheme, recipe.group_size), bias
    except ValueError as error:
        raise ValueError(f"layer {node.meta['layer'] or node.name}: {error}") from error
