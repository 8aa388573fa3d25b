"""From a request to the answer that the page draws: model, bars, `decide`, and the tail of its decisions.

Nothing is decided here. Positions, forecasts and bands are those of `inference.pipeline.decide`, so a chart
shows what a backtest books. Smoothing, floors and thresholds change what is drawn, never a position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from data.data_fetcher import BarSource, ReadsThrough, fetch_stock_data
from data.markets import calendar_for
from data.schema import BAR_COLUMNS, Bars, normalise_symbol
from inference.intervals import ForecastPath
from inference.pipeline import Decisions, decide, path_ahead
from inference.position_sizing import make_sizer
from service import schemas as wire
from service.ledger import ServedForecast, served_forecast
from service.model_registry import ModelRegistry, ServedModel, is_finite_number
from service.schemas import FusionSettings, PredictionRequest, PredictionResult
from utils.errors import InsufficientDataError, ModelMissingError, UsageError

FloatArray = npt.NDArray[np.float64]

SMOOTHING_BARS = 5
BOLLINGER_BARS = 20
BOLLINGER_STDS = 2.0
MOVING_AVERAGE_BARS = 50
# Smaller changes of the target weight are drift of the forecast, not something to act on.
MIN_WEIGHT_CHANGE = 0.01
# Capital behind a marker's number of shares: the backtest form's default.
MARKER_CAPITAL = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """The tail of the decisions, as it is drawn.

    Attributes
    ----------
    rows
        `Decisions.frame` with ``weight_before`` (target of the session before) and ``shown_log`` (smoothed
        median h-day log forecast); finite wherever it is drawn.
    dates
        Sessions as ``YYYY-MM-DD``.
    horizon_bars
        Number of sessions that a forecast looks ahead.
    neutral_rows
        Sessions without a forecast inside the chart, shown as a forecast of no change.
    """

    rows: pd.DataFrame
    dates: list[str]
    horizon_bars: int
    neutral_rows: int

    def column(self, name: str) -> FloatArray:
        """Return one column, (n,)."""
        return np.asarray(self.rows[name], dtype=np.float64)


class PredictionService:
    """Answers what the page asks about one symbol.

    Parameters
    ----------
    registry
        Saved models.
    source, cache
        Where bars come from.
    on_served
        Told of every forecast before its answer goes out.
    """

    def __init__(
        self,
        *,
        registry: ModelRegistry,
        source: BarSource,
        cache: ReadsThrough | None,
        on_served: Callable[[ServedForecast], None] | None = None,
    ) -> None:
        self._on_served = on_served
        self._registry = registry
        self._source = source
        self._cache = cache

    def history(self, symbol: str, days: int) -> wire.HistoricalResponse:
        """Return the last ``days`` sessions, adjusted.

        Raises
        ------
        InvalidSymbolError, UnknownSymbolError, UpstreamError, DataError
            As the fetcher raises them.
        """
        bars = self._bars(normalise_symbol(symbol))
        tail = bars.frame.tail(days)
        return wire.HistoricalResponse(
            symbol=bars.symbol,
            data=[
                wire.HistoricalBar(date=date, open=o, high=h, low=low, close=c, volume=round(volume))
                for date, o, h, low, c, volume in _ohlcv(tail)
            ],
            data_as_of=_days(tail.index)[-1],
            data_stale=bars.provenance.stale,
            data_source=bars.provenance.source,
        )

    def cached_answer(self, request: PredictionRequest) -> bytes | None:
        """Return the answer where it is at hand; never waits."""
        return None

    def answer(self, request: PredictionRequest) -> bytes:
        """Return the answer as it is sent; see `predict`."""
        return self.predict(request).wire_bytes()

    def predict(self, request: PredictionRequest) -> PredictionResult:
        """Return history, decisions and forecast of one symbol.

        Raises
        ------
        UsageError
            If the request asks for what is not served.
        ModelMissingError, ModelError
            If there is no model, or none that can be used.
        UpstreamError, DataError
            If there are no bars, or not enough.
        """
        symbol = normalise_symbol(request.symbol)
        _check_served(symbol, request)
        model = self._model(symbol, request.model_id)
        bars = self._bars(symbol)
        sizer = make_sizer(max_long=request.max_long, max_short=request.max_short)
        decisions = decide(symbol, bars.frame, model.forecaster, sizer)
        chart = chart_of(decisions, days=request.days_on_chart, smoothing=request.smoothing)
        ahead = calendar_for(symbol).next_sessions(bars.frame.index[-1], request.horizon)
        path = path_ahead(decisions, ahead)
        forecast = forecast_of(chart, path)
        limits = {"max_long": sizer.rules.max_long, "max_short": sizer.rules.max_short}
        result = PredictionResult(
            symbol=symbol,
            dates=chart.dates,
            prices=chart.column("close").tolist(),
            actual_returns=chart.column("asset_return").tolist(),
            predicted_prices=(chart.column("close") * np.exp(chart.column("shown_log"))).tolist(),
            predicted_returns=np.expm1(chart.column("shown_log")).tolist(),
            fused_positions=chart.column("target_weight").tolist(),
            classifier_probabilities=[
                wire.ClassProbabilities(buy=up, sell=1.0 - up, hold=0.0)
                for up in chart.column("prob_up").tolist()
            ],
            trade_markers=markers_of(chart, forecast, request),
            overlays=overlays_of(bars.frame, chart, path),
            candles=[
                wire.Candle(date=date, open=o, high=h, low=low, close=c, volume=volume)
                for date, o, h, low, c, volume in _ohlcv(bars.frame.loc[chart.rows.index])
            ],
            forecast=forecast,
            metadata=metadata_of(request, model, bars, decisions, chart).model_copy(update=limits),
        )
        if self._on_served is not None:
            self._on_served(served_forecast(result))
        return result

    def _bars(self, symbol: str) -> Bars:
        return fetch_stock_data(symbol, source=self._source, cache=self._cache)

    def _model(self, symbol: str, model_id: str | None) -> ServedModel:
        model = self._registry.get(symbol)
        if model_id and model_id != model.meta.id:
            other = self._registry.find(model_id)
            raise UsageError(f"modelId {other.id} is a model of {other.symbol}, and symbol is {symbol}")
        return model


def _check_served(symbol: str, request: PredictionRequest) -> None:
    """Refuse what would otherwise be answered with something else than was asked for."""
    if request.fusion.mode == "lstm_only":
        raise ModelMissingError(f"no LSTM model for {symbol}: ask for fusion mode gbm_only or ensemble")
    if request.data_interval not in {None, "1d"}:
        raise UsageError(f"dataInterval {request.data_interval!a} is not served: leave it out or send 1d")


def chart_of(decisions: Decisions, *, days: int, smoothing: wire.Smoothing) -> Chart:
    """Return the last ``days`` decisions from the first forecast on.

    Sessions before the first out-of-sample forecast are left out: the model has seen them.

    Raises
    ------
    InsufficientDataError
        If the last session has no forecast.
    """
    frame = decisions.frame.copy()
    known = np.isfinite(np.asarray(frame["expected_log"], dtype=np.float64))
    if not known[-1]:
        raise InsufficientDataError(
            f"{decisions.symbol} has {len(frame)} bars and no forecast for the last one: its features need a "
            "longer or more complete history"
        )
    frame["weight_before"] = frame["target_weight"].shift(1, fill_value=0.0)
    frame["shown_log"] = smooth(frame["expected_log"], smoothing).fillna(0.0)
    rows = frame.iloc[max(int(np.argmax(known)), len(frame) - days) :]
    neutral = {"asset_return": 0.0, "lower": 0.0, "upper": 0.0, "prob_up": 0.5}
    return Chart(
        rows=rows.fillna(neutral),
        dates=_days(rows.index),
        horizon_bars=decisions.horizon_bars,
        neutral_rows=int(np.count_nonzero(~known[-len(rows) :])),
    )


def smooth(values: pd.Series, how: wire.Smoothing) -> pd.Series:
    """Smooth a series over `SMOOTHING_BARS`; the value of t uses values up to t only."""
    if how == "ema":
        return values.ewm(span=SMOOTHING_BARS, adjust=False).mean()
    if how == "moving-average":
        return values.rolling(SMOOTHING_BARS, min_periods=1).mean()
    return values


def forecast_of(chart: Chart, path: ForecastPath) -> wire.Forecast:
    """Return the sessions to come: the target decided at the last close is reached at the first of them."""
    dates = _days(path.dates)
    before, target = float(chart.column("weight_before")[-1]), float(chart.column("target_weight")[-1])
    prices, names = path.prices.tolist(), [action_of(before, target), *["HOLD"] * (len(dates) - 1)]
    return wire.Forecast(
        dates=dates,
        prices=prices,
        returns=path.returns.tolist(),
        positions=[target] * len(dates),
        lower_band=path.lower.tolist(),
        upper_band=path.upper.tolist(),
        actions=[
            wire.ForecastAction(date=date, action=name, price=price, target_position=target)
            for date, name, price in zip(dates, names, prices, strict=True)
        ],
    )


def action_of(before: float, target: float) -> wire.ForecastActionName:
    """Name the trade from one weight to another."""
    if abs(target - before) < MIN_WEIGHT_CHANGE:
        return "HOLD"
    if target > before:
        return "COVER" if target <= 0.0 else "BUY"
    return "SHORT" if target < 0.0 else "SELL"


def markers_of(chart: Chart, forecast: wire.Forecast, request: PredictionRequest) -> list[wire.TradeMarker]:
    """Mark each confident and large enough change of the target weight, and the first session to come.

    The confidence is the probability that the price moves in the direction of the change within the model's
    horizon. A marker of the history lies on the session at whose close the change was decided.
    """
    floors, fusion = request.confidence_floors, request.fusion
    least = {"buy": max(floors.buy, fusion.buy_threshold), "sell": max(floors.sell, fusion.sell_threshold)}
    change = chart.column("target_weight") - chart.column("weight_before")
    acted = np.flatnonzero(np.abs(change) >= MIN_WEIGHT_CHANGE)
    markers = [marker_of(chart, int(row), chart.dates[row], "history") for row in acted]
    markers.append(marker_of(chart, len(chart.dates) - 1, forecast.dates[0], "forecast"))
    smallest = request.trade_share_floor or 0.0
    return [
        marker
        for marker in markers
        if marker.type == "hold"
        or (marker.confidence >= least[marker.type] and abs(marker.shares) >= smallest)
    ]


def marker_of(chart: Chart, row: int, date: str, segment: Literal["history", "forecast"]) -> wire.TradeMarker:
    """Return the marker of what was decided at the close of ``row``."""
    at = chart.rows.iloc[row]
    before, target, up = float(at["weight_before"]), float(at["target_weight"]), float(at["prob_up"])
    change = target - before
    acts = abs(change) >= MIN_WEIGHT_CHANGE
    rises = change > 0.0
    median = float(np.expm1(at["expected_log"])) if np.isfinite(at["expected_log"]) else 0.0
    return wire.TradeMarker(
        date=date,
        price=float(at["close"]),
        type="hold" if not acts else "buy" if rises else "sell",
        shares=round(change * MARKER_CAPITAL / float(at["close"]), 4) if acts else 0.0,
        confidence=max(up, 1.0 - up) if not acts else up if rises else 1.0 - up,
        segment=segment,
        scope="prediction",
        explanation=(
            f"Median forecast {median:+.2%} over {chart.horizon_bars} sessions, 80 % band "
            f"{float(at['lower']):+.1%} to {float(at['upper']):+.1%}, chance of a rise {up:.0%}; "
            f"target weight {before:.2f} -> {target:.2f}"
        ),
    )


def overlays_of(bars: pd.DataFrame, chart: Chart, path: ForecastPath) -> list[wire.OverlaySeries]:
    """Return the lines over the chart; averages reach back before its first date."""
    close, shown = bars["Close"], chart.rows.index
    mid = close.rolling(BOLLINGER_BARS).mean().loc[shown].dropna()
    spread = BOLLINGER_STDS * close.rolling(BOLLINGER_BARS).std(ddof=0).loc[mid.index]
    average = close.rolling(MOVING_AVERAGE_BARS).mean().loc[shown].dropna()
    last = float(close.iloc[-1])
    ahead = pd.Series([last, *path.prices.tolist()], index=[shown[-1], *path.dates])
    return [
        wire.OverlaySeries(
            type="bollinger",
            points=_points(mid),
            upper=(mid + spread).to_list(),
            lower=(mid - spread).to_list(),
        ),
        wire.OverlaySeries(type="moving-average", points=_points(average)),
        wire.OverlaySeries(
            type="predicted-path",
            points=_points(ahead),
            upper=[last, *path.upper.tolist()],
            lower=[last, *path.lower.tolist()],
        ),
    ]


def metadata_of(
    request: PredictionRequest,
    model: ServedModel,
    bars: Bars,
    decisions: Decisions,
    chart: Chart,
) -> wire.PredictionMetadata:
    """Echo what was asked, and say what answered and how far it may be believed."""
    meta, trained = model.meta, model.bundle.metadata
    out_of_sample_from = decisions.out_of_sample_from
    evidence = trained["verdict"].get("evidence") or {}
    return wire.PredictionMetadata(
        model_id=meta.id,
        fusion_mode=request.fusion.mode,
        buy_threshold=request.fusion.buy_threshold,
        sell_threshold=request.fusion.sell_threshold,
        horizon=request.horizon,
        trade_share_floor=request.trade_share_floor,
        model_quality_gate_passed=meta.quality_gate_passed,
        model_quality_score=meta.quality_score,
        model_quality_reasons=meta.quality_reasons,
        holdout_metric_source="walk_forward",
        holdout_pred_target_std_ratio=std_ratio(model.bundle.record),
        feature_profile=trained.get("feature_set_hash"),
        feature_selection_mode="shap_in_fold",
        target_horizon_days=decisions.horizon_bars,
        execution_mode="decided_at_close_held_from_next_session",
        model_variant=meta.model_variant,
        data_interval="1d",
        data_period=request.data_period,
        is_intraday=False,
        annualization_factor=float(calendar_for(bars.symbol).sessions_per_year),
        smoothing=request.smoothing,
        confidence_floors=request.confidence_floors,
        out_of_sample_from=f"{out_of_sample_from:%Y-%m-%d}" if out_of_sample_from is not None else None,
        trained_through=meta.trained_through,
        data_as_of=chart.dates[-1],
        data_stale=bars.provenance.stale,
        data_source=bars.provenance.source,
        verdict=meta.verdict,
        evidence={name: value for name, value in evidence.items() if is_finite_number(value)},
        model_version=model.bundle.model_version,
        notes=[
            *model.warnings,
            *decisions.findings,
            *data_notes(bars, chart, model, request),
            *request_notes(request),
        ],
    )


def std_ratio(record: pd.DataFrame) -> float | None:
    """Return the spread of out-of-sample forecasts over that of outcomes; None before any outcome."""
    rows = record[["predicted_log", "realised_log"]].dropna()
    realised = float(np.std(np.asarray(rows["realised_log"]))) if len(rows) else 0.0
    return float(np.std(np.asarray(rows["predicted_log"]))) / realised if realised > 0.0 else None


def data_notes(bars: Bars, chart: Chart, model: ServedModel, request: PredictionRequest) -> list[str]:
    """Say in words what is amiss with the bars and the chart."""
    notes = list(bars.report.problems())
    if bars.provenance.stale:
        notes.append(f"prices end {chart.dates[-1]}; the exchange has closed later sessions")
    if model.meta.data_source != bars.provenance.source:
        notes.append(
            f"trained on prices of {model.meta.data_source}, serving prices of {bars.provenance.source}"
        )
    if len(chart.dates) < request.days_on_chart:
        notes.append(f"the chart begins {chart.dates[0]}: no out-of-sample forecast lies before it")
    if chart.neutral_rows:
        notes.append(f"{chart.neutral_rows} sessions without a forecast are drawn as a forecast of no change")
    if request.horizon > chart.horizon_bars:
        notes.append(f"past {chart.horizon_bars} sessions the forecast is the drift of the training rows")
    return notes


def request_notes(request: PredictionRequest) -> list[str]:
    """Say in words which settings change nothing in the answer."""
    fusion, usual = request.fusion, FusionSettings()
    notes = []
    if fusion.mode != "gbm_only":
        notes.append(f"fusion mode {fusion.mode} is served by the boosters alone: there is no LSTM model")
    if fusion.regressor_scale != usual.regressor_scale:
        notes.append("regressorScale changes nothing: positions are sized by Kelly's rule")
    if fusion.regime_filters != usual.regime_filters:
        notes.append("regimeFilters change nothing: positions do not depend on a regime")
    if request.data_period is not None:
        notes.append("dataPeriod changes nothing: the whole history is read")
    return notes


def _days(index: pd.Index) -> list[str]:
    return pd.DatetimeIndex(index).strftime("%Y-%m-%d").to_list()


def _ohlcv(frame: pd.DataFrame) -> Iterator[tuple[str, float, float, float, float, float]]:
    return zip(_days(frame.index), *(frame[name].to_list() for name in BAR_COLUMNS), strict=True)


def _points(series: pd.Series) -> list[wire.OverlayPoint]:
    pairs = zip(_days(series.index), series.to_list(), strict=True)
    return [wire.OverlayPoint(date=date, value=value) for date, value in pairs]
