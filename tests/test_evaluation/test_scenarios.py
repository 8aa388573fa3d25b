"""How much of a backtest would survive: intervals that cover, grids that book what the headline books."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import forward_simulator as r
from evaluation import metrics as m
from evaluation.accounting import CostModel, Ledger, account
from evaluation.advanced_backtester import (
    REGIME_BARS,
    AdvancedBacktester,
    BacktestReport,
    by_regime,
    by_year,
)
from utils.base import DataError, UsageError

COSTS = CostModel(commission_bps=6.0, slippage_bps=4.0)


def draws(seed: int, n: int = 1500, edge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    market = 0.0003 + 0.01 * rng.standard_t(5, n)
    return edge + 0.8 * market + 0.004 * rng.standard_normal(n), market


def backtest(n: int = 900, seed: int = 1, weight: float | None = None) -> BacktestReport:
    rng = np.random.default_rng(seed)
    close = 50.0 * np.exp(np.cumsum(0.0003 + 0.012 * rng.standard_normal(n)))
    target = (
        np.full(n, weight) if weight is not None else np.repeat(rng.uniform(0.0, 1.5, n // 30 + 1), 30)[:n]
    )
    dates = pd.bdate_range("2001-01-01", periods=n)
    known = np.ones(n, dtype=bool)
    return AdvancedBacktester(costs=COSTS).backtest_with_positions(
        dates, close, target, is_out_of_sample=known
    )


def book_of(target: np.ndarray, moves: np.ndarray) -> r.Book:
    def book(rows: np.ndarray, lead: int, costs: CostModel) -> tuple[Ledger, Ledger]:
        used = rows[lead:]
        own = account(target[used], np.nan_to_num(moves[used]), costs)
        return own, account(np.ones(len(used)), np.nan_to_num(moves[used]), costs)

    return book


def grid_of(result: BacktestReport, seeds: int = 0, first: int = 0) -> tuple[r.Scenario, ...]:
    daily = result.daily
    book = book_of(daily["target_weight"].to_numpy(), daily["asset_return"].to_numpy())
    return r.robustness_grid(book, pd.DatetimeIndex(daily.index), first, COSTS, seeds=seeds)


@pytest.mark.parametrize("seed", range(5))
def test_point_estimates_are_those_of_the_metrics(seed: int) -> None:
    net, market = draws(seed)
    found = r.bootstrap_intervals(net, market, 252)
    own, other = m.sharpe(net, 252).value, m.sharpe(market, 252).value
    growth = [np.cumprod(np.concatenate([[1.0], 1.0 + x])) for x in (net, market)]
    assert found["sharpe_ratio"].value == pytest.approx(own, rel=1e-9)
    assert found["sharpe_difference"].value == pytest.approx(own - other, rel=1e-9)
    expected = m.cagr(growth[0], 252).value - m.cagr(growth[1], 252).value
    assert found["cagr_difference"].value == pytest.approx(expected, rel=1e-9)
    assert found["alpha"].value == pytest.approx(m.market_line(net, market, 252)["alpha"].value, rel=1e-9)
    for interval in found.values():
        assert interval.low <= interval.value <= interval.high
        assert interval.low < interval.high


def test_sums_over_blocks_are_those_of_rows_drawn_one_by_one() -> None:
    net, market = draws(3, n=300)
    moments = r._moments(net, market)
    sums, n = r._drawn_sums(moments, seed=5)
    starts = np.random.default_rng(5).integers(300, size=(r.RESAMPLES, 300 // r.BLOCK_BARS))
    for place in (0, 17):
        rows = np.concatenate([np.arange(start, start + r.BLOCK_BARS) % 300 for start in starts[place]])
        assert len(rows) == n
        np.testing.assert_allclose(sums[place], moments[rows].sum(axis=0), rtol=1e-9)


def test_the_interval_covers_what_it_promises_and_sees_what_is_there() -> None:
    inside = []
    for seed in range(120):
        net, market = draws(seed, n=1000)
        alpha = r.bootstrap_intervals(net, market, 252)["alpha"]
        inside.append(alpha.low <= 0.0 <= alpha.high)
    # The true alpha is zero; nine of ten intervals must hold it, give or take three standard errors.
    assert 0.8 <= np.mean(inside) <= 0.98
    planted = r.bootstrap_intervals(*draws(0, edge=0.001), 252)["alpha"]
    assert planted.low > 0.0


def test_the_same_seed_gives_the_same_interval() -> None:
    net, market = draws(2)
    assert r.bootstrap_intervals(net, market, 252) == r.bootstrap_intervals(net, market, 252)
    assert r.bootstrap_intervals(net, market, 252, seed=1) != r.bootstrap_intervals(net, market, 252)


def test_who_holds_the_market_is_exactly_level_with_it() -> None:
    market = draws(4)[1]
    level = r.bootstrap_intervals(market, market.copy(), 252)["sharpe_difference"]
    assert (level.value, level.low, level.high, level.share_above_zero) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("net", "market", "words"),
    [
        (np.zeros(50), np.zeros(50), "needs 126"),
        (np.zeros(300), np.full(300, 0.001), "do not vary"),
        (np.concatenate([[-1.0], np.full(299, 0.01)]), np.full(300, 0.01), "lost"),
    ],
)
def test_no_interval_without_a_reason(net: np.ndarray, market: np.ndarray, words: str) -> None:
    sharpe = r.bootstrap_intervals(net, market, 252)["sharpe_ratio"]
    assert sharpe.value is None
    assert words in sharpe.reason
    assert (sharpe.low, sharpe.high, sharpe.share_above_zero) == (None, None, None)


def test_unequal_returns_are_refused() -> None:
    with pytest.raises(DataError, match="must be equal"):
        r.bootstrap_intervals(np.zeros(200), np.zeros(201), 252)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 400), block=st.integers(1, 90), seed=st.integers(0, 9))
def test_blocks_are_consecutive_rows_of_the_window(n: int, block: int, seed: int) -> None:
    rows = r.block_rows(n, block_bars=block, seed=seed)
    assert rows.shape == (n,)
    assert rows.min() >= 0
    assert rows.max() < n
    joints = np.flatnonzero((np.diff(rows) - 1) % n) + 1
    assert set(joints) <= set(range(block, n, block))


def test_no_rows_make_no_blocks() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        r.block_rows(0, block_bars=5, seed=0)


def forecasts(n: int = 1200, *, honest: bool, horizon: int = 5) -> pd.DataFrame:
    """Return a random walk whose probability of a rise is known, or overstated."""
    rng = np.random.default_rng(8)
    chance = rng.uniform(0.3, 0.7, n)
    step = np.where(rng.random(n) < chance, 0.01, -0.01)
    close = pd.Series(100.0 * np.exp(np.cumsum(np.concatenate([[0.0], step[:-1]]))))
    said = chance if honest else np.clip(0.5 + 2.4 * (chance - 0.5), 0.02, 0.98)
    frame = pd.DataFrame({"close": close, "lower": -0.02, "upper": 0.02, "prob_up": said})
    return frame.set_axis(pd.bdate_range("2003-01-01", periods=n))


def calibration(frame: pd.DataFrame, horizon: int) -> dict[str, m.Measured]:
    came = (frame["close"].shift(-horizon) / frame["close"] - 1.0).to_numpy()
    band = frame["lower"].to_numpy(), frame["upper"].to_numpy()
    return m.calibration_metrics(came, band, frame["prob_up"].to_numpy(), frame.index.year.to_numpy())


def test_an_honest_probability_is_told_from_an_overconfident_one() -> None:
    honest, bold = (calibration(forecasts(honest=flag), 1) for flag in (True, False))
    assert honest["brier_skill"].value > 0.02 > bold["brier_skill"].value
    assert honest["probability_error"].value < 0.06 < bold["probability_error"].value


def test_coverage_is_counted_by_hand() -> None:
    frame = forecasts(honest=True)
    came = frame["close"].shift(-2) / frame["close"] - 1.0
    inside = came.dropna().between(-0.02, 0.02)
    found = calibration(frame, 2)
    assert found["band_coverage"].value == pytest.approx(inside.mean())
    years = inside.groupby(inside.index.year).mean()
    full = [year for year in years.index if (inside.index.year == year).sum() >= m.MIN_OUTCOMES]
    assert found["band_coverage_lowest_year"].value == pytest.approx(years[full].min())
    assert found["band_coverage_highest_year"].value == pytest.approx(years[full].max())


def test_calibration_without_forecasts_has_reasons() -> None:
    found = calibration(forecasts(honest=True).assign(lower=np.nan), 1)
    assert all(figure.value is None and "resolved" in figure.reason for figure in found.values())
    risen = forecasts(n=300, honest=True).assign(close=np.exp(0.01 * np.arange(300)))
    assert calibration(risen, 1)["brier_skill"].reason == "all outcomes were alike"


def test_years_and_regimes_add_up_to_the_whole() -> None:
    result = backtest()
    years = by_year(result)
    assert sum(year["n_bars"] for year in years) == len(result.daily)
    whole = math.prod(1.0 + year["strategy"] for year in years) - 1.0
    assert whole == pytest.approx(result.metrics["total_return"].value)
    assert min(year["deepest"] for year in years) >= result.metrics["max_drawdown"].value - 1e-12
    regimes = by_regime(result)
    assert [regime["period"] for regime in regimes] == ["Calm", "Middle", "Stormy"]
    assert sum(regime["n_bars"] for regime in regimes) == len(result.daily) - REGIME_BARS - 1
    assert by_regime(backtest(n=200)) == []


def test_a_regime_is_known_before_its_day() -> None:
    result = backtest()
    storm = result.daily["asset_return"].copy()
    storm.iloc[-1] = 9.0
    later = replace(result, daily=result.daily.assign(asset_return=storm))
    assert by_regime(later) == by_regime(result)


def test_the_first_scenario_is_the_headline() -> None:
    result = backtest()
    grid = grid_of(result)
    (whole,) = [cell for cell in grid if cell.window == "whole" and cell.cost_multiple == 1.0]
    assert whole.sharpe == pytest.approx(result.metrics["sharpe_ratio"].value)
    assert whole.cagr == pytest.approx(result.metrics["cagr"].value)
    assert whole.buy_hold_sharpe == pytest.approx(result.benchmarks["buy_hold"].metrics["sharpe_ratio"].value)
    assert whole.max_drawdown == pytest.approx(result.metrics["max_drawdown"].value)
    assert (whole.start, whole.end) == (f"{result.daily.index[0]:%F}", f"{result.daily.index[-1]:%F}")


def test_dearer_trading_earns_less_in_every_window() -> None:
    grid = grid_of(backtest())
    for window in {cell.window for cell in grid}:
        earned = [cell.cagr for cell in grid if cell.window == window]
        assert earned == sorted(earned, reverse=True)
        assert len(set(earned)) == len(r.COST_MULTIPLES)


def test_the_grid_is_windows_times_costs_times_seeds() -> None:
    result = backtest()
    grid = grid_of(result, seeds=3)
    assert len(grid) == 5 * len(r.COST_MULTIPLES) * 4
    assert len({(c.window, c.cost_multiple, c.seed) for c in grid}) == len(grid)
    assert grid == grid_of(result, seeds=3)
    drawn = {c.sharpe for c in grid if c.window == "whole" and c.cost_multiple == 1.0}
    assert len(drawn) == 4
    quarters = sorted({(c.start, c.end) for c in grid if c.window != "whole"})
    assert all(before[1] < after[0] for before, after in pairwise(quarters))


def test_short_windows_and_absurd_costs_are_left_out() -> None:
    result = backtest(n=300)
    assert {cell.window for cell in grid_of(result)} == {"whole"}
    book = book_of(result.daily["target_weight"].to_numpy(), result.daily["asset_return"].to_numpy())
    dear = CostModel(commission_bps=400.0, slippage_bps=0.0)
    grid = r.robustness_grid(book, pd.DatetimeIndex(result.daily.index), 0, dear, seeds=0)
    assert {cell.cost_multiple for cell in grid} == {0.0, 1.0, 2.0}
    with pytest.raises(UsageError, match="seeds"):
        r.robustness_grid(book, pd.DatetimeIndex(result.daily.index), 0, dear, seeds=-1)


def test_the_summary_says_how_the_resamples_spread() -> None:
    grid = grid_of(backtest(), seeds=9)
    (whole,) = [row for row in r.summarise(grid) if row["window"] == "whole" and row["cost_multiple"] == 1.0]
    drawn = [c.sharpe_difference for c in grid if c.window == "whole" and c.cost_multiple == 1.0 and c.seed]
    assert whole["seeds"] == len(drawn) == 9
    assert whole["low"] == pytest.approx(np.quantile(drawn, 0.05))
    assert whole["share_better"] == np.mean(np.array(drawn) > 0.0)
    assert not whole["all_same"]


def test_a_strategy_that_holds_is_the_same_everywhere() -> None:
    rows = r.summarise(grid_of(backtest(weight=1.0), seeds=2))
    assert all(row["all_same"] and row["share_better"] == 0.0 for row in rows)


def test_a_strategy_that_rests_has_no_sharpe_ratio_and_gives_no_crash() -> None:
    rows = r.summarise(grid_of(backtest(weight=0.0), seeds=2))
    assert all(row["sharpe_difference"] is None and row["share_better"] is None for row in rows)
    assert not any(row["all_same"] for row in rows)


@pytest.mark.parametrize("seeds", [0, 4])
def test_plain_evidence_is_plain(seeds: int) -> None:
    import json

    figures = {"pbo": m.Measured(0.4), "deflated_sharpe": m.Measured(None, "why")}
    intervals = r.bootstrap_intervals(*draws(1), 252)
    evidence = r.Evidence(figures=figures, intervals=intervals, scenarios=grid_of(backtest(), seeds=seeds))
    plain = json.loads(json.dumps(evidence.plain(), allow_nan=False))
    assert plain["undefined"] == {"deflated_sharpe": "why"}
    assert plain["intervals"]["alpha"]["low"] < plain["intervals"]["alpha"]["high"]
    assert len(plain["robustness"]) == 5 * len(r.COST_MULTIPLES)
    assert evidence.seeds == seeds


def test_a_peeking_resample_is_found_out(make_bars: Callable[..., pd.DataFrame]) -> None:
    """The grid feeds rows and lag apart: a book that pays the row that decided earns what nobody can."""
    close = make_bars(n=600, seed=2)["Close"]
    moves = close.pct_change().fillna(0.0).to_numpy()
    target = (moves > 0.0).astype(float)

    def same_bar(rows: np.ndarray, lead: int, costs: CostModel) -> tuple[Ledger, Ledger]:
        _, market = book_of(target, moves)(rows, lead, costs)
        used = rows[lead:]
        return account(target[used], moves[used], costs, apply_position_lag=False), market

    dates = pd.DatetimeIndex(close.index)
    honest = r.summarise(r.robustness_grid(book_of(target, moves), dates, 0, COSTS, seeds=3))
    planted = r.summarise(r.robustness_grid(same_bar, dates, 0, COSTS, seeds=3))
    assert max(row["sharpe"] for row in honest) < 4.0 < min(row["sharpe"] for row in planted)
