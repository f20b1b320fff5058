"""A recurrent network on smartwatch recordings: which of seven exercises a subject does that it has never seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.metrics import accuracy
from qbench.task import Task
from tasks import watch
from tasks.checkpoints import kept
from tasks.training import Progress, one_cycle

LAYERS, HIDDEN = 2, 128
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 5, 64, 4e-3, 1e-2
LARGEST_GRADIENT = 1.0


def task(seed: int = 0, checkpoint: str | None = None) -> Task:
    """The task; `seed` is that of weights and training, `checkpoint` names weights that are kept in the project."""
    task = Task(
        name="lstm",
        family="lstm",
        metric=accuracy(),
        build=partial(build, seed),
        train=partial(fit, seed),
        calibration=watch.calibration,
        fine_tuning=watch.fine_tuning,
        evaluation=watch.evaluation,
    )
    return kept(task, checkpoint)


class SequenceClassifier(nn.Module):
    """An nn.LSTM over [N, steps, inputs], and a linear layer on the mean of its outputs over time."""

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return self.head(outputs.mean(1))


def build(seed: int = 0) -> nn.Module:
    """The untrained network for windows [N, 100, 6]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceClassifier(watch.CHANNELS, HIDDEN, LAYERS, watch.CLASSES)


def fit(seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains in place: AdamW, one cycle of the learning rate, clipped gradients. Leaves it in evaluation mode."""
    windows, classes = watch.training()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), weight_decay=WEIGHT_DECAY)
    progress = Progress(EPOCHS, len(windows) // BATCH, say)
    for _ in range(EPOCHS):
        order = torch.randperm(len(windows), generator=random)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * one_cycle(progress.done)
            loss = F.cross_entropy(model(windows[chosen]), classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            progress.step(loss)
    model.eval()
