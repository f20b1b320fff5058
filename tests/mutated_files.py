"""Mutates a saved model again and again, and loads and runs what comes of it. A process of its own: it may crash.

    python mutated_files.py MODEL.qb FIRST COUNT

Mutation number n is a function of the file and n alone. Before each one its number is printed, so that the last line
tells which one ended the process; then "refused" (SavedModelError), "raised" (an exception as it ran) or "ran".
Memory is limited to what the process has before the first one and MEMORY bytes more.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from test_saved import ODD, paths_of, signed
from torch import Tensor

import qbench
from qbench.saved import SavedModelError

MEMORY = 2 << 30
Content = dict[str, Any]
INTEGERS = [
    -(2**63),
    -(2**31),
    -129,
    -1,
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    1000,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**64 + 1,
]
FLOATS = [0.0, -0.0, 1e-45, 1e-38, 2.0**-60, 1e-10, 1.0, -1.0, 255.0, 2.0**60, 3e38, 1e300, -1e300]
TEXTS = ["", "meta", "cuda", "per_row", "per_tensor", "affine", "symmetric", "\0", "x" * 1000]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, 1e-45, 1e-39, 2.0**-61, 2.0**-60, 2.0**60, 3e38, -3e38]


def parts(data: bytes) -> tuple[Content, dict[str, Tensor]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"]["qbench"])
    del content["sha256"]
    return content, dict(load_tensors(data))


# --- mutations: each changes content or tensors in place --------------------------------------------------------------


def at(content: Content, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def odd_value(value: Any, rng: random.Random) -> Any:
    """Most often of the same type, so that it passes the first checks."""
    if rng.random() < 0.2:
        return copy.deepcopy(rng.choice(ODD))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*INTEGERS, value + 1, value - 1, 2 * value, -value])
    if isinstance(value, float):
        return rng.choice([*FLOATS, value * 2**20, value * 2**-20, -value])
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, list):
        return rng.choice([[], value[:1], value[::-1], [*value, *value], value[1:]])
    return copy.deepcopy(rng.choice(ODD))


def edit_anything(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    path = rng.choice([path for path in paths_of(content) if path])
    inside = at(content, path[:-1])
    if rng.random() < 0.15:
        del inside[path[-1]]
    else:
        inside[path[-1]] = odd_value(inside[path[-1]], rng)


def edit_argument(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """A number among the arguments of a call."""
    calls = [("nodes", i) for i, node in enumerate(content["nodes"]) if node["op"] == "call_function"]
    path = rng.choice(calls)
    numbers = [p for p in paths_of(at(content, path), path) if type(at(content, p)) in (int, float, bool, str)]
    numbers = [p for p in numbers if set(p) & {"args", "kwargs"} and p[-1] != "node"]
    if numbers:
        *place, last = rng.choice(numbers)
        inside = at(content, tuple(place))
        inside[last] = odd_value(inside[last], rng)


def edit_reference(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """An argument becomes the result of another node, or the tensor."""
    path = rng.choice([path for path in paths_of(content["nodes"]) if path and path[-1] == "node"])
    at(content["nodes"], path[:-1])["node"] = rng.randrange(max(path[0], 1))


def edit_input(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    spec = rng.choice(content["inputs"])
    if rng.random() < 0.5:
        spec["shape"] = [rng.choice([None, 0, 1, 2, 2**31]) for _ in spec["shape"]]
    else:
        spec["dtype"] = rng.choice(["uint8", "int64", "float64", "bool"])


def put_before(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Another call between a node and its first argument: empty slices, other devices, dtypes, orders of memory."""
    places = [
        i for i, node in enumerate(content["nodes"]) if any(type(a) is dict and "node" in a for a in node["args"])
    ]
    place = rng.choice(places)
    source = next(a for a in content["nodes"][place]["args"] if type(a) is dict and "node" in a)
    target, args, kwargs = rng.choice(
        [
            ("aten.slice.Tensor", [rng.randrange(4), 0, rng.choice([0, 1])], {}),
            ("aten.slice.Tensor", [-1, 0, rng.choice([0, 1])], {}),
            ("aten._to_copy.default", [], {"device": "meta"}),
            ("aten._to_copy.default", [], {"layout": rng.randrange(8)}),
            ("aten._to_copy.default", [], {"dtype": rng.choice([{"dtype": "uint8"}, {"dtype": "float32"}, 13])}),
            ("aten.transpose.int", [0, -1], {}),
            ("aten.expand.default", [{"list": [2**20, -1, -1, -1]}], {}),
            ("aten.unsqueeze.default", [0], {}),
            ("aten.view.default", [{"list": [-1]}], {}),
            ("aten.new_zeros.default", [{"list": [2, 0, 3]}], {}),
            ("aten.max_pool2d.default", [{"list": [rng.choice(INTEGERS), 2]}, {"list": [1, 1]}, {"list": [0, 1]}], {}),
        ]
    )
    call = {"op": "call_function", "name": "put", "target": target, "layer": "", "kwargs": kwargs}
    call["args"] = [copy.deepcopy(source), *args]
    for path in paths_of(content["nodes"]):
        if path and path[-1] == "node" and path[0] >= place and at(content["nodes"], path) >= place:
            at(content["nodes"], path[:-1])["node"] += 1
    source["node"] = place
    content["nodes"].insert(place, call)


