from dataclasses import replace

import numpy as np
import pytest

from training.gbm_search import Rows, SearchConfig, fit_boosters, tune
from training.recipe import gain_importance, screen, screen_t_values, select_features

CONFIG = SearchConfig(n_trials=3, max_rounds=40)


def make_rows(n: int = 700, p: int = 8, seed: int = 0, signal: float = 0.6, *, even: bool = False) -> Rows:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, p)).astype(np.float32)
    carrier = features[:, 2].astype(np.float64)
    return Rows(
        features=features,
        target_scaled=signal * (np.abs(carrier) if even else carrier) + rng.normal(size=n),
        weight=np.ones(n),
        date=np.datetime64("2010-01-01") + np.arange(n),
        label_end_position=np.arange(n) + 5,
        horizon_bars=5,
    )


def test_a_planted_feature_is_found_and_selected_first():
    rows = make_rows(signal=0.6)
    models = fit_boosters(rows, tune(rows, CONFIG, seed=1), CONFIG, seed=1)
    found = select_features(models, rows.features, max_features=3, seed=1)
    assert found.method == "shap"
    assert int(np.argmax(found.importance)) == 2
    assert 2 in found.selected
    assert len(found.selected) == 3
    assert found.importance.sum() == pytest.approx(1.0)
    for model in models.values():
        assert int(np.argmax(gain_importance(model, 8))) == 2


def test_selection_falls_back_to_gain_and_says_so(monkeypatch: pytest.MonkeyPatch):
    import xgboost

    import training.recipe as module

    def broken(model, prepared):
        raise xgboost.core.XGBoostError("no contributions")

    rows = make_rows()
    models = fit_boosters(rows, tune(rows, CONFIG, seed=1), CONFIG, seed=1)
    monkeypatch.setattr(module, "shap_values", broken)
    found = select_features(models, rows.features, max_features=3, seed=1)
    assert found.method == "gain"
    assert int(np.argmax(found.importance)) == 2


@pytest.mark.parametrize("even", [False, True])
def test_a_feature_that_stands_out_is_kept_alone(even: bool):
    assert screen(make_rows(even=even), 2.5, 0.6) == (2,)


def test_where_nothing_stands_out_everything_is_kept():
    assert screen(make_rows(signal=0.0), 6.0, 0.6) == tuple(range(8))


def test_a_session_counts_once_however_many_symbols_repeat_it():
    rows = make_rows(signal=0.1)
    ten = np.repeat(np.arange(700), 10)
    np.testing.assert_allclose(screen_t_values(rows.take(ten)), screen_t_values(rows), rtol=1e-6)


def test_a_slow_feature_and_labels_that_overlap_say_less():
    """A walk explains any other walk: with overlapping labels its t-value must not grow with the horizon."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(60):
        slow = np.cumsum(rng.normal(size=(2_000, 1)), axis=0)
        moves = rng.normal(size=2_019)
        target = np.convolve(moves, np.ones(20), mode="valid") / np.sqrt(20)
        rows = replace(make_rows(2_000), target_scaled=target, horizon_bars=20)
        values = ((slow - slow.mean()) / slow.std()).astype(np.float32)
        found.append(
            screen_t_values(replace(rows, features=values, target_scaled=target, horizon_bars=20))[0]
        )
    assert np.mean(np.array(found) > 2.5) < 0.15
