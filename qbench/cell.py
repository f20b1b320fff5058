"""Cells, answered: each step of `answer` runs in its own fresh process; cells of one task are timed side by side."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from qbench import backends, identity, latency, timing_lock, workers
from qbench.config import RECIPE_VALUES
from qbench.measure import Measure
from qbench.plan import Cell
from qbench.recipe import AXES
from qbench.record import Record
from qbench.results import read_finished, run_folder
from qbench.workers import Say, WorkerError

LOG = "log.txt"
TIME = "qbench.measure:time_groups"
LOAD = "qbench.evaluate:begin"
UNAVAILABLE = "TaskUnavailable"  # the exception by which a task says that it cannot be had here
LACKING = "RecipeUnavailable"  # the one by which a peer says that it has no such recipe
SIDE_BY_SIDE = 12  # cells that are answered together: what a kill can lose
SHARE = 6  # of the machine's threads a process that is not alone has one in so many, whatever runs beside it
NO_FP32 = "NoBaseline"  # the kind of failure that follows from the fp32 cell's


@dataclass
class Work:
    """A cell whose answer is being made: what its own processes found, or how it failed."""

    cell: Cell
    folder: Path
    started: datetime
    seconds: float = 0.0
    baselines: Mapping[str, Any] | None = None
    scored: dict[str, Any] = field(default_factory=dict)
    weighed: dict[str, Any] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    error: WorkerError | None = None


def answer(cells: Sequence[Cell], results: Path, say: Say) -> list[Record]:
    """Quantize each network and score it, weigh its memory; time what is of a task side by side; write the records.

    The cells are a group of `together`. A crash, a time-out, an error in a child is a `failed` record; a task that
    cannot be had here a `skipped` one.
    """
    works = begin(cells, results, say)
    for index in range(timed(cells[0]).processes):
        time_once(works, index, results, say)
    return [finish(work) for work in works]


def begin(cells: Sequence[Cell], results: Path, say: Say) -> list[Work]:
    """The first half of each answer, in an empty folder: the network quantized, scored and weighed.

    Nothing is timed yet: as many at once as there are cores for.
    """
    at_once = max(1, min(len(cells), identity.answering_environment()["threads"] // threads_of_each()))
    works = [Work(cell, _empty_folder(run_folder(results, cell.key)), datetime.now(UTC)) for cell in cells]

    def one(work: Work, server: int | str) -> None:
        def tell(text: str) -> None:
            workers.go_on()
            say(text if len(cells) == 1 else f"{work.cell.name}: {text}")

        work.started = datetime.now(UTC)
        with _stage(work, at_once=at_once):
            work.baselines = _baselines(work.cell, results)
            work.scored = _score(work, tell, server)
            work.weighed = weigh(work, tell)

    def some(works: Sequence[Work]) -> None:
        with _loaded(works, at_once, say) as server:
            for work in works:
                one(work, server)

    alike = len({(work.cell.task_id, work.cell.recipe.backend.evaluate) for work in works}) == 1
    parts = [works[first::at_once] for first in range(at_once)] if alike else [[work] for work in works]
    workers.side_by_side([partial(some, part) for part in parts if part], at_once)
    return works


@contextmanager
def _loaded(works: Sequence[Work], at_once: int, say: Say) -> Iterator[int | str]:
    """A server whose children have before them what cells of their task begin with; for a single cell any."""
    cell, clock = works[0].cell, time.monotonic()
    own = cell.recipe.backend.evaluate == backends.OWN_EVALUATION
    if len(works) == 1 or not own or cell.prepared is None or cell.prepared.error is not None:
        yield 0
        return
    with ExitStack() as stack:
        with timing_lock.machine(alone=False, say=say):
            say("loading the task")
            log, limit = works[0].folder / LOG, cell.measure.timeout_s
            server = stack.enter_context(workers.warmed(LOAD, _task(cell), log=log, timeout_s=limit))
        for work in works:
            work.seconds += (time.monotonic() - clock) / len(works) / at_once
        yield server


def threads_of_each() -> int:
    """The threads of a process that is not alone: the same whatever is beside it, as float results depend on them."""
    return max(1, int(identity.answering_environment()["threads"]) // SHARE)


def time_once(works: Sequence[Work], index: int, results: Path, say: Say) -> None:
    """Time cells whose first half is done in one more process, alone on the machine; those of a task side by side.

    Processes of two indices have nothing in common, not even the server that they come from. A crash there is that of
    the cells which crash alone; those that failed earlier are left out.
    """
    works = [work for work in works if work.error is None]
    if not works:
        return
    with _stage(*works):
        for work, found in zip(works, _time(works, index, results, say), strict=True):
            work.timings.append(found)
    if len(works) > 1 and works[0].error is not None:
        for work in works:
            work.error = None
            time_once([work], index, results, say)


def finish(work: Work) -> Record:
    """The record of an answer, written last: a folder with a record is whole."""
    record = record_of(work)
    record.write(work.folder / "record.json")
    return record


def record_of(work: Work) -> Record:
    """The record of what has been found so far: the first half of the answer, and one timing or more."""
    if work.error is not None:
        return _record(work, _failure(work.error))
    return _record(work, _combine(work.scored, latency.combine(work.timings, work.baselines), work.weighed))


@contextmanager
def _stage(*works: Work, at_once: int = 1) -> Iterator[None]:
    """A part of the cells' answers, beside as many others: its time is shared among them, its failure is theirs."""
    clock = time.monotonic()
    try:
        yield
    except WorkerError as error:
        for work in works:
            work.error = error
    for work in works:
        work.seconds += (time.monotonic() - clock) / len(works) / at_once


