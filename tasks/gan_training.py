"""Training a generator against a discriminator: seeded, so the same on the same machine, and short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.batch_norm import settle_batch_norm
from tasks.training import Progress

LATENT = 64
EPOCHS, BATCH = 6, 64
LEARNING_RATE, BETAS = 4e-4, (0.5, 0.999)
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
    generator.to(memory_format=torch.channels_last).train()
    discriminator.to(memory_format=torch.channels_last).train()
    optimizers = [
        torch.optim.Adam(n.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True) for n in (generator, discriminator)
    ]
    progress = Progress(EPOCHS, len(images) // BATCH, say)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=random)[: len(images) // BATCH * BATCH].split(BATCH):
            real, generated = images[chosen], generator(drawn(BATCH, random))
            loss = _loss(discriminator(real), REAL_CLASS) + _loss(discriminator(generated.detach()), GENERATED_CLASS)
            _step(optimizers[1], loss)
            _step(optimizers[0], _loss(discriminator(generated), REAL_CLASS))
            progress.step(loss)
    for network in (generator, discriminator):
        network.to(memory_format=torch.contiguous_format).eval()
    settle_batch_norm(generator, list(drawn(SETTLING_LATENTS, random).split(SETTLING_BATCH)))


def _loss(logits: Tensor, wanted: int) -> Tensor:
    """Cross entropy to one of the classes; the generator wants its images called real."""
    return F.cross_entropy(logits, torch.full((len(logits),), wanted))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
