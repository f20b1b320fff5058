"""The table, the one-line results and the summary, read back; every expectation is derived by hand here."""

import csv
import dataclasses
import subprocess
import sys

import pytest

from qbench import comparison, report
from qbench.recipe import Recipe
from qbench.record import Record


def record(method="ptsq", granularity="per_channel", drop=0.0, size=1000.0, *, task="resnet18", half=0.002, **more):
    """A finished cell of the engine. `half` is half the width of the drop's interval, the fp32 score is 0.9."""
    baseline = method == "fp32"
    metrics = {
        "accuracy": 0.9 - drop,
        "score": 0.9 - drop,
        "score_fp32": 0.9,
        "score_drop": drop,
        "score_drop_ci_low": drop - half,
        "score_drop_ci_high": drop + half,
        "examples": 10000,
        "agreement": 0.99,
        "size_bytes": size,
        "size_ratio": size / 4000,
        "latency_ms_median": 12.34,
        "latency_ms_median_b16": 123.4,
        "peak_memory_bytes": 3.21e7,
    }
    metrics |= more.pop("metrics", {})
    details = {"metric": "accuracy", "latency_is_result": True} | more.pop("details", {})
    names = Recipe(method=method, granularity=granularity, backend="native").names()
    fields = {"status": "ok", "family": "cnn", "label": "label", "seconds": 4.2}
    fields |= {**names, "task": task, "cell": f"{task}{method}{granularity}{drop}{size}", "metrics": metrics}
    fields |= {"key": fields["cell"], "details": details, "environment": {"fp32_baseline": "eager"}}
    if baseline:
        fields["metrics"] = metrics | {"score_drop_ci_low": 0.0, "score_drop_ci_high": 0.0}
    return Record(**(fields | more))


def timed(speedup, **more):
    """A cell with its speed-up against an fp32 of 10 ms."""
    metrics = {"speedup": speedup, "latency_ms_median": 10 / speedup} | more.pop("metrics", {})
    return record(metrics=metrics, **more)


def by_reference(**more):
    """A cell that the reference ran: its latency is no result."""
    return record(backend="reference", details={"latency_is_result": False}, **more)


FP32 = record("fp32", size=4000.0)
BEST = record("ptsq", "per_channel", 0.001, 1010.0)  # 0.1 points, interval -0.1..0.3: not significant
SMALL = record("ptsq", "per_tensor", 0.05, 1000.0)  # 5 points, interval 4.8..5.2: worse
BEATEN = record("ptsq", "per_group", 0.02, 1100.0)  # larger and worse than BEST
DYNAMIC = record("ptdq", "per_channel", -0.004, 1020.0)  # interval -0.6..-0.2: better


def row_of(text, name):
    """The one line of a table that shows a recipe."""
    rows = [line for line in text.splitlines() if line[2:].lstrip().startswith(f"{name} ") and "of each" not in line]
    return rows[0].split()


def test_rows_are_sorted_fp32_first_then_best_score_first():
    lines = report.table([SMALL, BEATEN, FP32, BEST, DYNAMIC]).splitlines()
    words = [line.removeprefix("PB").removeprefix("P").removeprefix("B").split() for line in lines[3:8]]
    assert [row[0] for row in words] == ["fp32", "ptdq", "ptsq", "ptsq", "ptsq"]
    assert [row[1] for row in words] == ["90.00", "channel", "channel", "group", "tensor"]


def test_a_row_reads_back():
    fast = timed(2.5, granularity="per_tensor", drop=0.05, metrics={"speedup_b16": 1.25})
    text = report.table([FP32, BEST, fast])
    assert row_of(text, "ptsq tensor sym") == [
        "P", "ptsq", "tensor", "sym", "85.00", "+5.00", "+4.80..+5.20", "worse", "99.00",
        "0.00100", "0.250", "4.00", "123", "2.50", "1.25", "32.1",
    ]  # fmt: skip
    assert text.splitlines()[0].endswith("speed-ups are against eager fp32")
    assert "~" not in text


@pytest.mark.parametrize(
    ("cell", "words"),
    [(BEST, "not significant"), (SMALL, "worse"), (DYNAMIC, "better"), (FP32, "")],
    ids=["zero inside", "zero below", "zero above", "fp32"],
)
def test_significance_is_said_in_words(cell, words):
    assert comparison.significance(cell) == words
    assert words in report.table([FP32, cell])


