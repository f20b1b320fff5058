"""What a score is made of, small enough to keep, and the paired test of two runs on the same examples.

Three kinds, by the metric: `hits` (a bit a decision), `sums` (of a quantity in each resampling unit), `leave_one_out`
(the estimate without each unit, where the metric is no mean). JSON in, JSON out; no torch.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench import statistics

Evidence = Mapping[str, Any]
MOST = 1 << 26  # decisions or units of one evidence: a file that claims more is damaged


@dataclass(frozen=True)
class ScoreChange:
    """How much worse a score became, in its own unit; positive is worse. `p` is of "nothing changed"."""

    drop: float
    low: float
    high: float
    p: float
    test: str


def hits(hit: Any, groups: Any) -> dict[str, Any]:
    """Of a boolean array (examples, ...) and the unit of each example: bits, or counts where units hold several."""
    by_example = hit.reshape(len(hit), -1)
    if by_example.shape[1] == 1 and len(np.unique(groups)) == len(groups):
        packed = base64.b64encode(np.packbits(by_example[:, 0]).tobytes()).decode()
        return {"kind": "hits", "count": len(hit), "bits": packed}
    return sums(by_example.astype(np.int64), groups)


def sums(values: Any, groups: Any) -> dict[str, Any]:
    """Of numbers (examples, decisions) and the unit of each example: their sum and count in each unit."""
    totals = np.bincount(groups, values.sum(axis=1))
    if values.dtype.kind == "i":
        totals = totals.astype(np.int64)
    return {"kind": "sums", "sums": totals.tolist(), "counts": (np.bincount(groups) * values.shape[1]).tolist()}


def leave_one_out(estimate: float, without: list[float], sizes: list[int]) -> dict[str, Any]:
    """Of an estimate that is no mean: its value without each unit, and the units' sizes."""
    return {"kind": "leave_one_out", "estimate": estimate, "without": without, "sizes": sizes}


def change(before: Evidence, now: Evidence, direction: str) -> ScoreChange:
    """The paired comparison of two runs; `direction` says which way the score is better.

    Raises ValueError, which says why, for evidence of different examples or of a damaged file.
    """
    kinds = str(before.get("kind")), str(now.get("kind"))
    if kinds[0] != kinds[1] or kinds[0] not in _CHANGES:
        raise ValueError(f"evidence of the kinds {kinds[0]!r} and {kinds[1]!r} cannot be compared")
    try:
        return _CHANGES[kinds[0]](before, now, -1.0 if direction == "lower" else 1.0)
    except (KeyError, TypeError, ArithmeticError, binascii.Error) as error:
        raise ValueError(f"damaged evidence of a score ({type(error).__name__}: {error})") from error


def _of_hits(before: Evidence, now: Evidence, sign: float) -> ScoreChange:
    a, b = _bits(before), _bits(now)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} decisions: not the same examples")
    lost, gained = int((a & ~b).sum()), int((b & ~a).sum())
    if sign < 0:
        lost, gained = gained, lost
    low, high = statistics.paired_interval(lost, gained, len(a))
    return ScoreChange((lost - gained) / len(a), low, high, statistics.mcnemar_p(lost, gained), "exact McNemar")


def _of_sums(before: Evidence, now: Evidence, sign: float) -> ScoreChange:
    a, b, counts = _numbers(before["sums"]), _numbers(now["sums"]), _numbers(before["counts"])
    if not (len(a) == len(b) == len(counts)) or list(before["counts"]) != list(now["counts"]) or counts.min() <= 0:
        raise ValueError("the units differ: not the same examples")
    spread = statistics.cluster_bootstrap(sign * (a - b), counts)
    return ScoreChange(spread.mean, spread.low, spread.high, spread.p, "cluster bootstrap")


def _of_estimates(before: Evidence, now: Evidence, sign: float) -> ScoreChange:
    a, b, sizes = _numbers(before["without"]), _numbers(now["without"]), _numbers(before["sizes"])
    estimates = _numbers([before["estimate"], now["estimate"]])
    if not (len(a) == len(b) == len(sizes)) or list(before["sizes"]) != list(now["sizes"]) or sizes.min() <= 0:
        raise ValueError("the units differ: not the same examples")
    found = statistics.jackknife(float(sign * (estimates[0] - estimates[1])), sign * (a - b), sizes)
    return ScoreChange(found.estimate, found.low, found.high, found.p, "jackknife over units")


_CHANGES = {"hits": _of_hits, "sums": _of_sums, "leave_one_out": _of_estimates}


def _bits(evidence: Evidence) -> Any:
    count, packed = evidence["count"], base64.b64decode(evidence["bits"], validate=True)
    if type(count) is not int or not 0 < count <= MOST or len(packed) != -(-count // 8):
        raise ValueError(f"damaged evidence of a score: {len(packed)} bytes for {count!r} decisions")
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8))[:count].astype(bool)


def _numbers(values: Any) -> Any:
    if not isinstance(values, list) or not 0 < len(values) <= MOST:
        raise ValueError("damaged evidence of a score: no list of numbers")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError("damaged evidence of a score: a value is no finite number")
    return np.array(values, dtype=np.float64)
