"""Where a change comes from: the operations that take longer, the tensors and outputs that are others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbench.gate.baseline import Baseline

NAMES_SHOWN = 3
TELLS = 0.05  # the share by which an operation must be slower to be named ...
PART = 0.1  # ... and its share, at least, of what all of them lost


def slower(before: Mapping[str, float], now: Mapping[str, float], drift: float = 1.0) -> str:
    """The operations that became slower, `conv1 0.38 -> 0.52 ms`, largest loss first; empty: none stands out.

    Milliseconds by operation. `drift` is the factor by which the machine itself became slower.
    """
    lost = {name: now[name] - drift * before[name] for name in now if before.get(name, 0.0) > 0.0}
    together = sum(ms for ms in lost.values() if ms > 0.0)
    slowest = max(drift, 1.0)  # what kept its time is not slower, though fp32 became faster
    named = [name for name in lost if now[name] > (1.0 + TELLS) * slowest * before[name]]
    named = [name for name in named if lost[name] >= PART * together]
    named.sort(key=lambda name: -lost[name])
    return few([f"{name} {before[name]:.3g} -> {now[name]:.3g} ms" for name in named])


def changed_outputs(before: Baseline, now: Baseline) -> str:
    """What of a model changed that gives other outputs: the program, tensors by name, or nothing that is saved."""
    parts = []
    if before.hashes.get("program_sha256") != now.hashes.get("program_sha256"):
        parts.append("the program changed")
    names = [name for name, value in now.tensors.items() if before.tensors.get(name) != value]
    names += [f"{name} (gone)" for name in before.tensors if name not in now.tensors]
    if names:
        parts.append(f"{len(names)} of {len(now.tensors)} tensors changed, first {few(names)}")
    same_file = before.hashes.get("model_sha256") == now.hashes.get("model_sha256")
    if before.hashes.get("outputs_sha256") != now.hashes.get("outputs_sha256"):
        parts.append("the outputs changed" + (" although the saved model did not: a kernel" if same_file else ""))
    return ", ".join(parts) or "the saved file changed, nothing in it that counts"


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
