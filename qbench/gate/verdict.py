"""A cell against its baseline: one word a metric, and the sentence that says by how much, how sure, and where.

Pure functions of two `Baseline`s (a stored one and the one that the run would store) and limits.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qbench import evidence
from qbench.gate import speed
from qbench.gate.baseline import Baseline, BaselineError
from qbench.gate.limits import CHECKSUM, GATED, Limit, factor
from qbench.gate.place import changed_outputs, few, slower
from qbench.gate.speed import SpeedChange
from qbench.metrics import BATCH_SUFFIX, declared
from qbench.statistics import LEVEL

OK, BETTER, WORSE, CHANGED = "ok", "better", "worse", "changed"
NOT_SIGNIFICANT, INCONCLUSIVE, DISTURBED = "not significant", "inconclusive", "disturbed"
MISSING, VANISHED, ORPHAN, STALE = "missing baseline", "vanished metric", "orphan baseline", "stale"
FOREIGN, LIMIT, FAILED = "foreign machine", "beyond limit", "failed"
# The worst first: what a cell is called when its metrics differ.
WORDS = (
    FAILED, MISSING, STALE, VANISHED, WORSE, LIMIT, CHANGED, INCONCLUSIVE, DISTURBED, FOREIGN, ORPHAN,
    BETTER, NOT_SIGNIFICANT, OK,
)  # fmt: skip
RED = frozenset((FAILED, MISSING, STALE, VANISHED, WORSE, LIMIT, CHANGED))
DOUBTFUL = frozenset((INCONCLUSIVE, DISTURBED, FOREIGN, ORPHAN))  # a warning; red when strict

PEAK_SLACK = 512 << 10  # bytes by which the peak memory of one program differs from process to process
FOREIGN_SIZE = 0.001  # other float kernels calibrate to other last digits, which take more or fewer characters
TRAINED_SIZE = 0.01  # fine-tuning ends elsewhere on another machine


@dataclass(frozen=True)
class Verdict:
    """What is said of one metric of a cell, numbers in the unit of the record; those of a change of speed in percent.

    `low` and `high` are the interval of `difference`; of an absolute limit that of `now`.
    """

    metric: str
    word: str
    sentence: str
    before: float | None = None
    now: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def red(self, strict: bool = False) -> bool:
        """Does it fail the test?"""
        return self.word in RED or (strict and self.word in DOUBTFUL)


@dataclass(frozen=True)
class Outcome:
    """A cell of a gate run: its verdicts, the command that reproduces it, and where what it measured lies.

    `beside`: it was compared with a revision, not with a baseline that could be replaced.
    """

    name: str
    verdicts: list[Verdict]
    command: str = ""
    folder: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    beside: bool = False

    @property
    def word(self) -> str:
        """The worst of its verdicts."""
        return min((verdict.word for verdict in self.verdicts), key=WORDS.index, default=OK)

    def red(self, strict: bool = False) -> list[Verdict]:
        """The verdicts that fail the test."""
        return [verdict for verdict in self.verdicts if verdict.red(strict)]


def judge(
    before: Baseline | BaselineError | None,
    now: Baseline | BaselineError,
    limits: Mapping[str, Limit],
    name: str,
    changes: Mapping[tuple[str, str], SpeedChange],
    levels: Mapping[tuple[str, str], float],
    disturbed: bool,
    beside: bool = False,
    wanted: bool = True,
) -> list[Verdict]:
    """Everything that is said of a cell. `before` is what it is compared with; not to have it counts only if `wanted`.

    `changes` and `levels` are those of all cells of the run, by name and metric; see `speed_changes` for `beside`.
    """
    if isinstance(now, BaselineError):
        return [Verdict("cell", FAILED, str(now))]
    found = absolute(now, limits)
    if not wanted and not isinstance(before, Baseline):
        why = "the other side has no such cell" if before is None else f"it failed on the other side: {before}"
        return [*found, Verdict("baseline", OK, why)]
    if isinstance(before, BaselineError):
        return [*found, Verdict("baseline", STALE, str(before))]
    if before is None:
        return [*found, Verdict("baseline", MISSING, "nothing to compare with")]
    own = {metric: change for (cell, metric), change in changes.items() if cell == name}
    own_levels = {metric: levels[name, metric] for metric in own}
    return [*found, *exact(before, now, limits), *of_speed(before, now, own, own_levels, limits, disturbed, beside)]


def exact(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> list[Verdict]:
    """Everything but speed: whether the inputs are the same, then score, size, coverage, memory and checksum."""
    if changed := before.stale(now):
        what = ", ".join(changed)
        text = f"its {what} changed since the baseline was taken: nothing can be compared before it is taken again"
        return [Verdict("inputs", STALE, text)]
    names = dict.fromkeys([*GATED, *(limit.metric for limit in limits.values() if not limit.absolute)])
    gone = [name for name in names if name in before.metrics and name not in now.metrics]
    new = [name for name in GATED if name in now.metrics and name not in before.metrics]
    found: list[Verdict | None] = [
        *(Verdict(name, VANISHED, f"the baseline has {name}, this run has not") for name in gone),
        *(Verdict(name, MISSING, f"the baseline has no {name}: take it again") for name in new),
        _size(before, now, limits),
        _score(before, now, limits),
        _coverage(before, now, limits),
        _memory(before, now, limits),
        *_others(before, now, limits),
        _checksum(before, now),
    ]
    return [v for v in found if v is not None and not _off(limits, v.metric)]


def absolute(now: Baseline, limits: Mapping[str, Limit]) -> list[Verdict]:
    """The limits that need no baseline. Where a metric has an interval, it is beyond a limit when all of that is."""
    found = []
    for limit in limits.values():
        metric = limit.metric
        if not limit.absolute or (metric.startswith("speedup") and not now.speeds):
            continue  # fp32 has no speed-up, nor has a backend whose latency is no result
        value = now.metrics.get(metric)
        if value is None:
            found.append(Verdict(metric, VANISHED, f"{limit} is asked for, and this run has no {metric}"))
            continue
        ends = [now.metrics.get(_end(metric, end), value) for end in ("low", "high")]
        holds = limit.holds(value, now.score)
        word = OK if holds else NOT_SIGNIFICANT if any(limit.holds(end, now.score) for end in ends) else LIMIT
        text = f"{shown(metric, value, now.score)}"
        if ends != [value, value]:
            text += f" ({' to '.join(shown(metric, end, now.score) for end in ends)})"
        found.append(Verdict(metric, word, f"{text}, limit {limit}", now=value, low=ends[0], high=ends[1]))
    return found


def _end(metric: str, end: str) -> str:
    """`speedup_b16` -> `speedup_ci_low_b16`."""
    suffix = found[0] if (found := BATCH_SUFFIX.search(metric)) else ""
    return f"{metric.removesuffix(suffix)}_ci_{end}{suffix}"


def speed_changes(
    before: Baseline, now: Baseline, limits: Mapping[str, Limit], beside: bool = False
) -> dict[str, SpeedChange]:
    """By metric, how the speed changed; nothing where machines differ or too few processes were timed.

    `beside`: both were measured in turns, process by process.
    """
    if before.stale(now) or before.foreign(now):
        return {}
    both = [name for name in before.speeds if name in now.speeds and not _off(limits, name)]
    change = speed.paired_change if beside else speed.change
    return {
        name: change(before.speeds[name], now.speeds[name])
        for name in both
        if min(len(before.speeds[name]), len(now.speeds[name])) > 1
    }


def delta(metric: str, limits: Mapping[str, Limit], beside: bool = False) -> float:
    """The log of the smallest change of speed that matters: a stored baseline's speed drifts."""
    limit = limits.get(metric)
    if limit is None or limit.value is None:
        return speed.DELTA if beside else speed.DRIFT
    return math.log1p(limit.allowed(1.0, metric))


