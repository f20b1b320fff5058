"""Ctrl-C that nobody can swallow: Python drops a KeyboardInterrupt that it raises within a library's finalizer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = threading.Event()


@contextmanager
def noticed() -> Iterator[None]:
    """Remember for `go_on` that KeyboardInterrupt was raised; nothing on another thread, or where Ctrl-C means else."""
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    _pressed.clear()
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def go_on() -> None:
    """Raise KeyboardInterrupt if Ctrl-C has been pressed and the interrupt went nowhere."""
    if _pressed.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _pressed.set()
    signal.default_int_handler(number, frame)
