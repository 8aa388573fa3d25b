"""The boosting libraries behind one small interface: what to draw, how to bin, how to train.

Each library has a *careful* setting, few small trees with large leaves, that is used as it stands unless the
search finds a better one. It grows with the rows: a panel can carry more leaves than one symbol. Which
features they are given is said by `screen` and, once they were fitted, by `select_features`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import lightgbm
import numpy as np
import numpy.typing as npt
import optuna
import xgboost

from inference.ensemble import FloatArray, FloatMatrix, overlap_error
from inference.load_gbm_models import Booster, shap_values
from utils.errors import UsageError

logger = logging.getLogger(__name__)

Params = Mapping[str, float | int]
IntArray = npt.NDArray[np.intp]
DateArray = npt.NDArray[np.datetime64]

MAX_BIN = 64  # 1.7 to 2.8 times faster than 256 at no loss on return data
STOP_AFTER_ROUNDS = 20
CAREFUL_RATE = 0.03
# Scaled features beyond this count as this much when they are screened.
SCREEN_LIMIT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Training rows as the boosters want them.

    Attributes
    ----------
    features
        Scaled features, float32, (n, p).
    target_scaled
        Volatility-scaled and winsorised target, (n,).
    weight
        Sample weights, (n,).
    date
        Session of each row, ascending, (n,).
    label_end_position
        For each row, the position of the first row at whose date the label is known, (n,).
    horizon_bars
        Length of the labels.
    """

    features: FloatMatrix
    target_scaled: FloatArray
    weight: FloatArray
    date: DateArray
    label_end_position: IntArray
    horizon_bars: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.target_scaled)

    def take(self, index: IntArray) -> "Rows":
        """Return the rows at ``index``."""
        return Rows(
            features=self.features[index],
            target_scaled=self.target_scaled[index],
            weight=self.weight[index],
            date=self.date[index],
            label_end_position=self.label_end_position[index],
            horizon_bars=self.horizon_bars,
        )

    def with_columns(self, columns: tuple[int, ...]) -> "Rows":
        """Return the rows with the features at ``columns``."""
        if columns == tuple(range(self.features.shape[1])):
            return self
        return Rows(
            features=np.ascontiguousarray(self.features[:, list(columns)]),
            target_scaled=self.target_scaled,
            weight=self.weight,
            date=self.date,
            label_end_position=self.label_end_position,
            horizon_bars=self.horizon_bars,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """How a booster is fitted, whatever its parameters: seed, threads, device (``cpu`` or ``cuda``)."""

    seed: int
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A fit that was stopped early: its best score on the rows that it was scored on, and when."""

    rmse: float
    rounds: int


class Library(Protocol):
    """A boosting library."""

    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        """Draw parameters."""
        ...

    def careful(self, n_rows: int, horizon_bars: int) -> Params:
        """Return the setting that a search has to beat."""
        ...

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        """Return the rows in the library's own binned form; ``like`` shares its bins."""
        ...

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting) -> Booster:  # noqa: ANN401
        """Fit for so many rounds."""
        ...

    def fit_stopped(self, params: Params, binned: Any, score: Any, rounds: int, how: Fitting) -> Stopped:  # noqa: ANN401
        """Fit until the score on ``score`` has not improved for `STOP_AFTER_ROUNDS` rounds."""
        ...


def careful_leaf_rows(n_rows: int, horizon_bars: int) -> int:
    """Return how many rows a leaf holds at least; overlapping labels repeat each other."""
    return 100 + n_rows * horizon_bars // 1000


def careful_leaves(n_rows: int, horizon_bars: int) -> int:
    """Return how many leaves a tree may have: 4 for a short history, 31 for a large panel."""
    return int(np.clip(round(np.sqrt(n_rows / careful_leaf_rows(n_rows, horizon_bars))), 4, 31))


def careful_depth(n_rows: int, horizon_bars: int) -> int:
    """Return the depth at which a full tree has about as many leaves."""
    return round(float(np.log2(careful_leaves(n_rows, horizon_bars))))


