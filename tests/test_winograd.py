"""Convolutions by Winograd's minimal filtering: the reference's bytes on each instruction set; which layers take it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import op_program
from test_native import GRANULARITIES, SCHEMES, assert_same, engines, few, normal, running, seeded
from torch import Tensor, nn

import qbench
from qbench.backends import native, native_plan, native_windows, reference
from qbench.native import sources
from qbench.program import Macs, lower_graph
from qbench.recipe import Recipe

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not sources.built(), reason="the native backend is not built here"),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution that can is filtered, whether that is faster or not."""
    monkeypatch.setattr(native_windows.Images, "filters", _can)


def _can(self: native_windows.Images, window: Any) -> bool:
    return self.can_filter(window) and self.sums_fit


CHANNELS = st.integers(1, 70)


@pytest.mark.usefixtures("always")
@few
@given(
    st.sampled_from(["ptsq", "ptdq"]),
    GRANULARITIES,
    SCHEMES,
    SCHEMES,
    st.tuples(CHANNELS, CHANNELS),
    st.tuples(*[st.integers(0, 3)] * 2),
    st.tuples(*[st.integers(3, 14)] * 2),
    st.integers(1, 3),
)
def test_the_same_bytes(
    method: str, granularity: str, scheme: str, activations: str, channels: Any, padding: Any, size: Any, samples: int
) -> None:
    recipe = Recipe(
        method,
        granularity=granularity,
        scheme=scheme,
        activation_scheme=activations,
        group_size=5,
        activation_granularity="per_row",
    )
    model = seeded(lambda: nn.Sequential(nn.Conv2d(*channels, 3, padding=padding), nn.Hardswish()))
    x = normal(samples, channels[0], *size)
    x[0] *= 3  # a dynamic scale of its own
    assert_same(model, (x,), recipe)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 37, 3, padding=1), nn.Conv2d(37, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.relu(x + self.second(torch.relu(self.first(x))))
        return result


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_and_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        assert_same(seeded(Residual), (normal(5, 4, 23, 18),), Recipe("ptsq"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.usefixtures("always")
def test_more_channels_than_are_multiplied_at_once() -> None:
    assert_same(seeded(lambda: nn.Conv2d(1100, 17, 3, padding=1)), (normal(2, 1100, 5, 6),), Recipe("ptsq"))


def layer(weight: np.ndarray, zero_point: int | None, x: np.ndarray, x_zero_point: int) -> dict[str, Tensor]:
    """What each path makes of a layer's accumulators, as float32; and the reference, by the name `reference`."""
    outputs, inputs = weight.shape[:2]
    program, values = op_program(
        "conv",
        x,
        weight=weight.astype(np.int8),
        weight_scale=np.ones((1, 1), np.float32),
        weight_zero_point=None if zero_point is None else np.full((1, 1), zero_point, np.int8),
        block=inputs,
        bias=np.zeros(outputs, np.int32),
        x_scale=1.0,
        x_zero_point=x_zero_point,
        scale=None,
        zero_point=0,
        q_min=0,
        q_max=255,
        stride=[1, 1],
        padding=[1, 1],
        dilation=[1, 1],
        groups=1,
    )
    results = {"reference": program.lower(reference(), Macs())(*values)}
    for path, engine in engines().items():
        with running(engine):
            results[path] = program.lower(native(), Macs())(*values)
    return results


# 255 * 9 * 57 * 255 is just below 2^25.
@pytest.mark.parametrize(("value", "zero_point", "inputs"), [(127, None, 115), (-128, None, 114), (127, -128, 57)])
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("pixels", ["all", "some"])
def test_sums_as_large_as_they_may_be(value: int, zero_point: int | None, inputs: int, pixels: str) -> None:
    """At the last number of inputs whose sums fit: beyond 2^24, where float32 rounds, but equal."""
    rng = np.random.default_rng(0)
    weight = np.full((3, inputs, 3, 3), value)
    weight[1:] = rng.choice([-128, 127, value], weight[1:].shape)
    x = np.full((1, inputs, 6, 9), 255) if pixels == "all" else rng.choice([0, 255], (1, inputs, 6, 9))
    assert fits(weight, zero_point)
    assert not fits(np.concatenate([weight, weight[:, :1]], 1), zero_point)
    results = layer(weight, zero_point, x, 0)
    assert float(results["reference"].abs().max()) > 2**24 or pixels == "some"
    for path, result in results.items():
        assert torch.equal(result, results["reference"]), path


def fits(weight: np.ndarray, zero_point: int | None) -> bool:
    """Do the sums that a weight leads to fit into what minimal filtering recovers?"""
    zero_points = None if zero_point is None else torch.full((1, 1), zero_point, dtype=torch.int8)
    constants = {"weight": torch.from_numpy(weight).to(torch.int8), "weight_zero_point": zero_points}
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "block": weight.shape[1]}
    return native_windows.Images({**constants, **geometry}).sums_fit


def functions(model: nn.Module, x: Tensor, recipe: Recipe) -> list[str]:
    """The engine's functions that a plan of the model calls for its layers."""
    q = qbench.quantize(model, (x,), recipe, calibration=[(x,)], backend="native")
    recording = native_plan.Recording(lower_graph(q.program, native(), q.macs), [x], q.macs)
    layers = ("qb_layer", "qb_depthwise", "qb_winograd", "qb_weight_only", "qb_weight_only_depthwise")
    return [call.function for call in recording.writer.calls if call.function in layers]


@pytest.mark.parametrize("path", sources.PATHS)
def test_which_layers_are_filtered(path: str) -> None:
    """3 x 3 taps of stride 1, channels and tiles enough, sums that fit; integers alone; not where AMX multiplies."""
    if path not in engines():
        pytest.skip(f"this CPU does not run {path}")

    def conv(*options: Any, **more: Any) -> nn.Module:
        return seeded(lambda: nn.Conv2d(32, *options, **more))

    static, x = Recipe("ptsq"), normal(1, 32, 16, 16)
    by, other = ("qb_layer" if path == "amx" else "qb_winograd"), "qb_layer"
    full = seeded(lambda: nn.Conv2d(128, 32, 3, padding=1, bias=False))
    nn.init.ones_(full.weight)
    with running(engines()[path]):
        assert functions(conv(32, 3, padding=1), x, static) == [by]
        assert functions(conv(32, 3, padding=1), x, Recipe("ptdq")) == [by]
        assert functions(conv(32, 3, padding=1), x, Recipe("woq")) == ["qb_weight_only"]
        assert functions(conv(32, 3, padding=1), x, Recipe("ptsq", granularity="per_group", group_size=8)) == [other]
        assert functions(conv(32, 3, padding=1, groups=2), x, static) == [other]
        assert functions(conv(32, 3, padding=1, groups=32), x, static) == ["qb_depthwise"]
        assert functions(conv(32, 3, 2, 1), x, static) == [other]
        assert functions(conv(32, 3, padding=2, dilation=2), x, static) == [other]
        assert functions(conv(32, 5, padding=2), x, static) == [other]
        assert functions(conv(3, 3, padding=1), x, static) == [other]
        assert functions(conv(32, 3, padding=1), x[..., :5, :5], static) == [other]
        assert functions(full, normal(1, 128, 16, 16), static) == [other]
