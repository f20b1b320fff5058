"""`pytest --qbench` in a user's project, its whole life in one scenario; a network so small that cells take seconds."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import hydra  # noqa: F401 - pytester forgets what its runs import, and numpy cannot be imported twice
import pytest
import scipy.special  # noqa: F401
from user_project import ROOT, TEMPORARY, make, needs_engine, qbench

from qbench import compare, workers
from qbench.config import UsageError
from qbench.gate import base, sampling, session, speed  # noqa: F401
from qbench.gate.base import committed
from qbench.gate.baseline import read
from qbench.native import sources

pytestmark = needs_engine

INI = """
[pytest]
qbench_sweep = gate
qbench_config_dir = my
qbench_limits =
    speedup=400%
"""
SWEEP = """# @package _global_
# Two cells.
defaults:
  - override /task: tiny
  - override /measure: least
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      method: fp32,ptsq
"""
TESTS = """
import pytest

def test_ordinary():
    raise AssertionError("not part of the gate")

@pytest.mark.qbench(size_bytes="<=1000000", score_drop="<=50")
def test_within(qbench):
    (metrics,) = qbench.check("task=tiny", "measure=least", "method=ptsq").values()
    assert metrics["int8_mac_fraction"] == 1.0

@pytest.mark.qbench(size_bytes="<=10")
def test_beyond(qbench):
    qbench.check("task=tiny", "measure=least", "method=ptsq")
"""
SLOWER = """
from qbench import backends

load = backends.native.load

def slower(self, path, batch, threads):
    model = load(self, path, batch, threads)
    return lambda *inputs: (time.sleep(0.002), model(*inputs))[1]

backends.native.load = slower
"""
# What a commit may do to a cell: the word, the line that says it, and code that does it in every process.
BROKEN = [
    (
        "changed",
        "*checksum  changed: 1 of * tensors changed, first head.weight, the outputs changed*",
        """
from qbench import numerics
quantize = numerics.quantize

def one_weight_byte(x, *rest):
    codes = quantize(x, *rest)
    if x.dim() == 2:
        codes[0, 0] -= codes[0, 0].sign()
    return codes

numerics.quantize = one_weight_byte
""",
    ),
    (
        "changed",
        "*checksum  changed: * tensors changed, first *",
        """
from qbench import numerics
saturate_ = numerics.saturate_
numerics.saturate_ = lambda v, *rest: saturate_(v.trunc_(), *rest)
""",
    ),
    (
        "changed",
        "*checksum  changed: * tensors changed, first *",
        """
from qbench import granularities
granularities.per_channel.channels_share = True
""",
    ),
    (
        "worse",
        "*int8_mac_fraction  worse: 100.00 % -> *; now in float: linear*",
        """
import dataclasses
from qbench import evaluate
recipe_from = evaluate.recipe_from
evaluate.recipe_from = lambda config: dataclasses.replace(recipe_from(config), keep_float=("head",))
""",
    ),
    (
        "vanished metric",
        "*peak_memory_bytes  vanished metric: the baseline has peak_memory_bytes, this run has not",
        """
from qbench import measure
measure.memory_of = lambda *arguments: None
""",
    ),
]
STATIC = "tiny[ptsq-per_channel-symmetric]"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's project with a gate of two cells, and its folder the working directory."""
    make(tmp_path)
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "my" / "sweep" / "gate.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", TEMPORARY)
    monkeypatch.setenv("TMPDIR", TEMPORARY)  # for processes of its own
    monkeypatch.setattr(workers, "stop", lambda: None)  # the fork server is started once
    monkeypatch.setattr(workers, "_server", lambda number: workers._forked())  # no 3 s each
    monkeypatch.setattr(speed, "LEAST", 2)
    monkeypatch.setattr(sampling, "MOST", 4)
    return tmp_path


@pytest.fixture
def gate(project, pytester):
    """Runs `pytest --qbench` in the project, in this process."""

    def run(*arguments: str):
        os.chdir(project)
        return pytester.runpytest_inprocess(
            "--rootdir", str(project), "-c", str(project / "pytest.ini"), "--qbench", *arguments
        )

    return run


