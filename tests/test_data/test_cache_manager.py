"""The cache: what it keeps, when it asks, what it refuses; and no flipped byte is ever read as a price."""

import json
import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import cache_manager
from data.cache_manager import (
    BarCache,
    CorruptTableError,
    TableMeta,
    build_parser,
    decode_table,
    encode_table,
    join_raw,
    main,
    priced_rows,
    seal,
    unseal,
)
from data.data_fetcher import CsvSource, fetch_stock_data
from data.schema import RAW_COLUMNS, bars_hash, calendar_for
from data.target_engineering import load_panel
from utils.base import DataError, LockedError, StorageError, UnknownSymbolError, UpstreamError

FLIPS = 200


@dataclass
class LiveSource:
    """A fake of a live source: it knows ``table`` and fails with ``error`` when told to."""

    table: pd.DataFrame | None
    name: str = "yahoo"
    is_live: bool = True
    news: None = None
    error: Exception | None = None
    delay_s: float = 0.0
    asked: list[date | None] = field(default_factory=list)

    def fetch(self, symbol: str, *, start: date | None = None) -> pd.DataFrame:
        self.asked.append(start)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        if self.table is None or self.table.empty:
            raise UnknownSymbolError(f"nobody knows {symbol}")
        return self.table if start is None else self.table.loc[self.table.index >= pd.Timestamp(start)]


@pytest.fixture
def raw(make_bars) -> pd.DataFrame:
    table = make_bars(500, seed=11)
    table.insert(4, "Adj Close", table["Close"])
    return table


@pytest.fixture
def cache(tmp_path) -> BarCache:
    return BarCache(tmp_path / "cache")


def after(session: pd.Timestamp, hours: float = 23.0) -> datetime:
    return session.to_pydatetime().replace(tzinfo=UTC) + timedelta(hours=hours)


def files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "bars").rglob("*") if path.is_file())


def frame_of(cache, source, now, **options):
    return fetch_stock_data("AAPL", source=source, cache=cache, now=now, **options)


# -- asking and not asking


def test_a_second_reading_asks_nobody(cache, raw):
    source, now = LiveSource(raw), after(raw.index[-1])
    first = frame_of(cache, source, now)
    second = frame_of(cache, source, now + timedelta(hours=2))
    assert source.asked == [None]
    assert bars_hash(first.frame) == bars_hash(second.frame)
    assert bars_hash(first.frame) == bars_hash(fetch_stock_data("AAPL", source=source, now=now).frame)
    assert second.provenance.fetched_at == now
    assert not second.provenance.stale


def test_new_sessions_are_fetched_with_an_overlap_and_appended(cache, raw):
    source = LiveSource(raw.iloc[:490])
    frame_of(cache, source, after(raw.index[489]))
    source.table = raw
    bars = frame_of(cache, source, after(raw.index[-1]))
    assert source.asked == [None, raw.index[480].date()]
    assert bars_hash(bars.frame) == bars_hash(fetch_stock_data("AAPL", source=source).frame)
    assert not bars.provenance.stale


@pytest.mark.parametrize(
    "readjust",
    [
        lambda table: table.assign(
            **{name: table[name] / 4 for name in ("Open", "High", "Low", "Close", "Adj Close")}
        ),
        lambda table: table.assign(**{"Adj Close": table["Adj Close"] * 0.995}),
        lambda table: table.assign(Close=table["Close"].where(table.index != table.index[485], table["Low"])),
    ],
    ids=["split", "dividend", "a corrected close"],
)
def test_a_readjusted_history_is_fetched_whole(cache, raw, readjust):
    source = LiveSource(raw.iloc[:490])
    frame_of(cache, source, after(raw.index[489]))
    source.table = readjust(raw)
    bars = frame_of(cache, source, after(raw.index[-1]))
    assert source.asked == [None, raw.index[480].date(), None]
    assert bars_hash(bars.frame) == bars_hash(fetch_stock_data("AAPL", source=source).frame)
    assert bars.frame["Close"].pct_change().abs().max() < 0.3, "no return was made by the seam"


