"""Sessions of the exchange, from the far past to the far future; and sets of symbols with their caveats."""

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import markets
from data.markets import (
    calendar_for,
    calendar_name,
    fit_sessions,
    join_raw,
    named_universes,
    priced_rows,
    refuse_delisted,
    resolve_universe,
    settled_rows,
    universe_mean,
)
from data.schema import Bars, BarsReport, Provenance, bars_hash, clean_bars
from utils.errors import DataError, InvalidSymbolError, UsageError

NYSE = calendar_for("AAPL")


def days(*texts: str) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(texts)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("AAPL", "XNYS"), ("BRK-B", "XNYS"), ("^GSPC", "XNYS"), ("VOD.L", "XLON"), ("7203.T", "XTKS"),
        ("005930.KS", "XKRX"), ("SAP.DE", "XETR"), ("^N225", "XTKS"), ("BTC-USD", "24/7"),
        ("ETH-EUR", "24/7"), ("EURUSD=X", "weekdays"), ("ES=F", "CMES"), ("QNBK.QA", "unmapped"),
    ],
)  # fmt: skip
def test_the_symbol_names_its_exchange(symbol, name):
    assert calendar_name(symbol) == name


def test_every_mapped_exchange_exists():
    from data.markets import _INDICES, _SUFFIXES

    known = set(exchange_calendars.get_calendar_names())
    assert {*_SUFFIXES.values(), *_INDICES.values()} <= known


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("2025-01-08", "2025-01-10"),  # day of mourning for a president
        ("2024-11-27", "2024-11-29"),  # Thanksgiving, then a half day that counts
        ("2024-03-28", "2024-04-01"),  # Good Friday
        ("2024-07-03", "2024-07-05"),
        ("2012-10-26", "2012-10-31"),  # hurricane
        ("2024-06-15", "2024-06-17"),  # asked on a Saturday
        ("2024-12-31", "2025-01-02"),
    ],
)
def test_the_next_session_skips_what_the_exchange_skips(after, expected):
    assert list(NYSE.next_sessions(pd.Timestamp(after), 1)) == [pd.Timestamp(expected)]


def test_next_sessions_reach_252_ahead_of_today_and_name_the_end():
    today = pd.Timestamp.now().normalize()
    for symbol in ("AAPL", "BTC-USD", "EURUSD=X", "600000.SS", "RELIANCE.NS", "QNBK.QA"):
        ahead = calendar_for(symbol).next_sessions(today, 252)
        assert len(ahead) == 252
        assert ahead[0] > today
        assert ahead.is_unique
        assert ahead.is_monotonic_increasing
    with pytest.raises(UsageError, match="it has 0 sessions after"):
        NYSE.next_sessions(pd.Timestamp("2200-01-01"), 5)


@given(st.dates(date(1970, 1, 2), date(2024, 12, 1)), st.integers(1, 252))
@settings(deadline=None, max_examples=60)
def test_next_sessions_agree_with_the_library(day, count):
    oracle = exchange_calendars.get_calendar("XNYS", start="1969-01-01", end="2027-12-31")
    found = NYSE.next_sessions(pd.Timestamp(day), count)
    expected = oracle.sessions[oracle.sessions > pd.Timestamp(day)][:count]
    np.testing.assert_array_equal(found.to_numpy().astype("M8[D]"), expected.to_numpy().astype("M8[D]"))
    assert NYSE.sessions_between(pd.Timestamp(day), found[-1]) == count
    assert NYSE.sessions_between(found[-1], pd.Timestamp(day)) == -count


def test_sessions_reach_back_to_1970():
    assert NYSE.sessions(pd.Timestamp("1970-01-01"), pd.Timestamp("1970-01-05"))[0] == pd.Timestamp(
        "1970-01-02"
    )
    assert len(NYSE.sessions(pd.Timestamp("1980-01-01"), pd.Timestamp("1980-12-31"))) == 253


