"""The sentences beside a table: what its numbers do not say by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qbench import comparison as compare
from qbench.columns import Block, score, score_name
from qbench.record import Record

LEGEND = (
    "P  Pareto-optimal: no other cell is as small, as good and, where latency is a result, as fast.",
    "B  the best score of its method.",
    "drop  how much worse than fp32 (positive is worse), with its paired 95 % interval; not significant: it holds 0.",
)


NOTES = {
    "disturbed": "its time alone was not reproduced: the machine was busy",
    "batch_dependent": "the answer depends on the batch it is computed in",
    "bf16_emulated": "this CPU has no bfloat16 instructions, torch emulates them: the time is not that of one that has",
    "float_layers": "layers with multiplications stay in float: float_ops in the record names them",
    "few_units": "fewer than 20 resampling units: the interval is rough",
    "one_process": "the interval of the speed-up comes from one process: too narrow",
    "baseline_eager_only": "compiled fp32 was not measured: the speed-up is against eager",
}


SPEEDUP_NOTES = ("one_process", "baseline_eager_only")


def title(block: Block) -> str:
    """`resnet18 (cnn): accuracy on 10000 examples; speed-ups are against compiled fp32`."""
    first = (block.done or block.rest)[0]
    parts = [f"{block.task} ({first.family})"]
    if "examples" in first.metrics:
        parts[0] += f": {score_name(first)} on {first.metrics['examples']:.0f} examples"
    if baseline := first.environment.get("fp32_baseline"):
        parts.append(f"speed-ups are against {baseline} fp32" if _has_speedup(block) else f"baseline: {baseline} fp32")
    return "; ".join(parts)


def _has_speedup(block: Block) -> bool:
    return any("speedup" in compare.shown_metrics(r) for r in block.done if not compare.is_baseline(r))


def remarks(block: Block) -> list[str]:
    """What the numbers do not say by themselves: which differences are none, why a cell is slow, what qualifies it."""
    lines = best_remarks(block)
    for reason, cells in _grouped(block.done, compare.slow_reason).items():
        if any(compare.latency_counts(r) for r in cells):
            lines.append(f"slower than fp32: {_names(block, cells)}: {reason}.")
    for word in sorted({word for r in block.done for word in compare.shown_notes(r)}):
        if _has_speedup(block) or word not in SPEEDUP_NOTES:
            cells = [r for r in block.done if word in compare.shown_notes(r)]
            lines.append(f"{word}: {_names(block, cells)}: {NOTES.get(word, 'see the record')}.")
    return lines


def best_remarks(block: Block) -> list[str]:
    """The best of each method, and which of them do not differ significantly, from each other or from fp32."""
    best = list(block.best.values())
    if not best:
        return []
    named = ", ".join(f"{block.name(r)} {score(r, r.metrics['score'])}{_star(r)}" for r in best)
    equal = [(a, b) for i, a in enumerate(best) for b in best[i + 1 :] if not compare.differ(a, b)]
    lines = [f"best of each method: {named} (* not significantly different from fp32)."]
    if equal and len(equal) == len(best) * (len(best) - 1) // 2:
        lines.append("differences between the best of the methods: none is significant (their intervals overlap).")
    elif equal:
        pairs = ", ".join(f"{a.method} and {b.method}" for a, b in equal)
        lines.append(f"differences that are not significant (the intervals overlap): best of {pairs}.")
    return [*lines, *_ties(block, best)]


def _ties(block: Block, best: Sequence[Record]) -> list[str]:
    """How many other cells of a method are not significantly worse than its best."""
    said = []
    for record in best:
        others = [r for r in block.done if r.method == record.method and r is not record]
        equal = [r for r in others if not compare.differ(record, r)]
        if others:
            said.append(f"{record.method} {len(equal)} of {len(others)}")
    return (
        [f"other cells that do not differ significantly from the best of their method: {', '.join(said)}."]
        if said
        else []
    )


def _star(record: Record) -> str:
    return "*" if compare.significance(record) == "not significant" else ""


def _grouped(cells: Sequence[Record], key: Callable[[Record], str | None]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in cells:
        if text := key(record):
            groups.setdefault(text, []).append(record)
    return groups


def _names(block: Block, cells: Sequence[Record]) -> str:
    if len(cells) == len(block.done) > 1:
        return "all cells"
    names = [block.name(r) for r in cells]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def failures(block: Block) -> list[str]:
    """`failed ptsq channel sym: the sentence`, for each cell without an answer."""
    return [f"{r.status} {block.name(r)}: {r.error}" for r in block.rest]


def legend(records: Sequence[Record]) -> list[str]:
    """What the marks mean, and what the recipes' names leave out."""
    lines = list(LEGEND)
    if backends := sorted({r.backend for r in records if not compare.latency_counts(r)}):
        lines.append(f"~  {', '.join(backends)} backend: exact, not fast; its latency is not a result.")
    if unsaid := compare.unsaid(records):
        lines.append(f"not named in a recipe: {unsaid}.")
    return lines
