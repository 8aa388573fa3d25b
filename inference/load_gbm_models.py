"""The one owner of the booster bundle's format; `inference.artifact` keeps its folder whole.

Nothing is unpickled before its sha256 agrees with the sealed manifest, and nothing is served before the
features are those that are computed here and the golden inputs give the golden outputs.
"""

import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import joblib
import numpy as np
import pandas as pd
from lightgbm.basic import LightGBMError
from pydantic import BaseModel, Field, model_validator
from sklearn.preprocessing import RobustScaler

from inference import artifact
from inference.artifact import (
    COLUMNS,
    GOLDEN_ROWS,
    HYPERPARAMETERS,
    METADATA,
    RECORD,
    Version,
    checked_metadata,
    corrupt,
    document,
    read_record,
    unusable,
)
from inference.ensemble import Booster, BoosterEnsemble, Calibration, FloatArray, FloatMatrix, IntArray
from inference.pipeline import Bundle
from utils.errors import ModelIncompatibleError
from utils.model_paths import GBM, ArtifactKind, Linked, linked_version, roll_back, serve, serve_linked

SCHEMA_VERSION = 2
BOOSTER_LIBRARY = {"xgb": "xgboost", "lgb": "lightgbm", "cat": "catboost"}
SCALER, IMPORTANCE = "scaler", "feature_importance.json"
SHARED_FILES = (RECORD, COLUMNS, IMPORTANCE, HYPERPARAMETERS, METADATA)
LIBRARIES = ("xgboost", "lightgbm", "scikit-learn", "numpy", "pandas", "ta-lib")


def model_file(name: str, path_horizon: int | None = None) -> str:
    """Return the name of the file of a booster, or of the scaler; a path model's ends in its horizon."""
    stem = name if name == SCALER else f"{name}_model"
    return f"{stem}.joblib" if path_horizon is None else f"{stem}_h{path_horizon}.joblib"


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
    path_golden_outputs
        The same of each path model, by its horizon in bars; its boosters have the names in ``models``.
    """

    SCHEMA: ClassVar[int] = SCHEMA_VERSION

    models: tuple[Literal["xgb", "lgb", "cat"], ...] = Field(min_length=1)
    libraries: dict[str, str]
    data_hash: str
    golden_inputs: list[list[float]] = Field(min_length=1)
    golden_outputs: list[float]
    path_golden_outputs: dict[Annotated[int, Field(ge=1)], list[float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> "GBMManifest":
        if len(set(self.models)) < len(self.models):
            raise ValueError("a booster is listed twice")
        ensembles = (None, *self.path_golden_outputs)
        pickled = {model_file(name, bars) for bars in ensembles for name in (SCALER, *self.models)}
        if absent := {*SHARED_FILES, *pickled} - set(self.files):
            raise ValueError(f"{', '.join(sorted(absent))} is not listed")
        if len({len(row) for row in self.golden_inputs}) != 1 or not self.golden_inputs[0]:
            raise ValueError("the golden inputs are not a table")
        outputs = (self.golden_outputs, *self.path_golden_outputs.values())
        if any(len(each) != len(self.golden_inputs) for each in outputs):
            raise ValueError("there is not one golden output for each golden input")
        return self


class Fitted(BaseModel):
    """What ``hyperparameters.json`` tells of one ensemble."""

    boosters: dict[str, Any]
    weights: dict[str, float]
    calibration: Calibration

    @model_validator(mode="after")
    def _is_finite(self) -> "Fitted":
        if not all(map(math.isfinite, [*self.weights.values(), *asdict(self.calibration).values()])):
            raise ValueError("a weight or the calibration is not finite")
        return self


class FittedDocument(Fitted):
    """Content of ``hyperparameters.json``: the model's own, and that of each path model by its horizon."""

    path_models: dict[int, Fitted] = Field(default_factory=dict)


class ColumnsDocument(artifact.ColumnNames):
    """Content of ``feature_columns.json``: of the same columns, each path model has its own selection."""

    path_models: dict[int, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)

    def of(self, path_horizon: int | None) -> artifact.ColumnNames:
        """Return the columns and the selection of one ensemble."""
        selected = self.selected if path_horizon is None else self.path_models[path_horizon]
        return artifact.ColumnNames(columns=self.columns, selected=selected)


