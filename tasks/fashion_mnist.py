"""Fashion-MNIST, embedded: 28x28 grey images of clothes in 10 balanced classes (data/PROVENANCE.md)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qbench.task import Examples
from tasks.embedded import read_checked

EMBEDDED = Path(__file__).parent / "data" / "fashion_mnist"
CLASSES = 10
MEAN, STD = 0.28604, 0.35302  # of the 60,000 training images, scaled to [0, 1]
CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 256, 32
FINE_TUNING_EXAMPLES, FINE_TUNING_BATCH = 4096, 64
UINT8_MAGIC = b"\0\0\x08"

# sha256 of the files' content, not of their compression: two gzip programs may pack the same images differently.
EMBEDDED_SHA256 = {
    "train-images-idx3-ubyte": "4cec7026deda4b3c9434fcce81b33057902b51dad743a53b0cf5bd801a74f19b",
    "train-labels-idx1-ubyte": "d7b8fcdcc115a8a91fa95427895542b07fc20faaaed1d109b95797d99941d802",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FULL_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}


def training(full_data: str | None = None) -> tuple[Tensor, Tensor]:
    """The 20,000 embedded training images, or all 60,000 from the folder `full_data`.

    Returns normalized float32 [N, 1, 28, 28] and int64 classes [N]. Raises ValueError for a missing or damaged file.
    """
    if full_data is None:
        return _split("train", EMBEDDED, EMBEDDED_SHA256)
    return _split("train", Path(full_data).expanduser(), FULL_SHA256)


def evaluation() -> Examples:
    """The whole test split: 10,000 images and their classes."""
    images, labels = _split("t10k", EMBEDDED, EMBEDDED_SHA256)
    return Examples((images,), labels)


def calibration() -> list[tuple[Tensor, ...]]:
    """The first 256 embedded training images (the file's order is random in class) in batches of 32."""
    images, _ = training()
    return [(batch,) for batch in images[:CALIBRATION_EXAMPLES].split(CALIBRATION_BATCH)]


def fine_tuning() -> list[tuple[Tensor, ...]]:
    """The 4,096 embedded training images after those of calibration, in batches of 64."""
    images, _ = training()
    chosen = images[CALIBRATION_EXAMPLES : CALIBRATION_EXAMPLES + FINE_TUNING_EXAMPLES]
    return [(batch,) for batch in chosen.split(FINE_TUNING_BATCH)]


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """Reads a uint8 idx file, gzipped where its name ends in .gz; ValueError unless its content has that sha256."""
    return parse_idx(read_checked(path, sha256), str(path))


def parse_idx(content: bytes, name: str) -> np.ndarray:
    """The array in an idx file: 0, 0, type 8 (uint8), rank, each dimension as big-endian int32, then the values."""
    if len(content) < 4 or content[:3] != UINT8_MAGIC:
        raise ValueError(f"{name}: not a uint8 idx file, it starts with {content[:4].hex(' ') or 'nothing'}")
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{name}: cut short, {len(content)} bytes of a {header}-byte header")
    shape = struct.unpack(f">{rank}I", content[4:header])
    expected = header + int(np.prod(shape))
    if len(content) != expected:
        raise ValueError(f"{name}: {len(content)} bytes where its header {shape} asks for {expected}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _split(split: str, folder: Path, sha256: dict[str, str]) -> tuple[Tensor, Tensor]:
    images, labels = (
        read_idx(_gzipped_or_plain(folder / name), sha256[name])
        for name in (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    )
    pixels = torch.from_numpy(images.astype(np.float32)).unsqueeze(1)
    return (pixels / 255 - MEAN) / STD, torch.from_numpy(labels.astype(np.int64))


def _gzipped_or_plain(path: Path) -> Path:
    """Torchvision keeps its copy unpacked in `<root>/FashionMNIST/raw`; everyone else keeps it gzipped."""
    return path if path.exists() else path.with_name(path.name + ".gz")
