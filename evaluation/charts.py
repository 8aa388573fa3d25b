"""Building blocks of a report: charts, drawn as inline SVG, tables, and the page that holds them.

Every maker is a pure function of its data: the same data give the same bytes. Colours are roles
(``strategy``, ``gain``, ...), written into the SVG as CSS variables, so that one drawing serves light and
dark. Words stay out of the drawings: titles, captions and legends are HTML around them.
"""

import hashlib
import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from utils.base import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Series = Mapping[str, tuple[str, FloatArray]]
Paint = Callable[["Axes", int], None]

# Drawn in sentinel colours that nothing else has, which become CSS variables of the role's name.
_NAMES = ("muted", "rule", "strategy", "hold", "exposure", "volatility", "gain", "loss")
ROLES = {name: f"#0a0b{number:02d}" for number, name in enumerate(_NAMES, start=2)}
# CSS pixels of the drawing for a desk and of the one for a phone; half a page serves both.
SIZES = {"full": ((1040, 340), (380, 280)), "strip": ((1040, 170), (380, 150)), "half": ((490, 270), None)}
# More points than these cannot be told apart at that width.
WIDE_POINTS, NARROW_POINTS = 700, 300
TIMES, MINUS, PERCENT = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}%"
# matplotlib keeps its style in one dictionary of the process: two reports at a time would mix theirs.
_STYLE_LOCK = threading.Lock()
STYLE = Path(__file__).parent / "templates" / "chart.mplstyle"
FORMS = {"pct": "{:.1%}", "fine_pct": "{:.2%}", "signed": "{:+,.1%}", "fine_signed": "{:+.2%}"}
FORMS |= {"whole_pct": "{:.0%}", "signed_fine": "{:+.3f}", "any": "{:.4g}"}
FORMS |= {"num": "{:,.2f}", "fine": "{:.3f}", "fine4": "{:.4f}", "int": "{:,.0f}", "p": "{:.3f}"}
SMALLEST_P = 0.001
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True, slots=True)
class Key:
    """Legend entry: label, role of its colour, and line, dash, area, dot, up or down."""

    label: str
    role: str
    mark: str = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A chart: SVG for a desk and for a phone, None where one serves both; its words come later."""

    wide: str
    narrow: str | None
    legend: tuple[Key, ...]
    span: str
    title: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: text, tone (word, gain, loss, pass, fail, faint), why undefined, percent of a bar."""

    text: str
    tone: str = ""
    reason: str = ""
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells, shown by ``style``: table, heat, bars or facts; reasons become footnotes."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    style: str = "table"
    title: str = ""
    caption: str = ""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return the distinct reasons of undefined cells, in the order of their footnotes."""
        return tuple(dict.fromkeys(cell.reason for row in self.rows for cell in row if cell.reason))


Block = Drawing | Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """A sentence in colour (``good``, ``plain``, ``caution``, ``bad``), with reasons."""

    tone: str
    text: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, sentences, bullets, and the charts and tables that show it."""

    title: str
    lead: tuple[str, ...] = ()
    bullets: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A page, with its ``stamp`` (IN-SAMPLE) on all figures; headlines are label, figure, what is beside."""

    kicker: str
    title: str
    subtitle: str
    headline: tuple[tuple[str, str, str], ...]
    banners: tuple[Banner, ...]
    sections: tuple[Section, ...]
    limits: tuple[str, ...]
    stamp: str = ""


def cell(value: object, form: str = "any", reason: str = "") -> Cell:
    """Show a value in one of `FORMS`, as pass or fail, or as words; None and NaN are a dash and why."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return Cell("not computed" if form == "pass" else "\N{EN DASH}", "faint", reason)
    if form in {"pass", "flag"}:
        text = {"pass": ("fail", "pass"), "flag": ("no", "raised")}[form][bool(value)]
        return Cell(text, "pass" if bool(value) == (form == "pass") else "fail")
    if form in FORMS and isinstance(value, int | float | np.number) and not isinstance(value, bool):
        if form == "p" and value < SMALLEST_P:
            return Cell("< .001")
        text = FORMS[form].format(value).replace("%", PERCENT).replace("-", MINUS)
        return Cell(text if re.search("[1-9]", text) else text.lstrip("+" + MINUS))
    return Cell(str(value), "word" if form == "word" else "")


