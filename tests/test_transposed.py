"""Transposed convolutions in all methods against loops over Python's integers, and what surrounds them in a GAN."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import F32
from programs import Apply, grid, on_grid, run_op, sqnr_db
from torch import Tensor, nn
from torch.nn import functional

import qbench
from qbench import numerics
from qbench.calibrate import INTEGER, calibrate
from qbench.capture import Network, capture
from qbench.checked import check_call
from qbench.convert import static_program
from qbench.layers import Recorder, layer_table
from qbench.program import Macs, lower_graph
from qbench.quantization import quantize_network
from qbench.recipe import option
from qbench.simulate import simulate_node

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP_SIZE = 3
STATIC = [
    {"granularity": granularity, "scheme": scheme, "activation_scheme": activation_scheme, "output": output}
    for granularity in ("per_tensor", "per_channel", "per_group")
    for scheme, activation_scheme in (("symmetric", "affine"), ("affine", "symmetric"))
    for output in ("float", "int8")
]
DYNAMIC = [
    {"granularity": granularity, "scheme": scheme, "activation_granularity": rows}
    for granularity in ("per_tensor", "per_channel", "per_group")
    for scheme, rows in (("symmetric", "per_row"), ("affine", "per_tensor"))
]


def name_of(recipe: dict[str, str]) -> str:
    return "-".join(recipe.values())


def by_output(weight: np.ndarray, groups: int) -> np.ndarray:
    """[inputs, outputs / groups, ...] as [outputs, inputs / groups, ...], one element at a time."""
    inputs, share = weight.shape[0] // groups, weight.shape[1]
    result = np.zeros((share * groups, inputs, *weight.shape[2:]), weight.dtype)
    for i, o in np.ndindex(*weight.shape[:2]):
        result[i // inputs * share + o, i % inputs] = weight[i, o]
    return result


@dataclass
class Branch:
    """A transposed convolution, what follows it, and its parameters as the oracle takes them."""

    module: Any
    apply: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    low: float | None = None
    high: float | None = None
    residual: bool = False  # adds its own input
    folded: tuple[np.ndarray, np.ndarray] | None = None  # weight (by output) and bias after a batch norm
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def layer(self) -> Any:
        return self.module[0] if isinstance(self.module, nn.Sequential) else self.module

    def parameters(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.folded is not None:
            return self.folded
        bias = self.layer.bias
        return by_output(self.layer.weight.numpy(), self.layer.groups), None if bias is None else bias.numpy()

    def sums(self, x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
        """[blocks, ...]; a line is an image of height 1."""
        window = [getattr(self.layer, name) for name in ("stride", "padding", "output_padding", "dilation")]
        if weight.ndim == 4:
            return oracle.transposed_sums(x, weight, block, *window, self.layer.groups)
        flat = [(fill, *sizes) for fill, sizes in zip((1, 0, 0, 1), window, strict=True)]
        return oracle.transposed_sums(x[:, :, None], weight[:, :, None], block, *flat, self.layer.groups)[:, :, :, 0]

    def floats(self, x: np.ndarray) -> np.ndarray:
        """The float result before its clamp, exact because everything lies on a grid."""
        if "floats" not in self.cache:
            weight, bias = self.parameters()
            result = self.sums(x, weight, weight.shape[1])[0].astype(float)
            if bias is not None:
                result += bias.reshape(-1, *[1] * (weight.ndim - 2))
            self.cache["floats"] = result + x if self.residual else result
        return self.cache["floats"]

    def static(self, x: np.ndarray, calibration: np.ndarray, recipe: dict[str, str]) -> np.ndarray:
        """The result of the static layer as float32."""
        values, bias = self.parameters()
        scheme = recipe["activation_scheme"]
        read = oracle.choose(float(calibration.min()), float(calibration.max()), scheme, 128)
        weight = oracle.weight(values, recipe["granularity"], recipe["scheme"], GROUP_SIZE, bias, read.scale)
        y = oracle.result_range(self.floats(calibration), scheme, self.low, self.high)
        codes = oracle.codes(x, read)
        sums = self.sums(codes - read.zero_point, weight.centred, weight.block)
        added = (codes, read) if self.residual else (None, None)
        result = oracle.layer(sums, 1, weight, bias, read, y if recipe["output"] == "int8" else None, *added)
        return oracle.real(result, y) if recipe["output"] == "int8" else oracle.clamped(result, self.low, self.high)

    def dynamic(self, x: np.ndarray, recipe: dict[str, str]) -> np.ndarray:
        """f32(acc) * (s_x * s_w) + b, block by block; each sample, or the whole batch, with its own scale."""
        values, bias = self.parameters()
        weight = oracle.weight(values, recipe["granularity"], recipe["scheme"], GROUP_SIZE)
        codes, scales = np.zeros(x.shape, np.int64), np.zeros(len(x), np.float32)
        for part in range(len(x)) if recipe["activation_granularity"] == "per_row" else [...]:
            q = oracle.choose(float(x[part].min()), float(x[part].max()), "affine", 128)
            codes[part], scales[part] = oracle.codes(x[part], q) - q.zero_point, q.scale
        sums = self.sums(codes, weight.centred, weight.block)
        result = np.zeros(sums.shape[1:], np.float32)
        for index in np.ndindex(*result.shape):
            products = [scales[index[0]] * F32(q.scale) for q in weight.q[index[1]]]
            total = oracle.layer_value([block[index] for block in sums], products)
            result[index] = total if bias is None else total + F32(float(bias[index[1]]))
        return result


def captured(branches: dict[str, Branch], x: Tensor) -> Network:
    """One network with a result for each branch."""
    applied = list(branches.values())
    model = Apply(
        lambda self, x: tuple(b.apply(layer, x) for b, layer in zip(applied, self.layers, strict=True)),
        *(branch.module for branch in applied),
    )
    return capture(model, (x,))


IMAGES, LINES = grid(2, 4, 3, 2, seed=1), grid(2, 4, 5, seed=2)
WIDER_IMAGES, WIDER_LINES = grid(2, 4, 3, 2, seed=3, limit=20), grid(2, 4, 5, seed=4, limit=20)


@functools.cache
def images() -> tuple[Network, dict[str, Branch]]:
    up = nn.ConvTranspose2d
    branches = {
        "plain": Branch(up(4, 3, 3)),
        "padded": Branch(up(4, 3, 3, padding=1)),
        "the generator's": Branch(up(4, 3, 4, stride=2, padding=1, bias=False)),
        "output padding": Branch(up(4, 2, 3, stride=2, padding=1, output_padding=1)),
        "output padding beyond the padding": Branch(up(4, 2, 2, stride=3, output_padding=2)),
        "gaps between the taps": Branch(up(4, 2, (1, 2), stride=(2, 3))),
        "dilated": Branch(up(4, 2, 2, dilation=(3, 2), padding=(1, 0), output_padding=(2, 1))),
        "asymmetric": Branch(up(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), output_padding=(1, 0))),
        "padded by all but one": Branch(up(4, 2, 3, padding=(2, 1))),
        "grouped": Branch(up(4, 6, 3, groups=2, stride=2)),
        "depthwise": Branch(up(4, 4, 3, groups=4, stride=2, padding=1)),
        "depth multiplier": Branch(up(4, 8, 2, groups=4, bias=False)),
        "one output": Branch(up(4, 1, 3, padding=1)),
        "relu": Branch(up(4, 3, 2), apply=lambda m, x: m(x).relu(), low=0.0),
        "hardtanh": Branch(up(4, 3, 2), apply=lambda m, x: functional.hardtanh(m(x), -0.5, 0.75), low=-0.5, high=0.75),
        "residual": Branch(up(4, 4, 3, padding=1), apply=lambda m, x: m(x) + x, residual=True),
        "residual first, relu": Branch(
            up(4, 4, 3, padding=1, groups=2), apply=lambda m, x: (x + m(x)).relu(), residual=True, low=0.0
        ),
        "output size asked for": Branch(up(4, 2, 3, stride=2), apply=lambda m, x: m(x, output_size=[7, 5])),
    }
    for seed, branch in enumerate(branches.values()):
        on_grid(branch.module, seed)
    return captured(branches, IMAGES), branches


@functools.cache
def lines() -> tuple[Network, dict[str, Branch]]:
    up = nn.ConvTranspose1d
    branches = {
        "plain": Branch(up(4, 3, 3)),
        "strided": Branch(up(4, 3, 4, stride=2, padding=1, bias=False)),
        "output padding": Branch(up(4, 2, 3, stride=3, padding=1, output_padding=2)),
        "dilated": Branch(up(4, 5, 3, dilation=3, padding=2, output_padding=1)),
        "grouped": Branch(up(4, 6, 2, groups=2, stride=2)),
        "depth multiplier": Branch(up(4, 8, 3, groups=4, padding=1)),
        "residual and relu": Branch(
            up(4, 4, 3, padding=1), apply=lambda m, x: (m(x) + x).relu(), residual=True, low=0.0
        ),
    }
    for seed, branch in enumerate(branches.values()):
        on_grid(branch.module, seed)
    return captured(branches, LINES), branches


@functools.cache
def with_batch_norms() -> tuple[Network, dict[str, Branch]]:
    """The standard deviation is 2 exactly: variance 3.75 + eps 0.25 = 4."""
    branches = {}
    for name, layer in (
        ("conv", nn.ConvTranspose2d(4, 6, 3, bias=False)),
        ("with bias", nn.ConvTranspose2d(4, 6, 2, stride=2)),
        ("grouped", nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1)),
    ):
        norm = nn.BatchNorm2d(6, eps=0.25)
        norm.running_mean, norm.running_var = grid(6, seed=7), torch.full((6,), 3.75)
        module = nn.Sequential(on_grid(layer, 40), on_grid(norm, 50), nn.ReLU())
        gamma, weight = norm.weight.double().numpy() / 2, by_output(layer.weight.double().numpy(), layer.groups)
        bias = 0.0 if layer.bias is None else layer.bias.double().numpy()
        shift = (bias - norm.running_mean.numpy()) * gamma + norm.bias.double().numpy()
        folded = (weight * gamma.reshape(-1, 1, 1, 1)).astype(np.float32), shift.astype(np.float32)
        branches[name] = Branch(module, low=0.0, folded=folded)
    return captured(branches, IMAGES), branches


def check(network: Network, branches: dict[str, Branch], q: Any, x: Tensor, want: Callable[..., np.ndarray]) -> None:
    results = q(x)
    assert (q.int8_mac_fraction, q.float_ops) == (1.0, [])
    for (name, branch), result in zip(branches.items(), results, strict=True):
        expected = want(branch)
        assert result.numpy().dtype == expected.dtype == np.float32, name
        assert np.array_equal(result.numpy(), expected), name


@pytest.mark.parametrize("recipe", STATIC, ids=name_of)
@pytest.mark.parametrize(
    ("made", "calibration", "x"),
    [(images, IMAGES, WIDER_IMAGES), (lines, LINES, WIDER_LINES), (with_batch_norms, IMAGES, WIDER_IMAGES)],
    ids=["images", "lines", "batch norms"],
)
def test_static(made: Callable[[], Any], calibration: Tensor, x: Tensor, recipe: dict[str, str]) -> None:
    network, branches = made()
    q = quantize_network(network, qbench.Recipe(group_size=GROUP_SIZE, **recipe), [(calibration,)])
    check(network, branches, q, x, lambda branch: branch.static(x.numpy(), calibration.numpy(), recipe))


@pytest.mark.parametrize("recipe", DYNAMIC, ids=name_of)
@pytest.mark.parametrize(("made", "x"), [(images, IMAGES), (lines, LINES)], ids=["images", "lines"])
def test_dynamic(made: Callable[[], Any], x: Tensor, recipe: dict[str, str]) -> None:
    _, branches = made()
    layers = {name: Branch(branch.layer) for name, branch in branches.items() if not branch.residual}
    network = captured(layers, x)
    q = quantize_network(network, qbench.Recipe(method="ptdq", group_size=GROUP_SIZE, **recipe))
    check(network, layers, q, x, lambda branch: branch.dynamic(x.numpy(), recipe))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize(("made", "x"), [(images, IMAGES), (lines, LINES)], ids=["images", "lines"])
def test_weight_only(made: Callable[[], Any], x: Tensor, granularity: str) -> None:
    """The float layer on the weights that the int8 ones stand for."""
    network, branches = made()
    recipe = qbench.Recipe(method="woq", granularity=granularity, scheme="affine", group_size=GROUP_SIZE)
    q = quantize_network(network, recipe)
    results = q(x)
    assert q.int8_mac_fraction == 0.0
    assert len(q.float_ops) >= len(branches)
    for (name, branch), result in zip(branches.items(), results, strict=True):
        stored = oracle.weight(branch.parameters()[0], granularity, "affine", GROUP_SIZE).real
        layer = copy.deepcopy(branch.module)
        groups = layer.groups
        # back to torch's form: the same exchange within each group
        layer.weight.data = torch.from_numpy(by_output(stored, groups))
        assert torch.allclose(result, branch.apply(layer, x), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_close_to_torch(method: str) -> None:
    """Trained-like weights: what is lost is quantization noise only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, groups=4), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3, 1, 2, dilation=2),
        ).eval()  # fmt: skip
        x = torch.randn(16, 8, 5, 5)
    q = qbench.quantize(model, (x,), qbench.Recipe(method=method), calibration=[(x,)])
    assert sqnr_db(model(x), q(x)) > 35


