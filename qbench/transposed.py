"""The weight of a transposed convolution, in torch's form and in that of all other layers."""

from __future__ import annotations

from torch import Tensor


def swapped(weight: Tensor, groups: int) -> Tensor:
    """[inputs, outputs / groups, ...] as [outputs, inputs / groups, ...], and back: it is its own inverse.

    torch holds the first form. In the second one output channels come first, as everywhere else, so that granularities,
    the bias rule and the overflow check need not know of transposed convolutions.
    """
    by_group: Tensor = weight.unflatten(0, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1).contiguous()
