"""Judge target weights: books, trades, figures, and three benchmarks that pay the same costs.

The backtester knows positions and prices and no model. A strategy never stands alone: beside it stand buy and
hold, a constant exposure as high as the strategy's own average, and a constant exposure as volatile as the
strategy, all booked by the same `account`, after the same costs and financing. Leverage is not alpha.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from evaluation.accounting import DEFAULT_CAPITAL, MAX_WEIGHT, CostModel, Ledger, account
from evaluation.metrics import Metrics, drawdowns, forecast_metrics, ledger_metrics, trade_metrics
from utils.base import DataError, InsufficientDataError, UsageError

FloatArray = npt.NDArray[np.float64]

# Of the volatility that sorts days into regimes, and of the view that rolls over the bars.
REGIME_BARS, ROLLING_BARS = 63, 20
IN_SAMPLE_STAMP = "IN-SAMPLE"
# With a minimum commission a constant exposure would pay it every day; its shares may drift this far instead.
_BENCHMARK_BAND = 0.02
_MONEY = ("commission", "slippage", "trade_cost", "financing_cost", "borrow_cost")
_BOOKED = ("held_weight", "equity", "gross_return", "net_return", "turnover", *_MONEY)
# An order is a decision when the target moved further than this since the last one; a fraction of equity.
DECIDED = 0.02
_NEVER = np.datetime64("NaT", "us")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A constant exposure: its weight, its daily books, its figures."""

    exposure: float
    daily: pd.DataFrame
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestReport:
    """What a backtest found.

    ``daily`` holds, by session: ``target_weight`` (decided at this close), ``held_weight`` (earned in this
    bar), ``equity``, returns, ``drawdown``, costs (money), ``expected_return`` (NaN where there is none) and
    more. ``trades`` has a row per order, see `Trade`; a flip from long to short is two. ``benchmarks`` are
    ``buy_hold``, ``exposure_matched`` and ``volatility_matched``; ``out_of_sample_from`` is the first
    out-of-sample session, None when no row is known to be.
    """

    daily: pd.DataFrame
    trades: pd.DataFrame
    metrics: Metrics
    benchmarks: Mapping[str, Benchmark]
    notes: tuple[str, ...]
    costs: CostModel
    out_of_sample_from: pd.Timestamp | None

    @property
    def is_in_sample(self) -> bool:
        """True when a row counts that is not known to be out of sample."""
        return not bool(self.daily["is_out_of_sample"].all())


