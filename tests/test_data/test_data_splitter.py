"""Splits: properties, agreement with scikit-learn and skfolio, and wrong-side purges that are caught."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from skfolio.model_selection import CombinatorialPurgedCV
from sklearn.model_selection import TimeSeriesSplit

from data.data_splitter import (
    CombinatorialPurgedSplit,
    PurgedTimeSeriesSplit,
    WalkForwardSplit,
    create_train_val_test_split,
    split_latest,
)
from utils.base import DataError, InsufficientDataError, UsageError

QUICK = settings(deadline=None, max_examples=40)


def check_fold(train, test, label_end, *, embargo=0, both_sides=False):
    """Fail where a training label overlaps the test block, or a test label a later training row."""
    assert len(train)
    assert len(test)
    assert not np.intersect1d(train, test).size, "a row on both sides"
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    before = train[train < test[0]]
    assert (label_end[before] < test[0]).all(), "a training label reaches into the test block"
    after = train[train > test[0]]
    if both_sides:
        assert (after > label_end[test].max() + embargo).all(), "a test label reaches into training rows"
    else:
        assert not len(after), "training rows after the test block"
        assert (label_end[before] < test[0] - embargo).all(), "no embargo"


labels = st.integers(0, 2**32 - 1)


def random_label_ends(n_rows, seed, longest):
    """Label ends of uneven length, as halts and missing sessions make them."""
    spans = np.random.default_rng(seed).integers(1, longest + 1, n_rows)
    return np.arange(n_rows) + spans


# --- PurgedTimeSeriesSplit ---


@QUICK
@given(
    n_rows=st.integers(20, 300),
    n_splits=st.integers(2, 8),
    gap=st.integers(0, 12),
    embargo=st.integers(0, 5),
    test_size=st.none() | st.integers(1, 30),
    max_train=st.none() | st.integers(1, 100),
)
def test_folds_are_those_of_scikit_learn(n_rows, n_splits, gap, embargo, test_size, max_train):
    ours = PurgedTimeSeriesSplit(
        n_splits, test_size_bars=test_size, purge_bars=gap, embargo_bars=embargo, max_train_bars=max_train
    )
    theirs = TimeSeriesSplit(n_splits, test_size=test_size, gap=gap + embargo, max_train_size=max_train)
    try:
        expected = list(theirs.split(np.empty(n_rows)))
    except ValueError:
        with pytest.raises(InsufficientDataError):
            list(ours.split(n_rows))
        return
    folds = list(ours.split(n_rows))
    assert len(folds) == len(expected)
    for (train, test), (their_train, their_test) in zip(folds, expected, strict=True):
        np.testing.assert_array_equal(train, their_train)
        np.testing.assert_array_equal(test, their_test)


@QUICK
@given(seed=labels, n_rows=st.integers(60, 300), longest=st.integers(1, 10), embargo=st.integers(0, 5))
def test_no_training_label_overlaps_a_test_block(seed, n_rows, longest, embargo):
    label_end = random_label_ends(n_rows, seed, longest)
    folds = list(PurgedTimeSeriesSplit(4, embargo_bars=embargo).split(n_rows, label_end))
    for train, test in folds:
        check_fold(train, test, label_end, embargo=embargo)
        # Nothing is dropped without need.
        kept = np.flatnonzero(label_end[: test[0]] < test[0] - embargo)
        np.testing.assert_array_equal(train, kept)
    covered = np.concatenate([test for _, test in folds])
    np.testing.assert_array_equal(covered, np.arange(covered[0], n_rows))


@pytest.mark.parametrize("fault", ["after the block", "one row short", "from the beginning"])
def test_a_purge_that_is_wrong_is_caught(fault):
    n_rows, horizon = 200, 5
    label_end = np.arange(n_rows) + horizon
    for train, test in PurgedTimeSeriesSplit(3, purge_bars=horizon).split(n_rows):
        check_fold(train, test, label_end)
        rows = np.arange(test[0])
        planted = {
            "after the block": (rows, test[:-horizon]),
            "one row short": (rows[: -horizon + 1], test),
            "from the beginning": (rows[horizon:], test),
        }[fault]
        with pytest.raises(AssertionError, match="reaches into the test"):
            check_fold(*planted, label_end)


def test_rows_that_are_never_labelled_are_never_trained_on():
    label_end = np.arange(100) + 5
    label_end[40:45] = 100
    for train, _ in PurgedTimeSeriesSplit(3).split(100, label_end):
        assert not np.isin(np.arange(40, 45), train).any()


def test_a_panel_is_cut_between_sessions():
    date = np.repeat(np.arange("2020-01-01", "2020-03-01", dtype="datetime64[D]"), 7)
    for train, test in PurgedTimeSeriesSplit(4, test_size_bars=45, purge_bars=14).split(date, date=date):
        assert date[train[-1]] < date[test[0]]
        assert test[0] % 7 == 0


def test_impossible_purged_splits_are_refused():
    with pytest.raises(InsufficientDataError, match="fewer splits"):
        list(PurgedTimeSeriesSplit(5).split(4))
    with pytest.raises(InsufficientDataError, match="fold 0 of 2 has 0 training"):
        list(PurgedTimeSeriesSplit(2, purge_bars=40).split(90))
    with pytest.raises(UsageError, match="n_splits is 0"):
        PurgedTimeSeriesSplit(0)
    with pytest.raises(UsageError, match="purge_bars is -1"):
        PurgedTimeSeriesSplit(purge_bars=-1)
    with pytest.raises(DataError, match="row 3 ends at row 1"):
        list(PurgedTimeSeriesSplit(2).split(9, [1, 2, 3, 1, 5, 6, 7, 8, 9]))
    with pytest.raises(DataError, match="shape"):
        list(PurgedTimeSeriesSplit(2).split(9, [1, 2]))


# --- one split ---


@QUICK
@given(seed=labels, n_rows=st.integers(60, 400), longest=st.integers(1, 8), embargo=st.integers(0, 3))
def test_a_single_split_keeps_order_and_purges_both_borders(seed, n_rows, longest, embargo):
    label_end = random_label_ends(n_rows, seed, longest)
    train, validation, test = create_train_val_test_split(
        n_rows, label_end_position=label_end, embargo_bars=embargo
    )
    check_fold(train, validation, label_end, embargo=embargo)
    check_fold(validation, test, label_end, embargo=embargo)
    np.testing.assert_array_equal(test, np.arange(n_rows - int(n_rows * 0.2), n_rows))
    border = validation[0]
    np.testing.assert_array_equal(train, np.flatnonzero(label_end[:border] < border - embargo))


def test_a_single_split_of_too_few_rows_is_refused():
    with pytest.raises(InsufficientDataError, match="give more rows"):
        create_train_val_test_split(12, purge_bars=5)


# --- combinatorial ---


@QUICK
@given(
    per_block=st.integers(12, 30),
    n_blocks=st.integers(3, 7),
    n_test=st.integers(2, 3),
    purge=st.integers(0, 5),
    embargo=st.integers(0, 4),
)
def test_combinatorial_splits_are_those_of_skfolio(per_block, n_blocks, n_test, purge, embargo):
    # Where a block between two tests is purged away, skfolio trains on nothing and ours refuses.
    assume(n_test < n_blocks and per_block > 2 * purge + embargo)
    n_rows = per_block * n_blocks
    ours = CombinatorialPurgedSplit(n_blocks, n_test, purge_bars=purge, embargo_bars=embargo)
    theirs = CombinatorialPurgedCV(n_blocks, n_test, purged_size=purge, embargo_size=embargo)
    splits = list(ours.split(n_rows))
    assert len(splits) == theirs.n_splits
    for (train, tests), (their_train, their_tests) in zip(
        splits, theirs.split(np.empty((n_rows, 1))), strict=True
    ):
        np.testing.assert_array_equal(train, their_train)
        for test, their_test in zip(tests, their_tests, strict=True):
            np.testing.assert_array_equal(test, their_test)


@QUICK
@given(seed=labels, n_rows=st.integers(120, 300), longest=st.integers(1, 6), embargo=st.integers(0, 4))
def test_combinatorial_splits_share_no_label(seed, n_rows, longest, embargo):
    label_end = random_label_ends(n_rows, seed, longest)
    counts = np.zeros(n_rows, dtype=int)
    for train, tests in CombinatorialPurgedSplit(6, 2, embargo_bars=embargo).split(n_rows, label_end):
        for test in tests:
            check_fold(train, test, label_end, embargo=embargo, both_sides=True)
            counts[test] += 1
    # Every row is tested equally often: with the partners that its block can have.
    assert set(counts) == {5}


def test_a_combinatorial_purge_on_the_wrong_side_is_caught():
    n_rows, horizon = 120, 5
    label_end = np.arange(n_rows) + horizon
    for train, tests in CombinatorialPurgedSplit(4, 1, purge_bars=horizon).split(n_rows):
        test = tests[0]
        check_fold(train, test, label_end, both_sides=True)
        wrong = np.setdiff1d(
            np.arange(n_rows), np.concatenate([test, np.arange(test[-1] + 1, test[-1] + 11)])
        )
        if test[0]:
            with pytest.raises(AssertionError, match="reaches into the test"):
                check_fold(wrong, test, label_end, both_sides=True)


def test_impossible_combinations_are_refused():
    with pytest.raises(UsageError, match="choose fewer"):
        CombinatorialPurgedSplit(3, 3)
    with pytest.raises(InsufficientDataError, match="fewer blocks"):
        list(CombinatorialPurgedSplit(6, 2, purge_bars=30).split(60))


# --- walk-forward over a panel ---


def make_panel(seed, n_sessions, n_symbols, horizon, listed_share=0.7):
    """Dates and label ends of symbols that are listed at different times, some with missing sessions."""
    rng = np.random.default_rng(seed)
    sessions = np.asarray(pd.bdate_range("2001-01-01", periods=n_sessions), dtype="datetime64[D]")
    dates, ends = [], []
    for number in range(n_symbols):
        first = 0 if number == 0 else int(rng.integers(0, int(n_sessions * listed_share)))
        own = sessions[first:]
        own = own if number == 0 else own[rng.random(len(own)) > 0.03]
        dates.append(own)
        ends.append(np.concatenate([own[horizon:], np.full(min(horizon, len(own)), np.datetime64("NaT"))]))
    date, label_end = np.concatenate(dates), np.concatenate(ends)
    order = np.argsort(date, kind="stable")
    return date[order], label_end[order]


@settings(deadline=None, max_examples=25)
@given(
    seed=labels,
    n_symbols=st.integers(1, 5),
    horizon=st.sampled_from([1, 5, 20]),
    embargo=st.integers(0, 6),
    lag=st.integers(0, 2),
    max_train=st.none() | st.integers(50, 200),
)
def test_walk_forward_folds_hold_their_promises(seed, n_symbols, horizon, embargo, lag, max_train):
    date, label_end = make_panel(seed, 420, n_symbols, horizon)
    split = WalkForwardSplit(
        test_bars=60, min_train_bars=120, lag_bars=lag, embargo_bars=embargo, max_train_bars=max_train
    )
    folds = split.folds(date, label_end, horizon_bars=horizon)
    sessions = np.unique(date)
    for number, fold in enumerate(folds):
        assert fold.number == number
        start = np.searchsorted(sessions, fold.test_start)
        last_allowed = sessions[start - lag - embargo]
        ends = label_end[fold.train_idx]
        assert not np.isnat(ends).any()
        assert ends.max() == fold.train_end <= last_allowed
        # A test session stands on the test's side only, with every row that it has.
        tested = (date >= fold.test_start) & (date <= fold.test_end)
        np.testing.assert_array_equal(fold.test_idx, np.flatnonzero(tested))
        assert date[fold.train_idx].max() < fold.test_start
        n_train = len(np.unique(date[fold.train_idx]))
        assert n_train <= (max_train or n_train)
        assert max_train is not None or n_train >= 120
    covered = np.concatenate([fold.test_idx for fold in folds])
    np.testing.assert_array_equal(covered, np.arange(covered[0], len(date)))
    # The first fold trains on as little as is allowed, not on more.
    assert max_train is not None or len(np.unique(date[folds[0].train_idx])) == 120


def test_the_anchored_walk_forward_drops_no_row_without_need():
    date, label_end = make_panel(3, 400, 3, 5)
    for fold in WalkForwardSplit(test_bars=50, min_train_bars=150).folds(date, label_end, horizon_bars=5):
        sessions = np.unique(date)
        limit = sessions[np.searchsorted(sessions, fold.test_start) - 6]
        np.testing.assert_array_equal(fold.train_idx, np.flatnonzero(label_end <= limit))


def test_a_split_by_row_would_be_caught():
    date, label_end = make_panel(3, 300, 4, 5, listed_share=0.1)
    fold = WalkForwardSplit(test_bars=50, min_train_bars=150).folds(date, label_end, horizon_bars=5)[0]
    by_row = np.arange(fold.test_idx[0] - 5)
    assert (label_end[by_row] >= fold.test_start).any(), "the planted fault shows"
    assert not (label_end[fold.train_idx] >= fold.test_start).any()


def test_panels_that_would_leak_or_are_too_short_are_refused():
    date, label_end = make_panel(0, 300, 1, 5)
    split = WalkForwardSplit(test_bars=50, min_train_bars=150)
    with pytest.raises(DataError, match="sooner than 5 sessions"):
        split.folds(date, date, horizon_bars=5)
    with pytest.raises(DataError, match="not ascending"):
        split.folds(date[::-1], label_end[::-1], horizon_bars=5)
    with pytest.raises(DataError, match="dates for"):
        split.folds(date[:-1], label_end, horizon_bars=5)
    with pytest.raises(InsufficientDataError, match="161; give a longer history"):
        split.folds(date[:160], label_end[:160], horizon_bars=5)
    assert len(split.folds(date[:161], label_end[:161], horizon_bars=5)) == 1
    with pytest.raises(InsufficientDataError, match="no labelled row"):
        split.folds(date, np.full(len(date), np.datetime64("NaT")), horizon_bars=5)
    with pytest.raises(UsageError, match="test_bars is 0"):
        WalkForwardSplit(test_bars=0)


@QUICK
@given(st.integers(30, 80), st.integers(1, 3), st.integers(1, 6), st.floats(0.05, 0.5))
def test_the_latest_sessions_are_set_apart_and_no_earlier_label_reaches_into_them(
    n_sessions: int, n_symbols: int, horizon: int, share: float
):
    days = np.datetime64("2020-01-01") + np.arange(n_sessions + horizon)
    date = np.repeat(days[:n_sessions], n_symbols)
    label_end = np.repeat(days[horizon:], n_symbols)
    earlier, later = split_latest(date, label_end, share, at_least_rows=1)
    first = date[later].min()
    assert (label_end[earlier] < first).all()
    assert set(later) == set(np.flatnonzero(date >= first))
    assert len(np.unique(date[later])) == pytest.approx(share * n_sessions, abs=1.01)
    left_out = np.setdiff1d(np.arange(len(date)), [*earlier, *later])
    assert (label_end[left_out] >= first).all(), "a row was left out for nothing"


def test_too_few_rows_to_set_any_apart_say_so():
    days = np.datetime64("2020-01-01") + np.arange(50)
    with pytest.raises(InsufficientDataError, match="38 to learn and 10 to stop by, 20 of each"):
        split_latest(days[:-1], days[1:], 0.2, at_least_rows=20)
