"""Targets against plain formulas, what is known when, and the panel that learners read."""

import threading
import time
import tomllib
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import target_engineering
from data.data_fetcher import CsvSource, fetch_stock_data
from data.feature_engineer import MAX_WARMUP_BARS, engineer_features, get_feature_columns
from data.indicators import MIN_SIGMA_LOG
from data.schema import bars_hash
from data.target_engineering import (
    DEFAULT_HORIZON_BARS,
    HAR_SPANS_BARS,
    HAR_WEIGHTS,
    UNIVERSES_FILE,
    Dataset,
    build_dataset,
    daily_volatility_log,
    load_panel,
    make_target,
    rescale_sigma,
    resolve_universe,
    universe_mean,
)
from utils.base import (
    DataError,
    InsufficientDataError,
    InvalidSymbolError,
    UnknownSymbolError,
    UsageError,
)

MakeBars = Callable[..., pd.DataFrame]
TARGETS = ("target_log", "target_scaled", "label_end")


# --- volatility ------------------------------------------------------------------------------------


def slow_volatility(bars: pd.DataFrame) -> np.ndarray:
    logs = np.log(bars)
    overnight = (logs["Open"] - logs["Close"].shift()).fillna(0.0)
    body, span = logs["Close"] - logs["Open"], logs["High"] - logs["Low"]
    ranged = overnight**2 + 0.5 * span**2 - (2 * np.log(2) - 1) * body**2
    squared = (logs["Close"].diff() ** 2).fillna(ranged)
    means = [ranged.ewm(span=span_bars, adjust=True).mean() for span_bars in HAR_SPANS_BARS]
    blend = sum(weight * mean for weight, mean in zip(HAR_WEIGHTS, means, strict=True))
    ratio = (squared.ewm(span=HAR_SPANS_BARS[-1]).mean() / means[-1]).clip(0.5, 2.0)
    return np.sqrt(blend * 0.5 * (1.0 + ratio)).to_numpy()


def test_volatility_is_its_formula(make_bars: MakeBars) -> None:
    bars = make_bars(n=700, seed=4)
    np.testing.assert_allclose(daily_volatility_log(bars), slow_volatility(bars), rtol=1e-9)
    assert sum(HAR_WEIGHTS) == pytest.approx(1.0)


def test_variances_add_up() -> None:
    assert rescale_sigma(np.array([0.02]), from_bars=1, to_bars=25)[0] == pytest.approx(0.10)


def test_volatility_follows_the_volatility(make_bars: MakeBars) -> None:
    for vol in (0.005, 0.015, 0.04):
        estimate = daily_volatility_log(make_bars(n=1500, seed=6, vol=vol)).iloc[300:]
        assert estimate.mean() == pytest.approx(vol, rel=0.25)


def test_volatility_of_a_halted_stock_is_floored(make_bars: MakeBars) -> None:
    bars = make_bars(n=900)
    bars.iloc[:, :4] = 100.1
    assert (daily_volatility_log(bars) == MIN_SIGMA_LOG).all()


def test_volatility_needs_no_volume_and_no_scale(make_bars: MakeBars) -> None:
    bars = make_bars(n=400)
    scaled = daily_volatility_log(bars.assign(Volume=0.0) * 1000)
    np.testing.assert_allclose(scaled, daily_volatility_log(bars), rtol=1e-9)


def volatility_prefix_gap(volatility: Callable[[pd.DataFrame], pd.Series], bars: pd.DataFrame) -> int:
    full = np.array(volatility(bars))
    return sum(
        int((np.array(volatility(bars.iloc[:cut])) != full[:cut]).sum()) for cut in range(1, len(bars), 17)
    )


def test_volatility_is_known_at_its_bar_to_the_last_bit(make_bars: MakeBars) -> None:
    bars = make_bars(n=500, seed=8)
    assert volatility_prefix_gap(daily_volatility_log, bars) == 0

    def peeking(part: pd.DataFrame) -> pd.Series:
        return daily_volatility_log(part).shift(-1).ffill()

    assert volatility_prefix_gap(peeking, bars) > 0


