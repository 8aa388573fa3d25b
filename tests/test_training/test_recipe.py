from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data.target_engineering import Dataset
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, RecipeConfig, evidence, sample_weights

CONFIG = RecipeConfig(search=SearchConfig(n_trials=3, max_rounds=40), max_features=5, refresh_every_folds=2)


def make_dataset(
    n: int = 800, p: int = 10, seed: int = 0, horizon_bars: int = 5, signal: float = 0.4
) -> Dataset:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, p)).astype(np.float32)
    date = pd.bdate_range("2010-01-01", periods=n + horizon_bars).to_numpy().astype("datetime64[D]")
    target = 0.1 + signal * features[:, 4].astype(np.float64) + rng.normal(size=n)
    return Dataset(
        columns=tuple(f"f{i}" for i in range(p)),
        features=features,
        date=date[:n],
        label_end=date[horizon_bars:],
        symbol_code=np.zeros(n, dtype=np.int32),
        symbols=("AAPL",),
        target_scaled=target,
        target_log=target * 0.04,
        sigma_log=np.full(n, 0.04),
        horizon_bars=horizon_bars,
    )


NOTHING = pd.DataFrame()


def test_a_fold_forecasts_the_planted_signal():
    data = make_dataset()
    fitted = GBMRecipe(CONFIG).fit(data.take(np.arange(600)), fold=0, earlier=NOTHING)
    rows = data.take(np.arange(600, 800))
    found = fitted.predict(rows)
    assert np.corrcoef(found.raw_scaled, rows.target_scaled)[0, 1] > 0.2
    assert "f4" in fitted.selected_features
    assert len(fitted.selected_features) == 5


def test_without_earlier_rows_the_forecast_is_the_drift():
    data = make_dataset()
    train = data.take(np.arange(600))
    found = GBMRecipe(CONFIG).fit(train, fold=0, earlier=NOTHING).predict(data.take(np.arange(600, 800)))
    np.testing.assert_allclose(found.mean_log, found.baseline_log)
    drift = np.average(train.target_scaled, weights=sample_weights(train, CONFIG.weight_half_life_sessions))
    np.testing.assert_allclose(found.baseline_log, drift * 0.04)


def test_tuning_and_selection_are_redone_on_schedule():
    recipe, data = GBMRecipe(CONFIG), make_dataset()
    for fold in range(4):
        recipe.fit(data.take(np.arange(500 + 50 * fold)), fold=fold, earlier=NOTHING)
    assert len(recipe.searches) == 2


@pytest.mark.parametrize("fold", [0, 1])
def test_a_fit_is_the_same_whatever_comes_after_its_rows(fold: int):
    """The recipe sees its training rows; a copy with another future behind them gives the same model."""
    data = make_dataset()
    other = replace(data, target_scaled=np.where(np.arange(800) < 600, data.target_scaled, 9.0))
    results = []
    for version in (data, other):
        recipe = GBMRecipe(CONFIG)
        for number in range(fold + 1):
            fitted = recipe.fit(version.take(np.arange(500 + 100 * number)), fold=number, earlier=NOTHING)
        results.append(fitted.predict(data.take(np.arange(600, 800))).raw_scaled)
    assert np.array_equal(*results)


def test_a_row_inside_the_training_rows_does_matter():
    """Proves that the test above can fail."""
    data = make_dataset()
    other = replace(data, target_scaled=np.where(np.arange(800) < 400, data.target_scaled, 9.0))
    first, second = (
        GBMRecipe(CONFIG).fit(v.take(np.arange(500)), fold=0, earlier=NOTHING).predict(data).raw_scaled
        for v in (data, other)
    )
    assert not np.array_equal(first, second)


def test_weights_halve_with_age_and_ignore_how_many_symbols_a_session_has():
    data = make_dataset(n=11)
    weights = sample_weights(data, half_life_sessions=5.0)
    assert weights[-1] == 1.0
    assert weights[5] == pytest.approx(0.5)
    doubled = data.take(np.repeat(np.arange(11), 2))
    np.testing.assert_allclose(sample_weights(doubled, 5.0), np.repeat(weights, 2))


def make_record(n: int = 3_000, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=n)
    return pd.DataFrame(
        {
            "raw_scaled": raw,
            "model_xgb": raw + rng.normal(size=n),
            "model_lgb": rng.normal(size=n),
            "realised_log": 0.04 * (0.3 * raw + rng.normal(size=n)),
            "sigma_log": np.full(n, 0.04),
        }
    )


def test_evidence_reads_resolved_rows_only():
    record = make_record()
    open_rows = make_record(seed=1).assign(realised_log=np.nan)
    both = pd.concat([record, open_rows])
    assert evidence(both, ("xgb", "lgb"), drift=0.1, horizon_bars=1) == evidence(
        record, ("xgb", "lgb"), drift=0.1, horizon_bars=1
    )
    weights, calibration = evidence(record, ("xgb", "lgb"), drift=0.1, horizon_bars=1)
    assert weights["xgb"] > weights["lgb"]
    assert calibration.slope == pytest.approx(0.3, abs=0.05)
