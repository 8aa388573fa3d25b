import numpy as np
import pytest

from inference.load_gbm_models import predict_booster, shap_values
from training.gbm_search import (
    Rows,
    SearchConfig,
    careful,
    fit_boosters,
    inner_blocks,
    search,
    tune,
)
from utils.base import UsageError

CONFIG = SearchConfig(n_trials=3, max_rounds=40)


def make_rows(n: int = 700, p: int = 8, seed: int = 0, horizon_bars: int = 5, signal: float = 0.5) -> Rows:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, p)).astype(np.float32)
    return Rows(
        features=features,
        target_scaled=signal * features[:, 2].astype(np.float64) + rng.normal(size=n),
        weight=np.ones(n),
        date=np.datetime64("2010-01-01") + np.arange(n),
        label_end_position=np.arange(n) + horizon_bars,
        horizon_bars=horizon_bars,
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


@pytest.mark.parametrize("name", ["xgb", "lgb"])
def test_on_noise_the_careful_setting_stands(name: str):
    found = search(name, make_rows(signal=0.0), CONFIG, seed=1)
    assert found.is_careful
    same = careful(name, 700, 5)
    assert (found.params, found.rounds) == (same.params, same.rounds)
    assert len(found.trials) == 3


@pytest.mark.parametrize("name", ["xgb", "lgb"])
def test_a_tuned_setting_that_is_clearly_better_is_used(name: str):
    """A relation of many steps needs more than the careful setting's few leaves."""
    rows = make_rows(n=3_000, horizon_bars=1)
    wave = 4.0 * np.sin(4.0 * rows.features[:, 2].astype(np.float64))
    wavy = Rows(
        features=rows.features,
        target_scaled=wave + 0.1 * np.random.default_rng(1).normal(size=3_000),
        weight=rows.weight,
        date=rows.date,
        label_end_position=rows.label_end_position,
        horizon_bars=1,
    )
    found = search(name, wavy, SearchConfig(n_trials=6, max_rounds=60), seed=1)
    assert not found.is_careful


def test_columns_of_a_block_are_chosen_by_its_rows_to_fit_alone():
    rows, seen = make_rows(), []

    def choose(fit: Rows) -> tuple[int, ...]:
        seen.append(fit.date.max())
        return (2, 5)

    for (fit, score), known in zip(inner_blocks(rows, CONFIG, choose), seen, strict=True):
        assert fit.features.shape[1] == score.features.shape[1] == 2
        assert known < score.date.min()
    found = search("lgb", rows, CONFIG, 1, choose)
    assert len(found.trials) == 3


def test_without_trials_nothing_is_searched():
    found = search("lgb", make_rows(), SearchConfig(n_trials=0), seed=1)
    assert found == careful("lgb", 700, 5)
    assert (found.trials, found.inner_rmse) == ((), None)


def test_a_large_panel_may_grow_larger_trees():
    small, large = (careful("lgb", n, 1).params for n in (700, 300_000))
    assert small["num_leaves"] < large["num_leaves"]
    assert small["min_data_in_leaf"] < large["min_data_in_leaf"]


@pytest.mark.parametrize("models", [(), ("xgb", "xgb"), ("forest",)])
def test_unknown_libraries_are_refused(models: tuple[str, ...]):
    with pytest.raises(UsageError, match="name each of xgb, lgb, cat at most once"):
        SearchConfig(models=models)


def test_a_session_of_a_panel_stands_on_one_side_of_a_block():
    rows = make_rows(n=600, horizon_bars=1)
    date = np.repeat(rows.date[:200], 3)
    panel = Rows(
        features=rows.features,
        target_scaled=rows.target_scaled,
        weight=rows.weight,
        date=date,
        label_end_position=np.searchsorted(date, date + 1),
        horizon_bars=1,
    )
    for fit, score in inner_blocks(panel, CONFIG):
        assert fit.date.max() < score.date.min()


def test_catboost_is_searched_fitted_and_explained():
    pytest.importorskip("catboost", reason="the extra catboost is not installed")
    rows = make_rows(signal=0.6)
    config = SearchConfig(n_trials=2, max_rounds=30, models=("cat",))
    (model,) = fit_boosters(rows, tune(rows, config, seed=1), config, seed=1).values()
    again = fit_boosters(rows, tune(rows, config, seed=1), config, seed=1)["cat"]
    assert np.array_equal(predict_booster(model, rows.features), predict_booster(again, rows.features))
    assert int(np.argmax(np.abs(shap_values(model, rows.features)).mean(axis=0))) == 2
