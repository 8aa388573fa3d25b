"""Train, validate and save the boosters of one or more symbols; ``docs/training.md`` explains every flag.

::

    python -m training.train_gbm AAPL --source sample
    python -m training.train_gbm AAPL MSFT XOM --universe us50 --jobs 2
"""

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import Parallel, delayed
from rich.console import Console

from data.cache_manager import BarCache
from data.data_fetcher import fetch_stock_data, make_news, make_source
from data.data_validator import findings, refuse_delisted, with_enough_headlines
from data.feature_engineer import MAX_WARMUP_BARS, get_feature_columns
from data.schema import Bars, check_enough, normalise_symbol
from data.target_engineering import (
    DEFAULT_HORIZON_BARS,
    Dataset,
    check_horizon,
    load_panel,
    refuse_unknown_universe,
    resolve_universe,
)
from inference.load_gbm_models import GBMBundle, PathModel, load_folder, save_bundle, versions_of
from training import run_log
from training.gbm_search import SearchConfig, catboost, probe_cuda, probe_lightgbm_opencl
from training.recipe import FittedGBM, GBMRecipe, RecipeConfig, TrainerConfig
from training.trainer import MINIMUM_TEST_BARS, OnEvent, Trained, Trainer, Walked
from utils import base as errors
from utils.base import Settings, at_least, configure_logging, read_settings, session
from utils.model_paths import (
    GBM,
    TRIALS,
    artifact_link,
    current_version,
    holding,
    roll_back,
    storage_errors,
    training_lock,
)
from validation.gates import refuse_without_edge
from validation.wfe_metrics import Run, earlier_runs, record_run, verdicts_of

logger = logging.getLogger(__name__)

TUNE_TRIALS = 50
# Reading and writing the log of verdicts takes milliseconds.
LOG_WAIT_S = 60.0
MAX_HORIZONS = 4
# Rows x features from which `auto` asks for a GPU. Below it a fit takes a second or less on one core, which
# is what starting CUDA and copying the rows cost before the first tree; not measured on a GPU yet.
AUTO_CELLS = 20_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """A device, ``cpu`` or ``cuda``, and in words why it was chosen; both are recorded with the model."""

    device: str
    reason: str


def choose_device(
    requested: str,
    n_rows: int,
    n_features: int,
    *,
    require_gpu: bool = False,
    allow_cpu_fallback: bool = False,
    models: Sequence[str] = ("xgb",),
) -> DeviceChoice:
    """Decide where XGBoost trains; the other libraries stay on the CPU.

    ``auto`` is the GPU from `AUTO_CELLS` on, where there is one; ``require_gpu`` wants it whatever the size.
    A GPU that was asked for and is not there is a `DeviceError`, unless ``allow_cpu_fallback``.
    """
    run_log.refuse(
        {
            "--require-gpu and --device cpu contradict each other": require_gpu and requested == "cpu",
            "--require-gpu contradicts --allow-cpu-fallback": require_gpu and allow_cpu_fallback,
            "--require-gpu: only XGBoost trains on a GPU here": require_gpu and "xgb" not in models,
        }
    )
    is_wanted = require_gpu or requested == "cuda"
    size = f"{n_rows:,} rows x {n_features} features"
    if "xgb" not in models:
        reason = "XGBoost, which alone can use a GPU here, is not asked for"
    elif requested == "cpu":
        reason = "the CPU was asked for"
    elif not is_wanted and n_rows * n_features < AUTO_CELLS:
        reason = f"{size}: a GPU pays from {AUTO_CELLS / 1e6:g} million cells on"
    elif (missing := probe_cuda()) is None:
        why = f"{'a GPU was asked for' if is_wanted else f'{size}: a GPU pays'}, and a probe trained on it"
        if "lgb" in models:
            lacks = probe_lightgbm_opencl() or "its OpenCL sums in an order that changes"
            why += f"; LightGBM stays on the CPU: {lacks}"
        return DeviceChoice(device="cuda", reason=why)
    elif is_wanted and not allow_cpu_fallback:
        raise errors.DeviceError(
            f"a GPU was asked for and cannot be used: {missing}; train with --device cpu, or with "
            "--device cuda --allow-cpu-fallback where either will do"
        )
    else:
        reason = f"no GPU: {missing}"
    return DeviceChoice(device="cpu", reason=reason)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    program = run_log.Program(
        check=refuse_contradictions,
        config=config_from,
        trainer=lambda config, args, n, tell: GBMTrainer(config, tell, device=device_for(args, n)),
        save=save_bundle,
        load_folder=load_folder,
    )
    parser, model = run_log.common_parser(GBM, "Train, validate and save the boosters of symbols.", program)
    add, flag = model.add_argument, "store_true"
    add("--start", type=session, metavar="DATE", help="leave prices before YYYY-MM-DD out")
    add("--include-sentiment", action=flag, help="learn from headlines, too; see AI_STOCKS_NEWS")
    add(
        "--target-horizon",
        type=horizons,
        default=(DEFAULT_HORIZON_BARS,),
        metavar="BARS[,BARS]",
        help="bars ahead (default: 5); of several, 5 or else the first decides, all shape the forecast path",
    )
    add("--tune", action=flag, help=f"search with {TUNE_TRIALS} trials, pooled models too")
    add("--n-trials", type=at_least(0), help="trials per library; 0: careful settings, no search")
    add("--models", metavar="xgb,lgb,cat", help="libraries (default: xgb,lgb)")
    add("--no-lgb", action=flag, help="leave LightGBM out")
    add("--max-features", type=at_least(1), default=RecipeConfig().max_features, help="features kept")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where XGBoost trains")
    add("--require-gpu", action=flag, help="fail without a GPU (exit 9)")
    add("--allow-cpu-fallback", action=flag, help="--device cuda without a GPU: use the CPU")
    return parser


