"""Weight-only quantization (woq) and the float program (fp32)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from programs import Apply, every_operation, grid, on_grid
from torch import nn

import qbench
from qbench.capture import Network, capture
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

GRANULARITIES = {"per_tensor": 1, "per_channel": 1, "per_group": 3}  # name: blocks of 7 inputs at group_size 3
ROWS, IMAGES = grid(3, 2, 7, seed=1, step=0.1), grid(2, 4, 5, 4, seed=2, step=0.1)


@functools.cache
def network() -> Network:
    layers = [nn.Linear(7, 5), nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=2), nn.Conv1d(4, 3, 2, bias=False)]
    model = Both(*(on_grid(layer, seed) for seed, layer in enumerate(layers)))
    return capture(model, (ROWS, IMAGES))


class Both(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.linear, self.conv, self.line = layers

    def forward(self, rows: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(rows), self.conv(images), self.line(images.flatten(2))


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_are_those_of_the_dequantized_weights(granularity: str, scheme: str) -> None:
    """Sums in float64 over the oracle's weights, within 1e-5."""
    q = quantize_network(network(), qbench.Recipe(method="woq", granularity=granularity, scheme=scheme, group_size=3))
    held = network().tensors
    read = {
        name: oracle.weight(held[f"{name}.weight"].numpy(), granularity, scheme, 3).real.astype(float)
        for name in ("linear", "conv", "line")
    }
    lines = IMAGES.double().numpy().reshape(2, 4, 1, 20)
    want = [
        oracle.linear_sums(ROWS.double().numpy(), read["linear"], 7)[0] + held["linear.bias"].double().numpy(),
        oracle.conv_sums(IMAGES.double().numpy(), read["conv"], 1, (2, 2), ((1, 1), (1, 1)), (1, 1), 4)[0]
        + held["conv.bias"].double().numpy().reshape(-1, 1, 1),
        oracle.conv_sums(lines, read["line"][:, :, None], 4, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)[0][:, :, 0],
    ]
    for result, exact in zip(q(ROWS, IMAGES), want, strict=True):
        exact = exact.astype(float)
        assert np.abs(result.numpy() - exact).max() <= 1e-5 * np.abs(exact).max()
    assert q.int8_mac_fraction == 0.0
    assert len(q.float_ops) >= 3
    blocks = {"linear": GRANULARITIES[granularity], "conv": 1, "line": 2 if granularity == "per_group" else 1}
    for name, outputs in (("linear", 5), ("conv", 8), ("line", 3)):
        rows = 1 if granularity == "per_tensor" else outputs
        assert list(q.program.tensors[f"{name}.weight_scale"].shape) == [rows, blocks[name]]
        assert q.program.tensors[f"{name}.weight"].dtype == torch.int8
        assert np.array_equal(
            q.program.tensors[f"{name}.weight"].numpy(),
            oracle.weight(held[f"{name}.weight"].numpy(), granularity, scheme, 3).codes,
        )


def test_fp32_is_the_model_itself() -> None:
    model, x = every_operation(), torch.from_numpy(np.random.default_rng(3).normal(size=(4, 3, 16, 16))).float()
    q = qbench.quantize(model, (x,), qbench.Recipe(method="fp32"))
    assert torch.allclose(q(x), model(x), rtol=1e-5, atol=1e-5)  # batch norms are folded
    assert q.int8_mac_fraction == 0.0
    assert all(tensor.dtype != torch.int8 for tensor in q.program.tensors.values())


def test_without_batch_norms_fp32_is_the_model_to_the_bit() -> None:
    model, x = on_grid(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))), ROWS
    assert torch.equal(qbench.quantize(model, (x,), qbench.Recipe(method="fp32"))(x), model(x))


def test_the_file_is_a_quarter(tmp_path: Path) -> None:
    layer, x = nn.Linear(512, 512), torch.zeros(2, 512)
    sizes = {}
    for method in ("fp32", "woq", "ptdq", "ptsq"):
        q = qbench.quantize(layer, (x,), qbench.Recipe(method=method), calibration=[(x + 1,)])
        q.save(tmp_path / "m.qb")
        sizes[method] = q.size_bytes
        assert (tmp_path / "m.qb").stat().st_size == q.size_bytes
    assert sizes["fp32"] > 4 * 512 * 512
    for method in ("woq", "ptdq", "ptsq"):
        assert sizes[method] - 512 * 512 < 4 * 512 * 2 + 4096  # a scale and a bias an output, and the program


def test_a_model_is_not_changed_and_a_tied_weight_has_one_copy_for_each_scale() -> None:
    layer = on_grid(nn.Linear(7, 7), 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    q = qbench.quantize(Apply(lambda m, x: m.layers[0](m.layers[0](x)), layer), (ROWS,), qbench.Recipe(method="woq"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    weight = torch.from_numpy(oracle.weight(layer.weight.numpy()).real)
    want = nn.functional.linear(nn.functional.linear(ROWS, weight, layer.bias), weight, layer.bias)
    assert torch.allclose(q(ROWS), want, rtol=1e-5, atol=1e-5)
    assert sum(tensor.dtype == torch.int8 for tensor in q.program.tensors.values()) == 1
