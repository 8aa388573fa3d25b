"""What the page is sent: equal lengths, finite numbers, real sessions, and only what `decide` said."""

import json
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from inference.pipeline import decide
from inference.position_sizing import make_sizer
from service.prediction_service import PredictionService, action_of, smooth, std_ratio
from service.schemas import PredictionRequest, PredictionResult
from tests.test_service.conftest import FIRST_FORECAST, FakeForecaster, FakeRegistry, FakeSource, served
from utils.errors import (
    InsufficientDataError,
    InvalidSymbolError,
    ModelMissingError,
    UnknownSymbolError,
    UpstreamError,
    UsageError,
)

MakeBars = Callable[..., pd.DataFrame]
EVERY_MARKER = {
    "confidenceFloors": {"buy": 0, "sell": 0},
    "fusion": {"buyThreshold": 0, "sellThreshold": 0},
}


def ask(predictions: PredictionService, **fields: object) -> PredictionResult:
    return predictions.predict(PredictionRequest.model_validate({"symbol": "AAPL", **fields}))


def numbers(document: object) -> list[float]:
    if isinstance(document, dict):
        return [number for value in document.values() for number in numbers(value)]
    if isinstance(document, list):
        return [number for value in document for number in numbers(value)]
    return [document] if isinstance(document, int | float) else []


HISTORY = (
    "dates",
    "prices",
    "actual_returns",
    "predicted_prices",
    "predicted_returns",
    "fused_positions",
    "classifier_probabilities",
    "candles",
)


@pytest.mark.parametrize("days", [30, 120, 300, 5_000])
def test_history_arrays_are_equally_long_and_finite(
    predictions: PredictionService, bars: pd.DataFrame, days: int
) -> None:
    result = ask(predictions, daysOnChart=days)
    expected = min(days, len(bars) - FIRST_FORECAST)
    assert {name: len(getattr(result, name)) for name in HISTORY} == dict.fromkeys(HISTORY, expected)
    document = json.loads(result.wire_bytes())
    assert all(math.isfinite(number) for number in numbers(document))
    assert b"null" not in result.wire_bytes()
    assert result.dates == sorted(set(result.dates))
    assert [candle.date for candle in result.candles or []] == result.dates
    assert result.dates[-1] == f"{bars.index[-1]:%Y-%m-%d}"
    assert result.prices[-1] == pytest.approx(bars["Close"].iloc[-1])


def test_positions_are_those_of_decide(predictions: PredictionService, bars: pd.DataFrame) -> None:
    decisions = decide("AAPL", bars, FakeForecaster(), make_sizer())
    for smoothing in ("none", "ema", "moving-average"):
        result = ask(
            predictions, daysOnChart=200, smoothing=smoothing, confidenceFloors={"buy": 1, "sell": 1}
        )
        np.testing.assert_array_equal(result.fused_positions, decisions.frame["target_weight"].tail(200))


def test_yesterdays_answer_is_a_prefix_of_todays(bars: pd.DataFrame) -> None:
    answers = []
    for cut in (len(bars) - 1, len(bars)):
        source = FakeSource({"AAPL": bars.iloc[:cut]})
        service = PredictionService(registry=FakeRegistry(served()), source=source, cache=None)
        answers.append(ask(service, daysOnChart=100 + cut - len(bars), smoothing="ema"))
    before, today = answers
    assert before.dates == today.dates[:-1]
    assert before.fused_positions == today.fused_positions[:-1]
    assert before.predicted_returns == pytest.approx(today.predicted_returns[:-1])


def test_predicted_price_belongs_to_the_day_it_was_made(predictions: PredictionService) -> None:
    result = ask(predictions)
    made = np.array(result.prices) * (1 + np.array(result.predicted_returns))
    np.testing.assert_allclose(result.predicted_prices, made)
    assert result.forecast is not None
    # The last prediction is the forecast's step at the model's horizon.
    assert result.forecast.returns[4] == pytest.approx(result.predicted_returns[-1])
    assert result.actual_returns is not None
    np.testing.assert_allclose(
        result.actual_returns[1:], np.array(result.prices[1:]) / np.array(result.prices[:-1]) - 1
    )


