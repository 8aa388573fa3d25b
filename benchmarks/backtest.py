"""How long sizing, books and equity take over AAPL's history, against a plain loop and against vectorbt.

The plain loop is one numba function over the same state and rules (half-kelly with its breaker), and nothing
else: no checks, no ledger. vectorbt is measured where it is installed; it is no dependency of the project
(``pip install vectorbt``), and its bars are named as skipped where it is not. Parameter sets run on all
processors, on the clock; calls of vectorbt hold the interpreter's lock.

Contenders take turns and only time on the processor counts, so that a busy machine slows all of them alike;
medians are compared.

    python benchmarks/backtest.py [--quick] [--json]
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
from _table import Bar, at_least, at_most, parser_of, show
from numba import njit

from evaluation.accounting import DEFAULT_CAPITAL, CostModel, account, new_books
from evaluation.advanced_backtester import AdvancedBacktester, BacktestReport
from evaluation.metrics import drawdowns
from inference.position_sizing import (
    PRESETS,
    RuleSizer,
    SizingInputs,
    SizingRules,
    _columns,
    _fold,
    _Scales,
    make_sizer,
)
from utils.base import PROJECT_ROOT

AAPL = PROJECT_ROOT.parent / "shared" / "market" / "AAPL.csv"
BARS = 11_355
HORIZON_BARS = 5
SETS = 200
LIMIT_TO_PLAIN = 2.0
LIMIT_VECTORBT = 15.0
LIMIT_VECTORBT_SETS = 50.0
COSTS = CostModel()
Contender = Callable[[], Any]


def closes() -> np.ndarray:
    """Return AAPL's adjusted closes where they are at hand, else seeded ones of the same number."""
    if AAPL.is_file():
        return pd.read_csv(AAPL)["Adj Close"].to_numpy(dtype=np.float64)[-BARS:]
    rng = np.random.default_rng(7)
    return 20.0 * np.exp(np.cumsum(0.0003 + 0.012 * rng.standard_t(5, BARS)))


def inputs_of(close: np.ndarray) -> SizingInputs:
    """Return forecasts as honest ones are: small, slow, and absent for the first three years."""
    rng = np.random.default_rng(11)
    n = len(close)
    returns = np.zeros(n)
    returns[1:] = close[1:] / close[:-1] - 1.0
    noise = rng.standard_normal(n)
    slow = np.zeros(n)
    for t in range(1, n):
        slow[t] = 0.9 * slow[t - 1] + 0.436 * noise[t]
    daily = np.sqrt(pd.Series(returns**2).ewm(halflife=20, min_periods=1).mean().to_numpy()) + 0.004
    expected = 0.002 + 0.004 * slow
    expected[:756] = np.nan
    return SizingInputs(
        expected_return=expected,
        baseline_return=np.full(n, 0.002),
        sigma=daily * np.sqrt(HORIZON_BARS),
        p_win=np.full(n, 0.55),
        payoff_ratio=np.full(n, 1.05),
        skill_lower=np.full(n, 0.3),
        asset_return_simple=returns,
        horizon_bars=HORIZON_BARS,
    )


@njit(cache=True, error_model="numpy")
def plain_loop(  # noqa: C901, PLR0912 one loop, written down as one writes it without a house around it
    columns: tuple[np.ndarray, ...], returns: np.ndarray, out: tuple[np.ndarray, ...]
) -> None:
    """Half-kelly with breaker, one lag, costs on turnover, financing, borrow fee, equity."""
    expected, sigma, p_win, payoff = columns
    target, equity = out
    cost, financing, borrow = 8e-4, 0.05 / 252.0, 0.03 / 252.0
    cash, position, weight, started = 10_000.0, 0.0, 0.0, False
    peak, trough, capped = 10_000.0, 10_000.0, -1
    root = np.sqrt(252.0 / 5.0)
    for t in range(expected.shape[0]):
        worth = cash + position
        gap = weight * worth - position
        if abs(gap) > 1e-9 * worth:
            side = 1.0 if gap > 0.0 else -1.0
            worth -= cost * abs(gap) / (1.0 + side * weight * cost)
            position = weight * worth
            cash = worth - position
        if cash < 0.0:
            cash += financing * cash
        if position < 0.0:
            cash += borrow * position
        position *= 1.0 + returns[t]
        worth = cash + position
        if capped < 0:
            peak = max(peak, worth)
            if worth < 0.85 * peak:
                capped, trough = 0, worth
        else:
            trough = min(trough, worth)
            capped += 1
            if worth >= trough * 1.01875 or capped >= 126:
                capped, peak = -1, worth
        if np.isfinite(expected[t]):
            started = True
            weight = 0.0
            if abs(expected[t]) > 0.001:
                risk = max(p_win[t] - (1.0 - p_win[t]) / payoff[t], 0.0) * 0.5
                weight = risk / sigma[t] * min(abs(expected[t]) / sigma[t] * root, 1.0)
                if expected[t] < 0.0:
                    weight = -weight
        elif not started:
            weight = 0.0
        if capped >= 0:
            weight = min(max(weight, -0.25), 0.25)
        weight = min(max(weight, -0.3), 1.0)
        target[t] = weight
        equity[t] = worth


