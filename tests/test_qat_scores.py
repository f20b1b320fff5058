"""Fine-tuning never costs: on each family, qat against ptsq, paired, on the whole evaluation split."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qbench.capture import capture
from qbench.evaluate import run
from qbench.native import sources
from qbench.quantization import checked_batches, quantize_network
from qbench.recipe import Recipe
from qbench.task import Examples, Task
from qbench.weights import final_weights
from tasks import gan, lstm, mobilenet_v2, transformer

BACKEND = "native" if sources.built() else "reference"
BATCH = 125


@cache
def classifier() -> nn.Module:
    return final_weights(mobilenet_v2.task(width=0.35, checkpoint="ci_mobilenet_v2"), Path())


TASKS = {
    "cnn": partial(mobilenet_v2.task, width=0.35, checkpoint="ci_mobilenet_v2"),
    "lstm": partial(lstm.task, checkpoint="ci_lstm"),
    "transformer": partial(transformer.task, width=64, checkpoint="ci_transformer"),
    "gan": partial(gan.task, source=classifier, checkpoint="ci_gan"),
}


def outputs(task: Task, model: nn.Module, recipe: Recipe) -> Tensor:
    calibration = task.calibration()
    network, trainer = capture(model, calibration[0]), None
    if recipe.method.trains:
        batches = checked_batches(network, "fine-tuning", task.fine_tuning())
        trainer = recipe.method.trainer(network, batches, lambda text: None)
    q = quantize_network(network, recipe, calibration, BACKEND, fine_tune=trainer)
    return run(q, task.evaluation(), BATCH, lambda text: None)


def looked_at(task: Task, tensor: Tensor | None) -> Tensor | None:
    """What the metric sees: the features of a judge, where the task has one."""
    if task.judge is None or tensor is None:
        return tensor
    return run(task.judge(), Examples((tensor,)), BATCH, lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("family", TASKS)
def test_qat_is_not_significantly_worse_than_ptsq(family: str, granularity: str) -> None:
    task = TASKS[family]()
    model, examples = final_weights(task, Path()), task.evaluation()
    ptsq, qat = (outputs(task, model, Recipe(method=m, granularity=granularity)) for m in ("ptsq", "qat"))
    assert not torch.equal(ptsq, qat)  # it did fine-tune
    seen = [looked_at(task, tensor) for tensor in (qat, ptsq, examples.targets)]
    found = task.metric.compare(*seen, examples.units).metrics(task.metric)
    assert found["score_drop_ci_low"] <= 0, found
