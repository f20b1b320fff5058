"""The module that qat trains: straight-through gradients, the same bits as before, ranges that move and then do not."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import every_operation, grid, on_grid
from torch import Tensor, nn

import qbench
from qbench import numerics
from qbench.calibrate import Plan, calibrate
from qbench.capture import capture
from qbench.convert import static_program
from qbench.fake_quantized import FakeQuantized, fine_tuned
from qbench.layers import Recorder
from qbench.numerics import QParams
from qbench.program import Macs, lower_graph
from qbench.recipe import option
from qbench.saved import dump
from qbench.simulate import Simulation, fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plan(**recipe: object) -> Plan:
    """Of a network with every kind of node."""
    return calibrate(capture(every_operation(), (X[:2],)), qbench.Recipe(**recipe), [[X]])


def tiny(**recipe: object) -> Plan:
    """Two layers and a ReLU, on a grid."""
    model = on_grid(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 1)
    return calibrate(capture(model, (grid(2, 4, seed=5),)), qbench.Recipe(**recipe), [[grid(20, 4, seed=6)]])


def source(start: Plan) -> str:
    """The name of the network's input."""
    return str(next(node.name for node in start.network.graph.nodes if node.op == "placeholder"))


# --- the straight-through rule ---------------------------------------------------------------------------------------

CODES = QParams(scale=0.25, zero_point=10, q_min=4, q_max=200)


def gradient(values: list[float], q: QParams) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    fake_quantize(x, q).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def without_rounding(x: float, q: QParams) -> float:
    """What fake quantization is when its steps are taken to be infinitely fine: the codes q_min ... q_max, each half a
    step wide on both sides."""
    low, high = ((code - q.zero_point) * q.scale for code in (q.q_min - 0.5, q.q_max + 0.5))
    return min(max(x, low), high)


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=20))
def test_the_gradient_is_the_difference_quotient_without_rounding(values: list[float]) -> None:
    step = 2.0**-12
    edges = [(code - CODES.zero_point) * CODES.scale for code in (CODES.q_min - 0.5, CODES.q_max + 0.5)]
    smooth = [x for x in values if all(abs(x - edge) > step for edge in edges)]
    slopes = [(without_rounding(x + step, CODES) - without_rounding(x - step, CODES)) / (2 * step) for x in smooth]
    assert gradient(smooth, CODES) == pytest.approx(slopes, abs=1e-9)


def test_the_gradient_at_the_edges_is_the_rule() -> None:
    """1 where the code is the value's own, 0 where it was saturated; -1.625 / 0.25 = -6.5 is rounded to -6, to even."""
    lowest, highest, half = (4 - 10) * 0.25, (200 - 10) * 0.25, 0.125
    x = [lowest - 0.126, lowest - half, lowest, lowest + half, 0.0, highest, highest + half, highest + 0.126, math.nan]
    assert gradient(x, CODES) == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    odd = QParams(0.25, 10, 5, 199)  # here a tie at either end leaves the codes: -5.5 is rounded to -6, 189.5 to 190
    assert gradient([-1.25 - half, -1.25, 189 * 0.25, 189 * 0.25 + half], odd) == [0, 1, 1, 0]


@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=20), st.booleans())
def test_the_value_is_that_of_quantizing_and_reading_back(values: list[float], trained: bool) -> None:
    q = oracle.Q(CODES.scale, CODES.zero_point, CODES.q_min, CODES.q_max)
    codes = [oracle.quantize(value, q) for value in values]
    x = torch.tensor(values).requires_grad_(trained)
    assert fake_quantize(x, CODES).tolist() == [(code - q.zero_point) * q.scale for code in codes]