def test_the_overlap_check_is_what_catches_the_split(cache, raw, monkeypatch):
    """Planted fault: a cache that accepts any overlap makes a return of -75 %."""
    monkeypatch.setattr(cache_manager, "PRICE_TOLERANCE", 1e9)
    source = LiveSource(raw.iloc[:490])
    frame_of(cache, source, after(raw.index[489]))
    prices = ["Open", "High", "Low", "Close", "Adj Close"]
    source.table = raw.assign(**{name: raw[name] / 4 for name in prices})
    assert frame_of(cache, source, after(raw.index[-1])).frame["Close"].pct_change().min() < -0.7


def test_a_session_that_was_missing_is_filled_by_the_overlap(cache, raw):
    source = LiveSource(raw.iloc[:490].drop(raw.index[485]))
    frame_of(cache, source, after(raw.index[489]))
    source.table = raw
    assert frame_of(cache, source, after(raw.index[-1])).report.missing_sessions == 0


def test_the_bar_of_an_open_session_is_not_kept(cache, raw):
    source = LiveSource(raw.iloc[:490])
    noon = after(raw.index[489], hours=17.0)
    assert frame_of(cache, source, noon).frame.index[-1] == raw.index[488]
    assert cache.load("bars", "AAPL", "yahoo").frame.index[-1] == raw.index[488]
    forming = raw.iloc[:490].copy()
    forming.iloc[-1, :5] *= 1.01
    source.table = forming
    closed = frame_of(cache, source, after(raw.index[489]))
    assert closed.frame["Close"].iloc[-1] == pytest.approx(forming["Close"].iloc[-1])


def test_a_source_with_nothing_newer_is_left_alone_for_a_while(cache, raw):
    source, late = LiveSource(raw), after(raw.index[-1]) + timedelta(days=30)
    assert frame_of(cache, source, late).provenance.stale
    frame_of(cache, source, late + timedelta(minutes=10))
    assert len(source.asked) == 1
    frame_of(cache, source, late + timedelta(minutes=20))
    assert len(source.asked) == 2


def test_a_close_in_between_is_a_reason_to_ask_again(cache, raw):
    source = LiveSource(raw.iloc[:489])
    frame_of(cache, source, after(raw.index[489], hours=20.9))
    source.table = raw.iloc[:490]
    # 16:00 in New York is 21:00 UTC in winter.
    assert frame_of(cache, source, after(raw.index[489], hours=21.0)).frame.index[-1] == raw.index[489]


def test_force_refresh_fetches_the_whole(cache, raw):
    source, now = LiveSource(raw), after(raw.index[-1])
    frame_of(cache, source, now)
    frame_of(cache, source, now, force_refresh=True)
    assert source.asked == [None, None]


# -- failing sources


def test_a_failing_source_beside_a_cache_serves_stale_bars(cache, raw, caplog):
    source = LiveSource(raw.iloc[:490])
    kept = frame_of(cache, source, after(raw.index[489]))
    source.error = UpstreamError("down")
    bars = frame_of(cache, source, after(raw.index[-1]))
    assert bars.provenance.stale
    assert bars.provenance.fetched_at == kept.provenance.fetched_at
    assert bars_hash(bars.frame) == bars_hash(kept.frame)
    assert "serving cached bars" in caplog.text
    forced = frame_of(cache, source, after(raw.index[489]), force_refresh=True)
    assert forced.provenance.stale, "asked in vain"


def test_a_failing_source_without_a_cache_fails_and_leaves_nothing(cache, tmp_path):
    source = LiveSource(None, error=UpstreamError("down"))
    with pytest.raises(UpstreamError, match="down"):
        frame_of(cache, source, after(pd.Timestamp("2024-06-14")))
    assert not (tmp_path / "cache" / "bars").exists()


def test_a_failure_is_remembered_for_a_while_and_not_for_ever(cache, raw, monkeypatch):
    source, now = LiveSource(raw, error=UpstreamError("down")), after(raw.index[-1])
    for _ in range(5):
        with pytest.raises(UpstreamError):
            frame_of(cache, source, now)
    assert len(source.asked) == 1
    source.error = None
    monkeypatch.setattr(cache_manager, "REMEMBER_FAILURE_S", 0.0)
    assert len(frame_of(cache, source, now).frame) == 500


