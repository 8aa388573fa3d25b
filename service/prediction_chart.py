"""What the page draws of decisions: the last of them, markers with their reasons, lines, and a forecast.

Nothing is decided here, and no position is changed: smoothing, floors and filters change what is drawn.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError

from data.feature_engineer import FEATURE_WORDS
from data.schema import Bars, calendar_for
from inference.intervals import ForecastPath
from inference.pipeline import Decisions, Explains
from service import schemas as wire
from service.schemas import BacktestMetrics, ModelMeta, PredictionRequest
from utils.base import InsufficientDataError, ModelCorruptError
from utils.model_paths import GBM, LSTM, PARTS, mode_of

if TYPE_CHECKING:
    from service.model_registry import ServedModel

AnyWire = TypeVar("AnyWire", bound=wire.Wire)
FloatArray = npt.NDArray[np.float64]

SMOOTHING_BARS, MOVING_AVERAGE_BARS = 5, 50
BOLLINGER_BARS, BOLLINGER_STDS = 20, 2.0
# Smaller changes of the target weight are drift of the forecast, not something to act on.
MIN_WEIGHT_CHANGE = 0.01
# Capital behind a marker's number of shares: the backtest form's default.
MARKER_CAPITAL = 10_000.0
# A market is a bull at t where the close of t lies on or above the mean of so many closes up to t.
REGIME_BARS = 200
# How many trades are explained, and by how many features; the boosters take a while to take apart.
EXPLAINED_TRADES, STRONGEST = 4, 3
# The mode in which each kind of model serves: it is named after its last part.
MODE_OF = {parts[-1].name: mode for mode, parts in PARTS.items()}
MEMBERS = {GBM.name: "boosters", LSTM.name: "LSTM"}
# Where the walk-forward tells no length of its blocks, a year.
USUAL_BLOCK_BARS = 252
# What stands for a forecast of no change where there is none.
NEUTRAL = dict.fromkeys(("asset_return", "expected_log", "lower", "upper"), 0.0) | {"prob_up": 0.5}
NEUTRAL |= {"prob_gain": 1.0 / 3.0, "prob_loss": 1.0 / 3.0}
MARKED = ("close", "weight_before", "target_weight", "change", "expected_log", "lower", "upper", "prob_up")
REQUIRED_METRICS = {n: str(f.alias) for n, f in BacktestMetrics.model_fields.items() if f.is_required()}
# Named alike in a request and in the answer; and in the metadata of a training and in those of a model.
LIMITS = ("max_long", "max_short")
ECHOED = ("horizon", "trade_share_floor", "data_period", "smoothing", "confidence_floors", *LIMITS)
TOLD = ("symbol", "created_at", "model_version", "trained_through", "out_of_sample_from")
LEAK = "leak alarm: the model did too well to be true, so do not believe it until a person has looked"
UNSURE = {
    "no-edge": "this model has shown no edge out of sample",
    "insufficient": "there are too few forecasts out of sample to tell an edge from luck",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The tail of the decisions, as it is drawn: n sessions, ``dates`` as ``YYYY-MM-DD``.

    ``columns`` are those of `Decisions.frame`, (n,) each, with ``weight_before`` (target of the session
    before) and the ``change`` from it, ``shown_log`` (smoothed median h-day log forecast) and ``is_wanted``
    (by the filters of its regime, see `REGIME_BARS`); finite wherever they are drawn. ``horizon_bars`` is how
    far a forecast looks ahead, ``neutral_rows`` how many sessions without one are shown as one of no change.
    """

    sessions: pd.DatetimeIndex
    dates: list[str]
    columns: Mapping[str, FloatArray]
    horizon_bars: int
    neutral_rows: int


