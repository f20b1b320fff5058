"""The literature's orderings on trained networks, on quantities that are not at their ceiling.

Krishnamoorthi 2018 (arXiv 1806.08342): one scale for a whole weight ruins networks with depthwise convolutions, a scale
for each channel does not; finer is better. SQNR is never at its ceiling; agreement is, on the networks trained here,
so it is compared on EfficientNet-Lite0 only.
"""

from pathlib import Path

import pytest
import torch
import yaml

from qbench import evaluate, methods, metrics
from qbench.capture import capture
from qbench.config import instantiate
from qbench.quantization import quantize_network
from qbench.recipe import Recipe
from qbench.task import TaskUnavailable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLES = {"resnet18": 400, "mobilenet_v2": 400, "efficientnet_lite0": 88}
BATCH = 50


class Trained:
    """A task's network with its final weights, captured; quantized and compared with float on demand."""

    def __init__(self, name, cache):
        config = yaml.safe_load((PROJECT / "conf" / "task" / f"{name}.yaml").read_text())
        task = instantiate(config)
        model = evaluate.fp32_model(config, evaluate.prepare(config, cache, lambda text: None))
        self.calibration, self.fine_tuning = task.calibration(), task.fine_tuning
        self.parts = task.evaluation().first(EXAMPLES[name]).inputs[0].split(BATCH)
        self.network = capture(model, self.calibration[0])
        self.fp32 = self.outputs(model)
        self.found = {}

    def outputs(self, model):
        with torch.inference_mode():
            return torch.cat([model(part) for part in self.parts])

    def fidelity(self, method, granularity, scheme):
        """(SQNR in dB, agreement) of a recipe, against float."""
        recipe = (method, granularity, scheme)
        if recipe not in self.found:
            made = quantize_network(self.network, Recipe(*recipe), self.calibration, fine_tune=self.trainer(recipe[0]))
            outputs = self.outputs(made)
            self.found[recipe] = metrics.sqnr_db(self.fp32, outputs), metrics.agreement(outputs, self.fp32)
        return self.found[recipe]

    def trainer(self, method):
        """What fine-tunes in a sweep."""
        if method != "qat":
            return None
        return methods.qat().trainer(self.network, [list(batch) for batch in self.fine_tuning()], lambda text: None)

    def sqnr_db(self, *recipe):
        return self.fidelity(*recipe)[0]

    def agreement(self, *recipe):
        return self.fidelity(*recipe)[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The checkout's own cache, if the main job has filled one: training takes over a minute."""
    kept = PROJECT / "results" / "cache"
    return str(kept if kept.is_dir() else tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def trained(request, cache):
    return Trained(request.param, cache)


@pytest.fixture(scope="module")
def efficientnet(cache):
    try:
        return Trained("efficientnet_lite0", cache)
    except TaskUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("method", ["woq", "ptsq"])
def test_a_scale_for_each_channel_beats_one_for_the_tensor(trained, method, scheme):
    """By more than 1 dB, also where the noise of the activations is on top."""
    assert trained.sqnr_db(method, "per_channel", scheme) > trained.sqnr_db(method, "per_tensor", scheme) + 1


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_groups_beat_channels(trained, scheme):
    assert trained.sqnr_db("woq", "per_group", scheme) > trained.sqnr_db("woq", "per_channel", scheme)


@pytest.mark.parametrize("trained", ["mobilenet_v2"], indirect=True)
def test_an_affine_weight_beats_a_symmetric_one_where_a_tensor_is_lopsided(trained):
    """As MobileNetV2's whole tensors are. ResNet-18's reach as far down as up, and there it is chance who wins."""
    assert trained.sqnr_db("woq", "per_tensor", "affine") > trained.sqnr_db("woq", "per_tensor", "symmetric")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_quantizing_activations_too_costs_fidelity(trained, granularity):
    assert trained.sqnr_db("woq", granularity, "symmetric") > trained.sqnr_db("ptsq", granularity, "symmetric")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_fine_tuning_takes_back_some_of_the_noise(trained, granularity):
    assert trained.sqnr_db("qat", granularity, "symmetric") > trained.sqnr_db("ptsq", granularity, "symmetric")


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_real_weights_collapse_per_tensor_and_hold_per_channel(efficientnet, scheme):
    """EfficientNet-Lite0: the depthwise weights' channels differ a hundredfold."""
    assert 2 < efficientnet.sqnr_db("woq", "per_tensor", scheme) < 6
    assert efficientnet.sqnr_db("woq", "per_channel", scheme) > 14
    assert efficientnet.sqnr_db("woq", "per_group", scheme) > efficientnet.sqnr_db("woq", "per_channel", scheme)
    agreements = [efficientnet.agreement("woq", g, scheme) for g in ("per_tensor", "per_channel")]
    assert agreements[0] < 0.65
    assert agreements[1] > agreements[0] + 0.15


def test_real_weights_are_lopsided_in_each_channel_too(efficientnet):
    assert efficientnet.sqnr_db("woq", "per_channel", "affine") > efficientnet.sqnr_db(
        "woq", "per_channel", "symmetric"
    )
