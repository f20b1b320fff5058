"""Programs whose values stay float between the layers: fp32, weight-only (woq) and dynamic (ptdq)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops
from qbench.arguments import WINDOW, lstm_arguments, rows_arguments, weight_arguments
from qbench.attention import check_attention
from qbench.capture import Network
from qbench.fusion import is_layer, kept_layers, layer_call, layer_weight, refuse_float_macs
from qbench.numerics import QWeight, check_accumulator, quantize_weight, require_finite
from qbench.program import Program
from qbench.recipe import Recipe
from qbench.recurrent import RECURRENT, lstm_bias

int8 = torch.ops.qbench

Call = tuple[Any, tuple[Any, ...]]  # a function of float_ops and its operands


def float_program(network: Network) -> Program:
    """The network as it is, in the same form as the others: what an fp32 file holds."""
    return Program(network.graph, network.tensors, network.inputs, network.outputs)


def weight_only_program(network: Network, recipe: Recipe) -> Program:
    """Each layer reads its int8 weight back as float. Operations without weights stay as they are.

    Raises ValueError for a recurrent layer of another kind than LSTM: passing over its weights would be fp32 under
    another name.
    """
    program = _replace_layers(network, recipe, "weight_only", {})
    refuse_float_macs(program.graph, kept_layers(network, recipe.keep_float), RECURRENT)
    return program


def dynamic_program(network: Network, recipe: Recipe) -> Program:
    """Each layer quantizes its input at run time and multiplies in int8."""
    options = {"rows": recipe.activation_granularity.name, "scheme": recipe.activation_scheme.name}
    program = _replace_layers(network, recipe, "dynamic", options)
    refuse_float_macs(program.graph, kept_layers(network, recipe.keep_float))
    return program


def _replace_layers(network: Network, recipe: Recipe, kind: str, options: dict[str, Any]) -> Program:
    kept = kept_layers(network, recipe.keep_float)
    calls = {node: call for node in network.graph.nodes if (call := _replaced(node, kept, kind)) is not None}
    read = {source for call in calls.values() for source in _inputs(call)}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    tensors = {
        str(node.target): network.tensors[str(node.target)]
        for node in network.graph.nodes
        if node.op == "get_attr" and (node in read or not all(user in calls for user in node.users))
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
            inputs = [None if source is None else values[source] for source in _inputs(call)]
            while inputs[-1] is None:
                inputs.pop()
            name, arguments = _written(network, node, call, recipe, kind, hold, options)
            values[node] = graph.create_node(
                "call_function",
                getattr(int8, name).default,
                tuple(inputs),
                arguments,
                name=node.meta["layer"].replace(".", "_") or node.name,
            )
        values[node].meta = {"layer": node.meta.get("layer", "")}
    graph.eliminate_dead_code()
    return Program(graph, tensors, network.inputs, network.outputs)


def _replaced(node: fx.Node, kept: set[str], kind: str) -> Call | None:
    """The layer's function and arguments when the node is one to quantize, else None."""
    if node.op != "call_function" or not is_layer(node) or node.meta["layer"] in kept:
        return None
    call = layer_call(node)
    without_weights = call is not None and call[0] is float_ops.attention
    return None if without_weights and kind == "weight_only" else call


def _inputs(call: Call) -> tuple[Any, ...]:
    """The operands that are no parameters: x, the state of an LSTM; q, k, v and the mask of an attention."""
    function, operands = call
    if function is float_ops.attention:
        return operands[:4]
    return (operands[0], *operands[5:7]) if function is float_ops.lstm else operands[:1]


def _written(
    network: Network, node: fx.Node, call: Call, recipe: Recipe, kind: str, hold: Any, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name of a layer's operation, and its arguments but for the inputs."""
    function, (_, *operands) = call
    layer = node.meta["layer"] or node.name

    def held(source: fx.Node | None) -> Any:
        return None if source is None else network.tensors[str(source.target)]

    if function is float_ops.attention:
        check_attention(node)
        return "dynamic_attention", {"causal": operands[3], "factor": operands[4]} | options
    if function is float_ops.embedding:
        weight, _ = _quantized(held(operands[0]), None, layer, recipe, "embedding")
        no_codes = {"scale": None, "zero_point": 0, "q_min": 0, "q_max": 255}
        return "embedding", rows_arguments(hold, layer, weight) | no_codes
    name = f"{kind}_{function.__name__}"
    if function is float_ops.lstm:
        weight_ih, weight_hh, *biases = map(held, operands[:4])
        weight, bias = _quantized(weight_ih, lstm_bias(*biases), layer, recipe, kind)
        hidden, _ = _quantized(weight_hh, None, layer, recipe, kind)
        return name, lstm_arguments(hold, layer, weight, hidden, bias) | options
    weight, bias = _quantized(layer_weight(network, call), held(operands[1]), layer, recipe, kind)
    window = dict(zip(WINDOW, operands[2:], strict=False))
    return name, window | weight_arguments(hold, layer, weight, bias) | options


def _quantized(
    weight: Tensor, bias: Tensor | None, layer: str, recipe: Recipe, kind: str
) -> tuple[QWeight, Tensor | None]:
    """The weight as codes, and the bias, which stays float32."""
    try:
        if bias is not None:
            require_finite("the bias", bias)
        quantized = quantize_weight(weight, recipe.granularity, recipe.scheme, recipe.group_size)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    if kind == "dynamic":
        check_accumulator(layer, quantized, None)
    return quantized, bias
