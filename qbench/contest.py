"""Functions timed against each other in the present process: the public `qbench.compare_latency`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from qbench.latency import doubts
from qbench.statistics import ratio_over_processes
from qbench.timing import Timing, time_blocks


@dataclass(frozen=True)
class LatencyComparison:
    """Contestants timed against each other: medians by name, and how many times as fast as the first the others are.

    `intervals` are 95 % (absent after a single round). The note `one_process` says that they come from the rounds of
    one process, and are too narrow: the ratio differs from process to process as well.
    """

    medians_ms: dict[str, float]
    ratios: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {ms:.3f} ms{self._ratio(name)}" for name, ms in self.medians_ms.items()]
        return "\n".join([*lines, *([f"({', '.join(self.notes)})"] if self.notes else [])])

    def _ratio(self, name: str) -> str:
        if name not in self.ratios:
            return ""
        ends = self.intervals.get(name)
        reach = "" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})"
        return f", {self.ratios[name]:.2f} times as fast as {next(iter(self.medians_ms))}{reach}"


def compare_latency(
    contestants: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any] = (),
    *,
    rounds: int = 5,
    threads: int = 1,
    timing: Timing | None = None,
) -> LatencyComparison:
    """Time functions against each other in this process, gradients off: `{"fp32": model, "int8": q}` on `inputs`.

    Each is called with `*inputs`. `timing` replaces `rounds` where blocks shall differ too. Raises ValueError for fewer
    than two contestants.
    """
    import torch

    if len(contestants) < 2:
        raise ValueError(f"{len(contestants)} contestants: give at least two to compare")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            calls = {name: partial(function, *inputs) for name, function in contestants.items()}
            times = time_blocks(calls, timing or Timing(rounds=rounds))
    finally:
        torch.set_num_threads(before)
    first, *others = contestants
    found = {name: ratio_over_processes([times.ratios(first, name)]) for name in others}
    return LatencyComparison(
        {name: median(ms) for name, ms in times.calls_ms.items()},
        {name: ratio.ratio for name, ratio in found.items()},
        {name: ends for name, ratio in found.items() if (ends := ratio.interval()) is not None},
        ("one_process", *sorted(doubts([times]))),
    )
