"""A checkout whose engine is not built: the reference stands in and says so; native that is asked for is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from user_project import ROOT, command, environment, make

from qbench.native import sources
from qbench.record import read_record

INSTEAD = f"{sources.WHY_NOT} ({sources.CURE}); backend: reference, whose latency is no result"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """This checkout's sources without the library."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "qbench", folder / "qbench", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("conf", "tasks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def run(checkout, tmp_path):
    """Runs a Python command line in a user's project, with that checkout's qbench."""
    folder = make(tmp_path)

    def run_here(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        there = {**environment(), "PYTHONPATH": os.pathsep.join([str(checkout), str(folder)])}
        return subprocess.run(
            arguments, cwd=folder, env=there, capture_output=True, text=True, timeout=300, check=False
        )

    return run_here


def records():
    return [read_record(path) for path in Path("results/runs").glob("*/record.json")]


def test_every_record_says_reference_and_each_run_says_why(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(command("task=tiny", "measure=least", "method=woq"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines().count(f"qbench: {INSTEAD}") == 1
    assert {record.backend for record in records()} == {"reference"}
    assert {record.details["recipe"]["backend"]["name"] for record in records()} == {"reference"}
    (woq,) = (record for record in records() if record.method == "woq")
    assert woq.details["latency_is_result"] is False
    assert "backend=reference" in woq.details["command"].split()
    assert "tiny woq channel sym" in ended.stdout
    assert "ms reference" in ended.stdout
    assert "x fp32" not in ended.stdout
    again = run(command("task=tiny", "measure=least", "method=woq"))
    assert again.stdout.startswith("nothing to do: all 2 cells are finished")
    assert again.stderr.splitlines().count(f"qbench: {INSTEAD}") == 1
    asked = run(command("task=tiny", "measure=least", "method=woq", "backend=reference"))
    assert asked.stdout.startswith(
        "nothing to do: all 2 cells are finished"
    )  # the same cells: what runs is what counts
    assert sources.WHY_NOT not in asked.stderr


@pytest.mark.parametrize("given", [["backend=native"], ["backend=native,reference", "-m"], ["+sweep=both"]])
def test_native_that_is_asked_for_is_one_line_with_the_cure(given, run, tmp_path):
    (tmp_path / "my" / "sweep").mkdir(parents=True, exist_ok=True)
    sweep = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {backend: 'native,reference'}}}\n"
    (tmp_path / "my" / "sweep" / "both.yaml").write_text(sweep)
    ended = run(command("task=tiny", *given))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"qbench: backend=native: {sources.WHY_NOT}; {sources.CURE}\n"


def test_a_sweep_that_names_its_backends_keeps_them(run, tmp_path):
    (tmp_path / "my" / "sweep").mkdir(parents=True, exist_ok=True)
    sweep = "# @package _global_\ncells:\n  - backend=reference\n  - method=woq\n"
    (tmp_path / "my" / "sweep" / "lines.yaml").write_text(sweep)
    ended = run(command("+sweep=lines", "task=tiny", "dry_run=true"))
    assert ended.stderr == f"qbench: {INSTEAD}\n"
    assert [line for line in ended.stdout.splitlines() if line.startswith("to do")] == [
        "to do  tiny[fp32 backend=reference]",
        "to do  tiny[ptsq-per_channel-symmetric backend=reference]",
        "to do  tiny[woq-per_channel-symmetric backend=reference]",
    ]


QUANTIZE = """
import torch, qbench
from torch import nn
layer, x = nn.Linear(4, 4), torch.ones(2, 4)
for _ in range(2):
    q = qbench.quantize(layer, (x,), qbench.Recipe("woq"))
    q.save("m.qb")
    print(q.backend.name, qbench.load("m.qb").backend.name)
for asked in (
    lambda: qbench.quantize(layer, (x,), qbench.Recipe("woq", backend="native")),
    lambda: qbench.quantize(layer, (x,), qbench.Recipe("woq"), backend="native"),
    lambda: qbench.load("m.qb", backend="native"),
):
    try:
        asked()
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_the_api_warns_once_and_refuses_native_that_is_asked_for(run):
    ended = run([sys.executable, "-c", QUANTIZE])
    assert ended.returncode == 0, ended.stderr
    refused = f"NativeUnavailable: {sources.WHY_NOT}; {sources.CURE}"
    assert ended.stdout.splitlines() == ["reference reference"] * 2 + [refused] * 3
    assert ended.stderr.count(f"RuntimeWarning: {INSTEAD}") == 1
