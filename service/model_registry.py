"""Which saved models there are, the loaded one of each symbol that is asked for, and what is done to them.

::

    python -m service.model_registry list
    python -m service.model_registry versions|rollback|delete|restore AAPL [--kind gbm]

Listing checks the files that would serve and unpickles nothing. Loading happens at the first question for a
symbol and again when its link moves or its manifest changes; what was loaded before serves on until the new
one has passed its checks, and longer when it fails them. Each question reads the link once, and the list
describes what a prediction would come from.
"""

import argparse
import io
import json
import logging
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from pydantic import ValidationError

from data.schema import normalise_symbol
from inference import artifact
from inference.artifact import MANIFEST, Description, Manifest
from inference.ensemble import MODEL_NAMES
from inference.load_gbm_models import GBMManifest, describe_linked, load_folder, load_linked
from inference.pipeline import Forecaster, GBMForecaster
from service.schemas import BacktestMetrics, ModelMeta, ModelVersion
from utils.errors import (
    AIStocksError,
    ModelCorruptError,
    ModelError,
    ModelIncompatibleError,
    ModelMissingError,
    UsageError,
)
from utils.model_paths import (
    GBM,
    READS,
    ArtifactKind,
    Linked,
    VersionPrunedError,
    discard,
    linked_version,
    list_symbols,
    list_versions,
    restore,
    roll_back,
    serve_linked,
)
from utils.settings import configure_logging, read_settings

logger = logging.getLogger(__name__)

