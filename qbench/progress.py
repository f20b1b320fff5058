"""What a person sees while cells run: which one, how far, how many are left, how long; and each result as it ends.

The moving line goes to stderr, results to stdout, so that a file of the output holds results only.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TextIO

from qbench.plan import Cell
from qbench.record import Record

QUIET_S = 10.0  # between two progress lines where a line cannot be rewritten
REDRAW_S = 0.5  # between two states of a rewritten line


class Pace:
    """How long cells take, learnt from the finished ones: of the same task and method if there are any."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Learn from a finished cell."""
        if record.status == "ok":
            for group in (record.task, record.method), (record.method,), ():
                self._seconds[group].append(record.seconds)

    def expect(self, cells: Sequence[Cell]) -> float | None:
        """Seconds for these cells; None when nothing has been learnt."""
        if not self._seconds:
            return None
        return sum(self._expect_one(cell.job.choices["task"], cell.recipe.method.name) for cell in cells)

    def _expect_one(self, task: str, method: str) -> float:
        group = next(group for group in ((task, method), (method,), ()) if group in self._seconds)
        return statistics.mean(self._seconds[group])


class Progress:
    """One moving line. On a terminal it is rewritten; elsewhere a new one comes at most every QUIET_S seconds."""

    def __init__(self, moving: TextIO | None = None, results: TextIO | None = None) -> None:
        self._moving, self._results = moving or sys.stderr, results or sys.stdout
        self._rewrites = self._moving.isatty()
        self._title = self._rest = self._text = ""
        self._started = self._shown = 0.0

    def begin(self, title: str, rest: str = "") -> None:
        """Start a piece of work; `rest` says what is left after it."""
        self._title, self._rest, self._text = title, rest, ""
        self._started, self._shown = time.monotonic(), 0.0
        self.say("")

    def say(self, text: str) -> None:
        """How far the piece of work is; "" when nothing new is known."""
        self._text = text or self._text
        now = time.monotonic()
        if now - self._shown < (REDRAW_S if self._rewrites else QUIET_S):
            return
        self._shown = now
        elapsed = f"{duration(now - self._started)}" if now - self._started >= 1 else ""
        details = ", ".join(part for part in (self._text, elapsed) if part)
        self._write("; ".join(part for part in (self._title + (f": {details}" if details else ""), self._rest) if part))

    def end(self, line: str = "") -> None:
        """The result of the piece of work, if there is one to show, in the place of the moving line."""
        if self._rewrites:
            self._write("")
        if line:
            print(line, file=self._results, flush=True)

    def _write(self, line: str) -> None:
        try:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be rewritten
            self._moving.write(f"\r\033[K{line[:width]}" if self._rewrites else f"{line}\n")
            self._moving.flush()
        except BrokenPipeError:  # the reader of a pipe has gone; the work goes on
            self._moving = sys.__stderr__ or self._moving


def duration(seconds: float) -> str:
    """`48 s`, `9 min`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