# --- the arithmetic at its ends --------------------------------------------------------------------------------------


def arguments(weight: np.ndarray, **changed: Any) -> dict[str, Any]:
    """Of a static transposed convolution with unit scales that hands over its accumulator."""
    return {
        "weight": weight.astype(np.int8),
        "weight_scale": np.ones((1, 1), np.float32),
        "weight_zero_point": None,
        "bias": None,
        "block": weight.shape[1],
        **{"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "output_padding": [0, 0]},
        **{"x_scale": 1.0, "x_zero_point": 0, "scale": None, "zero_point": 0, "q_min": 0, "q_max": 255},
        **changed,
    }


def test_the_largest_sums_are_exact() -> None:
    """4095 x 16 products of 255 and 127 meet in one pixel: 2^31 - 25 k, where float32 has steps of 128."""
    inputs = 4095
    x, weight = np.full((1, inputs, 4, 4), 255), np.full((1, inputs, 4, 4), 127)
    weight[0, 0, 0, 0] = 126  # an odd sum
    y = run_op("conv_transpose", x, **arguments(weight, padding=[3, 3]))
    total = 255 * (127 * 16 * inputs - 1)
    assert total < 2**31
    assert y.tolist() == [[[[float(F32(total))]]]]
    bias = np.array([-total + 1], np.int32)  # and what float32 sums would have lost is still there
    assert run_op("conv_transpose", x, **arguments(weight, padding=[3, 3], bias=bias)).tolist() == [[[[1.0]]]]


def test_a_sum_that_could_overflow_is_refused() -> None:
    layer = nn.ConvTranspose2d(4200, 1, 4, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.zeros(1, 4200, 1, 1)
    with pytest.raises(ValueError, match=r"its int32 sum may reach 2176272000, the bound is 2147483647"):
        qbench.quantize(layer, (x,), calibration=[(x,)])


def test_a_padding_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"a padding of 2 x 1 leaves nothing of a result of 3 x 3"):
        run_op("conv_transpose", np.zeros((1, 2, 2, 2)), **arguments(np.ones((1, 2, 2, 2)), padding=[2, 1]))


def test_multiply_accumulates_by_hand() -> None:
    """4 -> 6 in 2 groups, 3 x 3, from 5 x 4 pixels: 20 * 9 taps * 4 inputs * 3 outputs = 2160, whatever the stride."""
    x = grid(3, 4, 5, 4, seed=2)
    network = capture(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, padding=1, output_padding=1), (x,))
    for method, int8 in (("fp32", False), ("woq", False), ("ptdq", True), ("ptsq", True)):
        q = quantize_network(network, qbench.Recipe(method=method), [(x,)])
        q(x[:1])
        q(x)
        assert (q.macs.int8, q.macs.float32) == ((4 * 2160, 0) if int8 else (0, 4 * 2160)), method


