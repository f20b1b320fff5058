"""From a command line to a table: plan the cells, prepare their tasks, run what is not finished, show what came out."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbench import interrupts, report, results, tracking
from qbench.cell import answer, together
from qbench.compose import Composer
from qbench.config import UsageError, instantiate
from qbench.plan import Cell, identify, plan
from qbench.preparation import prepare_tasks, remembered_tasks
from qbench.progress import Pace, Progress, duration
from qbench.record import Record

OK, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Options:
    """How to run: where results go, whether finished cells run again, whether anything runs at all."""

    results: Path
    force: bool
    dry_run: bool
    sweep: str  # its name in the MLflow store, the same when it is resumed
    page: Callable[[list[Record], Path], list[Path]] | None = None  # writes the sweep's page, which comes first


def run_sweep(composer: Composer) -> int:
    """Run each cell that a command line asks for and that is not finished, and show them all. Returns the exit code."""
    cells = plan(composer)
    options = options_of(cells)
    with results.claim(options.results):
        if options.dry_run:
            notify(composer)
            return list_cells(identify(cells, remembered_tasks(cells, options.results)), options)
        tracking.check_store(options.results)
        with ThreadPoolExecutor(1) as aside:  # MLflow takes seconds to load: let it, while children prepare the tasks
            store = aside.submit(tracking.prepare_store, options.results)
            cells = identify(cells, prepare_tasks(cells, options.results, Progress()))
            with interrupts.welcome():
                store.result()
        notify(composer)
        todo = [cell for cell in cells if options.force or not is_finished(cell, options)]
        try:
            announce(cells, todo)
            run_cells(todo, composer, options)
            interrupts.go_on()
        except KeyboardInterrupt:
            finished = sum(is_finished(cell, options) for cell in cells)
            print(f"\n{finished} of {len(cells)} cells are finished; the same command goes on", file=sys.stderr)
            raise
        return show(cells, options)


def notify(composer: Composer) -> None:
    """Say, once it is sure that something runs, what the user should know of it."""
    for notice in composer.notices:
        print(f"qbench: {notice}", file=sys.stderr)


def options_of(cells: Sequence[Cell]) -> Options:
    """The settings that the whole command line shares. Raises UsageError for an impossible value."""
    values, choices = cells[-1].job.values, cells[-1].job.choices
    for name in ("force", "dry_run"):
        if not isinstance(values[name], bool):
            raise UsageError(f"{name}={values[name]}: give true or false")
    if not isinstance(values["results"], str) or not values["results"]:
        raise UsageError(f"results={values['results']}: give a folder")
    measure = "" if choices["measure"] == "default" else f"-{choices['measure']}"
    name, page = choices.get("sweep", "cells") + measure, page_of(values["page"])
    return Options(Path(values["results"]), values["force"], values["dry_run"], name, page)


def page_of(node: Any) -> Callable[[list[Record], Path], list[Path]] | None:
    """The function that writes a sweep's page, with its options. Raises UsageError before anything runs."""
    if node is None:
        return None
    if not isinstance(node, dict) or "_target_" not in node:
        raise UsageError(f"page={node}: give null, or _target_ (a function of the records and the results folder)")
    page: Callable[[list[Record], Path], list[Path]] = instantiate({**node, "_partial_": True})
    return page


def is_finished(cell: Cell, options: Options) -> bool:
    """Has this very answer been recorded? What failed or was skipped is tried again."""
    record = results.read_finished(options.results, cell.key) if cell.key else None
    return record is not None and record.status == "ok"


def announce(cells: Sequence[Cell], todo: Sequence[Cell]) -> None:
    """Say what is going to happen."""
    if not todo:
        print(f"nothing to do: all {len(cells)} cells are finished (force=true runs them again)", flush=True)
        return
    first = ", ".join(cell.name for cell in todo if cell.is_baseline)
    order = f"; {first} first, the others are compared with it" if first and len(todo) > 1 else ""
    print(f"{len(cells)} cells, {len(cells) - len(todo)} finished, {len(todo)} to run{order}", flush=True)


