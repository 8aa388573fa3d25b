"""Every forecast that was served, written once and never changed, and what became of it.

A row is committed before its answer goes out. It carries the sha256 of its content and of the row before it,
and the head of that chain is kept beside: `verify` finds a row that is changed, removed or moved.

A forecast is scored when its target session has closed, by returns over the bars of its source: a split does
no harm. Of forecasts that differ only in the limits that were asked for, the first one served counts.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sqlalchemy as sql
from rich.console import Console
from sqlalchemy import exc

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, fetch_stock_data, make_source
from data.schema import NO_DATE, NO_MOMENT, Bars, calendar_for, holds, normalise_symbol
from evaluation.accounting import CostModel
from evaluation.forward_simulator import forecast_outcome
from service import schemas as wire
from utils import base
from utils.base import DataError, Settings, StorageError, UpstreamError, UsageError, print_rows, run_command

logger = logging.getLogger(__name__)
TableRows = list[dict[str, Any]]

# Nobody waits longer for a forecast because another process holds the database.
LOCK_WAIT_S, ATTEMPTS, GENESIS = 0.25, 50, "0" * 64
FIRST_NAMES = {"model_id": "fusion_mode"}
# How one process at a time makes the tables: `create_all` looks first and creates then.
ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(7201)"}
# Nearer than this, two closes are one price.
SAME_CLOSE = 1e-6
OVERLAP = "forecasts of overlapping windows count one by one; they hold a sample only n / horizon strong"
COMMANDS = {
    "score": "set forecasts whose target session has closed beside what came",
    "verify": "look for rows that were changed, removed or moved",
    "show": "print the rows as they were served",
}
# What a terminal of 80 columns has room for, of a forecast in words; JSON has everything.
OF_SCORE = "symbol model_id source horizon_bars scored direction_accuracy band_coverage status"
OF_SHOW = {
    "model": "{model_id}",
    "sessions": "{as_of} to {target_session}",
    "forecast": "{forecast_return:+.2%} ({lower_return:+.2%} to {upper_return:+.2%})",
    "position": "{position:.4g}",
    "served": "{served_at:.10}",
    "counts": "{counts}",
}
AFTER_BREAK = "what follows a break of the chain does not count"
MEANS = {"direction_accuracy": "direction_hit", "always_up_accuracy": "always_up_hit"}
MEANS |= {"band_coverage": "band_hit", "mean_crps": "crps"}
MEANS |= {"mean_position_return": "position_return", "mean_hold_return": "hold_return"}


class Database:
    """A database of the service, safe to use from many threads; its tables come with the first row.

    Errors are `StorageError`, by ``name``; a bad ``url`` is a `UsageError`. It waits ``wait_s`` for others.
    """

    def __init__(self, url: str, tables: sql.MetaData, name: str, wait_s: float) -> None:
        self._engine = base.database_engine(url, wait_s)
        file = self._engine.url.database if self._engine.name == "sqlite" else None
        self.file = Path(file) if file else None
        self._tables, self._name, self._is_ready, self._inode = tables, name, False, 0

    @contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """Yield a connection; what is done with it is written at the end, as a whole."""
        with self._errors("written"):
            if not self._is_there() and self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._engine.begin() as connection:
                if not self._is_ready:
                    connection.exec_driver_sql(ALONE[self._engine.name])
                    self._tables.create_all(connection)
                yield connection
            self._is_ready = True

    def read(self, query: sql.Select[Any]) -> Sequence[sql.RowMapping]:
        """Return the rows of a table, none where there is no such table or no database yet."""
        names = [table.name for table in query.get_final_froms() if isinstance(table, sql.Table)]
        with self._errors("read"):
            # SQLite would make an empty file of a missing one.
            if not self._is_there():
                return []
            with self._engine.connect() as connection:
                if not all(map(sql.inspect(connection).has_table, names)):
                    return []
                if self.file is not None:
                    # Bytes that are no text are for `data.schema.holds` to find.
                    driver: Any = connection.connection.dbapi_connection
                    driver.text_factory = lambda text: str(text, "utf-8", "replace")
                return connection.execute(query).mappings().all()

    def _is_there(self) -> bool:
        """Whether there is a database; what was open of one that was removed or replaced is closed."""
        inode = self.file.stat().st_ino if self.file is not None and self.file.exists() else 0
        if inode != self._inode:
            self._engine.dispose()
            self._inode, self._is_ready = inode, False
        return self.file is None or inode != 0

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError:
            # What that means is for the caller to say.
            raise
        except (exc.SQLAlchemyError, OSError) as error:
            # The tables may be gone, and a connection broken.
            self._is_ready = False
            self._engine.dispose()
            # What the database said, without the statement and its values.
            words = (str(getattr(error, "orig", None) or "") or type(error).__name__).splitlines()[0]
            # Where a server stands is not for strangers: "connection to server at ... failed: why".
            words = words.rpartition(" failed: ")[2][:200]
            raise StorageError(f"{self._name} cannot be {done} ({words})") from error


class ServedForecast(wire.ForecastContent):
    """One forecast as it went out."""

    @property
    def digest(self) -> str:
        """What tells one forecast from another."""
        return _sha256(self.columns)

    @property
    def columns(self) -> dict[str, Any]:
        """The content as it is hashed and stored: the first ledgers had the mode in the model's place."""
        return {FIRST_NAMES.get(name, name): value for name, value in self}


