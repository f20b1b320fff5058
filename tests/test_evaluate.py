"""Preparing a task and scoring a cell, on a task small enough to follow by hand."""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from qbench import bfloat16, evaluate, methods, trained_models
from qbench.config import RECIPE_VALUES
from qbench.identity import sha256_of
from qbench.measure import Measure
from qbench.recipe import AXES, Recipe
from qbench.saved import load
from qbench.task import TaskUnavailable

TASK = '''
"""A task of which every tensor is known: 4 classes, 120 evaluation examples, a third of the labels wrong."""
import torch
from torch import nn

from qbench.metrics import accuracy
from qbench.task import Examples, Task, TaskUnavailable

TRAINED = []


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, width, 3), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


def images(count, seed):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def build(width=8, trains=True, fault=None):
    if fault == "unavailable":
        raise TaskUnavailable("skipped, fetch failed: no network")

    def network():
        torch.manual_seed(0)
        return Net(width)

    def train(net, say):
        TRAINED.append(width)
        say("one step")
        with torch.no_grad():
            net.head.weight.mul_(20)
            if fault == "nan":
                net.head.weight[0, 0] = float("nan")

    def labels():
        with torch.no_grad():
            net = network()
            net.head.weight.mul_(20)
            guesses = net.eval()(images(120, 2)).argmax(1)
        return torch.where(torch.arange(120) % 3 == 0, (guesses + 1) % 4, guesses)

    return Task(
        name="known",
        family="cnn",
        metric=accuracy(),
        build=network,
        train=train if trains else None,
        calibration=lambda: [(images(10, 1),), (images(6, 3),)],
        fine_tuning=lambda: [(images(90, 4),)],
        evaluation=lambda: Examples((images(120, 2),), labels()),
    )
'''


@pytest.fixture(scope="module", autouse=True)
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "known_task.py").write_text(TASK)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["known_task"]


def config(**options):
    return {"_target_": "known_task.build", **options}


def recipe_config(recipe):
    """What a composed configuration holds of a recipe."""
    targets = {
        axis: {"_target_": f"{AXES[axis].__name__}.{type(chosen).__name__}", **dataclasses.asdict(chosen)}
        for axis in AXES
        for chosen in [getattr(recipe, axis)]
    }
    return targets | {name: getattr(recipe, name) for name in RECIPE_VALUES}


MEASURE = {"_target_": "qbench.measure.Measure", "eval_batch": 50, "figures": False}
assert Measure.of(MEASURE).eval_batch == 50


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def prepared(cache):
    return evaluate.prepare(config(), cache, quiet)


def trained():
    return len(sys.modules["known_task"].TRAINED)


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_the_first_time_trains_and_says_so(tmp_path):
    said = []
    found = evaluate.prepare(config(), str(tmp_path), said.append)
    assert {key: found[key] for key in ("name", "family", "metric")} == {
        "name": "known",
        "family": "cnn",
        "metric": "accuracy",
    }
    assert said[:2] == ["known: training, once", "one step"]
    assert any(text.startswith("known: fp32 outputs of 120 examples") for text in said)
    (folder,) = tmp_path.iterdir()
    assert found["folder"] == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "fp32_outputs.safetensors",
        "identity.json",
        "weights.safetensors",
        "weights.sha256",
    ]
    assert json.loads(json.dumps(found)) == found


def test_the_second_time_reads_what_the_first_one_left(prepared, cache):
    before = trained()
    said = []
    assert evaluate.prepare(config(), cache, said.append) == prepared
    assert trained() == before
    assert said == []


def test_training_again_gives_the_same_weights_elsewhere(prepared, tmp_path):
    again = evaluate.prepare(config(), str(tmp_path), quiet)
    assert {**again, "folder": ""} == {**prepared, "folder": ""}


def test_another_option_is_another_entry_of_the_cache(prepared, cache):
    other = evaluate.prepare(config(width=5), cache, quiet)
    assert other["folder"] != prepared["folder"]
    assert other["weights_sha256"] != prepared["weights_sha256"]
    assert other["data_sha256"] != prepared["data_sha256"]  # its labels are those of another network


def test_another_source_is_another_entry_of_the_cache(prepared, cache, task_folder):
    source = task_folder / "known_task.py"
    source.write_text(TASK + "\n# edited\n")
    try:
        assert evaluate.prepare(config(), cache, quiet)["folder"] != prepared["folder"]
    finally:
        source.write_text(TASK)


def test_a_task_that_does_not_train_has_no_checkpoint(tmp_path):
    found = evaluate.prepare(config(trains=False), str(tmp_path), quiet)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "weights.safetensors").exists()
    assert evaluate.prepare(config(trains=False), str(tmp_path), quiet) == found


