"""Bars in memory: one fetch per session and symbol, one flight at a time, old bars rather than none."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from data.data_fetcher import CsvSource
from data.schema import calendar_for
from service.prediction_service import LONGEST_RETRY, LOOK_AGAIN, MOST_HELD, SERVED_LATELY, BarKeeper
from tests.test_data.test_cache_manager import LiveSource, after
from utils.base import UnknownSymbolError, UpstreamError


@pytest.fixture
def raw(make_bars: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    table = make_bars(300, seed=11)
    return table.assign(**{"Adj Close": table["Close"]})


class Moment:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock(raw: pd.DataFrame) -> Moment:
    return Moment(after(raw.index[-2]))


@pytest.fixture
def source(raw: pd.DataFrame) -> LiveSource:
    return LiveSource(raw.iloc[:-1])


def test_bars_are_fetched_once_per_session(source: LiveSource, clock: Moment, raw: pd.DataFrame):
    keeper = BarKeeper(source, None, clock)
    assert keeper.ready("AAPL") is None
    first = keeper.get("AAPL")
    assert first.content[1] is False
    assert first.due == calendar_for("AAPL").next_close(clock.now)
    clock.now = first.due - timedelta(seconds=1)
    assert keeper.get("AAPL") is keeper.ready("AAPL") is first
    assert len(source.asked) == 1
    clock.now, source.table = first.due, raw
    assert keeper.ready("AAPL") is None, "a newer session is due"
    second = keeper.get("AAPL")
    assert second.bars.frame.index[-1] == raw.index[-1]
    assert second.content != first.content
    assert len(source.asked) == 2


def test_fault_08_old_bars_are_served_stale_and_a_dead_source_is_not_stormed(
    source: LiveSource, clock: Moment
):
    keeper = BarKeeper(source, None, clock)
    clock.now = keeper.get("AAPL").due
    source.error = UpstreamError("down")
    waits = []
    for _ in range(8):
        held = keeper.get("AAPL")
        assert held.bars.provenance.stale
        assert held.content[1] is True
        asked = len(source.asked)
        for _ in range(50):
            keeper.get("AAPL")
        assert len(source.asked) == asked
        waits.append((held.due - clock.now).total_seconds())
        clock.now = held.due
    assert waits[0] >= 15.0
    assert waits[-1] > waits[0]
    assert max(waits) <= 1.5 * LONGEST_RETRY.total_seconds()
    assert len({wait / 2**number for number, wait in enumerate(waits[:4])}) == 4, "the pauses are jittered"
    source.error = None
    assert keeper.get("AAPL").tries > 0, "it answers, and has no newer session"


def test_fault_08_without_bars_the_error_is_passed_on(source: LiveSource, clock: Moment):
    source.error = UpstreamError("down")
    keeper = BarKeeper(source, None, clock)
    with pytest.raises(UpstreamError):
        keeper.get("AAPL")
    source.error = None
    assert keeper.get("AAPL").content[1] is False


def test_fault_09_a_symbol_that_became_unknown_is_served_stale(source: LiveSource, clock: Moment):
    keeper = BarKeeper(source, None, clock)
    clock.now = keeper.get("AAPL").due
    source.table = None
    assert keeper.get("AAPL").bars.provenance.stale
    with pytest.raises(UnknownSymbolError):
        keeper.get("NOPE")


def test_one_flight_per_symbol_and_nobody_waits_who_has_old_bars(
    source: LiveSource, clock: Moment, raw: pd.DataFrame
):
    keeper = BarKeeper(source, None, clock)
    clock.now = keeper.get("AAPL").due
    source.table, source.delay_s = raw, 0.3
    flying = threading.Thread(target=keeper.get, args=("AAPL",))
    flying.start()
    while len(source.asked) < 2:
        threading.Event().wait(0.005)
    meanwhile = keeper.get("AAPL")
    assert flying.is_alive(), "the answer did not wait for the source"
    assert meanwhile.bars.provenance.stale
    flying.join()
    assert len(source.asked) == 2
    assert keeper.get("AAPL").bars.frame.index[-1] == raw.index[-1]


def test_without_old_bars_everybody_waits_for_the_one_flight(source: LiveSource, clock: Moment):
    keeper, found = BarKeeper(source, None, clock), []
    source.delay_s = 0.1
    threads = [threading.Thread(target=lambda: found.append(keeper.get("AAPL"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len({id(held) for held in found}) == 1
    assert len(source.asked) == 1


def test_files_are_looked_at_again_and_the_same_content_keeps_its_name(tmp_path, raw: pd.DataFrame):
    raw.to_csv(tmp_path / "AAPL.csv", index_label="Date")
    clock = Moment(datetime(2026, 11, 20, 12, tzinfo=UTC))
    keeper = BarKeeper(CsvSource(tmp_path), None, clock)
    first = keeper.get("AAPL")
    clock.now += LOOK_AGAIN
    assert keeper.ready("AAPL") is None
    again = keeper.get("AAPL")
    assert again.content == first.content
    assert again.bars.frame is first.bars.frame, "a file that has not changed is not parsed"
    (tmp_path / "AAPL.csv").rename(tmp_path / "elsewhere")
    clock.now += LOOK_AGAIN
    assert keeper.get("AAPL").revision is None
    (tmp_path / "elsewhere").rename(tmp_path / "AAPL.csv")
    clock.now += LOOK_AGAIN
    assert keeper.get("AAPL").revision == first.revision
    raw.iloc[:-1].to_csv(tmp_path / "AAPL.csv", index_label="Date")
    clock.now += LOOK_AGAIN
    assert keeper.get("AAPL").content != first.content


def test_the_background_refreshes_what_was_served_lately(
    source: LiveSource, clock: Moment, raw: pd.DataFrame
):
    keeper = BarKeeper(source, None, clock)
    due = keeper.get("AAPL").due
    keeper.refresh_due()
    assert len(source.asked) == 1, "nothing is due"
    clock.now, source.table = due, raw
    keeper.refresh_due()
    assert len(source.asked) == 2
    assert keeper.ready("AAPL") is not None
    clock.now += SERVED_LATELY + timedelta(days=3)
    keeper.refresh_due()
    assert len(source.asked) == 2, "nobody asked for it lately"


def test_the_thread_starts_survives_an_error_and_stops(
    source: LiveSource, clock: Moment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("service.prediction_service.REFRESH_EVERY_S", 0.01)
    keeper, twice = BarKeeper(source, None, clock), threading.Event()
    calls = []

    def broken() -> None:
        calls.append(1)
        if len(calls) > 1:
            twice.set()
        raise ZeroDivisionError

    monkeypatch.setattr(keeper, "refresh_due", broken)
    keeper.start()
    assert twice.wait(5.0)
    keeper.stop()
    assert "goes on" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "refresh-bars"]
    source.is_live = False
    keeper.start()
    assert not [thread for thread in threading.enumerate() if thread.name == "refresh-bars"]


def test_memory_is_bounded(source: LiveSource, clock: Moment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.prediction_service.MOST_HELD", 3)
    assert MOST_HELD > 3
    keeper = BarKeeper(source, None, clock)
    for symbol in ("A", "B", "C", "A", "D"):
        clock.now += timedelta(seconds=1)
        keeper.get(symbol)
    assert [keeper.ready(symbol) is not None for symbol in "ABCD"] == [True, False, True, True]


def test_bars_that_a_refresh_brought_back_are_dropped_first(
    source: LiveSource, clock: Moment, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("service.prediction_service.MOST_HELD", 2)
    keeper = BarKeeper(source, None, clock)
    keeper.get("A")
    keeper._asked.clear()
    keeper.get("B")
    keeper.get("C")
    assert [keeper.ready(symbol) is not None for symbol in "ABC"] == [False, True, True]
