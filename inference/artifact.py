"""The saved folder of any kind of model: versioned, written atomically, vouched for by a sealed manifest.

Nothing in here knows what the files mean. A version is written aside, flushed to disk and verified, and only
then does the symbol's link move, in one atomic step; a lock that dies with its process lets one save of a
symbol run at a time, so whatever lies aside when a save begins was left by a process that was killed.

Reading gives the bytes that were hashed, so no file can change between its check and its use. The manifest
begins with the sha256 of the rest of itself: a flipped byte anywhere in a version is noticed. This guards
against accidents, not against somebody who may write into the folder.
"""

import argparse
import hashlib
import io
import json
import logging
import lzma
import os
import pickle
import re
import shutil
import stat
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import pandas as pd
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from data.feature_engineer import feature_set_hash, get_feature_columns
from utils.errors import (
    AIStocksError,
    ModelCorruptError,
    ModelExistsError,
    ModelIncompatibleError,
)
from utils.model_paths import (
    ASIDE,
    ArtifactKind,
    Linked,
    artifact_link,
    flush,
    point,
    saving,
    serve_linked,
    storage_errors,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VERIFY_WAIT_S = 300.0
VERIFIED = "loads, and forecasts as it did when it was saved"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
COLUMNS, METADATA = "feature_columns.json", "training_metadata.json"
HYPERPARAMETERS, RECORD = "hyperparameters.json", "oos_predictions.parquet"
_NUMBERS = "predicted_log baseline_log raw_scaled realised_log sigma_log skill_lower"
RECORD_COLUMNS = ("date", *_NUMBERS.split(), "fold", "trained_through")
# Golden inputs that a bundle keeps; what a model says to them may differ by so much, in volatilities.
GOLDEN_ROWS, GOLDEN_TOLERANCE = 8, 1e-5
SEAL = re.compile(rb'\{"seal": "([0-9a-f]{64})",')
# What reading bytes of any kind may raise; an unpickler raises nearly everything.
DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.PickleError,
    struct.error,
    zlib.error,
)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
T = TypeVar("T")


