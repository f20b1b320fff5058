"""A gate run: every cell quantized, scored and weighed, all timed in rounds of fresh processes, then judged together.

The rounds of the tasks take turns, so that what drifts on a machine reaches all of them. Sampling stops when the
intervals are narrow, never because of what they say; what looks slower or faster is timed as often again, once, and
judged on all of it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench import cell as cells_module
from qbench import results
from qbench.cell import Work, begin, finish, time_once
from qbench.gate import speed, verdict
from qbench.gate.baseline import TELLING, Baseline, BaselineError, file_name, read
from qbench.gate.limits import Limit, for_cell
from qbench.gate.speed import SpeedChange
from qbench.gate.verdict import Outcome, Verdict
from qbench.plan import Cell
from qbench.sweep import together
from qbench.workers import WorkerError

Say = Callable[[str], None]
CANDIDATE = "baseline.json"  # beside the record: what --qbench-update accepts
MOVED = (verdict.WORSE, verdict.BETTER)


@dataclass(frozen=True)
class Settings:
    """Where results and baselines lie, what is allowed, and how long sampling may take.

    `update` is None, `new` or `all`: which baselines are written. With `baselines` False only absolute limits count.
    """

    results: Path
    baseline: Path
    sweep: str
    limits: Sequence[Limit] = ()
    update: str | None = None
    baselines: bool = True
    time_limit_s: float = 150.0


def run(cells: Sequence[Cell], asked: Iterable[str], settings: Settings, say: Say) -> list[Outcome]:
    """Measure the cells of these names and judge each against its baseline.

    `cells` are identified; an fp32 cell that is not asked for, but that others are compared with, is measured where no
    record of it is finished.
    """
    names = set(asked)
    works = []
    for cell in cells:
        if cell.name in names:
            works.append(_begin(cell, settings, say))
        elif cell.is_baseline and results.read_finished(settings.results, cell.key) is None:
            _begin(cell, settings, say)
    stored = {work.cell.name: _stored(work.cell, settings) for work in works}
    timed = [work for work in works if work.error is None and not work.cell.is_baseline]
    sampling = _Sampling(timed, stored, settings, say)
    if timed:
        sampling.first()
        sampling.again()
    changes, levels = sampling.judged()
    for work in timed:
        _weigh_again(work, stored[work.cell.name], settings, say)
    return [_outcome(work, stored[work.cell.name], changes, levels, settings) for work in works]


def _begin(cell: Cell, settings: Settings, say: Say) -> Work:
    """Quantized and scored; an fp32 cell, which others are compared with, is finished at once, after one timing."""
    work = begin(cell, settings.results, lambda text: say(f"{cell.name}: {text}"))
    if cell.is_baseline:
        time_once([work], 0, settings.results, say)
        finish(work)
    return work


def _weigh_again(work: Work, stored: Baseline | BaselineError | None, settings: Settings, say: Say) -> None:
    """What seems to take more memory is weighed once more; the smaller counts."""
    name, metrics = "peak_memory_bytes", work.weighed.get("metrics", {})
    if work.error is not None or not isinstance(stored, Baseline) or name not in metrics:
        return
    now = _as_baseline(work, settings)
    found = verdict.exact(stored, now, for_cell(settings.limits, work.cell.name))
    if any(v.metric == name and v.word == verdict.WORSE for v in found):
        with contextlib.suppress(WorkerError):  # the first weighing stands
            metrics[name] = min(metrics[name], cells_module.weigh(work, say)["metrics"][name])


def _as_baseline(work: Work, settings: Settings) -> Baseline:
    """The baseline that a cell's measurements would make."""
    return Baseline.of(cells_module.record_of(work), work.cell.name, settings.sweep)


def _stored(cell: Cell, settings: Settings) -> Baseline | BaselineError | None:
    """The cell's baseline, None where there is none, the error of a damaged one."""
    path = settings.baseline / file_name(cell.name)
    if not settings.baselines or not path.exists():
        return None
    try:
        return read(path)
    except BaselineError as error:
        return error


