import numpy as np
import pytest

from inference.ensemble import predict_booster
from training.gbm_search import Rows, SearchConfig, fit_boosters, inner_blocks, search, tune
from training.recipe import gain_importance, select_features

CONFIG = SearchConfig(n_trials=3, max_rounds=40)


def make_rows(n: int = 700, p: int = 8, seed: int = 0, horizon_bars: int = 5, signal: float = 0.5) -> Rows:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, p)).astype(np.float32)
    return Rows(
        features=features,
        target_scaled=signal * features[:, 2].astype(np.float64) + rng.normal(size=n),
        weight=np.ones(n),
        label_end_position=np.arange(n) + horizon_bars,
    )


def test_inner_blocks_come_later_and_no_label_reaches_into_them():
    rows = make_rows()
    for fit, score in inner_blocks(rows, CONFIG):
        n_fit = len(fit.target_scaled)
        start = int(np.flatnonzero((rows.features == score.features[0]).all(axis=1))[0])
        assert fit.label_end_position.max() < start
        assert n_fit < start


@pytest.mark.parametrize("name", ["xgb", "lgb"])
def test_the_same_seed_searches_the_same_way(name: str):
    first, second = (search(name, make_rows(), CONFIG, seed=3) for _ in range(2))
    assert first == second
    assert len(first.trials) == 3
    assert first.inner_rmse <= min(t["inner_rmse"] for t in first.trials if t["state"] == "complete") + 1e-12


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_fit(threads: int):
    rows = make_rows()
    one = tune(rows, CONFIG, seed=1)
    models = fit_boosters(rows, one, CONFIG, seed=1)
    again = fit_boosters(rows, one, SearchConfig(n_trials=3, max_rounds=40, threads=threads), seed=1)
    for name, model in models.items():
        assert np.array_equal(
            predict_booster(model, rows.features), predict_booster(again[name], rows.features)
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
