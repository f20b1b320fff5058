"""The compiled fp32 baseline: torch.compile with frozen weights, the fastest fp32 that torch offers here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

LONGEST_REASON = 300


def compile_fp32(model: nn.Module, inputs: tuple[Tensor, ...], cache: str) -> Callable[..., Any] | str:
    """The network compiled for exactly these shapes, or the sentence that says why it could not be.

    Call it, and its result, with gradients off. Compiles in this process (no worker is left running beside a timing)
    and keeps the products in `cache`/inductor. An earlier result is void afterwards: the compiler is reset, else
    a second shape would be compiled for any shape, and be slower.
    """
    import torch

    # By thread count: the loops of the generated code are cut for it.
    folder = Path(cache).resolve() / "inductor" / f"threads-{torch.get_num_threads()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        import torch._inductor.config as inductor

        torch.compiler.reset()
        compiled = torch.compile(_without_batch_norms(model), dynamic=False)
        # As a global setting: torch.compile(options={"freezing": True}) reaches the code generator only, after the
        # weights were made arguments, and freezes nothing (resnet18 of 28x28: 7.5 ms instead of 2.8, measured).
        with inductor.patch(freezing=True, compile_threads=1):
            compiled(*inputs)
    except Exception as error:  # noqa: BLE001 - whatever stops the compiler (no C++ compiler, an operator) is the reason
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]
    return compiled


def _without_batch_norms(model: nn.Module) -> nn.Module:
    """The network with its batch norms folded, where that is easy.

    The compiler folds them anyway, but node by node: of MobileNetV2 that is half of the compile time (measured).
    """
    from torch.fx.experimental.optimization import fuse

    try:
        folded: nn.Module = fuse(model)
    except Exception:  # noqa: BLE001 - symbolic tracing fails on any Python control flow; the compiler copes with it
        return model
    return folded
