"""The command line: every misuse is one line that names the cure, and nothing heavy is imported too early."""

import subprocess
import sys

import pytest
from user_project import environment, make, qbench

from qbench import cli

# What is given, and words that the one line must hold: what was given, what is allowed or what to do.
BAD_INPUT = [
    (["methd=ptsq"], ["unknown option 'methd'", "did you mean method"]),
    (["method=ptqs"], ["method=ptqs", "fp32, ptdq, ptsq, qat, woq", "did you mean ptsq"]),
    (["method="], ["method=", "fp32, ptdq, ptsq, qat, woq"]),
    (["method=[ptsq,woq]"], ["method", "-m method=...,..."]),
    (["method=ptsq,woq"], ["method=ptsq,woq", "add -m"]),
    (["~method"], ["method: give exactly one"]),
    (["+methods=ptsq"], ["unknown option 'methods'", "did you mean method"]),
    (["task=resnet"], ["task=resnet", "tiny"]),
    (["task.wdth=3"], ["unknown option 'task.wdth'"]),
    (["task.colour=3"], ["unknown option 'task.colour'", "--help"]),
    (["sweep=all"], ["write +sweep"]),
    (
        ["+sweep=al"],
        [
            "sweep=al",
            "activations, all, calibration, ci, granularity, observers, peers, smoke, textbook",
            "did you mean all",
        ],
    ),
    (["+sweep=all,smoke"], ["one sweep at a time"]),
    (["+sweep=all", "+sweep=smoke"], ["one sweep at a time"]),
    (["+sweep=tiny", "method=ptqs"], ["method=ptqs", "did you mean ptsq"]),
    (["+sweep=tiny", "results=a,b"], ["results: give one value"]),
    (["foo"], ["'foo'", "key=value"]),
    (["=3"], ["=3"]),
    (["--foo"], ["--foo", "--help"]),
    (["--config-dir", "nowhere"], ["nowhere", "no such folder"]),
    (["group_size=0"], ["group_size=0", "at least 1"]),
    (["group_size=big"], ["group_size='big'", "whole number"]),
    (["observer=percentile", "observer.percentile=101"], ["percentile=101", "at most 100"]),
    (["observer.percentile=99"], ["unknown option 'observer.percentile'"]),
    (["keep_float=fc"], ["keep_float='fc'", "[fc]"]),
    (["measure.batch=0"], ["measure.batch=0", "at least 1"]),
    (["measure.processes=0"], ["measure.processes=0", "at least 1"]),
    (["measure.threads=many"], ["measure.threads='many'"]),
    (["measure=fast"], ["measure=fast", "least, peers, quick"]),
    (["force=maybe"], ["force=maybe", "true or false"]),
    (["dry_run=1"], ["dry_run=1", "true or false"]),
    (["results="], ["results=", "folder"]),
    (["results=mytask.py/here"], ["results=mytask.py/here", "cannot be written", "another folder"]),
    (["results=${nowhere}"], ["nowhere"]),
    (["hydra/sweeper=none", "-m"], ["hydra/sweeper=none"]),
    (["hydra/launcher=none", "-m"], ["hydra/launcher=none"]),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize(("given", "words"), BAD_INPUT, ids=lambda value: " ".join(value))
def test_bad_input_is_one_line_and_exit_code_2(given, words, project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)  # as python -m does
    folder = [] if "--config-dir" in given else ["--config-dir", "my"]
    task = [] if any(text.startswith("task=") for text in given) else ["task=tiny"]
    assert cli.main([*folder, *task, *given]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("qbench: ")
    assert not captured.out
    for word in words:
        assert word in captured.err
    assert sorted(path.name for path in project.iterdir()) == ["my", "mytask.py"]  # nothing was begun


def test_misuse_from_the_shell(project):
    ended = qbench(project, "task=tiny", "methd=ptsq")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "qbench: unknown option 'methd'; did you mean method?; see python -m qbench --help\n"


@pytest.mark.parametrize(
    ("yaml", "word"),
    [
        ("width: 8\n", "_target_"),
        ("_target_: nomodule.build\n", "nomodule"),
        ("_target_: tasks.nothing.build\n", "tasks.nothing"),
        ("_target_: [\n", "broken.yaml"),
        ("_target_: mytask.build\nname: ???\n", "name"),
    ],
    ids=["no target", "no module", "no such task of the project", "no YAML", "a missing value"],
)
def test_a_users_broken_yaml_is_one_line(yaml, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my" / "task" / "broken.yaml").write_text(yaml)
    assert cli.main(["--config-dir", "my", "task=broken"]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") <= 2  # the moving line, and the one line


def test_help_tells_groups_sweeps_and_examples(project):
    ended = qbench(project, "--help")
    assert ended.returncode == 0
    for text in (
        "+sweep=all",
        "method: bf16, fp32, ptdq, ptsq, qat, woq",
        "sweep: activations, all",
        "group_size: 64",
        "Exit codes",
    ):
        assert text in ended.stdout
    assert "tiny" in ended.stdout  # the user's own task is among the choices
    assert not ended.stderr


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--info", "searchpath"], ["--hydra-help"]])
def test_hydras_own_questions_are_answered(flag, project):
    ended = qbench(project, *flag)
    assert ended.returncode == 0
    assert ended.stdout
    assert not (project / "results").exists()


HEAVY = ["torch", "hydra", "omegaconf", "mlflow", "pandas", "matplotlib"]


@pytest.mark.parametrize(
    "module", ["qbench", "qbench.__main__", "qbench.cli", "qbench.record", "qbench.recipe", "qbench.sweep"]
)
def test_importing_it_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert ended.stdout.strip() == "[]"


def test_public_names_are_found_on_first_use_and_wrong_ones_are_told():
    import qbench as package

    assert package.Recipe(method="woq").method.name == "woq"
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=r"public names: .*quantize"):
        _ = package.quantise
