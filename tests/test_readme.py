"""The README: every command and every block of code in it, run as a reader would."""

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from qbench.native import sources

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
# What makes the long ones short: the same commands with a small network, a few examples, one process of timing.
SHORT = ["measure=quick", "measure.examples=64", "measure.rounds=2", "measure.block_ms=1", "measure.figures=false"]
MINE = ["--config-dir", "my", "task=my_cnn"]
NARROW = {"method": "woq", "granularity": "per_tensor", "scheme": "symmetric"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def own_part(command: str) -> list[str]:
    """The command without the installation before it, which CI runs as it stands."""
    return shlex.split(command.split("&& ")[-1].replace(".venv/bin/python", "python"))


def shortened(arguments: list[str]) -> list[str]:
    """The reader's own small network, and of each axis that the command leaves open one value."""
    if "--help" in arguments or "dry_run=true" in arguments or "qbench.kernels" in arguments:
        return arguments
    if "qbench.compare" in arguments:  # with itself, and under the names of the shortened sweep
        return [argument.replace("results_before", "results").replace("all@", "all-quick@") for argument in arguments]
    kept = [argument for argument in arguments if not argument.startswith("task=") and argument not in MINE]
    given = {argument.split("=")[0] for argument in arguments}
    narrow = [f"{axis}={value}" for axis, value in NARROW.items() if axis not in given and "+sweep=smoke" not in given]
    return [*kept[:3], *MINE, *kept[3:], *SHORT, *narrow]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the files that the README tells its reader to write."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my/task").mkdir(parents=True)
    (folder / "my_cnn.py").write_text(blocks("python")[1])
    (folder / "my/task/my_cnn.yaml").write_text(blocks("yaml")[0])
    return folder


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *arguments[1:]] if arguments[0] == "python" else arguments
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=600)


def test_the_set_up_is_two_lines():
    installing = [command for command in commands() if "pip install" in command]
    assert len(installing) == 2
    assert own_part(installing[0]) == ["python", "-m", "qbench", "+sweep=all"]
    assert own_part(installing[1]) == ["python", "-m", "pytest"]


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if "mlflow" not in c and "pytest" not in c])
def test_each_command_works(command, reader):
    if any(word in command for word in ("native", "kernels", "peers")) and not sources.built():
        pytest.skip("the native backend is not built here")
    ended = run(shortened(own_part(command)), reader)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


def test_the_test_command_finds_tests():
    ended = run([*own_part(commands()[1]), "--collect-only", "-q", "tests/test_recipe.py"], PROJECT)
    assert ended.returncode == 0, ended.stderr


def test_the_tutorial_works(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", blocks("python")[0] + "\nassert y.shape == (8, 10) and q.int8_mac_fraction == 1.0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "model.qb").stat().st_size < 20_000
    steps = re.findall(r"^# (\d)\.", blocks("python")[0], re.MULTILINE)
    assert steps == ["1", "2", "3", "4", "5"]


def test_mlflow_serves_the_runs(reader):
    if not (reader / "results/mlflow.db").exists():
        assert run(shortened(["python", "-m", "qbench"]), reader).returncode == 0
    (command,) = [command for command in commands() if command.startswith("mlflow")]
    arguments = [str(Path(sys.executable).parent / "mlflow"), *shlex.split(command)[1:], "--port", "5057"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        arguments, cwd=reader, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert "MLflow" in answer("http://127.0.0.1:5057/", seconds=60)
    finally:
        server.terminate()
        server.wait(30)


def answer(address: str, seconds: float) -> str:
    """What the server says, once it does."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                return str(response.read().decode())
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def test_pictures_and_files_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (PROJECT / target).exists(), target