@pytest.mark.parametrize(
    ("symbol", "now", "last"),
    [
        ("AAPL", "2024-06-14T19:59:59", "2024-06-13"),
        ("AAPL", "2024-06-14T20:00:00", "2024-06-14"),
        ("AAPL", "2024-06-16T12:00:00", "2024-06-14"),
        ("AAPL", "2024-11-29T17:59:00", "2024-11-27"),  # half day closes at 13:00 in New York
        ("AAPL", "2024-11-29T18:00:00", "2024-11-29"),
        ("AAPL", "2024-03-11T19:59:00", "2024-03-08"),  # first session of summer time
        ("AAPL", "2024-03-11T20:00:00", "2024-03-11"),
        ("AAPL", "2024-11-04T20:30:00", "2024-11-01"),  # first session of winter time
        ("7203.T", "2024-06-14T06:00:00", "2024-06-14"),
        ("BTC-USD", "2024-06-16T12:00:00", "2024-06-15"),
        ("EURUSD=X", "2024-06-16T12:00:00", "2024-06-14"),
    ],
)
def test_the_last_closed_session(symbol, now, last):
    moment = datetime.fromisoformat(now).replace(tzinfo=UTC)
    assert calendar_for(symbol).last_closed_session(moment) == pd.Timestamp(last)
    tokyo = moment.astimezone(timezone(timedelta(hours=9)))
    assert calendar_for(symbol).last_closed_session(tokyo) == pd.Timestamp(last)


def test_a_moment_needs_a_zone_and_a_place_in_the_calendar():
    with pytest.raises(UsageError, match="no time zone"):
        NYSE.last_closed_session(datetime.fromisoformat("2024-01-01"))
    with pytest.raises(UsageError, match="not 2300-01-01"):
        NYSE.last_closed_session(datetime(2300, 1, 1, tzinfo=UTC))


def test_gaps_and_closed_days_are_found():
    held = days("2024-12-23", "2024-12-26", "2024-12-28")
    assert list(NYSE.missing(held)) == list(days("2024-12-24", "2024-12-27"))
    assert list(NYSE.off_calendar(held)) == list(days("2024-12-28"))
    assert len(NYSE.missing(held[:0])) == 0


def test_nothing_is_missing_where_nothing_is_known():
    assert len(calendar_for("QNBK.QA").missing(days("2024-01-07", "2024-03-07"))) == 0
    assert len(calendar_for("QNBK.QA").off_calendar(days("2024-01-07", "2024-03-10"))) == 0
    assert len(calendar_for("7203.T").missing(days("1980-01-07", "1990-03-07"))) == 0


def test_years_have_their_sessions():
    assert [calendar_for(symbol).sessions_per_year for symbol in ("AAPL", "BTC-USD", "EURUSD=X")] == [
        252,
        365,
        260,
    ]


@pytest.fixture
def raw(make_bars):
    table = make_bars(300, seed=5)
    table.insert(4, "Adj Close", table["Close"])
    return table


def test_bars_of_closed_days_go_and_gaps_are_counted(raw):
    saturday = raw.iloc[[4]].set_axis(raw.index[[4]] + pd.Timedelta(days=1))
    frame, report = clean_bars(pd.concat([raw.drop(raw.index[[50, 60]]), saturday]))
    frame, report = fit_sessions(frame, report, NYSE)
    assert (report.off_calendar, report.missing_sessions, report.rows) == (1, 2, 298)
    assert saturday.index[0] not in frame.index


def test_dates_of_another_zone_are_refused(raw):
    shifted = raw.set_axis(raw.index - pd.Timedelta(days=1))
    with pytest.raises(DataError, match="on days without a session"):
        fit_sessions(*clean_bars(shifted), NYSE)


def test_too_many_gaps_are_refused(raw):
    with pytest.raises(DataError, match=r"20 of 300 sessions are missing"):
        fit_sessions(*clean_bars(raw.drop(raw.index[100:120])), NYSE)


def test_settled_rows_end_with_the_last_closed_session(raw):
    assert len(settled_rows(raw, raw.index[99])) == 100


