"""The network's bundle: served without TensorFlow, refused when damaged, and no row sees a later one."""

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feature_engineer import engineer_features, feature_set_hash, get_feature_columns
from inference import artifact
from inference import load_lstm_model as store
from inference.artifact import new_version_id
from inference.intervals import Calibration
from inference.load_lstm_model import (
    ARRAYS,
    LSTMBundle,
    Network,
    load_bundle,
    load_folder,
    save_bundle,
    windows_of,
)
from inference.pipeline import BundleForecaster, decide
from inference.position_sizing import make_sizer
from tests.test_inference.conftest import plant
from utils.base import ModelCorruptError, ModelIncompatibleError, ModelMissingError
from utils.model_paths import LSTM, current_version, list_versions, roll_back

COLUMNS = tuple(get_feature_columns()[:5])
LENGTH = 6


def make_network(seed: int = 0, *, columns: tuple[str, ...] = COLUMNS, outputs: int = 1) -> Network:
    rng = np.random.default_rng(seed)
    p, first, second = len(columns), 8, 4
    shapes = [(p, 4 * first), (first, 4 * first), (4 * first,), (first, 4 * second), (second, 4 * second)]
    shapes += [(4 * second,), (second, 3), (3,), (3, outputs), (outputs,)]
    return Network(
        columns=columns,
        selected=tuple(range(p)),
        sequence_length=LENGTH,
        centre=rng.normal(size=p).astype(np.float32),
        scale=rng.uniform(0.5, 2.0, size=p).astype(np.float32),
        limit=5.0,
        target_scale=1.25,
        weights={
            name: rng.normal(scale=0.6, size=shape).astype(np.float32)
            for name, shape in zip(ARRAYS, shapes, strict=True)
        },
        calibration=Calibration(drift=0.05, raw_mean=0.0, slope=0.5, skill_lower=0.4, n_rows=900),
    )


def make_bundle(symbol: str = "AAPL", seed: int = 0, network: Network | None = None) -> LSTMBundle:
    dates = pd.bdate_range("2020-01-01", periods=5)
    record = pd.DataFrame({name: np.zeros(5) for name in [*artifact.RECORD_COLUMNS[1:], "model_lstm"]})
    return LSTMBundle(
        symbol=symbol,
        horizon_bars=5,
        record=record.assign(date=dates),
        metadata={
            "symbol": symbol,
            "horizon_bars": 5,
            "model_version": new_version_id(datetime.now(UTC)),
            "data_hash": "0" * 64,
            "feature_set_hash": feature_set_hash(),
            "seed": seed,
            "verdict": {"label": "edge"},
        },
        importance={},
        hyperparameters={"best_epoch": 7},
        network=network or make_network(seed),
        keras=b"what Keras saved",
    )


