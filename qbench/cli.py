"""The command line: `python -m qbench`. Exit codes: 0 all well, 1 a cell failed, 2 misuse, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qbench import interrupts
from qbench.config import UsageError, conf_folder, instantiate, one_line, use_project_tasks

__all__ = ["instantiate_task", "main", "use_project_tasks"]

OK, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130
instantiate_task = instantiate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with interrupts.noticed():
            return _main(given)
    except KeyboardInterrupt:
        print("qbench: interrupted; what is finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, `head` say, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (UsageError, OSError) as error:
        print(f"qbench: {one_line(error)}", file=sys.stderr)
        return MISUSE


def _main(given: list[str]) -> int:
    from qbench import workers
    from qbench.compose import Composer
    from qbench.sweep import run_sweep
    from qbench.tracking import TrackingError

    parser = _parser()
    arguments = parser.parse_args(given)
    composer = Composer(arguments)  # composed once, before anything runs: whatever Hydra refuses ends here
    if arguments.help:
        composer.print_help(parser, arguments)
        return OK
    if _asks_hydra(arguments):
        return _hydra_main(given)
    try:
        return run_sweep(composer)
    except TrackingError as error:
        raise UsageError(str(error)) from error
    finally:
        workers.stop()


def _parser() -> argparse.ArgumentParser:
    """Hydra's flags; a wrong one is a UsageError instead of a page of usage."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m qbench --help")

    parser = get_args_parser()
    parser.prog = "python -m qbench"
    parser.error = refuse  # type: ignore[method-assign]
    return parser


def _asks_hydra(arguments: argparse.Namespace) -> bool:
    """Is it one of the questions that Hydra itself answers?"""
    return any((arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion))


def _hydra_main(given: list[str]) -> int:
    import hydra

    from qbench.compose import close

    close()
    sys.argv = ["qbench", *given]
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(lambda config: None)()
    return OK
