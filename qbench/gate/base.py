"""The other side of `--qbench-base=REV`: the revision in a worktree, measured by its own code in processes of its own.

The gate talks to a `BaseSide`; this module run as a program (`python -m qbench.gate.base`, in the worktree) answers, a
line of JSON for a line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qbench.config import UsageError
from qbench.gate.baseline import Baseline, BaselineError
from qbench.native import sources

BUILD_S = 900.0
FORM = 2  # of the requests and of what a process times: two sides of one form are comparable
SOURCES = (".cpp", ".h", ".inc", ".py")  # of the engine and its build


class BaseSide:
    """A revision of the repository that holds `root`, built and ready to be measured. `close` ends its process.

    `overrides`, `config_dir` (relative to `root`) and `sweep` are those of the gate; its records go to
    `results`/base/REVISION, trained weights are shared. Raises UsageError, with one line, for what git refuses.
    """

    def __init__(
        self, revision: str, root: Path, overrides: Sequence[str], config_dir: str | None, results: Path, sweep: str
    ) -> None:
        top = Path(_git(root, "rev-parse", "--show-toplevel"))
        self.revision = commit(revision, root)
        place = results.resolve() / "base" / self.revision[:12]
        tree = place / "tree"
        if not tree.exists():
            _git(root, "worktree", "prune")
            _git(root, "worktree", "add", "--detach", "--force", str(tree), self.revision)
        self._root, self._tree = root, tree
        self._process: subprocess.Popen[str] | None = None
        try:
            self._start(top, place, overrides, config_dir, results, sweep)
        except BaseException:
            self.close()
            raise

    def _start(
        self, top: Path, place: Path, overrides: Sequence[str], config_dir: str | None, results: Path, sweep: str
    ) -> None:
        """Build what the revision needs and start the process that answers."""
        tree = self._tree
        _build_engine(tree)
        share_cache(place / "results", results)
        asked = {
            "overrides": list(overrides),
            "config_dir": config_dir,
            "results": str(place / "results"),
            "sweep": sweep,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qbench.gate.base", json.dumps(asked)],
            cwd=tree / self._root.resolve().relative_to(top.resolve()),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_moved(sys.path, top.resolve(), tree))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._ask(do="where")
        if found.get("form") != FORM:
            raise UsageError(
                f"--qbench-base: revision {self.revision[:12]} has a gate of another kind: take a later one"
            )
        code = Path(found["qbench"])
        if (tree / "qbench" / "gate").is_dir() and not code.is_relative_to(tree):
            raise UsageError(f"--qbench-base: the revision would run the code in {code}, not its own")

    def begin(self, names: Sequence[str]) -> None:
        """Quantize, score and weigh the cells of these names there."""
        self._ask(do="begin", names=list(names))

    def time(self, names: Sequence[str], index: int) -> None:
        """Time cells in one more fresh process there."""
        self._ask(do="time", names=list(names), index=index)

    def baselines(self, names: Sequence[str]) -> dict[str, Baseline | BaselineError | None]:
        """What has been found of them; None of a cell that the revision does not have."""
        found = self._ask(do="baselines", names=list(names))
        return {name: _side(found.get(name)) for name in names}

    def operations(self, name: str) -> dict[str, float]:
        """Milliseconds of each operation of a cell there; empty where the revision cannot tell."""
        found = self._ask(do="operations", names=[name]).get("operations")
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """End the process and remove the worktree."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes, reaps it
        _git(self._root, "worktree", "remove", "--force", str(self._tree))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "null")
        except (BrokenPipeError, ValueError):
            answer = None
        if not isinstance(answer, dict):
            raise UsageError(f"--qbench-base: revision {self.revision[:12]} cannot be measured: it has no such gate")
        if "error" in answer:
            raise UsageError(f"--qbench-base: revision {self.revision[:12]}: {answer['error']}")
        found: dict[str, Any] = answer["found"]
        return found


def commit(revision: str, root: Path) -> str:
    """The hash of a revision of the repository that holds a folder. Raises UsageError where there is none."""
    if revision.startswith("-"):
        raise UsageError(f"--qbench-base={revision}: give a revision, such as HEAD~1 or origin/main")
    return _git(root, "rev-parse", "--verify", f"{revision}^{{commit}}")


