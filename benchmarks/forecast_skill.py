"""Out-of-sample skill of the pooled recipe on the series of a folder, refitted yearly.

::

    python benchmarks/forecast_skill.py [--horizons 1,5] [--leave-out] [--context] [--json] [--directory DIR]
    python benchmarks/forecast_skill.py --models gbm,lstm,ensemble,stacking [--symbols AAPL,JPM] [--epochs 10]

The figure that counts is the information coefficient over time: the rank correlation, by symbol, of the
signal with what happened, in units of volatility; then the mean over symbols. ``--leave-out`` also
forecasts each fifth of the symbols with a model of the others. ``--models`` sets the kinds of model side by
side, on the rows that all of them forecast, for a handful of symbols: the boosters learn from the whole
folder, the network from these symbols alone, because of what it costs; both are joined as they are served,
symbol by symbol, by what was known before each row. ``--context`` adds the optional features: ^VIX
(``VIX.csv``) and the mean of the universe as the market. The symbols were chosen by somebody who knew which
companies would last: skill does not profit from that directly, returns would.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _table import Bar, at_least, at_most, finish, load_folder, parser_of, symbols_in, within
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from data.data_splitter import WalkForwardSplit
from data.target_engineering import Dataset, build_dataset, universe_mean
from inference.ensemble import EMBARGO_BARS, SignalRows, SimpleEnsemble, meta_features
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, NetworkConfig, RecipeConfig, Sequences
from training.train_ensemble import CommonRows, MetaConfig, walk_meta
from training.train_lstm import LSTMRecipe
from training.trainer import begin_with_others
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

FIRST, LAST, RECENT = "2006-01-01", "2025-12-31", "2016-01-01"
# Least mean IC by horizon; at others it must only be positive.
LEAST_IC = {1: 0.036, 5: 0.033}
LEAVE_OUT_LOSS, SLOPE, LIMIT_S = 0.004, (0.8, 1.2), 300.0
N_GROUPS = 5
MODELS = ("gbm", "lstm", "ensemble", "stacking", "xgb-meta")
HANDFUL = "AAPL,JPM,KO,MSFT,XOM"
# What the ensemble may lose to the boosters.
ENSEMBLE_LOSS = 0.001


def panel_of(
    directory: Path, horizon_bars: int, *, context: bool = False, symbols: Sequence[str] = ()
) -> Dataset:
    """Return the panel through the last year that is scored."""
    panel = load_folder(directory, symbols or symbols_in(directory))
    frames = {symbol: bars.frame.loc[:LAST] for symbol, bars in panel.items()}
    if not context:
        return build_dataset(frames, horizon_bars)
    vix = load_folder(directory, ["VIX"])["VIX"].frame
    return build_dataset(frames, horizon_bars, vix=vix, market=universe_mean(frames))


def walk(data: Dataset, config: RecipeConfig) -> pd.DataFrame:
    """Return the resolved rows from the first scored year on; earlier folds serve to calibrate."""
    data = begin_with_others(data, config.leave_out)
    record = WalkForwardValidator(WalkForwardConfig()).run(data, GBMRecipe(config)).record
    return record[record["realised_log"].notna() & (record["date"] >= FIRST)]


def information_coefficients(record: pd.DataFrame, least_rows: int = 200) -> dict[str, float]:
    """Return each symbol's rank correlation of signal and outcome over time; symbols of few rows left out."""
    found = {}
    for symbol, rows in record.groupby("symbol"):
        if len(rows) >= least_rows:
            outcome = rows["realised_log"] / rows["sigma_log"]
            found[str(symbol)] = float(spearmanr(rows["raw_scaled"], outcome).statistic)
    return found


def slope_of(record: pd.DataFrame, *, over_drift: bool = False) -> float:
    """Return the slope of outcome on calibrated forecast, in volatilities, over all rows.

    ``over_drift`` takes the drift forecast off both: twenty years hold one estimate of a drift, so that its
    part of the slope is luck; what the model says beyond it is what calibration can answer for.
    """
    if over_drift:
        drift = record["baseline_log"]
        record = record.assign(
            predicted_log=record["predicted_log"] - drift, realised_log=record["realised_log"] - drift
        )
    sigma = _floats(record, "sigma_log")
    return float(
        np.polyfit(_floats(record, "predicted_log") / sigma, _floats(record, "realised_log") / sigma, 1)[0]
    )


