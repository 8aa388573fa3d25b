"""What the queue of trainings stands on: the jobs in the database, and the process of the one that runs."""

import logging
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from pydantic import ValidationError
from sqlalchemy import exc
from sqlalchemy.schema import CreateIndex, CreateTable

from service.schemas import (
    JobStatus,
    TrainingEvent,
    TrainingEventType,
    TrainingJob,
    TrainingJobMetrics,
    TrainingParams,
)
from utils.errors import StorageError, UsageError, without_paths

logger = logging.getLogger(__name__)

ACTIVE: tuple[JobStatus, ...] = ("queued", "running")
DATABASE_WAIT_S = 10.0
# A trainer that is asked to end has so long before it is made to.
GRACE_S, NICENESS = 5.0, 10
CANCELLED = "cancelled: nothing was saved"
TOO_LATE = "the model was saved before the training could be cancelled"
CHUNK_BYTES, LINE_BYTES, MESSAGE_CHARS, TAIL_LINES, LOGS_AT_A_TIME = 1 << 16, 1 << 13, 1_000, 5, 50
EVENTS_AT_A_TIME, KEPT_LOGS, KEPT_EVENTS, KEPT_JOBS = 1_000, 1_000, 12_000, 500


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJob:
    """A job as the database has it.

    Attributes
    ----------
    state
        What is told of it.
    params
        What was asked for.
    pid, born
        The process that trains, see `birth`.
    cancel
        Whether somebody wants it to end.
    """

    state: TrainingJob
    params: TrainingParams
    pid: int | None
    born: str | None
    cancel: bool