def test_an_unknown_symbol_is_unknown_and_a_known_one_is_upstream(cache, raw, tmp_path):
    now = after(raw.index[-1])
    with pytest.raises(UnknownSymbolError):
        frame_of(cache, LiveSource(None), now)
    cache = BarCache(tmp_path / "cache")
    frame_of(cache, LiveSource(raw.iloc[:490]), after(raw.index[489]))
    assert frame_of(cache, LiveSource(None), now).provenance.stale
    for path in files(tmp_path / "cache"):
        path.write_bytes(b"<html>")
    with pytest.raises(UpstreamError) as caught:
        frame_of(BarCache(tmp_path / "cache"), LiveSource(None), now)
    assert not isinstance(caught.value, UnknownSymbolError)


@pytest.mark.parametrize(
    "worse",
    [
        lambda table: table.iloc[300:],
        lambda table: table.iloc[:480],
        lambda table: table.assign(Close=np.nan),
        lambda table: table.assign(Low=-1.0),
        lambda table: table.set_axis(table.index + pd.Timedelta(days=1)),
        lambda table: table.iloc[:0],
    ],
    ids=["short", "ends earlier", "no prices", "impossible", "other dates", "empty"],
)
def test_a_worse_answer_never_replaces_a_good_cache(cache, raw, worse, tmp_path):
    source, now = LiveSource(raw), after(raw.index[-1])
    good = frame_of(cache, source, now)
    before = [path.read_bytes() for path in files(tmp_path / "cache")]
    source.table = worse(raw)
    bars = frame_of(cache, source, now, force_refresh=True)
    assert bars.provenance.stale
    assert bars_hash(bars.frame) == bars_hash(good.frame)
    assert [path.read_bytes() for path in files(tmp_path / "cache")] == before


def test_an_answer_that_cannot_be_used_is_not_kept(cache, raw, tmp_path):
    with pytest.raises(DataError, match="impossible prices"):
        frame_of(cache, LiveSource(raw.assign(Low=-1.0)), after(raw.index[-1]))
    assert not (tmp_path / "cache" / "bars").exists()


# -- sources that are files


def test_a_changed_file_is_read_again(cache, raw, tmp_path):
    raw.rename_axis("Date").iloc[:400].to_csv(tmp_path / "AAPL.csv")
    source = CsvSource(tmp_path)
    assert len(fetch_stock_data("AAPL", source=source, cache=cache).frame) == 400
    raw.rename_axis("Date").to_csv(tmp_path / "AAPL.csv")
    assert len(fetch_stock_data("AAPL", source=source, cache=cache).frame) == 500
    (tmp_path / "AAPL.csv").unlink()
    with pytest.raises(UnknownSymbolError):
        fetch_stock_data("AAPL", source=source, cache=cache)


def test_a_past_moment_does_not_shorten_what_is_kept_of_a_file(cache, raw, tmp_path):
    raw.rename_axis("Date").to_csv(tmp_path / "AAPL.csv")
    source = CsvSource(tmp_path)
    past = fetch_stock_data("AAPL", source=source, cache=cache, now=after(raw.index[99]))
    assert len(past.frame) == 100
    assert len(fetch_stock_data("AAPL", source=source, cache=cache).frame) == 500


# -- corruption


def test_every_flipped_byte_is_caught_and_the_bars_fetched_again(cache, raw, tmp_path):
    source, now = LiveSource(raw), after(raw.index[-1])
    good = bars_hash(frame_of(cache, source, now).frame)
    rng = np.random.default_rng(27)
    caught = 0
    for flip in range(FLIPS):
        stored = [path for path in files(tmp_path / "cache") if path.parent.name != "quarantine"]
        sizes = np.array([path.stat().st_size for path in stored])
        path = stored[rng.choice(len(stored), p=sizes / sizes.sum())] if rng.random() < 0.8 else stored[-1]
        whole = path.read_bytes()
        content = bytearray(whole)
        position = int(rng.integers(len(content)))
        content[position] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(content))
        with pytest.raises(CorruptTableError):
            cache.load("bars", "AAPL", "yahoo")
        caught += 1
        if flip % 20:
            path.write_bytes(whole)
        else:
            assert bars_hash(frame_of(cache, source, now).frame) == good
    assert caught == FLIPS
    assert len(source.asked) == 1 + FLIPS // 20


