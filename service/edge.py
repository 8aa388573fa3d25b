"""What stands between the network and the routes; plain ASGI that knows no framework.

`Guard` bounds a request and turns what nobody caught into a problem (RFC 9457). It lies inside of the
cross-origin headers, since a browser shows no error that lacks them.
"""

import http
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.schemas import Problem

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PROBLEM_TYPE = "application/problem+json"
CLOSE = {"Connection": "close"}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRules:
    """What a request may cost.

    Attributes
    ----------
    body_bytes, large_body_bytes
        Size of a body, and of one for a path in ``large_body_paths``.
    large_body_paths
        Paths that take a whole prediction.
    """

    body_bytes: int = 1 << 20
    large_body_bytes: int = 8 << 20
    large_body_paths: frozenset[str] = frozenset({"/api/backtest", "/api/forward_sim"})

    def most_bytes(self, path: str) -> int:
        """Return how large a body for ``path`` may be."""
        return self.large_body_bytes if path in self.large_body_paths else self.body_bytes


def problem_bytes(scope: Scope, status: int, detail: str) -> bytes:
    """Return an error as the page reads it: its ``detail`` is a sentence."""
    return Problem(
        type="about:blank",
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=_printable(detail),
        instance=_printable(str(scope.get("path", "")))[:200],
        request_id=scope.get("state", {}).get("request_id", ""),
    ).wire_bytes()


async def send_problem(
    scope: Scope, send: Send, status: int, detail: str, headers: Mapping[str, str] | None = None
) -> None:
    """Send an error without the framework's help."""
    body = problem_bytes(scope, status, detail)
    lines = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    lines += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def unexpected_detail(scope: Scope, error: Exception) -> str:
    """Log what nobody foresaw, and return what the caller may know of it."""
    request_id = scope.get("state", {}).get("request_id", "")
    logger.error("request %s failed", request_id, exc_info=error)
    return f"something broke here; the server's log has it under request {request_id}"


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header of that name, b"" without one."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    for key, value in headers:
        if key == name:
            return value
    return b""


def request_id_of(scope: Scope) -> str:
    """Return the caller's request id where it is harmless, else a new one."""
    given = header(scope, b"x-request-id")
    return given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


def announced_bytes(scope: Scope) -> int:
    """Return the announced size of the body, 0 where there is none."""
    text = header(scope, b"content-length")
    return int(text) if text.isdigit() and len(text) < 20 else 0


class Guard:
    """Gives every request an id, bounds its body, and turns what nobody caught into a problem."""

    def __init__(self, app: Application, rules: EdgeRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = request_id_of(scope)
        exchange = _Exchange(scope, receive, send, self._rules.most_bytes(scope["path"]))
        try:
            if not exchange.too_large:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.started:
                raise
            if not exchange.too_large:
                await exchange.refuse(500, unexpected_detail(scope, error))
        if exchange.too_large and not exchange.started:
            await exchange.refuse(413, f"the body is larger than {exchange.most} bytes", CLOSE)


class _Exchange:
    """One request and its answer: counts what arrives, so that an unannounced body is bounded too."""

    __slots__ = ("_left", "_receive", "_scope", "_send", "most", "started", "too_large")

    def __init__(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.most = self._left = most
        self.too_large = announced_bytes(scope) > most
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        # Whatever the routes make of a body that was cut off is not what the caller should read.
        if not self.too_large or self.started:
            await self._pass_on(message)

    async def refuse(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        await send_problem(self._scope, self._pass_on, status, detail, headers)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            request_id = self._scope["state"]["request_id"]
            message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
        await self._send(message)
