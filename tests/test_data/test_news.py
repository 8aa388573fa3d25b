"""Headlines: what a session may know of them, what is said where there are none, and a key nobody sees."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from pydantic import SecretStr

from data import data_fetcher
from data.data_fetcher import (
    CsvNews,
    FinnhubNews,
    fetch_stock_data,
    make_news,
    make_source,
    score,
    sentiment_features,
    with_headlines,
)
from data.data_validator import LEAST_SESSIONS, LEAST_SHARE, with_enough_headlines
from data.feature_engineer import SENTIMENT_COLUMNS
from data.schema import Bars, BarsReport, Provenance
from inference.load_gbm_models import load_bundle
from inference.pipeline import BundleForecaster, decide
from inference.position_sizing import make_sizer
from service.model_registry import ModelRegistry
from service.prediction_service import PredictionService
from service.schemas import PredictionRequest
from training import train_gbm
from utils.base import AIStocksError, DataError, Settings, StorageError, UpstreamError, UsageError

MakeBars = Callable[..., pd.DataFrame]
Compute = Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]
KEY = "a-key-that-nobody-may-see"
WORDS = ("Profit soars to a great record", "Fraud probe hits a weak quarter", "Shares trade on Monday")


def headlines_of(*rows: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "date": pd.to_datetime([day for day, _ in rows]),
            "headline": [text for _, text in rows],
            "source": "x",
        }
    )


def many(bars: pd.DataFrame, seed: int = 0, share: float = 0.7) -> pd.DataFrame:
    """Headlines on a share of all days, weekends too, and none in the middle for a month."""
    rng = np.random.default_rng(seed)
    days = pd.date_range(bars.index[10], bars.index[-1])
    days = days[(rng.random(len(days)) < share) & ~((days > bars.index[150]) & (days < bars.index[172]))]
    days = days.repeat(rng.integers(1, 4, len(days)))
    return headlines_of(*((str(day.date()), f"{rng.choice(WORDS)} ({i})") for i, day in enumerate(days)))


def bars_of(frame: pd.DataFrame, symbol: str = "AAPL") -> Bars:
    where = Provenance(
        source="csv:x", fetched_at=datetime(2026, 1, 1, tzinfo=UTC), last_session=frame.index[-1], stale=False
    )
    return Bars(symbol=symbol, frame=frame, provenance=where, report=BarsReport())


# --- what a session knows -------------------------------------------------------------------------


def slowly(bars: pd.DataFrame, dates: pd.Series, scores: np.ndarray, t: int) -> list[float]:
    """The columns at bar t, read off the list of headlines."""

    def known(sessions: int, at: int) -> np.ndarray:
        first = bars.index[max(at - sessions, 0)]
        return scores[(dates >= first) & (dates < bars.index[at])]

    covered = [len(known(5, at)) > 0 for at in range(max(t - 59, 0), t + 1)]
    means = [known(w, t).mean() if covered[-1] and len(known(w, t)) else np.nan for w in (1, 5, 20)]
    volume = np.log((1 + len(known(5, t))) / (1 + len(known(60, t)) / 12))
    return [*means, volume if len(covered) == 60 and all(covered) else np.nan]


def test_the_columns_are_what_can_be_counted_by_hand(make_bars: MakeBars) -> None:
    bars = make_bars(n=260)
    headlines = many(bars)
    made = sentiment_features(bars, headlines)
    assert tuple(made.columns) == SENTIMENT_COLUMNS
    assert made.index.equals(bars.index)
    scores = np.array([score(text) for text in headlines["headline"]])
    for t in [*range(1, 260, 5), *range(150, 180)]:
        assert made.iloc[t].tolist() == pytest.approx(
            slowly(bars, headlines["date"], scores, t), nan_ok=True
        ), t
    assert made.notna().sum().min() > 60


def test_nothing_is_nan_and_never_zero(make_bars: MakeBars) -> None:
    bars = make_bars(n=100)
    nothing = sentiment_features(bars, headlines_of())
    assert nothing.isna().all(axis=None)
    one = sentiment_features(bars, headlines_of((f"{bars.index[40]:%Y-%m-%d}", WORDS[0])))
    assert one["sentiment_20d"].first_valid_index() == bars.index[41]
    assert one["sentiment_20d"].last_valid_index() == bars.index[45]
    assert one["sentiment_1d"].notna().sum() == 1
    assert one["news_volume_5d"].isna().all()


def test_a_weekend_is_known_on_monday_and_a_holiday_after_it(make_bars: MakeBars) -> None:
    bars = make_bars(n=100, start="2022-12-01")
    for dated, known in (
        ("2022-12-10", "2022-12-12"),
        ("2022-12-26", "2022-12-27"),
        ("2022-12-09", "2022-12-12"),
    ):
        made = sentiment_features(bars, headlines_of((dated, WORDS[1])))["sentiment_1d"]
        assert made.first_valid_index() == pd.Timestamp(known)
        assert made[known] == score(WORDS[1])
    # Before the first bar there is no session at which they became known.
    assert sentiment_features(bars, headlines_of(("2022-11-30", WORDS[1]))).isna().all(axis=None)


def known_too_early(compute: Compute, bars: pd.DataFrame, headlines: pd.DataFrame) -> list[pd.Timestamp]:
    """Sessions whose values change without the bars after them and the headlines since their day."""
    whole = compute(bars, headlines)
    wrong = []
    for t in range(60, len(bars), 7):
        day = bars.index[t]
        alone = compute(bars.iloc[: t + 1], headlines[headlines["date"] < day]).iloc[-1]
        if not alone.equals(whole.iloc[t]):
            wrong.append(day)
    return wrong


def test_no_session_knows_a_headline_of_its_own_day(make_bars: MakeBars) -> None:
    bars = make_bars(n=260)
    assert known_too_early(sentiment_features, bars, many(bars)) == []


@pytest.mark.parametrize("days", [1, 3])
def test_a_headline_that_is_used_too_early_is_caught(make_bars: MakeBars, days: int) -> None:
    bars = make_bars(n=260)

    def same_day(rows: pd.DataFrame, headlines: pd.DataFrame) -> pd.DataFrame:
        return sentiment_features(rows, headlines.assign(date=headlines["date"] - pd.Timedelta(days=days)))

    assert len(known_too_early(same_day, bars, many(bars))) > 12


def test_scores_tell_good_from_bad() -> None:
    good, bad, neither = map(score, WORDS)
    assert good > 0.0 > bad
    assert neither == 0.0
    assert max(abs(good), abs(bad)) <= 1.0
    assert score("Shares surge") > 0.0 > score("Shares plunge")


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_read_in_order_and_doubles_count_once(tmp_path: Path) -> None:
    rows = ["date,headline,source", "2022-01-04,NA,a", "2022-01-03,Up,a", "2022-01-03,Up,b", "2022-01-03, ,b"]
    (tmp_path / "AAPL.csv").write_text("\n".join(rows) + "\n")
    read = CsvNews(tmp_path).read("AAPL")
    assert read["headline"].tolist() == ["Up", "NA"]
    assert read["date"].tolist() == [pd.Timestamp("2022-01-03"), pd.Timestamp("2022-01-04")]


@pytest.mark.parametrize(
    "content",
    [b"", b"date,headline\n2022-01-03,Up\n", b"date,headline,source\nyesterday,Up,x\n", b"\xff\xfe\x00"],
)
def test_a_file_that_is_no_list_of_headlines_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "AAPL.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"^AAPL\.csv"):
        CsvNews(tmp_path).read("AAPL")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "MSFT.csv").mkdir()
    for symbol in ("AAPL", "MSFT"):
        with pytest.raises(UpstreamError, match=rf"{symbol}\.csv"):
            CsvNews(tmp_path).read(symbol)


def test_the_settings_name_the_source(tmp_path: Path) -> None:
    assert make_news(Settings(news="")) is None
    source = make_news(Settings(news=f"csv:{tmp_path}"))
    assert source is not None
    assert source.name == f"csv:{tmp_path.name}"
    assert isinstance(make_news(Settings(news="finnhub", cache_dir=tmp_path)), FinnhubNews)
    for wrong in ("csv:", "yahoo", f"csv:{tmp_path / 'nowhere'}", "finnhub:x"):
        with pytest.raises(UsageError, match="AI_STOCKS_NEWS"):
            make_news(Settings(news=wrong))


# --- Finnhub --------------------------------------------------------------------------------------


class Finnhub:
    """A server that answers as Finnhub does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.articles: list[dict[str, object]] = []
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("X-Finnhub-Token")))
                self.send_response(outer.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(outer.body or outer.answer(self.path))

            def log_message(self, *_args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/company-news"

    def answer(self, path: str) -> bytes:
        span = parse_qs(urlsplit(path).query)
        first, last = (datetime.fromisoformat(span[name][0]).date() for name in ("from", "to"))
        days = [datetime.fromtimestamp(int(str(one["datetime"])), UTC).date() for one in self.articles]
        return json.dumps(
            [a for a, day in zip(self.articles, days, strict=True) if first <= day <= last]
        ).encode()

    def publish(self, days_ago: float, headline: str) -> None:
        at = datetime.now(UTC) - timedelta(days=days_ago)
        extra = {"id": 1, "related": "AAPL", "summary": "..."}
        self.articles.append({"datetime": int(at.timestamp()), "headline": headline, "source": "x", **extra})


@pytest.fixture
def finnhub() -> Iterator[Finnhub]:
    fake = Finnhub()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def asking(finnhub: Finnhub, cache: Path, key: str = KEY) -> FinnhubNews:
    return FinnhubNews(SecretStr(key), cache, address=finnhub.address, timeout_s=5.0)


def an_hour_later(cache: Path) -> None:
    path = cache / "news" / "AAPL.csv"
    long_ago = path.stat().st_mtime - data_fetcher.ASK_EVERY_S
    os.utime(path, (long_ago, long_ago))


def test_headlines_accumulate_and_the_key_is_in_no_address(finnhub: Finnhub, tmp_path: Path) -> None:
    for days_ago, text in ((400, "too old"), (300, "old"), (2, "new")):
        finnhub.publish(days_ago, text)
    source = asking(finnhub, tmp_path)
    assert source.read("AAPL")["headline"].tolist() == ["old", "new"]
    pages = len(finnhub.asked)
    assert pages == 25
    assert {token for _, token in finnhub.asked} == {KEY}
    assert all(KEY not in path and "symbol=AAPL" in path for path, _ in finnhub.asked)
    assert source.read("AAPL")["headline"].tolist() == ["old", "new"]
    assert len(finnhub.asked) == pages, "asked again within the hour"
    # What Finnhub has forgotten stays, and only what is new is asked for.
    finnhub.articles.clear()
    finnhub.publish(0, "newest")
    an_hour_later(tmp_path)
    assert source.read("AAPL")["headline"].tolist() == ["old", "new", "newest"]
    assert len(finnhub.asked) == pages + 1
    assert asking(finnhub, tmp_path).read("AAPL").equals(CsvNews(tmp_path / "news").read("AAPL"))
    assert sorted(path.suffix for path in (tmp_path / "news").iterdir()) == [".csv", ".lock"]
    assert not any(KEY in path.read_text() for path in (tmp_path / "news").iterdir())


def refusal(source: FinnhubNews, caplog: pytest.LogCaptureFixture) -> str:
    """What is said when the source cannot answer; whatever it is, it does not hold the key."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UpstreamError) as caught:
        source.read("AAPL")
    chain, error = [], caught.value
    while error is not None:
        chain.append(repr(error))
        error = error.__cause__
    assert KEY not in "".join([*chain, caplog.text, repr(source)])
    return str(caught.value)


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500])
def test_a_refusal_is_an_upstream_error(
    finnhub: Finnhub, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    finnhub.status = status
    assert f"({status}:" in refusal(asking(finnhub, tmp_path), caplog)
    assert len(finnhub.asked) == 1, "neither tried again nor followed elsewhere"
    assert not list((tmp_path / "news").glob("*.csv"))


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'[{"headline": 3}]', b'[{"datetime": 1e99, "headline": ""}]']
)
def test_an_answer_that_is_no_news_is_an_upstream_error(
    finnhub: Finnhub, tmp_path: Path, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    finnhub.body = body
    assert "no list of articles" in refusal(asking(finnhub, tmp_path), caplog)


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY}é\N{SNOWMAN}", f" {KEY}"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    finnhub: Finnhub, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    assert "cannot be asked" in refusal(asking(finnhub, tmp_path, key), caplog)


def test_no_key_and_no_network_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "AI_STOCKS_FINNHUB_KEY" in refusal(FinnhubNews(None, tmp_path), caplog)
    closed = FinnhubNews(SecretStr(KEY), tmp_path, address="http://127.0.0.1:9/", timeout_s=2.0)
    assert "cannot be asked (ConnectionError)" in refusal(closed, caplog)


def test_what_was_kept_serves_while_finnhub_is_down(
    finnhub: Finnhub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finnhub.publish(3, "kept")
    asking(finnhub, tmp_path).read("AAPL")
    an_hour_later(tmp_path)
    finnhub.status = 429
    assert asking(finnhub, tmp_path).read("AAPL")["headline"].tolist() == ["kept"]
    assert "those that were kept" in caplog.text


def test_a_damaged_file_is_put_aside_and_asked_for_again(finnhub: Finnhub, tmp_path: Path) -> None:
    finnhub.publish(3, "again")
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "AAPL.csv").write_bytes(b"\x00\xff")
    assert asking(finnhub, tmp_path).read("AAPL")["headline"].tolist() == ["again"]
    assert (tmp_path / "news" / "AAPL.damaged").read_bytes() == b"\x00\xff"


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "news").write_text("a file, where a folder should be")
    with pytest.raises(StorageError, match="cannot be kept"):
        FinnhubNews(SecretStr(KEY), tmp_path).read("AAPL")


# --- beside the prices ----------------------------------------------------------------------------


def write(folder: Path, headlines: pd.DataFrame) -> CsvNews:
    folder.mkdir(exist_ok=True)
    headlines.to_csv(folder / "AAPL.csv", index=False, date_format="%Y-%m-%d")
    return CsvNews(folder)


def test_headlines_stand_beside_the_prices(make_bars: MakeBars, tmp_path: Path) -> None:
    bars = bars_of(make_bars(n=260))
    headlines = many(bars.frame)
    dressed = with_headlines(bars, write(tmp_path / "news", headlines))
    assert dressed.sentiment == {"used": True, "source": "csv:news", "headlines": len(headlines)}
    pd.testing.assert_frame_equal(dressed.frame[bars.frame.columns], bars.frame)
    columns = dressed.frame[list(SENTIMENT_COLUMNS)]
    pd.testing.assert_frame_equal(columns, sentiment_features(bars.frame, headlines))


def test_without_headlines_the_prices_stand_alone_and_say_why(make_bars: MakeBars, tmp_path: Path) -> None:
    bars = bars_of(make_bars(n=260))
    assert with_headlines(bars, None) is bars
    alone = with_headlines(bars, CsvNews(tmp_path))
    assert alone.frame is bars.frame
    assert alone.sentiment == {
        "used": False,
        "reason": "csv:" + tmp_path.name + " has no headlines of AAPL: add AAPL.csv",
    }
    assert with_enough_headlines(alone, 0) is alone
    nobody = with_enough_headlines(bars, 0)
    pd.testing.assert_frame_equal(nobody.frame, bars.frame)
    assert "AI_STOCKS_NEWS" in str(nobody.sentiment["reason"])


def test_too_few_headlines_train_nothing(make_bars: MakeBars, tmp_path: Path) -> None:
    frame = make_bars(n=1500)
    source = write(tmp_path / "news", many(frame.iloc[-600:], share=1.0))
    enough = with_headlines(bars_of(frame), source)
    covered = int(enough.frame["sentiment_5d"].notna().sum())
    assert LEAST_SESSIONS < covered < 600
    assert with_enough_headlines(enough, 1500 - int(covered / LEAST_SHARE)) is enough
    # Enough sessions, and too small a share of the rows; all of the rows, and too few sessions.
    few = with_headlines(bars_of(frame.iloc[-470:]), source)
    for thin in (with_enough_headlines(enough, 0), with_enough_headlines(few, 0)):
        assert not set(SENTIMENT_COLUMNS) & set(thin.frame.columns)
        assert thin.sentiment["used"] is False
        assert "training sessions, and 480 and 40% are the least" in str(thin.sentiment["reason"])
    assert f"csv:news has headlines for {covered} of 1,500 " in str(
        with_enough_headlines(enough, 0).sentiment["reason"]
    )


def test_every_error_of_a_source_is_said_and_none_is_raised(make_bars: MakeBars, tmp_path: Path) -> None:
    class Broken(CsvNews):
        def read(self, symbol: str) -> pd.DataFrame:
            raise AIStocksError("the moon is full")

    assert (
        with_headlines(bars_of(make_bars(n=260)), Broken(tmp_path)).sentiment["reason"] == "the moon is full"
    )


def test_the_lexicon_is_loaded_once() -> None:
    assert data_fetcher._analyser() is data_fetcher._analyser()


# --- from the flag to the answer ------------------------------------------------------------------

TOLD = "the model learned from headlines and knows none of the last sessions"


def planted(make_bars: MakeBars, folder: Path, n: int) -> pd.DataFrame:
    """Write prices that follow the tone of a headline two sessions later; the headlines begin late."""
    bars = make_bars(n=n, seed=4, vol=0.01)
    tone = np.random.default_rng(5).choice([-1.0, 1.0], n)
    lifted = np.exp(0.004 * np.cumsum(np.concatenate([[0.0, 0.0], tone[:-2]])))
    prices = {name: bars[name] * lifted for name in ("Open", "High", "Low", "Close")}
    bars = bars.assign(**prices, **{"Adj Close": prices["Close"]})
    texts = [WORDS[0 if way > 0 else 1] for way in tone]
    headlines = pd.DataFrame({"date": bars.index, "headline": texts, "source": "x"}).iloc[600:]
    for name, table in (("news", headlines.set_index("date")), ("later", bars), ("prices", bars.iloc[:-10])):
        (folder / name).mkdir()
        table.to_csv(folder / name / "AAPL.csv", index_label="date" if name == "news" else "Date")
    return bars


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_bars: MakeBars) -> Iterator[Path]:
    """A folder of prices, headlines and models, which the settings name."""
    folder = tmp_path_factory.mktemp("place")
    planted(make_bars, folder, 1_300)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("models", "logs", "cache", "results"):
            patch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(folder / name))
        patch.setenv("AI_STOCKS_SOURCE", f"csv:{folder / 'prices'}")
        yield folder


def train(place: Path, news: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Train with the flag; return the result and what was said on stderr."""
    flags = ["--include-sentiment", "--target-horizon", "1", "--n-trials", "0", "--no-lgb", "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AI_STOCKS_NEWS", news)
        assert train_gbm.main(["AAPL", "--json", *flags]) == 0
    said = capsys.readouterr()
    return json.loads(said.out)[0], said.err


def test_the_flag_trains_with_headlines_and_what_is_served_reads_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = train(place, f"csv:{place / 'news'}", capsys)
    assert result["evidence"]["ic"] > 0.2
    bundle = load_bundle(place / "models", "AAPL")
    assert bundle.metadata["sentiment"] == {"used": True, "source": "csv:news", "headlines": 700}
    assert max(bundle.importance, key=bundle.importance.__getitem__) == "sentiment_1d"
    # Backtest and service go on where the training ended: with headlines, and without.
    forecasts = []
    for news_of in (CsvNews(place / "news"), CsvNews(place / "logs")):
        source = make_source(f"csv:{place / 'later'}", news=news_of)
        frame = fetch_stock_data("AAPL", source=source).frame
        decisions = decide("AAPL", frame, BundleForecaster(bundle=bundle, as_lived=True), make_sizer())
        forecasts.append(decisions.frame["raw_scaled"])
        answer = PredictionService(
            registry=ModelRegistry(place / "models"), source=source, cache=None
        ).answer(PredictionRequest(symbol="AAPL"))
        says_so = [
            any(TOLD in text for text in texts)
            for texts in (decisions.findings, json.loads(answer)["metadata"]["notes"])
        ]
        assert says_so == [news_of.name != "csv:news"] * 2
        before = decide("AAPL", frame.iloc[:-3], BundleForecaster(bundle=bundle, as_lived=True), make_sizer())
        pd.testing.assert_frame_equal(before.frame, decisions.frame.iloc[:-3])
    read, unread = forecasts
    assert np.isfinite(read.iloc[-10:]).all()
    assert np.isfinite(unread.iloc[-10:]).all()
    assert (read != unread).iloc[-10:].any()
    pd.testing.assert_series_equal(read.iloc[:-10], unread.iloc[:-10])


def test_without_headlines_the_flag_trains_without_them_and_says_so_everywhere(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, said = train(place, "", capsys)
    reason = "AI_STOCKS_NEWS names no source of headlines"
    bundle = load_bundle(place / "models", "AAPL")
    assert bundle.metadata["sentiment"] == {"used": False, "reason": reason}
    assert not set(SENTIMENT_COLUMNS) & set(bundle.columns)
    assert reason in said
    warnings = Path(result["log"]).read_text().partition("=== WARNINGS ===")[2].partition("===")[0]
    assert f"trained without headlines: {reason}" in warnings
    assert f"trained without headlines: {reason}" in Path(result["report"]).read_text()
