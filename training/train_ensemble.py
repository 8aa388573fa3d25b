"""Join the boosters and the network of one or more symbols, judge what they say together, and save it.

::

    python -m training.train_ensemble AAPL --source sample
    python -m training.train_ensemble AAPL --method xgb-meta --overwrite

Members are never fitted here: all that is learned from is what their bundles said out of sample. A
meta-learner is walked forward over that, so that it never scores a row that it was fitted on, and stands only
where it beats the simple ensemble on the rows that both scored.
"""

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import xgboost
from rich.console import Console
from sklearn.linear_model import ElasticNet

from data.data_splitter import WalkForwardSplit, walk_rows
from data.schema import Bars, bars_hash, normalise_symbol
from data.target_engineering import make_target
from evaluation.accounting import CostModel
from evaluation.metrics import spearman
from evaluation.report import ensemble_report
from inference.artifact import library_versions
from inference.ensemble import (
    MEMBERS,
    META_COLUMNS,
    OUTCOME_LIMIT_SIGMA,
    EnsembleBundle,
    EnsembleForecaster,
    MetaModel,
    Method,
    SimpleEnsemble,
    Stacked,
    meta_features,
    save_ensemble,
)
from inference.intervals import FloatArray, IntArray
from inference.load_gbm_models import load_bundle
from inference.load_lstm_model import load_bundle as load_lstm
from inference.pipeline import Bundle, BundleForecaster, Decisions, backtest_decisions, decide
from inference.position_sizing import make_sizer
from training import run_log
from training.train_gbm import fetch, look, record_verdict
from training.trainer import OnEvent, as_told, facts_of, figures_of, headline_metrics, judge_lived, run_of
from utils.base import AIStocksError, InsufficientDataError, ModelMissingError, Settings, read_settings
from utils.model_paths import ENSEMBLE, GBM, LSTM, artifact_link, training_lock
from validation.gates import in_words, judge, ranks_better_p_value, refuse_without_edge
from validation.wfe_metrics import Run, n_verdicts_of, share_of_limits

# A year of rows that both members forecast, below which joining them teaches nothing.
LEAST_COMMON_ROWS = 252
# Few trees, flat and slow: there is little to learn, and nearly all of it is linear.
TREES = {"max_depth": 2, "eta": 0.05, "min_child_weight": 100, "lambda": 10, "base_score": 0, "nthread": 1}
N_TREES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaConfig:
    """How a meta-learner is fitted, walked forward, and measured against the simple ensemble.

    The linear one's penalty is on standardised columns. ``max_p`` is the largest one-sided p-value of "it
    ranks no better than the simple ensemble". ``walk_forward`` splits what is learned from what is scored.
    """

    alpha: float = 0.01
    l1_ratio: float = 0.5
    max_p: float = 0.05
    walk_forward: WalkForwardSplit = field(
        default_factory=lambda: WalkForwardSplit(test_bars=126, min_train_bars=504)
    )
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonRows:
    """The rows that both members forecast out of sample, ascending.

    What the simple ensemble said, and what came (NaN where not known yet), are in volatilities, (n,);
    ``label_end`` is the session at whose close the outcome is known (NaT where not yet), (n,).
    """

    features: pd.DataFrame
    simple: FloatArray
    outcome: FloatArray
    date: npt.NDArray[np.datetime64]
    label_end: npt.NDArray[np.datetime64]
    horizon_bars: int


def fit_meta(method: Method, features: pd.DataFrame, outcome: FloatArray, config: MetaConfig) -> MetaModel:
    """Fit a meta-learner on rows with a known outcome (in volatilities, (n,))."""
    known = features[list(META_COLUMNS[method])].to_numpy(dtype=np.float64)
    centre, scale = known.mean(axis=0), known.std(axis=0)
    scale[scale <= 1e-12] = 1.0
    standard = (known - centre) / scale
    target = winsorised(outcome)
    found = MetaModel(method=method, centre=tuple(centre.tolist()), scale=tuple(scale.tolist()))
    if method == "stacking":
        linear = ElasticNet(alpha=config.alpha, l1_ratio=config.l1_ratio, positive=True).fit(standard, target)
        return replace(found, coefficients=tuple(map(float, linear.coef_)))
    data = xgboost.DMatrix(standard.astype(np.float32), target)
    booster = xgboost.train({**TREES, "seed": config.seed}, data, num_boost_round=N_TREES)
    return replace(found, booster=booster)


