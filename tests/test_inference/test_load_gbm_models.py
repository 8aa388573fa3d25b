import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata as package_metadata
from pathlib import Path
from types import ModuleType

import joblib
import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.preprocessing import RobustScaler

from data.feature_engineer import feature_set_hash, get_feature_columns
from inference import artifact
from inference import load_gbm_models as store
from inference.artifact import new_version_id
from inference.intervals import calibrate
from inference.load_gbm_models import (
    BoosterEnsemble,
    GBMBundle,
    PathModel,
    load_bundle,
    predict_booster,
    save_bundle,
    select_scaled,
    shap_values,
    shrunk_weights,
)
from tests.test_inference.conftest import plant, reseal
from utils.base import (
    AIStocksError,
    ModelCorruptError,
    ModelIncompatibleError,
    ModelMissingError,
    StorageError,
)
from utils.model_paths import (
    GBM,
    KEEP_VERSIONS,
    current_version,
    linked_version,
    list_symbols,
    list_versions,
    roll_back,
)

COLUMNS = tuple(get_feature_columns()[:4])


def make_bundle(symbol: str = "AAPL", seed: int = 0, names: tuple[str, ...] = ("xgb", "lgb")) -> GBMBundle:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(200, 4)).astype(np.float32)
    target = features[:, 0] + rng.normal(size=200)
    data = lightgbm.Dataset(features[:, :3], target, params={"verbosity": -1})
    models = {
        "xgb": xgboost.train({"max_depth": 2, "nthread": 1}, xgboost.DMatrix(features[:, :3], target), 5),
        "lgb": lightgbm.train({"num_leaves": 4, "num_threads": 1, "verbosity": -1}, data, 5),
    }
    ensemble = BoosterEnsemble(
        columns=COLUMNS,
        selected=(0, 1, 2),
        scaler=RobustScaler().fit(features),
        models={name: models[name] for name in names},
        weights=dict.fromkeys(names, 1 / len(names)),
        calibration=calibrate(target, target, drift=0.1, horizon_bars=1),
    )
    dates = pd.bdate_range("2020-01-01", periods=5)
    numbers = [*artifact.RECORD_COLUMNS[1:], *(f"model_{name}" for name in names)]
    record = pd.DataFrame({name: np.zeros(5) for name in numbers}).assign(date=dates)
    return GBMBundle(
        symbol=symbol,
        horizon_bars=5,
        ensemble=ensemble,
        record=record,
        metadata={
            "symbol": symbol,
            "horizon_bars": 5,
            "model_version": new_version_id(datetime.now(UTC)),
            "data_hash": "0" * 64,
            "feature_set_hash": feature_set_hash(),
            "seed": seed,
            "verdict": {"label": "no-edge"},
        },
        importance=dict.fromkeys(COLUMNS, 0.25),
        hyperparameters={"xgb": {"rounds": 5}},
    )