@dataclass(frozen=True, slots=True, kw_only=True)
class PathModel:
    """A model for another horizon, through whose forecast the path passes; it decides nothing.

    Its out-of-sample figures are in the bundle's metadata, as ``path_models``, by horizon.

    Attributes
    ----------
    horizon_bars
        Number of bars that its forecast looks ahead.
    ensemble
        The final fit on all rows, with its own calibration and the bundle's ``columns``.
    hyperparameters
        Tuned parameters and rounds by booster.
    """

    horizon_bars: int
    ensemble: BoosterEnsemble
    hyperparameters: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GBMBundle(Bundle):
    """Boosters with the out-of-sample record that vouches for them.

    Attributes
    ----------
    ensemble
        The final fit on all rows.
    path_models
        Models of further horizons, for the forecast path alone; ascending.

    Notes
    -----
    Importance is the mean absolute SHAP value; hyperparameters are tuned parameters and rounds by booster.
    """

    KIND: ClassVar[ArtifactKind] = GBM

    ensemble: BoosterEnsemble
    path_models: tuple[PathModel, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the boosters."""
        return tuple(self.ensemble.models)

    @property
    def path_horizons(self) -> tuple[int, ...]:
        """Horizons of the path models, ascending."""
        return tuple(path.horizon_bars for path in self.path_models)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features that `signal` takes, in its order."""
        return self.ensemble.columns

    @property
    def calibration(self) -> Calibration:
        """How far the final fit's signal may be believed."""
        return self.ensemble.calibration

    def signal(self, features: FloatMatrix, rows: IntArray) -> tuple[dict[str, FloatArray], FloatArray]:
        """Return what the boosters, and all together, say at the given rows, see `Bundle.signal`."""
        per_model = self.ensemble.per_model(features[rows])
        return per_model, self.ensemble.combine(per_model)

    def contributions(self, features: FloatMatrix) -> pd.DataFrame:
        """Return the boosters' SHAP values, see `Bundle.contributions`."""
        names = list(self.ensemble.selected_features)
        return pd.DataFrame(self.ensemble.contributions(features), columns=names)

    def further(self, features: FloatMatrix, rows: IntArray) -> Mapping[int, tuple[Calibration, FloatArray]]:
        """Return calibration and signal of each path model, see `Bundle.further`."""
        return {
            path.horizon_bars: (
                path.ensemble.calibration,
                path.ensemble.combine(path.ensemble.per_model(features[rows])),
            )
            for path in self.path_models
        }


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
        libraries=versions_of(models),
        data_hash=str(bundle.metadata["data_hash"]),
        golden_inputs=[[float(value) for value in row] for row in rows],
        golden_outputs=golden_outputs(bundle.ensemble, rows).tolist(),
        path_golden_outputs={
            path.horizon_bars: golden_outputs(path.ensemble, rows).tolist() for path in bundle.path_models
        },
    )
    return artifact.publish(
        models_dir, GBM, manifest=manifest, contents=contents, verify=verify_in_fresh_process
    )


