"""Trainings that the service runs: a queue, a command for each job, and what it tells while it runs.

All that is known of a job lies in the database, so that each process which serves one folder of models may
start, show, follow and cancel it; the one that holds a file lock runs the queue. A job is ``python -m
training...`` in a session of its own, so that it can be ended with everything that it has started.
"""

import asyncio
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from data.schema import normalise_symbol
from service.schemas import JobStatus, TrainingEvent, TrainingJob, TrainingParams
from service.training_jobs import (
    ACTIVE,
    DATABASE_WAIT_S,
    GRACE_S,
    Job,
    JobStore,
    Told,
    birth,
    end_trainer,
    ended,
    event_of,
    now,
    signal_group,
    start_trainer,
    wire_text,
)
from utils.errors import ConflictError, JobMissingError, ModelExistsError, OverloadError, StorageError
from utils.model_paths import symbol_dir, training_holder

logger = logging.getLogger(__name__)

POLL_S, HEARTBEAT_S, RETRY_S = 0.5, 15.0, 5.0
# Who cancels waits a little longer than the trainer has for its end.
CANCEL_WAIT_S, MAX_QUEUED = 12.0, 100
ENDS = ("completed", "failed", "cancelled")
CANCELLED = "cancelled: nothing was saved"
TOO_LATE = "the model was saved before the training could be cancelled"
INTERRUPTED = "interrupted: the service ended while it ran, start it again"


class Trainer(NamedTuple):
    """What ``python -m`` runs, the link to what it saves, the fields it takes, and what it always has."""

    module: str
    artifact: str
    fields: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    most_horizons: int = 1


_ANY = ("base_seed", "target_horizons")
_NETWORK = ("epochs", "batch_size", "sequence_length", "loss", "dropout", "learning_rate")
_BOOSTERS = ("n_trials", "max_features", "use_lgb", "allow_cpu_fallback")
_LSTM = Trainer("training.train_lstm", "lstm", (*_ANY, *_NETWORK))
TRAINERS: Mapping[str, Trainer] = {
    "gbm": Trainer("training.train_gbm", "gbm", (*_ANY, *_BOOSTERS), most_horizons=4),
    "lstm": _LSTM,
    "lstm_transformer": _LSTM,
    "ensemble": Trainer("training.train_ensemble", "ensemble", _ANY[:1], ("--method", "simple")),
    "stacking": Trainer("training.train_ensemble", "ensemble", _ANY[:1], ("--method", "stacking")),
}
# Flags that are not called like their field; those without a value, and for which value they are given.
_FLAGS = {"base_seed": "--seed", "target_horizons": "--target-horizon", "use_lgb": "--no-lgb"}
_SWITCHES = {"use_lgb": False, "allow_cpu_fallback": True}


def trainer_of(params: TrainingParams) -> Trainer:
    """Return the trainer of the wanted kind of model."""
    return TRAINERS[params.model_type or "gbm"]


def trainer_command(params: TrainingParams, events: str, *, source: str) -> list[str]:
    """Return the command of a training; what the caller left out stays the trainer's own default."""
    trainer = trainer_of(params)
    command = [sys.executable, "-m", trainer.module, params.symbol, "--source", source, "--events", events]
    command += [*trainer.arguments, *["--overwrite"] * bool(params.overwrite or params.overwrite_existing)]
    for name, value in _given(params).items():
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if name in _SWITCHES:
            command += [flag] * (value is _SWITCHES[name])
        else:
            command += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return command


def unused_fields(params: TrainingParams) -> list[str]:
    """Return the wire names of what the caller asked for and the trainer does not take."""
    asked = {"symbol", "model_type", "overwrite", "overwrite_existing", *_given(params)}
    names = [name for name in params.model_fields_set - asked if getattr(params, name) not in (None, {}, [])]
    return sorted(str(TrainingParams.model_fields[name].alias) for name in names)


