"""From a plan to an int8 program: one rule for each node of the fused network (ptsq, qat)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops
from qbench.arguments import WINDOW, lstm_arguments, rows_arguments, weight_arguments
from qbench.calibrate import Plan, constant_qparams
from qbench.fusion import REORDERINGS, is_move
from qbench.numerics import QParams, quantize
from qbench.program import Program

aten = torch.ops.aten
int8 = torch.ops.qbench


def static_program(plan: Plan) -> Program:
    """The int8 program of a calibrated plan."""
    return _Writer(plan).write()


def table(x: QParams, y: QParams, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The 256 codes of y that the codes 0 ... 255 of x map to, uint8, computed in float64."""
    codes = torch.arange(256, dtype=torch.float64)
    values = function((codes - x.zero_point) * x.scale)
    return quantize(values, y.scale, y.zero_point, y.q_min, y.q_max).to(torch.uint8)


class _Writer:
    """Writes the program's graph in the order of the fused network, each edge in the form that its reader needs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[fx.Node, fx.Node] = {}  # a node's value as it is
        self.codes: dict[tuple[fx.Node, QParams], fx.Node] = {}  # the same as codes, once quantized
        self.floats: dict[fx.Node, fx.Node] = {}  # the same as float, once dequantized

    def write(self) -> Program:
        """Translate node by node."""
        for node in self.plan.network.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.as_float))
            elif node.op == "get_attr":
                continue  # each reader takes constants in its own form
            else:
                self.values[node] = self._translate(node)
                self.values[node].meta["layer"] = node.meta.get("layer", "")
        self.graph.eliminate_dead_code()
        return Program(self.graph, self.tensors, self.plan.network.inputs, self.plan.network.outputs)

    def _translate(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self.graph.placeholder(node.name)
        if node.target in RULES:
            return RULES[node.target](self, node)
        if node.target is aten.max_pool1d.default and self.plan.holds_codes(node):
            return self._max_pool1d(node)
        read = self.as_is if is_move(node) else self.as_float
        args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
        if node.target in (aten.constant_pad_nd.default, aten.pad.default) and self.plan.holds_codes(node):
            args, kwargs = self._padded_with_zero_point(node, args)
        return self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)

    def _max_pool1d(self, node: fx.Node) -> fx.Node:
        """torch pools uint8 over two dimensions only: one of them is of size 1."""
        source, *window = node.args
        fills = (1, 1, 0, 1)  # kernel, stride, padding, dilation; ceil_mode is the rest
        wide = [[fill, *sizes] if sizes else [] for fill, sizes in zip(fills, window, strict=False)]
        call = self.graph.call_function
        x = call(aten.unsqueeze.default, (self.as_is(source), -2))
        return call(aten.squeeze.dim, (call(aten.max_pool2d.default, (x, *wide, *window[4:])), -2))

    def _padded_with_zero_point(self, node: fx.Node, args: Any) -> tuple[Any, dict[str, Any]]:
        zero = self.plan.qparams[node.name].zero_point
        if node.target is aten.constant_pad_nd.default:
            return (*args[:2], zero), {}
        mode = args[2] if len(args) > 2 else "constant"
        return (*args[:2], mode, zero if mode == "constant" else None), {}

    def as_is(self, node: fx.Node) -> fx.Node:
        """The value in the form that it has."""
        return self.constant(node) if node.op == "get_attr" else self.values[node]

    def constant(self, node: fx.Node) -> fx.Node:
        """A float constant, as it is."""
        return self.hold(str(node.target), self.plan.network.tensors[node.target])

    def hold(self, name: str, tensor: Tensor) -> fx.Node:
        """A tensor of the program."""
        known = self.tensors.setdefault(name, tensor)
        if known is not tensor and not torch.equal(known, tensor):
            return self.hold(f"{name}_", tensor)
        return self.graph.get_attr(name)

    def as_codes(self, node: fx.Node) -> fx.Node:
        """The value as codes: quantized once where it is float."""
        if self.plan.holds_codes(node):
            return self.values[node]
        return self.quantized(node, self.plan.qparams[node.name])

    def quantized(self, node: fx.Node, q: QParams) -> fx.Node:
        """A float value as codes of q, made before what only puts its elements in another order."""
        if (node, q) not in self.codes:
            if node.target in REORDERINGS:
                args = (self.quantized(node.args[0], q), *node.args[1:])
                self.codes[node, q] = self.graph.call_function(node.target, args)
            else:
                self.codes[node, q] = self.graph.call_function(int8.quantize.default, (self.as_float(node),), asdict(q))
        return self.codes[node, q]

    def as_float(self, node: fx.Node) -> fx.Node:
        """The value as float: dequantized once where it is codes."""
        if node.op == "get_attr":
            return self.constant(node)
        if not self.plan.holds_codes(node):
            return self.values[node]
        if node not in self.floats:
            q = self.plan.qparams[node.name]
            read = {"x_scale": q.scale, "x_zero_point": q.zero_point}
            self.floats[node] = self.graph.call_function(int8.dequantize.default, (self.values[node],), read)
        return self.floats[node]

    def operand(self, node: fx.Node) -> tuple[fx.Node, QParams]:
        """The codes of an operand, and how to read them; a constant is quantized here."""
        if node.op != "get_attr":
            return self.as_codes(node), self.plan.qparams[node.name]
        tensor = self.plan.network.tensors[node.target]
        q = constant_qparams(tensor, self.plan.recipe)
        codes = quantize(tensor, q.scale, q.zero_point, q.q_min, q.q_max).to(torch.uint8)
        return self.hold(str(node.target), codes), q

    def call(self, node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """Add a call under the name of the fused node."""
        return self.graph.create_node("call_function", target, args, kwargs, name=node.name)

    def result(self, node: fx.Node) -> dict[str, Any]:
        """Scale, zero point and code range of the node's result."""
        return asdict(self.plan.qparams[node.name])


