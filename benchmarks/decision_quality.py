"""What the sizing presets make of the pooled forecasts, symbol by symbol, after costs.

::

    python benchmarks/decision_quality.py [--horizons 5,1] [--sweep] [--json] [--directory DIR]

Forecasts are those of the walk-forward of `forecast_skill`, with everything before the first scored year used
to calibrate; each preset then decides on every symbol alone, out of sample, 8 bps a side, with financing.
``--sweep`` also shows what other constants of `calibrated` would have done: its own were chosen from that,
on all symbols at once, so its figures here are not out of sample in the choice of constants.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _table import at_least, finish, load_folder, parser_of, print_bar
from forecast_skill import FIRST, LAST, panel_of
from rich.console import Console
from rich.table import Table

from evaluation.accounting import CostModel, account
from inference.position_sizing import PRESETS, RuleSizer, SizingInputs, make_sizer, win_record
from training.gbm_search import SearchConfig
from training.recipe import GBMRecipe, RecipeConfig
from validation.walk_forward import WalkForwardConfig, WalkForwardValidator

COSTS = CostModel()
# An index that nobody can buy.
NOT_TRADED = frozenset({"IXIC"})
LIMITS = {"sharpe_difference": 0.01, "share_better": 0.55, "share_drawdown_no_deeper": 0.90}
SWEEP = {
    "kelly_fraction": (0.5, 1.0, 2.0, 4.0, 8.0),
    "cost_hurdle": (0.0, 1.0, 1.5, 2.0, 3.0),
    "max_long": (1.0, 1.5),
}
FloatArray = npt.NDArray[np.float64]
Case = tuple[SizingInputs, FloatArray]


def cases_of(directory: Path, horizon_bars: int) -> dict[str, Case]:
    """Return what a sizer sees of each symbol from the first scored year on, and its returns."""
    data = panel_of(directory, horizon_bars)
    record = (
        WalkForwardValidator(WalkForwardConfig())
        .run(data, GBMRecipe(RecipeConfig(search=SearchConfig(n_trials=0))))
        .record
    )
    record = record[record["date"] >= FIRST]
    panel = load_folder(directory, [s for s in data.symbols if s not in NOT_TRADED])
    found = {}
    for symbol, bars in panel.items():
        rows = record[record["symbol"] == symbol].set_index("date")
        close = bars.frame["Close"].loc[:LAST].pct_change().reindex(rows.index)
        found[symbol] = (
            _inputs(rows, close, horizon_bars),
            np.nan_to_num(np.asarray(close, dtype=np.float64)),
        )
    return found


def _inputs(rows: pd.DataFrame, asset_return: "pd.Series[float]", horizon_bars: int) -> SizingInputs:
    mean, sigma = _floats(rows["predicted_log"]), _floats(rows["sigma_log"])
    p_win, payoff_ratio = win_record(mean, _floats(rows["realised_log"]), horizon_bars=horizon_bars)
    return SizingInputs(
        expected_return=np.expm1(mean + sigma**2 / 2),
        baseline_return=np.expm1(_floats(rows["baseline_log"]) + sigma**2 / 2),
        sigma=sigma,
        p_win=p_win,
        payoff_ratio=payoff_ratio,
        skill_lower=_floats(rows["skill_lower"]),
        asset_return_simple=np.nan_to_num(_floats(asset_return)),
        horizon_bars=horizon_bars,
    )


def _floats(values: "pd.Series[float]") -> FloatArray:
    return np.asarray(values, dtype=np.float64)


def compare(cases: Mapping[str, Case], sizer: RuleSizer, *, delay_bars: int = 0) -> dict[str, float]:
    """Set a sizer beside buy and hold on every symbol; return the means and shares.

    ``delay_bars`` takes every position so many sessions later: no close decides on itself.
    """
    rows = []
    for inputs, returns in cases.values():
        weights = sizer.fold(inputs, COSTS)
        late = np.concatenate([np.ones(delay_bars), weights[: len(weights) - delay_bars]])
        ledger = account(late, returns, COSTS)
        passive = account(np.ones(len(returns)), returns, COSTS)
        rows.append(
            (
                _sharpe(ledger.net_return[1:]) - _sharpe(passive.net_return[1:]),
                _deepest(ledger.equity) - _deepest(passive.equity),
                float(ledger.turnover.sum()) / len(returns) * COSTS.periods_per_year,
                float(ledger.held_weight[1:].mean()),
            )
        )
    sharpe, deeper, turnover, exposure = np.array(rows).T
    return {
        "sharpe_difference": float(sharpe.mean()),
        "share_better": float(np.mean(sharpe > 0)),
        "share_drawdown_no_deeper": float(np.mean(deeper >= -1e-9)),
        "drawdown_difference": float(deeper.mean()),
        "turnover_a_year": float(turnover.mean()),
        "mean_exposure": float(exposure.mean()),
    }


def _sharpe(returns: FloatArray) -> float:
    return float(returns.mean() / returns.std() * np.sqrt(COSTS.periods_per_year))


def _deepest(equity: FloatArray) -> float:
    return float((equity / np.maximum.accumulate(equity) - 1.0).min())


def sweep(cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Return what other constants of `calibrated` would have done."""
    base, found = make_sizer("calibrated"), {}
    for kelly in SWEEP["kelly_fraction"]:
        for hurdle in SWEEP["cost_hurdle"]:
            for long in SWEEP["max_long"]:
                rules = base.rules._replace(kelly_fraction=kelly, cost_hurdle=hurdle, max_long=long)
                name = f"kelly {kelly:g}, hurdle {hurdle:g}, max long {long:g}"
                found[name] = compare(cases, RuleSizer(name=name, rules=rules))
    return found


def print_table(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print one row for each sizer."""
    table = Table(title=title, title_justify="left")
    table.add_column("sizing")
    measures = next(iter(found.values()))
    for name in measures:
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in found.items():
        table.add_row(
            name, *(f"{value:+.4f}" if "difference" in key else f"{value:.3f}" for key, value in row.items())
        )
    Console(width=150).print(table)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument(
        "--horizons", default="5,1", help="bars ahead, with commas; limits hold for the first"
    )
    parser.add_argument("--sweep", action="store_true", help="also show other constants of `calibrated`")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print all presets side by side; exit 1 when `calibrated` misses a limit at the first horizon."""
    args = build_parser().parse_args(argv)
    found: dict[str, Any] = {}
    for horizon in [int(text) for text in args.horizons.split(",")]:
        cases = cases_of(args.directory, horizon)
        presets = {name: compare(cases, make_sizer(name)) for name in PRESETS}
        presets["calibrated, a session later"] = compare(cases, make_sizer("calibrated"), delay_bars=1)
        found[f"h={horizon}"] = presets
        title = f"{len(cases)} symbols, {horizon} bars ahead, {FIRST} to {LAST}, against buy and hold"
        print_table(title, presets)
        if args.sweep:
            others = sweep(cases)
            found[f"h={horizon}, other constants"] = others
            print_table("calibrated with other constants", others)
    first = next(iter(found.values()))["calibrated"]
    bars = {name: at_least(first[name], least) for name, least in LIMITS.items()}
    for name, bar in bars.items():
        print_bar(f"calibrated, {name}", bar)
    return finish(found, bars.values(), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