class Trade(NamedTuple):
    """One order: sent after the close of ``date`` at that price, booked in the bar that follows.

    ``entry_date`` is that of the order that opened the position, ``exit_date`` that of an order that reduces
    it (else NaT). ``shares`` is what was traded, >= 0; ``position`` the weight afterwards. ``pnl`` is what an
    order that reduces realised against the mean cost of the shares, after trading costs on both sides. An
    order ``is_decided`` when the target has moved by more than `DECIDED` or the no-trade band since the last
    that was, or changed its sign; others bring back what drifted or follow a small move of the target, and
    their ``reason`` alone begins with "rebalanced".
    """

    date: np.datetime64
    entry_date: np.datetime64
    exit_date: np.datetime64
    action: str
    price: float
    shares: float
    position: float
    pnl: float
    cumulative_pnl: float
    commission: float
    slippage: float
    is_decided: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvancedBacktester:
    """Books target weights under one set of costs, the same for the strategy and for every benchmark.

    Orders of the strategy that would move less than ``no_trade_band`` of its equity are not sent.
    """

    costs: CostModel
    initial_capital: float = DEFAULT_CAPITAL
    no_trade_band: float = 0.0

    def backtest_with_positions(
        self,
        dates: pd.DatetimeIndex,
        close: FloatArray,
        target_weight: FloatArray,
        *,
        apply_position_lag: bool = True,
        is_out_of_sample: npt.NDArray[np.bool_] | None = None,
        include_in_sample: bool = False,
        expected_return: FloatArray | None = None,
        horizon_bars: int | None = None,
    ) -> BacktestReport:
        """Book the weights and judge them.

        Parameters
        ----------
        dates, close, target_weight
            (n,) ascending sessions, adjusted closes, and weights decided at them, fractions of equity.
        apply_position_lag
            False when ``target_weight[t]`` is what was held during bar t already.
        is_out_of_sample, include_in_sample
            (n,) True where the forecast behind the weight had not seen the outcome, None: not known; whether
            the rows before the first such bar count as well.
        expected_return, horizon_bars
            (n,) forecasts of the simple return over the coming ``horizon_bars``, judged against the closes.

        Raises
        ------
        DataError, InsufficientDataError
            When rows make no sense, are in-sample where they must not be, or fewer than 2 count.
        """
        n, was_told = len(dates), is_out_of_sample is not None
        if expected_return is not None and (horizon_bars or 0) < 1:
            raise UsageError(f"forecasts need horizon_bars of at least 1, got {horizon_bars!r}")
        columns = {
            "close": close,
            "target_weight": target_weight,
            "is_out_of_sample": np.zeros(n, np.bool_) if is_out_of_sample is None else is_out_of_sample,
            "expected_return": np.full(n, np.nan) if expected_return is None else expected_return,
        }
        rows = _checked(pd.DatetimeIndex(dates, name="date"), columns)
        if was_told and not include_in_sample:
            rows = _drop_in_sample(rows)
        if len(rows) < 2:
            raise InsufficientDataError(f"a backtest needs 2 rows that count, has {len(rows)}")
        rows.insert(1, "asset_return", rows["close"].pct_change())
        ledger = account(
            _floats(rows["target_weight"]),
            _floats(rows["asset_return"]),
            self.costs,
            apply_position_lag=apply_position_lag,
            initial_capital=self.initial_capital,
            no_trade_band=self.no_trade_band,
        )
        return self._judge(rows, ledger, horizon_bars, was_told=was_told)

    def _judge(
        self, rows: pd.DataFrame, ledger: Ledger, horizon_bars: int | None, *, was_told: bool
    ) -> BacktestReport:
        trades = pd.DataFrame(list(_trades(rows, ledger, self.no_trade_band)), columns=list(Trade._fields))
        market = self._constant(1.0, rows)
        decided = trades["is_decided"].to_numpy(dtype=np.bool_) & trades["exit_date"].notna()
        closed = trades.loc[decided, "pnl"].to_numpy(dtype=np.float64)
        metrics = ledger_metrics(ledger, market.net_return, self.costs.periods_per_year)
        metrics |= trade_metrics(closed, len(trades))
        if horizon_bars is not None:
            came = rows["close"].shift(-horizon_bars) / rows["close"] - 1.0
            metrics |= forecast_metrics(_floats(rows["expected_return"]), _floats(came))
        return BacktestReport(
            daily=_daily(rows, ledger),
            trades=trades,
            metrics=MappingProxyType(metrics),
            benchmarks=MappingProxyType(self._benchmarks(rows, ledger, market)),
            notes=_notes(rows, ledger, was_told=was_told),
            costs=self.costs,
            out_of_sample_from=next(iter(rows.index[rows["is_out_of_sample"]]), None),
        )

    def _benchmarks(self, rows: pd.DataFrame, ledger: Ledger, market: Ledger) -> dict[str, Benchmark]:
        exposures = {
            "buy_hold": 1.0,
            "exposure_matched": float(np.clip(ledger.held_weight[1:].mean(), -MAX_WEIGHT, MAX_WEIGHT)),
            "volatility_matched": self._volatility_matched(rows, ledger, market),
        }
        found = {}
        for name, exposure in exposures.items():
            books = market if exposure == 1.0 else self._constant(exposure, rows)
            figures = MappingProxyType(ledger_metrics(books, market.net_return, self.costs.periods_per_year))
            daily = _daily(rows.assign(target_weight=exposure), books)
            found[name] = Benchmark(exposure=exposure, daily=daily, metrics=figures)
        return found

    def _volatility_matched(self, rows: pd.DataFrame, ledger: Ledger, market: Ledger) -> float:
        """Return the constant exposure whose net returns vary as the strategy's do; 0 if prices rest."""
        wanted, reached, exposure = ledger.net_return[1:].std(), market.net_return[1:].std(), 1.0
        if min(wanted, _floats(rows["asset_return"])[1:].std()) <= 1e-12:
            return 0.0
        for _ in range(4):
            # Volatility is all but proportional to exposure; costs bend it a little.
            exposure = min(float(exposure * wanted / reached), MAX_WEIGHT)
            reached = self._constant(exposure, rows).net_return[1:].std()
        return exposure

    def _constant(self, exposure: float, rows: pd.DataFrame) -> Ledger:
        return account(
            np.full(len(rows), exposure),
            _floats(rows["asset_return"]),
            self.costs,
            initial_capital=self.initial_capital,
            no_trade_band=_BENCHMARK_BAND if self.costs.minimum_commission > 0.0 else 0.0,
        )


