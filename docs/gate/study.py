"""Replay gate runs from the sample bank with the shipped rules: false alarms, what is found, what intervals cover.

    python docs/gate/study.py

reads docs/gate/bank-*.jsonl (made by bank.py) and writes docs/gate/study.md.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from qbench.gate import speed

HERE = Path(__file__).resolve().parent
LEAST = 10  # processes of conf/measure/ci.yaml
MOST = 13  # of them fit into the time limit of a run on the machine of the bank
LOOPS = ("20", "21", "22", "40")
LOOPED = 10  # processes a side in an interval of a known ratio
RUNS = 2000
INTERVALS = 2000
TEXT = """# How far the gate can be trusted

Gate runs replayed from a bank of recorded timing processes (`bank-*.jsonl`, made by `bank.py`; this page is made by
`study.py`), with the shipped rules of `qbench/gate/speed.py` and the measurement of `conf/measure/ci.yaml`: {least} to
{most} processes a cell (what fits into the time limit), a baseline of {twice}, as many again where something seems to
have moved. {runs} runs of the whole sweep in each row; baseline, run and second measurement are stretches of processes
that followed each other, none used twice in a run. A slow-down is the logarithm added to one cell; that ratios come out
as they should is tested with loops of 20, 21, 22 and 40 calls of one object.

Against a stored baseline a change counts from 8 % on, beside a base, measured in turns, from 2 %: the machine's own
speed, and with it the ratio of float to int8, drifts by several percent within an hour (second table), and with 2 %
43 of 100 runs against a stored baseline were false alarms.

Two limits: the runs draw on the same processes again and again, so the shares are less certain than {runs} independent
runs would make them; and baseline and run come from one session on one machine, so that what shifts from day to day is
not in them.

| | |
|---|---|
{rows}

How much a process' value (the log of fp32's time over the cell's, median of its rounds) differs from process to
process: standard deviation, and the same from the means of stretches of {least}, larger where a machine drifts.

| machine | cell | processes | spread | from stretches |
|---|---|---|---|---|
{spreads}
"""
Values = dict[str, list[float]]  # by cell, the log speed-up of each process


def cells(path: Path) -> Values:
    """The value of each process and cell: the median over rounds of log(fp32 / cell)."""
    found: Values = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, ms in line["cells"].items():
            found.setdefault(name, []).append(_value(ms["eager"], ms["cell"]))
    whole = min(map(len, found.values()))
    return {name: values[:whole] for name, values in found.items()}


def loops(path: Path) -> dict[str, dict[str, list[float]]]:
    """By task and number of calls, the values of the loops of known ratio."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        ms = line.get("loops", {})
        for count in (name for name in ms if name != "eager"):
            found.setdefault(line["task"], {}).setdefault(count, []).append(_value(ms["eager"], ms[count]))
    return found


def _value(fp32: Sequence[float], cell: Sequence[float]) -> float:
    return statistics.median(math.log(a / b) for a, b in zip(fp32, cell, strict=True))


