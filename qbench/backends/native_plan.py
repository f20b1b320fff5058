"""A program as one list of engine calls, written down once for each shape of its inputs and replayed in one C call.

Python runs the lowered program with a stand-in for the engine that notes calls and executes none, so memory of the
intermediate results is never touched. Then each of them gets a place in one arena, where results that are not needed at
the same time lie over each other. What torch computes between the kernels is called as before, between two stretches of
the list, and leaves its result in the arena too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qbench.backends.native_writer import Address, Buffer, Call, CannotPlanError, Structure, TorchCall, View, Writer
from qbench.native.library import loaded_library, written_down

if TYPE_CHECKING:
    from qbench.program import Macs

ALIGNMENT = 64
NOTHING, INT8_PRODUCTS, FLOAT32_PRODUCTS, FAILURE = range(4)  # qb::Counting
COUNTINGS = {
    "qb_layer": INT8_PRODUCTS,
    "qb_depthwise": INT8_PRODUCTS,
    "qb_winograd": INT8_PRODUCTS,
    "qb_transposed": INT8_PRODUCTS,
    "qb_lstm": INT8_PRODUCTS,
    "qb_dynamic_lstm": INT8_PRODUCTS,
    "qb_attention": INT8_PRODUCTS,
    "qb_dynamic_attention": INT8_PRODUCTS,
    "qb_probabilities": INT8_PRODUCTS,
    "qb_weighted_values": INT8_PRODUCTS,
    "qb_weight_only": FLOAT32_PRODUCTS,
    "qb_weight_only_transposed": FLOAT32_PRODUCTS,
    "qb_weight_only_depthwise": FLOAT32_PRODUCTS,
    "qb_weight_only_lstm": FLOAT32_PRODUCTS,
    "qb_quantize_rows": FAILURE,
    "qb_rows": FAILURE,
}


class Recording:
    """The calls of a program for inputs of these shapes, written down; their results need `arena` bytes."""

    def __init__(self, lowered: Callable[..., Any], leaves: list[Tensor], macs: Macs) -> None:
        """Raises CannotPlanError, and whatever the program raises for inputs that do not fit."""
        self.writer = writer = Writer()
        counted = macs.int8, macs.float32
        inputs = [writer.buffer(torch.empty(leaf.shape, dtype=leaf.dtype)) for leaf in leaves]
        with torch.inference_mode(), writer, written_down(writer):
            outputs = list(lowered(*inputs))
        self.uncounted = macs.int8 - counted[0], macs.float32 - counted[1]  # products that no engine call counts
        macs.int8, macs.float32 = counted
        if not all(writer.holds(output) for output in outputs):
            raise CannotPlanError("a result that is no tensor of the run")
        self.inputs = [self._outside(tensor) for tensor in inputs]
        if set(self.inputs) & {self._outside(output) for output in outputs}:
            raise CannotPlanError("an input is returned")
        self.outputs = [writer.view(output) for output in outputs]
        for index, call in enumerate(writer.calls):
            for address in _addresses(call):
                buffer = writer.buffers[address.buffer]
                buffer.first = index if buffer.first < 0 else buffer.first
                buffer.last = index
        _share(writer.calls, writer.buffers)
        self.arena = _place(writer.buffers)

    def _outside(self, tensor: Tensor) -> int:
        address = self.writer.address(tensor.untyped_storage().data_ptr())
        assert address is not None
        self.writer.buffers[address.buffer].outside = True
        return address.buffer


class Ends:
    """The memory of a run's inputs and results.

    It is made with few calls of torch: after a network's kernels the caches hold none of its code.
    """

    def __init__(self, recording: Recording) -> None:
        self._inputs, self._outputs = recording.inputs, recording.outputs
        sizes = {view.buffer: recording.writer.buffers[view.buffer].size for view in self._outputs}
        self._made = {number: (torch.Size([size]), torch.uint8) for number, size in sizes.items()}
        self._alone = [self._outputs.count(view) == 1 and view.fills(sizes[view.buffer]) for view in self._outputs]
        for view, alone in zip(self._outputs, self._alone, strict=True):
            if alone:
                self._made[view.buffer] = view.shape, view.dtype

    def memories(self, leaves: list[Tensor]) -> dict[int, Tensor]:
        """Of each buffer that is an input or holds results."""
        memories = {number: torch.empty(shape, dtype=dtype) for number, (shape, dtype) in self._made.items()}
        for number, leaf in zip(self._inputs, leaves, strict=True):
            memories[number] = leaf.contiguous()
        return memories

    def results(self, memories: dict[int, Tensor]) -> list[Tensor]:
        """The results in them."""
        return [
            memories[view.buffer] if alone else view.of(memories[view.buffer])
            for view, alone in zip(self._outputs, self._alone, strict=True)
        ]


class Plan:
    """A recording that can be run. Of use to one thread at a time."""

    def __init__(self, recording: Recording) -> None:
        writer = recording.writer
        self._uncounted, self._ends = recording.uncounted, Ends(recording)
        self._held = writer.held
        self._arena = torch.empty(recording.arena + ALIGNMENT, dtype=torch.uint8)
        self.slots: dict[int, list[tuple[ctypes.c_uint64, int]]] = {
            number: [] for number, buffer in enumerate(writer.buffers) if buffer.outside
        }
        self._macs = (ctypes.c_int64 * 2)()
        self._run = loaded_library().qb_run
        self._steps = self._written(writer)
        self._mode = nullcontext if all(isinstance(step, tuple) for step in self._steps) else torch.inference_mode

    def _written(self, writer: Writer) -> list[tuple[Any, int] | Callable[[dict[int, Tensor]], None]]:
        """Stretches of engine calls, as words and their number, and what torch computes between them."""
        base = -(-self._arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        steps: list[tuple[Any, int] | Callable[[dict[int, Tensor]], None]] = []
        stretch: list[Call] = []
        for call in [*writer.calls, None]:
            if isinstance(call, Call):
                stretch.append(call)
                continue
            if stretch:
                steps.append((self._words(writer, stretch, base), len(stretch)))
                stretch = []
            if call is not None:
                in_arena = partial(self._in_arena, writer, base - self._arena.data_ptr())
                arguments, options = (pytree.tree_map(in_arena, given) for given in (call.arguments, call.options))
                results = [in_arena(view) for view in call.results]
                steps.append(_computing(TorchCall(call.function, arguments, options, results)))
        return steps

    def stretch(self) -> tuple[Any, int]:
        """The words and the number of the calls, where torch computes nothing between them."""
        (step,) = self._steps
        assert isinstance(step, tuple)
        return step

    def _in_arena(self, writer: Writer, start: int, value: Any) -> Any:
        """A view into the arena as a tensor; one of an input or an output is made anew in each run."""
        if not isinstance(value, View) or writer.buffers[value.buffer].outside:
            return value
        buffer = writer.buffers[value.buffer]
        return value.of(self._arena[start + buffer.place :][: buffer.size])

    def _words(self, writer: Writer, calls: list[Call], base: int) -> Any:
        """The words of calls, with the places of inputs and outputs noted."""
        words: list[int] = []
        open_words: list[tuple[int, Address]] = []
        for call in calls:
            caller = loaded_library().qb_caller(call.function.encode())
            words += [caller, COUNTINGS.get(call.function, NOTHING), len(call.arguments)]
            for value in call.arguments:
                if isinstance(value, Structure):
                    self._held.append(value.copy)
                    for offset, address in value.pointers.items():
                        self._point(writer, ctypes.c_uint64.from_buffer(value.copy, offset), address, base)
                    value = ctypes.addressof(value.copy)
                if isinstance(value, Address):
                    open_words.append((len(words), value))
                    value = 0
                words.append(value & (2**64 - 1))
        held = (ctypes.c_uint64 * len(words))(*words)
        for index, address in open_words:
            self._point(writer, ctypes.c_uint64.from_buffer(held, 8 * index), address, base)
        return held

    def _point(self, writer: Writer, slot: ctypes.c_uint64, address: Address, base: int) -> None:
        if writer.buffers[address.buffer].outside:
            self.slots[address.buffer].append((slot, address.offset))
        else:
            slot.value = base + writer.buffers[address.buffer].place + address.offset

    def run(self, leaves: list[Tensor], macs: Macs) -> list[Tensor] | None:
        """The results as new tensors; None where a call failed."""
        memories = self._ends.memories(leaves)
        for number, memory in memories.items():
            for slot, offset in self.slots[number]:
                slot.value = memory.data_ptr() + offset
        self._macs[0], self._macs[1] = self._uncounted
        with self._mode():
            for step in self._steps:
                if not isinstance(step, tuple):
                    try:
                        step(memories)
                    except (IndexError, RuntimeError):  # the plain run, which follows, raises it in words
                        return None
                elif self._run(ctypes.addressof(step[0]), step[1], ctypes.addressof(self._macs)):
                    return None
        macs.int8 += self._macs[0]
        macs.float32 += self._macs[1]
        return self._ends.results(memories)


def _computing(call: TorchCall) -> Callable[[dict[int, Tensor]], None]:
    """What runs an operation of torch with the memories of a run."""
    views = any(isinstance(leaf, View) for leaf in pytree.tree_leaves((call.arguments, call.options, call.results)))
    if views or not _writes(call):
        return partial(_compute, call)
    run = partial(call.function.overloadpacket.out, *call.arguments, **call.options, out=call.results[0])

    def compute(memories: dict[int, Tensor]) -> None:
        run()

    return compute


def _compute(call: TorchCall, memories: dict[int, Tensor]) -> None:
    """Run an operation of torch, its results into their places."""

    def tensor(value: Any) -> Any:
        return value.of(memories[value.buffer]) if isinstance(value, View) else value

    arguments, options = (pytree.tree_map(tensor, given) for given in (call.arguments, call.options))
    places = [tensor(view) for view in call.results]
    if _writes(call):
        call.function.overloadpacket.out(*arguments, **options, out=places[0])
        return
    results = pytree.tree_leaves(call.function(*arguments, **options))
    for place, result in zip(places, results, strict=True):
        place.copy_(result)


def _writes(call: TorchCall) -> bool:
    """Is there a form of the operation that writes to a given tensor, for these very arguments and one result?"""
    if len(call.results) != 1:
        return False
    packet = call.function.overloadpacket
    if "out" not in packet.overloads() or call.results[0].dtype == torch.bfloat16:  # these round elsewhere
        return False
    names = {argument.name for argument in packet.out._schema.arguments}
    ours = [argument.name for argument in call.function._schema.arguments[: len(call.arguments)]]
    return names.issuperset([*ours, *call.options])


def _addresses(call: Call | TorchCall) -> list[Address]:
    found: list[Address] = []
    if isinstance(call, TorchCall):
        views = pytree.tree_leaves((call.arguments, call.options, call.results))
        return [Address(view.buffer, 0) for view in views if isinstance(view, View)]
    for value in call.arguments:
        found += list(value.pointers.values()) if isinstance(value, Structure) else []
        found += [value] if isinstance(value, Address) else []
    return found


def _share(calls: list[Call | TorchCall], buffers: list[Buffer]) -> None:
    """Lay results that torch computes element by element over an operand that nothing needs afterwards.

    So they are written to memory that a cache holds.
    """
    for index, call in enumerate(calls):
        if not isinstance(call, TorchCall) or torch.Tag.pointwise not in call.function.tags or not _writes(call):
            continue
        result, made = call.results[0], buffers[call.results[0].buffer]
        views = [leaf for leaf in pytree.tree_leaves((call.arguments, call.options)) if isinstance(leaf, View)]
        owners = [buffers[view.buffer].over or buffers[view.buffer] for view in views]
        for under in owners:
            alike = all(  # an element that is read elsewhere in the result's memory must not be overwritten before
                dataclasses.replace(view, buffer=result.buffer) == result
                for view, owner in zip(views, owners, strict=True)
                if owner is under
            )
            if alike and not (made.outside or under.outside) and under.last == index and under.size == made.size:
                made.over, under.last = under, made.last
                break


def _place(buffers: list[Buffer]) -> int:
    """Place buffers in an arena, the largest first, each at the lowest free place; returns its size in bytes."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=operator.attrgetter("size"), reverse=True):
        if buffer.outside or buffer.first < 0 or buffer.over:
            continue
        place = 0
        for other in sorted(placed, key=operator.attrgetter("place")):
            together = other.first <= buffer.last and buffer.first <= other.last
            if together and place < other.place + _room(other) and other.place < place + _room(buffer):
                place = other.place + _room(other)
        buffer.place = place
        placed.append(buffer)
    for buffer in buffers:
        buffer.place = buffer.over.place if buffer.over else buffer.place
    return max((buffer.place + _room(buffer) for buffer in placed), default=0)


def _room(buffer: Buffer) -> int:
    return -(-buffer.size // ALIGNMENT) * ALIGNMENT
