"""A bundle that is trained again comes out the same, or it is said what differs."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest

from training import reproduce
from training.recipe import RecipeConfig, TrainerConfig
from training.reproduce import DIFFERS, build_parser, config_of, main
from training.train_gbm import main as train
from utils.errors import ModelIncompatibleError


@pytest.fixture
def prices(tmp_path: Path, csv_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prices that `tiny_bundle` was trained from, free to be changed."""
    folder = tmp_path / csv_dir.name
    shutil.copytree(csv_dir, folder)
    for name in ("models", "logs", "cache"):
        monkeypatch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{folder}")
    return folder


def run(capsys, *argv: object) -> tuple[int, dict[str, dict]]:
    code = main([*map(str, argv), "--json"])
    found = capsys.readouterr().out
    return code, {finding["what"]: finding for finding in json.loads(found)} if found else {}


def listing(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_same_prices_and_recipe_give_the_same_bundle_and_nothing_is_saved(prices, tiny_bundle, capsys):
    before = listing(tiny_bundle)
    assert main([str(tiny_bundle / "SIGNAL" / "gbm")]) == 0
    assert "the training came out the same" in capsys.readouterr().out
    assert listing(tiny_bundle) == before
    assert not (prices.parent / "models").exists()


def test_later_sessions_are_cut_off(prices, tiny_bundle, capsys):
    table = pd.read_csv(prices / "SIGNAL.csv")
    later = table.iloc[-3:].assign(Date=["2003-01-06", "2003-01-07", "2003-01-08"])
    assert table["Date"].max() < "2003-01-06"
    pd.concat([table, later]).to_csv(prices / "SIGNAL.csv", index=False)
    code, found = run(capsys, tiny_bundle / "SIGNAL" / "gbm")
    assert code == 0
    assert found["prices of SIGNAL"]["is_same"]


def test_other_prices_are_found(prices, tiny_bundle, capsys):
    """Planted: one close of the past that was revised."""
    table = pd.read_csv(prices / "SIGNAL.csv")
    for name in ("High", "Close", "Adj Close"):
        table.loc[900, name] = table.loc[900, "High"] * 1.05
    table.to_csv(prices / "SIGNAL.csv", index=False)
    code, found = run(capsys, tiny_bundle / "SIGNAL" / "gbm")
    assert code == DIFFERS
    for name in ("prices of SIGNAL", "out-of-sample predictions", "largest difference of predicted_log"):
        assert not found[name]["is_same"], name


def test_models_of_further_horizons_are_compared_too(prices, capsys, monkeypatch):
    monkeypatch.setattr("inference.artifact.verify_in_fresh_process", lambda *_: None)
    argv = ["SIGNAL", "--n-trials", "0", "--max-features", "10", "--target-horizon", "1,20", "--json"]
    assert train(argv) == 0
    saved = Path(json.loads(capsys.readouterr().out)[0]["bundle"])
    name = "path model of 20 bars, golden rows"
    code, found = run(capsys, saved)
    assert (code, found[name]["is_same"]) == (0, True)
    # Planted: boosters that came out otherwise.
    real = reproduce.golden_outputs
    monkeypatch.setattr(reproduce, "golden_outputs", lambda *given: real(*given) + 1e-6)
    code, found = run(capsys, saved)
    assert (code, found[name]["is_same"]) == (DIFFERS, False)


def test_another_seed_is_found(prices, tiny_bundle, capsys, monkeypatch):
    """Planted: a training that does not do what was recorded."""
    real = config_of

    def reseeded(recipe: dict) -> TrainerConfig:
        config = real(recipe)
        return replace(config, recipe=replace(config.recipe, seed=99))

    monkeypatch.setattr(reproduce, "config_of", reseeded)
    assert main([str(tiny_bundle / "SIGNAL" / "gbm")]) == DIFFERS
    shown = capsys.readouterr().out
    assert "the training differs" in shown
    assert "out-of-sample" in shown


def test_other_library_versions_are_told_and_do_not_count(prices, tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "library_versions", lambda names: dict.fromkeys(names, "0.1"))
    code, found = run(capsys, tiny_bundle / "SIGNAL" / "gbm")
    assert code == 0
    assert found["version of xgboost"] == {
        **found["version of xgboost"],
        "now": "0.1",
        "is_same": False,
        "counts": False,
    }


def test_a_pooled_bundle_is_trained_again_on_its_panel(prices, make_planted, capsys):
    bars = make_planted(seed=5, ic=0.2)
    bars.assign(**{"Adj Close": bars["Close"]}).to_csv(prices / "THIRD.csv", index_label="Date")
    argv = ["SIGNAL", "--universe", "NOISE,THIRD", "--leave-symbol-out", "--target-horizon", "1", "--json"]
    assert train(argv) == 0
    folder = Path(json.loads(capsys.readouterr().out)[0]["bundle"])
    code, found = run(capsys, folder)
    assert code == 0, [name for name, finding in found.items() if not finding["is_same"]]
    assert {"prices of SIGNAL", "prices of NOISE", "prices of THIRD"} <= set(found)


def test_the_recipe_survives_json():
    config = TrainerConfig(horizon_bars=3, recipe=RecipeConfig(leave_out=("A",), seed=11))
    assert config_of(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("change", ["more", "fewer", "wrong"])
def test_a_recipe_of_another_version_is_refused_by_name(change):
    """Planted: a parameter that is not known here, one that was not known then, one that makes no sense."""
    recipe = json.loads(json.dumps(asdict(TrainerConfig())))
    if change == "more":
        recipe["recipe"]["moon_phase"] = 3
    elif change == "fewer":
        del recipe["recipe"]["max_features"]
    else:
        recipe["recipe"]["max_features"] = "many"
    with pytest.raises(ModelIncompatibleError, match="moon_phase" if change == "more" else "max_features"):
        config_of(recipe)


def test_errors_name_the_remedy(prices, tiny_bundle, capsys, monkeypatch):
    assert main(["no/such/bundle"]) == 5
    assert "saved_models/SYMBOL/gbm" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv("AI_STOCKS_SOURCE", "sample")
    assert main([str(tiny_bundle / "SIGNAL" / "gbm")]) == 2
    assert "--source csv:DIR" in capsys.readouterr().err.replace("\n", " ")


def test_the_parser_knows_its_flags():
    args = build_parser().parse_args(["saved_models/AAPL/gbm", "--source", "sample", "--no-cache", "--json"])
    assert args.bundle == Path("saved_models/AAPL/gbm")


def test_a_network_is_not_what_it_trains_again(tmp_path, capsys):
    (tmp_path / "AAPL" / "lstm_versions" / "one").mkdir(parents=True)
    (tmp_path / "AAPL" / "lstm").symlink_to("lstm_versions/one")
    assert main([str(tmp_path / "AAPL" / "lstm")]) == 2
    assert "boosters alone" in capsys.readouterr().err
