"""One self-contained HTML file for a backtest or a training: no script, no network, light and dark.

`backtest_report` and `training_report` turn results into a `Report`, `render` turns that into HTML, and
`write_report` puts it on disk. The same inputs give the same bytes. Labels and captions are in
``templates/words.toml``, so that the words can be read and judged in one place.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from evaluation import charts
from evaluation.advanced_backtester import IN_SAMPLE_STAMP, REGIME_BARS, BacktestReport, by_regime, by_year
from evaluation.charts import TIMES, Banner, Block, Cell, Drawing, FloatArray, Report, Section, Table, cell
from evaluation.forward_simulator import BLOCK_BARS, CONFIDENCE, RESAMPLES, Evidence, summarise
from evaluation.metrics import Metrics, values
from utils.base import DataError, StorageError
from utils.model_paths import write_whole

Facts = Mapping[str, Any]
Rows = Iterable[Iterable[Cell]]
Sections = Iterable[Section]
AnyBlock = TypeVar("AnyBlock", Drawing, Table)
STRATEGY = "Strategy"
BENCHMARKS = {"buy_hold": ("Buy and hold", "hold"), "exposure_matched": ("Same exposure", "exposure")}
BENCHMARKS |= {"volatility_matched": ("Same volatility", "volatility")}
TEMPLATES = Path(__file__).parent / "templates"
ROLLING_BARS, COVERAGE_OUTCOMES = 252, 250
SHOWN_FORECASTS, SHOWN_MARKERS, SHOWN_TRIALS, SHOWN_FEATURES = 120, 80, 12, 20
# All but the last part of a path: where this machine keeps things is nobody's business. URLs stay.
_FOLDERS = re.compile(r"(?<![\w.<])(?<!:/)(?:file://|[A-Za-z]:)?(?:[/\\][\w.@+~-]+)+[/\\](?=[\w.@+~-])")


@dataclass(frozen=True, slots=True)
class Words:
    """Headings, captions and columns of one kind of report, and what fills the gaps of its captions."""

    table: Facts
    fills: Mapping[str, object]

    def on(self, name: str, block: AnyBlock, fills: Mapping[str, object] | None = None) -> AnyBlock:
        """Give a block its title and caption."""
        known = {**self.fills, **(fills or {})}
        title, caption = (text.format_map(known) for text in self.table["figure"][name])
        return replace(block, title=title, caption=caption)

    def grid(self, name: str, columns: Iterable[str], rows: Rows, style: str = "table") -> Table:
        """Show rows of cells in a style of `Table`."""
        return self.on(name, Table(columns=tuple(columns), rows=tuple(map(tuple, rows)), style=style))

    def records(self, name: str, records: Iterable[Facts]) -> Table:
        """Show records in the columns (key, heading, form) of the words.

        A record may have its own form of a value (``value_form``), and say ``why`` it is None.
        """
        specs, why = self.table["columns"][name], self.table["not_computed"]
        rows = (
            (cell(row.get(key), row.get(f"{key}_form", form), row.get("why", why)) for key, _, form in specs)
            for row in records
        )
        return self.grid(name, (head for _key, head, _form in specs), rows)

    def section(self, name: str, *blocks: Block, bullets: Iterable[str] = ()) -> Section:
        """Put a heading and its sentences over blocks."""
        title, *lead = self.table["section"][name]
        return Section(title=title, lead=tuple(lead), bullets=tuple(bullets), blocks=blocks)


def render(report: Report) -> str:
    """Return the report as HTML; strings are escaped, and paths of this machine cut to their last part."""
    # Only a run with a report should pay for the template engine.
    from jinja2 import StrictUndefined, Template  # noqa: PLC0415

    source = (TEMPLATES / "report.html.j2").read_text(encoding="utf-8")
    page = Template(source, autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True)
    return str(page.render(report=report))


def write_report(report: Report, path: Path) -> Path:
    """Write the report whole, see `write_whole`; raises `StorageError` if that cannot be done."""
    html = render(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    return path


def provenance_of(metadata: Facts) -> dict[str, str]:
    """Return what a bundle's metadata tell about data, model and libraries: facts by name, for a report."""
    libraries = metadata.get("versions", {}).items()
    flat = {**metadata, "versions": ", ".join(f"{name} {version}" for name, version in libraries)}
    for part in ("data", "universe"):
        flat |= {f"{part}.{name}": fact for name, fact in (metadata.get(part) or {}).items()}
    places = words_of("training").table["provenance"].items()
    return {label: str(flat[place]) for label, place in places if flat.get(place) not in (None, "")}


