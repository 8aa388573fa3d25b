"""Targets, the volatility that scales them, and the panel that learners read.

The target of bar t is the log return over the next ``horizon_bars`` bars. Learners see it divided by the
volatility that is known at the close of t, so that calm and wild stocks, calm and wild years weigh alike.

Which symbols make a panel is said by a universe: named ones lie in ``universes.toml`` with the day and the
rule of their selection, and all of them are made of survivors.
"""

import logging
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from numba import njit

from data.feature_engineer import (
    engineer_features,
    get_feature_columns,
    has_sentiment,
    refuse_earlier_closes,
    usable_rows,
    warmup_bars,
)
from data.indicators import MIN_SIGMA_LOG, FloatArray, bar_moves, cached
from data.schema import Bars, calendar_name, normalise_symbol
from utils.base import AIStocksError, DataError, InsufficientDataError, UnknownSymbolError, UsageError

logger = logging.getLogger(__name__)

DateArray = npt.NDArray[np.datetime64]
UNIVERSES_FILE = Path(__file__).with_name("universes.toml")
DEFAULT_HORIZON_BARS = 5
MAX_HORIZON_BARS = 252
MAX_PANEL_BYTES = 1 << 30
# Share of a symbol's rows after the warm-up that may be unusable before the data are refused.
MAX_DROPPED_FRACTION = 0.01
# Spans and weights of the variance forecast: week, month, quarter, year.
HAR_SPANS_BARS = (5.0, 22.0, 66.0, 252.0)
HAR_WEIGHTS = (0.3, 0.4, 0.2, 0.1)


def rescale_sigma(sigma_log: FloatArray, *, from_bars: float, to_bars: float) -> FloatArray:
    """Carry a volatility to another number of bars: variances of uncorrelated returns add up."""
    return sigma_log * math.sqrt(to_bars / from_bars)


def check_horizon(horizon_bars: int) -> int:
    """Return the horizon; ``UsageError`` unless it is a whole number from 1 to `MAX_HORIZON_BARS`."""
    is_whole = isinstance(horizon_bars, int | np.integer) and not isinstance(horizon_bars, bool)
    if not is_whole or not 1 <= horizon_bars <= MAX_HORIZON_BARS:
        raise UsageError(
            f"a horizon is a whole number of bars from 1 to {MAX_HORIZON_BARS} (usual: 1, 5, 10, 20), "
            f"got {horizon_bars!r}"
        )
    return int(horizon_bars)


@cached
@njit()
def har_variance(moves: FloatArray) -> FloatArray:
    """Forecast the next bar's variance of the log return, (n,), from `bar_moves`; known at the close of t.

    Weighted mean of four exponential means (spans `HAR_SPANS_BARS`) of overnight squared plus Garman-Klass
    variance, times the mean of 1 and the year's ratio of squared returns to that range measure (kept within
    1/2 to 2). The means are normalised by their weights: the first rows are noisy, not biased. After Corsi
    (2009), A simple approximate long-memory model of realized volatility; Garman, Klass (1980).
    """
    n = moves.shape[1]
    ret, overnight, gk = moves[7], moves[8], moves[10]
    out = np.empty(n)
    means = np.zeros(4)
    closes = 0.0
    weight = np.zeros(4)
    for t in range(n):
        ranged = overnight[t] * overnight[t] + gk[t]
        squared = ret[t] * ret[t] if t > 0 else ranged
        blend = 0.0
        for k in range(4):
            alpha = 2.0 / (HAR_SPANS_BARS[k] + 1.0)
            weight[k] = 1.0 - (1.0 - weight[k]) * (1.0 - alpha)
            means[k] += alpha / weight[k] * (ranged - means[k])
            blend += HAR_WEIGHTS[k] * means[k]
        closes += 2.0 / (HAR_SPANS_BARS[3] + 1.0) / weight[3] * (squared - closes)
        ratio = closes / means[3] if means[3] > 0.0 else 1.0
        out[t] = blend * 0.5 * (1.0 + min(max(ratio, 0.5), 2.0))
    return out


def daily_volatility_log(bars: pd.DataFrame) -> "pd.Series[float]":
    """Forecast the standard deviation of the next bar's log return by `har_variance`.

    Never below `MIN_SIGMA_LOG`; row t is known at the close of t.
    """
    prices = [np.array(bars[name], dtype=np.float64) for name in ("Open", "High", "Low", "Close")]
    moves = np.empty((11, len(bars)))
    bar_moves(prices[0], prices[1], prices[2], prices[3], moves)
    daily = np.maximum(np.sqrt(har_variance(moves)), MIN_SIGMA_LOG)
    return pd.Series(daily, index=bars.index, name="daily_volatility_log", copy=False)


