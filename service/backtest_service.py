"""One backtest from request to evidence: load, decide, book, weigh, and tell.

The command line calls `backtest`. The page sends a prediction back, which `posted_backtest` and
`posted_forward_sim` check row by row and book like any other. Nothing in here prints or writes.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pydantic.alias_generators import to_camel

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, fetch_stock_data
from data.schema import Bars, bars_hash
from evaluation import forward_simulator as simulator
from evaluation.accounting import DEFAULT_CAPITAL, CostModel, Ledger, account
from evaluation.advanced_backtester import AdvancedBacktester, BacktestReport, by_action, by_bar, by_month
from evaluation.charts import Report
from evaluation.forward_simulator import Book, Evidence, ForwardSimulator, IntArray
from evaluation.metrics import Measured, calibration_metrics, values
from evaluation.report import backtest_report, luck_section, provenance_of
from inference import position_sizing as sizes
from inference.ensemble import Chosen
from inference.pipeline import Decisions, backtest_decisions, decide
from service import schemas as wire
from service.prediction_chart import days_of, records, wire_metrics
from utils.base import AIStocksError, DataError, UsageError
from validation import gates
from validation.wfe_metrics import verdicts_on

MODE = "gbm_only"
MODELS = {"gbm_only": "boosted trees", "lstm_only": "LSTM", "ensemble": "boosted trees and LSTM"}
# Bar by bar and all at once must agree to rounding.
SAME = 1e-12
SIZED_BY = ("expected_return", "baseline_return", "sigma", "p_win", "payoff_ratio", "skill_lower")
# What a posted prediction may hold, by its name on the wire; the wire itself refuses what is not finite.
MIN_ROWS, MAX_PRICE_RATIO, MAX_MONEY = 10, 1e9, 1e100
BOUNDS = {"prices": (1e-9, 1e12), "fusedPositions": (-1e3, 1e3), "predictedReturns": (-1.0, 1e6)}
BOUNDS |= {"predictedPrices": (0.0, 1e18), "actualReturns": (-1.0, 1e9)}
# Bars a year, the last of what trades every day.
LEAST_BARS, MOST_BARS, EVERY_DAY = 252, 366, 365
UNBELIEVED = "annualizationFactor {:g} is not believed: daily bars are 252 to 366 a year"
UNTRIED = "dates, prices and positions are those that were posted, and checked against no model and no source"
NIL = "no skill was found ({}), and {} bets without asking for any: count the model's part as nil; what you "
NIL += "see is leverage and the breaker"
HELD = "the position was {:.1%} of equity on average: buy and hold at that exposure earned {:+.1%} after "
HELD += "the same costs, the positions {:+.1%}, a difference of {:+.1%}; excessReturnPct, alpha and "
HELD += "rollingAlpha stand against an exposure of 100%, and hold what the other exposure makes"
# Where nothing is left these say nothing, or good of what was lost.
OF_THE_LIVING = ("sharpe_ratio", "sortino_ratio", "calmar_ratio")
# From here on, a commission is in basis points.
BPS_FROM, FORWARD_ROWS = 0.05, 20
BORROWED = ("financing_cost", "borrow_cost")
RISKS = {name: name for name in ("exposure_mean", "exposure_std")}
RISKS |= {"tail_loss_p95": "var_95", "cvar95": "cvar_95"}
CSV = ["close", "target_weight", "held_weight", "net_return", "equity", "drawdown", "trade_cost"]
WIRE_NAMES = {"cumulative_return": "total_return", "directional_accuracy": "direction_accuracy"}
WIRE_NAMES |= {"correlation": "information_coefficient", "transaction_costs": "total_transaction_costs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestRequest:
    """What a person may choose; limits not given are the preset's, days all out of sample.

    ``include_in_sample`` also counts rows that the model was trained on, stamped as such; ``seeds`` are the
    resamples of every scenario.
    """

    start: datetime | None = None
    end: datetime | None = None
    sizing: str = sizes.DEFAULT_SIZING
    max_long: float | None = None
    max_short: float | None = None
    costs: CostModel = field(default_factory=CostModel)
    capital: float = DEFAULT_CAPITAL
    include_in_sample: bool = False
    seeds: int = 0

    @property
    def sizer(self) -> sizes.RuleSizer:
        """The sizer that was asked for."""
        return sizes.make_sizer(self.sizing, max_long=self.max_long, max_short=self.max_short)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A backtest, and all that it was made from; ``history`` are the decisions from the first bar on."""

    request: BacktestRequest
    result: BacktestReport
    history: Decisions
    bundle: Chosen
    bars: Bars
    evidence: Evidence

    @property
    def forecasts(self) -> pd.DataFrame:
        """The decisions of the judged rows."""
        return self.history.frame.loc[self.result.daily.index]


