"""The arguments of one call of a program, checked against its signature and the specification's bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qbench.numerics import QWeight, check_accumulator
from qbench.ops import ACTIVATIONS, is_int8_op
from qbench.schemes import LARGEST_SCALE, SMALLEST_SCALE

LARGEST_WINDOW = 2**16


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the arguments fit the signature and, for an int8 operation, the specification.

    Shapes of activations are not known here; kernels check them when they run.
    """
    if not isinstance(target, torch._ops.OpOverload):  # a size operator: Python checks its operands
        if kwargs:
            raise ValueError(f"{target}: unknown arguments")
        return
    arguments = target._schema.arguments
    positional = [a.name for a in arguments if not a.kwarg_only]
    given = dict(zip(positional, args, strict=False)) | kwargs
    if len(args) > len(positional) or not set(given) <= {a.name for a in arguments}:
        raise ValueError(f"{target}: unknown arguments")
    if missing := [a.name for a in arguments if a.name not in given and not a.has_default_value()]:
        raise ValueError(f"{target}: {missing[0]} is missing")
    for name in ("device", "layout"):  # engine and reference read memory of the CPU, element after element
        if given.get(name) is not None:
            raise ValueError(
                f"{target}: {name}={given[name]!r}, a program runs on the CPU, in the layout of its tensors"
            )
    if is_int8_op(target):
        full = {a.name: given.get(a.name, a.default_value) for a in arguments}
        for argument in arguments:
            _check_type(target, argument.name, str(argument.type), full[argument.name])
        _check_values(str(target), full, tensors)


TYPES: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda v: isinstance(v, fx.Node),
    "Optional[Tensor]": lambda v: v is None or isinstance(v, fx.Node),
    "float": lambda v: isinstance(v, float) and math.isfinite(v),
    "Optional[float]": lambda v: v is None or (isinstance(v, float) and math.isfinite(v)),
    "int": lambda v: type(v) is int,
    "Optional[int]": lambda v: v is None or type(v) is int,
    "List[int]": lambda v: isinstance(v, list | tuple) and all(type(item) is int for item in v),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
}


def _check_type(target: Any, name: str, kind: str, value: Any) -> None:
    if not TYPES[kind](value):
        raise ValueError(f"{target}: {name}={value!r} is no {kind}")


def _check_values(call: str, full: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    held = {
        name: tensors[value.target] if isinstance(value, fx.Node) and value.op == "get_attr" else value
        for name, value in full.items()
    }
    for name, value in held.items():
        if isinstance(value, fx.Node) and name not in ACTIVATIONS:
            raise ValueError(f"{call}: {name} must be a tensor of the file")
        if name in RULES and not RULES[name](value):
            raise ValueError(f"{call}: {name}={value!r} is out of bounds")
    if "q_min" in held and held["q_min"] > held["q_max"]:
        raise ValueError(f"{call}: q_min is above q_max")
    if "weight" in held:
        _check_weight(call, held)
    if "weight_ih" in held:
        _check_lstm(call, held)
    if "table" in held and (held["table"].dtype != torch.uint8 or list(held["table"].shape) != [256]):
        raise ValueError(f"{call}: the table must be 256 uint8")
    if "gamma" in held and not all(_is_like(held[name], held["gamma"].shape) for name in ("gamma", "beta")):
        raise ValueError(f"{call}: gamma and beta must be float32 of one shape")


def _is_scale(value: float | None) -> bool:
    return value is None or SMALLEST_SCALE <= value <= LARGEST_SCALE


def _is_code(value: int) -> bool:
    return 0 <= value <= 255


def _within(low: int) -> Callable[[list[int]], bool]:
    return lambda values: all(low <= value < LARGEST_WINDOW for value in values)


READ = ("x", "a", "b", "residual", "q", "k", "v")  # what has a scale and a zero point of its own
RULES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*(f"{name}_scale" for name in READ), "scale"), _is_scale),
    **dict.fromkeys((*(f"{name}_zero_point" for name in READ), "zero_point"), _is_code),
    **dict.fromkeys(("q_min", "q_max"), _is_code),
    **dict.fromkeys(("stride", "dilation", "kernel", "size"), _within(1)),
    **dict.fromkeys(("padding", "output_padding"), _within(0)),
    **dict.fromkeys(("alpha", "factor"), lambda value: abs(value) <= LARGEST_SCALE),
    "eps": lambda value: value >= 0,
    "rows": lambda value: value in ("per_row", "per_tensor"),
    "scheme": lambda value: value in ("symmetric", "affine"),
    "groups": lambda value: 1 <= value < 2**31,
    **dict.fromkeys(("block", "weight_ih_block", "weight_hh_block"), lambda value: 1 <= value < 2**31),
    "divisor": lambda value: value is None or 1 <= value < 2**31,
}


