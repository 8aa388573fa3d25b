"""What stands beside a backtest: why a figure is missing, and what the choice of sizing may owe to luck."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.accounting import CostModel
from evaluation.forward_simulator import MIN_BARS
from evaluation.metrics import reasons, values
from evaluation.report import luck_section
from inference.pipeline import Decisions, backtest_decisions, decide
from inference.position_sizing import PRESETS, alternatives, make_sizer
from service.backtest_service import (
    BacktestRequest,
    bookkeeper,
    weigh,
)
from utils.errors import UsageError


class Momentum:
    """Forecasts by the mean of the last 20 returns; causal."""

    horizon_bars = 5

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        returns = bars["Close"].pct_change()
        mean, sigma = returns.rolling(20).mean() * 5, returns.rolling(20).std() * np.sqrt(5)
        frame = pd.DataFrame({"expected_return": mean, "sigma": sigma})
        constants = {"baseline_return": 0.001, "p_win": 0.53, "payoff_ratio": 1.05, "skill_lower": 0.3}
        frame = frame.assign(**constants, lower=mean - 1.28 * sigma, upper=mean + 1.28 * sigma)
        frame = frame.assign(prob_up=(0.5 + mean).clip(0.05, 0.95), is_of_other_prices=False)
        return frame.assign(is_out_of_sample=mean.notna())


def decided(bars: pd.DataFrame, request: BacktestRequest) -> Decisions:
    return decide("AAPL", bars, Momentum(), request.sizer, costs=request.costs)


@pytest.fixture(scope="module")
def bars(make_bars: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return make_bars(n=900, seed=11)


@pytest.mark.parametrize("name", PRESETS)
def test_the_grid_begins_with_the_headline_under_every_preset(bars: pd.DataFrame, name: str) -> None:
    request = BacktestRequest(sizing=name, costs=CostModel(borrow_annual=0.08), capital=777.0)
    history = decided(bars, request)
    result = backtest_decisions(history, request.costs, initial_capital=request.capital)
    evidence = weigh(result, history, request, n_tries=3)
    (first,) = [c for c in evidence.scenarios if (c.window, c.cost_multiple) == ("whole", 1.0)]
    assert first.cagr == pytest.approx(result.metrics["cagr"].value, rel=1e-12)
    assert first.max_drawdown == pytest.approx(result.metrics["max_drawdown"].value, rel=1e-12)


def test_a_book_in_the_order_of_history_is_the_backtest(bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="long-biased")
    history = decided(bars, request)
    own, market = bookkeeper(history, request.sizer, 10_000.0)(np.arange(900), 0, request.costs)
    np.testing.assert_allclose(np.nan_to_num(own.equity), own.equity)
    whole = backtest_decisions(history, request.costs, include_in_sample=True)
    np.testing.assert_allclose(own.equity, whole.daily["equity"], rtol=1e-12)
    np.testing.assert_allclose(market.equity, whole.benchmarks["buy_hold"].daily["equity"], rtol=1e-12)


def test_more_tries_deflate_more(bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="half-kelly")
    history = decided(bars, request)
    result = backtest_decisions(history, request.costs)
    few, many = (weigh(result, history, request, n_tries=n).figures for n in (1, 500))
    assert many["deflated_sharpe"].value < few["deflated_sharpe"].value
    assert many["n_tries"].value == 500


def test_alternatives_are_all_presets_bolder_and_meeker() -> None:
    others = alternatives()
    assert {sizer.name for sizer in others} == set(PRESETS)
    assert len({sizer.config_id for sizer in others}) == len(others) == 3 * (len(PRESETS) - 1) + 1


def test_a_short_backtest_says_why_figures_are_missing(bars: pd.DataFrame) -> None:
    request = BacktestRequest()
    history = decided(bars, request)
    short = replace(history, frame=history.frame.iloc[-20:])
    result = backtest_decisions(short, request.costs)
    evidence = weigh(result, history, request, n_tries=1)
    missing = {"deflated_sharpe", "deflated_sharpe_active", "pbo", "band_coverage", "brier_skill"}
    assert missing <= set(reasons(evidence.figures))
    assert str(MIN_BARS) in reasons(evidence.figures)["pbo"]
    assert all(interval.reason for interval in evidence.intervals.values())
    assert evidence.scenarios == ()
    assert len(luck_section(evidence).blocks) == 3


def test_a_strategy_that_rests_has_no_track_record(bars: pd.DataFrame) -> None:
    request = BacktestRequest(max_long=0.0, max_short=0.0)
    history = decided(bars, request)
    result = backtest_decisions(history, request.costs)
    evidence = weigh(result, history, request, n_tries=1)
    assert values(evidence.figures)["minimum_track_record_bars"] is None
    assert "not above zero" in reasons(evidence.figures)["minimum_track_record_bars"]
    assert evidence.plain()["intervals"]["sharpe_ratio"]["reason"] == "returns do not vary"


def test_who_holds_the_share_is_called_the_same(bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="passive", seeds=2)
    history = decided(bars, request)
    result = backtest_decisions(history, request.costs)
    grid = luck_section(weigh(result, history, request, n_tries=1)).blocks[-1]
    assert {cell.text for row in grid.rows for cell in row[1:]} == {"same"}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="no sizing preset"):
        _ = BacktestRequest(sizing="all-in").sizer
    assert BacktestRequest(max_long=0.5).sizer == make_sizer(max_long=0.5)
