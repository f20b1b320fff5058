"""Dynamic quantization (ptdq): every activation quantized from itself, products in int8, against plain Python."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import F32
from programs import Apply, every_operation, grid, on_grid
from torch import Tensor, nn

import qbench
from qbench.capture import Network, capture
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = [
    {
        "granularity": granularity,
        "scheme": scheme,
        "activation_scheme": activation_scheme,
        "activation_granularity": rows,
    }
    for granularity in ("per_tensor", "per_channel", "per_group")
    for scheme, activation_scheme in (("symmetric", "affine"), ("affine", "symmetric"))
    for rows in ("per_row", "per_tensor")
]
GROUP_SIZE = 3


def rows_of(x: np.ndarray, linear: bool, per_row: bool) -> list[Any]:
    """The indices of the parts of x that share a scale: each row of a linear layer, each sample of a convolution."""
    if not per_row:
        return [...]
    return list(np.ndindex(*x.shape[:-1])) if linear else list(range(len(x)))


def dynamic(
    layer: nn.Module, x: np.ndarray, recipe: dict[str, str], window: tuple[Any, ...] | None = None
) -> np.ndarray:
    """f32(acc) * (s_x * s_w) + b, block by block where there are several."""
    values, bias = layer.weight.numpy(), layer.bias
    weight = oracle.weight(values, recipe["granularity"], recipe["scheme"], GROUP_SIZE)
    codes, scales = np.zeros(x.shape, np.int64), np.zeros(x.shape, np.float32)
    for part in rows_of(x, window is None, recipe["activation_granularity"] == "per_row"):
        q = oracle.choose(float(x[part].min()), float(x[part].max()), recipe["activation_scheme"], 128)
        codes[part], scales[part] = oracle.codes(x[part], q) - q.zero_point, q.scale
    if window is None:
        sums = oracle.linear_sums(codes, weight.centred, weight.block)
        axis, scale_of = sums.ndim - 2, lambda index: scales[(*index[:-1], 0)]
    else:
        sums = oracle.conv_sums(codes, weight.centred, weight.block, *window)
        axis, scale_of = 1, lambda index: scales[index[0], 0, 0, 0]
    result = np.zeros(sums.shape[1:], np.float32)
    for index in np.ndindex(*result.shape):
        products = [scale_of(index) * F32(q.scale) for q in weight.q[index[axis]]]
        total = oracle.layer_value([block[index] for block in sums], products)
        result[index] = total if bias is None else total + F32(float(bias[index[axis]]))
    return result


ROWS, IMAGES = grid(3, 2, 7, seed=1, step=0.1), grid(2, 4, 5, 4, seed=2, step=0.1)
ROWS[1, 1] = 0  # a row of zeros has scale 1
ROWS[2, 0] *= 1000


@functools.cache
def linear() -> tuple[Network, nn.Module, nn.Module]:
    a, b = on_grid(nn.Linear(7, 5), 3), on_grid(nn.Linear(7, 4, bias=False), 4)
    return capture(Apply(lambda m, x: (m.layers[0](x), m.layers[1](x)), a, b), (ROWS,)), a, b


@pytest.mark.parametrize("recipe", GRID, ids=lambda recipe: "-".join(recipe.values()))
def test_linear_layers(recipe: dict[str, str]) -> None:
    network, *layers = linear()
    q = quantize_network(network, qbench.Recipe(method="ptdq", group_size=GROUP_SIZE, **recipe))
    for layer, result in zip(layers, q(ROWS), strict=True):
        assert np.array_equal(result.numpy(), dynamic(layer, ROWS.numpy(), recipe))
    assert (q.int8_mac_fraction, q.float_ops) == (1.0, [])


CONVOLUTIONS: list[tuple[nn.Module, tuple[Any, ...]]] = [
    (nn.Conv2d(4, 3, 3, padding=(1, 0), stride=(1, 2)), ((1, 2), ((1, 1), (0, 0)), (1, 1), 1)),
    (nn.Conv2d(4, 8, 2, groups=4, dilation=2, bias=False), ((1, 1), ((0, 0), (0, 0)), (2, 2), 4)),
    (nn.Conv2d(4, 6, 1, groups=2), ((1, 1), ((0, 0), (0, 0)), (1, 1), 2)),
    (nn.Conv2d(4, 2, 3, padding="same"), ((1, 1), ((1, 1), (1, 1)), (1, 1), 1)),
]


@functools.cache
def convolutions() -> Network:
    layers = [on_grid(layer, seed) for seed, (layer, _) in enumerate(CONVOLUTIONS)]
    return capture(Apply(lambda m, x: tuple(layer(x) for layer in m.layers), *layers), (IMAGES,))


@pytest.mark.parametrize("recipe", GRID, ids=lambda recipe: "-".join(recipe.values()))
def test_convolutions(recipe: dict[str, str]) -> None:
    """A sample is one row; padding counts as zero."""
    q = quantize_network(convolutions(), qbench.Recipe(method="ptdq", group_size=GROUP_SIZE, **recipe))
    for (layer, window), result in zip(CONVOLUTIONS, q(IMAGES), strict=True):
        assert np.array_equal(result.numpy(), dynamic(layer, IMAGES.numpy(), recipe, window))


def test_convolution_over_one_dimension() -> None:
    layer, x = on_grid(nn.Conv1d(4, 3, 3, stride=2, padding=1)), grid(2, 4, 9, seed=5, step=0.1)
    q = qbench.quantize(layer, (x,), qbench.Recipe(method="ptdq"))
    wide = on_grid(nn.Conv2d(4, 3, (1, 3)))
    wide.weight.data, wide.bias.data = layer.weight.data[:, :, None], layer.bias.data
    window = ((1, 2), ((0, 0), (1, 1)), (1, 1), 1)
    recipe = {"activation_scheme": "affine", "activation_granularity": "per_row"}
    want = dynamic(wide, x.numpy()[:, :, None], recipe | {"granularity": "per_channel", "scheme": "symmetric"}, window)
    assert np.array_equal(q(x).numpy(), want[:, :, 0])


def test_extremes() -> None:
    """Inputs and weights at the ends of their codes, in both directions: exact sums up to the sign."""
    for low, high, alternate in itertools.product((-1.0, 0.0), (0.0, 1.0), (False, True)):
        x = torch.full((2, 2000), high if high else low)
        if alternate:
            x[:, ::2] = low
        layer = nn.Linear(2000, 2, bias=False).requires_grad_(False)
        layer.weight.data = torch.stack([torch.ones(2000), -torch.ones(2000)])
        network = linear_of(layer, x)
        q = quantize_network(network, qbench.Recipe(method="ptdq"))
        recipe = {"granularity": "per_channel", "scheme": "symmetric"}
        want = dynamic(layer, x.numpy(), recipe | {"activation_scheme": "affine", "activation_granularity": "per_row"})
        assert np.array_equal(q(x).numpy(), want), (low, high, alternate)


def linear_of(layer: nn.Module, x: Tensor) -> Network:
    """The network of one layer, captured once and given other weights."""
    network = captured_linear()
    network.tensors["weight"] = layer.weight
    return network


@functools.cache
def captured_linear() -> Network:
    return capture(nn.Linear(2000, 2, bias=False), (torch.zeros(2, 2000),))


@pytest.mark.parametrize(("rows", "alone"), [("per_row", True), ("per_tensor", False)])
def test_rows_are_independent_tensors_are_not(rows: str, alone: bool) -> None:
    """Per tensor the outlier of row 2 takes the codes of the others: that is what `batch_dependent` warns of."""
    q = quantize_network(linear()[0], qbench.Recipe(method="ptdq", activation_granularity=rows))
    whole, parts = q(ROWS)[0], torch.cat([q(part)[0] for part in ROWS.split(1)])
    assert torch.equal(whole, parts) is alone
    assert (
        torch.equal(q(ROWS[:1])[0], quantize_network(linear()[0], qbench.Recipe(method="ptdq"))(ROWS[:1])[0]) is alone
    )


def test_threads_do_not_matter() -> None:
    q = quantize_network(convolutions(), qbench.Recipe(method="ptdq"))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([y.numpy().tobytes() for y in q(IMAGES)])
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    q = quantize_network(linear()[0], qbench.Recipe(method="ptdq"))
    x = ROWS.clone()
    x[0, 0, 3] = value
    with pytest.raises(ValueError, match="dynamic quantization met a value that is not finite"):
        q(x)


def test_a_whole_network_stays_close_to_float() -> None:
    """Between the layers everything is torch's own float: the result is that of float layers on rounded inputs."""
    model, x = every_operation(), torch.from_numpy(np.random.default_rng(6).normal(size=(8, 3, 16, 16))).float()
    q = qbench.quantize(model, (x,), qbench.Recipe(method="ptdq"))
    want = model(x)
    assert float((q(x) - want).square().sum() / want.square().sum()) < 10**-3
    assert q.int8_mac_fraction == 1.0
    assert len(q.float_ops) > 10
