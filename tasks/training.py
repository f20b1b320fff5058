"""The training loop of the image classifiers: seeded, so the same on the same machine, and short."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.batch_norm import settle_batch_norm
from tasks.small_maps import small_maps_as_products

SAY_EVERY_S = 2.0
WARM_UP = 0.25  # share of the steps in which the learning rate rises; then it falls to 0
SETTLING_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train with stochastic gradient descent (Nesterov momentum 0.9, one cycle).

    The first `small_epochs` see the images at half size, for which the same weights cost a third.
    """

    epochs: int
    small_epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    seed: int = 0


def train(model: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule, say: Callable[[str], None]) -> None:
    """Trains `model` in place on float images [N, C, H, W] and classes [N], and leaves it in evaluation mode.

    `say` is told how far the training is about every two seconds.
    """
    random = torch.Generator().manual_seed(schedule.seed)
    model.train().to(memory_format=torch.channels_last)
    steps_an_epoch = len(images) // schedule.batch
    total = schedule.epochs * steps_an_epoch
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay, fused=True
    )
    progress = Progress(schedule.epochs, steps_an_epoch, say)
    half_size = F.avg_pool2d(images, 2)
    with torch.random.fork_rng(), small_maps_as_products(model):
        torch.manual_seed(schedule.seed)
        for step in range(total):
            epoch, batch = divmod(step, steps_an_epoch)
            if batch == 0:
                order = torch.randperm(len(images), generator=random)
                source = half_size if epoch < schedule.small_epochs else images
            chosen = order[batch * schedule.batch : (batch + 1) * schedule.batch]
            optimizer.param_groups[0]["lr"] = schedule.learning_rate * one_cycle((step + 1) / total)
            outputs = model(flip_half(source[chosen], random).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(outputs, labels[chosen], label_smoothing=schedule.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.step(step, loss)
    model.to(memory_format=torch.contiguous_format)
    settle_batch_norm(model, list(images[torch.randperm(len(images), generator=random)].split(256)[:SETTLING_BATCHES]))


def one_cycle(done: float) -> float:
    """The share of the peak learning rate when the share `done` of the steps is done."""
    return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


def flip_half(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirrors each image with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=random) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


class Progress:
    """Says epoch, batch, loss and the time left, about every two seconds."""

    def __init__(self, epochs: int, steps_an_epoch: int, say: Callable[[str], None]) -> None:
        self._epochs, self._steps_an_epoch, self._say = epochs, steps_an_epoch, say
        self._started = self._said = time.monotonic()

    def step(self, step: int, loss: Tensor) -> None:
        now = time.monotonic()
        total = self._epochs * self._steps_an_epoch
        if now - self._said < SAY_EVERY_S and step + 1 < total:
            return
        self._said = now
        left = (now - self._started) * (total - step - 1) / (step + 1)
        epoch, batch = divmod(step, self._steps_an_epoch)
        self._say(
            f"epoch {epoch + 1}/{self._epochs}, batch {batch + 1}/{self._steps_an_epoch}, "
            f"loss {float(loss):.2f}, {left:.0f} s left"
        )
