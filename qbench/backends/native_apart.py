"""A batch that goes through a program in pieces of some samples, side by side on the threads.

Layer by layer, a large batch's results leave the caches before the next layer reads them; those of a piece stay. That
the answers are the same is shown call by call: see `folds`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.backends.native_plan import Ends, Plan, Recording
from qbench.backends.native_writer import Address, Buffer, Call, CannotPlanError, Structure, TorchCall
from qbench.native.library import SIGNATURES, Attention, Averaging, Operands, Replay, Window, loaded_library

if TYPE_CHECKING:
    from qbench.program import Macs

PIECE_BYTES = 4 << 20  # of results that are needed at the same time: from 1 to 6 MiB all are about as fast
MANY = 4  # pieces for each thread, of which one more or less does not matter

# Which argument counts samples, rows or elements: what a function makes of twice as many is what it makes of each half,
# one after another in memory. Of a layer it is `samples` of its operands.
EXTENTS = {
    "qb_quantize": 1,
    "qb_quantize_rows": 1,
    "qb_dequantize": 1,
    "qb_add": 2,
    "qb_mul": 2,
    "qb_table": 1,
    "qb_average": 2,
    "qb_channel_affine": 1,
    "qb_max_pool": 2,
    "qb_layer_norm": 1,
}
# Structures that are made anew for each call, and their field that counts as above.
STRUCTURES: dict[str, tuple[Any, str | None]] = {
    "qb_average": (Averaging, None),
    "qb_max_pool": (Window, None),
    "qb_attention": (Attention, "heads"),
    "qb_dynamic_attention": (Attention, "heads"),
}
LAYERS = ("qb_layer", "qb_depthwise", "qb_winograd", "qb_transposed")
COPY, ATTENTION = "qb_copy", "qb_attention"
KNOWN = {*EXTENTS, *STRUCTURES, *LAYERS, COPY}


def apart(whole: Recording, lowered: Callable[..., Any], leaves: list[Tensor], macs: Macs) -> Apart | None:
    """The recorded batch in pieces; None where that is not shown to be the same, or does not pay."""
    batch = next((leaf.shape[0] for leaf in leaves if leaf.dim()), 0)
    if batch < 2 or not whole.writer.calls or any(not leaf.dim() or len(leaf) != batch for leaf in leaves):
        return None
    if not all(isinstance(call, Call) and call.function in KNOWN for call in whole.writer.calls):
        return None
    if (samples := piece_of(whole, batch, torch.get_num_threads())) == batch:
        return None
    try:
        count = min(torch.get_num_threads(), batch // samples)
        pieces = [Recording(lowered, [leaf[:samples] for leaf in leaves], macs) for _ in range(count)]
        if folds(pieces[0], whole, batch // samples):
            return Apart(pieces[0], [Plan(piece) for piece in pieces], whole, batch // samples)
    except (CannotPlanError, ValueError, RuntimeError):
        pass  # of a sample alone it cannot be made
    return None


def piece_of(whole: Recording, batch: int, threads: int) -> int:
    """How many samples go through together: as the caches hold the results of, and equal shares for the threads."""
    for samples in range(batch, 0, -1):
        pieces = batch // samples
        if batch % samples == 0 and (samples == 1 or whole.arena <= pieces * PIECE_BYTES):
            return samples if pieces % threads == 0 or pieces >= MANY * threads else batch
    return batch


def folds(one: Recording, whole: Recording, pieces: int) -> bool:
    """Does the whole batch the calls of one piece, each on `pieces` times as much, in buffers of as much more?

    Then each part of a buffer is what the calls of a piece make of the same parts of the inputs.
    """
    sides = one.writer, whole.writer
    calls = [side.calls for side in sides]
    if len(calls[0]) != len(calls[1]) or len(sides[0].buffers) != len(sides[1].buffers):
        return False
    if (one.inputs, [view.buffer for view in one.outputs]) != (whole.inputs, [view.buffer for view in whole.outputs]):
        return False
    if any(
        pieces * a.storage.nbytes() != b.storage.nbytes()
        for a, b in zip(*(side.buffers for side in sides), strict=True)
    ):
        return False
    return all(_call_folds(a, b, sides[0].buffers, pieces) for a, b in zip(*calls, strict=True))


def _call_folds(one: Call | TorchCall, whole: Call | TorchCall, buffers: list[Buffer], pieces: int) -> bool:
    if isinstance(one, TorchCall) or isinstance(whole, TorchCall) or one.function != whole.function:
        return False
    if one.function == COPY:
        return _copy_folds(one.arguments, whole.arguments, buffers, pieces)
    if one.function == ATTENTION:
        return _attention_folds(one.arguments, whole.arguments, buffers, pieces)
    extent = EXTENTS.get(one.function, -1)
    kinds = SIGNATURES[one.function][1]
    for index, (kind, a, b) in enumerate(zip(kinds, one.arguments, whole.arguments, strict=True)):
        if index == extent:
            same = b == pieces * a
        elif isinstance(a, Structure) and isinstance(b, Structure):
            same = _operands_fold(a, b, pieces)
        elif one.function in STRUCTURES and kind is ctypes.POINTER(STRUCTURES[one.function][0]):
            same = _structure_folds(*STRUCTURES[one.function], a, b, pieces)
        else:
            same = a == b and not (isinstance(a, Address) and a.offset)
        if not same:
            return False
    return True


def _attention_folds(one: list[Any], whole: list[Any], buffers: list[Buffer], pieces: int) -> bool:
    """Equal but for the heads; its samples step from part to part of each buffer, wherever in them they begin."""
    call, *ends = one
    if ends != whole[1:] or isinstance(call, Structure) or isinstance(whole[0], Structure):  # a mask of the run's own
        return False
    if not _structure_folds(*STRUCTURES[ATTENTION], call, whole[0], pieces):
        return False
    a = Attention.from_address(call)
    samples = a.heads // a.each
    return all(
        isinstance(end, Address) and samples * strides.sample == buffers[end.buffer].storage.nbytes()
        for end, strides in zip(ends, (a.q, a.k, a.v, a.y), strict=True)
    )


def _structure_folds(kind: Any, extent: str | None, one: int, whole: int, pieces: int) -> bool:
    """Equal but for the extent."""
    a, b = (kind.from_buffer_copy(kind.from_address(address)) for address in (one, whole))
    if extent is not None:
        setattr(a, extent, pieces * getattr(a, extent))
    return bytes(a) == bytes(b)


def _operands_fold(one: Structure, whole: Structure, pieces: int) -> bool:
    """Equal but for the samples of operands; its pointers to buffers point to their beginnings."""
    a, b = (type(side.copy).from_buffer_copy(side.copy) for side in (one, whole))
    if isinstance(a, Operands) and isinstance(b, Operands):
        if b.samples != pieces * a.samples:
            return False
        b.samples = a.samples
    for copy in (a, b):
        for offset in one.pointers:
            ctypes.c_uint64.from_buffer(copy, offset).value = 0
    beginnings = all(not address.offset for address in one.pointers.values())
    return beginnings and one.pointers == whole.pointers and bytes(a) == bytes(b)


def _copy_folds(one: list[Any], whole: list[Any], buffers: list[Buffer], pieces: int) -> bool:
    """Its first dimension is `pieces` times as long and steps from part to part of both buffers."""
    x, x_strides, y, y_strides, sizes, dimensions, width = one
    if (x, y, dimensions, width) != (whole[0], whole[2], *whole[5:]) or not dimensions:
        return False
    if not (isinstance(x, Address) and isinstance(y, Address)):
        return False

    def read(address: int) -> list[int]:
        return list((ctypes.c_int64 * dimensions).from_address(address))

    if (read(x_strides), read(y_strides)) != (read(whole[1]), read(whole[3])):
        return False
    first, *rest = read(sizes)
    steps = [first * read(strides)[0] * width for strides in (x_strides, y_strides)]
    parts = [buffers[end.buffer].storage.nbytes() for end in (x, y)]
    return read(whole[4]) == [pieces * first, *rest] and steps == parts


class Apart:
    """Plans of one piece, one for each thread, through which a batch goes. Of use to one thread at a time."""

    def __init__(self, one: Recording, plans: list[Plan], whole: Recording, pieces: int) -> None:
        self._pieces, self._plans, self._ends = pieces, plans, Ends(whole)
        self._uncounted = whole.uncounted
        places = [(number, offset) for number, slots in plans[0].slots.items() for _, offset in slots]
        slots = [[slot for slots in plan.slots.values() for slot, _ in slots] for plan in plans]
        self._places = places
        self._slots = [(ctypes.c_void_p * len(own))(*map(ctypes.addressof, own)) for own in slots]
        self._starts = (ctypes.c_uint64 * len(places))()
        self._steps = (ctypes.c_int64 * len(places))(
            *(one.writer.buffers[number].storage.nbytes() for number, _ in places)
        )
        replays = []
        for plan, own in zip(plans, self._slots, strict=True):
            words, count = plan.stretch()
            replays.append(Replay(ctypes.addressof(words), ctypes.addressof(own), count))
        self._replays = (Replay * len(plans))(*replays)
        self._macs = (ctypes.c_int64 * 2)()
        self._run = loaded_library().qb_run_apart

    def run(self, leaves: list[Tensor], macs: Macs) -> list[Tensor] | None:
        """The results as new tensors; None where a call failed."""
        memories = self._ends.memories(leaves)
        for index, (number, offset) in enumerate(self._places):
            self._starts[index] = memories[number].data_ptr() + offset
        self._macs[0], self._macs[1] = self._uncounted
        sizes = len(self._replays), len(self._places), self._pieces
        addresses = (ctypes.addressof(held) for held in (self._replays, self._starts, self._steps, self._macs))
        if self._run(*addresses, *sizes):
            return None
        macs.int8 += self._macs[0]
        macs.float32 += self._macs[1]
        return self._ends.results(memories)
