"""Score metrics against hand-made outputs; declarations against the list in the design."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbench.metrics import METRICS, Comparison, ScoreMetric, accuracy, agreement, decisions, declared, fidelity, sqnr_db
from qbench.statistics import clopper_pearson, cluster_bootstrap, mcnemar_p, paired_interval


def outputs_for(classes: list[int], count: int = 3) -> torch.Tensor:
    """Outputs whose largest value lies at the given classes."""
    return torch.eye(count)[torch.tensor(classes)]


def test_every_metric_of_the_design_is_declared_once() -> None:
    assert " ".join(METRICS) == (
        "accuracy fidelity bits_per_char frechet_distance score score_fp32 score_drop score_drop_ci_low "
        "score_drop_ci_high examples agreement sqnr_db psnr_db size_bytes size_ratio latency_ms_median latency_ms_p90 "
        "latency_ms_fp32 speedup speedup_ci_low speedup_ci_high speedup_vs_eager throughput_per_s peak_memory_bytes "
        "int8_mac_fraction quantize_s"
    )
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.direction in ("higher", "lower", "neither")
        assert metric.tolerance >= 0
        assert metric.text


def test_a_batch_suffix_has_the_same_declaration() -> None:
    assert declared("latency_ms_p90_b16") is METRICS["latency_ms_p90"]
    assert declared("speedup_b128") is METRICS["speedup"]
    assert declared("speedup_b") is None
    assert declared("my_own") is None


def test_values_are_shown_with_the_unit_people_read() -> None:
    assert METRICS["accuracy"].show(0.88123) == "88.12 %"
    assert METRICS["size_bytes"].show(11_190_000) == "11.19 MB"
    assert METRICS["speedup"].show(2.5) == "2.50 x"
    assert METRICS["size_ratio"].show(0.2561) == "0.256"
    assert METRICS["latency_ms_median"].show(4.42) == "4.420 ms"


def test_direction_and_tolerance() -> None:
    speedup, size, score = METRICS["speedup"], METRICS["size_bytes"], METRICS["score"]
    assert speedup.worse(1.9, 2.0)
    assert not speedup.worse(2.1, 2.0)
    assert size.worse(101, 100)
    assert not score.worse(0.1, 0.2)  # which way is better, the task's own metric says
    assert speedup.matters(-0.05, 2.0)
    assert not speedup.matters(-0.03, 2.0)  # within 2 % of 2.0
    assert size.matters(1, 100)


@pytest.mark.parametrize("metric", [accuracy(), fidelity()], ids=lambda metric: metric.name)
def test_score_metrics_are_values_and_declared(metric: ScoreMetric) -> None:
    assert metric == type(metric)()
    assert METRICS[metric.name] is metric.declaration
    with pytest.raises(AttributeError):
        metric.threshold = 1  # type: ignore[attr-defined]


def test_decisions_of_equal_outputs_go_to_the_lowest_index() -> None:
    ties = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 2.0]]).repeat(1, 40)
    assert decisions(ties).tolist() == [1, 0, 0]
    assert decisions(ties.to(torch.uint8)).tolist() == [1, 0, 0]
    assert decisions(ties.to(torch.bfloat16)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_refused(value: float) -> None:
    good = torch.zeros(2, 3)
    bad = good.clone()
    bad[1, 2] = value
    for call in (
        lambda: agreement(bad, good),
        lambda: sqnr_db(good, bad),
        lambda: accuracy().compare(good, bad, good[:, 0]),
    ):
        with pytest.raises(ValueError, match="1 of 6 outputs are NaN or infinite"):
            call()


def test_accuracy_by_hand() -> None:
    """12 examples: fp32 has 10 right, the other loses 7 of those and gains 1."""
    targets = torch.zeros(12, dtype=torch.long)
    fp32 = outputs_for([0] * 10 + [1, 1])
    other = outputs_for([1] * 7 + [0] * 3 + [0, 1])
    found = accuracy().compare(other, fp32, targets)
    assert (found.score, found.score_fp32) == (4 / 12, 10 / 12)
    assert found.drop == 6 / 12
    assert (found.ci_low, found.ci_high) == paired_interval(7, 1, 12)
    assert found.p_value == mcnemar_p(7, 1) == pytest.approx(2 * 9 / 256)
    assert (found.significant, found.units, found.test) == (False, 12, "exact McNemar")
    assert found.notes == ("few_units",)
    assert found.metrics(accuracy()) == {
        "accuracy": 4 / 12,
        "score": 4 / 12,
        "score_fp32": 10 / 12,
        "score_drop": 0.5,
        "score_drop_ci_low": found.ci_low,
        "score_drop_ci_high": found.ci_high,
    }


def test_accuracy_needs_targets() -> None:
    with pytest.raises(ValueError, match=r"accuracy needs targets; score .* by qbench\.metrics\.fidelity"):
        accuracy().compare(torch.zeros(2, 3), torch.zeros(2, 3), None)


def test_units_widen_the_interval_of_examples_that_go_together() -> None:
    """30 recordings of 20 windows; those of three are lost together: 60 lost windows are three events, not sixty."""
    targets = torch.zeros(600, dtype=torch.long)
    fp32 = outputs_for([0] * 600)
    other = outputs_for([1] * 60 + [0] * 540)
    units = torch.arange(600) // 20 * 7 + 3  # any numbers name the units
    alone = accuracy().compare(other, fp32, targets)
    together = accuracy().compare(other, fp32, targets, units)
    assert (together.drop, together.units, together.test) == (alone.drop, 30, "cluster bootstrap")
    spread = cluster_bootstrap([20] * 3 + [0] * 27, [20] * 30)
    assert (together.ci_low, together.ci_high, together.p_value) == (spread.low, spread.high, spread.p)
    assert alone.significant
    assert not together.significant
    assert together.notes == ()


def test_a_unit_of_one_example_each_is_no_cluster() -> None:
    targets = torch.zeros(30, dtype=torch.long)
    fp32, other = outputs_for([0] * 30), outputs_for([1] * 9 + [0] * 21)
    metric = accuracy()
    assert metric.compare(other, fp32, targets, torch.randperm(30)) == metric.compare(other, fp32, targets)


def test_several_decisions_in_an_example_are_a_unit() -> None:
    targets = torch.zeros(25, 4, dtype=torch.long)
    fp32 = outputs_for([0] * 100).reshape(25, 4, 3)
    found = accuracy().compare(fp32.flip(-1), fp32, targets)
    assert (found.score, found.score_fp32, found.units) == (0.0, 1.0, 25)
    assert (found.ci_low, found.ci_high) == (1.0, 1.0)


def test_units_must_be_one_an_example() -> None:
    with pytest.raises(ValueError, match="3 units for 2 examples"):
        fidelity().compare(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.arange(3))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=80))
def test_accuracy_agrees_with_itself(examples: list[tuple[int, int, int]]) -> None:
    """A drop has its interval around it, `significant`, p and interval say the same, and swapping turns the sign."""
    targets, fp32, other = (list(column) for column in zip(*examples, strict=True))
    metric, truth = accuracy(), torch.tensor(targets)
    found = metric.compare(outputs_for(other), outputs_for(fp32), truth)
    assert found.ci_low <= found.drop <= found.ci_high
    assert found.significant == (found.p_value < 0.05) == (not found.ci_low <= 0 <= found.ci_high)
    assert found.drop == pytest.approx(found.score_fp32 - found.score)
    back = metric.compare(outputs_for(fp32), outputs_for(other), truth)
    assert (back.drop, back.p_value) == (-found.drop, found.p_value)
    assert (back.ci_low, back.ci_high) == pytest.approx((-found.ci_high, -found.ci_low))


def test_fidelity_by_hand() -> None:
    fp32, other = outputs_for([0] * 50), outputs_for([1] * 2 + [0] * 48)
    found = fidelity().compare(other, fp32)
    low, high = clopper_pearson(2, 50)
    assert found == Comparison(48 / 50, 1.0, 2 / 50, low, high, 0.0, True, 50, "exact binomial")
    assert found.metrics(fidelity())["fidelity"] == agreement(other, fp32) == 0.96


def test_fidelity_of_equal_outputs_is_no_certainty() -> None:
    fp32 = outputs_for([0, 1, 2] * 10)
    found = fidelity().compare(fp32 * 2, fp32)
    assert (found.drop, found.ci_low, found.significant) == (0.0, 0.0, False)
    assert found.ci_high == pytest.approx(1 - 0.025 ** (1 / 30))


@pytest.mark.parametrize("changed", [0, 1, 15, 30])
def test_fidelity_over_units(changed: int) -> None:
    """30 units of 4 examples, one of which changes in some units."""
    other = outputs_for([1, 0, 0, 0] * changed + [0] * 4 * (30 - changed))
    found = fidelity().compare(other, outputs_for([0] * 120), None, torch.arange(120) // 4)
    assert found.units == 30
    assert found.ci_low <= found.drop == changed / 120 <= found.ci_high
    assert found.ci_low >= 0
    assert found.significant == (changed > 0)


def test_sqnr_by_hand() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25 / 0.25 = 100
    assert sqnr_db(reference, -reference) == pytest.approx(-10 * math.log10(4))


def test_sqnr_without_a_value_is_absent() -> None:
    assert sqnr_db(torch.ones(3), torch.ones(3)) is None
    assert sqnr_db(torch.zeros(3), torch.ones(3)) is None
    with pytest.raises(ValueError, match=r"shape \(1,\) against a reference of shape \(3,\)"):
        sqnr_db(torch.ones(3), torch.ones(1))


@given(step=st.floats(1e-4, 1e-2))
def test_sqnr_of_a_uniform_grid_is_that_of_the_textbook(step: float) -> None:
    """Rounding to a grid of step s leaves a noise power of s^2/12."""
    values = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 20_000))
    expected = 10 * math.log10((1 / 3) / (step**2 / 12))
    assert sqnr_db(values, torch.round(values / step) * step) == pytest.approx(expected, abs=0.2)