def test_priced_rows_are_complete_unique_and_ascending(raw):
    spoiled = pd.concat([raw.iloc[10:], raw.iloc[:10], raw.iloc[[3]].assign(Open=np.nan)])
    pd.testing.assert_frame_equal(priced_rows(spoiled), raw, check_freq=False)


def test_tables_join_where_they_agree(raw):
    joined = join_raw(raw.iloc[:200], raw.iloc[190:], tolerance=1e-6)
    pd.testing.assert_frame_equal(joined, raw, check_freq=False)


@pytest.mark.parametrize(
    "other",
    [
        lambda raw: raw.iloc[190:].assign(Close=raw["Close"].iloc[190:] * 0.5),  # split
        lambda raw: raw.iloc[190:].assign(**{"Adj Close": raw["Adj Close"].iloc[190:] * 0.9998}),  # dividend
        lambda raw: raw.drop(raw.index[195]).iloc[190:],  # lost a session
        lambda raw: raw.iloc[205:],  # shares none
        lambda raw: raw.iloc[:0],
    ],
)
def test_tables_that_disagree_do_not_join(raw, other):
    assert join_raw(raw.iloc[:200], other(raw), tolerance=1e-5) is None


# -- sets of symbols


@pytest.mark.parametrize(("name", "size"), [("us50", 50), ("sectors11", 11), ("core5", 5)])
def test_named_sets_have_their_size_and_their_caveat(name, size):
    universe = named_universes()[name]
    assert len(universe.symbols) == len(set(universe.symbols)) == size
    assert isinstance(universe.selected_on, date)
    assert universe.rule
    assert universe.caveat
    assert resolve_universe(name) == universe.symbols
    assert resolve_universe(f" {name} ") == universe.symbols


def test_the_core_is_part_of_the_fifty():
    assert set(resolve_universe("core5")) <= set(resolve_universe("us50"))


@pytest.mark.parametrize(
    ("spec", "symbols"),
    [
        ("aapl", ("AAPL",)),
        ("AAPL,msft, brk.b ,AAPL", ("AAPL", "MSFT", "BRK-B")),
        ("MSFT,,IBM,", ("MSFT", "IBM")),
    ],
)
def test_symbols_joined_by_commas(spec, symbols):
    assert resolve_universe(spec) == symbols


