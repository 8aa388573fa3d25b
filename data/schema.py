"""What a bar is and when it is due: symbols, the sessions of their exchanges, the repair of a raw table.

Raw tables come in Yahoo's convention (``Open High Low Close`` adjusted for splits, ``Adj Close`` for
splits and dividends, ``Volume`` split-adjusted). :func:`clean_bars` turns them into the bars that every
other room reads, counts what it mended, and refuses what it cannot mend. Calendars come from
``exchange_calendars``; crypto pairs trade every day and close at midnight UTC, currency pairs on weekdays.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import tomllib
from collections.abc import Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from utils.base import DataError, InsufficientDataError, InvalidSymbolError, UsageError
from utils.model_paths import write_whole

SOURCE, DIGEST = Path(__file__), hashlib.sha256().digest_size
Days = NDArray[np.datetime64]
BAR_COLUMNS = ("Open", "High", "Low", "Close", "Volume")
RAW_COLUMNS = ("Open", "High", "Low", "Close", "Adj Close", "Volume")
PRICE_COLUMNS = RAW_COLUMNS[:5]

# Largest shares of rows that are mended before a table is refused.
MAX_REJECTED = MAX_INTERIOR_NAN = 0.01
MAX_MISSING_SESSIONS = MAX_OFF_CALENDAR = 0.05
# Relative excess of close or open over the day's range that is mended by widening the range: vendors round
# each column by itself, and quote currencies' opens from the day before.
CLOSE_TOLERANCE, OPEN_TOLERANCE = 1e-4, 0.02
# No market was ever beyond them, whatever its currency and its splits; a defect in a file often is.
LOWEST_PRICE, HIGHEST_PRICE, HIGHEST_VOLUME = 1e-12, 1e15, 1e18

# Blanks of a database's columns of dates and of moments; see `holds`.
NO_DATE, NO_MOMENT = "0000-00-00", "0000-00-00T00:00:00+00:00"

WEEKDAYS, ALWAYS, UNMAPPED = "weekdays", "24/7", "unmapped"
# Zone and sessions a year where no exchange keeps a calendar. Yahoo dates currency pairs by London, where a
# day of theirs ends at the latest at midnight UTC.
_WITHOUT_EXCHANGE = {WEEKDAYS: ("Europe/London", 260), ALWAYS: ("UTC", 365), UNMAPPED: ("UTC", 252)}
_FIRST_DAY = np.datetime64("1960-01-01")
# Far enough for a forecast of 252 sessions made at any moment of the year after the current one.
_YEARS_AHEAD = 3
_SUFFIXES, _INDICES = tomllib.loads(SOURCE.with_name("exchanges.toml").read_text(encoding="utf-8")).values()
# Currency pairs and futures, which Yahoo names so.
_ENDINGS = {"=X": WEEKDAYS, "=F": "CMES"}
_CRYPTO = re.compile(r"[A-Z0-9]+-(USD|EUR|GBP|JPY|CAD|AUD|CHF|KRW|INR|BTC|ETH|USDT|USDC)")
_SYMBOL = re.compile(r"\^?[A-Z0-9][A-Z0-9.=-]{0,14}")
# People write BRK.B, Yahoo BRK-B; the other one-letter suffixes are exchanges (.L, .T, .F).
_SHARE_CLASS = re.compile(r"([A-Z]{1,5})\.([AB])")
_ONE_OR_MORE = re.compile(r"\{(.*?)\|(.*?)\}")


def normalise_symbol(raw: str) -> str:
    """Return the symbol in Yahoo's spelling: `` aapl `` is ``AAPL``, ``BRK.B`` is ``BRK-B``.

    Raises ``InvalidSymbolError`` for what no source could know; such a string must never become a path.
    """
    # ASCII first: upper() turns letters such as the German sharp s into plain capitals.
    symbol = raw.strip(" ").upper() if isinstance(raw, str) and len(raw) <= 64 and raw.isascii() else ""
    if _SYMBOL.fullmatch(symbol) is None:
        raise InvalidSymbolError(
            f"{ascii(raw)[:40]} is not a symbol: give 1 to 15 letters, digits or . = - "
            "(such as AAPL, BRK-B, ^GSPC, EURUSD=X, 005930.KS)"
        )
    return _SHARE_CLASS.sub(r"\1-\2", symbol) if _SHARE_CLASS.fullmatch(symbol) else symbol


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionCalendar:
    """Sessions of one exchange.

    ``closes`` are in UTC, ``timezone`` is the IANA zone of the ascending ``days``. After ``known_to`` no
    holidays are recorded (some exchanges announce a year's only shortly before it): days are Mondays to
    Fridays there, and nothing is called missing or out of place.
    """

    name: str
    timezone: str
    sessions_per_year: int
    days: Days
    closes: Days
    known_to: np.datetime64

    def __post_init__(self) -> None:
        """Let nobody write into what all share."""
        self.days.flags.writeable = self.closes.flags.writeable = False

    def next_sessions(self, after: pd.Timestamp, count: int) -> pd.DatetimeIndex:
        """Return the first ``count`` sessions strictly after ``after``; ``UsageError`` if it has fewer."""
        first = int(np.searchsorted(self.days, _day(after), side="right"))
        found = self.days[first : first + count]
        if len(found) < count:
            raise UsageError(
                f"calendar {self.name} ends {self.days[-1]}: it has {len(found)} sessions after "
                f"{_day(after)}, asked for {count}"
            )
        return _index(found)

    def missing(self, index: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return the sessions between the first and the last date of ``index`` that it lacks."""
        if len(index) == 0:
            return _index(self.days[:0])
        held = _days(index)
        first, last = np.searchsorted(self.days, [held.min(), min(held.max(), self.known_to) + 1])
        return _lacking(self.days[first:last], held)

    def off_calendar(self, index: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return the dates of ``index`` on which the exchange held no session, as far as is known."""
        held = _days(index)
        return _lacking(held[(held >= self.days[0]) & (held <= self.known_to)], self.days)

    def last_closed_session(self, now: datetime) -> pd.Timestamp:
        """Return the latest session closed at ``now``; ``UsageError`` without a zone or beyond its days."""
        return pd.Timestamp(self.days[self._last_closed(now)]).as_unit("us")

    def next_close(self, now: datetime) -> datetime:
        """Return when the next session closes after ``now``, UTC; raises as `last_closed_session` does."""
        close: datetime = self.closes[self._last_closed(now) + 1].item()
        return close.replace(tzinfo=UTC)

    def _last_closed(self, now: datetime) -> int:
        if now.tzinfo is None:
            raise UsageError(f"the moment {now.isoformat()} has no time zone: give UTC")
        moment = np.datetime64(now.astimezone(UTC).replace(tzinfo=None), "s")
        position = int(np.searchsorted(self.closes, moment, side="right")) - 1
        if position < 0 or position == len(self.closes) - 1:
            raise UsageError(
                f"calendar {self.name} knows {self.days[0]} to {self.days[-1]}, not {now:%Y-%m-%d}"
            )
        return position

    def hindsight(self, as_of: str, served_at: str) -> str | None:
        """Say what a forecast served at a moment (ISO 8601, with a zone) knew too much, None if nothing."""
        closed = self.last_closed_session(datetime.fromisoformat(served_at))
        late = self.sessions_between(pd.Timestamp(as_of), closed)
        if late > 0:
            return f"served {late} session{'s' * (late > 1)} late, in hindsight: does not count"
        return "served before its as-of session had closed: does not count" if late < 0 else None

    def sessions_between(self, a: pd.Timestamp, b: pd.Timestamp) -> int:
        """Count the sessions after ``a`` up to and with ``b``; negative when ``b`` lies before ``a``."""
        first, last = np.searchsorted(self.days, [_day(a), _day(b)], side="right")
        return int(last) - int(first)


def calendar_name(symbol: str) -> str:
    """Return the name of the calendar that ``symbol`` follows."""
    if named := _INDICES.get(symbol) or _ENDINGS.get(symbol[-2:]):
        return named
    if _CRYPTO.fullmatch(symbol):
        return ALWAYS
    stem, _, suffix = symbol.rpartition(".")
    return _SUFFIXES.get(suffix, UNMAPPED) if stem else "XNYS"


def calendar_for(symbol: str) -> SessionCalendar:
    """Return the calendar of the exchange that lists a normalised symbol, New York without a suffix.

    A suffix that nobody mapped gets weekdays, and no check of gaps: a week may start on Sunday there.
    """
    return _load(calendar_name(symbol), datetime.now(UTC).year + _YEARS_AHEAD)


# A calendar takes .05 to 1.4 s to build and never changes: a pure function of its arguments, kept.
@functools.cache
def _load(name: str, last_year: int) -> SessionCalendar:
    end = np.datetime64(f"{last_year}-12-31")
    if name not in _WITHOUT_EXCHANGE:
        return SessionCalendar(name=name, sessions_per_year=252, **_kept(name, end))
    timezone, per_year = _WITHOUT_EXCHANGE[name]
    days = np.arange(_FIRST_DAY, end + 1)
    days = days if name == ALWAYS else days[np.is_busday(days)]
    closes, known_to = (days + 1).astype("datetime64[s]"), days[0] - 1 if name == UNMAPPED else end
    return SessionCalendar(
        name=name, timezone=timezone, sessions_per_year=per_year, days=days, closes=closes, known_to=known_to
    )


def _kept(name: str, end: np.datetime64) -> dict[str, Any]:
    """Return `_from_exchange`, from the file of an earlier process where there is one.

    It lies with compiled code: like that it depends on what is installed, and on no setting. Its name tells
    by what it was made, and a digest comes first in it: nothing is parsed that is not what was written.
    """
    made_by = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("exchange_calendars").encode())
    folder = Path(importlib.util.cache_from_source(str(SOURCE))).parent
    file = folder / f"{name}-{end}-{made_by.hexdigest()[:16]}.kept"
    with suppress(OSError):
        content = file.read_bytes()
        if content[:DIGEST] == hashlib.sha256(content[DIGEST:]).digest():
            with np.load(io.BytesIO(content[DIGEST:])) as kept:
                return {name: kept[name][()] for name in kept.files}
    built, stream = _from_exchange(name, end), io.BytesIO()
    np.savez(stream, **built)
    content = stream.getvalue()
    # Who cannot write here builds it again in the next process.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, hashlib.sha256(content).digest() + content)
        for old in {*folder.glob(f"{name}-{end}-*")} - {file}:
            old.unlink(missing_ok=True)
    return built


def _from_exchange(name: str, end: np.datetime64) -> dict[str, Any]:
    import exchange_calendars  # noqa: PLC0415 - takes half a second, which a help text need not wait for

    factory = type(exchange_calendars.get_calendar(name, start="2025-01-02", end="2025-03-31"))
    earliest, latest = factory.bound_min(), factory.bound_max()
    first = max(_FIRST_DAY, _day(earliest)) if earliest is not None else _FIRST_DAY
    known_to = min(end, _day(latest)) if latest is not None else end
    calendar = exchange_calendars.get_calendar(name, start=pd.Timestamp(first), end=pd.Timestamp(known_to))
    days = _days(calendar.sessions.tz_localize(None))
    closes = np.asarray(calendar.closes.dt.tz_convert("UTC").dt.tz_localize(None)).astype("datetime64[s]")
    later = np.arange(known_to + 1, end + 1)
    later = later[np.is_busday(later)]
    closes = np.concatenate([closes, later + (closes[-1] - days[-1])])
    days = np.concatenate([days, later])
    return {"timezone": str(calendar.tz), "days": days, "closes": closes, "known_to": known_to}


def _lacking(days: Days, others: Days) -> pd.DatetimeIndex:
    """Return the days that are not among others; integers are told apart in a tenth of the time."""
    return _index(np.unique(days[~np.isin(days.astype(np.int64), others.astype(np.int64))]))


def _day(moment: pd.Timestamp) -> np.datetime64:
    return np.datetime64(pd.Timestamp(moment).date(), "D")


def _days(index: pd.DatetimeIndex) -> Days:
    return np.asarray(index).astype("datetime64[D]")


def _index(days: Days) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(days.astype("datetime64[us]"), name="date")


def _count(words: str) -> int:
    """Return a field of `BarsReport`; in its words, "{one|more}" agrees with the count."""
    return field(default=0, metadata={"words": words})


@dataclass(frozen=True, slots=True, kw_only=True)
class BarsReport:
    """What was found in a raw table, in rows; ``rows`` are left."""

    rows: int = 0
    nan_tail_dropped: int = _count("row{|s} without prices at the end {was|were} dropped")
    unfinished_dropped: int = _count("row{|s} of sessions that had not closed yet {was|were} dropped")
    interior_nan: int = _count("row{|s} without prices inside the history {was|were} dropped")
    duplicates: int = _count("doubled row{|s} {was|were} dropped, the last of each was kept")
    conflicting: int = _count("of the doubled rows said something else than the one kept")
    unsorted: int = _count("row{|s} {was|were} out of order and {was|were} sorted")
    rejected_rows: int = _count("row{|s} with impossible prices {was|were} dropped")
    absurd_rows: int = _count("row{|s} with prices or volumes beyond those of any market {was|were} dropped")
    range_mended: int = _count("row{|s} had {its|their} high or low widened to hold open and close")
    volume_missing: int = _count("volume{|s} {was|were} missing and read as 0")
    zero_volume_rows: int = _count("row{|s} {has|have} volume 0")
    moves_over_50pct: int = _count("close{|s} moved by more than half in one session")
    missing_sessions: int = _count("session{|s} of the exchange {is|are} missing")
    off_calendar: int = _count("row{|s} on days when the exchange was closed {was|were} dropped")

    def problems(self) -> tuple[str, ...]:
        """Return one sentence per kind of trouble, none when the table was in order."""
        found = ((getattr(self, kind.name), kind.metadata.get("words")) for kind in fields(self))
        return tuple(
            f"{count} " + _ONE_OR_MORE.sub(r"\1" if count == 1 else r"\2", words)
            for count, words in found
            if count and words
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where bars come from (``yahoo``, ``sample``, ``csv:FOLDER``), and when the source was asked, UTC.

    ``stale`` when the exchange had closed a later session than the last bar's, and the source could know it:
    never for the sample, whose prices have ended for good.
    """

    source: str
    fetched_at: datetime
    last_session: pd.Timestamp
    stale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars of one symbol (normalised) with their provenance, and what was wrong with them.

    ``frame`` holds ``BAR_COLUMNS`` as float64, adjusted for splits and dividends, over an ascending unique
    tz-naive index ``date``. A row is known at the close of its session.
    ``sentiment`` says what became of the headlines: ``used``, and the ``source`` or the ``reason`` why not;
    empty where nobody asked. Where they are used the frame has the `SENTIMENT_COLUMNS`, too.
    """

    symbol: str
    frame: pd.DataFrame
    provenance: Provenance
    report: BarsReport
    sentiment: Mapping[str, object] = field(default_factory=dict)


def clean_bars(raw: pd.DataFrame) -> tuple[pd.DataFrame, BarsReport]:
    """Mend, check and adjust a raw table of ``RAW_COLUMNS``; others are ignored, a zone is dropped.

    Prices are multiplied by ``Adj Close / Close``, so that returns between rows are total returns. Later
    dividends and splits enter all rows before them as one constant factor, which no return sees. Raises
    ``DataError`` if columns or dates are missing, nothing usable is left, or a limit is passed.
    """
    table = _as_numbers(raw)
    counts = dict[str, int]()
    for mend in (_order, _drop_missing, _drop_impossible):
        table = mend(table, counts)
    if table.empty:
        raise DataError(f"none of {len(raw)} rows has usable prices: check the symbol and the source")
    # One positive factor for the four prices: rounding is monotone, so low <= open, close <= high survives.
    factor = np.asarray(table["Adj Close"] / table["Close"])
    prices = {name: np.asarray(table[name]) * factor for name in BAR_COLUMNS[:4]}
    frame = pd.DataFrame({**prices, "Volume": np.asarray(table["Volume"])}, index=table.index)
    counts["rows"] = len(frame)
    counts["zero_volume_rows"] = int((frame["Volume"] == 0.0).sum())
    counts["moves_over_50pct"] = int((np.abs(prices["Close"][1:] / prices["Close"][:-1] - 1.0) > 0.5).sum())
    return frame, BarsReport(**counts)


def _as_numbers(raw: pd.DataFrame) -> pd.DataFrame:
    if absent := [name for name in RAW_COLUMNS if name not in raw.columns]:
        raise DataError(
            f"columns {', '.join(absent)} are missing (found: {', '.join(map(str, raw.columns)) or 'none'}); "
            "bars need Open, High, Low, Close, Adj Close, Volume (copy Close to Adj Close if it is adjusted)"
        )
    if not isinstance(raw.index, pd.DatetimeIndex):
        raise DataError(f"the index of bars must hold dates, not {raw.index.dtype}")
    if raw.index.hasnans:
        raise DataError(f"{int(np.count_nonzero(raw.index.isna()))} rows have no date")
    try:
        return raw.loc[:, list(RAW_COLUMNS)].astype(np.float64).set_axis(bar_dates(raw))
    except (TypeError, ValueError) as error:
        raise DataError(f"bars hold something that is not a number: {error}") from error


def bar_dates(table: pd.DataFrame) -> pd.DatetimeIndex:
    """Return the index as tz-naive dates; a zone is dropped, the local date stays."""
    return _index(_days(pd.DatetimeIndex(table.index).tz_localize(None)))


def _order(table: pd.DataFrame, counts: dict[str, int]) -> pd.DataFrame:
    dates = pd.DatetimeIndex(table.index)
    counts["unsorted"] = int((np.diff(dates.asi8) < 0).sum())
    if counts["unsorted"] or not dates.is_unique:
        # Of two rows for one session the later wins, unless it has no price.
        table = table.iloc[np.lexsort((np.asarray(table["Close"].notna()), dates.asi8))]
    doubled = table.index.duplicated(keep="last")
    counts["duplicates"] = int(doubled.sum())
    if doubled.any():
        dropped, table = table.loc[doubled].dropna(subset=list(PRICE_COLUMNS)), table.loc[~doubled]
        kept = table.loc[dropped.index]
        differs = (dropped != kept) & (dropped.notna() | kept.notna())
        counts["conflicting"] = int(differs.any(axis=1).sum())
    return table


def _drop_missing(table: pd.DataFrame, counts: dict[str, int]) -> pd.DataFrame:
    missing = np.asarray(table.loc[:, list(PRICE_COLUMNS)].isna().any(axis=1))
    end = int(np.flatnonzero(~missing).max(initial=-1)) + 1
    counts["nan_tail_dropped"], counts["interior_nan"] = len(table) - end, int(missing[:end].sum())
    refuse_above(counts["interior_nan"], end, MAX_INTERIOR_NAN, "rows have no price")
    return table.loc[~missing] if missing.any() else table


def _drop_impossible(table: pd.DataFrame, counts: dict[str, int]) -> pd.DataFrame:
    values = np.array(table, dtype=np.float64)
    prices, volume = values[:, :5], values[:, 5]
    unknown = np.isnan(volume)
    volume[unknown] = 0.0
    # A number that is a defect of the file, though positive and finite.
    beyond = ((prices > 0.0) & (prices < LOWEST_PRICE)) | ((prices > HIGHEST_PRICE) & np.isfinite(prices))
    absurd = beyond.any(axis=1) | ((volume > HIGHEST_VOLUME) & np.isfinite(volume))
    values[absurd] = np.nan
    open_, high, low, close, _ = prices.T
    bad = ~np.isfinite(values).all(axis=1) | (prices <= 0.0).any(axis=1) | (volume < 0.0) | (high < low)
    for price, tolerance in ((close, CLOSE_TOLERANCE), (open_, OPEN_TOLERANCE)):
        slack = tolerance * np.abs(close)
        bad |= (price > high + slack) | (price < low - slack)
    refuse_above(int(bad.sum()), len(table), MAX_REJECTED, "rows have impossible prices")
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    outside = ~bad & ((top > high) | (bottom < low))
    counts |= {
        "rejected_rows": int((bad & ~absurd).sum()),
        "absurd_rows": int(absurd.sum()),
        "range_mended": int(outside.sum()),
        "volume_missing": int(unknown.sum()),
    }
    if unknown.any() or outside.any():
        table = table.assign(High=np.maximum(high, top), Low=np.minimum(low, bottom), Volume=volume)
    return table.loc[~bad] if bad.any() else table


def refuse_above(count: int, total: int, limit: float, words: str) -> None:
    """Raise a ``DataError`` when ``count`` is more than the share ``limit`` of ``total`` rows."""
    if total and count > limit * total:
        raise DataError(
            f"{count} of {total} {words} ({count / total:.1%}, at most {limit:.0%} is mended): "
            "check the source, or refresh the cache"
        )


def bars_hash(frame: pd.DataFrame) -> str:
    """Return the sha256 (hex) of dates, column names and values of a table with numbers, to the last bit."""
    digest = hashlib.sha256("\x1f".join(map(str, frame.columns)).encode())
    digest.update(pd.DatetimeIndex(frame.index).as_unit("s").asi8.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(frame, dtype="<f8").tobytes())
    return digest.hexdigest()


def written_dates(column: "pd.Series[str]", name: str) -> "pd.Series[pd.Timestamp]":
    """Return the dates that a column of the file ``name`` says; `DataError` names the first that is none.

    What follows the first ten characters is a time of day, whose offset changes with summer time.
    """
    dates = pd.to_datetime(column.astype(str).str[:10], format="%Y-%m-%d", errors="coerce")
    if (bad := np.flatnonzero(dates.isna())).size:
        value = column.iloc[bad[0]]
        said = "" if pd.isna(value) else str(value)
        at = f"{name}, row {bad[0] + 2:,} (of the rows that are not empty; the heading is the first)"
        raise DataError(f"{at}: {said[:40]!r} is not a date: write YYYY-MM-DD")
    return dates


def check_enough(bars: Sized, needed_bars: int, purpose: str) -> None:
    """Raise ``InsufficientDataError`` when there are fewer rows of bars than ``purpose`` needs."""
    if (have := len(bars)) < needed_bars:
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
