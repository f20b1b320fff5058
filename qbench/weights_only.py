"""Programs whose values stay float between the layers: fp32, weight-only (woq) and dynamic (ptdq)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench.capture import Network
from qbench.convert import WINDOW, weight_arguments
from qbench.fusion import has_macs, kept_layers, layer_call, layer_weight, refuse_float_macs
from qbench.numerics import check_accumulator, quantize_weight, require_finite
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
    calls = {node: call for node in network.graph.nodes if (call := _replaced(node, kept)) is not None}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    tensors = {
        str(node.target): network.tensors[str(node.target)]
        for node in network.graph.nodes
        if node.op == "get_attr" and not all(user in calls for user in node.users)
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
            function, (x, _, bias_node, *window) = call
            arguments: dict[str, Any] = dict(zip(WINDOW, window, strict=False))
            arguments |= _weight(network, node, layer_weight(network, call), bias_node, recipe, kind, hold) | options
            name = f"{kind}_{function.__name__}"
            values[node] = graph.create_node(
                "call_function",
                getattr(int8, name).default,
                (values[x],),
                arguments,
                name=node.meta["layer"].replace(".", "_") or node.name,
            )
        values[node].meta = {"layer": node.meta.get("layer", "")}
    graph.eliminate_dead_code()
    return Program(graph, tensors, network.inputs, network.outputs)


def _replaced(node: fx.Node, kept: set[str]) -> tuple[Any, tuple[Any, ...]] | None:
    """The layer's function and arguments when the node is one to quantize, else None."""
    if node.op != "call_function" or not has_macs(node) or node.meta["layer"] in kept:
        return None
    return layer_call(node)


def _weight(
    network: Network,
    node: fx.Node,
    weight: Tensor,
    bias_node: fx.Node | None,
    recipe: Recipe,
    kind: str,
    hold: Any,
) -> dict[str, Any]:
    layer = node.meta["layer"] or node.name
    bias = None if bias_node is None else network.tensors[bias_node.target]
    try:
        if bias is not None:
            require_finite("the bias", bias)
        quantized = quantize_weight(weight, recipe.granularity, recipe.scheme, recipe.group_size)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    if kind == "dynamic":
        check_accumulator(layer, quantized, None)
    return weight_arguments(hold, layer, quantized, bias)
