"""The composition root: nothing at import, everything at start."""

import asyncio
import contextlib
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import app
from service.edge import Application, Message, Receive, Send, client_of
from utils.base import Settings, UsageError

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


def test_prices_are_served_where_they_cannot_be_kept(
    tmp_path: Path, collector: None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    with TestClient(app.create_app(settings_of(tmp_path, source="sample"))) as client:  # type: ignore[arg-type]
        assert len(client.get("/api/historical/AAPL?days=3").json()["data"]) == 3
    assert "cannot be written" in caplog.text


def test_the_lazy_application_is_built_once() -> None:
    built: list[str] = []

    def build() -> Application:
        built.append("built")

        async def inner(scope: Message, receive: Receive, send: Send) -> None:
            await send({"type": scope["type"]})

        return inner

    lazy = app.LazyApplication(build)
    assert built == []
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("not asked")

    for kind in ("lifespan", "http"):
        asyncio.run(lazy({"type": kind}, receive, send))
    assert built == ["built"]
    assert [message["type"] for message in sent] == ["lifespan", "http"]


def test_defaults_of_the_command_line() -> None:
    args = app.build_parser().parse_args([])
    assert (args.host, args.port, args.workers) == ("127.0.0.1", 8000, 1)
    assert (args.source, args.models_dir) == (None, None)


@pytest.mark.parametrize(
    "argv",
    [
        ["--source", "nonsense"],
        ["--host", "no.such.host.invalid", "--source", "sample"],
        ["--port", "70000", "--source", "sample"],
        ["--workers", "0", "--source", "sample"],
        ["--workers", "2", "--source", "nonsense"],
    ],
)
def test_usage_errors_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(argv) == UsageError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip()


def ask(port: int, path: str, body: bytes = b"") -> bytes:
    """Return a whole answer over a connection of its own."""
    method = b"POST" if body else b"GET"
    request = (
        b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    ) % (method, path.encode(), len(body), body)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def status_of(answer: bytes) -> int:
    """Return the status of a whole answer, 0 of one that was cut off."""
    head, _, body = answer.partition(b"\r\n\r\n")
    sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    if not sizes or int(sizes[0].partition(b":")[2]) != len(body):
        return 0
    return int(head.split()[1])


Start = Callable[..., tuple[subprocess.Popen[str], int]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a server on a free port."""
    running: list[subprocess.Popen[str]] = []

    def started(*command: str, **changes: str) -> tuple[subprocess.Popen[str], int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "AI_STOCKS_SOURCE": "sample",
            "AI_STOCKS_MODELS_DIR": str(tmp_path / "models"),
            "AI_STOCKS_CACHE_DIR": str(tmp_path / "cache"),
            "AI_STOCKS_DRAIN_S": "0.5",
            **{f"AI_STOCKS_{name}": value for name, value in changes.items()},
        }
        server = subprocess.Popen(
            [sys.executable, *(command or ("app.py",)), "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(server)
        return server, port

    yield started
    for server in running:
        if server.poll() is None:
            server.kill()
        server.communicate()


def wait_until_ready(server: subprocess.Popen[str], port: int) -> None:
    until = time.monotonic() + 60
    while True:
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < until, "the server does not start"
        with contextlib.suppress(OSError):
            if status_of(ask(port, "/api/health/ready")) == 200:
                return
        time.sleep(0.05)


@pytest.mark.parametrize("command", [["app.py"], ["-m", "uvicorn", "app:app"], ["app.py", "--workers", "2"]])
def test_a_real_server_starts_answers_and_ends_on_sigterm(start: Start, command: list[str]) -> None:
    server, port = start(*command)
    wait_until_ready(server, port)
    answer = ask(port, "/api/predict", b'{"symbol": "AAPL"}')
    assert status_of(answer) == 404
    assert b"python -m training.train_gbm AAPL" in answer
    server.terminate()
    out, err = server.communicate(timeout=30)
    assert "Traceback" not in err
    if command[0] == "app.py":
        assert server.returncode == 0, err
        assert out == "", "logs belong to stderr"


def test_several_workers_say_what_one_says_about_a_setting(start: Start) -> None:
    server, _ = start("app.py", "--workers", "2", DATABASE_URL="bogus://x")
    _, err = server.communicate(timeout=60)
    assert server.returncode == UsageError.exit_code, err
    assert "Traceback" not in err


def test_workers_end_with_the_parent_that_was_killed(start: Start) -> None:
    server, port = start("app.py", "--workers", "2")
    wait_until_ready(server, port)
    server.kill()
    # The pipes are closed by the last who writes to them: nobody is left.
    server.communicate(timeout=30)
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/api/health")


def test_fault_28_sigterm_under_load_loses_no_request(start: Start) -> None:
    server, port = start(RATE_PER_S="0", LOG_LEVEL="WARNING")
    wait_until_ready(server, port)
    outcomes: Counter[object] = Counter()
    ended = threading.Event()

    def keep_asking() -> None:
        while not ended.is_set():
            try:
                outcomes[status_of(ask(port, "/api/historical/AAPL?days=3000"))] += 1
            except ConnectionRefusedError:
                # Nobody listens any more, and says so: the request was never taken.
                return
            except OSError as error:
                outcomes[repr(error)] += 1

    callers = [threading.Thread(target=keep_asking) for _ in range(60)]
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    server.terminate()
    ready = status_of(ask(port, "/api/health/ready"))
    code = server.wait(30)
    ended.set()
    for caller in callers:
        caller.join()
    assert code == 0
    assert ready == 503
    assert set(outcomes) == {200}, outcomes
    assert outcomes[200] >= 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_start_is_done_says_so(start: Start, number: int, code: int) -> None:
    # Tests that were started in the background ignore Ctrl-C, and their children would with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server, port = start()
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 30
    # The socket listens before the models' libraries are loaded.
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.005)
    server.send_signal(number)
    _, err = server.communicate(timeout=30)
    assert server.returncode == code, err
    assert "Traceback" not in err


def test_ctrl_c_ends_a_running_server_in_order(start: Start) -> None:
    server, port = start()
    wait_until_ready(server, port)
    server.send_signal(signal.SIGINT)
    _, err = server.communicate(timeout=30)
    assert server.returncode == 0, err
    assert "Traceback" not in err


def test_logs_are_json_where_wanted(start: Start) -> None:
    server, port = start(LOG_FORMAT="json")
    wait_until_ready(server, port)
    ask(port, "/api/historical/%0Aforged")
    server.terminate()
    _, err = server.communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines()]
    (line,) = [line for line in lines if line.get("route") == "/api/historical/{symbol}"]
    assert (line["status"], line["level"], line["logger"]) == (422, "INFO", "service.edge")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux filters what arrives at a socket")
def test_who_is_in_the_queue_is_let_in_and_nobody_else() -> None:
    with app.listen("127.0.0.1", 0) as listening:
        address = listening.getsockname()
        with socket.create_connection(address, timeout=1) as early:
            app.refuse_new_connections(listening)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            accepted, _ = listening.accept()
            with accepted:
                early.sendall(b"x")
                assert accepted.recv(1) == b"x"


def test_a_second_signal_does_not_wait() -> None:
    ends: list[str] = []
    drain = app.Drain(60.0, None)
    drain._end = lambda: ends.append("ended")
    drain.on_signal(signal.SIGTERM, None)
    assert (drain.should_exit, ends) == (True, [])
    drain.on_signal(signal.SIGTERM, None)
    assert ends == ["ended"]


def test_a_taken_port_is_a_usage_error(tmp_path: Path) -> None:
    with (
        app.listen("127.0.0.1", 0) as taken,
        pytest.raises(UsageError, match="choose another --host or --port"),
    ):
        app.listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("trusted", "caller", "known_as"),
    [
        ("", "127.0.0.1", "127.0.0.1"),
        ("10.0.0.0/8", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1, 10.0.0.0/8", "127.0.0.1", "192.0.2.7"),
        ("127.0.0.1, 10.0.0.0/8", "10.2.3.4", "192.0.2.7"),
        ("::1", "::1", "192.0.2.7"),
    ],
)
def test_nobody_says_who_else_calls_but_a_trusted_proxy(
    tmp_path: Path, trusted: str, caller: str, known_as: str
) -> None:
    seen: list[str] = []

    async def answering(scope: Message, receive: Receive, send: Send) -> None:
        seen.append(client_of(scope))

    async def nothing(*_: object) -> Message:
        return {}

    config = app._config(answering, settings_of(tmp_path, trusted_proxies=trusted), 1)
    config.load()
    # The last that is not trusted counts: what comes before it anybody may have written.
    forwarded = [(b"x-forwarded-for", b"203.0.113.9, 192.0.2.7")]
    scope = {"type": "http", "client": (caller, 1), "headers": forwarded}
    asyncio.run(config.loaded_app(scope, nothing, nothing))
    assert seen == [known_as]


# ---------------------------------------------------------------- bounded connections

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Return the address of a server as it is configured, over an application that reads and answers."""

    async def answering(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        size, more = 0, scope["path"] != "/unread"
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        body = b"%d" % size if scope["path"] != "/large" else b"a" * (64 << 20)
        if scope["path"] == "/headers":
            body = b" ".join(name for name, _ in scope["headers"])
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})

    # What an earlier test set up writes to a stream that is closed by now.
    app.configure_logging("WARNING")
    with app.listen("127.0.0.1", 0) as listening:
        server = app.uvicorn.Server(app._config(answering, settings_of(tmp_path), 1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()
        server.should_exit = server.force_exit = True
        thread.join()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def problem_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    problem = json.loads(body)
    assert problem["request_id"].encode() in head
    assert status_of(answer) == problem["status"]
    return problem["status"], problem["detail"]


@pytest.mark.parametrize(
    "endless",
    [REQUEST + b"X-A: b\r\n" * (1 << 18), REQUEST + b"X: " + b"a" * (2 << 20), b"GET /" + b"a" * (2 << 20)],
    ids=["lines", "value", "path"],
)
def test_endless_headers_are_431(bounded: tuple[str, int], endless: bytes) -> None:
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(endless)
        status, detail = problem_of(read_all(connection))
    assert status == 431
    assert "65536 bytes" in detail


def test_headers_and_bodies_of_a_usual_size_pass(bounded: tuple[str, int]) -> None:
    large = REQUEST + b"X: " + b"a" * 40_000 + b"\r\n\r\n"
    body = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n"
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(large + large + body + b"b" * 3_000_000)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.endswith(b"3000000")


def test_endless_trailers_end(bounded: tuple[str, int]) -> None:
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(chunked + b"X: " + b"a" * (2 << 20))
        assert problem_of(read_all(connection))[0] == 431


def test_what_follows_a_body_is_no_header(bounded: tuple[str, int]) -> None:
    head = b"POST /headers HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(head + b"1\r\na\r\n0\r\nX-Request-ID: late\r\n\r\n")
        assert read_all(connection).endswith(b"\r\n\r\nhost connection transfer-encoding")


def test_headers_have_their_time_from_their_first_byte_on(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEAD_S", 1.5)
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(REQUEST + b"\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        time.sleep(1.0)
        connection.sendall(REQUEST[:8])
        time.sleep(1.0)
        connection.sendall(REQUEST[8:] + b"\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_is_a_problem(bounded: tuple[str, int]) -> None:
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert problem_of(read_all(connection)) == (400, "this is not valid HTTP/1.1")


@pytest.mark.parametrize(
    ("first", "drip"),
    [(b"", b""), (b"", b"\n"), (REQUEST, b"X"), (REQUEST + b"\r\n", b"G"), (REQUEST + b"\r\n", b"\n")],
    ids=["silent", "empty lines", "half open", "kept alive", "kept alive, empty lines"],
)
def test_half_open_headers_are_closed_in_time(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch, first: bytes, drip: bytes
) -> None:
    monkeypatch.setattr(app, "HEAD_S", 0.5)
    began = time.monotonic()
    with socket.create_connection(bounded, timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(first)
        if first.endswith(b"\r\n\r\n"):
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            connection.sendall(drip)
            # The rest of a method, and then of a path that never ends.
            drip = drip.replace(b"G", b"ET /" + b"a" * 100)
        connection.settimeout(0.02)
        for number in range(200):
            with contextlib.suppress(TimeoutError):
                assert connection.recv(65_536) == b""
                break
            # One byte at a time keeps no connection open.
            connection.sendall(drip[number % max(len(drip), 1) :][:1])
    assert 0.3 < time.monotonic() - began < 2.0


def test_a_slow_answer_outlives_the_time_of_headers(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEAD_S", 0.3)
    with socket.create_connection(bounded, timeout=10) as connection:
        # The beginning of another request is there already.
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\nGET")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        assert read_all(connection) == b""


def test_silent_connections_lock_nobody_out(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "most_connections", lambda: 5)
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(socket.create_connection(bounded, timeout=10)) for _ in range(20)]
        for connection in silent:
            with contextlib.suppress(OSError):
                connection.sendall(REQUEST)
        assert status_of(ask(bounded[1], "/api/health")) == 200
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""


BODY = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"


@pytest.mark.parametrize(
    "waiting", [BODY % b"/", BODY % b"/unread", b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["slow body", "refused body", "unread answer"],
)  # fmt: skip
def test_callers_that_let_us_wait_lock_nobody_out(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch, waiting: bytes
) -> None:
    monkeypatch.setattr(app, "most_connections", lambda: 5)
    with contextlib.ExitStack() as held:
        for _ in range(10):
            connection = held.enter_context(socket.create_connection(bounded, timeout=10))
            connection.sendall(waiting)
            time.sleep(0.02)
        for _ in range(3):
            assert status_of(ask(bounded[1], "/api/health")) == 200


def test_the_rest_of_a_body_that_was_answered_comes_in_time(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEAD_S", 0.5)
    with socket.create_connection(bounded, timeout=0.05) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(BODY % b"/unread")
        time.sleep(0.1)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        for _ in range(40):
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1) == b""
                return
        pytest.fail("one byte at a time keeps the connection open")


@pytest.mark.parametrize("path", [b"/large", b"/"])
def test_answers_that_nobody_reads_end_in_time(
    bounded: tuple[str, int], monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    monkeypatch.setattr(app, "WRITE_S", 0.3)
    with socket.create_connection(bounded, timeout=10) as connection:
        connection.sendall(b"GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path)
        time.sleep(1.0)
        if path == b"/":
            assert status_of(read_all(connection)) == 200
        else:
            with contextlib.suppress(ConnectionResetError):
                assert len(read_all(connection)) < 64 << 20


def test_connections_leave_files_for_the_rest() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < app.most_connections() <= 30_000
    if files > 0:
        assert app.most_connections() < files


def test_another_server_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "build", lambda _settings: "built")
    assert app.build_for_another_server() == "built"
    assert "headers are bounded neither in size" in caplog.text
    assert "python app.py" in caplog.text
