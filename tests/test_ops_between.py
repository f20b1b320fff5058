"""What stands between the layers: sums, products, pools, joins, tables and moves of codes, against plain Python."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import F32, Q
from programs import Apply, grid, on_grid, read_by, result_of, run_op, sqnr_db
from torch import Tensor, nn
from torch.nn import functional

import qbench
from qbench.capture import Network, capture
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_CODE = np.arange(256)
SCHEMES = [
    {"activation_scheme": scheme, "output": output}
    for scheme in ("affine", "symmetric")
    for output in ("float", "int8")
]
X, WIDER = grid(3, 4, 6, 5, seed=1), grid(2, 4, 6, 5, seed=2, limit=20)


def q(scale: float, zero_point: int, q_min: int = 0, q_max: int = 255) -> Q:
    return Q(float(F32(scale)), zero_point, q_min, q_max)


RESULTS = [q(0.37, 128), q(0.011, 3), q(2.0**-60, 255), q(2.0**60, 0), q(0.5, 100, 100, 112), q(1.3, 128, 1, 255)]


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", RESULTS)
def test_quantize_and_dequantize(y: Q) -> None:
    x = np.array([0.0, -0.0, 1e-40, 0.185, -0.555, 47.1, -47.1, 3e38, -3e38, math.inf, -math.inf, math.nan], np.float32)
    assert np.array_equal(run_op("quantize", x, **result_of(y)), oracle.codes(x, y))
    assert np.array_equal(run_op("dequantize", EVERY_CODE, **read_by(y)), oracle.real(EVERY_CODE, y))


# --- sums and products -----------------------------------------------------------------------------------------------


def added(a: Any, b: Any, qa: Q, qb: Q, y: Q, alpha: float = 1.0) -> np.ndarray:
    """R(f32(q_a - z_a) * m_a + f32(q_b - z_b) * m_b)."""
    m_a, m_b = oracle.multiplier(qa.scale, 1.0, y.scale), F32(qb.scale * alpha / y.scale)

    def one(i: int, j: int) -> int:
        total = F32(i - qa.zero_point) * m_a + F32(j - qb.zero_point) * m_b
        return oracle.requantize(total, y.zero_point, y.q_min, y.q_max)

    with np.errstate(over="ignore"):
        return oracle.each(one, a, b)


def multiplied(a: Any, b: Any, qa: Q, qb: Q, y: Q) -> np.ndarray:
    """R(f32((q_a - z_a)(q_b - z_b)) * m)."""
    m = oracle.multiplier(qa.scale, qb.scale, y.scale)
    with np.errstate(over="ignore"):
        return oracle.each(
            lambda i, j: oracle.requantize(
                F32((i - qa.zero_point) * (j - qb.zero_point)) * m, y.zero_point, y.q_min, y.q_max
            ),
            a,
            b,
        )


@pytest.mark.parametrize("y", RESULTS)
@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.3])
def test_add_for_every_code(y: Q, alpha: float) -> None:
    a, b, qa, qb = EVERY_CODE[:, None], EVERY_CODE[None, ::17], q(0.02, 7), q(0.31, 200)
    got = run_op("add", a, b, alpha=alpha, **read_by(qa, "a"), **read_by(qb, "b"), **result_of(y))
    assert np.array_equal(got, added(a, b, qa, qb, y, alpha))


@pytest.mark.parametrize("y", RESULTS)
@pytest.mark.parametrize("zero_points", [(0, 0), (255, 255), (0, 255), (128, 31)])
def test_mul_for_every_code(y: Q, zero_points: tuple[int, int]) -> None:
    a, b, qa, qb = EVERY_CODE[:, None], EVERY_CODE[None, ::17], q(0.02, zero_points[0]), q(0.31, zero_points[1])
    got = run_op("mul", a, b, **read_by(qa, "a"), **read_by(qb, "b"), **result_of(y))
    assert np.array_equal(got, multiplied(a, b, qa, qb, y))


def test_operands_are_broadcast() -> None:
    a, b, qa, qb, y = np.arange(24).reshape(2, 3, 4), np.array([[[9], [90], [250]]]), q(0.1, 12), q(0.2, 90), q(0.4, 50)
    for x, z, qx, qz in ((a, b, qa, qb), (b, a, qb, qa)):
        scales = read_by(qx, "a") | read_by(qz, "b") | result_of(y)
        assert np.array_equal(run_op("add", x, z, alpha=1.0, **scales), added(x, z, qx, qz, y))
        assert np.array_equal(run_op("mul", x, z, **scales), multiplied(x, z, qx, qz, y))


@pytest.mark.parametrize("y", RESULTS)
def test_rescale_for_every_code(y: Q) -> None:
    x = q(0.37, 77)
    m = oracle.multiplier(x.scale, 1.0, y.scale)
    with np.errstate(over="ignore"):
        want = [oracle.requantize(F32(i - 77) * m, y.zero_point, y.q_min, y.q_max) for i in range(256)]
    assert run_op("rescale", EVERY_CODE, **read_by(x), **result_of(y)).tolist() == want


CONSTANT = torch.tensor([[[0.5]], [[-2.0]], [[0.0]], [[1.75]]])


BINARY: dict[str, tuple[Callable[[Any], Any], str, Any, bool, float]] = {
    # name: function of x, what it is in int8, the constant, is the constant the first operand, alpha
    "x + c": (lambda x: x + CONSTANT, "add", CONSTANT, False, 1.0),
    "c + x": (lambda x: CONSTANT + x, "add", CONSTANT, True, 1.0),
    "x - c": (lambda x: x - CONSTANT, "add", CONSTANT, False, -1.0),
    "c - x": (lambda x: CONSTANT - x, "add", CONSTANT, True, -1.0),
    "x + 1.5": (lambda x: x + 1.5, "add", 1.5, False, 1.0),
    "x - 2": (lambda x: x - 2, "add", 2.0, False, -1.0),
    "x + 2c": (lambda x: torch.add(x, CONSTANT, alpha=2), "add", CONSTANT, False, 2.0),
    "x * c": (lambda x: x * CONSTANT, "mul", CONSTANT, False, 1.0),
    "c * x": (lambda x: CONSTANT * x, "mul", CONSTANT, True, 1.0),
    "x * -0.75": (lambda x: x * -0.75, "mul", -0.75, False, 1.0),
    "x / 4": (lambda x: x / 4, "mul", 0.25, False, 1.0),
    "-x": (lambda x: -x, "mul", -1.0, False, 1.0),
    "x * 0": (lambda x: x * 0, "mul", 0.0, False, 1.0),
    "relu(x + c)": (lambda x: torch.relu(x + CONSTANT), "add", CONSTANT, False, 1.0),
}


@functools.cache
def binary() -> Network:
    functions = [function for function, *_ in BINARY.values()]
    return capture(Apply(lambda m, x: tuple(function(x) for function in functions)), (X,))


@pytest.mark.parametrize("recipe", SCHEMES, ids=lambda recipe: "-".join(recipe.values()))
def test_constants_as_operands(recipe: dict[str, str]) -> None:
    scheme = recipe["activation_scheme"]
    model = quantize_network(binary(), qbench.Recipe(**recipe), [(X,)])
    assert model.float_ops == []
    read = oracle.choose(float(X.min()), float(X.max()), scheme, 128)
    codes = oracle.codes(WIDER, read)
    for (name, (function, kind, constant, swapped, alpha)), result in zip(BINARY.items(), model(WIDER), strict=True):
        held = np.asarray(constant, np.float32)
        q_c = oracle.choose(float(held.min()), float(held.max()), scheme, 128)
        y = oracle.result_range(function(X).numpy(), scheme, 0.0 if "relu" in name else None)
        pairs = [(codes, read), (oracle.codes(held, q_c), q_c)]
        (a, qa), (b, qb) = pairs[::-1] if swapped else pairs
        want = added(a, b, qa, qb, y, alpha) if kind == "add" else multiplied(a, b, qa, qb, y)
        assert np.array_equal(result.numpy(), oracle.real(want, y)), name


def test_constant_expressions_are_computed_once() -> None:
    """A reshaped, squashed or multiplied parameter is one constant of the program."""

    def function(m: Any, x: Tensor) -> Tensor:
        return x * m.scale.view(1, -1, 1, 1).sigmoid() + m.layers[0](m.shift).relu().reshape(4, 1, 1)

    model = Apply(function, nn.Linear(3, 4), scale=grid(4, seed=3), shift=grid(3, seed=4))
    quantized = qbench.quantize(model, (X,), calibration=[(X,)])
    kinds = [str(node.target) for node in quantized.program.graph.nodes if node.op == "call_function"]
    assert kinds == [f"qbench.{kind}.default" for kind in ("quantize", "mul", "add", "dequantize")]
    assert sqnr_db(model(X), quantized(X)) > 35


def test_operands_of_two_inputs() -> None:
    a, b = grid(3, 4, seed=5), grid(3, 4, seed=6, limit=9)
    quantized = qbench.quantize(Pair(), (a, b), calibration=[(a, b)])
    qa, qb = (oracle.result_range(x.numpy(), "affine") for x in (a, b))
    y, z = (oracle.result_range(x.numpy(), "affine") for x in (a * b, a * b - a))
    product = multiplied(oracle.codes(a, qa), oracle.codes(b, qb), qa, qb, y)
    want = added(product, oracle.codes(a, qa), y, qa, z, -1.0)
    assert np.array_equal(quantized(a, b).numpy(), oracle.real(want, z))


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b - a


# --- concatenation ---------------------------------------------------------------------------------------------------


def test_producers_with_one_reader_take_the_scale_of_the_concatenation() -> None:
    rows = grid(5, 6, seed=7)
    a, b = (on_grid(nn.Linear(6, 3), seed) for seed in (8, 9))
    model = Apply(lambda m, x: torch.cat([m.layers[0](x), m.layers[1](x).relu(), x], 1), a, b)
    quantized = qbench.quantize(model, (rows,), calibration=[(rows,)])
    floats = [(rows @ layer.weight.T + layer.bias) for layer in (a, b)]
    floats[1] = floats[1].relu()
    read = oracle.result_range(rows.numpy(), "affine")
    y = oracle.result_range(torch.cat([*floats, rows], 1).numpy(), "affine")
    codes, parts = oracle.codes(rows, read), []
    for layer, low in ((a, None), (b, 0.0)):
        bias = layer.bias.numpy()
        weight = oracle.weight(layer.weight.numpy(), bias=bias, x_scale=read.scale)
        sums = oracle.linear_sums(codes - read.zero_point, weight.centred, 6)
        parts.append(oracle.layer(sums, 1, weight, bias, read, oracle.narrowed(y, low, None)))  # rounded once, for y
    m = oracle.multiplier(read.scale, 1.0, y.scale)
    parts.append(oracle.each(lambda i: oracle.requantize(F32(i - read.zero_point) * m, y.zero_point, 0, 255), codes))
    assert np.array_equal(quantized(rows).numpy(), oracle.real(np.concatenate(parts, 1), y))
    assert quantized.code.count("qbench.rescale") == 1


def test_what_others_read_too_is_rescaled() -> None:
    rows = grid(5, 6, seed=10)
    layer = on_grid(nn.Linear(6, 3), 11)
    model = Apply(lambda m, x: (lambda y: (torch.cat([y, y * 3], 1), y))(m.layers[0](x)), layer)
    joined, alone = qbench.quantize(model, (rows,), calibration=[(rows,)])(rows)
    floats = (rows @ layer.weight.T + layer.bias).numpy()
    own, y = (
        oracle.result_range(floats, "affine"),
        oracle.result_range(np.concatenate([floats, 3 * floats], 1), "affine"),
    )
    codes = np.rint(alone.numpy() / F32(own.scale)).astype(int) + own.zero_point
    assert np.array_equal(oracle.real(codes, own), alone.numpy())
    m = oracle.multiplier(own.scale, 1.0, y.scale)
    want = oracle.each(lambda i: oracle.requantize(F32(i - own.zero_point) * m, y.zero_point, 0, 255), codes)
    assert np.array_equal(joined[:, :3].numpy(), oracle.real(want, y))


# --- means and pools -------------------------------------------------------------------------------------------------

X_Q, Y_Q = q(0.05, 37), q(0.041, 60)


def summed(
    codes: np.ndarray, parts: list[tuple[tuple[int, ...], list[Any], int]], x: Q, y: Q, shape: Any
) -> np.ndarray:
    """R(f32(sum) * f32(s_x / (n s_y))) for each (place, codes, n)."""
    result = np.zeros(shape, np.int64)
    for place, inside, count in parts:
        total = sum(int(codes[index]) - x.zero_point for index in inside)
        result[place] = oracle.averaged(total, count, x, y)
    return result


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [[2, 3], [-1], [1], [0, 1, 2, 3], [1, -2]])
def test_means(dims: list[int], keepdim: bool) -> None:
    for kind, codes in codes_to_average().items():
        got = run_op("mean", codes, dim=dims, keepdim=keepdim, **read_by(X_Q), **result_of(Y_Q))
        axes = tuple(sorted(dim % 4 for dim in dims))
        kept = [size if axis not in axes else 1 for axis, size in enumerate(codes.shape)]
        parts = []
        for place in np.ndindex(*kept):
            ranges = [range(s) if axis in axes else [place[axis]] for axis, s in enumerate(codes.shape)]
            inside = list(itertools.product(*ranges))
            parts.append((place, inside, len(inside)))
        want = summed(codes, parts, X_Q, Y_Q, kept)
        assert np.array_equal(got, want if keepdim else want.squeeze(axes)), kind


@pytest.mark.parametrize("seed", range(6))
def test_means_near_ties(seed: int) -> None:
    """Rows of 4095 codes whose sums lie around (k + 1/2) / m: the multiplier's last bit decides."""
    x, y = (q(scale, 0) for scale in np.random.default_rng(seed).uniform(0.01, 0.02, 2))
    m = F32(x.scale / (4095 * y.scale))
    totals = [t for k in range(255) for d in (-1, 0, 1) if (t := round((k + 0.5) / float(m)) + d) <= 255 * 4095]
    codes = np.array([[t // 4095] * 4095 for t in totals])
    for row, total in zip(codes, totals, strict=True):
        row[: total % 4095] += 1
    want = [oracle.averaged(total, 4095, x, y) for total in totals]
    assert run_op("mean", codes, dim=[1], keepdim=False, **read_by(x), **result_of(y)).tolist() == want


def codes_to_average() -> dict[str, np.ndarray]:
    shape = (2, 3, 7, 6)
    alternating = np.where(np.indices(shape).sum(0) % 2, 255, 0)
    random = np.random.default_rng(12).integers(0, 256, shape)
    return {
        "lowest": np.zeros(shape, int),
        "highest": np.full(shape, 255),
        "alternating": alternating,
        "random": random,
    }


POOLS = [
    # kernel, stride, padding, ceil_mode, count_include_pad, divisor
    ((2, 2), (2, 2), (0, 0), False, True, None),
    ((3, 2), (2, 1), (1, 0), False, True, None),
    ((3, 3), (2, 2), (1, 1), False, False, None),
    ((3, 3), (2, 2), (1, 1), True, True, None),
    ((3, 3), (2, 2), (1, 1), True, False, None),
    ((2, 4), (3, 3), (1, 2), True, True, None),
    ((3, 3), (1, 2), (0, 1), True, True, 5),
    ((7, 6), (1, 1), (0, 0), False, True, 1),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_average_pools(pool: tuple[Any, ...]) -> None:
    kernel, stride, padding, ceil_mode, include, divisor = pool
    for kind, codes in codes_to_average().items():
        options = {"kernel": list(kernel), "stride": list(stride), "padding": list(padding), "ceil_mode": ceil_mode}
        options |= {"count_include_pad": include, "divisor": divisor}
        got = run_op("average_pool", codes, **options, **read_by(X_Q), **result_of(Y_Q))
        down, across = (
            list(oracle.windows(size, *window, ceil_mode))
            for size, *window in zip(codes.shape[2:], kernel, stride, padding, strict=True)
        )
        shape, parts = (*codes.shape[:2], len(down), len(across)), []
        for n, c, i, j in np.ndindex(*shape):
            (rows, height), (columns, width) = down[i], across[j]
            inside = list(itertools.product([n], [c], rows, columns))
            parts.append(((n, c, i, j), inside, divisor or (height * width if include else len(inside))))
        assert np.array_equal(got, summed(codes, parts, X_Q, Y_Q, shape)), kind


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_average_pools_over_one_dimension(ceil_mode: bool, include: bool) -> None:
    codes = codes_to_average()["random"].reshape(2, 3, 42)
    options = {"kernel": [5], "stride": [3], "padding": [2], "ceil_mode": ceil_mode, "count_include_pad": include}
    got = run_op("average_pool", codes, **options, divisor=None, **read_by(X_Q), **result_of(Y_Q))
    places = list(oracle.windows(42, 5, 3, 2, ceil_mode))
    parts = [
        ((n, c, i), [(n, c, p) for p in places[i][0]], places[i][1] if include else len(places[i][0]))
        for n, c, i in np.ndindex(2, 3, len(places))
    ]
    assert np.array_equal(got, summed(codes, parts, X_Q, Y_Q, (2, 3, len(places))))


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 6), (5, 1), (9, 8)])
def test_adaptive_average_pools(size: tuple[int, int]) -> None:
    """The parts overlap where the size does not divide; 9 parts of 7 repeat some."""
    codes = codes_to_average()["random"]
    got = run_op("adaptive_average_pool", codes, size=list(size), **read_by(X_Q), **result_of(Y_Q))
    down, across = oracle.adaptive_windows(7, size[0]), oracle.adaptive_windows(6, size[1])
    parts = []
    for n, c, i, j in np.ndindex(2, 3, *size):
        inside = list(itertools.product([n], [c], down[i], across[j]))
        parts.append(((n, c, i, j), inside, len(inside)))
    assert np.array_equal(got, summed(codes, parts, X_Q, Y_Q, (2, 3, *size)))
    flat = codes[:, :, 0]
    line = run_op("adaptive_average_pool", flat, size=[size[1]], **read_by(X_Q), **result_of(Y_Q))
    parts = [((n, c, j), [(n, c, p) for p in across[j]], len(across[j])) for n, c, j in np.ndindex(2, 3, size[1])]
    assert np.array_equal(line, summed(flat, parts, X_Q, Y_Q, (2, 3, size[1])))


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: x.mean(1, keepdim=True),
    "average pool": lambda x: functional.avg_pool2d(x, 2),
    "average pool, all options": lambda x: functional.avg_pool2d(x, 3, (2, 1), 1, True, False, 2),
    "average pool 1d": lambda x: functional.avg_pool1d(x.flatten(2), 4, padding=2),
    "adaptive": lambda x: functional.adaptive_avg_pool2d(x, (4, None)),
    "adaptive 1d": lambda x: functional.adaptive_avg_pool1d(x.flatten(2), 7),
    "global": lambda x: functional.adaptive_avg_pool2d(x, 1).flatten(1),
    "relu of a pool": lambda x: torch.relu(functional.avg_pool2d(x, 2)),
}