_METADATA = sql.MetaData()
_JOBS = sql.Table(
    "training_jobs",
    _METADATA,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String(32), nullable=False, unique=True),
    sql.Column("home", sql.String(1024), nullable=False),
    sql.Column("symbol", sql.String(32), nullable=False),
    sql.Column("status", sql.String(16), nullable=False),
    sql.Column("params", sql.Text, nullable=False),
    sql.Column("state", sql.Text, nullable=False),
    sql.Column("pid", sql.Integer),
    sql.Column("born", sql.String(64)),
    sql.Column("cancel", sql.Boolean, nullable=False, default=False),
)
_IS_ACTIVE = _JOBS.c.status.in_(ACTIVE)
sql.Index(
    "training_jobs_one_at_a_time",
    _JOBS.c.home,
    _JOBS.c.symbol,
    unique=True,
    sqlite_where=_IS_ACTIVE,
    postgresql_where=_IS_ACTIVE,
)
_EVENTS = sql.Table(
    "training_events",
    _METADATA,
    sql.Column("job_id", sql.String(32), primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("type", sql.String(16), nullable=False),
    sql.Column("text", sql.Text, nullable=False),
)


class JobStore:
    """The jobs of one folder of models; safe to use from many threads and processes.

    Parameters
    ----------
    url
        Of the database, which is not touched before the first job.
    home
        The folder of models.

    Raises
    ------
    UsageError
        If the URL makes no sense, or its driver is not installed.
    """

    def __init__(self, url: str, home: Path) -> None:
        try:
            address = sql.make_url(url)
            is_file = address.get_backend_name() == "sqlite"
            self._engine = sql.create_engine(
                address, connect_args={"timeout": DATABASE_WAIT_S} if is_file else {}
            )
        except (exc.ArgumentError, ModuleNotFoundError, ValueError) as error:
            raise UsageError(
                f"AI_STOCKS_DATABASE_URL cannot be used ({type(error).__name__}): write "
                "sqlite:////FOLDER/FILE.sqlite, or postgresql+psycopg://HOST/NAME with psycopg installed"
            ) from error
        self._file = Path(str(address.database)) if is_file else None
        self._home = str(home.resolve())
        self._is_ready = False

    @contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        try:
            self._prepare()
            with self._engine.begin() as connection:
                yield connection
        except (exc.SQLAlchemyError, OSError) as error:
            self._is_ready = False
            words = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0][:200]
            raise StorageError(f"the list of trainings cannot be used ({words}): try again") from error

    def _prepare(self) -> None:
        if self._is_ready:
            return
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        # `create_all` looks first and creates then: two at a time would both create.
        with self._engine.begin() as connection:
            for table in _METADATA.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in table.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))
        self._is_ready = True

    def add(self, state: TrainingJob, params: TrainingParams) -> bool:
        """Queue a job; return False if its symbol has one that is queued or runs."""
        with self._transaction() as connection:
            row = {"id": state.id, "home": self._home, "symbol": state.symbol, "status": state.status}
            texts = {"state": wire_text(state), "params": wire_text(params)}
            try:
                number = connection.execute(sql.insert(_JOBS).values(**row, **texts)).inserted_primary_key
            except exc.IntegrityError:
                connection.rollback()
                return False
            self._tell(connection, state.id, [event_of(state, "stage", stage="queued")])
            old = (_JOBS.c.number <= (number or (0,))[0] - KEPT_JOBS) & ~_IS_ACTIVE
            ids = sql.select(_JOBS.c.id).where(old)
            connection.execute(sql.delete(_EVENTS).where(_EVENTS.c.job_id.in_(ids)))
            connection.execute(sql.delete(_JOBS).where(old))
        return True

    def jobs(self, *, job_id: str | None = None, status: JobStatus | None = None) -> list[StoredJob]:
        """Return the wanted jobs, oldest first."""
        if self._file is not None and not self._file.exists():
            return []
        wanted = sql.select(_JOBS).where(_JOBS.c.home == self._home).order_by(_JOBS.c.number)
        if job_id is not None:
            wanted = wanted.where(_JOBS.c.id == job_id)
        if status is not None:
            wanted = wanted.where(_JOBS.c.status == status)
        with self._transaction() as connection:
            found = connection.execute(wanted).mappings().all()
        read = (_read(row) for row in found)
        return [job for job in read if job is not None]

    def change(self, state: TrainingJob, events: Sequence[TrainingEvent], *, was: JobStatus) -> bool:
        """Replace what is told of a job and add to its history, unless its status is not ``was`` any more."""
        wanted = (_JOBS.c.id == state.id) & (_JOBS.c.status == was)
        with self._transaction() as connection:
            change = sql.update(_JOBS).where(wanted).values(status=state.status, state=wire_text(state))
            if connection.execute(change).rowcount != 1:
                return False
            self._tell(connection, state.id, events)
        return True

    def note(self, job_id: str, **columns: int | str | None) -> None:
        """Write down the process of a job, or that somebody wants it to end."""
        with self._transaction() as connection:
            connection.execute(sql.update(_JOBS).where(_JOBS.c.id == job_id).values(**columns))

    def history(self, job_id: str, after: int) -> list[tuple[int, str, str]]:
        """Return number, type and JSON of the events that came after the one of that number."""
        columns = (_EVENTS.c.number, _EVENTS.c.type, _EVENTS.c.text)
        wanted = sql.select(*columns).where((_EVENTS.c.job_id == job_id) & (_EVENTS.c.number > after))
        with self._transaction() as connection:
            found = connection.execute(wanted.order_by(_EVENTS.c.number).limit(EVENTS_AT_A_TIME))
            return [(int(number), str(kind), str(text)) for number, kind, text in found]

    def _tell(self, connection: sql.Connection, job_id: str, events: Sequence[TrainingEvent]) -> None:
        if not events:
            return
        of_job, number = _EVENTS.c.job_id == job_id, _EVENTS.c.number
        last = connection.scalar(sql.select(sql.func.max(number)).where(of_job)) or 0
        rows = [
            {"job_id": job_id, "number": last + i, "type": event.type, "text": wire_text(event)}
            for i, event in enumerate(events, start=1)
        ]
        connection.execute(sql.insert(_EVENTS), rows)
        # Log lines may come without end; of an epoch the page's chart wants every one.
        old_log = (_EVENTS.c.type == "log") & (number <= last - KEPT_LOGS)
        connection.execute(sql.delete(_EVENTS).where(of_job & (old_log | (number <= last - KEPT_EVENTS))))


def _read(row: sql.RowMapping) -> StoredJob | None:
    try:
        return StoredJob(
            state=TrainingJob.model_validate_json(row["state"]),
            params=TrainingParams.model_validate_json(row["params"]),
            pid=row["pid"],
            born=row["born"],
            cancel=row["cancel"],
        )
    except ValidationError:
        # Written by another release; one such row must not stop the queue.
        logger.warning("job %s is left out: this release cannot read it", row["id"])
        return None


