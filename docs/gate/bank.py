"""Collect the sample bank of the gate's study: many fresh timing processes of the `ci` cells, as the gate runs them.

    python docs/gate/bank.py quiet 200        # on a machine that does nothing else: about 25 minutes
    python docs/gate/bank.py loaded 200       # beside a process that keeps one core busy, on and off

appends to docs/gate/bank-quiet.jsonl: one line a process and task, the block medians of fp32 (`eager`) and each cell in
milliseconds by round. Every LOOPS_EVERY-th process also times LOOPS of calls of one cell a task: contestants whose
ratios are known by construction. The first line tells the machine, and the seconds of a process: `loading`, shared by
the two that start at once, and `timing` for all cells. A run that was ended goes on where it was.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from qbench import identity, timing_lock, workers
from qbench.cell import Work, answer, begin, time_once
from qbench.compose import Composer
from qbench.gate.base import share_cache
from qbench.plan import identify, plan
from qbench.preparation import prepare_tasks
from qbench.progress import Progress

HERE = Path(__file__).resolve().parent
LOOPS = (20, 21, 22, 40)  # calls in a loop: the ratio of two loops is that of their numbers
LOOPED = "ptsq-per_channel-symmetric"
LOOPS_EVERY = 5
LOOP_ROUNDS = 8
BUSY = """
import random, time
while True:
    end = time.monotonic() + random.uniform(0.2, 3.0)
    while time.monotonic() < end:
        pass
    time.sleep(random.uniform(0.2, 3.0))
"""


def time_loops(
    program: str, task_config: dict[str, Any], prepared: dict[str, Any], measure: dict[str, Any], process_index: int
) -> dict[str, Any]:
    """Time loops of calls of one model beside fp32 at batch 1, in this fresh process. Returns BlockTimes as JSON."""
    import torch

    from qbench import evaluate
    from qbench.measure import Measure
    from qbench.saved import load
    from qbench.timing import time_blocks

    settings = Measure.of(measure)
    torch.set_num_threads(settings.threads)
    eager, model = evaluate.fp32_model(task_config, prepared), load(program)
    inputs = evaluate.example_batch(task_config, prepared, 1)

    def loop(count: int) -> None:
        for _ in range(count):
            model(*inputs)

    with torch.inference_mode():
        contestants = {"eager": lambda: eager(*inputs)} | {str(n): lambda n=n: loop(n) for n in LOOPS}
        return time_blocks(contestants, settings.timing, seed=process_index).as_json()


def works_of(results: Path) -> dict[str, list[Work]]:
    """The quantized cells of `ci` by task, ready to be timed."""
    given = ["+sweep=ci", f"results={results}"]
    cells = plan(Composer(Namespace(overrides=given, multirun=False, config_dir=None)))
    cells = identify(cells, prepare_tasks(cells, results, Progress()))
    by_task: dict[str, list[Work]] = {}
    for cell in cells:
        if cell.is_baseline:
            answer([cell], results, lambda text: None)
    for work in begin([cell for cell in cells if not cell.is_baseline], results, lambda text: None):
        by_task.setdefault(work.cell.job.choices["task"], []).append(work)
    return by_task


def collect(path: Path, count: int, works: dict[str, list[Work]], results: Path) -> None:
    """Append processes until the file has `count` of each task."""
    _, *lines = map(json.loads, path.read_text().splitlines() if path.exists() else ["{}"])
    have = 1 + max((line["process"] for line in lines), default=-1)
    if not path.exists():
        known = identity.environment()
        head = {key: known.get(key) for key in ("cpu", "torch", "threads", "kernel_path")}
        path.write_text(json.dumps({**head, **seconds_of(works, results)}) + "\n")
    progress = Progress()
    for index in range(have, count):
        progress.begin(f"process {index + 1} of {count}")
        found = _process(works, max(index, 1), results, progress)
        for task, cells in works.items():
            line: dict[str, Any] = {"process": index, "task": task, "ms": found[task]}
            if index % LOOPS_EVERY == 0:
                line["loops"] = _loops(next(w for w in cells if w.cell.name.endswith(f"[{LOOPED}]")), index, progress)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def seconds_of(works: dict[str, list[Work]], results: Path) -> dict[str, float]:
    """How long a process takes to start, and to time all cells; from some of them."""
    spent: dict[str, list[float]] = {"loading": [], "timing": []}
    for _ in range(3):
        workers.end_servers()
        clock = time.monotonic()
        workers.ready(1)
        spent["loading"].append((time.monotonic() - clock) / workers.PAIR)
        clock = time.monotonic()
        _process(works, 1, results, Progress())
        spent["timing"].append(time.monotonic() - clock)
    return {part: round(statistics.median(seconds), 2) for part, seconds in spent.items()}


def _process(
    works: dict[str, list[Work]], index: int, results: Path, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    time_once([work for cells in works.values() for work in cells], index, results, progress.say)
    found: dict[str, dict[str, list[float]]] = {}
    for task, cells in works.items():
        medians = {work.cell.name: work.timings.pop()["batches"]["1"]["medians_ms"] for work in cells}
        found[task] = {"eager": _rounded(next(iter(medians.values()))["eager"])}
        found[task] |= {name: _rounded(times["cell"]) for name, times in medians.items()}
    return found


def _rounded(ms: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in ms]


def _loops(work: Work, index: int, progress: Progress) -> dict[str, list[float]]:
    arguments = {
        "program": str(work.folder / "model.qb"),
        "task_config": work.cell.task,
        "prepared": vars(work.cell.prepared),
        "measure": {**work.cell.job.values["measure"], "rounds": LOOP_ROUNDS},
        "process_index": index,
    }
    with timing_lock.machine(alone=True, say=progress.say):
        log, server = work.folder / "loops.txt", max(index, 1)
        times = workers.run("bank:time_loops", arguments, log=log, say=progress.say, server=server)
    return {name: _rounded(ms) for name, ms in times["medians_ms"].items()}


def main() -> None:
    """Collect a bank: `quiet` or `loaded`, and how many processes."""
    state, count = sys.argv[1], int(sys.argv[2])
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        share_cache(Path(folder), HERE.parents[1] / "results")
        works = works_of(Path(folder))
        load = subprocess.Popen([sys.executable, "-c", BUSY]) if state == "loaded" else None
        try:
            collect(HERE / f"bank-{state}.jsonl", count, works, Path(folder))
        finally:
            if load:
                load.kill()
            workers.stop()


if __name__ == "__main__":
    main()