def of_speed(
    before: Baseline,
    now: Baseline,
    changes: Mapping[str, SpeedChange],
    levels: Mapping[str, float],
    limits: Mapping[str, Limit],
    disturbed: bool,
    beside: bool,
) -> list[Verdict]:
    """The verdicts on speed; `levels` has what each test must reach, corrected for all tests of the run."""
    if before.stale(now):
        return []
    found = []
    for name in dict.fromkeys([*before.speeds, *now.speeds]):
        if _off(limits, name):
            continue
        if name not in before.speeds:
            found.append(Verdict(name, MISSING, f"the baseline has no processes of {name}: take it again"))
        elif name not in now.speeds:
            found.append(Verdict(name, VANISHED, f"the baseline has {name}, this run has not"))
        elif name not in changes:
            found.append(_not_compared(before, now, name))
        else:
            found.append(_speed(before, now, name, changes[name], levels[name], delta(name, limits, beside), disturbed))
    return found


def _off(limits: Mapping[str, Limit], metric: str) -> bool:
    return metric in limits and limits[metric].value is None


def _not_compared(before: Baseline, now: Baseline, name: str) -> Verdict:
    if differ := before.foreign(now):
        what = ", ".join(f"{key} {_brief(before.machine.get(key))} -> {_brief(now.machine.get(key))}" for key in differ)
        return Verdict(name, FOREIGN, f"not comparable, the baseline is of another machine ({what}); use --qbench-base")
    few = min(len(before.speeds[name]), len(now.speeds[name]))
    return Verdict(name, INCONCLUSIVE, f"{few} process a side: two at least make an interval")


