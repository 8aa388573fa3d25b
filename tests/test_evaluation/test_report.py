"""The reports: whole in one file, the same bytes every time, honest about rows, costs and gaps."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation import charts
from evaluation.accounting import CostModel
from evaluation.advanced_backtester import AdvancedBacktester, BacktestReport
from evaluation.charts import Report, Section
from evaluation.metrics import Measured
from evaluation.report import (
    backtest_report,
    ensemble_report,
    provenance_of,
    render,
    training_report,
    write_report,
)
from utils.base import DataError, StorageError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{ 7 * 7 }}$x^2$"
HORIZON = 5
VERDICT = {
    "label": "no-edge",
    "reasons": ["IC 0.021 out of sample, p 0.18 (at most 0.05)"],
    "evidence": {"ic": 0.021, "p_ic": 0.18, "pbo": None, "n_rows": 1740, "leak_alarm": False,
                 "skill_over_drift": -0.001, "skill_over_zero": 0.004, "skill_over_average": 0.001,
                 "hits_over_always_up": -0.006, "calibration_slope": 0.62, "something_new": 1.5},
    "gates": [
        {"name": "walk-forward efficiency", "value": None, "threshold": "> 40%", "passed": None},
        {"name": "direction accuracy", "value": 0.548, "threshold": "> 51%", "passed": True},
        {"name": "signal std", "value": 0.001, "threshold": "> 0.005", "passed": False},
    ],
    "bypassed_gates": ["signal std"],
}  # fmt: skip


def forecast_frame(bars: pd.DataFrame, seed: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    close = bars["Close"]
    sigma = np.log(close).diff().rolling(60).std() * np.sqrt(HORIZON)
    expected = 0.002 + 0.15 * sigma * rng.normal(size=len(bars))
    return pd.DataFrame(
        {
            "close": close,
            "expected_return": expected,
            "lower": expected - 1.28 * sigma,
            "upper": expected + 1.28 * sigma,
            "prob_up": 0.53 + 0.04 * np.tanh(expected / sigma),
            "is_out_of_sample": True,
        }
    )


def backtest(bars: pd.DataFrame, *, in_sample: bool = False) -> BacktestReport:
    forecast = forecast_frame(bars)
    weight = np.clip(1.0 + np.round(25 * (forecast["expected_return"].fillna(0.002) - 0.002), 1), 0.0, 1.3)
    known = np.ones(len(bars), dtype=bool)
    known[: 300 if in_sample else 0] = False
    return AdvancedBacktester(costs=CostModel()).backtest_with_positions(
        pd.DatetimeIndex(bars.index),
        bars["Close"].to_numpy(),
        weight.to_numpy(),
        is_out_of_sample=known,
        include_in_sample=in_sample,
        expected_return=forecast["expected_return"].to_numpy(),
        horizon_bars=HORIZON,
    )


def training_inputs(bars: pd.DataFrame) -> dict[str, object]:
    rng = np.random.default_rng(11)
    realised = np.log(bars["Close"].shift(-HORIZON) / bars["Close"])
    noise = 0.03 * rng.normal(size=len(bars))
    record = pd.DataFrame(
        {
            "date": bars.index,
            "predicted_log": 0.003 + 0.08 * realised.fillna(0.0) + 0.2 * noise,
            "baseline_log": 0.003,
            "realised_log": realised,
        }
    ).reset_index(drop=True)
    names = [f"feature_{number:02d}" for number in range(30)]
    folds = []
    for number, block in enumerate(np.array_split(np.arange(len(bars)), 7)):
        ic = float(rng.normal(0.03, 0.05))
        folds.append(
            {
                "number": number,
                "test_start": f"{bars.index[block[0]]:%Y-%m-%d}",
                "test_end": f"{bars.index[block[-1]]:%Y-%m-%d}",
                "n": len(block),
                "ic": ic if number else None,
                "ic_low": ic - 0.08 if number else None,
                "ic_high": ic + 0.08 if number else None,
                "hit_minus_base": 0.01,
                "calibration_slope": 0.6,
                "pred_std_over_target_std": 0.08,
                "share_positive": 0.48,
                "selected_features": list(rng.permutation(names)[:20]),
            }
        )
    trials = [
        {
            "model": ("xgb", "lgb")[number % 2],
            "number": number // 2,
            "state": "pruned" if number % 5 == 4 else "complete",
            "inner_rmse": 1.0 + 0.001 * float(rng.random()),
            "rounds": None if number % 5 == 4 else 40 + number,
            "learning_rate": 0.05,
            "max_depth": 4,
        }
        for number in range(30)
    ]
    metadata = {
        "symbol": "AAPL",
        "source": "csv:/srv/somebody/secret/prices",
        "data": {"first_session": "2005-01-03", "hash": "ab" * 32},
        "seed": 7,
        "horizon_bars": HORIZON,
        "versions": {"numpy": "2.4", "xgboost": "3.2"},
        "verdict": VERDICT,
        "folds": folds,
    }
    importance = {name: float(value) for name, value in zip(names, rng.exponential(size=30), strict=True)}
    return {"metadata": metadata, "record": record, "importance": importance, "trials": trials}


def demo(bars: pd.DataFrame, *, in_sample: bool = False, symbol: str = "AAPL") -> Report:
    return backtest_report(
        backtest(bars, in_sample=in_sample),
        symbol=symbol,
        provenance={"Source of prices": "csv:/srv/somebody/secret/prices", "Seed": "7"},
        verdict=VERDICT,
        forecasts=forecast_frame(bars),
        horizon_bars=HORIZON,
        notes=("A note that belongs beside every figure.",),
    )


@pytest.fixture(scope="module")
def bars(make_bars) -> pd.DataFrame:
    return make_bars(n=1500, seed=5)


@pytest.fixture(scope="module")
def honest(bars: pd.DataFrame) -> Report:
    return demo(bars)


@pytest.fixture(scope="module")
def honest_page(honest: Report) -> str:
    return render(honest)


@pytest.fixture(scope="module")
def stamped_page(bars: pd.DataFrame) -> str:
    return render(demo(bars, in_sample=True))


@pytest.fixture(scope="module")
def training_page(bars: pd.DataFrame) -> str:
    summary = {"consistency": 0.7, "efficiency": None}
    return render(training_report(symbol="AAPL", summary=summary, **training_inputs(bars)))


class Page(HTMLParser):
    """Every tag with its attributes, every id, and the visible text of figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def outside_resources(html: str) -> list[str]:
    """What a browser would load from elsewhere, or run."""
    page = Page(html)
    found = [
        tag
        for tag, _attrs in page.tags
        if tag in {"script", "link", "iframe", "object", "embed", "img", "base"}
    ]
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            loads = name in {"src", "href", "data", "action", "srcset", "poster"} and not (
                value or ""
            ).startswith("#")
            if name.startswith("on") or loads:
                found.append(f"{tag} {name}={value}")
    return found + [mark for mark in ("@import", "url(http", "url(//", "http://", "https://") if mark in html]


