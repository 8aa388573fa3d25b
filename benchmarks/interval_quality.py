"""Forecast bands of the product against the usual volatility models, out of sample on the series of a folder.

::

    python benchmarks/interval_quality.py [--quick] [--symbols AAPL,KO] [--horizons 1,5,20] [--json] [--fit]

Measured is what `BundleForecaster` draws: `forecast_volatility` and `calibrate_band`. The centre of each band
is a forecast without skill (the mean of all series' standardised outcomes known before the year), so that
scale and shape are what is compared. The rivals:

garch
    GARCH(1,1) with Student's t (package arch) on all days before the year, filtered daily; h-day quantiles by
    16,000 simulated paths from nine levels of variance.
ewma
    Exponential variance of close-to-close returns (decay .94), with the product's own calibration.
history
    Quantiles of the h-day returns of the last 250 days.

The loss is the mean pinball loss over nine quantiles. The weights of the product's volatility were fitted on
rows before 2006 (``--fit`` prints them anew); its few constants of calibration were chosen on these series.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _table import finish, load_folder, parser_of, symbols_in, within
from arch import arch_model
from numba import njit
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from scipy.stats import t as student

from inference.intervals import (
    ANCHORS_BARS,
    DECILES,
    DEGREES_OF_FREEDOM,
    Calibrated,
    calibrate_band,
    forecast_volatility,
    scale_log,
    volatility_features,
)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

NO_ASSETS = {"VIX", "IXIC"}
YEARS = range(2006, 2026)
QUICK_SYMBOLS = ("AAPL", "AIG", "KO", "LQD", "SPY", "XLE")
RIVALS = ("garch", "ewma", "history")
POOLED, BY_SYMBOL, BY_YEAR = (0.79, 0.81), (0.76, 0.84), (0.74, 0.86)
# A year of few symbols is a handful of independent months: its coverage is luck, and has no limit.
LEAST_FOR_YEARS = 30
# Least share of symbols on which the loss is smaller, and least mean gain over GARCH.
LEAST_SHARE, LEAST_SHARE_FAR, LEAST_GAIN = 0.9, 0.8, {1: 0.007}
FAR_HORIZONS, SPEED_SYMBOL, LIMIT_MS = (60, 126, 252), "AAPL", 50.0
EWMA_DECAY, HISTORY_DAYS, PATHS, LEVELS = 0.94, 250, 8_000, 9
FIT_SKIPS_ROWS, FIT_ENDS = 300, "2006-01-01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One symbol: bars, its close as logs, each bar's year, and the product's volatility forecast."""

    bars: pd.DataFrame
    close_log: FloatArray
    year: npt.NDArray[np.int64]
    volatility: FloatArray

    def ahead_log(self, horizon_bars: int) -> FloatArray:
        """Return the log return over the next bars, (n,), NaN where it is not known yet."""
        out = np.full(len(self.close_log), np.nan)
        out[:-horizon_bars] = self.close_log[horizon_bars:] - self.close_log[:-horizon_bars]
        return out


def load(directory: Path) -> dict[str, Series]:
    """Return all tradable series through the last year that is scored."""
    symbols = symbols_in(directory, without=NO_ASSETS)
    found = {}
    for symbol, loaded in load_folder(directory, symbols, jobs=1).items():
        bars = loaded.frame.loc[: str(YEARS[-1])]
        found[symbol] = Series(
            bars=bars,
            close_log=np.log(np.asarray(bars["Close"], dtype=np.float64)),
            year=np.asarray(pd.DatetimeIndex(bars.index).year, dtype=np.int64),
            volatility=forecast_volatility(bars),
        )
    return found


def drift_by_year(panel: Mapping[str, Series], horizon_bars: int) -> dict[int, float]:
    """Return the mean outcome in scales over all series, by the first year that may know it."""
    total = dict.fromkeys(range(1900, YEARS[-1] + 2), np.zeros(2))
    for series in panel.values():
        z = series.ahead_log(horizon_bars) / scale_log(series.volatility, horizon_bars)
        known_in = np.append(series.year[horizon_bars:], np.full(horizon_bars, YEARS[-1] + 1))
        for year in np.unique(known_in):
            values = z[(known_in == year) & np.isfinite(z)]
            total[int(year)] = total[int(year)] + np.array([values.sum(), len(values)])
    years = sorted(total)
    sums = np.cumsum([total[year] for year in years], axis=0)
    return {year + 1: float(s / max(n, 1.0)) for year, (s, n) in zip(years, sums, strict=True)}


