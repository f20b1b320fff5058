"""`python -m qbench.compare A B`: what became of the cells of A in B, with the gate's statistics, words and exit codes.

A and B are results folders, or sweeps in the MLflow store of one: `all@results`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qbench import comparison, results
from qbench.config import UsageError, one_line
from qbench.gate import report, verdict
from qbench.gate.baseline import Baseline, BaselineError
from qbench.gate.judge import judge
from qbench.gate.judge_speed import SpeedTest, corrected, speed_tests
from qbench.gate.limits import Limit, for_cell, parse
from qbench.gate.verdict import Outcome, Verdict
from qbench.record import Record
from qbench.tracking import TrackingError, logged_records, logged_sweeps

OK, RED, MISUSE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line. Returns 0, 1 where a cell is red, 2 for misuse."""
    parser = argparse.ArgumentParser("python -m qbench.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("before", metavar="A", help="a results folder, or SWEEP@FOLDER for a sweep of its MLflow store")
    parser.add_argument("now", metavar="B", help="the same, of what is to be judged")
    parser.add_argument(
        "--limit", action="append", default=[], help="as pytest --qbench-limit: speedup=5%%, checksum=off"
    )
    parser.add_argument("--strict", action="store_true", help="red too where a verdict is in doubt")
    parser.add_argument("--report", metavar="FILE", help="write a .json or .md file too")
    given = parser.parse_args(arguments)
    try:
        limits = [parse(limit) for limit in given.limit]
        outcomes = compare(records_of(given.before), records_of(given.now), limits)
        if given.report:
            report.write(Path(given.report), outcomes, [])
    except (UsageError, TrackingError, ValueError, OSError) as error:
        print(f"qbench: {one_line(error)}", file=sys.stderr)
        return MISUSE
    for outcome in outcomes:
        if outcome.red(given.strict):
            print(report.failure(outcome, given.strict) + "\n")
    print("\n".join(report.table(outcomes)))
    return RED if any(outcome.red(given.strict) for outcome in outcomes) else OK


def compare(before: Sequence[Record], now: Sequence[Record], limits: Sequence[Limit] = ()) -> list[Outcome]:
    """Judge each cell of `now` by the one of the same task and recipe in `before`."""
    stored, found = _named(before), _named(now)
    tests: dict[tuple[str, str], SpeedTest] = {}
    for name in stored.keys() & found.keys():
        a, b = stored[name], found[name]
        if isinstance(a, Baseline) and isinstance(b, Baseline):
            own = speed_tests(a, b, for_cell(limits, name))
            tests |= {(name, metric): test for metric, test in own.items()}
    tests = corrected(tests)
    disturbed = {_name(record) for record in now if "disturbed" in record.notes}
    outcomes = []
    for name, side in found.items():
        own = {metric: test for (cell, metric), test in tests.items() if cell == name}
        said = judge(stored.get(name), side, for_cell(limits, name), own, name in disturbed)
        outcomes.append(Outcome(name, said, metrics=dict(side.metrics) if isinstance(side, Baseline) else {}))
    gone = [name for name in stored if name not in found]
    return outcomes + [Outcome(name, [Verdict("cell", verdict.ORPHAN, "not in the second set")]) for name in gone]


def records_of(place: str) -> list[Record]:
    """The newest record of each cell of a results folder, or of a sweep in its MLflow store.

    Raises UsageError where there is none.
    """
    sweep, at, folder = place.rpartition("@")
    path = Path(folder)
    if not (path / ("mlflow.db" if at else "runs")).exists():
        what = "an MLflow store (mlflow.db)" if at else "records (runs/*/record.json)"
        raise UsageError(f"{place}: {folder} holds no {what}; give a results folder, or SWEEP@FOLDER")
    found = logged_records(path, sweep) if at else results.newest_records(path)
    if not found:
        known = (
            f"no sweep {sweep!r} in its MLflow store, which has {', '.join(logged_sweeps(path))}" if at else "no record"
        )
        raise UsageError(f"{place}: {known}")
    return found


def _named(records: Sequence[Record]) -> dict[str, Baseline | BaselineError]:
    found: dict[str, Baseline | BaselineError] = {}
    for record in (record for record in records if record.status != "skipped"):
        name = _name(record)
        try:
            found[name] = Baseline.of(record, name, "")
        except BaselineError as error:
            found[name] = error
    return found


def _name(record: Record) -> str:
    """`lstm[ptdq channel sym]`."""
    return f"{record.task}[{comparison.recipe_text(record)}]"


if __name__ == "__main__":
    sys.exit(main())
