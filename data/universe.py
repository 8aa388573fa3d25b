"""Which symbols are studied together, and what is loaded for them: bars, and the features kept beside them.

Named sets lie in ``universes.toml`` with the day and the rule of their selection: all are made of survivors.
"""

import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache as memoised
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from data.cache_manager import BarCache
from data.calendars import calendar_for, calendar_name
from data.data_fetcher import BarSource, ReadsThrough, fetch_stock_data
from data.data_validator import DataValidator
from data.feature_engineer import engineer_features, feature_set_hash
from data.schema import Bars, TableMeta, bars_hash, check_enough, normalise_symbol
from utils.errors import AIStocksError, DataError, UsageError

logger = logging.getLogger(__name__)

UNIVERSES_FILE = Path(__file__).with_name("universes.toml")
DEFAULT_MAX_BYTES = 1 << 30
MAX_MISSED_SESSIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Universe:
    """A named set of symbols.

    Attributes
    ----------
    name, symbols
        What it is called, and its members.
    selected_on, rule, caveat
        The day on which it was chosen, how, and what that does to results on it.
    """

    name: str
    symbols: tuple[str, ...]
    selected_on: date
    rule: str
    caveat: str


@memoised
def named_universes() -> Mapping[str, Universe]:
    """Return the sets of ``universes.toml`` by name."""
    read = tomllib.loads(UNIVERSES_FILE.read_text(encoding="utf-8"))
    return MappingProxyType(
        {
            name: Universe(
                name=name,
                symbols=_unique(entry["symbols"]),
                selected_on=entry["selected_on"],
                rule=entry["rule"],
                caveat=entry["caveat"],
            )
            for name, entry in read.items()
        }
    )


def resolve_universe(spec: str) -> tuple[str, ...]:
    """Return the symbols that ``spec`` means, each once, in the order given.

    Parameters
    ----------
    spec
        The name of a set, symbols joined by commas, or the path of a text file with one symbol a line (``#``
        begins a comment). A name wins over a file, a file over a symbol.

    Raises
    ------
    UsageError
        If nothing is named; ``InvalidSymbolError`` for what cannot be a symbol.
    """
    known = named_universes().get(spec.strip())
    if known is not None:
        return known.symbols
    path = Path(spec)
    if "," not in spec and (path.suffix == ".txt" or len(path.parts) > 1):
        if not path.is_file():
            raise UsageError(f"--universe {spec}: there is no such file")
        lines = _text_of(path).splitlines()
        parts = [line.partition("#")[0].strip() for line in lines]
    else:
        parts = [part.strip() for part in spec.split(",")]
    symbols = _unique([part for part in parts if part])
    if not symbols:
        names = ", ".join(named_universes())
        raise UsageError(f"--universe {spec!r} names no symbol: use {names}, A,B,C or a file")
    return symbols


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--universe {path}: not a text file that can be read") from error


