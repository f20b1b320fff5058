"""What the children of a cell run: prepare a task, quantize and score a cell, hand the fp32 network to a timing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from qbench import metrics
from qbench.artifacts import write_artifacts
from qbench.bfloat16 import is_emulated
from qbench.capture import Network, capture
from qbench.config import RECIPE_VALUES, instantiate
from qbench.distillation import Distillation
from qbench.figures import loss_figure
from qbench.measure import Measure
from qbench.model import QuantizedModel
from qbench.ops import WEIGHTS
from qbench.quantization import checked_batches, quantize_network
from qbench.recipe import AXES, Recipe
from qbench.record import write_atomic
from qbench.saved import dump, load
from qbench.task import Examples, Task
from qbench.trained_models import KeptModel, Training
from qbench.weights import final_weights, task_folder, task_of, tensors_sha256

Say = Callable[[str], None]

BATCH = 250  # examples a forward pass when the fp32 outputs are taken


# --- the task --------------------------------------------------------------------------------------------------------


def prepare(task_config: dict[str, Any], cache: str, say: Say) -> dict[str, Any]:
    """Make the task ready: weights trained (on first use) or verified, data hashed, fp32 outputs taken.

    Returns what identifies it: name, family, metric, weights_sha256, data_sha256, folder. Raises ValueError for a
    damaged cache and TaskUnavailable when the task cannot be had here.
    """
    task, folder = task_of(task_config, Path(cache), say), task_folder(task_config, Path(cache))
    examples = task.evaluation()
    model = final_weights(task, folder, say)
    judge = None if task.judge is None else task.judge()
    identity = {
        "weights_sha256": tensors_sha256(model.state_dict().items()),
        "data_sha256": tensors_sha256(_data(task, examples, judge)),
    }
    if not (folder / "fp32_outputs.safetensors").exists() or _stored_identity(folder) != identity:
        say(f"{task.name}: fp32 outputs of {len(examples)} examples")
        outputs = run(model, examples, BATCH, say)
        judged = {} if judge is None else _judged(judge, {"outputs": outputs, "targets": examples.targets}, say)
        write_atomic(folder / "fp32_outputs.safetensors", save_tensors({"outputs": outputs} | judged))
        write_atomic(folder / "identity.json", json.dumps(identity, indent=1) + "\n")
    return {"name": task.name, "family": task.family, "metric": task.metric.name, "folder": str(folder), **identity}


def fp32_model(task_config: dict[str, Any], prepared: dict[str, Any]) -> nn.Module:
    """The task's float network with its final weights, in evaluation mode."""
    folder = Path(prepared["folder"])
    return final_weights(task_of(task_config, folder.parent), folder)


