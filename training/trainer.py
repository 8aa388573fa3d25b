"""Walk a recipe forward over one symbol or a panel, fit it on all rows, and judge it for each symbol."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import pandas as pd

from data.feature_engineer import MAX_WARMUP_BARS, feature_set_hash
from data.schema import Bars, bars_hash, check_enough
from data.target_engineering import Dataset, build_dataset
from evaluation.accounting import CostModel
from evaluation.advanced_backtester import BacktestReport
from evaluation.metrics import values
from inference.artifact import GOLDEN_ROWS, new_version_id
from inference.ensemble import FloatArray, FloatMatrix
from inference.pipeline import Bundle, BundleForecaster, Decisions, backtest_decisions, decide
from inference.position_sizing import make_sizer
from training.recipe import WalkConfig, begin_with_others
from utils.errors import InsufficientDataError
from utils.model_paths import ArtifactKind
from validation.gates import Verdict, judge, of_universe
from validation.walk_forward import (
    FittedRecipe,
    FoldResult,
    Recipe,
    WalkForwardResult,
    WalkForwardValidator,
    fold_table,
)
from validation.wfe_metrics import Run, count_verdicts, record_run

MINIMUM_TEST_BARS = 252
NOT_JUDGED_YET = {"label": "no-edge", "reasons": [], "evidence": {}}
PATH_EVIDENCE = ("ic", "p_ic", "calibration_slope", "skill_over_drift", "n_rows")
WALKED_AT = 0.9
OnEvent = Callable[[Mapping[str, Any]], None]
FittedT = TypeVar("FittedT", bound=FittedRecipe)
FittedT_co = TypeVar("FittedT_co", bound=FittedRecipe, covariant=True)
BundleT = TypeVar("BundleT", bound=Bundle)


class FinalRecipe(Recipe, Protocol[FittedT_co]):
    """A recipe that is validated, and then fitted on everything; see `validation.walk_forward.Recipe`."""

    @property
    def trials(self) -> tuple[Mapping[str, object], ...]:
        """Every trial of every search so far; empty for a recipe that searches nothing."""
        ...

    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedT_co:
        """Fit on rows before a fold."""
        ...

    def fit_all(self, dataset: Dataset, record: pd.DataFrame) -> FittedT_co:
        """Fit on every labelled row, calibrated on the whole walk-forward record."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Generic[BundleT]):
    """Outcome of a training run for one symbol, not saved yet."""

    bundle: BundleT
    walk_forward: WalkForwardResult
    verdict: Verdict
    backtest: BacktestReport
    trials: tuple[Mapping[str, object], ...]
    golden_inputs: FloatMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkedPath(Generic[FittedT]):
    """A further horizon, walked forward on its own target; its record is weighed, and not saved.

    Attributes
    ----------
    horizon_bars
        Number of bars that its forecast looks ahead.
    record
        The walk-forward record of all symbols.
    fitted
        The recipe on every labelled row.
    """

    horizon_bars: int
    record: pd.DataFrame
    fitted: FittedT

    def figures(self, symbol: str) -> dict[str, float | int | bool | None]:
        """Return what the symbol's own out-of-sample rows say; None where undefined."""
        own = self.record[self.record["symbol"] == symbol]
        empty = np.empty(0)
        found = judge(own, horizon_bars=self.horizon_bars, strategy_return=empty, benchmark_return=empty)
        return {name: found.evidence[name] for name in PATH_EVIDENCE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked(Generic[FittedT]):
    """What all symbols of a run share: the rows, the walk-forward, the final fit.

    Attributes
    ----------
    dataset
        Rows of all symbols.
    hashes
        Hash of the prices by symbol.
    result
        The walk-forward over all of them.
    fitted
        The recipe on every labelled row.
    trials
        Every trial of every search, as recorded.
    started
        Clock (`time.monotonic`) at the start of the run.
    universe
        What the panel is called.
    paths
        The further horizons, ascending.
    returns
        Of a panel: net returns per session of the decided positions of all symbols, in equal parts, and of
        their benchmarks of equal exposure, (m, 2); None for a symbol that stands alone.
    """

    dataset: Dataset
    hashes: Mapping[str, str]
    result: WalkForwardResult
    fitted: FittedT
    trials: tuple[Mapping[str, object], ...]
    started: float
    universe: str = ""
    paths: tuple[WalkedPath[FittedT], ...] = ()
    returns: FloatArray | None = None


class Trainer(ABC, Generic[FittedT, BundleT]):
    """Runs the walk-forward, the final fit and the verdict of one kind of model.

    A kind says what is fitted (`recipe`), what is kept of it (`bundle_of`) and what is to be known about it
    (`facts`); everything that makes its numbers honest is done here, and is the same for all kinds.

    Parameters
    ----------
    config
        See `WalkConfig`.
    on_event
        Called with plain mappings as the run proceeds: ``{"type": "stage", "stage": ..., "progress": 0..1}``,
        and ``{"type": "fold", ...}`` with the measures of each fold; a kind may add events of its own.
    """

    kind: ClassVar[ArtifactKind]
    # Rows of features that the golden outputs are made from.
    golden_rows: int = GOLDEN_ROWS

    def __init__(self, config: WalkConfig, on_event: OnEvent | None = None) -> None:
        self.config = config
        self._tell: OnEvent = on_event or (lambda _event: None)
        self._begun = 0.0

    @abstractmethod
    def recipe(self, dataset: Dataset) -> FinalRecipe[FittedT]:
        """Return a recipe that was not fitted yet; ``dataset`` holds all rows that it will be asked about."""

    @abstractmethod
    def bundle_of(
        self, walked: "Walked[FittedT]", symbol: str, record: pd.DataFrame, metadata: Mapping[str, Any]
    ) -> BundleT:
        """Return what is saved for one symbol: the final fit, with the symbol's own record and metadata."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """What the metadata of this kind tell: ``n_trials``, ``versions``, ``device``, ``device_reason``."""

    def identity(self) -> dict[str, Any]:
        """Return what of the configuration may change what is judged."""
        config = asdict(self.config)
        # Further horizons change nothing of what is judged.
        del config["path_horizons_bars"]
        return config

    def train(
        self, bars: Bars, *, trials_log: Path | None = None, problems: Sequence[str] = ()
    ) -> "Trained[BundleT]":
        """Train one symbol on its own prices; see `walk` and `conclude`."""
        panel = {bars.symbol: bars}
        n_trials = self.register(panel, trials_log) if trials_log else 1
        return self.conclude(self.walk(panel), bars, n_trials=n_trials, problems=problems)

    def register(self, panel: Mapping[str, Bars], trials_log: Path) -> int:
        """Count this look at the panel's prices, before anything of it is shown; return the looks so far."""
        hashes = {symbol: bars_hash(bars.frame) for symbol, bars in panel.items()}
        runs = [self._run(bars, hashes) for bars in panel.values()]
        before = count_verdicts(trials_log, *runs)
        record_run(trials_log, *runs)
        return before

    @property
    def needed_bars(self) -> int:
        """Bars that a symbol needs to be trained alone: warm-up, first training rows, a year of test."""
        config = self.config
        first_train = config.walk_forward.min_train_bars
        longest = max((config.horizon_bars, *config.path_horizons_bars))
        return MAX_WARMUP_BARS + first_train + longest + MINIMUM_TEST_BARS

    def walk(self, panel: Mapping[str, Bars], *, universe: str = "") -> Walked[FittedT]:
        """Walk the recipe forward over the panel, split by date, and fit it on all labelled rows.

        Further horizons come first, each on its own, so that the rows of one are in memory at a time.
        ``universe`` is what the panel is called; it is recorded.

        Raises
        ------
        InsufficientDataError
            When a symbol stands alone and its bars leave no year out of sample.
        """
        started = time.monotonic()
        if len(panel) == 1:
            ((symbol, bars),) = panel.items()
            check_enough(bars.frame, self.needed_bars, f"training {symbol} alone with one year out of sample")
        paths = tuple(self._walk_path(panel, bars_ahead) for bars_ahead in self.config.path_horizons_bars)
        self._begun = len(paths) / (len(paths) + 1)
        dataset, recipe, result, fitted = self.fit(panel)
        walked = Walked(
            dataset=dataset,
            hashes={symbol: bars_hash(bars.frame) for symbol, bars in panel.items()},
            result=result,
            fitted=fitted,
            trials=recipe.trials,
            started=started,
            universe=universe,
            paths=paths,
        )
        return walked if len(panel) == 1 else replace(walked, returns=self._book_together(walked, panel))

    def fit(
        self, panel: Mapping[str, Bars]
    ) -> tuple[Dataset, FinalRecipe[FittedT], WalkForwardResult, FittedT]:
        """Do `walk` for the one horizon that decides; nothing is booked."""
        self._stage("features", 0.0)
        frames = {symbol: bars.frame for symbol, bars in panel.items()}
        dataset = build_dataset(frames, self.config.horizon_bars)
        dataset = begin_with_others(dataset, self.config.recipe.leave_out)
        recipe = self.recipe(dataset)
        result = self._walk_forward(dataset, recipe)
        self._stage("final fit", WALKED_AT)
        return dataset, recipe, result, recipe.fit_all(dataset, result.record)

    def _walk_path(self, panel: Mapping[str, Bars], horizon_bars: int) -> WalkedPath[FittedT]:
        """Walk a further horizon, which nobody judges: its folds are told to nobody."""
        ahead = self.config.path_horizons_bars
        place, share = ahead.index(horizon_bars), 1 / (len(ahead) + 1)

        def tell(event: Mapping[str, Any]) -> None:
            if event["type"] == "stage":
                progress = round(share * (place * WALKED_AT + event["progress"]), 3)
                self._tell({**event, "stage": f"{horizon_bars} bars, {event['stage']}", "progress": progress})

        config = replace(self.config, horizon_bars=horizon_bars, path_horizons_bars=())
        _dataset, _recipe, result, fitted = type(self)(config, tell).fit(panel)
        return WalkedPath(horizon_bars=horizon_bars, record=result.record, fitted=fitted)

    def _book_together(self, walked: Walked[FittedT], panel: Mapping[str, Bars]) -> FloatArray:
        """Book the decided positions of every symbol with two forecasts or more; see `Walked.returns`."""
        self._stage("positions of the universe", 0.92)
        # A position earns from the session after the one that decided it.
        counts = walked.result.record["symbol"].value_counts()
        strategies, benchmarks = {}, {}
        for symbol in (name for name in panel if counts.get(name, 0) >= 2):
            report = self._book(panel[symbol], self._bundle(panel[symbol], walked))
            strategies[symbol] = report.daily["net_return"]
            benchmarks[symbol] = report.benchmarks["exposure_matched"].daily["net_return"]
        both = (pd.DataFrame(returns).mean(axis=1) for returns in (strategies, benchmarks))
        return np.column_stack([np.asarray(returns, dtype=np.float64) for returns in both])

    def judge_together(self, walked: Walked[FittedT], *, n_trials: int = 1) -> Verdict | None:
        """Judge a panel as one: all forecasts, and the decided positions in equal parts; None for one symbol.

        ``n_trials`` counts the verdicts on the prices of the symbol that it is wanted for.
        """
        if walked.returns is None:
            return None
        return judge(
            walked.result.record,
            horizon_bars=self.config.horizon_bars,
            strategy_return=walked.returns[:, 0],
            benchmark_return=walked.returns[:, 1],
            summary=walked.result.summary,
            n_verdicts=n_trials,
        )

    def _book(self, bars: Bars, bundle: BundleT) -> BacktestReport:
        """Decide on every out-of-sample row with the skill that was known of then, and book it."""
        return backtest_decisions(self._decide(bars, bundle, as_lived=True), self.config.costs)

    def _decide(self, bars: Bars, bundle: BundleT, *, as_lived: bool = False) -> Decisions:
        forecaster = BundleForecaster(bundle=bundle, as_lived=as_lived)
        return decide(bars.symbol, bars.frame, forecaster, make_sizer(), costs=self.config.costs)

    def conclude(
        self, walked: Walked[FittedT], bars: Bars, *, n_trials: int = 1, problems: Sequence[str] = ()
    ) -> Trained[BundleT]:
        """Judge one symbol of the panel on its own rows, with its own calibration.

        Parameters
        ----------
        walked
            What `walk` returned.
        bars
            The symbol's prices, as they were in the panel.
        n_trials
            Looks at these prices so far, see `register`.
        problems
            What is known to be amiss with the prices, in words; kept with the model.

        Raises
        ------
        InsufficientDataError
            When the walk-forward holds less than a year of known outcomes of the symbol.
        """
        self._stage("verdict", 0.95)
        record = walked.result.record
        n_known = int(record.loc[record["symbol"] == bars.symbol, "realised_log"].notna().sum())
        if n_known < MINIMUM_TEST_BARS:
            raise InsufficientDataError(
                f"{bars.symbol} has {n_known} out-of-sample forecasts with a known outcome in this panel, "
                f"{MINIMUM_TEST_BARS} (a year) are needed: choose a symbol with later or more prices"
            )
        bundle = self._bundle(bars, walked)
        verdict, backtest = self.judge(bars, bundle, walked.result, n_trials=n_trials)
        pooled = self.judge_together(walked, n_trials=n_trials)
        if pooled is not None and bars.symbol not in self.config.recipe.leave_out:
            verdict = of_universe(pooled, verdict, bars.symbol, len(walked.hashes))
        bundle = replace(bundle, metadata={**bundle.metadata, "verdict": verdict.as_dict()})
        served = backtest_decisions(self._decide(bars, bundle), self.config.costs)
        judged = {
            "data": {**bundle.metadata["data"], "problems": [*bars.report.problems(), *problems]},
            "metrics": {**headline_metrics(served), "correlation": verdict.evidence["ic"]},
            "folds": fold_table(walked.result, bundle.record, backtest),
            "path_models": {str(path.horizon_bars): path.figures(bars.symbol) for path in walked.paths},
            "duration_s": round(time.monotonic() - walked.started, 1),
        }
        own = np.flatnonzero(walked.dataset.symbol_code == walked.dataset.symbols.index(bars.symbol))
        return Trained(
            bundle=replace(bundle, metadata={**bundle.metadata, **judged}),
            walk_forward=walked.result,
            verdict=verdict,
            backtest=backtest,
            trials=walked.trials,
            golden_inputs=walked.dataset.features[own[-self.golden_rows :]],
        )

    def judge(
        self, bars: Bars, bundle: BundleT, result: WalkForwardResult, *, n_trials: int = 1
    ) -> tuple[Verdict, BacktestReport]:
        """Book the decided positions, and weigh the evidence of the symbol alone."""
        decisions = self._decide(bars, bundle, as_lived=True)
        backtest = backtest_decisions(decisions, self.config.costs)
        verdict = judge(
            bundle.record,
            horizon_bars=bundle.horizon_bars,
            strategy_return=backtest.daily["net_return"].to_numpy(),
            benchmark_return=backtest.benchmarks["exposure_matched"].daily["net_return"].to_numpy(),
            summary=result.summary,
            n_verdicts=n_trials,
        )
        return one_session_later(verdict, decisions, self.config.costs), backtest

    def _walk_forward(self, dataset: Dataset, recipe: FinalRecipe[FittedT]) -> WalkForwardResult:
        validator = WalkForwardValidator(self.config.walk_forward)
        n_folds = validator.n_folds(dataset)

        def on_fold(fold: FoldResult) -> None:
            done = fold.number + 1
            self._tell({"type": "fold", **fold.as_dict()})
            self._stage(f"walk-forward, fold {done} of {n_folds}", 0.05 + 0.85 * done / n_folds)

        return validator.run(dataset, recipe, on_fold=on_fold)

    def _bundle(self, bars: Bars, walked: Walked[FittedT]) -> BundleT:
        record = walked.result.record
        own = record[record["symbol"] == bars.symbol].reset_index(drop=True)
        return self.bundle_of(walked, bars.symbol, own, self._metadata(bars, walked, own))

    def _metadata(self, bars: Bars, walked: Walked[FittedT], record: pd.DataFrame) -> dict[str, Any]:
        created_at = datetime.now(UTC)
        config, dataset = self.config, walked.dataset
        return {
            "schema_version": 1,
            "model_id": f"{bars.symbol}-{self.kind.name}",
            "model_version": new_version_id(created_at),
            "symbol": bars.symbol,
            "created_at": created_at.isoformat(timespec="seconds"),
            "horizon_bars": config.horizon_bars,
            "source": bars.provenance.source,
            "data_hash": walked.hashes[bars.symbol],
            "data": {
                "hash": walked.hashes[bars.symbol],
                "first_session": f"{bars.frame.index[0]:%Y-%m-%d}",
                "last_session": f"{bars.frame.index[-1]:%Y-%m-%d}",
                "n_bars": len(bars.frame),
            },
            "universe": universe_facts(walked, left_out=config.recipe.leave_out),
            "trained_through": str(dataset.label_end[dataset.labelled].max()),
            "out_of_sample_from": f"{record['date'].min():%Y-%m-%d}",
            "seed": config.recipe.seed,
            "feature_set_hash": feature_set_hash(),
            "recipe": asdict(config),
            **self.facts,
            "summary": asdict(walked.result.summary),
            "verdict": NOT_JUDGED_YET,
            "folds": [fold.as_dict() for fold in walked.result.folds],
        }

    def _run(self, bars: Bars, hashes: Mapping[str, str]) -> Run:
        """Return what identifies this run among all that looked at the symbol."""
        prices = hashes[bars.symbol] if len(hashes) == 1 else dict(hashes)
        content = json.dumps([prices, feature_set_hash(), self.identity()], sort_keys=True)
        return Run(
            symbol=bars.symbol,
            first_session=f"{bars.frame.index[0]:%Y-%m-%d}",
            last_session=f"{bars.frame.index[-1]:%Y-%m-%d}",
            fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        )

    def _stage(self, stage: str, progress: float) -> None:
        if progress <= WALKED_AT:
            progress = WALKED_AT * self._begun + (1.0 - self._begun) * progress
        self._tell({"type": "stage", "stage": stage, "progress": round(progress, 3)})


def one_session_later(verdict: Verdict, decisions: Decisions, costs: CostModel) -> Verdict:
    """Add what the same positions earn when they are taken a session later: no close decides on itself."""
    frame = decisions.frame
    late = replace(decisions, frame=frame.assign(target_weight=frame["target_weight"].shift(1).fillna(1.0)))
    report = backtest_decisions(late, costs)
    matched = report.benchmarks["exposure_matched"].daily["net_return"]
    annual = float((report.daily["net_return"] - matched).mean()) * costs.periods_per_year
    text = f"taken one session later, the same positions earn {annual:+.2%} a year over equal exposure"
    return replace(
        verdict,
        reasons=(*verdict.reasons, text) if verdict.evidence["p_return"] is not None else verdict.reasons,
        evidence={**verdict.evidence, "active_return_one_session_later_annual": annual},
    )


def universe_facts(walked: Walked[Any], *, left_out: Sequence[str]) -> dict[str, Any] | None:
    """Return what a bundle remembers of the other symbols of its panel; None where there were none."""
    if len(walked.hashes) == 1:
        return None
    data = walked.dataset
    last = {name: str(data.date[data.symbol_code == i].max()) for i, name in enumerate(data.symbols)}
    size = f"{len(walked.hashes)} symbols, {len(data):,} rows"
    without = f"; without the rows of {', '.join(left_out)}" if left_out else ""
    return {
        "name": walked.universe,
        "described": f"{walked.universe or 'unnamed'}: {size}{without}",
        "symbols": list(walked.hashes),
        "data": {name: {"hash": text, "last_session": last[name]} for name, text in walked.hashes.items()},
        "left_out": list(left_out),
        "n_rows": len(data),
    }


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
