"""The boosters and the network as one forecaster: its saved form, and which forecaster serves a mode.

An ensemble holds no copy of its members. It names the versions that it was judged with, and does not serve
with others: then, as where no network was trained, the boosters forecast alone, and a note says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import xgboost
from pydantic import BaseModel, Field, FiniteFloat, model_validator

from inference import artifact
from inference.artifact import METADATA, RECORD, Saved, Version
from inference.ensemble import (
    EMBARGO_BARS,
    GBM_NAME,
    LSTM_NAME,
    META_COLUMNS,
    FloatArray,
    MetaModel,
    Method,
    SignalRows,
    SimpleEnsemble,
    Stacked,
)
from inference.intervals import with_bands
from inference.load_gbm_models import load_bundle
from inference.load_lstm_model import load_bundle as load_lstm
from inference.pipeline import Bundle, BundleForecaster, Member, check_golden, read_record
from utils.errors import ModelError, ModelIncompatibleError, ModelMissingError, UsageError
from utils.model_paths import ENSEMBLE, GBM, LSTM, ArtifactKind

Mode = Literal["gbm_only", "lstm_only", "ensemble"]
# What each mode is made from: never without the first, and named after the last.
PARTS: Mapping[Mode, tuple[ArtifactKind, ...]] = {
    "gbm_only": (GBM,),
    "lstm_only": (LSTM,),
    "ensemble": (GBM, LSTM, ENSEMBLE),
}
MODES = tuple(PARTS)
# Names of an earlier release, each the best ensemble that there is.
OLDER_MODES = ("classifier", "weighted", "hybrid", "regressor")
ENSEMBLE_FILE, META_BOOSTER = "ensemble.json", "meta_model.ubj"
LIBRARIES = ("xgboost", "numpy", "pandas", "ta-lib")
RECORD_COLUMNS = ("date", "raw_scaled", "predicted_log", "realised_log", "sigma_log")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleForecaster:
    """Members joined into one signal, which is calibrated by its own out-of-sample past.

    Nothing of it is stored: weights and calibration of every bar are learned anew from the bars before it,
    whose outcomes were known, see `SimpleEnsemble`. The first of ``members`` sets the scale; ``stacked``
    speaks in the place of the weights. Unless ``distrusted_after`` is None, for a verdict of ``edge``, no row
    has skill, and forecasts after this session are the drift.
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
    """What a saved ensemble promises; its golden inputs are of the meta-learner's columns, if it has one."""

    SCHEMA: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = (ENSEMBLE_FILE, METADATA, RECORD)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its members."""
        return (GBM_NAME, LSTM_NAME)


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
class EnsembleBundle(Saved):
    """A judged ensemble of two saved models: how they are joined, and their versions by name.

    See `EnsembleForecaster` for ``weights`` and ``stacked``; the record has `RECORD_COLUMNS`.
    """

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
            for name, bundle in ((GBM_NAME, gbm), (LSTM_NAME, lstm))
        }
        return EnsembleForecaster(
            members=members,
            weights=self.weights,
            stacked=self.stacked,
            distrusted_after=None if trusted else self.record["date"].iloc[-1],
        )


def save_ensemble(bundle: EnsembleBundle, models_dir: Path) -> Path:
    """Save an ensemble, see `artifact.Format.save`."""
    meta = bundle.stacked.meta if bundle.stacked else None
    linear = None if meta is None else Linear.model_validate(asdict(replace(meta, booster=None)))
    told = EnsembleDocument(
        method=bundle.method, members=dict(bundle.members), weights=bundle.weights, meta=linear
    )
    contents = {ENSEMBLE_FILE: told.model_dump_json(indent=1).encode()}
    promised: dict[str, object] = {"libraries": artifact.library_versions(LIBRARIES)}
    if meta is not None:
        # Rows one spread around the middle, each column moved alone.
        golden = np.array(meta.centre) + np.diag(meta.scale)
        promised |= {
            "golden_inputs": golden.tolist(),
            "golden_outputs": _golden_outputs(meta, golden).tolist(),
        }
        if meta.booster is not None:
            contents[META_BOOSTER] = bytes(meta.booster.save_raw("ubj"))
    return FORMAT.save(bundle, models_dir, contents, promised)


def _golden_outputs(meta: MetaModel, inputs: FloatArray) -> FloatArray:
    return meta.predict(pd.DataFrame(inputs, columns=list(META_COLUMNS[meta.method])))


def _build(version: Version[EnsembleManifest], metadata: Mapping[str, Any]) -> EnsembleBundle:
    told = artifact.document(version, ENSEMBLE_FILE, EnsembleDocument)
    record = read_record(version, *RECORD_COLUMNS, *(["stacked_scaled"] if told.meta else []))
    stacked = None
    if told.meta is not None:
        booster = None
        if told.method == "xgb-meta":
            with artifact.unusable(version.folder, META_BOOSTER):
                booster = xgboost.Booster(model_file=bytearray(version.contents[META_BOOSTER]))
        meta = MetaModel(method=told.method, booster=booster, **told.meta.model_dump())
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


FORMAT = artifact.Format(
    kind=ENSEMBLE, manifest=EnsembleManifest, module="inference.load_ensemble_model", build=_build
)
load_ensemble, load_linked, load_folder = FORMAT.load, FORMAT.load_linked, FORMAT.load_folder
describe_linked = FORMAT.describe


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
    """The forecaster of a mode, what it was made from, what forecasts in fact, and what one must know."""

    forecaster: Member
    model: Bundle | EnsembleBundle
    mode: Mode
    notes: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        """What it forecasts."""
        return self.model.symbol

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model's metadata, the verdict among them."""
        return self.model.metadata

    @property
    def model_version(self) -> str:
        """Identifier of the saved version; an ensemble's names those of its members."""
        return self.model.model_version