def test_reductions_as_modules() -> None:
    """The arguments arrive: within one step of float on values that lie on the grid of the codes."""
    x = torch.from_numpy(np.random.default_rng(13).integers(-128, 128, (4, 4, 6, 5))).float()
    x.view(-1)[:2] = torch.tensor([-128.0, 127.0])  # s = 1, z = 128: the codes hold x exactly
    functions = list(REDUCTIONS.values())
    model = Apply(lambda m, x: tuple(function(x) for function in functions))
    quantized = qbench.quantize(model, (x,), calibration=[(x,)])
    kinds = [str(node.target).split(".")[1] for node in quantized.program.graph.nodes if node.op == "call_function"]
    assert sum(kind in ("mean", "average_pool", "adaptive_average_pool") for kind in kinds) == len(REDUCTIONS)
    for (name, function), result in zip(REDUCTIONS.items(), quantized(x), strict=True):
        want = function(x)
        y = oracle.result_range(want.numpy(), "affine", 0.0 if "relu" in name else None)
        assert float((result - want).abs().max()) <= y.scale * 0.5001, name


# --- by channel ------------------------------------------------------------------------------------------------------


def test_channel_affine_for_every_code() -> None:
    x = np.stack([EVERY_CODE, EVERY_CODE[::-1]])[None].repeat(2, 0)  # [2, 2, 256]
    gamma, beta = np.array([0.71, -3.3], np.float32), np.array([-20.4, 7.7], np.float32)
    for y in RESULTS:
        got = run_op("channel_affine", x, x_zero_point=91, gamma=gamma, beta=beta, **result_of(y))
        want = np.zeros(x.shape, np.int64)
        for n, c, i in np.ndindex(*x.shape):
            value = F32(int(x[n, c, i]) - 91) * gamma[c] + beta[c]
            want[n, c, i] = oracle.requantize(value, y.zero_point, y.q_min, y.q_max)
        assert np.array_equal(got, want)


