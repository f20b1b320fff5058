"""Tests and intervals: pure functions of numbers, 95 % unless told otherwise.

Which one a number gets is decided by its sample: examples (exact McNemar, Clopper-Pearson), units that hold several
examples (cluster bootstrap; the jackknife where the number is no mean), processes (Student's t on log ratios), single
calls (order statistics).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.05  # of a test; below it a difference is significant
CONFIDENCE = 0.95
FEW_UNITS = 20  # below it an interval over units is labelled: resampling so few says little about their tails
RESAMPLES = 4000
PERCENTILE_MISS = 0.025  # chance that no call of a sample lies above the percentile


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: p of a split at least this uneven among the discordant pairs (McNemar 1947)."""
    discordant = lost + gained
    return min(1.0, 2.0 * float(_special().bdtr(min(lost, gained), discordant, 0.5))) if discordant else 1.0


def clopper_pearson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson 1934). Raises ValueError unless 0 <= count <= total, total > 0."""
    if not 0 <= count <= total or total <= 0:
        raise ValueError(f"{count} of {total} is not a share")
    tail = (1.0 - confidence) / 2.0
    quantile = _special().betaincinv
    low = float(quantile(count, total - count + 1, tail)) if count else 0.0
    high = float(quantile(count + 1, total - count, 1.0 - tail)) if count < total else 1.0
    return low, high


def paired_interval(lost: int, gained: int, total: int) -> tuple[float, float]:
    """Interval of the paired difference (lost - gained)/total that holds 0 exactly when `mcnemar_p` is at least 0.05.

    The Clopper-Pearson limits of both shares, combined as in MOVER (Zou and Donner 2008). Clopper-Pearson of the
    discordant pairs alone, scaled by their share, would take their number as known: with none of them gained it ends
    at the estimate itself and covers half of the time. Where the two disagree about 0 the exact test has the last word.
    """
    low_lost, high_lost = clopper_pearson(lost, total)
    low_gained, high_gained = clopper_pearson(gained, total)
    a, b = lost / total, gained / total
    low = a - b - math.hypot(a - low_lost, high_gained - b)
    high = a - b + math.hypot(high_lost - a, b - low_gained)
    if mcnemar_p(lost, gained) >= LEVEL:
        return min(low, 0.0), max(high, 0.0)
    share_low, share_high = clopper_pearson(lost, lost + gained)
    scale = (lost + gained) / total
    if lost > gained:
        return (low if low > 0.0 else (2.0 * share_low - 1.0) * scale), high
    return low, (high if high < 0.0 else (2.0 * share_high - 1.0) * scale)


@dataclass(frozen=True)
class Bootstrap:
    """A mean over units, its interval, and the two-sided p of "it is zero": below 0.05 exactly when 0 lies outside."""

    mean: float
    low: float
    high: float
    p: float


def cluster_bootstrap(sums: Any, counts: Any, *, seed: int = 0, resamples: int = RESAMPLES) -> Bootstrap:
    """Resample units: `sums` of the quantity and `counts` of examples in each; the mean is sum(sums)/sum(counts).

    Expanded percentile interval (Hesterberg 2015, section 4.2: percentiles widened by t and n-1, which a plain
    percentile interval of few units lacks). Sums that are all zero leave nothing to resample: the interval is then the
    exact one of a share of which none was seen in as many units.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    units = len(values)
    mean = float(values.sum() / weights.sum())
    if not values.any():
        bound = clopper_pearson(0, units)[1]
        return Bootstrap(mean, -bound, bound, 1.0)
    if units == 1:
        raise ValueError("one unit has no spread: an interval over units needs at least 2")
    draws = _resampled_means(values, weights, seed, resamples)
    special = _special()
    widening = math.sqrt(units / (units - 1))
    tail = float(special.ndtr(widening * special.stdtrit(units - 1, (1.0 - CONFIDENCE) / 2.0)))
    low, high = (float(end) for end in np.quantile(draws, (tail, 1.0 - tail)))
    share = max(min(float((draws <= 0.0).mean()), float((draws >= 0.0).mean())), 0.5 / resamples)
    p = min(1.0, 2.0 * float(special.stdtr(units - 1, special.ndtri(share) / widening)))
    if mcnemar_p(units, 0) >= LEVEL:  # so few units have the same sign by chance: no resampling can tell
        low, high = min(low, 0.0), max(high, 0.0)
    return Bootstrap(mean, low, high, _on_the_side_of(low, high, p))


def _on_the_side_of(low: float, high: float, p: float) -> float:
    """p below the level exactly when the interval leaves 0 out: interpolation and rounding may separate the two."""
    return min(p, math.nextafter(LEVEL, 0.0)) if low > 0.0 or high < 0.0 else max(p, LEVEL)


