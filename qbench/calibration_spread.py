"""results/calibration.md: how much the score depends on which examples calibrate, from the records of a sweep.

Cells that differ in nothing but `calibration_seed` are draws of the same thing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qbench import comparison as compare
from qbench.columns import difference_unit, score, score_name, score_unit
from qbench.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, save
from qbench.record import Record, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, FIGURE = "calibration.md", "calibration.png"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
HEAD = ("observer", "examples", "draws", "mean", "lowest", "highest", "sd", "mean", "lowest", "highest", "sd")
INTRODUCTION = (
    "Each cell calibrates ptsq (a scale each channel, symmetric weights) on other examples, drawn without replacement "
    "from the task's training examples; the network and the evaluation examples stay the same. So what differs between "
    "the draws of a row comes from calibration alone. sd: standard deviation between draws.\n\n"
    "`python -m qbench +sweep=calibration` runs the cells that are missing and writes this page again."
)


@dataclass(frozen=True)
class Draws:
    """The cells of one task, observer and number of examples, which differ in their draw only."""

    task: str
    observer: str
    samples: int
    cells: list[Record]

    def values(self, metric: str) -> list[float]:
        """The metric of each draw that has it."""
        return [cell.metrics[metric] for cell in self.cells if metric in cell.metrics]


def page(records: Sequence[Record], results: Path) -> list[Path]:
    """Write results/calibration.md and its figure; returns both, the page first."""
    groups = grouped(records)
    tasks = list(dict.fromkeys(group.task for group in groups))
    text = ["# How much the score depends on the calibration examples", "", INTRODUCTION, ""]
    files = [results / PAGE]
    if groups:
        spread_figure(groups, results / FIGURE)
        files.append(results / FIGURE)
        text += [f"![spread over draws]({FIGURE})", ""]
    for task in tasks:
        text += _section(task, [group for group in groups if group.task == task])
    write_atomic(results / PAGE, "\n".join(text if groups else [*text, "No cells with a calibration_seed.", ""]))
    return files


def grouped(records: Sequence[Record]) -> list[Draws]:
    """Draws of the same thing together, in the order in which they first appear."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        recipe = record.details.get("recipe", {})
        samples, seed = recipe.get("calibration_samples"), recipe.get("calibration_seed")
        if record.status == "ok" and samples is not None and seed is not None:
            groups.setdefault((record.task, str(record.observer), samples), []).append(record)
    return [Draws(*name, cells) for name, cells in groups.items()]


def _section(task: str, groups: Sequence[Draws]) -> list[str]:
    first = groups[0].cells[0]
    unit = score_unit(first)[1]
    head = [*HEAD[:3], *(f"{name} {unit}".strip() for name in HEAD[3:6]), f"sd {difference_unit(first)}".strip()]
    head += [f"SQNR {name}" for name in HEAD[7:10]] + ["SQNR sd, dB"]
    lines = [f"## {task}: {score_name(first)} on {first.metrics['examples']:.0f} examples", "", _widest(groups), ""]
    lines += [_row(head), _row([":--", *["--:"] * (len(head) - 1)])]
    return [*lines, *(_row(_numbers(group)) for group in groups), ""]


def _numbers(group: Draws) -> list[str]:
    cell, scores, noise = group.cells[0], group.values("score"), group.values("sqnr_db")
    shown = [score(cell, value) for value in (statistics.mean(scores), min(scores), max(scores), _deviation(scores))]
    decibels = (
        [f"{v:.1f}" for v in (statistics.mean(noise), min(noise), max(noise), _deviation(noise))] if noise else []
    )
    return [group.observer, str(group.samples), str(len(group.cells)), *shown, *(decibels or [""] * 4)]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _widest(groups: Sequence[Draws]) -> str:
    """The largest spread, beside what a single cell's interval says."""
    widest = max(groups, key=lambda group: _deviation(group.values("score")))
    cell, unit = widest.cells[0], difference_unit(widest.cells[0])
    said = f"{score(cell, _deviation(widest.values('score')))} {unit}".rstrip()
    halves = [(ends[1] - ends[0]) / 2 for one in widest.cells if (ends := compare.interval(one)) is not None]
    text = f"Largest standard deviation: {said} ({widest.observer}, {widest.samples} examples)."
    if halves:
        half = f"{score(cell, statistics.mean(halves))} {unit}".rstrip()
        text += f" The interval of one such cell's drop, over evaluation examples, reaches {half} to each side."
    return text


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def spread_figure(groups: Sequence[Draws], path: Path) -> None:
    """Score and SQNR of every draw over the number of examples, a colour an observer, a column a task."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    observers = list(dict.fromkeys(group.observer for group in groups))
    figure = new_figure(5.2 * len(tasks) + 0.6, 6.4)
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, task in zip(axes.T, tasks, strict=True):
        own = [group for group in groups if group.task == task]
        factor, unit = score_unit(own[0].cells[0])
        column[0].axhline(factor * own[0].cells[0].metrics["score_fp32"], color=GREY, linestyle="--", label="fp32")
        _panel(column[0], own, observers, "score", factor)
        _panel(column[1], own, observers, "sqnr_db", 1.0)
        column[0].set_title(task)
        column[0].set_ylabel(f"{score_name(own[0].cells[0])} {unit}".strip())
        column[1].set_ylabel("SQNR, dB")
        column[1].set_xlabel("calibration examples")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    save(figure, path)


def _panel(ax: Axes, groups: Sequence[Draws], observers: Sequence[str], metric: str, factor: float) -> None:
    """A dot a draw, the means joined by a line; observers side by side, so that they do not cover each other."""
    sizes = sorted({group.samples for group in groups})
    for number, observer in enumerate(observers):
        own = {group.samples: group.values(metric) for group in groups if group.observer == observer}
        shift = 0.12 * (number - (len(observers) - 1) / 2)
        places, means = [], []
        for place, size in enumerate(sizes):
            if values := [factor * value for value in own.get(size, [])]:
                colour = COLOURS[number % len(COLOURS)]
                ax.plot([place + shift] * len(values), values, "o", color=colour, markersize=5, alpha=0.6)
                places.append(place + shift)
                means.append(statistics.mean(values))
        ax.plot(places, means, "-", color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=observer)
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