class Entry(NamedTuple):
    """A row of the ledger."""

    sequence: int
    served_at: str
    previous_hash: str
    row_hash: str
    digest: str
    forecast: ServedForecast

    @property
    def _cells(self) -> dict[str, Any]:
        return {**dict(self.forecast), "served_at": self.served_at}

    @property
    def shown(self) -> dict[str, Any]:
        """What was served, with blanks where the cells hold no value of their kind."""
        return {n: value if holds(value, BLANKS[n]) else BLANKS[n] for n, value in self._cells.items()}

    @property
    def damage(self) -> str | None:
        """What is wrong with a row that is not what was written; such a row does not count."""
        unreadable = ", ".join(n for n, value in self._cells.items() if not holds(value, BLANKS[n]))
        if not unreadable and isinstance(self.previous_hash, str):
            row_hash = _chained(self.sequence, self.served_at, self.previous_hash, self.forecast)
            if (self.row_hash, self.digest) == (row_hash, self.forecast.digest):
                return None
        words = f" (unreadable: {unreadable})" if unreadable else ""
        return "changed after it was written: does not count" + words


_METADATA = sql.MetaData()
# By the kind of a field: the column, and what is shown where a cell holds no such value.
_KINDS: Mapping[Any, Any] = {str: (sql.String(), "?"), int: (sql.Integer(), 0), float: (sql.Double(), 0.0)}
_CONTENT = {name: _KINDS[field.annotation] for name, field in ServedForecast.model_fields.items()}
_CELLS = {name: FIRST_NAMES.get(name, name) for name in _CONTENT}
_CHAIN = ("served_at", "previous_hash", "row_hash", "digest")
_ROWS = sql.Table(
    "served_forecasts",
    _METADATA,
    sql.Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    *(sql.Column(_CELLS[n], kind, nullable=False, index=n == "symbol") for n, (kind, _) in _CONTENT.items()),
    *(sql.Column(name, sql.String(64), nullable=False, unique=name == "digest") for name in _CHAIN),
)
# Without it nobody would miss rows that are gone from the end.
_HEAD = sql.Table(
    "served_forecasts_head",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("rows", sql.Integer, nullable=False),
    sql.Column("row_hash", sql.String(64), nullable=False),
)
_DATES = {"as_of": NO_DATE, "target_session": NO_DATE, "served_at": NO_MOMENT}
BLANKS: Mapping[str, Any] = {name: blank for name, (_, blank) in _CONTENT.items()} | _DATES


