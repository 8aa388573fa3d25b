"""Which symbols are studied together, which sessions their exchanges hold, and how a table of bars fits them.

Exchanges come from ``exchange_calendars``, chosen by the suffix of Yahoo's symbol. Crypto pairs trade every
day and close at midnight UTC; currency pairs trade from Monday to Friday. Answers are tz-naive session dates.
Named sets of symbols lie in ``universes.toml`` with the day and the rule of their selection: all are made of
survivors.
"""

import functools
import importlib.metadata
import re
import tomllib
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data.schema import (
    PRICE_COLUMNS,
    Bars,
    BarsReport,
    QualityLimits,
    bar_dates,
    clean_bars,
    normalise_symbol,
    refuse_above,
)
from utils.errors import DataError, UsageError
from utils.settings import read_settings

_FIRST_DAY = np.datetime64("1960-01-01")
# Far enough for a forecast of 252 sessions made at any moment of the year after the current one.
_YEARS_AHEAD = 3

WEEKDAYS = "weekdays"
ALWAYS = "24/7"
UNMAPPED = "unmapped"

UNIVERSES_FILE = Path(__file__).with_name("universes.toml")
MAX_MISSED_SESSIONS = 10

_SUFFIXES = {
    "AS": "XAMS", "AX": "XASX", "BA": "XBUE", "BK": "XBKK", "BO": "XBOM", "BR": "XBRU", "CO": "XCSE",
    "DE": "XETR", "F": "XFRA", "HE": "XHEL", "HK": "XHKG", "IC": "XICE", "IR": "XDUB", "IS": "XIST",
    "JK": "XIDX", "JO": "XJSE", "KL": "XKLS", "KQ": "XKRX", "KS": "XKRX", "L": "XLON", "LS": "XLIS",
    "MC": "XMAD", "MI": "XMIL", "MX": "XMEX", "NS": "XBOM", "NZ": "XNZE", "OL": "XOSL", "PA": "XPAR",
    "PR": "XPRA", "SA": "BVMF", "SI": "XSES", "SN": "XSGO", "SR": "XSAU", "SS": "XSHG", "ST": "XSTO",
    "SW": "XSWX", "SZ": "XSHG", "T": "XTKS", "TO": "XTSE", "TW": "XTAI", "TWO": "XTAI", "V": "XTSE",
    "VI": "XWBO", "WA": "XWAR",
}  # fmt: skip
_INDICES = {
    "^N225": "XTKS", "^FTSE": "XLON", "^GDAXI": "XETR", "^FCHI": "XPAR", "^HSI": "XHKG", "^STOXX50E": "XETR",
    "^AXJO": "XASX", "^KS11": "XKRX", "^BSESN": "XBOM", "^NSEI": "XBOM", "^TWII": "XTAI", "^BVSP": "BVMF",
    "^GSPTSE": "XTSE", "^SSMI": "XSWX", "^AEX": "XAMS", "^IBEX": "XMAD", "000001.SS": "XSHG",
}  # fmt: skip
_CRYPTO = re.compile(r"[A-Z0-9]+-(USD|EUR|GBP|JPY|CAD|AUD|CHF|KRW|INR|BTC|ETH|USDT|USDC)")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionCalendar:
    """Sessions of one exchange.

    Attributes
    ----------
    name
        Market identifier (``XNYS``), ``24/7``, ``weekdays`` or ``unmapped``.
    timezone
        IANA name of the zone whose dates the sessions are.
    sessions_per_year
        For annualising: 252, 365 or 260.
    known_from, known_to
        First and last date whose holidays are recorded. Later sessions are Mondays to Fridays (some exchanges
        announce a year's holidays only shortly before it); before the first date there are no sessions, and
        outside of both nothing is called missing or out of place.
    """

    name: str
    timezone: str
    sessions_per_year: int
    known_from: pd.Timestamp
    known_to: pd.Timestamp
    _days: NDArray[np.datetime64]
    _closes: NDArray[np.datetime64]

    def sessions(self, start: pd.Timestamp, end: pd.Timestamp) -> pd.DatetimeIndex:
        """Return the sessions from ``start`` to ``end``, both included."""
        first = np.searchsorted(self._days, _day(start), side="left")
        last = np.searchsorted(self._days, _day(end), side="right")
        return _index(self._days[first:last])

    def next_sessions(self, after: pd.Timestamp, count: int) -> pd.DatetimeIndex:
        """Return the first ``count`` sessions strictly after ``after``.

        Raises
        ------
        UsageError
            If the calendar does not reach that far.
        """
        first = int(np.searchsorted(self._days, _day(after), side="right"))
        found = self._days[first : first + count]
        if len(found) < count:
            raise UsageError(
                f"calendar {self.name} ends {self._days[-1]}: it has {len(found)} sessions after "
                f"{_day(after)}, asked for {count}"
            )
        return _index(found)

    def missing(self, index: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return the sessions between the first and the last date of ``index`` that it lacks."""
        if len(index) == 0:
            return _index(self._days[:0])
        days = _days(index)
        last = min(days.max(), _day(self.known_to))
        inside = self._days[(self._days >= days.min()) & (self._days <= last)]
        return _index(inside[~_are_among(inside, np.sort(days))])

    def off_calendar(self, index: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return the dates of ``index`` on which the exchange held no session, as far as is known."""
        days = _days(index)
        known = days[(days >= _day(self.known_from)) & (days <= _day(self.known_to))]
        return _index(np.unique(known[~_are_among(known, self._days)]))

    def last_closed_session(self, now: datetime) -> pd.Timestamp:
        """Return the latest session whose close is at or before ``now``.

        Parameters
        ----------
        now
            A moment with a zone.

        Raises
        ------
        UsageError
            If ``now`` has no zone, or lies outside the calendar.
        """
        return pd.Timestamp(self._days[self._last_closed(now)]).as_unit("us")

    def next_close(self, now: datetime) -> datetime:
        """Return when the next session closes after ``now``, UTC; raises as `last_closed_session` does."""
        close: datetime = self._closes[self._last_closed(now) + 1].astype("datetime64[s]").item()
        return close.replace(tzinfo=UTC)

    def _last_closed(self, now: datetime) -> int:
        if now.tzinfo is None:
            raise UsageError(f"the moment {now.isoformat()} has no time zone: give UTC")
        moment = np.datetime64(now.astimezone(UTC).replace(tzinfo=None), "s")
        position = int(np.searchsorted(self._closes, moment, side="right")) - 1
        if position < 0 or position == len(self._closes) - 1:
            raise UsageError(
                f"calendar {self.name} knows {self._days[0]} to {self._days[-1]}, not {now:%Y-%m-%d}"
            )
        return position

    def hindsight(self, as_of: str, served_at: str) -> str | None:
        """Say what was known too much of a forecast that was served at a moment with a zone (ISO 8601).

        None if its last session was the last that had closed; raises as `last_closed_session`.
        """
        closed = self.last_closed_session(datetime.fromisoformat(served_at))
        late = self.sessions_between(pd.Timestamp(as_of), closed)
        if late > 0:
            return f"served {late} session{'s' * (late > 1)} late, in hindsight: does not count"
        return "served before its as-of session had closed: does not count" if late < 0 else None

    def sessions_between(self, a: pd.Timestamp, b: pd.Timestamp) -> int:
        """Count the sessions after ``a`` up to and with ``b``: how many steps from one bar to the other.

        Negative when ``b`` lies before ``a``.
        """
        first, last = np.searchsorted(self._days, [_day(a), _day(b)], side="right")
        return int(last) - int(first)


def calendar_for(symbol: str) -> SessionCalendar:
    """Return the calendar of the exchange that lists ``symbol``.

    A symbol without a suffix is taken to trade in New York. One whose suffix nobody mapped gets weekdays for
    its forecasts, and no check of gaps: a week may start on Sunday there.

    Parameters
    ----------
    symbol
        Normalised symbol in Yahoo's spelling.
    """
    return _load(calendar_name(symbol), datetime.now(UTC).year + _YEARS_AHEAD)


def calendar_name(symbol: str) -> str:
    """Return the name of the calendar that ``symbol`` follows."""
    if symbol in _INDICES:
        return _INDICES[symbol]
    if symbol.endswith("=X"):
        return WEEKDAYS
    if symbol.endswith("=F"):
        return "CMES"
    if _CRYPTO.fullmatch(symbol):
        return ALWAYS
    stem, dot, suffix = symbol.rpartition(".")
    return _SUFFIXES.get(suffix, UNMAPPED) if dot and stem else "XNYS"


def fit_sessions(
    frame: pd.DataFrame, report: BarsReport, calendar: SessionCalendar, limits: QualityLimits | None = None
) -> tuple[pd.DataFrame, BarsReport]:
    """Drop bars of closed days and count the sessions that have none.

    Raises
    ------
    DataError
        If too many sessions are missing, or too many rows lie on closed days, as dates of a wrong zone do.
    """
    limits = limits or QualityLimits()
    off_calendar = calendar.off_calendar(pd.DatetimeIndex(frame.index))
    refuse_above(len(off_calendar), len(frame), limits.off_calendar, "rows lie on days without a session")
    if len(off_calendar):
        frame = frame.drop(index=off_calendar)
    missing = len(calendar.missing(pd.DatetimeIndex(frame.index)))
    refuse_above(missing, len(frame) + missing, limits.missing_sessions, "sessions are missing")
    return frame, replace(report, rows=len(frame), off_calendar=len(off_calendar), missing_sessions=missing)


def check_answer(
    symbol: str, raw: pd.DataFrame, source_name: str, now: datetime
) -> tuple[pd.DataFrame, BarsReport]:
    """Return the bars of the sessions in a raw table that had closed by ``now``, and what was found in it.

    Raises
    ------
    DataError
        If the table cannot be used; the message names symbol and source.
    """
    calendar = calendar_for(symbol)
    settled = settled_rows(raw, calendar.last_closed_session(now))
    if settled.empty:
        raise DataError(f"{symbol}: {source_name} has no session that had closed by {now:%Y-%m-%d %H:%M} UTC")
    try:
        frame, report = fit_sessions(*clean_bars(settled), calendar)
    except DataError as error:
        raise type(error)(f"{symbol} from {source_name}: {error}") from error
    return frame, replace(report, unfinished_dropped=len(raw) - len(settled))


def settled_rows(raw: pd.DataFrame, last_closed: pd.Timestamp) -> pd.DataFrame:
    """Return the rows of a raw table whose sessions had closed by ``last_closed`` (tz-naive)."""
    return raw.loc[bar_dates(raw) <= last_closed]


def priced_rows(raw: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that have every price, ascending, the last one of doubles."""
    priced = raw.loc[np.asarray(raw[list(PRICE_COLUMNS)].notna().all(axis=1))].sort_index(kind="stable")
    return priced.loc[~priced.index.duplicated(keep="last")]


def join_raw(old: pd.DataFrame, new: pd.DataFrame, *, tolerance: float) -> pd.DataFrame | None:
    """Return ``old`` up to where ``new`` begins, then ``new``; None if they disagree on a shared session.

    A split or a dividend re-adjusts the whole past: rows may be appended only where the shared ones agree.

    Parameters
    ----------
    old, new
        Raw tables; ``new`` begins inside ``old``.
    tolerance
        Relative difference of prices that still counts as agreement.
    """
    if new.empty:
        return None
    start = new.index.min()
    before, after = priced_rows(old.loc[old.index >= start]), priced_rows(new)
    prices = list(PRICE_COLUMNS)
    if before.empty or not before.index.isin(after.index).all():
        return None
    if not np.allclose(after.loc[before.index, prices], before[prices], rtol=tolerance, atol=0.0):
        return None
    joined: pd.DataFrame = pd.concat([old.loc[old.index < start], new])
    return joined


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


@functools.cache
def named_universes() -> Mapping[str, Universe]:
    """Return the sets of ``universes.toml`` by name."""
    read = tomllib.loads(UNIVERSES_FILE.read_text(encoding="utf-8"))
    made = {
        name: Universe(name=name, **entry | {"symbols": _unique(entry["symbols"])})
        for name, entry in read.items()
    }
    return MappingProxyType(made)


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


def _unique(symbols: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(normalise_symbol(symbol) for symbol in symbols))


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


# A calendar takes .05 to 1.4 s to build and never changes: a pure function of its arguments, kept.
@functools.cache
def _load(name: str, last_year: int) -> SessionCalendar:
    end = np.datetime64(f"{last_year}-12-31")
    if name not in {ALWAYS, WEEKDAYS, UNMAPPED}:
        return _calendar(name, 252, _kept(name, end))
    days = np.arange(_FIRST_DAY, end + 1, dtype="datetime64[D]")
    if name != ALWAYS:
        days = days[np.is_busday(days)]
    of = {
        # Yahoo dates currency pairs by London, where a day of theirs ends at the latest at midnight UTC.
        "timezone": np.array("Europe/London" if name == WEEKDAYS else "UTC"),
        "days": days,
        "closes": (days + 1).astype("datetime64[s]"),
        "known_to": np.array(days[0] - 1 if name == UNMAPPED else end),
    }
    return _calendar(name, {ALWAYS: 365, WEEKDAYS: 260, UNMAPPED: 252}[name], of)


def _kept(name: str, end: np.datetime64) -> Mapping[str, NDArray[Any]]:
    """Return `_from_exchange`, read from the file of an earlier process where there is one."""
    release = importlib.metadata.version("exchange_calendars")
    file = read_settings().cache_dir / "calendars" / f"{name}-{end}-{release}.npz"
    try:
        with file.open("rb") as stream, np.load(stream) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        built = _from_exchange(name, end)
    # Who cannot write here builds it again in the next process.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside := file.with_name(f"{uuid.uuid4().hex}.npz"), allow_pickle=False, **built)
        aside.replace(file)
    return built


def _from_exchange(name: str, end: np.datetime64) -> Mapping[str, NDArray[Any]]:
    import exchange_calendars  # noqa: PLC0415 - takes half a second, which a help text need not wait for

    factory = type(exchange_calendars.get_calendar(name, start="2025-01-02", end="2025-03-31"))
    earliest, latest = factory.bound_min(), factory.bound_max()
    first = max(_FIRST_DAY, _day(earliest)) if earliest is not None else _FIRST_DAY
    known_to = min(end, _day(latest)) if latest is not None else end
    calendar = exchange_calendars.get_calendar(name, start=pd.Timestamp(first), end=pd.Timestamp(known_to))
    days = np.asarray(calendar.sessions.tz_localize(None)).astype("datetime64[D]")
    closes = np.asarray(calendar.closes.dt.tz_convert("UTC").dt.tz_localize(None)).astype("datetime64[s]")
    if known_to < end:
        later = np.arange(known_to + 1, end + 1, dtype="datetime64[D]")
        later = later[np.is_busday(later)]
        time_of_close = closes[-1] - days[-1].astype("datetime64[s]")
        days = np.concatenate([days, later])
        closes = np.concatenate([closes, later.astype("datetime64[s]") + time_of_close])
    zone = np.array(str(calendar.tz))
    return {"timezone": zone, "days": days, "closes": closes, "known_to": np.array(known_to)}


def _calendar(name: str, per_year: int, of: Mapping[str, NDArray[Any]]) -> SessionCalendar:
    days, closes = of["days"], of["closes"]
    days.flags.writeable = closes.flags.writeable = False
    return SessionCalendar(
        name=name,
        timezone=str(of["timezone"]),
        sessions_per_year=per_year,
        known_from=pd.Timestamp(days[0]),
        known_to=pd.Timestamp(of["known_to"].item()),
        _days=days,
        _closes=closes,
    )


def _are_among(days: NDArray[np.datetime64], ascending: NDArray[np.datetime64]) -> NDArray[np.bool_]:
    """Whether each day is among ascending ones; numpy's set difference takes longer than all other checks."""
    if not len(ascending):
        return np.zeros(len(days), dtype=np.bool_)
    place = np.minimum(np.searchsorted(ascending, days), len(ascending) - 1)
    return np.asarray(ascending[place] == days)


def _day(moment: pd.Timestamp) -> np.datetime64:
    return np.datetime64(pd.Timestamp(moment).date(), "D")


def _days(index: pd.DatetimeIndex) -> NDArray[np.datetime64]:
    return np.asarray(index).astype("datetime64[D]")


def _index(days: NDArray[np.datetime64]) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(days.astype("datetime64[us]"), name="date")
