"""One contract over every source; the Yahoo source is the real yfinance package against a local chart API."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from curl_cffi.requests import Session

from data.cache_manager import BarCache, describe
from data.data_fetcher import (
    CsvSource,
    SampleSource,
    YahooSource,
    check_answer,
    fetch_stock_data,
    make_source,
    settled,
)
from data.schema import BAR_COLUMNS, RAW_COLUMNS, bars_hash
from utils.base import DataError, UnknownSymbolError, UpstreamError, UsageError

Answer = tuple[int, bytes]


def raw_table(bars: pd.DataFrame, dividend_at: int | None = None) -> pd.DataFrame:
    table = bars.copy()
    table.insert(4, "Adj Close", table["Close"])
    if dividend_at is not None:
        table.iloc[:dividend_at, 4] *= 0.99
    return table


def chart(table: pd.DataFrame, *, zone: str = "America/New_York", hour: str = "09:30") -> dict:
    """Yahoo's chart answer for a raw table: time stamps are the opens of the sessions."""
    opens = (pd.DatetimeIndex(table.index) + pd.Timedelta(f"{hour}:00")).tz_localize("America/New_York")

    def column(name: str) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in table[name]]

    return {
        "chart": {
            "result": [
                {
                    "meta": {
                        "currency": "USD",
                        "symbol": "ANY",
                        "instrumentType": "EQUITY",
                        "exchangeTimezoneName": zone,
                        "validRanges": ["1d", "max"],
                        "priceHint": 2,
                    },
                    "timestamp": [int(moment.timestamp()) for moment in opens],
                    "indicators": {
                        "quote": [{name.lower(): column(name) for name in BAR_COLUMNS}],
                        "adjclose": [{"adjclose": column("Adj Close")}],
                    },
                }
            ],
            "error": None,
        }
    }


NOT_FOUND = {
    "chart": {
        "result": None,
        "error": {"code": "Not Found", "description": "No data found, symbol may be delisted"},
    }
}
SERVER_ERROR = {"chart": {"result": None, "error": {"code": "Internal", "description": "upstream timed out"}}}
EMPTY = {
    "chart": {"result": [{"meta": {"validRanges": ["max"]}, "indicators": {"quote": [{}]}}], "error": None}
}


@dataclass
class FakeYahoo:
    """A chart API on the loopback; ``answers`` are given in turn, the last one for ever."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    zone: str = "America/New_York"
    delay_s: float = 0.0

    def reply(self, url: str) -> Answer:
        parts = urlsplit(url)
        if not parts.path.startswith("/v8/finance/chart/"):
            return 200, b"a-crumb"
        self.asked.append(url)
        time.sleep(self.delay_s)
        if self.answers:
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        table = self.tables.get(parts.path.rpartition("/")[2])
        if table is None:
            return 404, json.dumps(NOT_FOUND).encode()
        query = parse_qs(parts.query)
        start = pd.Timestamp(int(query["period1"][0]), unit="s") if "period1" in query else pd.Timestamp.min
        return 200, json.dumps(chart(table.loc[table.index >= start.normalize()], zone=self.zone)).encode()


class LoopbackSession(Session):
    """Sends every request for Yahoo to the loopback; nothing can leave the machine."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def request(self, method, url, **kwargs):
        parts = urlsplit(url)
        assert parts.hostname.endswith("yahoo.com")
        return super().request(method, f"http://127.0.0.1:{self._port}{parts.path}", **kwargs)


@pytest.fixture
def yahoo_server() -> Iterator[tuple[FakeYahoo, int]]:
    fake = FakeYahoo()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = fake.reply(self.path)
            with suppress(BrokenPipeError):  # who asked may have given up
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield fake, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def yahoo(yahoo_server, tmp_path) -> Iterator[tuple[FakeYahoo, YahooSource]]:
    fake, port = yahoo_server
    session = LoopbackSession(port)
    yield fake, YahooSource(tmp_path, attempts=3, backoff_s=0.001, timeout_s=2.0, session=session)
    session.close()


# -- the contract of every source


