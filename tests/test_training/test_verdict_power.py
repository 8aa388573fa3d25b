"""A small, seeded version of ``benchmarks/verdict_power.py``: noise is no edge, a planted signal is one."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import spearmanr

from data.feature_engineer import engineer_features
from training.recipe import NetworkConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def power() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verdict_power", ROOT / "benchmarks" / "verdict_power.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Nearly three years out of sample; the benchmark has nearly six.
    module.N_BARS = 1_700
    return module


@pytest.mark.parametrize("horizon_bars", [1, 5])
def test_the_planted_feature_has_the_stated_correlation(power: ModuleType, horizon_bars: int):
    found = []
    for seed, carrier in enumerate(power.CARRIERS):
        bars = power.planted(seed, carrier, 0.2, horizon_bars)
        outcome = np.log(bars["Close"].shift(-horizon_bars) / bars["Close"])
        found.append(spearmanr(engineer_features(bars)[carrier], outcome, nan_policy="omit").statistic)
    assert np.mean(found) == pytest.approx(0.2, abs=0.03)
    assert np.ptp(found) < 0.15


def test_noise_is_called_an_edge_at_most_once_in_six(power: ModuleType):
    """Random walks, and such with drift and clusters of volatility, in turn."""
    labels = [power.verdict_of("null", seed, n_trials=1, horizon_bars=1)["label"] for seed in range(6)]
    assert labels.count("edge") <= 1


def test_a_signal_in_one_series_is_found(power: ModuleType):
    labels = [power.verdict_of("single", seed, n_trials=1, horizon_bars=1)["label"] for seed in range(4)]
    assert labels.count("edge") >= 3


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason='networks are trained with TensorFlow: pip install ".[lstm]"',
)
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_network_and_ensemble_tell_a_signal_from_noise(power: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """One training each; the benchmark has a hundred, of a weaker signal."""
    monkeypatch.setattr(power, "SINGLE_IC", 0.3)
    quick = {"n_trials": 0, "horizon_bars": 1, "network": NetworkConfig(epochs=10)}
    planted = power.verdicts_of("single", 1001, ("lstm", "ensemble"), **quick)
    assert {name: one["label"] for name, one in planted.items()} == {"lstm": "edge", "ensemble": "edge"}
    assert planted["lstm"]["ic"] > 0.2
    assert power.verdicts_of("null", 1001, ("lstm",), **quick)["lstm"]["label"] != "edge"