def edit_values(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Some elements of a tensor, or all."""
    name = rng.choice([name for name, tensor in tensors.items() if tensor.numel()])
    flat = tensors[name].clone().flatten()
    places = range(len(flat)) if rng.random() < 0.3 else [rng.randrange(len(flat))]
    for place in list(places)[:5000]:
        if flat.is_floating_point():
            flat[place] = rng.choice(SPECIAL)
        else:
            flat[place] = rng.choice([torch.iinfo(flat.dtype).min, torch.iinfo(flat.dtype).max, 0])
    tensors[name] = flat.reshape(tensors[name].shape)


def edit_shape(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.unsqueeze(-1),
        lambda t: t[:1],
        lambda t: t[:0],
        lambda t: t[..., :1],
        lambda t: t[..., :0],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], -1),
        lambda t: t.transpose(0, -1),
        lambda t: t.reshape(-1, *t.shape[:-1]),
    ]
    tensors[name] = rng.choice(changes)(tensors[name]).contiguous()


def edit_dtype(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    others = [torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    tensors[name] = tensors[name].to(rng.choice([*others, torch.bfloat16]))


def swap_tensors(content: Content, tensors: dict[str, Tensor], rng: random.Random) -> None:
    one, other = rng.choices(list(tensors), k=2)
    tensors[one], tensors[other] = tensors[other], tensors[one]


SIGNED = [
    edit_anything, edit_argument, edit_argument, edit_argument, edit_reference, edit_input, put_before, put_before,
    edit_values, edit_values, edit_shape, edit_dtype, swap_tensors,
]  # fmt: skip


def mutated(data: bytes, number: int) -> bytes:
    """One in eight is damaged without a new sha256; of the others one in four is changed in more than one place."""
    rng = random.Random(number)
    if number % 8 == 0:
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 100])):
            damaged[rng.randrange(rng.choice([8, 200, len(data)]))] = rng.randrange(256)
        return bytes(damaged[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
    content, tensors = parts(data)
    for _ in range(rng.choice([1, 1, 1, rng.randrange(2, 5)])):
        try:
            rng.choice(SIGNED)(content, tensors, rng)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError):
            continue  # it does not apply to what the one before has left
    return signed(content, tensors)


# --- what comes of them ----------------------------------------------------------------------------------------------


def inputs_of(content: Content) -> list[Tensor]:
    """Two examples of what the model takes."""
    shapes = [[2 if size is None else size for size in spec["shape"]] for spec in content["inputs"]]
    floats = [spec["dtype"] == "float32" for spec in content["inputs"]]
    return [torch.randn(shape) if f else torch.ones(shape).long() for shape, f in zip(shapes, floats, strict=True)]


def outcome(path: Path, inputs: list[Tensor]) -> str:
    try:
        model = qbench.load(path, backend="native")
    except SavedModelError:
        return "refused"
    try:
        model(*inputs)
    except Exception:  # noqa: BLE001  (shapes may not fit when it runs)
        return "raised"
    return "ran"


def main(paths: list[Path], first: int, count: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = [(path, data, inputs_of(parts(data)[0])) for path in paths for data in [path.read_bytes()]]
    for path, _, inputs in files:
        assert outcome(path, inputs) == "ran"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for path, data, inputs in files:
        file = path.with_name(f"mutated_{path.name}")
        for number in range(first, first + count):
            print(path.stem, number, end=" ", flush=True)
            file.write_bytes(mutated(data, number))
            print(outcome(file, inputs), flush=True)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[3:]], int(sys.argv[1]), int(sys.argv[2]))
