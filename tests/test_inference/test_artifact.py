"""The folder keeps its promise whatever the files mean: here they are lines of text of an invented kind."""

import errno
import itertools
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock

from inference import artifact
from inference.artifact import Manifest, publish, read_manifest, read_version
from utils import model_paths
from utils.base import (
    InvalidSymbolError,
    LockedError,
    ModelCorruptError,
    ModelExistsError,
    ModelIncompatibleError,
    ModelMissingError,
    StorageError,
)
from utils.model_paths import (
    KEEP_VERSIONS,
    ArtifactKind,
    current_version,
    linked_version,
    list_symbols,
    list_versions,
    roll_back,
    serve,
)

TEXT = ArtifactKind(name="text", versions="text_versions", trainer="training.train_text")
OTHER = ArtifactKind(name="other", versions="other_versions", trainer="training.train_other")
FILES = ("a.txt", "b.txt", "c.txt")


class TextManifest(Manifest):
    SCHEMA = 3


def contents_of(version: str) -> dict[str, bytes]:
    return {name: f"{name} of {version}\n".encode() * 20 for name in FILES}


def save(
    root: Path, version: str, *, kind: ArtifactKind = TEXT, verify: Callable[[Path], object] | None = None
) -> Path:
    contents = contents_of(version)
    manifest = TextManifest(
        schema_version=3,
        kind=kind.name,
        symbol="AAPL",
        model_version=version,
        files=artifact.sha256_of(contents),
    )
    return publish(root, kind, manifest=manifest, contents=contents, verify=verify or (lambda folder: None))


def load(folder: Path) -> str:
    """Return the version that every file of the folder names."""
    version = read_version(folder, TEXT, TextManifest)
    assert version.contents == contents_of(version.manifest.model_version)
    return version.manifest.model_version


def serving(root: Path) -> tuple[str, tuple[str, ...]]:
    return serve(root, "AAPL", TEXT, load)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for version in ("v1", "v2", "v3"):
        save(tmp_path / "models", version)
    return tmp_path / "models"


def relink(root: Path, target: str | Path) -> None:
    link = root / "AAPL" / TEXT.name
    link.unlink()
    link.symlink_to(target)


def test_what_was_published_serves(root: Path):
    assert serving(root) == ("v3", ())
    assert current_version(root, "AAPL", TEXT).name == "v3"
    assert (root / "AAPL" / "text").readlink() == Path("text_versions/v3")


def test_kinds_live_beside_each_other(root: Path):
    folder = save(root, "w1", kind=OTHER)
    assert read_manifest(folder, TextManifest).kind == "other"
    assert [path.name for path in list_versions(root, "AAPL", OTHER)] == ["w1"]
    assert [path.name for path in list_versions(root, "AAPL", TEXT)] == ["v1", "v2", "v3"]
    with pytest.raises(ModelMissingError, match="no version before"):
        roll_back(root, "AAPL", OTHER, lambda folder: None)
    assert serving(root) == ("v3", ())
    assert list_symbols(root, OTHER) == list_symbols(root, TEXT) == ["AAPL"]
    assert list_symbols(root) == []


def test_a_version_of_another_kind_or_symbol_is_refused(root: Path):
    save(root, "w1", kind=OTHER)
    with pytest.raises(ModelCorruptError, match="it is a 'other' model"):
        read_version(current_version(root, "AAPL", OTHER), TEXT, TextManifest)
    (root / "AAPL").rename(root / "MSFT")
    with pytest.raises(ModelCorruptError, match="model of 'AAPL'"):
        load(current_version(root, "MSFT", TEXT))


def test_no_flipped_byte_goes_unnoticed(root: Path):
    folder = current_version(root, "AAPL", TEXT)
    rng = random.Random(5)  # noqa: S311
    sealed = (folder / "manifest.json").read_bytes()
    flips = [("manifest.json", place) for place in rng.sample(range(len(sealed)), 150)]
    flips += [(name, rng.randrange(200)) for name in FILES for _ in range(20)]
    for name, place in flips:
        path = folder / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(bad))
        with pytest.raises(ModelCorruptError, match="train again"):
            load(folder)
        path.write_bytes(good)
    assert load(folder) == "v3"


