"""A gate run: every cell quantized, scored and weighed, all timed in rounds of fresh processes, then judged together.

The rounds of the tasks take turns, so that what drifts on a machine reaches all of them. Sampling stops when the
intervals are narrow, never because of what they say; what looks slower or faster is timed as often again, once, and
judged on all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench import backends, results
from qbench import cell as cells_module
from qbench.cell import Work, begin, finish, time_once
from qbench.compose import Composer, close
from qbench.config import UsageError
from qbench.gate import speed, verdict
from qbench.gate.base import BaseSide
from qbench.gate.baseline import TELLING, Baseline, BaselineError, file_name, read
from qbench.gate.limits import Limit, for_cell
from qbench.gate.speed import SpeedChange
from qbench.gate.verdict import Outcome
from qbench.plan import Cell, identify, plan
from qbench.preparation import prepare_tasks
from qbench.progress import Progress
from qbench.sweep import together
from qbench.workers import WorkerError

Say = Callable[[str], None]
CANDIDATE = "baseline.json"  # beside the record: what --qbench-update accepts
PEAK, REWEIGHED = "peak_memory_bytes", 2
MOVED = (verdict.WORSE, verdict.BETTER)


@dataclass(frozen=True)
class Settings:
    """Where results and baselines lie, what is allowed, and how long sampling may take.

    `update` is None, `new` or `all`: which baselines are written. With `baselines` False only absolute limits count.
    After `time_limit_s` (twice that with a base) no more processes are added because an interval is wide.
    """

    results: Path
    baseline: Path
    sweep: str
    limits: Sequence[Limit] = ()
    update: str | None = None
    baselines: bool = True
    time_limit_s: float = 150.0


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
            for cell in identify(cells, prepare_tasks(cells, self.results, Progress())):
                asked = cell.name in names
                found = results.read_finished(self.results, cell.key) if cell.is_baseline and not asked else None
                if found is not None and found.status == "ok":
                    continue
                work = begin(cell, self.results, lambda text, name=cell.name: self.say(f"{name}: {text}"))  # type: ignore[misc]
                if cell.is_baseline:
                    time_once([work], 0, self.results, self.say)
                    finish(work)
                if asked:
                    self.works[cell.name] = work

    def groups(self) -> list[list[str]]:
        """The names of the cells that are timed together; those that failed, and fp32, are not timed."""
        timed = {w.cell.question: n for n, w in self.works.items() if w.error is None and not w.cell.is_baseline}
        tasks = list(dict.fromkeys(work.cell.task_id for work in self.works.values()))
        cells = [work.cell for work in self.works.values() if work.cell.question in timed]
        cells.sort(key=lambda cell: tasks.index(cell.task_id))
        return [[timed[cell.question] for cell in group] for group in together(cells)]

    def time(self, names: Sequence[str], index: int) -> None:
        """Time cells of one group in one more fresh process; those whose latency is no result once only."""
        works = [self.works[name] for name in names if name in self.works]
        if index == 0 or all(work.cell.recipe.latency_is_result for work in works):
            time_once(works, index, self.results, self.say)

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


def run(side: Side, names: Sequence[str], settings: Settings, base: BaseSide | None = None) -> list[Outcome]:
    """Measure the cells of these names and judge each: against its baseline, or the base's measurements beside it."""
    if base is not None:
        base.begin(names)
    side.begin(names)
    stored = {name: None if base is not None else _stored(name, settings) for name in side.works}
    sampling = _Sampling(side, stored, settings, base)
    sampling.first()
    sampling.again()
    if base is not None:
        sampling.stored |= base.baselines(list(side.works))
    changes, levels = sampling.judged()
    levels = {key: level if key[0] in sampling.confirmed else 0.0 for key, level in levels.items()}
    for name in side.works:
        _weigh_again(side, name, sampling.stored[name], settings)
    return [_outcome(side, name, sampling.stored[name], changes, levels, settings, base) for name in side.works]


