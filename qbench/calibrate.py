"""Calibration: the range of every activation, then the scale and zero point of everything (ptsq, qat)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops
from qbench.attention import check_attention
from qbench.capture import Network
from qbench.fusion import LAYERS, fuse, is_move, kept_layers, refuse_float_macs
from qbench.numerics import (
    QParams,
    QWeight,
    activation_qparams,
    bias_floor,
    check_accumulator,
    quantize_bias,
    quantize_weight,
    require_finite,
)
from qbench.observers import Extent, Tally
from qbench.recipe import Recipe
from qbench.recurrent import is_cell_state, lstm_bias

REBATCHED = 32
INTEGER = {
    *LAYERS,
    float_ops.add,
    float_ops.mul,
    float_ops.mean,
    float_ops.average_pool,
    float_ops.adaptive_average_pool,
    float_ops.channel_affine,
    float_ops.cat,
    float_ops.clamp,
    float_ops.unary,
    float_ops.lstm,
    float_ops.layer_norm,
    float_ops.embedding,
    float_ops.attention,
}


# The operands that are float parameters, of each layer with weights.
PARAMETERS = {**dict.fromkeys(LAYERS, slice(1, 3)), float_ops.lstm: slice(1, 5), float_ops.embedding: slice(1, 2)}


@dataclass(frozen=True)
class LayerWeights:
    """The quantized parameters of a layer; `bias` is int32 on the accumulator's grid, float32 with several blocks.

    `hidden` is an LSTM's second weight, which multiplies h; there `weight` multiplies x and `bias` is b_ih + b_hh.
    """

    weight: QWeight
    bias: Tensor | None
    hidden: QWeight | None = None


@dataclass
class Plan:
    """A fused network with everything that quantizing it needs.

    `ranges` holds the lowest and highest value of each activation that is rounded. `choose` derives from them and the
    network's tensors how the value of a node reads as codes (`qparams`) and the quantized parameters of the layers
    (`layers`), all by node name; `accumulators` names the layers that hand over their float accumulator. The simulation
    and the int8 program are made from the same plan.
    """

    network: Network
    recipe: Recipe
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    qparams: dict[str, QParams] = field(default_factory=dict)
    layers: dict[str, LayerWeights] = field(default_factory=dict)
    accumulators: set[str] = field(default_factory=set)

    def holds_codes(self, node: fx.Node) -> bool:
        """Is the node's own value uint8 codes (and not float)?"""
        if node.target in INTEGER:
            return node.name not in self.accumulators
        if is_cell_state(node, float_ops.lstm):
            return False
        return is_move(node) and isinstance(node.args[0], fx.Node) and self.holds_codes(node.args[0])

    def nodes(self, *targets: Any) -> list[fx.Node]:
        """The nodes that call one of the functions."""
        return [node for node in self.network.graph.nodes if node.target in targets]


def calibrate(network: Network, recipe: Recipe, batches: list[list[Tensor]]) -> Plan:
    """Observe the fused network on the batches and choose every scale and zero point.

    `batches`: the input tensors of each batch. Raises ValueError for values that are not finite, a `keep_float` that
    matches nothing, a layer without integer form and a sum that could overflow.
    """
    kept = kept_layers(network, recipe.keep_float)
    plan = Plan(fuse(network, kept), recipe)
    refuse_float_macs(plan.network.graph, kept)
    _require_finite_constants(plan)
    for node in plan.nodes(float_ops.attention):
        check_attention(node)
    plan.accumulators = _accumulators(plan)
    plan.ranges = _ranges(plan, _observed(plan), batches)
    choose(plan)
    check_sums(plan)
    return plan


@torch.no_grad()
def choose(plan: Plan) -> None:
    """Every scale, zero point and code, from the ranges and the network's tensors as they are now.

    Raises ValueError naming the layer whose parameters are not finite.
    """
    for node in plan.network.graph.nodes:
        _choose(plan, node)
    _share_with_cat(plan)
    for node in plan.nodes(*PARAMETERS):
        plan.layers[node.name] = _layer_weights(plan, node)


