"""Tune and fit the boosters on prepared rows: binned once, stopped early, pruned, seeded.

Everything here sees training rows only. A setting is judged on inner blocks the way the outer walk-forward
judges the recipe.

Each library has a *careful* setting, few small trees with large leaves, which grow with the rows. The best of
many trials is the luckiest of many trials: a tuned setting is used only where it beats the careful one on the
inner blocks by more than `EARNED_T` standard errors; both are scored as they would be used.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import log2
from typing import Any, NamedTuple, TypeVar

import lightgbm
import numpy as np
import optuna
import xgboost

from data.data_splitter import DateArray, PurgedTimeSeriesSplit
from evaluation.metrics import overlap_error
from inference.intervals import FloatArray, FloatMatrix, IntArray
from inference.load_gbm_models import Booster, predict_booster
from utils.base import UsageError

Params = Mapping[str, float | int]
T = TypeVar("T")

MAX_BIN = 64  # 1.7 to 2.8 times faster than 256 at no loss on return data
STOP_AFTER_ROUNDS = 20
CAREFUL_RATE, CAREFUL_ROUNDS = 0.03, 60
EARNED_T = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Training rows as the boosters want them.

    Scaled features, float32, (n, p); the volatility-scaled and winsorised target, sample weights, sessions,
    ascending, and the position of the first row at whose date the label is known, (n,); length of the labels.
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
        by_row = ("features", "target_scaled", "weight", "date", "label_end_position")
        return replace(self, **{name: getattr(self, name)[index] for name in by_row})

    def with_columns(self, columns: tuple[int, ...]) -> "Rows":
        """Return the rows with the features at ``columns``."""
        if columns == tuple(range(self.features.shape[1])):
            return self
        return replace(self, features=np.ascontiguousarray(self.features[:, list(columns)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How the boosters are searched and fitted.

    ``n_trials`` settings are drawn for each library (0: the careful ones as they are) and scored on
    ``n_inner_blocks`` purged blocks, which stop them early, after ``max_rounds`` at most. Only XGBoost is
    fitted on ``device``, ``cpu`` or ``cuda``. Results do not depend on ``threads``.
    """

    n_trials: int = 30
    n_inner_blocks: int = 3
    max_rounds: int = 400
    models: tuple[str, ...] = ("xgb", "lgb")
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse libraries that nobody knows, or that are named twice."""
        if not self.models or len({*self.models} & {*LIBRARIES}) < len(self.models):
            raise UsageError(f"models {self.models}: name each of {', '.join(LIBRARIES)} at most once")


# Names the columns to fit on, ascending, from the rows to fit.
Chooser = Callable[[Rows], tuple[int, ...]]


def all_columns(rows: Rows) -> tuple[int, ...]:
    """Choose every column."""
    return tuple(range(rows.features.shape[1]))


class Fitting(NamedTuple):
    """How a booster is fitted, whatever its parameters."""

    seed: int
    threads: int
    device: str


def _shared(trial: optuna.Trial, *names: str) -> dict[str, float]:
    """Draw what every library is asked first, in one order; ``names`` are what it calls them."""
    drawn = (
        trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        trial.suggest_float("subsample", 0.6, 1.0),
        trial.suggest_float("colsample_bytree", 0.5, 1.0),
        trial.suggest_float("reg_alpha", 1e-4, 1.0, log=True),
        trial.suggest_float("reg_lambda", 1e-4, 1.0, log=True),
    )
    return dict(zip(names, drawn, strict=False))


class _XGBoost:
    """What every library is asked.

    To draw parameters (``suggest``); a setting of trees of so many leaves of so many rows (``careful``); rows
    in its own form, with the bins of ``like`` (``bin``); a fit of so many rounds, or until ``score`` stops it
    (``fit``); the best error on the rows that stopped it, and after how many rounds (``stopped``).
    """

    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        return {
            **_shared(trial, "eta", "subsample", "colsample_bytree", "alpha", "lambda"),
            "max_depth": trial.suggest_int("max_depth", 3, 8),
            "min_child_weight": trial.suggest_float("min_child_weight", 1.0, 10.0),
        }

    def careful(self, leaves: int, leaf_rows: int) -> Params:
        trees = {"max_depth": round(log2(leaves)), "min_child_weight": leaf_rows / 2}
        shares = {"subsample": 0.7, "colsample_bytree": 0.5, "alpha": 0.0, "lambda": 1.0}
        return {"eta": CAREFUL_RATE, **trees, **shares}

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        return xgboost.QuantileDMatrix(
            rows.features, rows.target_scaled, weight=rows.weight, max_bin=MAX_BIN, ref=like, nthread=1
        )

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting, score: Any = None) -> Booster:  # noqa: ANN401
        asked = {"objective": "reg:squarederror", "tree_method": "hist", "max_bin": MAX_BIN}
        run = {"device": how.device, "nthread": how.threads, "seed": how.seed, "verbosity": 0}
        scored, stop = ([], None) if score is None else ([(score, "score")], STOP_AFTER_ROUNDS)
        settings = {**params, **asked, **run, "base_score": 0.0}
        return xgboost.train(
            settings, binned, rounds, evals=scored, early_stopping_rounds=stop, verbose_eval=False
        )

    def stopped(self, model: Any) -> tuple[float, int]:  # noqa: ANN401
        return float(model.best_score), int(model.best_iteration) + 1


class _LightGBM:
    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        names = "learning_rate", "bagging_fraction", "feature_fraction", "lambda_l1", "lambda_l2"
        scale = max(1, n_rows // 10_000)
        return {
            **_shared(trial, *names),
            "max_depth": trial.suggest_int("max_depth", 3, 8),
            "num_leaves": trial.suggest_int("num_leaves", 20, 150),
            "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 5 * scale, 50 * scale),
        }

    def careful(self, leaves: int, leaf_rows: int) -> Params:
        trees = {"max_depth": -1, "num_leaves": leaves, "min_data_in_leaf": leaf_rows}
        shares = {"bagging_fraction": 0.7, "feature_fraction": 0.5, "lambda_l1": 0.0, "lambda_l2": 1.0}
        return {"learning_rate": CAREFUL_RATE, **trees, **shares}

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401
        how = {"max_bin": MAX_BIN - 1, "verbosity": -1, "num_threads": 1, "feature_pre_filter": False}
        data = lightgbm.Dataset(rows.features, rows.target_scaled, like, weight=rows.weight, params=how)
        return data.construct()

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting, score: Any = None) -> Booster:  # noqa: ANN401
        asked = {"objective": "regression", "boost_from_average": False, "bagging_freq": 1}
        run = {"num_threads": how.threads, "seed": how.seed, "deterministic": True, "force_col_wise": True}
        settings = {**params, **asked, **run, "verbosity": -1}
        if score is None:
            return lightgbm.train(settings, binned, rounds)
        stop = lightgbm.early_stopping(STOP_AFTER_ROUNDS, verbose=False)
        settings["metric"] = "rmse"
        return lightgbm.train(settings, binned, rounds, [score], ["score"], callbacks=[stop])

    def stopped(self, model: Any) -> tuple[float, int]:  # noqa: ANN401
        return float(model.best_score["score"]["rmse"]), int(model.best_iteration)


class _CatBoost:
    def suggest(self, trial: optuna.Trial, n_rows: int) -> Params:
        return {
            **_shared(trial, "learning_rate", "subsample", "rsm"),
            "depth": trial.suggest_int("max_depth", 3, 8),
            "l2_leaf_reg": 1.0 + 100.0 * trial.params["reg_lambda"],
        }

    def careful(self, leaves: int, leaf_rows: int) -> Params:
        trees = {"depth": round(log2(leaves)), "l2_leaf_reg": leaf_rows / 2}
        return {"learning_rate": CAREFUL_RATE, "subsample": 0.7, "rsm": 0.5, **trees}

    def bin(self, rows: Rows, like: Any = None) -> Any:  # noqa: ANN401 - it bins when it trains
        return catboost().Pool(rows.features, rows.target_scaled, weight=rows.weight)

    def fit(self, params: Params, binned: Any, rounds: int, how: Fitting, score: Any = None) -> Booster:  # noqa: ANN401
        asked = {"loss_function": "RMSE", "bootstrap_type": "Bernoulli", "boost_from_average": False}
        trees = {"iterations": rounds, "border_count": MAX_BIN, "random_seed": how.seed}
        run = {"thread_count": how.threads, "allow_writing_files": False, "logging_level": "Silent"}
        if score is not None:
            run |= {"od_type": "Iter", "od_wait": STOP_AFTER_ROUNDS, "use_best_model": True}
        model: Booster = catboost().train(binned, {**params, **asked, **trees, **run}, eval_set=score)
        return model

    def stopped(self, model: Any) -> tuple[float, int]:  # noqa: ANN401
        return float(model.best_score_["validation"]["RMSE"]), int(model.tree_count_)


def catboost() -> Any:  # noqa: ANN401
    """Import CatBoost; `UsageError` where it is not installed."""
    try:
        import catboost as library  # noqa: PLC0415 - large, and only there when asked for
    except ImportError as error:
        told = "CatBoost was asked for and is not installed: pip install -e '.[catboost]'"
        raise UsageError(told) from error
    return library


Library = _XGBoost | _LightGBM | _CatBoost
LIBRARIES: Mapping[str, Library] = {"xgb": _XGBoost(), "lgb": _LightGBM(), "cat": _CatBoost()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The setting to fit with, careful where nothing was searched, or nothing better was found.

    ``inner_rmse`` is the best trial's on the inner blocks, None without a search; ``trials`` are plain data.
    """

    params: Params
    rounds: int
    is_careful: bool
    inner_rmse: float | None = None
    trials: tuple[Mapping[str, object], ...] = ()


