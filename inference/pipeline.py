"""The one path from bars to positions.

Backtests, charts and the service all call `decide`. It has no memory: deciding on ``bars[:t + 1]`` gives at t
what deciding on all bars gives at t.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from data.feature_engineer import MAX_WARMUP_BARS, SENTIMENT_COLUMNS, engineer_features, usable_rows
from data.target_engineering import make_target, rescale_sigma
from evaluation.accounting import DEFAULT_CAPITAL, CostModel
from evaluation.advanced_backtester import AdvancedBacktester, BacktestReport
from inference import artifact, intervals
from inference.artifact import GOLDEN_TOLERANCE, RECORD, Saved, Version, corrupt, unusable
from inference.intervals import Calibration, FloatArray, FloatMatrix, ForecastPath, IntArray
from inference.position_sizing import RuleSizer, SizingInputs
from utils.base import DataError, ModelIncompatibleError

FORECAST_COLUMNS = (
    *("expected_return", "baseline_return", "sigma", "lower", "upper", "prob_up", "prob_gain", "prob_loss"),
    *("p_win", "payoff_ratio", "skill_lower", "is_out_of_sample", "is_of_other_prices"),
    *("expected_log", "baseline_log", "sigma_log", "lower_z", "upper_z"),
)
# Before a number of bars, the name of the column with the forecast log return over so many.
FURTHER = "expected_log_h"
# An outcome that lies further from the recorded one, in volatilities, was made by other prices; two series
# agree by chance in one row of some twenty, so a disagreement is remembered for a while.
OTHER_PRICES_SIGMA, OTHER_PRICES_MEMORY_BARS = 0.05, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Saved, ABC):
    """A trained model with the out-of-sample record that vouches for it.

    The record has `inference.artifact.RECORD_COLUMNS`, and a ``model_<name>`` column for each of `models`.
    ``importance`` is what each feature contributes to the final fit, normalised, empty where nobody measured
    it; ``hyperparameters`` tell how that came about, as plain data.
    """

    importance: Mapping[str, float]
    hyperparameters: Mapping[str, object]

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]:
        """Names of the models whose signals make up the bundle's."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the features that `signal` takes, in its order."""

    @property
    @abstractmethod
    def calibration(self) -> Calibration:
        """How far the final fit's signal may be believed."""

    @abstractmethod
    def signal(self, features: FloatMatrix, rows: IntArray) -> tuple[dict[str, FloatArray], FloatArray]:
        """Return the raw signal of the final fit, before calibration, in units of the h-day volatility.

        ``features`` are the unscaled `columns` of every bar, (n, p), NaN in the warm-up; ``rows`` are bars
        whose features are finite, (k,). What is said of a bar depends on rows up to it only. Returned are
        each model's signal by name, and the one that they make together, (k,) each.
        """

    @property
    def path_horizons(self) -> tuple[int, ...]:
        """Further horizons that the forecast path passes through."""
        return ()

    def further(
        self, _features: FloatMatrix, _rows: IntArray
    ) -> Mapping[int, tuple[Calibration, FloatArray]]:
        """Return the calibration and the raw signal of each of `path_horizons`, as `signal` does."""
        return {}

    def contributions(self, features: FloatMatrix) -> pd.DataFrame:
        """Return SHAP values of the final fit, a column for each feature; none where they cannot be had."""
        return pd.DataFrame(index=range(len(features)))


def read_record(version: Version[Any], *columns: str) -> pd.DataFrame:
    """Return the out-of-sample record: one row per session, ascending, with ``columns``, one the ``date``."""
    with unusable(version.folder, RECORD):
        record = pd.read_parquet(io.BytesIO(version.contents[RECORD]))
        if absent := sorted(set(columns) - set(record.columns)):
            raise corrupt(version.folder, f"{RECORD} lacks {', '.join(absent)}")
        dates = record["date"]
        if dates.dtype.kind != "M" or not dates.is_unique or not dates.is_monotonic_increasing or dates.empty:
            raise corrupt(version.folder, f"{RECORD} does not hold one row per session")
    return record