@pytest.fixture
def csv_folder(tmp_path, make_bars) -> Path:
    folder = tmp_path / "prices"
    folder.mkdir()
    raw_table(make_bars(300, seed=1), 100).rename_axis("Date").to_csv(folder / "AAPL.csv")
    return folder


@pytest.fixture(params=["yahoo", "csv", "sample"])
def source(request, make_bars, csv_folder):
    if request.param == "csv":
        return CsvSource(csv_folder)
    if request.param == "sample":
        return SampleSource()
    fake, yahoo_source = request.getfixturevalue("yahoo")
    fake.tables["AAPL"] = raw_table(make_bars(300, seed=1), 100)
    return yahoo_source


def test_a_source_answers_in_yahoos_columns(source):
    table = source.fetch("AAPL")
    assert tuple(table.columns) == RAW_COLUMNS
    assert isinstance(table.index, pd.DatetimeIndex)
    assert table.index.tz is None
    assert (table.index == table.index.normalize()).all()
    assert table.index.is_monotonic_increasing
    assert table.index.is_unique
    assert table.notna().all().all()
    assert (table["Volume"] >= 0).all()
    assert table["Adj Close"].iloc[-1] == pytest.approx(table["Close"].iloc[-1], rel=1e-12)


def test_a_source_answers_from_a_date_on(source):
    whole = source.fetch("AAPL")
    tail = source.fetch("AAPL", start=whole.index[-7].date())
    pd.testing.assert_frame_equal(tail, whole.iloc[-7:], check_freq=False)


def test_a_source_answers_alike_twice(source):
    pd.testing.assert_frame_equal(source.fetch("AAPL"), source.fetch("AAPL"))


def test_a_source_knows_what_it_does_not_know(source):
    with pytest.raises(UnknownSymbolError, match="ZZZZ"):
        source.fetch("ZZZZ")


def test_a_source_gives_bars_with_provenance(source):
    bars = fetch_stock_data(" aapl ", source=source)
    assert bars.symbol == "AAPL"
    assert tuple(bars.frame.columns) == BAR_COLUMNS
    assert bars.frame.index.name == "date"
    assert bars.report.missing_sessions == 0
    assert bars.report.off_calendar == 0
    assert bars.provenance.source == source.name
    assert bars.provenance.last_session == bars.frame.index[-1]
    # The exchange has closed many sessions since; the sample's prices have ended for good.
    assert bars.provenance.stale == (source.name != "sample")
    assert bars.provenance.fetched_at.tzinfo is UTC


def test_only_yahoo_is_live(source):
    assert source.is_live == (source.name == "yahoo")


# -- fetch_stock_data


def test_stale_is_judged_at_the_moment_of_asking(csv_folder):
    source = CsvSource(csv_folder)
    last = source.fetch("AAPL").index[-1]
    closed = datetime(last.year, last.month, last.day, 22, 0, tzinfo=UTC)
    assert not fetch_stock_data("AAPL", source=source, now=closed).provenance.stale
    assert fetch_stock_data("AAPL", source=source, now=closed + timedelta(days=4)).provenance.stale


def test_the_sample_is_never_stale_and_ends_when_it_says():
    source = SampleSource()
    for symbol in ("AAPL", "FB", "GOOG", "IBM", "MSFT"):
        assert source.fetch(symbol).index[-1] == SampleSource.ENDS
    for moment in (datetime(2010, 1, 5, 23, tzinfo=UTC), datetime(2013, 3, 1, 23, tzinfo=UTC), None):
        assert not fetch_stock_data("AAPL", source=source, now=moment).provenance.stale


def test_a_row_dated_in_the_future_is_dropped_and_said_with_and_without_a_cache(csv_folder, tmp_path):
    path = csv_folder / "AAPL.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "2999-01-04" + lines[-1][10:]]))
    source = CsvSource(csv_folder)
    cache = BarCache(tmp_path / "cache")
    for cached in (None, cache, cache):
        bars = fetch_stock_data("AAPL", source=source, cache=cached)
        assert len(bars.frame) == 300
        assert bars.report.problems() == ("1 row of sessions that had not closed yet was dropped",)
    shown = describe(cache, "AAPL", source.name, datetime.now(UTC))
    assert (shown["rows"], shown["state"]) == (300, "stale")
    path.write_text("\n".join([lines[0], "2999-01-04" + lines[-1][10:]]))
    for cached in (None, cache):
        with pytest.raises(DataError, match="csv:prices has no session that had closed by"):
            fetch_stock_data("AAPL", source=source, cache=cached)


