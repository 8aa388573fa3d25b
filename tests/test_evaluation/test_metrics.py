"""Figures agree with other people's code, and say so when they are not defined."""

import empyrical
import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import spearmanr

from evaluation import metrics as m
from evaluation.accounting import CostModel, account
from utils.base import DataError


def sample(seed: int = 0, n: int = 900) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    market = rng.standard_t(4, n) * 0.01
    return 0.6 * market + rng.normal(0.0002, 0.006, n), market


def curve(returns: np.ndarray) -> np.ndarray:
    return 100.0 * np.concatenate([[1.0], np.cumprod(1.0 + returns)])


@pytest.mark.parametrize("seed", range(5))
def test_empyrical_agrees(seed: int) -> None:
    returns, market = sample(seed)
    equity = curve(returns)
    pairs = {
        "sharpe": (m.sharpe(returns, 252), empyrical.sharpe_ratio(returns)),
        "sortino": (m.sortino(returns, 252), empyrical.sortino_ratio(returns)),
        "volatility": (m.volatility(returns, 252), empyrical.annual_volatility(returns)),
        "total": (m.total_return(equity), empyrical.cum_returns_final(returns)),
        "cagr": (m.cagr(equity, 252), empyrical.annual_return(returns)),
        "drawdown": (m.max_drawdown(equity), empyrical.max_drawdown(returns)),
        "calmar": (m.calmar(equity, 252), empyrical.calmar_ratio(returns)),
        "var": (m.value_at_risk(returns), empyrical.value_at_risk(returns)),
        "cvar": (m.conditional_value_at_risk(returns), empyrical.conditional_value_at_risk(returns)),
        "information": (
            m.information_ratio(returns, market, 252),
            empyrical.excess_sharpe(returns, market) * np.sqrt(252),
        ),
        "beta": (m.market_line(returns, market, 252)["beta"], empyrical.beta(returns, market)),
    }
    for name, (ours, theirs) in pairs.items():
        assert ours.value == pytest.approx(float(theirs), rel=1e-9), name


@pytest.mark.parametrize("n", [40, 900])
def test_statsmodels_agrees_on_the_market_line(n: int) -> None:
    returns, market = sample(3, n)
    lags = int(4 * (n / 100) ** (2 / 9))
    fit = sm.OLS(returns, sm.add_constant(market)).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    ours = m.market_line(returns, market, 252)
    assert ours["alpha"].value == pytest.approx(fit.params[0] * 252, rel=1e-9)
    assert ours["beta"].value == pytest.approx(fit.params[1], rel=1e-9)
    assert ours["alpha_t"].value == pytest.approx(fit.tvalues[0], rel=1e-9)
    assert ours["beta_t"].value == pytest.approx(fit.tvalues[1], rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_scipy_agrees_on_ranks_with_ties(rows: list[tuple[int, int]]) -> None:
    a, b = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    ours = m.spearman(a, b)
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        assert ours.value is None
        assert ours.reason == "one side does not vary"
    else:
        assert ours.value == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (m.total_return(np.array([1.0])), "needs 2 bars"),
        (m.cagr(np.array([1.0]), 252), "needs 2 bars"),
        (m.cagr(np.array([1.0, 0.0]), 252), "capital was lost"),
        (m.cagr(np.array([1.0, 1e6]), 252), "too few to annualise"),
        (m.volatility(np.zeros(1), 252), "needs 2"),
        (m.sharpe(np.zeros(1), 252), "needs 2"),
        (m.sharpe(np.full(50, 0.01), 252), "do not vary"),
        (m.sortino(np.zeros(1), 252), "needs 2"),
        (m.sortino(np.full(50, 0.01), 252), "no return is negative"),
        (m.max_drawdown(np.empty(0)), "no bars"),
        (m.max_drawdown_bars(np.empty(0)), "no bars"),
        (m.calmar(np.array([1.0]), 252), "needs 2 bars"),
        (m.calmar(np.linspace(1.0, 1.2, 99), 252), "no drawdown"),
        (m.value_at_risk(np.zeros(19)), "needs 20"),
        (m.conditional_value_at_risk(np.zeros(19)), "needs 20"),
        (m.win_rate(np.empty(0)), "no decision closed a trade"),
        (m.profit_factor(np.empty(0)), "no decision closed a trade"),
        (m.profit_factor(np.ones(3)), "at a loss"),
        (m.information_ratio(np.ones(9), np.ones(9), 252), "do not differ"),
        (m.information_ratio(np.ones(1), np.ones(1), 252), "needs 2"),
        (m.market_line(np.ones(2), np.ones(2), 252)["alpha"], "needs 3"),
        (m.market_line(np.arange(9.0), np.ones(9), 252)["beta_t"], "does not vary"),
        (m.market_line(np.arange(9.0), np.arange(9.0), 252)["beta_t"], "fits exactly"),
        (m.spearman(np.ones(2), np.ones(2)), "needs 3"),
        (m.trade_metrics(np.empty(0), 0)["average_trade_profit"], "no decision"),
    ],
)
def test_undefined_is_none_with_a_reason(measured: m.Measured, words: str) -> None:
    assert measured.value is None
    assert measured.reason is not None
    assert words in measured.reason