def test_pareto_front_by_hand():
    # DYNAMIC has the best score, BEST is smaller, SMALL the smallest; BEATEN and FP32 are larger and worse than BEST
    assert comparison.pareto([FP32, BEST, SMALL, BEATEN, DYNAMIC]) == [BEST, SMALL, DYNAMIC]


def test_equal_cells_are_both_on_the_front():
    twin = dataclasses.replace(BEST, key="twin")
    assert comparison.pareto([BEST, twin]) == [BEST, twin]


def test_latency_puts_a_cell_on_the_front_only_where_it_is_a_result():
    slow, fast = timed(1.0, drop=0.01), timed(2.0, drop=0.02, size=1100.0)
    assert comparison.pareto([slow, fast]) == [slow, fast]
    reference = dataclasses.replace(fast, details={"latency_is_result": False})
    assert comparison.pareto([slow, reference]) == [slow]


def test_best_of_each_method_is_marked_and_its_equals_are_named():
    near = record("ptsq", "per_group", 0.003, 1100.0)  # interval 0.1..0.5 overlaps that of BEST, -0.1..0.3
    text = report.table([FP32, BEST, near, SMALL, DYNAMIC])
    assert row_of(text, "ptsq channel sym")[0] == "PB"
    assert row_of(text, "ptdq channel sym")[0] == "PB"
    assert row_of(text, "ptsq group sym")[0] == "ptsq"
    assert "best of each method: ptdq channel sym 90.40, ptsq channel sym 89.90* (* not significantly" in text
    assert "do not differ significantly from the best of their method: ptsq 1 of 2." in text
    assert "none is significant" not in text  # -0.6..-0.2 and -0.1..0.3 do not overlap


def test_best_cells_that_do_not_differ_are_said_to_be_so():
    text = report.table([FP32, BEST, record("ptdq", "per_channel", 0.002, 1020.0)])
    assert "differences between the best of the methods: none is significant" in text


def test_reference_latency_is_labelled_and_has_no_speedup():
    slow = by_reference(metrics={"speedup": 0.01, "speedup_b16": 0.02})
    text = report.table([FP32, slow])
    assert "~12.3" in row_of(text, "ptsq channel sym")
    assert "speed-" not in text
    assert "0.01" not in text
    assert "~  reference backend: exact, not fast; its latency is not a result." in text
    assert row_of(text, "fp32")[-3:] == ["12.3", "123", "32.1"]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (by_reference(metrics={"speedup": 0.1}), "reference: exact, not fast"),
        (timed(0.5, method="woq", metrics={"int8_mac_fraction": 0.0}), "weights are dequantized, arithmetic stays"),
        (
            timed(1.5, method="woq", metrics={"int8_mac_fraction": 0.0, "speedup_b16": 0.9}),
            "stays float: compute-bound at batch 16",
        ),
        (timed(0.5, method="ptdq", metrics={"int8_mac_fraction": 1.0}), "a pass over the activations"),
        (timed(0.5, metrics={"int8_mac_fraction": 0.25}), "only 25 % of the multiplications run in int8"),
        (timed(0.5, environment={"vnni": False}), "no int8 instructions"),
        (timed(0.5, environment={"vnni": True}), "small layers"),
    ],
    ids=["reference", "woq", "woq b16", "ptdq", "float part", "no vnni", "small"],
)
def test_a_speedup_below_one_has_its_reason(cell, reason):
    assert reason in (comparison.slow_reason(cell) or "")
    if comparison.latency_counts(cell):
        assert f"slower than fp32: {comparison.recipe_text(cell, {'backend'})}: " in report.table([cell])


def test_a_fast_cell_needs_no_reason():
    assert comparison.slow_reason(timed(1.5, metrics={"speedup_b16": 1.2})) is None


def test_failed_and_skipped_cells_stand_with_their_sentence():
    failed = record(status="failed", error="layer fc cannot run in int8; name it in keep_float", metrics={})
    skipped = record(task="efficientnet_lite0", status="skipped", error="fetch failed", metrics={})
    text = report.table([FP32, failed, skipped])
    assert "failed ptsq channel sym: layer fc cannot run in int8; name it in keep_float" in text
    assert "efficientnet_lite0 (cnn)" in text
    assert "skipped ptsq channel sym: fetch failed" in text
    assert report.one_line(failed).startswith("resnet18 ptsq channel sym: failed: layer fc cannot")


