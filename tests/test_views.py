"""Chains of views: shorter, and still the same; linear layers in the order in which their inputs lie."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qbench
from qbench.backends.native_plan import Recording
from qbench.capture import Network, capture
from qbench.program import Macs, lower_graph
from qbench.recipe import Recipe
from qbench.views import VIEWS


def views(network: Network) -> list[str]:
    return [node.target._schema.name for node in network.graph.nodes if node.target in VIEWS]


def assert_as_eager(model: nn.Module, *inputs: Tensor, network: Network | None = None) -> None:
    (got,) = (network or capture(model, inputs)).module()(*inputs)
    torch.testing.assert_close(got, model(*inputs), rtol=1e-5, atol=1e-5)


def _is(x: Tensor, axis: int, *sizes: int) -> bool:
    """Has an axis one of these sizes, also while it is captured? None of them is a multiple of the batches' 5 and 7."""
    return isinstance(x.shape[axis], int) and x.shape[axis] in sizes


class Chain(nn.Module):
    """Views, one after another, between two operations."""

    def __init__(self, steps: list[tuple[str, int, int]], linear: bool) -> None:
        super().__init__()
        self.steps, self.linear = steps, nn.Linear(4, 6) if linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        for index, (name, a, b) in enumerate(self.steps):
            rank = x.dim()
            if name == "transpose":
                x = x.transpose(a % rank, b % rank)
            elif name == "flatten" and rank > 1:
                x = x.flatten(a % (rank - 1), a % (rank - 1) + 1)
            elif name == "split":
                axis = a % rank
                x = x.unflatten(axis, (2, -1)) if _is(x, axis, 4, 6, 12) else x.unsqueeze(axis)
            elif name == "select" and rank > 2 and _is(x, a % rank, 3):
                x = x.select(a % rank, b % 3)
            if index == 2 and _is(x, -1, 4):
                x = self.linear(x)
        return torch.cos(x)


STEPS = st.tuples(st.sampled_from(["transpose", "flatten", "split", "select"]), st.integers(0, 5), st.integers(0, 5))


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=7), st.booleans())
def test_any_chain_computes_the_same(steps: list[tuple[str, int, int]], linear: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Chain(steps, linear).eval()
    x = torch.arange(5 * 3 * 4 * 6, dtype=torch.float32).reshape(5, 3, 4, 6)
    network = capture(model, (x,))
    for inputs in (x, torch.cat([x, x[:2]])):
        assert_as_eager(model, inputs, network=network)


def test_multi_head_attention_moves_nothing() -> None:
    """Batch and tokens are not swapped, heads are views: the engine copies nothing, and adds within the layers."""
    model = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    assert_as_eager(model, x)
    network = capture(model, (x,))
    assert views(network) == [*("aten::reshape", "aten::select", "aten::permute") * 3, "aten::permute", "aten::reshape"]
    q = qbench.quantize(model, (x,), Recipe(method="ptsq"), calibration=[(x,)])
    if q.backend.name == "native":
        calls = Recording(lower_graph(q.program, q.backend, Macs()), [x], Macs()).writer.calls
        assert [call.function for call in calls].count("qb_copy") == 0
        assert "qb_add" not in [call.function for call in calls]


def test_batch_second_and_attention_to_another_sequence() -> None:
    swapped = nn.TransformerEncoderLayer(16, 2, 24).eval()
    x = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0))
    assert_as_eager(swapped, x)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            result: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
            return result

    assert_as_eager(Cross().eval(), torch.randn(3, 5, 16), torch.randn(3, 9, 16))


def test_two_free_sizes_stay_as_they_are_written() -> None:
    """A swap of two sizes that nobody knows must not look like none."""

    class Swapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(torch.sin(x).reshape(x.shape[1], x.shape[0], 4).transpose(0, 1))

    x = torch.arange(5 * 3 * 4, dtype=torch.float32).reshape(5, 3, 4)
    free = {"x": {0: torch.export.Dim("n"), 1: torch.export.Dim("length")}}
    network = capture(Swapped(), (x,), dynamic_shapes=free)
    for inputs in (x, x[:2], x[:, :2]):
        assert_as_eager(Swapped(), inputs, network=network)
