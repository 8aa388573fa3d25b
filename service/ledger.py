"""Every forecast that was served, written once and never changed, and what became of it.

::

    python -m service.ledger score [SYMBOL]
    python -m service.ledger verify [--head HASH]
    python -m service.ledger show [SYMBOL]

A row is committed before its answer goes out. Each row carries the sha256 of its content and of the row
before it, and the head of that chain is kept beside: a row that is changed, removed or moved is found by
`verify`. Who may write the database can forge the whole chain; who notes the head elsewhere finds that too.

A forecast is scored when its target session has closed, by returns over the bars of its source: a split does
no harm. Of forecasts that differ only in the limits that were asked for, the first one served counts.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sql
from rich.console import Console
from rich.markup import escape
from sqlalchemy import exc

from data.cache_manager import BarCache
from data.data_fetcher import BarSource, fetch_stock_data, make_source
from data.schema import NO_DATE, NO_MOMENT, Bars, calendar_for, holds, normalise_symbol
from evaluation.accounting import CostModel
from evaluation.forward_simulator import forecast_outcome
from service import schemas as wire
from utils.errors import AIStocksError, DataError, StorageError, UpstreamError, UsageError
from utils.settings import Settings, configure_logging, print_rows, read_settings

logger = logging.getLogger(__name__)
TableRows = list[dict[str, Any]]

# Nobody waits longer for a forecast because another process holds the database.
LOCK_WAIT_S, ATTEMPTS = 0.25, 50
GENESIS = "0" * 64
FIRST_NAMES = {"model_id": "fusion_mode"}
# Nearer than this, two closes are one price.
SAME_CLOSE = 1e-6
OVERLAP = "forecasts of overlapping windows count one by one; they hold a sample only n / horizon strong"
# What a terminal of 80 columns has room for; JSON has everything.
SHOWN = {
    "verify": "status rows head",
    "show": "symbol model_id as_of target_session forecast_return position",
    "score": "symbol model_id source horizon_bars scored direction_accuracy band_coverage status",
}
SAID_BY_ROW = re.compile("_(return|accuracy|coverage|session|bars|id)$")
CHANGED = "changed after it was written: does not count"
AFTER_BREAK = "what follows a break of the chain does not count"
MEANS = {
    "direction_accuracy": "direction_hit",
    "always_up_accuracy": "always_up_hit",
    "band_coverage": "band_hit",
    "mean_crps": "crps",
    "mean_position_return": "position_return",
    "mean_hold_return": "hold_return",
}
COMMANDS = {
    "score": "set forecasts whose target session has closed beside what came",
    "verify": "look for rows that were changed, removed or moved",
    "show": "print the rows as they were served",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedForecast:
    """One forecast as it went out: the median of the simple return to a session, and the 80 % band around it.

    ``close`` is the adjusted close of ``as_of`` as known then, ``position`` the target weight decided at it,
    ``model_id`` what answered, whatever was asked for, and ``sigma_log`` the standard deviation of the normal
    log return with a band as wide. Sessions are ``YYYY-MM-DD``.
    """

    symbol: str
    source: str
    model_id: str
    model_version: str
    as_of: str
    target_session: str
    horizon_bars: int
    close: float
    forecast_return: float
    lower_return: float
    upper_return: float
    sigma_log: float
    position: float

    @property
    def digest(self) -> str:
        """What tells one forecast from another."""
        return _sha256(self.columns)

    @property
    def columns(self) -> dict[str, Any]:
        """The content as it is hashed and stored: the first ledgers had the mode in the model's place."""
        return {FIRST_NAMES.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the ledger."""

    sequence: int
    served_at: str
    previous_hash: str
    row_hash: str
    digest: str
    forecast: ServedForecast

    @property
    def unreadable(self) -> list[str]:
        """Names of the cells that hold no value of their kind."""
        return [name for name, value in self._cells.items() if not holds(value, BLANKS[name])]

    @property
    def shown(self) -> dict[str, Any]:
        """What was served, with blanks where the cells hold no value of their kind."""
        return {n: value if holds(value, BLANKS[n]) else BLANKS[n] for n, value in self._cells.items()}

    @property
    def _cells(self) -> dict[str, Any]:
        return {**asdict(self.forecast), "served_at": self.served_at}

    @property
    def is_intact(self) -> bool:
        """Whether the row is what was written."""
        if self.unreadable or not isinstance(self.previous_hash, str):
            return False
        row_hash = _chained(self.sequence, self.served_at, self.previous_hash, self.forecast)
        return (self.row_hash, self.digest) == (row_hash, self.forecast.digest)


_METADATA = sql.MetaData()
_TYPES: dict[Any, Any] = {str: sql.String(128), int: sql.Integer(), float: sql.Double()}
_CONTENT = {field.name: _TYPES[field.type] for field in fields(ServedForecast)}
_CELLS = {name: FIRST_NAMES.get(name, name) for name in _CONTENT}
_CHAIN = ("served_at", "previous_hash", "row_hash", "digest")
_ROWS = sql.Table(
    "served_forecasts",
    _METADATA,
    sql.Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    *(sql.Column(_CELLS[n], kind, nullable=False, index=n == "symbol") for n, kind in _CONTENT.items()),
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
_ZEROS: dict[Any, Any] = {str: "?", int: 0, float: 0.0}
BLANKS: Mapping[str, Any] = {field.name: _ZEROS[field.type] for field in fields(ServedForecast)} | {
    **dict.fromkeys(("as_of", "target_session"), NO_DATE),
    "served_at": NO_MOMENT,
}


def _sha256(content: Mapping[str, object]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _chained(sequence: int, served_at: str, previous_hash: str, forecast: ServedForecast) -> str:
    link = {"sequence": sequence, "served_at": served_at, "previous_hash": previous_hash}
    return _sha256({**forecast.columns, **link})


class ForecastLedger:
    """Append-only; safe to use from many threads and processes.

    ``url`` is that of the database, as SQLAlchemy writes it; it is not touched before the first row. Raises
    `UsageError` if it makes no sense, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = sql.make_url(url)
            waits = {"timeout": LOCK_WAIT_S} if self._url.get_backend_name() == "sqlite" else {}
            self._engine = sql.create_engine(self._url, connect_args=waits, poolclass=sql.NullPool)
        except (exc.ArgumentError, ModuleNotFoundError, ValueError) as error:
            raise UsageError(
                f"AI_STOCKS_DATABASE_URL cannot be used ({type(error).__name__}): write "
                "sqlite:////FOLDER/FILE.sqlite, or postgresql+psycopg://HOST/NAME with psycopg installed"
            ) from error
        self._is_ready = False

    def record(self, forecast: ServedForecast, now: datetime | None = None) -> bool:
        """Append a row and commit it; return False when the same forecast is there already.

        ``now`` (UTC) is by default the present. Raises `StorageError` when the database cannot be written.
        """
        try:
            if not self._is_ready:
                if self._file is not None:
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                # The second call finds what another process made at the same moment.
                with contextlib.suppress(exc.DBAPIError):
                    _METADATA.create_all(self._engine)
                _METADATA.create_all(self._engine)
                self._is_ready = True
            for _ in range(ATTEMPTS):
                try:
                    return self._append(forecast, now or datetime.now(UTC))
                except exc.IntegrityError:
                    # Another process was faster; its row comes before ours.
                    continue
        except (exc.SQLAlchemyError, OSError, TypeError, OverflowError) as error:
            # The last two are of a head that is no head.
            self._is_ready = False
            raise StorageError(f"the ledger cannot be written ({_words(error)})") from error
        raise StorageError("the ledger takes no row: run `python -m service.ledger verify`")

    def _append(self, forecast: ServedForecast, now: datetime) -> bool:
        digest, served_at = forecast.digest, now.isoformat(timespec="milliseconds")
        with self._engine.begin() as connection:
            if connection.scalar(sql.select(_ROWS.c.sequence).where(_ROWS.c.digest == digest)) is not None:
                return False
            head = connection.execute(sql.select(_HEAD.c.rows, _HEAD.c.row_hash)).one_or_none()
            rows, previous = (0, GENESIS) if head is None else head
            row_hash = _chained(rows + 1, served_at, previous, forecast)
            row = {**forecast.columns, "sequence": rows + 1, "served_at": served_at, "digest": digest}
            connection.execute(sql.insert(_ROWS).values(**row, previous_hash=previous, row_hash=row_hash))
            change = sql.insert(_HEAD).values(id=1) if head is None else sql.update(_HEAD)
            connection.execute(change.values(rows=rows + 1, row_hash=row_hash))
        return True

    def entries(self, symbol: str | None = None) -> list[Entry]:
        """Return the rows in the order of writing; raises `StorageError` when that cannot be done."""
        return [
            Entry(
                sequence=row["sequence"],
                **{name: row[name] for name in _CHAIN},
                forecast=ServedForecast(**{name: row[cell] for name, cell in _CELLS.items()}),
            )
            for row in self._read(_ROWS, sql.true() if symbol is None else _ROWS.c.symbol == symbol)
        ]

    def audit(self) -> tuple[list[Entry], int, str | None]:
        """Return the rows, how many of them stand before a break of their chain, and what is broken."""
        head, entries = self._head(), self.entries()
        while head != (again := self._head()):
            # Somebody wrote in between.
            head, entries = again, self.entries()
        previous = GENESIS
        for place, entry in enumerate(entries, start=1):
            at = f"row {entry.sequence} ({entry.forecast.symbol}, {entry.forecast.as_of})"
            wrong = {
                f"row {place} is missing, {at} stands in its place": entry.sequence != place,
                f"{at} is not what was written": not entry.is_intact,
                f"{at} does not follow the row before it": entry.previous_hash != previous,
            }
            if any(wrong.values()):
                return entries, place - 1, next(words for words, is_so in wrong.items() if is_so)
            previous = entry.row_hash
        broken = head != (len(entries), previous)
        return (
            entries,
            len(entries),
            f"{len(entries)} rows are not the {head[0]} of its head" if broken else None,
        )

    def verify(self, noted_head: str | None = None) -> tuple[int, str]:
        """Return the number of rows and the hash of the last one.

        ``noted_head`` is a hash that an earlier call returned: it must still be in the chain. Raises
        `DataError` when a row was changed, removed, added or moved.
        """
        entries, _, fault = self.audit()
        hashes = [GENESIS, *(entry.row_hash for entry in entries)]
        if fault is None and noted_head is not None and noted_head not in hashes:
            fault = "the chain does not hold the head that was noted"
        if fault is not None:
            raise DataError(f"the ledger is broken: {fault}")
        return len(entries), hashes[-1]

    def _head(self) -> tuple[int, str]:
        found = self._read(_HEAD)
        return (found[0]["rows"], found[0]["row_hash"]) if found else (0, GENESIS)

    @property
    def _file(self) -> Path | None:
        is_file = self._url.get_backend_name() == "sqlite" and self._url.database
        return Path(str(self._url.database)) if is_file else None

    def _read(self, table: sql.Table, *wanted: sql.ColumnElement[bool]) -> Sequence[sql.RowMapping]:
        try:
            # SQLite would make an empty file of a missing one.
            if self._file is not None and not self._file.exists():
                return []
            with self._engine.connect() as connection:
                if not sql.inspect(connection).has_table(table.name):
                    return []
                if self._file is not None:
                    # Bytes that are no text are for `holds` to find.
                    driver: Any = connection.connection.dbapi_connection
                    driver.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
                rows = sql.select(table).where(*wanted).order_by(*table.primary_key)
                return connection.execute(rows).mappings().all()
        except (exc.SQLAlchemyError, OSError) as error:
            raise StorageError(f"the ledger cannot be read ({_words(error)})") from error


def _words(error: Exception) -> str:
    """Say what the database said, without the statement and its values."""
    return str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0][:200]


