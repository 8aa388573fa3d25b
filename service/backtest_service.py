"""One backtest from request to evidence: load, decide, book, weigh, and tell.

The command line calls it; nothing in here prints or writes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, fetch_stock_data
from data.schema import Bars, bars_hash
from evaluation import forward_simulator as simulator
from evaluation.accounting import DEFAULT_CAPITAL, CostModel, Ledger, account
from evaluation.advanced_backtester import BacktestReport
from evaluation.charts import TIMES, Cell, cell
from evaluation.forward_simulator import Book, Evidence, FloatArray, ForwardSimulator, IntArray, largest_gap
from evaluation.metrics import Measured, calibration_metrics, reasons, values
from evaluation.report import Report, Section, backtest_report, provenance_of, words_of
from inference.load_gbm_models import GBMBundle
from inference.pipeline import Decisions, GBMForecaster, backtest_decisions, decide
from inference.position_sizing import DEFAULT_SIZING, PRESETS, RuleSizer, SizingInputs, make_sizer
from utils.errors import AIStocksError, DataError, UsageError
from validation.evidence import (
    MIN_RETURNS,
    deflated_sharpe,
    minimum_track_record_length,
    probability_of_backtest_overfitting,
    sharpe_moments,
)

MODE = "gbm_only"
# Bar by bar and all at once must agree to rounding.
SAME = 1e-12
# Of Kelly's fraction in what else one could have chosen, for the probability of overfitting.
BOLDNESS = (0.5, 1.0, 2.0)
SIZED_BY = ("expected_return", "baseline_return", "sigma", "p_win", "payoff_ratio", "skill_lower")
SUMMARY_FIGURES = (
    "sharpe_ratio",
    "max_drawdown",
    "win_rate",
    "direction_accuracy",
    "direction_base_rate",
    "prediction_std",
    "turnover",
    "total_transaction_costs",
    "cost_adjusted_sharpe",
    "exposure_mean",
    "hit_rate_down_days",
    "information_ratio",
)
BESIDE = ("total_return", "cagr", "sharpe_ratio", "max_drawdown", "exposure_mean", "turnover")


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestRequest:
    """What a person may choose.

    Attributes
    ----------
    start, end
        First and last session; None: the first out of sample, the last bar.
    sizing, max_long, max_short
        Preset, and its limits where they are not the preset's.
    costs, capital
        What trading costs, and the money at the start.
    include_in_sample
        Also count rows that the model was trained on, stamped as such.
    seeds
        Resamples of every scenario.
    """

    start: pd.Timestamp | None = None
    end: pd.Timestamp | None = None
    sizing: str = DEFAULT_SIZING
    max_long: float | None = None
    max_short: float | None = None
    costs: CostModel = field(default_factory=CostModel)
    capital: float = DEFAULT_CAPITAL
    include_in_sample: bool = False
    seeds: int = 0

    @property
    def sizer(self) -> RuleSizer:
        """The sizer that was asked for."""
        return make_sizer(self.sizing, max_long=self.max_long, max_short=self.max_short)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A backtest, and all that it was made from; ``history`` are the decisions from the first bar on."""

    request: BacktestRequest
    result: BacktestReport
    history: Decisions
    bundle: GBMBundle
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
    bundle: GBMBundle, source: BarSource, cache: BarCache | None, request: BacktestRequest
) -> Outcome:
    """Decide on every bar, book the window that was asked for, and weigh what came.

    Raises
    ------
    DataError
        When no row of the window is out of sample, and in-sample ones were not asked for.
    """
    symbol, sizer, costs = bundle.symbol, request.sizer, request.costs
    bars = fetch_stock_data(symbol, source=source, cache=cache)
    forecaster = GBMForecaster(bundle=bundle, include_in_sample=request.include_in_sample)
    # What is decided does not depend on the window: the window is cut from the decisions on all bars.
    history = decide(symbol, bars.frame, forecaster, sizer, costs=costs)
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
    verdicts = int(bundle.metadata["verdict"]["evidence"].get("n_trials") or 1)
    evidence = weigh(result, history, request, n_tries=verdicts * len(PRESETS))
    return Outcome(
        request=request, result=result, history=history, bundle=bundle, bars=bars, evidence=evidence
    )