def _sha256(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _chained(sequence: int, served_at: str, previous_hash: str, forecast: ServedForecast) -> str:
    link = {"sequence": sequence, "served_at": served_at, "previous_hash": previous_hash}
    return _sha256({**forecast.columns, **link})


class Audit(NamedTuple):
    """How many rows are good and the hash of the last of them, how many there are, and what is broken."""

    good: int = 0
    row_hash: str = GENESIS
    rows: int = 0
    fault: str | None = None


START = Audit()


class ForecastLedger:
    """Append-only; safe to use from many threads and processes. ``url``: see `Database`."""

    def __init__(self, url: str) -> None:
        self._database = Database(url, _METADATA, "the ledger", LOCK_WAIT_S)
        self._audited = START

    def record(self, forecast: ServedForecast, now: datetime | None = None) -> bool:
        """Append a row as of ``now`` (UTC), or raise `StorageError`; return False if it is there already."""
        for _ in range(ATTEMPTS):
            try:
                # Another process may be faster: its row comes before ours.
                with suppress(exc.IntegrityError), self._database.begin() as connection:
                    return self._append(connection, forecast, now or datetime.now(UTC))
            except (TypeError, OverflowError) as error:
                raise StorageError("the ledger cannot be written (its head is no head)") from error
        raise StorageError("the ledger takes no row: run `python -m service.ledger verify`")

    def _append(self, connection: sql.Connection, forecast: ServedForecast, now: datetime) -> bool:
        digest, served_at = forecast.digest, now.isoformat(timespec="milliseconds")
        if connection.scalar(sql.select(_ROWS.c.sequence).where(_ROWS.c.digest == digest)) is not None:
            return False
        # One writer at a time, where a database can let the others wait.
        last = sql.select(_HEAD.c.rows, _HEAD.c.row_hash).with_for_update()
        head = connection.execute(last).one_or_none()
        rows, previous = (0, GENESIS) if head is None else head
        row_hash = _chained(rows + 1, served_at, previous, forecast)
        row = {**forecast.columns, "sequence": rows + 1, "served_at": served_at, "digest": digest}
        connection.execute(sql.insert(_ROWS).values(**row, previous_hash=previous, row_hash=row_hash))
        change = sql.insert(_HEAD).values(id=1) if head is None else sql.update(_HEAD)
        connection.execute(change.values(rows=rows + 1, row_hash=row_hash))
        return True

    def entries(self, symbol: str | None = None, *, after: int = 0) -> list[Entry]:
        """Return the rows behind a place in the order of writing; raises `StorageError` if it cannot."""
        query = sql.select(_ROWS) if symbol is None else sql.select(_ROWS).where(_ROWS.c.symbol == symbol)
        query = query.where(_ROWS.c.sequence > after) if after else query
        found = []
        for row in self._database.read(query.order_by(_ROWS.c.sequence)):
            forecast = ServedForecast.model_construct(**{n: row[cell] for n, cell in _CELLS.items()})
            found.append(Entry(sequence=row["sequence"], forecast=forecast, **{n: row[n] for n in _CHAIN}))
        return found

    def audit(self, known: Audit = START) -> Audit:
        """Follow the chain from the last row that is known to be good, by default from the first one.

        Others may write meanwhile: the head before has its row in the chain, the one after is not behind it.
        """
        head, entries, after = self._head(), self.entries(after=known.good), self._head()
        good, previous, rows = known.good, known.row_hash, known.good + len(entries)
        is_held = head == (good, previous)
        for entry in entries:
            at, fault = f"row {entry.sequence} ({entry.forecast.symbol}, {entry.forecast.as_of})", None
            if entry.sequence != good + 1:
                fault = f"row {good + 1} is missing, {at} stands in its place"
            elif entry.damage is not None:
                fault = f"{at} is not what was written"
            elif entry.previous_hash != previous:
                fault = f"{at} does not follow the row before it"
            if fault is not None:
                return Audit(good, previous, rows, fault)
            good, previous = good + 1, entry.row_hash
            is_held |= head == (good, previous)
        if is_held and (after == (good, previous) or (isinstance(after[0], int) and after[0] > good)):
            return Audit(good, previous, rows)
        head = after if is_held else head
        return Audit(good, previous, rows, f"{good} rows are not the {head[0]} of its head")

    def audit_new(self, own: Iterable[Entry]) -> Audit:
        """Audit what came since the last call; all where a row is gone, or one of ``own`` was changed."""
        # What was done since to a row of others in its place is found by `verify`.
        known = self._audited
        count = sql.select(sql.func.count().label("rows")).where(_ROWS.c.sequence.between(1, known.good))
        is_whole = sum(row["rows"] for row in self._database.read(count)) == known.good
        if not is_whole or any(entry.damage for entry in own if entry.sequence <= known.good):
            known = START
        found = self.audit(known)
        if found.fault is not None and known.good:
            found = self.audit()
        self._audited = found if found.fault is None else START
        return found

    def verify(self, noted_head: str | None = None) -> tuple[int, str]:
        """Return the number of rows and the last hash; `DataError` if ``noted_head`` is gone, or a row."""
        found = self.audit()
        noted = sql.select(_ROWS).where(_ROWS.c.row_hash == noted_head)
        is_gone = noted_head not in {None, GENESIS} and not self._database.read(noted)
        if fault := found.fault or ("the chain does not hold the head that was noted" if is_gone else None):
            raise DataError(f"the ledger is broken: {fault}")
        return found.good, found.row_hash

    def _head(self) -> tuple[int, str]:
        found = self._database.read(sql.select(_HEAD))
        return (found[0]["rows"], found[0]["row_hash"]) if found else (0, GENESIS)


def score(entries: Iterable[Entry], bars: Bars, good: int = sys.maxsize) -> list[wire.TrackRecordForecast]:
    """Score the rows of one symbol, in the order of writing; only of the ledger's first ``good`` any counts.

    Position, and beside it the whole capital in shares, run from cash at the as-of close, after all costs.
    """
    costs, scored = CostModel(periods_per_year=calendar_for(bars.symbol).sessions_per_year), []
    for entry, why in against(entries, good):
        found = _outcome(entry, bars, costs)
        is_told = found["status"] != "unscored"
        found |= {"note": why} if is_told and why is not None else {}
        scored.append(wire.TrackRecordForecast(**entry.shown, counts=is_told and why is None, **found))
    return scored


def against(entries: Iterable[Entry], good: int = sys.maxsize) -> Iterator[tuple[Entry, str | None]]:
    """Yield rows, in the order of writing, with what is against counting them; None where nothing is."""
    seen: set[tuple[str, ...]] = set()
    for entry in entries:
        told, is_good = entry.forecast, 1 <= entry.sequence <= good
        why = entry.damage or (None if is_good else AFTER_BREAK)
        why = why or calendar_for(told.symbol).hindsight(told.as_of, entry.served_at)
        key = (told.symbol, told.source, told.model_version, told.as_of, told.target_session)
        why = why or ("served before with other limits: does not count again" if key in seen else None)
        seen |= {key} if why is None else set()
        yield entry, why


def _outcome(entry: Entry, bars: Bars, costs: CostModel) -> dict[str, Any]:
    told, index, source = entry.forecast, pd.DatetimeIndex(bars.frame.index), bars.provenance.source
    if entry.damage is not None:
        return {"status": "unscored", "note": entry.damage}
    if told.source != source:
        return {"status": "unscored", "note": f"made from prices of {told.source}, these are of {source}"}
    if pd.Timestamp(told.target_session) > index[-1]:
        return {"status": "open"}
    first, last = index.get_indexer(pd.DatetimeIndex([told.as_of, told.target_session]))
    if min(first, last) < 0:
        missing = told.as_of if first < 0 else told.target_session
        return {"status": "unscored", "note": f"the prices have no session {missing}"}
    close = np.asarray(bars.frame["Close"], dtype=np.float64)[first : last + 1]
    band = (told.forecast_return, told.lower_return, told.upper_return)
    found: dict[str, Any] = {"status": "scored", **forecast_outcome(close, band, told.position, costs)}
    if abs(close[0] / told.close - 1.0) > SAME_CLOSE:
        words = f"the close of {told.as_of} was {told.close:g} when served and is {close[0]:g} now"
        found["note"] = f"{words} (split, dividend or restated): scored by returns"
    return found


def summarise(scored: Iterable[wire.TrackRecordForecast]) -> list[wire.TrackRecordSummary]:
    """Return one summary for each horizon and model; rows that do not count are left out."""
    groups = defaultdict(list)
    for row in scored:
        if row.counts:
            groups[row.horizon_bars, row.model_id].append(row)
    found = []
    for (horizon, model), rows in sorted(groups.items()):
        done = [row for row in rows if row.status == "scored"]
        values = {n: [v for row in done if (v := getattr(row, f)) is not None] for n, f in MEANS.items()}
        means = {name: float(np.mean(known)) for name, known in values.items() if known}
        of = {"horizon_bars": horizon, "model_id": model, "served": len(rows), "scored": len(done)}
        found.append(wire.TrackRecordSummary.model_validate(of | means))
    return found


def track_record(
    ledger: ForecastLedger, bars_of: Callable[[str], Bars], symbol: str, limit: int
) -> wire.TrackRecord:
    """Return what was served of a symbol, and how it did: a summary of all rows, and the last ``limit``."""
    symbol = normalise_symbol(symbol)
    own = ledger.entries(symbol)
    found = ledger.audit_new(own)
    scored = score(own, bars_of(symbol), found.good) if own else []
    notes = [OVERLAP] if own else [f"nothing of {symbol} was served yet"]
    if found.fault is not None:
        notes.append(f"the ledger is broken: {found.fault}" + f"; {AFTER_BREAK}" * (found.good < found.rows))
    last, summaries = scored[-limit:], summarise(scored)
    return wire.TrackRecord(symbol=symbol, summaries=summaries, forecasts=last, notes=notes)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m service.ledger", description="Show what was served.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--json", action="store_true", help="print JSON on stdout")
        if name == "verify":
            command.add_argument("--head", metavar="HASH", help="hash that an earlier run printed")
        else:
            command.add_argument("symbol", nargs="?", help="default: every symbol of the ledger")
        if name == "score":
            command.add_argument("--source", help="yahoo, sample or csv:DIR (default: that of each row)")
    return parser


def scored_rows(entries: list[Entry], audit: Audit, wanted: str | None, settings: Settings) -> TableRows:
    """Return what became of forecasts, by prices of the ``wanted`` source, or of that of each row."""
    if audit.fault is not None:
        logger.warning("the ledger is broken: %s; %s", audit.fault, AFTER_BREAK)
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.shown["symbol"], entry.shown["source"]].append(entry)
    told, failed = [], []
    for (symbol, name), own in sorted(groups.items()):
        of = {"symbol": symbol, "source": name, "served": len(own)}
        try:
            source = _source_of(name, wanted, settings)
            bars = fetch_stock_data(symbol, source=source, cache=BarCache(settings.cache_dir))
        except (UpstreamError, DataError, UsageError) as error:
            failed.append(f"{symbol} of {name}: {error}")
            told.append({**of, "status": f"not scored: {error}"})
            continue
        scored = score(own, bars, audit.good)
        means = [{**x.model_dump(), "status": "scored" if x.scored else "open"} for x in summarise(scored)]
        why = next((row.note for row in scored if row.note), "")
        told += [{**of, **row} for row in means or [{"status": f"none counts: {why}"}]]
    if failed and len(failed) == len(groups):
        raise UpstreamError(f"nothing could be scored: {'; '.join(failed)}")
    return told