GOLDEN = np.random.default_rng(9).normal(size=(6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions, the second verified by a fresh process like any real one."""
    root = tmp_path_factory.mktemp("models")
    early = {**make_bundle().metadata, "model_version": "20200101T000000-a", "seed": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
        save_bundle(replace(make_bundle(seed=1), metadata=early), root, golden_inputs=GOLDEN)
    save_bundle(make_bundle(seed=2), root, golden_inputs=GOLDEN)
    return root


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "models", symlinks=True)
    return tmp_path / "models"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)


def read_metadata(root: Path) -> Mapping[str, object]:
    return store.FORMAT.describe(linked_version(root, "AAPL")).metadata


def test_what_is_loaded_forecasts_what_was_saved(models: Path):
    loaded = load_bundle(models, "AAPL")
    assert loaded.metadata["seed"] == 2
    expected = make_bundle(seed=2).ensemble.raw_scaled(GOLDEN)
    np.testing.assert_allclose(loaded.ensemble.raw_scaled(GOLDEN), expected, rtol=1e-6)
    assert loaded.ensemble.selected_features == COLUMNS[:3]
    assert loaded.record["date"].iloc[0] == pd.Timestamp("2020-01-01")
    assert list_symbols(models) == ["AAPL"]
    assert read_metadata(models)["seed"] == 2


def test_a_symbol_without_a_model_names_the_command(models: Path):
    with pytest.raises(ModelMissingError, match=r"python -m training\.train_gbm MSFT"):
        load_bundle(models, "MSFT")


DOCUMENTS = (
    "feature_columns.json",
    "hyperparameters.json",
    "training_metadata.json",
    "feature_importance.json",
)
FILES = (
    *DOCUMENTS,
    "xgb_model.joblib",
    "lgb_model.joblib",
    "scaler.joblib",
    "oos_predictions.parquet",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["flip", "empty", "truncate", "html", "absent"])
def test_a_damaged_file_is_never_read_and_the_earlier_version_serves(models: Path, name: str, fault: str):
    path = current_version(models, "AAPL") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {
        "flip": bytes(content),
        "empty": b"",
        "truncate": bytes(content[:-9]),
        "html": b"<html>no</html>",
    }
    if fault == "absent":
        path.unlink()
    else:
        path.write_bytes(damaged[fault])
    with pytest.raises(ModelCorruptError, match=name):
        store.load_folder(path.parent)
    loaded = load_bundle(models, "AAPL")
    assert loaded.metadata["seed"] == 1
    assert "serves instead" in loaded.warnings[0]


FITTED = {
    "boosters": {},
    "weights": {"xgb": 0.5, "lgb": 0.5},
    "calibration": {"drift": 0.1, "raw_mean": 0.0, "slope": 1.0, "skill_lower": 0.5, "n_rows": 9},
}


def with_paths(bundle: GBMBundle) -> GBMBundle:
    """Add models of 1 and 20 bars, each with boosters, a scaler and a selection of its own."""
    paths = []
    for seed, horizon_bars in ((11, 1), (12, 20)):
        ensemble = make_bundle(seed=seed).ensemble
        selected = (0, 1, 2) if horizon_bars == 1 else (1, 2, 3)
        paths.append(
            PathModel(
                horizon_bars=horizon_bars,
                ensemble=replace(ensemble, selected=selected),
                hyperparameters={"xgb": {"rounds": seed}},
            )
        )
    return replace(bundle, path_models=tuple(paths))


@pytest.fixture(scope="module")
def saved_paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
        save_bundle(with_paths(make_bundle(seed=2)), root, golden_inputs=GOLDEN)
    return root


@pytest.fixture
def path_version(saved_paths: Path, tmp_path: Path) -> Path:
    """A version that holds models of further horizons."""
    shutil.copytree(saved_paths, tmp_path / "models", symlinks=True)
    return current_version(tmp_path / "models", "AAPL")


PATH_FILES = [f"{name}_h{bars}.joblib" for bars in (1, 20) for name in ("xgb_model", "lgb_model", "scaler")]


def test_models_of_further_horizons_are_loaded_as_they_were_saved(path_version: Path):
    loaded = store.load_folder(path_version)
    for path, made in zip(loaded.path_models, with_paths(make_bundle()).path_models, strict=True):
        assert path.horizon_bars == made.horizon_bars
        assert path.hyperparameters == made.hyperparameters
        assert path.ensemble.selected == made.ensemble.selected
        assert path.ensemble.calibration == made.ensemble.calibration
        expected = made.ensemble.raw_scaled(GOLDEN)
        np.testing.assert_allclose(path.ensemble.raw_scaled(GOLDEN), expected, rtol=1e-6)
    files = {path.name for path in path_version.iterdir()} - {"manifest.json"}
    assert files == {*FILES, *PATH_FILES}
    assert set(json.loads((path_version / "manifest.json").read_bytes())["files"]) == files


@pytest.mark.parametrize("name", PATH_FILES)
@pytest.mark.parametrize("fault", ["flip", "absent"])
def test_a_damaged_file_of_a_path_model_is_never_read(path_version: Path, name: str, fault: str):
    content = bytearray((path_version / name).read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "absent":
        (path_version / name).unlink()
    else:
        (path_version / name).write_bytes(content)
    with pytest.raises(ModelCorruptError, match=name):
        store.load_folder(path_version)


@pytest.mark.parametrize("name", ["feature_columns.json", "hyperparameters.json"])
def test_a_document_that_knows_other_horizons_than_the_manifest_is_corrupt(path_version: Path, name: str):
    document = json.loads((path_version / name).read_bytes())
    del document["path_models"]["20"]
    plant(path_version, name, json.dumps(document).encode())
    with pytest.raises(ModelCorruptError, match=f"{name} tells of other horizons"):
        store.load_folder(path_version)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("feature_columns.json", {"path_models": {"1": ["no_such_column"], "20": list(COLUMNS)}}),
        ("feature_columns.json", {"path_models": {"1": [], "20": list(COLUMNS)}}),
        ("hyperparameters.json", {"path_models": {"1": {}, "20": {}}}),
        ("hyperparameters.json", {"path_models": {"1": {**FITTED, "weights": {"xgb": 1.0}}, "20": FITTED}}),
        ("hyperparameters.json", {"path_models": {"one": FITTED}}),
    ],
)
def test_nonsense_about_a_path_model_is_corrupt_and_named(path_version: Path, name: str, content: dict):
    document = json.loads((path_version / name).read_bytes())
    plant(path_version, name, json.dumps({**document, **content}).encode())
    with pytest.raises(ModelCorruptError, match=name):
        store.load_folder(path_version)


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        ({"1": [], "20": []}, ModelCorruptError),
        ({"0": [0.0] * 6}, ModelCorruptError),
        ({"7": [0.0] * 6}, ModelCorruptError),
        ({"1": [0.0] * 6}, ModelCorruptError),
        ({}, ModelCorruptError),
        ({"1": [9.0] * 6, "20": [9.0] * 6}, ModelIncompatibleError),
    ],
)
def test_golden_outputs_vouch_for_each_path_model(path_version: Path, outputs: dict, error: type[Exception]):
    reseal(path_version, path_golden_outputs=outputs)
    with pytest.raises(error, match="train again"):
        store.load_folder(path_version)


def test_a_bundle_from_before_there_were_path_models_loads(models: Path):
    folder = current_version(models, "AAPL")
    for name in ("feature_columns.json", "hyperparameters.json"):
        document = json.loads((folder / name).read_bytes())
        assert document.pop("path_models") == {}
        plant(folder, name, json.dumps(document).encode())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    body = {key: value for key, value in manifest.items() if key not in {"seal", "path_golden_outputs"}}
    raw = json.dumps(body).encode()
    seal = hashlib.sha256(raw).hexdigest().encode()
    (folder / "manifest.json").write_bytes(b'{"seal": "%s",' % seal + raw[1:])
    loaded = load_bundle(models, "AAPL")
    assert (loaded.metadata["seed"], loaded.path_models, loaded.warnings) == (2, (), ())


def dumped(content: object) -> bytes:
    joblib.dump(content, buffer := io.BytesIO())
    return buffer.getvalue()


def parquet(frame: pd.DataFrame) -> bytes:
    frame.to_parquet(buffer := io.BytesIO())
    return buffer.getvalue()


JUNK = (b"", b"junk", b"\x80\x04K\x07.", b"\x78\x9c\x00", b"cno_such\nthing\n.", b"(" * 5_000, dumped([1, 2]))
RECORD = make_bundle().record
DAMAGE = [
    *((name, junk) for name in ("scaler.joblib", "xgb_model.joblib", "lgb_model.joblib") for junk in JUNK),
    ("scaler.joblib", dumped(RobustScaler())),
    ("scaler.joblib", dumped(RobustScaler().fit(np.zeros((3, 2))))),
    ("scaler.joblib", dumped(None)),
    *(("oos_predictions.parquet", junk) for junk in (b"", b"junk", b"PAR1junkPAR1")),
    ("oos_predictions.parquet", parquet(RECORD.drop(columns="skill_lower"))),
    ("oos_predictions.parquet", parquet(RECORD.drop(columns="model_lgb"))),
    ("oos_predictions.parquet", parquet(RECORD.assign(date="2020-01-01"))),
    ("oos_predictions.parquet", parquet(RECORD.assign(date=RECORD["date"].iloc[0]))),
    *(
        (name, junk)
        for name in DOCUMENTS
        for junk in (b"", b"junk", b"[1]", b"null", b"\xff", b"[" * 100_000)
    ),
    ("feature_columns.json", {"columns": list(COLUMNS), "selected": ["no_such_column"]}),
    ("feature_columns.json", {"columns": list(COLUMNS), "selected": []}),
    ("feature_columns.json", {"columns": [*COLUMNS, COLUMNS[0]], "selected": [COLUMNS[0]]}),
    ("feature_columns.json", {"columns": list(COLUMNS[:3]), "selected": list(COLUMNS[:3])}),
    ("feature_columns.json", {"columns": list(COLUMNS), "selected": list(COLUMNS[:2])}),
    ("feature_columns.json", {"columns": list(COLUMNS)}),
    ("feature_columns.json", {"columns": [[1]], "selected": [{}]}),
    ("hyperparameters.json", {**FITTED, "calibration": {"drift": 0.1}}),
    ("hyperparameters.json", {**FITTED, "calibration": {**FITTED["calibration"], "slope": "steep"}}),
    ("hyperparameters.json", {**FITTED, "calibration": {**FITTED["calibration"], "slope": float("nan")}}),
    ("hyperparameters.json", {**FITTED, "weights": {"xgb": 1.0}}),
    ("hyperparameters.json", {**FITTED, "weights": {"xgb": float("inf"), "lgb": 0.5}}),
    ("hyperparameters.json", {**FITTED, "weights": [0.5, 0.5]}),
    ("training_metadata.json", {}),
    ("training_metadata.json", {**make_bundle().metadata, "horizon_bars": 0}),
    ("training_metadata.json", {**make_bundle().metadata, "verdict": None}),
    ("training_metadata.json", {**make_bundle().metadata, "symbol": "MSFT"}),
    ("training_metadata.json", dict(make_bundle().metadata)),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_that_the_hashes_vouch_for_is_corrupt_and_named(models: Path, name: str, content: object):
    folder = current_version(models, "AAPL")
    plant(folder, name, content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ModelCorruptError, match="train again") as caught:
        store.load_folder(folder)
    assert folder.name in str(caught.value)
    assert name in str(caught.value) or "forecast" in str(caught.value)
    assert str(models) not in str(caught.value)
    loaded = load_bundle(models, "AAPL")
    assert loaded.metadata["seed"] == 1
    assert folder.name in loaded.warnings[0]
    assert "version 20200101T000000-a serves instead" in loaded.warnings[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"golden_inputs": [], "golden_outputs": []},
        {"golden_inputs": [[]], "golden_outputs": [0.0]},
        {"golden_inputs": [[0.0] * 4, [0.0] * 3], "golden_outputs": [0.0, 0.0]},
        {"golden_inputs": [[0.0] * 4], "golden_outputs": [0.0, 0.0]},
        {"golden_inputs": [[0.0] * 4], "golden_outputs": []},
        {"golden_inputs": [[0.0] * 5], "golden_outputs": [0.0]},
        {"golden_inputs": [[None] * 4], "golden_outputs": [0.0]},
        {"golden_inputs": [[float("nan")] * 4], "golden_outputs": [0.0]},
        {"golden_inputs": [[0.0] * 4], "golden_outputs": [float("inf")]},
        {"golden_inputs": 7},
        {"models": []},
        {"models": ["xgb", "xgb"]},
        {"models": ["xgb", "lgb", "svm"]},
        {"models": ["xgb", "lgb", "cat"]},
        {"models": ["xgb"]},
        {"symbol": "MSFT"},
        {"kind": "lstm"},
        {"model_version": "another"},
        {"data_hash": "1" * 64},
        {"files": {"scaler.joblib": "short"}},
        {"files": [1]},
        {"schema_version": "two"},
        {"unknown": 1},
    ],
)
def test_a_sealed_manifest_of_nonsense_is_corrupt(models: Path, changes: dict[str, object]):
    folder = current_version(models, "AAPL")
    reseal(folder, **changes)
    with pytest.raises(ModelCorruptError, match="train again"):
        store.load_folder(folder)
    assert load_bundle(models, "AAPL").metadata["seed"] == 1


def test_two_hundred_random_flips_are_all_noticed(models: Path):
    folder = current_version(models, "AAPL")
    rng = np.random.default_rng(3)
    files = sorted(folder.iterdir())
    for _ in range(200):
        path = files[rng.integers(len(files))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        with pytest.raises(ModelCorruptError, match="train again"):
            store.load_folder(folder)
        path.write_bytes(good)
    assert store.load_folder(folder).metadata["seed"] == 2


def test_a_bundle_of_the_release_before_must_be_trained_again(models: Path):
    folder = current_version(models, "AAPL")
    document = json.loads((folder / "manifest.json").read_bytes())
    old = {name: document[name] for name in ("model_version", "files", "libraries", "data_hash")}
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, **old}))
    with pytest.raises(ModelIncompatibleError, match=r"schema 1.*train again with --overwrite"):
        load_bundle(models, "AAPL")
    with pytest.raises(ModelIncompatibleError, match="schema 1"):
        read_metadata(models)


def test_columns_that_are_not_computed_any_more_are_named(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifact, "expected_features", lambda: (COLUMNS[2:], feature_set_hash()))
    for read in (lambda root: load_bundle(root, "AAPL"), read_metadata):
        with pytest.raises(ModelIncompatibleError, match=rf"{COLUMNS[0]}, {COLUMNS[1]}: train again with"):
            read(models)


def test_features_that_are_computed_differently_must_be_trained_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifact, "expected_features", lambda: (COLUMNS, "another hash"))
    for read in (lambda root: load_bundle(root, "AAPL"), read_metadata):
        with pytest.raises(
            ModelIncompatibleError, match=r"computed differently .*train again with --overwrite"
        ):
            read(models)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("names", [("xgb",), ("lgb",), ("lgb", "xgb"), ("xgb", "lgb", "cat")])
def test_a_bundle_holds_the_boosters_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
):
    known = tuple(name for name in names if name != "cat")
    bundle = make_bundle(names=known)
    if "cat" in names:
        bundle = with_catboost(bundle, monkeypatch)
    folder = save_bundle(bundle, tmp_path, golden_inputs=GOLDEN)
    loaded = load_bundle(tmp_path, "AAPL")
    assert tuple(loaded.ensemble.models) == names
    assert sorted(path.name for path in folder.glob("*_model.joblib")) == sorted(
        f"{n}_model.joblib" for n in names
    )
    expected = bundle.ensemble.raw_scaled(GOLDEN)
    np.testing.assert_allclose(loaded.ensemble.raw_scaled(GOLDEN), expected, rtol=1e-6)
    assert store.FORMAT.describe(linked_version(tmp_path, "AAPL")).models == names


class FakeCat:
    """Predicts the first column, as a model of a library that need not be installed."""

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, 0].astype(np.float64)


def with_catboost(bundle: GBMBundle, monkeypatch: pytest.MonkeyPatch) -> GBMBundle:
    module = ModuleType("catboost")
    module.FakeCat = FakeCat  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeCat, "__module__", "catboost")
    monkeypatch.setitem(sys.modules, "catboost", module)
    version = package_metadata.version
    monkeypatch.setattr(
        artifact.package_metadata, "version", lambda name: "1.2" if name == "catboost" else version(name)
    )
    models = {**bundle.ensemble.models, "cat": FakeCat()}
    ensemble = replace(bundle.ensemble, models=models, weights=dict.fromkeys(models, 1 / len(models)))
    return replace(bundle, ensemble=ensemble, record=bundle.record.assign(model_cat=0.0))


@pytest.mark.usefixtures("quick")
def test_a_library_that_is_not_installed_is_named(tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        save_bundle(with_catboost(make_bundle(), patch), tmp_path, golden_inputs=GOLDEN)
    with pytest.raises(ModelIncompatibleError, match="needs catboost, which is not installed"):
        load_bundle(tmp_path, "AAPL")


def test_a_booster_that_no_manifest_names_is_not_loaded(models: Path, tmp_path: Path):
    folder = current_version(models, "AAPL")

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    (folder / "cat_model.joblib").write_bytes(pickle.dumps(Evil()))
    assert set(load_bundle(models, "AAPL").ensemble.models) == {"xgb", "lgb"}
    assert not (tmp_path / "owned").exists()


def test_a_bundle_of_another_symbol_does_not_serve(models: Path):
    (models / "AAPL").rename(models / "MSFT")
    with pytest.raises(ModelCorruptError, match="model of 'AAPL'"):
        load_bundle(models, "MSFT")


@pytest.mark.parametrize("target", ["versions/99999999T000000-x", "gbm"])
def test_a_link_that_dangles_or_loops_is_served_around(models: Path, target: str):
    link = models / "AAPL" / "gbm"
    link.unlink()
    link.symlink_to(target)
    loaded = load_bundle(models, "AAPL")
    assert loaded.metadata["seed"] == 2
    assert f"{loaded.model_version} serves instead" in loaded.warnings[0]
    assert read_metadata(models)["seed"] == 2
    link.unlink()
    link.symlink_to("versions/20200101T000000-b")
    assert load_bundle(models, "AAPL").metadata["seed"] == 1, "never a newer one than the link named"


def test_a_verification_that_hangs_is_given_up(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(artifact, "VERIFY_WAIT_S", 0.01)
    with pytest.raises(ModelCorruptError, match="it hangs"):
        save_bundle(make_bundle(seed=3), models, golden_inputs=GOLDEN)
    assert load_bundle(models, "AAPL").metadata["seed"] == 2


def test_when_every_version_is_damaged_the_answer_is_an_error(models: Path):
    for folder in list_versions(models, "AAPL"):
        (folder / "xgb_model.joblib").write_bytes(b"")
    with pytest.raises(ModelCorruptError, match=r"xgb_model\.joblib is not the file .*: train again with"):
        load_bundle(models, "AAPL")


def test_a_malicious_pickle_is_not_executed(models: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    (current_version(models, "AAPL") / "xgb_model.joblib").write_bytes(pickle.dumps(Evil()))
    load_bundle(models, "AAPL")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_that_the_manifest_does_not_list_is_not_executed(models: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    folder = current_version(models, "AAPL")
    (folder / "xgb_model.joblib").write_bytes(pickle.dumps(Evil()))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for kept in ({k: v for k, v in files.items() if k != "xgb_model.joblib"}, {}):
        reseal(folder, files=kept)
        with pytest.raises(ModelCorruptError):
            store.load_folder(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", ["../../outside.joblib", "/etc/passwd", "link.joblib", "x" * 300, "manifest.json", ".hidden", ""]
)
def test_a_manifest_that_points_elsewhere_is_refused(models: Path, tmp_path: Path, name: str):
    folder = current_version(models, "AAPL")
    (folder / "link.joblib").symlink_to("/etc/passwd")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    reseal(folder, files={**files, name: "0" * 64})
    with pytest.raises(ModelCorruptError, match="not a plain file"):
        store.load_folder(folder)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "<html>", '{"schema_version": "x"}'])
def test_a_damaged_manifest_is_corrupt_not_a_crash(models: Path, content: str):
    folder = current_version(models, "AAPL")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ModelCorruptError):
        store.load_folder(folder)


def test_a_link_that_leaves_the_symbol_is_refused(models: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(current_version(models, "AAPL"), elsewhere)
    (models / "AAPL" / "gbm").unlink()
    (models / "AAPL" / "gbm").symlink_to(elsewhere)
    with pytest.raises(ModelCorruptError, match="outside"):
        load_bundle(models, "AAPL")


def test_other_library_versions_that_forecast_differently_are_named(
    models: Path, monkeypatch: pytest.MonkeyPatch
):
    real = store.BoosterEnsemble.raw_scaled
    monkeypatch.setattr(store.BoosterEnsemble, "raw_scaled", lambda *args: real(*args) + 0.5)
    monkeypatch.setattr(
        artifact,
        "library_versions",
        lambda names: {**dict.fromkeys(store.LIBRARIES, "0"), "xgboost": "2.0.3"},
    )
    with pytest.raises(ModelIncompatibleError, match=r"xgboost .* -> 2\.0\.3"):
        load_bundle(models, "AAPL")


def test_rollback_serves_the_earlier_version_and_stops_at_the_first(models: Path):
    roll_back(models, "AAPL", GBM, store.load_folder)
    assert load_bundle(models, "AAPL").metadata["seed"] == 1
    with pytest.raises(ModelMissingError, match="no version before"):
        roll_back(models, "AAPL", GBM, store.load_folder)


@pytest.mark.usefixtures("quick")
def test_versions_are_bounded(models: Path):
    for seed in range(7):
        save_bundle(make_bundle(seed=seed), models, golden_inputs=GOLDEN)
    assert len(list_versions(models, "AAPL")) == KEEP_VERSIONS
    assert load_bundle(models, "AAPL").metadata["seed"] == 6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", ["mkdir", "replace", "rename", "symlink_to"])
def test_a_full_disk_leaves_the_old_bundle(models: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(StorageError, match="disk is full"):
        save_bundle(make_bundle(seed=3), models, golden_inputs=GOLDEN)
    monkeypatch.undo()
    assert load_bundle(models, "AAPL").metadata["seed"] == 2
    assert not list((models / "AAPL" / "versions").glob(".aside-*"))
    assert len(list_versions(models, "AAPL")) == 2


def test_a_bundle_that_does_not_load_elsewhere_does_not_serve(models: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store.BoosterEnsemble, "raw_scaled", lambda _, inputs: np.full(len(inputs), 99.0))
    with pytest.raises(ModelCorruptError, match="fresh process"):
        save_bundle(make_bundle(seed=3), models, golden_inputs=GOLDEN)
    monkeypatch.undo()
    assert load_bundle(models, "AAPL").metadata["seed"] == 2


KILLED = textwrap.dedent(
    """
    import os, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    from pathlib import Path
    import test_load_gbm_models as case
    from inference import artifact
    artifact.verify_in_fresh_process = lambda *_: None
    real = os.fsync
    def counted(descriptor):
        global countdown
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), 9)
        real(descriptor)
    os.fsync = counted
    for number in sys.argv[2:]:
        countdown = int(number)
        if (child := os.fork()) == 0:
            case.save_bundle(case.make_bundle(seed=7), Path(sys.argv[1], number), golden_inputs=case.GOLDEN)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)


