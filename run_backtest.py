"""Show what a trained model's positions would have earned, out of sample, after costs.

::

    python run_backtest.py --symbol AAPL --source sample
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.cache_manager import BarCache
from data.data_fetcher import fetch_stock_data, make_source
from data.schema import Bars, bars_hash, normalise_symbol
from evaluation.accounting import DEFAULT_CAPITAL, CostModel
from evaluation.advanced_backtester import BacktestReport
from evaluation.metrics import reasons, values
from evaluation.report import Report, backtest_report, provenance_of, write_report
from inference.load_gbm_models import GBMBundle, load_bundle
from inference.pipeline import Decisions, GBMForecaster, backtest_decisions, decide
from inference.position_sizing import DEFAULT_SIZING, PRESETS, make_sizer
from utils.errors import AIStocksError, DataError, StorageError, UsageError
from utils.settings import Settings, configure_logging

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
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A backtest, and all that it was made from."""

    result: BacktestReport
    decisions: Decisions
    bundle: GBMBundle
    bars: Bars


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    costs = CostModel()
    parser = argparse.ArgumentParser(
        prog="python run_backtest.py", description="Show what a trained model's positions would have earned."
    )
    parser.add_argument("--symbol", required=True)
    parser.add_argument(
        "--start", type=session, help="first session, YYYY-MM-DD (default: first out of sample)"
    )
    parser.add_argument("--end", type=session, help="last session, YYYY-MM-DD (default: last bar)")
    parser.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    parser.add_argument("--sizing", choices=sorted(PRESETS), default=DEFAULT_SIZING)
    parser.add_argument("--max-long", type=float, help="largest exposure, a fraction of equity")
    parser.add_argument(
        "--max-short", type=float, help="largest short exposure, a positive fraction of equity"
    )
    parser.add_argument("--commission", type=float, default=costs.commission_bps, metavar="BPS")
    parser.add_argument("--slippage", type=float, default=costs.slippage_bps, metavar="BPS")
    parser.add_argument("--capital", type=float, default=DEFAULT_CAPITAL)
    parser.add_argument(
        "--in-sample", action="store_true", help="also count rows that the model was trained on"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write cached prices")
    parser.add_argument("--json", action="store_true", help="print summary.json on stdout")
    return parser


def session(text: str) -> pd.Timestamp:
    """Read a date of the command line."""
    try:
        return pd.Timestamp(datetime.strptime(text, "%Y-%m-%d"))  # noqa: DTZ007 sessions have no time zone
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write YYYY-MM-DD") from error


def backtest(args: argparse.Namespace, settings: Settings) -> Outcome:
    """Load model and prices, decide on every bar, and book the window that was asked for."""
    symbol = normalise_symbol(args.symbol)
    if args.start is not None and args.end is not None and args.start >= args.end:
        raise UsageError(f"--start {args.start:%Y-%m-%d} does not lie before --end {args.end:%Y-%m-%d}")
    bundle = load_bundle(settings.models_dir, symbol)
    cache = None if args.no_cache else BarCache(settings.cache_dir)
    source = make_source(args.source or settings.source, cache_dir=settings.cache_dir)
    bars = fetch_stock_data(symbol, source=source, cache=cache)
    sizer = make_sizer(args.sizing, max_long=args.max_long, max_short=args.max_short)
    costs = CostModel(commission_bps=args.commission, slippage_bps=args.slippage)
    forecaster = GBMForecaster(bundle=bundle, include_in_sample=args.in_sample)
    # What is decided does not depend on the window: the window is cut from the decisions on all bars.
    decisions = decide(symbol, bars.frame, forecaster, sizer, costs=costs)
    window = replace(decisions, frame=decisions.frame.loc[args.start : args.end])
    if window.frame.empty or (window.out_of_sample_from is None and not args.in_sample):
        raise DataError(
            f"no out-of-sample row lies in that window: the model of {symbol} is out of sample from "
            f"{bundle.metadata['out_of_sample_from']} to {bars.frame.index[-1]:%Y-%m-%d}; --in-sample shows "
            f"earlier rows, stamped as such{''.join('; ' + text for text in decisions.findings)}"
        )
    result = backtest_decisions(window, costs, initial_capital=args.capital, include_in_sample=args.in_sample)
    return Outcome(result=result, decisions=window, bundle=bundle, bars=bars)


def summary_of(outcome: Outcome) -> dict[str, object]:
    """Return the headline figures as plain data; None where a figure is undefined."""
    result, bundle = outcome.result, outcome.bundle
    found = values(result.metrics)
    passive = values(result.benchmarks["buy_hold"].metrics)["total_return"]
    total, since = found["total_return"], result.out_of_sample_from
    return {
        "symbol": bundle.symbol,
        "start": f"{result.daily.index[0]:%Y-%m-%d}",
        "end": f"{result.daily.index[-1]:%Y-%m-%d}",
        "mode": "gbm_only",
        "sizing": outcome.decisions.sizing_id,
        "n_days": len(result.daily),
        "strategy_return": total,
        "buy_hold_return": passive,
        "exposure_matched_return": values(result.benchmarks["exposure_matched"].metrics)["total_return"],
        "volatility_matched_return": values(result.benchmarks["volatility_matched"].metrics)["total_return"],
        "alpha": None if total is None or passive is None else total - passive,
        "pred_positive_pct": found["pred_positive_share"],
        **{name: found[name] for name in SUMMARY_FIGURES},
        "signal_information_coefficient": bundle.metadata["verdict"]["evidence"]["ic"],
        "forecast_rank_correlation": found["information_coefficient"],
        "undefined": reasons(result.metrics),
        "in_sample": result.is_in_sample,
        "out_of_sample_from": None if since is None else f"{since:%Y-%m-%d}",
        "verdict": bundle.metadata["verdict"]["label"],
        "model_version": bundle.model_version,
        "data_hash": bars_hash(outcome.bars.frame),
        "seed": bundle.metadata["seed"],
        "versions": bundle.metadata["versions"],
        "trained_on": bundle.metadata["source"],
        "trained_through": bundle.metadata["trained_through"],
        "judged_on": outcome.bars.provenance.source,
        "notes": notes_of(outcome),
    }


def notes_of(outcome: Outcome) -> list[str]:
    """Return what must be known beside the figures, in words."""
    trained, judged = outcome.bundle.metadata, outcome.bars.provenance.source
    notes = [*outcome.result.notes, *outcome.bars.report.problems(), *outcome.decisions.findings]
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
    """Return the HTML report."""
    bars = outcome.bars
    facts = {
        "Judged on": f"{bars.provenance.source}, last session {bars.provenance.last_session:%Y-%m-%d}",
        "Judged on, sha256": bars_hash(bars.frame),
        "Sizing": outcome.decisions.sizing_id,
    }
    return backtest_report(
        outcome.result,
        symbol=outcome.bundle.symbol,
        provenance={**provenance_of(outcome.bundle.metadata), **facts},
        verdict=outcome.bundle.metadata["verdict"],
        forecasts=outcome.decisions.frame,
        horizon_bars=outcome.decisions.horizon_bars,
        notes=notes_of(outcome)[len(outcome.result.notes) :],
    )


def write_results(folder: Path, outcome: Outcome) -> None:
    """Write the summary, all figures, the daily tables and the HTML report into ``folder``."""
    result = outcome.result
    benchmarks = {name: values(item.metrics) for name, item in result.benchmarks.items()}
    metrics = {"strategy": values(result.metrics), **benchmarks, "undefined": reasons(result.metrics)}
    equity = {"strategy": result.daily["equity"]}
    equity |= {name: item.daily["equity"] for name, item in result.benchmarks.items()}
    try:
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary_of(outcome), indent=1, allow_nan=False))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
        result.daily.to_csv(folder / "daily_results.csv", index_label="date")
        result.trades.to_csv(folder / "trade_log.csv", index=False)
        pd.DataFrame(equity).to_csv(folder / "equity_comparison.csv", index_label="date")
        write_report(report_of(outcome), folder / "report.html")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from error


