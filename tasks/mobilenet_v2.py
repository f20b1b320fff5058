"""MobileNetV2 on Fashion-MNIST: torchvision's depthwise network, of one input channel and ten classes."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision.models import mobilenet_v2

from qbench.task import Task
from tasks import fashion_mnist
from tasks.checkpoints import kept
from tasks.classifier import classifier_task
from tasks.training import Schedule

SCHEDULE = Schedule(sizes=((16, 2), (28, 3)), batch=128, learning_rate=0.05)


def task(full_data: str | None = None, seed: int = 0, width: float = 1.0, checkpoint: str | None = None) -> Task:
    """The task; `full_data` is a folder with all 60,000 training images, `seed` that of weights and training.

    `width` multiplies the channels; `checkpoint` names weights that are kept in the project.
    """
    return kept(classifier_task("mobilenet_v2", partial(network, width), SCHEDULE, full_data, seed), checkpoint)


def network(width: float = 1.0) -> nn.Module:
    """The untrained network for images [N, 1, 28, 28]."""
    model = mobilenet_v2(weights=None, num_classes=fashion_mnist.CLASSES, width_mult=width)
    first = model.features[0][0]
    model.features[0][0] = nn.Conv2d(1, first.out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return model
