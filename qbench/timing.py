"""Blocks of consecutive calls, interleaved: how contestants are timed against each other in one process.

Call by call would measure the neighbour's spinning threads and a cold cache; a block long enough to settle does not.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from qbench.statistics import kendall_tau

Call = Callable[[], Any]

DROPPED = 2  # first calls of a block: they find the neighbour's data in the caches
WINDOW = 5  # the warm-up ends when the medians of so many blocks show no trend ...
NO_TREND = 0.8
MOST_WARM_UP = 10  # ... or after so many blocks
LONG = 3  # a block of slow calls, SLOW_CALLS or more, ends at so many times the length that it must have
SLOW_CALLS = 6
DISTURBANCE = 0.05  # a contestant must reproduce its time alone to within this share


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A block has at least `block_calls` calls (three or more) and `block_s` seconds; `pause_s` of sleep between.

    Where `block_calls` calls take more than LONG * `block_s`, SLOW_CALLS are enough.
    """

    rounds: int = 3
    block_calls: int = 10
    block_s: float = 0.05
    pause_s: float = 0.02

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.block_calls <= DROPPED:
            raise ValueError(
                f"{self}: at least 1 round and {DROPPED + 1} calls a block, of which {DROPPED} are dropped"
            )


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds by contestant: kept single calls, one median a round, and the median alone, as the warm-up ended.

    `settled` says whether that was by its rule.
    """

    calls_ms: dict[str, list[float]]
    medians_ms: dict[str, list[float]]
    alone_ms: dict[str, float]
    settled: dict[str, bool]

    def ratios(self, numerator: str, denominator: str) -> list[float]:
        """The ratio of two contestants' block medians in each round."""
        return [a / b for a, b in zip(self.medians_ms[numerator], self.medians_ms[denominator], strict=True)]

    def shift(self, name: str) -> float:
        """A contestant's time among the others over its time alone."""
        return median(self.medians_ms[name]) / self.alone_ms[name]

    def as_json(self) -> dict[str, Any]:
        """As a dict of lists; `BlockTimes(**...)` is the way back."""
        return asdict(self)


def time_blocks(
    contestants: Mapping[str, Call],
    timing: Timing | None = None,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> BlockTimes:
    """Time functions of no argument against each other: warm each up alone, then rounds of blocks in random order.

    `clock` counts seconds. The garbage collector rests meanwhile. Raises ValueError without a contestant.
    """
    if not contestants:
        raise ValueError("nothing to time: give at least one contestant")
    timing, order = timing or Timing(), random.Random(seed)
    calls: dict[str, list[float]] = {name: [] for name in contestants}
    medians: dict[str, list[float]] = {name: [] for name in contestants}
    with no_garbage_collection():
        settled, alone = {}, {}
        for name, call in contestants.items():
            settled[name], alone[name] = _warm_up(call, timing, clock, sleep)
        for _ in range(timing.rounds):
            for name in order.sample(list(contestants), len(contestants)):
                sleep(timing.pause_s)
                block = _block(contestants[name], timing, clock)
                calls[name] += block
                medians[name].append(median(block))
    return BlockTimes(calls, medians, alone, settled)


def _block(call: Call, timing: Timing, clock: Callable[[], float]) -> list[float]:
    """The kept calls of one block, in milliseconds."""
    times: list[float] = []
    start = now = clock()
    while len(times) < timing.block_calls or now - start < timing.block_s:
        if len(times) >= SLOW_CALLS and now - start >= LONG * timing.block_s > 0:
            break
        before = now
        call()
        now = clock()
        times.append((now - before) * 1e3)
    return times[DROPPED:]


def _warm_up(
    call: Call, timing: Timing, clock: Callable[[], float], sleep: Callable[[float], None]
) -> tuple[bool, float]:
    """Run a contestant alone until it is steady. Returns whether that was soon enough, and its time alone.

    That is of the last WINDOW blocks, which have the calls and the time of about one block of the rounds.
    """
    medians: list[float] = []
    settled = False
    sleep(timing.pause_s)  # once: nobody else works in between
    while not settled and len(medians) < MOST_WARM_UP:
        medians.append(median(_warm_up_block(call, timing, clock)))
        settled = len(medians) >= WINDOW and abs(kendall_tau(medians[-WINDOW:])) < NO_TREND
    return settled, median(medians[-WINDOW:])


def _warm_up_block(call: Call, timing: Timing, clock: Callable[[], float]) -> list[float]:
    """One of the WINDOW parts of a full block: of its calls and its time, or one call that takes all of the time."""
    times: list[float] = []
    start = now = clock()
    while not times or now - start < timing.block_s:
        if len(times) * WINDOW >= timing.block_calls and (now - start) * WINDOW >= timing.block_s:
            break
        before = now
        call()
        now = clock()
        times.append((now - before) * 1e3)
    return times


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage once, which takes a tenth of a second with torch loaded, and then rest; within another: rest."""
    enabled = gc.isenabled()
    if enabled:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
