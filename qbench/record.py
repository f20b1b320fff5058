"""One Record a cell: what JSON, MLflow, tables, plots and the gate all read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "failed", "skipped")
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # the only way to read it


class RecordError(ValueError):
    """A record file that cannot be trusted; the message names the file and the cure."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one cell, immutable.

    `cell` says what was asked, `key` which code and machine answered (both sha256, hex). An axis that does not apply to
    the method is None. `metrics` holds finite numbers only, the unit in the name; one that does not apply is absent.
    `notes` are single words that qualify the numbers (`disturbed`, `batch_dependent`, `few_units`, ...); `details` is
    everything else a reader may want (float ops, artifacts, the command that reproduces the cell).
    """

    schema: int = SCHEMA
    cell: str
    key: str
    status: str
    error: str | None = None
    task: str
    family: str
    method: str
    granularity: str | None = None
    granularity_effective: str | None = None
    scheme: str | None = None
    activation_scheme: str | None = None
    activation_granularity: str | None = None
    observer: str | None = None
    output: str | None = None
    backend: str
    label: str
    metrics: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"record schema {self.schema!r} is not {SCHEMA}: written by another version of qbench")
        if self.status not in STATUSES:
            raise RecordError(f"record status {self.status!r} is none of {', '.join(STATUSES)}")
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RecordError(f"metric {name} is {value!r}: a metric that does not apply must be absent")

    @property
    def cell_name(self) -> str:
        """`resnet18[ptsq-per_channel-symmetric]`: the name that tables and test items show."""
        options = (self.method, self.granularity, self.scheme)
        return f"{self.task}[{'-'.join(option for option in options if option)}]"

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomic(path, json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_record(path: Path) -> Record:
    """Read one record.json. Raises RecordError with the file's name when it is damaged or foreign."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise RecordError("not a JSON object")
        names = {f.name for f in dataclasses.fields(Record)}
        if unknown := set(content) - names:
            raise RecordError(f"unknown fields {sorted(unknown)}")
        return Record(**content)
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path}: {error}; delete the file and run the cell again") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