def make_target(bars: pd.DataFrame, horizon_bars: int = DEFAULT_HORIZON_BARS) -> pd.DataFrame:
    """Return what the next ``horizon_bars`` bars brought, and the scale that was known before.

    ``target_log`` = log(Close[t+h] / Close[t]), known at the close of t+h, NaN in the last h rows;
    ``sigma_log``: volatility over h bars, known at the close of t, never missing; ``target_scaled`` =
    ``target_log / sigma_log``; ``label_end``: session of t+h, NaT if not yet known.
    """
    horizon = check_horizon(horizon_bars)
    n = len(bars)
    known = max(n - horizon, 0)
    close = np.asarray(bars["Close"], dtype=np.float64)
    target_log = np.full(n, np.nan)
    target_log[:known] = np.log(close[horizon:] / close[:known])
    sigma_log = rescale_sigma(np.array(daily_volatility_log(bars)), from_bars=1, to_bars=horizon)
    sessions = np.asarray(bars.index, dtype="datetime64[us]")
    label_end = np.full(n, np.datetime64("NaT", "us"))
    label_end[:known] = sessions[horizon:]
    return pd.DataFrame(
        {
            "target_log": target_log,
            "sigma_log": sigma_log,
            "target_scaled": target_log / sigma_log,
            "label_end": label_end,
        },
        index=bars.index,
    )


def resolve_universe(spec: str) -> tuple[str, ...]:
    """Return the symbols that ``spec`` means, each once, in the order given.

    ``spec`` is the name of a set, symbols joined by commas, or the path of a text file with one symbol a line
    (``#`` begins a comment). A name wins over a file, a file over a symbol. Raises ``UsageError`` if nothing
    is named, ``InvalidSymbolError`` for what cannot be a symbol.
    """
    named = tomllib.loads(UNIVERSES_FILE.read_text(encoding="utf-8"))
    path = Path(spec)
    if spec.strip() in named:
        parts = named[spec.strip()]["symbols"]
    elif "," not in spec and (path.suffix == ".txt" or len(path.parts) > 1):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise UsageError(f"--universe {spec}: there is no such file") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"--universe {path}: not a text file that can be read") from error
        parts = [line.partition("#")[0].strip() for line in lines]
    else:
        parts = [part.strip() for part in spec.split(",")]
    symbols = tuple(dict.fromkeys(normalise_symbol(part) for part in parts if part))
    if not symbols:
        raise UsageError(f"--universe {spec!r} names no symbol: use {', '.join(named)}, A,B,C or a file")
    return symbols


def refuse_unknown_universe(spec: str, failures: Mapping[str, AIStocksError]) -> None:
    """Raise ``UsageError`` where ``spec`` is one symbol that nobody knows: the name of a set, misspelt."""
    symbols = resolve_universe(spec)
    error = failures.get(symbols[0])
    if len(symbols) == 1 and isinstance(error, UnknownSymbolError):
        names = ", ".join(tomllib.loads(UNIVERSES_FILE.read_text(encoding="utf-8")))
        raise UsageError(f"--universe {spec} is no set, there are {names}; as a symbol: {error}")


def load_panel(
    symbols: Sequence[str], read: Callable[[str], Bars], jobs: int = 4, *, max_bytes: int = MAX_PANEL_BYTES
) -> tuple[dict[str, Bars], dict[str, AIStocksError]]:
    """Return what ``read`` says of every symbol, in the order given, and why others have no bars.

    A panel that silently lacks its failures is a panel of survivors: tell them, or refuse it. ``jobs`` are
    read at a time, in threads; raises ``DataError`` if all bars together pass ``max_bytes``.
    """
    panel: dict[str, Bars] = {}
    failures: dict[str, AIStocksError] = {}
    held = 0
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        flights = {symbol: pool.submit(read, symbol) for symbol in map(normalise_symbol, symbols)}
        for symbol, flight in flights.items():
            try:
                panel[symbol] = flight.result()
            except AIStocksError as error:
                failures[symbol] = error
                continue
            held += panel[symbol].frame.to_numpy().nbytes
            if held > max_bytes:
                pool.shutdown(cancel_futures=True)
                raise DataError(
                    f"the bars of {len(panel)} of {len(flights)} symbols take {held / 2**20:.0f} MiB, over "
                    f"the {max_bytes / 2**20:.0f} MiB allowed: name fewer symbols"
                )
    return panel, failures