def calibrated(
    series: Series, scale_log: FloatArray, drift: Mapping[int, float], horizon_bars: int
) -> tuple[FloatArray, Calibrated]:
    """Return the product's deciles of the h-day log return around the drift, (n, 9), on a given scale."""
    centre = np.array([drift[int(year)] for year in series.year]) * scale_log
    band = calibrate_band(centre, scale_log, series.ahead_log(horizon_bars), horizon_bars=horizon_bars)
    return centre[:, np.newaxis] + band.deciles_z * scale_log[:, np.newaxis], band


def ewma_scale(series: Series, horizon_bars: int) -> FloatArray:
    """Return the scale of the t distribution with the exponential variance, (n,)."""
    squared = pd.Series(np.diff(series.close_log, prepend=series.close_log[0]) ** 2)
    variance = squared.iloc[1:].ewm(alpha=1.0 - EWMA_DECAY).mean().reindex(squared.index).bfill()
    of_scale = (DEGREES_OF_FREEDOM - 2.0) / DEGREES_OF_FREEDOM
    return np.asarray(np.sqrt(variance.clip(lower=1e-8) * horizon_bars * of_scale), dtype=np.float64)


def history_quantiles(series: Series, horizon_bars: int) -> FloatArray:
    """Return quantiles of the last h-day returns known at each bar, (n, 9)."""
    known = (
        pd.Series(series.ahead_log(horizon_bars)).shift(horizon_bars).rolling(HISTORY_DAYS, HISTORY_DAYS // 2)
    )
    return np.column_stack([known.quantile(level).to_numpy() for level in DECILES])


@njit(cache=True)
def simulate(shocks: FloatArray, start: FloatArray, terms: tuple[float, float, float]) -> FloatArray:
    """Return the summed returns after each step of GARCH paths, (levels, paths, steps)."""
    paths, steps = shocks.shape
    out = np.empty((len(start), paths, steps))
    for level in range(len(start)):
        for path in range(paths):
            variance, total = start[level], 0.0
            for step in range(steps):
                move = np.sqrt(variance) * shocks[path, step]
                total += move
                variance = terms[0] + terms[1] * move * move + terms[2] * variance
                out[level, path, step] = total
    return out


def garch_quantiles(series: Series, horizons: Sequence[int]) -> dict[int, FloatArray]:
    """Return quantiles of GARCH(1,1)-t, refitted before every year, by horizon, (n, 9); NaN before."""
    returns = 100.0 * np.diff(series.close_log, prepend=series.close_log[0])
    found = {horizon: np.full((len(returns), 9), np.nan) for horizon in horizons}
    random = np.random.default_rng(0)
    for year in YEARS:
        rows = np.flatnonzero(series.year == year)
        if not len(rows) or rows[0] < FIT_SKIPS_ROWS // 2:
            continue
        train = returns[1 : rows[0]]
        model = arch_model(train, mean="Constant", vol="GARCH", p=1, q=1, dist="t", rescale=False)
        fitted = model.fit(disp="off", show_warning=False)
        mean, omega, alpha, beta, freedom = (float(value) for value in fitted.params)
        variance = np.empty(len(rows) + 1)
        last = float(fitted.conditional_volatility[-1]) ** 2
        variance[0] = omega + alpha * (train[-1] - mean) ** 2 + beta * last
        for k, row in enumerate(rows):
            variance[k + 1] = omega + alpha * (returns[row] - mean) ** 2 + beta * variance[k]
        shocks = random.standard_t(freedom, size=(PATHS, max(horizons))) * np.sqrt((freedom - 2.0) / freedom)
        level = np.geomspace(variance[1:].min(), variance[1:].max() * 1.0001, LEVELS)
        sums = simulate(np.concatenate([shocks, -shocks]), level, (omega, alpha, beta))
        for horizon, out in found.items():
            unit = np.quantile(sums[:, :, horizon - 1], DECILES, axis=1) / np.sqrt(level)
            if horizon == 1:
                exact = student.ppf(DECILES, freedom) * np.sqrt((freedom - 2.0) / freedom)
                unit = np.repeat(exact[:, np.newaxis], LEVELS, axis=1)
            at = [np.interp(np.log(variance[1:]), np.log(level), one) for one in unit]
            out[rows] = (horizon * mean + np.sqrt(variance[1:])[:, np.newaxis] * np.column_stack(at)) / 100.0
    return found


def pinball(outcome: FloatArray, quantiles: FloatArray) -> float:
    """Return the mean pinball loss over rows and the nine quantiles."""
    miss = outcome[:, np.newaxis] - quantiles
    return float(np.mean(np.maximum(DECILES * miss, (DECILES - 1.0) * miss)))


def measure_symbol(
    series: Series, horizon: int, drift: Mapping[int, float], garch: FloatArray
) -> pd.DataFrame:
    """Return the scored rows of one symbol: year, inside the band or not, probability of a rise, losses."""
    outcome = series.ahead_log(horizon)
    ours, band = calibrated(series, scale_log(series.volatility, horizon), drift, horizon)
    rivals = {
        "garch": garch,
        "ewma": calibrated(series, ewma_scale(series, horizon), drift, horizon)[0],
        "history": history_quantiles(series, horizon),
    }
    scored = np.isin(series.year, YEARS) & np.isfinite(outcome)
    for quantiles in rivals.values():
        scored &= np.isfinite(quantiles).all(axis=1)
    rows = pd.DataFrame({"year": series.year[scored], "rose": outcome[scored] > 0.0})
    rows["inside"] = ((outcome >= ours[:, 0]) & (outcome <= ours[:, -1]))[scored]
    rows["prob_up"] = band.above[0][scored]
    rows["loss_ours"] = pinball(outcome[scored], ours[scored])
    for name, quantiles in rivals.items():
        rows[f"loss_{name}"] = pinball(outcome[scored], quantiles[scored])
    return rows


def measure(
    panel: Mapping[str, Series], symbols: Sequence[str], garch: Mapping[str, FloatArray], horizon: int
) -> dict[str, Any]:
    """Score one horizon."""
    drift = drift_by_year(panel, horizon)
    rows = pd.concat(
        {symbol: measure_symbol(panel[symbol], horizon, drift, garch[symbol]) for symbol in symbols},
        names=["symbol"],
    )
    by_symbol = rows.groupby("symbol").mean()
    by_year = rows.groupby("year")["inside"].mean()
    gain = {name: 1.0 - by_symbol["loss_ours"] / by_symbol[f"loss_{name}"] for name in RIVALS}
    least = LEAST_SHARE if horizon == 1 else LEAST_SHARE_FAR
    bars = {"coverage": within(float(rows["inside"].mean()), POOLED)}
    judged = [("symbol", by_symbol["inside"], BY_SYMBOL)]
    if len(by_symbol) >= LEAST_FOR_YEARS:
        judged.append(("year", by_year, BY_YEAR))
    for name, values, limits in judged:
        bars[f"coverage_least_{name}"] = within(float(values.min()), limits)
        bars[f"coverage_most_{name}"] = within(float(values.max()), limits)
    for name in RIVALS:
        bars[f"share_better_than_{name}"] = within(float((gain[name] > 0).mean()), (least, 1.0))
    if horizon in LEAST_GAIN:
        bars["gain_over_garch"] = within(float(gain["garch"].mean()), (LEAST_GAIN[horizon], 1.0))
    return {
        "bars": bars,
        "notes": {
            "symbols": len(by_symbol),
            "rows": len(rows),
            **{f"gain_over_{name}": float(gain[name].mean()) for name in RIVALS},
            **{f"least_gain_over_{name}": float(gain[name].min()) for name in RIVALS},
            **rises(rows),
            "coverage_by_year": by_year.to_dict(),
            "coverage_by_symbol": by_symbol["inside"].to_dict(),
            "gain_over_garch_by_symbol": gain["garch"].to_dict(),
        },
    }


def rises(rows: pd.DataFrame) -> dict[str, float]:
    """Return how true the probability of a rise is: its mean, the share of rises, the error over ten bins."""
    bins = pd.qcut(rows["prob_up"], 10, duplicates="drop")
    found = rows.groupby(bins, observed=True)[["prob_up", "rose"]].mean()
    return {
        "prob_up_mean": float(rows["prob_up"].mean()),
        "share_up": float(rows["rose"].mean()),
        "prob_up_error": float((found["prob_up"] - found["rose"]).abs().mean()),
    }


def far_coverage(panel: Mapping[str, Series], symbols: Sequence[str]) -> dict[str, float]:
    """Return the pooled coverage of the 80 % band at horizons that no limit is set for."""
    found = {}
    for horizon in FAR_HORIZONS:
        drift, inside = drift_by_year(panel, horizon), []
        for series in (panel[symbol] for symbol in symbols):
            outcome = series.ahead_log(horizon)
            ours, _ = calibrated(series, scale_log(series.volatility, horizon), drift, horizon)
            scored = np.isin(series.year, YEARS) & np.isfinite(outcome)
            inside.append(((outcome >= ours[:, 0]) & (outcome <= ours[:, -1]))[scored])
        found[f"coverage_h{horizon}"] = float(np.mean(np.concatenate(inside)))
    return found


def speed_ms(series: Series) -> float:
    """Return the time of all that a served forecast needs: volatility and the bands of every anchor."""
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        volatility = forecast_volatility(series.bars)
        for horizon in ANCHORS_BARS:
            outcome = series.ahead_log(horizon)
            calibrate_band(
                np.zeros_like(outcome), scale_log(volatility, horizon), outcome, horizon_bars=horizon
            )
        best = min(best, time.perf_counter() - start)
    return 1_000.0 * best


def fit_weights(panel: Mapping[str, Series], horizon: int) -> FloatArray:
    """Return the weights of `volatility_features` of greatest t likelihood on the rows before `FIT_ENDS`.

    Beyond a month only the level and the long run are fitted: there is too little history for more.
    """
    columns = list(range(7)) if horizon <= 20 else [0, 5]
    rows, moves = [], []
    for series in panel.values():
        base, features = volatility_features(series.bars)
        outcome = series.ahead_log(horizon) / np.sqrt(horizon) / np.exp(0.5 * base)
        kept = np.asarray(series.bars.index < FIT_ENDS) & np.isfinite(outcome)
        kept[: FIT_SKIPS_ROWS + 1] = False
        rows.append(features[kept][:, columns])
        moves.append(outcome[kept])
    x, y = np.concatenate(rows), np.concatenate(moves)

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        half = 0.5 * x @ weights
        u = (y * np.exp(-half)) ** 2 / DEGREES_OF_FREEDOM
        more = DEGREES_OF_FREEDOM + 1.0
        return float(np.mean(half + 0.5 * more * np.log1p(u))), 0.5 * x.T @ (
            1.0 - more * u / (1.0 + u)
        ) / len(y)

    out = np.zeros(7)
    out[columns] = minimize(loss, np.zeros(len(columns)), jac=True, method="L-BFGS-B").x
    return out


def print_tables(found: Mapping[str, dict[str, Any]]) -> None:
    """Print the figures against their limits, and the years side by side."""
    console = Console()
    table = Table(title=f"80 % band and nine quantiles, {YEARS[0]} to {YEARS[-1]}", title_justify="left")
    for name in ("horizon", "measure", "value", "limits", "met"):
        table.add_column(name)
    for horizon, one in found.items():
        for name, bar in one["bars"].items():
            met = "ok" if bar["ok"] else "MISSED"
            table.add_row(horizon, name, f"{bar['value']:.4f}", bar["limit"], met)
        for name, value in one["notes"].items():
            if isinstance(value, int | float):
                table.add_row(horizon, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    by_year = {h: one["notes"]["coverage_by_year"] for h, one in found.items() if h.isdigit()}
    years = Table(title="Coverage of the 80 % band by year of the forecast", title_justify="left")
    for name in ("year", *(f"h={horizon}" for horizon in by_year)):
        years.add_column(name)
    for year in YEARS:
        years.add_row(str(year), *(f"{values.get(year, np.nan):.3f}" for values in by_year.values()))
    console.print(years)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--horizons", default="1,5,20", help="bars ahead, with commas")
    parser.add_argument("--symbols", help="symbols to score, with commas; default: all of the folder")
    parser.add_argument("--quick", action="store_true", help=f"score {','.join(QUICK_SYMBOLS)} only")
    parser.add_argument("--fit", action="store_true", help="print the weights of the volatility, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the quality of the bands; exit 1 when a limit is missed."""
    args = build_parser().parse_args(argv)
    panel = load(args.directory)
    if args.fit:
        for horizon in ANCHORS_BARS:
            print(horizon, ", ".join(f"{weight:.4f}" for weight in fit_weights(panel, horizon)))
        return 0
    wanted = QUICK_SYMBOLS if args.quick else args.symbols.split(",") if args.symbols else tuple(panel)
    unknown = [symbol for symbol in wanted if symbol not in panel]
    if unknown:
        print(f"no series of {', '.join(unknown)} in {args.directory}", file=sys.stderr)
        return 2
    horizons = [int(text) for text in args.horizons.split(",")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arch warns of each year whose likelihood is flat
        garch = {symbol: garch_quantiles(panel[symbol], horizons) for symbol in wanted}
    found = {
        str(h): measure(panel, wanted, {symbol: garch[symbol][h] for symbol in wanted}, h) for h in horizons
    }
    took = speed_ms(panel.get(SPEED_SYMBOL, panel[wanted[0]]))
    found["any"] = {
        "bars": {"bands_ms": within(took, (0.0, LIMIT_MS))},
        "notes": far_coverage(panel, wanted),
    }
    print_tables(found)
    bars = (bar for one in found.values() for bar in one["bars"].values())
    return finish(found, bars, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
