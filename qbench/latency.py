"""From the answers of the timing processes to a cell's latency metrics and their intervals. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from qbench.statistics import EXACTLY_ONE, LogRatio, Percentile, chain, percentile, ratio_over_processes
from qbench.timing import DISTURBANCE, BlockTimes

CELL, EAGER, COMPILED = "cell", "eager", "compiled"  # the contestants; an fp32 cell has no CELL

FASTEST = 3  # blocks at least whose times count as undisturbed


@dataclass(frozen=True)
class Baseline:
    """The fastest fp32 at one batch size: its name, and its time over the eager one's.

    `alone` says that only eager was measured, so that a faster one may exist.
    """

    name: str
    over_eager: LogRatio
    alone: bool

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> Baseline:
        """Back from a record; None (no fp32 cell was measured) is eager alone."""
        if content is None:
            return EAGER_ALONE
        return cls(content["name"], LogRatio(**content["over_eager"]), content["alone"])


EAGER_ALONE = Baseline(EAGER, EXACTLY_ONE, alone=True)


def part(process: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of a process that timed several cells side by side (`measure.time_cells`), what it says of one of them."""

    def of(times: Mapping[str, Any]) -> dict[str, Any]:
        return {field: {EAGER: found[EAGER], CELL: found[name]} for field, found in times.items()}

    return {**process, "batches": {batch: of(times) for batch, times in process["batches"].items()}}


def combine(processes: Sequence[Mapping[str, Any]], baselines: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What each process says of one cell as the parts of a record.

    `baselines` is `details["fp32_baselines"]` of the task's fp32 cell with the same settings, None when there is none
    (or for the fp32 cell itself, which measures its own). Returns JSON: `metrics` (finite, suffix _b16 at batch 16),
    `notes`, `environment` (`fp32_baseline`, eager or compiled, at batch 1; with suffix at the larger batch) and
    `details` (`timing`: what each process found; `fp32_baselines`; `compile_failure` where compiling failed).
    """
    parts: dict[str, Any] = {"metrics": {}, "environment": {}, "details": {"timing": {}, "fp32_baselines": {}}}
    notes: set[str] = {"one_process"} if len(processes) == 1 else set()
    for batch in processes[0]["batches"]:
        times = [BlockTimes(**process["batches"][batch]) for process in processes]
        own = CELL if CELL in times[0].medians_ms else EAGER
        baseline = Baseline.of((baselines or {}).get(batch)) if own == CELL else _fastest(times)
        suffix = "" if batch == "1" else f"_b{batch}"
        metrics = {**_latencies(times, own, int(batch)), **_speedups(times, own, baseline)}
        parts["metrics"] |= {f"{name}{suffix}": value for name, value in metrics.items()}
        parts["environment"][f"fp32_baseline{suffix}"] = baseline.name
        parts["details"]["timing"][batch] = _found(times, own)
        parts["details"]["fp32_baselines"][batch] = dataclasses.asdict(baseline)
        notes |= doubts(times) | ({"baseline_eager_only"} if baseline.alone else set())
    if failure := next((text for process in processes if (text := process.get("compile_failure"))), None):
        parts["details"]["compile_failure"] = failure
    return {**parts, "notes": sorted(notes)}


def _fastest(times: Sequence[BlockTimes]) -> Baseline:
    """Eager or compiled, from the processes of the fp32 cell; a failure in any of them leaves eager."""
    if COMPILED not in _in_all(times):
        return EAGER_ALONE
    ratio = ratio_over_processes([one.ratios(COMPILED, EAGER) for one in times])
    return Baseline(COMPILED, ratio, alone=False) if ratio.mean < 0.0 else Baseline(EAGER, EXACTLY_ONE, alone=False)


def _latencies(times: Sequence[BlockTimes], own: str, batch: int) -> dict[str, float]:
    ms, p90 = _median_ms(times, own), _p90(times, own)
    metrics = {"latency_ms_median": ms, "throughput_per_s": 1e3 * batch / ms}
    return metrics if p90 is None else {**metrics, "latency_ms_p90": p90.value}


def _p90(times: Sequence[BlockTimes], own: str) -> Percentile | None:
    """Of the single calls of all processes together; None of too few."""
    return percentile([call for one in times for call in one.calls_ms[own]], 0.9)


def _speedups(times: Sequence[BlockTimes], own: str, baseline: Baseline) -> dict[str, float]:
    """Against eager, as measured here, and against the fastest fp32, chained through its own ratio to eager."""
    over_eager = EXACTLY_ONE if own == EAGER else ratio_over_processes([one.ratios(EAGER, own) for one in times])
    speedup = chain(over_eager, baseline.over_eager)
    metrics = {
        "latency_ms_fp32": _median_ms(times, EAGER) * baseline.over_eager.ratio,
        "speedup": speedup.ratio,
        "speedup_vs_eager": over_eager.ratio,
    }
    ends = speedup.interval()
    return metrics if ends is None else {**metrics, "speedup_ci_low": ends[0], "speedup_ci_high": ends[1]}


def _median_ms(times: Sequence[BlockTimes], name: str) -> float:
    return median(median(one.calls_ms[name]) for one in times)


def _found(times: Sequence[BlockTimes], own: str) -> dict[str, Any]:
    """By process: each contestant's times, its shift against its time alone, and the ratio; and the p90's interval."""
    names = _in_all(times)
    found: dict[str, Any] = {
        "median_ms": {name: [median(one.calls_ms[name]) for one in times] for name in names},
        "undisturbed_ms": {name: [undisturbed_ms(one.medians_ms[name]) for one in times] for name in names},
        "shift": {name: [one.shift(name) for one in times] for name in names},
    }
    for name in names:
        if name != EAGER:
            found[f"eager_over_{name}"] = [ratio_over_processes([one.ratios(EAGER, name)]).ratio for one in times]
    p90 = _p90(times, own)
    return found if p90 is None else {**found, "p90_interval_ms": [p90.low, p90.high]}


def undisturbed_ms(medians_ms: Sequence[float]) -> float:
    """The geometric mean of the fastest quarter of a process' blocks, three at least: other work only slows down."""
    fastest = sorted(medians_ms)[: max(FASTEST, len(medians_ms) // 4)]
    return geometric_mean(fastest)


def _in_all(times: Sequence[BlockTimes]) -> list[str]:
    """The contestants that every process timed (compiling may have failed in one)."""
    return [name for name in times[0].calls_ms if all(name in one.calls_ms for one in times)]


def doubts(times: Sequence[BlockTimes]) -> set[str]:
    """`disturbed`: a contestant did not reproduce its time alone; `not_settled`: its warm-up ended by its limit.

    Both as the processes have it in the middle, so that one hiccup in one of them does not mark the record.
    """
    doubts = set()
    for name in _in_all(times):
        if abs(median(one.shift(name) for one in times) - 1.0) > DISTURBANCE:
            doubts.add("disturbed")
        if median(one.settled[name] for one in times) < 0.5:
            doubts.add("not_settled")
    return doubts
