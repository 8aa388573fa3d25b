"""Listing without unpickling, lazy loading, reloading, and what serves when a new version is broken."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import inference.load_gbm_models
from data.feature_engineer import feature_set_hash, get_feature_columns
from inference.artifact import publish, sha256_of
from inference.load_gbm_models import SCHEMA_VERSION, GBMBundle, GBMManifest
from service.model_registry import ModelRegistry, ServedModel, model_meta, wire_metrics
from tests.test_service.conftest import bundle_of, metadata_of
from utils.errors import (
    InvalidSymbolError,
    ModelCorruptError,
    ModelIncompatibleError,
    ModelMissingError,
)
from utils.model_paths import GBM, Linked, linked_version

Save = Callable[..., Path]


class Loader:
    """Counts loads and fails where told to."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.broken: dict[str, Exception] = {}

    def __call__(self, linked: Linked) -> GBMBundle:
        version = linked.folder.name
        self.loads.append(version)
        if version in self.broken:
            raise self.broken[version]
        bundle = bundle_of(linked.folder.parents[1].name, version)
        return replace(bundle, ensemble=SimpleNamespace(models={"xgb": None}))  # type: ignore[arg-type]


@pytest.fixture
def save_version(tmp_path: Path) -> Save:
    """Return a writer of versions whose files are whole, and whose boosters are no models."""

    def save(symbol: str = "AAPL", version: str = "v1", **changes: object) -> Path:
        promised = {"feature_set_hash": feature_set_hash(), **changes}
        names = {"columns": get_feature_columns()[:2], "selected": get_feature_columns()[:2]}
        contents = dict.fromkeys(("scaler.joblib", "oos_predictions.parquet", "xgb_model.joblib"), b"junk")
        contents |= dict.fromkeys(("feature_importance.json", "hyperparameters.json"), b"{}")
        contents["feature_columns.json"] = json.dumps(names).encode()
        contents["training_metadata.json"] = json.dumps(metadata_of(symbol, version, **promised)).encode()
        manifest = GBMManifest(
            schema_version=SCHEMA_VERSION,
            kind=GBM.name,
            symbol=symbol,
            model_version=version,
            files=sha256_of(contents),
            models=("xgb",),
            libraries={},
            data_hash="0" * 64,
            golden_inputs=[[0.0, 0.0]],
            golden_outputs=[0.0],
        )
        return publish(
            tmp_path / "models", GBM, manifest=manifest, contents=contents, verify=lambda folder: None
        )

    return save


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def registry(tmp_path: Path, loader: Loader) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models", loader)


def test_an_absent_folder_is_an_empty_list(registry: ModelRegistry, tmp_path: Path) -> None:
    assert registry.list() == ()
    with pytest.raises(ModelMissingError, match=r"python -m training.train_gbm AAPL"):
        registry.get("AAPL")
    assert not (tmp_path / "models").exists()


