"""Figures of merit, each honest about not being defined.

Every function is pure and returns a `Measured`: a finite value, or None with the reason. Arrays are (n,)
float64; returns are simple, one per bar, and must be finite: NaN raises `DataError`. Only forecasts may hold
NaN, where there was none; such rows are left out. The risk-free rate is zero. Formulas: Sharpe (1994); Jensen
(1968); Newey, West (1987); Gneiting, Raftery (2007).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.accounting import Ledger
from utils.base import DataError

FloatArray = npt.NDArray[np.float64]

# Below this, differences are rounding and a quotient by them says nothing.
_TINY = 1e-12
_MIN_TAIL_BARS = 20
_NO_CLOSING = "no decision closed a trade"
# Of the standard normal; an 80 % band reaches that many standard deviations.
Z_90 = 1.2815515655446004
# Fewer outcomes say little about a share.
MIN_OUTCOMES = 126
CALIBRATION: tuple[str, ...] = ("band_coverage", "band_coverage_lowest_year", "band_coverage_highest_year")
CALIBRATION += ("brier_score", "brier_skill", "probability_error")


@dataclass(frozen=True, slots=True)
class Measured:
    """A figure, or the reason why there is none; exactly one of the two is None."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a figure has a value or a reason, exactly one of them")
        if self.value is not None and not np.isfinite(self.value):
            raise ValueError(f"a figure must be finite, got {self.value!r}")


Metrics = Mapping[str, Measured]


def _none(reason: str) -> Measured:
    return Measured(None, reason)


def values(metrics: Metrics) -> dict[str, float | None]:
    """Return the plain values, None where undefined."""
    return {name: measured.value for name, measured in metrics.items()}


def reasons(metrics: Metrics) -> dict[str, str]:
    """Return why figures are undefined, by name."""
    return {name: measured.reason for name, measured in metrics.items() if measured.reason is not None}


def total_return(equity: FloatArray) -> Measured:
    """Last equity over first, minus 1; a fraction."""
    curve = _finite(equity, "equity")
    return _short(curve, 2, what="bars") or Measured(float(curve[-1] / curve[0] - 1.0))


def cagr(equity: FloatArray, periods_per_year: int) -> Measured:
    """Constant yearly growth that leads from first to last equity; a fraction."""
    grown = total_return(equity)
    if grown.value is None:
        return grown
    if grown.value <= -1.0:
        return _none("the capital was lost")
    log_growth = float(np.log1p(grown.value)) * periods_per_year / (len(equity) - 1)
    if log_growth > 100.0:
        return _none(f"{len(equity)} bars are too few to annualise")
    return Measured(float(np.expm1(log_growth)))


def volatility(returns: FloatArray, periods_per_year: int) -> Measured:
    """Standard deviation of returns (ddof 1), annualised; a fraction."""
    sample = _finite(returns, "returns")
    return _short(sample, 2) or Measured(_deviation(sample) * float(np.sqrt(periods_per_year)))


def sharpe(returns: FloatArray, periods_per_year: int) -> Measured:
    """Mean over standard deviation (ddof 1), annualised; undefined when returns do not vary."""
    sample = _finite(returns, "returns")
    return _annual_ratio(sample, _deviation(sample), periods_per_year, "returns do not vary")


def sortino(returns: FloatArray, periods_per_year: int) -> Measured:
    """Mean over the root of the mean squared loss, annualised; undefined without a loss."""
    sample = _finite(returns, "returns")
    downside = float(np.sqrt(np.sum(np.minimum(sample, 0.0) ** 2) / max(len(sample), 1)))
    return _annual_ratio(sample, downside, periods_per_year, "no return is negative")


def drawdowns(equity: FloatArray) -> FloatArray:
    """Equity over its highest so far, minus 1, (n,), each from -1 to 0, known at the close of its bar."""
    curve = _finite(equity, "equity")
    if not len(curve):
        return curve
    if curve[0] <= 0.0:
        raise DataError(f"equity starts at {curve[0]}; must be above 0")
    # Who owes has lost all; how much is owed is in the equity.
    return np.maximum(curve / np.maximum.accumulate(curve) - 1.0, -1.0)


def max_drawdown(equity: FloatArray) -> Measured:
    """Deepest drawdown; a fraction <= 0."""
    depth = drawdowns(equity)
    return Measured(float(depth.min())) if len(depth) else _none("no bars")


def max_drawdown_bars(equity: FloatArray) -> Measured:
    """Bars from the high before the deepest drawdown to the recovery of that high, or to the end."""
    depth = drawdowns(equity)
    if not depth.any():
        return Measured(0.0) if len(depth) else _none("no bars")
    trough, top = int(depth.argmin()), np.flatnonzero(depth == 0.0)
    peak, recovered = top[top < trough][-1], top[top > trough]
    return Measured(float((recovered[0] if len(recovered) else len(depth) - 1) - peak))