@pytest.mark.parametrize("name", ["honest_page", "stamped_page", "training_page"])
def test_a_report_is_one_small_file_that_loads_and_runs_nothing(
    name: str, request: pytest.FixtureRequest
) -> None:
    html = request.getfixturevalue(name)
    assert outside_resources(html) == []
    assert len(html.encode()) < 600_000
    assert html.startswith("<!doctype html>")
    assert "prefers-color-scheme:dark" in html
    assert "width=device-width" in html


@pytest.mark.parametrize(
    "planted",
    ["<script>1</script>", '<img src="x.png">', '<p onclick="x()">', '<link href="https://fonts.example/a.css">',
     "<style>@import 'a.css'</style>"],
)  # fmt: skip
def test_the_check_for_outside_resources_can_fail(honest_page: str, planted: str) -> None:
    assert outside_resources(honest_page.replace("</main>", f"{planted}</main>"))


def test_two_runs_give_the_same_bytes(bars: pd.DataFrame, honest_page: str, training_page: str) -> None:
    assert render(demo(bars)) == honest_page
    summary = {"consistency": 0.7, "efficiency": None}
    again = training_report(symbol="AAPL", summary=summary, **training_inputs(bars))
    assert render(again) == training_page


def test_further_horizons_have_a_section_where_there_are_some(bars: pd.DataFrame, training_page: str) -> None:
    inputs = training_inputs(bars)
    found = {
        "ic": 0.0314,
        "p_ic": 0.27,
        "calibration_slope": None,
        "skill_over_drift": -0.002,
        "n_rows": 1721,
    }
    metadata = {**inputs["metadata"], "path_models": {"20": found}}
    page = render(training_report(symbol="AAPL", **{**inputs, "metadata": metadata}))
    assert "Further horizons" not in training_page
    assert "Further horizons" in page
    assert all(figure in page for figure in ("0.031", "0.27", "1,721"))
    assert "of the same kind as the main one" in page


