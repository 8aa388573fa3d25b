"""How long all features of AAPL's history take, against TA-Lib on raw arrays and against the package ``ta``.

Reads ``../shared/market/AAPL.csv`` where it is at hand, else seeded bars of the same number. One thread; the
contenders take turns and only time on the processor counts, so that a busy machine slows all of them alike;
medians are compared.

    python benchmarks/features.py [--quick] [--json]
"""

import argparse
import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import talib
from _table import Bar, at_least, at_most, parser_of, show

from data.feature_engineer import engineer_features
from utils.base import PROJECT_ROOT

AAPL = PROJECT_ROOT.parent / "shared" / "market" / "AAPL.csv"
BARS = 11_355
LIMIT_TO_TALIB = 3.0
LIMIT_TA = 40.0
LIMIT_GROWTH = 11.0


def seeded_bars(n: int, seed: int = 7) -> pd.DataFrame:
    """Return random bars with fat tails."""
    rng = np.random.default_rng(seed)
    close = 20.0 * np.exp(np.cumsum(0.0003 + 0.012 * rng.standard_t(5, n)))
    open_ = close * np.exp(0.004 * rng.standard_normal(n))
    high = np.maximum(open_, close) * np.exp(np.abs(0.005 * rng.standard_normal(n)))
    low = np.minimum(open_, close) * np.exp(-np.abs(0.005 * rng.standard_normal(n)))
    volume = np.round(rng.lognormal(16.0, 0.5, n))
    columns = {"Open": open_, "High": high, "Low": low, "Close": close, "Volume": volume}
    return pd.DataFrame(columns, index=pd.bdate_range("1960-01-04", periods=n, name="date"))


def bars_of(path: Path) -> pd.DataFrame:
    """Return adjusted bars of a file in Yahoo's columns."""
    raw = pd.read_csv(path, index_col="Date", parse_dates=True)
    factor = raw["Adj Close"] / raw["Close"]
    prices = raw[["Open", "High", "Low", "Close"]].mul(factor, axis=0)
    return prices.assign(Volume=raw["Volume"].astype(float)).iloc[-BARS:]


def talib_outputs(bars: pd.DataFrame) -> int:
    """Call TA-Lib for 40 outputs on raw arrays; return how many there were."""
    open_, high, low, close, volume = (np.ascontiguousarray(bars[name]) for name in bars.columns)
    hlc = (high, low, close)
    log_close = talib.LN(close)
    ret = np.diff(log_close, prepend=log_close[:1])
    span, body = talib.LN(high / low), talib.LN(close / open_)
    middle = talib.EMA(close, 20)
    width = 2.0 * talib.ATR(*hlc, 10)
    outputs = [
        talib.RSI(close, 14),
        *talib.MACD(close, 12, 26, 9),
        *talib.STOCH(*hlc, fastk_period=14),
        talib.WILLR(*hlc, 14),
        talib.CCI(*hlc, 20),
        *(talib.ROC(close, bars) for bars in (10, 20)),
        *(index(*hlc, 14) for index in (talib.ADX, talib.PLUS_DI, talib.MINUS_DI)),
        talib.ATR(*hlc, 14),
        talib.NATR(*hlc, 14),
        *talib.BBANDS(close, 20),
        talib.STDDEV(close, 20) / close,
        middle + width,
        middle - width,
        talib.OBV(close, volume),
        talib.MFI(*hlc, volume, 14),
        talib.AD(*hlc, volume),
        *(close / talib.SMA(close, bars) - 1.0 for bars in (5, 10, 20, 50, 200)),
        *(close / talib.EMA(close, bars) - 1.0 for bars in (10, 20, 50)),
        ret,
        *(talib.STDDEV(ret, bars) for bars in (5, 10, 20, 60)),
        np.sqrt(talib.SMA(0.5 * span * span - 0.386 * body * body, 20)),
        np.sqrt(talib.SMA(span * span, 20) / 2.773),
        (volume - talib.SMA(volume, 20)) / talib.STDDEV(volume, 20),
    ]
    return len(outputs)


def ta_features(bars: pd.DataFrame) -> None:
    """Compute all features of the package ``ta``."""
    ta = importlib.import_module("ta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ta.add_all_ta_features(
            bars.copy(), open="Open", high="High", low="Low", close="Close", volume="Volume", fillna=True
        )


def seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each call; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Take all times and compare them with their limits."""
    bars = bars_of(AAPL) if AAPL.is_file() else seeded_bars(BARS)
    many = seeded_bars(10 * len(bars))
    repeats = 15 if quick else 61
    times = seconds(
        {
            "features": lambda: engineer_features(bars),
            "talib": lambda: talib_outputs(bars),
            "features_10x": lambda: engineer_features(many),
        },
        repeats,
    )
    bars_out: dict[str, Bar] = {
        "features_to_talib_40": at_most(times["features"] / times["talib"], LIMIT_TO_TALIB),
        "growth_10x_rows": at_most(times["features_10x"] / times["features"], LIMIT_GROWTH),
    }
    notes: dict[str, Any] = {"source": str(AAPL.name) if AAPL.is_file() else "seeded", "bars": len(bars)}
    if importlib.util.find_spec("ta") is None:
        notes["ta"] = "skipped: the package ta is not installed"
    else:
        start = time.thread_time()
        ta_features(bars)
        times["ta"] = time.thread_time() - start
        bars_out["times_faster_than_ta"] = at_least(times["ta"] / times["features"], LIMIT_TA)
    milliseconds = {name: 1000.0 * value for name, value in times.items()}
    return {"bars": bars_out, "milliseconds": milliseconds, "notes": notes}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; exit 1 when a limit is missed."""
    arguments = build_parser().parse_args(argv)
    return show(measure(quick=arguments.quick), as_json=arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
