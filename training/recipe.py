"""The recipe that is validated fold by fold: scale, tune, select, weigh, fit, calibrate.

Every step sees rows before the fold only. Tuning and selection are redone every few folds and carried over in
between: what is carried over was chosen on still earlier rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import lightgbm
import numpy as np
import pandas as pd
import xgboost
from sklearn.preprocessing import RobustScaler

from data.target_engineering import DEFAULT_HORIZON_BARS, Dataset
from evaluation.accounting import CostModel
from inference.ensemble import (
    Booster,
    BoosterEnsemble,
    Calibration,
    FloatArray,
    FloatMatrix,
    calibrate,
    select_scaled,
    shap_values,
    shrunk_weights,
)
from training.gbm_search import Rows, SearchConfig, Tuned, fit_boosters, tune
from validation.walk_forward import RecipePrediction, WalkForwardConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """Parameters of the recipe.

    Attributes
    ----------
    search
        How the boosters are searched.
    max_features
        How many features SHAP selection keeps.
    refresh_every_folds
        Tuning and selection are redone every so many folds (and for the final fit).
    weight_half_life_sessions
        Age at which a row counts half.
    target_limit_sigma
        Training targets beyond this many volatilities are winsorised; outcomes never are.
    seed
        Seed of everything that draws.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    max_features: int = 40
    refresh_every_folds: int = 1
    weight_half_life_sessions: float = 252.0 * 20
    target_limit_sigma: float = 4.0
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Everything that a training run is decided by; recorded in the bundle.

    Attributes
    ----------
    horizon_bars
        Number of bars that a forecast looks ahead.
    recipe
        What is fitted, see `RecipeConfig`.
    walk_forward
        How it is validated, see `WalkForwardConfig`.
    costs
        What the decided positions pay when the verdict judges them.
    """

    horizon_bars: int = DEFAULT_HORIZON_BARS
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    walk_forward: WalkForwardConfig = field(default_factory=WalkForwardConfig)
    costs: CostModel = field(default_factory=CostModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which features are kept, and why.

    Attributes
    ----------
    selected
        Positions of the kept columns, ascending.
    importance
        Mean absolute SHAP value of every column, normalised to sum to one, (p,).
    method
        ``shap``, or ``gain`` where SHAP values could not be had.
    """

    selected: tuple[int, ...]
    importance: FloatArray
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedGBM:
    """One fold's fit; see `validation.walk_forward.FittedRecipe`."""

    ensemble: BoosterEnsemble
    tuned: Mapping[str, Tuned]
    selection: Selection

    @property
    def selected_features(self) -> tuple[str, ...]:
        """Names of the features that the boosters use."""
        return self.ensemble.selected_features

    @property
    def notes(self) -> Mapping[str, object]:
        """What the fold table shows beside the metrics."""
        return {
            "slope": self.ensemble.calibration.slope,
            "skill_lower": self.ensemble.calibration.skill_lower,
            "weights": dict(self.ensemble.weights),
            "rounds": {name: found.rounds for name, found in self.tuned.items()},
            "selection": self.selection.method,
        }

    def predict(self, rows: Dataset) -> RecipePrediction:
        """Forecast rows that were not seen; see `validation.walk_forward.RecipePrediction`."""
        per_model = self.ensemble.per_model(rows.features)
        raw_scaled = self.ensemble.combine(per_model)
        calibration = self.ensemble.calibration
        return RecipePrediction(
            mean_log=calibration.apply(raw_scaled) * rows.sigma_log,
            baseline_log=calibration.drift * rows.sigma_log,
            raw_scaled=raw_scaled,
            per_model=per_model,
            skill_lower=calibration.skill_lower,
        )


class GBMRecipe:
    """Fits the recipe fold after fold, in order of time.

    Parameters
    ----------
    config
        See `RecipeConfig`.
    """

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.searches: list[Mapping[str, Tuned]] = []
        self._selection: Selection | None = None

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedGBM:
        """Fit on ``train``; calibrate on ``earlier`` out-of-sample rows.

        Parameters
        ----------
        train
            Labelled rows whose labels were known before the fold.
        fold
            Number of the fold, ascending from 0; decides whether tuning and selection are redone.
        earlier
            Walk-forward record of earlier folds, rows resolved before the fold; may be empty.
        """
        config = self.config
        drift = weighted_mean(train.target_scaled, sample_weights(train, config.weight_half_life_sessions))
        scaler = RobustScaler().fit(train.features)
        columns = tuple(range(len(train.columns)))
        rows = training_rows(train, select_scaled(scaler, train.features, columns), drift, config)
        if self._selection is None or fold % config.refresh_every_folds == 0:
            self.searches.append(tune(rows, config.search, config.seed))
            self._selection = self._select(rows)
        selection, tuned = self._selection, self.searches[-1]
        models = fit_boosters(_with_columns(rows, selection), tuned, config.search, config.seed)
        weights, calibration = evidence(earlier, tuple(models), drift=drift, horizon_bars=train.horizon_bars)
        ensemble = BoosterEnsemble(
            columns=train.columns,
            selected=selection.selected,
            scaler=scaler,
            models=models,
            weights=weights,
            calibration=calibration,
        )
        return FittedGBM(ensemble=ensemble, tuned=tuned, selection=selection)

    def fit_all(self, dataset: Dataset, record: pd.DataFrame) -> FittedGBM:
        """Fit on every labelled row, tuned and selected anew, calibrated on the whole walk-forward record."""
        labelled = dataset.take(np.flatnonzero(dataset.labelled))
        return self.fit(labelled, fold=0, earlier=record)

    def _select(self, rows: Rows) -> Selection:
        models = fit_boosters(rows, self.searches[-1], self.config.search, self.config.seed)
        return select_features(
            models, rows.features, max_features=self.config.max_features, seed=self.config.seed
        )