def backtest_report(
    result: BacktestReport,
    *,
    symbol: str,
    provenance: Mapping[str, str],
    verdict: Facts,
    forecasts: pd.DataFrame,
    horizon_bars: int,
    notes: Sequence[str] = (),
    asks_for_skill: bool = True,
    extra_sections: Sequence[Section] = (),
) -> Report:
    """Assemble the report of a backtest; a row that is not out of sample stamps all of it IN-SAMPLE.

    ``verdict`` is that of a bundle's metadata. ``forecasts`` have, by session, ``close``,
    ``is_out_of_sample`` and, of the simple return over the next ``horizon_bars``, ``expected_return``,
    ``lower``, ``upper`` (80 % band), ``prob_up``. ``asks_for_skill`` is False for a sizing that bets without.
    Raises `DataError` if one of the three benchmarks is missing.
    """
    if missing := [name for name in BENCHMARKS if name not in result.benchmarks]:
        raise DataError(f"the backtest of {symbol} lacks {missing}: a strategy is never shown alone")
    costs, stamp = result.costs, IN_SAMPLE_STAMP if result.is_in_sample else ""
    rows = f"{'In-sample rows included' if stamp else 'Out of sample'}, {_span(result.daily.index)}"
    rates = {"financing": costs.financing_annual * 100, "borrow": costs.borrow_annual * 100}
    paid = words_of("backtest").table["costs"].format(costs=costs, **rates)
    fills = {"basis": f"{rows}, {paid}.", "rows": f"{rows}.", "window": ROLLING_BARS, "horizon": horizon_bars}
    fills |= {"symbol": symbol, "stamp": stamp, "subtitle": f"{rows}, {len(result.daily):,} sessions, {paid}"}
    words = words_of("backtest", fills)
    figures = {"own": values(result.metrics)} | {n: values(result.benchmarks[n].metrics) for n in BENCHMARKS}
    own, same = (figures[name]["cagr"] for name in ("own", "exposure_matched"))
    figures["own"]["exposure_gap"] = None if own is None or same is None else own - same
    judged = forecasts[forecasts.index.isin(result.daily.index)]
    sections = (
        *_money(words, result),
        _forecasts(words, judged, horizon_bars, in_sample=bool(stamp)),
        *extra_sections,
        words.section("evidence", _evidence(words, verdict["evidence"])),
        words.section("origin", _facts(words, provenance), bullets=(*result.notes, *notes)),
    )
    label = "no-edge-sized" if verdict["label"] == "no-edge" and not asks_for_skill else verdict["label"]
    return _page(words, figures, {**verdict, "label": label}, sections)


def _money(words: Words, result: BacktestReport) -> tuple[Section, ...]:
    daily, dates, year = result.daily, pd.DatetimeIndex(result.daily.index), result.costs.periods_per_year
    frames = {STRATEGY: ("strategy", daily)}
    frames |= {label: (role, result.benchmarks[name].daily) for name, (label, role) in BENCHMARKS.items()}
    net, market = daily["net_return"], result.benchmarks["buy_hold"].daily["net_return"]

    def curves(name: str, first: int) -> dict[str, tuple[str, FloatArray]]:
        return {label: (role, _floats(frame[name])) for label, (role, frame) in [*frames.items()][:first]}

    seen = ~np.asarray(daily["is_out_of_sample"], dtype=np.bool_)
    equity = words.on("equity", charts.equity_chart(dates, curves("equity", 4), seen))
    drawdown = words.on("drawdown", charts.drawdown_chart(dates, curves("drawdown", 2)))
    held, whole = {"held weight": ("strategy", _floats(daily["held_weight"]))}, (1.0, "fully invested")
    position = charts.curve_chart(dates, held, span="strip", form="pct", guide=whole, filled=True)
    long, pair = len(dates) > ROLLING_BARS + REGIME_BARS, curves("net_return", 2)
    sharpe = charts.rolling_sharpe_chart(dates, pair, window=ROLLING_BARS, periods_per_year=year)
    rough = (words.on("sharpe", sharpe), words.records("regimes", by_regime(result))) if long else ()
    alike = (words.table["same"],) if np.allclose(net, market, atol=1e-9) else ()
    months = words.on("months", charts.monthly_heatmap(net))
    return (
        words.section("growth", equity, drawdown, words.on("position", position), bullets=alike),
        words.section("measures", *_measures(words, result)),
        words.section("time", *rough),
        words.section("calendar", months, words.records("years", by_year(result))),
        words.section("trades", _price(words, daily)),
    )