def score(
    entries: Iterable[Entry], bars: Bars, doubted: Container[int] = ()
) -> list[wire.TrackRecordForecast]:
    """Score the rows of one symbol, in the order of writing, by its bars.

    A position is entered from cash at the close of the as-of session and held until the target session, after
    costs and financing; so is the whole capital in shares, beside it. Of ``doubted``, sequences of rows that
    follow a break of the chain, none counts.
    """
    calendar = calendar_for(bars.symbol)
    costs, scored = CostModel(periods_per_year=calendar.sessions_per_year), []
    seen: set[tuple[str, ...]] = set()
    for entry in entries:
        told = entry.forecast
        found = _outcome(entry, bars, costs)
        if found["status"] != "unscored":
            doubt = (
                AFTER_BREAK if entry.sequence in doubted else calendar.hindsight(told.as_of, entry.served_at)
            )
            found |= {} if doubt is None else {"counts": False, "note": doubt}
        key = (told.source, told.model_version, told.as_of, told.target_session)
        found = {"counts": found["status"] != "unscored" and key not in seen, **found}
        seen.update({key} if found["counts"] else ())
        scored.append(wire.TrackRecordForecast(**entry.shown, **found))
    return scored


def _outcome(entry: Entry, bars: Bars, costs: CostModel) -> dict[str, Any]:
    """Return the fields of `TrackRecordForecast` that tell what came."""
    told, index, source = entry.forecast, pd.DatetimeIndex(bars.frame.index), bars.provenance.source
    if not entry.is_intact:
        unreadable = f" (unreadable: {', '.join(entry.unreadable)})" if entry.unreadable else ""
        return {"status": "unscored", "note": CHANGED + unreadable}
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
    groups: dict[tuple[int, str], list[wire.TrackRecordForecast]] = {}
    for row in scored:
        if row.counts:
            groups.setdefault((row.horizon_bars, row.model_id), []).append(row)
    return [_summary(rows) for _, rows in sorted(groups.items())]


