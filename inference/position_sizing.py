"""From forecasts to target weights: one state machine, two rules for the exposure, four presets.

A sizer folds one step over the bars. The step at t books bar t with the accountant's own `book_bar`, lets the
breaker look at the equity that results, turns the forecast of t into an exposure, and keeps it inside the
no-trade band and the limits. It sees rows up to t only: a backtest and a live decision are the same fold.

odds (`half-kelly`, `long-biased`)
    Kelly's share of capital at risk is ``(p b - q) / b``, of which `kelly_fraction` is used. A losing trade
    costs about one sigma of exposure: the exposure is that share over sigma, scaled by conviction (predicted
    return over predicted std, annualised, at most 1), on the forecast's side. In the dead zone: neutral.
excess (`calibrated`, `passive`)
    Neutral exposure plus `kelly_fraction` x skill x excess / sigma^2. Skill is the lower confidence bound of
    what the forecast was worth out of sample; excess is what it promises over the no-skill forecast, less
    `cost_hurdle` one-way costs. No skill, or no more than costs: exactly neutral.

The breaker watches equity; with a reference exposure, equity over the equity of holding that. When this falls
`breaker_drawdown` below its high-water mark, the exposure may differ from the reference by `breaker_cap` at
most. A capped position earns slowly: waiting for the old high would lock a strategy out for years. The cap is
lifted when the watched equity has risen from its lowest by half of the trigger times the cap (the market has
made half of the trigger good), or after `breaker_patience_bars`; the high-water mark starts anew from there.
References: Thorp (2006), the Kelly criterion; Gerhold et al. (2014), the band as a cube root of costs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from numba import njit

from data.indicators import cached
from evaluation import accounting
from evaluation.accounting import DEFAULT_CAPITAL, Booking, CostModel, Ledger, Rates
from utils.base import DataError, UsageError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Number = TypeVar("Number")
# Imagined forecasts behind the win rate before any is resolved: half of them right, wins as large as losses.
PRIOR_FORECASTS = 50.0
# Of Kelly's fraction in what else one could have chosen, for the probability of overfitting.
BOLDNESS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingInputs:
    """What a sizer sees; every array is (n,), row t known at the close of t.

    Expected and baseline return are forecasts of the simple return from t to t + h, the latter without skill
    (the drift), NaN where there is none; sigma > 0 is that of its standard deviation. A trade on the
    forecast's side wins with ``p_win`` and pays ``payoff_ratio`` > 0, mean win over mean loss.
    ``skill_lower`` is the lower bound of out-of-sample skill, clipped to [0, 1], NaN counting as none. The
    return of bar t itself may be NaN on the first, where it is not used.
    """

    expected_return: FloatArray
    baseline_return: FloatArray
    sigma: FloatArray
    p_win: FloatArray
    payoff_ratio: FloatArray
    skill_lower: FloatArray
    asset_return_simple: FloatArray
    horizon_bars: int

    @classmethod
    def of(cls, frame: pd.DataFrame, horizon_bars: int) -> Self:
        """Take the inputs from the columns of a forecast that bear their names, and ``asset_return``."""
        known = {name: np.asarray(frame[name], dtype=np.float64) for name in _Row._fields[:-1]}
        moves = np.nan_to_num(np.asarray(frame["asset_return"], dtype=np.float64))
        return cls(**known, asset_return_simple=moves, horizon_bars=horizon_bars)


class SizingRules(NamedTuple):
    """All that a sizer's answer depends on besides inputs and costs; weights are fractions of equity.

    ``neutral``, ``bullish``, ``bearish`` are exposures without a signal and, for odds, before Kelly's part on
    each side; forecasts up to ``dead_zone_simple`` are no signal. For excess, a promise counts as far as it
    exceeds ``cost_hurdle`` one-way costs, and the neutral exposure follows target over forecast volatility,
    within bounds (target 0: off). The band's half-width is ``no_trade_band_scale`` times the cube root of the
    one-way cost (.093 at 8 bps): past it the position moves to its edge. Without a forecast the exposure is
    ``without_forecast``, or after the first one the last target if it holds that. A ``breaker_drawdown`` of 1
    never happens: no breaker.
    """

    uses_odds: bool
    neutral: float = 0.0
    bullish: float = 0.0
    bearish: float = 0.0
    kelly_fraction: float = 0.5
    dead_zone_simple: float = 0.001
    max_long: float = 1.0
    max_short: float = 0.0
    cost_hurdle: float = 0.0
    no_trade_band_scale: float = 0.0
    without_forecast: float = 0.0
    holds_without_forecast: bool = False
    volatility_target_annual: float = 0.0
    volatility_low: float = 0.5
    volatility_high: float = 1.5
    breaker_drawdown: float = 1.0
    breaker_cap: float = 0.25
    breaker_patience_bars: float = 126
    breaker_reference: float = 0.0


# `calibrated` deviates from passive by the model's part only, so its breaker watches the equity over passive:
# it stops a model that loses, not a market that falls. Its constants: see docs/sizing.md.
PRESETS: Mapping[str, SizingRules] = {
    "half-kelly": SizingRules(
        uses_odds=True, max_short=0.3, holds_without_forecast=True, breaker_drawdown=0.15
    ),
    "long-biased": SizingRules(
        uses_odds=True,
        neutral=1.3,
        bullish=1.3,
        bearish=0.1,
        max_long=1.8,
        max_short=0.1,
        without_forecast=1.0,
        holds_without_forecast=True,
        breaker_drawdown=0.25,
        breaker_cap=0.6,
    ),
    "calibrated": SizingRules(
        uses_odds=False,
        neutral=1.0,
        kelly_fraction=3.0,
        cost_hurdle=1.5,
        no_trade_band_scale=1.0,
        without_forecast=1.0,
        breaker_drawdown=0.1,
        breaker_cap=0.1,
        breaker_reference=1.0,
    ),
    "passive": SizingRules(uses_odds=False, neutral=1.0, kelly_fraction=0.0, without_forecast=1.0),
}
DEFAULT_SIZING = "calibrated"


class _Scales(NamedTuple):
    """What the surroundings of a fold set: costs, half-width of the band, hurdle, horizons per year."""

    rates: Rates
    band: float
    hurdle: float
    horizons_per_year: float


class _Row(NamedTuple, Generic[Number]):
    """One row of `SizingInputs`, or all of them as columns."""

    expected_return: Number
    baseline_return: Number
    sigma: Number
    p_win: Number
    payoff_ratio: Number
    skill_lower: Number
    asset_return_simple: Number


class _State(NamedTuple):
    """All that a sizer remembers from bar to bar."""

    cash: float
    position: float
    target: float
    holds: bool
    reference: float
    peak: float
    trough: float
    capped_bars: float  # -1 while the breaker is closed


@cached
@njit(inline="always", error_model="numpy")
def _exposure(row: _Row[float], rules: SizingRules, scales: _Scales) -> float:
    """Return the exposure that the forecast asks for, before band and limits; NaN without a forecast."""
    exposure, per_year = np.nan, scales.horizons_per_year
    if not (np.isfinite(row.expected_return) and row.sigma > 0.0):
        return exposure
    if rules.uses_odds > 0.0:
        if abs(row.expected_return) <= rules.dead_zone_simple:
            exposure = rules.neutral
        elif np.isfinite(row.p_win) and row.payoff_ratio > 0.0:
            at_risk = max(row.p_win - (1.0 - row.p_win) / row.payoff_ratio, 0.0) * rules.kelly_fraction
            conviction = min(abs(row.expected_return) / row.sigma * np.sqrt(per_year), 1.0)
            size = at_risk / row.sigma * conviction
            exposure = rules.bullish + size if row.expected_return > 0.0 else rules.bearish - size
    elif np.isfinite(row.baseline_return):
        exposure = rules.neutral
        if rules.volatility_target_annual > 0.0:
            scale = rules.volatility_target_annual / (row.sigma * np.sqrt(per_year))
            exposure *= min(max(scale, rules.volatility_low), rules.volatility_high)
        if row.skill_lower > 0.0:
            promise = row.expected_return - row.baseline_return
            excess = promise - min(max(promise, -scales.hurdle), scales.hurdle)
            exposure += rules.kelly_fraction * min(row.skill_lower, 1.0) * excess / (row.sigma * row.sigma)
    return exposure


@cached
@njit(inline="always", error_model="numpy")
def _unusable(row: _Row[float]) -> bool:
    """Say whether a forecast is infinite, or the bar's return not finite and above -1."""
    forecast = np.isinf(row.expected_return) or np.isinf(row.baseline_return) or np.isinf(row.sigma)
    record = np.isinf(row.p_win) or np.isinf(row.payoff_ratio) or np.isinf(row.skill_lower)
    return bool(forecast or record or not (-1.0 < row.asset_return_simple < np.inf))


