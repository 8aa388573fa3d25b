"""The routes, the errors and the edge, over HTTP."""

import asyncio
import io
import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.data_fetcher import SampleSource
from service.api import STATUS_OF, Services, create_api
from service.edge import LINGER_BYTES, EdgeRules
from service.prediction_service import PredictionService
from service.schemas import PredictionResult, TrainingParams
from service.training_service import TrainingService
from tests.test_service.conftest import FakeRegistry, FakeSource, served
from utils import base as errors

JSON = {"Content-Type": "application/json"}
FIELD_NAMES = """symbol horizon daysOnChart smoothing confidenceFloors fusion maxLong maxShort mode buy
    modelId dataInterval tradeShareFloor regimeFilters bull regressorScale other"""
FIELDS = st.sampled_from(FIELD_NAMES.split())
MAX_BODY_BYTES = EdgeRules().body_bytes


def check_problem(response: Response, status: int) -> str:
    """Assert that the answer is an error as the page reads it, and return its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert isinstance(body["detail"], str)
    assert body["detail"]
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert str(Path(__file__).resolve().parents[2]) not in response.text
    return body["detail"]


def scope_of(
    path: str, *, method: str = "GET", headers: Sequence[tuple[bytes, bytes]] = ()
) -> dict[str, Any]:
    """Return the scope of a request, for what a test client cannot do."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


def post(client: TestClient, body: str | bytes, **headers: str) -> Response:
    return client.post("/api/predict", content=body, headers={**JSON, **headers})


# ---------------------------------------------------------------- routes


def test_welcome_and_health(client: TestClient, starts: list[str]) -> None:
    assert "message" in client.get("/").json()
    assert client.get("/api/health").json()["status"] == "ok"
    assert client.get("/api/health/live").json() == {"status": "ok"}
    assert client.get("/api/health/ready").json() == {"status": "ok", "models": 1}
    assert starts == ["started"]


def test_not_ready_before_the_start(api: FastAPI) -> None:
    response = TestClient(api).get("/api/health/ready")
    check_problem(response, 503)
    assert response.headers["retry-after"] == "1"


def test_models_are_a_bare_list(client: TestClient) -> None:
    (model,) = client.get("/api/models").json()
    assert model["id"] == "AAPL-gbm"
    assert client.get("/api/models/AAPL-gbm").json() == model
    assert "/api/models" in check_problem(client.get("/api/models/nothing"), 404)


def test_trap_8_the_model_id_is_one_of_the_listed(client: TestClient) -> None:
    metadata = client.post("/api/predict", json={"symbol": "AAPL"}).json()["metadata"]
    assert metadata["modelId"] in {model["id"] for model in client.get("/api/models").json()}


def test_historical(client: TestClient) -> None:
    body = client.get("/api/historical/aapl?days=3").json()
    assert body["symbol"] == "AAPL"
    assert len(body["data"]) == 3
    assert set(body["data"][0]) == {"date", "open", "high", "low", "close", "volume"}
    assert isinstance(body["data"][0]["volume"], int)
    assert len(client.get("/api/historical/AAPL").json()["data"]) == 90


def test_realtime_is_the_last_session_in_snake_case(client: TestClient) -> None:
    body = client.get("/api/realtime/aapl").json()
    contract = "symbol current_price previous_close open day_high day_low volume"
    assert {*contract.split(), "data_as_of", "data_stale", "data_source"} == set(body)
    assert body["current_price"] == client.get("/api/historical/AAPL?days=1").json()["data"][0]["close"]
    check_problem(client.get("/api/realtime/NOPE"), 404)
    check_problem(client.get("/api/realtime/..%2fx"), 422)


def test_predict_answers_the_contract(client: TestClient) -> None:
    response = client.post("/api/predict", json={"symbol": "AAPL", "horizon": 5, "daysOnChart": 120})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert len(body["dates"]) == 120
    assert len(body["forecast"]["dates"]) == 5
    PredictionResult.model_validate(body)


