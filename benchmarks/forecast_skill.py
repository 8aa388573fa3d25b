"""Out-of-sample skill of the pooled recipe on the series of a folder, refitted yearly.

::

    python benchmarks/forecast_skill.py [--horizons 1,5] [--leave-out] [--context] [--json] [--directory DIR]
    python benchmarks/forecast_skill.py --models gbm,lstm,ensemble,stacking [--symbols all] [--epochs 6]
        [--network-refit-years 4] [--network-rows 10000]

The figure that counts is the information coefficient over time: the rank correlation, by symbol, of the
signal with what happened, in units of volatility; then the mean over symbols. ``--leave-out`` also
forecasts each fifth of the symbols with a model of the others. ``--context`` adds the optional features:
^VIX (``VIX.csv``) and the mean of the universe as the market. The symbols were chosen by somebody who knew
which companies would last: skill does not profit from that directly, returns would.

``--models`` sets the kinds of model side by side, symbol by symbol, on the rows that all of them forecast;
members are joined as they are served, by what was known before each row. The boosters learn as always: from
the whole folder, every year. The network costs more: it is fitted every four years, in few epochs, on about
10,000 rows of ``--symbols``, whole sessions evenly drawn (its sequences hold every bar all the same). What it
says of a row still comes from earlier rows only. A network trained longer, on all rows, may do better.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _table import Bar, at_least, at_most, finish, load_folder, parser_of, symbols_in, within
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from data.data_splitter import WalkForwardSplit, walk_rows
from data.target_engineering import Dataset, build_dataset, universe_mean
from evaluation.metrics import overlap_error
from inference.ensemble import (
    EMBARGO_BARS,
    Method,
    SignalRows,
    SimpleEnsemble,
    meta_features,
)
from inference.intervals import FloatArray, IntArray
from inference.load_lstm_model import Sequences
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, NetworkConfig, RecipeConfig
from training.train_ensemble import CommonRows, MetaConfig, walk_meta
from training.train_lstm import LSTMRecipe
from training.trainer import begin_with_others
from utils.base import at_least as at_least_of
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

FIRST, LAST, RECENT = "2006-01-01", "2025-12-31", "2016-01-01"
NETWORK_FIRST = "2001-01-01"
# Least mean IC by horizon; at others it must only be positive.
LEAST_IC = {1: 0.036, 5: 0.033}
LEAVE_OUT_LOSS, SLOPE, LIMIT_S = 0.004, (0.8, 1.2), 300.0
N_GROUPS = 5
META_METHODS: tuple[Method, ...] = ("stacking", "xgb-meta")
MODELS = ("gbm", "lstm", "ensemble", *META_METHODS)
# Indices teach, but nobody can buy them.
NOT_TRADED = frozenset({"IXIC"})
# What the ensemble may lose to the boosters.
ENSEMBLE_LOSS = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """How often the network is fitted, on how many rows, and in how many epochs at most."""

    refit_years: int = 4
    rows: int = 10_000
    epochs: int = 6

    def stride(self, n_rows: int) -> int:
        """Return of how many sessions one is learned."""
        return -(-n_rows // self.rows)

    def config(self, stride: int) -> NetworkConfig:
        """Return its recipe: small batches and a short warm-up leave steps enough to few sequences."""
        return NetworkConfig(
            epochs=self.epochs,
            batch_size=256,
            warmup_epochs=2,
            patience_epochs=1,
            # Ages are counted in the sessions that are learned.
            weight_half_life_sessions=NetworkConfig().weight_half_life_sessions / stride,
        )

    def split(self, sessions: npt.NDArray[np.datetime64]) -> WalkForwardSplit:
        """Return its folds: the first forecasts are early enough to teach the first weights that count."""
        yearly, before = WalkForwardSplit(), int(np.searchsorted(sessions, np.datetime64(NETWORK_FIRST)))
        return WalkForwardSplit(
            test_bars=yearly.test_bars * self.refit_years, min_train_bars=max(yearly.min_train_bars, before)
        )

    def words(self, n_symbols: int) -> str:
        """Return what the reader of the figures has to know of it."""
        return (
            f"the network learned from {n_symbols} series, every {self.refit_years} years, from about "
            f"{self.rows} rows (whole sessions, evenly drawn) in at most {self.epochs} epochs; the boosters "
            "from the folder, every year, all rows: kinds of model at what they cost, not at their best"
        )


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


def information_coefficients(
    record: pd.DataFrame, least_rows: int = 200, *, signal: str = "raw_scaled"
) -> dict[str, float]:
    """Return each symbol's rank correlation of signal and outcome over time; symbols of few rows left out.

    A signal that never varies, as that of a meta-learner without weights, knows nothing: zero.
    """
    found = {}
    for symbol, rows in record.groupby("symbol"):
        if len(rows) >= least_rows:
            outcome = rows["realised_log"] / rows["sigma_log"]
            varies = float(np.ptp(_floats(rows, signal))) > 0
            found[str(symbol)] = float(spearmanr(rows[signal], outcome).statistic) if varies else 0.0
    return found


def slope_of(record: pd.DataFrame, *, over_drift: bool = False) -> float:
    """Return the slope of outcome on calibrated forecast, in volatilities, over all rows.

    ``over_drift`` takes the drift forecast off both: what the model says beyond it.
    """
    said, came = _in_volatilities(record, over_drift=over_drift)
    return float(np.polyfit(said, came, 1)[0])


def slope_error(record: pd.DataFrame, horizon_bars: int) -> float:
    """Return the standard error of `slope_of`: symbols move together, and labels overlap."""
    said, came = _in_volatilities(record)
    slope, level = np.polyfit(said, came, 1)
    centred = said - said.mean()
    session = pd.factorize(record["date"], sort=True)[0]
    by_session = np.bincount(session, weights=centred * (came - level - slope * said)).astype(np.float64)
    return overlap_error(by_session, horizon_bars) / float(centred @ centred)


def _in_volatilities(record: pd.DataFrame, *, over_drift: bool = False) -> tuple[FloatArray, FloatArray]:
    """Return what was forecast and what came, (n,), with or without the drift."""
    sigma, drift = _floats(record, "sigma_log"), _floats(record, "baseline_log") * over_drift
    said, came = (_floats(record, name) - drift for name in ("predicted_log", "realised_log"))
    return said / sigma, came / sigma


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
    found: dict[str, Bar] = {
        "ic": at_least(ic, LEAST_IC.get(horizon_bars, 0.0)),
        "slope": within(slope_of(record), SLOPE),
        "slope_over_drift": within(slope_of(record, over_drift=True), SLOPE),
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
            "slope_error": slope_error(record, horizon_bars),
            "by_year": {
                int(one): {"gbm": float(np.mean(list(information_coefficients(rows).values())))}
                for one, rows in record.groupby(year)
            },
            "by_symbol": by_symbol,
        },
    }


def side_by_side(
    directory: Path, horizon_bars: int, *, models: Sequence[str], symbols: Sequence[str], network: NetworkPlan
) -> dict[str, Any]:
    """Score kinds of model on the rows that all of them forecast."""
    start = time.perf_counter()
    everything = panel_of(directory, horizon_bars)
    is_all = set(symbols) == set(everything.symbols)
    boosters = walk_boosters(everything)
    lstm = walk_network(everything if is_all else panel_of(directory, horizon_bars, symbols=symbols), network)
    bars = load_folder(directory, [name for name in symbols if name not in NOT_TRADED])
    rows = [
        joined(
            boosters[boosters["symbol"] == symbol].set_index("date"),
            lstm[lstm["symbol"] == symbol].set_index("date")["raw_scaled"],
            own.frame.loc[:LAST],
            horizon_bars,
            models,
        ).assign(symbol=symbol)
        for symbol, own in bars.items()
    ]
    scored = pd.concat(rows).dropna(subset=[*models, "realised_log"])
    scored = scored[scored.index >= FIRST]
    found = {name: information_coefficients(scored, signal=name) for name in models}
    means = {name: float(np.mean(list(by_symbol.values()))) for name, by_symbol in found.items()}
    bars_met: dict[str, Bar] = {}
    if {"gbm", "ensemble"} <= set(models):
        bars_met["ic_ensemble"] = at_least(means["ensemble"], means["gbm"] - ENSEMBLE_LOSS)
    return {
        "bars": bars_met,
        "notes": {
            "symbols": len(found[models[0]]),
            "rows": len(scored),
            **{f"ic_of_{name}": ic for name, ic in means.items()},
            **{f"ic_of_{name}_since_2016": mean_ic(scored[scored.index >= RECENT], name) for name in models},
            **beside_boosters(scored, found),
            "signal_correlation": float(scored[["gbm", "lstm"]].corr(method="spearman").iloc[0, 1]),
            "mean_weight_of_lstm": float(scored["weight_lstm"].mean()),
            "rows_without_lstm": float((scored["weight_lstm"] == 0).mean()),
            "seconds": time.perf_counter() - start,
            "by_year": by_year(scored, models),
            "weight_by_year": {
                int(year): float(each)
                for year, each in scored["weight_lstm"].groupby(_year_of(scored)).mean().items()
            },
            "by_symbol": found,
        },
    }


def walk_boosters(data: Dataset) -> pd.DataFrame:
    """Return the boosters' record of all rows from the first fold on."""
    recipe = GBMRecipe(RecipeConfig(search=SearchConfig(n_trials=0)))
    return WalkForwardValidator(WalkForwardConfig()).run(data, recipe).record