def sample_weights(train: Dataset, half_life_sessions: float) -> FloatArray:
    """Weigh rows by age: a row of `half_life_sessions` before the newest counts half, (n,)."""
    sessions, position = np.unique(train.date, return_inverse=True)
    age = len(sessions) - 1 - position
    return np.asarray(0.5 ** (age / half_life_sessions), dtype=np.float64)


def weighted_mean(values: FloatArray, weights: FloatArray) -> float:
    """Return the weighted mean of ``values``."""
    return float(np.average(values, weights=weights))


def training_rows(train: Dataset, scaled: np.ndarray, drift: float, config: RecipeConfig) -> Rows:
    """Return the rows that the boosters are fitted on: target free of drift, winsorised, weighted by age."""
    limit = config.target_limit_sigma
    return Rows(
        features=scaled,
        target_scaled=np.clip(train.target_scaled, -limit, limit) - drift,
        weight=sample_weights(train, config.weight_half_life_sessions),
        label_end_position=np.searchsorted(train.date, train.label_end),
    )


def _with_columns(rows: Rows, selection: Selection) -> Rows:
    return Rows(
        features=np.ascontiguousarray(rows.features[:, list(selection.selected)]),
        target_scaled=rows.target_scaled,
        weight=rows.weight,
        label_end_position=rows.label_end_position,
    )


def evidence(
    record: pd.DataFrame, models: tuple[str, ...], *, drift: float, horizon_bars: int
) -> tuple[dict[str, float], Calibration]:
    """Weigh the boosters and calibrate their signal on resolved out-of-sample rows.

    Parameters
    ----------
    record
        Walk-forward record (see `validation.walk_forward`); rows without an outcome are left out.
    models
        Names of the boosters.
    drift
        The forecast of a model without skill, in units of volatility.
    horizon_bars
        Length of the labels.
    """
    if record.empty:
        return dict.fromkeys(models, 1.0 / len(models)), calibrate(
            np.empty(0), np.empty(0), drift=drift, horizon_bars=horizon_bars
        )
    resolved = record[record["realised_log"].notna()]
    realised_scaled = np.asarray(resolved["realised_log"] / resolved["sigma_log"], dtype=np.float64)
    per_model = {name: np.asarray(resolved[f"model_{name}"], dtype=np.float64) for name in models}
    weights = shrunk_weights(per_model, realised_scaled)
    raw_scaled = np.asarray(resolved["raw_scaled"], dtype=np.float64)
    return weights, calibrate(raw_scaled, realised_scaled, drift=drift, horizon_bars=horizon_bars)


def select_features(
    models: Mapping[str, Booster],
    features: FloatMatrix,
    *,
    max_features: int,
    seed: int,
    sample_rows: int = 600,
) -> Selection:
    """Keep the ``max_features`` columns that move the boosters most.

    Parameters
    ----------
    models
        Boosters fitted on the training rows with all columns.
    features
        Scaled training rows, (n, p).
    max_features
        How many columns to keep.
    seed
        Draws the rows that SHAP values are computed on.
    sample_rows
        How many rows; the mean absolute value is stable from a few hundred on.
    """
    n_rows, n_columns = features.shape
    index = np.sort(np.random.default_rng(seed).permutation(n_rows)[:sample_rows])
    try:
        parts = [np.abs(shap_values(model, features[index])).mean(axis=0) for model in models.values()]
        method = "shap"
    except (xgboost.core.XGBoostError, lightgbm.basic.LightGBMError) as error:
        logger.warning("SHAP values failed (%s): features are selected by gain instead", error)
        parts = [gain_importance(model, n_columns) for model in models.values()]
        method = "gain"
    importance = np.mean([_normalised(part) for part in parts], axis=0)
    keep = np.argsort(-importance, kind="stable")[:max_features]
    return Selection(selected=tuple(int(i) for i in np.sort(keep)), importance=importance, method=method)


def gain_importance(model: Booster, n_columns: int) -> FloatArray:
    """Return total gain by column, (p,)."""
    if isinstance(model, xgboost.Booster):
        gains = np.zeros(n_columns)
        for name, gain in model.get_score(importance_type="total_gain").items():
            gains[int(name.removeprefix("f"))] = gain
        return gains
    return np.asarray(model.feature_importance("gain"), dtype=np.float64)


def _normalised(values: FloatArray) -> FloatArray:
    total = float(values.sum())
    return values / total if total > 0 else np.full_like(values, 1.0 / len(values))
