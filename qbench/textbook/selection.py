"""The finished cells of a sweep, asked for by recipe; and the one command line that makes several of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence

from qbench import comparison as compare
from qbench.record import Record

MAIN = {"granularity": "per_channel", "scheme": "symmetric"}
SUITED = {"lstm": "ptdq", "transformer": "ptdq", "cnn": "ptsq", "gan": "ptsq"}
OTHER = {"ptdq": "ptsq", "ptsq": "ptdq"}


class Selection:
    """Cells with the default of every option, found by their choice on each axis; the backend is whichever there is."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.cells = [r for r in records if r.status == "ok" and not compare.unusual_values(r)]

    @property
    def tasks(self) -> list[str]:
        """In the order in which they first appear."""
        return list(dict.fromkeys(record.task for record in self.cells))

    def of(self, task: str) -> list[Record]:
        """All cells of a task."""
        return [record for record in self.cells if record.task == task]

    def family(self, task: str) -> str:
        """cnn, lstm, transformer or gan."""
        return self.of(task)[0].family

    def cell(self, task: str, method: str, **choices: str) -> Record | None:
        """The cell with these choices and the default on the other axes; None when it was not swept."""
        wanted = {axis: name for axis, name in compare.DEFAULTS.items() if axis != "backend"} | MAIN | choices
        for record in self.of(task):
            chosen = {axis: getattr(record, axis) for axis in wanted}
            if record.method == method and all(name in (None, wanted[axis]) for axis, name in chosen.items()):
                return record
        return None


def advised(cells: Selection) -> Iterator[tuple[str, Record, Record]]:
    """Each task with the cell of the method that the textbook advises for its family, and that of the other."""
    for task in cells.tasks:
        method = SUITED[cells.family(task)]
        cell, other = cells.cell(task, method), cells.cell(task, OTHER[method])
        if cell is not None and other is not None:
            yield task, cell, other


def command(cells: Sequence[Record]) -> str:
    """One multirun that makes all the cells: the words of their own commands, several values of a choice joined.

    A cell that leaves a choice to its default gets it said where others say something else.
    """
    usual = {**compare.DEFAULTS, **MAIN, "method": "ptsq", "measure": "default"}
    words = [shlex.split(str(record.details.get("command", "")))[3:] for record in cells]
    flags = dict.fromkeys(word for own in words for word in own if "=" not in word)
    said = [dict(word.split("=", 1) for word in own if "=" in word) for own in words]
    joined = []
    for name in dict.fromkeys(
        name for own in said for name in own if name != "force"
    ):  # finished cells stay as they are
        values = dict.fromkeys(value for own in said if (value := own.get(name, usual.get(name))) is not None)
        joined.append(f"{name}={','.join(values)}")
    return shlex.join(["python", "-m", "qbench", *flags, "-m", *joined])
