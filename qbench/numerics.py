"""Rounding, saturation and requantization: the arithmetic of the specification (design, section 3).

Every float32 operation is rounded on its own. Nothing else in the package rounds, saturates or computes a multiplier,
except the backends, which must agree with these functions bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qbench.granularities import Granularity
from qbench.schemes import INT8_MIDDLE, UINT8_MIDDLE, Scheme

ACCUMULATOR_LIMIT = 2**31
BIAS_LIMIT = 2.0**30


@dataclass(frozen=True)
class QParams:
    """How a uint8 activation reads as a real number: real = scale * (q - zero_point), q in [q_min, q_max].

    `scale` is a float32 value held as a Python float.
    """

    scale: float
    zero_point: int
    q_min: int
    q_max: int

    def narrowed(self, low: float | None, high: float | None) -> QParams:
        """The codes that a clamp to [low, high] leaves (ReLU: low = 0)."""
        q_min = self.q_min if low is None else max(self.q_min, self._code(low))
        q_max = self.q_max if high is None else min(self.q_max, self._code(high))
        return QParams(self.scale, self.zero_point, min(q_min, self.q_max), max(q_max, self.q_min))

    def _code(self, value: float) -> int:
        return int(quantize(torch.tensor(value), self.scale, self.zero_point, self.q_min, self.q_max))


@dataclass(frozen=True)
class QWeight:
    """An int8 weight: real = scale * (q - zero_point), over [outputs, inputs, taps].

    `values` int8 of the float weight's shape; `scale` float32 and `zero_point` int8, both [outputs or 1, blocks], a
    block being `block` consecutive inputs.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    block: int

    def dequantize(self) -> Tensor:
        """The float32 weight that this one stands for."""
        return dequantize_weight(self.values, self.scale, self.zero_point, self.block)


def round_to_float32(value: float) -> float:
    """A float64 number rounded once to float32, held as a Python float."""
    return float(torch.tensor(value, dtype=torch.float64).float())


def activation_qparams(lo: float, hi: float, scheme: Scheme) -> QParams:
    """Scale and zero point of a uint8 activation with that range. Raises ValueError for a range that is not finite."""
    ends = torch.tensor([min(lo, 0.0), max(hi, 0.0)], dtype=torch.float64)
    if not bool(torch.isfinite(ends).all()):
        raise ValueError(f"range [{lo}, {hi}] is not finite")
    scale, zero_point = scheme.choose(ends[0], ends[1], UINT8_MIDDLE)
    return QParams(float(scale), int(zero_point), *scheme.codes(UINT8_MIDDLE))


PROBABILITIES = QParams(round_to_float32(1 / 255), 0, 0, 255)  # of attention: fixed, not observed


