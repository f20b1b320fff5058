"""A sweep from the shell: every cell once, resumed, killed, failing; on a network so small that cells take seconds."""

import fcntl
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from user_project import TEMPORARY, command, environment, make, needs_engine, qbench

from qbench import cell, cli, workers
from qbench.record import read_record

pytestmark = needs_engine

SWEEP = "+sweep=tiny"
RUN = workers.run


def records(folder: Path):
    """Every record by method; each must be readable and beside its artifacts."""
    found = [read_record(path) for path in sorted(folder.glob("results/runs/*/record.json"))]
    for record in found:
        for name in record.details["artifacts"]:
            assert (folder / "results" / "runs" / record.key / name).is_file()
    return {record.method: record for record in found}


def leftovers(folder: Path):
    """Files that a finished or resumed run must not leave."""
    runs = [path for path in folder.glob("results/runs/*") if not (path / "record.json").exists()]
    hidden = [path for path in folder.glob("results/**/.*") if path.name != ".lock"]
    return runs + hidden


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A project whose sweep has run once, and what the run said."""
    folder = make(tmp_path_factory.mktemp("swept"))
    return folder, qbench(folder, SWEEP)


@dataclass(frozen=True)
class Ended:
    """How a command line ended that ran in this process."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs command lines here, as `python -m qbench` does in a process of its own: the fork server is started once."""

    def run_here(folder: Path, *arguments: str) -> Ended:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(workers, "stop", lambda: None)
        monkeypatch.setattr(tempfile, "tempdir", TEMPORARY)
        capsys.readouterr()
        code = cli.main(["--config-dir", "my", *arguments])
        return Ended(code, *capsys.readouterr())

    return run_here


STORE = ("artifacts", "mlflow.db")  # keeps absolute paths, so it does not move with the folder


@pytest.fixture
def finished(swept, tmp_path):
    """A copy of the swept project with its records, without the MLflow store."""
    return shutil.copytree(swept[0], tmp_path / "finished", ignore=shutil.ignore_patterns(*STORE))


@pytest.fixture
def project(swept, tmp_path):
    """A copy of the swept project without its records: the task is prepared."""
    return shutil.copytree(swept[0], tmp_path / "project", ignore=shutil.ignore_patterns("runs", "summary.*", *STORE))


def test_a_sweep_runs_every_cell_and_shows_a_table(swept):
    folder, ended = swept
    assert ended.returncode == 0, ended.stderr
    assert set(records(folder)) == {"fp32", "woq", "ptdq", "ptsq"}
    assert all(record.status == "ok" for record in records(folder).values())
    assert (folder / "results" / "summary.csv").exists()
    assert "http://127.0.0.1:5000/#/experiments/" in ended.stdout
    assert not leftovers(folder)


def test_progress_says_which_cell_and_how_many_are_left(swept):
    _, ended = swept
    assert "4 cells, 0 finished, 4 to run; tiny[fp32] first" in ended.stdout
    (static,) = [line for line in ended.stdout.splitlines() if line.startswith("[4/4] tiny ptsq channel sym: accuracy")]
    assert "x fp32, " in static  # the engine's time is a result
    assert "~" not in static
    assert [line for line in ended.stdout.splitlines() if line.startswith("[1/4] tiny fp32: accuracy")]
    assert "[2/4] tiny[woq-per_channel-symmetric] and 2 more; 3 left, about" in ended.stderr
    assert "preparing tiny" in ended.stderr


def test_a_record_says_how_to_run_it_alone(swept):
    folder, _ = swept
    details = records(folder)["ptsq"].details
    assert details["command"] == "python -m qbench --config-dir my task=tiny method=ptsq measure=least force=true"
    assert details["log"] == f"results/runs/{records(folder)['ptsq'].key}/log.txt"
    assert details["latency_is_result"] is True
    assert details["metric"] == "accuracy"
    assert details["fp32_baselines"]


def test_two_hashes_tell_cells_apart(swept):
    found = records(swept[0]).values()
    assert len({record.cell for record in found}) == len({record.key for record in found}) == 4


def test_a_second_run_does_nothing_and_says_so(swept, run):
    folder, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.glob("results/runs/*/*")}
    ended = run(folder, SWEEP)
    assert ended.returncode == 0
    assert ended.stdout.startswith("nothing to do: all 4 cells are finished")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("results/runs/*/*")} == before


