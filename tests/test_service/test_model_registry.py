"""Listing without unpickling, lazy loading, reloading, and what serves when a new version is broken."""

import errno
import io
import json
import logging
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fastapi.testclient import TestClient

import inference.load_gbm_models
from data.feature_engineer import feature_set_hash, get_feature_columns
from inference.artifact import Format, publish, sha256_of
from inference.ensemble import EnsembleBundle, EnsembleForecaster, SimpleEnsemble
from inference.load_gbm_models import SCHEMA_VERSION, GBMBundle, GBMManifest
from service.api import Services, create_api
from service.model_registry import (
    FORMATS,
    LOOK_EVERY_S,
    ModelRegistry,
    ServedModel,
    main,
)
from service.prediction_chart import model_meta, wire_metrics
from service.prediction_service import PredictionService
from service.training_service import TrainingService
from tests.test_service.conftest import FakeSource, bundle_of, metadata_of
from tests.test_service.test_api import check_problem
from utils.base import (
    InvalidSymbolError,
    LockedError,
    ModelCorruptError,
    ModelExistsError,
    ModelIncompatibleError,
    ModelMissingError,
    StorageError,
)
from utils.model_paths import GBM, TRASH, ArtifactKind, Linked, linked_version, training_lock

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


def replaced(form: Format, **changes: object) -> SimpleNamespace:
    """Return a format of which some parts are other ones."""
    parts = ("kind", "manifest", "load_linked", "load_folder", "describe")
    return SimpleNamespace(**({name: getattr(form, name) for name in parts} | changes))


def registry_of(tmp_path: Path, load: Callable[[Linked], GBMBundle]) -> ModelRegistry:
    form = replaced(FORMATS[0], load_linked=load, load_folder=lambda folder: None)
    return ModelRegistry(tmp_path / "models", (form,))


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def registry(tmp_path: Path, loader: Loader) -> ModelRegistry:
    return registry_of(tmp_path, loader)


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

    def counted(models_dir: Path, symbol: str, kind: ArtifactKind = GBM) -> Linked:
        reads.append(symbol)
        return linked_version(models_dir, symbol, kind)

    monkeypatch.setattr("service.model_registry.linked_version", counted)
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
            model_meta(metadata_of(**changes), ensemble_size=2)


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

    registry = registry_of(tmp_path, slow)
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
    meta = model_meta(metadata_of(metrics=stored), ensemble_size=2)
    assert meta.notes == "undefined, sent as 0: sharpeRatio"
    assert b"null" not in meta.wire_bytes()


def test_without_any_metrics_all_eight_are_named() -> None:
    metrics, undefined = wire_metrics({})
    assert len(undefined) == 8
    assert metrics.total_trades == 0


def test_the_verdict_becomes_the_gate() -> None:
    edge = model_meta(metadata_of(verdict={"label": "edge", "reasons": [], "evidence": {}}), ensemble_size=2)
    none = model_meta(metadata_of(), ensemble_size=2)
    alarm = {"label": "edge", "reasons": [], "evidence": {"leak_alarm": True}}
    leak = model_meta(metadata_of(verdict=alarm), ensemble_size=2)
    assert (leak.verdict, leak.quality_gate_passed, leak.quality_score) == ("edge", False, 0.0)
    assert "leak alarm" in leak.notes
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


# ---------------------------------------------------------------- reload


def test_a_manifest_that_changes_in_place_is_loaded_again(
    registry: ModelRegistry, loader: Loader, save_version: Save
) -> None:
    manifest = save_version("AAPL", "v1") / "manifest.json"
    first = registry.get("AAPL")
    os.utime(manifest, ns=(1, 1))
    assert registry.get("AAPL") is not first
    assert loader.loads == ["v1", "v1"]


