"""The native engine's kernel of each operation of `qbench.ops`: bytes equal to the reference's, arithmetic in C++."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends import native_layers as layers
from qbench.backends import native_lstm as recurrent
from qbench.backends import native_transformer as transformer
from qbench.backends.native_operands import Constants, Kernel, codes, floats
from qbench.native.library import Averaging, Window, byref, library
from qbench.numerics import multiplier, saturate_

if TYPE_CHECKING:
    from qbench.program import Macs

aten = torch.ops.aten
ALL_CODES = torch.arange(256)


def _result(c: Constants) -> tuple[int, int, int]:
    return c["zero_point"], c["q_min"], c["q_max"]


def like(x: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """An empty result with the memory order of x, which is dense."""
    return torch.empty_like(x, dtype=dtype)


def dense(x: Tensor) -> Tensor:
    """x itself where its elements fill its memory, in whatever order; else a copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


# --- element by element ----------------------------------------------------------------------------------------------


def _quantize(c: Constants, macs: Macs) -> Kernel:
    def run(x: Tensor) -> Tensor:
        x = dense(x if x.dtype == torch.float32 else floats(x))
        y = like(x)
        library().qb_quantize(x.data_ptr(), x.numel(), c["scale"], *_result(c), y.data_ptr())
        return y

    return run


def _dequantize(c: Constants, macs: Macs) -> Kernel:
    def run(x: Tensor) -> Tensor:
        x = dense(x)
        y = like(codes_only(x), torch.float32)
        library().qb_dequantize(x.data_ptr(), x.numel(), c["x_scale"], c["x_zero_point"], y.data_ptr())
        return y

    return run


