"""Trainings that the service runs: a queue, a command for each job, and what it tells while it runs.

All that is known of a job lies in the database, so that each process which serves one folder of models may
start, show, follow and cancel it; the one that holds a file lock runs the queue. A job is ``python -m
training...`` in a session of its own, so that it can be ended with everything that it has started.
"""

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import sqlalchemy as sql
from filelock import FileLock, Timeout
from pydantic import ValidationError
from sqlalchemy import exc

from data.schema import normalise_symbol
from service.ledger import Database
from service.schemas import JobStatus, TrainingEvent, TrainingJob, TrainingJobMetrics, TrainingParams
from utils import base as errors
from utils.model_paths import ENSEMBLE, GBM, LSTM, ArtifactKind, artifact_link, training_holder, what_is_at

logger = logging.getLogger(__name__)
Events = Sequence[TrainingEvent]

POLL_S, HEARTBEAT_S, RETRY_S = 0.5, 15.0, 5.0
# A trainer that is asked to end has so long before it is made to; who cancels waits a little longer.
GRACE_S, CANCEL_WAIT_S, NICENESS = 5.0, 12.0, 10
MAX_QUEUED, LOGS_AT_A_TIME, LINE_CHARS, MESSAGE_CHARS, TAIL_LINES = 100, 50, 1 << 13, 1_000, 5
DATABASE_WAIT_S, EVENTS_AT_A_TIME, KEPT_JOBS, KEPT_LOGS, KEPT_EVENTS = 10.0, 1_000, 500, 1_000, 12_000
ACTIVE, ENDS = ("queued", "running"), ("completed", "failed", "cancelled")
CANCELLED = "cancelled: nothing was saved"
TOO_LATE = "the model was saved before the training could be cancelled"
INTERRUPTED = "interrupted: the service ended while it ran, start it again"


class Trainer(NamedTuple):
    """What is trained, the fields of a request that its command takes, and what the command always has."""

    kind: ArtifactKind
    fields: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    most_horizons: int = 1


_NETWORK = ("epochs", "batch_size", "sequence_length", "loss", "dropout", "learning_rate")
_BOOSTERS = ("n_trials", "max_features", "use_lgb", "allow_cpu_fallback")
_GBM = Trainer(GBM, ("base_seed", "target_horizons", *_BOOSTERS), most_horizons=4)
_LSTM = Trainer(LSTM, ("base_seed", "target_horizons", *_NETWORK))
_SIMPLE = Trainer(ENSEMBLE, ("base_seed",), ("--method", "simple"))
TRAINERS: Mapping[str | None, Trainer] = {
    **dict.fromkeys((None, "gbm"), _GBM),
    **dict.fromkeys(("lstm", "lstm_transformer"), _LSTM),
    "ensemble": _SIMPLE,
    "stacking": _SIMPLE._replace(arguments=("--method", "stacking")),
}
_OF_ALL = {"symbol", "model_type", "overwrite", "overwrite_existing"}
# Flags that are not called like their field; those without a value, and for which value they are given.
_FLAGS = {"base_seed": "--seed", "target_horizons": "--target-horizon", "use_lgb": "--no-lgb"}
_SWITCHES = {"use_lgb": False, "allow_cpu_fallback": True}


def trainer_command(params: TrainingParams, events: str, *, source: str) -> list[str]:
    """Return the command of a training; what the caller left out stays the trainer's own default."""
    trainer = TRAINERS[params.model_type]
    command = [sys.executable, "-m", trainer.kind.trainer, params.symbol, "--source", source]
    command += ["--events", events, *trainer.arguments]
    command += ["--overwrite"] * bool(params.overwrite or params.overwrite_existing)
    for name, value in asked_for(params)[0].items():
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if name in _SWITCHES:
            command += [flag] * (value is _SWITCHES[name])
        else:
            command += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return command