def _weigh_again(side: Side, name: str, stored: Baseline | BaselineError | None, settings: Settings) -> None:
    """Peak memory REWEIGHED times more: for a baseline the median, else while it seems to have changed the nearest.

    A process takes now and then a MiB less than all others do.
    """
    work, weights = side.works[name], []
    if work.error is None and PEAK in work.weighed.get("metrics", {}):
        weights.append(work.weighed["metrics"][PEAK])
    for _ in range(REWEIGHED if weights else 0):
        now = side.baseline(name)
        if not isinstance(now, Baseline):
            return
        moved = isinstance(stored, Baseline) and verdict.memory_moved(stored, now, for_cell(settings.limits, name))
        if not moved and not settings.update:
            return
        with contextlib.suppress(WorkerError):  # what was weighed stands
            weights.append(cells_module.weigh(work, side.say)["metrics"][PEAK])
        if settings.update or not isinstance(stored, Baseline):
            work.weighed["metrics"][PEAK] = sorted(weights)[len(weights) // 2]
        else:
            work.weighed["metrics"][PEAK] = min(weights, key=lambda w: abs(w - stored.metrics[PEAK]))


def _stored(name: str, settings: Settings) -> Baseline | BaselineError | None:
    """The cell's baseline, None where there is none, the error of a damaged one."""
    path = settings.baseline / file_name(name)
    if not settings.baselines or not path.exists():
        return None
    try:
        return read(path)
    except BaselineError as error:
        return error


class _Sampling:
    """The timing processes of a run, as many as the intervals need; with a base its own in turns with them."""

    def __init__(
        self,
        side: Side,
        stored: dict[str, Baseline | BaselineError | None],
        settings: Settings,
        base: BaseSide | None,
    ) -> None:
        self.side, self.stored, self.settings, self.base = side, stored, settings, base
        self.groups = side.groups()
        self.least = max([speed.LEAST, *(cells_module.timed(work.cell).processes for work in side.works.values())])
        self.confirmed: set[str] = set()  # cells that were measured a second time: only they can be worse or better
        self.started = time.monotonic()

    def first(self) -> None:
        """As many processes as the measurement asks for, LEAST at least; more while an interval is wide and time lasts.

        Twice as many at most. Baselines, with which later runs are compared, rest on twice as many in any case.
        """
        goal = 2 * self.least if self.settings.update else self.least
        for index in range(2 * self.least):
            if index >= goal and (self._late() or not self._wide()):
                break
            for group in self.groups:
                self._time(group, index)

    def again(self) -> None:
        """As many processes once more for groups in which a cell seems to have changed: all is judged on both."""
        changes, levels = self.judged()
        moved = {
            cell
            for (cell, metric), change in changes.items()
            if speed.verdict(change, levels[cell, metric], self._delta((cell, metric))) in MOVED
        }
        for group in self.groups:
            if names := [name for name in group if name in moved]:
                self.confirmed |= set(group)
                self.side.say(f"{names[0]} seems to have changed its speed: measuring once more")
                done = len(self.side.works[names[0]].timings)
                for index in range(done, 2 * done):
                    self._time(group, index)

    def judged(self) -> tuple[dict[tuple[str, str], SpeedChange], dict[tuple[str, str], float]]:
        """By cell and metric the change of speed, and the level at which it counts: corrected over all of the run."""
        changes: dict[tuple[str, str], SpeedChange] = {}
        for name in (name for group in self.groups for name in group):
            before, now = self.stored[name], self.side.baseline(name)
            if isinstance(before, Baseline) and isinstance(now, Baseline):
                limits = for_cell(self.settings.limits, name)
                own = verdict.speed_changes(before, now, limits, self.base is not None)
                changes |= {(name, metric): change for metric, change in own.items()}
        return changes, speed.holm({key: change.p for key, change in changes.items()})

    def _time(self, group: list[str], index: int) -> None:
        """One process of a group; the base's before or after it."""
        self.side.say(f"timing {group[0].partition('[')[0]}, process {index + 1}")
        first = index % 2 == 0
        if self.base is not None and not first:
            self.base.time(group, index)
        self.side.time(group, index)
        if self.base is not None and first:
            self.base.time(group, index)
        if self.base is not None:
            self.stored |= self.base.baselines(group)

    def _wide(self) -> bool:
        return any(speed.wide(change, self._delta(key)) for key, change in self.judged()[0].items())

    def _delta(self, key: tuple[str, str]) -> float:
        return verdict.delta(key[1], for_cell(self.settings.limits, key[0]), self.base is not None)

    def _late(self) -> bool:
        sides = 1 if self.base is None else 2
        return time.monotonic() - self.started > sides * self.settings.time_limit_s


def _outcome(
    side: Side,
    name: str,
    stored: Baseline | BaselineError | None,
    changes: Mapping[tuple[str, str], SpeedChange],
    levels: Mapping[tuple[str, str], float],
    settings: Settings,
    base: BaseSide | None,
) -> Outcome:
    """The cell's record, the baseline that it would make beside it, and the verdicts."""
    work, now, beside = side.works[name], side.baseline(name), base is not None
    assert now is not None
    record = cells_module.record_of(work) if work.cell.is_baseline else finish(work)
    limits, disturbed = for_cell(settings.limits, name), "disturbed" in record.notes
    wanted = settings.baselines and not beside
    said = verdict.judge(stored, now, limits, name, changes, levels, disturbed, beside, wanted)
    slower = [v for v in said if v.word == verdict.WORSE and v.metric == "speedup"]  # operations are timed at batch 1
    if isinstance(now, Baseline):
        if slower or settings.update:
            now = dataclasses.replace(now, operations=side.operations(name))
        if slower and base is not None and isinstance(stored, Baseline):
            with contextlib.suppress(UsageError):  # it only tells where to look
                stored = dataclasses.replace(stored, operations=base.operations(name))
        if isinstance(stored, Baseline):
            said = [verdict.placed(v, stored, now) if v in slower else v for v in said]
        now.after(stored if isinstance(stored, Baseline) else None).write(work.folder / CANDIDATE)
    return Outcome(name, said, work.cell.command, str(work.folder), dict(record.metrics), beside)


def accept(outcomes: Iterable[Outcome], settings: Settings) -> dict[str, str]:
    """Write what a run measured as baselines: those that are missing or, with update `all`, every one.

    Returns what changed, by cell. A cell that failed has nothing to write.
    """
    written = {}
    for outcome in outcomes:
        path = settings.baseline / file_name(outcome.name)
        if outcome.word != verdict.FAILED and (not path.exists() or settings.update == "all"):
            before = None
            with contextlib.suppress(BaselineError):
                before = read(path) if path.exists() else None
            now = read(Path(outcome.folder) / CANDIDATE)
            now.write(path)
            written[outcome.name] = _what_changed(before, now)
    return written


def _what_changed(before: Baseline | None, now: Baseline) -> str:
    """`size_bytes 81234 bytes -> 81230 bytes, ...` of the telling metrics; and since the first baseline."""
    told = [name for name in TELLING if name in now.metrics]
    if before is None:
        return "new; " + ", ".join(f"{name} {verdict.shown(name, now.metrics[name], now.score)}" for name in told)
    moved = [name for name in told if before.metrics.get(name) != now.metrics[name]]
    first = now.history[0]["metrics"] if len(now.history) > 1 else {}

    def line(name: str) -> str:
        sides = [
            verdict.shown(name, value, now.score) for value in (before.metrics.get(name, math.nan), now.metrics[name])
        ]
        since = f" (first {verdict.shown(name, first[name], now.score)})" if name in first else ""
        return f"{name} {sides[0]} -> {sides[1]}{since}"

    return ", ".join(line(name) for name in moved) or "the same"


def orphans(names: Iterable[str], settings: Settings) -> list[str]:
    """Baselines of this sweep whose cells it no longer has, damaged ones of such names included."""
    known = {file_name(name) for name in names}
    found = []
    for path in sorted(settings.baseline.glob("*.json")):
        if path.name not in known:
            with contextlib.suppress(BaselineError):
                if read(path).sweep != settings.sweep:
                    continue
            found.append(path.name)
    return found