# --- a generator and its surroundings --------------------------------------------------------------------------------


def generator() -> nn.Module:
    """Latents [N, 8, 1, 1] to images [N, 1, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
            *(nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2), nn.PReLU()),
            *(nn.ConvTranspose2d(8, 1, 3, 1, 1), nn.Tanh()),
        )
        model.train()(torch.randn(64, 8, 1, 1))
    return model.eval().requires_grad_(False)


LATENTS = torch.randn(64, 8, 1, 1, generator=torch.Generator().manual_seed(1))


@functools.cache
def generated() -> Network:
    return capture(generator(), (LATENTS,))


def quantized(**recipe: Any) -> qbench.QuantizedModel:
    return quantize_network(generated(), qbench.Recipe(group_size=5, **recipe), [(LATENTS,)])


def test_activations_are_tables_and_batch_norms_are_folded() -> None:
    q = quantized()
    assert q.float_ops == []
    targets = [str(node.target).split(".")[1] for node in q.program.graph.nodes if node.op == "call_function"]
    assert targets == [
        "quantize", "conv_transpose", "conv_transpose", "table", "conv_transpose", "table", "conv_transpose", "table",
        "dequantize",
    ]  # fmt: skip
    assert sqnr_db(generator()(LATENTS), q(LATENTS)) > 25


RECIPES = [
    {"method": "ptsq", "granularity": "per_tensor"},
    {"method": "ptsq", "granularity": "per_group", "scheme": "affine"},
    {"method": "ptdq", "granularity": "per_group"},
    {"method": "woq"},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_saved_and_loaded_bit_for_bit(recipe: dict[str, str], tmp_path: Path) -> None:
    q = quantized(**recipe)
    q.save(tmp_path / "m.qb")
    loaded = qbench.load(tmp_path / "m.qb")
    assert torch.equal(loaded(LATENTS), q(LATENTS))
    assert loaded.code == q.code


@pytest.mark.parametrize("recipe", RECIPES[:3], ids=name_of)
def test_the_bytes_depend_on_neither_batch_nor_threads(recipe: dict[str, str]) -> None:
    q = quantized(**recipe)
    whole, threads = q(LATENTS), torch.get_num_threads()
    alone = torch.cat([q(LATENTS[i : i + 1]) for i in range(8)])
    torch.set_num_threads(2)
    both = q(LATENTS)
    torch.set_num_threads(threads)
    if recipe["method"] == "ptsq":
        assert torch.equal(alone, whole[:8])
        assert torch.equal(both, whole)
    else:  # between its layers are torch's own float operations
        assert torch.allclose(alone, whole[:8], atol=1e-5)


def test_fake_quantization_agrees_layer_by_layer() -> None:
    """Each node fed with the int8 program's own values: at most one step apart, and one element in a thousand."""
    for granularity, scheme in (("per_channel", "symmetric"), ("per_group", "affine")):
        plan = calibrate(generated(), qbench.Recipe(granularity=granularity, scheme=scheme, group_size=5), [[LATENTS]])
        recorder = Recorder(lower_graph(static_program(plan), option("backend", "reference"), Macs()))
        recorder.run(LATENTS)

        def real(name: str, plan: Any = plan, recorder: Recorder = recorder) -> Tensor:
            value, q = recorder.kept[name], plan.qparams.get(name)
            return value if value.is_floating_point() else numerics.dequantize(value, q.scale, q.zero_point)

        nodes = [node for node in plan.network.graph.nodes if node.target in INTEGER]
        assert len(nodes) == 7
        for node in nodes:
            inputs = {source.name: real(source.name) for source in node.all_input_nodes if source.op != "get_attr"}
            q = plan.qparams[node.name]
            codes = (simulate_node(plan, node, inputs).double() / q.scale).round() + q.zero_point
            apart = (codes - recorder.kept[node.name].double()).abs()
            assert apart.max() <= 1
            assert (apart > 0).double().mean() <= 1e-3


