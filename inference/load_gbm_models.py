"""The one owner of the booster bundle's format; `inference.artifact` keeps its folder whole.

Nothing is unpickled before its sha256 agrees with the sealed manifest, and nothing is served before the
features are those that are computed here and the golden inputs give the golden outputs.
"""

import io
import json
import math
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import joblib
import numpy as np
import pandas as pd
from lightgbm.basic import LightGBMError
from pydantic import BaseModel, Field, model_validator
from sklearn.preprocessing import RobustScaler

from data.feature_engineer import feature_set_hash, get_feature_columns
from inference import artifact
from inference.artifact import Version, corrupt, unusable
from inference.ensemble import Booster, BoosterEnsemble, Calibration, FloatArray, FloatMatrix
from utils.errors import ModelIncompatibleError
from utils.model_paths import GBM, Linked, linked_version, roll_back, serve, serve_linked

SCHEMA_VERSION = 2
BOOSTER_LIBRARY = {"xgb": "xgboost", "lgb": "lightgbm", "cat": "catboost"}
SCALER, RECORD = "scaler.joblib", "oos_predictions.parquet"
COLUMNS, IMPORTANCE = "feature_columns.json", "feature_importance.json"
HYPERPARAMETERS, METADATA = "hyperparameters.json", "training_metadata.json"
SHARED_FILES = (SCALER, RECORD, COLUMNS, IMPORTANCE, HYPERPARAMETERS, METADATA)
_NUMBERS = "predicted_log baseline_log raw_scaled realised_log sigma_log skill_lower"
RECORD_COLUMNS = ("date", *_NUMBERS.split(), "fold", "trained_through")
GOLDEN_ROWS = 8
GOLDEN_TOLERANCE = 1e-5
LIBRARIES = ("xgboost", "lightgbm", "scikit-learn", "numpy", "pandas", "ta-lib")


def new_version_id(created_at: datetime) -> str:
    """Return an identifier that sorts by time and never collides."""
    return f"{created_at:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"


def model_file(name: str) -> str:
    """Return the name of a booster's file."""
    return f"{name}_model.joblib"


class GBMManifest(artifact.Manifest):
    """What a saved bundle promises about itself.

    Attributes
    ----------
    models
        Names of its boosters; there is one ``<name>_model.joblib`` for each, and no other is loaded.
    libraries, data_hash
        Versions that made it, and the hash of the bars that it was trained on.
    golden_inputs, golden_outputs
        Unscaled feature rows (k, p) and what the boosters said to them, in units of volatility (k,).
    """

    SCHEMA: ClassVar[int] = SCHEMA_VERSION

    models: tuple[Literal["xgb", "lgb", "cat"], ...] = Field(min_length=1)
    libraries: dict[str, str]
    data_hash: str
    golden_inputs: list[list[float]] = Field(min_length=1)
    golden_outputs: list[float]

    @model_validator(mode="after")
    def _fits_together(self) -> "GBMManifest":
        if len(set(self.models)) < len(self.models):
            raise ValueError("a booster is listed twice")
        if absent := {*SHARED_FILES, *map(model_file, self.models)} - set(self.files):
            raise ValueError(f"{', '.join(sorted(absent))} is not listed")
        if len({len(row) for row in self.golden_inputs}) != 1 or not self.golden_inputs[0]:
            raise ValueError("the golden inputs are not a table")
        if len(self.golden_outputs) != len(self.golden_inputs):
            raise ValueError("there is not one golden output for each golden input")
        return self


