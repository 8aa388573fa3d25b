"""A strategy stands beside benchmarks that pay what it pays, and its log adds up to its books."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.accounting import CostModel, account
from evaluation.advanced_backtester import AdvancedBacktester, BacktestReport, Trade
from evaluation.metrics import values
from utils.base import DataError, InsufficientDataError, UsageError

COSTS = CostModel(commission_bps=6.0, slippage_bps=4.0)
N = 500
DATES = pd.bdate_range("2010-01-04", periods=N)


def prices(seed: int = 0, n: int = N, drift: float = 0.0003) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 50.0 * np.exp(np.cumsum(drift + 0.013 * rng.standard_t(5, n)))


def steps(seed: int = 0, n: int = N, low: float = -0.6, high: float = 1.6) -> np.ndarray:
    return np.repeat(np.random.default_rng(seed).uniform(low, high, n // 10), 10)


def run(target: np.ndarray, close: np.ndarray, costs: CostModel = COSTS, **options: object) -> BacktestReport:
    return AdvancedBacktester(costs=costs).backtest_with_positions(
        DATES[: len(close)], close, target, **{"is_out_of_sample": np.ones(len(close), bool)} | options
    )


def test_daily_books_are_the_accountants() -> None:
    close, target = prices(), steps()
    report = run(target, close)
    ledger = account(target, np.append(np.nan, close[1:] / close[:-1] - 1.0), COSTS)
    np.testing.assert_array_equal(report.daily["equity"], ledger.equity)
    np.testing.assert_array_equal(report.daily["trade_cost"], ledger.trade_cost)
    np.testing.assert_allclose(
        report.daily["drawdown"], report.daily["equity"] / report.daily["equity"].cummax() - 1.0
    )
    assert report.daily.index.name == "date"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("minimum", [0.0, 3.0])
def test_trade_log_adds_up_to_the_books(seed: int, minimum: float) -> None:
    close = prices(seed)
    report = run(steps(seed), close, replace(COSTS, minimum_commission=minimum))
    trades, daily = report.trades, report.daily
    assert trades["commission"].sum() == pytest.approx(daily["commission"].sum())
    assert trades["slippage"].sum() == pytest.approx(daily["slippage"].sum())
    signed = trades["shares"] * trades["action"].map({"BUY": 1, "COVER": 1, "SELL": -1, "SHORT": -1})
    held = daily["held_weight"].iloc[-1]
    assert np.sign(signed.sum()) == np.sign(held)
    # What is still open was bought at its mean cost: mark it to the last close.
    outlay = (signed * trades["price"] + trades["commission"] + trades["slippage"]).sum()
    realised = trades["pnl"].sum()
    marked = signed.sum() * close[-1] - (outlay + realised)
    earned = realised + marked - daily["financing_cost"].sum() - daily["borrow_cost"].sum()
    assert daily["equity"].iloc[-1] == pytest.approx(10_000.0 + earned, rel=1e-9)
    np.testing.assert_allclose(trades["cumulative_pnl"], trades["pnl"].cumsum(), atol=1e-6)


def test_trade_log_tells_the_story() -> None:
    close = np.array([10.0, 10.0, 11.0, 12.0, 12.0, 11.0, 11.0])
    target = np.array([1.0, 1.0, 0.0, -0.5, 1.0, 0.0, 0.0])
    free = CostModel(commission_bps=0.0, slippage_bps=0.0, financing_annual=0.0, borrow_annual=0.0)
    trades = run(target, close, free).trades
    assert tuple(trades.columns) == Trade._fields
    assert trades["action"].tolist() == ["BUY", "SELL", "SHORT", "COVER", "BUY", "SELL"]
    assert [when.day for when in trades["date"]] == [4, 6, 7, 8, 8, 11]
    assert trades["exit_date"].notna().tolist() == [False, True, False, True, False, True]
    assert trades["entry_date"].tolist()[1] == trades["date"][0]
    assert trades["pnl"].tolist() == pytest.approx([0.0, 1000.0, 0.0, 0.0, 0.0, -11_000 / 12])
    assert trades["position"].tolist() == pytest.approx([1.0, 0.0, -0.5, 0.0, 1.0, 0.0])
    assert trades["reason"][0] == "opened, weight 1.00"
    assert trades["reason"][1] == "closed, weight 0.00"


def test_log_separates_resizing_from_bringing_back() -> None:
    target = np.array([0.5, 0.5, 0.8, 0.3, 0.3])
    words = run(target, np.array([10.0, 11.0, 11.0, 11.0, 11.0])).trades["reason"].tolist()
    assert words == [
        "opened, weight 0.50",
        "rebalanced, weight 0.50",
        "added, weight 0.80",
        "reduced, weight 0.30",
    ]


def test_orders_that_bring_back_what_drifted_are_logged_and_not_judged() -> None:
    rising = np.cumprod(np.full(60, 1.01))
    report = run(np.full(60, 0.5), rising)
    assert report.trades["exit_date"].notna().sum() > 50
    assert report.trades["is_decided"].sum() == 1
    found = values(report.metrics)
    assert (found["total_trades"], found["win_rate"], found["profit_factor"]) == (0.0, None, None)
    assert found["total_orders"] == len(report.trades)
    assert "no decision" in (report.metrics["win_rate"].reason or "")
    # What creeps adds up: at 0.6 % a day every fourth order is a decision.
    creeping = run(1.0 - 0.006 * np.arange(60), rising).trades
    assert np.flatnonzero(creeping["is_decided"]).tolist() == list(range(0, 59, 4))
    assert run(np.array([0.5, 0.5, 0.2, 0.0, 0.0]), rising[:5]).metrics["total_trades"].value == 2.0


@pytest.mark.parametrize("band", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_what_was_not_decided_is_rebalanced_and_nothing_else(seed: int, band: float) -> None:
    rng, n = np.random.default_rng(seed), 200
    wide, slow = np.repeat(rng.uniform(-1.0, 1.8, n // 10), 10), np.cumsum(rng.normal(0.0, 0.01, n))
    for target in (wide, slow, wide + slow, np.linspace(1.0, 0.4, n)):
        simulator = AdvancedBacktester(costs=COSTS, no_trade_band=band)
        trades = simulator.backtest_with_positions(
            DATES[:n], prices(seed, n), target, include_in_sample=True
        ).trades
        assert trades["reason"].str.startswith("rebalanced").tolist() == (~trades["is_decided"]).tolist()


def test_buy_and_hold_equals_its_benchmark() -> None:
    report = run(np.ones(N), prices())
    for benchmark in report.benchmarks.values():
        np.testing.assert_allclose(benchmark.daily["equity"], report.daily["equity"])
    found = values(report.metrics)
    assert found["alpha"] == pytest.approx(0.0, abs=1e-12)
    assert found["beta"] == pytest.approx(1.0)
    assert found["win_rate"] is None
    assert found["information_ratio"] is None


def test_leverage_is_not_alpha() -> None:
    costs = CostModel(commission_bps=0.0, slippage_bps=0.0, financing_annual=0.05)
    close = prices(1, drift=0.003)
    report = run(np.full(N, 1.6), close, costs)
    assert report.metrics["total_return"].value > report.benchmarks["buy_hold"].metrics["total_return"].value
    for name in ("exposure_matched", "volatility_matched"):
        matched = report.benchmarks[name]
        assert matched.exposure == pytest.approx(1.6, rel=1e-6)
        np.testing.assert_allclose(matched.daily["equity"], report.daily["equity"], rtol=1e-6)
        assert matched.daily["financing_cost"].sum() > 0.0


def test_matched_benchmarks_match_and_pay() -> None:
    report = run(steps(3), prices(3))
    held = report.daily["held_weight"].iloc[1:]
    exposure = report.benchmarks["exposure_matched"]
    assert exposure.exposure == pytest.approx(held.mean())
    assert exposure.daily["trade_cost"].sum() > 0.0
    volatility = report.benchmarks["volatility_matched"].metrics["volatility"].value
    assert volatility == pytest.approx(report.metrics["volatility"].value, rel=1e-6)
    assert set(report.benchmarks) == {"buy_hold", "exposure_matched", "volatility_matched"}


def test_minimum_commission_does_not_ruin_the_constant_benchmark() -> None:
    report = run(steps(3, low=0.2, high=0.8), prices(3), replace(COSTS, minimum_commission=5.0))
    orders = np.count_nonzero(report.benchmarks["exposure_matched"].daily["turnover"])
    assert 1 <= orders < 60


def test_in_sample_rows_are_left_out_by_default() -> None:
    close, target = prices(), steps()
    known = np.arange(N) >= 200
    report = run(target, close, is_out_of_sample=known)
    assert len(report.daily) == 300
    assert report.out_of_sample_from == report.daily.index[0] == DATES[200]
    assert report.daily["equity"].iloc[0] == 10_000.0
    assert not report.is_in_sample
    assert not any("IN-SAMPLE" in note for note in report.notes)


def test_in_sample_rows_are_stamped_when_asked_for() -> None:
    known = np.arange(N) >= 200
    report = run(steps(), prices(), is_out_of_sample=known, include_in_sample=True)
    assert len(report.daily) == N
    assert report.is_in_sample
    assert report.notes[0] == "IN-SAMPLE: 200 of 500 rows were seen in training."
    assert report.out_of_sample_from == DATES[200]


def test_unknown_provenance_is_stamped() -> None:
    report = run(steps(), prices(), is_out_of_sample=None)
    assert report.is_in_sample
    assert report.notes[0].startswith("IN-SAMPLE: nothing says")
    assert report.out_of_sample_from is None


def test_in_sample_rows_cannot_hide_behind_out_of_sample_rows() -> None:
    known = np.arange(N) % 300 >= 200
    forecasts = np.full(N, 0.01)
    with pytest.raises(DataError, match="in-sample rows lie behind"):
        run(steps(), prices(), is_out_of_sample=known)
    with pytest.raises(DataError, match="in-sample rows lie behind"):
        run(steps(), prices(), is_out_of_sample=known, expected_return=forecasts, horizon_bars=5)
    forecasts[~known] = np.nan
    report = run(steps(), prices(), is_out_of_sample=known, expected_return=forecasts, horizon_bars=5)
    assert not report.is_in_sample


def test_nothing_out_of_sample_is_refused() -> None:
    with pytest.raises(DataError, match="no row is out of sample"):
        run(steps(), prices(), is_out_of_sample=np.zeros(N, bool))


def test_forecasts_are_judged_by_the_closes() -> None:
    close = prices()
    truth = np.full(N, np.nan)
    truth[:-5] = close[5:] / close[:-5] - 1.0
    said = np.where(np.isfinite(truth), truth, 0.001)
    found = values(run(np.ones(N), close, expected_return=said, horizon_bars=5).metrics)
    assert found["direction_accuracy"] == found["information_coefficient"] == 1.0
    assert found["direction_base_rate"] == pytest.approx(np.mean(truth[:-5] > 0.0))
    assert "direction_accuracy" not in run(np.ones(N), close).metrics


def test_lag_is_the_accountants() -> None:
    close, target = prices(), steps()
    late = run(target, close)
    early = run(np.append(0.0, target[:-1]), close, apply_position_lag=False)
    np.testing.assert_array_equal(late.daily["equity"], early.daily["equity"])


def test_prices_that_rest_give_no_crash() -> None:
    report = run(steps(), np.full(N, 10.0))
    assert report.benchmarks["volatility_matched"].exposure == 0.0
    assert report.benchmarks["buy_hold"].metrics["max_drawdown"].value < 0.0
    idle = run(np.zeros(N), np.full(N, 10.0))
    assert idle.metrics["sharpe_ratio"].value is None
    assert len(idle.trades) == 0
    assert tuple(idle.trades.columns) == Trade._fields


def test_a_strategy_that_rests_gives_no_crash() -> None:
    idle = run(np.zeros(N), prices())
    assert [idle.benchmarks[name].exposure for name in ("exposure_matched", "volatility_matched")] == [
        0.0,
        0.0,
    ]
    assert idle.metrics["max_drawdown"].value == 0.0


def test_ruin_is_told() -> None:
    close = np.array([10.0, 10.0, 2.0, 2.0])
    report = run(np.full(4, 1.9), close)
    assert "The capital was lost on 2010-01-06." in report.notes
    assert report.metrics["cagr"].reason == "the capital was lost"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"close": np.ones(4)}, "close has 4"),
        ({"target_weight": np.ones(4)}, "target_weight has 4"),
        ({"is_out_of_sample": np.ones(4, bool)}, "is_out_of_sample has 4"),
        ({"close": np.array([1.0, 2.0, 0.0, 1.0, 1.0])}, "2010-01-06 is 0.0"),
        ({"dates": DATES[[0, 2, 1, 3, 4]]}, "ascend"),
        ({"dates": DATES[[0, 1, 1, 3, 4]]}, "ascend"),
    ],
)
def test_unusable_rows_are_refused(change: dict[str, object], words: str) -> None:
    arguments = {"dates": DATES[:5], "close": np.ones(5), "target_weight": np.ones(5)} | change
    with pytest.raises(DataError, match=words):
        AdvancedBacktester(costs=COSTS).backtest_with_positions(**arguments)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InsufficientDataError, match="needs 2 rows"):
        run(np.ones(1), np.ones(1))
    with pytest.raises(UsageError, match="horizon_bars"):
        run(np.ones(5), np.ones(5), expected_return=np.ones(5))
    with pytest.raises(UsageError, match="at least 1"):
        run(np.ones(5), np.ones(5), expected_return=np.ones(5), horizon_bars=0)
