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

LAYERS, HIDDEN, DROPOUT = 2, 128, 0.2
LENGTHS = ((50, 6), (100, 4))  # (steps, epochs): early epochs learn as much from half windows, for half of the time
BATCH, LEARNING_RATE, WEIGHT_DECAY, LARGEST_GRADIENT = 64, 4e-3, 1e-2, 1.0
TURN = 0.2  # radians about each axis, standard deviation: no two subjects wear a watch in the same way


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

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return self.head(outputs.mean(1))


def build(seed: int = 0) -> nn.Module:
    """The untrained network for windows [N, 100, 6]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SequenceClassifier(watch.CHANNELS, HIDDEN, LAYERS, watch.CLASSES, DROPOUT)


def fit(seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains in place: AdamW, one cycle of the learning rate, clipped gradients. Leaves it in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        _descend(model.train(), *watch.training(), random, say)
    model.eval()


def _descend(
    model: nn.Module, windows: Tensor, classes: Tensor, random: torch.Generator, say: Callable[[str], None]
) -> None:
    lengths = [length for length, count in LENGTHS for _ in range(count)]
    progress = Progress(len(lengths), len(windows) // BATCH, say)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    for length in lengths:
        order = torch.randperm(len(windows), generator=random)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * one_cycle(progress.done)
            inputs = turned(shortened(windows[chosen], length, random), random)
            loss = F.cross_entropy(model(inputs), classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            progress.step(loss)


def shortened(windows: Tensor, length: int, random: torch.Generator) -> Tensor:
    """`length` steps of each window [N, steps, channels], from a random one on."""
    first = int(torch.randint(windows.shape[1] - length + 1, (1,), generator=random))
    return windows[:, first : first + length]


def turned(windows: Tensor, random: torch.Generator) -> Tensor:
    """Acceleration and angular velocity of each window [N, steps, 6] as a watch that sits otherwise would see them."""
    x, y, z = (TURN * torch.randn(3, len(windows), 1, generator=random)).unbind(0)
    zero = torch.zeros_like(x)
    generators = torch.cat([zero, -z, y, z, zero, -x, -y, x, zero], 1).unflatten(1, (3, 3))
    turns = torch.linalg.matrix_exp(generators)
    return torch.cat([windows[..., :3] @ turns, windows[..., 3:] @ turns], -1)
