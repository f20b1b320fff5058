"""Other engines as backends: what they refuse, which form is kept, the contest's page; with the extra, whole cells."""

import importlib.util
import json
from argparse import Namespace

import pytest
import torch
from test_report import record
from torch import nn
from user_project import make
from user_project import qbench as run_qbench

import qbench
from qbench import backends, peer_contest
from qbench.compose import Composer
from qbench.measure import Measure
from qbench.peers import PeerUnavailable, fastest, require
from qbench.plan import plan
from qbench.recipe import Recipe
from qbench.record import read_record

PACKAGES = ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize(
    ("backend", "recipe", "reason"),
    [
        ("onnxruntime", {"method": "woq"}, "method=woq, it offers fp32, ptdq, ptsq"),
        ("onnxruntime", {"granularity": "per_group"}, "granularity=per_group, it offers per_tensor, per_channel"),
        ("onnxruntime", {"observer": "mse"}, "observer=mse, it offers minmax"),
        ("onnxruntime", {"keep_float": ["fc"]}, "keep_float"),
        ("onnxruntime", {"method": "ptdq"}, None),
        ("onnxruntime", {"method": "fp32", "observer": "mse"}, None),  # which means nothing there
        ("openvino", {"method": "ptdq"}, "method=ptdq, it offers fp32, ptsq"),
        ("openvino", {"granularity": "per_tensor"}, "granularity=per_tensor, it offers per_channel"),
        ("openvino", {}, None),
    ],
)
def test_a_peer_says_which_recipes_it_lacks(backend, recipe, reason):
    said = getattr(backends, backend)().lacks(Recipe(backend=backend, **recipe))
    assert said == (None if reason is None else f"backend {backend} has no {reason}")


def test_a_missing_package_is_named_with_its_cure():
    with pytest.raises(PeerUnavailable) as error:
        require("openvino", ("json", "no_such_package"))
    sentence = "backend openvino needs no_such_package, not installed here: pip install 'qbench[peers]'"
    assert str(error.value) == sentence


def test_a_peer_is_no_backend_of_programs():
    model, batch = nn.Sequential(nn.Linear(4, 2)).eval(), (torch.zeros(2, 4),)
    with pytest.raises(ValueError, match="backend=openvino runs no programs of qbench, only cells of a sweep"):
        qbench.quantize(model, batch, Recipe("fp32"), backend="openvino")


def test_the_fastest_form_is_that_with_the_smallest_product_of_times():
    """10 x 10 < 2 x 60: twice as fast at one batch and six times slower at the other does not pay."""
    assert fastest({"even": [10.0, 10.0], "uneven": [2.0, 60.0]}) == "even"
    assert fastest({"even": [10.0, 10.0], "uneven": [2.0, 40.0]}) == "uneven"
    assert fastest({"alone": []}) == "alone"


def test_the_larger_batch_has_threads_of_its_own():
    assert [Measure(threads_large=2).threads_of(batch) for batch in (1, 16)] == [1, 2]
    assert [Measure(threads=3).threads_of(batch) for batch in (1, 16)] == [3, 3]
    with pytest.raises(ValueError, match=r"measure.threads_large=0: allowed is a whole number of at least 1 or null"):
        Measure(threads_large=0)


def test_peers_are_compared_with_the_fp32_of_the_built_in_engine():
    asked = ["backend=openvino", "method=fp32,ptsq", "task=bench_lstm", "dry_run=true"]
    cells = plan(Composer(Namespace(multirun=True, overrides=asked, config_dir=None)))
    assert [(c.recipe.backend.name, c.recipe.method.name, c.is_baseline) for c in cells] == [
        ("native", "fp32", True),
        ("openvino", "fp32", False),
        ("openvino", "ptsq", False),
    ]


def times(**medians_ms):
    """One process' answer to `measure.time_contest`: two rounds of one call each."""
    found = {name.replace("_", " "): [ms, ms] for name, ms in medians_ms.items()}
    named = {
        "calls_ms": found,
        "medians_ms": found,
        "alone_ms": {name: ms[0] for name, ms in found.items()},
        "settled": dict.fromkeys(found, True),
    }
    return {"times": named, "sqnr_db": dict.fromkeys(found, 30.0)}


