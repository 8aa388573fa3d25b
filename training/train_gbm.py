"""Train, validate and save the boosters of one or more symbols; ``docs/training.md`` explains every flag.

::

    python -m training.train_gbm AAPL --source sample
    python -m training.train_gbm AAPL MSFT XOM --universe us50 --jobs 2
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import Parallel, delayed
from rich.console import Console

from data.cache_manager import BarCache
from data.data_fetcher import fetch_stock_data, load_panel, make_source, refuse_delisted
from data.data_validator import findings
from data.feature_engineer import MAX_WARMUP_BARS, get_feature_columns
from data.schema import Bars, check_enough, normalise_symbol
from data.target_engineering import DEFAULT_HORIZON_BARS, Dataset, check_horizon, resolve_universe
from inference.load_gbm_models import GBMBundle, PathModel, load_folder, save_bundle, versions_of
from training import run_log
from training.gbm_search import DeviceChoice, SearchConfig, choose_device
from training.libraries import LIBRARIES, catboost
from training.recipe import FittedGBM, GBMRecipe, RecipeConfig, TrainerConfig, WalkConfig
from training.run_log import Outcome, RunLog, deliver, fan_out, logged_run, refused
from training.trainer import MINIMUM_TEST_BARS, OnEvent, Trainer, Walked
from utils.errors import (
    AIStocksError,
    DataError,
    LockedError,
    ModelExistsError,
    StorageError,
    UsageError,
)
from utils.model_paths import (
    GBM,
    ArtifactKind,
    artifact_link,
    current_version,
    roll_back,
    training_lock,
)
from utils.settings import Settings, at_least, configure_logging, read_settings

logger = logging.getLogger(__name__)

TUNE_TRIALS = 50
# What every library takes as a seed.
MAX_SEED = 2**31 - 1
MAX_HORIZONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What one kind of model adds to the common command line; it travels as ``args.program``.

    Attributes
    ----------
    kind
        What is trained.
    check
        Refuses what the flags cannot mean together, and what is not installed, before anything is fetched.
    config, trainer
        The configuration that the flags ask for, and a trainer with it for about so many rows.
    save, load_folder
        Save a bundle with its golden inputs; load one version, to see whether it can serve.
    """

    kind: ArtifactKind
    check: Callable[[argparse.Namespace], None]
    config: Callable[[argparse.Namespace], WalkConfig]
    trainer: Callable[[Any, argparse.Namespace, int, OnEvent], Trainer[Any, Any]]
    save: Callable[..., Path]
    load_folder: Callable[[Path], object]


