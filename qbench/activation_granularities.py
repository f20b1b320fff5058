"""Which activations share a dynamic scale (ptdq)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["per_row", "per_tensor"]


class ActivationGranularity(Protocol):
    """Which activations share a dynamic scale."""

    name: ClassVar[str]
    label: ClassVar[str]
    batch_dependent: ClassVar[bool]


@dataclass(frozen=True)
class per_row:
    """One scale for each vector that meets the weight: each row of a linear layer, each sample of a convolution.

    In attention one for each query, key and row of probabilities, and one for the values of a head of a sample.
    """

    name: ClassVar[str] = "per_row"
    label: ClassVar[str] = "row"
    batch_dependent: ClassVar[bool] = False


@dataclass(frozen=True)
class per_tensor:
    """One (scale, zero point) for the whole tensor, batch included: the answer depends on the batch."""

    name: ClassVar[str] = "per_tensor"
    label: ClassVar[str] = "tensor"
    batch_dependent: ClassVar[bool] = True
