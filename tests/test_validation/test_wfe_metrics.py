"""Measures of forecasts: oracles, properties, and a planted model for each thing that they should show."""

import numpy as np
import pytest
from arch.bootstrap import CircularBlockBootstrap
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from validation import wfe_metrics as wfe
from validation.wfe_metrics import FoldMeasures, summarise_folds


def moving_sums(rng, n, window=5):
    """Values that overlap as labels do."""
    return np.convolve(rng.standard_t(5, n + window - 1), np.ones(window), mode="valid")


@pytest.mark.parametrize("block", [1, 10, 63])
def test_the_block_bootstrap_agrees_with_arch(block):
    values = moving_sums(np.random.default_rng(0), 800) + 0.3
    ours = wfe.block_bootstrap_means(values, block, 4_000, np.random.default_rng(1))
    theirs = CircularBlockBootstrap(block, values, seed=2).apply(np.mean, 4_000).ravel()
    assert ours.std() == pytest.approx(theirs.std(), rel=0.06)
    assert ours.mean() == pytest.approx(values.mean(), abs=4 * theirs.std() / np.sqrt(4_000))
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(ours, share) == pytest.approx(np.quantile(theirs, share), abs=0.12 * theirs.std())


def test_blocks_see_the_overlap_that_single_rows_do_not():
    values = moving_sums(np.random.default_rng(3), 2_000)
    rng = np.random.default_rng(4)
    single = wfe.block_bootstrap_means(values, 1, 1_000, rng).std()
    blocks = wfe.block_bootstrap_means(values, 25, 1_000, rng).std()
    assert blocks / single == pytest.approx(np.sqrt(5), rel=0.25)


def test_resampled_sums_are_sums_of_runs_of_the_circle():
    values = np.array([1.0, 10.0, 100.0, 1000.0])
    sums = wfe.resampled_block_sums(values, 3, 200, np.random.default_rng(0))
    assert set(sums.ravel()) == {111.0, 1110.0, 1101.0, 1011.0}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), n_symbols=st.integers(1, 5))
def test_the_ic_by_session_is_the_mean_spearman(seed, n_symbols):
    rng = np.random.default_rng(seed)
    n_sessions = 60
    keep = rng.random(n_sessions * n_symbols) < 0.9
    session = np.repeat(np.arange(n_sessions), n_symbols)[keep]
    session = np.unique(session, return_inverse=True)[1]
    symbol = np.tile(np.arange(n_symbols), n_sessions)[keep]
    signal = np.round(rng.normal(size=keep.sum()), 1)
    outcome = 0.2 * signal + rng.normal(size=keep.sum())
    by_session = wfe.ic_by_session(signal, outcome, session, symbol)
    expected = [spearmanr(signal[symbol == s], outcome[symbol == s]).statistic for s in range(n_symbols)]
    assert by_session.mean() == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_constant_signal_has_no_ic():
    n = 100
    outcome = np.random.default_rng(0).normal(size=n)
    codes = np.arange(n), np.zeros(n, dtype=int)
    assert not len(wfe.ic_by_session(np.ones(n), outcome, *codes))
    assert not len(wfe.ic_by_session(outcome[:10], outcome[:10], np.arange(10), np.zeros(10, dtype=int)))
    assert wfe.mean_or_none(np.empty(0)) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=40))
def test_the_rank_among_the_past_is_the_naive_one(values):
    values = np.array(values)
    ranks = wfe.rank_among_past(values)
    for i, rank in enumerate(ranks):
        below = np.sum(values[:i] < values[i])
        equal = np.sum(values[:i] == values[i])
        assert rank == pytest.approx((below + equal / 2 + 0.5) / (i + 1) - 0.5)
    # It is causal: cutting the future changes nothing.
    np.testing.assert_array_equal(wfe.rank_among_past(values[:-1]), ranks[:-1])


