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
from qbench.calibrate import INTEGER, Plan, constant_qparams
from qbench.fusion import LAYERS
from qbench.numerics import QParams

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


def layer_parameters(plan: Plan, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """The float32 weight and bias that a layer's int8 parameters stand for, with the gradients of the float ones.

    No weight lies outside the codes: the scale comes from the weight's own range.
    """
    layer = plan.layers[node.name]
    weight_node, bias_node = node.args[1:3]
    weight: Tensor = _Replaced.apply(plan.network.tensors[weight_node.target], layer.weight.dequantize())
    if layer.bias is None:
        return weight, None
    float_bias = plan.network.tensors[bias_node.target]
    if layer.bias.is_floating_point():
        return weight, float_bias
    x_scale = plan.qparams[node.args[0].name].scale
    bias = (layer.bias.double() * (layer.weight.scale.double()[:, 0] * x_scale)).float()
    return weight, _Replaced.apply(float_bias, bias)


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


def simulate_node(plan: Plan, node: fx.Node, values: dict[str, Tensor], watch: Watch = _unwatched) -> Tensor:
    """The fake-quantized value of one fused node, given the values of its inputs by name."""

    def read(source: fx.Node) -> Tensor:
        if source.op == "get_attr":
            constant = plan.network.tensors[source.target]
            return fake_quantize(constant, constant_qparams(constant, plan.recipe))
        value = values[source.name]
        return value if plan.holds_codes(source) else fake_quantize(value, plan.qparams[source.name])

    args: tuple[Any, ...]
    if node.target in LAYERS:
        args = (read(node.args[0]), *layer_parameters(plan, node), *node.args[3:])
    elif node.target is float_ops.channel_affine:
        args = (read(node.args[0]), *(plan.network.tensors[arg.target] for arg in node.args[1:3]))
    else:
        args = fx.map_arg(node.args, read)
    result: Tensor = node.target(*args, **fx.map_arg(node.kwargs, read))
    watch(node.name, result)
    if node.name in plan.accumulators:
        return result
    return fake_quantize(result, plan.qparams[node.name])
