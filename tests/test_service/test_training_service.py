"""Trainings that the service runs: the queue, the process of a job, its events, and what may go wrong."""

import asyncio
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

import app
from service import training_service
from service.api import Services, create_api
from service.edge import OverloadError
from service.model_registry import ModelRegistry
from service.schemas import ModelType, TrainingEvent, TrainingJob, TrainingParams
from service.training_service import (
    LINE_CHARS,
    Told,
    TrainingService,
    asked_for,
    birth,
    lines_of,
    trainer_command,
)
from tests.test_service.conftest import BOTH
from tests.test_service.test_api import check_problem
from training import train_gbm, train_lstm
from utils.base import ConflictError, JobMissingError, ModelExistsError, Settings, StorageError, UsageError
from utils.model_paths import training_lock

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
CHILD = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
PRELUDE = """
import json, os, signal, subprocess, sys, time
stream = open(sys.argv[1], "w", buffering=1)
def tell(**event):
    stream.write(json.dumps({"status": "running", "progress": 0.0, **event}) + "\\n")
"""
FOREVER = "print('begun', flush=True)\ntime.sleep(600)"
GRANDCHILD = """
deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", "import signal, time; " + deaf], stdout=subprocess.PIPE)
child.stdout.readline()
tell(type="stage", stage=f"child {child.pid}")
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_service, "POLL_S", 0.03)
    monkeypatch.setattr(training_service, "GRACE_S", 0.4)


def stub(code: str) -> Callable[[TrainingParams, str], list[str]]:
    """Return the builder of a command that runs ``code`` and takes the path of the events as its argument."""
    script = PRELUDE + textwrap.dedent(code)
    return lambda _params, events: [sys.executable, "-S", "-c", script, events]


MakeService = Callable[..., TrainingService]


@pytest.fixture
def make(tmp_path: Path, database_url: str) -> Iterator[MakeService]:
    """Return a maker of services over one folder of models; all are closed at the end."""
    made: list[TrainingService] = []

    def build(code: str = "", **changes: object) -> TrainingService:
        models = tmp_path / "models"
        service = TrainingService(
            **{
                "models_dir": models,
                "database_url": database_url,
                "command": stub(code),
                "environment": dict(os.environ),
                **changes,
            }
        )
        made.append(service)
        return service

    yield build
    for service in made:
        service.close()


def params(symbol: str = "AAPL", **fields: object) -> TrainingParams:
    return TrainingParams.model_validate({"symbol": symbol, **fields})


def wait_for(found: Callable[[], T], seconds: float = 10.0) -> T:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.02)
    return value


def ended(service: TrainingService, job_id: str) -> TrainingJob:
    return wait_for(
        lambda: (job := service.get(job_id)).status in {"completed", "failed", "cancelled"} and job
    )


def running(service: TrainingService, job_id: str) -> int:
    """Wait until a job's process is known, and return its id."""
    return wait_for(lambda: service._job(job_id).pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def events_of(service: TrainingService, job_id: str, after: int = 0) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        return [json.loads(event["data"]) async for event in service.follow(job_id, after)]

    return asyncio.run(asyncio.wait_for(read(), 20))


# ---------------------------------------------------------------- a job that goes well


EPOCHS = """
tell(type="started")
for epoch in (1, 2):
    tell(type="epoch", progress=epoch / 2, epoch=epoch, totalEpochs=2, trainLoss=0.5, valLoss=0.6,
         learningRate=1e-3, directionalAccuracy=0.52, varianceScore=0.3)
print("a line of the log")
tell(type="completed", status="completed", progress=1.0, message="AAPL: no-edge")
"""


@BOTH
def test_a_job_runs_and_tells_all_that_the_trainer_told(make: MakeService) -> None:
    service = make(EPOCHS)
    service.open()
    job = service.start(params(" aapl "))
    assert (job.symbol, job.status, job.model_type) == ("AAPL", "queued", "gbm")
    done = ended(service, job.id)
    assert (done.status, done.progress, done.error) == ("completed", 1.0, None)
    assert (done.current_epoch, done.total_epochs) == (2, 2)
    assert done.metrics is not None
    assert done.metrics.variance_score == 0.3
    assert done.completed_at is not None
    assert done.started_at < done.completed_at
    told = events_of(service, job.id)
    assert [e["type"] for e in told if e["type"] != "log"] == [
        "stage",
        "started",
        "epoch",
        "epoch",
        "completed",
    ]
    assert [e["message"] for e in told if e["type"] == "log"] == ["a line of the log"]
    assert told[-1]["message"] == "AAPL: no-edge"
    for event in told:
        TrainingEvent.model_validate(event)
        assert event["timestamp"]
    epoch = next(e for e in told if e["type"] == "epoch")
    assert {"epoch", "totalEpochs", "trainLoss", "valLoss", "learningRate", "timestamp"} <= set(epoch)


def test_jobs_wait_for_each_other(make: MakeService) -> None:
    service = make("time.sleep(0.3)")
    service.open()
    first, second = (service.start(params(symbol)).id for symbol in ("A", "B"))
    running(service, first)
    assert service.get(second).status == "queued"
    assert ended(service, second).started_at >= (ended(service, first).completed_at or "")
    assert [job.id for job in service.list()] == [second, first]


def test_two_workers_run_two_jobs(make: MakeService) -> None:
    service = make(FOREVER, workers=2)
    service.open()
    for job in [service.start(params(symbol)).id for symbol in ("A", "B")]:
        running(service, job)


@BOTH
def test_a_late_subscriber_gets_the_history_once_and_then_the_end(make: MakeService) -> None:
    service = make("for i in range(5): tell(type='stage', stage=str(i)); time.sleep(0.05)")
    service.open()
    job_id = service.start(params()).id
    early = events_of(service, job_id)
    assert events_of(service, job_id) == early
    assert [event["type"] for event in early].count("completed") == 1
    assert events_of(service, job_id, after=3) == early[3:]
    # Who knows it all, and comes back nevertheless, is told of the end again.
    (again,) = events_of(service, job_id, after=len(early))
    assert again["type"] == "completed"


def test_who_waits_hears_a_heartbeat(make: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_service, "HEARTBEAT_S", 0.1)
    service = make()
    job_id = service.start(params()).id

    async def first(kind: str) -> dict[str, Any]:
        async for event in service.follow(job_id):
            told = json.loads(event["data"])
            if told["type"] == kind:
                assert "id" not in event
                return told
        raise AssertionError("the stream has ended")

    beat = asyncio.run(asyncio.wait_for(first("heartbeat"), 10))
    assert (beat["status"], beat["progress"]) == ("queued", 0.0)


def test_who_waits_is_not_sent_away_while_the_database_is(
    make: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_service, "HEARTBEAT_S", 0.05)
    service = make()
    job_id = service.start(params()).id

    async def follow() -> list[str]:
        stream = service.follow(job_id, after=1)
        await anext(stream)
        with monkeypatch.context() as away:
            away.setattr(service._store._database, "read", unreadable)
            await anext(stream)
        service.cancel(job_id)
        return [json.loads(event["data"])["type"] async for event in stream]

    def unreadable(_query: object) -> list[object]:
        raise StorageError("planted")

    assert asyncio.run(asyncio.wait_for(follow(), 10))[-1] == "cancelled"


def test_subscribers_that_leave_leave_nothing(make: MakeService) -> None:
    service = make(FOREVER)
    service.open()
    job_id = service.start(params()).id
    running(service, job_id)

    async def come_and_go() -> int:
        for _ in range(30):
            stream = service.follow(job_id)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
        return len(asyncio.all_tasks())

    threads = threading.active_count()
    assert asyncio.run(come_and_go()) == 1
    assert threading.active_count() <= threads
    assert service.cancel(job_id).status == "cancelled"


# ---------------------------------------------------------------- one at a time


@BOTH
def test_a_symbol_is_trained_once_at_a_time(make: MakeService) -> None:
    service = make(FOREVER)
    first = service.start(params())
    with pytest.raises(ConflictError, match=f"AAPL is queued as job {first.id}"):
        service.start(params("aapl", overwrite=True))
    service.open()
    running(service, first.id)
    with pytest.raises(ConflictError, match=f"AAPL is running as job {first.id}"):
        service.start(params())
    service.refuse_busy("MSFT")
    service.cancel(first.id)
    service.start(params())


@BOTH
def test_many_starts_at_once_are_one_job(make: MakeService) -> None:
    services = [make(), make()]
    outcomes: list[str] = []

    def start(service: TrainingService) -> None:
        try:
            outcomes.append(service.start(params()).status)
        except ConflictError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start, args=(services[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["queued"] + 7 * ["refused"]
    assert len(services[0].list()) == 1


def test_a_training_of_the_command_line_is_named(make: MakeService, tmp_path: Path) -> None:
    service = make()
    held = training_lock(tmp_path / "models", "AAPL")
    with held, pytest.raises(ConflictError, match=f"by process {os.getpid()}"):
        service.start(params())
    service.start(params())


def test_the_name_that_a_killed_trainer_left_holds_nobody_up(make: MakeService, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "AAPL"
    folder.mkdir(parents=True)
    (folder / ".training.pid").write_text("1")
    make().refuse_busy("AAPL")


@pytest.mark.parametrize(
    ("kind", "link"), [("gbm", "gbm"), ("lstm_transformer", "lstm"), ("stacking", "ensemble")]
)
def test_a_model_is_replaced_only_when_asked(make: MakeService, tmp_path: Path, kind: str, link: str) -> None:
    (tmp_path / "models" / "AAPL" / link).mkdir(parents=True)
    service = make()
    with pytest.raises(ModelExistsError, match="send overwrite"):
        service.start(params(modelType=kind))
    with pytest.raises(ModelExistsError):
        service.start(params(modelType=kind, overwrite=False))
    service.start(params(modelType=kind, overwriteExisting=True))
    service.start(params("MSFT", modelType=kind))


def test_the_queue_is_bounded(make: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_service, "MAX_QUEUED", 2)
    service = make()
    for symbol in ("A", "B"):
        service.start(params(symbol))
    with pytest.raises(OverloadError, match="2 trainings are waiting"):
        service.start(params("C"))


@BOTH
def test_old_jobs_are_forgotten_and_active_ones_never(
    make: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_service, "KEPT_JOBS", 3)
    service = make()
    waits = service.start(params("WAITS")).id
    ids = []
    for _ in range(6):
        ids.append(service.start(params()).id)
        service.cancel(ids[-1])
    assert {job.id for job in service.list()} == {waits, *ids[-3:]}
    with pytest.raises(JobMissingError):
        service.get(ids[0])


# ---------------------------------------------------------------- the command


def test_what_the_caller_gave_becomes_flags() -> None:
    given_all = params(
        overwrite=True, nTrials=7, maxFeatures=9, targetHorizons=[5, 1], useLgb=False, baseSeed=3, epochs=4
    )
    command = trainer_command(given_all, "/dev/fd/9", source="sample")
    assert command[:3] == [sys.executable, "-m", "training.train_gbm"]
    assert command[3:9] == ["AAPL", "--source", "sample", "--events", "/dev/fd/9", "--overwrite"]
    text = " ".join(command)
    for words in ("--n-trials 7", "--max-features 9", "--target-horizon 5,1", "--no-lgb", "--seed 3"):
        assert words in text
    assert asked_for(given_all)[1] == ["epochs"]


def test_what_the_caller_left_out_stays_the_trainers_default() -> None:
    bare = trainer_command(params(useLgb=True, allowCpuFallback=False), "e", source="yahoo")
    assert bare == [sys.executable, "-m", "training.train_gbm", "AAPL", "--source", "yahoo", "--events", "e"]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (None, "training.train_gbm"),
        ("gbm", "training.train_gbm"),
        ("lstm", "training.train_lstm"),
        ("lstm_transformer", "training.train_lstm"),
        ("ensemble", "training.train_ensemble"),
        ("stacking", "training.train_ensemble"),
    ],
)
def test_each_kind_of_model_has_its_trainer(kind: str | None, module: str) -> None:
    fields = {} if kind is None else {"modelType": kind}
    command = trainer_command(params(**fields, epochs=3, learningRate=0.01), "e", source="sample")
    assert command[2] == module
    assert ("--epochs" in command) == (module == "training.train_lstm")


@pytest.mark.parametrize("kind", get_args(ModelType))
def test_the_flags_are_those_of_the_trainer(kind: str) -> None:
    wanted = params(
        modelType=kind,
        overwrite=True,
        nTrials=7,
        maxFeatures=9,
        targetHorizons=[1],
        useLgb=False,
        baseSeed=3,
        epochs=4,
        batchSize=8,
        sequenceLength=10,
        loss="mae",
        dropout=0.1,
        learningRate=1e-5,
    )
    command = trainer_command(wanted, "e", source="sample")
    args = importlib.import_module(command[2]).build_parser().parse_args(command[3:])
    assert (args.symbols, args.source, args.events, args.seed) == (["AAPL"], "sample", "e", 3)
    assert args.overwrite
    if kind == "gbm":
        assert (args.n_trials, args.max_features, args.target_horizon, args.no_lgb) == (7, 9, (1,), True)
    if kind.startswith("lstm"):
        assert (args.epochs, args.batch_size, args.sequence_length) == (4, 8, 10)
        assert (args.loss, args.dropout, args.learning_rate) == ("mae", 0.1, 1e-5)


def test_horizons_that_a_trainer_cannot_take_are_named_and_not_guessed_at() -> None:
    several = params(modelType="lstm", targetHorizons=[5, 1], featureToggles={}, dataPeriod="5y")
    assert "--target-horizon" not in trainer_command(several, "e", source="sample")
    assert asked_for(several)[1] == ["dataPeriod", "targetHorizons"]
    assert trainer_command(params(targetHorizons=[5, 1]), "e", source="sample")[-1] == "5,1"


def test_what_a_job_says_of_its_training_is_what_runs(make: MakeService) -> None:
    """Defaults of the wire are those of the trainers, and what the wire accepts their commands take."""
    service = make()
    for number, (told, epochs) in enumerate([({}, 50), ({"epochs": 100}, 100)]):
        wanted = params(symbol=f"A{number}", modelType="lstm", **told)
        command = trainer_command(wanted, "e", source="sample")
        args = train_lstm.build_parser().parse_args(command[3:])
        assert service.start(wanted).total_epochs == args.epochs == epochs
        for name in ("batch_size", "sequence_length", "loss"):
            assert getattr(wanted, name) == getattr(args, name), name
        assert wanted.base_seed == args.seed
    assert params().base_seed == train_gbm.build_parser().parse_args(["AAPL"]).seed
    largest = {"epochs": 10_000, "batchSize": 65_536, "sequenceLength": 1_000, "baseSeed": 2**31 - 1}
    largest |= {"dropout": 0.89, "learningRate": 0.99}
    command = trainer_command(params(modelType="lstm", **largest), "e", source="sample")
    args = train_lstm.build_parser().parse_args(command[3:])
    assert (args.dropout, args.learning_rate, args.sequence_length) == (0.89, 0.99, 1_000)


# ---------------------------------------------------------------- faults 24 and 25


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "print('out of cheese', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            "SIGKILL .out of memory",
        ),
        (
            "print('out of cheese', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            "killed by SIGSEGV: out of",
        ),
        ("print('out of cheese'); sys.exit(4)", "exit code 4: out of cheese"),
        ("tell(type='failed', status='failed', message='30 rows, 400 needed'); sys.exit(4)", "4: 30 rows"),
        ("raise ValueError('the cheese in /some/where/file.py is out')", "ValueError: the cheese in file.py"),
        ("sys.exit(1)", "exit code 1: it said nothing"),
        ("tell(type='completed', status='completed'); sys.exit(1)", "exit code 1"),
    ],
)
def test_fault_24_a_failed_job_says_how_and_why(make: MakeService, code: str, words: str) -> None:
    service = make(code)
    service.open()
    job = ended(service, service.start(params()).id)
    assert job.status == "failed"
    assert job.error is not None
    assert re.search(words, job.error), job.error
    assert "Traceback" not in job.error
    assert "/some" not in job.error
    last = events_of(service, job.id)[-1]
    assert (last["type"], last["message"]) == ("failed", job.error)