def bookkeeper(history: Decisions, sizer: RuleSizer, capital: float) -> Book:
    """Return what sizes and books rows of the history in any order, see `Book`."""
    columns = {name: np.asarray(history.frame[name], dtype=np.float64) for name in SIZED_BY}
    moves = np.nan_to_num(np.asarray(history.frame["asset_return"], dtype=np.float64))

    def book(rows: IntArray, lead: int, costs: CostModel) -> tuple[Ledger, Ledger]:
        inputs = SizingInputs(
            **{name: column[rows] for name, column in columns.items()},
            asset_return_simple=moves[rows],
            horizon_bars=history.horizon_bars,
        )
        target, own = sizer.fold(inputs, costs)[lead:], moves[rows[lead:]]
        market = account(np.ones(len(own)), own, costs, initial_capital=capital)
        return account(target, own, costs, initial_capital=capital), market

    return book


def alternatives() -> list[RuleSizer]:
    """Return what else one could have chosen: each preset, and bolder and meeker ones."""
    return [
        RuleSizer(name=name, rules=rules._replace(kelly_fraction=rules.kelly_fraction * times))
        for name, rules in PRESETS.items()
        for times in (BOLDNESS if rules.kelly_fraction else (1.0,))
    ]


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
    everything = np.arange(len(dates))
    books = (bookkeeper(history, other, request.capital) for other in alternatives())
    tried = [book(everything, first, costs)[0].net_return[1:] for book in books]
    figures = {
        "n_tries": Measured(float(n_tries), "count"),
        "deflated_sharpe": _deflated(net, n_tries),
        "deflated_sharpe_active": _deflated(net - same, n_tries),
        "minimum_track_record_bars": _track_record(net),
        "pbo": _overfit(np.column_stack([net, *tried])),
        "out_of_sample_share": Measured(float(result.daily["is_out_of_sample"].mean()), "fraction"),
        **_calibration(history.frame.iloc[first:], history.horizon_bars),
    }
    own = bookkeeper(history, request.sizer, request.capital)
    return Evidence(
        figures=figures,
        intervals=simulator.bootstrap_intervals(net, market, costs.periods_per_year),
        scenarios=simulator.robustness_grid(own, dates, first, costs, seeds=request.seeds),
    )


def _calibration(forecasts: pd.DataFrame, horizon_bars: int) -> dict[str, Measured]:
    came = forecasts["close"].shift(-horizon_bars) / forecasts["close"] - 1.0
    lower, upper, rises = (np.asarray(forecasts[c], dtype=np.float64) for c in ("lower", "upper", "prob_up"))
    years = pd.DatetimeIndex(forecasts.index).year.to_numpy()
    return calibration_metrics(np.asarray(came, dtype=np.float64), (lower, upper), rises, years)


def _deflated(returns: FloatArray, n_tries: int) -> Measured:
    moments = sharpe_moments(returns)
    if moments is None:
        return Measured(None, "fraction", f"needs {MIN_RETURNS} returns that vary")
    return Measured(deflated_sharpe(moments, n_tries), "fraction")


def _track_record(returns: FloatArray) -> Measured:
    moments = sharpe_moments(returns)
    bars = None if moments is None else minimum_track_record_length(moments)
    if bars is None:
        return Measured(None, "bars", "no length is enough: the Sharpe ratio is not above zero")
    return Measured(bars, "bars")


def _overfit(tried: FloatArray) -> Measured:
    if len(tried) < simulator.MIN_BARS:
        return Measured(None, "fraction", f"needs {simulator.MIN_BARS} returns, has {len(tried)}")
    return Measured(probability_of_backtest_overfitting(tried), "fraction")