def codes_only(x: Tensor) -> Tensor:
    """x itself. Raises ValueError unless it is uint8: the engine reads bytes as they lie."""
    if x.dtype != torch.uint8:
        raise ValueError(f"the operation takes uint8 codes, it got {str(x.dtype)[6:]}")
    return x


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one shape and one memory order."""
    a, b = torch.broadcast_tensors(codes_only(a), codes_only(b))
    a = dense(a)
    if b.stride() != a.stride():
        b = torch.empty_like(a).copy_(b)
    return a, b


def _add(c: Constants, macs: Macs) -> Kernel:
    m_a = float(multiplier(c["a_scale"], 1.0, c["scale"]))
    m_b = float(multiplier(c["b_scale"], c["alpha"], c["scale"]))

    def run(a: Tensor, b: Tensor) -> Tensor:
        a, b = _alike(a, b)
        y = like(a)
        zeros = c["a_zero_point"], m_a, c["b_zero_point"], m_b
        library().qb_add(a.data_ptr(), b.data_ptr(), a.numel(), *zeros, *_result(c), y.data_ptr())
        return y

    return run


def _mul(c: Constants, macs: Macs) -> Kernel:
    m = float(multiplier(c["a_scale"], c["b_scale"], c["scale"]))

    def run(a: Tensor, b: Tensor) -> Tensor:
        a, b = _alike(a, b)
        y = like(a)
        zeros = c["a_zero_point"], c["b_zero_point"], m
        library().qb_mul(a.data_ptr(), b.data_ptr(), a.numel(), *zeros, *_result(c), y.data_ptr())
        return y

    return run


def _by_table(table: Tensor) -> Kernel:
    table = table.contiguous()

    def run(x: Tensor) -> Tensor:
        x = dense(codes_only(x))
        y = like(x)
        library().qb_table(x.data_ptr(), x.numel(), table.data_ptr(), y.data_ptr())
        return y

    return run


def _table(c: Constants, macs: Macs) -> Kernel:
    return _by_table(c["table"])


def _rescale(c: Constants, macs: Macs) -> Kernel:
    values = (ALL_CODES - c["x_zero_point"]).float() * multiplier(c["x_scale"], 1.0, c["scale"])
    return _by_table(saturate_(values, *_result(c), torch.uint8))


def _clamp(c: Constants, macs: Macs) -> Kernel:
    return _by_table(ALL_CODES.clamp(c["q_min"], c["q_max"]).to(torch.uint8))


def _channel_affine(c: Constants, macs: Macs) -> Kernel:
    gamma, beta = (c[name].flatten().contiguous() for name in ("gamma", "beta"))

    def run(x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != len(gamma):
            raise ValueError(f"a batch norm of {len(gamma)} channels met an input of shape {list(x.shape)}")
        x = codes(x.movedim(1, -1))
        y = like(x)
        pointers = gamma.data_ptr(), beta.data_ptr()
        pixels = x.numel() // len(gamma)
        library().qb_channel_affine(
            x.data_ptr(), pixels, len(gamma), c["x_zero_point"], *pointers, *_result(c), y.data_ptr()
        )
        return y.movedim(-1, 1)

    return run


# --- averages and maxima ---------------------------------------------------------------------------------------------


class _Places:
    """The windows of an average for images of one size."""

    def __init__(self, ends: list[list[tuple[int, int]]], count: Tensor, c: Constants) -> None:
        self.ends = [torch.tensor(axis, dtype=torch.int64).T.contiguous() for axis in ends]
        self.multipliers = (c["x_scale"] / (count.double() * c["scale"])).float().contiguous()

    def of(self, height: int, width: int, channels: int, x_zero: int) -> Averaging:
        rows, columns = self.ends
        ends = [end.data_ptr() for end in (*rows, *columns)]
        sizes = height, width, channels, rows.shape[1], columns.shape[1]
        return Averaging(*sizes, *ends, self.multipliers.data_ptr(), x_zero)


def _averaged(x: Tensor, places: _Places, c: Constants) -> Tensor:
    """x [N, H, W, C] to [N, rows, columns, C]."""
    x = codes(x)
    n, h, w, channels = x.shape
    windows = places.of(h, w, channels, c["x_zero_point"])
    y = torch.empty((n, windows.out_height, windows.out_width, channels), dtype=torch.uint8)
    library().qb_average(x.data_ptr(), byref(windows), n, *_result(c), y.data_ptr())
    return y


def _mean(c: Constants, macs: Macs) -> Kernel:
    def run(x: Tensor) -> Tensor:
        over = sorted(dim % x.dim() for dim in c["dim"])
        kept = [dim for dim in range(x.dim()) if dim not in over]
        count = math.prod(x.shape[dim] for dim in over)
        places = _Places([[(0, count)], [(0, 1)]], torch.tensor([[count]]), c)
        if kept[:1] == [0]:  # a sample at a time
            moved = x.permute(0, *over, *kept[1:]).reshape(len(x), count, 1, math.prod(x.shape[d] for d in kept[1:]))
        else:
            moved = x.permute(*over, *kept).reshape(1, count, 1, math.prod(x.shape[dim] for dim in kept))
        y = _averaged(moved, places, c)
        return y.reshape([1 if dim in over else x.shape[dim] for dim in range(x.dim()) if c["keepdim"] or dim in kept])

    return run


def _pooled(x: Tensor, flat: bool, places: Callable[[int, int], _Places], c: Constants) -> Tensor:
    last = (x.unsqueeze(-2) if flat else x).movedim(-3, -1)
    batch = last.shape[:-3]
    y = _averaged(last.reshape(-1, *last.shape[-3:]), places(*last.shape[-3:-1]), c)
    y = y.reshape(*batch, *y.shape[1:]).movedim(-1, -3)
    return y.squeeze(-2) if flat else y


def _average_pool(c: Constants, macs: Macs) -> Kernel:
    flat = len(c["kernel"]) == 1
    window = [[fill] * flat + list(c[name]) for name, fill in (("kernel", 1), ("stride", 1), ("padding", 0))]
    known: dict[tuple[int, int], _Places] = {}

    def places(h: int, w: int) -> _Places:
        if (h, w) not in known:
            ones = torch.ones(1, h, w, dtype=torch.float64)
            pool = (
                aten.avg_pool2d(ones, *window, c["ceil_mode"], c["count_include_pad"], d) for d in (1, c["divisor"])
            )
            inside, mean = pool
            ends = [
                [(min(max(i * s - p, 0), size), min(max(i * s - p + k, 0), size)) for i in range(count)]
                for size, k, s, p, count in zip((h, w), *window, inside.shape[1:], strict=True)
            ]
            known[h, w] = _Places(ends, (inside / mean).round()[0], c)
        return known[h, w]

    return lambda x: _pooled(x, flat, places, c)


def _adaptive_average_pool(c: Constants, macs: Macs) -> Kernel:
    flat, known = len(c["size"]) == 1, {}

    def places(h: int, w: int) -> _Places:
        if (h, w) not in known:
            sizes = [1] * flat + list(c["size"])
            sizes = [length if size is None else size for size, length in zip(sizes, (h, w), strict=True)]
            ends = [
                [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
                for size, length in zip(sizes, (h, w), strict=True)
            ]
            rows, columns = (torch.tensor([end - start for start, end in axis]) for axis in ends)
            known[h, w] = _Places(ends, rows[:, None] * columns, c)
        place: _Places = known[h, w]
        return place

    return lambda x: _pooled(x, flat, places, c)


def max_pool(function: Any) -> Kernel:
    """aten.max_pool2d, on codes by the engine: torch's own takes those in one order of memory alone, floats in any."""

    def run(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False) -> Any:
        if x.is_floating_point():
            return function(x, kernel, stride, padding, dilation, ceil)
        if x.dtype != torch.uint8 or x.dim() != 4 or ceil:
            return function(x.contiguous(), kernel, stride, padding, dilation, ceil)
        kernel, padding, dilation = (_pair(value) for value in (kernel, padding, dilation))
        stride = _pair(stride) if stride not in ((), []) else kernel
        n, channels, h, w = x.shape
        out = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip((h, w), padding, dilation, kernel, stride, strict=True)
        ]
        if min(out) < 1 or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            return function(x.contiguous(), kernel, stride, padding, dilation, ceil)  # torch words the error
        x = codes(x.permute(0, 2, 3, 1))
        y = torch.empty((n, *out, channels), dtype=torch.uint8)
        window = Window(h, w, channels, *out, *kernel, *stride, *padding, *dilation, channels)
        library().qb_max_pool(x.data_ptr(), byref(window), n, y.data_ptr())
        return y.permute(0, 3, 1, 2)

    return run


