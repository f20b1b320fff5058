"""What the gate compares with: one small JSON a cell, committed and reviewed.

A baseline is the part of a record that a later run is judged by: sizes, hashes, the evidence of the score, the speed
value of each timing process, and the machine. Only `--qbench-update` writes one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qbench.record import Record, write_atomic

SCHEMA = 2
LARGEST_SPEED = 50.0  # a log: no cell is e^50 times as fast as another
KEPT = 20  # earlier baselines in a file; the first always stays
# Of the environment, what decides how fast a cell is and which float kernels run.
MACHINE = ("cpu", "cpu_flags", "native_isa", "kernel_path", "threads", "measure_threads", "torch")
HASHES = ("program_sha256", "model_sha256", "outputs_sha256")
# Of the measurement, what changes the answer and not only how sure it is.
ASKED = ("batch", "threads", "threads_large", "examples", "eval_batch", "block_calls", "block_ms", "pause_ms")
TELLING = ("score", "score_drop", "size_bytes", "int8_mac_fraction", "speedup", "peak_memory_bytes")


class BaselineError(ValueError):
    """A baseline file that cannot be used; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The part of a cell's record that another run of it is judged by.

    `speeds` holds by metric (`speedup`, `speedup_b16`) the natural log of fp32's time over the cell's in each process,
    `milliseconds` both times there, those of undisturbed blocks (`latency.undisturbed_ms`). `inputs` is what was asked,
    `machine` what answered. `history` holds the telling metrics of the baselines that this one replaced, oldest first.
    `operations` has the milliseconds of each operation of the program at batch 1, each timed alone.
    """

    schema: int = SCHEMA
    name: str
    sweep: str
    method: str
    score: str  # the task's own metric
    metrics: dict[str, float]
    speeds: dict[str, list[float]]
    milliseconds: dict[str, dict[str, list[float]]]
    evidence: dict[str, Any] | None
    hashes: dict[str, str]
    tensors: dict[str, str]
    float_ops: list[str]
    inputs: dict[str, Any]
    machine: dict[str, Any]
    revision: str | None
    taken: str
    history: list[dict[str, Any]] = field(default_factory=list)
    operations: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record, name: str, sweep: str) -> Baseline:
        """From a finished record. Raises BaselineError for one that failed."""
        if record.status != "ok":
            raise BaselineError(f"{name} {record.status}: {record.error}")
        details = record.details
        speeds, milliseconds = _speeds(details.get("timing", {}) if details.get("latency_is_result", True) else {})
        prepared = details.get("task_arguments", {}).get("prepared", {})
        measure = details.get("measure", {})
        return cls(
            name=name,
            sweep=sweep,
            method=record.method,
            score=str(details.get("metric", "score")),
            metrics=dict(record.metrics),
            speeds=speeds,
            milliseconds=milliseconds,
            evidence=details.get("evidence"),
            hashes={key: details[key] for key in HASHES if key in details},
            tensors=dict(details.get("tensors", {})),
            float_ops=list(details.get("float_ops", [])),
            inputs={
                "recipe": details.get("recipe"),
                "task": details.get("task_arguments", {}).get("task_config"),
                "fp32 weights": prepared.get("weights_sha256"),
                "data": prepared.get("data_sha256"),
                "measure": {key: measure.get(key) for key in ASKED},
            },
            machine={key: record.environment.get(key) for key in MACHINE},
            revision=record.environment.get("git_revision"),
            taken=record.started,
        )

    def stale(self, now: Baseline) -> list[str]:
        """Which inputs are not those of another run."""
        return [key for key in now.inputs if self.inputs.get(key) != now.inputs[key]]

    def foreign(self, now: Baseline) -> list[str]:
        """What of the machine is not that of another run."""
        return [key for key in MACHINE if self.machine.get(key) != now.machine.get(key)]

    def since(self, first: int) -> Baseline:
        """With the timing processes from number `first` on."""
        milliseconds = {
            metric: {who: values[first:] for who, values in sides.items()}
            for metric, sides in self.milliseconds.items()
        }
        speeds = {metric: values[first:] for metric, values in self.speeds.items()}
        return dataclasses.replace(self, speeds=speeds, milliseconds=milliseconds)

    def after(self, earlier: Baseline | None) -> Baseline:
        """This baseline in the place of an earlier one, whose telling metrics it keeps."""
        if earlier is None:
            return self
        told = {name: earlier.metrics[name] for name in TELLING if name in earlier.metrics}
        history = [*earlier.history, {"taken": earlier.taken, "revision": earlier.revision, "metrics": told}]
        return dataclasses.replace(self, history=history[:1] + history[1:][-KEPT:])

    def write(self, path: Path) -> None:
        """As sorted JSON, atomically. Raises ValueError for a number that is not finite."""
        write_atomic(path, json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n")


def file_name(name: str) -> str:
    """`ci_lstm[ptdq-per_channel-symmetric].json`; what a file system may refuse in it is replaced."""
    return re.sub(r"[^\w\[\]=.,+-]", "_", name) + ".json"


def read(path: Path) -> Baseline:
    """A baseline file, checked. Raises BaselineError with its name when it is damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"it is no baseline of schema {SCHEMA}")
        found = Baseline(**content)
        _check(found)
    except (OSError, ValueError, TypeError, ArithmeticError, AttributeError, KeyError, RecursionError) as error:
        cure = "restore it from git, or delete it and run pytest --qbench --qbench-update"
        raise BaselineError(f"{path}: {' '.join(str(error).split())}; {cure}") from error
    return found


def _speeds(timing: Mapping[str, Any]) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    speeds, milliseconds = {}, {}
    for batch, found in timing.items():
        undisturbed = found.get("undisturbed_ms", {})  # which older records lack
        if "cell" in undisturbed:
            name = "speedup" if batch == "1" else f"speedup_b{batch}"
            cell, fp32 = undisturbed["cell"], undisturbed["eager"]
            speeds[name] = [math.log(b / a) for a, b in zip(cell, fp32, strict=True)]
            milliseconds[name] = {"cell": cell, "fp32": fp32}
    return speeds, milliseconds


def _check(baseline: Baseline) -> None:
    """Raise ValueError for a value of another kind than a baseline has."""
    for name, kind in (
        *((key, dict) for key in ("metrics", "speeds", "milliseconds", "hashes", "tensors", "inputs", "machine")),
        ("operations", dict),
        *((key, list) for key in ("history", "float_ops")),
        *((key, str) for key in ("name", "sweep", "method", "score", "taken")),
    ):
        if not isinstance(getattr(baseline, name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not all(isinstance(text, str) for text in (*baseline.float_ops, *baseline.hashes.values(), *baseline.tensors)):
        raise ValueError("a name or a hash is no text")
    numbers = [*baseline.metrics.values()]
    if baseline.speeds.keys() != baseline.milliseconds.keys():
        raise ValueError("speeds and milliseconds are not of the same metrics")
    for name, values in baseline.speeds.items():
        sides = [baseline.milliseconds[name][who] for who in ("cell", "fp32")]
        times = [*sides[0], *sides[1]]
        if (
            not values
            or {len(values)} != {*map(len, sides)}
            or min(times) <= 0.0
            or max(map(abs, values)) > LARGEST_SPEED
        ):
            raise ValueError(f"the values of {name} are none that were measured")
        numbers += [*values, *times]
    numbers += [*baseline.operations.values()]
    for entry in baseline.history:
        numbers += [*entry["metrics"].values()]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError("a value is no finite number")
    if baseline.evidence is not None and not isinstance(baseline.evidence, dict):
        raise ValueError("evidence is no dict")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no finite number")
