"""Capture of LSTMs for sequences of any length.

torch.export runs its own lstm step by step, and so takes the example's number of steps for a constant. For the length
of a capture another operation stands for it, which knows sizes only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.overrides import TorchFunctionMode

_library = Library("qbench_capture", "DEF")  # the declaration lives as long as this object
_library.define(
    "lstm(Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)"
)
STANDS_FOR = {torch.ops.qbench_capture.lstm.default: torch.ops.aten.lstm.input}


def _sizes(
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h, c = hx
    directions = 1 + bidirectional
    return input.new_empty(*input.shape[:2], directions * h.shape[2]), torch.empty_like(h), torch.empty_like(c)


torch.library.register_fake("qbench_capture::lstm", _sizes)


def any_length(model: nn.Module) -> AbstractContextManager[Any]:
    """While it is entered, the LSTMs of the model are captured as operations of `STANDS_FOR`."""
    return _Substitution() if any(isinstance(module, nn.LSTM) for module in model.modules()) else nullcontext()


class _Substitution(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for each torch function; an lstm of packed sequences has a tensor of batch sizes second."""
        if getattr(func, "__name__", "") == "lstm" and len(args) > 1 and not isinstance(args[1], Tensor):
            return torch.ops.qbench_capture.lstm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
