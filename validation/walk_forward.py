"""Walk forward through a panel: fit the recipe on what was known, predict what was not, keep the record.

The recipe is what is validated, whatever it is: this module knows no model. Every row from the first test
session on gets exactly one forecast, made by a fit whose labels had all ended before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from data.data_splitter import Fold, WalkForwardSplit
from data.target_engineering import Dataset
from evaluation.advanced_backtester import BacktestReport
from evaluation.metrics import sharpe
from utils.base import ModelError, UsageError
from validation.wfe_metrics import (
    MAX_ONE_SIDED,
    MIN_SIGNAL_STD,
    FloatArray,
    Past,
    ResolvedRows,
    block_length,
    calibration_slope,
    consistency,
    feature_stability,
    hit_rate,
    known_mean,
    less,
    overfitting_ratio,
    ratio,
    resampled_block_sums,
    share_up,
    walk_forward_efficiency,
)

# Of a fold's result as plain data.
_SESSIONS = ("test_start", "test_end", "trained_through")
_FIGURES: tuple[str, ...] = ("number", "n", "ic", "ic_low", "ic_high", "fit_ic", "hit_minus_base")
_FIGURES += ("calibration_slope", "pred_std_over_target_std", "share_positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePrediction:
    """Forecasts of rows that the fit has not seen, (n,) each.

    ``mean_log`` is the calibrated h-day log return, ``baseline_log`` the drift, which needs no skill.
    ``raw_scaled`` is the uncalibrated signal: deviation from the drift in units of the h-day volatility;
    ``per_model`` are the models' shares of it before weighing. ``skill_lower`` is the lower confidence bound
    of the skill, within [0, 1], as known when the fit was made.
    """

    mean_log: FloatArray
    baseline_log: FloatArray
    raw_scaled: FloatArray
    per_model: Mapping[str, FloatArray]
    skill_lower: FloatArray


class FittedRecipe(Protocol):
    """What a recipe leaves behind after fitting one fold."""

    @property
    def selected_features(self) -> tuple[str, ...]:
        """Names of the features that the fit uses."""
        ...

    @property
    def notes(self) -> Mapping[str, object]:
        """What a fold table should show beside the measures."""
        ...

    def predict(self, rows: Dataset) -> RecipePrediction:
        """Forecast ``rows`` from their features and volatility."""
        ...


class Recipe(Protocol):
    """Everything from training rows to a forecaster: scale, select, tune, weigh, fit, calibrate."""

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedRecipe:
        """Fit on rows whose labels were known before the fold.

        ``fold`` ascends from 0; ``earlier`` is the record of earlier folds, as far as known then; maybe
        empty.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkForwardConfig(WalkForwardSplit):
    """How a recipe is walked forward: the split, and the bootstrap and coverage of the interval of the IC."""

    n_resamples: int = 1_000
    interval_level: float = 0.90
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldMeasures:
    """The measures of one fold that the summary across folds reads; None where undefined.

    IC: rank correlation of signal and outcome (both in volatilities) over time, mean over symbols; see
    `ResolvedRows.causal_ic_by_session`. ``test_`` and bare names are of test rows, ranked among those of
    earlier folds and of the fold so far; ``fit_`` of the last rows that the model was fitted on, ranked among
    themselves so far, since no fit has forecast the rows before them. Hits are those of the uncalibrated
    forecast, base those of "always up". ``share_positive``: of the raw signals above
    zero, before calibration takes their mean away.
    """

    ic: float | None
    fit_ic: float | None
    test_hits: float | None
    test_base: float | None
    fit_hits: float | None
    fit_base: float | None
    signal_std: float | None
    share_positive: float | None
    selected_features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkForwardSummary:
    """Measures across folds; None where undefined; see the functions of these names.

    Collapsed is a fold whose signal hardly varies, one-sided one whose signal has one sign on most rows.
    """

    efficiency: float | None
    consistency: float | None
    overfitting_ratio: float | None
    feature_stability: float | None
    collapsed_folds: float | None
    one_sided_folds: float | None


