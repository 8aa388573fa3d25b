"""What is mended, what is refused, that no symbol becomes a path; sessions from far past to far future."""

import importlib.metadata
import io
import re
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import exchange_calendars
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import schema
from data.schema import (
    BAR_COLUMNS,
    RAW_COLUMNS,
    BarsReport,
    bars_hash,
    calendar_for,
    calendar_name,
    check_enough,
    clean_bars,
    normalise_symbol,
)
from utils.base import DataError, InsufficientDataError, InvalidSymbolError, UsageError
from utils.model_paths import symbol_dir


@pytest.fixture
def raw(make_bars):
    """400 sessions in Yahoo's columns, with a dividend after row 200."""
    table = make_bars(400, seed=3)
    table.insert(4, "Adj Close", table["Close"])
    table.iloc[:200, 4] *= 0.97
    return table


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        (" aapl ", "AAPL"),
        ("BRK.B", "BRK-B"),
        ("brk.b", "BRK-B"),
        ("^GSPC", "^GSPC"),
        ("EURUSD=X", "EURUSD=X"),
        ("005930.KS", "005930.KS"),
        ("BTC-USD", "BTC-USD"),
        ("VOD.L", "VOD.L"),
        ("7203.T", "7203.T"),
    ],
)
def test_symbols_are_normalised(given_, meant):
    assert normalise_symbol(given_) == meant


