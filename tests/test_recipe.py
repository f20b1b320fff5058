"""Recipes: names and objects, what is null where it does not apply, and one line for everything impossible."""

import dataclasses
import itertools
import json
import re

import pytest

from qbench import activation_granularities, granularities, methods, observers, outputs, schemes
from qbench.recipe import AXES, Recipe, option

NAMES = {axis: [getattr(module, public).name for public in module.__all__] for axis, module in AXES.items()}


def test_a_name_and_its_object_are_one_recipe():
    by_name = Recipe("ptsq", "per_group", "affine", "symmetric", "per_tensor", "percentile", "int8")
    by_object = Recipe(
        methods.ptsq(),
        granularities.per_group(),
        schemes.affine(),
        schemes.symmetric(),
        activation_granularities.per_tensor(),
        observers.percentile(),
        outputs.int8(),
    )
    assert by_name == by_object
    assert by_name.canonical() == by_object.canonical()


@pytest.mark.parametrize(("axis", "name"), [(axis, name) for axis in AXES for name in NAMES[axis]])
def test_every_public_name_is_an_option_with_a_short_label(axis, name):
    chosen = option(axis, name)
    assert chosen.name == name
    assert 1 <= len(chosen.label) <= 9


def test_labels_of_recipes_fit_and_tell_the_weights_apart():
    labels = {
        combination: Recipe(**dict(zip(AXES, combination, strict=True))).label
        for combination in itertools.product(*NAMES.values())
    }
    assert max(map(len, labels.values())) <= 9
    assert len({(label, c[0]) for c, label in labels.items() if c[0] == "ptsq"}) == 6  # 3 granularities x 2 schemes
    assert Recipe("ptsq", "per_channel", "symmetric").label == "ptsq-c-s"
    assert Recipe("fp32", "per_group", "affine").label == "fp32"


WEIGHTS = {"granularity", "scheme", "keep_float"}
APPLICABLE = {
    "fp32": set(),
    "bf16": set(),
    "woq": WEIGHTS,
    "ptdq": WEIGHTS | {"activation_scheme", "activation_granularity"},
    "ptsq": WEIGHTS | {"activation_scheme", "observer", "output"},
    "qat": WEIGHTS | {"activation_scheme", "observer", "output"},
}


@pytest.mark.parametrize("method", NAMES["method"])
def test_what_does_not_apply_is_null(method):
    content = Recipe(method).canonical()
    present = {axis for axis, value in content.items() if value is not None}
    assert present == APPLICABLE[method] | {"method", "backend"}
    assert content == json.loads(json.dumps(content))


@pytest.mark.parametrize("method", NAMES["method"])
def test_options_that_do_not_apply_do_not_change_the_canonical_recipe(method):
    """Which means that no cell is measured twice."""
    for axis in set(AXES) - {"method", "backend"} - APPLICABLE[method]:
        assert len({json.dumps(Recipe(method, **{axis: name}).canonical()) for name in NAMES[axis]}) == 1


def test_group_size_counts_for_groups_only():
    assert Recipe(granularity="per_channel", group_size=32).canonical() == Recipe(granularity="per_channel").canonical()
    assert Recipe(granularity="per_group", group_size=32).canonical()["group_size"] == 32
    assert Recipe("fp32", "per_group").canonical()["group_size"] is None


def test_an_observers_option_is_part_of_the_recipe():
    mild, strict = (Recipe(observer=observers.percentile(percentile=p)).canonical() for p in (99.99, 99.9))
    assert mild["observer"] == {"name": "percentile", "percentile": 99.99}
    assert mild != strict


def test_keep_float_has_no_order():
    assert Recipe(keep_float=("fc", "conv1", "fc")) == Recipe(keep_float=["conv1", "fc"])
    assert Recipe("fp32", keep_float=("fc",)).canonical() == Recipe("fp32").canonical()


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().method = "woq"


IMPOSSIBLE = {
    "misspelt": ({"observer": "percentil"}, "observer=percentil: allowed are entropy, .*; did you mean percentile?"),
    "unknown": ({"method": "gptq"}, "method=gptq: allowed are bf16, fp32, ptdq, ptsq, qat, woq"),
    "of another axis": ({"scheme": "per_channel"}, "scheme=per_channel: allowed are affine, symmetric"),
    "an object of another axis": ({"method": observers.minmax()}, "method=minmax.*: give a name or an object of"),
    "the class": ({"observer": observers.minmax}, "observer=.*minmax.*: give a name or an object of"),
    "nothing": ({"method": None}, "method=None: give a name or an object of qbench.methods"),
    "no group": ({"group_size": 0}, "group_size=0: give a whole number of input channels, at least 1"),
    "half a group": ({"group_size": 1.5}, "group_size=1.5: give a whole number"),
    "a true group": ({"group_size": True}, "group_size=True: give a whole number"),
    "a pattern alone": ({"keep_float": "fc"}, "keep_float='fc': give a list of module-name patterns, such as .fc."),
    "an empty pattern": ({"keep_float": [""]}, "keep_float=.*: give a list"),
    "a number of patterns": ({"keep_float": 3}, "keep_float=3: give a list"),
    "no patterns": ({"keep_float": None}, "keep_float=None: give a list"),
}


@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_recipe_is_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("observer", "option_name", "value"),
    [
        ("percentile", "percentile", 101),
        ("percentile", "percentile", 50),
        ("percentile", "percentile", float("nan")),
        ("percentile", "percentile", "high"),
        ("moving_average", "momentum", 0),
        ("moving_average", "momentum", 1.1),
        ("moving_average", "momentum", "fast"),
        ("mse", "ratios", 0),
        ("mse", "ratios", 2.5),
        ("entropy", "bins", 511),
    ],
)
def test_an_impossible_observer_is_one_line(observer, option_name, value):
    with pytest.raises(ValueError, match=re.escape(f"observer.{option_name}={value!r}: give a ")) as caught:
        getattr(observers, observer)(**{option_name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option_name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("learning_rate", 0),
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("learning_rate", "fast"),
    ],
)
def test_an_impossible_training_is_one_line(option_name, value):
    with pytest.raises(ValueError, match=re.escape(f"method.{option_name}={value!r}: give a ")) as caught:
        methods.qat(**{option_name: value})
    assert "\n" not in str(caught.value)


def test_the_options_of_training_are_part_of_the_recipe():
    short, long = (Recipe(methods.qat(steps=steps)).canonical() for steps in (5, 50))
    assert short["method"] == {"name": "qat", "steps": 5, "learning_rate": methods.qat.learning_rate}
    assert short != long
