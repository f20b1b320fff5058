"""Replay gate runs from the sample banks with the shipped rules: false alarms, what is found, what intervals cover.

    python docs/gate/study.py

reads docs/gate/bank-*.jsonl (made by bank.py) and writes docs/gate/study.md and docs/gate/study.png: about ten minutes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from qbench import evidence
from qbench.gate import baseline, judge, speed
from qbench.gate.sampling import MOST
from qbench.gate.settings import Settings
from qbench.gate.speed import SpeedChange
from qbench.latency import undisturbed_ms
from qbench.statistics import clopper_pearson

HERE = Path(__file__).resolve().parent
LEAST = 6  # processes of conf/measure/ci.yaml
LOOPS = ("20", "21", "22", "40")
ROUNDS = 12  # of conf/measure/ci.yaml: a bank may have more
LOOPED = 10  # processes a side in an interval of a known ratio
RUNS = 2000
INTERVALS = 2000
SLOWER = (5, 10)  # percent, of the table
EXAMPLES, DISCORDANT = 10_000, 150  # of a score: 1.5 % of its decisions differ
CURVE = (2, 3, 4, 5, 6, 8, 10, 12, 15)  # percent, of the figure
CURVE_RUNS = 220
REVISION, ALONE, BESIDE = "stored baseline, in git", "stored baseline alone", "--qbench-base"
MODES = (REVISION, ALONE, BESIDE)
MOVED = ("worse", "better")
FIGURE = "study.png"
LIMIT_S = Settings(Path(), Path(), "").time_limit_s
SETUP_S = 20.0  # of a revision, until its first process
REAL = "real-runs.jsonl"  # made by real.py
HEAD = """| | runs with a false alarm | 5 % slower, found | 10 % slower, found | cells inconclusive | measured twice |
|---|---|---|---|---|---|"""
SPREADS = """| cell | processes | spread | from stretches | at equal times of fp32 |
|---|---|---|---|---|"""
TEXT = """# How far the gate can be trusted

Gate runs replayed from banks of recorded timing processes (`bank-*.jsonl`, made by `bank.py`; this page is made by
`study.py`), with the shipped rules of `qbench/gate/speed.py` and the measurement of `conf/measure/ci.yaml`: {least}
processes a cell; a baseline of {most}; in turns {least} pairs, up to {most} while an interval is wide and the time
limit of {limit:.0f} s allows it; as many processes where there is no revision. {runs} runs of the whole sweep in each
number; baseline, run and second measurement are stretches of processes that followed each other, none used twice in a
run. A slow-down is the logarithm added to one cell (each as often as the others); that ratios come out as they should
is tested with loops of 20, 21, 22 and 40 calls of one object.

- **{revision}**: `pytest --qbench` where the baseline was committed. A cell that seems to differ by more than 2 % is
  measured once more, in turns with the revision of its baseline, and judged on that alone; it must go the same way.
- **{alone}**: the same where git does not know the baseline. What moved is measured as often again, and 8 % count: a
  machine's own speed, and with it the ratio of float to int8, drifts by several percent within an hour.
- **{beside}**: everything in turns from the start, 2 % count.

![Share of slow-downs found]({figure})

{tables}

How much a process' value (the log of fp32's time over the cell's, each from the fastest quarter of its blocks) differs
from process to process: standard deviation; the same from the means of stretches of {least}, larger where a machine
drifts; and that at equal times of fp32, at which `speed.change` compares.

{spreads}

A score is judged by its metric's paired test and by what matters (0.3 points of accuracy). Of {runs} networks that lose
0.45 to 0.55 points on 10,000 examples, where 150 are decided otherwise, {lost:.1f} % are called worse; of as many that
decide 150 otherwise by chance alone, {even:.1f} % are called worse or better.

