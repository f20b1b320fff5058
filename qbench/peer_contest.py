"""Finished int8 cells of all backends timed side by side, and `results/peers.md`: the page of `+sweep=peers`.

Times of two records were taken minutes apart; what the built-in engine's time is over a peer's is therefore measured
here, in fresh processes that hold both, in blocks in random order. What was timed is kept: the same records are not
timed twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qbench import comparison as compare
from qbench import timing_lock, workers
from qbench.columns import three_digits
from qbench.identity import sha256_of
from qbench.latency import doubts
from qbench.measure import Measure
from qbench.progress import Progress
from qbench.recipe import option
from qbench.record import Record, write_atomic
from qbench.results import run_folder
from qbench.statistics import ratio_over_processes
from qbench.timing import BlockTimes

OWN = "native"
HOPELESS = 2.0  # a peer's cell so many times slower than the fastest, by its own record, does not run again
PAGE, KEPT = "peers.md", "contests"


@dataclass(frozen=True)
class Contest:
    """The cells of one task timed at one batch size: a process' times each, and the SQNR of what was timed in dB."""

    batch: int
    cells: Mapping[str, Record]
    times: Sequence[BlockTimes]
    sqnr_db: Mapping[str, float | None]

    def milliseconds(self, name: str) -> float:
        """The median over processes of a cell's median call."""
        return median(median(one.calls_ms[name]) for one in self.times)

    def ratio(self, numerator: str, denominator: str) -> str:
        """`0.93 (0.92..0.95)`: one time over another, with its 95 % interval over processes."""
        found = ratio_over_processes([one.ratios(numerator, denominator) for one in self.times])
        ends = found.interval()
        return f"{found.ratio:.2f}" + ("" if ends is None else f" ({ends[0]:.2f}..{ends[1]:.2f})")

    def best_peer(self) -> str | None:
        """The fastest int8 cell of a peer."""
        peers = [name for name, record in self.cells.items() if record.backend != OWN]
        return min(peers, key=self.milliseconds, default=None)


