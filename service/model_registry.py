"""Which saved models there are, and the loaded one of each symbol that is asked for.

Listing checks the files that would serve and unpickles nothing. Loading happens at the first question for a
symbol and again when its link moves to another version; what was loaded before serves on when the new one
cannot be used. Each question reads the link once, and the list describes what a prediction would come from.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

from pydantic import ValidationError

from inference.ensemble import MODEL_NAMES
from inference.load_gbm_models import GBMBundle, describe_linked, load_linked
from inference.pipeline import Forecaster, GBMForecaster
from service.schemas import BacktestMetrics, ModelMeta, VerdictLabel
from utils.errors import (
    AIStocksError,
    ModelCorruptError,
    ModelError,
    ModelIncompatibleError,
    ModelMissingError,
)
from utils.model_paths import Linked, linked_version, list_symbols

logger = logging.getLogger(__name__)

REQUIRED_METRICS = tuple(name for name, field in BacktestMetrics.model_fields.items() if field.is_required())
# A daily forecast of boosters reads one row of features.
SEQUENCE_LENGTH = 1
MAX_NUMBER = sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One loaded model; never changed, only replaced, so an answer comes from one version.

    Attributes
    ----------
    meta
        What the list of models says about it.
    bundle
        What was loaded.
    forecaster
        The bundle as `inference.pipeline.decide` takes it.
    folder
        What the symbol's link pointed to when it was loaded, or when a newer version failed to load.
    warnings
        What was amiss while loading, in words.
    """

    meta: ModelMeta
    bundle: GBMBundle
    forecaster: Forecaster
    folder: Path
    warnings: tuple[str, ...]