def test_kill_9_while_saving_leaves_old_or_new_never_a_mixture(saved: Path, tmp_path: Path):
    here, after_flushes = Path(__file__).resolve(), ["3", "12", "13", "99"]
    for number in after_flushes:
        shutil.copytree(saved, tmp_path / number, symlinks=True)
    script = KILLED.format(tests=str(here.parent), root=str(here.parents[2]))
    command = [sys.executable, "-c", script, str(tmp_path), *after_flushes]
    # With more threads than one, what OpenMP started would not be there after a fork.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=200)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    for number, code in zip(after_flushes, codes, strict=True):
        loaded = load_bundle(tmp_path / number, "AAPL")
        assert loaded.metadata["seed"] in ((7,) if code == 0 else (2, 7))
        assert not loaded.warnings


def test_versions_of_one_second_keep_their_order():
    moments = [
        datetime(2026, 1, 2, 3, 4, 5, microsecond, tzinfo=UTC) for microsecond in range(0, 900_000, 9_000)
    ]
    names = [new_version_id(moment) for moment in moments]
    assert names == sorted(names)


def test_every_error_belongs_to_the_tree():
    for kind in (ModelCorruptError, ModelIncompatibleError, ModelMissingError, StorageError):
        assert issubclass(kind, AIStocksError)


