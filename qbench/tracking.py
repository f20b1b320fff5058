"""The MLflow store of a results folder: one flat run a record.

The only module that imports mlflow, and only inside functions: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qbench import tracking_view
from qbench.comparison import SHOWN_AXES, latency_counts, recipe_text, shown_metrics
from qbench.record import Record

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "qbench"
STATUS = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}
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
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=wait_s)) as db:
            db.execute("BEGIN IMMEDIATE")  # the write lock that logging a run needs
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            version = db.execute("SELECT version_num FROM alembic_version").fetchone() if _OURS <= tables else None
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


_OURS = {"alembic_version", "experiments", "runs"}


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
    if not path.exists() or path.stat().st_size == 0:
        _create(path)
    with _one_line(results):
        _experiment(results)


def _create(path: Path) -> None:
    """Make the database beside its place and rename it: one that is killed half-way through is broken for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        new = Path(folder) / path.name
        with _one_line(path.parent):
            _client(f"sqlite:///{new.resolve()}")
        if not path.exists() or path.stat().st_size == 0:
            os.replace(new, path)


@contextlib.contextmanager
def _one_line(results: Path) -> Iterator[None]:
    """Turn whatever the store raises into a TrackingError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise TrackingError(f"{results / 'mlflow.db'}: {reason}") from error


@functools.cache
def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with warnings.catch_warnings():  # SQLAlchemy's about MLflow's own models: nothing a reader here can mend
        warnings.simplefilter("ignore", DeprecationWarning)
        from mlflow.tracking import MlflowClient

        # They narrate the creation of tables, and print a stack for what becomes one line here.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(uri, uri)


def _experiment(results: Path) -> str:
    """The id of the experiment, made when it is missing."""
    client = _client(store_uri(results))
    location = (results / "artifacts").resolve().as_uri()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return str(client.create_experiment(EXPERIMENT, location, {"mlflow.note.content": tracking_view.NOTE}))
    if found.artifact_location != location:
        raise TrackingError(
            f"{results / 'mlflow.db'}: made for {found.artifact_location}, MLflow keeps absolute paths; "
            "move the results back, or delete mlflow.db and artifacts/: the next sweep rebuilds them from the records"
        )
    return str(found.experiment_id)


def logged_keys(results: Path, sweep: str) -> set[str]:
    """The keys of the records that the store holds, whole, for this sweep."""
    return {run.data.tags["qbench.key"] for run in _runs(results, f"tags.`qbench.sweep` = '{sweep}'") if _whole(run)}


def log(record: Record, results: Path, sweep: str) -> bool:
    """Log one record as one run; False when the store holds it already.

    A run that was cut off, or that an answer to the same cell replaces, is deleted (MLflow keeps it in its bin).
    Raises TrackingError.
    """
    earlier = _runs(results, f"tags.`qbench.sweep` = '{sweep}' AND tags.`qbench.cell` = '{record.cell}'")
    if any(_whole(run) and run.data.tags["qbench.record"] == _identity(record) for run in earlier):
        return False
    client = _client(store_uri(results))
    with _one_line(results):
        started = int(_milliseconds(record))
        run = client.create_run(_experiment(results), started, _tags(record, sweep), record.cell_name)
        _log_artifacts(client, run.info.run_id, record, results)
        _log_values(client, run.info.run_id, record)
        client.set_terminated(run.info.run_id, STATUS[record.status], int(started + 1e3 * record.seconds))
        for old in earlier:
            client.delete_run(old.info.run_id)
    return True


def _runs(results: Path, query: str) -> list[Run]:
    client = _client(store_uri(results))
    with _one_line(results):
        found, token = [], None
        while True:
            page = client.search_runs([_experiment(results)], query, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


def _whole(run: Run) -> bool:
    """Was the run logged to its end? One cut off by a kill still says RUNNING."""
    return run.info.status in STATUS.values()


def _identity(record: Record) -> str:
    """One answer, measured once: the same key measured again (force=true) is another record."""
    return f"{record.key[:16]} {record.started}"


def _latency(record: Record) -> str:
    return "measured" if latency_counts(record) else record.backend


def _milliseconds(record: Record) -> float:
    try:
        return datetime.fromisoformat(record.started).timestamp() * 1e3
    except ValueError:
        return time.time() * 1e3


def _tags(record: Record, sweep: str) -> dict[str, str]:
    tags = {
        "qbench.sweep": sweep,
        "qbench.cell": record.cell,
        "qbench.key": record.key,
        "qbench.record": _identity(record),
        "qbench.status": record.status,
        "qbench.latency": _latency(record),
    }
    if record.error:
        tags |= {"qbench.error": record.error[:5000], "mlflow.note.content": record.error[:5000]}
    return tags


def _log_artifacts(client: MlflowClient, run_id: str, record: Record, results: Path) -> None:
    folder = results / "runs" / record.key
    for name in ["record.json", *record.details.get("artifacts", [])]:
        if (folder / name).is_file():
            parent = str(Path(name).parent)
            client.log_artifact(run_id, str(folder / name), None if parent == "." else parent)


def _log_values(client: MlflowClient, run_id: str, record: Record) -> None:
    from mlflow.entities import Metric, Param

    now = int(_milliseconds(record))
    metrics = [Metric(name, value, now, 0) for name, value in _metrics(record).items()]
    params = [Param(name, value[:500]) for name, value in _params(record).items()]
    client.log_batch(run_id, metrics, params)


def four_digits(value: float) -> float:
    """Rounded to four significant digits: MLflow shows every digit it is given."""
    return value if value == 0 else round(value, 3 - math.floor(math.log10(abs(value))))


def _metrics(record: Record) -> dict[str, float]:
    metrics = shown_metrics(record)
    if metrics.get("score_fp32") and "score_drop" in metrics:
        metrics["drop_percent"] = 100 * metrics["score_drop"] / abs(metrics["score_fp32"])
    return {name: four_digits(value) for name, value in metrics.items()}


def _params(record: Record) -> dict[str, str]:
    options = {axis: getattr(record, axis) for axis in ("task", "family", "method", *SHOWN_AXES)}
    more = {
        "recipe": recipe_text(record),
        "label": record.label,
        "granularity_effective": record.granularity_effective,
        "latency": _latency(record),
        "fp32_baseline": record.environment.get("fp32_baseline"),
        "notes": " ".join(record.notes),
        "status": record.status,
    }
    return {name: str(value) for name, value in (options | more).items() if value}


def save_view(records: Sequence[Record], results: Path, sweep: str) -> None:
    """Store the sweep's view, and one a task when there are several.

    An experiment tag in a format that MLflow does not document: a store that refuses it only loses the view.
    """
    tasks = sorted({record.task for record in records})
    timed = all(latency_counts(record) for record in records if record.status == "ok")
    client, now = _client(store_uri(results)), int(1e3 * time.time())
    with contextlib.suppress(TrackingError), _one_line(results):
        experiment = _experiment(results)
        for chosen in [tasks, *([task] for task in tasks if len(tasks) > 1)]:
            key = tracking_view.view_key(sweep, chosen[0] if chosen != tasks else None)
            value = tracking_view.view_tag(sweep, chosen, timed, now)
            client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", value)


def deep_link(results: Path, sweep: str, port: int = 5000) -> str:
    """The address of the sweep's view in the page of `mlflow ui`. Raises TrackingError."""
    with _one_line(results):
        return tracking_view.link(_experiment(results), sweep, port)
