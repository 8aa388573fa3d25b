"""Where bars come from: Yahoo Finance, a folder of CSV files, or the prices embedded in ``bokeh_sampledata``.

A source answers with a raw table in Yahoo's convention; :func:`fetch_stock_data` is the one door through
which the product reads prices, whatever the source. Nothing falls back from one source to another. Where
headlines are asked for, what they say is put beside the prices: a folder of CSV files, or Finnhub's.
"""

import hashlib
import importlib.util
import io
import logging
import re
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import requests
from pydantic import BaseModel, Field, SecretStr, TypeAdapter, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from data.feature_engineer import MARKET_WORDS
from data.schema import (
    MAX_MISSING_SESSIONS,
    MAX_OFF_CALENDAR,
    RAW_COLUMNS,
    Bars,
    BarsReport,
    Provenance,
    bar_dates,
    calendar_for,
    clean_bars,
    normalise_symbol,
    refuse_above,
    written_dates,
)
from utils.base import (
    AIStocksError,
    DataError,
    Settings,
    StorageError,
    UnknownSymbolError,
    UpstreamError,
    UsageError,
)
from utils.model_paths import holding, write_whole

if TYPE_CHECKING:
    from data.cache_manager import BarCache

logger = logging.getLogger(__name__)

# What Yahoo or yfinance says of a symbol that is not there, as against an error of theirs.
_UNKNOWN = re.compile(
    r"no data found|not found|delisted|no price data|doesn't exist|invalid input", re.IGNORECASE
)
_NOT_A_CHART = (ValueError, LookupError, TypeError, AttributeError)
HEADLINE_COLUMNS = ("date", "headline", "source")
# How far back Finnhub tells; what is asked for at a time, what again (articles come late), and how often.
FINNHUB_KNOWS, PAGE, OVERLAP = timedelta(days=365), timedelta(days=15), timedelta(days=3)
ASK_EVERY_S = 3600.0
# After so many sessions without a headline nothing is known, however many there were before.
MAX_GAP_SESSIONS = 5


def make_news(settings: Settings) -> "NewsSource | None":
    """Return the source that the settings name, None where they name none; `UsageError` if it is unknown."""
    kind, _, directory = settings.news.partition(":")
    if not settings.news:
        return None
    if settings.news == "finnhub":
        return FinnhubNews(settings.finnhub_key, settings.cache_dir)
    if kind == "csv" and directory:
        return CsvNews(Path(directory).expanduser())
    raise UsageError(f"AI_STOCKS_NEWS={settings.news!r} is no source of headlines: use csv:DIR or finnhub")


def _folder(path: Path, option: str) -> tuple[Path, str]:
    """Return a folder that ``option`` names, and its source's name; `UsageError` where there is none."""
    if path.is_file():
        hint = f"name its folder: {option.rsplit(maxsplit=1)[-1]}{path.parent}"
        raise UsageError(f"{option}{path}: that is a file; {hint}")
    if not path.is_dir():
        raise UsageError(f"{option}{path}: there is no such folder")
    return path, f"csv:{path.resolve().name}"


class CsvNews:
    """A folder that holds ``<SYMBOL>.csv`` with the columns ``date,headline,source``."""

    def __init__(self, directory: Path) -> None:
        self._directory, self.name = _folder(directory, "AI_STOCKS_NEWS=csv:")

    def read(self, symbol: str) -> pd.DataFrame:
        """Return a normalised symbol's headlines by date; raises `UpstreamError` or `DataError`."""
        try:
            return _headlines_of(self._directory / f"{symbol}.csv")
        except FileNotFoundError:
            raise UpstreamError(f"{self.name} has no headlines of {symbol}: add {symbol}.csv") from None
        except OSError as error:
            raise UpstreamError(f"{symbol}.csv of {self.name} cannot be read: {error.strerror}") from error


class _Item(BaseModel):
    """What Finnhub says of an article, as far as it is used."""

    datetime: int = Field(ge=0, le=2**33)
    headline: str
    source: str = ""


_ITEMS = TypeAdapter(list[_Item])