class Lived(NamedTuple):
    """Days as lived bar by bar, and how far they lie from the books of all bars at once."""

    days: pd.DataFrame
    gap: float


def backtest(
    bundle: Chosen,
    source: BarSource,
    cache: BarCache | None,
    request: BacktestRequest,
    trials: Path | None = None,
) -> Outcome:
    """Decide on every bar, book the window that was asked for, and weigh what came.

    ``trials`` is the log of verdicts; without it those count that were known when the model was judged.
    Raises `DataError` when no row of the window is out of sample, and in-sample ones were not asked for.
    """
    symbol, sizer, costs = bundle.symbol, request.sizer, request.costs
    bars = fetch_stock_data(symbol, source=source, cache=cache)
    # What is decided does not depend on the window: the window is cut from the decisions on all bars.
    history = decide(symbol, bars.frame, bundle.forecaster, sizer, costs=costs)
    history = replace(history, frame=history.frame.loc[: request.end])
    window = replace(history, frame=history.frame.loc[request.start :])
    if window.frame.empty or (window.out_of_sample_from is None and not request.include_in_sample):
        raise DataError(
            f"no out-of-sample row lies in that window: the model of {symbol} is out of sample from "
            f"{bundle.metadata['out_of_sample_from']} to {bars.frame.index[-1]:%Y-%m-%d}; --in-sample shows "
            f"earlier rows, stamped as such{''.join('; ' + text for text in history.findings)}"
        )
    result = backtest_decisions(
        window, costs, initial_capital=request.capital, include_in_sample=request.include_in_sample
    )
    verdicts = verdicts_on(bundle.metadata, trials)
    evidence = weigh(result, history, request, n_tries=verdicts * len(sizes.PRESETS))
    return Outcome(
        request=request, result=result, history=history, bundle=bundle, bars=bars, evidence=evidence
    )


def bookkeeper(history: Decisions, sizer: sizes.RuleSizer, capital: float) -> Book:
    """Return what sizes and books rows of the history in any order, see `Book`."""
    columns = {name: np.asarray(history.frame[name], dtype=np.float64) for name in SIZED_BY}
    columns["asset_return_simple"] = history.frame["asset_return"].fillna(0.0).to_numpy()

    def book(rows: IntArray, lead: int, costs: CostModel) -> tuple[Ledger, Ledger]:
        known = {name: column[rows] for name, column in columns.items()}
        inputs = sizes.SizingInputs(**known, horizon_bars=history.horizon_bars)
        target, own = sizer.fold(inputs, costs)[lead:], inputs.asset_return_simple[lead:]
        market = account(np.ones(len(own)), own, costs, initial_capital=capital)
        return account(target, own, costs, initial_capital=capital), market

    return book


def weigh(result: BacktestReport, history: Decisions, request: BacktestRequest, *, n_tries: int) -> Evidence:
    """Put beside a backtest what it may owe to luck, to choice, and to its window and costs.

    The rows of ``result`` are the last ones of ``history``; ``n_tries`` is how many results there were to
    choose from.
    """
    dates, costs = pd.DatetimeIndex(history.frame.index), result.costs
    first = len(dates) - len(result.daily)
    rivals = (result.benchmarks[name].daily for name in ("buy_hold", "exposure_matched"))
    net, market, same = (
        np.asarray(daily["net_return"], dtype=np.float64)[1:] for daily in (result.daily, *rivals)
    )
    shape = history.frame, history.horizon_bars, costs, len(result.daily)
    tried = sizes.alternative_returns(*shape, initial_capital=request.capital)
    figures = {
        "n_tries": Measured(n_tries),
        "deflated_sharpe": gates.measured_deflated_sharpe(net, n_tries),
        "deflated_sharpe_active": gates.measured_deflated_sharpe(net - same, n_tries),
        "minimum_track_record_bars": gates.measured_track_record(net),
        "pbo": gates.measured_overfitting(np.column_stack([net, tried[1:]])),
        "out_of_sample_share": Measured(float(result.daily["is_out_of_sample"].mean())),
        **_calibration(history.frame.iloc[first:], history.horizon_bars),
    }
    own = bookkeeper(history, request.sizer, request.capital)
    over_hold, over_same = (
        simulator.bootstrap_intervals(net, rival, costs.periods_per_year) for rival in (market, same)
    )
    return Evidence(
        figures=figures,
        intervals={"active_return": over_same["cagr_difference"], **over_hold},
        scenarios=simulator.robustness_grid(own, dates, first, costs, seeds=request.seeds),
    )