def _checked(dates: pd.DatetimeIndex, columns: dict[str, npt.NDArray[Any]]) -> pd.DataFrame:
    """Return the columns as rows by date."""
    for name, column in columns.items():
        if len(column) != len(dates):
            raise DataError(f"{name} has {len(column)} entries for {len(dates)} dates; must be one per date")
    if not (dates.is_monotonic_increasing and dates.is_unique):
        raise DataError("dates must ascend strictly; sort them and drop doubles")
    rows = pd.DataFrame(columns, index=dates)
    prices = rows["close"]
    bad = ~(np.isfinite(prices) & (prices > 0.0))
    if bad.any():
        day = bad.idxmax()
        raise DataError(f"close of {day:%Y-%m-%d} is {prices[day]}; must be finite and above 0")
    return rows


def _floats(column: "pd.Series[float]") -> FloatArray:
    return np.asarray(column, dtype=np.float64)


def _drop_in_sample(rows: pd.DataFrame) -> pd.DataFrame:
    """Start at the first out-of-sample bar, and refuse in-sample forecasts behind it."""
    if not rows["is_out_of_sample"].any():
        raise DataError("no row is out of sample; pass include_in_sample=True to see them, stamped IN-SAMPLE")
    # A bar without a forecast cannot have peeked; without any forecasts at hand, the flags alone decide.
    forecast = np.isfinite(rows["expected_return"])
    strange = ~rows["is_out_of_sample"] & (forecast | ~forecast.any())
    strange = strange[rows["is_out_of_sample"].idxmax() :]
    if strange.any():
        raise DataError(
            f"{int(strange.sum())} in-sample rows lie behind the first out-of-sample bar, the first on "
            f"{strange.idxmax():%Y-%m-%d}; drop them or pass include_in_sample=True"
        )
    return rows.iloc[-len(strange) :].assign(is_out_of_sample=True)


def _daily(rows: pd.DataFrame, ledger: Ledger) -> pd.DataFrame:
    booked = {name: getattr(ledger, name) for name in _BOOKED} | {"drawdown": drawdowns(ledger.equity)}
    return pd.concat([rows, pd.DataFrame(booked, index=rows.index)], axis=1)


def _notes(rows: pd.DataFrame, ledger: Ledger, *, was_told: bool) -> tuple[str, ...]:
    notes = []
    if strange := int((~rows["is_out_of_sample"]).sum()):
        told = f"{strange} of {len(rows)} rows were seen in training."
        notes.append(f"{IN_SAMPLE_STAMP}: {told if was_told else 'nothing says that these rows are not.'}")
    if ledger.ruined_at is not None:
        notes.append(f"The capital was lost on {rows.index[ledger.ruined_at]:%Y-%m-%d}.")
    return (*notes, "Idle cash earns nothing, in the strategy and in every benchmark.")


class _Holding:
    """Shares and what they cost, order by order."""

    def __init__(self) -> None:
        self.shares = self.outlay = self.realised = 0.0
        self.since: np.datetime64 = _NEVER

    def trade(self, date: np.datetime64, shares: float, price: float, cost: float) -> tuple[str, str, float]:
        """Trade signed shares that do not cross zero; return action, words and what was realised."""
        if self.shares * shares >= 0.0:
            words = "added" if self.shares else "opened"
            self.since = self.since if self.shares else date
            self.shares += shares
            self.outlay += shares * price + cost
            return ("BUY" if shares > 0.0 else "SHORT"), words, 0.0
        part = -shares / self.shares
        pnl = -shares * price - cost - part * self.outlay
        self.realised += pnl
        self.shares += shares
        self.outlay *= 1.0 - part
        return ("COVER" if shares > 0.0 else "SELL"), ("reduced" if self.shares else "closed"), pnl


def _trades(rows: pd.DataFrame, ledger: Ledger, band: float) -> Iterator[Trade]:
    """Yield the orders behind the books; one that crosses zero is split, its costs by shares."""
    holding, held = _Holding(), ledger.held_weight
    dates, close = rows.index.to_numpy(), _floats(rows["close"])
    shares_at_close, meant = ledger.position_value / close, 0.0
    for row in map(int, np.flatnonzero(ledger.traded_value)):
        date, price, after = dates[row - 1], float(close[row - 1]), float(shares_at_close[row])
        moved = abs(held[row] - meant) > max(band, DECIDED) or np.sign(held[row]) != np.sign(meant)
        meant = held[row] if moved else meant
        parts = [-holding.shares, after] if holding.shares * after < 0.0 else [after - holding.shares]
        fees = np.array([ledger.commission[row], ledger.slippage[row]]) / sum(map(abs, parts))
        for shares in parts:
            commission, slippage = (float(fee) for fee in fees * abs(shares))
            action, words, pnl = holding.trade(date, shares, price, commission + slippage)
            yield Trade(
                date,
                holding.since,
                date if action in {"SELL", "COVER"} else _NEVER,
                action,
                price,
                abs(shares),
                float(held[row]) if holding.shares else 0.0,
                pnl,
                holding.realised,
                commission,
                slippage,
                bool(moved),
                f"{words if moved else 'rebalanced'}, weight {held[row]:.2f}",
            )