Three limits. The replayed runs draw on the same processes again and again, so the shares are less certain than {runs}
independent runs would make them (the bounds take them for independent). Baseline and run come from one session on one
machine, so that what shifts from day to day is not in them. And the children of one fork server are alike, which real
runs showed to matter: on a noisy AMD Zen 4 one of seven runs called `ci_mobilenet_v2[ptdq-per_channel-symmetric]` 14 %
slower (+9 to +19 %) than the same code beside it; its processes were slower from the first on. Six fork servers, timed
in turns there, differed by a standard deviation of 1.6 to 2.6 % (ptdq) and 2.7 to 3.4 % (ptsq of that network), of
which the scatter of their processes explains 1.1 to 1.3 % and 1.5 to 1.8 %; six copies of the model's files, in one
server, did not differ by more than their processes. Where libraries and memory lie is a server's, and its processes
share it: that is the probable cause. Since then the timing processes of a cell have no server in common: each loaded
torch itself in the runs below, and comes from a server of its own by now. The bank that says "of one fork
server" is older: its share of false alarms is too small, its processes timed one task each, and the seconds of a
process are an estimate. `quiet` and `loaded` are of an AMD Zen 5 (two cores of a virtual machine), `noisy` is of an AMD
Zen 4 whose neighbours make fp32 up to twice as slow for seconds, and on which other work went on.

{real}
"""
Measure = Callable[[str, int], SpeedChange]  # of a cell, from so many processes
Loops = dict[str, list[float]]


@dataclass(frozen=True)
class Bank:
    """By cell, of each process the value (log speed-up) and the log of fp32's time; `loops` are those of known ratio.

    A process takes `loading` seconds to start and `timing` for all cells.
    """

    values: dict[str, list[float]]
    fp32: dict[str, list[float]]
    loops: list[tuple[Loops, Loops]]  # of each task: by number of calls, values and times as above
    loading: float
    timing: float
    one_server: bool  # do all processes come from one fork server?

    @property
    def size(self) -> int:
        """Processes of each cell."""
        return len(next(iter(self.values.values())))


def read(path: Path) -> Bank:
    """A bank, cut to the processes that all tasks have."""
    head, *lines = map(json.loads, path.read_text().splitlines())
    cells = _logs([line["ms"] for line in lines])
    whole = min(map(len, cells[0].values()))
    values, fp32 = ({name: side[:whole] for name, side in sides.items()} for sides in cells)
    tasks = dict.fromkeys(line["task"] for line in lines)
    loops = [_logs([line["loops"] for line in lines if line["task"] == task and "loops" in line]) for task in tasks]
    return Bank(values, fp32, loops, head["loading"], head["timing"], head.get("one_server", False))


def _logs(processes: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Loops, Loops]:
    values: Loops = {}
    times: Loops = {}
    for ms in processes:
        for name in (name for name in ms if name != "eager"):
            fp32, cell = (undisturbed_ms(ms[who][:ROUNDS]) for who in ("eager", name))
            values.setdefault(name, []).append(math.log(fp32 / cell))
            times.setdefault(name, []).append(math.log(fp32))
    return values, times


class Run:
    """One run of the gate, replayed: which processes are the baseline's, the run's, the second measurement's."""

    def __init__(self, bank: Bank, mode: str, slower: Mapping[str, float], draw: random.Random) -> None:
        """`slower` has the log by which a cell of the run is slowed down."""
        self.bank, self.mode, self.slower, self.names = bank, mode, slower, list(bank.values)
        lengths = {REVISION: (MOST, LEAST, 2 * MOST), ALONE: (MOST, 2 * MOST, 0)}
        self.baseline, self.own, self.again = _stretches(bank.size, lengths.get(mode, (0, 0, 4 * MOST)), draw)

    def stored(self, name: str, count: int) -> SpeedChange:
        """Against the baseline, from so many processes."""
        values, times = self.bank.values[name], self.bank.fp32[name]
        base, own = range(self.baseline, self.baseline + MOST), range(self.own, self.own + count)
        now = [values[i] - self.slower.get(name, 0.0) for i in own]
        return speed.change([values[i] for i in base], now, [times[i] for i in base], [times[i] for i in own])

    def in_turns(self, name: str, count: int) -> SpeedChange:
        """From so many pairs; every second one the other way round."""
        values, times, first = self.bank.values[name], self.bank.fp32[name], self.again
        base = [first + 2 * i + i % 2 for i in range(count)]
        head = [first + 2 * i + 1 - i % 2 for i in range(count)]
        now = [values[i] - self.slower.get(name, 0.0) for i in head]
        return speed.paired_change([values[i] for i in base], now, [times[i] for i in base], [times[i] for i in head])

    def fit(self, seconds: float, sides: int, tasks: int) -> int:
        """How many processes, each of so many sides and with the cells of so many tasks, this time is enough for."""
        of_all = len({_task(name) for name in self.names})
        of_one = self.bank.loading + self.bank.timing * tasks / of_all
        return max(speed.LEAST, min(MOST, int(seconds / sides / of_one)))

    def words(self) -> tuple[dict[str, str], int]:
        """The verdict of each cell, and how many were measured a second time."""
        delta = speed.DRIFT if self.mode == ALONE else speed.DELTA
        measure = self.in_turns if self.mode == BESIDE else self.stored
        whole = self.fit(LIMIT_S, 1, len({_task(name) for name in self.names}))
        found, count = _until(self.names, measure, LEAST if self.mode == REVISION else whole, delta)
        if self.mode == REVISION:
            suspects = [name for name in self.names if abs(found[name].estimate) > delta]
            left = LIMIT_S - SETUP_S - LEAST * (self.bank.loading + self.bank.timing)
            pairs = self.fit(left, 2, len({_task(name) for name in suspects}))
            again = {name: _until([name], self.in_turns, pairs, delta)[0][name] for name in suspects}
            quiet = {name: "inconclusive" if speed.wide(found[name], delta) else "ok" for name in self.names}
            words = _judged(again, delta)
            agreeing = {n: word for n, word in words.items() if again[n].estimate * found[n].estimate > 0.0}
            return quiet | dict.fromkeys(again, "not significant") | agreeing, len(suspects)
        tasks = {_task(name) for name, word in _judged(found, delta).items() if word in MOVED}
        moved = [name for name in self.names if _task(name) in tasks]
        words = _judged(found | {name: measure(name, 2 * count) for name in moved}, delta)
        return {name: word if name in moved or word not in MOVED else "ok" for name, word in words.items()}, len(moved)


