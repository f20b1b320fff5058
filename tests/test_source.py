"""A task that needs another one's trained network: as the judge of its images, and as the maker of its examples."""

import json
import sys
from pathlib import Path

import pytest
from test_evaluate import MEASURE, recipe_config
from torch import nn

from qbench import evaluate
from qbench.recipe import Recipe

TASK = '''
"""A generator of 4 x 4 images, judged by a classifier's features; and a critic of what the generator makes."""
import torch
from torch import nn

from qbench.frechet import frechet_distance
from qbench.metrics import accuracy
from qbench.task import Examples, Task

TRAINED = []
BIAS = [0.25]


def random(count, *shape, seed):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def trains(name):
    def train(net, say):
        TRAINED.append(name)
        say(f"{name}: one step")
        with torch.no_grad():
            net[-1].bias.add_(BIAS[0])
    return train


def classifier():
    return Task(
        name="classifier", family="cnn", metric=accuracy(), train=trains("classifier"),
        build=lambda: network(nn.Flatten(), nn.Linear(16, 3)),
        calibration=lambda: [(random(8, 1, 4, 4, seed=1),)],
        evaluation=lambda: Examples((random(40, 1, 4, 4, seed=2),), torch.arange(40) % 3),
    )


def generator(source):
    return Task(
        name="generator", family="gan", metric=frechet_distance(), train=trains("generator"),
        build=lambda: network(nn.Unflatten(1, (5, 1, 1)), nn.ConvTranspose2d(5, 1, 4)),
        calibration=lambda: [(random(8, 5, seed=3),)],
        evaluation=lambda: Examples(
            (random(300, 5, seed=4),), random(300, 1, 4, 4, seed=5), torch.arange(300) % 25
        ),
        judge=source,
    )


def critic(source):
    def examples(seed):
        with torch.no_grad():
            return source()(random(40, 5, seed=seed))
    return Task(
        name="critic", family="gan", metric=accuracy(),
        build=lambda: network(nn.Flatten(), nn.Linear(16, 2)),
        calibration=lambda: [(examples(6),)],
        evaluation=lambda: Examples((examples(7),), torch.arange(40) % 2),
    )
'''

CLASSIFIER = {"_target_": "sourced_task.classifier"}
GENERATOR = {"_target_": "sourced_task.generator", "source": CLASSIFIER}
CRITIC = {"_target_": "sourced_task.critic", "source": GENERATOR}


@pytest.fixture
def task(tmp_path_factory):
    """The user's module, in which nothing was trained yet."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "sourced_task.py").write_text(TASK)
    sys.path.insert(0, str(folder))
    import sourced_task

    yield sourced_task
    sys.path.remove(str(folder))
    del sys.modules["sourced_task"]


def quiet(text):
    """Nobody listens."""


def scored(config, prepared, folder, recipe, **measure):
    settings = MEASURE | {"layers": False} | measure
    return evaluate.evaluate(config, prepared, recipe_config(recipe), settings, str(folder), quiet)


def test_the_source_is_trained_once_and_shared(tmp_path, task):
    said = []
    prepared = [evaluate.prepare(config, str(tmp_path), said.append) for config in (GENERATOR, CLASSIFIER, CRITIC)]
    assert sorted(task.TRAINED) == ["classifier", "generator"]
    folders = [Path(found["folder"]) for found in prepared]
    assert len(set(folders)) == 3
    assert {path.parent for path in tmp_path.rglob("weights.safetensors")} == set(folders[:2])
    assert "classifier: training, once" in said
    assert [evaluate.prepare(config, str(tmp_path), quiet) for config in (GENERATOR, CLASSIFIER, CRITIC)] == prepared
    assert len(task.TRAINED) == 2


def test_only_the_source_that_is_used_is_trained(tmp_path, task):
    """The critic needs the generator, not the generator's judge."""
    prepared = evaluate.prepare(CRITIC, str(tmp_path), quiet)
    assert task.TRAINED == ["generator"]
    found = scored(CRITIC, prepared, tmp_path / "cell", Recipe())
    assert {"accuracy", "agreement"} <= set(found["metrics"])
    assert isinstance(evaluate.fp32_model(CRITIC, prepared), nn.Module)
    assert evaluate.example_batch(CRITIC, prepared, 3)[0].shape == (3, 1, 4, 4)


def test_images_are_scored_as_the_judge_sees_them(tmp_path, task):
    prepared = evaluate.prepare(GENERATOR, str(tmp_path), quiet)
    fp32 = scored(GENERATOR, prepared, tmp_path / "fp32", Recipe(method="fp32"))["metrics"]
    assert fp32["score"] == pytest.approx(fp32["score_fp32"])
    found = scored(GENERATOR, prepared, tmp_path / "cell", Recipe(granularity="per_tensor"))
    assert {"frechet_distance", "score_drop", "psnr_db", "sqnr_db"} <= set(found["metrics"])
    assert "agreement" not in found["metrics"] | fp32  # images are no decisions
    assert found["details"]["score_test"]["units"] == 25
    # the same by hand: three features of each image, from the judge that was trained
    judge = evaluate.fp32_model(CLASSIFIER, evaluate.prepare(CLASSIFIER, str(tmp_path), quiet))
    examples = task.generator(None).evaluation()
    images = evaluate.fp32_model(GENERATOR, prepared)(*examples.inputs)
    by_hand = task.frechet_distance().compare(judge(images), judge(images), judge(examples.targets), examples.units)
    assert found["metrics"]["score_fp32"] == pytest.approx(by_hand.score_fp32)
    fewer = scored(GENERATOR, prepared, tmp_path / "fewer", Recipe(), examples=100)
    assert fewer["metrics"]["examples"] == 100
    assert fewer["details"]["score_test"]["units"] == 25


def test_another_judge_is_another_question(tmp_path, task):
    """Its weights are part of what identifies the data: features of an older judge are never compared with."""
    first = evaluate.prepare(GENERATOR, str(tmp_path), quiet)
    judges = Path(evaluate.prepare(CLASSIFIER, str(tmp_path), quiet)["folder"])
    features = Path(first["folder"]) / "fp32_outputs.safetensors"
    before = features.read_bytes()
    (judges / "weights.safetensors").unlink()
    task.BIAS[0] = 0.5  # trained again, with another outcome: other threads, say
    second = evaluate.prepare(GENERATOR, str(tmp_path), quiet)
    assert second["data_sha256"] != first["data_sha256"]
    assert {**second, "data_sha256": ""} == {**first, "data_sha256": ""}
    assert json.loads((features.parent / "identity.json").read_text())["data_sha256"] == second["data_sha256"]
    assert features.read_bytes() != before


def test_a_source_that_is_missing_says_what_to_do(tmp_path, task):
    prepared = evaluate.prepare(CRITIC, str(tmp_path), quiet)
    next(tmp_path.rglob("weights.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"weights.safetensors is missing; run the sweep again to train generator"):
        evaluate.example_batch(CRITIC, prepared, 1)
