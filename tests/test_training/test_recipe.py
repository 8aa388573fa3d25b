from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data.target_engineering import Dataset
from training.gbm_search import SearchConfig
from training.recipe import (
    MARKET_DRIFT_STD,
    SYMBOL_DRIFT_STD,
    USUAL_DRIFT,
    GBMRecipe,
    RecipeConfig,
    common_move,
    drift_by_symbol,
    evidence,
    sample_weights,
    training_rows,
)
from training.trainer import begin_with_others
from utils.base import DataError
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

CONFIG = RecipeConfig(search=SearchConfig(n_trials=1, max_rounds=40), max_features=5, tune_every_folds=2)
UNTUNED = replace(CONFIG, search=SearchConfig(n_trials=0))


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
    assert fitted.selected_features == ("f4",)


def test_without_a_feature_that_stands_out_shap_selects():
    data = make_dataset(signal=0.0)
    config = replace(CONFIG, screen_t=np.inf)
    fitted = GBMRecipe(config).fit(data.take(np.arange(600)), fold=0, earlier=NOTHING)
    assert len(fitted.selected_features) == 5
    assert fitted.selection.method == "shap"


@pytest.mark.parametrize("lib", ["xgb", "lgb"])
@pytest.mark.parametrize("known_from", [300, 700])
def test_a_feature_that_is_not_known_yet_is_learned_from_when_it_is(known_from: int, lib: str):
    """Headlines begin late: before them their features are NaN, in the first folds throughout."""
    data = make_dataset()
    features = data.features.copy()
    features[:known_from, 4] = np.nan
    data = replace(data, features=features)
    config = replace(CONFIG, search=replace(CONFIG.search, models=(lib,)))
    fitted = GBMRecipe(config).fit(data.take(np.arange(600)), fold=0, earlier=NOTHING)
    rows = data.take(np.arange(600, 800))
    found = fitted.predict(rows).raw_scaled
    assert np.isfinite(found).all()
    assert ("f4" in fitted.selected_features) == (known_from < 600)
    assert (np.corrcoef(found, rows.target_scaled)[0, 1] > 0.2) == (known_from < 600)


def test_without_earlier_rows_the_forecast_is_the_drift():
    data = make_dataset()
    train = data.take(np.arange(600))
    found = GBMRecipe(CONFIG).fit(train, fold=0, earlier=NOTHING).predict(data.take(np.arange(600, 800)))
    np.testing.assert_allclose(found.mean_log, found.baseline_log)
    drift, _panel = drift_by_symbol(train, sample_weights(train, CONFIG.weight_half_life_sessions))
    np.testing.assert_allclose(found.baseline_log, drift["AAPL"] * 0.04)


@pytest.mark.parametrize("horizon_bars", [1, 5])
@pytest.mark.parametrize("n_symbols", [1, 6])
def test_drifts_are_worth_what_they_say_where_markets_are_as_believed(n_symbols: int, horizon_bars: int):
    """Over many worlds the true drift rises one for one with what is said; plain means say far too much."""
    rng = np.random.default_rng(5)
    n, said, plain, true = 1_500, [], [], []
    for _world in range(150):
        market = USUAL_DRIFT + MARKET_DRIFT_STD * rng.standard_normal()
        drifts = market + SYMBOL_DRIFT_STD * rng.standard_normal(n_symbols)
        common = 0.6 * rng.standard_normal((n + horizon_bars, 1))
        daily = drifts + common + 0.8 * rng.standard_normal((n + horizon_bars, n_symbols))
        total = np.cumsum(daily, axis=0)
        target = (total[horizon_bars:] - total[:-horizon_bars]) / horizon_bars**0.5
        one = make_dataset(n=n, horizon_bars=horizon_bars)
        panel = replace(
            one.take(np.repeat(np.arange(n), n_symbols)),
            symbol_code=np.tile(np.arange(n_symbols, dtype=np.int32), n),
            symbols=tuple(f"S{i}" for i in range(n_symbols)),
            target_scaled=target.ravel(),
        )
        found, _mean = drift_by_symbol(panel, np.ones(len(panel.date)))
        said.append([found[name] for name in panel.symbols])
        plain.append(target.mean(axis=0))
        true.append(drifts * horizon_bars**0.5)
    own, means, truth = (np.ravel(values) for values in (said, plain, true))
    assert 0.75 < np.polyfit(own, truth, 1)[0] < 1.25
    assert np.polyfit(means, truth, 1)[0] < 0.5
    assert np.mean((own - truth) ** 2) < 0.5 * np.mean((means - truth) ** 2)


