"""The specification of int8 (design, section 3) in plain Python: what the tests of the arithmetic compare with.

Integers are Python's, sums are loops, float32 is numpy.float32 with one operation at a time, `round` is half to even.
Nothing of the package is imported here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

F32 = np.float32
F64 = float
SMALLEST, LARGEST = 2.0**-60, 2.0**60


@dataclass(frozen=True)
class Q:
    """real = scale * (q - zero_point), q_min <= q <= q_max."""

    scale: float
    zero_point: int
    q_min: int
    q_max: int


def choose(lo: float, hi: float, scheme: str, middle: int, smallest: float = 0.0) -> Q:
    """Range to scale and zero point; `middle` is 128 for uint8 and 0 for int8."""
    lo, hi = min(0.0, lo), max(0.0, hi)
    width, steps = (max(-lo, hi), 127) if scheme == "symmetric" else (hi - lo, 255)
    scale = width / steps if width > 0 else 1.0
    scale = float(F32(min(max(scale, smallest, SMALLEST), LARGEST)))
    if scheme == "symmetric":
        return Q(scale, middle, middle - 127, middle + 127)
    lowest, highest = middle - 128, middle + 127
    return Q(scale, min(max(round(lowest - lo / scale), lowest), highest), lowest, highest)


def requantize(value: Any, zero_point: int, q_min: int, q_max: int) -> int:
    """R(v) = int(min(max(rne(v), q_min - z), q_max - z)) + z; NaN gives q_min."""
    value = float(value)
    if math.isnan(value):
        return q_min
    rounded = round(value) if math.isfinite(value) else value
    return int(min(max(rounded, q_min - zero_point), q_max - zero_point)) + zero_point


def quantize(x: Any, q: Q) -> int:
    """A true float32 division, then R."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return requantize(F32(x) / F32(q.scale), q.zero_point, q.q_min, q.q_max)


def each(function: Callable[..., Any], *arrays: Any, dtype: Any = np.int64) -> np.ndarray:
    """A function of single elements over arrays, broadcast."""
    arrays = np.broadcast_arrays(*arrays)
    flat = [function(*items) for items in zip(*(array.ravel().tolist() for array in arrays), strict=True)]
    return np.array(flat, dtype=dtype).reshape(arrays[0].shape)


def codes(x: Any, q: Q) -> np.ndarray:
    """The codes of an array."""
    return each(lambda item: quantize(item, q), x)


def real(codes: Any, q: Q) -> np.ndarray:
    """What codes stand for, float32."""
    return each(lambda code: F32(code - q.zero_point) * F32(q.scale), codes, dtype=np.float32)