def careful(name: str, n_rows: int, horizon_bars: int) -> Tuned:
    """Return a library's careful setting: trees of 4 leaves for a short history, of 31 for a large panel."""
    # Overlapping labels repeat each other.
    leaf_rows = 100 + n_rows * horizon_bars // 1000
    leaves = int(np.clip(round(np.sqrt(n_rows / leaf_rows)), 4, 31))
    params = LIBRARIES[name].careful(leaves, leaf_rows)
    return Tuned(params=params, rounds=CAREFUL_ROUNDS, is_careful=True)


def fit_boosters(
    rows: Rows, tuned: Mapping[str, Tuned], config: SearchConfig, seed: int
) -> dict[str, Booster]:
    """Fit every library with its setting; libraries run side by side."""
    how = Fitting(seed, config.threads, config.device)

    def fit(name: str) -> Booster:
        library, found = LIBRARIES[name], tuned[name]
        return library.fit(found.params, library.bin(rows), found.rounds, how)

    return _side_by_side(fit, config.models)


def _side_by_side(job: Callable[[str], T], names: Sequence[str]) -> dict[str, T]:
    """Do a job for every name, in threads; the boosters release the GIL, and each job is seeded by itself."""
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        return dict(zip(names, pool.map(job, names), strict=True))


def inner_blocks(rows: Rows, config: SearchConfig, choose: Chooser = all_columns) -> list[tuple[Rows, Rows]]:
    """Split training rows into (fit, score) blocks: expanding, purged by label end, over the later half.

    The columns of a block are those that ``choose`` names when it sees the rows to fit alone.
    """
    size = len(rows) // (2 * config.n_inner_blocks)
    splitter = PurgedTimeSeriesSplit(config.n_inner_blocks, test_size_bars=size)
    blocks = []
    for fit_index, score_index in splitter.split(len(rows), rows.label_end_position, date=rows.date):
        fit = rows.take(fit_index)
        columns = choose(fit)
        blocks.append((fit.with_columns(columns), rows.take(score_index).with_columns(columns)))
    return blocks


