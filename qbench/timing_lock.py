"""One timing at a time on a machine: timing holds a lock alone, training and evaluation share it.

The lock file lies in the folder for temporary files, so that it covers every checkout, results folder and launcher on
the machine; flock frees it when its holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qbench import interrupts

NAME = "qbench-timing.lock"
QUEUE = "qbench-timing.queue"  # who is next: without it one qbench that lets go and takes again would keep the machine
POLL_S = 0.2


@contextlib.contextmanager
def machine(*, alone: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the machine, alone (for timing) or with others (for all else); waits as long as it takes."""
    with _open(NAME) as handle:
        with _open(QUEUE) as turn:
            _wait(turn, fcntl.LOCK_EX, say)
            _wait(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, say)
        yield


def _wait(handle: int, kind: int, say: Callable[[str], None]) -> None:
    while not _take(handle, kind):
        say("waiting for another qbench on this machine")
        with interrupts.welcome():
            time.sleep(POLL_S)


def _take(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _open(name: str) -> Iterator[int]:
    """A lock file, made readable for every user; closing it frees the lock."""
    path = Path(tempfile.gettempdir()) / name
    try:
        handle = os.open(
            path, os.O_RDONLY
        )  # another user's file may be opened, but not with O_CREAT, in a sticky folder
    except FileNotFoundError:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)
