"""What the textbook says of speed: whether int8 computes faster, and which method of the two is the faster where.

Judged from the measured speed-ups where the latency is a result and its interval comes from several processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from qbench import comparison as compare
from qbench.record import Record
from qbench.textbook.claims import Claim, Question, Row, interval, present
from qbench.textbook.selection import advised
from qbench.textbook.verdicts import Difference, better

COMPUTE_IN_INT8 = ("ptdq", "ptsq", "qat")
ENDS = ("speedup", "speedup_ci_low", "speedup_ci_high")


def computing(asked: Question) -> list[Row]:
    """The speed-up of each method that computes in int8, at each batch."""
    rows = []
    for task in asked.cells.tasks:
        for cell in present(asked.cells.cell(task, method) for method in COMPUTE_IN_INT8):
            for suffix in _suffixes(cell):
                times = _speedup(cell, suffix)
                more = None if times is None else times - Difference(1.0, 1.0, 1.0)
                rows.append(Row((task, cell.method, _batch(suffix), _text(cell, times)), better(more, None), (cell,)))
    return rows


def suited_speed(asked: Question) -> list[Row]:
    """How much faster the method that the textbook advises is than the other, at each batch."""
    rows = []
    for task, cell, other in advised(asked.cells):
        for suffix in _suffixes(cell):
            times = [_speedup(one, suffix) for one in (cell, other)]
            texts = [_text(one, value) for one, value in zip((cell, other), times, strict=True)]
            more = None if times[0] is None or times[1] is None else times[0] - times[1]
            gain = "" if more is None else interval(more, "+.2f")
            named = (task, cell.family, cell.method, _batch(suffix))
            rows.append(Row((*named, *texts, gain), better(more, None), (cell, other)))
    return rows


def _suffixes(cell: Record) -> Sequence[str]:
    """`""` for batch 1, and `_b16` where the larger batch is 16."""
    return ["", *(name.removeprefix("latency_ms_median") for name in compare.batched(cell, "latency_ms_median"))]


def _batch(suffix: str) -> str:
    return suffix.removeprefix("_b") or "1"


def _speedup(cell: Record, suffix: str) -> Difference | None:
    """The speed-up with its interval; None where it is no result or nothing can be judged by it."""
    names = [name + suffix for name in ENDS]
    if not compare.latency_counts(cell) or "one_process" in cell.notes or not set(names) <= set(cell.metrics):
        return None
    return Difference(*(cell.metrics[name] for name in names))


def _text(cell: Record, times: Difference | None) -> str:
    """The speed-up with its interval, or why there is none to judge by."""
    if times is not None:
        return interval(times, ".2f") + (", disturbed" if "disturbed" in cell.notes else "")
    if not compare.latency_counts(cell):
        return f"no result with backend {cell.backend}"
    return "timed in one process only" if "one_process" in cell.notes else "not measured"


CLAIMS = (
    Claim(
        "Int8 needs less computing: it is faster than fp32",
        "What is Quantization",
        "Integer data relaxes what inference asks of computing resources.",
        "A row holds where the speed-up against the fastest fp32 that runs here, interval and all, is above 1; the "
        "interval comes from several processes. A backend that exists to be exact has no speed-up.",
        ("task", "method", "batch", "speed-up (95 % interval)"),
        computing,
    ),
    Claim(
        "PTDQ suits LSTM and Transformer, PTSQ suits CNN and GAN: the speed",
        "Post-Training Dynamic Quantization (PTDQ); Post-Training Static Quantization (PTSQ)",
        "Each saves what its networks lack: memory bandwidth the one, bandwidth and computation the other.",
        "A row holds where the speed-up of the advised method is above that of the other, intervals apart. A backend "
        "that exists to be exact has no speed-up: its times are never compared.",
        ("task", "family", "advised", "batch", "its speed-up", "speed-up of the other", "difference"),
        suited_speed,
    ),
)
