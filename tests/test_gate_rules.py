"""The gate's rules as pure functions: limits, evidence of scores, the statistics of speed, one verdict a metric."""

import base64
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench import evidence
from qbench.frechet import frechet_distance
from qbench.gate import place, report, speed, verdict
from qbench.gate.baseline import Baseline, BaselineError, file_name, read
from qbench.gate.judge import absolute, judge
from qbench.gate.judge_speed import corrected, placed, speed_tests
from qbench.gate.limits import for_cell, parse
from qbench.metrics import accuracy, bits_per_char, fidelity

NAME = "ci_lstm[ptdq-per_channel-symmetric]"


def hits(*values: int) -> dict[str, object]:
    return evidence.hits(np.array(values, dtype=bool), np.arange(len(values)))


def baseline(**changes: object) -> Baseline:
    """A cell of 1,000 examples, 5 processes at twice the speed of fp32."""
    right = np.ones(1000, dtype=bool)
    right[:200] = False
    fields = {
        "name": NAME,
        "sweep": "ci",
        "method": "ptdq",
        "score": "accuracy",
        "metrics": {"score": 0.8, "size_bytes": 1000.0, "int8_mac_fraction": 1.0, "peak_memory_bytes": 30e6},
        "speeds": {"speedup": [math.log(2.0) + d for d in (-0.01, -0.005, 0.0, 0.005, 0.01)]},
        "milliseconds": {"speedup": {"cell": [1.0] * 5, "fp32": [2.0] * 5}},
        "evidence": evidence.hits(right, np.arange(1000)),
        "hashes": {"program_sha256": "p", "model_sha256": "m", "outputs_sha256": "o"},
        "tensors": {"conv.weight": "aa", "fc.weight": "bb"},
        "float_ops": [],
        "inputs": {"recipe": {"method": "ptdq"}, "fp32 weights": "w", "data": "d"},
        "machine": {"cpu": "one", "cpu_flags": ["avx2"]},
        "revision": "abc",
        "taken": "2026-01-01T00:00:00+00:00",
    }
    return Baseline(**{**fields, **changes})


def judged(before, now, *limits: str, **options: object) -> dict[str, verdict.Verdict]:
    """By metric, the verdicts of a run of this one cell."""
    own = for_cell([parse(text) for text in limits], NAME)
    tests = corrected(speed_tests(before, now, own)) if isinstance(before, Baseline) else {}
    said = judge(before, now, own, tests, bool(options.get("disturbed")))
    return {v.metric: v for v in said}


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["speedup=5%", "score=0.5", "speedup>=1.5", "score_drop<=0.5", "checksum=off"])
def test_a_limit_reads_as_it_is_written(text):
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("speedup", "write metric=2%"),
        ("speed=2%", "no metric 'speed'"),
        ("speedup>=5%", "is absolute"),
        ("speedup=0.1", "is a share"),
        ("score=-1", "not negative"),
        ("score=1.2.3", "is no number"),
        ("checksum=1%", "equal or not"),
    ],
)
def test_a_wrong_limit_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_the_last_limit_that_covers_a_cell_counts():
    limits = [parse(text) for text in ("speedup=2%", "ci_lstm[*:speedup=7%", "ci_gan*:speedup=9%", "score=1")]
    found = for_cell(limits, NAME)
    assert {name: str(limit) for name, limit in found.items()} == {"speedup": "speedup=7%", "score": "score=1"}


# --- evidence --------------------------------------------------------------------------------------------------------


def test_accuracy_keeps_a_bit_an_example_and_compares_as_the_metric_does():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (3001,), generator=generator)
    before, now = (torch.randn(3001, 4, generator=generator) for _ in range(2))
    kept = [accuracy().evidence(side, before, targets) for side in (before, now)]
    assert len(base64.b64decode(kept[0]["bits"])) == 376
    found, own = evidence.change(*kept, "higher"), accuracy().compare(now, before, targets)
    assert (found.drop, found.low, found.high, found.p) == (own.drop, own.ci_low, own.ci_high, own.p_value)


