"""Composition root of the service: settings, registry, prediction service, web application.

::

    python app.py --host 127.0.0.1 --port 8000
    uvicorn app:app         (without `BoundedHttp`: behind a proxy that bounds headers)

Importing this module reads no setting and loads nothing; both happen when the server starts.

SIGTERM ends it without a lost request. A server that simply closes its socket resets the connections that the
kernel has accepted and the server has not, so `Drain` delays the signal: ready turns 503 at once, requests
are served on for a while, each answer asking its caller to leave; then no new connection comes in, what came
in is answered, and the server ends. A second signal ends it without waiting.
"""

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import logging
import math
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from service import edge
from utils.base import AIStocksError, Settings, UsageError, can_write_in, configure_logging, read_settings

logger = logging.getLogger(__name__)

# Between the last connection that comes in and the end of listening: its request is on its way.
SETTLE_S = 0.5
SO_ATTACH_FILTER = 26
# Classic BPF over a TCP header: packets with the ACK flag pass, those that open a connection do not.
ONLY_OPEN_CONNECTIONS = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x10), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))

# What may come before a request's headers are complete, and how long that may take.
MAX_HEAD_BYTES, HEAD_S = 64 << 10, 10.0
# Who is refused may still be sending; so long it is read, and thrown away, so that the answer arrives.
LINGER_S = 2.0
# Who takes no piece of an answer for so long gets no more of it: what is written and not read lies in memory.
WRITE_S = 30.0
FED_AT_ONCE, MOST_FILES = 16 << 10, 40_000
UNBOUNDED = (
    "headers are bounded neither in size nor in time, nor connections in number, AI_STOCKS_TRUSTED_PROXIES "
    "is not read (--forwarded-allow-ips is): "
    "start `python app.py` instead, or put a proxy in front that bounds them"
)

# What a request may cost, by the names of `Settings` and `EdgeRules`.
BOUNDS = {"rate_per_s", "rate_burst", "work_threads", "work_queue", "deadline_s"}
# After the start a collection walks only what requests leave behind; the thresholds make it rare.
GC_THRESHOLDS = (10_000, 20, 100)
# A thread that computes keeps the interpreter so long; answers that need no computing wait for each of them.
SWITCH_S = 0.0005


def create_app(settings: Settings, listening: socket.socket | None = None) -> edge.Application:
    """Wire the service together into an ASGI application.

    ``listening`` is where connections come in, if nobody else listens there. Raises `UsageError` if
    ``settings.source`` names no source, or ``settings.database_url`` no database.
    """
    # These rooms import every learner of the project: `--help` and the import of `app` need none of them.
    from data.cache_manager import BarCache  # noqa: PLC0415
    from data.data_fetcher import fetch_stock_data, make_news, make_source  # noqa: PLC0415
    from service.api import Services, create_api  # noqa: PLC0415
    from service.ledger import ForecastLedger, track_record  # noqa: PLC0415
    from service.model_registry import ModelRegistry  # noqa: PLC0415
    from service.prediction_service import Outbox, PredictionService  # noqa: PLC0415
    from service.training_service import TrainingService, trainer_command  # noqa: PLC0415

    registry = ModelRegistry(settings.models_dir)
    training = TrainingService(
        models_dir=settings.models_dir,
        database_url=settings.database,
        command=functools.partial(trainer_command, source=settings.source),
        environment=settings.child_environment(),
        workers=settings.training_workers,
        hours=settings.training_hours,
    )
    source = make_source(settings.source, cache_dir=settings.cache_dir, news=make_news(settings))
    if not (is_kept := can_write_in(settings.cache_dir)):
        logger.warning("prices are fetched anew at every start: %s cannot be written", settings.cache_dir)
    cache, ledger = BarCache(settings.cache_dir) if is_kept else None, ForecastLedger(settings.database)
    outbox = Outbox(ledger.record)
    bars_of = functools.partial(fetch_stock_data, source=source, cache=cache)
    drain = Drain(settings.drain_s, listening)

    def on_start() -> None:
        settle_memory()
        drain.install()

    keys = tuple(key.get_secret_value() for key in settings.api_keys)
    services = Services(
        registry=registry,
        predictions=PredictionService(registry=registry, source=source, cache=cache, on_served=outbox.keep),
        training=training,
        track_record=functools.partial(track_record, ledger, bars_of),
        source_name=source.name,
        origins=settings.origins,
        on_start=on_start,
        on_stop=outbox.close,
        stopping=lambda: drain.should_exit,
        rules=edge.EdgeRules(**settings.model_dump(include=BOUNDS), api_keys=keys),
        gauges={
            "models_loaded": ("Models in memory", registry.loaded_count),
            "training_queue": ("Trainings that wait for a worker", training.waiting),
        },
    )
    return create_api(services)


