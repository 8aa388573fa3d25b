"""Time and memory of training: the search against a naive one, one symbol, a pooled universe, many symbols.

::

    python benchmarks/training_time.py [--only search,single,pooled,jobs,memory] [--json] [--directory DIR]

The naive search is what one writes first: scikit-learn's wrappers in `cross_val_score`, on the same rows, the
same purged blocks, the same spaces and the same number of trials, with every core, nothing binned twice being
spared, nothing stopped early, nothing pruned.

``memory`` fits both libraries once on a large made-up panel, 500 symbols of 5,000 rows of 70 features.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import optuna
import pandas as pd
import xgboost
from _table import Bar, at_least, at_most, finish, load_folder, parser_of, print_bar, seen, symbols_in
from sklearn.model_selection import cross_val_score

from data.data_splitter import PurgedTimeSeriesSplit
from data.target_engineering import Dataset, build_dataset
from training.gbm_search import LIBRARIES, Rows, SearchConfig, tune
from training.recipe import GBMRecipe, RecipeConfig, training_rows
from utils.base import PROJECT_ROOT

SYMBOL, N_TRIALS = "AAPL", 30
N_SYMBOLS, N_SESSIONS, N_FEATURES = 500, 5_000, 70
# XGBoost's wrapper calls some parameters otherwise.
WRAPPED = {"eta": "learning_rate", "alpha": "reg_alpha", "lambda": "reg_lambda"}
Case = Callable[[argparse.Namespace], dict[str, Bar]]


def rows_of(directory: Path) -> Rows:
    """Return the symbol's training rows."""
    bars = load_folder(directory, [SYMBOL])[SYMBOL].frame
    data = build_dataset({SYMBOL: bars})
    data = data.take(np.flatnonzero(data.labelled))
    return training_rows(data, data.features, RecipeConfig())


def naive_search(name: str, rows: Rows, config: SearchConfig, seed: int) -> float:
    """Return the best score of a search as one writes it first."""
    splitter = PurgedTimeSeriesSplit(
        config.n_inner_blocks, test_size_bars=len(rows) // (2 * config.n_inner_blocks)
    )
    blocks = list(splitter.split(len(rows), rows.label_end_position))

    def objective(trial: optuna.Trial) -> float:
        drawn = LIBRARIES[name].suggest(trial, len(rows))
        params: dict[str, Any] = {WRAPPED.get(key, key): value for key, value in drawn.items()}
        params |= {"n_estimators": config.max_rounds, "random_state": seed, "n_jobs": os.cpu_count()}
        if name == "xgb":
            model = xgboost.XGBRegressor(**params, verbosity=0)
        else:
            model = lightgbm.LGBMRegressor(**params, bagging_freq=1, verbosity=-1)
        scores = cross_val_score(
            model, rows.features, rows.target_scaled, cv=blocks, scoring="neg_root_mean_squared_error"
        )
        return -float(scores.mean())

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=config.n_trials)
    return float(study.best_value)


