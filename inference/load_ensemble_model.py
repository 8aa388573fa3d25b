"""The boosters and the network as one forecaster: its saved form, and which forecaster serves a mode.

An ensemble holds no copy of its members. It names the versions that it was judged with, and does not serve
with others: then, as where no network was trained, the boosters forecast alone, and a note says so.
"""

import io
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import xgboost
from pydantic import BaseModel, Field, FiniteFloat, model_validator

from data.target_engineering import make_target
from inference import artifact
from inference.artifact import (
    GOLDEN_TOLERANCE,
    METADATA,
    RECORD,
    Version,
    corrupt,
    promised_metadata,
    unusable,
)
from inference.ensemble import EMBARGO_BARS, FloatArray, SignalRows, SimpleEnsemble
from inference.intervals import with_bands
from inference.pipeline import Bundle, BundleForecaster, Member
from utils.errors import ModelIncompatibleError
from utils.model_paths import ENSEMBLE, Linked, serve, serve_linked

Method = Literal["simple", "stacking", "xgb-meta"]
GBM_NAME, LSTM_NAME = "gbm", "lstm"
ENSEMBLE_FILE, META_BOOSTER = "ensemble.json", "meta_model.ubj"
RECORD_COLUMNS = ("date", "raw_scaled", "predicted_log", "realised_log", "sigma_log")
# Bars whose volatility is the storm or calm that a bar is compared with, and those of a trend.
REGIME_BARS, TREND_BARS, LEAST_REGIME_BARS = 1260, 200, 60
MAX_TREND = 3.0
# What the linear meta-learner sees, whose weights are not negative: each member in calm and in storm, and
# what both say. The trees find such products themselves.
META_COLUMNS: dict[str, tuple[str, ...]] = {
    "stacking": ("gbm_calm", "gbm_storm", "lstm_calm", "lstm_storm", "agreed"),
    "xgb-meta": ("gbm", "lstm", "agreed", "storm", "trend"),
}


