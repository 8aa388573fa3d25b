"""The backtest as a person meets it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from inference.position_sizing import PRESETS
from run_backtest import main
from validation.wfe_metrics import Run, record_run


@pytest.fixture
def places(tmp_path: Path, csv_dir: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AI_STOCKS_MODELS_DIR", str(tiny_bundle))
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AI_STOCKS_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
    return tmp_path / "results"


EVIDENCE = {
    "n_tries",
    "deflated_sharpe",
    "deflated_sharpe_active",
    "minimum_track_record_bars",
    "pbo",
    "out_of_sample_share",
    "band_coverage",
    "brier_skill",
}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_files_are_written_and_agree(places: Path, capsys):
    summary = run(capsys, "--symbol", "SIGNAL")
    (folder,) = places.iterdir()
    assert folder.name.startswith("SIGNAL_")
    assert {path.name for path in folder.iterdir()} == {
        "summary.json",
        "metrics.json",
        "daily_results.csv",
        "trade_log.csv",
        "equity_comparison.csv",
        "report.html",
    }
    daily = pd.read_csv(folder / "daily_results.csv", index_col="date", parse_dates=True)
    assert daily["is_out_of_sample"].all()
    assert summary["n_days"] == len(daily)
    assert summary["start"] == summary["out_of_sample_from"] == f"{daily.index[0]:%Y-%m-%d}"
    earned = daily["equity"].iloc[-1] / daily["equity"].iloc[0] - 1
    assert summary["strategy_return"] == pytest.approx(earned)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"strategy", "buy_hold", "exposure_matched", "volatility_matched"} <= set(metrics)
    assert metrics["strategy"]["total_return"] == summary["strategy_return"]


def test_two_runs_give_the_same_numbers(places: Path, capsys):
    first, second = (run(capsys, "--symbol", "SIGNAL") for _ in range(2))
    places_apart = {"report", "files"}
    assert {k: v for k, v in first.items() if k not in places_apart} == {
        k: v for k, v in second.items() if k not in places_apart
    }


def test_a_planted_edge_beats_its_own_exposure_and_noise_stays_passive(places: Path, capsys):
    signal, noise = run(capsys, "--symbol", "SIGNAL"), run(capsys, "--symbol", "NOISE")
    assert signal["strategy_return"] > signal["exposure_matched_return"]
    assert noise["verdict"] == "no-edge"
    assert noise["turnover"] < signal["turnover"]


def test_a_window_is_cut_from_the_same_decisions(places: Path, capsys):
    whole, part = (
        run(capsys, "--symbol", "SIGNAL"),
        run(capsys, "--symbol", "SIGNAL", "--start", "2001-01-01", "--end", "2001-12-31"),
    )
    assert part["start"] >= "2001-01-01" > whole["start"]
    assert part["end"] <= "2001-12-31"
    tables = [
        pd.read_csv(next(iter(sorted(places.iterdir())[i].glob("daily*"))), index_col="date") for i in (0, 1)
    ]
    target = tables[0].loc[tables[1].index, "target_weight"]
    pd.testing.assert_series_equal(target, tables[1]["target_weight"])


def test_prices_of_another_source_are_named(places: Path, capsys, csv_dir: Path, tmp_path: Path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "SIGNAL.csv").write_bytes((csv_dir / "SIGNAL.csv").read_bytes())
    assert not [
        note for note in run(capsys, "--symbol", "SIGNAL")["notes"] if "no verdict was earned" in note
    ]
    summary = run(capsys, "--symbol", "SIGNAL", "--source", f"csv:{other}")
    assert [note for note in summary["notes"] if "no verdict was earned" in note]
    assert summary["trained_on"] != summary["judged_on"]
    assert "no verdict was earned" in Path(summary["report"]).read_text()


def test_in_sample_rows_are_stamped_everywhere(places: Path, capsys):
    summary = run(capsys, "--symbol", "SIGNAL", "--in-sample")
    assert summary["in_sample"] is True
    assert any("IN-SAMPLE" in note for note in summary["notes"])
    assert "IN-SAMPLE" in Path(summary["report"]).read_text()
    assert main(["--symbol", "SIGNAL", "--in-sample"]) == 0
    assert "IN-SAMPLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--symbol", "MSFT"], 5, "python -m training.train_gbm MSFT"),
        (["--symbol", "../x"], 2, "not a symbol"),
        (["--symbol", "SIGNAL", "--start", "2002-01-01", "--end", "2001-01-01"], 2, "before"),
        (["--symbol", "SIGNAL", "--end", "1996-01-01"], 4, "out of sample from"),
        (["--symbol", "SIGNAL", "--start", "2090-01-01"], 4, "out of sample from"),
        (["--symbol", "SIGNAL", "--commission", "-1"], 2, "commission"),
        (["--symbol", "SIGNAL", "--capital", "0"], 2, "capital"),
        (["--symbol", "SIGNAL", "--max-long", "nan"], 2, "max_long"),
        (["--symbol", "MSFT", "--capital", "0"], 2, "--capital"),  # noticed before the model is looked for
        (["--symbol", "MSFT", "--max-long", "50"], 2, "over 5 times equity"),
        (["--symbol", "MSFT", "--max-short", "6"], 2, "over 5 times equity"),
        (["--symbol", "A", "--start", "2012-01-01", "--end", "2011-01-01"], 2, "2012-01-01 does not lie"),
    ],
)
def test_errors_name_the_remedy_and_write_nothing(
    places: Path, capsys, argv: list[str], code: int, words: str
):
    assert main(argv) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert not places.exists()


def test_a_date_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--symbol", "AAPL", "--start", "yesterday"])
    assert "YYYY-MM-DD" in capsys.readouterr().err


def test_the_summary_holds_what_was_promised(places: Path, capsys):
    summary = run(capsys, "--symbol", "SIGNAL")
    promised = (
        "symbol start end mode n_days strategy_return buy_hold_return alpha sharpe_ratio max_drawdown "
        "win_rate direction_accuracy prediction_std pred_positive_pct turnover total_transaction_costs "
        "cost_adjusted_sharpe"
    )
    assert set(promised.split()) | EVIDENCE <= set(summary)
    assert summary["mode"] == "gbm_only"
    assert summary["out_of_sample_share"] == 1.0
    assert (
        summary["intervals"]["sharpe_difference"]["low"] < summary["intervals"]["sharpe_difference"]["high"]
    )
    assert 0.0 <= summary["pbo"] <= 1.0


def test_without_an_edge_the_banner_says_what_the_sizing_does(places: Path, capsys):
    geared, passive = (run(capsys, "--symbol", "NOISE", "--sizing", s) for s in ("long-biased", "calibrated"))
    pages = [Path(told["report"]).read_text() for told in (geared, passive)]
    assert ["The position is the passive one" in page for page in pages] == [False, True]
    assert "leverage and the breaker" in pages[0].split("<dl")[0]
    assert ["leverage and the breaker" in str(told["notes"]) for told in (geared, passive)] == [True, False]


def test_the_first_interval_is_over_equal_exposure(places: Path, capsys):
    told = run(capsys, "--symbol", "SIGNAL")
    name, span = next(iter(told["intervals"].items()))
    assert name == "active_return"
    rivals = json.loads((Path(told["files"]) / "metrics.json").read_text())
    assert span["value"] == pytest.approx(rivals["strategy"]["cagr"] - rivals["exposure_matched"]["cagr"])
    assert 0.0 < span["low"] < span["value"] < span["high"]
    assert span["share_above_zero"] > 0.95
    page = Path(told["report"]).read_text()
    assert page.index("Return a year over equal exposure<") < page.index("Sharpe ratio over buy and hold<")
    assert "resamples" not in page


def test_verdicts_recorded_since_the_training_count(
    places: Path, capsys, tiny_bundle: Path, tmp_path, monkeypatch
):
    models = tmp_path / "models"
    shutil.copytree(tiny_bundle, models, symlinks=True)
    monkeypatch.setenv("AI_STOCKS_MODELS_DIR", str(models))
    own = run(capsys, "--symbol", "SIGNAL")["n_tries"]
    log = models / "trials.jsonl"
    later = Run(symbol="SIGNAL", first_session="1995-01-03", last_session="2030-01-01", fingerprint="x")
    record_run(log, later, replace(later, fingerprint="y", n_trials=2), replace(later, symbol="NOISE"))
    counted = run(capsys, "--symbol", "SIGNAL")["n_tries"]
    assert counted == own + 3 * len(PRESETS)
    assert isinstance(counted, int)
    log.unlink()
    assert run(capsys, "--symbol", "SIGNAL")["n_tries"] == own


def test_the_evidence_tells_a_planted_edge_from_noise(places: Path, capsys):
    signal, noise = (run(capsys, "--symbol", name)["intervals"] for name in ("SIGNAL", "NOISE"))
    assert signal["sharpe_difference"]["low"] > 0.0
    assert noise["sharpe_difference"]["low"] <= 0.0


def test_the_trade_log_says_when_why_and_what_for(places: Path, capsys):
    folder = Path(run(capsys, "--symbol", "SIGNAL", "--sizing", "half-kelly")["files"])
    trades = pd.read_csv(folder / "trade_log.csv")
    assert {"entry_date", "exit_date", "pnl", "reason"} <= set(trades)
    assert trades["reason"].notna().all()
    closed = trades[trades["exit_date"].notna()]
    assert (closed["exit_date"] >= closed["entry_date"]).all()
    assert closed["cumulative_pnl"].iloc[-1] == pytest.approx(closed["pnl"].sum())


def test_figures_by_year_and_regime_are_on_file(places: Path, capsys):
    folder = Path(run(capsys, "--symbol", "SIGNAL", "--no-report")["files"])
    assert not (folder / "report.html").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [regime["period"] for regime in metrics["by_regime"]] == ["Calm", "Middle", "Stormy"]
    assert len(metrics["by_year"]) >= 2
    assert set(metrics["evidence"]) >= EVIDENCE | {"intervals", "robustness"}


def test_robustness_runs_windows_times_costs_times_seeds(places: Path, capsys):
    summary = run(capsys, "--symbol", "SIGNAL", "--robustness")
    cells = json.loads((Path(summary["files"]) / "robustness.json").read_text())
    assert len(cells) == len({(c["window"], c["cost_multiple"], c["seed"]) for c in cells})
    headline = [c for c in cells if (c["window"], c["cost_multiple"], c["seed"]) == ("whole", 1.0, 0)]
    assert headline[0]["sharpe"] == pytest.approx(summary["sharpe_ratio"], rel=1e-12)
    assert {c["seed"] for c in cells} == set(range(21))
    page = Path(summary["report"]).read_text()
    assert "Other windows, other costs" in page
    assert "Probability of overfitting" in page
    assert "{" not in page.split("<body>")[1].replace("{{", "")
    assert main(["--symbol", "SIGNAL", "--robustness", "--no-report"]) == 0
    assert "Other windows, other costs" in capsys.readouterr().out


def test_symbols_are_set_side_by_side(places: Path, capsys, tmp_path: Path):
    target = tmp_path / "beside.html"
    told = run(capsys, "--symbols", "SIGNAL,NOISE,signal", "--compare", "--report", str(target))
    assert [record["symbol"] for record in told["comparison"]] == ["SIGNAL", "NOISE"]
    assert told["report"] == str(target)
    page = target.read_text()
    assert "SIGNAL" in page
    assert "over equal exposure" in page
    records = json.loads((Path(told["files"]) / "comparison.json").read_text())
    assert records == told["comparison"]
    alone = {name: run(capsys, "--symbol", name, "--no-report") for name in ("SIGNAL", "NOISE")}
    for record in records:
        assert record["sharpe_ratio"] == alone[record["symbol"]]["sharpe_ratio"]
    assert not list(places.glob("SIGNAL_*/report.html"))
    assert main(["--symbols", "SIGNAL,NOISE", "--compare", "--no-report"]) == 0
    assert "of buy and hold" in capsys.readouterr().out


def test_an_in_sample_row_stamps_the_comparison(places: Path, capsys):
    told = run(capsys, "--symbols", "SIGNAL,NOISE", "--compare", "--in-sample")
    assert all(record["in_sample"] for record in told["comparison"])
    page = Path(told["report"]).read_text()
    assert "In-sample rows included." in page
    assert page.count("IN-SAMPLE") > 3
    assert (
        "In-sample" not in Path(run(capsys, "--symbols", "SIGNAL,NOISE", "--compare")["report"]).read_text()
    )


def test_symbols_without_comparison_get_a_report_each(places: Path, capsys):
    told = run(capsys, "--symbols", "SIGNAL,NOISE")
    assert [Path(result["report"]).is_file() for result in told["results"]] == [True, True]
    assert "comparison" not in told


@pytest.mark.parametrize("sizing", ["calibrated", "long-biased"])
def test_days_lived_again_are_the_days_booked(places: Path, capsys, sizing: str):
    argv = ["--symbol", "SIGNAL", "--sizing", sizing, "--no-report", "--forward-sim", "--days", "12"]
    summary = run(capsys, *argv)
    assert summary["forward_sim"]["days"] == 12
    assert summary["forward_sim"]["largest_gap"] <= 1e-12
    lived = pd.read_csv(Path(summary["files"]) / "forward_sim.csv", index_col="date")
    booked = pd.read_csv(Path(summary["files"]) / "daily_results.csv", index_col="date")
    assert len(lived) == 13
    pd.testing.assert_series_equal(lived["target_weight"], booked.loc[lived.index, "target_weight"])
    assert main(argv) == 0
    assert "lived bar by bar" in capsys.readouterr().out


def test_a_forecaster_that_peeks_is_found_out_by_living(places: Path, capsys, monkeypatch):
    from inference.pipeline import BundleForecaster

    honest = BundleForecaster.forecast

    def peeks(self: BundleForecaster, bars: pd.DataFrame) -> pd.DataFrame:
        frame = honest(self, bars)
        ahead = bars["Close"].shift(-1) / bars["Close"] - 1.0
        return frame.assign(expected_return=ahead.fillna(0.0), skill_lower=1.0)

    monkeypatch.setattr(BundleForecaster, "forecast", peeks)
    assert main(["--symbol", "SIGNAL", "--forward-sim", "--days", "5"]) == 1
    assert "knew more than it may" in capsys.readouterr().err
    assert not places.exists()


def test_the_borrow_fee_is_charged(places: Path, capsys):
    argv = ["--symbol", "SIGNAL", "--sizing", "half-kelly", "--no-report"]
    free, dear = (run(capsys, *argv, "--borrow", rate) for rate in ("0", "0.9"))
    assert dear["costs"]["borrow_annual"] == 0.9
    assert dear["strategy_return"] < free["strategy_return"]


def test_the_network_alone_says_what_is_missing(places: Path, capsys):
    assert main(["--symbol", "SIGNAL", "--mode", "lstm_only"]) == 5
    assert "python -m training.train_lstm SIGNAL" in " ".join(capsys.readouterr().err.split())
    assert not places.exists()


def test_an_ensemble_without_a_network_is_the_boosters_and_says_so(places: Path, capsys):
    alone, joined = (run(capsys, "--symbol", "SIGNAL", "--mode", mode) for mode in ("gbm_only", "ensemble"))
    assert joined["strategy_return"] == alone["strategy_return"]
    assert joined["mode"] == "gbm_only"
    (note,) = (note for note in joined["notes"] if "the boosters forecast alone" in note)
    assert "python -m training.train_lstm SIGNAL" in note
    assert "the boosters forecast alone" in Path(joined["report"]).read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--symbols", "SIGNAL", "--compare"], "needs two symbols"),
        (["--symbols", "SIGNAL,signal", "--compare"], "needs two symbols"),
        (["--symbol", "SIGNAL", "--compare"], "needs two symbols"),
        (["--symbols", " , "], "names no symbol"),
        (["--symbols", "SIGNAL,NOISE", "--report", "x.html"], "add --compare"),
        (["--symbol", "SIGNAL", "--days", "5"], "--forward-sim"),
        (["--symbol", "SIGNAL", "--forward-sim", "--days", "0"], "at least 1"),
        (["--symbol", "SIGNAL", "--forward-sim", "--days", "99999"], "--days must be 1 to"),
        (["--symbol", "SIGNAL", "--borrow", "-0.1"], "borrow_annual"),
        (["--symbol", "SIGNAL", "--max-short", "-1"], "max_short"),
        (["--symbol", "SIGNAL", "--slippage", "2000"], "1000 bps"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(places: Path, capsys, argv: list[str], words: str):
    assert main(argv) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not places.exists()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--symbol", "A", "--symbols", "A,B"],
        ["--symbol", "A", "--report", "x", "--no-report"],
        ["--symbol", "A", "--mode", "transformer"],
        ["--symbol", "A", "--sizing", "all-in"],
        ["--symbol", "A", "--days", "many"],
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(capsys, argv: list[str]):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_storage_error(places: Path, capsys):
    places.write_text("a file where the folder should be")
    assert main(["--symbol", "SIGNAL"]) == 8
    assert "cannot write" in capsys.readouterr().err
