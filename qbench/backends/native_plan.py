"""A program as one list of engine calls, written down once for each shape of its inputs and replayed in one C call.

Python runs the lowered program with a stand-in for the engine that notes calls and executes none, so memory of the
intermediate results is never touched. Then each of them gets a place in one arena, where results that are not needed at
the same time lie over each other. What torch computes between the kernels is called as before, between two stretches of
the list, and leaves its result in the arena too.
"""

from __future__ import annotations

import bisect
import ctypes
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    "qb_weight_only_transposed": FLOAT32_PRODUCTS,
    "qb_weight_only_depthwise": FLOAT32_PRODUCTS,
    "qb_weight_only_lstm": FLOAT32_PRODUCTS,
    "qb_quantize_rows": FAILURE,
    "qb_rows": FAILURE,
}


class CannotPlanError(Exception):
    """The program does something between the kernels that cannot be written down."""


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


@dataclass(frozen=True)
class _View:
    """A tensor in a buffer."""

    buffer: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements

    def of(self, memory: Tensor) -> Tensor:
        """The tensor in the memory of its buffer (bytes)."""
        whole = memory.numel() // self.dtype.itemsize * self.dtype.itemsize
        elements = memory[:whole].view(self.dtype)
        return elements.as_strided(self.shape, self.stride, elements.storage_offset() + self.offset)