@pytest.mark.parametrize(
    "bad",
    [
        "../../etc/passwd", "..", "%2e%2e", "C:\\x", "A\0B", "\0", "AAPL\n", "A\nB", "\N{GRINNING FACE}",
        "\uff21\uff21\uff30\uff2c", "", "   ", "A" * 5000, "A" * 16, "-A", ".A", "A/B", "A\\B", "A B", "^",
        "^^A", "stra\u00dfe", "\ufb01", None, 7,
    ],
)  # fmt: skip
def test_what_is_no_symbol_is_refused_and_safe_to_show(bad):
    with pytest.raises(InvalidSymbolError) as caught:
        normalise_symbol(bad)
    assert isinstance(caught.value, UsageError)
    assert str(caught.value).isascii()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_no_text_escapes_a_folder(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp()
    try:
        symbol = normalise_symbol(text)
    except InvalidSymbolError:
        return
    assert symbol_dir(root, symbol).parent == root.resolve()
    assert normalise_symbol(symbol) == symbol


def test_a_clean_table_is_adjusted_and_nothing_else(raw):
    frame, report = clean_bars(raw)
    factor = raw["Adj Close"] / raw["Close"]
    assert tuple(frame.columns) == BAR_COLUMNS
    assert frame.index.name == "date"
    assert frame.index.tz is None
    np.testing.assert_allclose(frame["Open"], raw["Open"] * factor, rtol=1e-14)
    np.testing.assert_allclose(frame["Close"], raw["Adj Close"], rtol=1e-14)
    np.testing.assert_array_equal(frame["Volume"], raw["Volume"])
    assert report.problems() == ()
    assert report.rows == 400
    assert all(dtype == np.float64 for dtype in frame.dtypes)


def test_adjusting_keeps_the_range_around_open_and_close(raw):
    frame, _ = clean_bars(raw.assign(**{"Adj Close": raw["Close"] * np.linspace(0.0137, 1.0, 400)}))
    assert (frame["Low"] <= frame[["Open", "Close"]].min(axis=1)).all()
    assert (frame["High"] >= frame[["Open", "Close"]].max(axis=1)).all()


def test_a_nan_tail_is_dropped_and_counted(raw):
    raw.iloc[-2:, :5] = np.nan
    frame, report = clean_bars(raw)
    assert len(frame) == 398
    assert report.nan_tail_dropped == 2
    assert report.interior_nan == 0
    assert "2 rows without prices at the end" in report.problems()[0]


def test_interior_nans_are_dropped_up_to_the_limit(raw):
    raw.iloc[[10, 50], 3] = np.nan
    frame, report = clean_bars(raw)
    assert report.interior_nan == 2
    assert len(frame) == 398
    raw.iloc[60:63, 0] = np.nan
    with pytest.raises(DataError, match=r"5 of 400 rows have no price"):
        clean_bars(raw)


def test_doubled_and_unsorted_rows_are_mended_and_counted(raw):
    later = raw.iloc[[100]].assign(Volume=7.0)
    empty = raw.iloc[[101]].assign(Close=np.nan)
    mixed = pd.concat([raw.iloc[200:], raw.iloc[:200], later, empty])
    frame, report = clean_bars(mixed)
    assert frame.index.is_monotonic_increasing
    assert frame.index.is_unique
    assert report.duplicates == 2
    assert report.unsorted == 2
    assert frame["Volume"].iloc[100] == 7.0, "the later of two rows wins"
    assert np.isfinite(frame["Close"].iloc[101]), "a row with a price wins over a later one without"


def test_doubled_rows_that_disagree_are_their_own_finding(raw):
    same = raw.iloc[[10, 10, 11]]
    other = raw.iloc[[20, 21]].assign(Volume=7.0)
    unpriced = raw.iloc[[30]].assign(Close=np.nan)
    report = clean_bars(pd.concat([raw, same]))[1]
    assert (report.duplicates, report.conflicting) == (3, 0)
    frame, report = clean_bars(pd.concat([raw, same, other, unpriced]))
    assert (report.duplicates, report.conflicting) == (6, 2)
    assert "2 of the doubled rows said something else than the one kept" in report.problems()
    assert (frame["Volume"].iloc[[20, 21]] == 7.0).all()
    no_volume = raw.iloc[[40]].assign(Volume=np.nan)
    assert clean_bars(pd.concat([raw, no_volume]))[1].conflicting == 1
    assert clean_bars(pd.concat([raw, no_volume, no_volume]))[1].conflicting == 1


def test_findings_agree_with_their_number():
    counts = [name for name in BarsReport.__dataclass_fields__ if name != "rows"]
    ones = BarsReport(**dict.fromkeys(counts, 1)).problems()
    twos = BarsReport(**dict.fromkeys(counts, 2)).problems()
    assert len(ones) == len(twos) == len(counts)
    assert "1 close moved by more than half in one session" in ones
    assert "2 closes moved by more than half in one session" in twos
    assert "1 session of the exchange is missing" in ones
    assert "2 rows had their high or low widened to hold open and close" in twos
    for words in ones:
        assert "{" not in words
        assert not re.match(r"1 \w*( with\w* \w+)? ?(rows|closes|volumes|sessions)\b", words), words
        if "of the doubled" not in words:
            assert not re.search(r"\b(were|are|have)\b", words), words


@pytest.mark.parametrize(
    "fault",
    [
        {"Close": 0.0},
        {"Low": -1.0},
        {"High": 1e-3, "Low": 2.0},
        {"Close": 1e6},
        {"Open": 1e6},
        {"Adj Close": -0.5},
        {"High": np.inf},
        {"Volume": -5.0},
    ],
)
def test_impossible_rows_are_rejected_counted_and_refused_above_one_percent(raw, fault):
    bad = raw.copy()
    for column, value in fault.items():
        bad.iloc[[5, 6, 7, 8], raw.columns.get_loc(column)] = value
    frame, report = clean_bars(bad)
    assert report.rejected_rows == 4
    assert len(frame) == 396
    for column, value in fault.items():
        bad.iloc[9, raw.columns.get_loc(column)] = value
    with pytest.raises(DataError, match="5 of 400 rows have impossible prices"):
        clean_bars(bad)


@pytest.mark.parametrize(
    "fault",
    [
        dict.fromkeys(RAW_COLUMNS[:5], 1e-320),
        dict.fromkeys(RAW_COLUMNS[:5], 1e300),
        dict.fromkeys(RAW_COLUMNS[:5], 1.79e308),
        {"High": 1e300},
        {"Adj Close": 1e-300},
        {"Volume": 1e300},
    ],
    ids=["denormal", "huge", "nearly infinite", "one price", "adjustment", "volume"],
)
def test_absurd_rows_are_dropped_counted_and_refused_above_one_percent(raw, fault):
    bad = raw.assign(Volume=raw["Volume"].astype(float))
    for column, value in fault.items():
        bad.iloc[[5, 6, 7, 8], raw.columns.get_loc(column)] = value
    frame, report = clean_bars(bad)
    assert (report.absurd_rows, report.rejected_rows, len(frame)) == (4, 0, 396)
    assert report.problems()[0] == "4 rows with prices or volumes beyond those of any market were dropped"
    assert np.isfinite(np.log(frame[["Open", "High", "Low", "Close"]])).all(axis=None)
    for column, value in fault.items():
        bad.iloc[9, raw.columns.get_loc(column)] = value
    with pytest.raises(DataError, match="5 of 400 rows have impossible prices"):
        clean_bars(bad)


def test_prices_of_any_real_market_are_kept(raw):
    prices = list(RAW_COLUMNS[:5])
    for factor in (1e-10, 1e-6, 1e8, 1e11):
        assert clean_bars(raw.assign(**{name: raw[name] * factor for name in prices}))[1].problems() == ()


def test_rounding_outside_the_range_is_mended_by_widening(raw):
    raw.iloc[3, raw.columns.get_loc("High")] = raw["Close"].iloc[3] * (1 - 1e-6)
    raw.iloc[3, raw.columns.get_loc("Open")] = raw["Close"].iloc[3] * 0.9999
    raw.iloc[4, raw.columns.get_loc("Open")] = raw["High"].iloc[4] * 1.01
    frame, report = clean_bars(raw)
    assert report.range_mended == 2
    assert frame["High"].iloc[3] == frame["Close"].iloc[3]
    assert frame["High"].iloc[4] == frame["Open"].iloc[4]


def test_missing_volume_is_zero_and_counted(raw):
    raw.iloc[:3, 5] = np.nan
    frame, report = clean_bars(raw)
    assert (frame["Volume"].iloc[:3] == 0.0).all()
    assert (report.volume_missing, report.zero_volume_rows) == (3, 3)


def test_constant_prices_and_no_volume_are_bars(raw):
    frame, report = clean_bars(
        raw.assign(Open=5.0, High=5.0, Low=5.0, Close=5.0, Volume=0.0, **{"Adj Close": 5.0})
    )
    assert len(frame) == 400
    assert report.zero_volume_rows == 400


def test_an_unadjusted_split_is_pointed_at(raw):
    raw.iloc[:200, :5] *= 4.0
    assert clean_bars(raw)[1].moves_over_50pct == 1


def test_a_zone_is_dropped_and_the_local_date_stays(raw):
    zoned = raw.set_axis((raw.index + pd.Timedelta("9h30min")).tz_localize("America/New_York"))
    pd.testing.assert_frame_equal(clean_bars(zoned)[0], clean_bars(raw)[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw.drop(columns="Adj Close"), "Adj Close are missing"),
        (lambda raw: raw.reset_index(drop=True), "must hold dates"),
        (lambda raw: raw.assign(Close="high"), "not a number"),
        (lambda raw: raw.set_axis(raw.index.where(raw.index != raw.index[3])), "1 rows have no date"),
        (lambda raw: raw.iloc[:0], "none of 0 rows"),
        (lambda raw: raw.assign(Close=np.nan), "none of 400 rows"),
    ],
)
def test_what_cannot_be_bars_is_refused_in_words(raw, spoil, words):
    with pytest.raises(DataError, match=words):
        clean_bars(spoil(raw))


