"""Named sets with their caveats, panels that fail loudly, and features kept beside the bars."""

import threading
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.cache_manager import BarCache
from data.data_fetcher import CsvSource, SampleSource, fetch_stock_data
from data.feature_engineer import engineer_features
from data.schema import Bars, BarsReport, Provenance, bars_hash
from data.universe import (
    cached_features,
    findings,
    load_panel,
    named_universes,
    refuse_delisted,
    resolve_universe,
    universe_mean,
)
from utils.errors import DataError, InvalidSymbolError, UnknownSymbolError, UsageError


@pytest.fixture
def folder(tmp_path, make_bars):
    for seed, name in enumerate(["AAA", "BBB", "CCC"]):
        table = make_bars(400, seed=seed)
        table.insert(4, "Adj Close", table["Close"])
        table.rename_axis("Date").to_csv(tmp_path / f"{name}.csv")
    return tmp_path


@pytest.mark.parametrize(("name", "size"), [("us50", 50), ("sectors11", 11), ("core5", 5)])
def test_named_sets_have_their_size_and_their_caveat(name, size):
    universe = named_universes()[name]
    assert len(universe.symbols) == len(set(universe.symbols)) == size
    assert isinstance(universe.selected_on, date)
    assert universe.rule
    assert universe.caveat
    assert resolve_universe(name) == universe.symbols
    assert resolve_universe(f" {name} ") == universe.symbols


def test_the_core_is_part_of_the_fifty():
    assert set(resolve_universe("core5")) <= set(resolve_universe("us50"))


@pytest.mark.parametrize(
    ("spec", "symbols"),
    [
        ("aapl", ("AAPL",)),
        ("AAPL,msft, brk.b ,AAPL", ("AAPL", "MSFT", "BRK-B")),
        ("MSFT,,IBM,", ("MSFT", "IBM")),
    ],
)
def test_symbols_joined_by_commas(spec, symbols):
    assert resolve_universe(spec) == symbols


