"""The float functions between integer ends, against float64, and their independence of everything but the value."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench import functions

GRID = torch.cat([torch.linspace(-100, 100, 40001), torch.linspace(-1e-3, 1e-3, 2001)])
EXACT = {
    functions.exp: lambda x: x.clamp(-87, 88).exp(),
    functions.sigmoid: lambda x: 1 / (1 + (-x).clamp(-87, 88).exp()),
    functions.tanh: torch.tanh,
}


@pytest.mark.parametrize(("function", "relative"), [(functions.exp, 2e-7), (functions.sigmoid, 3e-7)])
def test_close_to_float64(function, relative):
    exact = EXACT[function](GRID.double())
    assert float(((function(GRID).double() - exact) / exact).abs().max()) < relative


def test_tanh_is_close_to_float64():
    """The difference of two numbers near 1: an absolute error of two units in the last place of 1."""
    assert float((functions.tanh(GRID).double() - EXACT[functions.tanh](GRID.double())).abs().max()) < 2.5e-7


def test_values_that_can_be_derived_by_hand():
    zero = torch.zeros(1)
    assert functions.exp(zero).item() == 1.0
    assert functions.sigmoid(zero).item() == 0.5
    assert functions.tanh(zero).item() == 0.0
    assert functions.exp(torch.tensor([-1e9])).item() == functions.exp(torch.tensor([-87.0])).item()


@pytest.mark.parametrize("function", EXACT)
def test_a_value_does_not_depend_on_its_neighbours(function):
    x = torch.randn(1003, generator=torch.Generator().manual_seed(0)) * 8
    alone = torch.cat([function(part) for part in x.split(1)])
    assert torch.equal(function(x), alone)
    assert torch.equal(function(x.flip(0)).flip(0), alone)


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=70))
def test_the_order_of_a_sum_is_the_specified_one(values):
    lanes = [0.0] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = float32(lanes[i % 16] + value)
    for half in (8, 4, 2, 1):
        lanes = [float32(lanes[j] + lanes[j + half]) for j in range(half)]
    assert functions.lane_sum(torch.tensor(values)).tolist() == lanes