class Manifest(BaseModel):
    """What a version promises about itself; untrusted until validated.

    Attributes
    ----------
    schema_version
        Equals `SCHEMA` of the class that reads it.
    kind, symbol, model_version
        Whose version it is, so that a folder that was copied elsewhere is noticed.
    files
        sha256 of every other file by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    SCHEMA: ClassVar[int] = 0

    schema_version: int
    kind: str
    symbol: str
    model_version: str
    files: dict[str, Sha256]

    @field_validator("files")
    @classmethod
    def _names_are_plain(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not PLAIN_NAME.fullmatch(name) or name == MANIFEST:
                raise ValueError(f"{name[:60]!a} is not a plain file of the bundle")
        return files


ManifestT = TypeVar("ManifestT", bound=Manifest)


class ColumnNames(BaseModel):
    """Content of ``feature_columns.json``."""

    columns: tuple[str, ...] = Field(min_length=1)
    selected: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _are_names_of_columns(self) -> "ColumnNames":
        if len(set(self.columns)) < len(self.columns) or len(set(self.selected)) < len(self.selected):
            raise ValueError("a column is listed twice")
        if unknown := [name for name in self.selected if name not in self.columns]:
            raise ValueError(f"selected but unknown: {', '.join(map(ascii, unknown))}")
        return self


class PromisedVerdict(BaseModel):
    """The part of the verdict that serving rests on."""

    label: str


class PromisedMetadata(BaseModel):
    """The part of the metadata that serving rests on."""

    model_config = ConfigDict(protected_namespaces=())

    symbol: str
    horizon_bars: int = Field(ge=1)
    model_version: str
    data_hash: str
    feature_set_hash: str
    verdict: PromisedVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Generic[ManifestT]):
    """One version whose every file is the one that was saved.

    Attributes
    ----------
    folder
        Where it lies.
    manifest
        Its validated manifest.
    contents
        The bytes of every file that the manifest lists, by name.
    """

    folder: Path
    manifest: ManifestT
    contents: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a version says about itself, every file checked and nothing unpickled.

    Attributes
    ----------
    metadata
        Content of ``training_metadata.json``.
    models
        Names of its boosters.
    warnings
        Why it serves in the place of another version.
    """

    metadata: Mapping[str, Any]
    models: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def sha256_of(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Return the sha256 of each content, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


def sealed(manifest: Manifest) -> bytes:
    """Return a manifest as JSON whose first field is the sha256 of the rest."""
    body = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode()
    return b'{"seal": "%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:]


def corrupt(folder: Path, what: str) -> ModelCorruptError:
    """Return the error that says what is damaged in which version, and what to do."""
    return ModelCorruptError(f"bundle {folder.name}: {what}: train again with --overwrite")


@contextmanager
def unusable(folder: Path, what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn whatever reading damaged content raises into one `ModelCorruptError` that names ``what``."""
    try:
        yield
    except (*DAMAGE, *also) as error:
        raise corrupt(folder, f"{what} cannot be used ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """Say what failed without the paths that messages of libraries may hold."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg'][:200]}".lstrip(": ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def read_manifest(folder: Path, manifest_type: type[ManifestT]) -> ManifestT:
    """Read a manifest, check its seal, and validate it.

    Raises
    ------
    ModelCorruptError
        If it is absent, changed since it was sealed, or promises nonsense.
    ModelIncompatibleError
        If another release of this program wrote it.
    """
    raw = _read_plain(folder, MANIFEST)
    seal = SEAL.match(raw)
    body = b"{" + raw[seal.end() :] if seal else raw
    if seal and hashlib.sha256(body).hexdigest().encode() != seal[1]:
        raise corrupt(folder, "its manifest is not the one that was saved")
    with unusable(folder, "its manifest"):
        schema = dict(json.loads(body)).get("schema_version")
    if isinstance(schema, int) and schema != manifest_type.SCHEMA:
        raise ModelIncompatibleError(
            f"bundle {folder.name} has schema {schema}, this program reads {manifest_type.SCHEMA}: "
            "train again with --overwrite"
        )
    if not seal:
        raise corrupt(folder, "its manifest has no seal")
    with unusable(folder, "its manifest"):
        return manifest_type.model_validate_json(body)


def read_version(folder: Path, kind: ArtifactKind, manifest_type: type[ManifestT]) -> Version[ManifestT]:
    """Read every file that the manifest lists, and nothing else.

    Raises
    ------
    ModelCorruptError, ModelIncompatibleError
        See `read_manifest`; also if a file is not the one that was saved, or the version is another symbol's.
    """
    manifest = read_manifest(folder, manifest_type)
    at_home = folder.parent.name == kind.versions
    if manifest.kind != kind.name or (at_home and folder.parents[1].name != manifest.symbol):
        raise corrupt(folder, f"it is a {manifest.kind[:20]!a} model of {manifest.symbol[:20]!a}")
    contents = {}
    for name, expected in manifest.files.items():
        content = _read_plain(folder, name)
        if hashlib.sha256(content).hexdigest() != expected:
            raise corrupt(folder, f"{name} is not the file that was saved")
        contents[name] = content
    return Version(folder=folder, manifest=manifest, contents=contents)


def document(version: Version[Any], name: str) -> dict[str, Any]:
    """Return the content of a JSON file."""
    with unusable(version.folder, name):
        return dict(json.loads(version.contents[name]))


@cache
def expected_features() -> tuple[tuple[str, ...], str]:
    """Return the columns and the hash of the feature set that is computed here; constant in a process.

    Optional families are arguments to add here, to be read from the metadata by the caller.
    """
    return tuple(get_feature_columns()), feature_set_hash()


def promised_metadata(version: Version[Any]) -> tuple[dict[str, Any], PromisedMetadata]:
    """Return the metadata, once they agree with the manifest, and what serving rests on of them."""
    folder, manifest = version.folder, version.manifest
    with unusable(folder, METADATA):
        metadata = document(version, METADATA)
        promised = PromisedMetadata.model_validate(metadata)
    named = (promised.symbol, promised.model_version, promised.data_hash)
    if named != (manifest.symbol, manifest.model_version, manifest.data_hash):
        raise corrupt(folder, f"{METADATA} speaks of another version than the manifest")
    return metadata, promised


def checked_metadata(version: Version[Any]) -> dict[str, Any]:
    """Return the metadata, once they agree with the manifest and with the features computed here."""
    folder = version.folder
    metadata, promised = promised_metadata(version)
    with unusable(folder, COLUMNS):
        columns = ColumnNames.model_validate_json(version.contents[COLUMNS]).columns
    known, expected_hash = expected_features()
    if missing := [name for name in columns if name not in known]:
        raise ModelIncompatibleError(
            f"the model of {promised.symbol} needs features that are not computed any more, "
            f"{', '.join(missing)}: train again with --overwrite"
        )
    if promised.feature_set_hash != expected_hash:
        raise ModelIncompatibleError(
            f"the features of {promised.symbol} are computed differently since bundle {folder.name} was "
            "trained: train again with --overwrite"
        )
    return metadata


def describe(
    linked: Linked,
    kind: ArtifactKind,
    manifest: type[ManifestT],
    tell: Callable[[Version[ManifestT]], Description],
) -> Description:
    """Describe the version that would be loaded for a link: its files are checked, none is unpickled."""
    description, warnings = serve_linked(linked, lambda folder: tell(read_version(folder, kind, manifest)))
    return replace(description, warnings=warnings)


def read_record(version: Version[Any], models: Iterable[str]) -> pd.DataFrame:
    """Return the out-of-sample record: one row per session, with a column for each of ``models``."""
    with unusable(version.folder, RECORD):
        record = pd.read_parquet(io.BytesIO(version.contents[RECORD]))
        needed = {*RECORD_COLUMNS, *(f"model_{name}" for name in models)}
        if absent := sorted(needed - set(record.columns)):
            raise corrupt(version.folder, f"{RECORD} lacks {', '.join(absent)}")
        if record["date"].dtype.kind != "M" or not record["date"].is_unique:
            raise corrupt(version.folder, f"{RECORD} does not hold one row per session")
    return record


def record_bytes(record: pd.DataFrame) -> bytes:
    """Return a record as the content of its file; with checksums, or a flipped byte loads as a number."""
    record.to_parquet(buffer := io.BytesIO(), write_page_checksum=True)
    return buffer.getvalue()


def new_version_id(created_at: datetime) -> str:
    """Return an identifier that sorts by time and never collides."""
    return f"{created_at:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of what a bundle depends on."""
    return {name: package_metadata.version(name) for name in names}


def refuse_skew(error: float, model_version: str, then: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuse a model whose golden outputs are off by more than `GOLDEN_TOLERANCE`; say what changed."""
    if error <= GOLDEN_TOLERANCE:
        return
    here = library_versions(names)
    changed = [f"{name} {then[name]} -> {here[name]}" for name in here if here[name] != then.get(name)]
    raise ModelIncompatibleError(
        f"bundle {model_version} forecasts differently here (by {error:.2g}; changed: "
        f"{', '.join(changed) or 'no library'}): train again with --overwrite"
    )


def _read_plain(folder: Path, name: str) -> bytes:
    """Read a file that is no link, no pipe and no folder, so that reading neither escapes nor waits."""
    with unusable(folder, name):
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise corrupt(folder, f"{name} is not a plain file of the bundle")
        with os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()


def publish(
    models_dir: Path,
    kind: ArtifactKind,
    *,
    manifest: Manifest,
    contents: Mapping[str, bytes],
    verify: Callable[[Path], None],
) -> Path:
    """Write a version aside, verify it, and let it serve.

    Parameters
    ----------
    models_dir
        Root of the saved models.
    kind
        What it is.
    manifest
        Lists exactly the files of ``contents``.
    contents
        Bytes of every file by name.
    verify
        Raises unless the version in the given folder can be used.

    Returns
    -------
    Path
        Folder of the new version.

    Raises
    ------
    StorageError
        If the disk is full or not writable; what served before still serves.
    LockedError
        If another process saves the same symbol and does not come to an end.
    """
    link = artifact_link(models_dir, manifest.symbol, kind)
    final = link.parent / kind.versions / manifest.model_version
    aside = final.with_name(f"{ASIDE}{final.name}")
    with storage_errors(manifest.symbol), saving(models_dir, manifest.symbol, kind):
        if final.exists():
            raise ModelExistsError(f"version {final.name} of {manifest.symbol} is saved already")
        try:
            _write(aside, {**contents, MANIFEST: sealed(manifest)})
            verify(aside)
            aside.rename(final)
            flush(final.parent)
            point(link, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if not (link.is_symlink() and link.readlink().name == final.name):
                shutil.rmtree(final, ignore_errors=True)
            raise
    return final


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    flush(folder)


def verify_in_fresh_process(folder: Path, module: str) -> None:
    """Let ``python -m <module>`` load ``folder``, with nothing of this process."""
    command = [sys.executable, "-m", module, str(folder.resolve())]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(  # noqa: S603
            command, cwd=root, capture_output=True, text=True, check=False, timeout=VERIFY_WAIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ModelCorruptError("the new bundle does not load in a fresh process: it hangs") from error
    # Libraries may abort while they are torn down, after all was found well: what counts was said before.
    if VERIFIED not in done.stdout:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelCorruptError(f"the new bundle does not load in a fresh process: {last_line}")


def command_line(argv: list[str] | None, module: str, load: Callable[[Path], object]) -> int:
    """Load the version in a folder; return 0, or the exit code of what is wrong with it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Verify a saved version.")
    parser.add_argument("folder", type=Path)
    try:
        load(parser.parse_args(argv).folder)
    except AIStocksError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{VERIFIED}\n")
    sys.stdout.flush()
    return 0
