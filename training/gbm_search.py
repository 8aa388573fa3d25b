"""Tune and fit the boosters on prepared rows: binned once, stopped early, pruned, seeded.

Everything here sees training rows only. Inner blocks come after their inner training rows and are purged by
label end, so the search judges a setting the way the outer walk-forward judges the recipe.

The best of many trials is the luckiest of many trials. A tuned setting is therefore used only where it beats
the library's careful setting on the inner blocks by more than `EARNED_T` standard errors; both are scored as
they would be used, for a fixed number of rounds.

Which device they are fitted on is probed: XGBoost asked for CUDA where there is none trains on the CPU,
without an error and, at ``verbosity=0``, without a word. One round is trained and the device is read back.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import lightgbm
import numpy as np
import optuna
import xgboost

from data.data_splitter import PurgedTimeSeriesSplit
from inference.ensemble import FloatArray, overlap_error
from inference.load_gbm_models import Booster, predict_booster
from training.libraries import LIBRARIES, Fitting, Library, Params, Rows
from utils.errors import DeviceError, UsageError

Device = Literal["cpu", "cuda"]
Requested = Literal["auto", "cpu", "cuda"]
# A probe returns what is missing, in words; None where the device works.
Probe = Callable[[], str | None]

# Rows x features from which `auto` asks for a GPU. Below it a fit takes a second or less on one core, which
# is what starting CUDA and copying the rows cost before the first tree; not measured on a GPU yet.
AUTO_CELLS = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """A device, and in words why it was chosen; both are recorded with the model."""

    device: Device
    reason: str


def choose_device(
    requested: Requested,
    n_rows: int,
    n_features: int,
    *,
    require_gpu: bool = False,
    allow_cpu_fallback: bool = False,
    models: Sequence[str] = ("xgb",),
    probe: Probe | None = None,
    probe_lightgbm: Probe | None = None,
) -> DeviceChoice:
    """Decide where XGBoost trains; the other libraries stay on the CPU.

    Parameters
    ----------
    requested
        ``cpu``; ``cuda``; or ``auto``: the GPU from `AUTO_CELLS` on, where there is one.
    n_rows, n_features
        Size of the training set.
    require_gpu
        A GPU whatever the size, or an error.
    allow_cpu_fallback
        With ``cuda``: the CPU where there is no GPU, instead of an error.
    models
        The libraries that are trained; without ``xgb`` there is nothing to decide.
    probe, probe_lightgbm
        Tell what is missing; `probe_cuda` and `probe_lightgbm_opencl` unless a test says otherwise.

    Raises
    ------
    UsageError
        When the wishes contradict each other.
    DeviceError
        When a GPU was asked for and there is none.
    """
    if require_gpu:
        _refuse_contradictions(requested, models, allow_cpu_fallback=allow_cpu_fallback)
    if "xgb" not in models:
        return DeviceChoice(device="cpu", reason="XGBoost, which alone can use a GPU here, is not asked for")
    if requested == "cpu":
        return DeviceChoice(device="cpu", reason="the CPU was asked for")
    is_wanted = require_gpu or requested == "cuda"
    cells = n_rows * n_features
    size = f"{n_rows:,} rows x {n_features} features"
    if not is_wanted and cells < AUTO_CELLS:
        return DeviceChoice(
            device="cpu", reason=f"{size}: a GPU pays from {AUTO_CELLS / 1e6:g} million cells on"
        )
    missing = (probe or probe_cuda)()
    if missing is None:
        why = "a GPU was asked for" if is_wanted else f"{size}: a GPU pays"
        rest = _rest(models, probe_lightgbm or probe_lightgbm_opencl)
        return DeviceChoice(device="cuda", reason=f"{why}, and a probe trained on it{rest}")
    if is_wanted and not allow_cpu_fallback:
        raise DeviceError(
            f"a GPU was asked for and cannot be used: {missing}; train with --device cpu, or with "
            "--device cuda --allow-cpu-fallback where either will do"
        )
    return DeviceChoice(device="cpu", reason=f"no GPU: {missing}")


def _refuse_contradictions(requested: Requested, models: Sequence[str], *, allow_cpu_fallback: bool) -> None:
    if requested == "cpu" or allow_cpu_fallback:
        other = "--device cpu" if requested == "cpu" else "--allow-cpu-fallback"
        raise UsageError(f"--require-gpu and {other} contradict each other: give one of them")
    if "xgb" not in models:
        raise UsageError("--require-gpu without xgb among the models: only XGBoost trains on a GPU here")


def _rest(models: Sequence[str], probe_lightgbm: Probe) -> str:
    """Say in words why LightGBM is not on the GPU."""
    if "lgb" not in models:
        return ""
    missing = probe_lightgbm()
    return f"; LightGBM stays on the CPU: {missing or 'its OpenCL sums in an order that changes'}"


def probe_cuda() -> str | None:
    """Train one round of XGBoost with ``device='cuda'`` and read the device back; None when it was used."""
    rows = np.linspace(0.0, 1.0, 64, dtype=np.float32).reshape(32, 2)
    params = {"device": "cuda", "tree_method": "hist", "max_depth": 1, "nthread": 1, "verbosity": 0}
    try:
        with warnings.catch_warnings():
            # The warning about the fallback is what the answer says.
            warnings.simplefilter("ignore")
            booster = xgboost.train(params, xgboost.DMatrix(rows, rows[:, 0]), num_boost_round=1)
    except xgboost.core.XGBoostError as error:
        return f"XGBoost {xgboost.__version__} says: {_first_line(error)}"
    used = device_of(booster)
    if used.startswith("cuda"):
        return None
    if not xgboost.build_info().get("USE_CUDA"):
        return f"this build of XGBoost {xgboost.__version__} has no CUDA"
    return f"XGBoost {xgboost.__version__} finds no CUDA device and trained on {used!r}"


def device_of(booster: xgboost.Booster) -> str:
    """Return the device that a booster was last used on, as its own configuration tells."""
    return str(json.loads(booster.save_config())["learner"]["generic_param"]["device"])


def probe_lightgbm_opencl() -> str | None:
    """Train one round of LightGBM on OpenCL; return what is missing, None when it works.

    It informs only: LightGBM stays on the CPU, where its results do not depend on the order of sums.
    """
    rows = np.linspace(0.0, 1.0, 64, dtype=np.float64).reshape(32, 2)
    params = {"device_type": "gpu", "min_data_in_leaf": 1, "num_threads": 1, "verbosity": -1}
    try:
        lightgbm.train(params, lightgbm.Dataset(rows, rows[:, 0]), num_boost_round=1)
    except lightgbm.basic.LightGBMError as error:
        return f"LightGBM {lightgbm.__version__} says: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["nothing"])[0]


T = TypeVar("T")

CAREFUL_ROUNDS = 60
EARNED_T = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How the boosters are searched.

    Attributes
    ----------
    n_trials
        Optuna trials for each library; 0 takes the careful settings as they are.
    n_inner_blocks
        Inner purged blocks that score a trial.
    max_rounds
        Upper bound of boosting rounds; early stopping on the inner block decides.
    models
        Which libraries are fitted, any of ``xgb``, ``lgb``, ``cat``.
    device
        ``cpu`` or ``cuda``, for XGBoost.
    threads
        Threads of one fit; results do not depend on it.
    """

    n_trials: int = 30
    n_inner_blocks: int = 3
    max_rounds: int = 400
    models: tuple[str, ...] = ("xgb", "lgb")
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse libraries that nobody knows."""
        unknown = [name for name in self.models if name not in LIBRARIES]
        if unknown or not self.models or len(set(self.models)) != len(self.models):
            raise UsageError(f"models {self.models}: name each of {', '.join(LIBRARIES)} at most once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Outcome of one library's search.

    Attributes
    ----------
    params, rounds
        The setting to fit with.
    is_careful
        Whether it is the careful one, because nothing was searched or nothing better was found.
    inner_rmse
        Best trial's error on the inner blocks; None where nothing was searched.
    gain_t
        By how many standard errors the best trial beats the careful setting; None where nothing was searched.
    trials
        Every trial as plain data.
    """

    params: Params
    rounds: int
    is_careful: bool
    inner_rmse: float | None = None
    gain_t: float | None = None
    trials: tuple[Mapping[str, object], ...] = ()