@pytest.mark.parametrize("horizon", [1, 5, 40, 252])
def test_forecast_lies_on_sessions_after_the_last_candle(
    predictions: PredictionService, nyse_sessions: pd.DatetimeIndex, horizon: int
) -> None:
    result = ask(predictions, horizon=horizon)
    forecast = result.forecast
    assert forecast is not None
    after = nyse_sessions[nyse_sessions > pd.Timestamp(result.dates[-1])][:horizon]
    assert forecast.dates == list(after.strftime("%Y-%m-%d"))
    lengths = {
        len(forecast.prices),
        len(forecast.returns),
        len(forecast.positions),
        len(forecast.lower_band or []),
        len(forecast.upper_band or []),
        len(forecast.actions or []),
    }
    assert lengths == {horizon}
    for low, mid, high in zip(
        forecast.lower_band or [], forecast.prices, forecast.upper_band or [], strict=True
    ):
        assert 0 < low < mid < high


def test_fault_15_forecast_skips_holidays(make_bars: MakeBars) -> None:
    # The last bar is Tuesday 2007-11-20; Thursday 22 is Thanksgiving, Friday 23 a half day.
    frame = make_bars(n=650, seed=1, start="2005-07-05")
    frame = frame[frame.index <= "2007-11-20"]
    service = PredictionService(
        registry=FakeRegistry(served()), source=FakeSource({"AAPL": frame}), cache=None
    )
    forecast = ask(service, horizon=4).forecast
    assert forecast is not None
    assert forecast.dates == ["2007-11-21", "2007-11-23", "2007-11-26", "2007-11-27"]


def test_metadata_echoes_the_request_and_names_the_model(predictions: PredictionService) -> None:
    result = ask(
        predictions,
        horizon=7,
        tradeShareFloor=15,
        maxLong=1.2,
        maxShort=0.1,
        dataPeriod="5y",
        fusion={"mode": "hybrid", "buyThreshold": 0.2, "sellThreshold": 0.4, "regressorScale": 3},
    )
    meta = result.metadata
    assert meta.model_id == "AAPL-gbm"
    assert (meta.fusion_mode, meta.horizon, meta.target_horizon_days) == ("hybrid", 7, 5)
    assert (meta.buy_threshold, meta.sell_threshold, meta.trade_share_floor) == (0.2, 0.4, 15)
    assert (meta.max_long, meta.max_short, meta.data_period) == (1.2, 0.1, "5y")
    assert (meta.model_version, meta.verdict, meta.model_quality_gate_passed) == ("v1", "no-edge", False)
    assert meta.evidence == {"ic": 0.01}
    assert (meta.data_as_of, meta.data_source, meta.data_stale) == (result.dates[-1], "fake", True)
    assert meta.trained_through == "2007-01-05"
    assert meta.annualization_factor == 252
    assert meta.holdout_pred_target_std_ratio == pytest.approx(np.std([0.01, -0.01]) / np.std([0.02, -0.04]))
    said = " ".join(meta.notes or [])
    for word in ("hybrid", "regressorScale", "dataPeriod", "drift", "prices end"):
        assert word in said


def test_out_of_sample_from_is_the_first_forecast(predictions: PredictionService, bars: pd.DataFrame) -> None:
    result = ask(predictions, daysOnChart=10_000)
    assert result.metadata.out_of_sample_from == result.dates[0] == f"{bars.index[FIRST_FORECAST]:%Y-%m-%d}"
    assert any("begins" in note for note in result.metadata.notes or [])


def test_limits_bind_the_positions(predictions: PredictionService) -> None:
    result = ask(predictions, maxLong=0.3, maxShort=0)
    assert max(result.fused_positions) <= 0.3
    assert min(result.fused_positions) >= 0.0


def test_markers_follow_the_changes_of_the_target(predictions: PredictionService) -> None:
    result = ask(predictions, daysOnChart=300, **EVERY_MARKER)
    weight = dict(zip(result.dates, result.fused_positions, strict=True))
    history = [marker for marker in result.trade_markers if marker.segment == "history"]
    assert history, "the fake forecaster changes its mind"
    for marker in history:
        day = result.dates.index(marker.date)
        if day:
            change = weight[marker.date] - result.fused_positions[day - 1]
            assert marker.type == ("buy" if change > 0 else "sell")
            assert marker.shares == pytest.approx(change * 10_000 / marker.price, abs=1e-3)
        up = result.classifier_probabilities[day].buy
        assert marker.confidence == pytest.approx(up if marker.type == "buy" else 1 - up)
        assert "80 % band" in (marker.explanation or "")
    moved = [i for i in range(1, len(weight)) if abs(np.diff(result.fused_positions)[i - 1]) >= 0.01]
    assert {result.dates[i] for i in moved} <= {marker.date for marker in history}


