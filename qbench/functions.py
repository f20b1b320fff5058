"""exp, sigmoid, tanh and sums of float32 that have the same bits everywhere (design, section 3: float islands).

torch's own differ with the CPU and with an element's position in the batch. Here each float32 operation is rounded on
its own and in a fixed order, so that every backend can follow. Relative error at most 2e-7 for exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
LOWEST, HIGHEST = -87.0, 88.0
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(x: Tensor) -> Tensor:
    """e^x of float32, x clamped to [-87, 88]: 2^n times a polynomial of the rest (Cephes, expf)."""
    x = x.clamp(LOWEST, HIGHEST)
    n = torch.round(x * LOG2_E)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = torch.full_like(r, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * r + coefficient
    power = ((n.int() + 127) << 23).view(torch.float32)
    return ((p * (r * r) + r) + 1.0) * power


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp(-x))


def tanh(x: Tensor) -> Tensor:
    """1 - 2 / (1 + exp(2x))."""
    return 1.0 - 2.0 / (1.0 + exp(2.0 * x))


def shifted_exp(scores: Tensor) -> Tensor:
    """exp(score - max) along the last axis, 0 where a score is -inf: softmax is this over its sum.

    The sum is at least 1, except in a row of -inf only, where everything is 0.
    """
    largest = scores.detach().amax(-1, keepdim=True)
    hidden = scores == -torch.inf
    return exp(scores - largest.where(largest > -torch.inf, 0.0)).where(~hidden, 0.0)


def lane_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, kept with size 1: element i goes to lane i mod 16, in order, then the lanes fold."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES))
    total = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], LANES)
    for part in whole.split(LANES, -1):
        total = total + part
    half = LANES // 2
    while half:
        total = total[..., :half] + total[..., half:]
        half //= 2
    return total
