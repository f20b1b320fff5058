"""Observers against order statistics, hand arithmetic and exhaustive searches."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import every_operation
from torch import Tensor, nn

import qbench
from qbench.calibrate import calibrate
from qbench.capture import Network, capture
from qbench.observers import Extent, entropy, minmax, moving_average, mse, percentile
from qbench.recipe import option

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [minmax(), moving_average(), percentile(), mse(), entropy()]
UNBATCHED = [observer for observer in ALL if not observer.defined_by_batches]


def observed(observer: object, *batches: Tensor, scheme: str = "affine") -> tuple[float, float]:
    """The range of batches of one tensor, in one or two passes."""
    extent = Extent()
    if observer.two_passes:
        for batch in batches:
            extent.update(batch)
    tally = observer.tally(extent, option("scheme", scheme))
    for batch in batches:
        tally.update(batch)
    return tally.range()


def test_hand_computed_expectations_tell_the_observers_apart() -> None:
    """-100 ... 899 in steps of 1 and an outlier of 10,000, in two batches."""
    values = torch.cat([torch.arange(-100.0, 900.0), torch.tensor([10_000.0])])
    batches = values[:500], values[500:]  # -100 ... 399 and 400 ... 10,000
    assert observed(minmax(), *batches) == (-100.0, 10_000.0)
    # lo: -100 + 0.01 * (400 - -100) = -95; hi: 399 + 0.01 * (10,000 - 399) = 495.01
    assert observed(moving_average(), *batches) == (pytest.approx(-95.0), pytest.approx(495.01))
    # 1001 values: rank ceil(0.99 * 1001) = 991: from below -100 + 990, from above 899 - 989
    assert observed(percentile(99), *batches) == (-90.0, 890.0)
    assert observed(percentile(100), *batches) == (-100.0, 10_000.0)


# --- minmax and moving average ---------------------------------------------------------------------------------------


def test_moving_average_by_hand() -> None:
    """The first batch is the start; each further one moves the ends by a quarter of the way."""
    batches = [torch.tensor(ends) for ends in ([-8.0, 8.0], [0.0, 4.0], [-16.0, 16.0])]
    # lo: -8, -6, -8.5    hi: 8, 7, 9.25
    assert observed(moving_average(0.25), *batches) == (-8.5, 9.25)
    assert observed(moving_average(1.0), *batches) == (-16.0, 16.0)
    assert observed(moving_average(0.25), *batches[::-1]) == (-11.0, 11.75)  # the order matters


def test_the_default_momentum_is_a_hundredth() -> None:
    assert observed(moving_average(), torch.tensor([0.0, 0.0]), torch.tensor([-100.0, 200.0])) == (-1.0, 2.0)


# --- percentile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [99.99, 99.9, 99.0, 97.5, 75.0, 50.001, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 10_000, 12_345])
def test_percentile_is_the_order_statistic(share: float, count: int) -> None:
    """The smallest value that at least the share of all values does not exceed; on the other tail likewise."""
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    ordered, rank = np.sort(values), math.ceil(Fraction(str(share)) * count / 100)
    lo, hi = observed(percentile(share), *torch.from_numpy(values).split(max(count // 3, 1)))
    assert (lo, hi) == (ordered[count - rank], ordered[rank - 1])
    for end, side in ((hi, values), (-lo, -values)):
        assert Fraction(int((side <= end).sum()), count) >= Fraction(str(share)) / 100
        assert Fraction(int((side < end).sum()), count) < Fraction(str(share)) / 100
    if Fraction(str(share)) * count % 100:  # numpy's rank is computed in floats: it agrees where that cannot matter
        assert hi == np.percentile(values, share, method="inverted_cdf")


def test_percentile_agrees_with_numpy_on_equal_values() -> None:
    values = torch.tensor([0.0] * 600 + [1.0] * 399 + [50.0])
    assert observed(percentile(99.9), values) == (0.0, 1.0)
    assert observed(percentile(99.91), values) == (0.0, 50.0)


# --- mse and entropy -------------------------------------------------------------------------------------------------


def bell_with_outlier(outlier: float, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).normal(size=20_000).astype(np.float32)
    values[7] = outlier
    return torch.from_numpy(values)


def squared_error(values: np.ndarray, lo: float, hi: float, scheme: str) -> float:
    """The error of reading values back, computed value by value in float64."""
    q = oracle.choose(lo, hi, scheme, 128)
    codes = np.clip(np.rint(values / q.scale) + q.zero_point, q.q_min, q.q_max)
    return float((((codes - q.zero_point) * q.scale - values) ** 2).sum())


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("outlier", [12.0, -30.0, 3.0])
def test_mse_finds_the_clip_ratio_of_an_exhaustive_search(outlier: float, scheme: str) -> None:
    """Within a percent of the least error over all 100 ratios: the histogram has 8192 bins."""
    values = bell_with_outlier(outlier)
    exact, (lo, hi) = values.double().numpy(), observed(mse(), values, scheme=scheme)
    ends = min(float(values.min()), 0), max(float(values.max()), 0)
    errors = {step: squared_error(exact, *(end * step / 100 for end in ends), scheme) for step in range(1, 101)}
    assert squared_error(exact, lo, hi, scheme) <= 1.01 * min(errors.values())
    ratio = hi / ends[1]
    assert ratio == pytest.approx(lo / ends[0])
    assert ratio * 100 == pytest.approx(round(ratio * 100))


@functools.cache
def one_sided() -> Tensor:
    """A million values as after a ReLU, up to about 5, and one of 20."""
    values = np.abs(np.random.default_rng(3).normal(size=1_000_000)).astype(np.float32)
    values[7] = 20
    return torch.from_numpy(values)


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("observer", [mse(), entropy()], ids=["mse", "entropy"])
def test_an_outlier_is_clipped(observer: object, scheme: str) -> None:
    """One value in a million takes two of the eight bits from the others: it is cut off."""
    assert observed(minmax(), one_sided())[1] == 20
    assert 3.5 < observed(observer, one_sided(), scheme=scheme)[1] < 10


def test_where_mse_clips_by_hand() -> None:
    """(20 - c)^2 + n (c / 255)^2 / 12 is least at c = 20 / (1 + n / (12 * 255^2)) = 8.77; a ratio step is 0.2."""
    assert observed(mse(), one_sided())[1] == pytest.approx(20 / (1 + 10**6 / (12 * 255**2)), abs=0.3)


@pytest.mark.parametrize("observer", [mse(), entropy()], ids=["mse", "entropy"])
def test_without_an_outlier_little_is_clipped(observer: object) -> None:
    """Uniform values need the whole range."""
    values = torch.from_numpy(np.random.default_rng(1).uniform(-1, 3, 50_000)).float()
    lo, hi = observed(observer, values)
    assert hi > 2.9
    assert lo < -0.95


def test_entropy_by_definition() -> None:
    """Two spikes of equal height: keeping both loses nothing, cutting one moves its mass into the last bin."""
    values = torch.tensor([1.0] * 500 + [100.0] * 500)
    assert observed(entropy(), values) == (0.0, 100.0)


@pytest.mark.parametrize("observer", [mse(), entropy(), percentile()], ids=["mse", "entropy", "percentile"])
def test_only_zeros_and_one_value(observer: object) -> None:
    assert observed(observer, torch.zeros(5)) == (0.0, 0.0)
    lo, hi = observed(observer, torch.tensor([3.0]))
    assert oracle.choose(lo, hi, "affine", 128).scale == pytest.approx(3 / 255, rel=0.02)


# --- batching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", UNBATCHED, ids=lambda observer: observer.name)
@settings(max_examples=6)
@given(cuts=st.lists(st.integers(0, 997), max_size=6))
def test_ranges_do_not_depend_on_the_batching(observer: object, cuts: list[int]) -> None:
    values = bell_with_outlier(9.0)[:997]
    ends = [0, *sorted(cuts), 997]
    batches = [values[first:last] for first, last in itertools.pairwise(ends)]
    assert observed(observer, *batches) == observed(observer, values)


@functools.cache
def network() -> tuple[Network, Tensor]:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(40, 3, 16, 16))).float()
    return capture(every_operation(), (x,)), x


@pytest.mark.parametrize("observer", ALL, ids=lambda observer: observer.name)
def test_a_plan_does_not_depend_on_the_batching(observer: object) -> None:
    """Every scale and zero point of a network, from batches of 40 and of 13: exactly equal."""
    captured, x = network()
    plans = [
        calibrate(captured, qbench.Recipe(observer=observer), [[part] for part in x.split(size)]).qparams
        for size in (40, 13)
    ]
    if observer.defined_by_batches:
        assert plans[0] != plans[1]
    else:
        assert plans[0] == plans[1]


def test_observers_give_different_plans() -> None:
    captured, x = network()
    batches = [[part] for part in x.split(8)]
    plans = [calibrate(captured, qbench.Recipe(observer=observer), batches).qparams for observer in ALL]
    assert all(a != b for a, b in itertools.combinations(plans, 2))
    assert max(plan["x"].scale for plan in plans) == plans[0]["x"].scale  # nothing sees more than minmax


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("observer", ALL, ids=lambda observer: observer.name)
def test_a_value_that_is_not_finite_is_refused(observer: object, value: float) -> None:
    with pytest.raises(ValueError, match="the calibration data give a value that is not finite"):
        observed(observer, torch.tensor([0.0, 1.0]), torch.tensor([value, 1.0]))


@pytest.mark.parametrize("observer", ALL, ids=lambda observer: observer.name)
def test_an_activation_that_overflows_is_refused(observer: object) -> None:
    """Finite inputs, a product that is not."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.fill_(3e38)
    x = torch.full((4, 2), 2.0)
    with pytest.raises(ValueError, match="not finite"):
        qbench.quantize(layer, (x,), qbench.Recipe(observer=observer, output="int8"), calibration=[(x,)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: percentile(50), "observer.percentile=50: give a number above 50 and at most 100"),
        (lambda: percentile(101), "observer.percentile=101: give a number above 50"),
        (lambda: percentile(math.nan), "observer.percentile=nan"),
        (lambda: moving_average(0), "observer.momentum=0: give a number above 0 and at most 1"),
        (lambda: moving_average(1.5), "observer.momentum=1.5"),
        (lambda: mse(0), "observer.ratios=0: give a whole number, at least 1"),
        (lambda: mse(2.5), "observer.ratios=2.5"),
        (lambda: entropy(100), "observer.bins=100: give a whole number, at least 512"),
    ],
)
def test_impossible_options_are_one_line(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build()