def test_a_command_that_does_not_exist_fails_the_job_and_not_the_queue(make: MakeService) -> None:
    commands = iter([["/nonexistent/trainer"], [sys.executable, "-S", "-c", ""]])
    service = make(command=lambda _params, _events: next(commands))
    service.open()
    first, second = (service.start(params(symbol)).id for symbol in ("A", "B"))
    assert "cannot be started (No such file" in (ended(service, first).error or "")
    assert ended(service, second).status == "completed"


def test_a_bug_of_the_service_fails_the_job_and_not_the_queue(
    make: MakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_service, "RETRY_S", 0.01)

    def broken(_params: TrainingParams, _events: str) -> list[str]:
        raise ZeroDivisionError("planted")

    service = make(command=broken)
    service.open()
    job = ended(service, service.start(params()).id)
    assert "something broke in the service" in (job.error or "")
    wait_for(lambda: "planted" in caplog.text)


def test_fault_24_a_stopped_service_leaves_no_process_and_says_interrupted(make: MakeService) -> None:
    service = make(GRANDCHILD)
    service.open()
    runs, waits = (service.start(params(symbol)).id for symbol in ("A", "B"))
    child = int(wait_for(lambda: step_of(service, runs, "child ")).removeprefix("child "))
    leader = running(service, runs)
    service.close()
    assert not is_alive(leader)
    assert not is_alive(child)
    job = service.get(runs)
    assert job.status == "failed"
    assert (job.error or "").startswith("interrupted: ")
    assert service.get(waits).status == "queued"
    again = make("")
    again.open()
    assert ended(again, waits).status == "completed"


