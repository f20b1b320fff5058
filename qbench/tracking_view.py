"""The saved view of a sweep in MLflow's page, and the note above its table; plain data, nothing of MLflow.

The format is undocumented (tried on 3.17): an experiment tag that holds the state of the page. Where a version does not
know it, its page opens as it would without.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from typing import Any

from qbench.declarations import MEASURED

COLUMN_TEXTS = {
    **{metric.name: metric.text for metric in MEASURED},
    "drop_percent": "score_drop in percent of the fp32 score: comparable between tasks",
    "..._b16": "at batch 16; without a suffix it is batch 1",
    "latency": "measured; or reference: exact, not fast: its latency is no result, and no speed-up is shown",
    "granularity, observer, ...": "the recipe in short labels; - where an axis does not apply to the method",
}
NOTE = "\n".join(
    [
        "**qbench**: one run is one cell, a way of quantizing a network, executed in int8. Four significant digits.",
        "",
        "| column | meaning |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in COLUMN_TEXTS.items()),
    ]
)
EXPERIMENT_TAGS = {"mlflow.note.content": NOTE, "mlflow.experimentKind": "custom_model_development"}

# Column and width in pixels, from the left: the numbers come first, so that they are seen on a small screen too.
COLUMNS = {
    "attributes.`Run Name`": 250,
    "metrics.`score`": 75,
    "metrics.`drop_percent`": 110,
    "metrics.`size_bytes`": 95,
    "metrics.`size_ratio`": 85,
    "metrics.`latency_ms_median`": 150,
    "params.`latency`": 90,
    "metrics.`speedup`": 90,
    "metrics.`agreement`": 95,
    "metrics.`sqnr_db`": 85,
    "runDateAndNestInfo": 130,
    "duration": 80,
}


def view_key(sweep: str, task: str | None = None) -> str:
    """The name of the view in tags and links: letters and digits only, the same for the same sweep."""
    return hashlib.sha256(f"{sweep}\n{task}".encode()).hexdigest()[:16]


def view_tag(sweep: str, tasks: list[str], timed: bool, created_ms: int) -> str:
    """The value of the experiment tag `mlflow.sharedViewState.<key>`: a sweep, narrowed when `tasks` has one."""
    packed = base64.b64encode(zlib.compress(json.dumps(state(sweep, tasks, timed)).encode())).decode()
    name = f"qbench {sweep}" + (f": {tasks[0]}" if len(tasks) == 1 else "")
    return json.dumps({"name": name, "createdAt": created_ms, "state": f"deflate;{packed}"})


def state(sweep: str, tasks: list[str], timed: bool) -> dict[str, Any]:
    """The page: which runs, which columns, which charts. `timed` says whether latencies may be ranked."""
    query = f"tags.`qbench.sweep` = '{sweep}'"
    if len(tasks) == 1:
        query += f" AND params.`task` = '{tasks[0]}'"
    shown = {name: width for name, width in COLUMNS.items() if timed or "speedup" not in name}
    return {
        "searchFilter": query,
        "orderByKey": "metrics.`drop_percent`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [name for name in shown if "`" in name],
        "columnOrder": list(shown),
        "columnWidths": shown,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts("score" if len(tasks) == 1 else "drop_percent", timed),
        "compareRunSections": [
            {"uuid": "qbench", "name": "qbench", "display": True, "isReordered": False, "columns": 2, "cardHeight": 400}
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": False,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def charts(quality: str, timed: bool) -> list[dict[str, Any]]:
    """Parallel coordinates, scatter, bars; several tasks share an axis only as the drop in percent."""
    axes = ["method", "granularity", "scheme", "observer"]
    costs = ["size_ratio", "latency_ms_median"] if timed else ["size_ratio"]
    return [
        _chart("PARALLEL", 1, selectedParams=axes, selectedMetrics=[*costs, quality], showAllRuns=True),
        _scatter(2, costs[-1], quality),
        _scatter(3, "sqnr_db", "agreement"),
        _chart("BAR", 4, metricKey="speedup" if timed else quality),
    ]


def _scatter(number: int, x: str, y: str) -> dict[str, Any]:
    return _chart("SCATTER", number, xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _chart(kind: str, number: int, **content: Any) -> dict[str, Any]:
    fixed = {"type": kind, "uuid": f"qbench{number}", "metricSectionId": "qbench"}
    return {**fixed, "runsCountToCompare": 100, "deleted": False, "isGenerated": False, **content}


def link(experiment: str, sweep: str, port: int, mode: str = "TABLE") -> str:
    """The address of the view; `workflowType` leaves the page's GenAI mode, which hides params and metrics."""
    query = f"workflowType=machine_learning&viewStateShareKey={view_key(sweep)}&compareRunsMode={mode}"
    return f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?{query}"
