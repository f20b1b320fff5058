"""What lies beside a record: the programs as text, the per-layer table and the textbook's figures of this network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx

from qbench import figures, float_ops
from qbench.capture import Network
from qbench.fusion import LAYERS, layer_call, layer_weight
from qbench.layers import Recorder, as_csv, layer_table
from qbench.measure import Measure
from qbench.model import QuantizedModel
from qbench.recipe import Recipe
from qbench.record import write_atomic

EXAMPLES = 16  # inputs of the per-layer table
FIGURES = ("histogram-activation.png", "histogram-weight.png", "channels-weight.png")


def write_artifacts(
    folder: Path,
    task_folder: Path,
    network: Network,
    recipe: Recipe,
    model: QuantizedModel,
    calibration: list[tuple[Tensor, ...]],
    measure: Measure,
    say: Callable[[str], None],
) -> None:
    """Write program.txt, program-fp32.txt, layers.csv and the figures into a cell's folder."""
    write_atomic(folder / "program.txt", model.code)
    write_atomic(folder / "program-fp32.txt", str(network.module().code))
    inputs = tuple(leaf[:EXAMPLES] for leaf in calibration[0])
    if measure.layers and recipe.applies("granularity"):
        say("per-layer table")
        write_atomic(folder / "layers.csv", as_csv(layer_table(network, recipe, model, inputs)))
    if measure.figures and _has_layers(network):
        say("figures")
        _figures(folder, task_folder / "figures", network, inputs)


def _has_layers(network: Network) -> bool:
    return bool(_layers(network))


def _layers(network: Network) -> list[tuple[fx.Node, Tensor, str]]:
    """Input, weight and name of each layer that multiplies by a weight (an LSTM's is the one of its input)."""
    calls = [(layer_call(node), node.meta["layer"]) for node in network.graph.nodes if node.op == "call_function"]
    kinds = (*LAYERS, float_ops.lstm)
    return [(c[1][0], layer_weight(network, c), layer) for c, layer in calls if c is not None and c[0] in kinds]


def _figures(folder: Path, made: Path, network: Network, inputs: tuple[Tensor, ...]) -> None:
    """The figures show the float network's tensors, so a task's cells share them: drawn once, then copied."""
    if not all((made / name).exists() for name in FIGURES):
        activation, where = skewed_activation(network, inputs)
        weight, layer = diverging_weight(network)
        figures.scheme_figure(activation, f"Activation: input of {where}", made / FIGURES[0])
        figures.scheme_figure(weight, f"Weight: {layer}", made / FIGURES[1], weight=True)
        figures.granularity_figure(weight, f"Channels of the weight {layer}", made / FIGURES[2])
    for name in FIGURES:
        shutil.copyfile(made / name, folder / name)


@torch.inference_mode()
def skewed_activation(network: Network, inputs: tuple[Tensor, ...]) -> tuple[Tensor, str]:
    """The values that enter the layer whose range lies most on one side of zero, and that layer's name."""
    recorder = Recorder(network.module())
    recorder.run(*inputs)
    entering = [(recorder.kept[source.name], layer) for source, _, layer in _layers(network)]

    def one_sidedness(entry: tuple[Tensor, str]) -> float:
        lo, hi = min(float(entry[0].min()), 0.0), max(float(entry[0].max()), 0.0)
        return max(-lo, hi) / ((hi - lo) or 1.0)

    return max(entering, key=one_sidedness)


def diverging_weight(network: Network) -> tuple[Tensor, str]:
    """The weight whose output channels' ranges differ most, and its layer's name."""
    weights = [(weight, layer) for _, weight, layer in _layers(network)]

    def divergence(entry: tuple[Tensor, str]) -> float:
        ranges = entry[0].flatten(1).abs().amax(1)
        return float(ranges.max() / ranges.median().clamp(min=1e-12))

    return max(weights, key=divergence)
