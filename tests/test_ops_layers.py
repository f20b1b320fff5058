"""Static layers against loops over Python's integers, from the float parameters to the last bit of the result."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import Q
from programs import Apply, every_operation, grid, on_grid, read_by, result_of, run_op, sqnr_db
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import qbench
from qbench.capture import Network, capture
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = [
    {"granularity": granularity, "scheme": scheme, "activation_scheme": activation_scheme, "output": output}
    for granularity in ("per_tensor", "per_channel", "per_group")
    for scheme, activation_scheme in (("symmetric", "affine"), ("affine", "symmetric"), ("affine", "affine"))
    for output in ("float", "int8")
]
GROUP_SIZE = 3


def name_of(recipe: dict[str, str]) -> str:
    return "-".join(recipe.values())


@dataclass
class Branch:
    """A layer, and what it computes in the words of the oracle; `ends` is the padding (before, after)."""

    module: nn.Module
    stride: tuple[int, int] = (1, 1)
    ends: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    apply: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    low: float | None = None
    high: float | None = None
    residual: bool = False  # adds its own input
    parameters: tuple[np.ndarray, Any] | None = None  # weight and bias when they are not the module's own
    cache: dict[str, np.ndarray] = field(default_factory=dict)

    def weight_and_bias(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.parameters is not None:
            return self.parameters
        bias = self.module.bias
        return self.module.weight.numpy(), None if bias is None else bias.numpy()

    def sums(self, x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
        """[blocks, ...] of a linear layer or of a convolution over one or two dimensions."""
        if weight.ndim == 2:
            return oracle.linear_sums(x, weight, block)
        if weight.ndim == 4:
            return oracle.conv_sums(x, weight, block, self.stride, self.ends, self.dilation, self.groups)
        flat = x[:, :, None], weight[:, :, None]
        return oracle.conv_sums(*flat, block, self.stride, self.ends, self.dilation, self.groups)[:, :, :, 0]

    def floats(self, x: np.ndarray) -> np.ndarray:
        """The float result before its clamp, exact because everything lies on a grid."""
        if "floats" not in self.cache:
            weight, bias = self.weight_and_bias()
            result = self.sums(x, weight, weight.shape[1])[0].astype(float)
            if bias is not None:
                result += bias.reshape(-1, *[1] * (weight.ndim - 2)) if weight.ndim > 2 else bias
            self.cache["floats"] = result + x if self.residual else result
        return self.cache["floats"]

    def expected(self, x: np.ndarray, calibration: np.ndarray, recipe: dict[str, str]) -> np.ndarray:
        """The result of the int8 layer as float32."""
        values, bias = self.weight_and_bias()
        scheme = recipe["activation_scheme"]
        read = oracle.choose(float(calibration.min()), float(calibration.max()), scheme, 128)
        weight = oracle.weight(values, recipe["granularity"], recipe["scheme"], GROUP_SIZE, bias, read.scale)
        y = oracle.result_range(self.floats(calibration), scheme, self.low, self.high)
        codes = oracle.codes(x, read)
        sums = self.sums(codes - read.zero_point, weight.centred, weight.block)
        axis = sums.ndim - 2 if values.ndim == 2 else 1
        added = (codes, read) if self.residual else (None, None)
        result = oracle.layer(sums, axis, weight, bias, read, y if recipe["output"] == "int8" else None, *added)
        return oracle.real(result, y) if recipe["output"] == "int8" else oracle.clamped(result, self.low, self.high)


def captured(branches: dict[str, Branch], x: Tensor) -> Network:
    """One network with a result for each branch."""
    applied = list(branches.values())
    model = Apply(
        lambda self, x: tuple(b.apply(layer, x) for b, layer in zip(applied, self.layers, strict=True)),
        *(branch.module for branch in applied),
    )
    return capture(model, (x,))


def check(
    network: Network, branches: dict[str, Branch], calibration: Tensor, x: Tensor, recipe: dict[str, str]
) -> None:
    q = quantize_network(network, qbench.Recipe(group_size=GROUP_SIZE, **recipe), [(calibration,)])
    results = q(x)
    assert (q.int8_mac_fraction, q.float_ops) == (1.0, [])
    for (name, branch), result in zip(branches.items(), results, strict=True):
        want = branch.expected(x.numpy(), calibration.numpy(), recipe)
        assert result.numpy().dtype == want.dtype == np.float32, name
        assert np.array_equal(result.numpy(), want), name


# --- convolutions ----------------------------------------------------------------------------------------------------

IMAGES, LINES = grid(3, 4, 7, 5, seed=1), grid(3, 4, 9, seed=2)
WIDER_IMAGES, WIDER_LINES = grid(2, 4, 7, 5, seed=3, limit=20), grid(2, 4, 9, seed=4, limit=20)


def square(before: int, after: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (before, after), (before, after)


@functools.cache
def convolutions() -> tuple[Network, dict[str, Branch]]:
    conv = nn.Conv2d
    branches = {
        "plain": Branch(conv(4, 3, 3)),
        "padded": Branch(conv(4, 3, 3, padding=1), ends=square(1, 1)),
        "1x1": Branch(conv(4, 5, 1)),
        "padded by more than the kernel": Branch(conv(4, 2, 2, padding=3), ends=square(3, 3)),
        "strided": Branch(conv(4, 3, 3, stride=2, padding=1), stride=(2, 2), ends=square(1, 1)),
        "asymmetric": Branch(conv(4, 3, (3, 2), stride=(2, 1), padding=(0, 2)), stride=(2, 1), ends=((0, 0), (2, 2))),
        "dilated": Branch(conv(4, 2, 2, dilation=(3, 2), padding=(1, 0)), dilation=(3, 2), ends=((1, 1), (0, 0))),
        "grouped": Branch(conv(4, 6, 3, groups=2, padding=1), groups=2, ends=square(1, 1)),
        "depthwise": Branch(conv(4, 4, 3, groups=4, stride=2), groups=4, stride=(2, 2)),
        "depth multiplier": Branch(conv(4, 8, 2, groups=4, bias=False), groups=4),
        "same": Branch(conv(4, 2, 3, padding="same", dilation=(2, 1)), ends=((2, 2), (1, 1)), dilation=(2, 1)),
        "valid": Branch(conv(4, 2, 3, padding="valid")),
        "as large as the image": Branch(conv(4, 4, (7, 5))),
        "without bias": Branch(conv(4, 3, 2, bias=False)),
    }
    for seed, branch in enumerate(branches.values()):
        on_grid(branch.module, seed)
    return captured(branches, IMAGES), branches


@functools.cache
def convolutions_1d() -> tuple[Network, dict[str, Branch]]:
    conv = nn.Conv1d
    branches = {
        "plain": Branch(conv(4, 3, 3)),
        "strided": Branch(conv(4, 3, 3, stride=2, padding=2), stride=(1, 2), ends=((0, 0), (2, 2))),
        "dilated": Branch(conv(4, 5, 3, dilation=3, bias=False), dilation=(1, 3)),
        "grouped": Branch(conv(4, 6, 2, groups=2), groups=2),
        "depth multiplier": Branch(conv(4, 8, 3, groups=4, padding=1), groups=4, ends=((0, 0), (1, 1))),
        "same": Branch(conv(4, 2, 5, padding="same"), ends=((0, 0), (2, 2))),
    }
    for seed, branch in enumerate(branches.values()):
        on_grid(branch.module, seed)
    return captured(branches, LINES), branches


@pytest.mark.parametrize("recipe", GRID, ids=name_of)
def test_convolutions(recipe: dict[str, str]) -> None:
    check(*convolutions(), IMAGES, WIDER_IMAGES, recipe)


@pytest.mark.parametrize("recipe", GRID, ids=name_of)
def test_convolutions_over_one_dimension(recipe: dict[str, str]) -> None:
    check(*convolutions_1d(), LINES, WIDER_LINES, recipe)


def test_same_padding_that_is_longer_at_the_end() -> None:
    """An even kernel: torch puts the odd place behind; two kernels that differ there have inputs of their own."""
    for module, ends in (
        (nn.Conv2d(4, 2, (2, 3), padding="same"), ((0, 1), (1, 1))),
        (nn.Conv2d(4, 2, 4, padding="same"), ((1, 2), (1, 2))),
    ):
        branch = Branch(on_grid(module), ends=ends)
        q = qbench.quantize(branch.module, (IMAGES,), qbench.Recipe(output="int8"), calibration=[(IMAGES,)])
        want = branch.expected(WIDER_IMAGES.numpy(), IMAGES.numpy(), GRID[1] | {"granularity": "per_channel"})
        assert np.array_equal(q(WIDER_IMAGES).numpy(), want)


def test_other_sizes_than_the_examples() -> None:
    """Free dimensions come from dynamic_shapes: calibrated on two sizes, run on a third; a fixed batch is fixed."""
    branch, free = Branch(on_grid(nn.Conv2d(4, 3, 3, padding=1)), ends=square(1, 1)), torch.export.Dim.DYNAMIC
    calibration = [(IMAGES,), (grid(2, 4, 8, 6, seed=5),)]
    q = qbench.quantize(
        branch.module, (IMAGES,), calibration=calibration, dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    assert q.int8_mac_fraction is None  # nothing to count over yet
    recipe = {"granularity": "per_channel", "scheme": "symmetric", "activation_scheme": "affine", "output": "float"}
    x, seen = grid(1, 4, 4, 9, seed=6), np.concatenate([batch.ravel() for (batch,) in calibration])
    branch.cache["floats"] = np.zeros(1)  # the accumulator is the result: its range plays no part
    assert np.array_equal(q(x).numpy(), branch.expected(x.numpy(), seen, recipe))
    assert q.int8_mac_fraction == 1.0
    fixed = qbench.quantize(branch.module, (IMAGES,), calibration=[(IMAGES,)], dynamic_shapes=({},))
    with pytest.raises(ValueError, match=r"input 0 has the shape \[2, 4, 7, 5\], the network takes \[3, 4, 7, 5\]"):
        fixed(IMAGES[:2])


# --- linear layers, clamps, residuals --------------------------------------------------------------------------------

ROWS, WIDER_ROWS = grid(4, 2, 7, seed=5), grid(3, 2, 7, seed=6, limit=20)


def clamps() -> dict[str, tuple[Callable[[Tensor], Tensor], float | None, float | None]]:
    """Function, low, high."""
    return {
        "no clamp": (lambda y: y, None, None),
        "relu": (torch.relu, 0.0, None),
        "relu6": (functional.relu6, 0.0, 6.0),
        "hardtanh": (lambda y: functional.hardtanh(y, -0.5, 0.75), -0.5, 0.75),
        "clamp below": (lambda y: y.clamp(min=0.3), 0.3, None),
        "clamp above": (lambda y: y.clamp(max=-0.2), None, -0.2),
        "clamp that leaves zero out": (lambda y: y.clamp(0.25, 2), 0.25, 2.0),
        "two clamps": (lambda y: y.relu().clamp(max=1), 0.0, 1.0),
        "two clamps that do not meet": (lambda y: y.relu().clamp(max=-1), -1.0, -1.0),
        "clamps undone": (lambda y: y.clamp(max=-1).relu(), 0.0, 0.0),
    }


@functools.cache
def linears() -> tuple[Network, dict[str, Branch]]:
    branches = {
        name: Branch(nn.Linear(7, 5), apply=lambda m, x, f=function: f(m(x)), low=low, high=high)
        for name, (function, low, high) in clamps().items()
    }
    branches |= {
        "without bias": Branch(nn.Linear(7, 3, bias=False)),
        "residual": Branch(nn.Linear(7, 7), apply=lambda m, x: m(x) + x, residual=True),
        "residual first": Branch(nn.Linear(7, 7), apply=lambda m, x: x + m(x), residual=True),
        "residual and relu": Branch(
            nn.Linear(7, 7, bias=False), apply=lambda m, x: (m(x) + x).relu_(), residual=True, low=0.0
        ),
    }
    for seed, branch in enumerate(branches.values()):
        on_grid(branch.module, seed)
    return captured(branches, ROWS), branches


@pytest.mark.parametrize("recipe", GRID, ids=name_of)
def test_linear_layers_with_clamps_and_residuals(recipe: dict[str, str]) -> None:
    check(*linears(), ROWS, WIDER_ROWS, recipe)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_the_residual_may_be_another_layer(granularity: str) -> None:
    """a(x) + b(x): b is rounded to codes, the sum of a is not."""
    a, b = (on_grid(nn.Linear(7, 5), seed) for seed in (20, 30))
    recipe = qbench.Recipe(granularity=granularity, group_size=GROUP_SIZE, output="int8")
    q = qbench.quantize(
        Apply(lambda m, x: m.layers[0](x) + m.layers[1](x), a, b), (ROWS,), recipe, calibration=[(ROWS,)]
    )
    branches = [Branch(module) for module in (a, b)]
    floats = [branch.floats(ROWS.numpy()) for branch in branches]
    read, y_b, y = (oracle.result_range(v, "affine") for v in (ROWS.numpy(), floats[1], floats[0] + floats[1]))
    codes = oracle.codes(ROWS.numpy(), read)

    def layer(branch: Branch, *result: Any) -> np.ndarray:
        values, bias = branch.weight_and_bias()
        weight = oracle.weight(values, granularity, "symmetric", GROUP_SIZE, bias, read.scale)
        sums = branch.sums(codes - read.zero_point, weight.centred, weight.block)
        return oracle.layer(sums, 2, weight, bias, read, *result)

    want = layer(branches[0], y, layer(branches[1], y_b), y_b)
    assert np.array_equal(q(ROWS).numpy(), oracle.real(want, y))
    assert [str(node.target) for node in q.program.graph.nodes if "linear" in str(node.target)] == [
        "qbench.linear.default"
    ] * 2


def test_what_is_added_to_itself_is_no_residual() -> None:
    model = on_grid(Apply(lambda m, x: (lambda y: y + y)(m.layers[0](x)), nn.Linear(7, 5)))
    q = qbench.quantize(model, (ROWS,), calibration=[(ROWS,)])
    assert "torch.ops.qbench.add" in q.code
    assert sqnr_db(model(ROWS), q(ROWS)) > 35


# --- batch norms -----------------------------------------------------------------------------------------------------


def batch_norm(kind: type[nn.Module], channels: int, **options: Any) -> nn.Module:
    """Its standard deviation is 2 exactly: variance 3.75 + eps 0.25 = 4."""
    norm = kind(channels, eps=0.25, **options)
    norm.running_mean, norm.running_var = grid(channels, seed=7), torch.full((channels,), 3.75)
    return norm


@functools.cache
def with_batch_norms() -> tuple[Network, dict[str, Branch]]:
    def folded(layer: nn.Module, norm: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        gamma = norm.weight.double().numpy() / 2 if norm.affine else np.full(norm.num_features, 0.5)
        beta = norm.bias.double().numpy() if norm.affine else 0.0
        weight = layer.weight.double().numpy()
        bias = 0.0 if layer.bias is None else layer.bias.double().numpy()
        scaled = weight * gamma.reshape(-1, *[1] * (weight.ndim - 1))
        return scaled.astype(np.float32), ((bias - norm.running_mean.numpy()) * gamma + beta).astype(np.float32)

    branches = {}
    for name, layer, options in (
        ("conv", nn.Conv2d(4, 3, 3, padding=1, bias=False), {}),
        ("conv with bias", nn.Conv2d(4, 3, 3, padding=1), {}),
        ("no affine part", nn.Conv2d(4, 3, 3, padding=1), {"affine": False}),
    ):
        norm = batch_norm(nn.BatchNorm2d, 3, **options)
        module = nn.Sequential(on_grid(layer, 40), on_grid(norm, 50), nn.ReLU())
        branches[name] = Branch(module, ends=square(1, 1), low=0.0, parameters=folded(layer, norm))
    return captured(branches, IMAGES), branches


@pytest.mark.parametrize("recipe", GRID[:6], ids=name_of)
def test_batch_norms_are_folded_in_float64(recipe: dict[str, str]) -> None:
    check(*with_batch_norms(), IMAGES, WIDER_IMAGES, recipe)


def test_a_dead_channel_with_a_bias_keeps_its_bias() -> None:
    """The bias rule end to end: |b| / (s_x s_w) would be 6e15 without it."""
    module = on_grid(nn.Linear(7, 5), 60)
    with torch.no_grad():
        module.weight[1] *= 1e-12
        module.weight[2] = 0
        module.bias[1:3] = torch.tensor([2.5, -1.5])
    branch = Branch(module)
    for granularity in ("per_tensor", "per_channel"):
        recipe = {"granularity": granularity, "scheme": "symmetric", "activation_scheme": "affine", "output": "float"}
        q = qbench.quantize(module, (ROWS,), qbench.Recipe(granularity=granularity), calibration=[(ROWS,)])
        assert np.array_equal(q(ROWS).numpy(), branch.expected(ROWS.numpy(), ROWS.numpy(), recipe))
    assert torch.allclose(q(ROWS)[..., 1], torch.tensor(2.5), rtol=1e-6)  # per channel: on a grid of its own
    assert torch.allclose(q(ROWS)[..., 2], torch.tensor(-1.5), rtol=0, atol=4 / 255 / 2)  # s_w = 1: a grid of s_x


def test_a_layer_used_twice_has_a_bias_for_each_input() -> None:
    model = on_grid(Apply(lambda m, x: m.layers[0](m.layers[0](x).relu() * 3), nn.Linear(7, 7)))
    q = qbench.quantize(model, (ROWS,), calibration=[(ROWS,)])
    assert sum("bias" in name for name in q.program.tensors) == 2
    assert sum(name.endswith("weight") for name in q.program.tensors) == 1
    assert sqnr_db(model(ROWS), q(ROWS)) > 30


# --- extremes --------------------------------------------------------------------------------------------------------

PATTERNS = ("lowest", "highest", "alternating", "alternating by row")


def pattern(kind: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """All lowest, all highest, low and high in turn along the last or the first dimension."""
    if kind in ("lowest", "highest"):
        return np.full(shape, low if kind == "lowest" else high)
    along = np.indices(shape)[-1 if kind == "alternating" else 0]
    return np.where(along % 2 == 0, low, high)


def static_layer(
    name: str, x: np.ndarray, q_x: Q, weight: np.ndarray, w: Q, bias: list[int] | None, y: Q | None, **window: Any
) -> np.ndarray:
    """Run one static layer whose weight has one scale."""
    result = {"scale": None, "zero_point": 0, "q_min": 0, "q_max": 255} if y is None else result_of(y)
    return run_op(
        name,
        x,
        weight=weight.astype(np.int8),
        weight_scale=np.full((1, 1), w.scale, np.float32),
        weight_zero_point=np.full((1, 1), w.zero_point, np.int8),
        bias=None if bias is None else np.array(bias, np.int32),
        block=weight.shape[1],
        **window,
        **read_by(q_x),
        **result,
    )


def rounded(sums: np.ndarray, m: Any, y: Q | None) -> np.ndarray:
    """f32(acc) * m, then R."""
    values = np.array([oracle.F32(acc) * m for acc in sums.ravel()], np.float32).reshape(sums.shape)
    return values if y is None else oracle.each(lambda v: oracle.requantize(v, y.zero_point, y.q_min, y.q_max), values)


@pytest.mark.parametrize("w_zero", [-128, 0, 127])
@pytest.mark.parametrize("x_zero", [0, 128, 255])
def test_extremes_of_linear_layers(x_zero: int, w_zero: int) -> None:
    x_q, w_q, y_q = Q(0.5, x_zero, 0, 255), Q(0.25, w_zero, -128, 127), Q(2e4, 100, 3, 250)
    bias = [2**30, -(2**30)]
    for x_kind, w_kind in itertools.product(PATTERNS, PATTERNS):
        x, weight = pattern(x_kind, (2, 300), 0, 255), pattern(w_kind, (2, 300), -128, 127)
        sums = oracle.linear_sums(x - x_zero, weight - w_zero, 300)[0] + np.array(bias, dtype=object)
        for y in (None, y_q):
            m = oracle.multiplier(x_q.scale, w_q.scale, 1.0 if y is None else y.scale)
            got = static_layer("linear", x, x_q, weight, w_q, bias, y)
            assert np.array_equal(got, rounded(sums, m, y)), (x_kind, w_kind, y)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("x_zero", "w_zero"), [(0, 0), (255, -128), (0, 127), (128, 0)])
def test_extremes_of_convolutions(x_zero: int, w_zero: int, groups: int) -> None:
    """Padding counts as the zero point, whatever the codes around it."""
    x_q, w_q, y_q = Q(0.5, x_zero, 0, 255), Q(0.25, w_zero, -128, 127), Q(300.0, 100, 0, 255)
    window = {"stride": [1, 2], "padding": [1, 2], "dilation": [1, 1], "groups": groups}
    for x_kind, w_kind in itertools.product(PATTERNS, PATTERNS):
        x, weight = pattern(x_kind, (2, 4, 3, 4), 0, 255), pattern(w_kind, (4, 4 // groups, 3, 3), -128, 127)
        sums = oracle.conv_sums(x - x_zero, weight - w_zero, 4, (1, 2), ((1, 1), (2, 2)), (1, 1), groups)[0]
        for y in (None, y_q):
            m = oracle.multiplier(x_q.scale, w_q.scale, 1.0 if y is None else y.scale)
            got = static_layer("conv", x, x_q, weight, w_q, None, y, **window)
            assert np.array_equal(got, rounded(sums, m, y)), (x_kind, w_kind, y)


SCALES = np.random.default_rng(70).uniform(0.001, 0.1, (12, 4)).astype(np.float32).astype(float).tolist()


def near_ties(m: float, shift: float = 0.0) -> list[int]:
    """The integers around (k + 1/2 - shift) / m: what they round to hangs on the last bit of every step."""
    return [round((k + 0.5 - shift) / m) + d for k in range(-100, 155) for d in (-2, -1, 0, 1, 2)]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_near_ties(scales: list[float]) -> None:
    """Sums up to 2^25, so f32(acc) rounds too; with and without a residual that is added before rounding."""
    x_q, w_q, y_q, r_q = (Q(scale, 100, 0, 255) for scale in scales)
    x_q, w_q = Q(x_q.scale / 64, 5, 0, 255), Q(w_q.scale / 64, 0, -128, 127)
    m, m_r = (oracle.multiplier(a, b, y_q.scale) for a, b in ((x_q.scale, w_q.scale), (r_q.scale, 1.0)))
    for residual in (None, 213):
        added = None if residual is None else oracle.F32(residual - r_q.zero_point) * m_r
        sums = np.array(near_ties(float(m), 0.0 if added is None else float(added)), dtype=object)
        weight = {"weight": np.zeros((len(sums), 1), np.int8), "weight_zero_point": None, "block": 1}
        weight |= {"weight_scale": np.full((1, 1), w_q.scale, np.float32), "bias": sums.astype(np.int32)}
        activations = [np.array([[5]])] if residual is None else [np.array([[5]]), np.full((1, len(sums)), residual)]
        got = run_op("linear", *activations, **weight, **read_by(x_q), **read_by(r_q, "residual"), **result_of(y_q))
        values = [oracle.F32(acc) * m if added is None else oracle.F32(acc) * m + added for acc in sums]
        assert got.tolist() == [[oracle.requantize(v, 100, 0, 255) for v in values]]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_near_ties_in_blocks(scales: list[float]) -> None:
    """t = f32(b / s_y); t = t + f32(acc_g) * m_g, one block after the other."""
    x_q, y_q, w_scales = Q(scales[0], 100, 0, 255), Q(scales[1], 90, 0, 255), [scales[2], scales[3], scales[2] / 3]
    w_scales = [float(np.float32(s)) for s in w_scales]
    codes, weight = [255, 17, 131], [127, -90, 55]
    m = [oracle.multiplier(x_q.scale, s, y_q.scale) for s in w_scales]
    sums = [(c - 100) * w for c, w in zip(codes, weight, strict=True)]
    shift = sum(acc * float(step) for acc, step in zip(sums, m, strict=True))
    middle = [np.float32((k + 0.5 - shift) * y_q.scale) for k in range(-80, 160)]
    bias = np.array([b for c in middle for b in (np.nextafter(c, -np.inf), c, np.nextafter(c, np.inf))], np.float32)
    got = run_op(
        "linear",
        np.array([codes]),
        weight=np.tile(np.array(weight, np.int8), (len(bias), 1)),
        weight_scale=np.tile(np.array(w_scales, np.float32), (len(bias), 1)),
        weight_zero_point=None,
        bias=bias,
        block=1,
        **read_by(x_q),
        **result_of(y_q),
    )
    values = [oracle.layer_value(sums, m, 0, oracle.F32(float(b) / y_q.scale)) for b in bias]
    assert got.tolist() == [[oracle.requantize(v, 90, 0, 255) for v in values]]


@pytest.mark.parametrize("taps", [(16, 16), (6, 43), (7, 37), (17, 17)])
def test_depthwise_sums_are_exact_around_the_limit_of_float32(taps: tuple[int, int]) -> None:
    """258 taps of 255 * 255 stay below 2^24, 259 do not; the bias leaves 1 of the sum, which shows its last bit."""
    x, weight = np.full((1, 2, *taps), 255), np.full((2, 1, *taps), 127)
    weight[1, 0, 0, 0] = 126
    exact = [255 * 255 * taps[0] * taps[1], 255 * 255 * taps[0] * taps[1] - 255]
    window = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 2}
    args = x, Q(1.0, 0, 0, 255), weight, Q(1.0, -128, -128, 127), [1 - acc for acc in exact], None
    assert static_layer("conv", *args, **window).ravel().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("scheme", "most", "step"), [("symmetric", 66311, 127), ("affine", 33025, 255)])
def test_the_longest_sum_there_is(scheme: str, most: int, step: int) -> None:
    """Weights of 1 have |q_w - z_w| = step, inputs of 1 have q_x - z_x = 255: the sum is 255 * step * K < 2^31."""
    x = torch.ones(2, most)
    x[1, ::2] = 0
    layer = nn.Linear(most, 1, bias=False)
    layer.weight.data.fill_(1)
    q = qbench.quantize(layer, (x,), qbench.Recipe(scheme=scheme), calibration=[(x,)])
    m = oracle.multiplier(float(np.float32(1 / 255)), float(np.float32(1 / step)))
    sums = [255 * step * most, 255 * step * (most // 2)]
    assert sums[0] < 2**31 <= sums[0] + 255 * step
    assert q(x).ravel().tolist() == [float(oracle.F32(acc) * m) for acc in sums]


@pytest.mark.parametrize(
    ("scheme", "least", "reach"), [("symmetric", 66312, 2147514120), ("affine", 33026, 2147515650)]
)
def test_a_longer_sum_is_refused_with_the_bound(scheme: str, least: int, reach: int) -> None:
    layer = nn.Linear(least, 1, bias=False)
    layer.weight.data.fill_(1)
    model, x = nn.Sequential(nn.Identity(), layer), torch.ones(2, least)
    network = capture(model, (x,))
    with pytest.raises(
        ValueError, match=rf"layer 1: its int32 sum may reach {reach}, the bound is 2147483647; .*keep_float"
    ):
        quantize_network(network, qbench.Recipe(scheme=scheme), [(x,)])
    with pytest.raises(ValueError, match=rf"layer 1: its int32 sum may reach {reach}"):
        quantize_network(network, qbench.Recipe(method="ptdq", scheme=scheme))
    kept = quantize_network(network, qbench.Recipe(scheme=scheme, keep_float=["1"]), [(x,)])
    assert kept(x).tolist() == [[float(least)]] * 2
    grouped = quantize_network(network, qbench.Recipe(scheme=scheme, granularity="per_group"), [(x,)])
    assert grouped(x)[0, 0] == pytest.approx(least, rel=1e-4)


# --- one answer everywhere -------------------------------------------------------------------------------------------


@functools.cache
def everything(granularity: str, scheme: str, output: str) -> qbench.QuantizedModel:
    """A network with every kind of operation."""
    recipe = qbench.Recipe(granularity=granularity, scheme=scheme, output=output, group_size=5)
    return quantize_network(everything_captured(), recipe, [(images(16, 8),)])


@functools.cache
def everything_captured() -> Network:
    return capture(every_operation(), (images(2, 0),))


def images(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3, 16, 16))).float()


RECIPES = [("per_tensor", "symmetric", "float"), ("per_channel", "symmetric", "int8"), ("per_group", "affine", "float")]


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_bytes_do_not_depend_on_batch_or_threads(recipe: tuple[str, str, str]) -> None:
    q, x, threads = everything(*recipe), images(13, 9), torch.get_num_threads()
    whole = q(x).numpy().tobytes()
    for size in (1, 2, 6):
        assert b"".join(q(part).numpy().tobytes() for part in x.split(size)) == whole, size
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert q(x).numpy().tobytes() == whole, count
    finally:
        torch.set_num_threads(threads)


RUN_SAVED = """
import sys
import torch, qbench
from safetensors.torch import load_file
x = load_file(sys.argv[1])["x"]
for path in sys.argv[2:]:
    open(path + ".out", "wb").write(qbench.load(path)(x).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability())
"""


def test_bytes_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    """The same saved models in a process that may not use what this CPU has."""
    x = torch.cat([images(4, 10), torch.full((1, 3, 16, 16), 9.0), torch.full((1, 3, 16, 16), -9.0)])
    x[5, :, ::2] = 9.0
    save_file({"x": x}, tmp_path / "x.safetensors")
    paths = [tmp_path / f"{number}.qb" for number in range(len(RECIPES))]
    for recipe, path in zip(RECIPES, paths, strict=True):
        everything(*recipe).save(path)
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN_SAVED, tmp_path / "x.safetensors", *paths]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "DEFAULT"
    for recipe, path in zip(RECIPES, paths, strict=True):
        assert Path(f"{path}.out").read_bytes() == everything(*recipe)(x).numpy().tobytes(), recipe
