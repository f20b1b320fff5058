"""The score metrics, each with its declaration and the paired test it is judged by; and what compares outputs.

A task picks a score metric (`qbench.metrics.accuracy()`), whose name becomes a metric of its records. `METRICS` has the
declaration of every metric. Importing this module imports no torch.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qbench import evidence, statistics
from qbench.declarations import FRECHET_DISTANCE, MEASURED, Metric, share

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """A score against that of fp32 on the same examples: `drop` > 0 is worse, whatever the metric's direction.

    `units` independent units were compared by `test`; `significant` exactly when 0 lies outside ci_low ... ci_high, and
    when p_value < 0.05.
    """

    score: float
    score_fp32: float
    drop: float
    ci_low: float
    ci_high: float
    p_value: float
    significant: bool
    units: int
    test: str

    @property
    def notes(self) -> tuple[str, ...]:
        """`few_units` where the interval rests on fewer than 20."""
        return ("few_units",) if self.units < statistics.FEW_UNITS else ()

    def metrics(self, metric: ScoreMetric) -> dict[str, float]:
        """As metrics of a record, under the metric's own name too."""
        return {
            metric.name: self.score,
            "score": self.score,
            "score_fp32": self.score_fp32,
            "score_drop": self.drop,
            "score_drop_ci_low": self.ci_low,
            "score_drop_ci_high": self.ci_high,
        }


