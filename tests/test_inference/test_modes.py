"""Which forecaster a mode is, and what is said where it is another than was asked for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from inference.ensemble import SimpleEnsemble
from inference.load_ensemble_model import EnsembleBundle, EnsembleForecaster
from inference.modes import MODES, OLDER_MODES, Parts, forecaster_for, load_parts, mode_of
from inference.pipeline import Bundle, BundleForecaster
from tests.test_service.conftest import bundle_of
from utils.errors import ModelMissingError, UsageError


@pytest.fixture
def members() -> tuple[Bundle, Bundle]:
    return bundle_of("AAPL", "g1"), bundle_of("AAPL", "l1")


@pytest.fixture
def whole(members) -> Parts:
    gbm, lstm = members
    ensemble = EnsembleBundle(
        symbol="AAPL",
        horizon_bars=gbm.horizon_bars,
        method="simple",
        members={"gbm": "g1", "lstm": "l1"},
        weights=SimpleEnsemble(),
        record=pd.DataFrame({"date": pd.bdate_range("2020-01-01", periods=3), "raw_scaled": np.zeros(3)}),
        metadata={
            "model_version": "e1",
            "verdict": {"label": "edge"},
            "parts": {"notes": ["the weight of lstm is zero"]},
        },
    )
    return Parts(symbol="AAPL", gbm=gbm, lstm=lstm, ensemble=ensemble)


@pytest.mark.parametrize("mode", ["ensemble", *OLDER_MODES])
def test_the_ensemble_serves_where_its_members_are_those_it_was_judged_with(whole: Parts, mode: str):
    chosen = forecaster_for(mode, whole)
    assert isinstance(chosen.forecaster, EnsembleForecaster)
    assert chosen.mode == "ensemble"
    assert chosen.notes == ("the weight of lstm is zero",)
    assert chosen.model_version == "e1+gbm:g1+lstm:l1"
    assert (chosen.symbol, chosen.metadata["verdict"]["label"]) == ("AAPL", "edge")
    assert chosen.forecaster.distrusted_after is None


def test_an_ensemble_without_an_edge_is_not_trusted_after_its_record(whole: Parts):
    ensemble = whole.ensemble
    assert ensemble is not None
    no_edge = replace(ensemble, metadata={**ensemble.metadata, "verdict": {"label": "no-edge"}})
    forecaster = forecaster_for("ensemble", replace(whole, ensemble=no_edge)).forecaster
    assert isinstance(forecaster, EnsembleForecaster)
    assert forecaster.distrusted_after == pd.Timestamp("2020-01-03")


def test_each_member_alone(whole: Parts):
    for mode, bundle in (("gbm_only", whole.gbm), ("lstm_only", whole.lstm)):
        chosen = forecaster_for(mode, whole)
        assert isinstance(chosen.forecaster, BundleForecaster)
        assert chosen.forecaster.bundle is bundle
        assert (chosen.mode, chosen.notes) == (mode, ())


def test_with_another_version_of_a_member_the_boosters_forecast_alone(whole: Parts):
    newer = replace(whole, lstm=bundle_of("AAPL", "l2"))
    chosen = forecaster_for("ensemble", newer)
    assert isinstance(chosen.forecaster, BundleForecaster)
    assert chosen.forecaster.bundle is whole.gbm
    assert chosen.mode == "gbm_only"
    (note,) = chosen.notes
    assert "judged with another version of lstm" in note
    assert "python -m training.train_ensemble AAPL --overwrite" in note
    assert note.endswith("the boosters forecast alone")


def test_what_was_not_joined_names_the_command(whole: Parts):
    (note,) = forecaster_for("ensemble", replace(whole, ensemble=None)).notes
    assert "run `python -m training.train_ensemble AAPL`" in note


def test_a_network_that_is_wanted_alone_is_never_replaced(whole: Parts):
    with pytest.raises(ModelMissingError, match="lstm"):
        forecaster_for("lstm_only", replace(whole, lstm=None))


def test_a_name_that_is_no_mode_is_refused():
    assert [mode_of(name) for name in MODES] == list(MODES)
    with pytest.raises(UsageError, match="write gbm_only, lstm_only, ensemble"):
        mode_of("oracle")


def test_only_what_a_mode_needs_is_loaded_and_what_the_ensemble_lacks_is_said(tiny_bundle: Path):
    assert load_parts(tiny_bundle, "SIGNAL", "gbm_only").amiss == ""
    parts = load_parts(tiny_bundle, "SIGNAL", "ensemble")
    (note,) = forecaster_for("ensemble", parts).notes
    assert "python -m training.train_lstm SIGNAL" in note
    with pytest.raises(ModelMissingError, match=r"training\.train_lstm SIGNAL"):
        load_parts(tiny_bundle, "SIGNAL", "lstm_only")
    with pytest.raises(ModelMissingError, match=r"training\.train_gbm MSFT"):
        load_parts(tiny_bundle, "MSFT", "ensemble")
