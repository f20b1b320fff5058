"""Layers with an int8 weight on the native engine: the weight is packed for it, the arithmetic is engine.h's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends.native_operands import (
    Constants,
    Held,
    Kernel,
    codes,
    finish_codes,
    finish_floats,
    floats,
    pointer,
    rows_as_codes,
    spread_out,
    tiled,
)
from qbench.backends.native_windows import Images, RowsOfInputs, Taps, Transposed
from qbench.backends.native_writer import plain_torch
from qbench.native.library import FOR_ALL, Operands, Rows, byref, library
from qbench.numerics import multiplier

if TYPE_CHECKING:
    from qbench.program import Macs

Shape = RowsOfInputs | Images
SHAPES: dict[str, Callable[[Constants], Shape]] = {"linear": RowsOfInputs, "conv": Images, "conv_transpose": Transposed}


def static(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Codes in; codes out, or the accumulator as float32."""
    shape: Shape = SHAPES[kind](c)
    finish = finish_codes(c, multiplier(c["x_scale"], c["weight_scale"], c["scale"] or 1.0), shape.groups)
    zero_point = torch.tensor([c["x_zero_point"]], dtype=torch.int32)
    rows = Held(Rows(zero_point.data_ptr(), None, FOR_ALL), zero_point)
    dtype = torch.float32 if c["scale"] is None else torch.uint8

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = codes(shape.inward(x))
        slid = shape.over(x)
        y = torch.empty(slid.size, dtype=dtype)
        if residual is not None:
            residual = codes(shape.as_result(residual))
            if residual.shape != y.shape:
                raise ValueError(f"a residual of shape {list(residual.shape)} met a result of {list(y.shape)}")
        operands = Operands(x.data_ptr(), pointer(residual), None, y.data_ptr(), slid.samples)
        macs.int8 += slid.left_out + slid.multiply(byref(finish.structure), byref(rows.structure), byref(operands))
        return shape.outward(y)

    return run


def dynamic(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; x becomes codes by its own range, of each row or of all."""
    shape: Shape = SHAPES[kind](c)
    finish = finish_floats(c["weight_scale"], c["bias"], len(c["weight"]), shape.groups)
    per_row = c["rows"] == "per_row"

    def run(x: Tensor) -> Tensor:
        x = floats(shape.inward(x))
        slid = shape.over(x)
        y = torch.empty(slid.size)
        q, scales, zero_points = rows_as_codes(x, shape.rows(x) if per_row or not len(x) else 1, c["scheme"])
        rows = Rows(zero_points.data_ptr(), scales.data_ptr(), shape.pixels(slid.size) if per_row else FOR_ALL)
        operands = Operands(q.data_ptr(), None, None, y.data_ptr(), slid.samples)
        macs.int8 += slid.left_out + slid.multiply(byref(finish.structure), byref(rows), byref(operands))
        return shape.outward(y)

    return run


class _FloatImages(Images):
    """A convolution of float32."""

    def filters(self, window: Any) -> bool:
        """Never: minimal filtering is exact for integers alone."""
        return False


class _FloatDepthwise(_FloatImages):
    """A convolution of float32 with one input channel for each output channel."""

    def __init__(self, c: Constants) -> None:
        super().__init__(c)
        zero_points = self.zero_points
        self.offsets = None if zero_points is None else tiled(spread_out(zero_points, self.outputs).int(), 1)
        self.bias = None if c["bias"] is None else tiled(c["bias"][:, None], 1)

    def pack(self, taps: Taps) -> Held:
        """The taps as [kernel height][kernel width][channels]."""
        rows, columns = taps
        weight = self.weight[:, :, rows.start : rows.stop, columns.start : columns.stop]
        return Held(None, weight.permute(2, 3, 1, 0).contiguous())

    def multiply_floats(self, weight: Held, *arguments: Any) -> int:
        """The engine's products of taps, scales, finish, window, operands; returns how many."""
        (taps,), (scales, _, window, operands) = weight.tensors, arguments
        constants = pointer(taps), pointer(self.offsets), scales, pointer(self.bias)
        return int(library().qb_weight_only_depthwise(*constants, window, operands))


def weight_only(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; the engine reads the weight back piece by piece, no float copy of it is made."""
    outputs, inputs = c["weight"].shape[:2]
    depthwise = kind == "conv" and inputs == 1 and 1 < outputs == c["groups"]
    shape: Shape = _FloatDepthwise(c) if depthwise else {**SHAPES, "conv": _FloatImages}[kind](c)
    scales = tiled(spread_out(c["weight_scale"], outputs), shape.groups)
    finish = finish_floats(None, c["bias"], outputs, shape.groups)

    def run(x: Tensor) -> Tensor:
        x = floats(shape.inward(x))
        slid = shape.over(x)
        y = torch.empty(slid.size)
        operands = Operands(x.data_ptr(), None, None, y.data_ptr(), slid.samples)
        macs.float32 += slid.left_out + shape.multiply_floats(
            slid.weight, scales.data_ptr(), byref(finish.structure), byref(slid.window), byref(operands)
        )
        return shape.outward(y)

    return run


Maker = Callable[[str, Constants, "Macs"], Kernel]


def layer(make: Maker, kind: str, c: Constants, macs: Macs) -> Kernel:
    """A layer by `static`, `dynamic` or `weight_only`.

    A transposed convolution of images of one pixel, the first of many a generator, is a linear layer then: each pixel
    of its result meets one tap.
    """
    run = make(kind, c, macs)
    if (
        kind != "conv_transpose"
        or c["groups"] > 1
        or any([*c["padding"], *c["output_padding"]])
        or {*c["dilation"]} != {1}
    ):
        return run
    outputs, inputs, *kernel = c["weight"].shape
    linear: list[Kernel] = []

    def run_or_spread(x: Tensor, *residual: Tensor | None) -> Any:
        if x.shape[1:] != (inputs, *(1 for _ in kernel)) or any(r is not None for r in residual):
            return run(x, *residual)
        if not linear:
            with plain_torch():
                linear.append(make("linear", _by_pixel(c), macs))
        return linear[0](x.flatten(1)).unflatten(1, (*kernel, outputs)).movedim(-1, 1)

    return run_or_spread


def _by_pixel(c: Constants) -> Constants:
    """The constants of a layer with an output for each tap and output of a transposed convolution."""
    weight = c["weight"]
    outputs, inputs, *kernel = weight.shape
    order = *range(2, weight.dim()), 0, 1

    def repeated(name: str) -> Tensor | None:
        """A row for each output, or one for all."""
        rows: Tensor | None = c[name]
        if rows is None or len(rows) < outputs:
            return rows
        return rows.repeat(math.prod(kernel), *(1 for _ in rows.shape[1:]))

    rows = {name: repeated(name) for name in ("weight_scale", "weight_zero_point", "bias")}
    return {**c, "weight": weight.permute(order).reshape(-1, inputs), **rows}