@dataclass
class _TorchCall:
    """An operation of torch: arguments and results with views in the place of tensors in buffers."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[_View]


@dataclass
class _Structure:
    """A copy of a ctypes structure whose pointers at these byte offsets are addresses in buffers."""

    copy: Any
    pointers: dict[int, _Address]


class _Writer(TorchDispatchMode):
    """Stands in for the engine (its functions by name) and for torch's allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call | _TorchCall] = []
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
        if function._schema.is_mutable:
            raise CannotPlanError(str(function))
        if function.is_view or function in VIEWS:
            with _plain_torch():
                result = function(*args, **kwargs)
            given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
            got = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            if all(leaf.untyped_storage().data_ptr() in given for leaf in got):
                return result  # aten.to may be a view, or not
        return self._computed(function, args, kwargs)

    def _computed(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Note an operation of torch; its result is not computed, its shape is."""
        with _plain_torch():
            try:
                meta = function(*pytree.tree_map(_as_meta, args), **pytree.tree_map(_as_meta, kwargs))
            except (NotImplementedError, RuntimeError) as error:
                raise CannotPlanError(str(function)) from error
            results = pytree.tree_map(_like_meta, meta)
        leaves = pytree.tree_leaves(results)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise CannotPlanError(str(function))
        for leaf in leaves:
            self.buffer(leaf)
        given = (pytree.tree_map(self.view, args), pytree.tree_map(self.view, kwargs))
        self.calls.append(_TorchCall(function, *given, [self.view(leaf) for leaf in leaves]))
        return results

    def view(self, value: Any) -> Any:
        """A tensor in a buffer as a view of it; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        address = self.address(value.untyped_storage().data_ptr())
        if address is None:
            self.held.append(value)
            return value
        return _View(address.buffer, value.dtype, value.shape, value.stride(), int(value.storage_offset()))

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
    with _plain_torch():
        try:
            return x.view(shape)
        except RuntimeError:
            pass
    y = _contiguous(writer, x)
    with _plain_torch():
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
        with _plain_torch():
            part = y.narrow(dim, start, x.shape[dim])
        writer.copy(x, part)
        start += x.shape[dim]
    return y


def _copy(writer: _Writer, y: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    return writer.copy(x, y)


def _as_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _like_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _plain_torch() -> Any:
    return torch.utils._python_dispatch._disable_current_modes()


VIEWS = {  # composite ones, or not marked as such
    aten.sym_size.int,
    aten.reshape.default,
    aten.broadcast_tensors.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.movedim.int,
    aten.unflatten.int,
    aten.chunk.default,
    aten.narrow.default,
    aten.contiguous.default,
}
COPIES: dict[Any, Callable[..., Tensor]] = {
    aten.contiguous.default: _contiguous,
    aten.clone.default: _clone,
    aten.reshape.default: _reshape,
    aten.cat.default: _cat,
    aten.copy_.default: _copy,
}


class Plan:
    """The calls of a program for inputs of these shapes. Of use to one thread at a time."""

    def __init__(self, lowered: Callable[..., Any], leaves: list[Tensor], macs: Macs) -> None:
        """Raises CannotPlanError, and whatever the program raises for inputs that do not fit."""
        writer = _Writer()
        counted = macs.int8, macs.float32
        inputs = [writer.buffer(torch.empty(leaf.shape, dtype=leaf.dtype)) for leaf in leaves]
        with torch.inference_mode(), writer, written_down(writer):
            outputs = list(lowered(*inputs))
        self._of_torch = macs.int8 - counted[0], macs.float32 - counted[1]  # counted outside the engine
        macs.int8, macs.float32 = counted
        if not all(writer.holds(output) for output in outputs):
            raise CannotPlanError("a result that is no tensor of the run")
        self._held = writer.held
        self._inputs = [self._outside(writer, tensor) for tensor in inputs]
        if set(self._inputs) & {self._outside(writer, output) for output in outputs}:
            raise CannotPlanError("an input is returned")
        for output in outputs:
            self._outside(writer, output)
        self._outputs = [writer.view(output) for output in outputs]
        self._sizes = {view.buffer: writer.buffers[view.buffer].size for view in self._outputs}
        for index, call in enumerate(writer.calls):
            for address in _addresses(call):
                buffer = writer.buffers[address.buffer]
                buffer.first = index if buffer.first < 0 else buffer.first
                buffer.last = index
        self._arena = torch.empty(_place(writer.buffers) + ALIGNMENT, dtype=torch.uint8)
        self._slots: dict[int, list[tuple[ctypes.c_uint64, int]]] = {
            number: [] for number, buffer in enumerate(writer.buffers) if buffer.outside
        }
        self._macs = (ctypes.c_int64 * 2)()
        self._run = loaded_library().qb_run
        self._steps = self._written(writer)

    def _outside(self, writer: _Writer, tensor: Tensor) -> int:
        address = writer.address(tensor.untyped_storage().data_ptr())
        assert address is not None
        writer.buffers[address.buffer].outside = True
        return address.buffer

    def _written(self, writer: _Writer) -> list[tuple[Any, int] | _TorchCall]:
        """Stretches of engine calls, as words and their number, and what torch computes between them."""
        base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        steps: list[tuple[Any, int] | _TorchCall] = []
        stretch: list[_Call] = []
        for call in [*writer.calls, None]:
            if isinstance(call, _Call):
                stretch.append(call)
                continue
            if stretch:
                steps.append((self._words(writer, stretch, base), len(stretch)))
                stretch = []
            if call is not None:
                in_arena = partial(self._in_arena, writer, base - self._arena.data_ptr())
                arguments, options = (pytree.tree_map(in_arena, given) for given in (call.arguments, call.options))
                results = [in_arena(view) for view in call.results]
                steps.append(_TorchCall(call.function, arguments, options, results))
        return steps

    def _in_arena(self, writer: _Writer, start: int, value: Any) -> Any:
        """A view into the arena as a tensor; one of an input or an output is made anew in each run."""
        if not isinstance(value, _View) or writer.buffers[value.buffer].outside:
            return value
        buffer = writer.buffers[value.buffer]
        return value.of(self._arena[start + buffer.place :][: buffer.size])

    def _words(self, writer: _Writer, calls: list[_Call], base: int) -> Any:
        """The words of calls, with the places of inputs and outputs noted."""
        words: list[int] = []
        open_words: list[tuple[int, _Address]] = []
        for call in calls:
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
        held = (ctypes.c_uint64 * len(words))(*words)
        for index, address in open_words:
            self._point(writer, ctypes.c_uint64.from_buffer(held, 8 * index), address, base)
        return held

    def _point(self, writer: _Writer, slot: ctypes.c_uint64, address: _Address, base: int) -> None:
        if writer.buffers[address.buffer].outside:
            self._slots[address.buffer].append((slot, address.offset))
        else:
            slot.value = base + writer.buffers[address.buffer].place + address.offset

    def run(self, leaves: list[Tensor], macs: Macs) -> list[Tensor] | None:
        """The results as new tensors; None where a call failed."""
        memories = {number: torch.empty(size, dtype=torch.uint8) for number, size in self._sizes.items()}
        for number, leaf in zip(self._inputs, leaves, strict=True):
            leaf = leaf.contiguous()
            memories[number] = (
                leaf.detach().flatten().view(torch.uint8) if leaf.numel() else torch.empty(0, dtype=torch.uint8)
            )
        for number, memory in memories.items():
            for slot, offset in self._slots[number]:
                slot.value = memory.data_ptr() + offset
        self._macs[0], self._macs[1] = self._of_torch
        for step in self._steps:
            if isinstance(step, _TorchCall):
                try:
                    _compute(step, memories)
                except (IndexError, RuntimeError):  # the plain run, which follows, raises it in words
                    return None
            elif self._run(ctypes.addressof(step[0]), step[1], ctypes.addressof(self._macs)):
                return None
        macs.int8 += self._macs[0]
        macs.float32 += self._macs[1]
        return [view.of(memories[view.buffer]) for view in self._outputs]


def _compute(call: _TorchCall, memories: dict[int, Tensor]) -> None:
    """Run an operation of torch, its results into their places."""

    def tensor(value: Any) -> Any:
        return value.of(memories[value.buffer]) if isinstance(value, _View) else value

    arguments, options = (pytree.tree_map(tensor, given) for given in (call.arguments, call.options))
    places = [tensor(view) for view in call.results]
    if len(places) == 1 and _takes_out(call):
        call.function.overloadpacket.out(*arguments, **options, out=places[0])
        return
    results = pytree.tree_leaves(call.function(*arguments, **options))
    for place, result in zip(places, results, strict=True):
        place.copy_(result)


def _takes_out(call: _TorchCall) -> bool:
    """Is there a form of the operation that writes to a given tensor, for these very arguments?"""
    packet = call.function.overloadpacket
    if "out" not in packet.overloads() or call.results[0].dtype == torch.bfloat16:  # these round elsewhere
        return False
    names = {argument.name for argument in packet.out._schema.arguments}
    ours = [argument.name for argument in call.function._schema.arguments[: len(call.arguments)]]
    return names.issuperset([*ours, *call.options])


def _addresses(call: _Call | _TorchCall) -> list[_Address]:
    found: list[_Address] = []
    if isinstance(call, _TorchCall):
        views = pytree.tree_leaves((call.arguments, call.options, call.results))
        return [_Address(view.buffer, 0) for view in views if isinstance(view, _View)]
    for value in call.arguments:
        found += list(value.pointers.values()) if isinstance(value, _Structure) else []
        found += [value] if isinstance(value, _Address) else []
    return found


def _place(buffers: list[_Buffer]) -> int:
    """Place buffers in an arena, the largest first, each at the lowest free place; returns its size in bytes."""
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
            plan = idle.pop() if idle else Plan(self.lowered, list(leaves), self.macs)
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
