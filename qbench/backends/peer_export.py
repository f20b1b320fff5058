"""The fp32 network as an ONNX file, from which both peers start."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

BATCH = "batch"  # the name of dimension 0


def export_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write the network with dimension 0 of every input of any size, by torch's own exporter.

    `inputs` is a batch of examples. Raises the exporter's error.
    """
    example = tuple(leaf.repeat(2, *[1] * (leaf.dim() - 1))[:2] for leaf in inputs)  # 1 would be taken for a constant
    batch = torch.export.Dim(BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own exporter, about itself
        torch.onnx.export(
            model,
            example,
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in example),
        )
