"""A program: a graph of int8 operations and float calls over named tensors, and how a backend runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qbench import structure
from qbench.backends import Engine
from qbench.capture import attach
from qbench.fusion import has_macs, is_move
from qbench.ops import ACTIVATIONS, is_int8_op
from qbench.recurrent import RECURRENT, check_lstm_sizes, is_cell_state, recurrent_macs

TABLED = {getattr(torch.ops.qbench, name).default for name in ("linear", "conv", "conv_transpose")}
EDGES = {torch.ops.qbench.quantize.default, torch.ops.qbench.dequantize.default}


@dataclass
class Macs:
    """Multiply-accumulates performed so far, counted by the kernels as they run."""

    int8: int = 0
    float32: int = 0

    @property
    def int8_fraction(self) -> float | None:
        """The share done in int8, None when nothing was multiplied."""
        total = self.int8 + self.float32
        return self.int8 / total if total else None


def check_inputs(specs: list[dict[str, Any]], leaves: list[Any]) -> None:
    """Raise ValueError when the tensors are not what a network takes; `specs` gives shape (None = any) and dtype.

    They lie on the CPU and are dense: the engine reads their memory.
    """
    if len(leaves) != len(specs):
        raise ValueError(f"the network takes {len(specs)} input tensors, {len(leaves)} were given")
    for index, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        want = spec["shape"]
        if not isinstance(leaf, Tensor) or len(leaf.shape) != len(want) or not all(map(_takes, want, leaf.shape)):
            sizes = ", ".join("any" if size is None else str(size) for size in want)
            have = list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"input {index} has the shape {have}, the network takes [{sizes}]")
        if leaf.dtype is not getattr(torch, spec["dtype"]):
            raise ValueError(f"input {index} is {str(leaf.dtype)[6:]}, the network takes {spec['dtype']}")
        if not leaf.is_cpu or leaf.layout is not torch.strided:
            where = f"{leaf.device.type}, {str(leaf.layout)[6:]}"
            raise ValueError(f"input {index} is a tensor of another kind ({where}); give a dense one on the CPU")


def _takes(size: int | None, given: int) -> bool:
    return size is None or size == given


@dataclass
class Program:
    """A graph over named tensors: what `.qb` files hold and backends execute.

    `inputs` gives shape (None = any size) and dtype of each placeholder, `outputs` how the results are nested.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    inputs: list[dict[str, Any]]
    outputs: structure.Structure

    def __post_init__(self) -> None:
        used = [node.target for node in self.graph.nodes if node.op == "get_attr"]
        self.tensors = {name: self.tensors[name].contiguous() for name in dict.fromkeys(used)}
        self.graph.lint()

    def module(self) -> fx.GraphModule:
        """The program as a GraphModule; its code is readable documentation."""
        return fx.GraphModule(attach(self.tensors), self.graph)

    @property
    def float_ops(self) -> list[str]:
        """The calls that compute in float, by node: neither int8 operations nor moves of codes."""
        kinds = _value_kinds(self)
        return [
            f"{node.name}: {node.target}"
            for node in self.graph.nodes
            if node.op == "call_function"
            and not is_int8_op(node.target)
            and kinds[node] == "float"
            and node.target is not operator.getitem  # one of several results: nothing is computed
        ] + [
            f"{node.name}: {node.target}"
            for node in self.graph.nodes
            if is_int8_op(node.target) and "weight_only" in str(node.target)
        ]

    def lower(self, backend: Engine, macs: Macs) -> Callable[..., Any]:
        """A function of the input tensors (nested as the model's own) that runs the program on a backend."""
        lowered = backend.runner(torch.inference_mode()(lower_graph(self, backend, macs)), macs)

        def run(*inputs: Any) -> Any:
            nested = not all(isinstance(value, Tensor) for value in inputs)
            leaves = pytree.tree_leaves(inputs) if nested else list(inputs)
            check_inputs(self.inputs, leaves)
            return structure.build(self.outputs, list(lowered(*leaves)))

        return run


