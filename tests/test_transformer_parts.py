"""Layer norm, embeddings and GELU against plain Python; whole Transformers as they come."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import oracle_transformer
import pytest
import torch
from oracle import F32, Q
from programs import Apply, grid, on_grid, read_by, result_of, run_op, sqnr_db
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import qbench
from qbench.calibrate import INTEGER, calibrate
from qbench.capture import Network, capture
from qbench.convert import static_program
from qbench.layers import Recorder, layer_table
from qbench.program import Macs, lower_graph
from qbench.quantization import quantize_network
from qbench.recipe import option
from qbench.saved import SavedModelError, load
from qbench.simulate import simulate_node
from tasks.transformer import CharacterModel

pytestmark = pytest.mark.usefixtures("one_thread")

# --- layer norm ------------------------------------------------------------------------------------------------------

READ, Y = Q(0.05, 113, 0, 255), Q(0.02, 128, 1, 255)


@pytest.mark.parametrize("shape", [(7,), (40,), (3, 5)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1.0])
def test_layer_norm_bit_for_bit(shape: tuple[int, ...], eps: float) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (4, 2, *shape))
    x[0, 0] = 77  # a row without variance
    x[1, 1] = 77
    x[1, 1].flat[0] = 78
    gamma, beta = (random.normal(size=shape).astype(np.float32) for _ in range(2))
    held = {name: (p.astype(float) / Y.scale).astype(np.float32) for name, p in (("gamma", gamma), ("beta", beta))}
    found = run_op("layer_norm", x, **held, eps=eps, **read_by(READ), **result_of(Y))
    for index in np.ndindex(4, 2):
        want = oracle_transformer.layer_norm(x[index].ravel(), READ, gamma.ravel(), beta.ravel(), eps, Y)
        assert np.array_equal(found[index].ravel(), want)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_in_a_network(affine: bool) -> None:
    x, layer = grid(5, 3, 8, seed=1), nn.LayerNorm(8, elementwise_affine=affine)
    q = qbench.quantize(on_grid(layer) if affine else layer, (x,), calibration=[(x,)])
    assert q.float_ops == []
    assert sqnr_db(layer(x), q(x)) > 35
    assert [n.split(".")[1] for n in map(str, targets(q))] == ["quantize", "layer_norm", "dequantize"]


def targets(q: qbench.QuantizedModel) -> list[Any]:
    return [node.target for node in q.program.graph.nodes if node.op == "call_function"]


def test_a_layer_norm_of_another_size_is_refused() -> None:
    gamma = np.ones(5, np.float32)
    with pytest.raises(ValueError, match=r"layer_norm over \[5\] met an input of shape \[2, 4\]"):
        run_op("layer_norm", np.zeros((2, 4), int), gamma=gamma, beta=gamma, eps=1e-5, **read_by(READ), **result_of(Y))


# --- embedding -------------------------------------------------------------------------------------------------------

INDICES = torch.tensor([[0, 5, 5], [10, 3, 1]])
GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@functools.cache
def table() -> nn.Module:
    return on_grid(nn.Embedding(11, 7), 3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_embedding_bit_for_bit(granularity: str, scheme: str) -> None:
    """Codes R(f32(q_w - z_w) * f32(s_w / s_y)) under ptsq, the rows that the codes stand for else."""
    model = Apply(lambda m, x: m.layers[0](x), table())
    network, rows = capture(model, (INDICES,)), table().weight.numpy()
    weight = oracle.weight(rows, granularity, scheme, group_size=3)
    for method in ("woq", "ptdq"):
        recipe = qbench.Recipe(method=method, granularity=granularity, scheme=scheme, group_size=3)
        q = quantize_network(network, recipe)
        assert np.array_equal(q(INDICES).numpy(), weight.real[INDICES.numpy()])
        assert (q.int8_mac_fraction, q.float_ops) == (None, [])
    recipe = qbench.Recipe(granularity=granularity, scheme=scheme, group_size=3)
    seen = rows[INDICES.numpy()]
    y = oracle.choose(float(seen.min()), float(seen.max()), "affine", 128)
    codes = np.zeros(rows.shape, np.int64)
    for i, j in np.ndindex(*rows.shape):
        q_w = weight.q[i][j // weight.block]
        value = F32(int(weight.codes[i, j]) - q_w.zero_point) * oracle.multiplier(1.0, q_w.scale, y.scale)
        codes[i, j] = oracle.requantize(value, y.zero_point, y.q_min, y.q_max)
    found = quantize_network(network, recipe, [(INDICES,)])
    assert np.array_equal(found(INDICES).numpy(), oracle.real(codes, y)[INDICES.numpy()])
    assert found.float_ops == []


@pytest.mark.parametrize("method", ["woq", "ptdq", "ptsq"])
@pytest.mark.parametrize("index", [-1, 11, 2**40])
def test_an_index_that_is_no_row_is_one_clear_error(method: str, index: int) -> None:
    q = qbench.quantize(table(), (INDICES,), qbench.Recipe(method=method), calibration=[(INDICES,)])
    with pytest.raises(ValueError, match=rf"an embedding of 11 rows met indices from .*{index}"):
        q(torch.tensor([[0, index, 2]]))


def test_an_embedding_can_be_kept_in_float() -> None:
    model = nn.Sequential(table(), on_grid(nn.Linear(7, 4), 5))
    q = qbench.quantize(model, (INDICES,), qbench.Recipe(keep_float=["0"]), calibration=[(INDICES,)])
    assert [op.split(": ")[1] for op in q.float_ops] == ["aten.embedding.default"]


# --- a causal character model ----------------------------------------------------------------------------------------


@functools.cache
def characters() -> tuple[nn.Module, Network, list[tuple[Tensor]]]:
    """The task's own network, small; its calibration."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CharacterModel(characters=30, context=12, layers=2, width=32, heads=4).eval().requires_grad_(False)
    batches = [(torch.from_numpy(np.random.default_rng(s).integers(0, 30, (8, 12))),) for s in range(3)]
    return model, capture(model, batches[0]), batches[:2]