class Fitted(BaseModel):
    """Content of ``hyperparameters.json``."""

    boosters: dict[str, Any]
    weights: dict[str, float]
    calibration: Calibration

    @model_validator(mode="after")
    def _is_finite(self) -> "Fitted":
        if not all(map(math.isfinite, [*self.weights.values(), *asdict(self.calibration).values()])):
            raise ValueError("a weight or the calibration is not finite")
        return self


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
    StorageError, LockedError
        See `inference.artifact.publish`; what served before still serves.
    ModelCorruptError
        If a fresh process cannot load what was written.
    """
    contents = _contents(bundle)
    models = tuple(bundle.ensemble.models)
    rows = golden_inputs[:GOLDEN_ROWS]
    manifest = GBMManifest(
        schema_version=SCHEMA_VERSION,
        kind=GBM.name,
        symbol=bundle.symbol,
        model_version=bundle.model_version,
        files=artifact.sha256_of(contents),
        models=cast("Any", models),
        libraries=library_versions([*LIBRARIES, *(["catboost"] if "cat" in models else [])]),
        data_hash=str(bundle.metadata["data_hash"]),
        golden_inputs=[[float(value) for value in row] for row in rows],
        golden_outputs=golden_outputs(bundle.ensemble, rows).tolist(),
    )
    return artifact.publish(
        models_dir, GBM, manifest=manifest, contents=contents, verify=verify_in_fresh_process
    )


def _contents(bundle: GBMBundle) -> dict[str, bytes]:
    ensemble = bundle.ensemble
    pickled = {model_file(name): model for name, model in ensemble.models.items()} | {SCALER: ensemble.scaler}
    documents = {
        COLUMNS: {"columns": ensemble.columns, "selected": ensemble.selected_features},
        IMPORTANCE: bundle.importance,
        HYPERPARAMETERS: {
            "boosters": bundle.hyperparameters,
            "weights": ensemble.weights,
            "calibration": asdict(ensemble.calibration),
        },
        METADATA: bundle.metadata,
    }
    contents = {}
    for name, content in pickled.items():
        joblib.dump(content, buffer := io.BytesIO())
        contents[name] = buffer.getvalue()
    bundle.record.to_parquet(buffer := io.BytesIO(), write_page_checksum=True)
    contents[RECORD] = buffer.getvalue()
    for name, document in documents.items():
        contents[name] = json.dumps(document, indent=1, allow_nan=False).encode()
    return contents


def golden_outputs(ensemble: BoosterEnsemble, inputs: FloatMatrix) -> FloatArray:
    """Return raw forecasts of the golden rows, in units of volatility, (k,)."""
    return ensemble.combine(ensemble.per_model(inputs))


def library_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the installed versions of what a bundle depends on."""
    return {name: package_metadata.version(name) for name in names}


def verify_in_fresh_process(folder: Path) -> None:
    """Load ``folder`` in a new interpreter."""
    artifact.verify_in_fresh_process(folder, "inference.load_gbm_models")


def load_bundle(models_dir: Path, symbol: str) -> GBMBundle:
    """Load the bundle that serves; an earlier version where it is damaged.

    Raises
    ------
    ModelMissingError
        If the symbol was never trained.
    ModelCorruptError, ModelIncompatibleError
        If no version can be used.
    """
    bundle, warnings = serve(models_dir, symbol, GBM, load_folder)
    return replace(bundle, warnings=warnings)


def load_linked(linked: Linked) -> GBMBundle:
    """Load what a link names, see `load_bundle`; the link is not read again."""
    bundle, warnings = serve_linked(linked, load_folder)
    return replace(bundle, warnings=warnings)


def describe_linked(linked: Linked) -> artifact.Description:
    """Describe the version that `load_linked` would load: its files are checked, none is unpickled."""

    def describe(folder: Path) -> artifact.Description:
        version = artifact.read_version(folder, GBM, GBMManifest)
        return artifact.Description(metadata=_checked_metadata(version), models=version.manifest.models)

    description, warnings = serve_linked(linked, describe)
    return replace(description, warnings=warnings)


def load_folder(folder: Path) -> GBMBundle:
    """Check one version's files against its manifest, which must vouch for all of them, then load them."""
    version = artifact.read_version(folder, GBM, GBMManifest)
    metadata = _checked_metadata(version)
    ensemble, fitted = _ensemble(version)
    _check_golden(ensemble, version)
    return GBMBundle(
        symbol=metadata["symbol"],
        horizon_bars=metadata["horizon_bars"],
        ensemble=ensemble,
        record=_record(version),
        metadata=metadata,
        importance=_document(version, IMPORTANCE),
        hyperparameters=fitted.boosters,
        path=folder,
    )


@cache
def expected_features() -> tuple[tuple[str, ...], str]:
    """Return the columns and the hash of the feature set that is computed here; constant in a process.

    Optional families are arguments to add here, to be read from the metadata by the caller.
    """
    return tuple(get_feature_columns()), feature_set_hash()


def _checked_metadata(version: Version[GBMManifest]) -> dict[str, Any]:
    """Return the metadata, once they agree with the manifest and with the features computed here."""
    folder, manifest = version.folder, version.manifest
    with unusable(folder, METADATA):
        metadata = _document(version, METADATA)
        promised = artifact.PromisedMetadata.model_validate(metadata)
    named = (promised.symbol, promised.model_version, promised.data_hash)
    if named != (manifest.symbol, manifest.model_version, manifest.data_hash):
        raise corrupt(folder, f"{METADATA} speaks of another version than the manifest")
    with unusable(folder, COLUMNS):
        columns = artifact.ColumnNames.model_validate_json(version.contents[COLUMNS]).columns
    known, expected_hash = expected_features()
    if missing := [name for name in columns if name not in known]:
        raise ModelIncompatibleError(
            f"the model of {promised.symbol} needs features that are not computed any more, "
            f"{', '.join(missing)}: train again with --overwrite"
        )
    if promised.feature_set_hash != expected_hash:
        raise ModelIncompatibleError(
            f"the features of {promised.symbol} are computed differently since bundle {folder.name} was "
            "trained: train again with --overwrite"
        )
    return metadata