def _layer(writer: _Writer, node: fx.Node) -> fx.Node:
    source, _, _, *window = node.args
    layer = writer.plan.layers[node.name]
    x, q = writer.operand(source)
    prefix = node.meta["layer"] or node.name
    kwargs: dict[str, Any] = dict(zip(WINDOW, window, strict=False))
    kwargs |= weight_arguments(writer.hold, prefix, layer.weight, layer.bias)
    kwargs |= {"x_scale": q.scale, "x_zero_point": q.zero_point}
    if node.name in writer.plan.accumulators:
        kwargs |= {"scale": None, "zero_point": 0, "q_min": 0, "q_max": 255}
        kwargs |= {name: bound for name in ("low", "high") if (bound := node.kwargs.get(name)) is not None}
    else:
        kwargs |= writer.result(node)
    args: tuple[Any, ...] = (x,)
    if node.kwargs.get("residual") is not None:
        residual, r = writer.operand(node.kwargs["residual"])
        args = (x, residual)
        kwargs |= {"residual_scale": r.scale, "residual_zero_point": r.zero_point}
    return writer.call(node, getattr(int8, node.target.__name__).default, args, **kwargs)


def _lstm(writer: _Writer, node: fx.Node) -> fx.Node:
    """A given h becomes codes of the layer's own h; a state that is absent is zero."""
    source, (h, c) = node.args[0], node.args[5:7]
    x, q = writer.operand(source)
    layer = writer.plan.layers[node.name]
    assert layer.hidden is not None
    kwargs = lstm_arguments(writer.hold, node.meta["layer"], layer.weight, layer.hidden, layer.bias)
    kwargs |= {"x_scale": q.scale, "x_zero_point": q.zero_point, **writer.result(node)}
    state = None if h is None else _as_codes_of(writer, h, writer.plan.qparams[node.name])
    states = (state, None if c is None else writer.as_float(c))
    return writer.call(node, int8.lstm.default, (x, *states) if any(states) else (x,), **kwargs)


def _as_codes_of(writer: _Writer, node: fx.Node, y: QParams) -> fx.Node:
    """A value as codes of a given scale and zero point: quantized, or rescaled where it has others."""
    if not writer.plan.holds_codes(node):
        return writer.quantized(node, y)
    return _rescaled(writer, writer.values[node], writer.plan.qparams[node.name], y)


def _rescaled(writer: _Writer, codes: fx.Node, q: QParams, y: QParams) -> fx.Node:
    """Codes of q as codes of y."""
    if (q.scale, q.zero_point) == (y.scale, y.zero_point):
        return codes
    read = {"x_scale": q.scale, "x_zero_point": q.zero_point}
    return writer.graph.call_function(int8.rescale.default, (codes,), read | asdict(y))


def _add(writer: _Writer, node: fx.Node) -> fx.Node:
    return _binary(writer, node, int8.add.default, alpha=node.args[2])


def _mul(writer: _Writer, node: fx.Node) -> fx.Node:
    return _binary(writer, node, int8.mul.default)


def _binary(writer: _Writer, node: fx.Node, target: Any, **options: Any) -> fx.Node:
    (a, qa), (b, qb) = (writer.operand(operand) for operand in node.args[:2])
    scales = {"a_scale": qa.scale, "a_zero_point": qa.zero_point, "b_scale": qb.scale, "b_zero_point": qb.zero_point}
    return writer.call(node, target, (a, b), **scales, **options, **writer.result(node))