@pytest.mark.parametrize("horizon_bars", [1, 5, 20, 126])
@pytest.mark.parametrize("n_rows", [1, 2, 5, 20, 100])
def test_of_a_short_history_next_to_nothing_is_believed(n_rows: int, horizon_bars: int):
    """Beside three long ones, and alone: its own mean is worth less than what was believed before."""
    rng = np.random.default_rng(3)
    off, alone = [], []
    for _world in range(20):
        total = np.cumsum(rng.standard_normal((800 + horizon_bars, 4)), axis=0)
        target = (total[horizon_bars:] - total[:-horizon_bars]) / horizon_bars**0.5
        one = make_dataset(n=800, horizon_bars=horizon_bars)
        code = np.tile(np.arange(4, dtype=np.int32), 800)
        panel = replace(
            one.take(np.repeat(np.arange(800), 4)),
            symbol_code=code,
            symbols=("A", "B", "C", "NEW"),
            target_scaled=target.ravel(),
        )
        kept = (code < 3) | (np.repeat(np.arange(800), 4) >= 800 - n_rows)
        short = panel.take(np.flatnonzero(kept))
        found, mean = drift_by_symbol(short, np.ones(len(short.date)))
        off.append(found["NEW"] - mean)
        few = replace(one, target_scaled=target[:, 0]).take(np.arange(n_rows))
        alone.append(drift_by_symbol(few, np.ones(n_rows))[1] - USUAL_DRIFT * horizon_bars**0.5)
    believed = horizon_bars**0.5 * SYMBOL_DRIFT_STD
    assert np.sqrt(np.mean(np.square(off))) < believed
    assert np.sqrt(np.mean(np.square(alone))) < 1.2 * believed


def test_targets_that_teach_have_no_mean_of_their_own():
    """One symbol's lose all of it, those of a panel what is sure of each."""
    data, panel = make_dataset(), make_panel(n=300)
    assert training_rows(data, data.features, CONFIG).target_scaled.mean() == pytest.approx(0.0, abs=0.02)
    apart = replace(panel, target_scaled=panel.target_scaled + 2.0 * (panel.symbol_code == 1))
    taught = training_rows(apart, apart.features, replace(CONFIG, common_move_share=0.0)).target_scaled
    assert taught.mean() == pytest.approx(0.0, abs=0.1)
    assert 1.5 < taught[apart.symbol_code == 1].mean() - taught[apart.symbol_code == 0].mean() < 2.0


def test_a_long_history_outweighs_what_was_believed():
    data = make_dataset(n=40_000, signal=0.0, horizon_bars=1)
    found, panel = drift_by_symbol(data, np.ones(40_000))
    assert found["AAPL"] == pytest.approx(panel)
    assert found["AAPL"] == pytest.approx(data.target_scaled.mean(), rel=0.2)


def test_tuning_is_redone_on_schedule():
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
            "date": pd.bdate_range("2010-01-01", periods=n),
            "symbol": "AAPL",
            "realised_log": 0.04 * (0.3 * raw + rng.normal(size=n)),
            "sigma_log": np.full(n, 0.04),
        }
    )


def weigh(record: pd.DataFrame, drifts=None):
    drifts = drifts or {"AAPL": 0.1}
    return evidence(record, ("xgb", "lgb"), drift=0.1, drifts=drifts, horizon_bars=1)


def test_evidence_reads_resolved_rows_only():
    record = make_record()
    open_rows = make_record(seed=1).assign(realised_log=np.nan)
    assert weigh(pd.concat([record, open_rows])) == weigh(record)
    weights, calibration, by_symbol = weigh(record)
    assert weights["xgb"] > weights["lgb"]
    assert calibration.slope == pytest.approx(0.3, abs=0.05)
    assert by_symbol == {"AAPL": calibration}


def make_panel(symbols=("AAA", "BBB", "CCC"), *, n: int = 500, common: float = 0.0, **given) -> Dataset:
    parts = [make_dataset(n=n, seed=seed, **given) for seed in range(len(symbols))]
    shock = common * np.random.default_rng(99).normal(size=n)
    date = np.concatenate([part.date for part in parts])
    order = np.argsort(date, kind="stable")
    target = np.concatenate([part.target_scaled + shock for part in parts])[order]
    return Dataset(
        columns=parts[0].columns,
        features=np.concatenate([part.features for part in parts])[order],
        date=date[order],
        label_end=np.concatenate([part.label_end for part in parts])[order],
        symbol_code=np.repeat(np.arange(len(symbols)), n).astype(np.int32)[order],
        symbols=symbols,
        target_scaled=target,
        target_log=target * 0.04,
        sigma_log=np.full(len(date), 0.04),
        horizon_bars=parts[0].horizon_bars,
    )


