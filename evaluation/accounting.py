"""Cash, shares and costs: the one place where positions become money.

``target_weight[t]`` is decided at the close of bar t, traded after it, held during bar t + 1, and booked with
its costs in row t + 1. Row 0 earns nothing and pays nothing. What is paid:

- Commission and slippage, on the value that is traded. The order moves the position from the weight to which
  it has drifted to the target, measured in the equity that is left after the order is paid: a target of 1.0
  spends all cash and not a cent more, and a constant 1.0 trades once.
- Financing, on the cash that is borrowed (exposure over 1), and a borrow fee, on the value that is sold
  short.

Idle cash, short proceeds included, earns nothing. Ruin is final: once equity is zero or below, the position
is closed and nothing is traded any more. numba's cache: a caller (the sizer) holds its own copy of
`book_bar`, which a change of this file alone does not renew; deleting ``__pycache__`` does.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from data.indicators import cached
from utils.base import DataError, UsageError

FloatArray = npt.NDArray[np.float64]

DEFAULT_CAPITAL = 10_000.0
# No broker lends more; past it, one order would cost a good part of the equity.
MAX_WEIGHT = 20.0
_BPS = 1e-4
# Orders below this fraction of equity are rounding, not trades.
_DUST = 1e-9
_ANNUAL = ("financing_annual", "borrow_annual")


class Rates(NamedTuple):
    """What `CostModel` means per order and per bar; fractions, but for the minimum, which is money."""

    commission: float
    slippage: float
    minimum_commission: float
    financing_per_bar: float
    borrow_per_bar: float


class Booking(NamedTuple):
    """Money after one bar, and what the bar cost.

    At the close: ``cash`` (negative when borrowed) and ``position``, the signed value of the shares.
    ``traded`` is the signed value of the order that opened the bar, ``held`` the weight right after it,
    ``gain`` what the shares earned before costs. The rest is money paid in the bar, each >= 0.
    """

    cash: float
    position: float
    traded: float
    held: float
    gain: float
    commission: float
    slippage: float
    financing: float
    borrow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What trading and holding cost; raises `UsageError` when a figure makes no sense.

    One-way costs are in basis points of the traded value, ``minimum_commission`` is money per order.
    Financing of borrowed cash and the fee on what is sold short are simple annual rates, fractions.
    """

    commission_bps: float = 5.0
    slippage_bps: float = 3.0
    minimum_commission: float = 0.0
    financing_annual: float = 0.05
    borrow_annual: float = 0.03
    periods_per_year: int = 252

    def __post_init__(self) -> None:
        for name in ("commission_bps", "slippage_bps", "minimum_commission", *_ANNUAL):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name} must be finite and at least 0, got {value!r}")
        if self.one_way_rate >= 0.1:
            raise UsageError(f"one-way costs must be below 1000 bps, got {self.one_way_rate / _BPS:g}")
        if self.periods_per_year < 1:
            raise UsageError(f"periods_per_year must be at least 1, got {self.periods_per_year!r}")

    @property
    def one_way_rate(self) -> float:
        """Commission and slippage of one order, as a fraction of its value."""
        return (self.commission_bps + self.slippage_bps) * _BPS

    def rates(self) -> Rates:
        """Return the figures in the units that `book_bar` takes."""
        return Rates(
            commission=float(self.commission_bps) * _BPS,
            slippage=float(self.slippage_bps) * _BPS,
            minimum_commission=float(self.minimum_commission),
            financing_per_bar=self.financing_annual / self.periods_per_year,
            borrow_per_bar=self.borrow_annual / self.periods_per_year,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The books, one entry per bar, (n,), in money but for the weight; known at the close of its bar.

    ``cash`` and the signed ``position_value`` of the shares are those at the close. ``held_weight`` earned
    ``gain`` during the bar, before any cost; ``traded_value`` is signed; the rest was paid in the bar.
    """

    cash: FloatArray
    position_value: FloatArray
    held_weight: FloatArray
    gain: FloatArray
    traded_value: FloatArray
    commission: FloatArray
    slippage: FloatArray
    financing_cost: FloatArray
    borrow_cost: FloatArray

    @property
    def initial_capital(self) -> float:
        """Money at the start."""
        return float(self.cash[0])

    @property
    def equity(self) -> FloatArray:
        """Money and shares at the close."""
        return self.cash + self.position_value

    @property
    def gross_return(self) -> FloatArray:
        """Simple return of the bar on the equity before it, before all costs."""
        return self._over_equity_before(self.gain)

    @property
    def net_return(self) -> FloatArray:
        """Simple return of the bar on the equity before it, after all costs."""
        return self._over_equity_before(np.diff(self.equity, prepend=self.initial_capital))

    @property
    def turnover(self) -> FloatArray:
        """Value traded over the equity before the bar, one-way, >= 0."""
        return self._over_equity_before(np.abs(self.traded_value))

    @property
    def trade_cost(self) -> FloatArray:
        """Commission and slippage of each bar, money."""
        return self.commission + self.slippage

    @property
    def ruined_at(self) -> int | None:
        """Row in which equity fell to zero or below; None if it never did."""
        gone = self.equity <= 0.0
        return int(np.argmax(gone)) if gone.any() else None

    def _over_equity_before(self, money: FloatArray) -> FloatArray:
        before = np.concatenate([[self.initial_capital], self.equity[:-1]])
        # After ruin nothing moves any more.
        out = np.zeros_like(money)
        np.divide(money, before, out=out, where=before > 0.0)
        return out


@cached
@njit(inline="always", error_model="numpy")
def book_bar(cash: float, position: float, target: float, asset_return: float, rates: Rates) -> Booking:
    """Trade to the target, then live through one bar, and return the books at its close.

    ``cash`` and ``position`` are those of the last close, ``target`` is the weight decided then,
    ``asset_return`` the simple return of the bar that follows.
    """
    equity = cash + position
    if equity <= 0.0:
        return Booking(equity, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rate = rates.commission + rates.slippage
    cost = target * rate
    scale = 1.0 / (1.0 - cost * cost)
    gap = target * equity - position
    traded = 0.0
    commission = 0.0
    slippage = 0.0
    if abs(gap) > _DUST * equity:
        # Paid from the equity that the target refers to, nothing is overspent: gap / (1 +- cost). Written so
        # that no branch and no division waits for the bar before, and fees do not wait for the order.
        traded = (gap - cost * abs(gap)) * scale
        commission = rates.commission * abs(traded)
        slippage = rates.slippage * abs(traded)
        left = equity - (rate * scale * abs(gap) - rate * scale * cost * gap)
        if commission < rates.minimum_commission:
            side = 1.0 if gap > 0.0 else -1.0
            commission = rates.minimum_commission
            traded = (gap - target * commission) / (1.0 + side * target * rates.slippage)
            if traded * side <= 0.0:
                # The fee alone is more than the order would move: it is not sent.
                traded = 0.0
                commission = 0.0
            slippage = rates.slippage * abs(traded)
            left = equity - commission - slippage
        if traded != 0.0:
            equity = left
            position = target * equity
            cash = equity - position
    held = position / equity
    financing = rates.financing_per_bar * (0.0 - min(cash, 0.0))
    borrow = rates.borrow_per_bar * (0.0 - min(position, 0.0))
    gain = position * asset_return
    cash, position = cash - borrow - financing, position + gain
    return Booking(cash, position, traded, held, gain, commission, slippage, financing, borrow)


@cached
@njit(inline="always", error_model="numpy")
def write_row(books: FloatArray, t: int, booked: Booking) -> None:
    """Write bar t into ``books`` (n, 9), whose columns are the fields of `Ledger`."""
    books[t, 0] = booked.cash
    books[t, 1] = booked.position
    books[t, 2] = booked.held
    books[t, 3] = booked.gain
    books[t, 4] = booked.traded
    books[t, 5] = booked.commission
    books[t, 6] = booked.slippage
    books[t, 7] = booked.financing
    books[t, 8] = booked.borrow


@cached
@njit(nogil=True, error_model="numpy")
def _run(
    held_target: FloatArray, asset_return: FloatArray, no_trade_band: float, rates: Rates, books: FloatArray
) -> None:
    """Book every bar into ``books``, whose first row holds the capital."""
    cash = books[0, 0]
    position = 0.0
    for t in range(1, held_target.shape[0]):
        before = cash + position
        wanted = held_target[t]
        if no_trade_band > 0.0 and position != 0.0:
            drifted = position / before
            wanted = drifted if abs(wanted - drifted) <= no_trade_band else wanted
        booked = book_bar(cash, position, wanted, asset_return[t], rates)
        cash = booked.cash
        position = booked.position
        write_row(books, t, booked)


def account(
    target_weight: FloatArray,
    asset_return_simple: FloatArray,
    costs: CostModel,
    *,
    apply_position_lag: bool = True,
    initial_capital: float = DEFAULT_CAPITAL,
    no_trade_band: float = 0.0,
) -> Ledger:
    """Book a whole history.

    Parameters
    ----------
    target_weight, asset_return_simple
        (n,): weights decided at the close of each bar, fractions of equity; return of each bar over the one
        before it, of which the first is not used.
    costs, initial_capital
        What trading and holding cost; money at the start, > 0.
    apply_position_lag
        False: the caller has lagged already, ``target_weight[t]`` is what is held during bar t.
    no_trade_band
        Orders that would move less than this fraction of equity are not sent and the shares drift.

    Raises
    ------
    DataError
        When lengths differ, there are no bars, or a weight or a return is not finite or out of range.
    UsageError
        When the capital or the band is out of range.
    """
    target = np.ascontiguousarray(target_weight, dtype=np.float64)
    returns = np.ascontiguousarray(asset_return_simple, dtype=np.float64)
    _check(target, returns, costs)
    if not (np.isfinite(initial_capital) and initial_capital > 0.0):
        raise UsageError(f"initial_capital must be finite and above 0, got {initial_capital!r}")
    if not (np.isfinite(no_trade_band) and no_trade_band >= 0.0):
        raise UsageError(f"no_trade_band must be finite and at least 0, got {no_trade_band!r}")
    if apply_position_lag:
        # The one lag: what was decided at the last close is held during this bar.
        target = np.concatenate([np.zeros(1), target[:-1]])
    books = new_books(len(target), float(initial_capital))
    _run(target, returns, float(no_trade_band), costs.rates(), books)
    return ledger_of(books)


def new_books(n: int, capital: float) -> FloatArray:
    """Return books (n, 9) for `write_row`, empty but for the capital."""
    books = np.zeros((len(fields(Ledger)), n)).T
    books[:1, 0] = capital
    return books


def ledger_of(books: FloatArray) -> Ledger:
    """Return filled books by name, without copying."""
    return Ledger(**{field.name: books[:, column] for column, field in enumerate(fields(Ledger))})


def _check(target: FloatArray, returns: FloatArray, costs: CostModel) -> None:
    if target.ndim != 1 or target.shape != returns.shape:
        raise DataError(
            f"target_weight has shape {target.shape} and asset_return_simple {returns.shape}; "
            "both must be (n,) with one entry per bar"
        )
    if not len(target):
        raise DataError("no bars to account for; pass at least one")
    limit = MAX_WEIGHT if costs.one_way_rate == 0.0 else min(MAX_WEIGHT, 0.5 / costs.one_way_rate)
    bad_weight = ~(np.abs(target) <= limit)
    if bad_weight.any():
        row = int(np.argmax(bad_weight))
        raise DataError(f"target_weight[{row}] is {target[row]}; must be finite and within +-{limit:g}")
    bad_return = ~(np.isfinite(returns[1:]) & (returns[1:] > -1.0))
    if bad_return.any():
        row = int(np.argmax(bad_return)) + 1
        raise DataError(
            f"asset_return_simple[{row}] is {returns[row]}; must be finite and above -1: clean the bars"
        )