def versions_of(models: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of what boosters with these names depend on."""
    return artifact.library_versions([*LIBRARIES, *(["catboost"] if "cat" in models else [])])


def _contents(bundle: GBMBundle) -> dict[str, bytes]:
    ensemble, paths = bundle.ensemble, bundle.path_models
    pickled: dict[str, Any] = {}
    for bars, each in ((None, ensemble), *((path.horizon_bars, path.ensemble) for path in paths)):
        parts = {SCALER: each.scaler, **each.models}
        pickled |= {model_file(name, bars): part for name, part in parts.items()}
    selections = {path.horizon_bars: path.ensemble.selected_features for path in paths}
    fits = {path.horizon_bars: _fitted_document(path.ensemble, path.hyperparameters) for path in paths}
    documents = {
        COLUMNS: {
            "columns": ensemble.columns,
            "selected": ensemble.selected_features,
            "path_models": selections,
        },
        IMPORTANCE: bundle.importance,
        HYPERPARAMETERS: {**_fitted_document(ensemble, bundle.hyperparameters), "path_models": fits},
        METADATA: bundle.metadata,
    }
    contents = {}
    for name, content in pickled.items():
        joblib.dump(content, buffer := io.BytesIO())
        contents[name] = buffer.getvalue()
    contents[RECORD] = artifact.record_bytes(bundle.record)
    for name, content in documents.items():
        contents[name] = json.dumps(content, indent=1, allow_nan=False).encode()
    return contents


def _fitted_document(ensemble: BoosterEnsemble, boosters: Mapping[str, object]) -> dict[str, object]:
    return {
        "boosters": boosters,
        "weights": ensemble.weights,
        "calibration": asdict(ensemble.calibration),
    }


def golden_outputs(ensemble: BoosterEnsemble, inputs: FloatMatrix) -> FloatArray:
    """Return raw forecasts of the golden rows, in units of volatility, (k,)."""
    return ensemble.combine(ensemble.per_model(inputs))


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
    """Describe the version that `load_linked` would load, see `artifact.describe`."""

    def tell(version: Version[GBMManifest]) -> artifact.Description:
        return artifact.Description(metadata=checked_metadata(version), models=version.manifest.models)

    return artifact.describe(linked, GBM, GBMManifest, tell)


def load_folder(folder: Path) -> GBMBundle:
    """Check one version's files against its manifest, which must vouch for all of them, then load them."""
    version = artifact.read_version(folder, GBM, GBMManifest)
    metadata = checked_metadata(version)
    names, fitted = _documents(version)
    ensemble = _ensemble(version, names, fitted)
    _check_golden(ensemble, version, version.manifest.golden_outputs)
    return GBMBundle(
        symbol=metadata["symbol"],
        horizon_bars=metadata["horizon_bars"],
        ensemble=ensemble,
        record=read_record(version, version.manifest.models),
        metadata=metadata,
        importance=document(version, IMPORTANCE),
        hyperparameters=fitted.boosters,
        path_models=tuple(_path_model(version, names, fitted, bars) for bars in sorted(fitted.path_models)),
        path=folder,
    )


def _documents(version: Version[GBMManifest]) -> tuple[ColumnsDocument, FittedDocument]:
    """Return what the documents tell of every ensemble; manifest and documents know the same path models."""
    folder, contents, manifest = version.folder, version.contents, version.manifest
    with unusable(folder, COLUMNS):
        names = ColumnsDocument.model_validate_json(contents[COLUMNS])
    with unusable(folder, HYPERPARAMETERS):
        fitted = FittedDocument.model_validate_json(contents[HYPERPARAMETERS])
    for name, told in ((COLUMNS, names), (HYPERPARAMETERS, fitted)):
        if set(told.path_models) != set(manifest.path_golden_outputs):
            raise corrupt(folder, f"{name} tells of other horizons than the manifest")
    return names, fitted


def _path_model(
    version: Version[GBMManifest], names: ColumnsDocument, fitted: FittedDocument, bars: int
) -> PathModel:
    own = fitted.path_models[bars]
    ensemble = _ensemble(version, names, own, bars)
    _check_golden(ensemble, version, version.manifest.path_golden_outputs[bars])
    return PathModel(horizon_bars=bars, ensemble=ensemble, hyperparameters=own.boosters)


def _ensemble(
    version: Version[GBMManifest], document: ColumnsDocument, fitted: Fitted, bars: int | None = None
) -> BoosterEnsemble:
    """Return the model's ensemble, or that of the path model with a horizon of ``bars``."""
    folder, models, pickled = version.folder, version.manifest.models, model_file(SCALER, bars)
    with unusable(folder, COLUMNS):
        names = document.of(bars)
    if set(fitted.weights) != set(models):
        raise corrupt(folder, f"{HYPERPARAMETERS} does not weigh {', '.join(models)}")
    with unusable(folder, pickled):
        scaler = joblib.load(io.BytesIO(version.contents[pickled]))
        if not isinstance(scaler, RobustScaler) or scaler.center_.shape != (len(names.columns),):
            raise corrupt(folder, f"{pickled} does not scale the columns of {COLUMNS}")
    return BoosterEnsemble(
        columns=names.columns,
        selected=tuple(names.columns.index(name) for name in names.selected),
        scaler=scaler,
        models={name: _booster(version, name, model_file(name, bars)) for name in models},
        weights=fitted.weights,
        calibration=fitted.calibration,
    )


def _booster(version: Version[GBMManifest], name: str, pickled: str) -> Booster:
    library = BOOSTER_LIBRARY[name]
    with unusable(version.folder, pickled, LightGBMError):
        try:
            model = joblib.load(io.BytesIO(version.contents[pickled]))
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            raise ModelIncompatibleError(
                f"bundle {version.folder.name} needs {library}, which is not installed: "
                f"install {library}, or train again with --overwrite"
            ) from error
    if type(model).__module__.partition(".")[0] != library:
        raise corrupt(version.folder, f"{pickled} holds no model of {library}")
    return cast("Booster", model)


def _check_golden(
    ensemble: BoosterEnsemble, version: Version[GBMManifest], expected: Sequence[float]
) -> None:
    manifest = version.manifest
    with unusable(version.folder, "what the boosters forecast", LightGBMError):
        inputs = np.asarray(manifest.golden_inputs, dtype=np.float32)
        outputs = golden_outputs(ensemble, inputs)
        error = float(np.max(np.abs(outputs - np.asarray(expected))))
    artifact.refuse_skew(error, manifest.model_version, manifest.libraries, LIBRARIES)


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
