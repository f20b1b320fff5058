"""Convolutions of maps of at most 2x2 as matrix products, for training in a budget.

At 28x28 input the last stages of ResNet-18 and MobileNetV2 convolve 1x1 and 2x2 maps with 3x3 kernels: most taps only
ever meet padding, and convolution libraries multiply by them all the same (two thirds of a training step of ResNet-18).
Here each output position is a sum over the input positions that exist, and the taps that meet one are the only ones
to be trained. The function computed is the same up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

LARGEST_MAP = 2


@contextmanager
def small_maps_as_products(model: nn.Module, example: Tensor) -> Iterator[list[nn.Parameter]]:
    """Within, 3x3 convolutions run as products where their map is at most 2x2 for `example`, and smaller inputs.

    Yields the parameters to train. The weights have their trained values again, and all taps, at the end.
    """
    convs = {conv: size for conv, size in _input_sizes(model, example).items() if _has_product(conv, size)}
    products = [Product(conv, *size) for conv, size in convs.items()]
    replaced = {conv.weight for conv in convs}
    try:
        yield [*(p for p in model.parameters() if p not in replaced), *(product.taps for product in products)]
    finally:
        for product in products:
            product.restore()


def _input_sizes(model: nn.Module, example: Tensor) -> dict[nn.Conv2d, tuple[int, int]]:
    """Height and width of what reaches each convolution."""
    sizes: dict[nn.Conv2d, tuple[int, int]] = {}

    def note(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[conv] = tuple(inputs[0].shape[-2:])

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    training = model.training
    with torch.no_grad():
        model.eval()(example)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return sizes


def _has_product(conv: nn.Conv2d, size: tuple[int, int]) -> bool:
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.bias is None
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return max(size) <= LARGEST_MAP and plain and (conv.groups == 1 or depthwise)


class Product:
    """Takes the place of a convolution's forward; `taps` [met, O, I] are its parameters meanwhile."""

    def __init__(self, conv: nn.Conv2d, height: int, width: int) -> None:
        self._conv = conv
        self._index = {tap: k for k, tap in enumerate(sorted({tap for row in self._met(height, width) for tap in row}))}
        self.taps = nn.Parameter(torch.stack([conv.weight[:, :, i, j].detach() for i, j in self._index]))
        conv.forward = self.forward  # type: ignore[method-assign]

    def restore(self) -> None:
        del self._conv.forward
        with torch.no_grad():
            for (i, j), k in self._index.items():
                self._conv.weight[:, :, i, j] = self.taps[k]

    def forward(self, x: Tensor) -> Tensor:
        met = self._met(*x.shape[-2:])
        taps = self.taps.unbind(0)
        weights = [[taps[self._index[tap]] for tap in row] for row in met]
        y = (_dense if self._conv.groups == 1 else _depthwise)(x.permute(0, 2, 3, 1).flatten(1, 2), weights)
        stride = self._conv.stride[0]
        rows = (x.shape[2] - 1) // stride + 1
        return y.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    def _met(self, height: int, width: int) -> list[list[tuple[int, int]]]:
        """For each output position the tap that each input position meets: with 2x2 none is out of reach."""
        rows, columns = (_met_along(size, self._conv.stride[0]) for size in (height, width))
        return [[(i, j) for i in row for j in column] for row in rows for column in columns]


def _met_along(size: int, stride: int) -> list[list[int]]:
    return [[position - stride * output + 1 for position in range(size)] for output in range((size - 1) // stride + 1)]


def _dense(x: Tensor, weights: list[list[Tensor]]) -> Tensor:
    """[N, inputs, I] to [N, outputs, O]; weights[output][input] is [O, I]."""
    matrix = torch.cat([torch.cat(row, 1) for row in weights])
    return (x.flatten(1) @ matrix.t()).unflatten(1, (len(weights), -1))


def _depthwise(x: Tensor, weights: list[list[Tensor]]) -> Tensor:
    """[N, inputs, C] to [N, outputs, C]; weights[output][input] is [C, 1]."""
    positions = x.unbind(1)
    sums = [
        reduce(torch.add, (position * tap[:, 0] for position, tap in zip(positions, row, strict=True)))
        for row in weights
    ]
    return torch.stack(sums, 1)
