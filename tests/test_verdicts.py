"""Words from intervals: every word of every rule, on records made up here; each expectation derived by hand."""

import pytest
from test_report import record

from qbench.textbook import verdicts
from qbench.textbook.verdicts import FAILS, HOLDS, OPEN, UNTESTED, WEAKLY, Difference

ABOVE, BELOW, AROUND = Difference(2, 1, 3), Difference(-2, -3, -1), Difference(0.5, -1, 2)


def test_a_difference_of_two_recipes_has_the_interval_of_differ():
    # Drops 0.05 (0.048 to 0.052) and 0.01 (0.008 to 0.012) of a score of 0.9.
    worse, good = record(drop=0.05), record(drop=0.01)
    won = verdicts.gain(good, worse)
    assert (won.value, won.low, won.high) == pytest.approx((0.04, 0.036, 0.044))
    assert verdicts.gain(worse, good).high < 0
    assert verdicts.relative(good) == pytest.approx(100 / 0.9)
    assert verdicts.small(good) == pytest.approx(0.009)


def test_it_holds_zero_exactly_where_the_intervals_overlap():
    first = record(drop=0.0)  # -0.002 to 0.002
    assert verdicts.gain(first, record(drop=0.0039)).low < 0  # from 0.0019
    assert verdicts.gain(first, record(drop=0.0041)).low > 0  # from 0.0021


def test_a_cell_without_an_interval_has_no_difference():
    bare = record()
    del bare.metrics["score_drop_ci_low"]
    assert verdicts.drop(bare) is None
    assert verdicts.gain(bare, record()) is None
    assert verdicts.sqnr_gain(bare, record()) is None


@pytest.mark.parametrize(
    ("difference", "decibels", "word"),
    [
        (ABOVE, -9.0, HOLDS),
        (BELOW, 9.0, FAILS),
        (AROUND, 1.0, WEAKLY),
        (AROUND, 0.9, OPEN),
        (AROUND, None, OPEN),
        (None, 9.0, UNTESTED),
    ],
)
def test_better(difference, decibels, word):
    assert verdicts.better(difference, decibels) == word


@pytest.mark.parametrize(("limit", "word"), [(3.1, HOLDS), (2.5, WEAKLY), (1.5, OPEN), (0.9, FAILS)])
def test_at_most(limit, word):
    assert verdicts.at_most(ABOVE, limit) == word  # 2 (1 to 3)
    assert verdicts.at_most(None, limit) == UNTESTED


@pytest.mark.parametrize(
    ("difference", "limit", "decibels", "word"),
    [
        (ABOVE, 9.0, -3.0, FAILS),  # significant, however small against the limit
        (BELOW, 9.0, None, HOLDS),
        (AROUND, 9.0, 0.9, HOLDS),
        (AROUND, 9.0, 1.0, WEAKLY),
        (AROUND, 1.0, -3.0, WEAKLY),
        (AROUND, 0.4, 3.0, OPEN),
        (None, 9.0, 3.0, UNTESTED),
    ],
)
def test_no_gain(difference, limit, decibels, word):
    assert verdicts.no_gain(difference, limit, decibels) == word


@pytest.mark.parametrize(("value", "word"), [(0.3, HOLDS), (0.31, WEAKLY), (0.51, FAILS), (None, UNTESTED)])
def test_share(value, word):
    assert verdicts.share(value, 0.3, 0.5) == word


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNTESTED], HOLDS),
        ([HOLDS, OPEN], WEAKLY),
        ([WEAKLY, WEAKLY], WEAKLY),
        ([HOLDS, WEAKLY, FAILS], WEAKLY),
        ([HOLDS, FAILS], FAILS),
        ([OPEN, FAILS], FAILS),
        ([OPEN, OPEN], OPEN),
        ([UNTESTED], UNTESTED),
        ([], UNTESTED),
    ],
)
def test_together(words, word):
    assert verdicts.together(words) == word


@pytest.mark.parametrize(
    ("words", "decibels", "word"),
    [
        ([WEAKLY, WEAKLY], [1.0, 7.0], HOLDS),
        ([WEAKLY, OPEN], [1.0, 0.9], WEAKLY),
        ([WEAKLY, FAILS], [1.0, 7.0], FAILS),
        ([WEAKLY, WEAKLY], [1.0, None], WEAKLY),
        ([WEAKLY], [7.0], WEAKLY),  # one row is no agreement
    ],
)
def test_sqnr_alone_needs_every_row(words, decibels, word):
    assert verdicts.with_sqnr(words, decibels) == word
