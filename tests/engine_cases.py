"""Records the engine's calls for engine_replay.cpp: inputs, and results as the reference has them.

A network runs on the reference; each of its operations runs on the native backend too, whose calls of the engine are
written down with all that their pointers lead to. The format of the file is stated in engine_replay.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from programs import every_operation, op_program
from test_native import Activated, Attention, Encoder, Started, normal, seeded
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qbench.backends import native, reference
from qbench.capture import capture
from qbench.native.library import SIGNATURES, Window, byref, loaded_library, written_down
from qbench.program import Macs, Program
from qbench.quantization import quantize_network
from qbench.recipe import Recipe

FLOAT_TOLERANCE = 1e-5  # of the largest value: results of dynamic and weight-only operations
INTEGER, REAL, POINTER, STRUCTURE = range(4)


# --- the file --------------------------------------------------------------------------------------------------------


def number(value: int) -> bytes:
    return struct.pack("<q", value)


def raw(value: bytes) -> bytes:
    return number(len(value)) + value


def many(items: list[bytes]) -> bytes:
    return number(len(items)) + b"".join(items)


# --- recording -------------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """How a packed weight was made, and how its size was found."""

    function: str
    arguments: tuple[Any, ...]
    sized_by: str
    sizes: tuple[int, ...]


class Case:
    """The calls of one operation."""

    def __init__(self, name: str, tensors: dict[int, Tensor], packings: dict[int, Packing]) -> None:
        self.name, self.tensors, self.packings = name, tensors, packings
        self.indices: dict[int, int] = {}  # of the buffers, by address
        self.buffers: list[bytes] = []
        self.calls: list[bytes] = []
        self.results: list[bytes] = []

    def buffer(self, address: int | None) -> int:
        """The index of the buffer at an address; its content is noted when it is first met.

        Of a packed weight the call that packs it is noted instead.
        """
        if not address:
            return -1
        if address not in self.indices:
            tensor, packing = self.tensors[address], self.packings.get(address)
            if packing:
                self.add(address, b"", packing.sized_by, packing.sizes)
                totals = packing.arguments[-1]
                self.add(totals, b"\xff" * len(memory(totals, self.tensors[totals])))
                self.calls.append(self.begun(packing.function, packing.arguments) + number(0))
            else:
                self.add(address, memory(address, tensor))
        return self.indices[address]

    def add(self, address: int, content: bytes, sized_by: str = "", sizes: tuple[int, ...] = ()) -> None:
        """Note a buffer, with its content or with the function that tells its size."""
        self.indices[address] = len(self.buffers)
        size = raw(sized_by.encode()) + many([number(size) for size in sizes])
        self.buffers.append(number(self.tensors[address].element_size()) + raw(content) + size)

    def begun(self, function: str, values: tuple[Any, ...]) -> bytes:
        """A call without what it returns; buffers that are first met hold what they hold before it."""
        arguments = [self.argument(*pair) for pair in zip(values, SIGNATURES[function][1], strict=True)]
        return raw(function.encode()) + many(arguments)

    def argument(self, value: Any, kind: Any) -> bytes:
        if kind is ctypes.c_void_p:
            return number(POINTER) + number(self.buffer(value))
        if is_structure(kind):
            size, held = ctypes.sizeof(value._obj), value._obj
            held = held._b_base_ if isinstance(held._b_base_, ctypes.Array) else held  # the first of several
            places = [number(offset) + number(self.buffer(address)) for offset, address in pointers(held)]
            return number(STRUCTURE) + number(size) + raw(bytes(held)) + many(places)
        if kind in (ctypes.c_float, ctypes.c_double):
            return number(REAL) + struct.pack("<d", value)
        return number(INTEGER) + number(int(value))

    def result(self, got: Tensor, want: Tensor, tolerance: float) -> None:
        """`got` is a view of a buffer, which must then hold the values of `want`."""
        address = got.untyped_storage().data_ptr()
        assert address in self.indices, f"{self.name}: a result lies in no buffer of the engine's"
        whole = torch.frombuffer(bytearray(memory(address, self.tensors[address])), dtype=got.dtype)
        whole.as_strided(got.size(), got.stride(), got.storage_offset()).copy_(want)
        is_float = got.dtype == torch.float32
        end = number(is_float) + struct.pack("<d", tolerance)
        self.results.append(number(self.indices[address]) + raw(whole.numpy().tobytes()) + end)

    def written(self) -> bytes:
        return raw(self.name.encode()) + many(self.buffers) + many(self.calls) + many(self.results)


def memory(address: int, tensor: Tensor) -> bytes:
    """From a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return ctypes.string_at(address, (last + 1) * tensor.element_size() if tensor.numel() else 0)