def test_page_checksums_alone_would_catch_a_flip_in_the_values(cache, raw):
    content = bytearray(encode_table(raw))
    content[len(content) // 3] ^= 0x10
    with pytest.raises(OSError, match="CRC checksum"):
        decode_table(bytes(content))


@pytest.mark.parametrize("spoil", ["truncate", "empty", "html", "no table", "no description"])
def test_a_spoiled_file_is_quarantined_and_fetched_again(cache, raw, tmp_path, spoil):
    source, now = LiveSource(raw), after(raw.index[-1])
    good = bars_hash(frame_of(cache, source, now).frame)
    table = next(path for path in files(tmp_path / "cache") if path.suffix == ".parquet")
    if spoil == "truncate":
        table.write_bytes(table.read_bytes()[:-100])
    elif spoil == "empty":
        table.write_bytes(b"")
    elif spoil == "html":
        table.write_bytes(b"<html>503</html>")
    elif spoil == "no table":
        table.unlink()
    else:
        (table.parent / "bars.json").unlink()
    assert bars_hash(frame_of(cache, source, now).frame) == good
    assert len(source.asked) == 2
    assert (table.parent / "quarantine").exists() == (spoil != "no description")
    assert frame_of(cache, source, now) is not None
    assert len(source.asked) == 2


def test_a_table_swapped_for_that_of_another_symbol_is_caught(cache, raw, tmp_path):
    source, now = LiveSource(raw), after(raw.index[-1])
    frame_of(cache, source, now)
    fetch_stock_data("MSFT", source=LiveSource(raw * 2.0), cache=cache, now=now)
    ours, theirs = (
        next((tmp_path / "cache/bars/yahoo" / name).glob("*.parquet")) for name in ("AAPL", "MSFT")
    )
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(CorruptTableError):
        cache.load("bars", "AAPL", "yahoo")


def test_another_schema_version_rebuilds_itself(cache, raw, monkeypatch):
    source, now = LiveSource(raw), after(raw.index[-1])
    frame_of(cache, source, now)
    monkeypatch.setattr(cache_manager, "SCHEMA_VERSION", 2)
    assert cache.load("bars", "AAPL", "yahoo") is None
    frame_of(cache, source, now)
    assert len(source.asked) == 2


def test_a_crash_between_table_and_description_leaves_the_old_pair(cache, raw, monkeypatch):
    source = LiveSource(raw.iloc[:490])
    old = frame_of(cache, source, after(raw.index[489]))
    source.table = raw
    replace = Path.replace

    def crash(self, target):
        if Path(target).name == "bars.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(StorageError, match="No space left on device"):
            frame_of(cache, source, after(raw.index[-1]))
    kept = cache.load("bars", "AAPL", "yahoo")
    assert len(kept.frame) == len(old.frame)
    assert len(frame_of(cache, source, after(raw.index[-1])).frame) == 500
    folder = cache._folder("AAPL", "yahoo")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".parquet"], "nothing is left over"


# -- many at once


