"""Joining two models: what is learned one level up, what is believed, what the command leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.data_splitter import WalkForwardSplit
from inference.load_ensemble_model import GBM_NAME, LSTM_NAME, load_ensemble
from inference.load_gbm_models import GBMBundle, load_bundle
from inference.pipeline import decide
from inference.position_sizing import make_sizer
from training import train_ensemble
from training.train_ensemble import EnsembleTrainer, MetaConfig, compare, main, walk_meta
from utils.errors import InsufficientDataError, ModelError, ModelIncompatibleError


def network_like(bundle: GBMBundle, *, skill: float, seed: int = 1, keep: float = 0.0) -> GBMBundle:
    """Return a bundle whose record holds another signal: so much of the boosters' own, so much of what came."""
    record, rng = bundle.record.copy(), np.random.default_rng(seed)
    came = (record["realised_log"] / record["sigma_log"]).fillna(0.0)
    noise = np.sqrt(1 - skill**2) * rng.normal(size=len(record))
    record["raw_scaled"] = keep * record["raw_scaled"] + 0.1 * (skill * came + noise)
    metadata = {**bundle.metadata, "model_version": f"20260101T000000000000-lstm{seed:04d}"}
    return replace(bundle, record=record, metadata=metadata)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path) -> dict[str, GBMBundle]:
    return {name: load_bundle(tiny_bundle, name) for name in ("SIGNAL", "NOISE")}


@pytest.fixture
def places(tmp_path: Path, csv_dir: Path, tiny_bundle: Path, bundles, monkeypatch: pytest.MonkeyPatch):
    """Saved boosters of SIGNAL and NOISE, and a network of each that knows a little more."""
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
    monkeypatch.setattr("inference.load_ensemble_model.verify_in_fresh_process", lambda _folder: None)
    monkeypatch.setattr(train_ensemble, "load_bundle", lambda _dir, symbol: bundles[symbol])
    monkeypatch.setattr(
        train_ensemble, "load_lstm", lambda _dir, symbol: network_like(bundles[symbol], skill=0.15)
    )
    return tmp_path


def test_the_command_leaves_an_ensemble_a_report_and_one_json_on_stdout(places: Path, capsys, bundles):
    assert main(["signal", "--method", "simple", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[0]
    assert result["method"] == "simple"
    assert result["verdict"] in {"edge", "no-edge"}
    page = Path(result["report"]).read_text()
    assert "The parts beside the whole" in page
    saved = load_ensemble(places / "models", "SIGNAL")
    assert bundles["SIGNAL"].model_version in saved.model_version
    assert "lstm0001" in saved.model_version
    assert main(["SIGNAL"]) == 6