def live(outcome: Outcome, days: int) -> Lived:
    """Live through the last days of the window again, bar by bar.

    Raises
    ------
    UsageError
        When the window has fewer days.
    AIStocksError
        When the backtest was not lived like that: some row knew more than it may.
    """
    request, judged = outcome.request, outcome.result.daily
    if not 1 <= days < len(judged):
        raise UsageError(f"--days must be 1 to {len(judged) - 1}, the window less its first row, got {days}")
    forecaster = GBMForecaster(bundle=outcome.bundle, include_in_sample=request.include_in_sample)
    sizer, costs, capital = request.sizer, request.costs, request.capital

    def decided(known: pd.DataFrame) -> float:
        now = decide(outcome.bundle.symbol, known, forecaster, sizer, costs=costs)
        return float(now.frame["target_weight"].iloc[-1])

    lived = ForwardSimulator(costs=costs, initial_capital=capital).run(
        outcome.bars.frame.loc[: judged.index[-1]], decided, days=days
    )
    rows = judged.loc[lived.index]
    target, moves = (np.asarray(rows[name], dtype=np.float64) for name in ("target_weight", "asset_return"))
    booked = account(target, np.nan_to_num(moves), costs, initial_capital=capital)
    gap = max(largest_gap(lived, booked), float(np.abs(np.asarray(lived["target_weight"]) - target).max()))
    if not gap <= SAME:
        raise AIStocksError(
            f"bar by bar differs from all bars at once by {gap:.3g}: some row knew more than it may"
        )
    return Lived(lived, gap)


def summary_of(outcome: Outcome) -> dict[str, object]:
    """Return the headline figures as plain data; None where a figure is undefined."""
    result, bundle = outcome.result, outcome.bundle
    found, weighed, verdict = values(result.metrics), outcome.evidence.plain(), bundle.metadata["verdict"]
    rivals = {name: values(item.metrics)["total_return"] for name, item in result.benchmarks.items()}
    total, since, passive = found["total_return"], result.out_of_sample_from, rivals["buy_hold"]
    return {
        "symbol": bundle.symbol,
        "start": f"{result.daily.index[0]:%Y-%m-%d}",
        "end": f"{result.daily.index[-1]:%Y-%m-%d}",
        "mode": MODE,
        "sizing": outcome.history.sizing_id,
        "n_days": len(result.daily),
        "strategy_return": total,
        **{f"{name}_return": gain for name, gain in rivals.items()},
        "alpha": None if total is None or passive is None else total - passive,
        "pred_positive_pct": found["pred_positive_share"],
        **{name: found[name] for name in SUMMARY_FIGURES},
        "verdict_information_coefficient": verdict["evidence"]["ic"],
        "forecast_rank_correlation": found["information_coefficient"],
        **{name: figure for name, figure in weighed.items() if name != "robustness"},
        "undefined": {**reasons(result.metrics), **reasons(outcome.evidence.figures)},
        "in_sample": result.is_in_sample,
        "out_of_sample_from": None if since is None else f"{since:%Y-%m-%d}",
        "verdict": verdict["label"],
        "model_version": bundle.model_version,
        "data_hash": bars_hash(outcome.bars.frame),
        **{name: bundle.metadata[name] for name in ("seed", "versions", "trained_through")},
        "trained_on": bundle.metadata["source"],
        "judged_on": outcome.bars.provenance.source,
        "costs": asdict(result.costs),
        "notes": notes_of(outcome),
    }


