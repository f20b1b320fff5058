"""Networks of a stated size with seeded random weights: nothing to train, for comparison with other engines.

Their scores are agreement with fp32 and SQNR; the examples are few and seeded, as no label is judged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qbench.metrics import fidelity
from qbench.task import Examples, Task
from tasks.lstm import SequenceClassifier

CLASSES = 16
EXAMPLES, CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 64, 32, 16
LSTM_LAYERS, LSTM_HIDDEN, LSTM_INPUTS, LSTM_STEPS = 2, 512, 128, 100


def lstm(seed: int = 0) -> Task:
    """Two LSTM layers of 512 units on 100 steps of 128 inputs."""

    def build() -> nn.Module:
        return SequenceClassifier(LSTM_INPUTS, LSTM_HIDDEN, LSTM_LAYERS, CLASSES)

    return _task("bench_lstm", "lstm", seed, build, (LSTM_STEPS, LSTM_INPUTS))


def _task(name: str, family: str, seed: int, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Task:
    """A task on normally distributed examples of a shape."""

    def seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().eval()

    def examples(count: int, seed: int) -> Tensor:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))

    return Task(
        name=name,
        family=family,
        metric=fidelity(),
        build=seeded,
        calibration=lambda: [(batch,) for batch in examples(CALIBRATION_EXAMPLES, 1).split(CALIBRATION_BATCH)],
        evaluation=lambda: Examples((examples(EXAMPLES, 2),)),
    )