def test_fault_22_a_hundred_requests_during_a_reload_get_one_version_each(
    tmp_path: Path, loader: Loader, save_version: Save
) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def slow(linked: Linked) -> GBMBundle:
        if linked.folder.name == "v2":
            loading.set()
            assert loaded.wait(5.0)
        return loader(linked)

    registry = registry_of(tmp_path, slow)
    save_version("AAPL", "v1")
    registry.get("AAPL")
    save_version("AAPL", "v2")
    answers: list[ServedModel] = []
    first = threading.Thread(target=lambda: answers.append(registry.get("AAPL")))
    first.start()
    assert loading.wait(5.0)
    others = [threading.Thread(target=lambda: answers.append(registry.get("AAPL"))) for _ in range(100)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert {model.bundle.model_version for model in answers} == {"v1"}, "nobody waits for the new version"
    loaded.set()
    first.join()
    assert answers[-1].bundle.model_version == registry.get("AAPL").bundle.model_version == "v2"
    assert len(answers) == 101
    assert all(model.meta.model_version == model.bundle.model_version for model in answers)


def test_current_is_the_loaded_model_while_its_link_names_it(
    registry: ModelRegistry, save_version: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("service.model_registry.time.monotonic", lambda: now[0])
    save_version("AAPL", "v1")
    assert registry.current("AAPL") is None, "it loads nothing"
    first = registry.get("AAPL")
    assert registry.current("AAPL") is first
    save_version("AAPL", "v2")
    assert registry.current("AAPL") is first, "the link is read at most once a second"
    now[0] += LOOK_EVERY_S
    assert registry.current("AAPL") is None
    second = registry.get("AAPL")
    assert registry.current("AAPL") is second
    registry.delete("AAPL-gbm")
    assert registry.current("AAPL") is None


# ---------------------------------------------------------------- download, delete, versions


def test_the_download_holds_what_the_manifest_lists(registry: ModelRegistry, save_version: Save) -> None:
    folder = save_version("AAPL")
    (folder / "secret.txt").write_text("not of the bundle")
    name, content = registry.archive("AAPL-gbm")
    assert name == "AAPL_artifacts.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        listed = {*json.loads((folder / "manifest.json").read_text())["files"], "manifest.json"}
        assert set(archive.namelist()) == listed
        assert all(archive.read(file) == (folder / file).read_bytes() for file in listed)
    assert registry.archive("AAPL-gbm")[1] == content, "the same version gives the same bytes"


def test_a_damaged_file_is_never_sent(registry: ModelRegistry, save_version: Save) -> None:
    (save_version("AAPL") / "xgb_model.joblib").write_bytes(b"damaged")
    with pytest.raises(ModelCorruptError):
        registry.archive("AAPL-gbm")


@pytest.mark.parametrize("model_id", ["AAPL", "AAPL-nothing", "aapl-gbm", "-gbm", ""])
def test_ids_that_are_none_are_refused(registry: ModelRegistry, save_version: Save, model_id: str) -> None:
    save_version("AAPL")
    for ask in (registry.archive, registry.delete, registry.restore, registry.roll_back, registry.versions):
        with pytest.raises(ModelMissingError):
            ask(model_id)


@pytest.mark.parametrize("model_id", ["../x-gbm", "..-gbm", "A/B-gbm"])
def test_ids_never_become_paths(registry: ModelRegistry, tmp_path: Path, model_id: str) -> None:
    for ask in (registry.archive, registry.delete, registry.restore):
        with pytest.raises((InvalidSymbolError, ModelMissingError)):
            ask(model_id)
    assert list(tmp_path.iterdir()) == []


def test_deleting_is_real_and_can_be_undone(
    registry: ModelRegistry, tmp_path: Path, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    save_version("AAPL", "v2")
    in_flight = registry.get("AAPL")
    registry.delete("AAPL-gbm")
    assert registry.list() == ()
    assert not (tmp_path / "models" / "AAPL" / "versions").exists()
    for ask in (registry.get, lambda _: registry.delete("AAPL-gbm"), lambda _: registry.find("AAPL-gbm")):
        with pytest.raises(ModelMissingError):
            ask("AAPL")
    assert in_flight.bundle.model_version == "v2", "who has it, keeps it"
    assert registry.restore("AAPL-gbm").model_version == "v2"
    assert registry.get("AAPL").bundle.model_version == "v2"
    assert [version.model_version for version in registry.versions("AAPL-gbm")] == ["v2", "v1"]
    with pytest.raises(ModelMissingError, match="no deleted"):
        registry.restore("AAPL-gbm")


@pytest.mark.parametrize("locked", ["", "AAPL", "AAPL/versions"])
def test_a_folder_that_may_not_be_entered_is_a_sentence_and_no_bug(
    tmp_path: Path,
    services: Services,
    loader: Loader,
    save_version: Save,
    monkeypatch: pytest.MonkeyPatch,
    locked: str,
) -> None:
    save_version("AAPL", "v1")
    models, registry = tmp_path / "models", registry_of(tmp_path, loader)
    registry.get("AAPL")
    training = TrainingService(
        models_dir=models, database_url=f"sqlite:///{tmp_path}/jobs", command=lambda *_: [], environment={}
    )
    predictions = PredictionService(registry=registry, source=FakeSource({}), cache=None)
    client = TestClient(
        create_api(replace(services, registry=registry, training=training, predictions=predictions))
    )
    with monkeypatch.context() as patch:
        refuse_below(patch, models / locked)
        # Without a word: whoever is asked next says why.
        assert registry.current("AAPL") is None
        for method, path, body in (
            ("DELETE", "/api/models/AAPL-gbm", None),
            ("POST", "/api/models/AAPL-gbm/rollback", None),
            ("POST", "/api/models/AAPL-gbm/rollback?to=v1", None),
            ("POST", "/api/models/AAPL-gbm/restore", None),
            ("GET", "/api/models/AAPL-gbm/versions", None),
            ("GET", "/api/models/AAPL-gbm/download", None),
            ("POST", "/api/predict", {"symbol": "AAPL"}),
        ):
            answer = client.request(method, path, json=body)
            detail = check_problem(answer, answer.status_code)
            # To bring back what nobody deleted finds nothing to bring back; a version may serve on unlisted.
            assert answer.status_code in {503, 507} or path.endswith("restore"), (path, detail)
            assert "permissions" in detail or path.endswith("restore"), (path, detail)
    assert registry.get("AAPL").bundle.model_version == "v1"


def refuse_below(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the operating system refuse whatever lies in a folder; root, who runs tests, may enter any."""

    def refusing(real: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *args: object, **kwargs: object) -> object:
            if isinstance(path, (str, Path)):
                inner = Path(path)
                if folder in inner.parents or (inner == folder and real.__name__ in {"scandir", "listdir"}):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        return call

    for name in ("stat", "lstat", "readlink", "scandir", "listdir", "open", "mkdir", "rename", "unlink"):
        patch.setattr(os, name, refusing(getattr(os, name)))


def test_a_symbol_that_was_trained_again_is_not_overwritten(
    registry: ModelRegistry, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    registry.delete("AAPL-gbm")
    save_version("AAPL", "v2")
    with pytest.raises(ModelExistsError):
        registry.restore("AAPL-gbm")
    assert registry.get("AAPL").bundle.model_version == "v2"
    registry.delete("AAPL-gbm")
    assert registry.restore("AAPL-gbm").model_version == "v2"


def test_a_restore_that_was_cut_short_is_finished(
    registry: ModelRegistry, tmp_path: Path, save_version: Save
) -> None:
    save_version("AAPL", "v1")
    save_version("AAPL", "v2")
    registry.delete("AAPL-gbm")
    models = tmp_path / "models"
    (entry,) = (models / TRASH).iterdir()
    (models / "AAPL" / "versions").mkdir()
    (entry / "versions" / "v1").rename(models / "AAPL" / "versions" / "v1")
    assert registry.list() == ()
    assert registry.restore("AAPL-gbm").model_version == "v2"
    assert len(registry.versions("AAPL-gbm")) == 2


def test_the_trash_is_bounded(
    registry: ModelRegistry, tmp_path: Path, save_version: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.model_paths.KEEP_TRASHED", 2)
    for version in ("v1", "v2", "v3"):
        save_version("AAPL", version)
        registry.delete("AAPL-gbm")
    assert len(list((tmp_path / "models" / TRASH).iterdir())) == 2
    assert registry.restore("AAPL-gbm").model_version == "v3"


def test_fault_22_delete_during_a_training_is_refused(
    registry: ModelRegistry, tmp_path: Path, save_version: Save
) -> None:
    save_version("AAPL")
    with (
        training_lock(tmp_path / "models", "AAPL"),
        pytest.raises(LockedError, match=f"process {os.getpid()}"),
    ):
        registry.delete("AAPL-gbm")
    assert registry.get("AAPL").meta.symbol == "AAPL"


def test_fault_22_a_model_deleted_while_it_is_read_is_missing_and_not_corrupt(
    tmp_path: Path, save_version: Save
) -> None:
    save_version("AAPL")
    registry: ModelRegistry

    def deleted_meanwhile(linked: Linked) -> GBMBundle:
        registry.delete("AAPL-gbm")
        return FORMATS[0].load_linked(linked)

    registry = registry_of(tmp_path, deleted_meanwhile)
    with pytest.raises(ModelMissingError):
        registry.get("AAPL")


def test_versions_and_rollback(registry: ModelRegistry, save_version: Save) -> None:
    save_version("AAPL", "v1", trained_through="2001-01-01")
    broken = save_version("AAPL", "v2")
    save_version("AAPL", "v3")
    (broken / "xgb_model.joblib").write_bytes(b"damaged")
    found = {version.model_version: version for version in registry.versions("AAPL-gbm")}
    assert list(found) == ["v3", "v2", "v1"]
    assert [version.serving for version in found.values()] == [True, False, False]
    assert "xgb_model" in str(found["v2"].damage)
    assert (found["v1"].trained_through, found["v1"].verdict) == ("2001-01-01", "no-edge")
    registry.get("AAPL")
    (broken / "xgb_model.joblib").write_bytes(b"junk")
    assert registry.roll_back("AAPL-gbm").model_version == "v2"
    assert registry.get("AAPL").bundle.model_version == "v2"
    assert registry.roll_back("AAPL-gbm").model_version == "v1"
    with pytest.raises(ModelMissingError, match="no version before"):
        registry.roll_back("AAPL-gbm")


def test_a_rollback_is_taken_back_by_naming_the_newer_version(
    tmp_path: Path, registry: ModelRegistry, save_version: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("v1", "v2", "v3"):
        save_version("AAPL", version)
    for _ in range(2):
        registry.roll_back("AAPL-gbm")
    found = {one.model_version: (one.serving, one.newer) for one in registry.versions("AAPL-gbm")}
    assert found == {"v3": (False, True), "v2": (False, True), "v1": (True, False)}
    with pytest.raises(
        ModelMissingError, match=r"`python -m service\.model_registry rollback AAPL --to VERSION`"
    ):
        registry.restore("AAPL-gbm")
    with pytest.raises(ModelMissingError, match=r"'v9' of AAPL is kept: .*model_registry versions AAPL`"):
        registry.roll_back("AAPL-gbm", "v9")
    assert registry.roll_back("AAPL-gbm", "v3").model_version == "v3"
    assert registry.get("AAPL").bundle.model_version == "v3"
    models = ["--models-dir", str(tmp_path / "models")]
    assert main(["rollback", "AAPL", "--to", "v1", *models]) == 5, "its boosters are junk: it would not serve"
    assert main(["delete", "AAPL", "--to", "v1", *models]) == 2
    assert "--to belongs to rollback" in capsys.readouterr().err
    assert registry.find("AAPL-gbm").model_version == "v3"


def test_rolling_back_what_is_not_there_leaves_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="QX1"):
        registry.roll_back("QX1-gbm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("is_deleted", "expected"), [(True, ModelMissingError), (False, StorageError)])
def test_a_rollback_beside_a_deletion_finds_no_model(
    tmp_path: Path,
    loader: Loader,
    save_version: Save,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_deleted: bool,
    expected: type[Exception],
) -> None:
    registry = registry_of(tmp_path, loader)
    save_version("AAPL", "v1")

    def lost_its_folder(*_: object) -> None:
        if is_deleted:
            registry.delete("AAPL-gbm")
        raise StorageError("cannot write the model of AAPL: No such file or directory")

    monkeypatch.setattr("service.model_registry.roll_back", lost_its_folder)
    with pytest.raises(expected):
        registry.roll_back("AAPL-gbm")


def test_another_kind_of_model_needs_one_entry(tmp_path: Path, loader: Loader, save_version: Save) -> None:
    save_version("AAPL")
    kind = ArtifactKind(name="lstm", versions="versions", trainer="training.other")
    (tmp_path / "models" / "AAPL" / "lstm").symlink_to("versions/v1")
    described = replace(FORMATS[0].describe(linked_version(tmp_path / "models", "AAPL")))
    metadata = {**described.metadata, "model_id": "AAPL-lstm"}
    other = replaced(
        FORMATS[1],
        kind=kind,
        load_linked=loader,
        describe=lambda linked: replace(described, metadata=metadata),
    )
    registry = ModelRegistry(tmp_path / "models", (FORMATS[0], other))
    assert [meta.id for meta in registry.list()] == ["AAPL-gbm", "AAPL-lstm"]
    assert [meta.model_variant for meta in registry.list()] == ["gbm", "lstm"]
    assert registry.get("AAPL", "lstm").bundle.symbol == "AAPL"


def test_the_command_line_lists_deletes_restores_and_rolls_back(
    tmp_path: Path, save_version: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> list[dict[str, object]]:
        assert main([*words, "--models-dir", str(tmp_path / "models")]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    save_version("AAPL", "v1")
    save_version("AAPL", "v2")
    assert [line["id"] for line in said("list")] == ["AAPL-gbm"]
    assert [line["serving"] for line in said("versions", "aapl")] == [True, False]
    assert said("delete", "AAPL") == [{"id": "AAPL-gbm", "status": "deleted"}]
    assert said("list") == []
    assert said("restore", "AAPL")[0]["model_version"] == "v2"
    assert main(["versions", "--models-dir", str(tmp_path)]) == 2
    assert main(["rollback", "MSFT", "--models-dir", str(tmp_path)]) == 5
    assert "error:" in capsys.readouterr().err


# Several kinds beside each other, and the one that is made of two others.


class Shelf:
    """Versions of three kinds of one symbol, written as links and loaded as plain bundles."""

    def __init__(self, models_dir: Path) -> None:
        self.folder, self.members = models_dir / "AAPL", {"gbm": "g1", "lstm": "l1"}
        self.broken: set[str] = set()
        formats = tuple(replaced(form, load_linked=self.load) for form in FORMATS)
        self.registry = ModelRegistry(models_dir, formats)

    def put(self, name: str, version: str) -> None:
        versions = "versions" if name == "gbm" else f"{name}_versions"
        (self.folder / versions / version).mkdir(parents=True, exist_ok=True)
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).symlink_to(f"{versions}/{version}")

    def load(self, linked: Linked) -> GBMBundle | EnsembleBundle:
        version, name = linked.folder.name, {"l": "lstm", "e": "ensemble"}.get(linked.folder.name[0], "gbm")
        if version in self.broken:
            raise ModelCorruptError(f"bundle {version} is damaged")
        metadata = {
            **metadata_of("AAPL", version),
            "model_id": f"AAPL-{name}",
            "parts": {"notes": ["joined"]},
        }
        if name != "ensemble":
            models = SimpleNamespace(models={name: None})
            return replace(bundle_of("AAPL", version), ensemble=models, metadata=metadata)  # type: ignore[arg-type]
        record = pd.DataFrame({"date": pd.bdate_range("2020-01-01", periods=3), "realised_log": 0.01})
        return EnsembleBundle(
            symbol="AAPL",
            horizon_bars=5,
            method="simple",
            members=self.members,
            weights=SimpleEnsemble(),
            record=record,
            metadata=metadata,
        )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    found = Shelf(tmp_path / "models")
    for name, version in (("gbm", "g1"), ("lstm", "l1"), ("ensemble", "e1")):
        found.put(name, version)
    return found


@pytest.mark.parametrize(
    ("kind", "model_id", "version"),
    [
        ("gbm", "AAPL-gbm", "g1"),
        ("lstm", "AAPL-lstm", "l1"),
        ("ensemble", "AAPL-ensemble", "e1+gbm:g1+lstm:l1"),
    ],
)
def test_each_kind_is_served_as_itself(shelf: Shelf, kind: str, model_id: str, version: str) -> None:
    served = shelf.registry.get("AAPL", kind)
    assert (served.meta.id, served.bundle.model_version) == (model_id, version)
    assert served.meta.fusion_mode_default == {"gbm": "gbm_only", "lstm": "lstm_only"}.get(kind, kind)
    assert shelf.registry.get("AAPL", kind) is served
    assert shelf.registry.current("AAPL", kind) is served
    assert served.warnings == (("joined",) if kind == "ensemble" else ())


def test_an_ensemble_is_joined_from_the_versions_that_serve(shelf: Shelf) -> None:
    served = shelf.registry.get("AAPL", "ensemble")
    assert isinstance(served.forecaster, EnsembleForecaster)
    members = {name: shelf.registry.get("AAPL", name).bundle for name in ("gbm", "lstm")}
    assert {name: one.bundle for name, one in served.forecaster.members.items()} == members
    assert shelf.registry.loaded_count() == 3


@pytest.mark.parametrize("changed", ["gbm", "lstm", "ensemble"])
def test_when_any_part_changes_nothing_older_is_called_current(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr("service.model_registry.LOOK_EVERY_S", 0.0)
    before = shelf.registry.get("AAPL", "ensemble")
    version = f"{changed[0]}2"
    if changed != "ensemble":
        shelf.members = {**shelf.members, changed: version}
    shelf.put(changed, version)
    assert shelf.registry.current("AAPL", "ensemble") is None
    after = shelf.registry.get("AAPL", "ensemble")
    assert after.made_from != before.made_from
    if changed == "ensemble":
        assert after.bundle.model_version == "e2+gbm:g1+lstm:l1"
        return
    # The ensemble itself is still the one that was judged with the older member: no mixture serves.
    assert after.meta.id == "AAPL-gbm"
    assert f"judged with another version of {changed}" in after.warnings[-1]
    shelf.put("ensemble", "e2")
    assert version in shelf.registry.get("AAPL", "ensemble").bundle.model_version


@pytest.mark.parametrize("lost", ["lstm", "ensemble"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_without_a_part_the_boosters_answer_and_say_why(shelf: Shelf, lost: str, how: str) -> None:
    if how == "missing":
        (shelf.folder / lost).unlink()
        shutil.rmtree(shelf.folder / f"{lost}_versions")
    else:
        shelf.broken.add(f"{lost[0]}1")
    served = shelf.registry.get("AAPL", "ensemble")
    assert (served.meta.id, served.bundle.model_version) == ("AAPL-gbm", "g1")
    (note,) = served.warnings
    assert note.endswith("the boosters forecast alone")
    assert (f"python -m training.train_{lost} AAPL" if how == "missing" else "is damaged") in note
    # What is damaged is tried again, what is missing is looked for.
    assert (shelf.registry.current("AAPL", "ensemble") is served) == (how == "missing")
    shelf.broken.clear()
    shelf.put(lost, f"{lost[0]}1")
    assert shelf.registry.get("AAPL", "ensemble").warnings == ("joined",)


def test_a_deleted_member_comes_back_into_its_ensemble(shelf: Shelf) -> None:
    assert shelf.registry.get("AAPL", "ensemble").meta.id == "AAPL-ensemble"
    shelf.registry.delete("AAPL-lstm")
    assert shelf.registry.get("AAPL", "ensemble").meta.id == "AAPL-gbm"
    with pytest.raises(ModelMissingError, match=r"training\.train_lstm AAPL"):
        shelf.registry.get("AAPL", "lstm")


def test_without_boosters_there_is_no_ensemble(shelf: Shelf) -> None:
    shelf.registry.delete("AAPL-gbm")
    with pytest.raises(ModelMissingError, match=r"training\.train_gbm AAPL"):
        shelf.registry.get("AAPL", "ensemble")
    assert shelf.registry.get("AAPL", "lstm").meta.id == "AAPL-lstm"
