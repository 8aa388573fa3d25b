"""The network's training: what it finds, what it refuses, that it repeats itself and never looks ahead."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.schema import Bars, BarsReport, Provenance
from data.target_engineering import Dataset, build_dataset
from inference import load_lstm_model
from inference.artifact import RECORD_COLUMNS
from inference.load_lstm_model import ARRAYS, Sequences, load_bundle, windows_of
from training import train_lstm
from training.recipe import LSTMConfig, NetworkConfig, direction_weights
from training.train_lstm import (
    Batches,
    KerasNetwork,
    LSTMRecipe,
    LSTMTrainer,
    build_parser,
    config_from,
    learning_rate,
    main,
)
from training.trainer import Trained
from utils.base import CollapsedError
from utils.model_paths import LSTM, list_versions
from validation.walk_forward import WalkForwardConfig

ROOT = Path(__file__).resolve().parents[2]
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
with_tensorflow = pytest.mark.skipif(
    not HAS_TENSORFLOW, reason='networks are trained with TensorFlow: pip install ".[lstm]"'
)
# Keras 3.15 on NumPy 2 asks TensorFlow's variables for arrays in the old way; the arrays are right.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
SMALL = NetworkConfig(
    epochs=12,
    batch_size=128,
    sequence_length=4,
    units=(16, 8),
    dense_units=8,
    dropout=0.1,
    learning_rate=5e-3,
    warmup_epochs=2,
    patience_epochs=4,
    refit_every_folds=9,
)
QUICK = LSTMConfig(horizon_bars=1, recipe=SMALL)


def as_bars(frame: pd.DataFrame, symbol: str = "TEST") -> Bars:
    seen = Provenance(source="csv", fetched_at=datetime.now(UTC), last_session=frame.index[-1], stale=False)
    return Bars(symbol=symbol, frame=frame, provenance=seen, report=BarsReport())


# Without TensorFlow


def test_the_rate_warms_up_and_falls():
    config = NetworkConfig()
    rates = [learning_rate(epoch, config) for epoch in range(config.epochs)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[4] == rates[5] == pytest.approx(1e-3)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 1e-5


def test_rises_and_falls_weigh_alike():
    target = np.array([[1.0], [2.0], [0.5], [-1.0]], dtype=np.float32)
    weights = direction_weights(target)
    assert weights[:3].sum() == pytest.approx(weights[3:].sum())
    assert weights.mean() == pytest.approx(1.0)


def panel_of(make_bars) -> Dataset:
    frames = {"A": make_bars(n=330, seed=1), "B": make_bars(n=300, seed=2, start="2005-03-01")}
    return build_dataset(frames, 1)


def rows_seen(data: Dataset, sequences: Sequences, length: int) -> list[str]:
    """Return what is wrong with the sequences of a panel: other symbols' rows, or later ones."""
    where = {tuple(data.features[i]): i for i in range(len(data))}
    found = set()
    for i, window in enumerate(sequences.windows(data, length)):
        rows = np.array([where[tuple(row)] for row in sequences.features[window]])
        if (data.symbol_code[rows] != data.symbol_code[i]).any():
            found.add("another symbol's row")
        if (data.date[rows] > data.date[i]).any():
            found.add("a later row")
        if rows[-1] != i:
            found.add("another row at the end")
    return sorted(found)


def test_a_sequence_holds_its_own_symbols_rows_up_to_its_own(make_bars):
    data = panel_of(make_bars)
    assert rows_seen(data, Sequences(data), 7) == []
    some = data.take(np.arange(40, 90))
    np.testing.assert_array_equal(Sequences(data).windows(some, 7), Sequences(data).windows(data, 7)[40:90])


def test_sequences_that_peek_or_cross_are_caught(make_bars, monkeypatch):
    """Planted: sequences that end a row late, and such as do not stop at their symbol's first row."""
    data = panel_of(make_bars)
    last = len(data) - 1
    late = lambda ends, starts, length: windows_of(np.minimum(ends + 1, last), starts, length)  # noqa: E731
    monkeypatch.setattr(load_lstm_model, "windows_of", late)
    assert "a later row" in rows_seen(data, Sequences(data), 7)
    crossing = lambda ends, starts, length: windows_of(ends, np.zeros_like(ends), length)  # noqa: E731
    monkeypatch.setattr(load_lstm_model, "windows_of", crossing)
    assert "another symbol's row" in rows_seen(data, Sequences(data), 7)


