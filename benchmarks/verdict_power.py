"""How often the verdict is `edge`: on noise, on a signal in one series, on a weak signal in many.

::

    python benchmarks/verdict_power.py [--runs 100] [--horizon 1] [--only null,single,pooled,costly] [--json]
    python benchmarks/verdict_power.py --model gbm,lstm,ensemble --only null,single

Every run simulates its own bars and goes through the whole training: features, screening, tuning, the
walk-forward, decided positions, verdict. A planted signal is carried by one feature of the registry, another
one in every run, with the stated rank correlation with the return over the horizon.

An edge must survive its costs, so what is found depends on them. An IC of .20 pays the default 8 bps a side;
one of .05 in features that change every day promises less than a round trip costs: the pooled case is judged
at 1 bp a side, and `costly` shows that at 8 bps the same forecasts, whose skill is as plain, are no edge.

The pooled verdict is that of the one model over all series. A symbol whose own rows deny it, with an IC of
zero or less, gets no edge all the same, and of one weak signal chance makes many such: how often the symbol
that was named kept the edge stands beside it.

An IC above .10 raises the leak alarm beside the label: no real price gives that much away, but here it was
planted. What counts is the label.

``--model`` names what is judged: boosters, network, and both joined, all from the same fits. The boosters
search with three trials a library (``--n-trials``) in place of the usual 30. The network is the usual one,
and ``--epochs`` makes it a cheaper one; its final fit, which no verdict sees, is left out. Where several are
named they look at the same prices one after the other, as the commands do, so that a later one is judged by
the limits that the looks before leave it; beside it stands how often it would be an edge as the first look.
A network that has collapsed is no edge, and leaves the boosters to forecast alone. Seeds from 1000 on are for
choosing settings, so that what is reported, of seeds below, was not chosen on itself.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from data.target_engineering import Dataset
from evaluation.accounting import CostModel
from inference.load_lstm_model import Sequences
from training.gbm_search import SearchConfig
from training.recipe import LSTMConfig, NetworkConfig, RecipeConfig, TrainerConfig
from training.train_ensemble import EnsembleTrainer
from training.train_gbm import GBMTrainer
from training.train_lstm import FittedLSTM, LSTMRecipe, LSTMTrainer
from utils.base import CollapsedError
from validation.gates import MAX_P_IC, MAX_P_RETURN, MIN_ACTIVE_RETURN
from validation.wfe_metrics import Run

FloatArray = npt.NDArray[np.float64]

N_BARS, VOLATILITY, DRIFT = 2_500, 0.015, 0.0003
SINGLE_IC, POOLED_IC, N_POOLED = 0.20, 0.05, 30
# Bodies and volumes of bars: a planted return moves them as little as it moves a coin.
CARRIERS = ("close_location", "volume_sma_ratio", "body_size", "volume_velocity_5d", "intraday_volatility")
CHEAP = CostModel(commission_bps=0.5, slippage_bps=0.5)
POOLED = frozenset({"pooled", "costly"})
GBM, LSTM, ENSEMBLE = MODELS = ("gbm", "lstm", "ensemble")
KEPT = ("leak_alarm", "ic", "p_ic", "p_return", "active_return_annual", "skill_over_drift")
COLLAPSED = {"label": "collapsed", "is_edge_at_first": False, **dict.fromkeys(KEPT)}
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


class WalkedRecipe(LSTMRecipe):
    """The network's recipe without its final fit, which takes two fifths of the time."""

    def fit_all(self, dataset: Dataset, record: pd.DataFrame) -> FittedLSTM:
        """Return the last fold's fit with the calibration that the final one would have."""
        labelled = dataset.take(np.flatnonzero(dataset.labelled))
        return self.fit(labelled, fold=1, earlier=record)


class NetworkWalker(LSTMTrainer):
    """Walks the network forward and judges it; what it leaves is not to be served."""

    def recipe(self, dataset: Dataset) -> LSTMRecipe:
        """Return the recipe that is judged."""
        return WalkedRecipe(self.config.recipe, Sequences(dataset))


def verdict_of(case: str, seed: int, n_trials: int, horizon_bars: int) -> dict[str, Any]:
    """Simulate, train and judge the boosters once."""
    if case not in POOLED:
        return verdicts_of(case, seed, (GBM,), n_trials=n_trials, horizon_bars=horizon_bars)[GBM]
    config = TrainerConfig(
        horizon_bars=horizon_bars,
        recipe=RecipeConfig(search=SearchConfig(n_trials=0), seed=1 + seed),
        costs=CHEAP if case == "pooled" else CostModel(),
    )
    carrier, trainer = CARRIERS[seed % len(CARRIERS)], GBMTrainer(config)
    frames = {
        f"S{i:02d}": planted(1_000 * (seed + 1) + i, carrier, POOLED_IC, horizon_bars)
        for i in range(N_POOLED)
    }
    panel = fetched(frames)
    verdict = trainer.conclude(trainer.walk(panel), panel["S00"]).verdict
    # Of the pooled evidence, which decides, not the one symbol's.
    pooled = {name: verdict.evidence[f"universe_{name}"] for name in KEPT if name != "leak_alarm"}
    found = told({"label": "", "evidence": {"leak_alarm": verdict.evidence["leak_alarm"], **pooled}})
    label = "edge" if found["is_edge_at_first"] else "no-edge"
    return {"seed": seed, **found, "label": label, "label_of_symbol": verdict.label}