def print_summary(console: Console, outcome: Outcome) -> None:
    """Print the strategy beside its benchmarks."""
    result, summary = outcome.result, summary_of(outcome)
    stamp = "IN-SAMPLE ROWS INCLUDED" if result.is_in_sample else "out of sample"
    sizing = outcome.decisions.sizing_id.split(":")[0]
    title = (
        f"{summary['symbol']} {summary['start']} to {summary['end']}, {stamp}, {sizing} sizing "
        f"(verdict: {summary['verdict']})"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("after costs and financing")
    for name in ("strategy", *result.benchmarks):
        table.add_column(name.replace("_", " "), justify="right")
    columns = [values(result.metrics), *(values(item.metrics) for item in result.benchmarks.values())]
    rows = {
        "total return": ("total_return", ".1%"),
        "return a year": ("cagr", ".1%"),
        "volatility": ("volatility", ".1%"),
        "Sharpe ratio": ("sharpe_ratio", ".2f"),
        "max drawdown": ("max_drawdown", ".1%"),
        "mean exposure": ("exposure_mean", ".2f"),
        "turnover a year": ("turnover", ".2f"),
    }
    for label, (key, style) in rows.items():
        table.add_row(label, *(shown(column.get(key), style) for column in columns))
    console.print(table)
    for note in notes_of(outcome):
        console.print(f"  - {escape(note)}", soft_wrap=True)


def shown(value: float | None, style: str) -> str:
    """Return a figure for a table; a dash where it is undefined."""
    return "-" if value is None else format(value, style)


def main(argv: list[str] | None = None) -> int:
    """Run the backtest; return the exit code that `utils.errors` lists."""
    args = build_parser().parse_args(argv)
    settings = Settings()
    configure_logging("WARNING" if args.json else settings.log_level)
    try:
        outcome = backtest(args, settings)
        folder = settings.results_dir / f"{outcome.bundle.symbol}_{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
        write_results(folder, outcome)
    except AIStocksError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    if args.json:
        summary: Mapping[str, object] = {**summary_of(outcome), "report": str(folder / "report.html")}
        sys.stdout.write(json.dumps(summary, allow_nan=False) + "\n")
        return 0
    console = Console()
    print_summary(console, outcome)
    console.print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