def search_case(args: argparse.Namespace) -> dict[str, Bar]:
    """Compare the two searches on the same rows."""
    rows, config = rows_of(args.directory), SearchConfig(n_trials=N_TRIALS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = time.perf_counter()
    ours = tune(rows, config, seed=1)
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about feature names that nobody gave
        naive = {name: naive_search(name, rows, config, seed=1) for name in config.models}
    naive_s = time.perf_counter() - start
    found = {f"{n}_score_ratio": at_most((ours[n].inner_rmse or np.inf) / naive[n], 1.001) for n in naive}
    return {
        "search_times_faster": at_least(naive_s / ours_s, 8.0),
        **found,
        "search_s": seen(ours_s),
        "naive_s": seen(naive_s),
    }


def train(
    symbols: Sequence[str], directory: Path, *flags: str, one_core: bool = False
) -> tuple[float, float]:
    """Train by the command line; return seconds and the largest process's peak memory in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        places = {name: f"{folder}/{name.lower()}" for name in ("MODELS_DIR", "LOGS_DIR", "CACHE_DIR")}
        environment = os.environ | {f"AI_STOCKS_{name}": path for name, path in places.items()}
        command = [
            sys.executable,
            "-m",
            "training.train_gbm",
            *symbols,
            "--source",
            f"csv:{directory}",
            "--json",
        ]
        if one_core:
            command = ["taskset", "-c", "0", *command]
        start = time.perf_counter()
        subprocess.run([*command, *flags], env=environment, check=True, capture_output=True, cwd=PROJECT_ROOT)
        seconds = time.perf_counter() - start
    return seconds, peak_gib(resource.RUSAGE_CHILDREN)


def single_case(args: argparse.Namespace) -> dict[str, Bar]:
    """Train one symbol with the default settings."""
    seconds, gib = train([SYMBOL], args.directory)
    return {"single_s": at_most(seconds, 90.0), "single_peak_gib": at_most(gib, 1.5)}


def pooled_case(args: argparse.Namespace) -> dict[str, Bar]:
    """Train one model of every series in the folder."""
    symbols = symbols_in(args.directory)
    seconds, gib = train([SYMBOL], args.directory, "--universe", ",".join(symbols))
    return {"pooled_s": at_most(seconds, 300.0), "pooled_peak_gib": seen(gib)}


def jobs_case(args: argparse.Namespace) -> dict[str, Bar]:
    """Train several symbols in two processes, against half of the time that one core takes for them.

    One training keeps two cores busy for part of its time (each library has a thread), so that the figure to
    halve is that of one core; beside it, the time of one after the other on all cores.
    """
    symbols = symbols_in(args.directory)[: args.many]
    one_core, _ = train(symbols, args.directory, one_core=True)
    in_turn, _ = train(symbols, args.directory)
    side_by_side, gib = train(symbols, args.directory, "--jobs", "2")
    return {
        "jobs_ratio": at_most(side_by_side / (one_core / 2), 1.1),
        "jobs_s": seen(side_by_side),
        "in_turn_s": seen(in_turn),
        "one_core_s": seen(one_core),
        "jobs_peak_gib": seen(gib),
    }


def memory_case(_args: argparse.Namespace) -> dict[str, Bar]:
    """Fit the recipe on a large panel, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        seconds, gib = alone.submit(fit_large).result()
    return {"memory_peak_gib": at_most(gib, 6.0), "memory_fit_s": seen(seconds)}


def fit_large() -> tuple[float, float]:
    """Fit on a panel of noise; return seconds and the peak memory of this process in GiB."""
    rng, n, h = np.random.default_rng(7), N_SYMBOLS * N_SESSIONS, 5
    date = np.datetime64("2000-01-03") + np.arange(N_SESSIONS + h)
    data = Dataset(
        columns=tuple(f"f{i}" for i in range(N_FEATURES)),
        features=rng.standard_normal((n, N_FEATURES), dtype=np.float32),
        date=np.repeat(date[:N_SESSIONS], N_SYMBOLS),
        label_end=np.repeat(date[h:], N_SYMBOLS),
        symbol_code=np.tile(np.arange(N_SYMBOLS, dtype=np.int32), N_SESSIONS),
        symbols=tuple(f"S{i}" for i in range(N_SYMBOLS)),
        target_scaled=rng.standard_normal(n),
        target_log=np.zeros(n),
        sigma_log=np.full(n, 0.04),
        horizon_bars=h,
    )
    start = time.perf_counter()
    recipe = GBMRecipe(RecipeConfig(search=SearchConfig(n_trials=0)))
    recipe.fit(data, fold=0, earlier=pd.DataFrame())
    return time.perf_counter() - start, peak_gib(resource.RUSAGE_SELF)


def peak_gib(who: int) -> float:
    """Return the peak memory of this process, or of the largest of its children."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


CASES: dict[str, Case] = {
    "search": search_case,
    "single": single_case,
    "pooled": pooled_case,
    "jobs": jobs_case,
    "memory": memory_case,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--only", default="search,single,pooled", help=f"of {','.join(CASES)}")
    parser.add_argument("--many", type=int, default=8, help="symbols that `jobs` trains")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print each figure beside its limit; exit 1 when one is missed."""
    args = build_parser().parse_args(argv)
    found: dict[str, Bar] = {}
    for name in args.only.split(","):
        for measure, bar in CASES[name](args).items():
            found[measure] = bar
            print_bar(measure, bar)
    return finish(found, found.values(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