def _measures(words: Words, result: BacktestReport) -> tuple[Table, Table]:
    rivals = [result.benchmarks[name].metrics for name in BENCHMARKS]

    def rows(kind: str, columns: list[Metrics]) -> list[list[Cell]]:
        specs = ((key, *spec) for key, spec in words.table[kind].items() if key in result.metrics)
        found = ((label, form, [column[key] for column in columns]) for key, label, form in specs)
        return [[Cell(name), *(cell(m.value, form, m.reason or "") for m in ms)] for name, form, ms in found]

    heads = ("", STRATEGY, *(label for label, _role in BENCHMARKS.values()))
    beside = words.grid("measures", heads, rows("measures", [result.metrics, *rivals]))
    return beside, words.grid("own", ("", ""), rows("own", [result.metrics]), "facts")


def _price(words: Words, daily: pd.DataFrame) -> Drawing:
    change, turnover = np.diff(_floats(daily["held_weight"]), prepend=0.0), _floats(daily["turnover"])
    shown = turnover >= max(0.01, np.sort(turnover)[-min(SHOWN_MARKERS, len(turnover))])
    dates, close = pd.DatetimeIndex(daily.index), _floats(daily["close"])
    drawing = charts.price_with_markers(dates, close, shown & (change > 0), shown & (change < 0))
    return words.on("price", drawing, {"shown": shown.sum(), "total": f"{(turnover >= 0.01).sum():,}"})


def _forecasts(words: Words, made: pd.DataFrame, horizon: int, *, in_sample: bool) -> Section:
    frame = made.assign(came=made["close"].shift(-horizon) / made["close"] - 1.0)
    frame = frame[made["is_out_of_sample"].astype(bool) | in_sample]
    frame = frame.dropna(subset=["came", "expected_return", "lower", "upper", "prob_up"])
    if len(frame) < COVERAGE_OUTCOMES:
        return words.section("forecast")
    dates, last = pd.DatetimeIndex(frame.index), frame.iloc[-SHOWN_FORECASTS:]
    inside = np.asarray(frame["came"].between(frame["lower"], frame["upper"]), dtype=np.bool_)
    band = (_floats(last[name]) for name in ("came", "expected_return", "lower", "upper"))
    fan = charts.forecast_fan_chart(pd.DatetimeIndex(last.index), *band)
    up, rose = _floats(frame["prob_up"]), _floats(frame["came"] > 0)
    reliability = words.on("reliability", charts.reliability_chart(up, rose, overlap_bars=horizon))
    share = pd.Series(inside.astype(np.float64)).rolling(COVERAGE_OUTCOMES).mean()
    curves = {f"inside, last {COVERAGE_OUTCOMES} outcomes": ("strategy", _floats(share))}
    coverage = charts.curve_chart(dates, curves, form="pct", guide=(0.8, "promised 80 %"))
    coverage = words.on("coverage", coverage, {"share": cell(inside.mean(), "pct").text})
    return words.section("forecast", words.on("fan", fan, {"shown": len(last)}), reliability, coverage)