def test_fidelity_keeps_which_decisions_are_those_of_fp32():
    fp32 = torch.eye(4)
    assert (
        evidence.change(
            fidelity().evidence(fp32, fp32, None), fidelity().evidence(fp32.roll(1, 0), fp32, None), "higher"
        ).drop
        == 1.0
    )


def test_units_keep_sums_and_compare_as_the_metric_does():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 9, (40, 5), generator=generator)
    units = torch.arange(40) % 25
    before, now = (torch.randn(40, 5, 9, generator=generator) for _ in range(2))
    for metric in (bits_per_char(), accuracy()):
        kept = [metric.evidence(side, before, targets, units) for side in (before, now)]
        assert len(kept[0]["sums"]) == 25
        found = evidence.change(*kept, metric.declaration.direction)
        own = metric.compare(now, before, targets, units)
        assert (found.drop, found.low, found.high) == pytest.approx((own.drop, own.ci_low, own.ci_high))


def test_the_frechet_distance_keeps_itself_without_each_unit():
    generator = torch.Generator().manual_seed(2)
    real, before, now = (torch.randn(60, 3, generator=generator) + shift for shift in (0.0, 0.1, 0.3))
    units = torch.arange(60) % 6
    kept = [frechet_distance().evidence(side, before, real, units) for side in (before, now)]
    found = evidence.change(*kept, "lower")
    own = frechet_distance().compare(now, before, real, units)
    assert (found.drop, found.low, found.high) == pytest.approx((own.drop, own.ci_low, own.ci_high))


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (hits(1, 0), hits(1, 0, 1), "not the same examples"),
        (hits(1, 0), {"kind": "sums", "sums": [1.0], "counts": [2]}, "cannot be compared"),
        ({"kind": "eval"}, {"kind": "eval"}, "cannot be compared"),
        (hits(1), {"kind": "hits", "count": 1, "bits": "!"}, "damaged"),
        (hits(1), {"kind": "hits", "count": 10**9, "bits": ""}, "damaged"),
        (hits(1), {"kind": "hits"}, "damaged"),
        ({"kind": "sums", "sums": [math.nan], "counts": [1]}, {"kind": "sums", "sums": [1], "counts": [1]}, "damaged"),
        (
            {"kind": "sums", "sums": [1, 1], "counts": [1, 1]},
            {"kind": "sums", "sums": [1, 1], "counts": [1, 2]},
            "units",
        ),
    ],
)
def test_evidence_that_cannot_be_compared_says_why(before, now, why):
    with pytest.raises(ValueError, match=why):
        evidence.change(before, now, "higher")


# --- speed -----------------------------------------------------------------------------------------------------------


def test_the_change_is_the_two_sample_test_where_fp32_keeps_its_time():
    from scipy import stats

    before, now = [0.70, 0.68, 0.71, 0.69, 0.72], [0.60, 0.66, 0.63]
    found = speed.change(before, now, [0.5] * 5, [0.5] * 3)
    expected = stats.ttest_ind(before, now)
    assert found.p == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval()
    assert [found.estimate - found.reach(), found.estimate + found.reach()] == pytest.approx([ends.low, ends.high])