def test_a_file_of_symbols(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\naapl\n\nMSFT  # the other\nAAPL\n")
    assert resolve_universe(str(path)) == ("AAPL", "MSFT")
    path.write_text("# nothing yet\n")
    with pytest.raises(UsageError, match="names no symbol: use us50, sectors11, core5"):
        resolve_universe(str(path))


@pytest.mark.parametrize("spec", ["", " ", ",", "./absent.txt", "absent.txt"])
def test_what_names_nothing_is_refused(spec):
    with pytest.raises(UsageError):
        resolve_universe(spec)


def test_a_symbol_that_is_none_is_refused():
    with pytest.raises(InvalidSymbolError):
        resolve_universe("AAPL,..")


def test_a_panel_keeps_the_order_and_equals_single_readings(folder):
    source = CsvSource(folder)
    panel = load_panel(["ccc", "AAA", "BBB", "AAA"], source, jobs=3)
    assert list(panel) == ["CCC", "AAA", "BBB"]
    for symbol, bars in panel.items():
        assert bars_hash(bars.frame) == bars_hash(fetch_stock_data(symbol, source=source).frame)


def test_a_panel_reads_through_the_cache(folder, tmp_path):
    cache = BarCache(tmp_path / "cache")
    load_panel(["AAA", "BBB"], CsvSource(folder), cache)
    assert [symbol for symbol, _ in cache.entries()] == ["AAA", "BBB"]


def test_a_panel_fails_with_all_its_failures(folder):
    with pytest.raises(UnknownSymbolError, match=r"2 of 3 symbols cannot be loaded: XXX: .*; YYY: "):
        load_panel(["XXX", "AAA", "YYY"], CsvSource(folder))


def test_a_panel_is_bounded_in_memory(folder):
    with pytest.raises(DataError, match="name fewer symbols"):
        load_panel(["AAA", "BBB", "CCC"], CsvSource(folder), max_bytes=2 * 400 * 5 * 8)


def test_a_panel_runs_no_more_threads_than_asked(folder):
    class Counting(CsvSource):
        now = most = 0
        lock = threading.Lock()

        def fetch(self, symbol, *, start=None):
            with self.lock:
                Counting.now += 1
                Counting.most = max(Counting.most, Counting.now)
            try:
                return super().fetch(symbol, start=start)
            finally:
                with self.lock:
                    Counting.now -= 1

    load_panel(["AAA", "BBB", "CCC"], Counting(folder), jobs=1)
    assert Counting.most == 1


# -- features kept beside the bars


class Engineer:
    """A prefix-invariant engineer that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, bars: pd.DataFrame) -> pd.DataFrame:
        self.calls += 1
        returns = np.log(bars["Close"]).diff()
        return pd.DataFrame({"mean_5": returns.rolling(5).mean(), "range": bars["High"] / bars["Low"] - 1.0})


@pytest.fixture
def cache(tmp_path) -> BarCache:
    return BarCache(tmp_path / "cache")


def ibm(until: str):
    moment = datetime.fromisoformat(until).replace(tzinfo=UTC)
    return fetch_stock_data("IBM", source=SampleSource(), now=moment)


def test_features_are_computed_once_and_read_back_to_the_last_bit(cache):
    bars, engineer = ibm("2010-01-05T23:00"), Engineer()
    first = cached_features(bars, cache, engineer, feature_set_hash="a")
    second = cached_features(bars, cache, engineer, feature_set_hash="a")
    assert engineer.calls == 1
    assert bars_hash(first) == bars_hash(second) == bars_hash(engineer(bars.frame))


def test_features_of_longer_bars_equal_a_full_recomputation(cache, caplog):
    engineer = Engineer()
    cached_features(ibm("2010-01-05T23:00"), cache, engineer, feature_set_hash="a")
    longer = ibm("2010-03-05T23:00")
    extended = cached_features(longer, cache, engineer, feature_set_hash="a")
    assert bars_hash(extended) == bars_hash(engineer(longer.frame))
    assert len(cache.load("features", "IBM", "sample").frame) == len(longer.frame)
    assert "look-ahead" not in caplog.text


def test_a_feature_that_peeks_is_pointed_at(cache, caplog):
    def peeking(bars: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"next": bars["Close"].shift(-1) / bars["Close"]})

    cached_features(ibm("2010-01-05T23:00"), cache, peeking, feature_set_hash="a")
    longer = ibm("2010-03-05T23:00")
    got = cached_features(longer, cache, peeking, feature_set_hash="a")
    assert "a look-ahead" in caplog.text
    assert bars_hash(got) == bars_hash(peeking(longer.frame))


@pytest.mark.parametrize("other", [{"feature_set_hash": "b"}, {"feature_set_hash": "a", "horizon_bars": 5}])
def test_another_feature_set_or_horizon_is_computed_anew(cache, other):
    bars, engineer = ibm("2010-01-05T23:00"), Engineer()
    cached_features(bars, cache, engineer, feature_set_hash="a")
    cached_features(bars, cache, engineer, **other)
    assert engineer.calls == 2
    assert cache.load("features", "IBM", "sample").meta.feature_set_hash == other["feature_set_hash"]


def test_a_flipped_byte_in_the_features_is_never_read(cache, tmp_path):
    bars, engineer = ibm("2010-01-05T23:00"), Engineer()
    good = cached_features(bars, cache, engineer, feature_set_hash="a")
    path = next((tmp_path / "cache").rglob("features-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert bars_hash(cached_features(bars, cache, engineer, feature_set_hash="a")) == bars_hash(good)
    assert engineer.calls == 2


def test_the_real_features_survive_the_cache(cache):
    engineering = pytest.importorskip("data.feature_engineer")
    until, longer = ibm("2010-01-05T23:00"), ibm("2012-01-05T23:00")
    key = engineering.feature_set_hash()
    for bars in (until, until, longer):
        kept = cached_features(
            bars, cache, engineering.engineer_features, feature_set_hash=key, horizon_bars=5
        )
        assert bars_hash(kept) == bars_hash(engineering.engineer_features(bars.frame))


def as_bars(frame: pd.DataFrame) -> Bars:
    seen = Provenance(
        source="yahoo", fetched_at=datetime(2010, 1, 1, tzinfo=UTC), last_session=frame.index[-1], stale=True
    )
    return Bars(symbol="AAPL", frame=frame, provenance=seen, report=BarsReport())


def test_what_stopped_trading_is_not_trained(make_bars):
    bars = as_bars(make_bars(n=100))
    last = bars.frame.index[-1]
    refuse_delisted(bars, (last + pd.Timedelta(days=10)).tz_localize("UTC").to_pydatetime())
    with pytest.raises(DataError, match=r"no bar since .* delisted .* --source csv:DIR"):
        refuse_delisted(bars, (last + pd.Timedelta(days=30)).tz_localize("UTC").to_pydatetime())


def test_findings_keep_the_features_and_notice_when_those_of_the_past_change(
    make_bars, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    cache, bars = BarCache(tmp_path), make_bars(n=720)
    first = findings(as_bars(bars.iloc[:690]), 5, cache)
    assert findings(as_bars(bars.iloc[:690]), 5) == first
    assert findings(as_bars(bars.iloc[:700]), 5, cache) is not None
    assert "look-ahead" not in caplog.text
    monkeypatch.setattr(
        "data.universe.engineer_features", lambda frame: engineer_features(frame) + len(frame)
    )
    findings(as_bars(bars), 5, cache)
    assert "look-ahead" in caplog.text


# -- the mean of a universe


def test_the_mean_grows_by_the_mean_return(make_bars):
    frames = {name: make_bars(n=50, seed=seed) for seed, name in enumerate(["AAA", "BBB"])}
    close = universe_mean(frames)["Close"]
    assert close.iloc[0] == 1.0
    mean = sum(np.log(frame["Close"]).diff() for frame in frames.values()) / 2
    np.testing.assert_allclose(np.log(close).diff().iloc[1:], mean.iloc[1:], rtol=1e-9, atol=1e-14)


def test_a_symbol_that_joins_or_pauses_makes_no_jump(make_bars):
    one, late = make_bars(n=60), make_bars(n=60, seed=1) * 1000.0
    close = universe_mean({"AAA": one, "BBB": late.iloc[30:].drop(late.index[40])})["Close"]
    assert list(close.index) == list(one.index)
    returns = np.log(close).diff()
    own = np.log(one["Close"]).diff()
    for row in (*range(1, 31), 40):
        assert returns.iloc[row] == pytest.approx(own.iloc[row], abs=1e-12)
    over_the_pause = np.log(late["Close"].iloc[41] / late["Close"].iloc[39])
    assert returns.iloc[41] == pytest.approx((own.iloc[41] + over_the_pause) / 2, abs=1e-12)


def test_the_mean_knows_nothing_of_later_bars(make_bars):
    frames = {name: make_bars(n=120, seed=seed) for seed, name in enumerate(["AAA", "BBB", "CCC"])}
    whole = universe_mean(frames)
    for cut in (1, 2, 57, 119):
        part = universe_mean({name: frame.iloc[:cut] for name, frame in frames.items()})
        assert bars_hash(part) == bars_hash(whole.iloc[:cut])


def test_the_mean_needs_symbols_that_close_together(make_bars):
    with pytest.raises(UsageError, match="no symbol"):
        universe_mean({})
    with pytest.raises(UsageError, match=r"close together, these follow 24/7, XNYS"):
        universe_mean({"AAPL": make_bars(n=30), "BTC-USD": make_bars(n=30)})


def test_a_universe_file_that_is_no_text_is_a_usage_error_and_a_byte_order_mark_is_not_a_symbol(tmp_path):
    junk = tmp_path / "junk.txt"
    junk.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="not a text file"):
        resolve_universe(str(junk))
    marked = tmp_path / "marked.txt"
    marked.write_bytes("\ufeffAAPL\nMSFT\n".encode())
    assert resolve_universe(str(marked)) == ("AAPL", "MSFT")