class Drain:
    """Delays the signal that ends the server until nobody is left who would notice.

    ``should_exit`` says that the end has begun; streams of events look for this name at the signal's handler.
    """

    def __init__(self, seconds: float, listening: socket.socket | None) -> None:
        self.should_exit = False
        self._seconds, self._listening = seconds, listening
        self._end: Callable[[], object] = lambda: None

    def install(self) -> None:
        """Take the place of the running server's handler; without one there is nothing to delay."""
        with contextlib.suppress(ValueError):  # not the main thread: no server of ours
            stop = signal.getsignal(signal.SIGTERM)
            if callable(stop) and hasattr(stop, "__self__"):
                self._end = functools.partial(stop, signal.SIGTERM, None)
                signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Begin to end; at the second signal, end."""
        if self.should_exit:
            self._end()
            return
        self.should_exit = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        logger.info("ending: serving on for %g s", self._seconds)
        time.sleep(self._seconds)
        if self._listening is not None:
            refuse_new_connections(self._listening)
            time.sleep(SETTLE_S)
        self._end()


def refuse_new_connections(listening: socket.socket) -> None:
    """Let a listening socket ignore whoever knocks from now on; who is in the queue can still be let in.

    The caller tries again a second later, and is told that nobody listens any more. Only Linux can do this.
    """
    if sys.platform != "linux":
        return
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in ONLY_OPEN_CONNECTIONS))
    program = struct.pack("HL", len(ONLY_OPEN_CONNECTIONS), ctypes.addressof(code))
    try:
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except OSError as error:
        logger.warning("the last connections may be reset: %s", error)


def settle_memory() -> None:
    """Take what the start left behind out of the garbage collector's sight, and let threads take short turns.

    A full collection over the imported libraries takes about 0.1 s, in the middle of some answer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    sys.setswitchinterval(SWITCH_S)


class LazyApplication:
    """An ASGI application that is built when the server first calls it, not when this module is imported."""

    def __init__(self, build: Callable[[], edge.Application]) -> None:
        # Not `functools.cache`: what goes to another process must be one that can be pickled.
        self._build = build
        self._built: edge.Application | None = None

    async def __call__(self, scope: edge.Message, receive: edge.Receive, send: edge.Send) -> None:
        """Handle one connection; a server opens with its start-up message."""
        self._built = self._built or self._build()
        await self._built(scope, receive, send)


def build(settings: Settings) -> edge.Application:
    """Return the application of a process that has not set up its log yet."""
    configure_logging(settings.log_level, settings.log_format)
    return create_app(settings)


def check(settings: Settings) -> None:
    """Raise what `create_app` would because of the settings; a worker could only say it in its log."""
    from data.data_fetcher import make_news, make_source  # noqa: PLC0415
    from service.ledger import ForecastLedger  # noqa: PLC0415

    make_source(settings.source, cache_dir=settings.cache_dir, news=make_news(settings))
    ForecastLedger(settings.database)


def build_for_worker(settings: Settings) -> edge.Application:
    """Return the application of one of several processes, which ends when their parent does."""

    def end_with(parent: BaseProcess) -> None:
        # Be it that it was killed.
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    return build(settings)


def build_for_another_server() -> edge.Application:
    """Return the application for ``uvicorn app:app``, and say what is missing there."""
    application = build(read_settings())
    # A server's own command line takes no protocol but its own.
    logger.warning(UNBOUNDED)
    return application


app = LazyApplication(build_for_another_server)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description="Serve forecasts over HTTP.",
        epilog="Everything else is set in the environment or in .env: see .env.example.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own models")
    parser.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    parser.add_argument("--models-dir", type=Path, help="default: AI_STOCKS_MODELS_DIR, or saved_models")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it; requests in flight are answered first."""
    args = build_parser().parse_args(argv)
    given = {name: value for name in ("source", "models_dir") if (value := getattr(args, name)) is not None}
    settings = read_settings().model_copy(update=given)
    # Before the start is done a signal ends the process as shells know it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return serve(settings, args.host, args.port, args.workers)
    except AIStocksError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def serve(settings: Settings, host: str, port: int, workers: int) -> int:
    """Listen and serve until a signal ends it; return the exit code.

    Raises `UsageError` if the address or the source cannot be used, or ``workers`` is less than 1.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} would serve nothing: choose 1 or more")
    configure_logging(settings.log_level, settings.log_format)
    with listen(host, port) as listening:
        if workers > 1:
            check(settings)
            lazy = LazyApplication(functools.partial(build_for_worker, settings))
            processes = Workers(_config(lazy, settings, workers), listening, settings.drain_s)
            processes.run()
            return 1 if any(each.exitcode == STARTUP_FAILURE for each in processes.processes) else 0
        # A fifth of the start went into looking for garbage among modules; `settle_memory` turns it on again.
        gc.disable()
        server = uvicorn.Server(_config(create_app(settings, listening), settings, workers))
        # The server raises the signal that ended it once more when it is done: an orderly end is no failure.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if server.started else 128 + signal.SIGTERM))
        logger.info("serving %s prices on http://%s:%d", settings.source, *listening.getsockname()[:2])
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            if not server.started:
                raise
    return 0


