"""What stands between the network and the routes; plain ASGI that knows no framework.

`Observer` is outermost: it gives every request an id, every answer its security headers, and writes one log
line and the figures of ``/metrics``. `Shortcut` sends answers that are at hand. `Guard` lies inside of the
cross-origin headers, since a browser shows no error that lacks them: it bounds how often, by whom and how
much is asked, and turns what nobody caught into a problem (RFC 9457). `WorkPool` is where routes compute.
"""

import asyncio
import contextlib
import hashlib
import hmac
import http
import ipaddress
import logging
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Container, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.schemas import Problem
from utils.base import AIStocksError, DeadlineError, OverloadError

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

PROBLEM_TYPE = "application/problem+json"
CLOSE = {"Connection": "close"}
# A caller that still sends does not read: what it sends after a refusal is thrown away, up to these bounds.
LINGER_BYTES = 16 << 20
LINGER_S = 2.0
MAX_CLIENTS = 20_000
# So much is handed to a connection at a time: who reads slowly has no copy of a whole answer kept for him.
PIECE_BYTES = 256 << 10
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Bodies of these paths hold a prediction; with `PREDICT` they are the POSTs that change nothing.
WHOLE_PREDICTIONS = frozenset({"/api/backtest", "/api/forward_sim"})
PREDICT = "/api/predict"
READING_POSTS = WHOLE_PREDICTIONS | {PREDICT}
# An orchestrator restarts what does not answer it.
NEVER_LIMITED = "/api/health"
UNROUTED = "other"
CLIENT_LEFT = 499
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# Where an answer says something else, that stands.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRules:
    """What a request may cost, and who may write, see `utils.base.Settings`."""

    body_bytes: int = 1 << 20
    large_body_bytes: int = 16 << 20
    body_s: float = 20.0
    rate_per_s: float = 100.0
    rate_burst: int = 500
    work_threads: int = 4
    work_queue: int = 64
    deadline_s: float = 30.0
    api_keys: tuple[str, ...] = ()

    def most_bytes(self, path: str) -> int:
        """Return how large a body for ``path`` may be."""
        return self.large_body_bytes if path in WHOLE_PREDICTIONS else self.body_bytes


class WorkPool:
    """Threads that compute, a bounded queue before them, and a deadline.

    A thread cannot be stopped: what runs past its deadline keeps its place until it is done.
    """

    def __init__(self, *, threads: int, queue: int, deadline_s: float) -> None:
        self._most, self._deadline_s = threads + queue, deadline_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="work")
        self._works: set[Future[Any]] = set()

    @property
    def pending(self) -> int:
        """How many calls are computed or wait."""
        return len(self._works)

    async def run(self, call: Callable[[], T]) -> T:
        """Return what ``call`` returns; raises `OverloadError`, and `DeadlineError` where it takes too long.

        What has begun by then is finished, what has not is dropped.
        """
        if self.pending >= self._most:
            raise OverloadError(f"{self.pending} requests are being computed: try again in a moment")
        work = self._executor.submit(call)
        self._works.add(work)
        work.add_done_callback(self._works.discard)
        waiting = asyncio.wrap_future(work)
        done, _ = await asyncio.wait({waiting}, timeout=self._deadline_s)
        if not done:
            work.cancel()
            raise DeadlineError(f"no answer within {self._deadline_s:g} s: try again later, or ask for less")
        return waiting.result()

    def close(self) -> None:
        """Drop what has not begun; what has is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class RateLimit:
    """A token bucket per client, as the time at which it would be full again (GCRA).

    Beyond ``MAX_CLIENTS`` the oldest is forgotten: whoever has that many addresses gets past this anyhow.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._clock = 1.0 / per_s if per_s else 0.0, clock
        self._slack_s = self._interval_s * max(burst - 1, 0)
        self._full_at: dict[str, float] = {}

    def wait_s(self, client: str) -> float:
        """Count one request; return 0 where it may pass, else seconds until the next one may."""
        if not self._interval_s:
            return 0.0
        now = self._clock()
        full_at = max(self._full_at.pop(client, now), now)
        early = full_at - now - self._slack_s
        self._full_at[client] = full_at if early > 0.0 else full_at + self._interval_s
        if len(self._full_at) > MAX_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
        return max(early, 0.0)


def client_of(scope: Scope) -> str:
    """Return who asks: the address, of version 6 the network, since one caller owns all of it."""
    host = str((scope.get("client") or ("", 0))[0])
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    # A caller of version 4, as a socket of both writes it, is not in one network with all others.
    return str(address.ipv4_mapped or address.exploded[:19])


