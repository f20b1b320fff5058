"""`.qb` files: a safetensors file with the program as JSON metadata and a sha256 over everything.

Nothing in a file is trusted: the hash, every target, argument, shape, dtype, scale and zero point is checked before a
kernel sees it. There is no time, path or host inside, so two saves of one model are byte-identical.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from qbench import structure
from qbench.backends import default
from qbench.encoded import DTYPES, TENSOR_DTYPES, decode_graph, encode_graph
from qbench.model import QuantizedModel
from qbench.native.library import NativeUnavailable
from qbench.program import Program
from qbench.recipe import option

FORMAT = 1
KEY = "qbench"


class SavedModelError(ValueError):
    """A file that is no saved model, or a damaged or altered one; the message names the file."""


def dump(model: QuantizedModel) -> bytes:
    """The bytes of a model's file. Raises ValueError for a program with a call that a file cannot hold."""
    program = model.program
    if odd := [name for name, tensor in program.tensors.items() if str(tensor.dtype)[6:] not in TENSOR_DTYPES]:
        raise ValueError(
            f"tensor {odd[0]} is {program.tensors[odd[0]].dtype}; tensors of a program are {', '.join(TENSOR_DTYPES)}"
        )
    if foreign := [spec["dtype"] for spec in program.inputs if spec["dtype"] not in DTYPES]:
        raise ValueError(f"an input is {foreign[0]}; inputs of a program are {', '.join(DTYPES)}")
    content: dict[str, Any] = {
        "format": FORMAT,
        "recipe": model.recipe,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "nodes": encode_graph(program.graph),
    }
    tensors = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    content["sha256"] = _digest(content, tensors)
    return save_tensors(tensors, {KEY: json.dumps(content, allow_nan=False)})  # in the order of the program's text


def load(path: str | Path, backend: str | None = None) -> QuantizedModel:
    """Read a `.qb` file, to run on a backend (None: native, or reference where the engine is not built).

    Raises SavedModelError when it is none, damaged, altered or of another version, NativeUnavailable when native is
    asked for and not built.
    """
    chosen = option("backend", backend or default())
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SavedModelError(f"{path}: {error.strerror or error}") from error
    try:
        content, tensors = _read(data)
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, this version of qbench reads {FORMAT}")
        claimed = content.pop("sha256", None)
        if claimed != _digest(content, tensors):
            raise ValueError("its content does not match its sha256: the file is damaged or was altered")
        program = _decode(content, tensors)
        return QuantizedModel(program, content["recipe"], chosen)
    except NativeUnavailable:
        raise  # no fault of the file
    except Exception as error:  # whatever a file that nobody vouches for makes torch raise is its fault
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise SavedModelError(f"{path} is not a usable qbench model: {reason}") from error


def _read(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The program's JSON and the tensors, the container checked by the safetensors library."""
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"it is no complete safetensors file ({error})") from error
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if KEY not in metadata:
        raise ValueError("it is a safetensors file without a qbench program")
    content = json.loads(metadata[KEY])
    if not isinstance(content, dict):
        raise ValueError("its program is not a JSON object")
    return content, tensors


def _digest(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


# --- JSON to program -------------------------------------------------------------------------------------------------


def _decode(content: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    if any(str(tensor.dtype)[6:] not in TENSOR_DTYPES for tensor in tensors.values()):
        raise ValueError(f"tensors of a program are {', '.join(TENSOR_DTYPES)}")
    graph = decode_graph(content["nodes"], tensors)
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    if set(tensors) != used:
        raise ValueError(f"tensors that the program does not use: {sorted(set(tensors) - used)[:3]}")
    inputs = [_decode_input(spec) for spec in content["inputs"]]
    if len(inputs) != sum(node.op == "placeholder" for node in graph.nodes):
        raise ValueError("the number of inputs is not that of the program")
    (last,) = [node for node in graph.nodes if node.op == "output"]
    results = last.args[0]
    structure.build(content["outputs"], list(results))
    return Program(graph, tensors, inputs, content["outputs"])


def _decode_input(spec: dict[str, Any]) -> dict[str, Any]:
    shape, dtype = spec["shape"], spec["dtype"]
    sizes = [size for size in shape if size is not None]
    if dtype not in DTYPES or not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"input {spec} is not a shape and a dtype")
    return {"shape": list(shape), "dtype": dtype}