def test_the_hash_sees_every_bit_and_date(make_bars):
    frame = make_bars(50)
    same = bars_hash(frame)
    assert bars_hash(frame.copy()) == same
    assert bars_hash(frame.set_axis(frame.index.as_unit("ns"))) == same
    for change in (
        frame.assign(Close=np.nextafter(frame["Close"], np.inf)),
        frame.set_axis(frame.index + pd.Timedelta(days=1)),
        frame.rename(columns={"Open": "Opened"}),
        frame.iloc[1:],
    ):
        assert bars_hash(change) != same


def test_too_few_bars_say_need_and_have(make_bars):
    check_enough(make_bars(30), 30, "training")
    with pytest.raises(InsufficientDataError, match="training needs 756 bars and there are 30"):
        check_enough(make_bars(30), 756, "training")


# -- sessions


NYSE = calendar_for("AAPL")
ORACLE = exchange_calendars.get_calendar("XNYS", start="1969-01-01", end="2027-12-31")


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
    from data.schema import _INDICES, _SUFFIXES

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
    found = NYSE.next_sessions(pd.Timestamp(day), count)
    expected = ORACLE.sessions[ORACLE.sessions > pd.Timestamp(day)][:count]
    np.testing.assert_array_equal(found.to_numpy().astype("M8[D]"), expected.to_numpy().astype("M8[D]"))
    assert NYSE.sessions_between(pd.Timestamp(day), found[-1]) == count
    assert NYSE.sessions_between(found[-1], pd.Timestamp(day)) == -count