def walk(panel: Dataset, config: RecipeConfig = CONFIG):
    split = WalkForwardConfig(n_resamples=100, min_train_bars=200, test_bars=100)
    return WalkForwardValidator(split).run(panel, GBMRecipe(config))


def test_a_panel_is_walked_forward_and_each_symbol_gets_its_own_calibration():
    panel = make_panel()
    result = walk(panel, UNTUNED)
    assert set(result.record["symbol"]) == set(panel.symbols)
    fitted = GBMRecipe(UNTUNED).fit_all(panel, result.record)
    slopes = {name: fitted.for_symbol(name).calibration.slope for name in panel.symbols}
    pooled = fitted.model.calibration.slope
    assert len(set(slopes.values())) == 3
    assert all(abs(slope - pooled) < 0.3 for slope in slopes.values())
    assert fitted.for_symbol("UNKNOWN").calibration == fitted.model.calibration


def test_a_panel_s_forecast_carries_the_drift_of_its_symbol():
    panel = make_panel(n=300)
    high = panel.symbol_code == 1
    panel = replace(panel, target_scaled=panel.target_scaled + high)
    fitted = GBMRecipe(CONFIG).fit(panel, fold=0, earlier=NOTHING)
    drift = {name: fitted.for_symbol(name).calibration.drift for name in panel.symbols}
    assert drift["BBB"] > max(drift["AAA"], drift["CCC"])
    np.testing.assert_allclose(fitted.predict(panel).baseline_log[high], drift["BBB"] * 0.04)


def test_a_left_out_symbol_trains_and_calibrates_nothing():
    """Whatever its past looks like, the forecasts are the same."""
    config = replace(CONFIG, leave_out=("BBB",))
    panel = make_panel()
    own = panel.symbol_code == 1
    spoilt = replace(panel, target_scaled=np.where(own, -9.0, panel.target_scaled))
    spoilt = replace(spoilt, target_log=spoilt.target_scaled * 0.04)
    first, second = (walk(p, config).record for p in (panel, spoilt))
    assert np.array_equal(first["predicted_log"], second["predicted_log"])
    trained_on = walk(spoilt).record
    assert not np.array_equal(first["predicted_log"], trained_on["predicted_log"])


def test_leaving_everybody_out_is_refused():
    with pytest.raises(DataError, match="leaves no rows to train on"):
        GBMRecipe(replace(CONFIG, leave_out=("AAPL",))).fit(make_dataset(), fold=0, earlier=NOTHING)


def test_the_common_move_is_that_of_the_others_and_nothing_for_one_alone():
    date = np.array(["2020-01-01", "2020-01-01", "2020-01-02"], dtype="datetime64[D]")
    np.testing.assert_allclose(common_move(np.array([1.0, 3.0, 5.0]), date), [1.0, 1.0, 0.0])


def test_a_common_shock_disturbs_the_trees_less_when_it_is_taken_off():
    panel = make_panel(tuple("ABCDEFGH"), common=3.0, signal=0.2)
    found = {}
    for share in (0.0, 0.5, 1.0):
        record = walk(panel, replace(UNTUNED, common_move_share=share)).record.dropna()
        found[share] = np.corrcoef(record["raw_scaled"], record["realised_log"])[0, 1]
    assert found[1.0] > found[0.0]
    assert found[0.5] > found[0.0]


def test_symbols_that_move_together_do_not_count_as_many():
    """Ten copies of one series say as much about the slope as the series itself."""
    record = make_record(400)
    copies = pd.concat([record.assign(symbol=str(i)) for i in range(10)]).sort_values("date", kind="stable")
    alone, ten = weigh(record)[1], weigh(copies, {str(i): 0.1 for i in range(10)})[1]
    assert ten.skill_lower == pytest.approx(alone.skill_lower)
    assert ten.slope == pytest.approx(alone.slope)


def test_a_left_out_symbol_with_the_longest_history_waits_for_the_others():
    panel = make_panel()
    keep = (panel.symbol_code == 1) | (panel.date >= panel.date[900])
    late = panel.take(np.flatnonzero(keep))
    begun = begin_with_others(late, ("BBB",))
    assert begun.date[0] == panel.date[900]
    assert set(np.unique(begun.symbol_code)) == {0, 1, 2}
    assert begin_with_others(late, ()) is late
