"""Which saved models there are, the loaded one of each symbol that is asked for, and what is done to them.

::

    python -m service.model_registry list
    python -m service.model_registry versions|rollback|delete|restore AAPL [--kind gbm]
    python -m service.model_registry rollback AAPL --to VERSION

Listing checks the files that would serve and unpickles nothing. Loading happens at the first question for a
symbol and again when its link moves or its manifest changes; what was loaded before serves on until the new
one has passed its checks, and longer when it fails them. An ensemble holds no copy of its members: it is
joined from what serves of each, and from nothing else than the versions that it was judged with.
"""

import argparse
import io
import json
import logging
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.schema import normalise_symbol
from inference import artifact
from inference import ensemble as joint
from inference import load_gbm_models as gbm
from inference import load_lstm_model as lstm
from inference.artifact import MANIFEST, Description, Manifest
from inference.ensemble import Parts, forecaster_for
from inference.pipeline import Forecaster
from service.prediction_chart import model_meta
from service.schemas import ModelMeta, ModelVersion
from utils.base import (
    AIStocksError,
    ModelCorruptError,
    ModelError,
    ModelIncompatibleError,
    ModelMissingError,
    Settings,
    StorageError,
    UsageError,
    run_command,
)
from utils.model_paths import (
    ENSEMBLE,
    GBM,
    LSTM,
    PARTS,
    READS,
    ArtifactKind,
    Linked,
    Mode,
    VersionPrunedError,
    discard,
    linked_version,
    list_symbols,
    list_versions,
    restore,
    roll_back,
    serve_linked,
)

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
LISTED = {"id", "symbol", "model_version", "trained_through", "verdict", "data_source"}
# Archives of one version are equal to the last byte.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class ModelKind(NamedTuple):
    """How one sort of model is found, described, loaded and asked; a model's id is ``<SYMBOL>-<name>``.

    ``load`` loads what a link names, ``describe`` tells of it without unpickling; ``check`` loads one folder,
    before rolling back to it.
    """

    paths: ArtifactKind
    manifest: type[Manifest]
    load: Callable[[Linked], Any]
    describe: Callable[[Linked], Description]
    check: Callable[[Path], object]

    @property
    def mode(self) -> Mode:
        """The fusion mode that it serves; its parts are `utils.model_paths.PARTS`."""
        return next(mode for mode, parts in PARTS.items() if parts[-1].name == self.paths.name)


KINDS = (
    ModelKind(GBM, gbm.GBMManifest, gbm.load_linked, gbm.describe_linked, gbm.load_folder),
    ModelKind(LSTM, lstm.LSTMManifest, lstm.load_linked, lstm.describe_linked, lstm.load_folder),
    ModelKind(ENSEMBLE, joint.EnsembleManifest, joint.load_linked, joint.describe_linked, joint.load_folder),
)


class Place(NamedTuple):
    """What a link names, and when the manifest there was written, in nanoseconds, 0 where there is none."""

    folder: Path
    stamp: int