def test_a_file_of_symbols(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\naapl\n\nMSFT  # the other\nAAPL\n")
    assert resolve_universe(str(path)) == ("AAPL", "MSFT")
    path.write_text("# nothing yet\n")
    with pytest.raises(UsageError, match="names no symbol: use us50, sectors11, core5"):
        resolve_universe(str(path))


@pytest.mark.parametrize("spec", ["", " ", ",", "./absent.txt", "absent.txt"])
def test_what_names_nothing_is_refused(spec):
    with pytest.raises(UsageError):
        resolve_universe(spec)


def test_a_symbol_that_is_none_is_refused():
    with pytest.raises(InvalidSymbolError):
        resolve_universe("AAPL,..")


def as_bars(frame: pd.DataFrame) -> Bars:
    seen = Provenance(
        source="yahoo", fetched_at=datetime(2010, 1, 1, tzinfo=UTC), last_session=frame.index[-1], stale=True
    )
    return Bars(symbol="AAPL", frame=frame, provenance=seen, report=BarsReport())


def test_what_stopped_trading_is_not_trained(make_bars):
    bars = as_bars(make_bars(n=100))
    last = bars.frame.index[-1]
    refuse_delisted(bars, (last + pd.Timedelta(days=10)).tz_localize("UTC").to_pydatetime())
    with pytest.raises(DataError, match=r"no bar since .* delisted .* --source csv:DIR"):
        refuse_delisted(bars, (last + pd.Timedelta(days=30)).tz_localize("UTC").to_pydatetime())


# -- the mean of a universe


def test_the_mean_grows_by_the_mean_return(make_bars):
    frames = {name: make_bars(n=50, seed=seed) for seed, name in enumerate(["AAA", "BBB"])}
    close = universe_mean(frames)["Close"]
    assert close.iloc[0] == 1.0
    mean = sum(np.log(frame["Close"]).diff() for frame in frames.values()) / 2
    np.testing.assert_allclose(np.log(close).diff().iloc[1:], mean.iloc[1:], rtol=1e-9, atol=1e-14)


def test_a_symbol_that_joins_or_pauses_makes_no_jump(make_bars):
    one, late = make_bars(n=60), make_bars(n=60, seed=1) * 1000.0
    close = universe_mean({"AAA": one, "BBB": late.iloc[30:].drop(late.index[40])})["Close"]
    assert list(close.index) == list(one.index)
    returns = np.log(close).diff()
    own = np.log(one["Close"]).diff()
    for row in (*range(1, 31), 40):
        assert returns.iloc[row] == pytest.approx(own.iloc[row], abs=1e-12)
    over_the_pause = np.log(late["Close"].iloc[41] / late["Close"].iloc[39])
    assert returns.iloc[41] == pytest.approx((own.iloc[41] + over_the_pause) / 2, abs=1e-12)


def test_the_mean_knows_nothing_of_later_bars(make_bars):
    frames = {name: make_bars(n=120, seed=seed) for seed, name in enumerate(["AAA", "BBB", "CCC"])}
    whole = universe_mean(frames)
    for cut in (1, 2, 57, 119):
        part = universe_mean({name: frame.iloc[:cut] for name, frame in frames.items()})
        assert bars_hash(part) == bars_hash(whole.iloc[:cut])


def test_the_mean_needs_symbols_that_close_together(make_bars):
    with pytest.raises(UsageError, match="no symbol"):
        universe_mean({})
    with pytest.raises(UsageError, match=r"close together, these follow 24/7, XNYS"):
        universe_mean({"AAPL": make_bars(n=30), "BTC-USD": make_bars(n=30)})


def test_a_universe_file_that_is_no_text_is_a_usage_error_and_a_byte_order_mark_is_not_a_symbol(tmp_path):
    junk = tmp_path / "junk.txt"
    junk.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="not a text file"):
        resolve_universe(str(junk))
    marked = tmp_path / "marked.txt"
    marked.write_bytes("\ufeffAAPL\nMSFT\n".encode())
    assert resolve_universe(str(marked)) == ("AAPL", "MSFT")


@settings(deadline=None, max_examples=60)
@given(offsets=st.lists(st.integers(0, 400), max_size=120))
def test_gaps_are_those_of_the_set_difference(offsets: list[int]):
    """The slow oracle; dates may be doubled, in any order, and on days without a session."""
    calendar = calendar_for("AAPL")
    dates = pd.DatetimeIndex(pd.Timestamp("2024-01-01") + pd.to_timedelta(offsets, unit="D"))
    inside = calendar.sessions(dates.min(), dates.max()) if len(dates) else dates
    assert list(calendar.missing(dates)) == sorted(set(inside) - set(dates))
    assert list(calendar.off_calendar(dates)) == sorted(set(dates) - set(inside))


def test_a_calendar_is_built_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path))
    built = markets._load.__wrapped__("XNYS", 2027)
    (file,) = (tmp_path / "calendars").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(markets, "_from_exchange", lambda *_: pytest.fail("built again"))
        kept = markets._load.__wrapped__("XNYS", 2027)
    for now, then in ((built._days, kept._days), (built._closes, kept._closes)):
        np.testing.assert_array_equal(now, then)
    assert (kept.known_from, kept.known_to) == (built.known_from, built.known_to)
    assert kept.timezone == built.timezone
    # A file that was cut off is built again, and a folder that cannot be written does no harm.
    file.write_bytes(file.read_bytes()[:500])
    assert len(markets._load.__wrapped__("XNYS", 2027)._days) == len(built._days)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path / "file"))
    assert len(markets._load.__wrapped__("XNYS", 2027)._days) == len(built._days)
