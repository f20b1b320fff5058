"""Take the README's pictures: `python docs/screenshots.py [results] [sweep] [folder]`.

Three of MLflow's page, and size against score drop (tradeoff.png).

Needs Chromium and its chromedriver (Debian: chromium, chromium-driver). It speaks the WebDriver protocol itself, plain
JSON over HTTP, so that a picture costs no dependency.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbench import tracking, tracking_view
from qbench.results import newest_records
from qbench.tradeoff import tradeoff_figure

WIDTH, HEIGHT = 1680, 1250
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    # A mouse that can hover: without one the charts keep their tool bars open, over the data.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
]


# On the compare page: close the section between the names of the runs and their metrics, show the metrics that differ.
COLLAPSE = """
const headings = [...document.querySelectorAll('[role=button], button, h3, h4')]
headings.find(e => e.innerText.trim() === 'Parameters')?.click();
[...document.querySelectorAll('[role=switch]')].at(-2)?.click();
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(command: list[str], ready: str, env: dict[str, str] | None = None) -> Iterator[None]:
    """Run a program that answers at an address, for as long as the block lasts."""
    process = subprocess.Popen(
        command, env=os.environ | (env or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5):
                break
            time.sleep(0.3)
        else:
            raise SystemExit(f"{command[0]} did not answer at {ready}")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(timeout=30)


class Browser:
    """A WebDriver session: open, run a script, look."""

    def __init__(self, driver: str, profile: str) -> None:
        chrome = shutil.which("chromium") or shutil.which("google-chrome")
        if chrome is None:
            raise SystemExit("no chromium found: install it (Debian: apt-get install chromium chromium-driver)")
        arguments = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": chrome, "args": arguments}}
        self.session = f"{driver}/session"
        created = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self.session += f"/{created['sessionId']}"

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"chromedriver: {error.read().decode()[:300]}") from error

    def open(self, address: str, text: str, settle_s: float = 3.0) -> None:
        """Load a page and wait for a text in it."""
        self._call("/url", {"url": address.split("#")[0]})
        self.script("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')")  # it covers a third of the page
        self.script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        self._call("/url", {"url": "about:blank"})  # the page's addresses differ in their fragment only: force a load
        self._call("/url", {"url": address})
        deadline = time.monotonic() + 60
        while text not in self.script("return document.body ? document.body.innerText : ''"):
            if time.monotonic() > deadline:
                raise SystemExit(f"{address}: no {text!r} on the page")
            time.sleep(0.5)
        time.sleep(settle_s)

    def script(self, source: str) -> Any:
        """Run JavaScript in the page."""
        return self._call("/execute/sync", {"script": source, "args": []})

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in pixels."""
        self._call("/window/rect", {"width": width, "height": height})

    def save(self, path: Path) -> None:
        """Write what is to be seen as PNG."""
        path.write_bytes(base64.b64decode(self._call("/screenshot")))

    def close(self) -> None:
        """End the session."""
        self._call("", method="DELETE")


def addresses(results: Path, sweep: str, port: int) -> dict[str, str]:
    """The three pages: the table of runs, the charts of the saved view, a comparison of the best cells."""
    from mlflow.tracking import MlflowClient

    table = tracking.deep_link(results, sweep, port)
    experiment = table.split("/experiments/")[1].split("/")[0]
    query = f"tags.`qbench.sweep` = '{sweep}' AND params.`status` = 'ok'"
    client, best = MlflowClient(tracking.store_uri(results)), {}
    for run in client.search_runs([experiment], query, order_by=["params.task DESC", "metrics.score_drop ASC"]):
        best.setdefault((run.data.params["task"], run.data.params["method"]), run)
    task = next(iter(best))[0]
    runs = [run for (of, _), run in best.items() if of == task]
    ids = json.dumps([run.info.run_id for run in runs])
    compare = f"http://127.0.0.1:{port}/#/compare-runs?runs={ids}&experiments={json.dumps([experiment])}"
    return {
        "runs-table": table,
        "saved-view": tracking_view.link(experiment, sweep, port, mode="CHART"),
        "compare": compare.replace('"', "%22").replace(" ", ""),
    }


def main(results: Path, sweep: str, folder: Path) -> None:
    """Start MLflow's page and the browser, take the pictures."""
    tracking.check_store(results)
    keys = tracking.logged_keys(results, sweep)
    tradeoff_figure([r for r in newest_records(results) if r.key in keys], folder / "tradeoff.png")
    ui, driver = free_port(), free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--port", str(ui)]
    command += ["--backend-store-uri", tracking.store_uri(results)]
    chromedriver = shutil.which("chromedriver") or "chromedriver"
    pages = addresses(results, sweep, ui)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        server(command, f"http://127.0.0.1:{ui}/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
        server([chromedriver, f"--port={driver}"], f"http://127.0.0.1:{driver}/status"),
    ):
        browser = Browser(f"http://127.0.0.1:{driver}", profile)
        try:
            for name, address in pages.items():
                if name == "compare":
                    browser.resize(WIDTH, 1590)
                browser.open(address, "score", settle_s=8)
                if name == "compare":
                    browser.script(COLLAPSE)
                    time.sleep(1)
                browser.save(folder / f"{name}.png")
                print(folder / f"{name}.png")
        finally:
            browser.close()


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        Path(given[0] if given else "results"),
        given[1] if len(given) > 1 else "all",
        Path(given[2]) if len(given) > 2 else Path(__file__).parent,
    )