def check_golden(
    version: Version[Any],
    say: Callable[[FloatArray], FloatArray],
    expected: list[float],
    *damage: type[Exception],
) -> None:
    """Refuse a model that does not say to the golden inputs what it said before; name what changed since.

    ``damage`` are errors of libraries that also mean a damaged file.
    """
    manifest = version.manifest
    with unusable(version.folder, "what it forecasts", *damage):
        said = say(np.asarray(manifest.golden_inputs, dtype=np.float64))
        if len(said) != len(expected):
            raise corrupt(version.folder, "there is not one golden output for each golden forecast")
        error = float(np.abs(said - np.asarray(expected)).max())
    if error <= GOLDEN_TOLERANCE:
        return
    then, here = manifest.libraries, artifact.library_versions(manifest.libraries)
    changed = [f"{name} {then[name]} -> {here[name]}" for name in here if here[name] != then[name]]
    raise ModelIncompatibleError(
        f"bundle {manifest.model_version} forecasts differently here (by {error:.2g}; changed: "
        f"{', '.join(changed) or 'no library'}): train again with --overwrite"
    )


class Forecaster(Protocol):
    """Turns bars into one forecast per bar; the forecast of bar t uses bars up to t only."""

    @property
    def horizon_bars(self) -> int:
        """Number of bars that a forecast looks ahead."""

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Return a frame indexed like ``bars`` with `FORECAST_COLUMNS`; NaN where there is no forecast.

        ``prob_gain`` and ``prob_loss`` are the chances that the h-day return pays for a round trip, upwards
        and downwards. ``lower_z`` and ``upper_z`` are the distances of the band's edges from
        ``expected_log``, in ``sigma_log``. A forecaster that knows the edges over other numbers of bars adds
        them, in log returns from the centre, as columns ``lower_log_<bars>`` and ``upper_log_<bars>``, see
        `path_ahead`. One that forecasts further numbers of bars adds these log returns, see `FURTHER`, NaN
        where there is none.
        """


class Member(Forecaster, Protocol):
    """A forecaster that can be joined with others: it also shows what its forecast is made from."""

    def centre(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Return a frame indexed like ``bars``; row t is known at the close of t, NaN without a forecast.

        Columns: ``raw_scaled`` (the uncalibrated signal, in units of the h-day volatility), and those of
        `FORECAST_COLUMNS` that `with_bands` does not add.
        """


@runtime_checkable
class Explains(Protocol):
    """A forecaster that can say what its forecast is made from."""

    def contributions(self, bars: pd.DataFrame, sessions: pd.DatetimeIndex) -> pd.DataFrame:
        """Return SHAP values, one row a session, one column a feature, in units of the h-day volatility.

        They are those of the model that forecasts now: it saw sessions up to its last one trained on.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Forecasts and target weights of one symbol, bar by bar.

    The frame is indexed by session; columns ``close``, ``asset_return`` (simple, of the bar itself; NaN on
    the first), all forecast columns (h-day simple returns), and ``target_weight``: decided at the close of
    the session, as a fraction of equity, earning from the next bar on. ``sizing_id`` is name and content hash
    of the sizing configuration.
    """

    symbol: str
    frame: pd.DataFrame
    horizon_bars: int
    sizing_id: str

    @property
    def findings(self) -> tuple[str, ...]:
        """What is amiss between the model's record and the bars, in words."""
        found, n_rows = [], int(self.frame["is_of_other_prices"].sum())
        if n_rows:
            found.append(
                f"{n_rows} forecasts of the model's record were made from other prices than these (another "
                "source, or restated): they do not count as out of sample; train again with --overwrite"
            )
        if "knows_news" in self.frame and not self.frame["knows_news"].iloc[-1]:
            found.append(
                "the model learned from headlines and knows none of the last sessions: its forecast does "
                "without them; set AI_STOCKS_NEWS to where it can read them"
            )
        return tuple(found)

    @property
    def out_of_sample_from(self) -> pd.Timestamp | None:
        """First session whose forecast is out of sample; None when there is none."""
        flags = self.frame["is_out_of_sample"]
        return pd.Timestamp(flags.index[int(np.argmax(flags.to_numpy()))]) if bool(flags.any()) else None


def decide(
    symbol: str, bars: pd.DataFrame, forecaster: Forecaster, sizer: RuleSizer, costs: CostModel | None = None
) -> Decisions:
    """Forecast every bar and fold the sizer over the forecasts; row t is known at the close of t.

    The sizer's own equity pays ``costs``, so that its drawdown breaker follows the equity that is booked.
    """
    close, h = bars["Close"].rename("close"), forecaster.horizon_bars
    moves = close.pct_change().rename("asset_return")
    frame = pd.concat([close, moves, forecaster.forecast(bars)], axis=1)
    weights = sizer.fold(SizingInputs.of(frame, h), costs or CostModel())
    return Decisions(
        symbol=symbol,
        frame=frame.assign(target_weight=weights),
        horizon_bars=h,
        sizing_id=f"{sizer.name}:{sizer.config_id}",
    )