def _baselines(cell: Cell, results: Path) -> Mapping[str, Any] | None:
    """What the fp32 cell that the cell is compared with found to be the fastest fp32; None for that cell itself."""
    prepared = cell.prepared
    assert prepared is not None
    if prepared.error is not None:
        kinds = ([UNAVAILABLE] if prepared.status == "skipped" else []) + ([] if cell.is_baseline else [NO_FP32])
        raise WorkerError(prepared.error, tuple(kinds))
    if cell.is_baseline:
        return None
    record = read_finished(results, cell.baseline_key)
    if record is None or record.status != "ok":
        raise WorkerError(
            f"the fp32 cell that it is compared with {record.status if record else 'was not run'}", (NO_FP32,)
        )
    found: Mapping[str, Any] = record.details["fp32_baselines"]
    return found


def _score(work: Work, say: Say, server: int | str) -> dict[str, Any]:
    """Quantize, save the backend's program in the folder, evaluate, write the other artifacts."""
    cell, backend = work.cell, work.cell.recipe.backend
    recipe = {name: cell.job.values[name] for name in (*AXES, *RECIPE_VALUES)}
    arguments = {**_task(cell), "recipe_config": recipe, "measure_config": _measure(cell), "folder": str(work.folder)}
    with timing_lock.machine(alone=backend.alone, say=say):
        return _run(backend.evaluate, arguments, work, say, server)