def _summary(rows: Sequence[wire.TrackRecordForecast]) -> wire.TrackRecordSummary:
    done = [row for row in rows if row.status == "scored"]
    figures = {name: [v for row in done if (v := getattr(row, of)) is not None] for name, of in MEANS.items()}
    return wire.TrackRecordSummary(
        horizon_bars=rows[0].horizon_bars,
        model_id=rows[0].model_id,
        served=len(rows),
        scored=len(done),
        **{name: float(np.mean(values)) for name, values in figures.items() if values},
    )


def track_record(
    ledger: ForecastLedger, bars_of: Callable[[str], Bars], symbol: str, limit: int
) -> wire.TrackRecord:
    """Return what was served of a symbol, and how it did: a summary of all rows, and the last ``limit``."""
    symbol = normalise_symbol(symbol)
    entries, good, fault = ledger.audit()
    own = [entry for entry in entries if entry.forecast.symbol == symbol]
    scored = score(own, bars_of(symbol), {e.sequence for e in entries[good:]}) if own else []
    notes = [OVERLAP] if own else [f"nothing of {symbol} was served yet"]
    if fault is not None:
        notes.append(f"the ledger is broken: {fault}" + f"; {AFTER_BREAK}" * (good < len(entries)))
    means = summarise(scored)
    return wire.TrackRecord(symbol=symbol, summaries=means, forecasts=scored[-limit:], notes=notes)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m service.ledger", description="Show what was served.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--json", action="store_true", help="print JSON on stdout")
        if name == "verify":
            command.add_argument("--head", metavar="HASH", help="hash that an earlier run printed")
            continue
        command.add_argument("symbol", nargs="?", help="default: every symbol of the ledger")
        if name == "score":
            command.add_argument("--source", help="yahoo, sample or csv:DIR (default: that of each row)")
    return parser


