"""The pytest plugin: `pytest --qbench` makes each cell of a sweep a test. Loading it imports no torch and no hydra."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qbench.gate.session import GateSession
    from qbench.gate.verdict import Outcome

MARK = "qbench"
SESSION: pytest.StashKey[GateSession] = pytest.StashKey()


class Regression(Exception):
    """A cell that its limits or its baseline refuse; the text is all that is shown."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the gate."""
    group = parser.getgroup("qbench", "regression checks of int8 networks (qbench)")
    group.addoption(
        "--qbench", action="store_true", help="run the gate: each cell of the sweep, and tests marked qbench"
    )
    group.addoption(
        "--qbench-sweep", metavar="SWEEP", help="a sweep's name, or overrides: 'task=lstm method=ptdq,ptsq'"
    )
    group.addoption("--qbench-config-dir", metavar="DIR", help="a folder with your own tasks and sweeps")
    group.addoption("--qbench-results", metavar="DIR", help="where results go (default: results)")
    group.addoption("--qbench-baseline", metavar="DIR", help="where baselines are (default: baseline in the results)")
    group.addoption(
        "--qbench-limit",
        metavar="LIMIT",
        action="append",
        default=[],
        help="speedup=5%%, score=0.5, speedup>=1.5, checksum=off; for some cells: 'ci_lstm*:speedup=5%%'",
    )
    group.addoption("--qbench-strict", action="store_true", help="fail too where a verdict is in doubt")
    group.addoption(
        "--qbench-update",
        nargs="?",
        const="new",
        choices=("new", "all"),
        help="accept what this run measures as baselines: those that are missing (new), or all",
    )
    group.addoption("--qbench-base", metavar="REV", help="compare with this git revision, measured beside it in turns")
    group.addoption(
        "--qbench-time-limit",
        metavar="S",
        help="seconds of timing (twice that with a base) after which no more processes make an interval narrower",
    )
    group.addoption(
        "--qbench-report",
        choices=("json", "md"),
        action="append",
        default=[],
        help="write gate.json, or gate.md (a comment for a pull request), into the results",
    )
    parser.addini("qbench_sweep", "the sweep that the gate runs", default="ci")
    parser.addini("qbench_config_dir", "a folder with your own tasks and sweeps", default="")
    parser.addini("qbench_results", "where results go", default="results")
    parser.addini("qbench_baseline", "where baselines are", default="")
    parser.addini("qbench_time_limit", "seconds, as --qbench-time-limit", default="")
    parser.addini("qbench_limits", "one limit a line, as --qbench-limit", type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark; set the gate up where it is asked for, so that misuse ends before anything runs."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(metric='>=1.5', ...): part of the gate, run with --qbench; with absolute limits for its cells",
    )
    if config.getoption("qbench") or config.getoption("qbench_update"):
        from qbench.config import UsageError
        from qbench.gate.session import GateSession

        config.option.qbench = True
        if hasattr(config.option, "dist"):
            config.option.dist = "no"  # pytest-xdist: what is timed must be alone, its workers would only wait
        try:
            config.stash[SESSION] = GateSession(config)
        except (UsageError, ValueError) as error:
            raise pytest.UsageError(f"qbench: {error}") from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --qbench only the gate is left: tests that are marked or ask for its fixture, and the cells of the sweep."""
    gate = config.stash.get(SESSION, None)
    if gate is None:
        skip = pytest.mark.skip(reason="measured with --qbench only")
        for item in filter(_belongs, items):
            item.add_marker(skip)
        return
    ordinary = [item for item in items if not _belongs(item)]
    if ordinary:
        config.hook.pytest_deselected(items=ordinary)
    items[:] = [item for item in items if _belongs(item)]
    if _asks_sweep(config):
        cells = CellCollector.from_parent(session, name=MARK, nodeid=MARK, path=config.rootpath)
        cells.names = _cell_names(gate)
        report = config.hook.pytest_make_collect_report(collector=cells)
        config.hook.pytest_collectreport(report=report)  # so that they are counted as collected
        items += report.result


def _belongs(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARK) is not None or MARK in getattr(item, "fixturenames", ())


def _asks_sweep(config: pytest.Config) -> bool:
    """Is it the whole gate? A command line that names files or tests asks for those, not for the sweep."""
    return config.args_source is not pytest.Config.ArgsSource.ARGS


def _cell_names(gate: GateSession) -> list[str]:
    from qbench.config import UsageError

    try:
        return gate.names()
    except UsageError as error:
        raise pytest.UsageError(f"qbench: {error}") from error


class CellCollector(pytest.Collector):
    """The cells of the sweep, as items."""

    names: Sequence[str] = ()

    def collect(self) -> list[pytest.Item]:
        """One item a cell."""
        # Named in full: pytest 9 would not know the brackets for parameters, and --lf reads names back with these.
        return [CellItem.from_parent(self, name=name, nodeid=f"{self.nodeid}::{name}") for name in self.names]


class CellItem(pytest.Item):
    """One cell of the sweep: passes where its baseline and limits hold."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_marker(MARK)

    def setup(self) -> None:
        """Measure all cells that are selected; once, at the first of them."""
        chosen = [item.name for item in self.session.items if isinstance(item, CellItem)]
        with _uncaptured(self.config):
            self.config.stash[SESSION].measure(chosen)

    def runtest(self) -> None:
        """Raise Regression where the gate is red."""
        gate = self.config.stash[SESSION]
        outcome = gate.outcome(self.name)
        self.user_properties.append(("qbench", outcome.word))
        _judge(gate, [outcome])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The sentence alone; of an error that nobody foresaw, what pytest shows of it."""
        from qbench.config import UsageError

        if isinstance(excinfo.value, Regression | UsageError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        """What a report says in the place of a file and a line: there is none."""
        return self.config.rootpath / MARK, None, self.name


def _judge(gate: GateSession, outcomes: Sequence[Outcome]) -> None:
    if refused := [outcome for outcome in outcomes if gate.refuses(outcome)]:
        raise Regression("\n\n".join(gate.explain(outcome) for outcome in refused))


class Check:
    """The fixture: `qbench.check("task=lstm", "method=ptdq")` measures cells and judges them as the gate does."""

    def __init__(self, config: pytest.Config, limits: Sequence[str]) -> None:
        self._config, self._limits = config, limits

    def check(self, *overrides: str) -> dict[str, dict[str, float]]:
        """Measure the cells of a command line: `metrics` by name of the cell, fp32 aside.

        The limits of the test's mark decide; a test without any compares with the baselines. Raises Regression.
        """
        __tracebackhide__ = True
        gate = self._config.stash[SESSION]
        with _uncaptured(self._config):
            outcomes = gate.check(overrides, self._limits)
        _judge(gate, outcomes)
        return {outcome.name: outcome.metrics for outcome in outcomes}


@pytest.fixture
def qbench(request: pytest.FixtureRequest) -> Check:
    """Measure a cell and judge it: `qbench.check("task=lstm", "method=ptdq")`; run with --qbench."""
    marks = reversed(list(request.node.iter_markers(MARK)))  # the test's own last: it counts
    limits = [f"{metric}{condition}" for mark in marks for metric, condition in mark.kwargs.items()]
    return Check(request.config, limits)


def _uncaptured(config: pytest.Config) -> Any:
    """What is said meanwhile goes to the terminal."""
    import contextlib

    capture = config.pluginmanager.getplugin("capturemanager")
    return contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A Regression in a test is its text, not a traceback."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, Regression):
        report.longrepr = str(call.excinfo.value)  # type: ignore[attr-defined]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """When strict, a baseline without a cell is red although no test has its name."""
    gate = session.config.stash.get(SESSION, None)
    if gate is not None and gate.strict and session.exitstatus == pytest.ExitCode.OK and gate.orphans():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of all cells."""
    gate = config.stash.get(SESSION, None)
    if gate is not None and (gate.outcomes or gate.checks):
        terminalreporter.section("qbench")
        for line in gate.summary():
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes that wait for work."""
    gate = config.stash.get(SESSION, None)
    if gate is not None:
        gate.close()
