"""Attention, layer norm and embeddings on the native engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends.native_operands import NOT_FINITE, Constants, Kernel, codes, floats, pointer, rows_as_codes
from qbench.native.library import ALL, EACH_HEAD, EACH_ROW, Attention, HeadStrides, Quantized, byref, library
from qbench.numerics import (
    PROBABILITIES,
    centred,
    check_products,
    dequantize_weight,
    multiplier,
    round_to_float32,
    saturate_,
    spread,
)

if TYPE_CHECKING:
    from qbench.program import Macs


class _Operands:
    """q, k and v of one shape of batch, [batch..., rows, ...], and the mask beside them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        if min(x.dim() for x in (q, k, v)) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
            raise ValueError(f"attention met q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
        batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)), () if mask is None else mask.shape[:-2])
        self.q, self.k, self.v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
        self.batch, self.sizes = batch, (q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])
        check_products("attention", max(self.sizes[1:3]))
        self.shared = mask is None or not any(size > 1 for size in mask.shape[:-2])
        leading = () if self.shared else batch
        expanded = None if mask is None else floats(mask).expand(*leading, *self.sizes[:2]) if not self.shared else None
        if mask is not None and self.shared:
            expanded = floats(mask).reshape(mask.shape[-2:] if mask.dim() > 1 else mask.shape).expand(self.sizes[:2])
        self.mask = None if expanded is None else expanded.contiguous()

    def result(self) -> Tensor:
        """Of codes; the heads of a sample lie side by side, as the layer behind them takes them."""
        (*samples, heads), (rows, _, _, width) = self.batch or (1,), self.sizes
        if len(self.batch) < 2:
            return torch.empty(*self.batch, rows, width, dtype=torch.uint8)
        return torch.empty(*samples, rows, heads, width, dtype=torch.uint8).transpose(-3, -2)

    def call(self, **options: Any) -> Attention:
        each = self.batch[-1] if len(self.batch) > 1 else 1
        sizes = self.batch.numel(), *self.sizes, max(each, 1)
        return Attention(*sizes, mask=pointer(self.mask), mask_shared=self.shared, **options)


def attention(c: Constants, macs: Macs) -> Kernel:
    """Codes in, codes out."""
    options = {
        name: c[name] for name in ("q_zero_point", "k_zero_point", "v_zero_point", "zero_point", "q_min", "q_max")
    }
    options["m_scores"] = round_to_float32(c["q_scale"] * c["k_scale"] * c["factor"])
    options["m"] = float(multiplier(PROBABILITIES.scale, c["v_scale"], c["scale"]))
    options["causal"] = c["causal"]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        operands = _Operands(q, k, v, mask)
        q, k, v = (_in_heads(x) for x in (operands.q, operands.k, operands.v))
        y = operands.result()
        strides = {name: _strides(x) for name, x in zip("qkvy", (q, k, v, y), strict=True)}
        call = operands.call(**options, **strides)
        macs.int8 += library().qb_attention(byref(call), q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr())
        return y

    return run


def _in_heads(x: Tensor) -> Tensor:
    """Codes [samples, heads, rows, width], or fewer dimensions, whose rows are in one piece: as they lie, or a copy."""
    if x.dtype != torch.uint8 or x.dim() > 4 or x.stride(-1) != 1:
        return codes(x)
    return x


def _strides(x: Tensor) -> HeadStrides:
    """Of [samples..., heads, rows, width], [samples, rows, width] or [rows, width]."""
    if x.dim() < 4:
        return HeadStrides(x.stride(0) if x.dim() == 3 else 0, 0, x.stride(-2))
    return HeadStrides(*x.stride()[-4:-1])


