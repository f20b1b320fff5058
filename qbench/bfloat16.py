"""The second float baseline: the network's own operations on bfloat16 weights and values.

float32 at the edges only: each float input is converted once, each float result is converted back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench.capture import Network
from qbench.identity import answering_environment
from qbench.program import Program

aten = torch.ops.aten


def bfloat16_program(network: Network) -> Program:
    """The network with its float32 weights, inputs and constants in bfloat16; everything else stays as it is.

    A conversion to float32 inside the network becomes one to bfloat16: a layer takes no mixed operands.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in network.graph.nodes:
        if node.op == "output":
            graph.output([_float32(graph, result, values) for result in node.args[0]])
            continue
        values[node] = copied = graph.node_copy(node, lambda n: values[n])
        copied.args, copied.kwargs = fx.node.map_aggregate((copied.args, copied.kwargs), _dtype)
        copied.meta = {"layer": node.meta.get("layer", "")}
        if _starts_float32(network, node):
            values[node] = graph.call_function(aten.to.dtype, (copied, torch.bfloat16))
            values[node].meta = dict(copied.meta)
    tensors = {name: t.to(torch.bfloat16) if t.dtype == torch.float32 else t for name, t in network.tensors.items()}
    return Program(graph, tensors, network.inputs, network.outputs)


def is_emulated(program: Program) -> bool:
    """Does the program compute in bfloat16 on a processor without instructions for it?

    Torch then converts to float32 and back around every operation: the same numbers, but not the speed of bfloat16.
    """
    used = any(tensor.dtype == torch.bfloat16 for tensor in program.tensors.values())
    return used and not any("bf16" in flag for flag in answering_environment()["cpu_flags"])


def _dtype(value: Any) -> Any:
    return torch.bfloat16 if value is torch.float32 else value


def _starts_float32(network: Network, node: fx.Node) -> bool:
    """Is the node's value float32 without coming from one: an input, zeros, codes times a float?"""
    said = torch.float32 in (*node.args, *node.kwargs.values())  # then the call itself says bfloat16 now
    if node.op == "get_attr" or said or not _holds_float32(network, node):
        return False
    return not any(_holds_float32(network, source) for source in node.all_input_nodes)


def _holds_float32(network: Network, node: fx.Node) -> bool:
    """Is the node's value float32, or one of its values (a split, say)?"""
    value = network.tensors[str(node.target)] if node.op == "get_attr" else node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, Tensor) and one.dtype == torch.float32 for one in values)


def _float32(graph: fx.Graph, result: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    """A result in float32 where the network has it in float32."""
    value = result.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return values[result]
    return graph.call_function(aten.to.dtype, (values[result], torch.float32))
