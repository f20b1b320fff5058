"""The speed of a cell against its baseline, or against a revision that was measured in turns with it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qbench.gate import speed
from qbench.gate.baseline import Baseline
from qbench.gate.limits import Limit, off
from qbench.gate.place import slower
from qbench.gate.speed import SpeedChange
from qbench.gate.verdict import DISTURBED, FOREIGN, INCONCLUSIVE, MISSING, VANISHED, Verdict

Name = TypeVar("Name")

BASELINE = "the baseline"


@dataclass(frozen=True)
class SpeedTest:
    """How the speed of a cell changed from one side to the other, and what that must reach to count.

    `delta` is the log of the smallest change that matters, `level` what p must be below, `than` what the sentence calls
    `before`.
    """

    before: Baseline
    now: Baseline
    change: SpeedChange
    delta: float
    than: str = BASELINE
    level: float = 0.0

    @property
    def word(self) -> str:
        """The verdict."""
        return speed.verdict(self.change, self.level, self.delta)


def speed_tests(
    before: Baseline,
    now: Baseline,
    limits: Mapping[str, Limit],
    *,
    paired: bool = False,
    matters: float = speed.DRIFT,
    than: str = BASELINE,
) -> dict[str, SpeedTest]:
    """By metric the test of its change; nothing where machines differ or too few processes were timed.

    `paired`: both were measured in turns, process by process. `matters` (a log) counts where no limit says otherwise.
    """
    if before.stale(now) or before.foreign(now):
        return {}
    found = {}
    for name in (name for name in before.speeds if name in now.speeds and not off(limits, name)):
        values = before.speeds[name], now.speeds[name]
        if min(map(len, values)) < 2:
            continue
        fp32 = [[math.log(ms) for ms in side.milliseconds[name]["fp32"]] for side in (before, now)]
        change = (speed.paired_change if paired else speed.change)(*values, *fp32)
        limit = limits.get(name)
        delta = matters if limit is None or limit.value is None else math.log1p(limit.allowed(1.0, name))
        found[name] = SpeedTest(before, now, change, delta, than)
    return found


def corrected(tests: Mapping[Name, SpeedTest]) -> dict[Name, SpeedTest]:
    """The tests of a run, each with the level that Holm's correction leaves it."""
    levels = speed.holm({name: test.change.p for name, test in tests.items()})
    return {name: dataclasses.replace(test, level=levels[name]) for name, test in tests.items()}


def of_speed(
    before: Baseline, now: Baseline, tests: Mapping[str, SpeedTest], limits: Mapping[str, Limit], disturbed: bool
) -> list[Verdict]:
    """The verdicts on speed: of what was tested, and why something was not."""
    if before.stale(now):
        return []
    found = []
    for name in dict.fromkeys([*before.speeds, *now.speeds]):
        if off(limits, name):
            continue
        if name not in before.speeds:
            found.append(Verdict(name, MISSING, f"the baseline has no processes of {name}: take it again"))
        elif name not in now.speeds:
            found.append(Verdict(name, VANISHED, f"the baseline has {name}, this run has not"))
        elif name not in tests:
            found.append(_not_compared(before, now, name))
        else:
            found.append(_speed(name, tests[name], disturbed))
    return found


def placed(said: Verdict, before: Baseline, now: Baseline) -> Verdict:
    """A verdict on speed with the operations that became slower, where both sides have timed theirs."""
    ms = [statistics.median(side.milliseconds[said.metric]["fp32"]) for side in (before, now)]
    found = slower(before.operations, now.operations, ms[1] / ms[0])
    return dataclasses.replace(said, sentence=f"{said.sentence}; likely place: {found}") if found else said


def _not_compared(before: Baseline, now: Baseline, name: str) -> Verdict:
    if differ := before.foreign(now):
        what = ", ".join(f"{key} {_brief(before.machine.get(key))} -> {_brief(now.machine.get(key))}" for key in differ)
        return Verdict(name, FOREIGN, f"not comparable, the baseline is of another machine ({what}); use --qbench-base")
    few = min(len(before.speeds[name]), len(now.speeds[name]))
    return Verdict(name, INCONCLUSIVE, f"{few} process a side: two at least make an interval")


def _brief(value: Any) -> str:
    text = f"{len(value)} flags" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _speed(name: str, test: SpeedTest, disturbed: bool) -> Verdict:
    before, now, word = test.before, test.now, test.word
    if word == INCONCLUSIVE and disturbed:
        word = DISTURBED
    percent, low, high = test.change.percent()
    way = "slower" if percent >= 0 else "faster"
    ends = (low, high) if percent >= 0 else (-high, -low)
    sides = [math.exp(statistics.mean(side.speeds[name])) for side in (before, now)]
    text = (
        f"{abs(percent):.1f} % {way} than {test.than} ({ends[0]:+.1f} to {ends[1]:+.1f} %, "
        f"{100 * math.expm1(test.delta):.3g} % matter): {sides[0]:.3g}x fp32 -> {sides[1]:.3g}x, "
        f"{_times(before, now, name)}"
    )
    first = before.history[0].get("metrics", {}).get(name) if before.history else None
    if first and abs(math.log(first / sides[1])) > test.delta:
        text += f"; the first baseline had {first:.3g}x"
    if word == INCONCLUSIVE:
        text += f"; {len(now.speeds[name])} processes do not tell: the interval is wider than what matters"
    if word == DISTURBED:
        text += "; something else ran on this machine"
    return Verdict(name, word, text, sides[0], sides[1], -percent, -high, -low)


def _times(before: Baseline, now: Baseline, name: str) -> str:
    """`int8 0.124 -> 0.131 ms, fp32 1.27 -> 1.27 ms`, and whether it is fp32 that moved."""
    ms = {who: [statistics.median(side.milliseconds[name][who]) for side in (before, now)] for who in ("cell", "fp32")}
    cell, fp32 = (math.log(ms[who][1] / ms[who][0]) for who in ("cell", "fp32"))
    text = ", ".join(
        f"{who} {ms[key][0]:.4g} -> {ms[key][1]:.4g} ms" for key, who in (("cell", "int8"), ("fp32", "fp32"))
    )
    if abs(fp32) > max(speed.DELTA, 2.0 * abs(cell)):
        text += (
            f"; it is fp32 that moved, by {100 * math.expm1(fp32):+.1f} %, the cell by {100 * math.expm1(cell):+.1f} %"
        )
    return text