def parameter_sets(count: int) -> list[RuleSizer]:
    """Return half-kelly under many limits and fractions."""
    rng = np.random.default_rng(3)
    rules = PRESETS["half-kelly"]
    return [
        RuleSizer(name="try", rules=rules._replace(kelly_fraction=fraction, max_long=long))
        for fraction, long in rng.uniform([0.2, 0.5], [1.0, 1.8], (count, 2)).tolist()
    ]


@njit(cache=True, nogil=True, error_model="numpy")
def value_and_drawdown(books: np.ndarray, value: np.ndarray, drawdown: np.ndarray) -> None:
    """Write what the books were worth at each close, and how far that lay below its highest."""
    peak = 0.0
    for t in range(value.shape[0]):
        value[t] = books[t, 0] + books[t, 1]
        peak = max(peak, value[t])
        drawdown[t] = value[t] / peak - 1.0


def sweep(sizers: Sequence[RuleSizer], inputs: SizingInputs) -> tuple[np.ndarray, np.ndarray]:
    """Fold every parameter set into the same memory; return value and drawdown of the last.

    The fold is the sizer's own. Memory is what many sets cost most: fresh books of 800 kB are mapped and
    cleared by the operating system for every one of them.
    """
    columns = _columns(inputs)
    n = len(columns.sigma)
    books, out = new_books(n, DEFAULT_CAPITAL), (np.empty(n), np.empty(n, np.bool_))
    value, drawdown = np.empty(n), np.empty(n)
    for sizer in sizers:
        band = sizer.rules.no_trade_band_scale * float(np.cbrt(COSTS.one_way_rate))
        hurdle = sizer.rules.cost_hurdle * COSTS.one_way_rate
        scales = _Scales(COSTS.rates(), band, hurdle, COSTS.periods_per_year / inputs.horizon_bars)
        _fold(columns, SizingRules._make(map(float, sizer.rules)), scales, books, out)
        value_and_drawdown(books, value, drawdown)
    return value, drawdown


def assert_same_sweep(sizers: Sequence[RuleSizer], inputs: SizingInputs) -> None:
    """Refuse a sweep whose sets are not what the sizers do one by one."""
    for place, sizer in enumerate(sizers):
        value, drawdown = sweep(sizers[: place + 1], inputs)
        equity = sizer.trace(inputs, COSTS).ledger.equity
        np.testing.assert_array_equal(value, equity)
        np.testing.assert_allclose(drawdown, drawdowns(equity), atol=1e-15)


def vectorbt_call(close: np.ndarray, target: np.ndarray) -> Contender | None:
    """Return one run of vectorbt with value and drawdown, or None where it is not installed."""
    if importlib.util.find_spec("vectorbt") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vbt = importlib.import_module("vectorbt")
    prices, weights = pd.Series(close), pd.Series(target)

    def call() -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            portfolio = vbt.Portfolio.from_orders(
                prices,
                size=weights,
                size_type="targetpercent",
                direction="both",
                fees=COSTS.commission_bps * 1e-4,
                slippage=COSTS.slippage_bps * 1e-4,
                init_cash=10_000.0,
                freq="1D",
            )
            return portfolio.value(), portfolio.drawdown()

    return call


