"""How many timing processes a gate run takes, of which side, and what they say of each cell's speed.

Each process times all cells, so that what drifts on a machine reaches all of them. Sampling stops when the intervals
are narrow, never because of what they say. What looks slower or faster is timed once more: in turns with the revision
in which its baseline was committed, and judged on that; where git has none, as often again, and judged on all of it.
Time is kept for that: where there is a revision, more processes are taken beside it only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from qbench import cell as cells_module
from qbench.config import UsageError
from qbench.gate import speed, verdict
from qbench.gate.base import BaseSide, committed
from qbench.gate.baseline import Baseline, BaselineError, file_name
from qbench.gate.judge_speed import BASELINE, SpeedTest, corrected, speed_tests
from qbench.gate.limits import for_cell
from qbench.gate.settings import Settings
from qbench.gate.side import Side

MOVED = (verdict.WORSE, verdict.BETTER)
MOST = 20  # processes of a baseline, with which later runs are compared; and of whatever else, at most


@dataclass(frozen=True)
class Turns:
    """What the revision of a cell's baseline measured in turns with the cell's processes from `first` on."""

    revision: str
    first: int
    found: Baseline


class Sampling:
    """The timing processes of a run, as many as the intervals need; with a base its own in turns with them.

    `revisions` has the cells whose baseline is that of a revision, with which they can be measured in turns.
    """

    def __init__(
        self,
        side: Side,
        stored: dict[str, Baseline | BaselineError | None],
        settings: Settings,
        base: BaseSide | None,
        at: Callable[[str], BaseSide] | None,
    ) -> None:
        self.side, self.stored, self.settings, self.base, self.at = side, stored, settings, base, at
        self.names = side.timed()  # those of a task together
        self.least = max([speed.LEAST, *(cells_module.timed(work.cell).processes for work in side.works.values())])
        self.confirmed: set[str] = set()  # cells that were measured a second time: only they can be worse or better
        self.turns: dict[str, Turns] = {}
        self.suspected: dict[tuple[str, str], float] = {}  # the change that the first measurement saw
        self.revisions: dict[str, str] = {}
        self.started = time.monotonic()
        if base is None and at is not None and not settings.update:
            files = {name: settings.baseline / file_name(name) for name, b in stored.items() if isinstance(b, Baseline)}
            self.revisions = {name: revision for name, path in files.items() if (revision := committed(path))}

    def first(self) -> None:
        """As many processes as the measurement asks for, LEAST at least; more while an interval is wide and time lasts.

        That is where cells without a revision are concerned: the others are measured beside theirs, if at all.
        """
        self.started = time.monotonic()
        most = max(MOST, self.least)
        goal = most if self.settings.update else self.least
        alone = set(self.stored) - self.revisions.keys()
        for index in range(most):
            if index >= goal and (self._late() or not self._wide(alone)):
                break
            self._time(self.names, index, self.base)

    def again(self) -> None:
        """Measure once more what seems to have changed: in turns with its baseline's revision, where there is one.

        Else as many processes again for the cells of the same tasks, and all is judged on both.
        """
        for revision, names in self._suspects().items():
            self.side.say(f"{names[0]} seems to have changed its speed: measuring beside {revision[:12]}")
            try:
                self._in_turns(revision, names)
            except UsageError as error:
                self.side.say(str(error).removeprefix("--qbench-base: "))
                for name in set(names) - self.confirmed:
                    self.turns.pop(name, None)
                    del self.revisions[name]
        moved = {cell for (cell, _), test in self.judged().items() if cell not in self.revisions and test.word in MOVED}
        if names := [name for name in self._beside(moved) if name not in self.revisions]:
            self.confirmed |= set(names)
            self.side.say(f"{names[0]} seems to have changed its speed: measuring once more")
            done = max(len(self.side.works[name].timings) for name in moved)
            for index in range(done, 2 * done):
                self._time(names, index, self.base)

    def judged(self) -> dict[tuple[str, str], SpeedTest]:
        """By cell and metric the test of its speed, corrected over all of the run.

        Measurements in turns with a baseline's revision are a sample of their own, with a correction of their own; they
        count where they go the way that the first measurement went.
        """
        first: dict[tuple[str, str], SpeedTest] = {}
        again: dict[tuple[str, str], SpeedTest] = {}
        for name in self.names:
            turns, now, paired, than = self.turns.get(name), self.side.baseline(name), self.base is not None, BASELINE
            before = self.stored[name]
            if turns is not None and isinstance(now, Baseline):
                before, now, paired = turns.found, now.since(turns.first), True
                than = f"{turns.revision[:12]}, its baseline's revision, beside it"
            if isinstance(before, Baseline) and isinstance(now, Baseline):
                limits = for_cell(self.settings.limits, name)
                matters = speed.DELTA if paired or name in self.revisions else speed.DRIFT
                tests = speed_tests(before, now, limits, paired=paired, matters=matters, than=than)
                (first if turns is None else again).update({(name, m): test for m, test in tests.items()})
        seen = self.suspected
        return corrected(first) | {
            key: test if test.change.estimate * seen.get(key, 0.0) > 0.0 else dataclasses.replace(test, level=0.0)
            for key, test in corrected(again).items()
        }

    def _suspects(self) -> dict[str, list[str]]:
        """By revision, the cells whose speed seems to differ from its baseline's by more than what matters."""
        judged = self.judged()
        self.suspected = {key: test.change.estimate for key, test in judged.items()}
        moved = {key[0] for key, test in judged.items() if abs(test.change.estimate) > test.delta}
        found: dict[str, list[str]] = {}
        for name in (name for name in self.names if name in moved and name in self.revisions):
            found.setdefault(self.revisions[name], []).append(name)
        return found

    def _in_turns(self, revision: str, names: Sequence[str]) -> None:
        """Processes of the cells in turns with a revision's: as many as `first` takes, LEAST if time is short, or more.

        Raises UsageError.
        """
        assert self.at is not None
        begun = len(self.side.works[names[0]].timings)
        with contextlib.closing(self.at(revision)) as base:
            base.begin(names)
            for index in range(max(MOST, self.least)):
                if index >= self.least:
                    wide = self._beside([name for name in names if self._wide([name])])
                    names = [name for name in names if name in wide]
                if not names or (index >= speed.LEAST and self._late()):
                    break
                self._time(names, index, base, begun)
                for name, found in base.baselines(names).items():
                    if not isinstance(found, Baseline):
                        raise UsageError(f"{name}: revision {revision[:12]} has no such cell, or it fails there")
                    self.turns[name] = Turns(revision, begun, found)
        self.confirmed |= self.turns.keys()

    def _beside(self, names: Collection[str]) -> list[str]:
        """The cells of the same tasks, with which they share processes and fp32."""
        tasks = {self.side.works[name].cell.task_id for name in names}
        return [name for name in self.names if self.side.works[name].cell.task_id in tasks]

    def _time(self, names: Sequence[str], index: int, base: BaseSide | None, begun: int = 0) -> None:
        """One more process, `begun` others aside; the base's before or after it."""
        if base is not None and index % 2:
            base.time(names, begun + index)
        self.side.time(names, begun + index)
        if base is not None and not index % 2:
            base.time(names, begun + index)
        if self.base is not None:
            self.stored |= self.base.baselines(names)

    def _wide(self, names: Collection[str]) -> bool:
        return any(speed.wide(test.change, test.delta) for key, test in self.judged().items() if key[0] in names)

    def _late(self) -> bool:
        sides = 1 if self.base is None else 2
        return time.monotonic() - self.started > sides * self.settings.time_limit_s
