"""Which saved models there are, and the loaded one of each symbol that is asked for.

Listing reads metadata and unpickles nothing. Loading happens at the first question for a symbol and again
when its link moves to another version; what was loaded before serves on when the new one cannot be used.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

from pydantic import ValidationError

from inference.ensemble import MODEL_NAMES
from inference.load_gbm_models import GBMBundle, load_bundle, read_metadata
from inference.pipeline import Forecaster, GBMForecaster
from service.schemas import VerdictLabel
from service.work_schemas import BacktestMetrics, ModelMeta
from utils.errors import AIStocksError, ModelCorruptError, ModelError, ModelMissingError
from utils.model_paths import current_version, list_symbols

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
        Loads one symbol's bundle; replaced in tests.
    """

    def __init__(self, models_dir: Path, load: Callable[[Path, str], GBMBundle] = load_bundle) -> None:
        self._models_dir = models_dir
        self._load = load
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._served: dict[str, ServedModel] = {}
        self._metas: dict[Path, ModelMeta] = {}

    def list(self) -> tuple[ModelMeta, ...]:
        """Return what is saved, by symbol; a damaged bundle is left out and logged."""
        metas = []
        for symbol in list_symbols(self._models_dir):
            try:
                metas.append(self._meta(symbol))
            except AIStocksError as error:
                logger.warning("left out of the list of models: %s", error)
        return tuple(metas)

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
            folder = current_version(self._models_dir, symbol)
        except ModelMissingError:
            self._served.pop(symbol, None)
            raise
        served = self._served.get(symbol)
        if served is not None and served.folder == folder:
            return served
        with self._lock_of(symbol):
            served = self._served.get(symbol)
            if served is None or served.folder != folder:
                served = self._loaded(symbol, folder, served)
                self._served[symbol] = served
            return served

    def _loaded(self, symbol: str, folder: Path, before: ServedModel | None) -> ServedModel:
        try:
            bundle = self._bundle(symbol)
            meta = model_meta(bundle.metadata)
        except ModelError as error:
            if before is None:
                raise
            message = f"{error}; version {before.bundle.model_version} serves on"
            logger.warning(message)
            # Remembering the folder keeps every request from trying it again; the next version has its own.
            return replace(before, folder=folder, warnings=(*before.bundle.warnings, message))
        return ServedModel(
            meta=meta,
            bundle=bundle,
            forecaster=GBMForecaster(bundle=bundle),
            folder=folder,
            warnings=bundle.warnings,
        )

    def _bundle(self, symbol: str) -> GBMBundle:
        try:
            return self._load(self._models_dir, symbol)
        except OSError as error:
            raise ModelCorruptError(f"the model of {symbol} cannot be read ({error.strerror})") from error

    def _meta(self, symbol: str) -> ModelMeta:
        folder = current_version(self._models_dir, symbol)
        if folder not in self._metas:
            try:
                metadata = read_metadata(self._models_dir, symbol)
            except OSError as error:
                raise ModelCorruptError(f"the model of {symbol} cannot be read ({error.strerror})") from error
            self._metas[folder] = model_meta(metadata)
        return self._metas[folder]

    def _lock_of(self, symbol: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(symbol, threading.Lock())


def model_meta(metadata: Mapping[str, Any]) -> ModelMeta:
    """Translate ``training_metadata.json`` into what the list of models says.

    Raises
    ------
    ModelCorruptError
        If a field is missing or of another type.
    """
    try:
        metrics, undefined = wire_metrics(metadata.get("metrics") or {})
        label = metadata["verdict"]["label"]
        return ModelMeta(
            id=metadata["model_id"],
            symbol=metadata["symbol"],
            created_at=metadata["created_at"],
            fusion_mode_default="gbm_only",
            metrics=metrics,
            sequence_length=SEQUENCE_LENGTH,
            ensemble_size=len(MODEL_NAMES),
            notes=f"undefined, sent as 0: {', '.join(undefined)}" if undefined else None,
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