def test_the_gradient_of_a_layer_by_hand() -> None:
    """y = R(W x): dW = g x' with the rounded x', dx = W'^T g with the rounded weight, g = 0 where y was saturated."""
    start = tiny(output="int8")
    module = FakeQuantized(start).train()
    x = grid(2, 4, seed=5)
    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    module(x).backward(g)
    first, second = start.layers.values()
    q_x, q_h, q_y = (start.qparams[name] for name in (source(start), *start.layers))

    def rounded(v: np.ndarray, q: QParams) -> tuple[np.ndarray, np.ndarray]:
        codes = np.rint(v.astype(np.float32) / np.float32(q.scale)) + q.zero_point
        inside = (codes >= q.q_min) & (codes <= q.q_max)
        return (np.clip(codes, q.q_min, q.q_max) - q.zero_point) * q.scale, inside

    w1, w2 = (layer.weight.dequantize().double().numpy() for layer in (first, second))
    b1 = first.bias.numpy() * first.weight.scale[:, 0].double().numpy() * q_x.scale
    b2 = second.bias.numpy() * second.weight.scale[:, 0].double().numpy() * q_h.scale
    x_read, _ = rounded(x.numpy(), q_x)
    before = x_read @ w1.T + b1
    h_read, h_inside = rounded(np.maximum(before, 0), q_h)
    _, y_inside = rounded(h_read @ w2.T + b2, q_y)
    g_y = g.numpy() * y_inside
    g_h = (g_y @ w2) * h_inside * (before > 0)
    want = {"0.weight": g_h.T @ x_read, "0.bias": g_h.sum(0), "2.weight": g_y.T @ h_read, "2.bias": g_y.sum(0)}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert np.allclose(parameter.grad.numpy(), want[name], rtol=1e-4, atol=1e-5), name


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [{}, {"granularity": "per_group", "group_size": 5, "scheme": "affine"}], ids=str)
def test_before_training_it_computes_what_the_plan_says(recipe: dict[str, object]) -> None:
    start = plan(output="int8", **recipe)
    module = FakeQuantized(start).eval()
    with torch.no_grad():
        assert torch.equal(module(X), Simulation(start).run(X)[0])
    assert torch.equal(module(X), module(X))


def test_every_parameter_of_an_int8_layer_is_trained_under_its_own_name() -> None:
    model = every_operation()
    module = FakeQuantized(plan(keep_float=["squeeze"]))
    names = {name for name, _ in module.named_parameters()}
    layers = {"stem.0", "depthwise.0", "grouped", "same", "gate.1", "line", "head"}
    assert {name for name in names if name.endswith("weight")} == {f"{layer}.weight" for layer in layers}
    assert names <= {name for name, _ in model.named_parameters()} | {"stem.0.bias", "stem.1.bias"}
    module(X).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


def test_what_it_learnt_is_what_the_int8_program_computes() -> None:
    """Layer by layer the program agrees with the trained module within one code in few elements."""
    module = FakeQuantized(plan(output="int8")).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(3):
        module(X).square().mean().backward()
        optimizer.step()
    trained = module.trained_plan()
    recorder = Recorder(lower_graph(static_program(trained), option("backend", "reference"), Macs()))
    executed = recorder.run(X)[0]
    simulated = module.eval()(X).detach()
    step = trained.qparams[list(trained.layers)[-1]].scale
    assert torch.equal(Simulation(trained).run(X)[0], simulated)
    assert float((executed - simulated).abs().max()) <= 8 * step
    assert float((executed - simulated).abs().mean()) <= step


def test_the_scale_of_a_weight_follows_it() -> None:
    module = FakeQuantized(tiny(granularity="per_channel")).train()
    with torch.no_grad():
        module.get_parameter("0.weight")[1] = torch.tensor([0.5, -12.7, 3.0, 0.0])
        module.get_parameter("0.bias")[1] = 0.3
    layer, _ = module.trained_plan().layers.values()
    assert layer.weight.scale[1, 0] == torch.tensor(12.7 / 127)
    assert layer.weight.values[1].tolist() == [5, -127, 30, 0]
    start = tiny(granularity="per_channel")
    assert int(layer.bias[1]) == round(0.3 / (start.qparams[source(start)].scale * float(layer.weight.scale[1, 0])))


def test_ranges_follow_the_batches_until_they_are_frozen() -> None:
    """lo += 0.01 (batch minimum - lo), from the calibrated range; the next call uses it."""
    start = tiny()
    name = source(start)
    lo, hi = start.ranges[name]
    module = FakeQuantized(start).train()
    x = torch.cat([grid(3, 4, seed=7), torch.full((1, 4), 50.0)])

    def moved() -> tuple[float, float]:
        return module._plan.ranges[name]

    module.eval()(x)
    assert moved() == (lo, hi)
    for _ in range(2):
        module.train()(x)
        lo, hi = lo + 0.01 * (float(x.min()) - lo), hi + 0.01 * (50 - hi)
        assert moved() == pytest.approx((lo, hi))
    module.freeze_ranges()
    before = dict(module._plan.ranges)
    module(10 * x)
    assert module._plan.ranges == before
    with torch.no_grad():
        module.get_parameter("2.bias").add_(1)
    final = numerics.activation_qparams(*moved(), start.recipe.activation_scheme)
    assert module.trained_plan().qparams[name] == final