def calmar(equity: FloatArray, periods_per_year: int) -> Measured:
    """CAGR over the size of the deepest drawdown."""
    growth, depth = cagr(equity, periods_per_year), max_drawdown(equity)
    if growth.value is None:
        return growth
    if depth.value is None or depth.value >= -_TINY:
        return _none("there was no drawdown")
    return Measured(growth.value / -depth.value)


def value_at_risk(returns: FloatArray, tail: float = 0.05) -> Measured:
    """Return of one bar that is undercut in a share ``tail`` of the bars; a fraction, a loss is negative."""
    sample = _finite(returns, "returns")
    return _short(sample, _MIN_TAIL_BARS) or Measured(float(np.quantile(sample, tail)))


def conditional_value_at_risk(returns: FloatArray, tail: float = 0.05) -> Measured:
    """Mean return of the worst share ``tail`` of the bars; a fraction, a loss is negative."""
    sample = _finite(returns, "returns")
    worst = np.sort(sample)[: int((len(sample) - 1) * tail) + 1]
    return _short(sample, _MIN_TAIL_BARS) or Measured(float(worst.mean()))


def win_rate(closed_pnl: FloatArray) -> Measured:
    """Share of decided closings that realised a profit after costs; a fraction."""
    return _mean(_finite(closed_pnl, "closed_pnl") > 0.0, _NO_CLOSING)


def profit_factor(closed_pnl: FloatArray) -> Measured:
    """Sum of realised profits over the size of the sum of realised losses."""
    pnl = _finite(closed_pnl, "closed_pnl")
    if not len(pnl):
        return _none(_NO_CLOSING)
    loss = -float(pnl[pnl < 0.0].sum())
    if loss <= _TINY:
        return _none("no decision closed a trade at a loss")
    return Measured(float(pnl[pnl > 0.0].sum()) / loss)


def information_ratio(returns: FloatArray, benchmark: FloatArray, periods_per_year: int) -> Measured:
    """Sharpe ratio of the return over the benchmark's."""
    active = _finite(returns, "returns") - _finite(benchmark, "benchmark")
    why = "returns do not differ from the benchmark's"
    return _annual_ratio(active, _deviation(active), periods_per_year, why)


def market_line(returns: FloatArray, benchmark: FloatArray, periods_per_year: int) -> dict[str, Measured]:
    """Jensen's regression of returns on the benchmark's, with t-values that allow for autocorrelation.

    Returns ``alpha`` (a fraction a year), ``beta``, ``alpha_t``, ``beta_t`` (Newey-West with Bartlett weights
    and ``4 (n / 100)^(2/9)`` lags, no small-sample correction).
    """
    y, x = _finite(returns, "returns"), _finite(benchmark, "benchmark")
    if len(y) != len(x):
        raise DataError(f"returns has {len(y)} entries and benchmark {len(x)}; must be equal")
    if none := _short(y, 3) or (_none("the benchmark does not vary") if x.std() <= _TINY else None):
        return dict.fromkeys(("alpha", "beta", "alpha_t", "beta_t"), none)
    design = np.column_stack([np.ones(len(x)), x])
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ (design.T @ y)
    residuals = y - design @ coefficients
    out = {
        "alpha": Measured(float(coefficients[0] * periods_per_year)),
        "beta": Measured(float(coefficients[1])),
    }
    if residuals.std() <= _TINY * max(1.0, float(y.std())):
        return out | dict.fromkeys(("alpha_t", "beta_t"), _none("the line fits exactly"))
    scores = design * residuals[:, None]
    meat = _long_run_sum(scores, int(4.0 * (len(y) / 100.0) ** (2.0 / 9.0)))
    alpha_t, beta_t = coefficients / np.sqrt(np.diag(bread @ meat @ bread))
    return out | {"alpha_t": Measured(float(alpha_t)), "beta_t": Measured(float(beta_t))}


def overlap_error(scores: FloatArray, horizon_bars: int) -> float:
    """Return the standard error of the sum of scores, one per session, that come from labels of h bars.

    Newey and West's with 3 (h - 1) lags: how far overlapping labels repeat each other depends on how slowly
    the signal moves.
    """
    return float(np.sqrt(np.maximum(_long_run_sum(scores, 3 * (horizon_bars - 1)), 0.0)))