def _given(params: TrainingParams) -> dict[str, Any]:
    """Return what the caller gave and the trainer takes, by field."""
    trainer = trainer_of(params)
    values = {name: getattr(params, name) for name in trainer.fields if name in params.model_fields_set}
    if len(params.target_horizons or []) > trainer.most_horizons:
        values.pop("target_horizons", None)
    return {name: value for name, value in values.items() if value not in (None, [])}


@dataclass(kw_only=True, eq=False)
class TrainingService:
    """Starts, shows, follows and cancels the trainings of one folder of models.

    Attributes
    ----------
    command
        Returns the command of a job, given its parameters and the path for its events.
    environment
        Of the commands.
    workers, hours
        Trainings at a time, and hours after which one is stopped.
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

    def start(self, params: TrainingParams) -> TrainingJob:
        """Queue a training; refuse a symbol that is being trained, or whose model is not to be replaced."""
        symbol = normalise_symbol(params.symbol)
        params, trainer = params.model_copy(update={"symbol": symbol}), trainer_of(params)
        self.refuse_busy(symbol)
        if self._artifact(params) is not None and not (params.overwrite or params.overwrite_existing):
            raise ModelExistsError(
                f"{symbol} has a model ({trainer.artifact}) already: send overwrite to train it anew"
            )
        if self.waiting() >= MAX_QUEUED:
            raise OverloadError(f"{MAX_QUEUED} trainings are waiting: try again when some are done")
        state = TrainingJob(
            id=uuid.uuid4().hex,
            symbol=symbol,
            status="queued",
            progress=0.0,
            current_epoch=0,
            total_epochs=params.epochs if "epochs" in trainer.fields else 0,
            started_at=now(),
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
        return len(self._store.jobs(Job.status == "queued"))

    def get(self, job_id: str) -> TrainingJob:
        """Return one job, or raise `JobMissingError`."""
        return self._job(job_id).state

    def is_training(self, symbol: str) -> bool:
        """Whether a job of this service, or somebody's command line, trains a normalised symbol right now."""
        running = self._store.jobs(Job.status == "running", Job.symbol == symbol)
        return bool(running) or training_holder(self.models_dir, symbol) is not None

    def cancel(self, job_id: str) -> TrainingJob:
        """End a job and all that it has started; return what became of it.

        A job that had ended before stays what it was. So does one whose model was saved in the last moment.
        """
        state, event = ended(self.get(job_id), "cancelled", CANCELLED)
        if not self._store.change(state, [event], was="queued"):
            self._store.note(job_id, {"cancel": True})
        until = time.monotonic() + CANCEL_WAIT_S
        while (state := self.get(job_id)).status in ACTIVE and time.monotonic() < until:
            time.sleep(0.05)
        return state

    async def follow(
        self, job_id: str, after: int = 0, should_end: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[dict[str, str]]:
        """Yield the events of a job, told before and from now on, to its end or until the caller wants to go.

        Those up to number ``after`` are known; the last one of all is told again, so that who comes back for
        more does not come back for ever.
        """
        state, told_at = await asyncio.to_thread(self.get, job_id), time.monotonic()
        while not should_end():
            found = await asyncio.to_thread(self._history, job_id, after)
            if not found and state.status not in ACTIVE:
                event = event_of(state, state.status, message=state.error)
                found = [(after, event.type, wire_text(event))]
            for number, kind, text in found:
                yield {"id": str(number), "data": text}
                after, told_at = number, time.monotonic()
                if kind in ENDS:
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

    def _job(self, job_id: str) -> Job:
        found = self._store.jobs(Job.id == job_id) if re.fullmatch(r"[0-9a-f]{32}", job_id) else []
        if not found:
            raise JobMissingError(f"no training job {job_id[:40]!a}: GET /api/training lists what there is")
        return found[0]

    def refuse_busy(self, symbol: str) -> None:
        """Raise `ConflictError` where a job, or somebody's command line, trains a symbol, or will."""
        for job in self._store.jobs(Job.symbol == symbol, Job.status.in_(ACTIVE)):
            words = f"{symbol} is {job.status} as job {job.id}"
            raise ConflictError(f"{words}: wait for it, or DELETE /api/training/{job.id}")
        holder = training_holder(self.models_dir, symbol)
        if holder is not None:
            raise ConflictError(f"{symbol} is being trained by process {holder}: wait or stop it")

    def _artifact(self, params: TrainingParams) -> Path | None:
        link = symbol_dir(self.models_dir, params.symbol) / trainer_of(params).artifact
        if link.is_symlink():
            return link.readlink()
        return link if link.exists() else None

    def _run(self) -> None:
        """Look for something to do, by the right of who holds the lock, until the end."""
        lock = FileLock(self.models_dir / ".training-queue.lock")
        mine: dict[str, threading.Thread] = {}
        while not self._stop.wait(POLL_S):
            try:
                self._attend_queue(lock, mine)
            except Timeout:
                logger.debug("another process runs the trainings")
            except StorageError as error:
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
        if not lock.is_locked:
            if not self._store.jobs(Job.status.in_(ACTIVE)):
                return
            self.models_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        for job in self._store.jobs(Job.status.in_(ACTIVE)):
            if job.status == "running" and job.id not in mine:
                self._close_left_behind(job)
            elif job.status == "queued" and len(mine) < self.workers:
                running = {"status": "running", "started_at": now(), "current_step": "starting"}
                state = job.state.model_copy(update=running)
                if self._store.change(state, [event_of(state, "started")], was="queued"):
                    mine[job.id] = threading.Thread(target=self._train, args=(job.params, Told(state)))
                    mine[job.id].daemon = True
                    mine[job.id].start()

    def _close_left_behind(self, job: Job) -> None:
        # The id alone may be that of a process which has nothing to do with it.
        if job.pid is not None and job.born is not None and birth(job.pid) == job.born:
            logger.warning("process %s of an interrupted training is ended", job.pid)
            signal_group(job.pid, signal.SIGKILL)
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
            process, readers = start_trainer(
                lambda events: self.command(params, events), self.environment, told.take
            )
        except OSError as error:
            return "failed", f"the trainer cannot be started ({error.strerror})"
        try:
            reason = self._attend(process, params, told)
        finally:
            end_trainer(process, readers)
        if reason is None or process.returncode == 0:
            return told.outcome(process.returncode)
        if reason != CANCELLED:
            return "failed", reason
        return ("completed", TOO_LATE) if self._artifact(params) != before else ("cancelled", CANCELLED)

    def _attend(self, process: subprocess.Popen[str], params: TrainingParams, told: Told) -> str | None:
        """Write down what the trainer tells until it ends (None), or should (why)."""
        unused = unused_fields(params)
        if unused:
            told.take("log", f"not used by {trainer_of(params).module}: {', '.join(unused)}")
        until = time.monotonic() + 3600.0 * self.hours
        while process.poll() is None:
            if self._is_unwanted(process.pid, told):
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
                self._store.note(job.id, {"pid": pid, "born": birth(pid)})
            if events := told.events():
                self._store.change(told.state, events, was="running")
        except StorageError as error:
            logger.warning("what job %s tells is late: %s", told.state.id, error)
            return False
        return job.cancel

    def _finish(
        self, state: TrainingJob, status: JobStatus, words: str, events: Sequence[TrainingEvent] = ()
    ) -> None:
        """Write down how a job that ran has ended, however long the database takes for it."""
        last, event = ended(state, status, words)
        level = logging.WARNING if status == "failed" else logging.INFO
        logger.log(level, "training %s of %s: %s: %s", last.id, last.symbol, status, words)
        while True:
            try:
                self._store.change(last, [*events, event], was="running")
            except StorageError as error:
                logger.warning("the end of job %s is not written yet: %s", last.id, error)
                if self._stop.wait(RETRY_S):
                    return
            else:
                return