def text(seed: int, count: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(100 + seed).integers(0, 30, (count, 12)))


METHODS = {"woq": (0.0, 35), "ptdq": (1.0, 30), "ptsq": (1.0, 22)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_character_model(method: str, granularity: str, tmp_path: Path) -> None:
    model, network, batches = characters()
    q = quantize_network(network, qbench.Recipe(method=method, granularity=granularity, group_size=16), batches)
    x = text(0)
    fraction, floor_db = METHODS[method]
    assert q.int8_mac_fraction == fraction
    assert sqnr_db(model(x), q(x)) > floor_db - 6 * (granularity == "per_tensor")
    if method == "ptsq":
        assert q.float_ops == []
        assert not any(str(target).startswith("qbench.quantize") for target in targets(q))  # integers in
    q.save(tmp_path / "m.qb")
    again = load(tmp_path / "m.qb")
    assert torch.equal(again(x), q(x))
    assert again.code == q.code


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_a_later_character_changes_no_earlier_result(method: str) -> None:
    _, network, batches = characters()
    q = quantize_network(network, qbench.Recipe(method=method), batches)
    before = q(text(1))
    for place in (1, 6, 11):
        changed = text(1)
        changed[:, place] = (changed[:, place] + 7) % 30
        after = q(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_codes_depend_neither_on_the_batch_nor_on_threads(method: str) -> None:
    """ptdq: fed with the same float values, each int8 operation gives each sample its own bytes."""
    _, network, batches = characters()
    q = quantize_network(network, qbench.Recipe(method=method), batches)
    x = text(2)
    if method == "ptsq":
        torch.set_num_threads(2)
        try:
            assert torch.equal(torch.cat([q(part) for part in x.split([1, 2, 3])]), q(x))
        finally:
            torch.set_num_threads(1)
        return
    recorder = Recorder(lower_graph(q.program, q.backend, Macs()))
    recorder.run(x)
    nodes = [n for n in recorder.module.graph.nodes if getattr(n.target, "__name__", "").startswith("dynamic")]
    assert {n.target.__name__ for n in nodes} == {"dynamic_linear", "dynamic_attention"}
    for node in nodes:
        values = [recorder.kept[source.name] for source in node.args]
        alone = torch.cat([node.target(*(value[i : i + 1] for value in values)) for i in range(len(x))])
        assert torch.equal(alone, recorder.kept[node.name])


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_layers_has_attention_and_embeddings(method: str) -> None:
    _, network, batches = characters()
    recipe = qbench.Recipe(method=method)
    q = quantize_network(network, recipe, batches)
    rows = {row.layer: row for row in layer_table(network, recipe, q, batches[0])}
    assert ("blocks.0" in rows) == (method != "woq")
    if method != "woq":  # two products of 12 x 12 x 32
        attention = rows["blocks.0"]
        assert (attention.macs, attention.bytes, attention.weight_codes_used) == (2 * 12 * 12 * 32, 0, None)
    assert (rows["characters"].operation, rows["characters"].macs) == ("embedding", 0)
    assert rows["head"].macs == 12 * 32 * 30
    assert all(row.sqnr_alone_db > 20 for row in rows.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fake_quantization_agrees_with_execution_layer_by_layer(granularity: str) -> None:
    """At most one step, at most one element in 1000; fed with the int8 program's own values."""
    _, network, batches = characters()
    recipe = qbench.Recipe(granularity=granularity, group_size=16)
    plan = calibrate(network, recipe, [list(batch) for batch in batches])
    recorder = Recorder(lower_graph(static_program(plan), option("backend", "reference"), Macs()))
    with torch.inference_mode():
        recorder.run(text(3, 60))
    seen = set()
    for node in plan.network.graph.nodes:
        if node.target not in INTEGER or node.name in plan.accumulators:
            continue
        inputs = {s.name: real(plan, recorder.kept[s.name], s.name) for s in node.all_input_nodes if s.op != "get_attr"}
        q = plan.qparams[node.name]
        simulated = simulate_node(plan, node, inputs)
        apart = (simulated / q.scale + q.zero_point).round() - recorder.kept[node.name].float()
        assert float(apart.abs().max()) <= 1, node.name
        assert float((apart != 0).float().mean()) <= 1e-3, node.name
        seen.add(node.target.__name__)
    assert {"attention", "layer_norm", "embedding", "unary", "linear", "add"} <= seen


def real(plan: Any, value: Tensor, name: str) -> Tensor:
    if value.dtype != torch.uint8:
        return value
    q = plan.qparams[name]
    return (value.int() - q.zero_point).float() * q.scale


# --- hostile files ---------------------------------------------------------------------------------------------------

CHANGES = {
    "factor": ("attention", "factor", float(2**61), "factor=.* is out of bounds"),
    "q_scale": ("attention", "q_scale", 0.0, "q_scale=0.0 is out of bounds"),
    "v_zero_point": ("attention", "v_zero_point", 300, "v_zero_point=300 is out of bounds"),
    "causal": ("attention", "causal", 1, "causal=1 is no bool"),
    "eps": ("layer_norm", "eps", -1.0, "eps=-1.0 is out of bounds"),
    "gamma": ("layer_norm", "gamma", None, "gamma=None is no Tensor"),
    "block": ("embedding", "block", 0, "block=0 is out of bounds"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_argument_is_refused(name: str, tmp_path: Path) -> None:
    operation, argument, value, message = CHANGES[name]
    _, network, batches = characters()
    q = quantize_network(network, qbench.Recipe(), batches)
    node = next(n for n in q.program.graph.nodes if str(n.target) == f"qbench.{operation}.default")
    node.kwargs = {**node.kwargs, argument: value}
    q.save(tmp_path / "m.qb")
    with pytest.raises(SavedModelError, match=message):
        load(tmp_path / "m.qb")


# --- vision transformers, as they come -------------------------------------------------------------------------------


def vit() -> nn.Module:
    return VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)


def swin() -> nn.Module:
    """Two stages; windows of 4 x 4, shifted in every second block."""
    return SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=10)


@pytest.mark.parametrize("build", [vit, swin], ids=lambda build: build.__name__)
def test_vision_transformers_as_they_come(build: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("head", "relative_position_bias", "class_token")):
                nn.init.normal_(parameter, std=0.5)  # of zeros, or next to none, as they are made
    images = F.interpolate(torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 8, 8))).float(), (32, 32))
    want, network = model(images), capture(model, (images,))
    for method, fraction, floor_db in (("woq", 0.0, 30), ("ptdq", 1.0, 25), ("ptsq", 1.0, 15)):
        q = quantize_network(network, qbench.Recipe(method=method), [(images,)])
        result = q(images)
        assert q.int8_mac_fraction == fraction
        assert sqnr_db(want, result) > floor_db, method
        if method == "ptsq":
            assert torch.equal(torch.cat([q(part) for part in images.split([1, 2, 3])]), result)
            assert sum("attention" in str(target) for target in targets(q)) == {"vit": 2, "swin": 4}[build.__name__]