def test_a_seal_that_is_not_checked_would_let_a_flip_through(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The planted fault of the test above: without the seal, a changed but valid manifest is believed."""
    path = current_version(root, "AAPL", TEXT) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"v3"', b'"w3"'))
    with pytest.raises(ModelCorruptError, match="not the one that was saved"):
        read_manifest(path.parent, TextManifest)
    body = b"{" + path.read_bytes().split(b",", 1)[1]
    assert TextManifest.model_validate_json(body).model_version == "w3"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b"null",
        b"7",
        b"<html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema_version": "x"}',
        b"1" * 5_000,
    ],
)
def test_a_manifest_of_nonsense_is_corrupt(root: Path, content: bytes):
    folder = current_version(root, "AAPL", TEXT)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelCorruptError, match="manifest"):
        load(folder)
    assert serving(root)[0] == "v2"


@pytest.mark.parametrize("schema", [1, 2, 4])
def test_a_manifest_of_another_release_is_incompatible(root: Path, schema: int):
    folder = current_version(root, "AAPL", TEXT)
    (folder / "manifest.json").write_text(json.dumps({"schema_version": schema, "files": {}}))
    with pytest.raises(ModelIncompatibleError, match=rf"schema {schema}.* reads 3: train again"):
        load(folder)
    with pytest.raises(ModelIncompatibleError):
        serving(root)


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "absent"])
def test_only_plain_files_are_read(root: Path, what: str):
    folder = current_version(root, "AAPL", TEXT)
    path = folder / "b.txt"
    same = path.rename(root / "elsewhere")
    if what == "link":
        path.symlink_to(same)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    with pytest.raises(ModelCorruptError, match=r"v3: b\.txt .*train again") as caught:
        load(folder)
    assert str(root) not in str(caught.value)


def test_a_damaged_version_steps_back_and_says_so(root: Path, caplog: pytest.LogCaptureFixture):
    (root / "AAPL" / TEXT.versions / "v2" / "a.txt").unlink()
    (root / "AAPL" / TEXT.versions / "v3" / "a.txt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        version, (warning,) = serving(root)
    assert version == "v1"
    assert "v3" in warning
    assert "version v1 serves instead" in warning
    assert "v2" in caplog.text


def test_a_link_that_dangles_steps_back_never_forward(root: Path):
    save(root, "v4")
    relink(root, "text_versions/v2")
    for path in (root / "AAPL" / TEXT.versions / "v2").iterdir():
        path.unlink()
    (root / "AAPL" / TEXT.versions / "v2").rmdir()
    version, (warning,) = serving(root)
    assert version == "v1"
    assert "names version v2, which is not there" in warning
    assert "version v1 serves instead" in warning
    with pytest.raises(
        ModelCorruptError, match=r"v2, which is not there: run `python -m training.train_text AAPL"
    ):
        current_version(root, "AAPL", TEXT)


def test_a_rolled_back_and_damaged_version_does_not_let_a_newer_one_serve(root: Path):
    roll_back(root, "AAPL", TEXT, load)
    roll_back(root, "AAPL", TEXT, load)
    (root / "AAPL" / TEXT.versions / "v1" / "a.txt").unlink()
    with pytest.raises(ModelCorruptError, match="v1"):
        serving(root)


@pytest.mark.parametrize("target", ["text", "a_loop", "text_versions/v3/../../text"])
def test_behind_a_link_that_loops_the_newest_version_serves(root: Path, target: str):
    (root / "AAPL" / "a_loop").symlink_to("text")
    relink(root, target)
    version, (warning,) = serving(root)
    assert version == "v3"
    assert "cannot be read" in warning
    assert "v3 serves instead" in warning


def test_a_version_that_is_a_link_is_no_version(root: Path):
    versions = root / "AAPL" / TEXT.versions
    (versions / "v3").rename(root / "elsewhere")
    (versions / "v3").symlink_to(root / "elsewhere")
    assert serving(root)[0] == "v2"
    (versions / "v3").unlink()
    (versions / "v3").symlink_to("v3")
    assert serving(root)[0] == "v2"


def test_a_link_of_links_into_the_versions_serves(root: Path):
    (root / "AAPL" / "stable").symlink_to("text_versions/v2")
    relink(root, "stable")
    assert serving(root) == ("v2", ())


@pytest.mark.parametrize("target", ["..", "/etc", "text_versions", "text_versions/..", "../../elsewhere"])
def test_a_link_that_leads_out_is_refused(root: Path, tmp_path: Path, target: str):
    (tmp_path / "elsewhere").mkdir()
    relink(root, target)
    with pytest.raises(ModelCorruptError, match="outside"):
        serving(root)


def test_a_file_in_the_place_of_the_link_hides_no_version(root: Path):
    link = root / "AAPL" / TEXT.name
    link.unlink()
    link.write_text("not a link")
    assert serving(root)[0] == "v3"
    assert list_symbols(root, TEXT) == ["AAPL"]
    save(root, "v4")
    assert serving(root) == ("v4", ())


def test_without_link_or_versions_the_model_is_missing(root: Path):
    for path in list_versions(root, "AAPL", TEXT):
        path.rename(root / path.name)
    with pytest.raises(ModelMissingError, match=r"no version is kept: run `python -m training\.train_text"):
        serving(root)
    (root / "AAPL" / "text").unlink()
    with pytest.raises(ModelMissingError, match="no model for AAPL"):
        serving(root)
    assert list_symbols(root, TEXT) == []
    assert list_symbols(root / "nowhere", TEXT) == []


@pytest.mark.parametrize("symbol", ["..", "", ".", "a/b", "LOOP", "a\0b"])
def test_no_symbol_leaves_the_root(root: Path, symbol: str):
    (root / "LOOP").symlink_to("LOOP")
    with pytest.raises(InvalidSymbolError, match="does not name a folder"):
        linked_version(root, symbol, TEXT)


def test_what_cannot_be_verified_does_not_serve(root: Path):
    def refuse(folder: Path) -> None:
        assert load(folder) == "v4", "it is whole before it is verified"
        raise ModelCorruptError("does not load")

    with pytest.raises(ModelCorruptError, match="does not load"):
        save(root, "v4", verify=refuse)
    assert serving(root) == ("v3", ())
    assert len(list_versions(root, "AAPL", TEXT)) == 3


def test_a_version_is_never_written_twice(root: Path):
    with pytest.raises(ModelExistsError, match="v2"):
        save(root, "v2")
    assert serving(root) == ("v3", ())
    roll_back(root, "AAPL", TEXT, load)
    assert serving(root) == ("v2", ())


def test_versions_are_bounded_and_the_serving_one_is_kept(root: Path):
    for number in range(4, 10):
        save(root, f"v{number}")
    names = [path.name for path in list_versions(root, "AAPL", TEXT)]
    assert names == [f"v{number}" for number in range(10 - KEEP_VERSIONS, 10)]


def test_rolling_back_skips_what_does_not_load(root: Path):
    (root / "AAPL" / TEXT.versions / "v2" / "a.txt").unlink()
    assert roll_back(root, "AAPL", TEXT, load).name == "v1"
    assert serving(root) == ("v1", ())
    with pytest.raises(ModelMissingError, match="no version before v1 that loads"):
        roll_back(root, "AAPL", TEXT, load)


def test_what_killed_processes_left_is_cleaned_up(root: Path):
    versions = root / "AAPL" / TEXT.versions
    for name in (".aside-v0", ".gone-v0"):
        (versions / name).mkdir()
        (versions / name / "a.txt").write_text("half")
    (root / "AAPL" / ".text-0123").symlink_to("text_versions/v9")
    (root / "AAPL" / ".other-0123").symlink_to("other_versions/v9")
    save(root, "v4")
    assert sorted(path.name for path in versions.iterdir()) == [".lock", "v1", "v2", "v3", "v4"]
    left = sorted(path.name for path in (root / "AAPL").iterdir())
    assert left == [".other-0123", "text", "text_versions"], "another kind's save may be running"


def test_a_save_that_runs_is_not_cleaned_up(root: Path, monkeypatch: pytest.MonkeyPatch):
    inside, done = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        inside.set()
        done.wait(20)
        assert load(folder) == "v4"

    thread = threading.Thread(target=save, args=(root, "v4"), kwargs={"verify": slow})
    thread.start()
    assert inside.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(model_paths, "LOCK_WAIT_S", 0.05)
        with pytest.raises(LockedError, match="another process saves the text model of AAPL"):
            save(root, "v5")
    done.set()
    thread.join()
    assert serving(root) == ("v4", ())


def test_the_lock_is_given_back_after_an_error(root: Path):
    with pytest.raises(ModelExistsError):
        save(root, "v1")
    with FileLock(root / "AAPL" / TEXT.versions / ".lock").acquire(timeout=1):
        pass


SITES = ("mkdir", "open", "fsync", "rename", "symlink", "replace", "write")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("site", SITES)
def test_a_disk_that_refuses_at_any_step_leaves_what_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, code: int
):
    """The k-th call of one system call fails, for every k until the save gets through."""
    root = tmp_path / "models"
    save(root, "v1")
    failed, before, words = 0, "v1", "the disk is full" if code == errno.ENOSPC else "Read-only file system"
    for nth in range(1, 40):
        version = f"w{nth:02d}"
        with monkeypatch.context() as patch:
            calls = refuse_nth(patch, site, nth, code)
            refused = save_is_refused(root, version, words)
        failed += refused
        if not refused:
            # A folder that is there already may refuse to be made.
            assert serving(root) == (version, ())
            before = version
        else:
            assert serving(root) == (before, ())
            assert version not in [path.name for path in list_versions(root, "AAPL", TEXT)]
        assert not list((root / "AAPL").glob(".text-*"))
        if len(calls) < nth:
            break
    assert failed >= 1, "the fault was never reached"
    assert len(calls) < nth, "not every call was refused once"
    assert serving(root) == (version, ())


def save_is_refused(root: Path, version: str, words: str) -> bool:
    try:
        save(root, version)
    except StorageError as error:
        return words in str(error) and str(root) not in str(error)
    return False


def refuse_nth(patch: pytest.MonkeyPatch, site: str, nth: int, code: int) -> list[str]:
    calls: list[str] = []

    def refuses() -> None:
        calls.append(site)
        if len(calls) == nth:
            raise OSError(code, os.strerror(code))

    if site == "write":
        real_open = Path.open

        def opened(self: Path, mode: str = "r", **kwargs: int) -> object:
            if mode == "wb":
                refuses()
            return real_open(self, mode, **kwargs)

        patch.setattr(Path, "open", opened)
        return calls
    real = getattr(os, site)

    def system_call(*args: object, **kwargs: object) -> object:
        refuses()
        return real(*args, **kwargs)

    patch.setattr(os, site, system_call)
    return calls


def elsewhere(function: Callable[[Path], None], root: Path) -> str:
    """Run a function of this module in a process of its own, which may be limited, forked and killed.

    Returns what went wrong there, empty when nothing did.
    """
    here = Path(__file__).resolve()
    places = [str(here.parent), str(here.parents[2])]
    script = f"import sys; sys.path[:0] = {places}; import test_artifact as case; from pathlib import Path; "
    script += f"case.{function.__name__}(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr


def save_where_files_are_short(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    with pytest.raises(StorageError, match="File too large; what served before still serves"):
        save(root, "v4")


def test_a_write_that_the_kernel_cuts_short_leaves_what_served(root: Path):
    assert elsewhere(save_where_files_are_short, root) == ""
    assert serving(root) == ("v3", ())
    assert len(list_versions(root, "AAPL", TEXT)) == 3
    assert not list((root / "AAPL" / TEXT.versions).glob(".aside-*"))


def write_for_ever(root: Path, start: int, told: int) -> None:
    for number in itertools.count(start):
        save(root, f"w{number:06d}")
        os.write(told, b"%06d" % number)


def read_for_ever(root: Path) -> None:
    before = ""
    while True:
        version, warnings = serving(root)
        assert not warnings, warnings
        assert version >= before, (version, before)
        before = version


def forked(function: Callable[..., None], *args: object) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    os._exit(1)


def kill_careless_writers(root: Path) -> None:
    """The planted fault: the link moves before the files are there."""
    real = artifact._write

    def write(folder: Path, contents: Mapping[str, bytes]) -> None:
        final = folder.with_name(folder.name.removeprefix(".aside-"))
        model_paths.point(root / "AAPL" / TEXT.name, final)
        time.sleep(0.002)
        real(folder, contents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "_write", write)
        kill_writers(root)


def test_the_loop_of_kills_catches_a_careless_writer(root: Path):
    assert "instead" in elsewhere(kill_careless_writers, root)


def kill_writers(root: Path) -> None:
    reader = forked(read_for_ever, root)
    try:
        found_half = kill_writers_beside_a_reader(root)
        assert os.waitpid(reader, os.WNOHANG) == (0, 0), "the reader met a mixture"
    finally:
        os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    assert found_half, "no kill fell into a save: this proves nothing"


def kill_writers_beside_a_reader(root: Path) -> bool:
    rng, number, found_half = random.Random(11), 4, False  # noqa: S311
    began = time.perf_counter()
    save(root, "w000004")
    # On a busy machine a save takes longer, and whoever is killed too soon saves nothing.
    pace_s = max(time.perf_counter() - began, 0.01)
    for _ in range(40):
        ours, theirs = os.pipe()
        start = int(list_versions(root, "AAPL", TEXT)[-1].name[1:]) + 1
        writer = forked(write_for_ever, root, start, theirs)
        os.close(theirs)
        time.sleep(pace_s * rng.uniform(0.2, 5.0))
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "the writer failed by itself"
        with os.fdopen(ours, "rb") as told:
            saved = int(told.read()[-6:] or 0)
        version, warnings = serving(root)
        assert not warnings, warnings
        # What was reported as saved is there; of the save that was killed, all or nothing is.
        before, number = number, int(version[1:])
        assert number in ({saved, saved + 1} if saved else {before, start}), (number, saved, before, start)
        found_half |= bool(list((root / "AAPL" / TEXT.versions).glob(".[ag]*")))
    assert number > 5
    return found_half


def die_behind_the_link(root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = model_paths.point
        patch.setattr(model_paths, "point", lambda *names: (real(*names), os._exit(0)))
        save(root, "v6")


def test_a_version_that_served_is_pruned_in_its_turn_though_its_writer_was_killed(root: Path):
    for version in ("v4", "v5"):
        save(root, version)
    assert elsewhere(die_behind_the_link, root) == ""
    assert serving(root) == ("v6", ())
    save(root, "v7")
    assert [path.name for path in list_versions(root, "AAPL", TEXT)] == ["v3", "v4", "v5", "v6", "v7"]


def die_before_the_link(root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_paths, "point", lambda *_: os._exit(0))
        save(root, "v6")


def test_a_version_that_was_killed_before_it_served_pushes_out_none(root: Path):
    for version in ("v4", "v5"):
        save(root, version)
    assert elsewhere(die_before_the_link, root) == ""
    assert serving(root) == ("v5", ())

    def kept() -> list[str]:
        return [path.name for path in list_versions(root, "AAPL", TEXT)]

    assert kept() == ["v1", "v2", "v3", "v4", "v5", "v6"]
    save(root, "v7")
    assert kept() == ["v2", "v3", "v4", "v5", "v7"]
    # One that is chosen after all is like any other from then on.
    assert elsewhere(die_before_the_link, root) == ""
    roll_back(root, "AAPL", TEXT, load, "v6")
    save(root, "v8")
    assert kept() == ["v4", "v5", "v6", "v7", "v8"]


def test_kill_9_at_any_moment_loses_nothing_and_mixes_nothing(root: Path):
    assert elsewhere(kill_writers, root) == ""
    save(root, "z")
    assert serving(root) == ("z", ())
    assert not list((root / "AAPL" / TEXT.versions).glob(".[ag]*"))


def test_a_version_that_is_pruned_while_it_is_read_is_not_called_damaged(root: Path):
    """The reader is overtaken by more saves than are kept; it reads the link again."""
    overtaken = []

    def slow(folder: Path) -> str:
        if not overtaken:
            overtaken.append(folder)
            for number in range(KEEP_VERSIONS + 1):
                save(root, f"w{number}")
        return load(folder)

    assert serve(root, "AAPL", TEXT, slow) == (f"w{KEEP_VERSIONS}", ())
    assert not overtaken[0].exists()


def test_a_link_out_of_the_folder_is_refused_wherever_it_stands(root: Path, tmp_path: Path):
    home = root / "AAPL"
    (root / "MSFT").symlink_to(home)
    with pytest.raises(InvalidSymbolError, match="it is a link"):
        linked_version(root, "MSFT", TEXT)
    elsewhere_ = tmp_path / "elsewhere"
    (home / TEXT.versions).rename(elsewhere_)
    (home / TEXT.versions).symlink_to(elsewhere_)
    with pytest.raises(ModelCorruptError):
        serve(root, "AAPL", TEXT, load)


@pytest.mark.parametrize(
    ("returncode", "said", "is_well"),
    [(0, artifact.VERIFIED, True), (-6, artifact.VERIFIED, True), (0, "", False), (5, "", False)],
    ids=["well", "aborts while libraries are torn down", "silent", "refused"],
)
def test_a_version_is_verified_by_what_the_fresh_process_says(
    monkeypatch, tmp_path, returncode, said, is_well
):
    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, said, "terminate called")

    monkeypatch.setattr(artifact.subprocess, "run", run)
    found = nullcontext() if is_well else pytest.raises(ModelCorruptError, match="terminate called")
    with found:
        artifact.verify_in_fresh_process(tmp_path, "inference.load_gbm_models")
