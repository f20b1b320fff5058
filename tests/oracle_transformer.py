"""Attention, layer norm and the functions in them (design, section 3) in plain Python; see oracle.py."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from oracle import F32, Q, choose, codes, multiplier, requantize

POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(x: Any) -> np.float32:
    """e^x in float32 steps."""
    x = F32(min(max(float(x), -87.0), 88.0))
    n = F32(round(float(x * F32(1.44269504))))
    r = (x - n * F32(0.693359375)) - n * F32(-2.12194440e-4)
    p = F32(POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * r + F32(coefficient)
    power = F32(struct.unpack("f", struct.pack("I", int(n) + 127 << 23))[0])
    return ((p * (r * r) + r) + F32(1)) * power


def lane_sum(values: Sequence[Any]) -> np.float32:
    """Element i to lane i mod 16, then the lanes fold."""
    lanes = [F32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = lanes[i % 16] + value
    for half in (8, 4, 2, 1):
        lanes = [lanes[j] + lanes[j + half] for j in range(half)]
    return lanes[0]


def exponentials(scores: Sequence[Any]) -> list[np.float32]:
    """exp(score - max), 0 where hidden."""
    seen = [score for score in scores if score != -math.inf]
    return [F32(0) if score == -math.inf else exp(score - max(seen)) for score in scores]


def score(acc: int, m: Any, mask: np.ndarray | None, causal: bool, i: int, j: int) -> Any:
    """One query against one key."""
    if causal and j > i:
        return -math.inf
    value = F32(acc) * m
    return value if mask is None else value + F32(mask[i, j])


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    read: tuple[Q, Q, Q],
    y: Q,
    mask: np.ndarray | None = None,
    causal: bool = False,
    factor: float = 1.0,
) -> np.ndarray:
    """Codes [L, Dv] of one head, from codes [L, D], [S, D], [S, Dv]."""
    q, k, v = ((x.astype(object) - r.zero_point).tolist() for x, r in zip((q, k, v), read, strict=True))
    m_scores = F32(read[0].scale * read[1].scale * factor)
    m = multiplier(float(F32(1 / 255)), read[2].scale, y.scale)
    result = np.zeros((len(q), len(v[0])), np.int64)
    for i, query in enumerate(q):
        sums = [sum(a * b for a, b in zip(query, key, strict=True)) for key in k]
        e = exponentials([score(acc, m_scores, mask, causal, i, j) for j, acc in enumerate(sums)])
        total = lane_sum(e)
        p = [requantize(value * (F32(255) / total), 0, 0, 255) if total else 0 for value in e]
        for d in range(len(v[0])):
            acc = sum(weight * value[d] for weight, value in zip(p, v, strict=True))
            result[i, d] = requantize(F32(acc) * m, y.zero_point, y.q_min, y.q_max)
    return result


def dynamic_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scheme: str,
    mask: np.ndarray | None = None,
    causal: bool = False,
    factor: float = 1.0,
) -> np.ndarray:
    """float32 [L, Dv] of one head: queries, keys and probabilities by row, values whole (by row if causal)."""

    def by_row(x: Any) -> tuple[list[list[int]], list[np.float32]]:
        reads = [choose(float(min(row)), float(max(row)), scheme, 128) for row in x]
        centred = [(codes(row, r) - r.zero_point).tolist() for row, r in zip(x, reads, strict=True)]
        return centred, [F32(r.scale) for r in reads]

    def whole(x: np.ndarray) -> tuple[list[list[int]], list[np.float32]]:
        read = choose(float(x.min()), float(x.max()), scheme, 128)
        return (codes(x, read) - read.zero_point).tolist(), [F32(read.scale)] * len(x)

    (q_codes, q_scales), (k_codes, k_scales) = by_row(q), by_row(k)
    v_codes, v_scales = by_row(v) if causal else whole(v)
    result = np.zeros((len(q), v.shape[1]), np.float32)
    for i, query in enumerate(q_codes):
        sums = [sum(a * b for a, b in zip(query, key, strict=True)) for key in k_codes]
        m = [q_scales[i] * s * F32(factor) for s in k_scales]
        e = exponentials([score(acc, m[j], mask, causal, i, j) for j, acc in enumerate(sums)])
        total = lane_sum(e) or F32(1)
        p = [value / total * (v_scales[j] if causal else F32(1)) for j, value in enumerate(e)]
        (p_codes,), (p_scale,) = by_row([p])
        for d in range(v.shape[1]):
            acc = sum(weight * value[d] for weight, value in zip(p_codes, v_codes, strict=True))
            result[i, d] = F32(acc) * (p_scale * (F32(1) if causal else v_scales[0]))
    return result


def layer_norm(x: np.ndarray, read: Q, gamma: np.ndarray, beta: np.ndarray, eps: float, y: Q) -> np.ndarray:
    """Codes of one row [n], from codes [n]."""
    centred = [int(code) - read.zero_point for code in x]
    n, s1, s2 = len(centred), sum(centred), sum(q * q for q in centred)
    mean = F32(s1 / n)
    rstd = F32(read.scale / math.sqrt((s2 / n - (s1 / n) * (s1 / n)) * (read.scale * read.scale) + eps))
    values = [
        ((F32(q) - mean) * rstd) * F32(float(g) / y.scale) + F32(float(b) / y.scale)
        for q, g, b in zip(centred, gamma, beta, strict=True)
    ]
    return np.array([requantize(value, y.zero_point, y.q_min, y.q_max) for value in values])
