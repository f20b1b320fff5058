"""A causal character model on State of the Union addresses: four pre-norm blocks of plain nn modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.metrics import bits_per_char
from qbench.task import Task
from tasks import sotu
from tasks.checkpoints import kept
from tasks.training import Progress, one_cycle

LAYERS, HEADS = 4, 4
STEPS, BATCH = 1080, 8  # 1.1 million characters, half the training text: 76 s on two cores
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.01


def task(seed: int = 0, width: int = 128, checkpoint: str | None = None) -> Task:
    """The task; `seed` is that of weights and training, `width` that of the blocks, a multiple of their 4 heads.

    `checkpoint` names weights that are kept in the project.
    """
    task = Task(
        name="transformer",
        family="transformer",
        metric=bits_per_char(),
        build=partial(build, seed, width),
        train=partial(fit, seed),
        calibration=sotu.calibration,
        fine_tuning=sotu.fine_tuning,
        evaluation=sotu.evaluation,
    )
    return kept(task, checkpoint)


class Block(nn.Module):
    """Attention to what came before, then a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.before_feed_forward(x))


class CharacterModel(nn.Module):
    """Logits [N, T, characters] of the character after each of [N, T], T at most `context`."""

    def __init__(self, characters: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def build(seed: int = 0, width: int = 128) -> nn.Module:
    """The untrained network for character numbers [N, 128]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel(len(sotu.ALPHABET), sotu.CONTEXT, LAYERS, width, HEADS)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
    return model


def fit(seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains in place, on random windows of the training speeches."""
    random = torch.Generator().manual_seed(seed)
    text = torch.cat(sotu.training())
    progress = Progress(1, STEPS, say)
    optimizer = torch.optim.AdamW(
        model.train().parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    for _ in range(STEPS):
        starts = torch.randint(len(text) - sotu.CONTEXT - 1, (BATCH, 1), generator=random)
        windows = text[starts + torch.arange(sotu.CONTEXT + 1)]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * one_cycle(progress.done)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.step(loss)
    model.eval()