def _ensemble(version: Version[GBMManifest]) -> tuple[BoosterEnsemble, Fitted]:
    folder, contents, models = version.folder, version.contents, version.manifest.models
    with unusable(folder, COLUMNS):
        names = artifact.ColumnNames.model_validate_json(contents[COLUMNS])
    with unusable(folder, HYPERPARAMETERS):
        fitted = Fitted.model_validate_json(contents[HYPERPARAMETERS])
        if set(fitted.weights) != set(models):
            raise corrupt(folder, f"{HYPERPARAMETERS} does not weigh {', '.join(models)}")
    with unusable(folder, SCALER):
        scaler = joblib.load(io.BytesIO(contents[SCALER]))
        if not isinstance(scaler, RobustScaler) or scaler.center_.shape != (len(names.columns),):
            raise corrupt(folder, f"{SCALER} does not scale the columns of {COLUMNS}")
    ensemble = BoosterEnsemble(
        columns=names.columns,
        selected=tuple(names.columns.index(name) for name in names.selected),
        scaler=scaler,
        models={name: _booster(version, name) for name in models},
        weights=fitted.weights,
        calibration=fitted.calibration,
    )
    return ensemble, fitted


def _booster(version: Version[GBMManifest], name: str) -> Booster:
    library = BOOSTER_LIBRARY[name]
    with unusable(version.folder, model_file(name), LightGBMError):
        try:
            model = joblib.load(io.BytesIO(version.contents[model_file(name)]))
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            raise ModelIncompatibleError(
                f"bundle {version.folder.name} needs {library}, which is not installed: "
                f"install {library}, or train again with --overwrite"
            ) from error
    if type(model).__module__.partition(".")[0] != library:
        raise corrupt(version.folder, f"{model_file(name)} holds no model of {library}")
    return cast("Booster", model)


def _record(version: Version[GBMManifest]) -> pd.DataFrame:
    with unusable(version.folder, RECORD):
        record = pd.read_parquet(io.BytesIO(version.contents[RECORD]))
        needed = {*RECORD_COLUMNS, *(f"model_{name}" for name in version.manifest.models)}
        if absent := sorted(needed - set(record.columns)):
            raise corrupt(version.folder, f"{RECORD} lacks {', '.join(absent)}")
        if record["date"].dtype.kind != "M" or not record["date"].is_unique:
            raise corrupt(version.folder, f"{RECORD} does not hold one row per session")
    return record


def _check_golden(ensemble: BoosterEnsemble, version: Version[GBMManifest]) -> None:
    manifest = version.manifest
    with unusable(version.folder, "what the boosters forecast", LightGBMError):
        inputs = np.asarray(manifest.golden_inputs, dtype=np.float32)
        outputs = golden_outputs(ensemble, inputs)
        error = float(np.max(np.abs(outputs - np.asarray(manifest.golden_outputs))))
    if error <= GOLDEN_TOLERANCE:
        return
    here, then = library_versions(), manifest.libraries
    changed = [f"{name} {then[name]} -> {here[name]}" for name in here if here[name] != then.get(name)]
    raise ModelIncompatibleError(
        f"bundle {manifest.model_version} forecasts differently here (by {error:.2g}; changed: "
        f"{', '.join(changed) or 'no library'}): train again with --overwrite"
    )


def _document(version: Version[GBMManifest], name: str) -> dict[str, Any]:
    with unusable(version.folder, name):
        return dict(json.loads(version.contents[name]))


def read_metadata(models_dir: Path, symbol: str) -> dict[str, Any]:
    """Read ``training_metadata.json`` of the version that serves; unpickles nothing."""
    return dict(describe_linked(linked_version(models_dir, symbol)).metadata)


def rollback(models_dir: Path, symbol: str) -> Path:
    """Let the newest version before the current one that loads serve again, see `roll_back`."""
    return roll_back(models_dir, symbol, GBM, load_folder)


def main(argv: list[str] | None = None) -> int:
    """Verify one saved version, see `inference.artifact.command_line`."""
    return artifact.command_line(argv, "inference.load_gbm_models", load_folder)


if __name__ == "__main__":
    sys.exit(main())