def test_listing_unpickles_nothing(
    registry: ModelRegistry, loader: Loader, save_version: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(inference.load_gbm_models.joblib, "load", explode)
    save_version("MSFT")
    save_version("AAPL")
    assert [meta.id for meta in registry.list()] == ["AAPL-gbm", "MSFT-gbm"]
    assert registry.find("MSFT-gbm").symbol == "MSFT"
    assert loader.loads == []


def test_find_names_what_to_do(registry: ModelRegistry) -> None:
    with pytest.raises(ModelMissingError, match="api/models"):
        registry.find("x" * 5_000)


def test_a_damaged_bundle_is_left_out_and_logged(
    registry: ModelRegistry, save_version: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_version("AAPL")
    folder = save_version("MSFT")
    (folder / "training_metadata.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert [meta.symbol for meta in registry.list()] == ["AAPL"]
    assert "MSFT" in caplog.text or "training_metadata.json" in caplog.text


def test_the_list_describes_what_serves(
    registry: ModelRegistry, tmp_path: Path, save_version: Save, caplog: pytest.LogCaptureFixture
) -> None:
    save_version("AAPL", "v1", trained_through="2001-01-01")
    newer = save_version("AAPL", "v2", trained_through="2002-02-02")
    assert registry.list()[0].model_version == "v2"
    (newer / "xgb_model.joblib").write_bytes(b"damaged")
    for again in (ModelRegistry(tmp_path / "models"), ModelRegistry(tmp_path / "models")):
        (meta,) = again.list()
        assert (meta.model_version, meta.trained_through) == ("v1", "2001-01-01")
        assert "v2" in str(meta.notes)
        assert "v1 serves instead" in str(meta.notes)
    assert meta.ensemble_size == 1


def test_the_list_and_the_prediction_agree_once_a_model_is_loaded(
    registry: ModelRegistry, loader: Loader, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    registry.get("AAPL")
    loader.broken["v2"] = ModelCorruptError("bundle v2: golden")
    save_version("AAPL", "v2")
    served = registry.get("AAPL")
    assert registry.list() == (served.meta,)
    assert served.meta.model_version == "v1"
    assert served.warnings[-1] in str(served.meta.notes)


def test_an_incompatible_model_is_tried_once_and_not_listed(
    registry: ModelRegistry, loader: Loader, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    loader.broken["v1"] = ModelIncompatibleError("forecasts differently here")
    for _ in range(3):
        with pytest.raises(ModelIncompatibleError, match="differently"):
            registry.get("AAPL")
    assert loader.loads == ["v1"]
    assert registry.list() == ()
    save_version("AAPL", "v2")
    assert registry.get("AAPL").meta.model_version == "v2"
    assert registry.list()[0].model_version == "v2"


def test_a_question_reads_the_link_once(
    registry: ModelRegistry, save_version: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_version("AAPL")
    reads: list[str] = []

    def counted(models_dir: Path, symbol: str) -> Linked:
        reads.append(symbol)
        return linked_version(models_dir, symbol)

    monkeypatch.setattr("service.model_registry.linked_version", counted)
    monkeypatch.setattr("inference.load_gbm_models.linked_version", counted)
    registry.list()
    registry.get("AAPL")
    assert reads == ["AAPL", "AAPL"]


@pytest.mark.parametrize("target", ["versions/v9", "gbm"])
def test_a_link_that_dangles_or_loops_hides_no_model(
    registry: ModelRegistry, loader: Loader, save_version: Save, target: str
) -> None:
    link = save_version("AAPL", "v1").parents[1] / "gbm"
    link.unlink()
    link.symlink_to(target)
    (meta,) = registry.list()
    assert meta.model_version == "v1"
    assert "v1 serves instead" in str(meta.notes)


def test_metadata_of_another_shape_are_corrupt(registry: ModelRegistry, save_version: Save) -> None:
    save_version("AAPL", verdict={"label": "splendid", "reasons": []})
    assert registry.list() == ()
    for changes in ({"verdict": None}, {"horizon_bars": "five"}, {"metrics": [1]}):
        with pytest.raises(ModelCorruptError, match="AAPL"):
            model_meta(metadata_of(**changes))


def test_loads_once_and_again_when_the_link_moves(
    registry: ModelRegistry, loader: Loader, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    first = registry.get("AAPL")
    assert registry.get("AAPL") is first
    save_version("AAPL", "v2")
    second = registry.get("AAPL")
    assert (first.bundle.model_version, second.bundle.model_version) == ("v1", "v2")
    assert second.meta.model_version == "v2"
    assert loader.loads == ["v1", "v2"]


@pytest.mark.parametrize(
    "error", [ModelCorruptError("bundle v2: a file differs"), PermissionError(13, "denied")]
)
def test_the_old_version_serves_on_when_the_new_one_fails(
    registry: ModelRegistry,
    loader: Loader,
    save_version: Save,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    save_version("AAPL", "v1")
    registry.get("AAPL")
    loader.broken["v2"] = error
    save_version("AAPL", "v2")
    with caplog.at_level(logging.WARNING):
        served = registry.get("AAPL")
    assert served.bundle.model_version == "v1"
    assert "v1 serves on" in served.warnings[-1]
    assert "v1 serves on" in caplog.text
    assert registry.get("AAPL") is served
    assert loader.loads == ["v1", "v2"], "a broken version is tried once, not by every request"
    save_version("AAPL", "v3")
    assert registry.get("AAPL").bundle.model_version == "v3"
    assert registry.get("AAPL").warnings == ()


def test_a_broken_first_version_is_an_error(
    registry: ModelRegistry, loader: Loader, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    loader.broken["v1"] = PermissionError(13, "denied")
    with pytest.raises(ModelCorruptError, match="AAPL"):
        registry.get("AAPL")


def test_a_deleted_model_is_gone(registry: ModelRegistry, save_version: Save) -> None:
    folder = save_version("AAPL")
    registry.get("AAPL")
    (folder.parents[1] / "gbm").unlink()
    with pytest.raises(ModelMissingError):
        registry.get("AAPL")
    assert registry.list() == ()


def test_a_symbol_never_leaves_the_root(registry: ModelRegistry) -> None:
    with pytest.raises(InvalidSymbolError):
        registry.get("../elsewhere")


def test_a_hundred_threads_load_once(tmp_path: Path, loader: Loader, save_version: Save) -> None:
    save_version("AAPL")
    together = threading.Barrier(20)

    def slow(linked: Linked) -> GBMBundle:
        threading.Event().wait(0.02)
        return loader(linked)

    registry = ModelRegistry(tmp_path / "models", slow)
    answers: list[ServedModel] = []

    def ask() -> None:
        together.wait()
        answers.extend(registry.get("AAPL") for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 100
    assert len({id(answer) for answer in answers}) == 1
    assert loader.loads == ["v1"]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "0.5", True])
def test_undefined_metrics_are_zero_and_named(bad: object) -> None:
    stored = {**metadata_of()["metrics"], "sharpeRatio": bad, "calmarRatio": bad}
    metrics, undefined = wire_metrics(stored)
    assert metrics.sharpe_ratio == 0.0
    assert metrics.calmar_ratio is None
    assert undefined == ("sharpeRatio",)
    meta = model_meta(metadata_of(metrics=stored))
    assert meta.notes == "undefined, sent as 0: sharpeRatio"
    assert b"null" not in meta.wire_bytes()


def test_without_any_metrics_all_eight_are_named() -> None:
    metrics, undefined = wire_metrics({})
    assert len(undefined) == 8
    assert metrics.total_trades == 0


def test_the_verdict_becomes_the_gate() -> None:
    edge = model_meta(metadata_of(verdict={"label": "edge", "reasons": [], "evidence": {}}))
    none = model_meta(metadata_of())
    assert (edge.quality_gate_passed, edge.quality_score) == (True, 1.0)
    assert (none.quality_gate_passed, none.quality_score) == (False, 0.0)
    assert none.quality_reasons == ["the IC may be luck"]


def test_trap_6_the_percentage_goes_along() -> None:
    metrics, _ = wire_metrics({**metadata_of()["metrics"], "cumulativeReturn": 33.0})
    assert metrics.cumulative_return_pct == 3_300.0


def test_metrics_may_be_named_as_python_names_them() -> None:
    metrics, undefined = wire_metrics({"sharpe_ratio": 1.2, "total_trades": 0.0})
    assert metrics.sharpe_ratio == 1.2
    assert {"sharpeRatio", "totalTrades"}.isdisjoint(undefined)
