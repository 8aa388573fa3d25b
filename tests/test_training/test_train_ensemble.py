"""Joining two models: what is learned one level up, what is believed, what the command leaves behind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.data_fetcher import CsvSource, fetch_stock_data
from data.data_splitter import WalkForwardSplit
from data.schema import Bars
from inference.ensemble import EnsembleBundle, load_ensemble, save_ensemble
from inference.load_gbm_models import GBMBundle, load_bundle
from inference.pipeline import decide
from inference.position_sizing import make_sizer
from training import train_ensemble
from training.train_ensemble import (
    CommonRows,
    EnsembleTrainer,
    MetaConfig,
    build_parser,
    compare,
    fit_meta,
    main,
    walk_meta,
)
from utils.base import InsufficientDataError, ModelError, ModelIncompatibleError


def network_like(bundle: GBMBundle, *, skill: float, seed: int = 1) -> GBMBundle:
    """Return a bundle whose record holds another signal, which correlates so much with what came."""
    record, rng = bundle.record.copy(), np.random.default_rng(seed)
    came = (record["realised_log"] / record["sigma_log"]).fillna(0.0)
    noise = np.sqrt(1 - skill**2) * rng.normal(size=len(record))
    record["raw_scaled"] = 0.1 * (skill * came + noise)
    metadata = {**bundle.metadata, "model_version": f"20260101T000000000000-lstm{seed:04d}"}
    return replace(bundle, record=record, metadata=metadata)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path) -> dict[str, GBMBundle]:
    return {name: load_bundle(tiny_bundle, name) for name in ("SIGNAL", "NOISE")}


@pytest.fixture(scope="module")
def bars(csv_dir: Path) -> dict[str, Bars]:
    source = CsvSource(csv_dir)
    return {name: fetch_stock_data(name, source=source, cache=None) for name in ("SIGNAL", "NOISE")}


@pytest.fixture
def places(tmp_path: Path, csv_dir: Path, bundles, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Boosters of SIGNAL and NOISE, and a network of each that knows a little more."""
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
    monkeypatch.setattr("inference.artifact.verify_in_fresh_process", lambda *_: None)
    networks = {name: network_like(one, skill=0.15) for name, one in bundles.items()}
    monkeypatch.setattr(train_ensemble, "load_bundle", lambda _dir, symbol: bundles[symbol])
    monkeypatch.setattr(train_ensemble, "load_lstm", lambda _dir, symbol: networks[symbol])
    return tmp_path


def part(bundle: EnsembleBundle, name: str) -> dict[str, float]:
    return next(one for one in bundle.metadata["parts"]["table"] if one["part"] == name)


# What comes out.


def test_what_the_network_knows_and_the_boosters_lack_makes_the_whole_better(bundles, bars):
    gbm = bundles["SIGNAL"]
    bundle = EnsembleTrainer(gbm, network_like(gbm, skill=0.15), method="simple").train(bars["SIGNAL"])
    whole, boosters = part(bundle, "ensemble"), part(bundle, "gbm")
    assert whole["ic"] > boosters["ic"] + 0.02
    assert bundle.metadata["parts"]["weights"]["lstm"] > 0.3
    assert whole["n_rows"] == boosters["n_rows"]
    assert bundle.metadata["verdict"]["label"] == "edge"


def test_a_network_of_noise_is_hardly_listened_to_and_one_that_is_wrong_not_at_all(bundles, bars):
    gbm = bundles["SIGNAL"]
    found = {
        skill: EnsembleTrainer(gbm, network_like(gbm, skill=skill), method="simple").train(bars["SIGNAL"])
        for skill in (0.0, -0.15)
    }
    # A thousand rows move it half of the way from .3 to nothing.
    assert found[0.0].metadata["parts"]["weights"]["lstm"] < 0.2
    wrong = found[-0.15].metadata["parts"]
    assert wrong["weights"] == {"gbm": 1.0, "lstm": 0.0}
    assert any("the weight of lstm is zero" in note for note in wrong["notes"])
    for bundle in found.values():
        assert part(bundle, "ensemble")["ic"] > part(bundle, "gbm")["ic"] - 0.02


