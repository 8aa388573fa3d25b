"""What the page is sent: equal lengths, finite numbers, real sessions, and only what `decide` said."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.feature_engineer import FEATURE_WORDS, FEATURES
from inference.pipeline import decide
from inference.position_sizing import make_sizer
from service.model_registry import Place
from service.prediction_chart import REGIME_BARS, action_of, in_words, smooth, std_ratio
from service.prediction_service import BarKeeper, PredictionService, Recent
from service.schemas import PredictionRequest, PredictionResult
from tests.test_service.conftest import FIRST_FORECAST, FakeForecaster, FakeRegistry, FakeSource, served
from utils.base import (
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
    body = predictions.answer(PredictionRequest.model_validate({"symbol": "AAPL", **fields}))
    return PredictionResult.model_validate_json(body)


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
    for word in ("regressorScale", "dataPeriod", "drift", "prices end"):
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
        # The fake says: a rise is four points likelier than a gain after costs.
        up = result.classifier_probabilities[day].buy + 0.04
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
    assert result.classifier_probabilities[-10].buy == pytest.approx(1 / 3)
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


# ---------------------------------------------------------------- the same tomorrow


def replay(bars: pd.DataFrame, forecaster: FakeForecaster, ahead: int = 5) -> set[str]:
    """Return which arrays of the answer of ``ahead`` sessions ago are not part of the answer of today."""
    answers = []
    for cut in (len(bars) - ahead, len(bars)):
        service = PredictionService(
            registry=FakeRegistry(served(forecaster=forecaster)),
            source=FakeSource({"AAPL": bars.iloc[:cut]}),
            cache=None,
        )
        answers.append(json.loads(service.answer(request(daysOnChart=100 + cut - len(bars) + ahead))))
    before, today = answers
    assert before["dates"] == today["dates"][: -ahead or None][-len(before["dates"]) :]
    names = "fusedPositions predictedReturns predictedPrices actualReturns classifierProbabilities candles"
    return {n for n in names.split() if before[n] != today[n][:-ahead][-len(before[n]) :]}


def request(**fields: object) -> PredictionRequest:
    return PredictionRequest.model_validate({"symbol": "AAPL", **fields})


@dataclass(frozen=True)
class PeekingForecaster(FakeForecaster):
    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        frame = super().forecast(bars)
        coming = bars["Close"].shift(-3) / bars["Close"] - 1.0
        return frame.assign(
            expected_return=(20.0 * coming).fillna(0.0).where(frame["expected_return"].notna())
        )


def test_yesterdays_answer_is_replayed_by_todays_through_the_service(bars: pd.DataFrame) -> None:
    assert replay(bars, FakeForecaster()) == set()


def test_a_forecaster_that_peeks_is_caught_by_the_replay(bars: pd.DataFrame) -> None:
    assert "fusedPositions" in replay(bars, PeekingForecaster())


def test_fault_15_the_servers_zone_changes_nothing(
    bars: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = set()
    for zone in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
        monkeypatch.setitem(os.environ, "TZ", zone)
        time.tzset()
        source = FakeSource({"AAPL": bars})
        service = PredictionService(registry=FakeRegistry(served()), source=source, cache=None)
        bodies.add(service.answer(request()))
    monkeypatch.undo()
    time.tzset()
    assert len(bodies) == 1


# ---------------------------------------------------------------- ready answers


@dataclass(frozen=True)
class CountingForecaster(FakeForecaster):
    made: list[int] = field(default_factory=list, hash=False, compare=False)
    delay_s: float = 0.0

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        self.made.append(len(bars))
        time.sleep(self.delay_s)
        return super().forecast(bars)


class Moment:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def counting() -> CountingForecaster:
    return CountingForecaster()


@pytest.fixture
def counted_registry(counting: CountingForecaster) -> FakeRegistry:
    return FakeRegistry(served("AAPL", forecaster=counting))


@pytest.fixture
def service(counted_registry: FakeRegistry, source: FakeSource) -> PredictionService:
    return PredictionService(registry=counted_registry, source=source, cache=None)


def test_an_answer_is_ready_once_it_was_given(
    service: PredictionService, counting: CountingForecaster, source: FakeSource
) -> None:
    assert service.ready_answer(request().wire_bytes()) is None
    body = service.answer(request())
    assert service.ready_answer(request().wire_bytes()) is body
    assert service.answer(request()) is body
    assert service.ready_answer(request(horizon=6).wire_bytes()) is None
    assert service.answer(request(horizon=6)) != body
    assert counting.made == [500], "what is drawn differently is decided once"
    service.answer(request(maxLong=0.5))
    assert counting.made == [500, 500], "other limits are other decisions"
    assert source.asked == ["AAPL"]


def test_a_ready_answer_is_cheap_and_asks_nobody(service: PredictionService, source: FakeSource) -> None:
    service.answer(request())
    source.answers.clear()
    asked = request().wire_bytes()
    took = []
    for _ in range(200):
        began = time.perf_counter()
        assert service.ready_answer(asked) is not None
        took.append(time.perf_counter() - began)
    assert np.median(took) < 100e-6


def test_a_new_model_ends_a_ready_answer(
    service: PredictionService, counted_registry: FakeRegistry, counting: CountingForecaster
) -> None:
    service.answer(request())
    counted_registry.models["AAPL"] = replace(
        served("AAPL", version="v2"), forecaster=counting, place=Place(Path("v2"), 0)
    )
    assert service.ready_answer(request().wire_bytes()) is None
    assert json.loads(service.answer(request()))["metadata"]["modelVersion"] == "v2"
    assert b'"modelVersion":"v2"' in (service.ready_answer(request().wire_bytes()) or b"")
    del counted_registry.models["AAPL"]
    assert service.ready_answer(request().wire_bytes()) is None
    with pytest.raises(ModelMissingError):
        service.answer(request())


def live(bars: pd.DataFrame, now: datetime) -> tuple[PredictionService, FakeSource, Moment]:
    """Return a service over a live source, and the hands of its clock."""
    source, clock = FakeSource({"AAPL": bars}, is_live=True), Moment(now)
    service = PredictionService(registry=FakeRegistry(served()), source=source, cache=None)
    service.bars = BarKeeper(source, None, clock)
    return service, source, clock


def test_fault_08_a_dead_source_leaves_answers_that_say_so(bars: pd.DataFrame) -> None:
    evening = bars.index[-1].to_pydatetime().replace(tzinfo=UTC) + timedelta(hours=23)
    service, source, clock = live(bars, evening)
    fresh = json.loads(service.answer(request()))
    assert fresh["metadata"]["dataStale"] is False
    clock.now += timedelta(days=4)
    source.answers["AAPL"] = UpstreamError("down")
    assert service.ready_answer(request().wire_bytes()) is None, "a newer session is due"
    stale = json.loads(service.answer(request()))
    assert (stale["metadata"]["dataStale"], stale["metadata"]["dataAsOf"]) == (True, fresh["dates"][-1])
    assert any("prices end" in note for note in stale["metadata"]["notes"])
    assert stale["fusedPositions"] == fresh["fusedPositions"]
    assert service.ready_answer(request().wire_bytes()) is not None, "until it is asked again"
    assert service.quote("AAPL").data_stale
    assert service.history("AAPL", 3).data_stale
    assert len(source.asked) == 2


def test_a_new_session_is_fetched_once_and_answered(bars: pd.DataFrame) -> None:
    evening = bars.index[-2].to_pydatetime().replace(tzinfo=UTC) + timedelta(hours=23)
    service, source, clock = live(bars.iloc[:-1], evening)
    service.answer(request())
    source.answers["AAPL"], clock.now = bars, evening + (bars.index[-1] - bars.index[-2]).to_pytimedelta()
    for _ in range(5):
        assert json.loads(service.answer(request()))["dates"][-1] == f"{bars.index[-1]:%Y-%m-%d}"
    assert len(source.asked) == 2


def in_parallel(call: Callable[[], bytes], threads: int = 100) -> list[bytes]:
    """Return what ``call`` says in many threads at once; an error in any of them is raised."""
    with ThreadPoolExecutor(threads) as pool:
        return [answer.result() for answer in [pool.submit(call) for _ in range(threads)]]


def test_fault_22_a_hundred_parallel_requests_decide_once(
    service: PredictionService, counting: CountingForecaster
) -> None:
    assert len(set(in_parallel(lambda: service.answer(request())))) == 1
    assert counting.made == [500]


def test_fault_22_each_answer_comes_from_one_version_while_models_change(source: FakeSource) -> None:
    models = [replace(served("AAPL", version=f"v{k}"), place=Place(Path("v1"), k)) for k in range(2)]
    registry = FakeRegistry(models[0])
    service = PredictionService(registry=registry, source=source, cache=None)
    turn = itertools.count()

    def ask_and_flip() -> bytes:
        registry.models["AAPL"] = models[next(turn) % 2]
        return service.ready_answer(request().wire_bytes()) or service.answer(request())

    alone = [PredictionService(registry=FakeRegistry(m), source=source, cache=None) for m in models]
    assert set(in_parallel(ask_and_flip)) == {one.answer(request()) for one in alone}


def test_what_is_recent_is_bounded_by_weight() -> None:
    recent: Recent[str, int] = Recent(10)
    for key, weight in (("a", 4), ("b", 4)):
        recent.put(key, weight, weight)
    assert recent.get("a") == 4
    recent.put("c", 4, 4)
    assert [recent.get(key) for key in "abc"] == [4, None, 4], "the one not asked for goes"
    recent.put("a", 9, 9)
    assert [recent.get(key) for key in "abc"] == [9, None, None]
    recent.put("huge", 1, 11)
    assert [recent.get(key) for key in ("a", "huge")] == [None, None]
    recent.put("d", 1, 10)
    assert recent.get("d") == 1, "the total was kept right"


# ---------------------------------------------------------------- words


@dataclass(frozen=True)
class ExplainingForecaster(FakeForecaster):
    def contributions(self, bars: pd.DataFrame, sessions: pd.DatetimeIndex) -> pd.DataFrame:
        row = {"rsi_14": 0.3, "gap_down": -0.2, "macd": 0.1, "atr_14": 0.01}
        return pd.DataFrame([row] * len(sessions), index=sessions)


def explained(source: FakeSource, bars: pd.DataFrame, label: str) -> PredictionResult:
    verdict = {"label": label, "reasons": [], "evidence": {}}
    model = served(forecaster=ExplainingForecaster(), verdict=verdict)
    record = model.bundle.record.assign(date=bars.index[-40:-37])
    model = replace(model, bundle=replace(model.bundle, record=record))
    registry = FakeRegistry(model)
    return ask(
        PredictionService(registry=registry, source=source, cache=None), daysOnChart=300, **EVERY_MARKER
    )


def test_the_explanation_names_the_strongest_features_in_words(
    source: FakeSource, bars: pd.DataFrame
) -> None:
    result = explained(source, bars, "edge")
    said = {marker.date: marker.explanation or "" for marker in result.trade_markers}
    last = said[result.trade_markers[-1].date]
    assert "for a rise: the 14-day RSI, the MACD; for a fall: the gap down at the open" in last
    assert "daily range" not in last, "the weakest is not named"
    assert "without a proven edge" not in last
    final = f"{bars.index[-38]:%Y-%m-%d}"
    made = {date: "The model sees" in text for date, text in said.items()}
    assert not any(told for date, told in made.items() if date <= final), "fold models are not kept"
    assert 1 < sum(made.values()) <= 5


def test_without_an_edge_the_explanation_and_the_notes_are_not_sure(
    source: FakeSource, bars: pd.DataFrame
) -> None:
    for label in ("no-edge", "insufficient"):
        result = explained(source, bars, label)
        assert "no position rests on it" in str(result.trade_markers[-1].explanation)
        assert any(note.startswith("not sure:") for note in result.metadata.notes or [])
    sure = explained(source, bars, "edge")
    assert not any(note.startswith("not sure:") for note in sure.metadata.notes or [])


def test_every_feature_has_words_of_its_own() -> None:
    assert {spec.name for spec in FEATURES} <= set(FEATURE_WORDS)
    assert len(set(FEATURE_WORDS.values())) == len(FEATURE_WORDS)
    assert in_words(pd.Series({"rsi_14": 0.0})) == "The model sees nothing for either side"


def test_an_old_model_is_flagged(bars: pd.DataFrame, source: FakeSource) -> None:
    def meta_of(trained: pd.Timestamp, **changes: object) -> tuple[int | None, bool | None, bool]:
        registry = FakeRegistry(served(trained_through=f"{trained:%Y-%m-%d}", **changes))
        metadata = ask(PredictionService(registry=registry, source=source, cache=None)).metadata
        said = any("train again" in note for note in metadata.notes or [])
        return metadata.model_age_sessions, metadata.model_is_old, said

    assert meta_of(bars.index[-1]) == (0, False, False)
    assert meta_of(bars.index[-253]) == (252, False, False)
    assert meta_of(bars.index[-254]) == (253, True, True)
    assert meta_of(bars.index[-100], folds=[{"n": 63}, {"n": 60}]) == (99, True, True)


# ---------------------------------------------------------------- filters and quotes


def test_regime_filters_hide_trades_of_a_regime_and_move_no_position(
    predictions: PredictionService, bars: pd.DataFrame
) -> None:
    both = ask(predictions, daysOnChart=300, **EVERY_MARKER)
    mean = bars["Close"].rolling(REGIME_BARS, min_periods=1).mean()
    is_bull = dict(zip(bars.index.strftime("%Y-%m-%d"), bars["Close"] >= mean, strict=True))
    shown = {}
    for wanted in ("bull", "bear"):
        filters = {"bull": wanted == "bull", "bear": wanted == "bear"}
        fusion = {"buyThreshold": 0, "sellThreshold": 0, "regimeFilters": filters}
        result = ask(predictions, daysOnChart=300, confidenceFloors={"buy": 0, "sell": 0}, fusion=fusion)
        assert result.fused_positions == both.fused_positions
        shown[wanted] = [m for m in result.trade_markers if m.segment == "history"]
        assert {is_bull[marker.date] for marker in shown[wanted]} == {wanted == "bull"}
        other = "bear" if wanted == "bull" else "bull"
        assert any(f"decided in a {other} market" in note for note in result.metadata.notes or [])
        assert result.forecast is not None
        assert both.forecast is not None
        kept = is_bull[result.dates[-1]] == (wanted == "bull")
        expected = (both.forecast.actions or [])[0].action if kept else "HOLD"
        assert (result.forecast.actions or [])[0].action == expected
    together = sorted([*shown["bull"], *shown["bear"]], key=lambda marker: marker.date)
    assert together == [marker for marker in both.trade_markers if marker.segment == "history"]


def test_a_quote_is_the_last_closed_session(predictions: PredictionService, bars: pd.DataFrame) -> None:
    quote = json.loads(predictions.quote(" aapl ").wire_bytes())
    last = bars.iloc[-1]
    assert quote["symbol"] == "AAPL"
    assert quote["current_price"] == pytest.approx(last["Close"])
    assert quote["previous_close"] == pytest.approx(bars["Close"].iloc[-2])
    assert (quote["open"], quote["day_high"], quote["day_low"]) == pytest.approx(
        (last["Open"], last["High"], last["Low"])
    )
    assert isinstance(quote["volume"], int)
    assert (quote["data_stale"], quote["data_as_of"]) == (True, f"{bars.index[-1]:%Y-%m-%d}")
    with pytest.raises(UnknownSymbolError):
        predictions.quote("NOPE")
