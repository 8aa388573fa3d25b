"""The database of the service: how it is reached, and the trainings that lie in it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sql
from pydantic import ValidationError
from sqlalchemy import exc
from sqlalchemy.schema import CreateIndex, CreateTable

from service.schemas import JobStatus, TrainingEvent, TrainingJob, TrainingParams
from utils.errors import ConflictError, StorageError, UsageError

DATABASE_WAIT_S, EVENTS_AT_A_TIME, KEPT_JOBS, KEPT_LOGS, KEPT_EVENTS = 10.0, 1_000, 500, 1_000, 12_000
ACTIVE = ("queued", "running")


class Database:
    """A database of the service: not touched before the first row, and safe to use from many threads.

    Its tables come with the first row, and its errors are `StorageError`, which call it by ``name``; a row
    waits for other processes ``wait_s`` at most. Raises `UsageError` for a ``url`` that makes no sense.
    """

    def __init__(self, url: str, tables: sql.MetaData, name: str, wait_s: float) -> None:
        try:
            address = sql.make_url(url)
            is_file = address.get_backend_name() == "sqlite"
            self._engine = sql.create_engine(
                address, connect_args={"timeout": wait_s} if is_file else {}, poolclass=sql.NullPool
            )
        except (exc.ArgumentError, ModuleNotFoundError, ValueError) as error:
            # Not its own words: they may hold the address, and with it a password.
            raise UsageError(
                f"AI_STOCKS_DATABASE_URL cannot be used ({type(error).__name__}): write "
                "sqlite:////FOLDER/FILE.sqlite, or postgresql+psycopg://HOST/NAME with psycopg installed"
            ) from error
        self.file = Path(str(address.database)) if is_file and address.database else None
        self._tables, self._name, self._is_ready = tables, name, False

    @contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """Yield a connection; what is done with it is written at the end, as a whole."""
        with self._errors("written"):
            if not self._is_ready:
                self._create_tables()
            with self._engine.begin() as connection:
                yield connection

    def _create_tables(self) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        tables = self._tables.sorted_tables
        # `create_all` looks first and creates then: two at a time would both create.
        with self._engine.begin() as connection:
            for table in tables:
                connection.execute(CreateTable(table, if_not_exists=True))
            for index in [index for table in tables for index in table.indexes]:
                connection.execute(CreateIndex(index, if_not_exists=True))
        self._is_ready = True

    def read(self, query: sql.Select[Any]) -> Sequence[sql.RowMapping]:
        """Return the rows of a table, none where there is no such table or no database yet."""
        # SQLite would make an empty file of a missing one.
        if self.file is not None and not self.file.exists():
            return []
        with self._errors("read"):
            try:
                return self._rows(query)
            except (exc.OperationalError, exc.ProgrammingError):
                tables = [table for table in query.get_final_froms() if isinstance(table, sql.Table)]
                if all(sql.inspect(self._engine).has_table(table.name) for table in tables):
                    raise
                return []

    def _rows(self, query: sql.Select[Any]) -> Sequence[sql.RowMapping]:
        with self._engine.connect() as connection:
            if self.file is not None:
                # Bytes that are no text are for `data.schema.holds` to find.
                driver: Any = connection.connection.dbapi_connection
                driver.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
            return connection.execute(query).mappings().all()

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError:
            # What that means is for the caller to say.
            raise
        except (exc.SQLAlchemyError, OSError) as error:
            # The file may be gone, and its tables with it.
            self._is_ready = False
            # What the database said, without the statement and its values.
            words = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0][:200]
            raise StorageError(f"{self._name} cannot be {done} ({words})") from error


METADATA = sql.MetaData()
JOBS = sql.Table(
    "training_jobs",
    METADATA,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String, nullable=False, unique=True),
    *(sql.Column(name, sql.String, nullable=False) for name in ("home", "symbol", "status")),
    *(sql.Column(name, sql.Text, nullable=False) for name in ("params", "state")),
    *(sql.Column("pid", sql.Integer), sql.Column("born", sql.String)),
    sql.Column("cancel", sql.Boolean, nullable=False, default=False),
)
IS_ACTIVE, _WHERE = JOBS.c.status.in_(ACTIVE), sql.text(f"status IN {ACTIVE}")
_ONE = (JOBS.c.home, JOBS.c.symbol)
sql.Index("training_jobs_one_at_a_time", *_ONE, unique=True, sqlite_where=_WHERE, postgresql_where=_WHERE)
_EVENTS = sql.Table(
    "training_events",
    METADATA,
    sql.Column("job_id", sql.String, primary_key=True),
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    *(sql.Column("type", sql.String, nullable=False), sql.Column("text", sql.Text, nullable=False)),
)


class Job(NamedTuple):
    """A job: what is told of it, the process that trains (see `birth`), whether somebody wants it to end."""

    state: TrainingJob
    params: TrainingParams
    pid: int | None
    born: str | None
    cancel: bool


class JobStore:
    """The jobs of one folder of models; safe to use from many threads and processes."""

    def __init__(self, url: str, home: Path) -> None:
        self._database = Database(url, METADATA, "the list of trainings", DATABASE_WAIT_S)
        self._home = str(home.resolve())

    def add(self, state: TrainingJob, params: TrainingParams) -> None:
        """Queue a job; raise `ConflictError` if its symbol has one that is queued or runs."""
        row = {"home": self._home, **state.model_dump(include={"id", "symbol", "status"})}
        row |= {"state": wire_text(state), "params": wire_text(params)}
        with self._database.begin() as connection:
            try:
                (number,) = connection.execute(sql.insert(JOBS).values(row)).inserted_primary_key or (0,)
            except exc.IntegrityError as error:
                words = f"{state.symbol} was queued by somebody else"
                raise ConflictError(f"{words}: GET /api/training lists what there is") from error
            self._tell(connection, state.id, [event_of(state, "stage", stage="queued")])
            is_old = (JOBS.c.number <= number - KEPT_JOBS) & ~IS_ACTIVE
            old = sql.select(JOBS.c.id).where(is_old)
            connection.execute(sql.delete(_EVENTS).where(_EVENTS.c.job_id.in_(old)))
            connection.execute(sql.delete(JOBS).where(is_old))

    def jobs(self, *wanted: sql.ColumnElement[bool]) -> list[Job]:
        """Return the wanted jobs that this release can read, oldest first."""
        found = []
        query = sql.select(JOBS).where(JOBS.c.home == self._home, *wanted).order_by(JOBS.c.number)
        for row in self._database.read(query):
            with suppress(ValidationError):
                state = TrainingJob.model_validate_json(row["state"])
                params = TrainingParams.model_validate_json(row["params"])
                found.append(Job(state, params, row["pid"], row["born"], row["cancel"]))
        return found

    def change(self, state: TrainingJob, events: Sequence[TrainingEvent], *, was: JobStatus) -> bool:
        """Replace what is told of a job and add to its history, unless its status is not ``was`` any more."""
        wanted = sql.update(JOBS).where(JOBS.c.id == state.id, JOBS.c.status == was)
        with self._database.begin() as connection:
            changed = connection.execute(wanted.values(status=state.status, state=wire_text(state)))
            if changed.rowcount == 1:
                self._tell(connection, state.id, events)
        return changed.rowcount == 1

    def note(self, job_id: str, columns: Mapping[str, object]) -> None:
        """Write down the process of a job, or that somebody wants it to end."""
        with self._database.begin() as connection:
            connection.execute(sql.update(JOBS).where(JOBS.c.id == job_id).values(columns))

    def history(self, job_id: str, after: int) -> list[tuple[int, str, str]]:
        """Return number, type and JSON of the events that came after the one of that number."""
        wanted = sql.select(_EVENTS).where(_EVENTS.c.job_id == job_id, _EVENTS.c.number > after)
        rows = self._database.read(wanted.order_by(_EVENTS.c.number).limit(EVENTS_AT_A_TIME))
        return [(row["number"], row["type"], row["text"]) for row in rows]

    def _tell(self, connection: sql.Connection, job_id: str, events: Sequence[TrainingEvent]) -> None:
        of_job, number = _EVENTS.c.job_id == job_id, _EVENTS.c.number
        last = connection.scalar(sql.select(sql.func.max(number)).where(of_job)) or 0
        for place, event in enumerate(events, start=last + 1):
            row = {"job_id": job_id, "number": place, "type": event.type, "text": wire_text(event)}
            connection.execute(sql.insert(_EVENTS).values(row))
        # Log lines may come without end; of an epoch the page's chart wants every one.
        old = ((_EVENTS.c.type == "log") & (number <= last - KEPT_LOGS)) | (number <= last - KEPT_EVENTS)
        connection.execute(sql.delete(_EVENTS).where(of_job, old))


def wire_text(wire: TrainingJob | TrainingParams | TrainingEvent) -> str:
    """Return the JSON that is kept and sent; of parameters only what the caller gave."""
    as_given = isinstance(wire, TrainingParams)
    return wire.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=as_given)


def now() -> str:
    """Return the present as the wire writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def event_of(
    state: TrainingJob, kind: str, *, stage: str | None = None, message: str | None = None
) -> TrainingEvent:
    """Return an event of the present about a job."""
    told = {"type": kind, "status": state.status, "progress": state.progress, "timestamp": now()}
    return TrainingEvent.model_validate({**told, "stage": stage, "message": message})


def ended(state: TrainingJob, status: JobStatus, words: str) -> tuple[TrainingJob, TrainingEvent]:
    """Return a job as it is after its end, and the event that says so."""
    seen: dict[str, Any] = {"status": status, "completed_at": now(), "current_step": status}
    seen |= {"progress": 1.0} if status == "completed" else {}
    seen |= {"error": words} if status == "failed" else {}
    last = state.model_copy(update=seen)
    return last, event_of(last, status, message=words)


def birth(pid: int) -> str | None:
    """Return what tells a process from a later one with the same id; None where that is not known."""
    with suppress(OSError, IndexError):
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:36]}/{started}"
    return None