def luck_section(evidence: Evidence) -> Section:
    """Show how much of a result may be luck: intervals, figures, scenarios."""
    fills = {"block": BLOCK_BARS, "draws": f"{RESAMPLES:,}", "seeds": evidence.seeds}
    words = words_of("backtest", {**fills, "confidence": cell(CONFIDENCE, "whole_pct").text})
    known, heads = words.table["evidence"], words.table["heads"]
    facts = ((*known[name], measured) for name, measured in evidence.figures.items())
    rows = ((Cell(a), cell(m.value, form, m.reason or ""), Cell(hint, "word")) for a, form, hint, m in facts)
    spans = []
    for name, (label, form) in words.table["intervals"].items():
        span, why = evidence.intervals[name], evidence.intervals[name].reason or ""
        ends = (cell(end, form, why) for end in (span.value, span.low, span.high))
        spans.append((Cell(label), *ends, cell(span.share_above_zero, "pct", why)))
    grid = "grid_drawn" if evidence.seeds else "grid"
    tables = words.grid("intervals", heads["intervals"], spans), words.grid("luck", heads["evidence"], rows)
    return words.section("luck", *tables, words.grid(grid, *_grid_rows(evidence)))


def _grid_rows(evidence: Evidence) -> tuple[list[str], list[list[Cell]]]:
    """Return heads and rows, windows down, costs across: Sharpe over buy and hold, share of seeds ahead."""
    records = summarise(evidence.scenarios)
    heads = dict.fromkeys(f"{record['cost_multiple']:g}{TIMES} costs" for record in records)
    rows: dict[object, list[Cell]] = {}
    for record in records:
        row = rows.setdefault(record["window"], [Cell(f"{record['start'][:4]} to {record['end'][:4]}")])
        ahead, apart = record["share_better"], record["sharpe_difference"]
        shown = cell(apart, "signed_fine", "returns do not vary")
        share = "" if ahead is None else f" ({ahead * 100:.0f})"
        row.append(Cell("same") if record["all_same"] else replace(shown, text=shown.text + share))
    return ["", *heads], list(rows.values())


def training_report(
    *,
    symbol: str,
    metadata: Facts,
    record: pd.DataFrame,
    importance: Mapping[str, float],
    trials: Sequence[Facts],
    summary: Mapping[str, float | None] | None = None,
    findings: Sequence[str] = (),
    epochs: Sequence[Facts] = (),
) -> Report:
    """Assemble the report of a training.

    ``record`` is the symbol's walk-forward record: ``date`` and the h-day log returns ``predicted_log``,
    ``baseline_log``, ``realised_log`` (NaN where not known yet). ``importance`` are mean absolute SHAP values
    of the final fit, ``trials`` those of the search, ``summary`` the measures across folds, ``findings`` what
    the data validator had to say. A network has ``epochs``, figures of each, for importance and trials.
    """
    folds, universe = metadata["folds"], metadata.get("universe")
    pruned, shown = sum(trial["state"] == "pruned" for trial in trials), min(SHOWN_TRIALS, len(trials))
    fills = {"symbol": symbol, "total": len(trials), "pruned": pruned, "shown": shown}
    if universe:
        # One model of many symbols: what is of this one, and what of all of them, must not be mixed up.
        together = f", {len(universe['symbols'])} symbols together"
        fills |= {"alone": f", of {symbol} alone", "together": together}
    page = _Trained("training", metadata, record, fills)
    page.evidence |= summary or {}
    words = page.words
    ics = (_floats([fold[name] for fold in folds]) for name in ("ic", "ic_low", "ic_high"))
    ic = words.on("ic", charts.fold_chart([fold["test_start"][:7] for fold in folds], *ics))
    periods = ({**fold, "period": f"{fold['test_start'][:7]} to {fold['test_end'][:7]}"} for fold in folds)
    further = metadata.get("path_models") or {}
    paths = words.records("paths", ({"bars": int(bars), **found} for bars, found in further.items()))
    best = sorted(trials, key=lambda trial: (trial["state"] == "pruned", trial["inner_rmse"] or np.inf))
    best = [{"why": words.table["stopped"], **trial} for trial in best[:SHOWN_TRIALS]]
    if epochs:
        learned = [words.section("epochs", words.records("epochs", epochs), bullets=[_read(words, folds)])]
    else:
        tried = words.section("trials", words.records("trials", best))
        nothing = words.section("no_trials", bullets=words.table["no_trials"])
        looked = words.section("features", _importance(words, importance, folds))
        learned = [looked, tried if trials else nothing]
    # Nothing is searched for a network.
    tried_out = {} if epochs else {"trials": len(trials)}
    first = words.section("network_folds" if epochs else "folds", ic, words.records("folds", periods))
    beside = [words.section("paths", paths)] if further else []
    return page.report([first], beside, learned, findings, tried_out)