@pytest.mark.parametrize("method", ["woq", "ptdq", "ptsq"])
def test_the_per_layer_table(method: str) -> None:
    recipe = qbench.Recipe(method=method)
    rows = layer_table(generated(), recipe, quantized(method=method), (LATENTS,))
    assert [row.layer for row in rows] == ["0", "3", "6", "8"]
    assert {row.operation.removeprefix("weight_only_").removeprefix("dynamic_") for row in rows} == {"conv_transpose"}
    assert [row.macs for row in rows] == [8 * 16 * 16, 16 * 16 * 8 * 16, 64 * 8 * 4 * 9, 64 * 8 * 9]


def test_instance_norm_is_a_float_island_between_codes() -> None:
    model = on_grid(nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)))
    x = grid(8, 4, 5, 5, seed=9)
    q = qbench.quantize(model, (x,), calibration=[(x,)])
    assert [text.split(": ")[1] for text in q.float_ops] == ["aten.instance_norm.default"]
    assert q.int8_mac_fraction == 1.0
    assert sqnr_db(model(x), q(x)) > 30
    assert torch.equal(torch.cat([q(x[i : i + 1]) for i in range(8)]), q(x))


def test_a_prelu_of_many_slopes_stays_float() -> None:
    model = on_grid(nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 3)))
    x = grid(4, 4, 5, 5, seed=9)
    q = qbench.quantize(model, (x,), calibration=[(x,)])
    assert len(q.float_ops) == 1
    assert sqnr_db(model(x), q(x)) > 30


