"""What the textbook says of the methods: memory, accuracy, what they change, whom they suit."""

from __future__ import annotations

from pathlib import Path

from qbench import comparison as compare
from qbench.columns import score
from qbench.record import Record
from qbench.results import run_folder
from qbench.textbook.claims import LIMIT, Claim, Question, Row, in_unit, limit, optional, present
from qbench.textbook.selection import advised
from qbench.textbook.verdicts import (
    FAILS,
    HOLDS,
    MARGIN_DB,
    UNTESTED,
    WEAKLY,
    at_most,
    better,
    drop,
    gain,
    share,
    small,
    sqnr_gain,
)

INT8 = ("woq", "ptdq", "ptsq", "qat")
QUARTER, HALF = 0.3, 0.5  # of the bytes of fp32: scales and the program come on top of the quarter


def memory(asked: Question) -> list[Row]:
    """Bytes of the saved file, and of the parameters that a forward pass fetches, against fp32."""
    rows = []
    for task in asked.cells.tasks:
        fp32 = asked.cells.cell(task, "fp32")
        whole = None if fp32 is None else parameter_bytes(asked.results, fp32)
        for cell in present(asked.cells.cell(task, method) for method in INT8):
            file, fetched = cell.metrics.get("size_ratio"), parameter_bytes(asked.results, cell)
            part = fetched / whole if fetched and whole else None
            word = share(max((ratio for ratio in (file, part) if ratio is not None), default=None), QUARTER, HALF)
            sizes = optional(cell.metrics.get("size_bytes"), ".3f", 1e-6), optional(file, ".3f")
            texts = (task, cell.method, *sizes, optional(fetched, ".3f", 1e-6), optional(part, ".3f"))
            rows.append(Row(texts, word, tuple(present([cell, fp32]))))
    return rows


def parameter_bytes(results: Path, record: Record) -> int | None:
    """The bytes of the tensors in a cell's saved file; None where the file is gone."""
    path = run_folder(results, record.key) / "model.qb"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def accuracy(asked: Question) -> list[Row]:
    """The drop of each method's best recipe."""
    rows = []
    for task in asked.cells.tasks:
        best = compare.best_per_method(asked.cells.of(task))
        for cell in present(best.get(method) for method in INT8):
            texts = (task, compare.recipe_text(cell), score(cell, cell.metrics["score"]), in_unit(cell, drop(cell)))
            rows.append(Row((*texts, limit(cell)), at_most(drop(cell), small(cell)), (cell,)))
    return rows


def storage(asked: Question) -> list[Row]:
    """Weight-only against the methods that compute in int8."""
    rows = []
    for task in asked.cells.tasks:
        woq = asked.cells.cell(task, "woq")
        others = present(asked.cells.cell(task, method) for method in INT8[1:])
        if woq is None or not others:
            continue
        rival = max(others, key=lambda cell: cell.metrics.get("sqnr_db", 0.0))
        decibels, int8 = sqnr_gain(woq, rival), woq.metrics.get("int8_mac_fraction")
        noise = [optional(cell.metrics.get("sqnr_db"), ".1f") for cell in (woq, rival)]
        texts = (task, optional(int8, ".3f"), noise[0], f"{noise[1]} ({rival.method})", optional(decibels, "+.1f"))
        rows.append(Row(texts, _stores_only(int8, decibels), (woq, *others)))
    return rows


def _stores_only(int8: float | None, decibels: float | None) -> str:
    if int8 is None or decibels is None:
        return UNTESTED
    if int8 > 0.0 or decibels <= 0.0:
        return FAILS
    return HOLDS if decibels >= MARGIN_DB else WEAKLY


def suited_score(asked: Question) -> list[Row]:
    """What the advised method costs against the other."""
    rows = []
    for task, cell, other in advised(asked.cells):
        cost = gain(other, cell)
        drops = in_unit(cell, drop(cell)), in_unit(other, drop(other)), in_unit(cell, cost)
        texts = (task, cell.family, cell.method, *drops, limit(cell))
        rows.append(Row(texts, at_most(cost, small(cell)), (cell, other)))
    return rows