def step_of(service: TrainingService, job_id: str, start: str) -> str | None:
    step = service.get(job_id).current_step or ""
    return step if step.startswith(start) else None


@BOTH
def test_fault_24_what_a_killed_service_left_is_ended_at_the_next_start(
    make: MakeService, tmp_path: Path, database_url: str
) -> None:
    """A service in a process of its own is killed; its trainer, which hears nothing of it, lives on."""
    script = f"""
import os, sys, time
from pathlib import Path
from service.training_service import TrainingService
from service.schemas import TrainingParams
models = Path({str(tmp_path / "models")!r})
service = TrainingService(models_dir=models, database_url={database_url!r},
    command=lambda _params, _events: [sys.executable, "-S", "-c", "import time; time.sleep(600)"],
    environment=dict(os.environ))
service.open()
for symbol in ("RUNS", "WAITS"):
    service.start(TrainingParams(symbol=symbol))
time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=CHILD)
    try:
        service = make("")
        runs = wait_for(lambda: next((j.id for j in service.list() if j.symbol == "RUNS"), None), 30)
        trainer = running(service, runs)
    finally:
        server.kill()
        server.wait()
    assert is_alive(trainer)
    assert service.get(runs).status == "running"
    service.open()
    job = ended(service, runs)
    assert job.status == "failed"
    assert (job.error or "").startswith("interrupted: ")
    wait_for(lambda: not is_alive(trainer))
    waits = next(j.id for j in service.list() if j.symbol == "WAITS")
    assert ended(service, waits).status == "completed"
    assert events_of(service, runs)[-1]["type"] == "failed"


def test_a_stranger_with_the_id_of_an_interrupted_trainer_lives(make: MakeService) -> None:
    stranger = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        service = make("")
        job = service.start(params())
        running_state = job.model_copy(update={"status": "running"})
        service._store.change(running_state, [], was="queued")
        service._store.note(job.id, {"pid": stranger.pid, "born": "another boot/1"})
        service.open()
        assert ended(service, job.id).status == "failed"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_birth_tells_processes_apart() -> None:
    first, second = (
        subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) for _ in "ab"
    )
    with first, second:
        assert birth(first.pid) == birth(first.pid) != birth(os.getpid())
        first.kill()
        second.kill()
    assert birth(first.pid) is None


@BOTH
def test_only_one_service_runs_the_queue_and_another_takes_over(make: MakeService) -> None:
    first, second = make(FOREVER), make("")
    first.open()
    job_id = first.start(params()).id
    running(first, job_id)
    second.open()
    time.sleep(0.2)
    # Not its own, so it neither closes nor runs it; and yet it shows, follows and cancels it.
    assert second.get(job_id).status == "running"
    assert second.cancel(job_id).status == "cancelled"
    next_id = second.start(params()).id
    running(first, next_id)
    first.close()
    assert (first.get(next_id).error or "").startswith("interrupted: ")
    assert ended(second, second.start(params()).id).status == "completed"


@BOTH
def test_fault_25_cancel_ends_the_whole_group_and_twice_is_harmless(make: MakeService) -> None:
    service = make(GRANDCHILD)
    service.open()
    job_id = service.start(params()).id
    child = int(wait_for(lambda: step_of(service, job_id, "child ")).removeprefix("child "))
    leader = running(service, job_id)
    assert is_alive(child)
    job = service.cancel(job_id)
    assert (job.status, job.error) == ("cancelled", None)
    assert not is_alive(leader)
    wait_for(lambda: not is_alive(child))
    assert service.cancel(job_id) == job
    assert [e["type"] for e in events_of(service, job_id)].count("cancelled") == 1


def test_a_job_that_waits_is_cancelled_without_ever_running(make: MakeService) -> None:
    service = make("")
    job_id = service.start(params()).id
    assert service.cancel(job_id).status == "cancelled"
    service.open()
    assert ended(service, service.start(params()).id).status == "completed"
    assert [e["type"] for e in events_of(service, job_id)] == ["stage", "cancelled"]


def test_a_job_that_had_ended_stays_what_it_was(make: MakeService) -> None:
    service = make("")
    service.open()
    done = ended(service, service.start(params()).id)
    assert service.cancel(done.id) == done


def test_a_cancel_that_comes_after_the_save_does_not_deny_the_model(
    make: MakeService, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "AAPL"
    service = make(f"os.makedirs({str(folder)!r}); os.symlink('v1', {str(folder / 'gbm')!r})\n" + FOREVER)
    service.open()
    job_id = service.start(params()).id
    wait_for((folder / "gbm").is_symlink)
    assert service.cancel(job_id).status == "completed"
    assert "before the training could be cancelled" in events_of(service, job_id)[-1]["message"]


def test_a_training_without_end_is_stopped(make: MakeService) -> None:
    service = make(FOREVER, hours=0.2 / 3600)
    service.open()
    assert "took more than" in (ended(service, service.start(params()).id).error or "")


def test_fault_25_a_line_of_a_megabyte_is_cut(make: MakeService) -> None:
    code = "print('x' * (1 << 20))\nstream.write('y' * (1 << 20) + '\\n')\ntell(type='stage', stage='after')"
    service = make(code)
    service.open()
    job_id = service.start(params()).id
    assert ended(service, job_id).status == "completed"
    told = events_of(service, job_id)
    assert "after" in [event.get("stage") for event in told]
    assert max(len(json.dumps(event)) for event in told) < 2_000
    assert len(told) == 6


def test_a_flood_of_lines_is_counted_and_not_kept(make: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make("for i in range(100_000): print(i)\ntell(type='stage', stage='after')")
    service.open()
    job_id = service.start(params()).id
    assert ended(service, job_id).status == "completed"
    told = events_of(service, job_id)
    assert len(told) <= training_service.KEPT_LOGS + 100
    assert any("more lines are left out" in event.get("message", "") for event in told)
    assert "after" in [event.get("stage") for event in told]


@BOTH
def test_old_log_lines_go_and_epochs_stay(make: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_service, "KEPT_LOGS", 5)
    store = make()._store
    state = make().start(params())
    for i in range(10):
        logs = [training_service.event_of(state, "log", message=f"{i} {j}") for j in range(4)]
        assert store.change(state, [training_service.event_of(state, "epoch"), *logs], was="queued")
    kinds = [kind for _, kind, _ in store.history(state.id, 0)]
    assert kinds.count("epoch") == 10
    assert kinds.count("log") <= 9


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        '{"type": "epoch"}',
        '{"type": "nonsense", "status": "running", "progress": 0}',
        '{"type": "epoch", "status": "running", "progress": NaN}',
        '{"type": "epoch", "status": "running", "progress": 0.5, "trainLoss": Infinity}',
        '{"type": "epoch", "status": "running", "progress": 7}',
        "[" * 5_000,
    ],
)
def test_events_that_make_no_sense_are_lines_of_the_log(make: MakeService, line: str) -> None:
    told = Told(make().start(params()))
    told.take("event", line)
    assert [event.type for event in told.events()] == ["log"]


def test_a_trainer_cannot_end_its_job_by_saying_so(make: MakeService) -> None:
    told = Told(make().start(params()))
    for kind in ("started", "completed", "failed", "cancelled", "heartbeat"):
        told.take("event", f'{{"type": "{kind}", "status": "completed", "progress": 1}}')
    assert told.events() == []
    assert told.state.status == "queued"


@given(st.text("ab\r\n é", max_size=300), st.integers(1, 50))
def test_lines_are_those_that_were_written(text: str, size: int) -> None:
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    stream._CHUNK_SIZE = size
    assert list(lines_of(stream)) == [line for line in map(str.rstrip, re.split(r"[\r\n]", text)) if line]


def test_a_line_is_cut_at_its_bound() -> None:
    for length in (LINE_CHARS - 1, LINE_CHARS, LINE_CHARS + 1, 10 * LINE_CHARS):
        stream = io.StringIO("x" * length + "\n\nnext")
        assert list(lines_of(stream)) == ["x" * min(length, LINE_CHARS), "next"]


def test_no_descriptor_and_no_thread_is_left(make: MakeService) -> None:
    def left() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    commands = iter([[sys.executable, "-S", "-c", "print(1)"], ["/nonexistent"]] * 3)
    service = make(command=lambda _params, _events: next(commands))
    service.open()
    counts = []
    for _ in range(3):
        for _ in range(2):
            ended(service, service.start(params()).id)
        time.sleep(0.1)
        counts.append(left())
    # The first job has opened the database.
    assert counts[1] == counts[2]


# ---------------------------------------------------------------- the database


def test_nothing_is_written_before_the_first_job(make: MakeService, tmp_path: Path) -> None:
    service = make()
    service.open()
    assert service.list() == []
    service.refuse_busy("AAPL")
    with pytest.raises(JobMissingError):
        service.get("0" * 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nonsense", "postgresql+nonsense://x/y", ""])
def test_a_url_that_makes_no_sense_is_a_usage_error(make: MakeService, url: str) -> None:
    with pytest.raises(UsageError, match="AI_STOCKS_DATABASE_URL"):
        make(database_url=url)


def test_a_database_that_is_none_is_a_storage_error(make: MakeService, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "ai_stocks.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        make().start(params())


def test_the_end_of_a_job_waits_for_a_locked_database(
    make: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    # Another one, which waits for the database as long as one does.
    reader = make()
    monkeypatch.setattr(training_service, "DATABASE_WAIT_S", 0.05)
    monkeypatch.setattr(training_service, "RETRY_S", 0.05)
    service = make("time.sleep(0.3)")
    job_id = reader.start(params()).id
    service.open()
    pid = running(reader, job_id)
    blocker = sqlite3.connect(tmp_path / "db" / "ai_stocks.sqlite", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    wait_for(lambda: not is_alive(pid))
    time.sleep(0.3)
    blocker.execute("COMMIT")
    blocker.close()
    assert ended(reader, job_id).status == "completed"


def test_the_tables_hold_one_active_job_of_a_symbol_in_postgresql_too() -> None:
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.schema import CreateIndex, CreateTable

    tables = training_service.METADATA.sorted_tables
    text = " ".join(
        str(ddl.compile(dialect=postgresql.dialect()))
        for table in tables
        for ddl in (CreateTable(table), *map(CreateIndex, table.indexes))
    )
    assert "CREATE UNIQUE INDEX training_jobs_one_at_a_time" in text
    assert "WHERE status IN ('queued', 'running')" in text


def test_a_job_of_another_release_stops_nothing(make: MakeService, tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    service = make("")
    service.start(params("OLD"))
    with closing(sqlite3.connect(tmp_path / "db" / "ai_stocks.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE training_jobs SET params = '{}'")
    service.open()
    job = service.start(params("NEW"))
    assert ended(service, job.id).status == "completed"
    assert [job.symbol for job in service.list()] == ["NEW"]
    with pytest.raises(ConflictError, match="OLD"):
        service.start(params("OLD"))


def test_two_folders_of_models_in_one_database_do_not_meet(make: MakeService, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    one, other = (make(database_url=url, models_dir=tmp_path / name) for name in ("one", "other"))
    job = one.start(params())
    other.start(params())
    assert len(one.list()) == len(other.list()) == 1
    with pytest.raises(JobMissingError):
        other.get(job.id)


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def training(make: MakeService) -> TrainingService:
    return make(EPOCHS)


def read_events(client: TestClient, url: str, **headers: str) -> list[dict[str, Any]]:
    with client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert {line.partition(":")[0] for line in lines if line} <= {"id", "data"}
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


@BOTH
def test_trap_9_a_training_over_http(client: TestClient) -> None:
    answer = client.post("/api/training/start", json={"symbol": "aapl", "modelType": "lstm_transformer"})
    assert answer.status_code == 200
    assert set(answer.json()) == {"jobId"}
    job_id = answer.json()["jobId"]
    events = read_events(client, f"/api/training/{job_id}/events")
    assert events[-1]["type"] == "completed"
    assert read_events(client, f"/api/jobs/{job_id}/events") == events
    rest = read_events(client, f"/api/jobs/{job_id}/events", **{"Last-Event-ID": "4"})
    assert rest == events[4:]
    nonsense = read_events(client, f"/api/jobs/{job_id}/events", **{"Last-Event-ID": "9" * 400})
    assert nonsense == events
    (job,) = client.get("/api/training").json()
    assert job == client.get(f"/api/training/{job_id}").json()
    assert (job["status"], job["symbol"], job["modelType"]) == ("completed", "AAPL", "lstm_transformer")
    TrainingJob.model_validate(job)
    answer = client.delete(f"/api/training/{job_id}")
    assert answer.json() == {"status": "completed"}


def test_conflicts_over_http_are_problems_that_say_who(api: FastAPI) -> None:
    client = TestClient(api)
    job_id = client.post("/api/training/start", json={"symbol": "AAPL"}).json()["jobId"]
    assert job_id in check_problem(client.post("/api/training/start", json={"symbol": "AAPL"}), 409)
    for _ in range(2):
        assert client.delete(f"/api/training/{job_id}").json() == {"status": "cancelled"}


@pytest.mark.parametrize(("method", "path"), [("DELETE", ""), ("POST", "/rollback")])
def test_a_model_stays_while_its_symbol_is_trained(
    services: Services, make: MakeService, save_version: Callable[..., Path], method: str, path: str
) -> None:
    save_version(version="v1")
    folder = save_version(version="v2").parents[1]
    # The trainer of this job never takes the lock of its symbol: a real one does so seconds after its start.
    training = make(FOREVER)
    training.open()
    registry = ModelRegistry(folder.parent)
    client = TestClient(create_api(replace(services, registry=registry, training=training)))
    job = training.start(TrainingParams(symbol="AAPL", overwrite=True))
    wait_for(lambda: training.get(job.id).status == "running")
    detail = check_problem(client.request(method, f"/api/models/AAPL-gbm{path}"), 409)
    assert job.id in detail
    assert (folder / "gbm").readlink().name == "v2"
    for unknown in ("MSFT-gbm", "AAPL", "-gbm"):
        check_problem(client.request(method, f"/api/models/{unknown}{path}"), 404)
    training.cancel(job.id)
    assert client.request(method, f"/api/models/AAPL-gbm{path}").status_code != 409


@pytest.mark.parametrize("job", ["0" * 32, "nothing", "..", "%00", "%FF", "9" * 2_000])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/training/{}"),
        ("DELETE", "/api/training/{}"),
        ("GET", "/api/training/{}/events"),
        ("GET", "/api/jobs/{}/events"),
    ],
)
def test_fault_6_an_unknown_job_is_404(client: TestClient, method: str, path: str, job: str) -> None:
    check_problem(client.request(method, path.format(job)), 404)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"symbol": "../x"},
        {"symbol": "AAPL", "epochs": 0},
        {"symbol": "AAPL", "modelType": "svm"},
        {"symbol": "AAPL", "modelType": "lstm", "dropout": 0.9},
        {"symbol": "AAPL", "modelType": "lstm", "learningRate": 1.0},
        [],
    ],
)
def test_a_start_that_makes_no_sense_is_422(
    client: TestClient, training: TrainingService, body: object
) -> None:
    check_problem(client.post("/api/training/start", json=body), 422)
    assert training.list() == []


# ---------------------------------------------------------------- with the real trainer


def test_the_real_trainer_is_run_watched_and_served(csv_dir: Path, tmp_path: Path) -> None:
    settings = Settings(
        models_dir=tmp_path / "models",
        cache_dir=tmp_path / "cache",
        logs_dir=tmp_path / "logs",
        source=f"csv:{csv_dir}",
    )
    with TestClient(app.create_app(settings)) as client:  # type: ignore[arg-type]
        body = {"symbol": "SIGNAL", "nTrials": 0, "targetHorizons": [1], "useLgb": False}
        job_id = client.post("/api/training/start", json=body).json()["jobId"]
        events = read_events(client, f"/api/training/{job_id}/events")
        assert events[-1]["type"] == "completed", events[-5:]
        assert events[-1]["message"].startswith("SIGNAL: ")
        stages = [event["stage"] for event in events if event["type"] == "stage"]
        assert stages[-1] == "saving"
        assert any(stage.startswith("walk-forward, fold") for stage in stages)
        progress = [event["progress"] for event in events]
        assert progress == sorted(progress)
        assert any(e.get("message", "").startswith("fold: ") for e in events)
        assert [model["symbol"] for model in client.get("/api/models").json()] == ["SIGNAL"]
        assert client.post("/api/predict", json={"symbol": "SIGNAL"}).status_code == 200
        assert "overwrite" in check_problem(client.post("/api/training/start", json=body), 409)


def test_fault_24_the_real_trainer_ends_with_the_service_that_was_killed(
    csv_dir: Path, tmp_path: Path
) -> None:
    """Nobody starts the service again: the trainer notices by itself that nobody listens."""
    environment = {
        **Settings(
            models_dir=tmp_path / "models",
            cache_dir=tmp_path / "cache",
            logs_dir=tmp_path / "logs",
            source=f"csv:{csv_dir}",
        ).child_environment()
    }
    script = """
