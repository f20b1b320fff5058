"""Rounding, saturation, weights and biases: hand arithmetic and properties."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import grid
from torch import Tensor

from qbench import numerics
from qbench.numerics import QParams, activation_qparams
from qbench.recipe import option

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False)
FINITE = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
SCALES = st.floats(2.0**-60, 2.0**60, width=32, exclude_min=False)
SCHEMES = st.sampled_from(["affine", "symmetric"])


def f32(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# --- quantize --------------------------------------------------------------------------------------------------------


def test_half_to_even_and_saturation_by_hand() -> None:
    x = f32([-1000.0, -128.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 126.5, 127.5, 1000.0])
    want = [0, 0, 126, 128, 128, 128, 130, 130, 254, 255, 255]
    assert numerics.quantize(x, 1.0, 128, 0, 255).tolist() == want


def test_what_is_no_number_has_a_code() -> None:
    x = f32([math.nan, math.inf, -math.inf, 3e38, -3e38])
    assert numerics.quantize(x, 2.0**-60, 7, 3, 250).tolist() == [3, 250, 3, 250, 3]


def test_every_code_reads_back_to_itself() -> None:
    """0/255 ... 255/255 must map to 0 ... 255, and to -128 ... 127 as a weight."""
    steps = torch.arange(256, dtype=torch.float32) / 255
    q = activation_qparams(0.0, 1.0, option("scheme", "affine"))
    assert numerics.quantize(steps, q.scale, q.zero_point, q.q_min, q.q_max).tolist() == list(range(256))
    weight = numerics.quantize_weight(steps[None], option("granularity", "per_channel"), option("scheme", "affine"), 64)
    assert weight.values.tolist() == [list(range(-128, 128))]


@given(st.lists(FLOATS, min_size=1, max_size=20), SCALES, st.integers(0, 255), SCHEMES)
def test_quantize_is_the_specification(values: list[float], scale: float, zero_point: int, scheme: str) -> None:
    q_min, q_max = option("scheme", scheme).codes(128)
    q = oracle.Q(scale, zero_point, q_min, q_max)
    want = [oracle.quantize(value, q) for value in values]
    assert numerics.quantize(f32(values), scale, zero_point, q_min, q_max).tolist() == want
    assert all(q_min <= code <= q_max for code in want)


@given(st.integers(1, 2**24), st.integers(-(2**22), 2**22))
def test_division_is_true_float32_division(mantissa: int, numerator: int) -> None:
    """x * (1 / s) rounds twice; numpy divides float32 by float32 once."""
    scale, x = np.float32(mantissa * 2.0**-20), np.float32(numerator * 2.0**-12)
    wide = numerics.quantize(f32([float(x)]), float(scale), 0, -(2**24), 2**24)
    assert wide.tolist() == [min(max(round(float(x / scale)), -(2**24)), 2**24)]


def test_the_reciprocal_would_give_other_codes() -> None:
    """The case that tells division from multiplication by the reciprocal: ties that the reciprocal misses."""
    apart = 0
    for step in range(1, 50):
        scale = np.float32(step / 255)
        halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) * scale
        want = np.rint(halves / scale)
        apart += int((want != np.rint(halves * (np.float32(1) / scale))).sum())
        assert numerics.quantize(torch.from_numpy(halves), float(scale), 0, 0, 255).tolist() == want.tolist()
    assert apart > 50


@given(st.lists(FINITE, min_size=2, max_size=12), SCHEMES)
def test_round_trip_within_half_a_step(values: list[float], scheme: str) -> None:
    q = activation_qparams(min(values), max(values), option("scheme", scheme))
    codes = numerics.quantize(f32(values), q.scale, q.zero_point, q.q_min, q.q_max)
    back = numerics.dequantize(codes, q.scale, q.zero_point)
    for value, read in zip(values, back.tolist(), strict=True):
        # affine: the zero point is rounded too, so an end of the range may lie half a step outside the codes
        assert abs(read - value) <= q.scale * 0.5 * (1 + 2**-20)


@given(FINITE, FINITE, SCHEMES)
def test_zero_is_exact(a: float, b: float, scheme: str) -> None:
    q = activation_qparams(min(a, b), max(a, b), option("scheme", scheme))
    codes = numerics.quantize(f32([0.0, -0.0]), q.scale, q.zero_point, q.q_min, q.q_max)
    assert codes.tolist() == [q.zero_point, q.zero_point]
    assert numerics.dequantize(codes, q.scale, q.zero_point).tolist() == [0.0, 0.0]


@given(st.lists(FLOATS, min_size=1, max_size=20), st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_saturate_is_the_specification(values: list[float], zero_point: int, a: int, b: int) -> None:
    q_min, q_max = min(a, b), max(a, b)
    want = [oracle.requantize(value, zero_point, q_min, q_max) for value in values]
    assert numerics.saturate_(f32(values), zero_point, q_min, q_max).tolist() == want


@given(SCALES, SCALES, SCALES)
def test_a_multiplier_is_computed_in_float64_and_rounded_once(x: float, w: float, y: float) -> None:
    want = oracle.multiplier(x, w, y) if 2.0**-120 < x * w / y < 2.0**120 else None
    if want is not None:
        assert float(numerics.multiplier(x, torch.tensor([[w]]), y)) == float(want)
        assert float(numerics.multiplier(x, w, y)) == float(want)


# --- activations -----------------------------------------------------------------------------------------------------


def test_a_range_always_holds_zero() -> None:
    affine = option("scheme", "affine")
    assert activation_qparams(51.0, 255.0, affine) == QParams(1.0, 0, 0, 255)
    assert activation_qparams(-255.0, -51.0, affine) == QParams(1.0, 255, 0, 255)


@pytest.mark.parametrize("ends", [(math.nan, 1.0), (0.0, math.inf), (-math.inf, 0.0)])
def test_a_range_that_is_not_finite_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"range \[.*\] is not finite"):
        activation_qparams(*ends, option("scheme", "affine"))


@pytest.mark.parametrize(
    ("bounds", "want"),
    [
        ((0.0, None), (100, 255)),  # ReLU
        ((0.0, 6.0), (100, 112)),  # ReLU6: 6 / 0.5 = 12 steps
        ((-0.25, 0.75), (100, 102)),  # rne(-0.5) = 0, rne(1.5) = 2
        ((-1000.0, 1000.0), (0, 255)),
        ((None, -1.0), (0, 98)),
    ],
)
def test_a_clamp_narrows_the_codes(bounds: tuple[float | None, float | None], want: tuple[int, int]) -> None:
    narrowed = QParams(0.5, 100, 0, 255).narrowed(*bounds)
    assert (narrowed.q_min, narrowed.q_max) == want
    assert (narrowed.scale, narrowed.zero_point) == (0.5, 100)


# --- weights ---------------------------------------------------------------------------------------------------------


def quantized(
    weight: Tensor, granularity: str, scheme: str, group_size: int = 64, **options: Tensor
) -> numerics.QWeight:
    return numerics.quantize_weight(
        weight, option("granularity", granularity), option("scheme", scheme), group_size, **options
    )


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize(
    ("granularity", "group_size", "scales"),
    [
        ("per_tensor", 64, [1, 1]),
        ("per_channel", 64, [4, 1]),
        ("per_group", 3, [4, 3]),  # blocks of 3, 3 and 1
        ("per_group", 6, [4, 2]),  # blocks of 6 and 1
        ("per_group", 7, [4, 1]),
        ("per_group", 8, [4, 1]),
        ("per_group", 1, [4, 7]),
    ],
)
@pytest.mark.parametrize("taps", [(), (3,), (2, 3)])
def test_weights_against_the_oracle(
    granularity: str, group_size: int, scales: list[int], scheme: str, taps: tuple[int, ...]
) -> None:
    weight = grid(4, 7, *taps, seed=len(taps), step=1 / 37)
    weight[1] = 0  # a dead channel
    weight[2] = weight[2].abs()
    got = quantized(weight, granularity, scheme, group_size)
    want = oracle.weight(weight.numpy(), granularity, scheme, group_size)
    assert list(got.scale.shape) == list(got.zero_point.shape) == scales
    assert (got.block, got.values.dtype, got.zero_point.dtype) == (want.block, torch.int8, torch.int8)
    assert np.array_equal(got.values.numpy(), want.codes)
    assert np.array_equal(got.dequantize().numpy(), want.real)
    for row, wanted in zip(got.scale.expand(4, -1).tolist(), want.q, strict=True):
        assert row == [q.scale for q in wanted]


def test_blocks_do_not_share_by_hand() -> None:
    """Inputs 0-1, 2-3 and 4 of each row have scales of their own, all taps of an input together."""
    weight = f32([[127, 1, 254, 2, 0.127], [1.27, -0.5, -508, 4, -127]])
    got = quantized(weight, "per_group", "symmetric", 2)
    assert got.scale.tolist() == [[1, 2, pytest.approx(0.001)], [pytest.approx(0.01), 4, 1]]
    assert got.values.tolist() == [[127, 1, 127, 1, 127], [127, -50, -127, 1, -127]]


def test_the_granularities_are_told_apart_by_hand() -> None:
    weight = f32([[127, 1, 1, 1], [254, 2, 2, 2]])
    by_name = {
        name: quantized(weight, name, "symmetric", 2).values.tolist()
        for name in ("per_tensor", "per_channel", "per_group")
    }
    assert by_name["per_tensor"] == [[64, 0, 0, 0], [127, 1, 1, 1]]  # rne(63.5) = 64, rne(0.5) = 0
    assert by_name["per_channel"] == [[127, 1, 1, 1], [127, 1, 1, 1]]
    assert by_name["per_group"] == [[127, 1, 127, 127], [127, 1, 127, 127]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="weight has values that are not finite"):
        quantized(f32([[1.0, bad]]), "per_channel", "symmetric")


@given(
    st.lists(st.lists(FINITE, min_size=5, max_size=5), min_size=1, max_size=3),
    st.sampled_from(["per_tensor", "per_channel", "per_group"]),
    SCHEMES,
    st.integers(1, 6),
)
def test_any_weight_is_within_half_a_step(
    rows: list[list[float]], granularity: str, scheme: str, group_size: int
) -> None:
    weight = f32(rows)
    got = quantized(weight, granularity, scheme, group_size)
    want = oracle.weight(weight.numpy(), granularity, scheme, group_size)
    assert np.array_equal(got.values.numpy(), want.codes)
    for (o, i), value in np.ndenumerate(weight.double().numpy()):
        q = want.q[o][i // want.block]
        assert abs((int(want.codes[o, i]) - q.zero_point) * q.scale - value) <= q.scale * 0.5 * (1 + 2**-20)
        assert q.q_min <= int(got.values[o, i]) <= q.q_max


# --- biases ----------------------------------------------------------------------------------------------------------


def test_a_bias_raises_the_scale_of_its_channel_by_hand() -> None:
    """s_x = 2^-20 and |b| = 2^14 ask for s_w >= 2^4; channel 1 has no bias and keeps 1."""
    weight, bias, x_scale = f32([[127, -127], [127, -127]]), f32([-(2.0**14), 0.0]), 2.0**-20
    floor = numerics.bias_floor(bias, x_scale)
    got = quantized(weight, "per_channel", "symmetric", smallest_scale=floor)
    assert got.scale.tolist() == [[16.0], [1.0]]
    assert got.values.tolist() == [[8, -8], [127, -127]]  # 127 / 16 = 7.94
    assert numerics.quantize_bias(bias, x_scale, got.scale).tolist() == [-(2**30), 0]
    shared = quantized(weight, "per_tensor", "symmetric", smallest_scale=floor)
    assert shared.scale.tolist() == [[16.0]]


@given(
    st.lists(FINITE, min_size=2, max_size=2),
    st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
    st.floats(2.0**-30, 2.0**10, width=32),
    st.sampled_from(["per_tensor", "per_channel"]),
    SCHEMES,
)
def test_any_bias_fits(row: list[float], bias: float, x_scale: float, granularity: str, scheme: str) -> None:
    floor = numerics.bias_floor(f32([bias]), x_scale)
    got = quantized(f32([row]), granularity, scheme, smallest_scale=floor)
    want = oracle.weight(f32([row]).numpy(), granularity, scheme, bias=f32([bias]).numpy(), x_scale=x_scale)
    codes = numerics.quantize_bias(f32([bias]), x_scale, got.scale).tolist()
    assert got.scale.tolist() == [[want.q[0][0].scale]]
    assert codes == oracle.bias_codes([bias], x_scale, want)
    if abs(bias) / x_scale < 2.0**89:  # beyond, the bound of the scales holds it back
        assert abs(codes[0]) <= 2**30 * (1 + 2**-23)  # the scale is rounded to float32, maybe down


def test_bias_codes_are_rounded_half_to_even() -> None:
    bias = f32([0.25, 0.75, 1.25, -0.25, -0.75])
    assert numerics.quantize_bias(bias, 0.5, torch.ones(1, 1)).tolist() == [0, 2, 2, 0, -2]


# --- the accumulator -------------------------------------------------------------------------------------------------


def wide(count: int, value: int, zero_point: int) -> numerics.QWeight:
    values = torch.full((1, count), value, dtype=torch.int8)
    return numerics.QWeight(values, torch.ones(1, 1), torch.full((1, 1), zero_point, dtype=torch.int8), count)


@pytest.mark.parametrize(
    ("value", "zero_point", "most"),
    [
        (127, -128, 33025),
        (127, 0, 66311),
        (-127, 0, 66311),
        (-128, 127, 33025),
    ],  # most = ceil(2^31 / (255 |q - z|)) - 1
)
def test_the_bound_of_the_sum_is_exact(value: int, zero_point: int, most: int) -> None:
    numerics.check_accumulator("fc", wide(most, value, zero_point), None)
    reach = 255 * abs(value - zero_point) * (most + 1)
    with pytest.raises(ValueError, match=rf"layer fc: its int32 sum may reach {reach}, the bound is 2147483647"):
        numerics.check_accumulator("fc", wide(most + 1, value, zero_point), None)


def test_the_bias_counts_in_the_bound() -> None:
    weight = wide(66311, 127, 0)
    left = 2**31 - 1 - 255 * 127 * 66311
    for bias in (left, -left):
        numerics.check_accumulator("fc", weight, torch.tensor([bias], dtype=torch.int32))
        with pytest.raises(ValueError, match="may reach 2147483648"):
            numerics.check_accumulator("fc", weight, torch.tensor([bias + (1 if bias > 0 else -1)], dtype=torch.int32))


def test_each_block_has_an_accumulator_of_its_own() -> None:
    values = torch.full((1, 66312), 127, dtype=torch.int8)
    blocks = numerics.QWeight(values, torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int8), 33156)
    numerics.check_accumulator("fc", blocks, None)
