"""The bfloat16 baseline: torch's own bfloat16 to the bit, float32 at the edges, its file, its note."""

from pathlib import Path

import pytest
import torch
from programs import Apply, every_operation
from test_report import timed
from torch import nn
from torch.nn import functional

import qbench
from qbench import bfloat16
from qbench.comparison import slow_reason
from qbench.recipe import Recipe
from qbench.saved import load

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = Recipe("bf16")


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_parameters(network):
    torch.manual_seed(0)
    return network().eval()


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)), values(4, 8)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), values(4, 3, 8, 8)),
    "lstm": (lambda: First(nn.LSTM(5, 7, 2, batch_first=True)), values(4, 6, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.arange(8).reshape(4, 2)),
    "split": (lambda: Apply(lambda m, x: m.layers[0](x).split(2, 1)[1] * 2, nn.Linear(8, 4)), values(4, 8)),
    "attention": (
        lambda: Apply(lambda m, x: functional.scaled_dot_product_attention(m.layers[0](x), x, x), nn.Linear(8, 8)),
        values(4, 2, 6, 8),
    ),
}


class First(nn.Module):
    """The first result of a module that returns several."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_torchs_own_bfloat16(name):
    network, x = NETWORKS[name]
    q = qbench.quantize(with_parameters(network), (x,), BF16)
    with torch.inference_mode():
        want = with_parameters(network).bfloat16()(x.bfloat16() if x.is_floating_point() else x)
    assert want.dtype == torch.bfloat16
    assert q(x).dtype == torch.float32
    assert torch.equal(q(x), want.float())


def test_every_operation_and_folded_batch_norms():
    """Batch norms are folded before the rounding, so not the same bits: within a few roundings of 2^-9."""
    model, x = every_operation(), values(4, 3, 16, 16)
    q = qbench.quantize(model, (x,), BF16)
    with torch.inference_mode():
        y = model(x)
    assert (q(x) - y).abs().max() <= 0.05 * y.abs().max()
    assert q.int8_mac_fraction == 0.0
    assert all(tensor.dtype != torch.float32 for tensor in q.program.tensors.values())


def test_what_a_network_says_in_float32_is_said_in_bfloat16():
    """A zero state, a conversion and a number times an integer: none of them may meet a bfloat16 layer as float32."""
    model = Apply(lambda m, x: m.layers[0](x.half().float() + torch.zeros(4) + (x > 0) * 0.5), nn.Linear(4, 3))
    x = values(2, 4)
    q = qbench.quantize(model, (x,), BF16)
    with torch.inference_mode():
        assert torch.allclose(q(x), model(x), atol=0.05)


def test_the_file_is_half_and_reads_back(tmp_path: Path):
    layer, x = nn.Linear(256, 256), values(4, 256)
    sizes = {name: qbench.quantize(layer, (x,), Recipe(name)).size_bytes for name in ("fp32", "bf16")}
    assert sizes["bf16"] - sizes["fp32"] / 2 < 2048  # the program's text
    q = qbench.quantize(layer, (x,), BF16)
    q.save(tmp_path / "m.qb")
    again = load(tmp_path / "m.qb")
    assert torch.equal(again(x), q(x))
    assert (tmp_path / "m.qb").read_bytes() == (again.save(tmp_path / "n.qb"), (tmp_path / "n.qb").read_bytes())[1]


@pytest.mark.parametrize(
    ("flags", "emulated"), [(["avx2", "fma"], True), (["avx512_bf16"], False), (["amx_bf16"], False), (["bf16"], False)]
)
def test_it_says_where_it_is_emulated(monkeypatch, flags, emulated):
    monkeypatch.setattr(bfloat16, "answering_environment", lambda: {"cpu_flags": flags})
    layer, x = nn.Linear(4, 4), values(2, 4)
    assert bfloat16.is_emulated(qbench.quantize(layer, (x,), BF16).program) is emulated
    assert not bfloat16.is_emulated(qbench.quantize(layer, (x,), Recipe("woq")).program)


def test_its_latency_is_a_result_with_any_backend():
    for name in ("reference", "native"):
        assert Recipe("bf16", backend=name).latency_is_result
        assert Recipe("fp32", backend=name).latency_is_result
    assert not Recipe("woq", backend="reference").latency_is_result
    assert Recipe("woq", backend="native").latency_is_result


def test_why_it_is_slow():
    slow = timed(0.5, method="bf16", metrics={"int8_mac_fraction": 0.0})
    assert "not the arithmetic" in slow_reason(slow)
    slow.notes.append("bf16_emulated")
    assert slow_reason(slow) == "no bfloat16 instructions on this CPU: torch converts around every operation"
