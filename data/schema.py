"""What a table of bars is: its columns, its repair, its hash.

Raw tables come in Yahoo's convention (``Open High Low Close`` adjusted for splits, ``Adj Close`` for
splits and dividends, ``Volume`` split-adjusted). :func:`clean_bars` turns them into the bars that every
other room reads, counts what it mended, and refuses what it cannot mend.

On disk a table is Parquet with page checksums, and beside it a description that is sealed with its sha256.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from datetime import date, datetime
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from utils.errors import DataError, InsufficientDataError, InvalidSymbolError

SCHEMA_VERSION = 1
NO_DATE, NO_MOMENT = "0000-00-00", "0000-00-00T00:00:00+00:00"


class TableMeta(BaseModel):
    """What lies beside a table on disk; ``rows``, ``file`` and ``sha256`` are filled in when it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    symbol: str
    source: str
    last_session: date
    fetched_at: datetime
    revision: str | None = None
    bars_hash: str | None = None
    feature_set_hash: str | None = None
    target_horizon_bars: int | None = None
    rows: int = 0
    file: str = Field(default="", pattern=r"^(bars|features)-[0-9a-f]{16}\.parquet$")
    sha256: str = ""


class CorruptTableError(DataError):
    """A cached file is not the one that was written."""


def seal(meta: TableMeta) -> bytes:
    """Return the description of a table as JSON that begins with its own sha256."""
    return _sealed(json.dumps(meta.model_dump(mode="json"), sort_keys=True).encode())


def unseal(sealed: bytes) -> TableMeta | None:
    """Return the description that :func:`seal` wrote, None for another schema version.

    Raises
    ------
    CorruptTableError
        If a byte of it is not what was written.
    """
    text = sealed[len('{"sha256": "", "meta": ') + 64 : -1]
    if sealed != _sealed(text):
        raise CorruptTableError("the description of a table is not what was written")
    meta = json.loads(text)
    return TableMeta.model_validate(meta) if meta["schema_version"] == SCHEMA_VERSION else None


def _sealed(text: bytes) -> bytes:
    return b'{"sha256": "%b", "meta": %b}' % (hashlib.sha256(text).hexdigest().encode(), text)


def encode_table(frame: pd.DataFrame) -> bytes:
    """Return a table of numbers over dates as a Parquet file with page checksums."""
    dates = pd.DatetimeIndex(frame.index).as_unit("us").to_numpy()
    columns = {str(name): np.asarray(frame[name], dtype=np.float64) for name in frame.columns}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"date": dates, **columns}), sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def decode_table(content: bytes) -> pd.DataFrame:
    """Return the table that :func:`encode_table` wrote, after checking its pages."""
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "date"}
    return pd.DataFrame(columns, index=pd.DatetimeIndex(table["date"].to_numpy(), name="date"))


Column = NDArray[np.float64]
BAR_COLUMNS = ("Open", "High", "Low", "Close", "Volume")
RAW_COLUMNS = ("Open", "High", "Low", "Close", "Adj Close", "Volume")
PRICE_COLUMNS = ("Open", "High", "Low", "Close", "Adj Close")

_SYMBOL = re.compile(r"\^?[A-Z0-9][A-Z0-9.=-]{0,14}")
# People write BRK.B, Yahoo BRK-B; the other one-letter suffixes are exchanges (.L, .T, .F).
_SHARE_CLASS = re.compile(r"([A-Z]{1,5})\.([AB])")
_LONGEST_RAW = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityLimits:
    """How much may be wrong with a table of bars before it is refused.

    Attributes
    ----------
    rejected, interior_nan, missing_sessions, off_calendar
        Largest share of rows with impossible prices (or absurd ones), without prices before the last good
        row, of sessions without a row, and of rows on days without a session.
    close_tolerance, open_tolerance
        Relative excess of close or open over the day's range that is mended by widening the range: vendors
        round each column by itself, and quote currencies' opens from the day before.
    lowest_price, highest_price, highest_volume
        No market was ever beyond them, whatever its currency and its splits; a defect in a file often is.
    """

    rejected: float = 0.01
    interior_nan: float = 0.01
    missing_sessions: float = 0.05
    off_calendar: float = 0.05
    close_tolerance: float = 1e-4
    open_tolerance: float = 0.02
    lowest_price: float = 1e-12
    highest_price: float = 1e15
    highest_volume: float = 1e18