def monthly_heatmap(returns: "pd.Series[float]") -> Table:
    """Compound simple returns (index: sessions) by month, one row for each year, in percent."""
    index, growth = pd.DatetimeIndex(returns.index), 1.0 + returns
    by_month = growth.groupby([index.year, index.month]).prod().unstack()  # noqa: PD010
    months = by_month.reindex(columns=range(1, 13)) - 1.0
    full = max(0.02, float(np.nanquantile(np.abs(months.to_numpy()), 0.95)))
    months["Year"] = growth.groupby(index.year).prod() - 1.0

    def shade(value: float) -> Cell:
        if not np.isfinite(value):
            return Cell("")
        share = round(min(abs(value) / full, 1.0) * 60)
        return Cell(f"{value * 100:.1f}".replace("-", MINUS), "gain" if value > 0 else "loss", share=share)

    rows = tuple((Cell(str(year)), *map(shade, row)) for year, row in months.iterrows())
    return Table(columns=("", *MONTHS, "Year"), rows=rows, style="heat")


def equity_chart(dates: pd.DatetimeIndex, equity: Series, in_sample: BoolArray) -> Drawing:
    """Draw growth of one unit on a log scale; label to (role, equity at each close, (n,)), the first on top.

    Rows where ``in_sample``, (n,), holds are shaded.
    """
    growth = {label: (role, values / values[0]) for label, (role, values) in equity.items()}

    def paint(ax: "Axes", points: int) -> None:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], in_sample.astype(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2):
            ax.axvspan(dates[start], dates[stop - 1], color=ROLES["loss"], alpha=0.10, lw=0)
        # Ruin has no logarithm; it is drawn at a hundredth.
        _lines(ax, dates, {name: (role, np.maximum(v, 0.01)) for name, (role, v) in growth.items()}, points)
        _log_axis(ax, "{:g}" + TIMES)

    keys = tuple(Key(f"{label} {values[-1]:,.2f}{TIMES}", role) for label, (role, values) in growth.items())
    return _draw(paint, "full", (*keys, Key("in-sample rows", "loss", "area")) if in_sample.any() else keys)


def drawdown_chart(dates: pd.DatetimeIndex, drawdown: Series) -> Drawing:
    """Draw losses from the running peak, fractions <= 0; label to (role, (n,)), the first filled."""
    worst = {f"{name}, worst {cell(v.min(), 'pct').text}": (role, v) for name, (role, v) in drawdown.items()}
    return curve_chart(dates, worst, span="strip", form="pct", filled=True)


def rolling_sharpe_chart(
    dates: pd.DatetimeIndex, returns: Series, *, window: int, periods_per_year: int
) -> Drawing:
    """Draw the annualised Sharpe ratio of the last ``window`` simple returns, known at each close."""

    def ratio(values: FloatArray) -> FloatArray:
        rolling = pd.Series(values).rolling(window)
        # Rounding leaves a tiny spread where nothing moved at all.
        found = rolling.mean() / rolling.std().where(lambda spread: spread > 1e-12)
        return np.asarray(found * np.sqrt(periods_per_year), dtype=np.float64)

    curves = {label: (role, ratio(values)) for label, (role, values) in returns.items()}
    return curve_chart(dates, curves, span="strip")


def curve_chart(
    dates: pd.DatetimeIndex,
    curves: Series,
    *,
    span: str = "half",
    form: str = "any",
    guide: tuple[float, str] | None = None,
    filled: bool = False,
) -> Drawing:
    """Draw curves; label to (role, (n,)), NaN where unknown, fractions when ``form`` is pct.

    The first is ``filled`` down to zero, or there is a line at zero, or at the ``guide``, which has a label.
    """

    def paint(ax: "Axes", points: int) -> None:
        if guide is not None:
            ax.axhline(guide[0], color=ROLES["muted"], lw=0.9, dashes=(4, 3))
        elif not filled:
            ax.axhline(0.0, color=ROLES["muted"], lw=0.9)
        _lines(ax, dates, curves, points, filled=filled)
        if form == "pct":
            _percent(ax.yaxis)

    keys = tuple(Key(label, role) for label, (role, _values) in curves.items())
    return _draw(paint, span, (*keys, Key(guide[1], "muted", "dash")) if guide else keys)