def load_panel(
    symbols: Sequence[str],
    source: BarSource,
    cache: ReadsThrough | None = None,
    jobs: int = 4,
    *,
    now: datetime | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> dict[str, Bars]:
    """Return the bars of every symbol, in the order given.

    Parameters
    ----------
    symbols
        As people write them.
    source, cache, now
        As for :func:`data.data_fetcher.fetch_stock_data`.
    jobs
        How many are read at a time, in threads.
    max_bytes
        Largest size of all bars together.

    Raises
    ------
    AIStocksError
        If any symbol fails: of the kind of the first failure, naming them all. A panel that silently lacks
        its failures is a panel of survivors.
    DataError
        If the bars pass ``max_bytes``.
    """
    wanted = _unique(symbols)
    panel: dict[str, Bars] = {}
    failures: list[tuple[str, AIStocksError]] = []
    held = 0
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        flights = {
            symbol: pool.submit(fetch_stock_data, symbol, source=source, cache=cache, now=now)
            for symbol in wanted
        }
        for symbol, flight in flights.items():
            try:
                panel[symbol] = flight.result()
            except AIStocksError as error:
                failures.append((symbol, error))
                continue
            held += panel[symbol].frame.to_numpy().nbytes
            if held > max_bytes:
                pool.shutdown(cancel_futures=True)
                raise DataError(
                    f"the bars of {len(panel)} of {len(wanted)} symbols take {held / 2**20:.0f} MiB, over "
                    f"the {max_bytes / 2**20:.0f} MiB allowed: name fewer symbols"
                )
    if failures:
        told = "; ".join(f"{symbol}: {error}" for symbol, error in failures)
        raise type(failures[0][1])(f"{len(failures)} of {len(wanted)} symbols cannot be loaded: {told}")
    return panel


def cached_features(
    bars: Bars,
    cache: BarCache,
    engineer: Callable[[pd.DataFrame], pd.DataFrame],
    *,
    feature_set_hash: str,
    horizon_bars: int | None = None,
) -> pd.DataFrame:
    """Return ``engineer(bars.frame)``, from disk where bars, feature set and horizon are the stored ones.

    After new bars the features are computed in full and compared with the stored rows to the last bit: a
    difference is logged as what it is, a feature that reads later bars.

    Notes
    -----
    It is a check of the past and a record, not a shortcut: 66 features of 11,355 bars are computed in 5 to
    17 ms and read back, with their checksums, in 32 to 44 ms. Training and serving compute, and so are the
    optional families, which `data.target_engineering.build_dataset` adds to a whole panel: the key knows
    nothing of their series.
    """
    symbol, source = bars.symbol, bars.provenance.source
    key = bars_hash(bars.frame)
    with cache.locked(symbol, source):
        stored = cache.recover("features", symbol, source)
        if stored is not None:
            made_with = (stored.meta.feature_set_hash, stored.meta.target_horizon_bars)
            stored = stored if made_with == (feature_set_hash, horizon_bars) else None
        if stored is not None and stored.meta.bars_hash == key:
            return stored.frame
        frame = engineer(bars.frame)
        rows = stored.meta.rows if stored is not None else 0
        same_past = stored is not None and stored.meta.bars_hash == bars_hash(bars.frame.iloc[:rows])
        if stored is not None and same_past and bars_hash(stored.frame) != bars_hash(frame.iloc[:rows]):
            logger.warning("%s: features of past bars changed when bars were added: a look-ahead", symbol)
        meta = TableMeta(
            symbol=symbol,
            source=source,
            last_session=frame.index[-1].date(),
            fetched_at=bars.provenance.fetched_at,
            bars_hash=key,
            feature_set_hash=feature_set_hash,
            target_horizon_bars=horizon_bars,
        )
        cache.store("features", frame, meta)
        return frame


def _unique(symbols: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(normalise_symbol(symbol) for symbol in symbols))


def refuse_delisted(bars: Bars, now: datetime) -> None:
    """Refuse bars of a live source that ended long ago: nothing is left to forecast.

    Raises
    ------
    DataError
        If more than `MAX_MISSED_SESSIONS` sessions have closed since the last bar.
    """
    calendar, last = calendar_for(bars.symbol), bars.provenance.last_session
    missed = calendar.sessions_between(last, calendar.last_closed_session(now))
    if missed > MAX_MISSED_SESSIONS:
        raise DataError(
            f"{bars.symbol} has had no bar since {last:%Y-%m-%d}, {missed} sessions ago: it was delisted or "
            "renamed; save its prices as a file and train with --source csv:DIR to study it all the same"
        )


def findings(bars: Bars, horizon_bars: int, cache: BarCache | None = None) -> tuple[str, ...]:
    """Return what the data validator has to say about prices and features, in words.

    Parameters
    ----------
    bars
        Prices of the symbol.
    horizon_bars
        Length of the labels.
    cache
        Where features are kept; with it, those of past bars are also compared with what they were last time.
    """
    if cache is None:
        features = engineer_features(bars.frame)
    else:
        features = cached_features(
            bars, cache, engineer_features, feature_set_hash=feature_set_hash(), horizon_bars=horizon_bars
        )
    calendar = calendar_for(bars.symbol)
    validator = DataValidator(bars.frame, features, horizon_bars=horizon_bars, calendar=calendar)
    return validator.run_all_validations().problems()


def universe_mean(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of a universe as a market to compare its symbols with.

    Parameters
    ----------
    frames
        Bars by symbol, ascending.

    Returns
    -------
    DataFrame
        ``Close`` over all sessions of any symbol, 1 in the first: it grows by the mean log return of the
        symbols that have a close in the session and one before. Row t is known at the close of t.

    Raises
    ------
    UsageError
        If no symbol is given, or they close at different hours.
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


def fetch_usable(
    symbols: Iterable[str], fetch: Callable[[str], Bars], *, at_least_bars: int, jobs: int
) -> dict[str, Bars]:
    """Fetch the symbols of a panel; what cannot be used is named in a warning and left out.

    Parameters
    ----------
    symbols
        The symbols.
    fetch
        Returns a symbol's bars, or raises.
    at_least_bars
        Bars that a symbol needs for a place in the panel.
    jobs
        How many are fetched at a time.
    """

    def usable(symbol: str) -> Bars | AIStocksError:
        try:
            bars = fetch(symbol)
            check_enough(bars.frame, at_least_bars, f"a place in the panel of {symbol}")
        except AIStocksError as error:
            return error
        return bars

    names = sorted(symbols)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        found = dict(zip(names, pool.map(usable, names), strict=True))
    for symbol, outcome in found.items():
        if isinstance(outcome, AIStocksError):
            logger.warning("%s is left out of the universe: %s", symbol, outcome)
    return {symbol: bars for symbol, bars in found.items() if isinstance(bars, Bars)}