def test_values_that_are_not_finite_stop_the_training() -> None:
    module = FakeQuantized(tiny()).train()
    with pytest.raises(
        ValueError, match=r"^input_1: fine-tuning meets a value that is not finite .*, in its data or as"
    ):
        module(torch.full((2, 4), math.inf))
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(math.nan)
    with pytest.raises(ValueError, match=r"^layer 0: the weight has values that are not finite"):
        module(grid(2, 4, seed=5))
    with pytest.raises(ValueError, match=r"^input 0 has the shape \[2, 5\], the network takes \[any, 4\]$"):
        module(torch.zeros(2, 5))


# --- a loop of one's own ---------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Two inputs in a pair, two results in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"left": torch.relu(self.left(pair[0])), "both": self.right(pair[0] + pair[1])}


PAIR = ((grid(8, 4, seed=8), grid(8, 4, seed=9)),)


def test_a_loop_of_ones_own_trains_the_module_in_place() -> None:
    """Like the model: nested inputs and results, labels of any kind, modes, parameters."""
    model = on_grid(Nested(), 3)
    wanted = {"left": torch.zeros(8, 3), "both": torch.ones(8, 2)}
    losses = []

    def fine_tune(module: nn.Module) -> None:
        assert module.training
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(30):
            result = module(*PAIR)
            loss = sum(nn.functional.mse_loss(result[name], wanted[name]) for name in wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        q = qbench.quantize(model, PAIR, qbench.Recipe("qat"), calibration=[PAIR], fine_tune=fine_tune)
    result = q(*PAIR)
    assert set(result) == {"left", "both"}
    loss = sum(float(nn.functional.mse_loss(result[name], wanted[name])) for name in wanted)
    assert loss < 1.1 * losses[-1] < losses[0] / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert q.int8_mac_fraction == 1.0


@pytest.mark.parametrize(
    "fine_tune",
    [lambda module: None, lambda module: module(*PAIR), lambda module: torch.optim.SGD(module.parameters()).step()],
    ids=["nothing", "forward alone", "no gradient"],
)
def test_training_that_changes_no_weight_is_refused(fine_tune: object) -> None:
    with pytest.raises(ValueError, match=r"^fine-tuning has changed no weight, and without that qat is ptsq: "):
        qbench.quantize(on_grid(Nested()), PAIR, qbench.Recipe("qat"), calibration=[PAIR], fine_tune=fine_tune)


def test_a_network_without_layers_has_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"^qat has nothing to train: no layer of the network becomes int8$"):
        qbench.quantize(nn.ReLU(), (torch.randn(2, 3),), qbench.Recipe("qat"), calibration=[(torch.randn(2, 3),)])


def test_the_relative_change_is_that_of_all_weights_together() -> None:
    module = FakeQuantized(tiny())
    length = math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in module.parameters()))
    with torch.no_grad():
        module.get_parameter("0.weight")[0, 0] += 3
        module.get_parameter("2.bias")[1] -= 4
    assert module.weight_change == pytest.approx(5 / length)


def test_a_sum_that_training_lets_overflow_is_refused() -> None:
    """The check of calibration is made again: weights that were small codes may all become 127."""
    layer = nn.Linear(66_400, 1, bias=False)
    nn.init.zeros_(layer.weight)
    layer.weight.data[0, 0] = 1.0
    x = torch.ones(2, 66_400)
    start = calibrate(capture(layer, (x,)), qbench.Recipe(), [[x]])

    def fine_tune(module: nn.Module) -> None:
        with torch.no_grad():
            next(module.parameters()).fill_(1.0)

    with pytest.raises(ValueError, match=r"^layer linear: its int32 sum may reach 215\d{7}, the bound is"):
        fine_tuned(start, fine_tune)


def test_two_modules_of_one_plan_do_not_meet() -> None:
    start = tiny()
    first, second = FakeQuantized(start).train(), FakeQuantized(start).train()
    with torch.no_grad():
        first.get_parameter("0.weight").add_(1)
        first(torch.full((1, 4), 99.0))
    assert second.weight_change == 0
    assert second._plan.ranges == start.ranges
    assert static_bytes(start) == static_bytes(tiny())


def static_bytes(start: Plan) -> bytes:
    program = static_program(start)
    return dump(qbench.QuantizedModel(program, {}, option("backend", "reference")))
