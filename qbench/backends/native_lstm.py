"""LSTM layers on the native engine: a whole sequence in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qbench.backends.native_operands import (
    NOT_FINITE,
    TILE,
    Constants,
    Held,
    Kernel,
    codes,
    finish_codes,
    finish_floats,
    floats,
    packed,
    rows_as_codes,
    spread_out,
    tiled,
)
from qbench.native.library import Recurrent, byref, library
from qbench.numerics import multiplier

if TYPE_CHECKING:
    from qbench.program import Macs

GATES = {"scale": None, "zero_point": 0, "q_min": 0, "q_max": 255, "residual_scale": 1.0, "residual_zero_point": 0}


def _by_units(per_output: Tensor | None, hidden: int) -> Tensor | None:
    """[4 * hidden or 1, ...] by gate (i, f, g, o) in qb::Recurrent's order: TILE units at a time, filled up with 0."""
    if per_output is None:
        return None
    by_gate = per_output.expand(4 * hidden, *per_output.shape[1:]).unflatten(0, (4, hidden))
    filled: Tensor = functional.pad(by_gate, (0, 0) * (by_gate.dim() - 2) + (0, -hidden % TILE))
    by_tile: Tensor = filled.unflatten(1, (-1, TILE))
    return by_tile.transpose(0, 1).flatten(0, 2)


def _in_order(c: Constants) -> Constants:
    """The constants of a layer with all that belongs to outputs in the engine's order."""
    weights = [f"{name}{part}" for name in ("weight_ih", "weight_hh") for part in ("", "_scale", "_zero_point")]
    hidden = c["weight_hh"].shape[1]
    return {**c, **{name: _by_units(c[name], hidden) for name in (*weights, "bias")}}


def _weight(c: Constants, name: str) -> Held:
    return packed(c[name], c[f"{name}_zero_point"], 1, c[f"{name}_block"])


class _Layer:
    """A qb::Recurrent with its weights, finishes to be set by the method."""

    def __init__(self, c: Constants, finish_ih: Held, finish_hh: Held) -> None:
        self.inputs, self.hidden = c["weight_ih"].shape[1], c["weight_hh"].shape[1]
        self.weights = _weight(c, "weight_ih"), _weight(c, "weight_hh")
        self.finishes = finish_ih, finish_hh
        self.options: dict[str, Any] = {}

    def call(self, steps: int, samples: int) -> Recurrent:
        structures = [held.structure for held in (*self.weights, *self.finishes)]
        return Recurrent(*structures, steps=steps, samples=samples, hidden=self.hidden, **self.options)

    def check(self, x: Tensor, states: tuple[Tensor | None, ...]) -> None:
        """Raise ValueError for an input or a state that the weights do not fit."""
        if x.dim() != 3 or x.shape[2] != self.inputs or not x.shape[0]:
            raise ValueError(
                f"an LSTM layer takes [steps, examples, {self.inputs}], at least one step; it got {list(x.shape)}"
            )
        for state in states:
            if state is not None and list(state.shape) != [1, x.shape[1], self.hidden]:
                raise ValueError(
                    f"the state of an LSTM layer is [1, {x.shape[1]}, {self.hidden}]; it got {list(state.shape)}"
                )

    def cell_state(self, given: Tensor | None, samples: int) -> Tensor:
        """c before the first step, ours to overwrite."""
        return torch.zeros(samples, self.hidden) if given is None else floats(given[0]).clone()

    def hidden_state(self, given: Tensor | None, samples: int) -> Tensor:
        """A float32 h before the first step."""
        return torch.zeros(samples, self.hidden) if given is None else floats(given[0])


def static(c: Constants, macs: Macs) -> Kernel:
    """Codes in; codes of h out, rounded once, and c as float32."""
    c = _in_order(c)
    zero, outputs = c["zero_point"], c["weight_ih"]
    of_x = {**GATES, "weight": outputs, "bias": c["bias"]}
    finish_ih = finish_codes(of_x, multiplier(c["x_scale"], c["weight_ih_scale"]), 1)
    finish_hh = finish_codes({**of_x, "bias": None}, multiplier(c["scale"], c["weight_hh_scale"]), 1)
    layer = _Layer(c, finish_ih, finish_hh)
    layer.options = {name: c[name] for name in ("scale", "x_zero_point", "zero_point", "q_min", "q_max")}

    def run(x: Tensor, h: Tensor | None = None, cell: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        layer.check(x, (h, cell))
        x, samples = codes(x), x.shape[1]
        state = torch.full((samples, layer.hidden), zero, dtype=torch.uint8) if h is None else codes(h[0])
        cell = layer.cell_state(cell, samples)
        y = torch.empty(x.shape[0], samples, layer.hidden, dtype=torch.uint8)
        call = layer.call(x.shape[0], samples)
        macs.int8 += library().qb_lstm(byref(call), x.data_ptr(), state.data_ptr(), cell.data_ptr(), y.data_ptr())
        return y, y[-1:], cell.unsqueeze(0)

    return run


def dynamic(c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; x and h become codes apart, for each step of each sample or (per tensor) together."""
    c = _in_order(c)
    outputs, per_row = len(c["weight_ih"]), c["rows"] == "per_row"
    finish_ih = finish_floats(c["weight_ih_scale"], None, outputs, 1)
    finish_hh = finish_floats(c["weight_hh_scale"], c["bias"], outputs, 1)
    layer = _Layer(c, finish_ih, finish_hh)
    layer.options = {"affine": c["scheme"] == "affine", "per_row": per_row}

    def run(x: Tensor, h: Tensor | None = None, cell: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        layer.check(x, (h, cell))
        steps, samples, _ = x.shape
        state, cell = layer.hidden_state(h, samples), layer.cell_state(cell, samples)
        x_codes, scales, zero_points = rows_as_codes(floats(x), steps * samples if per_row else 1, c["scheme"])
        y = torch.empty(steps, samples, layer.hidden)
        call = layer.call(steps, samples)
        inputs = x_codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr()
        count = library().qb_dynamic_lstm(byref(call), *inputs, state.data_ptr(), cell.data_ptr(), y.data_ptr())
        if count < 0:
            raise ValueError(NOT_FINITE)
        macs.int8 += count
        return y, y[-1:], cell.unsqueeze(0)

    return run


def weight_only(c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out, the weights read back tile by tile, or once a call where that is little."""
    c = _in_order(c)
    outputs = len(c["weight_ih"])
    finish_ih, finish_hh = finish_floats(None, None, outputs, 1), finish_floats(None, c["bias"], outputs, 1)
    layer = _Layer(c, finish_ih, finish_hh)
    scales = [tiled(spread_out(c[f"{name}_scale"], outputs), 1) for name in ("weight_ih", "weight_hh")]

    def run(x: Tensor, h: Tensor | None = None, cell: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        layer.check(x, (h, cell))
        steps, samples, _ = x.shape
        x, state, cell = floats(x), layer.hidden_state(h, samples), layer.cell_state(cell, samples)
        y = torch.empty(steps, samples, layer.hidden)
        call = layer.call(steps, samples)
        held = [tensor.data_ptr() for tensor in (*scales, x, state, cell, y)]
        macs.float32 += library().qb_weight_only_lstm(byref(call), *held)
        return y, y[-1:], cell.unsqueeze(0)

    return run