def _floats(frame: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    return np.asarray(frame[name], dtype=np.float64)


def measure(directory: Path, horizon_bars: int, *, leave_out: bool, context: bool) -> dict[str, Any]:
    """Score one horizon."""
    data = panel_of(directory, horizon_bars, context=context)
    config = RecipeConfig(search=SearchConfig(n_trials=0))
    start = time.perf_counter()
    record = walk(data, config)
    seconds = time.perf_counter() - start
    by_symbol = information_coefficients(record)
    ic = float(np.mean(list(by_symbol.values())))
    year = record["date"].dt.year
    slope = slope_of(record, over_drift=True)
    found: dict[str, Bar] = {
        "ic": at_least(ic, LEAST_IC.get(horizon_bars, 0.0)),
        "slope_over_drift": within(slope, SLOPE),
        "walk_forward_s": at_most(seconds, LIMIT_S),
    }
    if leave_out:
        rows = []
        for group in range(N_GROUPS):
            apart = tuple(data.symbols[group::N_GROUPS])
            scored = walk(data, replace(config, leave_out=apart))
            rows.append(scored[scored["symbol"].isin(apart)])
        elsewhere = float(np.mean(list(information_coefficients(pd.concat(rows)).values())))
        found["ic_left_out"] = at_least(elsewhere, LEAST_IC.get(horizon_bars, ic) - LEAVE_OUT_LOSS)
    recent = information_coefficients(record[record["date"] >= RECENT])
    return {
        "bars": found,
        "notes": {
            "symbols": len(by_symbol),
            "rows": len(record),
            "share_positive": float(np.mean([value > 0 for value in by_symbol.values()])),
            "ic_since_2016": float(np.mean(list(recent.values()))),
            "slope_over_drift_since_2016": slope_of(record[record["date"] >= RECENT], over_drift=True),
            "slope_with_drift": slope_of(record),
            "by_year": {
                int(one): float(np.mean(list(information_coefficients(rows).values())))
                for one, rows in record.groupby(year)
            },
            "by_symbol": by_symbol,
        },
    }


def side_by_side(
    directory: Path, horizon_bars: int, *, models: Sequence[str], symbols: Sequence[str], epochs: int
) -> dict[str, Any]:
    """Score kinds of model on the rows that all of them forecast."""
    start = time.perf_counter()
    everything, few = panel_of(directory, horizon_bars), panel_of(directory, horizon_bars, symbols=symbols)
    validator = WalkForwardValidator(WalkForwardConfig())
    config = NetworkConfig(epochs=epochs, refit_every_folds=5)
    boosters = GBMRecipe(RecipeConfig(search=SearchConfig(n_trials=0)))
    records = {
        "gbm": validator.run(everything, boosters).record,
        "lstm": validator.run(few, LSTMRecipe(config, Sequences(few))).record,
    }
    bars = load_folder(directory, symbols)
    rows = []
    for symbol in symbols:
        own = {name: one[one["symbol"] == symbol].set_index("date") for name, one in records.items()}
        rows.append(joined(own, bars[symbol].frame.loc[:LAST], horizon_bars, models).assign(symbol=symbol))
    scored = pd.concat(rows).dropna(subset=[*models, "outcome"])
    scored = scored[scored.index >= FIRST]
    found = {
        name: {str(symbol): _rank_correlation(each, name) for symbol, each in scored.groupby("symbol")}
        for name in models
    }
    means = {name: float(np.mean(list(by_symbol.values()))) for name, by_symbol in found.items()}
    shown = "ensemble" if "ensemble" in models else models[0]
    bars_met: dict[str, Bar] = {}
    if {"gbm", "ensemble"} <= set(models):
        bars_met["ic_ensemble"] = at_least(means["ensemble"], means["gbm"] - ENSEMBLE_LOSS)
    return {
        "bars": bars_met,
        "notes": {
            "symbols": len(symbols),
            "rows": len(scored),
            **{f"ic_of_{name}": ic for name, ic in means.items()},
            **{
                f"{name}_ahead_of_gbm_on": float(
                    np.mean([found[name][symbol] > found["gbm"][symbol] for symbol in symbols])
                )
                for name in models
                if name != "gbm" and "gbm" in models
            },
            "signal_correlation": float(scored[["gbm", "lstm"]].corr(method="spearman").iloc[0, 1]),
            "mean_weight_of_lstm": float(scored["weight_lstm"].mean()),
            "seconds": time.perf_counter() - start,
            "by_year": {
                int(one): float(
                    np.mean([_rank_correlation(own, shown) for _symbol, own in each.groupby("symbol")])
                )
                for one, each in scored.groupby(pd.DatetimeIndex(scored.index).year)
            },
            "by_symbol": found,
        },
    }


def joined(
    own: dict[str, pd.DataFrame], bars: pd.DataFrame, horizon_bars: int, models: Sequence[str]
) -> pd.DataFrame:
    """Join one symbol's records as they are served; return every model's signal and what came, by session."""
    both = own["gbm"].join(own["lstm"]["raw_scaled"].rename("lstm"), how="inner")
    date = np.asarray(both.index, dtype="datetime64[D]")
    label_end = np.asarray(both["label_end"], dtype="datetime64[D]")
    outcome = _floats(both, "realised_log") / _floats(both, "sigma_log")
    signals = {"gbm": _floats(both, "raw_scaled"), "lstm": _floats(both, "lstm")}
    rows = SignalRows(
        signals=np.column_stack(list(signals.values())),
        outcome=outcome,
        is_out_of_sample=np.ones(len(both), dtype=bool),
        known_from=np.searchsorted(date, label_end) + EMBARGO_BARS,
        horizon_bars=horizon_bars,
    )
    weights, simple = SimpleEnsemble().weigh(rows, list(signals))
    found = pd.DataFrame({**signals, "ensemble": simple, "outcome": outcome}, index=both.index)
    found["weight_lstm"] = weights[:, 1]
    whole = {name: np.asarray(found[name].reindex(bars.index), dtype=np.float64) for name in signals}
    common = CommonRows(
        features=meta_features(bars, whole).loc[both.index],
        simple=simple,
        outcome=outcome,
        date=date,
        label_end=label_end,
        horizon_bars=horizon_bars,
    )
    config = MetaConfig(walk_forward=WalkForwardSplit(test_bars=126, min_train_bars=504))
    for method in ("stacking", "xgb-meta"):
        if method in models:
            found[method] = walk_meta(method, common, config)
    return found


def _rank_correlation(rows: pd.DataFrame, name: str) -> float:
    return float(spearmanr(rows[name], rows["outcome"]).statistic)


def print_tables(found: dict[int, dict[str, Any]]) -> None:
    """Print the figures, and the years side by side."""
    console = Console()
    table = Table(title=f"Out of sample, {FIRST} to {LAST}", title_justify="left")
    for name in ("horizon", "measure", "value", "limit", "met"):
        table.add_column(name)
    for horizon, one in found.items():
        for name, bar in one["bars"].items():
            met = "ok" if bar["ok"] else "MISSED"
            table.add_row(str(horizon), name, f"{bar['value']:.4f}", bar["limit"], met)
        for name, value in one["notes"].items():
            if isinstance(value, int | float):
                table.add_row(str(horizon), name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    years = Table(title="Mean IC by year", title_justify="left")
    years.add_column("year")
    for horizon in found:
        years.add_column(f"h={horizon}")
    for year in next(iter(found.values()))["notes"]["by_year"]:
        years.add_row(
            str(year), *(f"{one['notes']['by_year'].get(year, np.nan):.4f}" for one in found.values())
        )
    console.print(years)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--horizons", default="1,5", help="bars ahead, with commas")
    parser.add_argument("--leave-out", action="store_true", help="also forecast symbols that trained nothing")
    parser.add_argument("--context", action="store_true", help="with the optional features")
    parser.add_argument("--models", type=models_of, default=("gbm",), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--symbols", default=HANDFUL, help="whose models are set side by side")
    parser.add_argument("--epochs", type=int, default=10, help="of the network, at most")
    return parser


def models_of(text: str) -> tuple[str, ...]:
    """Read kinds of model of the command line."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(MODELS):
        raise argparse.ArgumentTypeError(f"no model {', '.join(sorted(unknown))}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Print the skill; exit 1 when a limit is missed."""
    args = build_parser().parse_args(argv)
    horizons = [int(text) for text in args.horizons.split(",")]
    found = {
        h: measure(args.directory, h, leave_out=args.leave_out, context=args.context)
        if args.models == ("gbm",)
        else side_by_side(
            args.directory, h, models=args.models, symbols=args.symbols.split(","), epochs=args.epochs
        )
        for h in horizons
    }
    print_tables(found)
    bars = (bar for one in found.values() for bar in one["bars"].values())
    return finish(found, bars, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
