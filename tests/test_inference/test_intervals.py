import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from inference.intervals import (
    DECILES,
    DEGREES_OF_FREEDOM,
    PRIOR_RESIDUALS,
    WINDOW_ROWS,
    Calibrated,
    calibrate,
    calibrate_band,
    centre_log,
    forecast_path,
)

PRIOR = student.ppf(DECILES, DEGREES_OF_FREEDOM)


def outcomes(n: int = 3_000, horizon_bars: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    daily = rng.standard_t(4, size=n + horizon_bars) / np.sqrt(2.0) * 0.01
    path = np.concatenate([[0.0], np.cumsum(daily)])
    realised = path[horizon_bars : n + horizon_bars] - path[:n]
    realised[n - horizon_bars :] = np.nan
    return np.zeros(n), np.full(n, 0.01 * np.sqrt(horizon_bars)), realised


def changed_by_the_future(follow, n: int = 400, horizon_bars: int = 5, rows=(3, 80, 150, 399)) -> set[int]:
    """Return the rows whose band or probability differs between the past alone and all rows."""
    mean, scale, realised = outcomes(n, horizon_bars)
    full: Calibrated = follow(mean, scale, realised, horizon_bars=horizon_bars)
    changed = set()
    for t in rows:
        known = realised[: t + 1].copy()
        known[max(t + 1 - horizon_bars, 0) :] = np.nan
        cut = follow(mean[: t + 1], scale[: t + 1], known, horizon_bars=horizon_bars)
        same = np.array_equal(cut.deciles_z[t], full.deciles_z[t])
        if not same or cut.above[0][t] != full.above[0][t]:
            changed.add(t)
    return changed


def test_four_in_five_outcomes_fall_into_the_band():
    mean, scale, realised = outcomes()
    found = calibrate_band(mean, scale, realised, horizon_bars=5)
    scored = np.isfinite(realised) & (np.arange(len(mean)) > 250)
    inside = (realised > found.deciles_z[:, 0] * scale) & (realised < found.deciles_z[:, -1] * scale)
    assert np.mean(inside[scored]) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_scale_that_is_wrong_throughout_is_made_good(wrong: float):
    mean, scale, realised = outcomes(4_000, 1)
    found = calibrate_band(mean, scale * wrong, realised, horizon_bars=1)
    inside = np.abs(realised) < found.deciles_z[:, -1] * scale * wrong
    assert np.mean(inside[1_000:-1]) == pytest.approx(0.8, abs=0.03)


def test_coverage_comes_back_after_volatility_doubles_for_good():
    mean, scale, realised = outcomes(6_000, 1)
    realised[3_000:] *= 2.0
    found = calibrate_band(mean, scale, realised, horizon_bars=1)
    inside = (realised > found.deciles_z[:, 0] * scale) & (realised < found.deciles_z[:, -1] * scale)
    assert np.mean(inside[3_000:3_100]) < 0.68
    assert np.mean(inside[3_400:4_400]) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("horizon_bars", [1, 5, 20])
def test_a_band_at_t_knows_only_what_was_resolved_by_t(horizon_bars: int):
    assert changed_by_the_future(calibrate_band, horizon_bars=horizon_bars) == set()


def test_a_band_that_looks_ahead_is_caught():
    def peeking(mean, scale, realised, *, horizon_bars):
        return calibrate_band(mean, scale, realised, horizon_bars=horizon_bars - 1)

    assert changed_by_the_future(peeking) >= {80, 150}


def test_a_residual_is_not_used_a_bar_too_early():
    mean, scale, realised = outcomes(200)
    calm = calibrate_band(mean, scale, realised, horizon_bars=5)
    realised[100] = 50.0  # known from row 105 on
    spiked = calibrate_band(mean, scale, realised, horizon_bars=5)
    assert np.array_equal(spiked.deciles_z[:105], calm.deciles_z[:105])
    assert not np.array_equal(spiked.deciles_z[105], calm.deciles_z[105])


def test_without_residuals_the_shape_is_that_of_the_prior():
    mean, scale, realised = outcomes(5)
    found = calibrate_band(mean + 0.01, scale, realised, horizon_bars=5)
    np.testing.assert_allclose(found.deciles_z, np.tile(PRIOR, (5, 1)))
    np.testing.assert_allclose(found.above[0], student.cdf(0.01 / scale[0], DEGREES_OF_FREEDOM))


def test_the_deciles_are_those_of_the_last_window_blended_with_the_prior():
    """A slow oracle; the adaptive width scales all deciles about the median alike."""
    mean, scale, realised = outcomes(WINDOW_ROWS + 700, 1, seed=3)
    found = calibrate_band(mean, scale, realised, horizon_bars=1)
    z = realised / scale
    for t in (40, 1_000, WINDOW_ROWS + 600):
        window = z[max(t - WINDOW_ROWS, 0) : t]
        levels = DECILES + (2 * DECILES - 1) / max(len(window), 10)
        trust = len(window) / (len(window) + PRIOR_RESIDUALS)
        expected = (1 - trust) * PRIOR + trust * np.quantile(window, levels)
        shape = (found.deciles_z[t] - found.deciles_z[t, 4]) / (expected - expected[4] + (DECILES == 0.5))
        assert found.deciles_z[t, 4] == pytest.approx(expected[4])
        widths = shape[DECILES != 0.5]
        np.testing.assert_allclose(widths, widths[0])
        assert np.exp(-0.7) - 1e-9 <= widths[0] <= np.exp(0.7) + 1e-9


def test_probabilities_follow_the_residuals():
    mean, scale, realised = outcomes(2_000, seed=2)
    found = calibrate_band(mean, scale, realised + 0.01, horizon_bars=5)
    assert 0.5 < found.above[0][-1] < 0.8
    far = calibrate_band(mean, scale, realised, horizon_bars=5, thresholds_log=(0.5,))
    assert 0.0 < far.above[0][-1] < 0.01


def test_the_probability_agrees_with_the_deciles():
    mean, scale, realised = outcomes(3_000, 1, seed=4)
    band = calibrate_band(mean, scale, realised, horizon_bars=1)
    for k in (0, 2, 6, 8):
        at = band.deciles_z[-1, k] * scale[-1]
        above = calibrate_band(mean, scale, realised, horizon_bars=1, thresholds_log=(at,)).above[0]
        assert above[-1] == pytest.approx(1 - DECILES[k], abs=0.01)


def test_the_scale_of_returns_does_not_matter():
    mean, scale, realised = outcomes(800)
    small = calibrate_band(mean, scale, realised, horizon_bars=5)
    large = calibrate_band(mean * 8, scale * 8, realised * 8, horizon_bars=5)
    assert np.array_equal(small.deciles_z, large.deciles_z)


def test_rows_without_a_forecast_teach_nothing_and_break_nothing():
    mean, scale, realised = outcomes(600)
    mean[:50] = mean[300:320] = np.nan
    found = calibrate_band(mean, scale, realised, horizon_bars=5)
    assert np.isfinite(found.deciles_z).all()
    assert np.array_equal(np.isnan(found.above[0]), np.isnan(mean))
    np.testing.assert_allclose(found.deciles_z[:55], np.tile(PRIOR, (55, 1)))
    assert np.array_equal(found.deciles_z[306], found.deciles_z[320])


@settings(deadline=None, max_examples=40)
@given(
    moves=st.lists(st.floats(-0.3, 0.3) | st.just(0.0), min_size=2, max_size=80),
    horizon_bars=st.integers(1, 30),
)
def test_deciles_are_finite_and_ascend_whatever_happens(moves, horizon_bars: int):
    realised = np.array(moves)
    n = len(realised)
    found = calibrate_band(np.zeros(n), np.full(n, 0.01), realised, horizon_bars=horizon_bars)
    assert np.isfinite(found.deciles_z).all()
    assert (np.diff(found.deciles_z, axis=1) >= 0).all()
    assert ((found.above[0] >= 0) & (found.above[0] <= 1)).all()


DATES = pd.DatetimeIndex(pd.bdate_range("2024-01-01", periods=252))


def path_of(edges_log, **changes):
    given = {"expected_log": 0.05, "baseline_log": 0.01, "last_close": 100.0, "horizon_bars": 5}
    return forecast_path(dates=DATES, edges_log=edges_log, **(given | changes))


def test_the_path_moves_with_the_forecast_then_with_the_drift():
    path = path_of({5: (-0.048, 0.052)})
    assert np.log(path.prices[4] / 100.0) == pytest.approx(0.05)
    assert np.log(path.prices[9] / path.prices[4]) == pytest.approx(0.01)
    assert np.log(path.upper[4] / path.prices[4]) == pytest.approx(0.052)
    assert np.all(path.lower < path.prices)
    assert np.all(np.diff(path.upper - path.lower) > 0)
    np.testing.assert_allclose(path.returns, path.prices / 100.0 - 1.0)
    np.testing.assert_allclose(
        np.log(path.prices / 100.0), centre_log(np.arange(1.0, 253.0), 0.05, 0.01, horizon_bars=5)
    )


def test_the_path_passes_through_further_forecasts_and_is_straight_between_them():
    path = path_of({5: (-0.048, 0.052)}, further_log={1: -0.02, 20: 0.01})
    at = np.concatenate([[0.0], np.log(path.prices / 100.0)])
    assert at[[1, 5, 20]] == pytest.approx([-0.02, 0.05, 0.01])
    bends = np.flatnonzero(np.abs(np.diff(at, 2)) > 1e-12) + 1
    assert bends.tolist() == [1, 5, 20]
    assert at[252] - at[20] == pytest.approx(0.01 * 232 / 5)
    plain = path_of({5: (-0.048, 0.052)})
    np.testing.assert_allclose(path.upper / path.prices, plain.upper / plain.prices)


def test_without_further_forecasts_the_path_is_the_centre_to_the_last_bit():
    centre = centre_log(np.arange(1.0, 253.0), 0.05, 0.01, horizon_bars=5)
    for further in (None, {}):
        path = path_of({5: (-0.048, 0.052)}, further_log=further)
        assert np.array_equal(path.returns, np.expm1(centre))


def test_one_known_edge_grows_with_the_square_root_of_time():
    path = path_of({5: (-0.04, 0.05)}, expected_log=0.0, baseline_log=0.0)
    np.testing.assert_allclose(np.log(path.upper / 100.0), 0.05 * np.sqrt(np.arange(1, 253) / 5.0))


def test_known_edges_are_met_and_the_width_grows_between_them():
    edges = {1: (-0.02, 0.02), 5: (-0.04, 0.05), 20: (-0.075, 0.09), 126: (-0.16, 0.2)}
    path = path_of(edges, expected_log=0.0, baseline_log=0.0)
    for bars, (lower, upper) in edges.items():
        assert np.log(path.lower[bars - 1] / 100.0) == pytest.approx(lower)
        assert np.log(path.upper[bars - 1] / 100.0) == pytest.approx(upper)
    assert np.all(np.diff(path.upper) > 0)
    assert np.all(np.diff(path.lower) < 0)
    assert np.log(path.upper[251] / 100.0) == pytest.approx(0.2 * np.sqrt(2.0))


def reliability_error(said, came, bins: int = 5) -> float:
    """Return the largest distance between what was said and what came, over equally full bins."""
    order = np.array_split(np.argsort(said), bins)
    return max(abs(float(np.mean(said[rows]) - np.mean(came[rows]))) for rows in order)


def test_three_classes_are_monotone_and_calibrated_out_of_sample():
    """Planted: a known signal moves the mean by up to 1.5 scales; every row is scored by what came later."""
    mean, scale, realised = outcomes(8_000, 1, seed=5)
    signal = np.random.default_rng(6).uniform(-0.015, 0.015, len(mean))
    came = realised + signal
    found = calibrate_band(signal, scale, came, horizon_bars=1, thresholds_log=(0.0, 0.0016, -0.0016))
    gain, loss = found.above[1], 1.0 - found.above[2]
    assert (found.above[1] <= found.above[0]).all()
    assert (found.above[0] <= found.above[2]).all()
    assert ((gain >= 0) & (loss >= 0) & (gain + loss <= 1.0)).all()
    order = np.argsort(signal[-500:])
    assert np.corrcoef(gain[-500:][order], signal[-500:][order])[0, 1] > 0.9
    scored = slice(1_000, -1)
    assert reliability_error(gain[scored], came[scored] > 0.0016) < 0.04
    assert reliability_error(loss[scored], came[scored] < -0.0016) < 0.04
    overconfident = np.clip(0.5 + 1.6 * (gain - 0.5), 0.0, 1.0)
    assert reliability_error(overconfident[scored], came[scored] > 0.0016) > 0.04, "the check can fail"


# How far a signal may be believed.


def test_a_signal_without_skill_is_not_believed():
    rng = np.random.default_rng(0)
    lows = [
        calibrate(rng.normal(size=2000), rng.normal(size=2000), drift=0.1, horizon_bars=1).skill_lower
        for _ in range(200)
    ]
    # One-sided 95 %: about one in twenty lower bounds of pure noise lies above zero.
    assert np.mean(np.asarray(lows) > 0) < 0.1


def test_an_overconfident_signal_is_shrunk_to_its_slope():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=20_000)
    realised = 0.3 * truth + rng.normal(size=20_000)
    found = calibrate(truth, realised, drift=0.05, horizon_bars=1)
    assert found.slope == pytest.approx(0.3, abs=0.03)
    assert 0.9 < found.skill_lower < 1.0
    assert np.mean(found.apply(truth)) == pytest.approx(0.05, abs=1e-9)


def test_a_signal_that_is_wrong_is_dropped_not_inverted():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=5_000)
    found = calibrate(truth, -0.5 * truth + rng.normal(size=5_000), drift=0.0, horizon_bars=1)
    assert found.slope == 0.0
    assert found.skill_lower == 0.0


def test_too_few_independent_rows_give_no_slope():
    signal = np.linspace(-1, 1, 100)
    assert calibrate(signal, signal, drift=0.0, horizon_bars=5).slope == 0.0
