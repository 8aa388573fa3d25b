"""What stands between the network and the routes: limits, keys, headers, logs, figures."""

import asyncio
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service import edge
from service.api import Services, create_api
from service.edge import (
    Application,
    EdgeRules,
    Guard,
    Message,
    Metrics,
    Observer,
    RateLimit,
    Receive,
    Scope,
    Send,
    Shortcut,
    WorkPool,
    client_of,
)
from tests.test_service.conftest import FakeSource
from tests.test_service.test_api import check_problem
from utils.base import DeadlineError, JsonFormatter, OverloadError, StorageError

KEY, OTHER_KEY = "a-key-of-sixteen-or-more", "another-key-of-sixteen"
Build = Callable[..., TestClient]


@pytest.fixture
def build(services: Services) -> Iterator[Build]:
    """Return a maker of clients of a service with rules of its own."""
    clients = []

    def make(*, rules: EdgeRules | None = None, **changes: object) -> TestClient:
        client = TestClient(create_api(replace(services, rules=rules or EdgeRules(), **changes)))  # type: ignore[arg-type]
        clients.append(client)
        return client.__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


# ---------------------------------------------------------------- rate


def test_fault_07_too_many_requests_are_429_with_retry_after(build: Build) -> None:
    client = build(rules=EdgeRules(rate_per_s=0.02, rate_burst=3))
    assert [client.get("/api/models").status_code for _ in range(4)] == [200, 200, 200, 429]
    response = client.get("/api/models", headers={"Origin": "http://localhost:3000"})
    check_problem(response, 429)
    assert 30 <= int(response.headers["retry-after"]) <= 50
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    # Whoever watches the service is always answered.
    assert client.get("/api/health").status_code == 200


def test_a_rate_of_zero_sets_no_limit(build: Build) -> None:
    client = build(rules=EdgeRules(rate_per_s=0.0, rate_burst=1))
    assert {client.get("/api/models").status_code for _ in range(20)} == {200}


@given(
    gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60),
    per_s=st.sampled_from([0.5, 1.0, 4.0]),
    burst=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_limit_is_a_token_bucket(gaps: list[float], per_s: float, burst: int) -> None:
    now, tokens = 0.0, float(burst)
    limit = RateLimit(per_s, burst, clock=lambda: now)
    for gap in gaps:
        now += gap
        tokens = min(burst, tokens + gap * per_s)
        if abs(tokens - 1.0) < 1e-6:
            # Rounding decides; both are right, and the oracle follows.
            tokens = tokens - 1.0 if limit.wait_s("a") == 0.0 else tokens
            continue
        wait_s = limit.wait_s("a")
        assert (wait_s == 0.0) == (tokens > 1.0)
        if wait_s:
            assert wait_s == pytest.approx((1.0 - tokens) / per_s, abs=1e-6)
        else:
            tokens -= 1.0


def test_clients_do_not_share_their_limit() -> None:
    limit = RateLimit(1.0, 1, clock=lambda: 0.0)
    assert limit.wait_s("a") == 0.0
    assert limit.wait_s("a") > 0.0
    assert limit.wait_s("b") == 0.0


