"""What a claim is made of: a statement, the rows of cells that test it, and how their numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.columns import difference_unit, score
from qbench.record import Record
from qbench.textbook.selection import Selection
from qbench.textbook.verdicts import SMALL, Difference, small, together

LIMIT = f"{100 * SMALL:g} % of the fp32 score"


@dataclass(frozen=True)
class Row:
    """One line of a claim's table: its texts, the verdict on it alone, the cells that its numbers come from.

    `decibels` is the gain in SQNR, where the row has one.
    """

    texts: tuple[str, ...]
    word: str
    cells: tuple[Record, ...]
    decibels: float | None = None


@dataclass(frozen=True)
class Question:
    """What a claim is tested on: the cells, the folder that holds their files, and which tasks are depthwise."""

    cells: Selection
    results: Path
    depthwise: Sequence[str] = ()


def all_rows(rows: Sequence[Row]) -> str:
    """The verdict on a claim from those on its rows."""
    return together([row.word for row in rows])


@dataclass(frozen=True)
class Claim:
    """A statement of the textbook, in our own words, and how it is tested.

    `section` is the textbook's; `rule` says how the verdict on a row follows from its numbers; `head` names the columns
    of the texts; `verdict` joins the rows. `figures` are the network's own pictures (artifacts of a cell) that show it.
    """

    title: str
    section: str
    statement: str
    rule: str
    head: tuple[str, ...]
    rows: Callable[[Question], list[Row]]
    verdict: Callable[[Sequence[Row]], str] = all_rows
    figures: tuple[str, ...] = ()


def present(cells: Iterable[Record | None]) -> list[Record]:
    """Without those that were not swept."""
    return [cell for cell in cells if cell is not None]


def in_unit(record: Record, difference: Difference | None) -> str:
    """`+0.12 (-0.05 to +0.29) points`: a difference of the task's score with its interval."""
    if difference is None:
        return ""
    value, low, high = (score(record, end, "+") for end in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high}) {difference_unit(record)}".rstrip()


def interval(difference: Difference, form: str) -> str:
    """A difference with its interval in a number format."""
    value, low, high = (format(end, form) for end in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high})"


def limit(record: Record) -> str:
    """What counts as small, in the unit of the task's score."""
    return f"{score(record, small(record))} {difference_unit(record)}".rstrip()


def optional(value: float | None, form: str, factor: float = 1.0) -> str:
    """A number that may be absent."""
    return "" if value is None else format(value * factor, form)
