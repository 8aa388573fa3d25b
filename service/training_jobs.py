"""What the queue of trainings stands on: jobs in the database, what is told of them, and their processes."""

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sql
from pydantic import ValidationError
from sqlalchemy import exc, orm
from sqlalchemy.schema import CreateIndex, CreateTable

from service.schemas import JobStatus, TrainingEvent, TrainingJob, TrainingJobMetrics, TrainingParams
from utils.errors import ConflictError, StorageError, UsageError, without_paths

ACTIVE = ("queued", "running")
DATABASE_WAIT_S = 10.0
# A trainer that is asked to end has so long before it is made to.
GRACE_S, NICENESS = 5.0, 10
LINE_CHARS, MESSAGE_CHARS, TAIL_LINES, LOGS_AT_A_TIME = 1 << 13, 1_000, 5, 50
EVENTS_AT_A_TIME, KEPT_LOGS, KEPT_EVENTS, KEPT_JOBS = 1_000, 1_000, 12_000, 500


class Base(orm.DeclarativeBase):
    """The tables of this module."""


class _WireText(sql.TypeDecorator[Any]):
    """A part of the wire as JSON; None where another release wrote what this one cannot read."""

    impl, cache_ok = sql.Text, True

    def __init__(self, model: type[TrainingJob | TrainingParams]) -> None:
        super().__init__()
        self.model = model

    def process_bind_param(self, value: Any, dialect: sql.Dialect) -> str:  # noqa: ANN401
        return wire_text(value)

    def process_result_value(self, value: Any, dialect: sql.Dialect) -> Any:  # noqa: ANN401
        with suppress(ValidationError):
            return self.model.model_validate_json(value)
        return None


class Job(Base):
    """A job: what is told of it, the process that trains (see `birth`), whether somebody wants it to end."""

    __tablename__ = "training_jobs"
    __table_args__ = (
        sql.Index(
            "training_jobs_one_at_a_time",
            "home",
            "symbol",
            unique=True,
            sqlite_where=sql.text(f"status IN {ACTIVE}"),
            postgresql_where=sql.text(f"status IN {ACTIVE}"),
        ),
    )

    number: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    id: orm.Mapped[str] = orm.mapped_column(unique=True)
    home: orm.Mapped[str]
    symbol: orm.Mapped[str]
    status: orm.Mapped[str]
    params: orm.Mapped[TrainingParams] = orm.mapped_column(_WireText(TrainingParams))
    state: orm.Mapped[TrainingJob] = orm.mapped_column(_WireText(TrainingJob))
    pid: orm.Mapped[int | None]
    born: orm.Mapped[str | None]
    cancel: orm.Mapped[bool] = orm.mapped_column(default=False)


class Event(Base):
    """An event of a job, as it is sent."""

    __tablename__ = "training_events"

    job_id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    number: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    type: orm.Mapped[str]
    text: orm.Mapped[str] = orm.mapped_column(sql.Text)