@dataclass(frozen=True, slots=True)
class FinnhubNews:
    """Finnhub's company news, kept in ``cache_dir/news``: it knows the last year, and what was read stays.

    The key travels in a header, so that no address, message or log holds it.
    """

    key: SecretStr | None
    cache_dir: Path
    address: str = "https://finnhub.io/api/v1/company-news"
    timeout_s: float = 10.0
    name: str = "finnhub"

    def read(self, symbol: str) -> pd.DataFrame:
        """Return what was kept and what is new; what was kept alone, with a warning, where asking fails."""
        path = self.cache_dir / "news" / f"{symbol}.csv"
        try:
            with holding(path.with_suffix(".lock"), 60.0, lambda: f"{symbol} is being read: try later"):
                return self._refreshed(symbol, path)
        except OSError as error:
            raise StorageError(f"headlines of {symbol} cannot be kept: {error.strerror or error}") from error

    def _refreshed(self, symbol: str, path: Path) -> pd.DataFrame:
        now, kept = datetime.now(UTC), _kept_headlines(path)
        first = now.date() - FINNHUB_KNOWS
        if kept is not None and 0.0 <= now.timestamp() - path.stat().st_mtime < ASK_EVERY_S:
            return kept
        if kept is not None and len(kept):
            first = max(first, kept["date"].max().date() - OVERLAP)
        try:
            new = self._ask(symbol, first, now.date())
        except UpstreamError as error:
            if kept is None:
                raise
            logger.warning("%s: headlines are those that were kept: %s", symbol, error)
            return kept
        frame = _by_date(new if kept is None else pd.concat([kept, new]))
        write_whole(path, frame.to_csv(index=False, date_format="%Y-%m-%d").encode())
        return frame

    def _ask(self, symbol: str, first: date, last: date) -> pd.DataFrame:
        if self.key is None:
            raise UpstreamError("Finnhub needs a key: set AI_STOCKS_FINNHUB_KEY")
        # A long span would be answered with its newest articles only.
        pages = [day.date() for day in pd.date_range(first, last, freq=PAGE)]
        found = [item for day in pages for item in self._page(symbol, self.key, day, min(last, day + PAGE))]
        # The day in UTC: the first session after it ends later than the day, whatever the exchange.
        days = pd.to_datetime([item.datetime for item in found], unit="s").normalize()
        texts = [(item.headline, item.source) for item in found]
        return pd.DataFrame(texts, columns=list(HEADLINE_COLUMNS[1:])).assign(date=days)

    def _page(self, symbol: str, key: SecretStr, first: date, last: date) -> list[_Item]:
        try:
            answer = requests.get(
                self.address,
                params={"symbol": symbol, "from": first.isoformat(), "to": last.isoformat()},
                headers={"X-Finnhub-Token": key.get_secret_value()},
                timeout=self.timeout_s,
                allow_redirects=False,
            )
        except (requests.RequestException, ValueError) as error:
            # The message of a header that cannot be sent holds the key.
            raise UpstreamError(f"Finnhub cannot be asked ({type(error).__name__}): try later") from None
        if answer.status_code != requests.codes.ok:
            why = {401: "the key is wrong", 403: "the key may not", 429: "too many requests"}
            said = why.get(answer.status_code, "no answer")
            raise UpstreamError(f"Finnhub has no news of {symbol} for us ({answer.status_code}: {said})")
        try:
            return _ITEMS.validate_json(answer.content)
        except ValidationError as error:
            raise UpstreamError(f"Finnhub's answer for {symbol} is no list of articles") from error


NewsSource = CsvNews | FinnhubNews


def _dated(file: Path | io.BytesIO, name: str, needed: Sequence[str], *, texts: bool) -> pd.DataFrame:
    """Return a CSV file's rows, its first ``needed`` column as dates; `DataError` where it cannot be read."""
    try:
        table = pd.read_csv(file, dtype=str if texts else None, keep_default_na=not texts, encoding="utf-8")
        if absent := [column for column in needed if column not in table.columns]:
            raise DataError(f"{name} has no column {', '.join(absent)}: it needs {','.join(needed)}")
        table[needed[0]] = written_dates(table[needed[0]], name)
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    return table


def _headlines_of(path: Path) -> pd.DataFrame:
    return _by_date(_dated(path, path.name, HEADLINE_COLUMNS, texts=True))