def test_a_dry_run_lists_cells_and_runs_nothing(swept, tmp_path, run):
    folder, _ = swept
    ended = run(folder, SWEEP, "dry_run=true", "granularity=per_channel,per_tensor")
    assert "done   tiny[woq-per_channel-symmetric]" in ended.stdout
    assert "to do  tiny[woq-per_tensor-symmetric]  about" in ended.stdout
    assert "7 cells, 4 done, 3 to do: about" in ended.stdout
    assert len(records(folder)) == 4
    unprepared = run(make(tmp_path), SWEEP, "dry_run=true")
    assert "4 cells, 0 done, 4 to do: no estimate" in unprepared.stdout


def test_combinations_that_ask_the_same_are_one_cell(swept, run):
    """30 combinations: what does not apply to fp32 is dropped before cells are compared."""
    both = ["method=glob(*,exclude=bf16)", "granularity=glob(*)", "scheme=glob(*)"]
    ended = run(swept[0], SWEEP, "dry_run=true", *both)
    assert "25 cells, 4 done" in ended.stdout
    ended = run(swept[0], "+sweep=all", "task=tiny", "measure=least", "dry_run=true")
    assert "25 cells, 4 done" in ended.stdout


def test_a_sweep_is_narrowed_on_the_command_line(swept, run):
    ended = run(swept[0], SWEEP, "method=woq", "dry_run=true")
    assert ended.stdout.splitlines()[:2] == ["done   tiny[fp32]", "done   tiny[woq-per_channel-symmetric]"]
    assert "2 cells, 2 done" in ended.stdout


def test_one_cell_runs_its_fp32_cell_first(project, run):
    ended = run(project, "task=tiny", "measure=least", "method=woq")
    assert ended.returncode == 0, ended.stderr
    assert "2 cells, 0 finished, 2 to run; tiny[fp32] first, the others are compared with it" in ended.stdout
    assert set(records(project)) == {"fp32", "woq"}


def test_force_runs_finished_cells_again(finished, run):
    assert "1 cells, 0 done, 1 to do" in run(finished, SWEEP, "method=fp32", "force=true", "dry_run=true").stdout
    before = records(finished)
    assert run(finished, SWEEP, "method=fp32", "force=true").returncode == 0
    after = records(finished)
    assert after["fp32"].key == before["fp32"].key
    assert after["fp32"].started > before["fp32"].started
    assert after["woq"] == before["woq"]


def test_a_changed_source_of_the_task_is_another_answer(finished, run):
    with (finished / "mytask.py").open("a") as source:
        source.write("\n# changed\n")
    assert "4 cells, 0 done" in run(finished, SWEEP, "dry_run=true").stdout


FAULTS = [
    ("segfault", "fp32", "crashed (SIGSEGV: segmentation fault)", 1),
    ("killed", "fp32", "killed (SIGKILL), probably out of memory", 1),
    ("sleeps", "fp32", "stopped after 2 s, the limit measure.timeout_s", 1),
    ("raises", "fp32", "RuntimeError: a bug of the user", 1),
    ("uncapturable", "fp32", "torch.export", 2),
    ("nan_weights", "woq", "finite", 2),
    ("no_calibration", "ptsq", "calibration", 2),
    ("wrong_shape", "ptsq", "", 2),
    ("nan_calibration", "ptsq", "calibration", 2),
]


