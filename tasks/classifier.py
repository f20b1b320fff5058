"""A classifier of Fashion-MNIST images: what the tasks with such a network have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from qbench.metrics import accuracy
from qbench.task import Task
from tasks import fashion_mnist
from tasks.training import Schedule, train

Network = Callable[[], nn.Module]


def classifier_task(name: str, network: Network, schedule: Schedule, full_data: str | None, seed: int) -> Task:
    """The task of an untrained network; `full_data` is a folder with all 60,000 training images."""
    return Task(
        name=name,
        family="cnn",
        metric=accuracy(),
        build=partial(seeded, network, seed),
        train=partial(fit, schedule, full_data, seed),
        calibration=fashion_mnist.calibration,
        fine_tuning=fashion_mnist.fine_tuning,
        evaluation=fashion_mnist.evaluation,
    )


def seeded(network: Network, seed: int = 0) -> nn.Module:
    """The network with initial weights of the seed; torch's own generator is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network()


def fit(schedule: Schedule, full_data: str | None, seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains in place."""
    train(model, *fashion_mnist.training(full_data), schedule, seed, say)