def summarise_folds(folds: Sequence[FoldMeasures]) -> WalkForwardSummary:
    """Summarise the folds of a walk-forward."""
    tested = [fold for fold in folds if fold.test_hits is not None]
    shares = [fold.share_positive for fold in folds if fold.share_positive is not None]
    spreads = [fold.signal_std for fold in folds if fold.signal_std is not None]
    return WalkForwardSummary(
        efficiency=walk_forward_efficiency(
            known_mean([fold.test_hits for fold in tested]),
            known_mean([fold.test_base for fold in tested]),
            known_mean([fold.fit_hits for fold in tested]),
            known_mean([fold.fit_base for fold in tested]),
        ),
        consistency=consistency([fold.ic for fold in tested]),
        overfitting_ratio=overfitting_ratio([fold.fit_ic for fold in tested], [fold.ic for fold in tested]),
        feature_stability=feature_stability([fold.selected_features for fold in folds]),
        collapsed_folds=known_mean([float(spread < MIN_SIGNAL_STD) for spread in spreads]),
        one_sided_folds=known_mean([float(max(share, 1 - share) > MAX_ONE_SIDED) for share in shares]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult(FoldMeasures):
    """What one fold showed; None where a measure is undefined.

    ``trained_through`` is the latest session whose prices the fit has used, ``n`` the number of test rows
    with a known outcome. ``ic_low`` and ``ic_high`` are the block-bootstrap interval of the IC. Hits, slope
    and spread are those of the calibrated forecast, the last two in volatilities.
    """

    number: int
    test_start: pd.Timestamp
    test_end: pd.Timestamp
    trained_through: pd.Timestamp
    n: int
    ic_low: float | None
    ic_high: float | None
    hit_minus_base: float | None
    calibration_slope: float | None
    pred_std_over_target_std: float | None
    notes: Mapping[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON; sessions as ISO dates."""
        days = {name: f"{getattr(self, name):%Y-%m-%d}" for name in _SESSIONS}
        plain = {name: getattr(self, name) for name in _FIGURES}
        return {**plain, **days, "selected_features": list(self.selected_features), "notes": dict(self.notes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkForwardResult:
    """Outcome of a walk-forward: the record, the folds in order, and the measures across them.

    The record has one row per (date, symbol), ascending: ``date``, ``symbol``, ``predicted_log``,
    ``baseline_log``, ``raw_scaled``, ``model_<name>``, ``realised_log`` (NaN where not known yet),
    ``sigma_log``, ``label_end``, ``skill_lower``, ``fold``, ``trained_through``.
    """

    record: pd.DataFrame
    folds: tuple[FoldResult, ...]
    summary: WalkForwardSummary


class WalkForwardValidator:
    """Walks a recipe forward, as its `WalkForwardConfig` says."""

    def __init__(self, config: WalkForwardConfig) -> None:
        if not 0.5 <= config.interval_level < 1 or config.n_resamples < 100:
            raise UsageError(
                f"interval_level {config.interval_level} must lie in [0.5, 1) and n_resamples "
                f"{config.n_resamples} be at least 100"
            )
        self.config = config

    def folds(self, dataset: Dataset) -> list[Fold]:
        """Return the folds of ``dataset``; see `WalkForwardSplit.folds`."""
        label_end = np.where(dataset.labelled, dataset.label_end, np.datetime64("NaT"))
        return self.config.folds(dataset.date, label_end, horizon_bars=dataset.horizon_bars)

    def run(
        self, dataset: Dataset, recipe: Recipe, *, on_fold: Callable[[FoldResult], None] | None = None
    ) -> WalkForwardResult:
        """Fit and predict fold after fold, in order of time; ``on_fold`` is called after each.

        Raises `InsufficientDataError` if no session is left to test on, `ModelError` if a forecast is not
        finite.
        """
        frames: list[pd.DataFrame] = []
        results: list[FoldResult] = []
        past: Past = {}
        for fold in self.folds(dataset):
            fitted = recipe.fit(
                dataset.take(fold.train_idx), fold=fold.number, earlier=_resolved(frames, fold.train_end)
            )
            frames.append(_predict(fitted, dataset.take(fold.test_idx), fold))
            rows = ResolvedRows(frames[-1])
            scores = rows.causal_ic_by_session(past)
            known = ResolvedRows(_predict(fitted, self._tail(dataset, fold), fold))
            results.append(self._judge(fold, rows, scores, known, fitted, horizon_bars=dataset.horizon_bars))
            if on_fold is not None:
                on_fold(results[-1])
        record = pd.concat(frames, ignore_index=True)
        return WalkForwardResult(record=record, folds=tuple(results), summary=summarise_folds(results))

    def _tail(self, dataset: Dataset, fold: Fold) -> Dataset:
        """Return the last training rows, as many sessions as a test block has: what the fit knows."""
        sessions = np.unique(dataset.date[fold.train_idx])
        first = sessions[-min(self.config.test_bars, len(sessions))]
        return dataset.take(fold.train_idx[dataset.date[fold.train_idx] >= first])

    def _judge(
        self,
        fold: Fold,
        rows: ResolvedRows,
        scores: FloatArray,
        known: ResolvedRows,
        fitted: FittedRecipe,
        *,
        horizon_bars: int,
    ) -> FoldResult:
        low, high = self._interval(scores, horizon_bars, fold.number)
        return FoldResult(
            number=fold.number,
            test_start=pd.Timestamp(fold.test_start),
            test_end=pd.Timestamp(fold.test_end),
            trained_through=pd.Timestamp(fold.train_end),
            n=len(rows.outcome),
            ic=known_mean(scores),
            ic_low=low,
            ic_high=high,
            fit_ic=known_mean(known.causal_ic_by_session({})),
            test_hits=hit_rate(rows.baseline + rows.signal, rows.outcome),
            test_base=share_up(rows.outcome),
            fit_hits=hit_rate(known.baseline + known.signal, known.outcome),
            fit_base=share_up(known.outcome),
            hit_minus_base=less(hit_rate(rows.forecast, rows.outcome), share_up(rows.outcome)),
            calibration_slope=calibration_slope(rows.forecast, rows.outcome),
            pred_std_over_target_std=ratio(_std(rows.forecast), _std(rows.outcome)),
            signal_std=_std(rows.signal),
            share_positive=known_mean(rows.signal > 0),
            selected_features=tuple(fitted.selected_features),
            notes=dict(fitted.notes),
        )

    def _interval(
        self, scores: FloatArray, horizon_bars: int, number: int
    ) -> tuple[float, float] | tuple[None, None]:
        if not len(scores):
            return None, None
        rng = np.random.default_rng([self.config.seed, number])
        block = block_length(len(scores), horizon_bars)
        means = resampled_block_sums(scores, block, self.config.n_resamples, rng).mean(axis=1) / block
        tail = (1 - self.config.interval_level) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        return float(low), float(high)


def fold_table(
    result: WalkForwardResult, record: pd.DataFrame, backtest: BacktestReport
) -> list[dict[str, Any]]:
    """Return `FoldResult.as_dict` of each fold, with what the symbol's own rows and positions did in it.

    ``record`` holds the symbol's rows, ``backtest`` the positions decided on them. Added are ``sharpe`` and
    ``sharpe_buy_hold`` after costs, annualised, and ``symbol_ic``, the symbol's own information coefficient,
    ranked as that of the fold is; None where undefined. The other measures of a panel are those of all
    symbols together.
    """
    per_year = backtest.costs.periods_per_year
    held, passive = (report.daily["net_return"] for report in (backtest, backtest.benchmarks["buy_hold"]))
    table: list[dict[str, Any]] = []
    past: Past = {}
    for fold in result.folds:
        own = ResolvedRows(record[record["fold"] == fold.number])
        ic = known_mean(own.causal_ic_by_session(past))
        sharpes = {
            name: sharpe(np.asarray(daily.loc[fold.test_start : fold.test_end]), per_year).value
            for name, daily in (("sharpe", held), ("sharpe_buy_hold", passive))
        }
        table.append({**fold.as_dict(), **sharpes, "symbol_ic": ic})
    return table


def _std(values: FloatArray) -> float | None:
    return float(values.std()) if len(values) else None


def _resolved(frames: list[pd.DataFrame], train_end: np.datetime64) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame()
    record = pd.concat(frames, ignore_index=True)
    return record[record["label_end"] <= pd.Timestamp(train_end)].reset_index(drop=True)


def _predict(fitted: FittedRecipe, rows: Dataset, fold: Fold) -> pd.DataFrame:
    """Forecast ``rows`` and lay forecast and outcome side by side."""
    prediction = fitted.predict(_without_outcome(rows))
    columns: dict[str, npt.ArrayLike] = {
        "date": rows.date.astype("datetime64[us]"),
        "symbol": np.asarray(rows.symbols)[rows.symbol_code],
        "predicted_log": prediction.mean_log,
        "baseline_log": prediction.baseline_log,
        "raw_scaled": prediction.raw_scaled,
        **{f"model_{name}": values for name, values in prediction.per_model.items()},
    }
    for name in list(columns)[2:]:
        values = np.asarray(columns[name], dtype=np.float64)
        if values.shape != (len(rows),) or not np.isfinite(values).all():
            raise ModelError(
                f"fold {fold.number}: {name} has shape {values.shape} and "
                f"{int((~np.isfinite(values)).sum())} values not finite, expected {len(rows)} finite ones"
            )
    frame = pd.DataFrame(columns)
    frame["realised_log"] = np.where(rows.labelled, rows.target_log, np.nan)
    frame["sigma_log"] = rows.sigma_log
    frame["label_end"] = rows.label_end.astype("datetime64[us]")
    frame["skill_lower"] = prediction.skill_lower
    frame["fold"] = fold.number
    frame["trained_through"] = pd.Timestamp(fold.train_end).as_unit("us")
    return frame


def _without_outcome(rows: Dataset) -> Dataset:
    """Return the rows with their targets blanked: a fitted recipe cannot see what it is asked for."""
    unknown = np.full(len(rows), np.nan)
    never = np.full(len(rows), np.datetime64("NaT", "D"))
    return replace(rows, label_end=never, target_scaled=unknown, target_log=unknown, dropped_rows=0)
