"""What the plugin asks: which cells there are, what was measured, what to print. Composes with hydra, at first use."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.config import UsageError
from qbench.gate import report
from qbench.gate.base import BaseSide, commit
from qbench.gate.limits import parse
from qbench.gate.run import Settings, Side, accept, orphans, run
from qbench.gate.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import pytest

OUTCOMES = "gate-{run}.json"


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
        sweep = next((word for word in words if "=" not in word), "cells")
        self.settings = Settings(results, baseline, sweep, limits, config.getoption("qbench_update"))
        self.strict: bool = config.getoption("qbench_strict")
        self.outcomes: dict[str, Outcome] = {}
        worker: dict[str, Any] = getattr(config, "workerinput", {})
        self.run: str = worker.get("testrunuid", str(os.getpid()))  # a controller of pytest-xdist learns it later
        self._overrides = [word if "=" in word else f"+sweep={word}" for word in words]
        self._config_dir = chosen("config_dir") or None
        self._base: str | None = config.getoption("qbench_base")
        self._reports: list[str] = config.getoption("qbench_report")
        self._accepted: list[str] = []
        self._names: list[str] = []
        if self._base and self.settings.update:
            raise UsageError("--qbench-base compares with a revision, --qbench-update writes files: give one of them")
        if self._base:
            commit(self._base, self._root)

    def names(self) -> list[str]:
        """The cells of the sweep, fp32 first. Raises UsageError."""
        if not self._names:
            self._names = [cell.name for cell in self._side(self._overrides).plan()]
        return self._names

    def measure(self, names: Sequence[str]) -> None:
        """Measure the cells of these names, once: of several processes of pytest-xdist the first does it for all."""
        if set(names) <= set(self.outcomes):
            return
        self.settings.results.mkdir(parents=True, exist_ok=True)
        with (self.settings.results / ".gate.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.collect_outcomes()
            if not set(names) <= set(self.outcomes):
                self._keep(self._run(self._overrides, names, self.settings))

    def check(self, overrides: Sequence[str], limits: Sequence[str]) -> list[Outcome]:
        """Measure the quantized cells of a command line; with limits of its own no baseline is asked for."""
        own = [parse(limit) for limit in limits]
        settings = dataclasses.replace(self.settings, limits=[*self.settings.limits, *own], baselines=not own)
        cells = self._side(overrides).plan()
        names = [cell.name for cell in cells if not cell.is_baseline] or [cell.name for cell in cells]
        outcomes = self._run(overrides, names, settings)
        self._keep(outcomes)
        return outcomes

    def outcome(self, name: str) -> Outcome:
        """Of a measured cell."""
        return self.outcomes[name]

    def explain(self, outcome: Outcome) -> str:
        """The text of a red test."""
        return report.failure(outcome, self.strict)

    def summary(self) -> list[str]:
        """The table, what was accepted, and the reports that were asked for, which are written."""
        found = list(self.outcomes.values())
        left = orphans(self._names, self.settings) if self._names else []
        lines = [*report.table(found), *report.orphan_lines(left, self.settings.baseline)]
        lines += [f"accepted  {line}" for line in self._accepted]
        for kind in self._reports:
            path = self.settings.results / f"gate.{kind}"
            report.write(path, found, left)
            lines.append(f"report: {path}")
        return lines

    def collect_outcomes(self) -> None:
        """Read what other processes of this run have measured."""
        path = self._path()
        if path.exists():
            content = json.loads(path.read_text())
            self._accepted = content["accepted"]
            self._names = content["names"]
            for raw in content["outcomes"]:
                verdicts = [Verdict(**one) for one in raw.pop("verdicts")]
                self.outcomes[raw["name"]] = Outcome(verdicts=verdicts, **raw)

    def close(self) -> None:
        """Forget this run, end the fork server."""
        if not os.environ.get("PYTEST_XDIST_WORKER"):
            self._path().unlink(missing_ok=True)
        if "qbench.workers" in sys.modules:
            from qbench import workers

            workers.stop()

    def _keep(self, outcomes: Sequence[Outcome]) -> None:
        from qbench.record import write_atomic

        if self.settings.update:
            self._accepted += accept(outcomes, self.settings)
        self.outcomes |= {outcome.name: outcome for outcome in outcomes}
        content = {
            "names": self._names,
            "accepted": self._accepted,
            "outcomes": [dataclasses.asdict(outcome) for outcome in self.outcomes.values()],
        }
        write_atomic(self._path(), json.dumps(content))

    def _path(self) -> Path:
        return self.settings.results / OUTCOMES.format(run=self.run)

    def _side(self, overrides: Sequence[str]) -> Side:
        folder = None if self._config_dir is None else str(from_here(self._root / self._config_dir))
        return Side(overrides, folder, self.settings.results, self.settings.sweep)

    def _run(self, overrides: Sequence[str], names: Sequence[str], settings: Settings) -> list[Outcome]:
        from qbench.progress import Progress

        side, progress, started = self._side(overrides), Progress(), time.monotonic()
        side.say = progress.say
        beside = f" beside {self._base}" if self._base else ""
        print(f"\nqbench: measuring {len(names)} cells{beside}", file=sys.stderr, flush=True)
        progress.begin("gate")
        base = self._base_side(overrides)
        try:
            outcomes = run(side, names, settings, base)
        finally:
            if base is not None:
                base.close()
        progress.end()
        print(f"qbench: measured in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return outcomes

    def _base_side(self, overrides: Sequence[str]) -> BaseSide | None:
        if not self._base:
            return None
        settings = self.settings
        return BaseSide(self._base, self._root, overrides, self._config_dir, settings.results, settings.sweep)


def from_here(path: Path) -> Path:
    """Relative to the working directory where it lies in it: what is printed is short, and true when pasted."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
