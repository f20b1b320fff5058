"""Layers with an int8 weight on the native engine: the weight is packed once, its arithmetic is engine.h's.

Images are channels last in memory, so that no engine call moves them; a result is a view of [N, C, H, W].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qbench.native.library import FOR_ALL, Finish, Operands, Rows, Weight, Window, byref, library
from qbench.numerics import multiplier

if TYPE_CHECKING:
    from qbench.program import Macs

Kernel = Callable[..., Any]
Constants = dict[str, Any]
TILE = 16  # outputs side by side in a packed weight: qb::TILE


# --- constants -------------------------------------------------------------------------------------------------------


class Held:
    """A ctypes structure with the tensors that it points into."""

    def __init__(self, structure: Any, *tensors: Tensor | None) -> None:
        self.structure, self.tensors = structure, tensors


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's first element."""
    return None if tensor is None else tensor.data_ptr()


def tiled(per_output: Tensor, groups: int) -> Tensor:
    """[outputs, blocks] as [blocks, groups, outputs of a group filled up to whole tiles]."""
    by_group = per_output.T.unflatten(1, (groups, -1))
    return functional.pad(by_group, (0, -by_group.shape[2] % TILE)).contiguous()


def _spread(per_row: Tensor, outputs: int) -> Tensor:
    """[outputs or 1, blocks] as [outputs, blocks]."""
    return per_row.expand(outputs, -1)


def packed(
    weight: Tensor, zero_points: Tensor | None, groups: int, block_depth: int, segment: int | None = None
) -> Held:
    """A qb::Weight of int8 [groups * outputs, depth], its products in the engine's order.

    `segment` counts products whose inputs lie side by side: by default a whole block.
    """
    outputs, depth = weight.shape[0] // groups, weight.shape[1]
    block_depth = min(block_depth, max(depth, 1))
    sizes = groups, outputs, depth, block_depth, segment or block_depth
    weight = weight.contiguous()  # held while it is read
    values = torch.empty(library().qb_packed_size(*sizes), dtype=torch.int8)
    totals = torch.empty(math.ceil(depth / block_depth), groups, math.ceil(outputs / TILE) * TILE, dtype=torch.int32)
    library().qb_pack(weight.data_ptr(), *sizes, values.data_ptr(), totals.data_ptr())
    tiles = None if zero_points is None else tiled(_spread(zero_points, len(weight)).int(), groups)
    return Held(Weight(values.data_ptr(), totals.data_ptr(), pointer(tiles), *sizes), values, totals, tiles)


def packed_depthwise(weight: Tensor, zero_points: Tensor | None) -> Held:
    """A qb::Weight of int8 [channels, 1, kh, kw]."""
    channels, _, *kernel = weight.shape
    weight = weight.contiguous()
    values = torch.empty(library().qb_packed_depthwise_size(channels, *kernel), dtype=torch.int8)
    totals = torch.empty(math.ceil(channels / TILE) * TILE, dtype=torch.int32)
    tiles = None if zero_points is None else tiled(_spread(zero_points, channels).int(), 1)
    library().qb_pack_depthwise(
        weight.data_ptr(), pointer(tiles), channels, *kernel, values.data_ptr(), totals.data_ptr()
    )
    taps = math.prod(kernel)
    structure = Weight(values.data_ptr(), totals.data_ptr(), pointer(tiles), 1, channels, taps, taps, taps)
    return Held(structure, values, totals, tiles)


def by_blocks(weight: Tensor, block: int) -> Tensor:
    """[outputs, inputs, kh, kw] as [outputs, products] in the order block, kernel row, kernel column, input."""
    last = weight.permute(0, 2, 3, 1)
    return torch.cat([last[..., i : i + block].flatten(1) for i in range(0, max(weight.shape[1], 1), block)], 1)


