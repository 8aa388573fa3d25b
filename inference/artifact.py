"""The saved folder of any kind of model: versioned, written atomically, vouched for by a sealed manifest.

A version is written aside, flushed to disk and verified; then the symbol's link moves, in one atomic step. A
lock that dies with its process lets one save of a symbol run at a time. Reading gives the bytes that were
hashed, so no file can change between its check and its use. The manifest begins with the sha256 of the rest
of itself: a flipped byte anywhere is noticed. It guards against accidents, not against who may write there.
"""

import hashlib
import io
import json
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import pandas as pd
from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.feature_engineer import feature_set_hash, get_feature_columns
from utils import model_paths
from utils.base import ModelCorruptError, ModelExistsError, ModelIncompatibleError
from utils.model_paths import ArtifactKind, Linked

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
_WORDLESS = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError)
_BROKEN = (lzma.LZMAError, pickle.PickleError, struct.error, zlib.error)
DAMAGE: tuple[type[Exception], ...] = (*_WORDLESS, *_BROKEN, OSError, RuntimeError, TypeError, ValueError)

Contents = Mapping[str, bytes]
Verify = Callable[[Path], None]


class Manifest(BaseModel):
    """What a version promises about itself; untrusted until validated.

    Its symbol, kind and version tell whose it is, so that a folder that was copied elsewhere is noticed;
    ``files`` is the sha256 of every other file by name. Golden inputs are rows of features, golden outputs
    what the model said to them, in units of volatility: see `inference.pipeline.check_golden`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    SCHEMA: ClassVar[int] = 0
    FILES: ClassVar[tuple[str, ...]] = ()
    NAMES: ClassVar[tuple[str, ...]] = ()

    schema_version: int
    kind: str
    symbol: str
    model_version: str
    files: dict[str, str]
    libraries: dict[str, str] = Field(default_factory=dict)
    data_hash: str = ""
    golden_inputs: list[list[float]] = Field(default_factory=list)
    golden_outputs: list[float] = Field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that it is made of."""
        return self.NAMES

    def needed(self) -> set[str]:
        """Return the files without which it is not whole."""
        return set(self.FILES)

    @model_validator(mode="after")
    def _lists_plain_files(self) -> "Manifest":
        for name in self.files:
            if not PLAIN_NAME.fullmatch(name) or name == MANIFEST:
                raise ValueError(f"{name[:60]!a} is not a plain file of the bundle")
        if absent := self.needed() - set(self.files):
            raise ValueError(f"{', '.join(sorted(absent))} is not listed")
        return self


ManifestT = TypeVar("ManifestT", bound=Manifest)
DocumentT = TypeVar("DocumentT", bound=BaseModel)