def is_structure(kind: Any) -> bool:
    return issubclass(kind, ctypes._Pointer)


def pointers(held: ctypes.Structure | ctypes.Array[Any], start: int = 0) -> Iterator[tuple[int, int]]:
    """Offset and address of each pointer that is not null in a structure, those inside it, or an array of them."""
    if isinstance(held, ctypes.Array):
        for index, one in enumerate(held):
            yield from pointers(one, start + index * ctypes.sizeof(one))
        return
    for name, kind, *_ in held._fields_:
        value, offset = getattr(held, name), start + getattr(type(held), name).offset
        if issubclass(kind, ctypes.Structure):
            yield from pointers(value, offset)
        elif kind is ctypes.c_void_p and value:
            yield offset, value


def _specified(node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
    """The reference's kernel, of a layer with a table after it: both."""
    if "table" not in constants or node.target is torch.ops.qbench.table.default:
        return reference().kernel(node, constants, macs)
    layer, table = (
        reference().kernel(node, {k: v for k, v in constants.items() if k != "table"}, macs),
        constants["table"],
    )
    return lambda *activations: table[layer(*activations).long()]


class Recorder:
    """A backend that executes on the reference and notes what native does with the same inputs.

    Use it within `with recorder.listening():`, from lowering a program to running it.
    """

    name: ClassVar[str] = "recorder"
    label: ClassVar[str] = "recorder"
    latency_is_result: ClassVar[bool] = False
    fuses_tables: ClassVar[bool] = True

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.network = ""
        self._tensors: dict[int, Tensor] = {}  # all that the engine may be given, by address, kept alive
        self._packings: dict[int, Packing] = {}  # by the address of the packed weight
        self._case: Case | None = None

    def environment(self) -> dict[str, Any]:
        return {}

    def kernel(self, node: fx.Node, constants: dict[str, Any], macs: Macs) -> Callable[..., Any]:
        counts = Macs(), Macs()
        want, got = _specified(node, constants, counts[0]), native().kernel(node, constants, counts[1])
        loose = any(word in str(node.target) for word in ("dynamic", "weight_only"))
        return self._both(node.name, want, got, FLOAT_TOLERANCE if loose else 0.0, counts)

    def runner(self, lowered: Callable[..., Any], macs: Macs) -> Callable[..., Any]:
        return lowered

    def call(self, target: Any) -> Callable[..., Any]:
        want, got = reference().call(target), native().call(target)
        name = target._schema.name.split("::")[1] if got is not want else ""
        return self._both(name, want, got, 0.0, (Macs(), Macs())) if got is not want else want

    def _both(self, name: str, want: Any, got: Any, tolerance: float, counts: tuple[Macs, Macs]) -> Callable[..., Any]:
        def both(*arguments: Any, **options: Any) -> Any:
            expected = want(*arguments, **options)
            case = self._case = Case(f"{self.network}: {name}", self._tensors, self._packings)
            found = got(*arguments, **options)
            self._case = None
            assert counts[0] == counts[1]
            leaves = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
            if any(one.untyped_storage().data_ptr() not in case.indices for one, _ in leaves):
                return expected  # torch made the result out of the engine's, as of a float embedding's rows
            for one, other in leaves if case.calls else []:
                case.result(one, other, tolerance * float(other.abs().max()) if tolerance and other.numel() else 0.0)
            self.cases += [case] if case.calls else []
            return expected

        both.__name__, both.__module__ = name, __name__
        return both

    def noted(self, name: str, function: str, got: Tensor, want: Tensor, *values: Any) -> None:
        """A case of one call, which leaves `want` in `got`; tensors stand for their addresses."""
        with self.listening():
            case = self._case = Case(name, self._tensors, self._packings)
            getattr(self, function)(*(v.data_ptr() if isinstance(v, Tensor) else v for v in values))
            self._case = None
            case.result(got, want, 0.0)
            self.cases.append(case)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note tensors whose address is asked for, and the calls that follow. Results begin as 255 and NaN."""
        address_of = torch.Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            self._tensors[address_of(tensor)] = tensor
            return address_of(tensor)

        with pytest.MonkeyPatch.context() as patch, written_down(self):
            patch.setattr(torch.Tensor, "data_ptr", data_ptr)
            torch.use_deterministic_algorithms(True)  # torch.empty fills what it returns
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(False)

    def __getattr__(self, function: str) -> Callable[..., Any]:
        """A function of the engine that notes its calls."""
        if function not in SIGNATURES:
            raise AttributeError(function)

        def call(*values: Any) -> Any:
            if function == "qb_pack":
                self._packings[values[-2]] = Packing(function, values, "qb_packed_size", values[1:6])
            if function == "qb_pack_winograd":
                self._packings[values[-2]] = Packing(function, values, "qb_packed_winograd_size", values[2:4])
            if function == "qb_winograd_pays":  # not the recorded CPU's choice
                return int(self.network.startswith("filtered"))
            if function == "qb_pack_depthwise":
                self._packings[values[-2]] = Packing(function, values, "qb_packed_depthwise_size", values[2:5])
            case = None if function.startswith("qb_pack") else self._case  # noted where the weight is met
            begun = case.begun(function, values) if case else b""
            returned = getattr(loaded_library(), function)(*values)
            if case:
                case.calls.append(begun + number(returned or 0))
            return returned

        return call


# --- what is recorded ------------------------------------------------------------------------------------------------

STATIC, DYNAMIC, WEIGHT_ONLY = Recipe(method="ptsq"), Recipe(method="ptdq"), Recipe(method="woq")
BLOCKS = {"granularity": "per_group", "scheme": "affine", "group_size": 5}
RECIPES = [
    STATIC,
    Recipe(method="ptsq", activation_scheme="symmetric", output="int8", **BLOCKS),
    DYNAMIC,
    Recipe(method="ptdq", activation_granularity="per_tensor", activation_scheme="symmetric", **BLOCKS),
    WEIGHT_ONLY,
    Recipe(method="woq", **BLOCKS),
]


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.lines = nn.ConvTranspose2d(6, 34, (3, 2), 2, 1, groups=2), nn.ConvTranspose1d(34, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lines(torch.relu(self.images(x)).flatten(2))
        return result


class Wide(nn.Module):
    """Enough work in each layer for a second thread."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 40, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(40, 40, 3, 2, 1, groups=40),
            nn.ReLU(),
            nn.ConvTranspose2d(40, 33, 2, 2),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(33 * 25, 70),
            nn.Hardswish(),
            nn.Linear(70, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def _filtered() -> nn.Module:
    return nn.Sequential(nn.Conv2d(24, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 33, 3, padding=2))


def networks() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    yield "every operation", every_operation(), (normal(2, 3, 16, 16),)
    yield "encoder", seeded(Encoder), (torch.arange(26).reshape(2, 13) % 11,)
    yield "lstm", seeded(lambda: nn.LSTM(5, 18, bidirectional=True)), (normal(35, 3, 5),)
    yield "lstm of threads", seeded(lambda: nn.LSTM(90, 20)), (normal(3, 32, 90),)  # enough products a step for two
    yield "lstm of samples", seeded(lambda: nn.LSTM(7, 21)), (normal(3, 37, 7),)
    yield "lstm that starts", seeded(Started), (normal(3, 6, 5), normal(3, 7, seed=1), normal(3, 7, seed=2))
    for mask in ("each", "shared", "causal"):
        hidden = torch.where(normal(2, 9, 11, seed=3) > 0.5, -1e4, 0.0)
        yield f"attention {mask}", seeded(lambda m=mask: Attention(m)), (normal(2, 9, 12), normal(2, 11, 12), hidden)
    yield "activated", seeded(Activated), (normal(2, 4, 7, 6),)
    yield "filtered", seeded(_filtered), (normal(3, 24, 13, 10),)
    yield "transposed", seeded(Transposed), (normal(2, 6, 5, 4),)
    yield "wide", seeded(Wide), (normal(2, 3, 20, 20),)


def layers(count: int) -> Iterator[tuple[str, Program, list[Tensor]]]:
    """Static convolutions, linear layers and transposed convolutions of random shapes and extreme constants.

    Every fifth has what fills whole registers: multiples of 64 inputs, more pixels, kernels of one pixel.
    """
    for seed in range(count):
        rng = np.random.default_rng(seed)
        kind = ("conv", "linear", "conv_transpose")[seed % 3]
        groups = int(rng.choice([1, 1, 2, 17])) if kind != "linear" else 1
        inputs, outputs = (int(size) for size in rng.integers(1, 35 if groups < 3 else 3, 2))
        kernel, stride, dilation = ([int(v) for v in rng.integers(1, limit, 2)] for limit in (5, 4, 3))
        large = seed % 5 == 4
        if large:
            groups, inputs = 1, 64 * int(rng.integers(1, 3))
            kernel, stride = ([1, 1], [1, 1]) if seed % 2 else (kernel, stride)
        padding = [int(rng.integers(0, k)) for k in kernel]
        block = int(rng.integers(1, inputs + 1)) if seed % 4 == 3 else inputs
        blocks, scales = -(-inputs // block), int(rng.choice([1, groups * outputs]))
        arguments: dict[str, Any] = {
            "weight": rng.integers(-128, 128, (groups * outputs, inputs, *(kernel if kind != "linear" else []))).astype(
                np.int8
            ),
            "weight_scale": (2.0 ** -rng.integers(4, 12, (scales, blocks))).astype(np.float32),
            "weight_zero_point": rng.integers(-128, 128, (scales, blocks)).astype(np.int8) if seed % 2 else None,
            "block": block,
            "bias": rng.integers(-(10**6), 10**6, groups * outputs).astype(np.int32 if blocks == 1 else np.float32),
            "x_scale": 0.02,
            "x_zero_point": int(rng.choice([0, 128, 255])),
            "scale": [0.5, None, 0.001][int(rng.integers(3))],
            "zero_point": int(rng.integers(0, 256)),
            "q_min": 0,
            "q_max": 255,
        }
        size = [int(v) for v in (rng.integers(17, 35, 2) if large else rng.integers(9, 13, 2))]
        x = rng.choice([0, 1, 254, 255], (2, groups * inputs, *size))
        if kind == "linear":
            x = rng.choice([0, 255, 77], (int(rng.integers(1, 200 if large else 60)), inputs))
        else:
            arguments |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if kind == "conv_transpose":
            arguments["output_padding"] = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        yield f"{kind} {seed}", *op_program(kind, x, **arguments)


def record(path: Path) -> int:
    """Write the file of cases; returns how many there are. Raises AssertionError where native counts otherwise."""
    recorder = Recorder()
    for name, model, inputs in networks():
        network = capture(model, inputs)
        for recipe in RECIPES:
            recorder.network = f"{name}, {recipe.method.name} {recipe.granularity.name}"
            _record(recorder, quantize_network(network, recipe, [inputs]).program, inputs)
    for recorder.network, program, inputs in layers(60):
        _record(recorder, program, tuple(inputs))
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -0.0, 1e-45, 0.5, 1.5] * 5)
    recorder.network = "odd values"
    _record(recorder, op_program("quantize", odd, scale=1.0, zero_point=3, q_min=1, q_max=200)[0], (odd,))
    by_hand(recorder)
    path.write_bytes(many([case.written() for case in recorder.cases]))
    return len(recorder.cases)


def by_hand(recorder: Recorder) -> None:
    """What no network calls: a max pool of a huge kernel; strided copies of elements of each size, a fill, rows."""
    x, y = (torch.arange(count, dtype=torch.uint8) for count in (2 * 4 * 5 * 3, 2 * 5 * 6 * 3))
    window = Window(4, 5, 3, 5, 6, 2**30, 2**30, 1, 1, 2**29, 2**29, 1, 1, 3)
    want = x.reshape(2, 20, 3).amax(1, keepdim=True).expand(2, 30, 3).reshape(-1)
    recorder.noted("a huge kernel", "qb_max_pool", y, want, x, byref(window), 2, y)
    for dtype in (torch.uint8, torch.float32, torch.int64):
        whole = (50 * normal(5, 3, 4, 6)).to(dtype)
        for x in (whole, whole.permute(0, 2, 3, 1), whole[1:, ::2, :, 3], whole.mT[:, 1], whole[0, 0, 0, 0]):
            y = torch.empty(x.shape, dtype=dtype)
            steps = [torch.tensor([*values, 0]) for values in (x.stride(), y.stride(), x.shape)]
            recorder.noted("copy", "qb_copy", y, x, x, steps[0], y, steps[1], steps[2], x.dim(), x.element_size())
    y = torch.empty(77, dtype=torch.uint8)
    recorder.noted("fill", "qb_fill", y, torch.full_like(y, 3), y, len(y), 3)
    table, indices = normal(7, 5), torch.tensor([6, 0, 3, 3])
    y = torch.empty(4, 5)
    recorder.noted("rows", "qb_rows", y, table[indices], table, 7, 20, indices, 4, y)


def _record(recorder: Recorder, program: Program, inputs: tuple[Tensor, ...]) -> None:
    with recorder.listening():
        program.lower(recorder, Macs())(*inputs)
