"""ResNet-18 on Fashion-MNIST: torchvision's network, of one input channel and ten classes."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18

from qbench.task import Task
from tasks import fashion_mnist
from tasks.classifier import classifier_task
from tasks.training import Schedule

SCHEDULE = Schedule(sizes=((16, 2), (28, 2)), batch=128, learning_rate=0.05)


def task(full_data: str | None = None, seed: int = 0) -> Task:
    """The task; `full_data` is a folder with all 60,000 training images, `seed` that of weights and training."""
    return classifier_task("resnet18", network, SCHEDULE, full_data, seed)


def network() -> nn.Module:
    """The untrained network for images [N, 1, 28, 28]."""
    model = resnet18(weights=None, num_classes=fashion_mnist.CLASSES)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model
