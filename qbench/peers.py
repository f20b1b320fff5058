"""A cell that another project answers: the fp32 network made into that peer's model, the fastest form kept, scored.

What runs in the cell's first child in place of qbench.evaluate.evaluate; timing, memory and the record are those of
every cell.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qbench.calibration_draw import draw
from qbench.measure import Measure
from qbench.recipe import AXES, Recipe
from qbench.timing import Timing, time_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qbench.backends import Peer

HOPELESS = 2.0  # a form whose first calls take so many times as long as another's is not timed further
GLANCE = Timing(rounds=3, block_calls=5, block_s=0.03)
CANDIDATES = "candidates"


class PeerUnavailable(RuntimeError):
    """The peer is not installed; the message names the cure."""


class RecipeUnavailable(RuntimeError):
    """The peer lacks what the recipe asks for; the cell becomes `skipped` with this message."""


@dataclass(frozen=True)
class Source:
    """What a peer starts from: the fp32 network as an ONNX file, and the batches that calibrate."""

    onnx: Path
    calibration: list[tuple[Tensor, ...]]


def require(name: str, packages: Sequence[str]) -> None:
    """Raises PeerUnavailable unless the packages are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise PeerUnavailable(
            f"backend {name} needs {', '.join(missing)}, not installed here: pip install 'qbench[peers]'"
        )


def lacking(name: str, recipe: Recipe, offers: Mapping[str, Sequence[str]]) -> str | None:
    """The first choice of the recipe that is not among those a peer offers, as a sentence."""
    for axis, choice in recipe.names().items():
        if axis in AXES and axis in offers and choice is not None and choice not in offers[axis]:
            return f"backend {name} has no {axis}={choice}, it offers {', '.join(offers[axis])}"
    return f"backend {name} has no keep_float" if recipe.applies("keep_float") and recipe.keep_float else None


def evaluate(
    task_config: dict[str, Any],
    prepared: dict[str, Any],
    recipe_config: dict[str, Any],
    measure_config: dict[str, Any],
    folder: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make the peer's model, keep its fastest form in the folder, score it. Returns what qbench.evaluate.evaluate does.

    Raises RecipeUnavailable, PeerUnavailable, or the peer's own error.
    """
    from qbench import evaluate as own
    from qbench.identity import cores
    from qbench.weights import task_of

    recipe, measure = own.recipe_from(recipe_config), Measure.of(measure_config)
    peer: Peer = recipe.backend
    if reason := peer.lacks(recipe):
        raise RecipeUnavailable(reason)
    peer.require()
    task = task_of(task_config, Path(prepared["folder"]).parent)
    started = time.monotonic()
    say("exporting and quantizing")
    source = _source(own.fp32_model(task_config, prepared), own.calibration_of(task), recipe, Path(folder))
    (Path(folder) / CANDIDATES).mkdir()
    names = peer.candidates(source, recipe, Path(folder) / CANDIDATES)
    quantize_s = time.monotonic() - started
    say(f"timing {', '.join(names)}")
    inputs = {batch: own.example_batch(task_config, prepared, batch) for batch in measure.batches}
    times = _times(peer, {name: Path(folder) / CANDIDATES / name / peer.program for name in names}, inputs, measure)
    variant = fastest(times)
    path = _keep(Path(folder), variant, peer.program)
    examples = task.evaluation().first(measure.examples)
    outputs = own.run(peer.load(path, None, cores()), examples, measure.eval_batch, say)
    found = own.score(task, examples, outputs, Path(prepared["folder"]), say)
    size, fp32_size = _size(path), source.onnx.stat().st_size
    source.onnx.unlink()
    found["metrics"] |= {"size_bytes": size, "size_ratio": size / fp32_size, "quantize_s": quantize_s}
    float_ops = peer.float_ops(path, 1, measure.threads) if recipe.applies("granularity") else []
    details = {"variant": variant, "variant_ms": times, "float_ops": float_ops}
    return {
        **found,
        "notes": [*found["notes"], *(["float_layers"] if float_ops else [])],
        "details": {**found["details"], **details},
        "environment": peer.environment(),
    }


def _source(model: nn.Module, batches: list[tuple[Tensor, ...]], recipe: Recipe, folder: Path) -> Source:
    """The ONNX file in the folder, and the batches that the recipe draws from the task's own."""
    from qbench.backends.peer_export import export_onnx

    export_onnx(model, batches[0], folder / "fp32.onnx")
    chosen = draw([list(batch) for batch in batches], recipe.calibration_samples, recipe.calibration_seed)
    return Source(folder / "fp32.onnx", [tuple(batch) for batch in chosen])


def _times(
    peer: Peer, paths: Mapping[str, Path], inputs: Mapping[int, tuple[Tensor, ...]], measure: Measure
) -> dict[str, list[float]]:
    """Milliseconds of the candidates at each batch size, those aside that a single call shows to be hopeless.

    A candidate alone is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    for batch, leaves in inputs.items() if len(paths) > 1 else ():
        calls = {name: partial(peer.load(paths[name], batch, measure.threads_of(batch)), *leaves) for name in times}
        once = {name: _second_call_ms(call) for name, call in calls.items()}
        hopeful = {name: call for name, call in calls.items() if once[name] <= HOPELESS * min(once.values())}
        found = time_blocks(hopeful, GLANCE, seed=batch)
        times = {name: [*times[name], median(ms)] for name, ms in found.medians_ms.items()}
    return times


def _second_call_ms(call: Callable[[], Any]) -> float:
    call()
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The candidate with the smallest product of its times: of batch sizes each counts as much."""
    return min(times, key=lambda name: prod(times[name]))


def _keep(folder: Path, variant: str, program: str) -> Path:
    """Move a candidate's files into the cell's folder, delete the others, return the one to load."""
    for path in (folder / CANDIDATES / variant).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / CANDIDATES)
    return folder / program


def _size(path: Path) -> int:
    """Bytes of a saved model: the file and what lies beside it under the same name (the weights of OpenVINO)."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}.*"))
