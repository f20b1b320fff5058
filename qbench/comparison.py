"""What the records say about each other: who is slower and why, who is best, which differences are none."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any

from qbench import recipe
from qbench.recipe import AXES, option
from qbench.record import Record

ALWAYS = ("method", "granularity", "scheme")
DEFAULTS = {name: str(value) for name, value in recipe.DEFAULTS.items() if name in AXES and name not in ALWAYS}
VALUES = {name: value for name, value in recipe.DEFAULTS.items() if name not in AXES}
TIMING_NOTES = ("disturbed", "one_process", "baseline_eager_only")
PREFIX = {"activation_scheme": "act:", "activation_granularity": "act:", "output": "out:"}


def is_baseline(record: Record) -> bool:
    """Is this the float network that the others are compared with?"""
    return record.method == "fp32"


def latency_counts(record: Record) -> bool:
    """Is the latency a result? Not with a backend that exists to be exact, such as the reference; fp32 is torch's."""
    return is_baseline(record) or bool(record.details.get("latency_is_result", True))


def shown_metrics(record: Record) -> dict[str, float]:
    """The metrics that a reader may see: without the speed-ups of a backend whose latency is not a result."""
    if latency_counts(record):
        return dict(record.metrics)
    return {name: value for name, value in record.metrics.items() if not name.startswith("speedup")}


def shown_notes(record: Record) -> list[str]:
    """The notes that qualify what a reader sees: without those on a latency that is not a result."""
    return [word for word in record.notes if latency_counts(record) or word not in TIMING_NOTES]


def option_label(record: Record, axis: str) -> str:
    """The short form of the record's choice on an axis (at most 9 characters), "" where the axis does not apply."""
    name = getattr(record, axis)
    if name is None:
        return ""
    try:
        return str(option(axis, name).label)
    except (ValueError, TypeError):  # a record from another version of qbench, or an option that needs arguments
        return str(name)


def recipe_text(record: Record, shared: Container[str] = ()) -> str:
    """`ptsq channel sym mse`: method, weights, what differs from the defaults; not the `shared` axes."""
    axes = [axis for axis in DEFAULTS if axis not in shared and getattr(record, axis) not in (None, DEFAULTS[axis])]
    words = [option_label(record, axis) for axis in ALWAYS]
    words += [PREFIX.get(axis, "") + option_label(record, axis) for axis in axes]
    return " ".join([*(word for word in words if word), *unusual_values(record)])


def unusual_values(record: Record) -> list[str]:
    """`group_size=32`, `percentile=99.9`, `keep_float=fc`: the values that differ from those an option has by itself.

    Read from details["recipe"], the canonical recipe; records without one have none.
    """
    values: dict[str, Any] = {}
    usual = dict(VALUES)
    for name, value in record.details.get("recipe", {}).items():
        values |= {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else {name: value}
        if isinstance(value, dict):
            with contextlib.suppress(ValueError):  # an option of another version of qbench: all its values are shown
                usual |= dataclasses.asdict(option(name, value["name"]))
    return [f"{k}={_listed(v)}" for k, v in values.items() if v not in (None, []) and v != usual.get(k)]


def _listed(value: object) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, list) else str(value)


def shared_axes(records: Iterable[Record]) -> dict[str, str]:
    """The axes on which all records agree, those aside to which an axis does not apply: they need no column."""
    records = list(records)
    chosen = {axis: {getattr(r, axis) for r in records} - {None} for axis in DEFAULTS}
    return {axis: names.pop() for axis, names in chosen.items() if len(names) == 1}


def unsaid(records: Iterable[Record]) -> str:
    """`activation_scheme affine, observer minmax`: what the recipes' texts leave out, shared or the default."""
    records = list(records)
    shared = shared_axes(records)
    said = {axis: shared.get(axis, name) for axis, name in DEFAULTS.items()}
    return ", ".join(f"{axis} {name}" for axis, name in said.items() if any(getattr(r, axis) == name for r in records))


