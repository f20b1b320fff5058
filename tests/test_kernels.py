"""The speed of kernels on the command line: `python -m qbench.kernels`."""

import pytest
import torch
from torch import nn

import qbench
from qbench import kernels
from qbench.backends import native
from qbench.native import sources
from qbench.program import Macs, lower_graph

pytestmark = pytest.mark.skipif(not sources.built(), reason="the native backend is not built here")


def test_each_operation_of_a_program_has_a_line(tmp_path, monkeypatch, capsys):
    """The whole command is among README's (test_readme.py)."""
    monkeypatch.chdir(tmp_path)
    assert kernels.main(["ci_gan", "--method", "ptsq"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ci_gan ptsq, batch 1, 1 threads")
    assert sum("(conv_transpose)" in line for line in lines) == 4
    assert lines[-1].startswith("together")


@pytest.mark.parametrize("arguments", [["ci_mobilenet"], ["ci_mobilenet_v2", "--method", "pdq"]])
def test_a_wrong_name_is_one_line(arguments, capsys):
    assert kernels.main(arguments) == 2
    assert capsys.readouterr().err.startswith("qbench: ")


def test_an_operation_is_called_as_in_a_program():
    """By the engine alone where it does all of it, to the result's own memory; else as torch calls it."""
    x, images = torch.randn(2, 3, 8, 8), torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    recipe = qbench.Recipe(method="ptsq")
    q = qbench.quantize(nn.Conv2d(3, 5, 3).eval(), (x,), recipe, calibration=[(x,)], backend="native")
    nodes = lower_graph(q.program, native(), macs := Macs()).graph.nodes
    (conv,) = [node.target for node in nodes if getattr(node.target, "__name__", "") == "conv"]
    for given in images, images.contiguous(memory_format=torch.channels_last):
        call = kernels._engine_calls(conv, (given,), {})
        assert call is not None
        before = macs.int8
        assert call() == 0
        assert macs.int8 == before  # Python has no part in it
    assert kernels._engine_calls(torch.relu, (x,), {}) is None
    assert kernels._engine_calls(torch.transpose, (x, 0, 1), {}) is None
