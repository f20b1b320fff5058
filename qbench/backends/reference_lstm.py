"""An LSTM layer in one direction: integer products, the shared sigmoid and tanh, step by step.

    (1) static    t = f32(acc_x + b_q) * m_x + f32(acc_h) * m_h,  m_x = f32(s_x s_ih), m_h = f32(s_h s_hh)
    (2) in blocks t = b;  t = t + f32(acc_g) * m_g  for each block g of x, then for each of h; b on the grid as in (1)
                  where x has one block
    (3) dynamic   t = f32(acc_x) * (s_x s_ih) + f32(acc_h) * (s_h s_hh) + b, the blocks of x, then those of h
    (4) cell      i, f, g, o = t;  c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)

t has four gates, [N, 4 hidden]. Static: q = quantize(h) is the step's result and what the next step multiplies.
Dynamic: x and h have scales of their own, for each step of each sample or (per tensor) all of x and all of a step's h.
The products of x need no state, so they are formed for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench import functions
from qbench.numerics import dequantize_weight, multiplier, quantize

if TYPE_CHECKING:
    from qbench.program import Macs

Constants = dict[str, Any]
Sums = Callable[[Tensor], Iterable[Tensor]]
DynamicCodes = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]
Results = tuple[Tensor, Tensor, Tensor]


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (4): h and the next c, [N, hidden]."""
    i, f, g, o = gates.chunk(4, -1)
    c = functions.sigmoid(f) * c + functions.sigmoid(i) * functions.tanh(g)
    return functions.sigmoid(o) * functions.tanh(c), c


def static(x_sums: Sums, h_sums: Sums, k: Constants) -> Callable[..., Results]:
    """Equations (1) and (2): x and h are codes; h as codes, its last step, and the last c."""
    x_multipliers = multiplier(k["x_scale"], k["weight_ih_scale"]).unbind(1)
    h_multipliers = multiplier(k["scale"], k["weight_hh_scale"]).unbind(1)
    bias, x_zero, h_zero, scale = k["bias"], k["x_zero_point"], k["zero_point"], torch.tensor(k["scale"])
    on_grid = bias is not None and not bias.is_floating_point()

    def products_of_x(x: Tensor) -> Tensor:
        sums = zip(x_sums(x.int() - x_zero), x_multipliers, strict=True)
        return _total(((acc + bias if on_grid else acc).float() * m for acc, m in sums), None if on_grid else bias)

    def run(x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Results:
        _check_shapes(x, (h, c), k)
        q = _state(h, x, k, h_zero)
        c = _state(c, x, k)
        codes = []
        for gates in products_of_x(x).unbind(0):
            sums = zip(h_sums(q.int() - h_zero), h_multipliers, strict=True)
            gates = _total((acc.float() * m for acc, m in sums), gates)
            value, c = cell(gates, c)
            q = quantize(value, scale, h_zero, k["q_min"], k["q_max"])
            codes.append(q)
        y = torch.stack(codes).to(torch.uint8)
        return y, y[-1:], c.unsqueeze(0)

    return run


def dynamic(x_sums: Sums, h_sums: Sums, codes_of: DynamicCodes, k: Constants) -> Callable[..., Results]:
    """Equation (3): everything between the products is float32."""
    x_scales, h_scales = k["weight_ih_scale"].unbind(1), k["weight_hh_scale"].unbind(1)
    per_row, bias = k["rows"] == "per_row", k["bias"]

    def terms(x: Tensor, sums: Sums, scales: tuple[Tensor, ...]) -> Iterable[Tensor]:
        codes, scale = codes_of(x, (x.dim() - 1,) if per_row else tuple(range(x.dim())))
        return (acc.float() * (scale * s) for acc, s in zip(sums(codes), scales, strict=True))

    def run(x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Results:
        _check_shapes(x, (h, c), k)
        h, c = _state(h, x, k), _state(c, x, k)
        values = []
        for gates in _total(terms(x, x_sums, x_scales)).unbind(0):
            gates = _total(terms(h, h_sums, h_scales), gates)
            h, c = cell(gates if bias is None else gates + bias, c)
            values.append(h)
        return torch.stack(values), h.unsqueeze(0), c.unsqueeze(0)

    return run


def weight_only(k: Constants, macs: Macs) -> Callable[..., Results]:
    """The weights of this one layer are read back as float32 for the length of the call; the layer is torch's own."""

    def run(x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Results:
        _check_shapes(x, (h, c), k)
        states = [_state(state, x, k).unsqueeze(0) for state in (h, c)]
        weights = [_dequantized(k, name) for name in ("weight_ih", "weight_hh")]
        biases = [] if k["bias"] is None else [k["bias"], torch.zeros_like(k["bias"])]
        macs.float32 += x.shape[0] * x.shape[1] * sum(weight.numel() for weight in weights)
        y, h, c = torch.ops.aten.lstm.input(x, states, weights + biases, bool(biases), 1, 0.0, False, False, False)
        return y, h, c

    return run


def _dequantized(k: Constants, name: str) -> Tensor:
    zero_point = k[f"{name}_zero_point"]
    zero_point = torch.zeros_like(k[f"{name}_scale"], dtype=torch.int8) if zero_point is None else zero_point
    return dequantize_weight(k[name], k[f"{name}_scale"], zero_point, k[f"{name}_block"])


def _total(terms: Iterable[Tensor], start: Tensor | None = None) -> Tensor:
    """A sum in the order of the terms."""
    for term in terms:
        start = term if start is None else start + term
    assert start is not None
    return start


def _state(given: Tensor | None, x: Tensor, k: Constants, zero: int = 0) -> Tensor:
    """The state before the first step, [N, hidden]; `zero` where none is given."""
    return torch.full((x.shape[1], k["weight_hh"].shape[1]), float(zero)) if given is None else given[0]


def _check_shapes(x: Tensor, states: tuple[Tensor | None, ...], k: Constants) -> None:
    """Raise ValueError for an input or a state that the weights do not fit: broadcast, it would give wrong results."""
    inputs, hidden = k["weight_ih"].shape[1], k["weight_hh"].shape[1]
    if x.dim() != 3 or x.shape[2] != inputs or not x.shape[0]:
        raise ValueError(f"an LSTM layer takes [steps, examples, {inputs}], at least one step; it got {list(x.shape)}")
    for state in states:
        if state is not None and list(state.shape) != [1, x.shape[1], hidden]:
            raise ValueError(f"the state of an LSTM layer is [1, {x.shape[1]}, {hidden}]; it got {list(state.shape)}")
