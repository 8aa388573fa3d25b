"""What stands beside a backtest, and the backtest of a prediction that the page sends back."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from data.data_fetcher import fetch_stock_data
from evaluation.accounting import CostModel
from evaluation.forward_simulator import MIN_BARS
from evaluation.metrics import reasons, values
from evaluation.report import luck_section
from inference.pipeline import Decisions, backtest_decisions, decide
from inference.position_sizing import PRESETS, alternatives, make_sizer
from service import schemas as wire
from service.backtest_service import (
    BacktestRequest,
    bookkeeper,
    posted_backtest,
    posted_costs,
    posted_forward_sim,
    weigh,
)
from tests.test_service.conftest import FakeRegistry, FakeSource
from utils.base import DataError, UsageError


class Momentum:
    """Forecasts by the mean of the last 20 returns; causal."""

    horizon_bars = 5

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        returns = bars["Close"].pct_change()
        mean, sigma = returns.rolling(20).mean() * 5, returns.rolling(20).std() * np.sqrt(5)
        frame = pd.DataFrame({"expected_return": mean, "expected_log": np.log1p(mean), "sigma": sigma})
        constants = {"baseline_return": 0.001, "p_win": 0.53, "payoff_ratio": 1.05, "skill_lower": 0.3}
        frame = frame.assign(**constants, lower=mean - 1.28 * sigma, upper=mean + 1.28 * sigma)
        frame = frame.assign(prob_up=(0.5 + mean).clip(0.05, 0.95), is_of_other_prices=False)
        return frame.assign(is_out_of_sample=mean.notna())


def decided(bars: pd.DataFrame, request: BacktestRequest) -> Decisions:
    return decide("AAPL", bars, Momentum(), request.sizer, costs=request.costs)


@pytest.fixture(scope="module")
def long_bars(make_bars: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return make_bars(n=900, seed=11)


@pytest.mark.parametrize("name", PRESETS)
def test_the_grid_begins_with_the_headline_under_every_preset(long_bars: pd.DataFrame, name: str) -> None:
    request = BacktestRequest(sizing=name, costs=CostModel(borrow_annual=0.08), capital=777.0)
    history = decided(long_bars, request)
    result = backtest_decisions(history, request.costs, initial_capital=request.capital)
    evidence = weigh(result, history, request, n_tries=3)
    (first,) = [c for c in evidence.scenarios if (c.window, c.cost_multiple) == ("whole", 1.0)]
    assert first.cagr == pytest.approx(result.metrics["cagr"].value, rel=1e-12)
    assert first.max_drawdown == pytest.approx(result.metrics["max_drawdown"].value, rel=1e-12)


def test_a_book_in_the_order_of_history_is_the_backtest(long_bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="long-biased")
    history = decided(long_bars, request)
    own, market = bookkeeper(history, request.sizer, 10_000.0)(np.arange(900), 0, request.costs)
    np.testing.assert_allclose(np.nan_to_num(own.equity), own.equity)
    whole = backtest_decisions(history, request.costs, include_in_sample=True)
    np.testing.assert_allclose(own.equity, whole.daily["equity"], rtol=1e-12)
    np.testing.assert_allclose(market.equity, whole.benchmarks["buy_hold"].daily["equity"], rtol=1e-12)


def test_more_tries_deflate_more(long_bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="half-kelly")
    history = decided(long_bars, request)
    result = backtest_decisions(history, request.costs)
    few, many = (weigh(result, history, request, n_tries=n).figures for n in (1, 500))
    assert many["deflated_sharpe"].value < few["deflated_sharpe"].value
    assert many["n_tries"].value == 500


def test_alternatives_are_all_presets_bolder_and_meeker() -> None:
    others = alternatives()
    assert {sizer.name for sizer in others} == set(PRESETS)
    assert len({sizer.config_id for sizer in others}) == len(others) == 3 * (len(PRESETS) - 1) + 1


def test_a_short_backtest_says_why_figures_are_missing(long_bars: pd.DataFrame) -> None:
    request = BacktestRequest()
    history = decided(long_bars, request)
    short = replace(history, frame=history.frame.iloc[-20:])
    result = backtest_decisions(short, request.costs)
    evidence = weigh(result, history, request, n_tries=1)
    missing = {"deflated_sharpe", "deflated_sharpe_active", "pbo", "band_coverage", "brier_skill"}
    assert missing <= set(reasons(evidence.figures))
    assert str(MIN_BARS) in reasons(evidence.figures)["pbo"]
    assert all(interval.reason for interval in evidence.intervals.values())
    assert evidence.scenarios == ()
    assert len(luck_section(evidence).blocks) == 3


def test_a_strategy_that_rests_has_no_track_record(long_bars: pd.DataFrame) -> None:
    request = BacktestRequest(max_long=0.0, max_short=0.0)
    history = decided(long_bars, request)
    result = backtest_decisions(history, request.costs)
    evidence = weigh(result, history, request, n_tries=1)
    assert values(evidence.figures)["minimum_track_record_bars"] is None
    assert "not above zero" in reasons(evidence.figures)["minimum_track_record_bars"]
    assert evidence.plain()["intervals"]["sharpe_ratio"]["reason"] == "returns do not vary"


def test_who_holds_the_share_is_called_the_same(long_bars: pd.DataFrame) -> None:
    request = BacktestRequest(sizing="passive", seeds=2)
    history = decided(long_bars, request)
    result = backtest_decisions(history, request.costs)
    grid = luck_section(weigh(result, history, request, n_tries=1)).blocks[-1]
    assert {cell.text for row in grid.rows for cell in row[1:]} == {"same"}


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="no sizing preset"):
        _ = BacktestRequest(sizing="all-in").sizer
    assert BacktestRequest(max_long=0.5).sizer == make_sizer(max_long=0.5)


# ---------------------------------------------------------------- what the page sends back


def posted(n: int = 12, **changes: object) -> dict[str, Any]:
    """Return the smallest prediction that may be posted; ``changes`` replace its fields."""
    rng = np.random.default_rng(5)
    prices = (100 * np.exp(np.cumsum(rng.normal(0, 0.02, n)))).tolist()
    days = pd.bdate_range("2024-01-02", periods=n).strftime("%Y-%m-%d").to_list()
    whole: dict[str, Any] = {
        "symbol": "AAPL",
        "dates": days,
        "prices": prices,
        "predictedPrices": [price * 1.01 for price in prices],
        "predictedReturns": rng.normal(0.01, 0.02, n).tolist(),
        "fusedPositions": rng.choice([-0.2, 0.0, 0.5, 1.0, 1.8], n).tolist(),
        "classifierProbabilities": [{"buy": 0.6, "sell": 0.4, "hold": 0.0}] * n,
        "tradeMarkers": [],
        "overlays": [],
        "metadata": {
            "modelId": "AAPL-gbm",
            "fusionMode": "gbm_only",
            "buyThreshold": 0.3,
            "sellThreshold": 0.45,
            "horizon": 5,
            "outOfSampleFrom": "2024-01-02",
        },
    }
    meta = changes.pop("metadata", {})
    whole |= changes
    whole["metadata"] = {k: v for k, v in (whole["metadata"] | meta).items() if v is not None}
    return whole


def asked(prediction: dict[str, Any] | None = None, **params: object) -> wire.BacktestRequest:
    return wire.BacktestRequest.model_validate(
        {"prediction": prediction or posted(), "params": {"backtestWindow": 5_000, **params}}
    )


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} on the wire")


def naive_books(request: wire.BacktestRequest) -> tuple[list[float], float, float]:
    """Book by cash and shares, one row after the other; return equity, trading costs, borrowing costs."""
    told, params = request.prediction, request.params
    rate = 0.0008
    cash, shares, paid, borrowed = params.initial_capital, 0.0, 0.0, 0.0
    equity = [cash]
    for before, now, target in zip(told.prices, told.prices[1:], told.fused_positions, strict=False):
        worth = cash + shares * before
        gap = target * worth - shares * before
        traded = gap / (1 + target * rate * np.sign(gap))
        cost = abs(traded) * rate
        cash, shares, paid = cash - traded - cost, shares + traded / before, paid + cost
        fee = 0.05 / 252 * max(-cash, 0.0) + 0.03 / 252 * max(-shares * before, 0.0)
        cash, borrowed = cash - fee, borrowed + fee
        equity.append(cash + shares * now)
    return equity, paid, borrowed


def test_a_posted_prediction_is_booked_as_a_loop_books_it() -> None:
    request = asked()
    result = posted_backtest(request)
    equity, paid, borrowed = naive_books(request)
    assert [point.equity for point in result.equity_curve] == pytest.approx(equity, rel=1e-12)
    assert [point.date for point in result.equity_curve] == request.prediction.dates
    high = np.maximum.accumulate(equity)
    assert [point.drawdown for point in result.equity_curve] == pytest.approx(np.array(equity) / high - 1)
    assert [point.price for point in result.price_series] == request.prediction.prices
    assert result.metrics.transaction_costs == pytest.approx(paid)
    assert result.metrics.borrow_fee == pytest.approx(borrowed)
    assert borrowed > 0
    assert result.metrics.cumulative_return == pytest.approx(equity[-1] / equity[0] - 1)
    assert result.metrics.cumulative_return_pct == pytest.approx(100 * result.metrics.cumulative_return)
    hold = asked(posted(fusedPositions=[1.0] * 12))
    assert result.buy_hold_equity is not None
    assert [point.equity for point in result.buy_hold_equity] == pytest.approx(naive_books(hold)[0])
    assert (result.window_start, result.window_end) == (
        result.equity_curve[0].date,
        result.equity_curve[-1].date,
    )


def test_a_case_worked_out_by_hand() -> None:
    # 100 -> 110 -> 99 -> 99 ...: all in at 100, all out at 110, no costs.
    prices, weights = [100.0, 110.0, *[99.0] * 8], [1.0, *[0.0] * 9]
    request = asked(posted(10, prices=prices, fusedPositions=weights), commission=0.0, slippage=0.0)
    result = json.loads(posted_backtest(request).wire_bytes())
    days = request.prediction.dates
    assert [point["equity"] for point in result["equityCurve"]] == pytest.approx([10_000.0, *[11_000.0] * 9])
    explained = {"classifierProb": 0.6, "regressorReturn": request.prediction.predicted_returns[0]}
    first, last = result["tradeLog"]
    assert first == {
        "id": "1",
        "date": days[0],
        "action": "BUY",
        "price": 100.0,
        "shares": 100.0,
        "position": 1.0,
        "pnl": 0.0,
        "cumulativePnl": 0.0,
        "commission": 0.0,
        "slippage": 0.0,
        "explanation": {**explained, "fusionMode": "gbm_only", "notes": "opened, weight 1.00"},
    }
    assert (last["id"], last["date"], last["action"], last["price"]) == ("2", days[1], "SELL", 110.0)
    assert (last["shares"], last["position"]) == (100.0, 0.0)
    assert last["pnl"] == last["cumulativePnl"] == pytest.approx(1_000.0)
    assert last["explanation"]["classifierProb"] == 0.4
    metrics = result["metrics"]
    assert metrics["cumulativeReturn"] == pytest.approx(0.1)
    assert (metrics["winRate"], metrics["totalTrades"], metrics["maxDrawdown"]) == (1.0, 1, 0.0)
    assert metrics["averageTradeProfit"] == pytest.approx(1_000.0)
    assert metrics["buyHoldReturnPct"] == pytest.approx(-1.0)
    assert metrics["excessReturnPct"] == pytest.approx(11.0)
    buy, sell = result["annotations"]
    assert (buy["type"], buy["shares"], buy["confidence"]) == ("buy", 100.0, 0.6)
    assert (sell["type"], sell["shares"], sell["confidence"]) == ("sell", -100.0, 0.4)
    assert {mark["scope"] for mark in result["annotations"]} == {"backtest"}
    views = result["diagnostics"]
    assert views["monthly"] == [
        {
            "period": "2024-01",
            "strategyReturn": pytest.approx(0.1),
            "buyHoldReturn": pytest.approx(-0.01),
            "alpha": pytest.approx(0.11),
        }
    ]
    closed = pytest.approx(1_000.0)
    assert views["actionBreakdown"] == [
        {"action": "BUY", "count": 1, "winRate": 0.0, "avgPnl": 0.0, "totalPnl": 0.0},
        {"action": "SELL", "count": 1, "winRate": 1.0, "avgPnl": closed, "totalPnl": closed},
    ]
    assert views["hourly"] == []
    assert (views["risk"]["bestBar"], views["risk"]["worstBar"]) == (pytest.approx(0.1), 0.0)
    assert views["rolling"][1]["strategyReturn"] == pytest.approx(0.1)
    assert result["csv"].splitlines()[0].startswith("date,close,target_weight")
    assert len(result["csv"].splitlines()) == 11
    assert "undefined, sent as 0:" in result["notes"][-1]
    assert "tailLossP95" in result["notes"][-1]


def test_exposure_is_not_shown_as_excess() -> None:
    result = posted_backtest(
        asked(posted(60, fusedPositions=[1.8] * 60), maxLong=0.5, commission=0, slippage=0)
    )
    (note,) = (note for note in result.notes or [] if "on average" in note)
    earned = f"{result.metrics.cumulative_return:+.1%}"
    for words in ("50.0% of equity", f"that exposure earned {earned}", f"the positions {earned}", "+0.0%"):
        assert words in note
    assert abs(result.metrics.excess_return_pct or 0.0) > 1.0


PRICES = st.lists(st.floats(1.0, 1_000.0), min_size=10, max_size=40)


@given(data=st.data(), prices=PRICES)
@settings(max_examples=60, deadline=None)
def test_the_log_accounts_for_every_cent_and_nothing_is_nan(data: st.DataObject, prices: list[float]) -> None:
    n = len(prices)
    weights = data.draw(st.lists(st.floats(-3.0, 3.0), min_size=n, max_size=n))
    params = {
        "maxLong": data.draw(st.floats(0.0, 2.0)),
        "maxShort": data.draw(st.floats(0.0, 1.0)),
        "commission": data.draw(st.sampled_from([0.0, 0.001, 0.5, 30.0])),
        "minPositionChange": data.draw(st.sampled_from([None, 0.0, 0.1])),
        "enableForwardSim": True,
        "forwardWindow": data.draw(st.integers(2, 60)),
    }
    told = posted(n, prices=prices, fusedPositions=weights, predictedPrices=prices)
    request = asked(told, **{name: value for name, value in params.items() if value is not None})
    result = posted_backtest(request)
    json.loads(result.wire_bytes(), parse_constant=no_constant)
    assert result.metrics.max_drawdown <= 0.0
    if min(point.equity for point in result.equity_curve) <= 0.0:
        return
    cash, shares = request.params.initial_capital, 0.0
    for trade in result.trade_log:
        signed = trade.shares if trade.action in {"BUY", "COVER"} else -trade.shares
        cash -= signed * trade.price + (trade.commission or 0.0) + (trade.slippage or 0.0)
        shares += signed
    ends_at = cash + shares * prices[-1] - (result.metrics.borrow_fee or 0.0)
    assert ends_at == pytest.approx(result.equity_curve[-1].equity, rel=1e-6, abs=1e-4)
    paid = sum((trade.commission or 0.0) + (trade.slippage or 0.0) for trade in result.trade_log)
    assert paid == pytest.approx(result.metrics.transaction_costs, rel=1e-9, abs=1e-9)


def test_daily_trims_are_no_trades_by_action_either() -> None:
    # Half the equity in a share that rises is sold bit by bit, at a profit, before it falls and is left.
    prices = [*(100.0 * 1.01**day for day in range(30)), *[60.0] * 10]
    weights = [*[0.5] * 30, *[0.0] * 5, *[0.5, 0.0] * 2, 0.0]
    result = posted_backtest(asked(posted(40, prices=prices, fusedPositions=weights)))
    assert result.diagnostics is not None
    rows = {row.action: row for row in result.diagnostics.action_breakdown}
    assert {action: row.count for action, row in rows.items()} == {"BUY": 3, "REBALANCE": 29, "SELL": 3}
    metrics, sold = result.metrics, rows["SELL"]
    assert (sold.count, sold.win_rate) == (metrics.total_trades, metrics.win_rate) == (3, 0.0)
    assert sold.avg_pnl == pytest.approx(metrics.average_trade_profit)
    # Money that was realised is money: what the trims brought has a row of its own, which no win rate counts.
    assert rows["REBALANCE"].total_pnl > 0.0
    assert {row.win_rate for row in rows.values()} == {0.0}
    assert all(row.total_pnl == pytest.approx(row.count * row.avg_pnl) for row in rows.values())
    assert sum(row.count for row in rows.values()) == len(result.trade_log)
    total = sum(row.total_pnl for row in rows.values())
    assert total == pytest.approx(result.trade_log[-1].cumulative_pnl)


def positions_like(kind: str, rng: np.random.Generator, n: int) -> list[float]:
    drawn = {
        "noise": rng.uniform(-1.0, 1.8, n),
        "held": np.ones(n),
        "steps": np.repeat(rng.uniform(-1.0, 1.8, n // 10 + 1), 10)[:n],
        "slow": np.linspace(1.5, 0.0, n),
        "creeping": np.cumsum(rng.normal(0.0, 0.01, n)).clip(-1.0, 1.8),
        "flips": np.round(rng.uniform(-1.0, 1.0, n)),
    }
    return [float(weight) for weight in drawn[kind]]


@pytest.mark.parametrize("band", [None, 0.1])
@pytest.mark.parametrize("kind", ["noise", "held", "steps", "slow", "creeping", "flips"])
def test_what_counts_as_a_trade_is_told_by_the_log(kind: str, band: float | None) -> None:
    rng = np.random.default_rng(len(kind))
    for n in (12, 60, 110):
        prices = [float(price) for price in 100.0 * np.exp(np.cumsum(rng.normal(0.0, 0.03, n)))]
        told = posted(n, prices=prices, predictedPrices=prices, fusedPositions=positions_like(kind, rng, n))
        result = posted_backtest(asked(told, **({} if band is None else {"minPositionChange": band})))
        assert result.diagnostics is not None
        named = [
            "REBALANCE"
            if str(trade.explanation and trade.explanation.notes).startswith("rebalanced")
            else trade.action
            for trade in result.trade_log
        ]
        rows = {row.action: row.count for row in result.diagnostics.action_breakdown}
        assert rows == dict(Counter(named))
        assert named.count("SELL") + named.count("COVER") == result.metrics.total_trades


def test_without_an_order_there_is_nothing_by_action() -> None:
    result = posted_backtest(asked(posted(fusedPositions=[0.0] * 12)))
    assert result.diagnostics is not None
    assert result.diagnostics.action_breakdown == []


def test_the_forward_simulation_is_the_backtest_of_the_last_rows() -> None:
    told = posted(200)
    both = posted_backtest(asked(told, enableForwardSim=True, forwardWindow=30))
    alone = posted_forward_sim(asked(told, forwardWindow=30))
    short = posted_backtest(asked(told, backtestWindow=30))
    assert both.forward_simulation == alone
    assert alone.equity_curve == [point.equity for point in short.equity_curve]
    assert alone.dates == told["dates"][-30:]
    assert alone.source == "historical_holdout"
    assert alone.actions is not None
    assert len(alone.actions) == len(short.trade_log)
    assert alone.trades == short.metrics.total_trades
    assert alone.total_costs == pytest.approx(short.metrics.transaction_costs + short.metrics.borrow_fee)
    assert len(posted_forward_sim(asked(told)).dates) == 20


@pytest.mark.parametrize(
    ("params", "bps"),
    [
        ({}, (5.0, 3.0)),
        ({"commission": 0.001, "slippage": 0.0499}, (10.0, 499.0)),
        ({"commission": 0.5, "slippage": 0.2}, (0.5, 0.2)),
        ({"commission": 0.05, "slippage": 0}, (0.05, 0.0)),
        ({"commission": 500, "slippage": 0}, (500.0, 0.0)),
        ({"commission": 0.5, "commissionBps": 7, "slippageBps": 0.01}, (7.0, 0.01)),
        ({"commission": 0.5, "commissionBps": 0}, (0.0, 3.0)),
    ],
)
def test_commission_and_slippage_in_their_units(params: dict[str, float], bps: tuple[float, float]) -> None:
    costs = posted_costs(asked(**params).params, None)
    assert (costs.commission_bps, costs.slippage_bps) == pytest.approx(bps)


def test_bars_a_year_come_from_the_caller_then_the_prediction_then_the_calendar() -> None:
    assert posted_costs(asked().params, None).periods_per_year == 252
    assert posted_costs(asked().params, 365.0).periods_per_year == 365
    assert posted_costs(asked(annualizationFactor=260).params, 365.0).periods_per_year == 260
    assert posted_costs(asked().params, None, sessions=365).periods_per_year == 365
    for bad in (0.2, 52.0, 251.0, 367.0, 1e6, 1e300):
        assert posted_costs(asked(annualizationFactor=bad).params, 365.0).periods_per_year == 365
        assert posted_costs(asked().params, bad).periods_per_year == 252


@pytest.mark.parametrize("bad", [1.0, 1e6])
def test_bars_a_year_that_no_calendar_has_are_not_believed(bad: float) -> None:
    usual, told = posted_backtest(asked()), posted_backtest(asked(annualizationFactor=bad))
    assert told.metrics == usual.metrics
    assert f"annualizationFactor {bad:g} is not believed: daily bars are 252 to 366 a year" in told.notes
    in_metadata = posted_backtest(asked(posted(metadata={"annualizationFactor": bad})))
    assert in_metadata.metrics == usual.metrics
    assert any("is not believed" in note for note in in_metadata.notes)
    assert not any("is not believed" in note for note in usual.notes)


def test_financing_does_not_depend_on_how_figures_are_annualised() -> None:
    few, many = (posted_backtest(asked(annualizationFactor=bars)) for bars in (252, 366))
    assert few.metrics.borrow_fee == pytest.approx(many.metrics.borrow_fee, rel=1e-12)
    assert few.metrics.borrow_fee > 0
    assert many.metrics.sharpe_ratio == pytest.approx(few.metrics.sharpe_ratio * (366 / 252) ** 0.5)


def test_a_lost_account_has_no_sharpe() -> None:
    # Eightfold within two days, and then short of a share that rises threefold.
    prices = [100.0, 200.0, 400.0, *[1200.0] * 9]
    told = posted(12, prices=prices, fusedPositions=[1.8, 1.8, -1.0, *[1.0] * 9])
    told["fusedPositions"][2] = -1.0
    result = posted_backtest(asked(told, maxShort=1.0, enableForwardSim=True))
    assert any("capital was lost" in note for note in result.notes)
    assert any(note.startswith("undefined, sent as 0") and "sharpeRatio" in note for note in result.notes)
    assert result.metrics.sharpe_ratio == 0
    assert result.metrics.sortino_ratio is None
    assert result.metrics.max_drawdown == -1.0
    assert min(point.drawdown for point in result.equity_curve) == -1.0
    assert {row.strategy_return for row in result.diagnostics.rolling[5:]} == {0.0}
    assert result.forward_simulation is not None
    assert (result.forward_simulation.sharpe, result.forward_simulation.max_drawdown) == (0, -1)


def test_the_notes_say_what_was_checked_and_what_it_cost() -> None:
    for params, said in (
        ({}, "commission was read as 5 bps and slippage as 3 bps of the traded value"),
        ({"commission": 0.5, "slippage": 0}, "commission was read as 0.5 bps and slippage as 0 bps of the"),
        ({"commission": 0, "slippage": 0}, "costs are 0: nobody trades for nothing"),
    ):
        for result in (posted_backtest(asked(**params)), posted_forward_sim(asked(**params))):
            assert any(said in note for note in result.notes)
            assert any("were posted, and checked against no model" in note for note in result.notes)
            assert any("costs are 0" in note for note in result.notes) == ("0: nobody" in said)


def test_positions_are_cut_and_small_changes_not_traded() -> None:
    wild = posted(30, fusedPositions=[5.0, -5.0] * 15)
    result = posted_backtest(asked(wild, maxLong=1.5, maxShort=0.4, shortCap=0.1))
    held = [row.position for row in result.diagnostics.rolling]
    assert (max(held), min(held)) == (pytest.approx(1.5), pytest.approx(-0.1))
    assert "30 positions were cut to -0.1 to 1.5" in result.notes
    steady = posted(30, fusedPositions=[0.5, 0.52] * 15)
    assert len(posted_backtest(asked(steady)).trade_log) == 29
    assert len(posted_backtest(asked(steady, minPositionChange=0.2)).trade_log) == 1


def test_rows_that_the_model_has_seen_are_left_out() -> None:
    told = posted(60)
    since = told["dates"][40]
    result = posted_backtest(asked(posted(60, metadata={"outOfSampleFrom": since})))
    assert result.window_start == since
    assert len(result.equity_curve) == 20
    assert f"40 rows before {since} are left out: the model has seen them" in result.notes
    assert "20 rows are there of the 5000 that were asked for" in result.notes
    with pytest.raises(DataError, match="outOfSampleFrom 2030"):
        posted_backtest(asked(posted(60, metadata={"outOfSampleFrom": "2030-01-01"})))


def test_a_prediction_that_does_not_say_is_stamped_in_sample() -> None:
    told = posted(60, metadata={"outOfSampleFrom": None})
    result = posted_backtest(asked(told, enableForwardSim=True))
    assert any(note.startswith("IN-SAMPLE") for note in result.notes)
    assert result.forward_simulation is not None
    assert result.forward_simulation.source is None
    assert any(note.startswith("IN-SAMPLE") for note in result.forward_simulation.notes)
    assert not any("IN-SAMPLE" in note for note in posted_backtest(asked(posted(60))).notes)


def test_foresight_that_outgrows_the_world_is_refused() -> None:
    prices = [1.0, 1_000.0] * 500
    told = posted(1_000, prices=prices, predictedPrices=prices, fusedPositions=[10.0, -0.9] * 500)
    with pytest.raises(DataError, match="in the world"):
        posted_backtest(asked(told, maxLong=10, maxShort=10))


@pytest.mark.parametrize("extreme", [[1e-9, 0.9], [1e12, 1e3], [1.0, 1e9], [1e9, 1.0], [50.0, 50.0]])
def test_extreme_prices_are_booked_without_a_warning(extreme: list[float]) -> None:
    told = posted(40, prices=extreme * 20, predictedPrices=extreme * 20)
    for weight in (1.0, -0.2, 0.0):
        told["fusedPositions"] = [weight] * 40
        json.loads(posted_backtest(asked(told)).wire_bytes(), parse_constant=no_constant)


FAULTS_5: dict[str, tuple[dict[str, Any], str]] = {
    "nine rows": (posted(9), "9 dates"),
    "no rows": (posted(0), "0 dates"),
    "too many rows": (posted(20_001), "20001 dates"),
    "prices short": (posted(prices=[1.0] * 11), "prices has 11 entries for 12"),
    "prices long": (posted(prices=[1.0] * 13), "prices has 13 entries"),
    "positions short": (posted(fusedPositions=[]), "fusedPositions has 0"),
    "returns short": (posted(predictedReturns=[0.0]), "predictedReturns has 1"),
    "predicted prices short": (posted(predictedPrices=[1.0]), "predictedPrices has 1"),
    "actual returns short": (posted(actualReturns=[0.0]), "actualReturns has 1"),
    "probabilities short": (
        posted(classifierProbabilities=[{"buy": 1, "sell": 0, "hold": 0}]),
        "buy has 1",
    ),
    "price zero": (posted(prices=[100.0] * 11 + [0.0]), "prices lie from 0"),
    "price negative": (posted(prices=[-1.0] + [100.0] * 11), "prices lie from -1"),
    "price absurd": (posted(prices=[1e-9] + [1e12] * 11), "times the lowest"),
    "position absurd": (posted(fusedPositions=[1e308] * 12), "fusedPositions lie"),
    "return below -1": (posted(predictedReturns=[-1.5] * 12), "predictedReturns lie"),
    "probability of 7": (
        posted(classifierProbabilities=[{"buy": 7, "sell": 0, "hold": 0}] * 12),
        "buy lie from 7",
    ),
    "dates unsorted": (posted(dates=posted()["dates"][::-1]), "ascend"),
    "dates doubled": (posted(dates=["2024-01-02"] * 12), "ascend"),
    "no such day": (posted(dates=[*posted()["dates"][:11], "2024-02-30"]), "does not exist"),
    "the year 0": (posted(dates=["0000-01-01", *posted()["dates"][1:]]), "1900"),
    "the year 9999": (posted(dates=[*posted()["dates"][:11], "9999-12-31"]), "1900"),
    "no date": (posted(dates=["yesterday"] * 12), "dates"),
    "full-width digits": (
        posted(dates=[*posted()["dates"][:11], "2024-12-3\N{FULLWIDTH DIGIT ONE}"]),
        "dates",
    ),
    "horizon absurd": (posted(metadata={"horizon": 10**9}), "horizon"),
    "intraday": (posted(metadata={"dataInterval": "1h"}), "dataInterval"),
    "price is text": (posted(prices=["NaN"] * 12), "prices"),
}


@pytest.mark.parametrize("name", FAULTS_5)
@pytest.mark.parametrize("path", ["/api/backtest", "/api/forward_sim"])
def test_fault_5_a_payload_without_sense_is_422(client: TestClient, path: str, name: str) -> None:
    prediction, words = FAULTS_5[name]
    answer = client.post(path, json={"prediction": prediction})
    assert answer.status_code == 422, answer.text[:300]
    assert answer.headers["content-type"] == "application/problem+json"
    assert isinstance(answer.json()["detail"], str)
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ("[" * 100_000, 400),
        (b'{"prediction": "\xff"}', 400),
        ("{}", 422),
        ("[]", 422),
        ('{"prediction": 5, "params": {}}', 422),
        ('{"prediction": {}, "params": {"commission": NaN}}', 422),
        ('{"prediction": {}, "params": {"commission": 1e999}}', 422),
        ('{"prediction": {}, "params": {"commission": 501}}', 422),
        ('{"prediction": {}, "params": {"backtestWindow": 9}}', 422),
        ('{"prediction": {}, "params": {"backtestWindow": true}}', 422),
        ('{"prediction": {}, "params": {"initialCapital": 0}}', 422),
        (json.dumps({"prediction": posted()}).replace('"buy": 0.6', '"buy": NaN', 1), 422),
        (json.dumps({"prediction": posted()}).replace('"prices": [', '"prices": [1e999, ', 1), 422),
        (json.dumps({"prediction": posted(), "params": {"commission": 500, "slippage": 500}}), 422),
    ],
)
def test_a_body_without_sense_is_a_problem(client: TestClient, body: str | bytes, status: int) -> None:
    answer = client.post("/api/backtest", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text[:300]
    assert isinstance(answer.json()["detail"], str)
    assert answer.headers["content-type"] == "application/problem+json"


def test_from_the_prediction_to_its_backtest_over_http(
    client: TestClient, source: FakeSource, registry: FakeRegistry
) -> None:
    told = client.post("/api/predict", json={"symbol": "AAPL", "daysOnChart": 300}).json()
    params = {"backtestWindow": 200, "enableForwardSim": True, "forwardWindow": 50}
    answer = client.post("/api/backtest", json={"prediction": told, "params": params})
    assert answer.status_code == 200, answer.text[:300]
    result = wire.BacktestResult.model_validate(answer.json())
    # The command line's books over the same rows.
    bars = fetch_stock_data("AAPL", source=source)
    history = decide("AAPL", bars.frame, registry.get("AAPL").forecaster, make_sizer())
    window = replace(history, frame=history.frame.iloc[-200:])
    booked = backtest_decisions(window, CostModel())
    assert [p.equity for p in result.equity_curve] == pytest.approx(
        booked.daily["equity"].to_list(), rel=1e-9
    )
    assert [p.date for p in result.equity_curve] == told["dates"][-200:]
    assert result.metrics.sharpe_ratio == pytest.approx(booked.metrics["sharpe_ratio"].value)
    assert len(result.trade_log) == len(booked.trades)
    assert not any("IN-SAMPLE" in note for note in result.notes)
    forward = client.post("/api/forward_sim", json={"prediction": told, "params": params}).json()
    assert result.forward_simulation is not None
    assert forward == json.loads(result.forward_simulation.wire_bytes())
    assert forward["source"] == "historical_holdout"
    assert len(forward["equityCurve"]) == 50


def test_what_the_browser_sends_back_is_read_in_full(client: TestClient) -> None:
    told = client.post("/api/predict", json={"symbol": "AAPL"}).json()
    form = {"backtestWindow": 60, "initialCapital": 10_000, "maxLong": 1.8, "maxShort": 0.2}
    form |= {"commission": 0.5, "slippage": 0.2, "enableForwardSim": False, "unknown": 1}
    result = client.post("/api/backtest", json={"prediction": told, "params": form}).json()
    assert len(result["equityCurve"]) == 60
    assert {"cumulativeReturn", "sharpeRatio", "maxDrawdown", "winRate", "averageTradeProfit"} <= set(
        result["metrics"]
    )
    assert "forwardSimulation" not in result