def together(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Groups of cells that are answered together, SIDE_BY_SIDE at most: of one engine and one measurement.

    They are fp32 cells, or timed side by side: of one task, in the same processes, against the same fp32.
    """

    def kind(cell: Cell) -> tuple[str, ...]:
        return (repr(cell.measure), cell.recipe.backend.name, "fp32" if cell.is_baseline else cell.task_id)

    def most(group: Sequence[Cell]) -> int:
        return 1 if group[0].recipe.backend.alone else SIDE_BY_SIDE

    groups = [list(alike) for _, alike in itertools.groupby(cells, kind)]
    return [group[first : first + most(group)] for group in groups for first in range(0, len(group), most(group))]


def _contests(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Groups of cells of which each is timed against all others of its group."""
    return [some for group in together(cells) for some in ([[c] for c in group] if group[0].is_baseline else [group])]


def _time(works: Sequence[Work], index: int, results: Path, say: Say) -> list[dict[str, Any]]:
    """What one of the processes whose ratios make the intervals of the speed-ups says of each cell."""
    programs = {work.cell.question: str(_program(work)) for work in works}
    groups, most = _contests([work.cell for work in works]), max(timed(work.cell).processes for work in works)
    limit = sum(work.cell.measure.timeout_s for work in works)
    asked = [_to_time(group, programs, index, results) for group in groups]
    say(f"timing, process {index + 1}" + (f" of {most}" if index < most else ""))
    with timing_lock.machine(alone=True, say=say):
        log = works[0].folder / LOG
        answer = workers.run(TIME, {"groups": asked}, log=log, say=say, timeout_s=limit, server=index)
    found = {}
    for group, process in zip(groups, answer["groups"], strict=True):
        for cell in group:
            found[cell.question] = process if cell.is_baseline else latency.part(process, cell.question)
    return [found[work.cell.question] for work in works]


def _to_time(group: Sequence[Cell], programs: Mapping[str, str], index: int, results: Path) -> dict[str, Any]:
    """The arguments of `measure.time_cells` for cells of one task."""
    own = {cell.question: programs[cell.question] for cell in group if not cell.is_baseline}
    arguments = {**_task(group[0]), "programs": own, "measure": dataclasses.asdict(timed(group[0]))}
    backend = group[0].recipe.backend.name
    return {**arguments, "process_index": index, "cache": str(results / "cache"), "backend": backend}


def timed(cell: Cell) -> Measure:
    """The settings of timing: a glance where the latency is no result."""
    return cell.measure if cell.recipe.latency_is_result else cell.measure.glance()


def weigh(work: Work, say: Say) -> dict[str, Any]:
    """The memory of loading the saved file and running it."""
    cell = work.cell
    arguments = {**_task(cell), "program": str(_program(work)), "measure": _measure(cell)}
    arguments |= {"backend": cell.recipe.backend.name}
    say("memory")
    with timing_lock.machine(alone=False, say=say):
        return _run("qbench.measure:memory_cell", arguments, work, say)


def operations(work: Work, say: Say) -> dict[str, float]:
    """Milliseconds of each operation of the saved program, alone on the machine. Raises WorkerError."""
    cell = work.cell
    arguments = {**_task(cell), "program": str(_program(work)), "measure": _measure(cell)}
    say("its operations")
    with timing_lock.machine(alone=True, say=say):
        return _run("qbench.kernels:operations_ms", arguments, work, say)


def _program(work: Work) -> Path:
    """Where the backend has saved the cell's model."""
    program: Path = work.folder / work.cell.recipe.backend.program
    return program


def _run(function: str, arguments: dict[str, Any], work: Work, say: Say, server: int | str = 0) -> dict[str, Any]:
    threads = None if work.cell.recipe.backend.alone else threads_of_each()
    log, limit = work.folder / LOG, work.cell.measure.timeout_s
    return workers.run(function, arguments, log=log, say=say, timeout_s=limit, threads=threads, server=server)


def _task(cell: Cell) -> dict[str, Any]:
    assert cell.prepared is not None
    return {"task_config": cell.task, "prepared": dataclasses.asdict(cell.prepared)}


def _measure(cell: Cell) -> dict[str, Any]:
    node: dict[str, Any] = cell.job.values["measure"]
    return node


def _combine(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The children's answers as one: metrics, environment and details joined, notes in order."""
    joined: dict[str, Any] = {
        "status": "ok",
        "notes": list(dict.fromkeys(n for p in parts for n in p.get("notes", ()))),
    }
    for name in ("metrics", "environment", "details"):
        joined[name] = {key: value for part in parts for key, value in part.get(name, {}).items()}
    return {**joined, "granularity_effective": parts[0].get("granularity_effective")}


def _failure(error: WorkerError) -> dict[str, Any]:
    skipped = bool({UNAVAILABLE, LACKING} & set(error.types))
    details = {"misuse": error.misuse, "follows_from_fp32": NO_FP32 in error.types}
    return {"status": "skipped" if skipped else "failed", "error": str(error), "details": details}


def _record(work: Work, found: Mapping[str, Any]) -> Record:
    cell, folder = work.cell, work.folder
    assert cell.prepared is not None
    backend = cell.recipe.backend
    details = {
        **found.get("details", {}),
        "command": cell.command,
        "log": cell.prepared.log or str(folder / LOG),
        "artifacts": _artifacts(folder, Path(backend.program).stem),
        "is_baseline": cell.is_baseline,
        "latency_is_result": cell.recipe.latency_is_result,
        "recipe": cell.recipe.canonical(),
        "measure": dataclasses.asdict(cell.measure),
        "metric": cell.prepared.metric,
        "task_arguments": _task(cell),
    }
    threads = {"measure_threads": cell.measure.threads}
    if cell.measure.threads_large is not None:
        threads["measure_threads_large"] = cell.measure.threads_large
    environment = {**identity.environment(), **threads, **found.get("environment", {})}
    return Record(
        cell=cell.id,
        key=cell.key,
        status=found["status"],
        error=found.get("error"),
        task=cell.prepared.name,
        family=cell.prepared.family,
        **{**cell.recipe.names(), "backend": backend.name, "method": cell.recipe.method.name},
        granularity_effective=found.get("granularity_effective"),
        label=cell.recipe.label,
        metrics=found.get("metrics", {}),
        environment=environment,
        started=work.started.isoformat(timespec="seconds"),
        seconds=round(work.seconds, 2),
        notes=found.get("notes", []),
        details=details,
    )


def _artifacts(folder: Path, program: str) -> list[str]:
    """The files of the folder, the saved model (all that is named like it) aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.stem != program)
    return sorted(str(path.relative_to(folder)) for path in files)


def _empty_folder(folder: Path) -> Path:
    """The cell's folder without an earlier answer: its record goes first, so that it never describes newer files."""
    (folder / "record.json").unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