def mode_of(name: str) -> Mode:
    """Return the mode that a name stands for; `UsageError` where it stands for none."""
    if name in OLDER_MODES:
        return "ensemble"
    for mode in MODES:
        if mode == name:
            return mode
    raise UsageError(f"unknown mode {name[:40]!r}: write {', '.join(MODES)}")


def load_parts(models_dir: Path, symbol: str, mode: str) -> Parts:
    """Load what a mode needs of one symbol; `ModelError` when what it cannot do without cannot be had."""
    if (wanted := mode_of(mode)) == "lstm_only":
        return Parts(symbol=symbol, lstm=load_lstm(models_dir, symbol))
    parts = Parts(symbol=symbol, gbm=load_bundle(models_dir, symbol))
    if wanted == "gbm_only":
        return parts
    try:
        parts = replace(parts, lstm=load_lstm(models_dir, symbol))
        return replace(parts, ensemble=load_ensemble(models_dir, symbol))
    except ModelError as error:
        return replace(parts, amiss=str(error))


def forecaster_for(mode: str, parts: Parts, *, include_in_sample: bool = False) -> Chosen:
    """Turn a mode into a forecaster; where the ensemble cannot be had, the boosters forecast alone.

    ``mode`` is one of `MODES` or `OLDER_MODES`; ``include_in_sample`` is that of `BundleForecaster`.
    """
    wanted = mode_of(mode)

    def alone(bundle: Bundle | None, mode: Mode, *notes: str) -> Chosen:
        if bundle is None:
            raise ModelMissingError(f"{mode} needs a model of {parts.symbol} that was not loaded: train one")
        forecaster = BundleForecaster(bundle=bundle, include_in_sample=include_in_sample)
        return Chosen(forecaster=forecaster, model=bundle, mode=mode, notes=notes)

    if wanted == "lstm_only":
        return alone(parts.lstm, wanted)
    if wanted == "gbm_only":
        return alone(parts.gbm, wanted)
    reason = why_not_joined(parts)
    if reason or parts.gbm is None or parts.lstm is None or parts.ensemble is None:
        return alone(parts.gbm, "gbm_only", f"{reason}; the boosters forecast alone")
    return Chosen(
        forecaster=parts.ensemble.join(parts.gbm, parts.lstm, include_in_sample=include_in_sample),
        model=parts.ensemble,
        mode=wanted,
        notes=tuple(parts.ensemble.metadata["parts"]["notes"]),
    )


def why_not_joined(parts: Parts) -> str:
    """Return why the ensemble cannot serve, in words with the remedy; empty where it can."""
    if parts.amiss:
        return f"{parts.symbol} has no ensemble that can be used ({parts.amiss})"
    if parts.ensemble is None or parts.lstm is None or parts.gbm is None:
        return f"boosters and LSTM of {parts.symbol} are not joined: run {ENSEMBLE.train(parts.symbol)}"
    now = {GBM_NAME: parts.gbm.model_version, LSTM_NAME: parts.lstm.model_version}
    changed = [name for name, version in parts.ensemble.members.items() if version != now[name]]
    if changed:
        return (
            f"the ensemble of {parts.symbol} was judged with another version of {' and '.join(changed)}: run "
            f"{ENSEMBLE.train(parts.symbol, anew=True)}"
        )
    return ""
