"""A gate run: every cell quantized, scored, weighed, and timed in rounds of fresh processes; then all are judged."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qbench import cell as cells_module
from qbench.cell import finish
from qbench.config import UsageError
from qbench.gate import judge, verdict
from qbench.gate.base import BaseSide
from qbench.gate.baseline import TELLING, Baseline, BaselineError, file_name, read
from qbench.gate.judge_speed import SpeedTest, placed
from qbench.gate.limits import for_cell
from qbench.gate.sampling import Sampling
from qbench.gate.settings import Settings
from qbench.gate.side import Side
from qbench.gate.verdict import Outcome
from qbench.workers import WorkerError

CANDIDATE = "baseline.json"  # beside the record: what --qbench-update accepts
PEAK, REWEIGHED = "peak_memory_bytes", 2


def run(
    side: Side,
    names: Sequence[str],
    settings: Settings,
    base: BaseSide | None = None,
    at: Callable[[str], BaseSide] | None = None,
) -> list[Outcome]:
    """Measure the cells of these names and judge each: against its baseline, or the base's measurements beside it.

    `at` makes the side of a revision; without it nothing is measured beside that of a baseline.
    """
    if base is not None:
        base.begin(names)
    side.begin(names)
    stored = {name: None if base is not None else _stored(name, settings) for name in side.works}
    sampling = Sampling(side, stored, settings, base, at)
    sampling.first()
    sampling.again()
    if base is not None:
        sampling.stored |= base.baselines(list(side.works))
    tests = {
        key: test if key[0] in sampling.confirmed else dataclasses.replace(test, level=0.0)
        for key, test in sampling.judged().items()
    }
    for name in side.works:
        _weigh_again(side, name, sampling.stored[name], settings)
    return [
        _outcome(side, name, sampling.stored[name], {m: t for (n, m), t in tests.items() if n == name}, settings, base)
        for name in side.works
    ]


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
        moved = isinstance(stored, Baseline) and judge.memory_moved(stored, now, for_cell(settings.limits, name))
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


def _outcome(
    side: Side,
    name: str,
    stored: Baseline | BaselineError | None,
    tests: Mapping[str, SpeedTest],
    settings: Settings,
    base: BaseSide | None,
) -> Outcome:
    """The cell's record, the baseline that it would make beside it, and the verdicts."""
    work, now, beside = side.works[name], side.baseline(name), base is not None
    assert now is not None
    record = cells_module.record_of(work) if work.cell.is_baseline else finish(work)
    limits, disturbed = for_cell(settings.limits, name), "disturbed" in record.notes
    wanted = settings.baselines and not beside
    said = judge.judge(stored, now, limits, tests, disturbed, wanted)
    slower = [v for v in said if v.word == verdict.WORSE and v.metric == "speedup"]  # operations are timed at batch 1
    if isinstance(now, Baseline):
        if slower or settings.update:
            now = dataclasses.replace(now, operations=side.operations(name))
        if slower and base is not None and isinstance(stored, Baseline):
            with contextlib.suppress(UsageError):  # it only tells where to look
                stored = dataclasses.replace(stored, operations=base.operations(name))
        if isinstance(stored, Baseline):
            said = [placed(v, stored, now) if v in slower else v for v in said]
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
        return "new; " + ", ".join(f"{name} {judge.shown(name, now.metrics[name], now.score)}" for name in told)
    moved = [name for name in told if before.metrics.get(name) != now.metrics[name]]
    first = now.history[0]["metrics"] if len(now.history) > 1 else {}

    def line(name: str) -> str:
        sides = [
            judge.shown(name, value, now.score) for value in (before.metrics.get(name, math.nan), now.metrics[name])
        ]
        since = f" (first {judge.shown(name, first[name], now.score)})" if name in first else ""
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