class ColumnNames(BaseModel):
    """Content of ``feature_columns.json``: of the same columns, each path model has its own selection."""

    columns: tuple[str, ...] = Field(min_length=1)
    selected: tuple[str, ...] = Field(min_length=1)
    path_models: dict[int, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _are_names_of_columns(self) -> "ColumnNames":
        for names in (self.columns, self.selected, *self.path_models.values()):
            if len(set(names)) < len(names):
                raise ValueError("a column is listed twice")
            if unknown := [name for name in names if name not in self.columns]:
                raise ValueError(f"selected but unknown: {', '.join(map(ascii, unknown))}")
        return self


class PromisedMetadata(BaseModel):
    """The part of the metadata that serving rests on."""

    symbol: str
    horizon_bars: int = Field(ge=1)
    model_version: str
    data_hash: str
    feature_set_hash: str
    label: str = Field(validation_alias=AliasPath("verdict", "label"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Generic[ManifestT]):
    """One version whose every file is the one that was saved: its manifest, and their bytes by name."""

    folder: Path
    manifest: ManifestT
    contents: Contents


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a version says about itself, all files checked, none unpickled; and why it serves."""

    metadata: Mapping[str, Any]
    models: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a saved model of any kind has.

    It forecasts, and is judged, ``horizon_bars`` ahead; its ``record`` is what it said out of sample, a row a
    session; ``warnings`` tell what was amiss when it was loaded and did not prevent it.
    """

    symbol: str
    horizon_bars: int
    record: pd.DataFrame
    metadata: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def model_version(self) -> str:
        """Identifier of the saved version."""
        return str(self.metadata["model_version"])


SavedT = TypeVar("SavedT", bound=Saved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format(Generic[ManifestT, SavedT]):
    """How models of one kind are saved, described and loaded.

    ``module`` is the kind's owner, whose ``load_folder`` verifies a new version in a fresh process. ``build``
    makes a model of a version whose files and metadata were found well.
    """

    kind: ArtifactKind
    manifest: type[ManifestT]
    module: str
    build: Callable[[Version[ManifestT], Mapping[str, Any]], SavedT]

    def save(
        self, bundle: SavedT, models_dir: Path, contents: Contents, promised: Mapping[str, object]
    ) -> Path:
        """Write a version aside, verify it in a fresh process, and let it serve; see `publish`.

        To ``contents``, the files of its own by name, record and metadata are added; ``promised`` are the
        fields of the manifest beside those that tell whose it is, and what its files are.
        """
        # With checksums, or a flipped byte loads as a number.
        bundle.record.to_parquet(record := io.BytesIO(), write_page_checksum=True)
        contents = {**contents, METADATA: as_json(bundle.metadata), RECORD: record.getvalue()}
        identity = {
            "schema_version": self.manifest.SCHEMA,
            "kind": self.kind.name,
            "symbol": bundle.symbol,
            "model_version": str(bundle.metadata["model_version"]),
            "files": sha256_of(contents),
            "data_hash": str(bundle.metadata["data_hash"]),
        }
        return publish(
            models_dir,
            self.kind,
            manifest=self.manifest.model_validate({**identity, **promised}),
            contents=contents,
            verify=lambda folder: verify_in_fresh_process(folder, self.module),
        )

    def load(self, models_dir: Path, symbol: str) -> SavedT:
        """Load the version that serves; an earlier one, with a warning, where it is damaged.

        `ModelMissingError` if the symbol was never trained, another `ModelError` if no version can be used.
        """
        bundle, warnings = model_paths.serve(models_dir, symbol, self.kind, self.load_folder)
        return replace(bundle, warnings=warnings)

    def load_linked(self, linked: Linked) -> SavedT:
        """Load what a link names, see `load`; the link is not read again."""
        bundle, warnings = model_paths.serve_linked(linked, self.load_folder)
        return replace(bundle, warnings=warnings)

    def load_folder(self, folder: Path) -> SavedT:
        """Check one version's files against its manifest, which vouches for all of them, then load them."""
        version = read_version(folder, self.kind, self.manifest)
        return self.build(version, checked_metadata(version))

    def describe(self, linked: Linked) -> Description:
        """Describe the version that `load_linked` would load: its files are checked, none is unpickled."""

        def tell(folder: Path) -> Description:
            version = read_version(folder, self.kind, self.manifest)
            return Description(metadata=checked_metadata(version), models=version.manifest.names)

        description, warnings = model_paths.serve_linked(linked, tell)
        return replace(description, warnings=warnings)


def sha256_of(contents: Contents) -> dict[str, str]:
    """Return the sha256 of each content, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}


def as_json(content: object) -> bytes:
    """Return plain data as the content of a file."""
    return json.dumps(content, indent=1, allow_nan=False).encode()


def sealed(manifest: Manifest) -> bytes:
    """Return a manifest as JSON whose first field is the sha256 of the rest."""
    body = as_json(manifest.model_dump(mode="json"))
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
    """Read a manifest, check its seal, and validate it; `ModelIncompatibleError` if of another release."""
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
        return manifest_type.model_validate_json(body)


def read_version(folder: Path, kind: ArtifactKind, manifest_type: type[ManifestT]) -> Version[ManifestT]:
    """Read every file that the manifest of this kind lists, and nothing else; `ModelError` if it is amiss."""
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


def document(version: Version[Any], name: str, kind: type[DocumentT]) -> DocumentT:
    """Return the validated content of a JSON file."""
    with unusable(version.folder, name):
        return kind.model_validate_json(version.contents[name])


@cache
def expected_features() -> tuple[tuple[str, ...], str]:
    """Return the columns and the hash of the feature set that is computed here; constant in a process."""
    return tuple(get_feature_columns(include_sentiment=True)), feature_set_hash()


def checked_metadata(version: Version[Any]) -> dict[str, Any]:
    """Return the metadata, once they agree with the manifest, and its columns with the features of here."""
    folder, manifest = version.folder, version.manifest
    promised = document(version, METADATA, PromisedMetadata)
    named = (promised.symbol, promised.model_version, promised.data_hash)
    if named != (manifest.symbol, manifest.model_version, manifest.data_hash):
        raise corrupt(folder, f"{METADATA} speaks of another version than the manifest")
    if COLUMNS in version.contents:
        known, expected_hash = expected_features()
        columns = document(version, COLUMNS, ColumnNames).columns
        refuse_missing(promised.symbol, columns, known)
        if promised.feature_set_hash != expected_hash:
            raise ModelIncompatibleError(
                f"the features of {promised.symbol} are computed differently since bundle {folder.name} was "
                "trained: train again with --overwrite"
            )
    with unusable(folder, METADATA):
        return dict(json.loads(version.contents[METADATA]))


def refuse_missing(symbol: str, columns: Iterable[str], known: Collection[str]) -> None:
    """Refuse a model of features that are not ``known`` any more; they are never filled."""
    if missing := [name for name in columns if name not in known]:
        raise ModelIncompatibleError(
            f"the model of {symbol} needs features that are not computed any more, "
            f"{', '.join(missing)}: train again with --overwrite"
        )


def new_version_id(created_at: datetime) -> str:
    """Return an identifier that sorts by time and never collides."""
    return f"{created_at:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of what a bundle depends on."""
    return {name: package_metadata.version(name) for name in names}


def _read_plain(folder: Path, name: str) -> bytes:
    """Read a file that is no link, no pipe and no folder, so that reading neither escapes nor waits."""
    with unusable(folder, name):
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise corrupt(folder, f"{name} is not a plain file of the bundle")
        with os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()


def publish(
    models_dir: Path, kind: ArtifactKind, *, manifest: Manifest, contents: Contents, verify: Verify
) -> Path:
    """Write a version aside, let ``verify`` raise unless it can be used, then let it serve.

    `StorageError` if the disk is full or not writable: what served before still serves. `LockedError` if
    another process saves the same symbol and does not come to an end.
    """
    link = model_paths.artifact_link(models_dir, manifest.symbol, kind)
    final = link.parent / kind.versions / manifest.model_version
    aside = final.with_name(f"{model_paths.ASIDE}{final.name}")
    with model_paths.storage_errors(manifest.symbol), model_paths.saving(models_dir, manifest.symbol, kind):
        if final.exists():
            raise ModelExistsError(f"version {final.name} of {manifest.symbol} is saved already")
        try:
            _write(aside, {**contents, MANIFEST: sealed(manifest)})
            verify(aside)
            model_paths.promote(aside, final, link)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if not (link.is_symlink() and link.readlink().name == final.name):
                shutil.rmtree(final, ignore_errors=True)
            raise
    return final


def _write(folder: Path, contents: Contents) -> None:
    folder.mkdir()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    model_paths.flush(folder)


def verify_in_fresh_process(folder: Path, module: str) -> None:
    """Let ``module`` load ``folder`` in a new interpreter, with nothing of this process."""
    code = f"import sys, {module} as owner; from pathlib import Path; owner.load_folder(Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{code}; print({VERIFIED!r}, flush=True)", str(folder.resolve())]
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
