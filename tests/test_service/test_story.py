"""From trained bundles to what the page draws, with nothing faked."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from app import create_app
from data.data_fetcher import CsvSource, fetch_stock_data
from data.markets import calendar_for
from inference.load_gbm_models import load_bundle
from inference.pipeline import GBMForecaster, decide
from inference.position_sizing import make_sizer
from utils.settings import Settings


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
    assert models["SIGNAL"]["qualityGatePassed"] is True
    assert models["NOISE"]["qualityGatePassed"] is False


def test_the_page_shows_what_the_one_path_decides(page: TestClient, tiny_bundle: Path, csv_dir: Path):
    result = predict(page)
    bars = fetch_stock_data("SIGNAL", source=CsvSource(csv_dir)).frame
    forecaster = GBMForecaster(bundle=load_bundle(tiny_bundle, "SIGNAL"))
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
