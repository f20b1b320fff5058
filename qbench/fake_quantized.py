"""Quantization-aware training: the calibrated network as a module to train in place, and the plan that it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qbench import structure
from qbench.calibrate import Plan, check_sums, choose
from qbench.capture import attach
from qbench.observers import Extent, Tally, moving_average
from qbench.program import check_inputs
from qbench.simulate import Simulation


class FakeQuantized(nn.Module):
    """A calibrated network in float32 in which every value and parameter is rounded as in its int8 program.

    Called like the model. Its parameters are the float weights and biases of the layers that become int8, under the
    names that they have in the model, batch norms folded; what stays in float is not trained. Scales of weights, and
    the int32 grid of biases, are those of the weights at each call.

    In training mode each call moves the range of every activation towards that of its batch, by the weight of the
    `moving_average` observer (0.01), until `freeze_ranges` is called. In a loop that never calls it they move to the
    end. Evaluation mode moves nothing.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        trained = _parameters(plan)
        tensors = {
            name: nn.Parameter(tensor.clone()) if name in trained else tensor
            for name, tensor in plan.network.tensors.items()
        }
        network = dataclasses.replace(plan.network, tensors=tensors)
        self._start = {name: plan.network.tensors[name] for name in trained}
        self._plan = dataclasses.replace(plan, network=network, ranges=dict(plan.ranges), qparams={}, layers={})
        self._averages = {name: _average(plan, name) for name in plan.ranges}
        self._frozen = False
        self._simulation = Simulation(self._plan, self._watch)
        attach({name: tensors[name] for name in trained}, self)

    def forward(self, *inputs: Any) -> Any:
        """The network's result, nested as the model's own. Raises ValueError for inputs that it does not take."""
        leaves = pytree.tree_leaves(inputs)
        check_inputs(self._plan.network.inputs, leaves)
        choose(self._plan)
        return structure.build(self._plan.network.outputs, list(self._simulation.run(*leaves)))

    def freeze_ranges(self) -> None:
        """Keep the ranges of the activations, and with them their scales, as they are."""
        self._frozen = True

    @property
    def weight_change(self) -> float:
        """||w - w_0|| / ||w_0|| over all parameters, w_0 being those of the model."""
        now = dict(self.named_parameters())
        moved = sum(float((now[name].detach().double() - start).square().sum()) for name, start in self._start.items())
        length = sum(float(start.double().square().sum()) for start in self._start.values())
        return float((moved / length) ** 0.5) if length else float(moved > 0)

    def trained_plan(self) -> Plan:
        """The plan of the weights and ranges as they are now. Raises ValueError where no weight has changed."""
        if self.weight_change == 0:
            raise ValueError(
                "fine-tuning has changed no weight, and without that qat is ptsq: train for at least one step, with "
                "a learning rate above 0 and a loss that depends on the result"
            )
        tensors = {name: tensor.detach().clone() for name, tensor in self._plan.network.tensors.items()}
        network = dataclasses.replace(self._plan.network, tensors=tensors)
        plan = dataclasses.replace(self._plan, network=network, ranges=dict(self._plan.ranges), qparams={}, layers={})
        choose(plan)
        check_sums(plan)
        return plan

    def _watch(self, name: str, value: Any) -> None:
        if not self.training or self._frozen or name not in self._averages:
            return
        average = self._averages[name]
        try:
            average.update(value.detach())
        except ValueError:
            raise ValueError(
                f"{name}: fine-tuning meets a value that is not finite (NaN or infinity), "
                f"in its data or as weights diverge"
            ) from None
        self._plan.ranges[name] = average.range()


FineTune = Callable[[FakeQuantized], None]


def fine_tuned(plan: Plan, fine_tune: FineTune) -> Plan:
    """The plan after `fine_tune` has trained its fake-quantized module in place.

    Raises ValueError for a network without int8 layers, and see trained_plan.
    """
    if not plan.layers:
        raise ValueError("qat has nothing to train: no layer of the network becomes int8")
    with torch.inference_mode(False):  # which also switches gradients on, whatever the caller's mode
        module = FakeQuantized(plan).train()
        fine_tune(module)
    return module.trained_plan()


def _parameters(plan: Plan) -> list[str]:
    """The names of the float32 tensors that the int8 layers are made of, in order."""
    layers = [node for node in plan.network.graph.nodes if node.name in plan.layers]
    read = [str(source.target) for node in layers for source in node.all_input_nodes if source.op == "get_attr"]
    return [name for name in dict.fromkeys(read) if plan.network.tensors[name].dtype == torch.float32]


def _average(plan: Plan, name: str) -> Tally:
    """A moving average that starts at the calibrated range."""
    average = moving_average().tally(Extent(), plan.recipe.activation_scheme)
    lo, hi = plan.ranges[name]
    average.update(torch.tensor([min(lo, 0.0), max(hi, 0.0)], dtype=torch.float64))
    return average
