"""Live history again: bar by bar as it would have been, in other orders, in other windows, at other costs.

- Bar by bar, the slow oracle of the vectorised backtest: at bar t the simulator holds bars to t only and asks
for
  one weight, so that nobody can peek. It keeps its own books, one `book_bar` at a time.
- Block bootstrap: daily returns of the strategy and of buy and hold are drawn together, in circular blocks of
  `BLOCK_BARS` (Politis, Romano 1992), so that storms stay storms. Percentile intervals of the draws know
  nothing of days that never happened.
- Grid of scenarios: windows x costs x seeds. Seed 0 is history as it was; any other is the joint history of
  forecasts and returns of the window, put together from blocks in a drawn order, sized and booked anew. A
  seed is no new training and no other random state of the model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from evaluation.accounting import DEFAULT_CAPITAL, Booking, CostModel, Ledger, account, book_bar
from evaluation.metrics import Metrics, band_crps, cagr, max_drawdown, reasons, sharpe, values
from utils.base import DataError, InsufficientDataError, UsageError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_COSTS = ("trade_cost", "financing_cost", "borrow_cost")

Decide = Callable[[pd.DataFrame], float]
"""Takes bars up to and including the last closed one, returns the target weight decided at that close."""

Refit = Callable[[pd.DataFrame], Decide]
"""Takes the same bars, returns the decision rule learnt from them."""

Book = Callable[[IntArray, int, CostModel], tuple[Ledger, Ledger]]
"""Rows of history in an order, how many of the first only lead in, costs: books of strategy, buy and hold."""

BLOCK_BARS = 63
RESAMPLES = 2_000
CONFIDENCE = 0.9
_TAILS = [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0]
MIN_BARS = 126
QUARTERS = 4
COST_MULTIPLES = (0.0, 1.0, 2.0, 4.0)
GRID_SEEDS = 20
_TINY, _LEAST_VARIANCE = 1e-12, 1e-18
_MOMENTS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSimulator:
    """Lives through the last bars of a history, at these costs."""

    costs: CostModel
    initial_capital: float = DEFAULT_CAPITAL

    def run(
        self,
        bars: pd.DataFrame,
        decide: Decide,
        *,
        days: int | None = None,
        refit: Refit | None = None,
        refit_every_bars: int | None = None,
    ) -> pd.DataFrame:
        """Reveal one bar after the other.

        Parameters
        ----------
        bars, days
            Sessions with a ``Close`` column, cut at the present when handed on; how many are lived through
            after the first decision, None for all.
        decide
            Asked at every close, with the bars up to it.
        refit, refit_every_bars
            Learn the decision rule anew every so many bars, from the bars known then; both or neither.

        Returns
        -------
        DataFrame
            By session: close, ``target_weight`` (decided at this close), books and costs of the bar.

        Raises
        ------
        InsufficientDataError
            When there are fewer than 2 bars, or fewer than ``days`` after the first.
        DataError
            When a decision is not a finite number, or only one of the refit arguments is given.
        """
        wanted = len(bars) - 1 if days is None else days
        if not 1 <= wanted < len(bars):
            need = max(wanted, 1) + 1
            raise InsufficientDataError(f"living through {wanted} bars needs {need} of them, has {len(bars)}")
        start, every = len(bars) - wanted - 1, refit_every_bars
        if (refit is None) != (every is None) or (every is not None and every < 1):
            raise DataError(f"refitting needs a function and an interval above 0, got {every!r}")
        rates, rows = self.costs.rates(), []
        cash, position, target, last_close = self.initial_capital, 0.0, 0.0, np.nan
        for t in range(start, len(bars)):
            known = bars.iloc[: t + 1]
            close = float(known["Close"].iloc[-1])
            before = cash + position
            # Nothing is held into the first bar: it only gives the first decision its close.
            own = close / last_close - 1.0 if t > start else 0.0
            booked = book_bar(cash, position, target, own, rates)
            cash, position, last_close = booked.cash, booked.position, close
            if refit is not None and every and t > start and (t - start) % every == 0:
                decide = refit(known)
            target = float(decide(known))
            if not np.isfinite(target):
                raise DataError(f"the decision of {bars.index[t]} is {target}; must be a finite weight")
            rows.append(_lived(booked, before, close=close, target_weight=target))
        return pd.DataFrame(rows, index=bars.index[start:])


def largest_gap(lived: pd.DataFrame, ledger: Ledger) -> float:
    """Return how far a life as lived is from books of the same bars: the largest difference of any entry.

    Money is measured in initial capitals or, where more, in what the books say.
    """
    gap = 0.0
    for name in ("held_weight", "equity", "net_return", *_COSTS):
        told = np.asarray(getattr(ledger, name), dtype=np.float64)
        unit = ledger.initial_capital if name in {"equity", *_COSTS} else 1.0
        apart = np.abs(np.asarray(lived[name], dtype=np.float64) - told) / np.maximum(np.abs(told), unit)
        gap = max(gap, float(apart.max()))
    return gap


def gap_to_books(lived: pd.DataFrame, judged: pd.DataFrame, costs: CostModel, capital: float) -> float:
    """Return how far days that were lived bar by bar lie from the books of all their decisions at once."""
    rows = judged.loc[lived.index]
    target, moves = (np.asarray(rows[name], dtype=np.float64) for name in ("target_weight", "asset_return"))
    booked = account(target, np.nan_to_num(moves), costs, initial_capital=capital)
    return max(largest_gap(lived, booked), float(np.abs(np.asarray(lived["target_weight"]) - target).max()))


def _lived(booked: Booking, before: float, *, close: float, target_weight: float) -> dict[str, float]:
    """Return the row of a bar that began with equity ``before``."""
    equity = booked.cash + booked.position
    return {
        "close": close,
        "target_weight": target_weight,
        "held_weight": booked.held,
        "equity": equity,
        "net_return": (equity - before) / before if before > 0.0 else 0.0,
        "trade_cost": booked.commission + booked.slippage,
        "financing_cost": booked.financing,
        "borrow_cost": booked.borrow,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its interval and the share of draws above zero; or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    share_above_zero: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One cell of the grid: where, at what cost, which draw, and what came of it.

    ``cost_multiple`` scales commission and slippage; financing and borrow fee stay. None is undefined.
    """

    window: str
    start: str
    end: str
    cost_multiple: float
    seed: int
    sharpe: float | None
    buy_hold_sharpe: float | None
    cagr: float | None
    buy_hold_cagr: float | None
    max_drawdown: float | None
    buy_hold_max_drawdown: float | None

    @property
    def sharpe_difference(self) -> float | None:
        """Sharpe ratio of the strategy less that of buy and hold."""
        if self.sharpe is None or self.buy_hold_sharpe is None:
            return None
        return self.sharpe - self.buy_hold_sharpe


