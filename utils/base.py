"""What every room stands on: the errors, and what entry points share.

Every error that the product raises on purpose has the exit code of a command line that it ends; without one
of its own it has that of its parent. Codes 10 (`training.reproduce` found a difference) and 130 (interrupted)
raise nothing. A message says what is wrong, which value came, and what to do.

Entry points share deployment settings, the log, numbers of a command line and lines for other programs.
Algorithm parameters do not belong here: they are frozen dataclasses beside the code that uses them.
"""

import argparse
import json
import logging
import math
import os
import re
import select
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

if TYPE_CHECKING:
    from rich.console import Console
    from sqlalchemy import Engine

PROJECT_ROOT = Path(__file__).resolve().parents[1]
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# A line of the log is one line: what callers send cannot forge another, nor drive a terminal.
CONTROL_CHARACTERS = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
DEFAULT_ORIGINS = ("http://localhost:3000", "http://127.0.0.1:3000")

# Absolute paths of the server; routes of the API stay readable.
_PATH = re.compile(r"(?<![\w:/.])/(?!api/)(?:[^/\s'\"`]+/)+([^/\s'\"`]*)")


def without_paths(text: str) -> str:
    """Return what may be shown to a stranger: of an absolute path the last part."""
    return _PATH.sub(r"\1", text)


class AIStocksError(Exception):
    """Root of the tree; raised itself where nobody foresaw it, or for a bug."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class UsageError(AIStocksError, exit_code=2):
    """The caller asked for something impossible."""


class InvalidSymbolError(UsageError):
    """Not a symbol that any source could know."""


class JobMissingError(UsageError):
    """No training has that id."""


class DeviceError(UsageError, exit_code=9):
    """A GPU was asked for and cannot be used."""


class UpstreamError(AIStocksError, exit_code=3):
    """The price source is down, refuses, or answers nonsense; trying again later may help."""


class UnknownSymbolError(UpstreamError):
    """The source answers and does not know the symbol."""


class DataError(AIStocksError, exit_code=4):
    """The bars arrived and cannot be used."""


class InsufficientDataError(DataError):
    """Fewer bars than the task needs."""


class ModelError(AIStocksError, exit_code=5):
    """A saved model cannot be used."""


class ModelMissingError(ModelError):
    """No model was trained for the symbol."""


class ModelCorruptError(ModelError):
    """A file of the bundle is not the one that was saved."""


class ModelIncompatibleError(ModelError):
    """The bundle is whole and does not fit this installation."""


class ConflictError(AIStocksError, exit_code=6):
    """Somebody else holds it, or it is there already."""


class LockedError(ConflictError):
    """Another process holds the lock."""


class ModelExistsError(ConflictError):
    """A bundle is there and ``--overwrite`` was not given."""


class GateRefusedError(AIStocksError, exit_code=7):
    """The verdict refuses the model under ``--strict``; ``found`` is what a program should know of it."""

    def __init__(self, message: str, found: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.found = dict(found or {})


class CollapsedError(GateRefusedError):
    """A network's signal does not vary, or has one sign: there is nothing to judge, and nothing is saved."""


class StorageError(AIStocksError, exit_code=8):
    """The disk is full, read-only, or not writable."""


class OverloadError(AIStocksError):
    """All workers of the service are busy, and the queue before them is full."""


class DeadlineError(AIStocksError):
    """An answer of the service took longer than callers are kept waiting."""


def _split_commas(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


COMMAS = BeforeValidator(_split_commas)
Level = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(str.upper)]
Style = Literal["text", "json"]
# What people write, and the driver that is used.
DATABASES = {"sqlite": "sqlite"} | dict.fromkeys(
    ("postgresql", "postgres", "postgresql+psycopg"), "postgresql+psycopg"
)
DATABASE_FORMS = (
    "write sqlite:////FOLDER/FILE.sqlite, or postgresql://USER:PASSWORD@HOST/NAME with @, : and / in a part "
    "as %40, %3A and %2F"
)
# A server that is not there, or is gone without a word, is given up; two seconds are libpq's least.
CONNECTION = {"connect_timeout": 2, "keepalives_idle": 5, "keepalives_interval": 5, "tcp_user_timeout": 9_000}
Words = Annotated[tuple[str, ...], NoDecode, COMMAS]
ApiKey = Annotated[SecretStr, Field(min_length=16)]