def test_a_task_that_cannot_be_had_keeps_its_own_word(tmp_path):
    with pytest.raises(TaskUnavailable, match=r"^skipped, fetch failed: no network$"):
        evaluate.prepare(config(fault="unavailable"), str(tmp_path), quiet)


DAMAGES = {
    "a flipped bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "something else": lambda data: b"not a checkpoint" * 100,
}


@pytest.mark.parametrize(
    ("damage", "signed"), [*((damage, False) for damage in DAMAGES), ("cut", True), ("empty", True)]
)
def test_a_damaged_checkpoint_names_the_folder_to_delete(tmp_path, damage, signed):
    """Even when the hash beside it was made to fit."""
    folder = tmp_path / "cache"
    evaluate.prepare(config(), str(folder), quiet)
    (checkpoint,) = folder.glob("*/weights.safetensors")
    data = DAMAGES[damage](checkpoint.read_bytes())
    checkpoint.write_bytes(data)
    if signed:
        checkpoint.with_name("weights.sha256").write_text(hashlib.sha256(data).hexdigest())
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete the folder .* to make it again$") as caught:
        evaluate.prepare(config(), str(folder), quiet)
    assert str(checkpoint.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_names_the_folder_too(tmp_path):
    found = [evaluate.prepare(config(width=width), str(tmp_path), quiet)["folder"] for width in (5, 6)]
    for name in ("weights.safetensors", "weights.sha256"):
        (tmp_path / found[0] / name).write_bytes((tmp_path / found[1] / name).read_bytes())
    with pytest.raises(ValueError, match=r"is of another network; delete the folder .* to make it again$") as caught:
        evaluate.prepare(config(width=5), str(tmp_path), quiet)
    assert "\n" not in str(caught.value)


def test_a_cell_whose_checkpoint_is_gone_says_what_to_do(tmp_path):
    found = evaluate.prepare(config(), str(tmp_path), quiet)
    (checkpoint,) = tmp_path.glob("*/weights.safetensors")
    checkpoint.unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing; run the sweep again to train known$"):
        evaluate.fp32_model(config(), found)


def test_training_that_is_killed_while_it_is_stored_starts_again(tmp_path):
    """The hash is written before the checkpoint that it stands for: without one a checkpoint is damaged for good."""
    evaluate.prepare(config(), str(tmp_path), quiet)
    (checkpoint,) = tmp_path.glob("*/weights.safetensors")
    assert checkpoint.with_name("weights.sha256").stat().st_mtime_ns <= checkpoint.stat().st_mtime_ns
    checkpoint.unlink()
    before = trained()
    evaluate.prepare(config(), str(tmp_path), quiet)
    assert trained() == before + 1


def test_fp32_outputs_that_are_gone_are_taken_again(tmp_path):
    first = evaluate.prepare(config(), str(tmp_path), quiet)
    (outputs,) = tmp_path.glob("*/fp32_outputs.safetensors")
    content = outputs.read_bytes()
    outputs.unlink()
    before = trained()
    assert evaluate.prepare(config(), str(tmp_path), quiet) == first
    assert outputs.read_bytes() == content
    assert trained() == before


def test_the_batch_for_timing_repeats_the_calibration_examples(prepared):
    task = sys.modules["known_task"]
    sixteen = torch.cat([task.images(10, 1), task.images(6, 3)])
    (batch,) = evaluate.example_batch(config(), prepared, 40)
    assert torch.equal(batch, sixteen.repeat(3, 1, 1, 1)[:40])
    assert torch.equal(evaluate.example_batch(config(), prepared, 3)[0], sixteen[:3])


# --- evaluate --------------------------------------------------------------------------------------------------------


def cell(prepared, folder, recipe, task=None, **measure):
    return evaluate.evaluate(
        task or config(), prepared, recipe_config(recipe), {**MEASURE, **measure}, str(folder), quiet
    )


@pytest.mark.parametrize("method", ["woq", "ptdq", "ptsq", "qat"])
def test_the_metrics_of_a_cell_by_hand(prepared, tmp_path, method):
    found = cell(prepared, tmp_path, Recipe(method))
    metrics = found["metrics"]
    task = sys.modules["known_task"].build()
    examples = task.evaluation()
    outputs = load(tmp_path / "model.qb")(*examples.inputs)
    fp32 = evaluate.fp32_model(config(), prepared)(*examples.inputs)
    score, score_fp32 = (float((o.argmax(1) == examples.targets).double().mean()) for o in (outputs, fp32))
    assert score_fp32 == pytest.approx(2 / 3)  # a third of the labels is wrong
    assert (metrics["score"], metrics["accuracy"]) == (pytest.approx(score), pytest.approx(score))
    assert metrics["score_fp32"] == pytest.approx(score_fp32)
    assert metrics["score_drop"] == pytest.approx(score_fp32 - score)
    assert metrics["score_drop_ci_low"] <= metrics["score_drop"] <= metrics["score_drop_ci_high"]
    assert metrics["agreement"] == pytest.approx(float((outputs.argmax(1) == fp32.argmax(1)).double().mean()))
    noise = 10 * torch.log10(fp32.double().square().sum() / (outputs - fp32).double().square().sum())
    assert metrics["sqnr_db"] == pytest.approx(float(noise))
    assert metrics["examples"] == 120
    assert metrics["size_bytes"] == (tmp_path / "model.qb").stat().st_size
    assert metrics["int8_mac_fraction"] == (0.0 if method == "woq" else 1.0)
    assert metrics["quantize_s"] > 0
    assert found["granularity_effective"] == "per_channel"
    assert json.loads(json.dumps(found)) == found


def test_the_fp32_cell_is_the_measure_of_itself(prepared, tmp_path):
    metrics = cell(prepared, tmp_path, Recipe("fp32"))["metrics"]
    assert (metrics["score_drop"], metrics["agreement"], metrics["size_ratio"]) == (0, 1, 1)
    assert metrics["int8_mac_fraction"] == 0.0
    assert "sqnr_db" not in metrics or metrics["sqnr_db"] > 100  # no noise, or that of rounding


def test_fewer_examples_are_the_first_ones(prepared, tmp_path):
    found = cell(prepared, tmp_path, Recipe(), examples=30)["metrics"]
    examples = sys.modules["known_task"].build().evaluation().first(30)
    outputs = load(tmp_path / "model.qb")(*examples.inputs)
    assert found["examples"] == 30
    assert found["score"] == pytest.approx(float((outputs.argmax(1) == examples.targets).double().mean()))


def test_the_record_of_a_trained_cell_tells_how(prepared, tmp_path):
    recipe = Recipe(methods.qat(steps=6))
    found = cell(prepared, tmp_path, recipe, figures=True)
    told = found["details"]["fine_tuning"]
    assert told["steps"] == len(told["losses"]) == 6
    assert 0 < told["relative_weight_change"] < 0.1
    assert (tmp_path / "fine_tuning.png").read_bytes().startswith(b"\x89PNG")
    assert "fine_tuning" not in cell(prepared, tmp_path, Recipe())["details"]


def test_a_model_is_trained_once_and_kept(prepared, tmp_path):
    recipe = Recipe(methods.qat(steps=3))
    first, again = (cell(prepared, tmp_path / name, recipe) for name in ("first", "again"))
    told = [found["details"]["fine_tuning"] for found in (first, again)]
    assert [one.pop("from_cache") for one in told] == [False, True]
    assert told[0] == told[1]
    assert first["metrics"] == again["metrics"]  # quantize_s too: that of the training
    assert first["details"]["model_sha256"] == again["details"]["model_sha256"]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(".qb", lambda old: old[:-9]), (".json", lambda old: old[:-9]), (".json", None)],
    ids=["model", "voucher", "lost"],
)
def test_a_damaged_or_lost_model_is_trained_again(suffix, damage, prepared, tmp_path):
    recipe = Recipe(methods.qat(steps=4))
    cell(prepared, tmp_path, recipe)
    (file,) = Path(prepared["folder"]).glob(f"qat-{sha256_of(recipe.canonical())[:16]}{suffix}")
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert not cell(prepared, tmp_path, recipe)["details"]["fine_tuning"]["from_cache"]
    assert cell(prepared, tmp_path, recipe)["details"]["fine_tuning"]["from_cache"]


