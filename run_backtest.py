"""Show what a trained model's positions would have earned, out of sample, after costs.

::

    python run_backtest.py --symbol AAPL --source sample
    python run_backtest.py --symbols AAPL,MSFT,IBM --compare --source sample
    python run_backtest.py --symbol AAPL --source sample --robustness
    python run_backtest.py --symbol AAPL --source sample --forward-sim --days 20
"""

import gc

if __name__ == "__main__":
    # What the imports make is there to stay; looking through it again and again takes a tenth of their time.
    gc.disable()

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.cache_manager import BarCache
from data.data_fetcher import make_news, make_source
from data.schema import bars_hash, normalise_symbol
from evaluation import charts
from evaluation.accounting import DEFAULT_CAPITAL, CostModel
from evaluation.advanced_backtester import IN_SAMPLE_STAMP, by_regime, by_year
from evaluation.charts import Banner, Cell, Report, Section, cell
from evaluation.forward_simulator import CONFIDENCE, GRID_SEEDS
from evaluation.metrics import reasons, values
from evaluation.report import luck_section, words_of, write_report
from inference.ensemble import Parts, forecaster_for, load_ensemble
from inference.load_gbm_models import load_bundle
from inference.load_lstm_model import load_bundle as load_lstm
from inference.position_sizing import DEFAULT_SIZING, PRESETS
from service import backtest_service as service
from service.backtest_service import BacktestRequest, Lived, Outcome, notes_of
from utils.base import (
    AIStocksError,
    ModelError,
    Settings,
    StorageError,
    UsageError,
    configure_logging,
    read_settings,
    session,
)
from utils.model_paths import MODES, TRIALS, mode_of

