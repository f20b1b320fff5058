"""The native engine against the reference: the same bytes, over a grid of layers, on each instruction set."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qbench
from qbench.backends import native, native_apart, native_plan, native_writer
from qbench.capture import capture
from qbench.metrics import sqnr_db
from qbench.model import QuantizedModel
from qbench.native import library, sources
from qbench.program import lower_graph
from qbench.quantization import quantize_network
from qbench.recipe import Recipe
from qbench.weights import final_weights
from tasks import gan, lstm, mobilenet_v2, transformer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not sources.built(), reason="the native backend is not built here"),
]

# An example costs a torch.export, and all paths together a tenth of it; the operations alone are compared on far more
# examples (programs.run_op).
few = settings(max_examples=8)
METHODS = st.sampled_from([("ptsq", "per_row"), ("ptdq", "per_row"), ("ptdq", "per_tensor"), ("woq", "per_row")])
GRANULARITIES = st.sampled_from(["per_tensor", "per_channel", "per_group"])
SCHEMES = st.sampled_from(["symmetric", "affine"])
Quantizations = st.builds(
    lambda method, granularity, scheme, activations, group: Recipe(
        method=method[0],
        activation_granularity=method[1],
        granularity=granularity,
        scheme=scheme,
        activation_scheme=activations,
        group_size=group,
    ),
    METHODS,
    GRANULARITIES,
    SCHEMES,
    SCHEMES,
    st.integers(1, 9),
)
SIZES = st.integers(1, 40)


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@functools.cache
def engines() -> dict[str, ctypes.CDLL]:
    """The library once for each instruction set that this CPU runs: it chooses one when it is first called.

    Copies, because a file that is loaded already would be the same library.
    """
    library.library()  # loads what all of them share
    found = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for path in sources.PATHS:
            patch.setenv("QBENCH_ISA", path)
            engine = library.load(Path(shutil.copy(sources.LIBRARY, Path(folder) / path)))
            if engine.qb_isa().decode() == path:
                found[path] = engine
    return found


@contextlib.contextmanager
def running(engine: ctypes.CDLL) -> Iterator[None]:
    """Within, the native backend is this library."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (library, native_apart, native_plan, native_writer):
            patch.setattr(module, "loaded_library", lambda: engine)
        yield


def assert_same(
    model: nn.Module, x: tuple[Tensor, ...], recipe: Recipe, inputs: tuple[Tensor, ...] | None = None
) -> None:
    """On every path: bytes of ptsq equal, floats of ptdq and woq within 1e-5 of the largest, the same products."""
    exact = quantize_network(capture(model, x), recipe, [x], "reference")
    want = exact(*(inputs or x))
    for path, engine in engines().items():
        with running(engine):
            q = QuantizedModel(exact.program, exact.recipe, native())
            got = q(*(inputs or x))
        for a, b in zip(leaves(want), leaves(got), strict=True):
            assert a.shape == b.shape
            if recipe.method.name == "ptsq":
                assert torch.equal(a, b), path
            elif a.numel():
                assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max()), path
        assert exact.macs == q.macs, path


def leaves(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


# --- layers ----------------------------------------------------------------------------------------------------------


@few
@given(Quantizations, SIZES, SIZES, st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans())
def test_linear(recipe: Recipe, inputs: int, outputs: int, leading: list[int], bias: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(inputs, outputs, bias), nn.ReLU(), nn.Linear(outputs, 3)))
    assert_same(model, (normal(*leading, inputs),), recipe)


@few
@given(
    Quantizations,
    st.sampled_from([(1, 5, 3), (2, 3, 2), (3, 1, 1), (6, 1, 1), (6, 1, 2), (1, 17, 18)]),
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(*[st.integers(7, 12)] * 2),
)
def test_conv(recipe: Recipe, channels: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, size: Any) -> None:
    groups, inputs, outputs = channels
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    model = seeded(lambda: nn.Conv2d(groups * inputs, groups * outputs, kernel, **options))
    assert_same(model, (normal(3, groups * inputs, *size),), recipe)


