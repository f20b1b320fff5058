"""What the plugin asks: which cells there are, what was measured, what to print. Composes with hydra, at first use."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.gate import report
from qbench.gate.limits import parse
from qbench.gate.run import Settings, accept, orphans, run
from qbench.gate.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import pytest

    from qbench.plan import Cell

OUTCOMES = "gate-{run}.json"


class GateSession:
    """One run of pytest with --qbench."""

    def __init__(
        self, settings: Settings, overrides: list[str], config_dir: str | None, strict: bool, run: str
    ) -> None:
        self.settings, self.strict, self.run = settings, strict, run
        self.outcomes: dict[str, Outcome] = {}
        self.accepted: list[str] = []
        self.reports: list[str] = []
        self._overrides, self._config_dir = overrides, config_dir
        self._names: list[str] = []

    @classmethod
    def of(cls, config: pytest.Config) -> GateSession:
        """From the options. Raises UsageError or ValueError, with one line, for an impossible one."""

        def chosen(name: str) -> str:
            return str(config.getoption(f"qbench_{name}") or config.getini(f"qbench_{name}"))

        results = config.rootpath / chosen("results")
        baseline = config.rootpath / chosen("baseline") if chosen("baseline") else results / "baseline"
        limits = [parse(line) for line in [*config.getini("qbench_limits"), *config.getoption("qbench_limit")]]
        words = shlex.split(chosen("sweep"))
        overrides = [word if "=" in word else f"+sweep={word}" for word in words]
        sweep = next((word for word in words if "=" not in word), "cells")
        folder = str(config.rootpath / chosen("config_dir")) if chosen("config_dir") else None
        update = config.getoption("qbench_update")
        worker: dict[str, Any] = getattr(config, "workerinput", {})
        run_id = worker.get("testrunuid") or str(os.getpid())  # of a controller of pytest-xdist it is learnt later
        found = cls(
            Settings(results, baseline, sweep, limits, update),
            overrides,
            folder,
            config.getoption("qbench_strict"),
            run_id,
        )
        found.reports = config.getoption("qbench_report")
        return found

    def names(self) -> list[str]:
        """The cells of the sweep, fp32 first. Raises UsageError."""
        if not self._names:
            self._names = [cell.name for cell in self._plan(self._overrides)]
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
        cells = self._plan(overrides)
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
        lines += [f"accepted  {line}" for line in self.accepted]
        for kind in self.reports:
            path = self.settings.results / f"gate.{kind}"
            report.write(path, found, left)
            lines.append(f"report: {path}")
        return lines

    def collect_outcomes(self) -> None:
        """Read what other processes of this run have measured."""
        path = self._path()
        if path.exists():
            content = json.loads(path.read_text())
            self.accepted = content["accepted"]
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
            self.accepted += accept(outcomes, self.settings)
        self.outcomes |= {outcome.name: outcome for outcome in outcomes}
        content = {
            "names": self._names,
            "accepted": self.accepted,
            "outcomes": [dataclasses.asdict(outcome) for outcome in self.outcomes.values()],
        }
        write_atomic(self._path(), json.dumps(content))

    def _path(self) -> Path:
        return self.settings.results / OUTCOMES.format(run=self.run)

    def _plan(self, overrides: Sequence[str]) -> list[Cell]:
        from qbench.compose import Composer, close
        from qbench.plan import plan

        given = [*overrides, f"results={self.settings.results}", "dry_run=true"]  # composed only: no torch is loaded
        commas = any("," in word for word in overrides)
        try:
            return plan(Composer(Namespace(overrides=given, multirun=commas, config_dir=self._config_dir)))
        finally:
            close()

    def _run(self, overrides: Sequence[str], names: Sequence[str], settings: Settings) -> list[Outcome]:
        from qbench import results
        from qbench.plan import identify
        from qbench.preparation import prepare_tasks
        from qbench.progress import Progress

        cells = self._plan(overrides)
        wanted = [cell for cell in cells if cell.name in names]
        needed = {cell.baseline for cell in wanted}
        cells = [cell for cell in cells if cell in wanted or cell.question in needed]
        progress = Progress()
        started = time.monotonic()
        print(f"\nqbench: measuring {len(wanted)} cells", file=sys.stderr, flush=True)
        with results.claim(settings.results):
            cells = identify(cells, prepare_tasks(cells, settings.results, progress))
            progress.begin("gate")
            outcomes = run(cells, names, settings, progress.say)
            progress.end()
        print(f"qbench: measured in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return outcomes