def common_parser(program: Program, description: str) -> tuple[argparse.ArgumentParser, Any]:
    """Return a parser with the flags that every kind of model has, and its group for those of the model."""
    parser = argparse.ArgumentParser(prog=f"python -m {program.kind.trainer}", description=description)
    parser.set_defaults(program=program)
    flag = "store_true"
    parser.add_argument("symbols", nargs="+", metavar="SYMBOL")
    data = parser.add_argument_group("prices")
    data.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    data.add_argument("--no-cache", action=flag, help="neither read nor write cached prices")
    data.add_argument("--force-refresh", action=flag, help="fetch the whole history again")
    data.add_argument("--universe", metavar="NAME|A,B,C|FILE", help="train one pooled model on these, too")
    data.add_argument("--leave-symbol-out", action=flag, help="a symbol's pooled model never sees its rows")
    model = parser.add_argument_group("model")
    model.add_argument("--seed", type=at_least(1, MAX_SEED), default=RecipeConfig().seed)
    run = parser.add_argument_group("run")
    run.add_argument("--jobs", type=at_least(1), default=1, help="symbols trained, or read, at a time")
    run.add_argument("--overwrite", action=flag, help="train although a bundle is there")
    run.add_argument("--validate-only", action=flag, help="judge and report, save no model")
    run.add_argument("--strict", action=flag, help="save nothing unless the verdict is edge (exit 7)")
    run.add_argument("--rollback", action=flag, help="train nothing: the version before serves again")
    run.add_argument("--json", action=flag, help="print the result as JSON on stdout")
    run.add_argument("--events", metavar="FILE", help=run_log.EVENTS_HELP)
    return parser, model


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser, model = common_parser(
        Program(
            kind=GBM,
            check=refuse_contradictions,
            config=config_from,
            trainer=lambda config, args, n, tell: GBMTrainer(config, tell, device=device_for(args, n)),
            save=save_bundle,
            load_folder=load_folder,
        ),
        "Train, validate and save the boosters of symbols.",
    )
    recipe, flag = RecipeConfig(), "store_true"
    model.add_argument("--include-sentiment", action=flag, help="not there yet: a usage error")
    model.add_argument(
        "--target-horizon",
        type=horizons,
        default=(DEFAULT_HORIZON_BARS,),
        metavar="BARS[,BARS]",
        help="bars ahead (default: 5); of several, 5 or else the first decides, all shape the forecast path",
    )
    model.add_argument("--tune", action=flag, help=f"search with {TUNE_TRIALS} trials, pooled models too")
    model.add_argument(
        "--n-trials", type=at_least(0), help="trials per library; 0: careful settings, no search"
    )
    model.add_argument("--models", type=models, metavar="xgb,lgb,cat", help="libraries (default: xgb,lgb)")
    model.add_argument("--no-lgb", action=flag, help="leave LightGBM out")
    model.add_argument("--max-features", type=at_least(1), default=recipe.max_features, help="features kept")
    model.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where XGBoost trains"
    )
    model.add_argument("--require-gpu", action=flag, help="fail without a GPU (exit 9)")
    model.add_argument("--allow-cpu-fallback", action=flag, help="--device cuda without a GPU: use the CPU")
    return parser


def horizons(text: str) -> tuple[int, ...]:
    """Read one horizon or several: first the one that decides, then the others, ascending."""
    read = at_least(1)
    named = list(dict.fromkeys(read(part.strip()) for part in text.split(",")))
    if len(named) > MAX_HORIZONS:
        raise argparse.ArgumentTypeError(f"{text!r}: at most {MAX_HORIZONS} horizons make one path")
    decides = DEFAULT_HORIZON_BARS if DEFAULT_HORIZON_BARS in named else named[0]
    return decides, *sorted(set(named) - {decides})


