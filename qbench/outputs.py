"""In which form the last layer hands over its result (ptsq, qat)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["float32", "int8"]


class Output(Protocol):
    """The form of the network's result."""

    name: ClassVar[str]
    label: ClassVar[str]
    keeps_accumulator: ClassVar[bool]


@dataclass(frozen=True)
class float32:
    """`output=float`: the last layer leaves its accumulator as float, so no precision is lost at the end."""

    name: ClassVar[str] = "float"
    label: ClassVar[str] = "float"
    keeps_accumulator: ClassVar[bool] = True


@dataclass(frozen=True)
class int8:
    """`output=int8`: the result is rounded to uint8 (the textbook's quantized I/O) and read back as float."""

    name: ClassVar[str] = "int8"
    label: ClassVar[str] = "int8"
    keeps_accumulator: ClassVar[bool] = False
