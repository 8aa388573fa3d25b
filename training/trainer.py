"""Walk a recipe forward over one symbol or a panel, fit it on all rows, and judge it for each symbol."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pandas as pd

from data.feature_engineer import MAX_WARMUP_BARS, feature_set_hash
from data.schema import Bars, bars_hash, check_enough
from data.target_engineering import DEFAULT_HORIZON_BARS, Dataset, build_dataset
from evaluation.accounting import CostModel
from evaluation.advanced_backtester import BacktestReport
from evaluation.metrics import values
from inference.artifact import GOLDEN_ROWS, new_version_id
from inference.intervals import FloatArray, FloatMatrix
from inference.pipeline import Bundle, BundleForecaster, Decisions, backtest_decisions, decide
from inference.position_sizing import alternative_returns, make_sizer
from utils.base import InsufficientDataError
from utils.model_paths import ArtifactKind
from validation.gates import Verdict, judge, of_universe
from validation.walk_forward import (
    FittedRecipe,
    FoldResult,
    WalkForwardConfig,
    WalkForwardResult,
    WalkForwardValidator,
    fold_table,
)
from validation.wfe_metrics import Run, n_verdicts_of, share_of_limits

MINIMUM_TEST_BARS = 252
NOT_JUDGED_YET = {"label": "no-edge", "reasons": [], "evidence": {}}
PATH_EVIDENCE = ("ic", "p_ic", "calibration_slope", "skill_over_drift", "n_rows")
WALKED_AT = 0.9
OnEvent = Callable[[Mapping[str, Any]], None]
Trials = tuple[Mapping[str, object], ...]
FittedT = TypeVar("FittedT", bound=FittedRecipe)
BundleT = TypeVar("BundleT", bound=Bundle)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Which rows any recipe is fitted on, and towards what.

    ``common_move_share`` of the session's mean target over the panel is taken off the training targets: what
    all symbols do together is mostly noise to a model of each. A row counts half at the age of
    ``weight_half_life_sessions``. Training targets, never outcomes, are winsorised at ``target_limit_sigma``
    volatilities. Rows of ``leave_out`` train and calibrate nothing: they prove that the model generalises.
    Features of a single symbol are screened, by ``screen_t`` and ``screen_share``, see `recipe.screen`.
    """

    common_move_share: float = 0.5
    weight_half_life_sessions: float = 252.0 * 20
    target_limit_sigma: float = 4.0
    leave_out: tuple[str, ...] = ()
    screen_t: float = 2.5
    screen_share: float = 0.6
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkConfig:
    """Everything that a training run of any kind of model is decided by; recorded in the bundle.

    What is judged and decides looks ``horizon_bars`` ahead; the forecast path also passes through
    ``path_horizons_bars``, each with a model of its own. ``costs`` are what the verdict's positions pay.
    """

    horizon_bars: int = DEFAULT_HORIZON_BARS
    path_horizons_bars: tuple[int, ...] = ()
    recipe: RowsConfig
    walk_forward: WalkForwardConfig = field(default_factory=WalkForwardConfig)
    costs: CostModel = field(default_factory=CostModel)


class FinalRecipe(ABC, Generic[FittedT]):
    """A recipe that is validated, and then fitted on everything; see `validation.walk_forward.Recipe`."""

    @property
    def trials(self) -> Trials:
        """Every trial of every search so far."""
        return ()

    @abstractmethod
    def fit(self, train: Dataset, *, fold: int, earlier: pd.DataFrame) -> FittedT:
        """Fit on rows before a fold; see `validation.walk_forward.Recipe.fit`."""

    def fit_all(self, dataset: Dataset, record: pd.DataFrame) -> FittedT:
        """Fit on every labelled row, calibrated on the whole walk-forward record."""
        labelled = dataset.take(np.flatnonzero(dataset.labelled))
        return self.fit(labelled, fold=0, earlier=record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Generic[BundleT]):
    """Outcome of a training run for one symbol, not saved yet."""

    bundle: BundleT
    walk_forward: WalkForwardResult
    verdict: Verdict
    backtest: BacktestReport
    trials: Trials
    golden_inputs: FloatMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked(Generic[FittedT]):
    """What all symbols of a run share: the rows, hashes of the prices, the walk-forward, the final fit.

    ``paths`` are the record, not saved, and the final fit of each further horizon. ``returns`` of a panel are
    the net returns per session of all symbols' positions in equal parts, and of their benchmarks, (m, 2).
    """

    dataset: Dataset
    hashes: Mapping[str, str]
    result: WalkForwardResult
    fitted: FittedT
    trials: Trials
    started: float = 0.0
    universe: str = ""
    paths: Mapping[int, tuple[pd.DataFrame, FittedT]] = field(default_factory=dict)
    returns: FloatArray | None = None