def _until(names: Sequence[str], measure: Measure, most: int, delta: float) -> tuple[dict[str, SpeedChange], int]:
    """As many as it takes until no interval is wide, LEAST or `most` at least; and how many that are."""
    count = min(LEAST, most)
    while True:
        found = {name: measure(name, count) for name in names}
        if count >= most or not any(speed.wide(change, delta) for change in found.values()):
            return found, count
        count += 1


def _judged(found: Mapping[str, SpeedChange], delta: float) -> dict[str, str]:
    levels = speed.holm({name: change.p for name, change in found.items()})
    return {name: speed.verdict(change, levels[name], delta) for name, change in found.items()}


def _task(name: str) -> str:
    return name.partition("[")[0]


def _stretches(size: int, lengths: Sequence[int], draw: random.Random) -> list[int]:
    """Where stretches of these lengths begin that do not overlap, in random order and places."""
    gaps = sorted(draw.randrange(size - sum(lengths) + 1) for _ in lengths)
    begins, used = [0] * len(lengths), 0
    for gap, index in zip(gaps, draw.sample(range(len(lengths)), len(lengths)), strict=True):
        begins[index] = gap + used
        used += lengths[index]
    return begins


def found(bank: Bank, mode: str, percent: int, runs: int, draw: random.Random) -> float:
    """The share of runs that call a cell worse which is so many percent slower; each cell as often as the others."""
    names, hits = list(bank.values), 0
    for index in range(runs):
        cell = names[index % len(names)]
        hits += Run(bank, mode, {cell: math.log1p(percent / 100)}, draw).words()[0][cell] == "worse"
    return hits / runs


