"""Living through history bar by bar gives what the vectorised books say; whoever peeks is found out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.accounting import CostModel, account
from evaluation.forward_simulator import ForwardSimulator, largest_gap
from inference.position_sizing import PRESETS, SizingInputs, make_sizer
from utils.base import DataError, InsufficientDataError

COSTS = CostModel(commission_bps=7.0, slippage_bps=4.0, financing_annual=0.06, borrow_annual=0.04)
SYMBOLS = ("AAPL", "C", "KO", "XOM", "GILD")
Weights = Callable[[pd.DataFrame], np.ndarray]


def weights_of(name: str) -> Weights:
    """Return a toy forecaster of momentum under that preset: row t uses closes to t only."""

    def weights(bars: pd.DataFrame) -> np.ndarray:
        close = bars["Close"].to_numpy()
        returns = np.full(len(close), np.nan)
        returns[1:] = close[1:] / close[:-1] - 1.0
        momentum = np.full(len(close), np.nan)
        momentum[10:] = close[10:] / close[:-10] - 1.0
        inputs = SizingInputs(
            expected_return=momentum / 4.0,
            baseline_return=np.full(len(close), 0.001),
            sigma=np.full(len(close), 0.04),
            p_win=0.54 + np.clip(np.nan_to_num(momentum), -0.1, 0.1) / 4.0,
            payoff_ratio=np.full(len(close), 1.05),
            skill_lower=np.full(len(close), 0.3),
            asset_return_simple=returns,
            horizon_bars=5,
        )
        return make_sizer(name).fold(inputs, COSTS)

    return weights


def lived_as_booked(bars: pd.DataFrame, weights: Weights) -> bool:
    lived = ForwardSimulator(costs=COSTS).run(bars, lambda known: float(weights(known)[-1]))
    returns = bars["Close"].pct_change(fill_method=None).to_numpy()
    booked = account(weights(bars), returns, COSTS)
    decided_alike = np.array_equal(lived["target_weight"], weights(bars))
    return bool(decided_alike and largest_gap(lived, booked) <= 1e-12)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", range(20))
def test_every_preset_lives_as_booked(make_bars: Callable[..., pd.DataFrame], name: str, seed: int) -> None:
    assert lived_as_booked(make_bars(160, seed=seed, vol=0.03), weights_of(name))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_preset_lives_as_booked_on_real_prices(market_dir: Path, symbol: str, name: str) -> None:
    raw = pd.read_csv(market_dir / f"{symbol}.csv", index_col="Date", parse_dates=True).tail(300)
    assert lived_as_booked(pd.DataFrame({"Close": raw["Adj Close"]}), weights_of(name))


def test_a_peeker_is_found_out(make_bars: Callable[..., pd.DataFrame]) -> None:
    def peeks(bars: pd.DataFrame) -> np.ndarray:
        close = bars["Close"].to_numpy()
        return np.sign(np.append(close[1:], close[-1]) - close)

    assert not lived_as_booked(make_bars(100), peeks)


def test_a_same_bar_fill_is_found_out(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars = make_bars(100)
    weights = weights_of("half-kelly")
    lived = ForwardSimulator(costs=COSTS).run(bars, lambda known: float(weights(known)[-1]))
    returns = bars["Close"].pct_change(fill_method=None).to_numpy()
    cheat = account(weights(bars), returns, COSTS, apply_position_lag=False)
    assert not np.allclose(lived["equity"], cheat.equity, rtol=1e-6)


def test_nothing_after_the_present_is_handed_out(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars, seen = make_bars(40), []

    def decide(known: pd.DataFrame) -> float:
        seen.append(len(known))
        pd.testing.assert_frame_equal(known, bars.iloc[: len(known)])
        return 1.0

    lived = ForwardSimulator(costs=COSTS).run(bars, decide, days=10)
    assert seen == list(range(30, 41))
    assert list(lived.index) == list(bars.index[29:])
    assert lived["equity"].iloc[0] == 10_000.0
    assert lived["close"].tolist() == bars["Close"].iloc[29:].tolist()


def test_refits_on_schedule_from_what_is_known(make_bars: Callable[..., pd.DataFrame]) -> None:
    learnt: list[int] = []

    def refit(known: pd.DataFrame) -> Callable[[pd.DataFrame], float]:
        learnt.append(len(known))
        weight = 0.1 * len(learnt)
        return lambda _: weight

    lived = ForwardSimulator(costs=COSTS).run(
        make_bars(25), lambda _: 1.0, days=20, refit=refit, refit_every_bars=8
    )
    assert learnt == [13, 21]
    assert lived["target_weight"].tolist() == [1.0] * 8 + [0.1] * 8 + [0.2] * 5


def test_capital_once_lost_stays_lost(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars = make_bars(6).copy()
    bars["Close"] = [100.0, 100.0, 20.0, 20.0, 40.0, 40.0]
    lived = ForwardSimulator(costs=COSTS).run(bars, lambda _: 1.9)
    assert (lived["equity"].iloc[2:] == lived["equity"].iloc[2]).all()
    assert lived["equity"].iloc[2] < 0.0
    assert (lived["net_return"].iloc[3:] == 0.0).all()


def test_bad_requests_are_refused(make_bars: Callable[..., pd.DataFrame]) -> None:
    simulator, bars = ForwardSimulator(costs=COSTS), make_bars(10)
    with pytest.raises(InsufficientDataError, match="needs 11 of them, has 10"):
        simulator.run(bars, lambda _: 1.0, days=10)
    with pytest.raises(InsufficientDataError, match="needs 2"):
        simulator.run(bars.iloc[:1], lambda _: 1.0)
    with pytest.raises(DataError, match="finite weight"):
        simulator.run(bars, lambda _: np.nan)
    with pytest.raises(DataError, match="refitting"):
        simulator.run(bars, lambda _: 1.0, refit_every_bars=5)
    with pytest.raises(DataError, match="refitting"):
        simulator.run(bars, lambda _: 1.0, refit=lambda _: lambda _: 1.0, refit_every_bars=0)


@pytest.mark.parametrize(
    "name", ["held_weight", "equity", "net_return", "trade_cost", "financing_cost", "borrow_cost"]
)
def test_a_gap_in_any_entry_is_found(make_bars: Callable[..., pd.DataFrame], name: str) -> None:
    bars = make_bars(120, seed=1)
    weights = weights_of("half-kelly")
    lived = ForwardSimulator(costs=COSTS).run(bars, lambda known: float(weights(known)[-1]))
    booked = account(weights(bars), bars["Close"].pct_change(fill_method=None).to_numpy(), COSTS)
    planted = lived.copy()
    planted.iloc[60, planted.columns.get_loc(name)] += 1e-6
    assert largest_gap(lived, booked) <= 1e-12
    assert largest_gap(planted, booked) > 1e-11
