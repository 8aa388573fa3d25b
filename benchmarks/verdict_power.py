"""How often the verdict is `edge`: on noise, on a signal in one series, on a weak signal in many.

::

    python benchmarks/verdict_power.py [--runs 100] [--horizon 1] [--only null,single,pooled,costly] [--json]

Every run simulates its own bars and goes through the whole training: features, screening, tuning, the
walk-forward, decided positions, verdict. A planted signal is carried by one feature of the registry, another
one in every run, with the stated rank correlation with the return over the horizon.

An edge must survive its costs, so what is found depends on them. An IC of .20 pays the default 8 bps a side;
one of .05 in features that change every day promises less than a round trip costs: the pooled case is judged
at 1 bp a side, and `costly` shows that at 8 bps the same forecasts, whose skill is as plain, are no edge.

An IC above .10 raises the leak alarm beside the label: no real price gives that much away, but here it was
planted. What counts is the label.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _table import Bar, at_least, at_most, finish, parser_of, print_bar
from joblib import Parallel, delayed
from scipy.stats import norm, rankdata

from data.data_fetcher import fetch_stock_data
from data.feature_engineer import engineer_features
from data.schema import Bars
from evaluation.accounting import CostModel
from training.gbm_search import SearchConfig
from training.recipe import RecipeConfig, TrainerConfig
from training.train_gbm import GBMTrainer

FloatArray = npt.NDArray[np.float64]

N_BARS, VOLATILITY, DRIFT = 2_500, 0.015, 0.0003
SINGLE_IC, POOLED_IC, N_POOLED = 0.20, 0.05, 30
# Bodies and volumes of bars: a planted return moves them as little as it moves a coin.
CARRIERS = ("close_location", "volume_sma_ratio", "body_size", "volume_velocity_5d", "intraday_volatility")
CHEAP = CostModel(commission_bps=0.5, slippage_bps=0.5)
POOLED = frozenset({"pooled", "costly"})
LIMITS = {
    "null": (at_most, 0.05),
    "single": (at_least, 0.85),
    "pooled": (at_least, 0.90),
    "costly": (at_most, 1.0),
}


class Simulated:
    """A price source that simulates; speaks as the sources of `data.data_fetcher` do."""

    name = "simulated"
    is_live = False
    news = None

    def __init__(self, bars: Mapping[str, pd.DataFrame]) -> None:
        self._bars = bars

    def fetch(self, symbol: str, *, start: object = None) -> pd.DataFrame:
        """Return the bars of a symbol in Yahoo's columns."""
        bars = self._bars[symbol]
        return bars.assign(**{"Adj Close": bars["Close"]})


def fetched(frames: Mapping[str, pd.DataFrame]) -> dict[str, Bars]:
    """Pass simulated bars through the front door."""
    source = Simulated(frames)
    return {symbol: fetch_stock_data(symbol, source=source) for symbol in frames}


def bars_from(returns: FloatArray, rng: np.random.Generator) -> pd.DataFrame:
    """Return bars whose closes earn ``returns``; ranges and volumes say nothing."""
    n, scale = len(returns), VOLATILITY
    close = 100.0 * np.exp(np.cumsum(returns))
    opened = np.concatenate([[100.0], close[:-1]]) * np.exp(0.3 * scale * rng.standard_normal(n))
    high = np.maximum(opened, close) * np.exp(np.abs(0.4 * scale * rng.standard_normal(n)))
    low = np.minimum(opened, close) * np.exp(-np.abs(0.4 * scale * rng.standard_normal(n)))
    volume = np.round(np.exp(14.0 + 0.4 * rng.standard_normal(n)))
    index = pd.bdate_range("2005-01-03", periods=n, name="date")
    columns = {"Open": opened, "High": high, "Low": low, "Close": close, "Volume": volume}
    return pd.DataFrame(columns, index=index)


def noise(seed: int) -> pd.DataFrame:
    """Return a random walk for an even seed; with drift and clusters of volatility for an odd one."""
    rng = np.random.default_rng([seed, 1])
    shocks = rng.standard_normal(N_BARS)
    if seed % 2 == 0:
        return bars_from(VOLATILITY * shocks, rng)
    variance, returns = VOLATILITY**2, np.empty(N_BARS)
    for t, shock in enumerate(shocks):
        returns[t] = DRIFT + np.sqrt(variance) * shock
        variance = 0.05 * VOLATILITY**2 + 0.10 * (returns[t] - DRIFT) ** 2 + 0.85 * variance
    return bars_from(returns, rng)