def chart_of(decisions: Decisions, request: PredictionRequest) -> Chart:
    """Return the last decisions from the first forecast on: the model has seen the sessions before it.

    Raises `InsufficientDataError` if the last session has no forecast.
    """
    frame = decisions.frame
    known = np.isfinite(np.asarray(frame["expected_log"], dtype=np.float64))
    if not known[-1]:
        raise InsufficientDataError(
            f"{decisions.symbol} has {len(frame)} bars and no forecast for the last one: its features need a "
            "longer or more complete history"
        )
    first = max(int(np.argmax(known)), len(frame) - request.days_on_chart)
    tail, before = frame.iloc[first:], max(first - REGIME_BARS, 0)
    columns = dict(zip(map(str, frame.columns), tail.to_numpy(dtype=np.float64).T, strict=True))
    columns |= {name: np.where(np.isnan(columns[name]), at, columns[name]) for name, at in NEUTRAL.items()}
    columns["weight_before"] = frame["target_weight"].shift(fill_value=0.0).to_numpy()[first:]
    columns["change"] = columns["target_weight"] - columns["weight_before"]
    columns["shown_log"] = smooth(frame["expected_log"], request.smoothing).fillna(0.0).to_numpy()[first:]
    mean = frame["close"].iloc[before:].rolling(REGIME_BARS, min_periods=1).mean().to_numpy()
    filters, is_bull = request.fusion.regime_filters, columns["close"] >= mean[first - before :]
    columns["is_wanted"] = np.where(is_bull, filters.bull, filters.bear)
    return Chart(
        sessions=pd.DatetimeIndex(tail.index),
        dates=days_of(tail.index),
        columns=columns,
        horizon_bars=decisions.horizon_bars,
        neutral_rows=int(np.count_nonzero(~known[first:])),
    )


def smooth(values: pd.Series, how: wire.Smoothing) -> pd.Series:
    """Smooth a series over `SMOOTHING_BARS`; the value of t uses values up to t only."""
    if how == "ema":
        return values.ewm(span=SMOOTHING_BARS, adjust=False).mean()
    if how == "moving-average":
        return values.rolling(SMOOTHING_BARS, min_periods=1).mean()
    return values


def classes_of(chart: Chart) -> list[wire.ClassProbabilities]:
    """Return the chances that the h-day return pays for a round trip upwards, downwards, or not at all."""
    gain, loss = chart.columns["prob_gain"], chart.columns["prob_loss"]
    chances = pd.DataFrame({"buy": gain, "sell": loss, "hold": np.maximum(1.0 - gain - loss, 0.0)})
    return records(wire.ClassProbabilities, chances)


def forecast_of(chart: Chart, path: ForecastPath) -> wire.Forecast:
    """Return the sessions to come: the target decided at the last close is reached at the first of them."""
    before, target = (float(chart.columns[name][-1]) for name in ("weight_before", "target_weight"))
    actions = pd.DataFrame({"price": path.prices, "action": "HOLD", "target_position": target}, path.dates)
    if chart.columns["is_wanted"][-1]:
        actions.iloc[0, 1] = action_of(before, target)
    return wire.Forecast(
        dates=days_of(path.dates),
        prices=path.prices.tolist(),
        returns=path.returns.tolist(),
        positions=actions["target_position"].to_list(),
        lower_band=path.lower.tolist(),
        upper_band=path.upper.tolist(),
        actions=records(wire.ForecastAction, actions),
    )


def action_of(before: float, target: float) -> wire.ForecastActionName:
    """Name the trade from one weight to another."""
    if abs(target - before) < MIN_WEIGHT_CHANGE:
        return "HOLD"
    if target > before:
        return "COVER" if target <= 0.0 else "BUY"
    return "SHORT" if target < 0.0 else "SELL"


def markers_of(
    chart: Chart, forecast: wire.Forecast, request: PredictionRequest, reasons: Mapping[int, str]
) -> list[wire.TradeMarker]:
    """Mark each confident and large enough change of the target weight, and the first session to come.

    The confidence is the chance that the price moves in the direction of the change within the horizon. A
    marker of the history lies on the session at whose close the change was decided.
    """
    floors, fusion, wanted = request.confidence_floors, request.fusion, chart.columns["is_wanted"] > 0.0
    least = {"buy": max(floors.buy, fusion.buy_threshold), "sell": max(floors.sell, fusion.sell_threshold)}
    least["hold"], smallest = 0.0, request.trade_share_floor or 0.0
    acted = np.flatnonzero((np.abs(chart.columns["change"]) >= MIN_WEIGHT_CHANGE) & wanted).tolist()
    markers = [marker_of(chart, row, chart.dates[row], "history", reasons) for row in acted]
    if wanted[-1]:
        markers.append(marker_of(chart, len(wanted) - 1, forecast.dates[0], "forecast", reasons))
    shown = (marker for marker in markers if marker.confidence >= least[marker.type])
    return [marker for marker in shown if marker.type == "hold" or abs(marker.shares) >= smallest]