def price_with_markers(
    dates: pd.DatetimeIndex, close: FloatArray, bought: BoolArray, sold: BoolArray
) -> Drawing:
    """Draw the price (n,) on a log scale, with triangles where the position was raised or cut, (n,) each."""

    def paint(ax: "Axes", points: int) -> None:
        _lines(ax, dates, {"close": ("hold", close)}, points)
        gap = (close.max() / close.min()) ** 0.03
        for mask, role, mark, shift in ((bought, "gain", "^", 1 / gap), (sold, "loss", "v", gap)):
            where = np.flatnonzero(mask)
            ax.plot(dates[where], close[where] * shift, mark, color=ROLES[role], ms=5.0, mew=0, alpha=0.85)
        _log_axis(ax, "{:g}")

    legend = (Key("adjusted close", "hold"), Key("raised", "gain", "up"), Key("cut", "loss", "down"))
    return _draw(paint, "full", legend)


def forecast_fan_chart(
    dates: pd.DatetimeIndex, actual: FloatArray, centre: FloatArray, lower: FloatArray, upper: FloatArray
) -> Drawing:
    """Draw realised returns over the band and centre that were forecast for them; fractions, (n,)."""

    def paint(ax: "Axes", points: int) -> None:
        outside = (actual < lower) | (actual > upper)
        ax.fill_between(dates, lower, upper, color=ROLES["strategy"], alpha=0.16, lw=0)
        ax.plot(dates, centre, color=ROLES["strategy"], lw=1.6)
        size = 3.6 if points == WIDE_POINTS else 2.6
        ax.plot(dates[~outside], actual[~outside], "o", color=ROLES["hold"], ms=size, mew=0)
        ax.plot(dates[outside], actual[outside], "o", color=ROLES["loss"], ms=size + 0.8, mew=0)
        _percent(ax.yaxis)

    legend = Key("forecast", "strategy"), Key("80 % band", "strategy", "area")
    marks = Key("realised inside", "hold", "dot"), Key("realised outside", "loss", "dot")
    return _draw(paint, "full", legend + marks)