class JobStore:
    """The jobs of one folder of models; safe to use from many threads and processes."""

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
    def _session(self) -> Iterator[orm.Session]:
        try:
            if not self._is_ready:
                self._create_tables()
            with orm.Session(self._engine, expire_on_commit=False) as session, session.begin():
                yield session
        except (exc.SQLAlchemyError, OSError) as error:
            self._is_ready = False
            words = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0][:200]
            raise StorageError(f"the list of trainings cannot be used ({words}): try again") from error

    def _create_tables(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        tables = Base.metadata.sorted_tables
        indices = [index for table in tables for index in table.indexes]
        # `create_all` looks first and creates then: two at a time would both create.
        with self._engine.begin() as connection:
            for table in tables:
                connection.execute(CreateTable(table, if_not_exists=True))
            for index in indices:
                connection.execute(CreateIndex(index, if_not_exists=True))
        self._is_ready = True

    def add(self, state: TrainingJob, params: TrainingParams) -> None:
        """Queue a job; raise `ConflictError` if its symbol has one that is queued or runs."""
        job = Job(
            id=state.id, home=self._home, symbol=state.symbol, status=state.status, params=params, state=state
        )
        with self._session() as session:
            session.add(job)
            try:
                session.flush()
            except exc.IntegrityError as error:
                words = f"{state.symbol} was queued by somebody else"
                raise ConflictError(f"{words}: GET /api/training lists what there is") from error
            self._tell(session, state.id, [event_of(state, "stage", stage="queued")])
            is_old = (Job.number <= job.number - KEPT_JOBS) & Job.status.not_in(ACTIVE)
            session.execute(sql.delete(Event).where(Event.job_id.in_(sql.select(Job.id).where(is_old))))
            session.execute(sql.delete(Job).where(is_old))

    def jobs(self, *wanted: sql.ColumnElement[bool]) -> list[Job]:
        """Return the wanted jobs, oldest first."""
        if self._file is not None and not self._file.exists():
            return []
        with self._session() as session:
            found = session.scalars(
                sql.select(Job).where(Job.home == self._home, *wanted).order_by(Job.number)
            )
            return [job for job in found if job.state and job.params]

    def change(self, state: TrainingJob, events: Sequence[TrainingEvent], *, was: JobStatus) -> bool:
        """Replace what is told of a job and add to its history, unless its status is not ``was`` any more."""
        wanted = sql.update(Job).where(Job.id == state.id, Job.status == was)
        with self._session() as session:
            done = session.connection().execute(wanted.values(status=state.status, state=state)).rowcount == 1
            if done:
                self._tell(session, state.id, events)
        return done

    def note(self, job_id: str, columns: Mapping[str, object]) -> None:
        """Write down the process of a job, or that somebody wants it to end."""
        with self._session() as session:
            session.execute(sql.update(Job).where(Job.id == job_id).values(columns))

    def history(self, job_id: str, after: int) -> list[tuple[int, str, str]]:
        """Return number, type and JSON of the events that came after the one of that number."""
        wanted = sql.select(Event).where(Event.job_id == job_id, Event.number > after)
        with self._session() as session:
            found = session.scalars(wanted.order_by(Event.number).limit(EVENTS_AT_A_TIME))
            return [(event.number, event.type, event.text) for event in found]

    def _tell(self, session: orm.Session, job_id: str, events: Sequence[TrainingEvent]) -> None:
        of_job = Event.job_id == job_id
        last = session.scalar(sql.select(sql.func.max(Event.number)).where(of_job)) or 0
        session.add_all(
            Event(job_id=job_id, number=number, type=event.type, text=wire_text(event))
            for number, event in enumerate(events, start=last + 1)
        )
        # Log lines may come without end; of an epoch the page's chart wants every one.
        old_log = (Event.type == "log") & (Event.number <= last - KEPT_LOGS)
        session.execute(sql.delete(Event).where(of_job, old_log | (Event.number <= last - KEPT_EVENTS)))


def wire_text(wire: TrainingJob | TrainingParams | TrainingEvent) -> str:
    """Return the JSON that is kept and sent; of parameters only what the caller gave."""
    return wire.model_dump_json(
        by_alias=True, exclude_unset=isinstance(wire, TrainingParams), exclude_none=True
    )


def now() -> str:
    """Return the present as the wire writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def event_of(
    state: TrainingJob, kind: str, *, stage: str | None = None, message: str | None = None
) -> TrainingEvent:
    """Return an event of the present about a job."""
    told = {"status": state.status, "progress": state.progress, "timestamp": now()}
    return TrainingEvent.model_validate({"type": kind, "stage": stage, "message": message, **told})


def ended(state: TrainingJob, status: JobStatus, words: str) -> tuple[TrainingJob, TrainingEvent]:
    """Return a job as it is after its end, and the event that says so."""
    seen: dict[str, Any] = {"status": status, "completed_at": now(), "current_step": status}
    seen |= {"progress": 1.0} if status == "completed" else {}
    seen |= {"error": words} if status == "failed" else {}
    last = state.model_copy(update=seen)
    return last, event_of(last, status, message=words)


class Told:
    """What a running job has told and the database does not have yet; bounded, whatever is told."""

    def __init__(self, state: TrainingJob) -> None:
        self.state = state
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.last_words = ""
        self._events: deque[TrainingEvent] = deque(maxlen=EVENTS_AT_A_TIME)
        self._logs = 0
        self._lock = threading.Lock()

    def take(self, kind: str, line: str) -> None:
        """Take a line that the trainer wrote, an ``"event"`` or of the ``"log"``."""
        event = None
        if kind == "event":
            with suppress(ValidationError):
                event = TrainingEvent.model_validate_json(line)
        text = without_paths(line if event is None else event.message or "")[:MESSAGE_CHARS]
        with self._lock:
            if event is None or event.type == "log":
                self._log(text)
            elif event.type in {"completed", "failed"}:
                # Whether it did is for its exit code to say.
                self.last_words = text
            elif event.type in {"stage", "epoch"}:
                self._advance(event)

    def _advance(self, event: TrainingEvent) -> None:
        stage = None if event.stage is None else event.stage[:MESSAGE_CHARS]
        measures = event.model_dump(include=set(TrainingJobMetrics.model_fields))
        seen = {
            "progress": event.progress,
            "current_step": stage,
            "current_epoch": event.epoch,
            "total_epochs": event.total_epochs,
            "metrics": None if None in measures.values() else TrainingJobMetrics(**measures),
        }
        self.state = self.state.model_copy(update={k: v for k, v in seen.items() if v is not None})
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
        with self._lock:
            if self._logs > LOGS_AT_A_TIME:
                left_out = f"{self._logs - LOGS_AT_A_TIME} more lines are left out"
                self._events.append(event_of(self.state, "log", message=left_out))
            self._logs, found = 0, list(self._events)
            self._events.clear()
        return found

    def outcome(self, code: int | None) -> tuple[JobStatus, str]:
        """Return what became of a trainer that ended by itself, and say it."""
        if code == 0:
            return "completed", self.last_words or "completed"
        how = "cannot be ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            how = f"was killed by {name}{' (out of memory, or by somebody)' * (name == 'SIGKILL')}"
        return "failed", f"the trainer {how}: {self.last_words or '; '.join(self.tail) or 'it said nothing'}"


def start_trainer(
    command_of: Callable[[str], Sequence[str]],
    environment: Mapping[str, str],
    take: Callable[[str, str], None],
) -> tuple[subprocess.Popen[str], list[threading.Thread]]:
    """Start a command in a session of its own, and threads that take down its lines until it is silent.

    ``command_of`` returns the command, given the path to which it writes its events; see `Told.take` for
    ``take``. Raises `OSError` if it cannot be started.
    """

    def take_down(kind: str, stream: IO[str]) -> threading.Thread:
        def read_all() -> None:
            with stream:
                for line in lines_of(stream):
                    take(kind, line)

        thread = threading.Thread(target=read_all, daemon=True)
        thread.start()
        return thread

    read, write = os.pipe()
    try:
        readers = [take_down("event", os.fdopen(read, encoding="utf-8", errors="replace"))]
        child = subprocess.Popen(  # noqa: S603  the command is ours, its values are checked
            command_of(f"/dev/fd/{write}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            start_new_session=True,
            env=dict(environment),
            encoding="utf-8",
            errors="replace",
        )
    finally:
        os.close(write)
    readers += [] if child.stdout is None else [take_down("log", child.stdout)]
    # Whoever asks for a forecast comes first.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)
    return child, readers


def lines_of(stream: IO[str]) -> Iterator[str]:
    """Yield the lines that are not empty; what goes beyond `LINE_CHARS` of one is thrown away."""
    is_start = True
    while piece := stream.readline(LINE_CHARS):
        if is_start and (line := piece.rstrip()):
            yield line
        is_start = piece.endswith("\n")


def end_trainer(trainer: subprocess.Popen[str], readers: Sequence[threading.Thread]) -> None:
    """End the whole group, even where its leader has ended: politely, and after `GRACE_S` not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal_group(trainer.pid, number)
        # What a broken disk or driver holds in the kernel, nothing ends: the queue goes on without it.
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(GRACE_S)
    for reader in readers:
        reader.join(1.0)


def signal_group(group: int, number: int) -> None:
    """Send a signal to what is left of a group of processes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def birth(pid: int) -> str | None:
    """Return what tells a process from a later one with the same id; None where that is not known."""
    with suppress(OSError, IndexError):
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:36]}/{started}"
    return None