def page(records: list[Record], results: Path) -> list[Path]:
    """Hold the contests, print their tables, write them as results/peers.md."""
    lines = ["# The built-in engine beside other engines", ""]
    for task in dict.fromkeys(record.task for record in records):
        lines += _task_lines([r for r in records if r.task == task], results)
    lines += [
        "Ratios are the built-in engine's time over the row's, below 1 where the engine is faster, with 95 % intervals",
        "over processes in which the cells ran side by side, in blocks in random order. `*`: the fastest int8 peer.",
        "`~`: from the cell's own record, too slow for the contest or float. SQNR against eager fp32 is that of the",
        "outputs that were timed (`~`: of the evaluation).",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_atomic(results / PAGE, text)
    return [results / PAGE]


def _task_lines(records: Sequence[Record], results: Path) -> list[str]:
    done = [r for r in records if r.status == "ok" and compare.latency_counts(r)]
    lines = [f"## {records[0].task}", ""]
    sides = {r.backend == OWN for r in done if r.granularity is not None}
    if sides != {True, False}:
        lines += ["No contest: it takes an int8 cell of the built-in engine and one of a peer.", ""]
    for batch in _measure(done[0]).batches if sides == {True, False} else ():
        try:
            lines += _contest_lines(hold(done, batch, results), done)
        except workers.WorkerError as error:
            lines += [f"batch {batch} was not timed: {error}", ""]
    lines += [f"- {r.status}: {_name(r)}: {r.error}" for r in records if r.status != "ok"]
    for record in (r for r in done if r.details.get("variant", r.method) != r.method):
        floats = record.details["float_ops"]
        kinds = sorted({op.split(": ")[1] for op in floats})
        note = f"; in float: {len(floats)} ({', '.join(kinds)})" if floats else ""
        lines.append(f"- {_name(record)} is {record.details['variant']}{note}")
    return [*lines, ""]


def hold(records: Sequence[Record], batch: int, results: Path) -> Contest:
    """The contest of a task's int8 cells at a batch size, timed unless it is kept. Raises WorkerError."""
    cells = _entrants(records, batch)
    measure = _measure(next(iter(cells.values())))
    entrants = {
        name: {"backend": r.backend, "program": str(run_folder(results, r.key) / option("backend", r.backend).program)}
        for name, r in cells.items()
    }
    asked = {"batch": batch, "cells": {name: [r.key, r.started] for name, r in cells.items()}}
    kept = kept_path(asked, results)
    if not kept.exists():
        arguments = {**_first(cells).details["task_arguments"], "entrants": entrants, "batch": batch}
        arguments["measure"] = _first(cells).details["measure"]
        write_atomic(kept, json.dumps({**asked, "processes": _time(arguments, measure, kept.with_suffix(".log"))}))
    processes = json.loads(kept.read_text(encoding="utf-8"))["processes"]
    times = [BlockTimes(**process["times"]) for process in processes]
    return Contest(batch, cells, times, processes[0]["sqnr_db"])


def kept_path(asked: Mapping[str, Any], results: Path) -> Path:
    """Where the times of a contest are kept: `asked` holds its batch size, and key and start of each cell's record."""
    return results / KEPT / f"{sha256_of(asked)}.json"


def _time(arguments: dict[str, Any], measure: Measure, log: Path) -> list[dict[str, Any]]:
    """One answer of `measure.time_contest` a process."""
    progress, found = Progress(), []
    for index in range(measure.processes):
        names = ", ".join(arguments["entrants"])
        progress.begin(f"side by side, batch {arguments['batch']}, process {index + 1} of {measure.processes}: {names}")
        with timing_lock.machine(alone=True, say=progress.say):
            found.append(
                workers.run(
                    "qbench.measure:time_contest",
                    {**arguments, "process_index": index},
                    log=log,
                    say=progress.say,
                    timeout_s=measure.timeout_s,
                    server=index,
                )
            )
        progress.end()
    return found


def _entrants(records: Sequence[Record], batch: int) -> dict[str, Record]:
    """The int8 cells by name: the engine's all, those of the peers that can be the fastest."""
    int8 = [r for r in records if r.granularity is not None]
    peers = [_ms(r, batch) for r in int8 if r.backend != OWN]
    limit = HOPELESS * min(peers, default=0.0)
    return {_name(r): r for r in int8 if r.backend == OWN or _ms(r, batch) <= limit}


def _contest_lines(contest: Contest, records: Iterable[Record]) -> list[str]:
    """A table: one row a cell, fastest first."""
    own = [name for name, record in contest.cells.items() if record.backend == OWN]
    best = contest.best_peer()
    threads = _measure(_first(contest.cells)).threads_of(contest.batch)
    head = ["cell", "ms", "SQNR dB", *(f"{name} / it" for name in own)]
    rows = []
    for name in contest.cells:
        ratios = ["" if name in own else contest.ratio(mine, name) for mine in own]
        noise = contest.sqnr_db[name]
        star = "* " if name == best else ""
        ms = contest.milliseconds(name)
        rows.append((ms, [star + name, three_digits(ms), "" if noise is None else f"{noise:.1f}", *ratios]))
    for record in records:
        if _name(record) not in contest.cells:
            ms, noise = _ms(record, contest.batch), record.metrics.get("sqnr_db")
            shown = "" if noise is None else f"~{noise:.1f}"
            rows.append((ms, [_name(record), f"~{three_digits(ms)}", shown, *("" for _ in own)]))
    doubt = doubts(contest.times)
    title = f"batch {contest.batch}, {threads} thread{'s' if threads > 1 else ''}"
    table = [head, ["---"] * len(head), *(row for _, row in sorted(rows, key=lambda row: row[0]))]
    text = [f"| {' | '.join(row)} |" for row in table]
    return [f"### {title}" + (f" ({', '.join(sorted(doubt))})" if doubt else ""), "", *text, ""]


def _name(record: Record) -> str:
    """`native ptsq`: enough where a sweep has one cell a method and backend, else the whole recipe."""
    return f"{option('backend', record.backend).label} {compare.recipe_text(record, ('backend',))}"


def _ms(record: Record, batch: int) -> float:
    value = record.metrics[f"latency_ms_median{'' if batch == 1 else f'_b{batch}'}"]
    return float(value)


def _measure(record: Record) -> Measure:
    return Measure.of(record.details["measure"])


def _first(cells: Mapping[str, Record]) -> Record:
    return next(iter(cells.values()))