def _long_run_sum(scores: FloatArray, lags: int) -> npt.NDArray[Any]:
    """Return the covariance of the sum of scores, (n,) or (n, p), by Bartlett weights."""
    lags = min(lags, len(scores) - 1)
    total = scores.T @ scores
    for lag in range(1, lags + 1):
        cross = scores[lag:].T @ scores[:-lag]
        total += (1.0 - lag / (lags + 1.0)) * (cross + cross.T)
    return total


def spearman(first: FloatArray, second: FloatArray) -> Measured:
    """Rank correlation of two arrays without NaN, ties at their mean rank."""
    a, b = _finite(first, "first"), _finite(second, "second")
    if len(a) < 3:
        return _none(f"needs 3 pairs, has {len(a)}")
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return _none("one side does not vary")
    return Measured(float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]))


def forecast_metrics(expected_return: FloatArray, realised_return: FloatArray) -> dict[str, Measured]:
    """Judge forecasts of the simple h-day return by what it became; NaN where there is none, or not yet.

    Overlapping windows are counted one by one; they hold a sample only n / h strong. ``direction_base_rate``
    is the direction accuracy of always-up (zero outcomes left out), ``hit_rate_down_days`` the share of falls
    forecast as falls, ``information_coefficient`` Spearman's.
    """
    expected, realised = np.asarray(expected_return, float), np.asarray(realised_return, float)
    if expected.shape != realised.shape:
        raise DataError(f"forecasts have shape {expected.shape}, outcomes {realised.shape}; must be equal")
    made = expected[np.isfinite(expected)]
    known = np.isfinite(expected) & np.isfinite(realised)
    x, y = expected[known], realised[known]
    up, down = y > 0.0, y < 0.0
    moved = up | down
    right = np.sign(x) == np.sign(y)
    none = "no forecast has an outcome yet"
    return {
        "direction_accuracy": _mean(right[moved], none),
        "direction_base_rate": _mean(up[moved], none),
        "hit_rate_down_days": _mean(right[down], "no forecast was followed by a fall"),
        "information_coefficient": spearman(x, y),
        "prediction_std": _std(made),
        "pred_positive_share": _mean(made > 0.0, "no forecasts"),
        "rmse": Measured(float(np.sqrt(np.mean((x - y) ** 2)))) if len(x) else _none(none),
        "n_forecasts": Measured(float(len(made))),
    }


def calibration_metrics(
    realised: FloatArray,
    band: tuple[FloatArray, FloatArray],
    prob_up: FloatArray,
    years: npt.NDArray[np.int_],
) -> dict[str, Measured]:
    """Judge bands of the simple h-day return, and probabilities of a rise, by what came; (n,), NaN: none yet.

    Returns `CALIBRATION`: coverage of the band, over all and in the ``years`` of `MIN_OUTCOMES` outcomes at
    least; Brier score, and the share by which it is below that of always saying the share of rises, known
    only in hindsight; mean distance of probability and share of rises in ten groups of equal size.
    """
    lower, upper = band
    known = np.isfinite(realised) & np.isfinite(lower) & np.isfinite(upper) & np.isfinite(prob_up)
    came, said, of_year = realised[known], prob_up[known], years[known]
    if short := _short(came, MIN_OUTCOMES, what="resolved forecasts"):
        return dict.fromkeys(CALIBRATION, short)
    inside, rose = (lower[known] <= came) & (came <= upper[known]), came > 0.0
    full = [inside[of_year == y] for y in np.unique(of_year) if np.sum(of_year == y) >= MIN_OUTCOMES]
    yearly = np.sort([part.mean() for part in full])
    brier, naive = float(np.mean((said - rose) ** 2)), float(rose.mean() * (1.0 - rose.mean()))
    groups = np.array_split(np.argsort(said, kind="stable"), 10)
    apart = [abs(said[group].mean() - rose[group].mean()) * len(group) for group in groups]
    none = f"no year has {MIN_OUTCOMES} outcomes"
    return {
        "band_coverage": Measured(float(inside.mean())),
        "band_coverage_lowest_year": _mean(yearly[:1], none),
        "band_coverage_highest_year": _mean(yearly[-1:], none),
        "brier_score": Measured(brier),
        "brier_skill": Measured(1.0 - brier / naive) if naive > 0.0 else _none("all outcomes were alike"),
        "probability_error": Measured(float(np.sum(apart) / len(came))),
    }


