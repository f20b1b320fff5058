"""Each test and interval against arithmetic done here, published values, and simulation with fixed seeds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qbench.statistics import (
    EXACTLY_ONE,
    Jackknife,
    LogRatio,
    chain,
    clopper_pearson,
    cluster_bootstrap,
    jackknife,
    kendall_tau,
    mcnemar_p,
    paired_interval,
    percentile,
    ratio_over_processes,
    smallest_sample,
)

COUNTS = st.integers(0, 60)


def at_most(count: int, total: int, share: Fraction) -> Fraction:
    """P(a binomial variable <= count), exactly."""
    return sum(
        (math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count + 1)), start=Fraction(0)
    )


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1), (3, 3, 1), (5, 0, Fraction(2, 32)), (6, 0, Fraction(2, 64)), (1, 4, Fraction(12, 32))],
)
def test_mcnemar_by_hand(lost: int, gained: int, p: Fraction) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(float(p), rel=1e-12)


@given(lost=COUNTS, gained=COUNTS)
def test_mcnemar_is_the_two_sided_sign_test(lost: int, gained: int) -> None:
    exact = min(Fraction(1), 2 * at_most(min(lost, gained), lost + gained, Fraction(1, 2)))
    assert mcnemar_p(lost, gained) == pytest.approx(float(exact), rel=1e-9)


def test_clopper_pearson_published_and_closed_form() -> None:
    assert clopper_pearson(1, 10) == pytest.approx((0.002529, 0.445016), abs=1e-6)
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    assert clopper_pearson(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0))


@given(total=st.integers(1, 60), data=st.data())
def test_clopper_pearson_leaves_a_fortieth_on_either_side(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = clopper_pearson(count, total)
    assert low <= count / total <= high
    if count:
        assert float(1 - at_most(count - 1, total, Fraction(low))) == pytest.approx(0.025, rel=1e-6)
    if count < total:
        assert float(at_most(count, total, Fraction(high))) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_clopper_pearson_refuses_what_is_no_share(count: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of {total} is not a share"):
        clopper_pearson(count, total)


def test_paired_interval_holds_zero_exactly_when_mcnemar_finds_nothing() -> None:
    for lost, gained in itertools.product(range(40), repeat=2):
        for total in (lost + gained + 1, 500, 10_000):
            low, high = paired_interval(lost, gained, total)
            assert (low <= 0 <= high) == (mcnemar_p(lost, gained) >= 0.05), (lost, gained, total)
            assert low <= (lost - gained) / total <= high


@given(lost=COUNTS, gained=COUNTS, rest=st.integers(1, 5000))
def test_paired_interval_mirrors(lost: int, gained: int, rest: int) -> None:
    low, high = paired_interval(lost, gained, lost + gained + rest)
    assert paired_interval(gained, lost, lost + gained + rest) == pytest.approx((-high, -low))


def test_no_discordant_pair_is_not_certainty() -> None:
    """None seen in 1000: up to 3.7 per mille may be lost (rule of three, at 97.5 % a side)."""
    low, high = paired_interval(0, 0, 1000)
    assert high == -low == pytest.approx(1 - 0.025 ** (1 / 1000))


@pytest.mark.parametrize(
    ("p_lost", "p_gained", "total"),
    [(0.005, 0.0, 1000), (0.010, 0.005, 10_000), (0.02, 0.02, 500), (0.1, 0.05, 200), (0.0005, 0.0002, 10_000)],
)
def test_paired_interval_covers(p_lost: float, p_gained: float, total: int) -> None:
    random = np.random.default_rng(1)
    draws = random.multinomial(total, (p_lost, p_gained, 1 - p_lost - p_gained), size=2000)
    hits = 0
    for lost, gained, _ in draws:
        low, high = paired_interval(int(lost), int(gained), total)
        hits += low <= p_lost - p_gained <= high
    assert hits / len(draws) >= 0.94


def test_a_loss_of_half_a_point_is_found() -> None:
    """0.5 points of 10,000 examples with 1.5 % discordant: found in at least 95 of 100 samples."""
    draws = np.random.default_rng(2).multinomial(10_000, (0.010, 0.005, 0.985), size=500)
    assert np.mean([mcnemar_p(int(lost), int(gained)) < 0.05 for lost, gained, _ in draws]) >= 0.95


@pytest.mark.parametrize("units", [6, 10, 20, 100])
def test_cluster_bootstrap_covers(units: int) -> None:
    """Units of unequal size whose examples resemble each other; a plain interval over examples would be too narrow."""
    random = np.random.default_rng(units)
    hits = 0
    for trial in range(400):
        counts = random.integers(5, 15, units)
        sums = random.normal(0.1, 1.0, units) * counts
        found = cluster_bootstrap(sums, counts, seed=trial, resamples=1000)
        hits += found.low <= 0.1 <= found.high
    assert 0.92 <= hits / 400 <= 0.985


def test_cluster_bootstrap_of_single_examples_is_students_interval() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 200)
    found = cluster_bootstrap(values, np.ones(200), resamples=20_000)
    reach = 1.972 * values.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.01)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.integers(0, 5))
def test_cluster_bootstrap_p_and_interval_agree(sums: list[int], seed: int) -> None:
    found = cluster_bootstrap(sums, [4] * len(sums), seed=seed, resamples=200)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert found == cluster_bootstrap(sums, [4] * len(sums), seed=seed, resamples=200)


def test_cluster_bootstrap_without_any_difference_or_spread() -> None:
    found = cluster_bootstrap([0] * 50, [10] * 50)
    assert (found.mean, found.p) == (0.0, 1.0)
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 50))
    assert cluster_bootstrap([1] * 5, [1] * 5).low == 0.0  # five of five the same way: 2 of 32 by chance
    assert cluster_bootstrap([1] * 6, [1] * 6).low == 1.0
    with pytest.raises(ValueError, match="at least 2"):
        cluster_bootstrap([3], [10])


def test_a_percentile_needs_its_calls() -> None:
    assert (smallest_sample(0.9), smallest_sample(0.99), smallest_sample(0.5)) == (36, 368, 6)
    assert percentile(range(35), 0.9) is None
    assert percentile(range(36), 0.9) is not None
    with pytest.raises(ValueError, match=r"0\.5 <= p < 1"):
        percentile(range(100), 0.1)


@pytest.mark.parametrize("n", [36, 37, 50, 120])
def test_percentile_interval_is_the_tightest_with_a_fortieth_on_either_side(n: int) -> None:
    found = percentile([float(i) for i in reversed(range(n))], 0.9)
    assert found is not None
    below = [at_most(k, n, Fraction(9, 10)) for k in range(n)]
    assert found.low == max(k for k in range(n) if below[k] <= Fraction(1, 40))
    assert found.high == min(k for k in range(n) if below[k] >= Fraction(39, 40))
    assert found.value == -(-9 * n // 10) - 1  # nearest rank, counted from 1


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3, 4, 5]) == 1.0
    assert kendall_tau([5, 4, 3, 2, 1]) == -1.0
    assert kendall_tau([2, 1, 3, 4, 5]) == pytest.approx(0.8)  # one of ten pairs is turned: (9 - 1)/10
    assert kendall_tau([7, 7, 7]) == 0.0
    trends = [abs(kendall_tau(order)) >= 0.8 for order in itertools.permutations(range(5))]
    assert sum(trends) == 10  # 1 + 4 orders a side, of 120: the chance to go on warming up without need


def test_ratio_over_processes_by_hand() -> None:
    found = ratio_over_processes([[2.0, 1.0, 4.0], [8.0], [4.0, 4.0]])  # values 2, 8, 4; their logs ln 2 apart
    assert found.ratio == pytest.approx(4.0)
    assert (found.df, found.processes) == (2, 3)
    reach = 4.302653 * math.log(2) / math.sqrt(3)  # t of 2 degrees of freedom
    assert found.interval() == pytest.approx((4 * math.exp(-reach), 4 * math.exp(reach)), rel=1e-5)


def test_one_process_has_the_spread_of_its_rounds_and_one_round_has_none() -> None:
    found = ratio_over_processes([[1.0, 2.0, 4.0]])
    assert (found.ratio, found.processes, found.df) == (pytest.approx(2.0), 1, 2)
    assert found.variance == pytest.approx(math.pi / 2 * math.log(2) ** 2 / 3)
    assert ratio_over_processes([[3.0]]).interval() is None


@pytest.mark.parametrize("rounds", [[], [[]], [[1.0], [0.0]]])
def test_ratio_refuses_nothing_and_no_time(rounds: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one round"):
        ratio_over_processes(rounds)


@pytest.mark.parametrize("processes", [3, 5])
def test_intervals_over_processes_cover_also_when_chained(processes: int) -> None:
    """Ratios that vary by 1.4 % from process to process, as measured; chained to a baseline of its own three."""
    random = np.random.default_rng(processes)
    single = chained = 0
    for _ in range(1000):
        ratio = ratio_over_processes([[r] for r in 3.0 * np.exp(random.normal(0, 0.014, processes))])
        baseline = ratio_over_processes([[r] for r in 0.5 * np.exp(random.normal(0, 0.010, 3))])
        low, high = ratio.interval() or (0.0, 0.0)
        single += low <= 3.0 <= high
        low, high = chain(ratio, baseline).interval() or (0.0, 0.0)
        chained += low <= 1.5 <= high
    assert 0.93 <= single / 1000 <= 0.97
    assert 0.93 <= chained / 1000 <= 0.985


def test_chain_adds_logs_and_variances() -> None:
    a, b = LogRatio(math.log(3), 0.0004, 2, 3), LogRatio(math.log(0.5), 0.0001, 4, 5)
    found = chain(a, b)
    assert found.ratio == pytest.approx(1.5)
    assert (found.variance, found.processes) == (pytest.approx(0.0005), 3)
    assert found.df == pytest.approx(0.0005**2 / (0.0004**2 / 2 + 0.0001**2 / 4))
    assert chain(a, EXACTLY_ONE) == a
    assert chain(EXACTLY_ONE, EXACTLY_ONE).interval() == (1.0, 1.0)
    assert chain(a, LogRatio(0.0, None, 0, 1)).interval() is None


# --- jackknife -------------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(1).normal(0.3, 1.0, 40)
    without = [np.delete(values, i).mean() for i in range(40)]
    found = jackknife(values.mean(), without, np.ones(40))
    half = stats.t.ppf(0.975, 39) * values.std(ddof=1) / math.sqrt(40)
    assert (found.low, found.high) == (pytest.approx(values.mean() - half), pytest.approx(values.mean() + half))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_blocks_of_unequal_size_count_by_their_examples():
    """Of a mean: variance = 1/g sum (block mean - mean)^2 / (n/m - 1), Busing et al. 1999, equation 4."""
    sizes = np.array([5, 10, 20, 15])
    values = np.random.default_rng(2).normal(size=50)
    groups = np.repeat(np.arange(4), sizes)
    without = [values[groups != block].mean() for block in range(4)]
    found = jackknife(values.mean(), without, sizes)
    means = np.array([values[groups == block].mean() for block in range(4)])
    deviation = math.sqrt(((means - values.mean()) ** 2 / (50 / sizes - 1)).mean())
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 3) * deviation)


def test_the_jackknife_covers_a_ratio_as_often_as_it_says():
    """A ratio of means is no mean: 1000 samples, true value 2."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        a, b = random.normal(2, 0.5, 30), random.normal(1, 0.1, 30)
        without = [np.delete(a, i).mean() / np.delete(b, i).mean() for i in range(30)]
        found = jackknife(a.mean() / b.mean(), without, np.ones(30))
        covered += found.low <= 2 <= found.high
    assert 930 <= covered <= 970


def test_a_jackknife_without_spread():
    assert jackknife(0.0, [0.0, 0.0], [1, 1]) == Jackknife(0.0, 0.0, 0.0, 1.0)
    assert jackknife(2.0, [2.0, 2.0], [1, 1]) == Jackknife(2.0, 2.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="one unit has no spread: an interval over units needs at least 2"):
        jackknife(1.0, [1.0], [3])
