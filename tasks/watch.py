"""Smartwatch recordings of seven shoulder exercises by ten subjects, embedded (data/PROVENANCE.md).

140 recordings of six channels (acceleration and angular velocity, 50 Hz), cut into windows of 100 steps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from qbench.task import Examples
from tasks.embedded import read_checked

EMBEDDED = Path(__file__).parent / "data" / "watch" / "watch.safetensors.gz"
SHA256 = "140805d551ee68a934ac2793eba6d17d0586036184ca0299575f46b805a631c9"  # of its content
CHANNELS, CLASSES = 6, 7
WINDOW, STRIDE = 100, 50
HELD_OUT = 3  # subjects, the last ones: nobody who is judged was seen in training or calibration
FINE_TUNING_BATCH = 16
CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 256, 32


def training() -> tuple[Tensor, Tensor]:
    """The windows of the first seven subjects: normalized float32 [N, 100, 6] and int64 classes [N].

    Raises ValueError for a missing or damaged file.
    """
    windows, classes, _ = _windows(held_out=False)
    return windows, classes


def evaluation() -> Examples:
    """All windows of the held-out subjects; the resampling unit is the recording."""
    windows, classes, recordings = _windows(held_out=True)
    return Examples((windows,), classes, recordings)


def calibration() -> list[tuple[Tensor, ...]]:
    """256 training windows, evenly spread over the recordings, in batches of 32."""
    windows, _ = training()
    chosen = torch.arange(CALIBRATION_EXAMPLES) * len(windows) // CALIBRATION_EXAMPLES
    return [(batch,) for batch in windows[chosen].split(CALIBRATION_BATCH)]


def fine_tuning() -> list[tuple[Tensor, ...]]:
    """All training windows, in batches of 16."""
    return [(batch,) for batch in training()[0].split(FINE_TUNING_BATCH)]


def read(path: Path = EMBEDDED, sha256: str = SHA256) -> dict[str, Tensor]:
    """The tensors of the file: samples int16 [6, steps] times scale [6]; lengths, subject, exercise [140].

    Raises ValueError for a file that is missing or whose content has another sha256.
    """
    return load(read_checked(path, sha256))


def held_out_recordings(subject: Tensor) -> Tensor:
    """Which recordings are of the subjects that only judge."""
    return subject >= subject.unique()[-HELD_OUT]


def _windows(held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Windows, their classes and the recordings that they come from; normalized by the training subjects' samples."""
    held = read()
    samples = held["samples"].T * held["scale"]
    recordings = samples.split(held["lengths"].tolist())
    judging = held_out_recordings(held["subject"]).tolist()
    seen = torch.cat([recording for recording, only in zip(recordings, judging, strict=True) if not only]).double()
    mean, std = seen.mean(0).float(), seen.std(0).float()
    chosen = [index for index, only in enumerate(judging) if only == held_out]
    cut = [((recordings[index] - mean) / std).unfold(0, WINDOW, STRIDE).transpose(1, 2) for index in chosen]
    units = torch.tensor(chosen).repeat_interleave(torch.tensor([len(windows) for windows in cut]))
    return torch.cat(cut).contiguous(), held["exercise"].long()[units], units