def walk_meta(method: Method, rows: CommonRows, config: MetaConfig) -> "pd.Series[float]":
    """Walk a meta-learner forward; return what it said by session, see `walk_rows`."""

    def fit(learned: IntArray) -> Callable[[IntArray], FloatArray]:
        meta = fit_meta(method, rows.features.iloc[learned], rows.outcome[learned], config)
        return lambda scored: meta.predict(rows.features.iloc[scored])

    said = walk_rows(fit, rows.date, rows.label_end, config.walk_forward, horizon_bars=rows.horizon_bars)
    return pd.Series(said, index=rows.features.index).dropna()


def compare(method: Method, said: "pd.Series[float]", rows: CommonRows, config: MetaConfig) -> dict[str, Any]:
    """Measure a meta-learner against the simple ensemble on the rows that both scored, as plain data.

    ``is_kept`` tells whether the meta-learner stands; a figure is None where it cannot be told.
    """
    scored = np.isin(rows.features.index, said.index) & np.isfinite(rows.outcome)
    stacked = np.asarray(said.reindex(rows.features.index[scored]), dtype=np.float64)
    simple, outcome = rows.simple[scored], winsorised(rows.outcome[scored])
    p_value = ranks_better_p_value(stacked, simple, outcome, rows.horizon_bars)
    found: dict[str, Any] = {
        "method": method,
        "ic": spearman(stacked, outcome).value,
        "simple_ic": spearman(simple, outcome).value,
        "p_value": p_value,
        "n_rows": int(scored.sum()),
        "is_kept": p_value is not None and p_value <= config.max_p,
    }
    ending = "it stands" if found["is_kept"] else "it does not win, and the simple ensemble stands"
    told = {name: in_words(found[name], ".4g") for name in ("ic", "simple_ic", "p_value")}
    found["words"] = (
        f"{method} against the simple ensemble on {scored.sum()} rows that it was not fitted on: IC "
        f"{told['ic']} against {told['simple_ic']}, p {told['p_value']} (at most {config.max_p:g}): {ending}"
    )
    return found


def winsorised(outcome: FloatArray) -> FloatArray:
    """Return outcomes without their mean, within `OUTCOME_LIMIT_SIGMA`, (n,)."""
    apart = outcome - outcome.mean()
    return np.asarray(np.clip(apart, -OUTCOME_LIMIT_SIGMA, OUTCOME_LIMIT_SIGMA), dtype=np.float64)


