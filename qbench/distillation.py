"""The built-in fine-tuning of qat: towards the float network's own results, so it needs inputs and no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qbench.calibrate import joined
from qbench.capture import Network
from qbench.fake_quantized import FakeQuantized

SEED = 0

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Nobody listens."""


class Distillation:
    """A `fine_tune` for qat: Adam on the relative squared error of the results, for a fixed number of steps.

    `batches` are the input tensors of each batch; their samples are drawn anew, in a seeded order, where they have one
    shape. The first step of Adam moves each weight by `learning_rate` times the root mean square of its tensor times
    the square root of the first loss, the noise-to-signal ratio: a network that quantization hardly hurts is hardly
    moved, whatever the size of its weights. From there the rate falls to 0 along a cosine; the ranges of the
    activations are frozen in the second half. Afterwards `losses` holds the loss of each step, and `weight_change` is
    ||w - w_0|| / ||w_0||.
    """

    def __init__(
        self, network: Network, batches: list[list[Tensor]], steps: int, learning_rate: float, say: Say
    ) -> None:
        if not batches:
            raise ValueError("fine-tuning has no data: return a list of input tuples from fine_tuning()")
        self.batches, self.steps, self.learning_rate, self.say = batches, steps, learning_rate, say
        self.losses: list[float] = []
        self.weight_change = 0.0
        self._teacher = network.module()

    def __call__(self, module: FakeQuantized) -> None:
        """Train the fake-quantized module in place. Raises ValueError when the loss is not finite any more."""
        tensors = list(module.parameters())
        sizes = [float(tensor.detach().square().mean().sqrt()) for tensor in tensors]
        optimizer = torch.optim.Adam([{"params": [tensor]} for tensor in tensors], fused=True)
        for step, leaves in zip(range(self.steps), draw(self.batches), strict=False):
            if step == self.frozen_at:
                module.freeze_ranges()
            loss = relative_error(pytree.tree_leaves(module(*leaves)), self._targets(leaves))
            self._note(step, float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = size * self._rate(step)
            optimizer.step()
        self.weight_change = module.weight_change

    @property
    def frozen_at(self) -> int:
        """The first step with frozen ranges."""
        return self.steps // 2

    def _rate(self, step: int) -> float:
        """The share of its size by which a weight may move."""
        fading = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * math.sqrt(self.losses[0]) * fading

    @torch.no_grad()
    def _targets(self, leaves: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = self._teacher(*leaves)
        return found

    def _note(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"fine-tuning diverged: the loss of step {step + 1} is {loss}; lower method.learning_rate")
        self.losses.append(loss)
        self.say(f"fine-tuning, step {step + 1}/{self.steps}, loss {loss:.3g}")


def relative_error(results: list[Tensor], targets: list[Tensor]) -> Tensor:
    """sum (y - t)^2 / sum t^2, the mean over the float results: its SQNR is -10 log10 of it."""
    pairs = [(y, t) for y, t in zip(results, targets, strict=True) if t.is_floating_point()]
    errors = [(y - t).square().sum() / t.square().sum().clamp(min=torch.finfo(t.dtype).tiny) for y, t in pairs]
    return torch.stack(errors).mean()


def draw(batches: list[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Batches without end, of the first one's size, in another order every time; as given where shapes differ."""
    random = torch.Generator().manual_seed(SEED)
    together, size = joined(batches), len(batches[0][0])
    while True:
        if together is None:
            yield from (batches[number] for number in torch.randperm(len(batches), generator=random).tolist())
        else:
            order = torch.randperm(len(together[0]), generator=random)
            whole = len(order) // size * size or len(order)
            yield from ([leaf[chosen] for leaf in together] for chosen in order[:whole].split(size))