def test_the_bar_of_an_open_session_is_not_used(csv_folder):
    source = CsvSource(csv_folder)
    last = source.fetch("AAPL").index[-1]
    noon = datetime(last.year, last.month, last.day, 17, 0, tzinfo=UTC)
    bars = fetch_stock_data("AAPL", source=source, now=noon)
    assert bars.frame.index[-1] < last
    assert bars.report.unfinished_dropped == 1
    assert not bars.provenance.stale


def test_a_past_moment_reveals_a_prefix(csv_folder):
    source = CsvSource(csv_folder)
    whole = fetch_stock_data("AAPL", source=source).frame
    moment = datetime(2005, 6, 30, 23, 0, tzinfo=UTC)
    past = fetch_stock_data("AAPL", source=source, now=moment).frame
    pd.testing.assert_frame_equal(past, whole.loc[:"2005-06-30"], check_freq=False)
    with pytest.raises(DataError, match="no session that had closed by 2004-01-01"):
        fetch_stock_data("AAPL", source=source, now=datetime(2004, 1, 1, tzinfo=UTC))


def test_bars_of_closed_days_go_and_gaps_are_counted(make_bars):
    raw = raw_table(make_bars(300))
    assert len(settled(raw, raw.index[99])) == 100
    saturday = raw.iloc[[4]].set_axis(raw.index[[4]] + pd.Timedelta(days=1))
    spoiled = pd.concat([raw.drop(raw.index[[50, 60]]), saturday])
    frame, report = check_answer("AAPL", spoiled, "yahoo", datetime.now(UTC))
    assert (report.off_calendar, report.missing_sessions, report.rows) == (1, 2, 298)
    assert saturday.index[0] not in frame.index


def test_an_error_in_the_data_names_symbol_and_source(csv_folder):
    table = pd.read_csv(csv_folder / "AAPL.csv")
    table.loc[10:30, "Low"] = -1.0
    table.to_csv(csv_folder / "BAD.csv", index=False)
    with pytest.raises(DataError, match="BAD from csv:prices: 21 of 300 rows have impossible prices"):
        fetch_stock_data("BAD", source=CsvSource(csv_folder))


# -- make_source, csv, sample


def test_make_source_makes_each_and_names_them_all_otherwise(csv_folder, tmp_path):
    assert make_source("sample").name == "sample"
    assert make_source("yahoo", cache_dir=tmp_path).name == "yahoo"
    assert make_source(f"csv:{csv_folder}").name == "csv:prices"
    for bad in ("", "bloomberg", "csv", "csv:", "Sample"):
        with pytest.raises(UsageError, match="yahoo, sample or csv:DIR"):
            make_source(bad)
    with pytest.raises(UsageError, match="no such folder"):
        make_source(f"csv:{tmp_path}/absent")
    with pytest.raises(UsageError, match=r"AAPL.csv: that is a file; name its folder: csv:\S*prices$"):
        make_source(f"csv:{csv_folder}/AAPL.csv")


def test_a_csv_folder_says_what_it_has(csv_folder):
    with pytest.raises(UnknownSymbolError, match=r"csv:prices has no MSFT.csv; it has AAPL$"):
        CsvSource(csv_folder).fetch("MSFT")


def test_numbers_of_a_csv_are_read_to_the_last_bit(csv_folder, make_bars):
    expected = raw_table(make_bars(300, seed=1), 100)
    np.testing.assert_array_equal(CsvSource(csv_folder).fetch("AAPL")["Close"], expected["Close"])


