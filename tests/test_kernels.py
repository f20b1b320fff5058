"""The speed of kernels on the command line: `python -m qbench.kernels`."""

import subprocess
import sys

import pytest

from qbench import kernels
from qbench.native import sources

pytestmark = pytest.mark.skipif(not sources.built(), reason="the native backend is not built here")


def test_each_operation_of_a_program_has_a_line(tmp_path):
    command = [sys.executable, "-m", "qbench.kernels", "ci_mobilenet_v2", "--method", "ptsq"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ci_mobilenet_v2 ptsq, batch 1, 1 threads")
    assert sum("(conv)" in line for line in lines) == 52
    assert lines[-1].startswith("together")


@pytest.mark.parametrize("arguments", [["ci_mobilenet"], ["ci_mobilenet_v2", "--method", "pdq"]])
def test_a_wrong_name_is_one_line(arguments, capsys):
    assert kernels.main(arguments) == 2
    assert capsys.readouterr().err.startswith("qbench: ")
