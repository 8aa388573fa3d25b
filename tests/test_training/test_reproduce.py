"""A bundle that is trained again comes out the same, or it is said what differs."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from data.data_fetcher import make_source
from inference.load_gbm_models import BoosterEnsemble, load_folder
from training import reproduce
from training.recipe import RecipeConfig, TrainerConfig
from training.reproduce import DIFFERS, build_parser, config_of, main, train_again
from training.train_gbm import main as train
from training.trainer import Trained
from utils.base import ModelIncompatibleError

PATH = "path model of 2 bars, golden rows"


def settle(patch: pytest.MonkeyPatch, folder: Path, prices: Path) -> None:
    """Let models, logs and cache lie in ``folder``, and prices come from ``prices``."""
    for name in ("models", "logs", "cache"):
        patch.setenv(f"AI_STOCKS_{name.upper()}_DIR", str(folder / name))
    patch.setenv("AI_STOCKS_SOURCE", f"csv:{prices}")
    # What it checks is tested with the store.
    patch.setattr("inference.artifact.verify_in_fresh_process", lambda *_: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_planted) -> Path:
    folder = tmp_path_factory.mktemp("short")
    for name, seed in (("SIGNAL", 3), ("SECOND", 4), ("THIRD", 5)):
        bars = make_planted(n=1_300, seed=seed)
        bars.assign(**{"Adj Close": bars["Close"]}).to_csv(folder / f"{name}.csv", index_label="Date")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """SIGNAL's boosters for the next day, and for the day after it: on few bars, after a short search."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, folder, source)
        argv = ["SIGNAL", "--n-trials", "1", "--max-features", "10", "--target-horizon", "1,2", "--json"]
        assert train(argv) == 0
    return folder / "models" / "SIGNAL" / "gbm"


@pytest.fixture
def prices(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prices that `bundle` was trained from, free to be changed."""
    folder = shutil.copytree(source, tmp_path / source.name)
    settle(monkeypatch, tmp_path, folder)
    return folder


@pytest.fixture(scope="module")
def again(bundle: Path, source: Path) -> tuple[Trained, Mapping[str, str]]:
    return train_again(
        load_folder(bundle.resolve()), make_source(f"csv:{source}"), None, Console(stderr=True)
    )


def run(capsys, *argv: object) -> tuple[int, dict[str, dict]]:
    code = main([*map(str, argv), "--json"])
    found = capsys.readouterr().out
    return code, {finding["what"]: finding for finding in json.loads(found)} if found else {}


def listing(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def test_the_same_prices_and_recipe_give_the_same_bundle_and_nothing_is_saved(prices, bundle, capsys):
    models = bundle.parents[1]
    before = listing(models)
    assert main([str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "the training came out the same" in shown
    assert PATH in shown
    assert listing(models) == before
    assert not (prices.parent / "models").exists()


def test_later_sessions_are_cut_off(prices, bundle, capsys):
    table = pd.read_csv(prices / "SIGNAL.csv")
    sessions = pd.bdate_range(table["Date"].max(), periods=4)[1:].strftime("%Y-%m-%d")
    later = table.iloc[-3:].assign(Date=list(sessions))
    pd.concat([table, later]).to_csv(prices / "SIGNAL.csv", index=False)
    code, found = run(capsys, bundle)
    assert code == 0
    assert found["prices of SIGNAL"]["is_same"]


def test_other_prices_are_found(prices, bundle, capsys):
    """Planted: one close of the past that was revised."""
    table = pd.read_csv(prices / "SIGNAL.csv")
    for name in ("High", "Close", "Adj Close"):
        table.loc[900, name] = table.loc[900, "High"] * 1.05
    table.to_csv(prices / "SIGNAL.csv", index=False)
    code, found = run(capsys, bundle)
    assert code == DIFFERS
    for name in ("prices of SIGNAL", "out-of-sample predictions", "largest difference of predicted_log"):
        assert not found[name]["is_same"], name


@pytest.mark.usefixtures("prices")
def test_models_of_further_horizons_are_compared_too(bundle, again, capsys, monkeypatch):
    """Planted: boosters that came out otherwise."""
    monkeypatch.setattr(reproduce, "train_again", lambda *_: again)
    code, found = run(capsys, bundle)
    assert (code, found[PATH]["is_same"]) == (0, True)
    real = BoosterEnsemble.raw_scaled
    monkeypatch.setattr(BoosterEnsemble, "raw_scaled", lambda *given: real(*given) + 1e-6)
    code, found = run(capsys, bundle)
    assert (code, found[PATH]["is_same"]) == (DIFFERS, False)


@pytest.mark.usefixtures("prices")
def test_another_seed_is_found(bundle, capsys, monkeypatch):
    """Planted: a training that does not do what was recorded."""
    real = config_of

    def reseeded(recipe: dict) -> TrainerConfig:
        config = real(recipe)
        return replace(config, recipe=replace(config.recipe, seed=99))

    monkeypatch.setattr(reproduce, "config_of", reseeded)
    assert main([str(bundle)]) == DIFFERS
    shown = capsys.readouterr().out
    assert "the training differs" in shown
    assert "out-of-sample" in shown


@pytest.mark.usefixtures("prices")
def test_other_library_versions_are_told_and_do_not_count(bundle, again, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "train_again", lambda *_: again)
    monkeypatch.setattr(reproduce, "library_versions", lambda names: dict.fromkeys(names, "0.1"))
    code, found = run(capsys, bundle)
    assert code == 0
    told = found["version of xgboost"]
    assert (told["now"], told["is_same"], told["counts"]) == ("0.1", False, False)


@pytest.mark.usefixtures("prices")
def test_a_pooled_bundle_is_trained_again_on_its_panel(capsys):
    argv = ["SIGNAL", "--universe", "SECOND,THIRD", "--leave-symbol-out", "--target-horizon", "1", "--json"]
    assert train(argv) == 0
    folder = Path(json.loads(capsys.readouterr().out)[0]["bundle"])
    code, found = run(capsys, folder)
    assert code == 0, [name for name, finding in found.items() if not finding["is_same"]]
    assert {"prices of SIGNAL", "prices of SECOND", "prices of THIRD"} <= set(found)


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


@pytest.mark.usefixtures("prices")
def test_errors_name_the_remedy(bundle, capsys, monkeypatch):
    assert main(["no/such/bundle"]) == 5
    assert "saved_models/SYMBOL/gbm" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setenv("AI_STOCKS_SOURCE", "sample")
    assert main([str(bundle)]) == 2
    assert "--source csv:DIR" in capsys.readouterr().err.replace("\n", " ")


def test_the_parser_knows_its_flags():
    args = build_parser().parse_args(["saved_models/AAPL/gbm", "--source", "sample", "--no-cache", "--json"])
    assert args.bundle == Path("saved_models/AAPL/gbm")


@pytest.mark.parametrize("kind", ["lstm", "ensemble"])
def test_boosters_alone_are_trained_again(tmp_path, capsys, kind):
    (tmp_path / "AAPL" / f"{kind}_versions" / "one").mkdir(parents=True)
    (tmp_path / "AAPL" / kind).symlink_to(f"{kind}_versions/one")
    for given in (kind, f"{kind}_versions/one"):
        assert main([str(tmp_path / "AAPL" / given)]) == 2
        said = capsys.readouterr().err
        assert "boosters alone are trained again here, give a gbm folder" in said.replace("\n", " ")
        assert "overwrite" not in said
