"""From a command line to composed configurations, and back to Hydra's launcher."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.backends import FALLBACK, PREFERRED, WITHOUT_ENGINE
from qbench.composition_errors import groups, key_of, known_keys, not_understood, one_line_errors, unknown_key
from qbench.config import UsageError, conf_folder
from qbench.native import sources

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Job:
    """One composed configuration: plain values, the choice in each group, and the overrides that lead to it."""

    values: dict[str, Any]
    choices: dict[str, str]
    overrides: tuple[str, ...]


class Composer:
    """Hydra, set up for one command line. Every method raises UsageError with one line for what Hydra refuses."""

    def __init__(self, arguments: Namespace) -> None:
        sweeps = [key_of(text) for text in arguments.overrides].count("sweep")
        self.multirun = arguments.multirun or sweeps > 0
        self.config_dir: str | None = arguments.config_dir
        self.notices: list[str] = []  # what the user should know of the jobs, once they are composed
        self._overrides = list(arguments.overrides)
        for text in arguments.overrides:
            if not key_of(text):
                raise UsageError(not_understood(text))
        if sweeps > 1 or any("," in text for text in arguments.overrides if key_of(text) == "sweep"):
            raise UsageError("one sweep at a time: run them one after the other, finished cells are not run again")
        with one_line_errors(None):
            self._hydra = _hydra(arguments.config_dir)
        self._loader = self._hydra.config_loader
        with one_line_errors(self._loader):
            self._master = self._compose_master()

    def jobs(self) -> Iterator[Job]:
        """Every combination that the command line asks for, composed.

        Hydra takes 0.1 s for each. Where no two of the varied overrides touch the same part of the configuration, each
        of their values is composed once, and the combinations are put together from the parts.
        """
        for start, *others in self._combinations():
            first = self.job(start)
            yield first
            changes = self._changes(first, others)
            for overrides in others:
                yield self.job(overrides) if changes is None else _put_together(first, changes, overrides)

    def _changes(self, first: Job, others: Sequence[Sequence[str]]) -> dict[tuple[int, str], Job] | None:
        """What each override that differs from the first job's changes, by its place; None where they touch."""
        changes: dict[tuple[int, str], Job] = {}
        owners: dict[str, int] = {}
        for place, text in dict.fromkeys(entry for overrides in others for entry in enumerate(overrides)):
            if text == first.overrides[place]:
                continue
            varied = self.job([*first.overrides[:place], text, *first.overrides[place + 1 :]])
            changes[place, text] = change = _difference(first, varied)
            if any(owners.setdefault(name, place) != place for name in {*change.values, *change.choices}):
                return None
        return changes

    def job(self, overrides: Sequence[str]) -> Job:
        """One combination, composed."""
        with one_line_errors(self._loader):
            config = self._loader.load_sweep_config(self._master, list(overrides))
            job = _job(config, overrides)
        self._check(job)
        return job

    def _check(self, job: Job) -> None:
        """Nothing is accepted and ignored: exactly the known keys, and one choice in each group."""
        if unknown := set(job.values) - set(known_keys()):
            raise UsageError(unknown_key(unknown.pop()))
        if job.choices.get("backend") == "native" and not sources.built():
            raise UsageError(f"backend=native: {sources.WHY_NOT}; {sources.CURE}")
        for group in groups():
            if group not in job.choices or group not in job.values:
                raise UsageError(f"{group}: give exactly one, such as {group}=...; several with -m {group}=...,...")

    def launch(self, jobs: Sequence[Sequence[str]], function: Callable[[tuple[str, ...]], object], first: int) -> None:
        """Run jobs, given by their overrides, through the configured Hydra launcher; `first` numbers the first."""
        from hydra._internal.callbacks import Callbacks
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext

        context = HydraContext(config_loader=self._loader, callbacks=Callbacks(self._master))
        with one_line_errors(self._loader):
            launcher = Plugins.instance().instantiate_launcher(context, _Launched(function), self._master)
        for result in launcher.launch([list(overrides) for overrides in jobs], initial_job_idx=first):
            _ = result.return_value  # raises what was no cell's failure: Ctrl-C, a full disk, an error of our own

    def print_help(self, parser: Any, arguments: Namespace) -> None:
        """Print the help text of config.yaml with the groups and values of this command line."""
        self._hydra.app_help(config_name="config", args_parser=parser, args=arguments)

    def _compose_master(self) -> DictConfig:
        from hydra.types import RunMode

        mode = RunMode.MULTIRUN if self.multirun else RunMode.RUN
        return self._hydra.compose_config("config", self._overrides, mode, with_log_configuration=False)

    def _combinations(self) -> list[list[list[str]]]:
        """By product, one list of overrides a job: the sweep's parameters, its line's, the command line's.

        Of two overrides of one thing the later wins.
        """
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        sweeper = self._master.hydra.sweeper
        if not sweeper["_target_"].endswith(".BasicSweeper"):
            raise UsageError(f"hydra/sweeper: {sweeper['_target_']} is not supported; qbench sweeps with the basic one")
        own = [override for override in self._overrides if not override.lstrip("+~").startswith("hydra")]
        if not self.multirun:
            return [[[*self._without_engine(own), *own]]]
        shared = [f"{name}={value}" for name, value in (sweeper.params or {}).items()]
        products = []
        with one_line_errors(self._loader):
            parser = OverridesParser.create(config_loader=self._loader)
            for line in self._lines():
                texts = [*shared, *line, *own]
                parsed = parser.parse_overrides([*self._without_engine(texts), *texts])
                products.append(BasicSweeper.split_arguments(parsed, None)[0])
        return products

    def _without_engine(self, overrides: Sequence[str]) -> list[str]:
        """`backend=reference` where the engine is not built and native the default, not what somebody asks for."""
        chosen = self._master.hydra.runtime.choices.get("backend")
        if sources.built() or chosen != PREFERRED or any(key_of(text) == "backend" for text in overrides):
            return []
        self.notices = [WITHOUT_ENGINE]
        return [f"backend={FALLBACK}"]

    def _lines(self) -> list[list[str]]:
        """The lines of `cells`: what one product cannot say. Without any, one product with nothing of its own."""
        lines = self._master.cells
        if lines is None:
            return [[]]
        if not isinstance(lines, Sequence) or isinstance(lines, str) or not all(isinstance(li, str) for li in lines):
            raise UsageError(f"cells={lines}: a sweep's YAML gives a list of lines, such as - method=ptsq,woq")
        return [line.split() for line in lines]


