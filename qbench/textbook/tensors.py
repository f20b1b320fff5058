"""What the textbook says of tensors: symmetric or affine by their distribution, one scale or several by channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qbench.record import Record
from qbench.textbook.claims import LIMIT, Claim, Question, Row, in_unit, interval, limit, optional
from qbench.textbook.verdicts import (
    MARGIN_DB,
    better,
    gain,
    no_gain,
    relative,
    small,
    sqnr_gain,
    with_sqnr,
)

WEIGHTS = ("woq", "ptsq")  # woq shows the weights alone
BY_SQNR = (
    f"weakly where only the SQNR is higher, by {MARGIN_DB:g} dB at least. SQNR has no interval: it alone makes the "
    f"claim hold only where every row gains {MARGIN_DB:g} dB and no score contradicts."
)


def _pairs(
    asked: Question, methods: Sequence[str], axis: str, one: str, other: str
) -> Iterator[tuple[str, Record, Record]]:
    """For each task and method the cell with one choice on an axis and the cell with the other."""
    for task in asked.cells.tasks:
        for method in methods:
            cell, rival = (asked.cells.cell(task, method, **{axis: name}) for name in (one, other))
            if cell is not None and rival is not None:
                yield task, cell, rival


def _gain(task: str, one: Record, other: Record) -> Row:
    won, decibels = gain(one, other), sqnr_gain(one, other)
    texts = (task, one.method, in_unit(one, won), optional(decibels, "+.1f"))
    return Row(texts, better(won, decibels), (one, other), decibels)


def _by_sqnr(rows: Sequence[Row]) -> str:
    return with_sqnr([row.word for row in rows], [row.decibels for row in rows])


def symmetric_weights(asked: Question) -> list[Row]:
    """Affine weights against symmetric ones, a scale each channel."""
    rows = []
    for task, affine, symmetric in _pairs(asked, WEIGHTS, "scheme", "affine", "symmetric"):
        won, decibels = gain(affine, symmetric), sqnr_gain(affine, symmetric)
        texts = (task, affine.method, in_unit(affine, won), limit(affine), optional(decibels, "+.1f"))
        rows.append(Row(texts, no_gain(won, small(affine), decibels), (affine, symmetric), decibels))
    return rows


def affine_activations(asked: Question) -> list[Row]:
    """Affine activations against symmetric ones."""
    return [_gain(*pair) for pair in _pairs(asked, ("ptsq",), "activation_scheme", "affine", "symmetric")]


def _by_granularity(asked: Question) -> Iterator[tuple[str, Record, Record]]:
    return _pairs(asked, WEIGHTS, "granularity", "per_channel", "per_tensor")


def channels(asked: Question) -> list[Row]:
    """A scale each channel against one for the whole weight."""
    return [_gain(*pair) for pair in _by_granularity(asked)]


def depthwise(asked: Question) -> list[Row]:
    """The gain of a scale each channel on a depthwise network, less that on another network of its family."""
    rows = []
    pairs = list(_by_granularity(asked))
    for deep in (pair for pair in pairs if pair[0] in asked.depthwise):
        for plain in (pair for pair in pairs if pair[0] not in asked.depthwise):
            if (deep[1].method, deep[1].family) == (plain[1].method, plain[1].family):
                rows.append(_more(deep, plain))
    return rows


def _more(deep: tuple[str, Record, Record], plain: tuple[str, Record, Record]) -> Row:
    gains, decibels = [], []
    for _, one, other in (deep, plain):
        won = gain(one, other)
        gains += [] if won is None else [won.scaled(relative(one))]
        noise = sqnr_gain(one, other)
        decibels += [] if noise is None else [noise]
    more = gains[0] - gains[1] if len(gains) == 2 else None
    louder = decibels[0] - decibels[1] if len(decibels) == 2 else None
    texts = (f"{deep[0]} less {plain[0]}", deep[1].method, "" if more is None else f"{interval(more, '+.2f')} %")
    return Row((*texts, optional(louder, "+.1f")), better(more, louder), (*deep[1:], *plain[1:]), louder)


CLAIMS = (
    Claim(
        "Symmetric quantization suits weights",
        "Chosen by Data Distribution",
        "A zero point of 0 suits a distribution that is symmetric around zero, as that of weights.",
        "Affine weights must not gain anything over symmetric ones, a scale each channel. A row does not hold where "
        f"their gain is significant; it holds where the interval stays below {LIMIT} and the SQNR gains less than "
        f"{MARGIN_DB:g} dB, weakly where the middle of the interval stays below.",
        ("task", "method", "gain of affine (interval)", "small", "SQNR, dB"),
        symmetric_weights,
        figures=("histogram-weight.png",),
    ),
    Claim(
        "Affine quantization suits skewed tensors",
        "Chosen by Data Distribution",
        "A tensor that lies on one side of zero (activations after ReLU, say) wastes half of a symmetric range.",
        f"Affine against symmetric activations: a row holds where the gain in score is significant, {BY_SQNR}",
        ("task", "method", "gain of affine (interval)", "SQNR, dB"),
        affine_activations,
        _by_sqnr,
        figures=("histogram-activation.png",),
    ),
    Claim(
        "A scale each channel, where channels diverge",
        "Chosen by Quantization Scale",
        "One scale for a whole tensor loses precision where its channels have different ranges, as weights often do.",
        f"per_channel against per_tensor weights: a row holds where the gain in score is significant, {BY_SQNR}",
        ("task", "method", "gain of per_channel (interval)", "SQNR, dB"),
        channels,
        _by_sqnr,
        figures=("channels-weight.png",),
    ),
    Claim(
        "The more channels diverge, the more a scale each gains: depthwise networks",
        "Chosen by Quantization Scale",
        "Depthwise layers have one filter a channel, so their channels diverge most.",
        "The gain of per_channel on the depthwise network less that on the other, in percent of the fp32 score: a row "
        f"holds where the difference is significant, {BY_SQNR}",
        ("networks", "method", "difference of the gains (interval)", "SQNR, dB"),
        depthwise,
        _by_sqnr,
    ),
)