def _source_of(name: str, wanted: str | None, settings: Settings) -> BarSource:
    known = name if name in {"yahoo", "sample"} else settings.source
    source = make_source(wanted or known, cache_dir=settings.cache_dir)
    if wanted is None and source.name != name:
        raise UsageError(f"a row does not say where {name} lies: give --source")
    return source


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code that `utils.base` lists, 4 for a broken chain."""
    args = build_parser().parse_args(argv)

    def run(settings: Settings) -> None:
        ledger = ForecastLedger(settings.database)
        if args.command == "verify":
            count, head = ledger.verify(args.head)
            rows: TableRows = [{"status": "ok", "rows": count, "head": head}]
            shown = rows
        else:
            entries = ledger.entries(None if args.symbol is None else normalise_symbol(args.symbol))
            audit = ledger.audit()
            if args.command == "score":
                rows = scored_rows(entries, audit, args.source, settings)
                shown = [{name.partition("_")[0]: row.get(name) for name in OF_SCORE.split()} for row in rows]
            else:
                said = against(entries, audit.good)
                rows = [{"sequence": e.sequence, **e.shown, "counts": not w, "note": w} for e, w in said]
                told = [row | {"counts": row["note"] or "yes"} for row in rows]
                shown = [{name: words.format(**row) for name, words in OF_SHOW.items()} for row in told]
        if args.json:
            sys.stdout.write(json.dumps(rows, allow_nan=False) + "\n")
        else:
            print_rows(Console(), shown or [{"forecasts": "none"}])

    return run_command(run, quiet=args.json)


if __name__ == "__main__":
    sys.exit(main())