def _by_date(table: pd.DataFrame) -> pd.DataFrame:
    """Return headlines by date; what several sources printed on one day counts once."""
    told = table.loc[np.asarray(table["headline"].str.strip() != ""), list(HEADLINE_COLUMNS)]
    return told.sort_values("date", kind="stable").drop_duplicates(["date", "headline"], ignore_index=True)


def _kept_headlines(path: Path) -> pd.DataFrame | None:
    try:
        return _headlines_of(path)
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("kept headlines are read anew: %s", error)
        path.replace(path.with_suffix(".damaged"))
        return None


class BarSource(ABC):
    """Knows raw daily prices, maybe with ``news``; ``is_live`` where a newer session may appear by itself."""

    name: str
    is_live: bool
    news: NewsSource | None = None

    @abstractmethod
    def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
        """Return ``RAW_COLUMNS`` over tz-naive session dates, from ``start`` on or all there is.

        Raises ``UnknownSymbolError`` if it has nothing for the symbol, ``UpstreamError`` if out of reach.
        """


class FileSource(BarSource):
    """A source whose table is read whole, and that can say cheaply whether it is another one than before."""

    is_live = False

    @abstractmethod
    def _read(self, symbol: str) -> bytes:
        """Return the very bytes that a symbol's rows are made of."""

    @abstractmethod
    def _parse(self, symbol: str, content: bytes) -> pd.DataFrame:
        """Return all rows."""

    def fetch_revised(self, symbol: str) -> tuple[pd.DataFrame, str]:
        """Return all rows, and the sha256 of the very bytes they were read from."""
        content = self._read(symbol)
        return self._parse(symbol, content), hashlib.sha256(content).hexdigest()

    def revision(self, symbol: str) -> str:
        """Return that sha256 alone, quickly."""
        return hashlib.sha256(self._read(symbol)).hexdigest()

    def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
        """Return the rows from ``start`` on; see :class:`BarSource`."""
        table, _ = self.fetch_revised(symbol)
        return table if start is None else table.loc[np.asarray(table.index >= pd.Timestamp(start))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawAnswer:
    """What a source said, when it was asked (UTC), and why nothing newer could be had if that failed."""

    raw: pd.DataFrame
    fetched_at: datetime
    failure: str | None = None


def fetch_stock_data(
    symbol: str,
    *,
    source: BarSource,
    cache: "BarCache | None" = None,
    force_refresh: bool = False,
    now: datetime | None = None,
) -> Bars:
    """Return adjusted, checked daily bars of one symbol, which is normalised here.

    With a ``cache`` older bars are better than a source's failure, and come with ``provenance.stale``;
    ``force_refresh`` asks for the whole history whatever it holds. Only sessions that had closed by ``now``
    (UTC, by default the present) are returned.

    Raises
    ------
    InvalidSymbolError, StorageError, UnknownSymbolError, UpstreamError, DataError
    """
    symbol = normalise_symbol(symbol)
    now = now or datetime.now(UTC)
    if cache is None:
        answer = RawAnswer(raw=source.fetch(symbol), fetched_at=now)
    else:
        answer = cache.read_through(symbol, source, now=now, force_refresh=force_refresh)
    frame, report = check_answer(symbol, answer.raw, source.name, now)
    for problem in report.problems():
        logger.info("%s from %s: %s", symbol, source.name, problem)
    last = pd.Timestamp(frame.index[-1])
    stale = last < last_due(symbol, source.name, now) or answer.failure is not None
    seen = Provenance(source=source.name, fetched_at=answer.fetched_at, last_session=last, stale=stale)
    return with_headlines(Bars(symbol=symbol, frame=frame, provenance=seen, report=report), source.news)


def settled(raw: pd.DataFrame, last_closed: pd.Timestamp) -> pd.DataFrame:
    """Return the rows of a raw table whose sessions had closed by ``last_closed`` (tz-naive)."""
    return raw.loc[bar_dates(raw) <= last_closed]


def check_answer(
    symbol: str, raw: pd.DataFrame, source_name: str, now: datetime
) -> tuple[pd.DataFrame, BarsReport]:
    """Return the bars of the sessions in a raw table that had closed by ``now``, and what was found in it.

    Raises ``DataError``, which names symbol and source, if the table cannot be used.
    """
    calendar = calendar_for(symbol)
    ended = settled(raw, calendar.last_closed_session(now))
    if ended.empty:
        raise DataError(f"{symbol}: {source_name} has no session that had closed by {now:%Y-%m-%d %H:%M} UTC")
    try:
        frame, report = clean_bars(ended)
        closed = calendar.off_calendar(pd.DatetimeIndex(frame.index))
        refuse_above(len(closed), len(frame), MAX_OFF_CALENDAR, "rows lie on days without a session")
        frame = frame.drop(index=closed) if len(closed) else frame
        missing = len(calendar.missing(pd.DatetimeIndex(frame.index)))
        refuse_above(missing, len(frame) + missing, MAX_MISSING_SESSIONS, "sessions are missing")
    except DataError as error:
        raise type(error)(f"{symbol} from {source_name}: {error}") from error
    return frame, replace(
        report,
        rows=len(frame),
        off_calendar=len(closed),
        missing_sessions=missing,
        unfinished_dropped=len(raw) - len(ended),
    )


def last_due(symbol: str, source_name: str, now: datetime) -> pd.Timestamp:
    """Return the last session that had closed by ``now`` and that the source could know."""
    last_closed = calendar_for(symbol).last_closed_session(now)
    return min(last_closed, SampleSource.ENDS) if source_name == SampleSource.name else last_closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bars in memory.

    ``content``, what an answer depends on, is the hash of their frame, and whether they are stale. There may
    be newer ones from ``due`` (UTC) on; ``tries`` times in a row there were none. ``revision`` is that of the
    source's answer, where it has revisions; None after a failure.
    """

    bars: Bars
    content: tuple[str, bool]
    due: datetime
    tries: int = 0
    revision: str | None = None

    def at(self, now: datetime, *, failed: bool = False) -> "Held":
        """Return these bars as of ``now``: stale if a session has closed since, or after a failure."""
        where = self.bars.provenance
        stale = where.stale or failed or where.last_session < last_due(self.bars.symbol, where.source, now)
        bars = replace(self.bars, provenance=replace(where, stale=stale))
        return replace(self, bars=bars, content=(self.content[0], stale))


def make_source(spec: str, *, cache_dir: Path | None = None, news: NewsSource | None = None) -> BarSource:
    """Return ``yahoo`` (cookies go to ``cache_dir``), ``sample`` or ``csv:DIR``; else a ``UsageError``."""
    kind, colon, directory = spec.partition(":")
    source: BarSource
    if spec == "yahoo":
        source = YahooSource(cache_dir or Settings.model_fields["cache_dir"].get_default())
    elif spec == "sample":
        source = SampleSource()
    elif kind == "csv" and colon and directory:
        source = CsvSource(Path(directory).expanduser())
    else:
        raise UsageError(f"there is no source {spec!r}: use yahoo, sample or csv:DIR")
    source.news = news
    return source


@dataclass(eq=False)
class YahooSource(BarSource):
    """Yahoo Finance by way of yfinance, whose caches lie in ours and whose errors are made to show.

    It is asked ``attempts`` times at most, with random pauses of up to ``backoff_s`` at first, then doubled;
    ``session`` stands in for yfinance's own HTTP session.
    """

    name = "yahoo"
    is_live = True

    cache_dir: Path
    attempts: int = 3
    backoff_s: float = 1.0
    timeout_s: float = 10.0
    session: object | None = None

    def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
        """Return Yahoo's rows; see :class:`BarSource`."""
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=self.backoff_s, max=30.0),
            retry=retry_if_exception_type(UpstreamError),
            reraise=True,
        )
        try:
            table = retrying(self._ask, symbol, start)
        except UpstreamError as error:
            raise UpstreamError(
                f"Yahoo cannot be reached for {symbol} ({error}): try again later, or work without it by "
                "`--source sample` or `--source csv:DIR`"
            ) from error
        if table.empty:
            raise UnknownSymbolError(
                f"Yahoo has no daily prices of {symbol}: check its spelling on finance.yahoo.com"
            )
        return table.loc[:, list(RAW_COLUMNS)].set_axis(bar_dates(table))

    def _ask(self, symbol: str, start: date | None) -> pd.DataFrame:
        yfinance = self._yfinance
        # Without a zone at hand yfinance asks for it first, and keeps a bad answer for the process's life.
        yfinance.cache.get_tz_cache().store(symbol, calendar_for(symbol).timezone)
        yfinance.data.YfData.cache_get.cache_clear()
        try:
            ticker = yfinance.Ticker(symbol, session=self.session)
            span = {"period": "max"} if start is None else {"start": start.isoformat()}
            table = ticker.history(**span, auto_adjust=False, actions=True, timeout=self.timeout_s)
            return pd.DataFrame(table)
        except yfinance.exceptions.YFTickerMissingError as error:
            if _UNKNOWN.search(str(error)) is None:
                raise UpstreamError(str(error)) from error
            logger.info("Yahoo on %s: %s", symbol, error)
            return pd.DataFrame()
        # yfinance lets all through: network errors (OSError), pages that are not JSON, JSON that is no chart.
        except (yfinance.exceptions.YFException, OSError, *_NOT_A_CHART) as error:
            raise UpstreamError(f"{type(error).__name__}: {error}"[:200]) from error

    @cached_property
    def _yfinance(self) -> Any:  # noqa: ANN401 - the module has no types
        import yfinance  # noqa: PLC0415 - half a second, which offline sources need not wait for

        # Its own deprecations, which yfinance turns on for its users to read, are nobody's business here.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="^yfinance")
        yfinance.config.debug.hide_exceptions = False
        yfinance.set_tz_cache_location(str(self.cache_dir / "yfinance"))
        return yfinance


