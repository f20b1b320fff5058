"""How the range of an activation is chosen from calibration data (ptsq, qat).

Calibration runs in one or two passes. In the first every tensor's extent (minimum, maximum, count) is taken; an
observer that needs it then makes a tally of the second. A tally sees integer counts and order statistics only, so the
result does not depend on how the samples are batched; `moving_average` is defined by batches and is the exception.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Protocol

from qbench.schemes import UINT8_MIDDLE, Scheme

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["entropy", "minmax", "moving_average", "mse", "percentile"]


class Tally(Protocol):
    """What an observer keeps of one tensor during a pass."""

    def update(self, values: Tensor) -> None:
        """Take one batch of values into account."""
        ...

    def range(self) -> tuple[float, float]:
        """The range to quantize, before zero is added to it."""
        ...


class Extent:
    """Minimum, maximum and number of the values of one tensor. Raises ValueError for a value that is not finite."""

    def __init__(self) -> None:
        self.lo, self.hi, self.count = math.inf, -math.inf, 0

    def update(self, values: Tensor) -> None:
        """Widen the extent by a batch."""
        if values.numel() == 0:
            return
        lo, hi = (float(value) for value in values.aminmax())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise ValueError("the calibration data give a value that is not finite (NaN or infinity)")
        self.lo, self.hi, self.count = min(self.lo, lo), max(self.hi, hi), self.count + values.numel()

    def range(self) -> tuple[float, float]:
        """From the minimum to the maximum."""
        return self.lo, self.hi


class Observer(Protocol):
    """How the range of an activation is chosen."""

    name: ClassVar[str]
    label: ClassVar[str]
    two_passes: ClassVar[bool]
    defined_by_batches: ClassVar[bool]

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """A new tally for a tensor; `extent` is that of the first pass (empty for an observer with one pass)."""
        ...


@dataclass(frozen=True)
class minmax:
    """The whole range seen."""

    name: ClassVar[str] = "minmax"
    label: ClassVar[str] = "minmax"
    two_passes: ClassVar[bool] = False
    defined_by_batches: ClassVar[bool] = False

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """An extent."""
        return Extent()


@dataclass(frozen=True)
class moving_average:
    """The exponential moving average of the batches' minima and maxima: lo += momentum * (batch minimum - lo)."""

    momentum: float = 0.01
    name: ClassVar[str] = "moving_average"
    label: ClassVar[str] = "movavg"
    two_passes: ClassVar[bool] = False
    defined_by_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, int | float) or not 0 < self.momentum <= 1:
            raise ValueError(f"observer.momentum={self.momentum!r}: give a number above 0 and at most 1")

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """See _MovingAverage."""
        return _MovingAverage(self.momentum)


class _MovingAverage:
    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.ends: tuple[float, float] | None = None

    def update(self, values: Tensor) -> None:
        batch = Extent()
        batch.update(values)
        if batch.count == 0:
            return
        if self.ends is None:
            self.ends = batch.range()
        lo, hi = self.ends
        self.ends = lo + self.momentum * (batch.lo - lo), hi + self.momentum * (batch.hi - hi)

    def range(self) -> tuple[float, float]:
        return self.ends if self.ends is not None else (math.inf, -math.inf)


@dataclass(frozen=True)
class percentile:
    """The order statistics that cut the same share of values off both tails: exact, no histogram."""

    percentile: float = 99.99
    name: ClassVar[str] = "percentile"
    label: ClassVar[str] = "pct"
    two_passes: ClassVar[bool] = True
    defined_by_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.percentile, int | float) or not 50 < self.percentile <= 100:
            raise ValueError(f"observer.percentile={self.percentile!r}: give a number above 50 and at most 100")

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """The k largest and the k smallest values; the k-th is the percentile."""
        rank = math.ceil(
            Fraction(str(self.percentile)) * extent.count / 100
        )  # 99.9 / 100 * 1000 is above 999 in floats
        return _Tails(extent.count - rank + 1)


class _Tails:
    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.smallest: Tensor | None = None
        self.largest: Tensor | None = None

    def update(self, values: Tensor) -> None:
        self.largest = self._merge(self.largest, values, largest=True)
        self.smallest = self._merge(self.smallest, values, largest=False)

    def _merge(self, kept: Tensor | None, values: Tensor, largest: bool) -> Tensor:
        from torch import cat

        new = values.flatten().topk(min(self.keep, values.numel()), largest=largest).values
        merged = new if kept is None else cat([kept, new])
        return merged.topk(min(self.keep, merged.numel()), largest=largest).values

    def range(self) -> tuple[float, float]:
        if self.smallest is None or self.largest is None:
            return math.inf, -math.inf
        return float(self.smallest.max()), float(self.largest.min())


