"""Each task of a sweep once, in a child: trained where it is not cached, its weights and data hashed and verified."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from qbench import timing_lock, workers
from qbench.cell import UNAVAILABLE
from qbench.config import UsageError
from qbench.identity import sha256_of, sources_hash
from qbench.plan import Cell, Prepared
from qbench.progress import Progress
from qbench.record import write_atomic


def prepare_tasks(cells: Sequence[Cell], results: Path, progress: Progress) -> dict[str, Prepared]:
    """By task id, what preparation found. Raises UsageError when the input is to blame, a corrupt cache say."""
    return {cell.task_id: _prepare(cell, results / "cache", progress) for cell in _one_a_task(cells)}


def remembered_tasks(cells: Sequence[Cell], results: Path) -> dict[str, Prepared]:
    """What the last preparation of each task found, unverified; nothing for tasks that were never prepared."""
    found = {}
    for cell in _one_a_task(cells):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[cell.task_id] = Prepared(**json.loads(_memory(cell, results / "cache").read_text(encoding="utf-8")))
    return found


def _prepare(cell: Cell, cache: Path, progress: Progress) -> Prepared:
    name = cell.job.choices["task"]
    log = cache / f"prepare-{name}.log"
    progress.begin(f"preparing {name}")
    try:
        with timing_lock.machine(alone=False, say=progress.say):
            arguments = {"task_config": cell.task, "cache": str(cache)}
            facts = workers.run("qbench.evaluate:prepare", arguments, log=log, say=progress.say)
    except workers.WorkerError as error:
        if error.misuse:
            raise UsageError(f"task={name}: {error}") from error
        status = "skipped" if UNAVAILABLE in error.types else "failed"
        return Prepared(name, "unknown", "score", "none", "none", "", status, str(error), str(log))
    finally:
        progress.end()
    prepared = Prepared(**facts)
    write_atomic(_memory(cell, cache), json.dumps(asdict(prepared)))
    return prepared


def _one_a_task(cells: Sequence[Cell]) -> Iterable[Cell]:
    return {cell.task_id: cell for cell in cells}.values()


def _memory(cell: Cell, cache: Path) -> Path:
    """Where the outcome of a task's preparation is kept for dry runs; other source files make it another task."""
    return cache / f"prepared-{sha256_of([cell.task, sources_hash(cell.task, 'qbench.evaluate')])}.json"