def band_crps(came: float, median: float, lower: float, upper: float) -> float:
    """Return the continuous ranked probability score of a median with an 80 % band, in log returns.

    Scored is the distribution with these quantiles: below the median normal with scale ``s = (median - lower)
    / Z_90``, above it with ``s' = (upper - median) / Z_90``. With ``C(u)``, the score of the standard normal
    (Gneiting, Raftery 2007, equation 21), it is ``s' C((came - median) / s') + (s - s') C(0) / 2`` above the
    median, and the mirror image below it.
    """
    near, far = upper - median, median - lower
    if came < median:
        near, far = far, near
    apart, scale = abs(came - median), near / Z_90
    score = apart
    if scale > 0.0:
        u = apart / scale
        density = np.exp(-0.5 * u * u) / np.sqrt(2.0 * np.pi)
        score = scale * (u * erf(u / np.sqrt(2.0)) + 2.0 * density - 1.0 / np.sqrt(np.pi))
    return float(score + (far - near) / Z_90 * (np.sqrt(2.0) - 1.0) / np.sqrt(np.pi) / 2.0)


def ledger_metrics(
    ledger: Ledger, benchmark_return: FloatArray, periods_per_year: int
) -> dict[str, Measured]:
    """Judge the books of a strategy beside the net returns of buy and hold, (n,), row by row.

    Row 0, which earns nothing, is not counted as a return. ``sharpe_ratio`` and ``cost_adjusted_sharpe`` are
    one figure, after all costs: no headline is gross. ``turnover`` is one-way, per year.
    """
    net, held, market = ledger.net_return[1:], ledger.held_weight[1:], benchmark_return[1:]
    after_costs = sharpe(net, periods_per_year)
    none = "no bar was held"
    return {
        "total_return": total_return(ledger.equity),
        "cagr": cagr(ledger.equity, periods_per_year),
        "volatility": volatility(net, periods_per_year),
        "sharpe_ratio": after_costs,
        "cost_adjusted_sharpe": after_costs,
        "gross_sharpe_ratio": sharpe(ledger.gross_return[1:], periods_per_year),
        "sortino_ratio": sortino(net, periods_per_year),
        "calmar_ratio": calmar(ledger.equity, periods_per_year),
        "max_drawdown": max_drawdown(ledger.equity),
        "max_drawdown_bars": max_drawdown_bars(ledger.equity),
        "var_95": value_at_risk(net),
        "cvar_95": conditional_value_at_risk(net),
        **market_line(net, market, periods_per_year),
        "information_ratio": information_ratio(net, market, periods_per_year),
        "exposure_mean": _mean(held, none),
        "exposure_std": _std(held),
        "turnover": _mean(ledger.turnover[1:] * periods_per_year, none),
        "total_transaction_costs": Measured(float(ledger.trade_cost.sum())),
        "total_financing_costs": Measured(float(ledger.financing_cost.sum())),
        "total_borrow_costs": Measured(float(ledger.borrow_cost.sum())),
        "final_equity": Measured(float(ledger.equity[-1])),
        "n_bars": Measured(float(len(ledger.equity))),
    }


def trade_metrics(closed_pnl: FloatArray, n_orders: int) -> dict[str, Measured]:
    """Judge the orders: ``closed_pnl`` (m,) is what each decided closing realised after costs, money."""
    return {
        "win_rate": win_rate(closed_pnl),
        "profit_factor": profit_factor(closed_pnl),
        "average_trade_profit": _mean(closed_pnl, _NO_CLOSING),
        "total_trades": Measured(float(len(closed_pnl))),
        "total_orders": Measured(float(n_orders)),
    }


def _finite(array: FloatArray, name: str) -> FloatArray:
    checked = np.asarray(array, dtype=np.float64)
    if checked.ndim != 1:
        raise DataError(f"{name} has shape {checked.shape}; must be (n,)")
    if not np.isfinite(checked).all():
        raise DataError(
            f"{name}[{int(np.argmin(np.isfinite(checked)))}] is not finite; drop or mend such rows"
        )
    return checked


def _short(sample: FloatArray, need: int, what: str = "returns") -> Measured | None:
    """Return an undefined figure where there are fewer values than it needs."""
    return _none(f"needs {need} {what}, has {len(sample)}") if len(sample) < need else None


def _annual_ratio(sample: FloatArray, spread: float, periods_per_year: int, why: str) -> Measured:
    if none := _short(sample, 2) or (_none(why) if spread <= _TINY else None):
        return none
    return Measured(float(sample.mean() / spread * np.sqrt(periods_per_year)))


def _deviation(sample: FloatArray) -> float:
    return float(sample.std(ddof=1)) if len(sample) > 1 else 0.0


def _ranks(sample: FloatArray) -> FloatArray:
    _, where, counts = np.unique(sample, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2.0)[where], dtype=np.float64)


def _mean(sample: FloatArray | npt.NDArray[np.bool_], reason: str) -> Measured:
    return Measured(float(np.mean(sample))) if len(sample) else _none(reason)


def _std(sample: FloatArray) -> Measured:
    return _short(sample, 2, what="values") or Measured(_deviation(sample))
