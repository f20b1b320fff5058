"""OpenVINO: post-training quantization by nncf, and compiled models on the CPU.

Settings as its documentation recommends: latency hint, one stream, as many threads as are measured, the batch size
fixed, nncf's transformer scheme for networks with attention. Float operations compute in float32, as those of all
others here do: on CPUs with bfloat16 instructions OpenVINO would otherwise take those by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qbench.peers import Source
    from qbench.recipe import Recipe

# nncf quantizes statically, its weights symmetric, per channel for the layers that this pays for.
OFFERS = {
    "method": ("fp32", "ptsq"),
    "granularity": ("per_channel",),
    "scheme": ("symmetric",),
    "activation_scheme": ("affine",),
    "observer": ("minmax",),
    "output": ("float",),
}
# The plugin's names of layers with multiply-accumulates, and the precisions that count as int8.
MACS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell", "ScaledDotProductAttention"}
INT8 = {"i8", "u8"}


def candidates(source: Source, recipe: Recipe, folder: Path, program: str) -> list[str]:
    """See qbench.backends.Peer: of a quantized network nncf's two presets (symmetric activations, or affine ones)."""
    import openvino

    if not recipe.method.needs_calibration:
        _save(openvino.convert_model(str(source.onnx)), folder / "fp32", program)
        return ["fp32"]
    import nncf

    nncf.set_log_level(logging.ERROR)
    presets = nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED
    for preset in presets:
        model = openvino.convert_model(str(source.onnx))
        attention = any(op.get_type_name() in ("Softmax", "ScaledDotProductAttention") for op in model.get_ops())
        names = [port.get_any_name() for port in model.inputs]
        data = [dict(zip(names, (leaf.numpy() for leaf in batch), strict=True)) for batch in source.calibration]
        quantized = nncf.quantize(
            model,
            nncf.Dataset(data),
            preset=preset,
            subset_size=len(data),
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
        )
        _save(quantized, folder / preset.value, program)
    return [preset.value for preset in presets]


def _save(model: Any, folder: Path, program: str) -> None:
    import openvino

    folder.mkdir()
    openvino.save_model(model, str(folder / program), compress_to_fp16=False)


def load(path: Path, batch: int | None, threads: int) -> Callable[..., Any]:
    """A request of the compiled model, called with tensors; the network's first result as a tensor, void after the next
    call.
    """
    request = _compiled(path, batch, threads).create_infer_request()

    def run(*inputs: Tensor) -> Tensor:
        results = request.infer([leaf.numpy() for leaf in inputs], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return run


def float_ops(path: Path, batch: int, threads: int) -> list[str]:
    """Read from the graph as the CPU plugin executes it."""
    found = []
    for op in _compiled(path, batch, threads).get_runtime_model().get_ordered_ops():
        told = {name: str(op.get_rt_info()[name].astype(str)) for name in ("layerType", "runtimePrecision")}
        if told["layerType"] in MACS and told["runtimePrecision"] not in INT8:
            found.append(f"{op.get_friendly_name()}: {told['layerType']} {told['runtimePrecision']}")
    return found


def _compiled(path: Path, batch: int | None, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    if batch is not None:
        model.reshape({port: [batch, *list(port.partial_shape)[1:]] for port in model.inputs})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return core.compile_model(model, "CPU", settings)
