"""A program as one list of engine calls, written down once for each shape of its inputs and replayed in one C call.

Python runs the lowered program with a stand-in for the engine that notes calls and executes none, so memory of the
intermediate results is never touched. Then each of them gets a place in one arena, where results that are not needed at
the same time lie over each other. A program that computes with torch between the kernels is not planned: it runs as it is.
"""

from __future__ import annotations

import bisect
import ctypes
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.native.library import SIGNATURES, loaded_library, written_down

if TYPE_CHECKING:
    from qbench.program import Macs

aten = torch.ops.aten
ALIGNMENT = 64
PLANS = 4  # shapes of inputs that a model keeps plans of
NOTHING, INT8_PRODUCTS, FLOAT32_PRODUCTS, FAILURE = range(4)  # qb::Counting
COUNTINGS = {
    "qb_layer": INT8_PRODUCTS,
    "qb_depthwise": INT8_PRODUCTS,
    "qb_transposed": INT8_PRODUCTS,
    "qb_lstm": INT8_PRODUCTS,
    "qb_dynamic_lstm": INT8_PRODUCTS,
    "qb_attention": INT8_PRODUCTS,
    "qb_probabilities": INT8_PRODUCTS,
    "qb_weighted_values": INT8_PRODUCTS,
    "qb_weight_only": FLOAT32_PRODUCTS,
    "qb_weight_only_lstm": FLOAT32_PRODUCTS,
    "qb_quantize_rows": FAILURE,
    "qb_rows": FAILURE,
}


class CannotPlanError(Exception):
    """The program does something between the kernels that a list of engine calls does not hold."""


@dataclass
class _Buffer:
    """The memory of one input, intermediate result or output; first and last are the calls that touch it."""

    storage: torch.UntypedStorage
    first: int = -1
    last: int = -1
    outside: bool = False  # an input or an output: not in the arena
    place: int = 0

    @property
    def size(self) -> int:
        return max(self.storage.nbytes(), 1)


@dataclass(frozen=True)
class _Address:
    """A pointer into a buffer."""

    buffer: int
    offset: int


@dataclass
class _Call:
    """A function and its arguments: words as they are, addresses, or structures with addresses inside."""

    function: str
    arguments: list[Any] = field(default_factory=list)


@dataclass
class _Structure:
    """A copy of a ctypes structure whose pointers at these byte offsets are addresses in buffers."""

    copy: Any
    pointers: dict[int, _Address]