def horizons(text: str) -> tuple[int, ...]:
    """Read one horizon or several: first the one that decides, then the others, ascending."""
    read = at_least(1)
    named = list(dict.fromkeys(read(part.strip()) for part in text.split(",")))
    if len(named) > MAX_HORIZONS:
        raise argparse.ArgumentTypeError(f"{text!r}: at most {MAX_HORIZONS} horizons make one path")
    decides = DEFAULT_HORIZON_BARS if DEFAULT_HORIZON_BARS in named else named[0]
    return decides, *sorted(set(named) - {decides})


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Refuse flags that cannot be meant together, and what is not there, before anything is fetched."""
    run_log.refuse_common(args)
    fallback = args.allow_cpu_fallback
    run_log.refuse(
        {
            "--models and --no-lgb: name the libraries once": args.models and args.no_lgb,
            "--tune --n-trials 0: a search needs trials": args.tune and args.n_trials == 0,
            "--include-sentiment is for one symbol: leave --universe out": args.include_sentiment
            and args.universe,
            "--start cuts the prices of one symbol: leave --universe out": args.start is not None
            and args.universe,
            "--device cpu leaves nothing to --allow-cpu-fallback": fallback and args.device == "cpu",
        }
    )
    if "cat" in config_from(args).recipe.search.models:
        catboost()
    device_for(args, 0)


def config_from(args: argparse.Namespace) -> TrainerConfig:
    """Return the trainer's configuration that the command line asks for."""
    search = SearchConfig()
    n_trials = TUNE_TRIALS if args.tune else 0 if args.universe else search.n_trials
    names = tuple((args.models or ("xgb" if args.no_lgb else "xgb,lgb")).replace(" ", "").split(","))
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
    """Trains boosters, see `Trainer`; on ``device``, or on what the configuration says."""

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
        paths = (
            PathModel(
                horizon_bars=ahead, ensemble=own.for_symbol(symbol), hyperparameters=own.hyperparameters
            )
            for ahead, (_record, own) in walked.paths.items()
        )
        return GBMBundle(
            symbol=symbol,
            horizon_bars=self.config.horizon_bars,
            ensemble=ensemble,
            record=record,
            metadata=metadata,
            importance=dict(zip(ensemble.columns, map(float, fitted.selection.importance), strict=True)),
            hyperparameters=fitted.hyperparameters,
            path_models=tuple(paths),
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


def fetch(symbol: str, args: argparse.Namespace, settings: Settings) -> Bars:
    """Return the symbol's prices from the source that was asked for."""
    wants_news = getattr(args, "include_sentiment", False)
    news = make_news(settings) if wants_news else None
    source = make_source(args.source or settings.source, cache_dir=settings.cache_dir, news=news)
    cache = None if args.no_cache else BarCache(settings.cache_dir)
    bars = fetch_stock_data(symbol, source=source, cache=cache, force_refresh=args.force_refresh)
    if source.is_live:
        refuse_delisted(bars, datetime.now(UTC))
    start: datetime | None = getattr(args, "start", None)
    if start is not None and start > (last := bars.frame.index[-1]):
        raise errors.InsufficientDataError(
            f"--start {start:%Y-%m-%d} leaves no prices of {symbol}: the last session is {last:%Y-%m-%d}; "
            "choose an earlier start"
        )
    bars = replace(bars, frame=bars.frame.loc[start:])
    return with_enough_headlines(bars, MAX_WARMUP_BARS) if wants_news else bars


def look(settings: Settings, runs: Sequence[Run]) -> tuple[tuple[Run, ...], dict[str, float]]:
    """Record a look at prices, as each symbol sees it, before it shows anything.

    Return those before, and by symbol the share of the limits that this run had, where it is a repetition.
    One at a time: an edge hands on to one look, and not to two that begin at once.
    """
    log = settings.models_dir / TRIALS
    refusal = f"another training keeps {log.name} for too long: try again"
    lock = log.with_name(f".{log.name}.lock")
    with storage_errors(runs[0].symbol, "log the verdict"), holding(lock, LOG_WAIT_S, lambda: refusal):
        earlier, repeated = earlier_runs(log, *runs), verdicts_of(log, *runs)
        record_run(log, *runs)
    return earlier, {symbol: run.limits_share for symbol, run in repeated.items()}


def record_verdict(settings: Settings, run: Run, verdict: Mapping[str, Any]) -> None:
    """Record what a look has shown, a `Verdict.as_dict`: an edge hands its limits on."""
    share = verdict["evidence"]["limits_share"]
    record_run(settings.models_dir / TRIALS, replace(run, label=verdict["label"], limits_share=share))


def train_symbols(
    symbols: Sequence[str], args: argparse.Namespace, settings: Settings, on_event: OnEvent
) -> list[run_log.Outcome]:
    """Train one model over the named symbols and the universe; judge, save and report it for the named.

    One symbol without a universe stands alone. With ``--leave-symbol-out`` there is one model for each named
    symbol, which never sees its rows.
    """
    outcomes: dict[str, run_log.Outcome] = {}
    named: dict[str, Bars] = {}
    needed = MAX_WARMUP_BARS + max(args.target_horizon) + MINIMUM_TEST_BARS
    for symbol in symbols:
        try:
            run_log.refuse_existing(symbol, args, settings)
            bars = fetch(symbol, args, settings)
            if args.universe:
                check_enough(bars.frame, needed, f"judging {symbol}")
            named[symbol] = bars
        except errors.AIStocksError as error:
            outcomes[symbol] = run_log.refused(symbol, error)
    panel = with_others(named, symbols, args, settings) if named and args.universe else named
    groups = [{name: bars} for name, bars in named.items()] if args.leave_symbol_out else [named]
    for group in filter(None, groups):
        try:
            outcomes |= train_group(group, panel, args, settings, on_event)
        except errors.AIStocksError as error:
            outcomes |= {symbol: run_log.refused(symbol, error) for symbol in group}
    return [outcomes[symbol] for symbol in symbols]


def with_others(
    named: Mapping[str, Bars], symbols: Sequence[str], args: argparse.Namespace, settings: Settings
) -> dict[str, Bars]:
    """Fetch the rest of the universe; what cannot be used is named in a warning and left out."""
    needed = MAX_WARMUP_BARS + max(args.target_horizon) + 1

    def usable(symbol: str) -> Bars:
        bars = fetch(symbol, args, settings)
        check_enough(bars.frame, needed, f"a place in the panel of {symbol}")
        return bars

    wanted = sorted(set(resolve_universe(args.universe)) - set(symbols))
    others, failures = load_panel(wanted, usable, args.jobs)
    refuse_unknown_universe(args.universe, failures)
    for symbol, error in failures.items():
        logger.warning("%s is left out of the universe: %s", symbol, error)
    panel = dict(sorted({**others, **named}.items()))
    if len(panel) - args.leave_symbol_out < 2:
        few = "fewer than 2 symbols are left to train on: name more, or train without --universe"
        raise errors.DataError(f"--universe {args.universe}: {few}")
    return panel


def train_group(
    group: Mapping[str, Bars],
    panel: Mapping[str, Bars],
    args: argparse.Namespace,
    settings: Settings,
    on_event: OnEvent,
) -> dict[str, run_log.Outcome]:
    """Train one model on the panel; judge, save and report it for each symbol of the group."""
    program: run_log.Program = args.program
    config = program.config(args)
    left_out = tuple(group) if args.leave_symbol_out else ()
    config = replace(config, recipe=replace(config.recipe, leave_out=left_out))
    facts = {"universe": args.universe, "symbols": " ".join(panel), **asdict(config)}
    outcomes: dict[str, run_log.Outcome] = {}
    logs: dict[str, run_log.RunLog] = {}
    with ExitStack() as held:
        for symbol in group:
            try:
                held.enter_context(training_lock(settings.models_dir, symbol))
                run = run_log.logged_run(settings.logs_dir, symbol, facts, args.kind.name)
                logs[symbol] = held.enter_context(run)
            except (errors.LockedError, errors.StorageError) as error:
                outcomes[symbol] = run_log.refused(symbol, error)
        if not logs:
            return outcomes
        n_rows = sum(len(bars.frame) - MAX_WARMUP_BARS for bars in panel.values())
        tell = run_log.together(*(log.on_event for log in logs.values()), on_event)
        trainer = program.trainer(config, args, n_rows, tell)
        runs = {run.symbol: run for run in trainer.runs(panel)}
        earlier, shares = look(settings, [*runs.values()])
        walked = trainer.walk(panel, universe=Path(args.universe or "").name)
        cache = None if args.no_cache else BarCache(settings.cache_dir)
        for symbol, log in logs.items():
            bars = group[symbol]
            try:
                problems = findings(bars, config.horizon_bars, cache)
                trained = trainer.conclude(walked, bars, earlier, problems, shares.get(symbol))
                record_verdict(settings, runs[symbol], trained.verdict.as_dict())
                outcomes[symbol] = deliver(trained, log, args, settings, on_event)
            except errors.AIStocksError as error:
                log.fail(error)
                outcomes[symbol] = run_log.refused(symbol, error)
    return outcomes


def deliver(
    trained: Trained[Any], log: run_log.RunLog, args: argparse.Namespace, settings: Settings, tell: OnEvent
) -> run_log.Outcome:
    """Save what was trained unless the flags forbid it, and report it; see `run_log.outcome_of`."""
    log.conclude(trained)
    bundle, saved = trained.bundle, None
    report = run_log.publish_report(trained, settings.logs_dir)
    if args.strict:
        refuse_without_edge(bundle.symbol, trained.verdict.as_dict(), report)
    if not args.validate_only:
        tell({"type": "stage", "stage": "saving", "progress": 0.97})
        args.program.save(bundle, settings.models_dir, golden_inputs=trained.golden_inputs)
        saved = artifact_link(settings.models_dir, bundle.symbol, args.kind)
    log.has_ended = True
    names = ("metrics", "path_models", "seed", "device", "device_reason", "duration_s")
    outcome = run_log.outcome_of(bundle.metadata, names, {"bundle": saved, "report": report, "log": log.path})
    return {**outcome, "status": log.status}


def go_back(symbol: str, args: argparse.Namespace, settings: Settings) -> run_log.Outcome:
    """Let the version before serve again; return which."""
    folder = settings.models_dir
    with training_lock(folder, symbol):
        before = current_version(folder, symbol, args.kind).name
        now = roll_back(folder, symbol, args.kind, args.program.load_folder).name
    undo = args.kind.manage("rollback", symbol, f" --to {before}")
    told = f"{symbol}: {now} serves, instead of {before}; undo: {undo}"
    return {"symbol": symbol, "model_version": now, "rolled_back_from": before, "message": told}


def one(raw: str, args: argparse.Namespace, settings: Settings, on_event: OnEvent) -> run_log.Outcome:
    """Train one symbol, or roll it back; whatever goes wrong is its outcome, for others are waiting."""
    try:
        symbol = normalise_symbol(raw)
        if args.rollback:
            return go_back(symbol, args, settings)
        return train_symbols([symbol], args, settings, on_event)[0]
    except errors.AIStocksError as error:
        return run_log.refused(raw, error)
    except Exception as error:
        logger.exception("%s: an error that nobody foresaw", raw)
        return run_log.refused(raw, errors.AIStocksError(f"{raw}: {type(error).__name__}: {error}"))


def in_worker(raw: str, args: argparse.Namespace, settings: Settings) -> run_log.Outcome:
    """Do `one` in a process of its own, which leaves it to its parent to be interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("WARNING" if args.json else settings.log_level)
    return one(raw, args, settings, run_log.stage_lines(raw))


def run(args: argparse.Namespace) -> int:
    """Train the symbols; return the exit code that `utils.base` lists, of the first failure."""
    settings = read_settings()

    def train(console: Console, tell: OnEvent) -> Iterator[run_log.Outcome]:
        """Yield the outcome of every symbol, in the order of the command line, as soon as it is there."""
        args.program.check(args)
        symbols = list(dict.fromkeys(args.symbols))
        if args.universe:
            symbols = list(dict.fromkeys(normalise_symbol(raw) for raw in symbols))
            with run_log.progress_line(console, "pooled", tell) as on_event:
                found = train_symbols(symbols, args, settings, on_event)
            yield from found
        elif args.jobs > 1 and len(symbols) > 1:
            jobs = (delayed(in_worker)(raw, args, settings) for raw in symbols)
            yield from Parallel(n_jobs=args.jobs, backend="loky", return_as="generator")(jobs)
        else:
            for raw in symbols:
                with run_log.progress_line(console, raw, tell) as on_event:
                    outcome = one(raw, args, settings, on_event)
                yield outcome

    return run_log.tell_all(train, args, settings)


def main(argv: list[str] | None = None) -> int:
    """Train the boosters of the symbols, see `run`."""
    return run(build_parser().parse_args(argv))


if __name__ == "__main__":
    # Worker processes must find this module under its own name.
    from training.train_gbm import main as entry

    sys.exit(entry())
