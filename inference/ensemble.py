"""Several models as one forecaster: weighed, calibrated, learned from; saved, and chosen by a mode.

A `SimpleEnsemble` weighs models of different kinds by what their signals were worth before; a `MetaModel`
learns when to listen to which. A saved ensemble names the versions of its members that it was judged with.
Where there are others, or none, the boosters forecast alone, and a note says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import xgboost
from pydantic import BaseModel, Field, FiniteFloat, model_validator
from scipy.optimize import nnls

from data.target_engineering import make_target
from evaluation.metrics import overlap_error
from inference import artifact
from inference.artifact import METADATA, RECORD, Saved, Version
from inference.intervals import FloatArray, IntArray, calibrate, with_bands
from inference.pipeline import Bundle, BundleForecaster, Member, check_golden, read_record
from utils.base import ModelIncompatibleError, ModelMissingError
from utils.model_paths import ENSEMBLE, GBM, LSTM, Mode, mode_of

BoolArray = npt.NDArray[np.bool_]
Method = Literal["simple", "stacking", "xgb-meta"]
MEMBERS = (GBM.name, LSTM.name)
ENSEMBLE_FILE, META_BOOSTER = "ensemble.json", "meta_model.ubj"
LIBRARIES = ("xgboost", "numpy", "pandas", "ta-lib")
RECORD_COLUMNS = ("date", "raw_scaled", "predicted_log", "realised_log", "sigma_log")
# Rows between the end of a label and its first use, so that "before" never rests on one close.
EMBARGO_BARS = 1
# Fewer known rows than this tell nothing of skill, and nothing of a signal's spread, which is that of about
# so many rows: every fit of a model speaks with another voice.
LEAST_ROWS, LEAST_SPREAD_ROWS, SPREAD_ROWS = 126, 63, 252
# A signal is made louder or quieter by so much at most; one that spreads less than this says nothing.
MAX_LOUDER, CONSTANT = 10.0, 1e-9
# Signals and outcomes beyond so many spreads count as this many where skill is learned.
OUTCOME_LIMIT_SIGMA = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRows:
    """What the members said of one symbol, session by session, what came, and when that was known.

    Signals (n, k), a column a member, and outcomes (n,) are in h-day volatilities, NaN where there is none.
    Of rows that are out of sample for all members, each is learned from in rows ``known_from`` on alone.
    """

    signals: FloatArray
    outcome: FloatArray
    is_out_of_sample: BoolArray
    known_from: IntArray
    horizon_bars: int

    def refreshes(self, usable: BoolArray, every: int) -> Iterator[tuple[IntArray, slice]]:
        """Yield, for each stretch of ``every`` rows, the usable rows known before it, and its own.

        Stretches are counted from the first usable row, so that later rows move none of them.
        """
        wanted = usable & self.is_out_of_sample
        learned = wanted & np.isfinite(self.outcome)
        first = int(np.argmax(wanted)) if len(wanted) else 0
        for start in range(first, len(wanted), every):
            now = slice(start if start > first else 0, start + every)
            yield np.flatnonzero(learned & (self.known_from <= start)), now


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleEnsemble:
    """Joins members' signals by weights that start at a prior and move by out-of-sample skill alone.

    Every member speaks as loudly as the first one, as known by then, so that a weight is a share of what is
    said. The skills (information coefficients given the others) have a normal prior: the prior weights times
    `typical_ic`, give or take `ic_std`. The weights are the shares of their most likely values that are not
    negative. A member after the first gets exactly zero unless its skill given the others, as seen, lies more
    than one standard error above zero: the simpler forecast stands where no other clearly beats it (Breiman
    and others, 1984, Classification and Regression Trees). Both constants come from 45 series, of .034 on
    average and some .013 apart once the error of each is taken off; .015 counts as much as 4,400 independent
    rows. Weights and calibration are renewed every `refresh_rows` sessions.
    """

    # What a member's opinion counts before anything is known of it.
    prior: Mapping[str, float] = field(default_factory=lambda: {"gbm": 0.7, "lstm": 0.3})
    typical_ic: float = 0.03
    ic_std: float = 0.015
    refresh_rows: int = 63

    def weigh(self, rows: SignalRows, members: Sequence[str]) -> tuple[FloatArray, FloatArray]:
        """Follow the weights over time; row t uses outcomes that were known before t.

        Returns the weights of ``members``, (n, k), zero for one without a forecast, their sum one where there
        is any; and the joined signal, (n,), in the units of the first member that has one.
        """
        # How far each signal has been from zero lately, as known then; NaN where unknown.
        squares = pd.DataFrame(rows.signals**2).ewm(span=SPREAD_ROWS, min_periods=LEAST_SPREAD_ROWS).mean()
        spread = np.asarray(np.sqrt(squares), dtype=np.float64)
        heard = np.isfinite(rows.signals) & ~(spread <= CONSTANT)
        standard = np.where(heard, rows.signals, np.nan) / spread
        prior = np.array([self.prior[name] for name in members])
        weights = np.zeros_like(standard)
        for known, now in rows.refreshes(np.isfinite(standard.sum(axis=1)), self.refresh_rows):
            weights[now] = self._learned(standard[known], rows.outcome[known], prior, rows.horizon_bars)
        # Where only members without weight have a forecast, it is theirs.
        weights = np.where(heard, weights, 0.0)
        alone = weights.sum(axis=1) <= 0
        weights[alone] = np.where(heard[alone], prior, 0.0)
        total = weights.sum(axis=1)
        weights /= np.where(total > 0, total, 1.0)[:, np.newaxis]
        first = spread[np.arange(len(spread)), np.argmax(heard, axis=1)]
        louder = np.clip(first[:, np.newaxis] / np.where(heard, spread, 1.0), 1 / MAX_LOUDER, MAX_LOUDER)
        joined = (weights * np.nan_to_num(louder, nan=1.0) * np.where(heard, rows.signals, 0.0)).sum(axis=1)
        return weights, np.where(total > 0, joined, np.nan)

    def _learned(
        self, standard: FloatArray, outcome: FloatArray, prior: FloatArray, horizon_bars: int
    ) -> FloatArray:
        """Return the weights that known rows call for: signals in their spreads (m, k), what came (m,)."""
        n_rows, share = len(outcome), np.asarray(prior / prior.sum(), dtype=np.float64)
        if n_rows < LEAST_ROWS or outcome.std() <= CONSTANT:
            return share
        limit = OUTCOME_LIMIT_SIGMA
        came = np.asarray(np.clip(outcome - outcome.mean(), -limit, limit), dtype=np.float64)
        came /= came.std()
        said = np.asarray(np.clip(standard - standard.mean(axis=0), -limit, limit), dtype=np.float64)
        scores = said * came[:, np.newaxis]
        errors = [overlap_error(np.ascontiguousarray(one), horizon_bars) / n_rows for one in scores.T]
        # Labels overlap: so many independent rows are these worth.
        worth = 1.0 / max(float(np.mean(np.square(errors))), 1.0 / n_rows)
        trust = self.ic_std**-2
        together, covered = said.T @ said / n_rows, scores.mean(axis=0)
        apart = np.linalg.pinv(together)
        # Skill given the others, by what was seen alone, against its standard error.
        earns = apart @ covered > np.array(errors) * np.sqrt(np.diag(apart))
        earns[0] = True
        precision = worth * together[np.ix_(earns, earns)] + trust * np.eye(int(earns.sum()))
        root = np.linalg.cholesky(precision)
        wanted = (worth * covered + trust * self.typical_ic * share)[earns]
        skills = np.zeros(len(prior))
        skills[earns] = nnls(root.T, np.linalg.solve(root, wanted))[0]
        return np.asarray(skills / skills.sum() if skills.any() else share, dtype=np.float64)

    def calibrate(self, rows: SignalRows, raw_scaled: FloatArray) -> FloatArray:
        """Follow `calibrate` over time; row t uses outcomes that were known before t.

        Returns slope, mean of the raw signal, and lower bound of the skill as of each row, (3, n).
        """
        found = np.zeros((3, len(raw_scaled)))
        for known, now in rows.refreshes(np.isfinite(raw_scaled), self.refresh_rows):
            said, came = raw_scaled[known], rows.outcome[known]
            one = calibrate(said, came, drift=0.0, horizon_bars=rows.horizon_bars)
            found[:, now] = np.array([one.slope, one.raw_mean, one.skill_lower])[:, np.newaxis]
        return found


# Bars whose volatility is the storm or calm that a bar is compared with, and those of a trend.
REGIME_BARS, TREND_BARS, LEAST_REGIME_BARS, MAX_TREND = 1260, 200, 60, 3.0
# What the linear meta-learner sees, whose weights are not negative: each member in calm and in storm, and
# what both say. The trees find such products themselves.
META_COLUMNS: dict[str, tuple[str, ...]] = {
    "stacking": ("gbm_calm", "gbm_storm", "lstm_calm", "lstm_storm", "agreed"),
    "xgb-meta": ("gbm", "lstm", "agreed", "storm", "trend"),
}


def meta_features(bars: pd.DataFrame, signals: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Return what meta-learners see of each bar; row t is known at the close of t.

    ``signals`` are raw, in units of the h-day volatility, by member, (n,). ``storm``: rank of the volatility
    among its last `REGIME_BARS`, 0 to 1. ``trend``: distance from the mean of `TREND_BARS` closes, in
    volatilities over as many bars. ``agreed``: what both say at least, zero where they differ in sign.
    """
    gbm, lstm = signals[GBM.name], signals[LSTM.name]
    sigma_log = make_target(bars, 1)["sigma_log"]
    storm = sigma_log.rolling(REGIME_BARS, min_periods=LEAST_REGIME_BARS).rank(pct=True).fillna(0.5)
    close_log = np.log(bars["Close"])
    distance = close_log - close_log.rolling(TREND_BARS, min_periods=LEAST_REGIME_BARS).mean()
    trend = (distance / (sigma_log * np.sqrt(TREND_BARS))).clip(-MAX_TREND, MAX_TREND).fillna(0.0)
    common = np.where(np.sign(gbm) == np.sign(lstm), np.minimum(np.abs(gbm), np.abs(lstm)), 0.0)
    found = {"gbm": gbm, "lstm": lstm, "agreed": np.sign(gbm) * common, "storm": storm, "trend": trend}
    for name, signal in ((GBM.name, gbm), (LSTM.name, lstm)):
        found |= {f"{name}_calm": signal * (1.0 - storm), f"{name}_storm": signal * storm}
    return pd.DataFrame(found, index=bars.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """What a meta-learner is but for its trees, which lie in a file of their own: see `MetaModel`."""

    centre: tuple[FiniteFloat, ...]
    scale: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    coefficients: tuple[Annotated[FiniteFloat, Field(ge=0)], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaModel(Linear):
    """A fitted meta-learner: from `meta_features` to one signal in units of the h-day volatility.

    It sees `META_COLUMNS` of its method, standardised by ``centre`` and ``scale`` of the rows that it was
    fitted on, (p,); ``stacking`` has ``coefficients``, none negative, and ``xgb-meta`` a ``booster``.
    """

    method: Method
    booster: xgboost.Booster | None = None

    def predict(self, features: pd.DataFrame) -> FloatArray:
        """Return the signal of rows with both members, (n,)."""
        known = features[list(META_COLUMNS[self.method])].to_numpy(dtype=np.float64)
        standard = (known - np.array(self.centre)) / np.array(self.scale)
        if self.booster is None:
            return np.asarray((standard * np.array(self.coefficients)).sum(axis=1), dtype=np.float64)
        return np.asarray(self.booster.inplace_predict(standard.astype(np.float32)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """What a meta-learner said out of sample, by session, ascending; its final fit, for the bars after."""

    said: "pd.Series[float]"
    meta: MetaModel

    def signal(self, bars: pd.DataFrame, signals: Mapping[str, FloatArray], simple: FloatArray) -> FloatArray:
        """Return the meta-learner's signal of each bar; the simple ensemble's before its first, (n,)."""
        index = pd.DatetimeIndex(bars.index)
        known = np.array(self.said.reindex(index), dtype=np.float64)
        both = np.isfinite(np.column_stack(list(signals.values()))).all(axis=1)
        after = both & np.asarray(index > self.said.index[-1])
        if after.any():
            known[after] = self.meta.predict(meta_features(bars, signals)[after])
        return np.where(both & np.isfinite(known), known, simple)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleForecaster:
    """Members joined into one signal, which is calibrated by its own out-of-sample past.

    Nothing of it is stored: weights and calibration of every bar are learned anew, see `SimpleEnsemble`. The
    first of ``members`` sets the scale; ``stacked`` speaks in the place of the weights. Unless
    ``distrusted_after`` is None, no row has skill, and forecasts after this session are the drift.
    """

    members: Mapping[str, Member]
    weights: SimpleEnsemble = field(default_factory=SimpleEnsemble)
    stacked: Stacked | None = None
    distrusted_after: pd.Timestamp | None = None

    def __post_init__(self) -> None:
        if len({member.horizon_bars for member in self.members.values()}) != 1:
            told = ", ".join(f"{name} {member.horizon_bars}" for name, member in self.members.items())
            raise ModelIncompatibleError(
                f"the members look ahead different numbers of bars ({told}): train them with the same horizon"
            )

    @property
    def horizon_bars(self) -> int:
        """Number of bars that a forecast looks ahead."""
        return next(iter(self.members.values())).horizon_bars

    def forecast(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Forecast every bar; beside `FORECAST_COLUMNS` a ``model_`` and a ``weight_`` column per member."""
        return with_bands(self.centre(bars), bars, self.horizon_bars)

    def centre(self, bars: pd.DataFrame) -> pd.DataFrame:
        """Return centre, scale and skill of every bar's forecast, see `Member`."""
        frames = {name: member.centre(bars) for name, member in self.members.items()}
        first, *others = frames.values()
        frame = first.copy()
        for other in others:
            frame["baseline_log"] = frame["baseline_log"].fillna(other["baseline_log"])
            frame["is_of_other_prices"] |= other["is_of_other_prices"]
            frame = frame.join(other[other.columns.difference(frame.columns, sort=False)])
        rows = self._rows(bars, frame, [first, *others])
        signals = dict(zip(frames, rows.signals.T, strict=True))
        weights, raw_scaled = self.weights.weigh(rows, list(frames))
        if self.stacked is not None:
            raw_scaled = self.stacked.signal(bars, signals, raw_scaled)
        slope, raw_mean, skill_lower = self.weights.calibrate(rows, raw_scaled)
        if self.distrusted_after is not None:
            slope = np.where(np.asarray(bars.index > self.distrusted_after), 0.0, slope)
            skill_lower = np.zeros_like(skill_lower)
        frame["raw_scaled"], frame["skill_lower"] = raw_scaled, skill_lower
        frame["expected_log"] = frame["baseline_log"] + slope * (raw_scaled - raw_mean) * frame["sigma_log"]
        frame["is_out_of_sample"] = rows.is_out_of_sample
        for name, weight in zip(frames, weights.T, strict=True):
            frame[f"model_{name}"], frame[f"weight_{name}"] = signals[name], weight
        return frame

    def _rows(self, bars: pd.DataFrame, frame: pd.DataFrame, parts: list[pd.DataFrame]) -> SignalRows:
        """Return what the members said, and what came; a row is out of sample where all are that said it."""
        said = np.column_stack([one["raw_scaled"].to_numpy(dtype=np.float64) for one in parts])
        seen = np.column_stack([~one["is_out_of_sample"].to_numpy(dtype=bool) for one in parts])
        heard, other_prices = np.isfinite(said), frame["is_of_other_prices"].to_numpy(dtype=bool)
        h, close_log = self.horizon_bars, np.log(bars["Close"])
        return SignalRows(
            signals=said,
            outcome=np.asarray((close_log.shift(-h) - close_log) / frame["sigma_log"], dtype=np.float64),
            is_out_of_sample=heard.any(axis=1) & ~(heard & seen).any(axis=1) & ~other_prices,
            known_from=np.arange(len(bars), dtype=np.intp) + h + EMBARGO_BARS,
            horizon_bars=h,
        )


class EnsembleManifest(artifact.Manifest):
    """What a saved ensemble promises; its golden inputs are of the meta-learner's columns, if it has one."""

    SCHEMA: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = (ENSEMBLE_FILE, METADATA, RECORD)
    NAMES: ClassVar[tuple[str, ...]] = MEMBERS


class EnsembleDocument(BaseModel):
    """Content of ``ensemble.json``."""

    method: Method
    members: Mapping[str, str]
    weights: SimpleEnsemble
    meta: Linear | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "EnsembleDocument":
        if set(self.members) != set(MEMBERS):
            raise ValueError(f"members are {' and '.join(MEMBERS)}")
        if (self.meta is None) != (self.method == "simple"):
            raise ValueError("a meta-learner belongs to every method but the simple one")
        if self.meta is None:
            return self
        wanted = len(META_COLUMNS[self.method])
        lengths = {len(self.meta.centre), len(self.meta.scale)}
        if lengths != {wanted} or len(self.meta.coefficients) != wanted * (self.method == "stacking"):
            raise ValueError(f"the meta-learner does not have {wanted} columns")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleBundle(Saved):
    """A judged ensemble: how two saved models are joined, see `EnsembleForecaster`; and their versions."""

    method: Method
    members: Mapping[str, str]
    weights: SimpleEnsemble
    stacked: Stacked | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of its members."""
        return tuple(self.members)

    @property
    def model_version(self) -> str:
        """Identifier of the saved version, and of those of its members."""
        parts = "+".join(f"{name}:{version}" for name, version in self.members.items())
        return f"{self.metadata['model_version']}+{parts}"

    def join(
        self, gbm: Bundle, lstm: Bundle, *, include_in_sample: bool = False, as_lived: bool = False
    ) -> EnsembleForecaster:
        """Return the forecaster of the members; the flags are those of `BundleForecaster`."""
        trusted = as_lived or self.metadata["verdict"]["label"] == "edge"
        members: dict[str, Member] = {
            name: BundleForecaster(bundle=bundle, include_in_sample=include_in_sample, as_lived=as_lived)
            for name, bundle in zip(MEMBERS, (gbm, lstm), strict=True)
        }
        return EnsembleForecaster(
            members=members,
            weights=self.weights,
            stacked=self.stacked,
            distrusted_after=None if trusted else self.record.dropna(subset="realised_log")["date"].iloc[-1],
        )


def save_ensemble(bundle: EnsembleBundle, models_dir: Path) -> Path:
    """Save an ensemble, see `artifact.Format.save`."""
    meta, contents = bundle.stacked.meta if bundle.stacked else None, dict[str, bytes]()
    promised: dict[str, object] = {"libraries": artifact.library_versions(LIBRARIES)}
    if meta is not None:
        # Rows one spread around the middle, each column moved alone.
        golden = np.array(meta.centre) + np.diag(meta.scale)
        promised["golden_inputs"] = golden.tolist()
        promised["golden_outputs"] = _golden_outputs(meta, golden).tolist()
        if meta.booster is not None:
            contents[META_BOOSTER] = bytes(meta.booster.save_raw("ubj"))
    told = EnsembleDocument(method=bundle.method, members=bundle.members, weights=bundle.weights, meta=meta)
    contents[ENSEMBLE_FILE] = told.model_dump_json(indent=1).encode()
    return FORMAT.save(bundle, models_dir, contents, promised)


def _golden_outputs(meta: MetaModel, inputs: FloatArray) -> FloatArray:
    return meta.predict(pd.DataFrame(inputs, columns=list(META_COLUMNS[meta.method])))


def _build(version: Version[EnsembleManifest], metadata: Mapping[str, Any]) -> EnsembleBundle:
    told, stacked = artifact.document(version, ENSEMBLE_FILE, EnsembleDocument), None
    record = read_record(version, *RECORD_COLUMNS, *(["stacked_scaled"] if told.meta else []))
    if told.meta is not None:
        booster = None
        if told.method == "xgb-meta":
            with artifact.unusable(version.folder, META_BOOSTER):
                booster = xgboost.Booster(model_file=bytearray(version.contents[META_BOOSTER]))
        meta = MetaModel(method=told.method, booster=booster, **asdict(told.meta))
        check_golden(version, lambda rows: _golden_outputs(meta, rows), version.manifest.golden_outputs)
        stacked = Stacked(said=record.set_index("date")["stacked_scaled"], meta=meta)
    return EnsembleBundle(
        symbol=metadata["symbol"],
        horizon_bars=metadata["horizon_bars"],
        method=told.method,
        members=told.members,
        weights=told.weights,
        record=record,
        metadata=metadata,
        stacked=stacked,
    )


FORMAT = artifact.Format(kind=ENSEMBLE, manifest=EnsembleManifest, module="inference.ensemble", build=_build)
load_ensemble, load_folder = FORMAT.load, FORMAT.load_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is saved of one symbol; where the ensemble needs a part that cannot be had, ``amiss`` says why."""

    symbol: str
    gbm: Bundle | None = None
    lstm: Bundle | None = None
    ensemble: EnsembleBundle | None = None
    amiss: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A forecaster, the model that it is, the mode that serves in fact, and what one must know of it."""

    forecaster: Member
    symbol: str
    model_version: str
    metadata: Mapping[str, Any]
    mode: Mode
    notes: tuple[str, ...] = ()


def forecaster_for(mode: str, parts: Parts, *, include_in_sample: bool = False) -> Chosen:
    """Turn a mode into a forecaster; where the ensemble cannot be had, the boosters forecast alone.

    ``mode`` is a name that `mode_of` knows; ``include_in_sample`` is that of `BundleForecaster`.
    """
    wanted, notes = mode_of(mode), tuple[str, ...]()
    if wanted == "ensemble":
        joined = _joined(parts, include_in_sample=include_in_sample)
        if isinstance(joined, Chosen):
            return joined
        wanted, notes = "gbm_only", (f"{joined}; the boosters forecast alone",)
    bundle = parts.lstm if wanted == "lstm_only" else parts.gbm
    if bundle is None:
        raise ModelMissingError(f"{wanted} needs a model of {parts.symbol} that was not loaded: train one")
    return Chosen(
        forecaster=BundleForecaster(bundle=bundle, include_in_sample=include_in_sample),
        symbol=parts.symbol,
        model_version=bundle.model_version,
        metadata=bundle.metadata,
        mode=wanted,
        notes=notes,
    )


def _joined(parts: Parts, *, include_in_sample: bool) -> Chosen | str:
    """Return the ensemble, or why it cannot serve, in words with the remedy."""
    whole, gbm, lstm = parts.ensemble, parts.gbm, parts.lstm
    if whole is None or gbm is None or lstm is None:
        return f"{parts.symbol} has no ensemble that can be used ({parts.amiss})"
    now = {GBM.name: gbm.model_version, LSTM.name: lstm.model_version}
    if changed := [name for name, version in whole.members.items() if version != now[name]]:
        return (
            f"the ensemble of {parts.symbol} was judged with another version of {' and '.join(changed)}: run "
            f"{ENSEMBLE.train(parts.symbol, anew=True)}"
        )
    return Chosen(
        forecaster=whole.join(gbm, lstm, include_in_sample=include_in_sample),
        symbol=parts.symbol,
        model_version=whole.model_version,
        metadata=whole.metadata,
        mode="ensemble",
        notes=tuple(whole.metadata["parts"]["notes"]),
    )
