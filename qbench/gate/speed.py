"""Did a cell become slower? The sample is the fresh process; docs/gate/study.md tests these rules on recorded ones.

A process' value is the natural log of fp32's time over the cell's, each from its fastest blocks (what else runs on a
machine only slows down; Chen and Revels 2016). The change is the difference of two means of such values,
or the mean of their differences where two sides were measured in turns, at equal times of fp32 (analysis of covariance,
Fisher 1932): what slows a machine down slows fp32 and int8 by different shares, and that time tells in which state a
process found the machine. Positive is slower. The tests of one run are corrected together (Holm 1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qbench.statistics import CONFIDENCE

Name = TypeVar("Name")

DELTA = math.log(1.02)  # the smallest change that matters, where it can be measured in turns
DRIFT = math.log(1.08)  # against a stored baseline alone: less than this a machine's speed changes by itself
LEVEL = 0.03  # the chance of a false alarm among a run's tests, which have to agree with the first measurement too
LEAST = 5  # processes a side; a measurement may ask for more
SLOPED = 5  # pairs from which their slope is taken


@dataclass(frozen=True)
class SpeedChange:
    """The change of a log speed-up: positive is slower, in natural logs. `error` is its standard error."""

    estimate: float
    error: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided p of "nothing changed"."""
        if self.error == 0.0:
            return 1.0 if self.estimate == 0.0 else 0.0
        return 2.0 * float(_special().stdtr(self.df, -abs(self.estimate) / self.error))

    def reach(self, level: float = 1.0 - CONFIDENCE) -> float:
        """Half the width of the interval that leaves out `level`."""
        return float(_special().stdtrit(self.df, 1.0 - level / 2.0)) * self.error

    def percent(self, level: float = 1.0 - CONFIDENCE) -> tuple[float, float, float]:
        """How many percent slower, and the ends of the interval."""
        reach = self.reach(level)
        ends = self.estimate, self.estimate - reach, self.estimate + reach
        slower = [100.0 * math.expm1(value) for value in ends]
        return slower[0], slower[1], slower[2]


def change(
    before: Sequence[float], now: Sequence[float], before_fp32: Sequence[float], now_fp32: Sequence[float]
) -> SpeedChange:
    """From the values of the processes of two runs and the logs of fp32's time there.

    Both sides share the slope; where fp32 always took as long there is none. Raises ValueError for fewer than two
    processes on a side, or a value without its time.
    """
    if min(len(before), len(now)) < 2:
        raise ValueError(f"{len(before)} and {len(now)} processes: two a side at least")
    estimate = statistics.mean(before) - statistics.mean(now)
    shift = statistics.mean(before_fp32) - statistics.mean(now_fp32)
    share = 1.0 / len(before) + 1.0 / len(now)
    return _at_equal_times([before, now], [before_fp32, now_fp32], estimate, shift, share)


def paired_change(
    before: Sequence[float], now: Sequence[float], before_fp32: Sequence[float], now_fp32: Sequence[float]
) -> SpeedChange:
    """From processes of two sides that were measured in turns, the first with the first: what drifts reaches both.

    The differences are taken where fp32's do not differ, from SLOPED pairs on. Raises ValueError for fewer than two
    pairs, or a process without its partner or its time.
    """
    if len(before) != len(now) or len(now) < 2:
        raise ValueError(f"{len(before)} and {len(now)} processes: as many a side, two at least")
    differences = [a - b for a, b in zip(before, now, strict=True)]
    shifts = [a - b for a, b in zip(before_fp32, now_fp32, strict=True)]
    if len(differences) < SLOPED:
        shifts = [0.0] * len(differences)
    estimate, shift = statistics.mean(differences), statistics.mean(shifts)
    return _at_equal_times([differences], [shifts], estimate, shift, 1.0 / len(differences))


def _at_equal_times(
    values: Sequence[Sequence[float]],
    times: Sequence[Sequence[float]],
    estimate: float,
    shift: float,
    share: float,
) -> SpeedChange:
    """Least squares of values on times, a constant for each group and one slope: the estimate at a shift of 0.

    `estimate` and `shift` are the change of the values' and the times' means, `share` times the variance of a value is
    that of the estimate.
    """
    centred = [(_centred(ys), _centred(xs)) for ys, xs in zip(values, times, strict=True)]
    pairs = [pair for ys, xs in centred for pair in zip(ys, xs, strict=True)]
    squares = sum(x * x for _, x in pairs)
    slope = sum(x * y for y, x in pairs) / squares if squares else 0.0
    df = len(pairs) - len(values) - (1.0 if squares else 0.0)
    rest = sum((y - slope * x) ** 2 for y, x in pairs)
    share += shift * shift / squares if squares else 0.0
    return SpeedChange(estimate - slope * shift, math.sqrt(rest / df * share), df)


def _centred(values: Sequence[float]) -> list[float]:
    mean = statistics.mean(values)
    return [value - mean for value in values]


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """For each test the level that it has to reach: Holm's step-down, so that one false alarm in all has chance LEVEL.

    Tests after the first that misses its level get that one's level, so that `p < level` is the decision.
    """
    levels: dict[Name, float] = {}
    failed = None
    for passed, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        level = LEVEL / (len(p_values) - passed)
        if failed is None and p >= level:
            failed = level
        levels[name] = level if failed is None else failed
    return levels


def wide(change: SpeedChange, delta: float = DELTA) -> bool:
    """Is the 95 % interval still wider, to each side, than what matters? Sampling goes on until it is not."""
    return change.reach() > delta


def verdict(change: SpeedChange, level: float, delta: float = DELTA) -> str:
    """`worse` or `better` where significant at its level and larger than what matters.

    Else `inconclusive` (the interval is wider than what matters), `not significant` (a difference that matters, were it
    one) or `ok`.
    """
    if change.p < level and abs(change.estimate) > delta:
        return "worse" if change.estimate > 0 else "better"
    if wide(change, delta):
        return "inconclusive"
    return "ok" if abs(change.estimate) <= delta else "not significant"


def _special() -> Any:
    from scipy import special  # type: ignore[import-untyped]

    return special
