"""What a gate run is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qbench.gate.limits import Limit

TIME_LIMIT_S = 150.0  # of timing: with the first half of the answers a run of `ci` ends within four minutes


@dataclass(frozen=True)
class Settings:
    """Where results and baselines lie, what is allowed, and how long sampling may take.

    `update` is None, `new` or `all`: which baselines are written. With `baselines` False only absolute limits count.
    When sampling has taken `time_limit_s` (twice that with a base), no more processes are added because an interval is
    wide.
    """

    results: Path
    baseline: Path
    sweep: str
    limits: Sequence[Limit] = ()
    update: str | None = None
    baselines: bool = True
    time_limit_s: float = TIME_LIMIT_S