def recovery(asked: Question) -> list[Row]:
    """qat against ptsq, where ptsq lost significantly."""
    rows = []
    for task in asked.cells.tasks:
        for granularity in ("per_channel", "per_tensor"):
            ptsq, qat = (asked.cells.cell(task, method, granularity=granularity) for method in ("ptsq", "qat"))
            if ptsq is None or qat is None or compare.significance(ptsq) != "worse":
                continue
            won, decibels = gain(qat, ptsq), sqnr_gain(qat, ptsq)
            drops = in_unit(ptsq, drop(ptsq)), in_unit(qat, drop(qat)), in_unit(qat, won)
            recovered = f"{100 * (1 - compare.drop(qat) / compare.drop(ptsq)):.0f} %"
            texts = (task, granularity, *drops, recovered, optional(decibels, "+.1f"))
            rows.append(Row(texts, better(won, decibels), (ptsq, qat), decibels))
    return rows


def int8_output(asked: Question) -> list[Row]:
    """ptsq with a quantized result against ptsq that leaves its accumulator."""
    rows = []
    for task in asked.cells.tasks:
        codes, plain = asked.cells.cell(task, "ptsq", output="int8"), asked.cells.cell(task, "ptsq")
        if codes is None or plain is None:
            continue
        cost, decibels = gain(plain, codes), sqnr_gain(codes, plain)
        agreed = [optional(cell.metrics.get("agreement"), ".2f", 100) for cell in (codes, plain)]
        texts = (task, in_unit(codes, cost), limit(codes), *agreed, optional(decibels, "+.1f"))
        rows.append(Row(texts, at_most(cost, small(codes)), (codes, plain), decibels))
    return rows


CLAIMS = (
    Claim(
        "Int8 weights need a quarter of the memory and bandwidth",
        "What is Quantization",
        "Integer data relaxes what inference asks of memory and of its bandwidth.",
        f"Bytes have no error. A row holds where both shares are at most {QUARTER} (a quarter, scales and program on "
        f"top), weakly at most {HALF}. Parameters are what a forward pass fetches at least once.",
        ("task", "method", "file, MB", "of fp32", "parameters, MB", "of fp32"),
        memory,
    ),
    Claim(
        "The loss of accuracy is small",
        "Why Quantization",
        "A network has so many parameters that the precision of each hardly matters: quantizing costs little accuracy.",
        f"Small is {LIMIT}: MLPerf's rules for inference ask an int8 network to keep 99 %. A row holds where the whole "
        "interval of the drop lies below, weakly where its middle does. Each method is shown with the best of its "
        "recipes, which is chosen by the same examples: a slightly optimistic choice.",
        ("task", "best recipe", "score", "drop (95 % interval)", "small"),
        accuracy,
    ),
    Claim(
        "Weight-only quantization changes the storage, not the computation",
        "Weight-Only Quantization (WOQ)",
        "Only the stored format differs; every computation stays in floating point.",
        "A row holds where no multiply-accumulate ran in int8 and the SQNR of woq is the highest of all methods, by "
        f"{MARGIN_DB:g} dB at least; weakly, by less. SQNR has no interval.",
        ("task", "int8 share of woq", "SQNR of woq, dB", "next best, dB", "lead, dB"),
        storage,
    ),
    Claim(
        "PTDQ suits LSTM and Transformer, PTSQ suits CNN and GAN: the score",
        "Post-Training Dynamic Quantization (PTDQ); Post-Training Static Quantization (PTSQ)",
        "Dynamic where weights are many and computation is light, static where computation counts too.",
        f"A row holds where the advised method costs less than {LIMIT} against the other, interval and all; weakly "
        "where the middle of the interval does.",
        ("task", "family", "advised", "its drop", "drop of the other", "cost against the other", "small"),
        suited_score,
    ),
    Claim(
        "Quantization-aware training recovers what PTSQ loses",
        "Quantization-Aware Training (QAT)",
        "Fine-tuning with simulated quantization wins accuracy back where it matters.",
        "Asked only where ptsq is significantly worse than fp32. A row holds where the gain of qat over ptsq is "
        f"significant; weakly where only its SQNR is higher, by {MARGIN_DB:g} dB at least.",
        ("task", "granularity", "drop of ptsq", "drop of qat", "gain of qat", "recovered", "SQNR, dB"),
        recovery,
    ),
    Claim(
        "PTSQ quantizes its input and output too, and that costs little",
        "Post-Training Static Quantization (PTSQ)",
        "Weights, internal data and I/O data are all in the quantized format.",
        f"A row holds where the result as uint8 costs less than {LIMIT} against the float accumulator, interval and "
        "all; weakly where the middle of the interval does. Agreement with fp32 shows the ties of uint8 results.",
        ("task", "cost (interval)", "small", "agreement, %", "with float output, %", "SQNR, dB"),
        int8_output,
    ),
)
