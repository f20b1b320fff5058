"""The columns of the tables: what stands in them, for the terminal and for summary.md alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from qbench import comparison as compare
from qbench.metrics import declared
from qbench.record import Record


@dataclass(frozen=True)
class Block:
    """The cells of one task, best first, with what is known of them together."""

    task: str
    done: list[Record]
    rest: list[Record]
    pareto: list[Record]
    best: dict[str, Record]
    shared: Container[str]

    def name(self, record: Record) -> str:
        """The recipe, without what all recipes of the table share."""
        return compare.recipe_text(record, self.shared)


def blocks(records: Iterable[Record]) -> list[Block]:
    """One block a task, in the order in which the tasks first appear."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    shared = compare.shared_axes(cell for cells in by_task.values() for cell in cells)
    return [_block(task, cells, shared) for task, cells in by_task.items()]


def _block(task: str, cells: list[Record], shared: Container[str]) -> Block:
    done = compare.by_score(r for r in cells if r.status == "ok")
    rest = [r for r in cells if r.status != "ok"]
    return Block(task, done, rest, compare.pareto(done), compare.best_per_method(done), shared)


@dataclass(frozen=True)
class Column:
    """A heading of two lines and what stands under it; `words` are left-aligned, numbers right-aligned.

    A table that is too wide loses the columns of the highest `spare` first; 0 never goes.
    """

    head: tuple[str, str]
    cell: Callable[[Block, Record], str]
    words: bool = False
    spare: int = 0


def marks(block: Block, record: Record) -> str:
    """`P`: on the Pareto front; `B`: the best of its method."""
    return "P" * (record in block.pareto) + "B" * (block.best.get(record.method) is record)


def score(record: Record, value: float, sign: str = "") -> str:
    """A value of the task's score as people read it: percent, points of a percent, or the metric's own unit."""
    declaration = declared(score_name(record))
    if declaration is None:
        return format(value, f"{sign}.4g")
    return format(value * declaration.factor, f"{sign}.{declaration.digits}f")


def score_unit(record: Record) -> tuple[float, str]:
    """Factor and unit in which the task's score is shown."""
    declaration = declared(score_name(record))
    if declaration is None:
        return 1.0, ""
    return declaration.factor, declaration.unit if declaration.shown_unit is None else declaration.shown_unit


def difference_unit(record: Record) -> str:
    """The unit of a difference of scores: points, where scores are percent."""
    unit = score_unit(record)[1]
    return "points" if unit == "%" else unit


def score_name(record: Record) -> str:
    """The name of the task's own score."""
    return str(record.details.get("metric", "score"))


def milliseconds(record: Record, name: str) -> str:
    """A latency to three digits; `~` marks one that is not a result."""
    value = record.metrics.get(name)
    return "" if value is None else ("" if compare.latency_counts(record) else "~") + three_digits(value)


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _value(name: str, form: str, factor: float = 1.0) -> Callable[[Block, Record], str]:
    def cell(_: Block, record: Record) -> str:
        value = compare.shown_metrics(record).get(name)
        return "" if value is None else format(value * factor, form)

    return cell


def _drop(_: Block, record: Record) -> str:
    value = record.metrics.get("score_drop")
    return "" if value is None or compare.is_baseline(record) else score(record, value, "+")


def _interval(_: Block, record: Record) -> str:
    ends = compare.interval(record)
    if ends is None or compare.is_baseline(record):
        return ""
    return "..".join(score(record, end, "+") for end in ends)


def _score(_: Block, record: Record) -> str:
    return score(record, record.metrics["score"]) if "score" in record.metrics else ""


def _megabytes(name: str) -> Callable[[Block, Record], str]:
    def cell(_: Block, record: Record) -> str:
        return three_digits(record.metrics[name] / 1e6) if name in record.metrics else ""

    return cell


def columns(block: Block) -> list[Column]:
    """The columns that hold something for this block (which has a finished cell), its baseline aside."""
    unit = score_unit(block.done[0])[1]
    points = difference_unit(block.done[0])
    batch = next((name for r in block.done for name in compare.batched(r, "latency_ms_median")), "latency_ms_median_b")
    suffix = batch.removeprefix("latency_ms_median")
    every = [
        Column(("", ""), marks, words=True),
        Column(("", "recipe"), lambda b, r: b.name(r), words=True),
        Column(("score", unit), _score),
        Column(("drop", points), _drop),
        Column(("95 %", "interval"), _interval, spare=1),
        Column(("against", "fp32"), lambda _, r: compare.significance(r), words=True),
        Column(("agree", "%"), _value("agreement", ".2f", 100), spare=2),
        Column(("SQNR", "dB"), _value("sqnr_db", ".1f")),
        Column(("PSNR", "dB"), _value("psnr_db", ".1f"), spare=2),
        Column(("size", "MB"), _megabytes("size_bytes")),
        Column(("of", "fp32"), _value("size_ratio", ".3f"), spare=4),
        Column(("b1", "ms"), lambda _, r: milliseconds(r, "latency_ms_median")),
        Column((suffix[1:], "ms"), lambda _, r: milliseconds(r, batch), spare=5),
        Column(("speed-", "up"), _value("speedup", ".2f")),
        Column((suffix[1:], ""), _value(f"speedup{suffix}", ".2f"), spare=6),
        Column(("peak", "MB"), _megabytes("peak_memory_bytes"), spare=3),
    ]
    telling = [r for r in block.done if not compare.is_baseline(r)] or block.done
    return [c for c in every if any(c.cell(block, record) for record in telling)]
