"""The per-layer table: which layer costs what, and which one hurts."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from qbench import float_ops, metrics, numerics
from qbench.calibrate import PARAMETERS
from qbench.capture import Network
from qbench.fusion import fuse, is_layer, kept_layers, layer_call
from qbench.model import QuantizedModel
from qbench.ops import WEIGHTS, is_int8_op
from qbench.program import Macs, lower_graph
from qbench.recipe import Recipe


@dataclass(frozen=True)
class LayerRow:
    """One layer of a quantized network. The codes used are shares of 256; None where there are no codes.

    `sqnr_alone_db`: of the network's output with only this layer quantized. `sqnr_in_place_db`: of the layer's own
    output in the quantized network. Both against float on the same inputs, None when there is no difference.
    """

    layer: str
    operation: str
    macs: int
    bytes: int
    sqnr_alone_db: float | None
    sqnr_in_place_db: float | None
    weight_codes_used: float | None
    output_codes_used: float | None


class Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n.name] = value = super().run_node(n)
        return value


@torch.inference_mode()
def layer_table(network: Network, recipe: Recipe, model: QuantizedModel, inputs: tuple[Tensor, ...]) -> list[LayerRow]:
    """A row for each quantized layer, in the order of execution, measured on a batch of inputs."""
    kept = kept_layers(network, recipe.keep_float) if recipe.applies("keep_float") else set()
    compared = fuse(network, kept) if recipe.method.needs_calibration else network
    attention = any(_attends(node) for node in model.program.graph.nodes)  # weight-only: it stays float
    float_layers = [node for node in compared.graph.nodes if _is_layer(node, kept, attention)]
    floats = Recorder(compared.module())
    floats.run(*inputs)
    macs = Macs()
    lowered = Recorder(lower_graph(model.program, model.backend, macs, each=True))
    lowered.run(*inputs)
    kernels = {node.name: node.target for node in lowered.module.graph.nodes}
    layers = [node for node in model.program.graph.nodes if set(WEIGHTS) & set(node.kwargs) or _attends(node)]
    rows = []
    for node, twin in zip(layers, float_layers, strict=True):
        before = macs.int8 + macs.float32
        alone = _alone(node, twin, kernels[node.name], floats.kept)
        performed = macs.int8 + macs.float32 - before
        result = _rerun(compared, floats, twin, alone)
        rows.append(
            LayerRow(
                layer=node.meta["layer"] or node.name,
                operation=str(node.target).split(".")[1],
                macs=performed // len(inputs[0]),
                bytes=sum(model.program.tensors[value.target].nbytes for value in _held(node)),
                sqnr_alone_db=metrics.sqnr_db(_first(floats.kept["output"]), _first(result)),
                sqnr_in_place_db=metrics.sqnr_db(
                    _first(floats.kept[twin.name]), _first(_as_float(node, lowered.kept[node.name]))
                ),
                weight_codes_used=_weight_codes_used(model, node),
                output_codes_used=_codes_used(_first(lowered.kept[node.name])),
            )
        )
    return rows


def as_csv(rows: list[LayerRow]) -> str:
    """The table as CSV, numbers to six significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(LayerRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in values.items()})
    return text.getvalue()


def _attends(node: fx.Node) -> bool:
    return is_int8_op(node.target) and "attention" in str(node.target)


def _is_layer(node: fx.Node, kept: set[str], attention: bool) -> bool:
    if node.op != "call_function" or (is_layer(node) and node.meta["layer"] in kept):
        return False
    function, _ = _call(node) or (None, ())
    return function in PARAMETERS or (attention and function is float_ops.attention)


def _call(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The float_ops function and arguments of a node of either network, None for what is no layer."""
    return layer_call(node) if is_layer(node) else (node.target, node.args)


def _alone(node: fx.Node, twin: fx.Node, kernel: Any, values: dict[str, Any]) -> Any:
    """The layer's result as float, its quantized form fed with the float network's own values."""
    function, arguments = _call(twin) or (None, ())
    sources = [*_activations(function, arguments), twin.kwargs.get("residual")]
    names = [argument.name for argument in node.target._schema.arguments if not argument.kwarg_only]
    given = dict(zip(names, sources, strict=False))
    while given and list(given.values())[-1] is None:
        given.popitem()
    floats = {name: None if source is None else values[source.name] for name, source in given.items()}
    return _as_float(node, kernel(*(_codes(x, node, name) for name, x in floats.items())))


def _activations(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands that are no parameters, in the order of the int8 operation."""
    if function is float_ops.lstm:
        return (arguments[0], *arguments[5:7])
    return arguments[:4] if function is float_ops.attention else arguments[:1]


def _codes(x: Tensor | None, node: fx.Node, name: str) -> Tensor | None:
    """In the form that the operation reads: codes, or as it is. The h of an LSTM has the scale of its result."""
    prefix = "" if name == "h" and "x_scale" in node.kwargs else f"{name}_"
    if x is None or f"{prefix}scale" not in node.kwargs:
        return x
    scale, zero_point = node.kwargs[f"{prefix}scale"], node.kwargs[f"{prefix}zero_point"]
    return numerics.quantize(x, scale, zero_point, 0, 255).to(torch.uint8)


def _as_float(node: fx.Node, value: Any) -> Any:
    if isinstance(value, tuple):  # of an LSTM, whose c is float
        return tuple(_as_float(node, part) for part in value)
    if value.is_floating_point():
        return value
    return numerics.dequantize(value, node.kwargs["scale"], node.kwargs["zero_point"])


def _codes_used(value: Tensor) -> float | None:
    return None if value.is_floating_point() else value.unique().numel() / 256


def _rerun(network: Network, floats: Recorder, changed: fx.Node, value: Any) -> Any:
    """The float network's results when one node has another value; only what depends on it runs again."""
    values = {node: floats.kept[node.name] for node in network.graph.nodes} | {changed: value}
    dirty = {changed}
    for node in network.graph.nodes:
        if node is changed or not dirty & set(node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        values[node] = args[0] if node.op == "output" else node.target(*args, **kwargs)
        dirty.add(node)
    return next(values[node] for node in network.graph.nodes if node.op == "output")


def _first(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else _first(results[0])


def _weight_codes_used(model: QuantizedModel, node: fx.Node) -> float | None:
    """Of all the layer's weights together."""
    held = [model.program.tensors[node.kwargs[name].target].flatten() for name in WEIGHTS if name in node.kwargs]
    return torch.cat(held).unique().numel() / 256 if held else None


def _held(node: fx.Node) -> list[fx.Node]:
    """The layer's tensors: codes, scales, zero points, bias."""
    return [value for value in node.kwargs.values() if isinstance(value, fx.Node)]