@pytest.mark.parametrize(("fault", "method", "sentence", "code"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_what_fails_becomes_a_record_with_log_and_command(fault, method, sentence, code, project, run):
    limit = ["measure.timeout_s=2"] if fault == "sleeps" else []
    ended = run(project, "task=tiny", "measure=least", f"method={method}", f"task.fault={fault}", *limit)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    failed = [record for record in records(project).values() if record.status == "failed"]
    first = next(record for record in failed if not record.details["follows_from_fp32"])
    assert sentence in first.error
    assert "\n" not in first.error
    assert (project / first.details["log"]).is_file()
    assert f"task.fault={fault}" in first.details["command"]
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("qbench: ")]
    for text in (first.error, first.details["log"], first.details["command"]):
        assert text in line


def test_fp32_cells_of_several_tasks_share_a_process_and_one_that_fails_is_left_out(project, run, monkeypatch):
    (project / "my/task/broken.yaml").write_text("_target_: mytask.build\nname: broken\nwidth: 8\nfault: raises\n")
    asked = []
    monkeypatch.setattr(workers, "run", lambda name, *a, **k: (asked.append(name), RUN(name, *a, **k))[1])
    ended = run(project, "--multirun", "task=tiny,broken,tiny_wide", "method=fp32", "measure=least")
    assert ended.returncode == 1, ended.stderr
    found = {r.task: r for r in map(read_record, project.glob("results/runs/*/record.json"))}
    assert {task: record.status for task, record in found.items()} == {
        "tiny": "ok",
        "broken": "failed",
        "tiny_wide": "ok",
    }
    assert asked.count(cell.TIME) == 1
    times = {found[task].metrics["latency_ms_median"] for task in ("tiny", "tiny_wide")}
    assert len(times) == 2
    assert min(times) > 0.0


def test_a_task_that_cannot_be_had_is_skipped(project, run):
    ended = run(project, "task=tiny", "measure=least", "task.fault=unavailable")
    assert ended.returncode == 0, ended.stderr
    assert {record.status for record in records(project).values()} == {"skipped"}
    assert "fetch failed: no network" in ended.stdout


def test_a_crash_while_training_fails_the_cells(project, run):
    ended = run(project, "task=tiny", "measure=least", "task.fault=training_killed")
    assert ended.returncode == 1
    assert {record.error for record in records(project).values()} == {"killed (SIGKILL), probably out of memory"}


@pytest.mark.parametrize("file", ["weights.safetensors", "fp32_outputs.safetensors"])
def test_a_corrupt_cache_is_one_line(file, project, run):
    (path,) = project.glob(f"results/cache/*/{file}")
    path.write_bytes(path.read_bytes()[:-40])
    ended = run(project, SWEEP, "method=fp32")
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("qbench: ")]
    assert "is damaged" in line
    assert "delete" in line


def test_a_damaged_record_is_told_and_run_again(finished, run):
    path = finished / "results" / "runs" / records(finished)["woq"].key / "record.json"
    path.write_text(path.read_text()[:-50])
    ended = run(finished, SWEEP)
    assert ended.returncode == 0
    assert "4 cells, 3 finished, 1 to run" in ended.stdout
    assert "record.json" in ended.stderr
    assert records(finished)["woq"].status == "ok"


def test_a_locked_or_foreign_mlflow_database_is_one_line(project, run):
    database = project / "results" / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE other (x)")
    ended = run(project, SWEEP)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "mlflow.db" in ended.stderr
    assert not records(project)


def test_records_that_the_store_lacks_are_logged_on_resume(finished, run):
    assert run(finished, SWEEP).stdout.startswith("nothing to do")
    with sqlite3.connect(finished / "results" / "mlflow.db") as store:
        keys = {row[0] for row in store.execute("SELECT value FROM tags WHERE key = 'qbench.key'")}
    assert keys == {record.key for record in records(finished).values()}


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(project, run):
    running = start(project)
    wait_for(lambda: list(project.glob("results/runs/*/record.json")), running)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "of 4 cells are finished; the same command goes on" in error
    assert "Traceback" not in error
    kept = {record.key: record.started for record in records(project).values()}
    assert kept
    assert run(project, SWEEP).returncode == 0
    assert len(records(project)) == 4
    assert kept.items() <= {record.key: record.started for record in records(project).values()}.items()
    assert not leftovers(project)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_the_cells_in_hand_at_most(project):
    chance = random.Random(7)
    kept: dict[str, str] = {}
    for _ in range(4):
        running = start(project)
        time.sleep(chance.uniform(2, 15))
        running.kill()
        running.communicate(timeout=60)
        found = {record.key: record.started for record in records(project).values()}
        assert kept.items() <= found.items()  # nothing finished is lost or run again
        kept = found
    ended = qbench(project, SWEEP)
    assert ended.returncode == 0, ended.stderr
    found = {record.key: record.started for record in records(project).values()}
    assert kept.items() <= found.items()
    assert len(found) == 4
    assert not leftovers(project)
    with sqlite3.connect(project / "results" / "mlflow.db") as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_two_sweeps_of_one_folder_do_not_tidy_each_other(project, run):
    """Only who is alone in a results folder removes what a killed run has left."""
    left = project / "results" / "runs" / "killed"
    left.mkdir(parents=True)
    with (project / "results" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        run(project, SWEEP, "dry_run=true")
        assert left.exists()
    run(project, SWEEP, "dry_run=true")
    assert not left.exists()


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(SWEEP),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # under nohup it is ignored
    )


def wait_for(true, running, seconds=120):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    assert true()


def test_the_log_of_a_run_is_kept_as_json(swept):
    for record in records(swept[0]).values():
        assert json.loads((swept[0] / "results" / "runs" / record.key / "record.json").read_text())["key"] == record.key
        assert (swept[0] / "results" / "runs" / record.key / "log.txt").exists()
