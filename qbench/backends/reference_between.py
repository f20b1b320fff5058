"""The specification of what stands between layers: codes made, joined, averaged, looked up.

add R(f32(q_a - z_a) m_a + f32(q_b - z_b) m_b)    mul R(f32((q_a - z_a)(q_b - z_b)) m)
averages R(f32(sum(q - z)) f32(s_x / (n s_y)))    a batch norm that stays R(f32(q - z) a_c + b_c)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench import numerics
from qbench.numerics import multiplier, saturate_

if TYPE_CHECKING:
    from qbench.program import Macs

aten = torch.ops.aten

Kernel = Callable[..., Any]
Constants = dict[str, Any]


def shifted(x: Tensor, zero_point: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """q - zero_point, exact in a float type."""
    return x.to(dtype).sub_(zero_point)


def requantizer(c: Constants) -> Callable[[Tensor], Tensor]:
    """R of an operation's result, which is overwritten."""
    return lambda v: saturate_(v, c["zero_point"], c["q_min"], c["q_max"], torch.uint8).contiguous()


def quantize(c: Constants, macs: Macs) -> Kernel:
    scale = torch.tensor(c["scale"])
    return lambda x: numerics.quantize(x, scale, c["zero_point"], c["q_min"], c["q_max"]).to(torch.uint8)


def dequantize(c: Constants, macs: Macs) -> Kernel:
    return lambda x: numerics.dequantize(x, c["x_scale"], c["x_zero_point"])


def add(c: Constants, macs: Macs) -> Kernel:
    m_a = multiplier(c["a_scale"], 1.0, c["scale"])
    m_b = multiplier(c["b_scale"], c["alpha"], c["scale"])
    a_zero, b_zero, requantize = c["a_zero_point"], c["b_zero_point"], requantizer(c)
    return lambda a, b: requantize(
        shifted(a, a_zero, torch.float32).mul_(m_a) + shifted(b, b_zero, torch.float32).mul_(m_b)
    )


def mul(c: Constants, macs: Macs) -> Kernel:
    m = multiplier(c["a_scale"], c["b_scale"], c["scale"])
    a_zero, b_zero, requantize = c["a_zero_point"], c["b_zero_point"], requantizer(c)
    return lambda a, b: requantize(shifted(a, a_zero, torch.float32) * shifted(b, b_zero, torch.float32) * m)


def rescale(c: Constants, macs: Macs) -> Kernel:
    m, requantize = multiplier(c["x_scale"], 1.0, c["scale"]), requantizer(c)
    return lambda x: requantize(shifted(x, c["x_zero_point"], torch.float32) * m)


def _averaged(c: Constants, total: Tensor, count: Tensor | int) -> Tensor:
    """R(f32(sum) * f32(s_x / (n s_y)))."""
    m = (c["x_scale"] / (torch.as_tensor(count, dtype=torch.float64) * c["scale"])).float()
    return requantizer(c)(total.float() * m)


def mean(c: Constants, macs: Macs) -> Kernel:
    def run(x: Tensor) -> Tensor:
        count = math.prod(x.shape[dim] for dim in c["dim"])
        return _averaged(c, shifted(x, c["x_zero_point"]).sum(c["dim"], c["keepdim"]), count)

    return run


def average_pool(c: Constants, macs: Macs) -> Kernel:
    flat = len(c["kernel"]) == 1
    window = [[fill] * flat + c[name] for name, fill in (("kernel", 1), ("stride", 1), ("padding", 0))]

    def pool(x: Tensor, divisor: int | None) -> Tensor:
        y: Tensor = aten.avg_pool2d(x, *window, c["ceil_mode"], c["count_include_pad"], divisor)
        return y

    def run(x: Tensor) -> Tensor:
        x = x.unsqueeze(-2) if flat else x
        ones = torch.ones(1, *x.shape[-2:], dtype=torch.float64)
        count = (pool(ones, 1) / pool(ones, c["divisor"])).round()  # what torch divides by, at each place
        y = _averaged(c, pool(shifted(x, c["x_zero_point"]), 1), count)
        return y.squeeze(-2) if flat else y

    return run


def adaptive_average_pool(c: Constants, macs: Macs) -> Kernel:
    def counts(length: int, parts: int) -> Tensor:
        edges = [(i * length // parts, -(-(i + 1) * length // parts)) for i in range(parts)]
        return torch.tensor([end - start for start, end in edges], dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        lengths = x.shape[-len(c["size"]) :]
        sizes = [length if size is None else size for size, length in zip(c["size"], lengths, strict=True)]
        per_axis = [counts(length, size) for length, size in zip(lengths, sizes, strict=True)]
        count = per_axis[0] if len(per_axis) == 1 else per_axis[0][:, None] * per_axis[1]
        pool = aten.adaptive_avg_pool1d if len(sizes) == 1 else aten.adaptive_avg_pool2d
        total = (pool(shifted(x, c["x_zero_point"]), sizes) * count).round()  # exact: a sum of integers below 2^53
        return _averaged(c, total, count)

    return run


def channel_affine(c: Constants, macs: Macs) -> Kernel:
    requantize = requantizer(c)

    def run(x: Tensor) -> Tensor:
        gamma, beta = (c[name].reshape(-1, *[1] * (x.dim() - 2)) for name in ("gamma", "beta"))
        return requantize(shifted(x, c["x_zero_point"], torch.float32) * gamma + beta)

    return run


def clamp(c: Constants, macs: Macs) -> Kernel:
    return lambda x: x.clamp(c["q_min"], c["q_max"])


def table(c: Constants, macs: Macs) -> Kernel:
    return lambda x: c["table"][x.long()]