class CsvSource(FileSource):
    """A folder with ``<SYMBOL>.csv`` of ``Date`` and ``RAW_COLUMNS``; its last part goes into the name."""

    def __init__(self, directory: Path) -> None:
        self._directory, self.name = _folder(directory, "--source csv:")

    def _parse(self, symbol: str, content: bytes) -> pd.DataFrame:
        return _dated(io.BytesIO(content), f"{symbol}.csv", ["Date"], texts=False).set_index("Date")

    def _read(self, symbol: str) -> bytes:
        try:
            return (self._directory / f"{symbol}.csv").read_bytes()
        except FileNotFoundError:
            there = ", ".join(sorted(file.stem for file in self._directory.glob("*.csv"))) or "no symbol"
            has = textwrap.shorten(there, 100, placeholder=" and more")
            raise UnknownSymbolError(f"{self.name} has no {symbol}.csv; it has {has}") from None
        except OSError as error:
            raise UpstreamError(f"{symbol}.csv of {self.name} cannot be read: {error.strerror}") from error


class SampleSource(FileSource):
    """Real prices of AAPL, FB, GOOG, IBM and MSFT from 2000 to March 2013, embedded in ``bokeh_sampledata``.

    The table (Quandl WIKI, public domain) holds prices and volumes as printed on the day, and ``Adj Close``
    as of years later. Here a split shows as a jump of ``Adj Close / Close`` by a simple ratio; prices before
    it are divided by the ratio and volumes multiplied by it, and ``Adj Close`` is scaled to meet the last
    close. Volumes then equal Yahoo's (up to later splits), but for the days of the splits themselves, which
    the table has at half.
    """

    name = "sample"
    SYMBOLS = ("AAPL", "FB", "GOOG", "IBM", "MSFT")
    ENDS = pd.Timestamp("2013-03-01")
    # A factor jumps by 11 % at the largest special dividend (MSFT 2004), by 50 % at the smallest usual split.
    _SMALLEST_SPLIT = 1.25

    def _read(self, symbol: str) -> bytes:
        if symbol not in self.SYMBOLS:
            raise UnknownSymbolError(f"the source sample has no {symbol}; it has {', '.join(self.SYMBOLS)}")
        spec = importlib.util.find_spec("bokeh_sampledata")
        folders = spec.submodule_search_locations if spec is not None else None
        if not folders:
            raise UsageError("--source sample needs the package bokeh_sampledata: pip install -e '.[sample]'")
        path = Path(folders[0]) / "_data" / "stocks.csv.gz"
        if not path.is_file():
            raise UsageError("--source sample needs bokeh_sampledata 2026.1 or later")
        return path.read_bytes()

    def _parse(self, symbol: str, content: bytes) -> pd.DataFrame:
        table = pd.read_csv(io.BytesIO(content), compression="gzip", parse_dates=["Date"])
        one = table.loc[np.asarray(table["Ticker"] == symbol)].set_index("Date")
        return self._in_yahoos_convention(one.loc[:, list(RAW_COLUMNS)].astype(np.float64))

    def _in_yahoos_convention(self, table: pd.DataFrame) -> pd.DataFrame:
        factor = np.asarray(table["Adj Close"] / table["Close"], dtype=np.float64)
        jump = factor[1:] / factor[:-1]
        halves = np.round(2.0 * np.where(jump > self._SMALLEST_SPLIT, jump, 1.0)) / 2.0
        later_splits = np.append(np.cumprod(halves[::-1])[::-1], 1.0)
        prices = {name: table[name] / later_splits for name in ("Open", "High", "Low", "Close")}
        rest = {"Volume": table["Volume"] * later_splits, "Adj Close": table["Adj Close"] / factor[-1]}
        return table.assign(**prices, **rest)


