"""Train, validate and save the boosters of one or more symbols.

::

    python -m training.train_gbm AAPL --source sample
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.cache_manager import BarCache
from data.data_fetcher import fetch_stock_data, make_source
from data.feature_engineer import MAX_WARMUP_BARS, feature_set_hash
from data.schema import Bars, bars_hash, check_enough, normalise_symbol
from data.target_engineering import DEFAULT_HORIZON_BARS, Dataset, build_dataset
from data.universe import findings, refuse_delisted
from evaluation.advanced_backtester import BacktestReport
from evaluation.metrics import values
from evaluation.report import training_report, write_report
from inference.ensemble import FloatMatrix
from inference.load_gbm_models import GBMBundle, library_versions, new_version_id, save_bundle
from inference.pipeline import GBMForecaster, backtest_decisions, decide
from inference.position_sizing import make_sizer
from training.gbm_search import SearchConfig
from training.recipe import FittedGBM, GBMRecipe, RecipeConfig, TrainerConfig
from utils.errors import AIStocksError, GateRefusedError, LockedError, ModelExistsError, StorageError
from utils.model_paths import gbm_link, symbol_dir
from utils.settings import Settings, configure_logging
from validation.gates import Verdict, judge
from validation.overfitting import Run, count_trials, record_run
from validation.walk_forward import FoldResult, WalkForwardResult, WalkForwardValidator

logger = logging.getLogger(__name__)

MINIMUM_TEST_BARS = 252
NOT_JUDGED_YET = {"label": "no-edge", "reasons": [], "evidence": {}}
OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Outcome of a training run that is not saved yet."""

    bundle: GBMBundle
    walk_forward: WalkForwardResult
    verdict: Verdict
    backtest: BacktestReport
    trials: tuple[Mapping[str, object], ...]
    golden_inputs: FloatMatrix