def _calibration(forecasts: pd.DataFrame, horizon_bars: int) -> dict[str, Measured]:
    came = forecasts["close"].shift(-horizon_bars) / forecasts["close"] - 1.0
    lower, upper, rises = (np.asarray(forecasts[c], dtype=np.float64) for c in ("lower", "upper", "prob_up"))
    years = pd.DatetimeIndex(forecasts.index).year.to_numpy()
    return calibration_metrics(np.asarray(came, dtype=np.float64), (lower, upper), rises, years)


def live(outcome: Outcome, days: int) -> Lived:
    """Live through the last days of the window again, bar by bar.

    Raises `UsageError` when it has fewer, and `AIStocksError` when the backtest was not lived like that.
    """
    request, judged = outcome.request, outcome.result.daily
    if not 1 <= days < len(judged):
        raise UsageError(f"--days must be 1 to {len(judged) - 1}, the window less its first row, got {days}")
    bundle, sizer, costs, capital = outcome.bundle, request.sizer, request.costs, request.capital

    def decided(known: pd.DataFrame) -> float:
        now = decide(bundle.symbol, known, bundle.forecaster, sizer, costs=costs)
        return float(now.frame["target_weight"].iloc[-1])

    known = outcome.bars.frame.loc[: judged.index[-1]]
    lived = ForwardSimulator(costs=costs, initial_capital=capital).run(known, decided, days=days)
    gap = simulator.gap_to_books(lived, judged, costs, capital)
    if not gap <= SAME:
        words = f"bar by bar differs from all bars at once by {gap:.3g}: some row knew more than it may"
        raise AIStocksError(words)
    return Lived(lived, gap)


def notes_of(outcome: Outcome) -> list[str]:
    """Return what must be known beside the figures, in words."""
    trained, judged = outcome.bundle.metadata, outcome.bars.provenance.source
    findings = replace(outcome.history, frame=outcome.forecasts).findings
    notes = [*outcome.result.notes, *outcome.bundle.notes, *outcome.bars.report.problems(), *findings]
    if trained["source"] != judged:
        notes.append(
            f"the model was trained and judged on {trained['source']} prices through "
            f"{trained['trained_through']}; these are {judged} prices, on which no verdict was earned"
        )
    label = trained["verdict"]["label"]
    if label != "edge" and outcome.request.sizer.rules.uses_odds:
        notes.append(NIL.format(label, outcome.request.sizing))
    exposure = values(outcome.result.metrics)
    if exposure["exposure_std"] == 0.0 and exposure["exposure_mean"] == 1.0:
        notes.append("the model's part of the position was nil: the strategy held what buy and hold holds")
    return notes


def report_of(outcome: Outcome) -> Report:
    """Return the report of one backtest."""
    bars = outcome.bars
    facts = {
        "Judged on": f"{bars.provenance.source}, last session {bars.provenance.last_session:%Y-%m-%d}",
        "Judged on, sha256": bars_hash(bars.frame),
        "Sizing": outcome.history.sizing_id,
        "Models": f"{MODELS[outcome.bundle.mode]} ({outcome.bundle.mode})",
    }
    return backtest_report(
        outcome.result,
        symbol=outcome.bundle.symbol,
        provenance={**provenance_of(outcome.bundle.metadata), **facts},
        verdict=outcome.bundle.metadata["verdict"],
        forecasts=outcome.forecasts,
        horizon_bars=outcome.history.horizon_bars,
        notes=notes_of(outcome)[len(outcome.result.notes) :],
        asks_for_skill=not outcome.request.sizer.rules.uses_odds,
        extra_sections=(luck_section(outcome.evidence),),
    )


