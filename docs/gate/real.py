"""Run the gate for real, again and again, on code that does not change: does it hold what study.py promises?

    python docs/gate/real.py 20               # where baselines of this machine are committed; some minutes a run

appends to docs/gate/real-runs.jsonl a line a run: its exit code, its seconds, by cell its words other than `ok`, and
its peak memory in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> None:
    """Make as many runs as the command line says."""
    for _ in range(int(sys.argv[1])):
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "--qbench", "--qbench-report=json", "-p", "no:cacheprovider", "-q"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        report = json.loads((ROOT / "results" / "gate.json").read_text())
        with (HERE / "real-runs.jsonl").open("a") as file:
            file.write(json.dumps(line(report, code, round(time.monotonic() - started))) + "\n")


def line(report: dict[str, Any], code: int, seconds: int) -> dict[str, Any]:
    """One run, of its gate.json."""
    cells = report["cells"]
    words = {cell["name"]: {v["metric"]: v["word"] for v in cell["verdicts"] if v["word"] != "ok"} for cell in cells}
    memory = {cell["name"]: cell["metrics"]["peak_memory_bytes"] for cell in cells}
    return {"exit code": code, "seconds": seconds, "words": {k: v for k, v in words.items() if v}, "memory": memory}


if __name__ == "__main__":
    main()
