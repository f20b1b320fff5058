"""The specification, executed: integer sums as exact matrix products of floats, every float32 step rounded on its own.

A float32 holds every integer up to 2^24, a float64 up to 2^53: where a layer's own weights keep its sums within 2^24
(most do) they are formed in float32, elsewhere in float64, so they are exact whatever the order, the thread count or
the CPU. (The factors have 8 bits: exact even where torch may use bfloat16 for float32 products.) A float32 convolution
without that bound and torch._int_mm (saturates on some CPUs) would not be exact.

    (1) layer         R(f32(acc) * m [+ f32(q_r - z_r) * m_r]),  m = f32(s_x s_w / s_y), m_r = f32(s_r / s_y)
    (2) in blocks     t = f32(b / s_y);  t = t + f32(acc_g) * m_g  for each block g;  R(t)
    (3) accumulator   f32(acc) * f32(s_x s_w)
    (4) dynamic       f32(acc) * (s_x s_w) + b
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qbench.backends import reference_between as between
from qbench.backends import reference_lstm
from qbench.backends import reference_transformer as transformer
from qbench.backends.reference_between import requantizer, shifted
from qbench.backends.reference_transposed import TransposedSums
from qbench.numerics import centred, dequantize_weight, dynamic_codes, multiplier
from qbench.recipe import option
from qbench.transposed import swapped

if TYPE_CHECKING:
    from qbench.program import Macs

aten = torch.ops.aten

Kernel = Callable[..., Any]
Constants = dict[str, Any]
LARGEST_EXACT_FLOAT32 = 2**24


def _clamped(c: Constants) -> Callable[[Tensor], Tensor]:
    """The clamp of a float result, where the activation has no codes to narrow."""
    bounds = c["low"], c["high"]
    return (lambda v: v.contiguous()) if bounds == (None, None) else lambda v: v.clamp(*bounds).contiguous()


# --- integer sums ----------------------------------------------------------------------------------------------------


def _centred_weight(c: Constants) -> Tensor:
    """q_w - z_w, in the smallest float type in which every sum of the layer is exact: 255 sum |q_w - z_w| + |b_q|."""
    zero_point, bias = c["weight_zero_point"], c["bias"]
    zero_point = torch.zeros_like(c["weight_scale"], dtype=torch.int8) if zero_point is None else zero_point
    weight = centred(c["weight"], zero_point, c["block"]).double()
    largest = 255 * float(weight.flatten(1).abs().sum(1).amax()) if weight.numel() else 0.0
    if bias is not None and not bias.is_floating_point() and bias.numel():
        largest += float(bias.double().abs().amax())
    return weight.float() if largest <= LARGEST_EXACT_FLOAT32 else weight


class _LinearSums:
    """acc[..., o] = sum_i x[..., i] w[o, i] of integers x, one tensor for each block of inputs."""

    def __init__(self, c: Constants, macs: Macs) -> None:
        self.weight, self.block, self.macs = _centred_weight(c), c["block"], macs
        self.dtype = self.weight.dtype

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        x = x.to(self.dtype)
        self.macs.int8 += x.shape[:-1].numel() * self.weight.numel()
        for first in range(0, self.weight.shape[1], self.block):
            inputs = slice(first, first + self.block)
            yield torch.matmul(x[..., inputs], self.weight[:, inputs].T)

    def by_output(self, per_output: Tensor) -> Tensor:
        """[outputs or 1] to the shape that broadcasts against a sum."""
        return per_output

    def row(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x that one dynamic scale covers."""
        return (x.dim() - 1,)