def ensemble_report(
    *, symbol: str, metadata: Facts, record: pd.DataFrame, findings: Sequence[str] = ()
) -> Report:
    """Assemble the report of an ensemble; ``record`` has a ``weight_`` column for each member besides."""
    parts = metadata["parts"]
    fills = {name: cell(parts[f"{name}_correlation"], "num").text for name in ("error", "signal")}
    page = _Trained("ensemble", metadata, record, {"symbol": symbol, **fills})
    words = page.words
    labels = words.table["members"].items()
    curves = {label: (role, _floats(record[f"weight_{name}"])) for name, (label, role) in labels}
    weights = charts.curve_chart(pd.DatetimeIndex(record["date"]), curves, span="full", form="pct")
    beside = words.section("parts", words.records("parts", parts["table"]), bullets=parts["notes"])
    first = beside, words.section("weights", words.on("weights", weights))
    return page.report(first, (), (), findings, parts["weights"])


class _Trained:
    """What the reports of a training and of an ensemble have in common."""

    def __init__(self, kind: str, metadata: Facts, record: pd.DataFrame, fills: Facts) -> None:
        self.metadata, self.horizon = metadata, metadata["horizon_bars"]
        known = record.dropna(subset=["realised_log", "predicted_log"])
        self.known = known.sort_values("date").set_index("date")
        self.evidence = dict(metadata["verdict"]["evidence"])
        rows = f"Out of sample, {_span(self.known.index)}"
        own = f"{rows}, {len(self.known):,} forecasts"
        fills = {"horizon": self.horizon, "alone": "", "together": "", **fills}
        told = {"rows": f"{own}{fills['alone']}.", "fold_rows": f"{rows if fills['together'] else own}."}
        told |= {"subtitle": f"{own} of the return over {self.horizon} sessions"}
        self.words = words_of(kind, {**told, **fills})

    def naive(self) -> Section:
        words, known = self.words, self.known
        came, model, drift = (_floats(known[f"{name}_log"]) for name in ("realised", "predicted", "baseline"))
        # Prices that never move leave the drift no error.
        whole = float(np.sum((came - drift) ** 2)) or 1.0
        ahead = np.cumsum((came - drift) ** 2 - (came - model) ** 2) / whole
        curve = {"model ahead of its drift": ("strategy", ahead)}
        over_time = charts.curve_chart(pd.DatetimeIndex(known.index), curve, form="pct")
        naive = words.table["naive"]
        rows = ({"name": name, "gain": self.evidence.get(key), "what": what} for name, key, what in naive)
        calibration = charts.reliability_chart(model, came, overlap_bars=self.horizon)
        blocks = words.on("calibration", calibration), words.on("ahead", over_time)
        return words.section("naive", words.records("naive", rows), *blocks)

    def gates(self) -> Section:
        words, verdict = self.words, self.metadata["verdict"]
        known = words.table["gate"]
        rows = ({"note": "", **known.get(gate["name"], {}), **gate} for gate in verdict["gates"])
        tables, said = [words.records("gates", rows), _evidence(words, self.evidence)], [*verdict["reasons"]]
        if tries := self.metadata.get("tries"):
            tables.append(words.records("tries", tries))
        if failed := ", ".join(verdict["bypassed_gates"]):
            said.append(words.table["bypassed"].format(gates=failed))
        return words.section("gates", *tables, bullets=said)

    def report(
        self, first: Sections, beside: Sections, learned: Sections, findings: Sequence[str], own: Facts
    ) -> Report:
        """Put a report's own sections around those that all have, and its own figures beside the evidence."""
        words = self.words
        data = words.section("data", bullets=findings or words.table["no_findings"])
        origin = words.section("origin", _facts(words, provenance_of(self.metadata)))
        sections = *first, self.naive(), *beside, self.gates(), *learned, data, origin
        return _page(words, {"own": {**self.evidence, **own}}, self.metadata["verdict"], sections)