# --- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 5, 10, 20, 33])
def test_target_is_the_return_to_come(horizon: int, make_bars: MakeBars) -> None:
    bars = make_bars(n=300, seed=2)
    target = make_target(bars, horizon)
    log_close = np.log(bars["Close"])
    expected = log_close.shift(-horizon) - log_close
    np.testing.assert_allclose(target["target_log"], expected, atol=1e-13)
    np.testing.assert_allclose(target["sigma_log"], daily_volatility_log(bars) * np.sqrt(horizon))
    np.testing.assert_allclose(target["target_scaled"], target["target_log"] / target["sigma_log"])
    pd.testing.assert_index_equal(target.index, bars.index)
    assert target[list(TARGETS)].iloc[-horizon:].isna().all(axis=None)
    assert target.notna().iloc[:-horizon].all(axis=None)
    assert target["sigma_log"].notna().all()


def test_label_end_is_the_session_at_which_the_target_is_known(make_bars: MakeBars) -> None:
    bars = make_bars(n=100)
    target = make_target(bars, 5)
    assert target["label_end"].iloc[10] == bars.index[15]
    for row in (0, 40, 94):
        end = target["label_end"].iloc[row]
        known = make_target(bars.loc[:end], 5)["target_log"].iloc[row]
        a_bar_before = make_target(bars.loc[:end].iloc[:-1], 5)["target_log"].iloc[row]
        assert known == target["target_log"].iloc[row]
        assert np.isnan(a_bar_before)


def test_the_default_horizon_is_five_bars(make_bars: MakeBars) -> None:
    bars = make_bars(n=60)
    pd.testing.assert_frame_equal(make_target(bars), make_target(bars, DEFAULT_HORIZON_BARS))
    assert DEFAULT_HORIZON_BARS == 5


def test_history_shorter_than_the_horizon_has_no_target(make_bars: MakeBars) -> None:
    target = make_target(make_bars(n=3), 5)
    assert len(target) == 3
    assert target["target_log"].isna().all()


@pytest.mark.parametrize("horizon", [0, -1, 253, 1.5, True, "5", None])
def test_a_horizon_that_is_none_is_refused(horizon: object, make_bars: MakeBars) -> None:
    with pytest.raises(UsageError, match="from 1 to 252") as error:
        make_target(make_bars(n=60), horizon)
    assert repr(horizon) in str(error.value)


def test_scaled_targets_of_real_bars_have_unit_size_and_no_memory_of_their_size(market_dir: Path) -> None:
    raw_memory, scaled_memory, sizes = [], [], []
    for symbol in ("AAPL", "SPY", "XOM", "KO", "JPM", "LQD"):
        raw = pd.read_csv(market_dir / f"{symbol}.csv", index_col="Date", parse_dates=True).loc["2000":]
        factor = raw["Adj Close"] / raw["Close"]
        target = make_target(raw[["Open", "High", "Low", "Close"]].mul(factor, axis=0), 5).iloc[300:-5]
        sizes.append(target["target_scaled"].std())
        raw_memory.append((target["target_log"] ** 2).autocorr(6))
        scaled_memory.append((target["target_scaled"] ** 2).autocorr(6))
    assert np.mean(sizes) == pytest.approx(1.0, abs=0.06)
    assert max(abs(size - 1.0) for size in sizes) < 0.12
    assert abs(np.mean(scaled_memory)) < 0.05 < np.mean(raw_memory)


# --- the panel -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(make_bars: MakeBars) -> dict[str, pd.DataFrame]:
    return {
        "AAA": make_bars(n=400, seed=1),
        "BBB": make_bars(n=500, seed=2, start="2005-06-01"),
        "CCC": make_bars(n=330, seed=3, start="2005-03-01"),
    }


@pytest.fixture(scope="module")
def panel(frames: dict[str, pd.DataFrame]) -> Dataset:
    return build_dataset(frames, 5)


