from dataclasses import replace

import lightgbm
import numpy as np
import pytest
import xgboost
from sklearn.preprocessing import RobustScaler

from inference.ensemble import EMBARGO_BARS, SignalRows, SimpleEnsemble, calibrate, overlap_error
from inference.load_gbm_models import (
    BoosterEnsemble,
    predict_booster,
    select_scaled,
    shap_values,
    shrunk_weights,
)


@pytest.fixture(scope="module")
def boosters():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(400, 6)).astype(np.float32)
    target = features[:, 0] - 0.5 * features[:, 3] + rng.normal(size=400)
    xgb = xgboost.train({"max_depth": 3, "nthread": 1}, xgboost.DMatrix(features, target), num_boost_round=20)
    data = lightgbm.Dataset(features, target, params={"verbosity": -1})
    lgb = lightgbm.train({"num_leaves": 7, "num_threads": 1, "verbosity": -1}, data, num_boost_round=20)
    return features, {"xgb": xgb, "lgb": lgb}


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # shap's own use of matplotlib
def test_own_contributions_equal_the_shap_package(boosters):
    import shap

    features, models = boosters
    for model in models.values():
        expected = shap.TreeExplainer(model).shap_values(features[:50])
        np.testing.assert_allclose(shap_values(model, features[:50]), expected, atol=1e-6)


def test_contributions_sum_to_the_prediction_up_to_a_constant(boosters):
    features, models = boosters
    for model in models.values():
        rest = predict_booster(model, features) - shap_values(model, features).sum(axis=1)
        assert np.ptp(rest) < 1e-4


def test_selected_columns_are_scaled_like_the_scaler_would(boosters):
    features, _ = boosters
    scaler = RobustScaler().fit(features)
    np.testing.assert_allclose(
        select_scaled(scaler, features, (1, 4)), scaler.transform(features)[:, [1, 4]], rtol=1e-5, atol=1e-6
    )


def test_another_number_of_features_is_refused(boosters):
    features, models = boosters
    ensemble = BoosterEnsemble(
        columns=tuple("abcdef"),
        selected=(0, 1, 2, 3, 4, 5),
        scaler=RobustScaler().fit(features),
        models=models,
        weights={"xgb": 0.5, "lgb": 0.5},
        calibration=calibrate(np.empty(0), np.empty(0), drift=0.0, horizon_bars=5),
    )
    with pytest.raises(ValueError, match="got 5 features, the model knows 6"):
        ensemble.per_model(features[:, :5])


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


def test_weights_are_equal_without_evidence_and_lean_towards_skill():
    rng = np.random.default_rng(4)
    truth = rng.normal(size=8_000)
    signals = {"good": truth + rng.normal(size=8_000), "noise": rng.normal(size=8_000)}
    assert shrunk_weights({k: v[:0] for k, v in signals.items()}, truth[:0]) == {"good": 0.5, "noise": 0.5}
    weights = shrunk_weights(signals, truth)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert 0.8 < weights["good"] < 1.0
    assert weights["noise"] > 0.0


def test_overlapping_sums_of_a_slow_signal_count_once_per_horizon_and_those_of_a_quick_one_each():
    rng = np.random.default_rng(0)
    moves = rng.normal(size=20_000)
    overlapping = np.convolve(moves, np.ones(5), mode="valid")
    slow = overlap_error(overlapping, 5) / overlap_error(overlapping, 1)
    assert slow == pytest.approx(np.sqrt(5), rel=0.1)
    quick = overlapping * rng.normal(size=len(overlapping))
    assert overlap_error(quick, 5) / overlap_error(quick, 1) == pytest.approx(1.0, rel=0.1)


def rows_of(*skills: float, n: int = 4_000, horizon_bars: int = 1, seed: int = 0, spread=(0.05, 0.2)):
    """Return rows whose members know so much of what came, each with its own spread."""
    rng = np.random.default_rng(seed)
    daily = rng.normal(size=n + horizon_bars)
    came = np.array([daily[t + 1 : t + 1 + horizon_bars].sum() for t in range(n)]) / np.sqrt(horizon_bars)
    signals = [
        scale * (skill * came + np.sqrt(1 - skill**2) * rng.normal(size=n))
        for skill, scale in zip(skills, spread, strict=True)
    ]
    came[n - horizon_bars :] = np.nan
    return SignalRows(
        signals=np.column_stack(signals),
        outcome=came,
        is_out_of_sample=np.ones(n, dtype=bool),
        known_from=np.arange(n) + horizon_bars + EMBARGO_BARS,
        horizon_bars=horizon_bars,
    )