def search(name: str, rows: Rows, config: SearchConfig, seed: int, choose: Chooser = all_columns) -> Tuned:
    """Search one library's parameters on inner blocks of the training rows, see `inner_blocks`.

    The best trial is returned where it has earned its place, else the careful setting; the same seed draws
    the same trials, and nothing after ``rows`` is seen.
    """
    fallback = careful(name, len(rows), rows.horizon_bars)
    if config.n_trials == 0:
        return fallback
    library, how = LIBRARIES[name], Fitting(seed, config.threads, config.device)
    inner = ((library.bin(fit), score) for fit, score in inner_blocks(rows, config, choose))
    blocks = [(binned, library.bin(score, binned), score) for binned, score in inner]

    def objective(trial: optuna.Trial) -> float:
        params = library.suggest(trial, len(rows))
        scores, rounds = [], []
        for step, (fit, score, _score_rows) in enumerate(blocks):
            rmse, best_round = library.stopped(library.fit(params, fit, config.max_rounds, how, score))
            scores.append(rmse)
            rounds.append(best_round)
            trial.report(float(np.mean(scores)), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("params", params)
        trial.set_user_attr("rounds", max(1, round(float(np.mean(rounds)))))
        return float(np.mean(scores))

    sampler, pruner = optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=config.n_trials)
    best = study.best_trial.user_attrs
    found = Tuned(params=best["params"], rounds=best["rounds"], is_careful=False)
    is_earned = _gain_t(library, blocks, found, fallback, how) > EARNED_T
    trials = tuple(_trial_record(name, trial) for trial in study.trials)
    return replace(found if is_earned else fallback, inner_rmse=float(study.best_value), trials=trials)