def test_sessions_reach_back_to_1970():
    assert list(NYSE.next_sessions(pd.Timestamp("1970-01-01"), 1)) == [pd.Timestamp("1970-01-02")]
    assert NYSE.sessions_between(pd.Timestamp("1979-12-31"), pd.Timestamp("1980-12-31")) == 253


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


@settings(deadline=None, max_examples=60)
@given(offsets=st.lists(st.integers(0, 400), max_size=120))
def test_gaps_are_those_of_the_set_difference(offsets: list[int]):
    """The slow oracle; dates may be doubled, in any order, and on days without a session."""
    dates = pd.DatetimeIndex(pd.Timestamp("2024-01-01") + pd.to_timedelta(offsets, unit="D"))
    inside = ORACLE.sessions[(ORACLE.sessions >= dates.min()) & (ORACLE.sessions <= dates.max())]
    assert list(NYSE.missing(dates)) == sorted(set(inside) - set(dates))
    assert list(NYSE.off_calendar(dates)) == sorted(set(dates) - set(inside))


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> schema.SessionCalendar:
    """A calendar that was built, and whose only file lies below ``tmp_path``."""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    return load()


def load() -> schema.SessionCalendar:
    return schema._load.__wrapped__("XNYS", 2027)


def file_in(folder: Path) -> Path:
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    return file


def assert_same(one: schema.SessionCalendar, other: schema.SessionCalendar) -> None:
    for now, then in ((one.days, other.days), (one.closes, other.closes)):
        np.testing.assert_array_equal(now, then)
        assert now.dtype == then.dtype
    assert (one.known_to, one.timezone) == (other.known_to, other.timezone)


def test_a_calendar_is_built_once_for_all_processes(
    built: schema.SessionCalendar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_from_exchange", lambda *_: pytest.fail("built again"))
        assert_same(load(), built)
    # A folder that cannot be written does no harm.
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "file"))
    assert_same(load(), built)


def test_a_kept_calendar_that_is_not_what_was_written_is_built_anew_and_replaced(
    built: schema.SessionCalendar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    afresh = schema._from_exchange("XNYS", np.datetime64("2027-12-31"))
    monkeypatch.setattr(schema, "_from_exchange", lambda *_: dict(afresh))
    file = file_in(tmp_path)
    whole = file.read_bytes()
    archive, array = io.BytesIO(), io.BytesIO()
    np.savez(archive, days=built.days[:9], closes=built.closes[:9], timezone="UTC", known_to=built.known_to)
    np.save(array, built.days)
    bad = {f"cut off at {n}": whole[:n] for n in (0, 1, 31, 32, 33, 40, 100, 500, len(whole) - 1)}
    bad |= {"archive": archive.getvalue(), "array": array.getvalue(), "longer": whole + b"x"}
    bad |= {"without a digest": whole[32:], "zeros": bytes(len(whole)), "of another": b"0" * 32 + whole[32:]}
    # The heads of an archive and of each of its arrays, and places all over.
    heads = [match.start() + n for match in re.finditer(b"PK|NUMPY", whole) for n in (4, 10, 30, 50, 90)]
    for place in {*range(0, 100, 4), *heads, *range(0, len(whole), len(whole) // 60)}:
        if place < len(whole):
            flipped = bytes([whole[place] ^ (1 << place % 8)])
            bad[f"flipped at {place}"] = whole[:place] + flipped + whole[place + 1 :]
    assert len(bad) > 100
    for kind, content in bad.items():
        file.write_bytes(content)
        assert_same(load(), built)
        assert file_in(tmp_path).read_bytes() == whole, kind


@pytest.mark.parametrize("whose", ["exchange_calendars", "ours"])
def test_a_calendar_of_another_release_is_not_read_and_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    source = tmp_path / "schema.py"
    source.write_bytes(schema.SOURCE.read_bytes())
    monkeypatch.setattr(schema, "SOURCE", source)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    built = load()
    (file,) = tmp_path.rglob("XNYS-*")
    # Of an earlier release, which wrote no digest; and what belongs to others.
    (old := file.with_name("XNYS-2027-12-31-4.13.2.npz")).write_bytes(b"old")
    for name in ("schema.cpython-311.pyc", "XNYS-2028-12-31-1.kept", "XHKG-2027-12-31-1.kept"):
        file.with_name(name).write_bytes(b"of others")
    if whose == "ours":
        source.write_bytes(source.read_bytes() + b"# changed")
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1")
    assert_same(load(), built)
    assert not file.exists()
    assert not old.exists()
    assert len([path for path in file.parent.iterdir() if path != source]) == 4
