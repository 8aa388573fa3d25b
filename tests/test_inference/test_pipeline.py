"""One path from bars to positions: what is decided at t does not change when later bars arrive."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from data.feature_engineer import engineer_features
from data.target_engineering import build_dataset, make_target
from evaluation.accounting import CostModel
from inference.artifact import new_version_id
from inference.intervals import centre_log
from inference.load_gbm_models import GBMBundle, PathModel
from inference.pipeline import (
    FORECAST_COLUMNS,
    BundleForecaster,
    backtest_decisions,
    decide,
    path_ahead,
)
from inference.position_sizing import PRESETS, make_sizer, win_record
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, RecipeConfig
from utils.base import DataError, ModelIncompatibleError
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

HORIZON = 5


@pytest.fixture(scope="module")
def bars(make_bars):
    return make_bars(n=900, seed=5)


@pytest.fixture(scope="module")
def bundle(bars) -> GBMBundle:
    """A model of the first 800 bars; the last 100 come after it was trained."""
    data = build_dataset({"AAPL": bars.iloc[:800]}, HORIZON)
    recipe = GBMRecipe(RecipeConfig(search=SearchConfig(n_trials=2, max_rounds=20), max_features=10))
    config = WalkForwardConfig(test_bars=100, min_train_bars=200)
    result = WalkForwardValidator(config).run(data, recipe)
    fitted = recipe.fit(data.take(np.flatnonzero(data.labelled)), fold=0, earlier=result.record)
    # A known slope, so that forecasts after the record differ from the drift.
    calibration = replace(fitted.model.calibration, slope=0.5, skill_lower=0.5)
    return GBMBundle(
        symbol="AAPL",
        horizon_bars=HORIZON,
        ensemble=replace(fitted.model, calibration=calibration),
        record=result.record,
        metadata={"model_version": new_version_id(datetime.now(UTC)), "verdict": {"label": "edge"}},
        importance={},
        hyperparameters={},
    )


@dataclass(frozen=True)
class Peeker:
    """A forecaster with a planted fault: it knows the next close."""

    inner: BundleForecaster

    @property
    def horizon_bars(self) -> int:
        return self.inner.horizon_bars

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        frame = self.inner.forecast(bars)
        ahead = bars["Close"].shift(-1) / bars["Close"] - 1.0
        return frame.assign(expected_return=ahead.fillna(0.0), skill_lower=1.0)


def changed_by_the_future(forecaster, sizer, bars: pd.DataFrame, rows) -> list[str]:
    """Return the columns whose value at t differs between `bars[:t + 1]` and all bars."""
    full = decide("AAPL", bars, forecaster, sizer).frame
    changed = set()
    for t in rows:
        cut = decide("AAPL", bars.iloc[: t + 1], forecaster, sizer).frame
        pair = pd.concat([cut.iloc[[-1]], full.iloc[[t]]])
        changed |= {
            name for name in pair if pair[name].iloc[0] != pair[name].iloc[1] and pair[name].notna().any()
        }
    return sorted(changed)


ROWS = (3, 260, 460, 520, 799, 800, 850, 899)


@pytest.mark.parametrize("sizing", PRESETS)
def test_a_decision_does_not_change_when_later_bars_arrive(bundle, bars, sizing: str):
    assert changed_by_the_future(BundleForecaster(bundle=bundle), make_sizer(sizing), bars, ROWS) == []


def test_a_forecaster_that_peeks_is_caught(bundle, bars):
    peeker = Peeker(BundleForecaster(bundle=bundle))
    changed = changed_by_the_future(peeker, make_sizer("calibrated"), bars, ROWS)
    assert {"expected_return", "target_weight"} <= set(changed)


def test_the_record_is_used_where_it_reaches_and_the_model_after_it(bundle, bars):
    frame = BundleForecaster(bundle=bundle).forecast(bars)
    assert set(FORECAST_COLUMNS) <= set(frame.columns)
    record = bundle.record.set_index("date")
    inside = frame.loc[record.index]
    np.testing.assert_array_equal(inside["expected_log"], record["predicted_log"])
    assert inside["is_out_of_sample"].all()
    after = frame.iloc[800:]
    assert after["is_out_of_sample"].all()
    assert after["expected_log"].nunique() > 5
    before = frame.loc[: record.index[0]].iloc[:-1]
    assert not before["is_out_of_sample"].any()
    assert before["expected_return"].isna().all()


def test_in_sample_rows_come_only_when_asked_and_are_marked(bundle, bars):
    asked = BundleForecaster(bundle=bundle, include_in_sample=True).forecast(bars)
    extra = asked["expected_return"].notna() & ~asked["is_out_of_sample"]
    assert extra.sum() > 100
    assert asked.index[extra][-1] < bundle.record["date"].min()


def test_without_an_edge_the_position_after_training_is_passive(bundle, bars):
    no_edge = replace(bundle, metadata={**bundle.metadata, "verdict": {"label": "no-edge"}})
    sizer = make_sizer("calibrated")
    weights = decide("AAPL", bars, BundleForecaster(bundle=no_edge), sizer).frame["target_weight"]
    assert (weights.iloc[801:] == 1.0).all()
    tilted = decide("AAPL", bars, BundleForecaster(bundle=bundle), sizer).frame["target_weight"]
    assert (tilted.iloc[801:] != 1.0).any()


def test_the_scale_of_prices_does_not_matter(bundle, bars):
    larger = bars.assign(**{name: bars[name] * 1_000.0 for name in ("Open", "High", "Low", "Close")})
    first, second = (
        decide("AAPL", b, BundleForecaster(bundle=bundle), make_sizer()).frame for b in (bars, larger)
    )
    np.testing.assert_allclose(first["target_weight"], second["target_weight"], atol=1e-6)


def test_the_path_ahead_starts_from_the_last_close(bundle, bars):
    decisions = decide("AAPL", bars, BundleForecaster(bundle=bundle), make_sizer())
    dates = pd.bdate_range(bars.index[-1] + pd.Timedelta(days=1), periods=20)
    path = path_ahead(decisions, dates)
    last = decisions.frame.iloc[-1]
    assert path.prices[HORIZON - 1] == pytest.approx(last["close"] * np.exp(last["expected_log"]))
    assert decisions.out_of_sample_from == bundle.record["date"].min()
    assert decisions.sizing_id.startswith("calibrated:")


@pytest.fixture(scope="module")
def with_paths(bundle) -> GBMBundle:
    """The same with models of 1 and 20 bars, whose calibrations are their own."""
    paths = []
    for horizon_bars, slope, drift in ((1, -0.4, 0.1), (20, 0.9, -0.2)):
        calibration = replace(bundle.ensemble.calibration, slope=slope, drift=drift)
        ensemble = replace(bundle.ensemble, calibration=calibration)
        paths.append(PathModel(horizon_bars=horizon_bars, ensemble=ensemble, hyperparameters={}))
    return replace(bundle, path_models=tuple(paths))


FURTHER = ["expected_log_h1", "expected_log_h20"]


def test_forecasts_of_further_horizons_do_not_change_when_later_bars_arrive(with_paths, bars):
    forecaster = BundleForecaster(bundle=with_paths)
    assert changed_by_the_future(forecaster, make_sizer(), bars, ROWS) == []
    frame = forecaster.forecast(bars)
    newest = with_paths.record["date"].max()
    assert frame.loc[newest:, FURTHER].notna().all(axis=None)
    assert frame[FURTHER].nunique().min() > 5
    assert frame.loc[frame.index < newest, FURTHER].isna().all(axis=None), "nothing is replayed"


@dataclass(frozen=True)
class PathPeeker(Peeker):
    """A planted fault: its further horizon knows what came."""

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        ahead = np.log(bars["Close"].shift(-20) / bars["Close"]).fillna(0.0)
        return self.inner.forecast(bars).assign(expected_log_h20=ahead)


def test_a_path_that_peeks_is_caught(with_paths, bars):
    peeker = PathPeeker(BundleForecaster(bundle=with_paths))
    assert changed_by_the_future(peeker, make_sizer(), bars, ROWS) == ["expected_log_h20"]


def test_a_forecast_of_a_further_horizon_is_in_its_own_volatility(with_paths, bars):
    frame = BundleForecaster(bundle=with_paths).forecast(bars)
    ensemble = with_paths.path_models[1].ensemble
    features = engineer_features(bars)[list(ensemble.columns)].to_numpy(dtype=np.float32)[-1:]
    scaled = ensemble.calibration.apply(ensemble.combine(ensemble.per_model(features)))[0]
    sigma_log = make_target(bars, 20)["sigma_log"].iloc[-1]
    assert frame["expected_log_h20"].iloc[-1] == pytest.approx(scaled * sigma_log, rel=1e-6)


def test_further_horizons_shape_the_path_and_nothing_else(bundle, with_paths, bars):
    plain, bent = (
        decide("AAPL", bars, BundleForecaster(bundle=each), make_sizer()) for each in (bundle, with_paths)
    )
    pd.testing.assert_frame_equal(bent.frame.drop(columns=FURTHER), plain.frame)
    dates, last = pd.bdate_range(bars.index[-1], periods=41)[1:], bent.frame.iloc[-1]
    straight, path = (np.log(path_ahead(each, dates).prices / last["close"]) for each in (plain, bent))
    assert path[[0, 4, 19]] == pytest.approx(last[["expected_log_h1", "expected_log", "expected_log_h20"]])
    assert path[39] - path[19] == pytest.approx(4 * last["baseline_log"])
    centre = centre_log(
        np.arange(1.0, 41.0), last["expected_log"], last["baseline_log"], horizon_bars=HORIZON
    )
    np.testing.assert_allclose(straight, centre, atol=1e-12)


def test_where_the_bars_end_inside_the_record_the_path_has_the_one_horizon(bundle, with_paths, bars):
    dates = pd.bdate_range("2020-01-01", periods=30)
    paths = [
        path_ahead(decide("AAPL", bars.iloc[:700], BundleForecaster(bundle=each), make_sizer()), dates).prices
        for each in (bundle, with_paths)
    ]
    assert np.isfinite(paths[0]).all()
    np.testing.assert_array_equal(*paths)


def test_the_win_record_counts_resolved_forecasts_only():
    forecast = np.full(300, 0.01)
    outcome = np.where(np.arange(300) % 4 == 0, -0.02, 0.02)
    outcome[-HORIZON:] = np.nan
    share, payoff = win_record(forecast, outcome, horizon_bars=HORIZON)
    assert np.all(share[:HORIZON] == 0.5)
    assert np.all(payoff[:HORIZON] == 1.0)
    assert share[-1] == pytest.approx((221 + 25) / (295 + 50), abs=0.005)
    early, _ = win_record(forecast[:100], outcome[:100], horizon_bars=HORIZON)
    assert np.array_equal(early, share[:100])


def test_features_are_taken_by_name_not_by_place(bundle, bars, monkeypatch: pytest.MonkeyPatch):
    expected = BundleForecaster(bundle=bundle).forecast(bars)
    shuffled = lambda frame: engineer_features(frame).iloc[:, ::-1]  # noqa: E731
    monkeypatch.setattr("inference.pipeline.engineer_features", shuffled)
    pd.testing.assert_frame_equal(BundleForecaster(bundle=bundle).forecast(bars), expected)


def test_a_feature_that_is_gone_is_named_and_never_filled(bundle, bars, monkeypatch: pytest.MonkeyPatch):
    without = lambda frame: engineer_features(frame).drop(columns=["rsi_14"])  # noqa: E731
    monkeypatch.setattr("inference.pipeline.engineer_features", without)
    with pytest.raises(ModelIncompatibleError, match="rsi_14"):
        BundleForecaster(bundle=bundle).forecast(bars)


def test_forecasts_made_from_other_prices_are_not_out_of_sample(bars, bundle, make_bars):
    """The record is joined by date: on another series of the same sessions it proves nothing."""
    own = decide("AAPL", bars, BundleForecaster(bundle=bundle), make_sizer())
    other = decide("AAPL", make_bars(n=900, seed=6), BundleForecaster(bundle=bundle), make_sizer())
    replayed = own.frame.index <= bundle.record["date"].max()
    assert own.findings == ()
    assert own.frame["is_out_of_sample"].to_numpy()[replayed].sum() == len(bundle.record)
    # Until the first outcome of the record is known nobody can tell.
    assert other.frame["is_out_of_sample"].to_numpy()[replayed].sum() <= HORIZON + 3
    assert "were made from other prices" in other.findings[0]


def test_prices_restated_from_one_bar_on_are_noticed_there_and_scaled_prices_are_the_same(bars, bundle):
    forecaster = BundleForecaster(bundle=bundle)
    split = 650
    restated = bars.copy()
    restated.iloc[split:, :4] *= 1.05
    frame = decide("AAPL", restated, forecaster, make_sizer()).frame
    flagged = np.flatnonzero(frame["is_of_other_prices"])
    assert flagged[0] == split
    assert flagged[-1] < split + 30
    scaled = bars.copy()
    scaled.iloc[:, :4] *= 1.05
    assert decide("AAPL", scaled, forecaster, make_sizer()).findings == ()


def test_whether_prices_are_others_is_known_at_the_bar(bars, bundle, make_bars):
    forecaster, other = BundleForecaster(bundle=bundle), make_bars(n=900, seed=6)
    whole = forecaster.forecast(other)["is_of_other_prices"].to_numpy()
    for cut in range(480, 800, 40):
        part = forecaster.forecast(other.iloc[:cut])["is_of_other_prices"].to_numpy()
        assert np.array_equal(part, whole[:cut])


def test_without_an_edge_every_row_is_passive_and_live_forecasts_are_the_drift(bars, bundle):
    no_edge = replace(bundle, metadata={**bundle.metadata, "verdict": {"label": "no-edge"}})
    frame = decide("AAPL", bars, BundleForecaster(bundle=no_edge), make_sizer()).frame
    np.testing.assert_array_equal(frame["target_weight"], 1.0)
    live = np.asarray(frame.index > bundle.record["date"].max())
    assert live.any()
    np.testing.assert_allclose(frame["expected_log"][live], frame["baseline_log"][live])
    # The day of the training included: what it forecasts had not come either.
    open_ended = bundle.record["date"][bundle.record["realised_log"].isna()]
    assert len(open_ended)
    served = frame.loc[pd.DatetimeIndex(open_ended)]
    np.testing.assert_allclose(served["expected_log"], served["baseline_log"])
    lived = decide("AAPL", bars, BundleForecaster(bundle=no_edge, as_lived=True), make_sizer()).frame
    assert not np.allclose(lived["expected_log"][live], lived["baseline_log"][live])


def test_the_direction_is_that_of_the_forecast_that_is_drawn(bars, bundle):
    """Half a variance above it lies the mean, which is up on nearly every day."""
    decisions = decide("AAPL", bars, BundleForecaster(bundle=bundle, as_lived=True), make_sizer())
    daily = backtest_decisions(decisions, CostModel()).daily
    drawn = decisions.frame["expected_log"].reindex(daily.index)
    np.testing.assert_allclose(daily["expected_return"], np.expm1(drawn))


def test_a_backtest_begins_behind_the_last_forecast_of_other_prices(bars, bundle, make_bars):
    restated = bars.copy()
    restated.iloc[650:, :4] *= 1.05
    forecaster = BundleForecaster(bundle=bundle)
    decisions = decide("AAPL", restated, forecaster, make_sizer())
    last = np.flatnonzero(decisions.frame["is_of_other_prices"])[-1]
    report = backtest_decisions(decisions, CostModel())
    assert report.daily.index[0] > restated.index[last]
    other = decide("AAPL", make_bars(n=900, seed=6).iloc[:800], forecaster, make_sizer())
    with pytest.raises(DataError, match="made from other prices"):
        backtest_decisions(other, CostModel())