def most_connections() -> int:
    """Return how many connections a process holds at most; the other files are for models and prices."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (min(files, MOST_FILES) if files > 0 else MOST_FILES) * 3 // 4


class BoundedHttp(HttpToolsProtocol):
    """One connection, whose headers are bounded in size and in time, and which errors leave as problems.

    Where there are more connections than `most_connections`, the one that has waited longest for its caller,
    for a request or for an answer to be read, is closed: who opens many keeps nobody else out.
    """

    _refused, _in_head, _fed, waits_since = False, True, 0, 0.0
    _head_timer: asyncio.TimerHandle
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; make room first where there is none."""
        super().connection_made(transport)
        # Beyond it writing is paused, and timed; small answers go out whole: a third faster than at 0.
        transport.set_write_buffer_limits(high=16 << 10)
        self._await_head()
        if len(self.connections) > most_connections():
            ours = (each for each in self.connections if isinstance(each, BoundedHttp))
            longest = min((each for each in ours if each.waits_for_caller), key=lambda each: each.waits_since)
            longest.transport.abort()
            # It is counted until the loop comes around to it, and must not be chosen twice.
            self.connections.discard(longest)

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_caller(self) -> bool:
        """No request has come in as a whole, or its answer is not being read."""
        return self.is_idle or self.cycle.more_body or self.flow.write_paused

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._head_timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give the caller time to read."""
        super().pause_writing()
        self.waits_since = time.monotonic()
        self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: all that was written is on its way."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _await_head(self) -> None:
        self.waits_since = time.monotonic()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        """Read on, in pieces: what is too much is noticed before all of it is kept."""
        for start in range(0, len(data), FED_AT_ONCE):
            if self._refused or self.transport.is_closing():
                return
            piece = data[start : start + FED_AT_ONCE]
            self._fed += len(piece)
            super().data_received(piece)
            if self._fed > MAX_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """Give the headers of a request their time from its first byte on; of one that waits, later."""
        super().on_message_begin()
        self._in_head = True
        if self.is_idle:
            self._head_timer.cancel()
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Read a header; what follows a body in pieces is none, though it looks the same."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request on."""
        self._in_head, self._fed, self.waits_since = False, 0, time.monotonic()
        self._head_timer.cancel()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body on; its size is not bounded here, only what lies between the parts."""
        self._fed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Expect the next request; what is left of a body that was refused unread comes in time, too."""
        super().on_response_complete()
        if self.is_idle:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or endless, with a problem, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_timer.cancel()
        if not self.is_idle and self.cycle.response_started:
            self.transport.close()
            return
        refusal = (400, "this is not valid HTTP/1.1")
        if self._fed > MAX_HEAD_BYTES:
            refusal = (431, f"send less than {MAX_HEAD_BYTES} bytes of headers")
        self.transport.write(edge.whole_problem(*refusal))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _config(application: edge.Application, settings: Settings, workers: int) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        workers=workers,
        # Without a configuration of its own, uvicorn logs where everything else does: to stderr.
        log_config=None,
        # The service writes a line of its own per request.
        access_log=False,
        ws="none",
        # A start that fails is a failed start, not a server that answers 500 for ever.
        lifespan="on",
        http=BoundedHttp,
        server_header=False,
        # Its own default believes whoever calls from this machine who the caller is.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=[str(network) for network in settings.trusted_proxies],
        timeout_graceful_shutdown=math.ceil(settings.deadline_s) + 5,
    )


class Workers(Multiprocess):
    """Processes that share one socket; what the last of them would leave in its queue is not let in."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket, drain_s: float) -> None:
        super().__init__(config, [listening])
        self._listening, self._drain_s = listening, drain_s

    def terminate_all(self) -> None:
        """Ask all workers to end; they accept connections until they do."""
        super().terminate_all()
        time.sleep(self._drain_s)
        refuse_new_connections(self._listening)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises `UsageError` if the address does not exist, or may not be used."""
    if not 0 <= port < 65_536:
        raise UsageError(f"port {port} does not exist: choose one from 0 to 65535 (0: any that is free)")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        words = f"cannot listen on {host}:{port} ({error}): choose another --host or --port"
        raise UsageError(words) from error


if __name__ == "__main__":
    sys.exit(main())
