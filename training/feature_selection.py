"""Select features by the boosters' own SHAP values, on training rows only."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import lightgbm
import numpy as np
import xgboost

from inference.ensemble import Booster, FloatArray, FloatMatrix, shap_values

logger = logging.getLogger(__name__)


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