def test_no_p_value_of_a_report_is_rounded_to_zero(bars: pd.DataFrame) -> None:
    inputs = training_inputs(bars)
    tiny = dict.fromkeys(("p_ic", "p_return", "universe_p_ic", "universe_p_return"), 1.5e-09)
    found = {"ic": 0.03, "p_ic": 1.5e-09, "calibration_slope": 1.0, "skill_over_drift": 0.1, "n_rows": 9}
    verdict = VERDICT | {"evidence": VERDICT["evidence"] | tiny}
    metadata = {**inputs["metadata"], "path_models": {"20": found}, "verdict": verdict}
    page = render(training_report(symbol="AAPL", **{**inputs, "metadata": metadata}))
    assert page.count("&lt; .001") == 6  # the headline, the evidence, the further horizon
    assert ">0.000<" not in page


def test_signals_above_zero_are_not_called_above_the_drift(training_page: str) -> None:
    """They are counted before calibration takes their mean away: how many forecasts lie above is another."""
    for words in ("Above drift", "above the drift", "Signals above drift"):
        assert words not in training_page
    assert "Raw above 0: share of the raw signals above zero" in training_page


def test_a_network_shows_how_it_learned_in_the_place_of_trials(
    bars: pd.DataFrame, training_page: str
) -> None:
    learned = {"trainLoss": 0.4321, "valLoss": 0.5678, "learningRate": 1e-3, "directionalAccuracy": 0.513}
    inputs = {**training_inputs(bars), "importance": {}, "trials": ()}
    page = render(training_report(symbol="AAPL", epochs=[{"epoch": 1, **learned}], **inputs))
    absent = ("Trials of all searches", "What the search tried", "What the model looks at")
    for heading in ("How the network learned", *absent):
        assert (heading in page) == (heading == "How the network learned") != (heading in training_page)
    assert all(figure in page for figure in ("0.4321", "0.5678", "51.3"))
    folds = inputs["metadata"]["folds"]
    name = folds[0]["selected_features"][0]
    assert f"Features read in {len(folds)} folds" in page
    assert f"{name} ({sum(name in fold['selected_features'] for fold in folds)})" in page


def test_other_data_give_another_page(bars: pd.DataFrame, honest_page: str) -> None:
    assert render(demo(bars.iloc[:-1])) != honest_page


def test_ids_are_unique_and_every_reference_meets_its_own_drawing(honest_page: str) -> None:
    page = Page(honest_page)
    ids = [attrs["id"] for _tag, attrs in page.tags if "id" in attrs]
    assert ids
    assert len(ids) == len(set(ids))
    for svg in honest_page.split("<svg ")[1:]:
        body = svg.split("</svg>")[0]
        own = {f'"#{attrs["id"]}"' for _tag, attrs in Page(f"<svg {body}").tags if "id" in attrs}
        used = {f'"{attrs["href"]}"' for attrs in Page(f"<svg {body}").named("use")}
        assert used <= own


def test_hostile_strings_are_shown_and_not_run(honest: Report) -> None:
    report = replace(
        honest,
        title=HOSTILE,
        banners=tuple(replace(banner, reasons=(HOSTILE,)) for banner in honest.banners),
        sections=(*honest.sections, Section(title=HOSTILE, lead=(HOSTILE,), bullets=(HOSTILE,))),
    )
    html = render(report)
    assert outside_resources(html) == []
    assert "<script" not in html
    assert "{{ 7 * 7 }}" in "".join(Page(html).text)


def test_hostile_training_data_are_shown_and_not_run(bars: pd.DataFrame) -> None:
    inputs = training_inputs(bars)
    folds = [
        fold | {"test_start": "$\\x$ <b>", "selected_features": [HOSTILE]}
        for fold in inputs["metadata"]["folds"]
    ]
    inputs["metadata"] |= {"source": HOSTILE, "folds": folds}
    inputs["importance"] |= {HOSTILE: 99.0}
    inputs["trials"].append({"model": HOSTILE, "number": 1, "state": "complete", "inner_rmse": 0.1})
    html = render(training_report(symbol=HOSTILE, findings=(HOSTILE,), **inputs))
    assert outside_resources(html) == []
    assert "<script" not in html