def test_the_widest_table_fits_its_width():
    speed = {"speedup_b16": 1.234, "sqnr_db": 40.0, "int8_mac_fraction": 1.0}
    cells = [
        timed(1.2, drop=0.01 * n, size=1e6 * n, observer="moving_average", activation_scheme="symmetric", metrics=speed)
        for n in range(1, 4)
    ]
    for width in (120, 100):
        text = report.table([FP32, *cells, BEST], width)
        assert max(len(line) for line in text.splitlines()) <= width
    assert "speed-" in report.table([FP32, *cells], 100)  # what can be spared goes first


def test_shared_options_leave_the_rows_and_stand_below():
    text = report.table([timed(2.0), timed(2.0, observer="mse")])
    assert "native" not in row_of(text, "ptsq channel sym mse")
    assert "observer minmax" in text
    assert "backend native." in text.replace("\n   ", " ")


def test_values_that_are_not_an_options_own_are_named():
    asked = Recipe(granularity="per_group", group_size=32, keep_float=("fc",)).canonical()
    assert comparison.recipe_text(record(details={"recipe": asked})) == "ptsq channel sym group_size=32 keep_float=fc"
    assert comparison.recipe_text(record(details={"recipe": Recipe().canonical()})) == "ptsq channel sym"


def test_a_metric_in_its_own_unit_is_not_a_percentage():
    bits = {"score": 1.5, "score_fp32": 1.4, "score_drop": 0.1, "score_drop_ci_low": 0.09, "score_drop_ci_high": 0.11}
    text = report.table([record(metrics=bits, details={"metric": "a_metric_of_the_user"})])
    assert row_of(text, "ptsq channel sym")[4:7] == ["1.5", "+0.1", "+0.09..+0.11"]
    assert "points" not in text.splitlines()[2]


def test_one_line():
    cell = record(drop=0.001, size=11.2e6, metrics={"sqnr_db": 25.04}, notes=["batch_dependent", "disturbed"])
    assert report.one_line(cell) == (
        "resnet18 ptsq channel sym: accuracy 89.90%, drop +0.10 not significant, SQNR 25.0 dB, 11.2 MB, "
        "12.3 ms, batch_dependent, disturbed, 4 s"
    )
    slow = by_reference(metrics={"speedup": 0.01}, notes=["batch_dependent", "disturbed"])
    assert report.one_line(slow).startswith("resnet18 ptsq channel sym ref: accuracy 90.00%")
    assert report.one_line(slow).endswith("~12.3 ms reference, batch_dependent, 4 s")
    assert report.one_line(timed(2.0)).endswith("5.00 ms, 2.00x fp32, 4 s")


def test_notes_are_explained():
    words = ["disturbed", "few_units"]
    text = report.table([FP32, timed(2.0, notes=words), timed(2.0, method="woq", notes=["few_units"])])
    assert "disturbed: ptsq channel sym: its time alone" in text
    assert "few_units: ptsq channel sym, woq channel sym: fewer than 20" in text


def test_notes_on_a_latency_that_is_no_result_are_left_out():
    text = report.table([FP32, by_reference(notes=["disturbed", "one_process", "few_units"])])
    assert "few_units" in text
    assert "disturbed" not in text
    assert "one_process" not in text


def test_no_records_make_no_crash(tmp_path):
    assert report.table([]) == "no records\n"
    report.write_summary([], tmp_path)
    assert (tmp_path / "summary.md").exists()


def test_summary_reads_back(tmp_path):
    failed = record("ptdq", status="failed", error="a | b", metrics={})
    report.write_summary([FP32, by_reference(metrics={"speedup": 0.01}), timed(2.0), failed], tmp_path)
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["fp32", "ptsq", "ptsq", "ptdq"]
    assert float(rows[1]["size_bytes"]) == 1000.0
    assert [row["speedup"] for row in rows] == ["", "", "2.0", ""]
    assert [row["latency_is_result"] for row in rows] == ["True", "False", "True", "True"]
    text = (tmp_path / "summary.md").read_text()
    assert "## resnet18" in text
    assert "- failed ptdq channel sym: a \\| b" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1  # every row has every column
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.csv", "summary.md"]


def test_import_stays_light():
    code = "import qbench.report, qbench.tracking, qbench.tradeoff, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "hydra", "mlflow", "pandas", "matplotlib"} & set(loaded)
