"""The shapes of layers as the native engine computes them: a window that slides over rows, images, phases of a result.

Images are channels last in memory, so that no engine call moves them; a result is a view of [N, C, H, W]. Taps that
meet nothing but padding, many on an image of few pixels, are left out. A weight is packed when the first input comes.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbench.backends.native_operands import Constants, Held, by_blocks, packed, packed_depthwise, packed_winograd
from qbench.backends.native_writer import plain_torch
from qbench.native.library import Weight, Window, byref, library

WINOGRAD = "qb_winograd"
Taps = tuple[range, range]  # rows and columns of a kernel


@dataclass(frozen=True)
class Slid:
    """How a layer meets an input: `size` is the shape of the result as the engine writes it.

    `left_out` counts the products with padding that are not computed; `by` names the engine's function, `sizes` are
    what it takes beside the operands.
    """

    weight: Held
    window: Any
    size: tuple[int, ...]
    samples: int
    left_out: int = 0
    by: str = "qb_layer"
    sizes: tuple[int, ...] = ()

    def multiply(self, finish: Any, rows: Any, operands: Any) -> int:
        """The engine's products; returns how many."""
        engine = getattr(library(), self.by)
        return int(engine(byref(self.weight.structure), finish, byref(self.window), rows, operands, *self.sizes))


class RowsOfInputs:
    """A linear layer: x [..., inputs] to [..., outputs]."""

    def __init__(self, c: Constants) -> None:
        weight = c["weight"]
        self.outputs, self.inputs = weight.shape
        self.groups = 1
        self.weight = packed(weight, c["weight_zero_point"], 1, c["block"])
        self.window = Window(1, 1, self.inputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, c["block"])

    def multiply_floats(self, weight: Held, *arguments: Any) -> int:
        """The engine's products of float32: weight, scales, finish, window, operands; returns how many."""
        return int(library().qb_weight_only(byref(weight.structure), *arguments))

    def inward(self, x: Tensor) -> Tensor:
        if not x.dim() or x.shape[-1] != self.inputs:
            raise ValueError(f"a linear layer of {self.inputs} inputs met an input of shape {list(x.shape)}")
        return x

    def over(self, x: Tensor) -> Slid:
        """The layer on an input."""
        return Slid(self.weight, self.window, (*x.shape[:-1], self.outputs), x.shape[:-1].numel())

    def outward(self, y: Tensor) -> Tensor:
        return y

    def as_result(self, residual: Tensor) -> Tensor:
        """A tensor like the result as the engine writes that."""
        return residual

    def pixels(self, y: tuple[int, ...]) -> int:
        """Results that share a dynamic scale by row."""
        return 1

    def rows(self, x: Tensor) -> int:
        """Dynamic scales of an x, by row."""
        return x.shape[:-1].numel()


