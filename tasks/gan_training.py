"""Training a generator against a discriminator: seeded, so the same on the same machine, and short."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.batch_norm import settle_batch_norm
from tasks.training import Progress

LATENT = 64
EPOCHS, BATCH = 4, 64
LEARNING_RATE, BETAS = 1e-3, (0.5, 0.999)
STEADY = 0.5  # share of the steps with the full learning rate; then it falls to 0, which calms the duel
SETTLING_LATENTS, SETTLING_BATCH = 4096, 256
GENERATED_CLASS, REAL_CLASS = 0, 1

Say = Callable[[str], None]


def latents(count: int, seed: int) -> Tensor:
    """Normal random numbers [count, 64, 1, 1]: images of one pixel."""
    return drawn(count, torch.Generator().manual_seed(seed))


def drawn(count: int, random: torch.Generator) -> Tensor:
    """The next `count` latents."""
    return torch.randn(count, LATENT, 1, 1, generator=random)


def train(generator: nn.Module, discriminator: nn.Module, images: Tensor, seed: int, say: Say) -> None:
    """Trains both in place on images [N, 1, 28, 28] in [-1, 1], and leaves them in evaluation mode.

    `say` is told about every two seconds how far the training is.
    """
    random = torch.Generator().manual_seed(seed)
    for network in (generator, discriminator):
        network.to(memory_format=torch.channels_last).train()
    _compete(generator, discriminator, images, random, say)
    for network in (generator, discriminator):
        network.to(memory_format=torch.contiguous_format).eval()
    settle_batch_norm(generator, list(drawn(SETTLING_LATENTS, random).split(SETTLING_BATCH)))


def _compete(generator: nn.Module, discriminator: nn.Module, images: Tensor, random: torch.Generator, say: Say) -> None:
    """One step of each in turn: the discriminator learns who made an image, the generator to be taken for real."""
    makes, judges = (
        torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
        for network in (generator, discriminator)
    )
    progress = Progress(EPOCHS, len(images) // BATCH, say)
    made, real = (torch.full((BATCH,), wanted) for wanted in (GENERATED_CLASS, REAL_CLASS))
    for batch in _batches(images, random):
        for optimizer in (makes, judges):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (1 - progress.done) / (1 - STEADY))
        generated = generator(drawn(BATCH, random))
        logits = discriminator(torch.cat([generated.detach(), batch]))
        loss = F.cross_entropy(logits, torch.cat([made, real]))
        _step(judges, loss)
        _step(makes, F.cross_entropy(discriminator(generated), real))
        progress.step(loss)


def _batches(images: Tensor, random: torch.Generator) -> Iterator[Tensor]:
    """All epochs, each in a random order; the last images, fewer than a batch, are left out."""
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=random)
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images[chosen]


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
