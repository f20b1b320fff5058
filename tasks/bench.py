"""Networks of known sizes with seeded random weights, for comparison with other engines: no data, no training.

The score is the agreement with fp32; the SQNR beside it tells more.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from qbench.metrics import fidelity
from qbench.task import Examples, Task
from tasks import torchvision

CALIBRATION_SEED, EVALUATION_SEED = 1, 2
CALIBRATION_BATCHES, BATCH, EVALUATION_EXAMPLES = 2, 8, 32

LAYERS, WIDTH, HEADS, FEED_FORWARD, TOKENS = 6, 384, 12, 1536, 128


def classifier(name: str, image_size: int = 224, seed: int = 0) -> Task:
    """A torchvision classifier with random weights and settled batch norms."""
    return dataclasses.replace(torchvision.task(name, image_size, seed=seed), name=f"bench_{name}")


def encoder(seed: int = 0) -> Task:
    """A Transformer encoder of 6 layers, width 384, 12 heads, feed-forward 1536, on 128 tokens; norms come last."""
    return Task(
        name="bench_encoder",
        family="transformer",
        metric=fidelity(),
        build=partial(build_encoder, seed),
        calibration=lambda: [(x,) for x in _tokens(CALIBRATION_SEED, CALIBRATION_BATCHES * BATCH).split(BATCH)],
        evaluation=lambda: Examples((_tokens(EVALUATION_SEED, EVALUATION_EXAMPLES),)),
    )


def build_encoder(seed: int = 0) -> nn.Module:
    """The encoder in evaluation mode, for vectors [N, 128, 384]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, activation="gelu", batch_first=True)
        model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the layers are copies of one: each gets weights of its own
                nn.init.xavier_uniform_(parameter)
    return model.eval()


def _tokens(seed: int, count: int) -> Tensor:
    """Seeded random vectors in the place of embedded tokens."""
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
