"""Which features a fit keeps: those that stand out alone, then those that move the boosters most."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import lightgbm
import numpy as np
import xgboost

from inference.ensemble import Booster, FloatArray, FloatMatrix, overlap_error, shap_values
from training.libraries import Rows

logger = logging.getLogger(__name__)

# Scaled features beyond this count as this much when they are screened.
SCREEN_LIMIT = 3.0


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


def screen(rows: Rows, least_t: float, share: float) -> tuple[int, ...]:
    """Return the features that stand out alone, ascending; all of them where none does.

    Each feature is tested by itself, as it is and as its distance from its middle (so that an even
    relation counts), with products summed over the symbols of a session, and with the standard error of
    labels that overlap. Where the strongest passes ``least_t``, the features with at least ``share`` of its
    t-value are kept: with few independent rows, sixty columns of noise would drown it.

    Parameters
    ----------
    rows
        Training rows.
    least_t
        The t-value below which nothing stands out; infinite to keep all features always.
    share
        Share of the largest t-value that a kept feature has.
    """
    t_values = screen_t_values(rows)
    strongest = float(t_values.max())
    if strongest < least_t:
        return tuple(range(len(t_values)))
    return tuple(int(i) for i in np.flatnonzero(t_values >= share * strongest))


def screen_t_values(rows: Rows) -> FloatArray:
    """Return each feature's larger t-value, plain or as distance from the middle, (p,)."""
    target = rows.target_scaled - np.average(rows.target_scaled, weights=rows.weight)
    starts = np.flatnonzero(np.r_[True, rows.date[1:] != rows.date[:-1]])
    found = np.zeros(rows.features.shape[1])
    for column in range(len(found)):
        plain = np.clip(rows.features[:, column].astype(np.float64), -SCREEN_LIMIT, SCREEN_LIMIT)
        for values in (plain, np.abs(plain)):
            product = (values - values.mean()) * target * rows.weight
            by_session = np.add.reduceat(product, starts)
            error = overlap_error(by_session, rows.horizon_bars)
            if error > 0:
                found[column] = max(found[column], abs(float(by_session.sum())) / error)
    return found


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
    if isinstance(model, lightgbm.Booster):
        return np.asarray(model.feature_importance("gain"), dtype=np.float64)
    return np.asarray(model.get_feature_importance(), dtype=np.float64)


def _normalised(values: FloatArray) -> FloatArray:
    total = float(values.sum())
    return values / total if total > 0 else np.full_like(values, 1.0 / len(values))