class Posted(NamedTuple):
    """A posted prediction's books, its orders (see `orders_of`) and figures, and what must be known."""

    result: BacktestReport
    orders: pd.DataFrame
    metrics: wire.BacktestMetrics
    notes: list[str]


def posted_rows(prediction: wire.PredictionResult) -> pd.DataFrame:
    """Return the history of a prediction that came over the wire, by session; nothing of it is believed.

    Raises `DataError` when the number of rows, or the lengths, order or size of its numbers make no sense.
    """
    days, likely = prediction.dates, prediction.classifier_probabilities
    zeros, even = [0.0] * len(days), [0.5] * len(days)
    columns = {
        "prices": prediction.prices,
        "fusedPositions": prediction.fused_positions,
        "predictedReturns": prediction.predicted_returns,
        "predictedPrices": prediction.predicted_prices,
        "actualReturns": zeros if prediction.actual_returns is None else prediction.actual_returns,
        # None were sent: as likely to rise as to fall.
        "buy": [each.buy for each in likely] or even,
        "sell": [each.sell for each in likely] or even,
    }
    if not MIN_ROWS <= len(days) <= wire.MAX_CHART_BARS:
        raise DataError(f"the prediction has {len(days)} dates: send {MIN_ROWS} to {wire.MAX_CHART_BARS}")
    for name, column in columns.items():
        if len(column) != len(days):
            raise DataError(f"{name} has {len(column)} entries for {len(days)} dates: send one per date")
        low, high = BOUNDS.get(name, (0.0, 1.0))
        if not (low <= min(column) and max(column) <= high):
            raise DataError(f"{name} lie from {min(column):g} to {max(column):g}: send {low:g} to {high:g}")
    if max(prediction.prices) > MAX_PRICE_RATIO * min(prediction.prices):
        raise DataError(f"the highest price is more than {MAX_PRICE_RATIO:g} times the lowest")
    return pd.DataFrame(columns, index=sessions_of(days))


def sessions_of(days: list[str]) -> pd.DatetimeIndex:
    """Return days of the wire; raises `DataError` when they are none, or do not ascend."""
    if not (min(days) >= "1900" and max(days) < "2200"):
        raise DataError("dates must lie from 1900 to 2199")
    try:
        index = pd.DatetimeIndex(np.array(days, dtype="datetime64[D]"))
    except ValueError as error:
        raise DataError("dates hold a day that does not exist") from error
    if not (index.is_monotonic_increasing and index.is_unique):
        raise DataError("dates must ascend strictly: sort them and drop doubles")
    return index


def posted_costs(params: wire.BacktestParams, told: float | None, *, sessions: int = LEAST_BARS) -> CostModel:
    """Return the costs that were asked for; borrowing goes by ``sessions`` a year alone.

    Figures are annualised by what the caller, then the prediction (``told``), says and can be believed.
    """
    said = [bars for bars in (params.annualization_factor, told) if LEAST_BARS <= (bars or 0.0) <= MOST_BARS]
    per_year, usual = round(said[0] or 0.0) if said else sessions, CostModel()

    def bps(explicit: float | None, either: float) -> float:
        return explicit if explicit is not None else either if either >= BPS_FROM else round(either * 1e4, 9)

    return CostModel(
        commission_bps=bps(params.commission_bps, params.commission),
        slippage_bps=bps(params.slippage_bps, params.slippage),
        financing_annual=usual.financing_annual * (per_year / sessions),
        borrow_annual=usual.borrow_annual * (per_year / sessions),
        periods_per_year=per_year,
    )


