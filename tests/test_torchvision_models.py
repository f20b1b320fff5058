"""Networks that nobody adapted: torchvision's classifiers as they come, under woq, ptdq and ptsq.

Their weights are random, as torchvision initialises them, with two changes that make the figures below tell something.
Batch norms have the statistics of a few forwards and a bias of 1: with a bias of 0 a random network of this depth is
chaotic (rounding noise of the weights alone, put there by hand, leaves MobileNetV2 9 dB), while in a trained one it is
not. And the SQNR is that of the results with their mean over the images removed: what is the same for every image would
flatter.
"""

import pytest
import torch
import torchvision
from test_native import engines, running
from torch import nn
from torch.nn import functional

from qbench.backends import native, reference
from qbench.capture import capture
from qbench.layers import Recorder
from qbench.metrics import sqnr_db
from qbench.model import QuantizedModel
from qbench.native import sources
from qbench.program import Macs, Program, lower_graph
from qbench.quantization import quantize_network
from qbench.recipe import Recipe
from qbench.saved import load

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
BATCH = 16

# The lowest SQNR in dB under woq, ptdq, ptsq: what was measured less 3 dB. One broken layer gives at most 4 dB.
FLOORS_DB = {
    "resnet18": (24, 21, 19),
    "squeezenet1_1": (25, 20, 17),
    "shufflenet_v2_x0_5": (20, 15, 13),
    "mobilenet_v3_small": (21, 17, 14),
    "efficientnet_b0": (20, 14, 9),
    "densenet121": (19, 19, 16),
}
SLOW = {"densenet121"}
METHODS = ("woq", "ptdq", "ptsq")


def images(seed, count=BATCH):
    """Smooth shapes with some noise: images of noise alone are all alike to a network."""
    random = torch.Generator().manual_seed(seed)
    shapes = functional.interpolate(torch.randn(count, 3, 4, 4, generator=random), (SIZE, SIZE), mode="bilinear")
    return 1.5 * shapes + 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=random)


def settled(name):
    """The model with settled batch norms, in evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, num_classes=100).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain average
                nn.init.ones_(module.bias)
        for seed in range(3):
            model(images(seed))
    return model.eval()


def apart(results):
    """What tells the images apart."""
    return results - results.mean(0)


class Case:
    """A network with its capture, its quantized models and their results on one batch."""

    def __init__(self, name):
        self.model = settled(name)
        self.calibration = [(images(10),), (images(11),)]
        self.inputs = images(20)
        with torch.inference_mode():
            self.want = self.model(self.inputs)
        self.network = capture(self.model, self.calibration[0])
        self.quantized = {m: quantize_network(self.network, Recipe(m), self.calibration) for m in METHODS}
        self.results = {method: model(self.inputs) for method, model in self.quantized.items()}

    def sqnr_db(self, results):
        return sqnr_db(apart(self.want), apart(results))


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FLOORS_DB]
)
def case(request):
    return Case(request.param)


@pytest.fixture
def floors(request):
    return dict(zip(METHODS, FLOORS_DB[request.node.callspec.params["case"]], strict=True))


def test_the_capture_says_what_the_model_says(case):
    program = quantize_network(case.network, Recipe("fp32"))
    noise = case.sqnr_db(program(case.inputs))
    assert noise is None or noise > 80  # folded batch norms round differently, nothing else


def test_every_method_stays_above_its_floor(case, floors):
    found = {method: case.sqnr_db(results) for method, results in case.results.items()}
    assert all(found[method] > floors[method] for method in METHODS), found


def test_all_products_are_int8_or_none(case):
    assert {method: model.int8_mac_fraction for method, model in case.quantized.items()} == {
        "woq": 0.0,
        "ptdq": 1.0,
        "ptsq": 1.0,
    }


def test_the_static_program_has_one_quantize_and_no_float(case):
    model = case.quantized["ptsq"]
    calls = [str(node.target) for node in model.program.graph.nodes if node.op == "call_function"]
    assert calls.count("qbench.quantize.default") == 1
    assert "qbench.dequantize.default" not in calls[:-1]  # at most the last, where no layer leaves its accumulator
    assert model.float_ops == []


def test_a_saved_model_answers_bit_for_bit(case, tmp_path):
    for method, model in case.quantized.items():
        model.save(tmp_path / method)
        assert torch.equal(load(tmp_path / method)(case.inputs[:4]), model(case.inputs[:4])), method


def test_static_results_do_not_depend_on_batch_or_threads(case):
    torch.set_num_threads(2)
    try:
        parts = [case.quantized["ptsq"](part) for part in case.inputs.split([1, 4, 11])]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(parts), case.results["ptsq"])


@pytest.mark.skipif(not sources.built(), reason="the native backend is not built here")
def test_every_path_of_the_engine_answers_as_the_reference(case):
    """ptsq: the same bytes; woq: float sums in another order."""
    x = case.inputs[:2]
    for method in ("ptsq", "woq"):
        model = case.quantized[method]
        want = QuantizedModel(model.program, model.recipe, reference())(x)
        for path, engine in engines().items():
            with running(engine):
                got = QuantizedModel(model.program, model.recipe, native())(x)
            assert torch.equal(got, want) if method == "ptsq" else sqnr_db(want, got) > 90, (method, path)


def test_dynamic_layers_give_each_image_its_own_bytes(case):
    """ptdq by row: fed with the same float values, an int8 layer answers the same alone and in a batch."""
    model = case.quantized["ptdq"]
    recorder = Recorder(lower_graph(model.program, model.backend, Macs()))
    recorder.run(case.inputs[:4])
    layers = [node for node in recorder.module.graph.nodes if "dynamic" in getattr(node.target, "__name__", "")]
    assert len(layers) == sum("dynamic" in str(node.target) for node in model.program.graph.nodes) > 10
    for node in layers:
        values = recorder.kept[node.args[0].name]
        alone = torch.cat([node.target(values[i : i + 1]) for i in range(4)])
        assert torch.equal(alone, recorder.kept[node.name]), node.name


# --- do the floors mean anything? ------------------------------------------------------------------------------------


def damaged(model, layer):
    """The model with the output channels of one layer's weight shifted by one: an ordinary bug of an index."""
    program = model.program
    name = next(node for node in program.graph.nodes if node.name == layer).kwargs["weight"].target
    tensors = program.tensors | {name: program.tensors[name].roll(1, 0)}
    return QuantizedModel(Program(program.graph, tensors, program.inputs, program.outputs), {}, model.backend)


@pytest.mark.parametrize("case", ["squeezenet1_1"], indirect=True)
def test_one_broken_layer_of_many_falls_below_the_floor(case, floors):
    model = case.quantized["ptsq"]
    layers = [node.name for node in model.program.graph.nodes if "weight" in node.kwargs]
    found = {layer: case.sqnr_db(damaged(model, layer)(case.inputs)) for layer in layers}
    assert max(found.values()) < floors["ptsq"], found