def example_batch(task_config: dict[str, Any], prepared: dict[str, Any], batch: int) -> tuple[Tensor, ...]:
    """Input tensors of `batch` calibration examples, repeated when there are fewer."""
    task = task_of(task_config, Path(prepared["folder"]).parent)
    together = [torch.cat(leaves) for leaves in zip(*calibration_of(task), strict=True)]
    return tuple(leaf.repeat(-(-batch // len(leaf)), *[1] * (leaf.dim() - 1))[:batch].contiguous() for leaf in together)


def calibration_of(task: Task) -> list[tuple[Tensor, ...]]:
    """The task's own calibration batches. Raises ValueError where it has none."""
    batches = task.calibration()
    if not batches:
        raise ValueError(f"task {task.name} has no calibration data: return a list of input tuples from calibration()")
    return batches


def _stored_identity(folder: Path) -> dict[str, str] | None:
    try:
        stored = json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError):
        return None  # taken again below
    return stored if isinstance(stored, dict) else None


def _judged(judge: nn.Module, seen: dict[str, Tensor | None], say: Say) -> dict[str, Tensor]:
    """The judge's features of outputs and targets, under their names with `judged_` before."""
    looked_at = {name: tensor for name, tensor in seen.items() if tensor is not None}
    return {f"judged_{name}": run(judge, Examples((tensor,)), BATCH, say) for name, tensor in looked_at.items()}


def _data(task: Task, examples: Examples, judge: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """Everything that calibrates and judges, by name."""
    for number, batch in enumerate(task.calibration()):
        yield from ((f"calibration {number} {i}", leaf) for i, leaf in enumerate(batch))
    for number, batch in enumerate(task.fine_tuning() if task.fine_tuning else ()):
        yield from ((f"fine-tuning {number} {i}", leaf) for i, leaf in enumerate(batch))
    yield from ((f"input {i}", leaf) for i, leaf in enumerate(examples.inputs))
    yield from ((name, t) for name, t in (("targets", examples.targets), ("units", examples.units)) if t is not None)
    if judge is not None:
        yield from ((f"judge {name}", tensor) for name, tensor in judge.state_dict().items())


# --- the cell --------------------------------------------------------------------------------------------------------


def evaluate(
    task_config: dict[str, Any],
    prepared: dict[str, Any],
    recipe_config: dict[str, Any],
    measure_config: dict[str, Any],
    folder: str,
    say: Say,
) -> dict[str, Any]:
    """Quantize the task's network, save it as folder/model.qb, score what was saved, write the artifacts.

    Returns metrics, granularity_effective, notes and details for the record.
    """
    task = task_of(task_config, Path(prepared["folder"]).parent)
    recipe = recipe_from(recipe_config)
    measure = Measure.of(measure_config)
    say("quantizing")
    begun = _beginnings.get(_asked(task_config, prepared)) or Beginning.of(task, task_config, prepared)
    calibration, network = begun.calibration, begun.network
    path = Path(folder) / "model.qb"
    kept = KeptModel(task_config, prepared, recipe) if recipe.method.trains else None
    data, quantize_s, training = _quantized(task, network, recipe, calibration, kept, say)
    write_atomic(path, data)
    saved = load(path, recipe.backend.name)
    examples = begun.evaluation.first(measure.examples)
    outputs = run(saved, examples, measure.eval_batch, say)
    found = score(task, examples, outputs, Path(prepared["folder"]), say)
    found["metrics"] |= {"size_bytes": saved.size_bytes, "size_ratio": saved.size_bytes / begun.fp32_bytes}
    found["metrics"] |= {"quantize_s": quantize_s}
    if saved.macs.int8_fraction is not None:
        found["metrics"]["int8_mac_fraction"] = saved.macs.int8_fraction
    write_artifacts(Path(folder), Path(prepared["folder"]), network, recipe, saved, calibration, measure, say)
    if training is not None:
        found["details"] |= {"fine_tuning": training.summary}
        if measure.figures:
            loss_figure(training.losses, training.frozen_at, Path(folder) / "fine_tuning.png")
    return {
        **found,
        "granularity_effective": granularity_effective(saved) if recipe.applies("granularity") else None,
        "notes": [
            *found["notes"],
            *(["batch_dependent"] if _batch_dependent(recipe) else []),
            *(["bf16_emulated"] if is_emulated(saved.program) else []),
        ],
        "details": {**found["details"], "float_ops": saved.float_ops, **identity_of(saved, path)},
        "environment": recipe.backend.environment(),
    }


@dataclass(frozen=True)
class Beginning:
    """What all cells of a task begin with: its data, the captured network, and the size of its file as fp32."""

    calibration: list[tuple[Tensor, ...]]
    evaluation: Examples
    network: Network
    fp32_bytes: int

    @classmethod
    def of(cls, task: Task, task_config: dict[str, Any], prepared: dict[str, Any]) -> Beginning:
        """Load and capture."""
        calibration = calibration_of(task)
        network = capture(fp32_model(task_config, prepared), calibration[0])
        fp32_bytes = len(dump(quantize_network(network, Recipe(method="fp32"))))
        return cls(calibration, task.evaluation(), network, fp32_bytes)


_beginnings: dict[str, Beginning] = {}


def begin(task_config: dict[str, Any], prepared: dict[str, Any]) -> None:
    """Have the beginning ready: for a process from which those of a task's cells start."""
    task = task_of(task_config, Path(prepared["folder"]).parent)
    _beginnings[_asked(task_config, prepared)] = Beginning.of(task, task_config, prepared)


def _asked(task_config: dict[str, Any], prepared: dict[str, Any]) -> str:
    return json.dumps([task_config, prepared], sort_keys=True)


def _quantized(
    task: Task,
    network: Network,
    recipe: Recipe,
    calibration: list[tuple[Tensor, ...]],
    kept: KeptModel | None,
    say: Say,
) -> tuple[bytes, float, Training | None]:
    """The model's file, how many seconds it took to make, and how it was trained: now, or once before."""
    if kept is not None and (found := kept.read()) is not None:
        data, training = found
        return data, training.quantize_s, dataclasses.replace(training, from_cache=True)
    trainer = _trainer(task, network, recipe, calibration, say)
    started = time.monotonic()
    quantized = quantize_network(network, recipe, _examples_to_draw(task, recipe, calibration), fine_tune=trainer)
    quantize_s = time.monotonic() - started
    data = dump(quantized)
    if kept is None or trainer is None:
        return data, quantize_s, None
    training = Training(trainer.losses, trainer.frozen_at, trainer.weight_change, quantize_s)
    kept.write(data, training)
    return data, quantize_s, training


def identity_of(model: QuantizedModel, path: Path) -> dict[str, Any]:
    """Hashes that say what of a model changed: its file, its program's text, each tensor (the first 12 digits)."""
    tensors = {name: tensors_sha256([(name, tensor)])[:12] for name, tensor in model.program.tensors.items()}
    return {
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "program_sha256": hashlib.sha256(model.code.encode()).hexdigest(),
        "tensors": tensors,
    }


def _trainer(
    task: Task, network: Network, recipe: Recipe, calibration: list[tuple[Tensor, ...]], say: Say
) -> Distillation | None:
    """What fine-tunes, for a method that trains."""
    if not recipe.method.trains:
        return None
    inputs = calibration if task.fine_tuning is None else task.fine_tuning()
    trainer: Distillation = recipe.method.trainer(network, checked_batches(network, "fine-tuning", inputs), say)
    return trainer


def recipe_from(config: dict[str, Any]) -> Recipe:
    """The recipe of a configuration's axes and plain values."""
    axes = {axis: instantiate(config[axis]) for axis in AXES}
    return Recipe(**axes, **{name: config[name] for name in RECIPE_VALUES})


def _examples_to_draw(task: Task, recipe: Recipe, own: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]] | None:
    """What calibration draws from: the task's own examples, or for a draw at random its training examples.

    These come in batches of the same size. Neither holds an evaluation example.
    """
    if not recipe.method.needs_calibration:
        return None
    if recipe.calibration_seed is None or task.fine_tuning is None:
        return own
    together = [torch.cat(leaves) for leaves in zip(*task.fine_tuning(), strict=True)]
    return list(zip(*(leaf.split(len(own[0][0])) for leaf in together), strict=True))


def _batch_dependent(recipe: Recipe) -> bool:
    return recipe.applies("activation_granularity") and recipe.activation_granularity.batch_dependent


@torch.inference_mode()
def run(model: Callable[..., Any], examples: Examples, batch: int, say: Say) -> Tensor:
    """The outputs of all examples, in order: the first tensor that the network returns."""
    outputs = []
    started = time.monotonic()
    for first in range(0, len(examples), batch):
        result = model(*(leaf[first : first + batch] for leaf in examples.inputs))
        outputs.append(first_tensor(result).clone())  # some runtimes write the next result over it
        done = min(first + batch, len(examples))
        left = (time.monotonic() - started) / done * (len(examples) - done)
        say(f"evaluating, {done}/{len(examples)} examples, {left:.0f} s left")
    return torch.cat(outputs)


def first_tensor(result: Any) -> Tensor:
    """What is scored of a network's results."""
    first: Tensor = result if isinstance(result, Tensor) else next(iter(result))
    return first


def score(task: Task, examples: Examples, outputs: Tensor, folder: Path, say: Say) -> dict[str, Any]:
    """The task's own score against fp32 on the same examples, what its metric records beside it, and SQNR."""
    try:
        stored = load_tensors((folder / "fp32_outputs.safetensors").read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}); delete it to make it again") from error
    stored = {name: tensor[: len(examples)] for name, tensor in stored.items()}
    fp32, compared = stored["outputs"], (outputs, stored["outputs"], examples.targets)
    if task.judge is not None:
        own = _judged(task.judge(), {"outputs": outputs}, say)["judged_outputs"]
        compared = own, stored["judged_outputs"], stored.get("judged_targets")
    comparison = task.metric.compare(*compared, examples.units)
    found: dict[str, float] = {**comparison.metrics(task.metric), "examples": len(examples)}
    found |= task.metric.beside(outputs, fp32)
    noise = metrics.sqnr_db(fp32, outputs)
    if noise is not None:
        found["sqnr_db"] = noise
    details = {
        "score_test": {"p_value": comparison.p_value, "test": comparison.test, "units": comparison.units},
        "evidence": task.metric.evidence(*compared, examples.units),
        "outputs_sha256": tensors_sha256([("outputs", outputs)]),
    }
    return {"metrics": found, "notes": list(comparison.notes), "details": details}


def granularity_effective(model: QuantizedModel) -> str:
    """What the layers' scales really are: `per_group`, or `per_group 15, per_channel 38` where layers are too small."""
    counts: dict[str, int] = {}
    for node in model.program.graph.nodes:
        for name in set(WEIGHTS) & set(node.kwargs):
            rows, blocks = model.program.tensors[node.kwargs[f"{name}_scale"].target].shape
            outputs = model.program.tensors[node.kwargs[name].target].shape[0]
            kind = "per_group" if blocks > 1 else "per_tensor" if rows == 1 and outputs > 1 else "per_channel"
            counts[kind] = counts.get(kind, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
