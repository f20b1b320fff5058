"""The results folder's summary: summary.csv for programs, summary.md for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbench import comparison as compare
from qbench.columns import blocks, columns
from qbench.record import Record, write_atomic
from qbench.remarks import failures, legend, remarks, title


def write_summary(records: Sequence[Record], results: Path) -> None:
    """Write results/summary.csv and results/summary.md, each whole or not at all."""
    import pandas

    frame = pandas.DataFrame([_flat(record) for record in records])
    write_atomic(results / "summary.csv", frame.to_csv(index=False))
    write_atomic(results / "summary.md", markdown(records))


def _flat(record: Record) -> dict[str, Any]:
    """The record as one row: fields, then the metrics that may be shown, then what qualifies them."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name in ("metrics", "environment", "notes", "details"):
        fields.pop(name)
    more = {"fp32_baseline": record.environment.get("fp32_baseline"), "notes": " ".join(record.notes)}
    return {**fields, **compare.shown_metrics(record), "latency_is_result": compare.latency_counts(record), **more}


def markdown(records: Sequence[Record]) -> str:
    """The table in Markdown, one section a task."""
    parts = ["# qbench: summary", ""]
    for block in blocks(records):
        parts += [f"## {block.task}", "", title(block) + ".", ""]
        if block.done:
            shown = columns(block)
            parts += [_cells([" ".join(c.head).strip() for c in shown])]
            parts += [_cells([":--" if c.words else "--:" for c in shown])]
            parts += [_cells([c.cell(block, record) for c in shown]) for record in block.done] + [""]
        parts += [f"- {_escaped(line)}" for line in [*remarks(block), *failures(block)]] + [""]
    return "\n".join([*parts, *(f"- {_escaped(line)}" for line in legend(records))]) + "\n"


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(text) for text in texts)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("~", "\\~").replace("\n", " ")
