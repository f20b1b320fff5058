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


def test_ctrl_c_in_the_midst_of_a_library_is_raised_at_the_next_wait() -> None:
    with interrupts.noticed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.go_on()
        with pytest.raises(KeyboardInterrupt), interrupts.welcome():
            pytest.fail("waits although Ctrl-C was pressed")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_a_wait_at_once_and_is_forgotten_by_the_next_run() -> None:
    with interrupts.noticed(), pytest.raises(KeyboardInterrupt), interrupts.welcome():
        signal.raise_signal(signal.SIGINT)
    with interrupts.noticed():
        interrupts.go_on()


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    with interrupts.noticed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    def ignored(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGINT, ignored)
    with interrupts.noticed():
        assert signal.getsignal(signal.SIGINT) is ignored
        with interrupts.welcome():
            signal.raise_signal(signal.SIGINT)
        interrupts.go_on()
    errors: list[BaseException] = []

    def aside() -> None:
        try:
            with interrupts.noticed(), interrupts.welcome():
                interrupts.go_on()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()
    assert not errors