# Of what could not be loaded: it is tried again at every question.
UNUSABLE = Place(Path(), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One loaded version; never changed, only replaced, so an answer comes from one version.

    Attributes
    ----------
    meta, warnings
        What the list of models says about it, and what was amiss while loading, in words.
    bundle
        What was loaded: has ``metadata``, ``record``, ``warnings`` and ``model_version``, whatever its kind.
    place
        What the symbol's link named when it was loaded, or when a newer version failed to load.
    """

    meta: ModelMeta
    bundle: Any
    place: Place
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel(LoadedModel):
    """What answers: a version, what `inference.pipeline.decide` takes of it, and all that it rests on.

    ``made_from`` is where each part of its kind was loaded from, None for one that is not saved.
    """

    forecaster: Forecaster
    made_from: tuple[Place | None, ...] = ()


class ModelRegistry:
    """Thread-safe view of a folder of saved models, which need not exist."""

    def __init__(self, models_dir: Path, kinds: Sequence[ModelKind] = KINDS) -> None:
        self._models_dir = models_dir
        self._kinds = {kind.paths.name: kind for kind in kinds}
        self._locks: dict[str, threading.Lock] = {}
        self._loaded: dict[str, LoadedModel] = {}
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
        return len(self._loaded)

    def find(self, model_id: str) -> ModelMeta:
        """Return one saved model's description; `ModelMissingError` if none has that id."""
        for meta in self.list():
            if meta.id == model_id:
                return meta
        raise _no_model(model_id)

    def get(self, symbol: str, kind: str = GBM.name) -> ServedModel:
        """Return what answers for a kind: its version that serves, or that before while another thread loads.

        Where an ensemble cannot be joined, the boosters alone are returned, and the warnings say why.

        Raises
        ------
        ModelMissingError
            If the symbol was never trained, or its model was deleted.
        ModelCorruptError, ModelIncompatibleError
            If nothing usable was loaded before either.
        """
        if kind not in self._kinds:
            raise ModelMissingError(f"no {kind.upper()} model of {symbol} is served")
        wanted, found, amiss = self._kinds[kind], dict[str, LoadedModel](), ""
        first, *_ = parts = [part.name for part in PARTS[wanted.mode]]
        places: list[Place | None] = []
        for name in parts:
            try:
                found[name] = self._part(symbol, self._kinds[name])
                places.append(found[name].place)
            except ModelError as error:
                if name == first:
                    raise
                places.append(None if isinstance(error, ModelMissingError) else UNUSABLE)
                amiss = amiss or str(error)
        key, made_from = _id(symbol, kind), tuple(places)
        served = self._served.get(key)
        if served is None or served.made_from != made_from:
            served = self._served[key] = _joined(symbol, wanted, found, amiss, made_from)
        return served

    def current(self, symbol: str, kind: str = GBM.name) -> ServedModel | None:
        """Return what answers while the links name what it rests on, else None; never waits, loads nothing.

        The links are read at most once in `LOOK_EVERY_S`.
        """
        key, now = _id(symbol, kind), time.monotonic()
        served = self._served.get(key)
        if served is not None and now - self._looked.get(key, -LOOK_EVERY_S) >= LOOK_EVERY_S:
            if served.made_from != tuple(self._places(symbol, self._kinds[kind])):
                return None
            self._looked[key] = now
        return served

    def archive(self, model_id: str) -> tuple[str, bytes]:
        """Return the name and the content of a zip of the version that serves: what its manifest lists."""
        symbol, kind = self.parse(model_id)

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
        """Return the kept versions of a model, the newest first; which serves, and which came after that."""
        symbol, kind = self.parse(model_id)
        serving = linked_version(self._models_dir, symbol, kind.paths).folder.name
        folders = reversed(list_versions(self._models_dir, symbol, kind.paths))
        return tuple(_version_of(folder, kind, serving) for folder in folders)

    def roll_back(self, model_id: str, to: str | None = None) -> ModelMeta:
        """Let an earlier version serve again, or the one that is named; see `utils.model_paths.roll_back`."""
        symbol, kind = self.parse(model_id)
        # Before the lock makes a folder for a symbol that has no model.
        linked_version(self._models_dir, symbol, kind.paths)
        try:
            roll_back(self._models_dir, symbol, kind.paths, kind.check, to)
        except StorageError:
            # Whoever deletes takes the folder of the lock away too.
            linked_version(self._models_dir, symbol, kind.paths)
            raise
        return self._meta(symbol, kind)

    def delete(self, model_id: str) -> None:
        """Move a model to the trash; answers under way are finished. See `utils.model_paths.discard`."""
        symbol, kind = self.parse(model_id)
        discard(self._models_dir, symbol, kind.paths)
        self._forget(symbol, kind)

    def restore(self, model_id: str) -> ModelMeta:
        """Undo the last deletion of a model; raises as `utils.model_paths.restore`."""
        symbol, kind = self.parse(model_id)
        restore(self._models_dir, symbol, kind.paths)
        return self._meta(symbol, kind)

    def parse(self, model_id: str) -> tuple[str, ModelKind]:
        """Return the normalised symbol and the kind that an id names, whether or not there is a model."""
        symbol, _, kind = model_id.rpartition("-")
        if kind not in self._kinds or not symbol or normalise_symbol(symbol) != symbol:
            raise _no_model(model_id)
        return symbol, self._kinds[kind]

    def _place(self, symbol: str, kind: ModelKind) -> tuple[Linked, Place]:
        linked = linked_version(self._models_dir, symbol, kind.paths)
        try:
            return linked, Place(linked.folder, (linked.folder / MANIFEST).stat().st_mtime_ns)
        except OSError:
            return linked, Place(linked.folder, 0)

    def _places(self, symbol: str, kind: ModelKind) -> Iterator[Place | None]:
        for part in PARTS[kind.mode]:
            try:
                yield self._place(symbol, self._kinds[part.name])[1]
            except ModelError:
                yield None

    def _forget(self, symbol: str, kind: ModelKind) -> None:
        self._loaded.pop(_id(symbol, kind.paths.name), None)
        for other in self._kinds:
            self._served.pop(_id(symbol, other), None)

    def _part(self, symbol: str, kind: ModelKind) -> LoadedModel:
        for _ in range(READS - 1):
            try:
                return self._part_now(symbol, kind)
            except VersionPrunedError:
                # Replaced or deleted between the reading of the link and that of its files.
                continue
        return self._part_now(symbol, kind)

    def _part_now(self, symbol: str, kind: ModelKind) -> LoadedModel:
        key = _id(symbol, kind.paths.name)
        try:
            linked, place = self._place(symbol, kind)
        except ModelMissingError:
            self._forget(symbol, kind)
            raise
        loaded, lock = self._loaded.get(key), self._locks.setdefault(key, threading.Lock())
        if loaded is not None and loaded.place == place:
            return loaded
        if not lock.acquire(blocking=loaded is None) and loaded is not None:
            return loaded
        try:
            loaded = self._loaded.get(key)
            if loaded is None or loaded.place != place:
                loaded = self._loaded[key] = self._load(key, kind, linked, place, loaded)
            return loaded
        finally:
            lock.release()

    def _load(
        self, key: str, kind: ModelKind, linked: Linked, place: Place, before: LoadedModel | None
    ) -> LoadedModel:
        try:
            bundle = self._bundle(key, kind, linked, place)
            size, warnings = len(bundle.models), bundle.warnings
            meta = model_meta(bundle.metadata, ensemble_size=size, warnings=warnings)
        except ModelError as error:
            if before is None or isinstance(error, VersionPrunedError):
                raise
            message = f"{error}; version {before.bundle.model_version} serves on"
            logger.warning(message)
            # Remembering the place keeps every request from trying it again; the next version has its own.
            bundle, size = before.bundle, before.meta.ensemble_size
            warnings = (*bundle.warnings, message)
            meta = model_meta(bundle.metadata, ensemble_size=size, warnings=warnings)
        return LoadedModel(meta=meta, bundle=bundle, place=place, warnings=warnings)

    def _bundle(self, key: str, kind: ModelKind, linked: Linked, place: Place) -> Any:  # noqa: ANN401
        self._refuse_again(key, place)
        try:
            return kind.load(linked)
        except OSError as error:
            raise ModelCorruptError(f"the model {key} cannot be read ({error.strerror})") from error
        except ModelIncompatibleError as error:
            # A running process keeps its libraries: trying again would fail again, at the price of a load.
            self._refused[key] = (place, error)
            raise

    def _refuse_again(self, key: str, place: Place) -> None:
        refused = self._refused.get(key)
        if refused is not None and refused[0] == place:
            raise refused[1]

    def _meta(self, symbol: str, kind: ModelKind) -> ModelMeta:
        key, (linked, place) = _id(symbol, kind.paths.name), self._place(symbol, kind)
        loaded, known = self._loaded.get(key), self._metas.get(key)
        if loaded is not None and loaded.place == place:
            return loaded.meta
        self._refuse_again(key, place)
        if known is not None and known[0] == place:
            return known[1]
        found = kind.describe(linked)
        meta = model_meta(found.metadata, ensemble_size=len(found.models), warnings=found.warnings)
        self._metas[key] = (place, meta)
        return meta


def _joined(
    symbol: str,
    wanted: ModelKind,
    found: Mapping[str, LoadedModel],
    amiss: str,
    made_from: tuple[Place | None, ...],
) -> ServedModel:
    bundles = {name: one.bundle for name, one in found.items()}
    chosen = forecaster_for(wanted.mode, Parts(symbol=symbol, amiss=amiss, **bundles))
    told = found[PARTS[chosen.mode][-1].name]
    warnings = [*told.warnings, *chosen.notes]
    if chosen.mode == wanted.mode:
        warnings += [text for one in found.values() if one is not told for text in one.warnings]
    return ServedModel(
        meta=told.meta,
        bundle=told.bundle,
        place=told.place,
        warnings=tuple(warnings),
        forecaster=chosen.forecaster,
        made_from=made_from,
    )


def _version_of(folder: Path, kind: ModelKind, serving: str) -> ModelVersion:
    try:
        told = kind.describe(Linked(folder=folder))
        says, damage = {} if told.warnings else told.metadata, "; ".join(told.warnings) or None
    except ModelError as error:
        says, damage = {}, str(error)
    return ModelVersion(
        model_version=folder.name,
        serving=folder.name == serving,
        newer=folder.name > serving,
        created_at=says.get("created_at"),
        trained_through=says.get("trained_through"),
        verdict=(says.get("verdict") or {}).get("label"),
        damage=damage,
    )


def _id(symbol: str, kind: str) -> str:
    return f"{symbol}-{kind}"


def _no_model(model_id: str) -> ModelMissingError:
    return ModelMissingError(
        f"no model {model_id[:40]!a}: GET /api/models lists what there is, "
        "`python -m training.train_gbm SYMBOL` trains one"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service.model_registry", description="List, delete, restore, roll back models."
    )
    parser.add_argument("command", choices=("list", "versions", "rollback", "delete", "restore"))
    parser.add_argument("symbol", nargs="?", metavar="SYMBOL", help="whose model; not for list")
    parser.add_argument("--kind", choices=[kind.paths.name for kind in KINDS], default=GBM.name)
    parser.add_argument("--to", metavar="VERSION", help="rollback: a version that `versions` lists")
    parser.add_argument("--models-dir", type=Path, help="default: AI_STOCKS_MODELS_DIR, or saved_models")
    return parser


def run(args: argparse.Namespace, models_dir: Path) -> Sequence[Mapping[str, Any]]:
    """Do what the command line asks, raising as the registry does; return one mapping a line."""
    registry = ModelRegistry(models_dir)
    if args.command == "list":
        return [meta.model_dump(include=LISTED) for meta in registry.list()]
    if args.symbol is None:
        raise UsageError(f"{args.command} needs a SYMBOL")
    if args.to is not None and args.command != "rollback":
        raise UsageError(f"--to belongs to rollback: leave it out of {args.command}")
    model_id = _id(normalise_symbol(args.symbol), args.kind)
    if args.command == "versions":
        return [version.model_dump(exclude_none=True) for version in registry.versions(model_id)]
    if args.command == "delete":
        registry.delete(model_id)
        return [{"id": model_id, "status": "deleted"}]
    is_back = args.command == "rollback"
    meta = registry.roll_back(model_id, args.to) if is_back else registry.restore(model_id)
    return [meta.model_dump(include=LISTED)]


def main(argv: list[str] | None = None) -> int:
    """Show or change what is saved; one JSON object a line on stdout. Exit codes: see ``utils.base``."""
    args = build_parser().parse_args(argv)

    def work(settings: Settings) -> None:
        lines = run(args, args.models_dir or settings.models_dir)
        sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