def _brief(value: Any) -> str:
    text = f"{len(value)} flags" if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _speed(
    before: Baseline,
    now: Baseline,
    name: str,
    change: SpeedChange,
    level: float,
    matters: float,
    disturbed: bool,
) -> Verdict:
    word = speed.verdict(change, level, matters)
    if word == INCONCLUSIVE and disturbed:
        word = DISTURBED
    slower, low, high = change.percent()
    way = "slower" if slower >= 0 else "faster"
    ends = (low, high) if slower >= 0 else (-high, -low)
    sides = [math.exp(statistics.mean(side.speeds[name])) for side in (before, now)]
    text = (
        f"{abs(slower):.1f} % {way} than the baseline ({ends[0]:+.1f} to {ends[1]:+.1f} %, "
        f"{100 * math.expm1(matters):.3g} % matter): {sides[0]:.3g}x fp32 -> {sides[1]:.3g}x, "
        f"{_times(before, now, name)}"
    )
    first = before.history[0].get("metrics", {}).get(name) if before.history else None
    if first and abs(math.log(first / sides[1])) > matters:
        text += f"; the first baseline had {first:.3g}x"
    if word == INCONCLUSIVE:
        text += f"; {len(now.speeds[name])} processes do not tell: the interval is wider than what matters"
    if word == DISTURBED:
        text += "; something else ran on this machine"
    return Verdict(name, word, text, sides[0], sides[1], -slower, -high, -low)


def placed(said: Verdict, before: Baseline, now: Baseline) -> Verdict:
    """A verdict on speed with the operations that became slower, where both sides have timed theirs."""
    ms = [statistics.median(side.milliseconds[said.metric]["fp32"]) for side in (before, now)]
    found = slower(before.operations, now.operations, ms[1] / ms[0])
    return dataclasses.replace(said, sentence=f"{said.sentence}; likely place: {found}") if found else said


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


