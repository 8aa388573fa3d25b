"""What a table of bars is: its columns, its repair, its verdict, its hash.

Raw tables come in Yahoo's convention (``Open High Low Close`` adjusted for splits, ``Adj Close`` for
splits and dividends, ``Volume`` split-adjusted). :func:`clean_bars` turns them into the bars that every
other room reads, counts what it mended, and refuses what it cannot mend.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from utils.errors import DataError, InsufficientDataError, InvalidSymbolError

Column = NDArray[np.float64]
BAR_COLUMNS = ("Open", "High", "Low", "Close", "Volume")
RAW_COLUMNS = ("Open", "High", "Low", "Close", "Adj Close", "Volume")
_PRICES = ("Open", "High", "Low", "Close", "Adj Close")

_SYMBOL = re.compile(r"\^?[A-Z0-9][A-Z0-9.=-]{0,14}")
# People write BRK.B, Yahoo BRK-B; the other one-letter suffixes are exchanges (.L, .T, .F).
_SHARE_CLASS = re.compile(r"([A-Z]{1,5})\.([AB])")
_LONGEST_RAW = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimits:
    """How much may be wrong with a table of bars before it is refused; all are fractions of its rows.

    Attributes
    ----------
    rejected
        Rows with a price that cannot be (not positive, high below low, close outside the range).
    interior_nan
        Rows without a price before the last good row.
    missing_sessions, off_calendar
        Sessions of the exchange without a row; rows on days when the exchange was closed.
    close_tolerance, open_tolerance
        Relative excess of close or open over the day's range that is mended by widening the range: vendors
        round each column by itself, and quote currencies' opens from the day before.
    """

    rejected: float = 0.01
    interior_nan: float = 0.01
    missing_sessions: float = 0.05
    off_calendar: float = 0.05
    close_tolerance: float = 1e-4
    open_tolerance: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsReport:
    """What was found in a raw table, in rows.

    Attributes
    ----------
    raw_rows, rows
        Rows that came, rows that are left.
    nan_tail_dropped
        Rows without prices at the end (a vendor's placeholder for today).
    unfinished_dropped
        Rows of sessions that had not closed at the time of asking.
    interior_nan, duplicates, unsorted, rejected_rows, range_mended
        Rows dropped for a NaN price, dropped as doubles (the last one stays), out of order, dropped for an
        impossible price, and with the day's range widened to hold open and close.
    volume_missing, zero_volume_rows
        Volumes that were NaN (now 0), and rows whose volume is 0.
    moves_over_50pct
        Rows whose close moved by more than half against the row before: sometimes real, often a split that
        nobody adjusted for.
    missing_sessions, off_calendar
        Sessions without a row, and rows dropped because they lay on closed days; both are filled in by the
        fetcher, which knows the symbol and so its exchange.
    """

    raw_rows: int = 0
    rows: int = 0
    nan_tail_dropped: int = 0
    unfinished_dropped: int = 0
    interior_nan: int = 0
    duplicates: int = 0
    unsorted: int = 0
    rejected_rows: int = 0
    range_mended: int = 0
    volume_missing: int = 0
    zero_volume_rows: int = 0
    moves_over_50pct: int = 0
    missing_sessions: int = 0
    off_calendar: int = 0

    def problems(self) -> tuple[str, ...]:
        """Return one sentence per kind of trouble, none when the table was in order."""
        said = (
            (self.nan_tail_dropped, "rows without prices at the end were dropped"),
            (self.unfinished_dropped, "rows of a session still open were dropped"),
            (self.interior_nan, "rows without prices inside the history were dropped"),
            (self.duplicates, "doubled rows were dropped, the last of each was kept"),
            (self.unsorted, "rows were out of order and were sorted"),
            (self.rejected_rows, "rows with impossible prices were dropped"),
            (self.range_mended, "rows had their high or low widened to hold open and close"),
            (self.volume_missing, "volumes were missing and read as 0"),
            (self.zero_volume_rows, "rows have volume 0"),
            (self.moves_over_50pct, "closes moved by more than half in one session"),
            (self.missing_sessions, "sessions of the exchange are missing"),
            (self.off_calendar, "rows on days when the exchange was closed were dropped"),
        )
        return tuple(f"{count} {words}" for count, words in said if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where bars come from.

    Attributes
    ----------
    source
        Name of the source (``yahoo``, ``sample``, ``csv:FOLDER``).
    fetched_at
        When the source was last asked, UTC.
    last_session
        Session of the last bar, tz-naive.
    stale
        True when the exchange had closed a later session at the time of asking.
    """

    source: str
    fetched_at: datetime
    last_session: pd.Timestamp
    stale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars of one symbol with their provenance beside them.

    Attributes
    ----------
    symbol
        Normalised symbol.
    frame
        ``BAR_COLUMNS`` as float64, adjusted for splits and dividends; ascending unique tz-naive index
        ``date``. A row is known at the close of its session.
    provenance, report
        Where it came from, and what was wrong with it.
    """

    symbol: str
    frame: pd.DataFrame
    provenance: Provenance
    report: BarsReport


def normalise_symbol(raw: str) -> str:
    """Return the symbol in Yahoo's spelling: `` aapl `` is ``AAPL``, ``BRK.B`` is ``BRK-B``.

    Raises
    ------
    InvalidSymbolError
        For anything that no source could know; such a string is safe to log and must never become a path.
    """
    # ASCII first: upper() turns letters such as the German sharp s into plain capitals.
    if not isinstance(raw, str) or len(raw) > _LONGEST_RAW or not raw.isascii():
        raise InvalidSymbolError(_invalid(raw))
    symbol = raw.strip(" ").upper()
    if _SYMBOL.fullmatch(symbol) is None:
        raise InvalidSymbolError(_invalid(raw))
    return _SHARE_CLASS.sub(r"\1-\2", symbol) if _SHARE_CLASS.fullmatch(symbol) else symbol


def _invalid(raw: object) -> str:
    shown = ascii(raw)
    shown = shown if len(shown) <= 40 else shown[:40] + "..."
    return (
        f"{shown} is not a symbol: give 1 to 15 letters, digits or . = - "
        "(such as AAPL, BRK-B, ^GSPC, EURUSD=X, 005930.KS)"
    )


def clean_bars(raw: pd.DataFrame, *, limits: QualityLimits | None = None) -> tuple[pd.DataFrame, BarsReport]:
    """Mend, check and adjust a raw table.

    Prices are multiplied by ``Adj Close / Close``, so that returns between rows are total returns. Later
    dividends and splits enter all rows before them as one constant factor, which no return sees.

    Parameters
    ----------
    raw
        ``RAW_COLUMNS`` (others are ignored) over a DatetimeIndex; a zone is dropped, its local date stays.
    limits
        How much trouble is mended before the table is refused.

    Returns
    -------
    tuple
        The bars as :class:`Bars` describes its frame, and the counts.

    Raises
    ------
    DataError
        If columns or dates are missing, nothing usable is left, or a limit is passed.
    """
    limits = limits or QualityLimits()
    table = _as_numbers(raw)
    report = BarsReport(raw_rows=len(table))
    table, report = _order(table, report)
    table, report = _drop_missing(table, report, limits)
    table, report = _drop_impossible(table, report, limits)
    if table.empty:
        raise DataError(f"none of {report.raw_rows} rows has usable prices: check the symbol and the source")
    frame = _adjust(table)
    close = np.asarray(frame["Close"], dtype=np.float64)
    moves = np.abs(close[1:] / close[:-1] - 1.0) > 0.5
    report = replace(
        report,
        rows=len(frame),
        zero_volume_rows=int(np.count_nonzero(np.asarray(frame["Volume"]) == 0.0)),
        moves_over_50pct=int(moves.sum()),
    )
    return frame, report


def _as_numbers(raw: pd.DataFrame) -> pd.DataFrame:
    absent = [name for name in RAW_COLUMNS if name not in raw.columns]
    if absent:
        raise DataError(
            f"columns {', '.join(absent)} are missing (found: {', '.join(map(str, raw.columns)) or 'none'}); "
            "bars need Open, High, Low, Close, Adj Close, Volume (copy Close to Adj Close if it is adjusted)"
        )
    if not isinstance(raw.index, pd.DatetimeIndex):
        raise DataError(f"the index of bars must hold dates, not {raw.index.dtype}")
    if raw.index.hasnans:
        raise DataError(f"{int(np.count_nonzero(raw.index.isna()))} rows have no date")
    try:
        table = raw.loc[:, list(RAW_COLUMNS)].astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"bars hold something that is not a number: {error}") from error
    table.index = _dates(raw)
    return table


def _dates(table: pd.DataFrame) -> pd.DatetimeIndex:
    index = pd.DatetimeIndex(table.index)
    index = index.tz_localize(None) if index.tz is not None else index
    return index.normalize().as_unit("us").rename("date")


def _order(table: pd.DataFrame, report: BarsReport) -> tuple[pd.DataFrame, BarsReport]:
    dates = _dates(table)
    unsorted = int((np.diff(dates.asi8) < 0).sum())
    if unsorted or not dates.is_unique:
        # Of two rows for one session the later wins, unless it has no price.
        priced = np.asarray(table["Close"].notna())
        table = table.iloc[np.lexsort((priced, dates.asi8))]
    doubled = table.index.duplicated(keep="last")
    if doubled.any():
        table = table.loc[~doubled]
    return table, replace(report, unsorted=unsorted, duplicates=int(doubled.sum()))


def settled_rows(raw: pd.DataFrame, last_closed: pd.Timestamp) -> pd.DataFrame:
    """Return the raw rows of sessions that had closed.

    Parameters
    ----------
    raw
        A raw table, its index maybe with a zone.
    last_closed
        The exchange's last closed session, tz-naive.
    """
    return raw.loc[_dates(raw) <= last_closed]


def _drop_missing(
    table: pd.DataFrame, report: BarsReport, limits: QualityLimits
) -> tuple[pd.DataFrame, BarsReport]:
    missing = np.asarray(table.loc[:, list(_PRICES)].isna().any(axis=1))
    if not missing.any():
        return table, report
    good = np.flatnonzero(~missing)
    end = int(good[-1]) + 1 if len(good) else 0
    interior = int(missing[:end].sum())
    _refuse_above(interior, end, limits.interior_nan, "rows have no price")
    report = replace(report, nan_tail_dropped=len(table) - end, interior_nan=interior)
    return table.loc[~missing], report


def _drop_impossible(
    table: pd.DataFrame, report: BarsReport, limits: QualityLimits
) -> tuple[pd.DataFrame, BarsReport]:
    volume_missing = int(table["Volume"].isna().sum())
    if volume_missing:
        table = table.assign(Volume=table["Volume"].fillna(0.0))
    values = np.asarray(table, dtype=np.float64)
    open_, high, low, close, _, volume = values.T
    bad = ~np.isfinite(values).all(axis=1) | (values[:, :5] <= 0.0).any(axis=1) | (volume < 0.0)
    bad |= (high < low) | _outside(close, low, high, limits.close_tolerance * np.abs(close))
    bad |= _outside(open_, low, high, limits.open_tolerance * np.abs(close))
    rejected = int(bad.sum())
    _refuse_above(rejected, len(table), limits.rejected, "rows have impossible prices")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    outside = ~bad & ((top > high) | (bottom < low))
    if outside.any():
        table = table.assign(High=np.maximum(high, top), Low=np.minimum(low, bottom))
    report = replace(
        report, rejected_rows=rejected, range_mended=int(outside.sum()), volume_missing=volume_missing
    )
    return (table.loc[~bad] if rejected else table), report


def _outside(
    price: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    slack: NDArray[np.float64],
) -> NDArray[np.bool_]:
    return (price > high + slack) | (price < low - slack)


def _refuse_above(count: int, total: int, limit: float, words: str) -> None:
    if total and count > limit * total:
        raise DataError(
            f"{count} of {total} {words} ({count / total:.1%}, at most {limit:.0%} is mended): "
            "check the source, or refresh the cache"
        )


def check_sessions(report: BarsReport, limits: QualityLimits | None = None) -> None:
    """Refuse a table that does not fit its exchange's calendar.

    Raises
    ------
    DataError
        If too many sessions are missing, or too many rows lie on closed days (as dates of a wrong zone do).
    """
    limits = limits or QualityLimits()
    expected = report.rows + report.missing_sessions
    _refuse_above(report.missing_sessions, expected, limits.missing_sessions, "sessions are missing")
    came = report.rows + report.off_calendar
    _refuse_above(report.off_calendar, came, limits.off_calendar, "rows lie on closed days")


def _adjust(table: pd.DataFrame) -> pd.DataFrame:
    # One positive factor for the four prices: rounding is monotone, so low <= open, close <= high survives.
    factor = np.asarray(table["Adj Close"] / table["Close"], dtype=np.float64)
    columns: dict[str, Column] = {
        name: np.asarray(table[name], dtype=np.float64) * factor for name in ("Open", "High", "Low", "Close")
    }
    columns["Volume"] = np.asarray(table["Volume"], dtype=np.float64)
    return pd.DataFrame(columns, index=table.index)


def bars_hash(frame: pd.DataFrame) -> str:
    """Return the sha256 (hex) of dates, column names and values of a table with numbers, to the last bit."""
    digest = hashlib.sha256()
    digest.update("\x1f".join(map(str, frame.columns)).encode())
    digest.update(pd.DatetimeIndex(frame.index).as_unit("s").asi8.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(frame, dtype="<f8").tobytes())
    return digest.hexdigest()


def check_enough(frame: pd.DataFrame, needed_bars: int, purpose: str) -> None:
    """Raise when ``frame`` has fewer rows than ``purpose`` needs.

    Raises
    ------
    InsufficientDataError
        Saying how many bars are needed and how many there are.
    """
    have = len(frame)
    if have < needed_bars:
        raise InsufficientDataError(
            f"{purpose} needs {needed_bars} bars and there are {have}: "
            "choose a symbol with a longer history, or an earlier start"
        )
