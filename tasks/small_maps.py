"""Convolutions of maps of at most 2x2 as matrix products, for training in a budget.

At 28x28 input the last stages of ResNet-18 and MobileNetV2 convolve 1x1 and 2x2 maps with 3x3 kernels: most taps only
meet padding, and convolution libraries multiply by them all the same (in the backward pass of ResNet-18 this is two
thirds of a training step). Here each output position is written as a sum over the input positions that exist. The
function computed is the same up to float32 rounding; the module and its weights are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

LARGEST_MAP = 2


@contextmanager
def small_maps_as_products(model: nn.Module) -> Iterator[None]:
    """Within, the 3x3 convolutions of `model` run as matrix products where their input map is at most 2x2."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and _has_a_product_form(module)]
    for conv in convs:
        conv.forward = partial(_forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def _has_a_product_form(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.bias is None
    return plain and (conv.groups == 1 or depthwise)


def _forward(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    height, width = inputs.shape[-2:]
    if max(height, width) > LARGEST_MAP:
        return conv._conv_forward(inputs, conv.weight, conv.bias)
    rows, columns = _taps(height, conv.stride[0]), _taps(width, conv.stride[1])
    met = [[3 * i + j for i in row for j in column] for row in rows for column in columns]
    taps = conv.weight.permute(0, 2, 3, 1).flatten(1, 2).unbind(1)  # nine of [O, I]; gradients come back channels-last
    product = _dense_product if conv.groups == 1 else _depthwise_product
    outputs = product(inputs.permute(0, 2, 3, 1).flatten(1, 2), taps, met)  # positions before channels
    return outputs.unflatten(1, (len(rows), len(columns))).permute(0, 3, 1, 2)


def _taps(size: int, stride: int) -> list[list[int]]:
    """For each output position the kernel tap that each input position meets (0, 1 or 2: none is out of reach)."""
    return [[position - stride * output + 1 for position in range(size)] for output in range((size - 1) // stride + 1)]


def _dense_product(inputs: Tensor, taps: tuple[Tensor, ...], met: list[list[int]]) -> Tensor:
    """[N, positions, I] to [N, positions, O] with taps [O, I]; met[output][input] is the tap between two positions."""
    matrix = torch.cat([torch.cat([taps[tap] for tap in row], 1) for row in met])
    return (inputs.flatten(1) @ matrix.t()).unflatten(1, (len(met), -1))


def _depthwise_product(inputs: Tensor, taps: tuple[Tensor, ...], met: list[list[int]]) -> Tensor:
    """[N, positions, C] to [N, positions, C] with taps [C, 1]."""
    positions = inputs.unbind(1)
    sums = [sum(x * taps[tap][:, 0] for x, tap in zip(positions, row, strict=True)) for row in met]
    return torch.stack(sums, 1)  # type: ignore[arg-type]
