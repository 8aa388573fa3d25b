"""The recipe that is validated fold by fold: scale, screen, tune, select, weigh, fit, calibrate.

Every step sees rows before the fold only. Tuning is redone every few folds and carried over in between: what
is carried over was chosen on still earlier rows. Everything else is redone in every fold.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, Literal, TypeVar

import lightgbm
import numpy as np
import pandas as pd
import xgboost
from sklearn.preprocessing import RobustScaler

from data.target_engineering import Dataset, DateArray
from evaluation.metrics import overlap_error
from inference.intervals import MIN_INDEPENDENT, Calibration, FloatArray, FloatMatrix, IntArray, calibrate
from inference.load_gbm_models import Booster, BoosterEnsemble, select_scaled, shap_values, shrunk_weights
from inference.load_lstm_model import Network
from training.gbm_search import Rows, SearchConfig, Tuned, all_columns, fit_boosters, tune
from training.trainer import FinalRecipe, RowsConfig, WalkConfig
from utils.base import DataError
from validation.walk_forward import RecipePrediction

logger = logging.getLogger(__name__)

Loss = Literal["huber", "mae", "balanced", "quantile"]
ModelT = TypeVar("ModelT", BoosterEnsemble, Network)

# A drift is hardly known from one history: 20 years tell a market's within .13 volatilities a year. What is
# believed before the prices: shares rose by some 9 % a year (log) in a century at a volatility of some 30 %;
# means of sixteen markets differ by less than .1 volatilities, about what chance makes of a century, so that
# half of that is left for what is lasting (Dimson, Marsh, Staunton 2002, Triumph of the Optimists); those of
# one market's symbols by some .16. By bar:
USUAL_DRIFT, MARKET_DRIFT_STD, SYMBOL_DRIFT_STD = 0.3 / 252**0.5, 0.05 / 252**0.5, 0.01
# Symbols move together: no mean of a session, however many there are, varies less than this.
LEAST_SESSION_VARIANCE = 0.25
# At so many rows a symbol's targets lose its own mean half, and the panel's half, before they teach.
HALF_TRUST_ROWS = 10_000
# How far the slopes of symbols are thought to lie from the pooled one.
SYMBOL_SLOPE_STD = 0.25
# Scaled features beyond this count as this much when they are screened.
SCREEN_LIMIT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig(RowsConfig):
    """Parameters of the boosters' recipe; see also `RowsConfig`.

    The search is redone every ``tune_every_folds`` folds, and for the final fit; SHAP keeps ``max_features``.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    tune_every_folds: int = 10
    max_features: int = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig(WalkConfig):
    """What a training run of boosters is decided by, see `WalkConfig`."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig(RowsConfig):
    """Parameters of the network's recipe; see also `RowsConfig`.

    ``loss``: ``balanced`` is Huber's, rises and falls weighing alike; ``quantile`` the pinball loss of three
    quantiles, whose median is the forecast. The rate rises from a tenth of ``learning_rate`` in
    ``warmup_epochs``, then falls along a cosine. The latest ``validation_share`` of the training sessions
    decides when to stop: after ``patience_epochs`` without gain. The network is fitted anew every
    ``refit_every_folds``; scaled features count ``feature_limit`` at most. Of a single symbol, an epoch over
    its few rows has ``least_steps``, where batches of 32 allow it, and the forget gates begin with the bias
    ``forget_bias``: with Keras's usual 1, which a panel keeps, the two layers begin as a mean of some eight
    bars, and a thousand rows are too few to unlearn that.
    """

    loss: Loss = "huber"
    epochs: int = 50
    batch_size: int = 512
    sequence_length: int = 30
    units: tuple[int, int] = (64, 32)
    dense_units: int = 16
    dropout: float = 0.3
    learning_rate: float = 1e-3
    warmup_epochs: int = 5
    patience_epochs: int = 5
    validation_share: float = 0.15
    refit_every_folds: int = 3
    feature_limit: float = 5.0
    least_steps: int = 30
    forget_bias: float = -2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMConfig(WalkConfig):
    """What a training run of networks is decided by, see `WalkConfig`."""

    recipe: NetworkConfig = field(default_factory=NetworkConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Positions of the kept columns, ascending, and the share that each of all has in the SHAP values, (p,).

    Where ``method`` is not ``shap`` but ``gain``, in the gain.
    """

    selected: tuple[int, ...]
    importance: FloatArray
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[ModelT]):
    """One fold's fit of any kind of model; see `validation.walk_forward.FittedRecipe`.

    The model has the calibration of the panel as a whole; a symbol not in ``calibrations`` takes it.
    """

    model: ModelT
    calibrations: Mapping[str, Calibration]

    @property
    def selected_features(self) -> tuple[str, ...]:
        """Names of the features that the model uses."""
        return self.model.selected_features

    def for_symbol(self, symbol: str) -> ModelT:
        """Return the same model with the calibration of one symbol."""
        return replace(self.model, calibration=self.calibrations.get(symbol, self.model.calibration))

    def calibrated(
        self, rows: Dataset, per_model: Mapping[str, FloatArray], raw_scaled: FloatArray
    ) -> RecipePrediction:
        """Return the forecasts of ``rows`` from their signal and the calibration of their symbols."""
        own = [self.for_symbol(name).calibration for name in rows.symbols]
        drift, slope, centre, skill_lower = (
            np.array([getattr(one, name) for one in own], dtype=np.float64)[rows.symbol_code]
            for name in ("drift", "slope", "raw_mean", "skill_lower")
        )
        return RecipePrediction(
            mean_log=(drift + slope * (raw_scaled - centre)) * rows.sigma_log,
            baseline_log=drift * rows.sigma_log,
            raw_scaled=raw_scaled,
            per_model=per_model,
            skill_lower=skill_lower,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedGBM(Fitted[BoosterEnsemble]):
    """One fold's fit of the boosters."""

    tuned: Mapping[str, Tuned]
    selection: Selection

    @property
    def notes(self) -> Mapping[str, object]:
        """What the fold table shows beside the metrics."""
        return {
            "slope": self.model.calibration.slope,
            "skill_lower": self.model.calibration.skill_lower,
            "weights": dict(self.model.weights),
            "rounds": {name: found.rounds for name, found in self.tuned.items()},
            "setting": {name: "careful" if t.is_careful else "tuned" for name, t in self.tuned.items()},
            "selection": self.selection.method,
        }

    @property
    def hyperparameters(self) -> dict[str, object]:
        """Tuned parameters and rounds by booster, as plain data."""
        return {
            name: {"params": dict(found.params), "rounds": found.rounds, "inner_rmse": found.inner_rmse}
            for name, found in self.tuned.items()
        }

    def predict(self, rows: Dataset) -> RecipePrediction:
        """Forecast rows that were not seen."""
        per_model = self.model.per_model(rows.features)
        return self.calibrated(rows, per_model, self.model.combine(per_model))


class GBMRecipe(FinalRecipe[FittedGBM]):
    """Fits the recipe fold after fold, in order of time; what fits fold 0 tunes and selects anew."""

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.searches: list[Mapping[str, Tuned]] = []

    @property
    def trials(self) -> tuple[Mapping[str, object], ...]:
        """Every trial of every search, as recorded."""
        return tuple(trial for found in self.searches for tuned in found.values() for trial in tuned.trials)

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedGBM:
        """Fit on ``train``, rows whose labels were known before the fold; `evidence` weighs ``earlier`` rows.

        Folds are numbered from 0; their number decides whether tuning is redone.
        """
        config = self.config
        train, earlier = without_symbols(train, earlier, config.leave_out)
        seen = some_rows(train.features)
        # Before the first headline there is nothing to scale; no tree splits there.
        scaler = RobustScaler().fit(np.where(np.isnan(seen).all(axis=0), 0.0, seen))
        scaled = select_scaled(scaler, train.features, tuple(range(len(train.columns))))
        rows = training_rows(train, scaled, config)
        choose = chooser(train, config)
        screened = choose(rows)
        if not self.searches or fold % config.tune_every_folds == 0:
            self.searches.append(tune(rows, config.search, config.seed, choose))
        tuned = self.searches[-1]
        models, selection = self._fit_selected(rows, screened, tuned)
        drifts = drift_by_symbol(train, rows.weight)
        weights, calibration, own = evidence(earlier, tuple(models), *drifts, train.horizon_bars)
        ensemble = BoosterEnsemble(
            columns=train.columns,
            selected=selection.selected,
            scaler=scaler,
            models=models,
            weights=weights,
            calibration=calibration,
        )
        return FittedGBM(model=ensemble, calibrations=own, tuned=tuned, selection=selection)

    def _fit_selected(
        self, rows: Rows, screened: tuple[int, ...], tuned: Mapping[str, Tuned]
    ) -> tuple[dict[str, Booster], Selection]:
        """Fit on the screened features, keep those that SHAP values call for, and fit on these again."""
        search, seed = self.config.search, self.config.seed
        sieved = rows.with_columns(screened)
        models = fit_boosters(sieved, tuned, search, seed)
        kept = select_features(models, sieved.features, max_features=self.config.max_features, seed=seed)
        importance = np.zeros(rows.features.shape[1])
        importance[list(screened)] = kept.importance
        selected = tuple(screened[i] for i in kept.selected)
        if selected != screened:
            models = fit_boosters(rows.with_columns(selected), tuned, search, seed)
        return models, replace(kept, selected=selected, importance=importance)


def without_symbols(
    train: Dataset, earlier: pd.DataFrame, symbols: tuple[str, ...]
) -> tuple[Dataset, pd.DataFrame]:
    """Return training rows and earlier record without those of the given symbols."""
    if not symbols:
        return train, earlier
    kept = ~np.isin(np.asarray(train.symbols)[train.symbol_code], symbols)
    if not kept.any():
        told = f"leaving out {', '.join(symbols)} leaves no rows to train on: name a larger universe"
        raise DataError(told)
    return train.take(kept), earlier if earlier.empty else earlier[~earlier["symbol"].isin(symbols)]


def some_rows(features: FloatMatrix, at_most: int = 200_000) -> FloatMatrix:
    """Return evenly spaced rows: quantiles need no more, and a large panel stays within its memory."""
    return features[:: 1 + len(features) // at_most]


def sample_weights(train: Dataset, half_life_sessions: float) -> FloatArray:
    """Weigh rows by age: a row of `half_life_sessions` before the newest counts half, (n,)."""
    sessions, position = np.unique(train.date, return_inverse=True)
    age = len(sessions) - 1 - position
    return np.asarray(0.5 ** (age / half_life_sessions), dtype=np.float64)


def drift_by_symbol(train: Dataset, weights: FloatArray) -> tuple[dict[str, float], float]:
    """Return the drift by symbol and of the panel, in units of the h-day volatility.

    Posterior means: the panel's weighted mean target, shrunk by its standard error towards what is believed
    of markets, see `USUAL_DRIFT`; each symbol's, beside all symbols of the same sessions, towards none.
    """
    target, h, k = train.target_scaled, train.horizon_bars, len(np.unique(train.symbol_code))
    session = np.unique(train.date, return_inverse=True)[1]
    beside = target - (np.bincount(session, weights=target) / np.bincount(session))[session]

    def known(values: FloatArray, rows: IntArray, prior_variance: float) -> float:
        """Return the weighted mean of the values in some rows, shrunk towards zero."""
        weight = weights[rows] / weights[rows].sum()
        mean = float(weight @ values[rows])
        share = np.bincount(session[rows], weights=weight)
        by_session = np.bincount(session[rows], weights=weight * (values[rows] - mean))
        # Of rows that are few beside the length of their labels the error comes out near zero.
        least = LEAST_SESSION_VARIANCE * h * float(share @ share)
        error = max(overlap_error(by_session.astype(np.float64), h) ** 2, least)
        return mean * prior_variance / (prior_variance + error)

    usual, apart = USUAL_DRIFT * h**0.5, h * SYMBOL_DRIFT_STD**2
    panel = usual + known(target - usual, np.arange(len(target)), h * MARKET_DRIFT_STD**2 + apart / k)
    drifts = {}
    for code, name in enumerate(train.symbols):
        own = np.flatnonzero(train.symbol_code == code)
        if len(own):
            drifts[name] = panel + (known(beside, own, apart * (1 - 1 / k)) if k > 1 else 0.0)
    return drifts, panel


def training_rows(train: Dataset, scaled: FloatMatrix, config: RowsConfig) -> Rows:
    """Return rows to fit on: targets winsorised, without their means and the common move's share.

    What is taken off is what these rows had, not the drift that is forecast: trees would spend themselves on
    what a drift leaves of a mean.
    """
    limit, weight = config.target_limit_sigma, sample_weights(train, config.weight_half_life_sessions)
    target = np.clip(train.target_scaled, -limit, limit) - mean_by_row(train, weight)
    return Rows(
        features=scaled,
        target_scaled=target - config.common_move_share * common_move(target, train.date),
        weight=weight,
        date=train.date,
        label_end_position=np.searchsorted(train.date, train.label_end),
        horizon_bars=train.horizon_bars,
    )


def mean_by_row(train: Dataset, weights: FloatArray) -> FloatArray:
    """Return the weighted mean target of each row's symbol, that of a short one nearer the panel's, (n,)."""
    target, code, k = train.target_scaled, train.symbol_code, len(train.symbols)
    mean = float(np.average(target, weights=weights))
    count, weight = np.bincount(code, minlength=k), np.bincount(code, weights=weights, minlength=k)
    own = np.bincount(code, weights=weights * (target - mean), minlength=k) / np.maximum(weight, 1e-300)
    trust = np.ones(1) if k == 1 else count / (count + HALF_TRUST_ROWS)
    return np.asarray(mean + (trust * own)[code], dtype=np.float64)


def common_move(target: FloatArray, date: DateArray) -> FloatArray:
    """Return the mean target of each row's session, times (k - 1) / k of its k symbols: 0 for one alone."""
    session = np.unique(date, return_inverse=True)[1]
    total, count = np.bincount(session, weights=target), np.bincount(session)
    return np.asarray((total / count * (count - 1) / count)[session], dtype=np.float64)


def evidence(
    record: pd.DataFrame,
    models: tuple[str, ...],
    drifts: Mapping[str, float],
    drift: float,
    horizon_bars: int,
) -> tuple[dict[str, float], Calibration, dict[str, Calibration]]:
    """Weigh the models and calibrate their signal on the resolved rows of a walk-forward record.

    ``drifts`` by symbol, and ``drift`` of the panel, are the forecasts of a model without skill, in
    volatilities. Returns weights by model, the panel's calibration, and the calibration by symbol.
    """
    names = ["date", "symbol", "realised_log", "sigma_log", "raw_scaled", *(f"model_{one}" for one in models)]
    # Before the first fold the record has neither rows nor columns.
    resolved = record.reindex(columns=names).dropna(subset=["realised_log"])
    realised = np.asarray(resolved["realised_log"] / resolved["sigma_log"], dtype=np.float64)
    raw, *said = (np.asarray(resolved[name], dtype=np.float64) for name in names[4:])
    session = pd.factorize(resolved["date"], sort=True)[0]
    pooled = calibrate(raw, realised, drift=drift, horizon_bars=horizon_bars, session_code=session)
    near = partial(calibrate, horizon_bars=horizon_bars, prior_slope=pooled.slope, prior_std=SYMBOL_SLOPE_STD)
    own = dict.fromkeys(drifts, pooled)
    # Of a panel, each symbol by its own rows, shrunk towards the pooled slope; with few, as the panel.
    for name, mean in drifts.items() if len(drifts) > 1 else ():
        rows = np.flatnonzero(resolved["symbol"] == name)
        code = np.unique(session[rows], return_inverse=True)[1]
        one = near(raw[rows], realised[rows], drift=mean, session_code=code)
        own[name] = one if len(rows) / horizon_bars >= MIN_INDEPENDENT else replace(pooled, drift=mean)
    return shrunk_weights(dict(zip(models, said, strict=True)), realised), pooled, own


def chooser(train: Dataset, config: RowsConfig) -> Callable[[Rows], tuple[int, ...]]:
    """Return what chooses the features to fit on: `screen` for one symbol, all of them for a panel.

    The rows of a panel are enough for all features; those of one symbol are not.
    """
    if len(train.symbols) > 1:
        return all_columns
    return partial(screen, least_t=config.screen_t, share=config.screen_share)


def screen(rows: Rows, least_t: float, share: float) -> tuple[int, ...]:
    """Return the features that stand out alone, ascending; all of them where none does.

    Each feature is tested by itself, as it is and as its distance from its middle (so that an even
    relation counts), with products summed over the symbols of a session, and with the standard error of
    labels that overlap. Where the strongest passes ``least_t``, the features with at least ``share`` of its
    t-value are kept: with few independent rows, sixty columns of noise would drown it.
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
        # Where nothing is known of the news, the middle says as little.
        known = np.nan_to_num(rows.features[:, column].astype(np.float64))
        plain = np.clip(known, -SCREEN_LIMIT, SCREEN_LIMIT)
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
    """Keep the ``max_features`` columns that move the boosters most, by SHAP values on drawn rows.

    The boosters were fitted on the scaled training rows ``features`` (n, p). Mean absolute SHAP values are
    stable from a few hundred ``sample_rows`` on.
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
    shares = [part / part.sum() if part.sum() > 0 else np.full(n_columns, 1.0 / n_columns) for part in parts]
    importance = np.mean(shares, axis=0)
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


def direction_weights(target: FloatMatrix) -> FloatMatrix:
    """Return weights, (n,), by which rises and falls together weigh alike."""
    rises = target[:, 0] > 0
    share = float(np.clip(rises.mean(), 0.01, 0.99))
    return np.where(rises, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)
