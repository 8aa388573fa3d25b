"""Trainings that the service runs: a queue, a command for each job, and what it tells while it runs.

Of all processes that serve one folder of models, the one that holds a file lock runs the queue; when it dies,
the next one takes over and closes what was left behind. Each of them may start, show, follow and cancel jobs,
since all that is known of a job lies in the database. A job is ``python -m training...`` in a session of its
own, so that it can be ended with everything that it has started.
"""

import asyncio
import logging
import re
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.schema import normalise_symbol
from service.schemas import (
    JobStatus,
    ModelType,
    TrainingEvent,
    TrainingJob,
    TrainingParams,
)
from service.training_jobs import (
    ACTIVE,
    CANCELLED,
    DATABASE_WAIT_S,
    GRACE_S,
    JobStore,
    StoredJob,
    Told,
    TrainerProcess,
    birth,
    end_group,
    end_of,
    ended,
    event_of,
    now,
    outcome_of,
    wire_text,
)
from utils.errors import (
    AIStocksError,
    ConflictError,
    JobMissingError,
    ModelExistsError,
    OverloadError,
    StorageError,
)
from utils.model_paths import symbol_dir, training_holder

logger = logging.getLogger(__name__)

POLL_S, READ_S, HEARTBEAT_S, RETRY_S = 0.5, 0.1, 15.0, 5.0
# A caller who cancels waits a little longer than the trainer has for its end.
CANCEL_WAIT_S = 12.0
MAX_QUEUED = 100
INTERRUPTED = "interrupted: the service ended while it ran, start it again"
STOPPED = "interrupted: the service was stopped while it ran, start it again"
TERMINAL = frozenset({"completed", "failed", "cancelled"})

_JOB_ID = re.compile(r"[0-9a-f]{32}")

