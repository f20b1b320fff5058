"""quantize(): recipes that differ give programs that differ, mistakes are one line, and the model is left alone."""

import copy
import itertools
import json

import pytest
import torch
from programs import Apply
from torch import nn

import qbench
from qbench import methods, observers
from qbench.capture import capture
from qbench.model import QuantizedModel
from qbench.quantization import quantize_network
from qbench.recipe import AXES, Recipe
from qbench.saved import dump

pytestmark = pytest.mark.usefixtures("one_thread")

# --- all pairs of recipes --------------------------------------------------------------------------------------------

SHAPE = (3, 10, 10)
OUTPUTS = {"first": 70, "second": 4, "head": 6}  # output channels
INPUTS = {"first": 3, "second": 70, "head": 4}  # input channels: one layer has more than a group of 64


class Small(nn.Module):
    """Two convolutions and a linear; behind the first, more inputs than a group."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 70, 3, stride=2), nn.Conv2d(70, 4, 1)
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def heavy_tailed(seed):
    """A batch with a few outliers, more in each batch than in the one before: what observers disagree about."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(16, *SHAPE, generator=random) ** 3 * (1 + seed)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = Small().eval()
    with torch.no_grad():  # off the middle, so that an affine weight has another zero point than a symmetric one
        for layer in (small.first, small.second, small.head):
            layer.weight += layer.weight.std() / 2
    return capture(small, (heavy_tailed(0),))


@pytest.fixture(scope="module")
def calibration():
    return [(heavy_tailed(seed),) for seed in range(3)]  # 14,400 values: more than one in 10,000 is a tail


METHODS = {
    "fp32": {},
    "woq": {},
    "ptdq": {"activation_scheme": ["affine", "symmetric"], "activation_granularity": ["per_row", "per_tensor"]},
    "ptsq": {
        "activation_scheme": ["affine", "symmetric"],
        "observer": ["minmax", "moving_average", "percentile", "mse", "entropy"],
        "output": ["float", "int8"],
    },
    "qat": {
        "activation_scheme": ["affine", "symmetric"],
        "observer": ["minmax", "percentile"],
        "output": ["float", "int8"],
    },
}
WEIGHTS = [
    {"granularity": granularity, "scheme": scheme, "group_size": group_size, "keep_float": keep_float}
    for granularity, group_size in (("per_tensor", 64), ("per_channel", 64), ("per_group", 64), ("per_group", 32))
    for scheme in ("symmetric", "affine")
    for keep_float in ((), ("first",))
]


def of(method, **options):
    """A recipe; a method that trains does so for one step."""
    return Recipe(methods.qat(steps=1) if method == "qat" else method, **options)


def recipes(method):
    """Every recipe of a method; the two slow observers on one granularity only."""
    axes = METHODS[method]
    for weights in WEIGHTS if method != "fp32" else [{}]:
        for choice in itertools.product(*axes.values()):
            options = dict(zip(axes, choice, strict=True))
            if options.get("observer") in ("entropy", "mse") and weights["granularity"] != "per_channel":
                continue
            yield of(method, **weights, **options)


@pytest.fixture(scope="module")
def models(network, calibration):
    return {
        json.dumps(recipe.canonical()): quantize_network(network, recipe, calibration)
        for method in METHODS
        for recipe in recipes(method)
    }


def without_recipe(model):
    """The saved bytes without the recipe's own text, which would differ in any case."""
    return dump(QuantizedModel(model.program, {}, model.backend))


def test_recipes_that_differ_give_different_bytes(models):
    assert len(models) == 1 + 16 + 64 + (16 * 12 + 4 * 8) + 16 * 8
    owners = {}
    for recipe, model in models.items():
        twin = owners.setdefault(without_recipe(model), recipe)
        assert twin == recipe


def test_equal_canonical_recipes_give_equal_bytes(models, network, calibration):
    for method in METHODS:
        recipe = of(method)
        for axis in [axis for axis in AXES if not recipe.applies(axis)]:
            for name in [getattr(AXES[axis], public).name for public in AXES[axis].__all__]:
                other = of(method, group_size=16, **{axis: name})
                made = quantize_network(network, other, calibration)
                assert dump(made) == dump(models[json.dumps(recipe.canonical())])