def _shared(trial: optuna.Trial) -> dict[str, float]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        "subsample": trial.suggest_float("subsample", 0.6, 1.0),
        "colsample_bytree": trial.suggest_float("colsample_bytree", 0.5, 1.0),
        "reg_alpha": trial.suggest_float("reg_alpha", 1e-4, 1.0, log=True),
        "reg_lambda": trial.suggest_float("reg_lambda", 1e-4, 1.0, log=True),
    }


class XGBoostLibrary:
    """XGBoost's histogram trees."""

    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        """Draw parameters."""
        shared = _shared(trial)
        return {
            "eta": shared["learning_rate"],
            "max_depth": trial.suggest_int("max_depth", 3, 8),
            "subsample": shared["subsample"],
            "colsample_bytree": shared["colsample_bytree"],
            "min_child_weight": trial.suggest_float("min_child_weight", 1.0, 10.0),
            "alpha": shared["reg_alpha"],
            "lambda": shared["reg_lambda"],
        }

    def careful(self, n_rows: int, horizon_bars: int) -> Params:
        """Return the setting that a search has to beat."""
        return {
            "eta": CAREFUL_RATE,
            "max_depth": careful_depth(n_rows, horizon_bars),
            "subsample": 0.7,
            "colsample_bytree": 0.5,
            "min_child_weight": careful_leaf_rows(n_rows, horizon_bars) / 2,
            "alpha": 0.0,
            "lambda": 1.0,
        }

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        """Return a quantile matrix."""
        return xgboost.QuantileDMatrix(
            rows.features, rows.target_scaled, weight=rows.weight, max_bin=MAX_BIN, ref=like, nthread=1
        )

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting) -> Booster:  # noqa: ANN401
        """Fit for so many rounds."""
        return xgboost.train(self._params(params, how), binned, num_boost_round=rounds)

    def fit_stopped(self, params: Params, binned: Any, score: Any, rounds: int, how: Fitting) -> Stopped:  # noqa: ANN401
        """Fit until the score stops improving."""
        booster = xgboost.train(
            self._params(params, how),
            binned,
            num_boost_round=rounds,
            evals=[(score, "score")],
            early_stopping_rounds=STOP_AFTER_ROUNDS,
            verbose_eval=False,
        )
        return Stopped(rmse=float(booster.best_score), rounds=int(booster.best_iteration) + 1)

    def _params(self, params: Params, how: Fitting) -> dict[str, object]:
        return {
            **params,
            "objective": "reg:squarederror",
            "tree_method": "hist",
            "max_bin": MAX_BIN,
            "device": how.device,
            "nthread": how.threads,
            "seed": how.seed,
            "base_score": 0.0,
            "verbosity": 0,
        }


class LightGBMLibrary:
    """LightGBM's leaf-wise trees."""

    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        """Draw parameters; the leaf size grows with the rows of a panel."""
        shared = _shared(trial)
        scale = max(1, n_rows // 10_000)
        return {
            "learning_rate": shared["learning_rate"],
            "max_depth": trial.suggest_int("max_depth", 3, 8),
            "num_leaves": trial.suggest_int("num_leaves", 20, 150),
            "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 5 * scale, 50 * scale),
            "bagging_fraction": shared["subsample"],
            "feature_fraction": shared["colsample_bytree"],
            "lambda_l1": shared["reg_alpha"],
            "lambda_l2": shared["reg_lambda"],
        }

    def careful(self, n_rows: int, horizon_bars: int) -> Params:
        """Return the setting that a search has to beat."""
        return {
            "learning_rate": CAREFUL_RATE,
            "max_depth": -1,
            "num_leaves": careful_leaves(n_rows, horizon_bars),
            "min_data_in_leaf": careful_leaf_rows(n_rows, horizon_bars),
            "bagging_fraction": 0.7,
            "feature_fraction": 0.5,
            "lambda_l1": 0.0,
            "lambda_l2": 1.0,
        }

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        """Return a constructed dataset, without the raw features."""
        dataset = lightgbm.Dataset(
            rows.features,
            rows.target_scaled,
            weight=rows.weight,
            reference=like,
            params={"max_bin": MAX_BIN - 1, "verbosity": -1, "num_threads": 1, "feature_pre_filter": False},
            free_raw_data=True,
        )
        return dataset.construct()

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting) -> Booster:  # noqa: ANN401
        """Fit for so many rounds."""
        return lightgbm.train(self._params(params, how), binned, num_boost_round=rounds)

    def fit_stopped(self, params: Params, binned: Any, score: Any, rounds: int, how: Fitting) -> Stopped:  # noqa: ANN401
        """Fit until the score stops improving."""
        booster = lightgbm.train(
            {**self._params(params, how), "metric": "rmse"},
            binned,
            num_boost_round=rounds,
            valid_sets=[score],
            valid_names=["score"],
            callbacks=[lightgbm.early_stopping(STOP_AFTER_ROUNDS, verbose=False)],
        )
        return Stopped(rmse=float(booster.best_score["score"]["rmse"]), rounds=int(booster.best_iteration))

    def _params(self, params: Params, how: Fitting) -> dict[str, object]:
        return {
            **params,
            "objective": "regression",
            "boost_from_average": False,
            "bagging_freq": 1,
            "num_threads": how.threads,
            "seed": how.seed,
            "deterministic": True,
            "force_col_wise": True,
            "verbosity": -1,
        }


