"""Did a cell become slower? The sample is the fresh process; docs/gate/study.md tests these rules on recorded ones.

A process' value is the natural log of its speed-up over fp32. The change is the difference of two means of such
values, or the mean of their differences where two sides were measured in turns; positive is slower. Its interval is
Welch's (1947), or Student's on the pairs; the tests of one run are corrected together (Holm 1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qbench.statistics import CONFIDENCE, LEVEL

Name = TypeVar("Name")

DELTA = math.log(1.02)  # the smallest change that matters, where both sides are measured in turns
DRIFT = math.log(1.08)  # against a stored baseline: less than this a machine's speed changes by itself
LEAST = 5  # processes a side; a measurement may ask for more


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


def change(before: Sequence[float], now: Sequence[float]) -> SpeedChange:
    """From the values of the processes of two runs. Raises ValueError for fewer than two processes on a side."""
    if min(len(before), len(now)) < 2:
        raise ValueError(f"{len(before)} and {len(now)} processes: two a side at least")
    parts = [statistics.variance(side) / len(side) for side in (before, now)]
    total = sum(parts)
    squares = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (before, now), strict=True))
    df = total**2 / squares if squares else float(len(before) + len(now) - 2)
    return SpeedChange(statistics.mean(before) - statistics.mean(now), math.sqrt(total), df)


def paired_change(before: Sequence[float], now: Sequence[float]) -> SpeedChange:
    """From processes of two sides that were measured in turns, the first with the first: what drifts reaches both.

    Raises ValueError for fewer than two pairs, or a process without its partner.
    """
    if len(before) != len(now) or len(now) < 2:
        raise ValueError(f"{len(before)} and {len(now)} processes: as many a side, two at least")
    differences = [a - b for a, b in zip(before, now, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return SpeedChange(statistics.mean(differences), error, len(differences) - 1.0)


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