class Images:
    """A convolution: x [N, C, H, W] or [N, C, L]."""

    block: int

    def __init__(self, c: Constants) -> None:
        weight = c["weight"]
        self.flat = weight.dim() == 3  # one dimension is computed as two, the first of size 1
        self.weight = weight.unsqueeze(2) if self.flat else weight  # [outputs, inputs of a group, kh, kw]
        self.zero_points = c["weight_zero_point"]
        self.stride = [1] * self.flat + list(c["stride"])
        self.padding = [0] * self.flat + list(c["padding"])
        self.dilation = [1] * self.flat + list(c["dilation"])
        self.kernel, self.groups, self.block = list(self.weight.shape[2:]), c["groups"], c["block"]
        self.outputs, self.inputs = len(weight), weight.shape[1] * c["groups"]
        # One input channel for each output channel: its constants lie channel by channel.
        self.depthwise = self.groups > 1 and self.outputs == self.inputs == self.groups
        self.groups = 1 if self.depthwise else self.groups
        self.packed: dict[Any, Held] = {}
        self.met: dict[tuple[int, int], tuple[Taps, Window]] = {}

    def pack(self, taps: Taps) -> Held:
        """The weight at these taps in the engine's order."""
        rows, columns = taps
        weight = self.weight[:, :, rows.start : rows.stop, columns.start : columns.stop]
        if self.depthwise:
            return packed_depthwise(weight, self.zero_points)
        lines = self.groups == 1 and self.block >= self.inputs and self.dilation[1] == 1
        segment = len(columns) * self.inputs if lines else None
        depth = self.block * len(rows) * len(columns)
        return packed(by_blocks(weight, self.block), self.zero_points, self.groups, depth, segment)

    def multiply_floats(self, weight: Held, *arguments: Any) -> int:
        """The engine's products of float32: weight, scales, finish, window, operands; returns how many."""
        return int(library().qb_weight_only(byref(weight.structure), *arguments))

    def inward(self, x: Tensor) -> Tensor:
        """[N, H, W, C]."""
        if x.dim() != (3 if self.flat else 4) or x.shape[1] != self.inputs:
            raise ValueError(f"a convolution of {self.inputs} channels met an input of shape {list(x.shape)}")
        return (x.unsqueeze(2) if self.flat else x).permute(0, 2, 3, 1)

    def over(self, x: Tensor) -> Slid:
        n, h, w, _ = x.shape
        if (h, w) not in self.met:
            self.met[h, w] = self.meeting(h, w)
        (rows, columns), window = self.met[h, w]
        size = n, window.out_height, window.out_width, self.outputs
        per_tap = math.prod(size) * self.weight.shape[1]
        left_out = per_tap * (math.prod(self.kernel) - len(rows) * len(columns))
        if self.filters(window):
            return Slid(self.held(WINOGRAD, self.pack_filters), window, size, n, by=WINOGRAD)
        by = "qb_depthwise" if self.depthwise else "qb_layer"
        return Slid(self.held((rows, columns), self.pack), window, size, n, left_out, by)

    def filters(self, window: Any) -> bool:
        """Is the layer computed by Winograd's minimal filtering?"""
        pays = library().qb_winograd_pays
        return self.can_filter(window) and bool(pays(self.outputs, byref(window))) and self.sums_fit

    def can_filter(self, window: Any) -> bool:
        """Is the layer of the kind that qb_winograd computes?"""
        axes = [
            (getattr(window, f"kernel_{axis}"), getattr(window, f"stride_{axis}"), getattr(window, f"dilation_{axis}"))
            for axis in ("height", "width")
        ]
        return axes == [(3, 1, 1)] * 2 and self.groups == 1 and not self.depthwise and self.block >= self.inputs

    @functools.cached_property
    def sums_fit(self) -> bool:
        """Are all sums that the weight can lead to exact by minimal filtering? See qb_winograd."""
        with plain_torch():
            weight = self.weight.flatten(1).int()
            if self.zero_points is not None:
                weight = weight - self.zero_points.int()
            most = max(weight.clamp(min=0).sum(1).max(), -weight.clamp(max=0).sum(1).min())
        return 255 * int(most) < 2**25

    def pack_filters(self, _: str) -> Held:
        """The weight as minimal filtering takes it."""
        return packed_winograd(self.weight, self.zero_points)

    def held(self, key: Any, pack: Any) -> Held:
        """What `pack` makes of a key, made once; also within a run that is only written down."""
        if key not in self.packed:
            with plain_torch():
                return self.packed.setdefault(
                    key, pack(key)
                )  # of two threads the first one's is kept: plans point to it
        return self.packed[key]

    def meeting(self, h: int, w: int) -> tuple[Taps, Window]:
        """The taps that meet an image of this size, and the window of these alone."""
        out = self.out_sizes(h, w)
        rows, columns = (
            _met(*axis) for axis in zip((h, w), out, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        padding = [p - t.start * d for p, t, d in zip(self.padding, (rows, columns), self.dilation, strict=True)]
        sizes = *out, len(rows), len(columns), *self.stride, *padding, *self.dilation
        return (rows, columns), Window(h, w, self.inputs, *sizes, self.block)

    def out_sizes(self, h: int, w: int) -> list[int]:
        padded = [size + 2 * p for size, p in zip((h, w), self.padding, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        out = [(size - span) // s + 1 for size, span, s in zip(padded, spans, self.stride, strict=True)]
        if min(out) < 1:
            kh, kw = self.kernel
            raise ValueError(f"a kernel of {kh} x {kw} does not fit into a padded input of {padded[0]} x {padded[1]}")
        return out

    def outward(self, y: Tensor) -> Tensor:
        y = y.permute(0, 3, 1, 2)
        return y.squeeze(2) if self.flat else y

    def as_result(self, residual: Tensor) -> Tensor:
        return (residual.unsqueeze(2) if self.flat else residual).permute(0, 2, 3, 1)

    def pixels(self, y: tuple[int, ...]) -> int:
        return y[1] * y[2]

    def rows(self, x: Tensor) -> int:
        return len(x)


class Transposed(Images):
    """A transposed convolution."""

    def __init__(self, c: Constants) -> None:
        super().__init__(c)
        self.groups, self.depthwise = c["groups"], False
        self.more = [0] * self.flat + list(c["output_padding"])
        self.phase_windows: dict[tuple[int, int], Any] = {}
        # Output pixels with the same y % stride and x % stride meet the same taps.
        self.phases = list(itertools.product(*(range(s) for s in self.stride)))
        self.sizes = len(self.phases), math.prod(self.kernel)  # phases and taps, as the engine takes them

    def pack_phases(self, phases: tuple[tuple[int, ...], ...]) -> Held:
        """A weight for each phase, side by side."""
        each = [
            packed(self.products(self.weight, phase), self.zero_points, self.groups, self.depth_of(phase))
            for phase in phases
        ]
        tensors = [tensor for held in each for tensor in held.tensors]
        return Held((Weight * len(each))(*(held.structure for held in each))[0], *tensors)

    def multiply_floats(self, weight: Held, *arguments: Any) -> int:
        """As a convolution's, of all phases."""
        return int(library().qb_weight_only_transposed(byref(weight.structure), *arguments, *self.sizes))

    def taps(self, phase: tuple[int, ...]) -> list[range]:
        """The taps that reach the pixels of a phase, along each axis."""
        return [
            range(*_progression(first + p, d, s, k))
            for first, p, d, s, k in zip(phase, self.padding, self.dilation, self.stride, self.kernel, strict=True)
        ]

    def products(self, weight: Tensor, phase: tuple[int, ...]) -> Tensor:
        """The weight [outputs, inputs of a group, kh, kw] at a phase's taps; where there are none, one tap of 0."""
        rows, columns = (list(taps) for taps in self.taps(phase))
        if not rows or not columns:
            return torch.zeros(len(weight), weight.shape[1], dtype=torch.int8)
        return by_blocks(weight[:, :, rows][:, :, :, columns], self.block)

    def depth_of(self, phase: tuple[int, ...]) -> int:
        """Products in a block of a phase's weight."""
        return int(self.block * max(math.prod(len(taps) for taps in self.taps(phase)), 1))

    def over(self, x: Tensor) -> Slid:
        n, h, w, _ = x.shape
        out = self.out_sizes(h, w)
        if (h, w) not in self.phase_windows:
            windows = [self.phase_window(phase, (h, w), out) for phase in self.phases]
            self.phase_windows[h, w] = (Window * len(windows))(*windows)[0]
        weights = self.held(tuple(self.phases), self.pack_phases)
        return Slid(weights, self.phase_windows[h, w], (n, *out, self.outputs), n, by="qb_transposed", sizes=self.sizes)

    def phase_window(self, phase: tuple[int, ...], size: tuple[int, int], out: list[int]) -> Window:
        """An ordinary convolution of stride 1 from x to every stride-th pixel of the result."""
        counts = [
            -(-(length - first) // s) if length > first else 0
            for length, first, s in zip(out, phase, self.stride, strict=True)
        ]
        taps = self.taps(phase)
        if not all(taps):  # one tap, beside the image
            kernel, padding, dilation = [1, 1], [-size[0], -size[1]], [1, 1]
        else:
            kernel = [len(axis) for axis in taps]
            padding = [
                -(first + p - axis[0] * d) // s
                for first, p, axis, d, s in zip(phase, self.padding, taps, self.dilation, self.stride, strict=True)
            ]
            dilation = [-(axis.step * d) // s for axis, d, s in zip(taps, self.dilation, self.stride, strict=True)]
        placed = *out, *phase, *self.stride
        return Window(*size, self.inputs, *counts, *kernel, 1, 1, *padding, *dilation, self.block, *placed)

    def out_sizes(self, h: int, w: int) -> list[int]:
        out = [
            (size - 1) * s - 2 * p + d * (k - 1) + 1 + more
            for size, s, p, d, k, more in zip(
                (h, w), self.stride, self.padding, self.dilation, self.kernel, self.more, strict=True
            )
        ]
        if min(out) < 1:
            raise ValueError(f"a padding of {self.padding} leaves nothing of a result of {h} x {w} pixels")
        return out


def _met(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> range:
    """The taps of an axis from the first to the last that meets a pixel; all where none does."""
    met = [tap for tap in range(kernel) if any(0 <= y * stride - padding + tap * dilation < size for y in range(out))]
    first = min(met[0], padding // dilation) if met else 0  # a window has no negative padding
    return range(first, met[-1] + 1) if met else range(kernel)


def _progression(first: int, dilation: int, stride: int, kernel: int) -> tuple[int, int, int]:
    """The taps i < kernel with (first - i * dilation) divisible by the stride, as a range's arguments."""
    step = stride // math.gcd(stride, dilation)
    start = next((i for i in range(min(step, kernel)) if (first - i * dilation) % stride == 0), kernel)
    return start, kernel, step
