"""Ctrl-C."""

import signal
import threading
from collections.abc import Iterator

import pytest

from qbench import interrupts


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored
    yield
    signal.signal(signal.SIGINT, before)


class Finalized:
    """What a library may have: Python cannot raise out of it."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_finalizer_swallows_comes_later() -> None:
    with interrupts.noticed():
        Finalized()  # its finalizer runs at once
        with pytest.raises(KeyboardInterrupt):
            interrupts.go_on()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_raised_at_once_and_forgotten_by_the_next_run() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts.noticed():
        signal.raise_signal(signal.SIGINT)
    with interrupts.noticed():
        interrupts.go_on()


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    def ignored(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGINT, ignored)
    with interrupts.noticed():
        assert signal.getsignal(signal.SIGINT) is ignored
        signal.raise_signal(signal.SIGINT)
        interrupts.go_on()
    errors: list[BaseException] = []

    def aside() -> None:
        try:
            with interrupts.noticed():
                interrupts.go_on()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()
    assert not errors