def test_growth_that_overflows_is_not_a_number_anyone_should_see() -> None:
    assert m.calmar(np.array([1.0, 1e6, 9e5]), 252).value is None


def test_length_of_the_deepest_drawdown() -> None:
    equity = np.array([10.0, 11.0, 10.5, 11.5, 8.0, 9.0, 11.5, 12.0, 11.9])
    assert m.max_drawdown(equity).value == pytest.approx(8.0 / 11.5 - 1.0)
    assert m.max_drawdown_bars(equity).value == 3.0
    assert m.max_drawdown_bars(equity[:6]).value == 2.0
    assert m.max_drawdown_bars(np.array([1.0, 2.0, 3.0])).value == 0.0


def test_trades() -> None:
    figures = m.trade_metrics(np.array([3.0, -1.0, 0.0, 2.0]), 9)
    assert m.values(figures) == {
        "win_rate": 0.5,
        "profit_factor": 5.0,
        "average_trade_profit": 1.0,
        "total_trades": 4.0,
        "total_orders": 9.0,
    }
    assert m.reasons(figures) == {}


def test_forecasts_stand_beside_always_up() -> None:
    expected = np.array([0.01, 0.02, -0.01, np.nan, 0.03, -0.02, 0.01])
    realised = np.array([0.02, -0.01, -0.02, 0.01, 0.01, 0.00, np.nan])
    figures = m.values(m.forecast_metrics(expected, realised))
    assert figures["direction_accuracy"] == pytest.approx(3 / 4)
    assert figures["direction_base_rate"] == pytest.approx(2 / 4)
    assert figures["hit_rate_down_days"] == pytest.approx(1 / 2)
    assert figures["pred_positive_share"] == pytest.approx(4 / 6)
    assert figures["n_forecasts"] == 6.0
    always_up = m.values(m.forecast_metrics(np.full(7, 0.001), realised))
    assert always_up["direction_accuracy"] == always_up["direction_base_rate"]
    assert always_up["hit_rate_down_days"] == 0.0
    assert always_up["information_coefficient"] is None


def test_no_forecasts_have_no_figures() -> None:
    figures = m.forecast_metrics(np.full(4, np.nan), np.zeros(4))
    undefined = {name for name, measured in figures.items() if measured.value is None}
    assert undefined == set(figures) - {"n_forecasts"}
    assert set(m.reasons(figures)) == undefined


