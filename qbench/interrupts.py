"""Ctrl-C, answered where the program waits.

Libraries are not sound when KeyboardInterrupt is raised in the midst of them: OmegaConf and SQLAlchemy turn it into
errors of their own, and Python drops one that is raised within a finalizer.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _State:
    pressed = False
    welcome = False


@contextmanager
def noticed() -> Iterator[None]:
    """Remember Ctrl-C until `go_on` or `welcome`, which raise KeyboardInterrupt; a second one is raised at once.

    Nothing on another thread, or where Ctrl-C means else.
    """
    if not _on_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _State.pressed = _State.welcome = False
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _State.pressed = False


@contextmanager
def welcome() -> Iterator[None]:
    """Around a wait: raises KeyboardInterrupt as soon as Ctrl-C is pressed, or has been. Nothing on another thread."""
    if not _on_main_thread():
        yield
        return
    _State.welcome = True
    try:
        go_on()
        yield
    finally:
        _State.welcome = False


def go_on() -> None:
    """Between two steps: raises KeyboardInterrupt if Ctrl-C has been pressed."""
    if _State.pressed:
        raise KeyboardInterrupt


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _remember(number: int, frame: FrameType | None) -> None:
    again, _State.pressed = _State.pressed, True
    if again or _State.welcome:
        signal.default_int_handler(number, frame)