def test_the_panel_holds_every_row_after_the_warm_up(panel: Dataset, frames: dict[str, pd.DataFrame]) -> None:
    assert len(panel) == sum(len(bars) - MAX_WARMUP_BARS for bars in frames.values())
    assert panel.columns == tuple(get_feature_columns())
    assert panel.symbols == ("AAA", "BBB", "CCC")
    assert panel.features.dtype == np.float32
    assert panel.date.dtype == panel.label_end.dtype == np.dtype("datetime64[D]")
    assert panel.symbol_code.dtype == np.int32
    assert panel.horizon_bars == 5
    assert panel.dropped_rows == 0
    assert np.isfinite(panel.features).all()


@pytest.mark.parametrize("symbol", ["AAA", "BBB", "CCC"])
def test_each_symbols_rows_are_its_own(symbol: str, panel: Dataset, frames: dict[str, pd.DataFrame]) -> None:
    bars = frames[symbol]
    rows = panel.take(panel.symbol_code == panel.symbols.index(symbol))
    np.testing.assert_array_equal(rows.date, bars.index[MAX_WARMUP_BARS:].to_numpy().astype("datetime64[D]"))
    expected = engineer_features(bars).to_numpy(dtype=np.float32)[MAX_WARMUP_BARS:]
    np.testing.assert_array_equal(rows.features, expected)
    target = make_target(bars, 5).iloc[MAX_WARMUP_BARS:]
    for name in ("target_log", "target_scaled", "sigma_log"):
        np.testing.assert_array_equal(getattr(rows, name), target[name])
    np.testing.assert_array_equal(rows.label_end, target["label_end"].to_numpy().astype("datetime64[D]"))
    assert (~rows.labelled).sum() == 5
    assert rows.labelled[:-5].all()


def test_rows_ascend_by_date_then_by_symbol(panel: Dataset) -> None:
    order = np.lexsort((panel.symbol_code, panel.date))
    np.testing.assert_array_equal(order, np.arange(len(panel)))
    np.testing.assert_array_equal(panel.sessions, np.unique(panel.date))


def test_take_keeps_rows_together(panel: Dataset) -> None:
    idx = np.array([5, 1, 100])
    part = panel.take(idx)
    assert len(part) == 3
    np.testing.assert_array_equal(part.features, panel.features[idx])
    np.testing.assert_array_equal(part.label_end, panel.label_end[idx])
    assert part.columns == panel.columns
    assert len(panel.take(panel.labelled)) == len(panel) - 15


def test_a_single_symbol_is_a_panel_of_one(frames: dict[str, pd.DataFrame]) -> None:
    one = build_dataset({"AAA": frames["AAA"]}, 10)
    assert len(one) == 400 - MAX_WARMUP_BARS
    assert (one.symbol_code == 0).all()


def test_arrays_that_do_not_belong_together_are_refused(panel: Dataset) -> None:
    parts = {name: getattr(panel, name) for name in Dataset.__dataclass_fields__}
    with pytest.raises(DataError, match="sigma_log has 3 rows"):
        Dataset(**{**parts, "sigma_log": panel.sigma_log[:3]})
    with pytest.raises(DataError, match="columns"):
        Dataset(**{**parts, "columns": panel.columns[:-1]})


def test_too_few_bars_are_refused_with_need_and_have(
    make_bars: MakeBars, frames: dict[str, pd.DataFrame]
) -> None:
    with pytest.raises(InsufficientDataError, match=rf"needs {MAX_WARMUP_BARS + 6} bars .*SHORT \(30\)"):
        build_dataset({**frames, "SHORT": make_bars(n=30)}, 5)
    with pytest.raises(UsageError, match="no symbol"):
        build_dataset({}, 5)
    assert build_dataset({"X": make_bars(n=MAX_WARMUP_BARS + 6)}, 5).labelled.sum() == 1


