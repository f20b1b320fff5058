"""MobileNetV2 on Fashion-MNIST: torchvision's depthwise network, of one input channel and ten classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import mobilenet_v2

from qbench.metrics import accuracy
from qbench.task import Task
from tasks import fashion_mnist
from tasks.training import Schedule, train

SCHEDULE = Schedule(sizes=((16, 2), (28, 3)), batch=128, learning_rate=0.05)


def task(full_data: str | None = None, seed: int = 0) -> Task:
    """The task; `full_data` is a folder with all 60,000 training images, `seed` that of weights and training."""
    return Task(
        name="mobilenet_v2",
        family="cnn",
        metric=accuracy(),
        build=partial(build, seed),
        train=partial(fit, full_data, seed),
        calibration=fashion_mnist.calibration,
        fine_tuning=fashion_mnist.fine_tuning,
        evaluation=fashion_mnist.evaluation,
    )


def build(seed: int = 0) -> nn.Module:
    """The untrained network for images [N, 1, 28, 28]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mobilenet_v2(weights=None, num_classes=fashion_mnist.CLASSES)
        model.features[0][0] = nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1, bias=False)
    return model


def fit(full_data: str | None, seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains in place."""
    train(model, *fashion_mnist.training(full_data), SCHEDULE, seed, say)
