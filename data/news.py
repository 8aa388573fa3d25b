"""Headlines of a symbol: where they come from, how each is scored, and what a session knows of them.

A headline is dated by its day of publication, and many come after the close: what is dated D is known from
the first session after D on, and never at the close of D itself. Where there are no headlines the columns are
NaN, which says that nothing is known; a zero would say that the news was neutral.
"""

import logging
import os
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
from filelock import FileLock
from pydantic import BaseModel, Field, SecretStr, TypeAdapter, ValidationError

from data.schema import Bars, bar_dates
from utils.errors import AIStocksError, DataError, StorageError, UpstreamError, UsageError
from utils.settings import Settings

logger = logging.getLogger(__name__)

COLUMNS = ("date", "headline", "source")
SENTIMENT_COLUMNS = ("sentiment_1d", "sentiment_5d", "sentiment_20d", "news_volume_5d")
# After so many sessions without a headline nothing is known, however many there were before.
MAX_GAP_SESSIONS = 5
# The least that training learns from. Two years (short of holidays): fewer sessions know the correlation with
# a 5-day return to within 0.1 at best, more than any headline is worth. And two rows of five: else most folds
# would train, and most of the verdict would be earned, on rows that know nothing of the news.
LEAST_SESSIONS, LEAST_SHARE = 480, 0.4
# How far back Finnhub tells; what is asked for at a time, what again (articles come late), and how often.
FINNHUB_KNOWS, PAGE, OVERLAP = timedelta(days=365), timedelta(days=14), timedelta(days=3)
ASK_EVERY_S = 3600.0
# The lexicon is that of everyday speech: what names things in headlines of markets, and what moves there.
_UP = "beat beats bullish climb climbs jump jumps rallies rally rise rises soar soars surge surges upgrade"
_DOWN = "bearish downgrade fall falls miss misses plunge plunges sink sinks slide slump slumps tumble tumbles"
_THINGS = "amazon credit demand gross interest security share shares vision"
MARKET_WORDS = {word: v for v, words in ((2.0, _UP), (0.0, _THINGS), (-2.0, _DOWN)) for word in words.split()}


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


class CsvNews:
    """A folder that holds ``<SYMBOL>.csv`` with the columns ``date,headline,source``."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UsageError(f"AI_STOCKS_NEWS=csv:{directory}: there is no such folder")
        self._directory = directory
        self.name = f"csv:{directory.resolve().name}"

    def read(self, symbol: str) -> pd.DataFrame:
        """Return ``COLUMNS`` of a normalised symbol by date; raises `UpstreamError` or `DataError`."""
        try:
            return _read(self._directory / f"{symbol}.csv")
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
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=60.0):
                return self._refreshed(symbol, path)
        except OSError as error:
            raise StorageError(f"headlines of {symbol} cannot be kept: {error.strerror or error}") from error

    def _refreshed(self, symbol: str, path: Path) -> pd.DataFrame:
        now, kept = datetime.now(UTC), _kept(path)
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
        frame = _in_order(new if kept is None else pd.concat([kept, new]))
        _write(path, frame)
        return frame

    def _ask(self, symbol: str, first: date, last: date) -> pd.DataFrame:
        if self.key is None:
            raise UpstreamError("Finnhub needs a key: set AI_STOCKS_FINNHUB_KEY")
        found: list[_Item] = []
        while first <= last:
            # A long span would be answered with its newest articles only.
            found += self._page(symbol, self.key, first, min(last, first + PAGE))
            first += PAGE + timedelta(days=1)
        # The day in UTC: the first session after it ends later than the day, whatever the exchange.
        rows = [(datetime.fromtimestamp(one.datetime, UTC).date(), one.headline, one.source) for one in found]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        return frame.assign(date=pd.to_datetime(frame["date"]))

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


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        if absent := sorted(set(COLUMNS) - set(table.columns)):
            raise DataError(
                f"{path.name} has no column {', '.join(absent)}: headlines need {','.join(COLUMNS)}"
            )
        table["date"] = pd.to_datetime(table["date"].str[:10], format="%Y-%m-%d")
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path.name} cannot be read as headlines: {error}") from error
    return _in_order(table.loc[:, list(COLUMNS)])


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Return headlines by date; what several sources printed on one day counts once."""
    table = table.loc[np.asarray(table["headline"].str.strip() != "")].sort_values("date", kind="stable")
    return table.drop_duplicates(["date", "headline"], ignore_index=True)


def _kept(path: Path) -> pd.DataFrame | None:
    try:
        return _read(path)
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("kept headlines are read anew: %s", error)
        path.replace(path.with_suffix(".damaged"))
        return None


def _write(path: Path, frame: pd.DataFrame) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        frame.to_csv(file, index=False, date_format="%Y-%m-%d")
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


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


def with_enough_headlines(bars: Bars, warmup_bars: int) -> Bars:
    """Return bars to train on, without the columns and with the reason where too few rows have them."""
    if bars.sentiment and not bars.sentiment["used"]:
        return bars
    reason = "AI_STOCKS_NEWS names no source of headlines"
    if bars.sentiment:
        covered = bars.frame["sentiment_5d"].iloc[warmup_bars:].notna()
        if covered.sum() >= max(LEAST_SESSIONS, LEAST_SHARE * len(covered)):
            return bars
        reason = (
            f"{bars.sentiment['source']} has headlines for {covered.sum():,} of {len(covered):,} training "
            f"sessions, and {LEAST_SESSIONS} and {LEAST_SHARE:.0%} are the least: add some, or leave earlier "
            "prices out"
        )
    logger.warning("%s: trains without headlines: %s", bars.symbol, reason)
    frame = bars.frame.drop(columns=list(SENTIMENT_COLUMNS), errors="ignore")
    return replace(bars, frame=frame, sentiment={**bars.sentiment, "used": False, "reason": reason})