REQUIRED_METRICS = tuple(name for name, field in BacktestMetrics.model_fields.items() if field.is_required())
# A daily forecast of boosters reads one row of features.
SEQUENCE_LENGTH = 1
MAX_NUMBER = sys.float_info.max
LOOK_EVERY_S = 1.0
LISTED = {"id", "symbol", "model_version", "trained_through", "verdict", "data_source"}
# Archives of one version are equal to the last byte.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """How one sort of model is found, described, loaded and asked; a model's id is ``<SYMBOL>-<name>``.

    Attributes
    ----------
    paths, manifest
        Where it lies, with the kind's name; and what its versions promise.
    load, describe, check
        Load what a link names; describe it without unpickling; load one folder, before rolling back to it.
    forecaster
        Makes of a loaded bundle what `inference.pipeline.decide` takes.
    members
        Number of models behind a forecast of a loaded bundle.
    """

    paths: ArtifactKind
    manifest: type[Manifest]
    load: Callable[[Linked], Any]
    describe: Callable[[Linked], Description]
    check: Callable[[Path], object]
    forecaster: Callable[[Any], Forecaster]
    members: Callable[[Any], int]


KINDS: tuple[ModelKind, ...] = (
    ModelKind(
        paths=GBM,
        manifest=GBMManifest,
        load=load_linked,
        describe=describe_linked,
        check=load_folder,
        forecaster=lambda bundle: GBMForecaster(bundle=bundle),
        members=lambda bundle: len(bundle.ensemble.models),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One loaded model; never changed, only replaced, so an answer comes from one version.

    Attributes
    ----------
    meta
        What the list of models says about it.
    bundle
        What was loaded: has ``metadata``, ``record``, ``warnings`` and ``model_version``, whatever its kind.
    forecaster
        The bundle as `inference.pipeline.decide` takes it.
    folder
        What the symbol's link pointed to when it was loaded, or when a newer version failed to load.
    warnings
        What was amiss while loading, in words.
    stamp
        When the manifest in ``folder`` was written, in nanoseconds; 0 where there is none.
    """

    meta: ModelMeta
    bundle: Any
    forecaster: Forecaster
    folder: Path
    warnings: tuple[str, ...]
    stamp: int = 0

    def is_of(self, place: "Place") -> bool:
        """Whether this is what ``place`` names."""
        return (self.folder, self.stamp) == (place.linked.folder, place.stamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a link names, and the stamp of the manifest there: a change in place is noticed too."""

    linked: Linked
    stamp: int


class ModelRegistry:
    """Thread-safe view of a folder of saved models.

    Parameters
    ----------
    models_dir
        Root of the saved models; need not exist.
    kinds
        The kinds of models that are served; the first one is meant where none is named.
    """

    def __init__(self, models_dir: Path, kinds: Sequence[ModelKind] = KINDS) -> None:
        self._models_dir = models_dir
        self._kinds = {kind.paths.name: kind for kind in kinds}
        self._locks: dict[str, threading.Lock] = {}
        self._served: dict[str, ServedModel] = {}
        self._looked: dict[str, float] = {}
        self._metas: dict[str, tuple[Place, ModelMeta]] = {}
        self._refused: dict[str, tuple[Place, ModelIncompatibleError]] = {}

    def list(self) -> tuple[ModelMeta, ...]:
        """Return what is saved, by id; a damaged bundle is left out and logged."""
        metas = []
        for kind in self._kinds.values():
            for symbol in list_symbols(self._models_dir, kind.paths):
                try:
                    metas.append(self._meta(symbol, kind))
                except AIStocksError as error:
                    logger.warning("left out of the list of models: %s", error)
        return tuple(sorted(metas, key=lambda meta: meta.id))

    def loaded_count(self) -> int:
        """Return how many models are in memory."""
        return len(self._served)

    def find(self, model_id: str) -> ModelMeta:
        """Return one saved model's description; `ModelMissingError` if none has that id."""
        for meta in self.list():
            if meta.id == model_id:
                return meta
        raise _no_model(model_id)

    def get(self, symbol: str, kind: str = GBM.name) -> ServedModel:
        """Return the model that a symbol's link names; the one before while another thread loads that.

        Raises
        ------
        ModelMissingError
            If the symbol was never trained, or its model was deleted.
        ModelCorruptError, ModelIncompatibleError
            If nothing usable was loaded before either.
        """
        if kind not in self._kinds:
            raise ModelMissingError(f"no {kind.upper()} model of {symbol} is served")
        for _ in range(READS - 1):
            try:
                return self._get(symbol, self._kinds[kind])
            except VersionPrunedError:
                # Replaced or deleted between the reading of the link and that of its files.
                continue
        return self._get(symbol, self._kinds[kind])

    def current(self, symbol: str, kind: str = GBM.name) -> ServedModel | None:
        """Return the loaded model while its link names it, else None; never waits, and loads nothing.

        The link is read at most once in `LOOK_EVERY_S`.
        """
        key, now = _id(symbol, kind), time.monotonic()
        served = self._served.get(key)
        if served is not None and now - self._looked.get(key, -LOOK_EVERY_S) >= LOOK_EVERY_S:
            try:
                if not served.is_of(self._place(symbol, self._kinds[kind])):
                    return None
            except ModelError:
                return None
            self._looked[key] = now
        return served

    def archive(self, model_id: str) -> tuple[str, bytes]:
        """Return the name and the content of a zip of the version that serves: what its manifest lists."""
        symbol, kind = self._of(model_id)

        def packed(folder: Path) -> bytes:
            version = artifact.read_version(folder, kind.paths, kind.manifest)
            contents = {**version.contents, MANIFEST: artifact.sealed(version.manifest)}
            with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in sorted(contents.items()):
                    archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), content, zipfile.ZIP_DEFLATED)
            return buffer.getvalue()

        content, _ = serve_linked(linked_version(self._models_dir, symbol, kind.paths), packed)
        name = f"{symbol}_artifacts.zip" if kind.paths == GBM else f"{symbol}_{kind.paths.name}_artifacts.zip"
        return name, content

    def versions(self, model_id: str) -> tuple[ModelVersion, ...]:
        """Return the kept versions of a model, the newest first, and which of them serves."""
        symbol, kind = self._of(model_id)
        serving = linked_version(self._models_dir, symbol, kind.paths).folder
        found = []
        for folder in reversed(list_versions(self._models_dir, symbol, kind.paths)):
            try:
                told = kind.describe(Linked(folder=folder))
                says, damage = {} if told.warnings else told.metadata, "; ".join(told.warnings) or None
            except ModelError as error:
                says, damage = {}, str(error)
            found.append(
                ModelVersion(
                    model_version=folder.name,
                    serving=folder == serving,
                    created_at=says.get("created_at"),
                    trained_through=says.get("trained_through"),
                    verdict=(says.get("verdict") or {}).get("label"),
                    damage=damage,
                )
            )
        return tuple(found)

    def roll_back(self, model_id: str) -> ModelMeta:
        """Let the newest earlier version that loads serve again; raises as `utils.model_paths.roll_back`."""
        symbol, kind = self._of(model_id)
        roll_back(self._models_dir, symbol, kind.paths, kind.check)
        return self._meta(symbol, kind)

    def delete(self, model_id: str) -> None:
        """Move a model to the trash; answers under way are finished. See `utils.model_paths.discard`."""
        symbol, kind = self._of(model_id)
        discard(self._models_dir, symbol, kind.paths)
        self._served.pop(_id(symbol, kind.paths.name), None)

    def restore(self, model_id: str) -> ModelMeta:
        """Undo the last deletion of a model; raises as `utils.model_paths.restore`."""
        symbol, kind = self._of(model_id)
        restore(self._models_dir, symbol, kind.paths)
        return self._meta(symbol, kind)

    def _of(self, model_id: str) -> tuple[str, ModelKind]:
        symbol, _, kind = model_id.rpartition("-")
        if kind not in self._kinds or not symbol or normalise_symbol(symbol) != symbol:
            raise _no_model(model_id)
        return symbol, self._kinds[kind]

    def _place(self, symbol: str, kind: ModelKind) -> Place:
        linked = linked_version(self._models_dir, symbol, kind.paths)
        try:
            return Place(linked=linked, stamp=(linked.folder / MANIFEST).stat().st_mtime_ns)
        except OSError:
            return Place(linked=linked, stamp=0)

    def _get(self, symbol: str, kind: ModelKind) -> ServedModel:
        key = _id(symbol, kind.paths.name)
        try:
            place = self._place(symbol, kind)
        except ModelMissingError:
            self._served.pop(key, None)
            raise
        served, lock = self._served.get(key), self._locks.setdefault(key, threading.Lock())
        if served is not None and served.is_of(place):
            return served
        if not lock.acquire(blocking=served is None) and served is not None:
            return served
        try:
            served = self._served.get(key)
            if served is None or not served.is_of(place):
                served = self._served[key] = self._loaded(key, kind, place, served)
            return served
        finally:
            lock.release()

    def _loaded(self, key: str, kind: ModelKind, place: Place, before: ServedModel | None) -> ServedModel:
        try:
            bundle = self._bundle(key, kind, place)
            size, warnings = kind.members(bundle), bundle.warnings
            meta = model_meta(bundle.metadata, ensemble_size=size, warnings=warnings)
        except ModelError as error:
            if before is None or isinstance(error, VersionPrunedError):
                raise
            message = f"{error}; version {before.bundle.model_version} serves on"
            logger.warning(message)
            size, warnings = before.meta.ensemble_size, (*before.bundle.warnings, message)
            meta = model_meta(before.bundle.metadata, ensemble_size=size, warnings=warnings)
            # Remembering the place keeps every request from trying it again; the next version has its own.
            bundle, forecaster = before.bundle, before.forecaster
        else:
            forecaster = kind.forecaster(bundle)
        return ServedModel(
            meta=meta,
            bundle=bundle,
            forecaster=forecaster,
            folder=place.linked.folder,
            warnings=warnings,
            stamp=place.stamp,
        )

    def _bundle(self, key: str, kind: ModelKind, place: Place) -> Any:  # noqa: ANN401
        refused = self._refused.get(key)
        if refused is not None and refused[0] == place:
            raise refused[1]
        try:
            return kind.load(place.linked)
        except OSError as error:
            raise ModelCorruptError(f"the model {key} cannot be read ({error.strerror})") from error
        except ModelIncompatibleError as error:
            # A running process keeps its libraries: trying again would fail again, at the price of a load.
            self._refused[key] = (place, error)
            raise

    def _meta(self, symbol: str, kind: ModelKind) -> ModelMeta:
        key, place = _id(symbol, kind.paths.name), self._place(symbol, kind)
        served, refused, known = self._served.get(key), self._refused.get(key), self._metas.get(key)
        if served is not None and served.is_of(place):
            return served.meta
        if refused is not None and refused[0] == place:
            raise refused[1]
        if known is not None and known[0] == place:
            return known[1]
        found = kind.describe(place.linked)
        meta = model_meta(found.metadata, ensemble_size=len(found.models), warnings=found.warnings)
        self._metas[key] = (place, meta)
        return meta