# What agrees with a count of one, and of more.
_ONE = MappingProxyType({"s": "", "was": "was", "is": "is", "has": "has", "their": "its"})
_MORE = MappingProxyType({"s": "s", "was": "were", "is": "are", "has": "have", "their": "their"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsReport:
    """What was found in a raw table, in rows; :meth:`problems` says what each count means.

    ``raw_rows`` came and ``rows`` are left. The last two counts need the exchange's calendar; see
    ``data.markets.fit_sessions``.
    """

    raw_rows: int = 0
    rows: int = 0
    nan_tail_dropped: int = 0
    unfinished_dropped: int = 0
    interior_nan: int = 0
    duplicates: int = 0
    conflicting: int = 0
    unsorted: int = 0
    rejected_rows: int = 0
    absurd_rows: int = 0
    range_mended: int = 0
    volume_missing: int = 0
    zero_volume_rows: int = 0
    moves_over_50pct: int = 0
    missing_sessions: int = 0
    off_calendar: int = 0

    def problems(self) -> tuple[str, ...]:
        """Return one sentence per kind of trouble, none when the table was in order."""
        said = (
            (self.nan_tail_dropped, "row{s} without prices at the end {was} dropped"),
            (self.unfinished_dropped, "row{s} of sessions that had not closed yet {was} dropped"),
            (self.interior_nan, "row{s} without prices inside the history {was} dropped"),
            (self.duplicates, "doubled row{s} {was} dropped, the last of each was kept"),
            (self.conflicting, "of the doubled rows said something else than the one kept"),
            (self.unsorted, "row{s} {was} out of order and {was} sorted"),
            (self.rejected_rows, "row{s} with impossible prices {was} dropped"),
            (self.absurd_rows, "row{s} with prices or volumes beyond those of any market {was} dropped"),
            (self.range_mended, "row{s} had {their} high or low widened to hold open and close"),
            (self.volume_missing, "volume{s} {was} missing and read as 0"),
            (self.zero_volume_rows, "row{s} {has} volume 0"),
            (self.moves_over_50pct, "close{s} moved by more than half in one session"),
            (self.missing_sessions, "session{s} of the exchange {is} missing"),
            (self.off_calendar, "row{s} on days when the exchange was closed {was} dropped"),
        )
        return tuple(
            f"{count} {words.format_map(_ONE if count == 1 else _MORE)}" for count, words in said if count
        )


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
        True when the exchange had closed a later session at the time of asking, and the source could know it:
        never for the sample, whose prices have ended for good.
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
    table.index = bar_dates(raw)
    return table


def bar_dates(table: pd.DataFrame) -> pd.DatetimeIndex:
    """Return the index as tz-naive dates; a zone is dropped, the local date stays."""
    index = pd.DatetimeIndex(table.index)
    index = index.tz_localize(None) if index.tz is not None else index
    index = index if index.is_normalized else index.normalize()
    return index.as_unit("us").rename("date")


def _order(table: pd.DataFrame, report: BarsReport) -> tuple[pd.DataFrame, BarsReport]:
    dates = bar_dates(table)
    unsorted = int((np.diff(dates.asi8) < 0).sum())
    if unsorted or not dates.is_unique:
        # Of two rows for one session the later wins, unless it has no price.
        priced = np.asarray(table["Close"].notna())
        table = table.iloc[np.lexsort((priced, dates.asi8))]
    doubled = table.index.duplicated(keep="last")
    conflicting = 0
    if doubled.any():
        kept, dropped = table.loc[~doubled], table.loc[doubled].dropna(subset=list(PRICE_COLUMNS))
        differs = (dropped != kept.loc[dropped.index]) & (dropped.notna() | kept.loc[dropped.index].notna())
        conflicting, table = int(differs.any(axis=1).sum()), kept
    report = replace(report, unsorted=unsorted, duplicates=int(doubled.sum()), conflicting=conflicting)
    return table, report


def _drop_missing(
    table: pd.DataFrame, report: BarsReport, limits: QualityLimits
) -> tuple[pd.DataFrame, BarsReport]:
    missing = np.asarray(table.loc[:, list(PRICE_COLUMNS)].isna().any(axis=1))
    if not missing.any():
        return table, report
    good = np.flatnonzero(~missing)
    end = int(good[-1]) + 1 if len(good) else 0
    interior = int(missing[:end].sum())
    refuse_above(interior, end, limits.interior_nan, "rows have no price")
    report = replace(report, nan_tail_dropped=len(table) - end, interior_nan=interior)
    return table.loc[~missing], report


def _drop_impossible(
    table: pd.DataFrame, report: BarsReport, limits: QualityLimits
) -> tuple[pd.DataFrame, BarsReport]:
    volume_missing = int(table["Volume"].isna().sum())
    if volume_missing:
        table = table.assign(Volume=table["Volume"].fillna(0.0))
    values = np.array(table, dtype=np.float64)
    absurd = _absurd(values, limits)
    values[absurd] = np.nan
    open_, high, low, close, _, volume = values.T
    bad = ~np.isfinite(values).all(axis=1) | (values[:, :5] <= 0.0).any(axis=1) | (volume < 0.0)
    bad |= (high < low) | _outside(close, low, high, limits.close_tolerance * np.abs(close))
    bad |= _outside(open_, low, high, limits.open_tolerance * np.abs(close))
    refuse_above(int(bad.sum()), len(table), limits.rejected, "rows have impossible prices")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    outside = ~bad & ((top > high) | (bottom < low))
    if outside.any():
        table = table.assign(High=np.maximum(high, top), Low=np.minimum(low, bottom))
    report = replace(
        report,
        rejected_rows=int((bad & ~absurd).sum()),
        absurd_rows=int(absurd.sum()),
        range_mended=int(outside.sum()),
        volume_missing=volume_missing,
    )
    return (table.loc[~bad] if bad.any() else table), report


def _absurd(values: Column, limits: QualityLimits) -> NDArray[np.bool_]:
    """Return the rows with a number that is a defect of the file, though positive and finite."""
    prices, volume = values[:, :5], values[:, 5]
    tiny, huge = (prices > 0.0) & (prices < limits.lowest_price), prices > limits.highest_price
    beyond = ((tiny | huge) & np.isfinite(prices)).any(axis=1)
    beyond |= (volume > limits.highest_volume) & np.isfinite(volume)
    return np.asarray(beyond, dtype=np.bool_)


def _outside(
    price: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    slack: NDArray[np.float64],
) -> NDArray[np.bool_]:
    return (price > high + slack) | (price < low - slack)


def refuse_above(count: int, total: int, limit: float, words: str) -> None:
    """Raise a ``DataError`` when ``count`` is more than the share ``limit`` of ``total`` rows."""
    if total and count > limit * total:
        raise DataError(
            f"{count} of {total} {words} ({count / total:.1%}, at most {limit:.0%} is mended): "
            "check the source, or refresh the cache"
        )


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


def holds(value: object, blank: object) -> bool:
    """Whether a cell of a database can be what its column says: SQLite stores anything anywhere.

    ``blank`` is of the column's type; `NO_DATE` and `NO_MOMENT` stand for columns of dates and of moments.
    """
    if type(value) is not type(blank) or (isinstance(value, float) and not np.isfinite(value)):
        return False
    try:
        if blank == NO_DATE:
            return date.fromisoformat(str(value)).isoformat() == value
        return blank != NO_MOMENT or datetime.fromisoformat(str(value)).tzinfo is not None
    except ValueError:
        return False