def test_the_smallest_real_caller(client: TestClient) -> None:
    assert post(client, '{"symbol": "AAPL", "sequence_length": 60}').status_code == 200


def test_a_symbol_without_a_model_names_the_command(client: TestClient) -> None:
    said = check_problem(post(client, '{"symbol": "MSFT"}'), 404)
    assert "`python -m training.train_gbm MSFT --source fake`" in said


def test_sample_is_suggested_only_for_what_it_has(services: Services) -> None:
    table = pd.read_csv(io.BytesIO(SampleSource()._read("AAPL")), compression="gzip")
    assert set(SampleSource.SYMBOLS) == set(table["Ticker"])
    with TestClient(create_api(replace(services, source_name="sample"))) as client:
        had = check_problem(post(client, '{"symbol": "MSFT"}'), 404)
        other = check_problem(post(client, '{"symbol": "ZZZZ"}'), 404)
        none = check_problem(client.get("/api/models/none"), 404)
    assert "`python -m training.train_gbm MSFT --source sample`" in had
    assert "`python -m training.train_gbm SYMBOL --source sample`" in none
    assert "`python -m training.train_gbm ZZZZ --source yahoo`" in other
    assert "sample has AAPL, FB, GOOG, IBM, MSFT alone" in other


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}])
def test_a_body_that_is_not_called_json_says_what_to_send(
    client: TestClient, headers: dict[str, str]
) -> None:
    response = client.post("/api/predict", content=b'{"symbol": "AAPL"}', headers=headers)
    assert check_problem(response, 422) == "send JSON with Content-Type: application/json"


def test_models_train_names_training_start(client: TestClient) -> None:
    assert "/api/training/start" in check_problem(client.post("/api/models/train", json={}), 501)


def test_every_route_of_the_contract_exists(client: TestClient) -> None:
    contract = """GET / | GET /api/health | GET /api/health/live | GET /api/health/ready
        | GET /api/historical/{symbol} | GET /api/realtime/{symbol} | GET /api/models
        | GET /api/models/{model_id} | GET /api/models/{model_id}/download | DELETE /api/models/{model_id}
        | GET /api/models/{model_id}/versions | POST /api/models/{model_id}/rollback
        | POST /api/models/{model_id}/restore | POST /api/predict | POST /api/backtest | POST /api/forward_sim
        | POST /api/training/start | GET /api/training
        | GET /api/training/{job_id} | DELETE /api/training/{job_id} | GET /api/training/{job_id}/events
        | GET /api/jobs/{job_id}/events | POST /api/models/train | GET /api/track-record/{symbol}"""
    served_routes = {
        f"{method.upper()} {path}"
        for path, item in client.get("/openapi.json").json()["paths"].items()
        for method in item
    }
    assert {route.strip() for route in contract.split("|")} == served_routes