def _broken(monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    def engineer(bars: pd.DataFrame, **others: pd.DataFrame | None) -> pd.DataFrame:
        features = engineer_features(bars, **others).copy()
        features.iloc[rows, 3] = np.nan
        return features

    monkeypatch.setattr(target_engineering, "engineer_features", engineer)


def test_rows_that_are_not_finite_are_dropped_and_counted(
    make_bars: MakeBars, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = make_bars(n=800)
    whole = build_dataset({"A": bars, "B": bars}, 5)
    _broken(monkeypatch, slice(500, 503))
    part = build_dataset({"A": bars, "B": bars}, 5)
    assert part.dropped_rows == 6
    assert len(part) == len(whole) - 6
    assert np.isfinite(part.features).all()
    np.testing.assert_array_equal(part.features[-1], whole.features[-1])


def test_more_dropped_rows_than_the_budget_are_refused(
    make_bars: MakeBars, monkeypatch: pytest.MonkeyPatch
) -> None:
    _broken(monkeypatch, slice(500, 510))
    with pytest.raises(DataError, match="A: 10 of 550 rows"):
        build_dataset({"A": make_bars(n=800)}, 5)


# --- the optional families ------------------------------------------------------------------------


def test_other_series_append_their_columns_and_change_nothing_else(
    panel: Dataset, frames: dict[str, pd.DataFrame], make_bars: MakeBars
) -> None:
    market = make_bars(n=800, seed=42)
    vix = market.assign(Close=20.0 + market["Close"].pct_change().fillna(0.0) * 100)
    both = build_dataset(frames, 5, vix=vix, market=market)
    assert both.columns == tuple(get_feature_columns(cross_asset=True, market_context=True))
    np.testing.assert_array_equal(both.features[:, : len(panel.columns)], panel.features)
    np.testing.assert_array_equal(both.target_scaled, panel.target_scaled)
    np.testing.assert_array_equal(both.date, panel.date)
    rows = both.take(both.symbol_code == 1)
    expected = engineer_features(frames["BBB"], vix=vix, market=market).to_numpy(dtype=np.float32)
    np.testing.assert_array_equal(rows.features, expected[MAX_WARMUP_BARS:])
    alone = build_dataset(frames, 5, market=market)
    assert alone.columns == (*panel.columns, *both.columns[-7:])


def test_rows_begin_once_a_later_series_has_warmed_up(make_bars: MakeBars) -> None:
    bars, market = make_bars(n=600), make_bars(n=600, seed=1).iloc[300:]
    late = build_dataset({"A": bars}, 5, market=market)
    assert late.dropped_rows == 0
    assert late.date[0] == np.datetime64(bars.index[300 + 60], "D")
    assert len(late) == 600 - 360
    with pytest.raises(InsufficientDataError, match=r"needs 656 bars a symbol, .* A \(600\)"):
        build_dataset({"A": bars}, 5, market=market.iloc[290:])
    after = market.set_axis(market.index + pd.Timedelta(days=3650))
    with pytest.raises(InsufficientDataError, match="needs 666 bars"):
        build_dataset({"A": bars}, 5, market=after)


def test_a_symbol_that_closes_before_the_other_series_is_refused(make_bars: MakeBars) -> None:
    bars, vix = make_bars(n=400), make_bars(n=400, seed=1)
    for symbol in ("7203.T", "SAP.DE", "QNBK.QA"):
        assert len(build_dataset({symbol: bars}, 5)) == 400 - MAX_WARMUP_BARS
        with pytest.raises(UsageError, match=f"{symbol}: the exchange closes before New York"):
            build_dataset({"AAPL": bars, symbol: bars}, 5, vix=vix)
    assert len(build_dataset({"BTC-USD": bars, "RY.TO": bars}, 5, vix=vix)) == 2 * (400 - MAX_WARMUP_BARS)


def test_a_panel_of_every_symbol_at_hand_is_quick(market_dir: Path) -> None:
    frames = {}
    for path in sorted(market_dir.glob("*.csv"))[:12]:
        raw = pd.read_csv(path, index_col="Date", parse_dates=True)
        factor = raw["Adj Close"] / raw["Close"]
        prices = raw[["Open", "High", "Low", "Close"]].mul(factor, axis=0)
        frames[path.stem] = prices.assign(Volume=raw["Volume"].astype(float))
    start = time.process_time()
    panel = build_dataset(frames, 5)
    assert time.process_time() - start < 3.0
    assert len(panel) > 50_000
    assert panel.dropped_rows == 0


# -- sets of symbols


@pytest.mark.parametrize(("name", "size"), [("us50", 50), ("sectors11", 11), ("core5", 5)])
def test_named_sets_have_their_size_and_their_caveat(name, size):
    universe = tomllib.loads(UNIVERSES_FILE.read_text(encoding="utf-8"))[name]
    assert len(universe["symbols"]) == len(set(universe["symbols"])) == size
    assert isinstance(universe["selected_on"], date)
    assert universe["rule"]
    assert universe["caveat"]
    assert resolve_universe(name) == resolve_universe(f" {name} ") == tuple(universe["symbols"])


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


@pytest.mark.parametrize("spec", ["", " ", ",", "./absent.txt", "absent.txt", "./\0.txt"])
def test_what_names_nothing_is_refused(spec):
    with pytest.raises(UsageError):
        resolve_universe(spec)


def test_a_symbol_that_is_none_is_refused():
    with pytest.raises(InvalidSymbolError):
        resolve_universe("AAPL,..")


def test_a_universe_file_that_is_no_text_is_a_usage_error_and_a_byte_order_mark_is_not_a_symbol(tmp_path):
    junk = tmp_path / "junk.txt"
    junk.write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match="not a text file"):
        resolve_universe(str(junk))
    marked = tmp_path / "marked.txt"
    marked.write_bytes("\ufeffAAPL\nMSFT\n".encode())
    assert resolve_universe(str(marked)) == ("AAPL", "MSFT")


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


# --- panels of bars --------------------------------------------------------------------------------


def reading(source: CsvSource) -> partial:
    return partial(fetch_stock_data, source=source)


@pytest.fixture
def folder(tmp_path: Path, make_bars: MakeBars) -> Path:
    for seed, name in enumerate(["AAA", "BBB", "CCC"]):
        table = make_bars(400, seed=seed)
        table.insert(4, "Adj Close", table["Close"])
        table.rename_axis("Date").to_csv(tmp_path / f"{name}.csv")
    return tmp_path


def test_a_panel_keeps_the_order_and_equals_single_readings(folder):
    source = CsvSource(folder)
    panel, failures = load_panel(["ccc", "AAA", "BBB", "AAA"], reading(source), jobs=3)
    assert (list(panel), failures) == (["CCC", "AAA", "BBB"], {})
    for symbol, bars in panel.items():
        assert bars_hash(bars.frame) == bars_hash(fetch_stock_data(symbol, source=source).frame)


def test_a_panel_tells_all_its_failures_beside_what_it_has(folder):
    panel, failures = load_panel(["LOST", "AAA", "GONE"], reading(CsvSource(folder)))
    assert (list(panel), list(failures)) == (["AAA"], ["LOST", "GONE"])
    assert all(isinstance(error, UnknownSymbolError) for error in failures.values())


def test_an_error_that_nobody_foresaw_is_no_missing_symbol(folder):
    def read(symbol: str):
        raise ZeroDivisionError(symbol)

    with pytest.raises(ZeroDivisionError):
        load_panel(["AAA"], read)


def test_a_panel_is_bounded_in_memory(folder):
    with pytest.raises(DataError, match="name fewer symbols"):
        load_panel(["AAA", "BBB", "CCC"], reading(CsvSource(folder)), max_bytes=2 * 400 * 5 * 8)


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

    load_panel(["AAA", "BBB", "CCC"], reading(Counting(folder)), jobs=1)
    assert Counting.most == 1