def cell(backend, method, ms, **more):
    measure = {"threads_large": 2, "batch": 1}
    details = {"latency_is_result": True, "is_baseline": False, "measure": measure, **more}
    metrics = {"latency_ms_median": ms, "sqnr_db": 20.0}
    return record(method=method, backend=backend, key=f"{backend}-{method}", details=details, metrics=metrics)


def test_the_page_shows_ratios_of_what_ran_side_by_side(tmp_path, capsys):
    """native/openvino is 1/2 in both processes: 0.50, certain. ORT's ptdq was hopeless, by its record."""
    records = [
        cell("native", "ptsq", 9.0),
        cell("openvino", "ptsq", 4.0, variant="mixed", float_ops=["a: MatMul f32", "b: MatMul f32"]),
        cell("onnxruntime", "ptdq", 8.1, variant="U8S8", float_ops=[]),
    ]
    names = {"native ptsq": records[0], "openvino ptsq": records[1]}
    names = {peer_contest._name(r): r for r in names.values()}
    asked = {"batch": 1, "cells": {name: [r.key, r.started] for name, r in names.items()}}
    own, peer = names
    processes = []
    for scale in (1.0, 3.0):
        process = times(own=scale, peer=2.0 * scale)
        processes.append(json.loads(json.dumps(process).replace('"own"', f'"{own}"').replace('"peer"', f'"{peer}"')))
    kept = peer_contest.kept_path(asked, tmp_path)
    kept.parent.mkdir()
    kept.write_text(json.dumps({"processes": processes}))
    (path,) = peer_contest.page(records, tmp_path)
    text = path.read_text()
    assert text in capsys.readouterr().out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0].strip("| ") for row in rows[1:]] == [own, f"* {peer}", "ort ptdq channel sym"]
    assert rows[2][1:] == ["4.00", "30.0", "0.50 (0.50..0.50) |"]
    assert rows[3][1:3] == ["~8.10", "~20.0"]
    assert f"- {peer} is mixed; in float: 2 (MatMul f32)" in text
    assert "batch 1, 1 thread" in text


def test_one_side_alone_holds_no_contest(tmp_path):
    """Nothing is timed, no process starts: the cells have no model that could be loaded."""
    for records in ([cell("native", "ptsq", 9.0)], [cell("openvino", "ptsq", 4.0, float_ops=[])]):
        (path,) = peer_contest.page(records, tmp_path)
        assert "No contest: it takes an int8 cell of the built-in engine and one of a peer." in path.read_text()
    assert not (tmp_path / peer_contest.KEPT).exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the extra qbench[peers] is not installed: no {', '.join(MISSING)}")
def test_whole_cells_of_both_peers(tmp_path):
    folder = make(tmp_path)
    asked = ["-m", "task=tiny", "measure=least", "backend=onnxruntime,openvino", "method=fp32,ptdq,ptsq"]
    ended = run_qbench(folder, *asked)
    assert ended.returncode == 0, ended.stderr
    found = {(r.backend, r.method): r for r in map(read_record, folder.glob("results/runs/*/record.json"))}
    assert {name: r.status for name, r in found.items()} == {
        ("native", "fp32"): "ok",
        ("onnxruntime", "fp32"): "ok",
        ("onnxruntime", "ptdq"): "ok",
        ("onnxruntime", "ptsq"): "ok",
        ("openvino", "fp32"): "ok",
        ("openvino", "ptdq"): "skipped",
        ("openvino", "ptsq"): "ok",
    }
    assert found["openvino", "ptdq"].error == "backend openvino has no method=ptdq, it offers fp32, ptsq"
    for (backend, method), answer in found.items():
        if answer.status == "ok" and backend != "native":
            assert {"latency_ms_median", "latency_ms_median_b2", "speedup", "size_bytes", "sqnr_db"} <= set(
                answer.metrics
            )
            assert "int8_mac_fraction" not in answer.metrics
            assert backend in answer.environment
            assert answer.metrics["sqnr_db"] > 100 if method == "fp32" else 15 < answer.metrics["sqnr_db"] < 80
            assert not [name for name in answer.details["artifacts"] if name.startswith("model")]
    assert found["onnxruntime", "ptsq"].details["variant"] in found["onnxruntime", "ptsq"].details["variant_ms"]
