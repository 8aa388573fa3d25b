"""The one owner of the booster bundle's format: save it, load it, roll it back.

``saved_models/<SYMBOL>/gbm`` is a link to ``saved_models/<SYMBOL>/versions/<version>``. A version is written
aside, flushed to disk, loaded once by a fresh process, and only then does the link move, in one atomic step.
Whoever reads resolves the link first, so all files of an answer come from one version.

Nothing is unpickled before its sha256 agrees with the manifest, and nothing is served before the golden
inputs give the golden outputs.
"""

import argparse
import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from inference.ensemble import MODEL_NAMES, BoosterEnsemble, Calibration, FloatMatrix
from utils.errors import (
    AIStocksError,
    ModelCorruptError,
    ModelIncompatibleError,
    ModelMissingError,
    StorageError,
)
from utils.model_paths import current_version, gbm_link, list_versions, versions_dir

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
KEEP_VERSIONS = 5
GOLDEN_ROWS = 8
GOLDEN_TOLERANCE = 1e-5
LIBRARIES = ("xgboost", "lightgbm", "scikit-learn", "numpy", "pandas", "ta-lib")
_DOCUMENTS = "feature_columns.json feature_importance.json hyperparameters.json training_metadata.json"
REQUIRED_FILES = (
    f"xgb_model.joblib lgb_model.joblib scaler.joblib oos_predictions.parquet {_DOCUMENTS}".split()
)
RECORD_COLUMNS = (
    "date",
    "predicted_log",
    "baseline_log",
    "raw_scaled",
    "realised_log",
    "sigma_log",
    "skill_lower",
    "fold",
    "trained_through",
)


class Manifest(BaseModel):
    """What a saved version promises about itself; untrusted until validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int
    model_version: str
    files: dict[str, str]
    libraries: dict[str, str]
    data_hash: str
    golden_inputs: list[list[float]]
    golden_outputs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class GBMBundle:
    """A trained model with the out-of-sample record that vouches for it.

    Attributes
    ----------
    symbol
        The symbol it was trained for.
    horizon_bars
        Number of bars that a forecast looks ahead.
    ensemble
        The final fit on all rows.
    record
        Walk-forward predictions: `RECORD_COLUMNS` and one ``model_<name>`` column per booster.
    metadata
        Content of ``training_metadata.json``.
    importance
        Mean absolute SHAP value by feature, normalised.
    hyperparameters
        Tuned parameters and rounds by booster.
    path
        Folder that it was loaded from; None before it is saved.
    warnings
        What was amiss while loading and did not prevent it.
    """

    symbol: str
    horizon_bars: int
    ensemble: BoosterEnsemble
    record: pd.DataFrame
    metadata: Mapping[str, Any]
    importance: Mapping[str, float]
    hyperparameters: Mapping[str, object]
    path: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def model_version(self) -> str:
        """Identifier of the saved version."""
        return str(self.metadata["model_version"])


def new_version_id(created_at: datetime) -> str:
    """Return an identifier that sorts by time and never collides."""
    return f"{created_at:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror)
        raise StorageError(
            f"cannot write the bundle of {target.name}: {reason}; the earlier one is untouched"
        ) from error


def save_bundle(bundle: GBMBundle, models_dir: Path, *, golden_inputs: FloatMatrix) -> Path:
    """Write a bundle aside, verify it in a fresh process, and let it serve.

    Parameters
    ----------
    bundle
        The bundle; its metadata names the version.
    models_dir
        Root of the saved models.
    golden_inputs
        A few unscaled feature rows, (k, p); their forecasts are stored and compared at every load.

    Returns
    -------
    Path
        Folder of the new version.

    Raises
    ------
    StorageError
        If the disk is full or not writable; what served before still serves.
    ModelCorruptError
        If a fresh process cannot load what was written.
    """
    versions = versions_dir(models_dir, bundle.symbol)
    aside = versions / f".aside-{bundle.model_version}"
    final = versions / bundle.model_version
    with _storage_errors(versions.parent):
        try:
            aside.mkdir(parents=True)
            _write_files(bundle, aside, golden_inputs[:GOLDEN_ROWS])
            verify_in_fresh_process(aside)
            aside.rename(final)
            _flush(versions)
            _point_link(gbm_link(models_dir, bundle.symbol), final)
            _prune(versions, keep=final.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return final


def _write_files(bundle: GBMBundle, folder: Path, golden_inputs: FloatMatrix) -> None:
    ensemble = bundle.ensemble
    for name, model in ensemble.models.items():
        joblib.dump(model, folder / f"{name}_model.joblib")
    joblib.dump(ensemble.scaler, folder / "scaler.joblib")
    bundle.record.to_parquet(folder / "oos_predictions.parquet", write_page_checksum=True)
    documents = {
        "feature_columns.json": {"columns": ensemble.columns, "selected": ensemble.selected_features},
        "feature_importance.json": bundle.importance,
        "hyperparameters.json": {
            "boosters": bundle.hyperparameters,
            "weights": ensemble.weights,
            "calibration": asdict(ensemble.calibration),
        },
        "training_metadata.json": bundle.metadata,
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1, allow_nan=False))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_version=bundle.model_version,
        files={path.name: _sha256(path) for path in sorted(folder.iterdir())},
        libraries=library_versions(),
        data_hash=str(bundle.metadata["data_hash"]),
        golden_inputs=[[float(value) for value in row] for row in golden_inputs],
        golden_outputs=golden_outputs(ensemble, golden_inputs).tolist(),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    for path in folder.iterdir():
        _flush(path)
    _flush(folder)


def golden_outputs(
    ensemble: BoosterEnsemble, inputs: FloatMatrix
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return raw forecasts of the golden rows, in units of volatility, (k,)."""
    return ensemble.combine(ensemble.per_model(inputs))