def net_returns(result: BacktestReport) -> pd.DataFrame:
    """Return net returns by session: ``strategy`` and every benchmark."""
    rivals = {name: item.daily["net_return"] for name, item in result.benchmarks.items()}
    return pd.DataFrame({"strategy": result.daily["net_return"], **rivals})


def by_year(result: BacktestReport) -> list[dict[str, object]]:
    """Return one record a calendar year: returns by name, ``deepest``, ``exposure`` and ``turnover``."""
    net, daily = net_returns(result), result.daily
    years = pd.DatetimeIndex(net.index).year
    growth, held = (1.0 + net).groupby(years).cumprod(), daily.groupby(years)
    peak = growth["strategy"].groupby(years).cummax().clip(lower=1.0)
    table = (growth.groupby(years).last() - 1.0).assign(
        deepest=(growth["strategy"] / peak).groupby(years).min() - 1.0,
        exposure=held["held_weight"].mean(),
        turnover=held["turnover"].sum(),
    )
    return _records(table, held.size())


def by_regime(result: BacktestReport) -> list[dict[str, object]]:
    """Return mean net returns, annualised, in thirds of days by the share's volatility before each day.

    Empty when there are too few days for the volatility of `REGIME_BARS` and three groups of `REGIME_BARS`.
    """
    if len(result.daily) < 4 * REGIME_BARS:
        return []
    # A regime must be known before the day that is counted to it.
    volatility = result.daily["asset_return"].rolling(REGIME_BARS).std().shift(1)
    thirds = pd.qcut(volatility.rank(method="first"), 3, labels=["Calm", "Middle", "Stormy"])
    groups = net_returns(result).groupby(thirds, observed=True)
    return _records(groups.mean() * result.costs.periods_per_year, groups.size())


def _records(table: pd.DataFrame, n_bars: "pd.Series[int]") -> list[dict[str, object]]:
    """Return one record a row, under its name and the number of bars behind it."""
    table.insert(0, "n_bars", n_bars)
    table.insert(0, "period", table.index.astype(str))
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def by_bar(result: BacktestReport) -> pd.DataFrame:
    """Return each session's books beside buy and hold, and what the last `ROLLING_BARS` show, annualised.

    ``rolling_sharpe`` is 0 until there are as many returns, and where they do not vary.
    """
    daily, market, year = result.daily, result.benchmarks["buy_hold"].daily, result.costs.periods_per_year
    # Nothing is earned in the first row.
    net, active = daily["net_return"].iloc[1:], (daily["net_return"] - market["net_return"]).iloc[1:]
    mean, spread = net.rolling(ROLLING_BARS).mean(), net.rolling(ROLLING_BARS).std()
    own = {"held_weight": "position", "net_return": "strategy_return"}
    view = daily[["equity", "drawdown", *own]].rename(columns=own)
    return view.assign(
        buy_hold_equity=market["equity"],
        buy_hold_return=market["net_return"],
        rolling_sharpe=(mean / spread).where(spread > 1e-9) * np.sqrt(year),
        rolling_alpha=active.rolling(ROLLING_BARS).mean() * year,
    ).fillna(0.0)


def by_month(result: BacktestReport) -> pd.DataFrame:
    """Return net returns by calendar month (``2026-11``): strategy, buy and hold, and the difference."""
    net = net_returns(result)[["strategy", "buy_hold"]].add_suffix("_return")
    grown = (1.0 + net).groupby(pd.DatetimeIndex(net.index).strftime("%Y-%m")).prod() - 1.0
    return grown.assign(alpha=grown["strategy_return"] - grown["buy_hold_return"])


def by_action(result: BacktestReport) -> pd.DataFrame:
    """Return orders by action: how many, and what those that closed realised, money.

    Orders that were not decided are REBALANCE, whatever their side: they count to no win rate.
    """
    trades, decided = result.trades, result.trades["is_decided"].astype(bool)
    named = trades.assign(action=trades["action"].where(decided, "REBALANCE"))
    rows = named.assign(won=decided & (trades["pnl"] > 0.0)).groupby("action")
    profit = {"avg_pnl": ("pnl", "mean"), "total_pnl": ("pnl", "sum")}
    return rows.agg(count=("pnl", "size"), win_rate=("won", "mean"), **profit)