def test_a_csv_may_carry_times_of_day(csv_folder):
    path = csv_folder / "AAPL.csv"
    plain = CsvSource(csv_folder).fetch("AAPL")
    lines = path.read_text().splitlines()
    summer = [line.replace(",", " 00:00:00-04:00,", 1) if "-07-" in line else line for line in lines[1:]]
    path.write_text("\n".join([lines[0], *summer]))
    pd.testing.assert_frame_equal(CsvSource(csv_folder).fetch("AAPL"), plain)


def test_a_file_that_changes_while_it_is_read_is_read_again(csv_folder, tmp_path, make_bars):
    class Overtaken(CsvSource):
        def _read(self, symbol: str) -> bytes:
            content = super()._read(symbol)
            raw_table(make_bars(280, seed=2)).rename_axis("Date").to_csv(csv_folder / "AAPL.csv")
            return content

    cache = BarCache(tmp_path / "cache")
    assert len(fetch_stock_data("AAPL", source=Overtaken(csv_folder), cache=cache).frame) == 300
    after, plain = CsvSource(csv_folder), fetch_stock_data("AAPL", source=CsvSource(csv_folder))
    assert len(plain.frame) == 280
    assert bars_hash(fetch_stock_data("AAPL", source=after, cache=cache).frame) == bars_hash(plain.frame)


def test_a_revision_is_that_of_the_answer(csv_folder):
    for source in (CsvSource(csv_folder), SampleSource()):
        table, revision = source.fetch_revised("AAPL")
        assert revision == source.revision("AAPL")
        pd.testing.assert_frame_equal(table, source.fetch("AAPL"))


def test_a_file_that_may_not_be_read_is_named(csv_folder):
    (csv_folder / "DIR.csv").mkdir()
    with pytest.raises(UpstreamError, match=r"DIR.csv of csv:prices cannot be read: Is a directory"):
        fetch_stock_data("DIR", source=CsvSource(csv_folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("Open,High\n1,2\n", "no column Date"),
        ("Date,Open\nyesterday,1\n", r"BAD.csv, row 2 .*: 'yesterday' is not a date: write YYYY-MM-DD"),
        ("Date,Open\n2024-01-02,1\n\n2024-02-30,1\n", r"BAD.csv, row 3 .*: '2024-02-30' is not a date"),
        ("Date,Open\n2024-01-02,1\n,1\n", r"BAD.csv, row 3 .*: '' is not a date"),
        ("Date,Open\n2024-01-02,1\n03/01/2024,1\n", r"BAD.csv, row 3 .*: '03/01/2024' is not a date"),
        ("Date,Open\n2024-01-02,1\n", "High, Low, Close, Adj Close, Volume are missing"),
        ("<html>503</html>", "no column Date"),
    ],
)
def test_a_csv_that_is_no_price_table_is_refused(csv_folder, content, words):
    (csv_folder / "BAD.csv").write_text(content)
    with pytest.raises(DataError, match=words):
        fetch_stock_data("BAD", source=CsvSource(csv_folder))


@pytest.mark.parametrize("symbol", ["AAPL", "FB", "GOOG", "IBM", "MSFT"])
def test_the_sample_is_continuous_after_adjustment(symbol):
    bars = fetch_stock_data(symbol, source=SampleSource())
    moves = bars.frame["Close"].pct_change().abs()
    assert moves.drop(pd.Timestamp("2000-09-29"), errors="ignore").max() < 0.25, "a split would be half"
    volume = np.log(bars.frame["Volume"].rolling(60).median().dropna())
    assert volume.diff(60).abs().max() < 1.5
    assert bars.frame.index[-1] == pd.Timestamp("2013-03-01")


def test_the_samples_splits_are_no_jump_of_price_or_volume():
    table = SampleSource().fetch("AAPL")
    around = table.loc["2005-02-15":"2005-03-15"]
    assert around["Close"].pct_change().abs().max() < 0.1
    # On the day itself the table has half the volume; before and after it is one level.
    before, after = around["Volume"].loc[:"2005-02-25"].median(), around["Volume"].loc["2005-03-01":].median()
    assert 0.4 < before / after < 2.5
    assert 2.0 * around["Volume"].loc["2005-02-28"] < before