def test_the_flags_decide_the_recipe():
    line = "AAPL --epochs 50 --batch-size 512 --loss quantile --sequence-length 20 --dropout .2 --seed 3"
    flags = "--learning-rate 5e-4 --refit-every-folds 2 --target-horizon 10"
    config = config_from(build_parser().parse_args(f"{line} {flags}".split()))
    expected = NetworkConfig(
        loss="quantile", epochs=50, batch_size=512, sequence_length=20, dropout=0.2, seed=3,
        learning_rate=5e-4, refit_every_folds=2,
    )  # fmt: skip
    assert (config.recipe, config.horizon_bars) == (expected, 10)
    assert config_from(build_parser().parse_args(["AAPL"])) == LSTMConfig()


@pytest.mark.parametrize(
    "flag", ["--epochs=0", "--dropout=1", "--dropout=x", "--learning-rate=-1", "--loss=l2"]
)
def test_numbers_that_make_no_sense_are_usage_errors(capsys, flag: str):
    with pytest.raises(SystemExit, match="2"):
        main(["NOISE", flag])
    assert flag.split("=", maxsplit=1)[0] in capsys.readouterr().err


@pytest.fixture
def places(tmp_path: Path, csv_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(tmp_path / name))
    (tmp_path / "prices").mkdir()
    pd.read_csv(csv_dir / "NOISE.csv").iloc[-1_520:].to_csv(tmp_path / "prices" / "NOISE.csv", index=False)
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{tmp_path / 'prices'}")
    # What it checks is tested with the store.
    monkeypatch.setattr("inference.artifact.verify_in_fresh_process", lambda *_: None)
    return tmp_path


def test_without_tensorflow_it_says_what_to_install(places, capsys, monkeypatch):
    monkeypatch.setattr(train_lstm.importlib.util, "find_spec", lambda name: None)
    assert main(["NOISE"]) == 2
    assert 'pip install ".[lstm]"' in " ".join(capsys.readouterr().err.split())
    assert not (places / "models" / "NOISE").exists()
    assert main(["NOISE", "--rollback", "--strict"]) == 2
    assert "leave --strict out" in " ".join(capsys.readouterr().err.split())


# With it


@pytest.fixture(scope="module")
def events() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def trained(make_planted, events) -> Trained:
    return LSTMTrainer(QUICK, events.append).train(as_bars(make_planted(n=1_600, seed=1, ic=0.4)))


@with_tensorflow
def test_a_planted_signal_is_found(trained):
    assert trained.verdict.label == "edge", trained.verdict.reasons
    assert trained.bundle.calibration.skill_lower > 0
    assert trained.backtest.daily["is_out_of_sample"].all()


@with_tensorflow
def test_the_bundle_tells_what_the_boosters_tells(trained):
    metadata, record = trained.bundle.metadata, trained.bundle.record
    assert metadata["model_id"] == "TEST-lstm"
    assert {"verdict", "metrics", "folds", "path_models", "summary", "trained_through"} <= set(metadata)
    assert metadata["versions"]["tensorflow"]
    assert "n_trials" not in metadata, "nothing is searched"
    assert {*RECORD_COLUMNS, "symbol", "label_end", "model_lstm"} == set(record.columns)
    assert (record["trained_through"] < record["date"]).all()
    assert {"epochs", "best_epoch", "slope"} <= set(metadata["folds"][0]["notes"])


@with_tensorflow
def test_the_network_of_one_symbol_reads_what_stands_out(trained):
    """The volume of today carries the signal."""
    network, folds = trained.bundle.network, trained.bundle.metadata["folds"]
    assert "volume_sma_ratio" in network.selected_features
    assert len(network.selected) == len(network.centre) == len(network.weights["kernel_1"])
    assert len(network.selected) < len(network.columns) == trained.golden_inputs.shape[1]
    assert all("volume_sma_ratio" in fold["selected_features"] for fold in folds)


@with_tensorflow
def test_the_rows_that_decide_when_to_stop_choose_no_features(make_planted, monkeypatch):
    data = build_dataset({"A": make_planted(n=1_200, seed=1, ic=0.4)}, 1)
    seen: list[np.ndarray] = []

    def first_three(_train: Dataset, _config: NetworkConfig):
        return lambda rows: (seen.append(rows.date), (0, 1, 2))[1]

    monkeypatch.setattr(train_lstm, "chooser", first_three)
    config = replace(SMALL, epochs=3)
    train = data.take(np.arange(800))
    fitted = LSTMRecipe(config, Sequences(data)).fit(train, fold=0, earlier=pd.DataFrame())
    assert fitted.selected_features == data.columns[:3]
    assert train.date.min() == seen[0].min() < seen[0].max() < train.date[round(0.86 * 800)]