def walk_network(data: Dataset, network: NetworkPlan) -> pd.DataFrame:
    """Return date, symbol and ``raw_scaled`` of the rows that the network forecasts out of sample."""
    sequences = Sequences(data)
    session = np.unique(data.date, return_inverse=True)[1]
    label_end = np.where(data.labelled, data.label_end, np.datetime64("NaT"))

    def fit(learned: IntArray) -> Callable[[IntArray], FloatArray]:
        stride = network.stride(len(learned))
        some = data.take(learned[session[learned] % stride == 0])
        fitted = LSTMRecipe(network.config(stride), sequences).fit(some, fold=0, earlier=pd.DataFrame())
        return lambda rows: fitted.predict(data.take(rows)).raw_scaled

    said = walk_rows(fit, data.date, label_end, network.split(data.sessions), horizon_bars=data.horizon_bars)
    symbol = np.asarray(data.symbols)[data.symbol_code]
    return pd.DataFrame({"date": pd.DatetimeIndex(data.date), "symbol": symbol, "raw_scaled": said}).dropna()


def mean_ic(scored: pd.DataFrame, name: str) -> float:
    """Return the mean over symbols of one model's information coefficient."""
    return float(np.mean(list(information_coefficients(scored, signal=name).values())))


def by_year(scored: pd.DataFrame, models: Sequence[str]) -> dict[int, dict[str, float]]:
    """Return the mean over symbols of every model's information coefficient, year by year."""
    years = scored.groupby(_year_of(scored))
    return {int(year): {name: mean_ic(rows, name) for name in models} for year, rows in years}