def careful(name: str, n_rows: int, horizon_bars: int) -> Tuned:
    """Return a library's careful setting for so many training rows."""
    params = LIBRARIES[name].careful(n_rows, horizon_bars)
    return Tuned(params=params, rounds=CAREFUL_ROUNDS, is_careful=True)


def fit_boosters(
    rows: Rows, tuned: Mapping[str, Tuned], config: SearchConfig, seed: int
) -> dict[str, Booster]:
    """Fit every library with its setting; libraries run side by side."""
    how = _fitting(config, seed)

    def fit(name: str) -> Booster:
        library = LIBRARIES[name]
        return library.fit(tuned[name].params, library.bin(rows), tuned[name].rounds, how)

    return run_side_by_side({name: partial(fit, name) for name in config.models})


def run_side_by_side(jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run independent jobs in threads; the boosters release the GIL, and each job is seeded by itself."""
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def _fitting(config: SearchConfig, seed: int) -> Fitting:
    return Fitting(seed=seed, threads=config.threads, device=config.device)


def inner_blocks(rows: Rows, config: SearchConfig) -> list[tuple[Rows, Rows]]:
    """Split training rows into (fit, score) blocks: expanding, purged by label end, over the later half."""
    splitter = PurgedTimeSeriesSplit(
        config.n_inner_blocks, test_size_bars=len(rows) // (2 * config.n_inner_blocks)
    )
    folds = splitter.split(len(rows), rows.label_end_position, date=rows.date)
    return [(rows.take(fit), rows.take(score)) for fit, score in folds]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One inner block, binned once for all trials."""

    fit: Any
    score: Any
    score_rows: Rows


def _binned_blocks(library: Library, rows: Rows, config: SearchConfig) -> list[_Block]:
    blocks = []
    for fit, score in inner_blocks(rows, config):
        binned = library.bin(fit)
        blocks.append(_Block(fit=binned, score=library.bin(score, binned), score_rows=score))
    return blocks


def search(name: str, rows: Rows, config: SearchConfig, seed: int) -> Tuned:
    """Search one library's parameters on inner blocks of the training rows.

    Parameters
    ----------
    name
        ``xgb``, ``lgb`` or ``cat``.
    rows
        Training rows; nothing after them is seen.
    config, seed
        See `SearchConfig`; the same seed draws the same trials.

    Returns
    -------
    Tuned
        The best trial where it has earned its place, else the careful setting; all trials as plain data.
    """
    fallback = careful(name, len(rows), rows.horizon_bars)
    if config.n_trials == 0:
        return fallback
    library, how = LIBRARIES[name], _fitting(config, seed)
    blocks = _binned_blocks(library, rows, config)

    def objective(trial: optuna.Trial) -> float:
        params = library.suggest(trial, len(rows))
        scores, rounds = [], []
        for step, block in enumerate(blocks):
            stopped = library.fit_stopped(params, block.fit, block.score, config.max_rounds, how)
            scores.append(stopped.rmse)
            rounds.append(stopped.rounds)
            trial.report(float(np.mean(scores)), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("params", params)
        trial.set_user_attr("rounds", max(1, round(float(np.mean(rounds)))))
        return float(np.mean(scores))

    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    study.optimize(objective, n_trials=config.n_trials)
    best = study.best_trial.user_attrs
    found = Tuned(params=best["params"], rounds=best["rounds"], is_careful=False)
    gain_t = _gain_t(library, blocks, found, fallback, how)
    chosen = found if gain_t > EARNED_T else fallback
    return Tuned(
        params=chosen.params,
        rounds=chosen.rounds,
        is_careful=chosen.is_careful,
        inner_rmse=float(study.best_value),
        gain_t=gain_t,
        trials=tuple(_trial_record(name, trial) for trial in study.trials),
    )


def _gain_t(library: Library, blocks: list[_Block], found: Tuned, rival: Tuned, how: Fitting) -> float:
    """Return by how many standard errors ``found`` has the smaller squared error on the inner blocks."""
    by_session = []
    for block in blocks:
        rows = block.score_rows
        errors = []
        for setting in (rival, found):
            model = library.fit(setting.params, block.fit, setting.rounds, how)
            errors.append((rows.target_scaled - predict_booster(model, rows.features)) ** 2)
        session = np.unique(rows.date, return_inverse=True)[1]
        by_session.append(np.bincount(session, weights=rows.weight * (errors[0] - errors[1])))
    saved: FloatArray = np.concatenate(by_session)
    error = overlap_error(saved - saved.mean(), blocks[0].score_rows.horizon_bars)
    return float(np.sum(saved) / error) if error > 0 else 0.0


def _trial_record(name: str, trial: optuna.trial.FrozenTrial) -> dict[str, object]:
    value = trial.value if trial.value is not None else trial.intermediate_values.get(0)
    return {
        "model": name,
        "number": trial.number,
        "state": trial.state.name.lower(),
        "inner_rmse": value,
        "rounds": trial.user_attrs.get("rounds"),
        **trial.params,
    }


def tune(rows: Rows, config: SearchConfig, seed: int) -> dict[str, Tuned]:
    """Search every library of ``config``; libraries run side by side, each with its own seeded study."""
    # Optuna announces each trial at INFO on its own handler; the trials are recorded in the bundle instead.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return run_side_by_side({name: partial(search, name, rows, config, seed) for name in config.models})