def test_paths_of_the_machine_stay_at_home(honest_page: str, training_page: str) -> None:
    for html in (honest_page, training_page):
        text = "".join(Page(html).text)
        assert "csv:prices" in text
        assert "somebody" not in html
        assert str(Path.cwd()) not in html


def test_paths_are_cut_and_other_slashes_are_not(bars: pd.DataFrame) -> None:
    lines = ("C:\\Users\\me\\data.csv", "file:///srv/x/y.csv", "profit/loss of 3/4", "at /opt/a/b, done")
    html = render(replace(demo(bars.iloc[:400]), limits=lines))
    text = "".join(Page(html).text)
    for shown in ("data.csv", "y.csv", "profit/loss of 3/4", "at b, done"):
        assert shown in text
    for hidden in ("Users", "srv", "opt"):
        assert hidden not in text


def test_an_in_sample_row_stamps_every_figure(stamped_page: str, honest_page: str) -> None:
    page = Page(stamped_page)
    figures = len(page.named("figure"))
    captions = stamped_page.count('<figcaption><b class="stamp">IN-SAMPLE.</b>')
    assert captions == len(page.named("figcaption")) >= 10
    assert stamped_page.count('class="watermark"') == stamped_page.count('role="img"') >= 8
    assert figures - captions <= 1  # provenance is no result
    assert "<title>IN-SAMPLE" in stamped_page
    assert 'class="banner bad"' in stamped_page
    assert "in-sample rows" in stamped_page
    assert all(
        "IN-SAMPLE" in part.split("</dt>")[0]
        for part in stamped_page.split('<dl class="stats">')[1].split("<dt>")[1:7]
    )
    assert "IN-SAMPLE" not in honest_page.replace("data-stamp", "")
    assert "Out of sample" not in stamped_page.split("<footer>", maxsplit=1)[0].split("<body>")[1].replace(
        "Computed on the walk-forward record, out of sample.", ""
    )


@pytest.mark.parametrize("name", ["buy_hold", "exposure_matched", "volatility_matched"])
def test_a_strategy_is_never_shown_alone(bars: pd.DataFrame, name: str) -> None:
    whole = backtest(bars.iloc[:300])
    planted = replace(
        whole, benchmarks={key: value for key, value in whole.benchmarks.items() if key != name}
    )
    with pytest.raises(DataError, match=name):
        backtest_report(
            planted,
            symbol="AAPL",
            provenance={},
            verdict=VERDICT,
            forecasts=forecast_frame(bars),
            horizon_bars=5,
        )


def test_every_figure_says_rows_and_costs(honest: Report) -> None:
    report = honest
    captions = {
        block.title: block.caption for section in report.sections for block in section.blocks if block.title
    }
    percent = "\N{NO-BREAK SPACE}%"
    paid = f"after 5 bps commission, 3 bps slippage, 5{percent} financing and 3{percent} borrow fee"
    for title in (
        "Equity",
        "Drawdown",
        "Position",
        "Rolling Sharpe ratio",
        "Measures",
        "Year by year",
        "Price and orders",
    ):
        assert paid in captions[title]
    assert all("Out of sample, 2005-01-03 to" in caption for caption in captions.values())
    assert all("{" not in text for pair in captions.items() for text in pair)


def test_an_undefined_measure_is_a_dash_with_its_reason(bars: pd.DataFrame) -> None:
    result = backtest(bars)
    planted = dict(result.metrics) | {
        "sortino_ratio": Measured(None, "no return is negative"),
        "profit_factor": Measured(None, "no trade was closed at a loss"),
    }
    report = backtest_report(
        replace(result, metrics=planted),
        symbol="AAPL", provenance={}, verdict=VERDICT, forecasts=forecast_frame(bars), horizon_bars=5,
    )  # fmt: skip
    html = render(report)
    assert '<ol class="reasons"><li>no return is negative</li></ol>' in html
    assert 'class="faint">no trade was closed at a loss</span>' in html
    assert "nan" not in "".join(Page(html).text).lower().replace("finan", "")


