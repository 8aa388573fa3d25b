"""Which device the boosters are trained on, and why.

XGBoost asked for CUDA where there is none trains on the CPU, without an error and, at ``verbosity=0``,
without a word. So nobody is believed: one round is trained and the device is read back from the booster.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightgbm
import numpy as np
import xgboost

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
    if require_gpu and (requested == "cpu" or allow_cpu_fallback):
        other = "--device cpu" if requested == "cpu" else "--allow-cpu-fallback"
        raise UsageError(f"--require-gpu and {other} contradict each other: give one of them")
    if "xgb" not in models:
        if require_gpu:
            raise UsageError("--require-gpu without xgb among the models: only XGBoost trains on a GPU here")
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
