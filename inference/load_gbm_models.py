"""The boosters of a fold or of a symbol, and the one owner of their saved form.

A `BoosterEnsemble` holds everything that a fold fits. The trainer makes one per fold and one for the bundle,
so what is validated is what is served. Nothing is unpickled before its sha256 agrees with the sealed
manifest, and nothing is served before the golden inputs give the golden outputs: see `inference.artifact`.
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import joblib
import lightgbm
import numpy as np
import pandas as pd
import xgboost
from lightgbm.basic import LightGBMError
from pydantic import BaseModel, Field, RootModel, model_validator
from sklearn.preprocessing import RobustScaler

from inference import artifact
from inference.artifact import COLUMNS, HYPERPARAMETERS, METADATA, RECORD, RECORD_COLUMNS, Version
from inference.intervals import Calibration, FloatArray, FloatMatrix, IntArray
from inference.pipeline import Bundle, check_golden, read_record
from utils.base import ModelIncompatibleError
from utils.model_paths import GBM

SCHEMA_VERSION = 2
BOOSTER_LIBRARY = {"xgb": "xgboost", "lgb": "lightgbm", "cat": "catboost"}
SCALER, IMPORTANCE = "scaler", "feature_importance.json"
LIBRARIES = ("xgboost", "lightgbm", "scikit-learn", "numpy", "pandas", "ta-lib")
# CatBoost's models, where they are installed, answer to `predict` like LightGBM's.
Booster = xgboost.Booster | lightgbm.Booster | Any

FEW_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BoosterEnsemble:
    """Scaler, boosters, weights and calibration that were fitted on one set of training rows.

    The scaler knows all ``columns``; ``selected`` are the positions of those that the boosters use,
    ascending. The weights, by booster (``xgb``, ``lgb``, ``cat``), are not negative and sum to one.
    """

    columns: tuple[str, ...]
    selected: tuple[int, ...]
    scaler: RobustScaler
    models: Mapping[str, Booster]
    weights: Mapping[str, float]
    calibration: Calibration

    @property
    def selected_features(self) -> tuple[str, ...]:
        """Names of the features that the boosters use."""
        return tuple(self.columns[i] for i in self.selected)

    def prepare(self, features: FloatMatrix) -> FloatMatrix:
        """Scale (n, len(columns)) features and keep the selected ones, shape (n, len(selected))."""
        if features.shape[1] != len(self.columns):
            raise ValueError(f"got {features.shape[1]} features, the model knows {len(self.columns)}")
        return select_scaled(self.scaler, features, self.selected)

    def per_model(self, features: FloatMatrix) -> dict[str, FloatArray]:
        """Return each booster's raw prediction in units of the h-day volatility, shape (n,)."""
        prepared = self.prepare(features)
        return {name: predict_booster(model, prepared) for name, model in self.models.items()}

    def combine(self, per_model: Mapping[str, FloatArray]) -> FloatArray:
        """Weigh the boosters' raw predictions into one signal, shape (n,)."""
        parts = [self.weights[name] * values for name, values in per_model.items()]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)

    def raw_scaled(self, features: FloatMatrix) -> FloatArray:
        """Return the boosters' one signal before calibration, in units of the h-day volatility, (n,)."""
        return self.combine(self.per_model(features))

    def contributions(self, features: FloatMatrix) -> FloatArray:
        """Return the boosters' own SHAP values, weighed, shape (n, len(selected)), in volatility units."""
        prepared = self.prepare(features)
        parts = [self.weights[name] * shap_values(model, prepared) for name, model in self.models.items()]
        return np.asarray(np.sum(parts, axis=0), dtype=np.float64)


def select_scaled(scaler: RobustScaler, features: FloatMatrix, selected: tuple[int, ...]) -> FloatMatrix:
    """Scale every column and keep the selected ones as contiguous float32, holding one copy."""
    columns = list(selected)
    scaled = np.ascontiguousarray(features[:, columns], dtype=np.float32)
    scaled -= scaler.center_[columns].astype(np.float32)
    scaled /= scaler.scale_[columns].astype(np.float32)
    return scaled


def predict_booster(model: Booster, prepared: FloatMatrix) -> FloatArray:
    """Predict on an array; both boosters check nothing about columns, so callers select by saved names."""
    if isinstance(model, xgboost.Booster):
        return np.asarray(model.inplace_predict(prepared), dtype=np.float64)
    if isinstance(model, lightgbm.Booster):
        return np.asarray(model.predict(prepared, num_threads=_threads(prepared)), dtype=np.float64)
    return np.asarray(model.predict(prepared), dtype=np.float64)


def _threads(prepared: FloatMatrix) -> int:
    """Return how many threads a library should use, 0 for its own choice; the result is the same.

    Waking threads for a few rows takes longer than the work, most of all beside other requests.
    """
    return 1 if len(prepared) < FEW_ROWS else 0