@with_tensorflow
def test_forget_gates_begin_as_they_are_told():
    keras = KerasNetwork(SMALL, 3)
    usual = keras.weights()
    first, second = SMALL.units
    for bias, units in ((usual[2], first), (usual[5], second)):
        np.testing.assert_array_equal(bias, np.repeat([0.0, 1.0, 0.0, 0.0], units))
    keras.begin(-1.0)
    closed = keras.weights()
    for bias, units in ((closed[2], first), (closed[5], second)):
        np.testing.assert_array_equal(bias, np.repeat([0.0, -1.0, 0.0, 0.0], units))
    keras.begin()
    for now, then in zip(keras.weights(), usual, strict=True):
        np.testing.assert_array_equal(now, then)


@with_tensorflow
def test_every_epoch_is_told(trained, events):
    epochs = [event for event in events if event["type"] == "epoch"]
    fits = list(dict.fromkeys(event["fit"] for event in epochs))
    assert fits == ["fold 0", "final fit"]
    for fit in fits:
        own = [event for event in epochs if event["fit"] == fit]
        assert [event["epoch"] for event in own] == list(range(1, len(own) + 1))
        assert {event["totalEpochs"] for event in own} == {SMALL.epochs}
        assert all(0 <= event["directionalAccuracy"] <= 1 and event["learningRate"] > 0 for event in own)
    assert own[-1]["trainLoss"] < own[0]["trainLoss"]
    assert json.dumps(epochs, allow_nan=False)
    assert trained.bundle.hyperparameters["best_epoch"] > SMALL.warmup_epochs
    assert len(trained.bundle.hyperparameters["epochs"]) == len(own)
    stages = [event["progress"] for event in events if event["type"] == "stage"]
    assert stages == sorted(stages)


@with_tensorflow
def test_the_arrays_say_what_keras_says_and_keras_needs_nothing_else(trained, tmp_path):
    import keras

    network = trained.bundle.network
    (tmp_path / "network.keras").write_bytes(trained.bundle.keras)
    model = keras.models.load_model(tmp_path / "network.keras", safe_mode=True)
    rows = trained.golden_inputs
    ends = np.arange(len(rows))
    windows = windows_of(ends, np.zeros_like(ends), network.sequence_length)
    theirs = model.predict(network.prepare(rows)[windows], verbose=0)[:, 0] * network.target_scale
    np.testing.assert_allclose(network.raw_scaled(rows, windows), theirs, atol=1e-5)
    alone = [network.raw_scaled(rows, windows[[i]])[0] for i in ends]
    np.testing.assert_allclose(alone, theirs, atol=1e-5)
    assert theirs.std() > 1e-3
    config = json.loads(zipfile.ZipFile(io.BytesIO(trained.bundle.keras)).read("config.json"))
    assert not config.get("compile_config")


def short_walk(bars: pd.DataFrame) -> pd.DataFrame:
    split = WalkForwardConfig(test_bars=150, min_train_bars=680)
    config = replace(QUICK, recipe=replace(SMALL, epochs=3), walk_forward=split)
    walked = LSTMTrainer(config).walk({"TEST": as_bars(bars)})
    return walked.result.record.assign(weight=walked.fitted.model.weights[ARRAYS[0]].sum())


@pytest.fixture(scope="module")
def walked_bars(make_planted) -> tuple[pd.DataFrame, pd.DataFrame]:
    bars = make_planted(n=1_240, seed=1, ic=0.4)
    return bars, short_walk(bars)


@with_tensorflow
def test_the_same_seed_trains_the_same_network(walked_bars):
    bars, record = walked_bars
    pd.testing.assert_frame_equal(short_walk(bars), record)


@with_tensorflow
def test_later_bars_change_nothing_of_earlier_forecasts(walked_bars):
    """Everything after a session is made up anew: scaler, target, network and calibration must not notice."""
    bars, record = walked_bars
    other = bars.copy()
    rng = np.random.default_rng(3)
    moved = np.exp(np.cumsum(rng.normal(0, 0.05, size=150)))
    for name in ("Open", "High", "Low", "Close"):
        other.iloc[-150:, other.columns.get_loc(name)] *= moved
    other.iloc[-150:, other.columns.get_loc("Volume")] *= 7
    before = [one[one["date"] < bars.index[-150]] for one in (record, short_walk(other))]
    known = [name for name in record if not name.startswith(("realised", "label", "weight"))]
    pd.testing.assert_frame_equal(before[0][known], before[1][known])
    assert len(before[0]) > 150


