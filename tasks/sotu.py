"""State of the Union addresses, embedded: text for a character model (data/PROVENANCE.md).

Whole speeches are held out, one of every three since 1934. A window is CONTEXT characters, with the characters that
follow each of them as targets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qbench.task import Examples
from tasks.embedded import read_checked

EMBEDDED = Path(__file__).parent / "data" / "sotu"
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # a character's number is its place
CONTEXT = 128
BETWEEN = "\f"  # stands between two speeches
WINDOWS_A_SPEECH = 16  # of a held-out one, evenly spaced: all of them would make 370 MB of fp32 outputs
CALIBRATION_WINDOWS, CALIBRATION_BATCH = 128, 32
FINE_TUNING_WINDOWS, FINE_TUNING_BATCH = 1024, 8

# sha256 of the files' content, not of their compression: two gzip programs may pack the same text differently.
SHA256 = {
    "training.txt": "b281ed29932128940d1313024c3a25442cd41f36f5400fa9e2741291700d1b12",
    "held_out.txt": "6b6a0cb883962666db5f103b76579855a8f78ab218e0370b76aa1d11312619fa",
}


def training() -> list[Tensor]:
    """The characters of each training speech, int64 [length]. Raises ValueError for a missing or damaged file."""
    return _speeches("training.txt")


def held_out() -> list[Tensor]:
    """The characters of each held-out speech, int64 [length]."""
    return _speeches("held_out.txt")


def evaluation() -> Examples:
    """16 windows of each held-out speech [N, 128] and the characters that follow [N, 128]; units are the speeches."""
    windows = [_spaced(speech, WINDOWS_A_SPEECH) for speech in held_out()]
    together = torch.cat(windows)
    units = torch.arange(len(windows)).repeat_interleave(WINDOWS_A_SPEECH)
    return Examples((together[:, :-1].contiguous(),), together[:, 1:].contiguous(), units)


def calibration() -> list[tuple[Tensor, ...]]:
    """128 windows from all over the training speeches, in batches of 32."""
    windows = _spaced(torch.cat(training()), CALIBRATION_WINDOWS)[:, :-1].contiguous()
    return [(batch,) for batch in windows.split(CALIBRATION_BATCH)]


def fine_tuning() -> list[tuple[Tensor, ...]]:
    """1,024 other windows from all over the training speeches, in batches of 8."""
    text = torch.cat(training())[CONTEXT // 2 :]  # half a window off those of calibration
    windows = _spaced(text, FINE_TUNING_WINDOWS)[:, :-1].contiguous()
    return [(batch,) for batch in windows.split(FINE_TUNING_BATCH)]


def _spaced(text: Tensor, count: int) -> Tensor:
    """`count` windows of CONTEXT + 1 characters, evenly spaced from the first to the last."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count, dtype=torch.float64).long()
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])


def _speeches(name: str) -> list[Tensor]:
    return [encode(speech) for speech in read_text(EMBEDDED / f"{name}.gz", SHA256[name]).split(BETWEEN)]


def encode(text: str) -> Tensor:
    """The number of each character. Raises ValueError for one outside the alphabet."""
    numbers = np.full(128, -1)
    numbers[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    found = numbers[np.frombuffer(text.encode("ascii"), np.uint8)]
    if (found < 0).any():
        raise ValueError(f"{text[int(found.argmin())]!r} is no character of the alphabet")
    return torch.from_numpy(found)


def read_text(path: Path, sha256: str) -> str:
    """The ASCII text of a gzipped file. Raises ValueError unless its content has that sha256."""
    return read_checked(path, sha256).decode("ascii")