def asked_for(params: TrainingParams) -> tuple[dict[str, Any], list[str]]:
    """Return what the caller gave and the trainer takes, by field; and the wire names of what it does not."""
    trainer, names = TRAINERS[params.model_type], params.model_fields_set - _OF_ALL
    given = {name: value for name in names if (value := getattr(params, name)) not in (None, {}, [])}
    taken = {name: given[name] for name in trainer.fields if name in given}
    if len(params.target_horizons or []) > trainer.most_horizons:
        taken.pop("target_horizons", None)
    return taken, sorted(str(TrainingParams.model_fields[name].alias) for name in given.keys() - taken)


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
                raise errors.ConflictError(f"{words}: GET /api/training lists what there is") from error
            self._tell(connection, state.id, [event_of(state, "stage")])
            is_old = (JOBS.c.number <= number - KEPT_JOBS) & ~IS_ACTIVE
            of_old = _EVENTS.c.job_id.in_(sql.select(JOBS.c.id).where(is_old))
            connection.execute(sql.delete(_EVENTS).where(of_old))
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

    def change(self, state: TrainingJob, events: Events, *, was: JobStatus) -> bool:
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

    def _tell(self, connection: sql.Connection, job_id: str, events: Events) -> None:
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
    is_given = isinstance(wire, TrainingParams)
    return wire.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=is_given)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def event_of(state: TrainingJob, kind: str, message: str | None = None) -> TrainingEvent:
    """Return an event of the present about a job."""
    told = {"type": kind, "status": state.status, "progress": state.progress, "timestamp": _now()}
    stage = state.current_step if kind == "stage" else None
    return TrainingEvent.model_validate({**told, "stage": stage, "message": message})


def ended(state: TrainingJob, status: JobStatus, words: str) -> tuple[TrainingJob, TrainingEvent]:
    """Return a job as it is after its end, and the event that says so."""
    seen: dict[str, Any] = {"status": status, "completed_at": _now(), "current_step": status}
    seen |= {"progress": 1.0} if status == "completed" else {"error": words} if status == "failed" else {}
    last = state.model_copy(update=seen)
    return last, event_of(last, status, message=words)


def birth(pid: int) -> str | None:
    """Return what tells a process from a later one with the same id; None where that is not known."""
    with suppress(OSError, IndexError):
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:36]}/{started}"
    return None


class Told:
    """What a running job has told and the database does not have yet; bounded, whatever is told."""

    def __init__(self, state: TrainingJob) -> None:
        self.state = state
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._events: deque[TrainingEvent] = deque(maxlen=EVENTS_AT_A_TIME)
        self._logs, self._last_words = 0, ""
        self._lock = threading.Lock()

    def read(self, kind: str, descriptor: int) -> None:
        """Take all lines that come through a pipe, until it is silent."""
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
            for line in lines_of(stream):
                self.take(kind, line)

    def take(self, kind: str, line: str) -> None:
        """Take a line that the trainer wrote, an ``"event"`` or of the ``"log"``."""
        event = None
        if kind == "event":
            with suppress(ValidationError):
                event = TrainingEvent.model_validate_json(line)
        text = errors.without_paths(line if event is None else event.message or "")[:MESSAGE_CHARS]
        with self._lock:
            if event is None or event.type == "log":
                self._log(text)
            elif event.type in {"completed", "failed"}:
                # Whether it did is for its exit code to say.
                self._last_words = text
            elif event.type in {"stage", "epoch"}:
                self._advance(event)

    def _advance(self, event: TrainingEvent) -> None:
        stage = None if event.stage is None else event.stage[:MESSAGE_CHARS]
        seen: dict[str, Any] = {"current_step": stage, "current_epoch": event.epoch}
        seen |= event.model_dump(include={"progress", "total_epochs"})
        measures = event.model_dump(include=set(TrainingJobMetrics.model_fields))
        if None not in measures.values():
            seen["metrics"] = TrainingJobMetrics(**measures)
        self.state = self.state.model_copy(update={k: v for k, v in seen.items() if v is not None})
        known = {"status": "running", "stage": stage, "timestamp": event.timestamp or _now()}
        self._events.append(event.model_copy(update=known))

    def _log(self, text: str) -> None:
        # Of a traceback only what it says: the rest is for the server's eyes.
        if not text.startswith((" ", "Traceback")):
            self._tail.append(text)
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
            return "completed", self._last_words or "completed"
        how = "cannot be ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            how = f"was killed by {name}{' (out of memory, or by somebody)' * (name == 'SIGKILL')}"
        said = self._last_words or "; ".join(self._tail) or "it said nothing"
        return "failed", f"the trainer {how}: {said}"