def _size(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> Verdict | None:
    slack = TRAINED_SIZE if _trained(now) else FOREIGN_SIZE if before.foreign(now) else 0.0
    return _compared("size_bytes", before, now, limits, slack * before.metrics.get("size_bytes", 0.0))


def _coverage(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> Verdict | None:
    found = _compared("int8_mac_fraction", before, now, limits, 0.0)
    floats = sorted(set(now.float_ops) - set(before.float_ops))
    if found is None or found.word != WORSE or not floats:
        return found
    return Verdict(found.metric, WORSE, f"{found.sentence}; now in float: {few(floats)}", found.before, found.now)


def _memory(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> Verdict | None:
    name = "peak_memory_bytes"
    if name in before.metrics and name in now.metrics and before.foreign(now):
        return Verdict(name, FOREIGN, "not comparable, the baseline is of another machine")
    relative = 0.02 * before.metrics.get(name, 0.0)
    return _compared(name, before, now, limits, max(relative, PEAK_SLACK))


def memory_moved(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> bool:
    """Does peak memory seem worse or better?"""
    found = _memory(before, now, limits)
    return found is not None and found.word in (WORSE, BETTER) and not _off(limits, found.metric)


def _others(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> list[Verdict | None]:
    """Metrics that only a limit of the user's gates."""
    own = [limit.metric for limit in limits.values() if not limit.absolute and limit.metric not in GATED]
    return [_compared(name, before, now, limits, 0.0) for name in own if name not in before.speeds]


def _compared(name: str, before: Baseline, now: Baseline, limits: Mapping[str, Limit], slack: float) -> Verdict | None:
    """A metric without an uncertainty: worse beyond what is allowed."""
    if name not in before.metrics or name not in now.metrics:
        return None
    a, b = before.metrics[name], now.metrics[name]
    limit = limits.get(name)
    allowed = slack if limit is None else limit.allowed(a, now.score)
    declaration = declared(name)
    worse = declaration.worse(b, a) if declaration else b != a
    text = f"{shown(name, a, now.score)} -> {shown(name, b, now.score)}" if a != b else shown(name, b, now.score)
    if a != b and name.endswith("_bytes"):
        text += f" ({b - a:+.0f} bytes)"
    if abs(b - a) <= allowed:
        return Verdict(name, OK, text, a, b, b - a)
    if allowed:
        text += f", allowed {shown(name, allowed, now.score)}"
    return Verdict(name, WORSE if worse else BETTER, text, a, b, b - a)


def _score(before: Baseline, now: Baseline, limits: Mapping[str, Limit]) -> Verdict | None:
    """The paired test on the task's units; worse where significant and larger than what matters."""
    if "score" not in before.metrics or "score" not in now.metrics:
        return None
    a, b = before.metrics["score"], now.metrics["score"]
    declaration, limit = declared(now.score), limits.get("score")
    direction = declaration.direction if declaration else "higher"
    if limit is not None:
        matters = limit.allowed(a, now.score)
    else:
        matters = 0.0 if declaration is None else declaration.tolerance * (abs(a) if declaration.relative else 1.0)
    sides = f"{now.score} {shown(now.score, a, now.score)} -> {shown(now.score, b, now.score)}"
    if (before.evidence is None) != (now.evidence is None):
        return Verdict(
            "score", STALE, f"{sides}; only one of them has the evidence for a test: take the baseline again"
        )
    if before.evidence is None or now.evidence is None:
        drop = a - b if direction == "higher" else b - a
        word = OK if abs(drop) <= matters else WORSE if drop > 0 else BETTER
        return Verdict("score", word, f"{sides}; its metric keeps no evidence for a test", a, b, b - a)
    try:
        found = evidence.change(before.evidence, now.evidence, direction)
    except ValueError as error:
        return Verdict("score", STALE, f"{sides}; not comparable: {error}", a, b)
    times = factor("score", now.score)
    text = (
        f"{sides}: drop {times * found.drop:+.4g} ({times * found.low:+.4g} to {times * found.high:+.4g}, "
        f"{times * matters:.3g} matter; {found.test}, p = {found.p:.2g})"
    )
    significant = found.p < LEVEL
    if significant and abs(found.drop) > matters:
        word = WORSE if found.drop > 0 else BETTER
    else:
        word = OK if abs(found.drop) <= matters else NOT_SIGNIFICANT
    return Verdict("score", word, text, a, b, found.drop, found.low, found.high)


def _checksum(before: Baseline, now: Baseline) -> Verdict | None:
    """Equal inputs must give equal outputs; where they do not, what of the model changed."""
    if not before.hashes or not now.hashes:
        return None
    if before.hashes == now.hashes:
        return Verdict(CHECKSUM, OK, "program, weights and outputs are the baseline's")
    where = changed_outputs(before, now)
    if _trained(now):
        return Verdict(CHECKSUM, OK, f"fine-tuned: judged by its score ({where})")
    if before.foreign(now):
        return Verdict(CHECKSUM, FOREIGN, f"{where}; on another machine float kernels round, and calibrate, otherwise")
    return Verdict(CHECKSUM, CHANGED, f"{where}, from equal inputs")


def _trained(side: Baseline) -> bool:
    from qbench.recipe import option

    try:
        return bool(option("method", side.method).trains)
    except ValueError:
        return False


def shown(metric: str, value: float, score: str) -> str:
    """A value as tables show it, bytes in full."""
    declaration = declared(score if metric.startswith("score") else metric)
    if metric.endswith("_bytes"):
        return f"{value:.0f} bytes"
    return f"{value:.4g}" if declaration is None else declaration.show(value)
