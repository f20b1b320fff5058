"""`.qb` files: bit for bit there and back, and nothing but SavedModelError for whatever else is in them."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import Apply, every_operation, grid, on_grid
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import qbench
from qbench.capture import Network, capture
from qbench.quantization import quantize_network
from qbench.saved import SavedModelError, dump, load

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 16, 16))).float()


@functools.cache
def network() -> Network:
    return capture(every_operation(), (X,))


def quantized(**recipe: Any) -> qbench.QuantizedModel:
    return quantize_network(network(), qbench.Recipe(**recipe), [(X,)])


@functools.cache
def small() -> bytes:
    """The file of a small model with a zero point, a residual, a constant, a table and a pool."""
    model = on_grid(Apply(lambda m, x: m.layers[1]((m.layers[0](x) + x).sigmoid().mean((2, 3)) * 0.5), *layers()))
    x = grid(4, 3, 5, 5, seed=3)
    return dump(qbench.quantize(model, (x,), qbench.Recipe(scheme="affine"), calibration=[(x,)]))


def layers() -> list[nn.Module]:
    return [nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)]


def opened(data: bytes, folder: Path) -> qbench.QuantizedModel:
    path = folder / "m.qb"
    path.write_bytes(data)
    return load(path)


def refused(data: bytes, folder: Path) -> str:
    """The message, which is one line that names the file."""
    with pytest.raises(SavedModelError) as error:
        opened(data, folder)
    message = str(error.value)
    assert message.startswith(str(folder / "m.qb"))
    assert "\n" not in message
    return message


# --- there and back --------------------------------------------------------------------------------------------------

RECIPES = [
    {"method": "fp32"},
    {"method": "woq", "granularity": "per_group", "group_size": 5},
    {"method": "ptdq", "scheme": "affine"},
    {"method": "ptsq", "granularity": "per_group", "group_size": 5, "scheme": "affine"},
    {"method": "ptsq", "output": "int8", "activation_scheme": "symmetric"},
    {"method": "ptsq", "keep_float": ["grouped", "head"]},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_there_and_back_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    q = quantized(**recipe)
    q.save(tmp_path / "m.qb")
    again = qbench.load(tmp_path / "m.qb")
    assert torch.equal(q(X), again(X))
    assert (again.code, again.recipe, again.float_ops) == (q.code, q.recipe, q.float_ops)
    assert again.int8_mac_fraction == q.int8_mac_fraction
    assert q.size_bytes == (tmp_path / "m.qb").stat().st_size
    again.save(tmp_path / "again.qb")
    assert (tmp_path / "again.qb").read_bytes() == (tmp_path / "m.qb").read_bytes()
    for name, tensor in q.program.tensors.items():
        assert tensor.dtype == again.program.tensors[name].dtype
        assert torch.equal(tensor, again.program.tensors[name])


def test_two_saves_are_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    paths = [tmp_path / "a.qb", tmp_path / "elsewhere" / "b.qb"]
    for path in paths:
        quantized().save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert str(tmp_path).encode() not in paths[0].read_bytes()


def test_two_recipes_are_different_files() -> None:
    recipes = [
        {"granularity": g, "scheme": s, "activation_scheme": a, "group_size": 5}
        for g in ("per_tensor", "per_channel", "per_group")
        for s in ("symmetric", "affine")
        for a in ("symmetric", "affine")
    ]
    assert len({dump(quantized(**recipe)) for recipe in recipes}) == len(recipes)


def test_nested_results_keep_their_form(tmp_path: Path) -> None:
    model = on_grid(Apply(lambda m, x: {"a": [m.layers[0](x), (x,)], "b": x + 1}, nn.Linear(4, 2)))
    x = grid(3, 4, seed=1)
    q = qbench.quantize(model, (x,), calibration=[(x,)])
    q.save(tmp_path / "m.qb")
    result = qbench.load(tmp_path / "m.qb")(x)
    assert torch.equal(result["a"][0], q(x)["a"][0])
    assert torch.equal(result["a"][1][0], x)
    assert list(result) == ["a", "b"]
    assert (type(result["a"]), type(result["a"][1])) == (list, tuple)


def test_every_move_of_codes_can_be_saved() -> None:
    """Fusion and the file's closed set of calls agree."""
    from qbench.encoded import target_name
    from qbench.fusion import CLAMPS, MOVES

    for target in [*MOVES, *CLAMPS]:
        target_name(target)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_no_file_and_no_model(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.qb", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SavedModelError, match=reason):
            load(path)
    assert "no complete safetensors file" in refused(b"", tmp_path)
    assert "no complete safetensors file" in refused(b"a text, and not a model", tmp_path)
    assert "without a qbench program" in refused(save_tensors({"w": torch.ones(2)}), tmp_path)
    assert "without a qbench program" in refused(save_tensors({"w": torch.ones(2)}, {"other": "1"}), tmp_path)
    for program in ("", "1", "[]", "{", "null", '"text"', "{}", "[" * 100_000):
        refused(save_tensors({"w": torch.ones(2)}, {"qbench": program}), tmp_path)


def test_truncated_at_any_length(tmp_path: Path) -> None:
    data = small()
    for length in {*range(16), *range(0, len(data), 97), *range(len(data) - 16, len(data))}:
        refused(data[:length], tmp_path)
    refused(data + b"\0", tmp_path)


def test_any_flipped_byte(tmp_path: Path) -> None:
    """In the header, the program, each tensor: everywhere in steps of 23 and at both ends."""
    data = small()
    for place in {*range(12), *range(0, len(data), 23), *range(len(data) - 8, len(data))}:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        refused(bytes(damaged), tmp_path)


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        refused(data, Path(folder))
        refused(len(data).to_bytes(8, "little") + data, Path(folder))


# --- hostile edits: the sha256 is right, the content is not ----------------------------------------------------------

Content = dict[str, Any]


def signed(content: Content, tensors: dict[str, Tensor]) -> bytes:
    """A file with this content and a sha256 that fits, computed as the format says."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return save_tensors(tensors, {"qbench": json.dumps(content | {"sha256": digest.hexdigest()})})


def parts() -> tuple[Content, dict[str, Tensor]]:
    """Content and tensors of the small file, to be edited."""
    data = small()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"]["qbench"])
    del content["sha256"]
    return content, dict(load_tensors(data))


def node(content: Content, target: str) -> Content:
    """The first node that calls a function, or of an op."""
    return next(n for n in content["nodes"] if target in (n["target"], n["op"]) or f".{target}." in n["target"])


def argument(target: str, name: str, value: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    """Set one keyword argument of a node."""

    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        node(content, target)["kwargs"][name] = value

    return edit


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Content, dict[str, Tensor]], None]:
    """Replace one tensor."""

    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = change(tensors[key])

    return edit


def field(target: str, name: str, value: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    """Set one field of a node."""

    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        node(content, target)[name] = value

    return edit


def top(name: str, value: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        content[name] = value

    return edit


def call(target: str, *args: Any, **kwargs: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    """Replace the call of the convolution."""

    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        node(content, "conv").update(target=target, args=list(args), kwargs=kwargs)

    return edit


def declared(**spec: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    """Change what the file says of its input."""

    def edit(content: Content, tensors: dict[str, Tensor]) -> None:
        content["inputs"][0].update(spec)

    return edit


def twice(content: Content, tensors: dict[str, Tensor]) -> None:
    content["nodes"].insert(-1, copy.deepcopy(content["nodes"][0]))


def far(content: Content, tensors: dict[str, Tensor]) -> None:
    node(content, "conv")["args"][0] = {"node": len(content["nodes"]) - 1}


def drop(content: Content, tensors: dict[str, Tensor]) -> None:
    del tensors[next(iter(tensors))]


def crossed(content: Content, tensors: dict[str, Tensor]) -> None:
    node(content, "conv")["kwargs"].update(q_min=200, q_max=100)


HOSTILE: dict[str, tuple[Callable[[Content, dict[str, Tensor]], None], str]] = {
    # numbers
    "zero point 300": (argument("conv", "zero_point", 300), "zero_point=300 is out of bounds"),
    "zero point -1": (argument("conv", "x_zero_point", -1), "x_zero_point=-1 is out of bounds"),
    "zero point true": (argument("conv", "x_zero_point", True), "x_zero_point=True is no int"),
    "zero point of float": (argument("conv", "zero_point", 3.0), "zero_point=3.0 is no int"),
    "code 256": (argument("conv", "q_max", 256), "q_max=256 is out of bounds"),
    "code -3": (argument("conv", "q_min", -3), "q_min=-3 is out of bounds"),
    "codes crossed": (crossed, "q_min is above q_max"),
    "scale 0": (argument("conv", "scale", 0.0), "scale=0.0 is out of bounds"),
    "scale negative": (argument("conv", "x_scale", -1.0), "x_scale=-1.0 is out of bounds"),
    "scale huge": (argument("conv", "x_scale", 1e30), "x_scale=1e\\+30 is out of bounds"),
    "scale tiny": (argument("conv", "residual_scale", 1e-30), "residual_scale=1e-30 is out of bounds"),
    "scale NaN": (argument("conv", "x_scale", {"float": "nan"}), "x_scale=nan is no float"),
    "scale infinite": (argument("conv", "x_scale", {"float": "inf"}), "x_scale=inf is no float"),
    "scale of text": (argument("conv", "x_scale", "1"), "x_scale='1' is no float"),
    "scale absent": (argument("quantize", "scale", None), "scale=None is no float"),
    "weight scale 0": (tensor("layers.0.weight_scale", torch.zeros_like), "weight scale is out of bounds"),
    "weight scale NaN": (tensor("layers.0.weight_scale", lambda t: t * math.nan), "weight scale is out of bounds"),
    "weight scale huge": (tensor("layers.0.weight_scale", lambda t: t * 1e30), "weight scale is out of bounds"),
    "sum over the bound": (
        tensor("layers.0.bias", lambda t: torch.full_like(t, 2**31 - 1)), "its int32 sum may reach",
    ),
    # shapes and dtypes
    "weight of floats": (tensor("layers.0.weight", Tensor.float), "the weight must be int8"),
    "weight of uint8": (tensor("layers.0.weight", lambda t: t.to(torch.uint8)), "the weight must be int8"),
    "weight of 5 dimensions": (tensor("layers.0.weight", lambda t: t[None]), "3 or 4 dimensions"),
    "weight without outputs": (tensor("layers.0.weight", lambda t: t[:0]), "the weight must be int8"),
    "scales of another number": (tensor("layers.0.weight_scale", lambda t: t[:2]), "the weight scales must be float32"),
    "scales of float64": (tensor("layers.0.weight_scale", Tensor.double), "the weight scales must be float32"),
    "zero points of another shape": (tensor("layers.0.weight_zero_point", lambda t: t[:1]), "weight zero points"),
    "zero points of int32": (tensor("layers.0.weight_zero_point", Tensor.int), "weight zero points"),
    "bias of another length": (tensor("layers.0.bias", lambda t: t[:1]), "the bias must be"),
    "bias of int64": (tensor("layers.0.bias", Tensor.long), "the bias must be"),
    "table of 255": (tensor("table", lambda t: t[:255]), "the table must be 256 uint8"),
    "table of int8": (tensor("table", lambda t: t.view(torch.int8)), "the table must be 256 uint8"),
    "tensor of bfloat16": (tensor("layers.0.bias", lambda t: t.bfloat16()), ""),
    "block 0": (argument("conv", "block", 0), "block=0 is out of bounds"),
    "block of 1": (argument("conv", "block", 1), "the weight scales must be float32"),
    "groups 2": (argument("conv", "groups", 2), "3 outputs do not divide into 2 groups"),
    "stride 0": (argument("conv", "stride", {"list": [0, 1]}), "stride=.* is out of bounds"),
    "stride of one entry": (argument("conv", "stride", {"list": [1]}), "must have 2 entries"),
    "padding negative": (argument("conv", "padding", {"list": [-1, 1]}), "padding=.* is out of bounds"),
    "dilation huge": (argument("conv", "dilation", {"list": [1, 2**40]}), "dilation=.* is out of bounds"),
    # the graph
    "forward reference": (far, "names a node that comes later"),
    "reference to itself": (field("output", "args", [{"list": [{"node": 10**9}]}]), "names a node that comes later"),
    "negative reference": (field("output", "args", [{"list": [{"node": -1}]}]), "names a node that comes later"),
    "reference by text": (field("output", "args", [{"list": [{"node": "0"}]}]), "is not of this format"),
    "unknown tensor": (field("get_attr", "target", "nothing"), "tensor 'nothing' is not in the file"),
    "tensor missing": (drop, "is not in the file"),
    "tensor unused": (lambda content, tensors: tensors.update(more=torch.ones(3)), "the program does not use"),
    "activation as weight": (argument("conv", "weight", {"node": 0}), "weight must be a tensor of the file"),
    "argument missing": (lambda content, tensors: node(content, "conv")["kwargs"].pop("x_scale"), "x_scale is missing"),
    "argument unknown": (argument("conv", "more", 1), "unknown arguments"),
    "too many arguments": (field("table", "args", [{"node": 0}] * 9), "unknown arguments"),
    "no output": (lambda content, tensors: content["nodes"].pop(), "a program ends with one list of results"),
    "two outputs": (lambda content, tensors: content["nodes"].append(content["nodes"][-1]), "ends with one list"),
    "output of no list": (field("output", "args", [{"node": 0}]), "ends with one list of results"),
    "output of nothing": (field("output", "args", []), ""),
    "no nodes": (top("nodes", []), "ends with one list of results"),
    "nodes no list": (top("nodes", 3), ""),
    "a node of text": (top("nodes", ["conv"]), ""),
    "kwargs a list": (field("conv", "kwargs", []), ""),
    "args a number": (field("conv", "args", 3), ""),
    "name not a name": (field("conv", "name", "import os; x"), "is no name of a node"),
    "name a keyword": (field("placeholder", "target", "lambda"), ""),
    "input with a dot": (field("placeholder", "target", "a.b"), ""),
    "input with a default": (field("placeholder", "args", [3]), ""),
    "op unknown": (field("conv", "op", "call_module"), "is not of this format"),
    "two inputs declared": (lambda content, tensors: content["inputs"].append(content["inputs"][0]), "number of input"),
    "input of no dtype": (declared(dtype="str"), "is not a shape and a dtype"),
    "input of no shape": (declared(shape=3), ""),
    "input of a negative size": (declared(shape=[None, -3]), "is not a shape and a dtype"),
    "input named twice": (twice, "two inputs have one name"),
    "result 7 of 1": (top("outputs", 7), "result 7 of 1"),
    "result -1": (top("outputs", -1), "result -1 of 1"),
    "results in a set": (top("outputs", {"set": [0]}), "does not say how results are nested"),
    # calls
    "as_strided": (call("aten.as_strided.default", {"node": 0}, {"list": [9999]}, {"list": [1]}), "may call"),
    "from_file": (call("aten.from_file.default", "/etc/passwd"), "may call"),
    "in place": (call("aten.relu_.default", {"node": 0}), "may call"),
    "unchecked indices": (call("aten.max_pool2d_with_indices_backward.default"), "may call"),
    "uninitialized": (call("aten.empty.memory_format", {"list": [9]}), "may call"),
    "no operator": (call("os.system", "true"), "unknown operation 'os.system'"),
    "keywords of an operator": (call("operator.neg", {"node": 0}, more=1), "unknown arguments"),
    "builtin": (call("operator.attrgetter", "x"), "unknown operation"),
    "attribute of torch": (call("aten.__class__.mro"), "unknown operation"),
    "another namespace": (call("prims.convert_element_type.default", {"node": 0}), "unknown operation"),
    "another device": (call("aten._to_copy.default", {"node": 0}, device="meta"), "device='meta', a program runs on"),
    "another layout": (call("aten._to_copy.default", {"node": 0}, layout=1), "layout=1, a program runs on the CPU"),
    "a device in its place": (call("aten.to.device", {"node": 0}, "meta", {"dtype": "uint8"}), "device='meta'"),
    "no such overload": (call("aten.relu.nothing", {"node": 0}), "unknown operation"),
    "target a number": (field("conv", "target", 3), ""),
    "target a list": (field("conv", "target", ["aten.relu.default"]), ""),
    # the file
    "format 2": (top("format", 2), "its format is 2, this version of qbench reads 1"),
    "no recipe": (lambda content, tensors: content.pop("recipe"), "'recipe' is missing"),
    "no nodes at all": (lambda content, tensors: content.pop("nodes"), "'nodes' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_edits(name: str, tmp_path: Path) -> None:
    edit, reason = HOSTILE[name]
    content, tensors = parts()
    edit(content, tensors)
    message = refused(signed(content, tensors), tmp_path)
    assert re.search(reason, message), message
    assert "sha256" not in message


def test_an_edit_alone_breaks_the_sha256(tmp_path: Path) -> None:
    """The tests' own signature is the package's; the same edit without a new signature is refused."""
    content, tensors = parts()
    x = grid(2, 3, 5, 5, seed=4)
    assert torch.equal(opened(signed(content, tensors), tmp_path)(x), opened(small(), tmp_path)(x))
    old, new = (f'zero_point\\": {code}'.encode() for code in (node(content, "conv")["kwargs"]["zero_point"], 7))
    assert old in small()
    header = small()[8 : 8 + int.from_bytes(small()[:8], "little")].replace(old, new)
    header += b" " * (-len(header) % 8)
    edited = len(header).to_bytes(8, "little") + header + small()[8 + int.from_bytes(small()[:8], "little") :]
    assert "does not match its sha256" in refused(edited, tmp_path)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, item in items for place in paths_of(item, (*path, key)))]


ODD = [
    None, True, 0, -1, 1, 300, 2**31, 2**63, 10**30, 0.0, -1.5, 1e30, "", "x", "lambda", "aten.relu.default",
    "qbench.add.default", "operator.getitem", [], {}, [[]], {"node": 0}, {"node": 3}, {"list": []},
    {"tuple": [1, 2]}, {"float": "nan"}, {"dtype": "int64"}, {"dtype": "device"}, {"list": [{"node": 1}] * 3},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_random_edits_with_a_fitting_sha256(seed: int, tmp_path: Path) -> None:
    """Any place of the program with any odd value: a model that loads, or SavedModelError, and never anything else."""
    choose, loaded = random.Random(seed), 0
    content, tensors = parts()
    places = [place for place in paths_of(content) if place]
    for _ in range(60):
        edited = copy.deepcopy(content)
        *path, last = choose.choice(places)
        inside = edited
        for key in path:
            inside = inside[key]
        if choose.random() < 0.2:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(choose.choice(ODD))
        with contextlib.suppress(SavedModelError):
            model = opened(signed(edited, tensors), tmp_path)
            loaded += 1
            with contextlib.suppress(Exception):  # shapes may not fit when it runs; the process must survive
                model(grid(2, 3, 5, 5, seed=4))
    assert 0 < loaded < 40


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    """A call outside the closed set is refused when the file is written, not when it is read."""
    model = on_grid(Apply(lambda m, x: torch.fft.fft(m.layers[0](x)).real, nn.Linear(4, 4)))
    x = grid(3, 4, seed=2)
    q = qbench.quantize(model, (x,), qbench.Recipe(method="fp32"))
    with pytest.raises(ValueError, match=r"operation 'aten\.\S+' is not one that a saved program may call"):
        q.save(tmp_path / "m.qb")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"tensor weight is torch\.float16; tensors of a program are float32, "):
        qbench.quantize(nn.Linear(4, 4).half(), (x.half(),), qbench.Recipe(method="fp32")).save(tmp_path / "m.qb")
    with pytest.raises(ValueError, match="an input is bfloat16; inputs of a program are float32, "):
        qbench.quantize(nn.Linear(4, 4).bfloat16(), (x.bfloat16(),), qbench.Recipe(method="fp32")).save(
            tmp_path / "m.qb"
        )


def test_a_conversion_to_half_precision_is_saved(tmp_path: Path) -> None:
    model, x = on_grid(Apply(lambda m, x: m.layers[0](x).half().float() * 2, nn.Linear(4, 4))), grid(3, 4, seed=2)
    q = qbench.quantize(model, (x,), calibration=[(x,)])
    q.save(tmp_path / "m.qb")
    assert torch.equal(load(tmp_path / "m.qb")(x), q(x))
