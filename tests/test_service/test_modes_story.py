"""Boosters, network and ensemble from the training form to the chart, over HTTP, with nothing faked."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from app import create_app
from utils.base import Settings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason='networks are trained with TensorFlow: pip install ".[lstm]"',
)
TINY = {"epochs": 2, "batchSize": 4096, "sequenceLength": 3}
PREDICTION = {"symbol": "PLANTED", "horizon": 5, "daysOnChart": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_planted) -> Path:
    folder = tmp_path_factory.mktemp("story")
    (folder / "prices").mkdir()
    bars = make_planted(n=1_300, seed=5, ic=0.35)
    prices = bars.assign(**{"Adj Close": bars["Close"]})
    prices.to_csv(folder / "prices" / "PLANTED.csv", index_label="Date")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[TestClient]:
    settings = Settings(
        source=f"csv:{folder / 'prices'}", models_dir=folder / "models", cache_dir=folder / "cache"
    )
    with TestClient(create_app(settings)) as client:
        yield client


def train(page: TestClient, **params: object) -> dict:
    started = page.post("/api/training/start", json={"symbol": "PLANTED", "targetHorizons": [1], **params})
    assert started.status_code == 200, started.text
    until = time.monotonic() + 120
    while time.monotonic() < until:
        job = page.get(f"/api/training/{started.json()['jobId']}").json()
        if job["status"] not in {"queued", "running"}:
            return job
        time.sleep(0.2)
    raise AssertionError(f"still {job['status']} after two minutes")


@pytest.fixture(scope="module")
def jobs(page: TestClient) -> dict[str, dict]:
    return {
        "gbm": train(page, modelType="gbm", nTrials=1, useLgb=False),
        "lstm": train(page, modelType="lstm_transformer", **TINY),
        "ensemble": train(page, modelType="ensemble"),
    }


def predict(page: TestClient, mode: str, **changes: object) -> dict:
    answer = page.post("/api/predict", json={**PREDICTION, "fusion": {"mode": mode}, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_kind_is_trained_by_a_job(page: TestClient, jobs: dict[str, dict]):
    assert {kind: (job["status"], job.get("error")) for kind, job in jobs.items()} == dict.fromkeys(
        jobs, ("completed", None)
    )
    lstm = jobs["lstm"]
    assert set(lstm["metrics"]) == {"trainLoss", "valLoss", "directionalAccuracy", "varianceScore"}
    assert lstm["metrics"]["varianceScore"] > 0
    assert (lstm["totalEpochs"], lstm["modelType"]) == (2, "lstm_transformer")


def test_all_are_listed_with_what_they_are_worth(page: TestClient, jobs: dict[str, dict]):
    models = {model["id"]: model for model in page.get("/api/models").json()}
    assert {name: one["fusionModeDefault"] for name, one in models.items()} == {
        "PLANTED-ensemble": "ensemble",
        "PLANTED-gbm": "gbm_only",
        "PLANTED-lstm": "lstm_only",
    }
    assert {name: one["ensembleSize"] for name, one in models.items()} == {
        "PLANTED-ensemble": 2,
        "PLANTED-gbm": 1,
        "PLANTED-lstm": 1,
    }
    assert models["PLANTED-lstm"]["sequenceLength"] == 3
    for model in models.values():
        assert model["verdict"] in {"edge", "no-edge", "insufficient"}
        assert model["metrics"]["cumulativeReturn"] != 0
        assert model["metrics"]["maxDrawdown"] < 0
        assert model["metrics"]["correlation"] != 0


def test_every_mode_is_answered_by_its_model(page: TestClient, jobs: dict[str, dict]):
    answers = {mode: predict(page, mode) for mode in ("gbm_only", "lstm_only", "ensemble", "hybrid")}
    assert {mode: answer["metadata"]["modelId"] for mode, answer in answers.items()} == {
        "gbm_only": "PLANTED-gbm",
        "lstm_only": "PLANTED-lstm",
        "ensemble": "PLANTED-ensemble",
        "hybrid": "PLANTED-ensemble",
    }
    assert answers["hybrid"]["metadata"]["fusionMode"] == "hybrid"
    assert answers["hybrid"]["predictedReturns"] == answers["ensemble"]["predictedReturns"]
    assert answers["gbm_only"]["predictedReturns"] != answers["lstm_only"]["predictedReturns"]
    for answer in answers.values():
        chances = np.array([list(row.values()) for row in answer["classifierProbabilities"]])
        assert len(chances) == 120
        np.testing.assert_allclose(chances.sum(axis=1), 1.0)
    notes = " ".join(answers["ensemble"]["metadata"]["notes"])
    assert "boosters" in notes
    assert "(weight 0." in notes
    assert "forecast alone" not in notes


def test_the_id_of_a_model_decides_over_the_usual_mode(page: TestClient, jobs: dict[str, dict]):
    for kind in ("gbm", "lstm", "ensemble"):
        told = predict(page, "gbm_only", modelId=f"PLANTED-{kind}")
        assert told["metadata"]["modelId"] == f"PLANTED-{kind}"
    both = predict(page, "ensemble", modelId="PLANTED-lstm")["metadata"]
    assert both["modelId"] == "PLANTED-lstm"
    assert any("not fusion mode ensemble" in note for note in both["notes"])
    assert predict(page, "ensemble", modelId="PLANTED-gbm")["metadata"]["modelId"] == "PLANTED-ensemble"


def test_the_ensembles_prediction_is_booked(page: TestClient, jobs: dict[str, dict]):
    body = {"prediction": predict(page, "ensemble"), "params": {"backtestWindow": 60}}
    answer = page.post("/api/backtest", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["equityCurve"]) == 60


SERVE = """
import json, sys
from pathlib import Path
from fastapi.testclient import TestClient
from app import create_app
from utils.base import Settings

