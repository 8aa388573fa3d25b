import numpy as np
import pandas as pd
import pytest

from inference.intervals import MINIMUM_ROWS, NORMAL_DECILE, forecast_path, residual_quantiles


def outcomes(n: int = 3_000, horizon_bars: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    daily = rng.standard_t(4, size=n + horizon_bars) / np.sqrt(2.0) * 0.01
    path = np.concatenate([[0.0], np.cumsum(daily)])
    realised = path[horizon_bars : n + horizon_bars] - path[:n]
    realised[n - horizon_bars :] = np.nan
    return np.zeros(n), np.full(n, 0.01 * np.sqrt(horizon_bars)), realised


def test_four_in_five_outcomes_fall_into_the_band():
    mean, sigma, realised = outcomes()
    found = residual_quantiles(mean, sigma, realised, horizon_bars=5)
    scored = np.isfinite(realised) & (found.count > 250)
    inside = (realised > found.lower_z * sigma) & (realised < found.upper_z * sigma)
    assert np.mean(inside[scored]) == pytest.approx(0.8, abs=0.03)


def test_a_band_at_t_knows_only_what_was_resolved_by_t():
    mean, sigma, realised = outcomes(400)
    full = residual_quantiles(mean, sigma, realised, horizon_bars=5)
    for t in (80, 150, 399):
        known = realised[: t + 1].copy()
        known[t + 1 - 5 :] = np.nan
        cut = residual_quantiles(mean[: t + 1], sigma[: t + 1], known, horizon_bars=5)
        assert cut.lower_z[t] == full.lower_z[t]
        assert cut.probability_above(np.zeros(t + 1))[t] == full.probability_above(np.zeros(400))[t]


def test_a_residual_is_not_used_a_bar_too_early():
    mean, sigma, realised = outcomes(200)
    realised[100] = 50.0  # known from row 105 on
    spiked = residual_quantiles(mean, sigma, realised, horizon_bars=5)
    calm = residual_quantiles(*outcomes(200), horizon_bars=5)
    assert np.array_equal(spiked.upper_z[:105], calm.upper_z[:105])
    assert not np.array_equal(spiked.upper_z[105:], calm.upper_z[105:])


def test_too_few_residuals_fall_back_to_the_normal_band():
    mean, sigma, realised = outcomes(MINIMUM_ROWS)
    found = residual_quantiles(mean, sigma, realised, horizon_bars=5)
    assert np.all(found.upper_z == NORMAL_DECILE)
    assert np.all(found.probability_above(np.zeros(MINIMUM_ROWS)) == 0.5)


def test_probabilities_follow_the_residuals():
    mean, sigma, realised = outcomes(2_000, seed=2)
    found = residual_quantiles(mean, sigma, realised + 0.01, horizon_bars=5)
    level = found.probability_above(np.zeros(2_000))[-1]
    assert 0.5 < level < 0.8
    assert found.probability_above(np.full(2_000, 9.0))[-1] < 0.01


def test_the_path_moves_with_the_forecast_then_with_the_drift():
    dates = pd.DatetimeIndex(pd.bdate_range("2024-01-01", periods=20))
    path = forecast_path(
        dates=dates, last_close=100.0, expected_log=0.05, baseline_log=0.01, sigma_log=0.04,
        lower_z=-1.2, upper_z=1.3, horizon_bars=5,
    )  # fmt: skip
    assert np.log(path.prices[4] / 100.0) == pytest.approx(0.05)
    assert np.log(path.prices[9] / path.prices[4]) == pytest.approx(0.01)
    assert np.log(path.upper[4] / path.prices[4]) == pytest.approx(1.3 * 0.04)
    assert np.all(path.lower < path.prices)
    assert np.all(np.diff(path.upper - path.lower) > 0)
    np.testing.assert_allclose(path.returns, path.prices / 100.0 - 1.0)
