"""One timing at a time on a machine."""

import multiprocessing
import tempfile
import time

import pytest

from qbench import timing_lock


@pytest.fixture(autouse=True)
def own_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def hold(folder, alone, held, end):
    tempfile.tempdir = folder
    with timing_lock.machine(alone=alone, say=lambda text: None):
        held.set()
        end.wait(30)


def elsewhere(alone):
    """Hold the machine in another process."""
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tempfile.gettempdir(), alone, held, end))
    process.start()
    assert held.wait(30)
    return process, end


ALONE = [(True, True, True), (True, False, True), (False, True, True), (False, False, False)]


@pytest.mark.parametrize(("there", "here", "waits"), ALONE)
def test_a_timing_is_alone_and_all_else_shares(there, here, waits):
    process, end = elsewhere(there)
    said = []

    def say(text):
        said.append(text)
        end.set()  # the other one ends when this one has said that it waits

    with timing_lock.machine(alone=here, say=say):
        assert bool(said) == waits
    end.set()
    process.join(30)
    assert said[:1] == (["waiting for another qbench on this machine"] if waits else [])


def test_a_killed_holder_frees_the_machine():
    process, _ = elsewhere(True)
    process.kill()
    process.join(30)
    start = time.monotonic()
    with timing_lock.machine(alone=True, say=lambda text: None):
        assert time.monotonic() - start < 10
