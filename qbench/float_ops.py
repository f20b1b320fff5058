"""The nodes of the fused network in float: what fake quantization simulates and the int8 program executes.

Each function is one node: a layer with its residual and its clamp (ReLU is low = 0). Graphs call these functions; the
rules that quantize them stand in `convert.py`. Tensors are float32, `low` and `high` None where there is no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qbench.transposed import swapped

aten = torch.ops.aten

Bound = float | None


def bounded(y: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp, when there is a bound."""
    return y if low is None and high is None else y.clamp(low, high)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    low: Bound = None,
    high: Bound = None,
) -> Tensor:
    """x [..., inputs] times weight [outputs, inputs]."""
    y = torch.nn.functional.linear(x, weight, bias)
    return bounded(y if residual is None else y + residual, low, high)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None = None,
    low: Bound = None,
    high: Bound = None,
) -> Tensor:
    """Convolution over one or two dimensions: x [N, C, (H,) W], weight [outputs, C / groups, (kh,) kw]."""
    convolve = torch.nn.functional.conv1d if weight.dim() == 3 else torch.nn.functional.conv2d
    y = convolve(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return bounded(y if residual is None else y + residual, low, high)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_padding: Sequence[int],
    residual: Tensor | None = None,
    low: Bound = None,
    high: Bound = None,
) -> Tensor:
    """Transposed convolution over one or two dimensions: x [N, C, (H,) W], weight [outputs, C / groups, (kh,) kw]."""
    transpose = torch.nn.functional.conv_transpose1d if weight.dim() == 3 else torch.nn.functional.conv_transpose2d
    window = (list(stride), list(padding), list(output_padding), groups, list(dilation))
    y = transpose(x, swapped(weight, groups), bias, *window)
    return bounded(y if residual is None else y + residual, low, high)


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of an LSTM in one direction: h of every step [T, N, hidden], the last h and the last c [1, N, hidden].

    x [T, N, inputs], weights [4 hidden, inputs] and [4 hidden, hidden]; a state that is None is zero.
    """
    zeros = x.new_zeros(1, x.shape[1], weight_hh.shape[1])
    states = [zeros if state is None else state for state in (h0, c0)]
    weights = [weight for weight in (weight_ih, weight_hh, bias_ih, bias_hh) if weight is not None]
    y, h, c = aten.lstm.input(x, states, weights, bias_ih is not None, 1, 0.0, False, False, False)
    return y, h, c


def hidden_states(y: Tensor, h0: Tensor | None) -> Tensor:
    """Every h that a layer of an LSTM multiplies or hands on: what one scale and zero point must hold."""
    return y if h0 is None else torch.cat([h0, y])


def add(a: Tensor, b: Tensor, alpha: float = 1.0, low: Bound = None, high: Bound = None) -> Tensor:
    """a + alpha * b, broadcast."""
    return bounded(torch.add(a, b if alpha == 1 else b * alpha), low, high)


def mul(a: Tensor, b: Tensor, low: Bound = None, high: Bound = None) -> Tensor:
    """a * b, broadcast."""
    return bounded(a * b, low, high)


def mean(x: Tensor, dim: Sequence[int], keepdim: bool = False, low: Bound = None, high: Bound = None) -> Tensor:
    """Mean over dimensions."""
    return bounded(x.mean(list(dim), keepdim), low, high)


def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    low: Bound = None,
    high: Bound = None,
) -> Tensor:
    """Average pooling over one or two dimensions, one entry of `kernel` for each."""
    if len(kernel) == 1:
        y = torch.nn.functional.avg_pool1d(x, list(kernel), list(stride), list(padding), ceil_mode, count_include_pad)
    else:
        y = torch.nn.functional.avg_pool2d(
            x, list(kernel), list(stride), list(padding), ceil_mode, count_include_pad, divisor
        )
    return bounded(y, low, high)


def adaptive_average_pool(x: Tensor, size: Sequence[int], low: Bound = None, high: Bound = None) -> Tensor:
    """Average pooling to a given size over one or two dimensions."""
    pool = aten.adaptive_avg_pool1d if len(size) == 1 else aten.adaptive_avg_pool2d
    return bounded(pool(x, list(size)), low, high)


def channel_affine(x: Tensor, gamma: Tensor, beta: Tensor, low: Bound = None, high: Bound = None) -> Tensor:
    """x * gamma + beta by channel (dimension 1), a batch norm that no layer could take; float64 [channels] both."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    return bounded((x.double() * gamma.reshape(shape) + beta.reshape(shape)).float(), low, high)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenation."""
    return torch.cat(list(tensors), dim)


def clamp(x: Tensor, low: Bound = None, high: Bound = None) -> Tensor:
    """A clamp that no other node could take."""
    return bounded(x, low, high)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last dimensions, those of `shape`."""
    return torch.nn.functional.layer_norm(x, list(shape), weight, bias, eps)


def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [rows, features] by integer index [...]: [..., features]."""
    return torch.nn.functional.embedding(indices, weight)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    """softmax(factor * q k^T + mask) v of q [..., L, D], k [..., S, D], v [..., S, Dv]; a row hidden whole gives 0."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=factor)


def unary(x: Tensor, function: Callable[..., Tensor], arguments: Sequence[Any], options: dict[str, Any]) -> Tensor:
    """Any other activation, computed in float64: in int8 it is a table of 256 entries."""
    y: Tensor = function(x.double(), *arguments, **options)
    return y.float()
