"""The specification of what a Transformer adds to layers: attention, layer norm, rows of an embedding.

    (5) attention     score = f32(acc_qk) * f32(s_q s_k factor) + mask;  e = exp(score - max), 0 where it is -inf;
                      P = R(e * (255 / sum e)) with s = 1/255, z = 0;  R(f32(acc_Pv) * f32(s_P s_v / s_y))
    (6) dynamic       p = e / sum e, quantized like q, k and v from its own range;  f32(acc_pv) * (s_p * s_v)
    (7) layer norm    R(((f32(q - z) - mean) * rstd) * f32(gamma / s_y) + f32(beta / s_y)),  mean = f32(S1 / n),
                      rstd = f32(s_x / sqrt((S2/n - (S1/n)^2) * s_x^2 + eps)), S1 and S2 the exact sums of q - z and of
                      its squares
    (8) embedding     R(f32(q_w - z_w) * f32(s_w / s_y))

Sums are exact float64 matrix products as in `reference_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.functions import lane_sum, shifted_exp
from qbench.numerics import (
    PROBABILITIES,
    centred,
    check_products,
    dequantize_weight,
    dynamic_codes,
    multiplier,
    round_to_float32,
    saturate_,
    spread,
)
from qbench.recipe import option

if TYPE_CHECKING:
    from qbench.program import Macs

Kernel = Callable[..., Tensor]
Constants = dict[str, Any]
SAMPLES = 4


def _requantized(v: Tensor, c: Constants) -> Tensor:
    """R(v) with the result's zero point and codes."""
    return saturate_(v, c["zero_point"], c["q_min"], c["q_max"], torch.uint8)


# --- attention -------------------------------------------------------------------------------------------------------


class _Sums:
    """Exact sums of products of two activations, counted."""

    def __init__(self, macs: Macs) -> None:
        self.macs = macs

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a [..., rows, n] times b [..., n, columns], both integers in float64."""
        check_products("attention", a.shape[-1])
        sums = torch.matmul(a, b)
        self.macs.int8 += sums.numel() * a.shape[-1]
        return sums


def _scores(acc: Tensor, m: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """f32(acc) * m + mask; -inf where a key lies behind its query."""
    scores = acc.float() * m
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores


def _by_samples(run: Kernel) -> Kernel:
    """The same for a few samples at a time, whose scores stay in the cache (2.5 times faster, measured)."""

    def parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        alike = q.dim() == k.dim() == v.dim() > 2 and len(q) == len(k) == len(v)
        shared = mask is None or mask.dim() < q.dim() or (mask.dim() == q.dim() and len(mask) == 1)
        if not alike or not shared:
            return run(q, k, v, mask)
        samples = zip(*(x.split(SAMPLES) for x in (q, k, v)), strict=True)
        return torch.cat([run(*sample, mask) for sample in samples])

    return parts


def attention(c: Constants, macs: Macs) -> Kernel:
    """Equation (5)."""
    sums = _Sums(macs)
    m_scores = torch.tensor(round_to_float32(c["q_scale"] * c["k_scale"] * c["factor"]))
    m = multiplier(PROBABILITIES.scale, c["v_scale"], c["scale"])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.double() - c[f"{name}_zero_point"] for name, x in (("q", q), ("k", k), ("v", v)))
        e = shifted_exp(_scores(sums(q, k.transpose(-2, -1)), m_scores, mask, c["causal"]))
        p = saturate_(e * (255.0 / lane_sum(e)), 0, 0, 255, torch.float64)  # 0 * inf in a row hidden whole: R gives 0
        return _requantized(sums(p, v).float() * m, c)

    return _by_samples(run)


def dynamic_attention(c: Constants, macs: Macs) -> Kernel:
    """Equation (6).

    By row: each query, key and row of probabilities has its own scale, the values of a head one. In causal attention
    each value has its own, multiplied into the probabilities: one over all values would let the past see the future.
    """
    sums, scheme, per_row = _Sums(macs), option("activation_scheme", c["scheme"]), c["rows"] == "per_row"
    by_value = per_row and c["causal"]
    factor = torch.tensor(round_to_float32(c["factor"]))

    def codes(x: Tensor, shared: int) -> tuple[Tensor, Tensor]:
        """q - z in float64 and the scales; the last `shared` dimensions share one."""
        over = tuple(range(-shared, 0)) if per_row else tuple(range(x.dim()))
        q, scale, zero_point = dynamic_codes(x, over, scheme)
        return (q - zero_point).double(), scale

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        (q, q_scale), (k, k_scale), (v, v_scale) = codes(q, 1), codes(k, 1), codes(v, 1 if by_value else 2)
        m = q_scale * k_scale.transpose(-2, -1) * factor
        e = shifted_exp(_scores(sums(q, k.transpose(-2, -1)), m, mask, c["causal"]))
        p = e / lane_sum(e).clamp(min=1.0)  # less than 1 only where it is 0: a row hidden whole
        if by_value:
            p, v_scale = p * v_scale.transpose(-2, -1), torch.ones(())
        p, p_scale = codes(p, 1)
        return sums(p, v).float() * (p_scale * v_scale)

    return _by_samples(run) if per_row else run


# --- rows ------------------------------------------------------------------------------------------------------------


def layer_norm(c: Constants, macs: Macs) -> Kernel:
    """Equation (7)."""
    over = tuple(range(-c["gamma"].dim(), 0))
    count, s = c["gamma"].numel(), c["x_scale"]

    def run(x: Tensor) -> Tensor:
        if x.shape[over[0] :] != c["gamma"].shape:
            raise ValueError(f"layer_norm over {list(c['gamma'].shape)} met an input of shape {list(x.shape)}")
        q = x.double() - c["x_zero_point"]
        mean = q.sum(over, keepdim=True) / count
        variance = q.square().sum(over, keepdim=True) / count - mean * mean
        rstd = (s / (variance * (s * s) + c["eps"]).sqrt()).float()
        return _requantized((q.float() - mean.float()) * rstd * c["gamma"] + c["beta"], c)

    return run


def embedding(c: Constants, macs: Macs) -> Kernel:
    """Equation (8), computed once for every row; float rows are read back as they are looked up."""
    values, scale, block = c["weight"], c["weight_scale"], c["block"]
    zero_point = c["weight_zero_point"]
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point

    def rows(indices: Tensor) -> Tensor:
        """The weight's rows as float32."""
        own = indices if scale.shape[0] > 1 else indices * 0  # all rows share
        return dequantize_weight(values[indices], scale[own], zero_point[own], block)

    if c["scale"] is not None:
        m = spread(multiplier(1.0, scale, c["scale"]), block, values)
        table = _requantized(centred(values, zero_point, block).float() * m, c)
    look_up = rows if c["scale"] is None else lambda indices: table[indices]

    def run(indices: Tensor) -> Tensor:
        _check_indices(indices, len(values))
        return look_up(indices.flatten().long()).reshape(*indices.shape, values.shape[1])

    return run


def _check_indices(indices: Tensor, rows: int) -> None:
    """Raise ValueError for an index that is no row."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"an embedding takes indices of int64 or int32, not {str(indices.dtype)[6:]}")
    lowest, highest = (int(end) for end in indices.aminmax()) if indices.numel() else (0, 0)
    if lowest < 0 or highest >= rows:
        raise ValueError(f"an embedding of {rows} rows met indices from {lowest} to {highest}, not 0 to {rows - 1}")