def meta_features(bars: pd.DataFrame, signals: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Return what meta-learners see of each bar: the members, the regime, and how far the members agree.

    Parameters
    ----------
    bars
        Adjusted OHLCV.
    signals
        Raw signals in units of the h-day volatility by member, (n,).

    Returns
    -------
    DataFrame
        Indexed like ``bars``; row t is known at the close of t. ``storm``: rank of the volatility among its
        last `REGIME_BARS`, 0 to 1. ``trend``: distance from the mean of `TREND_BARS` closes, in volatilities
        over as many bars. ``agreed``: what both members say at least, zero where they differ in sign.
    """
    gbm, lstm = signals[GBM_NAME], signals[LSTM_NAME]
    sigma_log = make_target(bars, 1)["sigma_log"]
    storm = sigma_log.rolling(REGIME_BARS, min_periods=LEAST_REGIME_BARS).rank(pct=True).fillna(0.5)
    close_log = np.log(bars["Close"])
    distance = close_log - close_log.rolling(TREND_BARS, min_periods=LEAST_REGIME_BARS).mean()
    trend = (distance / (sigma_log * np.sqrt(TREND_BARS))).clip(-MAX_TREND, MAX_TREND).fillna(0.0)
    in_storm = np.asarray(storm, dtype=np.float64)
    common = np.where(np.sign(gbm) == np.sign(lstm), np.minimum(np.abs(gbm), np.abs(lstm)), 0.0)
    return pd.DataFrame(
        {
            "gbm": gbm,
            "lstm": lstm,
            "gbm_calm": gbm * (1.0 - in_storm),
            "gbm_storm": gbm * in_storm,
            "lstm_calm": lstm * (1.0 - in_storm),
            "lstm_storm": lstm * in_storm,
            "agreed": np.sign(gbm) * common,
            "storm": in_storm,
            "trend": np.asarray(trend, dtype=np.float64),
        },
        index=bars.index,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaModel:
    """A fitted meta-learner: from `meta_features` to one signal in units of the h-day volatility.

    Attributes
    ----------
    method
        ``stacking`` (linear) or ``xgb-meta``; it sees `META_COLUMNS` of it.
    centre, scale
        Of these columns on the rows that it was fitted on, (p,).
    coefficients
        Of the standardised columns, none negative, (p,); empty for ``xgb-meta``.
    booster
        The trees of ``xgb-meta``.
    """

    method: Method
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...] = ()
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
    """What a meta-learner said out of sample, and its final fit.

    Attributes
    ----------
    said
        Signal by session, made by fits whose labels had ended before; sessions ascending.
    meta
        The final fit, for the bars after the last of these sessions.
    """

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

    Nothing of it is stored: weights and calibration of every bar are learned anew from the bars before it,
    whose outcomes were known, see `SimpleEnsemble`.

    Attributes
    ----------
    members
        By name; the first one sets the scale.
    weights
        How they are weighed.
    stacked
        A meta-learner in the place of the weights.
    distrusted_after
        None for a verdict of ``edge``. Else no row has skill, and forecasts after this session are the drift.
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
            for name in (str(one) for one in other if one not in frame):
                frame[name] = other[name]
        signals = {name: np.asarray(one["raw_scaled"], dtype=np.float64) for name, one in frames.items()}
        rows = self._rows(bars, frame, frames, signals)
        weights, raw_scaled = self.weights.weigh(rows, list(frames))
        if self.stacked is not None:
            raw_scaled = self.stacked.signal(bars, signals, raw_scaled)
        slope, raw_mean, skill_lower = self.weights.calibrate(rows, raw_scaled)
        if self.distrusted_after is not None:
            slope = np.where(np.asarray(bars.index > self.distrusted_after), 0.0, slope)
            skill_lower = np.zeros_like(skill_lower)
        frame["raw_scaled"], frame["skill_lower"] = raw_scaled, skill_lower
        frame["expected_log"] = (
            frame["baseline_log"] + slope * (raw_scaled - raw_mean) * frame["sigma_log"].to_numpy()
        )
        frame["is_out_of_sample"] = rows.is_out_of_sample
        for place, name in enumerate(frames):
            frame[f"model_{name}"], frame[f"weight_{name}"] = signals[name], weights[:, place]
        return frame

    def _rows(
        self,
        bars: pd.DataFrame,
        frame: pd.DataFrame,
        frames: Mapping[str, pd.DataFrame],
        signals: Mapping[str, FloatArray],
    ) -> SignalRows:
        """Return what the members said, and what came; a row is out of sample where all are that said it."""
        said = np.column_stack(list(signals.values()))
        heard = np.isfinite(said)
        seen = np.column_stack([~one["is_out_of_sample"].to_numpy(dtype=bool) for one in frames.values()])
        out_of_sample = heard.any(axis=1) & ~(heard & seen).any(axis=1)
        h, close_log = self.horizon_bars, np.log(np.asarray(bars["Close"], dtype=np.float64))
        realised = np.full(len(bars), np.nan)
        realised[:-h] = close_log[h:] - close_log[:-h]
        return SignalRows(
            signals=said,
            outcome=realised / frame["sigma_log"].to_numpy(),
            is_out_of_sample=out_of_sample & ~frame["is_of_other_prices"].to_numpy(dtype=bool),
            known_from=np.arange(len(bars), dtype=np.intp) + h + EMBARGO_BARS,
            horizon_bars=h,
        )


class EnsembleManifest(artifact.Manifest):
    """What a saved ensemble promises about itself.

    Attributes
    ----------
    data_hash
        Hash of the bars that it was judged on.
    golden_inputs, golden_outputs
        Rows of the meta-learner's columns (m, p) and what it said to them, in volatilities (m,); empty
        without a meta-learner.
    """

    SCHEMA: ClassVar[int] = 1

    data_hash: str
    golden_inputs: list[list[float]] = Field(default_factory=list)
    golden_outputs: list[float] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_together(self) -> "EnsembleManifest":
        if absent := {ENSEMBLE_FILE, METADATA, RECORD} - set(self.files):
            raise ValueError(f"{', '.join(sorted(absent))} is not listed")
        if len(self.golden_inputs) != len(self.golden_outputs):
            raise ValueError("there is not one golden output for each golden input")
        return self


class Linear(BaseModel):
    """What ``ensemble.json`` tells of a meta-learner; trees lie in a file of their own."""

    centre: tuple[FiniteFloat, ...]
    scale: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    coefficients: tuple[Annotated[FiniteFloat, Field(ge=0)], ...] = ()


class EnsembleDocument(BaseModel):
    """Content of ``ensemble.json``."""

    method: Method
    members: dict[str, str]
    weights: SimpleEnsemble
    meta: Linear | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "EnsembleDocument":
        if set(self.members) != {GBM_NAME, LSTM_NAME}:
            raise ValueError(f"members are {GBM_NAME} and {LSTM_NAME}")
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
class EnsembleBundle:
    """A judged ensemble of two saved models.

    Attributes
    ----------
    symbol, horizon_bars
        What it forecasts.
    method
        How its members are joined.
    members
        Version by member that it was judged with.
    weights, stacked
        See `EnsembleForecaster`.
    record
        What it said out of sample, `RECORD_COLUMNS`.
    metadata
        Content of ``training_metadata.json``.
    warnings
        What was amiss while loading and did not prevent it.
    """

    symbol: str
    horizon_bars: int
    method: Method
    members: Mapping[str, str]
    weights: SimpleEnsemble
    record: pd.DataFrame
    metadata: Mapping[str, Any]
    stacked: Stacked | None = None
    warnings: tuple[str, ...] = ()

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
        self,
        gbm: Bundle,
        lstm: Bundle,
        *,
        include_in_sample: bool = False,
        as_lived: bool = False,
    ) -> EnsembleForecaster:
        """Return the forecaster of the members; the flags are those of `BundleForecaster`."""
        trusted = as_lived or self.metadata["verdict"]["label"] == "edge"
        members: dict[str, Member] = {
            name: BundleForecaster(bundle=bundle, include_in_sample=include_in_sample, as_lived=as_lived)
            for name, bundle in ((GBM_NAME, gbm), (LSTM_NAME, lstm))
        }
        return EnsembleForecaster(
            members=members,
            weights=self.weights,
            stacked=self.stacked,
            distrusted_after=None if trusted else self.record["date"].iloc[-1],
        )


def save_ensemble(bundle: EnsembleBundle, models_dir: Path) -> Path:
    """Write an ensemble aside, verify it in a fresh process, and let it serve; see `artifact.publish`."""
    meta = bundle.stacked.meta if bundle.stacked else None
    linear = None if meta is None else Linear.model_validate(asdict(replace(meta, booster=None)))
    told = EnsembleDocument(
        method=bundle.method, members=dict(bundle.members), weights=bundle.weights, meta=linear
    )
    contents = {
        ENSEMBLE_FILE: told.model_dump_json(indent=1).encode(),
        METADATA: json.dumps(bundle.metadata, indent=1, allow_nan=False).encode(),
        RECORD: artifact.record_bytes(bundle.record),
    }
    golden = np.empty((0, 0))
    if meta is not None:
        golden = _golden_inputs(meta)
        if meta.booster is not None:
            contents[META_BOOSTER] = bytes(meta.booster.save_raw("ubj"))
    manifest = EnsembleManifest(
        schema_version=EnsembleManifest.SCHEMA,
        kind=ENSEMBLE.name,
        symbol=bundle.symbol,
        model_version=str(bundle.metadata["model_version"]),
        files=artifact.sha256_of(contents),
        data_hash=str(bundle.metadata["data_hash"]),
        golden_inputs=golden.tolist(),
        golden_outputs=[] if meta is None else _golden_outputs(meta, golden).tolist(),
    )
    return artifact.publish(
        models_dir, ENSEMBLE, manifest=manifest, contents=contents, verify=verify_in_fresh_process
    )


def _golden_inputs(meta: MetaModel) -> FloatArray:
    """Return rows one spread around the middle, each column moved alone, (p, p)."""
    return np.array(meta.centre) + np.diag(meta.scale)


def _golden_outputs(meta: MetaModel, inputs: FloatArray) -> FloatArray:
    return meta.predict(pd.DataFrame(inputs, columns=list(META_COLUMNS[meta.method])))


def verify_in_fresh_process(folder: Path) -> None:
    """Load ``folder`` in a new interpreter."""
    artifact.verify_in_fresh_process(folder, "inference.load_ensemble_model")


def load_ensemble(models_dir: Path, symbol: str) -> EnsembleBundle:
    """Load the ensemble that serves; an earlier version where it is damaged.

    Raises
    ------
    ModelMissingError
        If the symbol's models were never joined.
    ModelCorruptError, ModelIncompatibleError
        If no version can be used.
    """
    bundle, warnings = serve(models_dir, symbol, ENSEMBLE, load_folder)
    return replace(bundle, warnings=warnings)


def load_linked(linked: Linked) -> EnsembleBundle:
    """Load what a link names, see `load_ensemble`; the link is not read again."""
    bundle, warnings = serve_linked(linked, load_folder)
    return replace(bundle, warnings=warnings)


def describe_linked(linked: Linked) -> artifact.Description:
    """Describe the version that `load_linked` would load, see `artifact.describe`."""

    def tell(version: Version[EnsembleManifest]) -> artifact.Description:
        return artifact.Description(metadata=promised_metadata(version)[0], models=(GBM_NAME, LSTM_NAME))

    return artifact.describe(linked, ENSEMBLE, EnsembleManifest, tell)


def load_folder(folder: Path) -> EnsembleBundle:
    """Check one version's files against its manifest, then load them."""
    version = artifact.read_version(folder, ENSEMBLE, EnsembleManifest)
    metadata, promised = promised_metadata(version)
    with unusable(folder, ENSEMBLE_FILE):
        told = EnsembleDocument.model_validate_json(version.contents[ENSEMBLE_FILE])
    record = _record(version, told)
    return EnsembleBundle(
        symbol=promised.symbol,
        horizon_bars=promised.horizon_bars,
        method=told.method,
        members=told.members,
        weights=told.weights,
        record=record,
        metadata=metadata,
        stacked=_stacked(version, told, record),
    )


def _record(version: Version[EnsembleManifest], told: EnsembleDocument) -> pd.DataFrame:
    needed = {*RECORD_COLUMNS, *(["stacked_scaled"] if told.meta else [])}
    with unusable(version.folder, RECORD):
        record = pd.read_parquet(io.BytesIO(version.contents[RECORD]))
        if absent := sorted(needed - set(record.columns)):
            raise corrupt(version.folder, f"{RECORD} lacks {', '.join(absent)}")
        if not record["date"].is_unique or not record["date"].is_monotonic_increasing or record.empty:
            raise corrupt(version.folder, f"{RECORD} does not hold one row per session")
    return record


def _stacked(
    version: Version[EnsembleManifest], told: EnsembleDocument, record: pd.DataFrame
) -> Stacked | None:
    if told.meta is None:
        return None
    booster = None
    with unusable(version.folder, META_BOOSTER, xgboost.core.XGBoostError):
        if told.method == "xgb-meta":
            booster = xgboost.Booster(model_file=bytearray(version.contents[META_BOOSTER]))
        meta = MetaModel(method=told.method, booster=booster, **told.meta.model_dump())
        inputs = np.asarray(version.manifest.golden_inputs, dtype=np.float64)
        error = np.abs(_golden_outputs(meta, inputs) - np.asarray(version.manifest.golden_outputs)).max()
    if not error <= GOLDEN_TOLERANCE:
        raise ModelIncompatibleError(
            f"ensemble {version.folder.name} forecasts differently here (by {error:.2g}): train again with "
            "--overwrite"
        )
    return Stacked(said=record.set_index("date")["stacked_scaled"], meta=meta)


def main(argv: list[str] | None = None) -> int:
    """Verify one saved version, see `inference.artifact.command_line`."""
    return artifact.command_line(argv, "inference.load_ensemble_model", load_folder)


if __name__ == "__main__":
    sys.exit(main())
