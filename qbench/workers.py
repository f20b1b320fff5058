"""Child processes: each stage of a cell runs in a fresh one, from a fork server that has torch loaded (0.04 s a child).

A child has its own process group, writes what it prints to a log file, answers with JSON through a pipe, and dies with
its parent. The parent sleeps while it waits. Whatever happens to a child becomes one WorkerError.

The children of one fork server are alike by some percent of a network's time (docs/gate/study.md), probably as
libraries lie at the same places: those that are to be a sample come from servers of their own, by number.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from multiprocessing import connection, forkserver, process, util
from pathlib import Path
from typing import Any, TypeVar

from qbench import interrupts
from qbench.worker_child import PRELOAD, serve, serve_others

Say = Callable[[str], None]
T = TypeVar("T")
Child = tuple[process.BaseProcess, connection.Connection]

CAPTURE = ["torch.export._trace"]  # what torch.export loads late, 0.4 s; the fork server alone captures networks
PAIR = 2  # servers of a number that load torch side by side; one is used at a time
KEPT = 2  # of them, 0.4 GB each: what nobody has asked for longest ends
LOADING_S = 300.0  # how long that may take
TICK_S = 2.0  # how often a waiting parent repeats the last word of a child
LEAVE_S = 10.0  # how long a child that has answered may take to exit

_running: set[process.BaseProcess] = set()
_servers: dict[int, Child] = {}  # those of a number that rest, the one that was used last at the end
_warmed: dict[str, Child] = {}  # those that have called a function, and rest
_stopped = threading.Event()
# Threads take turns at starting the fork server, which reads the environment, and at asking whether children live:
# multiprocessing asks it of all of them when it starts one, and an exit code is read once.
_turn = threading.RLock()


class WorkerError(RuntimeError):
    """A child that gave no result; the message is one sentence.

    `types` names the exception and its bases, if it was one; `misuse` says that it was the input's fault: a ValueError
    which the project raised on purpose.
    """

    def __init__(self, sentence: str, types: tuple[str, ...] = (), misuse: bool = False) -> None:
        super().__init__(sentence)
        self.types, self.misuse = types, misuse


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *CAPTURE])
    return context


def warm_up() -> None:
    """Start the fork server, which loads torch while the caller goes on."""
    with _turn:
        _context()
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11 does not tell it where modules are found
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def stop() -> None:
    """End what nobody needs any more; the fork server would otherwise finish loading torch before it sees that."""
    end_servers()
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def end_servers(left: int = 0) -> None:
    """End the servers of a number, but for the `left` that were used last."""
    while len(_servers) > left:
        child, pipe = _servers.pop(next(iter(_servers)))
        _end(child)
        pipe.close()


util.Finalize(None, end_servers, exitpriority=0)  # before multiprocessing waits for them


def side_by_side(calls: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What each of the calls returns, `at_once` of them at a time, each on a thread of its own.

    When one raises, or the caller is interrupted, the others do not begin, and their children end.
    """
    futures: list[Future[T]] = []
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for call in calls:
                futures.append(pool.submit(call))
            with interrupts.welcome():
                done = wait(futures, return_when=FIRST_EXCEPTION).done
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            _stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for child in list(_running):
                    _kill(child)
                time.sleep(0.1)
            _stopped.clear()
            raise


def go_on() -> None:
    """For a call that waits for something else than a child: raises WorkerError where `side_by_side` has stopped."""
    if _stopped.is_set():
        raise WorkerError("stopped")


def run(
    function: str,
    arguments: dict[str, Any],
    *,
    log: Path,
    say: Say | None = None,
    timeout_s: float | None = None,
    threads: int | None = None,
    server: int | str = 0,
) -> dict[str, Any]:
    """Call `package.module:function(**arguments)` in a child, where torch has `threads` threads (None: all).

    Children of two servers have nothing in common. Those from 1 on take seconds to load torch, once, and serve one
    caller at a time; 0 is the fork server, a name one of `warmed`. Arguments and result are JSON. A function with a
    parameter `say` gets one; its texts arrive at `say` here, and the last one again every TICK_S.
    Raises WorkerError for an exception, a crash or a time-out in the child.
    """
    go_on()
    log.parent.mkdir(parents=True, exist_ok=True)
    (child, pipe), serves = _taken(server)
    rests = False
    try:
        _running.add(child)
        with contextlib.suppress(ConnectionError):  # of a child that has died, of which _wait tells
            pipe.send_bytes(json.dumps([function, arguments, str(log), threads]).encode())
        answer = _wait(child, pipe, say or (lambda text: None), timeout_s)
        if serves:
            rests = _has_ended(pipe)
        else:
            _exit_code(child, LEAVE_S)
    finally:
        _running.discard(child)
        if rests:
            _rest(server, (child, pipe))
        else:
            _end(child)
            pipe.close()
    if "error" in answer:
        raise WorkerError(answer["error"], tuple(answer["types"]), answer["misuse"])
    result: dict[str, Any] = answer["result"]
    return result