def wire_text(wire: TrainingJob | TrainingParams | TrainingEvent) -> str:
    """Return the JSON that is kept and sent; of parameters only what the caller gave."""
    return wire.model_dump_json(
        by_alias=True, exclude_unset=isinstance(wire, TrainingParams), exclude_none=True
    )


def now() -> str:
    """Return the present as the wire writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def event_of(
    state: TrainingJob, kind: TrainingEventType, *, stage: str | None = None, message: str | None = None
) -> TrainingEvent:
    """Return an event of the present about a job."""
    return TrainingEvent(
        type=kind,
        status=state.status,
        progress=state.progress,
        stage=stage,
        message=message,
        timestamp=now(),
    )


def end_of(state: TrainingJob, words: str | None) -> TrainingEvent:
    """Return the last event of a job that has ended."""
    kinds: Mapping[JobStatus, TrainingEventType] = {"completed": "completed", "cancelled": "cancelled"}
    return event_of(state, kinds.get(state.status, "failed"), message=words)


class Told:
    """What a running job has told and the database does not have yet; bounded, whatever is told."""

    def __init__(self, state: TrainingJob) -> None:
        self.state = state
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.last_words: str | None = None
        self._events: deque[TrainingEvent] = deque(maxlen=EVENTS_AT_A_TIME)
        self._logs = 0

    def take(self, kind: str, line: str) -> None:
        """Take a line that the trainer wrote."""
        try:
            event = TrainingEvent.model_validate_json(line) if kind == "event" else None
        except ValidationError:
            event = None
        if event is None:
            self._log(without_paths(line)[:MESSAGE_CHARS])
        elif event.type in {"completed", "failed"}:
            # Whether it did is for its exit code to say.
            self.last_words = without_paths(event.message or "")[:MESSAGE_CHARS] or None
        elif event.type == "log":
            self._log(without_paths(event.message or "")[:MESSAGE_CHARS])
        elif event.type in {"stage", "epoch"}:
            self._advance(event)

    def _advance(self, event: TrainingEvent) -> None:
        stage = None if event.stage is None else event.stage[:MESSAGE_CHARS]
        seen: dict[str, Any] = {"progress": event.progress, "current_step": stage or self.state.current_step}
        if event.epoch is not None:
            seen |= {"current_epoch": event.epoch}
        if event.total_epochs is not None:
            seen |= {"total_epochs": event.total_epochs}
        measures = {name: getattr(event, name) for name in TrainingJobMetrics.model_fields}
        if None not in measures.values():
            seen |= {"metrics": TrainingJobMetrics(**measures)}
        self.state = self.state.model_copy(update=seen)
        known = {"status": "running", "stage": stage, "timestamp": event.timestamp or now()}
        self._events.append(event.model_copy(update=known))

    def _log(self, text: str) -> None:
        # Of a traceback only what it says: the rest is for the server's eyes.
        if not text.startswith((" ", "Traceback")):
            self.tail.append(text)
        self._logs += 1
        if self._logs <= LOGS_AT_A_TIME:
            self._events.append(event_of(self.state, "log", message=text))

    def events(self) -> list[TrainingEvent]:
        """Return what came since the last call."""
        if self._logs > LOGS_AT_A_TIME:
            left_out = f"{self._logs - LOGS_AT_A_TIME} more lines are left out"
            self._events.append(event_of(self.state, "log", message=left_out))
        self._logs, found = 0, list(self._events)
        self._events.clear()
        return found


def ended(state: TrainingJob, status: JobStatus, words: str) -> TrainingJob:
    """Return a job as it is after its end."""
    seen: dict[str, Any] = {"status": status, "completed_at": now(), "current_step": status}
    seen |= {"progress": 1.0} if status == "completed" else {}
    return state.model_copy(update=seen | ({"error": words} if status == "failed" else {}))


def outcome_of(code: int | None, reason: str | None, told: Told, *, saved: bool) -> tuple[JobStatus, str]:
    """Return what became of a job, and say it."""
    if code == 0:
        return "completed", told.last_words or "completed"
    if reason == CANCELLED:
        return ("completed", TOO_LATE) if saved else ("cancelled", CANCELLED)
    if reason is not None:
        return "failed", reason
    said = told.last_words or "; ".join(told.tail) or "it said nothing"
    return "failed", f"the trainer {_how(code)}: {said}"


def _how(code: int | None) -> str:
    if code is None:
        return "cannot be ended"
    if code > 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{' (out of memory, or by somebody)' if name == 'SIGKILL' else ''}"


class Lines:
    """Cuts bytes into lines; what goes beyond `LINE_BYTES` of one is thrown away."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that ``data`` ends; without any, what is left."""
        *whole, rest = (self._rest + (data or b"\n")).replace(b"\r", b"\n").split(b"\n")
        self._rest = rest[:LINE_BYTES]
        texts = (line[:LINE_BYTES].decode(errors="replace").rstrip() for line in whole)
        return [text for text in texts if text]