def start_trainer(
    command_of: Callable[[str], Sequence[str]], environment: Mapping[str, str], told: Told
) -> tuple[subprocess.Popen[bytes], list[threading.Thread]]:
    """Start a command, given the path for its events, in its own session, and readers of what it tells."""
    (events, write), (output, at_end) = os.pipe(), os.pipe()
    pipes = (("event", events), ("log", output))
    readers = [threading.Thread(target=told.read, args=pipe, daemon=True) for pipe in pipes]
    for reader in readers:
        reader.start()
    try:
        trainer = subprocess.Popen(  # noqa: S603  the command is ours, its values are checked
            command_of(f"/dev/fd/{write}"),
            stdin=subprocess.DEVNULL,
            stdout=at_end,
            stderr=at_end,
            pass_fds=(write,),
            start_new_session=True,
            env=dict(environment),
        )
    finally:
        os.close(write)
        os.close(at_end)
    # Whoever asks for a forecast comes first.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, trainer.pid, NICENESS)
    return trainer, readers


def lines_of(stream: IO[str]) -> Iterator[str]:
    """Yield the lines that are not empty, each up to `LINE_CHARS`."""
    is_start = True
    while piece := stream.readline(LINE_CHARS):
        if is_start and (line := piece.rstrip()):
            yield line
        is_start = piece.endswith("\n")


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@dataclass(kw_only=True, eq=False)
class TrainingService:
    """Starts, shows, follows and cancels the trainings of one folder of models.

    ``command`` returns the command of a job, which gets ``environment``, given its parameters and the path
    for its events; ``workers`` run at a time, and none longer than ``hours``.
    """

    models_dir: Path
    database_url: str
    command: Callable[[TrainingParams, str], Sequence[str]]
    environment: Mapping[str, str]
    workers: int = 1
    hours: float = 24.0

    def __post_init__(self) -> None:
        self._store = JobStore(self.database_url, self.models_dir)
        self._stop = threading.Event()
        self._runner = threading.Thread(target=self._run, name="trainings", daemon=True)

    def open(self) -> None:
        """Begin to run what is queued."""
        self._runner.start()

    def close(self) -> None:
        """End what runs; what is queued stays queued."""
        self._stop.set()
        if self._runner.is_alive():
            self._runner.join(GRACE_S + DATABASE_WAIT_S)

    def start(self, params: TrainingParams) -> TrainingJob:
        """Queue a training; refuse a symbol that is being trained, or whose model is not to be replaced."""
        params = params.model_copy(update={"symbol": normalise_symbol(params.symbol)})
        symbol, trainer = params.symbol, TRAINERS[params.model_type]
        self.refuse_busy(symbol)
        if self._artifact(params) is not None and not (params.overwrite or params.overwrite_existing):
            words = f"{symbol} has a model ({trainer.kind.name}) already: send overwrite to train it anew"
            raise errors.ModelExistsError(words)
        if self.waiting() >= MAX_QUEUED:
            raise errors.OverloadError(f"{MAX_QUEUED} trainings are waiting: try again when some are done")
        state = TrainingJob(
            id=uuid.uuid4().hex,
            symbol=symbol,
            status="queued",
            progress=0.0,
            current_epoch=0,
            total_epochs=params.epochs if "epochs" in trainer.fields else 0,
            started_at=_now(),
            model_type=params.model_type or "gbm",
            current_step="queued",
        )
        self._store.add(state, params)
        return state

    def list(self) -> list[TrainingJob]:
        """Return all jobs that are remembered, newest first."""
        return [job.state for job in reversed(self._store.jobs())]

    def waiting(self) -> int:
        """Return how many jobs wait for a worker."""
        return len(self._store.jobs(JOBS.c.status == "queued"))

    def get(self, job_id: str) -> TrainingJob:
        """Return one job, or raise `JobMissingError`."""
        return self._job(job_id).state

    def _job(self, job_id: str) -> Job:
        if re.fullmatch(r"[0-9a-f]{32}", job_id):
            for job in self._store.jobs(JOBS.c.id == job_id):
                return job
        raise errors.JobMissingError(f"no training job {job_id[:40]!a}: GET /api/training lists all")

    def refuse_busy(self, symbol: str) -> None:
        """Raise `ConflictError` where a job, or somebody's command line, trains a symbol, or will."""
        for job, *_ in self._store.jobs(JOBS.c.symbol == symbol, IS_ACTIVE):
            words = f"{symbol} is {job.status} as job {job.id}"
            raise errors.ConflictError(f"{words}: wait for it, or DELETE /api/training/{job.id}")
        if (holder := training_holder(self.models_dir, symbol)) is not None:
            raise errors.ConflictError(f"{symbol} is being trained by process {holder}: wait or stop it")

    def cancel(self, job_id: str) -> TrainingJob:
        """End a job and all that it has started, unless it has ended or saved its model; return it."""
        state, event = ended(self.get(job_id), "cancelled", CANCELLED)
        if not self._store.change(state, [event], was="queued"):
            self._store.note(job_id, {"cancel": True})
        until = time.monotonic() + CANCEL_WAIT_S
        while (state := self.get(job_id)).status not in ENDS and time.monotonic() < until:
            time.sleep(0.05)
        return state

    async def follow(
        self, job_id: str, after: int = 0, should_end: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[dict[str, str]]:
        """Yield the events of a job after number ``after``, to its end or until the caller wants to go.

        The last one of all is told again, so that who comes back for more does not come back for ever.
        """
        state, told_at = await asyncio.to_thread(self.get, job_id), time.monotonic()
        while not should_end():
            found: Sequence[tuple[int, str, str]] = []
            is_due = time.monotonic() - told_at >= HEARTBEAT_S
            try:
                # First: who reads that a job has ended, reads its whole history then.
                state = await asyncio.to_thread(self.get, job_id) if is_due else state
                found = await asyncio.to_thread(self._store.history, job_id, after)
            except errors.StorageError as error:
                logger.warning("the events of job %s are late: %s", job_id, error)
            if not found and state.status in ENDS:
                event = event_of(state, state.status, message=state.error)
                found = [(after, event.type, wire_text(event))]
            for number, kind, text in found:
                yield {"id": str(number), "data": text}
                after, told_at = number, time.monotonic()
                if kind in ENDS:
                    return
            if is_due and not found:
                told_at = time.monotonic()
                yield {"data": wire_text(event_of(state, "heartbeat"))}
            if not found:
                await asyncio.sleep(POLL_S)

    def _artifact(self, params: TrainingParams) -> Path | None:
        return what_is_at(artifact_link(self.models_dir, params.symbol, TRAINERS[params.model_type].kind))

    def _run(self) -> None:
        """Look for something to do, by the right of who holds the lock, until the end."""
        lock = FileLock(self.models_dir / ".training-queue.lock")
        mine: dict[str, threading.Thread] = {}
        while not self._stop.wait(POLL_S):
            try:
                self._attend_queue(lock, mine)
            except Timeout:
                logger.debug("another process runs the trainings")
            except errors.StorageError as error:
                logger.warning("the queue of trainings waits: %s", error)
                self._stop.wait(RETRY_S)
            except Exception:
                logger.exception("the queue of trainings broke; it is tried again")
                self._stop.wait(RETRY_S)
        for thread in mine.values():
            thread.join()
        lock.release()

    def _attend_queue(self, lock: FileLock, mine: dict[str, threading.Thread]) -> None:
        """Close what another process left behind, and start what is queued while a worker is free."""
        for job_id in [job_id for job_id, thread in mine.items() if not thread.is_alive()]:
            del mine[job_id]
        active = self._store.jobs(IS_ACTIVE)
        if active and not lock.is_locked:
            self.models_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            active = self._store.jobs(IS_ACTIVE)
        for job in active:
            if job.state.status == "running" and job.state.id not in mine:
                self._close_left_behind(job)
            elif job.state.status == "queued" and len(mine) < self.workers:
                running = {"status": "running", "started_at": _now(), "current_step": "starting"}
                state = job.state.model_copy(update=running)
                if self._store.change(state, [event_of(state, "started")], was="queued"):
                    thread = threading.Thread(target=self._train, args=(job.params, Told(state)), daemon=True)
                    mine[state.id] = thread
                    thread.start()

    def _close_left_behind(self, job: Job) -> None:
        # The id alone may be that of a process which has nothing to do with it.
        if job.pid is not None and job.born is not None and birth(job.pid) == job.born:
            logger.warning("process %s of an interrupted training is ended", job.pid)
            _signal_group(job.pid, signal.SIGKILL)
        self._finish(job.state, *(("cancelled", CANCELLED) if job.cancel else ("failed", INTERRUPTED)))

    def _train(self, params: TrainingParams, told: Told) -> None:
        """Run one job and write down how it ended, whatever that is."""
        end: tuple[JobStatus, str] = "failed", "something broke in the service: its log says what"
        try:
            end = self._end_of(params, told)
        except Exception:
            logger.exception("job %s broke the service's own code; the queue goes on", told.state.id)
        self._finish(told.state, *end, told.events())

    def _end_of(self, params: TrainingParams, told: Told) -> tuple[JobStatus, str]:
        before = self._artifact(params)
        try:
            trainer, readers = start_trainer(lambda to: self.command(params, to), self.environment, told)
        except OSError as error:
            return "failed", f"the trainer cannot be started ({error.strerror})"
        try:
            reason = self._attend(trainer, params, told)
        finally:
            # The whole group, even where its leader has ended: politely first.
            for number in (signal.SIGTERM, signal.SIGKILL):
                _signal_group(trainer.pid, number)
                # What a broken disk or driver holds in the kernel, nothing ends: the queue goes on.
                with suppress(subprocess.TimeoutExpired):
                    trainer.wait(GRACE_S)
            for reader in readers:
                reader.join(1.0)
        if reason is None or trainer.returncode == 0:
            return told.outcome(trainer.returncode)
        if reason != CANCELLED:
            return "failed", reason
        return ("completed", TOO_LATE) if self._artifact(params) != before else ("cancelled", CANCELLED)

    def _attend(self, trainer: subprocess.Popen[bytes], params: TrainingParams, told: Told) -> str | None:
        """Write down what the trainer tells until it ends (None), or should (why)."""
        if unused := asked_for(params)[1]:
            told.take("log", f"not used by {TRAINERS[params.model_type].kind.trainer}: {', '.join(unused)}")
        until = time.monotonic() + 3600.0 * self.hours
        while trainer.poll() is None:
            if self._is_unwanted(trainer.pid, told):
                return CANCELLED
            if time.monotonic() > until:
                return f"stopped: it took more than {self.hours:g} hours"
            if self._stop.wait(POLL_S):
                return INTERRUPTED
        return None

    def _is_unwanted(self, pid: int, told: Told) -> bool:
        """Write down what was told; return whether somebody has cancelled the job."""
        try:
            job = self._job(told.state.id)
            if job.pid is None:
                self._store.note(told.state.id, {"pid": pid, "born": birth(pid)})
            if events := told.events():
                self._store.change(told.state, events, was="running")
        except errors.StorageError as error:
            logger.warning("what job %s tells is late: %s", told.state.id, error)
            return False
        return job.cancel

    def _finish(self, state: TrainingJob, status: JobStatus, words: str, events: Events = ()) -> None:
        """Write down how a job that ran has ended, however long the database takes for it."""
        last, event = ended(state, status, words)
        level = logging.WARNING if status == "failed" else logging.INFO
        logger.log(level, "training %s of %s: %s: %s", last.id, last.symbol, status, words)
        is_written = False
        while not is_written:
            try:
                self._store.change(last, [*events, event], was="running")
                is_written = True
            except errors.StorageError as error:
                logger.warning("the end of job %s is not written yet: %s", last.id, error)
                is_written = self._stop.wait(RETRY_S)