def test_the_change_is_taken_at_equal_times_of_fp32():
    """Least squares on side and time of fp32: the coefficient of the side, its error, the degrees of freedom."""
    draw = np.random.default_rng(0)
    times = [draw.normal(1.0, 0.1, 12), draw.normal(1.2, 0.1, 9)]
    values = [0.5 + 0.6 * times[0] + draw.normal(0, 0.02, 12), 0.45 + 0.6 * times[1] + draw.normal(0, 0.02, 9)]
    found = speed.change(*(list(map(float, side)) for side in (*values, *times)))
    design = np.column_stack([np.ones(21), np.repeat([1.0, 0.0], [12, 9]), np.concatenate(times)])
    answers, rest, *_ = np.linalg.lstsq(design, np.concatenate(values), rcond=None)
    error = math.sqrt(rest[0] / 18 * np.linalg.inv(design.T @ design)[1, 1])
    assert [found.estimate, found.error, found.df] == pytest.approx([answers[1], error, 18.0])
    assert abs(found.estimate - 0.05) < 0.03 < abs(values[0].mean() - values[1].mean())
    with pytest.raises(ValueError, match="two a side"):
        speed.change([0.5], [0.5, 0.6], [1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="zip"):
        speed.change([0.5, 0.6], [0.5, 0.6], [1.0], [1.0, 1.0])


def test_sides_in_turns_are_compared_in_pairs():
    """What drifts reaches both of a pair: 5 % are plain to see although both sides vary by 20 %."""
    from scipy import stats

    before = [0.70, 0.50, 0.90, 0.60]
    now = [value - change for value, change in zip(before, (0.04, 0.06, 0.05, 0.05), strict=True)]
    steady = [0.0] * 4, [0.0] * 4
    found = speed.paired_change(before, now, *steady)
    assert found.p == pytest.approx(stats.ttest_rel(before, now).pvalue)
    alone = speed.change(before, now, *steady)
    assert (speed.verdict(found, 0.05), speed.verdict(alone, 0.05)) == ("worse", "inconclusive")
    with pytest.raises(ValueError, match="as many a side"):
        speed.paired_change(before, now[1:], *steady)


def test_pairs_are_compared_where_fp32_does_not_differ():
    """Least squares of the differences on those of fp32: the constant, its error; from five pairs on."""
    from scipy import stats

    draw = np.random.default_rng(1)
    times = [draw.normal(1.0, 0.1, 10), draw.normal(1.0, 0.1, 10)]
    values = [0.5 + 0.6 * times[0] + draw.normal(0, 0.01, 10), 0.45 + 0.6 * times[1] + draw.normal(0, 0.01, 10)]
    sides = [list(map(float, side)) for side in (*values, *times)]
    found = speed.paired_change(*sides)
    line = stats.linregress(times[0] - times[1], values[0] - values[1])
    assert [found.estimate, found.error, found.df] == pytest.approx([line.intercept, line.intercept_stderr, 8.0])
    few = speed.paired_change(*(side[:4] for side in sides))
    assert few.p == pytest.approx(stats.ttest_rel(values[0][:4], values[1][:4]).pvalue)


def test_holm_steps_down_and_stops():
    levels = speed.holm({"a": 0.001, "b": 0.02, "c": 0.03, "d": 0.9})
    assert levels == pytest.approx({"a": 0.03 / 4, "b": 0.03 / 3, "c": 0.03 / 3, "d": 0.03 / 3})


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_holm_rejects_what_the_textbook_rejects(p_values):
    levels = speed.holm(dict(enumerate(p_values)))
    mine = {i for i, p in enumerate(p_values) if p < levels[i]}
    theirs, order = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    for passed, i in enumerate(order):
        if p_values[i] >= speed.LEVEL / (len(p_values) - passed):
            break
        theirs.add(i)
    assert mine == theirs


@pytest.mark.parametrize(
    ("estimate", "error", "word"),
    [
        (0.05, 0.005, "worse"),
        (-0.05, 0.005, "better"),
        (0.015, 0.002, "ok"),  # significant, smaller than what matters
        (0.025, 0.0095, "not significant"),
        (0.03, 0.02, "inconclusive"),
        (0.0, 0.02, "inconclusive"),
    ],
)
def test_a_change_of_speed_has_a_word(estimate, error, word):
    assert speed.verdict(speed.SpeedChange(estimate, error, 30.0), 0.01) == word


def test_unchanged_speed_is_seldom_called_changed():
    """Eleven cells, 5 processes a side of 3 % (standard deviation): 400 runs without the second measurement."""
    draw = random.Random(0).gauss
    alarms = 0
    for _ in range(400):
        changes = {i: speed.change(*([draw(0, 0.03) for _ in range(5)] for _ in range(4))) for i in range(11)}
        levels = speed.holm({i: change.p for i, change in changes.items()})
        alarms += any(speed.verdict(changes[i], levels[i]) in ("worse", "better") for i in changes)
    assert alarms <= 32  # 5 % of 400 are 20; more than 32 have a chance of 0.3 %


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_the_same_again_is_ok():
    found = judged(baseline(), baseline())
    assert {v.word for v in found.values()} == {"ok"}
    assert set(found) == {"score", "size_bytes", "int8_mac_fraction", "checksum", "speedup", "peak_memory_bytes"}


def test_one_byte_more_is_worse_one_less_is_better():
    metrics = baseline().metrics
    for size, word in (1001.0, "worse"), (999.0, "better"):
        found = judged(baseline(), baseline(metrics={**metrics, "size_bytes": size}))["size_bytes"]
        assert found.word == word
        assert f"{size - 1000:+.0f} bytes" in found.sentence


def test_a_loss_of_accuracy_is_worse_when_it_is_significant_and_matters():
    def with_lost(lost: int, gained: int = 0) -> Baseline:
        right = np.ones(1000, dtype=bool)
        right[gained:200] = False
        right[200 : 200 + lost] = False
        metrics = {**baseline().metrics, "score": right.mean().item()}
        return baseline(evidence=evidence.hits(right, np.arange(1000)), metrics=metrics)

    assert judged(baseline(), with_lost(8))["score"].word == "worse"
    assert judged(baseline(), with_lost(8), "score=1")["score"].word == "ok"
    assert judged(baseline(), with_lost(5))["score"].word == "not significant"
    assert judged(baseline(), with_lost(2))["score"].word == "ok"
    assert judged(baseline(), with_lost(0, gained=9))["score"].word == "better"
    sentence = judged(baseline(), with_lost(8))["score"].sentence
    assert sentence.startswith("accuracy 80.00 % -> 79.20 %: drop +0.8 (")
    assert "0.3 matter; exact McNemar, p = 0.0078" in sentence


def test_a_layer_back_in_float_is_worse_and_named():
    now = baseline(metrics={**baseline().metrics, "int8_mac_fraction": 0.9}, float_ops=["fc: linear"])
    found = judged(baseline(), now)["int8_mac_fraction"]
    assert found.word == "worse"
    assert found.sentence == "100.00 % -> 90.00 %; now in float: fc: linear"


@pytest.mark.parametrize(
    ("hashes", "tensors", "text"),
    [
        (
            {"model_sha256": "x", "outputs_sha256": "y"},
            {"fc.weight": "cc"},
            "1 of 2 tensors changed, first fc.weight, the outputs",
        ),
        ({"outputs_sha256": "y"}, {}, "the outputs changed although the saved model did not: a kernel"),
        ({"program_sha256": "x", "model_sha256": "x"}, {}, "the program changed"),
    ],
)
def test_other_outputs_from_equal_inputs_are_changed_and_the_place_is_named(hashes, tensors, text):
    first = baseline()
    now = baseline(hashes={**first.hashes, **hashes}, tensors={**first.tensors, **tensors})
    found = judged(first, now)["checksum"]
    assert found.word == "changed"
    assert text in found.sentence
    assert "checksum" not in judged(first, now, "checksum=off")
    assert judged(baseline(method="qat"), dataclasses.replace(now, method="qat"))["checksum"].word == "ok"


def test_peak_memory_has_two_percent_or_half_a_mebibyte():
    metrics = baseline().metrics

    def word(before: float, now: float) -> str:
        sides = (baseline(metrics={**metrics, "peak_memory_bytes": value}) for value in (before, now))
        return judged(*sides)["peak_memory_bytes"].word

    assert word(50e6, 50.9e6) == "ok"
    assert word(50e6, 51.1e6) == "worse"
    assert word(5e6, 5.5e6) == "ok"
    assert word(5e6, 5.6e6) == "worse"


def test_slower_is_worse_with_the_figures_and_a_moved_fp32_is_named():
    slow = [math.log(2.0 / 1.12) + d for d in (-0.01, -0.005, 0.0, 0.005, 0.01)]
    now = baseline(speeds={"speedup": slow}, milliseconds={"speedup": {"cell": [1.12] * 5, "fp32": [2.0] * 5}})
    found = judged(baseline(), now)["speedup"]
    assert found.word == "worse"
    assert found.sentence.startswith("12.0 % slower than the baseline (+10.7 to +13.3 %, 8 % matter): 2x fp32 -> 1.79x")
    assert found.sentence.endswith("int8 1 -> 1.12 ms, fp32 2 -> 2 ms")
    moved = dataclasses.replace(now, milliseconds={"speedup": {"cell": [1.0] * 5, "fp32": [1.786] * 5}})
    assert "it is fp32 that moved, by -10.7 %, the cell by +0.0 %" in judged(baseline(), moved)["speedup"].sentence
    assert judged(baseline(), now, "speedup=15%")["speedup"].word == "ok"


def test_a_slow_down_is_placed_where_an_operation_lost_more_than_the_machine():
    before = {"conv1": 1.0, "conv2": 2.0, "relu": 0.01, "gone": 1.0}
    now = {"conv1": 1.1, "conv2": 3.2, "relu": 0.02, "new": 1.0}
    assert place.slower(before, now, drift=1.1) == "conv2 2 -> 3.2 ms"
    assert place.slower(before, now) == "conv2 2 -> 3.2 ms"  # what conv1 lost is below a tenth of it all
    assert place.slower(before, {"conv1": 1.2, "conv2": 2.4}) == "conv2 2 -> 2.4 ms, conv1 1 -> 1.2 ms"
    assert place.slower(before, {"conv1": 1.2, "conv2": 2.4}, drift=1.2) == ""
    assert place.slower(before, {"conv1": 1.0, "conv2": 2.0}, drift=0.8) == ""  # it is fp32 that moved
    assert place.slower({}, now) == ""
    slow = [math.log(2.0 / 1.12) + d for d in (-0.01, -0.005, 0.0, 0.005, 0.01)]
    sides = baseline(operations=before), baseline(speeds={"speedup": slow}, operations=now)
    said = placed(judged(*sides)["speedup"], *sides)
    assert said.word == "worse"
    assert said.sentence.endswith("; likely place: conv2 2 -> 3.2 ms")


def test_a_wide_interval_is_inconclusive_or_disturbed():
    wide = baseline(speeds={"speedup": [0.5, 0.6, 0.7, 0.8, 0.9]})
    assert judged(baseline(), wide)["speedup"].word == "inconclusive"
    assert judged(baseline(), wide, disturbed=True)["speedup"].word == "disturbed"
    assert not judged(baseline(), wide)["speedup"].red()
    assert judged(baseline(), wide)["speedup"].red(strict=True)


def test_another_machine_compares_neither_speed_nor_checksum():
    now = baseline(machine={"cpu": "two", "cpu_flags": ["avx2"]}, hashes={"outputs_sha256": "other"})
    found = judged(baseline(), now)
    assert {m: v.word for m, v in found.items() if v.word != "ok"} == dict.fromkeys(
        ("speedup", "checksum", "peak_memory_bytes"), "foreign machine"
    )
    assert "cpu one -> two" in found["speedup"].sentence


def test_changed_inputs_are_stale_and_named():
    now = baseline(inputs={**baseline().inputs, "data": "other"})
    assert {m: v.word for m, v in judged(baseline(), now).items()} == {"inputs": "stale"}
    assert "its data changed" in judged(baseline(), now)["inputs"].sentence


def test_what_is_gone_is_missed():
    metrics = {name: value for name, value in baseline().metrics.items() if name != "peak_memory_bytes"}
    assert judged(baseline(), baseline(metrics=metrics))["peak_memory_bytes"].word == "vanished metric"
    assert judged(baseline(), baseline(speeds={}))["speedup"].word == "vanished metric"
    assert judged(None, baseline())["baseline"].word == "missing baseline"
    assert judged(BaselineError("x.json: damaged"), baseline())["baseline"].word == "stale"


def test_an_absolute_limit_is_beyond_when_the_whole_interval_is():
    metrics = {**baseline().metrics, "speedup": 1.4, "speedup_ci_low": 1.3, "speedup_ci_high": 1.45}
    now = baseline(metrics=metrics)
    assert absolute(now, for_cell([parse("speedup>=1.5")], NAME))[0].word == "beyond limit"
    assert absolute(now, for_cell([parse("speedup>=1.42")], NAME))[0].word == "not significant"
    assert absolute(now, for_cell([parse("size_bytes<=1000")], NAME))[0].word == "ok"
    assert absolute(now, for_cell([parse("psnr_db>=20")], NAME))[0].word == "vanished metric"


# --- baselines -------------------------------------------------------------------------------------------------------


def test_a_baseline_is_sorted_json_and_keeps_the_first_and_the_last(tmp_path):
    path = tmp_path / file_name(NAME)
    current = baseline(metrics={"size_bytes": 0.0})
    for size in range(1, 40):
        current = baseline(metrics={"size_bytes": float(size)}).after(current)
    current.write(path)
    assert read(path) == current
    sizes = [entry["metrics"]["size_bytes"] for entry in current.history]
    assert sizes == [0.0, *(float(size) for size in range(19, 39))]
    assert path.name == "ci_lstm[ptdq-per_channel-symmetric].json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"size_bytes": 1000.0', '"size_bytes": NaN'),
        lambda text: text.replace('"size_bytes": 1000.0', '"size_bytes": "x"'),
        lambda text: text.replace('"schema": 2', '"schema": 1'),
        lambda text: text.replace('"score": "accuracy"', '"score": 3'),
        lambda text: text.replace('"taken"', '"token"'),
        lambda text: text.replace("    1.0,\n", "", 1),  # a process without its time
    ],
)
def test_a_damaged_baseline_names_the_file_and_the_cure(tmp_path, damage):
    path = tmp_path / "x.json"
    baseline().write(path)
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    with pytest.raises(BaselineError, match=r"x\.json: .*; restore it from git"):
        read(path)