def test_openapi_names_are_the_wire_names(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert {"dates", "fusedPositions", "tradeMarkers"} <= set(schemas["PredictionResult"]["properties"])
    assert schemas["PredictionRequest"]["required"] == ["symbol"]
    assert schemas["Problem"]["required"] == ["type", "title", "status", "detail", "instance", "request_id"]


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    check_problem(client.get("/nope"), 404)
    check_problem(client.get("/api/models/"), 404)
    response = client.get("/api/predict")
    check_problem(response, 405)
    assert response.headers["allow"] == "POST"
    for path, methods in (
        ("/api/models/AAPL-gbm", "DELETE, GET"),
        ("/api/training/x", "DELETE, GET"),
        ("/api/models/train", "DELETE, GET, POST"),
        ("/api/historical/AAPL", "GET"),
        ("/metrics", "GET"),
    ):
        response = client.put(path)
        check_problem(response, 405)
        # All of the path, and not those of the one route that the framework met first.
        assert response.headers["allow"] == methods


@pytest.mark.parametrize("path", ["/api/predict", "/api/training/start"])
def test_a_body_that_is_missing_is_asked_for(client: TestClient, path: str) -> None:
    assert check_problem(client.post(path), 422) == "send JSON with Content-Type: application/json"


# ---------------------------------------------------------------- faults 1 to 4


HOSTILE_SYMBOLS = [
    "../../etc/passwd",
    "..",
    "../x",
    "%2e%2e",
    "C:\\x",
    "A\u0000B",
    "AAPL\n",
    "A\nB",
    "\U0001f4c8",
    "\uff21\uff21\uff30\uff2c",
    "",
    " ",
    "A" * 5_000,
    "A B",
    "-A",
    "ß",
]


@pytest.mark.parametrize("symbol", HOSTILE_SYMBOLS, ids=lambda symbol: ascii(symbol[:12]))
def test_fault_1_hostile_symbols_are_refused_and_leave_nothing(
    client: TestClient, source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symbol: str
) -> None:
    monkeypatch.chdir(tmp_path)
    detail = check_problem(client.post("/api/predict", json={"symbol": symbol}), 422)
    assert len(detail) < 400
    assert list(tmp_path.iterdir()) == []
    assert source.asked == []


@pytest.mark.parametrize(
    "encoded",
    [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e",
        "C:%5Cx",
        "A%00B",
        "AAPL%0A",
        "%0AA",
        "%F0%9F%93%88",
        "%FF",
        "A" * 5_000,
        "",
    ],
)
def test_fault_1_hostile_symbols_in_the_path(client: TestClient, source: FakeSource, encoded: str) -> None:
    check_problem(client.get(f"/api/historical/{encoded}"), 422)
    assert source.asked == []


@pytest.mark.parametrize(
    ("symbol", "normalised"),
    [
        (" aapl ", "AAPL"),
        ("BRK.B", "BRK-B"),
        ("^gspc", "^GSPC"),
        ("eurusd=x", "EURUSD=X"),
        ("005930.KS", "005930.KS"),
    ],
)
def test_fault_1_real_symbols_pass(services: Services, symbol: str, normalised: str) -> None:
    registry = FakeRegistry(served(normalised))
    predictions = PredictionService(registry=registry, source=FakeSource({}), cache=None)
    api = create_api(replace(services, registry=registry, predictions=predictions))
    detail = check_problem(TestClient(api).post("/api/predict", json={"symbol": symbol}), 404)
    assert detail == f"fake does not know {normalised}"


def test_fault_2_an_announced_large_body_is_refused(client: TestClient) -> None:
    detail = check_problem(post(client, b"x" * (10 << 20)), 413)
    assert str(MAX_BODY_BYTES) in detail


def test_fault_2_a_chunked_large_body_is_refused(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    check_problem(client.post("/api/predict", content=chunks(), headers=JSON), 413)


def test_fault_2_a_body_without_end_is_not_read_to_its_end(api: FastAPI) -> None:
    pulled = 0
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal pulled
        pulled += 1
        assert pulled < 1_000, "the body is read without bound"
        return {"type": "http.request", "body": b"x" * 65_536, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent_as = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    scope = scope_of("/api/predict", method="POST", headers=sent_as)
    asyncio.run(api(scope, receive, send))
    assert sent[0]["status"] == 413
    # What comes after the refusal is thrown away, since a caller that still sends does not read the answer.
    assert pulled == MAX_BODY_BYTES // 65_536 + 1 + LINGER_BYTES // 65_536


def test_fault_2_a_body_at_the_limit_is_read(client: TestClient) -> None:
    body = '{"symbol": "MSFT", "padding": "' + "x" * (MAX_BODY_BYTES - 33) + '"}'
    assert len(body) == MAX_BODY_BYTES
    check_problem(post(client, body), 404)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"symbol": "AAPL"',
        b"\xff\xfe",
        b'{"symbol": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5_000,
    ],
    ids=["empty", "brace", "open", "bytes", "latin", "deep list", "deep object", "endless number"],
)
def test_fault_2_malformed_json_is_400(client: TestClient, body: bytes) -> None:
    response = post(client, body)
    # No body at all is a missing body, not a malformed one.
    check_problem(response, 422 if body == b"" else 400)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"'])
@pytest.mark.parametrize(
    "template",
    [
        '{"symbol": "AAPL", "horizon": %s}',
        '{"symbol": "AAPL", "maxLong": %s}',
        '{"symbol": "AAPL", "confidenceFloors": {"buy": %s}}',
        '{"symbol": "AAPL", "fusion": {"regressorScale": %s}}',
        '{"symbol": %s}',
        '{"symbol": "AAPL", "modelId": %s}',
        '{"symbol": "AAPL", "fusion": %s}',
    ],
)
def test_fault_3_values_that_are_not_json_are_422(client: TestClient, template: str, value: str) -> None:
    detail = check_problem(post(client, template % value), 422)
    assert "nan" not in detail.lower().replace("finite", "")
    assert "inf" not in detail.lower().replace("finite", "")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "1" + "0" * 400, '"5"', "[]"])
