"""What a gate says: one word a metric, with the sentence that says by how much, how sure, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

OK, BETTER, WORSE, CHANGED = "ok", "better", "worse", "changed"
NOT_SIGNIFICANT, INCONCLUSIVE, DISTURBED = "not significant", "inconclusive", "disturbed"
MISSING, VANISHED, ORPHAN, STALE = "missing baseline", "vanished metric", "orphan baseline", "stale"
FOREIGN, LIMIT, FAILED = "foreign machine", "beyond limit", "failed"
# The worst first: what a cell is called when its metrics differ.
WORDS = (
    FAILED, MISSING, STALE, VANISHED, WORSE, LIMIT, CHANGED, INCONCLUSIVE, DISTURBED, FOREIGN, ORPHAN,
    BETTER, NOT_SIGNIFICANT, OK,
)  # fmt: skip
RED = frozenset((FAILED, MISSING, STALE, VANISHED, WORSE, LIMIT, CHANGED))
DOUBTFUL = frozenset((INCONCLUSIVE, DISTURBED, FOREIGN, ORPHAN))  # a warning; red when strict


@dataclass(frozen=True)
class Verdict:
    """What is said of one metric of a cell, numbers in the unit of the record; those of a change of speed in percent.

    `low` and `high` are the interval of `difference`; of an absolute limit that of `now`.
    """

    metric: str
    word: str
    sentence: str
    before: float | None = None
    now: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def red(self, strict: bool = False) -> bool:
        """Does it fail the test?"""
        return self.word in RED or (strict and self.word in DOUBTFUL)


@dataclass(frozen=True)
class Outcome:
    """A cell of a gate run: its verdicts, the command that reproduces it, and where what it measured lies.

    `beside`: it was compared with a revision, not with a baseline that could be replaced.
    """

    name: str
    verdicts: list[Verdict]
    command: str = ""
    folder: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    beside: bool = False

    @property
    def word(self) -> str:
        """The worst of its verdicts."""
        return min((verdict.word for verdict in self.verdicts), key=WORDS.index, default=OK)

    def red(self, strict: bool = False) -> list[Verdict]:
        """The verdicts that fail the test."""
        return [verdict for verdict in self.verdicts if verdict.red(strict)]