CommandOf = Callable[[TrainingParams, str], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A command that trains.

    Attributes
    ----------
    module
        What ``python -m`` runs.
    artifact
        Name of the link to what it saves.
    flags
        Fields of `TrainingParams` and the flags that take them.
    arguments
        What the command always has.
    most_horizons
        How many horizons it takes.
    """

    module: str
    artifact: str
    flags: Mapping[str, str]
    arguments: tuple[str, ...] = ()
    most_horizons: int = 1


_SEED = {"base_seed": "--seed"}
_HORIZON = {"target_horizons": "--target-horizon"}
_NETWORK = {
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "sequence_length": "--sequence-length",
    "loss": "--loss",
    "dropout": "--dropout",
    "learning_rate": "--learning-rate",
}
_BOOSTERS = {
    "n_trials": "--n-trials",
    "max_features": "--max-features",
    "use_lgb": "--no-lgb",
    "allow_cpu_fallback": "--allow-cpu-fallback",
}
# Flags without a value, and the value of the field for which they are given.
_SWITCHES = {"use_lgb": False, "allow_cpu_fallback": True}
_LSTM = Trainer(module="training.train_lstm", artifact="lstm", flags=_SEED | _HORIZON | _NETWORK)
TRAINERS: Mapping[ModelType, Trainer] = {
    "gbm": Trainer(
        module="training.train_gbm", artifact="gbm", flags=_SEED | _HORIZON | _BOOSTERS, most_horizons=4
    ),
    "lstm": _LSTM,
    "lstm_transformer": _LSTM,
    "ensemble": Trainer(
        module="training.train_ensemble", artifact="ensemble", flags=_SEED, arguments=("--method", "simple")
    ),
    "stacking": Trainer(
        module="training.train_ensemble", artifact="ensemble", flags=_SEED, arguments=("--method", "stacking")
    ),
}


def trainer_of(params: TrainingParams) -> Trainer:
    """Return the trainer of the wanted kind of model."""
    return TRAINERS[params.model_type or "gbm"]


def trainer_command(params: TrainingParams, events: str, *, source: str) -> list[str]:
    """Return the command of a training; what the caller left out stays the trainer's own default.

    Parameters
    ----------
    params
        With a normalised symbol.
    events
        Where the trainer tells its progress.
    source
        Of the prices.
    """
    trainer = trainer_of(params)
    command = [sys.executable, "-m", trainer.module, params.symbol, "--source", source, "--events", events]
    command += [*trainer.arguments, *["--overwrite"] * _overwrites(params)]
    for name, value in _given(params).items():
        if name in _SWITCHES:
            command += [trainer.flags[name]] * (value is _SWITCHES[name])
        elif name in trainer.flags:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            command += [trainer.flags[name], text]
    return command


def unused_fields(params: TrainingParams) -> list[str]:
    """Return the wire names of what the caller asked for and the trainer does not take."""
    asked = {"symbol", "model_type", "overwrite", "overwrite_existing", *_given(params)}
    names = [name for name in params.model_fields_set - asked if getattr(params, name) not in (None, {}, [])]
    return sorted(str(TrainingParams.model_fields[name].alias) for name in names)


def _given(params: TrainingParams) -> dict[str, Any]:
    """Return what the caller gave and the trainer takes, by field."""
    trainer = trainer_of(params)
    values = {name: getattr(params, name) for name in trainer.flags if name in params.model_fields_set}
    horizons = params.target_horizons or []
    if len(horizons) > trainer.most_horizons:
        values.pop("target_horizons", None)
    return {name: value for name, value in values.items() if value not in (None, [])}


def _overwrites(params: TrainingParams) -> bool:
    return bool(params.overwrite or params.overwrite_existing)


class TrainingService:
    """Starts, shows, follows and cancels trainings.

    Parameters
    ----------
    models_dir
        Where bundles are saved.
    database_url
        Where jobs are kept.
    command
        Returns the command of a job, given its parameters and the path for its events.
    environment
        Of the commands.
    workers, hours
        Trainings at a time, and hours after which one is stopped.
    """

    def __init__(
        self,
        *,
        models_dir: Path,
        database_url: str,
        command: CommandOf,
        environment: Mapping[str, str],
        workers: int = 1,
        hours: float = 24.0,
    ) -> None:
        self._models_dir, self._command, self._environment = models_dir, command, environment
        self._store = JobStore(database_url, models_dir)
        self._workers, self._seconds = workers, 3600.0 * hours
        self._stop = threading.Event()
        self._runner: threading.Thread | None = None

    def open(self) -> None:
        """Begin to run what is queued."""
        self._stop.clear()
        self._runner = threading.Thread(target=self._run, name="trainings", daemon=True)
        self._runner.start()

    def close(self) -> None:
        """End what runs; what is queued stays queued."""
        self._stop.set()
        if self._runner is not None:
            self._runner.join(GRACE_S + DATABASE_WAIT_S)

    # ------------------------------------------------------------ asked by routes

    def start(self, params: TrainingParams) -> TrainingJob:
        """Queue a training.

        Raises
        ------
        InvalidSymbolError, StorageError
            If the symbol makes no sense, or the database cannot be written.
        ConflictError
            If the symbol is being trained or queued, or a model is there and is not to be replaced.
        OverloadError
            If too many jobs are waiting.
        """
        symbol = normalise_symbol(params.symbol)
        params = params.model_copy(update={"symbol": symbol})
        self._refuse_busy(symbol)
        artifact = trainer_of(params).artifact
        if self._artifact(params) is not None and not _overwrites(params):
            raise ModelExistsError(
                f"{symbol} has a model ({artifact}) already: send overwrite to train it anew"
            )
        if len(self._store.jobs(status="queued")) >= MAX_QUEUED:
            raise OverloadError(f"{MAX_QUEUED} trainings are waiting: try again when some are done")
        state = TrainingJob(
            id=uuid.uuid4().hex,
            symbol=symbol,
            status="queued",
            progress=0.0,
            current_epoch=0,
            total_epochs=params.epochs if "epochs" in trainer_of(params).flags else 0,
            started_at=now(),
            model_type=params.model_type or "gbm",
            current_step="queued",
        )
        if not self._store.add(state, params):
            self._refuse_busy(symbol)
            raise ConflictError(f"{symbol} had a training until just now: try again")
        return state

    def list(self) -> list[TrainingJob]:
        """Return all jobs that are remembered, newest first."""
        return [job.state for job in reversed(self._store.jobs())]

    def waiting(self) -> int:
        """Return how many jobs wait for a worker."""
        return len(self._store.jobs(status="queued"))

    def get(self, job_id: str) -> TrainingJob:
        """Return one job, or raise `JobMissingError`."""
        return self._job(job_id).state

    def is_training(self, symbol: str) -> bool:
        """Whether a job of this service, or somebody's command line, trains a normalised symbol right now."""
        running = any(job.state.symbol == symbol for job in self._store.jobs(status="running"))
        return running or training_holder(self._models_dir, symbol) is not None

    def cancel(self, job_id: str) -> TrainingJob:
        """End a job and all that it has started; return what became of it.

        A job that had ended before stays what it was. So does one whose model was saved in the last moment.
        """
        state = self._job(job_id).state
        if state.status == "queued":
            cancelled = ended(state, "cancelled", CANCELLED)
            self._store.change(cancelled, [end_of(cancelled, CANCELLED)], was="queued")
        self._store.note(job_id, cancel=True)
        until = time.monotonic() + CANCEL_WAIT_S
        while (state := self._job(job_id).state).status in ACTIVE and time.monotonic() < until:
            time.sleep(0.05)
        return state

    async def follow(
        self, job_id: str, after: int = 0, should_end: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[dict[str, str]]:
        """Yield the events of a job as server-sent events: what was told before and what is told, to the end.

        Parameters
        ----------
        job_id
            Of a job that exists.
        after
            Number of the last event that the subscriber knows; the last one of all is told again, so that who
            comes back for more does not come back for ever.
        should_end
            Whether to end before the job does.
        """
        state, told_at = await asyncio.to_thread(self.get, job_id), time.monotonic()
        while not should_end():
            found = await asyncio.to_thread(self._history, job_id, after)
            if not found and state.status not in ACTIVE:
                found = [(after, state.status, wire_text(end_of(state, state.error)))]
            for number, kind, text in found:
                yield {"id": str(number), "data": text}
                after, told_at = number, time.monotonic()
                if kind in TERMINAL:
                    return
            if time.monotonic() - told_at >= HEARTBEAT_S:
                state, told_at = await asyncio.to_thread(self.get, job_id), time.monotonic()
                yield {"data": wire_text(event_of(state, "heartbeat"))}
            if not found:
                await asyncio.sleep(POLL_S)

    def _history(self, job_id: str, after: int) -> Sequence[tuple[int, str, str]]:
        try:
            return self._store.history(job_id, after)
        except StorageError as error:
            logger.warning("the events of job %s are late: %s", job_id, error)
            return []

    def _job(self, job_id: str) -> StoredJob:
        found = self._store.jobs(job_id=job_id) if _JOB_ID.fullmatch(job_id) else []
        if not found:
            raise JobMissingError(f"no training job {job_id[:40]!a}: GET /api/training lists what there is")
        return found[0]

    def _refuse_busy(self, symbol: str) -> None:
        for status in ACTIVE:
            for job in self._store.jobs(status=status):
                if job.state.symbol == symbol:
                    words = f"{symbol} is {status} as job {job.state.id}"
                    raise ConflictError(f"{words}: wait for it, or DELETE /api/training/{job.state.id}")
        holder = training_holder(self._models_dir, symbol)
        if holder is not None:
            raise ConflictError(f"{symbol} is being trained by process {holder}: wait or stop it")

    def _artifact(self, params: TrainingParams) -> Path | None:
        link = symbol_dir(self._models_dir, params.symbol) / trainer_of(params).artifact
        if link.is_symlink():
            return link.readlink()
        return link if link.exists() else None

    # ------------------------------------------------------------ done by threads

    def _run(self) -> None:
        """Wait for something to do and for the right to do it; then run the queue until the end."""
        lock = FileLock(self._models_dir / ".training-queue.lock")
        while not self._stop.is_set():
            try:
                if any(self._store.jobs(status=status) for status in ACTIVE):
                    self._models_dir.mkdir(parents=True, exist_ok=True)
                    with lock.acquire(timeout=0):
                        self._run_queue()
            except Timeout:
                logger.debug("another process runs the trainings")
            except (AIStocksError, OSError) as error:
                logger.warning("the queue of trainings waits: %s", error)
            self._stop.wait(POLL_S)

    def _run_queue(self) -> None:
        for left in self._store.jobs(status="running"):
            self._close_left_behind(left)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _close_left_behind(self, job: StoredJob) -> None:
        # The id alone may be that of a process which has nothing to do with it.
        if job.pid is not None and job.born is not None and birth(job.pid) == job.born:
            logger.warning("process %s of an interrupted training is ended", job.pid)
            end_group(job.pid)
        status: JobStatus = "cancelled" if job.cancel else "failed"
        self._finish(job.state, status, CANCELLED if job.cancel else INTERRUPTED)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._train_next()
            except StorageError as error:
                logger.warning("the queue of trainings waits: %s", error)
                self._stop.wait(RETRY_S)
            except Exception:
                logger.exception("a training broke the service's own code; the queue goes on")
                self._stop.wait(RETRY_S)
            self._stop.wait(POLL_S)

    def _train_next(self) -> None:
        for job in self._store.jobs(status="queued"):
            running = {"status": "running", "started_at": now(), "current_step": "starting"}
            state = job.state.model_copy(update=running)
            if self._store.change(state, [event_of(state, "started")], was="queued"):
                self._train(job.params, Told(state))
                return

    def _train(self, params: TrainingParams, told: Told) -> None:
        """Run one job and write down how it ended, whatever that is."""
        end: tuple[JobStatus, str] = "failed", "something broke in the service: its log says what"
        try:
            end = self._end_of(params, told)
        finally:
            self._finish(told.state, *end, told.events())

    def _end_of(self, params: TrainingParams, told: Told) -> tuple[JobStatus, str]:
        before = self._artifact(params)
        try:
            process = TrainerProcess(lambda events: self._command(params, events), self._environment)
        except OSError as error:
            return "failed", f"the trainer cannot be started ({error.strerror})"
        try:
            reason = self._attend(process, params, told)
            process.end()
            for kind, line in process.rest():
                told.take(kind, line)
            saved = reason == CANCELLED and self._artifact(params) != before
            return outcome_of(process.returncode, reason, told, saved=saved)
        finally:
            process.close()

    def _attend(self, process: TrainerProcess, params: TrainingParams, told: Told) -> str | None:
        """Take down what the trainer tells until it ends (None), or should (why)."""
        unused = unused_fields(params)
        if unused:
            told.take("log", f"not used by {trainer_of(params).module}: {', '.join(unused)}")
        until, next_at = time.monotonic() + self._seconds, 0.0
        while process.returncode is None:
            for kind, line in process.read(READ_S):
                told.take(kind, line)
            if self._stop.is_set():
                return STOPPED
            if time.monotonic() > until:
                return f"stopped: it took more than {self._seconds / 3600:g} hours"
            if time.monotonic() >= next_at:
                if self._is_unwanted(process, told):
                    return CANCELLED
                next_at = time.monotonic() + POLL_S
        return None

    def _is_unwanted(self, process: TrainerProcess, told: Told) -> bool:
        """Write down what was told; return whether somebody has cancelled the job."""
        try:
            job = self._job(told.state.id)
            if job.pid is None:
                self._store.note(told.state.id, pid=process.pid, born=process.born)
            events = told.events()
            if events:
                self._store.change(told.state, events, was="running")
        except StorageError as error:
            logger.warning("what job %s tells is late: %s", told.state.id, error)
            return False
        return job.cancel

    def _finish(
        self, state: TrainingJob, status: JobStatus, words: str, events: Sequence[TrainingEvent] = ()
    ) -> None:
        """Write down how a job that ran has ended, however long the database takes for it."""
        last = ended(state, status, words)
        level = logging.WARNING if status == "failed" else logging.INFO
        logger.log(level, "training %s of %s: %s: %s", last.id, last.symbol, status, words)
        while True:
            try:
                self._store.change(last, [*events, end_of(last, words)], was="running")
            except StorageError as error:
                logger.warning("the end of job %s is not written yet: %s", last.id, error)
                if self._stop.wait(RETRY_S):
                    return
            else:
                return