def dynamic_codes(x: Tensor, over: tuple[int, ...], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x (int32) with their scale and zero point, from the range along the dimensions `over`.

    Raises ValueError for values that are not finite.
    """
    if x.numel():
        lo, hi = x.amin(over, keepdim=True).double(), x.amax(over, keepdim=True).double()
    else:
        lo = hi = x.sum(over, keepdim=True).double()  # the range of nothing is 0
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise ValueError("dynamic quantization met a value that is not finite (NaN or infinity)")
    scale, zero_point = scheme.choose(lo.clamp(max=0), hi.clamp(min=0), UINT8_MIDDLE)
    return quantize(x, scale, zero_point, *scheme.codes(UINT8_MIDDLE)), scale, zero_point


def quantize(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, q_min: int, q_max: int) -> Tensor:
    """Codes of x as int32: a true division, half to even, clamped before conversion, NaN to the lowest code."""
    return saturate_(torch.div(x, scale), zero_point, q_min, q_max)


def saturate_(v: Tensor, zero_point: int | Tensor, q_min: int, q_max: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """R(v) = int(min(max(rne(v), q_min - zero_point), q_max - zero_point)) + zero_point; NaN gives q_min.

    v is overwritten: the pages of fresh memory would cost more than the arithmetic.
    """
    offset = torch.as_tensor(zero_point, dtype=v.dtype)
    rounded = v.round_().nan_to_num_(-math.inf, math.inf, -math.inf)
    return rounded.clamp_(q_min - offset, q_max - offset).add_(offset).to(dtype)


def dequantize(q: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """f32(q - zero_point) * scale."""
    return (q.int() - zero_point).float() * scale


def multiplier(x_scale: float, weight_scale: Tensor | float, y_scale: float = 1.0) -> Tensor:
    """f32(f64(x_scale) * weight_scale / y_scale), of the shape of the weight scales."""
    scales = torch.as_tensor(weight_scale, dtype=torch.float64)
    return (torch.as_tensor(x_scale, dtype=torch.float64) * scales / y_scale).float()


def _blocks(weight: Tensor, block: int, fill: float) -> Tensor:
    """[outputs, inputs, ...] as [outputs, blocks, block * taps]; a short last block is filled up."""
    flat = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    short = -flat.shape[1] % block
    flat = torch.nn.functional.pad(flat, (0, 0, 0, short), value=fill)
    return flat.reshape(flat.shape[0], flat.shape[1] // block, -1)


def spread(per_block: Tensor, block: int, weight: Tensor) -> Tensor:
    """[rows, blocks] to a shape that broadcasts against the weight."""
    wide = per_block if per_block.shape[1] == 1 else per_block.repeat_interleave(block, dim=1)[:, : weight.shape[1]]
    return wide.reshape(*wide.shape, *[1] * (weight.dim() - 2))


def weight_range(weight: Tensor, granularity: Granularity, group_size: int) -> tuple[Tensor, Tensor, int]:
    """lo, hi (float64, [outputs or 1, blocks], zero included) and the block, for a weight [outputs, inputs, ...]."""
    block = max(granularity.block(weight.shape[1], group_size), 1)
    blocks = _blocks(weight, block, 0.0)
    lo, hi = blocks.amin(2).double().clamp(max=0.0), blocks.amax(2).double().clamp(min=0.0)
    if granularity.channels_share:
        lo, hi = lo.amin((0, 1), keepdim=True), hi.amax((0, 1), keepdim=True)
    return lo, hi, block


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError for NaN and infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that are not finite (NaN or infinity)")


def quantize_weight(
    weight: Tensor, granularity: Granularity, scheme: Scheme, group_size: int, smallest_scale: Tensor | None = None
) -> QWeight:
    """Quantize a weight [outputs, inputs, ...] to int8.

    `smallest_scale` [outputs, 1] raises the scales (the bias rule; see `bias_floor`). Raises ValueError when the weight
    is not finite or not float32.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"the weight is {str(weight.dtype)[6:]}; make the model float32 first, with model.float()")
    require_finite("the weight", weight)
    lo, hi, block = weight_range(weight, granularity, group_size)
    if smallest_scale is not None and granularity.channels_share:
        smallest_scale = smallest_scale.amax(0, keepdim=True)
    scale, zero_point = scheme.choose(lo, hi, INT8_MIDDLE, smallest_scale)
    codes = quantize(
        weight, spread(scale, block, weight), spread(zero_point, block, weight), *scheme.codes(INT8_MIDDLE)
    )
    return QWeight(codes.to(torch.int8), scale, zero_point.to(torch.int8), block)


def dequantize_weight(values: Tensor, scale: Tensor, zero_point: Tensor, block: int) -> Tensor:
    """The float32 weight of int8 `values` [outputs, inputs, ...]; see QWeight."""
    return dequantize(values, spread(scale, block, values), spread(zero_point.int(), block, values))


def centred(values: Tensor, zero_point: Tensor, block: int) -> Tensor:
    """q - zero_point as int32, of the weight's shape."""
    return values.int() - spread(zero_point.int(), block, values)


def bias_floor(bias: Tensor, x_scale: float) -> Tensor:
    """[outputs, 1]: the weight scale below which |bias| / (x_scale * scale) would exceed 2^30."""
    return (bias.double().abs() / (x_scale * BIAS_LIMIT)).unsqueeze(1)


def quantize_bias(bias: Tensor, x_scale: float, weight_scale: Tensor) -> Tensor:
    """b_q = rne(b / (x_scale * weight_scale)) in float64, int32 [outputs]; weight_scale [outputs or 1, 1]."""
    return (bias.double() / (x_scale * weight_scale.double()[:, 0])).round().to(torch.int32)


def check_accumulator(layer: str, weight: QWeight, bias: Tensor | None) -> None:
    """Raise ValueError unless 255 * sum |q_w - z_w| + |b_q| < 2^31 for each output channel (and each block)."""
    sums = _blocks(centred(weight.values, weight.zero_point, weight.block).double().abs(), weight.block, 0.0).sum(2)
    bound = 255 * sums.amax(1)
    if bias is not None:
        bound = bound + bias.double().abs()
    if bound.numel() and float(bound.max()) >= ACCUMULATOR_LIMIT:
        raise ValueError(
            f"layer {layer}: its int32 sum may reach {int(bound.max())}, the bound is {ACCUMULATOR_LIMIT - 1}; "
            f"name it in keep_float"
        )


def check_products(layer: str, count: int) -> None:
    """Raise ValueError unless a sum of `count` products of two activations stays below 2^31: 255 * 255 * count."""
    if 255 * 255 * count >= ACCUMULATOR_LIMIT:
        raise ValueError(
            f"layer {layer}: its int32 sum of {count} products may reach {255 * 255 * count}, the bound is "
            f"{ACCUMULATOR_LIMIT - 1}; name it in keep_float"
        )
