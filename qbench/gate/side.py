"""The cells of a command line as one working tree answers them: the gate's own, or that of a revision."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from qbench import backends, results
from qbench import cell as cells_module
from qbench.cell import Work, begin, finish, time_once
from qbench.compose import Composer, close
from qbench.config import UsageError
from qbench.gate.baseline import Baseline, BaselineError
from qbench.plan import Cell, identify, plan
from qbench.preparation import prepare_tasks
from qbench.progress import Progress
from qbench.workers import WorkerError

Say = Callable[[str], None]


class Side:
    """The cells of a command line as one working tree answers them: begun, timed in rounds, summed up."""

    def __init__(self, overrides: Sequence[str], config_dir: str | None, results: Path, sweep: str) -> None:
        self.overrides, self.config_dir, self.results, self.sweep = overrides, config_dir, results, sweep
        self.works: dict[str, Work] = {}
        self.say: Say = lambda text: None

    def plan(self) -> list[Cell]:
        """The cells, fp32 first; nothing is loaded or run. Raises UsageError."""
        given = [*self.overrides, f"results={self.results}", "dry_run=true"]
        commas = any("," in word for word in self.overrides)
        try:
            cells = plan(Composer(Namespace(overrides=given, multirun=commas, config_dir=self.config_dir)))
        finally:
            close()
        names = [cell.name for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"two cells are called {twice[0]}: the gate tells cells apart by their names")
        return cells

    def begin(self, names: Sequence[str]) -> None:
        """Quantize, score and weigh the cells of these names, those that the revision has.

        An fp32 cell that others are compared with is finished at once, after one timing; one that was not asked for
        only where no record of it is.
        """
        cells = self.plan()
        wanted = [cell for cell in cells if cell.name in names]
        needed = {cell.baseline for cell in wanted}
        with results.claim(self.results):
            cells = [cell for cell in cells if cell in wanted or cell.question in needed]
            cells = identify(cells, prepare_tasks(cells, self.results, Progress()))
            baselines = [cell for cell in cells if cell.is_baseline and (cell.name in names or not self._known(cell))]
            for work in (works := begin(baselines, self.results, self.say)):
                time_once([work], 0, self.results, self.say)
                finish(work)
            works += begin([cell for cell in cells if not cell.is_baseline], self.results, self.say)
            self.works = {work.cell.name: work for work in works if work.cell.name in names}

    def _known(self, cell: Cell) -> bool:
        found = results.read_finished(self.results, cell.key)
        return found is not None and found.status == "ok"

    def timed(self) -> list[str]:
        """The names of the cells to time, those of a task together; those that failed, and fp32, are not timed."""
        tasks = list(dict.fromkeys(work.cell.task_id for work in self.works.values()))
        timed = [name for name, work in self.works.items() if work.error is None and not work.cell.is_baseline]
        return sorted(timed, key=lambda name: tasks.index(self.works[name].cell.task_id))

    def time(self, names: Sequence[str], index: int) -> None:
        """Time cells in one more fresh process, in this order; those whose latency is no result once only."""
        works = [self.works[name] for name in names if name in self.works]
        works = [work for work in works if index == 0 or work.cell.recipe.latency_is_result]
        shared = [work for work in works if not work.cell.recipe.backend.alone]
        for some in [shared, *([work] for work in works if work not in shared)]:
            time_once(some, index, self.results, self.say)

    def operations(self, name: str) -> dict[str, float]:
        """Milliseconds of each operation of a cell, timed alone; empty where the engine does not run it, or cannot."""
        work = self.works[name]
        own = work.cell.recipe.backend.name == backends.native.name and not work.cell.is_baseline
        if own and work.error is None:
            with contextlib.suppress(WorkerError):  # it only tells where to look
                return cells_module.operations(work, self.say)
        return {}

    def baselines(self, names: Iterable[str]) -> dict[str, Baseline | BaselineError | None]:
        """The baselines that what was measured would make."""
        return {name: self.baseline(name) for name in names if name in self.works}

    def baseline(self, name: str) -> Baseline | BaselineError | None:
        """Of one cell: None before its first timing, the error of one that failed."""
        work = self.works[name]
        if work.error is None and not work.timings:
            return None
        try:
            return Baseline.of(cells_module.record_of(work), name, self.sweep)
        except BaselineError as error:
            return error