def dynamic_attention(c: Constants, macs: Macs) -> Kernel:
    """Float32 in and out; each query, key and row of probabilities has its own scale, the values of a head one.

    In causal attention each value has its own, multiplied into the probabilities.
    """
    per_row, scheme = c["rows"] == "per_row", c["scheme"]
    by_value = per_row and c["causal"]

    def quantized(x: Tensor, sharing: int) -> tuple[Quantized, tuple[Tensor, ...]]:
        heads = x.shape[:-2].numel()
        count = {EACH_ROW: heads * x.shape[-2], EACH_HEAD: heads, ALL: 1}[sharing]  # of empty rows too: they are read
        held = rows_as_codes(floats(x), count, scheme)
        return Quantized(*(tensor.data_ptr() for tensor in held), sharing), held

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        operands = _Operands(q, k, v, mask)
        rows = EACH_ROW if per_row else ALL
        heads = EACH_ROW if by_value else EACH_HEAD if per_row else ALL
        (qq, held_q), (kk, held_k) = quantized(operands.q, rows), quantized(operands.k, rows)
        vv, held_v = quantized(operands.v, heads)
        call = operands.call(m_scores=round_to_float32(c["factor"]), causal=c["causal"])
        y = torch.empty(*operands.batch, operands.sizes[0], operands.sizes[3])
        if per_row:
            all_of_it = byref(call), byref(qq), byref(kk), byref(vv), by_value, scheme == "affine", y.data_ptr()
            products = library().qb_dynamic_attention(*all_of_it)
            if products < 0:
                raise ValueError(NOT_FINITE)
            macs.int8 += products
        else:
            p = torch.empty(*operands.batch, operands.sizes[0], operands.sizes[1])
            macs.int8 += library().qb_probabilities(byref(call), byref(qq), byref(kk), p.data_ptr())
            pp, held_p = quantized(p, ALL)
            macs.int8 += library().qb_weighted_values(byref(call), byref(pp), byref(vv), y.data_ptr())
            del held_p
        del held_q, held_k, held_v  # alive until here
        return y

    return run


def layer_norm(c: Constants, macs: Macs) -> Kernel:
    """Codes in, codes out, over the last dimensions."""
    shape = c["gamma"].shape
    gamma, beta = (c[name].flatten().contiguous() for name in ("gamma", "beta"))
    result = c["zero_point"], c["q_min"], c["q_max"]

    def run(x: Tensor) -> Tensor:
        if x.shape[x.dim() - len(shape) :] != shape:
            raise ValueError(f"layer_norm over {list(shape)} met an input of shape {list(x.shape)}")
        x = codes(x)
        y = torch.empty_like(x)
        count = len(gamma)
        pointers = gamma.data_ptr(), beta.data_ptr()
        numbers = x.numel() // count if count else 0, count, c["x_zero_point"], c["x_scale"], c["eps"]
        library().qb_layer_norm(x.data_ptr(), *numbers, *pointers, *result, y.data_ptr())
        return y

    return run


def embedding(c: Constants, macs: Macs) -> Kernel:
    """Rows looked up as codes, computed once for every row; float rows are read back as they are looked up."""
    values, scale, block = c["weight"], c["weight_scale"], c["block"]
    zero_point = c["weight_zero_point"]
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point

    if c["scale"] is not None:
        m = spread(multiplier(1.0, scale, c["scale"]), block, values)
        products = centred(values, zero_point, block).float() * m
        table = saturate_(products, c["zero_point"], c["q_min"], c["q_max"], torch.uint8)
        look_up = _table_rows(table)
    else:
        rows_of = _table_rows(values)

        def look_up(indices: Tensor) -> Tensor:
            rows = rows_of(indices)  # first: it looks at the indices
            own = indices if scale.shape[0] > 1 else indices * 0  # all rows share
            return dequantize_weight(rows, scale[own], zero_point[own], block)

    def run(indices: Tensor) -> Tensor:
        if indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"an embedding takes indices of int64 or int32, not {str(indices.dtype)[6:]}")
        try:
            return look_up(indices.flatten().long()).reshape(*indices.shape, values.shape[1])
        except IndexError:
            lowest, highest = (int(end) for end in indices.aminmax())
            raise ValueError(
                f"an embedding of {len(values)} rows met indices from {lowest} to {highest}, not 0 to {len(values) - 1}"
            ) from None

    return run


def _table_rows(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows of codes by the engine. Raises IndexError for one that there is not."""
    table = table.contiguous()

    def look_up(indices: Tensor) -> Tensor:
        indices = indices.contiguous()
        y = torch.empty(len(indices), table.shape[1], dtype=table.dtype)
        sizes = len(table), table.shape[1]
        if library().qb_rows(table.data_ptr(), *sizes, indices.data_ptr(), len(indices), y.data_ptr()):
            raise IndexError
        return y

    return look_up
