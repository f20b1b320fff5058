"""Fake quantization: the plan executed in float, every value rounded to the codes that the int8 program will hold.

Differentiable, by the straight-through rule (Bengio, Leonard and Courville 2013, arXiv 1308.3432): rounding passes a
gradient as it is, saturation stops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops, numerics
from qbench.calibrate import INTEGER, Plan, constant_qparams, float_parameters
from qbench.functions import lane_sum, shifted_exp
from qbench.fusion import LAYERS
from qbench.numerics import PROBABILITIES, QParams
from qbench.recurrent import lstm_bias

Watch = Callable[[str, Any], None]


class _Rounded(torch.autograd.Function):
    """x rounded to codes and read back; the gradient is 1 where the code is that of x, 0 where it was saturated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: QParams) -> Tensor:
        if ctx.needs_input_grad[0]:
            code = torch.round(torch.div(x, q.scale))
            ctx.save_for_backward((code >= q.q_min - q.zero_point) & (code <= q.q_max - q.zero_point))
        codes = numerics.quantize(x, q.scale, q.zero_point, q.q_min, q.q_max)
        return numerics.dequantize(codes, q.scale, q.zero_point)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None


class _Replaced(torch.autograd.Function):
    """`rounded` in the place of x, with the gradient of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """x rounded to the codes of q and read back as float32; straight-through gradient inside [q_min, q_max], else 0."""
    result: Tensor = _Rounded.apply(x, q)
    return result


def _in_place_of(x: Tensor, rounded: Tensor) -> Tensor:
    """A parameter's rounded form, with the gradient of its float one."""
    result: Tensor = _Replaced.apply(x, rounded)
    return result


def layer_parameters(plan: Plan, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """The float32 weight and bias that a layer's int8 parameters stand for, with the gradients of the float ones.

    No weight lies outside the codes: the scale comes from the weight's own range.
    """
    weight, *biases = float_parameters(plan, node)
    weight = _in_place_of(weight, plan.layers[node.name].weight.dequantize())
    return weight, _bias(plan, node, *biases) if biases else None


def lstm_parameters(plan: Plan, node: fx.Node) -> tuple[Tensor, Tensor, Tensor | None]:
    """The float32 weight_ih, weight_hh and bias that an LSTM layer's int8 parameters stand for, as above."""
    weight_ih, weight_hh, *biases = (
        None if arg is None else plan.network.tensors[arg.target] for arg in node.args[1:5]
    )
    layer = plan.layers[node.name]
    assert weight_ih is not None
    assert weight_hh is not None
    assert layer.hidden is not None
    hidden = _in_place_of(weight_hh, layer.hidden.dequantize())
    return _in_place_of(weight_ih, layer.weight.dequantize()), hidden, _bias(plan, node, lstm_bias(*biases))


def _bias(plan: Plan, node: fx.Node, bias: Tensor | None) -> Tensor | None:
    """A float bias on the grid of the layer's accumulator; as it is where the weight has several blocks."""
    layer = plan.layers[node.name]
    if bias is None or layer.bias is None or layer.bias.is_floating_point():
        return bias
    x_scale = plan.qparams[node.args[0].name].scale
    return _in_place_of(bias, (layer.bias.double() * (layer.weight.scale.double()[:, 0] * x_scale)).float())


def _unwatched(name: str, value: Any) -> None:
    """Nobody looks."""


class Simulation(fx.Interpreter):
    """Runs a plan's fused network in float32 with fake-quantized values and parameters: `run(*inputs)`.

    Each fused node is computed once and rounded once, as the int8 program does; only the sums are float32. `watch` is
    told the name and the value of each node before it is rounded.
    """

    def __init__(self, plan: Plan, watch: Watch = _unwatched) -> None:
        super().__init__(plan.network.module())
        self.extra_traceback = False  # an error's message stays the one line that it is
        self.plan, self.watch = plan, watch
        self.twins = {node.name: node for node in plan.network.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, from the values of its inputs."""
        if n.target not in INTEGER:
            value = super().run_node(n)
            self.watch(n.name, value)
            return value
        values = {node.name: value for node, value in self.env.items()}
        return simulate_node(self.plan, self.twins[n.name], values, self.watch)


def simulate_node(plan: Plan, node: fx.Node, values: dict[str, Tensor], watch: Watch = _unwatched) -> Any:
    """The fake-quantized value of one fused node, given the values of its inputs by name; of an LSTM all three."""

    def read(source: fx.Node) -> Tensor:
        if source.op == "get_attr":
            constant = plan.network.tensors[source.target]
            return fake_quantize(constant, constant_qparams(constant, plan.recipe))
        value = values[source.name]
        return value if plan.holds_codes(source) else fake_quantize(value, plan.qparams[source.name])

    def as_is(source: fx.Node) -> Tensor:
        return plan.network.tensors[source.target] if source.op == "get_attr" else values[source.name]

    function: Any = node.target
    args: tuple[Any, ...]
    if node.target is float_ops.lstm:
        states = [None if state is None else as_is(state) for state in node.args[5:7]]
        return simulate_lstm(plan, node, read(node.args[0]), states, watch)
    if node.target in LAYERS:
        args = (read(node.args[0]), *layer_parameters(plan, node), *node.args[3:])
    elif node.target in (float_ops.channel_affine, float_ops.layer_norm):
        args = (read(node.args[0]), *fx.map_arg(node.args[1:], as_is))
    elif node.target is float_ops.embedding:
        args = (as_is(node.args[0]), layer_parameters(plan, node)[0])
    elif node.target is float_ops.attention:
        function, args = attention, (*map(read, node.args[:3]), *fx.map_arg(node.args[3:], as_is))
    else:
        args = fx.map_arg(node.args, read)
    result: Tensor = function(*args, **fx.map_arg(node.kwargs, read))
    watch(node.name, result)
    if node.name in plan.accumulators:
        return result
    return fake_quantize(result, plan.qparams[node.name])


def simulate_lstm(
    plan: Plan, node: fx.Node, x: Tensor, states: list[Tensor | None], watch: Watch = _unwatched
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer step by step: h is rounded once, and that value is both the result and the next step's input."""
    weight_ih, weight_hh, bias = lstm_parameters(plan, node)
    q = plan.qparams[node.name]
    h, c = (x.new_zeros(x.shape[1], weight_hh.shape[1]) if state is None else state[0] for state in states)
    exact, steps = [h], [fake_quantize(h, q)]
    for gates in torch.nn.functional.linear(x, weight_ih, bias).unbind(0):
        i, f, g, o = (gates + torch.nn.functional.linear(steps[-1], weight_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        exact.append(torch.sigmoid(o) * torch.tanh(c))
        steps.append(fake_quantize(exact[-1], q))
    watch(node.name, torch.stack(exact))
    return torch.stack(steps[1:]), steps[-1].unsqueeze(0), c.unsqueeze(0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float) -> Tensor:
    """float_ops.attention with probabilities rounded to their codes, and the exponential of the int8 program."""
    scores = (q @ k.transpose(-2, -1)) * factor
    if mask is not None:
        scores = scores + mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    e = shifted_exp(scores)
    codes = fake_quantize(e * (255.0 / lane_sum(e).clamp(min=1.0)), QParams(1.0, 0, 0, 255))
    return (codes * PROBABILITIES.scale) @ v
