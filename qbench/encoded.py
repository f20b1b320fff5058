"""A program's graph as JSON and back: a closed set of calls, every argument checked before it becomes a node."""

from __future__ import annotations

import keyword
import math
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from qbench.checked import check_call

NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,300}")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+){0,50}")
DTYPES = ("float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
TENSOR_DTYPES = (*DTYPES, "bfloat16")  # of a file's tensors; inputs are DTYPES
CAST_DTYPES = (*TENSOR_DTYPES, "float16")  # what a call may convert to
SIZE_OPERATORS = {
    f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
# aten calls that torch tags neither core nor pointwise, all of which check their arguments (an lstm's: program.py)
FURTHER_CALLS = {
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d", "batch_norm", "channel_shuffle", "chunk", "conv1d",
    "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "flatten", "group_norm", "instance_norm", "layer_norm",
    "linear", "matmul", "max_pool1d", "max_pool2d", "narrow", "pad", "pixel_unshuffle", "repeat_interleave", "reshape",
    "roll", "softmax", "stack", "sym_size", "t", "transpose", "unbind", "unflatten", "upsample_nearest1d",
    "upsample_nearest2d", "hardswish", "upsample_bilinear2d", "unsafe_split", "contiguous", "log_softmax",
    "scaled_dot_product_attention", "adaptive_max_pool1d", "einsum", "expand_as", "glu", "linalg_vector_norm",
    "max_pool3d", "movedim", "pixel_shuffle", "prelu", "rms_norm", "split", "squeeze", "std", "sum", "swapaxes", "tile",
    "to", "type_as", "upsample_bicubic2d", "view_as", "where", "arange", "im2col", "linspace", "new_full", "new_ones",
    "new_zeros", "ones", "ones_like", "rot90", "tril", "triu", "zeros", "zeros_like", "lstm",
}  # fmt: skip
# core, but they trust indices or lengths among their arguments, or leave memory as it was
REFUSED_CALLS = {
    "as_strided", "from_file", "empty", "empty_strided", "resize", "_embedding_bag", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "lstm.data",
}  # fmt: skip


# --- graph to JSON ---------------------------------------------------------------------------------------------------


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order, each with its call and its arguments. Raises ValueError for what a file cannot hold."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": numbers[value]}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [encode(item) for item in value]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if isinstance(value, torch.dtype) and str(value)[6:] in CAST_DTYPES:
            return {"dtype": str(value)[6:]}
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return None  # a program runs on the CPU, in the layout of its tensors
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"a program with a {type(value).__name__} among its arguments cannot be saved")

    return [
        {
            "op": node.op,
            "name": node.name,
            "target": target_name(node.target) if node.op == "call_function" else str(node.target),
            "args": [encode(arg) for arg in node.args],
            "kwargs": {name: encode(value) for name, value in node.kwargs.items()},
            "layer": node.meta.get("layer", ""),
        }
        for node in graph.nodes
    ]


def target_name(target: Any) -> str:
    """`aten.relu.default`, `qbench.conv.default`, `operator.getitem`. Raises ValueError for any other function."""
    name = str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{getattr(target, '__name__', '?')}"
    find_target(name)
    return name


def find_target(name: str) -> Any:
    """The function of a name, from a closed set. Raises ValueError for a name outside it."""
    if name in SIZE_OPERATORS:
        return SIZE_OPERATORS[name]
    match = re.fullmatch(r"(aten|qbench)\.([a-z_][a-z0-9_]*)\.([A-Za-z0-9_]+)", name)
    packet = getattr(getattr(torch.ops, match[1]), match[2], None) if match else None
    target = getattr(packet, match[3], None) if match else None
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(f"unknown operation {name!r}")
    assert match is not None
    safe = {torch.Tag.core, torch.Tag.pointwise} & set(target.tags) or match[2] in FURTHER_CALLS
    refused = (
        {match[2], f"{match[2]}.{match[3]}"} & REFUSED_CALLS
        or match[2].endswith("_backward")
        or target._schema.is_mutable
    )
    if match[1] == "aten" and (not safe or refused):
        raise ValueError(f"operation {name!r} is not one that a saved program may call")
    return target


# --- JSON to graph ----------------------------------------------------------------------------------------------------


def decode_graph(entries: list[dict[str, Any]], tensors: dict[str, Tensor]) -> fx.Graph:
    """The graph again. Raises ValueError (or what Python raises for a wrong type) for entries of another form."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for entry in entries:
        op, name, target = entry["op"], entry["name"], entry["target"]
        if not isinstance(name, str) or not NODE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a node")
        if not isinstance(entry["args"], list) or not isinstance(entry["kwargs"], dict):
            raise ValueError(f"node {name}: its arguments are not a list and an object")
        args = tuple(_decode_argument(arg, nodes) for arg in entry["args"])
        kwargs = {key: _decode_argument(value, nodes) for key, value in entry["kwargs"].items()}
        if op == "call_function":
            target = find_target(target)
            check_call(target, args, kwargs, tensors)
        else:
            _check_edge(op, name, target, args, kwargs, tensors)
        nodes.append(graph.create_node(op, target, args, kwargs, name=name))
        nodes[-1].meta["layer"] = str(entry["layer"])
    ops = [node.op for node in nodes]
    if ops.count("output") != 1 or ops[-1] != "output" or not isinstance(nodes[-1].args[0], list | tuple):
        raise ValueError("a program ends with one list of results")
    names = [node.target for node in nodes if node.op == "placeholder"]
    if len(set(names)) != len(names):
        raise ValueError("two inputs have one name")
    return graph


def _decode_argument(value: Any, nodes: list[fx.Node]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"argument {value!r} is not of this format")
    ((kind, content),) = value.items()
    if kind == "node" and type(content) is int and 0 <= content < len(nodes):
        return nodes[content]
    if kind in ("list", "tuple") and isinstance(content, list):
        return (list if kind == "list" else tuple)(_decode_argument(item, nodes) for item in content)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "dtype" and content in CAST_DTYPES:
        return getattr(torch, content)
    raise ValueError(f"argument {value!r} is not of this format, or names a node that comes later")


def _check_edge(op: Any, name: str, target: Any, args: Any, kwargs: Any, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the node is an input, a tensor of the file, or the result."""
    words = str(target).split(".")
    known = {
        "placeholder": len(words) == 1 and target.isidentifier() and not args,
        "get_attr": TENSOR_NAME.fullmatch(str(target)) and not args,
        "output": len(args) == 1,
    }
    if op == "get_attr" and target not in tensors:
        raise ValueError(f"tensor {target!r} is not in the file")
    if not known.get(op) or kwargs or any(keyword.iskeyword(word) for word in words):
        raise ValueError(f"node {name}: {op} {target!r} is not of this format")