def test_every_defined_measure_of_the_backtester_is_shown(bars: pd.DataFrame, honest_page: str) -> None:
    shown = "".join(Page(honest_page).text)
    result = backtest(bars)
    assert f"{result.metrics['sharpe_ratio'].value:.2f}" in shown
    assert f"{result.metrics['total_orders'].value:,.0f}" in shown
    for benchmark in result.benchmarks.values():
        assert f"{benchmark.metrics['calmar_ratio'].value:.2f}" in shown


def test_a_strategy_that_only_holds_is_called_by_its_name(bars: pd.DataFrame, honest_page: str) -> None:
    held = AdvancedBacktester(costs=CostModel()).backtest_with_positions(
        pd.DatetimeIndex(bars.index), bars["Close"].to_numpy(), np.ones(len(bars)), include_in_sample=True
    )
    report = backtest_report(
        held, symbol="X", provenance={}, verdict=VERDICT, forecasts=forecast_frame(bars), horizon_bars=HORIZON
    )
    assert "nothing here is skill" in render(report)
    assert "nothing here is skill" not in honest_page


def test_the_headline_stands_beside_buy_and_hold_and_equal_exposure(
    bars: pd.DataFrame, honest: Report
) -> None:
    result, report = backtest(bars), honest
    market = result.benchmarks["buy_hold"].metrics["cagr"].value
    gap = result.metrics["cagr"].value - result.benchmarks["exposure_matched"].metrics["cagr"].value
    plain = {label: (value + note).replace("\N{MINUS SIGN}", "-") for label, value, note in report.headline}
    assert f"{100 * market:+.1f}" in plain["Return a year"]
    assert f"{100 * gap:+.1f}" in plain["Over equal exposure"]


