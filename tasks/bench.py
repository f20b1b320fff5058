"""Networks of a stated size with seeded random weights: nothing to train, for comparison with other engines.

Their scores are agreement with fp32 and SQNR; the examples are few and seeded, as no label is judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qbench.metrics import fidelity
from qbench.task import Examples, Task
from tasks import torchvision
from tasks.lstm import SequenceClassifier

CLASSES = 16
EXAMPLES, CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 64, 32, 16
LSTM_LAYERS, LSTM_HIDDEN, LSTM_INPUTS, LSTM_STEPS = 2, 512, 128, 100
LAYERS, WIDTH, HEADS, FEED_FORWARD, TOKENS = 6, 384, 12, 1536, 128


def classifier(name: str, image_size: int = 224, seed: int = 0) -> Task:
    """A torchvision classifier with random weights and settled batch norms."""
    return dataclasses.replace(torchvision.task(name, image_size, seed=seed), name=f"bench_{name}")


def lstm(seed: int = 0) -> Task:
    """Two LSTM layers of 512 units on 100 steps of 128 inputs."""

    def build() -> nn.Module:
        return SequenceClassifier(LSTM_INPUTS, LSTM_HIDDEN, LSTM_LAYERS, CLASSES)

    return _task("bench_lstm", "lstm", seed, build, (LSTM_STEPS, LSTM_INPUTS))


def encoder(seed: int = 0) -> Task:
    """A Transformer encoder of 6 layers, width 384, 12 heads, feed-forward 1536, on 128 tokens; norms come last."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, activation="gelu", batch_first=True)
        model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the layers are copies of one: each gets weights of its own
                nn.init.xavier_uniform_(parameter)
        return model

    return _task("bench_encoder", "transformer", seed, build, (TOKENS, WIDTH))


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