class ScoreMetric(ABC):
    """What a task is scored by: its declaration, and the paired test of a score against that of fp32."""

    declaration: ClassVar[Metric]

    @property
    def name(self) -> str:
        """The name in records and tables."""
        return self.declaration.name

    @abstractmethod
    def compare(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> Comparison:
        """Score outputs of shape (examples, ..., classes) against those of fp32, over the units of the examples."""

    def evidence(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> dict[str, Any] | None:
        """What the score is made of, as small JSON that `qbench.evidence` compares with that of another run.

        By default None: two runs are then compared by their scores alone.
        """
        return None

    def beside(self, outputs: Tensor, fp32_outputs: Tensor) -> dict[str, float]:
        """What is recorded beside the score, by name: how often the decisions are those of fp32."""
        return {"agreement": agreement(outputs, fp32_outputs)}


@dataclass(frozen=True)
class accuracy(ScoreMetric):
    """Share of decisions that hit the target.

    Exact McNemar on single decisions; cluster bootstrap where units, or an example, hold several.
    """

    declaration: ClassVar[Metric] = share("accuracy", "higher", "share of examples whose largest output is the target")

    def compare(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> Comparison:
        """`targets` has the shape of the outputs without their last dimension. Raises ValueError without any."""
        if targets is None:
            raise ValueError("accuracy needs targets; score a task without labels by qbench.metrics.fidelity()")
        truth = targets.detach().cpu().numpy()
        hits = _Hits.of(decisions(outputs) == truth, decisions(fp32_outputs) == truth, units)
        if not hits.single:
            spread = statistics.cluster_bootstrap(hits.lost_by_unit, hits.count_by_unit)
            return hits.comparison(spread.low, spread.high, spread.p, "cluster bootstrap")
        lost, gained = hits.lost_and_gained
        low, high = statistics.paired_interval(lost, gained, hits.units)
        return hits.comparison(low, high, statistics.mcnemar_p(lost, gained), "exact McNemar")

    def evidence(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> dict[str, Any] | None:
        """Which decisions hit, or how many in each unit."""
        assert targets is not None
        return evidence.hits(decisions(outputs) == targets.detach().cpu().numpy(), unit_numbers(len(outputs), units))


@dataclass(frozen=True)
class fidelity(ScoreMetric):
    """Share of decisions equal to those of fp32, for tasks without labels; fp32 scores 1 by definition.

    One decision that differs proves a drop; how large it is, the interval says: Clopper-Pearson on single decisions,
    cluster bootstrap else.
    """

    declaration: ClassVar[Metric] = share(
        "fidelity", "higher", "share of examples whose largest output is that of fp32"
    )

    def compare(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None = None, units: Tensor | None = None
    ) -> Comparison:
        """`targets` are not used."""
        equal = decisions(outputs) == decisions(fp32_outputs)
        hits = _Hits.of(equal, np.ones_like(equal), units)
        changed = int(np.count_nonzero(hits.lost_by_unit))
        low, high = statistics.clopper_pearson(changed, hits.units)
        test = "exact binomial"
        if not hits.single:
            # Each unit that changed lost at least one decision: a bound that, unlike resampling, never falls to 0.
            low *= hits.units / float(hits.count_by_unit.sum())
            spread = statistics.cluster_bootstrap(hits.lost_by_unit, hits.count_by_unit)
            low, high, test = max(low, spread.low), max(low, spread.high), "cluster bootstrap"
        return hits.comparison(low, high, 0.0 if changed else 1.0, test)

    def evidence(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> dict[str, Any] | None:
        """Which decisions equal those of fp32, or how many in each unit."""
        return evidence.hits(decisions(outputs) == decisions(fp32_outputs), unit_numbers(len(outputs), units))


@dataclass(frozen=True)
class bits_per_char(ScoreMetric):
    """Mean of -log2 p(next character), of a language model's logits: cluster bootstrap over units."""

    declaration: ClassVar[Metric] = Metric(
        "bits_per_char", "bit", "lower", 0.01, "mean of -log2 of the probability of the next character", digits=4
    )

    def compare(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> Comparison:
        """`targets` are the characters' numbers, of the logits' shape without the last dimension."""
        if targets is None:
            raise ValueError("bits_per_char needs targets: the number of each next character")
        truth = targets.detach().cpu().numpy()
        bits, fp32_bits = _surprise(outputs, truth), _surprise(fp32_outputs, truth)
        groups = unit_numbers(len(truth), units)
        more = (bits - fp32_bits).reshape(len(truth), -1)
        spread = statistics.cluster_bootstrap(
            np.bincount(groups, more.sum(axis=1)), np.bincount(groups) * more.shape[1]
        )
        return Comparison(
            score=float(bits.mean()),
            score_fp32=float(fp32_bits.mean()),
            drop=spread.mean,
            ci_low=spread.low,
            ci_high=spread.high,
            p_value=spread.p,
            significant=spread.low > 0.0 or spread.high < 0.0,
            units=int(groups.max()) + 1,
            test="cluster bootstrap",
        )

    def evidence(
        self, outputs: Tensor, fp32_outputs: Tensor, targets: Tensor | None, units: Tensor | None = None
    ) -> dict[str, Any] | None:
        """The bits in each unit."""
        assert targets is not None
        bits = _surprise(outputs, targets.detach().cpu().numpy()).reshape(len(outputs), -1)
        return evidence.sums(bits, unit_numbers(len(outputs), units))


SCORES = (accuracy.declaration, fidelity.declaration, bits_per_char.declaration, FRECHET_DISTANCE)
METRICS = {metric.name: metric for metric in (*SCORES, *MEASURED)}
EXAMPLES_AT_ONCE = 64  # in float64, to bound the memory
BATCH_SUFFIX = re.compile(r"_b\d+$")


def declared(name: str) -> Metric | None:
    """The declaration of a record's metric, with or without a batch suffix; None for one from elsewhere."""
    return METRICS.get(name) or METRICS.get(BATCH_SUFFIX.sub("", name))


@dataclass(frozen=True)
class _Hits:
    """Right and wrong decisions of a network and of fp32, by resampling unit."""

    score: float
    score_fp32: float
    lost_by_unit: Any  # decisions that only fp32 has right, less those that only the other has
    count_by_unit: Any

    @classmethod
    def of(cls, hits: Any, fp32_hits: Any, units: Tensor | None) -> _Hits:
        """From two boolean arrays (examples, ...)."""
        if hits.shape != fp32_hits.shape or hits.size == 0:
            raise ValueError(f"nothing to compare: shapes {hits.shape} and {fp32_hits.shape}")
        groups = unit_numbers(len(hits), units)
        lost = (fp32_hits.astype(np.int64) - hits).reshape(len(hits), -1)
        counts = np.bincount(groups) * lost.shape[1]
        return cls(float(hits.mean()), float(fp32_hits.mean()), np.bincount(groups, lost.sum(axis=1)), counts)

    @property
    def units(self) -> int:
        return len(self.count_by_unit)

    @property
    def single(self) -> bool:
        """Is each unit one decision?"""
        return bool((self.count_by_unit == 1).all())

    @property
    def lost_and_gained(self) -> tuple[int, int]:
        """Discordant pairs of single decisions."""
        return int((self.lost_by_unit > 0).sum()), int((self.lost_by_unit < 0).sum())

    def comparison(self, low: float, high: float, p: float, test: str) -> Comparison:
        drop = float(self.lost_by_unit.sum() / self.count_by_unit.sum())
        return Comparison(self.score, self.score_fp32, drop, low, high, p, low > 0.0 or high < 0.0, self.units, test)


def unit_numbers(examples: int, units: Tensor | None) -> Any:
    """The unit of each example, numbered from 0 without gaps."""
    if units is None:
        return np.arange(examples)
    if len(units) != examples:
        raise ValueError(f"{len(units)} units for {examples} examples: give one a example")
    return np.unique(units.detach().cpu().numpy(), return_inverse=True)[1]


def decisions(outputs: Tensor) -> Any:
    """The index of the largest value in the last dimension; of equal ones the lowest (torch's argmax takes any).

    Raises ValueError when an output is not finite.
    """
    return np.argmax(finite(outputs), axis=-1)


def _surprise(logits: Tensor, truth: Any) -> Any:
    """-log2 of softmax(logits) at the true index, float64, of the shape of `truth` (examples, ...)."""
    if tuple(logits.shape[:-1]) != truth.shape or truth.size == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for targets of shape {truth.shape}")
    found = np.empty(truth.shape)
    for first in range(0, len(truth), EXAMPLES_AT_ONCE):
        part = slice(first, first + EXAMPLES_AT_ONCE)
        values = finite(logits[part]).astype(np.float64)
        values -= values.max(axis=-1, keepdims=True)
        own = np.take_along_axis(values, truth[part][..., None], axis=-1)[..., 0]
        found[part] = (np.log(np.exp(values).sum(axis=-1)) - own) / math.log(2.0)
    return found


def agreement(outputs: Tensor, fp32_outputs: Tensor) -> float:
    """Share of decisions equal to those of fp32."""
    return float((decisions(outputs) == decisions(fp32_outputs)).mean())


def sqnr_db(reference: Tensor, outputs: Tensor) -> float | None:
    """Signal to quantization noise: 10 log10(sum reference^2 / sum (reference - outputs)^2), in dB.

    None, and then absent from the record, where it has no value: outputs that equal the reference exactly, or a
    reference of zeros.
    """
    signal, noisy = finite(reference).astype(np.float64), finite(outputs).astype(np.float64)
    if signal.shape != noisy.shape:
        raise ValueError(f"outputs of shape {noisy.shape} against a reference of shape {signal.shape}")
    power, noise = float((signal**2).sum()), float(((signal - noisy) ** 2).sum())
    return 10.0 * math.log10(power / noise) if power > 0.0 and noise > 0.0 else None


def finite(outputs: Tensor) -> Any:
    """As a numpy array. Raises ValueError when a value is NaN or infinite."""
    values = outputs.detach().cpu().float().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} outputs are NaN or infinite")
    return values
