"""Peak memory of loading and running a model, as the kernel counts it, in a process that does nothing else.

And what a process that times needs of the allocator.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORWARDS = 3
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): "reset the peak resident set size (high water mark) to the current value"
MAPS = Path("/proc/self/maps")
GPU = re.compile(r"/site-packages/(nvidia|triton|cuda)/|/libtorch_(cuda|nvshmem)")  # libraries that nothing here calls
# malloc.h, sys/mman.h (Linux 5.14) and prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MADV_POPULATE_READ = 22
PR_SET_THP_DISABLE = 41
THRESHOLD = 64 << 10
LARGE = (1 << 30, 32 << 20)  # the second is the most that some versions of glibc take


def memory_of(load: Callable[[], Callable[..., Any]], inputs: Sequence[Any]) -> int | None:
    """Bytes by which resident memory peaks above its start while a model is loaded and run three times.

    `load` returns the model, which is called with `inputs`; all of it on a thread of its own. None where the system
    does not tell (no Linux /proc). VmHWM after a reset, minus VmRSS before the load. Run it in a fresh process: memory
    that was freed earlier would be used again and not be counted; and the allocator is left with settings that make
    small processes, not fast ones.
    """
    if not _reset_peak():
        return None
    _touch_code()
    _settle_allocator()
    before = _status_bytes("VmRSS")
    if not _reset_peak() or before is None:
        return None
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_load_and_run, load, inputs).result()
    peak = _status_bytes("VmHWM")
    return None if peak is None else max(0, peak - before)


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees (no other allocator).

    By default it may give the results of a call back to the system, which then clears the same pages for the next one:
    in some processes and not in others, as freed pieces happen to lie. So eager fp32 took 4.4 to 6.5 ms or, where
    nothing was given back, 2.9 (`gan`, batch 16), and 450 or 360 ms (`resnet18` of torchvision, batch 16), measured.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in LARGE)  # until one is taken
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _load_and_run(load: Callable[[], Callable[..., Any]], inputs: Sequence[Any]) -> None:
    """On a new thread glibc takes small pieces from a heap of its own.

    The heap that a process inherits from the fork server has holes, of which a model fills as many as happen to fit:
    2 MB more or less from one fork server to the next (measured).
    """
    model = load()
    for _ in range(FORWARDS):
        model(*inputs)


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


def _touch_code() -> None:
    """Map the libraries that are loaded: how much of them a first call maps depends on what else ran here.

    But for those of a GPU, four fifths of what the torch of PyPI loads.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "madvise"):
        return
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in MAPS.read_text().splitlines():
        place, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/") and rights.startswith("r-") and not GPU.search(path[0]):
            start, end = (int(address, 16) for address in place.split("-"))
            libc.madvise(start, end - start, MADV_POPULATE_READ)  # older kernels refuse


def _settle_allocator() -> None:
    """Give back freed memory now, and from now on at once, so that peaks are memory in use (glibc only).

    By default glibc learns thresholds from the order of the calls, and keeps what it thinks will be asked for again:
    20 MB more or less from process to process on resnet18, against 0.1 MB with fixed thresholds (measured). Huge pages
    are off for the same reason: whether a tensor gets them depends on its address.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, THRESHOLD)
        libc.malloc_trim(0)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
