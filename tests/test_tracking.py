"""The MLflow store, read back through MLflow's own client; and every way in which it can be unusable."""

import base64
import dataclasses
import json
import sqlite3
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from qbench import tracking, tracking_view
from qbench.record import Record

OK = Record(
    cell="c1",
    key="k1",
    status="ok",
    task="resnet18",
    family="cnn",
    method="ptsq",
    granularity="per_channel",
    granularity_effective="per_channel",
    scheme="symmetric",
    activation_scheme="affine",
    observer="moving_average",
    output="float",
    backend="native",
    label="ptsq-c-s",
    metrics={
        "score": 0.876543,
        "score_fp32": 0.88,
        "score_drop": 0.0044,
        "size_bytes": 11234567.0,
        "latency_ms_median": 123.456,
        "speedup": 2.54321,
        "speedup_b16": 1.9,
    },
    environment={"fp32_baseline": "eager"},
    started="2026-11-23T07:00:00+00:00",
    seconds=12.5,
    notes=["disturbed"],
    details={"latency_is_result": True, "artifacts": ["program.txt", "plots/a.png", "model.qb", "missing.txt"]},
)
SLOW = dataclasses.replace(OK, cell="s", key="s1", backend="reference", details={"latency_is_result": False})
FAILED = dataclasses.replace(OK, cell="c2", key="k2", status="failed", error="out of memory", metrics={}, details={})


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store as `prepare_store` makes it; making one takes seconds, so tests that only read it share it."""
    results = tmp_path_factory.mktemp("with space & 100%") / "results"
    tracking.prepare_store(results)
    return results


@pytest.fixture(scope="module")
def results(empty_store):
    """The store with one good and one failed run, logged twice, and the view."""
    folder = empty_store / "runs" / OK.key
    OK.write(folder / "record.json")
    (folder / "program.txt").write_text("y = linear(x)\n")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"png")
    (folder / "model.qb").write_bytes(bytes(3_000_000))
    assert [tracking.log(record, empty_store, "all") for record in (OK, FAILED, OK, FAILED)] == [
        True,
        True,
        False,
        False,
    ]
    tracking.save_view([OK, FAILED], empty_store, "all")
    return empty_store


def runs(results, sweep="all"):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking.store_uri(results))
    experiment = client.get_experiment_by_name("qbench").experiment_id
    found = client.search_runs([experiment], f"tags.`qbench.sweep` = '{sweep}'")
    return {run.data.tags["qbench.key"]: run for run in found}


def test_a_record_is_one_flat_run(results):
    assert set(runs(results)) == {"k1", "k2"}
    run = runs(results)["k1"]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "resnet18 ptsq channel sym movavg"
    assert run.info.end_time - run.info.start_time == 12500
    tags = run.data.tags
    assert (tags["qbench.sweep"], tags["qbench.cell"], tags["qbench.key"]) == ("all", "c1", "k1")
    assert "mlflow.parentRunId" not in tags


def test_values_have_four_digits(results):
    assert runs(results)["k1"].data.metrics == {
        "score": 0.8765,
        "score_fp32": 0.88,
        "score_drop": 0.0044,
        "drop_percent": 0.5,
        "size_bytes": 11230000.0,
        "latency_ms_median": 123.5,
        "speedup": 2.543,
        "speedup_b16": 1.9,
    }
    assert runs(results)["k1"].data.tags["qbench.latency"] == "measured"


def test_a_reference_is_labelled_and_has_no_speedup(empty_store):
    assert tracking.log(SLOW, empty_store, "slow")
    data = runs(empty_store, "slow")["s1"].data
    assert (data.tags["qbench.latency"], data.params["latency"], data.params["backend"]) == (
        "reference",
        "reference",
        "ref",
    )
    assert data.metrics["latency_ms_median"] == 123.5
    assert not [name for name in data.metrics if "speedup" in name]


def test_options_are_short_labels(results):
    params = runs(results)["k1"].data.params
    assert params["label"] == "ptsq-c-s"
    names = ("method", "granularity", "scheme", "observer", "activation_granularity")
    assert [params[name] for name in names] == ["ptsq", "channel", "sym", "movavg", "-"]
    assert (params["task"], params["latency"], params["notes"]) == ("resnet18", "measured", "disturbed")
    assert "granularity_effective" not in params  # as asked: nothing to say


def test_artifacts_are_copied_but_the_model_is_not(results):
    artifacts = Path(results / "artifacts" / runs(results)["k1"].info.run_id / "artifacts")
    found = sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file())
    assert found == ["plots/a.png", "program.txt", "record.json"]
    assert (artifacts / "program.txt").read_text() == "y = linear(x)\n"


def test_a_failed_cell_is_a_failed_run_with_its_sentence(results):
    run = runs(results)["k2"]
    assert run.info.status == "FAILED"
    assert run.data.tags["qbench.error"] == "out of memory"
    assert run.data.metrics == {}


def test_skipped_is_not_failed():
    assert tracking.STATUS["skipped"] != tracking.STATUS["failed"]


def test_logged_keys(results):
    assert tracking.logged_keys(results, "all") == {"k1", "k2"}
    assert tracking.logged_keys(results, "smoke") == set()


def test_one_record_in_two_sweeps(results):
    assert tracking.log(OK, results, "smoke")
    assert tracking.logged_keys(results, "smoke") == {"k1"}
    assert len(runs(results)) == 2


def test_a_new_answer_replaces_the_old_one(empty_store):
    again = dataclasses.replace(OK, started="2026-11-24T07:00:00+00:00")
    other_code = dataclasses.replace(OK, key="k3", started="2026-11-25T07:00:00+00:00")
    for record in (OK, again, other_code):
        assert tracking.log(record, empty_store, "replaced")
        assert [run.data.tags["qbench.record"] for run in runs(empty_store, "replaced").values()] == [
            f"{record.key} {record.started}"
        ]


def test_a_run_cut_off_half_way_is_logged_again(empty_store, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_log_values", killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.log(OK, empty_store, "cut")
    assert tracking.logged_keys(empty_store, "cut") == set()
    assert tracking.log(OK, empty_store, "cut")
    assert [run.info.status for run in runs(empty_store, "cut").values()] == ["FINISHED"]


def test_logging_is_quick(empty_store):
    many = [dataclasses.replace(OK, cell=f"c{n}", key=f"q{n}") for n in range(10)]
    start = time.process_time()
    assert all(tracking.log(record, empty_store, "quick") for record in many)
    assert (time.process_time() - start) / len(many) < 0.15  # ~0.04 alone on a machine


def experiment_tags(results):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking.store_uri(results)).get_experiment_by_name("qbench").tags


def saved_view(results, sweep):
    """Name and content of the view that the sweep's link leads to."""
    key = tracking.deep_link(results, sweep, 1234).split("viewStateShareKey=")[1].split("&")[0]
    saved = json.loads(experiment_tags(results)[f"mlflow.sharedViewState.{key}"])
    kind, packed = saved["state"].split(";")
    assert kind == "deflate"
    return saved["name"], json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_saved_view_shows_size_latency_and_score(results):
    name, state = saved_view(results, "all")
    assert name == "qbench all: resnet18"
    assert state["searchFilter"].startswith("tags.`qbench.sweep` = 'all'")
    assert {"metrics.`size_bytes`", "metrics.`latency_ms_median`", "metrics.`score`", "params.`latency`"} <= set(
        state["selectedColumns"]
    )
    assert "metrics.`speedup`" in state["selectedColumns"]
    assert {chart["type"] for chart in state["compareRunCharts"]} == {"PARALLEL", "SCATTER", "BAR"}