def test_two_members_of_noise_have_no_edge_and_positions_stay_passive(bundles, bars):
    gbm = bundles["NOISE"]
    network = network_like(gbm, skill=0.0)
    bundle = EnsembleTrainer(gbm, network).train(bars["NOISE"])
    assert bundle.metadata["verdict"]["label"] == "no-edge"
    decided = decide("NOISE", bars["NOISE"].frame, bundle.join(gbm, network), make_sizer())
    np.testing.assert_array_equal(decided.frame["target_weight"], 1.0)


def test_members_that_never_forecast_the_same_rows_cannot_be_joined(bundles, bars):
    gbm = bundles["SIGNAL"]
    network = network_like(gbm, skill=0.1)
    with pytest.raises(InsufficientDataError, match="share 200 out-of-sample forecasts"):
        EnsembleTrainer(gbm, replace(network, record=network.record.iloc[-200:])).train(bars["SIGNAL"])
    with pytest.raises(ModelIncompatibleError, match="gbm 1, lstm 5"):
        EnsembleTrainer(gbm, replace(network, horizon_bars=5)).train(bars["SIGNAL"])


# One level up.


def common(n: int = 2_500, *, seed: int = 0, calm: float = 0.1, storm: float = 0.1) -> CommonRows:
    """Return rows on which the network knows the outcome in calm and in storm as well as is asked."""
    rng = np.random.default_rng(seed)
    index = pd.bdate_range("2000-01-03", periods=n)
    outcome, weather = rng.normal(size=n), np.repeat(rng.random(n // 50 + 1), 50)[:n]
    skill = np.where(weather > 0.5, storm, calm)
    gbm, lstm = 0.1 * rng.normal(size=n), 0.1 * (skill * outcome + rng.normal(size=n))
    features = pd.DataFrame({"gbm": gbm, "lstm": lstm, "storm": weather, "trend": 0.0}, index=index)
    for name, signal in (("gbm", gbm), ("lstm", lstm)):
        features[f"{name}_calm"], features[f"{name}_storm"] = signal * (1 - weather), signal * weather
    features["agreed"] = np.where(gbm * lstm > 0, np.sign(gbm) * np.minimum(np.abs(gbm), np.abs(lstm)), 0.0)
    date = index.to_numpy().astype("datetime64[D]")
    label_end = np.append(date[1:], np.datetime64("NaT"))
    known = np.append(outcome[:-1], np.nan)
    return CommonRows(
        features=features,
        simple=0.7 * gbm + 0.3 * lstm,
        outcome=known,
        date=date,
        label_end=label_end,
        horizon_bars=1,
    )


@pytest.mark.parametrize("method", ["stacking", "xgb-meta"])
def test_what_is_said_of_a_row_does_not_depend_on_what_came_of_it_or_later(method):
    rows = common(1_500)
    said = walk_meta(method, rows, MetaConfig())
    start = len(rows.outcome) - len(said) + 600
    changed = rows.outcome.copy()
    changed[start:] = -changed[start:]
    again = walk_meta(method, replace(rows, outcome=changed), MetaConfig())
    before = said.index <= rows.features.index[start]
    pd.testing.assert_series_equal(said[before], again[before])
    assert not said.equals(again)


class OwnRows(WalkForwardSplit):
    """A planted fault: the rows that are scored are learned from, too."""

    def folds(self, date, label_end, *, horizon_bars):
        folds = super().folds(date, label_end, horizon_bars=horizon_bars)
        return [
            replace(one, train_idx=np.concatenate([one.train_idx, one.test_idx[:-horizon_bars]]))
            for one in folds
        ]


class NoPurge(WalkForwardSplit):
    """A planted fault: the last label to learn from ends with the first row that is scored."""

    def folds(self, date, label_end, *, horizon_bars):
        folds = super().folds(date, label_end, horizon_bars=horizon_bars)
        return [replace(one, train_idx=np.arange(one.test_idx[0])) for one in folds]


@pytest.mark.parametrize("fault", [OwnRows, NoPurge])
def test_a_meta_learner_that_scores_its_own_rows_is_caught(fault):
    planted = MetaConfig(walk_forward=fault(test_bars=126, min_train_bars=504))
    with pytest.raises(ModelError, match="labels to learn from end in or after the rows that are scored"):
        walk_meta("stacking", common(), planted)


def test_a_meta_learner_stands_where_it_wins():
    """The simple ensemble listens to boosters of noise; the network knows, in storms alone."""
    rows = common(seed=1, calm=0.0, storm=0.4)
    for method in ("stacking", "xgb-meta"):
        found = compare(method, walk_meta(method, rows, MetaConfig()), rows, MetaConfig())
        assert found["is_kept"], found["words"]
        assert found["ic"] > found["simple_ic"]
        assert "it stands" in found["words"]


@pytest.mark.parametrize(("method", "seeds"), [("stacking", 30), ("xgb-meta", 12)])
def test_a_meta_learner_of_noise_rarely_stands(method, seeds):
    config, kept = MetaConfig(), 0
    for seed in range(seeds):
        rows = common(1_000, seed=seed, calm=0.0, storm=0.0)
        kept += compare(method, walk_meta(method, rows, config), rows, config)["is_kept"]
    # At 5 % more than four of thirty, or three of twelve, come in one or two of 100 runs.
    assert kept <= (4 if seeds == 30 else 3)


def test_no_member_is_ever_turned_around():
    rows = common(calm=-0.3, storm=-0.3)
    known = np.isfinite(rows.outcome)
    meta = fit_meta("stacking", rows.features[known], rows.outcome[known], MetaConfig())
    assert min(meta.coefficients) == 0.0
    assert meta.coefficients[2:4] == (0.0, 0.0)


# What the command does.


def test_the_command_leaves_an_ensemble_a_report_and_one_json_on_stdout(places: Path, capsys, bundles):
    assert main(["signal", "--method", "stacking", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[0]
    assert result["asked"] == "stacking"
    assert result["verdict"] in {"edge", "no-edge"}
    assert [one["part"] for one in result["parts"]["table"]] == ["ensemble", "gbm", "lstm"]
    told = [note for note in result["parts"]["notes"] if "rows that it was not fitted on" in note]
    assert ("it stands" in told[0]) == (result["method"] == "stacking")
    page = Path(result["report"]).read_text()
    assert "The parts beside the whole" in page
    assert "Who was listened to" in page
    log = Path(result["log"]).read_text()
    assert Path(result["log"]).name.startswith("SIGNAL_ensemble_")
    assert "method: stacking" in log
    assert "weights.gbm: " in log
    assert "table.lstm.ic: " in log
    assert "[{" not in log
    assert f"model_version: {result['model_version']}" in log
    assert f"=== STATUS ===\n{result['status']}\n" in log
    saved = load_ensemble(places / "models", "SIGNAL")
    assert bundles["SIGNAL"].model_version in saved.model_version
    assert "lstm0001" in saved.model_version
    assert main(["SIGNAL"]) == 6
    assert "--overwrite" in capsys.readouterr().err
    assert main(["SIGNAL", "--overwrite"]) == 0
    assert "weights at the last session, by what" in capsys.readouterr().out


def test_a_meta_learner_beside_the_simple_one_is_two_tries_and_a_repetition_is_none(places: Path, capsys):
    assert build_parser().parse_args(["NOISE"]).method == "simple"
    for method, tries in (("simple", 1), ("simple", 1), ("stacking", 3), ("simple", 3)):
        assert main(["NOISE", "--method", method, "--validate-only", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["evidence"]["n_trials"] == tries
    assert not (places / "models" / "NOISE" / "ensemble").exists()


def test_an_edge_hands_its_limits_on_and_noise_has_none_to_hand_on(places: Path, capsys):
    for symbol, label, shares in (("SIGNAL", "edge", (1.0, 1.0)), ("NOISE", "no-edge", (1.0, 0.25))):
        for seed, share in zip(("7", "8"), shares, strict=True):
            assert main([symbol, "--seed", seed, "--validate-only", "--json"]) == 0
            found = json.loads(capsys.readouterr().out)[0]
            assert found["verdict"] == label
            assert found["evidence"]["limits_share"] == share
        assert [one["label"] for one in found["tries"]] == [label]


def test_a_strict_run_saves_nothing_without_an_edge(places: Path, capsys, monkeypatch, bundles):
    monkeypatch.setattr(
        train_ensemble, "load_lstm", lambda _dir, symbol: network_like(bundles[symbol], skill=0.0)
    )
    assert main(["NOISE", "--strict"]) == 7
    assert "nothing was saved" in " ".join(capsys.readouterr().err.split())
    assert not (places / "models" / "NOISE" / "ensemble").exists()
    told = max((places / "logs").glob("NOISE_ensemble_*.log")).read_text()
    assert "=== STATUS ===\nNO_EDGE\n" in told
    assert "refused:" in told


def test_a_missing_member_names_the_command_that_makes_it(places: Path, capsys, monkeypatch, bundles):
    monkeypatch.undo()
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(places / name))
    assert main(["SIGNAL"]) == 5
    told = " ".join(capsys.readouterr().err.split())
    assert "no gbm model of SIGNAL: run `python -m training.train_gbm SIGNAL`" in told
    monkeypatch.setattr(train_ensemble, "load_bundle", lambda _dir, symbol: bundles[symbol])
    assert main(["SIGNAL"]) == 5
    told = " ".join(capsys.readouterr().err.split())
    assert "no lstm model of SIGNAL: run `python -m training.train_lstm SIGNAL`" in told
    assert main(["SIGNAL", "--source", "csv:my prices"]) == 5
    told = " ".join(capsys.readouterr().err.split())
    assert "run `python -m training.train_lstm SIGNAL --source 'csv:my prices'`" in told
    assert not list((places / "models").glob("[A-Z]*/ensemble"))


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["../x"], 2, "not a symbol"),
        (["SIGNAL", "--source", "nowhere"], 2, "csv:DIR"),
    ],
)
def test_errors_name_the_remedy(places: Path, capsys, argv: list[str], code: int, words: str):
    assert main(argv) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown


# What is saved.


@pytest.fixture
def joined(bundles, bars) -> Callable[[str], tuple[EnsembleBundle, GBMBundle]]:
    def join(method: str) -> tuple[EnsembleBundle, GBMBundle]:
        network = network_like(bundles["SIGNAL"], skill=0.15)
        config = MetaConfig(max_p=1.0)
        trainer = EnsembleTrainer(bundles["SIGNAL"], network, method=method, config=config)
        return trainer.train(bars["SIGNAL"]), network

    return join


@pytest.mark.parametrize("method", ["simple", "stacking", "xgb-meta"])
def test_what_is_loaded_forecasts_what_was_saved(places: Path, joined, bundles, bars, method: str):
    bundle, network = joined(method)
    assert bundle.method == method
    save_ensemble(bundle, places / "models")
    loaded = load_ensemble(places / "models", "SIGNAL")
    frame = bars["SIGNAL"].frame
    first, second = (one.join(bundles["SIGNAL"], network).forecast(frame) for one in (bundle, loaded))
    pd.testing.assert_frame_equal(first, second)
    assert loaded.model_version == bundle.model_version
    for t in (900, 1_400, 1_999):
        cut = loaded.join(bundles["SIGNAL"], network).forecast(frame.iloc[: t + 1])
        pd.testing.assert_series_equal(cut.iloc[-1], second.iloc[t], rtol=1e-12)
