"""What the plugin asks: which cells there are, what was measured, what to print. Composes with hydra, at first use."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.config import UsageError
from qbench.gate import report
from qbench.gate.base import BaseSide, commit, share_cache
from qbench.gate.limits import parse
from qbench.gate.run import accept, orphans, run
from qbench.gate.settings import TIME_LIMIT_S, Settings
from qbench.gate.side import Side
from qbench.gate.verdict import FAILED, LIMIT, Outcome

if TYPE_CHECKING:
    import pytest


class GateSession:
    """One run of pytest with --qbench."""

    def __init__(self, config: pytest.Config) -> None:
        """From the options. Raises UsageError or ValueError, with one line, for an impossible one."""

        def chosen(name: str) -> str:
            return str(config.getoption(f"qbench_{name}") or config.getini(f"qbench_{name}"))

        self._root = config.rootpath
        results = from_here(self._root / chosen("results"))
        baseline = from_here(self._root / chosen("baseline")) if chosen("baseline") else results / "baseline"
        limits = [parse(line) for line in [*config.getini("qbench_limits"), *config.getoption("qbench_limit")]]
        words = shlex.split(chosen("sweep"))
        update, seconds = config.getoption("qbench_update"), _seconds(chosen("time_limit") or str(TIME_LIMIT_S))
        self.settings = Settings(results, baseline, " ".join(words), limits, update, time_limit_s=seconds)
        self.strict: bool = config.getoption("qbench_strict")
        self.outcomes: dict[str, Outcome] = {}  # of the sweep's cells
        self.checks: dict[str, Outcome] = {}  # of the fixture's
        self.accepted: dict[str, str] = {}  # by cell, what became of its baseline
        self._place = results / "gate"  # a results folder of its own: the gate's records are no cells of a sweep
        self._error: UsageError | None = None
        self._overrides = [word if "=" in word else f"+sweep={word}" for word in words]
        self._config_dir = chosen("config_dir") or None
        self._base: str | None = config.getoption("qbench_base")
        self._reports: list[str] = config.getoption("qbench_report")
        self._names: list[str] = []
        if self._base and self.settings.update:
            raise UsageError("--qbench-base compares with a revision, --qbench-update writes files: give one of them")
        if self._base:
            commit(self._base, self._root)
        if str(self._root) not in sys.path:
            sys.path.insert(0, str(self._root))  # where a user's tasks are, as with python -m qbench

    def names(self) -> list[str]:
        """The cells of the sweep, fp32 first. Raises UsageError."""
        if not self._names:
            self._names = [cell.name for cell in self._side(self._overrides).plan()]
        return self._names

    def measure(self, names: Sequence[str]) -> None:
        """Measure the cells of these names, once. Raises UsageError; the same one again when it is asked again."""
        if self._error is not None:
            raise self._error
        if not set(names) <= set(self.outcomes):
            try:
                found = self._run(self._overrides, names, self.settings, self._base)
            except UsageError as error:
                self._error = error
                raise
            self._keep(self.outcomes, found, self.settings)

    def check(self, overrides: Sequence[str], limits: Sequence[str]) -> list[Outcome]:
        """Measure the quantized cells of a command line; with limits of its own nothing is compared or accepted.

        Raises UsageError, ValueError for a wrong limit.
        """
        own = [parse(limit) for limit in limits]
        if relative := [str(limit) for limit in own if not limit.absolute]:
            raise UsageError(f"mark qbench: {relative[0]}: give an absolute limit, such as speedup='>=1.5'")
        update = None if own else self.settings.update
        everywhere = [*self.settings.limits, *own]
        settings = dataclasses.replace(self.settings, limits=everywhere, baselines=not own, update=update, sweep="")
        cells = self._side(overrides).plan()
        names = [cell.name for cell in cells if not cell.is_baseline] or [cell.name for cell in cells]
        found = self._run(overrides, names, settings, None if own else self._base)
        self._keep(self.checks, found, settings)
        return found

    def outcome(self, name: str) -> Outcome:
        """Of a measured cell."""
        return self.outcomes[name]

    def refuses(self, outcome: Outcome) -> bool:
        """Is the cell red? What has just become its baseline cannot be worse than it, but it can fail."""
        red = outcome.red(self.strict)
        if outcome.name in self.accepted:
            red = [verdict for verdict in red if verdict.word in (FAILED, LIMIT)]
        return bool(red)

    def explain(self, outcome: Outcome) -> str:
        """The text of a red test."""
        return report.failure(outcome, self.strict)

    def summary(self) -> list[str]:
        """The table, what was accepted, and the reports that were asked for, which are written."""
        found = [*self.outcomes.values(), *self.checks.values()]
        judged = [outcome for outcome in found if outcome.name not in self.accepted]
        lines = [*report.table(judged), *report.orphan_lines(self.orphans(), self.settings.baseline)]
        lines += [f"accepted  {name}: {text}" for name, text in self.accepted.items()]
        for kind in self._reports:
            path = self.settings.results / f"gate.{kind}"
            report.write(path, found, self.orphans())
            lines.append(f"report: {path}")
        return lines

    def orphans(self) -> list[str]:
        """Baselines of the sweep without a cell."""
        return orphans(self._names, self.settings) if self._names else []

    def close(self) -> None:
        """End the processes that wait for work."""
        if "qbench.workers" in sys.modules:
            from qbench import workers

            workers.stop()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One gate measures at a time: the cells of two would share folders."""
        self._place.mkdir(parents=True, exist_ok=True)
        with (self._place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _keep(self, into: dict[str, Outcome], found: Sequence[Outcome], settings: Settings) -> None:
        if settings.update:
            self.accepted |= accept(found, settings)
        into |= {outcome.name: outcome for outcome in found}

    def _side(self, overrides: Sequence[str]) -> Side:
        folder = None if self._config_dir is None else str(from_here(self._root / self._config_dir))
        return Side(overrides, folder, self._place, self.settings.sweep)

    def _run(
        self, overrides: Sequence[str], names: Sequence[str], settings: Settings, revision: str | None
    ) -> list[Outcome]:
        from qbench import results
        from qbench.progress import Progress

        side, progress, started = self._side(overrides), Progress(), time.monotonic()
        side.sweep, side.say = settings.sweep, progress.say
        beside = f" beside {revision}" if revision else ""
        print(f"\nqbench: measuring {len(names)} cells{beside}", file=sys.stderr, flush=True)
        progress.begin("gate")
        share_cache(self._place, settings.results)

        def at(revision: str) -> BaseSide:
            return BaseSide(revision, self._root, overrides, self._config_dir, settings.results, settings.sweep)

        base = at(revision) if revision else None
        try:
            with self._alone(), results.claim(self._place):
                outcomes = run(side, names, settings, base, at)
        finally:
            if base is not None:
                base.close()
        progress.end()
        print(f"qbench: measured in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return outcomes


def _seconds(text: str) -> float:
    """Raises ValueError where it is no number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 1e6:
            return seconds
    raise ValueError(f"--qbench-time-limit={text}: give seconds, 300 say")


def from_here(path: Path) -> Path:
    """Relative to the working directory where it lies in it: what is printed is short, and true when pasted."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
