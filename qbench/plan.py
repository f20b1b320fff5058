"""What a command line asks for: each cell once, with the fp32 cells that the others are compared with."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbench import identity, interrupts, workers
from qbench.compose import Composer, Job
from qbench.config import RUN_VALUES, UsageError, measure_of, recipe_of
from qbench.identity import sha256_of
from qbench.measure import Measure
from qbench.recipe import AXES, CALIBRATION, DEFAULTS, Recipe

MAIN_AXES = ("method", "granularity", "scheme")


@dataclass(frozen=True)
class Prepared:
    """What is known of a task once its weights are trained and verified, or the sentence why they cannot be had."""

    name: str
    family: str
    metric: str
    weights_sha256: str
    data_sha256: str
    folder: str
    status: str = "ok"
    error: str | None = None
    log: str | None = None


@dataclass(frozen=True)
class Cell:
    """What is asked, and the configuration that asks it; `prepared` and the hashes are known once the task is prepared.

    `question` is what is asked before anything is loaded: combinations with the same one are the same cell. `baseline`
    is the question of the fp32 cell that this one is compared with, `baseline_key` that cell's key.
    """

    name: str
    recipe: Recipe
    measure: Measure
    job: Job
    question: str
    baseline: str
    command: str
    prepared: Prepared | None = None
    id: str = ""
    key: str = ""
    baseline_key: str = ""

    @property
    def is_baseline(self) -> bool:
        """Is this the fp32 cell that others are compared with?"""
        return self.question == self.baseline

    @property
    def task(self) -> dict[str, Any]:
        """The task's configuration."""
        node: dict[str, Any] = self.job.values["task"]
        return node

    @property
    def task_id(self) -> str:
        """Cells with the same one are prepared together."""
        return sha256_of(self.task)


def plan(composer: Composer) -> list[Cell]:
    """The cells of a command line, fp32 first. Raises UsageError for whatever cannot be."""
    cells: dict[str, Cell] = {}
    shared: dict[str, Any] = {}
    for job in composer.jobs():
        interrupts.go_on()
        for name in RUN_VALUES:
            if shared.setdefault(name, job.values[name]) != job.values[name]:
                raise UsageError(f"{name}: give one value for the whole sweep")
        cell = cell_of(job, composer.config_dir)
        cells.setdefault(cell.question, cell)
        if not shared["dry_run"]:
            workers.warm_up()  # torch loads while the rest is composed
    for cell in list(cells.values()):
        if cell.baseline not in cells:
            cells[cell.baseline] = cell_of(composer.job(_baseline_overrides(cell)), composer.config_dir)
    return sorted(cells.values(), key=lambda cell: not cell.is_baseline)


def cell_of(job: Job, config_dir: str | None) -> Cell:
    """The cell of one composed configuration. Raises UsageError for an impossible value."""
    recipe, measure = recipe_of(job.values), measure_of(job.values)
    _check_target(job)

    def question(asked: Recipe) -> str:
        settings = dataclasses.asdict(measure)
        return sha256_of({"recipe": asked.canonical(), "task": job.values["task"], "measure": settings})

    return Cell(
        name=_name(job.choices["task"], recipe),
        recipe=recipe,
        measure=measure,
        job=job,
        question=question(recipe),
        baseline=question(dataclasses.replace(recipe, method="fp32", backend=recipe.backend.baseline)),
        command=_command(job, recipe, config_dir),
    )


def _check_target(job: Job) -> None:
    """A task must name its function; whether the function exists is seen when it is imported, in a child."""
    task, name = job.values["task"], job.choices["task"]
    if not isinstance(task, dict) or not isinstance(task.get("_target_"), str):
        raise UsageError(f"task={name}: its YAML lacks _target_, the function that returns the task")
    module = task["_target_"].partition(".")[0]
    if module != "tasks" and importlib.util.find_spec(module) is None:
        raise UsageError(f"task={name}: no module {module!r} here or installed (_target_: {task['_target_']})")


def identify(cells: list[Cell], prepared: Mapping[str, Prepared]) -> list[Cell]:
    """The cells with their hashes, as far as their tasks are prepared."""
    sources: dict[tuple[str, str], str] = {}
    known: dict[str, Cell] = {}
    for cell in cells:
        if cell.task_id in prepared:
            backend = cell.recipe.backend
            place = cell.task_id, backend.evaluate
            if place not in sources:
                modules = type(backend).__module__, backend.evaluate.partition(":")[0]
                sources[place] = identity.sources_hash(cell.task, *modules)
            known[cell.question] = _identified(cell, prepared[cell.task_id], sources[place])
    keys = {question: cell.key for question, cell in known.items()}
    found = (known.get(cell.question, cell) for cell in cells)
    return [dataclasses.replace(cell, baseline_key=keys.get(cell.baseline, "")) for cell in found]


def _identified(cell: Cell, prepared: Prepared, sources: str) -> Cell:
    settings = dataclasses.asdict(cell.measure)
    asked = identity.cell_hash(cell.recipe.canonical(), cell.task, settings, dataclasses.asdict(prepared))
    return dataclasses.replace(
        cell, prepared=prepared, id=asked, key=identity.key_hash(asked, sources, cell.recipe.backend.packages)
    )


def _baseline_overrides(cell: Cell) -> list[str]:
    others = [text for text in cell.job.overrides if _group(text) not in ("method", "backend")]
    return [*others, "method=fp32", f"backend={cell.recipe.backend.baseline}"]


def _name(task: str, recipe: Recipe) -> str:
    """`resnet18[ptsq-per_channel-symmetric observer=mse]`: the main axes, then what differs from the defaults."""
    names = recipe.names()
    main = "-".join(name for axis in MAIN_AXES if (name := names[axis]))
    chosen = {**names, **{name: recipe.canonical()[name] for name in CALIBRATION}}
    rest = [name for name in chosen if name not in MAIN_AXES and chosen[name] not in (None, DEFAULTS[name])]
    return f"{task}[{' '.join([main, *(f'{name}={chosen[name]}' for name in rest)])}]"


def _command(job: Job, recipe: Recipe, config_dir: str | None) -> str:
    """The command line that runs this cell alone, finished or not."""
    usual = {**DEFAULTS, "task": None, "method": None, "measure": "default"}
    groups = ["task", *(axis for axis in AXES if recipe.applies(axis)), "measure"]
    words = [f"{group}={job.choices[group]}" for group in groups if job.choices[group] != usual[group]]
    values = [text for text in job.overrides if text.partition("=")[0] not in (*groups, *AXES, "+sweep", *RUN_VALUES)]
    values = [text for text in values if _group(text) not in (*AXES, *CALIBRATION) or recipe.applies(_group(text))]
    results = [] if job.values["results"] == "results" else [f"results={job.values['results']}"]
    folder = [] if config_dir is None else ["--config-dir", config_dir]
    return shlex.join(["python", "-m", "qbench", *folder, *words, *values, *results, "force=true"])


def _group(override: str) -> str:
    """`observer.percentile=99` -> `observer`."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0]
