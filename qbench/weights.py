"""A task and its network with its final weights: trained on first use and cached, or kept in a file of the project."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from qbench.config import instantiate
from qbench.identity import sha256_of
from qbench.record import write_atomic
from qbench.sources import closure, modules_of_targets
from qbench.task import Task

Say = Callable[[str], None]


def task_of(task_config: dict[str, Any], cache: Path, say: Say | None = None) -> Task:
    """The task of a configuration; one with a `source` is given a function that returns that task's trained network.

    With `say` that network is trained, where it was not yet.
    """
    match task_config:
        case {"source": {"_target_": _} as source, **own}:

            @functools.cache
            def network() -> nn.Module:
                return final_weights(task_of(source, cache, say), task_folder(source, cache), say)

            task: Task = instantiate(own, source=network)
        case _:
            task = instantiate(task_config)
    return task


def task_folder(task_config: dict[str, Any], cache: Path) -> Path:
    return cache / sha256_of([task_config, _task_sources(task_config)])


def _task_sources(task_config: dict[str, Any]) -> dict[str, str]:
    """The content of the files that the task's weights and data come from: the task's own, not the engine's."""
    files = closure(modules_of_targets(task_config))
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if _is_task(name)}


def _is_task(module: str) -> bool:
    return module.split(".")[0] != "qbench"


def final_weights(task: Task, folder: Path, say: Say | None = None) -> nn.Module:
    """The network with its final weights; trained and stored when `say` is given and there is no checkpoint."""
    model = task.build()
    if task.train is None:
        return model.eval().requires_grad_(False)
    file = task.checkpoint or folder / "weights.safetensors"
    again = f"delete the folder {folder} to make it again"
    if task.checkpoint is not None:
        again = f"python -m qbench.train {task.name} makes it again"
    if not file.exists():
        if task.checkpoint is not None:
            raise ValueError(f"{file} is missing; {again}")
        if say is None:
            raise ValueError(f"{file} is missing; run the sweep again to train {task.name}")
        say(f"{task.name}: training, once")
        train(task, model, file, say)
    try:
        model.load_state_dict(_read_checked(file))
    except RuntimeError as error:  # torch's word for other names and shapes, on many lines
        raise ValueError(f"{file} is of another network; {again}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error}); {again}") from error
    return model.eval().requires_grad_(False)


def train(task: Task, model: nn.Module, file: Path, say: Say) -> None:
    """Train the network in place and store its weights, their sha256 beside them."""
    assert task.train is not None
    started = time.monotonic()
    task.train(model, say)
    say(f"{task.name}: trained in {time.monotonic() - started:.0f} s")
    data = save_tensors({name: t.contiguous() for name, t in model.state_dict().items()})
    write_atomic(file.with_suffix(".sha256"), hashlib.sha256(data).hexdigest() + "\n")
    write_atomic(file, data)  # last: killed before this line, the next run trains again


def _read_checked(file: Path) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 stands beside it. Raises ValueError or what the file is to blame for."""
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != file.with_suffix(".sha256").read_text().strip():
        raise ValueError("its content does not match its sha256")
    return load_tensors(data)


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """One hash over names, shapes, dtypes and contents."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
