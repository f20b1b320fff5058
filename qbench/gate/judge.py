"""A cell against its baseline: pure functions of limits and two `Baseline`s, the stored one and that of this run."""

from __future__ import annotations

from collections.abc import Mapping

from qbench import evidence
from qbench.gate.baseline import Baseline, BaselineError
from qbench.gate.judge_speed import SpeedTest, of_speed
from qbench.gate.limits import CHECKSUM, GATED, Limit, factor, off
from qbench.gate.place import changed_outputs, few
from qbench.gate.verdict import (
    BETTER,
    CHANGED,
    FAILED,
    FOREIGN,
    LIMIT,
    MISSING,
    NOT_SIGNIFICANT,
    OK,
    STALE,
    VANISHED,
    WORSE,
    Verdict,
)
from qbench.metrics import BATCH_SUFFIX, declared
from qbench.statistics import LEVEL

PEAK_SLACK = 512 << 10  # bytes by which the peak memory of one program differs from process to process
FOREIGN_SIZE = 0.001  # other float kernels calibrate to other last digits, which take more or fewer characters
TRAINED_SIZE = 0.01  # fine-tuning ends elsewhere on another machine


def judge(
    before: Baseline | BaselineError | None,
    now: Baseline | BaselineError,
    limits: Mapping[str, Limit],
    tests: Mapping[str, SpeedTest],
    disturbed: bool = False,
    wanted: bool = True,
) -> list[Verdict]:
    """Everything that is said of a cell. `before` is what it is compared with; not to have it counts only if `wanted`.

    `tests` are those of its speed, by metric; the record of a `disturbed` cell says that something else ran.
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
    return [*found, *exact(before, now, limits), *of_speed(before, now, tests, limits, disturbed)]


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
    return [v for v in found if v is not None and not off(limits, v.metric)]


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
    return found is not None and found.word in (WORSE, BETTER) and not off(limits, found.metric)


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
