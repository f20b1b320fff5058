"""The runs of the MLflow store: one flat run a record, and the saved view of a sweep.

With `tracking_store` the only module that imports mlflow, and only inside functions: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qbench import tracking_view
from qbench.comparison import latency_counts, option_label, recipe_text, shown_metrics
from qbench.recipe import AXES
from qbench.record import Record, read_record
from qbench.tracking_store import (
    TrackingError,
    check_store,
    client_of,
    experiment_id,
    one_line_errors,
    prepare_store,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = [
    "TrackingError",
    "check_store",
    "deep_link",
    "log",
    "logged_keys",
    "logged_records",
    "logged_sweeps",
    "prepare_store",
    "save_view",
    "store_uri",
]

LARGEST_ARTIFACT = 2_000_000  # bytes; larger files (the model) stay in the run's folder: the store would copy them
STATUS = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}


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
    client = client_of(store_uri(results))
    with one_line_errors(results):
        started = int(_milliseconds(record))
        run = client.create_run(
            experiment_id(results), started, _tags(record, sweep), f"{record.task} {recipe_text(record)}"
        )
        _log_artifacts(client, run.info.run_id, record, results)
        _log_values(client, run.info.run_id, record)
        client.set_terminated(run.info.run_id, STATUS[record.status], int(started + 1e3 * record.seconds))
        for old in earlier:
            client.delete_run(old.info.run_id)
    return True


def logged_records(results: Path, sweep: str) -> list[Record]:
    """The records of a sweep's runs, from their artifacts. Raises TrackingError, RecordError for a damaged one."""
    with one_line_errors(results):
        client = client_of(store_uri(results))
    runs = _runs(results, f"tags.`qbench.sweep` = '{sweep}'")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for run in filter(_whole, runs):
            with one_line_errors(results):
                path = client.download_artifacts(run.info.run_id, "record.json", folder)
            found.append(read_record(Path(path)))
    return found


def logged_sweeps(results: Path) -> list[str]:
    """The names of the sweeps of which the store holds runs. Raises TrackingError."""
    return sorted({run.data.tags.get("qbench.sweep", "") for run in _runs(results, "")})


def _runs(results: Path, query: str) -> list[Run]:
    client = client_of(store_uri(results))
    with one_line_errors(results):
        found: list[Run] = []
        token = None
        while True:
            page = client.search_runs([experiment_id(results)], query, max_results=1000, page_token=token)
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
        if (folder / name).is_file() and (folder / name).stat().st_size <= LARGEST_ARTIFACT:
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
    options = {axis: option_label(record, axis) or "-" for axis in AXES}
    more = {
        "task": record.task,
        "family": record.family,
        "recipe": recipe_text(record),
        "label": record.label,
        "granularity_effective": effective
        if (effective := record.granularity_effective) != record.granularity
        else None,
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
    client, now = client_of(store_uri(results)), int(1e3 * time.time())
    with contextlib.suppress(TrackingError), one_line_errors(results):
        experiment = experiment_id(results)
        for chosen in [tasks, *([task] for task in tasks if len(tasks) > 1)]:
            key = tracking_view.view_key(sweep, chosen[0] if chosen != tasks else None)
            value = tracking_view.view_tag(sweep, chosen, timed, now)
            client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", value)


def deep_link(results: Path, sweep: str, port: int = 5000) -> str:
    """The address of the sweep's view in the page of `mlflow ui`. Raises TrackingError."""
    with one_line_errors(results):
        return tracking_view.link(experiment_id(results), sweep, port)