def test_headline_is_after_costs() -> None:
    returns, market = sample(1)
    target = np.sign(market)
    ledger = account(target, returns, CostModel(commission_bps=20.0))
    figures = m.values(m.ledger_metrics(ledger, ledger.net_return, 252))
    assert figures["sharpe_ratio"] == figures["cost_adjusted_sharpe"]
    assert figures["gross_sharpe_ratio"] > figures["sharpe_ratio"]
    assert figures["total_transaction_costs"] == pytest.approx(ledger.trade_cost.sum())
    assert figures["turnover"] == pytest.approx(ledger.turnover[1:].mean() * 252)
    assert figures["exposure_mean"] == pytest.approx(ledger.held_weight[1:].mean())


def test_a_market_that_rests_gives_no_crash_and_no_nan() -> None:
    ledger = account(np.ones(60), np.zeros(60), CostModel(commission_bps=0.0, slippage_bps=0.0))
    figures = m.ledger_metrics(ledger, ledger.net_return, 252)
    assert figures["sharpe_ratio"].value is None
    assert figures["beta"].value is None
    assert all(value is None or np.isfinite(value) for value in m.values(figures).values())


def test_one_row_gives_reasons() -> None:
    ledger = account(np.ones(1), np.zeros(1), CostModel())
    figures = m.ledger_metrics(ledger, ledger.net_return, 252)
    assert figures["turnover"].reason == figures["exposure_mean"].reason == "no bar was held"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_numbers_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match=r"returns\[2\]"):
        m.sharpe(np.array([0.0, 0.1, bad]), 252)


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match="shape"):
        m.sharpe(np.zeros((3, 2)), 252)
    with pytest.raises(DataError, match="must be equal"):
        m.market_line(np.zeros(4), np.zeros(5), 252)
    with pytest.raises(DataError, match="must be equal"):
        m.forecast_metrics(np.zeros(4), np.zeros(5))
    with pytest.raises(DataError, match="above 0"):
        m.drawdowns(np.array([0.0, 1.0]))


def test_a_figure_is_a_value_or_a_reason() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        m.Measured(1.0, "why")
    with pytest.raises(ValueError, match="exactly one"):
        m.Measured(None)
    with pytest.raises(ValueError, match="finite"):
        m.Measured(np.nan)


@pytest.mark.parametrize("came", [-0.4, -0.05, 0.0, 0.012, 0.02, 0.3])
@pytest.mark.parametrize(
    "band", [(-0.03, 0.01, 0.05), (-0.06, 0.012, 0.02), (0.0, 0.0, 0.04), (0.01, 0.01, 0.01)]
)
def test_the_crps_of_a_band_is_the_integral(came: float, band: tuple[float, float, float]) -> None:
    lower, median, upper = band
    x = np.linspace(-1.0, 1.0, 400_001)
    scale = np.where(x < median, median - lower, upper - median) / m.Z_90
    below = np.where(
        scale > 0, ndtr((x - median) / np.maximum(scale, 1e-300)), np.where(x < median, 0.0, 1.0)
    )
    integral = np.sum((below - (x >= came)) ** 2) * (x[1] - x[0])
    assert m.band_crps(came, median, lower, upper) == pytest.approx(integral, abs=1e-5)


def test_the_crps_of_a_symmetric_band_is_the_normals() -> None:
    # Gneiting and Raftery's equation 21 with sigma 1 at the centre: sqrt(2/pi) - 1/sqrt(pi).
    assert m.band_crps(0.0, 0.0, -m.Z_90, m.Z_90) == pytest.approx(0.2336949772551, abs=1e-12)


def test_overlapping_sums_of_a_slow_signal_count_once_per_horizon_and_those_of_a_quick_one_each():
    rng = np.random.default_rng(0)
    moves = rng.normal(size=20_000)
    overlapping = np.convolve(moves, np.ones(5), mode="valid")
    slow = m.overlap_error(overlapping, 5) / m.overlap_error(overlapping, 1)
    assert slow == pytest.approx(np.sqrt(5), rel=0.1)
    quick = overlapping * rng.normal(size=len(overlapping))
    assert m.overlap_error(quick, 5) / m.overlap_error(quick, 1) == pytest.approx(1.0, rel=0.1)
