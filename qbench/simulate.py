"""Fake quantization: the plan executed in float, every value rounded to the codes that the int8 program will hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops, numerics
from qbench.calibrate import INTEGER, LAYERS, Plan, constant_qparams
from qbench.functions import lane_sum, shifted_exp
from qbench.numerics import PROBABILITIES, QParams


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
def simulate_node(plan: Plan, node: fx.Node, values: dict[str, Tensor]) -> Tensor:
    """The fake-quantized value of one fused node, given the values of its inputs by name."""

    def read(source: fx.Node) -> Tensor:
        if source.op == "get_attr":
            constant = plan.network.tensors[source.target]
            return fake_quantize(constant, constant_qparams(constant, plan.recipe))
        value = values[source.name]
        return value if plan.holds_codes(source) else fake_quantize(value, plan.qparams[source.name])

    def as_is(source: fx.Node) -> Tensor:
        return plan.network.tensors[source.target] if source.op == "get_attr" else values[source.name]

    function = node.target
    args: tuple[Any, ...]
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
    if node.name in plan.accumulators:
        return result
    return fake_quantize(result, plan.qparams[node.name])


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
