"""The log of a run: its sections, its one word, and that it never stands in the way."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from rich.console import Console

from data.schema import Bars, BarsReport, Provenance
from training import run_log
from training.gbm_search import SearchConfig
from training.recipe import RecipeConfig, TrainerConfig
from training.run_log import SECTIONS, RunLog, fold_lines, logged_run, publish_report, show
from training.train_gbm import GBMTrainer
from training.trainer import Trained
from utils.base import DataError, GateRefusedError, UsageError

CONFIG = {"horizon_bars": 1, "recipe": {"seed": 7, "search": {"models": ("xgb",)}}}


@pytest.fixture(scope="module")
def trained(make_planted) -> Trained:
    frame = make_planted(n=1_700, seed=1)
    seen = Provenance(source="csv", fetched_at=frame.index[-1], last_session=frame.index[-1], stale=False)
    report = BarsReport(duplicates=3)
    config = TrainerConfig(horizon_bars=1, recipe=RecipeConfig(search=SearchConfig(n_trials=0)))
    trainer, bars = GBMTrainer(config), Bars(symbol="TEST", frame=frame, provenance=seen, report=report)
    # Of two looks at the prices before, the older was written by a version that recorded less.
    (before,) = GBMTrainer(replace(config, recipe=replace(config.recipe, seed=8))).runs({"TEST": bars})
    bare = replace(before, fingerprint="bare", at="", kind="", settings="", n_trials=2)
    return trainer.conclude(trainer.walk({"TEST": bars}), bars, earlier=(bare, before))


def the_log(folder: Path) -> str:
    (path,) = folder.glob("TEST_gbm_*.log")
    return path.read_text()


def sections(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("=== "):
            found[line.strip("= ")] = []
        elif line:
            found[list(found)[-1]].append(line)
    return found


def test_the_log_has_all_sections_in_order(tmp_path, trained):
    with logged_run(tmp_path, "TEST", CONFIG, "gbm") as log:
        logging.getLogger("lightgbm").warning("planted %s", "warning")
        log.conclude(trained)
    found = sections(the_log(tmp_path))
    assert tuple(found) == SECTIONS
    assert "recipe.search.models: ('xgb',)" in found["TRAINING CONFIG"]
    assert len(found["FOLD METRICS"]) == 1 + len(trained.walk_forward.folds)
    assert "sharpe" in found["FOLD METRICS"][0].split()
    assert f"verdict: {trained.verdict.label}" in found["FINAL METRICS"]
    gates = [line for line in found["FINAL METRICS"] if line.startswith("gate ")]
    assert len(gates) == len(trained.verdict.gates)
    assert all("threshold" in line and line.endswith(("passed", "failed", "not computed")) for line in gates)
    shown = next(line for line in gates if "direction accuracy" in line).removeprefix(
        "gate direction accuracy: "
    )
    value = {gate.name: gate.value for gate in trained.verdict.gates}["direction accuracy"]
    assert shown.startswith(f"{value:.2%} (threshold > 51%)"), "in the unit of its threshold"
    assert "lightgbm: planted warning" in found["WARNINGS"]
    assert any("doubled rows" in line for line in found["WARNINGS"])
    assert found["STATUS"][0] == {"edge": "SUCCESS"}.get(trained.verdict.label, "NO_EDGE")


def run_into(folder: Path, error: type[BaseException], work: Callable[[RunLog], None]) -> None:
    with pytest.raises(error), logged_run(folder, "TEST", CONFIG, "gbm") as log:
        work(log)


def with_collapsed(trained: Trained, share: float | None) -> Trained:
    summary = replace(trained.walk_forward.summary, collapsed_folds=share)
    return replace(trained, walk_forward=replace(trained.walk_forward, summary=summary))


@pytest.mark.parametrize(
    ("share", "collapsed"), [(None, False), (0.0, False), (0.49, False), (0.5, True), (1.0, True)]
)
def test_a_signal_that_hardly_varies_has_collapsed(tmp_path, trained, share, collapsed):
    with logged_run(tmp_path, "TEST", CONFIG, "gbm") as log:
        log.conclude(with_collapsed(trained, share))
    assert (log.status == "COLLAPSED") is collapsed


def test_an_error_ends_the_log_as_failed_and_goes_on(tmp_path):
    def work(log: RunLog) -> None:
        log.on_event({"type": "fold", "number": 0, "ic": 0.25, "n": 20})
        raise DataError("planted trouble")

    run_into(tmp_path, DataError, work)
    found = sections(the_log(tmp_path))
    assert found["STATUS"] == ["FAILED", "DataError: planted trouble"]
    assert found["FOLD METRICS"] == ["number   n    ic", "     0  20  0.25"]


def test_a_refused_verdict_keeps_its_word(tmp_path, trained):
    def work(log: RunLog) -> None:
        log.conclude(with_collapsed(trained, 1.0))
        raise GateRefusedError("strict")

    run_into(tmp_path, GateRefusedError, work)
    status = sections(the_log(tmp_path))["STATUS"]
    assert (status[0], status[-1]) == ("COLLAPSED", "refused: strict")


def test_a_closed_log_is_not_blamed_for_what_befalls_another(tmp_path, trained):
    def work(log: RunLog) -> None:
        log.conclude(with_collapsed(trained, 0.0))
        log.has_ended = True
        raise KeyboardInterrupt

    run_into(tmp_path, KeyboardInterrupt, work)
    assert sections(the_log(tmp_path))["STATUS"][0] in {"SUCCESS", "NO_EDGE"}


def test_a_run_that_is_killed_leaves_what_it_came_to(tmp_path):
    with logged_run(tmp_path, "TEST", CONFIG, "gbm") as log:
        log.on_event({"type": "fold", "number": 0, "ic": 0.25, "n": 20})
        found = sections(the_log(tmp_path))
    assert len(found["FOLD METRICS"]) == 2
    assert "STATUS" not in found


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, trained, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with logged_run(blocked, "TEST", CONFIG, "gbm") as log:
        log.on_event({"type": "fold", "number": 0, "ic": 0.25, "n": 20})
        log.conclude(trained)
        assert log.path is None
        assert publish_report(trained, blocked) is None
    said = [record.message for record in caplog.records]
    assert sum("no training log" in text for text in said) == 1
    assert sum("no report" in text for text in said) == 1


def test_the_handler_goes_with_the_run(tmp_path):
    before = list(logging.getLogger().handlers)
    with logged_run(tmp_path, "TEST", CONFIG, "gbm"):
        assert len(logging.getLogger().handlers) == len(before) + 1
    assert logging.getLogger().handlers == before


def test_undefined_is_a_word_and_never_a_zero():
    assert fold_lines([{"number": 0, "ic": None}])[1].split() == ["0", "undefined"]


def test_errors_are_shown_on_stderr_even_where_json_is_wanted(capsys):
    show({"symbol": "X", "error": "planted [b]", "exit_code": 2}, Console(stderr=True), in_full=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "planted [b]" in shown.err


def test_events_reach_the_logs_and_the_listener(tmp_path):
    heard: list[object] = []
    with logged_run(tmp_path, "TEST", CONFIG, "gbm") as log:
        run_log.together(log.on_event, heard.append)({"type": "stage", "stage": "x", "progress": 0.5})
        run_log.together(log.on_event, heard.append)({"type": "fold", "number": 0})
    assert len(heard) == 2
    assert sections(the_log(tmp_path))["FOLD METRICS"] == ["number", "     0"]


def test_the_report_shows_what_a_sceptic_asks_for(tmp_path, trained):
    path = publish_report(trained, tmp_path)
    assert path is not None
    page = " ".join(unescape(path.read_text()).split())
    for fold in trained.bundle.metadata["folds"]:
        assert f"{fold['test_start'][:7]} to {fold['test_end'][:7]}" in page
    for heading in ("Own IC", "Sharpe of hold", "Stability of the features", "Verdicts on these prices"):
        assert heading in page, heading
    for gate in trained.verdict.gates:
        assert gate.name in page
        assert gate.threshold in page
    for reason in trained.verdict.reasons:
        assert page.count(reason) >= 2, "in the banner and beside the gates"
    assert trained.bundle.metadata["device_reason"] in page
    assert "Verdicts that were sought on these prices before" in page
    assert "recipe.seed 8" in page
    names, unknown = ("at", "kind", "settings", "label", "limits_share"), "not recorded"
    bare = dict.fromkeys(names, unknown) | {"symbol": "TEST", "n_trials": 2}
    assert trained.bundle.metadata["tries"][0] == bare
    assert trained.verdict.evidence["n_trials"] == 4
    top = max(trained.bundle.importance, key=lambda name: trained.bundle.importance[name])
    assert top in page


def test_a_program_hears_of_the_run_in_the_names_of_the_wire(tmp_path):
    path = tmp_path / "events"
    with run_log.event_lines(str(path)) as tell:
        tell({"type": "stage", "stage": "features", "progress": 0.25})
        tell({"type": "fold", "number": 3, "ic": 0.0123456, "sharpe": None})
        tell({"type": "epoch", "epoch": 1, "total_epochs": 9, "train_loss": 0.5, "val_loss": float("nan")})
        tell(run_log.ending({"symbol": "TEST", "verdict": "no-edge"}))
        tell(run_log.ending(run_log.refused("TEST", DataError("too few"))))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["type"] for e in events] == ["started", "stage", "log", "epoch", "completed", "failed"]
    assert [e["progress"] for e in events] == [0.0, 0.25, 0.25, 0.25, 1.0, 1.0]
    assert {e["status"] for e in events[:4]} == {"running"}
    assert all(e["timestamp"] for e in events)
    assert events[2]["message"] == "fold: number 3, ic 0.01235"
    assert (events[3]["totalEpochs"], events[3]["trainLoss"]) == (9, 0.5)
    assert "valLoss" not in events[3], "NaN is no JSON"
    assert (events[4]["message"], events[5]["message"]) == ("TEST: no-edge", "too few")


def test_where_nobody_wants_events_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_log.event_lines(None) as tell:
        tell({"type": "stage", "stage": "features", "progress": 0.25})
    assert list(tmp_path.iterdir()) == []


def test_a_place_for_events_that_cannot_be_written_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"), run_log.event_lines(str(tmp_path)):
        pass


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="cannot be written"), run_log.event_lines(str(tmp_path / "pipe")):
        pass
