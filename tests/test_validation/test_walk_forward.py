"""The walk-forward: what a recipe is given, what is recorded, and what it measures."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from data.data_splitter import WalkForwardSplit, walk_rows
from data.target_engineering import Dataset
from utils.base import InsufficientDataError, ModelError, UsageError
from validation.walk_forward import (
    FoldMeasures,
    FoldResult,
    RecipePrediction,
    WalkForwardConfig,
    WalkForwardResult,
    WalkForwardValidator,
    summarise_folds,
)
from validation.wfe_metrics import ResolvedRows

QUICK = WalkForwardConfig(test_bars=200, min_train_bars=300, n_resamples=200)
HORIZON = 5


def make_dataset(n_sessions=900, n_symbols=2, seed=0, strength=0.3, horizon=HORIZON) -> Dataset:
    """Return a panel whose first feature carries `strength` of the scaled target."""
    rng = np.random.default_rng(seed)
    sessions = np.asarray(pd.bdate_range("2005-01-03", periods=n_sessions), dtype="datetime64[D]")
    ends = np.concatenate([sessions[horizon:], np.full(horizon, np.datetime64("NaT"))])
    n = n_sessions * n_symbols
    features = rng.normal(size=(n, 3)).astype(np.float32)
    sigma = np.exp(rng.normal(-3.5, 0.3, n))
    scaled = 0.05 + strength * features[:, 0] + rng.standard_t(5, n) / np.sqrt(5 / 3)
    scaled[np.isnat(np.repeat(ends, n_symbols))] = np.nan
    return Dataset(
        columns=("a", "b", "c"),
        features=features,
        date=np.repeat(sessions, n_symbols),
        label_end=np.repeat(ends, n_symbols),
        symbol_code=np.tile(np.arange(n_symbols, dtype=np.int32), n_sessions),
        symbols=tuple(f"S{i}" for i in range(n_symbols)),
        target_scaled=scaled,
        target_log=scaled * sigma,
        sigma_log=sigma,
        horizon_bars=horizon,
    )


@dataclass(frozen=True)
class FittedLine:
    coefficients: np.ndarray
    drift: float
    selected_features: tuple[str, ...] = ("a", "b", "c")
    notes: Mapping[str, object] = field(default_factory=lambda: {"kind": "line"})

    def predict(self, rows: Dataset) -> RecipePrediction:
        signal = rows.features.astype(float) @ self.coefficients
        return RecipePrediction(
            mean_log=(self.drift + signal) * rows.sigma_log,
            baseline_log=self.drift * rows.sigma_log,
            raw_scaled=signal,
            per_model={"line": signal},
            skill_lower=np.full(len(signal), 0.5),
        )


@dataclass
class LineRecipe:
    """Least squares; keeps what it was given, for the tests to look at."""

    trains: list[Dataset] = field(default_factory=list)
    earliers: list[pd.DataFrame] = field(default_factory=list)

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedLine:
        assert fold == len(self.trains)
        self.trains.append(train)
        self.earliers.append(earlier)
        drift = float(train.target_scaled.mean())
        solved = np.linalg.lstsq(train.features.astype(float), train.target_scaled - drift, rcond=None)
        return FittedLine(solved[0], drift)


@pytest.fixture(scope="module")
def walked() -> tuple[Dataset, LineRecipe, WalkForwardResult, list[FoldResult]]:
    dataset, recipe, seen = make_dataset(), LineRecipe(), []
    result = WalkForwardValidator(QUICK).run(dataset, recipe, on_fold=seen.append)
    return dataset, recipe, result, seen


def test_the_record_holds_each_row_once_with_its_outcome(walked):
    dataset, _, result, _ = walked
    record = result.record
    first = np.datetime64(record["date"].iloc[0], "D")
    expected = dataset.take(dataset.date >= first)
    assert len(record) == len(expected)
    assert not record.duplicated(["date", "symbol"]).any()
    assert record["date"].is_monotonic_increasing
    np.testing.assert_array_equal(record["realised_log"], expected.target_log)
    np.testing.assert_array_equal(record["sigma_log"], expected.sigma_log)
    assert record["symbol"].tolist()[:2] == ["S0", "S1"]
    # The rows whose outcome nobody knows yet are forecast all the same.
    assert record["realised_log"].isna().sum() == 2 * HORIZON
    assert record["predicted_log"].notna().all()
    wanted = {"date", "symbol", "predicted_log", "baseline_log", "raw_scaled", "model_line", "realised_log"}
    assert wanted | {"sigma_log", "label_end", "skill_lower", "fold", "trained_through"} == set(
        record.columns
    )


def test_nothing_a_fit_sees_was_unknown_before_its_fold(walked):
    _, recipe, result, _ = walked
    distance = QUICK.lag_bars + QUICK.embargo_bars
    sessions = np.unique(walked[0].date)
    for fold, train, earlier in zip(result.folds, recipe.trains, recipe.earliers, strict=True):
        limit = sessions[np.searchsorted(sessions, np.datetime64(fold.test_start, "D")) - distance]
        assert train.labelled.all()
        assert train.label_end.max() <= limit
        assert pd.Timestamp(train.label_end.max()) == fold.trained_through
        if fold.number:
            assert earlier["label_end"].max() <= pd.Timestamp(limit)
            assert earlier["realised_log"].notna().all()
            assert set(earlier["fold"]) == set(range(fold.number))
        else:
            assert earlier.empty
    rows = result.record
    assert (rows["trained_through"] < rows["date"]).all()


def test_a_fitted_recipe_cannot_read_the_outcome():
    class Peeker(LineRecipe):
        def fit(self, train, *, fold, earlier):
            line = super().fit(train, fold=fold, earlier=earlier)

            class Peeking(FittedLine):
                def predict(self, rows):
                    assert not rows.labelled.any()
                    assert np.isnat(rows.label_end).all()
                    peeked = np.nan_to_num(rows.target_scaled)
                    return replace(super().predict(rows), raw_scaled=peeked)

            return Peeking(line.coefficients, line.drift)

    result = WalkForwardValidator(QUICK).run(make_dataset(), Peeker())
    assert all(fold.ic is None for fold in result.folds)


def test_a_planted_signal_is_measured_at_its_size(walked):
    _, _, result, seen = walked
    assert list(result.folds) == seen
    ics = [fold.ic for fold in result.folds if fold.n > 100]
    # Pearson .3 / sqrt(1 + .3**2) = .287; Spearman is a little above for fat tails.
    assert np.mean(ics) == pytest.approx(0.30, abs=0.1)
    for fold in result.folds:
        if fold.n > 100:
            assert fold.ic_low < fold.ic < fold.ic_high
            assert fold.calibration_slope == pytest.approx(1.0, abs=0.5)
            assert fold.pred_std_over_target_std == pytest.approx(0.29, abs=0.1)
            assert fold.share_positive == pytest.approx(0.5, abs=0.15)
            assert fold.hit_minus_base > 0
    assert result.summary.feature_stability == 1.0
    assert result.summary.collapsed_folds == 0.0
    assert 0.5 < result.summary.efficiency < 1.5


def test_the_ic_is_the_mean_over_symbols_near_spearman_over_time(walked):
    record = walked[2].record.dropna(subset=["realised_log"])
    past = {}
    for fold in walked[2].folds:
        of_fold = record[record["fold"] == fold.number]
        by_symbol = [
            spearmanr(rows["raw_scaled"], rows["realised_log"] / rows["sigma_log"]).statistic
            for _, rows in of_fold.groupby("symbol")
        ]
        assert fold.ic == pytest.approx(np.mean(by_symbol), abs=0.05)
        assert fold.ic == pytest.approx(ResolvedRows(of_fold).causal_ic_by_session(past).mean(), abs=1e-12)


def test_fold_results_are_plain_data_when_asked(walked):
    plain = walked[2].folds[0].as_dict()
    assert plain["test_start"] == f"{walked[2].folds[0].test_start:%Y-%m-%d}"
    assert plain["selected_features"] == ["a", "b", "c"]
    assert plain["notes"] == {"kind": "line"}
    assert "measures" not in plain


def test_rolling_forgets_and_anchored_does_not(walked):
    recipe = LineRecipe()
    WalkForwardValidator(replace(QUICK, max_train_bars=250)).run(walked[0], recipe)
    assert {len(train.sessions) for train in recipe.trains} == {250}
    assert [len(train.sessions) for train in walked[1].trains] == [300, 500, 700]


def test_the_same_seed_gives_the_same_result(walked):
    again = WalkForwardValidator(QUICK).run(walked[0], LineRecipe())
    pd.testing.assert_frame_equal(again.record, walked[2].record)
    assert again.folds == walked[2].folds


def test_a_fold_without_outcomes_has_no_measures():
    dataset = make_dataset(n_sessions=311 + 200 + 3)
    result = WalkForwardValidator(QUICK).run(dataset, LineRecipe())
    last = result.folds[-1]
    assert (last.n, last.ic, last.ic_low, last.hit_minus_base, last.calibration_slope) == (0, *[None] * 4)
    assert len(WalkForwardValidator(QUICK).folds(dataset)) == len(result.folds)


def test_forecasts_that_are_missing_are_refused():
    class Broken(LineRecipe):
        def fit(self, train, *, fold, earlier):
            line = super().fit(train, fold=fold, earlier=earlier)
            return FittedLine(line.coefficients * np.nan, line.drift)

    with pytest.raises(ModelError, match=r"fold 0: predicted_log has shape .* not finite"):
        WalkForwardValidator(QUICK).run(make_dataset(), Broken())


def test_too_short_a_history_and_impossible_settings_are_refused():
    with pytest.raises(InsufficientDataError, match="311"):
        WalkForwardValidator(QUICK).run(make_dataset(n_sessions=310), LineRecipe())
    with pytest.raises(UsageError, match="interval_level"):
        WalkForwardValidator(WalkForwardConfig(interval_level=1.0))


# -- the summary across folds


def make_measures(**changes):
    usual = {
        "ic": 0.04,
        "fit_ic": 0.10,
        "test_hits": 0.54,
        "test_base": 0.52,
        "fit_hits": 0.56,
        "fit_base": 0.52,
        "signal_std": 0.1,
        "share_positive": 0.5,
        "selected_features": ("a", "b", "c"),
    }
    return FoldMeasures(**{**usual, **changes})


def test_the_summary_of_an_ordinary_model():
    summary = summarise_folds([make_measures(), make_measures(ic=-0.02, selected_features=("a", "b", "d"))])
    assert summary.efficiency == pytest.approx(0.5)
    assert summary.consistency == 0.5
    assert summary.overfitting_ratio == pytest.approx(1 - 0.01 / 0.10)
    assert summary.feature_stability == 0.5
    assert summary.collapsed_folds == summary.one_sided_folds == 0.0


@pytest.mark.parametrize(
    ("planted", "field", "expected"),
    [
        ({"signal_std": 0.001}, "collapsed_folds", 1.0),
        ({"share_positive": 0.97}, "one_sided_folds", 1.0),
        ({"share_positive": 0.02}, "one_sided_folds", 1.0),
        ({"ic": 0.0, "fit_ic": 0.8}, "overfitting_ratio", 1.0),
        ({"test_hits": 0.52, "fit_hits": 0.9}, "efficiency", 0.0),
        ({"test_hits": 0.52, "fit_hits": 0.52}, "efficiency", None),
        ({"ic": None}, "consistency", 0.0),
        ({"fit_ic": None}, "overfitting_ratio", None),
    ],
)
def test_a_planted_fault_shows_in_the_summary(planted, field, expected):
    ordinary = getattr(summarise_folds([make_measures()] * 3), field)
    assert getattr(summarise_folds([make_measures(**planted)] * 3), field) == expected != ordinary


def test_folds_without_outcomes_are_left_out():
    empty = make_measures(
        ic=None, test_hits=None, test_base=None, signal_std=None, share_positive=None, fit_ic=None
    )
    with_empty, without = summarise_folds([make_measures(), empty]), summarise_folds([make_measures()])
    assert with_empty.efficiency == without.efficiency
    assert with_empty.consistency == 1.0
    assert without.feature_stability is None
    assert summarise_folds([empty]).consistency is None


def test_rows_are_walked_like_a_naive_loop_would():
    date = np.asarray(pd.bdate_range("2020-01-01", periods=200), dtype="datetime64[D]")
    label_end = np.append(date[2:], [np.datetime64("NaT")] * 2)
    values = np.random.default_rng(0).normal(size=200)
    split = WalkForwardSplit(test_bars=30, min_train_bars=60, lag_bars=1, embargo_bars=0)
    said = walk_rows(
        lambda learned: lambda scored: np.full(len(scored), values[learned].mean()),
        date,
        label_end,
        split,
        horizon_bars=2,
    )
    first = int(np.flatnonzero(np.isfinite(said))[0])
    assert np.isfinite(said[first:]).all()
    for start in range(first, 200, 30):
        # The label of row t ends at t + 2, which lies before the first row that is scored.
        naive = values[: start - 2].mean()
        np.testing.assert_allclose(said[start : start + 30], naive)