folder = Path(sys.argv[1])
places = {"models_dir": folder / "models", "cache_dir": folder / "cache"}
with TestClient(create_app(Settings(source=f"csv:{folder / 'prices'}", **places))) as client:
    asked = [{"symbol": "PLANTED", "fusion": {"mode": mode}} for mode in ("lstm_only", "ensemble")]
    ids = [client.post("/api/predict", json=one).json()["metadata"]["modelId"] for one in asked]
print(json.dumps({"ids": ids, "loaded": sorted({"tensorflow", "keras"} & set(sys.modules))}))
"""


def test_serving_needs_no_tensorflow(folder: Path, jobs: dict[str, dict]):
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder)], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"ids": ["PLANTED-lstm", "PLANTED-ensemble"], "loaded": []}


def test_without_the_network_the_boosters_answer_until_it_is_brought_back(
    page: TestClient, jobs: dict[str, dict]
):
    before = predict(page, "ensemble")
    assert (
        page.get("/api/models/PLANTED-ensemble/download")
        .headers["content-disposition"]
        .endswith("PLANTED_ensemble_artifacts.zip")
    )
    (version,) = page.get("/api/models/PLANTED-lstm/versions").json()
    assert version["serving"]
    assert page.delete("/api/models/PLANTED-lstm").json() == {"status": "deleted"}
    told = predict(page, "ensemble")
    assert (told["metadata"]["modelId"], told["metadata"]["fusionMode"]) == ("PLANTED-gbm", "ensemble")
    (note,) = (note for note in told["metadata"]["notes"] if "boosters forecast alone" in note)
    assert "train_lstm PLANTED" in note
    assert told["predictedReturns"] == predict(page, "gbm_only")["predictedReturns"]
    gone = page.post("/api/predict", json={**PREDICTION, "fusion": {"mode": "lstm_only"}})
    assert gone.status_code == 404
    assert "python -m training.train_lstm PLANTED" in gone.json()["detail"]
    assert page.post("/api/models/PLANTED-lstm/restore").json()["id"] == "PLANTED-lstm"
    assert predict(page, "ensemble") == before