class Settings(BaseSettings):
    """Each field is ``AI_STOCKS_<NAME>`` in the environment or ``.env``; ``.env.example`` explains them."""

    model_config = SettingsConfigDict(
        env_prefix="AI_STOCKS_",
        env_file=PROJECT_ROOT / ".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    source: str = "yahoo"
    news: str = ""
    finnhub_key: SecretStr | None = None
    models_dir: Path = PROJECT_ROOT / "saved_models"
    cache_dir: Path = PROJECT_ROOT / ".cache"
    results_dir: Path = PROJECT_ROOT / "backtest_results"
    logs_dir: Path = PROJECT_ROOT / "training_logs"
    database_url: str = ""
    training_workers: Annotated[int, Field(ge=1, le=64)] = 1
    training_hours: Annotated[float, Field(gt=0, le=720, allow_inf_nan=False)] = 24.0
    allow_origins: Annotated[Words, Field(validation_alias="PYTHON_API_ALLOW_ORIGINS")] = ()
    log_level: Level = "INFO"
    log_format: Style = "text"
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, COMMAS] = ()
    rate_per_s: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 100.0
    rate_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, COMMAS] = ()
    work_threads: Annotated[int, Field(ge=1, le=64)] = 4
    work_queue: Annotated[int, Field(ge=0, le=10_000)] = 64
    deadline_s: Annotated[float, Field(gt=0, le=3_600, allow_inf_nan=False)] = 30.0
    drain_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 2.0

    @property
    def database(self) -> str:
        """Address of the database."""
        return self.database_url or f"sqlite:///{self.models_dir.resolve() / 'ai_stocks.sqlite'}"

    def child_environment(self) -> dict[str, str]:
        """Return the environment in which a command of the project works on the same places."""
        folders = ("models_dir", "cache_dir", "results_dir", "logs_dir")
        places = {f"AI_STOCKS_{name.upper()}": str(getattr(self, name).resolve()) for name in folders}
        paths = (str(PROJECT_ROOT), os.environ.get("PYTHONPATH", ""))
        return {
            **os.environ,
            **places,
            "AI_STOCKS_SOURCE": self.source,
            "AI_STOCKS_LOG_LEVEL": self.log_level,
            "AI_STOCKS_LOG_FORMAT": "text",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def origins(self) -> tuple[str, ...]:
        """All origins that browsers may call from."""
        return (*DEFAULT_ORIGINS, *self.allow_origins)


def read_settings() -> Settings:
    """Read the settings of an entry point; end it with exit code 2 where the environment makes no sense."""
    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors():
            name = str(wrong["loc"][0])
            variable = name if name.isupper() else f"AI_STOCKS_{name.upper()}"
            came = "" if name == "api_keys" else f"={wrong['input']!r}"
            sys.stderr.write(f"error: {variable}{came}: {wrong['msg']}\n")
        raise SystemExit(2) from error


def can_write_in(folder: Path) -> bool:
    """Say whether files can be written in a folder, which is made where there is none."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False


class TextFormatter(logging.Formatter):
    """A line of text per record, with control characters escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the standard library's name
        """Return the record's line."""
        if not record.message.isprintable():
            record.message = record.message.translate(CONTROL_CHARACTERS)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """A JSON object per record: time, level, logger, message, the record's ``fields``, and what failed."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        time, said = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), record.getMessage()
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": said}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str = "INFO", style: Style = "text") -> None:
    """Send log lines to stderr, so that stdout stays the result."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter(LOG_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Keep off stderr what a library's own native code writes; told after all where it ends in an error."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as aside:
        kept = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(kept, aside.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def json_lines(path: str) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Write objects for another program, one a line; this process ends when nobody listens any more.

    ``path`` is a file, or a pipe such as ``/dev/fd/5``. Figures that are not finite are left out, since they
    are no JSON. Raises `UsageError` if it cannot be written, or is a pipe that nobody reads.
    """
    try:
        # A pipe without a reader would be waited for without end.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        words = f"{path} cannot be written ({error.strerror}): name a file or an open pipe"
        raise UsageError(words) from error
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as stream:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            threading.Thread(target=_end_with_listener, args=(descriptor,), daemon=True).start()

        def write(content: Mapping[str, object]) -> None:
            finite = {k: v for k, v in content.items() if not isinstance(v, float) or math.isfinite(v)}
            try:
                stream.write(json.dumps(finite, default=str) + "\n")
            except OSError as error:
                logging.getLogger(__name__).debug("nobody takes down %s: %s", content, error)

        yield write


def _end_with_listener(descriptor: int) -> None:
    """Wait until the other end of a pipe is closed, and end this process with all that it has started."""
    watched = select.poll()
    watched.register(descriptor, 0)
    if watched.poll() and threading.main_thread().is_alive():
        # Only who leads a group may end it: others are in that of a shell.
        os.kill(-os.getpid() if os.getpgrp() == os.getpid() else os.getpid(), signal.SIGKILL)


def at_least(lowest: int, highest: int = sys.maxsize) -> Callable[[str], int]:
    """Return a reader of whole numbers of the command line within limits."""

    def read(text: str) -> int:
        if text.isdecimal() and lowest <= int(text) <= highest:
            return int(text)
        upper = "" if highest == sys.maxsize else f" and at most {highest}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}{upper}")

    return read


def session(text: str) -> datetime:
    """Read a date of the command line; words such as ``now`` are none."""
    try:
        return datetime.strptime(text, "%Y-%m-%d")  # noqa: DTZ007 sessions have no time zone
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write YYYY-MM-DD") from error


def below(limit: float) -> Callable[[str], float]:
    """Return a reader of numbers of the command line from 0 to below a limit."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if 0 <= float(text) < limit:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below {limit}")

    return read


def run_command(work: Callable[[Settings], object], *, quiet: bool = False) -> int:
    """Do the work of a command line, with warnings alone in the log if ``quiet``; return its exit code."""
    settings = read_settings()
    configure_logging("WARNING" if quiet else settings.log_level)
    try:
        work(settings)
    except AIStocksError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def database_engine(url: str, wait_s: float) -> "Engine":
    """Return an engine for many threads, which waits ``wait_s`` for who holds a lock.

    Raises `UsageError` if ``url`` names neither a SQLite file nor a PostgreSQL server.
    """
    # Only who keeps something pays for the library.
    import sqlalchemy as sql  # noqa: PLC0415

    try:
        address = sql.make_url(url)
        address = address.set(drivername=DATABASES[address.drivername])
        place, file = f"{address.host}{address.database}", address.database or ":memory:"
    except (sql.exc.ArgumentError, LookupError, ValueError) as error:
        # Not its own words: they may hold the address, and with it a password.
        raise UsageError(f"AI_STOCKS_DATABASE_URL names no database: {DATABASE_FORMS}") from error
    limits: dict[str, object] = {"timeout": wait_s}
    if address.drivername == "sqlite":
        # In memory each connection would have a database of its own; options are no part of a file's name.
        is_file = file != ":memory:" and not file.startswith("file:") and "\0" not in file
        if not is_file or address != sql.URL.create("sqlite", database=file):
            raise UsageError(f"AI_STOCKS_DATABASE_URL names no file: {DATABASE_FORMS}")
    else:
        if "@" in place:
            # The rest of a password would be taken for the host, and shown.
            raise UsageError(f"AI_STOCKS_DATABASE_URL has an @ too many: {DATABASE_FORMS}")
        # Who is gone in the middle of a change is forgotten, and with him his lock.
        options = f"-c lock_timeout={wait_s * 1e3:.0f} -c idle_in_transaction_session_timeout=10000"
        limits = {name: value for name, value in CONNECTION.items() if name not in address.query}
        limits |= {"options": f"{options} {address.query.get('options', '')}", "client_encoding": "utf8"}
    try:
        # As many connections as there are threads; a few stay open.
        return sql.create_engine(
            address, connect_args=limits, poolclass=sql.QueuePool, max_overflow=-1, pool_pre_ping=True
        )
    except ImportError as error:
        words = 'AI_STOCKS_DATABASE_URL needs the driver psycopg: pip install ".[postgres]"'
        raise UsageError(words) from error


def print_rows(console: "Console", rows: Sequence[Mapping[str, object]]) -> None:
    """Print records that have the same names as a table."""
    # Only who prints a table pays for the library.
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        cells = (f"{c:.4g}" if isinstance(c, float) else str("" if c is None else c) for c in row.values())
        table.add_row(*map(escape, cells))
    console.print(table)