def test_the_view_of_a_reference_ranks_no_speed(empty_store):
    tracking.save_view([OK, SLOW], empty_store, "slow view")
    _, state = saved_view(empty_store, "slow view")
    assert "speedup" not in json.dumps(state)
    charts = json.dumps(state["compareRunCharts"])
    assert "size_ratio" in charts
    assert "latency" not in charts


def test_the_deep_link_leads_to_the_experiment(results):
    link = tracking.deep_link(results, "all", port=1234)
    assert link.startswith(
        "http://127.0.0.1:1234/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey="
    )


def test_several_tasks_share_the_relative_drop_and_have_a_view_each():
    both = tracking_view.state("all", ["mobilenet_v2", "resnet18"], timed=True)
    one = tracking_view.state("all", ["resnet18"], timed=True)
    first = [next(c["yaxis"]["key"] for c in s["compareRunCharts"] if c["type"] == "SCATTER") for s in (both, one)]
    assert first == ["drop_percent", "score"]
    assert both["orderByKey"] == "metrics.`drop_percent`"  # points and bits cannot be sorted together
    assert "params.`task` = 'resnet18'" in one["searchFilter"]
    assert "metrics.`speedup`" in one["selectedColumns"]
    keys = {tracking_view.view_key("all"), tracking_view.view_key("all", "resnet18"), tracking_view.view_key("smoke")}
    assert len(keys) == 3


