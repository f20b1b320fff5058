"""What people and programs read of a gate run: the text of a red test, the table, gate.md and gate.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from qbench.gate import verdict
from qbench.gate.verdict import Outcome, Verdict
from qbench.record import write_atomic

ACCEPT = "pytest --qbench --qbench-update"
QUIET = (verdict.OK, verdict.NOT_SIGNIFICANT)


def failure(outcome: Outcome, strict: bool = False) -> str:
    """Why a test is red, one line a verdict; then the commands that measure the cell alone and accept it."""
    red = outcome.red(strict)
    width = max(len(v.metric) for v in red)
    lines = [f"{outcome.name}: {outcome.word}"]
    lines += [f"  {v.metric:{width}}  {v.word}: {v.sentence}" for v in red]
    if any(v.word in (verdict.WORSE, verdict.CHANGED, verdict.FAILED, verdict.LIMIT) for v in red) and outcome.command:
        lines.append(f"  alone:    {outcome.command}")
    if not outcome.folder:
        return "\n".join(lines)
    lines.append(f"  measured: {outcome.folder}")
    if outcome.beside:
        return "\n".join(lines)  # the baseline is a revision: nothing to accept
    if all(v.word == verdict.MISSING for v in red):
        lines.append(f"  accept:   {ACCEPT} -k {_key(outcome.name)}")
    elif any(v.word in (verdict.CHANGED, verdict.WORSE, verdict.STALE, verdict.VANISHED) for v in red):
        lines.append(f"  if meant: {ACCEPT}=all -k {_key(outcome.name)}")
    return "\n".join(lines)


def _key(name: str) -> str:
    """For -k, which knows no blanks and equals signs: the words of a name with such."""
    if not set(name) & {" ", "="}:
        return f"'{name}'"
    return "'" + " and ".join(name.replace("=", " ").replace("[", " ").replace("]", " ").split()) + "'"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line a cell: its word, and a column a gated metric with the change."""
    if not outcomes:
        return []
    rows = [(o.word, o.name, _remark(o)) for o in sorted(outcomes, key=lambda o: verdict.WORDS.index(o.word))]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    counts = {word: sum(o.word == word for o in outcomes) for word in verdict.WORDS}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return [f"{word:{widths[0]}}  {name:{widths[1]}}  {text}".rstrip() for word, name, text in rows] + [told]


def _remark(outcome: Outcome) -> str:
    """What is to be said of a cell in a line: its worst verdict; of a quiet one the change of its speed."""
    loud = [v for v in outcome.verdicts if v.word == outcome.word and v.word not in QUIET]
    if loud:
        more = f" (and {len(loud) - 1} more)" if len(loud) > 1 else ""
        return f"{loud[0].metric}: {loud[0].sentence.partition(':')[0]}{more}"
    speeds = [v for v in outcome.verdicts if v.metric.startswith("speedup") and v.difference is not None]
    return ", ".join(f"{v.metric} {v.difference:+.1f} % ({v.low:+.1f} to {v.high:+.1f})" for v in speeds)


def orphan_lines(names: Sequence[str], folder: Path) -> list[str]:
    """A line for each baseline without a cell."""
    return [f"{verdict.ORPHAN}  {folder / name}: no cell of the sweep has this name; delete it" for name in names]


def write(path: Path, outcomes: Sequence[Outcome], orphaned: Sequence[str]) -> None:
    """Write gate.json or gate.md, by the path's suffix."""
    text = as_json(outcomes, orphaned) if path.suffix == ".json" else as_markdown(outcomes, orphaned)
    write_atomic(path, text)


def as_json(outcomes: Sequence[Outcome], orphaned: Sequence[str]) -> str:
    """Every verdict of every cell."""
    cells = [{**dataclasses.asdict(outcome), "word": outcome.word} for outcome in outcomes]
    return json.dumps({"cells": cells, "orphans": list(orphaned)}, indent=1, sort_keys=True, allow_nan=False) + "\n"


def as_markdown(outcomes: Sequence[Outcome], orphaned: Sequence[str]) -> str:
    """A comment for a pull request: the cells that changed, the others in a sentence."""
    loud = [o for o in sorted(outcomes, key=lambda o: verdict.WORDS.index(o.word)) if o.word not in QUIET]
    lines = ["### qbench", ""]
    if loud:
        lines += ["| cell | verdict | metric | |", "|---|---|---|---|"]
        lines += [_row(o, v) for o in loud for v in o.verdicts if v.word not in QUIET]
        lines.append("")
    rest = len(outcomes) - len(loud)
    lines.append(f"{rest} of {len(outcomes)} cells: no change that matters.")
    lines += [f"Orphan baseline: `{name}`" for name in orphaned]
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome, said: Verdict) -> str:
    mark = f"**{said.word}**" if said.red() else said.word
    return f"| `{outcome.name}` | {mark} | {said.metric} | {said.sentence.replace('|', '/')} |"