def test_no_baseline_is_written_with_a_value_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        baseline(metrics={"score": math.nan}).write(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


# --- what people read ------------------------------------------------------------------------------------------------


def test_the_text_of_a_red_test_says_what_and_how_to_go_on():
    outcome = verdict.Outcome(NAME, [verdict.Verdict("size_bytes", "worse", "1 -> 2 bytes")], "python -m qbench x", "f")
    text = report.failure(outcome)
    assert text.splitlines() == [
        f"{NAME}: worse",
        "  size_bytes  worse: 1 -> 2 bytes",
        "  alone:    python -m qbench x",
        "  measured: f",
        "  if meant: pytest --qbench --qbench-update=all -k 'ci_lstm[ptdq-per_channel-symmetric]'",
    ]
    beside = report.failure(dataclasses.replace(outcome, beside=True))
    assert beside.splitlines() == text.splitlines()[:-1]  # a revision is no baseline to accept another for


def test_the_comment_has_the_changed_cells_only():
    changed = verdict.Outcome(
        "a", [verdict.Verdict("size_bytes", "better", "2 | 1"), verdict.Verdict("score", "ok", "x")]
    )
    text = report.as_markdown([changed, verdict.Outcome("b", [verdict.Verdict("score", "ok", "x")])], ["c.json"])
    assert text.splitlines()[2:] == [
        "| cell | verdict | metric | |",
        "|---|---|---|---|",
        "| `a` | better | size_bytes | 2 / 1 |",
        "",
        "1 of 2 cells: no change that matters.",
        "Orphan baseline: `c.json`",
    ]
