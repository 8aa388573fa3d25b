"""Prices and features on disk: checked to the last byte, extended by new sessions, safe for many processes.

A table is a Parquet file named by its content, and a sealed JSON file that points to it and is replaced
atomically: a reader sees the old pair or the new one. A damaged file is moved aside and fetched again.
"""

import argparse
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.data_fetcher import BarSource, FileSource, RawAnswer, check_answer, last_due, make_source, settled
from data.schema import PRICE_COLUMNS, calendar_for, normalise_symbol
from utils.base import DataError, Settings, StorageError, UnknownSymbolError, UpstreamError, run_command
from utils.model_paths import holding, symbol_dir, write_whole

logger = logging.getLogger(__name__)

Kind = Literal["bars", "features"]
SCHEMA_VERSION = 1
# So many cached sessions are fetched again, to see whether the past was adjusted anew: adjusted prices wobble
# in the seventh digit, the smallest dividends move them by more than this share.
OVERLAP_BARS, PRICE_TOLERANCE = 10, 1e-5
# A live source that had nothing newer is left alone so long, unless a session closed meanwhile.
ASK_AGAIN_AFTER = timedelta(minutes=15)
# So long a source that failed for a symbol is left alone, and another request for the symbol is waited for.
REMEMBER_FAILURE_S, LOCK_TIMEOUT_S = 30.0, 180.0
# A whole answer must hold this share of the cached sessions, and the last one, to replace them.
KEEP_SHARE = 0.99
MOST_REMEMBERED = 1024
_SEAL = b'{"sha256": "%b", "meta": %b}'


class CorruptTableError(DataError):
    """A cached file is not the one that was written."""


class TableMeta(BaseModel):
    """What lies beside a table on disk; ``rows``, ``file`` and ``sha256`` are filled in when it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    symbol: str
    source: str
    last_session: date
    fetched_at: datetime
    revision: str | None = None
    bars_hash: str | None = None
    feature_set_hash: str | None = None
    target_horizon_bars: int | None = None
    rows: int = 0
    file: str = Field(default="", pattern=r"^(bars|features)-[0-9a-f]{16}\.parquet$")
    sha256: str = ""


def seal(meta: TableMeta) -> bytes:
    """Return the description of a table as JSON that begins with its own sha256."""
    text = json.dumps(meta.model_dump(mode="json"), sort_keys=True).encode()
    return _SEAL % (_sha256(text).encode(), text)


def unseal(sealed: bytes) -> TableMeta | None:
    """Return what :func:`seal` wrote, None of another schema version; ``CorruptTableError`` if damaged."""
    text = sealed[len(_SEAL % (b"", b"")) + 63 : -1]
    if sealed != _SEAL % (_sha256(text).encode(), text):
        raise CorruptTableError("the description of a table is not what was written")
    meta = json.loads(text)
    return TableMeta.model_validate(meta) if meta["schema_version"] == SCHEMA_VERSION else None


def encode_table(frame: pd.DataFrame) -> bytes:
    """Return a table of numbers over dates as a Parquet file with page checksums."""
    dates = pd.DatetimeIndex(frame.index).as_unit("us").to_numpy()
    columns = {str(name): np.asarray(frame[name], dtype=np.float64) for name in frame.columns}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"date": dates, **columns}), sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def decode_table(content: bytes) -> pd.DataFrame:
    """Return the table that :func:`encode_table` wrote, after checking its pages."""
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    return pd.DataFrame(table.to_pandas().set_index("date"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def priced_rows(raw: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that have every price, ascending, the last one of doubles."""
    priced = raw.dropna(subset=list(PRICE_COLUMNS)).sort_index(kind="stable")
    return priced.loc[~priced.index.duplicated(keep="last")]


def join_raw(old: pd.DataFrame, new: pd.DataFrame, *, tolerance: float) -> pd.DataFrame | None:
    """Return ``old`` up to where ``new`` begins, then ``new``; None if shared sessions disagree (relatively).

    A split or a dividend re-adjusts the whole past: nothing may be appended to it then.
    """
    earlier = old.index < new.index.min()
    before, after = priced_rows(old.loc[~earlier]), priced_rows(new)
    if before.empty or not before.index.isin(after.index).all():
        return None
    ours, theirs = (table.loc[before.index, list(PRICE_COLUMNS)] for table in (before, after))
    agree = np.allclose(theirs, ours, rtol=tolerance, atol=0.0)
    return pd.concat([old.loc[earlier], new]) if agree else None