def test_a_batch_norm_before_a_layer() -> None:
    """a_c = f32(gamma s_x / s_y), b_c = f32(beta / s_y), gamma and beta in float64; the standard deviation is 2."""
    norm = on_grid(nn.BatchNorm2d(4, eps=0.25), 14)
    norm.running_mean, norm.running_var = grid(4, seed=15), torch.full((4,), 3.75)
    quantized = qbench.quantize(nn.Sequential(norm, nn.ReLU()), (X,), calibration=[(X,)])
    gamma = norm.weight.double().numpy() / 2
    beta = norm.bias.double().numpy() - norm.running_mean.double().numpy() * gamma
    floats = X.double().numpy() * gamma[:, None, None] + beta[:, None, None]
    x, y = oracle.result_range(X.numpy(), "affine"), oracle.result_range(floats, "affine", 0.0)
    held = {name.rpartition(".")[2]: tensor for name, tensor in quantized.program.tensors.items()}
    assert held["gamma"].tolist() == [float(F32(g * x.scale / y.scale)) for g in gamma]
    assert held["beta"].tolist() == [float(F32(b / y.scale)) for b in beta]
    codes = oracle.codes(WIDER, x)
    want = np.zeros(codes.shape, np.int64)
    for index in np.ndindex(*codes.shape):
        a, b = F32(gamma[index[1]] * x.scale / y.scale), F32(beta[index[1]] / y.scale)
        value = F32(int(codes[index]) - x.zero_point) * a + b
        want[index] = oracle.requantize(value, y.zero_point, y.q_min, y.q_max)
    assert np.array_equal(quantized(WIDER).numpy(), oracle.real(want, y))


