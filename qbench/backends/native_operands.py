"""What the native engine's calls point to: packed weights, constants of a result, codes of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qbench.native.library import Finish, Weight, library
from qbench.numerics import multiplier

Kernel = Callable[..., Any]
Constants = dict[str, Any]
NOT_FINITE = "dynamic quantization met a value that is not finite (NaN or infinity)"
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


def spread_out(per_row: Tensor, outputs: int) -> Tensor:
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
    tiles = None if zero_points is None else tiled(spread_out(zero_points, len(weight)).int(), groups)
    return Held(Weight(values.data_ptr(), totals.data_ptr(), pointer(tiles), *sizes), values, totals, tiles)


def packed_depthwise(weight: Tensor, zero_points: Tensor | None) -> Held:
    """A qb::Weight of int8 [channels, 1, kh, kw]."""
    channels, _, *kernel = weight.shape
    weight = weight.contiguous()
    values = torch.empty(library().qb_packed_depthwise_size(channels, *kernel), dtype=torch.int8)
    totals = torch.empty(math.ceil(channels / TILE) * TILE, dtype=torch.int32)
    tiles = None if zero_points is None else tiled(spread_out(zero_points, channels).int(), 1)
    library().qb_pack_depthwise(
        weight.data_ptr(), pointer(tiles), channels, *kernel, values.data_ptr(), totals.data_ptr()
    )
    taps = math.prod(kernel)
    structure = Weight(values.data_ptr(), totals.data_ptr(), pointer(tiles), 1, channels, taps, taps, taps)
    return Held(structure, values, totals, tiles)


def packed_winograd(weight: Tensor, zero_points: Tensor | None) -> Held:
    """A qb::Weight for qb_winograd of int8 [outputs, inputs, 3, 3]."""
    outputs, inputs = weight.shape[:2]
    weight = weight.permute(0, 2, 3, 1).contiguous()
    values = torch.empty(library().qb_packed_winograd_size(outputs, inputs), dtype=torch.int8)
    totals = torch.empty(math.ceil(outputs / TILE) * TILE, dtype=torch.int32)
    tiles = None if zero_points is None else tiled(spread_out(zero_points, outputs).int(), 1)
    library().qb_pack_winograd(weight.data_ptr(), pointer(tiles), outputs, inputs, values.data_ptr(), totals.data_ptr())
    structure = Weight(values.data_ptr(), totals.data_ptr(), None, 1, outputs, 9 * inputs, 9 * inputs, 9 * inputs)
    return Held(structure, values, totals)


def by_blocks(weight: Tensor, block: int) -> Tensor:
    """[outputs, inputs, kh, kw] as [outputs, products] in the order block, kernel row, kernel column, input."""
    last = weight.permute(0, 2, 3, 1)
    return torch.cat([last[..., i : i + block].flatten(1) for i in range(0, max(weight.shape[1], 1), block)], 1)


def finish_codes(c: Constants, multipliers: Tensor, groups: int) -> Held:
    """A qb::Finish of a static layer: codes, through a table where there is one; the accumulator with `scale` None."""
    y_scale, bias, outputs = c["scale"] or 1.0, c["bias"], len(c["weight"])
    m = tiled(spread_out(multipliers, outputs), groups)
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
        pointer(table := c.get("table")),
    )
    return Held(finish, m, grid, start, table)


def finish_floats(multipliers: Tensor | None, bias: Tensor | None, outputs: int, groups: int) -> Held:
    """A qb::Finish that leaves float32, bias last; `multipliers` None where the weight is read back."""
    m = None if multipliers is None else tiled(spread_out(multipliers, outputs), groups)
    last = None if bias is None else tiled(bias[:, None], groups)
    finish = Finish(pointer(m), None, None, pointer(last), 0.0, 0, 0, 0, 255, -math.inf, math.inf, True, None)
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
        raise ValueError(NOT_FINITE)
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
