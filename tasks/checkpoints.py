"""Trained weights that are kept in the project: small fp32 networks, made by `python -m qbench.train`.

Training gives other weights on another CPU or with another number of threads; what CI compares must not change so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qbench.task import Task

FOLDER = Path(__file__).parent / "data" / "checkpoints"


def kept(task: Task, checkpoint: str | None) -> Task:
    """The task with its weights from the project's file of that name, which becomes its own; as it is for None."""
    if checkpoint is None:
        return task
    return dataclasses.replace(task, name=checkpoint, checkpoint=FOLDER / f"{checkpoint}.safetensors")
