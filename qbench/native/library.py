"""The engine's C functions (engine.h), loaded beside torch's own threads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import threading
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from qbench.native import sources

__all__ = [
    "Attention",
    "Averaging",
    "Finish",
    "Operands",
    "Quantized",
    "Recurrent",
    "Replay",
    "Rows",
    "Weight",
    "Window",
    "byref",
]

FOR_ALL = 2**63 - 1  # Rows.pixels where one scale holds for everything


class NativeUnavailable(RuntimeError):
    """The library is not there, or is not that of these sources."""


class Weight(Structure):
    """See engine.h, as for all structures here."""

    _fields_ = [
        *((name, c_void_p) for name in ("values", "totals", "zero_points")),
        *((name, c_int64) for name in ("groups", "outputs", "depth", "block_depth", "segment")),
    ]


class Finish(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("multiplier", "bias", "start", "last")),
        ("residual_multiplier", c_float),
        ("residual_zero_point", c_int32),
        ("zero_point", c_int32),
        ("q_min", c_int32),
        ("q_max", c_int32),
        ("low", c_float),
        ("high", c_float),
        ("to_float", c_int32),
        ("table", c_void_p),
    ]


class Window(Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "height", "width", "channels", "out_height", "out_width", "kernel_height", "kernel_width", "stride_height",
            "stride_width", "padding_height", "padding_width", "dilation_height", "dilation_width", "block",
            "result_height", "result_width", "first_row", "first_column", "step_height", "step_width",
        )
    ]  # fmt: skip


class Rows(Structure):
    _fields_ = [("zero_points", c_void_p), ("scales", c_void_p), ("pixels", c_int64)]


class Operands(Structure):
    _fields_ = [(name, c_void_p) for name in ("x", "residual", "add", "y")] + [("samples", c_int64)]


class Recurrent(Structure):
    _fields_ = [
        ("weight_ih", Weight),
        ("weight_hh", Weight),
        ("finish_ih", Finish),
        ("finish_hh", Finish),
        ("steps", c_int64),
        ("samples", c_int64),
        ("hidden", c_int64),
        ("scale", c_float),
        *((name, c_int32) for name in ("x_zero_point", "zero_point", "q_min", "q_max", "affine", "per_row")),
    ]


class HeadStrides(Structure):
    _fields_ = [(name, c_int64) for name in ("sample", "head", "row")]


class Attention(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("heads", "queries", "keys", "depth", "width", "each")),
        *((name, HeadStrides) for name in ("q", "k", "v", "y")),
        ("mask", c_void_p),
        ("mask_shared", c_int32),
        ("causal", c_int32),
        ("m_scores", c_float),
        ("m", c_float),
        *((name, c_int32) for name in ("q_zero_point", "k_zero_point", "v_zero_point", "zero_point", "q_min", "q_max")),
    ]


class Averaging(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("height", "width", "channels", "out_height", "out_width")),
        *((name, c_void_p) for name in ("tops", "bottoms", "lefts", "rights", "multipliers")),
        ("x_zero", c_int32),
    ]


class Quantized(Structure):
    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("zero_points", c_void_p), ("sharing", c_int32)]


class Replay(Structure):
    _fields_ = [("calls", c_void_p), ("slots", c_void_p), ("count", c_int64)]


EACH_ROW, EACH_HEAD, ALL = 0, 1, 2  # Quantized.sharing

_LAYER = [POINTER(Weight), POINTER(Finish), POINTER(Window), POINTER(Rows), POINTER(Operands)]
_CODES = [c_int32, c_int32, c_int32, c_void_p]  # zero_point, q_min, q_max, y
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qb_isa": (ctypes.c_char_p, []),
    "qb_peak": (c_int64, [c_int64]),
    "qb_packed_size": (c_int64, [c_int64] * 5),
    "qb_pack": (None, [c_void_p, *[c_int64] * 5, c_void_p, c_void_p]),
    "qb_layer": (c_int64, _LAYER),
    "qb_packed_depthwise_size": (c_int64, [c_int64] * 3),
    "qb_pack_depthwise": (None, [c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_void_p]),
    "qb_depthwise": (c_int64, _LAYER),
    "qb_winograd_pays": (c_int32, [c_int64, POINTER(Window)]),
    "qb_packed_winograd_size": (c_int64, [c_int64] * 2),
    "qb_pack_winograd": (None, [c_void_p, c_void_p, *[c_int64] * 2, c_void_p, c_void_p]),
    "qb_winograd": (c_int64, _LAYER),
    "qb_transposed": (c_int64, [*_LAYER, c_int64, c_int64]),
    "qb_weight_only": (
        c_int64,
        [POINTER(Weight), c_void_p, POINTER(Finish), POINTER(Window), POINTER(Operands)],
    ),
    "qb_weight_only_transposed": (
        c_int64,
        [POINTER(Weight), c_void_p, POINTER(Finish), POINTER(Window), POINTER(Operands), c_int64, c_int64],
    ),
    "qb_weight_only_depthwise": (c_int64, [*[c_void_p] * 4, POINTER(Window), POINTER(Operands)]),
    "qb_lstm": (c_int64, [POINTER(Recurrent), *[c_void_p] * 4]),
    "qb_dynamic_lstm": (c_int64, [POINTER(Recurrent), *[c_void_p] * 6]),
    "qb_weight_only_lstm": (c_int64, [POINTER(Recurrent), *[c_void_p] * 6]),
    "qb_attention": (c_int64, [POINTER(Attention), *[c_void_p] * 4]),
    "qb_dynamic_attention": (c_int64, [POINTER(Attention), *[POINTER(Quantized)] * 3, c_int32, c_int32, c_void_p]),
    "qb_probabilities": (c_int64, [POINTER(Attention), POINTER(Quantized), POINTER(Quantized), c_void_p]),
    "qb_weighted_values": (c_int64, [POINTER(Attention), POINTER(Quantized), POINTER(Quantized), c_void_p]),
    "qb_layer_norm": (
        None,
        [c_void_p, c_int64, c_int64, c_int32, c_double, c_double, c_void_p, c_void_p, *_CODES],
    ),
    "qb_quantize": (None, [c_void_p, c_int64, c_float, *_CODES]),
    "qb_quantize_rows": (c_int32, [c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_void_p]),
    "qb_dequantize": (None, [c_void_p, c_int64, c_float, c_int32, c_void_p]),
    "qb_add": (None, [c_void_p, c_void_p, c_int64, c_int32, c_float, c_int32, c_float, *_CODES]),
    "qb_mul": (None, [c_void_p, c_void_p, c_int64, c_int32, c_int32, c_float, *_CODES]),
    "qb_table": (None, [c_void_p, c_int64, c_void_p, c_void_p]),
    "qb_average": (None, [c_void_p, POINTER(Averaging), c_int64, *_CODES]),
    "qb_channel_affine": (None, [c_void_p, c_int64, c_int64, c_int32, c_void_p, c_void_p, *_CODES]),
    "qb_rows": (c_int32, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p]),
    "qb_copy": (None, [*[c_void_p] * 5, c_int64, c_int64]),
    "qb_fill": (None, [c_void_p, c_int64, c_int32]),
    "qb_max_pool": (None, [c_void_p, POINTER(Window), c_int64, c_void_p]),
    "qb_run": (c_int64, [c_void_p, c_int64, c_void_p]),
    "qb_run_apart": (c_int64, [*[c_void_p] * 4, c_int64, c_int64, c_int64]),
    "qb_caller": (c_void_p, [ctypes.c_char_p]),
}


_written_down = threading.local()  # .calls: what library() returns instead, on a thread that writes calls down


def library() -> Any:
    """The functions of the engine. Raises NativeUnavailable, with the cure, where it is not there for these sources."""
    return getattr(_written_down, "calls", None) or loaded_library()


@contextlib.contextmanager
def written_down(calls: Any) -> Iterator[None]:
    """Within, `library()` of this thread is `calls`, which notes what it is asked for."""
    _written_down.calls = calls
    try:
        yield
    finally:
        _written_down.calls = None


@functools.cache
def loaded_library() -> ctypes.CDLL:
    """The library itself; see `library`."""
    if not sources.built():
        raise NativeUnavailable(f"{sources.WHY_NOT}; {sources.CURE}")
    _share_threads()
    try:
        loaded = load(sources.LIBRARY)
    except OSError as error:
        raise NativeUnavailable(f"the native backend does not load ({error}); {sources.CURE}") from error
    forced, ran = os.environ.get("QBENCH_ISA"), loaded.qb_isa().decode()
    if forced and forced != ran:  # another path in its place would be a fallback without a word
        known = ", ".join(sources.PATHS)
        raise NativeUnavailable(
            f"QBENCH_ISA={forced}: this CPU or this build has no such path (there are {known}); unset it"
        )
    return loaded


def load(path: Path) -> ctypes.CDLL:
    """A library with its functions' signatures; they raise MemoryError where there is no memory for scratch.

    Raises OSError where it does not load.
    """
    loaded = ctypes.CDLL(str(path), use_errno=True)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes, function.errcheck = result, arguments, _with_memory
    return loaded


def _with_memory(result: Any, function: Any, arguments: Any) -> Any:
    """The result of a call after which errno is not ENOMEM (see engine.h)."""
    if ctypes.get_errno() == errno.ENOMEM:
        ctypes.set_errno(0)
        name = function.__name__
        raise MemoryError(f"no memory is left for what {name} needs beside its results: take fewer samples")
    return result


def isa() -> str:
    """The path whose kernels run: `amx`, `avx512_vnni`, `avx_vnni`, `avx2` or `portable`."""
    name: str = library().qb_isa().decode()
    return name


def _share_threads() -> None:
    """Make the OpenMP that torch has loaded visible, so that both use one pool of threads."""
    import torch  # noqa: F401  (loads it)

    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    for path in sorted(loaded):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