def test_fault_4_horizon_is_a_small_whole_number(client: TestClient, value: str) -> None:
    detail = check_problem(post(client, f'{{"symbol": "AAPL", "horizon": {value}}}'), 422)
    assert detail.startswith("horizon: ")
    assert len(detail) < 200


def test_fault_4_the_cap_of_the_horizon_is_named(client: TestClient) -> None:
    assert "252 (got 253)" in check_problem(post(client, '{"symbol": "AAPL", "horizon": 253}'), 422)
    assert post(client, '{"symbol": "AAPL", "horizon": 252}').status_code == 200


@pytest.mark.parametrize("days", ["0", "-5", "1000000000000", "1.5", "true", "x", "", "NaN", "9" * 400])
def test_fault_4_days_are_bounded(client: TestClient, days: str) -> None:
    assert check_problem(client.get(f"/api/historical/AAPL?days={days}"), 422).startswith("days: ")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner), max_leaves=8
)


@given(body=st.dictionaries(FIELDS, VALUES, max_size=6), known=st.booleans())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_body_breaks_the_service(client: TestClient, body: dict[str, object], *, known: bool) -> None:
    response = post(client, json.dumps({**body, "symbol": "AAPL"} if known else body))
    if response.status_code == 200:
        PredictionResult.model_validate(response.json())
    else:
        assert response.status_code in {404, 422}
        check_problem(response, response.status_code)


@given(body=st.binary(max_size=200))
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_bytes_break_the_service(client: TestClient, body: bytes) -> None:
    response = post(client, body)
    assert response.status_code in {400, 422}
    check_problem(response, response.status_code)


# ---------------------------------------------------------------- errors


ERRORS = [
    (errors.UsageError, 422),
    (errors.InvalidSymbolError, 422),
    (errors.DeviceError, 422),
    (errors.JobMissingError, 404),
    (errors.UpstreamError, 503),
    (errors.UnknownSymbolError, 404),
    (errors.DataError, 422),
    (errors.InsufficientDataError, 422),
    (errors.ModelError, 503),
    (errors.ModelMissingError, 404),
    (errors.ModelCorruptError, 503),
    (errors.ModelIncompatibleError, 503),
    (errors.ConflictError, 409),
    (errors.LockedError, 409),
    (errors.ModelExistsError, 409),
    (errors.GateRefusedError, 409),
    (errors.CollapsedError, 409),
    (errors.StorageError, 507),
    (errors.OverloadError, 503),
    (errors.DeadlineError, 504),
]


