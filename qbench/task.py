"""A task: a network with the data that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qbench.metrics import ScoreMetric

FAMILIES = ("cnn", "lstm", "transformer", "gan")


class TaskUnavailable(RuntimeError):
    """The task cannot be had here (a download failed, say); its cells become `skipped` with this message."""


@dataclass(frozen=True)
class Examples:
    """Evaluation examples, dimension 0 of every tensor counts examples.

    `targets` is None where the fp32 outputs are the only truth; for a generator they are real examples, as many.
    `units` numbers the resampling unit of each example (the recording a window comes from, say); None means each
    example is its own unit.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None
    units: Tensor | None = None

    def __len__(self) -> int:
        return int(self.inputs[0].shape[0])

    def first(self, count: int | None) -> Examples:
        """The first `count` examples (all of them for None)."""
        if count is None or count >= len(self):
            return self
        return Examples(
            tuple(tensor[:count] for tensor in self.inputs),
            None if self.targets is None else self.targets[:count],
            None if self.units is None else self.units[:count],
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task's `_target_` returns.

    `build` makes the network (seeded, so that the same call makes the same weights). `train`, if given, trains it in
    place on first use, saying how far it is through its second argument, `say(text)`; qbench caches the result, or
    reads it from `checkpoint`, a safetensors file that `python -m qbench.train` makes. Without `train`, `build` returns
    the final weights. `calibration` returns batches (tuples of tensors) which are never evaluation examples; so does
    `fine_tuning`, the inputs on which qat learns to give the float results again (without it, those of calibration).
    `judge`, if given, makes a network with its final weights that looks at outputs and targets: the metric compares
    what it makes of them. Nothing is loaded or computed before one of the functions is called.

    A task may need another task's trained network, as a judge or as what it evaluates. Then its configuration has
    `source`, that other task's configuration, and the function is called with `source`, a function that returns the
    network: trained on first use, and shared with that task.
    """

    name: str
    family: str
    metric: ScoreMetric
    build: Callable[[], nn.Module]
    calibration: Callable[[], list[tuple[Tensor, ...]]]
    evaluation: Callable[[], Examples]
    train: Callable[[nn.Module, Callable[[str], None]], None] | None = None
    checkpoint: Path | None = None
    fine_tuning: Callable[[], list[tuple[Tensor, ...]]] | None = None
    judge: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"task {self.name}: family {self.family!r} is none of {', '.join(FAMILIES)}")
