"""Where a symbol's artifacts lie, the promise that they lie nowhere else, and who may change them.

``<root>/<SYMBOL>/<kind>`` is a link to ``<root>/<SYMBOL>/<versions>/<version>``. Whoever reads resolves the
link once and passes the folder on, so that all files of an answer come from one version. Whoever changes
anything holds a lock that dies with its process.
"""

import errno
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from filelock import FileLock, Timeout

from utils.base import (
    InvalidSymbolError,
    LockedError,
    ModelCorruptError,
    ModelError,
    ModelExistsError,
    ModelMissingError,
    StorageError,
    UsageError,
)

logger = logging.getLogger(__name__)

# A link is read so often before a reader gives up on a writer that prunes faster than it reads.
READS = 5
KEEP_VERSIONS = 5
# Verifying a version takes seconds; whoever waits longer waits for something that hangs.
LOCK_WAIT_S = 300.0
ASIDE, GONE, UNLINKED = ".aside-", ".gone-", ".unlinked"
TRAINING_LOCK, TRAINER = ".training.lock", ".training.pid"
# No symbol begins with a dot. Of what was deleted the latest is kept, for whoever wants it back.
TRASH, KEEP_TRASHED = ".trash", 20
# Every verdict on prices, whoever serves: see `validation.wfe_metrics.Run`.
TRIALS = "trials.jsonl"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactKind:
    """One sort of artifact that a symbol may have: the link ``name`` beside the folder of ``versions``."""

    name: str
    versions: str
    trainer: str

    def train(self, symbol: str, *, anew: bool = False, options: str = "") -> str:
        """Return the command that makes an artifact of ``symbol``, for messages."""
        return f"`python -m {self.trainer} {symbol}{' --overwrite' if anew else ''}{options}`"

    def manage(self, command: str, symbol: str, options: str = "") -> str:
        """Return the command that shows or changes what is saved of ``symbol``, for messages."""
        of_kind = "" if self.name == "gbm" else f" --kind {self.name}"
        return f"`python -m service.model_registry {command} {symbol}{of_kind}{options}`"


GBM = ArtifactKind(name="gbm", versions="versions", trainer="training.train_gbm")
LSTM = ArtifactKind(name="lstm", versions="lstm_versions", trainer="training.train_lstm")
ENSEMBLE = ArtifactKind(name="ensemble", versions="ensemble_versions", trainer="training.train_ensemble")
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
_MEANT: Mapping[str, Mode] = {mode: mode for mode in PARTS} | dict.fromkeys(OLDER_MODES, "ensemble")


def mode_of(name: str) -> Mode:
    """Return the mode that a name stands for; `UsageError` where it stands for none."""
    if name not in _MEANT:
        raise UsageError(f"unknown mode {name[:40]!r}: write {', '.join(MODES)}")
    return _MEANT[name]


class VersionPrunedError(ModelCorruptError):
    """The version that was named is not kept any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """The version that a link names, or the newest kept one; ``damage`` says why the link leads to none."""

    folder: Path
    damage: str | None = None


def symbol_dir(root: Path, symbol: str) -> Path:
    """Return the folder of one normalised symbol; `InvalidSymbolError` if it would lie outside ``root``."""
    refusal = f"symbol {symbol[:40]!r} does not name a folder under the model root, or it is a link"
    try:
        base = root.resolve()
        path = (base / symbol).resolve()
    except PermissionError as error:
        raise _unreadable("the folder of saved models", error) from error
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links, a NUL.
        raise InvalidSymbolError(refusal) from error
    if path != base / symbol or path.parent != base:
        raise InvalidSymbolError(refusal)
    return path


def artifact_link(root: Path, symbol: str, kind: ArtifactKind) -> Path:
    """Return ``<root>/<SYMBOL>/<kind>``: a link to the version that serves, swapped atomically."""
    return symbol_dir(root, symbol) / kind.name


def versions_dir(root: Path, symbol: str, kind: ArtifactKind = GBM) -> Path:
    """Return the folder that keeps the symbol's versions of one kind."""
    return symbol_dir(root, symbol) / kind.versions