def block_rows(n_rows: int, *, block_bars: int, seed: int) -> IntArray:
    """Return (n_rows,) positions: circular blocks of consecutive rows in a drawn order, the last one cut."""
    if n_rows < 1 or block_bars < 1:
        raise UsageError(f"{n_rows} rows in blocks of {block_bars}: both must be at least 1")
    starts = np.random.default_rng(seed).integers(n_rows, size=-(-n_rows // block_bars))
    return np.asarray((starts[:, None] + np.arange(block_bars)).ravel()[:n_rows] % n_rows, dtype=np.intp)


def bootstrap_intervals(
    net: FloatArray, market: FloatArray, periods_per_year: int, *, seed: int = 0
) -> dict[str, Interval]:
    """Measure the strategy against buy and hold, with block-bootstrap intervals of `CONFIDENCE`.

    ``net`` and ``market`` (n,) are simple returns after costs, > -1, without the first row, which earns
    nothing. Returned are ``sharpe_ratio``, ``sharpe_difference``, ``cagr_difference`` and ``alpha`` (Jensen,
    a year).
    """
    names = ("sharpe_ratio", "sharpe_difference", "cagr_difference", "alpha")
    if net.shape != market.shape:
        raise DataError(f"net has shape {net.shape} and market {market.shape}; must be equal")
    why = f"needs {MIN_BARS} returns, has {len(net)}" if len(net) < MIN_BARS else None
    if why is None and min(net.min(), market.min()) <= -1.0:
        why = "the capital was lost"
    if why is not None:
        return dict.fromkeys(names, Interval(value=None, reason=why))
    moments = _moments(net, market)
    found = _figures(moments.sum(axis=0, keepdims=True), len(net), periods_per_year)
    drawn = _figures(*_drawn_sums(moments, seed), periods_per_year)
    return {name: _interval(float(found[name][0]), drawn[name]) for name in names}


def _moments(net: FloatArray, market: FloatArray) -> FloatArray:
    """Return what all figures are made from, (n, 7): their sums over blocks are all that a draw needs."""
    logs = np.log1p(net), np.log1p(market)
    return np.column_stack([net, market, net**2, market**2, net * market, *logs])


def _drawn_sums(moments: FloatArray, seed: int) -> tuple[FloatArray, int]:
    """Return sums over resampled rows, (`RESAMPLES`, 7), and how many rows one resample has."""
    n = len(moments)
    block = min(BLOCK_BARS, n // 2)
    total = np.concatenate(
        [np.zeros((1, _MOMENTS)), np.cumsum(np.vstack([moments, moments[:block]]), axis=0)]
    )
    of_block = total[block : block + n] - total[:n]
    starts = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n // block))
    sums = np.zeros((RESAMPLES, _MOMENTS))
    for column in starts.T:
        sums += of_block[column]
    return sums, block * (n // block)


def _figures(sums: FloatArray, n: int, periods: int) -> dict[str, FloatArray]:
    """Return each figure for each row of sums; NaN where it is undefined."""
    x, y, xx, yy, xy, log_x, log_y = (sums / n).T

    # What is left of the difference of equal sums is rounding, not a variance.
    variances = (np.where(v > _LEAST_VARIANCE, v, np.nan) for v in (xx - x**2, yy - y**2))
    own_variance, other_variance = variances
    yearly = np.sqrt(periods * (n - 1) / n)
    own, other = yearly * x / np.sqrt(own_variance), yearly * y / np.sqrt(other_variance)
    beta = (xy - x * y) / other_variance
    return {
        "sharpe_ratio": own,
        "sharpe_difference": own - other,
        "cagr_difference": np.expm1(log_x * periods) - np.expm1(log_y * periods),
        "alpha": (x - beta * y) * periods,
    }


def _interval(value: float, drawn: FloatArray) -> Interval:
    if not (np.isfinite(value) and np.isfinite(drawn).all()):
        return Interval(value=None, reason="returns do not vary")
    # Where the strategy holds what buy and hold holds, differences are rounding.
    drawn = np.where(np.abs(drawn) <= _TINY, 0.0, drawn)
    low, high = np.quantile(drawn, _TAILS)
    return Interval(
        value=value, low=float(low), high=float(high), share_above_zero=float(np.mean(drawn > 0.0))
    )


def robustness_grid(
    book: Book, dates: pd.DatetimeIndex, first: int, costs: CostModel, *, seeds: int
) -> tuple[Scenario, ...]:
    """Book every window under every cost, as it was and in ``seeds`` resamples.

    ``dates`` (n,) are those of the whole history; the judged window starts at row ``first`` and ends with it,
    rows before it only lead in, since a sizer remembers. ``costs`` are charged at multiple 1. Returned are
    the whole window and its four quarters, those of `MIN_BARS` rows at least.
    """
    if seeds < 0:
        raise UsageError(f"seeds must be at least 0, got {seeds}")
    edges = np.linspace(first, len(dates), QUARTERS + 1).astype(int)
    windows = [("whole", first, len(dates))]
    windows += [(f"quarter {i + 1}", int(edges[i]), int(edges[i + 1])) for i in range(QUARTERS)]
    # No broker charges a tenth of an order; such a multiple is left out.
    times = [m for m in COST_MULTIPLES if costs.one_way_rate * m < 0.1]
    fees = {name: getattr(costs, name) for name in ("commission_bps", "slippage_bps")}
    charged = [(m, replace(costs, **{name: fee * m for name, fee in fees.items()})) for m in times]
    return tuple(
        _scenario(book, dates, window, cost, seed)
        for window in windows
        if window[2] - window[1] >= MIN_BARS
        for cost in charged
        for seed in range(seeds + 1)
    )


def _scenario(
    book: Book,
    dates: pd.DatetimeIndex,
    window: tuple[str, int, int],
    charged: tuple[float, CostModel],
    seed: int,
) -> Scenario:
    (name, start, stop), (multiple, costs) = window, charged
    if seed:
        rows, lead = start + block_rows(stop - start, block_bars=BLOCK_BARS, seed=seed), 0
    else:
        rows, lead = np.arange(stop), start
    own, market = book(rows, lead, costs)
    year = costs.periods_per_year
    return Scenario(
        window=name,
        start=f"{dates[start]:%Y-%m-%d}",
        end=f"{dates[stop - 1]:%Y-%m-%d}",
        cost_multiple=multiple,
        seed=seed,
        sharpe=sharpe(own.net_return[1:], year).value,
        buy_hold_sharpe=sharpe(market.net_return[1:], year).value,
        cagr=cagr(own.equity, year).value,
        buy_hold_cagr=cagr(market.equity, year).value,
        max_drawdown=max_drawdown(own.equity).value,
        buy_hold_max_drawdown=max_drawdown(market.equity).value,
    )


def summarise(scenarios: Iterable[Scenario]) -> list[dict[str, Any]]:
    """Return one record for each window and cost: as it was, and how the resamples spread.

    ``low`` and ``high`` hold `CONFIDENCE` of the resamples, of which ``share_better`` beat buy and hold; None
    without any. ``all_same``: the strategy always held what buy and hold holds.
    """
    cells: dict[tuple[str, float], list[Scenario]] = {}
    for scenario in scenarios:
        cells.setdefault((scenario.window, scenario.cost_multiple), []).append(scenario)
    return [_summary(group) for group in cells.values()]


def _summary(group: Sequence[Scenario]) -> dict[str, Any]:
    was = group[0]
    known = np.array([d for each in group if (d := each.sharpe_difference) is not None])
    drawn = known[1:] if was.sharpe_difference is not None else known
    low, high = np.quantile(drawn, _TAILS).tolist() if len(drawn) else (None, None)
    plain = ("window", "start", "end", "cost_multiple", "sharpe", "buy_hold_sharpe", "sharpe_difference")
    return {
        **{name: getattr(was, name) for name in plain},
        "low": low,
        "high": high,
        "all_same": len(known) == len(group) and bool(np.abs(known).max() <= _TINY),
        "share_better": float(np.mean(drawn > _TINY)) if len(drawn) else None,
        "seeds": len(group) - 1,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What stands beside a headline: figures by name, intervals by name, the grid of scenarios."""

    figures: Metrics
    intervals: Mapping[str, Interval]
    scenarios: tuple[Scenario, ...]

    @property
    def seeds(self) -> int:
        """Number of resamples in the grid beside history as it was."""
        return max((scenario.seed for scenario in self.scenarios), default=0)

    def plain(self) -> dict[str, object]:
        """Return all of it as plain data, None where undefined, with the reasons."""
        spans = {name: asdict(interval) for name, interval in self.intervals.items()}
        why = {"undefined": reasons(self.figures)}
        return {**values(self.figures), **why, "intervals": spans, "robustness": summarise(self.scenarios)}


def forecast_outcome(
    close: FloatArray, band: tuple[float, float, float], position: float, costs: CostModel
) -> dict[str, float | bool | None]:
    """Set a forecast beside what came, by name; ``close`` runs from its bar to its target bar, both included.

    ``band`` is the median of the simple return between the two, and the edges of its 80 % band; ``position``
    is entered from cash at the first close. Directions are None where the price did not move.
    """
    median, lower, upper = band
    moves = np.concatenate([[0.0], close[1:] / close[:-1] - 1.0])
    realised = float(close[-1] / close[0] - 1.0)
    # The books lag by themselves: what is decided at the first close earns from the second on.
    own, hold = (account(np.full(len(close), w), moves, costs).equity for w in (position, 1.0))
    return {
        "realised_return": realised,
        "direction_hit": None if realised == 0.0 else (median > 0.0) == (realised > 0.0),
        "always_up_hit": None if realised == 0.0 else realised > 0.0,
        "band_hit": lower <= realised <= upper,
        "crps": band_crps(float(np.log1p(realised)), *np.log1p([median, lower, upper]).tolist()),
        "position_return": float(own[-1] / own[0] - 1.0),
        "hold_return": float(hold[-1] / hold[0] - 1.0),
    }