def scales_of(model):
    """Rows and columns of each layer's weight scales."""
    nodes = [node for node in model.program.graph.nodes if "weight_scale" in node.kwargs]
    return {node.meta["layer"]: list(model.program.tensors[node.kwargs["weight_scale"].target].shape) for node in nodes}


def test_the_number_of_weight_scales_is_what_the_granularity_implies(models):
    for text, model in models.items():
        recipe = json.loads(text)
        expected = {}
        for layer in OUTPUTS if recipe["granularity"] else ():
            blocks = -(-INPUTS[layer] // recipe["group_size"]) if recipe["group_size"] else 1
            rows = 1 if recipe["granularity"]["name"] == "per_tensor" else OUTPUTS[layer]
            if layer not in recipe["keep_float"]:
                expected[layer] = [rows, blocks]
        assert scales_of(model) == expected
    by_hand = {"first": [70, 1], "second": [4, 3], "head": [6, 1]}
    assert scales_of(models[json.dumps(Recipe("woq", "per_group", group_size=32).canonical())]) == by_hand


def test_an_affine_scheme_has_zero_points_and_a_symmetric_one_has_none(models):
    for text, model in models.items():
        scheme = json.loads(text)["scheme"]
        stored = any("weight_zero_point" in name for name in model.program.tensors)
        assert stored == (scheme is not None and scheme["name"] == "affine")


def test_an_observers_option_changes_the_program(network, calibration):
    made = {
        without_recipe(quantize_network(network, Recipe(observer=observer), calibration))
        for observer in (observers.percentile(), observers.percentile(percentile=99), observers.mse(ratios=10))
    }
    assert len(made) == 3


def test_calibration_does_not_depend_on_how_the_samples_are_batched(network, calibration):
    together = torch.cat([batch for (batch,) in calibration])
    for observer in ("minmax", "percentile", "mse"):
        by_16, by_7 = (
            dump(quantize_network(network, Recipe(observer=observer), [(part,) for part in together.split(size)]))
            for size in (16, 7)
        )
        assert by_16 == by_7


# --- the int8 share --------------------------------------------------------------------------------------------------

# 10x10 images, 3x3 kernels, stride 2: 4x4 positions
MACS = {"first": 16 * 70 * 3 * 9, "second": 16 * 4 * 70, "head": 4 * 6}


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
@pytest.mark.parametrize(("patterns", "kept"), [((), ()), (("head",), ("head",)), (("*e*",), ("second", "head"))])
def test_the_int8_share_counts_multiply_accumulates(network, calibration, method, patterns, kept):
    model = quantize_network(network, Recipe(method, keep_float=patterns), calibration)
    share = 1 - sum(MACS[layer] for layer in kept) / sum(MACS.values())
    assert model.int8_mac_fraction == share
    model(*calibration[0])
    assert (model.macs.int8 + model.macs.float32) == 16 * sum(MACS.values())
    assert model.int8_mac_fraction == share


def test_methods_without_int8_products_say_so(network):
    assert quantize_network(network, Recipe("woq")).int8_mac_fraction == 0.0
    assert quantize_network(network, Recipe("fp32")).int8_mac_fraction == 0.0


def test_a_network_without_products_has_no_share():
    assert qbench.quantize(nn.ReLU(), (torch.randn(2, 3),), Recipe("woq")).int8_mac_fraction is None


# --- calling, saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_answers_bit_for_bit(network, calibration, method, tmp_path):
    model = quantize_network(network, Recipe(method), calibration)
    model.save(tmp_path / "first.qb")
    model.save(tmp_path / "second.qb")
    assert (tmp_path / "first.qb").read_bytes() == (tmp_path / "second.qb").read_bytes()
    assert (tmp_path / "first.qb").stat().st_size == model.size_bytes
    loaded = qbench.load(tmp_path / "first.qb")
    assert torch.equal(loaded(*calibration[0]), model(*calibration[0]))
    assert dump(loaded) == dump(model)
    assert loaded.float_ops == model.float_ops


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_a_result_does_not_depend_on_its_neighbours_in_the_batch(network, calibration, method):
    model = quantize_network(network, Recipe(method), calibration)
    (images,) = calibration[0]
    assert torch.equal(model(images), torch.cat([model(image[None]) for image in images]))


def test_one_scale_for_the_whole_batch_does_depend_on_it(network, calibration):
    model = quantize_network(network, Recipe("ptdq", activation_granularity="per_tensor"))
    (images,) = calibration[0]
    assert not torch.equal(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_do_not_fit_are_one_line(network, calibration, method):
    model = quantize_network(network, Recipe(method), calibration)
    for inputs, message in (
        ((), "the network takes 1 input tensors, 0 were given"),
        ((torch.zeros(2, 3, 9, 10),), r"input 0 has the shape \[2, 3, 9, 10\], the network takes \[any, 3, 10, 10\]"),
        ((torch.zeros(2, *SHAPE).double(),), "input 0 is float64, the network takes float32"),
        (
            (torch.zeros(2, *SHAPE, device="meta"),),
            r"input 0 is a tensor of another kind \(meta, strided\); give a dense one on the CPU",
        ),
        (
            (torch.zeros(2, *SHAPE).to_sparse(),),
            r"input 0 is a tensor of another kind \(cpu, sparse_coo\); give a dense one on the CPU",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            model(*inputs)


# --- quantize() ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(512, 4)
        return nn.Sequential(*layers)


IMAGES = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_the_model_is_left_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    for method in METHODS:
        qbench.quantize(model.train(), (IMAGES,), Recipe(method), calibration=[(IMAGES,)])(IMAGES)
    assert all(module.training for module in model.modules())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_quantizing_draws_no_random_numbers_and_repeats_itself(model):
    state = torch.random.get_rng_state()
    made = [dump(qbench.quantize(model, (IMAGES,), calibration=[(IMAGES,)])) for _ in range(2)]
    assert made[0] == made[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_calibration_may_be_a_generator(model):
    batches = list(IMAGES.split(2))
    by_list = qbench.quantize(model, (IMAGES,), calibration=[(batch,) for batch in batches])
    by_generator = qbench.quantize(model, (IMAGES,), calibration=((batch,) for batch in batches))
    assert dump(by_list) == dump(by_generator)


def quantize_tiny(calibration=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    change = options.pop("change", None)
    if change is not None:
        with torch.no_grad():
            change(tiny)
    extras = {name: options.pop(name) for name in ("fine_tune", "backend") if name in options}
    return qbench.quantize(tiny, (torch.zeros(2, 4),), Recipe(**options), calibration=calibration, **extras)


GOOD = (torch.ones(2, 4),)
NAN = float("nan")


def spoil(layer, name, value):
    def change(model):
        getattr(model[layer], name).flatten()[1] = value

    return change


MISTAKES = {
    "no calibration": ({}, "method ptsq needs calibration data: pass calibration=, a list of input tuples"),
    "empty calibration": ({"calibration": []}, "method ptsq needs calibration data: pass calibration=, a list of"),
    "wrong shape": (
        {"calibration": [GOOD, (torch.ones(2, 5),)]},
        r"calibration batch 1: input 0 has the shape \[2, 5\], the network takes \[any, 4\]",
    ),
    "wrong number": (
        {"calibration": [(torch.ones(2, 4), torch.ones(2, 4))]},
        "calibration batch 0: the network takes 1 input tensors, 2 were given",
    ),
    "wrong dtype": (
        {"calibration": [GOOD, GOOD, (torch.ones(2, 4, dtype=torch.int64),)]},
        "calibration batch 2: input 0 is int64, the network takes float32",
    ),
    "NaN in calibration": (
        {"calibration": [GOOD, (torch.full((2, 4), NAN),)]},
        r"calibration batch 1: it has values that are not finite \(NaN or infinity\)",
    ),
    "overflow on the way": (
        {"calibration": [(torch.full((2, 4), 3e38),)], "change": lambda model: model[0].weight.fill_(1.0)},
        r"layer 0: the calibration data give a value that is not finite \(NaN or infinity\)",
    ),
    "NaN weight": (
        {"calibration": [GOOD], "change": spoil(2, "weight", NAN)},
        r"layer 2: 2.weight has values that are not finite \(NaN or infinity\)",
    ),
    "infinite bias": (
        {"calibration": [GOOD], "change": spoil(0, "bias", float("inf"))},
        r"layer 0: 0.bias has values that are not finite \(NaN or infinity\)",
    ),
    "NaN weight, woq": (
        {"method": "woq", "change": spoil(2, "weight", NAN)},
        r"layer 2: the weight has values that are not finite \(NaN or infinity\)",
    ),
    "NaN bias, ptdq": (
        {"method": "ptdq", "change": spoil(2, "bias", NAN)},
        r"layer 2: the bias has values that are not finite \(NaN or infinity\)",
    ),
    "a pattern without layer": (
        {"calibration": [GOOD], "keep_float": ["head"]},
        "keep_float: 'head' matches no layer; layers are 0, 2",
    ),
    "a pattern without layer, woq": (
        {"method": "woq", "keep_float": ["0", "fc*"]},
        r"keep_float: 'fc\*' matches no layer; layers are 0, 2",
    ),
    "fine_tune": (
        {"calibration": [GOOD], "fine_tune": lambda model: None},
        "fine_tune: method ptsq does not train; leave it out",
    ),
    "unknown backend": ({"calibration": [GOOD], "backend": "referense"}, "backend=referense: .*did you mean reference"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        quantize_tiny(**options)
    assert "\n" not in str(caught.value)


def test_a_dynamic_layer_that_meets_nan_says_so():
    with pytest.raises(ValueError, match=r"^dynamic quantization met a value that is not finite \(NaN or infinity\)$"):
        quantize_tiny(method="ptdq")(torch.full((2, 4), NAN))


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_products_without_an_int8_form_fail_with_a_sentence_unless_kept(method):
    model = Apply(lambda s, x: torch.bmm(s.layers[0](x), x), nn.Linear(4, 4))
    inputs = (torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)),)
    with pytest.raises(
        ValueError, match=r"^aten\.bmm\.default in layer 'bmm' has no int8 form; name the layer in keep_"
    ):
        qbench.quantize(model, inputs, Recipe(method), calibration=[inputs])
    kept = qbench.quantize(model, inputs, Recipe(method, keep_float=["bmm"]), calibration=[inputs])
    assert kept.int8_mac_fraction == 0.5
    assert "bmm: aten.bmm.default" in kept.float_ops


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_a_sum_that_could_overflow_is_refused_with_its_bound(method):
    """255 * 127 * inputs exceeds 2^31 - 1 from 66,312 inputs on."""

    def made(inputs):
        layer = nn.Linear(inputs, 1, bias=False)
        nn.init.ones_(layer.weight)
        example = (torch.ones(2, inputs),)
        return qbench.quantize(layer, example, Recipe(method), calibration=[example])

    assert made(66_311).int8_mac_fraction == 1.0
    with pytest.raises(
        ValueError, match=r"^layer linear: its int32 sum may reach 2147\d{6}, the bound is 2147483647; name"
    ):
        made(66_312)


def test_kept_layers_keep_their_float_weights(network, calibration):
    model = quantize_network(network, Recipe(keep_float=["first", "head"]), calibration)
    assert list(scales_of(model)) == ["second"]
    assert {name for name, tensor in model.program.tensors.items() if tensor.dtype == torch.float32} >= {
        "first.weight",
        "first.bias",
        "head.weight",
        "head.bias",
    }
    assert [name.split(":")[0] for name in model.float_ops] == ["conv2d", "linear"]