def marker_of(
    chart: Chart, row: int, date: str, segment: wire.MarkerSegment, reasons: Mapping[int, str]
) -> wire.TradeMarker:
    """Return the marker of what was decided at the close of ``row``, and why."""
    marked = (float(chart.columns[name][row]) for name in MARKED)
    close, before, target, change, median_log, lower, upper, up = marked
    acts, rises = abs(change) >= MIN_WEIGHT_CHANGE, change > 0.0
    return wire.TradeMarker(
        date=date,
        price=close,
        type="hold" if not acts else "buy" if rises else "sell",
        shares=round(change * MARKER_CAPITAL / close, 4) if acts else 0.0,
        confidence=max(up, 1.0 - up) if not acts else up if rises else 1.0 - up,
        segment=segment,
        scope="prediction",
        explanation=(
            f"Median forecast {math.expm1(median_log):+.2%} over {chart.horizon_bars} sessions, 80 % band "
            f"{lower:+.1%} to {upper:+.1%}, chance of a rise {up:.0%}; "
            f"target weight {before:.2f} -> {target:.2f}{reasons.get(row, '')}"
        ),
    )


def reasons_of(model: "ServedModel", bars: pd.DataFrame, chart: Chart) -> dict[int, str]:
    """Say what the forecasts behind the latest trades are made from, by row of the chart.

    Only of the model that forecasts now: of those that made the walk-forward record nothing is kept.
    """
    if not isinstance(model.forecaster, Explains):
        return {}
    sessions, end = chart.sessions, model.bundle.record["date"].max()
    acted = np.flatnonzero((np.abs(chart.columns["change"]) >= MIN_WEIGHT_CHANGE) & (sessions > end))
    rows = sorted({*acted[-EXPLAINED_TRADES:].tolist(), len(sessions) - 1} if sessions[-1] >= end else ())
    shares = model.forecaster.contributions(bars, sessions[rows]) if rows else pd.DataFrame()
    used = "" if model.meta.verdict == "edge" else "; without a proven edge no position rests on it"
    return {} if shares.empty else {row: f". {in_words(shares.iloc[k])}{used}" for k, row in enumerate(rows)}


def in_words(shares: pd.Series) -> str:
    """Name the features with the largest shares in a forecast, and the side that each speaks for."""
    largest = sorted(shares.items(), key=lambda share: -abs(share[1]))[:STRONGEST]
    sides = {
        side: [FEATURE_WORDS.get(str(name), str(name)) for name, share in largest if share * sign > 0.0]
        for side, sign in (("for a rise: ", 1.0), ("for a fall: ", -1.0))
    }
    said = "; ".join(side + ", ".join(names) for side, names in sides.items() if names)
    return f"The model sees {said or 'nothing for either side'}"


def overlays_of(bars: pd.DataFrame, chart: Chart, path: ForecastPath) -> list[wire.OverlaySeries]:
    """Return the lines over the chart; averages reach back before its first date."""

    def windows(of: int) -> FloatArray:
        close = bars["Close"].to_numpy()[-len(chart.dates) - of + 1 :]
        return np.lib.stride_tricks.sliding_window_view(close, of)

    near, slow = windows(BOLLINGER_BARS), windows(MOVING_AVERAGE_BARS).mean(axis=1)
    middle, spread = near.mean(axis=1), BOLLINGER_STDS * near.std(axis=1)
    band, last = {"upper": middle + spread, "lower": middle - spread}, chart.columns["close"][-1:]
    ahead = {"value": path.prices, "upper": path.upper, "lower": path.lower}
    coming = {name: np.concatenate([last, values]) for name, values in ahead.items()}
    lines: dict[Literal["bollinger", "moving-average", "predicted-path"], pd.DataFrame] = {
        "bollinger": pd.DataFrame({"value": middle, **band}, chart.sessions[-len(middle) :]),
        "moving-average": pd.DataFrame({"value": slow}, chart.sessions[-len(slow) :]),
        "predicted-path": pd.DataFrame(coming, chart.sessions[-1:].append(path.dates)),
    }
    return [
        wire.OverlaySeries(
            type=kind,
            points=records(wire.OverlayPoint, line),
            **{side: line[side].to_list() for side in band if side in line},
        )
        for kind, line in lines.items()
    ]