class TrainerProcess:
    """A command in a session of its own, read without ever waiting for it.

    Parameters
    ----------
    command_of
        Returns the command, given the path to which it writes its events.
    environment
        Of the command.

    Raises
    ------
    OSError
        If it cannot be started.
    """

    def __init__(self, command_of: Callable[[str], Sequence[str]], environment: Mapping[str, str]) -> None:
        events, end = os.pipe()
        self._events = os.fdopen(events, "rb", buffering=0)
        try:
            self._child = subprocess.Popen(  # noqa: S603  the command is ours, its values are checked
                command_of(f"/dev/fd/{end}"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(end,),
                start_new_session=True,
                env=dict(environment),
                bufsize=0,
            )
        except BaseException:
            self._events.close()
            raise
        finally:
            os.close(end)
        # Whoever asks for a forecast comes first.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._child.pid, NICENESS)
        self.pid, self.born = self._child.pid, birth(self._child.pid)
        self._has_ended = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._events, selectors.EVENT_READ, ("event", Lines()))
        if self._child.stdout is not None:
            self._selector.register(self._child.stdout, selectors.EVENT_READ, ("log", Lines()))

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the number of the signal that ended it, or None while it runs."""
        return self._child.poll()

    def read(self, timeout_s: float) -> Iterator[tuple[str, str]]:
        """Yield what was written since, as ``("event" | "log", line)``; wait so long for the first of it."""
        if not self._selector.get_map():
            time.sleep(timeout_s)
        for key, _ in self._selector.select(timeout_s):
            kind, lines = key.data
            data = os.read(key.fd, CHUNK_BYTES)
            if not data:
                self._selector.unregister(key.fileobj)
            for line in lines.feed(data):
                yield kind, line

    def rest(self) -> Iterator[tuple[str, str]]:
        """Yield what is still to be read of a group that has ended; see `read`."""
        until = time.monotonic() + 1.0
        while self._selector.get_map() and time.monotonic() < until:
            yield from self.read(0.0)

    def end(self) -> None:
        """End the whole group, even where its leader has ended; see `end_group`."""
        # Once its parts are gone, the id may become that of another group.
        if not self._has_ended:
            end_group(self.pid, self._child.poll)
            # What a broken disk or driver holds in the kernel, nothing ends: the queue goes on without it.
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(GRACE_S)
            self._has_ended = True

    def close(self) -> None:
        """Make sure of the end, and give the pipes back."""
        self.end()
        self._selector.close()
        self._events.close()
        if self._child.stdout is not None:
            self._child.stdout.close()


def end_group(group: int, reap: Callable[[], object] = lambda: None) -> None:
    """End a group of processes: politely, and after `GRACE_S` not."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 1.0)):
        until, sent = time.monotonic() + patience_s, int(number)
        while time.monotonic() < until:
            try:
                os.killpg(group, sent)
            except (ProcessLookupError, PermissionError):
                return
            # From now on only asked whether it is there.
            sent = 0
            reap()
            time.sleep(0.02)


def birth(pid: int) -> str | None:
    """Return what tells a process from a later one with the same id; None where there is no such process."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:36]}/{started}"
    except (OSError, IndexError):
        pass
    try:
        command = ("ps", "-o", "lstart=", "-p", str(pid))
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