def test_forecasts_outside_the_judged_rows_are_not_shown(bars: pd.DataFrame) -> None:
    result, forecasts = backtest(bars.iloc[:1000]), forecast_frame(bars)
    pages = [
        backtest_report(
            result, symbol="AAPL", provenance={}, verdict=VERDICT, forecasts=frame, horizon_bars=HORIZON
        )
        for frame in (forecasts, forecasts.iloc[:1000])
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("n", [2, 30, 300])
def test_a_short_backtest_is_reported_without_what_it_is_too_short_for(bars: pd.DataFrame, n: int) -> None:
    html = render(demo(bars.iloc[:n]))
    assert "Rolling Sharpe" not in html
    assert "Year by year" in html


@pytest.mark.parametrize(
    ("label", "tone"), [("edge", "good"), ("no-edge", "plain"), ("insufficient", "caution")]
)
def test_the_verdict_is_said_in_colour_with_its_reasons(bars: pd.DataFrame, label: str, tone: str) -> None:
    result = backtest(bars.iloc[:300])
    verdict = VERDICT | {"label": label}
    report = backtest_report(
        result, symbol="AAPL", provenance={}, verdict=verdict, forecasts=forecast_frame(bars), horizon_bars=5
    )
    assert report.banners[0].tone == tone
    assert report.banners[0].reasons == tuple(VERDICT["reasons"])


def test_the_evidence_explains_itself_and_unknown_figures_still_show(honest_page: str) -> None:
    text = "".join(Page(honest_page).text)
    assert "Probability of overfitting" in text
    assert "Something new" in text
    assert "Not computed" in text
    assert "leak alarm" in text.lower()


def test_the_training_report_shows_what_a_sceptic_asks_for(training_page: str) -> None:
    text = "".join(Page(training_page).text)
    wanted = (
        "Fold by fold", "Always up", "The best 12 of 30 trials of all searches",
        "6 trials were stopped early", "> 40%",
        "fail", "pass", "not computed", "walk-forward efficiency", "Importance and stability", "of 7",
        "Hash of prices", "nothing to remark",
    )  # fmt: skip
    assert [words for words in wanted if words not in text] == []
    assert "These classic gates fail, and keep no bundle from being saved: signal std." in text
    assert "Stopped early" not in text  # the twelve best were run to their end


def test_a_share_is_a_percentage_in_tables_as_it_is_in_tiles(bars: pd.DataFrame) -> None:
    evidence = VERDICT["evidence"] | {"deflated_sharpe": 0.953}
    inputs = training_inputs(bars)
    inputs["metadata"] |= {"verdict": VERDICT | {"evidence": evidence}}
    blocks = [
        block
        for section in training_report(symbol="AAPL", **inputs).sections
        for block in section.blocks
        if isinstance(block, charts.Table)
    ]
    shown = {row[0].text: row[1].text for block in blocks for row in block.rows if len(row) > 1}
    percent = "\N{NO-BREAK SPACE}%"
    assert shown["direction accuracy"] == f"54.8{percent}"
    assert shown["Deflated Sharpe ratio"] == f"95.3{percent}"


def test_trials_of_the_search_verdicts_and_results_are_named_apart(
    honest_page: str, training_page: str
) -> None:
    for page in (honest_page, training_page):
        text = "".join(Page(page).text)
        assert "tries" not in text.lower().replace("industries", "")
    assert "Trials of all searches" in training_page


def test_a_panel_says_which_figures_are_the_symbols_own(bars: pd.DataFrame, training_page: str) -> None:
    inputs = training_inputs(bars)
    inputs["metadata"] |= {"universe": {"symbols": ["AAPL", "IBM", "XOM"], "described": "three"}}
    report = training_report(symbol="AAPL", **inputs)
    captions = {block.title: block.caption for section in report.sections for block in section.blocks}
    assert "forecasts" not in captions["Information coefficient by fold, 3 symbols together"]
    assert "Folds, 3 symbols together" in captions
    assert all("of AAPL alone" in captions[name] for name in ("Skill over naive forecasts", "Evidence"))
    notes = {label: note for label, _, note in report.headline}
    assert all("of AAPL alone" in notes[name] for name in ("Information coefficient", "Calibration slope"))
    assert "AAPL alone" not in training_page.replace("Own IC: of AAPL alone", "")


def test_as_judged_and_as_served_are_named_apart(bars: pd.DataFrame) -> None:
    verdict = VERDICT | {"evidence": VERDICT["evidence"] | {"direction_accuracy": 0.519}}
    page = render(
        backtest_report(
            backtest(bars),
            symbol="X",
            provenance={},
            verdict=verdict,
            forecasts=forecast_frame(bars),
            horizon_bars=5,
        )
    )
    assert "Direction right, as judged" in page
    assert "Direction right, as served" in page
    assert ">Direction right<" not in page


def test_without_a_search_there_is_no_table_of_trials(bars: pd.DataFrame) -> None:
    html = render(training_report(symbol="AAPL", **(training_inputs(bars) | {"trials": []})))
    assert "of 0 trials" not in html
    assert "there was no search" in html


def test_a_figure_that_comes_from_two_sides_is_shown_once(bars: pd.DataFrame) -> None:
    inputs = training_inputs(bars)
    verdict = VERDICT | {"evidence": VERDICT["evidence"] | {"walk_forward_efficiency": 0.5}}
    inputs["metadata"] |= {"verdict": verdict}
    html = render(training_report(symbol="AAPL", summary={"efficiency": 0.5}, **inputs))
    assert html.count(">Walk-forward efficiency<") == 1


def test_provenance_names_what_is_there_and_leaves_out_what_is_not() -> None:
    facts = provenance_of({"symbol": "X", "data": {"hash": "ff"}, "seed": 0, "device": None})
    assert facts == {"Symbol": "X", "Hash of prices": "ff", "Seed": "0"}


def test_write_report_leaves_one_file_and_makes_its_folder(
    tmp_path: Path, honest: Report, honest_page: str
) -> None:
    path = write_report(honest, tmp_path / "run" / "report.html")
    assert path.read_text(encoding="utf-8") == honest_page
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path, honest: Report) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(honest, tmp_path / "file" / "report.html")


def test_tick_labels_are_not_rounded_with_the_drawing() -> None:
    small = np.array([0.04, -0.03, 0.02])
    drawing = charts.fold_chart(["2001", "2002", "2003"], small, small - 0.05, small + 0.05)
    labels = [float(text.replace("\N{MINUS SIGN}", "-")) for text in Page(drawing.wide).text if "0." in text]
    assert len(set(labels)) == len(labels) >= 3


def test_a_dollar_sign_in_a_label_is_no_formula() -> None:
    value = np.zeros(1)
    assert "$\\x$" in charts.fold_chart(["$\\x$"], value, value, value).wide


