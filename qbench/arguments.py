"""The arguments of an int8 operation that hold quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qbench.numerics import QWeight

Hold = Callable[[str, Tensor], Any]

WINDOW = ("stride", "padding", "dilation", "groups", "output_padding")  # as many of them as the layer has


def weight_arguments(hold: Hold, prefix: str, weight: QWeight, bias: Tensor | None) -> dict[str, Any]:
    """Those of a layer with one weight; `hold` makes a tensor of the program under a name."""
    return rows_arguments(hold, prefix, weight) | {"bias": None if bias is None else hold(f"{prefix}.bias", bias)}


def rows_arguments(hold: Hold, prefix: str, weight: QWeight) -> dict[str, Any]:
    """Those of a weight that is looked up, an embedding's."""
    return {**_stored(hold, prefix, "weight", weight), "block": weight.block}


def lstm_arguments(hold: Hold, prefix: str, weight: QWeight, hidden: QWeight, bias: Tensor | None) -> dict[str, Any]:
    """Those of an LSTM layer: `weight` multiplies x, `hidden` multiplies h."""
    return {
        **_stored(hold, prefix, "weight_ih", weight),
        "weight_ih_block": weight.block,
        **_stored(hold, prefix, "weight_hh", hidden),
        "weight_hh_block": hidden.block,
        "bias": None if bias is None else hold(f"{prefix}.bias", bias),
    }


def _stored(hold: Hold, prefix: str, name: str, weight: QWeight) -> dict[str, Any]:
    """Codes, scales and zero points; zero points that are zero everywhere are left out."""
    zero_point = hold(f"{prefix}.{name}_zero_point", weight.zero_point) if bool(weight.zero_point.any()) else None
    return {
        name: hold(f"{prefix}.{name}", weight.values),
        f"{name}_scale": hold(f"{prefix}.{name}_scale", weight.scale),
        f"{name}_zero_point": zero_point,
    }
