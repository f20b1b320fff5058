"""Fusion: what becomes one node, what must not, and that the program reads as what it does."""

import re

import pytest
import torch
from programs import Apply
from torch import nn
from torch.nn import functional

from qbench import float_ops
from qbench.capture import capture
from qbench.fusion import fuse
from qbench.metrics import sqnr_db
from qbench.quantization import quantize_network
from qbench.recipe import Recipe

LOWEST_SQNR_DB = 30.0
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(outputs)
        return nn.Conv2d(3, outputs, 3, padding=1)


def calls(function, *modules, inputs=IMAGES, keep_float=()):
    """The fused nodes of a network as `name(bounds, residual)`, after a check that fusing changed no value."""
    model = Apply(function, *modules).eval()
    network = capture(model, (inputs,))
    fused = fuse(network, set(keep_float))
    with torch.no_grad():
        torch.testing.assert_close(fused.module()(inputs)[0], model(inputs), rtol=1e-6, atol=1e-6)
    noise = sqnr_db(model(inputs).detach(), quantize_network(network, Recipe(), [(inputs,)])(inputs))
    assert noise is None or noise > LOWEST_SQNR_DB
    return [described(node) for node in fused.graph.nodes if node.op == "call_function"]


def described(node):
    name = getattr(node.target, "__name__", str(node.target))
    extras = ["residual"] if node.kwargs.get("residual") is not None else []
    extras += [f"{bound}={node.kwargs[bound]:g}" for bound in ("low", "high") if node.kwargs.get(bound) is not None]
    return f"{name}({', '.join(extras)})"


# --- what is one node ------------------------------------------------------------------------------------------------


def test_a_residual_and_a_relu_join_their_layer():
    assert calls(lambda s, x: functional.relu(s.layers[0](x) + x), conv()) == ["conv(residual, low=0)"]


def test_the_residual_may_stand_on_either_side():
    assert calls(lambda s, x: functional.relu(x + s.layers[0](x)), conv()) == ["conv(residual, low=0)"]


def test_a_linear_takes_a_residual_too():
    assert calls(lambda s, x: s.layers[0](x) + x, nn.Linear(8, 8)) == ["linear(residual)"]


def test_of_two_layers_that_are_added_one_is_the_residual_of_the_other():
    fused = calls(lambda s, x: functional.relu(s.layers[0](x) + s.layers[1](x)), conv(), conv())
    assert fused == ["conv()", "conv(residual, low=0)"]


@pytest.mark.parametrize(
    ("clamp", "bounds"),
    [
        (functional.relu, "low=0"),
        (functional.relu6, "low=0, high=6"),
        (nn.Hardtanh(-0.5, 0.25), "low=-0.5, high=0.25"),
        (lambda x: x.clamp(max=0.1), "high=0.1"),
        (lambda x: torch.clip(x, -0.1, 0.2), "low=-0.1, high=0.2"),
        (lambda x: x.clamp_min(0.05), "low=0.05"),
        (lambda x: functional.relu6(x).clamp(-1, 0.3), "low=0, high=0.3"),
    ],
    ids=["relu", "relu6", "hardtanh", "max", "clip", "min", "two"],
)
def test_a_clamp_narrows_the_codes_of_its_node(clamp, bounds):
    assert calls(lambda s, x: clamp(s.layers[0](x)), conv()) == [f"conv({bounds})"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda s, x: functional.relu(x + x.flip(3)), "add"),
        (lambda s, x: functional.relu(x * x.flip(3)), "mul"),
        (lambda s, x: functional.relu(x.mean((2, 3))), "mean"),
        (lambda s, x: functional.relu(functional.avg_pool2d(x, 2)), "average_pool"),
        (lambda s, x: functional.relu(functional.adaptive_avg_pool2d(x, 2)), "adaptive_average_pool"),
    ],
    ids=["add", "mul", "mean", "average_pool", "adaptive_average_pool"],
)
def test_a_clamp_joins_what_rounds(function, name):
    assert calls(function)[-1] == f"{name}(low=0)"


# --- what is not -----------------------------------------------------------------------------------------------------


def test_a_layer_that_is_read_twice_keeps_its_own_result():
    """Were the sum fused into the layer, the second reader would have no value to read."""

    def forward(self, x):
        y = self.layers[0](x)
        return torch.cat([functional.relu(y + x), y], 1)

    assert calls(forward, conv()) == ["conv()", "add(low=0)", "cat()"]


def test_a_sum_that_is_read_twice_keeps_its_values_below_zero():
    def forward(self, x):
        y = self.layers[0](x) + x
        return functional.relu(y) - y

    assert calls(forward, conv()) == ["conv(residual)", "clamp()", "add()"]