class _ConvSums:
    """acc[n, o, ...] = x [n, c, ...] convolved with w [o, c / groups, ...], one tensor for each block of inputs.

    In memory the channels come last: the pixels of a 1 x 1 kernel are the rows of a matrix as they lie.
    """

    def __init__(self, c: Constants, macs: Macs) -> None:
        self.flat = c["weight"].dim() == 3  # one dimension is computed as two, the first of size 1
        weight = _centred_weight(c)
        self.dtype = weight.dtype
        self.weight = weight.unsqueeze(2) if self.flat else weight
        self.stride = [1] * self.flat + c["stride"]
        self.padding = [0] * self.flat + c["padding"]
        self.dilation = [1] * self.flat + c["dilation"]
        self.groups, self.block, self.macs = c["groups"], c["block"], macs
        self.depthwise = self.weight.shape[1] == 1 and self.groups > 1

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        x = x.to(self.dtype)
        windows = self._windows(x.unsqueeze(2) if self.flat else x)
        self.macs.int8 += windows.shape[:3].numel() * self.weight.numel()
        product = self._depthwise if self.depthwise else self._product
        for first in range(0, self.weight.shape[1], self.block):
            sums = product(windows, slice(first, first + self.block)).permute(0, 3, 1, 2)
            yield sums.squeeze(2) if self.flat else sums

    def _windows(self, x: Tensor) -> Tensor:
        """A view [n, oh, ow, kh, kw, c] of the padded input; x is centred: zero is the zero point."""
        (ph, pw), (sh, sw), (dh, dw) = self.padding, self.stride, self.dilation
        x = functional.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)) if ph or pw else x.permute(0, 2, 3, 1)
        kh, kw = self.weight.shape[2:]
        oh = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
        ow = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
        if min(oh, ow) < 1:
            raise ValueError(f"a kernel of {kh} x {kw} does not fit into a padded input of {x.shape[1]} x {x.shape[2]}")
        n, h, w, c = x.stride()
        return x.as_strided((x.shape[0], oh, ow, kh, kw, x.shape[3]), (n, h * sh, w * sw, h * dh, w * dw, c))

    def _product(self, windows: Tensor, inputs: slice) -> Tensor:
        n, oh, ow, _, _, _ = windows.shape
        by_group = windows.unflatten(5, (self.groups, -1))[..., inputs].permute(5, 0, 1, 2, 3, 4, 6)
        weight = self.weight[:, inputs].permute(0, 2, 3, 1).flatten(1).unflatten(0, (self.groups, -1))
        columns = by_group.reshape(self.groups, n * oh * ow, weight.shape[2])  # no -1: a batch may be empty
        return torch.bmm(columns, weight.transpose(1, 2)).transpose(0, 1).reshape(n, oh, ow, len(self.weight))

    def _depthwise(self, windows: Tensor, inputs: slice) -> Tensor:
        """One input a group: tap by tap."""
        kh, kw, channels = windows.shape[3:]
        multiple = self.weight.shape[0] // channels
        windows = windows.repeat_interleave(multiple, 5) if multiple > 1 else windows
        taps = self.weight[:, 0].permute(1, 2, 0).contiguous()
        sums = windows.new_zeros(*windows.shape[:3], len(self.weight))
        for i in range(kh):
            for j in range(kw):
                sums += windows[:, :, :, i, j] * taps[i, j]
        return sums

    def by_output(self, per_output: Tensor) -> Tensor:
        """[outputs or 1] to the shape that broadcasts against a sum."""
        return per_output.reshape(-1, *[1] * (1 if self.flat else 2))

    def row(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x that one dynamic scale covers."""
        return tuple(range(1, x.dim()))


def _transposed_sums(c: Constants, macs: Macs) -> TransposedSums:
    return TransposedSums(_centred_weight(c), c, macs)


Sums = _LinearSums | _ConvSums | TransposedSums


# --- layers ----------------------------------------------------------------------------------------------------------


def _static(sums: Sums, c: Constants) -> Kernel:
    """Equations (1), (2) and (3)."""
    y_scale = 1.0 if c["scale"] is None else c["scale"]
    multipliers = [sums.by_output(m) for m in multiplier(c["x_scale"], c["weight_scale"], y_scale).unbind(1)]
    residual_multiplier = multiplier(c["residual_scale"], 1.0, y_scale)
    bias, finish = c["bias"], _clamped(c) if c["scale"] is None else requantizer(c)
    on_grid = bias is not None and not bias.is_floating_point()
    grid_bias = sums.by_output(bias.to(sums.dtype)) if on_grid else None
    start = None if bias is None or on_grid else sums.by_output((bias.double() / y_scale).float())

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = start
        for acc, m in zip(sums(shifted(x, c["x_zero_point"], sums.dtype)), multipliers, strict=True):
            term = (acc if grid_bias is None else acc.add_(grid_bias)).float().mul_(m)
            total = term if total is None else term.add_(total)
        assert total is not None
        if residual is not None:
            total.add_(shifted(residual, c["residual_zero_point"], torch.float32).mul_(residual_multiplier))
        return finish(total)

    return run


def _dynamic_codes(scheme_name: str) -> Callable[[Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]:
    """Quantizes x with its range over some dimensions: q - z as int32, and the scale with those of size 1."""
    scheme = option("activation_scheme", scheme_name)

    def codes_of(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        q, scale, zero_point = dynamic_codes(x, over, scheme)
        return q - zero_point, scale

    return codes_of


def _dynamic(sums: Sums, c: Constants) -> Kernel:
    """Equation (4), after each row (or the whole tensor) was quantized with its own range."""
    codes_of, per_row = _dynamic_codes(c["scheme"]), c["rows"] == "per_row"
    weight_scales = [sums.by_output(s) for s in c["weight_scale"].unbind(1)]
    bias = None if c["bias"] is None else sums.by_output(c["bias"])

    def run(x: Tensor) -> Tensor:
        codes, scale = codes_of(x, sums.row(x) if per_row or not len(x) else tuple(range(x.dim())))
        scales = (scale * weight_scale for weight_scale in weight_scales)
        terms = (acc.float().mul_(s) for acc, s in zip(sums(codes), scales, strict=True))
        total: Tensor = functools.reduce(lambda total, term: term.add_(total), terms)
        return (total if bias is None else total.add_(bias)).contiguous()

    return run


def _weight_only(
    c: Constants,
    macs: Macs,
    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    products: Callable[[Tensor, Tensor], int] | None = None,
) -> Kernel:
    """The weight of this one layer is read back as float32 for the length of the call.

    `products` counts the multiply-accumulates of an input and its result.
    """
    zero_point = c["weight_zero_point"]
    zero_point = torch.zeros_like(c["weight_scale"], dtype=torch.int8) if zero_point is None else zero_point
    per_output = c["weight"][0].numel()
    count = products or (lambda x, y: y.numel() * per_output)

    def run(x: Tensor) -> Tensor:
        y = apply(x, dequantize_weight(c["weight"], c["weight_scale"], zero_point, c["block"]), c["bias"])
        macs.float32 += count(x, y)
        return y

    return run


def _weight_only_conv(c: Constants, macs: Macs) -> Kernel:
    convolve = functional.conv1d if c["weight"].dim() == 3 else functional.conv2d
    window = (c["stride"], c["padding"], c["dilation"], c["groups"])
    return _weight_only(c, macs, lambda x, weight, bias: convolve(x, weight, bias, *window))


def _weight_only_conv_transpose(c: Constants, macs: Macs) -> Kernel:
    transpose = functional.conv_transpose1d if c["weight"].dim() == 3 else functional.conv_transpose2d
    groups, inputs = c["groups"], c["weight"].shape[1] * c["groups"]
    window = (c["stride"], c["padding"], c["output_padding"], groups, c["dilation"])
    return _weight_only(
        c,
        macs,
        lambda x, weight, bias: transpose(x, swapped(weight, groups), bias, *window),
        lambda x, y: x.numel() // inputs * c["weight"].numel(),
    )


def _lstm_sums(c: Constants, name: str, macs: Macs) -> _LinearSums:
    """The sums of one of an LSTM's two products."""
    held = {f"weight{part}": c[f"{name}{part}"] for part in ("", "_scale", "_zero_point")}
    return _LinearSums({**held, "block": c[f"{name}_block"], "bias": c["bias"]}, macs)


def _lstm(c: Constants, macs: Macs) -> Kernel:
    return reference_lstm.static(_lstm_sums(c, "weight_ih", macs), _lstm_sums(c, "weight_hh", macs), c)


def _dynamic_lstm(c: Constants, macs: Macs) -> Kernel:
    products = _lstm_sums(c, "weight_ih", macs), _lstm_sums(c, "weight_hh", macs)
    return reference_lstm.dynamic(*products, _dynamic_codes(c["scheme"]), c)


MAKERS: dict[str, Callable[[Constants, Macs], Kernel]] = {
    "quantize": between.quantize,
    "dequantize": between.dequantize,
    "linear": lambda c, macs: _static(_LinearSums(c, macs), c),
    "conv": lambda c, macs: _static(_ConvSums(c, macs), c),
    "conv_transpose": lambda c, macs: _static(_transposed_sums(c, macs), c),
    "dynamic_linear": lambda c, macs: _dynamic(_LinearSums(c, macs), c),
    "dynamic_conv": lambda c, macs: _dynamic(_ConvSums(c, macs), c),
    "dynamic_conv_transpose": lambda c, macs: _dynamic(_transposed_sums(c, macs), c),
    "weight_only_linear": lambda c, macs: _weight_only(c, macs, functional.linear),
    "weight_only_conv": _weight_only_conv,
    "weight_only_conv_transpose": _weight_only_conv_transpose,
    "lstm": _lstm,
    "dynamic_lstm": _dynamic_lstm,
    "weight_only_lstm": reference_lstm.weight_only,
    "embedding": transformer.embedding,
    "attention": transformer.attention,
    "dynamic_attention": transformer.dynamic_attention,
    "layer_norm": transformer.layer_norm,
    "add": between.add,
    "mul": between.mul,
    "mean": between.mean,
    "average_pool": between.average_pool,
    "adaptive_average_pool": between.adaptive_average_pool,
    "channel_affine": between.channel_affine,
    "rescale": between.rescale,
    "clamp": between.clamp,
    "table": between.table,
}


def make(name: str, constants: Constants, macs: Macs) -> Kernel:
    """The kernel of an operation of `qbench.ops`, with its constants bound and its name set for the printed code."""
    kernel = MAKERS[name](constants, macs)

    def named(*activations: Tensor | None) -> Any:
        return kernel(*activations)

    named.__name__, named.__module__ = name, __name__
    return named