class GBMTrainer:
    """Runs the walk-forward, the final fit and the verdict of one symbol.

    Parameters
    ----------
    config
        See `TrainerConfig`.
    on_event
        Called with plain mappings as the run proceeds: ``{"type": "stage", "stage": ..., "progress": 0..1}``.
    """

    def __init__(self, config: TrainerConfig, on_event: OnEvent | None = None) -> None:
        self.config = config
        self._tell: OnEvent = on_event or (lambda _event: None)

    def train(self, bars: Bars, *, trials_log: Path | None = None, problems: Sequence[str] = ()) -> Trained:
        """Validate the recipe on ``bars``, fit it on all of them, and judge it.

        Parameters
        ----------
        bars
            Prices of the symbol; `InsufficientDataError` unless they leave a year out of sample.
        trials_log
            File that counts what was tried on these prices before, see `validation.overfitting`.
        problems
            What is known to be amiss with the prices, in words; kept with the model.
        """
        started = time.monotonic()
        config = self.config
        needed = (
            MAX_WARMUP_BARS + config.walk_forward.min_train_bars + config.horizon_bars + MINIMUM_TEST_BARS
        )
        check_enough(bars.frame, needed, f"training {bars.symbol} with one year out of sample")
        self._stage("features", 0.0)
        dataset = build_dataset({bars.symbol: bars.frame}, config.horizon_bars)
        recipe = GBMRecipe(config.recipe)
        result = self._walk_forward(dataset, recipe)
        self._stage("final fit", 0.9)
        fitted = recipe.fit_all(dataset, result.record)
        bundle = self._bundle(bars, dataset, fitted, result)
        self._stage("verdict", 0.95)
        n_trials = 1
        if trials_log is not None:
            run = self._run(bars)
            n_trials = count_trials(trials_log, run)
            record_run(trials_log, run)
        verdict, backtest = self.judge(bars, bundle, result, n_trials=n_trials)
        judged = {
            "data": {**bundle.metadata["data"], "problems": [*bars.report.problems(), *problems]},
            "verdict": verdict.as_dict(),
            "metrics": {**headline_metrics(backtest), "correlation": verdict.evidence["ic"]},
            "duration_s": round(time.monotonic() - started, 1),
        }
        trials = (tuned.trials for found in recipe.searches for tuned in found.values())
        return Trained(
            bundle=replace(bundle, metadata={**bundle.metadata, **judged}),
            walk_forward=result,
            verdict=verdict,
            backtest=backtest,
            trials=tuple(trial for part in trials for trial in part),
            golden_inputs=dataset.features,
        )

    def judge(
        self, bars: Bars, bundle: GBMBundle, result: WalkForwardResult, *, n_trials: int = 1
    ) -> tuple[Verdict, BacktestReport]:
        """Decide on every out-of-sample row as the product would have, book it, and weigh the evidence."""
        costs = self.config.costs
        decisions = decide(bars.symbol, bars.frame, GBMForecaster(bundle=bundle), make_sizer(), costs=costs)
        backtest = backtest_decisions(decisions, costs)
        verdict = judge(
            result.record,
            horizon_bars=bundle.horizon_bars,
            strategy_return=backtest.daily["net_return"].to_numpy(),
            benchmark_return=backtest.benchmarks["exposure_matched"].daily["net_return"].to_numpy(),
            summary=result.summary,
            n_trials=n_trials,
        )
        return verdict, backtest

    def _walk_forward(self, dataset: Dataset, recipe: GBMRecipe) -> WalkForwardResult:
        validator = WalkForwardValidator(self.config.walk_forward)
        n_folds = validator.n_folds(dataset)

        def on_fold(fold: FoldResult) -> None:
            done = fold.number + 1
            self._stage(f"walk-forward, fold {done} of {n_folds}", 0.05 + 0.85 * done / n_folds)

        return validator.run(dataset, recipe, on_fold=on_fold)

    def _bundle(
        self, bars: Bars, dataset: Dataset, fitted: FittedGBM, result: WalkForwardResult
    ) -> GBMBundle:
        created_at = datetime.now(UTC)
        config, names = self.config, fitted.ensemble.columns
        metadata = {
            "schema_version": 1,
            "model_id": f"{bars.symbol}-gbm",
            "model_version": new_version_id(created_at),
            "symbol": bars.symbol,
            "created_at": created_at.isoformat(timespec="seconds"),
            "horizon_bars": config.horizon_bars,
            "source": bars.provenance.source,
            "data_hash": bars_hash(bars.frame),
            "data": {
                "hash": bars_hash(bars.frame),
                "first_session": f"{bars.frame.index[0]:%Y-%m-%d}",
                "last_session": f"{bars.frame.index[-1]:%Y-%m-%d}",
                "n_bars": len(bars.frame),
            },
            "trained_through": str(dataset.label_end[dataset.labelled].max()),
            "out_of_sample_from": f"{result.record['date'].min():%Y-%m-%d}",
            "seed": config.recipe.seed,
            "feature_set_hash": feature_set_hash(),
            "n_trials": config.recipe.search.n_trials * len(config.recipe.search.models),
            "versions": library_versions(),
            "recipe": asdict(config),
            "device": config.recipe.search.device,
            "verdict": NOT_JUDGED_YET,
            "folds": [fold.as_dict() for fold in result.folds],
        }
        return GBMBundle(
            symbol=bars.symbol,
            horizon_bars=config.horizon_bars,
            ensemble=fitted.ensemble,
            record=result.record,
            metadata=metadata,
            importance={names[i]: float(value) for i, value in enumerate(fitted.selection.importance)},
            hyperparameters={
                name: {"params": dict(found.params), "rounds": found.rounds, "inner_rmse": found.inner_rmse}
                for name, found in fitted.tuned.items()
            },
        )

    def _run(self, bars: Bars) -> Run:
        """Return what identifies this run among all that looked at the symbol."""
        content = json.dumps([bars_hash(bars.frame), feature_set_hash(), asdict(self.config)], sort_keys=True)
        return Run(
            symbol=bars.symbol,
            first_session=f"{bars.frame.index[0]:%Y-%m-%d}",
            last_session=f"{bars.frame.index[-1]:%Y-%m-%d}",
            fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        )

    def _stage(self, stage: str, progress: float) -> None:
        self._tell({"type": "stage", "stage": stage, "progress": round(progress, 3)})