import sys, time
from utils.base import json_lines
with json_lines(sys.argv[1]) as write:
    write({"type": "stage", "stage": "begun"})
    time.sleep(600)
"""
    read, write = os.pipe()
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, f"/dev/fd/{write}"],
        pass_fds=(write,),
        env=environment,
        start_new_session=True,
    )
    os.close(write)
    try:
        with os.fdopen(read) as stream:
            assert json.loads(stream.readline())["stage"] == "begun"
            assert trainer.poll() is None
        assert trainer.wait(timeout=10) == -signal.SIGKILL
    finally:
        trainer.kill()
        trainer.wait()


def test_a_server_that_is_asked_to_end_ends_its_streams_and_its_trainer(
    csv_dir: Path, tmp_path: Path
) -> None:
    settings = Settings(models_dir=tmp_path / "models", cache_dir=tmp_path, source=f"csv:{csv_dir}")
    with app.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)],
        cwd=ROOT,
        env=settings.child_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/api/training"
        body = json.dumps({"symbol": "SIGNAL"}).encode()
        job_id = wait_for(lambda: ask(f"{url}/start", body), 60)["jobId"]
        with urllib.request.urlopen(f"{url}/{job_id}/events", timeout=30) as stream:  # noqa: S310
            while b'"started"' not in stream.readline():
                pass
            service = TrainingService(
                models_dir=settings.models_dir,
                database_url=settings.database,
                command=stub(""),
                environment={},
            )
            trainer = running(service, job_id)
            server.terminate()
            # To its orderly end: a stream that is cut would raise.
            stream.read()
        errors = server.communicate(timeout=20)[1]
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert "ERROR" not in errors
    assert not is_alive(trainer)
    assert (service.get(job_id).error or "").startswith("interrupted: ")


def ask(url: str, body: bytes) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.URLError:
        return {}
