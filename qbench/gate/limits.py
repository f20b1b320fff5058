"""What a gate allows: `speedup=5%`, `score_drop<=0.5`, `ci_lstm[*]:size_bytes=1%`, `checksum=off`.

`metric=x` is how much worse than its baseline a metric may become (`%`: of the baseline), `metric>=x` and `metric<=x`
are absolute and need no baseline, `metric=off` leaves the metric out. Shares (agreement, int8_mac_fraction, accuracy
and with it score and score_drop) are written in percent, all else in the unit of its name. A pattern and a colon before
it say for which cells; of several limits on one metric the last that matches counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qbench.metrics import declared

CHECKSUM = "checksum"
GATED = ("size_bytes", "score", "int8_mac_fraction", CHECKSUM, "speedup", "peak_memory_bytes")
_FORM = re.compile(r"^(?:(?P<cells>[^:]+):)?(?P<metric>\w+)\s*(?P<sign>>=|<=|=)\s*(?P<value>off|-?[\d.]+%?)$")


@dataclass(frozen=True)
class Limit:
    """One line. `sign` is `=` (how much worse than the baseline), `>=` or `<=`; `value` None leaves the metric out.

    `value` is as written, or with `relative` a share of the baseline. `cells` is the pattern of names, `*` and `?` as
    in a shell.
    """

    metric: str
    sign: str
    value: float | None
    relative: bool = False
    cells: str = "*"

    @property
    def key(self) -> str:
        """`speedup` of what a baseline allows, `speedup>=` of an absolute limit."""
        return self.metric if self.sign == "=" else self.metric + self.sign

    @property
    def absolute(self) -> bool:
        """Does it need no baseline?"""
        return self.sign != "="

    def covers(self, cell: str) -> bool:
        """Is it for the cell of this name? Brackets stand for themselves."""
        pattern = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in self.cells)
        return re.fullmatch(pattern, cell) is not None

    def holds(self, value: float, score: str) -> bool:
        """Does a metric, in the unit of the record, keep an absolute limit? `score` is the task's own metric."""
        assert self.value is not None
        shown = value * factor(self.metric, score)
        return shown >= self.value if self.sign == ">=" else shown <= self.value

    def allowed(self, before: float, score: str) -> float:
        """How much worse than `before` the metric may become, in the unit of the record."""
        assert self.value is not None
        return self.value * abs(before) if self.relative else self.value / factor(self.metric, score)

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.metric}=off"
        return f"{self.metric}{self.sign}" + (f"{100 * self.value:g}%" if self.relative else f"{self.value:g}")


def parse(text: str) -> Limit:
    """A limit from its line. Raises ValueError, which says what is allowed."""
    found = _FORM.match(text.strip())
    if found is None:
        raise ValueError(f"limit {text!r}: write metric=2%, metric>=1.5, metric<=0.5 or metric=off, PATTERN: before it")
    metric, sign, value = found["metric"], found["sign"], found["value"]
    if metric != CHECKSUM and declared(metric) is None:
        raise ValueError(f"limit {text!r}: no metric {metric!r}; gated are {', '.join(GATED)}")
    cells = found["cells"] or "*"
    if value == "off":
        return Limit(metric, "=", None, cells=cells)
    if metric == CHECKSUM:
        raise ValueError(f"limit {text!r}: a checksum is equal or not; {CHECKSUM}=off leaves it out")
    relative = value.endswith("%")
    if relative and sign != "=":
        raise ValueError(f"limit {text!r}: {sign} is absolute, without %; shares are written in percent")
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        raise ValueError(f"limit {text!r}: {value!r} is no number") from None
    if sign == "=" and not relative and metric.startswith("speedup"):
        raise ValueError(f"limit {text!r}: how much slower a cell may become is a share, such as {metric}=5%")
    if sign == "=" and number < 0:
        raise ValueError(f"limit {text!r}: how much worse it may become is not negative")
    return Limit(metric, sign, number / 100 if relative else number, relative, cells)


def for_cell(limits: Iterable[Limit], cell: str) -> dict[str, Limit]:
    """The limits that count for a cell, of several of one kind on a metric the last that covers it.

    Those on what a baseline allows are found by their metric; absolute ones, beside them, by metric and sign.
    """
    return {limit.key: limit for limit in limits if limit.covers(cell)}


def off(limits: Mapping[str, Limit], metric: str) -> bool:
    """Is a metric of a cell with these limits not gated?"""
    return metric in limits and limits[metric].value is None


def factor(metric: str, score: str) -> float:
    """From a record's unit to the one in which a limit is written: 100 for shares. `score` is the task's own metric."""
    found = declared(score if metric == "score" or metric.startswith("score_") else metric)
    return 100.0 if found is not None and found.shown_unit == "%" else 1.0