def metadata_of(
    request: PredictionRequest, model: "ServedModel", bars: Bars, decisions: Decisions, chart: Chart
) -> wire.PredictionMetadata:
    """Echo what was asked, and say what answered and how far it may be believed."""
    meta, trained, fusion = model.meta, model.bundle.metadata, request.fusion
    out_of_sample_from, (age, judged) = decisions.out_of_sample_from, age_of(model, bars)
    evidence = trained["verdict"].get("evidence") or {}
    alike: dict[str, Any] = {name: getattr(meta, name) for name in wire.Described.model_fields}
    alike |= {name: getattr(request, name) for name in ECHOED} | {
        "target_horizon_days": decisions.horizon_bars,
        "out_of_sample_from": f"{out_of_sample_from:%Y-%m-%d}" if out_of_sample_from is not None else None,
        "data_source": bars.provenance.source,
        "model_version": model.bundle.model_version,
    }
    return wire.PredictionMetadata(
        **alike,
        model_id=meta.id,
        fusion_mode=fusion.mode,
        buy_threshold=fusion.buy_threshold,
        sell_threshold=fusion.sell_threshold,
        model_quality_gate_passed=meta.quality_gate_passed,
        model_quality_score=meta.quality_score,
        model_quality_reasons=meta.quality_reasons,
        holdout_metric_source="walk_forward",
        holdout_pred_target_std_ratio=std_ratio(model.bundle.record),
        feature_profile=trained.get("feature_set_hash"),
        feature_selection_mode="shap_in_fold" if meta.model_variant == GBM.name else None,
        execution_mode="decided_at_close_held_from_next_session",
        is_intraday=False,
        annualization_factor=float(calendar_for(bars.symbol).sessions_per_year),
        data_as_of=chart.dates[-1],
        data_stale=bars.provenance.stale,
        evidence={name: value for name, value in evidence.items() if is_finite_number(value)},
        model_age_sessions=age,
        model_is_old=age > judged,
        notes=notes_of(request, model, bars, decisions, chart),
    )


def age_of(model: "ServedModel", bars: Bars) -> tuple[int, int]:
    """Return how many sessions ago the model was trained, and the oldest age that the walk-forward judged."""
    metadata = model.bundle.metadata
    through, last = pd.Timestamp(metadata["trained_through"]), bars.provenance.last_session
    age = calendar_for(bars.symbol).sessions_between(through, last)
    return max(age, 0), max((fold["n"] for fold in metadata.get("folds", ())), default=USUAL_BLOCK_BARS)


def notes_of(
    request: PredictionRequest, model: "ServedModel", bars: Bars, decisions: Decisions, chart: Chart
) -> list[str]:
    """Say in words how far the model may be believed, why it serves, what is amiss, what changes nothing."""
    meta, fusion, where, (age, judged) = model.meta, request.fusion, bars.provenance, age_of(model, bars)
    last = {name: float(column[-1]) for name, column in chart.columns.items()}
    told = [
        f"{words} {last[f'model_{name}']:+.3f} (weight {last[f'weight_{name}']:.2f})"
        for name, words in MEMBERS.items()
        if f"weight_{name}" in last and np.isfinite(last[f"model_{name}"])
    ]
    reason, usual = UNSURE.get(meta.verdict or "insufficient"), wire.FusionSettings()
    passive = "the forecast is the drift and the position the passive one"
    trained, shown, neutral, horizon = meta.data_source, chart.dates, chart.neutral_rows, chart.horizon_bars
    aged, is_short = age > judged, len(shown) < request.days_on_chart
    is_scaled = fusion.regressor_scale != usual.regressor_scale
    # The id decided what serves, and not the mode.
    by_id = request.model_id == meta.id and mode_of(fusion.mode) not in {usual.mode, meta.fusion_mode_default}
    left_out = " or ".join(name for name, kept in fusion.regime_filters if not kept)
    notes = {
        LEAK: meta.verdict == "edge" and not meta.quality_gate_passed,
        f"not sure: {reason}, so {passive}": reason,
        f"the model was trained {age} sessions ago; none older than {judged} was judged: train again": aged,
        f"signals at the last close, in volatilities: {', '.join(told)}": told,
        f"modelId {meta.id} was asked for and serves, not fusion mode {fusion.mode}": by_id,
        **dict.fromkeys(bars.report.problems(), True),
        f"prices end {shown[-1]}; the exchange has closed later sessions": where.stale,
        f"trained on prices of {trained}, serving prices of {where.source}": trained != where.source,
        f"the chart begins {shown[0]}: no out-of-sample forecast lies before it": is_short,
        f"{neutral} sessions without a forecast are drawn as a forecast of no change": neutral,
        f"past {horizon} sessions the forecast is the drift of the training rows": request.horizon > horizon,
        "regressorScale changes nothing: positions are sized by Kelly's rule": is_scaled,
        f"regimeFilters: trades decided in a {left_out} market (the close against its {REGIME_BARS}-"
        "session mean) are neither marked nor named; positions stay those that were decided": left_out,
        "dataPeriod changes nothing: the whole history is read": request.data_period is not None,
    }
    return [*model.warnings, *decisions.findings, *(note for note, applies in notes.items() if applies)]