def headline_metrics(backtest: BacktestReport) -> dict[str, float | None]:
    """Return the figures that lists of models show; None where undefined."""
    found = values(backtest.metrics)
    renamed = {
        "cumulative_return": "total_return",
        "directional_accuracy": "direction_accuracy",
        "transaction_costs": "total_transaction_costs",
    }
    same = ("sharpe_ratio", "max_drawdown", "win_rate", "average_trade_profit", "total_trades", "turnover")
    return {ours: found[theirs] for ours, theirs in (renamed | dict(zip(same, same, strict=True))).items()}


@contextmanager
def training_lock(models_dir: Path, symbol: str) -> Iterator[None]:
    """Hold the symbol's training lock, which dies with the process; else `LockedError` names who holds it."""
    folder = symbol_dir(models_dir, symbol)
    holder = folder / ".training.pid"
    lock = FileLock(folder / ".training.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(str(os.getpid()))
    except Timeout as error:
        who = holder.read_text() if holder.is_file() else "unknown"
        raise LockedError(f"{symbol} is being trained by process {who}: wait or stop it") from error
    except OSError as error:
        raise StorageError(f"cannot write the lock of {symbol}: {error.strerror}") from error
    with lock:
        yield


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train_gbm", description="Train, validate and save the boosters of symbols."
    )
    recipe = RecipeConfig()
    parser.add_argument("symbols", nargs="+", metavar="SYMBOL")
    parser.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    parser.add_argument(
        "--target-horizon", type=int, default=DEFAULT_HORIZON_BARS, help="bars ahead (default: 5)"
    )
    parser.add_argument(
        "--n-trials", type=positive, default=recipe.search.n_trials, help="trials per library"
    )
    parser.add_argument("--max-features", type=positive, default=recipe.max_features, help="features kept")
    parser.add_argument("--seed", type=positive, default=recipe.seed)
    parser.add_argument("--overwrite", action="store_true", help="train although a bundle is there")
    parser.add_argument(
        "--strict", action="store_true", help="save nothing unless the verdict is edge (exit 7)"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write cached prices")
    parser.add_argument("--force-refresh", action="store_true", help="fetch the whole history again")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def positive(text: str) -> int:
    """Read a number of the command line that must be at least 1."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")


def config_from(args: argparse.Namespace) -> TrainerConfig:
    """Return the trainer's configuration that the command line asks for."""
    search = SearchConfig(n_trials=args.n_trials)
    recipe = RecipeConfig(search=search, max_features=args.max_features, seed=args.seed)
    return TrainerConfig(horizon_bars=args.target_horizon, recipe=recipe)


def train_symbol(
    symbol: str, args: argparse.Namespace, settings: Settings, on_event: OnEvent
) -> dict[str, object]:
    """Fetch, train, judge, save and report one symbol; return the result as plain data."""
    source = make_source(args.source or settings.source, cache_dir=settings.cache_dir)
    if gbm_link(settings.models_dir, symbol).exists() and not args.overwrite:
        raise ModelExistsError(f"{symbol} has a model already: add --overwrite to train it anew")
    cache = None if args.no_cache else BarCache(settings.cache_dir)
    bars = fetch_stock_data(symbol, source=source, cache=cache, force_refresh=args.force_refresh)
    if source.is_live:
        refuse_delisted(bars, datetime.now(UTC))
    with training_lock(settings.models_dir, symbol):
        log = symbol_dir(settings.models_dir, symbol) / "trials.jsonl"
        problems = findings(bars, args.target_horizon, cache)
        trained = GBMTrainer(config_from(args), on_event).train(bars, trials_log=log, problems=problems)
        if args.strict and trained.verdict.label != "edge":
            raise GateRefusedError(
                f"{symbol}: the verdict is {trained.verdict.label} and --strict was given: nothing was saved"
            )
        on_event({"type": "stage", "stage": "saving", "progress": 0.97})
        save_bundle(trained.bundle, settings.models_dir, golden_inputs=trained.golden_inputs[-8:])
        name = f"{symbol}_gbm_{trained.bundle.model_version}.html"
        page = training_report(
            symbol=symbol,
            metadata=trained.bundle.metadata,
            record=trained.bundle.record,
            importance=trained.bundle.importance,
            trials=trained.trials,
            summary=asdict(trained.walk_forward.summary),
            findings=trained.bundle.metadata["data"]["problems"],
        )
        report = write_report(page, settings.logs_dir / name)
    return summary_of(trained, settings, report)


def summary_of(trained: Trained, settings: Settings, report: Path) -> dict[str, object]:
    """Return the result of one symbol as plain data."""
    bundle, verdict = trained.bundle, trained.verdict
    same = ("model_version", "out_of_sample_from", "trained_through", "horizon_bars", "seed", "data_hash")
    return {
        "symbol": bundle.symbol,
        "verdict": verdict.label,
        "reasons": list(verdict.reasons),
        "evidence": dict(verdict.evidence),
        "metrics": bundle.metadata["metrics"],
        **{name: bundle.metadata[name] for name in (*same, "duration_s")},
        "bundle": str(gbm_link(settings.models_dir, bundle.symbol)),
        "report": str(report),
    }


def print_summary(console: Console, result: Mapping[str, Any]) -> None:
    """Print the result of one symbol as a table."""
    evidence = {name: "undefined" if v is None else f"{v:.4g}" for name, v in result["evidence"].items()}
    table = Table(title=f"{result['symbol']}: {result['verdict']}", title_justify="left", show_header=False)
    rows = {
        "out of sample": f"from {result['out_of_sample_from']}, {evidence['n_rows']} forecasts",
        "horizon": f"{result['horizon_bars']} sessions",
        "information coefficient": f"{evidence['ic']} (p {evidence['p_ic']})",
        "a year over equal exposure": f"{evidence['active_return_annual']} (p {evidence['p_return']})",
        "direction accuracy": f"{evidence['direction_accuracy']} (always up: {evidence['share_up']})",
        "tries on these prices": evidence["n_trials"],
        "trained in": f"{result['duration_s']} s, seed {result['seed']}",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    for reason in result["reasons"]:
        console.print(f"  - {escape(reason)}", soft_wrap=True)
    console.print(f"bundle: {escape(result['bundle'])}", soft_wrap=True)
    console.print(f"report: {escape(result['report'])}", soft_wrap=True)


@contextmanager
def progress_line(console: Console, symbol: str) -> Iterator[OnEvent]:
    """Show how far a training is: a bar on a terminal, a line for each stage elsewhere."""
    if not console.is_terminal:
        yield lambda event: logger.info("%s: %3.0f %% %s", symbol, 100 * event["progress"], event["stage"])
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(symbol, total=1.0)
        yield lambda event: bar.update(
            task, completed=event["progress"], description=f"{symbol}: {event['stage']}"
        )


def main(argv: list[str] | None = None) -> int:
    """Train the symbols; return the exit code that `utils.errors` lists."""
    args = build_parser().parse_args(argv)
    settings = Settings()
    configure_logging("WARNING" if args.json else settings.log_level)
    console = Console(stderr=args.json)
    results: list[Mapping[str, object]] = []
    exit_code = 0
    for raw in args.symbols:
        try:
            symbol = normalise_symbol(raw)
            with progress_line(console, symbol) as on_event:
                results.append(train_symbol(symbol, args, settings, on_event))
            if not args.json:
                print_summary(console, results[-1])
        except AIStocksError as error:
            exit_code = exit_code or error.exit_code
            results.append({"symbol": raw, "error": str(error)})
            Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    if args.json:
        sys.stdout.write(json.dumps(results, allow_nan=False) + "\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
