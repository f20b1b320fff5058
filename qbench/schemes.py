"""From a range to (scale, zero point): symmetric and affine, the range rule of the specification (design, section 3).

    real = scale * (q - zero_point)
    symmetric   scale = max(-lo, hi) / 127      zero_point = the middle code
    affine      scale = (hi - lo) / 255         zero_point = clamp(rne(lowest code - lo / scale))

Weights are int8 (middle code 0), activations uint8 (middle code 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["affine", "symmetric"]

INT8_MIDDLE = 0
UINT8_MIDDLE = 128
SMALLEST_SCALE = 2.0**-60
LARGEST_SCALE = 2.0**60


class Scheme(Protocol):
    """How a range becomes a scale and a zero point."""

    name: ClassVar[str]
    label: ClassVar[str]

    def codes(self, middle: int) -> tuple[int, int]:
        """Lowest and highest code, for the middle code 0 (int8) or 128 (uint8)."""
        ...

    def choose(self, lo: Tensor, hi: Tensor, middle: int, smallest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), both of the shape of `lo` and `hi` (float64, lo <= 0 <= hi).

        `smallest` raises the scale to at least itself (the bias rule). Non-finite ranges are the caller's to refuse.
        """
        ...


def _scale(width: Tensor, steps: int, smallest: Tensor | None) -> Tensor:
    """width / steps in float64, 1 for an empty range, raised to `smallest`, rounded once to float32."""
    scale = (width / steps).where(width > 0, width.new_ones(()))
    if smallest is not None:
        scale = scale.maximum(smallest)
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).float()


@dataclass(frozen=True)
class symmetric:
    """The zero point is the middle code; the range is as wide on both sides."""

    name: ClassVar[str] = "symmetric"
    label: ClassVar[str] = "sym"

    def codes(self, middle: int) -> tuple[int, int]:
        """254 steps around the middle; the 255th code below is not used."""
        return middle - 127, middle + 127

    def choose(self, lo: Tensor, hi: Tensor, middle: int, smallest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """scale = max(-lo, hi) / 127, zero point = the middle code."""
        scale = _scale((-lo).maximum(hi), 127, smallest)
        return scale, scale.new_full(scale.shape, middle).int()


@dataclass(frozen=True)
class affine:
    """All 256 codes cover [lo, hi]; the zero point is where zero falls."""

    name: ClassVar[str] = "affine"
    label: ClassVar[str] = "affine"

    def codes(self, middle: int) -> tuple[int, int]:
        """All 256 codes."""
        return middle - 128, middle + 127

    def choose(self, lo: Tensor, hi: Tensor, middle: int, smallest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """scale = (hi - lo) / 255, zero point = the lowest code - lo / scale, rounded half to even."""
        lowest, highest = self.codes(middle)
        scale = _scale(hi - lo, 255, smallest)
        return scale, (lowest - lo / scale.double()).round().clamp(lowest, highest).int()