def notes_of(outcome: Outcome) -> list[str]:
    """Return what must be known beside the figures, in words."""
    trained, judged = outcome.bundle.metadata, outcome.bars.provenance.source
    findings = replace(outcome.history, frame=outcome.forecasts).findings
    notes = [*outcome.result.notes, *outcome.bars.report.problems(), *findings]
    if trained["source"] != judged:
        notes.append(
            f"the model was trained and judged on {trained['source']} prices through "
            f"{trained['trained_through']}; these are {judged} prices, on which no verdict was earned"
        )
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
        "Models": "boosted trees (gbm_only)",
    }
    return backtest_report(
        outcome.result,
        symbol=outcome.bundle.symbol,
        provenance={**provenance_of(outcome.bundle.metadata), **facts},
        verdict=outcome.bundle.metadata["verdict"],
        forecasts=outcome.forecasts,
        horizon_bars=outcome.history.horizon_bars,
        notes=notes_of(outcome)[len(outcome.result.notes) :],
        extra_sections=(luck_section(outcome.evidence),),
    )


def luck_section(evidence: Evidence) -> Section:
    """Show how much of a result may be luck: intervals, figures, scenarios."""
    fills = {"block": simulator.BLOCK_BARS, "draws": f"{simulator.RESAMPLES:,}", "seeds": evidence.seeds}
    words = words_of("backtest", {**fills, "confidence": cell(simulator.CONFIDENCE, "whole_pct").text})
    known, heads = words.table["evidence"], words.table["heads"]
    facts = ((*known[name], measured) for name, measured in evidence.figures.items())
    rows = ((Cell(a), cell(m.value, form, m.reason or ""), Cell(hint, "word")) for a, form, hint, m in facts)
    spans = _interval_rows(evidence, words.table["intervals"])
    tables = words.grid("intervals", heads["intervals"], spans), words.grid("luck", heads["evidence"], rows)
    return words.section("luck", *tables, words.grid("grid", *_grid_rows(evidence)))


def _interval_rows(evidence: Evidence, labels: Mapping[str, tuple[str, str]]) -> list[list[Cell]]:
    """Return a row for each interval that has a label (words, form): value, both ends, share above zero."""
    rows = []
    for name, (label, form) in labels.items():
        found = evidence.intervals[name]
        ends = (cell(value, form, found.reason or "") for value in (found.value, found.low, found.high))
        rows.append([Cell(label), *ends, cell(found.share_above_zero, "pct", found.reason or "")])
    return rows


def _grid_rows(evidence: Evidence) -> tuple[list[str], list[list[Cell]]]:
    """Return heads and rows, windows down, costs across: Sharpe over buy and hold, share of seeds ahead."""
    records = simulator.summarise(evidence.scenarios)
    heads = dict.fromkeys(f"{record['cost_multiple']:g}{TIMES} costs" for record in records)
    rows: dict[object, list[Cell]] = {}
    for record in records:
        row = rows.setdefault(record["window"], [Cell(f"{record['start'][:4]} to {record['end'][:4]}")])
        ahead, apart = record["share_better"], record["sharpe_difference"]
        shown = cell(apart, "signed_fine", "returns do not vary")
        share = "" if ahead is None else f" ({ahead * 100:.0f})"
        row.append(Cell("same") if record["all_same"] else replace(shown, text=shown.text + share))
    return ["", *heads], list(rows.values())


def compared(outcome: Outcome) -> dict[str, object]:
    """Return what stands side by side in a comparison."""
    result, apart = outcome.result, outcome.evidence.intervals["sharpe_difference"]
    own, passive = values(result.metrics), values(result.benchmarks["buy_hold"].metrics)
    record: dict[str, object] = {
        "symbol": outcome.bundle.symbol,
        "start": f"{result.daily.index[0]:%Y-%m-%d}",
        "end": f"{result.daily.index[-1]:%Y-%m-%d}",
        "in_sample": result.is_in_sample,
        "verdict": outcome.bundle.metadata["verdict"]["label"],
    }
    for name in BESIDE:
        record |= {name: own[name], f"buy_hold_{name}": passive[name]}
    record["exposure_matched_cagr"] = values(result.benchmarks["exposure_matched"].metrics)["cagr"]
    ends = {"": apart.value, "_low": apart.low, "_high": apart.high}
    return record | {f"sharpe_difference{end}": value for end, value in ends.items()}