def words(result) -> dict[str, str]:
    """By cell, the word in the table."""
    lines = result.outlines[[i for i, line in enumerate(result.outlines) if "= qbench =" in line][-1] + 1 :]
    known = ("missing baseline", "vanished metric", "foreign machine", "beyond limit", "not significant")
    found = {}
    for line in itertools.takewhile(lambda line: not line.startswith("="), lines):
        if "tiny[" in line and not line.startswith(("accepted", "orphan")):
            word = next((word for word in known if line.startswith(word)), line.split()[0])
            found[line.removeprefix(word).split()[0]] = word
    return found


@pytest.mark.slow  # a minute; CI runs the slow tests of this file
def test_the_life_of_a_gate(project, gate):
    """Missing, accepted, passed, worse, updated, vanished, orphaned, stale, foreign, corrupt."""
    folder = project / "results" / "baseline"
    missing = gate()
    assert missing.ret == 1
    assert words(missing) == {"tiny[fp32]": "missing baseline", STATIC: "missing baseline"}
    assert not folder.exists()
    missing.stdout.fnmatch_lines(
        ["*accept:   pytest --qbench --qbench-update -k 'tiny[[]ptsq-per_channel-symmetric[]]'"]
    )
    assert len(list(project.glob("results/gate/runs/*/baseline.json"))) == 2

    accepted = gate("--qbench-update")
    assert accepted.ret == 0
    accepted.stdout.fnmatch_lines([f"accepted  {STATIC.replace('[', '[[]')}: new; score *"])
    path = folder / f"{STATIC}.json"
    assert len(read(path).speeds["speedup"]) == 4
    stored = path.read_text()

    passed = gate("--qbench-report=json", "--qbench-report=md")
    assert passed.ret == 0, passed.outlines
    assert set(words(passed)) == {"tiny[fp32]", STATIC}
    assert path.read_text() == stored
    cells = {cell["name"]: cell for cell in json.loads((project / "results/gate.json").read_text())["cells"]}
    by_metric = {v["metric"]: v["word"] for v in cells[STATIC]["verdicts"]}
    assert by_metric["checksum"] == by_metric["size_bytes"] == by_metric["score"] == "ok"
    assert "cells: no change that matters" in (project / "results/gate.md").read_text()

    def tamper(change) -> None:
        content = json.loads(stored)
        change(content)
        path.write_text(json.dumps(content))

    def smaller(content) -> None:
        content["metrics"]["size_bytes"] -= 1

    tamper(smaller)
    worse = gate("-x", "-k", "ptsq", "--junitxml=gate.xml")
    assert worse.ret == 1
    (case,) = ElementTree.parse(project / "gate.xml").iter("testcase")
    assert (case.get("name"), case.find("failure").text.splitlines()[0]) == (STATIC, f"{STATIC}: worse")
    assert words(worse) == {STATIC: "worse"}
    worse.stdout.fnmatch_lines(
        ["*size_bytes  worse: * (+1 bytes)", "*alone:    python -m qbench --config-dir * force=true"]
    )
    worse.stdout.no_fnmatch_line("*Traceback*")
    updated = gate("--lf", "--qbench-update=all")
    updated.assert_outcomes(passed=1, deselected=1)
    assert read(path).operations
    updated.stdout.fnmatch_lines(["accepted * size_bytes * -> * bytes*"])
    assert [entry["metrics"]["size_bytes"] for entry in read(path).history] == [
        json.loads(stored)["metrics"]["size_bytes"] - 1
    ]

    def vanish(content) -> None:
        content["speeds"]["speedup_b9"] = content["speeds"]["speedup"]
        content["milliseconds"]["speedup_b9"] = content["milliseconds"]["speedup"]

    tamper(vanish)
    (folder / "gone[ptsq].json").write_text(stored.replace(STATIC, "gone[ptsq]"))
    vanished = gate("-k", "ptsq")
    assert (vanished.ret, words(vanished)) == (1, {STATIC: "vanished metric"})
    vanished.stdout.fnmatch_lines(["orphan baseline  *gone[[]ptsq[]].json: *"])
    (folder / "gone[ptsq].json").unlink()

    tamper(lambda content: content["inputs"].update(data="other"))
    stale = gate("-k", "ptsq")
    assert (stale.ret, words(stale)) == (1, {STATIC: "stale"})
    stale.stdout.fnmatch_lines(["*inputs  stale: its data changed since the baseline was taken*"])

    tamper(lambda content: content["machine"].update(cpu="another"))
    foreign = gate("-k", "ptsq", "-m", "qbench")
    assert (foreign.ret, words(foreign)) == (0, {STATIC: "foreign machine"})
    assert gate("-k", "ptsq", "--qbench-strict").ret == 1

    path.write_text(stored[:100])
    corrupt = gate("-k", "ptsq")
    assert (corrupt.ret, words(corrupt)) == (1, {STATIC: "stale"})
    corrupt.stdout.fnmatch_lines(["*restore it from git, or delete it*"])


