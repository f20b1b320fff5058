"""The MLflow store of a results folder: is it sound, and the way to it.

mlflow is imported inside functions only: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.tracking_view import EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "qbench"
UNFINISHED = ".mlflow-unfinished"
_OURS = {"alembic_version", "experiments", "runs"}
_CURE = "move it away; the next sweep builds a new one from the records"


class TrackingError(RuntimeError):
    """The MLflow store cannot be used; the message is one line and says what to do."""


def store_uri(results: Path) -> str:
    """The store's address, absolute: a relative one would follow the working directory."""
    return f"sqlite:///{(results / 'mlflow.db').resolve()}"


def check_store(results: Path, wait_s: float = 5.0) -> None:
    """Look at results/mlflow.db without importing mlflow; a missing one is fine.

    Raises TrackingError: locked for longer than `wait_s`, not a database, damaged, foreign, or of another MLflow.
    """
    path = results / "mlflow.db"
    if _is_missing(path):
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=wait_s)) as db:
            db.execute("BEGIN IMMEDIATE")  # the write lock that logging a run needs
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            version = db.execute("SELECT version_num FROM alembic_version").fetchone() if tables >= _OURS else None
            db.rollback()
    except sqlite3.OperationalError as error:
        cure = "end the program that holds it (another sweep?) and run again" if "locked" in str(error) else _CURE
        raise TrackingError(f"{path}: {error}; {cure}") from error
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"{path}: not a readable SQLite database ({error}); {_CURE}") from error
    if verdict != "ok":
        raise TrackingError(f"{path}: damaged ({' '.join(verdict.split())[:80]}); {_CURE}")
    if version is None:
        raise TrackingError(f"{path}: a database, but not MLflow's; {_CURE}")
    expected = _schema_version()
    if expected and version[0] != expected:
        raise TrackingError(
            f"{path}: written by another MLflow (schema {version[0]}, this one has {expected}); "
            f"`mlflow db upgrade {store_uri(results)}`, or {_CURE}"
        )


def _is_missing(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def _schema_version() -> str | None:
    """The schema revision of the installed MLflow, read from its migration files; None when they look different."""
    spec = find_spec("mlflow")
    if spec is None or spec.origin is None:
        raise TrackingError("mlflow is not installed; install qbench with its dependencies")
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    revisions = set(re.findall(r"^revision\b[^=\n]*= *[\"'](\w+)", text, re.MULTILINE))
    heads = revisions - set(re.findall(r"^down_revision\b[^=\n]*= *[\"'](\w+)", text, re.MULTILINE))
    return heads.pop() if len(heads) == 1 else None


def prepare_store(results: Path) -> None:
    """Create the database, the experiment and its note; do it in one process, before any parallel work.

    Raises TrackingError as `check_store` does, and when the folder has been moved since the store was made.
    """
    check_store(results)
    path = results / "mlflow.db"
    shutil.rmtree(results / UNFINISHED, ignore_errors=True)  # of a process that was killed
    if _is_missing(path):
        _create(path)
    with one_line_errors(results):
        experiment_id(results)


def _create(path: Path) -> None:
    """Make the database beside its place and rename it: one that is killed half-way through is broken for good."""
    folder = path.parent / UNFINISHED
    folder.mkdir(parents=True)
    with one_line_errors(path.parent):
        client_of(f"sqlite:///{(folder / path.name).resolve()}")
    (folder / path.name).replace(path)
    folder.rmdir()


@contextlib.contextmanager
def one_line_errors(results: Path) -> Iterator[None]:
    """Turn whatever the store raises into a TrackingError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise TrackingError(f"{results / 'mlflow.db'}: {reason}") from error


@functools.cache
def client_of(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings():  # SQLAlchemy's about MLflow's own models: nothing a reader here can mend
        warnings.simplefilter("ignore", DeprecationWarning)
        from mlflow.tracking import MlflowClient

        # They narrate the creation of tables, and print a stack for what becomes one line here.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(uri, uri)


def experiment_id(results: Path) -> str:
    """The id of the experiment, made when it is missing."""
    client = client_of(store_uri(results))
    location = (results / "artifacts").resolve().as_uri()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return str(client.create_experiment(EXPERIMENT, location, EXPERIMENT_TAGS))
    if found.artifact_location != location:
        raise TrackingError(
            f"{results / 'mlflow.db'}: made for {found.artifact_location}, MLflow keeps absolute paths; "
            "move the results back, or delete mlflow.db and artifacts/: the next sweep rebuilds them from the records"
        )
    return str(found.experiment_id)