def test_other_weights_or_sources_train_again(prepared, tmp_path, monkeypatch):
    recipe = Recipe(methods.qat(steps=5))
    cell(prepared, tmp_path, recipe)
    other = {**prepared, "weights_sha256": "0" * 64}
    assert not cell(other, tmp_path, recipe)["details"]["fine_tuning"]["from_cache"]
    monkeypatch.setattr(trained_models, "sources_hash", lambda *modules: "other")
    assert not cell(other, tmp_path, recipe)["details"]["fine_tuning"]["from_cache"]


def test_a_cell_that_trains_says_how_far_it_is(prepared, tmp_path):
    said = []
    recipe = recipe_config(Recipe(methods.qat(steps=2)))
    evaluate.evaluate(config(), prepared, recipe, MEASURE, str(tmp_path), said.append)
    assert [text for text in said if text.startswith("fine-tuning, step 2/2, loss 0.")]


def test_a_batch_dependent_recipe_is_noted(prepared, tmp_path):
    assert "batch_dependent" in cell(prepared, tmp_path, Recipe("ptdq", activation_granularity="per_tensor"))["notes"]
    assert "batch_dependent" not in cell(prepared, tmp_path, Recipe("ptdq"))["notes"]
    assert "batch_dependent" not in cell(prepared, tmp_path, Recipe(activation_granularity="per_tensor"))["notes"]


