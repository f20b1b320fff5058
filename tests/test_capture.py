"""Capture: whatever shape a user's model has, the float program says the same, and every method runs it."""

import copy

import pytest
import torch
from programs import Apply
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from qbench.capture import CaptureError, capture
from qbench.metrics import sqnr_db
from qbench.quantization import quantize_network
from qbench.recipe import Recipe
from qbench.saved import load

BATCH_NORM = torch.ops.aten.batch_norm.default
LOWEST_SQNR_DB = 30.0  # of one or two layers; a layer with a wrong scale, bias or neighbour is below 20
INT8_METHODS = ("ptdq", "ptsq")


def settled(norm):
    """A batch norm with statistics and parameters that are far from the identity."""
    random = torch.Generator().manual_seed(norm.num_features)
    with torch.no_grad():
        norm.running_mean.normal_(generator=random)
        norm.running_var.uniform_(0.3, 3, generator=random)
        if norm.affine:
            norm.weight.uniform_(0.3, 3, generator=random)
            norm.bias.normal_(generator=random)
    return norm


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def programs(model, *inputs):
    """Every method's model for one capture, calibrated on the inputs themselves."""
    network = capture(model, inputs)
    return {name: quantize_network(network, Recipe(name), [inputs]) for name in ("fp32", "woq", "ptdq", "ptsq")}


def check(model, *inputs, int8=True):
    """The float program equals the model within 1e-5, int8 programs are near it and do all products in int8."""
    made = programs(model.eval(), *inputs)
    with torch.no_grad():
        want = model(*inputs)
    for name, program in made.items():
        got = program(*inputs)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert ours.shape == theirs.shape
            if name == "fp32":
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
            elif (noise := sqnr_db(theirs, ours)) is not None:
                assert noise > LOWEST_SQNR_DB, name
        if int8 and name in INT8_METHODS:
            assert program.int8_mac_fraction == 1.0
    return made


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def test_an_example_of_batch_1_gives_a_network_for_any_batch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    network = capture(model, (torch.randn(1, 3, 8, 8),))
    assert network.inputs == [{"shape": [None, 3, 8, 8], "dtype": "float32"}]
    program = quantize_network(network, Recipe("ptsq"), [(torch.randn(1, 3, 8, 8),)])
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(program(images), torch.cat([program(image[None]) for image in images]))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(5, 4)

    def forward(self, named, pair):
        a, b = self.first(named["a"]), self.second(pair[0])
        return {"sum": a + b, "parts": [a, (b * pair[1],)]}


def test_nested_inputs_and_outputs():
    check(Nested(), {"a": torch.randn(7, 6)}, (torch.randn(7, 5), torch.randn(7, 4)))


def test_nested_inputs_of_batch_1():
    network = capture(Nested().eval(), ({"a": torch.randn(1, 6)}, [torch.randn(1, 5), torch.randn(1, 4)]))
    assert [spec["shape"] for spec in network.inputs] == [[None, 6], [None, 5], [None, 4]]


class Variadic(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, first, *others, scale=2.0):
        return scale * self.layer(first) + sum(self.layer(other) for other in others)


def test_a_forward_with_star_arguments_and_defaults():
    check(Variadic(), torch.randn(7, 6), torch.randn(7, 6), torch.randn(7, 6))


def test_integer_inputs():
    check(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5)), torch.randint(0, 20, (4, 7)))


def test_uint8_images():
    class Pixels(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float() / 255)

    check(Pixels(nn.Conv2d(3, 4, 3)), torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8))


def test_what_comes_in_and_what_is_constant_may_go_out():
    model = Apply(lambda s, x: (s.layers[0](x), x, s.mask), nn.Linear(6, 4), mask=torch.ones(3))
    check(model, torch.randn(2, 6))


def test_a_size_of_the_input_may_be_part_of_the_arithmetic():
    check(Apply(lambda s, x: s.layers[0](x) * x.shape[0] + x.shape[1] / x.shape[0], nn.Linear(6, 4)), torch.randn(2, 6))


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(model, *inputs):
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_data_dependent_control_flow_is_refused_in_one_line():
    message = refusal(Apply(lambda s, x: x if x.sum() > 0 else -x), torch.randn(2, 3))
    assert message.startswith("torch.export cannot capture Apply: ")
    assert message.endswith("make its forward free of data-dependent Python, or pass dynamic_shapes=")


def test_a_fixed_batch_is_refused_not_specialised():
    assert "dynamic_shapes=" in refusal(Apply(lambda s, x: x.reshape(4, 3, 1)), torch.randn(4, 3))


def test_a_model_that_changes_its_own_state_is_refused():
    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls

    message = refusal(Apply(forward, calls=torch.zeros(())), torch.randn(2, 3))
    assert message == "the model changes its own state in forward; qbench needs a pure function of its inputs"


@pytest.mark.parametrize("inputs", [(), (3.0,), (torch.zeros(2, 3), "text")], ids=["none", "number", "text"])
def test_example_inputs_are_tensors(inputs):
    assert refusal(nn.Linear(3, 2), *inputs) == "example_inputs must be a tuple of tensors (nested allowed)"


