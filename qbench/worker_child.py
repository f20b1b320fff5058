"""The life of a child process: what `qbench.workers` starts.

It has its own process group, writes what it prints to a log file, answers with JSON through a pipe, and dies with its
parent.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection, process
from typing import Any

from qbench.sources import PROJECT_PACKAGES

PRELOAD = ["torch", "torchvision", "hydra.utils", "qbench.evaluate", "qbench.measure"]
LONGEST_SENTENCE = 600


def serve(pipe: connection.Connection) -> None:
    """The whole life of a child of the fork server."""
    os.setpgid(0, 0)  # Ctrl-C goes to the parent alone, which then ends this group
    gc.freeze()  # what is loaded stays: it takes a quarter of a second to look for garbage in it
    parent = multiprocessing.parent_process()
    assert parent is not None
    _answer(pipe, _request(pipe), parent)


def serve_others(pipe: connection.Connection, first: tuple[str, dict[str, Any], str] | None = None) -> None:
    """The life of a server: says that it has loaded torch, and made its `first` call (function, arguments, log).

    Then, again and again, a child answers, and it says that this has ended.
    """
    os.setpgid(0, 0)
    for module in PRELOAD:
        importlib.import_module(module)
    if first is not None:
        function, arguments, log = first
        _redirect_output(log)
        _set_threads(1)
        try:
            _function(function)(**arguments)
        except Exception:  # noqa: BLE001 - children do it again, and answer for it
            traceback.print_exc()
    gc.freeze()
    pipe.send_bytes(b"loaded")
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        child = multiprocessing.get_context("fork").Process(target=_answer, args=(pipe, _request(pipe), parent))
        child.start()
        child.join()
        pipe.send_bytes(json.dumps({"ended": child.exitcode}).encode())


def _request(pipe: connection.Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError:  # nobody asks any more
        os._exit(0)


def _answer(pipe: connection.Connection, request: bytes, parent: process.BaseProcess) -> None:
    """Call what is asked, and send what it returns, or how it failed; end with the parent."""
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    function, arguments, log, threads = json.loads(request)
    _redirect_output(log)
    if threads is not None:
        _set_threads(threads)
    try:
        target = _function(function)
        listens = "say" in inspect.signature(target).parameters
        say = {"say": lambda text: pipe.send_bytes(json.dumps({"say": text}).encode())} if listens else {}
        answer = json.dumps({"result": target(**arguments, **say)}, allow_nan=False)
    except Exception as error:  # noqa: BLE001 - whatever a cell raises becomes its record
        traceback.print_exc()
        answer = json.dumps(_failure(error))
    pipe.send_bytes(answer.encode())


def _function(name: str) -> Callable[..., Any]:
    module, _, name = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _set_threads(number: int) -> None:
    import torch  # loaded by the server

    torch.set_num_threads(number)


def _die_with(parent: process.BaseProcess) -> None:
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _redirect_output(log: str) -> None:
    """Send everything this process and its libraries print to the log, a crash's Python stack included."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    # The fork server has Python's own stdout and stderr; make them write line by line to the log.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)


def _failure(error: Exception) -> dict[str, Any]:
    """The error on one line; errors that are not written for readers carry their type."""
    ours = _is_ours(type(error).__module__) or _is_ours(_raised_in(error))
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory: {text}"
    elif not (ours and isinstance(error, ValueError | RuntimeError)):
        text = f"{type(error).__name__}: {text}"
    return {
        "error": text if len(text) <= LONGEST_SENTENCE else text[:LONGEST_SENTENCE] + " ...",
        "types": [base.__name__ for base in type(error).__mro__],
        "misuse": ours and isinstance(error, ValueError),
    }


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in PROJECT_PACKAGES


def _raised_in(error: Exception) -> str:
    """The module whose code raised the error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
