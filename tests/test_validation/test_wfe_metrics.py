"""Measures of forecasts and of luck: oracles, published figures, and a plant for each that must show."""

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from arch.bootstrap import CircularBlockBootstrap
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import spearmanr

from utils.base import InsufficientDataError, StorageError, UsageError
from validation import wfe_metrics
from validation.gates import collapse_of, ranks_better_p_value
from validation.wfe_metrics import (
    ResolvedRows,
    Run,
    SharpeMoments,
    deflated_sharpe,
    earlier_runs,
    expected_maximum_sharpe,
    minimum_track_record_length,
    n_verdicts_of,
    probabilistic_sharpe,
    probability_of_backtest_overfitting,
    record_run,
    share_of_limits,
    sharpe_moments,
    verdicts_of,
    walk_forward_efficiency,
)


def moving_sums(rng, n, window=5):
    """Values that overlap as labels do."""
    return np.convolve(rng.standard_t(5, n + window - 1), np.ones(window), mode="valid")


def resampled_means(values, block, n_resamples, rng):
    return wfe_metrics.resampled_block_sums(values, block, n_resamples, rng).mean(axis=1) / block


@pytest.mark.parametrize("block", [1, 10, 63])
def test_the_block_bootstrap_agrees_with_arch(block):
    values = moving_sums(np.random.default_rng(0), 800) + 0.3
    ours = resampled_means(values, block, 4_000, np.random.default_rng(1))
    theirs = CircularBlockBootstrap(block, values, seed=2).apply(np.mean, 4_000).ravel()
    assert ours.std() == pytest.approx(theirs.std(), rel=0.06)
    assert ours.mean() == pytest.approx(values.mean(), abs=4 * theirs.std() / np.sqrt(4_000))
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(ours, share) == pytest.approx(np.quantile(theirs, share), abs=0.12 * theirs.std())


def test_blocks_see_the_overlap_that_single_rows_do_not():
    values = moving_sums(np.random.default_rng(3), 2_000)
    rng = np.random.default_rng(4)
    single = resampled_means(values, 1, 1_000, rng).std()
    blocks = resampled_means(values, 25, 1_000, rng).std()
    assert blocks / single == pytest.approx(np.sqrt(5), rel=0.25)


def test_resampled_sums_are_sums_of_runs_of_the_circle():
    values = np.array([1.0, 10.0, 100.0, 1000.0])
    sums = wfe_metrics.resampled_block_sums(values, 3, 200, np.random.default_rng(0))
    assert set(sums.ravel()) == {111.0, 1110.0, 1101.0, 1011.0}


def rows_of(signal, outcome, session, symbol) -> ResolvedRows:
    return ResolvedRows(
        pd.DataFrame(
            {
                "date": pd.Timestamp("2020-01-01") + pd.to_timedelta(session, "D"),
                "symbol": symbol,
                "raw_scaled": signal,
                "realised_log": outcome,
                "predicted_log": 0.0,
                "baseline_log": 0.0,
                "sigma_log": 1.0,
            }
        )
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), n_symbols=st.integers(1, 5))
def test_the_ic_by_session_is_the_mean_spearman(seed, n_symbols):
    rng = np.random.default_rng(seed)
    n_sessions = 60
    keep = rng.random(n_sessions * n_symbols) < 0.9
    session = np.repeat(np.arange(n_sessions), n_symbols)[keep]
    symbol = np.tile(np.arange(n_symbols), n_sessions)[keep]
    signal = np.round(rng.normal(size=keep.sum()), 1)
    outcome = 0.2 * signal + rng.normal(size=keep.sum())
    by_session = rows_of(signal, outcome, session, symbol).ic_by_session()
    expected = [spearmanr(signal[symbol == s], outcome[symbol == s]).statistic for s in range(n_symbols)]
    assert by_session.mean() == pytest.approx(np.mean(expected), abs=1e-12)


FOLD, N_FOLDS, HORIZON, MEMORY = 252, 10, 5, 200


