"""LSTM layers in every method, against loops over Python's integers, from the float parameters to the last bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lstm_oracle
import numpy as np
import oracle
import pytest
import torch
from lstm_oracle import Weights
from oracle import F32, Q
from programs import grid, on_grid, sqnr_db
from safetensors.torch import load as load_tensors
from test_saved import signed
from torch import Tensor, nn

import qbench
from qbench import float_ops
from qbench.calibrate import calibrate
from qbench.capture import Network, capture
from qbench.convert import static_program
from qbench.encoded import find_target
from qbench.layers import Recorder, layer_table
from qbench.numerics import QParams
from qbench.program import Macs, lower_graph
from qbench.quantization import quantize_network
from qbench.recipe import option
from qbench.saved import SavedModelError, dump
from qbench.simulate import Simulation, simulate_lstm

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP_SIZE, INPUTS, HIDDEN, STEPS, EXAMPLES = 3, 5, 4, 3, 2
# --- the networks ----------------------------------------------------------------------------------------------------


class Stated(nn.Module):
    """An nn.LSTM that starts from given states, or (with `only_c`) from a given c alone."""

    def __init__(self, only_c: bool = False, **options: Any) -> None:
        super().__init__()
        self.lstm, self.only_c = nn.LSTM(INPUTS, HIDDEN, **options), only_c

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        h, c = h.transpose(0, 1), c.transpose(0, 1)  # the batch is dimension 0 of every input
        return self.lstm(x, (torch.zeros_like(h) if self.only_c else h, c))


OPTIONS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "plain": (nn.LSTM, {}),
    "layers, no bias, batch first": (nn.LSTM, {"num_layers": 2, "bias": False, "batch_first": True}),
    "both directions, layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "state": (Stated, {"batch_first": True}),
    "state, layers, both directions": (Stated, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "state of c only, no bias": (Stated, {"only_c": True, "bias": False}),
}


@dataclass(frozen=True)
class Case:
    """A captured network with its nn.LSTM, calibration data and other inputs."""

    lstm: nn.LSTM
    model: nn.Module
    network: Network
    calibration: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    only_c: bool

    @property
    def sequence(self) -> np.ndarray:
        """x with time first."""
        x = self.inputs[0].numpy()
        return x.swapaxes(0, 1) if self.lstm.batch_first else x

    @property
    def directions(self) -> int:
        return 1 + self.lstm.bidirectional

    def state(self, index: int, part: int) -> np.ndarray | None:
        """h (part 0) or c (part 1) of one layer and direction, None for zeros."""
        if len(self.inputs) == 1 or (part == 0 and self.only_c):
            return None
        return self.inputs[1 + part].numpy()[:, index]

    def parameters(self, layer: int, reverse: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """weight_ih, weight_hh and b_ih + b_hh."""
        suffix = f"l{layer}" + "_reverse" * reverse
        ih, hh = (getattr(self.lstm, f"weight_{part}_{suffix}").numpy() for part in ("ih", "hh"))
        if not self.lstm.bias:
            return ih, hh, None
        return ih, hh, sum(getattr(self.lstm, f"bias_{part}_{suffix}").numpy() for part in ("ih", "hh"))


def inputs_of(options: dict[str, Any], stated: bool, examples: int, seed: int) -> tuple[Tensor, ...]:
    x = grid(*((examples, STEPS) if options.get("batch_first") else (STEPS, examples)), INPUTS, seed=seed)
    count = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    states = [grid(examples, count, HIDDEN, seed=seed + n, step=0.05) for n in (1, 2)]
    return (x, *states) if stated else (x,)


@functools.cache
def case(name: str) -> Case:
    make, options = OPTIONS[name]
    model = on_grid(make(**options) if make is Stated else make(INPUTS, HIDDEN, **options), seed=20)
    for parameter in model.parameters():
        parameter.data *= 0.5
    stated = make is Stated
    calibration, inputs = (inputs_of(options, stated, count, seed) for count, seed in ((4, 1), (EXAMPLES, 5)))
    shapes = None if options.get("batch_first") else time_first_shapes(stated)
    lstm = model.lstm if stated else model
    return Case(lstm, model, capture(model, calibration, shapes), calibration, inputs, options.get("only_c", False))


def time_first_shapes(stated: bool) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch")
    return ({1: batch}, *[{0: batch}] * (2 * stated))


def quantized(name: str, **recipe: Any) -> qbench.QuantizedModel:
    recipe = {"group_size": GROUP_SIZE, **recipe}
    return quantize_network(case(name).network, qbench.Recipe(**recipe), [case(name).calibration])


def flat(result: Any) -> list[np.ndarray]:
    """y, h_n and c_n."""
    y, (h, c) = result
    return [value.numpy() for value in (y, h, c)]


def stacked(
    case: Case, layer_of: Callable[[int, int, np.ndarray], tuple[np.ndarray, np.ndarray]],
    joined: Callable[[int, list[np.ndarray]], np.ndarray], first: np.ndarray,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:  # fmt: skip
    """y, h_n and c_n of all layers from a function of one layer and direction; `joined` unites two directions."""
    x, hidden, cells = first, [], []
    for layer in range(case.lstm.num_layers):
        outputs = []
        for reverse in range(case.directions):
            y, c = layer_of(layer, reverse, x[::-1] if reverse else x)
            hidden.append(y[-1])
            cells.append(c)
            outputs.append(y[::-1] if reverse else y)
        x = joined(layer, outputs)
    return x, hidden, cells


RECIPES = [
    {"granularity": granularity, "scheme": scheme, "activation_scheme": activation_scheme}
    for granularity in ("per_tensor", "per_channel", "per_group")
    for scheme, activation_scheme in (("symmetric", "affine"), ("affine", "symmetric"))
]


def name_of(recipe: dict[str, str]) -> str:
    return "-".join(recipe.values())


def weights_of(case: Case, layer: int, reverse: int, recipe: dict[str, str], x_scale: float | None) -> Weights:
    """As codes; the bias raises the scales of weight_ih where it is on the grid of x's sum."""
    ih, hh, bias = case.parameters(layer, reverse)
    options = recipe["granularity"], recipe["scheme"], GROUP_SIZE
    raised = (bias, x_scale) if x_scale is not None else ()
    return Weights(oracle.weight(ih, *options, *raised), oracle.weight(hh, *options), bias)


