"""What runs a lowered program: the plan for the shapes of its inputs, for all samples at once or in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends.native_apart import Apart, apart
from qbench.backends.native_plan import Plan, Recording
from qbench.backends.native_writer import CannotPlanError

if TYPE_CHECKING:
    from qbench.program import Macs

PLANS = 4  # shapes of inputs, and numbers of threads, that a model keeps plans of


class Planned:
    """A lowered program that is replayed where it can be. Several threads may call it."""

    def __init__(self, lowered: Callable[..., Any], macs: Macs) -> None:
        self.lowered, self.macs = lowered, macs
        self._idle: dict[Any, list[Plan | Apart]] = {}
        self._unplannable = False

    def __call__(self, *leaves: Tensor) -> Any:
        """The results. Raises what the program raises."""
        if self._unplannable:
            return self.lowered(*leaves)
        shapes = torch.get_num_threads(), *(leaf.shape for leaf in leaves)
        idle = self._idle.setdefault(shapes, [])
        try:
            plan = idle.pop() if idle else self._plan(list(leaves))
        except CannotPlanError:
            self._unplannable = True
            return self.lowered(*leaves)
        results = plan.run(list(leaves), self.macs)
        if results is None:
            return self.lowered(*leaves)  # raises what was wrong
        idle.append(plan)
        while len(self._idle) > PLANS:
            self._idle.pop(next(iter(self._idle)), None)
        return results

    def _plan(self, leaves: list[Tensor]) -> Plan | Apart:
        whole = Recording(self.lowered, leaves, self.macs)
        return apart(whole, self.lowered, leaves, self.macs) or Plan(whole)