def test_many_threads_make_one_flight(cache, raw):
    source, now = LiveSource(raw, delay_s=0.1), after(raw.index[-1])
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda: got.append(bars_hash(frame_of(cache, source, now).frame)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(source.asked) == 1
    assert len(got) == 8
    assert len(set(got)) == 1


def test_many_threads_share_one_failure(cache):
    source, now = (
        LiveSource(None, error=UpstreamError("down"), delay_s=0.1),
        after(pd.Timestamp("2024-06-14")),
    )
    failures: list[str] = []

    def ask() -> None:
        try:
            frame_of(cache, source, now)
        except UpstreamError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(source.asked) == 1
    assert failures == ["down"] * 8


def _write_many(root: Path, table: pd.DataFrame, first: int) -> None:
    cache = BarCache(root)
    for rows in range(first, 500, 4):
        source = LiveSource(table.iloc[:rows])
        cache.read_through("AAPL", source, now=after(table.index[rows - 1]), force_refresh=True)


def test_two_processes_never_show_a_reader_half_a_table(tmp_path, raw):
    source = LiveSource(raw.iloc[:400])
    cache = BarCache(tmp_path)
    cache.read_through("AAPL", source, now=after(raw.index[399]))
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds
    writers = [context.Process(target=_write_many, args=(tmp_path, raw, first)) for first in (440, 442)]
    for writer in writers:
        writer.start()
    readings = 0
    while any(writer.is_alive() for writer in writers):
        frame = cache.load("bars", "AAPL", "yahoo").frame
        assert bars_hash(frame) == bars_hash(raw.iloc[: len(frame)])
        readings += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert readings > 10


def test_symbols_that_nobody_knows_leave_a_bounded_number_of_files(tmp_path):
    cache, now = BarCache(tmp_path), after(pd.Timestamp("2024-06-14"))
    for number in range(300):
        with pytest.raises(UnknownSymbolError):
            fetch_stock_data(f"X{number}", source=LiveSource(None), cache=cache, now=now)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 0 < len(left) <= 256
    assert {path.parent.name for path in left} == {"locks"}


def test_symbols_that_share_a_lock_take_turns(tmp_path, raw):
    cache, now = BarCache(tmp_path), after(raw.index[-1])
    symbols, seen = [], {}
    for symbol in (f"X{number}" for number in range(300)):
        with cache.locked(symbol, "yahoo"):
            pass
        new = {path.name for path in (tmp_path / "locks").iterdir()} - set(seen)
        symbols += [] if new else [symbol]
        seen |= dict.fromkeys(new, symbol)
        if len(symbols) == 10:
            break
    assert symbols, "by the pigeonhole some share"
    source = LiveSource(raw, delay_s=0.001)
    some = [*list(seen.values())[:20], *symbols[:10]]
    assert load_panel(some, partial(fetch_stock_data, source=source, cache=cache, now=now), 30)[1] == {}
    assert sorted(symbol for symbol, _ in cache.entries()) == sorted(some)


def test_a_lock_that_is_held_too_long_is_named(cache, raw, monkeypatch):
    monkeypatch.setattr(cache_manager, "LOCK_TIMEOUT_S", 0.05)
    with cache.locked("AAPL", "yahoo"), pytest.raises(LockedError, match="takes too long"):
        frame_of(cache, LiveSource(raw), after(raw.index[-1]))


def test_a_disk_that_refuses_is_named(tmp_path, raw):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        frame_of(BarCache(tmp_path / "cache"), LiveSource(raw), after(raw.index[-1]))


def test_a_table_that_may_not_be_read_is_named(cache, raw, monkeypatch):
    source, now = LiveSource(raw), after(raw.index[-1])
    frame_of(cache, source, now)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"cannot be read \(Permission denied"):
        frame_of(cache, source, now)


def test_symbols_and_sources_do_not_mix(cache, raw):
    now = after(raw.index[-1])
    frame_of(cache, LiveSource(raw), now)
    frame_of(cache, LiveSource(raw * 2.0, name="csv:../odd name"), now)
    assert cache.entries() == [("AAPL", "csv:../odd name"), ("AAPL", "yahoo")]
    assert cache.load("bars", "AAPL", "yahoo").frame["Close"].iloc[0] == raw["Close"].iloc[0]


# -- command line


def cli(capsys, *arguments: str) -> tuple[int, list[dict]]:
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else []


def test_info_refresh_clear(capsys, tmp_path, raw):
    raw.drop(raw.index[[50, 60]]).rename_axis("Date").to_csv(tmp_path / "AAPL.csv")
    where = ("--source", f"csv:{tmp_path}", "--cache-dir", str(tmp_path / "cache"))
    assert cli(capsys, "info", "AAPL", *where) == (
        0,
        [{"symbol": "AAPL", "source": f"csv:{tmp_path.name}", "state": "absent"}],
    )
    code, (refreshed,) = cli(capsys, "refresh", "aapl", *where)
    assert code == 0
    assert (refreshed["rows"], refreshed["gaps"], refreshed["state"]) == (498, 2, "stale")
    assert (refreshed["first_session"], refreshed["last_session"]) == (
        f"{raw.index[0]:%Y-%m-%d}",
        f"{raw.index[-1]:%Y-%m-%d}",
    )
    code, (shown,) = cli(capsys, "info", *where)
    assert shown == refreshed
    table = next((tmp_path / "cache").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-1])
    assert cli(capsys, "info", *where)[1][0]["state"] == "corrupt"
    assert cli(capsys, "refresh", "AAPL", *where)[1][0]["state"] == "stale"
    assert cli(capsys, "clear", "AAPL", *where)[1][0]["state"] == "cleared"
    assert cli(capsys, "clear", "AAPL", *where)[1][0]["state"] == "absent"
    assert cli(capsys, "info", *where) == (0, [])