# --- static ----------------------------------------------------------------------------------------------------------


def grid_of(kwargs: dict[str, Any], recipe: dict[str, str], prefix: str = "") -> Q:
    """Scale and zero point among the arguments of a call, with all codes of the scheme."""
    lowest = 1 if recipe["activation_scheme"] == "symmetric" else 0
    return Q(kwargs[f"{prefix}scale"], kwargs[f"{prefix}zero_point"], lowest, 255)


def rescaled(codes: np.ndarray, x: Q, y: Q) -> np.ndarray:
    if (x.scale, x.zero_point) == (y.scale, y.zero_point):
        return codes
    m = F32(x.scale / y.scale)
    return oracle.each(lambda q: oracle.requantize(F32(q - x.zero_point) * m, y.zero_point, y.q_min, y.q_max), codes)


class Static:
    """What the oracle makes of a case, given the scales of the program."""

    def __init__(self, case: Case, q: qbench.QuantizedModel, recipe: dict[str, str]) -> None:
        self.case, self.recipe = case, recipe
        calls = [node for node in q.program.graph.nodes if node.target is torch.ops.qbench.lstm.default]
        self.kwargs = {node.meta["layer"].rpartition(".")[2]: node.kwargs for node in calls}
        results = next(node for node in q.program.graph.nodes if node.op == "output").args[0]
        self.y_grid, self.h_grid = (grid_of(node.kwargs, recipe, "x_") for node in results[:2])

    def of(self, layer: int, reverse: int = 0) -> dict[str, Any]:
        return self.kwargs[f"l{layer}" + "_reverse" * reverse]

    def layer(self, layer: int, reverse: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = layer * self.case.directions + reverse
        read, y = (grid_of(self.of(layer, reverse), self.recipe, prefix) for prefix in ("x_", ""))
        h, c = self.case.state(index, 0), self.case.state(index, 1)
        weights = weights_of(self.case, layer, reverse, self.recipe, read.scale)
        return lstm_oracle.static(x, read, y, weights, None if h is None else oracle.codes(h, y), c)

    def joined(self, layer: int, outputs: list[np.ndarray]) -> np.ndarray:
        if len(outputs) == 1:
            return outputs[0]
        last = layer + 1 == self.case.lstm.num_layers
        after = self.y_grid if last else grid_of(self.of(layer + 1), self.recipe, "x_")
        own = [grid_of(self.of(layer, reverse), self.recipe) for reverse in range(2)]
        return np.concatenate([rescaled(y, grid, after) for y, grid in zip(outputs, own, strict=True)], axis=2)

    def results(self) -> list[np.ndarray]:
        """y, h_n and c_n as the network returns them."""
        x = self.case.calibration[0].numpy()
        read = oracle.choose(float(x.min()), float(x.max()), self.recipe["activation_scheme"], 128)
        assert grid_of(self.of(0), self.recipe, "x_") == read
        y, hidden, cells = stacked(self.case, self.layer, self.joined, oracle.codes(self.case.sequence, read))
        own = [grid_of(kwargs, self.recipe) for kwargs in self.kwargs.values()]
        h = np.stack([rescaled(h, grid, self.h_grid) for h, grid in zip(hidden, own, strict=True)])
        y = oracle.real(y, self.y_grid)
        return [y.swapaxes(0, 1) if self.case.lstm.batch_first else y, oracle.real(h, self.h_grid), np.stack(cells)]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("name", OPTIONS)
def test_static(name: str, recipe: dict[str, str]) -> None:
    """Every code, given the scales of h; test_scales_of_h says where those come from."""
    q = quantized(name, **recipe)
    for found, want in zip(flat(q(*case(name).inputs)), Static(case(name), q, recipe).results(), strict=True):
        assert found.dtype == want.dtype == np.float32
        assert np.array_equal(found, want)
    assert q.int8_mac_fraction == 1.0


@pytest.mark.parametrize("name", OPTIONS)
def test_scales_of_h(name: str) -> None:
    """The range of h over all steps, and of a given first one, in float64."""
    tested, recipe = case(name), {"activation_scheme": "affine"}
    static = Static(tested, quantized(name), recipe)
    calibrated = Case(tested.lstm, tested.model, tested.network, tested.calibration, tested.calibration, tested.only_c)
    ends: dict[str, list[float]] = {}

    def layer_of(layer: int, reverse: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = layer * tested.directions + reverse
        states = [calibrated.state(index, part) for part in range(2)]
        y, c = lstm_oracle.exact(x, *calibrated.parameters(layer, reverse), *states)
        seen = y if states[0] is None else np.concatenate([states[0][None], y])
        ends[f"l{layer}" + "_reverse" * reverse] = [seen.min(), seen.max()]
        return y, c

    stacked(calibrated, layer_of, lambda layer, outputs: np.concatenate(outputs, axis=2), calibrated.sequence)
    for key, (low, high) in ends.items():
        want = oracle.choose(float(low), float(high), "affine", 128)
        assert static.kwargs[key]["scale"] == pytest.approx(want.scale, rel=1e-5)
        assert abs(static.kwargs[key]["zero_point"] - want.zero_point) <= 1


# --- dynamic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["per_row", "per_tensor"])
@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("name", OPTIONS)
def test_dynamic(name: str, recipe: dict[str, str], rows: str) -> None:
    """Between the products all is float32 in the order of the specification, so equal to the last bit."""
    tested, q = case(name), quantized(name, method="ptdq", activation_granularity=rows, **recipe)

    def layer_of(layer: int, reverse: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = layer * tested.directions + reverse
        weights = weights_of(tested, layer, reverse, recipe, None)
        states = [tested.state(index, part) for part in range(2)]
        return lstm_oracle.dynamic(x, weights, *states, recipe["activation_scheme"], rows == "per_row")

    want, hidden, cells = stacked(tested, layer_of, lambda layer, y: np.concatenate(y, axis=2), tested.sequence)
    y, h, c = flat(q(*tested.inputs))
    assert np.array_equal(y, want.swapaxes(0, 1) if tested.lstm.batch_first else want)
    assert np.array_equal(h, np.stack(hidden))
    assert np.array_equal(c, np.stack(cells))
    assert q.int8_mac_fraction == 1.0


# --- weights only and fp32 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("name", OPTIONS)
def test_weight_only(name: str, recipe: dict[str, str]) -> None:
    """The layer of the dequantized weights in float64, within 1e-5."""
    tested = case(name)
    q = quantized(name, method="woq", granularity=recipe["granularity"], scheme=recipe["scheme"])

    def layer_of(layer: int, reverse: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = layer * tested.directions + reverse
        weights = weights_of(tested, layer, reverse, recipe, None)
        states = [tested.state(index, part) for part in range(2)]
        return lstm_oracle.exact(x, weights.ih.real, weights.hh.real, weights.bias, *states)

    want, hidden, cells = stacked(tested, layer_of, lambda layer, y: np.concatenate(y, axis=2), tested.sequence)
    y, h, c = flat(q(*tested.inputs))
    assert np.allclose(y, want.swapaxes(0, 1) if tested.lstm.batch_first else want, rtol=0, atol=1e-5)
    assert np.allclose(h, np.stack(hidden), rtol=0, atol=1e-5)
    assert np.allclose(c, np.stack(cells), rtol=1e-5, atol=1e-5)
    assert q.int8_mac_fraction == 0.0


@pytest.mark.parametrize("name", OPTIONS)
def test_fp32_is_the_model_itself(name: str) -> None:
    tested, q = case(name), quantized(name, method="fp32")
    for found, want in zip(flat(q(*tested.inputs)), flat(tested.model(*tested.inputs)), strict=True):
        assert np.allclose(found, want, rtol=0, atol=1e-6)


# --- a whole network -------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two layers in both directions, and a decision on the mean over time."""

    def __init__(self, inputs: int = 6, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


def sequences(count: int, steps: int, seed: int) -> Tensor:
    """Random walks, normalized."""
    steps_of = np.random.default_rng(seed).normal(size=(count, steps, 6))
    return torch.from_numpy(steps_of.cumsum(1) / steps**0.5).float()


@functools.cache
def classifier() -> tuple[nn.Module, Network]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier().eval().requires_grad_(False)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("steps", min=2)},)
    return model, capture(model, (sequences(3, 7, 0),), shapes)


def quantized_classifier(**recipe: Any) -> qbench.QuantizedModel:
    return quantize_network(classifier()[1], qbench.Recipe(**recipe), [(sequences(32, 20, 1),)])


METHODS = ("woq", "ptdq", "ptsq")


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
@pytest.mark.parametrize("method", METHODS)
def test_within_quantization_error_at_any_length(method: str, recipe: dict[str, str]) -> None:
    """Of torch's own network, on other sequences, longer and shorter than the example's seven steps."""
    q = quantized_classifier(method=method, **recipe)
    for steps in (5, 7, 31):
        x = sequences(16, steps, 2)
        assert sqnr_db(classifier()[0](x), q(x)) > 20
    assert q.int8_mac_fraction == (0.0 if method == "woq" else 1.0)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_batch_size_and_threads_do_not_matter(method: str, granularity: str) -> None:
    q = quantized("layers, no bias, batch first", method=method, granularity=granularity)
    x = grid(9, STEPS, INPUTS, seed=11, step=0.1)
    whole, _ = q(x)
    assert torch.equal(whole, torch.cat([q(part)[0] for part in x.split(2)]))
    assert torch.equal(whole, torch.cat([q(part)[0] for part in x.split(1)]))
    many = grid(1000, STEPS, INPUTS, seed=12, step=0.1)  # fewer are not worth a second thread
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = q(many)
        torch.set_num_threads(2)
        assert torch.equal(q(many)[0], alone)
    finally:
        torch.set_num_threads(threads)


def test_the_static_program_is_int8_from_end_to_end() -> None:
    """Both directions share a scale and zero point: nothing is rescaled. The input is quantized once, then turned."""
    q = quantized_classifier()
    targets = [str(node.target) for node in q.program.graph.nodes if node.op == "call_function"]
    assert targets.count("qbench.lstm.default") == 4
    assert "qbench.rescale.default" not in targets
    assert not [target for target in targets if "zeros" in target or "sym_size" in target]
    assert targets.count("qbench.quantize.default") == 1
    assert q.float_ops == []


@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_a_learned_first_state_is_a_constant(method: str) -> None:
    """As a buffer, its batch fixed: quantized where it is read, and kept in the file."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(INPUTS, HIDDEN)
            self.register_buffer("h", grid(1, EXAMPLES, HIDDEN, seed=4, step=0.05))

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x, (self.h, torch.zeros_like(self.h)))[0]

    model, x = on_grid(Learned(), seed=3), grid(STEPS, EXAMPLES, INPUTS, seed=5)
    q = quantize_network(capture(model, (x,), ({},)), qbench.Recipe(method=method), [(x,)])
    assert sqnr_db(model(x), q(x)) > 20
    model.h.zero_()
    assert sqnr_db(model(x), q(x)) < 20  # guards the test: the state matters


# --- multiply-accumulates, the per-layer table -----------------------------------------------------------------------


def test_multiply_accumulates_by_hand() -> None:
    """Each of 4 x 4 gates has 5 + 4 (second layer 4 + 4) products at each of 3 steps of 2 examples."""
    for method in ("fp32", *METHODS):
        q = quantized("layers, no bias, batch first", method=method)
        q(*case("layers, no bias, batch first").inputs)
        expected = 16 * (5 + 4 + 4 + 4) * STEPS * EXAMPLES
        integer = method in ("ptdq", "ptsq")
        assert (q.macs.int8, q.macs.float32) == ((expected, 0) if integer else (0, expected))


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_a_row_for_each_layer_and_direction(method: str) -> None:
    recipe, x = qbench.Recipe(method=method, scheme="affine"), sequences(4, 7, 6)
    q = quantize_network(classifier()[1], recipe, [(x,)])
    rows = layer_table(classifier()[1], recipe, q, (x,))
    assert [row.layer for row in rows] == ["lstm.l0", "lstm.l0_reverse", "lstm.l1", "lstm.l1_reverse", "head"]
    assert [row.macs for row in rows] == [7 * 64 * (6 + 16)] * 2 + [7 * 64 * (32 + 16)] * 2 + [3 * 32]
    per_output = 2 * (4 + 1) + 4  # two scales and zero points, one bias
    assert [row.bytes for row in rows[:4]] == [64 * (size + per_output) for size in (22, 22, 48, 48)]
    assert sum(row.bytes for row in rows) == sum(tensor.nbytes for tensor in q.program.tensors.values())
    assert all(row.sqnr_alone_db > 25 and row.sqnr_in_place_db > 20 for row in rows)


def test_the_table_of_a_network_that_starts_from_a_state() -> None:
    tested = case("state, layers, both directions")
    for method in METHODS:
        recipe = qbench.Recipe(method=method)
        q = quantize_network(tested.network, recipe, [tested.calibration])
        rows = layer_table(tested.network, recipe, q, tested.inputs)
        assert [row.layer for row in rows] == ["lstm.l0", "lstm.l0_reverse", "lstm.l1", "lstm.l1_reverse"]
        assert all(row.sqnr_alone_db > 15 for row in rows)


# --- what stays in float, what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_keep_float_takes_the_module_or_one_of_its_layers(method: str) -> None:
    x = sequences(4, 7, 6)
    for kept, count in (("lstm", 4), ("lstm.l1*", 2), ("lstm.l0_reverse", 1)):
        q = quantized_classifier(method=method, keep_float=[kept])
        targets = [str(node.target) for node in q.program.graph.nodes]
        assert targets.count("aten.lstm.input") == count
        assert sqnr_db(classifier()[0](x), q(x)) > 20
    with pytest.raises(ValueError, match=r"'lstn' matches no layer; layers are lstm\.l0, lstm\.l0_reverse, "):
        quantized_classifier(method=method, keep_float=["lstn"])


RECURRENT = {
    "gru": lambda: nn.GRU(INPUTS, HIDDEN),
    "rnn_tanh": lambda: nn.RNN(INPUTS, HIDDEN),
    "rnn_relu": lambda: nn.RNN(INPUTS, HIDDEN, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN, proj_size=2),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECURRENT)
def test_other_recurrent_layers_are_refused_unless_kept(name: str, method: str) -> None:
    """Under woq too: leaving their weights in float would be fp32 under another name."""
    model, x = RECURRENT[name]().eval(), grid(STEPS, EXAMPLES, INPUTS, seed=1)
    network = captured_recurrent(name, model, x)
    layer = next(node.meta["layer"] for node in network.graph.nodes if name in str(node.target))
    message = f"aten.{name}.input in layer {layer!r} has no int8 form; name the layer in keep_float"
    with pytest.raises(ValueError, match=message):
        quantize_network(network, qbench.Recipe(method=method), [(x,)])
    kept = quantize_network(network, qbench.Recipe(method=method, keep_float=[layer]), [(x,)])
    assert torch.allclose(kept(x)[0], network.module()(x)[0])
    assert kept.int8_mac_fraction == 0.0


@functools.cache
def captured_recurrent(name: str, model: nn.Module, x: Tensor) -> Network:
    return capture(model, (x,), ({},))


# --- saved files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [{"method": "fp32"}, {"method": "woq"}, {"method": "ptdq"}, {"method": "ptsq"},
                                    {"method": "ptsq", "keep_float": ["lstm.l1"]}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["both directions, layers", "state"])
def test_there_and_back_bit_for_bit(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    if name == "state" and "keep_float" in recipe:
        recipe = {**recipe, "keep_float": ["lstm"]}
    q = quantized(name, granularity="per_group", scheme="affine", **recipe)
    q.save(tmp_path / "m.qb")
    again = qbench.load(tmp_path / "m.qb")
    for found, want in zip(flat(again(*case(name).inputs)), flat(q(*case(name).inputs)), strict=True):
        assert np.array_equal(found, want)
    assert (again.code, again.float_ops) == (q.code, q.float_ops)
    again.save(tmp_path / "again.qb")
    assert (tmp_path / "again.qb").read_bytes() == (tmp_path / "m.qb").read_bytes()


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content and tensors of a file, to be edited."""
    content = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["qbench"])
    del content["sha256"]
    return content, dict(load_tensors(data))


Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def argument(name: str, value: Any) -> Edit:
    """Another argument of the LSTM."""

    def edit(kwargs: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        kwargs[name] = value

    return edit


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Another tensor of the LSTM."""

    def edit(kwargs: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"lstm.l0.{name}"] = change(tensors[f"lstm.l0.{name}"])

    return edit


HOSTILE: dict[str, tuple[Edit, str]] = {
    "zero point of h": (argument("zero_point", 256), "zero_point=256 is out of bounds"),
    "scale of h absent": (argument("scale", None), "scale=None is no float"),
    "scale of x": (argument("x_scale", 0.0), "x_scale=0.0 is out of bounds"),
    "codes crossed": (lambda kwargs, tensors: kwargs.update(q_min=200, q_max=100), "q_min is above q_max"),
    "block of x": (argument("weight_ih_block", 0), "weight_ih_block=0 is out of bounds"),
    "block of h": (argument("weight_hh_block", 1), "weight_hh: the weight scales must be float32"),
    "x as a weight": (argument("weight_hh", {"node": 0}), "weight_hh must be a tensor of the file"),
    "weight of floats": (tensor("weight_ih", Tensor.float), "weight_ih: the weight must be int8"),
    "weight of three dimensions": (tensor("weight_hh", lambda t: t[None]), "weight_hh: the weight must be int8"),
    "hidden weight not square": (tensor("weight_hh", lambda t: t[:, :3].contiguous()), "4 hidden, hidden"),
    "scales of another number": (tensor("weight_hh_scale", lambda t: t[:2]), "weight_hh: the weight scales must be"),
    "scale of a weight 0": (tensor("weight_ih_scale", torch.zeros_like), "weight_ih: a weight scale is out of"),
    "zero points of int32": (tensor("weight_hh_zero_point", Tensor.int), "weight_hh: the weight zero points"),
    "bias too short": (tensor("bias", lambda t: t[:3]), "the bias must be int32 or float32, one for each output"),
    "sum over the bound": (tensor("bias", lambda t: torch.full_like(t, 2**31 - 1)), "its int32 sum may reach"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_edit_is_refused(name: str, tmp_path: Path) -> None:
    edit, message = HOSTILE[name]
    content, tensors = opened(dump(quantized("plain", scheme="affine")))
    call = next(node for node in content["nodes"] if node["target"] == "qbench.lstm.default")
    edit(call["kwargs"], tensors)
    (tmp_path / "m.qb").write_bytes(signed(content, tensors))
    with pytest.raises(SavedModelError, match=message) as error:
        qbench.load(tmp_path / "m.qb")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["fp32", "woq", "ptdq", "ptsq"])
def test_a_weight_of_another_size_is_refused_when_it_runs(method: str, tmp_path: Path) -> None:
    """The sizes of activations are known then; oneDNN would read past the end of a weight that is too small."""
    content, tensors = opened(dump(quantized("plain", method=method)))
    names = [name for name in tensors if name.endswith(("weight_ih", "weight_ih_l0"))]
    for name in names:
        tensors[name] = tensors[name][:, :2].contiguous()
    (tmp_path / "m.qb").write_bytes(signed(content, tensors))
    q = qbench.load(tmp_path / "m.qb")
    with pytest.raises(ValueError, match=r"do not fit the weights|an LSTM layer takes"):
        q(*case("plain").inputs)


def test_packed_sequences_cannot_be_called() -> None:
    with pytest.raises(ValueError, match="not one that a saved program may call"):
        find_target("aten.lstm.data")


# --- fake quantization -----------------------------------------------------------------------------------------------


def real(codes: Tensor, q: QParams) -> Tensor:
    return (codes.int() - q.zero_point).float() * q.scale


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_fake_quantization_agrees(recipe: dict[str, str]) -> None:
    """Step by step: each step is fed with the int8 program's own h and c, so that one difference cannot grow."""
    plan = calibrate(classifier()[1], qbench.Recipe(group_size=7, **recipe), [[sequences(32, 20, 1)]])
    recorder = Recorder(lower_graph(static_program(plan), option("backend", "reference"), Macs()))
    recorder.run(sequences(64, 20, 4))
    executed = {node.name: node for node in recorder.module.graph.nodes}
    differing = total = 0
    for node in plan.nodes(float_ops.lstm):
        call, read, q = executed[node.name], plan.qparams[node.args[0].name], plan.qparams[node.name]
        x, codes = recorder.kept[call.args[0].name], recorder.kept[node.name][0]
        h, c = torch.full_like(codes[:1], q.zero_point), torch.zeros(codes[:1].shape)
        for step in range(len(codes)):
            simulated, _, _ = simulate_lstm(plan, node, real(x[step : step + 1], read), [real(h, q), c])
            h, _, c = call.target(x[step : step + 1], h, c)
            assert torch.equal(h[0], codes[step])  # guards the test: the steps are the program's own
            difference = (torch.round(simulated.double() / q.scale) + q.zero_point - h.double()).abs()
            assert difference.max() <= 1
            differing, total = differing + int((difference > 0).sum()), total + h.numel()
    assert total > 10_000
    assert differing <= total / 1000


def test_the_simulated_network_is_the_executed_one() -> None:
    """End to end, where one difference may grow: what remains is small beside what quantization costs."""
    model, network = classifier()
    plan, x = calibrate(network, qbench.Recipe(), [[sequences(32, 20, 1)]]), sequences(64, 20, 4)
    executed = quantized_classifier()(x)
    assert sqnr_db(Simulation(plan).run(x)[0], executed) > sqnr_db(model(x), executed) + 6
