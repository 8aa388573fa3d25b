"""What tuning, and how often it is redone, does to out-of-sample skill and to time, one symbol at a time.

::

    python benchmarks/tuning_schedule.py [--symbols IBM,XOM,...] [--bars 3000] [--json] [--directory DIR]

Each symbol is walked forward alone on its last bars, under every schedule with the same seed. The last rows
plant a feature with a rank correlation of .20 instead, where there is something to find.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from _table import finish, load_folder, parser_of
from forecast_skill import information_coefficients
from rich.console import Console
from rich.table import Table
from verdict_power import CARRIERS, planted

from data.target_engineering import build_dataset
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, RecipeConfig
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

SYMBOLS = "IBM,XOM,KO,JPM,MSFT,UNP,XLE,SPY"
N_TRIALS, N_PLANTED = 30, 4
SCHEDULES = {"never (careful settings)": 0, "every 10 folds": 10, "every 3 folds": 3, "every fold": 1}


def score(frame: pd.DataFrame, horizon_bars: int, every_folds: int) -> tuple[float, float, float]:
    """Walk one symbol forward; return its IC, the seconds, and the share of folds with a tuned setting."""
    data = build_dataset({"X": frame}, horizon_bars)
    search = SearchConfig(n_trials=N_TRIALS if every_folds else 0)
    recipe = GBMRecipe(RecipeConfig(search=search, tune_every_folds=max(every_folds, 1)))
    start = time.perf_counter()
    result = WalkForwardValidator(WalkForwardConfig(n_resamples=100)).run(data, recipe)
    seconds = time.perf_counter() - start
    tuned = [not found.is_careful for one in recipe.searches for found in one.values()]
    record = result.record[result.record["realised_log"].notna()]
    return information_coefficients(record)["X"], seconds, float(np.mean(tuned))


def measure(frames: Mapping[str, pd.DataFrame], horizon_bars: int) -> dict[str, dict[str, float]]:
    """Score all frames under every schedule."""
    found = {}
    for name, every in SCHEDULES.items():
        rows = np.array([score(frame, horizon_bars, every) for frame in frames.values()])
        ic, seconds, tuned = rows.mean(axis=0)
        found[name] = {"ic": float(ic), "seconds": float(seconds), "searches_that_earned_it": float(tuned)}
    return found


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--symbols", default=SYMBOLS, help="series of the folder, with commas")
    parser.add_argument("--bars", type=int, default=3_000, help="last bars of each")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print skill and time under each schedule."""
    args = build_parser().parse_args(argv)
    panel = load_folder(args.directory, args.symbols.split(","))
    real = {symbol: bars.frame.iloc[-args.bars :] for symbol, bars in panel.items()}
    table = Table(
        title=f"{len(real)} series of {args.bars} bars, {N_TRIALS} trials a library", title_justify="left"
    )
    for name in ("bars ahead", "series", "tuning", "mean IC", "seconds a symbol", "searches that earned it"):
        table.add_column(name)
    found = {}
    for horizon in (1, 5):
        made = {str(seed): planted(seed, CARRIERS[seed], 0.2, horizon) for seed in range(N_PLANTED)}
        for kind, frames in (("real", real), ("planted", made)):
            found[f"{kind}, h={horizon}"] = schedules = measure(frames, horizon)
            for name, row in schedules.items():
                figures = (
                    f"{row['ic']:.4f}",
                    f"{row['seconds']:.1f}",
                    f"{row['searches_that_earned_it']:.0%}",
                )
                table.add_row(str(horizon), kind, name, *figures)
    Console(width=120).print(table)
    return finish(found, (), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