def committed(path: Path) -> str | None:
    """The revision in which a file was last committed as it is now; None where git does not know that."""
    try:
        if _git(path.parent, "status", "--porcelain", "--", path.name):
            return None
        revision = _git(path.parent, "log", "-1", "--format=%H", "--", path.name)
        # A shallow clone's oldest revision seems to have brought in every file.
        shallow = path.parent / _git(path.parent, "rev-parse", "--git-path", "shallow")
        return None if shallow.exists() and revision in shallow.read_text().split() else revision or None
    except (UsageError, OSError):
        return None


def _side(content: Mapping[str, Any] | None) -> Baseline | BaselineError | None:
    if content is None:
        return None
    if "failed" in content:
        return BaselineError(content["failed"])
    try:
        return Baseline(**content)
    except TypeError as error:
        return BaselineError(f"its gate has another form of baseline ({error})")


def share_cache(place: Path, results: Path) -> None:
    """A results folder of its own with the trained weights of another one."""
    (results / "cache").mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "cache").is_symlink():
        (place / "cache").symlink_to((results / "cache").resolve())


def _moved(paths: Sequence[str], top: Path, tree: Path) -> list[str]:
    """Where modules are found, with what lies in the repository looked for in the worktree (an environment is not)."""
    found = []
    for path in (Path(text).resolve() for text in paths):
        twin = tree / path.relative_to(top) if path.is_relative_to(top) else path
        found.append(str(twin if twin.exists() else path))
    return found


def _as_json(side: Baseline | BaselineError | None) -> dict[str, Any] | None:
    return None if side is None else {"failed": str(side)} if isinstance(side, BaselineError) else vars(side)


def _git(folder: Path, *arguments: str) -> str:
    try:
        ended = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"--qbench-base needs git: {error.strerror}") from error
    if ended.returncode:
        reason = ended.stderr.strip().splitlines() or ["no such revision"]
        raise UsageError(f"--qbench-base: git {' '.join(arguments[:2])}: {reason[-1]}")
    return ended.stdout.strip()


def _build_engine(tree: Path) -> None:
    """Where the repository is qbench itself, the revision's engine from the revision's sources."""
    folder = tree / "qbench" / "native"
    if not (folder / "build.py").exists():
        return
    if sources.built() and _alike(folder, sources.FOLDER):
        shutil.copy(sources.LIBRARY, folder)  # as a build would make it
        return
    command = [sys.executable, "-m", "qbench.native.build"]
    try:
        ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"--qbench-base: building the engine took more than {BUILD_S:g} s") from error
    if ended.returncode:
        raise UsageError(f"--qbench-base: the engine of the revision cannot be built: {ended.stderr.strip()[-300:]}")


def _alike(folder: Path, other: Path) -> bool:
    """Do two folders have the same source files?"""
    sides = [
        {path.name: path.read_bytes() for path in one.iterdir() if path.suffix in SOURCES} for one in (folder, other)
    ]
    return sides[0] == sides[1]


def _serve(asked: Mapping[str, Any]) -> None:
    """Answer requests until the input ends. Whatever is printed meanwhile goes to stderr."""
    from qbench import workers
    from qbench.gate.side import Side

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = Side(asked["overrides"], asked["config_dir"], Path(asked["results"]), asked["sweep"])
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                found: dict[str, Any] = {"qbench": str(Path(__file__).resolve()), "form": FORM}
                if request["do"] == "where":
                    pass
                elif request["do"] == "begin":
                    side.begin(request["names"])
                elif request["do"] == "time":
                    side.time(request["names"], request["index"])
                elif request["do"] == "operations":
                    found["operations"] = side.operations(*request["names"])
                else:
                    found = {name: _as_json(one) for name, one in side.baselines(request["names"]).items()}
                answers.write(json.dumps({"found": found}) + "\n")
            except (UsageError, ValueError, OSError, RuntimeError) as error:
                answers.write(json.dumps({"error": " ".join(str(error).split())}) + "\n")
    finally:
        workers.stop()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