class _Histogram:
    """Counts of the values other than zero (zero is exact in every scheme) in equal bins over the extent."""

    def __init__(self, extent: Extent, bins: int) -> None:
        self.lo, self.hi, self.bins = min(extent.lo, 0.0), max(extent.hi, 0.0), bins
        self.width = (self.hi - self.lo) / bins or 1.0
        self.counts: Tensor | None = None

    def update(self, values: Tensor) -> None:
        values = values.flatten()
        values = values[values != 0].double()
        index = ((values - self.lo) / self.width).long().clamp(0, self.bins - 1)
        counts = index.bincount(minlength=self.bins).double()
        self.counts = counts if self.counts is None else self.counts + counts

    def clipped(self, ratio: float) -> tuple[float, float]:
        return self.lo * ratio, self.hi * ratio


def _codes(centers: Tensor, lo: float, hi: float, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The code of each value under the range, and the value it stands for (float64)."""
    scale, zero_point = scheme.choose(centers.new_tensor(lo), centers.new_tensor(hi), UINT8_MIDDLE)
    lowest, highest = scheme.codes(UINT8_MIDDLE)
    codes = ((centers / scale.double()).round() + zero_point).clamp(lowest, highest)
    return codes, (codes - zero_point) * scale.double()


@dataclass(frozen=True)
class mse:
    """The clip ratio (of `ratios` equal steps) with the smallest squared error after quantization."""

    ratios: int = 100
    name: ClassVar[str] = "mse"
    label: ClassVar[str] = "mse"
    two_passes: ClassVar[bool] = True
    defined_by_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.ratios, bool) or not isinstance(self.ratios, int) or self.ratios < 1:
            raise ValueError(f"observer.ratios={self.ratios!r}: give a whole number, at least 1")

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """A histogram fine enough that a bin is a small part of a step."""
        return _SquaredError(extent, self.ratios, scheme)


class _SquaredError(_Histogram):
    def __init__(self, extent: Extent, ratios: int, scheme: Scheme) -> None:
        super().__init__(extent, bins=8192)
        self.ratios, self.scheme = ratios, scheme

    def range(self) -> tuple[float, float]:
        if self.counts is None:
            return self.lo, self.hi
        centers = self.lo + (self.counts.new_ones(self.bins).cumsum(0) - 0.5) * self.width

        def error(step: int) -> float:
            read_back = _codes(centers, *self.clipped(step / self.ratios), self.scheme)[1]
            return float(((read_back - centers).square() * self.counts).sum())  # type: ignore[operator]

        return self.clipped(min(range(self.ratios, 0, -1), key=error) / self.ratios)


@dataclass(frozen=True)
class entropy:
    """The clip ratio with the smallest Kullback-Leibler divergence between the values and their 8-bit form.

    2048 bins, as in the calibration that S. Migacz described (8-bit inference with TensorRT, GTC 2017), on both tails.
    """

    bins: int = 2048
    name: ClassVar[str] = "entropy"
    label: ClassVar[str] = "entropy"
    two_passes: ClassVar[bool] = True
    defined_by_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or self.bins < 512:
            raise ValueError(f"observer.bins={self.bins!r}: give a whole number, at least 512")

    def tally(self, extent: Extent, scheme: Scheme) -> Tally:
        """A histogram of `bins` bins."""
        return _Divergence(extent, self.bins, scheme)


class _Divergence(_Histogram):
    def __init__(self, extent: Extent, bins: int, scheme: Scheme) -> None:
        super().__init__(extent, bins)
        self.scheme = scheme

    def range(self) -> tuple[float, float]:
        if self.counts is None or float(self.counts.sum()) == 0:
            return self.lo, self.hi
        counts = self.counts
        centers = self.lo + (counts.new_ones(self.bins).cumsum(0) - 0.5) * self.width
        candidates = range(128, 0, -1)
        return self.clipped(min(candidates, key=lambda step: self._divergence(counts, centers, step / 128)) / 128)

    def _divergence(self, counts: Tensor, centers: Tensor, ratio: float) -> float:
        """KL(P || Q): P has the clipped mass in its outermost bins, Q spreads a code's count over its filled bins."""
        lo, hi = self.clipped(ratio)
        inside = (centers >= lo) & (centers <= hi)
        if not bool(inside.any()):
            return math.inf
        first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
        kept = counts[first : last + 1]
        p = kept.clone()
        p[0] += counts[:first].sum()
        p[-1] += counts[last + 1 :].sum()
        codes = _codes(centers[first : last + 1], lo, hi, self.scheme)[0].long()
        filled = (p > 0).double()
        level = codes.bincount(weights=kept, minlength=256) / codes.bincount(weights=filled, minlength=256).clamp(min=1)
        q = level[codes] * filled
        if float(q.sum()) == 0:
            return math.inf
        p, q = p / p.sum(), q / q.sum()
        seen = p > 0
        return float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