def linked_version(models_dir: Path, symbol: str, kind: ArtifactKind = GBM) -> Linked:
    """Return the version that the symbol's link names, or what is wrong with the link.

    `ModelMissingError` if there is no link, or nothing that could serve in its place; `ModelCorruptError` if
    the link leads out of the symbol's folder.
    """
    link = artifact_link(models_dir, symbol, kind)
    try:
        folder = _target(link, link.parent / kind.versions)
        if stat.S_ISDIR(folder.lstat().st_mode):
            return Linked(folder=folder)
        damage = f"the {kind.name} link of {symbol} names {folder.name}, which is not a folder"
    except FileNotFoundError as error:
        if not link.is_symlink():
            raise ModelMissingError(f"no model for {symbol}: run {kind.train(symbol)}") from error
        folder = Path(link.parent, kind.versions, link.readlink().name)
        damage = f"the {kind.name} link of {symbol} names version {folder.name}, which is not there"
    except (OSError, RuntimeError):
        folder, damage = link, f"the {kind.name} link of {symbol} cannot be read"
    kept = list_versions(models_dir, symbol, kind)
    if not kept:
        raise ModelMissingError(f"{damage}, and no version is kept: run {kind.train(symbol)}")
    return Linked(folder=kept[-1] if folder == link else folder, damage=damage)


def _target(link: Path, versions: Path) -> Path:
    """Return the version that ``link`` names; it need not exist, but not elsewhere: `ModelCorruptError`."""
    target = link.parent / link.readlink()
    if target.parent != versions and not versions.is_symlink():
        target = link.resolve(strict=True)
    if versions.is_symlink() or target.parent != versions or target.name.startswith("."):
        words = f"the {link.name} model of {link.parent.name} lies outside its folder: train again"
        raise ModelCorruptError(words)
    return target


def current_version(models_dir: Path, symbol: str, kind: ArtifactKind = GBM) -> Path:
    """Return the folder that the symbol's link points to; `ModelCorruptError` if it leads to no version."""
    linked = linked_version(models_dir, symbol, kind)
    if linked.damage is not None:
        raise ModelCorruptError(f"{linked.damage}: run {kind.train(symbol, anew=True)}")
    return linked.folder


def list_versions(models_dir: Path, symbol: str, kind: ArtifactKind = GBM) -> list[Path]:
    """Return the kept versions of a symbol, oldest first."""
    return kept_versions(versions_dir(models_dir, symbol, kind))


def kept_versions(versions: Path) -> list[Path]:
    """Return the versions inside one folder of versions, oldest first; links are none."""
    names: list[str] = []
    with _readable(f"the versions of {versions.parent.name}"), os.scandir(versions) as entries:
        names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    return [versions / name for name in sorted(names)]


def list_symbols(models_dir: Path, kind: ArtifactKind = GBM) -> list[str]:
    """Return the symbols that have an artifact of this kind, whole or damaged, sorted."""
    names: list[str] = []
    with _readable("the folder of saved models"):
        names = [path.name for path in models_dir.iterdir() if os.path.lexists(path / kind.name)]
    return sorted(names)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Pass over a folder that is not there; turn any other refusal of the disk into a `ModelCorruptError`."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            yield
    except OSError as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: OSError) -> ModelCorruptError:
    return ModelCorruptError(f"{what} cannot be read ({error.strerror}): check the permissions")


def what_is_at(link: Path) -> Path | None:
    """Return what a link names, or what is no link; None without either, `ModelCorruptError` unreadable."""
    found = list[Path]()
    with _readable(f"the folder of {link.parent.name}"):
        found.append(link.readlink() if stat.S_ISLNK(link.lstat().st_mode) else link)
    return found[0] if found else None


def reading_again(read: Callable[[], T]) -> T:
    """Read a link and what it names, and again where a busy writer pruned the version under our hands."""
    for _ in range(READS - 1):
        with suppress(VersionPrunedError):
            return read()
    return read()


def serve(
    models_dir: Path, symbol: str, kind: ArtifactKind, load: Callable[[Path], T]
) -> tuple[T, tuple[str, ...]]:
    """Read the link and load what it names, see `serve_linked`."""
    return reading_again(lambda: serve_linked(linked_version(models_dir, symbol, kind), load))


def serve_linked(linked: Linked, load: Callable[[Path], T]) -> tuple[T, tuple[str, ...]]:
    """Load the version that a link names; an earlier one, with a warning, where it is damaged.

    A version later than the named one never serves: it may be what a rollback turned away from.

    `VersionPrunedError` if the named version was pruned after the link was read, `ModelCorruptError` if it is
    damaged and no earlier one can be used, `ModelIncompatibleError` if it is whole and does not fit here.
    """
    try:
        if linked.damage is None:
            return load(linked.folder), ()
        problem = ModelCorruptError(linked.damage)
    except ModelCorruptError as error:
        if not linked.folder.is_dir():
            raise VersionPrunedError(f"version {linked.folder.name} is gone: ask again") from error
        problem = error
    for version, content in _that_load(linked, load):
        message = f"{problem}; the earlier version {version.name} serves instead"
        logger.warning(message)
        return content, (message,)
    raise problem