def run_cells(todo: Sequence[Cell], composer: Composer, options: Options) -> None:
    """Run cells through Hydra's launcher, all fp32 cells before those that are compared with them."""
    groups = together(todo)
    run = RunCells({group[0].job.overrides: group for group in groups}, todo, options, os.getpid())
    baselines = sum(group[0].is_baseline for group in groups)
    for first, part in (0, groups[:baselines]), (baselines, groups[baselines:]):
        if part:
            composer.launch([group[0].job.overrides for group in part], run, first)


@dataclass(frozen=True)
class RunCells:
    """What a launcher calls for a group of cells, by its first: answers them and says so; failures become records."""

    groups: Mapping[tuple[str, ...], Sequence[Cell]]
    cells: Sequence[Cell]
    options: Options
    parent: int

    def __call__(self, overrides: tuple[str, ...]) -> None:
        interrupts.go_on()
        group = self.groups[overrides]
        number = self.cells.index(group[0])
        places = [f"[{number + i + 1}/{len(self.cells)}]" for i in range(len(group))]
        progress = Progress()
        names = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
        progress.begin(f"{places[0]} {names}", self._rest(self.cells[number:]))
        for place, record in zip(places, answer(group, self.options.results, progress.say), strict=True):
            progress.end(f"{place} {report.one_line(record)}")
            if os.getpid() == self.parent:  # else a launcher has it run elsewhere, and the parent logs it at the end
                self._log(record)

    def _log(self, record: Record) -> None:
        try:
            tracking.log(record, self.options.results, self.options.sweep)
        except tracking.TrackingError as error:
            print(f"qbench: not logged yet: {error}", file=sys.stderr)

    def _rest(self, cells: Sequence[Cell]) -> str:
        expected = Pace(results.newest_records(self.options.results)).expect(cells)
        return f"{len(cells)} left" + ("" if expected is None else f", about {duration(expected)}")


def list_cells(cells: Sequence[Cell], options: Options) -> int:
    """Print which cells there are, which are finished, and how long the others will take."""
    todo = [cell for cell in cells if options.force or not is_finished(cell, options)]
    pace = Pace(results.newest_records(options.results))
    for cell in cells:
        expected = pace.expect([cell])
        seconds = "" if expected is None else f"  about {duration(expected)}"
        print(f"to do  {cell.name}{seconds}" if cell in todo else f"done   {cell.name}")
    total = pace.expect(todo)
    estimate = "no estimate before a first cell" if total is None else f"about {duration(total)}"
    print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to do" + (f": {estimate}" if todo else ""))
    return OK


def show(cells: Sequence[Cell], options: Options) -> int:
    """Log what the store lacks, write the summary and the sweep's page, print the table and where to look further.

    The exit code tells of failures.
    """
    found = (results.read_finished(options.results, cell.key) for cell in cells)
    records = [record for record in found if record]
    log_missing(records, options)
    report.write_summary(_alike(cells, options), options.results)
    print(report.table(records))
    if options.page:
        print(f"page: {options.page(records, options.results)[0]}")
    print(f"mlflow ui --backend-store-uri {tracking.store_uri(options.results)}")
    print(tracking.deep_link(options.results, options.sweep))
    return tell_failures([record for record in records if record.status == "failed"])


def _alike(cells: Sequence[Cell], options: Options) -> list[Record]:
    """All records of the folder that were measured as these cells are: what one table can hold."""
    measures = [dataclasses.asdict(cell.measure) for cell in cells]
    return [r for r in results.newest_records(options.results) if r.details.get("measure") in measures]


def tell_failures(failed: Sequence[Record]) -> int:
    """One line for each cell that failed by itself: why, where its log is, how to run it alone."""
    for record in failed:
        if not record.details.get("follows_from_fp32"):
            more = f"log: {record.details['log']}; again: {record.details['command']}"
            print(f"qbench: {record.cell_name} failed: {record.error}; {more}", file=sys.stderr)
    return MISUSE if any(record.details.get("misuse") for record in failed) else FAILED if failed else OK


def log_missing(records: Sequence[Record], options: Options) -> None:
    """Bring the MLflow store up to the records: those that it lacks, and the saved view."""
    logged = tracking.logged_keys(options.results, options.sweep)
    for record in records:
        interrupts.go_on()
        if record.key not in logged:
            tracking.log(record, options.results, options.sweep)
    tracking.save_view(records, options.results, options.sweep)