def judge_posted(request: wire.BacktestRequest, n_rows: int) -> Posted:
    """Book the last ``n_rows`` of a posted prediction that its model, as it says, had not seen."""
    prediction, params, meta = request.prediction, request.params, request.prediction.metadata
    for interval in (params.data_interval, meta.data_interval):
        if interval not in {None, "1d"}:
            raise UsageError(f"dataInterval {interval!a} is not served: leave it out or send 1d")
    horizon, since = meta.target_horizon_days or meta.horizon, meta.out_of_sample_from
    if not 1 <= horizon <= wire.MAX_HORIZON_BARS:
        raise DataError(f"the horizon of the prediction is {horizon}: send 1 to {wire.MAX_HORIZON_BARS}")
    rows = posted_rows(prediction)
    seen = 0 if since is None else sum(day < since for day in prediction.dates)
    rows = rows.iloc[seen:].iloc[-n_rows:]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows lie behind outOfSampleFrom {since}: a backtest needs 2")
    short = min(params.max_short, params.max_short if params.short_cap is None else params.short_cap)
    asked = np.asarray(rows["fusedPositions"], dtype=np.float64)
    target, close = np.clip(asked, -short, params.max_long), np.asarray(rows["prices"], dtype=np.float64)
    sessions = EVERY_DAY if (pd.DatetimeIndex(rows.index).day_of_week > 4).any() else LEAST_BARS
    costs = posted_costs(params, meta.annualization_factor, sessions=sessions)
    fees, band = (costs.commission_bps, costs.slippage_bps), params.min_position_change or 0.0
    tester = AdvancedBacktester(costs=costs, initial_capital=params.initial_capital, no_trade_band=band)
    with np.errstate(all="ignore"):
        moves = np.concatenate([[0.0], close[1:] / close[:-1] - 1.0])
        tried = account(target, moves, costs, initial_capital=params.initial_capital, no_trade_band=band)
    if not (np.abs(tried.equity) <= MAX_MONEY).all():
        raise DataError("the positions earn more than there is in the world: check the prices")
    result = tester.backtest_with_positions(
        pd.DatetimeIndex(rows.index),
        close,
        target,
        is_out_of_sample=None if since is None else np.ones(len(rows), dtype=np.bool_),
        expected_return=np.asarray(rows["predictedReturns"], dtype=np.float64),
        horizon_bars=horizon,
    )
    cut, lack = int(np.count_nonzero(asked != target)), len(rows) < n_rows
    held, own = (result.metrics[name].value or 0.0 for name in ("exposure_mean", "total_return"))
    same = result.benchmarks["exposure_matched"].metrics["total_return"].value or 0.0
    factors = params.annualization_factor, meta.annualization_factor
    notes = {
        UNTRIED: True,
        f"commission was read as {fees[0]:g} bps and slippage as {fees[1]:g} bps of the traded value": True,
        "costs are 0: nobody trades for nothing": sum(fees) == 0.0,
        f"{seen} rows before {since} are left out: the model has seen them": seen > 0,
        f"{len(rows)} rows are there of the {n_rows} that were asked for": lack,
        f"{cut} positions were cut to {-short:g} to {params.max_long:g}": cut > 0,
        "flatAtDayEnd changes nothing: bars are daily": bool(params.flat_at_day_end),
        HELD.format(held, same, own, own - same): True,
        **{UNBELIEVED.format(n): not LEAST_BARS <= n <= MOST_BARS for n in factors if n is not None},
    }
    metrics, undefined = posted_metrics(result)
    orders = orders_of(result.trades, rows, meta.fusion_mode)
    told = (text for text, holds in notes.items() if holds)
    return Posted(result, orders, metrics, [*result.notes, *told, *undefined])


def posted_backtest(request: wire.BacktestRequest) -> wire.BacktestResult:
    """Return the backtest of a posted prediction; see `judge_posted`."""
    posted = judge_posted(request, request.params.backtest_window)
    result, daily, figures = posted.result, posted.result.daily, values(posted.result.metrics)
    days, net = days_of(daily.index), daily["net_return"].iloc[1:]
    risk = {ours: figures[theirs] or 0.0 for ours, theirs in RISKS.items()}
    return wire.BacktestResult(
        equity_curve=records(wire.EquityPoint, daily),
        price_series=records(wire.PricePoint, daily.rename(columns={"close": "price"})),
        trade_log=records(wire.TradeRecord, posted.orders),
        metrics=posted.metrics,
        annotations=markers_of(posted.orders),
        buy_hold_equity=records(wire.BuyHoldPoint, result.benchmarks["buy_hold"].daily),
        csv=daily[CSV].to_csv(index_label="date", date_format="%Y-%m-%d", float_format="%.10g"),
        forward_simulation=posted_forward_sim(request) if request.params.enable_forward_sim else None,
        window_start=days[0],
        window_end=days[-1],
        diagnostics=wire.Diagnostics(
            rolling=records(wire.RollingDiagnostics, by_bar(result)),
            monthly=records(wire.MonthlyDiagnostics, by_month(result).reset_index(names="period")),
            action_breakdown=records(wire.ActionDiagnostics, by_action(result).reset_index(names="action")),
            hourly=[],
            risk=wire.RiskDiagnostics(**risk, best_bar=float(net.max()), worst_bar=float(net.min())),
        ),
        notes=posted.notes,
    )


