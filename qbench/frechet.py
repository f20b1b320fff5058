"""Scores of generated images: their Frechet distance from real ones, and PSNR against the images of fp32.

Between Gaussians fitted to features of both (Heusel et al. 2017, by Dowson and Landau 1982):

    d^2 = |m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)

The root is of a symmetric matrix, so eigenvalues give it; everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qbench import evidence, statistics
from qbench.declarations import FRECHET_DISTANCE, Metric
from qbench.metrics import Comparison, ScoreMetric, finite, unit_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class frechet_distance(ScoreMetric):
    """Squared Frechet distance of generated images from real ones, between Gaussians of their features.

    Outputs and targets are features (examples, features): of generated and of real images, as the task's judge sees
    them. Jackknife over the units of the generated examples; the real ones are fixed. `peak_to_peak` is the range of a
    pixel, for the PSNR.
    """

    declaration: ClassVar[Metric] = FRECHET_DISTANCE

    peak_to_peak: float = 2.0

    def compare(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> Comparison:
        """Raises ValueError without targets, and for fewer than two units or examples."""
        if targets is None:
            raise ValueError("frechet_distance needs targets: the real images to compare with")
        real = Moments.of(finite(targets), np.zeros(len(targets), dtype=np.int64)).gaussian()
        groups = unit_numbers(len(outputs), units)
        own, fp32 = (Moments.of(finite(features), groups) for features in (outputs, fp32_outputs))

        def drop(without: int | None = None) -> float:
            return distance(real, own.gaussian(without)) - distance(real, fp32.gaussian(without))

        spread = statistics.jackknife(drop(), [drop(unit) for unit in range(len(own.counts))], own.counts)
        return Comparison(
            distance(real, own.gaussian()),
            distance(real, fp32.gaussian()),
            spread.estimate,
            spread.low,
            spread.high,
            spread.p,
            spread.low > 0.0 or spread.high < 0.0,
            len(own.counts),
            "jackknife over units",
        )

    def evidence(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> dict[str, Any] | None:
        """The distance without each of the units."""
        assert targets is not None
        real = Moments.of(finite(targets), np.zeros(len(targets), dtype=np.int64)).gaussian()
        own = Moments.of(finite(outputs), unit_numbers(len(outputs), units))
        without = [distance(real, own.gaussian(unit)) for unit in range(len(own.counts))]
        return evidence.leave_one_out(distance(real, own.gaussian()), without, own.counts.tolist())

    def beside(self, outputs: Tensor, fp32_outputs: Tensor) -> dict[str, float]:
        """PSNR of the images against those of fp32, where it has a value; images are no decisions that could agree."""
        value = psnr_db(fp32_outputs, outputs, self.peak_to_peak)
        return {} if value is None else {"psnr_db": value}


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d], float64."""

    mean: Any
    covariance: Any

    @cached_property
    def root(self) -> Any:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance."""
    product = a.root @ b.covariance @ a.root
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2.0).clip(min=0.0))
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * roots.sum())


@dataclass(frozen=True)
class Moments:
    """Count [units], sum [units, d] and sum of outer products [units, d, d] of features: any of the units can go."""

    counts: Any
    sums: Any
    products: Any

    @classmethod
    def of(cls, features: Any, groups: Any) -> Moments:
        """Of features (examples, d), the unit of each example in `groups`. Raises ValueError for another shape."""
        if features.ndim != 2 or len(features) != len(groups):
            raise ValueError(
                f"features of shape {features.shape}: one vector is needed for each of {len(groups)} examples"
            )
        by_unit = [features[groups == unit].astype(np.float64) for unit in range(groups.max() + 1)]
        return cls(
            np.array([len(part) for part in by_unit]),
            np.array([part.sum(axis=0) for part in by_unit]),
            np.array([part.T @ part for part in by_unit]),
        )

    def gaussian(self, without: int | None = None) -> Gaussian:
        """Mean and unbiased covariance of all examples, or of those outside one unit. Raises ValueError for too few."""
        kept = np.arange(len(self.counts)) != without
        count = int(self.counts[kept].sum())
        if count < 2:
            raise ValueError(f"{count} examples outside one unit: an interval needs several units and examples")
        mean = self.sums[kept].sum(axis=0) / count
        spread = self.products[kept].sum(axis=0) - count * np.outer(mean, mean)
        return Gaussian(mean, spread / (count - 1))


def psnr_db(reference: Tensor, images: Tensor, peak_to_peak: float) -> float | None:
    """Peak signal to noise ratio: 10 log10(peak_to_peak^2 / mean (reference - images)^2), in dB; None without noise."""
    difference = finite(reference).astype(np.float64) - finite(images).astype(np.float64)
    noise = float((difference**2).mean())
    return 10.0 * math.log10(peak_to_peak**2 / noise) if noise > 0.0 else None