def _pair(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    return [*value] * (2 if len(value) == 1 else 1)


MAKERS: dict[str, Callable[[Constants, Macs], Kernel]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    **{
        prefix + kind: partial(layers.layer, make, kind)
        for prefix, make in (("", layers.static), ("dynamic_", layers.dynamic), ("weight_only_", layers.weight_only))
        for kind in layers.SHAPES
    },
    "lstm": recurrent.static,
    "dynamic_lstm": recurrent.dynamic,
    "weight_only_lstm": recurrent.weight_only,
    "embedding": transformer.embedding,
    "attention": transformer.attention,
    "dynamic_attention": transformer.dynamic_attention,
    "layer_norm": transformer.layer_norm,
    "add": _add,
    "mul": _mul,
    "mean": _mean,
    "average_pool": _average_pool,
    "adaptive_average_pool": _adaptive_average_pool,
    "channel_affine": _channel_affine,
    "rescale": _rescale,
    "clamp": _clamp,
    "table": _table,
}
CALLS = {aten.max_pool2d.default: max_pool}


def make(name: str, constants: Constants, macs: Macs) -> Kernel:
    """The kernel of an operation, with its constants packed and its name set for the printed code."""
    kernel = MAKERS[name](constants, macs)

    def named(*activations: Tensor | None) -> Any:
        return kernel(*activations)

    named.__name__, named.__module__ = name, __name__
    return named