class Metrics:
    """The figures of one application in a registry of their own; ``gauges`` are further ones by name."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry, self.in_flight = CollectorRegistry(), 0
        name, says = "ai_stocks_http_requests", "Requests that were answered"
        self._requests = Counter(name, says, ("method", "route", "status"), registry=self._registry)
        name, says = "ai_stocks_http_request_seconds", "Seconds until an answer begins"
        self._seconds = Histogram(name, says, ("route",), buckets=BUCKETS_S, registry=self._registry)
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        ours = {"http_in_flight": ("Requests that are being answered", lambda: float(self.in_flight))}
        for name, (says, ask) in {**ours, **gauges}.items():
            Gauge(f"ai_stocks_{name}", says, registry=self._registry).set_function(partial(_or_nan, ask))

    def record(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer; ``route`` is a template, so that the number of series is bounded."""
        key = (method if method in METHODS else UNROUTED, route, status)
        if key not in self._known:
            self._known[key] = (self._requests.labels(*key), self._seconds.labels(route))
        requests, taken = self._known[key]
        requests.inc()
        taken.observe(seconds)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)


def _or_nan(ask: Callable[[], float]) -> float:
    # One figure that cannot be had, of a locked database say, hides no other.
    try:
        return ask()
    except AIStocksError:
        return math.nan


def problem_bytes(scope: Scope, status: int, detail: str) -> bytes:
    """Return an error as the page reads it: its ``detail`` is a sentence."""
    return Problem(
        type="about:blank",
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail.encode("utf-8", "replace").decode(),
        instance=str(scope.get("path", ""))[:200].encode("utf-8", "replace").decode(),
        request_id=scope.get("state", {}).get("request_id", ""),
    ).wire_bytes()


def whole_problem(status: int, detail: str) -> bytes:
    """Return all bytes of the answer to what never became a request."""
    request_id = os.urandom(16).hex()
    body = problem_bytes({"state": {"request_id": request_id}}, status, detail)
    head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: {PROBLEM_TYPE}\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\nx-request-id: {request_id}\r\n"
    lines = b"".join(b"%s: %s\r\n" % pair for pair in SECURITY_HEADERS)
    return head.encode() + lines + b"\r\n" + body


def unexpected_detail(scope: Scope, error: Exception) -> str:
    """Log what nobody foresaw, and return what the caller may know of it."""
    request_id = scope.get("state", {}).get("request_id", "")
    logger.error("request %s failed", request_id, exc_info=error)
    return f"something broke here; the server's log has it under request {request_id}"


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header of that name, b"" without one."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    for key, value in headers:
        if key == name:
            return value
    return b""


def changes_something(scope: Scope) -> bool:
    """Say whether a request may change what is kept here."""
    return scope.get("method", "GET") not in SAFE_METHODS and scope["path"] not in READING_POSTS


def is_from_elsewhere(scope: Scope, is_known: Callable[[str], bool]) -> bool:
    """Say whether an unknown page of another host asks, or one that does not tell its host (``null``)."""
    origin, host = header(scope, b"origin"), header(scope, b"host")
    is_ours = origin.partition(b"://")[2] == host != b""
    return origin != b"" and not is_ours and not is_known(origin.decode("latin-1"))