def test_floors_and_share_floor_hide_markers_only(predictions: PredictionService) -> None:
    everything = ask(predictions, daysOnChart=300, **EVERY_MARKER)
    confident = ask(predictions, daysOnChart=300, confidenceFloors={"buy": 0.5, "sell": 0.6})
    large = ask(
        predictions,
        daysOnChart=300,
        tradeShareFloor=40,
        confidenceFloors={"buy": 0, "sell": 0},
        fusion=EVERY_MARKER,
    )
    for fewer in (confident, large):
        assert len(fewer.trade_markers) < len(everything.trade_markers)
        assert fewer.fused_positions == everything.fused_positions
    for marker in confident.trade_markers:
        assert marker.type == "hold" or marker.confidence >= {"buy": 0.5, "sell": 0.6}[marker.type]
    assert all(abs(m.shares) >= 40 for m in large.trade_markers if m.type != "hold")


def test_the_forecast_has_one_marker_and_one_action(predictions: PredictionService) -> None:
    result = ask(predictions, **EVERY_MARKER)
    (marker,) = [marker for marker in result.trade_markers if marker.segment == "forecast"]
    forecast = result.forecast
    assert forecast is not None
    assert forecast.actions is not None
    assert marker.date == forecast.dates[0]
    assert forecast.actions[0].action == action_of(result.fused_positions[-2], result.fused_positions[-1])
    assert {action.action for action in forecast.actions[1:]} == {"HOLD"}
    assert set(forecast.positions) == {result.fused_positions[-1]}


@pytest.mark.parametrize(
    ("before", "target", "action"),
    [
        (0.5, 0.505, "HOLD"),
        (0.5, 0.7, "BUY"),
        (0.5, 0.2, "SELL"),
        (0.5, 0.0, "SELL"),
        (0.5, -0.1, "SHORT"),
        (-0.1, -0.3, "SHORT"),
        (-0.3, -0.1, "COVER"),
        (-0.3, 0.0, "COVER"),
        (-0.3, 0.4, "BUY"),
    ],
)
def test_trades_have_their_names(before: float, target: float, action: str) -> None:
    assert action_of(before, target) == action


def test_overlays_are_aligned(predictions: PredictionService) -> None:
    result = ask(predictions, daysOnChart=60, horizon=10)
    overlays = {overlay.type: overlay for overlay in result.overlays}
    band = overlays["bollinger"]
    assert [point.date for point in band.points] == result.dates
    assert band.upper is not None
    assert band.lower is not None
    for point, high, low in zip(band.points, band.upper, band.lower, strict=True):
        assert low <= point.value <= high
    assert band.points[-1].value == pytest.approx(np.mean(result.prices[-20:]))
    path = overlays["predicted-path"]
    assert result.forecast is not None
    assert [point.date for point in path.points] == [result.dates[-1], *result.forecast.dates]
    assert path.points[0].value == result.prices[-1]
    assert len(path.upper or []) == len(path.lower or []) == 11


def test_probabilities_sum_to_one(predictions: PredictionService) -> None:
    for row in ask(predictions).classifier_probabilities:
        assert row.buy + row.sell + row.hold == pytest.approx(1.0)
        assert 0 <= row.buy <= 1


def test_smoothing_changes_what_is_drawn_and_uses_the_past_only(predictions: PredictionService) -> None:
    plain, smooth_ = ask(predictions), ask(predictions, smoothing="ema")
    assert plain.predicted_returns != smooth_.predicted_returns
    assert np.std(np.diff(smooth_.predicted_returns)) < np.std(np.diff(plain.predicted_returns))
    values = pd.Series([0.0, 0.0, 1.0, 0.0])
    for how in ("ema", "moving-average"):
        assert list(smooth(values, how)[:2]) == [0.0, 0.0], "a later value must not leak back"
        assert smooth(values, how)[2] > 0