@pytest.mark.parametrize(("error", "status"), ERRORS, ids=lambda value: getattr(value, "__name__", value))
def test_each_error_has_its_status(
    client: TestClient, source: FakeSource, error: type[errors.AIStocksError], status: int
) -> None:
    source.answers["AAPL"] = error("cannot read /srv/secret/dir/AAPL.csv: try POST /api/training/start")
    response = client.get("/api/historical/AAPL")
    assert check_problem(response, status) == "cannot read AAPL.csv: try POST /api/training/start"
    assert ("retry-after" in response.headers) == (error in {errors.UpstreamError, errors.OverloadError})


def test_no_error_of_the_tree_is_forgotten() -> None:
    def tree(cls: type) -> set[type]:
        own = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
        return {cls}.union(*(tree(sub) for sub in own))

    assert {error for error, _ in ERRORS} | {errors.AIStocksError} == tree(errors.AIStocksError)
    assert STATUS_OF[errors.AIStocksError] == 500


@pytest.mark.parametrize(
    "error",
    [RuntimeError("boom in /srv/secret/file.py"), errors.AIStocksError("a bug in /srv/secret/file.py")],
)
def test_a_bug_is_500_without_its_message(
    client: TestClient, source: FakeSource, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    source.answers["AAPL"] = error
    with caplog.at_level(logging.ERROR):
        response = client.get(
            "/api/historical/AAPL", headers={"X-Request-ID": "trace-7", "Origin": "http://localhost:3000"}
        )
    detail = check_problem(response, 500)
    assert "secret" not in response.text
    assert "trace-7" in detail
    assert "boom" in caplog.text or "a bug" in caplog.text
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_several_mistakes_are_one_sentence(client: TestClient) -> None:
    detail = check_problem(post(client, '{"horizon": 0, "smoothing": "x", "maxLong": -1}'), 422)
    for field in ("symbol: ", "horizon: ", "smoothing: ", "maxLong: "):
        assert field in detail


def test_a_body_that_is_not_announced_as_json_is_refused(client: TestClient) -> None:
    response = client.post(
        "/api/predict", content='{"symbol": "AAPL"}', headers={"Content-Type": "text/plain"}
    )
    check_problem(response, 422)


# ---------------------------------------------------------------- edge


@pytest.mark.parametrize("given", ["abc-1.2_3", "a" * 64])
def test_a_request_id_is_kept(client: TestClient, given: str) -> None:
    assert client.get("/api/health", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "<script>", "a" * 65])
def test_a_hostile_request_id_is_replaced(client: TestClient, given: str) -> None:
    answered = client.get("/api/health", headers={"X-Request-ID": given}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", answered)


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:3000"])
def test_trap_11_known_origins_may_call(client: TestClient, origin: str) -> None:
    preflight = client.options(
        "/api/predict",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        },
    )
    assert preflight.headers["access-control-allow-origin"] == origin
    response = client.post("/api/predict", content=b"x" * (2 << 20), headers={**JSON, "Origin": origin})
    check_problem(response, 413)
    assert response.headers["access-control-allow-origin"] == origin
    # No answer is 204, nor anything but JSON; a browser reads the headers of this one alone.
    assert (preflight.status_code, preflight.content) == (200, b"")
    assert "content-type" not in preflight.headers
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["x-request-id"]