def test_a_kept_layer_and_a_tied_weight() -> None:
    tied = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)
    x = grid(2, 4, 5, 5, seed=9)
    model = on_grid(Apply(lambda m, x: m.layers[1](m.layers[0](m.layers[0](x))), tied, nn.ConvTranspose2d(4, 2, 2)))
    for method in ("ptdq", "ptsq", "woq"):
        q = qbench.quantize(model, (x,), qbench.Recipe(method=method, keep_float=("layers.1",)), calibration=[(x,)])
        assert sqnr_db(model(x), q(x)) > 30
        assert sum("conv_transpose2d" in text for text in q.float_ops) == 1


def test_three_dimensions_are_refused() -> None:
    x = torch.zeros(2, 4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"conv_transpose3d.* has no int8 form; name the layer in keep_float"):
        qbench.quantize(nn.ConvTranspose3d(4, 2, 3), (x,), calibration=[(x,)])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_padding", [2, 0], "output_padding must have 2 entries below the stride or the dilation"),
        ("output_padding", [0], "output_padding must have 2 entries below the stride or the dilation"),
        ("output_padding", [-1, 0], r"output_padding=\[-1, 0\] is out of bounds"),
        ("output_padding", None, r"output_padding=None is no List\[int\]"),
        ("stride", [2], "stride, padding and dilation must have 2 entries"),
        ("groups", 3, "16 outputs do not divide into 3 groups"),
    ],
)
def test_a_call_that_was_tampered_with(name: str, value: Any, message: str) -> None:
    q = quantized()
    node = next(node for node in q.program.graph.nodes if "conv_transpose" in str(node.target))
    check_call(node.target, node.args, node.kwargs, q.program.tensors)
    changed = {**node.kwargs, name: value}
    with pytest.raises(ValueError, match=message):
        check_call(node.target, node.args, changed, q.program.tensors)