class _Writer(TorchDispatchMode):
    """Stands in for the engine (its functions by name) and for torch's allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.buffers: list[_Buffer] = []
        self.held: list[Any] = []  # constants and structures that the calls point to
        self._starts: list[int] = []
        self._by_start: list[int] = []

    # --- memory

    def buffer(self, tensor: Tensor) -> Tensor:
        """Note a new tensor's memory; it is held until the plan is made."""
        storage = tensor.untyped_storage()
        index = bisect.bisect_left(self._starts, storage.data_ptr())
        self._starts.insert(index, storage.data_ptr())
        self._by_start.insert(index, len(self.buffers))
        self.buffers.append(_Buffer(storage))
        return tensor

    def address(self, value: int) -> _Address | None:
        """The buffer that a pointer lies in."""
        index = bisect.bisect_right(self._starts, value) - 1
        if index < 0:
            return None
        number = self._by_start[index]
        offset = value - self._starts[index]
        return _Address(number, offset) if offset < self.buffers[number].size else None

    def holds(self, value: Any) -> bool:
        """Is it a tensor in a buffer?"""
        return isinstance(value, Tensor) and self.address(value.untyped_storage().data_ptr()) is not None

    # --- the engine

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in SIGNATURES:
            raise AttributeError(name)
        if not loaded_library().qb_caller(name.encode()):  # sizes, packing: not part of a run
            found: Callable[..., int] = getattr(loaded_library(), name)
            return found
        kinds = SIGNATURES[name][1]

        def call(*values: Any) -> int:
            self.calls.append(_Call(name, [self._argument(v, k) for v, k in zip(values, kinds, strict=True)]))
            return 0

        return call

    def _argument(self, value: Any, kind: Any) -> Any:
        if kind is ctypes.c_void_p:
            return self._pointer(value)
        if hasattr(value, "_obj"):  # byref(a structure)
            return self._structure(value._obj)
        code = {ctypes.c_float: "f", ctypes.c_double: "d"}.get(kind, "q")
        return int.from_bytes(struct.pack(code, value).ljust(8, b"\0"), "little")

    def _pointer(self, value: int | None) -> int | _Address:
        return 0 if not value else self.address(value) or value

    def _structure(self, value: Any) -> Any:
        pointers = dict(self._pointers(value, 0))
        if not pointers:
            self.held.append(value)
            return ctypes.addressof(value)
        return _Structure(type(value).from_buffer_copy(value), pointers)

    def _pointers(self, value: Any, start: int) -> list[tuple[int, _Address]]:
        found: list[tuple[int, _Address]] = []
        for name, kind in value._fields_:
            offset = start + getattr(type(value), name).offset
            if issubclass(kind, ctypes.Structure):
                found += self._pointers(getattr(value, name), offset)
            elif kind is ctypes.c_void_p and isinstance(to := self._pointer(getattr(value, name)), _Address):
                found.append((offset, to))
        return found

    # --- torch

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (aten.empty.memory_format, aten.empty_like.default):
            return self.buffer(function(*args, **kwargs))
        if function in (aten.zeros.default, aten.full.default):
            return self._filled(function, args, kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(self.holds(leaf) for leaf in leaves):
            result = function(*args, **kwargs)  # of constants alone
            self.held.append(result)
            return result
        if function in COPIES:
            return COPIES[function](self, *args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            result = function(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and not self.holds(leaf):
                raise CannotPlanError(str(function))
        if function._schema.is_mutable:
            raise CannotPlanError(str(function))
        return result

    def _filled(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        value = args[1] if function is aten.full.default else 0
        dtype = kwargs.get("dtype") or torch.float32
        tensor = self.buffer(torch.empty(args[0], dtype=dtype))
        if value and tensor.element_size() > 1:
            raise CannotPlanError(str(function))
        self.calls.append(_Call("qb_fill", [self._pointer(tensor.data_ptr()), tensor.nbytes, int(value)]))
        return tensor

    def copy(self, x: Tensor, y: Tensor) -> Tensor:
        """Write down a copy of x into y, both of one dtype."""
        if x.dtype != y.dtype or x.element_size() not in (1, 4, 8):
            raise CannotPlanError("a copy that converts")
        x = x.expand(y.shape)
        words = [(ctypes.c_int64 * max(y.dim(), 1))(*values) for values in (x.stride(), y.stride(), y.shape)]
        self.held += words
        x_strides, y_strides, sizes = (ctypes.addressof(word) for word in words)
        source, target = self._pointer(x.data_ptr()), self._pointer(y.data_ptr())
        if y.numel():
            self.calls.append(
                _Call("qb_copy", [source, x_strides, target, y_strides, sizes, y.dim(), y.element_size()])
            )
        return y

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return self.buffer(torch.empty(list(shape), dtype=like.dtype))


def _contiguous(writer: _Writer, x: Tensor, memory_format: Any = torch.contiguous_format) -> Tensor:
    if memory_format != torch.contiguous_format:
        raise CannotPlanError("another memory format")
    return x if x.is_contiguous() else writer.copy(x, writer.empty(x.shape, x))


def _clone(writer: _Writer, x: Tensor, memory_format: Any = None) -> Tensor:
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        raise CannotPlanError("another memory format")
    return writer.copy(x, writer.empty(x.shape, x))


def _reshape(writer: _Writer, x: Tensor, shape: Sequence[int]) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        try:
            return x.view(shape)
        except RuntimeError:
            pass
    y = _contiguous(writer, x)
    with torch.utils._python_dispatch._disable_current_modes():
        return y.view(shape)


def _cat(writer: _Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    if len({x.dtype for x in tensors}) > 1:
        raise CannotPlanError("a cat that converts")
    tensors = [x for x in tensors if x.dim() > 1 or x.numel()]
    dim %= tensors[0].dim()
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    y, start = writer.empty(shape, tensors[0]), 0
    for x in tensors:
        with torch.utils._python_dispatch._disable_current_modes():
            part = y.narrow(dim, start, x.shape[dim])
        writer.copy(x, part)
        start += x.shape[dim]
    return y


def _copy(writer: _Writer, y: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    return writer.copy(x, y)


COPIES: dict[Any, Callable[..., Tensor]] = {
    aten.contiguous.default: _contiguous,
    aten.clone.default: _clone,
    aten.reshape.default: _reshape,
    aten.cat.default: _cat,
    aten.copy_.default: _copy,
}


class Plan:
    """The calls of a program for inputs of these shapes. Of use to one thread at a time."""

    def __init__(self, lowered: Callable[..., Any], leaves: list[Tensor]) -> None:
        """Raises CannotPlanError, and whatever the program raises for inputs that do not fit."""
        writer = _Writer()
        inputs = [writer.buffer(torch.empty(leaf.shape, dtype=leaf.dtype)) for leaf in leaves]
        with torch.inference_mode(), writer, written_down(writer):
            outputs = list(lowered(*inputs))
        if not all(writer.holds(output) for output in outputs):
            raise CannotPlanError("a result that is no tensor of the run")
        self._held = writer.held
        self._inputs = [self._outside(writer, tensor) for tensor in inputs]
        if set(self._inputs) & {self._outside(writer, output) for output in outputs}:
            raise CannotPlanError("an input is returned")
        self._outputs = [
            (self._outside(writer, output), output.dtype, output.shape, output.stride(), output.storage_offset())
            for output in outputs
        ]
        self._sizes = {number: writer.buffers[number].size for number, *_ in self._outputs}
        for index, call in enumerate(writer.calls):
            for address in _addresses(call):
                buffer = writer.buffers[address.buffer]
                buffer.first = index if buffer.first < 0 else buffer.first
                buffer.last = index
        self._arena = torch.empty(_place(writer.buffers) + ALIGNMENT, dtype=torch.uint8)
        self._slots: dict[int, list[tuple[ctypes.c_uint64, int]]] = {
            number: [] for number, buffer in enumerate(writer.buffers) if buffer.outside
        }
        self._write(writer)
        self._macs = (ctypes.c_int64 * 2)()
        self._run = loaded_library().qb_run
        self._count = len(writer.calls)

    def _outside(self, writer: _Writer, tensor: Tensor) -> int:
        address = writer.address(tensor.untyped_storage().data_ptr())
        assert address is not None
        writer.buffers[address.buffer].outside = True
        return address.buffer

    def _write(self, writer: _Writer) -> None:
        """The words of all calls, with the places of inputs and outputs noted."""
        base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        words: list[int] = []
        open_words: list[tuple[int, _Address]] = []
        for call in writer.calls:
            caller = loaded_library().qb_caller(call.function.encode())
            words += [caller, COUNTINGS.get(call.function, NOTHING), len(call.arguments)]
            for value in call.arguments:
                if isinstance(value, _Structure):
                    self._held.append(value.copy)
                    for offset, address in value.pointers.items():
                        self._point(writer, ctypes.c_uint64.from_buffer(value.copy, offset), address, base)
                    value = ctypes.addressof(value.copy)
                if isinstance(value, _Address):
                    open_words.append((len(words), value))
                    value = 0
                words.append(value & (2**64 - 1))
        self._words = (ctypes.c_uint64 * max(len(words), 1))(*words)
        for index, address in open_words:
            self._point(writer, ctypes.c_uint64.from_buffer(self._words, 8 * index), address, base)

    def _point(self, writer: _Writer, slot: ctypes.c_uint64, address: _Address, base: int) -> None:
        if writer.buffers[address.buffer].outside:
            self._slots[address.buffer].append((slot, address.offset))
        else:
            slot.value = base + writer.buffers[address.buffer].place + address.offset

    def run(self, leaves: list[Tensor], macs: Macs) -> list[Tensor] | None:
        """The results as new tensors; None where a call failed."""
        given = [leaf.contiguous() for leaf in leaves]
        for number, leaf in zip(self._inputs, given, strict=True):
            self._set(number, leaf)
        memories = {number: torch.empty(size, dtype=torch.uint8) for number, size in self._sizes.items()}
        for number, memory in memories.items():
            self._set(number, memory)
        self._macs[0] = self._macs[1] = 0
        if self._run(ctypes.addressof(self._words), self._count, ctypes.addressof(self._macs)):
            return None
        macs.int8 += self._macs[0]
        macs.float32 += self._macs[1]
        return [
            memories[number][: memories[number].numel() // dtype.itemsize * dtype.itemsize]
            .view(dtype)
            .as_strided(shape, stride, offset)
            for number, dtype, shape, stride, offset in self._outputs
        ]

    def _set(self, number: int, tensor: Tensor) -> None:
        start = tensor.data_ptr()
        for slot, offset in self._slots[number]:
            slot.value = start + offset


def _addresses(call: _Call) -> list[_Address]:
    found: list[_Address] = []
    for value in call.arguments:
        found += list(value.pointers.values()) if isinstance(value, _Structure) else []
        found += [value] if isinstance(value, _Address) else []
    return found


def _place(buffers: list[_Buffer]) -> int:
    """Place buffers in an arena, the largest first, each at the lowest free place; returns the arena's size in bytes."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=operator.attrgetter("size"), reverse=True):
        if buffer.outside or buffer.first < 0:
            continue
        place = 0
        for other in sorted(placed, key=operator.attrgetter("place")):
            together = other.first <= buffer.last and buffer.first <= other.last
            if together and place < other.place + _room(other) and other.place < place + _room(buffer):
                place = other.place + _room(other)
        buffer.place = place
        placed.append(buffer)
    return max((buffer.place + _room(buffer) for buffer in placed), default=0)


def _room(buffer: _Buffer) -> int:
    return -(-buffer.size // ALIGNMENT) * ALIGNMENT


class Planned:
    """A lowered program that is replayed where it can be. Several threads may call it."""

    def __init__(self, lowered: Callable[..., Any], macs: Macs) -> None:
        self.lowered, self.macs = lowered, macs
        self._idle: dict[Any, list[Plan]] = {}
        self._unplannable = False

    def __call__(self, *leaves: Tensor) -> Any:
        """The results. Raises what the program raises."""
        if self._unplannable:
            return self.lowered(*leaves)
        shapes = tuple(leaf.shape for leaf in leaves)
        idle = self._idle.setdefault(shapes, [])
        try:
            plan = idle.pop() if idle else Plan(self.lowered, list(leaves))
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
