"""The results folder: who works in it, which records it holds, and what an interrupted run left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qbench.config import UsageError
from qbench.record import Record, RecordError, read_record

LOCK = ".lock"
# What write_atomic names its temporary files, and the MLflow store's half-made folders.
TEMPORARY = re.compile(r"^\.(.+\.[a-z0-9_]{8}|mlflow-.+)$")


def run_folder(results: Path, key: str) -> Path:
    """Where the record and the artifacts of a key lie."""
    return results / "runs" / key


@contextlib.contextmanager
def claim(results: Path) -> Iterator[None]:
    """Work in a results folder, made if need be. Whoever comes first alone tidies what a killed run left behind.

    Raises UsageError when the folder cannot be written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
        handle = os.open(results / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"results={results}: cannot be written ({reason}); give another folder") from error
    try:
        if _take(handle, fcntl.LOCK_EX):
            _tidy(results)
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def read_finished(results: Path, key: str) -> Record | None:
    """The record of a key if there is one; a damaged one is reported and counts as none."""
    path = run_folder(results, key) / "record.json"
    if not path.exists():
        return None
    try:
        return read_record(path)
    except RecordError as error:
        print(f"qbench: {error}", file=sys.stderr)
        return None


def newest_records(results: Path) -> list[Record]:
    """The newest record of each cell that the folder holds, in the order in which they were made."""
    keys = sorted(path.parent.name for path in results.glob("runs/*/record.json"))
    found = sorted((r for r in (read_finished(results, key) for key in keys) if r), key=lambda r: r.started)
    return list({record.cell: record for record in found}.values())


def _take(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tidy(results: Path) -> None:
    """Remove runs without a record and temporary files: nobody else works here, so nobody writes them any more."""
    for folder in results.glob("runs/*"):
        if folder.is_dir() and not (folder / "record.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (results, *results.glob("runs/*"), *results.glob("cache/*")):
        for path in folder.glob(".*") if folder.is_dir() else ():
            if TEMPORARY.match(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
