"""`python -m qbench.train [TASK ...]`: train the tasks whose weights are kept in a file, and write the files anew.

A task keeps its weights when it has a `checkpoint` (see `qbench.task.Task`). Without names: every such task of conf.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qbench.config import UsageError, conf_folder, one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, or 2 for a name that cannot be trained."""
    parser = argparse.ArgumentParser("python -m qbench.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", nargs="*", help="a task of conf/task with a checkpoint (default: all of them)")
    names = parser.parse_args(arguments).task
    try:
        for name in names or kept_tasks():
            make(name)
    except (UsageError, OSError) as error:
        print(f"qbench: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def kept_tasks() -> list[str]:
    """The tasks of conf whose YAML names a checkpoint."""
    files = sorted((conf_folder() / "task").glob("*.yaml"))
    return [path.stem for path in files if "\ncheckpoint: " in path.read_text(encoding="utf-8")]


def make(name: str) -> None:
    """Train one task and write its checkpoint. Raises UsageError for a task without one."""
    from qbench.compose import Composer, close
    from qbench.weights import task_of, train

    composer = Composer(argparse.Namespace(multirun=False, overrides=[f"task={name}"], config_dir=None))
    (job,) = composer.jobs()
    close()
    task = task_of(job.values["task"], Path("results") / "cache")
    if task.checkpoint is None:
        raise UsageError(f"{name} keeps no weights in a file; tasks that do: {', '.join(kept_tasks())}")
    train(task, task.build(), task.checkpoint, lambda text: print(f"{name}: {text}", flush=True))
    print(f"{name}: {task.checkpoint}, {task.checkpoint.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