class Trainer(ABC, Generic[FittedT, BundleT]):
    """Runs the walk-forward, the final fit and the verdict: all that makes numbers honest, for every kind.

    ``on_event`` is told of every stage, ``{"type": "stage", "stage": ..., "progress": 0..1}``, and of the
    measures of every fold, ``{"type": "fold", ...}``; a kind may add events of its own.
    """

    kind: ClassVar[ArtifactKind]
    golden_rows: int = GOLDEN_ROWS  # whose features the golden outputs are made from

    def __init__(self, config: WalkConfig, on_event: OnEvent | None = None) -> None:
        self.config = config
        self._tell: OnEvent = on_event or (lambda _event: None)
        self._place = 0

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
        """What the metadata of a kind tell: ``versions``, ``device``, the reason; ``n_trials`` of search."""

    def identity(self) -> dict[str, Any]:
        """Return what of the configuration may change what is judged: not further horizons, not threads."""
        config = asdict(self.config)
        del config["path_horizons_bars"]
        config["recipe"].get("search", {}).pop("threads", None)
        return config

    def train(self, bars: Bars, earlier: Sequence[Run] = ()) -> "Trained[BundleT]":
        """Train one symbol on its own prices; see `walk` and `conclude`."""
        return self.conclude(self.walk({bars.symbol: bars}), bars, earlier)

    def runs(self, panel: Mapping[str, Bars]) -> list[Run]:
        """Return what identifies this run among all that looked at the panel, as each symbol sees it."""
        hashes = {symbol: bars_hash(bars.frame) for symbol, bars in panel.items()}
        prices = hashes if len(panel) > 1 else next(iter(hashes.values()))
        plain = type(self.config)(recipe=type(self.config.recipe)())
        usual, ours = (list(leaves(type(self)(config).identity())) for config in (plain, self.config))
        unlike = [f"{name} {value}" for name, value in ours if (name, value) not in usual]
        settings = ", ".join([f"{len(panel)} symbols"] * (len(panel) > 1) + unlike)
        content = [prices, feature_set_hash(), self.identity()]
        return [run_of(bars, content, self.kind, settings) for bars in panel.values()]

    @property
    def needed_bars(self) -> int:
        """Bars that a symbol needs to be trained alone: warm-up, first training rows, a year of test."""
        longest = max(self.config.horizon_bars, *self.config.path_horizons_bars, 0)
        return MAX_WARMUP_BARS + self.config.walk_forward.min_train_bars + longest + MINIMUM_TEST_BARS

    def walk(self, panel: Mapping[str, Bars], *, universe: str = "") -> Walked[FittedT]:
        """Walk the recipe forward, split by date, and fit it on all labelled rows; refuse too few bars."""
        started = time.monotonic()
        if len(panel) == 1:
            ((symbol, bars),) = panel.items()
            check_enough(bars.frame, self.needed_bars, f"training {symbol} alone with one year out of sample")
        self._place = 0
        # Further horizons come first, each on its own: the rows of one are in memory at a time.
        paths = {ahead: self._walk_path(panel, ahead) for ahead in self.config.path_horizons_bars}
        walked = replace(self.fit(panel), universe=universe, paths=paths, started=started)
        return walked if len(panel) == 1 else replace(walked, returns=self._book_together(walked, panel))

    def fit(self, panel: Mapping[str, Bars]) -> Walked[FittedT]:
        """Do `walk` for the one horizon that decides; nothing is booked."""
        self._stage("features", 0.0)
        frames = {symbol: bars.frame for symbol, bars in panel.items()}
        dataset = build_dataset(frames, self.config.horizon_bars)
        dataset = begin_with_others(dataset, self.config.recipe.leave_out)
        recipe = self.recipe(dataset)
        validator = WalkForwardValidator(self.config.walk_forward)
        n_folds = len(validator.folds(dataset))

        def on_fold(fold: FoldResult) -> None:
            done = fold.number + 1
            self._tell({"type": "fold", **fold.as_dict()})
            self._stage(f"walk-forward, fold {done} of {n_folds}", 0.05 + 0.85 * done / n_folds)

        result = validator.run(dataset, recipe, on_fold=on_fold)
        self._stage("final fit", WALKED_AT)
        return Walked(
            dataset=dataset,
            hashes={symbol: bars_hash(bars.frame) for symbol, bars in panel.items()},
            result=result,
            fitted=recipe.fit_all(dataset, result.record),
            trials=recipe.trials,
        )

    def _walk_path(self, panel: Mapping[str, Bars], horizon_bars: int) -> tuple[pd.DataFrame, FittedT]:
        """Walk a further horizon, which nobody judges: its folds are told to nobody."""

        def tell(event: Mapping[str, Any]) -> None:
            if event["type"] == "stage":
                self._stage(f"{horizon_bars} bars, {event['stage']}", event["progress"])

        config = replace(self.config, horizon_bars=horizon_bars, path_horizons_bars=())
        walked = type(self)(config, tell).fit(panel)
        self._place += 1
        return walked.result.record, walked.fitted

    def _book_together(self, walked: Walked[FittedT], panel: Mapping[str, Bars]) -> FloatArray:
        """Book the decided positions of every symbol with two forecasts or more; see `Walked.returns`."""
        self._stage("positions of the universe", 0.92)
        # A position earns from the session after the one that decided it.
        counts = walked.result.record["symbol"].value_counts()
        booked = []
        for bars in (bars for symbol, bars in panel.items() if counts.get(symbol, 0) >= 2):
            decisions = self._decide(bars, self._bundle(bars, walked), as_lived=True)
            booked.append(both_returns(backtest_decisions(decisions, self.config.costs)))
        both = (pd.DataFrame(dict(enumerate(returns))).mean(axis=1) for returns in zip(*booked, strict=True))
        return np.column_stack([np.asarray(returns, dtype=np.float64) for returns in both])

    def _decide(self, bars: Bars, bundle: BundleT, *, as_lived: bool) -> Decisions:
        """Decide on every row; ``as_lived``: with the skill that was known of then."""
        forecaster = BundleForecaster(bundle=bundle, as_lived=as_lived)
        return decide(bars.symbol, bars.frame, forecaster, make_sizer(), costs=self.config.costs)

    def conclude(
        self,
        walked: Walked[FittedT],
        bars: Bars,
        earlier: Sequence[Run] = (),
        problems: Sequence[str] = (),
        limits_share: float | None = None,
    ) -> Trained[BundleT]:
        """Judge one symbol on its own rows, a year at least; ``earlier`` looks at its prices count.

        ``limits_share`` is by default what those leave to it, see `wfe_metrics.share_of_limits`.
        """
        self._stage("verdict", 0.95)
        record, dataset = walked.result.record, walked.dataset
        n_known = int(of_symbol(record, bars.symbol)["realised_log"].notna().sum())
        if n_known < MINIMUM_TEST_BARS:
            raise InsufficientDataError(
                f"{bars.symbol} has {n_known} out-of-sample forecasts with a known outcome in this panel, "
                f"{MINIMUM_TEST_BARS} (a year) are needed: choose a symbol with later or more prices"
            )
        bundle = self._bundle(bars, walked)
        weigh = partial(
            judge,
            horizon_bars=bundle.horizon_bars,
            summary=walked.result.summary,
            n_verdicts=1 + n_verdicts_of(earlier),
            limits_share=share_of_limits(bars.symbol, earlier) if limits_share is None else limits_share,
        )
        lived = self._decide(bars, bundle, as_lived=True)
        verdict, backtest = judge_lived(bundle.record, lived, self.config.costs, weigh)
        if walked.returns is not None and bars.symbol not in self.config.recipe.leave_out:
            own, equal = walked.returns.T
            pooled = weigh(record, strategy_return=own, benchmark_return=equal)
            verdict = of_universe(pooled, verdict, bars.symbol, len(walked.hashes))
        bundle = replace(bundle, metadata={**bundle.metadata, "verdict": verdict.as_dict()})
        served = backtest_decisions(self._decide(bars, bundle, as_lived=False), self.config.costs)
        judged = {
            "data": {**bundle.metadata["data"], "problems": [*bars.report.problems(), *problems]},
            "metrics": {**headline_metrics(served), "correlation": verdict.evidence["ic"]},
            "folds": fold_table(walked.result, bundle.record, backtest),
            "path_models": {
                str(ahead): figures_of(of_symbol(theirs, bars.symbol), ahead)
                for ahead, (theirs, _fitted) in walked.paths.items()
            },
            "tries": as_told(earlier),
            "duration_s": round(time.monotonic() - walked.started, 1),
        }
        rows = dataset.features[dataset.symbol_code == dataset.symbols.index(bars.symbol)]
        return Trained(
            bundle=replace(bundle, metadata={**bundle.metadata, **judged}),
            walk_forward=walked.result,
            verdict=verdict,
            backtest=backtest,
            trials=walked.trials,
            golden_inputs=rows[np.isfinite(rows).all(axis=1)][-self.golden_rows :],
        )

    def _bundle(self, bars: Bars, walked: Walked[FittedT]) -> BundleT:
        config, dataset, own = self.config, walked.dataset, of_symbol(walked.result.record, bars.symbol)
        metadata = {
            **facts_of(bars, self.kind, config.horizon_bars, walked.hashes[bars.symbol]),
            "universe": universe_facts(walked, left_out=config.recipe.leave_out),
            "trained_through": str(dataset.label_end[dataset.labelled].max()),
            "out_of_sample_from": f"{own['date'].min():%Y-%m-%d}",
            "seed": config.recipe.seed,
            "feature_set_hash": feature_set_hash(),
            "sentiment": dict(bars.sentiment) or {"used": False, "reason": "not asked for"},
            "recipe": asdict(config),
            **self.facts,
            "summary": asdict(walked.result.summary),
            "verdict": NOT_JUDGED_YET,
        }
        return self.bundle_of(walked, bars.symbol, own, metadata)

    def _stage(self, stage: str, progress: float) -> None:
        """Tell of a stage; until `WALKED_AT`, ``progress`` is that of one of several walks."""
        if progress <= WALKED_AT:
            progress = (self._place * WALKED_AT + progress) / (1 + len(self.config.path_horizons_bars))
        self._tell({"type": "stage", "stage": stage, "progress": round(progress, 3)})


