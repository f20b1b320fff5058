"""Models that quantization-aware training has made, kept in the cache of their task as its own trained weights are.

One a recipe, with the key of the answer that it is: other sources, weights, data or another machine train it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qbench.identity import key_hash, sha256_of, sources_hash
from qbench.recipe import Recipe
from qbench.record import write_atomic


@dataclass(frozen=True)
class Training:
    """How a model was trained: the loss of each step, the first step with frozen ranges, ||w - w_0|| / ||w_0||.

    `quantize_s` is how long that took, with calibration and conversion; `from_cache`: not now, but once before.
    """

    losses: list[float]
    frozen_at: int
    relative_weight_change: float
    quantize_s: float
    from_cache: bool = False

    @property
    def summary(self) -> dict[str, Any]:
        """What the record of a cell holds of it."""
        return {
            "steps": len(self.losses),
            "relative_weight_change": self.relative_weight_change,
            "losses": [float(f"{loss:.6g}") for loss in self.losses],
            "from_cache": self.from_cache,
        }

    def __post_init__(self) -> None:
        numbers = [*self.losses, self.relative_weight_change, self.quantize_s]
        if not all(isinstance(n, float) and math.isfinite(n) for n in numbers) or not isinstance(self.frozen_at, int):
            raise TypeError("not what a training says of itself")


class KeptModel:
    """Where one recipe's model lies in the folder of a prepared task: `qat-*.qb`, and a `.json` that vouches for it."""

    def __init__(self, task_config: Mapping[str, Any], prepared: Mapping[str, Any], recipe: Recipe) -> None:
        hashes = {name: prepared[name] for name in ("data_sha256", "weights_sha256")}
        asked = sha256_of({"task": task_config, "recipe": recipe.canonical(), **hashes})
        self._key = key_hash(asked, sources_hash(task_config, type(recipe.backend).__module__))
        self._model = Path(prepared["folder"]) / f"qat-{sha256_of(recipe.canonical())[:16]}.qb"
        self._voucher = self._model.with_suffix(".json")

    def read(self) -> tuple[bytes, Training] | None:
        """The file of a model and how it was trained; None unless both are whole and answer to the same key."""
        try:
            data, voucher = self._model.read_bytes(), json.loads(self._voucher.read_text(encoding="utf-8"))
            if (voucher["key"], voucher["sha256"]) != (self._key, hashlib.sha256(data).hexdigest()):
                return None
            return data, Training(**voucher["training"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, data: bytes, training: Training) -> None:
        """Keep a model's file; its voucher last, so that a kill in between leaves none."""
        write_atomic(self._model, data)
        vouched = {"key": self._key, "sha256": hashlib.sha256(data).hexdigest(), "training": asdict(training)}
        write_atomic(self._voucher, json.dumps(vouched))