@cached
@njit(inline="always", error_model="numpy")
def _step(state: _State, booked: Booking, row: _Row[float], rules: SizingRules, scales: _Scales) -> _State:
    """Decide at the close of the bar that was booked; the target of the returned state is the decision."""
    equity = booked.cash + booked.position
    reference = state.reference * (1.0 + rules.breaker_reference * row.asset_return_simple)
    watched = equity / reference
    peak, trough, capped = state.peak, state.trough, state.capped_bars
    if capped < 0.0:
        peak = max(peak, watched)
        if watched < peak * (1.0 - rules.breaker_drawdown):
            capped, trough = 0.0, watched
    else:
        trough = min(trough, watched)
        capped += 1.0
        recovered = watched >= trough * (1.0 + rules.breaker_drawdown / 2.0 * rules.breaker_cap)
        if recovered or capped >= rules.breaker_patience_bars:
            capped, peak = -1.0, watched
    wanted = _exposure(row, rules, scales)
    known = not np.isnan(wanted)
    if not known:
        wanted = state.target if state.holds else rules.without_forecast
    elif scales.band > 0.0 and wanted != rules.neutral and equity > 0.0:
        drifted = booked.position / equity
        wanted = min(max(drifted, wanted - scales.band), wanted + scales.band)
    if capped >= 0.0:
        reach = rules.breaker_cap
        wanted = min(max(wanted, rules.breaker_reference - reach), rules.breaker_reference + reach)
    wanted = min(max(wanted, -rules.max_short), rules.max_long)
    holds = state.holds or (known and rules.holds_without_forecast > 0.0)
    return _State(booked.cash, booked.position, wanted, holds, reference, peak, trough, capped)