def judge_lived(
    record: pd.DataFrame, decisions: Decisions, costs: CostModel, weigh: Callable[..., Verdict]
) -> tuple[Verdict, BacktestReport]:
    """Book positions as they would have been lived, and taken a session later; `weigh` the evidence."""
    backtest = backtest_decisions(decisions, costs)
    strategy, benchmark = (np.asarray(found, dtype=np.float64) for found in both_returns(backtest))
    frame = decisions.frame
    tried = alternative_returns(frame, decisions.horizon_bars, costs, len(strategy))
    verdict = weigh(record, strategy_return=strategy, benchmark_return=benchmark, tried_returns=tried)
    late = replace(decisions, frame=frame.assign(target_weight=frame["target_weight"].shift(1).fillna(1.0)))
    annual = costs.periods_per_year * np.subtract(*both_returns(backtest_decisions(late, costs))).mean()
    text = f"taken one session later, the same positions earn {annual:+.2%} a year over equal exposure"
    reasons = verdict.reasons if verdict.evidence["p_return"] is None else (*verdict.reasons, text)
    found = {**verdict.evidence, "active_return_one_session_later_annual": float(annual)}
    return replace(verdict, reasons=reasons, evidence=found), backtest


def both_returns(report: BacktestReport) -> "tuple[pd.Series[float], pd.Series[float]]":
    """Return the daily net returns of positions, and of their benchmark of equal exposure."""
    return report.daily["net_return"], report.benchmarks["exposure_matched"].daily["net_return"]


