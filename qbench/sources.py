"""Which source files a cell runs: the import closure, read from the files without importing anything.

Followed are the packages qbench and tasks, and the modules that lie beside a user's own task.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
PROJECT_PACKAGES = ("qbench", "tasks")


def closure(modules: Iterable[str]) -> dict[str, Path]:
    """Module name -> file of everything the modules import, directly or not, themselves included."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = None if name in found else locate(name)
        if path is not None:
            found[name] = path
            waiting += [*_parents(name), *imports(path, name)]
    return dict(sorted(found.items()))


def modules_of_targets(config: Any) -> list[str]:
    """The modules that the `_target_` entries of a configuration name, at any depth."""
    if isinstance(config, Mapping):
        own = [_module_of(config["_target_"])] if "_target_" in config else []
        return [name for name in own if name] + [
            name for value in config.values() for name in modules_of_targets(value)
        ]
    if isinstance(config, list | tuple):
        return [name for value in config for name in modules_of_targets(value)]
    return []


def locate(name: str) -> Path | None:
    """The file of a module in the project or beside a user's task; None for everything installed."""
    top, *rest = name.split(".")
    folder = PROJECT if top in PROJECT_PACKAGES else _user_folder(top)
    return None if folder is None else _file(folder.joinpath(top, *rest))


def imports(path: Path, name: str) -> tuple[str, ...]:
    """The modules that a file imports anywhere, lazily or not, save those that only a type checker sees."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_imports(ast.parse(path.read_bytes()), package))


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = (
            importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
        )
        yield base or package
        yield from (f"{base}.{alias.name}" for alias in node.names)  # an attribute is found to be no module later
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for branch in node.orelse:
            yield from _imports(branch, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package)


def _module_of(target: str) -> str | None:
    """`pkg.module.Class.method` -> `pkg.module`, the longest prefix that is a file."""
    parts = target.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if locate(prefix)), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _file(stem: Path) -> Path | None:
    candidates = (stem / "__init__.py", stem.with_name(stem.name + ".py"))
    return next((path for path in candidates if path.is_file()), None)


def _user_folder(top: str) -> Path | None:
    """The folder of a top-level module that is neither ours, nor Python's, nor installed."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    path = Path(spec.origin).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    standard = path.is_relative_to(Path(ast.__file__).resolve().parent)
    if installed or standard:
        return None
    return path.parent.parent if path.name == "__init__.py" else path.parent