@cached
@njit(nogil=True, error_model="numpy")
def _fold(
    columns: _Row[FloatArray],
    rules: SizingRules,
    scales: _Scales,
    books: FloatArray,
    out: tuple[FloatArray, BoolArray],
) -> int:
    """Book and decide over all rows into ``books`` and ``out``; return the first unusable row, n for none."""
    capital, n = books[0, 0], books.shape[0]
    target, capped = out
    state = _State(capital, 0.0, 0.0, False, capital, 1.0, 1.0, -1.0)  # noqa: FBT003
    for t in range(n):
        row = _Row(
            columns.expected_return[t],
            columns.baseline_return[t],
            columns.sigma[t],
            columns.p_win[t],
            columns.payoff_ratio[t],
            columns.skill_lower[t],
            columns.asset_return_simple[t] if t > 0 else 0.0,
        )
        if _unusable(row):
            return int(t)
        booked = accounting.book_bar(
            state.cash, state.position, state.target, row.asset_return_simple, scales.rates
        )
        accounting.write_row(books, t, booked)
        state = _step(state, booked, row, rules, scales)
        target[t] = state.target if booked.cash + booked.position > 0.0 else 0.0
        capped[t] = state.capped_bars >= 0.0
    return int(n)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingTrace:
    """What a fold decided and saw at each close: targets, its own books, where the breaker caps."""

    target_weight: FloatArray
    ledger: Ledger
    capped: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSizer:
    """Turns forecasts into target weights; its capital matters only with a minimum commission."""

    name: str
    rules: SizingRules
    initial_capital: float = DEFAULT_CAPITAL

    def __post_init__(self) -> None:
        for key, value in self.rules._asdict().items():
            if not np.isfinite(value) or (value < 0.0 and key not in {"neutral", "bullish", "bearish"}):
                raise UsageError(f"{key} must be finite and at least 0, got {value!r}")
        if self.rules.breaker_drawdown == 0.0 or self.rules.breaker_cap == 0.0:
            raise UsageError("breaker_drawdown and breaker_cap must be above 0, or there is no way back in")

    @property
    def config_id(self) -> str:
        """Hash of name and rules: equal ids mean equal decisions on equal inputs and costs."""
        numbers = {key: float(value) for key, value in self.rules._asdict().items()}
        return hashlib.sha256(json.dumps([self.name, numbers], sort_keys=True).encode()).hexdigest()[:12]

    def fold(self, inputs: SizingInputs, costs: CostModel) -> FloatArray:
        """Return target_weight (n,); entry t depends on rows up to t only, see `trace`."""
        return self.trace(inputs, costs).target_weight

    def trace(self, inputs: SizingInputs, costs: CostModel) -> SizingTrace:
        """Fold the step over all rows, under the costs that the backtest will charge.

        `DataError` when lengths differ, an input is infinite, or a bar's return is not finite and above -1.
        """
        columns, n = _columns(inputs), len(inputs.sigma)
        books, target = accounting.new_books(n, self.initial_capital), np.empty(n)
        capped, cost = np.empty(n, np.bool_), costs.one_way_rate
        band, hurdle = self.rules.no_trade_band_scale * float(np.cbrt(cost)), self.rules.cost_hurdle * cost
        scales = _Scales(costs.rates(), band, hurdle, costs.periods_per_year / inputs.horizon_bars)
        # One type for every field, or numba compiles once per mixture of ints and floats.
        used = _fold(columns, SizingRules._make(map(float, self.rules)), scales, books, (target, capped))
        if used < n:
            found = {name: float(column[used]) for name, column in columns._asdict().items()}
            raise DataError(f"row {used} cannot be used, {found}: infinite, or a return not above -1")
        return SizingTrace(target_weight=target, ledger=accounting.ledger_of(books), capped=capped)


