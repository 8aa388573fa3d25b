"""From trained bundles to what the page draws, with nothing faked."""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from app import create_app
from data.data_fetcher import CsvSource, fetch_stock_data
from data.schema import calendar_for
from inference.ensemble import forecaster_for
from inference.load_gbm_models import load_bundle
from inference.pipeline import BundleForecaster, decide
from inference.position_sizing import make_sizer
from run_backtest import load_parts
from service.backtest_service import BacktestRequest, backtest
from utils.base import Settings


@pytest.fixture(scope="module")
def page(tiny_bundle: Path, csv_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    cache = tmp_path_factory.mktemp("cache")
    settings = Settings(source=f"csv:{csv_dir}", models_dir=tiny_bundle, cache_dir=cache)
    with TestClient(create_app(settings)) as client:
        yield client


def predict(page: TestClient, symbol: str = "SIGNAL", **changes: object) -> dict:
    answer = page.post("/api/predict", json={"symbol": symbol, "horizon": 5, "daysOnChart": 120, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_models_that_were_trained_are_listed_with_their_verdict(page: TestClient):
    models = {model["symbol"]: model for model in page.get("/api/models").json()}
    assert set(models) == {"SIGNAL", "NOISE"}
    assert models["SIGNAL"]["verdict"] == "edge"
    # It was planted so strong that the alarm goes: what nobody may believe has passed nothing.
    assert models["SIGNAL"]["qualityGatePassed"] is False
    assert "leak alarm" in models["SIGNAL"]["notes"]
    assert models["NOISE"]["qualityGatePassed"] is False


def test_the_page_shows_what_the_one_path_decides(page: TestClient, tiny_bundle: Path, csv_dir: Path):
    result = predict(page)
    bars = fetch_stock_data("SIGNAL", source=CsvSource(csv_dir)).frame
    forecaster = BundleForecaster(bundle=load_bundle(tiny_bundle, "SIGNAL"))
    decided = decide("SIGNAL", bars, forecaster, make_sizer(max_long=result["metadata"].get("maxLong"))).frame
    shown = decided.loc[pd.to_datetime(result["dates"])]
    assert len(result["dates"]) == 120
    np.testing.assert_allclose(result["prices"], shown["close"])
    np.testing.assert_allclose(result["fusedPositions"], shown["target_weight"])
    assert shown["is_out_of_sample"].all()
    assert result["metadata"]["outOfSampleFrom"] <= result["dates"][0]


def test_forecast_dates_are_sessions_after_the_last_candle(page: TestClient):
    result = predict(page, horizon=60)
    ahead = pd.to_datetime(result["forecast"]["dates"])
    expected = calendar_for("SIGNAL").next_sessions(pd.Timestamp(result["dates"][-1]), 60)
    assert list(ahead) == list(expected)
    lower, middle, upper = (np.asarray(result["forecast"][k]) for k in ("lowerBand", "prices", "upperBand"))
    assert np.all((lower < middle) & (middle < upper))


def test_no_edge_means_a_passive_position_and_says_so(page: TestClient):
    result = predict(page, "NOISE")
    assert result["metadata"]["verdict"] == "no-edge"
    assert result["metadata"]["modelQualityGatePassed"] is False
    assert set(result["forecast"]["positions"]) == {1.0}


def test_old_prices_are_served_and_marked(page: TestClient):
    assert predict(page)["metadata"]["dataStale"] is True


def test_a_forecast_after_the_record_says_what_it_is_made_from(page: TestClient):
    for symbol, sure in (("SIGNAL", True), ("NOISE", False)):
        marker = predict(page, symbol)["tradeMarkers"][-1]
        assert marker["segment"] == "forecast"
        assert "The model sees" in marker["explanation"]
        assert ("no position rests on it" not in marker["explanation"]) is sure
    assert any(note.startswith("not sure") for note in predict(page, "NOISE")["metadata"]["notes"])


def test_class_probabilities_sum_to_one_and_follow_the_forecast(page: TestClient):
    result = predict(page, daysOnChart=1_000)
    rows = np.array([[row["buy"], row["hold"], row["sell"]] for row in result["classifierProbabilities"]])
    np.testing.assert_allclose(rows.sum(axis=1), 1.0)
    assert ((rows >= 0) & (rows <= 1)).all()
    # The scale differs from day to day, so the order need not be the same, only close to it.
    assert np.corrcoef(rows[:, 0], result["predictedReturns"])[0, 1] > 0.8
    said, came = rows[:-1, 0], np.array(result["actualReturns"][1:]) > 0.0016
    upper = said > np.median(said)
    for half in (upper, ~upper):
        assert np.mean(said[half]) == pytest.approx(np.mean(came[half]), abs=0.08)
    assert np.mean(came[upper]) > np.mean(came[~upper]), "the planted edge shows"


@pytest.fixture
def shop(tiny_bundle: Path, csv_dir: Path, tmp_path: Path) -> Iterator[TestClient]:
    """The page over models that may be thrown away."""
    models = shutil.copytree(tiny_bundle, tmp_path / "models", symlinks=True)
    settings = Settings(source=f"csv:{csv_dir}", models_dir=models, cache_dir=tmp_path / "cache")
    with TestClient(create_app(settings)) as client:
        yield client


def test_a_model_is_downloaded_deleted_and_brought_back(shop: TestClient):
    before = predict(shop)
    archive = shop.get("/api/models/SIGNAL-gbm/download")
    assert archive.headers["content-disposition"] == "attachment; filename=SIGNAL_artifacts.zip"
    with zipfile.ZipFile(io.BytesIO(archive.content)) as files:
        manifest = json.loads(files.read("manifest.json"))
        assert set(files.namelist()) == {*manifest["files"], "manifest.json"}
    (version,) = shop.get("/api/models/SIGNAL-gbm/versions").json()
    assert (version["serving"], version["verdict"]) == (True, "edge")
    assert shop.delete("/api/models/SIGNAL-gbm").json() == {"status": "deleted"}
    assert [model["id"] for model in shop.get("/api/models").json()] == ["NOISE-gbm"]
    for answer in (
        shop.post("/api/predict", json={"symbol": "SIGNAL", "horizon": 5, "daysOnChart": 120}),
        shop.delete("/api/models/SIGNAL-gbm"),
        shop.get("/api/models/SIGNAL-gbm/download"),
    ):
        assert answer.status_code == 404
        assert isinstance(answer.json()["detail"], str)
    rollback = "/api/models/SIGNAL-gbm/rollback"
    assert shop.post(rollback).status_code == 404
    assert shop.post("/api/models/SIGNAL-gbm/restore").json()["id"] == "SIGNAL-gbm"
    assert shop.post("/api/models/SIGNAL-gbm/restore").status_code == 404
    assert predict(shop) == before
    # The one version there is may be named, another may not: by no other does it step to any version at all.
    assert shop.post(rollback, params={"to": version["modelVersion"]}).json()["id"] == "SIGNAL-gbm"
    for named, status in (("20200101T000000-0", 404), ("..", 404), ("a/b", 422), ("", 422), ("a" * 65, 422)):
        answer = shop.post(rollback, params={"to": named})
        assert (answer.status_code, type(answer.json()["detail"])) == (status, str)
    assert predict(shop) == before


def test_the_page_books_what_the_command_line_books(page: TestClient, tiny_bundle: Path, csv_dir: Path):
    told = predict(page, daysOnChart=400)
    body = {"prediction": told, "params": {"backtestWindow": 250, "enableForwardSim": True}}
    answer = page.post("/api/backtest", json=body)
    assert answer.status_code == 200, answer.text
    result = answer.json()
    request = BacktestRequest(start=pd.Timestamp(result["windowStart"]))
    chosen = forecaster_for("gbm_only", load_parts(tiny_bundle, "SIGNAL", "gbm_only"))
    booked = backtest(chosen, CsvSource(csv_dir), None, request).result
    assert [point["date"] for point in result["equityCurve"]] == told["dates"][-250:]
    np.testing.assert_allclose([point["equity"] for point in result["equityCurve"]], booked.daily["equity"])
    hold = booked.benchmarks["buy_hold"].daily["equity"]
    np.testing.assert_allclose([point["equity"] for point in result["buyHoldEquity"]], hold)
    assert result["metrics"]["sharpeRatio"] == pytest.approx(booked.metrics["sharpe_ratio"].value)
    assert result["metrics"]["totalTrades"] == booked.metrics["total_trades"].value
    forward = page.post("/api/forward_sim", json=body).json()
    assert forward == result["forwardSimulation"]
    assert forward["source"] == "historical_holdout"


def test_what_was_served_is_in_the_record(page: TestClient, tiny_bundle: Path):
    told = predict(page, horizon=7)
    record = page.get("/api/track-record/SIGNAL").json()
    (row,) = (row for row in record["forecasts"] if row["horizonBars"] == 7)
    assert (row["asOf"], row["targetSession"]) == (told["dates"][-1], told["forecast"]["dates"][-1])
    assert row["forecastReturn"] == told["forecast"]["returns"][-1]
    assert row["status"] == "open"
    assert (tiny_bundle / "ai_stocks.sqlite").is_file()