# --- tables ----------------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


TABLES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "sigmoid": (torch.sigmoid, sigmoid),
    "tanh": (torch.tanh, math.tanh),
    "gelu": (functional.gelu, lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "gelu tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (functional.silu, lambda x: x * sigmoid(x)),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.1), lambda x: x if x > 0 else 0.1 * x),
    "hardswish": (functional.hardswish, lambda x: x * min(max(x + 3, 0), 6) / 6),
    "hardsigmoid": (functional.hardsigmoid, lambda x: min(max(x + 3, 0), 6) / 6),
    "elu": (lambda x: functional.elu(x, 0.7), lambda x: x if x > 0 else 0.7 * math.expm1(x)),
    "softplus": (functional.softplus, lambda x: math.log1p(math.exp(x))),
    "mish": (functional.mish, lambda x: x * math.tanh(math.log1p(math.exp(x)))),
    "exp": (torch.exp, math.exp),
    "abs": (torch.abs, abs),
    "square": (lambda x: x**2, lambda x: x * x),
    "1 - x": (lambda x: 1 - x, lambda x: 1 - x),
}


def table_of(function: Callable[[float], float], x: Q, y: Q) -> list[int]:
    """Every code of x to its code of y, in float64."""
    values = [function((code - x.zero_point) * x.scale) for code in range(256)]
    return [oracle.requantize(value / y.scale, y.zero_point, y.q_min, y.q_max) for value in values]


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_tables_against_float64(scheme: str) -> None:
    x = torch.from_numpy(np.random.default_rng(16).normal(0, 2, (64, 8))).float()
    functions = [function for function, _ in TABLES.values()]
    model = Apply(lambda m, x: tuple(function(x) for function in functions))
    quantized = qbench.quantize(model, (x,), qbench.Recipe(activation_scheme=scheme), calibration=[(x,)])
    assert quantized.float_ops == []
    read = oracle.result_range(x.numpy(), scheme)
    every = oracle.real(np.arange(read.q_min, read.q_max + 1), read).reshape(-1, 8 if scheme == "affine" else 5)
    every = np.pad(every, ((0, 0), (0, 8 - every.shape[1])))  # all codes of the input, in rows of 8
    for (name, (_, exact)), result in zip(TABLES.items(), quantized(torch.from_numpy(every)), strict=True):
        y = oracle.result_range(oracle.each(exact, x, dtype=np.float32), scheme)
        table = np.array(table_of(exact, read, y))
        want = oracle.real(table[oracle.codes(every, read)], y)
        assert np.array_equal(result.numpy(), want), name