def shap_values(model: Booster, prepared: FloatMatrix) -> FloatArray:
    """Return exact SHAP values without the bias column, shape (n, p)."""
    values: Any
    if isinstance(model, xgboost.Booster):
        values = model.predict(xgboost.DMatrix(prepared, nthread=_threads(prepared)), pred_contribs=True)
    elif isinstance(model, lightgbm.Booster):
        values = model.predict(prepared, pred_contrib=True, num_threads=_threads(prepared))
    else:
        import catboost  # noqa: PLC0415 - large, and only there when a model was trained with it

        values = model.get_feature_importance(catboost.Pool(prepared), type="ShapValues")
    return np.asarray(values, dtype=np.float64)[:, :-1]


def shrunk_weights(
    per_model: Mapping[str, FloatArray], realised_scaled: FloatArray, *, half_trust_rows: int = 2_000
) -> dict[str, float]:
    """Weigh models by their out-of-sample covariance with what happened, shrunk towards equal weights.

    Raw predictions by model and realised volatility-scaled returns are of the same rows, (n,); at
    ``half_trust_rows`` of them half of the way from equal weights is gone. The weights are not negative, sum
    to one, and are equal where nothing is known.
    """
    equal = 1.0 / len(per_model)
    n_rows = len(realised_scaled)
    skill = {}
    for name, values in per_model.items():
        spread = float(np.std(values)) if n_rows > 1 else 0.0
        centred = values - np.mean(values) if n_rows else values
        skill[name] = max(float(np.mean(centred * realised_scaled)) / spread, 0.0) if spread > 0 else 0.0
    total = sum(skill.values())
    if total <= 0:
        return dict.fromkeys(per_model, equal)
    trust = n_rows / (n_rows + half_trust_rows)
    return {name: equal + trust * (value / total - equal) for name, value in skill.items()}


def model_file(name: str, path_horizon: int | None = None) -> str:
    """Return the name of the file of a booster, or of the scaler; a path model's ends in its horizon."""
    stem = name if name == SCALER else f"{name}_model"
    return f"{stem}.joblib" if path_horizon is None else f"{stem}_h{path_horizon}.joblib"


class GBMManifest(artifact.Manifest):
    """What a saved bundle promises about itself.

    There is one ``<name>_model.joblib`` for each of ``models``, and no other is loaded. Path models, told by
    their horizons in bars, have boosters of the same names.
    """

    SCHEMA: ClassVar[int] = SCHEMA_VERSION
    FILES: ClassVar[tuple[str, ...]] = (RECORD, COLUMNS, IMPORTANCE, HYPERPARAMETERS, METADATA)

    models: tuple[Literal["xgb", "lgb", "cat"], ...] = Field(min_length=1)
    path_golden_outputs: dict[Annotated[int, Field(ge=1)], list[float]] = Field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its boosters."""
        return self.models

    def needed(self) -> set[str]:
        """Return the files without which it is not whole."""
        ensembles = (None, *self.path_golden_outputs)
        return {
            *self.FILES,
            *(model_file(name, bars) for bars in ensembles for name in (SCALER, *self.models)),
        }

    @model_validator(mode="after")
    def _names_each_once(self) -> "GBMManifest":
        if len(set(self.models)) < len(self.models):
            raise ValueError("a booster is listed twice")
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


class Importance(RootModel[dict[str, float]]):
    """Content of ``feature_importance.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathModel:
    """A model for another horizon, through whose forecast the path passes; it decides nothing.

    Its ensemble has the bundle's ``columns`` and a calibration of its own; its out-of-sample figures are in
    the bundle's metadata, as ``path_models``, by horizon.
    """

    horizon_bars: int
    ensemble: BoosterEnsemble
    hyperparameters: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GBMBundle(Bundle):
    """Boosters with the out-of-sample record that vouches for them.

    ``path_models`` are of further horizons, ascending, for the forecast path alone. Importance is the mean
    absolute SHAP value; hyperparameters are tuned parameters and rounds by booster.
    """

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
            path.horizon_bars: (path.ensemble.calibration, path.ensemble.raw_scaled(features[rows]))
            for path in self.path_models
        }


def save_bundle(bundle: GBMBundle, models_dir: Path, *, golden_inputs: FloatMatrix) -> Path:
    """Save a bundle, see `artifact.Format.save`; what it says to the golden inputs, (k, p), is stored too."""
    rows = golden_inputs[: artifact.GOLDEN_ROWS]
    promised = {
        "models": tuple(bundle.ensemble.models),
        "libraries": versions_of(bundle.ensemble.models),
        "golden_inputs": rows.astype(np.float64).tolist(),
        "golden_outputs": bundle.ensemble.raw_scaled(rows).tolist(),
        "path_golden_outputs": {
            path.horizon_bars: path.ensemble.raw_scaled(rows).tolist() for path in bundle.path_models
        },
    }
    return FORMAT.save(bundle, models_dir, _contents(bundle), promised)