def posted_forward_sim(request: wire.BacktestRequest) -> wire.ForwardSimResult:
    """Return the books of the last rows of a posted prediction, begun with cash alone."""
    posted = judge_posted(request, request.params.forward_window or FORWARD_ROWS)
    daily, metrics, orders = posted.result.daily, posted.metrics, posted.orders
    days = days_of(daily.index)
    return wire.ForwardSimResult(
        dates=days,
        prices=daily["close"].to_list(),
        equity_curve=daily["equity"].to_list(),
        sharpe=metrics.sharpe_ratio,
        max_drawdown=metrics.max_drawdown,
        trades=metrics.total_trades,
        source=None if posted.result.is_in_sample else "historical_holdout",
        window_start=days[0],
        window_end=days[-1],
        cumulative_return=metrics.cumulative_return,
        win_rate=metrics.win_rate,
        profit_factor=metrics.profit_factor,
        actions=records(wire.ForecastAction, orders.rename(columns={"position": "target_position"})),
        markers=markers_of(orders),
        total_costs=float(daily[["trade_cost", *BORROWED]].to_numpy().sum()),
        borrow_fee=metrics.borrow_fee,
        notes=posted.notes,
    )


def posted_metrics(result: BacktestReport) -> tuple[wire.BacktestMetrics, list[str]]:
    """Return what the page draws, and in words which of it is undefined and sent as 0."""
    found, passive = values(result.metrics), values(result.benchmarks["buy_hold"].metrics)["total_return"]
    if result.daily["equity"].min() <= 0.0:
        found |= dict.fromkeys(OF_THE_LIVING)
    figures = found | {ours: found[theirs] for ours, theirs in WIRE_NAMES.items()}
    figures["borrow_fee"] = float(result.daily[list(BORROWED)].to_numpy().sum())
    if (gain := found["total_return"]) is not None and passive is not None:
        figures |= {"buy_hold_return_pct": passive * 100.0, "excess_return_pct": (gain - passive) * 100.0}
    metrics, undefined = wire_metrics(figures)
    undefined += tuple(to_camel(ours) for ours, theirs in RISKS.items() if found[theirs] is None)
    return metrics, [f"undefined, sent as 0: {', '.join(undefined)}"] if undefined else []


def orders_of(trades: pd.DataFrame, rows: pd.DataFrame, mode: wire.FusionMode) -> pd.DataFrame:
    """Return orders in the names of `TradeRecord`, by session, and what the prediction's ``rows`` said."""
    orders = trades.set_index("date")
    said = rows.reindex(orders.index)
    rises = orders["action"].isin(("BUY", "COVER"))
    orders["confidence"] = said["buy"].where(rises, said["sell"])
    why = orders.assign(fusion_mode=mode, notes=orders["reason"], classifier_prob=orders["confidence"])
    why["regressor_return"] = said["predictedReturns"]
    orders["explanation"] = pd.Series(records(wire.TradeExplanation, why), orders.index, dtype=object)
    orders["id"] = [str(number) for number in range(1, len(orders) + 1)]
    return orders.assign(type=np.where(rises, "buy", "sell"), sign=np.where(rises, 1.0, -1.0))


def markers_of(orders: pd.DataFrame) -> list[wire.TradeMarker]:
    """Mark each order on the session at whose close it was decided."""
    marks = orders.assign(shares=orders["shares"] * orders["sign"], segment="history", scope="backtest")
    return records(wire.TradeMarker, marks.assign(explanation=orders["action"] + ": " + orders["reason"]))