def reliability_chart(predicted: FloatArray, observed: FloatArray, *, overlap_bars: int = 1) -> Drawing:
    """Draw mean outcome against mean forecast, (n,), in ten bins of equal count with 90 % intervals.

    Outcomes overlap over ``overlap_bars`` rows: a bin is worth its count divided by that.
    """
    order = np.argsort(predicted, kind="stable")
    parts = np.array_split(order, max(1, min(10, len(order) // 20)))
    x, y = (np.array([values[part].mean() for part in parts]) for values in (predicted, observed))
    worth = np.array([max(len(part) / overlap_bars, 2.0) for part in parts])
    spread = 1.645 * np.array([observed[part].std() for part in parts]) / np.sqrt(worth)

    def paint(ax: "Axes", _points: int) -> None:
        ax.errorbar(x, y, yerr=spread, fmt="o", ms=5.5, mew=0, color=ROLES["strategy"], elinewidth=1.2)
        ax.margins(0.08)
        limits = ax.get_xlim()
        ax.plot(limits, limits, color=ROLES["muted"], lw=1.0, dashes=(4, 3), zorder=0)
        ax.set_xlim(*limits)
        _percent(ax.yaxis)
        _percent(ax.xaxis)

    keys = (Key("realised, 90 % interval", "strategy", "dot"), Key("as forecast", "muted", "dash"))
    return _draw(paint, "half", keys, dated=False)


def fold_chart(labels: Sequence[str], value: FloatArray, low: FloatArray, high: FloatArray) -> Drawing:
    """Draw one value for each fold with its interval, (n,) each; NaN where an interval is not known."""

    def paint(ax: "Axes", points: int) -> None:
        place = np.arange(len(value))
        ax.axhline(0.0, color=ROLES["muted"], lw=0.9)
        ax.vlines(place, low, high, color=ROLES["hold"], lw=1.3)
        for sign, role in ((value > 0, "strategy"), (value <= 0, "loss")):
            ax.plot(place[sign], value[sign], "o", color=ROLES[role], ms=6.0, mew=0)
        ax.margins(x=0.04)
        shown = place[:: max(1, -(-len(labels) // (points // 43)))]
        ax.set_xticks(shown, [labels[i] for i in shown])

    keys = (Key("above zero", "strategy", "dot"), Key("zero or below", "loss", "dot"))
    return _draw(paint, "full", (*keys, Key("interval", "hold")), dated=False)


def _lines(ax: "Axes", dates: pd.DatetimeIndex, series: Series, points: int, *, filled: bool = False) -> None:
    for place, (label, (role, values)) in enumerate(series.items()):
        if len(values) != len(dates):
            raise DataError(f"{label} has {len(values)} values for {len(dates)} dates: align them first")
        at = _thin(values, points)
        ax.plot(
            dates[at], values[at], color=ROLES[role], lw=1.0 if place or filled else 1.7, zorder=20 - place
        )
        if filled and not place:
            ax.fill_between(dates[at], values[at], 0.0, color=ROLES[role], alpha=0.18, lw=0)


def _thin(values: FloatArray, points: int) -> npt.NDArray[np.intp]:
    """Return ascending positions of at most ``points`` values that keep every stretch's extremes."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) <= points:
        return known
    stretches = np.array_split(known, points // 2 - 1)
    extremes = (part[[np.argmin(values[part]), np.argmax(values[part])]] for part in stretches)
    return np.unique(np.concatenate([known[:1], known[-1:], *extremes]))


def _percent(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda v, _at: f"{v * 100:.6g} %".replace("-", MINUS))


def _log_axis(ax: "Axes", pattern: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator  # noqa: PLC0415

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    # Steps of 1, 2, 5 are too coarse for a range below half a decade.
    coarse = LogLocator(subs=(1, 2, 5) if high < 400 * low else (1,))
    ax.yaxis.set_major_locator(MaxNLocator(5) if high < 5 * low else coarse)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _at: pattern.format(round(value, 6)))


def _draw(paint: Paint, span: str, legend: tuple[Key, ...], *, dated: bool = True) -> Drawing:
    wide, narrow = SIZES[span]
    return Drawing(
        wide=_svg(paint, wide, WIDE_POINTS, dated=dated),
        narrow=None if narrow is None else _svg(paint, narrow, NARROW_POINTS, dated=dated),
        legend=legend,
        span=span,
    )


def _svg(paint: Paint, size: tuple[int, int], points: int, *, dated: bool) -> str:
    # A third of a second that only a run with a report should pay.
    from matplotlib import dates, figure, style  # noqa: PLC0415

    width, height = size
    buffer = io.StringIO()
    with _STYLE_LOCK, style.context(STYLE):
        # 72 points to the inch: a point is a CSS pixel.
        page = figure.Figure(figsize=(width / 72, height / 72), dpi=72)
        ax = page.add_axes((50 / width, 26 / height, (width - 58) / width, (height - 34) / height))
        paint(ax, points)
        if dated:
            locator = dates.AutoDateLocator(minticks=2, maxticks=max(5, points // 80))  # type: ignore[no-untyped-call]
            ax.xaxis.set_major_locator(locator)
            ax.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, show_offset=False))  # type: ignore[no-untyped-call]
        page.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _clean(buffer.getvalue(), size)


def _clean(svg: str, size: tuple[int, int]) -> str:
    """Strip what a browser does not need, make ids unique in the page, and name colours by role."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    # Inside tags only: outside them are the labels of the ticks.
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{2,}", _rounded, tag[0]), body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"; font-family: [^;\"]*| transform=\"rotate\(-?0 [^\"]*\"", "", body)
    # Drawings of one page may share content-made ids, of which a hidden one must not be the first.
    own = "k" + hashlib.sha256(body.encode()).hexdigest()[:6]
    used = set(re.findall(r"#([\w-]+)[\")]", body))
    body = re.sub(r' id="([^"]*)"', lambda at: f' id="{own}{at[1]}"' if at[1] in used else "", body)
    body = body.replace("xlink:", "").replace('href="#', f'href="#{own}').replace("url(#", f"url(#{own}")
    for role, colour in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" aria-hidden="true">{body.strip()}'


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")
