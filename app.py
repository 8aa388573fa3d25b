"""Composition root of the service: settings, registry, prediction service, web application.

::

    python app.py --host 127.0.0.1 --port 8000
    uvicorn app:app

Importing this module reads no setting and loads nothing; both happen when the server starts.
"""

import argparse
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from utils.errors import AIStocksError, UsageError
from utils.settings import Settings, configure_logging

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

# After the start a collection walks only what requests leave behind; the thresholds make it rare.
GC_THRESHOLDS = (10_000, 20, 100)


def create_app(settings: Settings) -> Application:
    """Wire the service together into an ASGI application.

    Parameters
    ----------
    settings
        Where models and prices lie, and who may ask.

    Raises
    ------
    UsageError
        If ``settings.source`` names no source.
    """
    # These rooms import every learner of the project: `--help` and the import of `app` need none of them.
    from data.cache_manager import BarCache  # noqa: PLC0415
    from data.data_fetcher import make_source  # noqa: PLC0415
    from service.api import Services, create_api  # noqa: PLC0415
    from service.model_registry import ModelRegistry  # noqa: PLC0415
    from service.prediction_service import PredictionService  # noqa: PLC0415
    from service.training_service import TrainingService, trainer_command  # noqa: PLC0415

    registry = ModelRegistry(settings.models_dir)
    training = TrainingService(
        models_dir=settings.models_dir,
        database_url=settings.database,
        command=partial(trainer_command, source=settings.source),
        environment=settings.child_environment(),
        workers=settings.training_workers,
        hours=settings.training_hours,
    )
    source = make_source(settings.source, cache_dir=settings.cache_dir)
    predictions = PredictionService(registry=registry, source=source, cache=BarCache(settings.cache_dir))
    return create_api(
        Services(
            registry=registry,
            predictions=predictions,
            training=training,
            source_name=source.name,
            origins=settings.origins,
            on_start=settle_memory,
        )
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


app = LazyApplication(lambda: create_app(Settings()))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python app.py", description="Serve forecasts over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo without it)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal ends it; requests in flight are answered first."""
    args = build_parser().parse_args(argv)
    try:
        settings = Settings() if args.source is None else Settings(source=args.source)
        configure_logging(settings.log_level)
        application = create_app(settings)
        listening = listen(args.host, args.port)
    except AIStocksError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    import uvicorn  # noqa: PLC0415

    # The server raises the signal that ended it once more when it is done: an orderly end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Without a configuration of its own, uvicorn logs where everything else does: to stderr.
    server = uvicorn.Server(uvicorn.Config(application, log_config=None))
    with listening, contextlib.suppress(KeyboardInterrupt):
        logger.info("serving %s prices on http://%s:%d", settings.source, *listening.getsockname()[:2])
        server.run(sockets=[listening])
    return 0


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