Told = dict[str, Any]
DEFAULT_DAYS = 250
# Times equity: no broker lends a private person more, and overnight gaps would ruin who had it.
MOST_EXPOSURE = 5.0
# Options that are called like what they ask for.
ALIKE = ("start", "end", "sizing", "max_long", "max_short", "capital")
BESIDE = ("total_return", "cagr", "sharpe_ratio", "max_drawdown", "exposure_mean", "turnover")
SUMMARY_FIGURES = (
    "sharpe_ratio", "max_drawdown", "win_rate", "total_trades", "direction_accuracy", "turnover",
    "direction_base_rate", "prediction_std", "total_transaction_costs", "cost_adjusted_sharpe",
    "exposure_mean", "hit_rate_down_days", "information_ratio",
)  # fmt: skip
LIVED = {"close": ",.2f", "target_weight": ".1%", "held_weight": ".1%", "equity": ",.2f", "net_return": ".2%"}
SPANS = {
    "active_return": ("return a year over equal exposure", "+.2%"),
    "sharpe_difference": ("Sharpe ratio over buy and hold", "+.3f"),
}
SHOWN = {
    "total return": ("total_return", ".1%"),
    "return a year": ("cagr", ".1%"),
    "volatility": ("volatility", ".1%"),
    "Sharpe ratio": ("sharpe_ratio", ".2f"),
    "max drawdown": ("max_drawdown", ".1%"),
    "mean exposure": ("exposure_mean", ".1%"),
    "turnover a year": ("turnover", ".2f"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    costs = CostModel()
    parser = argparse.ArgumentParser(
        prog="python run_backtest.py", description="Show what a trained model's positions would have earned."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--symbol")
    which.add_argument("--symbols", metavar="A,B,C", help="one backtest each")
    add = parser.add_argument
    add("--compare", action="store_true", help="set the symbols side by side: one table, one report")
    add("--start", type=session, help="first session, YYYY-MM-DD (default: first out of sample)")
    add("--end", type=session, help="last session, YYYY-MM-DD (default: last bar)")
    add("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    add("--mode", choices=MODES, default=service.MODE, help="which models forecast")
    add("--sizing", choices=sorted(PRESETS), default=DEFAULT_SIZING)
    add("--max-long", type=float, help="largest exposure, a fraction of equity")
    add("--max-short", type=float, help="largest short exposure, a positive fraction of equity")
    add("--commission", type=float, default=costs.commission_bps, metavar="BPS")
    add("--slippage", type=float, default=costs.slippage_bps, metavar="BPS")
    add("--borrow", type=float, default=costs.borrow_annual, metavar="RATE", help="a year, on what is short")
    add("--capital", type=float, default=DEFAULT_CAPITAL)
    add("--in-sample", action="store_true", help="also count rows that the model was trained on")
    add("--robustness", action="store_true", help="windows x costs x resamples of history, sized anew")
    add("--forward-sim", action="store_true", help="live through the last days again, bar by bar")
    add("--days", type=int, help=f"how many of them (default: {DEFAULT_DAYS})")
    add("--no-cache", action="store_true", help="neither read nor write cached prices")
    add("--json", action="store_true", help="print summary.json on stdout")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--report", type=Path, metavar="PATH", help="where the HTML report goes")
    where.add_argument("--no-report", action="store_true", help="write figures and tables only")
    return parser


def asked_symbols(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the symbols, each once; refuse what does not go together."""
    named = [args.symbol] if args.symbol is not None else [p for p in args.symbols.split(",") if p.strip()]
    symbols = tuple(dict.fromkeys(map(normalise_symbol, named)))
    alone, dated = len(symbols) < 2, args.start is not None and args.end is not None
    several = args.report is not None and not alone and not args.compare
    start, end = (str(day)[:10] for day in (args.start, args.end))
    refused = {
        f"--capital must be above 0 and finite, got {args.capital:g}": not 0.0 < args.capital < float("inf"),
        "--symbols names no symbol: write --symbols AAPL,MSFT": not symbols,
        "--compare needs two symbols: write --symbols AAPL,MSFT --compare": args.compare and alone,
        "--report is one path for several reports: add --compare, or leave it out": several,
        "--days belongs to --forward-sim: add that, or choose a window by --start and --end": (
            args.days is not None and not args.forward_sim
        ),
        f"--days must be at least 1, got {args.days}": args.days is not None and args.days < 1,
        f"--start {start} does not lie before --end {end}": dated and args.start >= args.end,
    }
    for name, asked in (("--max-long", args.max_long), ("--max-short", args.max_short)):
        words = (
            f"{name} {asked} is over {MOST_EXPOSURE:g} times equity, more than anybody lends: 1.5 means 150 %"
        )
        refused[words] = asked is not None and asked > MOST_EXPOSURE
    if wrong := [words for words, is_wrong in refused.items() if is_wrong]:
        raise UsageError(wrong[0])
    return symbols


def request_of(args: argparse.Namespace) -> BacktestRequest:
    """Return what was asked for, apart from the symbol."""
    costs = CostModel(commission_bps=args.commission, slippage_bps=args.slippage, borrow_annual=args.borrow)
    alike = {name: getattr(args, name) for name in ALIKE}
    seeds = GRID_SEEDS if args.robustness else 0
    return BacktestRequest(**alike, costs=costs, include_in_sample=args.in_sample, seeds=seeds)


def load_parts(models_dir: Path, symbol: str, mode: str) -> Parts:
    """Load what a mode needs of one symbol; `ModelError` when what it cannot do without cannot be had."""
    if (wanted := mode_of(mode)) == "lstm_only":
        return Parts(symbol=symbol, lstm=load_lstm(models_dir, symbol))
    parts = Parts(symbol=symbol, gbm=load_bundle(models_dir, symbol))
    if wanted == "gbm_only":
        return parts
    try:
        parts = replace(parts, lstm=load_lstm(models_dir, symbol))
        return replace(parts, ensemble=load_ensemble(models_dir, symbol))
    except ModelError as error:
        return replace(parts, amiss=str(error))


def make(args: argparse.Namespace, settings: Settings) -> list[Outcome]:
    """Make every backtest that was asked for."""
    symbols, request = asked_symbols(args), request_of(args)
    parts = [load_parts(settings.models_dir, symbol, args.mode) for symbol in symbols]
    chosen = [forecaster_for(args.mode, part, include_in_sample=args.in_sample) for part in parts]
    cache = None if args.no_cache else BarCache(settings.cache_dir)
    news = make_news(settings)
    source = make_source(args.source or settings.source, cache_dir=settings.cache_dir, news=news)
    return [service.backtest(one, source, cache, request, settings.models_dir / TRIALS) for one in chosen]


def summary_of(outcome: Outcome) -> Told:
    """Return the headline figures as plain data; None where a figure is undefined."""
    result, bundle = outcome.result, outcome.bundle
    found, weighed, verdict = values(result.metrics), outcome.evidence.plain(), bundle.metadata["verdict"]
    rivals = {name: values(item.metrics)["total_return"] for name, item in result.benchmarks.items()}
    total, since, passive = found["total_return"], result.out_of_sample_from, rivals["buy_hold"]
    return {
        "symbol": bundle.symbol,
        "start": f"{result.daily.index[0]:%Y-%m-%d}",
        "end": f"{result.daily.index[-1]:%Y-%m-%d}",
        "mode": bundle.mode,
        "sizing": outcome.history.sizing_id,
        "n_days": len(result.daily),
        "strategy_return": total,
        **{f"{name}_return": gain for name, gain in rivals.items()},
        "alpha": None if total is None or passive is None else total - passive,
        "pred_positive_pct": found["pred_positive_share"],
        **{name: found[name] for name in SUMMARY_FIGURES},
        "verdict_information_coefficient": verdict["evidence"]["ic"],
        "verdict_direction_accuracy": verdict["evidence"]["direction_accuracy"],
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


def write_results(folder: Path, outcome: Outcome, lived: Lived | None, args: argparse.Namespace) -> Told:
    """Write summary, figures, daily tables and report into ``folder``; return the summary."""
    result, summary = outcome.result, summary_of(outcome)
    figures: Told = {"strategy": values(result.metrics), "undefined": reasons(result.metrics)}
    figures |= {name: values(item.metrics) for name, item in result.benchmarks.items()}
    figures |= {"by_year": by_year(result), "by_regime": by_regime(result)}
    equity = {"strategy": result.daily["equity"]}
    equity |= {name: item.daily["equity"] for name, item in result.benchmarks.items()}
    folder.mkdir(parents=True)
    if lived is not None:
        gap = {"largest_gap": lived.gap, "allowed_gap": service.SAME}
        summary["forward_sim"] = {"days": len(lived.days) - 1, **gap}
        lived.days.to_csv(folder / "forward_sim.csv", index_label="date")
    if args.robustness:
        write_json(folder / "robustness.json", [asdict(each) for each in outcome.evidence.scenarios])
    write_json(folder / "summary.json", summary)
    write_json(folder / "metrics.json", {**figures, "evidence": outcome.evidence.plain()})
    result.daily.to_csv(folder / "daily_results.csv", index_label="date")
    result.trades.to_csv(folder / "trade_log.csv", index=False)
    pd.DataFrame(equity).to_csv(folder / "equity_comparison.csv", index_label="date")
    told = {**summary, "files": str(folder)}
    if not (args.no_report or args.compare):
        path = args.report or folder / "report.html"
        told["report"] = str(write_report(service.report_of(outcome), path))
    return told


def compared(outcome: Outcome, summary: Told) -> Told:
    """Return what stands side by side in a comparison."""
    result, apart = outcome.result, outcome.evidence.intervals["sharpe_difference"]
    own, passive = values(result.metrics), values(result.benchmarks["buy_hold"].metrics)
    record = {name: summary[name] for name in ("symbol", "start", "end", "in_sample", "verdict")}
    for name in BESIDE:
        record |= {name: own[name], f"buy_hold_{name}": passive[name]}
    record["exposure_matched_cagr"] = values(result.benchmarks["exposure_matched"].metrics)["cagr"]
    ends = {"": apart.value, "_low": apart.low, "_high": apart.high}
    return record | {f"sharpe_difference{end}": value for end, value in ends.items()}


def comparison_report(outcomes: Sequence[Outcome], records: Sequence[Told]) -> Report:
    """Set backtests side by side: the figures of each symbol, and its gain over buy and hold."""
    stamp = IN_SAMPLE_STAMP if any(outcome.result.is_in_sample for outcome in outcomes) else ""
    words = words_of("comparison", {"rows": f"{'In-sample rows included' if stamp else 'Out of sample'}."})
    specs, why = words.table["beside"].items(), words.table["not_computed"]
    rows = ((Cell(label), *(cell(r[key], form, why) for r in records)) for key, (label, form) in specs)
    table = words.grid("beside", ("", *(str(record["symbol"]) for record in records)), rows)
    drawn = []
    for outcome in outcomes:
        daily, rivals = outcome.result.daily, outcome.result.benchmarks
        curves = {
            label: (role, np.asarray(daily["equity"] / rivals[name].daily["equity"] - 1.0, dtype=np.float64))
            for name, (label, role) in words.table["ahead"].items()
        }
        chart = charts.curve_chart(pd.DatetimeIndex(daily.index), curves, form="pct")
        drawn.append(words.on("ahead", chart, {"symbol": outcome.bundle.symbol}))
    return Report(
        kicker=words.table["kicker"],
        title=", ".join(outcome.bundle.symbol for outcome in outcomes),
        subtitle=words.table["subtitle"],
        headline=(),
        banners=(Banner(tone="bad", text=words.table["verdict"]["in_sample"]),) if stamp else (),
        sections=(words.section("beside", table), words.section("ahead", *drawn)),
        limits=tuple(words.table["limits"]),
        stamp=stamp,
    )


def write_comparison(
    folder: Path, outcomes: Sequence[Outcome], records: Sequence[Told], args: argparse.Namespace
) -> Told:
    """Write the figures side by side, and their report, into ``folder``; return what is told about it."""
    folder.mkdir(parents=True)
    write_json(folder / "comparison.json", records)
    told: Told = {"comparison": records, "files": str(folder)}
    if not args.no_report:
        path = args.report or folder / "report.html"
        told["report"] = str(write_report(comparison_report(outcomes, records), path))
    return told


def write_json(path: Path, content: object) -> None:
    """Write plain data; NaN is refused."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False))


def print_outcome(console: Console, outcome: Outcome, lived: Lived | None, args: argparse.Namespace) -> None:
    """Print the strategy beside its benchmarks, and what else was asked for."""
    result, label = outcome.result, outcome.bundle.metadata["verdict"]["label"]
    stamp = "IN-SAMPLE ROWS INCLUDED" if result.is_in_sample else "out of sample"
    span = f"{result.daily.index[0]:%Y-%m-%d} to {result.daily.index[-1]:%Y-%m-%d}"
    title = f"{outcome.bundle.symbol} {span}, {stamp}, {outcome.request.sizing} sizing (verdict: {label})"
    measured = [result.metrics, *(item.metrics for item in result.benchmarks.values())]
    columns = [values(metrics) for metrics in measured]
    heads = ["after costs and financing", "strategy", *(name.replace("_", " ") for name in result.benchmarks)]
    rows = ([name, *(shown(c.get(key), form) for c in columns)] for name, (key, form) in SHOWN.items())
    print_table(console, title, heads, rows)
    for name, (words, form) in SPANS.items():
        apart = outcome.evidence.intervals[name]
        if apart.value is not None:
            ends = " to ".join(shown(end, form) for end in (apart.low, apart.high))
            told = f"{words} {apart.value:{form}}, {CONFIDENCE:.0%} of draws from {ends}"
            console.print(f"  - {told}", soft_wrap=True)
    for note in notes_of(outcome):
        console.print(f"  - {escape(note)}", soft_wrap=True)
    if args.robustness:
        print_section(console, luck_section(outcome.evidence))
    if lived is not None:
        title = f"lived bar by bar; from all bars at once it differs by {lived.gap:.1e} at most"
        days = [
            [str(day)[:10], *(shown(row[name], form) for name, form in LIVED.items())]
            for day, row in lived.days.iterrows()
        ]
        print_table(console, title, ["session", *LIVED], days)


def print_table(console: Console, title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table, its first column to the left."""
    table = Table(title=escape(title), title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(escape(head), justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_section(console: Console, section: Section) -> None:
    """Print the tables of a report's section; a drawing has no place on a terminal."""
    for block in section.blocks:
        if isinstance(block, charts.Table):
            print_table(console, block.title, block.columns, ([c.text for c in row] for row in block.rows))


def shown(value: float | None, style: str) -> str:
    """Return a figure for a table; a dash where it is undefined."""
    return "-" if value is None else format(value, style)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Make every backtest, then write and print: nothing is written where one of them fails."""
    outcomes = make(args, settings)
    lives = [service.live(o, args.days or DEFAULT_DAYS) if args.forward_sim else None for o in outcomes]
    root, moment = settings.results_dir, f"{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
    pairs = list(zip(outcomes, lives, strict=True))
    try:
        results = [write_results(root / f"{o.bundle.symbol}_{moment}", o, lived, args) for o, lived in pairs]
        records = [compared(outcome, told) for outcome, told in zip(outcomes, results, strict=True)]
        folder = root / f"comparison_{moment}"
        beside = write_comparison(folder, outcomes, records, args) if args.compare else {}
    except OSError as error:
        raise StorageError(f"cannot write {root}: {error.strerror}") from error
    if args.json:
        told = results[0] if len(results) == 1 else {**beside, "results": results}
        sys.stdout.write(json.dumps(told, allow_nan=False) + "\n")
        return
    console = Console()
    for outcome, lived in pairs:
        print_outcome(console, outcome, lived, args)
    if args.compare:
        print_section(console, comparison_report(outcomes, records).sections[0])
    for told in (*results, beside):
        for name in ("files", "report"):
            if name in told:
                console.print(f"{name}: {escape(str(told[name]))}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the backtest; return the exit code that `utils.base` lists."""
    args = build_parser().parse_args(argv)
    settings = read_settings()
    configure_logging("WARNING" if args.json else settings.log_level)
    try:
        run(args, settings)
    except AIStocksError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