def seconds(calls: dict[str, Contender], repeats: int) -> dict[str, float]:
    """Return the median time of each call; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def import_seconds() -> float:
    """Return what a fresh process pays for the first sizing and books from numba's cache, imports apart."""
    code = (
        "import time, numpy as np\n"
        "from evaluation.accounting import CostModel, account\n"
        "from inference.position_sizing import SizingInputs, make_sizer\n"
        "one = np.ones(9)\n"
        "inputs = SizingInputs(expected_return=one, baseline_return=one, sigma=one, p_win=one,\n"
        "    payoff_ratio=one, skill_lower=one, asset_return_simple=0.0 * one, horizon_bars=5)\n"
        "start = time.perf_counter()\n"
        "account(make_sizer().fold(inputs, CostModel()), 0.0 * one, CostModel())\n"
        "print(time.perf_counter() - start)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def measure(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Take all times and compare them with their limits."""
    close = closes()
    inputs, half_kelly, n = inputs_of(close), make_sizer("half-kelly"), len(close)
    out = tuple(np.empty(n) for _ in range(2))
    columns = (inputs.expected_return, inputs.sigma, inputs.p_win, inputs.payoff_ratio)
    target = half_kelly.fold(inputs, COSTS)
    dates, known = pd.bdate_range("1960-01-04", periods=n), np.ones(n, dtype=np.bool_)
    backtester = AdvancedBacktester(costs=COSTS)
    calls: dict[str, Contender] = {
        "plain loop": lambda: plain_loop(columns, inputs.asset_return_simple, out),
        "sizing, books, equity": lambda: half_kelly.trace(inputs, COSTS),
        "the same, with drawdown": lambda: drawdowns(half_kelly.trace(inputs, COSTS).ledger.equity),
        "books of given weights": lambda: account(target, inputs.asset_return_simple, COSTS),
    }
    notes: dict[str, Any] = {"source": AAPL.name if AAPL.is_file() else "seeded", "bars": n}
    vectorbt = vectorbt_call(close, target)
    repeats = 15 if quick else 101
    times = seconds(calls, repeats)
    if vectorbt is not None:
        # Apart from the others: it leaves the caches cold for whoever comes next.
        times |= seconds({"vectorbt from_orders": vectorbt}, repeats)
    assert_same_books(half_kelly, inputs, out)

    def report() -> BacktestReport:
        return backtester.backtest_with_positions(dates, close, target, is_out_of_sample=known)

    times |= seconds({"full report": report}, 3 if quick else 9)
    times["first call from cache"] = import_seconds()
    ratio = times["sizing, books, equity"] / times["plain loop"]
    bars: dict[str, Bar] = {"sizing_and_books_to_plain_loop": at_most(ratio, LIMIT_TO_PLAIN)}
    if vectorbt is None:
        notes["vectorbt"] = "skipped, 2 bars not measured: the package vectorbt is not installed"
    else:
        bars |= against_vectorbt(times, inputs, vectorbt, count=20 if quick else SETS)
    milliseconds = {name: 1000.0 * value for name, value in times.items()}
    return {"bars": bars, "milliseconds": milliseconds, "notes": notes}


def assert_same_books(sizer: RuleSizer, inputs: SizingInputs, out: tuple[np.ndarray, ...]) -> None:
    """Refuse to compare the speed of things that do not agree."""
    trace = sizer.trace(inputs, COSTS)
    np.testing.assert_allclose(out[0], trace.target_weight, atol=1e-12)
    np.testing.assert_allclose(out[1], trace.ledger.equity, rtol=1e-10)


def against_vectorbt(
    times: dict[str, float], inputs: SizingInputs, vectorbt: Contender, *, count: int
) -> dict[str, Bar]:
    """Compare one run and ``count`` parameter sets with as many calls of vectorbt; note the times."""
    sizers = parameter_sets(count)
    assert_same_sweep(sizers[:5], inputs)
    share = max(1, -(-len(sizers) // (os.cpu_count() or 1)))
    parts = [sizers[start : start + share] for start in range(0, len(sizers), share)]
    taken: dict[str, list[float]] = {"sets": [], "calls": []}
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(lambda part: sweep(part, inputs), parts))
            taken["sets"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in sizers:
                vectorbt()
            taken["calls"].append(time.perf_counter() - start)
    times[f"{count} parameter sets"] = statistics.median(taken["sets"])
    times[f"{count} calls of vectorbt"] = statistics.median(taken["calls"])
    once = times["vectorbt from_orders"] / times["the same, with drawdown"]
    many = times[f"{count} calls of vectorbt"] / times[f"{count} parameter sets"]
    return {
        "times_faster_than_vectorbt": at_least(once, LIMIT_VECTORBT),
        "parameter_sets_times_faster": at_least(many, LIMIT_VECTORBT_SETS),
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, fewer parameter sets")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; exit 1 when a limit is missed."""
    arguments = build_parser().parse_args(argv)
    return show(measure(quick=arguments.quick), as_json=arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