def verdicts_of(
    case: str,
    seed: int,
    models: Sequence[str],
    *,
    n_trials: int,
    horizon_bars: int,
    network: NetworkConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Simulate one series, train what ``models`` need on it, and judge each of them."""
    carrier = CARRIERS[seed % len(CARRIERS)]
    frame = noise(seed) if case == "null" else planted(seed, carrier, SINGLE_IC, horizon_bars)
    bars = fetched({"SIM": frame})["SIM"]
    found, members = {}, {}
    earlier: list[Run] = []
    if {GBM, ENSEMBLE} & set(models):
        recipe = RecipeConfig(search=SearchConfig(n_trials=n_trials), seed=1 + seed)
        boosters = GBMTrainer(TrainerConfig(horizon_bars=horizon_bars, recipe=recipe))
        members[GBM] = boosters.train(bars).bundle
        found[GBM] = told(members[GBM].metadata["verdict"])
        earlier.append(seen_as(boosters.runs({"SIM": bars})[0], members[GBM].metadata["verdict"]))
    if {LSTM, ENSEMBLE} & set(models):
        own = replace(network or NetworkConfig(), seed=1 + seed)
        trainer = NetworkWalker(LSTMConfig(horizon_bars=horizon_bars, recipe=own))
        (run,) = trainer.runs({"SIM": bars})
        try:
            members[LSTM] = trainer.train(bars, earlier=earlier).bundle
            found[LSTM] = told(members[LSTM].metadata["verdict"])
            run = seen_as(run, members[LSTM].metadata["verdict"])
        except CollapsedError:
            found[LSTM] = COLLAPSED
        earlier.append(run)
    if ENSEMBLE in models:
        found[ENSEMBLE] = found[GBM]
        if LSTM in members:
            joined = EnsembleTrainer(members[GBM], members[LSTM]).train(bars, earlier=earlier)
            weight = joined.metadata["parts"]["weights"][LSTM]
            found[ENSEMBLE] = {**told(joined.metadata["verdict"]), "weight_lstm": weight}
    return {name: {"seed": seed, **found[name]} for name in models}


def seen_as(run: Run, verdict: Mapping[str, Any]) -> Run:
    """Return the run as the log of verdicts would have it after its verdict."""
    return replace(run, label=verdict["label"], limits_share=verdict["evidence"]["limits_share"])


def told(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a verdict, and whether it would be `edge` if it were the first on its prices."""
    kept = {name: verdict["evidence"][name] for name in KEPT}
    limits = {"p_ic": MAX_P_IC, "p_return": MAX_P_RETURN}
    is_sure = all(kept[name] is not None and kept[name] <= limit for name, limit in limits.items())
    at_first = is_sure and kept["active_return_annual"] >= MIN_ACTIVE_RETURN and kept["skill_over_drift"] > 0
    return {"label": verdict["label"], "is_edge_at_first": at_first, **kept}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run every case and compare the shares of `edge` with their limits."""
    bars: dict[str, Bar] = {}
    runs: dict[str, Any] = {}
    seeds = range(args.first_seed, args.first_seed + args.runs)
    network = NetworkConfig(epochs=args.epochs)
    for case in args.only.split(","):
        start = time.perf_counter()
        if case in POOLED:
            one = delayed(verdict_of)
            each = Parallel(n_jobs=args.jobs)(one(case, seed, args.n_trials, args.horizon) for seed in seeds)
            found = [{GBM: run} for run in each]
        else:
            settings = {"n_trials": args.n_trials, "horizon_bars": args.horizon, "network": network}
            several = delayed(verdicts_of)
            found = Parallel(n_jobs=args.jobs)(several(case, seed, args.model, **settings) for seed in seeds)
        seconds = (time.perf_counter() - start) / args.runs
        for name in found[0]:
            own = [run[name] for run in found]
            key = case if name == GBM else f"{case}, {name}"
            bars[key] = judged(case, own) | {"run_s": seconds}
            runs[key] = own
    return {"bars": bars, "runs": runs}


def judged(case: str, runs: Sequence[Mapping[str, Any]]) -> Bar:
    """Return the share of `edge` beside its limit, and the mean IC of the runs that have one."""
    share = float(np.mean([run["label"] == "edge" for run in runs]))
    first = float(np.mean([run["is_edge_at_first"] for run in runs]))
    sense, limit = LIMITS[case]
    known = [run["ic"] for run in runs if run["ic"] is not None]
    collapsed = sum(run["label"] == "collapsed" for run in runs)
    ic = float(np.mean(known)) if known else 0.0
    found = sense(share, limit) | {"ic": ic, "collapsed": collapsed, "share_at_first": first}
    if case in POOLED:
        found["share_of_symbol"] = float(np.mean([run["label_of_symbol"] == "edge" for run in runs]))
    return found


def models(text: str) -> list[str]:
    """Return the models that are named, as `MODELS` orders them."""
    names = text.split(",")
    if unknown := set(names) - set(MODELS):
        raise argparse.ArgumentTypeError(
            f"no model {', '.join(sorted(unknown))}: choose of {', '.join(MODELS)}"
        )
    return [name for name in MODELS if name in names]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default=GBM, type=models, help="of gbm, lstm, ensemble, with commas")
    parser.add_argument("--runs", type=int, default=100, help="simulated trainings of each case")
    parser.add_argument("--n-trials", type=int, default=3, help="trials of each library's search")
    parser.add_argument("--horizon", type=int, default=1, help="bars ahead")
    parser.add_argument("--epochs", type=int, default=NetworkConfig().epochs, help="of the network, at most")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first training")
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
        collapsed = f", {bar['collapsed']} networks collapsed" if bar["collapsed"] else ""
        first = f", {bar['share_at_first']:.0%} as a first look" if case.endswith((LSTM, ENSEMBLE)) else ""
        named = f", {bar['share_of_symbol']:.0%} for the named symbol" if case in POOLED else ""
        print(f"    mean IC {bar['ic']:.4f}, {bar['run_s']:.1f} s each{first}{named}{collapsed}")
    return finish(found, found["bars"].values(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