def _resampled_means(values: Any, weights: Any, seed: int, resamples: int) -> Any:
    """Means of `resamples` draws of the units with replacement, a slice at a time to bound the memory."""
    generator = np.random.default_rng(seed)
    units = len(values)
    draws = []
    step = max(1, 4_000_000 // units)
    for start in range(0, resamples, step):
        picks = generator.integers(0, units, size=(min(step, resamples - start), units))
        draws.append(values[picks].sum(axis=1) / weights[picks].sum(axis=1))
    return np.concatenate(draws)


@dataclass(frozen=True)
class Jackknife:
    """An estimate, its interval, and the two-sided p of "it is zero": below 0.05 exactly when 0 lies outside."""

    estimate: float
    low: float
    high: float
    p: float


def jackknife(estimate: float, without: Any, sizes: Any) -> Jackknife:
    """Leave out one block after another: `without` holds the estimate without each block, `sizes` its examples.

    For any smooth function of the examples, here of their means and covariances. Blocks may differ in size (Busing,
    Meijer and van der Leeden 1999); Student's t with one degree of freedom less than there are blocks. Raises
    ValueError for fewer than two blocks.
    """
    left_out, counts = np.asarray(without, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    blocks = len(left_out)
    if blocks < 2:
        raise ValueError("one unit has no spread: an interval over units needs at least 2")
    inverse_shares = counts.sum() / counts
    pseudo = inverse_shares * estimate - (inverse_shares - 1.0) * left_out  # of a mean: the block's own mean
    centre = (pseudo / inverse_shares).sum()
    deviation = math.sqrt(((pseudo - centre) ** 2 / (inverse_shares - 1.0)).mean())
    special = _special()
    reach = float(special.stdtrit(blocks - 1, 0.5 + CONFIDENCE / 2.0)) * deviation
    low, high = estimate - reach, estimate + reach
    distance = abs(estimate) / deviation if deviation else math.inf if estimate else 0.0
    p = 2.0 * float(special.stdtr(blocks - 1, -distance))
    return Jackknife(estimate, low, high, _on_the_side_of(low, high, p))


def smallest_sample(p: float) -> int:
    """How many calls a percentile p needs: the largest of fewer would too often lie below it (p90: 36, p99: 368)."""
    return math.ceil(math.log(PERCENTILE_MISS) / math.log(p))


@dataclass(frozen=True)
class Percentile:
    """A percentile (nearest rank) with its distribution-free interval between two order statistics."""

    value: float
    low: float
    high: float


def percentile(values: Sequence[float], p: float) -> Percentile | None:
    """The percentile p (0.5 <= p < 1), or None when there are fewer than `smallest_sample(p)` values."""
    if not 0.5 <= p < 1.0:
        raise ValueError(f"percentile {p}: 0.5 <= p < 1")
    n = len(values)
    if n < smallest_sample(p):
        return None
    ordered = sorted(values)
    below = _special().bdtr(np.arange(n), n, p)  # P(at most k values lie below the percentile), k = 0 ... n-1
    tail = (1.0 - CONFIDENCE) / 2.0
    low = int(np.searchsorted(below, tail, side="right")) - 1  # largest index whose value is low enough
    high = int(np.searchsorted(below, 1.0 - tail, side="left"))
    return Percentile(ordered[math.ceil(p * n - 1e-9) - 1], ordered[low], ordered[high])


def kendall_tau(values: Sequence[float]) -> float:
    """Kendall's tau of values against their order: 1 rising, -1 falling, 0 no trend; ties count as neither."""
    n = len(values)
    pairs = [(values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n)]
    return sum(pairs) / len(pairs) if pairs else 0.0


@dataclass(frozen=True)
class LogRatio:
    """An estimate of the natural log of a ratio: its mean, that mean's variance (None unknown) and degrees of freedom.

    `processes` is the size of the sample. From one process alone the variance is that between its rounds, which is too
    small: it does not see what differs from process to process.
    """

    mean: float
    variance: float | None
    df: float
    processes: int

    @property
    def ratio(self) -> float:
        """The ratio itself (a geometric mean)."""
        return math.exp(self.mean)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Student's t interval of the ratio, None where the spread is not known."""
        if self.variance is None:
            return None
        reach = float(_special().stdtrit(self.df, 0.5 + confidence / 2.0)) * math.sqrt(self.variance)
        return math.exp(self.mean - reach), math.exp(self.mean + reach)

    def inverse(self) -> LogRatio:
        """The reciprocal."""
        return LogRatio(-self.mean, self.variance, self.df, self.processes)


EXACTLY_ONE = LogRatio(0.0, 0.0, 1.0, 0)


def ratio_over_processes(rounds: Sequence[Sequence[float]]) -> LogRatio:
    """The ratio from the block ratios of each process: the value of a process is the median of its rounds.

    Raises ValueError when a process has no round or a ratio is not positive.
    """
    if not rounds or not all(rounds) or min(min(one) for one in rounds) <= 0.0:
        raise ValueError("every process needs at least one round with positive ratios")
    values = [statistics.median(math.log(ratio) for ratio in one) for one in rounds]
    n = len(values)
    if n > 1:
        return LogRatio(statistics.mean(values), statistics.variance(values) / n, n - 1, n)
    logs = [math.log(ratio) for ratio in rounds[0]]
    # A median scatters more than a mean: its variance is pi/2 times as large (normal rounds).
    spread = math.pi / 2.0 * statistics.variance(logs) / len(logs) if len(logs) > 1 else None
    return LogRatio(values[0], spread, len(logs) - 1, 1)


def chain(a: LogRatio, b: LogRatio) -> LogRatio:
    """The product of two independent ratios: logs and variances add, degrees of freedom by Welch and Satterthwaite."""
    counts = [ratio.processes for ratio in (a, b) if ratio.processes]
    processes = min(counts, default=0)
    if a.variance is None or b.variance is None:
        return LogRatio(a.mean + b.mean, None, 0.0, processes)
    total = a.variance + b.variance
    parts = [ratio.variance**2 / ratio.df for ratio in (a, b) if ratio.variance]
    df = total**2 / sum(parts) if parts else min(a.df, b.df)
    return LogRatio(a.mean + b.mean, total, df, processes)


def _special() -> Any:
    """scipy's distribution functions, imported when first needed: 0.1 s that a table need not wait for."""
    from scipy import special  # type: ignore[import-untyped]

    return special