def check_sums(plan: Plan) -> None:
    """Raise ValueError naming the layer whose int32 sum could overflow."""
    for node in plan.nodes(*LAYERS, float_ops.lstm):
        layer, name = plan.layers[node.name], node.meta["layer"] or node.name
        check_accumulator(name, layer.weight, layer.bias if layer.weight.scale.shape[1] == 1 else None)
        if layer.hidden is not None:
            check_accumulator(name, layer.hidden, None)


def _require_finite_constants(plan: Plan) -> None:
    """Before anything is observed: one NaN among the weights would be seen in every range behind them."""
    for node in plan.nodes(*INTEGER):
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                tensor = plan.network.tensors[source.target]
                if node.target is float_ops.attention and source is node.args[3]:
                    tensor = tensor.masked_fill(tensor == -math.inf, 0.0)  # a mask may hide
                require_finite(f"layer {node.meta['layer']}: {source.target}", tensor)


def constant_qparams(tensor: Tensor, recipe: Recipe) -> QParams:
    """A constant operand is quantized like an activation, with its own range."""
    lo, hi = (float(value) for value in tensor.aminmax())
    return activation_qparams(lo, hi, recipe.activation_scheme)


def _accumulators(plan: Plan) -> set[str]:
    """Layers whose only reader is the end of the network, when the recipe wants float results."""
    if not plan.recipe.output.keeps_accumulator:
        return set()
    return {node.name for node in plan.nodes(*LAYERS) if [user.op for user in node.users] == ["output"]}


def _observed(plan: Plan) -> set[str]:
    """The nodes whose range must be known: results that are rounded, and float values that an integer node reads."""
    names = set()
    for node in plan.network.graph.nodes:
        if node.target in INTEGER:
            if node.target is not float_ops.clamp and node.name not in plan.accumulators:
                names.add(node.name)
            names |= {source.name for source in _read_as_codes(node) if not plan.holds_codes(source)}
    return names


def _read_as_codes(node: fx.Node) -> list[fx.Node]:
    """The values that are read as codes of their own scale: tensors of floats, but no mask.

    Of an LSTM only x: a given h takes the layer's own.
    """
    mask = node.args[3] if node.target is float_ops.attention else None
    inputs = node.args[:1] if node.target is float_ops.lstm else node.all_input_nodes
    values = [source for source in inputs if source.op != "get_attr" and source is not mask]
    return [s for s in values if isinstance(s.meta["val"], Tensor) and s.meta["val"].is_floating_point()]


