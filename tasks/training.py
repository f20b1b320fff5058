"""The training loop of the image classifiers: seeded, so the same on the same machine, and short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.batch_norm import settle_batch_norm
from tasks.small_maps import small_maps_as_products

SAY_EVERY_S = 2.0
WARM_UP = 0.25  # share of the steps in which the learning rate rises; then it falls to 0
SETTLING_IMAGES, SETTLING_BATCH = 4096, 256

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stochastic gradient descent with Nesterov momentum 0.9 and one cycle of the learning rate.

    `sizes` lists (pixels a side, epochs), one after another: early epochs learn as much from small images, for a third
    of the time.
    """

    sizes: tuple[tuple[int, int], ...]
    batch: int
    learning_rate: float
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1


def train(model: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule, seed: int, say: Say) -> None:
    """Trains `model` in place on float images [N, C, H, W] and classes [N], and leaves it in evaluation mode.

    `say` is told about every two seconds how far the training is.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        _descend(model.to(memory_format=torch.channels_last), images, labels, schedule, random, say)
    model.to(memory_format=torch.contiguous_format)
    chosen = torch.randperm(len(images), generator=random)[:SETTLING_IMAGES]
    settle_batch_norm(model, list(images[chosen].split(SETTLING_BATCH)))


def _descend(
    model: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule, random: torch.Generator, say: Say
) -> None:
    epochs = [size for size, count in schedule.sizes for _ in range(count)]
    progress = Progress(len(epochs), len(images) // schedule.batch, say)
    with small_maps_as_products(model.train(), images[:2]) as parameters:
        optimizer = torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay, fused=True
        )
        for size in epochs:
            for inputs, targets in _batches(resized(images, size), labels, schedule.batch, random):
                optimizer.param_groups[0]["lr"] = schedule.learning_rate * one_cycle(progress.done)
                loss = F.cross_entropy(model(inputs), targets, label_smoothing=schedule.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.step(loss)


def _batches(images: Tensor, labels: Tensor, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; the last images, fewer than `size`, are left out.

    Nothing is mirrored: in so few epochs that costs accuracy (0.6 points, measured; shoes all face one way).
    """
    order = torch.randperm(len(images), generator=random)
    for chosen in order[: len(order) // size * size].split(size):
        yield images[chosen].contiguous(memory_format=torch.channels_last), labels[chosen]


def resized(images: Tensor, size: int) -> Tensor:
    """The images at size x size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def one_cycle(done: float) -> float:
    """The share of the peak learning rate when the share `done` of the steps is done."""
    return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


class Progress:
    """Counts steps, and says epoch, batch, loss and the time left about every two seconds."""

    def __init__(self, epochs: int, steps_an_epoch: int, say: Say) -> None:
        self._epochs, self._steps_an_epoch, self._say = epochs, steps_an_epoch, say
        self._steps = 0
        self._started = self._said = time.monotonic()

    @property
    def done(self) -> float:
        """The share of the steps that is done, counting the one at hand as half."""
        return (self._steps + 0.5) / (self._epochs * self._steps_an_epoch)

    def step(self, loss: Tensor) -> None:
        """One step more."""
        self._steps += 1
        now, last = time.monotonic(), self._steps == self._epochs * self._steps_an_epoch
        if now - self._said < SAY_EVERY_S and not last:
            return
        self._said = now
        epoch, batch = divmod(self._steps - 1, self._steps_an_epoch)
        left = (now - self._started) * (self._epochs * self._steps_an_epoch - self._steps) / self._steps
        self._say(
            f"epoch {epoch + 1}/{self._epochs}, batch {batch + 1}/{self._steps_an_epoch}, "
            f"loss {loss.item():.2f}, {left:.0f} s left"
        )
