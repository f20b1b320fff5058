"""Who multiplies in int8: the counted fraction, what is refused, and what keep_float allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from programs import Apply, every_operation, grid, on_grid, sqnr_db
from torch import Tensor, nn
from torch.nn import functional

import qbench
from qbench.capture import Network, capture
from qbench.program import Macs
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 16, 16))).float()


@functools.cache
def network() -> Network:
    return capture(every_operation(), (X,))


@pytest.mark.parametrize(("method", "fraction"), [("fp32", 0.0), ("woq", 0.0), ("ptdq", 1.0), ("ptsq", 1.0)])
def test_the_fraction_of_each_method(method: str, fraction: float) -> None:
    q = quantize_network(network(), qbench.Recipe(method=method), [(X,)])
    assert q.int8_mac_fraction == fraction  # before the first call: counted over two examples of zeros
    assert (q.macs.int8, q.macs.float32) == (0, 0)
    q(X)
    assert q.int8_mac_fraction == fraction


def test_multiply_accumulates_by_hand() -> None:
    """Linear 7 x 5 on 2 rows: 70 a sample. Conv 4 -> 6 in 2 groups, 3 x 3, on 5 x 4 places: 6 * 2 * 9 * 20 = 2160."""
    macs = {}
    for name, layer, x in (
        ("linear", nn.Linear(7, 5), grid(3, 2, 7, seed=1)),
        ("conv", nn.Conv2d(4, 6, 3, groups=2, padding=1), grid(3, 4, 5, 4, seed=2)),
    ):
        captured = capture(layer, (x,))
        for method in ("fp32", "woq", "ptdq", "ptsq"):
            q = quantize_network(captured, qbench.Recipe(method=method), [(x,)])
            q(x[:1])
            q(x)
            macs[name, method] = (q.macs.float32, q.macs.int8)
    for method in ("fp32", "woq"):
        assert (macs["linear", method], macs["conv", method]) == ((4 * 70, 0), (4 * 2160, 0))
    for method in ("ptdq", "ptsq"):
        assert (macs["linear", method], macs["conv", method]) == ((0, 4 * 70), (0, 4 * 2160))


def test_the_fraction_of_nothing() -> None:
    assert Macs().int8_fraction is None
    q = qbench.quantize(nn.ReLU(), (X,), calibration=[(X,)])
    assert q.int8_mac_fraction is None


@pytest.mark.parametrize("output", ["float", "int8"])
def test_one_quantize_at_most_one_dequantize(output: str) -> None:
    """The program of a CNN: int8 from the input to the result."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    q = qbench.quantize(model, (X,), qbench.Recipe(output=output), calibration=[(X,)])
    targets = [str(node.target) for node in q.program.graph.nodes]
    assert targets.count("qbench.quantize.default") == 1
    assert targets.count("qbench.dequantize.default") == (output == "int8")
    assert q.float_ops == []
    assert all(name in q.code for name in ("qbench.conv", "qbench.table", "qbench.linear", "max_pool2d"))


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[nn.Module, str, Callable[[Any, Tensor], Tensor]]] = {
    "matmul of two activations": (nn.Conv2d(3, 3, 1), "matmul", lambda m, x: m.layers[0](x) @ x),
    "batched products": (
        nn.Conv2d(3, 3, 1), "bmm", lambda m, x: torch.bmm(m.layers[0](x).flatten(2), x.flatten(2).transpose(1, 2)),
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(1, 2, 2), "conv_transpose3d", lambda m, x: m.layers[0](x[:, None])),
    "Conv3d": (nn.Conv3d(1, 2, 3), "conv3d", lambda m, x: m.layers[0](x[:, None])),
    "attention with dropout": (
        nn.Linear(16, 16), "scaled_dot_product_attention",
        lambda m, x: functional.scaled_dot_product_attention(m.layers[0](x), x, x, dropout_p=0.1),
    ),
    "a computed weight": (nn.Linear(16, 16), "linear", lambda m, x: functional.linear(m.layers[0](x)[0, 0], x[0, 0])),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_no_multiplication_stays_in_float_silently(name: str) -> None:
    module, operation, function = REFUSED[name]
    model = on_grid(Apply(function, module))
    captured = capture(model, (X,))
    for method in ("ptdq", "ptsq"):
        with pytest.raises(ValueError, match=rf"aten\.{operation}\S* in layer '\S+' has no int8 form; .* keep_float"):
            quantize_network(captured, qbench.Recipe(method=method), [(X,)])
    assert quantize_network(captured, qbench.Recipe(method="woq"))(X).shape == model(X).shape


@pytest.mark.parametrize("name", ["ConvTranspose3d", "Conv3d"])
def test_keep_float_leaves_the_named_layer_in_float(name: str) -> None:
    module, operation, function = REFUSED[name]
    model = on_grid(Apply(lambda m, x: m.layers[1](function(m, x).flatten(1)[:, :16]), module, nn.Linear(16, 5)))
    captured = capture(model, (X,))
    for method in ("ptdq", "ptsq"):
        q = quantize_network(captured, qbench.Recipe(method=method, keep_float=["layers.0"]), [(X,)])
        assert 0 < q.int8_mac_fraction < 1
        assert any(operation in op for op in q.float_ops)
        assert sqnr_db(model(X), q(X)) > 30
        exact = quantize_network(captured, qbench.Recipe(method=method, keep_float=["layers.*"]), [(X,)])
        assert exact.int8_mac_fraction == 0.0
        assert torch.equal(exact(X), model(X))


def test_keep_float_takes_patterns_and_says_what_there_is() -> None:
    names = {"before": ["stem.0", "depth*"], "one": ["head"], "all": ["*"]}
    fractions = {
        name: quantize_network(network(), qbench.Recipe(keep_float=patterns), [(X,)]).int8_mac_fraction
        for name, patterns in names.items()
    }
    assert 0 == fractions["all"] < fractions["before"] < fractions["one"] < 1
    with pytest.raises(
        ValueError, match=r"keep_float: 'body\.\*' matches no layer; layers are stem\.0, depthwise\.0, "
    ):
        quantize_network(network(), qbench.Recipe(keep_float=["head", "body.*"]), [(X,)])


def test_a_product_of_the_models_own_forward_can_be_named() -> None:
    model = on_grid(Apply(REFUSED["matmul of two activations"][2], nn.Conv2d(3, 3, 1)))
    captured = capture(model, (X,))
    with pytest.raises(ValueError, match="has no int8 form") as refused:
        quantize_network(captured, qbench.Recipe(), [(X,)])
    layer = str(refused.value).split("'")[1]
    q = quantize_network(captured, qbench.Recipe(keep_float=[layer]), [(X,)])
    assert q.int8_mac_fraction == pytest.approx(3 / (3 + 16))  # conv: 3 a place, matmul: 16
    assert sqnr_db(model(X), q(X)) > 35


# --- calibration that cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "method ptsq needs calibration data"),
        (None, "method ptsq needs calibration data"),
        (
            [(X,), (X[:, :2],)],
            r"calibration batch 1: input 0 has the shape \[4, 2, 16, 16\], the network takes \[any, 3, 16",
        ),
        ([(X, X)], "calibration batch 0: the network takes 1 input tensors, 2 were given"),
        ([(X.double(),)], "calibration batch 0: input 0 is float64, the network takes float32"),
        ([(X * float("nan"),)], "calibration batch 0: it has values that are not finite"),
        ([(X * 3e38,)], "the calibration data give a value that is not finite"),
    ],
)
def test_calibration_is_checked(calibration: Any, message: str) -> None:
    scaled = [tuple(t.clamp(-3e38, 3e38) for t in batch) for batch in calibration] if "give" in message else calibration
    with pytest.raises(ValueError, match=message):
        quantize_network(network(), qbench.Recipe(), scaled)


@pytest.mark.parametrize("method", ["woq", "ptdq", "ptsq"])
def test_parameters_that_are_not_finite_are_named(method: str) -> None:
    model = on_grid(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)))
    model[1].weight.data[1, 2] = float("nan")
    x = grid(4, 7, seed=3)
    recipe = qbench.Recipe(method=method)
    with pytest.raises(ValueError, match=r"not finite"):
        qbench.quantize(model, (x,), recipe, calibration=[(x,)])