def test_the_command_line_ends_with_the_code_of_the_error(capsys, tmp_path):
    where = ("--cache-dir", str(tmp_path / "cache"))
    assert main(["refresh", "TSLA", "--source", "sample", *where]) == 3
    assert "the source sample has no TSLA" in capsys.readouterr().err
    assert main(["refresh", "../x", "--source", "sample", *where]) == 2
    assert main(["refresh", "AAPL", "--source", "bloomberg", *where]) == 2
    assert not (tmp_path / "cache" / "bars").exists()


def test_the_sample_is_not_stale(capsys, tmp_path):
    where = ("--source", "sample", "--cache-dir", str(tmp_path))
    assert cli(capsys, "refresh", "IBM", *where)[1][0]["state"] == "ok"


def test_the_table_for_people(capsys, tmp_path):
    where = ("--source", "sample", "--cache-dir", str(tmp_path))
    assert main(["refresh", "IBM", *where]) == 0
    out = capsys.readouterr().out
    assert "IBM" in out
    assert "2013-03-01" in out


def test_settings_name_source_and_place(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AI_STOCKS_SOURCE", "sample")
    monkeypatch.setenv("AI_STOCKS_CACHE_DIR", str(tmp_path))
    assert cli(capsys, "refresh", "IBM")[1][0]["source"] == "sample"
    assert (tmp_path / "bars" / "sample" / "IBM").is_dir()
    assert build_parser().parse_args(["info"]).symbols == []


def test_a_refresh_that_fails_beside_a_cache_is_a_failure(capsys, tmp_path, raw, monkeypatch):
    source = LiveSource(raw)
    BarCache(tmp_path).read_through("AAPL", source, now=after(raw.index[-1]))
    source.error = UpstreamError("down")
    monkeypatch.setattr("data.cache_manager.make_source", lambda *args, **kwargs: source)
    assert main(["refresh", "AAPL", "--cache-dir", str(tmp_path)]) == 3
    assert "down" in capsys.readouterr().err
    assert len(BarCache(tmp_path).load("bars", "AAPL", "yahoo").frame) == 500


def test_the_calendar_of_the_fixture_is_the_calendar_of_the_cache(raw):
    assert len(calendar_for("AAPL").missing(raw.index)) == 0
    assert TableMeta.model_fields["schema_version"].default == 1


# -- tables on disk, and how they are joined


def test_a_table_survives_the_disk_to_the_last_bit(raw):
    table = raw.assign(High=raw["High"].where(raw.index != raw.index[3]))
    back = decode_table(encode_table(table))
    assert bars_hash(back) == bars_hash(table)
    assert tuple(back.columns) == RAW_COLUMNS


def test_a_seal_breaks_at_every_byte():
    meta = TableMeta(
        symbol="AAPL",
        source="yahoo",
        last_session=date(2024, 1, 2),
        fetched_at=datetime(2024, 1, 3, tzinfo=UTC),
        file="bars-0123456789abcdef.parquet",
    )
    sealed = seal(meta)
    assert unseal(sealed) == meta
    for position in range(len(sealed)):
        flipped = bytearray(sealed)
        flipped[position] ^= 0x01
        with pytest.raises(CorruptTableError):
            unseal(bytes(flipped))
    with pytest.raises(CorruptTableError):
        unseal(sealed[:-4])
    assert unseal(seal(meta.model_copy(update={"schema_version": 0}))) is None


def test_priced_rows_are_complete_unique_and_ascending(raw):
    spoiled = pd.concat([raw.iloc[10:], raw.iloc[:10], raw.iloc[[3]].assign(Open=np.nan)])
    pd.testing.assert_frame_equal(priced_rows(spoiled), raw, check_freq=False)


def test_tables_join_where_they_agree(raw):
    joined = join_raw(raw.iloc[:200], raw.iloc[190:], tolerance=1e-6)
    pd.testing.assert_frame_equal(joined, raw, check_freq=False)


@pytest.mark.parametrize(
    "other",
    [
        lambda raw: raw.iloc[190:].assign(Close=raw["Close"].iloc[190:] * 0.5),  # split
        lambda raw: raw.iloc[190:].assign(**{"Adj Close": raw["Adj Close"].iloc[190:] * 0.9998}),  # dividend
        lambda raw: raw.drop(raw.index[195]).iloc[190:],  # lost a session
        lambda raw: raw.iloc[205:],  # shares none
        lambda raw: raw.iloc[:0],
    ],
)
def test_tables_that_disagree_do_not_join(raw, other):
    assert join_raw(raw.iloc[:200], other(raw), tolerance=1e-5) is None