@with_tensorflow
def test_tensorflow_says_nothing_of_its_own():
    code = (
        "from training.recipe import NetworkConfig; from training.train_lstm import KerasNetwork;"
        "KerasNetwork(NetworkConfig(units=(2, 2), sequence_length=2), 3).model.get_weights()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@with_tensorflow
@pytest.mark.parametrize("loss", ["huber", "mae", "balanced", "quantile"])
def test_each_loss_is_the_one_that_it_is_called(loss):
    rng = np.random.default_rng(0)
    config = replace(SMALL, loss=loss, epochs=2)
    keras = KerasNetwork(config, 3)
    n_outputs = 3 if loss == "quantile" else 1
    target = rng.normal(size=(40, 1)).astype(np.float32) * 2
    output = rng.normal(size=(40, n_outputs)).astype(np.float32)
    error = target - output
    huber = np.where(np.abs(error) <= 1, error**2 / 2, np.abs(error) - 0.5)
    levels = np.array([[0.1, 0.5, 0.9]])
    pinball = np.maximum(levels * error, (levels - 1) * error) if n_outputs == 3 else error
    expected = {"mae": np.abs(error), "quantile": pinball}.get(loss, huber).mean(axis=1)
    np.testing.assert_allclose(np.array(keras.loss(target, output).numpy()), expected, rtol=1e-5)
    assert keras.model.output_shape == (None, n_outputs)
    windows = np.arange(40)[:, np.newaxis] + np.zeros(4, dtype=np.intp)
    batches = Batches(
        features=rng.normal(size=(40, 3)).astype(np.float32),
        windows=windows,
        target=target,
        weight=np.ones(40, dtype=np.float32),
    )
    begun, signal = keras.look(batches)
    assert (signal == 0).all(), "the network must begin with no opinion"
    if loss != "quantile":
        return
    keras.train_epoch(batches, 1e-2, rng)
    assert keras.look(batches)[1].std() > 0
    keras.begin()
    assert keras.look(batches)[0] == begun


@with_tensorflow
def test_the_network_has_the_size_that_was_asked_for():
    network = KerasNetwork(NetworkConfig(), 66)
    assert 25_000 <= network.model.count_params() <= 50_000
    kinds = [type(layer).__name__ for layer in network.model.layers]
    assert kinds == ["LSTM", "Dropout", "LSTM", "Dropout", "Dense", "Dense"]


@with_tensorflow
def test_a_collapsed_run_says_so_and_keeps_the_bundle_before(places, capsys, monkeypatch):
    brief = replace(QUICK, recipe=replace(SMALL, epochs=6))
    monkeypatch.setattr(train_lstm, "config_from", lambda _args: brief)
    assert main(["NOISE", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)[0]
    served = load_bundle(places / "models", "NOISE")
    assert outcome["model_version"] == served.model_version
    assert outcome["bundle"].endswith("NOISE/lstm")
    assert Path(outcome["report"]).name.startswith("NOISE_lstm_")
    assert outcome["verdict"] == "no-edge"
    assert main(["NOISE"]) == 6
    assert "--overwrite" in capsys.readouterr().err

    # Planted: the network's output is nailed to one number.
    real = KerasNetwork.look
    monkeypatch.setattr(KerasNetwork, "look", lambda self, batches: (1.0, real(self, batches)[1] * 0 + 0.3))
    assert main(["NOISE", "--overwrite", "--json"]) == CollapsedError.exit_code == 7
    failed = json.loads(capsys.readouterr().out)[0]
    assert "collapsed" in failed["error"]
    newest = max((places / "logs").glob("NOISE_lstm_*.log"), key=os.path.getmtime)
    assert "=== STATUS ===\nCOLLAPSED\nCollapsedError: fold 0: after 5 epochs" in newest.read_text()
    assert load_bundle(places / "models", "NOISE").model_version == served.model_version
    assert len(list_versions(places / "models", "NOISE", LSTM)) == 1


@with_tensorflow
def test_a_panel_is_trained_together_and_judged_apart(make_planted, monkeypatch):
    begun: list[float] = []
    begin = KerasNetwork.begin
    monkeypatch.setattr(
        KerasNetwork, "begin", lambda self, bias=1.0: (begun.append(bias), begin(self, bias))[1]
    )
    panel = {
        name: as_bars(make_planted(n=1_280, seed=seed, ic=0.3), name) for name, seed in (("A", 1), ("B", 2))
    }
    panel["B"] = replace(panel["B"], frame=panel["B"].frame.iloc[200:])
    trainer = LSTMTrainer(replace(QUICK, recipe=replace(SMALL, epochs=2)))
    walked = trainer.walk(panel)
    bundles = {name: trainer.conclude(walked, bars).bundle for name, bars in panel.items()}
    assert {name: set(bundle.record["symbol"]) for name, bundle in bundles.items()} == {
        "A": {"A"},
        "B": {"B"},
    }
    assert bundles["A"].calibration != bundles["B"].calibration
    assert bundles["A"].network.weights is bundles["B"].network.weights
    # A panel has rows enough for every feature, and for gates that begin as is usual.
    assert bundles["A"].network.selected_features == walked.dataset.columns
    assert begun == [1.0, 1.0]
