"""The trainer on bars: what it finds, what it refuses, what it remembers; alone and in a panel."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from data.schema import Bars, BarsReport, Provenance
from evaluation.metrics import sharpe
from inference.pipeline import BundleForecaster, decide
from inference.position_sizing import alternative_returns, alternatives, make_sizer
from training.gbm_search import SearchConfig
from training.recipe import RecipeConfig, TrainerConfig
from training.train_gbm import DeviceChoice, GBMTrainer
from training.trainer import Trained, Walked
from utils.base import InsufficientDataError
from validation.wfe_metrics import probability_of_backtest_overfitting

QUICK = TrainerConfig(
    horizon_bars=1, recipe=RecipeConfig(search=SearchConfig(n_trials=1), tune_every_folds=9)
)


def as_bars(frame: pd.DataFrame, symbol: str = "TEST") -> Bars:
    seen = Provenance(source="csv", fetched_at=datetime.now(UTC), last_session=frame.index[-1], stale=False)
    return Bars(symbol=symbol, frame=frame, provenance=seen, report=BarsReport())


@pytest.fixture(scope="module")
def events() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def trained(make_planted, events) -> Trained:
    device = DeviceChoice(device="cpu", reason="the test wants it")
    bars = as_bars(make_planted(n=1_500, seed=1))
    return GBMTrainer(QUICK, events.append, device=device).train(bars)


def test_the_same_seed_trains_the_same_model(make_planted, trained):
    again = GBMTrainer(QUICK).train(as_bars(make_planted(n=1_500, seed=1)))
    pd.testing.assert_frame_equal(again.bundle.record, trained.bundle.record)
    assert again.verdict == trained.verdict
    assert again.backtest.metrics == trained.backtest.metrics


def test_the_record_is_out_of_sample_on_every_row(trained):
    record = trained.bundle.record
    assert (record["trained_through"] < record["date"]).all()
    assert trained.backtest.daily["is_out_of_sample"].all()
    assert trained.bundle.metadata["out_of_sample_from"] == f"{record['date'].min():%Y-%m-%d}"


def test_other_sizings_are_booked_on_the_same_rows_for_the_probability_of_overfitting(make_planted, trained):
    bars = make_planted(n=1_500, seed=1)
    forecaster = BundleForecaster(bundle=trained.bundle, as_lived=True)
    decided = decide("TEST", bars, forecaster, make_sizer(), costs=QUICK.costs)
    own = trained.backtest.daily["net_return"]
    tried = alternative_returns(decided.frame, decided.horizon_bars, QUICK.costs, len(own))
    names = [(sizer.name, sizer.rules) for sizer in alternatives()]
    place = names.index((make_sizer().name, make_sizer().rules))
    np.testing.assert_allclose(tried[:, place], own, rtol=0, atol=1e-12)
    expected = probability_of_backtest_overfitting(tried)
    assert trained.verdict.evidence["pbo"] == pytest.approx(expected, abs=1e-12)


def test_too_short_a_history_says_need_and_have(make_bars):
    with pytest.raises(InsufficientDataError, match=r"needs \d+ bars.*900|900.*\d+"):
        GBMTrainer(QUICK).train(as_bars(make_bars(n=900)))


@pytest.mark.usefixtures("trained")
def test_progress_rises_to_the_end(events):
    stages = [event for event in events if event["type"] == "stage"]
    progress = [event["progress"] for event in stages]
    assert progress == sorted(progress)
    assert all(event["stage"] for event in stages)
    folds = [event for event in events if event["type"] == "fold"]
    assert [fold["number"] for fold in folds] == list(range(len(folds)))
    assert json.dumps(folds)


def test_the_metadata_tell_the_device_and_why(trained):
    metadata = trained.bundle.metadata
    assert (metadata["device"], metadata["device_reason"]) == ("cpu", "the test wants it")
    assert metadata["universe"] is None
    assert metadata["recipe"] == asdict(QUICK)


def test_a_device_is_written_into_the_recipe_that_is_recorded():
    trainer = GBMTrainer(QUICK, device=DeviceChoice(device="cuda", reason="planted"))
    assert trainer.config.recipe.search.device == "cuda"
    assert GBMTrainer(QUICK).config is QUICK


def test_every_fold_tells_the_sharpe_of_its_decided_positions(trained):
    daily, folds = trained.backtest.daily, trained.bundle.metadata["folds"]
    for fold in folds:
        own = daily.loc[fold["test_start"] : fold["test_end"], "net_return"]
        assert fold["sharpe"] == sharpe(own.to_numpy(), trained.backtest.costs.periods_per_year).value
        assert fold["symbol_ic"] == pytest.approx(fold["ic"], abs=1e-9)
    assert sum(fold["sharpe"] is not None for fold in folds) >= len(folds) - 1
    assert json.dumps(folds, allow_nan=False)


def test_threads_change_no_fingerprint_and_the_seed_does(make_planted):
    bars = as_bars(make_planted(n=1_500, seed=1))

    def fingerprint(config: TrainerConfig) -> str:
        return GBMTrainer(config).runs({"TEST": bars})[0].fingerprint

    search = replace(QUICK.recipe.search, threads=2)
    threaded = replace(QUICK, recipe=replace(QUICK.recipe, search=search))
    reseeded = replace(QUICK, recipe=replace(QUICK.recipe, seed=8))
    assert fingerprint(threaded) == fingerprint(QUICK) != fingerprint(reseeded)


def test_progress_rises_over_all_horizons_and_the_folds_are_those_of_the_one_that_decides(make_planted):
    events: list[dict] = []
    config = replace(QUICK, path_horizons_bars=(5, 20), recipe=RecipeConfig(search=SearchConfig(n_trials=0)))
    trained = GBMTrainer(config, events.append).train(as_bars(make_planted(n=1_500)))
    stages = [event for event in events if event["type"] == "stage"]
    progress = [event["progress"] for event in stages]
    assert progress == sorted(progress)
    assert [any(e["stage"].startswith(f"{bars} bars, ") for e in stages) for bars in (5, 20)] == [True, True]
    folds = [event["ic"] for event in events if event["type"] == "fold"]
    assert folds == [fold.ic for fold in trained.walk_forward.folds]


def test_the_longest_horizon_decides_how_many_bars_are_needed():
    far = replace(QUICK, path_horizons_bars=(20,))
    assert GBMTrainer(far).needed_bars == GBMTrainer(replace(QUICK, horizon_bars=20)).needed_bars


PANEL = replace(QUICK, recipe=replace(QUICK.recipe, search=SearchConfig(n_trials=0)))


@pytest.fixture(scope="module")
def panel(make_planted) -> dict[str, Bars]:
    made = {name: make_planted(n=1_500, seed=seed, ic=0.2) for name, seed in (("A", 1), ("B", 2), ("C", 3))}
    # C came to the exchange later: too short to be trained alone.
    made["C"] = made["C"].iloc[500:]
    return {name: as_bars(frame, name) for name, frame in made.items()}


@pytest.fixture(scope="module")
def walked(panel) -> Walked:
    return GBMTrainer(PANEL).walk(panel)


def test_a_panel_gives_each_symbol_its_rows_its_calibration_and_its_verdict(panel, walked):
    trainer = GBMTrainer(PANEL)
    for name in panel:
        one = trainer.conclude(walked, panel[name])
        assert set(one.bundle.record["symbol"]) == {name}
        assert one.bundle.ensemble == walked.fitted.for_symbol(name)
        assert one.verdict.evidence["n_rows"] == one.bundle.record["realised_log"].notna().sum()
        assert one.bundle.metadata["data_hash"] == walked.hashes[name]
        universe = one.bundle.metadata["universe"]
        assert universe["symbols"] == ["A", "B", "C"]
        assert universe["data"][name]["hash"] == walked.hashes[name]
        last = panel[name].frame.index[-1]
        own = walked.dataset.features[walked.dataset.symbol_code == list(panel).index(name)]
        np.testing.assert_array_equal(one.golden_inputs, own[-8:])
        assert one.bundle.metadata["data"]["last_session"] == f"{last:%Y-%m-%d}"
    drifts = {walked.fitted.for_symbol(name).calibration.drift for name in panel}
    assert len(drifts) == 3


def test_in_a_panel_each_symbol_has_its_calibration_and_figures_of_a_further_horizon(panel, walked):
    trainer = GBMTrainer(replace(PANEL, path_horizons_bars=(5,)))
    both = trainer.walk(panel)
    pd.testing.assert_frame_equal(both.result.record, walked.result.record)
    alone = GBMTrainer(replace(PANEL, horizon_bars=5)).walk(panel)
    figures = set()
    for name in panel:
        bundle = trainer.conclude(both, panel[name]).bundle
        (path,) = bundle.path_models
        assert path.horizon_bars == 5
        assert path.ensemble.calibration == alone.fitted.for_symbol(name).calibration
        found = bundle.metadata["path_models"]["5"]
        own = alone.result.record.query("symbol == @name")
        assert found["n_rows"] == own["realised_log"].notna().sum()
        figures.add(found["ic"])
    assert len(figures) == 3


def test_a_symbol_too_short_to_be_trained_alone_can_be_judged_in_a_panel(panel, walked):
    with pytest.raises(InsufficientDataError):
        GBMTrainer(PANEL).train(panel["C"])
    assert GBMTrainer(PANEL).conclude(walked, panel["C"]).verdict.label in {"edge", "no-edge", "insufficient"}


def test_a_symbol_that_is_left_out_changes_nothing_of_its_own_model(panel, walked, make_planted):
    """Planted: other prices of the symbol; a model that had seen them would differ."""
    left_out = replace(PANEL, recipe=replace(PANEL.recipe, leave_out=("A",)))
    other = {**panel, "A": as_bars(make_planted(n=1_500, seed=9, ic=-0.4), "A")}
    probe = np.random.default_rng(0).normal(size=(50, len(walked.dataset.columns))).astype(np.float32)

    def signal(run: Walked) -> np.ndarray:
        ensemble = run.fitted.for_symbol("A")
        return ensemble.combine(ensemble.per_model(probe))

    with_one, with_other = (signal(GBMTrainer(left_out).walk(bars)) for bars in (panel, other))
    np.testing.assert_array_equal(with_one, with_other)
    assert not np.array_equal(signal(walked), signal(GBMTrainer(PANEL).walk(other)))


def test_every_further_try_tightens_the_verdict_of_a_panel_too_and_is_named(panel, walked):
    """Planted: two other runs on the same prices; the limits must be a ninth."""
    earlier = []
    for seed in (8, 9):
        other = replace(PANEL, recipe=replace(PANEL.recipe, seed=seed))
        # Looked at for another symbol of the same panel: it is the same question.
        earlier += [run for run in GBMTrainer(other).runs(panel) if run.symbol == "B"]
    trained = GBMTrainer(PANEL).conclude(walked, panel["A"], earlier=earlier)
    assert trained.verdict.evidence["n_trials"] == 3
    together = [reason for reason in trained.verdict.reasons if reason.startswith("3 symbols together")]
    assert any("(at most 0.00556)" in reason for reason in together), together
    told = trained.bundle.metadata["tries"]
    assert [one["kind"] for one in told] == ["gbm", "gbm"]
    for seed, one in zip((8, 9), told, strict=True):
        assert one["settings"].startswith("3 symbols, ")
        assert f"recipe.seed {seed}" in one["settings"]
        assert one["at"].startswith("20")


@pytest.mark.parametrize("n_forecasts", [0, 1, 2])
def test_a_symbol_that_ended_early_is_in_the_panel_and_cannot_be_judged(panel, walked, n_forecasts):
    sessions = panel["B"].frame.index
    first = sessions.get_loc(walked.result.record["date"].min())
    early = replace(panel["B"], frame=panel["B"].frame.iloc[: first + n_forecasts])
    trainer = GBMTrainer(PANEL)
    mixed = {"A": panel["A"], "B": early, "C": panel["C"]}
    again = trainer.walk(mixed)
    assert trainer.conclude(again, panel["A"]).verdict.label in {"edge", "no-edge", "insufficient"}
    with pytest.raises(InsufficientDataError, match=r"B has [01] out-of-sample forecasts"):
        trainer.conclude(again, early)