def test_gaps_are_drawn_as_no_change_and_said(bars: pd.DataFrame, source: FakeSource) -> None:
    model = served(forecaster=FakeForecaster(gaps=(len(bars) - 10, len(bars) - 9)))
    result = ask(PredictionService(registry=FakeRegistry(model), source=source, cache=None), daysOnChart=30)
    assert result.predicted_returns[-10:-8] == [0.0, 0.0]
    assert result.classifier_probabilities[-10].buy == 0.5
    assert any("2 sessions without a forecast" in note for note in result.metadata.notes or [])


def test_no_forecast_for_the_last_bar_is_an_error(bars: pd.DataFrame, source: FakeSource) -> None:
    model = served(forecaster=FakeForecaster(gaps=(-1,)))
    service = PredictionService(registry=FakeRegistry(model), source=source, cache=None)
    with pytest.raises(InsufficientDataError, match="500 bars"):
        ask(service)


def test_fault_13_short_history_is_refused(bars: pd.DataFrame) -> None:
    source = FakeSource({"AAPL": bars.head(60)})
    service = PredictionService(registry=FakeRegistry(served()), source=source, cache=None)
    with pytest.raises(InsufficientDataError, match="60 bars"):
        ask(service)


def test_the_symbol_is_normalised(predictions: PredictionService, source: FakeSource) -> None:
    assert ask(predictions, symbol=" aapl ").symbol == "AAPL"
    assert source.asked == ["AAPL"]


def test_a_missing_model_is_said_before_any_price_is_asked(
    predictions: PredictionService, source: FakeSource
) -> None:
    with pytest.raises(ModelMissingError, match=r"training.train_gbm MSFT"):
        ask(predictions, symbol="MSFT")
    with pytest.raises(InvalidSymbolError):
        ask(predictions, symbol="../x")
    with pytest.raises(ModelMissingError, match="LSTM"):
        ask(predictions, fusion={"mode": "lstm_only"})
    with pytest.raises(UsageError, match="1h"):
        ask(predictions, dataInterval="1h")
    assert source.asked == []


@pytest.mark.parametrize("mode", ["gbm_only", "ensemble", "classifier", "weighted", "hybrid", "regressor"])
def test_every_other_mode_is_served_and_echoed(predictions: PredictionService, mode: str) -> None:
    assert ask(predictions, fusion={"mode": mode}).metadata.fusion_mode == mode


def test_the_model_id_must_fit_the_symbol(source: FakeSource) -> None:
    registry = FakeRegistry(served("AAPL"), served("MSFT"))
    service = PredictionService(registry=registry, source=source, cache=None)
    assert ask(service, modelId="AAPL-gbm").metadata.model_id == "AAPL-gbm"
    assert ask(service, modelId="").metadata.model_id == "AAPL-gbm"
    with pytest.raises(UsageError, match="MSFT-gbm is a model of MSFT"):
        ask(service, modelId="MSFT-gbm")
    with pytest.raises(ModelMissingError):
        ask(service, modelId="nothing")


def test_upstream_errors_pass_through(predictions: PredictionService, source: FakeSource) -> None:
    source.answers["AAPL"] = UpstreamError("Yahoo cannot be reached: try --source sample")
    with pytest.raises(UpstreamError):
        ask(predictions)
    with pytest.raises(UnknownSymbolError):
        predictions.history("ZZZZ", 5)


def test_history_has_the_last_days(predictions: PredictionService, bars: pd.DataFrame) -> None:
    answer = predictions.history("aapl", 7)
    assert [bar.date for bar in answer.data] == list(bars.index[-7:].strftime("%Y-%m-%d"))
    assert answer.data[-1].close == pytest.approx(bars["Close"].iloc[-1])
    assert isinstance(answer.data[-1].volume, int)
    assert len(predictions.history("AAPL", 20_000).data) == len(bars)


def test_bars_from_another_source_than_the_training_are_said(bars: pd.DataFrame) -> None:
    registry = FakeRegistry(served("AAPL", source="yahoo"))
    service = PredictionService(registry=registry, source=FakeSource({"AAPL": bars}), cache=None)
    assert any("trained on prices of yahoo" in note for note in ask(service).metadata.notes or [])


def test_std_ratio_is_none_before_any_outcome() -> None:
    assert std_ratio(pd.DataFrame({"predicted_log": [0.1], "realised_log": [np.nan]})) is None
