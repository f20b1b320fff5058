"""Measuring one cell: the settings, and what runs in its timing and memory children.

A child measures (`time_cells`, `memory_cell`: JSON in, JSON out, torch inside); the parent puts the children's answers
together (`qbench.latency.combine`, no torch). Importing this module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench import compiled, latency
from qbench.contest import LatencyComparison as LatencyComparison
from qbench.contest import compare_latency as compare_latency  # the public name's home is here
from qbench.memory import keep_freed_memory, memory_of
from qbench.timing import Timing, time_blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a cell is measured: `conf/measure/*.yaml`. Raises ValueError with one line for an impossible value.

    `batch` is the larger batch, timed beside batch 1; batch 1 on `threads` threads, the larger one on `threads_large`
    (None: as many). `processes` fresh processes time `rounds` rounds each; a block has at least `block_calls` calls and
    `block_ms` milliseconds, with `pause_ms` of sleep before it. `examples` cuts the evaluation (None: all of them),
    which runs in batches of `eval_batch`.
    `compile` times the compiled fp32 network too, in the fp32 cell.
    """

    threads: int = 1
    threads_large: int | None = None
    batch: int = 16
    processes: int = 3
    rounds: int = 3
    block_calls: int = 10
    block_ms: float = 50.0
    pause_ms: float = 20.0
    examples: int | None = None
    eval_batch: int = 125
    compile: bool = True
    timeout_s: float = 600.0
    layers: bool = True
    figures: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Measure:
        """The settings of a configuration node (its `_target_` aside)."""
        return cls(**{name: value for name, value in config.items() if name != "_target_"})

    def glance(self) -> Measure:
        """The settings of timing a backend whose latency is no result: one process, few and short blocks.

        Below section 10's minimum on purpose: the reference is slow, and nothing ranks or compares its latency.
        """
        few = min(self.rounds, 3), SMALLEST["block_calls"], min(self.block_ms, 10.0)
        return dataclasses.replace(self, processes=1, rounds=few[0], block_calls=few[1], block_ms=few[2])

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch 1, whose metrics have no suffix, and the larger one."""
        return (1, self.batch) if self.batch > 1 else (1,)

    def threads_of(self, batch: int) -> int:
        """The threads on which a batch size is timed."""
        return self.threads if batch == 1 or self.threads_large is None else self.threads_large

    @property
    def timing(self) -> Timing:
        """The part that says how blocks are timed."""
        return Timing(
            rounds=self.rounds,
            block_calls=self.block_calls,
            block_s=self.block_ms / 1e3,
            pause_s=self.pause_ms / 1e3,
        )


SMALLEST: dict[str, int] = {
    "threads": 1,
    "threads_large": 1,
    "batch": 1,
    "processes": 1,
    "rounds": 1,
    "block_calls": 3,  # two are dropped
    "block_ms": 0,
    "pause_ms": 0,
    "examples": 1,
    "eval_batch": 1,
    "timeout_s": 1,
}
SWITCHES = ("compile", "layers", "figures")
REAL = ("block_ms", "pause_ms", "timeout_s")
OPTIONAL = ("examples", "threads_large")


def _check(name: str, value: Any) -> None:
    """Raise ValueError unless the value is possible."""
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise ValueError(f"measure.{name}={value!r}: allowed are true and false")
        return
    if name in OPTIONAL and value is None:
        return
    kind, word = (int | float, "a number") if name in REAL else (int, "a whole number")
    # NaN and infinity compare false.
    if isinstance(value, bool) or not isinstance(value, kind) or not SMALLEST[name] <= value < 1e12:
        also = " or null" if name in OPTIONAL else ""
        raise ValueError(f"measure.{name}={value!r}: allowed is {word} of at least {SMALLEST[name]:g}{also}")


def time_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """One group of cells after the other in this process: `groups` has its arguments for each call of `time_cells`."""
    keep_freed_memory()
    return {"groups": [time_cells(**group) for group in groups]}


def time_cells(
    programs: dict[str, str],
    task_config: dict[str, Any],
    prepared: dict[str, Any],
    measure: dict[str, Any],
    process_index: int,
    cache: str,
    backend: str | None = None,
) -> dict[str, Any]:
    """Time cells of one task beside each other and fp32 in this process: fresh, or after cells of other tasks.

    `programs` are the saved models by name, run by `backend`; fp32 is as torch runs it (eager). Without any it is the
    fp32 cell: eager against compiled, so that the others can be chained to the faster. `cache` is the results' cache
    folder (the compiler's products are kept there, only the first process pays for them). One of `measure.processes`
    answers, of which `latency.part` takes a cell's own share.
    """
    import torch

    from qbench import backends, evaluate
    from qbench.recipe import option

    settings, runs = Measure.of(measure), option("backend", backend or backends.default())
    eager = evaluate.fp32_model(task_config, prepared)
    answer: dict[str, Any] = {"batches": {}, "compile_failure": None}
    with torch.inference_mode():
        for batch in settings.batches:
            torch.set_num_threads(threads := settings.threads_of(batch))
            inputs = evaluate.example_batch(task_config, prepared, batch)
            entrants: dict[str, Callable[..., Any]] = {latency.EAGER: eager}
            entrants |= {name: runs.load(Path(path), batch, threads) for name, path in programs.items()}
            if not programs and settings.compile:
                entrants |= _compiled(eager, inputs, cache, answer)
            calls = {name: partial(function, *inputs) for name, function in entrants.items()}
            times = time_blocks(calls, settings.timing, seed=process_index * 10_000 + batch)
            answer["batches"][str(batch)] = times.as_json()
    return answer


def _compiled(model: Any, inputs: tuple[Tensor, ...], cache: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The compiled contestant; after a failure, which the answer then tells, none."""
    outcome = compiled.compile_fp32(model, inputs, cache) if answer["compile_failure"] is None else ""
    if isinstance(outcome, str):
        answer["compile_failure"] = answer["compile_failure"] or outcome
        return {}
    return {latency.COMPILED: outcome}


def time_contest(
    entrants: dict[str, dict[str, str]],
    task_config: dict[str, Any],
    prepared: dict[str, Any],
    measure: dict[str, Any],
    batch: int,
    process_index: int,
) -> dict[str, Any]:
    """Time the saved models of finished cells against each other at one batch size, in this fresh process.

    `entrants`: by name, `backend` and `program` of each. Returns `times` (BlockTimes) and `sqnr_db`, by name, of what
    was timed against eager fp32 on the same inputs.
    """
    import torch

    from qbench import evaluate
    from qbench.metrics import sqnr_db
    from qbench.recipe import option

    keep_freed_memory()
    settings = Measure.of(measure)
    torch.set_num_threads(threads := settings.threads_of(batch))
    inputs = evaluate.example_batch(task_config, prepared, batch)
    with torch.inference_mode():
        calls = {
            name: partial(option("backend", entry["backend"]).load(Path(entry["program"]), batch, threads), *inputs)
            for name, entry in entrants.items()
        }
        fp32 = evaluate.first_tensor(evaluate.fp32_model(task_config, prepared)(*inputs))
        noise = {name: sqnr_db(fp32, evaluate.first_tensor(call())) for name, call in calls.items()}
        times = time_blocks(calls, settings.timing, seed=process_index * 10_000 + batch)
    return {"times": times.as_json(), "sqnr_db": noise}


def memory_cell(
    program: str,
    task_config: dict[str, Any],
    prepared: dict[str, Any],
    measure: dict[str, Any],
    backend: str | None = None,
) -> dict[str, Any]:
    """The memory that loading the saved file and three forwards at the larger batch take, in this fresh process.

    Returns {"metrics": {"peak_memory_bytes": ...}}, without the metric where the system does not tell.
    """
    import torch

    from qbench import backends, evaluate
    from qbench.recipe import option

    settings, runs = Measure.of(measure), option("backend", backend or backends.default())
    batch, threads = settings.batch, settings.threads_of(settings.batch)
    torch.set_num_threads(threads)
    inputs = evaluate.example_batch(task_config, prepared, batch)
    runs.environment()  # what it imports is no memory of the model

    def load() -> Callable[..., Any]:
        torch.set_num_threads(threads)  # of this thread, as is the inference mode
        with torch.inference_mode():
            model = runs.load(Path(program), batch, threads)
        run: Callable[..., Any] = torch.inference_mode()(model)
        return run

    peak = memory_of(load, inputs)
    return {"metrics": {} if peak is None else {"peak_memory_bytes": peak}}
