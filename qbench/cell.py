"""One cell, answered: `answer` is the product in six lines, each step in its own fresh process."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbench import identity, latency, timing_lock, workers
from qbench.config import RECIPE_VALUES
from qbench.measure import Measure
from qbench.plan import Cell
from qbench.recipe import AXES
from qbench.record import Record
from qbench.results import read_finished, run_folder
from qbench.workers import Say, WorkerError

LOG = "log.txt"
UNAVAILABLE = "TaskUnavailable"  # the exception by which a task says that it cannot be had here
LACKING = "RecipeUnavailable"  # the one by which a peer says that it has no such recipe
NO_FP32 = "NoBaseline"  # the kind of failure that follows from the fp32 cell's


def answer(cell: Cell, results: Path, say: Say) -> Record:
    """Quantize the network and score it, time it beside fp32, weigh its memory; write all of it as one record.

    A crash, a time-out, an error in a child is a `failed` record; a task that cannot be had here a `skipped` one.
    """
    folder = _empty_folder(run_folder(results, cell.key))
    started, clock = datetime.now(UTC), time.monotonic()
    try:
        baselines = _baselines(cell, results)
        scored = _score(cell, folder, say)
        timings = [_time(cell, folder, index, results, say) for index in range(_timed(cell).processes)]
        weighed = _weigh(cell, folder, say)
        found = _combine(scored, latency.combine(timings, baselines), weighed)
    except WorkerError as error:
        found = _failure(error)
    record = _record(cell, found, folder, started, time.monotonic() - clock)
    record.write(folder / "record.json")  # last: a folder with a record is whole
    return record


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


def _score(cell: Cell, folder: Path, say: Say) -> dict[str, Any]:
    """Quantize, save the backend's program in the folder, evaluate, write the other artifacts."""
    backend = cell.recipe.backend
    recipe = {name: cell.job.values[name] for name in (*AXES, *RECIPE_VALUES)}
    arguments = {**_task(cell), "recipe_config": recipe, "measure_config": _measure(cell), "folder": str(folder)}
    with timing_lock.machine(alone=backend.alone, say=say):
        return _run(backend.evaluate, arguments, cell, folder, say)


def _time(cell: Cell, folder: Path, index: int, results: Path, say: Say) -> dict[str, Any]:
    """One of the fresh processes whose ratios make the interval of the speed-up, alone on the machine."""
    program = None if cell.is_baseline else str(_program(cell, folder))
    settings = _timed(cell)
    arguments = {**_task(cell), "program": program, "measure": dataclasses.asdict(settings), "process_index": index}
    arguments |= {"cache": str(results / "cache"), "backend": cell.recipe.backend.name}
    say(f"timing, process {index + 1} of {settings.processes}")
    with timing_lock.machine(alone=True, say=say):
        return _run("qbench.measure:time_cell", arguments, cell, folder, say)


def _timed(cell: Cell) -> Measure:
    """The settings of timing: a glance where the latency is no result."""
    return cell.measure if cell.recipe.latency_is_result else cell.measure.glance()


def _weigh(cell: Cell, folder: Path, say: Say) -> dict[str, Any]:
    """The memory of loading the saved file and running it."""
    arguments = {**_task(cell), "program": str(_program(cell, folder)), "measure": _measure(cell)}
    arguments |= {"backend": cell.recipe.backend.name}
    say("memory")
    with timing_lock.machine(alone=False, say=say):
        return _run("qbench.measure:memory_cell", arguments, cell, folder, say)


def _program(cell: Cell, folder: Path) -> Path:
    """Where the backend has saved the cell's model."""
    program: Path = folder / cell.recipe.backend.program
    return program


def _run(function: str, arguments: dict[str, Any], cell: Cell, folder: Path, say: Say) -> dict[str, Any]:
    return workers.run(function, arguments, log=folder / LOG, say=say, timeout_s=cell.measure.timeout_s)


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


def _record(cell: Cell, found: Mapping[str, Any], folder: Path, started: datetime, seconds: float) -> Record:
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
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 2),
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