def _importance(words: Words, importance: Mapping[str, float], folds: Iterable[Facts]) -> Table:
    """Show the features' shares as bars, longest first, and how many folds selected each."""
    selected = [set(fold["selected_features"]) for fold in folds]
    top = sorted(importance, key=lambda name: (-importance[name], name))[:SHOWN_FEATURES]
    shares = {name: importance[name] / (sum(importance.values()) or 1.0) for name in top}
    longest = max(shares.values(), default=0.0) or 1.0
    counts = (f"{sum(name in fold for fold in selected)} of {len(selected)}" for name in top)
    bars = (replace(cell(share, "pct"), share=round(100 * share / longest, 1)) for share in shares.values())
    rows = zip(map(Cell, top), bars, map(Cell, counts), strict=True)
    return words.grid("features", words.table["feature_heads"], rows, "bars")


def _read(words: Words, folds: Sequence[Facts]) -> str:
    """Say which features the folds have read, the most frequent first."""
    found = Counter(name for fold in folds for name in fold["selected_features"])
    most = ", ".join(f"{name} ({n})" for name, n in found.most_common(SHOWN_FEATURES))
    return str(words.table["read"]).format(total=len(found), folds=len(folds), most=most)


def _page(words: Words, figures: Mapping[str, Facts], verdict: Facts, sections: Sections) -> Report:
    (tone, text), stamp = words.table["verdict"][verdict["label"]], str(words.fills.get("stamp", ""))
    warning = (Banner(tone="bad", text=words.table["verdict"]["in_sample"]),) if stamp else ()
    headline = []
    for label, key, form, note in words.table["headline"]:
        if key == "trials" and key not in figures["own"]:
            continue
        shown = {name: cell(found.get(key), form).text for name, found in figures.items()}
        headline.append((label, shown["own"], note.format_map({**words.fills, **shown})))
    return Report(
        kicker=words.table["kicker"],
        title=str(words.fills["symbol"]),
        subtitle=str(words.fills["subtitle"]),
        headline=tuple(headline),
        banners=(*warning, Banner(tone=tone, text=text, reasons=tuple(verdict["reasons"]))),
        sections=tuple(sections),
        limits=tuple(words.table["limits"]),
        stamp=stamp,
    )


def _evidence(words: Words, evidence: Mapping[str, object]) -> Table:
    known, why, judged = (words.table[name] for name in ("evidence", "not_computed", "judged"))
    # Two figures with the same words are one, told by two sides.
    specs = {tuple(known.get(key, (key.replace("_", " ").capitalize(), "any", ""))): key for key in evidence}
    shown = ((name, cell(evidence[at], form, why), hint) for (name, form, hint), at in specs.items())
    rows = ((Cell(name + judged), value, Cell(hint, "word")) for name, value, hint in shown)
    return words.grid("evidence", ("Measure", "Value", "How to read it"), rows)


def _facts(words: Words, facts: Mapping[str, str]) -> Table:
    rows = ((Cell(name), Cell(fact)) for name, fact in facts.items())
    return words.grid("origin", ("", ""), rows, "facts")


def words_of(kind: str, fills: Mapping[str, object] | None = None) -> Words:
    """Read the words of a ``kind`` of report, and what fills their gaps."""
    table = tomllib.loads((TEMPLATES / "words.toml").read_text(encoding="utf-8"))
    return Words({**table, **table[kind]}, fills or {})


def _floats(numbers: object) -> FloatArray:
    return np.array(numbers, dtype=np.float64)


def _span(dates: pd.Index) -> str:
    return f"{dates[0]:%Y-%m-%d} to {dates[-1]:%Y-%m-%d}"


def _shown(value: object) -> object:
    # Markup is a string too; it was escaped already and holds no path.
    return _FOLDERS.sub("", value) if type(value) is str else value