class EnsembleTrainer:
    """Joins two bundles of one symbol, walks a meta-learner over what they said, and judges the result.

    Of the ``method`` that is tried, ``simple`` tries nothing beyond the simple ensemble. Members that look
    ahead different numbers of bars are a `ModelIncompatibleError`.
    """

    def __init__(
        self, gbm: Bundle, lstm: Bundle, *, method: Method = "simple", config: MetaConfig | None = None
    ) -> None:
        self.members = dict(zip(MEMBERS, (gbm, lstm), strict=True))
        self.versions = {name: one.model_version for name, one in self.members.items()}
        self.method = method
        self.config = config or MetaConfig()
        self.costs = CostModel()

    @property
    def asked(self) -> dict[str, Any]:
        """What is joined, and how, as plain data."""
        facts = {"horizon_bars": self.members[MEMBERS[0]].horizon_bars, "method": self.method}
        return {**facts, "members": self.versions, **asdict(self.config)}

    def run(self, bars: Bars) -> Run:
        """Return what identifies this look at the prices; members that were only saved anew are the same."""
        said = {
            name: hashlib.sha256(np.asarray(one.record["raw_scaled"]).tobytes()).hexdigest()
            for name, one in self.members.items()
        }
        content = [bars_hash(bars.frame), said, self.method, asdict(self.config), asdict(SimpleEnsemble())]
        # Where a meta-learner is tried, two verdicts are there to choose from.
        n_trials = 1 if self.method == "simple" else 2
        return run_of(bars, content, ENSEMBLE, f"{self.method}, seed {self.config.seed}", n_trials)

    def train(
        self, bars: Bars, *, earlier: Sequence[Run] = (), limits_share: float | None = None
    ) -> EnsembleBundle:
        """Join, compare and judge; nothing is saved. `InsufficientDataError`: less than a year in common.

        ``bars`` are those that the members were trained on, and later ones; ``earlier`` the looks before.
        """
        plain = self._bundle(bars)
        frame = self._join(plain).centre(bars.frame)
        rows = common_rows(frame, bars, plain.horizon_bars)
        bundle, compared = plain, None
        if self.method != "simple":
            said = walk_meta(self.method, rows, self.config)
            compared = compare(self.method, said, rows, self.config)
            if compared["is_kept"]:
                known = np.isfinite(rows.outcome)
                meta = fit_meta(self.method, rows.features[known], rows.outcome[known], self.config)
                bundle = replace(plain, method=self.method, stacked=Stacked(said=said, meta=meta))
                frame = self._join(bundle).centre(bars.frame)
        record = record_of(frame, bars, plain.horizon_bars, bundle.stacked)
        lived = self._decide(self._join(bundle), bars)
        n_own, share = self.run(bars).n_trials, limits_share
        weigh = partial(
            judge,
            horizon_bars=bundle.horizon_bars,
            n_verdicts=n_own + n_verdicts_of(earlier),
            limits_share=share_of_limits(bars.symbol, earlier, n_own) if share is None else share,
        )
        verdict, _ = judge_lived(record, lived, self.costs, weigh)
        metadata = {
            **plain.metadata,
            "method": bundle.method,
            "out_of_sample_from": f"{record['date'].iloc[0]:%Y-%m-%d}",
            "verdict": verdict.as_dict(),
            "tries": as_told(earlier),
            "parts": self._parts(bars, frame, record, compared),
        }
        judged = replace(bundle, record=record, metadata=metadata)
        served = backtest_decisions(self._decide(self._join(judged, as_lived=False), bars), self.costs)
        metadata["metrics"] = {**headline_metrics(served), "correlation": verdict.evidence["ic"]}
        return judged

    def _join(self, bundle: EnsembleBundle, *, as_lived: bool = True) -> EnsembleForecaster:
        return bundle.join(*self.members.values(), as_lived=as_lived)

    def _decide(self, forecaster: EnsembleForecaster, bars: Bars) -> Decisions:
        return decide(bars.symbol, bars.frame, forecaster, make_sizer(), costs=self.costs)

    def _bundle(self, bars: Bars) -> EnsembleBundle:
        """Return the simple ensemble of the members, not judged yet."""
        weights, (gbm, _lstm) = SimpleEnsemble(), self.members.values()
        return EnsembleBundle(
            symbol=bars.symbol,
            horizon_bars=gbm.horizon_bars,
            method="simple",
            members=self.versions,
            weights=weights,
            record=pd.DataFrame(),
            metadata={
                **facts_of(bars, ENSEMBLE, gbm.horizon_bars, bars_hash(bars.frame)),
                "trained_through": max(str(one.metadata["trained_through"]) for one in self.members.values()),
                "feature_set_hash": gbm.metadata["feature_set_hash"],
                "seed": self.config.seed,
                "versions": library_versions(["xgboost", "scikit-learn", "numpy", "pandas"]),
                "members": self.versions,
                "recipe": {"asked": self.method, "meta": asdict(self.config), "weights": asdict(weights)},
            },
        )

    def _parts(
        self, bars: Bars, frame: pd.DataFrame, record: pd.DataFrame, compared: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the parts beside the whole, all on the rows that both members forecast."""
        h, signals = self.members[MEMBERS[0]].horizon_bars, frame[[f"model_{name}" for name in MEMBERS]]
        sessions = frame.index[signals.notna().all(axis=1) & frame["is_out_of_sample"]]
        own = record[record["date"].isin(sessions)].reset_index(drop=True)
        records, errors = {"ensemble": own}, {}
        known = own["realised_log"].notna().to_numpy()
        for name, bundle in self.members.items():
            centre = BundleForecaster(bundle=bundle, as_lived=True).centre(bars.frame).loc[sessions]
            alone = centre.rename(columns={"expected_log": "predicted_log"}).reset_index(drop=True)
            records[name] = own.assign(**alone[["raw_scaled", "predicted_log", "baseline_log"]])
            missed = (own["realised_log"] - alone["predicted_log"]) / own["sigma_log"]
            errors[name] = np.asarray(missed[known], dtype=np.float64)
        weights = {name: float(frame[f"weight_{name}"].iloc[-1]) for name in MEMBERS}
        return {
            "table": [{"part": name, **figures_of(one, h)} for name, one in records.items()],
            "error_correlation": spearman(*errors.values()).value,
            "signal_correlation": spearman(*signals.loc[sessions].to_numpy(dtype=np.float64).T).value,
            "weights": weights,
            "compared": compared,
            "notes": [*weight_notes(weights, int(known.sum())), *([compared["words"]] if compared else [])],
        }


def common_rows(frame: pd.DataFrame, bars: Bars, horizon_bars: int) -> CommonRows:
    """Return the rows that both members forecast out of sample, a year at least, from their centre."""
    signals = {name: np.asarray(frame[f"model_{name}"], dtype=np.float64) for name in MEMBERS}
    rows = np.isfinite([*signals.values()]).all(axis=0) & frame["is_out_of_sample"].to_numpy(dtype=bool)
    if rows.sum() < LEAST_COMMON_ROWS:
        raise InsufficientDataError(
            f"the boosters and the LSTM of {bars.symbol} share {int(rows.sum())} out-of-sample forecasts of "
            f"these prices, {LEAST_COMMON_ROWS} (a year) are needed: train both on the same prices"
        )
    target = make_target(bars.frame, horizon_bars)[rows]
    return CommonRows(
        features=meta_features(bars.frame, signals)[rows],
        simple=np.asarray(frame.loc[rows, "raw_scaled"], dtype=np.float64),
        outcome=np.asarray(target["target_log"] / frame.loc[rows, "sigma_log"], dtype=np.float64),
        date=np.asarray(target.index, dtype="datetime64[D]"),
        label_end=np.asarray(target["label_end"], dtype="datetime64[D]"),
        horizon_bars=horizon_bars,
    )


def record_of(frame: pd.DataFrame, bars: Bars, horizon_bars: int, stacked: Stacked | None) -> pd.DataFrame:
    """Return what the ensemble said out of sample, one row per session, ascending."""
    columns = ["baseline_log", "raw_scaled", "sigma_log", "skill_lower"]
    record = frame[[*columns, *(f"weight_{name}" for name in MEMBERS)]].copy()
    record.insert(0, "date", pd.DatetimeIndex(frame.index).as_unit("us"))
    target = make_target(bars.frame, horizon_bars)
    record["symbol"], record["predicted_log"] = bars.symbol, frame["expected_log"]
    record["realised_log"], record["label_end"] = target["target_log"], target["label_end"]
    if stacked is not None:
        record["stacked_scaled"] = stacked.said.reindex(frame.index)
    return record[frame["is_out_of_sample"].to_numpy(dtype=bool)].reset_index(drop=True)


def as_logged(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts beside the whole as figures by name; the words stand in console and report."""
    table = {row["part"]: {name: row[name] for name in row if name != "part"} for row in parts["table"]}
    compared = {name: value for name, value in (parts["compared"] or {}).items() if name != "words"}
    return {name: parts[name] for name in parts if name != "notes"} | {"table": table, "compared": compared}


def weight_notes(weights: dict[str, float], n_rows: int) -> list[str]:
    """Say what the members count, and that one of them counts nothing."""
    told = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
    zero = (name for name, weight in weights.items() if weight == 0.0)
    return [
        f"weights at the last session, by what {n_rows} forecasts were worth, from .70 and .30: {told}",
        *(f"the weight of {name} is zero: on these forecasts it adds nothing clear" for name in zero),
    ]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser, model = run_log.common_parser(ENSEMBLE, "Join boosters and network, and judge the whole.")
    model.add_argument(
        "--method", choices=get_args(Method), default="simple", help="what is tried (default: simple)"
    )
    return parser


def members_of(symbol: str, args: argparse.Namespace, settings: Settings) -> tuple[Bundle, Bundle]:
    """Load both members; say which of them is missing, and what makes it from the same prices."""
    kind, options = GBM, f" --source {shlex.quote(args.source)}" if args.source else ""
    try:
        gbm = load_bundle(settings.models_dir, symbol)
        kind = LSTM
        return gbm, load_lstm(settings.models_dir, symbol)
    except ModelMissingError as error:
        command = kind.train(symbol, options=options)
        raise ModelMissingError(f"no {kind.name} model of {symbol}: run {command}") from error


def join_symbol(symbol: str, args: argparse.Namespace, settings: Settings) -> run_log.Outcome:
    """Load both members, join, judge, save and report; return the result as plain data."""
    run_log.refuse_existing(symbol, args, settings)
    gbm, lstm = members_of(symbol, args, settings)
    bars = fetch(symbol, args, settings)
    trainer = EnsembleTrainer(gbm, lstm, method=args.method, config=MetaConfig(seed=args.seed))
    with (
        training_lock(settings.models_dir, symbol),
        run_log.logged_run(settings.logs_dir, symbol, trainer.asked, ENSEMBLE.name) as log,
    ):
        run = trainer.run(bars)
        earlier, shares = look(settings, [run])
        bundle = trainer.train(bars, earlier=earlier, limits_share=shares.get(symbol))
        metadata, verdict, saved = bundle.metadata, bundle.metadata["verdict"], None
        record_verdict(settings, run, verdict)
        log.end(metadata, as_logged(metadata["parts"]))
        page = ensemble_report(
            symbol=symbol, metadata=metadata, record=bundle.record, findings=bars.report.problems()
        )
        report = run_log.publish(page, settings.logs_dir, metadata)
        if args.strict:
            refuse_without_edge(symbol, verdict, report)
        if not args.validate_only:
            save_ensemble(bundle, settings.models_dir)
            saved = artifact_link(settings.models_dir, symbol, ENSEMBLE)
        log.has_ended = True
    paths = {"bundle": saved, "report": report, "log": log.path}
    outcome = run_log.outcome_of(metadata, ("members", "parts"), paths)
    return {**outcome, "status": log.status, "asked": args.method, "method": bundle.method}


def main(argv: Sequence[str] | None = None) -> int:
    """Join the symbols' models; return the exit code that `utils.base` lists, of the first failure."""
    args = build_parser().parse_args(argv)
    settings = read_settings()

    def join_all(_console: Console, tell: OnEvent) -> Iterator[run_log.Outcome]:
        for raw in dict.fromkeys(args.symbols):
            tell({"type": "stage", "stage": f"{raw}: joining boosters and LSTM", "progress": 0.0})
            try:
                yield join_symbol(normalise_symbol(raw), args, settings)
            except AIStocksError as error:
                yield run_log.refused(raw, error)

    return run_log.tell_all(join_all, args, settings)


if __name__ == "__main__":
    sys.exit(main())
