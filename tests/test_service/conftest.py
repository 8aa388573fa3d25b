"""A service over a fake forecaster and fake prices, so that these tests train nothing."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sql
from fastapi import FastAPI
from fastapi.testclient import TestClient

from data.data_fetcher import fetch_stock_data
from inference.load_gbm_models import SCHEMA_VERSION, GBMBundle
from service.api import Services, create_api
from service.ledger import ForecastLedger, track_record
from service.model_registry import ModelRegistry, Place, ServedModel
from service.prediction_chart import model_meta
from service.prediction_service import Outbox, PredictionService
from service.training_service import TrainingService
from utils import base
from utils.base import ModelMissingError, UnknownSymbolError

HORIZON = 5
FIRST_FORECAST = 120


def metadata_of(symbol: str = "AAPL", version: str = "v1", **changes: object) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model_id": f"{symbol}-gbm",
        "model_version": version,
        "symbol": symbol,
        "created_at": "2026-11-20T10:00:00+00:00",
        "horizon_bars": HORIZON,
        "source": "fake",
        "data_hash": "0" * 64,
        "trained_through": "2007-01-05",
        "out_of_sample_from": "2005-06-24",
        "feature_set_hash": "abc123",
        "verdict": {
            "label": "no-edge",
            "reasons": ["the IC may be luck"],
            "evidence": {"ic": 0.01, "p": None},
        },
        "metrics": {
            "cumulativeReturn": 0.1,
            "sharpeRatio": 0.4,
            "maxDrawdown": -0.2,
            "winRate": 0.5,
            "averageTradeProfit": 3.0,
            "totalTrades": 12,
            "directionalAccuracy": 0.51,
            "correlation": 0.02,
        },
        **changes,
    }


@dataclass(frozen=True)
class FakeForecaster:
    """Forecasts by the mean return of the last 20 bars; causal, and NaN at first."""

    horizon_bars: int = HORIZON
    gaps: tuple[int, ...] = ()

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        log_return = np.log(bars["Close"]).diff()
        mean = log_return.rolling(20).mean() * self.horizon_bars
        sigma = log_return.rolling(20).std() * np.sqrt(self.horizon_bars)
        frame = pd.DataFrame({"expected_log": mean, "sigma_log": sigma, "baseline_log": 0.001})
        frame.iloc[:FIRST_FORECAST] = np.nan
        frame.iloc[list(self.gaps)] = np.nan
        frame["lower_z"], frame["upper_z"] = -1.28, 1.28
        frame["expected_return"] = np.expm1(frame["expected_log"])
        frame["baseline_return"] = np.expm1(frame["baseline_log"])
        frame["sigma"] = frame["sigma_log"]
        frame["lower"] = np.expm1(frame["expected_log"] - 1.28 * frame["sigma_log"])
        frame["upper"] = np.expm1(frame["expected_log"] + 1.28 * frame["sigma_log"])
        known = frame["expected_log"].notna()
        frame["prob_up"] = (0.5 + 4 * frame["expected_log"]).clip(0.05, 0.95).where(known)
        frame["prob_gain"], frame["prob_loss"] = frame["prob_up"] - 0.04, 0.97 - frame["prob_up"]
        frame["p_win"], frame["payoff_ratio"], frame["skill_lower"] = 0.55, 1.1, 0.5
        frame["is_out_of_sample"], frame["is_of_other_prices"] = known, False
        return frame


def bundle_of(symbol: str = "AAPL", version: str = "v1", **changes: object) -> GBMBundle:
    record = pd.DataFrame({"predicted_log": [0.01, -0.01, 0.02], "realised_log": [0.02, -0.04, np.nan]})
    return GBMBundle(
        symbol=symbol,
        horizon_bars=HORIZON,
        ensemble=None,  # type: ignore[arg-type]
        record=record,
        metadata=metadata_of(symbol, version, **changes),
        importance={},
        hyperparameters={},
    )


def served(
    symbol: str = "AAPL", *, forecaster: FakeForecaster | None = None, **changes: object
) -> ServedModel:
    bundle = bundle_of(symbol, **changes)
    return ServedModel(
        meta=model_meta(bundle.metadata, ensemble_size=2),
        bundle=bundle,
        forecaster=forecaster or FakeForecaster(),
        place=Place(Path("v1"), 0),
        warnings=(),
    )


class FakeRegistry(ModelRegistry):
    def __init__(self, *models: ServedModel) -> None:
        super().__init__(Path("no-such-folder"))
        self.models = {model.meta.symbol: model for model in models}

    def list(self) -> tuple[Any, ...]:
        return tuple(model.meta for model in self.models.values())

    def current(self, symbol: str, kind: str = "gbm") -> ServedModel | None:
        return self.models.get(symbol)

    def get(self, symbol: str, kind: str = "gbm") -> ServedModel:
        if kind == "lstm":
            raise ModelMissingError(f"no LSTM model for {symbol}")
        if symbol not in self.models:
            raise ModelMissingError(f"no model for {symbol}: run `python -m training.train_gbm {symbol}`")
        return self.models[symbol]


@dataclass
class FakeSource:
    """Prices by symbol in Yahoo's columns; an exception in their place is raised."""

    answers: dict[str, Any]
    name: str = "fake"
    is_live: bool = False
    news: None = None
    asked: list[str] = field(default_factory=list)

    def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
        self.asked.append(symbol)
        if symbol not in self.answers:
            raise UnknownSymbolError(f"fake does not know {symbol}")
        answer = self.answers[symbol]
        if isinstance(answer, BaseException):
            raise answer
        return answer.assign(**{"Adj Close": answer["Close"]})