class CachedTable(NamedTuple):
    """A table that passed its checks, with what lies beside it."""

    frame: pd.DataFrame
    meta: TableMeta

    def answer(self, failure: str | None = None) -> RawAnswer:
        """Return the table as a source's answer."""
        return RawAnswer(raw=self.frame, fetched_at=self.meta.fetched_at, failure=failure)


class BarCache:
    """Raw prices and engineered features by source and symbol, in a folder that is made when first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # How this process's last flight for (source, symbol) ended: the monotonic time, and its error.
        self._flights: dict[tuple[str, str], tuple[float, UpstreamError | None]] = {}

    def read_through(
        self, symbol: str, source: BarSource, *, now: datetime, force_refresh: bool = False
    ) -> RawAnswer:
        """Return the cached raw table, asking ``source`` when it may know more.

        One flight per symbol: who waits for the lock reads what the holder fetched, or hears how it failed.
        Beside a cache, the answer tells of an ``UpstreamError`` or ``DataError`` instead of raising it.
        """
        asked = time.monotonic()
        if not force_refresh:
            with suppress(CorruptTableError):  # seen to below, under the lock
                cached = self.load("bars", symbol, source.name)
                if cached is not None and self._is_fresh(cached.meta, source, now):
                    return cached.answer()
        with self.locked(symbol, source.name):
            cached = self.recover("bars", symbol, source.name)
            ended, error = self._flights.get((source.name, symbol), (0.0, None))
            accept = ended >= asked or not force_refresh
            if cached is not None and accept and self._is_fresh(cached.meta, source, now):
                return cached.answer()
            since = asked if force_refresh else time.monotonic() - REMEMBER_FAILURE_S
            if error is None or ended < since:
                try:
                    return self._ask(symbol, source, cached, now, whole=force_refresh)
                except UpstreamError as failure:
                    error = failure
                    self._remember(symbol, source, error)
            return self._without_source(symbol, source, cached, error)

    def load(self, kind: Kind, symbol: str, source_name: str) -> CachedTable | None:
        """Return a cached table, None if none is of this schema version; ``CorruptTableError`` if damaged."""
        folder = self._folder(symbol, source_name)
        pointer = folder / f"{kind}.json"
        for _ in range(3):
            try:
                meta = unseal(pointer.read_bytes())
                if meta is None:
                    return None
                content = (folder / meta.file).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue  # absent, or replaced by a writer between the two reads
            except OSError as error:
                raise StorageError(f"the cache {self._root} cannot be read ({error.strerror})") from error
            if _sha256(content) != meta.sha256:
                raise CorruptTableError(f"{meta.file} is not what was written")
            return CachedTable(decode_table(content), meta)
        if pointer.exists():
            raise CorruptTableError(f"{pointer.name} points to a file that is not there")
        return None

    def clear(self, symbol: str, source_name: str) -> bool:
        """Remove what is cached for a symbol; return whether there was anything."""
        folder = self._folder(symbol, source_name)
        with self.locked(symbol, source_name), self._writing():
            if there := folder.is_dir():
                shutil.rmtree(folder)
            return there

    def entries(self) -> list[tuple[str, str]]:
        """Return (symbol, source) of every readable table of bars."""
        found = []
        for path in sorted((self._root / "bars").glob("*/*/bars.json")):
            with suppress(CorruptTableError):
                if meta := unseal(path.read_bytes()):
                    found.append((meta.symbol, meta.source))
        return found

    def _is_fresh(self, meta: TableMeta, source: BarSource, now: datetime) -> bool:
        if isinstance(source, FileSource):
            return meta.revision == source.revision(meta.symbol)
        calendar = calendar_for(meta.symbol)
        last_closed = calendar.last_closed_session(now)
        if pd.Timestamp(meta.last_session) >= last_closed:
            return True
        just_asked = timedelta(0) <= now - meta.fetched_at < ASK_AGAIN_AFTER
        return just_asked and calendar.last_closed_session(meta.fetched_at) == last_closed

    def _ask(
        self, symbol: str, source: BarSource, cached: CachedTable | None, now: datetime, *, whole: bool
    ) -> RawAnswer:
        last_closed = calendar_for(symbol).last_closed_session(now)
        extend = cached if source.is_live else None
        raw, revision = None, None
        if extend is not None and not whole:
            start = priced_rows(extend.frame).index[-OVERLAP_BARS:][0].date()
            newer = settled(source.fetch(symbol, start=start), last_closed)
            raw = join_raw(extend.frame, newer, tolerance=PRICE_TOLERANCE)
        if isinstance(source, FileSource):
            # A file is kept as it is: another ``now`` may want more of it. A live bar may still form.
            raw, revision = source.fetch_revised(symbol)
        elif raw is None:
            raw = settled(source.fetch(symbol), last_closed)
        try:
            check_answer(symbol, raw, source.name, now)
            if extend is not None:
                _refuse_fewer(symbol, extend.frame, raw)
        except DataError as error:
            if extend is not None:
                raise UpstreamError(str(error)) from error
            raise
        last, name = priced_rows(raw).index[-1].date(), source.name
        meta = TableMeta(symbol=symbol, source=name, last_session=last, fetched_at=now, revision=revision)
        self.store("bars", raw, meta)
        self._remember(symbol, source, None)
        return RawAnswer(raw=raw, fetched_at=now)

    def _without_source(
        self, symbol: str, source: BarSource, cached: CachedTable | None, error: UpstreamError
    ) -> RawAnswer:
        if cached is not None and source.is_live:
            logger.warning("%s: serving cached bars up to %s: %s", symbol, cached.meta.last_session, error)
            return cached.answer(failure=str(error))
        had_prices = source.is_live and self._folder(symbol, source.name).is_dir()
        kind = UpstreamError if had_prices and isinstance(error, UnknownSymbolError) else type(error)
        raise kind(str(error)) from error

    def _remember(self, symbol: str, source: BarSource, error: UpstreamError | None) -> None:
        for forgotten in list(self._flights)[: 1 - MOST_REMEMBERED]:
            self._flights.pop(forgotten, None)
        self._flights[source.name, symbol] = (time.monotonic(), error)

    def _folder(self, symbol: str, source_name: str) -> Path:
        return symbol_dir(self._root / "bars" / re.sub(r"[^A-Za-z0-9_.-]", "-", source_name), symbol)

    @contextmanager
    def locked(self, symbol: str, source_name: str) -> Iterator[None]:
        """Keep other threads and processes off what is cached; ``LockedError`` after too long."""
        # As many files as a byte has values: symbols that nobody knows leave no trace of their own.
        path = self._root / "locks" / f"{_sha256(f'{source_name}/{symbol}'.encode())[:2]}.lock"
        refusal = "another request for the symbol takes too long: try again later"
        with ExitStack() as stack:
            with self._writing():
                stack.enter_context(holding(path, LOCK_TIMEOUT_S, lambda: refusal))
            yield

    def recover(self, kind: Kind, symbol: str, source_name: str) -> CachedTable | None:
        """Return a cached table, or move a corrupt one aside; the caller holds the lock."""
        try:
            return self.load(kind, symbol, source_name)
        except CorruptTableError as error:
            logger.warning("%s from %s: %s: moved to quarantine", symbol, source_name, error)
            folder = self._folder(symbol, source_name)
            with self._writing():
                shutil.rmtree(folder / "quarantine", ignore_errors=True)  # one bad copy is enough to look at
                (folder / "quarantine").mkdir()
                for path in folder.glob(f"{kind}*"):
                    path.replace(folder / "quarantine" / path.name)
            return None

    def store(self, kind: Kind, frame: pd.DataFrame, meta: TableMeta) -> None:
        """Write a table and its description; the caller holds the lock. What was stored stays on failure."""
        folder = self._folder(meta.symbol, meta.source)
        content = encode_table(frame)
        sha256 = _sha256(content)
        file = f"{kind}-{sha256[:16]}.parquet"
        meta = meta.model_copy(update={"rows": len(frame), "file": file, "sha256": sha256})
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / file, content)
            write_whole(folder / f"{kind}.json", seal(meta))
            for path in {*folder.glob(f"{kind}-*.parquet"), *folder.glob(".writing-*")} - {folder / file}:
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            words = (
                f"the cache {self._root} cannot be written ({error.strerror}): make room, or use --no-cache"
            )
            raise StorageError(words) from error


def _refuse_fewer(symbol: str, cached: pd.DataFrame, raw: pd.DataFrame) -> None:
    kept = priced_rows(cached).index.isin(priced_rows(raw).index)
    if kept.mean() < KEEP_SHARE or not kept[-1]:
        raise DataError(
            f"the new answer lacks {int((~kept).sum())} of {len(kept)} cached sessions, which stay; "
            f"if it is right, run `python -m data.cache_manager clear {symbol}`"
        )


def describe(cache: BarCache, symbol: str, source_name: str, now: datetime) -> dict[str, Any]:
    """Return what ``info`` shows of one symbol; its state is ok, stale, absent or corrupt."""
    shown: dict[str, Any] = {"symbol": symbol, "source": source_name, "state": "absent"}
    try:
        bars, features = (cache.load(kind, symbol, source_name) for kind in ("bars", "features"))
        if bars is None:
            return shown
        frame, report = check_answer(symbol, bars.frame, source_name, now)
    except DataError as error:
        return {**shown, "state": "corrupt", "problems": [str(error)]}
    return {
        **shown,
        "state": "stale" if frame.index[-1] < last_due(symbol, source_name, now) else "ok",
        "rows": report.rows,
        "first_session": f"{frame.index[0]:%Y-%m-%d}",
        "last_session": f"{frame.index[-1]:%Y-%m-%d}",
        "gaps": report.missing_sessions,
        "fetched_at": bars.meta.fetched_at.isoformat(timespec="seconds"),
        "features_version": features.meta.feature_set_hash if features is not None else None,
        "problems": list(report.problems()),
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.cache_manager", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("info", "refresh", "clear"))
    parser.add_argument("symbols", nargs="*", metavar="SYMBOL", help="default: every cached symbol")
    parser.add_argument("--source", help="yahoo, sample or csv:DIR (default: AI_STOCKS_SOURCE, or yahoo)")
    parser.add_argument("--cache-dir", type=Path, help="default: AI_STOCKS_CACHE_DIR, or .cache")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return parser


def run(args: argparse.Namespace, settings: Settings, now: datetime) -> list[dict[str, Any]]:
    """Do what the command line asks; return a description for each symbol and source."""
    cache_dir = args.cache_dir or settings.cache_dir
    cache, source = BarCache(cache_dir), make_source(args.source or settings.source, cache_dir=cache_dir)
    described = []
    for symbol, name in [(normalise_symbol(raw), source.name) for raw in args.symbols] or cache.entries():
        if args.command == "refresh" and name == source.name:
            answer = cache.read_through(symbol, source, now=now, force_refresh=True)
            if answer.failure is not None:
                raise UpstreamError(answer.failure)
        cleared = args.command == "clear" and cache.clear(symbol, name)
        shown = describe(cache, symbol, name, now)
        described.append({**shown, "state": "cleared"} if cleared else shown)
    return described


def show(described: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print descriptions, for a program or for a person."""
    if args.json:
        sys.stdout.write(json.dumps(described, allow_nan=False) + "\n")
        return
    for one in described:
        table = Table(show_header=False)
        for key, value in one.items():
            table.add_row(key, escape("; ".join(value) if isinstance(value, list) else str(value)))
        Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Show, refresh or clear cached prices; return the exit code that ``utils.base`` lists."""
    args = build_parser().parse_args(argv)
    return run_command(lambda settings: show(run(args, settings, datetime.now(UTC)), args), quiet=args.json)


if __name__ == "__main__":
    sys.exit(main())
