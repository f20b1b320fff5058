"""The edge to Hydra: finds conf and tasks, composes cells, launches jobs, and turns every error into one line.

The only module that imports hydra, and only inside functions: the import takes half a second.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.sources import PROJECT

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from qbench.measure import Measure
    from qbench.recipe import Recipe

# Fields of a recipe that are plain values, beside its axes (one configuration group each).
RECIPE_VALUES = ("group_size", "keep_float")


class UsageError(ValueError):
    """The command line or a file it names cannot be used; the message is one line and names the cure."""


@dataclass(frozen=True)
class Job:
    """One composed configuration: plain values, the choice in each group, and the overrides that lead to it."""

    values: dict[str, Any]
    choices: dict[str, str]
    overrides: tuple[str, ...]


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


def instantiate(node: dict[str, Any]) -> Any:
    """The object that a configuration node with a `_target_` describes. Raises the error of the target itself."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    use_project_tasks()
    try:
        return hydra_instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, ImportError):
            raise error.__cause__ from error
        raise UsageError(f"_target_ {node.get('_target_')!r}: {_one_line(error)}") from error


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe of a composed configuration. Raises UsageError for an impossible value."""
    from qbench.recipe import AXES, Recipe

    try:
        axes = {axis: instantiate(values[axis]) for axis in AXES}
        return Recipe(**axes, **{name: values[name] for name in RECIPE_VALUES})
    except (TypeError, ValueError) as error:
        raise UsageError(_one_line(error)) from error


def measure_of(values: dict[str, Any]) -> Measure:
    """The measurement settings of a composed configuration. Raises UsageError for an impossible value."""
    try:
        settings: Measure = instantiate(values["measure"])
    except (TypeError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    return settings


class Composer:
    """Hydra, set up for one command line. Every method raises UsageError with one line for what Hydra refuses."""

    def __init__(self, arguments: Namespace) -> None:
        self.multirun = arguments.multirun or any(_key(text) == "sweep" for text in arguments.overrides)
        self._overrides = list(arguments.overrides)
        with self._one_line_errors():
            self._hydra = _hydra(arguments.config_dir)
            self._master = self._compose_master()

    def jobs(self) -> Iterator[Job]:
        """Every combination that the command line asks for, composed."""
        for overrides in self._combinations():
            with self._one_line_errors():
                yield _job(self._hydra.config_loader.load_sweep_config(self._master, overrides), overrides)

    def launch(self, jobs: Sequence[Job], function: Callable[[Any], object], first: int) -> None:
        """Run jobs through the configured Hydra launcher; `function` gets each one's configuration and never raises."""
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext
        from hydra._internal.callbacks import Callbacks

        context = HydraContext(config_loader=self._hydra.config_loader, callbacks=Callbacks(self._master))
        with self._one_line_errors():
            launcher = Plugins.instance().instantiate_launcher(context, function, self._master)
        for result in launcher.launch([list(job.overrides) for job in jobs], initial_job_idx=first):
            _ = result.return_value  # raises what was no cell's failure: Ctrl-C, a full disk, an error of our own

    def help(self, parser: Any, arguments: Namespace) -> None:
        """Print the help text of config.yaml with the groups and values of this command line."""
        self._hydra.app_help(config_name="config", args_parser=parser, args=arguments)

    def _compose_master(self) -> DictConfig:
        from hydra.types import RunMode

        mode = RunMode.MULTIRUN if self.multirun else RunMode.RUN
        return self._hydra.compose_config("config", self._overrides, mode, with_log_configuration=False)

    def _combinations(self) -> list[list[str]]:
        """One list of overrides a job: the sweep's parameters and the command line's, the latter winning."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        sweeper = self._master.hydra.sweeper
        if not sweeper["_target_"].endswith(".BasicSweeper"):
            raise UsageError(f"hydra/sweeper: {sweeper['_target_']} is not supported; qbench sweeps with the basic one")
        own = list(self._master.hydra.overrides.task)
        if not self.multirun:
            return [own]
        texts = [f"{name}={value}" for name, value in (sweeper.params or {}).items()] + own
        with self._one_line_errors():
            parsed = OverridesParser.create(config_loader=self._hydra.config_loader).parse_overrides(texts)
            return BasicSweeper.split_arguments(parsed, None)[0]

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        """Hydra's message, shortened to what was given, what is allowed and what to do."""
        from hydra.errors import OverrideParseException

        text = f"{error} {error.__cause__ or ''}"
        if isinstance(error, OverrideParseException):
            return f"{error.override!r} is not understood; write key=value, see python -m qbench --help"
        if found := re.search(r"Could not find '([\w/]+)/([^/']*)'", text):
            return self._unknown_choice(found[1], found[2])
        if found := re.search(r"(?:Could not override|Could not append[^']*) '([^']+)'", text):
            return self._unknown_key(found[1])
        if found := re.search(r"Ambiguous value for argument '([^']+)'|Sweep parameters '([^']+)'", text):
            return f"{found[1] or found[2]} is a sweep: add -m, or give a list in brackets, such as [a,b]"
        return _one_line(text)

    def _unknown_choice(self, group: str, name: str) -> str:
        options = self._hydra.config_loader.get_group_options(group) if hasattr(self, "_hydra") else []
        return f"{group}={name}: allowed are {', '.join(sorted(options))}{_hint(name, options)}"

    def _unknown_key(self, key: str) -> str:
        if key.lstrip("+") == "sweep":
            return "sweep=...: write +sweep=..., it is added to the configuration"
        known = _known_keys()
        return f"unknown option {key!r}{_hint(key, known)}; see python -m qbench --help"


def close() -> None:
    """Forget Hydra's global state, so that another command line can be composed in this process."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()


def _hydra(config_dir: str | None) -> Hydra:
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    version.setbase("1.3")
    search_path = create_config_search_path(str(conf_folder()))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UsageError(f"--config-dir {config_dir}: no such folder")
        query = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{Path(config_dir).resolve()}", anchor=query)
    close()
    return Hydra.create_main_hydra2("qbench", search_path)


def _job(config: DictConfig, overrides: list[str]) -> Job:
    from omegaconf import OmegaConf

    choices = {name: value for name, value in config.hydra.runtime.choices.items() if "/" not in name}
    content = {name: config._get_node(name) for name in config if name != "hydra"}
    values = OmegaConf.to_container(OmegaConf.create(content), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return Job({str(name): value for name, value in values.items()}, choices, tuple(overrides))


def _key(override: str) -> str:
    """`+sweep=all` -> `sweep`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _known_keys() -> list[str]:
    groups = [path.name for path in conf_folder().iterdir() if path.is_dir() and path.name != "sweep"]
    return [*groups, *RECIPE_VALUES, "results", "force", "dry_run"]


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
