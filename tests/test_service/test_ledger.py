"""What was served stays as it was served: on disk, under attack, when nothing can be written, and scored."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sql
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.data_fetcher import fetch_stock_data
from data.schema import Bars
from evaluation.accounting import CostModel
from service import ledger as module
from service import prediction_service
from service.ledger import GENESIS, ForecastLedger, ServedForecast, main, score, summarise, track_record
from service.prediction_service import Outbox, PredictionService, served_forecast
from service.schemas import PredictionRequest, PredictionResult
from tests.test_service.conftest import BOTH, FakeSource
from utils.base import DataError, StorageError, UsageError

ROOT = Path(__file__).resolve().parents[2]
CHILD = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
THEN = datetime(2006, 6, 1, 22, tzinfo=UTC)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


def told(**changes: object) -> ServedForecast:
    usual = ServedForecast(
        symbol="AAPL",
        source="fake",
        model_id="AAPL-gbm",
        model_version="v1",
        as_of="2006-06-01",
        target_session="2006-06-08",
        horizon_bars=5,
        close=100.0,
        forecast_return=0.01,
        lower_return=-0.03,
        upper_return=0.05,
        sigma_log=0.03,
        position=0.5,
    )
    return usual.model_copy(update=changes)


def path_of(ledger: ForecastLedger) -> Path:
    assert ledger._database.file is not None
    return ledger._database.file


def url_of(ledger: ForecastLedger) -> str:
    return ledger._database._engine.url.render_as_string(hide_password=False)


def filled(ledger: ForecastLedger, n: int = 5) -> ForecastLedger:
    for i in range(n):
        assert ledger.record(told(position=i / 10), now=THEN)
    return ledger


def change(ledger: ForecastLedger, *statements: str) -> None:
    engine = sql.create_engine(url_of(ledger))
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


# ---------------------------------------------------------------- writing


@BOTH
def test_a_row_comes_back_as_it_was_written(ledger: ForecastLedger) -> None:
    filled(ledger)
    entries = ledger.entries("AAPL")
    assert [entry.forecast for entry in entries] == [told(position=i / 10) for i in range(5)]
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0].previous_hash == GENESIS
    assert entries[0].served_at == "2006-06-01T22:00:00.000+00:00"
    assert ledger.entries("MSFT") == []
    assert ledger.verify() == (5, entries[-1].row_hash)


@BOTH
def test_the_same_forecast_twice_is_one_row(ledger: ForecastLedger, outbox: Outbox) -> None:
    assert ledger.record(told())
    assert not ledger.record(told())
    outbox.keep(told())
    assert not ForecastLedger(url_of(ledger)).record(told())
    assert ledger.record(told(position=0.6))
    assert ledger.verify()[0] == 2


@BOTH
@given(values=st.lists(FINITE, min_size=6, max_size=6))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_number_survives_the_database(ledger: ForecastLedger, values: list[float]) -> None:
    names = ("close", "forecast_return", "lower_return", "upper_return", "sigma_log", "position")
    ledger.record(told(**{name: value + 0.0 for name, value in zip(names, values, strict=True)}))
    ledger.verify()


def test_reading_makes_no_file(ledger: ForecastLedger) -> None:
    assert ledger.entries() == []
    assert ledger.verify() == (0, GENESIS)
    assert not path_of(ledger).parent.exists()


@BOTH
def test_many_threads_and_ledgers_write_one_chain(
    ledger: ForecastLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT_S", 20.0)
    others = [ForecastLedger(url_of(ledger)) for _ in range(3)]
    ledger.record(told(horizon_bars=250))

    def write(own: ForecastLedger, base: int) -> None:
        for i in range(10):
            own.record(told(horizon_bars=base + i // 2))

    threads = [threading.Thread(target=write, args=(own, 10 * n)) for n, own in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.verify()[0] == 1 + 3 * 5


@BOTH
def test_two_that_begin_at_once_make_one_table(ledger: ForecastLedger) -> None:
    ledgers = [ForecastLedger(url_of(ledger)) for _ in range(2)]
    begin = threading.Barrier(2)

    def write(own: ForecastLedger, position: float) -> None:
        begin.wait()
        with contextlib.suppress(StorageError):  # locked: tried again later
            own.record(told(position=position))
        own.record(told(position=position))

    threads = [threading.Thread(target=write, args=(own, float(n))) for n, own in enumerate(ledgers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.verify()[0] == 2


def test_a_url_without_sense_is_refused_without_its_password() -> None:
    for url in ("nonsense", "nosuchbase://a:secret@b/c", "postgresql+nodriver://a:secret@b/c"):
        with pytest.raises(UsageError, match="AI_STOCKS_DATABASE_URL") as caught:
            ForecastLedger(url)
        assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- planted faults


@BOTH
@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE served_forecasts SET forecast_return = 0.0123 WHERE sequence = 3", "row 3 .* not what was"),
        (
            "UPDATE served_forecasts SET position = position + 1e-15 WHERE sequence = 4",
            "row 4 .* not what was",
        ),
        ("UPDATE served_forecasts SET served_at = '2006-01-01' WHERE sequence = 2", "row 2 .* not what was"),
        ("UPDATE served_forecasts SET digest = 'x' WHERE sequence = 2", "row 2 .* not what was"),
        ("DELETE FROM served_forecasts WHERE sequence = 1", "row 1 is missing"),
        ("DELETE FROM served_forecasts WHERE sequence = 3", "row 3 is missing"),
        ("DELETE FROM served_forecasts WHERE sequence = 5", "4 rows are not the 5"),
        ("DELETE FROM served_forecasts", "0 rows are not the 5"),
        ("DELETE FROM served_forecasts_head", "5 rows are not the 0"),
        ("DROP TABLE served_forecasts_head", "5 rows are not the 0"),
        ("DROP TABLE served_forecasts", "0 rows are not the 5"),
        ("UPDATE served_forecasts_head SET row_hash = 'x'", "5 rows are not the 5"),
    ],
)
def test_a_planted_fault_is_found(ledger: ForecastLedger, statement: str, words: str) -> None:
    filled(ledger)
    change(ledger, statement)
    with pytest.raises(DataError, match=words):
        ledger.verify()


@BOTH
def test_rows_that_changed_places_are_found(ledger: ForecastLedger) -> None:
    filled(ledger)
    swap = "UPDATE served_forecasts SET sequence = {} WHERE sequence = {}"
    change(ledger, swap.format(9, 2), swap.format(2, 3), swap.format(3, 9))
    with pytest.raises(DataError, match="row 2"):
        ledger.verify()


def test_a_chain_that_was_forged_as_a_whole_lacks_the_noted_head(
    ledger: ForecastLedger, tmp_path: Path
) -> None:
    _, noted = filled(ledger).verify()
    forged = ForecastLedger(f"sqlite:///{tmp_path / 'forged.sqlite'}")
    for i in range(6):
        forged.record(told(position=i / 5), now=THEN)
    assert forged.verify()[0] == 6
    with pytest.raises(DataError, match="noted"):
        forged.verify(noted)
    ledger.record(told(position=2.0))
    assert ledger.verify(noted)[0] == 6


@BOTH
def test_a_row_deleted_from_the_end_stays_missed(ledger: ForecastLedger) -> None:
    change(filled(ledger), "DELETE FROM served_forecasts WHERE sequence = 5")
    ledger.record(told(position=3.0))
    with pytest.raises(DataError, match="row 5 is missing"):
        ledger.verify()


# ---------------------------------------------------------------- beside somebody who writes all the time


@pytest.fixture
def begin_to_write(ledger: ForecastLedger, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let another write a row after whatever is read, where the ledger takes it."""
    written, other, read = itertools.count(), ForecastLedger(url_of(ledger)), module.Database.read

    def read_and_write(database: module.Database, query: sql.Select[Any]) -> Sequence[sql.RowMapping]:
        found, n = read(database, query), next(written)
        assert n < 100, "it reads on and on"
        with contextlib.suppress(StorageError):
            other.record(told(horizon_bars=100 + n), now=THEN)
        return found

    def begin() -> None:
        monkeypatch.setattr(module, "ATTEMPTS", 2)
        monkeypatch.setattr(module.Database, "read", read_and_write)

    return begin


