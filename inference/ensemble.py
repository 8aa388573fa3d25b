"""The fitted boosters as one forecaster of the volatility-scaled return: scale, predict, weigh, calibrate.

A `BoosterEnsemble` holds everything that a fold fits. The trainer makes one per fold and one for the bundle,
so what is validated is what is served. What every kind of model offers to a forecaster is a `Bundle`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightgbm
import numpy as np
import numpy.typing as npt
import pandas as pd
import xgboost
from sklearn.preprocessing import RobustScaler

from utils.model_paths import ArtifactKind

FloatArray = npt.NDArray[np.float64]
FloatMatrix = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
# CatBoost's models, where they are installed, answer to `predict` like LightGBM's.
Booster = xgboost.Booster | lightgbm.Booster | Any

MODEL_NAMES = ("xgb", "lgb")
# Fewer independent rows than this say nothing about a slope.
MIN_INDEPENDENT = 30
FEW_ROWS = 512
# A signal is at most doubled.
MAX_SLOPE = 2.0
# How far the slopes of symbols are thought to lie from the pooled one.
SYMBOL_SLOPE_STD = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What earlier out-of-sample rows say about the raw signal.

    The calibrated forecast in units of the h-day volatility is ``drift + slope * (raw - raw_mean)``.

    Attributes
    ----------
    drift
        Mean of the volatility-scaled target over the training rows: the forecast of a model without skill.
    raw_mean
        Mean of the raw signal over the rows that the slope was estimated on.
    slope
        Slope of realised on raw, shrunk towards zero by its own standard error, within [0, `MAX_SLOPE`].
    skill_lower
        Lower confidence bound of the slope over the slope itself, within [0, 1]; 0 means that the
        out-of-sample rows do not rule out a signal without skill.
    n_rows
        Number of out-of-sample rows behind the slope.
    """

    drift: float
    raw_mean: float
    slope: float
    skill_lower: float
    n_rows: int

    def apply(self, raw_scaled: FloatArray) -> FloatArray:
        """Return the calibrated forecast, in units of the h-day volatility, shape (n,)."""
        return self.drift + self.slope * (raw_scaled - self.raw_mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(ABC):
    """A trained model of any kind with the out-of-sample record that vouches for it.

    Attributes
    ----------
    symbol
        The symbol it was trained for.
    horizon_bars
        Number of bars that a forecast looks ahead; what is decided, judged and recorded looks so far.
    record
        Walk-forward predictions: `inference.artifact.RECORD_COLUMNS`, and a ``model_<name>`` column for each
        of `models`.
    metadata
        Content of ``training_metadata.json``.
    importance
        What each feature contributes to the final fit, normalised; empty where nobody measured it.
    hyperparameters
        How the final fit came about, as plain data.
    path
        Folder that it was loaded from; None before it is saved.
    warnings
        What was amiss while loading and did not prevent it.
    """

    KIND: ClassVar[ArtifactKind]

    symbol: str
    horizon_bars: int
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

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """Names of the models whose signals make up the bundle's."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the features that `signal` takes, in its order."""

    @property
    @abstractmethod
    def calibration(self) -> Calibration:
        """How far the final fit's signal may be believed."""

    @abstractmethod
    def signal(self, features: FloatMatrix, rows: IntArray) -> tuple[dict[str, FloatArray], FloatArray]:
        """Return the raw signal of the final fit, before calibration, in units of the h-day volatility.

        Parameters
        ----------
        features
            Unscaled `columns` of every bar, (n, p); NaN in the warm-up.
        rows
            Bars whose features are finite, (k,). What is said of a bar depends on rows up to it only.

        Returns
        -------
        tuple
            Each model's signal by name, and the one that they make together, (k,) each.
        """

    @property
    def path_horizons(self) -> tuple[int, ...]:
        """Further horizons that the forecast path passes through."""
        return ()

    def further(
        self, _features: FloatMatrix, _rows: IntArray
    ) -> Mapping[int, tuple[Calibration, FloatArray]]:
        """Return the calibration and the raw signal of each of `path_horizons`, as `signal` does."""
        return {}

    def contributions(self, features: FloatMatrix) -> pd.DataFrame:
        """Return SHAP values of the final fit, a column for each feature; none where they cannot be had."""
        return pd.DataFrame(index=range(len(features)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BoosterEnsemble:
    """Scaler, boosters, weights and calibration that were fitted on one set of training rows.

    Attributes
    ----------
    columns
        Names of all columns that the scaler was fitted on, in its order.
    selected
        Positions in ``columns`` of the features that the boosters use, ascending.
    scaler
        Fitted on the training rows' ``columns``.
    models
        Boosters by name (``xgb``, ``lgb``, ``cat``).
    weights
        Non-negative weights by name, summing to one.
    calibration
        See `Calibration`.
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

    Parameters
    ----------
    per_model
        Out-of-sample raw predictions by model, each (n,).
    realised_scaled
        Realised volatility-scaled returns of the same rows, (n,).
    half_trust_rows
        Number of rows at which half of the way from equal weights to the estimated ones is gone.

    Returns
    -------
    dict
        Non-negative weights that sum to one; equal where nothing is known.
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


def overlap_error(scores: FloatArray, horizon_bars: int) -> float:
    """Return the standard error of the sum of scores, one per session, that come from labels of h bars.

    Newey and West's with 3 (h - 1) lags: how far overlapping labels repeat each other depends on how slowly
    the signal moves.

    References
    ----------
    Newey, West (1987), Econometrica 55.
    """
    lags = min(3 * (horizon_bars - 1), len(scores) - 1)
    variance = float(scores @ scores)
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * float(scores[lag:] @ scores[:-lag])
    return float(np.sqrt(max(variance, 0.0)))


def calibrate(
    raw_scaled: FloatArray,
    realised_scaled: FloatArray,
    *,
    drift: float,
    horizon_bars: int,
    session_code: IntArray | None = None,
    prior_slope: float = 0.0,
    prior_std: float = 1.0,
    confidence_z: float = 1.645,
) -> Calibration:
    """Estimate how far the raw signal may be believed, from out-of-sample rows.

    The least-squares slope of realised on raw is a normal posterior with prior N(`prior_slope`, `prior_std`),
    clipped into [0, `MAX_SLOPE`]: a few small trees may be too humble. Its standard error sums over the
    symbols of a session, which move together, and allows for labels that overlap, see `overlap_error`.

    Parameters
    ----------
    raw_scaled, realised_scaled
        Signal and outcome of the same out-of-sample rows, (n,), both known before the calibration is used.
    drift
        Mean of the scaled target over the training rows.
    horizon_bars
        Length of the labels.
    session_code
        Number of each row's session, from 0, (n,); None where every row is a session of its own.
    prior_slope, prior_std
        What is thought of the slope before looking: 0 and wide for a model, the pooled slope for a symbol.
    confidence_z
        Normal quantile of the lower bound (1.645 is one-sided 95 %).
    """
    n_rows = len(raw_scaled)
    code = np.arange(n_rows) if session_code is None else session_code
    n_sessions = int(code.max()) + 1 if n_rows else 0
    spread = float(np.var(raw_scaled)) if n_rows else 0.0
    raw_mean = float(np.mean(raw_scaled)) if n_rows else 0.0
    if n_sessions / horizon_bars < MIN_INDEPENDENT or spread <= 1e-12:
        slope = float(np.clip(prior_slope, 0.0, MAX_SLOPE))
        return Calibration(drift=drift, raw_mean=raw_mean, slope=slope, skill_lower=0.0, n_rows=n_rows)
    centred = raw_scaled - raw_mean
    outcome = realised_scaled - np.mean(realised_scaled)
    own = float(np.mean(centred * outcome)) / spread
    by_session = np.bincount(code, weights=centred * (outcome - own * centred)).astype(np.float64)
    error = overlap_error(by_session, horizon_bars) / (spread * n_rows)
    trust = prior_std**2 / (prior_std**2 + error**2)
    slope = prior_slope + trust * (own - prior_slope)
    lower = (slope - confidence_z * error * np.sqrt(trust)) / slope if slope > 0 else 0.0
    return Calibration(
        drift=drift,
        raw_mean=raw_mean,
        slope=float(np.clip(slope, 0.0, MAX_SLOPE)),
        skill_lower=float(np.clip(lower, 0.0, 1.0)),
        n_rows=n_rows,
    )


def calibrate_symbols(
    pooled: Calibration,
    raw_scaled: FloatArray,
    realised_scaled: FloatArray,
    session_code: IntArray,
    symbol: npt.NDArray[np.object_],
    *,
    drifts: Mapping[str, float],
    horizon_bars: int,
) -> dict[str, Calibration]:
    """Calibrate each symbol of a panel by its own out-of-sample rows, shrunk towards the pooled slope.

    Parameters
    ----------
    pooled
        Calibration over all rows; a symbol without rows of its own takes its slope and bound.
    raw_scaled, realised_scaled, session_code, symbol
        As for `calibrate`, with the symbol of each row, (n,).
    drifts
        Mean of the scaled target by symbol, over the training rows.
    horizon_bars
        Length of the labels.
    """
    found = {}
    for name, drift in drifts.items():
        own = np.flatnonzero(symbol == name)
        sessions = np.unique(session_code[own], return_inverse=True)[1] if len(own) else None
        each = calibrate(
            raw_scaled[own],
            realised_scaled[own],
            drift=drift,
            horizon_bars=horizon_bars,
            session_code=sessions,
            prior_slope=pooled.slope,
            prior_std=SYMBOL_SLOPE_STD,
        )
        if each.n_rows / horizon_bars < MIN_INDEPENDENT:
            each = replace(pooled, drift=drift)
        found[name] = each
    return found