class CatBoostLibrary:
    """CatBoost's symmetric trees; needs the extra ``catboost``."""

    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        """Draw parameters."""
        shared = _shared(trial)
        return {
            "learning_rate": shared["learning_rate"],
            "depth": trial.suggest_int("max_depth", 3, 8),
            "subsample": shared["subsample"],
            "rsm": shared["colsample_bytree"],
            "l2_leaf_reg": 1.0 + 100.0 * shared["reg_lambda"],
        }

    def careful(self, n_rows: int, horizon_bars: int) -> Params:
        """Return the setting that a search has to beat."""
        return {
            "learning_rate": CAREFUL_RATE,
            "depth": careful_depth(n_rows, horizon_bars),
            "subsample": 0.7,
            "rsm": 0.5,
            "l2_leaf_reg": careful_leaf_rows(n_rows, horizon_bars) / 2,
        }

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        """Return a pool; CatBoost bins it when it trains."""
        return catboost().Pool(rows.features, rows.target_scaled, weight=rows.weight)

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting) -> Booster:  # noqa: ANN401
        """Fit for so many rounds."""
        model: Booster = catboost().train(binned, self._params(params, rounds, how))
        return model

    def fit_stopped(self, params: Params, binned: Any, score: Any, rounds: int, how: Fitting) -> Stopped:  # noqa: ANN401
        """Fit until the score stops improving."""
        stopping = {"od_type": "Iter", "od_wait": STOP_AFTER_ROUNDS, "use_best_model": True}
        model = catboost().train(binned, {**self._params(params, rounds, how), **stopping}, eval_set=score)
        return Stopped(rmse=float(model.best_score_["validation"]["RMSE"]), rounds=int(model.tree_count_))

    def _params(self, params: Params, rounds: int, how: Fitting) -> dict[str, object]:
        return {
            **params,
            "iterations": rounds,
            "loss_function": "RMSE",
            "bootstrap_type": "Bernoulli",
            "boost_from_average": False,
            "border_count": MAX_BIN,
            "random_seed": how.seed,
            "thread_count": how.threads,
            "allow_writing_files": False,
            "logging_level": "Silent",
        }


def catboost() -> Any:  # noqa: ANN401
    """Import CatBoost.

    Raises
    ------
    UsageError
        When it is not installed.
    """
    try:
        import catboost as library  # noqa: PLC0415 - large, and only there when asked for
    except ImportError as error:
        raise UsageError(
            "CatBoost was asked for and is not installed: pip install -e '.[catboost]'"
        ) from error
    return library


LIBRARIES: Mapping[str, Library] = {
    "xgb": XGBoostLibrary(),
    "lgb": LightGBMLibrary(),
    "cat": CatBoostLibrary(),
}


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
