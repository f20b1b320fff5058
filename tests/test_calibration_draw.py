"""Which examples calibrate: the first, a seeded draw, from the training examples where a task has some."""

import dataclasses

import pytest
import torch
from torch import nn

import qbench
from qbench.calibration_draw import draw
from qbench.evaluate import _examples_to_draw
from qbench.metrics import fidelity
from qbench.recipe import Recipe
from qbench.saved import dump
from qbench.task import Examples, Task

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(count=20, size=8):
    """Examples 0, 1, 2, ... with a second input that is ten times as large."""
    ids = torch.arange(count).float().reshape(-1, 1)
    return [[part, 10 * part] for part in ids.split(size)]


def ids(drawn):
    return [int(value) for batch in drawn for value in batch[0]]


def test_nothing_asked_leaves_the_batches_alone():
    given = batches()
    assert draw(given, None, None) is given


def test_without_a_seed_the_first():
    drawn = draw(batches(), 10, None)
    assert ids(drawn) == list(range(10))
    assert [len(batch[0]) for batch in drawn] == [8, 2]


@pytest.mark.parametrize("samples", [1, 8, 20])
def test_a_seeded_draw_is_without_replacement_and_keeps_examples_and_batches_whole(samples):
    drawn = draw(batches(), samples, 0)
    assert len(set(ids(drawn))) == len(ids(drawn)) == samples
    assert all(torch.equal(ten, 10 * one) for one, ten in drawn)
    assert all(len(batch[0]) == 8 for batch in drawn[:-1])


def test_a_seed_alone_shuffles_all():
    assert sorted(ids(draw(batches(), None, 1))) == list(range(20))
    assert ids(draw(batches(), None, 1)) != list(range(20))


def test_a_seed_says_which():
    assert ids(draw(batches(), 10, 3)) == ids(draw(batches(), 10, 3))
    assert len({tuple(ids(draw(batches(), 10, seed))) for seed in range(5)}) == 5
    assert ids(draw(batches(size=5), 10, 3)) == ids(draw(batches(), 10, 3))  # however the examples were batched


def test_more_than_there_are_is_one_line():
    with pytest.raises(ValueError, match="calibration_samples=21: there are 20 examples to calibrate with"):
        draw(batches(), 21, 0)
    with pytest.raises(ValueError, match="need inputs that all have the batch as dimension 0"):
        draw([[torch.zeros(4, 1), torch.zeros(2, 4)]], 2, 0)


# --- in a recipe -----------------------------------------------------------------------------------------------------

DRAWN = {"calibration_samples": 64, "calibration_seed": 2}


@pytest.mark.parametrize(("method", "applies"), [("ptsq", True), ("ptdq", False), ("woq", False), ("fp32", False)])
def test_it_is_asked_where_something_calibrates(method, applies):
    content = Recipe(method, **DRAWN).canonical()
    assert {name: content[name] for name in DRAWN} == (DRAWN if applies else dict.fromkeys(DRAWN))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("calibration_samples", 0, 1),
        ("calibration_samples", 1.5, 1),
        ("calibration_seed", -1, 0),
        ("calibration_seed", True, 0),
    ],
)
def test_an_impossible_draw_is_one_line(name, value, least):
    with pytest.raises(ValueError, match=f"{name}={value!r}: give a whole number, at least {least}, or null"):
        Recipe(**{name: value})


def quantized(**values):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return dump(qbench.quantize(model, (x[:2],), Recipe(**values), calibration=[(part,) for part in x.split(8)]))


def test_a_draw_changes_the_network_and_is_repeatable():
    same = quantized(calibration_samples=8, calibration_seed=0)
    assert same == quantized(calibration_samples=8, calibration_seed=0)
    assert len({same, quantized(calibration_samples=8, calibration_seed=1), quantized()}) == 3


# --- from a task -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Task):
    """A task with training examples: 100 to 149, in one batch; it calibrates with 0 to 7 and is judged by 200 on."""

    fine_tuning: object = lambda: [(torch.arange(100.0, 150.0).reshape(-1, 1),)]


def task(kind):
    return kind(
        name="t",
        family="cnn",
        metric=fidelity(),
        build=lambda: nn.Linear(1, 2),
        calibration=lambda: [(torch.arange(4.0).reshape(-1, 1),), (torch.arange(4.0, 8.0).reshape(-1, 1),)],
        evaluation=lambda: Examples((torch.arange(200.0, 300.0).reshape(-1, 1),)),
    )


def calibrated_with(kind, **values):
    recipe, made = Recipe(**values), task(kind)
    given = _examples_to_draw(made, recipe, made.calibration())
    drawn = draw([list(batch) for batch in given], recipe.calibration_samples, recipe.calibration_seed)
    assert [len(batch[0]) for batch in drawn[:-1]] == [4] * (len(drawn) - 1)  # the size of the task's own batches
    return set(ids(drawn))


def test_a_draw_comes_from_the_training_examples_and_never_from_those_that_judge():
    assert calibrated_with(Trained, **DRAWN | {"calibration_samples": 20}) < set(range(100, 150))
    assert calibrated_with(Trained) == set(range(8))
    assert calibrated_with(Trained, calibration_samples=6) == set(range(6))


def test_a_task_without_training_examples_is_drawn_from_its_calibration():
    assert calibrated_with(Task, calibration_samples=6, calibration_seed=0) < set(range(8))


def test_what_does_not_calibrate_is_given_nothing():
    assert _examples_to_draw(task(Trained), Recipe("woq"), []) is None