@few
@given(
    Quantizations,
    st.sampled_from([(1, 5, 3), (2, 3, 2), (3, 1, 1), (1, 17, 18)]),
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(0, 1)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
)
def test_conv_transpose(recipe: Recipe, channels: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    groups, inputs, outputs = channels
    more = tuple(min(1, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "output_padding": more}
    model = seeded(lambda: nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, **options))
    assert_same(model, (normal(2, groups * inputs, 6, 5),), recipe)


@few
@given(
    Quantizations,
    st.sampled_from([(1, 5, 3), (2, 3, 2), (6, 1, 1), (1, 17, 18)]),
    st.tuples(*[st.integers(1, 5)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(0, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
)
def test_conv_of_few_pixels(
    recipe: Recipe, channels: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, size: Any
) -> None:
    """Many taps meet nothing but padding."""
    groups, inputs, outputs = channels
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= span for n, p, span in zip(size, padding, spans, strict=True)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    model = seeded(lambda: nn.Conv2d(groups * inputs, groups * outputs, kernel, **options))
    assert_same(model, (normal(3, groups * inputs, *size),), recipe)


@few
@given(
    Quantizations,
    st.sampled_from([(1, 5, 3), (2, 3, 2), (1, 17, 1), (1, 12, 18)]),
    st.tuples(*[st.integers(1, 4)] * 2),
    st.integers(0, 1),
    st.booleans(),
)
def test_conv_transpose_of_one_pixel(recipe: Recipe, channels: Any, kernel: Any, padding: int, bias: bool) -> None:
    """A linear layer, as the first of a generator."""
    groups, inputs, outputs = channels
    padding = min(padding, (min(kernel) - 1) // 2)
    model = seeded(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, 2, padding, groups=groups, bias=bias),
            nn.ReLU(),
            nn.Conv2d(groups * outputs, 4, 1),
        )
    )
    assert_same(model, (normal(3, groups * inputs, 1, 1),), recipe)


@few
@given(Quantizations, st.booleans())
def test_one_dimension(recipe: Recipe, transposed: bool) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    assert_same(
        seeded(lambda: nn.Sequential(kind(6, 8, 3, 2, 1), nn.ReLU(), kind(8, 8, 3, groups=8))),
        (normal(3, 6, 11),),
        recipe,
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = (
            nn.Conv2d(4, 20, 3, padding=1),
            nn.Conv2d(20, 20, 3, padding=1),
            nn.Conv2d(4, 20, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.down(x))


@few
@given(Quantizations)
def test_a_fused_residual(recipe: Recipe) -> None:
    assert_same(seeded(Residual), (normal(2, 4, 7, 5),), recipe)


class Activated(nn.Module):
    """Layers that a table follows at once (and one whose codes something else reads too)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(4, 70, 3, padding=1),
                nn.Conv2d(70, 70, 3, padding=1, groups=70),
                nn.Conv2d(70, 12, 1),
                nn.ConvTranspose2d(12, 9, 3, 2),
            ]
        )
        self.shared, self.last = nn.Linear(9, 37), nn.Linear(37, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.hardswish(layer(x))
        x = self.shared(x.mean((2, 3)))
        result: Tensor = nn.functional.gelu(self.last(x * nn.functional.silu(x)))
        return result


@few
@given(Quantizations)
def test_tables_after_layers(recipe: Recipe) -> None:
    assert_same(seeded(Activated), (normal(2, 4, 7, 6),), recipe)


def test_the_layer_looks_up_the_table_that_alone_follows_it() -> None:
    x = (normal(2, 4, 7, 6),)
    model = quantize_network(capture(seeded(Activated), x), Recipe(method="ptsq"), [x], "native")
    tables = str(model.program.graph).count("qbench.table")
    lowered = lower_graph(model.program, native(), model.macs)
    kernels = [node.target.__name__ for node in lowered.graph.nodes if node.op == "call_function"]
    assert (tables, kernels.count("table")) == (6, 1)


@few
@given(Quantizations, st.integers(1, 3), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans())
def test_lstm(recipe: Recipe, layers: int, steps: int, both: bool, first: bool, bias: bool) -> None:
    model = seeded(lambda: nn.LSTM(5, 18, layers, bias=bias, batch_first=first, bidirectional=both))
    assert_same(model, (normal(steps, 3, 5) if not first else normal(3, steps, 5),), recipe)


@settings(max_examples=30)
@given(Quantizations, st.integers(1, 20), st.integers(1, 36), st.integers(8, 80), st.booleans())
def test_lstm_of_several_samples(recipe: Recipe, inputs: int, units: int, samples: int, bias: bool) -> None:
    assert_same(seeded(lambda: nn.LSTM(inputs, units, bias=bias)), (normal(3, samples, inputs),), recipe)


class Started(nn.Module):
    def __init__(self, inputs: int = 5, units: int = 7) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, units, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        result: Tensor = self.lstm(x, (h[None], c[None]))[0]
        return result


@few
@given(Quantizations)
def test_lstm_that_starts_from_a_state(recipe: Recipe) -> None:
    x = normal(3, 6, 5), normal(3, 7, seed=1), normal(3, 7, seed=2)
    assert_same(seeded(Started), x, recipe)


# What threads share out, two to four of them: inputs, units, (steps, samples).
SHARED_OUT = {
    "units": (40, 72, (20, 9)),
    "units of one sample": (1040, 60, (5, 1)),
    "units of many samples, samples with two threads": (20, 40, (3, 203)),
    "samples": (64, 16, (20, 64)),
    "samples, two steps at once": (120, 16, (21, 32)),
    "samples, both with four threads": (60, 20, (20, 64)),
}


@pytest.mark.parametrize("method", ["ptsq", "ptdq per_row", "ptdq per_tensor", "woq"])
@pytest.mark.parametrize("name", SHARED_OUT)
def test_threads_share_an_lstm(name: str, method: str) -> None:
    inputs, units, rows = SHARED_OUT[name]
    assert rows[1] * 4 * units * (units + inputs) >= 4 * 2**16  # products a step from which there are four threads
    method, _, activations = method.partition(" ")
    recipe = Recipe(method, activation_granularity=activations or "per_row", activation_scheme="affine")
    model, x = seeded(lambda: nn.LSTM(inputs, units)), normal(*rows, inputs)
    q = qbench.quantize(model, (x,), recipe, calibration=[(x,)], backend="native")
    alone = leaves(q(x))
    try:
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, alone, leaves(q(x)))), threads
        assert_same(model, (x,), recipe)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("activations", ["per_row", "per_tensor"])
def test_each_thread_leaves_an_lstm_at_a_state_that_is_not_finite(activations: str, threads: int) -> None:
    model = seeded(lambda: Started(40, 72))
    x = normal(9, 20, 40), normal(9, 72, seed=1), normal(9, 72, seed=2)
    q = qbench.quantize(model, x, Recipe("ptdq", activation_granularity=activations), backend="native")
    torch.set_num_threads(threads)
    try:
        good, value = q(*x), float(x[1][7, 3])
        x[1][7, 3] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            q(*x)
        x[1][7, 3] = value
        assert torch.equal(q(*x), good)
    finally:
        torch.set_num_threads(1)


class Attention(nn.Module):
    """Cross-attention of 4 heads of `size` with a mask for all heads, one for each sample, or none."""

    def __init__(self, mask: str, size: int = 4) -> None:
        super().__init__()
        self.mask, self.q, self.k, self.v = mask, *(nn.Linear(12, 4 * n) for n in (size, size, size + 2))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (4, -1)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        given = {"each": mask[:, None], "shared": mask[0], "none": None, "causal": None}[self.mask]
        return nn.functional.scaled_dot_product_attention(q, k, v, given, is_causal=self.mask == "causal")


@few
@given(
    Quantizations,
    st.sampled_from(["each", "shared", "none", "causal"]),
    st.one_of(st.integers(1, 40), st.integers(1, 20).map(lambda tiles: 16 * tiles), st.integers(1, 200)),
    st.sampled_from([4, 16, 33]),
)
def test_attention(recipe: Recipe, mask: str, keys: int, size: int) -> None:
    hidden = torch.where(normal(3, 9, keys, seed=3) > 0.5, -1e4, 0.0)
    assert_same(seeded(lambda: Attention(mask, size)), (normal(3, 9, 12), normal(3, keys, 12, seed=1), hidden), recipe)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 20), nn.Parameter(torch.randn(13, 20))
        self.layer, self.head = (
            nn.TransformerEncoderLayer(20, 4, 33, batch_first=True, activation="gelu"),
            nn.Linear(20, 11),
        )

    def forward(self, indices: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(self.tokens(indices) + self.places))
        return result


@few
@given(Quantizations)
def test_an_encoder(recipe: Recipe) -> None:
    indices = torch.randint(11, (3, 13), generator=torch.Generator().manual_seed(0))
    assert_same(seeded(Encoder), (indices,), recipe)


# --- between layers --------------------------------------------------------------------------------------------------


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv2d(3, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over the pixels": lambda x: x.mean((2, 3)),
    "mean, dimensions kept": lambda x: x.mean((2, 3), keepdim=True),
    "mean over the channels": lambda x: x.mean(1),
    "mean over the samples": lambda x: x.mean((0, 3)),
    "average pool": lambda x: nn.functional.avg_pool2d(x, 3, 2, 1),
    "average pool, padding not counted": lambda x: nn.functional.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=False),
    "average pool, ceil": lambda x: nn.functional.avg_pool2d(x, 3, 2, ceil_mode=True),
    "average pool, divisor": lambda x: nn.functional.avg_pool2d(x, 2, divisor_override=3),
    "adaptive average pool": lambda x: nn.functional.adaptive_avg_pool2d(x, (4, 3)),
    "max pool": lambda x: nn.functional.max_pool2d(x, 3, 2, 1),
    "max pool, dilated": lambda x: nn.functional.max_pool2d(x, 2, 1, dilation=2),
    "max pool, ceil": lambda x: nn.functional.max_pool2d(x, 2, 2, ceil_mode=True),
    "add, broadcast": lambda x: x + x.mean((2, 3), keepdim=True),
    "mul, broadcast": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "add to itself moved": lambda x: x[:, :, :5, :5] + x[:, :, :5, :5].transpose(2, 3),
    "table": torch.nn.functional.hardswish,
    "clamp": lambda x: torch.cat([x, x.flip(1)], 1).clamp(-0.5, 1.0),
    "cat": lambda x: torch.cat([x, 3 * x.abs().mean((2, 3), keepdim=True).expand_as(x)], 1),
    "moves": lambda x: nn.functional.pixel_shuffle(x[:, :16], 2).flatten(1),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("activations", ["affine", "symmetric"])
@pytest.mark.parametrize("output", ["float", "int8"])
def test_between_layers(name: str, activations: str, output: str) -> None:
    recipe = Recipe(method="ptsq", activation_scheme=activations, output=output)
    assert_same(seeded(lambda: Between(BETWEEN[name])), (normal(3, 3, 9, 7),), recipe)


def test_a_max_pool_of_any_size() -> None:
    """Each window holds the whole image: its time must not be the kernel's 2^60 taps."""
    x = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for engine in engines().values():
        with running(engine):
            pooled = native().call(torch.ops.aten.max_pool2d.default)(x, 2**30, 1, 2**29)
        assert torch.equal(pooled, x.amax((2, 3), keepdim=True).expand(2, 3, 5, 6))


class Normed(nn.Module):
    """A batch norm before a padded convolution cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1)
        self.norm.running_mean, self.norm.running_var = normal(5), normal(5, seed=1).abs() + 0.1

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.relu(self.norm(x)))
        return result


def test_a_batch_norm_that_stays() -> None:
    assert_same(seeded(Normed), (normal(3, 5, 9, 7),), Recipe(method="ptsq"))


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ptsq", "ptdq", "woq"])
def test_empty_batches_and_single_pixels(method: str) -> None:
    model, x = (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5, 2))),
        normal(2, 3, 1, 1),
    )
    for inputs in (x[:0], x[:1]):
        assert_same(model, (x,), Recipe(method=method), (inputs,))


@pytest.mark.parametrize("method", ["ptsq", "ptdq"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1), (2, 4, 1, 1)),  # some phases have no pixel
        (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1), (2, 4, 3, 1)),
        (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, padding=1), (2, 4, 1)),
        (lambda: nn.Conv2d(256, 160, 3, padding=1), (2, 256, 7, 7)),  # samples share the weight
        (lambda: nn.Conv1d(64, 64, 9), (2, 64, 50)),
    ],
)
def test_results_without_a_pixel(method: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    for inputs in (x[:0], x[:1], x):
        assert_same(seeded(make), (x,), Recipe(method=method), (inputs,))


@pytest.mark.parametrize("spread", [1e-30, 1e-6, 1e6, 1e30])
def test_ranges_of_any_size(spread: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)))
    with torch.no_grad():
        model[2].weight.mul_(spread)
    for x in (normal(5, 6, spread=spread), torch.zeros(5, 6)):
        assert_same(model, (x,), Recipe(method="ptsq"))


def test_values_beyond_the_calibrated_range_and_nan() -> None:
    model, x = (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 4, 1))),
        normal(2, 3, 6, 6),
    )
    odd = 100 * x
    odd[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert_same(model, (x,), Recipe(method="ptsq"), (odd,))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.LSTM(6, 4), lambda: nn.Conv1d(6, 4, 1)])
def test_dynamic_codes_refuse_what_is_not_finite(make: Callable[[], nn.Module]) -> None:
    x = normal(6, 6, 6)
    q = qbench.quantize(seeded(make), (x,), Recipe(method="ptdq"), backend="native")
    for odd in (torch.nan, torch.inf):
        x = normal(6, 6, 6)
        x[1, 2, 3] = odd
        with pytest.raises(ValueError, match="not finite"):
            q(x)


@pytest.mark.parametrize("method", ["ptsq", "ptdq", "woq"])
def test_another_shape_is_refused_not_read_past_its_end(method: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5)))
    shapes = {
        "dynamic_shapes": {"input": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    }
    x = normal(2, 3, 9, 9)
    q = qbench.quantize(model, (x,), Recipe(method=method), calibration=[(x,)], backend="native", **shapes)
    assert q(normal(1, 3, 12, 7)).shape == (1, 5, 8, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"does not fit|size|[Cc]alculated"):
        q(normal(1, 3, 4, 4))


WIDE = {  # more outputs than a tile has, more products than are read back at once; few rows, many, and many panels
    "one row": (lambda: nn.Linear(300, 200), (1, 300)),
    "few rows": (lambda: nn.Linear(301, 200), (5, 301)),
    "a batch": (lambda: nn.Linear(600, 70), (16, 600)),
    "many rows": (lambda: nn.Linear(300, 130), (403, 300)),
    "one pixel": (lambda: nn.Conv2d(70, 130, 3), (1, 70, 3, 3)),
    "few unaligned pixels": (lambda: nn.Conv2d(7, 130, (5, 3)), (1, 7, 5, 6)),
    "pixels": (lambda: nn.Conv2d(70, 130, 3, 2, 1), (3, 70, 23, 21)),
    "grouped": (lambda: nn.Conv2d(140, 280, 3, padding=1, groups=2), (1, 140, 7, 9)),
    "depthwise": (lambda: nn.Conv2d(70, 70, 3, 2, 1, groups=70), (3, 70, 23, 21)),
    "transposed": (lambda: nn.ConvTranspose2d(70, 66, 4, 2, 1), (2, 70, 7, 9)),
    "sequence": (lambda: nn.LSTM(70, 140), (9, 5, 70)),
    "sequences": (lambda: nn.LSTM(70, 140), (4, 203, 70)),  # read back once for all steps
    "sequences, a large weight": (lambda: nn.LSTM(20, 300), (3, 11, 20)),  # read back at each
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "recipe", [Recipe("woq"), Recipe("woq", "per_group", "affine", group_size=48)], ids=["z=0", "z"]
)
@pytest.mark.parametrize("name", WIDE)
def test_weights_read_back_piece_by_piece(name: str, recipe: Recipe, threads: int) -> None:
    make, shape = WIDE[name]
    torch.set_num_threads(threads)
    try:
        assert_same(seeded(make), (normal(*shape),), recipe)
    finally:
        torch.set_num_threads(1)


def test_no_float_copy_of_a_weight_stays() -> None:
    model, x = (
        seeded(
            lambda: nn.Sequential(
                nn.Conv2d(32, 64, 3, padding=1),
                nn.Conv2d(64, 64, 9, padding=4, groups=64),
                nn.Conv2d(64, 64, 3, padding=1, groups=2),
                nn.ConvTranspose2d(64, 32, 4, 2, 1),
                nn.Flatten(),
                nn.Linear(512, 16),
                nn.LSTM(16, 64),
            )
        ),
        normal(2, 32, 2, 2),
    )
    least = min(len(weight.flatten()) for weight in model.parameters() if weight.dim() > 1)
    q = qbench.quantize(model, (x,), Recipe("woq"), backend="native")

    def held() -> dict[int, Tensor]:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects of torch warn when they are looked at
            tensors = [t for t in gc.get_objects() if isinstance(t, Tensor)]
        return {id(t): t for t in tensors if t.is_floating_point() and t.numel() >= least}

    before = held()
    for _ in range(2):
        q(x)
    assert not [list(t.shape) for t in held().values() if id(t) not in before]


# --- whole networks, threads, instruction sets -----------------------------------------------------------------------

TASKS = {
    "ci_mobilenet_v2": partial(mobilenet_v2.task, width=0.35, checkpoint="ci_mobilenet_v2"),
    "ci_lstm": partial(lstm.task, checkpoint="ci_lstm"),
    "ci_transformer": partial(transformer.task, width=64, checkpoint="ci_transformer"),
    "ci_gan": partial(gan.task, source=lambda: nn.Identity(), checkpoint="ci_gan"),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("method", "granularity", "scheme"),
    [("ptsq", "per_group", "affine"), ("ptdq", "per_channel", "symmetric"), ("woq", "per_group", "affine")],
)
def test_trained_networks_of_the_four_families(name: str, method: str, granularity: str, scheme: str) -> None:
    """ptsq gives the same bytes; ptdq the same integers but for values that float parts move across a boundary."""
    task = TASKS[name]()
    model, calibration = final_weights(task, Path()), task.calibration()[:2]
    examples = tuple(leaf[:8] for leaf in task.evaluation().inputs)
    recipe = Recipe(method=method, granularity=granularity, scheme=scheme)
    network = capture(model, calibration[0])
    exact = quantize_network(network, recipe, calibration, "reference")
    want = exact(*examples)
    for path, engine in engines().items():
        with running(engine):
            got = QuantizedModel(exact.program, exact.recipe, native())(*examples)
        if method == "ptsq":
            assert torch.equal(want, got), path
        else:
            noise = sqnr_db(want, got)
            assert noise is None or noise > (45 if method == "ptdq" else 90), path


@pytest.mark.parametrize("path", sources.PATHS)
def test_threads_and_batches_do_not_matter(path: str) -> None:
    if path not in engines():
        pytest.skip(f"this CPU does not run {path}")
    model, x = (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 70, 3), nn.ReLU(), nn.Flatten(), nn.Linear(70 * 49, 40))),
        normal(9, 3, 9, 9),
    )
    with running(engines()[path]):
        q = qbench.quantize(model, (x,), Recipe(method="ptsq"), calibration=[(x,)], backend="native")
        one = q(x)
        torch.set_num_threads(2)
        assert torch.equal(one, q(x))
        torch.set_num_threads(1)
        assert torch.equal(one, torch.cat([q(row[None]) for row in x]))


class BetweenLayers(nn.Module):
    """Element-wise calls of torch between int8 layers: the first reads its operand in two orders."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.last(nn.functional.gelu(y + y.transpose(1, 2)))
        return result


def test_a_plan_overwrites_what_nothing_needs_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    x, placed, place = normal(3, 12, 12), [], native_plan._place
    monkeypatch.setattr(native_plan, "_place", lambda buffers: placed.append(buffers) or place(buffers))
    q = quantize_network(capture(seeded(BetweenLayers), (x,)), Recipe(method="ptdq"), None, "native")
    lowered = lower_graph(q.program, native(), q.macs)
    got = native_plan.Plan(native_plan.Recording(lowered, [x], q.macs)).run([x], q.macs)
    assert got is not None
    assert torch.equal(got[0], lowered(x)[0])
    assert sum(buffer.over is not None for buffer in placed[0]) == 1  # of gelu, over the sum; not the sum over y


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that went through a program in pieces, which here are as small as they can be."""
    sizes: list[int] = []
    monkeypatch.setattr(native_apart, "PIECE_BYTES", 1)
    run = native_apart.Apart.run
    monkeypatch.setattr(native_apart.Apart, "run", lambda self, x, macs: sizes.append(len(x[0])) or run(self, x, macs))
    return sizes


class Branches(nn.Module):
    """What stands in an image network: each piece of a batch can go through alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.last, self.padded = nn.Conv2d(24, 7, 1), nn.Conv2d(7, 5, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.first(x))
        y = nn.functional.max_pool2d(y * torch.sigmoid(y) + self.second(y), 2)
        result: Tensor = self.padded(nn.functional.adaptive_avg_pool2d(self.last(y), 2)).flatten(1)
        return result


@pytest.mark.parametrize("path", sources.PATHS)
def test_samples_apart_are_the_batch(path: str, apart: list[int]) -> None:
    if path not in engines():
        pytest.skip(f"this CPU does not run {path}")
    model, x = seeded(Branches), normal(16, 3, 24, 20)
    for method in "ptsq", "ptdq":
        recipe = Recipe(method=method, activation_granularity="per_row") if method == "ptdq" else Recipe(method=method)
        exact = quantize_network(capture(model, (x,)), recipe, [(x,)], "reference")
        want = exact(x)
        with running(engines()[path]):
            q = quantize_network(capture(model, (x,)), recipe, [(x,)], "native")
            for threads, batch in (1, 16), (2, 16), (2, 3), (2, 2):
                torch.set_num_threads(threads)
                given = x[:batch]
                before = q.macs.int8
                got = q(given)
                counted = q.macs.int8 - before
                torch.set_num_threads(1)
                torch.testing.assert_close(got, want[:batch], rtol=0, atol=0 if method == "ptsq" else 1e-5)
                before = exact.macs.int8
                exact(given)
                assert counted == exact.macs.int8 - before
        assert apart == ([16, 16, 2] if method == "ptsq" else [])
        apart.clear()


class Heads(nn.Module):
    """Attention whose batch stays the first dimension; that of nn.MultiheadAttention does not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.parts(x).chunk(3, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.norm(x + self.out(y.transpose(1, 2).flatten(2)))
        return result


def test_sequences_apart_are_the_batch(apart: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and rows fold as samples do. A single sequence is copied in fewer dimensions: it stays with another."""
    model, x = seeded(Heads), normal(6, 10, 32)
    want = quantize_network(capture(model, (x,)), Recipe(method="ptsq"), [(x,)], "reference")(x)
    for samples in 2, 3:
        monkeypatch.setattr(native_apart, "piece_of", lambda *_, samples=samples: samples)
        assert torch.equal(quantize_network(capture(model, (x,)), Recipe(method="ptsq"), [(x,)], "native")(x), want)
    assert apart == [6, 6]


MIXED = {  # what samples of a batch have to do with each other
    "a mean over the batch": lambda y: y + y.mean(0, keepdim=True),
    "a sample of another place": lambda y: y + y.flip(0),
    "the batch as rows": lambda y: y.flatten(2).transpose(0, 1),
    "the batch as channels": lambda y: y.reshape(1, -1, *y.shape[2:]),
    "a running sum": lambda y: y.cumsum(0),
    "one sample for all": lambda y: y[:1] + y,
}


@pytest.mark.parametrize("how", MIXED)
def test_samples_that_need_each_other_stay_together(how: str, apart: list[int]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.relu(MIXED[how](self.conv(x)))
            return result

    model, x = seeded(Mixed), normal(4, 3, 12, 12)
    want = quantize_network(capture(model, (x,)), Recipe(method="ptsq"), [(x,)], "reference")(x)
    q = quantize_network(capture(model, (x,)), Recipe(method="ptsq"), [(x,)], "native")
    assert torch.equal(q(x), want)
    assert not apart


def test_two_threads_may_run_one_model() -> None:
    model, x = seeded(lambda: nn.LSTM(20, 40, 2)), normal(30, 16, 20)
    q = qbench.quantize(model, (x,), Recipe(method="ptsq"), calibration=[(x,)], backend="native")
    want, seen = q(x)[0], []
    threads = [threading.Thread(target=lambda: seen.extend(q(x)[0] for _ in range(5))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 10
    assert all(torch.equal(want, y) for y in seen)


def test_a_path_that_there_is_not_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "from qbench.native.library import isa; isa()"]
    for forced, good in (("sse9", False), ("portable", True)):
        monkeypatch.setenv("QBENCH_ISA", forced)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is good
        assert good or f"QBENCH_ISA={forced}: this CPU or this build has no such path" in done.stderr


def test_the_paths_of_this_cpu_are_tested() -> None:
    """All of this file compares each of them; a name that QBENCH_ISA does not know leaves the choice of what runs."""
    assert {"portable", library.isa()} <= set(engines())


def without_memory() -> None:
    """Gates of a weight-only step of 2^18 samples take 64 MB of scratch, the rest below 16 MB: there is room for 32.

    To be called in a new process, whose heap has no free memory from before.
    """
    model = seeded(lambda: nn.LSTM(1, 1, batch_first=True))
    few_samples, x = normal(2, 1, 1), normal(2**18, 1, 1)
    q = qbench.quantize(model, (few_samples,), Recipe(method="woq"), backend="native")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 32 * 2**20, limits[1]))
    with pytest.raises(MemoryError, match=r"^no memory is left for what qb_\w+ needs beside its results: "):
        q(x)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(q(x)[0], torch.cat([q(part)[0] for part in x.chunk(2)]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process its size")
def test_a_lack_of_memory_is_an_error_and_no_end() -> None:
    command = [sys.executable, "-c", "import test_native; test_native.without_memory()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "sha256", lambda: "0" * 64)
    for cached in (library.loaded_library, sources.built):
        cached.cache_clear()
    try:
        with pytest.raises(library.NativeUnavailable, match="not built here; install a C"):
            library.library()
    finally:
        monkeypatch.undo()
        for cached in (library.loaded_library, sources.built):
            cached.cache_clear()
        library.library()