def test_trap_11_other_origins_may_not(client: TestClient) -> None:
    response = client.get("/api/health", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("origin", "method", "named"),
    [
        ("http://evil.example", "POST", "origin"),
        ("http://localhost:3000", "PATCH", "method"),
        ("http://evil.example", "PATCH", "origin, method"),
    ],
)
def test_trap_11_a_refused_preflight_is_a_problem(
    client: TestClient, origin: str, method: str, named: str
) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    response = client.options("/api/predict", headers=asked)
    detail = check_problem(response, 400)
    assert f"({named})" in detail
    assert "PYTHON_API_ALLOW_ORIGINS" in detail
    assert ("access-control-allow-origin" in response.headers) == ("evil" not in origin)
    assert response.headers["x-frame-options"] == "DENY"
    assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize("origin", ["http://evil.example", "https://testserver.evil.example", "null"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/models/AAPL-gbm/rollback"),
        ("POST", "/api/models/AAPL-gbm/restore"),
        ("DELETE", "/api/models/AAPL-gbm"),
        ("PUT", "/api/models/AAPL-gbm"),
        ("PATCH", "/nowhere"),
    ],
)
def test_no_page_from_elsewhere_changes_anything(
    client: TestClient, origin: str, method: str, path: str
) -> None:
    """What has no body and no header of its own is sent by a browser without a preflight."""
    response = client.request(method, path, headers={"Origin": origin})
    detail = check_problem(response, 403)
    assert "(origin)" in detail
    assert "PYTHON_API_ALLOW_ORIGINS" in detail
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", [None, "http://localhost:3000", "http://testserver", "https://testserver"])
def test_our_own_pages_and_who_is_no_browser_may_change_things(
    client: TestClient, origin: str | None
) -> None:
    headers = {} if origin is None else {"Origin": origin}
    assert check_problem(client.post("/api/models/NOBODY-gbm/restore", headers=headers), 404)
    assert check_problem(client.delete("/api/models/NOBODY-gbm", headers=headers), 404)


def test_a_page_from_elsewhere_may_ask_what_changes_nothing(client: TestClient) -> None:
    """It reads no answer, and what it sends beside JSON is no forecast."""
    response = client.post("/api/predict", content=b"{}", headers={"Origin": "null"})
    check_problem(response, 422)
    assert "access-control-allow-origin" not in response.headers


def test_fault_28_health_answers_while_predictions_run(client: TestClient, source: FakeSource) -> None:
    working, finish = threading.Event(), threading.Event()

    class Slow(FakeSource):
        def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
            working.set()
            assert finish.wait(20)
            return super().fetch(symbol, start=start)

    slow = Slow(source.answers)
    source.fetch = slow.fetch  # type: ignore[method-assign]
    answers: list[int] = []
    caller = threading.Thread(
        target=lambda: answers.append(client.post("/api/predict", json={"symbol": "AAPL"}).status_code)
    )
    caller.start()
    try:
        assert working.wait(20)
        assert client.get("/api/health").status_code == 200
        assert answers == []
    finally:
        finish.set()
        caller.join()
    assert answers == [200]


def test_every_answer_of_every_route_is_json(client: TestClient) -> None:
    for path, item in client.get("/openapi.json").json()["paths"].items():
        for method in item:
            response = client.request(method, re.sub(r"\{[^}]*\}", "AAPL", path), json={})
            assert response.status_code != 204
            json.loads(response.content)


def test_streams_beyond_the_limit_are_refused_and_an_ended_one_makes_room(
    api: FastAPI, training: TrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.MAX_STREAMS", 2)
    job_id = training.start(TrainingParams(symbol="AAPL")).id

    class Caller:
        def __init__(self) -> None:
            self.leaves, self.began, self.sent = asyncio.Event(), asyncio.Event(), list[dict[str, Any]]()
            self.asks = asyncio.create_task(
                api(scope_of(f"/api/training/{job_id}/events"), self.receive, self.send)
            )

        async def receive(self) -> dict[str, Any]:
            await self.leaves.wait()
            return {"type": "http.disconnect"}

        async def send(self, message: dict[str, Any]) -> None:
            self.sent.append(message)
            self.began.set()

        async def status(self) -> int:
            await asyncio.wait_for(self.began.wait(), 10)
            return self.sent[0]["status"]

        async def leave(self) -> None:
            self.leaves.set()
            await asyncio.wait_for(self.asks, 10)

    async def story() -> None:
        first, second = Caller(), Caller()
        assert [await one.status() for one in (first, second)] == [200, 200]
        refused = Caller()
        assert await refused.status() == 503
        assert b"retry-after" in dict(refused.sent[0]["headers"])
        await first.leave()
        third = Caller()
        assert await third.status() == 200
        for caller in (second, refused, third):
            await caller.leave()
        assert api.state.streams == set()

    asyncio.run(story())
