"""What executes a program: one object a backend, looked up by name."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qbench.native import sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from qbench.program import Macs

__all__ = ["native", "reference"]

PREFERRED, FALLBACK = "native", "reference"
WITHOUT_ENGINE = f"{sources.WHY_NOT} ({sources.CURE}); backend: {FALLBACK}, whose latency is no result"


@functools.cache
def default() -> str:
    """The backend that runs where none is named: native, or reference where that is not built.

    The first time a process falls back, a RuntimeWarning says so.
    """
    if sources.built():
        return PREFERRED
    warnings.warn(WITHOUT_ENGINE, RuntimeWarning, stacklevel=2)
    return FALLBACK


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

    def call(self, target: Any) -> Callable[..., Any]:
        """What runs a call of aten in the program, one that moves codes or computes in float: most often itself."""
        ...

    def runner(self, lowered: Callable[..., Any], macs: Macs) -> Callable[..., Any]:
        """A function of the input tensors that runs a lowered program: most often itself."""
        ...

    def environment(self) -> dict[str, Any]:
        """What it adds to the environment of a record."""
        ...


@dataclass(frozen=True)
class native:
    """The built-in engine (qbench/native): C++ kernels for the instruction sets of this CPU."""

    name: ClassVar[str] = "native"
    label: ClassVar[str] = "native"
    latency_is_result: ClassVar[bool] = True

    def kernel(self, node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
        """See Backend. Raises NativeUnavailable where the engine is not built."""
        from qbench.backends.native_kernels import make

        return make(node.target._schema.name.split("::")[1], constants, macs)

    def call(self, target: Any) -> Callable[..., Any]:
        """See Backend."""
        from qbench.backends.native_kernels import CALLS

        found: Callable[..., Any] = CALLS[target](target) if target in CALLS else target
        return found

    def runner(self, lowered: Callable[..., Any], macs: Macs) -> Callable[..., Any]:
        """See Backend: the program as one list of engine calls, where it is one."""
        from qbench.backends.native_plan import Planned

        return Planned(lowered, macs)

    def environment(self) -> dict[str, Any]:
        """The instruction set whose kernels run."""
        from qbench.native.library import isa

        return {"native_isa": isa()}


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

    def call(self, target: Any) -> Callable[..., Any]:
        """See Backend."""
        found: Callable[..., Any] = target
        return found

    def runner(self, lowered: Callable[..., Any], macs: Macs) -> Callable[..., Any]:
        """See Backend."""
        return lowered

    def environment(self) -> dict[str, Any]:
        """Nothing: it is the same everywhere."""
        return {}
