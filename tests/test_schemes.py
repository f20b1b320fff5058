"""Scales and zero points against hand arithmetic, and their properties."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qbench.recipe import option
from qbench.schemes import INT8_MIDDLE, UINT8_MIDDLE, affine, symmetric

pytestmark = pytest.mark.usefixtures("one_thread")

ENDS = st.floats(-(2.0**100), 2.0**100, width=32)


def chosen(scheme: str, lo: float, hi: float, middle: int, smallest: float | None = None) -> tuple[float, int]:
    """Scale and zero point as numbers."""
    ends = [torch.tensor(end, dtype=torch.float64) for end in (min(lo, 0.0), max(hi, 0.0))]
    floor = None if smallest is None else torch.tensor(smallest, dtype=torch.float64)
    scale, zero_point = option("scheme", scheme).choose(*ends, middle, floor)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    return float(scale), int(zero_point)


@pytest.mark.parametrize(
    ("scheme", "middle", "lo", "hi", "scale", "zero_point"),
    [
        ("affine", UINT8_MIDDLE, 0.0, 255.0, 1.0, 0),
        ("affine", UINT8_MIDDLE, -255.0, 0.0, 1.0, 255),
        ("affine", UINT8_MIDDLE, -128.0, 127.0, 1.0, 128),
        ("affine", UINT8_MIDDLE, -0.5, 254.5, 1.0, 0),  # rne(0.5) = 0
        ("affine", UINT8_MIDDLE, -1.5, 253.5, 1.0, 2),  # rne(1.5) = 2
        ("affine", UINT8_MIDDLE, 0.0, 510.0, 2.0, 0),
        ("affine", INT8_MIDDLE, 0.0, 255.0, 1.0, -128),
        ("affine", INT8_MIDDLE, -255.0, 0.0, 1.0, 127),
        ("affine", INT8_MIDDLE, -128.0, 127.0, 1.0, 0),
        ("affine", INT8_MIDDLE, -0.5, 254.5, 1.0, -128),  # rne(-127.5) = -128
        ("symmetric", UINT8_MIDDLE, -3.0, 127.0, 1.0, 128),
        ("symmetric", UINT8_MIDDLE, -254.0, 127.0, 2.0, 128),
        ("symmetric", INT8_MIDDLE, -3.0, 127.0, 1.0, 0),
        ("symmetric", INT8_MIDDLE, -254.0, 127.0, 2.0, 0),
    ],
)
def test_hand_computed(scheme: str, middle: int, lo: float, hi: float, scale: float, zero_point: int) -> None:
    assert chosen(scheme, lo, hi, middle) == (scale, zero_point)


@pytest.mark.parametrize("middle", [INT8_MIDDLE, UINT8_MIDDLE])
def test_an_empty_range_has_scale_one(middle: int) -> None:
    assert chosen("symmetric", 0.0, 0.0, middle) == (1.0, middle)
    assert chosen("affine", 0.0, 0.0, middle) == (1.0, middle - 128)


def test_scales_are_bounded() -> None:
    assert chosen("affine", 0.0, 1e-30, UINT8_MIDDLE) == (2.0**-60, 0)
    assert chosen("affine", -1e30, 1e30, UINT8_MIDDLE)[0] == 2.0**60
    assert chosen("symmetric", -1e-38, 0.0, INT8_MIDDLE) == (2.0**-60, 0)
    assert chosen("symmetric", 0.0, 3e38, INT8_MIDDLE) == (2.0**60, 0)


def test_a_floor_raises_the_scale_and_the_zero_point_follows() -> None:
    assert chosen("symmetric", -127.0, 127.0, INT8_MIDDLE, 4.0) == (4.0, 0)
    assert chosen("affine", -128.0, 127.0, UINT8_MIDDLE, 4.0) == (4.0, 32)
    assert chosen("affine", -128.0, 127.0, UINT8_MIDDLE, 0.5) == (1.0, 128)
    assert chosen("affine", 0.0, 0.0, INT8_MIDDLE, 3.0) == (3.0, -128)  # a dead channel with a large bias


def test_codes() -> None:
    assert symmetric().codes(INT8_MIDDLE) == (-127, 127)
    assert affine().codes(INT8_MIDDLE) == (-128, 127)
    assert symmetric().codes(UINT8_MIDDLE) == (1, 255)
    assert affine().codes(UINT8_MIDDLE) == (0, 255)


@given(ENDS, ENDS, st.sampled_from(["affine", "symmetric"]), st.sampled_from([INT8_MIDDLE, UINT8_MIDDLE]))
@example(-1e-45, 0.0, "affine", UINT8_MIDDLE)
@example(0.0, 1.4e-45, "symmetric", INT8_MIDDLE)
@example(-0.0, 0.0, "affine", INT8_MIDDLE)
def test_any_range_gives_the_oracle_and_keeps_its_properties(a: float, b: float, scheme: str, middle: int) -> None:
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero_point = chosen(scheme, lo, hi, middle)
    expected = oracle.choose(lo, hi, scheme, middle)
    assert (scale, zero_point) == (expected.scale, expected.zero_point)
    lowest, highest = option("scheme", scheme).codes(middle)
    assert 2.0**-60 <= scale <= 2.0**60
    assert lowest <= zero_point <= highest  # so zero has a code of its own, exactly
    if 2.0**-50 < max(-lo, hi) < 2.0**50:  # both ends are read back within half a step of the range's own width
        for end in (lo, hi):
            code = min(max(round(end / scale) + zero_point, lowest), highest)
            assert abs((code - zero_point) * scale - end) <= scale * 0.5001 + math.ulp(end)