def test_marked_tests_are_judged_by_their_own_limits(project, gate):
    (project / "test_mine.py").write_text(TESTS)
    result = gate("test_mine.py")
    result.assert_outcomes(passed=1, failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*size_bytes  beyond limit: * bytes, limit size_bytes<=10"])
    result.stdout.no_fnmatch_line("*Traceback*")
    assert words(result) == {STATIC: "beyond limit"}


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pytest` in the project, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{project}", "TMPDIR": TEMPORARY},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_with_workers_of_xdist_cells_still_run_one_after_another(project):
    """The workers would only wait for each other: none is started."""
    ended = run(project, "--qbench", "-n", "2", "--qbench-update")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 passed" in ended.stdout
    assert "bringing up nodes" not in ended.stdout
    assert "2 workers" not in ended.stdout
    assert ended.stderr.count("measuring 2 cells") + ended.stdout.count("measuring 2 cells") == 1
    assert sorted(path.name for path in (project / "results/baseline").iterdir()) == [
        "tiny[fp32].json",
        f"{STATIC}.json",
    ]


def test_without_the_option_the_gate_is_skipped_and_nothing_heavy_is_loaded(project):
    (project / "test_mine.py").write_text(
        TESTS.replace("raise AssertionError", "print").replace(
            'print("not part of the gate")',
            'import sys\n    assert not {"torch", "hydra", "mlflow", "pandas", "numpy"} & set(sys.modules)',
        )
    )
    ended = run(project, "-p", "no:xdist", "-p", "no:hypothesispytest", "-p", "no:hydra_pytest", "-q")
    assert "1 passed, 2 skipped" in ended.stdout, ended.stdout + ended.stderr


def git(folder: Path, *arguments: str) -> None:
    settings = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_a_revision_is_measured_beside_the_working_tree(project, gate):
    (project / ".gitignore").write_text("results/\n__pycache__/\n")
    git(project, "init", "--quiet")
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "first")
    sweep = project / "my" / "sweep" / "gate.yaml"
    sweep.write_text(sweep.read_text().replace("method: fp32,ptsq", "method: fp32,ptsq,woq"))
    same = gate("--qbench-base=HEAD", "-k", "ptsq or woq", "--qbench-report=json")
    assert same.ret == 0, same.outlines
    assert set(words(same)) == {STATIC, "tiny[woq-per_channel-symmetric]"}
    cells = {cell["name"]: cell for cell in json.loads((project / "results/gate.json").read_text())["cells"]}
    said = {v["metric"]: v["word"] for v in cells[STATIC]["verdicts"]}
    assert said["checksum"] == said["size_bytes"] == said["score"] == "ok"
    assert "speedup" in said
    assert not list(project.glob("results/base/*/tree"))
    assert not (project / "results" / "baseline").exists()

    task = project / "mytask.py"
    task.write_text(task.read_text().replace("images(16, 1)", "images(16, 3)"))  # other examples calibrate
    other = gate("--qbench-base=HEAD", "-k", "ptsq")
    assert (other.ret, words(other)) == (1, {STATIC: "stale"})
    other.stdout.fnmatch_lines(["*inputs  stale: its data changed*"])


@pytest.mark.slow
def test_what_seems_slower_is_measured_beside_the_revision_of_its_baseline(project, gate):
    """A baseline of faster days accuses nobody; a slow-down is found beside it, and by its name."""
    (project / ".gitignore").write_text("results/*\n!results/baseline/\n__pycache__/\n")
    git(project, "init", "--quiet")
    assert gate("--qbench-update", "-k", "ptsq").ret == 0
    path = project / "results" / "baseline" / f"{STATIC}.json"
    content = json.loads(path.read_text())
    content["speeds"] = {metric: [value + 3.0 for value in values] for metric, values in content["speeds"].items()}
    path.write_text(json.dumps(content))
    alone = gate("-k", "ptsq")
    assert (alone.ret, words(alone)) == (1, {STATIC: "worse"})
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "first")
    revision = committed(path)
    assert revision

    faster_days = gate("-k", "ptsq", "--qbench-report=json")
    assert faster_days.ret == 0, faster_days.outlines
    (cell,) = json.loads((project / "results/gate.json").read_text())["cells"]
    (said,) = [verdict["sentence"] for verdict in cell["verdicts"] if verdict["metric"] == "speedup"]
    assert f"than {revision[:12]}, its baseline's revision, beside it" in said
    assert not list(project.glob("results/base/*/tree"))

    task = project / "mytask.py"
    task.write_text(task.read_text() + SLOWER)
    slower = gate("-k", "ptsq")
    assert (slower.ret, words(slower)) == (1, {STATIC: "worse"})
    slower.stdout.fnmatch_lines(
        [f"*speedup* worse: * % slower than {revision[:12]}, its baseline's revision, beside it*"]
    )

    path.write_text(path.read_text() + "\n")
    assert committed(path) is None


def broken(project: Path) -> None:
    """From now on the quantized cell fails; fp32 does not."""
    task = project / "my" / "task" / "tiny.yaml"
    task.write_text(task.read_text().replace("fault: none", "fault: nan_calibration"))


@pytest.mark.slow
def test_a_cell_that_fails_is_red_and_never_a_baseline(project, gate):
    folder = project / "results" / "baseline"
    broken(project)
    new = gate("--qbench-update")
    assert (new.ret, words(new)) == (1, {STATIC: "failed"})
    new.stdout.fnmatch_lines([f"{STATIC.replace('[', '[[]')}: failed", "*cell  failed: *calibration*"])
    new.stdout.no_fnmatch_line("*Traceback*")
    assert [path.name for path in folder.iterdir()] == ["tiny[fp32].json"]

    task = project / "my" / "task" / "tiny.yaml"
    task.write_text(task.read_text().replace("fault: nan_calibration", "fault: none"))
    assert gate("--qbench-update=all").ret == 0
    stored = (folder / f"{STATIC}.json").read_text()
    broken(project)
    again = gate("--qbench-update=all", "-k", "ptsq")
    assert (again.ret, words(again)) == (1, {STATIC: "failed"})
    assert (folder / f"{STATIC}.json").read_text() == stored


@pytest.mark.slow
def test_a_cell_may_fail_on_one_side_only(project, gate):
    (project / ".gitignore").write_text("results/\n__pycache__/\n")
    git(project, "init", "--quiet")
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "whole")
    broken(project)
    head = gate("--qbench-base=HEAD", "-k", "ptsq")
    assert (head.ret, words(head)) == (1, {STATIC: "failed"})
    git(project, "commit", "--quiet", "-a", "-m", "broken")
    git(project, "checkout", "--quiet", "HEAD~1")
    mended = gate("--qbench-base=HEAD@{1}", "-k", "ptsq", "--qbench-report=json")
    assert mended.ret == 0, mended.outlines
    (cell,) = json.loads((project / "results/gate.json").read_text())["cells"]
    (said,) = [verdict["sentence"] for verdict in cell["verdicts"] if verdict["metric"] == "baseline"]
    assert said.startswith("it failed on the other side: ")


@pytest.mark.slow
def test_what_a_commit_breaks_is_found_and_named(project, gate):
    """A weight byte, truncating rounding, an ignored option, a layer back in float, a metric that is gone."""
    assert gate("--qbench-update", "-k", "ptsq").ret == 0
    task = project / "mytask.py"
    whole = task.read_text()
    for word, line, code in BROKEN:
        task.write_text(whole + code)
        found = gate("-k", "ptsq")
        assert (found.ret, words(found)) == (1, {STATIC: word}), found.outlines
        found.stdout.fnmatch_lines([line])
    task.write_text(whole)
    again = gate("-k", "ptsq")
    assert again.ret == 0, again.outlines


def test_an_engine_of_the_same_sources_is_not_built_again(tmp_path, monkeypatch):
    folder = tmp_path / "qbench" / "native"
    shutil.copytree(sources.FOLDER, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "qbench" / "__init__.py", tmp_path / "qbench")
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    base._build_engine(tmp_path)
    assert (folder / sources.LIBRARY.name).read_bytes() == sources.LIBRARY.read_bytes()
    with (folder / "norm.h").open("a") as header:
        header.write("// changed\n")
    with pytest.raises(UsageError, match=r"the engine of the revision cannot be built: .*no C"):
        base._build_engine(tmp_path)


def test_the_oldest_revision_of_a_shallow_clone_is_nobodys(tmp_path):
    """It seems to have brought in every file: a baseline compared with it might be compared with itself."""
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init", "--quiet")
    for text in "first", "second":
        (origin / "file").write_text(text)
        git(origin, "add", "-A")
        git(origin, "commit", "--quiet", "-m", text)
    git(tmp_path, "clone", "--quiet", "--depth=1", origin.as_uri(), "shallow")
    git(tmp_path, "clone", "--quiet", origin.as_uri(), "whole")
    assert committed(tmp_path / "shallow" / "file") is None
    assert committed(tmp_path / "whole" / "file")
    assert committed(tmp_path / "whole" / "other") is None
    assert committed(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--qbench-base=HEAD",), "qbench: --qbench-base: git rev-parse --verify: fatal: not a git repository"),
        (("--qbench-base=HEAD", "--qbench-update"), "give one of them"),
        (("--qbench-time-limit=soon",), "qbench: --qbench-time-limit=soon: give seconds"),
        (("--qbench-limit=speed=2%",), "qbench: limit 'speed=2%': no metric 'speed'"),
        (("--qbench-sweep=nothing",), "qbench: sweep=nothing: allowed are"),
        (("--qbench-sweep=task=tiny methd=ptsq",), "qbench: unknown option 'methd'; did you mean method?"),
    ],
)
def test_misuse_is_one_line_and_exit_code_4(project, arguments, line):
    ended = run(project, "--qbench", *arguments)
    assert ended.returncode == 4, ended.stdout + ended.stderr
    assert line in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def test_two_sets_of_records_are_compared(project, capsys):
    assert qbench(project, "+sweep=gate").returncode == 0
    shutil.copytree(project / "results", project / "other", ignore=shutil.ignore_patterns("mlflow.db", "artifacts"))
    (path,) = [p for p in project.glob("other/runs/*/record.json") if json.loads(p.read_text())["method"] == "ptsq"]
    assert compare.main(["results", "other"]) == 0
    assert compare.main(["gate-least@results", "other"]) == 0
    content = json.loads(path.read_text())
    content["metrics"]["size_bytes"] += 1
    path.write_text(json.dumps(content))
    assert compare.main(["results", "other", "--report", "c.md"]) == 1
    assert "**worse** | size_bytes" in Path("c.md").read_text()
    assert compare.main(["results", "other", "--limit", "size_bytes=1%"]) == 0
    assert compare.main(["results", "nowhere"]) == 2
    assert compare.main(["all@results", "other"]) == 2
    assert "no sweep 'all' in its MLflow store, which has gate-least" in capsys.readouterr().err
