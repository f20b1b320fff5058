"""results/textbook.md: every claim of the textbook with the number that tests it, from the records of a sweep.

The textbook is Shichen Peng's "DNN Quantization Basics" (2023). Nothing runs here: a finished sweep writes the page
again. See `verdicts` for how an interval becomes a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from qbench import comparison as compare
from qbench.record import Record, write_atomic
from qbench.results import run_folder
from qbench.textbook import figures, methods, speed, tensors
from qbench.textbook.claims import LIMIT, Claim, Question, Row
from qbench.textbook.selection import Selection, command
from qbench.textbook.verdicts import FAILS, HOLDS, MARGIN_DB, OPEN, UNTESTED, WEAKLY, WORDS

CLAIMS = (*methods.CLAIMS, *speed.CLAIMS, *tensors.CLAIMS)
PAGE = "textbook.md"
SWEEP = "python -m qbench +sweep=textbook"

INTRODUCTION = (
    'The textbook is "DNN Quantization Basics" (Shichen Peng, 2023). Each section below takes one of its statements, '
    "in our words, and tests it on these tasks with cells that ran in real int8 arithmetic. "
    f"`{SWEEP}` runs the cells that are missing and writes this page again."
)
RULES = (
    "**drop**: how much worse the score is than that of fp32 on the same examples (positive is worse), with its paired "
    "95 % interval. **gain**, **cost**: a difference of the drops of two recipes.",
    "The records hold intervals against fp32 only. The interval of a difference therefore goes from the lower end of "
    "one drop less the upper end of the other to the opposite ends: it leaves 0 out exactly where the two intervals do "
    "not overlap, and is wider than 95 %, however the two are correlated.",
    f"**small**: {LIMIT}. **SQNR** is never at its ceiling, so it tells recipes apart that score the same; it has no "
    f"interval, so a difference below {MARGIN_DB:g} dB counts as none.",
    f"**{HOLDS}**: every row that could be tested holds. **{FAILS}**: rows contradict it, and at least as many as "
    f"support it. **{WEAKLY}**: some rows support it, the rest does not tell, or fewer contradict. **{OPEN}**: no row "
    f"supports or contradicts it. **{UNTESTED}**: the cells that it needs are not there, or the number is no result.",
)


def page(records: Sequence[Record], results: Path, depthwise: Sequence[str] = ()) -> list[Path]:
    """Write results/textbook.md and the figures beside it; returns the files, the page first.

    `depthwise` names the tasks whose network has one filter a channel.
    """
    asked = Question(Selection(records), results, depthwise)
    drawn = figures.write(asked.cells, results)
    sections, summary, files = [], [_cells(["claim", "verdict", "rows"]), _cells([":--"] * 3)], list(drawn.values())
    for number, claim in enumerate(CLAIMS, start=1):
        rows = claim.rows(asked)
        verdict = claim.verdict(rows)
        summary.append(_cells([f"{number}. {claim.title}", verdict, _counts(rows)]))
        pictures = _pictures(claim, rows, asked)
        files += pictures
        sections += [f"## {number}. {claim.title}: {verdict}", "", *_section(claim, rows), *map(_image, pictures)]
    text = ["# What the textbook claims, tested", "", INTRODUCTION, "", _where(records), "", *summary, ""]
    text += ["## How the verdicts are made", "", *(f"- {rule}" for rule in RULES), ""]
    text += [part for caption, path in drawn.items() for part in (caption, "", _image(path))]
    write_atomic(results / PAGE, "\n".join([*text, *sections]))
    return [results / PAGE, *files]


def _where(records: Iterable[Record]) -> str:
    """On what the numbers were made."""
    records = [record for record in records if record.status == "ok"]
    examples = {r.task: f"{r.metrics['examples']:.0f}" for r in records if "examples" in r.metrics}
    machines = sorted({str(record.environment.get("cpu", "an unknown processor")) for record in records})
    tasks = ", ".join(f"{task} ({count} examples)" for task, count in examples.items())
    return f"Here: {len(records)} cells on {tasks or 'no task'}; {', '.join(machines)}."


def _section(claim: Claim, rows: Sequence[Row]) -> list[str]:
    lines = [f"> {claim.statement}", f"> (textbook: {claim.section})", "", claim.rule, ""]
    if not rows:
        return [*lines, "No cells of this sweep test it.", ""]
    lines += [_cells([*claim.head, "verdict"]), _cells([":--"] * (len(claim.head) + 1))]
    lines += [_cells([*row.texts, row.word]) for row in rows]
    cells = {cell.key: cell for row in rows for cell in row.cells if not compare.is_baseline(cell)}
    return [*lines, "", "```sh", command(list(cells.values())), "```", ""]


def _counts(rows: Sequence[Row]) -> str:
    """`holds 3, holds weakly 1`: how the rows stand."""
    words = [row.word for row in rows]
    return ", ".join(f"{word} {words.count(word)}" for word in WORDS if word in words) or "none"


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _pictures(claim: Claim, rows: Sequence[Row], asked: Question) -> list[Path]:
    """Copies of the network's own pictures from the first cell that has them, a depthwise network's if there is one."""
    cells = sorted((cell for row in rows for cell in row.cells), key=lambda cell: cell.task not in asked.depthwise)
    copied = []
    for name in claim.figures:
        places = [run_folder(asked.results, cell.key) / name for cell in cells]
        if source := next((path for path in places if path.is_file()), None):
            copied.append(asked.results / f"textbook-{name}")
            write_atomic(copied[-1], source.read_bytes())
    return copied


def _image(path: Path) -> str:
    return f"![{path.stem}]({path.name})\n"