def test_p_values_of_independent_noise_are_uniform():
    rng = np.random.default_rng(5)
    p = [wfe.block_bootstrap_p_value(rng.normal(size=1_000), 1, n_resamples=300) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.09
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_p_values_of_overlapping_values_keep_their_rate_and_those_of_short_blocks_do_not():
    rng = np.random.default_rng(6)
    noise = [moving_sums(rng, 1_000, 20) for _ in range(200)]
    p = [wfe.block_bootstrap_p_value(values, 20, n_resamples=300) for values in noise]
    assert np.mean(np.array(p) <= 0.05) < 0.11
    # The planted fault: pretending that the labels do not overlap.
    wrong = [values.mean() / (values.std() / np.sqrt(len(values))) > 1.645 for values in noise]
    assert np.mean(wrong) > 0.25


def test_p_values_are_refused_where_nothing_can_be_told():
    assert wfe.block_bootstrap_p_value(np.zeros(500), 5) is None
    assert wfe.block_bootstrap_p_value(np.random.default_rng(0).normal(size=60), 5) is None
    shifted = np.random.default_rng(0).normal(1.0, 1.0, size=500)
    assert wfe.block_bootstrap_p_value(shifted, 5, n_resamples=999) == pytest.approx(1 / 1_000)
    assert wfe.block_bootstrap_p_value(-shifted, 5) > 0.99


def test_hits_and_what_always_up_would_have_had():
    outcome = np.array([1.0, 2.0, -1.0, 0.0, 3.0])
    assert wfe.share_up(outcome) == 0.75
    assert wfe.hit_rate(np.array([1.0, -1.0, -1.0, 1.0, 1.0]), outcome) == 0.75
    assert wfe.hit_minus_base(np.ones(5), outcome) == 0.0
    assert wfe.hit_rate(np.ones(3), np.zeros(3)) is None
    assert wfe.hit_minus_base(np.ones(3), np.zeros(3)) is None


def test_slope_and_skill_of_known_forecasts():
    rng = np.random.default_rng(7)
    forecast = rng.normal(size=5_000)
    outcome = 0.5 * forecast + rng.normal(size=5_000)
    assert wfe.calibration_slope(forecast, outcome) == pytest.approx(np.polyfit(forecast, outcome, 1)[0])
    assert wfe.calibration_slope(np.ones(50), outcome[:50]) is None
    assert wfe.skill(0.5 * forecast, np.zeros(5_000), outcome) == pytest.approx(0.2, abs=0.03)
    assert wfe.skill(2.0 * forecast, np.zeros(5_000), outcome) < 0, "an overconfident forecast has none"
    assert wfe.skill(outcome, outcome, outcome) is None


def test_an_undefined_efficiency_is_no_efficiency():
    assert wfe.walk_forward_efficiency(0.54, 0.52, 0.56, 0.52) == pytest.approx(0.5)
    assert wfe.walk_forward_efficiency(0.55, 0.55, 0.55, 0.55) is None
    assert wfe.walk_forward_efficiency(0.55, 0.52, 0.50, 0.52) is None
    assert wfe.walk_forward_efficiency(None, 0.5, 0.6, 0.5) is None


def test_block_lengths_cover_the_overlap_and_fit_the_sample():
    assert wfe.block_length(3_000, 20) == 40
    assert wfe.block_length(3_000, 1) == 29
    assert wfe.block_length(30, 20) == 15
    assert wfe.block_length(1, 5) == 1


def make_measures(**changes):
    usual = {
        "ic": 0.04,
        "fit_ic": 0.10,
        "test_hits": 0.54,
        "test_base": 0.52,
        "fit_hits": 0.56,
        "fit_base": 0.52,
        "signal_std": 0.1,
        "share_positive": 0.5,
        "selected_features": ("a", "b", "c"),
    }
    return FoldMeasures(**{**usual, **changes})


def test_the_summary_of_an_ordinary_model():
    summary = summarise_folds([make_measures(), make_measures(ic=-0.02, selected_features=("a", "b", "d"))])
    assert summary.efficiency == pytest.approx(0.5)
    assert summary.consistency == 0.5
    assert summary.overfitting_ratio == pytest.approx(1 - 0.01 / 0.10)
    assert summary.feature_stability == 0.5
    assert summary.collapsed_folds == summary.one_sided_folds == 0.0


@pytest.mark.parametrize(
    ("planted", "field", "expected"),
    [
        ({"signal_std": 0.001}, "collapsed_folds", 1.0),
        ({"share_positive": 0.97}, "one_sided_folds", 1.0),
        ({"share_positive": 0.02}, "one_sided_folds", 1.0),
        ({"ic": 0.0, "fit_ic": 0.8}, "overfitting_ratio", 1.0),
        ({"test_hits": 0.52, "fit_hits": 0.9}, "efficiency", 0.0),
        ({"test_hits": 0.52, "fit_hits": 0.52}, "efficiency", None),
        ({"ic": None}, "consistency", 0.0),
        ({"fit_ic": None}, "overfitting_ratio", None),
    ],
)
def test_a_planted_fault_shows_in_the_summary(planted, field, expected):
    ordinary = getattr(summarise_folds([make_measures()] * 3), field)
    assert getattr(summarise_folds([make_measures(**planted)] * 3), field) == expected != ordinary


def test_folds_without_outcomes_are_left_out():
    empty = make_measures(
        ic=None, test_hits=None, test_base=None, signal_std=None, share_positive=None, fit_ic=None
    )
    with_empty, without = summarise_folds([make_measures(), empty]), summarise_folds([make_measures()])
    assert with_empty.efficiency == without.efficiency
    assert with_empty.consistency == 1.0
    assert without.feature_stability is None
    assert summarise_folds([empty]).consistency is None


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (np.random.default_rng(0).normal(0.4, 0.02, 500), None),
        (np.full(500, 0.4), "deviates by"),
        (np.random.default_rng(0).normal(0.0, 0.002, 500), "deviates by 0.00"),
        (np.full(500, np.nan), "deviates by nan"),
        (np.r_[np.full(490, -0.01), np.full(10, 3.0)], "98% of its signal"),
    ],
    ids=["alive, off zero", "constant", "nearly constant", "not a number", "one sign but for a few"],
)
def test_a_signal_that_has_collapsed_is_told(signal, words):
    found = wfe.collapse_of(signal)
    assert found is None if words is None else words in found
