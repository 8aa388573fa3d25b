"""The backtest as a person meets it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from run_backtest import main


@pytest.fixture
def places(tmp_path: Path, csv_dir: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AI_STOCKS_MODELS_DIR", str(tiny_bundle))
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AI_STOCKS_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
    return tmp_path / "results"


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
