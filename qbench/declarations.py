"""What a number of a record means: name, unit, direction, tolerance. Each one declared once, here.

Tables, MLflow and verdicts read these. A score metric is declared with its class, in `qbench.metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """A number of a record. `direction` says which way is better, `tolerance` the smallest difference that matters.

    The tolerance has the metric's own unit, or is a share of the value where `relative`. For people the value is shown
    multiplied by `factor` in `shown_unit` with `digits` decimals.
    """

    name: str
    unit: str
    direction: Direction
    tolerance: float
    text: str
    relative: bool = False
    factor: float = 1.0
    shown_unit: str | None = None
    digits: int = 2

    def show(self, value: float) -> str:
        """`88.12 %`: the value with the unit that people read."""
        unit = self.unit if self.shown_unit is None else self.shown_unit
        return f"{value * self.factor:.{self.digits}f} {unit}".rstrip()

    def matters(self, difference: float, reference: float) -> bool:
        """Is a difference from a reference value larger than the tolerance?"""
        return abs(difference) > self.tolerance * (abs(reference) if self.relative else 1.0)

    def worse(self, now: float, before: float) -> bool:
        """Is `now` worse than `before`, by however little?"""
        return now < before if self.direction == "higher" else self.direction == "lower" and now > before


def share(name: str, direction: Direction, text: str, tolerance: float = 0.003) -> Metric:
    """A fraction, shown in percent; 0.3 points matter unless told otherwise."""
    return Metric(name, "fraction", direction, tolerance, text, factor=100.0, shown_unit="%")


def _points(name: str, text: str) -> Metric:
    return Metric(name, "of the score", "lower", 0.003, text, digits=4)


def _ms(name: str, text: str, direction: Direction = "lower") -> Metric:
    return Metric(name, "ms", direction, 0.02, text, relative=True, digits=3)


def _speedup(name: str, text: str) -> Metric:
    return Metric(name, "ratio", "higher", 0.02, text, relative=True, shown_unit="x")


def _bytes(name: str, text: str, tolerance: float) -> Metric:
    return Metric(name, "bytes", "lower", tolerance, text, relative=True, factor=1e-6, shown_unit="MB")


FRECHET_DISTANCE = Metric(
    "frechet_distance",
    "squared distance of features",
    "lower",
    0.02,
    "Frechet distance of the generated images from real ones",
    relative=True,
    digits=3,
    shown_unit="",
)
MEASURED = (
    Metric("score", "the task's", "neither", 0.003, "the task's own metric, whichever it is", digits=4),
    Metric("score_fp32", "the task's", "neither", 0.003, "the score of the fp32 network", digits=4),
    _points("score_drop", "how much worse the score is than that of fp32; positive is worse"),
    _points("score_drop_ci_low", "lower end of its 95 % interval"),
    _points("score_drop_ci_high", "upper end of its 95 % interval"),
    Metric("examples", "examples", "neither", 0.0, "evaluated examples", digits=0),
    share("agreement", "higher", "share of decisions equal to those of fp32"),
    Metric("sqnr_db", "dB", "higher", 0.5, "signal to quantization noise of the outputs", digits=1),
    Metric("psnr_db", "dB", "higher", 0.5, "peak signal to noise of the images against those of fp32", digits=1),
    _bytes("size_bytes", "the saved file", 0.0),
    Metric("size_ratio", "ratio", "lower", 0.0, "the saved file over that of fp32", digits=3, shown_unit=""),
    _ms("latency_ms_median", "median of single calls"),
    _ms("latency_ms_p90", "nine of ten calls are as fast"),
    _ms("latency_ms_fp32", "the fastest fp32 that runs here", "neither"),
    _speedup("speedup", "against the fastest fp32 that runs here"),
    _speedup("speedup_ci_low", "lower end of its 95 % interval over processes"),
    _speedup("speedup_ci_high", "upper end of its 95 % interval over processes"),
    _speedup("speedup_vs_eager", "against fp32 without a compiler"),
    Metric("throughput_per_s", "1/s", "higher", 0.02, "examples a second", relative=True, digits=1),
    _bytes("peak_memory_bytes", "peak memory of loading and three forwards", 0.02),
    share("int8_mac_fraction", "higher", "share of multiply-accumulates that ran in int8", 0.0),
    Metric("quantize_s", "s", "lower", 0.2, "time to quantize, calibration included", relative=True),
)