@cache
def _analyser() -> Any:  # noqa: ANN401 - the module has no types
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - reads its lexicon

    analyser = SentimentIntensityAnalyzer()
    analyser.lexicon.update(MARKET_WORDS)
    return analyser


@lru_cache(maxsize=1 << 16)
def score(headline: str) -> float:
    """Return how a headline sounds, from -1 to 1; 0 where no word of it is in the lexicon.

    References
    ----------
    Hutto, Gilbert (2014), VADER: a parsimonious rule-based model for sentiment analysis, ICWSM-14.
    """
    return float(_analyser().polarity_scores(headline)["compound"])


def sentiment_features(bars: pd.DataFrame, headlines: pd.DataFrame) -> pd.DataFrame:
    """Return what each session knows of the headlines dated before it, `SENTIMENT_COLUMNS` by bar.

    ``sentiment_<k>d`` is the mean score of the headlines that became known in the last k sessions;
    ``news_volume_5d`` compares their number in 5 sessions with that in 60, as a logarithm. NaN where none
    became known within `MAX_GAP_SESSIONS`, or (the number) not in all 60.
    """
    sessions = np.asarray(bar_dates(bars), dtype="datetime64[D]")
    # The first session after the date. What is dated before the first bar became known we know not when.
    place = np.searchsorted(sessions, np.asarray(headlines["date"], dtype="datetime64[D]"), side="right")
    known = (place > 0) & (place < len(sessions))
    scores = np.fromiter(map(score, headlines["headline"][known]), dtype=np.float64)
    n, total = (
        pd.Series(np.bincount(place[known], weights=weights, minlength=len(sessions)), dtype=np.float64)
        for weights in (None, scores)
    )
    count, said = ({w: each.rolling(w, min_periods=1).sum() for w in (1, 5, 20, 60)} for each in (n, total))
    recent = n.rolling(MAX_GAP_SESSIONS, min_periods=1).sum() > 0
    always = recent.astype(np.float64).rolling(60).min() > 0
    made = {f"sentiment_{w}d": (said[w] / count[w]).where(recent) for w in (1, 5, 20)}
    made["news_volume_5d"] = ((1.0 + count[5]) / (1.0 + count[60] / 12.0)).map(np.log).where(always)
    return pd.DataFrame(made).set_axis(bars.index)


def with_headlines(bars: Bars, news: NewsSource | None) -> Bars:
    """Return bars with `SENTIMENT_COLUMNS` beside the prices; without, and with the reason, on failure."""
    if news is None:
        return bars
    try:
        headlines = news.read(bars.symbol)
    except AIStocksError as error:
        logger.warning("%s: no headlines: %s", bars.symbol, error)
        return replace(bars, sentiment={"used": False, "reason": str(error)})
    facts = {"used": True, "source": news.name, "headlines": len(headlines)}
    return replace(bars, frame=bars.frame.join(sentiment_features(bars.frame, headlines)), sentiment=facts)