def library_versions() -> dict[str, str]:
    """Return the installed versions of what a bundle depends on."""
    return {name: package_metadata.version(name) for name in LIBRARIES}


def verify_in_fresh_process(folder: Path) -> None:
    """Load ``folder`` in a new interpreter, so that nothing of this one is needed to use it."""
    command = [sys.executable, "-m", "inference.load_gbm_models", str(folder)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelCorruptError(f"the new bundle does not load in a fresh process: {last_line}")


def load_bundle(models_dir: Path, symbol: str) -> GBMBundle:
    """Load the bundle that serves; an earlier version where it is damaged.

    Raises
    ------
    ModelMissingError
        If the symbol was never trained.
    ModelCorruptError, ModelIncompatibleError
        If no version can be used.
    """
    current = current_version(models_dir, symbol)
    try:
        return load_folder(current)
    except ModelCorruptError as error:
        for version in reversed(list_versions(models_dir, symbol)):
            if version.name >= current.name:
                continue
            try:
                earlier = load_folder(version)
            except ModelCorruptError:
                continue
            message = f"{error}; the earlier version {version.name} serves instead"
            logger.warning(message)
            return replace(earlier, warnings=(message,))
        raise


def load_folder(folder: Path) -> GBMBundle:
    """Check one version's files against its manifest, which must vouch for all of them, then load them."""
    manifest = read_manifest(folder)
    for name in sorted({*REQUIRED_FILES, *manifest.files}):
        _check_file(folder, name, manifest.files.get(name, ""))
    metadata = _read_json(folder / "training_metadata.json")
    columns = _read_json(folder / "feature_columns.json")
    fitted = _read_json(folder / "hyperparameters.json")
    ensemble = BoosterEnsemble(
        columns=tuple(columns["columns"]),
        selected=tuple(columns["columns"].index(name) for name in columns["selected"]),
        scaler=joblib.load(folder / "scaler.joblib"),
        models={name: joblib.load(folder / f"{name}_model.joblib") for name in MODEL_NAMES},
        weights=fitted["weights"],
        calibration=Calibration(**fitted["calibration"]),
    )
    _check_golden(ensemble, manifest)
    return GBMBundle(
        symbol=str(metadata["symbol"]),
        horizon_bars=int(metadata["horizon_bars"]),
        ensemble=ensemble,
        record=pd.read_parquet(folder / "oos_predictions.parquet"),
        metadata=metadata,
        importance=_read_json(folder / "feature_importance.json"),
        hyperparameters=fitted["boosters"],
        path=folder,
    )


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a manifest; unpickles nothing."""
    try:
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelCorruptError(f"bundle {folder.name}: its manifest cannot be read: train again") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ModelIncompatibleError(
            f"bundle {folder.name} has schema {manifest.schema_version}, "
            f"this program reads {SCHEMA_VERSION}: train again"
        )
    return manifest


def _check_file(folder: Path, name: str, expected_sha256: str) -> None:
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise ModelCorruptError(
            f"bundle {folder.name}: {name!r} is not a plain file of the bundle: train again"
        )
    if _sha256(path) != expected_sha256:
        raise ModelCorruptError(f"bundle {folder.name}: {name} is not the file that was saved: train again")


def _check_golden(ensemble: BoosterEnsemble, manifest: Manifest) -> None:
    inputs = np.asarray(manifest.golden_inputs, dtype=np.float32)
    error = float(np.max(np.abs(golden_outputs(ensemble, inputs) - manifest.golden_outputs), initial=0.0))
    if not error <= GOLDEN_TOLERANCE:
        here = library_versions()
        then = manifest.libraries
        changed = [
            f"{name} {then[name]} -> {here.get(name)}" for name in then if here.get(name) != then[name]
        ]
        raise ModelIncompatibleError(
            f"bundle {manifest.model_version} forecasts differently here (by {error:.2g}; changed: "
            f"{', '.join(changed) or 'no library'}): train again with --overwrite"
        )


def read_metadata(models_dir: Path, symbol: str) -> dict[str, Any]:
    """Read ``training_metadata.json`` of the serving version, checked by its hash; unpickles nothing."""
    folder = current_version(models_dir, symbol)
    manifest = read_manifest(folder)
    _check_file(folder, "training_metadata.json", manifest.files.get("training_metadata.json", ""))
    return _read_json(folder / "training_metadata.json")


def rollback(models_dir: Path, symbol: str) -> Path:
    """Let the version before the current one serve again.

    Raises
    ------
    ModelMissingError
        If there is no earlier version that loads.
    """
    current = current_version(models_dir, symbol)
    earlier = [path for path in list_versions(models_dir, symbol) if path.name < current.name]
    if not earlier:
        raise ModelMissingError(f"{symbol} has no version before {current.name}")
    load_folder(earlier[-1])
    with _storage_errors(current.parent):
        _point_link(gbm_link(models_dir, symbol), earlier[-1])
    return earlier[-1]


def _point_link(link: Path, target: Path) -> None:
    fresh = link.with_name(f".{link.name}-{uuid.uuid4().hex[:8]}")
    fresh.symlink_to(Path("versions") / target.name)
    fresh.replace(link)
    _flush(link.parent)


def _prune(versions: Path, keep: str) -> None:
    kept = [path for path in sorted(versions.iterdir()) if not path.name.startswith(".")]
    for path in kept[:-KEEP_VERSIONS]:
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def main(argv: list[str] | None = None) -> int:
    """Verify one saved version: exit 0 when it loads, 5 when not."""
    parser = argparse.ArgumentParser(prog="python -m inference.load_gbm_models")
    parser.add_argument("folder", type=Path)
    try:
        load_folder(parser.parse_args(argv).folder)
    except AIStocksError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