def universe_mean(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of a universe, from bars by symbol, as a market to compare its symbols with.

    ``Close`` over all sessions of any symbol is 1 in the first; it grows by the mean log return of the
    symbols that have a close in the session and one before. Row t is known at the close of t. Raises
    ``UsageError`` if no symbol is given, or they close at different hours.
    """
    if not frames:
        raise UsageError("no symbol given: the mean of a universe needs the bars of at least one")
    calendars = sorted({calendar_name(symbol) for symbol in frames})
    if len(calendars) > 1:
        raise UsageError(
            f"the mean of a universe needs symbols that close together, these follow {', '.join(calendars)}"
        )
    parts = [pd.Series(np.log(np.asarray(bars["Close"])), bars.index).diff() for bars in frames.values()]
    returns = pd.concat(parts, axis=1, sort=True)
    return pd.DataFrame({"Close": np.exp(returns.mean(axis=1).fillna(0.0).cumsum())})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A panel of n rows of p features with their targets; a single symbol is a panel of one.

    Attributes
    ----------
    features, columns
        float32, (n, p), finite, row i known at the close of ``date[i]``; the names of the features.
    date, label_end
        datetime64[D], (n,): the session, ascending, symbols side by side; the one at whose close the target
        is known, NaT where not known yet.
    symbol_code
        int32, (n,): position in ``symbols``.
    target_scaled, target_log, sigma_log
        float64, (n,); see `make_target`. Targets, ``horizon_bars`` ahead, are NaN where unknown.
    dropped_rows
        Rows after the warm-up that `build_dataset` left out because something in them was not finite.
    """

    columns: tuple[str, ...]
    features: npt.NDArray[np.float32]
    date: DateArray
    label_end: DateArray
    symbol_code: npt.NDArray[np.int32]
    symbols: tuple[str, ...]
    target_scaled: FloatArray
    target_log: FloatArray
    sigma_log: FloatArray
    horizon_bars: int
    dropped_rows: int = 0

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        n = len(self.date)
        if self.features.shape != (n, len(self.columns)):
            raise DataError(
                f"features of shape {self.features.shape} for {n} rows and {len(self.columns)} columns"
            )
        for name in _ROW_FIELDS:
            if len(getattr(self, name)) != n:
                raise DataError(f"{name} has {len(getattr(self, name))} rows, the dates have {n}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.date)

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows whose target is known, shape (n,)."""
        return np.isfinite(self.target_log)

    @property
    def sessions(self) -> DateArray:
        """The sessions that occur, unique and ascending."""
        return np.unique(self.date)

    def take(self, idx: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> "Dataset":
        """Return the rows at positions ``idx`` (or where a mask is true), in that order."""
        rows = {name: getattr(self, name)[idx] for name in _ROW_FIELDS}
        return replace(self, **rows)


_ROW_FIELDS = ("features", "date", "label_end", "symbol_code", "target_scaled", "target_log", "sigma_log")


def _check_frames(frames: Mapping[str, pd.DataFrame], horizon_bars: int, warmups: Mapping[str, int]) -> None:
    needed = {symbol: warmup + horizon_bars + 1 for symbol, warmup in warmups.items()}
    short = {symbol: len(bars) for symbol, bars in frames.items() if len(bars) < needed[symbol]}
    if short:
        most = max(needed[symbol] for symbol in short)
        listed = ", ".join(f"{symbol} ({have})" for symbol, have in short.items())
        raise InsufficientDataError(
            f"a dataset with a horizon of {horizon_bars} bars needs {most} bars a symbol, there are "
            f"fewer for {listed}: leave them out or take an earlier start"
        )


def _empty_dataset(
    frames: Mapping[str, pd.DataFrame],
    horizon_bars: int,
    columns: tuple[str, ...],
    warmups: Mapping[str, int],
) -> tuple[Dataset, npt.NDArray[np.intp]]:
    """Allocate the whole panel at once; also return where row i, counted symbol after symbol, belongs."""
    dates = [
        np.asarray(bars.index[warmups[symbol] :], dtype="datetime64[D]") for symbol, bars in frames.items()
    ]
    codes = np.repeat(np.arange(len(dates), dtype=np.int32), [len(part) for part in dates])
    date = np.concatenate(dates)
    order = np.lexsort((codes, date))
    place = np.empty(len(order), dtype=np.intp)
    place[order] = np.arange(len(order))
    n = len(date)
    empty = Dataset(
        columns=columns,
        features=np.empty((n, len(columns)), dtype=np.float32),
        date=date[order],
        label_end=np.empty(n, dtype="datetime64[D]"),
        symbol_code=codes[order],
        symbols=tuple(frames),
        target_scaled=np.empty(n),
        target_log=np.empty(n),
        sigma_log=np.empty(n),
        horizon_bars=horizon_bars,
    )
    return empty, place


def build_dataset(
    frames: Mapping[str, pd.DataFrame],
    horizon_bars: int = DEFAULT_HORIZON_BARS,
    *,
    vix: pd.DataFrame | None = None,
    market: pd.DataFrame | None = None,
) -> Dataset:
    """Build the panel of all symbols: features of each bar, and its target where it is known.

    Rows ascend by date, then in the order of ``frames``, adjusted OHLCV bars by symbol; those of a symbol's
    warm-up are left out, those that are not finite are counted and left out, its last ``horizon_bars`` have
    no target. ``vix`` and ``market`` append their optional families, see `engineer_features`; a symbol's rows
    begin once they have a value.

    Raises
    ------
    UsageError
        When no symbol is given, or ``vix`` or ``market`` with one whose exchange closes before New York.
    InsufficientDataError, DataError
        When a symbol has no labelled row after the warm-up; when more than `MAX_DROPPED_FRACTION` of its rows
        would have to be dropped, or ``vix`` or ``market`` cannot be used.
    """
    horizon = check_horizon(horizon_bars)
    if not frames:
        raise UsageError("no symbol given: a dataset needs the bars of at least one")
    if vix is not None or market is not None:
        refuse_earlier_closes(frames)
    warmups = {symbol: warmup_bars(bars, vix=vix, market=market) for symbol, bars in frames.items()}
    _check_frames(frames, horizon, warmups)
    told = all(map(has_sentiment, frames.values()))
    columns = get_feature_columns(told, cross_asset=vix is not None, market_context=market is not None)
    panel, place = _empty_dataset(frames, horizon, tuple(columns), warmups)
    usable = np.empty(len(panel), dtype=np.bool_)
    start = 0
    for symbol, bars in frames.items():
        features = engineer_features(bars, vix=vix, market=market)
        rows = place[start : start + len(bars) - warmups[symbol]]
        usable[rows] = _fill(panel, rows, symbol, features[columns].to_numpy(), make_target(bars, horizon))
        start += len(rows)
    if usable.all():
        return panel
    dropped = int(np.count_nonzero(~usable))
    logger.warning("dropped %d of %d rows that were not finite", dropped, len(panel))
    return replace(panel.take(usable), dropped_rows=dropped)


def _fill(
    panel: Dataset, rows: npt.NDArray[np.intp], symbol: str, features: FloatArray, target: pd.DataFrame
) -> npt.NDArray[np.bool_]:
    """Write a symbol's last ``len(rows)`` bars into the panel; return which of them are finite."""
    warmup = len(features) - len(rows)
    features, target = features[warmup:], target.iloc[warmup:]
    # A missing target is right in the last rows only; before them it is a broken price.
    known = len(rows) - panel.horizon_bars
    usable = usable_rows(features, panel.columns) & np.isfinite(np.asarray(target["sigma_log"]))
    usable[:known] &= np.isfinite(np.asarray(target["target_log"])[:known])
    bad = int(len(rows) - np.count_nonzero(usable))
    if bad > MAX_DROPPED_FRACTION * len(rows):
        raise DataError(
            f"{symbol}: {bad} of {len(rows)} rows after the warm-up are not finite, more than "
            f"the {MAX_DROPPED_FRACTION:.0%} that may be dropped; check its prices"
        )
    panel.features[rows] = features
    panel.label_end[rows] = np.asarray(target["label_end"], dtype="datetime64[D]")
    for name in ("target_scaled", "target_log", "sigma_log"):
        getattr(panel, name)[rows] = np.asarray(target[name])
    return np.asarray(usable, dtype=np.bool_)
