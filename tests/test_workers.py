"""Child processes: what they say, how they fail, and that they never outlive their parent."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from qbench import workers
from qbench.workers import WorkerError

HERE = "test_workers"  # children import the functions below from this file


def answers(number, say):
    say("half way")
    print("printed by Python")
    os.write(1, b"written to the descriptor\n")
    return {"number": number + 1}


def threads_of_torch():
    import torch

    return {"threads": torch.get_num_threads()}


def parent_and_torch():
    return {"parent": os.getppid(), "torch": "torch" in sys.modules}


FOUND: list[int] = []


def finds(number):
    FOUND.append(number)
    return {"found": FOUND}


def fails_after_half(number):
    FOUND.append(number)
    raise ValueError("too much")


def segfaults():
    import ctypes

    ctypes.string_at(0)


def segfaults_at(number):
    segfaults()


def sleeps_at(number):
    sleeps()


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def leaves():
    os._exit(3)


def sleeps():
    time.sleep(60)


def allocates_too_much():
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    bytearray(2**36)


def allocates_too_much_in_torch():
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    torch.empty(2**38)


def answers_nan():
    return {"x": float("nan")}


def raises_over_two_lines():
    raise KeyError("one\ntwo")


def misused():
    from qbench.recipe import Recipe

    return {"recipe": str(Recipe(group_size=0))}


def starts_a_process(pids):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(pids).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def run(function, tmp_path, *, timeout_s=60.0, **arguments):
    return workers.run(f"{HERE}:{function.__name__}", arguments, log=tmp_path / "log.txt", timeout_s=timeout_s)


def test_a_child_answers_says_and_logs(tmp_path):
    said = []
    log = tmp_path / "deep" / "log.txt"
    assert workers.run(f"{HERE}:answers", {"number": 1}, log=log, say=said.append) == {"number": 2}
    assert said == ["half way"]
    assert log.read_text().splitlines() == ["written to the descriptor", "printed by Python"] or set(
        log.read_text().splitlines()
    ) == {"written to the descriptor", "printed by Python"}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (segfaults, "crashed (SIGSEGV: segmentation fault)"),
        (is_killed, "killed (SIGKILL), probably out of memory"),
        (leaves, "ended with exit code 3 without an answer"),
        (allocates_too_much, "out of memory: MemoryError"),
        (answers_nan, "ValueError: Out of range float values are not JSON compliant"),
        (raises_over_two_lines, r"KeyError: 'one\ntwo'"),
    ],
)
def test_every_end_becomes_one_sentence(function, sentence, tmp_path):
    with pytest.raises(WorkerError) as caught:
        run(function, tmp_path)
    assert str(caught.value).startswith(sentence)
    assert not caught.value.misuse


def test_torchs_failed_allocation_is_a_sentence(tmp_path):
    with pytest.raises(WorkerError, match="can't allocate memory") as caught:
        run(allocates_too_much_in_torch, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_crash_leaves_its_stack_in_the_log(tmp_path):
    with pytest.raises(WorkerError):
        run(segfaults, tmp_path)
    assert "Segmentation fault" in (tmp_path / "log.txt").read_text()
    assert "in segfaults" in (tmp_path / "log.txt").read_text()


def test_a_time_out_ends_the_child(tmp_path):
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"stopped after 0\.5 s, the limit measure\.timeout_s"):
        run(sleeps, tmp_path, timeout_s=0.5)
    assert time.monotonic() - start < 30


def test_an_error_raised_on_purpose_is_misuse(tmp_path):
    with pytest.raises(WorkerError, match=r"^group_size=0: give a whole number") as caught:
        run(misused, tmp_path)
    assert caught.value.misuse
    assert "ValueError" in caught.value.types


def test_the_next_child_runs_after_a_crash(tmp_path):
    with pytest.raises(WorkerError):
        run(segfaults, tmp_path)
    assert run(answers, tmp_path, number=4) == {"number": 5}


@pytest.mark.parametrize(
    ("number", "server"), [(signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)]
)
def test_children_die_with_their_parent(number, server, tmp_path):
    """Also when it has no chance to end them, and also what they have started themselves."""
    pids = tmp_path / "pids"
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from qbench import workers
        if __name__ == "__main__":
            log = Path({str(tmp_path / "log.txt")!r})
            workers.run("{HERE}:starts_a_process", {{"pids": {str(pids)!r}}}, log=log, server={server})
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # under nohup it is ignored
    )
    assert _until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
    parent.send_signal(number)
    parent.wait(30)
    children = [int(pid) for pid in pids.read_text().split()]
    assert _until(lambda: not any(_alive(pid) for pid in children), 10)


def test_calls_side_by_side_answer_in_their_order(tmp_path):
    calls = [partial(run, answers, tmp_path, number=number) for number in range(3)]
    assert workers.side_by_side(calls, at_once=2) == [{"number": 1}, {"number": 2}, {"number": 3}]


def test_when_one_call_fails_the_others_end_or_never_begin(tmp_path):
    calls = [partial(run, function, tmp_path / str(n)) for n, function in enumerate([sleeps, segfaults, *[sleeps] * 6])]
    start = time.monotonic()
    with pytest.raises(WorkerError, match="crashed"):
        workers.side_by_side(calls, at_once=2)
    assert time.monotonic() - start < 30
    assert not workers._running
    assert len(list(tmp_path.iterdir())) <= 3
    assert workers.side_by_side([partial(run, answers, tmp_path, number=1)], at_once=1) == [{"number": 2}]


def test_a_call_that_waits_for_something_else_ends_when_another_fails(tmp_path):
    def waits():
        while True:
            time.sleep(0.05)
            workers.go_on()

    with pytest.raises(WorkerError, match="crashed"):
        workers.side_by_side([waits, partial(run, segfaults, tmp_path)], at_once=2)


def test_a_child_has_the_threads_that_it_is_given(tmp_path):
    log = tmp_path / "log.txt"
    assert workers.run(f"{HERE}:threads_of_torch", {}, log=log, threads=1) == {"threads": 1}


def test_servers_of_a_number_load_torch_once_and_have_nothing_in_common(tmp_path):
    log = tmp_path / "log.txt"
    asked = [workers.run(f"{HERE}:parent_and_torch", {}, log=log, server=number) for number in (1, 2, 1)]
    servers = {number: child.pid for number, (child, _) in workers._servers.items()}
    assert asked == [{"parent": servers[number], "torch": True} for number in (1, 2, 1)]
    assert len(set(servers.values())) == 2
    workers.end_servers(left=1)
    assert not _alive(servers[2])
    workers.end_servers()
    assert not workers._servers
    assert not _alive(servers[1])


def test_a_server_outlives_errors_and_not_crashes_and_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PAIR", 1)
    log = tmp_path / "log.txt"
    with pytest.raises(WorkerError, match="one"):
        workers.run(f"{HERE}:raises_over_two_lines", {}, log=log, server=1)
    first = workers._servers[1][0].pid
    with pytest.raises(WorkerError, match="crashed"):
        workers.run(f"{HERE}:segfaults", {}, log=log, server=1)
    assert 1 not in workers._servers
    assert not _alive(first)
    with pytest.raises(WorkerError, match="stopped after 1 s"):
        workers.run(f"{HERE}:sleeps", {}, log=log, server=1, timeout_s=1)
    assert 1 not in workers._servers
    workers.run(f"{HERE}:parent_and_torch", {}, log=log, server=1)
    workers.end_servers()


def test_children_of_a_warmed_server_find_what_it_has_loaded_and_not_each_other(tmp_path):
    log = tmp_path / "log.txt"
    with workers.warmed(f"{HERE}:finds", {"number": 1}, log=log, timeout_s=60) as server:
        found = [workers.run(f"{HERE}:finds", {"number": n}, log=log, server=server)["found"] for n in (2, 3)]
        assert found == [[1, 2], [1, 3]]
        with pytest.raises(WorkerError, match="crashed"):
            workers.run(f"{HERE}:segfaults", {}, log=log, server=server)
        assert workers.run(f"{HERE}:finds", {"number": 4}, log=log, server=server) == {"found": [4]}
    assert not workers._warmed


@pytest.mark.parametrize(
    ("function", "left"), [("fails_after_half", [1, 2]), ("segfaults_at", [2]), ("sleeps_at", [2])]
)
def test_children_do_without_what_could_not_be_loaded(function, left, tmp_path):
    log = tmp_path / "log.txt"
    with workers.warmed(f"{HERE}:{function}", {"number": 1}, log=log, timeout_s=1) as server:
        assert workers.run(f"{HERE}:finds", {"number": 2}, log=log, server=server) == {"found": left}


def test_a_server_that_cannot_load_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LOADING_S", 0.01)
    with pytest.raises(WorkerError, match=r"took more than 0\.01 s to load torch"):
        workers.run(f"{HERE}:parent_and_torch", {}, log=tmp_path / "log.txt", server=1)
    assert not workers._servers


def test_a_waiting_parent_sleeps(tmp_path):
    before = time.process_time()
    with pytest.raises(WorkerError):
        run(sleeps, tmp_path, timeout_s=3)
    assert time.process_time() - before < 0.3


def _until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
