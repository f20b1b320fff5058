"""Which weights share a scale. Every granularity is two facts: do the output channels share, how many inputs share.

A weight is seen as [output channels, input channels, taps]; its scales are [rows, blocks]: `rows` is 1 when the
channels share, and block b covers the inputs b * block ... (b + 1) * block - 1 with all their taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["per_channel", "per_group", "per_tensor"]


class Granularity(Protocol):
    """Which weights share a scale."""

    name: ClassVar[str]
    label: ClassVar[str]
    channels_share: ClassVar[bool]
    uses_group_size: ClassVar[bool]

    def block(self, inputs: int, group_size: int) -> int:
        """How many consecutive input channels share a scale, for a layer with that many inputs."""
        ...


@dataclass(frozen=True)
class per_tensor:
    """One scale for the whole weight."""

    name: ClassVar[str] = "per_tensor"
    label: ClassVar[str] = "tensor"
    channels_share: ClassVar[bool] = True
    uses_group_size: ClassVar[bool] = False

    def block(self, inputs: int, group_size: int) -> int:
        """All inputs."""
        return inputs


@dataclass(frozen=True)
class per_channel:
    """One scale for each output channel."""

    name: ClassVar[str] = "per_channel"
    label: ClassVar[str] = "channel"
    channels_share: ClassVar[bool] = False
    uses_group_size: ClassVar[bool] = False

    def block(self, inputs: int, group_size: int) -> int:
        """All inputs."""
        return inputs


@dataclass(frozen=True)
class per_group:
    """One scale for each output channel and each block of `group_size` inputs; per channel where there is one block."""

    name: ClassVar[str] = "per_group"
    label: ClassVar[str] = "group"
    channels_share: ClassVar[bool] = False
    uses_group_size: ClassVar[bool] = True

    def block(self, inputs: int, group_size: int) -> int:
        """`group_size` inputs, or all of them when they make one block only."""
        return min(inputs, group_size)
