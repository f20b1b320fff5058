"""Attention: every way of saying it is the same node, and that node is the specification's to the last bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle_transformer
import pytest
import torch
from oracle import Q
from programs import Apply, grid, op_program, read_by, result_of, run_op, sqnr_db
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.backends import native
from qbench.capture import capture
from qbench.native import sources
from qbench.program import Macs
from qbench.quantization import quantize_network

pytestmark = pytest.mark.usefixtures("one_thread")

READ = (Q(0.03125, 120, 0, 255), Q(0.02, 131, 0, 255), Q(0.01, 90, 0, 255))
Y = Q(0.006, 100, 3, 250)
FACTOR = 1 / math.sqrt(5)
HIDDEN = -math.inf


def codes(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape)


def masks(rows: int, keys: int) -> dict[str, Any]:
    """mask and causal of each kind; `rows hidden` leaves two queries nothing to look at."""
    random = np.random.default_rng(5)
    added = random.normal(size=(rows, keys)).astype(np.float32)
    padding = np.where(np.arange(keys) < keys - 3, 0, HIDDEN).astype(np.float32)[None].repeat(rows, 0)
    hidden = np.where(random.random((rows, keys)) < 0.5, HIDDEN, added).astype(np.float32)
    hidden[[0, rows - 1]] = HIDDEN
    return {
        "none": {},
        "causal": {"causal": True},
        "added": {"mask": added},
        "padding": {"mask": padding},
        "rows hidden": {"mask": hidden},
        "very negative": {"mask": np.where(hidden == HIDDEN, np.float32(-1e9), hidden)},
    }


SHAPES = [(7, 7, 5, 4), (3, 21, 5, 2), (18, 1, 1, 3)]  # queries, keys, size of q and k, size of v


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_static_attention_bit_for_bit(kind: str, shape: tuple[int, int, int, int]) -> None:
    rows, keys, size, width = shape
    q, k, v = codes(2, 3, rows, size, seed=1), codes(2, 3, keys, size, seed=2), codes(2, 3, keys, width, seed=3)
    given = masks(rows, keys)[kind]
    scales: dict[str, Any] = {}
    for name, read in zip("qkv", READ, strict=True):
        scales |= read_by(read, name)
    activations = [q, k, v, *([given["mask"]] if "mask" in given else [])]
    macs = Macs()
    options = {"causal": given.get("causal", False), "factor": FACTOR}
    found = run_op("attention", *activations, macs=macs, **options, **scales, **result_of(Y))
    for sample, head in np.ndindex(2, 3):
        parts = (x[sample, head] for x in (q, k, v))
        want = oracle_transformer.attention(*parts, READ, Y, **given, factor=FACTOR)
        assert np.array_equal(found[sample, head], want)
    if kind == "rows hidden":
        assert (found[:, :, [0, -1]] == Y.zero_point).all()  # zeros
    assert (macs.int8, macs.float32) == (6 * rows * keys * (size + width), 0)


@pytest.mark.parametrize("kind", masks(1, 1))
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_dynamic_attention_bit_for_bit(kind: str, scheme: str) -> None:
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(2, 3, count, size)).astype(np.float32) for count, size in ((7, 5), (7, 5), (7, 4)))
    v[1, 2] *= 100
    given = masks(7, 7)[kind]
    activations = [q, k, v, *([given["mask"]] if "mask" in given else [])]
    options = {"causal": given.get("causal", False), "factor": FACTOR, "rows": "per_row", "scheme": scheme}
    found = run_op("dynamic_attention", *activations, **options)
    for sample, head in np.ndindex(2, 3):
        parts = (x[sample, head] for x in (q, k, v))
        want = oracle_transformer.dynamic_attention(*parts, scheme, **given, factor=FACTOR)
        assert np.array_equal(found[sample, head], want)


@pytest.mark.parametrize("rows", ["per_row", "per_tensor"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("empty", ["heads", "queries", "keys", "depth", "width"])
def test_dynamic_attention_over_nothing(empty: str, causal: bool, rows: str) -> None:
    """Native must not read the scales of rows that are not there; no keys give 0 on it, the reference refuses them."""
    sizes = {name: 0 if name == empty else 3 for name in ("heads", "queries", "keys", "depth", "width")}
    parts = (("heads", "queries", "depth"), ("heads", "keys", "depth"), ("heads", "keys", "width"))
    activations = [np.ones([sizes[name] for name in names]) for names in parts]
    options = {"factor": 1.0, "causal": causal, "rows": rows, "scheme": "affine"}
    if empty != "keys":
        found = run_op("dynamic_attention", *activations, **options)
    elif sources.built():
        program, values = op_program("dynamic_attention", *activations, **options)
        found = program.lower(native(), Macs())(*values).numpy()
    else:
        pytest.skip("the native backend is not built here")
    assert found.shape == (sizes["heads"], sizes["queries"], sizes["width"])
    assert empty == "depth" or not found.any()


def test_dynamic_attention_per_tensor_shares_one_scale() -> None:
    """An outlier in one sample takes the codes of the other."""
    q = np.random.default_rng(0).normal(size=(2, 1, 6, 5)).astype(np.float32)
    spoilt = q.copy()
    spoilt[1] *= 50
    options = {"causal": False, "factor": FACTOR, "scheme": "affine"}
    for rows, same in (("per_row", True), ("per_tensor", False)):
        alone, beside = (run_op("dynamic_attention", x, x, x, rows=rows, **options)[0] for x in (q, spoilt))
        assert np.array_equal(alone, beside) is same


def test_sums_that_could_overflow_are_refused() -> None:
    """255 * 255 * 33026 is above 2^31."""
    x = torch.zeros(2, 1, 33026)
    network = capture(Apply(lambda m, x: F.scaled_dot_product_attention(x, x, x)), (x,))
    for method in ("ptdq", "ptsq"):
        with pytest.raises(ValueError, match=r"its int32 sum of 33026 products may reach 2147515650, the bound is"):
            quantize_network(network, qbench.Recipe(method=method), [(x,)])


# --- recognition -----------------------------------------------------------------------------------------------------

X = grid(3, 6, 8, seed=1)
CAUSAL = torch.full((6, 6), HIDDEN).triu(1)
BIAS = grid(2, 6, 6, seed=2)
SEEN = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.7


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N, 2, T, 4] of x [N, T, 8], all different."""
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return q, q.flip(2), q.roll(1, 3)


