"""The two pictures of the textbook page: what each method costs, and what each choice about a tensor gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, save
from qbench.record import Record
from qbench.textbook.claims import LIMIT
from qbench.textbook.methods import INT8
from qbench.textbook.selection import Selection
from qbench.textbook.verdicts import MARGIN_DB, SMALL, drop, relative, sqnr_gain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(INT8, (BLUE, ORANGE, GREEN, PURPLE), strict=True))
TASK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
# What is compared, with the method that shows it: an axis, the choice that should gain, and the other.
CHOICES = (
    ("affine weights\nover symmetric", "woq", "scheme", "affine", "symmetric"),
    ("affine activations\nover symmetric", "ptsq", "activation_scheme", "affine", "symmetric"),
    ("scale each channel\nover one (woq)", "woq", "granularity", "per_channel", "per_tensor"),
    ("scale each channel\nover one (ptsq)", "ptsq", "granularity", "per_channel", "per_tensor"),
)


def write(cells: Selection, results: Path) -> dict[str, Path]:
    """Draw what the cells allow; each picture's caption with its path."""
    drawn = {}
    costs = {task: _drops(cells, task) for task in cells.tasks}
    if any(costs.values()):
        path = results / "textbook-drops.png"
        drops_figure(costs, path)
        drawn["What each method costs, with a scale each channel and symmetric weights:"] = path
    gains = {task: _gains(cells, task) for task in cells.tasks}
    if any(gains.values()):
        path = results / "textbook-choices.png"
        choices_figure(gains, path)
        drawn["What each choice about a tensor gains:"] = path
    return drawn


def _drops(cells: Selection, task: str) -> dict[str, Record]:
    found = {method: cells.cell(task, method) for method in INT8}
    return {method: cell for method, cell in found.items() if cell is not None and drop(cell) is not None}


def drops_figure(cells: Mapping[str, Mapping[str, Record]], path: Path) -> None:
    """Drops in percent of the fp32 score with their intervals, a row a method, all tasks on one axis."""
    rows = sum(len(methods) + 1 for methods in cells.values())
    figure = new_figure(8.0, 1.4 + 0.26 * rows)
    ax = figure.subplots()
    ax.axvspan(-100 * SMALL, 100 * SMALL, color=GREY, alpha=0.25, linewidth=0, label=f"small: within {LIMIT}")
    ax.axvline(0, color="black", linewidth=0.8)
    names: list[str] = []
    reach = [100 * SMALL]
    for task, methods in cells.items():
        for method, cell in methods.items():
            lost = drop(cell)
            assert lost is not None  # _drops keeps those with an interval
            lost = lost.scaled(relative(cell))
            ax.hlines(len(names), lost.low, lost.high, color=COLOURS[method], linewidth=2)
            ax.plot(lost.value, len(names), "o", color=COLOURS[method], markersize=6)
            names.append(f"{task}  {method}")
            reach += [abs(lost.low), abs(lost.high)]
        names.append("")
    _stretch(ax, reach)
    ax.set_yticks([row for row, name in enumerate(names) if name], [name for name in names if name])
    ax.set_ylim(len(names) - 1.4, -0.6)
    ax.set_xlabel("score drop, percent of the fp32 score; right is worse; with its paired 95 % interval")
    figure.legend(loc="outside lower right", fontsize=9)
    save(figure, path)


def _stretch(ax: Axes, reach: Sequence[float]) -> None:
    """One collapse must not flatten all others: a scale that is linear in the middle and logarithmic outside."""
    if max(reach) > 2000 * SMALL:
        ax.set_xscale("symlog", linthresh=200 * SMALL)


def _gains(cells: Selection, task: str) -> dict[str, float]:
    gains = {}
    for name, method, axis, one, other in CHOICES:
        pair = cells.cell(task, method, **{axis: one}), cells.cell(task, method, **{axis: other})
        if pair[0] is not None and pair[1] is not None and (gained := sqnr_gain(pair[0], pair[1])) is not None:
            gains[name] = gained
    return gains


def choices_figure(gains: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """SQNR that each choice gains over the other, a group a choice, a bar a task."""
    names = [name for name, *_ in CHOICES if any(name in own for own in gains.values())]
    figure = new_figure(max(5.0, 1.4 + 1.9 * len(names)), 4.2)
    ax = figure.subplots()
    ax.axhspan(
        -MARGIN_DB, MARGIN_DB, color=GREY, alpha=0.25, linewidth=0, label=f"within {MARGIN_DB:g} dB: no difference"
    )
    ax.axhline(0, color="black", linewidth=0.8)
    width = min(0.3, 0.8 / len(gains))
    for number, (task, own) in enumerate(gains.items()):
        places = [names.index(name) + (number - (len(gains) - 1) / 2) * width for name in own]
        bars = ax.bar(
            places, list(own.values()), 0.9 * width, label=task, color=TASK_COLOURS[number % len(TASK_COLOURS)]
        )
        ax.bar_label(bars, fmt="%+.1f", fontsize=8, padding=2)
    ax.margins(y=0.12)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("gain in SQNR of the outputs, dB")
    figure.legend(loc="outside lower center", ncols=6, fontsize=9)
    save(figure, path)