def test_a_pre_activation_is_rounded_at_its_own_scale() -> None:
    rows, layer = grid(5, 6, seed=17), on_grid(nn.Linear(6, 3), 18)
    quantized = qbench.quantize(nn.Sequential(layer, nn.Sigmoid()), (rows,), calibration=[(rows,)])
    floats, bias = (rows @ layer.weight.T + layer.bias).numpy(), layer.bias.numpy()
    x, before = oracle.result_range(rows.numpy(), "affine"), oracle.result_range(floats, "affine")
    after = oracle.result_range(oracle.each(sigmoid, floats, dtype=np.float32), "affine")
    weight = oracle.weight(layer.weight.numpy(), bias=bias, x_scale=x.scale)
    sums = oracle.linear_sums(oracle.codes(rows, x) - x.zero_point, weight.centred, 6)
    codes = oracle.layer(sums, 1, weight, bias, x, before)
    want = oracle.real(np.array(table_of(sigmoid, before, after))[codes], after)
    assert np.array_equal(quantized(rows).numpy(), want)


# --- moves of codes --------------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor], Any]] = {
    "max_pool2d": lambda x: functional.max_pool2d(x, 3, 2, 1),
    "max_pool2d, all options": lambda x: functional.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True),
    "max_pool1d": lambda x: functional.max_pool1d(x.flatten(2), 3, 2, 1),
    "max_pool1d, all options": lambda x: functional.max_pool1d(x.flatten(2), 3, 2, 1, 2, ceil_mode=True),
    "pad": lambda x: functional.pad(x, (1, 0, 2, 1)),
    "reflect": lambda x: functional.pad(x, (1, 2, 2, 1), mode="reflect"),
    "replicate": lambda x: functional.pad(x, (1, 2, 2, 1), mode="replicate"),
    "circular": lambda x: functional.pad(x, (1, 2, 2, 1), mode="circular"),
    "crop": lambda x: functional.pad(x, (-1, 0, 0, -2)),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "flatten and back": lambda x: x.flatten(1).unflatten(1, (2, 60)),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, 2),
    "slice": lambda x: x[:, 1:, ::2],
    "select": lambda x: x[:, 1],
    "split": lambda x: x.split([1, 3], 1),
    "chunk": lambda x: x.chunk(2, 2),
    "unbind": lambda x: x.unbind(1),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(2, 3),
    "unsqueeze and repeat": lambda x: x.unsqueeze(1).repeat(1, 2, 1, 1, 1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "nearest by factor": lambda x: functional.interpolate(x, scale_factor=2),
    "nearest to size": lambda x: functional.interpolate(x, size=(7, 11)),
    "nearest 1d": lambda x: functional.interpolate(x.flatten(2), scale_factor=3),
    "pixel_shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: functional.pixel_unshuffle(x[..., :4], 2),
    "channel_shuffle": lambda x: functional.channel_shuffle(x, 2),
}


