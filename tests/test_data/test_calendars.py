"""Sessions of the exchange: holidays, half days, far past, far future, and the hour of the close."""

from datetime import UTC, date, datetime, timedelta, timezone

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.calendars import calendar_for, calendar_name, fit_sessions, join_raw, priced_rows, settled_rows
from data.schema import clean_bars
from utils.errors import DataError, UsageError

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
    from data.calendars import _INDICES, _SUFFIXES

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
