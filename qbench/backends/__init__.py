"""What answers a cell: one object a backend, looked up by name.

An engine executes qbench's own programs, node by node. A peer is another project's tool and runtime: it takes the fp32
network and the calibration data, and makes and runs a model of its own.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qbench.native import sources

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import fx

    from qbench.peers import Source
    from qbench.program import Macs
    from qbench.recipe import Recipe

__all__ = ["native", "onnxruntime", "openvino", "reference"]

OWN_EVALUATION = "qbench.evaluate:evaluate"
PEER_EVALUATION = "qbench.peers:evaluate"

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
    """What makes and runs the model of a cell.

    `evaluate` names the function of the child that makes the model, saves it as `program` in the cell's folder and
    scores it; with `alone` it times its candidates, so that nothing else may run meanwhile, and its cells share no
    process with others. `baseline` is the backend
    whose fp32 cell the cells are compared with, `packages` are those that can change an answer, beside torch.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    latency_is_result: ClassVar[bool]
    evaluate: ClassVar[str]
    alone: ClassVar[bool]
    program: ClassVar[str]
    baseline: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]

    def load(self, path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
        """The saved model, to be called with tensors. For inputs of `batch` examples (None: any) on `threads` threads;
        an engine takes any batch, and torch's threads.
        """
        ...

    def environment(self) -> dict[str, Any]:
        """What it adds to the environment of a record."""
        ...


class Engine(Backend, Protocol):
    """What executes a program.

    With `fuses_tables` the kernel of a linear or convolutional layer gets the constant `table` where a table follows it
    and nothing else reads its result: it looks its codes up itself.
    """

    fuses_tables: ClassVar[bool]

    def kernel(self, node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
        """A function of the activations only that executes one node of the int8 program.

        `constants` holds the node's other arguments by name, tensors included, to be packed when needed. The kernel
        adds the multiply-accumulates of the layer, with padding too, to `macs` each time it runs.
        """
        ...

    def call(self, target: Any) -> Callable[..., Any]:
        """What runs a call of aten in the program, one that moves codes or computes in float: most often itself."""
        ...

    def runner(self, lowered: Callable[..., Any], macs: Macs) -> Callable[..., Any]:
        """A function of the input tensors that runs a lowered program: most often itself."""
        ...


class Peer(Backend, Protocol):
    """Another project's quantizer and runtime."""

    def lacks(self, recipe: Recipe) -> str | None:
        """Why it cannot answer the recipe, None where it can."""
        ...

    def require(self) -> None:
        """Raises PeerUnavailable, which names the cure, where it is not installed."""
        ...

    def candidates(self, source: Source, recipe: Recipe, folder: Path) -> list[str]:
        """Save the model in every form that may be the fastest, each as folder/NAME/`program`, and return the names."""
        ...

    def float_ops(self, path: Path, batch: int, threads: int) -> list[str]:
        """The operations with multiply-accumulates that the runtime computes in float, as `node: operation`."""
        ...


@dataclass(frozen=True)
class native:
    """The built-in engine (qbench/native): C++ kernels for the instruction sets of this CPU."""

    name: ClassVar[str] = "native"
    label: ClassVar[str] = "native"
    fuses_tables: ClassVar[bool] = True
    latency_is_result: ClassVar[bool] = True
    evaluate: ClassVar[str] = OWN_EVALUATION
    alone: ClassVar[bool] = False
    program: ClassVar[str] = "model.qb"
    baseline: ClassVar[str] = "native"
    packages: ClassVar[tuple[str, ...]] = ()

    def load(self, path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
        """See Backend."""
        from qbench.saved import load

        return load(path, self.name)

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
        from qbench.backends.native_planned import Planned

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
    fuses_tables: ClassVar[bool] = False
    latency_is_result: ClassVar[bool] = False
    evaluate: ClassVar[str] = OWN_EVALUATION
    alone: ClassVar[bool] = False
    program: ClassVar[str] = "model.qb"
    baseline: ClassVar[str] = "reference"
    packages: ClassVar[tuple[str, ...]] = ()

    def load(self, path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
        """See Backend."""
        from qbench.saved import load

        return load(path, self.name)

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


@dataclass(frozen=True)
class onnxruntime:
    """ONNX Runtime, with its own quantization: QDQ or QOperator, U8S8 or S8S8, whichever is the fastest."""

    name: ClassVar[str] = "onnxruntime"
    label: ClassVar[str] = "ort"
    latency_is_result: ClassVar[bool] = True
    evaluate: ClassVar[str] = PEER_EVALUATION
    alone: ClassVar[bool] = True
    program: ClassVar[str] = "model.onnx"
    baseline: ClassVar[str] = "native"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript")

    def lacks(self, recipe: Recipe) -> str | None:
        """See Peer."""
        from qbench.backends.peer_onnxruntime import OFFERS
        from qbench.peers import lacking

        return lacking(self.name, recipe, OFFERS)

    def require(self) -> None:
        """See Peer."""
        from qbench.peers import require

        require(self.name, ("onnx", "onnxruntime", "onnxscript"))

    def candidates(self, source: Source, recipe: Recipe, folder: Path) -> list[str]:
        """See Peer."""
        from qbench.backends.peer_onnxruntime import candidates

        return candidates(source, recipe, folder, self.program)

    def load(self, path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
        """See Backend."""
        from qbench.backends.peer_onnxruntime import load

        return load(path, batch, threads)

    def float_ops(self, path: Path, batch: int, threads: int) -> list[str]:
        """See Peer."""
        from qbench.backends.peer_onnxruntime import float_ops

        return float_ops(path, batch, threads)

    def environment(self) -> dict[str, Any]:
        """The versions."""
        from qbench.identity import versions

        return versions(self.packages)


@dataclass(frozen=True)
class openvino:
    """OpenVINO, with nncf's post-training quantization: its performance or its mixed preset, whichever is faster."""

    name: ClassVar[str] = "openvino"
    label: ClassVar[str] = "openvino"
    latency_is_result: ClassVar[bool] = True
    evaluate: ClassVar[str] = PEER_EVALUATION
    alone: ClassVar[bool] = True
    program: ClassVar[str] = "model.xml"
    baseline: ClassVar[str] = "native"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "nncf", "onnx", "onnxscript")

    def lacks(self, recipe: Recipe) -> str | None:
        """See Peer."""
        from qbench.backends.peer_openvino import OFFERS
        from qbench.peers import lacking

        return lacking(self.name, recipe, OFFERS)

    def require(self) -> None:
        """See Peer."""
        from qbench.peers import require

        require(self.name, ("onnx", "onnxscript", "openvino", "nncf"))

    def candidates(self, source: Source, recipe: Recipe, folder: Path) -> list[str]:
        """See Peer."""
        from qbench.backends.peer_openvino import candidates

        return candidates(source, recipe, folder, self.program)

    def load(self, path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
        """See Backend."""
        from qbench.backends.peer_openvino import load

        return load(path, batch, threads)

    def float_ops(self, path: Path, batch: int, threads: int) -> list[str]:
        """See Peer."""
        from qbench.backends.peer_openvino import float_ops

        return float_ops(path, batch, threads)

    def environment(self) -> dict[str, Any]:
        """The versions."""
        from qbench.identity import versions

        return versions(self.packages)