def _id(symbol: str, kind: str) -> str:
    return f"{symbol}-{kind}"


def _no_model(model_id: str) -> ModelMissingError:
    return ModelMissingError(
        f"no model {model_id[:40]!a}: GET /api/models lists what there is, "
        "`python -m training.train_gbm SYMBOL` trains one"
    )


def model_meta(
    metadata: Mapping[str, Any], *, ensemble_size: int = len(MODEL_NAMES), warnings: Sequence[str] = ()
) -> ModelMeta:
    """Translate ``training_metadata.json`` into what the list of models says.

    Parameters
    ----------
    metadata, ensemble_size
        Content of the file, and the number of models behind a forecast.
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
            model_variant=metadata["model_id"].rpartition("-")[2],
            data_interval="1d",
            quality_gate_passed=label == "edge",
            # Nothing between an edge and none is known.
            quality_score=float(label == "edge"),
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
    also = {"cumulative_return_pct": metrics.cumulative_return * 100}
    return metrics.model_copy(update=also), tuple(undefined)


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a number that may go on the wire."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_NUMBER <= value <= MAX_NUMBER


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service.model_registry", description="List, delete, restore, roll back models."
    )
    parser.add_argument("command", choices=("list", "versions", "rollback", "delete", "restore"))
    parser.add_argument("symbol", nargs="?", metavar="SYMBOL", help="whose model; not for list")
    parser.add_argument("--kind", choices=[kind.paths.name for kind in KINDS], default=GBM.name)
    parser.add_argument("--models-dir", type=Path, help="default: AI_STOCKS_MODELS_DIR, or saved_models")
    return parser


def run(args: argparse.Namespace, models_dir: Path) -> Sequence[Mapping[str, Any]]:
    """Do what the command line asks, raising as the registry does; return one mapping a line."""
    registry = ModelRegistry(models_dir)
    if args.command == "list":
        return [meta.model_dump(include=LISTED) for meta in registry.list()]
    if args.symbol is None:
        raise UsageError(f"{args.command} needs a SYMBOL")
    model_id = _id(normalise_symbol(args.symbol), args.kind)
    if args.command == "versions":
        return [version.model_dump(exclude_none=True) for version in registry.versions(model_id)]
    if args.command == "delete":
        registry.delete(model_id)
        return [{"id": model_id, "status": "deleted"}]
    meta = registry.roll_back(model_id) if args.command == "rollback" else registry.restore(model_id)
    return [meta.model_dump(include=LISTED)]


def main(argv: list[str] | None = None) -> int:
    """Show or change what is saved; one JSON object a line on stdout. Exit codes: see ``utils.errors``."""
    args = build_parser().parse_args(argv)
    settings = read_settings()
    configure_logging(settings.log_level)
    try:
        lines = run(args, args.models_dir or settings.models_dir)
    except AIStocksError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
