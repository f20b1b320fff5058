"""Configuration: where conf and tasks lie, and from a composed configuration to the objects it names.

hydra is imported here and in qbench.compose only, inside functions: the import takes half a second.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.sources import PROJECT

if TYPE_CHECKING:
    from qbench.measure import Measure
    from qbench.recipe import Recipe

# Fields of a recipe that are plain values, beside its axes (one configuration group each).
RECIPE_VALUES = ("group_size", "keep_float", "calibration_samples", "calibration_seed")
# What says how to run and what to show, not what is asked; the same for all cells of a command line.
RUN_VALUES = ("results", "force", "dry_run", "cells", "page")


class UsageError(ValueError):
    """The command line or a file it names cannot be used; the message is one line and names the cure."""


def conf_folder() -> Path:
    """qbench/conf in a wheel, the project's conf in a checkout or an editable install."""
    inside = Path(__file__).resolve().parent / "conf"
    return inside if inside.is_dir() else PROJECT / "conf"


def use_project_tasks() -> None:
    """Make `import tasks` mean the package beside qbench, whatever lies in the working directory."""
    own = PROJECT / "tasks" / "__init__.py"
    loaded = sys.modules.get("tasks")
    if loaded is not None and getattr(loaded, "__file__", None) == str(own):
        return
    spec = importlib.util.spec_from_file_location("tasks", own, submodule_search_locations=[str(own.parent)])
    if spec is None or spec.loader is None or not own.is_file():
        raise UsageError(f"{own} is missing; install qbench again")
    for name in [name for name in sys.modules if name == "tasks" or name.startswith("tasks.")]:
        del sys.modules[name]
    sys.modules["tasks"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def instantiate(node: dict[str, Any], **given: Any) -> Any:
    """The object that a configuration node with a `_target_` describes, called with what is `given` besides.

    Raises the error of the target itself.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    use_project_tasks()
    try:
        return hydra_instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError) and _is_wrong_call(cause):
            raise UsageError(f"_target_ {node['_target_']}: {one_line(cause)}") from error
        if isinstance(cause, Exception) and not isinstance(cause, ImportError):
            raise cause from error
        raise UsageError(f"_target_ {node.get('_target_')!r}: {one_line(error)}") from error


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe of a composed configuration. Raises UsageError for an impossible value."""
    from qbench.recipe import AXES, Recipe

    try:
        axes = {axis: instantiate(values[axis]) for axis in AXES}
        return Recipe(**axes, **{name: values[name] for name in RECIPE_VALUES})
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def measure_of(values: dict[str, Any]) -> Measure:
    """The measurement settings of a composed configuration. Raises UsageError for an impossible value."""
    try:
        settings: Measure = instantiate(values["measure"])
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    return settings


def _is_wrong_call(error: TypeError) -> bool:
    """Did a function refuse its arguments, before any line of it ran?"""
    return re.search(r"\(\) (got an unexpected|missing \d+ required|takes \d+)", str(error)) is not None


def one_line(error: object) -> str:
    """The error's text without its line breaks."""
    return " ".join(str(error).split())
