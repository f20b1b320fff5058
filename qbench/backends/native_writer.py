"""Writes a run down: stands in for the engine and for torch's allocations, notes calls and executes none."""

from __future__ import annotations

import bisect
import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.native.library import SIGNATURES, loaded_library

aten = torch.ops.aten


class CannotPlanError(Exception):
    """The program does something between the kernels that cannot be written down."""


@dataclass
class Buffer:
    """The memory of one input, intermediate result or output; first and last are the calls that touch it."""

    storage: torch.UntypedStorage
    first: int = -1
    last: int = -1
    outside: bool = False  # an input or an output: not in the arena
    place: int = 0
    over: Buffer | None = None  # which it lies over: written as that is read for the last time

    @property
    def size(self) -> int:
        return max(self.storage.nbytes(), 1)


@dataclass(frozen=True)
class Address:
    """A pointer into a buffer."""

    buffer: int
    offset: int


@dataclass
class Call:
    """A function and its arguments: words as they are, addresses, or structures with addresses inside."""

    function: str
    arguments: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A tensor in a buffer."""

    buffer: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements

    def fills(self, size: int) -> bool:
        """Is it all of a buffer of so many bytes, in order?"""
        in_order = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return not self.offset and self.stride == in_order.stride() and in_order.nbytes == size

    def of(self, memory: Tensor) -> Tensor:
        """The tensor in the memory of its buffer, a contiguous tensor."""
        memory = memory.detach().flatten().view(torch.uint8) if memory.numel() else torch.empty(0, dtype=torch.uint8)
        whole = memory.numel() // self.dtype.itemsize * self.dtype.itemsize
        elements = memory[:whole].view(self.dtype)
        return elements.as_strided(self.shape, self.stride, elements.storage_offset() + self.offset)


@dataclass
class TorchCall:
    """An operation of torch: arguments and results with views in the place of tensors in buffers."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[View]


@dataclass
class Structure:
    """A copy of a ctypes structure whose pointers at these byte offsets are addresses in buffers."""

    copy: Any
    pointers: dict[int, Address]


class Writer(TorchDispatchMode):
    """Stands in for the engine (its functions by name) and for torch's allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call | TorchCall] = []
        self.buffers: list[Buffer] = []
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
        self.buffers.append(Buffer(storage))
        return tensor

    def address(self, value: int) -> Address | None:
        """The buffer that a pointer lies in."""
        index = bisect.bisect_right(self._starts, value) - 1
        if index < 0:
            return None
        number = self._by_start[index]
        offset = value - self._starts[index]
        return Address(number, offset) if offset < self.buffers[number].size else None

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
            self.calls.append(Call(name, [self._argument(v, k) for v, k in zip(values, kinds, strict=True)]))
            return 0

        return call

    def _argument(self, value: Any, kind: Any) -> Any:
        if kind is ctypes.c_void_p:
            return self._pointer(value)
        if hasattr(value, "_obj"):  # byref(a structure)
            return self._structure(value._obj)
        code = {ctypes.c_float: "f", ctypes.c_double: "d"}.get(kind, "q")
        return int.from_bytes(struct.pack(code, value).ljust(8, b"\0"), "little")

    def _pointer(self, value: int | None) -> int | Address:
        return 0 if not value else self.address(value) or value

    def _structure(self, value: Any) -> Any:
        pointers = dict(self._pointers(value, 0))
        if not pointers:
            self.held.append(value)
            return ctypes.addressof(value)
        return Structure(type(value).from_buffer_copy(value), pointers)

    def _pointers(self, value: Any, start: int) -> list[tuple[int, Address]]:
        found: list[tuple[int, Address]] = []
        for name, kind in value._fields_:
            offset = start + getattr(type(value), name).offset
            if issubclass(kind, ctypes.Structure):
                found += self._pointers(getattr(value, name), offset)
            elif kind is ctypes.c_void_p and isinstance(to := self._pointer(getattr(value, name)), Address):
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
            with plain_torch():
                result = function(*args, **kwargs)
            given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
            got = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            if all(leaf.untyped_storage().data_ptr() in given for leaf in got):
                return result  # aten.to may be a view, or not
        return self._computed(function, args, kwargs)

    def _computed(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Note an operation of torch; its result is not computed, its shape is."""
        with plain_torch():
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
        self.calls.append(TorchCall(function, *given, [self.view(leaf) for leaf in leaves]))
        return results

    def view(self, value: Any) -> Any:
        """A tensor in a buffer as a view of it; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        address = self.address(value.untyped_storage().data_ptr())
        if address is None:
            self.held.append(value)
            return value
        return View(address.buffer, value.dtype, value.shape, value.stride(), int(value.storage_offset()))

    def _filled(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        value = args[1] if function is aten.full.default else 0
        dtype = kwargs.get("dtype") or torch.float32
        tensor = self.buffer(torch.empty(args[0], dtype=dtype))
        if value and tensor.element_size() > 1:
            raise CannotPlanError(str(function))
        self.calls.append(Call("qb_fill", [self._pointer(tensor.data_ptr()), tensor.nbytes, int(value)]))
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
            self.calls.append(Call("qb_copy", [source, x_strides, target, y_strides, sizes, y.dim(), y.element_size()]))
        return y

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return self.buffer(torch.empty(list(shape), dtype=like.dtype))


def _contiguous(writer: Writer, x: Tensor, memory_format: Any = torch.contiguous_format) -> Tensor:
    if memory_format != torch.contiguous_format:
        raise CannotPlanError("another memory format")
    return x if x.is_contiguous() else writer.copy(x, writer.empty(x.shape, x))


def _clone(writer: Writer, x: Tensor, memory_format: Any = None) -> Tensor:
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        raise CannotPlanError("another memory format")
    return writer.copy(x, writer.empty(x.shape, x))


def _reshape(writer: Writer, x: Tensor, shape: Sequence[int]) -> Tensor:
    with plain_torch():
        try:
            return x.view(shape)
        except RuntimeError:
            pass
    y = _contiguous(writer, x)
    with plain_torch():
        return y.view(shape)


def _cat(writer: Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    if len({x.dtype for x in tensors}) > 1:
        raise CannotPlanError("a cat that converts")
    tensors = [x for x in tensors if x.dim() > 1 or x.numel()]
    dim %= tensors[0].dim()
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    y, start = writer.empty(shape, tensors[0]), 0
    for x in tensors:
        with plain_torch():
            part = y.narrow(dim, start, x.shape[dim])
        writer.copy(x, part)
        start += x.shape[dim]
    return y


def _copy(writer: Writer, y: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    return writer.copy(x, y)


def _as_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _like_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def plain_torch() -> Any:
    """Within, nothing is noted: torch computes."""
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