def told_of(args: argparse.Namespace, settings: Settings) -> TableRows:
    """Return the rows of the table that was asked for."""
    ledger = ForecastLedger(settings.database)
    if args.command == "verify":
        rows, head = ledger.verify(args.head)
        return [{"status": "ok", "rows": rows, "head": head}]
    if args.command == "score":
        return scored_rows(ledger, args, settings)
    entries = ledger.entries(None if args.symbol is None else normalise_symbol(args.symbol))
    return [{"sequence": e.sequence, **e.shown} for e in entries]


def scored_rows(ledger: ForecastLedger, wanted: argparse.Namespace, settings: Settings) -> TableRows:
    """Return what became of the forecasts of each symbol, by prices of the source that each was made from."""
    entries, good, fault = ledger.audit()
    if fault is not None:
        logger.warning("the ledger is broken: %s; %s", fault, AFTER_BREAK)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if wanted.symbol is None or entry.shown["symbol"] == normalise_symbol(wanted.symbol):
            groups.setdefault((entry.shown["symbol"], entry.shown["source"]), []).append(entry)
    told, failed = [], []
    for (symbol, name), own in sorted(groups.items()):
        of = {"symbol": symbol, "source": name, "served": len(own)}
        try:
            source = _source_of(name, wanted.source, settings)
            bars = fetch_stock_data(symbol, source=source, cache=BarCache(settings.cache_dir))
        except (UpstreamError, DataError, UsageError) as error:
            failed.append(f"{symbol} of {name}: {error}")
            told.append({**of, "status": f"not scored: {error}"})
            continue
        scored = score(own, bars, {entry.sequence for entry in entries[good:]})
        means = [{**x.model_dump(), "status": "scored" if x.scored else "open"} for x in summarise(scored)]
        why = next((row.note for row in scored if row.note), "")
        told += [{**of, **row} for row in means or [{"status": f"none counts: {why}"}]]
    if failed and len(failed) == len(groups):
        raise UpstreamError(f"nothing could be scored: {'; '.join(failed)}")
    return told


def _source_of(name: str, wanted: str | None, settings: Settings) -> BarSource:
    if wanted is None and name in {"yahoo", "sample"}:
        return make_source(name, cache_dir=settings.cache_dir)
    source = make_source(wanted or settings.source, cache_dir=settings.cache_dir)
    if wanted is None and source.name != name:
        raise UsageError(f"a row does not say where {name} lies: give --source")
    return source


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code that `utils.errors` lists, 4 for a broken chain."""
    args = build_parser().parse_args(argv)
    settings = read_settings()
    configure_logging("WARNING" if args.json else settings.log_level)
    try:
        rows = told_of(args, settings)
    except AIStocksError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    if args.json:
        sys.stdout.write(json.dumps(rows, allow_nan=False) + "\n")
    else:
        names = SHOWN[args.command].split()
        shown = [{SAID_BY_ROW.sub("", name): row.get(name, "") for name in names} for row in rows]
        print_rows(Console(), shown or [{"rows": "none"}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