def beside_boosters(scored: pd.DataFrame, found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how far each model lies before the boosters, its standard error over years, and how often."""
    if "gbm" not in found:
        return {}
    told = {}
    for name in (one for one in found if one != "gbm"):
        ahead = pd.Series(found[name]) - pd.Series(found["gbm"])
        yearly = np.array([one[name] - one["gbm"] for one in by_year(scored, ["gbm", name]).values()])
        told[f"{name}_ahead_of_gbm_by"] = float(ahead.mean())
        told[f"{name}_ahead_of_gbm_error"] = float(yearly.std(ddof=1) / np.sqrt(len(yearly)))
        told[f"{name}_ahead_of_gbm_on"] = float((ahead > 0).mean())
    return told


def _year_of(scored: pd.DataFrame) -> "pd.Index[int]":
    return pd.DatetimeIndex(scored.index).year


def joined(
    gbm: pd.DataFrame, lstm: pd.Series, bars: pd.DataFrame, horizon_bars: int, models: Sequence[str]
) -> pd.DataFrame:
    """Join one symbol's forecasts as they are served; return all signals and what came, by session."""
    both = gbm.join(lstm.rename("lstm"), how="inner")
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
    found = both[["realised_log", "sigma_log"]].assign(**signals, ensemble=simple, weight_lstm=weights[:, 1])
    whole = {name: np.asarray(found[name].reindex(bars.index), dtype=np.float64) for name in signals}
    common = CommonRows(
        features=meta_features(bars, whole).loc[both.index],
        simple=simple,
        outcome=outcome,
        date=date,
        label_end=label_end,
        horizon_bars=horizon_bars,
    )
    for method in META_METHODS:
        if method in models:
            found[method] = walk_meta(method, common, MetaConfig())
    return found


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
    by_horizon = {horizon: one["notes"]["by_year"] for horizon, one in found.items()}
    columns = [(horizon, name) for horizon, one in by_horizon.items() for name in next(iter(one.values()))]
    for horizon, name in columns:
        years.add_column(f"h={horizon} {name}")
    for year in next(iter(by_horizon.values())):
        told = (by_horizon[horizon].get(year, {}).get(name, np.nan) for horizon, name in columns)
        years.add_row(str(year), *(f"{value:.4f}" for value in told))
    console.print(years)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--horizons", default="1,5", help="bars ahead, with commas")
    parser.add_argument("--leave-out", action="store_true", help="also forecast symbols that trained nothing")
    parser.add_argument("--context", action="store_true", help="with the optional features")
    parser.add_argument("--models", type=models_of, default=("gbm",), help=f"of {', '.join(MODELS)}")
    network = NetworkPlan()
    more = parser.add_argument_group("with --models")
    more.add_argument("--symbols", default="all", help="who is scored and teaches the network, with commas")
    for name, words in {
        "network_refit_years": "years between two fits of the network",
        "network_rows": "rows that a fit of the network learns from, about",
        "epochs": "of the network, at most",
    }.items():
        default = getattr(network, name.removeprefix("network_"))
        more.add_argument(f"--{name.replace('_', '-')}", type=at_least_of(1), default=default, help=words)
    return parser


def models_of(text: str) -> tuple[str, ...]:
    """Read kinds of model of the command line."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(MODELS):
        raise argparse.ArgumentTypeError(f"no model {', '.join(sorted(unknown))}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Print the skill; exit 1 when a limit is missed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.models != ("gbm",) and (args.leave_out or args.context):
        parser.error("--leave-out and --context measure the boosters alone")
    horizons = [int(text) for text in args.horizons.split(",")]
    if args.models == ("gbm",):
        found = {
            h: measure(args.directory, h, leave_out=args.leave_out, context=args.context) for h in horizons
        }
    else:
        symbols = symbols_in(args.directory) if args.symbols == "all" else args.symbols.split(",")
        network = NetworkPlan(
            refit_years=args.network_refit_years, rows=args.network_rows, epochs=args.epochs
        )
        print(network.words(len(symbols)), flush=True)
        found = {
            h: side_by_side(args.directory, h, models=args.models, symbols=symbols, network=network)
            for h in horizons
        }
    print_tables(found)
    bars = (bar for one in found.values() for bar in one["bars"].values())
    return finish(found, bars, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
