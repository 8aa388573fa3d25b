"""Two models as one forecaster: what it knows at t, what it does without a member, what is saved of it."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.target_engineering import make_target
from inference import artifact
from inference.artifact import new_version_id
from inference.ensemble import (
    EMBARGO_BARS,
    EnsembleBundle,
    EnsembleForecaster,
    MetaModel,
    Parts,
    SignalRows,
    SimpleEnsemble,
    Stacked,
    forecaster_for,
    load_ensemble,
    load_folder,
    meta_features,
    save_ensemble,
)
from inference.intervals import calibrate
from inference.pipeline import FORECAST_COLUMNS, Bundle, BundleForecaster, Member, decide
from inference.position_sizing import make_sizer
from tests.test_service.conftest import bundle_of
from utils.base import ModelCorruptError, ModelIncompatibleError, ModelMissingError, UsageError
from utils.model_paths import MODES, OLDER_MODES, mode_of

# Who is listened to.


def rows_of(*skills: float, n: int = 4_000, horizon_bars: int = 1, seed: int = 0, spread=(0.05, 0.2)):
    """Return rows whose members know so much of what came, each with its own spread."""
    rng = np.random.default_rng(seed)
    daily = rng.normal(size=n + horizon_bars)
    came = np.array([daily[t + 1 : t + 1 + horizon_bars].sum() for t in range(n)]) / np.sqrt(horizon_bars)
    signals = [
        scale * (skill * came + np.sqrt(1 - skill**2) * rng.normal(size=n))
        for skill, scale in zip(skills, spread, strict=True)
    ]
    came[n - horizon_bars :] = np.nan
    return SignalRows(
        signals=np.column_stack(signals),
        outcome=came,
        is_out_of_sample=np.ones(n, dtype=bool),
        known_from=np.arange(n) + horizon_bars + EMBARGO_BARS,
        horizon_bars=horizon_bars,
    )


MEMBERS = ("gbm", "lstm")


def last_weight(rows: SignalRows) -> float:
    """Return the last weight of the second member."""
    return float(SimpleEnsemble().weigh(rows, MEMBERS)[0][-1, 1])


@pytest.mark.parametrize("horizon_bars", [1, 5])
def test_weights_begin_at_the_prior_and_move_towards_skill(horizon_bars: int):
    rows = rows_of(0.03, 0.12, horizon_bars=horizon_bars)
    weights, _ = SimpleEnsemble().weigh(rows, MEMBERS)
    np.testing.assert_allclose(weights[:190], [[0.7, 0.3]] * 190)
    assert weights[-1, 1] > 0.5
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    assert (weights >= 0).all()


def test_noise_is_hardly_listened_to_and_what_misleads_not_at_all():
    noise = [last_weight(rows_of(0.1, 0.0, n=10_000, seed=seed)) for seed in range(4)]
    assert np.mean(noise) < 0.1
    assert max(last_weight(rows_of(0.1, -0.1, seed=seed)) for seed in range(3)) == 0.0


def test_a_second_member_is_heard_only_where_its_skill_beats_one_standard_error():
    useless = np.array([last_weight(rows_of(0.05, 0.0, n=1_500, seed=seed)) for seed in range(20)])
    # One-sided, chance passes one standard error in 16 of 100.
    assert 0.02 <= np.mean(useless > 0) <= 0.3
    assert min(last_weight(rows_of(0.05, 0.15, n=1_500, seed=seed)) for seed in range(5)) > 0.3


def test_where_nobody_helps_the_prior_stands():
    weights, _ = SimpleEnsemble().weigh(rows_of(-0.3, -0.3), MEMBERS)
    np.testing.assert_allclose(weights[-1], [0.7, 0.3])


def test_a_louder_member_is_not_listened_to_more():
    quiet, loud = rows_of(0.1, 0.1, spread=(0.05, 0.05)), rows_of(0.1, 0.1, spread=(0.05, 0.4))
    first, second = (SimpleEnsemble().weigh(rows, MEMBERS) for rows in (quiet, loud))
    np.testing.assert_allclose(first[0], second[0], atol=1e-9)
    np.testing.assert_allclose(first[1][100:], second[1][100:], atol=1e-9)


def test_a_member_that_says_nothing_leaves_the_other_as_it_is():
    rows = rows_of(0.1, 0.1)
    for silence in (np.nan, 0.0):
        muted = replace(rows, signals=rows.signals * [1.0, silence])
        weights, joined = SimpleEnsemble().weigh(muted, MEMBERS)
        np.testing.assert_array_equal(joined[100:], rows.signals[100:, 0])
        np.testing.assert_array_equal(weights[100:, 1], 0.0)


def test_rows_that_a_member_was_fitted_on_teach_nothing():
    rows = rows_of(0.03, 0.5)
    seen = replace(rows, is_out_of_sample=np.arange(4_000) >= 3_900)
    weights, _ = SimpleEnsemble().weigh(seen, MEMBERS)
    np.testing.assert_allclose(weights[-1], [0.7, 0.3])


def test_outcomes_of_the_future_change_nothing_before_them():
    rows = rows_of(0.05, 0.1, n=800)
    changed = rows.outcome.copy()
    changed[600:] = -changed[600:]
    ensemble = SimpleEnsemble(refresh_rows=1)
    first, second = (ensemble.weigh(each, MEMBERS) for each in (rows, replace(rows, outcome=changed)))
    # The outcome of row 600 is known at the close of row 601 and used from the row after it.
    np.testing.assert_array_equal(first[0][:602], second[0][:602])
    assert not np.array_equal(first[0][602], second[0][602])
    early, late = (ensemble.calibrate(each, first[1])[0] for each in (rows, replace(rows, outcome=changed)))
    np.testing.assert_array_equal(early[:602], late[:602])
    assert early[602] != late[602]


def test_the_joined_signal_is_calibrated_as_any_other():
    rows = rows_of(0.1, 0.1)
    _, joined = SimpleEnsemble().weigh(rows, MEMBERS)
    slope, mean, lower = SimpleEnsemble().calibrate(rows, joined)
    start = 63 * (3_999 // 63) - EMBARGO_BARS
    alone = calibrate(joined[:start], rows.outcome[:start], drift=0.0, horizon_bars=1)
    assert (slope[-1], mean[-1], lower[-1]) == pytest.approx(
        (alone.slope, alone.raw_mean, alone.skill_lower), rel=1e-2
    )


# What is forecast together.

HORIZON = 5
N = 1_500


@dataclass(frozen=True)
class Told:
    """A member whose signals were written down by session."""

    signal: "pd.Series[float]"
    horizon_bars: int = HORIZON

    def centre(self, bars: pd.DataFrame) -> pd.DataFrame:
        sigma_log = make_target(bars, self.horizon_bars)["sigma_log"]
        raw = self.signal.reindex(bars.index)
        return pd.DataFrame(
            {
                "expected_log": 0.001,
                "baseline_log": np.where(raw.notna(), 0.001, np.nan),
                "sigma_log": sigma_log,
                "skill_lower": 0.0,
                "raw_scaled": raw,
                "is_out_of_sample": raw.notna(),
                "is_of_other_prices": False,
            },
            index=bars.index,
        )

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        raise NotImplementedError


def told(bars: pd.DataFrame, *, skill: float, seed: int, start: int = 260, spread: float = 0.1) -> Told:
    """Return a member whose signal correlates so much with what came."""
    rng = np.random.default_rng(seed)
    came = make_target(bars, HORIZON)["target_scaled"].fillna(0.0)
    signal = skill * came + np.sqrt(1 - skill**2) * rng.normal(size=len(bars))
    return Told(spread * signal.iloc[start:])


@pytest.fixture(scope="module")
def bars(make_bars) -> pd.DataFrame:
    return make_bars(n=N, seed=11)


@pytest.fixture(scope="module")
def members(bars) -> dict[str, Member]:
    return {
        "gbm": told(bars, skill=0.15, seed=1),
        "lstm": told(bars, skill=0.10, seed=2, start=500, spread=0.4),
    }


ROWS = (3, 270, 520, 700, 1_000, 1_499)


def changed_by_the_future(forecaster, bars: pd.DataFrame) -> list[str]:
    """Return the columns whose value at t differs between `bars[:t + 1]` and all bars."""
    full = decide("AAPL", bars, forecaster, make_sizer()).frame
    changed = set()
    for t in ROWS:
        cut = decide("AAPL", bars.iloc[: t + 1], forecaster, make_sizer()).frame
        pair = pd.concat([cut.iloc[[-1]], full.iloc[[t]]])
        changed |= {
            name for name in pair if pair[name].iloc[0] != pair[name].iloc[1] and pair[name].notna().any()
        }
    return sorted(changed)


def test_a_decision_does_not_change_when_later_bars_arrive(members, bars):
    forecaster = EnsembleForecaster(members=members)
    assert changed_by_the_future(forecaster, bars) == []
    frame = forecaster.forecast(bars)
    assert set(FORECAST_COLUMNS) <= set(frame)
    assert frame["weight_lstm"].nunique() > 5
    assert frame["skill_lower"].iloc[-1] > 0


class Hindsight(SimpleEnsemble):
    """A planted fault: the weights and the calibration of every row come from all rows."""

    def weigh(self, rows, members):
        return super().weigh(replace(rows, known_from=np.zeros_like(rows.known_from)), members)


class HindsightInCalibration(SimpleEnsemble):
    def calibrate(self, rows, raw_scaled):
        return super().calibrate(replace(rows, known_from=np.zeros_like(rows.known_from)), raw_scaled)


@pytest.mark.parametrize("fault", [Hindsight, HindsightInCalibration])
def test_weights_and_calibrations_that_peek_are_caught(members, bars, fault):
    changed = changed_by_the_future(EnsembleForecaster(members=members, weights=fault()), bars)
    assert {"expected_return", "target_weight"} <= set(changed)


def test_a_label_is_used_only_after_it_ended(members, bars):
    """What came at the last close moves nothing that was decided at it."""
    forecaster = EnsembleForecaster(members=members, weights=SimpleEnsemble(refresh_rows=1))
    whole = forecaster.centre(bars)
    later = bars.copy()
    later.iloc[-1, :4] *= 1.2
    moved = forecaster.centre(later)
    same = ["weight_gbm", "weight_lstm", "skill_lower", "raw_scaled"]
    pd.testing.assert_frame_equal(whole[same], moved[same])


def test_alone_where_the_other_has_nothing_to_say(members, bars):
    frame = EnsembleForecaster(members=members).centre(bars)
    only = frame.iloc[260:500]
    np.testing.assert_array_equal(only["weight_gbm"], 1.0)
    np.testing.assert_array_equal(only["raw_scaled"], only["model_gbm"])
    assert frame["raw_scaled"].iloc[:260].isna().all()
    assert not frame["is_out_of_sample"].iloc[:260].any()


def test_a_row_that_one_member_was_fitted_on_is_in_sample_and_teaches_nothing(members, bars):
    @dataclass(frozen=True)
    class Fitted(Told):
        def centre(self, bars: pd.DataFrame) -> pd.DataFrame:
            return super().centre(bars).assign(is_out_of_sample=bars.index >= bars.index[900])

    mixed = {**members, "lstm": Fitted(members["lstm"].signal)}
    frame = EnsembleForecaster(members=mixed).centre(bars)
    assert frame["is_out_of_sample"].iloc[260:500].all()
    assert not frame["is_out_of_sample"].iloc[500:900].any()
    assert frame["is_out_of_sample"].iloc[900:].all()
    assert frame["weight_lstm"].iloc[500:1_000].unique() == pytest.approx(0.3)


def test_without_an_edge_nothing_has_skill_and_later_forecasts_are_the_drift(members, bars):
    last = bars.index[1_200]
    frame = EnsembleForecaster(members=members, distrusted_after=last).forecast(bars)
    assert (frame["skill_lower"] == 0).all()
    later = frame.loc[frame.index > last]
    np.testing.assert_array_equal(later["expected_log"], later["baseline_log"])
    decided = decide("AAPL", bars, EnsembleForecaster(members=members, distrusted_after=last), make_sizer())
    np.testing.assert_array_equal(decided.frame["target_weight"], 1.0)


def test_members_of_different_horizons_are_refused(members):
    with pytest.raises(ModelIncompatibleError, match="gbm 5, lstm 1"):
        EnsembleForecaster(members={**members, "lstm": Told(members["lstm"].signal, horizon_bars=1)})


META = MetaModel(
    method="stacking", centre=(0.0,) * 5, scale=(0.1,) * 5, coefficients=(0.02, 0.01, 0.0, 0.03, 0.01)
)


@pytest.fixture
def stacked(members) -> Stacked:
    return Stacked(said=0.5 * members["gbm"].signal.iloc[500:900], meta=META)


def test_a_meta_learner_speaks_where_it_has_a_record_and_after_it(members, bars, stacked):
    forecaster = EnsembleForecaster(members=members, stacked=stacked)
    assert changed_by_the_future(forecaster, bars) == []
    frame, simple = forecaster.centre(bars), EnsembleForecaster(members=members).centre(bars)
    before, inside = frame.index < stacked.said.index[0], frame.index.isin(stacked.said.index)
    np.testing.assert_array_equal(frame["raw_scaled"][before], simple["raw_scaled"][before])
    np.testing.assert_array_equal(frame["raw_scaled"][inside], stacked.said)
    after = frame.index > stacked.said.index[-1]
    signals = {name: frame[f"model_{name}"].to_numpy() for name in members}
    np.testing.assert_allclose(
        frame["raw_scaled"][after], stacked.meta.predict(meta_features(bars, signals)[after])
    )


def test_regimes_are_known_at_the_bar(members, bars):
    signals = {name: member.centre(bars)["raw_scaled"].to_numpy() for name, member in members.items()}
    whole = meta_features(bars, signals)
    for cut in (300, 800, 1_300):
        part = meta_features(bars.iloc[:cut], {name: values[:cut] for name, values in signals.items()})
        pd.testing.assert_frame_equal(part, whole.iloc[:cut])
    assert whole["storm"].between(0, 1).all()
    both = whole.dropna()
    assert (both["agreed"].abs() <= both[["gbm", "lstm"]].abs().min(axis=1)).all()
    assert (both["agreed"] != 0).equals(both["gbm"] * both["lstm"] > 0)


# What is saved.


@pytest.fixture
def bundle() -> EnsembleBundle:
    n = 40
    names = ("raw_scaled", "predicted_log", "realised_log", "sigma_log", "stacked_scaled")
    record = pd.DataFrame({name: np.linspace(0.1, 0.2, n) for name in names})
    record.insert(0, "date", pd.bdate_range("2020-01-01", periods=n).as_unit("us"))
    return EnsembleBundle(
        symbol="AAPL",
        horizon_bars=HORIZON,
        method="stacking",
        members={"gbm": "g1", "lstm": "l1"},
        weights=SimpleEnsemble(),
        record=record,
        metadata={
            "symbol": "AAPL",
            "horizon_bars": HORIZON,
            "model_version": new_version_id(datetime.now(UTC)),
            "data_hash": "0" * 64,
            "feature_set_hash": "0" * 64,
            "verdict": {"label": "no-edge"},
        },
        stacked=Stacked(said=record.set_index("date")["stacked_scaled"], meta=META),
    )


def test_a_fresh_process_loads_what_was_saved(bundle, tmp_path: Path):
    save_ensemble(bundle, tmp_path)
    loaded = load_ensemble(tmp_path, "AAPL")
    assert loaded.stacked is not None
    assert loaded.stacked.meta == bundle.stacked.meta
    pd.testing.assert_frame_equal(loaded.record, bundle.record)
    assert loaded.model_version.endswith("+gbm:g1+lstm:l1")


@pytest.fixture
def saved(bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
    first = replace(bundle, metadata={**bundle.metadata, "model_version": "20200101T000000-a"})
    save_ensemble(first, tmp_path)
    return save_ensemble(bundle, tmp_path)


@pytest.mark.parametrize("name", ["ensemble.json", "training_metadata.json", "oos_predictions.parquet"])
def test_a_damaged_version_does_not_serve_and_the_one_before_does(saved: Path, tmp_path: Path, name: str):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ModelCorruptError, match=f"{name} is not the file that was saved"):
        load_folder(saved)
    loaded = load_ensemble(tmp_path, "AAPL")
    assert loaded.metadata["model_version"] == "20200101T000000-a"
    assert "serves instead" in loaded.warnings[0]


def test_a_symbol_whose_models_were_not_joined_names_the_command(tmp_path: Path):
    with pytest.raises(ModelMissingError, match=r"python -m training\.train_ensemble MSFT"):
        load_ensemble(tmp_path, "MSFT")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "simple"}, "belongs to every method but the simple one"),
        ({"members": {"gbm": "g1"}}, "members are gbm and lstm"),
        ({"meta": {"centre": [0.0], "scale": [1.0], "coefficients": [0.1]}}, "does not have 5 columns"),
        ({"meta": {"centre": [0.0] * 5, "scale": [0.0] * 5, "coefficients": [0.1] * 5}}, "greater than 0"),
        ({"meta": {"centre": [0.0] * 5, "scale": [1.0] * 5, "coefficients": [-0.1] * 5}}, "greater than or"),
    ],
)
def test_a_document_that_makes_no_sense_is_refused(bundle, tmp_path: Path, monkeypatch, changes, words: str):
    monkeypatch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
    real = artifact.sha256_of

    def planted(contents: dict[str, bytes]) -> dict[str, str]:
        told = json.loads(contents["ensemble.json"])
        contents["ensemble.json"] = json.dumps({**told, **changes}).encode()
        return real(contents)

    monkeypatch.setattr(artifact, "sha256_of", planted)
    folder = save_ensemble(bundle, tmp_path)
    with pytest.raises(ModelCorruptError, match=words):
        load_folder(folder)


def test_a_meta_learner_that_says_something_else_here_is_refused(bundle, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(artifact, "verify_in_fresh_process", lambda *_: None)
    folder = save_ensemble(bundle, tmp_path)
    monkeypatch.setattr(MetaModel, "predict", lambda _self, features: np.ones(len(features)))
    with pytest.raises(ModelIncompatibleError, match="forecasts differently here"):
        load_folder(folder)


# Which forecaster a mode is


@pytest.fixture
def pair() -> tuple[Bundle, Bundle]:
    return bundle_of("AAPL", "g1"), bundle_of("AAPL", "l1")


@pytest.fixture
def whole(pair) -> Parts:
    gbm, lstm = pair
    ensemble = EnsembleBundle(
        symbol="AAPL",
        horizon_bars=gbm.horizon_bars,
        method="simple",
        members={"gbm": "g1", "lstm": "l1"},
        weights=SimpleEnsemble(),
        record=pd.DataFrame(
            {
                "date": pd.bdate_range("2020-01-01", periods=3),
                "raw_scaled": np.zeros(3),
                "realised_log": [0.01, 0.02, np.nan],
            }
        ),
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


def test_an_ensemble_without_an_edge_is_not_trusted_with_what_had_not_come(whole: Parts):
    ensemble = whole.ensemble
    assert ensemble is not None
    no_edge = replace(ensemble, metadata={**ensemble.metadata, "verdict": {"label": "no-edge"}})
    forecaster = forecaster_for("ensemble", replace(whole, ensemble=no_edge)).forecaster
    assert isinstance(forecaster, EnsembleForecaster)
    assert forecaster.distrusted_after == pd.Timestamp("2020-01-02")


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


def test_a_network_that_is_wanted_alone_is_never_replaced(whole: Parts):
    with pytest.raises(ModelMissingError, match="lstm"):
        forecaster_for("lstm_only", replace(whole, lstm=None))


def test_a_name_that_is_no_mode_is_refused():
    assert [mode_of(name) for name in MODES] == list(MODES)
    with pytest.raises(UsageError, match="write gbm_only, lstm_only, ensemble"):
        mode_of("oracle")
