"""Fake quantization and int8 execution: layer by layer within one step, end to end the same decisions."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from programs import every_operation, sqnr_db
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

import qbench
from qbench.calibrate import INTEGER, Plan, calibrate
from qbench.capture import Network, capture
from qbench.convert import static_program
from qbench.layers import Recorder
from qbench.program import Macs, lower_graph
from qbench.recipe import option
from qbench.simulate import Simulation, simulate_node

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_IN, CLASSES = 1000, 10


def images(count: int, size: int, seed: int) -> Tensor:
    """Smooth pictures of CLASSES kinds in turn, each sample with noise of its own."""
    kinds = np.random.default_rng(99).normal(size=(CLASSES, 3, size // 4, size // 4))
    noise = np.random.default_rng(seed).normal(size=(count, 3, size // 4, size // 4))
    small = torch.from_numpy(kinds[np.arange(count) % CLASSES] + 0.5 * noise).float()
    return nn.functional.interpolate(small, size=size, mode="bilinear") * 2


@functools.cache
def trained(name: str, size: int) -> Network:
    """A torchvision model, captured: seeded weights, batch norms settled on these pictures, a fitted last layer.

    The last layer is the ridge regression from its inputs to the classes, so that decisions have a margin.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
            if isinstance(module, Conv2dNormActivation) and isinstance(module[-1], nn.ReLU6):
                module[1].bias.fill_(2)  # opens the ReLU6: random weights behind closed ones amplify every difference
        x = images(8 * CLASSES, size, 1)
        model.train()(x)
        model.eval()
        last, features = [m for m in model.modules() if isinstance(m, nn.Linear)][-1], []
        hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].double()))
        model(x)
        hook.remove()
        gram = features[0] @ features[0].T + features[0].square().mean() * torch.eye(len(x))
        kinds = nn.functional.one_hot(torch.arange(len(x)) % CLASSES, CLASSES).double()
        last.weight.copy_((features[0].T @ torch.linalg.solve(gram, kinds)).T)
        last.bias.zero_()
    return capture(model, (images(2, size, 1),))


@functools.cache
def everything() -> Network:
    return capture(every_operation(), (images(2, 16, 1),))


@dataclass
class Run:
    """A plan, and the int8 program's values on inputs that calibration has not seen."""

    network: Network
    plan: Plan
    values: dict[str, Tensor]
    result: Tensor
    x: Tensor


def run(name: str, count: int, **recipe: object) -> Run:
    """Cached, for the tests that look at the same run."""
    return _run(name, count, tuple(recipe.items()))


@functools.cache
@torch.inference_mode()
def _run(name: str, count: int, items: tuple[tuple[str, object], ...]) -> Run:
    network, size, recipe = (
        *((everything(), 16) if name == "every_operation" else (trained(name, 32), 32)),
        dict(items),
    )
    plan = calibrate(network, qbench.Recipe(**recipe), [[images(16, size, 2)]])
    x = images(count, size, 3)
    recorder = Recorder(lower_graph(static_program(plan), option("backend", "reference"), Macs()))
    result = recorder.run(x)[0]
    return Run(network, plan, recorder.kept, result, x)


def real(run: Run, name: str) -> Tensor:
    """A value of the int8 program as float: codes are read back."""
    value = run.values[name]
    if value.is_floating_point():
        return value
    q = run.plan.qparams[name]
    return (value.int() - q.zero_point).float() * q.scale


def steps_apart(run: Run) -> dict[str, tuple[int, float]]:
    """For each node that rounds: the largest difference in steps, and the share of elements that differ.

    The simulated node is fed with the int8 program's own values.
    """
    apart = {}
    for node in run.plan.network.graph.nodes:
        if node.target not in INTEGER or node.name in run.plan.accumulators:
            continue
        inputs = {source.name: real(run, source.name) for source in node.all_input_nodes if source.op != "get_attr"}
        q = run.plan.qparams[node.name]
        codes = torch.round(simulate_node(run.plan, node, inputs).double() / q.scale) + q.zero_point
        difference = (codes - run.values[node.name].double()).abs()
        apart[node.name] = (int(difference.max()), float((difference > 0).double().mean()))
    return apart


GRID = [
    {"granularity": granularity, "scheme": scheme, "activation_scheme": activation_scheme, "output": output}
    for granularity, scheme, activation_scheme, output in (
        ("per_tensor", "symmetric", "affine", "float"),
        ("per_channel", "symmetric", "affine", "int8"),
        ("per_channel", "affine", "symmetric", "float"),
        ("per_group", "affine", "affine", "int8"),
    )
]


def agree(run: Run, nodes: int) -> None:
    apart = steps_apart(run)
    assert len(apart) >= nodes
    for name, (largest, share) in apart.items():
        assert largest <= 1, (name, largest)
        if run.values[name].numel() >= ONE_IN:
            assert share <= 1 / ONE_IN, (name, share)
        else:
            assert share * run.values[name].numel() <= 1, (name, share)


@pytest.mark.parametrize("recipe", GRID, ids=lambda recipe: "-".join(recipe.values()))
def test_every_kind_of_node_agrees(recipe: dict[str, str]) -> None:
    agree(run("every_operation", 32, group_size=5, **recipe), 21)


@pytest.mark.parametrize(("name", "nodes"), [("resnet18", 20), ("mobilenet_v2", 50)])
def test_layers_of_torchvision_models_agree(name: str, nodes: int) -> None:
    agree(run(name, 200), nodes)
    agree(run(name, 16, granularity="per_group", scheme="affine"), nodes)


@pytest.mark.parametrize("name", ["every_operation", "resnet18", "mobilenet_v2"])
def test_end_to_end_decisions_agree(name: str) -> None:
    """At least 99.5 % of the decisions; what remains between the two is small beside what quantization costs."""
    executed = run(name, 200)
    with torch.no_grad():
        simulated = Simulation(executed.plan).run(executed.x)[0]
        exact = executed.network.module()(executed.x)[0]
    assert float((executed.result.argmax(1) == simulated.argmax(1)).double().mean()) >= 0.995
    assert sqnr_db(simulated, executed.result) > sqnr_db(exact, executed.result) + 6
    assert sqnr_db(exact, executed.result) > 15
    if name != "every_operation":  # guards the test: the decisions are those of the classes
        assert float((exact.argmax(1) == torch.arange(200) % CLASSES).double().mean()) > 0.95