def versions_of(models: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of what boosters with these names depend on."""
    return artifact.library_versions([*LIBRARIES, *(["catboost"] if "cat" in models else [])])


def _contents(bundle: GBMBundle) -> dict[str, bytes]:
    ensemble, paths = bundle.ensemble, bundle.path_models
    contents = {}
    for bars, each in ((None, ensemble), *((path.horizon_bars, path.ensemble) for path in paths)):
        for name, content in {SCALER: each.scaler, **each.models}.items():
            joblib.dump(content, buffer := io.BytesIO())
            contents[model_file(name, bars)] = buffer.getvalue()
    selected = {path.horizon_bars: path.ensemble.selected_features for path in paths}
    columns = {"columns": ensemble.columns, "selected": ensemble.selected_features, "path_models": selected}
    fits = {path.horizon_bars: _fitted_document(path.ensemble, path.hyperparameters) for path in paths}
    fitted = {**_fitted_document(ensemble, bundle.hyperparameters), "path_models": fits}
    documents = {COLUMNS: columns, IMPORTANCE: bundle.importance, HYPERPARAMETERS: fitted}
    return contents | {name: artifact.as_json(content) for name, content in documents.items()}


def _fitted_document(ensemble: BoosterEnsemble, boosters: Mapping[str, object]) -> dict[str, object]:
    return {"boosters": boosters, "weights": ensemble.weights, "calibration": asdict(ensemble.calibration)}


def _build(version: Version[GBMManifest], metadata: Mapping[str, Any]) -> GBMBundle:
    manifest = version.manifest
    names = artifact.document(version, COLUMNS, artifact.ColumnNames)
    fitted = artifact.document(version, HYPERPARAMETERS, FittedDocument)
    # Manifest and documents know the same path models.
    for name, told in ((COLUMNS, names.path_models), (HYPERPARAMETERS, fitted.path_models)):
        if set(told) != set(manifest.path_golden_outputs):
            raise artifact.corrupt(version.folder, f"{name} tells of other horizons than the manifest")
    paths = [
        PathModel(
            horizon_bars=bars,
            ensemble=_ensemble(version, names.columns, names.path_models[bars], own, bars),
            hyperparameters=own.boosters,
        )
        for bars, own in sorted(fitted.path_models.items())
    ]
    return GBMBundle(
        symbol=metadata["symbol"],
        horizon_bars=metadata["horizon_bars"],
        ensemble=_ensemble(version, names.columns, names.selected, fitted),
        record=read_record(version, *RECORD_COLUMNS, *(f"model_{name}" for name in manifest.models)),
        metadata=metadata,
        importance=artifact.document(version, IMPORTANCE, Importance).root,
        hyperparameters=fitted.boosters,
        path_models=tuple(paths),
    )


def _ensemble(
    version: Version[GBMManifest],
    columns: tuple[str, ...],
    selected: tuple[str, ...],
    fitted: Fitted,
    bars: int | None = None,
) -> BoosterEnsemble:
    """Return the model's ensemble, or that of the path model with a horizon of ``bars``."""
    folder, manifest, pickled = version.folder, version.manifest, model_file(SCALER, bars)
    if set(fitted.weights) != set(manifest.models):
        raise artifact.corrupt(folder, f"{HYPERPARAMETERS} does not weigh {', '.join(manifest.models)}")
    with artifact.unusable(folder, pickled):
        scaler = joblib.load(io.BytesIO(version.contents[pickled]))
        if not isinstance(scaler, RobustScaler) or scaler.center_.shape != (len(columns),):
            raise artifact.corrupt(folder, f"{pickled} does not scale the columns of {COLUMNS}")
    ensemble = BoosterEnsemble(
        columns=columns,
        selected=tuple(columns.index(name) for name in selected),
        scaler=scaler,
        models={name: _booster(version, name, model_file(name, bars)) for name in manifest.models},
        weights=fitted.weights,
        calibration=fitted.calibration,
    )
    expected = manifest.golden_outputs if bars is None else manifest.path_golden_outputs[bars]
    check_golden(version, lambda rows: ensemble.raw_scaled(rows.astype(np.float32)), expected, LightGBMError)
    return ensemble


def _booster(version: Version[GBMManifest], name: str, pickled: str) -> Booster:
    library = BOOSTER_LIBRARY[name]
    with artifact.unusable(version.folder, pickled, LightGBMError):
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
        raise artifact.corrupt(version.folder, f"{pickled} holds no model of {library}")
    return cast("Booster", model)


FORMAT = artifact.Format(kind=GBM, manifest=GBMManifest, module="inference.load_gbm_models", build=_build)
load_bundle, load_folder = FORMAT.load, FORMAT.load_folder