MEMBERS = ("gbm", "lstm")


def last_weight(rows: SignalRows) -> float:
    """Return the last weight of the second member."""
    return float(SimpleEnsemble().weigh(rows, MEMBERS)[0][-1, 1])


@pytest.mark.parametrize("horizon_bars", [1, 5])
def test_weights_begin_at_the_prior_and_move_towards_skill(horizon_bars: int):
    rows = rows_of(0.03, 0.12, horizon_bars=horizon_bars)
    weights, _ = SimpleEnsemble().weigh(rows, MEMBERS)
    np.testing.assert_allclose(weights[:190], [[0.7, 0.3]] * 190)
    assert weights[-1, 1] > 0.5
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert (weights >= 0).all()


def test_noise_is_hardly_listened_to_and_what_misleads_not_at_all():
    noise = [last_weight(rows_of(0.1, 0.0, n=10_000, seed=seed)) for seed in range(4)]
    assert np.mean(noise) < 0.1
    assert max(last_weight(rows_of(0.1, -0.1, seed=seed)) for seed in range(3)) == 0.0


def test_a_second_member_is_heard_only_where_its_skill_beats_one_standard_error():
    useless = np.array([last_weight(rows_of(0.05, 0.0, n=1_500, seed=seed)) for seed in range(20)])
    # One-sided, chance passes one standard error in 16 of 100.
    assert 0.02 <= np.mean(useless > 0) <= 0.3
    assert min(last_weight(rows_of(0.05, 0.15, n=1_500, seed=seed)) for seed in range(5)) > 0.3


def test_where_nobody_helps_the_prior_stands():
    weights, _ = SimpleEnsemble().weigh(rows_of(-0.3, -0.3), MEMBERS)
    np.testing.assert_allclose(weights[-1], [0.7, 0.3])


def test_a_louder_member_is_not_listened_to_more():
    quiet, loud = rows_of(0.1, 0.1, spread=(0.05, 0.05)), rows_of(0.1, 0.1, spread=(0.05, 0.4))
    first, second = (SimpleEnsemble().weigh(rows, MEMBERS) for rows in (quiet, loud))
    np.testing.assert_allclose(first[0], second[0], atol=1e-9)
    np.testing.assert_allclose(first[1][100:], second[1][100:], atol=1e-9)


def test_a_member_that_says_nothing_leaves_the_other_as_it_is():
    rows = rows_of(0.1, 0.1)
    for silence in (np.nan, 0.0):
        muted = replace(rows, signals=rows.signals * [1.0, silence])
        weights, joined = SimpleEnsemble().weigh(muted, MEMBERS)
        np.testing.assert_array_equal(joined[100:], rows.signals[100:, 0])
        np.testing.assert_array_equal(weights[100:, 1], 0.0)


def test_rows_that_a_member_was_fitted_on_teach_nothing():
    rows = rows_of(0.03, 0.5)
    seen = replace(rows, is_out_of_sample=np.arange(4_000) >= 3_900)
    weights, _ = SimpleEnsemble().weigh(seen, MEMBERS)
    np.testing.assert_allclose(weights[-1], [0.7, 0.3])


def test_outcomes_of_the_future_change_nothing_before_them():
    rows = rows_of(0.05, 0.1, n=800)
    changed = rows.outcome.copy()
    changed[600:] = -changed[600:]
    ensemble = SimpleEnsemble(refresh_rows=1)
    first, second = (ensemble.weigh(each, MEMBERS) for each in (rows, replace(rows, outcome=changed)))
    # The outcome of row 600 is known at the close of row 601 and used from the row after it.
    np.testing.assert_array_equal(first[0][:602], second[0][:602])
    assert not np.array_equal(first[0][602], second[0][602])
    early, late = (ensemble.calibrate(each, first[1])[0] for each in (rows, replace(rows, outcome=changed)))
    np.testing.assert_array_equal(early[:602], late[:602])
    assert early[602] != late[602]


def test_the_joined_signal_is_calibrated_as_any_other():
    rows = rows_of(0.1, 0.1)
    _, joined = SimpleEnsemble().weigh(rows, MEMBERS)
    slope, mean, lower = SimpleEnsemble().calibrate(rows, joined)
    start = 63 * (3_999 // 63) - EMBARGO_BARS
    alone = calibrate(joined[:start], rows.outcome[:start], drift=0.0, horizon_bars=1)
    assert (slope[-1], mean[-1], lower[-1]) == pytest.approx(
        (alone.slope, alone.raw_mean, alone.skill_lower), rel=1e-2
    )