def test_the_samples_volume_agrees_with_a_second_vendor(market_dir):
    ours = SampleSource().fetch("AAPL")
    theirs = CsvSource(market_dir).fetch("AAPL").loc[ours.index]
    ratio = 28.0 * ours["Volume"] / theirs["Volume"]  # splits of 7 and 4 came later
    assert ratio.between(0.999, 1.001).mean() > 0.99
    assert ours["Adj Close"].pct_change().corr(theirs["Adj Close"].pct_change()) > 0.999


# -- Yahoo


def test_yahoo_is_asked_once_per_fetch(yahoo, make_bars):
    fake, source = yahoo
    fake.tables["AAPL"] = raw_table(make_bars(300))
    source.fetch("AAPL")
    assert len(fake.asked) == 1
    assert "interval=1d" in fake.asked[0]
    assert "events=div" in fake.asked[0]


@pytest.mark.parametrize(
    "answer",
    [
        (429, b"Too Many Requests"),
        (500, b"<html>Internal</html>"),
        (502, json.dumps(SERVER_ERROR).encode()),
        (503, b""),
        (200, b"<html>Will be right back</html>"),
        (200, b"<html>please accept</html>"),
        (200, b'{"chart": {"result": [{"meta": {}}], "error": null}}'),
    ],
    ids=["429", "500", "502", "503", "down page", "consent page", "half a chart"],
)
def test_a_transient_answer_is_retried_a_bounded_number_of_times(yahoo, make_bars, answer):
    fake, source = yahoo
    fake.answers = [answer]
    with pytest.raises(
        UpstreamError, match=r"Yahoo cannot be reached .*--source sample.*--source csv:DIR"
    ) as caught:
        source.fetch("AAPL")
    assert not isinstance(caught.value, UnknownSymbolError)
    # yfinance itself repeats an answer of 400 and over once, with another cookie.
    assert 3 <= len(fake.asked) <= 6
    fake.answers = [answer, answer, (200, json.dumps(chart(raw_table(make_bars(300)))).encode())]
    assert len(source.fetch("AAPL")) == 300


@pytest.mark.parametrize("answer", [(404, NOT_FOUND), (200, NOT_FOUND), (200, EMPTY)])
def test_an_unknown_symbol_is_not_asked_for_again(yahoo, answer):
    fake, source = yahoo
    fake.answers = [(answer[0], json.dumps(answer[1]).encode())]
    with pytest.raises(UnknownSymbolError, match="Yahoo has no daily prices of AAPL"):
        source.fetch("AAPL")
    assert len(fake.asked) <= 2


def test_a_server_that_is_not_there_is_upstream(tmp_path):
    session = LoopbackSession(1)
    source = YahooSource(tmp_path, attempts=2, backoff_s=0.001, timeout_s=1.0, session=session)
    with pytest.raises(UpstreamError, match="Yahoo cannot be reached"):
        source.fetch("AAPL")
    session.close()


def test_a_server_that_does_not_answer_is_given_up(yahoo_server, tmp_path):
    fake, port = yahoo_server
    fake.delay_s = 1.0
    session = LoopbackSession(port)
    source = YahooSource(tmp_path, attempts=1, timeout_s=0.2, session=session)
    begun = time.monotonic()
    with pytest.raises(UpstreamError, match=r"imed? ?out"):
        source.fetch("AAPL")
    assert time.monotonic() - begun < 5.0
    session.close()


def test_yahoos_empty_last_row_is_dropped(yahoo, make_bars):
    fake, source = yahoo
    table = raw_table(make_bars(300))
    table.iloc[-1, :5] = np.nan
    fake.tables["AAPL"] = table
    bars = fetch_stock_data("AAPL", source=source)
    assert len(bars.frame) == 299
    assert bars.report.nan_tail_dropped == 1


def test_yahoos_doubled_rows_are_mended(yahoo, make_bars):
    fake, source = yahoo
    table = raw_table(make_bars(300))
    fake.tables["AAPL"] = pd.concat([table, table.iloc[-3:]])
    assert fetch_stock_data("AAPL", source=source).frame.index.is_unique


