"""The speed of kernels on the command line: `python -m qbench.kernels`."""

import pytest

from qbench import kernels
from qbench.native import sources

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
