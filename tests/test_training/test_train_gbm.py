"""The command line as a person meets it: what each flag does, what it refuses, what it leaves behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from inference.load_gbm_models import load_bundle
from inference.pipeline import BundleForecaster, decide, path_ahead
from inference.position_sizing import make_sizer
from training import run_log, train_gbm
from training.train_gbm import DeviceChoice, build_parser, config_from, main, training_lock
from training.trainer import Trained
from utils.base import DeviceError, LockedError, Settings, StorageError
from utils.model_paths import list_versions
from validation.wfe_metrics import Run, share_of_limits

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--n-trials", "0"]
DRY = [*QUICK, "--validate-only"]


@pytest.fixture(scope="module")
def short_dir(tmp_path_factory: pytest.TempPathFactory, csv_dir: Path) -> Path:
    """The latest bars of `csv_dir`: two years out of sample."""
    folder = tmp_path_factory.mktemp("short")
    for path in csv_dir.glob("*.csv"):
        pd.read_csv(path).iloc[-1_520:].to_csv(folder / path.name, index=False)
    return folder


@pytest.fixture
def places(tmp_path: Path, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{short_dir}")
    # What it checks is tested with the store; it takes longer than the training.
    monkeypatch.setattr("inference.artifact.verify_in_fresh_process", lambda *_: None)
    return tmp_path


def test_a_planted_signal_is_an_edge_and_noise_is_not(tiny_bundle: Path):
    signal, noise = (load_bundle(tiny_bundle, name).metadata["verdict"] for name in ("SIGNAL", "NOISE"))
    assert signal["label"] == "edge", signal["reasons"]
    assert noise["label"] == "no-edge", noise["reasons"]
    assert signal["evidence"]["p_ic"] <= 0.05


def test_the_command_leaves_a_bundle_a_report_and_one_json_on_stdout(places, capsys):
    assert main(["noise", "--n-trials", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[0]
    assert result["symbol"] == "NOISE"
    assert result["verdict"] in {"edge", "no-edge", "insufficient"}
    assert "<html" in Path(result["report"]).read_text()[:500]
    assert load_bundle(places / "models", "NOISE").model_version == result["model_version"]

    assert main(["NOISE", "--n-trials", "1"]) == 6
    assert "--overwrite" in capsys.readouterr().err
    strict = ["NOISE", "--n-trials", "1", "--strict", "--overwrite"]
    assert main([*strict, "--json"]) == 7
    refused = json.loads(capsys.readouterr().out)[0]
    assert refused["verdict"] == result["verdict"] != "edge"
    assert refused["report"] in refused["error"]
    assert "<html" in Path(refused["report"]).read_text()[:500]
    deciding = [reason for reason in refused["reasons"] if not reason.startswith("met: ")][:-1]
    assert deciding
    assert all(reason in refused["error"] for reason in deciding)
    assert "; met: " not in refused["error"]
    assert len(list_versions(places / "models", "NOISE")) == 1


def test_gates_that_a_saved_bundle_bypasses_are_stored_and_told(places, capsys):
    assert main(["NOISE", "--n-trials", "0"]) == 0
    verdict = load_bundle(places / "models", "NOISE").metadata["verdict"]
    failed = [gate["name"] for gate in verdict["gates"] if gate["passed"] is False]
    assert verdict["bypassed_gates"] == failed
    assert failed, "noise passes all classic gates: choose other noise"
    told = f"saved although these classic gates fail: {', '.join(failed)}"
    assert told in " ".join(capsys.readouterr().out.split())
    assert 0.0 <= verdict["evidence"]["pbo"] <= 1.0
    assert main(["NOISE", "--n-trials", "0", "--validate-only"]) == 0
    assert "saved although" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["../../etc/passwd"], 2, "not a symbol"),
        (["GONE"], 3, "GONE"),
        (["NOISE", "--source", "nowhere"], 2, "csv:DIR"),
        (["NOISE", "--target-horizon", "900"], 2, "horizon"),
        (["NOISE", "--target-horizon", "5,900"], 2, "horizon"),
        (["NOISE", "--start", "2100-01-01"], 4, "--start 2100-01-01 leaves no prices of NOISE: the last"),
        (["NOISE", "--start", "LAST"], 4, "and there are 1"),
    ],
)
def test_errors_name_the_remedy_and_leave_nothing(
    places, short_dir, capsys, argv: list[str], code: int, words: str
):
    last = pd.read_csv(short_dir / "NOISE.csv")["Date"].iloc[-1][:10]
    assert main([last if word == "LAST" else word for word in (*argv, "--n-trials", "1")]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert ("2100-01-01" in argv) == (f"the last session is {last}" in shown.err)
    assert "Traceback" not in shown.err
    assert not list((places / "models").glob("[A-Z]*/gbm"))
    if code == 3:
        assert not (places / "models").exists()


def test_one_failing_symbol_loses_nothing_of_the_others(places, capsys):
    assert main(["GONE", "NOISE", "--n-trials", "1", "--json"]) == 3
    failed, trained = json.loads(capsys.readouterr().out)
    assert "GONE" in failed["error"]
    assert trained["symbol"] == "NOISE"


@pytest.mark.parametrize("flag", ["--jobs", "--max-features", "--seed", "--target-horizon"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_numbers_that_make_no_sense_are_usage_errors(capsys, flag: str, value: str):
    with pytest.raises(SystemExit, match="2"):
        main(["NOISE", f"{flag}={value}"])
    assert "at least 1" in capsys.readouterr().err


def test_every_other_try_on_the_same_prices_counts_and_a_repetition_keeps_its_limits(places, capsys):
    for tries, seed, limit in ((1, "7", "0.05"), (2, "8", "0.0125"), (2, "7", "0.05")):
        assert main(["NOISE", *DRY, "--seed", seed, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)[0]
        assert found["evidence"]["n_trials"] == tries
        assert [one["settings"] for one in found["tries"]] == (
            [] if tries == 1 else [f"{'recipe.seed 8, ' if seed == '7' else ''}recipe.search.n_trials 0"]
        )
        assert any(f"(at most {limit})" in reason for reason in found["reasons"])


def hold(models: Path, ready, release) -> None:
    with training_lock(models, "AAPL"):
        ready.set()
        release.wait(30)


def test_a_second_training_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    with pytest.raises(LockedError, match=str(other.pid)), training_lock(tmp_path, "AAPL"):
        pass
    other.kill()
    other.join()
    for _ in range(50):
        try:
            with training_lock(tmp_path, "AAPL"):
                return
        except LockedError:
            time.sleep(0.1)
    pytest.fail("the lock outlived its process")


def test_what_is_left_of_another_training_is_no_bug(tmp_path: Path):
    left = tmp_path / "AAPL" / ".training.pid"
    left.parent.mkdir()
    left.write_bytes(b"\xff\xfe")
    with training_lock(tmp_path, "AAPL"):
        assert left.read_text() == str(os.getpid())
    left.mkdir()
    with pytest.raises(StorageError, match="cannot lock the models of AAPL"), training_lock(tmp_path, "AAPL"):
        pass


def test_looks_that_begin_at_once_do_not_both_take_what_was_handed_on(tmp_path: Path):
    settings = Settings(models_dir=tmp_path)
    window = {"symbol": "AAPL", "first_session": "2000-01-03", "last_session": "2013-01-02"}
    runs = [Run(**window, fingerprint=str(number)) for number in range(9)]
    train_gbm.look(settings, runs[:1])
    train_gbm.record_verdict(settings, runs[0], {"label": "edge", "evidence": {"limits_share": 1.0}})
    with ThreadPoolExecutor(8) as pool:
        looks = [*pool.map(lambda run: train_gbm.look(settings, [run]), runs[1:])]
    shares = [share_of_limits("AAPL", earlier) for earlier, _ in looks]
    assert sorted(shares, reverse=True) == pytest.approx([1.0, *(n**-2 for n in range(3, 10))])
    assert train_gbm.look(settings, runs[:1])[1] == {"AAPL": 1.0}, "a repetition keeps its limits"


def test_an_error_inside_a_training_releases_the_lock(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), training_lock(tmp_path, "AAPL"):
        raise ZeroDivisionError
    with training_lock(tmp_path, "AAPL"):
        assert np.isfinite(1.0)


def config(*argv: str):
    return config_from(build_parser().parse_args(["AAPL", *argv]))


def test_the_flags_reach_the_recipe():
    plain = config()
    assert (plain.horizon_bars, plain.recipe.search.models) == (5, ("xgb", "lgb"))
    assert (plain.path_horizons_bars, config("--target-horizon", "20").horizon_bars) == ((), 20)
    assert config("--n-trials", "3").recipe.search.n_trials == 3
    assert config("--no-lgb").recipe.search.models == ("xgb",)
    assert config("--models", "lgb,cat").recipe.search.models == ("lgb", "cat")
    assert config("--max-features", "12").recipe.max_features == 12
    assert config("--seed", "11").recipe.seed == 11


@pytest.mark.parametrize(
    ("text", "decides", "further"),
    [
        ("1,5,20", 5, (1, 20)),
        ("20, 1,20", 20, (1,)),
        ("5,5", 5, ()),
        ("1,10,20,126", 1, (10, 20, 126)),
    ],
)
def test_of_several_horizons_five_or_the_first_decides(text: str, decides: int, further: tuple[int, ...]):
    several = config("--target-horizon", text)
    assert (several.horizon_bars, several.path_horizons_bars) == (decides, further)


def test_a_pooled_model_is_searched_only_when_asked():
    assert config("--universe", "us50").recipe.search.n_trials == 0
    assert config("--universe", "us50", "--n-trials", "4").recipe.search.n_trials == 4
    assert config("--universe", "us50", "--tune").recipe.search.n_trials == train_gbm.TUNE_TRIALS
    assert config("--tune").recipe.search.n_trials > config().recipe.search.n_trials > 0
    assert config("--universe", "us50", "--jobs", "8").recipe.search.threads == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rollback", "--universe", "us50"], "leave --universe out"),
        (["--rollback", "--validate-only"], "leave --validate-only out"),
        (["--leave-symbol-out"], "add --universe"),
        (["--models", "xgb", "--no-lgb"], "once"),
        (["--tune", "--n-trials", "0"], "needs trials"),
        (["--include-sentiment", "--universe", "A,B"], "leave --universe out"),
        (["--start", "2020-01-02", "--universe", "A,B"], "leave --universe out"),
        (["--validate-only", "--overwrite"], "leave --overwrite out"),
        (["--device", "cpu", "--allow-cpu-fallback"], "--allow-cpu-fallback"),
        (["--device", "cpu", "--require-gpu"], "contradict"),
        (["--require-gpu", "--allow-cpu-fallback"], "contradict"),
        (["--models", "lgb", "--require-gpu"], "only XGBoost"),
        (["--universe", "no/such/file.txt"], "no such file"),
        (["--models", "xgb,xgb"], "at most once"),
        (["--models", "svm"], "xgb, lgb, cat"),
    ],
)
def test_flags_that_cannot_be_meant_together_are_usage_errors(places, capsys, argv, words):
    assert main(["NOISE", *argv]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert not (places / "models").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target-horizon", "1,2,5,10,20"], "at most 4"),
        (["--target-horizon", "1,,5"], "at least 1"),
        (["--target-horizon", "1,-5"], "at least 1"),
        (["--n-trials", "-1"], "at least 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--start", "2013-13-01"], "'2013-13-01' is not a date: write YYYY-MM-DD"),
        (["--start", "now"], "'now' is not a date: write YYYY-MM-DD"),
        (["--start", "today"], "'today' is not a date: write YYYY-MM-DD"),
        (["--start", "1"], "'1' is not a date: write YYYY-MM-DD"),
    ],
)
def test_values_that_make_no_sense_are_usage_errors(capsys, argv, words):
    with pytest.raises(SystemExit, match="2"):
        main(["NOISE", *argv])
    assert words in capsys.readouterr().err


def test_the_path_passes_through_the_forecasts_of_every_horizon(places, capsys):
    """Story: two horizons are trained; the path shows both, and all that is decided is as with one alone."""
    assert main(["SIGNAL", *QUICK, "--target-horizon", "1,5", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)[0]
    assert outcome["horizon_bars"] == 5
    assert outcome["path_models"]["1"]["ic"] > 0.1, "the planted signal is that of the next day"
    assert "path models.1.p_ic: " in Path(outcome["log"]).read_text()
    assert "Further horizons" in Path(outcome["report"]).read_text()

    bundle = load_bundle(places / "models", "SIGNAL")
    frame = load_bars(places)
    # Whatever the verdict: without an edge every horizon forecasts its drift.
    decisions = decide("SIGNAL", frame, BundleForecaster(bundle=bundle, as_lived=True), make_sizer())
    last, sessions = decisions.frame.iloc[-1], pd.bdate_range(frame.index[-1], periods=31)[1:]
    path = np.log(path_ahead(decisions, sessions).prices / last["close"])
    assert path[0] == pytest.approx(last["expected_log_h1"], abs=1e-12)
    assert path[4] == pytest.approx(last["expected_log"], abs=1e-12)
    assert path[0] != pytest.approx(path[4] / 5, rel=0.01)
    assert path[29] - path[4] == pytest.approx(5 * last["baseline_log"])

    # The same question was asked, so it is no further try; what decides came out the same.
    assert main(["SIGNAL", *QUICK, "--target-horizon", "5", "--overwrite", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)[0]
    assert (alone["evidence"], alone["metrics"]) == (outcome["evidence"], outcome["metrics"])
    assert alone["evidence"]["n_trials"] == 1
    single = load_bundle(places / "models", "SIGNAL")
    assert (single.path_models, alone["path_models"]) == ((), {})
    pd.testing.assert_frame_equal(single.record, bundle.record)
    plain = decide("SIGNAL", frame, BundleForecaster(bundle=single, as_lived=True), make_sizer()).frame
    pd.testing.assert_frame_equal(plain, decisions.frame.drop(columns="expected_log_h1"))


def load_bars(places: Path) -> pd.DataFrame:
    settings = Settings()
    return train_gbm.fetch("SIGNAL", build_parser().parse_args(["SIGNAL", "--no-cache"]), settings).frame


def test_catboost_is_named_where_it_is_missing(places, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "catboost", None)
    assert main(["NOISE", "--models", "cat"]) == 2
    assert ".[catboost]" in capsys.readouterr().err


def test_a_missing_gpu_has_its_own_exit_code_before_anything_is_fetched(places, capsys, monkeypatch):
    def none(*args: object, **flags: object) -> DeviceChoice:
        raise DeviceError("a GPU was asked for and cannot be used: planted")

    monkeypatch.setattr(train_gbm, "choose_device", none)
    assert main(["GONE", "--require-gpu"]) == 9
    assert "planted" in capsys.readouterr().err


def test_validate_only_saves_nothing_and_counts_as_a_try(places, capsys):
    assert main(["NOISE", *QUICK, "--validate-only", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)[0]
    assert outcome["bundle"] is None
    assert Path(outcome["report"]).is_file()
    assert not (places / "models" / "NOISE" / "gbm").exists()
    assert not (places / "models" / "NOISE" / "versions").exists()
    assert main(["NOISE", *QUICK, "--seed", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["evidence"]["n_trials"] == 2


def test_a_bundle_without_lightgbm_is_saved_and_loads(places, capsys):
    assert main(["NOISE", *QUICK, "--no-lgb", "--json"]) == 0
    bundle = load_bundle(places / "models", "NOISE")
    assert set(bundle.ensemble.models) == {"xgb"}
    assert "model_lgb" not in bundle.record


def test_rollback_lets_the_version_before_serve_and_says_which(places, capsys):
    versions = []
    for seed in ("7", "8"):
        assert main(["NOISE", *QUICK, "--seed", seed, "--overwrite", "--json"]) == 0
        versions.append(json.loads(capsys.readouterr().out)[0]["model_version"])
    assert main(["NOISE", "--rollback"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    undo = f"python -m service.model_registry rollback NOISE --to {versions[1]}"
    assert f"{versions[0]} serves, instead of {versions[1]}; undo: `{undo}`" in shown
    assert load_bundle(places / "models", "NOISE").model_version == versions[0]
    assert main(["NOISE", "--rollback", "--json"]) == 5
    assert "error" in json.loads(capsys.readouterr().out)[0]


def test_a_log_and_a_report_that_cannot_be_written_lose_no_model(places, capsys, monkeypatch):
    (places / "logs").write_text("a file where a folder should be")
    assert main(["NOISE", *QUICK, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)[0]
    assert (outcome["log"], outcome["report"]) == (None, None)
    assert load_bundle(places / "models", "NOISE").model_version == outcome["model_version"]


def test_the_log_says_what_came_of_the_run(places, capsys):
    assert main(["NOISE", *QUICK, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)[0]
    text = Path(outcome["log"]).read_text()
    assert [line for line in text.splitlines() if line.startswith("===")] == [
        f"=== {name} ===" for name in run_log.SECTIONS
    ]
    assert f"=== STATUS ===\n{outcome['status']}\n" in text
    assert outcome["status"] == ("SUCCESS" if outcome["verdict"] == "edge" else "NO_EDGE")


def test_a_training_that_fails_says_so_in_its_log(places, capsys, monkeypatch):
    def full(*args: object, **named: object) -> None:
        raise StorageError("the disk is full: planted")

    monkeypatch.setattr(train_gbm, "save_bundle", full)
    assert main(["NOISE", *QUICK]) == 8
    (log,) = (places / "logs").glob("NOISE_gbm_*.log")
    assert "=== STATUS ===\nFAILED\nStorageError: the disk is full: planted" in log.read_text()
    assert not (places / "models" / "NOISE" / "gbm").exists()


def test_a_bug_in_one_symbol_does_not_stop_the_others(places, capsys, monkeypatch):
    real = train_gbm.deliver

    def faulty(trained, *rest: object):
        if trained.bundle.symbol == "NOISE":
            raise ZeroDivisionError("planted")
        return real(trained, *rest)

    monkeypatch.setattr(train_gbm, "deliver", faulty)
    assert main(["NOISE", "SIGNAL", *QUICK, "--json"]) == 1
    failed, trained = json.loads(capsys.readouterr().out)
    assert "ZeroDivisionError: planted" in failed["error"]
    assert trained["symbol"] == "SIGNAL"
    (log,) = (places / "logs").glob("NOISE_gbm_*.log")
    assert "FAILED\nZeroDivisionError" in log.read_text()


def test_jobs_change_no_result_and_the_first_failure_is_the_exit_code(places, capsys):
    argv = ["NOISE", "GONE", "SIGNAL", "../bad", *DRY, "--json"]
    results = []
    for jobs in ("1", "2"):
        assert main([*argv, "--jobs", jobs]) == 3
        results.append(json.loads(capsys.readouterr().out))
    assert [outcome["symbol"] for outcome in results[0]] == ["NOISE", "GONE", "SIGNAL", "../bad"]
    for alone, beside in zip(*results, strict=True):
        for name in ("symbol", "evidence", "metrics", "data_hash", "verdict", "error", "exit_code"):
            assert alone.get(name) == beside.get(name)


@pytest.fixture
def many(places: Path, make_planted, monkeypatch) -> Path:
    """Three more symbols beside NOISE and SIGNAL; E is too short for a panel."""
    folder = places / "many"
    folder.mkdir()
    for name, seed, n in (("A", 1, 1_400), ("B", 2, 1_400), ("C", 3, 1_400), ("D", 4, 1_000), ("E", 5, 200)):
        bars = make_planted(seed=seed, n=1_400, ic=0.2).iloc[-n:]
        bars.assign(**{"Adj Close": bars["Close"]}).to_csv(folder / f"{name}.csv", index_label="Date")
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{folder}")
    return places


def test_a_pooled_model_leaves_a_bundle_for_each_named_symbol(many, capsys):
    assert main(["B", "D", "--universe", "A,B,C,E,GONE", "--target-horizon", "1", "--json"]) == 0
    shown = capsys.readouterr()
    outcomes = json.loads(shown.out)
    assert [outcome["symbol"] for outcome in outcomes] == ["B", "D"]
    for name in ("E", "GONE"):
        assert f"{name} is left out of the universe" in shown.err
    bundles = [load_bundle(many / "models", name) for name in ("B", "D")]
    for bundle in bundles:
        assert bundle.metadata["universe"]["symbols"] == ["A", "B", "C", "D"]
        assert bundle.metadata["universe"]["left_out"] == []
        assert bundle.metadata["universe"]["name"] == "A,B,C,E,GONE"
        assert len(list((many / "logs").glob(f"{bundle.symbol}_gbm_*.log"))) == 1
    assert bundles[0].ensemble.calibration != bundles[1].ensemble.calibration
    assert bundles[0].ensemble.selected == bundles[1].ensemble.selected
    assert not (many / "models" / "A").exists()


def test_leave_symbol_out_trains_without_its_rows(many, capsys, monkeypatch):
    seen: dict[str, Trained] = {}
    real = train_gbm.deliver

    def spy(trained: Trained, *rest: object):
        seen[trained.bundle.symbol] = trained
        return real(trained, *rest)

    monkeypatch.setattr(train_gbm, "deliver", spy)
    assert main(["A", "B", "--universe", "A,B,C", "--leave-symbol-out", "--validate-only"]) == 0
    for name, trained in seen.items():
        assert trained.bundle.metadata["universe"]["left_out"] == [name]
        assert trained.bundle.metadata["recipe"]["recipe"]["leave_out"] == (name,)
    assert (
        seen["A"].bundle.ensemble.scaler.center_.tolist() != seen["B"].bundle.ensemble.scaler.center_.tolist()
    )
    capsys.readouterr()
    assert main(["C", "--universe", "C,D", "--leave-symbol-out", "--json"]) == 4
    assert "fewer than 2" in json.loads(capsys.readouterr().out)[0]["error"]


@pytest.mark.parametrize(("word", "code", "is_named"), [("us500", 2, True), ("A,us500", 4, False)])
def test_a_universe_of_one_word_that_is_no_symbol_is_told_the_sets(many, capsys, word, code, is_named):
    for named in (["A"], ["A", "B"])[: 1 + is_named]:
        assert main([*named, "--universe", word, "--json", "--validate-only"]) == code
        error = json.loads(capsys.readouterr().out)[0]["error"]
        assert ("us500 is no set, there are us50, sectors11, core5; as a symbol:" in error) is is_named


def test_one_refused_symbol_of_a_pooled_run_stops_no_other(many, capsys):
    (many / "models" / "A").mkdir(parents=True)
    argv = ["GONE", "A", "B", "--universe", "C", "--validate-only", "--json"]
    with training_lock(many / "models", "A"):
        assert main(argv) == 3
    gone, locked, trained = json.loads(capsys.readouterr().out)
    assert (gone["exit_code"], locked["exit_code"]) == (3, 6)
    assert trained["symbol"] == "B"


@pytest.mark.parametrize("how", [["training/train_gbm.py"], ["-m", "training.train_gbm"]])
def test_it_runs_as_a_script_and_as_a_module(how):
    # The packages are installed in place; from another checkout these must win, as they do for pytest.
    where = [sys.executable, "-c", "import training; print(training.__file__)"]
    installed = subprocess.run(where, cwd="/", capture_output=True, text=True, check=False).stdout
    env = dict(os.environ)
    if not installed.startswith(str(ROOT)):
        env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *how, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--target-horizon" in done.stdout


def test_an_interrupted_training_leaves_nothing_that_serves(places):
    command = [sys.executable, "-m", "training.train_gbm", "NOISE", "--n-trials", "400"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    log = ""
    assert run.stderr is not None
    while "features" not in log:
        log = run.stderr.readline()
    time.sleep(1.0)
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate(timeout=10)
    assert run.returncode == 130
    assert "Traceback" not in rest
    assert len([line for line in rest.splitlines() if "interrupted" in line]) == 1
    assert not (places / "models" / "NOISE" / "gbm").exists()
    assert not list((places / "models").glob("*/versions/*"))
    (log_file,) = (places / "logs").glob("NOISE_gbm_*.log")
    assert "=== STATUS ===\nFAILED\nKeyboardInterrupt: interrupted" in log_file.read_text()
    with training_lock(places / "models", "NOISE"):
        pass
