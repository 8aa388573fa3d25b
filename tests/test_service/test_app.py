"""The composition root: nothing at import, everything at start."""

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import app
from utils.errors import UsageError
from utils.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def collector() -> Iterator[None]:
    """Undo what a start does to the process's garbage collector."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def settings_of(tmp_path: Path, **fields: str) -> Settings:
    return Settings(models_dir=tmp_path / "models", cache_dir=tmp_path / "cache", **fields)


def test_the_import_reads_no_setting_and_loads_nothing() -> None:
    code = (
        "import sys, app;"
        "heavy = {'fastapi', 'pandas', 'xgboost', 'lightgbm', 'sklearn', 'numba'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "AI_STOCKS_SOURCE": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_application_is_wired(tmp_path: Path, collector: None) -> None:
    built = app.create_app(settings_of(tmp_path, source=f"csv:{tmp_path}"))
    with TestClient(built) as client:  # type: ignore[arg-type]
        assert client.get("/api/models").json() == []
        assert client.post("/api/predict", json={"symbol": "AAPL"}).status_code == 404
        assert gc.get_freeze_count() > 0
    assert not (tmp_path / "models").exists()


def test_origins_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: None
) -> None:
    monkeypatch.setenv("PYTHON_API_ALLOW_ORIGINS", "https://a.example, https://b.example")
    built = app.create_app(settings_of(tmp_path, source="sample"))
    with TestClient(built) as client:  # type: ignore[arg-type]
        for origin in ("https://a.example", "https://b.example", "http://localhost:3000"):
            headers = client.get("/api/health", headers={"Origin": origin}).headers
            assert headers["access-control-allow-origin"] == origin


def test_the_lazy_application_is_built_once() -> None:
    built: list[str] = []

    def build() -> app.Application:
        built.append("built")

        async def inner(scope: app.Message, receive: app.Receive, send: app.Send) -> None:
            await send({"type": scope["type"]})

        return inner

    lazy = app.LazyApplication(build)
    assert built == []
    sent: list[app.Message] = []

    async def send(message: app.Message) -> None:
        sent.append(message)

    async def receive() -> app.Message:
        raise AssertionError("not asked")

    for kind in ("lifespan", "http"):
        asyncio.run(lazy({"type": kind}, receive, send))
    assert built == ["built"]
    assert [message["type"] for message in sent] == ["lifespan", "http"]


def test_defaults_of_the_command_line() -> None:
    args = app.build_parser().parse_args([])
    assert (args.host, args.port, args.source) == ("127.0.0.1", 8000, None)


@pytest.mark.parametrize(
    "argv",
    [
        ["--source", "nonsense"],
        ["--host", "no.such.host.invalid", "--source", "sample"],
        ["--port", "70000", "--source", "sample"],
    ],
)
def test_usage_errors_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(argv) == UsageError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip()


@pytest.mark.parametrize("command", [["app.py", "--port"], ["-m", "uvicorn", "app:app", "--port"]])
def test_a_real_server_starts_answers_and_ends_on_sigterm(tmp_path: Path, command: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "AI_STOCKS_SOURCE": "sample",
        "AI_STOCKS_MODELS_DIR": str(tmp_path / "models"),
        "AI_STOCKS_CACHE_DIR": str(tmp_path / "cache"),
    }
    server = subprocess.Popen(
        [sys.executable, *command, str(port)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        answer = _ask(server, port, deadline=time.monotonic() + 60)
        assert answer.startswith("HTTP/1.1 404")
        assert "python -m training.train_gbm AAPL" in answer
    finally:
        server.terminate()
        out, err = server.communicate(timeout=30)
    assert "Traceback" not in err
    if command[0] == "app.py":
        assert server.returncode == 0, err
        assert out == "", "logs belong to stderr"


def test_a_taken_port_is_a_usage_error(tmp_path: Path) -> None:
    with (
        app.listen("127.0.0.1", 0) as taken,
        pytest.raises(UsageError, match="choose another --host or --port"),
    ):
        app.listen("127.0.0.1", taken.getsockname()[1])


def _ask(server: subprocess.Popen[str], port: int, *, deadline: float) -> str:
    body = b'{"symbol": "AAPL"}'
    request = (
        b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(request)
                return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
        except ConnectionRefusedError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.1)