def make_sizer(
    name: str = DEFAULT_SIZING, *, max_long: float | None = None, max_short: float | None = None
) -> RuleSizer:
    """Return the preset of that name, with other limits where given; `UsageError` for what is none."""
    if name not in PRESETS:
        raise UsageError(f"no sizing preset {name!r}; use one of {', '.join(PRESETS)}")
    rules = PRESETS[name]
    long = rules.max_long if max_long is None else max_long
    short = rules.max_short if max_short is None else max_short
    return RuleSizer(name=name, rules=rules._replace(max_long=long, max_short=short))


def _columns(inputs: SizingInputs) -> _Row[FloatArray]:
    """Return the inputs as the kernel takes them, copied only where it must be."""
    given = (getattr(inputs, name) for name in _Row._fields)
    columns: _Row[FloatArray] = _Row._make(np.require(column, np.float64, ["C", "W"]) for column in given)
    for name, column in columns._asdict().items():
        if column.shape != columns[0].shape:
            raise DataError(f"{name} has shape {column.shape}; every input must be {columns[0].shape}")
    if inputs.horizon_bars < 1:
        raise UsageError(f"horizon_bars must be at least 1, got {inputs.horizon_bars!r}")
    return columns


def alternatives() -> list[RuleSizer]:
    """Return what else one could have chosen: each preset, and bolder and meeker ones."""
    return [
        RuleSizer(name=name, rules=rules._replace(kelly_fraction=rules.kelly_fraction * times))
        for name, rules in PRESETS.items()
        for times in (BOLDNESS if rules.kelly_fraction else (1.0,))
    ]


def alternative_returns(
    decided: pd.DataFrame,
    horizon_bars: int,
    costs: CostModel,
    n_bars: int,
    *,
    initial_capital: float = DEFAULT_CAPITAL,
) -> FloatArray:
    """Return what `alternatives` earn per bar, net, on the last bars of what was decided, (n_bars, k)."""
    inputs = SizingInputs.of(decided, horizon_bars)
    weights = (sizer.fold(inputs, costs)[-n_bars:] for sizer in alternatives())
    own = inputs.asset_return_simple[-n_bars:]
    books = (accounting.account(each, own, costs, initial_capital=initial_capital) for each in weights)
    return np.column_stack([book.net_return for book in books])


def win_record(
    mean_log: FloatArray, realised_log: FloatArray, *, horizon_bars: int
) -> tuple[FloatArray, FloatArray]:
    """Follow how often the sign of the forecast was right, and what a win paid for a loss.

    Row t of forecast and outcome (from t to t + h) is used from row t + h on. Returned are the probability of
    a win and the ratio of the mean win to the mean loss as known at t, (n,), starting from `PRIOR_FORECASTS`
    even forecasts.
    """
    known = np.zeros(len(mean_log))
    known[horizon_bars:] = np.nan_to_num(np.sign(mean_log) * realised_log)[:-horizon_bars]
    wins, losses = np.cumsum(known > 0), np.cumsum(known < 0)
    size = np.cumsum(np.abs(known)) / np.maximum(wins + losses, 1)
    prior = PRIOR_FORECASTS / 2
    mean_win = (np.cumsum(np.maximum(known, 0.0)) + prior * size) / (wins + prior)
    mean_loss = (np.cumsum(np.maximum(-known, 0.0)) + prior * size) / (losses + prior)
    ratio = np.divide(mean_win, mean_loss, out=np.ones_like(mean_win), where=mean_loss > 0)
    return (wins + prior) / (wins + losses + PRIOR_FORECASTS), ratio