def test_a_residual_that_is_broadcast_is_a_sum_of_its_own():
    fused = calls(lambda s, x: s.layers[0](x) + x.mean((2, 3), keepdim=True), conv())
    assert fused == ["conv()", "mean()", "add()"]


def test_a_layer_that_is_broadcast_is_no_place_for_the_residual():
    fused = calls(lambda s, x: s.layers[0](x.mean((2, 3), keepdim=True)) + x, nn.Conv2d(3, 3, 1))
    assert fused == ["mean()", "conv()", "add()"]


@pytest.mark.parametrize("alpha", [2, -1])
def test_a_scaled_residual_is_a_sum_of_its_own(alpha):
    assert calls(lambda s, x: torch.add(s.layers[0](x), x, alpha=alpha), conv()) == ["conv()", "add()"]


def test_a_difference_is_a_sum_of_its_own():
    assert calls(lambda s, x: s.layers[0](x) - x, conv()) == ["conv()", "add()"]


def test_a_relu_before_the_sum_stays_before_it():
    assert calls(lambda s, x: functional.relu(s.layers[0](x)) + x, conv()) == ["conv(low=0)", "add()"]


def test_a_second_residual_is_a_sum_of_its_own():
    fused = calls(lambda s, x: s.layers[0](x) + x + x.flip(3), conv())
    assert sorted(fused) == ["add()", "conv(residual)", "flip.default()"]


def test_a_table_function_between_layer_and_sum_stays_between_them():
    fused = calls(lambda s, x: functional.silu(s.layers[0](x)) + x, conv())
    assert fused == ["conv()", "unary()", "add()"]


def test_a_constant_is_no_residual():
    model = Apply(lambda s, x: s.layers[0](x) + s.shift, conv(), shift=torch.ones(1, 3, 8, 8))
    fused = fuse(capture(model.eval(), (IMAGES,)), set())
    assert [described(node) for node in fused.graph.nodes if node.op == "call_function"] == ["conv()", "add()"]


def test_a_layer_that_is_kept_takes_nothing():
    model = Apply(lambda s, x: functional.relu(s.layers[0](x) + x), conv()).eval()
    fused = fuse(capture(model, (IMAGES,)), {"layers.0"})
    targets = [node.target for node in fused.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.conv2d.default, float_ops.add]


# --- the program -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The residual block of ResNet, with a strided neighbour."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))
        return self.head(functional.adaptive_avg_pool2d(functional.max_pool2d(x, 2), 1).flatten(1))


@pytest.fixture(scope="module")
def block():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Block().eval(), (IMAGES,))


def program(network, **options):
    return quantize_network(network, Recipe(**options), [(IMAGES,)])


def operations(model):
    return [
        (node.name, str(node.target).removesuffix(".default").removeprefix("qbench."))
        for node in model.program.graph.nodes
        if node.op == "call_function" and "sym_size" not in str(node.target)
    ]


def test_the_static_program_is_one_line_for_each_fused_node(block):
    """One quantize at the entrance, no dequantize: the head leaves its accumulator."""
    assert operations(program(block)) == [
        ("quantize_default", "quantize"),
        ("stem_0", "conv"),
        ("first", "conv"),
        ("shortcut", "conv"),
        ("second", "conv"),
        ("max_pool2d", "aten.max_pool2d"),
        ("adaptive_average_pool", "adaptive_average_pool"),
        ("view", "aten.reshape"),
        ("head", "linear"),
    ]


def test_with_int8_output_the_one_dequantize_is_the_last_call(block):
    calls = operations(program(block, output="int8"))
    assert [kind for _, kind in calls].count("quantize") == 1
    assert [kind for _, kind in calls].count("dequantize") == 1
    assert calls[-1][1] == "dequantize"


def test_the_code_names_the_layers_and_their_operands(block):
    code = program(block).code
    for layer in ("stem_0", "first", "second", "shortcut", "head"):
        assert re.search(rf"\b{layer} = torch\.ops\.qbench\.(conv|linear)\.default\(", code)
    assert "second = torch.ops.qbench.conv.default(first, shortcut, " in code
    assert len(code.splitlines()) < 60


def test_the_dynamic_and_weight_only_programs_name_their_layers_too(block):
    assert "stem_0 = torch.ops.qbench.dynamic_conv.default(" in program(block, method="ptdq").code
    assert "head = torch.ops.qbench.weight_only_linear.default(" in program(block, method="woq").code


def test_what_stays_in_float_is_listed(block):
    assert program(block).float_ops == []
    assert program(block, method="ptdq").float_ops == [
        "relu: aten.relu.default",
        "relu_1: aten.relu.default",
        "add: aten.add.Tensor",
        "relu_2: aten.relu.default",
        "max_pool2d: aten.max_pool2d.default",
        "adaptive_avg_pool2d: aten.adaptive_avg_pool2d.default",
        "view: aten.reshape.default",
    ]
