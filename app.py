"""Composition root of the service: settings, registry, prediction service, web application.

::

    python app.py --host 127.0.0.1 --port 8000
    uvicorn app:app

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
import signal
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from utils.errors import AIStocksError, UsageError
from utils.settings import Settings, configure_logging, read_settings

if TYPE_CHECKING:
    from service.edge import EdgeRules
    from service.training_service import TrainingService

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

# Between the last connection that comes in and the end of listening: its request is on its way.
SETTLE_S = 0.5
SO_ATTACH_FILTER = 26
# Classic BPF over a TCP header: packets with the ACK flag pass, those that open a connection do not.
ONLY_OPEN_CONNECTIONS = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x10), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))

# After the start a collection walks only what requests leave behind; the thresholds make it rare.
GC_THRESHOLDS = (10_000, 20, 100)


def create_app(settings: Settings, listening: socket.socket | None = None) -> Application:
    """Wire the service together into an ASGI application.

    Parameters
    ----------
    settings
        Where models and prices lie, and who may ask.
    listening
        Where connections come in, if nobody else listens there.

    Raises
    ------
    UsageError
        If ``settings.source`` names no source, or ``settings.database_url`` no database.
    """
    # These rooms import every learner of the project: `--help` and the import of `app` need none of them.
    from data.cache_manager import BarCache  # noqa: PLC0415
    from data.data_fetcher import fetch_stock_data, make_source  # noqa: PLC0415
    from service.api import Services, create_api  # noqa: PLC0415
    from service.ledger import ForecastLedger, track_record  # noqa: PLC0415
    from service.model_registry import ModelRegistry  # noqa: PLC0415
    from service.prediction_service import Outbox, PredictionService  # noqa: PLC0415

    registry, training = ModelRegistry(settings.models_dir), training_service(settings)
    source = make_source(settings.source, cache_dir=settings.cache_dir)
    cache, ledger = BarCache(settings.cache_dir), ForecastLedger(settings.database)
    outbox = Outbox(ledger.record)
    predictions = PredictionService(registry=registry, source=source, cache=cache, on_served=outbox.keep)
    bars_of = functools.partial(fetch_stock_data, source=source, cache=cache)
    drain = Drain(settings.drain_s, listening)

    def on_start() -> None:
        settle_memory()
        drain.install()

    return create_api(
        Services(
            registry=registry,
            predictions=predictions,
            training=training,
            track_record=functools.partial(track_record, ledger, bars_of),
            source_name=source.name,
            origins=settings.origins,
            on_start=on_start,
            on_stop=outbox.close,
            stopping=lambda: drain.should_exit,
            rules=edge_rules(settings),
            gauges={
                "models_loaded": ("Models in memory", registry.loaded_count),
                "training_queue": ("Trainings that wait for a worker", training.waiting),
            },
        )
    )


def training_service(settings: Settings) -> "TrainingService":
    """Return the service that runs trainings as commands on the same places and prices."""
    from service.training_service import TrainingService, trainer_command  # noqa: PLC0415

    return TrainingService(
        models_dir=settings.models_dir,
        database_url=settings.database,
        command=functools.partial(trainer_command, source=settings.source),
        environment=settings.child_environment(),
        workers=settings.training_workers,
        hours=settings.training_hours,
    )


class Drain:
    """Delays the signal that ends the server until nobody is left who would notice.

    Attributes
    ----------
    should_exit
        The end has begun. Streams of events look for this name at the signal's handler, and end.
    """

    def __init__(self, seconds: float, listening: socket.socket | None) -> None:
        self.should_exit = False
        self._seconds = seconds
        self._listening = listening
        self._end: Callable[[], object] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Take the place of the running server's handler; without one there is nothing to delay."""
        with contextlib.suppress(ValueError):  # not the main thread: no server of ours
            stop = signal.getsignal(signal.SIGTERM)
            if callable(stop) and hasattr(stop, "__self__"):
                self._end = functools.partial(stop, signal.SIGTERM, None)
                self._loop = asyncio.get_running_loop()
                signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Begin to end; at the second signal, end."""
        if self.should_exit:
            self._end()
            return
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        logger.info("ending: serving on for %g s", self._seconds)
        self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await asyncio.sleep(self._seconds)
        if self._listening is not None:
            refuse_new_connections(self._listening)
            await asyncio.sleep(SETTLE_S)
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


def edge_rules(settings: Settings) -> "EdgeRules":
    """Return what a request may cost, as the settings have it."""
    from service.edge import EdgeRules  # noqa: PLC0415

    return EdgeRules(
        rate_per_s=settings.rate_per_s,
        rate_burst=settings.rate_burst,
        work_threads=settings.work_threads,
        work_queue=settings.work_queue,
        deadline_s=settings.deadline_s,
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
    )


def settle_memory() -> None:
    """Take what the start left behind out of the garbage collector's sight.

    A full collection over the imported libraries takes about 0.1 s, in the middle of some answer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class LazyApplication:
    """An ASGI application that is built when the server first calls it, not when this module is imported."""

    def __init__(self, build: Callable[[], Application]) -> None:
        self._build = build
        self._built: Application | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection; a server opens with its start-up message."""
        if self._built is None:
            self._built = self._build()
        await self._built(scope, receive, send)


def build(settings: Settings) -> Application:
    """Return the application of a process that has not set up its log yet."""
    configure_logging(settings.log_level, settings.log_format)
    return create_app(settings)


app = LazyApplication(lambda: build(read_settings()))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description="Serve forecasts over HTTP.",
        epilog="Everything else is set in the environment or in .env: see .env.example.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, each with its own models (default: %(default)s)"
    )
    parser.add_argument(
        "--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo without it)"
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        help="where saved models lie (default: AI_STOCKS_MODELS_DIR, or saved_models)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it; requests in flight are answered first."""
    args = build_parser().parse_args(argv)
    given = {"source": args.source, "models_dir": args.models_dir}
    settings = read_settings().model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
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

    Raises
    ------
    UsageError
        If the address or the source cannot be used, or ``workers`` is less than 1.
    """
    if workers < 1:
        raise UsageError(f"--workers {workers} would serve nothing: choose 1 or more")
    configure_logging(settings.log_level, settings.log_format)
    with listen(host, port) as listening:
        if workers > 1:
            lazy = LazyApplication(functools.partial(build, settings))
            Workers(_config(lazy, settings, workers), listening, settings.drain_s).run()
            return 0
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


def _config(application: Application, settings: Settings, workers: int) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        workers=workers,
        # Without a configuration of its own, uvicorn logs where everything else does: to stderr.
        log_config=None,
        # The service writes a line of its own per request.
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.deadline_s) + 5,
    )


class Workers(Multiprocess):
    """Processes that share one socket; what the last of them would leave in its queue is not let in."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket, drain_s: float) -> None:
        super().__init__(config, [listening])
        self._listening = listening
        self._drain_s = drain_s

    def terminate_all(self) -> None:
        """Ask all workers to end; they accept connections until they do."""
        super().terminate_all()
        time.sleep(self._drain_s)
        refuse_new_connections(self._listening)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises
    ------
    UsageError
        If the address does not exist, is taken, or may not be used.
    """
    if not 0 <= port < 65_536:
        raise UsageError(f"port {port} does not exist: choose one from 0 to 65535 (0: any that is free)")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error}): choose another --host or --port"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
