"""From intervals to words: what the cells of a sweep say about a claim. Pure functions of records.

The records hold each recipe's drop against fp32 with its 95 % interval, not its outputs, so two recipes are compared
as in `qbench.comparison.differ`: the interval of their difference goes from the lower end of one less the upper end of
the other. However the two are correlated it is wider than 95 %, never narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qbench import comparison as compare
from qbench.record import Record

HOLDS = "holds"
WEAKLY = "holds weakly"
FAILS = "does not hold here"
OPEN = "not significant"
UNTESTED = "not testable here"
WORDS = (HOLDS, WEAKLY, OPEN, FAILS, UNTESTED)

SMALL = 0.01  # of the fp32 score: MLPerf's inference rules ask int8 networks to keep 99 % of it
MARGIN_DB = 1.0  # SQNR comes without an interval: smaller differences are none


@dataclass(frozen=True)
class Difference:
    """A difference of scores in the task's unit, with an interval of at least 95 %."""

    value: float
    low: float
    high: float

    def __sub__(self, other: Difference) -> Difference:
        return Difference(self.value - other.value, self.low - other.high, self.high - other.low)

    def scaled(self, factor: float) -> Difference:
        """In another unit; `factor` is positive."""
        return Difference(self.value * factor, self.low * factor, self.high * factor)


def drop(record: Record) -> Difference | None:
    """How much worse than fp32 the score is; None without an interval."""
    ends = compare.interval(record)
    return None if ends is None else Difference(compare.drop(record), *ends)


def gain(one: Record, other: Record) -> Difference | None:
    """By how much the score of `one` is better than that of `other`; None where a drop has no interval."""
    a, b = drop(one), drop(other)
    return None if a is None or b is None else b - a


def sqnr_gain(one: Record, other: Record) -> float | None:
    """By how many dB the outputs of `one` are closer to those of fp32; None where SQNR has no value."""
    a, b = one.metrics.get("sqnr_db"), other.metrics.get("sqnr_db")
    return None if a is None or b is None else a - b


def small(record: Record) -> float:
    """The largest difference of the task's score that counts as small, in its unit."""
    return SMALL * abs(record.metrics["score_fp32"])


def relative(record: Record) -> float:
    """The factor from a difference of the task's score to percent of the fp32 score: one axis for all tasks."""
    return 100.0 / (abs(record.metrics["score_fp32"]) or 1.0)


def better(difference: Difference | None, decibels: float | None) -> str:
    """Is a gain above zero? Where its interval does not tell, a gain in SQNR beyond the margin says it weakly."""
    if difference is None:
        return UNTESTED
    if difference.low > 0.0:
        return HOLDS
    if difference.high < 0.0:
        return FAILS
    return WEAKLY if decibels is not None and decibels >= MARGIN_DB else OPEN


def at_most(cost: Difference | None, limit: float) -> str:
    """Is a cost below a limit? `holds weakly`: the estimate is, the interval reaches beyond."""
    if cost is None:
        return UNTESTED
    if cost.high < limit:
        return HOLDS
    if cost.low > limit:
        return FAILS
    return WEAKLY if cost.value < limit else OPEN


def no_gain(difference: Difference | None, limit: float, decibels: float | None) -> str:
    """Does a change gain nothing? A significant gain refutes it, however small; else it has to stay below the limit.

    A gain in SQNR beyond the margin leaves `holds weakly`, whatever the score.
    """
    if difference is not None and difference.low > 0.0:
        return FAILS
    word = at_most(difference, limit)
    return WEAKLY if word == HOLDS and decibels is not None and decibels >= MARGIN_DB else word


def share(value: float | None, goal: float, weak: float) -> str:
    """Is a number without error (bytes, say) at most `goal`, or at least at most `weak`?"""
    if value is None:
        return UNTESTED
    return HOLDS if value <= goal else WEAKLY if value <= weak else FAILS


def together(words: Sequence[str]) -> str:
    """One word for all rows: `holds` only where every row that could be tested holds."""
    tested = [word for word in words if word != UNTESTED]
    support = sum(word in (HOLDS, WEAKLY) for word in tested)
    against = tested.count(FAILS)
    if not tested:
        return UNTESTED
    if all(word == HOLDS for word in tested):
        return HOLDS
    if against and against >= support:
        return FAILS
    return WEAKLY if support else OPEN


def with_sqnr(words: Sequence[str], decibels: Sequence[float | None]) -> str:
    """As `together`, but what every row's SQNR says by more than the margin, and no score contradicts, holds."""
    known = [value for value in decibels if value is not None]
    agreed = len(known) == len(decibels) > 1 and min(known) >= MARGIN_DB
    return HOLDS if agreed and FAILS not in words else together(words)
