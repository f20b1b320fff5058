"""Which examples calibrate: all that are given, the first of them, or a seeded draw."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(batches: list[list[Tensor]], samples: int | None, seed: int | None) -> list[list[Tensor]]:
    """`samples` of the examples (None: all), the first or, with a seed, at random without replacement.

    `batches` are the input tensors of each batch, dimension 0 counts examples. The draw is in batches of the first
    one's size, so that an average over batches means the same. Raises ValueError for more samples than there are.
    """
    if samples is None and seed is None:
        return batches
    size = len(batches[0][0])
    leaves = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    count = len(leaves[0])
    if any(len(leaf) != count for leaf in leaves):
        raise ValueError("calibration_samples and calibration_seed need inputs that all have the batch as dimension 0")
    wanted = count if samples is None else samples
    if wanted > count:
        raise ValueError(f"calibration_samples={wanted}: there are {count} examples to calibrate with")
    order = torch.arange(count) if seed is None else torch.randperm(count, generator=_generator(seed))
    return [[leaf[picks] for leaf in leaves] for picks in order[:wanted].split(size)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