def planted(seed: int, carrier: str, ic: float, horizon_bars: int) -> pd.DataFrame:
    """Return bars in which ``carrier`` has the rank correlation ``ic`` with the return over the horizon."""
    rng = np.random.default_rng([seed, 2])
    bars = bars_from(DRIFT + VOLATILITY * np.sqrt(1 - ic**2) * rng.standard_normal(N_BARS), rng)
    feature = engineer_features(bars)[carrier].to_numpy()
    known = np.isfinite(feature)
    signal = np.zeros(N_BARS)
    signal[known] = norm.ppf((rankdata(feature[known]) - 0.5) / known.sum())
    # Spread over the horizon; then scaled so that the sum over the horizon correlates as stated.
    daily = np.concatenate([[0.0], np.convolve(signal, np.ones(horizon_bars))[: N_BARS - 1]])
    ahead = np.convolve(daily, np.ones(horizon_bars))[horizon_bars:N_BARS]
    covariance = float(np.mean(signal[: len(ahead)] * ahead))
    pearson = 2 * np.sin(np.pi * ic / 6)
    lift = np.exp(np.cumsum(daily * pearson * VOLATILITY * np.sqrt(horizon_bars) / covariance))
    return bars.assign(**{name: bars[name] * lift for name in ("Open", "High", "Low", "Close")})


def verdict_of(case: str, seed: int, n_trials: int, horizon_bars: int) -> dict[str, Any]:
    """Simulate, train and judge once."""
    search = SearchConfig(n_trials=0 if case in POOLED else n_trials)
    config = TrainerConfig(
        horizon_bars=horizon_bars,
        recipe=RecipeConfig(search=search, seed=1 + seed),
        costs=CHEAP if case == "pooled" else CostModel(),
    )
    carrier = CARRIERS[seed % len(CARRIERS)]
    trainer = GBMTrainer(config)
    if case in POOLED:
        frames = {
            f"S{i:02d}": planted(1_000 * (seed + 1) + i, carrier, POOLED_IC, horizon_bars)
            for i in range(N_POOLED)
        }
        panel = fetched(frames)
        verdict = trainer.conclude(trainer.walk(panel), panel["S00"]).verdict
    else:
        frame = noise(seed) if case == "null" else planted(seed, carrier, SINGLE_IC, horizon_bars)
        verdict = trainer.train(fetched({"SIM": frame})["SIM"]).verdict
    kept = ("ic", "p_ic", "p_return", "skill_over_drift")
    if case in POOLED:
        kept = tuple(f"universe_{name}" for name in kept)
    return {
        "seed": seed,
        "label": verdict.label,
        "leak_alarm": verdict.evidence["leak_alarm"],
        **{name.removeprefix("universe_"): verdict.evidence[name] for name in kept},
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run every case and compare the shares of `edge` with their limits."""
    bars: dict[str, Bar] = {}
    runs: dict[str, Any] = {}
    for case in args.only.split(","):
        start = time.perf_counter()
        one = delayed(verdict_of)
        found = Parallel(n_jobs=args.jobs)(
            one(case, seed, args.n_trials, args.horizon) for seed in range(args.runs)
        )
        share = float(np.mean([run["label"] == "edge" for run in found]))
        sense, limit = LIMITS[case]
        mean_ic = float(np.mean([run["ic"] for run in found]))
        seconds = (time.perf_counter() - start) / args.runs
        bars[case] = sense(share, limit) | {"ic": mean_ic, "run_s": seconds}
        runs[case] = found
    return {"bars": bars, "runs": runs}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=100, help="simulated trainings of each case")
    parser.add_argument("--n-trials", type=int, default=3, help="trials of each library's search")
    parser.add_argument("--horizon", type=int, default=1, help="bars ahead")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", default="null,single,pooled", help="cases, with commas")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print how often each case was called an edge; exit 1 when a limit is missed."""
    args = build_parser().parse_args(argv)
    found = measure(args)
    print(f"{args.runs} trainings each, {N_BARS} bars, {args.horizon} bars ahead, {args.n_trials} trials")
    for case, bar in found["bars"].items():
        print_bar(f"{case}, share called an edge", bar)
        print(f"    mean IC {bar['ic']:.4f}, {bar['run_s']:.1f} s each")
    return finish(found, found["bars"].values(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
