"""An LSTM layer in plain Python: Python's integers, numpy.float32 with one operation at a time. See oracle.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
from oracle import F32, Q

LOG2_E, LN2_HIGH, LN2_LOW = F32(1.44269504), F32(0.693359375), F32(-2.12194440e-4)
POLYNOMIAL = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1]
ONE, TWO = F32(1), F32(2)


def exp(x: Any) -> Any:
    """The specification's exp (design, section 3)."""
    x = min(max(x, F32(-87)), F32(88))
    n = F32(round(float(x * LOG2_E)))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = F32(POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * r + F32(coefficient)
    return ((p * (r * r) + r) + ONE) * F32(2.0 ** int(n))


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return ONE / (ONE + exp(-x))


def tanh(x: Any) -> Any:
    """1 - 2 / (1 + exp(2x))."""
    return ONE - TWO / (ONE + exp(TWO * x))


def cell(gates: Sequence[Any], c: Any) -> tuple[Any, Any]:
    """h and the next c of one unit."""
    i, f, g, o = gates
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@dataclass(frozen=True)
class Weights:
    """One layer in one direction; `bias` is b_ih + b_hh, one float32 addition."""

    ih: oracle.Weight
    hh: oracle.Weight
    bias: np.ndarray | None

    @property
    def hidden(self) -> int:
        """How many units."""
        return int(self.hh.codes.shape[1])


def steps(
    x: np.ndarray,
    h: np.ndarray,
    c: np.ndarray,
    gate: Callable[[int, int, np.ndarray, int], Any],
    rounded: Callable[[Any], Any],
) -> tuple[np.ndarray, np.ndarray]:
    """h of every step and the last c; `gate(step, example, h, row)` is one pre-activation."""  # fmt: skip
    hidden, results = h.shape[1], []
    for step in range(len(x)):
        new_h, new_c = h.copy(), c.copy()
        for n, unit in np.ndindex(*h.shape):
            gates = [gate(step, n, h, part * hidden + unit) for part in range(4)]
            value, new_c[n, unit] = cell(gates, F32(c[n, unit]))
            new_h[n, unit] = rounded(value)
        h, c = new_h, new_c
        results.append(h)
    return np.stack(results), c


def static(
    x: np.ndarray, read: Q, y: Q, weights: Weights, h: np.ndarray | None, c: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes x [T, N, inputs] to codes of h [T, N, hidden] and the last c; `h` are codes of y."""
    shape = x.shape[1], weights.hidden
    h = np.full(shape, y.zero_point) if h is None else h
    c = np.zeros(shape, np.float32) if c is None else c
    ih, hh, one_block = weights.ih, weights.hh, len(weights.ih.q[0]) == 1
    x_weight, h_weight = ih.centred.tolist(), hh.centred.tolist()
    on_grid = None if weights.bias is None or not one_block else oracle.bias_codes(weights.bias, read.scale, ih)

    def gate(step: int, n: int, h: np.ndarray, row: int) -> Any:
        total = F32(weights.bias[row]) if weights.bias is not None and not one_block else None
        for block, inputs in enumerate(oracle.blocks(x.shape[2], ih.block)):
            acc = sum((int(x[step, n, i]) - read.zero_point) * x_weight[row][i] for i in inputs)
            term = F32(acc + (on_grid[row] if on_grid else 0)) * oracle.multiplier(read.scale, ih.q[row][block].scale)
            total = term if total is None else total + term
        for block, inputs in enumerate(oracle.blocks(weights.hidden, hh.block)):
            acc = sum((int(h[n, i]) - y.zero_point) * h_weight[row][i] for i in inputs)
            total = total + F32(acc) * oracle.multiplier(y.scale, hh.q[row][block].scale)
        return total

    return steps(x, h, c, gate, lambda value: oracle.quantize(value, y))


def dynamic(
    x: np.ndarray, weights: Weights, h: np.ndarray | None, c: np.ndarray | None, scheme: str, per_row: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Float x [T, N, inputs] to float h [T, N, hidden] and the last c."""
    shape = x.shape[1], weights.hidden
    h, c = (np.zeros(shape, np.float32) if state is None else state for state in (h, c))
    ih, hh = weights.ih, weights.hh
    x_weight, h_weight = ih.centred.tolist(), hh.centred.tolist()

    def read(values: np.ndarray, whole: np.ndarray) -> tuple[list[int], Any]:
        part = values if per_row else whole
        q = oracle.choose(float(part.min()), float(part.max()), scheme, 128)
        return [oracle.quantize(value, q) - q.zero_point for value in values], F32(q.scale)

    def gate(step: int, n: int, h: np.ndarray, row: int) -> Any:
        total = None
        for codes, scale, weight, centred in (
            (*read(x[step, n], x), ih, x_weight), (*read(h[n], h), hh, h_weight)
        ):  # fmt: skip
            for block, inputs in enumerate(oracle.blocks(len(codes), weight.block)):
                acc = sum(codes[i] * centred[row][i] for i in inputs)
                term = F32(acc) * (scale * F32(weight.q[row][block].scale))
                total = term if total is None else total + term
        return total if weights.bias is None else total + F32(weights.bias[row])

    return steps(x, h, c, gate, lambda value: value)


def exact(
    x: np.ndarray, weight_ih: np.ndarray, weight_hh: np.ndarray, bias: np.ndarray | None,
    h: np.ndarray | None, c: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The layer in float64: h of every step and the last c."""
    shape = x.shape[1], weight_hh.shape[1]
    h, c = (np.zeros(shape) if state is None else state.astype(float) for state in (h, c))
    results = []
    for step in x.astype(float):
        gates = step @ weight_ih.T.astype(float) + h @ weight_hh.T.astype(float) + (0 if bias is None else bias)
        i, f, g, o = np.split(gates, 4, axis=1)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
        results.append(h)
    return np.stack(results), c