def _reduction(target: Any, *names: str) -> Callable[[_Writer, fx.Node], fx.Node]:
    def rule(writer: _Writer, node: fx.Node) -> fx.Node:
        x, q = writer.operand(node.args[0])
        options = dict(zip(names, node.args[1:], strict=True))
        return writer.call(
            node, target, (x,), x_scale=q.scale, x_zero_point=q.zero_point, **options, **writer.result(node)
        )

    return rule


def _channel_affine(writer: _Writer, node: fx.Node) -> fx.Node:
    """a_c = f32(gamma s_x / s_y), b_c = f32(beta / s_y): one multiply and one add for each element."""
    x, q = writer.operand(node.args[0])
    y = writer.plan.qparams[node.name]
    gamma, beta = (writer.plan.network.tensors[arg.target] for arg in node.args[1:3])
    prefix = node.meta["layer"] or node.name
    held = {
        "gamma": writer.hold(f"{prefix}.gamma", (gamma * q.scale / y.scale).float()),
        "beta": writer.hold(f"{prefix}.beta", (beta / y.scale).float()),
    }
    return writer.call(
        node, int8.channel_affine.default, (x,), x_zero_point=q.zero_point, **held, **writer.result(node)
    )


def _cat(writer: _Writer, node: fx.Node) -> fx.Node:
    """Codes of another scale or zero point are rescaled first."""
    y = writer.plan.qparams[node.name]
    parts = [_rescaled(writer, *writer.operand(source), y) for source in node.args[0]]
    return writer.call(node, aten.cat.default, (parts, node.args[1]))


def _clamp(writer: _Writer, node: fx.Node) -> fx.Node:
    x, q = writer.operand(node.args[0])
    low, high = node.args[1:3]
    bounds = q.narrowed(low, high)
    return writer.call(node, int8.clamp.default, (x,), q_min=bounds.q_min, q_max=bounds.q_max)


def _unary(writer: _Writer, node: fx.Node) -> fx.Node:
    source, function, arguments, options = node.args
    x, q = writer.operand(source)
    entries = table(q, writer.plan.qparams[node.name], lambda v: function(v, *arguments, **options))
    return writer.call(node, int8.table.default, (x,), table=writer.hold(f"{node.name}.table", entries))


def _embedding(writer: _Writer, node: fx.Node) -> fx.Node:
    held = rows_arguments(writer.hold, node.meta["layer"] or node.name, writer.plan.layers[node.name].weight)
    return writer.call(node, int8.embedding.default, (writer.as_is(node.args[0]),), **held, **writer.result(node))


def _attention(writer: _Writer, node: fx.Node) -> fx.Node:
    *sources, mask, causal, factor = node.args
    activations: list[fx.Node] = []
    scales: dict[str, Any] = {}
    for name, source in zip("qkv", sources, strict=True):
        codes, q = writer.operand(source)
        activations.append(codes)
        scales |= {f"{name}_scale": q.scale, f"{name}_zero_point": q.zero_point}
    if mask is not None:
        activations.append(writer.as_float(mask))
    options = {"factor": factor, "causal": causal}
    return writer.call(node, int8.attention.default, tuple(activations), **options, **scales, **writer.result(node))


def _layer_norm(writer: _Writer, node: fx.Node) -> fx.Node:
    """gamma / s_y and beta / s_y, float32, where a norm without them has ones and zeros."""
    source, shape, *affine, eps = node.args
    x, q = writer.operand(source)
    y = writer.plan.qparams[node.name]
    held = {}
    for name, parameter, default in zip(("gamma", "beta"), affine, (1.0, 0.0), strict=True):
        given = writer.plan.network.tensors[parameter.target] if parameter else torch.full(tuple(shape), default)
        held[name] = writer.hold(f"{node.meta['layer'] or node.name}.{name}", (given.double() / y.scale).float())
    read = {"x_scale": q.scale, "x_zero_point": q.zero_point}
    return writer.call(node, int8.layer_norm.default, (x,), **read, **held, eps=float(eps), **writer.result(node))


RULES: dict[Any, Callable[[_Writer, fx.Node], fx.Node]] = {
    float_ops.linear: _layer,
    float_ops.conv: _layer,
    float_ops.conv_transpose: _layer,
    float_ops.add: _add,
    float_ops.mul: _mul,
    float_ops.mean: _reduction(int8.mean.default, "dim", "keepdim"),
    float_ops.average_pool: _reduction(
        int8.average_pool.default, "kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"
    ),
    float_ops.adaptive_average_pool: _reduction(int8.adaptive_average_pool.default, "size"),
    float_ops.channel_affine: _channel_affine,
    float_ops.cat: _cat,
    float_ops.clamp: _clamp,
    float_ops.unary: _unary,
    float_ops.lstm: _lstm,
    float_ops.embedding: _embedding,
    float_ops.attention: _attention,
    float_ops.layer_norm: _layer_norm,
}
