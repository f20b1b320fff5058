"""A user's own project: a folder with one module and one YAML, a network so small that a cell takes a few seconds."""

import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from qbench.native import sources

ROOT = Path(__file__).resolve().parent.parent
# For tests that name the cells of the default backend; those of its stand-in have backend=reference in their name.
needs_engine = pytest.mark.skipif(not sources.built(), reason="the native backend is not built here")
# The lock of timings lies in the folder for temporary files; these tests do not look at times.
TEMPORARY = tempfile.mkdtemp(prefix="qbench-tests-")
# After multiprocessing has removed its own folder in there, which has priority -100.
Finalize(None, shutil.rmtree, args=(TEMPORARY,), kwargs={"ignore_errors": True}, exitpriority=-200)

TASK = '''
"""A user's task; `fault` breaks it in one of the ways in which tasks break."""
import os, signal, sys, time

import torch
from torch import nn

from qbench.metrics import accuracy
from qbench.task import Examples, Task, TaskUnavailable


class Net(nn.Module):
    def __init__(self, width, fault):
        super().__init__()
        self.fault = fault
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        if self.fault == "uncapturable" and x.sum() > 0:
            x = -x
        return self.head(self.body(x).mean((2, 3)))


def images(count, seed):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def build(name="tiny", width=8, fault="none"):
    if fault == "unavailable":
        raise TaskUnavailable("fetch failed: no network")

    def network():
        torch.manual_seed(0)
        net = Net(width, fault)
        if fault == "nan_weights":
            net.head.weight.data[0, 0] = float("nan")
        return net.eval()

    def train(net, say):
        for step in range(3):
            say(f"step {step + 1} of 3")
        if fault == "training_killed":
            os.kill(os.getpid(), signal.SIGKILL)

    def calibration():
        if fault == "no_calibration":
            return []
        if fault == "wrong_shape":
            return [(torch.randn(8, 3, 8, 8),)]
        if fault == "nan_calibration":
            return [(torch.full((8, 1, 8, 8), float("nan")),)]
        return [(images(16, 1),)]

    def evaluation():
        if sys._getframe(1).f_code.co_name != "prepare":  # in a cell
            if fault == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "sleeps":
                time.sleep(60)
            if fault == "raises":
                raise RuntimeError("a bug of the user")
        return Examples((images(200, 2),), torch.arange(200) % 4)

    return Task(
        name=name, family="cnn", metric=accuracy(), build=network, calibration=calibration, evaluation=evaluation,
        train=train,
    )
'''

CONF = {
    "task/tiny.yaml": "_target_: mytask.build\nname: tiny\nwidth: 8\nfault: none\n",
    "task/tiny_wide.yaml": "_target_: mytask.build\nname: tiny_wide\nwidth: 16\nfault: none\n",
    "measure/least.yaml": (
        "defaults: [default, _self_]\nprocesses: 1\nrounds: 1\nblock_calls: 3\nblock_ms: 1\npause_ms: 0\nbatch: 2\n"
        "compile: false\nlayers: false\nfigures: false\n"
    ),
    "sweep/tiny.yaml": (
        "# @package _global_\n# Four cells.\ndefaults:\n  - override /task: tiny\n  - override /measure: least\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      method: fp32,woq,ptdq,ptsq\n"
    ),
}


def make(folder: Path) -> Path:
    """Write the project and return its folder."""
    (folder / "mytask.py").write_text(TASK)
    for name, text in CONF.items():
        path = folder / "my" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def command(*arguments: str) -> list[str]:
    """The command line of a cell of the project."""
    return [sys.executable, "-m", "qbench", "--config-dir", "my", *arguments]


def environment() -> dict[str, str]:
    """Finds qbench in this checkout from any folder; no waiting for the timings of other qbenches."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140", "TMPDIR": TEMPORARY}


def qbench(folder: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command line in the project's folder."""
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