GOLDEN = np.random.default_rng(9).normal(size=(20, len(COLUMNS))).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, the second verified by a fresh process like any real one."""
    root = tmp_path_factory.mktemp("models")
    first = make_bundle(seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
        early = {**first.metadata, "model_version": "20200101T000000-a"}
        save_bundle(replace(first, metadata=early), root, golden_inputs=GOLDEN)
    save_bundle(make_bundle(seed=2), root, golden_inputs=GOLDEN)
    return root


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "models", symlinks=True)
    return tmp_path / "models"


def npz(**arrays: np.ndarray) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


# What the arrays compute


def slowly(network: Network, sequence: np.ndarray) -> float:
    """The textbook's network, a number at a time, in double precision."""
    w = {name: array.astype(np.float64) for name, array in network.weights.items()}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    inputs = list(np.clip((sequence - network.centre) / network.scale, -network.limit, network.limit))
    for layer in (1, 2):
        units = len(w[f"recurrent_{layer}"])
        hidden, cell, told = np.zeros(units), np.zeros(units), []
        for x in inputs:
            sums = x @ w[f"kernel_{layer}"] + hidden @ w[f"recurrent_{layer}"] + w[f"bias_{layer}"]
            entering, kept, fresh, leaving = (sums[k * units : (k + 1) * units] for k in range(4))
            cell = sigmoid(kept) * cell + sigmoid(entering) * np.tanh(fresh)
            hidden = sigmoid(leaving) * np.tanh(cell)
            told.append(hidden)
        inputs = told
    output = np.maximum(inputs[-1] @ w["dense"] + w["dense_bias"], 0) @ w["output"] + w["output_bias"]
    return float(output[len(output) // 2]) * network.target_scale


@pytest.mark.parametrize("outputs", [1, 3])
def test_many_rows_and_the_latest_one_agree_with_the_textbook(outputs: int):
    network = make_network(3, outputs=outputs)
    features = np.random.default_rng(4).normal(size=(60, len(COLUMNS))).astype(np.float32) * 3
    ends = np.arange(60)
    windows = windows_of(ends, np.zeros_like(ends), LENGTH)
    together = network.raw_scaled(features, windows)
    alone = [network.raw_scaled(features, windows[[i]])[0] for i in ends]
    expected = [slowly(network, features[row]) for row in windows]
    np.testing.assert_allclose(together, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    assert together.std() > 0.1


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_sequence_ends_at_its_row_and_stays_behind_its_start(n_rows: int, length: int):
    ends = np.arange(n_rows)
    starts = np.where(ends < n_rows // 2, 0, n_rows // 2)
    windows = windows_of(ends, starts, length)
    assert windows.shape == (n_rows, length)
    assert (windows[:, -1] == ends).all()
    assert (windows <= ends[:, np.newaxis]).all()
    assert (windows >= starts[:, np.newaxis]).all()
    assert np.isin(np.diff(windows, axis=1), [0, 1]).all()


def changed_by_later_rows(bundle: LSTMBundle, features: np.ndarray) -> list[int]:
    """Return the rows whose signal differs when nothing after them is known."""
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    whole = bundle.signal(features, rows)[1]
    cut = [bundle.signal(features[: t + 1], np.array([t]))[1][0] for t in rows]
    return rows[np.abs(whole - cut) > 1e-5].tolist()


def gappy_features() -> np.ndarray:
    features = np.random.default_rng(5).normal(size=(40, len(COLUMNS))).astype(np.float32)
    features[:4] = np.nan
    features[21] = np.nan
    return features


def test_no_signal_depends_on_later_rows():
    assert changed_by_later_rows(make_bundle(), gappy_features()) == []


def test_a_sequence_that_peeks_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Planted: every sequence ends a row late, where there is one."""

    def peeking(ends: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        return windows_of(np.minimum(ends + 1, ends.max()), starts, length)

    monkeypatch.setattr(store, "windows_of", peeking)
    assert len(changed_by_later_rows(make_bundle(), gappy_features())) > 20


def test_a_gap_is_passed_over():
    bundle, features = make_bundle(), gappy_features()
    closed = np.delete(features, 21, axis=0)
    np.testing.assert_allclose(
        bundle.signal(features, np.array([30, 39]))[1],
        bundle.signal(closed, np.array([29, 38]))[1],
        atol=1e-6,
    )


def test_another_number_of_features_is_a_bug():
    with pytest.raises(ValueError, match="got 3 features, the model knows 5"):
        make_network().prepare(np.zeros((2, 3), dtype=np.float32))


def test_a_network_reads_the_selected_features_alone():
    narrow = make_network(3, columns=COLUMNS[1:4:2])
    network = replace(narrow, columns=COLUMNS, selected=(1, 3))
    features = np.random.default_rng(4).normal(size=(20, len(COLUMNS))).astype(np.float32)
    windows = windows_of(np.arange(20), np.zeros(20, dtype=np.intp), LENGTH)
    expected = narrow.raw_scaled(features[:, [1, 3]], windows)
    np.testing.assert_array_equal(network.raw_scaled(features, windows), expected)
    assert network.selected_features == narrow.columns
    other = features.copy()
    other[:, [0, 2, 4]] = 9.0
    np.testing.assert_array_equal(network.raw_scaled(other, windows), expected)


# What is saved


def test_what_is_loaded_forecasts_what_was_saved(models: Path):
    loaded = load_bundle(models, "AAPL")
    expected = store.golden_outputs(make_network(2), GOLDEN)
    np.testing.assert_array_equal(store.golden_outputs(loaded.network, GOLDEN), expected)
    assert len(expected) == artifact.GOLDEN_ROWS
    assert (loaded.keras, loaded.hyperparameters) == (b"what Keras saved", {"best_epoch": 7})
    assert loaded.calibration == make_network(2).calibration
    assert loaded.metadata["seed"] == 2
    assert loaded.warnings == ()
    assert loaded.model_version == current_version(models, "AAPL", LSTM).name


def test_what_was_selected_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
    network = replace(make_network(3, columns=COLUMNS[1:4:2]), columns=COLUMNS, selected=(1, 3))
    save_bundle(make_bundle(network=network), tmp_path, golden_inputs=GOLDEN)
    loaded = load_bundle(tmp_path, "AAPL")
    assert (loaded.columns, loaded.network.selected) == (COLUMNS, (1, 3))
    expected = store.golden_outputs(network, GOLDEN)
    np.testing.assert_array_equal(store.golden_outputs(loaded.network, GOLDEN), expected)


def test_network_and_boosters_of_a_symbol_keep_out_of_each_others_way(models: Path):
    assert (models / "AAPL" / "lstm").is_symlink()
    assert not (models / "AAPL" / "gbm").exists()
    assert len(list_versions(models, "AAPL", LSTM)) == 2
    assert list_versions(models, "AAPL") == []
    with pytest.raises(
        ModelMissingError, match=r"no model for MSFT: run `python -m training.train_lstm MSFT`"
    ):
        load_bundle(models, "MSFT")


def test_the_description_tells_what_would_serve(models: Path):
    linked = store.FORMAT.describe(artifact_linked(models))
    assert (linked.models, linked.metadata["seed"]) == (("lstm",), 2)
    assert store.FORMAT.load_linked(artifact_linked(models)).metadata["seed"] == 2


def artifact_linked(models: Path):
    from utils.model_paths import linked_version

    return linked_version(models, "AAPL", LSTM)


def test_rollback_lets_the_version_before_serve(models: Path):
    assert roll_back(models, "AAPL", LSTM, load_folder).name == "20200101T000000-a"
    assert load_bundle(models, "AAPL").metadata["seed"] == 1


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "html", "absent"])
@pytest.mark.parametrize("name", [*store.FILES, "manifest.json"])
def test_a_damaged_file_is_refused_and_the_version_before_serves(models: Path, name: str, how: str):
    folder = current_version(models, "AAPL", LSTM)
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damage = {"truncated": content[:middle], "empty": b"", "flipped": flipped, "html": b"<html>"}
    if how == "absent":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage[how])
    with pytest.raises(ModelCorruptError):
        load_folder(folder)
    served = load_bundle(models, "AAPL")
    assert served.metadata["seed"] == 1
    assert "serves instead" in served.warnings[0]


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / store.WEIGHTS) as stored:
        return dict(stored)


def test_a_pickle_among_the_arrays_is_never_executed(models: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = current_version(models, "AAPL", LSTM)
    bomb = np.array([Bomb()], dtype=object)
    plant(folder, store.WEIGHTS, npz(**{**arrays_of(folder), "dense": bomb}))
    with pytest.raises(ModelCorruptError, match=r"weights\.npz cannot be used"):
        load_folder(folder)
    assert not Path("exploded").exists()
    np.load(folder / store.WEIGHTS, allow_pickle=True)["dense"]
    assert Path("exploded").exists(), "the bomb must be able to explode, or this test proves nothing"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (store.SCALER, b'{"centre": [0], "scale": [0], "limit": 5, "target_scale": 1}', "positive scale"),
        (store.SCALER, b'{"centre": [0], "scale": [1], "limit": 5, "target_scale": 1}', "different numbers"),
        (store.SCALER, b'{"centre": [NaN], "scale": [1], "limit": 5, "target_scale": 1}', "finite|JSON"),
        (store.HYPERPARAMETERS, b"{}", "Field required"),
        (store.WEIGHTS, npz(dense=np.zeros(3)), "KeyError"),
    ],
)
def test_nonsense_that_the_manifest_vouches_for_is_refused(
    models: Path, name: str, content: bytes, match: str
):
    folder = current_version(models, "AAPL", LSTM)
    plant(folder, name, content)
    with pytest.raises(ModelCorruptError, match=match):
        load_folder(folder)


def test_numbers_that_are_not_finite_are_refused(models: Path):
    folder = current_version(models, "AAPL", LSTM)
    arrays = arrays_of(folder)
    arrays["bias_1"][3] = np.nan
    plant(folder, store.WEIGHTS, npz(**arrays))
    with pytest.raises(ModelCorruptError, match="not finite"):
        load_folder(folder)


def test_other_outputs_than_the_golden_ones_ask_for_a_training(models: Path):
    """Planted: an array that is whole, and another."""
    folder = current_version(models, "AAPL", LSTM)
    arrays = arrays_of(folder)
    plant(folder, store.WEIGHTS, npz(**{**arrays, "output_bias": arrays["output_bias"] + 0.01}))
    with pytest.raises(ModelIncompatibleError, match=r"forecasts differently here .*train again"):
        load_folder(folder)


def test_features_that_are_computed_differently_now_ask_for_a_training(models: Path, monkeypatch):
    monkeypatch.setattr(artifact, "expected_features", lambda: (COLUMNS, "another hash"))
    with pytest.raises(ModelIncompatibleError, match="computed differently"):
        load_bundle(models, "AAPL")


# What is served


@pytest.fixture(scope="module")
def bars(make_bars) -> pd.DataFrame:
    return make_bars(n=420, seed=5)


@pytest.fixture(scope="module")
def bundle(bars) -> LSTMBundle:
    """A network over all features whose record covers the bars from 300 to 380."""
    network = make_network(6, columns=tuple(get_feature_columns()))
    known = engineer_features(bars)[list(network.columns)]
    typical = known.iloc[260:300]
    network = replace(
        network,
        centre=np.asarray(typical.median(), dtype=np.float32),
        scale=np.asarray(typical.std() + 1e-6, dtype=np.float32),
    )
    dates = bars.index[300:380]
    numbers = dict.fromkeys([*artifact.RECORD_COLUMNS[1:], "model_lstm"], 0.001)
    record = pd.DataFrame(numbers, index=range(80)).assign(date=dates, sigma_log=0.03, raw_scaled=0.25)
    close = bars["Close"].to_numpy()
    record["realised_log"] = np.log(close[305:385] / close[300:380])
    return replace(make_bundle(network=network), record=record)


def test_a_decision_does_not_change_when_later_bars_arrive(bundle, bars):
    forecaster, sizer = BundleForecaster(bundle=bundle), make_sizer()
    full = decide("AAPL", bars, forecaster, sizer).frame
    for t in (255, 299, 320, 379, 380, 381, 400, 419):
        cut = decide("AAPL", bars.iloc[: t + 1], forecaster, sizer).frame
        pd.testing.assert_series_equal(cut.iloc[-1], full.iloc[t], rtol=1e-5)


def test_the_signal_is_the_record_where_that_reaches_and_the_network_after_it(bundle, bars):
    frame = BundleForecaster(bundle=bundle).forecast(bars)
    assert (frame["raw_scaled"].iloc[300:380] == 0.25).all()
    assert frame["raw_scaled"].iloc[:300].isna().all()
    live = frame.iloc[380:]
    features = engineer_features(bars)[list(bundle.columns)].to_numpy(dtype=np.float32)
    expected = [slowly(bundle.network, features[t - LENGTH + 1 : t + 1]) for t in range(380, 420)]
    np.testing.assert_allclose(live["raw_scaled"], expected, atol=1e-5)
    assert live["raw_scaled"].nunique() == 40
    np.testing.assert_array_equal(live["model_lstm"], live["raw_scaled"])
    scaled = live["expected_log"] / live["sigma_log"]
    np.testing.assert_allclose(scaled, 0.05 + 0.5 * live["raw_scaled"], rtol=1e-9)


def test_without_an_edge_it_has_no_skill(bundle, bars):
    no_edge = replace(bundle, metadata={**bundle.metadata, "verdict": {"label": "no-edge"}})
    frame = BundleForecaster(bundle=no_edge).forecast(bars)
    assert (frame["skill_lower"].dropna() == 0).all()
    np.testing.assert_allclose(frame["expected_log"].iloc[380:], frame["baseline_log"].iloc[380:])
    assert frame["raw_scaled"].iloc[380:].nunique() == 40


def test_serving_imports_no_tensorflow(models: Path):
    code = (
        "import sys; from pathlib import Path; import service.prediction_service;"
        "from inference.load_lstm_model import load_bundle, golden_outputs; import numpy as np;"
        "b = load_bundle(Path(sys.argv[1]), 'AAPL');"
        "print(golden_outputs(b.network, np.zeros((9, 5), dtype=np.float32))[0]);"
        "heavy = {'tensorflow', 'keras'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(models)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert np.isfinite(float(done.stdout))