def test_the_wrong_number_of_inputs_is_one_line():
    assert "missing a required argument" in refusal(Nested(), {"a": torch.randn(2, 6)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["woq", "ptdq", "ptsq"])
def test_a_network_that_is_not_float32_says_so(dtype, method):
    inputs = (torch.randn(4, 6, dtype=dtype),)
    network = capture(nn.Sequential(nn.Linear(6, 4)).to(dtype), inputs)
    name = str(dtype)[6:]
    with pytest.raises(ValueError, match=rf"^layer 0: the weight is {name}; make the model float32 first, with model"):
        quantize_network(network, Recipe(method), [inputs])


# --- normal form -----------------------------------------------------------------------------------------------------


def has_batch_norm(model, *inputs):
    return any(node.target is BATCH_NORM for node in capture(model.eval(), inputs).graph.nodes)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()), (4, 3, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dilation=2, stride=2), nn.BatchNorm2d(8)), (4, 4, 12, 12)),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False)), (4, 8, 9, 9)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)), (4, 3, 12)),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)), (9, 6)),
    ],
    ids=["conv", "grouped", "depthwise", "conv1d", "linear"],
)
def test_a_batch_norm_behind_a_layer_is_folded(model, shape):
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            settled(module)
    inputs = torch.randn(shape)
    assert not has_batch_norm(model, inputs)
    check(model, inputs)


def test_dropout_leaves_no_trace():
    network = capture(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(), (torch.randn(3, 4),))
    assert [node.target for node in network.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]


def test_a_batch_norm_before_a_padded_conv_stays():
    """Folding it forward would be wrong at the border: the padding is zero behind the batch norm, not before it."""
    model = nn.Sequential(settled(nn.BatchNorm2d(3)), nn.Conv2d(3, 8, 3, padding=1))
    inputs = torch.randn(4, 3, 9, 9)
    assert has_batch_norm(model, inputs)
    check(model, inputs)


def test_a_batch_norm_stays_when_something_else_reads_the_layer():
    model = Apply(lambda s, x: s.layers[1](y := s.layers[0](x)) + y, nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3)))
    inputs = torch.randn(4, 3, 9, 9)
    assert has_batch_norm(model, inputs)
    check(model, inputs)


@pytest.mark.parametrize("features", [5, 7])
def test_a_batch_norm_behind_a_linear_over_sequences_stays(features):
    """Its channels are dimension 1, the linear's outputs the last dimension, equal in size or not."""
    model = Apply(lambda s, x: s.layers[1](s.layers[0](x)), nn.Linear(6, features), settled(nn.BatchNorm1d(5)))
    inputs = torch.randn(4, 5, 6)
    assert has_batch_norm(model, inputs)
    check(model, inputs)


def test_folding_leaves_a_bias_alone_that_has_another_reader():
    def forward(self, x):
        convolution, norm = self.layers
        return norm(convolution(x)) + convolution.bias[:, None, None]

    check(Apply(forward, nn.Conv2d(3, 3, 1), settled(nn.BatchNorm2d(3))), torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("kernel", [2, 3, (4, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(kernel, dilation, padding):
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding, dilation=dilation), settled(nn.BatchNorm2d(4)))
    check(model, torch.randn(4, 3, 10, 10))


def test_named_padding_in_one_dimension():
    check(nn.Sequential(nn.Conv1d(3, 4, 4, padding="same", dilation=3), nn.ReLU()), torch.randn(4, 3, 20))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode):
    check(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU()), torch.randn(4, 3, 10, 10))


# --- one parameter, several readers ----------------------------------------------------------------------------------


def test_a_module_used_twice():
    made = check(Apply(lambda s, x: s.layers[0](s.layers[0](x).relu()), nn.Linear(6, 6)), torch.randn(9, 6))
    weights = [name for name in made["woq"].program.tensors if name.endswith("weight")]
    assert len(weights) == 1  # stored once


def test_a_module_used_twice_with_two_batch_norms_has_two_weights(tmp_path):
    def forward(self, x):
        convolution, before, behind = self.layers
        return behind(convolution(before(convolution(x))))

    model = Apply(forward, nn.Conv2d(3, 3, 3), settled(nn.BatchNorm2d(3)), settled(nn.BatchNorm2d(3)))
    inputs = torch.randn(4, 3, 9, 9)
    for name, program in check(model, inputs).items():
        program.save(tmp_path / name)
        assert torch.equal(load(tmp_path / name)(inputs), program(inputs))


def test_a_module_used_twice_with_one_batch_norm():
    model = Apply(lambda s, x: s.layers[1](s.layers[0](s.layers[0](x))), nn.Conv2d(3, 3, 3), settled(nn.BatchNorm2d(3)))
    check(model, torch.randn(4, 3, 9, 9))


class TiedEmbedding(nn.Module):
    """The embedding table is the weight of the last layer too: the float table must not be overwritten by its codes."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(functional.relu(self.hidden(self.table(x))))


def test_a_weight_tied_to_an_embedding():
    check(TiedEmbedding(), torch.randint(0, 20, (4, 7)))


def test_a_weight_that_is_an_operand_too():
    model = Apply(lambda s, x: torch.where(x > 0, s.layers[0](x), s.layers[0].weight), nn.Linear(6, 6))
    check(model, torch.randn(9, 6, 6))


def test_a_weight_that_is_computed_from_parameters():
    check(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), torch.randn(9, 6))


# --- the model itself ------------------------------------------------------------------------------------------------


def test_capture_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU(inplace=True), nn.Dropout())
    before = copy.deepcopy(model.state_dict())
    capture(model.train(), (torch.randn(2, 3, 8, 8),))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def overwritten(module, x):
    """What is read again after an activation in place is the activation."""
    x = 2 * x
    return functional.relu6(x, inplace=True) + x


def overwritten_through_a_view(module, x):
    x = 2 * x
    functional.relu_(x.flatten(1))
    return x


def overwritten_twice(module, x):
    return functional.hardswish(functional.relu_(2 * x), inplace=True)


@pytest.mark.parametrize("function", [overwritten, overwritten_through_a_view, overwritten_twice])
def test_activations_in_place(function):
    x = torch.randn(3, 4, 5)
    graph = capture(Apply(function), (x,))
    assert torch.equal(graph.module()(x)[0], function(None, x))