class _Sampling:
    """The timing processes of a run, as many as the intervals need."""

    def __init__(
        self, works: Sequence[Work], stored: Mapping[str, Baseline | BaselineError | None], settings: Settings, say: Say
    ) -> None:
        self.settings, self.stored, self.say = settings, stored, say
        by_cell = {work.cell.question: work for work in works}
        self.groups = [[by_cell[cell.question] for cell in group] for group in together([w.cell for w in works])]
        self.started = time.monotonic()

    def first(self) -> None:
        """LEAST processes a cell, then more while an interval is wide and there is time."""
        goal = speed.MOST if self.settings.update else speed.LEAST
        for index in range(speed.MOST):
            if index >= goal and (not self._wide() or self._late()):
                break
            for group in self.groups:
                if index == 0 or group[0].cell.recipe.latency_is_result:
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
            if names := [work.cell.name for work in group if work.cell.name in moved]:
                self.say(f"{names[0]} seems to have changed its speed: measuring once more")
                done = len(group[0].timings)
                for index in range(done, 2 * done):
                    self._time(group, index)

    def judged(self) -> tuple[dict[tuple[str, str], SpeedChange], dict[tuple[str, str], float]]:
        """By cell and metric the change of speed, and the level at which it counts: corrected over all of the run."""
        works = [work for group in self.groups for work in group if work.error is None]
        changes = {(w.cell.name, metric): change for w in works for metric, change in self._changes(w).items()}
        levels = speed.holm({f"{name}\n{metric}": change.p for (name, metric), change in changes.items()})
        return changes, {key: levels["\n".join(key)] for key in changes}

    def _time(self, group: list[Work], index: int) -> None:
        place = f"timing {group[0].cell.job.choices['task']}"
        time_once(group, index, self.settings.results, lambda text: self.say(f"{place}: process {index + 1}"))

    def _changes(self, work: Work) -> dict[str, SpeedChange]:
        before = self.stored[work.cell.name]
        if not isinstance(before, Baseline) or not work.timings or work.error is not None:
            return {}
        limits = for_cell(self.settings.limits, work.cell.name)
        return verdict.speed_changes(before, _as_baseline(work, self.settings), limits)

    def _wide(self) -> bool:
        works = [work for group in self.groups for work in group]
        return any(
            speed.wide(change, self._delta((work.cell.name, metric)))
            for work in works
            for metric, change in self._changes(work).items()
        )

    def _delta(self, key: tuple[str, str]) -> float:
        return verdict.delta(key[1], for_cell(self.settings.limits, key[0]))

    def _late(self) -> bool:
        return time.monotonic() - self.started > self.settings.time_limit_s


def _outcome(
    work: Work,
    stored: Baseline | BaselineError | None,
    changes: Mapping[tuple[str, str], SpeedChange],
    levels: Mapping[tuple[str, str], float],
    settings: Settings,
) -> Outcome:
    """The cell's record, the baseline that it would make, and the verdicts."""
    name, limits = work.cell.name, for_cell(settings.limits, work.cell.name)
    record = cells_module.record_of(work) if work.cell.is_baseline else finish(work)

    def outcome(*verdicts: Verdict) -> Outcome:
        return Outcome(name, list(verdicts), work.cell.command, str(work.folder), dict(record.metrics))

    try:
        now = Baseline.of(record, name, settings.sweep)
    except BaselineError as error:
        return outcome(Verdict("cell", verdict.FAILED, str(error)))
    now.after(stored if isinstance(stored, Baseline) else None).write(work.folder / CANDIDATE)
    absolute = verdict.absolute(now, limits)
    if isinstance(stored, BaselineError):
        return outcome(*absolute, Verdict("baseline", verdict.STALE, str(stored)))
    if isinstance(stored, Baseline):
        own = {metric: change for (cell, metric), change in changes.items() if cell == name}
        own_levels = {metric: levels[name, metric] for metric in own}
        exact = verdict.exact(stored, now, limits)
        speeds = verdict.of_speed(stored, now, own, own_levels, limits, "disturbed" in record.notes)
        return outcome(*absolute, *exact, *speeds)
    if settings.baselines:
        absolute.append(Verdict("baseline", verdict.MISSING, "nothing to compare with"))
    return outcome(*absolute)


def accept(outcomes: Iterable[Outcome], settings: Settings) -> list[str]:
    """Write what a run measured as baselines: those that are missing or, with update `all`, every one.

    Returns what changed, a line each. A failed cell has no baseline to write; its line says so.
    """
    lines = []
    for outcome in outcomes:
        path = settings.baseline / file_name(outcome.name)
        if outcome.word == verdict.FAILED:
            lines.append(f"{outcome.name}: failed, not accepted")
        elif not path.exists() or settings.update == "all":
            before = None
            with contextlib.suppress(BaselineError):
                before = read(path) if path.exists() else None
            now = read(Path(outcome.folder) / CANDIDATE)
            now.write(path)
            lines.append(f"{outcome.name}: {_what_changed(before, now)}")
    return lines


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
