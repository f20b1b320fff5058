"""Damaged and hostile `.qb` files on the native backend: refused, or run; the process lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from engine_cases import Transposed
from programs import every_operation
from test_native import Attention, Encoder, Started, normal, seeded
from torch import nn

import qbench
from qbench.capture import capture
from qbench.native import sources
from qbench.quantization import quantize_network

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not sources.built(), reason="the native backend is not built here"),
]

BLOCKS = {"granularity": "per_group", "group_size": 5, "scheme": "affine"}
ATTENTION = normal(2, 4, 12), normal(2, 6, 12), normal(2, 4, 6)
MODELS = {
    "every operation": (every_operation, (normal(2, 3, 16, 16),)),
    "encoder": (lambda: seeded(Encoder), (normal(2, 13).long() % 11,)),
    "lstm": (lambda: seeded(Started), (normal(2, 6, 5), normal(2, 7), normal(2, 7))),
    "attention": (lambda: seeded(lambda: Attention("each")), ATTENTION),
    "transposed": (lambda: seeded(Transposed), (normal(2, 6, 5, 4),)),
    "linear": (lambda: seeded(lambda: nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3))), (normal(2, 9),)),
}
METHODS = ["ptsq", "ptdq", "woq"]
EACH = 40  # mutations of each model and method
MANY = 400


def survived(name: str, first: int, count: int, folder: Path) -> None:
    """Mutate the three methods' files of a model in a process of its own; fails where that does not come to its end."""
    make, inputs = MODELS[name]
    network = capture(make(), inputs)
    paths = [folder / f"{method}.qb" for method in METHODS]
    for method, path in zip(METHODS, paths, strict=True):
        quantize_network(network, qbench.Recipe(method=method, **BLOCKS), [inputs]).save(path)
    script = Path(__file__).with_name("mutated_files.py")
    command = [sys.executable, "-W", "ignore", str(script), str(first), str(count), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 3 * count, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{name}: mutation {lines[-1:]} ended the process: {done.stderr[-2000:]}"
    for method in METHODS:
        found = [outcome for of, _, outcome in lines if of == method]
        assert len(found) == count
        assert found.count("refused") > count / 4
    assert [outcome for *_, outcome in lines].count("ran") > len(METHODS) * count / 20


@pytest.mark.parametrize("name", MODELS)
def test_mutated_files(name: str, tmp_path: Path) -> None:
    survived(name, 0, EACH, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_mutated_files(name: str, tmp_path: Path) -> None:
    survived(name, EACH, MANY, tmp_path)