def std_ratio(record: pd.DataFrame) -> float | None:
    """Return the spread of out-of-sample forecasts over that of outcomes; None before any outcome."""
    predicted, realised = (np.asarray(record[name]) for name in ("predicted_log", "realised_log"))
    known = np.isfinite(predicted) & np.isfinite(realised)
    spread = float(np.std(realised[known])) if known.any() else 0.0
    return float(np.std(predicted[known])) / spread if spread > 0.0 else None


def model_meta(metadata: Mapping[str, Any], *, ensemble_size: int, warnings: Sequence[str] = ()) -> ModelMeta:
    """Translate ``training_metadata.json``; `ModelCorruptError` if a field is missing or of another type."""
    try:
        metrics, undefined = wire_metrics(metadata.get("metrics") or {})
        notes = [f"undefined, sent as 0: {', '.join(undefined)}"] if undefined else []
        notes += warnings
        verdict, variant = metadata["verdict"], metadata["model_id"].rpartition("-")[2]
        label, alarm = verdict["label"], verdict.get("evidence", {}).get("leak_alarm") is True
        notes += [LEAK] * alarm
        recipe = metadata.get("recipe", {}).get("recipe", {})
        return ModelMeta(
            **{name: metadata[name] for name in TOLD},
            id=metadata["model_id"],
            fusion_mode_default=MODE_OF[variant],
            metrics=metrics,
            sequence_length=recipe.get("sequence_length", 1),
            ensemble_size=ensemble_size,
            notes="; ".join(notes) or None,
            model_variant=variant,
            data_interval="1d",
            # As `--strict` has it. Nothing between an edge and none is known.
            quality_gate_passed=label == "edge" and not alarm,
            quality_score=float(label == "edge" and not alarm),
            quality_reasons=list(verdict["reasons"]),
            target_horizon_days=metadata["horizon_bars"],
            data_source=metadata["source"],
            verdict=label,
        )
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        name = metadata.get("symbol", "a symbol")
        raise ModelCorruptError(f"the metadata of {name} are not as trained: train again") from error


def wire_metrics(stored: Mapping[str, Any]) -> tuple[BacktestMetrics, tuple[str, ...]]:
    """Return metrics that the page can draw, and which of the required ones are undefined, and 0.0 there."""
    known = {name: value for name, value in stored.items() if is_finite_number(value)}
    undefined = tuple(
        alias for name, alias in REQUIRED_METRICS.items() if name not in known and alias not in known
    )
    metrics = BacktestMetrics.model_validate(known | dict.fromkeys(undefined, 0.0))
    # The page cannot tell a fraction above 1 from a percentage, so the percentage goes along.
    also = {"cumulative_return_pct": metrics.cumulative_return * 100}
    return metrics.model_copy(update=also), undefined


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a number that may go on the wire."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def days_of(index: pd.Index) -> list[str]:
    """Return sessions as ``YYYY-MM-DD``."""
    days: list[str] = np.datetime_as_string(np.asarray(index, dtype="datetime64[D]")).tolist()
    return days


def records(kind: type[AnyWire], frame: pd.DataFrame) -> list[AnyWire]:
    """Return one ``kind`` a row, dated by the index; columns (in any case) that it lacks are left out."""
    frame = frame.rename(columns=str.lower)
    columns = {name: frame[name].to_list() for name in kind.model_fields if name in frame.columns}
    if "date" in kind.model_fields:
        columns["date"] = days_of(frame.index)
    return [kind(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
