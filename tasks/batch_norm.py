"""Batch-norm statistics that belong to the final weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def settle_batch_norm(model: nn.Module, batches: list[Tensor]) -> None:
    """Replaces the running statistics of all batch norms by their plain average over `batches`.

    Dropout stays off and no weight changes; the model ends in evaluation mode.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for the cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