def finish_codes(c: Constants, multipliers: Tensor, groups: int) -> Held:
    """A qb::Finish of a static layer: codes, or the accumulator where `scale` is None."""
    y_scale, bias, outputs = c["scale"] or 1.0, c["bias"], len(c["weight"])
    m = tiled(_spread(multipliers, outputs), groups)
    on_grid = bias is not None and not bias.is_floating_point()
    grid = tiled(bias.int()[:, None], groups) if on_grid else None
    start = None if bias is None or on_grid else tiled((bias.double() / y_scale).float()[:, None], groups)
    low, high = (c.get(name) for name in ("low", "high"))
    finish = Finish(
        m.data_ptr(),
        pointer(grid),
        pointer(start),
        None,
        float(multiplier(c["residual_scale"], 1.0, y_scale)),
        c["residual_zero_point"],
        c["zero_point"],
        c["q_min"],
        c["q_max"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
        c["scale"] is None,
    )
    return Held(finish, m, grid, start)


def finish_floats(multipliers: Tensor | None, bias: Tensor | None, outputs: int, groups: int) -> Held:
    """A qb::Finish that leaves float32, bias last; `multipliers` None where the weight is read back."""
    m = None if multipliers is None else tiled(_spread(multipliers, outputs), groups)
    last = None if bias is None else tiled(bias[:, None], groups)
    finish = Finish(pointer(m), None, None, pointer(last), 0.0, 0, 0, 0, 255, -math.inf, math.inf, True)
    return Held(finish, m, last)


# --- dynamic codes ---------------------------------------------------------------------------------------------------


def rows_as_codes(x: Tensor, rows: int, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scales and zero points of `rows` equal parts of a contiguous float32 x.

    Raises ValueError for values that are not finite.
    """
    codes = torch.empty_like(x, dtype=torch.uint8)
    scales, zero_points = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
    count = x.numel() // rows if rows else 0
    pointers = codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr()
    if library().qb_quantize_rows(x.data_ptr(), rows, count, scheme == "affine", *pointers):
        raise ValueError("dynamic quantization met a value that is not finite (NaN or infinity)")
    return codes, scales, zero_points


def floats(x: Tensor) -> Tensor:
    """A contiguous float32 x. Raises ValueError for another dtype: the engine reads bytes as they lie."""
    if x.dtype != torch.float32:
        raise ValueError(f"the layer takes float32, it got {str(x.dtype)[6:]}")
    return x.contiguous()


def codes(x: Tensor) -> Tensor:
    """A contiguous uint8 x. Raises ValueError for another dtype."""
    if x.dtype != torch.uint8:
        raise ValueError(f"the operation takes uint8 codes, it got {str(x.dtype)[6:]}")
    return x.contiguous()


# --- the shapes of layers --------------------------------------------------------------------------------------------


class _Rows:
    """A linear layer: x [..., inputs] to [..., outputs]."""

    def __init__(self, c: Constants) -> None:
        weight = c["weight"]
        self.outputs, self.inputs = weight.shape
        self.groups = 1
        self.weight = packed(weight, c["weight_zero_point"], 1, c["block"])
        self.window = Window(1, 1, self.inputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, c["block"])

    def multiply(self, *arguments: Any) -> int:
        """The engine's products; returns how many."""
        return int(library().qb_layer(*arguments))

    def multiply_floats(self, *arguments: Any) -> int:
        """As multiply, of float32: scales, finish, window, operands."""
        return int(library().qb_weight_only(byref(self.weight.structure), *arguments))

    def inward(self, x: Tensor) -> Tensor:
        if not x.dim() or x.shape[-1] != self.inputs:
            raise ValueError(f"a linear layer of {self.inputs} inputs met an input of shape {list(x.shape)}")
        return x

    def window_of(self, x: Tensor) -> tuple[Window, tuple[int, ...], int]:
        """The window, the shape of the result as the engine writes it, and how many samples there are."""
        return self.window, (*x.shape[:-1], self.outputs), x.shape[:-1].numel()

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


class _Images:
    """A convolution: x [N, C, H, W] or [N, C, L]."""

    weight: Held
    depthwise = False
    block: int

    def __init__(self, c: Constants) -> None:
        weight = c["weight"]
        self.flat = weight.dim() == 3  # one dimension is computed as two, the first of size 1
        weight = weight.unsqueeze(2) if self.flat else weight
        self.stride = [1] * self.flat + list(c["stride"])
        self.padding = [0] * self.flat + list(c["padding"])
        self.dilation = [1] * self.flat + list(c["dilation"])
        self.kernel, self.groups, self.block = list(weight.shape[2:]), c["groups"], c["block"]
        self.outputs, self.inputs = len(weight), weight.shape[1] * c["groups"]
        self.windows: dict[tuple[int, int], Window] = {}
        self.prepare(c, weight)

    def prepare(self, c: Constants, weight: Tensor) -> None:
        """Pack the weight [outputs, inputs of a group, kh, kw]."""
        if self.groups > 1 and self.outputs == self.inputs == self.groups:  # one input channel for each output channel
            self.groups = 1  # its constants lie channel by channel
            self.weight, self.depthwise = packed_depthwise(weight, c["weight_zero_point"]), True
        else:
            products = by_blocks(weight, self.block)
            taps_of_block = self.block * math.prod(self.kernel)
            lines = self.groups == 1 and self.block >= self.inputs and self.dilation[1] == 1
            segment = self.kernel[1] * self.inputs if lines else None
            self.weight = packed(products, c["weight_zero_point"], self.groups, taps_of_block, segment)

    def multiply(self, *arguments: Any) -> int:
        """The engine's products; returns how many."""
        return int((library().qb_depthwise if self.depthwise else library().qb_layer)(*arguments))

    def multiply_floats(self, *arguments: Any) -> int:
        """As multiply, of float32: scales, finish, window, operands."""
        return int(library().qb_weight_only(byref(self.weight.structure), *arguments))

    def inward(self, x: Tensor) -> Tensor:
        """[N, H, W, C]."""
        if x.dim() != (3 if self.flat else 4) or x.shape[1] != self.inputs:
            raise ValueError(f"a convolution of {self.inputs} channels met an input of shape {list(x.shape)}")
        return (x.unsqueeze(2) if self.flat else x).permute(0, 2, 3, 1)

    def window_of(self, x: Tensor) -> tuple[Window, tuple[int, ...], int]:
        n, h, w, _ = x.shape
        if (h, w) not in self.windows:
            self.windows[h, w] = self.make_window(h, w)
        window = self.windows[h, w]
        return window, (n, window.out_height, window.out_width, self.outputs), n

    def make_window(self, h: int, w: int) -> Window:
        out = self.out_sizes(h, w)
        return Window(h, w, self.inputs, *out, *self.kernel, *self.stride, *self.padding, *self.dilation, self.block)

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


class _Transposed(_Images):
    """A transposed convolution."""

    def __init__(self, c: Constants) -> None:
        self.more = [0] * (c["weight"].dim() == 3) + list(c["output_padding"])
        self.phase_windows: dict[tuple[int, int], Any] = {}
        super().__init__(c)

    def prepare(self, c: Constants, weight: Tensor) -> None:
        """Pack a weight for each phase: output pixels with the same y % stride and x % stride meet the same taps."""
        self.phases = list(itertools.product(*(range(s) for s in self.stride)))
        self.held = [
            packed(self.products(weight, phase), c["weight_zero_point"], self.groups, self.depth_of(phase))
            for phase in self.phases
        ]
        self.weight = Held((Weight * len(self.held))(*(held.structure for held in self.held))[0])

    def multiply(self, *arguments: Any) -> int:
        """The engine's products; returns how many."""
        return int(library().qb_transposed(*arguments, len(self.phases), math.prod(self.kernel)))

    def multiply_floats(self, *arguments: Any) -> int:
        """As multiply, of float32: scales, finish, window, operands."""
        taps = math.prod(self.kernel)
        weights = byref(self.weight.structure)
        return int(library().qb_weight_only_transposed(weights, *arguments, len(self.phases), taps))

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

    def window_of(self, x: Tensor) -> tuple[Any, tuple[int, ...], int]:
        n, h, w, _ = x.shape
        out = self.out_sizes(h, w)
        if (h, w) not in self.phase_windows:
            windows = [self.phase_window(phase, (h, w), out) for phase in self.phases]
            self.phase_windows[h, w] = (Window * len(windows))(*windows)[0]
        return self.phase_windows[h, w], (n, *out, self.outputs), n

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


def _progression(first: int, dilation: int, stride: int, kernel: int) -> tuple[int, int, int]:
    """The taps i < kernel with (first - i * dilation) divisible by the stride, as a range's arguments."""
    step = stride // math.gcd(stride, dilation)
    start = next((i for i in range(min(step, kernel)) if (first - i * dilation) % stride == 0), kernel)
    return start, kernel, step


Shape = _Rows | _Images
SHAPES: dict[str, Callable[[Constants], Shape]] = {"linear": _Rows, "conv": _Images, "conv_transpose": _Transposed}


# --- layers ----------------------------------------------------------------------------------------------------------


def static(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Codes in; codes out, or the accumulator as float32."""
    shape: Shape = SHAPES[kind](c)
    finish = finish_codes(c, multiplier(c["x_scale"], c["weight_scale"], c["scale"] or 1.0), shape.groups)
    zero_point = torch.tensor([c["x_zero_point"]], dtype=torch.int32)
    rows = Held(Rows(zero_point.data_ptr(), None, FOR_ALL), zero_point)
    dtype = torch.float32 if c["scale"] is None else torch.uint8

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = codes(shape.inward(x))
        window, size, samples = shape.window_of(x)
        y = torch.empty(size, dtype=dtype)
        if residual is not None:
            residual = codes(shape.as_result(residual))
            if residual.shape != y.shape:
                raise ValueError(f"a residual of shape {list(residual.shape)} met a result of {list(y.shape)}")
        operands = Operands(x.data_ptr(), pointer(residual), None, y.data_ptr(), samples)
        macs.int8 += shape.multiply(
            byref(shape.weight.structure),
            byref(finish.structure),
            byref(window),
            byref(rows.structure),
            byref(operands),
        )
        return shape.outward(y)

    return run


def dynamic(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; x becomes codes by its own range, of each row or of all."""
    shape: Shape = SHAPES[kind](c)
    finish = finish_floats(c["weight_scale"], c["bias"], len(c["weight"]), shape.groups)
    per_row = c["rows"] == "per_row"

    def run(x: Tensor) -> Tensor:
        x = floats(shape.inward(x))
        window, size, samples = shape.window_of(x)
        y = torch.empty(size)
        q, scales, zero_points = rows_as_codes(x, shape.rows(x) if per_row or not len(x) else 1, c["scheme"])
        rows = Rows(zero_points.data_ptr(), scales.data_ptr(), shape.pixels(size) if per_row else FOR_ALL)
        operands = Operands(q.data_ptr(), None, None, y.data_ptr(), samples)
        macs.int8 += shape.multiply(
            byref(shape.weight.structure), byref(finish.structure), byref(window), byref(rows), byref(operands)
        )
        return shape.outward(y)

    return run


class _FloatDepthwise(_Images):
    """A convolution of float32 with one input channel for each output channel."""

    def prepare(self, c: Constants, weight: Tensor) -> None:
        """The taps as [kernel height][kernel width][channels]."""
        self.groups, zero_points = 1, c["weight_zero_point"]  # its constants lie channel by channel
        self.taps = weight.permute(2, 3, 1, 0).contiguous()
        self.zero_points = None if zero_points is None else tiled(_spread(zero_points, self.outputs).int(), 1)
        self.bias = None if c["bias"] is None else tiled(c["bias"][:, None], 1)

    def multiply_floats(self, *arguments: Any) -> int:
        """The engine's products of scales, finish, window, operands; returns how many."""
        scales, _, window, operands = arguments
        constants = self.taps.data_ptr(), pointer(self.zero_points), scales, pointer(self.bias)
        return int(library().qb_weight_only_depthwise(*constants, window, operands))


def weight_only(kind: str, c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; the engine reads the weight back piece by piece, no float copy of it is made."""
    outputs, inputs = c["weight"].shape[:2]
    depthwise = kind == "conv" and inputs == 1 and 1 < outputs == c["groups"]
    shape: Shape = _FloatDepthwise(c) if depthwise else SHAPES[kind](c)
    scales = tiled(_spread(c["weight_scale"], outputs), shape.groups)
    finish = finish_floats(None, c["bias"], outputs, shape.groups)

    def run(x: Tensor) -> Tensor:
        x = floats(shape.inward(x))
        window, size, samples = shape.window_of(x)
        y = torch.empty(size)
        operands = Operands(x.data_ptr(), None, None, y.data_ptr(), samples)
        macs.float32 += shape.multiply_floats(
            scales.data_ptr(), byref(finish.structure), byref(window), byref(operands)
        )
        return shape.outward(y)

    return run