def gate_run(values: Values, slower: Mapping[str, float], draw: random.Random, beside: bool) -> dict[str, str]:
    """One run of the gate: a baseline, a run and, where it asks for one, a second measurement, from other processes.

    Each is a stretch of processes that followed each other; `beside` takes base and head from one stretch, in turns.
    `slower` has the log by which a cell is slowed down.
    """
    size = len(next(iter(values.values())))
    if beside:
        first = draw.randrange(size - 4 * MOST + 1)
        turns = [(first + 2 * i + i % 2, first + 2 * i + 1 - i % 2) for i in range(2 * MOST)]
        sides = [base for base, _ in turns], [head for _, head in turns]
    else:
        while True:
            base, own = draw.randrange(size - 2 * LEAST + 1), draw.randrange(size - 2 * MOST + 1)
            if base + 2 * LEAST <= own or own + 2 * MOST <= base:
                break
        sides = list(range(base, base + 2 * LEAST)), list(range(own, own + 2 * MOST))
    before = {name: [all_[i] for i in sides[0]] for name, all_ in values.items()}
    now = {name: [all_[i] - slower.get(name, 0.0) for i in sides[1]] for name, all_ in values.items()}
    delta = speed.DELTA if beside else speed.DRIFT

    def changes(count: int) -> dict[str, speed.SpeedChange]:
        if beside:
            return {name: speed.paired_change(before[name][:count], now[name][:count]) for name in values}
        return {name: speed.change(before[name], now[name][:count]) for name in values}

    count = LEAST
    while count < MOST and any(speed.wide(change, delta) for change in changes(count).values()):
        count += 1
    found = changes(count)
    levels = speed.holm({name: change.p for name, change in found.items()})
    moved = {n.partition("[")[0] for n in found if speed.verdict(found[n], levels[n], delta) in ("worse", "better")}
    twice = changes(2 * count)
    final = {name: twice[name] if name.partition("[")[0] in moved else found[name] for name in found}
    levels = speed.holm({name: change.p for name, change in final.items()})
    confirmed = {name: levels[name] if name.partition("[")[0] in moved else 0.0 for name in final}
    return {name: speed.verdict(change, confirmed[name], delta) for name, change in final.items()}


def share(count: int, total: int) -> str:
    """`0.4 %`."""
    return f"{100 * count / total:.1f} %"


def lines_of(state: str, values: Values, known: dict[str, dict[str, list[float]]]) -> list[str]:
    """The rows of one bank."""
    draw, names, lines = random.Random(0), list(values), []
    for beside, how in (False, "stored baseline"), (True, "base in turns"):
        alarms = doubtful = 0
        for _ in range(RUNS):
            words = gate_run(values, {}, draw, beside).values()
            alarms += any(word in ("worse", "better") for word in words)
            doubtful += sum(word == "inconclusive" for word in words)
        lines.append(f"| {state}, {how}: runs of the whole sweep with a false alarm | {share(alarms, RUNS)} |")
        lines.append(f"| {state}, {how}: cells that stay inconclusive | {share(doubtful, RUNS * len(names))} |")
        for percent in (5, 10, 15):
            hits = 0
            for index in range(RUNS):
                cell = names[index % len(names)]
                hits += gate_run(values, {cell: math.log1p(percent / 100)}, draw, beside)[cell] == "worse"
            lines.append(f"| {state}, {how}: one cell {percent} % slower, found | {share(hits, RUNS)} |")
    covered = total = 0
    for by_count in known.values():
        for count, timed in by_count.items():
            for _ in range(INTERVALS // (len(LOOPS) * len(known))):
                picks = draw.sample(range(len(timed)), 2 * LOOPED)
                change = speed.change([by_count["20"][i] for i in picks[:LOOPED]], [timed[i] for i in picks[LOOPED:]])
                covered += abs(change.estimate - math.log(int(count) / 20)) <= change.reach()
                total += 1
    return [*lines, f"| {state}: 95 % intervals that hold the known ratio | {share(covered, total)} |"]


def main() -> None:
    """Write study.md."""
    rows, spreads = [], []
    for path in sorted(HERE.glob("bank-*.jsonl")):
        state, values = path.stem.partition("-")[2], cells(path)
        rows += lines_of(state, values, loops(path))
        for name, all_ in values.items():
            means = [statistics.mean(all_[i : i + LEAST]) for i in range(0, len(all_) - LEAST + 1, LEAST)]
            stretch = 100 * statistics.stdev(means) * math.sqrt(LEAST)
            spreads.append(
                f"| {state} | `{name}` | {len(all_)} | {100 * statistics.stdev(all_):.1f} % | {stretch:.1f} % |"
            )
    text = TEXT.format(
        runs=RUNS, least=LEAST, most=MOST, twice=2 * LEAST, rows="\n".join(rows), spreads="\n".join(spreads)
    )
    (HERE / "study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