def test_moves_pass_the_codes() -> None:
    """A move of codes reads back as the move of what the codes stand for: nothing is rounded again."""
    functions = list(MOVES.values())
    model = Apply(lambda m, x: [function(torch.relu(x)) for function in functions])
    quantized = qbench.quantize(model, (X,), calibration=[(X,)])
    assert quantized.float_ops == []
    read = oracle.narrowed(oracle.result_range(X.numpy(), "affine"), 0.0, None)
    codes = np.clip(oracle.codes(WIDER, read), read.q_min, read.q_max)
    values = torch.from_numpy(oracle.real(codes, read))
    for (name, function), result in zip(MOVES.items(), quantized(WIDER), strict=True):
        want = function(values)
        pairs = zip(want, result, strict=True) if isinstance(want, tuple) else [(want, result)]
        assert all(torch.equal(a, b) for a, b in pairs), name


@pytest.mark.parametrize(
    ("name", "function", "island"),
    [
        ("padding with another value", lambda y: functional.pad(y, (1, 1), value=1.0), "pad"),
        ("softmax", lambda y: y.softmax(1), "softmax"),
        ("adaptive max-pool", lambda y: functional.adaptive_max_pool2d(y, 2), "adaptive_max_pool2d"),
        ("bilinear", lambda y: functional.interpolate(y, scale_factor=2, mode="bilinear"), "upsample_bilinear2d"),
        ("prelu", lambda y: functional.prelu(y, CONSTANT.flatten()), "prelu"),
    ],
)
def test_float_islands_are_listed(name: str, function: Callable[[Tensor], Tensor], island: str) -> None:
    """What has no integer form stays in float between two roundings, and the program says so."""
    model = on_grid(Apply(lambda m, x: function(m.layers[0](x)) * 2, nn.Conv2d(4, 4, 1)), 19)
    quantized = qbench.quantize(model, (X,), calibration=[(X,)])
    assert any(island in op for op in quantized.float_ops), quantized.float_ops
    assert quantized.int8_mac_fraction == 1.0
    assert sqnr_db(model(X), quantized(X)) > 30
