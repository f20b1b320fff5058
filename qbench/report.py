"""What a person reads on the terminal: the table of a sweep, and one line a finished cell."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qbench import comparison as compare
from qbench.columns import Block, Column, blocks, columns, milliseconds, score, score_name, score_unit, three_digits
from qbench.record import Record
from qbench.remarks import failures, legend, remarks, title
from qbench.summary import write_summary

__all__ = ["one_line", "table", "write_summary"]


def table(records: Sequence[Record], width: int = 120) -> str:
    """The table of the records, one block a task, at most `width` columns wide."""
    if not records:
        return "no records\n"
    shown = [_text_block(block, width) for block in blocks(records)]
    return "\n\n".join([*shown, _wrap(legend(records), width)]) + "\n"


def _wrap(lines: Sequence[str], width: int) -> str:
    return "\n".join(textwrap.fill(line, width, subsequent_indent="   ", break_on_hyphens=False) for line in lines)


def _text_block(block: Block, width: int) -> str:
    lines = [title(block)]
    if block.done:
        lines += _rows(block, columns(block), width)
    return "\n".join([*lines, _wrap([*remarks(block), *failures(block)], width)]).rstrip()


def _rows(block: Block, shown: list[Column], width: int) -> list[str]:
    """The block's rows, in columns two spaces apart, one where that is too wide, or without what can be spared."""
    cells = [[c.cell(block, record) for c in shown] for record in block.done]
    widths = [
        max(len(text) for text in [*c.head, *column]) for c, column in zip(shown, zip(*cells, strict=True), strict=True)
    ]
    gap = next((gap for gap in (2, 1) if sum(widths) + gap * (len(widths) - 1) <= width), 0)
    if not gap and max(c.spare for c in shown):
        least = max(shown, key=lambda c: c.spare)
        return _rows(block, [c for c in shown if c is not least], width)

    def row(texts: Sequence[str]) -> str:
        aligned = [t.ljust(w) if c.words else t.rjust(w) for t, w, c in zip(texts, widths, shown, strict=True)]
        return (" " * (gap or 1)).join(aligned).rstrip()

    return [row([c.head[0] for c in shown]), row([c.head[1] for c in shown]), *(row(texts) for texts in cells)]


def one_line(record: Record) -> str:
    """A finished cell in one line."""
    name = f"{record.task} {compare.recipe_text(record)}"
    if record.status != "ok":
        return f"{name}: {record.status}: {record.error}"
    return f"{name}: {', '.join(part for part in _parts(record) if part)}"


def _parts(record: Record) -> list[str]:
    m, shown = record.metrics, compare.shown_metrics(record)
    parts = []
    if "score" in m:
        parts.append(f"{score_name(record)} {score(record, m['score'])}{score_unit(record)[1]}")
    if "score_drop" in m and not compare.is_baseline(record):
        parts.append(f"drop {score(record, m['score_drop'], '+')} {compare.significance(record)}".rstrip())
    parts += [f"SQNR {m['sqnr_db']:.1f} dB"] if "sqnr_db" in m else []
    parts += [f"{three_digits(m['size_bytes'] / 1e6)} MB"] if "size_bytes" in m else []
    if "latency_ms_median" in m:
        label = "" if compare.latency_counts(record) else f" {record.backend}"
        parts.append(f"{milliseconds(record, 'latency_ms_median')} ms{label}")
    parts += [f"{shown['speedup']:.2f}x fp32"] if "speedup" in shown and not compare.is_baseline(record) else []
    return [*parts, *compare.shown_notes(record), f"{record.seconds:.0f} s"]
