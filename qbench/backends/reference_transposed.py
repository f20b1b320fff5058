"""The integer sums of a transposed convolution: one exact matrix product, then each product to its place.

Input pixel p times tap k belongs to output pixel stride * p + dilation * k - padding. What falls outside is dropped;
what nothing reaches (output padding, gaps between strides) is a sum of nothing, 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from qbench.program import Macs


class TransposedSums:
    """acc[n, o, ...] from centred x [n, c, ...] and centred weight [o, c / groups, ...], one for each block of inputs.

    The weight has the float type in which the sums are exact. Inserted zeros are neither multiplied nor counted.
    """

    def __init__(self, weight: Tensor, c: dict[str, Any], macs: Macs) -> None:
        self.dtype = weight.dtype
        self.flat = weight.dim() == 3  # one dimension is computed as two, the first of size 1
        self.weight = weight.unsqueeze(2) if self.flat else weight
        self.stride = [1] * self.flat + c["stride"]
        self.padding = [0] * self.flat + c["padding"]
        self.dilation = [1] * self.flat + c["dilation"]
        self.output_padding = [0] * self.flat + c["output_padding"]
        self.groups, self.block, self.macs = c["groups"], c["block"], macs

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        x = x.to(self.dtype).unsqueeze(2) if self.flat else x.to(self.dtype)
        n, _, h, w = x.shape
        self.macs.int8 += n * h * w * self.weight.numel()
        by_group = x.unflatten(1, (self.groups, -1))
        for first in range(0, self.weight.shape[1], self.block):
            inputs = slice(first, first + self.block)
            some = by_group[:, :, inputs]
            pixels = some.permute(1, 2, 0, 3, 4).reshape(self.groups, some.shape[2], n * h * w)
            taps = self.weight[:, inputs].permute(0, 2, 3, 1).reshape(self.groups, -1, pixels.shape[1])
            products = torch.bmm(taps, pixels).reshape(len(self.weight), *self.weight.shape[2:], n, h, w)
            sums = self._placed(products).transpose(0, 1)
            yield sums.squeeze(2) if self.flat else sums

    def _placed(self, products: Tensor) -> Tensor:
        """[o, n, oh, ow] from products [o, kh, kw, n, h, w]."""
        o, kh, kw, n, h, w = products.shape
        rows, columns = (
            _Places(size, taps, stride, dilation)
            for size, taps, stride, dilation in zip((h, w), (kh, kw), self.stride, self.dilation, strict=True)
        )
        sums = products.new_zeros(o, n, rows.total, columns.total)
        for i, j in itertools.product(range(kh), range(kw)):
            sums[:, :, rows.of(i), columns.of(j)] += products[:, i, j]
        (ph, pw), (more_h, more_w) = self.padding, self.output_padding
        if min(rows.total + more_h - 2 * ph, columns.total + more_w - 2 * pw) < 1:
            raise ValueError(f"a padding of {ph} x {pw} leaves nothing of a result of {rows.total} x {columns.total}")
        return functional.pad(sums, (-pw, more_w - pw, -ph, more_h - ph))

    def by_output(self, per_output: Tensor) -> Tensor:
        """[outputs or 1] to the shape that broadcasts against a sum."""
        return per_output.reshape(-1, *[1] * (1 if self.flat else 2))

    def row(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of x that one dynamic scale covers."""
        return tuple(range(1, x.dim()))


class _Places:
    """Where the products of each tap go along one dimension, before padding cuts the ends."""

    def __init__(self, size: int, taps: int, stride: int, dilation: int) -> None:
        self.stride, self.dilation = stride, dilation
        self.span = (size - 1) * stride + 1
        self.total = self.span + dilation * (taps - 1)

    def of(self, tap: int) -> slice:
        first = tap * self.dilation
        return slice(first, first + self.span, self.stride)