class ModelRegistry:
    """Thread-safe view of a folder of saved models.

    Parameters
    ----------
    models_dir
        Root of the saved models; need not exist.
    load
        Loads what a link names; replaced in tests.
    """

    def __init__(self, models_dir: Path, load: Callable[[Linked], GBMBundle] = load_linked) -> None:
        self._models_dir = models_dir
        self._load = load
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._served: dict[str, ServedModel] = {}
        self._metas: dict[str, tuple[Linked, ModelMeta]] = {}
        self._refused: dict[str, tuple[Linked, ModelIncompatibleError]] = {}

    def list(self) -> tuple[ModelMeta, ...]:
        """Return what is saved, by symbol; a damaged bundle is left out and logged."""
        metas = []
        for symbol in list_symbols(self._models_dir):
            try:
                metas.append(self._meta(symbol))
            except AIStocksError as error:
                logger.warning("left out of the list of models: %s", error)
        return tuple(metas)

    def loaded_count(self) -> int:
        """Return how many models are in memory."""
        return len(self._served)

    def find(self, model_id: str) -> ModelMeta:
        """Return one saved model's description.

        Raises
        ------
        ModelMissingError
            If no saved model has that id.
        """
        for meta in self.list():
            if meta.id == model_id:
                return meta
        shown = ascii(model_id[:40])
        raise ModelMissingError(
            f"no model {shown}: GET /api/models lists what there is, "
            "`python -m training.train_gbm SYMBOL` trains one"
        )

    def get(self, symbol: str) -> ServedModel:
        """Return the loaded model of a normalised symbol, loading what its link points to.

        Raises
        ------
        ModelMissingError
            If the symbol was never trained, or its model was deleted.
        ModelCorruptError, ModelIncompatibleError
            If nothing usable was loaded before either.
        """
        try:
            linked = linked_version(self._models_dir, symbol)
        except ModelMissingError:
            self._served.pop(symbol, None)
            raise
        served = self._served.get(symbol)
        if served is not None and served.folder == linked.folder:
            return served
        with self._lock_of(symbol):
            served = self._served.get(symbol)
            if served is None or served.folder != linked.folder:
                served = self._loaded(symbol, linked, served)
                self._served[symbol] = served
            return served

    def _loaded(self, symbol: str, linked: Linked, before: ServedModel | None) -> ServedModel:
        try:
            bundle = self._bundle(symbol, linked)
            meta = model_meta(
                bundle.metadata, ensemble_size=len(bundle.ensemble.models), warnings=bundle.warnings
            )
        except ModelError as error:
            if before is None:
                raise
            message = f"{error}; version {before.bundle.model_version} serves on"
            logger.warning(message)
            warnings = (*before.bundle.warnings, message)
            meta = model_meta(
                before.bundle.metadata, ensemble_size=before.meta.ensemble_size, warnings=warnings
            )
            # Remembering the folder keeps every request from trying it again; the next version has its own.
            return replace(before, folder=linked.folder, warnings=warnings, meta=meta)
        return ServedModel(
            meta=meta,
            bundle=bundle,
            forecaster=GBMForecaster(bundle=bundle),
            folder=linked.folder,
            warnings=bundle.warnings,
        )

    def _bundle(self, symbol: str, linked: Linked) -> GBMBundle:
        refused = self._refused.get(symbol)
        if refused is not None and refused[0] == linked:
            raise refused[1]
        try:
            return self._load(linked)
        except OSError as error:
            raise ModelCorruptError(f"the model of {symbol} cannot be read ({error.strerror})") from error
        except ModelIncompatibleError as error:
            # A running process keeps its libraries: trying again would fail again, at the price of a load.
            self._refused[symbol] = (linked, error)
            raise

    def _meta(self, symbol: str) -> ModelMeta:
        linked = linked_version(self._models_dir, symbol)
        served = self._served.get(symbol)
        if served is not None and served.folder == linked.folder:
            return served.meta
        refused = self._refused.get(symbol)
        if refused is not None and refused[0] == linked:
            raise refused[1]
        known = self._metas.get(symbol)
        if known is not None and known[0] == linked:
            return known[1]
        found = describe_linked(linked)
        meta = model_meta(found.metadata, ensemble_size=len(found.models), warnings=found.warnings)
        self._metas[symbol] = (linked, meta)
        return meta

    def _lock_of(self, symbol: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(symbol, threading.Lock())


def model_meta(
    metadata: Mapping[str, Any], *, ensemble_size: int = len(MODEL_NAMES), warnings: Sequence[str] = ()
) -> ModelMeta:
    """Translate ``training_metadata.json`` into what the list of models says.

    Parameters
    ----------
    metadata
        Content of the file.
    ensemble_size
        Number of boosters behind a forecast.
    warnings
        What was amiss while reading, in words; goes into the notes.

    Raises
    ------
    ModelCorruptError
        If a field is missing or of another type.
    """
    try:
        metrics, undefined = wire_metrics(metadata.get("metrics") or {})
        notes = [f"undefined, sent as 0: {', '.join(undefined)}"] if undefined else []
        notes += warnings
        label = metadata["verdict"]["label"]
        return ModelMeta(
            id=metadata["model_id"],
            symbol=metadata["symbol"],
            created_at=metadata["created_at"],
            fusion_mode_default="gbm_only",
            metrics=metrics,
            sequence_length=SEQUENCE_LENGTH,
            ensemble_size=ensemble_size,
            notes="; ".join(notes) or None,
            model_variant="gbm",
            data_interval="1d",
            quality_gate_passed=label == "edge",
            quality_score=quality_score(label),
            quality_reasons=list(metadata["verdict"]["reasons"]),
            target_horizon_days=metadata["horizon_bars"],
            model_version=metadata["model_version"],
            trained_through=metadata["trained_through"],
            out_of_sample_from=metadata["out_of_sample_from"],
            data_source=metadata["source"],
            verdict=label,
        )
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        name = metadata.get("symbol", "a symbol")
        raise ModelCorruptError(f"the metadata of {name} are not as trained: train again") from error


def quality_score(label: VerdictLabel) -> float:
    """Return the verdict as a number for the page: 1 edge, 0 none; nothing in between is known."""
    return {"edge": 1.0, "insufficient": 0.0, "no-edge": 0.0}[label]


def wire_metrics(stored: Mapping[str, Any]) -> tuple[BacktestMetrics, tuple[str, ...]]:
    """Return metrics that the page can draw, and the wire names of the required ones that are undefined.

    The page reads eight numbers and knows no "undefined": those become 0.0 and are named beside.
    """
    known = {name: value for name, value in stored.items() if is_finite_number(value)}
    undefined = []
    for name in REQUIRED_METRICS:
        alias = cast("str", BacktestMetrics.model_fields[name].alias)
        if name not in known and alias not in known:
            known[alias] = 0.0
            undefined.append(alias)
    metrics = BacktestMetrics.model_validate(known)
    # The page cannot tell a fraction above 1 from a percentage, so the percentage goes along.
    return metrics.model_copy(update={"cumulative_return_pct": metrics.cumulative_return * 100}), tuple(
        undefined
    )


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a number that may go on the wire."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_NUMBER <= value <= MAX_NUMBER