def _that_load(linked: Linked, load: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Yield the kept versions that may serve instead, and what is loaded of them, newest first."""
    for version in reversed(kept_versions(linked.folder.parent)):
        # Behind a link that cannot be read, the newest version is the best guess.
        if version.name < linked.folder.name or (linked.damage and version == linked.folder):
            try:
                content = load(version)
            except ModelError as error:
                logger.warning("version %s cannot serve either: %s", version.name, error)
            else:
                yield version, content


@contextmanager
def storage_errors(symbol: str, cannot: str = "write the model") -> Iterator[None]:
    """Turn what a disk refuses into a `StorageError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        reason = "the disk is full" if full else error.strerror or type(error).__name__
        words = f"cannot {cannot} of {symbol}: {reason}; what served before still serves: "
        raise StorageError(words + "make room or mend the permissions, and try again") from error


@contextmanager
def holding(path: Path, wait_s: float, refusal: Callable[[], str]) -> Iterator[None]:
    """Hold a lock, whose folder is made; `LockedError` if others hold it for longer than ``wait_s``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(refusal()) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def saving(models_dir: Path, symbol: str, kind: ArtifactKind) -> Iterator[None]:
    """Hold the right to change a symbol's versions; tidy up before and after."""
    versions = versions_dir(models_dir, symbol, kind)
    refusal = f"another process saves the {kind.name} model of {symbol}: wait or stop it"
    with holding(versions / ".lock", LOCK_WAIT_S, lambda: refusal):
        for folder in (versions.parent, versions.parent.parent):
            flush(folder)
        # Nobody but the holder of the lock writes here, so these belong to processes that were killed.
        for left in [*versions.glob(f"{ASIDE}*"), *versions.glob(f"{GONE}*")]:
            shutil.rmtree(left, ignore_errors=True)
        for left in versions.parent.glob(f".{kind.name}-*"):
            left.unlink(missing_ok=True)
        with suppress(OSError, ModelError):
            # It served, whoever was killed before the mark was gone: somebody may be reading it.
            (linked_version(models_dir, symbol, kind).folder / UNLINKED).unlink(missing_ok=True)
        yield
        with suppress(OSError, ModelError):
            serving = linked_version(models_dir, symbol, kind).folder
            kept = sorted(kept_versions(versions), key=lambda path: (not (path / UNLINKED).exists(), path))
            for path in kept[:-KEEP_VERSIONS]:
                if path.name != serving.name:
                    # Renamed first: none is ever half there.
                    shutil.rmtree(path.rename(path.with_name(f"{GONE}{path.name}")), ignore_errors=True)


def promote(aside: Path, version: Path, link: Path) -> None:
    """Give a version that was written aside its name, and let ``link`` name it.

    Until it does, a mark is in it: a version whose writer is killed in between is the first to be pruned.
    """
    (aside / UNLINKED).touch()
    aside.rename(version)
    flush(version.parent)
    point(link, version)
    with suppress(OSError):
        (version / UNLINKED).unlink()


@contextmanager
def training_lock(models_dir: Path, symbol: str) -> Iterator[None]:
    """Hold the symbol's training lock, which dies with the process; else `LockedError` names who holds it."""
    folder = symbol_dir(models_dir, symbol)
    holder = folder / TRAINER

    def refusal() -> str:
        return f"{symbol} is being trained by process {_read_holder(holder)}: wait or stop it"

    with ExitStack() as stack:
        with storage_errors(symbol, "lock the models"):
            stack.enter_context(holding(folder / TRAINING_LOCK, 0.0, refusal))
            holder.write_text(str(os.getpid()))
            stack.callback(holder.unlink, missing_ok=True)
        yield


def training_holder(models_dir: Path, symbol: str) -> str | None:
    """Return the id of the process that trains ``symbol``; None where nobody does."""
    folder = symbol_dir(models_dir, symbol)
    # Trying the lock would get in the way of who is about to take it: not tried unless somebody left a name.
    if what_is_at(folder / TRAINER) is None:
        return None
    lock = FileLock(folder / TRAINING_LOCK, timeout=0)
    with storage_errors(symbol, "lock the models"), suppress(Timeout), lock:
        return None
    return _read_holder(folder / TRAINER)


def _read_holder(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")[:20] or "unknown"
    return "unknown"


def flush(folder: Path) -> None:
    """Wait until the names inside ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path, name: str) -> Iterator[Path]:
    """Yield a path aside; what is made there takes the place of ``path``, or is taken away after an error."""
    aside = path.with_name(f".{name}-{uuid.uuid4().hex}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside and put it in its place: whoever reads finds the old one or the new one whole."""
    with _replacing(path, "writing") as aside, aside.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def point(link: Path, version: Path) -> None:
    """Let ``link`` name ``version``, or what it named before where the disk refuses."""
    before = link.readlink() if link.is_symlink() else None
    _swap(link, Path(version.parent.name, version.name))
    try:
        flush(link.parent)
    except OSError:
        with suppress(OSError):
            link.unlink() if before is None else _swap(link, before)
        raise


def _swap(link: Path, target: Path) -> None:
    with _replacing(link, link.name) as fresh:
        fresh.symlink_to(target)


def roll_back(
    models_dir: Path, symbol: str, kind: ArtifactKind, load: Callable[[Path], object], to: str | None = None
) -> Path:
    """Let the newest earlier version that loads serve again, or ``to``, which may be a newer one.

    `ModelMissingError` if there is none; what ``load`` raises of the version that was named.
    """
    with storage_errors(symbol), saving(models_dir, symbol, kind):
        linked = linked_version(models_dir, symbol, kind)
        named = ((v, load(v)) for v in list_versions(models_dir, symbol, kind) if v.name == to)
        for version, _ in _that_load(linked, load) if to is None else named:
            point(artifact_link(models_dir, symbol, kind), version)
            return version
    if to is None:
        raise ModelMissingError(f"{symbol} has no version before {linked.folder.name} that loads")
    known = f"{kind.manage('versions', symbol)} lists what there is"
    raise ModelMissingError(f"no version {to[:40]!a} of {symbol} is kept: {known}")


def discard(models_dir: Path, symbol: str, kind: ArtifactKind) -> None:
    """Move a symbol's link and versions to the trash, from where `restore` brings them back.

    The link goes first: from then on nothing serves, whatever happens to the rest. `ModelMissingError` if
    there is nothing to delete, `LockedError` while the symbol is being trained.
    """
    link = artifact_link(models_dir, symbol, kind)
    if what_is_at(link) is None:
        raise ModelMissingError(f"there is no {kind.name} model of {symbol} to delete")
    with storage_errors(symbol), training_lock(models_dir, symbol), saving(models_dir, symbol, kind):
        trash = models_dir.resolve() / TRASH
        entry = trash / f"{symbol}~{kind.name}~{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        entry.mkdir(parents=True)
        for path in (link, versions_dir(models_dir, symbol, kind)):
            path.rename(entry / path.name)
        flush(link.parent)
        kept = sorted(trash.iterdir(), key=lambda path: path.name.rpartition("~")[2])
        for old in kept[:-KEEP_TRASHED]:
            shutil.rmtree(old, ignore_errors=True)


def restore(models_dir: Path, symbol: str, kind: ArtifactKind) -> None:
    """Bring back what `discard` deleted last; the link comes last, so that it never leads to nothing.

    `ModelMissingError` if the trash holds nothing of the symbol, `ModelExistsError` if it has a model again.
    """
    link, versions = artifact_link(models_dir, symbol, kind), versions_dir(models_dir, symbol, kind)
    entries = sorted((models_dir.resolve() / TRASH).glob(f"{symbol}~{kind.name}~*"))
    if not entries:
        remedy = f"run {kind.train(symbol)}"
        if what_is_at(link) is not None:
            remedy = f"another kept version serves by {kind.manage('rollback', symbol, ' --to VERSION')}"
        raise ModelMissingError(f"no deleted {kind.name} model of {symbol} is kept: {remedy}")
    with storage_errors(symbol), training_lock(models_dir, symbol), saving(models_dir, symbol, kind):
        if os.path.lexists(link):
            raise ModelExistsError(f"{symbol} has a {kind.name} model: delete it first")
        for version in kept_versions(entries[-1] / kind.versions):
            version.rename(versions / version.name)
        flush(versions)
        (entries[-1] / kind.name).rename(link)
        flush(link.parent)
        shutil.rmtree(entries[-1], ignore_errors=True)
