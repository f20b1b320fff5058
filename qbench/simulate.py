"""Fake quantization: the plan executed in float, every value rounded to the codes that the int8 program will hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops, numerics
from qbench.calibrate import INTEGER, LAYERS, Plan, constant_qparams
from qbench.numerics import QParams


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """x rounded to the codes of q and read back as float32."""
    return numerics.dequantize(numerics.quantize(x, q.scale, q.zero_point, q.q_min, q.q_max), q.scale, q.zero_point)


def layer_parameters(plan: Plan, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """The float32 weight and bias that a layer's int8 parameters stand for."""
    layer = plan.layers[node.name]
    bias = layer.bias
    if bias is not None and not bias.is_floating_point():
        x_scale = plan.qparams[node.args[0].name].scale
        bias = (bias.double() * (layer.weight.scale.double()[:, 0] * x_scale)).float()
    return layer.weight.dequantize(), bias


def lstm_parameters(plan: Plan, node: fx.Node) -> tuple[Tensor, Tensor, Tensor | None]:
    """The float32 weight_ih, weight_hh and bias that an LSTM layer's int8 parameters stand for."""
    hidden = plan.layers[node.name].hidden
    assert hidden is not None
    weight, bias = layer_parameters(plan, node)
    return weight, hidden.dequantize(), bias


class Simulation(fx.Interpreter):
    """Runs a plan's fused network in float32 with fake-quantized values and parameters: `run(*inputs)`.

    Each fused node is computed once and rounded once, as the int8 program does; only the sums are float32.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.network.module())
        self.plan = plan
        self.twins = {node.name: node for node in plan.network.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, from the values of its inputs."""
        if n.target not in INTEGER:
            return super().run_node(n)
        return simulate_node(self.plan, self.twins[n.name], {node.name: value for node, value in self.env.items()})


@torch.no_grad()
def simulate_node(plan: Plan, node: fx.Node, values: dict[str, Tensor]) -> Any:
    """The fake-quantized value of one fused node, given the values of its inputs by name; of an LSTM all three."""

    def read(source: fx.Node) -> Tensor:
        if source.op == "get_attr":
            constant = plan.network.tensors[source.target]
            return fake_quantize(constant, constant_qparams(constant, plan.recipe))
        value = values[source.name]
        return value if plan.holds_codes(source) else fake_quantize(value, plan.qparams[source.name])

    args: tuple[Any, ...]
    if node.target is float_ops.lstm:
        return simulate_lstm(plan, node, read(node.args[0]), [_given(plan, values, arg) for arg in node.args[5:7]])
    if node.target in LAYERS:
        args = (read(node.args[0]), *layer_parameters(plan, node), *node.args[3:])
    elif node.target is float_ops.channel_affine:
        args = (read(node.args[0]), *(plan.network.tensors[arg.target] for arg in node.args[1:3]))
    else:
        args = fx.map_arg(node.args, read)
    result: Tensor = node.target(*args, **fx.map_arg(node.kwargs, read))
    if node.name in plan.accumulators:
        return result
    return fake_quantize(result, plan.qparams[node.name])


def _given(plan: Plan, values: dict[str, Tensor], state: fx.Node | None) -> Tensor | None:
    """A state as it is."""
    if state is None:
        return None
    return plan.network.tensors[str(state.target)] if state.op == "get_attr" else values[state.name]


def simulate_lstm(plan: Plan, node: fx.Node, x: Tensor, states: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """A layer step by step: h is rounded once, and that value is both the result and the next step's input."""
    weight_ih, weight_hh, bias = lstm_parameters(plan, node)
    q = plan.qparams[node.name]
    h, c = (x.new_zeros(x.shape[1], weight_hh.shape[1]) if state is None else state[0] for state in states)
    h, steps = fake_quantize(h, q), []
    for gates in torch.nn.functional.linear(x, weight_ih, bias).unbind(0):
        i, f, g, o = (gates + torch.nn.functional.linear(h, weight_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = fake_quantize(torch.sigmoid(o) * torch.tanh(c), q)
        steps.append(h)
    return torch.stack(steps), h.unsqueeze(0), c.unsqueeze(0)
