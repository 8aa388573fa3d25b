"""Which forecaster a mode is: the boosters, the network, or both joined where they were judged together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from inference.load_ensemble_model import GBM_NAME, LSTM_NAME, EnsembleBundle, load_ensemble
from inference.load_gbm_models import load_bundle
from inference.load_lstm_model import load_bundle as load_lstm
from inference.pipeline import Bundle, BundleForecaster, Member
from utils.errors import ModelError, ModelMissingError, UsageError
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
    """The forecaster of a mode.

    Attributes
    ----------
    forecaster
        See `pipeline.Forecaster`.
    model
        What it was made from: symbol, metadata with the verdict, version.
    mode
        What forecasts in fact.
    notes
        What a person must know about the choice, in words.
    """

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
    """Load what a mode needs of one symbol.

    Raises
    ------
    ModelError
        When what the mode cannot do without cannot be had.
    """
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

    Parameters
    ----------
    mode
        One of `MODES`, or of `OLDER_MODES`.
    parts
        What is saved, see `load_parts`.
    include_in_sample
        As for `BundleForecaster`.
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
