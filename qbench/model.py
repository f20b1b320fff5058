"""A quantized model: a program and the backend that runs it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qbench.backends import Engine
from qbench.program import Macs, Program
from qbench.record import write_atomic


class QuantizedModel:
    """Call it like the model that it came from, with any batch size; tensors in, float tensors out.

    `recipe` is the canonical recipe (JSON). The model holds no float copy of its int8 weights.
    """

    def __init__(self, program: Program, recipe: dict[str, Any], backend: Engine) -> None:
        if not hasattr(backend, "kernel"):
            raise ValueError(f"backend={backend.name} runs no programs of qbench, only cells of a sweep: native does")
        self.program, self.recipe, self.backend = program, recipe, backend
        self.macs = Macs()
        self._run = program.lower(backend, self.macs)

    def __call__(self, *inputs: Any) -> Any:
        """Run the program. Raises ValueError when the inputs are not what the network takes."""
        return self._run(*inputs)

    @cached_property
    def size_bytes(self) -> int:
        """The size of the saved file in bytes."""
        from qbench.saved import dump

        return len(dump(self))

    @property
    def int8_mac_fraction(self) -> float | None:
        """The share of multiply-accumulates that the kernels did in int8, None for a network without any.

        Counted over all calls so far; before the first one, over one batch of two examples of zeros (None where sizes
        other than the batch's are free).
        """
        if not (self.macs.int8 or self.macs.float32):
            inputs = self.program.inputs
            if any(None in spec["shape"][1:] for spec in inputs):
                return None
            dtypes = [getattr(torch, spec["dtype"]) for spec in inputs]
            shapes = [[2 if size is None else size for size in spec["shape"]] for spec in inputs]
            counted = Macs()
            run = self.program.lower(self.backend, counted)
            run(*(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
            return counted.int8_fraction
        return self.macs.int8_fraction

    @property
    def float_ops(self) -> list[str]:
        """The calls that compute in float, as `node: operation`."""
        return self.program.float_ops

    @property
    def graph_module(self) -> fx.GraphModule:
        """The program as an fx.GraphModule."""
        return self.program.module()

    @property
    def code(self) -> str:
        """The program as Python text."""
        return str(self.graph_module.code)

    def save(self, path: str | Path) -> None:
        """Write a `.qb` file, atomically; the same model gives the same bytes.

        Raises ValueError for a program with a call that a file cannot hold.
        """
        from qbench.saved import dump

        write_atomic(Path(path), dump(self))