def test_the_note_explains_every_metric(results):
    note = experiment_tags(results)["mlflow.note.content"]
    for name in ("score_drop", "size_bytes", "latency_ms_median", "sqnr_db", "int8_mac_fraction", "drop_percent"):
        assert f"| `{name}` |" in note


def test_a_view_that_is_refused_breaks_nothing(results, monkeypatch):
    monkeypatch.setattr(tracking_view, "view_tag", lambda *_: "x" * 10_000_000)  # longer than a tag may be
    tracking.save_view([OK], results, "refused")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, 0.0), (1234567.0, 1235000.0), (-0.000123456, -0.0001235), (99999.0, 100000.0), (5.0, 5.0)],
)
def test_four_digits(value, shown):
    assert tracking.four_digits(value) == pytest.approx(shown, rel=1e-12)


def one_line_error(results):
    with pytest.raises(tracking.TrackingError) as found:
        tracking.check_store(results, wait_s=0.1)
    assert "\n" not in str(found.value)
    assert str(results / "mlflow.db") in str(found.value)
    return str(found.value)


def test_a_missing_store_is_fine(tmp_path):
    tracking.check_store(tmp_path)


def test_a_sound_store_is_fine(results):
    tracking.check_store(results)


def test_a_locked_store(empty_store):
    with sqlite3.connect(empty_store / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "database is locked; end the program that holds it" in one_line_error(empty_store)
        other.execute("ROLLBACK")
    other.close()
    tracking.check_store(empty_store)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_text("these are notes, not a database" * 100)
    assert "not a readable SQLite database" in one_line_error(tmp_path)


def test_a_truncated_store(tmp_path, empty_store):
    content = (empty_store / "mlflow.db").read_bytes()
    (tmp_path / "mlflow.db").write_bytes(content[: len(content) // 2])
    assert "move it away" in one_line_error(tmp_path)


def test_a_foreign_database(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    assert "a database, but not MLflow's; move it away" in one_line_error(tmp_path)


def test_a_store_of_another_mlflow(tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes((empty_store / "mlflow.db").read_bytes())
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        db.execute("UPDATE alembic_version SET version_num = 'feedbeef'")
    db.close()
    assert "written by another MLflow (schema feedbeef" in one_line_error(tmp_path)


def test_a_folder_where_the_store_should_be(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    assert "mlflow.db" in one_line_error(tmp_path)


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "mlflow.db").touch()
    (tmp_path / ".mlflow-unfinished").mkdir()  # left by a process that was killed while it made the store
    (tmp_path / ".mlflow-unfinished" / "mlflow.db").write_text("half a database")
    tracking.prepare_store(tmp_path)
    assert tracking.log(FAILED, tmp_path, "all")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_moved_store(tmp_path, empty_store):
    (tmp_path / "mlflow.db").write_bytes((empty_store / "mlflow.db").read_bytes())
    with pytest.raises(tracking.TrackingError, match="MLflow keeps absolute paths; move the results back"):
        tracking.prepare_store(tmp_path)


def test_checking_the_store_imports_no_mlflow(results):
    code = (
        "import sys, pathlib; from qbench import tracking; tracking.check_store(pathlib.Path(sys.argv[1])); "
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(results)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlflow", "torch", "pandas", "hydra"} & set(loaded)