def by_score(records: Iterable[Record]) -> list[Record]:
    """Best first: the baseline, then by score drop, then by size."""
    return sorted(records, key=lambda r: (not is_baseline(r), drop(r), r.metrics.get("size_bytes", 0.0)))


def drop(record: Record) -> float:
    """The score's drop against fp32 in the score's unit; positive is worse, infinite when there is no score."""
    return record.metrics.get("score_drop", 0.0 if is_baseline(record) else float("inf"))


def interval(record: Record) -> tuple[float, float] | None:
    """The 95 % interval of the drop, None where there is none."""
    ends = record.metrics.get("score_drop_ci_low"), record.metrics.get("score_drop_ci_high")
    return None if None in ends else ends  # type: ignore[return-value]


def significance(record: Record) -> str:
    """`worse`, `better` or `not significant` (the interval of the drop holds 0); "" without an interval."""
    ends = interval(record)
    if ends is None or is_baseline(record):
        return ""
    if ends[0] > 0:
        return "worse"
    return "better" if ends[1] < 0 else "not significant"


def differ(one: Record, other: Record) -> bool:
    """Are two cells' scores significantly different?

    True when the intervals of their drops do not overlap. That is stricter than 95 %, however the drops are
    correlated: a difference's deviation never exceeds the sum of the two.
    """
    a, b = interval(one), interval(other)
    return a is not None and b is not None and (a[1] < b[0] or b[1] < a[0])


def pareto(records: Sequence[Record]) -> list[Record]:
    """The cells that no other beats: as small, as good, as fast (where that is a result), and better in one of them."""
    ranked = [r for r in records if r.status == "ok" and {"score_drop", "size_bytes"} <= set(r.metrics)]
    timed = all(latency_counts(r) and "latency_ms_median" in r.metrics for r in ranked)

    def costs(record: Record) -> tuple[float, ...]:
        costs = (drop(record), record.metrics["size_bytes"])
        return (*costs, record.metrics["latency_ms_median"]) if timed else costs

    def beats(one: Record, other: Record) -> bool:
        a, b = costs(one), costs(other)
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [r for r in ranked if not any(beats(other, r) for other in ranked)]


def best_per_method(records: Sequence[Record]) -> dict[str, Record]:
    """Each method's cell with the smallest drop; of equals the smaller file."""
    best: dict[str, Record] = {}
    done = (r for r in records if r.status == "ok" and "score_drop" in r.metrics and not is_baseline(r))
    for record in by_score(done):
        best.setdefault(record.method, record)
    return best


def slow_reason(record: Record) -> str | None:
    """Why the cell is slower than fp32, in a few words; None when it is not.

    Read from what the record says about itself, the most telling fact first.
    """
    if not latency_counts(record):
        return f"{record.backend}: exact, not fast"
    slow = [name for name in ("speedup", *batched(record, "speedup")) if record.metrics.get(name, 1.0) < 1]
    if not slow:
        return None
    if is_baseline(record):
        return "eager; compiled fp32 is the baseline"
    if "bf16_emulated" in record.notes:
        return "no bfloat16 instructions on this CPU: torch converts around every operation"
    share = record.metrics.get("int8_mac_fraction", 1.0)
    if share == 0 and record.granularity is None:
        return "bfloat16 halves the bytes of the weights, not the arithmetic of small layers"
    if share == 0:
        batch = slow[0].removeprefix("speedup_b")
        where = "compute-bound" if slow == ["speedup"] else f"compute-bound at batch {batch}"
        return "weights are dequantized, arithmetic stays float" + ("" if "speedup" in slow else f": {where}")
    if share < 1:
        return f"only {100 * share:.0f} % of the multiplications run in int8"
    if record.activation_granularity is not None:
        return "a pass over the activations for their range at each layer"
    if record.environment.get("vnni") is False:
        return "no int8 instructions (VNNI) on this CPU"
    return "small layers: quantizing costs more than int8 saves"


def batched(record: Record, name: str) -> list[str]:
    """The metric's names with a batch suffix, such as speedup_b16."""
    prefix = f"{name}_b"
    return [key for key in record.metrics if key.startswith(prefix) and key.removeprefix(prefix).isdigit()]
