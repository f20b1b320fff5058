"""The picture of a sweep: what each cell gains in size against what it loses in score, one panel a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench import comparison as compare
from qbench.columns import Block, blocks, difference_unit, score_unit
from qbench.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, save
from qbench.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)
MARKERS = ("o", "s", "^", "D", "v")
MOST_ACROSS = 3  # panels side by side


def tradeoff_figure(records: Sequence[Record], path: Path) -> None:
    """Size against score drop with its 95 % interval, the Pareto front outlined; fp32 is the line at 0.

    Methods have colours, weight granularities have markers. Raises ValueError when no record has both numbers.
    """
    drawn = [block for block in blocks(records) if any(_has_both(r) for r in block.done)]
    if not drawn:
        raise ValueError("no record has a score drop and a size: nothing to draw")
    across = min(len(drawn), MOST_ACROSS)
    down = math.ceil(len(drawn) / across)
    figure = new_figure(6.2 * across, 4.6 * down + 0.4)
    look = _Look(records)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for ax, block in zip(panels, drawn, strict=False):
        _panel(ax, block, look)
    for ax in panels[len(drawn) :]:
        ax.set_axis_off()
    figure.legend(handles=look.legend(), loc="outside lower center", ncols=8, fontsize=9)
    save(figure, path)


def _has_both(record: Record) -> bool:
    return {"score_drop", "size_bytes"} <= set(record.metrics) and not compare.is_baseline(record)


class _Look:
    """One colour a method and one marker a granularity, the same in all panels."""

    def __init__(self, records: Sequence[Record]) -> None:
        cells = [r for r in records if r.status == "ok" and _has_both(r)]
        self.colours = dict(zip(sorted({r.method for r in cells}), COLOURS * 9, strict=False))
        self.markers = dict(
            zip(sorted({compare.option_label(r, "granularity") for r in cells}), MARKERS * 9, strict=False)
        )

    def legend(self) -> list[object]:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        methods = [Patch(color=colour, label=method) for method, colour in self.colours.items()]
        markers = [
            Line2D([], [], marker=marker, color="black", linestyle="", label=f"per {name}" if name else "weights whole")
            for name, marker in self.markers.items()
        ]
        return [*methods, *markers, Line2D([], [], color=GREY, label="front of size and drop alone")]


def _panel(ax: Axes, block: Block, look: _Look) -> None:
    factor = score_unit(block.done[0])[0]
    cells = [r for r in block.done if _has_both(r)]
    for record in cells:
        x, y = record.metrics["size_bytes"] / 1e6, factor * compare.drop(record)
        colour = look.colours[record.method]
        if ends := compare.interval(record):
            ax.vlines(x, factor * ends[0], factor * ends[1], color=colour, alpha=0.4, linewidth=1)
        marker = look.markers[compare.option_label(record, "granularity")]
        front = record in block.pareto
        ax.plot(x, y, marker, color=colour, markersize=8 if front else 6, markeredgecolor="black" if front else colour)
    _front(ax, block, factor)
    ax.axhline(0, color="black", linewidth=0.8)
    points = [factor * compare.drop(record) for record in cells]
    drops = [abs(y) for y in points]
    typical = sorted(drops)[len(drops) // 2] or max(drops)
    if max(drops) > 20 * typical:  # one collapse must not flatten all others
        ax.set_yscale("symlog", linthresh=2 * typical)
    ax.set_xlabel("file, MB")
    ax.locator_params(axis="x", nbins=5)
    found = [ends for record in cells if (ends := compare.interval(record))]
    _limits(ax, points, [(factor * low, factor * high) for low, high in found])
    unit = difference_unit(block.done[0])
    ax.set_ylabel(f"score drop{', ' * bool(unit)}{unit}; up is worse")
    ax.set_title(block.task + _fp32(block))


def _limits(ax: Axes, points: Sequence[float], intervals: Sequence[tuple[float, float]]) -> None:
    """Let an interval that is far wider than most run out of the panel, or it would flatten all others."""
    widths = sorted(high - low for low, high in intervals)
    kept = [pair for pair in intervals if pair[1] - pair[0] <= 10 * widths[len(widths) // 2]]
    if len(kept) < len(intervals) and ax.get_yscale() == "linear":
        low, high = (of([0.0, *points, *(pair[i] for pair in kept)]) for i, of in ((0, min), (1, max)))
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _front(ax: Axes, block: Block, factor: float) -> None:
    """The front's cells, numbered, with their names beside the panel.

    A line joins those that no smaller file outdoes; the others are there for their latency.
    """
    from matplotlib.lines import Line2D

    front = sorted((r for r in block.pareto if _has_both(r)), key=lambda r: r.metrics["size_bytes"])
    joined: list[Record] = []
    for record in front:
        if not joined or compare.drop(record) < compare.drop(joined[-1]):
            joined.append(record)
    ax.plot(
        [r.metrics["size_bytes"] / 1e6 for r in joined],
        [factor * compare.drop(r) for r in joined],
        color=GREY,
        linewidth=2,
        zorder=0,
    )
    names = []
    for number, record in enumerate(front, start=1):
        place = (record.metrics["size_bytes"] / 1e6, factor * compare.drop(record))
        ax.annotate(
            str(number), place, xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9, weight="bold"
        )
        names.append(f"{number}  {block.name(record)}")
    blank = [Line2D([], [], linestyle="") for _ in names]
    options: dict[str, Any] = {"fontsize": 8, "handlelength": 0, "handletextpad": 0, "title": "Pareto front"}
    ax.legend(blank, names, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, **options)


def _fp32(block: Block) -> str:
    for record in block.done:
        if compare.is_baseline(record) and "size_bytes" in record.metrics:
            return f" (fp32: {record.metrics['size_bytes'] / 1e6:.3g} MB)"
    return ""
