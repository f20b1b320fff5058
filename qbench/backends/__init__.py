"""What executes a program: one object a backend, looked up by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from qbench.program import Macs

__all__ = ["reference"]


class Backend(Protocol):
    """What executes a program."""

    name: ClassVar[str]
    label: ClassVar[str]
    latency_is_result: ClassVar[bool]

    def kernel(self, node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
        """A function of the activations only that executes one node of the int8 program.

        `constants` holds the node's other arguments by name, tensors included, ready to be packed once. The kernel adds
        the multiply-accumulates that it performs to `macs` each time it runs.
        """
        ...


@dataclass(frozen=True)
class reference:
    """The specification, executed with exact float64 sums: the same integers on every CPU. Not fast, on purpose."""

    name: ClassVar[str] = "reference"
    label: ClassVar[str] = "ref"
    latency_is_result: ClassVar[bool] = False

    def kernel(self, node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
        """See Backend."""
        from qbench.backends.reference_kernels import make

        return make(node.target._schema.name.split("::")[1], constants, macs)