def _is_like(value: Any, shape: Any) -> bool:
    fits = value.dtype == torch.float32 and value.shape == shape and value.dim() and value.numel()
    return bool(fits and torch.isfinite(value).all())


def _check_weight(call: str, held: dict[str, Any]) -> None:
    weight, scale, zero_point, block = (held[k] for k in ("weight", "weight_scale", "weight_zero_point", "block"))
    dimensions = (3, 4) if "conv" in call else (2,)
    if weight.dtype != torch.int8 or weight.dim() not in dimensions or not all(weight.shape):
        raise ValueError(f"{call}: the weight must be int8 with {' or '.join(map(str, dimensions))} dimensions")
    outputs, inputs = weight.shape[:2]
    shape = [list(scale.shape), [outputs, -(-inputs // block)]]
    if shape[0] not in (shape[1], [1, shape[1][1]]) or scale.dtype != torch.float32:
        raise ValueError(f"{call}: the weight scales must be float32 {shape[1]}")
    if not bool(((scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all()):
        raise ValueError(f"{call}: a weight scale is out of bounds")
    if zero_point is not None and (zero_point.dtype != torch.int8 or zero_point.shape != scale.shape):
        raise ValueError(f"{call}: the weight zero points must be int8, one for each scale")
    _check_window(call, held, weight)
    bias = held.get("bias")
    if bias is not None and not (list(bias.shape) == [outputs] and bias.dtype in (torch.int32, torch.float32)):
        raise ValueError(f"{call}: the bias must be int32 or float32, one for each output")
    on_grid = bias is not None and bias.dtype == torch.int32
    if on_grid and ("x_scale" not in held or scale.shape[1] != 1):
        raise ValueError(f"{call}: an int32 bias goes with a static layer of one block")
    zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    if "embedding" not in call:  # which has no sums
        check_accumulator(call, QWeight(weight, scale, zeros, block), bias if on_grid else None)


def _check_lstm(call: str, held: dict[str, Any]) -> None:
    """Two weights, [4 hidden, inputs] and [4 hidden, hidden]; the bias belongs to the sum of the first."""
    outer = {name: held[name] for name in ("x_scale",) if name in held}
    for name, bias in (("weight_ih", held["bias"]), ("weight_hh", None)):
        parts = {f"weight{part}": held[f"{name}{part}"] for part in ("", "_scale", "_zero_point")}
        _check_weight(f"{call} {name}", {**outer, **parts, "block": held[f"{name}_block"], "bias": bias})
    gates, hidden = held["weight_hh"].shape
    if gates != 4 * hidden or held["weight_ih"].shape[0] != gates:
        raise ValueError(f"{call}: an LSTM's weights are [4 hidden, inputs] and [4 hidden, hidden]")


def _check_window(call: str, held: dict[str, Any], weight: Tensor) -> None:
    if "groups" not in held:
        return
    spatial = weight.dim() - 2
    if any(len(held[name]) != spatial for name in ("stride", "padding", "dilation")):
        raise ValueError(f"{call}: stride, padding and dilation must have {spatial} entries")
    if "output_padding" in held:
        largest = [max(ends) for ends in zip(held["stride"], held["dilation"], strict=True)]
        added = held["output_padding"]
        if len(added) != spatial or not all(size < limit for size, limit in zip(added, largest, strict=True)):
            raise ValueError(f"{call}: output_padding must have {spatial} entries below the stride or the dilation")
    if weight.shape[0] % held["groups"]:
        raise ValueError(f"{call}: {weight.shape[0]} outputs do not divide into {held['groups']} groups")