# What boosters say.


@pytest.fixture(scope="module")
def boosters():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(400, 6)).astype(np.float32)
    target = features[:, 0] - 0.5 * features[:, 3] + rng.normal(size=400)
    xgb = xgboost.train({"max_depth": 3, "nthread": 1}, xgboost.DMatrix(features, target), num_boost_round=20)
    data = lightgbm.Dataset(features, target, params={"verbosity": -1})
    lgb = lightgbm.train({"num_leaves": 7, "num_threads": 1, "verbosity": -1}, data, num_boost_round=20)
    return features, {"xgb": xgb, "lgb": lgb}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # shap's own use of matplotlib
def test_own_contributions_equal_the_shap_package(boosters):
    import shap

    features, models = boosters
    for model in models.values():
        expected = shap.TreeExplainer(model).shap_values(features[:50])
        np.testing.assert_allclose(shap_values(model, features[:50]), expected, atol=1e-6)


def test_contributions_sum_to_the_prediction_up_to_a_constant(boosters):
    features, models = boosters
    for model in models.values():
        rest = predict_booster(model, features) - shap_values(model, features).sum(axis=1)
        assert np.ptp(rest) < 1e-4


def test_selected_columns_are_scaled_like_the_scaler_would(boosters):
    features, _ = boosters
    scaler = RobustScaler().fit(features)
    np.testing.assert_allclose(
        select_scaled(scaler, features, (1, 4)), scaler.transform(features)[:, [1, 4]], rtol=1e-5, atol=1e-6
    )


def test_another_number_of_features_is_refused(boosters):
    features, models = boosters
    ensemble = BoosterEnsemble(
        columns=tuple("abcdef"),
        selected=(0, 1, 2, 3, 4, 5),
        scaler=RobustScaler().fit(features),
        models=models,
        weights={"xgb": 0.5, "lgb": 0.5},
        calibration=calibrate(np.empty(0), np.empty(0), drift=0.0, horizon_bars=5),
    )
    with pytest.raises(ValueError, match="got 5 features, the model knows 6"):
        ensemble.per_model(features[:, :5])


def test_weights_are_equal_without_evidence_and_lean_towards_skill():
    rng = np.random.default_rng(4)
    truth = rng.normal(size=8_000)
    signals = {"good": truth + rng.normal(size=8_000), "noise": rng.normal(size=8_000)}
    assert shrunk_weights({k: v[:0] for k, v in signals.items()}, truth[:0]) == {"good": 0.5, "noise": 0.5}
    weights = shrunk_weights(signals, truth)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert 0.8 < weights["good"] < 1.0
    assert weights["noise"] > 0.0