def test_many_clients_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MAX_CLIENTS", 50)
    limit = RateLimit(1.0, 1, clock=lambda: 0.0)
    for number in range(500):
        limit.wait_s(str(number))
    assert len(limit._full_at) == 50
    assert limit.wait_s("499") > 0.0, "the newest are remembered"


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:0db8:0000:0000"),
        ("2001:db8::2", "2001:0db8:0000:0000"),
        ("fe80::1%eth0", "fe80:0000:0000:0000"),
        ("::ffff:7.7.7.1", "7.7.7.1"),
        ("::ffff:7.7.7.2", "7.7.7.2"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_a_network_of_version_6_is_one_client(host: str, client: str) -> None:
    assert client_of({"client": (host, 1)}) == client
    assert client_of({"client": None}) == ""


# ---------------------------------------------------------------- computing


def test_fault_07_overload_is_503_and_the_deadline_504(build: Build, source: FakeSource) -> None:
    release, client = threading.Event(), build(rules=EdgeRules(work_threads=1, work_queue=1, deadline_s=0.3))
    plain = source.fetch

    def slow(symbol: str, *, start: object = None) -> pd.DataFrame:
        assert release.wait(20)
        return plain(symbol)

    source.fetch = slow  # type: ignore[method-assign]
    try:
        check_problem(client.post("/api/predict", json={"symbol": "AAPL"}), 504)
        # The thread that is late keeps its place; one more may wait, the next is told to come back.
        waiting = threading.Thread(target=client.get, args=("/api/historical/AAPL",))
        waiting.start()
        until = time.monotonic() + 5
        while "ai_stocks_work_pending 2.0" not in client.get("/metrics").text:
            assert time.monotonic() < until
        refused = client.get("/api/historical/AAPL")
        check_problem(refused, 503)
        assert refused.headers["retry-after"] == "2"
        assert client.get("/api/health").status_code == 200
        waiting.join()
    finally:
        release.set()
    until = time.monotonic() + 5
    while "ai_stocks_work_pending 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < until
    assert client.get("/api/historical/AAPL").status_code == 200


def test_work_that_has_not_begun_at_the_deadline_is_dropped() -> None:
    release, ran = threading.Event(), []

    async def story() -> None:
        pool = WorkPool(threads=1, queue=1, deadline_s=0.05)
        first = asyncio.create_task(pool.run(lambda: release.wait(10)))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            await pool.run(lambda: ran.append("second"))
        with pytest.raises(DeadlineError):
            await first
        assert pool.pending == 1
        release.set()
        while pool.pending:
            await asyncio.sleep(0.01)
        assert await pool.run(lambda: 7) == 7
        pool.close()

    asyncio.run(story())
    assert ran == []


def test_never_more_than_the_threads_compute() -> None:
    busy, most, guard = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal busy, most
        with guard:
            busy += 1
            most = max(most, busy)
        time.sleep(0.05)
        with guard:
            busy -= 1

    async def story() -> list[object]:
        pool = WorkPool(threads=3, queue=5, deadline_s=5.0)
        done = await asyncio.gather(*(pool.run(work) for _ in range(12)), return_exceptions=True)
        pool.close()
        return list(done)

    done = asyncio.run(story())
    assert most == 3
    assert sum(isinstance(one, OverloadError) for one in done) == 4


def test_an_error_of_the_work_arrives() -> None:
    async def story() -> None:
        pool = WorkPool(threads=1, queue=0, deadline_s=5.0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await pool.run(lambda: 1 // 0)
        pool.close()

    asyncio.run(story())


# ---------------------------------------------------------------- keys


WRITES = [("DELETE", "/api/models/AAPL-gbm"), ("POST", "/api/training/start"), ("DELETE", "/api/training/x")]


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_fault_06_writing_needs_a_key_where_one_is_configured(
    build: Build, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    client = build(rules=EdgeRules(api_keys=(OTHER_KEY, KEY)))
    with caplog.at_level(logging.DEBUG):
        without = client.request(method, path)
        check_problem(without, 401)
        assert without.headers["www-authenticate"] == "Bearer"
        for wrong in ("wrong", KEY[:-1], KEY + "x", "é"):
            headers = {"X-API-Key": wrong.encode()}
            check_problem(client.request(method, path, headers=headers), 403)
        check_problem(client.request(method, path, headers={"Authorization": f"Bearer {KEY[1:]}"}), 403)
        check_problem(client.request(method, path, headers={"Authorization": f"Basic {KEY}"}), 401)
        for right in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {OTHER_KEY}"}):
            assert client.request(method, path, headers=right).status_code not in {401, 403}
    assert KEY[:8] not in caplog.text


def test_fault_06_reading_needs_no_key(build: Build) -> None:
    client = build(rules=EdgeRules(api_keys=(KEY,)))
    assert client.get("/api/models").status_code == 200
    assert client.post("/api/predict", json={"symbol": "AAPL"}).status_code == 200
    assert client.post("/api/backtest", json={}).status_code not in {401, 403}


def test_without_configured_keys_everybody_writes(build: Build) -> None:
    assert build().delete("/api/models/nothing").status_code not in {401, 403}


# ---------------------------------------------------------------- bodies


def call(app: Application, chunks: list[bytes | float], **scope: object) -> list[dict[str, Any]]:
    """Return what an application sends to a request whose body comes in chunks; a number is a pause."""
    sent: list[dict[str, Any]] = []
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        while left and isinstance(left[0], float):
            await asyncio.sleep(left.pop(0))  # type: ignore[arg-type]
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asked = {"type": "http", "method": "POST", "path": "/api/predict", "headers": [], "client": ("a", 1)}
    asyncio.run(app({**asked, **scope}, receive, send))
    return sent


def guard_of(app: Application, **rules: float) -> Guard:
    bounds = EdgeRules(**rules)  # type: ignore[arg-type]
    return Guard(app, bounds, RateLimit(bounds.rate_per_s, bounds.rate_burst))


async def reads_all(scope: Scope, receive: Receive, send: Send) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("the body was cut off")
        size, more = size + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size})


def detail_of(sent: list[dict[str, Any]]) -> str:
    return json.loads(b"".join(message.get("body", b"") for message in sent))["detail"]


@pytest.mark.parametrize(
    ("path", "most"),
    [("/api/predict", 1 << 20), ("/api/backtest", 16 << 20), ("/api/forward_sim", 16 << 20)],
)
def test_fault_02_bodies_are_bounded_by_route(path: str, most: int) -> None:
    guard = guard_of(reads_all)
    chunk = b"x" * (1 << 18)
    fitting = [chunk] * (most // len(chunk))
    assert call(guard, [*fitting], path=path)[0]["status"] == 200
    refused = call(guard, [*fitting, b"x"], path=path)
    assert refused[0]["status"] == 413
    assert str(most) in detail_of(refused)
    assert (b"connection", b"close") in refused[0]["headers"]


@pytest.mark.parametrize("pauses", [[0.5], [0.06] * 10], ids=["silence", "one byte at a time"])
@pytest.mark.parametrize("shortened", [True, False])
def test_fault_02_a_body_that_does_not_arrive_is_408(pauses: list[float], shortened: bool) -> None:
    asked = shortcut_of(lambda _: None, body_s=0.2) if shortened else guard_of(reads_all, body_s=0.2)
    chunks = [b"x", *(part for pause in pauses for part in (pause, b"y"))]
    sent = call(asked, chunks, headers=[(b"content-type", b"application/json")])
    assert sent[0]["status"] == 408
    assert "0.2 s" in detail_of(sent)


def test_large_answers_are_handed_on_in_pieces() -> None:
    body = bytes(range(256)) * 4097

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    _, *pieces = call(Observer(answers, Metrics({}), lambda: False, lambda: ()), [])
    assert b"".join(piece["body"] for piece in pieces) == body
    assert max(len(piece["body"]) for piece in pieces) == edge.PIECE_BYTES
    assert [piece["more_body"] for piece in pieces] == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("chunks", "scope", "shortened"),
    [
        ([b"known"], {}, True),
        ([b"other"], {}, False),
        ([b"kno", b"wn"], {}, False),
        ([b"known"], {"method": "PUT"}, False),
        ([b"known"], {"path": "/api/backtest"}, False),
        ([b"known"], {"headers": [(b"content-type", b"text/plain")]}, False),
    ],
)
def test_only_a_known_body_is_answered_without_the_framework(
    chunks: list[bytes | float], scope: dict[str, Any], shortened: bool
) -> None:
    shortcut = shortcut_of({b"known": b"at hand"}.get)
    sent = call(shortcut, chunks, **{"headers": [(b"content-type", b"application/json")], **scope})
    # The framework gets the body as it came.
    assert sent[1]["body"] == (b"at hand" if shortened else b"%d" % 5)


def shortcut_of(ready: Callable[[bytes], bytes | None], **rules: float) -> Shortcut:
    bounds = EdgeRules(**rules)  # type: ignore[arg-type]
    rate = RateLimit(bounds.rate_per_s, bounds.rate_burst)
    guard = Guard(reads_all, bounds, rate)
    return Shortcut(guard, rules=bounds, rate=rate, ready=ready, cross_origin=lambda _: [])


def test_what_keeps_the_shortcut_from_knowing_is_told_by_the_framework() -> None:
    def broken(_: bytes) -> bytes | None:
        raise StorageError("the folder of models cannot be read")

    headers = [(b"content-type", b"application/json")]
    assert call(shortcut_of(broken), [b"known"], headers=headers)[1]["body"] == b"5"


def test_the_shortcut_is_bound_by_rate_and_by_time() -> None:
    shortcut = shortcut_of(lambda _: b"at hand", rate_per_s=0.01, rate_burst=2, body_s=0.05)
    headers = [(b"content-type", b"application/json")]
    assert [call(shortcut, [b"x"], headers=headers)[0]["status"] for _ in range(3)] == [200, 200, 429]
    late = call(shortcut, [0.5, b"x"], headers=headers, client=("b", 1))
    assert late[0]["status"] == 408
    assert "0.05 s" in detail_of(late)


def test_the_shortcut_answers_what_the_route_answers(build: Build) -> None:
    client = build()
    ours, foreign = ({"Origin": origin} for origin in ("http://localhost:3000", "http://elsewhere"))
    for origin in ({}, ours, foreign):
        for body in ({"symbol": "AAPL"}, {"symbol": "AAPL", "horizon": 7, "sequence_length": 60}):
            # Written differently it is another request until it has been read.
            content = json.dumps(body).encode() + b" " * len(str(origin))
            headers = {"Content-Type": "application/json", **origin}
            first, second = (client.post("/api/predict", content=content, headers=headers) for _ in range(2))
            assert first.content == second.content
            assert {**first.headers, "x-request-id": ""} == {**second.headers, "x-request-id": ""}
    assert count_of(client, method="POST", route="/api/predict", status="200") == 12.0
    check_problem(
        client.post("/api/predict", content=b"{", headers={"Content-Type": "application/json"}), 400
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("path", ["/api/predict", "/api/backtest", "/api/training/start"])
def test_a_body_in_another_encoding_than_utf_8_is_400(build: Build, path: str, encoding: str) -> None:
    content = json.dumps({"symbol": "AAPL"}).encode(encoding)
    response = build().post(path, content=content, headers={"Content-Type": "application/json"})
    check_problem(response, 400)
    assert "UTF-8" in response.json()["detail"]


def test_an_answer_that_has_begun_is_not_replaced() -> None:
    async def begins(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("too late for a problem")

    with pytest.raises(RuntimeError, match="too late"):
        call(guard_of(begins), [b""])


# ---------------------------------------------------------------- headers, figures, lines


def test_every_answer_carries_the_security_headers(build: Build) -> None:
    client = build(rules=EdgeRules(body_bytes=10))
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    answers = [
        client.get("/api/health"),
        client.get("/nowhere"),
        client.post("/api/predict", content=b"x" * 100),
        client.options("/api/predict", headers=preflight),
    ]
    for response in answers:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_while_it_ends_callers_are_asked_to_leave(build: Build) -> None:
    ending = [False]
    client = build(stopping=lambda: ending[0])
    assert client.get("/api/health/ready").status_code == 200
    assert "connection" not in client.get("/api/health").headers
    ending[0] = True
    response = client.get("/api/health/ready")
    check_problem(response, 503)
    assert response.headers["connection"] == "close"
    assert client.get("/api/health/live").headers["connection"] == "close"


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def count_of(client: TestClient, **labels: str) -> float:
    return samples(client).get(("ai_stocks_http_requests_total", tuple(sorted(labels.items()))), 0.0)


def test_metrics_count_by_template_and_never_by_path(build: Build) -> None:
    client = build(gauges={"training_queue": ("Jobs that wait", lambda: 3.0)})
    for symbol in ("AAPL", "MSFT", "NONE", "..%2Fx", "a" * 300):
        client.get(f"/api/historical/{symbol}")
    for path in ("/wp-admin", "/.env", "/api/models/x/y/z"):
        client.get(path)
    client.request("BREW", "/api/health")
    assert count_of(client, method="GET", route="/api/historical/{symbol}", status="200") == 2.0
    assert count_of(client, method="GET", route="/api/historical/{symbol}", status="404") == 1.0
    assert count_of(client, method="GET", route="other", status="404") == 3.0
    found = samples(client)
    assert found["ai_stocks_training_queue", ()] == 3.0
    assert found["ai_stocks_work_pending", ()] == 0.0
    assert found["ai_stocks_http_in_flight", ()] == 1.0
    assert found["ai_stocks_http_request_seconds_count", (("route", "/api/historical/{symbol}"),)] >= 3.0
    text = client.get("/metrics").text
    for raw in ("AAPL", "wp-admin", ".env", "aaa", "BREW"):
        assert raw not in text


def test_a_figure_that_cannot_be_had_hides_no_other(build: Build) -> None:
    def locked() -> float:
        raise StorageError("the database is locked: try again")

    found = samples(build(gauges={"training_queue": ("Jobs that wait", locked)}))
    assert math.isnan(found["ai_stocks_training_queue", ()])
    assert found["ai_stocks_work_pending", ()] == 0.0


def test_a_refused_request_is_counted_under_its_route(build: Build) -> None:
    client = build(rules=EdgeRules(body_bytes=5))
    client.post("/api/predict", content=b"x" * 100)
    assert count_of(client, method="POST", route="/api/predict", status="413") == 1.0


def test_two_applications_count_for_themselves(build: Build, services: Services) -> None:
    # Not started, since both have the same trainings.
    first, second = build(), TestClient(create_api(services))
    first.get("/api/models")
    assert count_of(first, method="GET", route="/api/models", status="200") == 1.0
    assert count_of(second, method="GET", route="/api/models", status="200") == 0.0


def test_one_line_per_request_and_nothing_of_what_was_sent(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    client = build()
    with caplog.at_level(logging.INFO, logger="service.edge"):
        client.get("/api/historical/AAPL%0Aforged?days=3", headers={"X-Request-ID": "trace-1"})
    (record,) = [one for one in caplog.records if one.name == "service.edge"]
    line = json.loads(JsonFormatter().format(record))
    assert line["route"] == "/api/historical/{symbol}"
    assert (line["method"], line["status"], line["request_id"]) == ("GET", 422, "trace-1")
    assert line["duration_ms"] > 0.0
    assert "forged" not in JsonFormatter().format(record)
    assert re.fullmatch(r"GET /api/historical/\{symbol\} 422 \d+\.\d ms trace-1", record.getMessage())


def test_a_caller_that_leaves_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics({})

    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("nobody listens")

    observer = Observer(gone, metrics=metrics, stopping=lambda: False, known_paths=frozenset)
    with pytest.raises(RuntimeError):
        call(observer, [b""])
    assert metrics.in_flight == 0
    assert b'status="499"' in metrics.text()


def test_the_edge_is_cheap() -> None:
    """At most 60 us a request, logging off: the budget is 30 on a quiet machine."""

    async def ready(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    guard = guard_of(ready)
    app = Observer(guard, metrics=Metrics({}), stopping=lambda: False, known_paths=frozenset)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    async def many(inner: Application, number: int) -> float:
        began = time.thread_time()
        for _ in range(number):
            headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"19")]
            scope = {"type": "http", "method": "POST", "path": "/x", "headers": headers, "client": ("a", 1)}
            await inner(scope, receive, send)
        return (time.thread_time() - began) / number

    edge.logger.setLevel(logging.WARNING)
    try:
        taken = min(asyncio.run(many(app, 300)) - asyncio.run(many(ready, 300)) for _ in range(5))
    finally:
        edge.logger.setLevel(logging.NOTSET)
    assert taken < 60e-6


# ---------------------------------------------------------------- pages


def test_docs_come_from_this_service_alone(build: Build) -> None:
    client = build()
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src" not in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//", page.text)
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in page.text
