"""Any torchvision classifier by name, with random or your own weights; judged against its own float outputs."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.metrics import fidelity
from qbench.task import Examples, Task
from tasks import photos
from tasks.batch_norm import settle_batch_norm

CHANNEL_MEAN, CHANNEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, scaled to [0, 1]
CALIBRATION_SEED, EVALUATION_SEED = 1, 2
CALIBRATION_BATCHES, EVALUATION_BATCHES, BATCH = 4, 11, 8
COARSE = 14  # resolution of the large shapes in the images that stand in for photos

# What some constructors must be told; the default asks for slow initialisations or fixes the image size.
CONSTRUCTION: dict[str, Callable[[int], dict[str, Any]]] = {
    "vit_": lambda size: {"image_size": size},
    "maxvit_": lambda size: {"input_size": (size, size)},
    "googlenet": lambda size: {"init_weights": False},
    "inception_v3": lambda size: {"init_weights": False},
}


def task(name: str, image_size: int = 224, weights: str | None = None, num_classes: int = 1000, seed: int = 0) -> Task:
    """The classifier `name` at image_size x image_size.

    `weights` is a state dict in a torch or safetensors file; without it the weights are random, from `seed`, and the
    batch norms settled. Raises ValueError for a name that torchvision does not have.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
        raise ValueError(f"torchvision has no classifier {name!r}, {hint}")
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}, it must be at least 1")
    return Task(
        name=f"torchvision_{name}",
        family="cnn",
        metric=fidelity(),
        build=partial(build, name, image_size, weights, num_classes, seed),
        train=None if weights else partial(settle, image_size),
        calibration=partial(calibration, image_size),
        evaluation=partial(evaluation, image_size),
    )


def build(name: str, image_size: int, weights: str | None, num_classes: int, seed: int) -> nn.Module:
    """The network in evaluation mode. Raises ValueError when the file does not hold its weights."""
    options = [make(image_size) for prefix, make in CONSTRUCTION.items() if name.startswith(prefix)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **(options or [{}])[0])
    if weights is not None:
        load_weights(model, Path(weights).expanduser())
    return model.eval()


def settle(image_size: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Gives the random network the batch-norm statistics of the calibration images."""
    source = "photos" if photos.installed() else "seeded images (pip install 'qbench[photos]' for real photos)"
    say(f"random weights, settling batch norms on {source}")
    settle_batch_norm(model, [batch for (batch,) in calibration(image_size)])


def calibration(image_size: int) -> list[tuple[Tensor, ...]]:
    """32 images in batches of 8: crops of photos, or without scikit-image seeded ones."""
    if photos.installed():
        return photos.calibration(image_size, normalized)
    return [(batch,) for batch in seeded_images(CALIBRATION_SEED, CALIBRATION_BATCHES * BATCH, image_size).split(BATCH)]


def evaluation(image_size: int) -> Examples:
    """88 other images of the same kind."""
    if photos.installed():
        return photos.evaluation(image_size, normalized)
    return Examples((seeded_images(EVALUATION_SEED, EVALUATION_BATCHES * BATCH, image_size),))


def normalized(pixels: Tensor) -> Tensor:
    """The network's input from pixel values 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (pixels / 255 - mean) / std


def seeded_images(seed: int, count: int, size: int) -> Tensor:
    """Normalized images [count, 3, size, size] of large coloured shapes and fine grain."""
    random = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.randn(count, 3, COARSE, COARSE, generator=random), (size, size), mode="bilinear")
    return shapes + 0.2 * torch.randn(count, 3, size, size, generator=random)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the state dict in a torch file (read as weights only, no code runs) or a .safetensors file.

    Raises ValueError, in one line, for a file that is missing, damaged or of another network.
    """
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"task.weights={path}: no such file") from None
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"task.weights={path}: not a file of weights ({reason})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]  # as training scripts save it, beside the optimizer's
    problem = misfit(model.state_dict(), loaded)
    if problem:
        raise ValueError(f"task.weights={path}: not the weights of this network, {problem}")
    model.load_state_dict(loaded)


def misfit(own: dict[str, Tensor], loaded: object) -> str | None:
    """What keeps `loaded` from being the state dict `own`, in a few words; None if nothing does."""
    if not isinstance(loaded, dict):
        return f"it holds a {type(loaded).__name__}, not a dictionary of tensors"
    missing, unexpected = sorted(own.keys() - loaded.keys()), sorted(map(str, loaded.keys() - own.keys()))
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({names[0]})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        return "its tensors differ: " + ", ".join(parts)
    for name, tensor in own.items():
        shape = tuple(getattr(loaded[name], "shape", ()))
        if shape != tuple(tensor.shape):
            return f"{name} has shape {shape} where {tuple(tensor.shape)} is needed"
    return None