@dataclass(frozen=True)
class _Launched:
    """What a launcher calls, perhaps in another process: passes the job's overrides on."""

    function: Callable[[tuple[str, ...]], object]

    def __call__(self, config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        self.function(tuple(HydraConfig.get().overrides.task))


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


def _difference(first: Job, other: Job) -> Job:
    """The parts of `other` that differ from `first`."""
    values = {name: value for name, value in other.values.items() if value != first.values.get(name)}
    choices = {name: choice for name, choice in other.choices.items() if choice != first.choices.get(name)}
    return Job(values, choices, other.overrides)


def _put_together(first: Job, changes: Mapping[tuple[int, str], Job], overrides: Sequence[str]) -> Job:
    values, choices = dict(first.values), dict(first.choices)
    for entry in enumerate(overrides):
        if entry in changes:
            values |= changes[entry].values
            choices |= changes[entry].choices
    return Job(values, choices, tuple(overrides))


def _job(config: DictConfig, overrides: Sequence[str]) -> Job:
    from omegaconf import OmegaConf

    choices = {name: value for name, value in config.hydra.runtime.choices.items() if "/" not in name}
    content = {name: config._get_node(name) for name in config if name != "hydra"}
    values = OmegaConf.to_container(OmegaConf.create(content), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return Job({str(name): value for name, value in values.items()}, choices, tuple(overrides))