def test_every_colour_is_a_role_and_the_background_is_transparent(bars: pd.DataFrame) -> None:
    close = bars["Close"].to_numpy()
    curves = {"a": ("strategy", close), "b": ("hold", close)}
    drawing = charts.equity_chart(pd.DatetimeIndex(bars.index), curves, np.zeros(len(close), dtype=bool))
    assert "var(--strategy)" in drawing.wide
    assert "#" not in drawing.wide.replace('"#k', "").replace("(#k", "")


def test_thinning_keeps_the_extremes_and_both_ends() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    values[7_777], values[3] = 50.0, np.nan
    values[12_345] = -50.0
    at = charts._thin(values, 300)
    assert len(at) <= 300
    assert {0, 7_777, 12_345, 19_999} <= set(at)
    assert 3 not in at
    assert (np.diff(at) > 0).all()


def test_series_and_dates_of_different_lengths_are_refused(bars: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="1499 values for 1500 dates"):
        charts.drawdown_chart(pd.DatetimeIndex(bars.index), {"a": ("strategy", np.zeros(1499))})


def test_the_heat_map_compounds_days_to_months_and_years(bars: pd.DataFrame) -> None:
    returns = bars["Close"].pct_change().fillna(0.0)
    table = charts.monthly_heatmap(returns)
    may = returns.loc["2006-05"]
    row = next(row for row in table.rows if row[0].text == "2006")
    as_number = [float(cell.text.replace("\N{MINUS SIGN}", "-")) for cell in row[1:]]
    assert as_number[4] == pytest.approx(100 * ((1 + may).prod() - 1), abs=0.06)
    assert as_number[12] == pytest.approx(100 * ((1 + returns.loc["2006"]).prod() - 1), abs=0.06)
    assert all(
        (cell.tone == "gain") == (number > 0)
        for cell, number in zip(row[1:], as_number, strict=True)
        if number
    )


def test_the_reliability_chart_tells_calibrated_from_overconfident() -> None:
    rng = np.random.default_rng(1)
    probability = rng.uniform(0.3, 0.7, size=5_000)
    rises = (rng.random(5_000) < 0.5 + 0.25 * (probability - 0.5)).astype(float)
    honest = (rng.random(5_000) < probability).astype(float)
    assert charts.reliability_chart(probability, rises) != charts.reliability_chart(probability, honest)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-0.1234, "pct", "\N{MINUS SIGN}12.3\N{NO-BREAK SPACE}%"),
        (-0.00004, "pct", "0.0\N{NO-BREAK SPACE}%"),
        (0.05, "signed", "+5.0\N{NO-BREAK SPACE}%"),
        (1234.6, "int", "1,235"),
        (np.float64(0.5), "fine", "0.500"),
        (0.0009, "p", "< .001"),
        (1.5e-09, "p", "< .001"),
        (0.001, "p", "0.001"),
        (np.float64(0.0471), "p", "0.047"),
        (None, "p", "\N{EN DASH}"),
        (True, "pass", "pass"),
        (False, "pass", "fail"),
        (True, "flag", "raised"),
        ("> 51%", "any", "> 51%"),
        (None, "pct", "\N{EN DASH}"),
        (float("nan"), "num", "\N{EN DASH}"),
        (np.float64("inf"), "num", "\N{EN DASH}"),
    ],
)
def test_cells(value: object, form: str, text: str) -> None:
    assert charts.cell(value, form).text == text


def test_an_ensemble_is_shown_with_its_parts(bars: pd.DataFrame) -> None:
    inputs = training_inputs(bars)
    record = inputs["record"].assign(weight_gbm=0.6, weight_lstm=0.4)  # type: ignore[attr-defined]
    part = {"ic": 0.02, "p_ic": None, "calibration_slope": 0.7, "skill_over_drift": 0.001, "n_rows": 900}
    parts = {
        "table": [{"part": name, **part} for name in ("ensemble", "gbm", HOSTILE)],
        "error_correlation": 0.99,
        "signal_correlation": 0.31,
        "weights": {"gbm": 0.6, "lstm": 0.4},
        "notes": [f"the weight of lstm is zero {HOSTILE}"],
    }
    metadata = {**inputs["metadata"], "parts": parts}  # type: ignore[dict-item]
    html = render(ensemble_report(symbol="AAPL", metadata=metadata, record=record))
    assert outside_resources(html) == []
    assert "<script" not in html
    text = "".join(Page(html).text)
    for words in ("The parts beside the whole", "0.31", "the weight of lstm is zero", "Weight over time"):
        assert words in text