@contextlib.contextmanager
def warmed(function: str, arguments: dict[str, Any], *, log: Path, timeout_s: float | None) -> Iterator[str]:
    """The name of a server whose children find what a call in it has left behind: what each would have to do first.

    It runs on one thread: threads would be lost on those who start from there. Where the call fails, children do
    without; where it crashes, or takes too long, they come from the fork server.
    """
    go_on()
    warm_up()
    child, pipe = _start(_context(), serve_others, (function, arguments, str(log)))
    name = f"{function} {child.pid}"
    _running.add(child)
    try:
        with contextlib.suppress(EOFError, ConnectionResetError):
            if pipe.poll(timeout_s):
                pipe.recv_bytes()
                _warmed[name] = child, pipe
        yield name
    finally:
        _running.discard(child)
        _warmed.pop(name, None)
        _end(child)
        pipe.close()


def _taken(server: int | str) -> tuple[Child, bool]:
    """A child to ask, and whether it is a server that rests again afterwards."""
    if isinstance(server, str) and server in _warmed:
        return _warmed.pop(server), True
    if isinstance(server, int) and server > 0:
        return _server(server), True
    return _forked(), False


def _rest(server: int | str, child: Child) -> None:
    if isinstance(server, str):
        _warmed[server] = child
    else:
        _servers[server] = child
        end_servers(left=KEPT)


def _start(context: multiprocessing.context.BaseContext, life: Callable[..., None], *arguments: Any) -> Child:
    """A child that waits for its request at the other end of the pipe."""
    pipe, its_end = context.Pipe()
    child = context.Process(target=life, args=(its_end, *arguments))  # type: ignore[attr-defined]
    with its_end, _turn:
        child.start()
    return child, pipe


def _forked() -> Child:
    """A child of the fork server."""
    warm_up()
    return _start(_context(), serve)


def ready(number: int) -> None:
    """See that the server of a number rests: else a PAIR is started, which load torch before anything is measured."""
    for dead in [n for n, (child, _) in _servers.items() if _exit_code(child, 0) is not None]:
        _servers.pop(dead)[1].close()  # something has ended it as it rested
    if number in _servers:
        return
    try:
        new = [n for n in range(number, number + PAIR) if n not in _servers]
        _servers.update({n: _start(multiprocessing.get_context("spawn"), serve_others) for n in new})
        for child, pipe in [_servers[n] for n in new]:
            with interrupts.welcome():
                loaded = pipe.poll(LOADING_S)
            if not loaded:
                raise WorkerError(f"took more than {LOADING_S:g} s to load torch")
            try:
                pipe.recv_bytes()
            except EOFError:
                raise WorkerError(f"while it loaded torch, {_death(_exit_code(child, LEAVE_S))}") from None
    except BaseException:
        end_servers()
        raise


def _server(number: int) -> Child:
    """The server of a number, out of those that rest."""
    ready(number)
    return _servers.pop(number)


def _has_ended(pipe: connection.Connection) -> bool:
    """Does a server say in time that the child that has answered is gone?"""
    try:
        return pipe.poll(LEAVE_S) and "ended" in json.loads(pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False


def _wait(child: process.BaseProcess, pipe: connection.Connection, say: Say, timeout_s: float | None) -> dict[str, Any]:
    """Pass on what the child says until it answers; sleep in between."""
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    text = ""
    while (left := deadline - time.monotonic()) > 0:
        with interrupts.welcome():
            signalled = connection.wait([pipe, child.sentinel], timeout=min(TICK_S, left))
        if pipe in signalled:
            try:
                message: dict[str, Any] = json.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                break
            if "ended" in message:
                raise WorkerError(_death(message["ended"]))
            if "say" not in message:
                return message
            text = message["say"]
        elif signalled:
            break
        say(text)
    else:
        raise WorkerError(f"stopped after {timeout_s:g} s, the limit measure.timeout_s")
    raise WorkerError(_death(_exit_code(child, LEAVE_S)))


def _exit_code(child: process.BaseProcess, seconds: float | None = None) -> int | None:
    """Of a child that ends within these seconds; None of one that does not."""
    ended = connection.wait([child.sentinel], seconds)
    with _turn:
        if ended:
            child.join()  # a spawned one closes its pipe somewhat before it is gone
        return child.exitcode


def _death(exitcode: int | None) -> str:
    """How a child ended that never answered."""
    if exitcode is None:
        return "closed its pipe without an answer"
    if exitcode >= 0:
        return f"ended with exit code {exitcode} without an answer"
    name = signal.Signals(-exitcode).name
    if -exitcode == signal.SIGKILL:
        return f"killed ({name}), probably out of memory"
    return f"crashed ({name}: {(signal.strsignal(-exitcode) or 'unknown').lower()})"


def _end(child: process.BaseProcess) -> None:
    """End a child that still runs, and what it started itself."""
    if child.pid is not None and _exit_code(child, 0) is None:
        _kill(child)
        _exit_code(child)


def _kill(child: process.BaseProcess) -> None:
    """Kill a child's process group, or the child alone where it has not made one yet."""
    assert child.pid
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child.pid, signal.SIGKILL)