def table(bank: Bank) -> list[str]:
    """The rows of one bank."""
    draw, rows = random.Random(0), []
    for mode in MODES:
        alarms = doubtful = again = again_in = 0
        for _ in range(RUNS):
            words, twice = Run(bank, mode, {}, draw).words()
            alarms += any(word in MOVED for word in words.values())
            doubtful += sum(word == "inconclusive" for word in words.values())
            again, again_in = again + twice, again_in + bool(twice)
        worst = 100 * clopper_pearson(alarms, RUNS)[1]
        cells = [
            f"{100 * alarms / RUNS:.2f} % (at most {worst:.2f} %)",
            *(f"{100 * found(bank, mode, percent, RUNS, draw):.1f} %" for percent in SLOWER),
            f"{100 * doubtful / RUNS / len(bank.values):.1f} %",
            f"{100 * again_in / RUNS:.0f} % of runs, {again / RUNS:.1f} cells a run",
        ]
        rows.append(f"| {mode} | {' | '.join(cells)} |")
    return rows


def coverage(bank: Bank) -> tuple[float, int]:
    """The share of 95 % intervals that hold the ratio of two loops which their calls tell, and how many there were."""
    draw, covered, total = random.Random(0), 0, 0
    for values, times in bank.loops:
        for count in LOOPS:
            for _ in range(INTERVALS // (len(LOOPS) * len(bank.loops))):
                picks = draw.sample(range(len(values[count])), 2 * LOOPED)
                one, other = picks[:LOOPED], picks[LOOPED:]
                sides = [[values["20"][i] for i in one], [values[count][i] for i in other]]
                change = speed.change(*sides, [times["20"][i] for i in one], [times[count][i] for i in other])
                covered += abs(change.estimate - math.log(int(count) / 20)) <= change.reach()
                total += 1
    return covered / total, total


def losses(net: int, runs: int, draw: random.Random) -> float:
    """The share of runs in which a score is called worse, or better, that lost about so many of EXAMPLES decisions.

    `net` +- 5 more are lost than gained; DISCORDANT in all, which by chance of `net` 0.
    """
    stored = baseline.read(next((HERE.parents[1] / "results" / "baseline").glob("ci_mobilenet*ptsq*.json")))
    right = np.ones(EXAMPLES, dtype=bool)
    right[: EXAMPLES // 10] = False
    called = 0
    for _ in range(runs):
        lost = (
            (DISCORDANT + net + draw.randint(-5, 5)) // 2
            if net
            else sum(draw.getrandbits(1) for _ in range(DISCORDANT))
        )
        now = right.copy()
        now[EXAMPLES // 10 : EXAMPLES // 10 + lost] = False
        now[: DISCORDANT - lost] = True
        sides = [
            dataclasses.replace(
                stored,
                evidence=evidence.hits(hit, np.arange(EXAMPLES)),
                metrics={**stored.metrics, "score": float(hit.mean())},
            )
            for hit in (right, now)
        ]
        called += next(v.word for v in judge.exact(*sides, {}) if v.metric == "score") in MOVED
    return called / runs


def spread(bank: Bank, name: str) -> str:
    """A cell's row of the table of spreads."""
    values, times = bank.values[name], bank.fp32[name]
    slope = statistics.linear_regression(times, values).slope
    level = [value - slope * time for value, time in zip(values, times, strict=True)]

    def of_stretches(side: Sequence[float]) -> float:
        means = [statistics.mean(side[i : i + LEAST]) for i in range(0, len(side) - LEAST + 1, LEAST)]
        return 100 * statistics.stdev(means) * math.sqrt(LEAST)

    numbers = 100 * statistics.stdev(values), of_stretches(values), of_stretches(level)
    return f"| `{name}` | {len(values)} | {' | '.join(f'{number:.1f} %' for number in numbers)} |"


@dataclass(frozen=True)
class Study:
    """What is told of one bank."""

    table: str
    spreads: str
    curves: dict[str, list[float]]  # percent of slow-downs found, by mode


def study(path: Path) -> Study:
    """Of one bank: some minutes."""
    state, bank = _state(path), read(path)
    share, total = coverage(bank)
    told = (
        f"**{state}**: {bank.size} processes a cell{', of one fork server' * bank.one_server}, "
        f"{bank.loading + bank.timing:.1f} s each for all cells; of {total} intervals of 95 % {100 * share:.1f} % hold "
        f"the known ratio"
    )
    curves = {
        mode: [100 * found(bank, mode, percent, CURVE_RUNS, random.Random(1)) for percent in CURVE] for mode in MODES
    }
    spreads = "\n".join(spread(bank, name) for name in bank.values)
    return Study("\n".join([told, "", HEAD, *table(bank)]), f"**{state}**\n\n{SPREADS}\n{spreads}", curves)


def _state(path: Path) -> str:
    return path.stem.partition("-")[2].replace("-", ", ")


def draw_curves(studies: Mapping[str, Study]) -> None:
    """study.png: what share of slow-downs each mode finds."""
    figure, panels = plt.subplots(1, len(studies), figsize=(3.8 * len(studies), 3.6), sharey=True, squeeze=False)
    for panel, (state, one) in zip(panels[0], studies.items(), strict=True):
        for (mode, shares), marker in zip(one.curves.items(), "os^", strict=True):
            panel.plot(CURVE, shares, marker=marker, markersize=4, label=mode)
        panel.set(title=state, xlabel="one cell slower by (%)", ylim=(-3, 103))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("runs that find it (%)")
    panels[0][-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / FIGURE, dpi=120)


def real_runs() -> str:
    """What the runs of real.py say."""
    runs = [json.loads(line) for line in (HERE / REAL).read_text().splitlines()]
    red, seconds = sum(run["exit code"] != 0 for run in runs), sorted(run["seconds"] for run in runs)
    words = [word for run in runs for cell in run["words"].values() for word in cell.values()]
    told = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "nothing else"
    peaks = [[run["memory"][name] for run in runs] for name in runs[0]["memory"]]
    apart = max(max(peak) - min(peak) for peak in peaks) / 1024
    return (
        f"{len(runs)} real runs of the whole sweep since then, one after another, on unchanged code (`real.py`, "
        f"`{REAL}`, an AMD Zen 5): {red} of them red; {seconds[0]} to {seconds[-1]} s each, "
        f"{statistics.median(seconds):.0f} in the median. Beside `ok` they say, in all: {told}. The peak memory of a "
        f"cell differs by at most {apart:.0f} KiB between runs."
    )


def main() -> None:
    """Write study.md and study.png."""
    paths = sorted(HERE.glob("bank-*.jsonl"), key=lambda path: (path.stem != "bank-quiet", path.stem))
    with ProcessPoolExecutor() as pool:
        studies = dict(zip(map(_state, paths), pool.map(study, paths), strict=True))
    draw_curves(studies)
    text = TEXT.format(
        runs=RUNS, least=LEAST, most=MOST, limit=LIMIT_S, revision=REVISION, alone=ALONE, beside=BESIDE, figure=FIGURE,
        lost=100 * losses(50, RUNS, random.Random(0)), even=100 * losses(0, RUNS, random.Random(0)),
        tables="\n\n".join(one.table for one in studies.values()),
        spreads="\n\n".join(one.spreads for one in studies.values()), real=real_runs(),
    )  # fmt: skip
    (HERE / "study.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