def walk_and_signal(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a signal and the outcomes, in volatilities, of ten years of a random walk."""
    rng = np.random.default_rng([seed, 3])
    n = FOLD * N_FOLDS
    price = np.cumsum(rng.standard_t(5, n + MEMORY + HORIZON) / np.sqrt(5 / 3))
    now = np.arange(MEMORY, MEMORY + n)
    total = np.cumsum(price)
    ahead = price[now] - (total[now] - total[now - MEMORY]) / MEMORY
    outcome = (price[now + HORIZON] - price[now]) / np.sqrt(HORIZON)
    planted = 0.1 * outcome + np.sqrt(0.99) * rng.normal(size=n)
    return {"buys low": -ahead, "follows": ahead, "planted": planted}[kind], outcome


def fold_ics(signal, outcome, *, causal: bool) -> list[float]:
    past: wfe_metrics.Past = {}
    parts = []
    for first in range(0, len(signal), FOLD):
        own = slice(first, first + FOLD)
        rows = rows_of(signal[own], outcome[own], np.arange(first, first + FOLD), "A")
        parts.append(rows.causal_ic_by_session(past) if causal else rows.ic_by_session())
    return [float(part.mean()) for part in parts]


@pytest.mark.parametrize("kind", ["buys low", "follows"])
def test_the_folds_of_a_random_walk_have_no_ic_as_known_at_the_time(kind):
    ics = np.array([fold_ics(*walk_and_signal(kind, seed), causal=True) for seed in range(40)])
    assert abs(ics.mean()) < 0.03
    assert abs(ics[:, 0].mean()) < 0.06, "nor has the first fold, which has no past but its own"
    assert 0.35 < np.mean(ics > 0) < 0.65


def test_the_folds_of_a_random_walk_have_an_ic_in_hindsight():
    """The planted fault: ranked among themselves, the rows of a fold flatter what buys low."""
    ics = np.array([fold_ics(*walk_and_signal("buys low", seed), causal=False) for seed in range(20)])
    assert ics.mean() > 0.12
    assert np.mean(ics > 0) > 0.85


def test_a_planted_signal_is_found_in_the_folds():
    signals = [walk_and_signal("planted", seed) for seed in range(20)]
    ics = np.array([fold_ics(*each, causal=True) for each in signals])
    assert ics.mean() == pytest.approx(0.10, abs=0.02)
    assert np.mean(ics > 0) > 0.85
    # A perfect signal has an IC of about 1.
    outcome = np.random.default_rng(4).normal(size=FOLD * N_FOLDS)
    assert np.mean(fold_ics(outcome, outcome, causal=True)) == pytest.approx(1.0, abs=0.05)


def test_the_ic_of_a_fold_is_what_its_rows_and_those_before_say():
    signal, outcome = walk_and_signal("planted", 1)
    whole = rows_of(signal, outcome, np.arange(len(signal)), "A").causal_ic_by_session({})
    parts = fold_ics(signal, outcome, causal=True)
    assert parts == pytest.approx(whole.reshape(N_FOLDS, FOLD).mean(axis=1), abs=1e-12)


def test_a_constant_signal_has_no_ic():
    outcome = np.random.default_rng(0).normal(size=100)
    assert not len(rows_of(np.ones(100), outcome, np.arange(100), "A").causal_ic_by_session({}))
    assert not len(rows_of(np.ones(100), outcome, np.arange(100), "A").ic_by_session())
    assert not len(rows_of(outcome[:10], outcome[:10], np.arange(10), "A").ic_by_session())
    assert wfe_metrics.known_mean(np.empty(0)) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=40))
def test_the_rank_among_the_past_is_the_naive_one(values):
    values = np.array(values)
    ranks = wfe_metrics.rank_among_past(values)
    for i, rank in enumerate(ranks):
        below = np.sum(values[:i] < values[i])
        equal = np.sum(values[:i] == values[i])
        assert rank == pytest.approx((below + equal / 2 + 0.5) / (i + 1) - 0.5)
    # It is causal: cutting the future changes nothing.
    np.testing.assert_array_equal(wfe_metrics.rank_among_past(values[:-1]), ranks[:-1])


def test_p_values_of_independent_noise_are_uniform():
    rng = np.random.default_rng(5)
    p = [wfe_metrics.block_bootstrap_p_value(rng.normal(size=1_000), 1, n_resamples=300) for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.09
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_p_values_of_overlapping_values_keep_their_rate_and_those_of_short_blocks_do_not():
    rng = np.random.default_rng(6)
    noise = [moving_sums(rng, 1_000, 20) for _ in range(200)]
    p = [wfe_metrics.block_bootstrap_p_value(values, 20, n_resamples=300) for values in noise]
    assert np.mean(np.array(p) <= 0.05) < 0.11
    # The planted fault: pretending that the labels do not overlap.
    wrong = [values.mean() / (values.std() / np.sqrt(len(values))) > 1.645 for values in noise]
    assert np.mean(wrong) > 0.25


def test_p_values_are_refused_where_nothing_can_be_told():
    assert wfe_metrics.block_bootstrap_p_value(np.zeros(500), 5) is None
    assert wfe_metrics.block_bootstrap_p_value(np.random.default_rng(0).normal(size=60), 5) is None
    shifted = np.random.default_rng(0).normal(1.0, 1.0, size=500)
    assert 0.0 < wfe_metrics.block_bootstrap_p_value(shifted, 5, n_resamples=999) < 1 / 1_000
    assert wfe_metrics.block_bootstrap_p_value(-shifted, 5) > 0.99


def test_hits_and_what_always_up_would_have_had():
    outcome = np.array([1.0, 2.0, -1.0, 0.0, 3.0])
    assert wfe_metrics.share_up(outcome) == 0.75
    assert wfe_metrics.hit_rate(np.array([1.0, -1.0, -1.0, 1.0, 1.0]), outcome) == 0.75
    assert wfe_metrics.hit_rate(np.ones(3), np.zeros(3)) is None
    assert wfe_metrics.less(None, 0.5) is None


def test_slope_and_skill_of_known_forecasts():
    rng = np.random.default_rng(7)
    forecast = rng.normal(size=5_000)
    outcome = 0.5 * forecast + rng.normal(size=5_000)
    assert wfe_metrics.calibration_slope(forecast, outcome) == pytest.approx(
        np.polyfit(forecast, outcome, 1)[0]
    )
    assert wfe_metrics.calibration_slope(np.ones(50), outcome[:50]) is None
    assert wfe_metrics.skill(0.5 * forecast, np.zeros(5_000), outcome) == pytest.approx(0.2, abs=0.03)
    assert wfe_metrics.skill(2.0 * forecast, np.zeros(5_000), outcome) < 0, (
        "an overconfident forecast has none"
    )
    assert wfe_metrics.skill(outcome, outcome, outcome) is None


def test_an_undefined_efficiency_is_no_efficiency():
    assert walk_forward_efficiency(0.54, 0.52, 0.56, 0.52) == pytest.approx(0.5)
    assert walk_forward_efficiency(0.55, 0.55, 0.55, 0.55) is None
    assert walk_forward_efficiency(0.55, 0.52, 0.50, 0.52) is None
    assert walk_forward_efficiency(None, 0.5, 0.6, 0.5) is None


def test_block_lengths_cover_the_overlap_and_fit_the_sample():
    assert wfe_metrics.block_length(3_000, 20) == 40
    assert wfe_metrics.block_length(3_000, 1) == 29
    assert wfe_metrics.block_length(30, 20) == 15
    assert wfe_metrics.block_length(1, 5) == 1


# -- everything that was tried


def test_the_deflated_sharpe_of_the_paper():
    # Bailey, Lopez de Prado (2014), the numerical example: 5 years of daily returns, annual Sharpe 2.5,
    # skewness -3, kurtosis 10, 100 trials whose annual Sharpe ratios have variance 1/2.
    moments = SharpeMoments(sharpe=2.5 / np.sqrt(250), skew=-3.0, kurtosis=10.0, n=1250)
    assert expected_maximum_sharpe(100, 0.5 / 250) == pytest.approx(0.1132, abs=5e-5)
    assert deflated_sharpe(moments, 100, 0.5 / 250) == pytest.approx(0.9004, abs=5e-5)
    # "Had the investor made only 46 trials, it would have been 0.9505."
    assert deflated_sharpe(moments, 46, 0.5 / 250) == pytest.approx(0.9505, abs=5e-4)


@pytest.mark.parametrize(
    ("per_year", "skew", "kurtosis", "years"),
    [(250, 0.0, 3.0, 2.73), (52, 0.0, 3.0, 2.83), (12, 0.0, 3.0, 3.24), (12, -0.72, 5.78, 4.99)],
)
def test_the_minimum_track_record_of_the_paper(per_year, skew, kurtosis, years):
    # Bailey, Lopez de Prado (2012): annual Sharpe 2 shown to exceed 1 with 95 % confidence.
    moments = SharpeMoments(sharpe=2 / np.sqrt(per_year), skew=skew, kurtosis=kurtosis, n=1000)
    bars = minimum_track_record_length(moments, 1 / np.sqrt(per_year))
    assert bars / per_year == pytest.approx(years, abs=0.006)


def test_the_best_of_fifty_coin_flips_over_five_years():
    # docs: about 1.0 a year is what the best of 50 strategies without skill shows over 5 years.
    assert expected_maximum_sharpe(50, 1 / 5) == pytest.approx(1.0, abs=0.05)
    assert expected_maximum_sharpe(1, 1.0) == 0.0


def test_the_expected_maximum_agrees_with_simulation():
    rng = np.random.default_rng(0)
    for n_trials in (5, 20, 200):
        simulated = rng.normal(size=(20_000, n_trials)).max(axis=1).mean()
        assert expected_maximum_sharpe(n_trials, 1.0) == pytest.approx(simulated, rel=0.04)


def test_moments_and_the_probabilistic_sharpe_agree_with_scipy():
    returns = np.random.default_rng(1).standard_t(5, 800) * 0.01 + 0.0005
    moments = sharpe_moments(returns)
    sharpe = returns.mean() / returns.std(ddof=1)
    assert moments.sharpe == pytest.approx(sharpe)
    error = np.sqrt(
        (1 - stats.skew(returns) * sharpe + (stats.kurtosis(returns) + 2) / 4 * sharpe**2)
        / (len(returns) - 1)
    )
    assert probabilistic_sharpe(moments) == pytest.approx(stats.norm.cdf(sharpe / error))
    assert deflated_sharpe(moments, 1) == probabilistic_sharpe(moments)
    assert sharpe_moments(np.full(100, 0.01)) is None
    assert sharpe_moments(returns[:10]) is None


def test_the_track_record_is_where_the_probability_reaches_the_confidence():
    moments = SharpeMoments(sharpe=0.06, skew=-0.5, kurtosis=6.0, n=100)
    bars = minimum_track_record_length(moments)
    assert probabilistic_sharpe(replace(moments, n=round(bars))) == pytest.approx(0.95, abs=1e-3)
    assert minimum_track_record_length(replace(moments, sharpe=-0.01)) is None


@settings(deadline=None, max_examples=50)
@given(sharpe=st.floats(0.0, 0.2), trials=st.integers(1, 500), more=st.integers(1, 500))
def test_more_trials_deflate_more(sharpe, trials, more):
    moments = SharpeMoments(sharpe=sharpe, skew=0.0, kurtosis=4.0, n=1000)
    assert deflated_sharpe(moments, trials + more) < deflated_sharpe(moments, trials)


def naive_pbo(returns, n_blocks):
    """The definition, written out slowly."""
    blocks = np.array_split(np.arange(len(returns)), n_blocks)
    below = []
    for half in combinations(range(n_blocks), n_blocks // 2):
        inside = np.concatenate([blocks[i] for i in half])
        outside = np.setdiff1d(np.arange(len(returns)), inside)
        chosen = np.argmax(returns[inside].mean(axis=0) / returns[inside].std(axis=0))
        scores = returns[outside].mean(axis=0) / returns[outside].std(axis=0)
        rank = stats.rankdata(scores)[chosen] / (returns.shape[1] + 1)
        below.append(1.0 if rank < 0.5 else 0.5 if rank == 0.5 else 0.0)
    return np.mean(below)


@pytest.mark.parametrize("n_trials", [2, 5, 12])
def test_pbo_agrees_with_its_definition(n_trials):
    returns = np.random.default_rng(n_trials).normal(0.0002, 0.01, size=(400, n_trials))
    assert probability_of_backtest_overfitting(returns) == pytest.approx(naive_pbo(returns, 10))


def test_pbo_tells_luck_from_skill():
    rng = np.random.default_rng(2)
    noise = rng.normal(0.0, 0.01, size=(40, 1000, 20))
    of_noise = np.mean([probability_of_backtest_overfitting(trials) for trials in noise])
    assert of_noise == pytest.approx(0.5, abs=0.12)
    skilled = noise[0].copy()
    skilled[:, 7] += 0.003
    assert probability_of_backtest_overfitting(skilled) < 0.02
    assert probability_of_backtest_overfitting(np.repeat(noise[0][:, :1], 3, axis=1)) == 0.5


def test_a_trial_that_was_fitted_to_half_of_the_time_is_refused():
    rng = np.random.default_rng(3)
    # Each trial was lucky in one block and pays for it in the others: choosing does harm.
    returns = rng.normal(0.0, 0.01, size=(1000, 10)) - 0.002
    for trial in range(10):
        returns[trial * 100 : (trial + 1) * 100, trial] += 0.018
    assert probability_of_backtest_overfitting(returns) > 0.9


def test_impossible_pbo_is_refused():
    returns = np.random.default_rng(0).normal(size=(100, 3))
    with pytest.raises(InsufficientDataError, match="1 strategies of 100 bars"):
        probability_of_backtest_overfitting(returns[:, :1])
    with pytest.raises(InsufficientDataError, match="20 bars"):
        probability_of_backtest_overfitting(returns[:12])


def count_verdicts(path: Path, run: Run) -> int:
    return run.n_trials + n_verdicts_of(earlier_runs(path, run))


RUN = Run(symbol="AAPL", first_session="2000-01-03", last_session="2013-01-02", fingerprint="a")


def test_verdicts_are_counted_per_symbol_and_window(tmp_path):
    path = tmp_path / "logs" / "trials.jsonl"
    assert count_verdicts(path, RUN) == 1
    record_run(path, RUN)
    record_run(path, RUN)
    assert count_verdicts(path, RUN) == 1, "repeating a run is no further verdict"
    record_run(path, replace(RUN, fingerprint="b", n_trials=3))
    record_run(path, replace(RUN, fingerprint="c", symbol="MSFT"))
    record_run(path, replace(RUN, fingerprint="d", first_session="2014-01-02", last_session="2020-01-02"))
    assert count_verdicts(path, RUN) == 4
    assert count_verdicts(path, replace(RUN, fingerprint="new")) == 5
    assert [run.fingerprint for run in earlier_runs(path, RUN)] == ["b"]


def looks(p_values: list[float]) -> list[tuple[bool, float]]:
    """Judge one p-value after the other by a limit of .05: was it an edge, and by which share of it."""
    found: list[Run] = []
    for number, p_value in enumerate(p_values):
        share = share_of_limits("AAPL", found)
        label = "edge" if p_value <= 0.05 * share else "no-edge"
        found.append(replace(RUN, fingerprint=str(number), label=label, limits_share=share))
    return [(run.label == "edge", run.limits_share) for run in found]


@given(st.lists(st.floats(0.0, 0.12), min_size=1, max_size=12))
def test_an_edge_hands_its_limits_on_as_the_online_fallback_does(p_values):
    """Oracle: the published recursion. Planted fault: whoever hands on without an edge differs from it."""
    handed_on, expected = 0.0, []
    for number, p_value in enumerate(p_values, start=1):
        share = min(1.0, number**-2 + handed_on)
        handed_on = share if p_value <= 0.05 * share else 0.0
        expected.append((handed_on > 0, pytest.approx(share)))
    assert looks(p_values) == expected


@given(st.lists(st.floats(0.0, 0.12), min_size=1, max_size=12))
def test_the_first_edge_comes_no_earlier_than_if_nothing_was_handed_on(p_values):
    """So the chance of a false edge, ever, is what the shares 1, 1/4, 1/9 ... add up to: 1.64 limits."""
    spent = [p_value <= 0.05 / number**2 for number, p_value in enumerate(p_values, start=1)]
    found = [is_edge for is_edge, _share in looks(p_values)]
    assert [*found, True].index(True) == [*spent, True].index(True)
    assert all(share <= 1.0 for _is_edge, share in looks(p_values))


def test_trying_seeds_is_no_way_to_an_edge():
    """Noise all along, looked at again and again: the limits of all looks together keep the rate."""
    shares = [share for _is_edge, share in looks([0.9] * 300)]
    assert shares[9] == pytest.approx(0.01)
    assert sum(shares) < 1.65
    with pytest.raises(UsageError, match="got 0"):
        share_of_limits("AAPL", n_own=0)


def share_after(path: Path, run: Run) -> float:
    """Judge a run by what the log leaves to it, as the commands do."""
    if run.symbol in (repeated := verdicts_of(path, run)):
        return repeated[run.symbol].limits_share
    return share_of_limits(run.symbol, earlier_runs(path, run), run.n_trials)


def tell(path: Path, run: Run, label: str) -> float:
    """Record a look, judge it, and record its verdict."""
    share = share_after(path, run)
    record_run(path, run)
    record_run(path, replace(run, label=label, limits_share=share))
    return share


def test_only_the_verdict_just_before_hands_on_and_only_once(tmp_path):
    path, now = tmp_path / "trials.jsonl", replace(RUN, fingerprint="now")
    record_run(path, RUN)
    assert share_after(path, now) == 0.25, "a run that was killed has shown nothing"
    assert tell(path, RUN, "edge") == 1.0
    assert share_after(path, now) == 1.0
    assert share_after(path, replace(now, n_trials=2)) == pytest.approx(1 / 9 + 1 / 2), "two share it"
    assert tell(path, replace(RUN, fingerprint="b"), "no-edge") == 1.0
    assert share_after(path, now) == pytest.approx(1 / 9), "what was used is gone"


def test_a_repetition_has_the_share_that_it_had_and_hands_nothing_on_again(tmp_path):
    """Planted: two real edges that are trained again in turn, as a nightly job would, before each look."""
    path = tmp_path / "trials.jsonl"
    first, second = replace(RUN, fingerprint="1"), replace(RUN, fingerprint="2")
    assert (tell(path, first, "edge"), tell(path, second, "edge")) == (1.0, 1.0)
    spent = []
    for number in range(3, 13):
        for again in (first, second, first):
            assert tell(path, again, "edge") == 1.0
        spent.append(tell(path, replace(RUN, fingerprint=str(number)), "no-edge"))
    assert spent == pytest.approx([1.0, *(number**-2 for number in range(4, 13))])


def test_a_killed_run_that_is_repeated_takes_what_was_handed_on_once(tmp_path):
    path, killed = tmp_path / "trials.jsonl", replace(RUN, fingerprint="killed")
    tell(path, RUN, "edge")
    record_run(path, killed)
    assert tell(path, replace(RUN, fingerprint="b"), "edge") == pytest.approx(1 / 9), (
        "held for the killed one"
    )
    assert tell(path, killed, "no-edge") == pytest.approx(1 / 9 + 1 / 9)
    assert share_after(path, replace(RUN, fingerprint="now")) == pytest.approx(1 / 16)


def test_an_edge_on_one_symbol_is_none_on_another(tmp_path):
    """Planted: helpers with an edge, each looked at beside B in a panel; B must earn its own."""
    path, spent = tmp_path / "trials.jsonl", []
    for number in range(8):
        helper = replace(RUN, symbol=f"HELP{number}", fingerprint=f"alone {number}")
        assert tell(path, helper, "edge") == 1.0
        panel = [replace(helper, fingerprint=str(number)), replace(RUN, symbol="B", fingerprint=str(number))]
        earlier = earlier_runs(path, *panel)
        spent.append(share_of_limits("B", earlier))
        record_run(path, *panel)
        record_run(path, replace(panel[1], label="no-edge", limits_share=spent[-1]))
    assert spent == pytest.approx([(2 + number) ** -2 for number in range(8)])


def test_a_torn_line_does_not_stop_the_count(tmp_path):
    path = tmp_path / "trials.jsonl"
    record_run(path, replace(RUN, fingerprint="b"))
    with path.open("ab") as file:
        file.write(b'{"symbol": "AA\xff\n[1]\n' + json.dumps({"symbol": "AAPL"}).encode() + b"\n")
    record_run(path, replace(RUN, fingerprint="c"))
    assert count_verdicts(path, RUN) == 3
    assert [run.at for run in earlier_runs(path, RUN)] == ["", ""], (
        "lines of before tell no more than they did"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"first_session": 1},
        {"last_session": None},
        {"symbol": ["AAPL"]},
        {"fingerprint": ["a list"]},
        {"n_trials": "many"},
        {"n_trials": "3"},
        {"n_trials": -50},
        {"n_trials": 0},
        {"n_trials": True},
        {"n_trials": 1.5},
        {"n_trials": float("nan")},
        {"n_trials": 10**12},
        {"at": 5},
        {"label": 1},
        {"limits_share": 1.5},
        {"limits_share": -0.1},
        {"limits_share": float("nan")},
        {"limits_share": "1"},
    ],
    ids=str,
)
def test_a_line_that_is_json_and_no_run_is_passed_over(tmp_path, wrong):
    path = tmp_path / "trials.jsonl"
    record_run(path, replace(RUN, fingerprint="b"))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(replace(RUN, fingerprint="z")) | wrong) + "\n")
    record_run(path, replace(RUN, fingerprint="c"))
    assert [run.fingerprint for run in earlier_runs(path, RUN)] == ["b", "c"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000, "null", '"x"', '"\\ud800"'])
def test_no_line_ends_the_count(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    record_run(path, replace(RUN, fingerprint="b"))
    assert count_verdicts(path, RUN) == 2


def test_a_run_of_a_newer_release_counts(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(asdict(replace(RUN, fingerprint="b", n_trials=3)) | {"later": 1}) + "\n")
    assert earlier_runs(path, RUN) == (replace(RUN, fingerprint="b", n_trials=3),)


def test_a_log_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(StorageError, match="log of verdicts"):
        record_run(tmp_path, RUN)


def test_a_log_that_cannot_be_read_stops_the_count_in_words(tmp_path):
    with pytest.raises(StorageError, match="earlier tries cannot be counted"):
        earlier_runs(tmp_path, RUN)


def test_a_torn_last_line_does_not_swallow_the_next_verdict(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"symbol": "AA', encoding="utf-8")
    record_run(path, replace(RUN, fingerprint="b"))
    record_run(path, replace(RUN, fingerprint="c"))
    assert [run.fingerprint for run in earlier_runs(path, RUN)] == ["b", "c"]


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
    found = collapse_of(signal)
    assert found is None if words is None else words in found


def test_the_better_of_two_signals_is_found_and_equals_cannot_be_told_apart():
    rng = np.random.default_rng(5)
    outcome = rng.normal(size=2_500)
    good, poor = 0.15 * outcome + rng.normal(size=2_500), rng.normal(size=2_500)
    better, worse = (ranks_better_p_value(*pair, outcome, 1) for pair in ((good, poor), (poor, good)))
    assert better is not None
    assert worse is not None
    assert better < 0.01
    assert worse > 0.95
    assert ranks_better_p_value(good, 3 * good, outcome, 1) is None


def test_neither_of_two_signals_of_noise_is_often_called_the_better():
    rng = np.random.default_rng(6)
    found = [ranks_better_p_value(*rng.normal(size=(2, 800)), rng.normal(size=800), 1) for _ in range(60)]
    assert np.mean([p is not None and p <= 0.05 for p in found]) <= 0.12


def test_beyond_all_draws_evidence_still_grows():
    rng = np.random.default_rng(7)
    noise = rng.normal(size=5_000)
    found = [wfe_metrics.block_bootstrap_p_value(noise + shift, 5) for shift in (0.05, 0.2, 0.5, 1.0)]
    assert all(p is not None for p in found)
    assert found == sorted(found, reverse=True)
    # After a hundred tries the limit of .05 is 5e-6: whoever has that much can still show it.
    assert found[-1] < 1e-9