def _value_kinds(program: Program) -> dict[fx.Node, str]:
    """For each node whether its value is float, codes, or a number (sizes, indices, moved constants)."""
    kinds: dict[fx.Node, str] = {}
    dtypes = iter(spec["dtype"] for spec in program.inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = "float" if getattr(torch, next(dtypes)).is_floating_point else "number"
        elif node.target is torch.ops.qbench.dequantize.default:
            kinds[node] = "float"
        elif is_int8_op(node.target):
            leaves_float = "dynamic" in str(node.target) or "weight_only" in str(node.target)
            leaves_float |= "scale" in node.kwargs and node.kwargs["scale"] is None
            kinds[node] = "float" if leaves_float else "codes"
        elif is_cell_state(node, torch.ops.qbench.lstm.default):
            kinds[node] = "float"
        elif node.op == "call_function":
            inputs = {kinds[source] for source in node.all_input_nodes if source.op != "get_attr"} - {"number"}
            arithmetic = not isinstance(node.target, torch._ops.OpOverload) or (is_move(node) and node.all_input_nodes)
            sized = (arithmetic and not inputs) or "sym_size" in str(node.target)
            kinds[node] = "number" if sized else "codes" if inputs == {"codes"} else "float"
        else:
            kinds[node] = "constant"
    return kinds


def lower_graph(program: Program, backend: Engine, macs: Macs, each: bool = False) -> fx.GraphModule:
    """The graph again, with a prepared kernel in the place of each int8 operation.

    `each`: every operation has a kernel of its own, also where the backend would run two of them in one.
    """
    graph, held = fx.Graph(), {}
    values: dict[fx.Node, fx.Node] = {}
    fused = _fused_tables(program) if backend.fuses_tables and not each else {}
    for node in program.graph.nodes:
        if node in fused.values():
            values[node] = values[node.args[0]]
        elif is_int8_op(node.target):
            more = {"table": program.tensors[fused[node].kwargs["table"].target]} if node in fused else {}
            values[node] = _kernel_node(graph, node, program.tensors, backend, macs, values, more)
        elif node.op == "call_function" and has_macs(node):
            kernel = _counting(node.target, macs)
            values[node] = graph.call_function(kernel, *fx.map_arg((node.args, node.kwargs), lambda n: values[n]))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
            if node.op == "call_function":
                values[node].target = backend.call(node.target)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "get_attr":
            held[node.target] = program.tensors[node.target]
    return fx.GraphModule(attach(held), graph)


def _fused_tables(program: Program) -> dict[fx.Node, fx.Node]:
    """The tables that alone read the codes of a layer, by layer."""
    return {
        node.args[0]: node
        for node in program.graph.nodes
        if node.target is torch.ops.qbench.table.default
        and node.args[0].target in TABLED
        and len(node.args[0].users) == 1
    }


def _kernel_node(
    graph: fx.Graph,
    node: fx.Node,
    tensors: dict[str, Tensor],
    backend: Engine,
    macs: Macs,
    values: dict[fx.Node, fx.Node],
    more: dict[str, Any],
) -> fx.Node:
    """The backend's kernel of a node; `more` are constants beside the node's own."""
    schema = node.target._schema.arguments
    given: dict[str, Any] = {a.name: a.default_value for a in schema} | dict(node.kwargs)
    given |= dict(zip([a.name for a in schema], node.args, strict=False))
    activations = [given[name] for name in ACTIVATIONS if name in given]
    constants = {
        name: tensors[value.target] if isinstance(value, fx.Node) else value
        for name, value in given.items()
        if name not in ACTIVATIONS
    } | more
    kernel = backend.kernel(node, constants, macs)
    args = [None if a is None else values[a] for a in activations]
    while args[-1] is None:
        args.pop()
    return graph.create_node("call_function", kernel, tuple(args), name=node.name)


def _counting(target: Any, macs: Macs) -> Callable[..., Any]:
    """The float call itself, counting its multiply-accumulates."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        if target is torch.ops.aten.lstm.input:
            check_lstm_sizes(*args, **kwargs)
        result = target(*args, **kwargs)
        macs.float32 += _float_macs(target, args, result)
        return result

    counted.__name__ = target._schema.name.split("::")[1]
    counted.__module__ = __name__
    return counted


def _float_macs(target: Any, args: tuple[Any, ...], result: Any) -> int:
    name = target._schema.name.split("::")[1]
    if name in ("linear", "conv1d", "conv2d", "conv3d", "convolution"):
        return int(result.numel() * args[1].numel() // args[1].shape[0])
    if name.startswith("conv_transpose"):
        return int(args[0].numel() * args[1].numel() // args[1].shape[0])
    if name in ("mm", "bmm", "matmul"):
        return int(result.numel() * args[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return int(result.numel() * args[1].shape[-1])
    if name in RECURRENT and not name.endswith("cell"):
        return recurrent_macs(args[0], args[2])
    if name == "scaled_dot_product_attention":
        rows, keys = result.numel() // result.shape[-1], args[1].shape[-2]
        return int(rows * keys * (args[0].shape[-1] + result.shape[-1]))
    return int(result.numel()) if isinstance(result, Tensor) else 1
