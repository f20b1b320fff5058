"""What a person sees while cells run."""

import io
from types import SimpleNamespace

import pytest

from qbench import progress
from qbench.progress import Pace, Progress, duration
from qbench.record import Record


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_elsewhere_than_on_a_terminal_a_line_comes_at_most_every_ten_seconds(clock):
    moving, results = io.StringIO(), io.StringIO()
    shown = Progress(moving, results)
    shown.begin("[1/2] a", "2 left, about 9 min")
    for second in range(25):
        clock.seconds = 1000.0 + second
        shown.say(f"{second} of 25")
    shown.end("a: 0.9")
    assert moving.getvalue().splitlines() == [
        "[1/2] a; 2 left, about 9 min",
        "[1/2] a: 10 of 25, 10 s; 2 left, about 9 min",
        "[1/2] a: 20 of 25, 20 s; 2 left, about 9 min",
    ]
    assert results.getvalue() == "a: 0.9\n"


def test_on_a_terminal_one_line_is_rewritten_and_fits(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    moving, results = Terminal(), io.StringIO()
    shown = Progress(moving, results)
    shown.begin("[1/2] a")
    clock.seconds += 2
    shown.say("evaluating a long list of examples")
    shown.end("a: 0.9")
    assert moving.getvalue().split("\r\033[K") == ["", "[1/2] a", "[1/2] a: evaluating a long li", ""]
    assert "\n" not in moving.getvalue()


def test_a_silent_child_shows_its_last_word_and_the_time(clock):
    moving = io.StringIO()
    shown = Progress(moving, io.StringIO())
    shown.begin("a")
    shown.say("timing, process 1 of 3")
    clock.seconds += 11
    shown.say("")
    assert moving.getvalue().splitlines()[-1] == "a: timing, process 1 of 3, 11 s"


def record(task, method, seconds, status="ok"):
    ends = {"cell": f"{task}{method}{seconds}", "key": "k", "family": "cnn", "backend": "reference", "label": "l"}
    return Record(status=status, task=task, method=method, seconds=seconds, **ends)


def cell(task, method):
    recipe = SimpleNamespace(method=SimpleNamespace(name=method))
    return SimpleNamespace(job=SimpleNamespace(choices={"task": task}), recipe=recipe)


def test_time_left_is_learnt_from_the_most_alike_cells():
    pace = Pace([record("a", "woq", 10), record("a", "woq", 20), record("b", "woq", 60), record("b", "ptsq", 110)])
    assert pace.expect([cell("a", "woq")]) == 15  # the same task and method
    assert pace.expect([cell("c", "woq")]) == 30  # the same method
    assert pace.expect([cell("c", "ptdq")]) == 50  # any
    assert pace.expect([cell("a", "woq"), cell("c", "woq")]) == 45
    assert pace.expect([]) == 0


def test_nothing_is_learnt_from_nothing_or_from_failures():
    assert Pace().expect([cell("a", "woq")]) is None
    assert Pace([record("a", "woq", 1, status="failed")]).expect([cell("a", "woq")]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (48, "48 s"), (99, "99 s"), (100, "2 min"), (540, "9 min"), (7500, "2 h 05 min")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