def test_sessions_that_yahoo_lacks_are_flagged_then_refused(yahoo, make_bars):
    fake, source = yahoo
    table = raw_table(make_bars(300))
    fake.tables["AAPL"] = table.drop(table.index[[100, 101]])
    assert fetch_stock_data("AAPL", source=source).report.missing_sessions == 2
    fake.tables["AAPL"] = table.drop(table.index[100:130])
    with pytest.raises(DataError, match="30 of 300 sessions are missing"):
        fetch_stock_data("AAPL", source=source)


def test_a_wrong_zone_is_refused_not_shifted(yahoo, make_bars):
    fake, source = yahoo
    fake.tables["AAPL"] = raw_table(make_bars(300))
    fake.zone = "Pacific/Kiritimati"  # the opens of New York lie on the day after there
    with pytest.raises(DataError, match="on days without a session"):
        fetch_stock_data("AAPL", source=source)


def test_yfinance_keeps_its_files_in_our_cache(yahoo, make_bars):
    import yfinance

    fake, source = yahoo
    fake.tables["AAPL"] = raw_table(make_bars(300))
    source.fetch("AAPL")
    assert yfinance.cache._TzDBManager.get_location() == str(source.cache_dir / "yfinance")
    assert yfinance.config.debug.hide_exceptions is False


# -- Yahoo beside a cache


def closed(session: pd.Timestamp) -> datetime:
    return datetime(session.year, session.month, session.day, 23, 0, tzinfo=UTC)


def test_a_split_between_two_fetches_makes_no_return(yahoo, make_bars, tmp_path):
    fake, source = yahoo
    table, cache = raw_table(make_bars(300)), BarCache(tmp_path / "cache")
    fake.tables["AAPL"] = table.iloc[:290]
    fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[289]))
    split = table.copy()
    split[["Open", "High", "Low", "Close", "Adj Close"]] /= 10.0
    split["Volume"] *= 10.0
    fake.tables["AAPL"] = split
    bars = fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[-1]))
    assert len(bars.frame) == 300
    assert bars.frame["Close"].pct_change().abs().max() < 0.3
    assert len(fake.asked) == 3, "the whole, the new sessions that did not fit, the whole again"


def test_new_sessions_are_appended_by_one_small_request(yahoo, make_bars, tmp_path):
    fake, source = yahoo
    table, cache = raw_table(make_bars(300)), BarCache(tmp_path / "cache")
    fake.tables["AAPL"] = table.iloc[:290]
    fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[289]))
    fake.tables["AAPL"] = table
    bars = fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[-1]))
    assert len(fake.asked) == 2
    expected = fetch_stock_data("AAPL", source=source)
    pd.testing.assert_frame_equal(bars.frame, expected.frame)


def test_yahoos_partial_bar_is_neither_used_nor_kept(yahoo, make_bars, tmp_path):
    fake, source = yahoo
    table, cache = raw_table(make_bars(300)), BarCache(tmp_path / "cache")
    forming = table.copy()
    forming.iloc[-1, :5] *= 0.98
    fake.tables["AAPL"] = forming
    noon = closed(table.index[-1]) - timedelta(hours=6)
    bars = fetch_stock_data("AAPL", source=source, cache=cache, now=noon)
    assert bars.frame.index[-1] == table.index[-2]
    assert not bars.provenance.stale
    fake.tables["AAPL"] = table
    bars = fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[-1]))
    assert bars.frame["Close"].iloc[-1] == table["Close"].iloc[-1]


@pytest.mark.parametrize("answer", [(429, b"slow down"), (500, b""), (404, json.dumps(NOT_FOUND).encode())])
def test_yahoos_failure_beside_a_cache_is_stale_bars(yahoo, make_bars, tmp_path, answer):
    fake, source = yahoo
    table, cache = raw_table(make_bars(300)), BarCache(tmp_path / "cache")
    fake.tables["AAPL"] = table.iloc[:290]
    good = fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[289]))
    fake.answers = [answer]
    bars = fetch_stock_data("AAPL", source=source, cache=cache, now=closed(table.index[-1]))
    assert bars.provenance.stale
    assert bars.provenance.last_session == table.index[289]
    pd.testing.assert_frame_equal(bars.frame, good.frame)
