"""Peak memory of loading and running a model, as the kernel counts it, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FORWARDS = 3
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): "reset the peak resident set size (high water mark) to the current value"


def memory_of(load: Callable[[], Callable[..., Any]], inputs: Sequence[Any]) -> int | None:
    """Bytes by which resident memory peaks above its start while a model is loaded and run three times.

    `load` returns the model, which is called with `inputs`. None where the system does not tell (no Linux /proc).
    VmHWM after a reset, minus VmRSS before the load. Run it in a fresh process: memory that was freed earlier would be
    used again and not be counted.
    """
    gc.collect()
    _return_free_memory()
    if not _reset_peak() or (before := _status_bytes("VmRSS")) is None:
        return None
    model = load()
    for _ in range(FORWARDS):
        model(*inputs)
    peak = _status_bytes("VmHWM")
    return None if peak is None else max(0, peak - before)


def _reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status, which the kernel gives in KiB."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that what the load takes is counted (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