def multiplier(x_scale: float, weight_scale: float, y_scale: float = 1.0) -> np.float32:
    """f32(f64(s_x) * s_w / s_y)."""
    return F32(float(x_scale) * float(weight_scale) / float(y_scale))


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """Codes [outputs, inputs, ...] as nested lists; scales and zero points [outputs][blocks]."""

    codes: np.ndarray
    q: list[list[Q]]
    block: int

    @property
    def centred(self) -> np.ndarray:
        """q - z of each weight."""
        result = self.codes.copy()
        for o, i in np.ndindex(*self.codes.shape[:2]):
            result[o, i] -= self.q[o][i // self.block].zero_point
        return result

    @property
    def real(self) -> np.ndarray:
        """The float32 weight."""
        result = np.zeros(self.codes.shape, np.float32)
        for index in np.ndindex(*self.codes.shape):
            q = self.q[index[0]][index[1] // self.block]
            result[index] = F32(int(self.codes[index]) - q.zero_point) * F32(q.scale)
        return result


def weight(
    values: np.ndarray,
    granularity: str = "per_channel",
    scheme: str = "symmetric",
    group_size: int = 64,
    bias: np.ndarray | None = None,
    x_scale: float = 1.0,
) -> Weight:
    """A weight [outputs, inputs, ...] in int8; a bias raises the scales of layers with one block (the bias rule)."""
    outputs, inputs = values.shape[:2]
    block = group_size if granularity == "per_group" and group_size < inputs else inputs
    blocks = math.ceil(inputs / block)
    floors = [0.0] * outputs
    if bias is not None and blocks == 1:
        floors = [abs(float(b)) / (x_scale * 2.0**30) for b in bias]
    if granularity == "per_tensor":
        shared = choose(float(values.min()), float(values.max()), scheme, 0, max(floors))
        rows = [[shared] for _ in range(outputs)]
    else:
        parts = [[values[o, b * block : (b + 1) * block] for b in range(blocks)] for o in range(outputs)]
        rows = [
            [choose(float(part.min()), float(part.max()), scheme, 0, floor) for part in row]
            for row, floor in zip(parts, floors, strict=True)
        ]
    q_codes = np.zeros(values.shape, np.int64)
    for index in np.ndindex(*values.shape):
        q_codes[index] = quantize(values[index], rows[index[0]][index[1] // block])
    return Weight(q_codes, rows, block)


def bias_codes(bias: Any, x_scale: float, weight: Weight) -> list[int]:
    """b_q = rne(b / (s_x s_w)) in float64."""
    return [round(float(b) / (x_scale * row[0].scale)) for b, row in zip(bias, weight.q, strict=True)]


# --- sums ------------------------------------------------------------------------------------------------------------


def blocks(length: int, block: int) -> list[range]:
    """The inputs of each block; the last may be shorter."""
    return [range(first, min(first + block, length)) for first in range(0, length, block)]


def linear_sums(x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    """[blocks, ..., outputs]: sums of products, one term at a time, of Python's integers (or floats)."""
    rows, columns = x.reshape(-1, x.shape[-1]).tolist(), weight.tolist()
    sums = [
        [[sum(row[i] * column[i] for i in inputs) for column in columns] for row in rows]
        for inputs in blocks(weight.shape[1], block)
    ]
    return np.array(sums, dtype=object).reshape(len(sums), *x.shape[:-1], weight.shape[0])


def conv_sums(
    x: np.ndarray,
    weight: np.ndarray,
    block: int,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """[blocks, n, outputs, oh, ow] of x [n, c, h, w] (centred) and weight [outputs, c / groups, kh, kw].

    `padding` is (before, after) for each dimension; what lies outside counts as zero.
    """
    (top, bottom), (left, right) = padding
    (outputs, inputs, kh, kw), (n, _, h, w) = weight.shape, x.shape
    oh = (h + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    image, taps = x.tolist(), weight.tolist()

    def total(sample: int, output: int, row: int, column: int, channels: range) -> Any:
        first = output // (outputs // groups) * inputs
        result = 0
        for i, dy, dx in itertools.product(channels, range(kh), range(kw)):
            y, z = row * stride[0] - top + dy * dilation[0], column * stride[1] - left + dx * dilation[1]
            if 0 <= y < h and 0 <= z < w:
                result += image[sample][first + i][y][z] * taps[output][i][dy][dx]
        return result

    parts = blocks(inputs, block)
    shape = (len(parts), n, outputs, oh, ow)
    sums = [total(*index[1:], parts[index[0]]) for index in np.ndindex(*shape)]
    return np.array(sums, dtype=object).reshape(shape)


def transposed_sums(
    x: np.ndarray,
    weight: np.ndarray,
    block: int,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """[blocks, n, outputs, oh, ow] of x [n, c, h, w] (centred) and weight [outputs, c / groups, kh, kw].

    Seen from the output: tap k of output pixel y meets the input pixel (y + padding - dilation * k) / stride, if it is
    one.
    """
    (outputs, inputs, *kernel), (n, _, *size) = weight.shape, x.shape
    oh, ow = (
        (size[d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + output_padding[d] + 1
        for d in range(2)
    )
    image, taps = x.tolist(), weight.tolist()

    def met(place: int, tap: int, d: int) -> int | None:
        pixel, rest = divmod(place + padding[d] - dilation[d] * tap, stride[d])
        return pixel if rest == 0 and 0 <= pixel < size[d] else None

    def total(sample: int, output: int, row: int, column: int, channels: range) -> Any:
        first = output // (outputs // groups) * inputs
        result = 0
        for dy, dx in itertools.product(range(kernel[0]), range(kernel[1])):
            y, z = met(row, dy, 0), met(column, dx, 1)
            if y is not None and z is not None:
                result += sum(image[sample][first + i][y][z] * taps[output][i][dy][dx] for i in channels)
        return result

    parts = blocks(inputs, block)
    shape = (len(parts), n, outputs, oh, ow)
    sums = [total(*index[1:], parts[index[0]]) for index in np.ndindex(*shape)]
    return np.array(sums, dtype=object).reshape(shape)


def layer_value(sums: Sequence[Any], multipliers: Sequence[Any], on_grid: int = 0, start: Any = None) -> np.float32:
    """f32(acc + b_q) * m for one block; t = f32(b / s_y), t = t + f32(acc_g) * m_g for several."""
    total = start
    for acc, m in zip(sums, multipliers, strict=True):
        term = F32(acc + on_grid) * m
        total = term if total is None else total + term
    return total  # type: ignore[return-value]


# --- pools -----------------------------------------------------------------------------------------------------------


def windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> Iterator[tuple[list[int], int]]:
    """For each place of a pool along one dimension: the positions inside, and how many there are with the padding."""
    span = size + 2 * padding - kernel
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # a window must start inside the input or its left padding
    for place in range(count):
        first = place * stride - padding
        last = min(first + kernel, size + padding)
        yield [position for position in range(first, last) if 0 <= position < size], last - first


def adaptive_windows(size: int, parts: int) -> list[range]:
    """The positions that each part covers."""
    return [range(i * size // parts, math.ceil((i + 1) * size / parts)) for i in range(parts)]


def averaged(total: int, count: int, x: Q, y: Q) -> int:
    """R(f32(sum) * f32(s_x / (n s_y)))."""
    return requantize(F32(total) * F32(x.scale / (count * y.scale)), y.zero_point, y.q_min, y.q_max)


# --- a whole layer, from its float parameters ------------------------------------------------------------------------


def narrowed(q: Q, low: float | None, high: float | None) -> Q:
    """The codes that a clamp leaves."""
    q_min = q.q_min if low is None else max(q.q_min, quantize(low, q))
    q_max = q.q_max if high is None else min(q.q_max, quantize(high, q))
    return Q(q.scale, q.zero_point, q_min, q_max)


def clamped(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """min(max(v, low), high)."""
    values = values if low is None else np.maximum(values, low)
    return values if high is None else np.minimum(values, high)


def result_range(values: np.ndarray, scheme: str, low: float | None = None, high: float | None = None) -> Q:
    """How a result with these calibration values (before its clamp) is rounded."""
    seen = clamped(values.astype(float), low, high)
    return narrowed(choose(float(seen.min()), float(seen.max()), scheme, 128), low, high)


def layer(
    sums: np.ndarray,
    axis: int,
    weight: Weight,
    bias: Any,
    x: Q,
    y: Q | None,
    residual: np.ndarray | None = None,
    r: Q | None = None,
) -> np.ndarray:
    """The result of a static layer: codes of y, or float32 where y is None.

    `sums` [blocks, ...] with the outputs along `axis` (blocks not counted); `residual` holds codes.
    """
    y_scale = 1.0 if y is None else y.scale
    one_block = len(sums) == 1
    m = [[multiplier(x.scale, q.scale, y_scale) for q in row] for row in weight.q]
    on_grid = bias_codes(bias, x.scale, weight) if bias is not None and one_block else [0] * len(m)
    result = np.zeros(sums.shape[1:], np.float32 if y is None else np.int64)
    for index in np.ndindex(*result.shape):
        o = index[axis]
        start = F32(float(bias[o]) / y_scale) if bias is not None and not one_block else None
        value = layer_value([block[index] for block in sums], m[o], on_grid[o], start)
        if residual is not None and r is not None:
            value = value + F32(int(residual[index]) - r.zero_point) * multiplier(r.scale, 1.0, y_scale)
        result[index] = value if y is None else requantize(value, y.zero_point, y.q_min, y.q_max)
    return result