def test_a_bfloat16_cell_is_a_float_one_and_says_where_it_is_emulated(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(bfloat16, "answering_environment", lambda: {"cpu_flags": ["avx2"]})
    found = cell(prepared, tmp_path, Recipe("bf16"))
    assert found["metrics"]["int8_mac_fraction"] == 0.0
    assert found["metrics"]["sqnr_db"] > 30
    assert found["granularity_effective"] is None
    assert found["notes"] == ["bf16_emulated"]
    monkeypatch.setattr(bfloat16, "answering_environment", lambda: {"cpu_flags": ["avx512_bf16"]})
    assert cell(prepared, tmp_path, Recipe("bf16"))["notes"] == []


def test_a_draw_of_the_calibration_examples_is_another_network_with_the_same_judges(prepared, tmp_path):
    def program(**values):
        found = cell(prepared, tmp_path, Recipe(**values))
        return (tmp_path / "model.qb").read_bytes(), found["metrics"]["examples"]

    drawn = {"calibration_samples": 4, "calibration_seed": 1}
    assert program(**drawn) == program(**drawn)
    assert len({program(**drawn), program(**{**drawn, "calibration_seed": 2}), program()}) == 3


@pytest.mark.parametrize(
    ("recipe", "effective"),
    [
        (Recipe("fp32"), None),
        (Recipe("woq", "per_tensor"), "per_tensor"),
        (Recipe("ptsq", "per_group", group_size=64), "per_channel"),  # no layer has more than 8 inputs
        (Recipe("ptsq", "per_group", group_size=4), "per_channel 1, per_group 1"),  # 1 input and 8
        (Recipe("ptdq", "per_group", group_size=4, keep_float=["body"]), "per_group"),
    ],
    ids=["fp32", "tensor", "too small", "one of two", "the other kept"],
)
def test_the_effective_granularity_is_that_of_the_scales(prepared, tmp_path, recipe, effective):
    assert cell(prepared, tmp_path, recipe)["granularity_effective"] == effective


@pytest.mark.parametrize(
    "recipe", [Recipe("ptsq", observer="entropy"), Recipe(methods.qat(steps=7))], ids=["ptsq", "qat"]
)
def test_nothing_of_the_evaluation_split_reaches_calibration(prepared, tmp_path, monkeypatch, recipe):
    """Every tensor that quantizing a network sees, against every evaluation example."""
    seen = []
    real = {name: getattr(evaluate, name) for name in ("capture", "quantize_network")}

    def watched_capture(model, example_inputs, *rest):
        seen.extend(example_inputs)
        return real["capture"](model, example_inputs, *rest)

    def watched_quantize(network, recipe, calibration=None, **rest):
        seen.extend(leaf for batch in calibration or () for leaf in batch)
        if rest.get("fine_tune"):
            seen.extend(leaf for batch in rest["fine_tune"].batches for leaf in batch)
        return real["quantize_network"](network, recipe, calibration, **rest)

    monkeypatch.setattr(evaluate, "capture", watched_capture)
    monkeypatch.setattr(evaluate, "quantize_network", watched_quantize)
    cell(prepared, tmp_path, recipe)
    (images,) = sys.modules["known_task"].build().evaluation().inputs
    evaluated = {image.numpy().tobytes() for image in images}
    used = [image.numpy().tobytes() for leaf in seen for image in leaf]
    assert len(used) >= (16 if recipe.method.name == "ptsq" else 16 + 90)
    assert not evaluated & set(used)


def test_damaged_fp32_outputs_name_the_folder_to_delete(tmp_path):
    found = evaluate.prepare(config(), str(tmp_path / "cache"), quiet)
    (outputs,) = (tmp_path / "cache").glob("*/fp32_outputs.safetensors")
    outputs.write_bytes(outputs.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete it to make it again$") as caught:
        cell(found, tmp_path, Recipe())
    assert str(outputs.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_in_the_weights_names_the_layer(tmp_path):
    task = config(fault="nan")
    found = evaluate.prepare(task, str(tmp_path / "cache"), quiet)
    for method in ("woq", "ptdq", "ptsq"):
        with pytest.raises(
            ValueError, match=r"^layer head: .*weight has values that are not finite \(NaN or infinity\)$"
        ):
            cell(found, tmp_path, Recipe(method), task)