def path_ahead(decisions: Decisions, dates: pd.DatetimeIndex) -> ForecastPath:
    """Return the forecast path from the last bar over the coming sessions ``dates``.

    It passes through the forecasts of every horizon that the last bar has one for.
    """
    last = decisions.frame.iloc[-1]
    edges = {
        bars: (last[f"lower_log_{bars}"], last[f"upper_log_{bars}"])
        for bars in intervals.ANCHORS_BARS
        if f"lower_log_{bars}" in last
    }
    edges[decisions.horizon_bars] = (last["lower_z"] * last["sigma_log"], last["upper_z"] * last["sigma_log"])
    further = last.filter(like=FURTHER).dropna()
    return intervals.forecast_path(
        dates=dates,
        last_close=float(last["close"]),
        expected_log=float(last["expected_log"]),
        baseline_log=float(last["baseline_log"]),
        edges_log=edges,
        horizon_bars=decisions.horizon_bars,
        further_log={int(str(name).removeprefix(FURTHER)): value for name, value in further.items()},
    )


def backtest_decisions(
    decisions: Decisions,
    costs: CostModel,
    *,
    initial_capital: float = DEFAULT_CAPITAL,
    include_in_sample: bool = False,
) -> BacktestReport:
    """Book decisions and set them beside their benchmarks; see `AdvancedBacktester`.

    Forecasts made from other prices end what came before them: the record begins anew behind the last one.
    `DataError` when no out-of-sample row is left.
    """
    frame = decisions.frame
    if not include_in_sample and bool(frame["is_of_other_prices"].any()):
        frame = frame.iloc[np.flatnonzero(frame["is_of_other_prices"])[-1] + 1 :]
        if not bool(frame["is_out_of_sample"].any()):
            raise DataError(f"no out-of-sample forecast fits these prices: {decisions.findings[0]}")
    return AdvancedBacktester(costs=costs, initial_capital=initial_capital).backtest_with_positions(
        pd.DatetimeIndex(frame.index),
        frame["close"].to_numpy(),
        frame["target_weight"].to_numpy(),
        is_out_of_sample=frame["is_out_of_sample"].to_numpy(),
        include_in_sample=include_in_sample,
        # The forecast that is drawn, not its mean: half a variance above it, that is up nearly always.
        expected_return=np.expm1(frame["expected_log"].to_numpy()),
        horizon_bars=decisions.horizon_bars,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleForecaster:
    """Forecasts of a bundle: its out-of-sample record where that reaches, the final model after it.

    With ``include_in_sample`` it also forecasts bars that the final model was trained on and the record does
    not cover; such rows carry ``is_out_of_sample`` False. With ``as_lived`` every row uses the skill that its
    fold knew of, whatever the verdict: what a verdict is made from. Otherwise a model whose verdict is not
    ``edge`` has no skill on any row, and its forecasts of what had not come when the verdict was reached are
    the drift.
    """

    bundle: Bundle
    include_in_sample: bool = False
    as_lived: bool = False

    @property
    def horizon_bars(self) -> int:
        """Number of bars that a forecast looks ahead."""
        return self.bundle.horizon_bars

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Forecast every bar; beside `FORECAST_COLUMNS` a signal ``raw_scaled`` and a ``model_<name>`` each.

        Signals are uncalibrated, in units of the h-day volatility; returns are simple h-day returns, columns
        ``*_log`` log returns over h bars. What is said at t comes from forecasts that were resolved by t.
        """
        return intervals.with_bands(self.centre(bars), bars, self.horizon_bars)

    def centre(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Return centre, scale, skill and raw signal per bar: the record's rows, then the final model's."""
        bundle, index = self.bundle, pd.DatetimeIndex(bars.index)
        target = make_target(bars, self.horizon_bars)
        record, newest = bundle.record.set_index("date").reindex(index), bundle.record["date"].max()
        replayed, after = record["predicted_log"].notna().to_numpy(), np.asarray(index > newest)
        other_prices = replayed & self._restated(record, target["target_log"]).to_numpy()
        skill, expected = record["skill_lower"].fillna(0.0), record["predicted_log"]
        if not self._is_trusted:
            # What had not come when the verdict was reached is forecast by it, as all that follows is.
            had_come = record["realised_log"].notna()
            skill, expected = 0.0 * skill, expected.where(had_come, record["baseline_log"])
        columns = {
            "expected_log": expected,
            "baseline_log": record["baseline_log"],
            "sigma_log": record["sigma_log"].fillna(target["sigma_log"]),
            "skill_lower": skill,
            **{name: record[name] for name in ("raw_scaled", *(f"model_{name}" for name in bundle.models))},
            "is_out_of_sample": (replayed | after) & ~other_prices,
            **{f"{FURTHER}{further}": np.nan for further in bundle.path_horizons},
            "is_of_other_prices": other_prices,
        }
        frame = pd.DataFrame(columns, index=index)
        wanted = after | (~replayed & self.include_in_sample)
        # The record's last bar has no outcome over any horizon: no path model was trained on it.
        ahead = np.asarray(index >= newest) & bool(bundle.path_horizons)
        if (wanted | ahead).any():
            features = self._features(bars)
            usable = usable_rows(features, bundle.columns) & np.isfinite(frame["sigma_log"].to_numpy())
            if reads := [i for i, name in enumerate(bundle.columns) if name in SENTIMENT_COLUMNS]:
                frame["knows_news"] = np.asarray(np.isfinite(features[:, reads]).any(axis=1), dtype=np.bool_)
            for fill, where in ((self._fill_from_model, wanted), (self._fill_further, ahead)):
                if (where & usable).any():
                    fill(frame, features, np.flatnonzero(where & usable))
        return frame

    def contributions(self, bars: pd.DataFrame, sessions: pd.DatetimeIndex) -> pd.DataFrame:
        """Return what each feature adds to the final model's raw forecasts, see `Explains`."""
        rows = bars.index.get_indexer(sessions)
        # No feature remembers more than its warm-up, within 1e-6.
        first = max(int(rows.min()) - MAX_WARMUP_BARS, 0)
        features = self._features(bars.iloc[first : int(rows.max()) + 1])[rows - first]
        return self.bundle.contributions(features).set_axis(sessions)

    def _restated(self, record: pd.DataFrame, realised_log: "pd.Series[float]") -> "pd.Series[bool]":
        """Tell where the record was lately made from other prices, as far as each bar can know.

        A forecast of the record is one of these bars only where the outcomes that the record holds are those
        of these bars. The outcome of bar t - h is known at t, so the mask at t depends on nothing later.
        """
        differs = (record["realised_log"] - realised_log).abs() > OTHER_PRICES_SIGMA * record["sigma_log"]
        known = differs.shift(self.horizon_bars, fill_value=False).astype(float)
        return known.rolling(OTHER_PRICES_MEMORY_BARS, min_periods=1).max() > 0

    def _features(self, bars: pd.DataFrame) -> FloatMatrix:
        """Return the columns that the model knows, by name, (n, p); NaN in the warm-up."""
        columns, known = self.bundle.columns, engineer_features(bars)
        # Without headlines there are no columns of sentiment: the model does without.
        artifact.refuse_missing(self.bundle.symbol, columns, {*known.columns, *SENTIMENT_COLUMNS})
        # By name: a booster takes columns in another order without a word, and forecasts wrong.
        return known.reindex(columns=list(columns)).to_numpy(dtype=np.float32)

    def _fill_from_model(self, frame: pd.DataFrame, features: FloatMatrix, rows: IntArray) -> None:
        """Forecast the given rows with the final model."""
        per_model, raw_scaled = self.bundle.signal(features, rows)
        sigma = frame["sigma_log"].to_numpy()[rows]
        calibration, where = self._trusted(self.bundle.calibration), frame.index[rows]
        frame.loc[where, "expected_log"] = calibration.apply(raw_scaled) * sigma
        frame.loc[where, "baseline_log"] = calibration.drift * sigma
        frame.loc[where, "skill_lower"] = calibration.skill_lower
        frame.loc[where, "raw_scaled"] = raw_scaled
        for name, values in per_model.items():
            frame.loc[where, f"model_{name}"] = values

    def _fill_further(self, frame: pd.DataFrame, features: FloatMatrix, rows: IntArray) -> None:
        """Forecast the given rows over the further horizons."""
        sigma = frame["sigma_log"].to_numpy()[rows]
        for bars, (calibration, raw_scaled) in self.bundle.further(features, rows).items():
            sigma_log = rescale_sigma(sigma, from_bars=self.horizon_bars, to_bars=bars)
            scaled = self._trusted(calibration).apply(raw_scaled)
            frame.loc[frame.index[rows], f"{FURTHER}{bars}"] = scaled * sigma_log

    @property
    def _is_trusted(self) -> bool:
        return self.as_lived or self.bundle.metadata["verdict"]["label"] == "edge"

    def _trusted(self, calibration: Calibration) -> Calibration:
        """Return a calibration that may be used: the drift alone unless the verdict is an edge."""
        return calibration if self._is_trusted else replace(calibration, slope=0.0, skill_lower=0.0)
