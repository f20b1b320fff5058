"""Crops of the real photographs that scikit-image ships in its wheel; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qbench.task import Examples, TaskUnavailable

CALIBRATION_PHOTOS = (
    "motorcycle_left.png",
    "motorcycle_right.png",  # the same scene: both eyes of a stereo pair stay on one side
    "hubble_deep_field.jpg",
    "ihc.png",
    "coins.png",
    "brick.png",
    "grass.png",
    "text.png",
)
EVALUATION_PHOTOS = (
    "astronaut.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "gravel.png",
    "moon.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
CALIBRATION_CROPS, EVALUATION_CROPS = 4, 8  # of each photo: 32 and 88
SMALLEST_CROP = 0.6  # of the photo's shorter side
BATCH = 8

Scale = Callable[[Tensor], Tensor]


def installed() -> bool:
    """Whether scikit-image, and with it the photos, is here."""
    return importlib.util.find_spec("skimage") is not None


def calibration(size: int, scale: Scale) -> list[tuple[Tensor, ...]]:
    """32 crops [N, 3, size, size] of 8 photos, none of them an evaluation photo, in batches of 8.

    `scale` turns pixel values 0 to 255 into the network's input. Raises TaskUnavailable without scikit-image.
    """
    images = torch.cat([crops(photo, CALIBRATION_CROPS, size) for photo in map(read, CALIBRATION_PHOTOS)])
    # Crop k of every photo in batch k: an order-dependent observer sees all kinds of photos in each batch.
    mixed = images.unflatten(0, (-1, CALIBRATION_CROPS)).transpose(0, 1).flatten(0, 1)
    return [(batch,) for batch in scale(mixed).split(BATCH)]


def evaluation(size: int, scale: Scale) -> Examples:
    """88 crops [N, 3, size, size] of 11 photos, which are the resampling units."""
    images = torch.cat([crops(photo, EVALUATION_CROPS, size) for photo in map(read, EVALUATION_PHOTOS)])
    units = torch.arange(len(EVALUATION_PHOTOS)).repeat_interleave(EVALUATION_CROPS)
    return Examples((scale(images),), units=units)


def read(name: str) -> Tensor:
    """The photo as float32 pixel values [3, height, width]; grey ones three times the same."""
    if not installed():
        raise TaskUnavailable("skipped, its photos come with scikit-image: pip install 'qbench[photos]'")
    spec = importlib.util.find_spec("skimage")
    path = Path(spec.origin).parent / "data" / name
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1)


def crops(photo: Tensor, count: int, size: int) -> Tensor:
    """`count` square crops [count, 3, size, size], whole pixel values; the first is the largest in the middle."""
    height, width = photo.shape[1:]
    shorter = min(height, width)
    random = torch.Generator().manual_seed(0)
    taken = [square(photo, (height - shorter) // 2, (width - shorter) // 2, shorter, size)]
    while len(taken) < count:
        side_at, top_at, left_at = torch.rand(3, generator=random).tolist()
        side = int(shorter * (SMALLEST_CROP + (1 - SMALLEST_CROP) * side_at))
        taken.append(square(photo, int((height - side) * top_at), int((width - side) * left_at), side, size))
    return torch.cat(taken)


def square(photo: Tensor, top: int, left: int, side: int, size: int) -> Tensor:
    """One crop [1, 3, size, size], resampled and rounded to whole pixel values (the same on every CPU)."""
    crop = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False).round().clamp(0, 255)