@dataclass(frozen=True, slots=True)
class Observer:
    """Gives requests their id and answers their headers; logs and counts each, under a known path or none."""

    app: Application
    metrics: Metrics
    stopping: Callable[[], bool]
    known_paths: Callable[[], Container[str]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        given = header(scope, b"x-request-id")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        scope.setdefault("state", {})["request_id"] = request_id
        status, answered = CLIENT_LEFT, 0.0

        async def send_observed(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
                message["headers"] = self._headers(message.get("headers", ()), request_id)
            body, sent = message.get("body", b""), 0
            while len(body) - sent > PIECE_BYTES:
                await send({**message, "body": body[sent : sent + PIECE_BYTES], "more_body": True})
                sent += PIECE_BYTES
            await send({"more_body": False, **message, "body": body[sent:]} if sent else message)

        self.metrics.in_flight += 1
        try:
            await self.app(scope, receive, send_observed)
        finally:
            self.metrics.in_flight -= 1
            ended = time.perf_counter()
            route, method = self._route(scope), scope["method"]
            self.metrics.record(method, route, status, (answered or ended) - began)
            if logger.isEnabledFor(logging.INFO):
                _log_request(method, route, status, 1000.0 * (ended - began), request_id)

    def _headers(self, given: Sequence[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
        names = {name for name, _ in given}
        ours = (*SECURITY_HEADERS, (b"connection", b"close")) if self.stopping() else SECURITY_HEADERS
        missing = [pair for pair in ours if pair[0] not in names]
        return [*given, (b"x-request-id", request_id.encode()), *missing]

    def _route(self, scope: Scope) -> str:
        template, path = getattr(scope.get("route"), "path_format", None), str(scope["path"])
        if isinstance(template, str):
            return template
        return path if "{" not in path and path in self.known_paths() else UNROUTED


def _log_request(method: str, route: str, status: int, taken_ms: float, request_id: str) -> None:
    # Not `logger.info`, which looks for its caller through all frames: a third of what a line costs.
    line, values = "%s %s %d %.1f ms %s", (method, route, status, taken_ms, request_id)
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, values, None)
    names = ("method", "route", "status", "duration_ms", "request_id")
    record.fields = dict(zip(names, values, strict=True))
    logger.handle(record)


class Refusal(NamedTuple):
    """Why a request is not answered."""

    status: int
    detail: str
    headers: Mapping[str, str] = MappingProxyType({})


class Guard:
    """Bounds what is asked, and turns what nobody caught into a problem."""

    def __init__(self, app: Application, rules: EdgeRules, rate: RateLimit) -> None:
        self._app, self._rules, self._rate = app, rules, rate
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in rules.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._rules)
        exchange.refusal = self._refusal(scope)
        try:
            if exchange.refusal is None:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.started:
                raise
            exchange.refusal = exchange.refusal or Refusal(500, unexpected_detail(scope, error))
        if exchange.refusal is not None and not exchange.started:
            await exchange.refuse(exchange.refusal)

    def _refusal(self, scope: Scope) -> Refusal | None:
        rules, path = self._rules, scope["path"]
        wait_s = 0.0 if path.startswith(NEVER_LIMITED) else self._rate.wait_s(client_of(scope))
        if wait_s:
            detail = f"more than {rules.rate_per_s:g} requests a second: slow down"
            return Refusal(429, detail, {"Retry-After": str(math.ceil(wait_s))})
        if self._keys and changes_something(scope) and (refusal := self._key_refusal(scope)):
            return refusal
        return _too_large(rules.most_bytes(path)) if _announces_too_much(scope, rules) else None

    def _key_refusal(self, scope: Scope) -> Refusal | None:
        given = header(scope, b"x-api-key") or header(scope, b"authorization").partition(b"Bearer ")[2]
        if not given:
            detail = "this route needs an API key: send it as X-API-Key, or as Authorization: Bearer KEY"
            return Refusal(401, detail, {"WWW-Authenticate": "Bearer"})
        digest = hashlib.sha256(given.strip()).digest()
        # All are compared, each in constant time: how long it takes says nothing about the keys.
        known = sum(hmac.compare_digest(digest, key) for key in self._keys)
        return None if known else Refusal(403, "the API key is not one that may write here")


def _body_until(scope: Scope, rules: EdgeRules) -> float:
    # The same for whoever asks: by then the whole body is here, in however many parts it comes.
    until = asyncio.get_running_loop().time() + rules.body_s
    return float(scope.setdefault("state", {}).setdefault("body_until", until))


def _announces_too_much(scope: Scope, rules: EdgeRules) -> bool:
    announced = header(scope, b"content-length")
    return announced.isdigit() and len(announced) < 20 and int(announced) > rules.most_bytes(scope["path"])


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most} bytes", CLOSE)


@dataclass(frozen=True, slots=True)
class Shortcut:
    """Sends an answer that is at hand; the framework's routing alone would take several times as long.

    ``ready`` gets the whole body of a POST to `PREDICT`; None of it means that the framework has to look, and
    so does a caller who is over its rate. ``cross_origin`` returns the headers for an origin, b"" for none.
    """

    app: Application
    rules: EdgeRules
    rate: RateLimit
    ready: Callable[[bytes], bytes | None]
    cross_origin: Callable[[bytes], Sequence[tuple[bytes, bytes]]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        is_ours = scope["type"] == "http" and scope["path"] == PREDICT and scope["method"] == "POST"
        is_ours = is_ours and header(scope, b"content-type") == b"application/json"
        if not is_ours or _announces_too_much(scope, self.rules):
            await self.app(scope, receive, send)
            return
        unread: list[Message] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(_body_until(scope, self.rules)):
                unread.append(await receive())
        whole = unread and not unread[0].get("more_body")
        body = None
        with contextlib.suppress(AIStocksError):
            # The framework meets it again, and tells it.
            body = self.ready(unread[0].get("body", b"")) if whole else None
        if body is not None and not self.rate.wait_s(client_of(scope)):
            headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
            headers += self.cross_origin(header(scope, b"origin"))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        is_late = not unread

        async def receive_again() -> Message:
            if is_late:
                raise TimeoutError
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)


class _Exchange:
    """One request and its answer: bounds the size of a body that was not announced, and how long it takes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, rules: EdgeRules) -> None:
        self._scope, self._receive, self._send, self._rules = scope, receive, send, rules
        self._left, self._until = rules.most_bytes(scope["path"]), _body_until(scope, rules)
        self._body_ended, self.started = False, False
        self.refusal: Refusal | None = None

    async def receive(self) -> Message:
        if self._body_ended:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.refusal = Refusal(408, f"the body did not arrive within {self._rules.body_s:g} s", CLOSE)
            return {"type": "http.disconnect"}
        self._body_ended = not message.get("more_body", False)
        body = message.get("body", b"")
        self._left -= len(body)
        if self._left < 0:
            self.refusal = _too_large(self._rules.most_bytes(self._scope["path"]))
        elif 0 in body:
            self.refusal = Refusal(400, "the body is not JSON in UTF-8")
        return message if self.refusal is None else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        # Whatever the routes make of a body that was cut off is not what the caller should read.
        if self.refusal is None or self.started:
            self.started = True
            await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        # What is still coming is thrown away: a closed door loses the answer.
        body = problem_bytes(self._scope, refusal.status, refusal.detail)
        headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body))]
        headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        left = LINGER_BYTES if refusal.headers is CLOSE else 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while left > 0 and not self._body_ended:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._body_ended = not message.get("more_body", False)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