@BOTH
def test_who_reads_beside_a_steady_writer_comes_to_an_end(
    shell: ForecastLedger,
    prices: Bars,
    begin_to_write: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled(shell)
    begin_to_write()
    rows, head = shell.verify()
    assert 5 <= rows < shell.verify(head)[0]
    for _ in range(3):
        notes = track_record(shell, lambda _: prices, "AAPL", 99).notes
        assert "broken" not in "".join(notes)
    for command in ("verify", "show", "score"):
        assert main([command, "--json"]) in {0, 3}
    said = "".join(capsys.readouterr())
    assert "broken" not in said
    assert module.AFTER_BREAK not in said


@BOTH
@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE served_forecasts SET position = 2 WHERE sequence = 3", "row 3 .* not what was"),
        ("DELETE FROM served_forecasts WHERE sequence = 3", "row 3 is missing"),
        ("DELETE FROM served_forecasts WHERE sequence = 5", "row 5 is missing"),
        ("DELETE FROM served_forecasts", "row 1 is missing"),
        ("DELETE FROM served_forecasts_head", "5 rows are not the 0"),
        ("DROP TABLE served_forecasts_head", "5 rows are not the 0"),
        ("UPDATE served_forecasts_head SET row_hash = 'x'", "row 6 .* does not follow"),
        ("UPDATE served_forecasts_head SET rows = 4", "5 rows are not the 4"),
    ],
)
def test_a_planted_fault_is_found_beside_a_steady_writer(
    ledger: ForecastLedger, begin_to_write: Callable[[], None], statement: str, words: str
) -> None:
    change(filled(ledger), statement)
    begin_to_write()
    for _ in range(2):
        with pytest.raises(DataError, match=words):
            ledger.verify()