def _gain_t(
    library: Library, blocks: list[tuple[Any, Any, Rows]], found: Tuned, rival: Tuned, how: Fitting
) -> float:
    """Return by how many standard errors ``found`` has the smaller squared error on the inner blocks."""
    by_session = []
    for fit, _score, rows in blocks:
        errors = []
        for setting in (rival, found):
            model = library.fit(setting.params, fit, setting.rounds, how)
            errors.append((rows.target_scaled - predict_booster(model, rows.features)) ** 2)
        session = np.unique(rows.date, return_inverse=True)[1]
        by_session.append(np.bincount(session, weights=rows.weight * (errors[0] - errors[1])))
    saved: FloatArray = np.concatenate(by_session)
    error = overlap_error(saved - saved.mean(), blocks[0][2].horizon_bars)
    return float(np.sum(saved) / error) if error > 0 else 0.0


def _trial_record(name: str, trial: optuna.trial.FrozenTrial) -> dict[str, object]:
    return {
        "model": name,
        "number": trial.number,
        "state": trial.state.name.lower(),
        "inner_rmse": trial.intermediate_values.get(0) if trial.value is None else trial.value,
        "rounds": trial.user_attrs.get("rounds"),
        **trial.params,
    }


def tune(rows: Rows, config: SearchConfig, seed: int, choose: Chooser = all_columns) -> dict[str, Tuned]:
    """Search every library of ``config``; libraries run side by side, each with its own seeded study."""
    # Optuna announces each trial at INFO on its own handler; the trials are recorded in the bundle instead.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _side_by_side(lambda name: search(name, rows, config, seed, choose), config.models)


def probe_cuda() -> str | None:
    """Train one round of XGBoost on CUDA and read the device back; say what is missing, None where it works.

    XGBoost asked for CUDA where there is none trains on the CPU, at ``verbosity=0`` without a word.
    """
    rows = np.linspace(0.0, 1.0, 64, dtype=np.float32).reshape(32, 2)
    params = {"device": "cuda", "tree_method": "hist", "max_depth": 1, "nthread": 1, "verbosity": 0}
    version = xgboost.__version__
    try:
        # The warning about the fallback is what the answer says.
        with warnings.catch_warnings(action="ignore"):
            booster = xgboost.train(params, xgboost.DMatrix(rows, rows[:, 0]), num_boost_round=1)
    except xgboost.core.XGBoostError as error:
        return f"XGBoost {version} says: {str(error).strip().partition(chr(10))[0]}"
    used = device_of(booster)
    if used.startswith("cuda"):
        return None
    if not xgboost.build_info().get("USE_CUDA"):
        return f"this build of XGBoost {version} has no CUDA"
    return f"XGBoost {version} finds no CUDA device and trained on {used!r}"


def device_of(booster: xgboost.Booster) -> str:
    """Return the device that a booster was last used on, as its own configuration tells."""
    return str(json.loads(booster.save_config())["learner"]["generic_param"]["device"])


def probe_lightgbm_opencl() -> str | None:
    """Train one round of LightGBM on OpenCL; say what is missing. It informs only: its sums change order."""
    rows = np.linspace(0.0, 1.0, 64, dtype=np.float64).reshape(32, 2)
    params = {"device_type": "gpu", "min_data_in_leaf": 1, "num_threads": 1, "verbosity": -1}
    try:
        lightgbm.train(params, lightgbm.Dataset(rows, rows[:, 0]), num_boost_round=1)
    except lightgbm.basic.LightGBMError as error:
        return f"LightGBM {lightgbm.__version__} says: {str(error).strip().partition(chr(10))[0]}"
    return None