def models(text: str) -> tuple[str, ...]:
    """Read a list of libraries."""
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(LIBRARIES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: name each of {', '.join(LIBRARIES)} at most once")
    return names


def refuse_common(args: argparse.Namespace) -> None:
    """Refuse flags of every kind of model that cannot be meant together."""
    trains = ("universe", "validate_only", "strict", "tune", "overwrite", "force_refresh", "no_cache")
    beside = next((name for name in trains if getattr(args, name, None)), "")
    alone = args.leave_symbol_out and not args.universe
    refuse(
        {
            f"--rollback trains nothing: leave --{beside.replace('_', '-')} out": args.rollback and beside,
            "--universe names nothing: give a set, symbols or a file": args.universe == "",
            "--leave-symbol-out needs the others: add --universe": alone,
            "--validate-only saves nothing: leave --overwrite out": args.validate_only and args.overwrite,
        }
    )


def refuse(wrong: Mapping[str, object]) -> None:
    """Raise `UsageError` with the first words whose condition holds."""
    for words in (words for words, holds in wrong.items() if holds):
        raise UsageError(words)


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Refuse flags that cannot be meant together, and what is not there, before anything is fetched.

    Raises `UsageError`, or `DeviceError` for a GPU that is not there.
    """
    refuse_common(args)
    on_cpu = args.device == "cpu"
    refuse(
        {
            "--models and --no-lgb: name the libraries once": args.models and args.no_lgb,
            "--tune --n-trials 0: a search needs trials": args.tune and args.n_trials == 0,
            "--include-sentiment: no sentiment features are registered yet": args.include_sentiment,
            "--device cpu leaves nothing to --allow-cpu-fallback": args.allow_cpu_fallback and on_cpu,
        }
    )
    if "cat" in config_from(args).recipe.search.models:
        catboost()
    device_for(args, 0)


def config_from(args: argparse.Namespace) -> TrainerConfig:
    """Return the trainer's configuration that the command line asks for."""
    search = SearchConfig()
    n_trials = TUNE_TRIALS if args.tune else 0 if args.universe else search.n_trials
    names = args.models or tuple(name for name in search.models if name != "lgb" or not args.no_lgb)
    search = replace(search, n_trials=n_trials if args.n_trials is None else args.n_trials, models=names)
    if args.universe:
        # Libraries are fitted side by side; one symbol's rows keep no further thread busy.
        search = replace(search, threads=max(1, args.jobs // len(names)))
    recipe = RecipeConfig(search=search, max_features=args.max_features, seed=args.seed)
    decides, *others = map(check_horizon, args.target_horizon)
    return TrainerConfig(horizon_bars=decides, path_horizons_bars=tuple(others), recipe=recipe)


def device_for(args: argparse.Namespace, n_rows: int) -> DeviceChoice:
    """Return where to train so many rows."""
    return choose_device(
        args.device,
        n_rows,
        len(get_feature_columns()),
        require_gpu=args.require_gpu,
        allow_cpu_fallback=args.allow_cpu_fallback,
        models=config_from(args).recipe.search.models,
    )


class GBMTrainer(Trainer[FittedGBM, GBMBundle]):
    """Trains boosters, see `Trainer`.

    Parameters
    ----------
    config, on_event
        See `Trainer`.
    device
        Where XGBoost trains, and why; by default what the configuration says.
    """

    kind = GBM
    config: TrainerConfig

    def __init__(
        self, config: TrainerConfig, on_event: OnEvent | None = None, *, device: DeviceChoice | None = None
    ) -> None:
        if device is not None:
            search = replace(config.recipe.search, device=device.device)
            config = replace(config, recipe=replace(config.recipe, search=search))
        super().__init__(config, on_event)
        self._device_reason = "as the configuration says" if device is None else device.reason

    def recipe(self, _dataset: Dataset) -> GBMRecipe:
        """Return the boosters' recipe."""
        return GBMRecipe(self.config.recipe)

    def bundle_of(
        self, walked: Walked[FittedGBM], symbol: str, record: pd.DataFrame, metadata: Mapping[str, Any]
    ) -> GBMBundle:
        """Return the final boosters with the symbol's calibration, and those of the further horizons."""
        fitted, ensemble = walked.fitted, walked.fitted.for_symbol(symbol)
        return GBMBundle(
            symbol=symbol,
            horizon_bars=self.config.horizon_bars,
            ensemble=ensemble,
            record=record,
            metadata=metadata,
            importance=dict(zip(ensemble.columns, map(float, fitted.selection.importance), strict=True)),
            hyperparameters=fitted.hyperparameters,
            path_models=tuple(
                PathModel(
                    horizon_bars=path.horizon_bars,
                    ensemble=path.fitted.for_symbol(symbol),
                    hyperparameters=path.fitted.hyperparameters,
                )
                for path in walked.paths
            ),
        )

    @property
    def facts(self) -> dict[str, object]:
        """Trials, versions and device, see `Trainer.facts`."""
        search = self.config.recipe.search
        return {
            "n_trials": search.n_trials * len(search.models),
            "versions": versions_of(search.models),
            "device": search.device,
            "device_reason": self._device_reason,
        }

    def identity(self) -> dict[str, Any]:
        """Leave out how many threads share the work: it changes no result."""
        config = super().identity()
        del config["recipe"]["search"]["threads"]
        return config


def fetch(symbol: str, args: argparse.Namespace, settings: Settings) -> Bars:
    """Return the symbol's prices from the source that was asked for."""
    source = make_source(args.source or settings.source, cache_dir=settings.cache_dir)
    bars = fetch_stock_data(
        symbol, source=source, cache=cache_of(args, settings), force_refresh=args.force_refresh
    )
    if source.is_live:
        refuse_delisted(bars, datetime.now(UTC))
    return bars


def cache_of(args: argparse.Namespace, settings: Settings) -> BarCache | None:
    """Return the cache of prices, unless the command line does without."""
    return None if args.no_cache else BarCache(settings.cache_dir)


def refuse_existing(symbol: str, args: argparse.Namespace, settings: Settings) -> None:
    """Refuse to replace a bundle without being told to."""
    link = artifact_link(settings.models_dir, symbol, args.program.kind)
    if link.exists() and not (args.overwrite or args.validate_only):
        raise ModelExistsError(f"{symbol} has a model already: add --overwrite to train it anew")


def train_symbol(symbol: str, args: argparse.Namespace, settings: Settings, on_event: OnEvent) -> Outcome:
    """Fetch, train, judge, save and report one symbol; return the result as plain data."""
    refuse_existing(symbol, args, settings)
    bars = {symbol: fetch(symbol, args, settings)}
    return train_group(bars, bars, args, settings, on_event)[symbol]


def train_pooled(
    symbols: Sequence[str], args: argparse.Namespace, settings: Settings, on_event: OnEvent
) -> list[Outcome]:
    """Train one model over the universe and the named symbols, and judge and save it for each of these.

    With ``--leave-symbol-out`` there is one model for each named symbol, which never sees its rows.
    """
    outcomes: dict[str, Outcome] = {}
    named: dict[str, Bars] = {}
    for symbol in symbols:
        try:
            refuse_existing(symbol, args, settings)
            named[symbol] = fetch(symbol, args, settings)
            needed = MAX_WARMUP_BARS + max(args.target_horizon) + MINIMUM_TEST_BARS
            check_enough(named[symbol].frame, needed, f"judging {symbol}")
        except AIStocksError as error:
            named.pop(symbol, None)
            outcomes[symbol] = refused(symbol, error)
    if named:
        others = load_others(set(resolve_universe(args.universe)) - set(symbols), args, settings)
        panel = dict(sorted({**others, **named}.items()))
        if len(panel) - args.leave_symbol_out < 2:
            raise DataError(
                f"--universe {args.universe}: fewer than 2 symbols are left to train on: name more, or train "
                "without --universe"
            )
        groups = [{name: bars} for name, bars in named.items()] if args.leave_symbol_out else [named]
        for group in groups:
            try:
                outcomes |= train_group(group, panel, args, settings, on_event)
            except AIStocksError as error:
                outcomes |= {symbol: refused(symbol, error) for symbol in group}
    return [outcomes[symbol] for symbol in symbols]


def load_others(symbols: set[str], args: argparse.Namespace, settings: Settings) -> dict[str, Bars]:
    """Fetch the rest of the universe; what cannot be used is named in a warning and left out."""
    needed = MAX_WARMUP_BARS + max(args.target_horizon) + 1

    def usable(symbol: str) -> Bars:
        bars = fetch(symbol, args, settings)
        check_enough(bars.frame, needed, f"a place in the panel of {symbol}")
        return bars

    others, failures = load_panel(sorted(symbols), usable, args.jobs)
    for symbol, error in failures.items():
        logger.warning("%s is left out of the universe: %s", symbol, error)
    return others


def train_group(
    group: Mapping[str, Bars],
    panel: Mapping[str, Bars],
    args: argparse.Namespace,
    settings: Settings,
    on_event: OnEvent,
) -> dict[str, Outcome]:
    """Train one model on the panel; judge, save and report it for each symbol of the group."""
    left_out = tuple(group) if args.leave_symbol_out else ()
    program: Program = args.program
    config = program.config(args)
    config = replace(config, recipe=replace(config.recipe, leave_out=left_out))
    facts = {"universe": args.universe, "symbols": " ".join(panel), **asdict(config)}
    outcomes: dict[str, Outcome] = {}
    logs: dict[str, RunLog] = {}
    with ExitStack() as held:
        for symbol in group:
            try:
                held.enter_context(training_lock(settings.models_dir, symbol))
                logs[symbol] = held.enter_context(
                    logged_run(settings.logs_dir, symbol, facts, program.kind.name)
                )
            except (LockedError, StorageError) as error:
                outcomes[symbol] = refused(symbol, error)
        if not logs:
            return outcomes
        n_rows = sum(len(bars.frame) - MAX_WARMUP_BARS for bars in panel.values())
        tell = fan_out(on_event, list(logs.values()))
        trainer = program.trainer(config, args, n_rows, tell)
        n_trials = trainer.register(panel, settings.models_dir / "trials.jsonl")
        walked = trainer.walk(panel, universe=Path(args.universe or "").name)
        for symbol, log in logs.items():
            try:
                trained = trainer.conclude(
                    walked,
                    group[symbol],
                    n_trials=n_trials,
                    problems=findings(group[symbol], config.horizon_bars, cache_of(args, settings)),
                )
                outcomes[symbol] = deliver(trained, log, args, settings, on_event)
            except AIStocksError as error:
                log.fail(error)
                outcomes[symbol] = refused(symbol, error)
    return outcomes


def go_back(symbol: str, args: argparse.Namespace, settings: Settings, _on_event: OnEvent) -> Outcome:
    """Let the version before serve again; return which."""
    with training_lock(settings.models_dir, symbol):
        program: Program = args.program
        before = current_version(settings.models_dir, symbol, program.kind).name
        now = roll_back(settings.models_dir, symbol, program.kind, program.load_folder).name
    return {"symbol": symbol, "model_version": now, "rolled_back_from": before}


def one(raw: str, args: argparse.Namespace, settings: Settings, on_event: OnEvent) -> Outcome:
    """Train one symbol, or roll it back; whatever goes wrong is its outcome, for others are waiting."""
    try:
        symbol = normalise_symbol(raw)
        return (go_back if args.rollback else train_symbol)(symbol, args, settings, on_event)
    except AIStocksError as error:
        return refused(raw, error)
    except Exception as error:
        logger.exception("%s: an error that nobody foresaw", raw)
        return refused(raw, AIStocksError(f"{raw}: {type(error).__name__}: {error}"))


def in_worker(raw: str, args: argparse.Namespace, settings: Settings) -> Outcome:
    """Do `one` in a process of its own, which leaves it to its parent to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("WARNING" if args.json else settings.log_level)
    return one(raw, args, settings, run_log.stage_lines(raw))


def outcomes_of(
    args: argparse.Namespace, settings: Settings, console: Console, tell: OnEvent
) -> Iterator[Outcome]:
    """Yield the outcome of every symbol, in the order of the command line, as soon as it is there."""
    args.program.check(args)
    symbols = list(dict.fromkeys(args.symbols))
    if args.universe:
        symbols = list(dict.fromkeys(normalise_symbol(raw) for raw in symbols))
        with run_log.progress_line(console, "pooled", tell) as on_event:
            found = train_pooled(symbols, args, settings, on_event)
        yield from found
    elif args.jobs > 1 and len(symbols) > 1:
        jobs = (delayed(in_worker)(raw, args, settings) for raw in symbols)
        yield from Parallel(n_jobs=args.jobs, backend="loky", return_as="generator")(jobs)
    else:
        for raw in symbols:
            with run_log.progress_line(console, raw, tell) as on_event:
                outcome = one(raw, args, settings, on_event)
            yield outcome


def main(argv: list[str] | None = None) -> int:
    """Train the boosters of the symbols, see `run`."""
    return run(build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Train the symbols; return the exit code that `utils.errors` lists, of the first failure."""
    settings = read_settings()
    configure_logging("WARNING" if args.json else settings.log_level)

    def train(console: Console, tell: OnEvent) -> Iterator[Outcome]:
        return outcomes_of(args, settings, console, tell)

    return run_log.tell_all(train, as_json=args.json, events=args.events)


if __name__ == "__main__":
    # Worker processes must find this module under its own name.
    from training.train_gbm import main as entry

    sys.exit(entry())
