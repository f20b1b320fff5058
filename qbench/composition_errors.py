"""What Hydra refuses, in one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qbench.config import RECIPE_VALUES, RUN_VALUES, UsageError, conf_folder, one_line

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

HELP = "see python -m qbench --help"


@contextlib.contextmanager
def one_line_errors(loader: ConfigLoader | None) -> Iterator[None]:
    """Turn whatever Hydra or OmegaConf raises inside into a UsageError of one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except UsageError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise UsageError(_explain(error, loader)) from error


def _explain(error: Exception, loader: ConfigLoader | None) -> str:
    from hydra.errors import OverrideParseException

    text = f"{error} {error.__cause__ or ''}"
    if isinstance(error, OverrideParseException):
        return not_understood(error.override)
    if found := re.search(r"Could not find '([\w/]+)/([^/']*)'", text):
        options = [] if loader is None else sorted(loader.get_group_options(found[1]))
        return f"{found[1]}={found[2]}: allowed are {', '.join(options)}{_hint(found[2], options)}"
    if found := re.search(r"(?:Could not override|Could not append[^']*) '([^']+)'", text):
        return unknown_key(found[1])
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found[1]} is missing: give {found[1]}=..."
    if found := re.search(r"Ambiguous value for argument '([^']+)'|Sweep parameters '([^']+)'", text):
        return f"{found[1] or found[2]} is a sweep: add -m, or give a list in brackets, such as [a,b]"
    return one_line(text)


def unknown_key(key: str) -> str:
    """The line for a key that no configuration has."""
    if key.lstrip("+") == "sweep":
        return "sweep=...: write +sweep=..., it is added to the configuration"
    known = [*known_keys(), "sweep"]
    if key in known:
        return f"{key}: the value does not fit; {HELP}"
    where = " with these choices" if "." in key else ""
    return f"unknown option {key!r}{where}{_hint(key, known)}; {HELP}"


def not_understood(override: str) -> str:
    """The line for what is not key=value."""
    return f"{override!r} is not understood; write key=value, {HELP}"


def key_of(override: str) -> str:
    """`+sweep=all` -> `sweep`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def groups() -> list[str]:
    """The groups of which each cell has one choice."""
    return sorted(path.name for path in conf_folder().iterdir() if path.is_dir() and path.name != "sweep")


def known_keys() -> list[str]:
    """Every key at the top of a composed configuration."""
    return [*groups(), *RECIPE_VALUES, *RUN_VALUES]


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
