"""The database is a server: it ends and comes back, refuses, makes wait, and loses who writes to it."""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql

from service import prediction_service, training_service
from service.ledger import ForecastLedger, main
from service.prediction_service import Outbox
from service.schemas import TrainingParams
from service.training_service import TrainingService
from tests.test_service.conftest import BOTH, PASSWORD, PostgresServer
from tests.test_service.test_ledger import change, told, url_of
from utils.base import StorageError

SERVER = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def write(url: str, base: int, rows: int) -> None:
    """Write rows of its own and one that all write, in a process of its own."""
    own = ForecastLedger(url)
    for i in range(rows):
        while True:
            try:
                own.record(told(horizon_bars=base + i))
                own.record(told(position=0.1 + i // 2))
            except StorageError:
                continue
            break


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@BOTH
def test_processes_write_one_chain_and_a_killed_one_leaves_no_gap_and_no_lock(
    ledger: ForecastLedger, database_url: str
) -> None:
    context = multiprocessing.get_context("fork")
    killed, *others = [
        context.Process(target=write, args=(database_url, 1_000 * n, rows), daemon=True)
        for n, rows in enumerate((10_000, 20, 20), start=1)
    ]
    for process in (killed, *others):
        process.start()
    until = time.monotonic() + 30
    while sum(entry.forecast.horizon_bars >= 1_000 for entry in ledger.entries()) < 10:
        assert time.monotonic() < until
    killed.kill()
    for process in (killed, *others):
        process.join(60)
    assert [process.exitcode for process in (killed, *others)] == [-9, 0, 0]
    ledger.record(told())
    rows, _ = ledger.verify()
    found = [entry.forecast for entry in ledger.entries()]
    assert len({forecast.digest for forecast in found}) == rows
    assert len([forecast for forecast in found if forecast.horizon_bars >= 2_000]) == 40


@SERVER
def test_who_holds_the_head_makes_nobody_wait_for_long(ledger: ForecastLedger) -> None:
    ledger.record(told())
    engine = sql.create_engine(url_of(ledger))
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("SELECT * FROM served_forecasts_head FOR UPDATE")
            begun = time.monotonic()
            with pytest.raises(StorageError, match="lock timeout"):
                ledger.record(told(position=0.1))
            assert time.monotonic() - begun < 5
            # Who reads does not wait at all.
            assert ledger.verify()[0] == 1
        assert ledger.record(told(position=0.1))
    finally:
        engine.dispose()


@SERVER
def test_a_row_may_say_much_and_text_of_any_language(ledger: ForecastLedger) -> None:
    # The name of a folder has up to 255 characters.
    forecast = told(source="csv:" + "ф" * 127 + "x" * 128)
    ledger.record(forecast)
    assert ledger.entries()[0].forecast == forecast
    ledger.verify()


@SERVER
def test_who_may_make_no_tables_is_served_with_those_that_are_there(
    ledger: ForecastLedger, postgres_server: PostgresServer
) -> None:
    ledger.record(told())
    change(
        ledger,
        "CREATE ROLE clerk LOGIN",
        "GRANT USAGE ON SCHEMA public TO clerk",
        "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO clerk",
    )
    try:
        clerk = ForecastLedger(url_of(ledger).replace("//owner", "//clerk"))
        assert clerk.record(told(position=0.1))
        assert clerk.verify()[0] == 2
    finally:
        change(ledger, "DROP OWNED BY clerk", "DROP ROLE clerk")


# ---------------------------------------------------------------- the server ends and comes back


@SERVER
def test_connections_that_a_restart_has_cut_are_replaced(
    ledger: ForecastLedger, postgres_server: PostgresServer
) -> None:
    ledger.record(told())
    postgres_server.stop()
    postgres_server.start()
    assert ledger.verify()[0] == 1
    postgres_server.stop()
    postgres_server.start()
    assert ledger.record(told(position=0.1))
    assert ledger.verify()[0] == 2


@SERVER
def test_while_the_server_is_away_forecasts_wait_and_come_with_it(
    ledger: ForecastLedger,
    outbox: Outbox,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prediction_service, "PAUSE_S", 0.05)
    outbox.keep(told())
    postgres_server.stop()
    try:
        outbox.keep(told(position=0.1))
        assert "1 served forecasts wait in memory" in caplog.text
        with pytest.raises(StorageError, match="the ledger cannot be read"):
            ledger.entries()
    finally:
        postgres_server.start()
    until = time.monotonic() + 20
    while outbox._pending and time.monotonic() < until:
        time.sleep(0.02)
    assert [entry.forecast.position for entry in ledger.entries()] == [0.5, 0.1]
    ledger.verify()


@pytest.fixture
def trainings(tmp_path: Path, database_url: str) -> Iterator[Callable[[str], TrainingService]]:
    made: list[TrainingService] = []

    def make(seconds: str) -> TrainingService:
        service = TrainingService(
            models_dir=tmp_path / "models",
            database_url=database_url,
            command=lambda _params, _events: ["sleep", seconds],
            environment={},
        )
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


@SERVER
def test_a_training_outlives_a_restart_of_the_server(
    trainings: Callable[[str], TrainingService],
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_service, "POLL_S", 0.03)
    monkeypatch.setattr(training_service, "RETRY_S", 0.05)
    service = trainings("1")
    service.open()
    job_id = service.start(TrainingParams(symbol="AAPL")).id
    until = time.monotonic() + 20
    while service._job(job_id).pid is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    postgres_server.stop()
    try:
        with pytest.raises(StorageError, match="the list of trainings cannot be read"):
            service.get(job_id)
        # The trainer ends, and nobody can write it down.
        time.sleep(1.2)
    finally:
        postgres_server.start()
    while (state := service.get(job_id)).status == "running" and time.monotonic() < until:
        time.sleep(0.02)
    assert state.status == "completed"


# ---------------------------------------------------------------- the address


@pytest.mark.usefixtures("engines")
def test_a_password_of_any_characters_opens_and_a_wrong_one_is_shown_nowhere(
    postgres_server: PostgresServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = postgres_server.empty_database()
    good = postgres_server.url(name, "127.0.0.1")
    assert PASSWORD not in good
    for url, code, words in (
        (good, 0, '"status": "ok"'),
        (good.replace("p%40ss", "wr0ngs3cret"), 8, "password authentication failed"),
        (good.replace(f"/{name}", "/nowhere"), 8, 'database "nowhere" does not exist'),
        (good.replace(str(postgres_server.port), "1"), 8, "Connection refused"),
        (good.replace("127.0.0.1", "nowhere.invalid"), 8, "the ledger cannot be read"),
        (good + "?sslmod=off", 8, "invalid connection option"),
        (good.replace("%40", "@"), 2, "has an @ too many"),
    ):
        monkeypatch.setenv("AI_STOCKS_DATABASE_URL", url)
        assert main(["verify", "--json"]) == code, url
        said = "".join(capsys.readouterr())
        assert words in said
        assert "ss:w" not in said
        assert "3cret" not in said
        assert said.count("\n") == 1


def test_a_server_that_says_nothing_is_given_up() -> None:
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://u:secret@127.0.0.1:{silent.getsockname()[1]}/x"
        begun = time.monotonic()
        with pytest.raises(StorageError, match="timeout") as caught:
            ForecastLedger(url).record(told())
        assert time.monotonic() - begun < 5
    assert "secret" not in str(caught.value)
