"""ONNX Runtime: static and dynamic quantization by its own tools, and its sessions.

Settings as its documentation recommends for x86: pre-processing before quantization, all graph optimizations, one
session a batch size with that size fixed, as many threads as are measured.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends.peer_export import BATCH

if TYPE_CHECKING:
    from qbench.peers import Source
    from qbench.recipe import Recipe

# What its quantizers can be asked for; the tables' other choices are skipped.
OFFERS = {
    "method": ("fp32", "ptdq", "ptsq"),
    "granularity": ("per_tensor", "per_channel"),
    "scheme": ("symmetric",),
    "activation_scheme": ("affine",),
    "activation_granularity": ("per_row",),
    "observer": ("minmax",),
    "output": ("float",),
}
# Operations with multiply-accumulates that compute in float; the integer ones have names of their own.
FLOAT_MACS = {
    *("Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU", "RNN"),
    *("Attention", "MultiHeadAttention", "Einsum"),
}


def candidates(source: Source, recipe: Recipe, folder: Path, program: str) -> list[str]:
    """See qbench.backends.Peer: static as QDQ and QOperator with uint8 and int8 activations, dynamic with int8 and
    uint8 weights.
    """
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def path(name: str) -> str:
        (folder / name).mkdir()
        return str(folder / name / program)

    prepared = folder / "prepared.onnx"
    with _quiet():
        quant_pre_process(str(source.onnx), str(prepared), skip_symbolic_shape=True)
    per_channel = {"per_channel": recipe.granularity.name == "per_channel"}
    int8, uint8 = ort.QuantType.QInt8, ort.QuantType.QUInt8

    def fp32() -> list[str]:
        prepared.rename(path("fp32"))
        return ["fp32"]

    def dynamic() -> list[str]:
        kinds = {"U8S8": int8, "U8U8": uint8}
        for name, weights in kinds.items():
            ort.quantize_dynamic(str(prepared), path(name), weight_type=weights, **per_channel)
        return list(kinds)

    def static() -> list[str]:
        made = []
        for form in ort.QuantFormat.QDQ, ort.QuantFormat.QOperator:
            for kind, activations in {"U8S8": uint8, "S8S8": int8}.items():
                made.append(f"{form.name}-{kind}")
                types = {"activation_type": activations, "weight_type": int8}
                reader = _Reader(_input_names(prepared), source.calibration)
                ort.quantize_static(str(prepared), path(made[-1]), reader, quant_format=form, **types, **per_channel)
        return made

    with _quiet():
        return {"fp32": fp32, "ptdq": dynamic, "ptsq": static}[recipe.method.name]()


def load(path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
    """A session, called with tensors; the network's first result as a tensor."""
    session = _session(path, batch, threads)
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        fed = {name: leaf.numpy() for name, leaf in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def float_ops(path: Path, batch: int, threads: int) -> list[str]:
    """Read from the graph as the runtime has optimized it for this CPU."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _session(path, batch, threads, optimized)
        nodes = onnx.load(str(optimized)).graph.node
    return [f"{node.name}: {node.op_type}" for node in nodes if node.op_type in FLOAT_MACS]


def _session(path: Path, batch: int | None, threads: int, optimized: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if batch is not None:
        options.add_free_dimension_override_by_name(BATCH, batch)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _input_names(path: Path) -> list[str]:
    import onnx

    return [entry.name for entry in onnx.load(str(path)).graph.input]


class _Reader:
    """The calibration batches as ONNX Runtime asks for them."""

    def __init__(self, names: list[str], batches: list[tuple[Tensor, ...]]) -> None:
        self._left = iter({name: leaf.numpy() for name, leaf in zip(names, batch, strict=True)} for batch in batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._left

    def __next__(self) -> dict[str, Any]:
        return next(self._left)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None after the last."""
        return next(self._left, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantizers print: whole tensor types, and advice that was followed."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(before)