@BOTH
@pytest.mark.parametrize("is_written_to", [True, False])
def test_a_row_that_was_added_is_found(
    ledger: ForecastLedger, begin_to_write: Callable[[], None], *, is_written_to: bool
) -> None:
    assert filled(ledger).audit_new([]).fault is None
    last, forecast = ledger.entries()[-1], told(position=0.9)
    link = {"sequence": 6, "served_at": last.served_at, "previous_hash": last.row_hash}
    row = {**forecast.columns, **link, "digest": forecast.digest}
    row |= {"row_hash": module._chained(6, last.served_at, last.row_hash, forecast)}
    engine = sql.create_engine(url_of(ledger))
    with engine.begin() as connection:
        connection.execute(sql.insert(module._ROWS).values(**row))
    engine.dispose()
    if is_written_to:
        begin_to_write()
    with pytest.raises(DataError, match="6 rows are not the 5 of its head"):
        ledger.verify()
    assert ledger.audit_new([]).fault == "6 rows are not the 5 of its head"


# ---------------------------------------------------------------- nothing can be written


def test_a_locked_database_costs_a_warning_and_the_row_comes_later(
    ledger: ForecastLedger, outbox: Outbox, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    filled(ledger, 1)
    # What the first answer of all costs is not the database's.
    assert client.post("/api/predict", json={"symbol": "AAPL", "horizon": 4}).status_code == 200
    holder = sqlite3.connect(path_of(ledger), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        started = time.monotonic()
        for horizon in (5, 6, 7):
            assert client.post("/api/predict", json={"symbol": "AAPL", "horizon": horizon}).status_code == 200
        # Left to itself, the database makes each of them wait 5 s.
        assert time.monotonic() - started < 8.0
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    (said,) = [record for record in caplog.records if "wait in memory" in record.message]
    assert said.levelno == logging.WARNING
    assert "locked" in said.message
    outbox._write_pending()
    assert client.post("/api/predict", json={"symbol": "AAPL", "horizon": 8}).status_code == 200
    assert [entry.forecast.horizon_bars for entry in ledger.entries()] == [5, 4, 5, 6, 7, 8]
    ledger.verify()


@pytest.mark.parametrize("url", ["sqlite:////proc/nothing/x.sqlite", "sqlite:////dev/full"])
def test_a_place_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = ForecastLedger(url)
    with pytest.raises(StorageError, match="cannot be written"):
        ledger.record(told())
    outbox = Outbox(ledger.record)
    outbox.keep(told())
    assert "wait in memory" in caplog.text
    monkeypatch.setattr(prediction_service, "LAST_PAUSE_S", 0.0)
    outbox.close()
    assert "lost a served forecast" in caplog.text


def test_a_file_that_is_no_database_costs_a_warning(
    ledger: ForecastLedger, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(ledger).parent.mkdir()
    path_of(ledger).write_bytes(b"no database" * 1_000)
    assert client.post("/api/predict", json={"symbol": "AAPL"}).status_code == 200
    assert "not a database" in caplog.text
    answer = client.get("/api/track-record/AAPL")
    assert answer.status_code == 507
    assert "cannot be read" in answer.json()["detail"]
    assert path_of(ledger).read_bytes() == b"no database" * 1_000


def test_a_database_that_was_removed_begins_anew(ledger: ForecastLedger, outbox: Outbox) -> None:
    filled(ledger)
    path_of(ledger).unlink()
    outbox.keep(told(position=9.0))
    outbox._write_pending()
    outbox.keep(told(position=8.0))
    assert ledger.verify()[0] == 2


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(prediction_service, "MAX_PENDING", 3)
    outbox = Outbox(ForecastLedger("sqlite:////proc/nothing/x.sqlite").record)
    for i in range(5):
        outbox.keep(told(position=float(i)))
    assert [waiting.position for waiting, _ in outbox._pending.values()] == [2.0, 3.0, 4.0]
    assert caplog.text.count("lost a served forecast") == 2
    monkeypatch.setattr(prediction_service, "LAST_PAUSE_S", 0.0)
    outbox.close()
    assert caplog.text.count("lost a served forecast") == 5


@contextlib.contextmanager
def held(ledger: ForecastLedger) -> Iterator[None]:
    holder = sqlite3.connect(path_of(ledger), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


def test_what_waits_is_written_without_another_request(
    ledger: ForecastLedger, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_service, "PAUSE_S", 0.05)
    filled(ledger, 1)
    before = datetime.now(UTC)
    with held(ledger):
        outbox.keep(told(position=0.9))
        after = datetime.now(UTC)
    until = time.monotonic() + 10.0
    while len(ledger.entries()) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert (
        before - timedelta(milliseconds=1) <= datetime.fromisoformat(ledger.entries()[1].served_at) <= after
    )
    assert ledger.verify()[0] == 2
    assert outbox._pending == {}


def test_what_waits_is_written_when_the_service_ends(
    ledger: ForecastLedger, outbox: Outbox, api: FastAPI
) -> None:
    filled(ledger, 1)
    with TestClient(api) as client, held(ledger):
        assert client.post("/api/predict", json={"symbol": "AAPL"}).status_code == 200
        assert outbox._pending
    assert ledger.verify()[0] == 2
    assert outbox._retry is None


def test_the_end_waits_for_who_holds_the_database(ledger: ForecastLedger, outbox: Outbox) -> None:
    filled(ledger, 1)
    with held(ledger):
        outbox.keep(told(position=0.9))
        closing = threading.Thread(target=outbox.close)
        closing.start()
        time.sleep(0.3)
    closing.join()
    assert ledger.verify()[0] == 2


KILLED = """
import os, signal, sys
from tests.test_service.conftest import FakeSource, FakeRegistry, served
from tests.conftest import make_bars, nyse_sessions
from service.ledger import ForecastLedger
from service.prediction_service import Outbox, PredictionService
from service.schemas import PredictionRequest
import pandas as pd
ledger = ForecastLedger(sys.argv[1])
source = FakeSource({"AAPL": pd.read_parquet(sys.argv[2])})
box = Outbox(ledger.record)
service = PredictionService(registry=FakeRegistry(served()), source=source, cache=None, on_served=box.keep)
for horizon in range(1, 50):
    body = service.answer(PredictionRequest(symbol="AAPL", horizon=horizon))
    print(horizon, flush=True)
    if horizon == 7:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_after_the_answer_the_row_is_there(
    ledger: ForecastLedger, bars: pd.DataFrame, tmp_path: Path
) -> None:
    bars.to_parquet(tmp_path / "bars.parquet")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url_of(ledger), str(tmp_path / "bars.parquet")],
        cwd=ROOT,
        env=CHILD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    answered = [int(line) for line in done.stdout.split()]
    assert answered == list(range(1, 8))
    assert [entry.forecast.horizon_bars for entry in ledger.entries()] == answered
    ledger.verify()


# ---------------------------------------------------------------- from the answer to the row


def test_a_row_says_what_the_answer_said(predictions: PredictionService, ledger: ForecastLedger) -> None:
    body = predictions.answer(PredictionRequest(symbol="AAPL", horizon=20, max_long=0.7))
    answer = PredictionResult.model_validate_json(body)
    (entry,) = ledger.entries()
    kept, ahead = entry.forecast, answer.forecast
    assert ahead is not None
    assert ahead.lower_band is not None
    assert ahead.upper_band is not None
    assert kept == served_forecast(answer)
    assert (kept.as_of, kept.target_session, kept.horizon_bars) == (answer.dates[-1], ahead.dates[-1], 20)
    assert kept.close == answer.prices[-1]
    assert kept.position == answer.fused_positions[-1]
    assert kept.close * (1 + kept.forecast_return) == pytest.approx(ahead.prices[-1], rel=1e-12)
    assert kept.close * (1 + kept.lower_return) == pytest.approx(ahead.lower_band[-1], rel=1e-12)
    assert kept.close * (1 + kept.upper_return) == pytest.approx(ahead.upper_band[-1], rel=1e-12)
    assert (kept.source, kept.model_id, kept.model_version) == ("fake", "AAPL-gbm", "v1")


def test_what_answered_is_kept_once_whatever_was_asked(client: TestClient, ledger: ForecastLedger) -> None:
    for mode in ("gbm_only", "ensemble", "hybrid", "weighted"):
        body = {"symbol": "AAPL", "fusion": {"mode": mode}}
        assert client.post("/api/predict", json=body).json()["metadata"]["fusionMode"] == mode
    (entry,) = ledger.entries()
    assert entry.forecast.model_id == "AAPL-gbm"
    (row,) = client.get("/api/track-record/AAPL").json()["forecasts"]
    assert (row["modelId"], row["modelVersion"]) == ("AAPL-gbm", "v1")


def test_models_are_summarised_apart(ledger: ForecastLedger, prices: Bars) -> None:
    for version, kind in enumerate(("gbm", "lstm", "ensemble")):
        model = {"model_id": f"AAPL-{kind}", "model_version": f"v{version}"}
        ledger.record(told(**model, **days_of(prices, 300, 305)), now=at_close(prices, 300))
    found = summarise(score(ledger.entries(), prices))
    assert [(one.model_id, one.served) for one in found] == [
        ("AAPL-ensemble", 1),
        ("AAPL-gbm", 1),
        ("AAPL-lstm", 1),
    ]


def test_a_row_of_the_first_ledgers_stays_good(ledger: ForecastLedger) -> None:
    # Written by the first release: with the mode that was asked for.
    hashed = {name: value for name, value in dict(told()).items() if name != "model_id"}
    digest = sha256_of({**hashed, "fusion_mode": "hybrid"})
    ledger.record(told(model_id="hybrid"))
    (entry,) = ledger.entries()
    assert (entry.digest, entry.damage) == (digest, None)


def sha256_of(content: dict[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_an_answer_without_bands_is_no_forecast(predictions: PredictionService) -> None:
    answer = PredictionResult.model_validate_json(predictions.answer(PredictionRequest(symbol="AAPL")))
    with pytest.raises(DataError, match="bands"):
        served_forecast(answer.model_copy(update={"forecast": None}))


# ---------------------------------------------------------------- scoring


@pytest.fixture
def prices(source: FakeSource) -> Bars:
    return fetch_stock_data("AAPL", source=source)


def days_of(prices: Bars, first: int, last: int) -> dict[str, str]:
    index = prices.frame.index
    return {"as_of": f"{index[first]:%Y-%m-%d}", "target_session": f"{index[last]:%Y-%m-%d}"}


def at_close(prices: Bars, row: int) -> datetime:
    return prices.frame.index[row].to_pydatetime().replace(hour=23, tzinfo=UTC)


def test_a_score_worked_out_by_hand(ledger: ForecastLedger, prices: Bars) -> None:
    close = prices.frame["Close"].to_numpy()
    days = days_of(prices, 300, 303)
    ledger.record(told(close=float(close[300]), position=0.5, **days), now=at_close(prices, 300))
    (row,) = score(ledger.entries(), prices)
    came = close[303] / close[300] - 1
    assert row.status == "scored"
    assert row.counts
    assert row.note is None
    assert row.realised_return == pytest.approx(came)
    assert row.direction_hit == (came > 0)
    assert row.always_up_hit == (came > 0)
    assert row.band_hit == (-0.03 <= came <= 0.05)
    # A loop of its own: cash, shares, and 8 bps of what is traded at each close but the last.
    for weight, booked in ((0.5, row.position_return), (1.0, row.hold_return)):
        cash, shares, rate = 1.0, 0.0, 0.0008
        for day in (300, 301, 302):
            equity = cash + shares * close[day]
            gap = weight * equity - shares * close[day]
            traded = gap / (1 + weight * rate * np.sign(gap))
            shares += traded / close[day]
            cash -= traded + abs(traded) * rate
        assert booked == pytest.approx(cash + shares * close[303] - 1, abs=1e-9)
    assert CostModel().one_way_rate == pytest.approx(0.0008)


def test_a_forecast_is_open_until_its_session_has_closed(ledger: ForecastLedger, prices: Bars) -> None:
    last = len(prices.frame) - 1
    ledger.record(
        told(**days_of(prices, last, last) | {"target_session": "2027-01-04"}), now=at_close(prices, last)
    )
    (row,) = score(ledger.entries(), prices)
    assert (row.status, row.counts, row.crps) == ("open", True, None)
    (summary,) = summarise([row])
    assert (summary.served, summary.scored, summary.direction_accuracy) == (1, 0, None)
    assert b"null" not in summary.wire_bytes()


def test_a_split_is_scored_by_returns_and_says_so(ledger: ForecastLedger, prices: Bars) -> None:
    close = float(prices.frame["Close"].iloc[300])
    days = days_of(prices, 300, 305)
    ledger.record(told(close=close, **days), now=at_close(prices, 300))
    (before,) = score(ledger.entries(), prices)
    halved = replace(prices, frame=prices.frame / 2)
    (after,) = score(ledger.entries(), halved)
    assert before.note is None
    assert after.note is not None
    assert "split" in after.note
    assert after.realised_return == pytest.approx(before.realised_return)
    assert after.crps == pytest.approx(before.crps)
    assert after.position_return == pytest.approx(before.position_return)


def test_what_cannot_be_scored_says_why_and_does_not_count(ledger: ForecastLedger, prices: Bars) -> None:
    now = at_close(prices, 300)
    ledger.record(told(source="yahoo", **days_of(prices, 300, 305)), now=now)
    ledger.record(told(**days_of(prices, 300, 305) | {"as_of": "2006-03-11"}), now=now)
    ledger.record(told(**days_of(prices, 300, 305) | {"target_session": "2006-03-18"}), now=now)
    ledger.record(told(**days_of(prices, 300, 305)), now=at_close(prices, 305))
    rows = score(ledger.entries(), prices)
    assert [row.counts for row in rows] == [False] * 4
    said = [row.note or "" for row in rows]
    words = ["prices of yahoo", "no session 2006-03-11", "no session 2006-03-18", "served 5 sessions late"]
    assert all(word in note for word, note in zip(words, said, strict=True)), said
    assert summarise(rows) == []


@pytest.mark.parametrize(
    ("served_at", "note"),
    [
        (datetime(2006, 6, 1, 19, 59, tzinfo=UTC), "before its as-of session had closed"),
        (datetime(2006, 6, 1, 20, 0, tzinfo=UTC), None),
        (datetime(2006, 6, 2, 19, 59, tzinfo=UTC), None),
        (datetime(2006, 6, 2, 20, 0, tzinfo=UTC), "served 1 session late"),
        (datetime(2006, 6, 5, 22, 0, tzinfo=UTC), "served 2 sessions late, in hindsight: does not count"),
        (datetime(2026, 6, 5, 22, 0, tzinfo=UTC), "sessions late"),
    ],
)
def test_only_a_forecast_of_the_last_closed_session_counts(
    ledger: ForecastLedger, prices: Bars, served_at: datetime, note: str | None
) -> None:
    close = float(prices.frame["Close"].loc["2006-06-01"])
    ledger.record(told(close=close), now=served_at)
    (row,) = score(ledger.entries(), prices)
    assert (row.status, row.counts) == ("scored", note is None)
    assert (note or "") in (row.note or "")
    assert (row.note is None) == (note is None)


@pytest.mark.parametrize(
    ("statement", "said", "counting"),
    [
        ("DELETE FROM served_forecasts WHERE sequence = 3", "row 3 is missing", [True, True, False, False]),
        (
            "UPDATE served_forecasts SET position = 2 WHERE sequence = 3",
            "row 3 .* is not what was written",
            [True, True, False, False, False],
        ),
        ("DELETE FROM served_forecasts WHERE sequence = 5", "4 rows are not the 5", [True] * 4),
        ("UPDATE served_forecasts_head SET row_hash = 'x'", "5 rows are not", [True] * 5),
        ("DROP TABLE served_forecasts", "0 rows are not the 5", []),
    ],
)
@BOTH
def test_the_track_record_says_that_the_chain_is_broken(
    ledger: ForecastLedger, prices: Bars, statement: str, said: str, counting: list[bool]
) -> None:
    for row in range(300, 305):
        ledger.record(told(**days_of(prices, row, row + 5)), now=at_close(prices, row))
    assert len(track_record(ledger, lambda _: prices, "AAPL", 99).notes) == 1
    change(ledger, statement)
    record = track_record(ledger, lambda _: prices, "aapl", 99)
    assert re.search(f"the ledger is broken: {said}", record.notes[-1]), record.notes
    assert [row.counts for row in record.forecasts] == counting
    assert sum(one.served for one in record.summaries) == sum(counting)
    assert all(row.note for row in record.forecasts if not row.counts)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that are looked through in each call of `ForecastLedger.audit`."""
    counts: list[int] = []
    audit = ForecastLedger.audit

    def counted(ledger: ForecastLedger, known: module.Audit = module.START) -> module.Audit:
        found = audit(ledger, known)
        counts.append(found.rows - known.good)
        return found

    monkeypatch.setattr(ForecastLedger, "audit", counted)
    return counts


@BOTH
def test_the_track_record_audits_only_what_is_new(
    ledger: ForecastLedger, prices: Bars, read: list[int]
) -> None:
    for row in range(300, 305):
        for symbol in ("AAPL", "MSFT"):
            ledger.record(told(symbol=symbol, **days_of(prices, row, row + 5)), now=at_close(prices, row))
        assert len(track_record(ledger, lambda _: prices, "AAPL", 99).notes) == 1
    assert read == [2] * 5
    # Another process knows nothing yet, and the command line always audits all.
    assert len(track_record(ForecastLedger(url_of(ledger)), lambda _: prices, "AAPL", 99).notes) == 1
    ledger.verify()
    assert read[5:] == [10, 10]
    # In place, and of another symbol: who asks for this one learns of it from `verify`, or after a restart.
    change(ledger, "UPDATE served_forecasts SET position = 2 WHERE sequence = 2")
    assert len(track_record(ledger, lambda _: prices, "AAPL", 99).notes) == 1
    assert "row 2 " in track_record(ledger, lambda _: prices, "MSFT", 99).notes[-1]
    assert "row 2 " in track_record(ledger, lambda _: prices, "AAPL", 99).notes[-1]
    with pytest.raises(DataError, match="row 2 "):
        ledger.verify()


def test_a_ledger_that_was_begun_anew_is_audited_anew(
    ledger: ForecastLedger, prices: Bars, read: list[int]
) -> None:
    for place in range(2):
        another = ForecastLedger(url_of(ledger))
        for row in range(300, 303 + place):
            days = days_of(prices, row, row + 5)
            another.record(told(position=place / 2, **days), now=at_close(prices, row))
        assert len(track_record(ledger, lambda _: prices, "AAPL", 99).notes) == 1
        path_of(ledger).unlink()
    assert read[-1] == 4


BAD_CELLS = [
    "position = 9e999",
    "close = -9e999",
    "sigma_log = 'wide'",
    "forecast_return = x'00ff'",
    "horizon_bars = 'five'",
    "horizon_bars = 5.5",
    "symbol = x'4141504c'",
    "symbol = CAST(x'ff41' AS TEXT)",
    "as_of = 'yesterday'",
    "target_session = x'00'",
    "target_session = '20060608'",
    "served_at = 'now'",
    "served_at = 7",
    "previous_hash = x'00'",
    "row_hash = x'00'",
    "digest = CAST(x'ff' AS TEXT)",
    "model_version = x'ff'",
]


@pytest.mark.parametrize("cell", BAD_CELLS)
def test_a_cell_that_holds_nonsense_is_reported(
    shell: ForecastLedger, outbox: Outbox, client: TestClient, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(filled(shell), f"UPDATE served_forecasts SET {cell} WHERE sequence = 3")  # noqa: S608
    assert main(["verify"]) == 4
    assert "row 3" in capsys.readouterr().err
    answer = client.get("/api/track-record/AAPL")
    assert answer.status_code == 200
    record = answer.json()
    assert "row 3" in record["notes"][-1]
    assert not any(row["counts"] for row in record["forecasts"][2:])
    if not cell.startswith("symbol"):
        assert "changed after it was written" in record["forecasts"][2]["note"]
    assert main(["show", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
    assert main(["score", "--json"]) in {0, 3}
    outbox.keep(told(position=3.0))
    assert len(shell.entries()) == 6


@pytest.mark.parametrize("cell", ["rows = 'many'", "rows = 9223372036854775807", "row_hash = x'00'"])
def test_a_head_that_holds_nonsense_is_reported(
    shell: ForecastLedger, client: TestClient, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(filled(shell), f"UPDATE served_forecasts_head SET {cell}")  # noqa: S608
    assert main(["verify"]) == 4
    assert "of its head" in capsys.readouterr().err
    assert "of its head" in client.get("/api/track-record/AAPL").json()["notes"][-1]
    assert client.post("/api/predict", json={"symbol": "AAPL"}).status_code == 200


def test_a_row_that_was_changed_does_not_count(ledger: ForecastLedger, prices: Bars) -> None:
    ledger.record(told(**days_of(prices, 300, 305)), now=at_close(prices, 300))
    change(ledger, "UPDATE served_forecasts SET forecast_return = 0.2")
    (row,) = score(ledger.entries(), prices)
    assert (row.status, row.counts, row.crps) == ("unscored", False, None)


def test_the_first_of_several_positions_counts(ledger: ForecastLedger, prices: Bars) -> None:
    for position in (0.3, 0.0, 1.8):
        ledger.record(told(position=position, **days_of(prices, 300, 305)), now=at_close(prices, 300))
    rows = score(ledger.entries(), prices)
    assert [row.counts for row in rows] == [True, False, False]
    (summary,) = summarise(rows)
    assert summary.mean_position_return == rows[0].position_return


def test_a_session_without_a_move_has_no_direction(ledger: ForecastLedger, prices: Bars) -> None:
    flat = replace(prices, frame=prices.frame * 0 + 50.0)
    ledger.record(told(close=50.0, **days_of(prices, 300, 305)), now=at_close(prices, 300))
    (row,) = score(ledger.entries(), flat)
    assert (row.realised_return, row.direction_hit, row.always_up_hit) == (0.0, None, None)
    (summary,) = summarise([row])
    assert summary.direction_accuracy is None
    assert summary.band_coverage == 1.0


def test_a_foresighted_record_beats_always_up_and_hold(ledger: ForecastLedger, prices: Bars) -> None:
    close = prices.frame["Close"].to_numpy()
    for row in range(200, 280):
        came = float(close[row + 5] / close[row] - 1)
        seen = told(
            close=float(close[row]),
            forecast_return=came,
            lower_return=came - 0.02,
            upper_return=came + 0.02,
            position=1.0 if came > 0 else -1.0,
            **days_of(prices, row, row + 5),
        )
        ledger.record(seen, now=at_close(prices, row))
    (summary,) = summarise(score(ledger.entries(), prices))
    assert (summary.scored, summary.direction_accuracy, summary.band_coverage) == (80, 1.0, 1.0)
    assert 0.3 < summary.always_up_accuracy < 0.7
    assert summary.mean_position_return > summary.mean_hold_return + 0.01


# ---------------------------------------------------------------- over HTTP and on the command line


@BOTH
def test_the_track_record_over_http(client: TestClient, source: FakeSource, bars: pd.DataFrame) -> None:
    empty = client.get("/api/track-record/AAPL").json()
    assert (empty["forecasts"], empty["summaries"]) == ([], [])
    assert "nothing of AAPL" in empty["notes"][0]
    source.answers["AAPL"] = bars.iloc[:-30]
    for horizon in (5, 5, 10):
        client.post("/api/predict", json={"symbol": "AAPL", "horizon": horizon})
    source.answers["AAPL"] = bars
    record = client.get("/api/track-record/aapl").json()
    assert [row["horizonBars"] for row in record["forecasts"]] == [5, 10]
    assert {row["status"] for row in record["forecasts"]} == {"scored"}
    # These prices are of 2006: whoever asks today asks after the fact.
    assert all("sessions late, in hindsight" in row["note"] for row in record["forecasts"])
    assert len(client.get("/api/track-record/AAPL?limit=1").json()["forecasts"]) == 1
    assert client.get("/api/track-record/..%2f..").status_code == 422
    assert client.get("/api/track-record/AAPL?limit=0").status_code == 422


@pytest.fixture
def shell(
    ledger: ForecastLedger, csv_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ForecastLedger:
    monkeypatch.setenv("AI_STOCKS_DATABASE_URL", url_of(ledger))
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
    return ledger


@BOTH
def test_the_command_line(shell: ForecastLedger, csv_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 0
    assert "none" in capsys.readouterr().out
    days = {"as_of": "1996-06-03", "target_session": "1996-06-10", "source": f"csv:{csv_dir.name}"}
    shell.record(told(symbol="NOISE", **days), now=datetime(1996, 6, 3, 23, tzinfo=UTC))
    shell.record(told(symbol="GONE", **days), now=datetime(1996, 6, 3, 23, tzinfo=UTC))
    assert main(["verify", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["rows"] == 2
    assert main(["verify", "--head", found["head"]]) == 0
    assert main(["show", "noise", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: row[name] for name in dict(told())} == dict(told(symbol="NOISE", **days))
    assert main(["score", "--json"]) == 0
    gone, summary = json.loads(capsys.readouterr().out)
    assert "not scored" in gone["status"]
    assert (summary["symbol"], summary["served"], summary["scored"]) == ("NOISE", 1, 1)
    for command, shown in (("score", "NOISE"), ("show", "1996-06-10"), ("verify", found["head"])):
        assert main([command]) == 0
        assert shown in capsys.readouterr().out


def test_rows_are_shown_in_percent_with_what_is_against_them(
    shell: ForecastLedger, capsys: pytest.CaptureFixture[str]
) -> None:
    days = {"as_of": "1996-06-03", "target_session": "1996-06-10", "forecast_return": 0.007631}
    in_time = datetime(1996, 6, 3, 23, tzinfo=UTC)
    shell.record(told(**days), now=in_time)
    shell.record(told(**days, position=0.1), now=in_time)
    shell.record(told(**days, model_version="v2"), now=datetime(1996, 6, 20, tzinfo=UTC))
    shell.record(told(**days, symbol="IBM", model_id="IBM-ensemble"), now=in_time)
    change(shell, "UPDATE served_forecasts SET position = 3.0 WHERE sequence = 4")
    assert main(["show"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("+0.76%", "(-3.00%", "1996-06-20", "yes", "hindsight", "other limits", "changed"):
        assert words in shown, words
    assert main(["show", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["counts"] for row in rows] == [True, False, False, False]
    assert rows[0]["forecast_return"] == 0.007631
    assert (rows[0]["note"], rows[0]["served_at"][:10]) == (None, "1996-06-03")
    assert "12 sessions late" in rows[2]["note"]


def test_a_broken_chain_ends_with_4(shell: ForecastLedger, capsys: pytest.CaptureFixture[str]) -> None:
    change(filled(shell), "DELETE FROM served_forecasts WHERE sequence = 2")
    assert main(["verify"]) == 4
    assert "row 2 is missing" in capsys.readouterr().err


def test_by_default_the_ledger_lies_beside_the_models(tmp_path: Path) -> None:
    from utils.base import Settings

    assert Settings(models_dir=tmp_path).database == f"sqlite:///{tmp_path / 'ai_stocks.sqlite'}"
    assert Settings(database_url="sqlite:////x/y").database == "sqlite:////x/y"


def test_the_models_folder_may_hold_the_ledger(tmp_path: Path) -> None:
    from service.model_registry import ModelRegistry

    ledger = ForecastLedger(f"sqlite:///{tmp_path / 'ai_stocks.sqlite'}")
    filled(ledger)
    assert ModelRegistry(tmp_path).list() == ()


def test_each_row_is_scored_by_its_own_source(
    shell: ForecastLedger, csv_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    days = {"as_of": "1996-06-03", "target_session": "1996-06-10"}
    now = datetime(1996, 6, 3, 23, tzinfo=UTC)
    shell.record(told(symbol="NOISE", source="csv:elsewhere", **days), now=now)
    assert main(["score"]) == 3
    assert "csv:elsewhere lies: give --source" in capsys.readouterr().err
    shell.record(
        told(symbol="NOISE", source=f"csv:{csv_dir.name}", model_id="NOISE-ensemble", **days), now=now
    )
    late = {"as_of": "2012-06-01", "target_session": "2012-06-08"}
    shell.record(told(source="sample", **late), now=datetime(2012, 6, 11, tzinfo=UTC))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["score"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for words in ("NOISE-ensemble", f"csv:{csv_dir.name}", "csv:elsewhere", "sample", "scored", "status"):
        assert any(words in line for line in lines), words
    assert main(["score", "--json"]) == 0
    sample, lost, found = sorted(json.loads(capsys.readouterr().out), key=lambda row: row["status"])
    assert "none counts: served 5 sessions late" in sample["status"]
    assert "not scored" in lost["status"]
    assert (found["status"], found["scored"]) == ("scored", 1)
    assert main(["verify"]) == 0
    assert "ok" in capsys.readouterr().out


def test_a_connection_serves_many_calls_and_a_replaced_file_none(
    ledger: ForecastLedger, tmp_path: Path
) -> None:
    opened: list[object] = []
    sql.event.listen(ledger._database._engine, "connect", lambda *args: opened.append(args))
    filled(ledger)
    for _ in range(3):
        assert ledger.verify()[0] == 5
    # The first one has made the file.
    assert len(opened) == 2
    other = filled(ForecastLedger(f"sqlite:///{tmp_path / 'other.sqlite'}"), 2)
    path_of(other).replace(path_of(ledger))
    assert ledger.verify()[0] == 2
    assert ledger.record(told(position=9.0))
    assert ForecastLedger(url_of(ledger)).verify()[0] == 3
