"""The books are right, to the last bit that floating point holds; and each way to cheat is caught."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.accounting import MAX_WEIGHT, CostModel, Ledger, account, book_bar
from utils.base import DataError, UsageError

FREE = CostModel(commission_bps=0.0, slippage_bps=0.0, financing_annual=0.0, borrow_annual=0.0)
DEAR = CostModel(commission_bps=12.0, slippage_bps=7.0, financing_annual=0.08, borrow_annual=0.05)


def all_costs(ledger: Ledger) -> np.ndarray:
    return ledger.trade_cost + ledger.financing_cost + ledger.borrow_cost


class Naive(NamedTuple):
    equity: np.ndarray
    trade_cost: np.ndarray
    financing: np.ndarray
    borrow: np.ndarray


def naive_books(
    target: np.ndarray,
    returns: np.ndarray,
    costs: CostModel,
    *,
    lag: int = 1,
    charges_trades: bool = True,
    financing_sign: float = 1.0,
    capital: float = 10_000.0,
) -> Naive:
    """Keep the books in the plainest way: shares, money, and orders found by trying again until they fit."""
    n = len(target)
    out = Naive(*(np.zeros(n) for _ in Naive._fields))
    out.equity[0] = capital
    cash, shares, price = capital, 0.0, 1.0
    for t in range(1, n):
        equity = cash + shares * price
        wanted = target[t - lag]
        fee = 0.0
        for _ in range(60):
            order = wanted * (equity - fee) / price - shares
            fee = abs(order) * price * (costs.commission_bps + costs.slippage_bps) / 10_000.0
        if not charges_trades:
            fee = 0.0
        shares += order
        cash -= order * price + fee
        financing = financing_sign * max(-cash, 0.0) * costs.financing_annual / costs.periods_per_year
        borrow = max(-shares, 0.0) * price * costs.borrow_annual / costs.periods_per_year
        cash -= financing + borrow
        price *= 1.0 + returns[t]
        out.equity[t] = cash + shares * price
        out.trade_cost[t], out.financing[t], out.borrow[t] = fee, financing, borrow
    return out


def agrees(naive: Naive, ledger: Ledger) -> bool:
    pairs = (
        (naive.equity, ledger.equity),
        (naive.trade_cost, ledger.trade_cost),
        (naive.financing, ledger.financing_cost),
        (naive.borrow, ledger.borrow_cost),
    )
    return all(np.allclose(a, b, rtol=1e-9, atol=1e-9 * ledger.initial_capital) for a, b in pairs)


def parts_add_up(ledger: Ledger) -> bool:
    """Cash is never created: what came in, less what was paid, is what is there."""
    before = np.concatenate([[ledger.initial_capital], ledger.equity[:-1]])
    earned = ledger.gross_return * before - all_costs(ledger)
    scale = np.maximum.accumulate(np.maximum(np.abs(ledger.equity), ledger.initial_capital))
    return bool(
        np.all(np.abs(ledger.initial_capital + np.cumsum(earned) - ledger.equity) <= 1e-9 * scale)
        and np.all(all_costs(ledger) >= 0.0)
    )


def history(
    seed: int, n: int = 300, *, low: float = -0.8, high: float = 1.9
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    returns = rng.standard_t(4, n) * 0.012
    returns[0] = np.nan
    target = rng.uniform(low, high, n)
    hold = rng.random(n) < 0.4
    for t in range(1, n):
        if hold[t]:
            target[t] = target[t - 1]
    return target, np.clip(returns, -0.3, 0.3)


@pytest.mark.parametrize("seed", range(20))
def test_naive_loop_agrees(seed: int) -> None:
    target, returns = history(seed)
    assert agrees(naive_books(target, returns, DEAR), account(target, returns, DEAR))


def test_missing_cost_is_caught() -> None:
    target, returns = history(0)
    assert not agrees(
        naive_books(target, returns, DEAR, charges_trades=False), account(target, returns, DEAR)
    )


def test_wrong_sign_of_financing_is_caught() -> None:
    target, returns = history(0)
    assert not agrees(naive_books(target, returns, DEAR, financing_sign=-1.0), account(target, returns, DEAR))


def test_same_bar_fill_is_caught() -> None:
    target, returns = history(0)
    assert not agrees(naive_books(target, returns, DEAR, lag=0), account(target, returns, DEAR))


weights = st.floats(-1.5, 2.5, allow_nan=False)
moves = st.floats(-0.35, 0.5, allow_nan=False)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(weights, moves), min_size=1, max_size=60),
    minimum=st.sampled_from([0.0, 1.0, 25.0]),
    band=st.sampled_from([0.0, 0.05]),
    lagged=st.booleans(),
)
def test_parts_add_up(rows: list[tuple[float, float]], minimum: float, band: float, lagged: bool) -> None:
    target, returns = (np.array(column) for column in zip(*rows, strict=True))
    costs = replace(DEAR, minimum_commission=minimum)
    ledger = account(target, returns, costs, apply_position_lag=lagged, no_trade_band=band)
    assert parts_add_up(ledger)
    before = np.concatenate([[ledger.initial_capital], ledger.equity[:-1]])
    alive = before > 0.0
    np.testing.assert_allclose(
        (ledger.gross_return - ledger.net_return)[alive], (all_costs(ledger) / before)[alive], atol=1e-9
    )


def test_created_cash_is_caught() -> None:
    target, returns = history(1)
    ledger = account(target, returns, DEAR)
    assert not parts_add_up(replace(ledger, cash=ledger.cash + np.linspace(0.0, 1e-4, len(target))))
    assert not parts_add_up(replace(ledger, commission=ledger.commission * 0.999))


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(weights, moves), min_size=3, max_size=40), cut=st.integers(1, 39))
def test_books_of_a_prefix_are_the_prefix_of_the_books(rows: list[tuple[float, float]], cut: int) -> None:
    target, returns = (np.array(column) for column in zip(*rows, strict=True))
    cut = min(cut, len(rows))
    whole, part = account(target, returns, DEAR), account(target[:cut], returns[:cut], DEAR)
    np.testing.assert_array_equal(whole.equity[:cut], part.equity)


def gap_was_earned(book: Callable[[np.ndarray, np.ndarray], Ledger]) -> bool:
    """Decide to be long on the day of a gap, after it was seen; say whether the gap was earned."""
    returns, target = np.zeros(10), np.zeros(10)
    returns[5] = 0.5
    target[5:] = 1.0
    return bool(book(target, returns).equity[-1] > 10_000.0)


def test_a_position_decided_on_the_gap_day_does_not_earn_the_gap() -> None:
    assert not gap_was_earned(lambda w, r: account(w, r, FREE))


def test_the_gap_test_catches_a_same_bar_fill() -> None:
    assert gap_was_earned(lambda w, r: account(w, r, FREE, apply_position_lag=False))


def test_lag_is_one_bar_exactly() -> None:
    target, returns = history(2)
    lagged = account(target, returns, DEAR)
    shifted = account(np.concatenate([[0.0], target[:-1]]), returns, DEAR, apply_position_lag=False)
    np.testing.assert_array_equal(lagged.equity, shifted.equity)
    np.testing.assert_allclose(lagged.held_weight[1:], target[:-1], atol=1e-9)


def test_constant_full_exposure_pays_once() -> None:
    _, returns = history(3, 3000)
    ledger = account(np.ones(3000), returns, DEAR)
    assert np.flatnonzero(all_costs(ledger)).tolist() == [1]
    assert np.flatnonzero(ledger.turnover).tolist() == [1]


def test_buy_and_hold_is_the_price_ratio_less_the_entry() -> None:
    _, returns = history(4)
    ledger = account(np.ones(300), returns, DEAR)
    ratio = np.prod(1.0 + returns[1:])
    assert ledger.equity[-1] == pytest.approx(10_000.0 / (1.0 + DEAR.one_way_rate) * ratio, rel=1e-12)


def test_leverage_pays_for_the_excess_and_shorts_for_their_size() -> None:
    no_trading = replace(DEAR, commission_bps=0.0, slippage_bps=0.0)
    flat = np.zeros(2)
    long = account(np.array([1.8, 1.8]), flat, no_trading)
    assert long.financing_cost[1] == pytest.approx(0.8 * 10_000.0 * 0.08 / 252)
    assert long.borrow_cost[1] == 0.0
    short = account(np.array([-0.3, -0.3]), flat, no_trading)
    assert short.borrow_cost[1] == pytest.approx(0.3 * 10_000.0 * 0.05 / 252)
    assert short.financing_cost[1] == 0.0
    assert long.equity[1] < 10_000.0
    assert short.equity[1] < 10_000.0


def test_idle_cash_earns_nothing() -> None:
    ledger = account(np.zeros(50), np.full(50, 0.01), DEAR)
    np.testing.assert_array_equal(ledger.equity, 10_000.0)
    assert ledger.ruined_at is None


def test_minimum_commission_is_charged_per_order_and_an_order_smaller_than_its_fee_is_not_sent() -> None:
    costs = replace(FREE, minimum_commission=20.0)
    ledger = account(np.array([0.5, 0.501, 0.501]), np.zeros(3), costs)
    np.testing.assert_array_equal(ledger.commission, [0.0, 20.0, 0.0])
    assert ledger.traded_value[2] == 0.0
    bigger = account(np.array([0.5, 0.7, 0.7]), np.zeros(3), costs)
    np.testing.assert_array_equal(bigger.commission, [0.0, 20.0, 20.0])
    assert bigger.held_weight[2] == pytest.approx(0.7)


def test_band_lets_a_constant_exposure_drift() -> None:
    _, returns = history(5)
    constant = np.full(300, 0.5)
    every_day = account(constant, returns, DEAR)
    seldom = account(constant, returns, DEAR, no_trade_band=0.05)
    assert np.count_nonzero(seldom.turnover) < 10 < np.count_nonzero(every_day.turnover)
    assert np.abs(seldom.held_weight[1:] - 0.5).max() <= 0.05 + 1e-12


@pytest.mark.parametrize(("weight", "move"), [(1.9, -0.9), (-1.0, 1.5)])
def test_ruin_is_final_and_adds_up(weight: float, move: float) -> None:
    returns = np.array([0.0, 0.01, move, 0.5, 0.5])
    ledger = account(np.full(5, weight), returns, DEAR)
    assert ledger.ruined_at == 2
    assert ledger.equity[2] < 0.0
    np.testing.assert_array_equal(ledger.equity[2:], ledger.equity[2])
    np.testing.assert_array_equal(ledger.held_weight[3:], 0.0)
    assert parts_add_up(ledger)


def test_first_row_books_nothing() -> None:
    ledger = account(np.array([1.0, 1.0]), np.array([np.nan, 0.1]), DEAR)
    assert ledger.equity[0] == 10_000.0
    assert all_costs(ledger)[0] == ledger.net_return[0] == ledger.held_weight[0] == 0.0


def test_compiled_books_equal_interpreted_books() -> None:
    """Machine code in a cache may be older than its source."""
    target, returns = history(6, 200)
    ledger = account(target, returns, DEAR)
    cash, position = 10_000.0, 0.0
    for t in range(1, 200):
        booked = book_bar.py_func(cash, position, target[t - 1], returns[t], DEAR.rates())
        cash, position = booked.cash, booked.position
        assert cash + position == pytest.approx(ledger.equity[t], rel=1e-12)


@pytest.mark.parametrize("name", ["commission_bps", "slippage_bps", "minimum_commission", "borrow_annual"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_impossible_costs_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        CostModel(**{name: value})


def test_absurd_costs_and_calendars_are_refused() -> None:
    with pytest.raises(UsageError, match="1000 bps"):
        CostModel(commission_bps=1500.0)
    with pytest.raises(UsageError, match="periods_per_year"):
        CostModel(periods_per_year=0)


@pytest.mark.parametrize(
    ("target", "returns", "words"),
    [
        ([0.0, 1.0], [0.0], "shape"),
        ([], [], "no bars"),
        ([0.0, np.nan], [0.0, 0.1], r"target_weight\[1\]"),
        ([0.0, MAX_WEIGHT + 1], [0.0, 0.1], "within"),
        ([0.0, 1.0], [0.0, np.nan], r"asset_return_simple\[1\]"),
        ([0.0, 1.0], [0.0, -1.0], "above -1"),
    ],
)
def test_unusable_rows_are_refused(target: list[float], returns: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        account(np.array(target), np.array(returns), DEAR)


@pytest.mark.parametrize("capital", [0.0, -5.0, np.nan])
def test_impossible_capital_is_refused(capital: float) -> None:
    with pytest.raises(UsageError, match="initial_capital"):
        account(np.ones(2), np.zeros(2), DEAR, initial_capital=capital)


def test_impossible_band_is_refused() -> None:
    with pytest.raises(UsageError, match="no_trade_band"):
        account(np.ones(2), np.zeros(2), DEAR, no_trade_band=-0.1)


def test_weights_are_bounded_even_when_trading_is_free() -> None:
    with pytest.raises(DataError, match="within"):
        account(np.array([0.0, 1e9]), np.zeros(2), FREE)