def rounded_value(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Tensor:
    """What the scale of a node's result must hold: the result itself, of an LSTM every h."""
    result: Tensor = float_ops.hidden_states(value[0], args[5]) if node.target is float_ops.lstm else value
    return result


class _Watch(fx.Interpreter):
    """Runs the fused network in float and hands each value to its tally."""

    def __init__(self, module: fx.GraphModule, tallies: dict[str, Tally]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error's message stays the one line that it is
        self.tallies = tallies

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        if n.name in self.tallies:
            try:
                self.tallies[n.name].update(rounded_value(n, value, args))
            except ValueError as error:
                raise ValueError(f"layer {n.meta.get('layer') or n.name}: {error}") from error
        return value


def _ranges(plan: Plan, observed: set[str], batches: list[list[Tensor]]) -> dict[str, tuple[float, float]]:
    observer, scheme = plan.recipe.observer, plan.recipe.activation_scheme
    module = plan.network.module()
    batch_first = all(spec["shape"][:1] == [None] for spec in plan.network.inputs)  # else dimension 0 may be time
    if batch_first and not observer.defined_by_batches:
        batches = list(_rebatched(batches))
    extents: dict[str, Any] = {name: Extent() for name in observed}
    if observer.two_passes:
        _watch(module, extents, batches)
    tallies = {name: observer.tally(extents[name], scheme) for name in observed}
    _watch(module, tallies, batches)
    return {name: tally.range() for name, tally in tallies.items()}


@torch.no_grad()
def _watch(module: fx.GraphModule, tallies: dict[str, Any], batches: list[list[Tensor]]) -> None:
    watch = _Watch(module, tallies)
    for batch in batches:
        watch.run(*batch)


def _rebatched(batches: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The same samples in batches of one size, so that the caller's batching cannot show in the ranges."""
    together = joined(batches)
    if together is None:
        yield from batches
    else:
        yield from (list(leaves) for leaves in zip(*(leaf.split(REBATCHED) for leaf in together), strict=True))


def joined(batches: list[list[Tensor]]) -> list[Tensor] | None:
    """All samples as one batch; None where their shapes differ, or the tensors of a batch do not count the same."""
    samples = [{tuple(leaf.shape[:1]) for leaf in batch} for batch in batches]
    one_size = all([leaf.shape[1:] for leaf in batch] == [leaf.shape[1:] for leaf in batches[0]] for batch in batches)
    if not one_size or any(len(counts) != 1 or () in counts for counts in samples):
        return None
    return [torch.cat(leaves) for leaves in zip(*batches, strict=True)]


def _choose(plan: Plan, node: fx.Node) -> None:
    """The scale and zero point of one node's value, when it is read as codes."""
    if node.name in plan.ranges:
        chosen = activation_qparams(*plan.ranges[node.name], plan.recipe.activation_scheme)
        plan.qparams[node.name] = chosen.narrowed(node.kwargs.get("low"), node.kwargs.get("high"))
    elif plan.holds_codes(node):
        source = plan.qparams[node.args[0].name]
        plan.qparams[node.name] = source.narrowed(*node.args[1:3]) if node.target is float_ops.clamp else source


def _share_with_cat(plan: Plan) -> None:
    """What only a concatenation reads takes its scale and zero point, so that the codes need no second rounding."""
    for node in reversed(plan.nodes(float_ops.cat)):
        for source in node.args[0]:
            chain = _only_read_here(plan, source)
            if chain is None:
                continue
            for link in chain:
                low, high = link.kwargs.get("low"), link.kwargs.get("high")
                plan.qparams[link.name] = plan.qparams[node.name].narrowed(low, high)


def _only_read_here(plan: Plan, node: Any) -> list[fx.Node] | None:
    """The node and the moves before it, up to one that rounds, if each has one reader only; else None."""
    chain = []
    while node.op == "call_function" and len(node.users) == 1 and plan.holds_codes(node):
        chain.append(node)
        if node.target in INTEGER:
            return None if node.target is float_ops.clamp or _has_state(node) else chain
        node = node.args[0]
    return None


def _has_state(node: fx.Node) -> bool:
    """Does an LSTM start from a given h, which its readers' range need not hold?"""
    return node.target is float_ops.lstm and node.args[5] is not None


def float_parameters(plan: Plan, node: fx.Node) -> list[Any]:
    """The float weights and biases of a layer, None for a bias that it lacks."""
    sources = node.args[PARAMETERS[node.target]]
    return [None if source is None else plan.network.tensors[source.target] for source in sources]


def _layer_weights(plan: Plan, node: fx.Node) -> LayerWeights:
    """Quantize the parameters of a layer for the scale of its input (and of an LSTM's h)."""
    weight, *others = float_parameters(plan, node)
    if node.target is float_ops.embedding:
        return LayerWeights(_weight(plan, node, weight), None)
    x_scale = plan.qparams[node.args[0].name].scale
    if node.target is not float_ops.lstm:
        return _quantized(plan, node, weight, others[0], x_scale)
    weight_hh, *biases = others
    hidden = _quantized(plan, node, weight_hh, None, plan.qparams[node.name].scale).weight
    return dataclasses.replace(_quantized(plan, node, weight, lstm_bias(*biases), x_scale), hidden=hidden)


def _quantized(plan: Plan, node: fx.Node, weight: Tensor, bias: Tensor | None, x_scale: float) -> LayerWeights:
    one_block = plan.recipe.granularity.block(weight.shape[1], plan.recipe.group_size) == weight.shape[1]
    quantized = _weight(plan, node, weight, bias_floor(bias, x_scale) if bias is not None and one_block else None)
    if bias is not None and one_block:
        bias = quantize_bias(bias, x_scale, quantized.scale)
    return LayerWeights(quantized, bias)


def _weight(plan: Plan, node: fx.Node, weight: Tensor, smallest_scale: Tensor | None = None) -> QWeight:
    """Quantize a weight. Raises ValueError that names the layer."""
    recipe = plan.recipe
    try:
        return quantize_weight(weight, recipe.granularity, recipe.scheme, recipe.group_size, smallest_scale)
    except ValueError as error:
        raise ValueError(f"layer {node.meta['layer'] or node.name}: {error}") from error
