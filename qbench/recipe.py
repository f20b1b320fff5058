"""A recipe: one choice on every axis of quantization."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qbench import activation_granularities, backends, granularities, methods, observers, outputs, schemes

AXES: dict[str, ModuleType] = {
    "method": methods,
    "granularity": granularities,
    "scheme": schemes,
    "activation_scheme": schemes,
    "activation_granularity": activation_granularities,
    "observer": observers,
    "output": outputs,
    "backend": backends,
}
# Plain values that say which examples calibrate, with the least that each may be.
CALIBRATION = {"calibration_samples": 1, "calibration_seed": 0}


def option(axis: str, name: str) -> Any:
    """The object called `name` on an axis. Raises ValueError that names the allowed ones."""
    choices = {getattr(AXES[axis], public).name: getattr(AXES[axis], public) for public in AXES[axis].__all__}
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{axis}={name}: allowed are {', '.join(sorted(choices))}{hint}")
    return choices[name]()


@dataclass(frozen=True)
class Recipe:
    """One choice on every axis. Each field takes the object or its name; `canonical` nulls what does not apply.

    `group_size` counts input channels (per_group). `keep_float` lists patterns of module names (`layer1.*`, `fc`) that
    stay in float. `calibration_samples` examples calibrate (None: all that are given), drawn at random without
    replacement from `calibration_seed` (None: the first). `backend` None is native, or reference where the engine is
    not built: the recipe holds the one that runs. Raises ValueError for an unknown name or an impossible value.
    """

    method: Any = "ptsq"
    granularity: Any = "per_channel"
    scheme: Any = "symmetric"
    activation_scheme: Any = "affine"
    activation_granularity: Any = "per_row"
    observer: Any = "minmax"
    output: Any = "float"
    backend: Any = None
    group_size: int = 64
    keep_float: tuple[str, ...] = ()
    calibration_samples: int | None = None
    calibration_seed: int | None = None

    def __post_init__(self) -> None:
        if self.backend is None:
            object.__setattr__(self, "backend", backends.default())
        for axis, module in AXES.items():
            value = getattr(self, axis)
            if isinstance(value, str):
                object.__setattr__(self, axis, option(axis, value))
            elif type(value) not in [getattr(module, public) for public in module.__all__]:
                raise ValueError(f"{axis}={value!r}: give a name or an object of {module.__name__}")
        if not _is_whole(self.group_size, 1):
            raise ValueError(f"group_size={self.group_size!r}: give a whole number of input channels, at least 1")
        for name, least in CALIBRATION.items():
            if getattr(self, name) is not None and not _is_whole(getattr(self, name), least):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a whole number, at least {least}, or null")
        if not isinstance(self.keep_float, list | tuple) or not all(isinstance(p, str) and p for p in self.keep_float):
            raise ValueError(f"keep_float={self.keep_float!r}: give a list of module-name patterns, such as [fc]")
        object.__setattr__(self, "keep_float", tuple(sorted(set(self.keep_float))))

    def applies(self, axis: str) -> bool:
        """Does this axis, or plain value, change anything under the method?"""
        return axis in ("method", "backend") or axis in self.method.axes

    def canonical(self) -> dict[str, Any]:
        """What is asked, as JSON: every axis with its options, None where it does not apply to the method."""
        content: dict[str, Any] = {
            axis: {"name": getattr(self, axis).name, **dataclasses.asdict(getattr(self, axis))}
            if self.applies(axis)
            else None
            for axis in AXES
        }
        grouped = self.applies("granularity") and self.granularity.uses_group_size
        content["group_size"] = self.group_size if grouped else None
        content["keep_float"] = list(self.keep_float) if self.applies("keep_float") else None
        for name in CALIBRATION:
            content[name] = getattr(self, name) if self.applies(name) else None
        return content

    def names(self) -> dict[str, str | None]:
        """The name of the choice on each axis, None where it does not apply."""
        return {axis: getattr(self, axis).name if self.applies(axis) else None for axis in AXES}

    @property
    def latency_is_result(self) -> bool:
        """Does the time say something? Not with a backend that exists to be exact, unless all of it is torch's own."""
        return bool(self.backend.latency_is_result or self.method.runs_in_torch)

    @property
    def label(self) -> str:
        """At most 9 characters, for plots and MLflow: method, granularity, scheme (`ptsq-c-s`)."""
        parts = [self.method.label[:5]]
        parts += [getattr(self, axis).label[0] for axis in ("granularity", "scheme") if self.applies(axis)]
        return "-".join(parts)


# What is asked where nothing is said. A backend that had to stand in for this one is worth saying.
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Recipe)} | {"backend": backends.PREFERRED}


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