def whole(attended: Tensor) -> Tensor:
    return attended.transpose(1, 2).flatten(2)


def explicit(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    return change(q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Swin: a bias of each head, then a mask of each window in another shape."""
    scores = (q * 0.5).matmul(k.transpose(-2, -1)) + BIAS.unsqueeze(0)
    scores = scores.view(scores.size(0) // 3, 3, 2, 6, 6) + BIAS[:1, None, None]
    return scores.view(-1, 2, 6, 6).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nn.MultiheadAttention with weights: three dimensions, the mask in the product."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(CAUSAL, q * math.sqrt(0.25), k.transpose(-2, -1))
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 2))


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "explicit": (explicit, lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "scale on q and k": (
        lambda q, k, v: explicit(q * 2, k / 2, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    ),
    "divided": (
        lambda q, k, v: (q @ k.mT / 3).softmax(-1) @ v,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / 3),
    ),
    "added mask": (
        lambda q, k, v: explicit(q, k, v, lambda s: BIAS + s),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS),
    ),
    "causal mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, CAUSAL),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    "causal, filled": (
        lambda q, k, v: explicit(q, k, v, lambda s: s.masked_fill(CAUSAL != 0, HIDDEN)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
    "boolean mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.where(SEEN, 0.0, HIDDEN)),
    ),
    "where": (
        lambda q, k, v: explicit(q, k, v, lambda s: torch.where(SEEN, s, HIDDEN)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN),
    ),
    "mask of zeros": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.zeros(6, 6)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    ),
    "bias and window mask": (
        windows,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS + BIAS[:1, None].expand(3, 2, 6, 6)[:1]),
    ),
    "mask of keys alone": (
        lambda q, k, v: explicit(q, k, v, lambda s: s + BIAS[0, 0]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS[0, :1]),
    ),
    "three dimensions": (batched, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "shared heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)
        ),
    ),
}


@functools.cache
def form(function: Callable[..., Tensor]) -> Any:
    return capture(Apply(lambda m, x: whole(function(*heads(x)))), (X,))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("method", ["fp32", "ptdq", "ptsq"])
def test_every_form_gives_the_bytes_of_the_plain_call(name: str, method: str) -> None:
    said, plain = (quantize_network(form(f), qbench.Recipe(method=method), [(X,)]) for f in FORMS[name])
    assert torch.allclose(said(X), plain(X), atol=1e-6)
    if method != "fp32":
        assert torch.equal(said(X), plain(X))
        assert said.int8_mac_fraction == 1.0
        assert sqnr_db(whole(FORMS[name][0](*heads(X))), said(X)) > 25


NO_FORM: dict[str, Callable[..., Tensor]] = {
    "a mask that makes the scores larger": lambda q, k, v: explicit(q[:, :1], k[:, :1], v, lambda s: s + BIAS),
    "a mask of integers": lambda q, k, v: explicit(q, k, v, lambda s: s + (BIAS > 0).long()),
    "softmax of another axis": lambda q, k, v: (q @ k.mT).softmax(2) @ v,
    "scores scaled after the mask": lambda q, k, v: ((q @ k.mT + BIAS) * 2).softmax(-1) @ v,
    "scores that give way to a small number": lambda q, k, v: explicit(q, k, v, lambda s: s.masked_fill(SEEN, -3.0)),
}


@pytest.mark.parametrize("name", NO_FORM)
def test_what_is_no_attention_is_refused_not_changed(name: str) -> None:
    network = form(NO_FORM[name])
    assert torch.allclose(quantize_network(network, qbench.Recipe(method="fp32"))(X), whole(NO_FORM[name](*heads(X))))
    with pytest.raises(ValueError, match=r"aten\.matmul\.default in layer .* has no int8 form"):
        quantize_network(network, qbench.Recipe(), [(X,)])


# --- padding that is an input, cross-attention, modules --------------------------------------------------------------


class Encoder(nn.Module):
    """Two layers of nn.TransformerEncoder, and what a boolean input says is padding."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.body(x, src_key_padding_mask=padding)


class Cross(nn.Module):
    """Attention of one sequence to another."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory, need_weights=self.need_weights)[0]


def seeded(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model().eval().requires_grad_(False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


PADDING = torch.arange(9) >= torch.tensor([9, 5, 7, 1])[:, None]
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "post-norm": (Encoder, (normal(4, 9, 16, seed=1),)),
    "pre-norm": (lambda: Encoder(norm_first=True), (normal(4, 9, 16, seed=1),)),
    "padding": (Encoder, (normal(4, 9, 16, seed=1), PADDING)),
    "cross": (lambda: Cross(False), (normal(4, 9, 16, seed=1), normal(4, 5, 16, seed=2))),
    "cross, with weights": (lambda: Cross(True), (normal(4, 9, 16, seed=1), normal(4, 5, 16, seed=2))),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        (normal(4, 9, 16, seed=1), normal(4, 5, 16, seed=2)),
    ),
}


@functools.cache
def module(name: str) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    model, inputs = seeded(MODULES[name][0]), MODULES[name][1]
    return model, capture(model, inputs), inputs


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("method", "fraction", "floor_db"), [("woq", 0.0, 35), ("ptdq", 1.0, 30), ("ptsq", 1.0, 25)])
def test_modules_within_quantization_error(name: str, method: str, fraction: float, floor_db: float) -> None:
    model, network, inputs = module(name)
    q = quantize_network(network, qbench.Recipe(method=method), [inputs])
    result = q(*inputs)
    assert q.int8_mac_fraction == fraction
    assert sqnr_db(model(*inputs), result) > floor_db
    parts = [q(*(leaf[i : i + 1] for leaf in inputs)) for i in range(4)]
    if method == "ptsq":
        assert torch.equal(torch.cat(parts), result)
        torch.set_num_threads(2)
        try:
            assert torch.equal(q(*inputs), result)
        finally:
            torch.set_num_threads(1)


def test_what_is_padding_does_not_matter() -> None:
    """Under static scales: a hidden key has P = 0."""
    _, network, (x, padding) = module("padding")
    q = quantize_network(network, qbench.Recipe(), [(x, padding)])
    changed = torch.where(padding[..., None], 3.0, x)
    seen = ~padding
    assert torch.equal(q(changed, padding)[seen], q(x, padding)[seen])
    assert not torch.equal(q(changed, padding), q(x, padding))


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_attention_can_be_kept_in_float(method: str) -> None:
    model, network, inputs = module("cross")
    q = quantize_network(network, qbench.Recipe(method=method, keep_float=["attention"]), [inputs])
    assert q.int8_mac_fraction == 0.0
    assert any("scaled_dot_product_attention" in op for op in q.float_ops)
    assert torch.allclose(q(*inputs), model(*inputs), atol=1e-5)


def test_attention_weights_that_are_a_result_are_refused() -> None:
    model = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    network = capture(Apply(lambda m, x: m.layers[0](x, x, x), model), (X,))
    with pytest.raises(ValueError, match=r"aten\.bmm\.default in layer 'layers\.0' has no int8 form"):
        quantize_network(network, qbench.Recipe(), [(X,)])


@pytest.mark.parametrize("method", ["fp32", "woq", "ptdq", "ptsq"])
@pytest.mark.parametrize("name", ["padding", "cross"])
def test_there_and_back(name: str, method: str, tmp_path: Any) -> None:
    _, network, inputs = module(name)
    q = quantize_network(network, qbench.Recipe(method=method), [inputs])
    q.save(tmp_path / "m.qb")
    again = qbench.load(tmp_path / "m.qb")
    assert torch.equal(again(*inputs), q(*inputs))
    assert again.code == q.code


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_a_causal_model_stays_causal(method: str) -> None:
    """A later token of any size changes no earlier result, not by one bit."""
    model = seeded(lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    x = normal(9, 9, 16, seed=0)
    future = nn.Transformer.generate_square_subsequent_mask(9)
    network = capture(Apply(lambda m, x: m.layers[0](x, m.future, is_causal=True), model, future=future), (x,))
    q = quantize_network(network, qbench.Recipe(method=method), [(x,)])
    before = q(x)
    for token in (3, 8):
        changed = x.clone()
        changed[:, token] *= -40
        assert torch.equal(q(changed)[:, :token], before[:, :token])
        assert not torch.equal(q(changed)[:, token], before[:, token])