def of_symbol(record: pd.DataFrame, symbol: str) -> pd.DataFrame:
    """Return one symbol's rows of the record of a panel."""
    return record[record["symbol"] == symbol].reset_index(drop=True)


def figures_of(record: pd.DataFrame, horizon_bars: int) -> dict[str, Any]:
    """Return what a record of out-of-sample rows says alone; None where undefined."""
    nothing = np.empty(0)
    found = judge(record, horizon_bars=horizon_bars, strategy_return=nothing, benchmark_return=nothing)
    return {name: found.evidence[name] for name in PATH_EVIDENCE}


def leaves(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings, each with its dotted name."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def run_of(bars: Bars, content: object, kind: ArtifactKind, settings: str, n_trials: int = 1) -> Run:
    """Return what identifies a run, whose outcome is decided by ``content``, among the looks at a symbol."""
    first, last = window(bars).values()
    return Run(
        symbol=bars.symbol,
        first_session=first,
        last_session=last,
        fingerprint=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        n_trials=n_trials,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind.name,
        settings=settings or "as they come",
    )


def window(bars: Bars) -> dict[str, str]:
    """Return between which sessions the prices lie."""
    first, last = (f"{bars.frame.index[at]:%Y-%m-%d}" for at in (0, -1))
    return {"first_session": first, "last_session": last}


def as_told(earlier: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the earlier runs whose looks count in a verdict, as plain data."""
    names = ("at", "kind", "symbol", "settings", "n_trials", "label", "limits_share")
    each: dict[str, Run] = {}
    for run in earlier:
        # What it found, where it was asked for one of these symbols.
        if run.label or run.fingerprint not in each:
            each[run.fingerprint] = run
    return [{name: getattr(run, name) or "not recorded" for name in names} for run in each.values()]


def facts_of(bars: Bars, kind: ArtifactKind, horizon_bars: int, prices_hash: str) -> dict[str, Any]:
    """Return what the metadata of every kind of model begin with."""
    created_at = datetime.now(UTC)
    return {
        "schema_version": 1,
        "model_id": f"{bars.symbol}-{kind.name}",
        "model_version": new_version_id(created_at),
        "symbol": bars.symbol,
        "created_at": created_at.isoformat(timespec="seconds"),
        "horizon_bars": horizon_bars,
        "source": bars.provenance.source,
        "data_hash": prices_hash,
        "data": {"hash": prices_hash, **window(bars), "n_bars": len(bars.frame)},
    }


def universe_facts(walked: Walked[Any], *, left_out: Sequence[str]) -> dict[str, Any] | None:
    """Return what a bundle remembers of its panel; None for a symbol that stands alone."""
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
    same = ("sharpe_ratio", "max_drawdown", "win_rate", "average_trade_profit", "total_trades", "turnover")
    return {
        "cumulative_return": found["total_return"],
        "directional_accuracy": found["direction_accuracy"],
        "transaction_costs": found["total_transaction_costs"],
        **{name: found[name] for name in same},
    }


def begin_with_others(data: Dataset, leave_out: tuple[str, ...]) -> Dataset:
    """Return the rows from the first session on of a symbol that is not left out."""
    others = ~np.isin(np.asarray(data.symbols)[data.symbol_code], leave_out)
    is_all = not leave_out or not others.any()
    return data if is_all else data.take(np.flatnonzero(data.date >= data.date[others].min()))
