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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.schema import normalise_symbol
from inference import ensemble, load_gbm_models, load_lstm_model
from inference.artifact import MANIFEST, Format, read_version, sealed
from inference.ensemble import Parts, forecaster_for
from inference.pipeline import Forecaster
from service.prediction_chart import MODE_OF, model_meta
from service.schemas import ModelMeta, ModelVersion
from utils import base as errors
from utils.base import ModelError, ModelIncompatibleError, ModelMissingError, Settings, run_command
from utils.model_paths import (
    GBM,
    PARTS,
    Linked,
    VersionPrunedError,
    discard,
    linked_version,
    list_symbols,
    list_versions,
    reading_again,
    restore,
    roll_back,
    serve_linked,
)

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
LISTED = {"id", "symbol", "model_version", "trained_through", "verdict", "data_source"}
# Archives of one version are equal to the last byte.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
AnyFormat = Format[Any, Any]
# A model's id is ``<SYMBOL>-<kind>``.
FORMATS: tuple[AnyFormat, ...] = (load_gbm_models.FORMAT, load_lstm_model.FORMAT, ensemble.FORMAT)


class Place(NamedTuple):
    """What a link names, and when the manifest there was written, in nanoseconds, 0 where there is none."""

    folder: Path
    stamp: int


# Of what could not be loaded: it is tried again at every question.
UNUSABLE = Place(Path(), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One loaded version; never changed, only replaced, so an answer comes from one version.

    ``meta`` is what the list of models says about it, ``bundle`` an `inference.artifact.Saved`, ``warnings``
    what was amiss while loading; ``place`` is what the symbol's link named then, or when a newer version
    failed to load.
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

    def __init__(self, models_dir: Path, formats: Sequence[AnyFormat] = FORMATS) -> None:
        self._models_dir = models_dir
        self._formats = {form.kind.name: form for form in formats}
        self._locks: dict[str, threading.Lock] = {}
        self._loaded: dict[str, LoadedModel] = {}
        self._served: dict[str, ServedModel] = {}
        self._looked: dict[str, float] = {}
        self._metas: dict[str, tuple[Place, ModelMeta]] = {}
        self._refused: dict[str, tuple[Place, ModelIncompatibleError]] = {}

    def list(self) -> tuple[ModelMeta, ...]:
        """Return what is saved, by id; a damaged bundle is left out and logged."""
        metas = []
        for form in self._formats.values():
            for symbol in list_symbols(self._models_dir, form.kind):
                try:
                    metas.append(self._meta(symbol, form))
                except errors.AIStocksError as error:
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

        Where an ensemble cannot be joined, the boosters alone are returned, and the warnings say why. Raises
        `ModelMissingError` if the symbol was never trained, or its model was deleted; `ModelCorruptError` or
        `ModelIncompatibleError` if nothing usable was loaded before either.
        """
        mode, found, amiss = MODE_OF[kind], dict[str, LoadedModel](), ""
        places = list[Place | None]()
        for part in PARTS[mode]:
            try:
                found[part.name] = reading_again(partial(self._part, symbol, self._formats[part.name]))
                places.append(found[part.name].place)
            except ModelError as error:
                if not places:
                    raise
                places.append(None if isinstance(error, ModelMissingError) else UNUSABLE)
                amiss = amiss or str(error)
        key, made_from = _id(symbol, kind), tuple(places)
        served = self._served.get(key)
        if served is None or served.made_from != made_from:
            bundles = {name: one.bundle for name, one in found.items()}
            chosen = forecaster_for(mode, Parts(symbol=symbol, amiss=amiss, **bundles))
            *members, told = (found[part.name] for part in PARTS[chosen.mode])
            served = self._served[key] = ServedModel(
                meta=told.meta,
                bundle=told.bundle,
                place=told.place,
                warnings=(*told.warnings, *chosen.notes, *(text for one in members for text in one.warnings)),
                forecaster=chosen.forecaster,
                made_from=made_from,
            )
        return served

    def current(self, symbol: str, kind: str = GBM.name) -> ServedModel | None:
        """Return what answers while the links name what it rests on, else None; never waits, loads nothing.

        The links are read at most once in `LOOK_EVERY_S`.
        """
        key, now = _id(symbol, kind), time.monotonic()
        served = self._served.get(key)
        if served is not None and now - self._looked.get(key, -LOOK_EVERY_S) >= LOOK_EVERY_S:
            if served.made_from != tuple(self._places(symbol, kind)):
                return None
            self._looked[key] = now
        return served

    def archive(self, model_id: str) -> tuple[str, bytes]:
        """Return the name and the content of a zip of the version that serves: what its manifest lists."""
        symbol, form = self.parse(model_id)
        linked = linked_version(self._models_dir, symbol, form.kind)
        version, _ = serve_linked(linked, lambda folder: read_version(folder, form.kind, form.manifest))
        contents = {**version.contents, MANIFEST: sealed(version.manifest)}
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in sorted(contents.items()):
                archive.writestr(zipfile.ZipInfo(name, ZIP_TIME), content, zipfile.ZIP_DEFLATED)
        of_kind = "" if form.kind == GBM else f"_{form.kind.name}"
        return f"{symbol}{of_kind}_artifacts.zip", buffer.getvalue()

    def versions(self, model_id: str) -> tuple[ModelVersion, ...]:
        """Return the kept versions of a model, the newest first; which serves, and which came after that."""
        symbol, form = self.parse(model_id)
        serving = linked_version(self._models_dir, symbol, form.kind).folder.name
        folders = reversed(list_versions(self._models_dir, symbol, form.kind))
        return tuple(_version_of(folder, form, serving) for folder in folders)

    def roll_back(self, model_id: str, to: str | None = None) -> ModelMeta:
        """Let an earlier version serve again, or the one that is named; see `utils.model_paths.roll_back`."""
        symbol, form = self.parse(model_id)
        # Before the lock makes a folder for a symbol that has no model.
        linked_version(self._models_dir, symbol, form.kind)
        try:
            roll_back(self._models_dir, symbol, form.kind, form.load_folder, to)
        except errors.StorageError:
            # Whoever deletes takes the folder of the lock away too.
            linked_version(self._models_dir, symbol, form.kind)
            raise
        return self._meta(symbol, form)

    def delete(self, model_id: str) -> None:
        """Move a model to the trash; answers under way are finished. See `utils.model_paths.discard`."""
        symbol, form = self.parse(model_id)
        discard(self._models_dir, symbol, form.kind)
        self._forget(symbol, form.kind.name)

    def restore(self, model_id: str) -> ModelMeta:
        """Undo the last deletion of a model; raises as `utils.model_paths.restore`."""
        symbol, form = self.parse(model_id)
        restore(self._models_dir, symbol, form.kind)
        return self._meta(symbol, form)

    def parse(self, model_id: str) -> tuple[str, AnyFormat]:
        """Return the normalised symbol and the format that an id names, whether or not there is a model."""
        symbol, _, kind = model_id.rpartition("-")
        if kind not in self._formats or not symbol or normalise_symbol(symbol) != symbol:
            raise _no_model(model_id)
        return symbol, self._formats[kind]

    def _place(self, symbol: str, kind: str) -> tuple[Linked, Place]:
        linked = linked_version(self._models_dir, symbol, self._formats[kind].kind)
        try:
            return linked, Place(linked.folder, (linked.folder / MANIFEST).stat().st_mtime_ns)
        except OSError:
            return linked, Place(linked.folder, 0)

    def _places(self, symbol: str, kind: str) -> Iterator[Place | None]:
        for part in PARTS[MODE_OF[kind]]:
            try:
                yield self._place(symbol, part.name)[1]
            except ModelError:
                yield None

    def _forget(self, symbol: str, kind: str) -> None:
        self._loaded.pop(_id(symbol, kind), None)
        for other in self._formats:
            self._served.pop(_id(symbol, other), None)

    def _part(self, symbol: str, form: AnyFormat) -> LoadedModel:
        key = _id(symbol, form.kind.name)
        try:
            linked, place = self._place(symbol, form.kind.name)
        except ModelMissingError:
            self._forget(symbol, form.kind.name)
            raise
        loaded, lock = self._loaded.get(key), self._locks.setdefault(key, threading.Lock())
        if loaded is not None and loaded.place == place:
            return loaded
        if not lock.acquire(blocking=loaded is None) and loaded is not None:
            return loaded
        try:
            loaded = self._loaded.get(key)
            if loaded is None or loaded.place != place:
                loaded = self._loaded[key] = self._load(key, form, linked, place, loaded)
            return loaded
        finally:
            lock.release()

    def _load(
        self, key: str, form: AnyFormat, linked: Linked, place: Place, before: LoadedModel | None
    ) -> LoadedModel:
        try:
            self._refuse_again(key, place)
            return _loaded(self._bundle(key, form, linked), place)
        except ModelError as error:
            # A running process keeps its libraries: trying again would fail again, at the price of a load.
            if isinstance(error, ModelIncompatibleError):
                self._refused[key] = (place, error)
            if before is None or isinstance(error, VersionPrunedError):
                raise
            message = f"{error}; version {before.bundle.model_version} serves on"
            logger.warning(message)
            # Remembering the place keeps every request from trying it again; the next version has its own.
            return _loaded(before.bundle, place, message)

    def _bundle(self, key: str, form: AnyFormat, linked: Linked) -> Any:  # noqa: ANN401
        try:
            return form.load_linked(linked)
        except OSError as error:
            raise errors.ModelCorruptError(f"the model {key} cannot be read ({error.strerror})") from error

    def _refuse_again(self, key: str, place: Place) -> None:
        refused = self._refused.get(key)
        if refused is not None and refused[0] == place:
            raise refused[1]

    def _meta(self, symbol: str, form: AnyFormat) -> ModelMeta:
        key, (linked, place) = _id(symbol, form.kind.name), self._place(symbol, form.kind.name)
        loaded, known = self._loaded.get(key), self._metas.get(key)
        if loaded is not None and loaded.place == place:
            return loaded.meta
        self._refuse_again(key, place)
        if known is None or known[0] != place:
            found = form.describe(linked)
            meta = model_meta(found.metadata, ensemble_size=len(found.models), warnings=found.warnings)
            known = self._metas[key] = (place, meta)
        return known[1]


def _loaded(bundle: Any, place: Place, *amiss: str) -> LoadedModel:  # noqa: ANN401
    warnings = (*bundle.warnings, *amiss)
    meta = model_meta(bundle.metadata, ensemble_size=len(bundle.models), warnings=warnings)
    return LoadedModel(meta=meta, bundle=bundle, place=place, warnings=warnings)


def _version_of(folder: Path, form: AnyFormat, serving: str) -> ModelVersion:
    try:
        told = form.describe(Linked(folder=folder))
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
    parser.add_argument("--kind", choices=[form.kind.name for form in FORMATS], default=GBM.name)
    parser.add_argument("--to", metavar="VERSION", help="rollback: a version that `versions` lists")
    parser.add_argument("--models-dir", type=Path, help="default: AI_STOCKS_MODELS_DIR, or saved_models")
    return parser


def run(args: argparse.Namespace, models_dir: Path) -> Sequence[Mapping[str, Any]]:
    """Do what the command line asks, raising as the registry does; return one mapping a line."""
    registry = ModelRegistry(models_dir)
    if args.command == "list":
        return [meta.model_dump(include=LISTED) for meta in registry.list()]
    if args.symbol is None:
        raise errors.UsageError(f"{args.command} needs a SYMBOL")
    if args.to is not None and args.command != "rollback":
        raise errors.UsageError(f"--to belongs to rollback: leave it out of {args.command}")
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