@pytest.fixture(scope="session")
def bars(make_bars: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return make_bars(n=500, seed=3, start="2005-01-03")


@pytest.fixture
def source(bars: pd.DataFrame) -> FakeSource:
    return FakeSource({"AAPL": bars, "MSFT": bars})


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry(served("AAPL"))


PASSWORD = "p@ss:w/rd"  # noqa: S105


@dataclass
class PostgresServer:
    """A server of its own: over its socket everybody is let in, over TCP who knows the password."""

    folder: Path
    user: str | None
    port: int
    process: subprocess.Popen[bytes] | None = None

    def run(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        folders = [os.environ.get("PATH", os.defpath), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
        path = shutil.which(command, path=os.pathsep.join(folders))
        if path is None:
            pytest.skip(f"PostgreSQL is not installed: there is no {command}")
        log = (self.folder / "log").open("ab")
        with log:
            return subprocess.Popen(
                [path, "-D", str(self.folder / "data"), *arguments],
                cwd=self.folder,
                user=self.user,
                extra_groups=None if self.user is None else [],
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        where = (
            f"-cport={self.port}",
            f"-cunix_socket_directories={self.folder}",
            "-clisten_addresses=127.0.0.1",
        )
        self.process = self.run("postgres", "-F", *where)
        until = time.monotonic() + 30
        while True:
            try:
                self.execute("SELECT 1", "postgres")
            except sql.exc.OperationalError:
                assert time.monotonic() < until, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it; by default connections are closed."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def url(self, name: str, host: str | None = None) -> str:
        if host is None:
            return f"postgresql://owner@/{name}?host={self.folder}&port={self.port}"
        password = sql.URL.create("x", "owner", PASSWORD, host, self.port, name)
        return password.set(drivername="postgresql").render_as_string(hide_password=False)

    def execute(self, statement: str, name: str) -> list[Any]:
        engine = sql.create_engine(self.url(name).replace(":", "+psycopg:", 1), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                found = connection.exec_driver_sql(statement)
                return list(found) if found.returns_rows else []
        finally:
            engine.dispose()

    def empty_database(self) -> str:
        """Return the name of the one database, without tables: each more is a thousand files."""
        others = "FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
        self.execute(f"SELECT pg_terminate_backend(pid) {others}", "postgres")
        for statement in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
            self.execute(statement, "postgres")
        return "postgres"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("the driver of PostgreSQL is not installed: pip install '.[postgres]'")
    # PostgreSQL refuses to run as root, and who is not root sees nothing of pytest's own folders.
    user = None
    if os.getuid() == 0:
        names = [line.partition(":")[0] for line in Path("/etc/passwd").read_text().splitlines()]
        user = next((name for name in ("postgres", "nobody") if name in names), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    # A socket's path is short, too.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            shutil.chown(folder, user)
            shutil.chown(folder / "password", user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            server = PostgresServer(folder, user, free.getsockname()[1])
        who = (
            "-U",
            "owner",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            f"--pwfile={folder / 'password'}",
        )
        made = server.run("initdb", *who, "--no-sync", "--no-locale", "-E", "UTF8")
        assert made.wait(60) == 0, (folder / "log").read_text()
        server.start()
        try:
            yield server
        finally:
            # Nothing of it is needed any more.
            server.stop(signal.SIGQUIT)


BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[sql.Engine]]:
    """All engines that are made; they are closed at the end: the driver warns of connections left open."""
    made: list[sql.Engine] = []
    make = base.database_engine

    def remember(url: str, wait_s: float) -> sql.Engine:
        made.append(make(url, wait_s))
        return made[-1]

    monkeypatch.setattr(base, "database_engine", remember)
    yield made
    for engine in made:
        engine.dispose()


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of a database that is not there, or of an empty one on a server (see `BOTH`)."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'db' / 'ai_stocks.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    request.getfixturevalue("engines")
    return server.url(server.empty_database())


@pytest.fixture
def ledger(database_url: str) -> ForecastLedger:
    return ForecastLedger(database_url)


@pytest.fixture
def outbox(ledger: ForecastLedger) -> Iterator[Outbox]:
    box = Outbox(ledger.record)
    yield box
    box.close()


@pytest.fixture
def predictions(registry: FakeRegistry, source: FakeSource, outbox: Outbox) -> PredictionService:
    return PredictionService(registry=registry, source=source, cache=None, on_served=outbox.keep)


@pytest.fixture
def starts() -> list[str]:
    return []


@pytest.fixture
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingService:
    """A service of trainings that has nothing to run."""
    folder = tmp_path_factory.mktemp("no-trainings") / "models"
    return TrainingService(
        models_dir=folder,
        database_url=f"sqlite:///{folder / 'jobs.sqlite'}",
        command=lambda params, events: ["false"],
        environment={},
    )


@pytest.fixture
def services(
    registry: FakeRegistry,
    predictions: PredictionService,
    source: FakeSource,
    ledger: ForecastLedger,
    outbox: Outbox,
    training: TrainingService,
    starts: list[str],
) -> Services:
    return Services(
        registry=registry,
        predictions=predictions,
        training=training,
        track_record=partial(track_record, ledger, partial(fetch_stock_data, source=source)),
        source_name="fake",
        origins=("http://localhost:3000", "http://127.0.0.1:3000"),
        on_start=lambda: starts.append("started"),
        on_stop=outbox.close,
    )


@pytest.fixture
def api(services: Services) -> FastAPI:
    return create_api(services)


@pytest.fixture
def client(api: FastAPI) -> Iterator[TestClient]:
    with TestClient(api) as running:
        yield running


@pytest.fixture
def save_version(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of versions that hold metadata and a manifest, and no model."""

    def save(symbol: str = "AAPL", version: str = "v1", **changes: object) -> Path:
        folder = tmp_path / "models" / symbol / "versions" / version
        folder.mkdir(parents=True)
        document = json.dumps(metadata_of(symbol, version, **changes)).encode()
        (folder / "training_metadata.json").write_bytes(document)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "model_version": version,
            "files": {"training_metadata.json": hashlib.sha256(document).hexdigest()},
            "libraries": {},
            "data_hash": "0" * 64,
            "golden_inputs": [],
            "golden_outputs": [],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        link = folder.parents[1] / "gbm"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("versions") / version)
        return folder

    return save
