"""Kernels against plain formulas, and at the edges where the plain formulas fail."""

import pickle
import re
from collections.abc import Callable

import numba
import numpy as np
import pandas as pd
import pytest
import talib
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba.core.caching import CacheImpl

from data import indicators as ind
from utils.base import PROJECT_ROOT

finite = st.floats(-1e6, 1e6, allow_nan=False, width=64)


@pytest.fixture(scope="module")
def bars(make_bars: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return make_bars(n=700, seed=21)


@pytest.fixture(scope="module")
def x(bars: pd.DataFrame) -> ind.BarArrays:
    return ind.bar_arrays(*(bars[name].to_numpy(dtype=np.float64) for name in bars.columns))


@given(values=arrays(np.float64, st.integers(1, 120), elements=finite), window=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rolling_sum_is_the_sum_of_the_window(values: np.ndarray, window: int) -> None:
    sums = ind.rolling_sum(values, window)
    for t, value in enumerate(sums):
        if t < window - 1:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(values[t - window + 1 : t + 1].sum(), abs=1e-8 * window)


@given(window=st.integers(1, 30), before=st.floats(1e3, 1e15))
@settings(max_examples=30, deadline=None)
def test_a_window_of_zeros_sums_to_exactly_zero_whatever_came_before(window: int, before: float) -> None:
    values = np.concatenate([np.linspace(before, 7 * before, 50), np.zeros(80)])
    sums = ind.rolling_sum(values, window)
    assert (sums[50 + window - 1 :] == 0.0).all()
    running = pd.Series(values).cumsum().diff(window).to_numpy()
    assert np.isfinite(running[window:]).all()


def test_a_missing_first_value_spoils_only_its_own_windows() -> None:
    values = np.arange(50.0)
    values[0] = np.nan
    assert np.flatnonzero(np.isnan(ind.rolling_sum(values, 10))).tolist() == list(range(10))


@pytest.mark.parametrize("length", [1, 19, 20, 511, 512, 513, 1100])
def test_rolling_deviations_agree_with_pandas(length: int) -> None:
    values = 100.0 * np.exp(np.cumsum(np.random.default_rng(length).normal(0, 0.02, length)))
    series = pd.Series(values).rolling(20)
    mean, absolute, deviation = ind.rolling_deviations(values, 20)
    np.testing.assert_allclose(mean, series.mean(), rtol=1e-12)
    np.testing.assert_allclose(deviation, series.std(ddof=0), rtol=1e-9)
    by_hand = series.apply(lambda part: np.abs(part - part.mean()).mean(), raw=True)
    np.testing.assert_allclose(absolute, by_hand, rtol=1e-10)


def test_rolling_deviations_keep_their_precision_where_sums_of_squares_lose_it() -> None:
    values = 1e8 + np.random.default_rng(1).normal(0, 1e-2, 200)
    exact = np.array(
        [np.std(values[t - 19 : t + 1].astype(np.longdouble)) for t in range(19, 200)], dtype=float
    )
    np.testing.assert_allclose(ind.rolling_deviations(values, 20)[2, 19:], exact, rtol=1e-4)
    squares = pd.Series(values**2).rolling(20).mean() - pd.Series(values).rolling(20).mean() ** 2
    assert not np.allclose(np.sqrt(squares.clip(lower=0)).iloc[19:], exact, rtol=0.5)


def test_bar_moves_are_the_formulas(bars: pd.DataFrame, x: ind.BarArrays) -> None:
    logs = np.log(bars[["Open", "High", "Low", "Close"]])
    before = bars["Close"].shift()
    np.testing.assert_allclose(x.ret[1:], logs["Close"].diff().iloc[1:], atol=1e-14)
    np.testing.assert_allclose(x.overnight[1:], (logs["Open"] - logs["Close"].shift()).iloc[1:], atol=1e-14)
    np.testing.assert_allclose(x.span, logs["High"] - logs["Low"], atol=1e-14)
    body = logs["Close"] - logs["Open"]
    variance = 0.5 * (logs["High"] - logs["Low"]) ** 2 - (2 * np.log(2) - 1) * body**2
    np.testing.assert_allclose(x.gk, variance, atol=1e-14)
    true_range = np.maximum(bars["High"], before) - np.minimum(bars["Low"], before)
    np.testing.assert_allclose(x.true_range[1:], (true_range / bars["Close"].iloc[0]).iloc[1:], rtol=1e-12)
    np.testing.assert_allclose(x.typical * bars["Close"].iloc[0], bars[["High", "Low", "Close"]].mean(axis=1))
    assert x.ret[0] == x.overnight[0] == 0.0


def test_equal_prices_move_by_exactly_nothing() -> None:
    price = np.full(30, 0.1 + 0.2)
    still = ind.bar_arrays(price, price, price, price, np.ones(30))
    for values in (
        still.ret,
        still.overnight,
        still.span,
        still.gk,
        still.true_range,
        still.signed,
        still.rising,
    ):
        assert (values == 0.0).all()
    assert (still.sigma_20[20:] == ind.MIN_SIGMA_LOG).all()
    assert (still.std_20[20:] == 0.0).all()


def test_bar_flows_are_the_formulas(bars: pd.DataFrame, x: ind.BarArrays) -> None:
    close, volume = bars["Close"], bars["Volume"]
    np.testing.assert_allclose(
        np.cumsum(x.signed) + volume.iloc[0], talib.OBV(close.to_numpy(), volume.to_numpy())
    )
    np.testing.assert_allclose(x.trended[1:], (close.pct_change() * volume).iloc[1:], rtol=1e-9, atol=1e-6)
    distribution = talib.AD(*(bars[name].to_numpy() for name in ("High", "Low", "Close", "Volume")))
    np.testing.assert_allclose(np.cumsum(x.placed), distribution, rtol=1e-9)


def test_bar_shapes_are_the_formulas(bars: pd.DataFrame, x: ind.BarArrays) -> None:
    open_, high, low, close = (bars[name] for name in ("Open", "High", "Low", "Close"))
    np.testing.assert_array_equal(x.higher_high, (high > high.shift()).astype(float))
    np.testing.assert_array_equal(x.lower_low, (low < low.shift()).astype(float))
    inside = (high <= high.shift()) & (low >= low.shift())
    np.testing.assert_array_equal(x.inside, inside.astype(float))
    np.testing.assert_allclose(x.body, (close - open_) / (high - low), atol=1e-9)
    np.testing.assert_allclose(x.location, (2 * close - high - low) / (high - low), atol=1e-9)
    np.testing.assert_allclose(x.gap_up[1:], (open_ / high.shift() - 1).clip(lower=0).iloc[1:], atol=1e-12)
    np.testing.assert_allclose(x.gap_down[1:], (1 - open_ / low.shift()).clip(lower=0).iloc[1:], atol=1e-12)


def test_rounding_is_no_move() -> None:
    price = np.array([10.0, 10.0 * (1 + 1e-9), 10.0 * (1 - 1e-9), 10.0, 10.2])
    rounded = ind.bar_arrays(price, price, price, price, np.ones(5))
    assert rounded.signed.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert rounded.higher_high.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_directional_index_is_wilders(bars: pd.DataFrame, x: ind.BarArrays) -> None:
    prices = [bars[name].to_numpy() for name in ("High", "Low", "Close")]
    strength, spread = ind.directional(x, 14)
    plus, minus = talib.PLUS_DI(*prices, 14), talib.MINUS_DI(*prices, 14)
    np.testing.assert_allclose(strength[400:], talib.ADX(*prices, 14)[400:] / 100, atol=1e-6)
    np.testing.assert_allclose(spread[400:], ((plus - minus) / (plus + minus))[400:], atol=1e-6)


def test_equal_rises_and_falls_have_no_direction() -> None:
    half = np.linspace(0.5, 20.0, 60)
    high, low = 1000.0 + half, 1000.0 - half
    assert (ind.directional_index(high, low, 14) == 0.0).all()


def test_neutral_values_stand_in_for_division_by_nothing() -> None:
    ones, tiny = np.ones(3), np.array([2.0, 1e-9, np.nan])
    np.testing.assert_array_equal(ind.guarded_ratio(ones, tiny, 1e-6, 0.5), [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(ind.price_ratio(ones, tiny, 1e3 * ones, 0.5), [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(ind.price_ratio(ones, tiny, 1e7 * ones, -1.0), [-1.0, -1.0, np.nan])


def test_winsorise_keeps_a_missing_value_missing() -> None:
    out = np.zeros(6)
    ind.winsorise(np.array([9.0, 0.5, -3.0, 3.0, np.nan, np.inf]), -1.0, 1.0, 1, out)
    np.testing.assert_array_equal(out, [np.nan, 0.5, -1.0, 1.0, np.nan, 1.0])
    ind.winsorise(np.ones(6), -1.0, 1.0, 10, out)
    assert np.isnan(out).all()


def test_halted_closes_give_neutral_oscillators() -> None:
    rng = np.random.default_rng(2)
    close = np.concatenate([np.exp(np.cumsum(rng.normal(0, 0.02, 100))), np.zeros(500)])
    close[100:] = close[99]
    x = ind.bar_arrays(close, close, close, close, np.ones(600))
    assert talib.RSI(x.close, 14)[-1] != 50.0
    assert ind.relative_strength(x, 14)[-1] == 0.5
    assert ind.true_strength(x)[-1] == 0.0
    assert ind.stochastic(x, 14)[-1] == 0.5
    assert ind.commodity_channel(x, 20)[-1] == 0.0
    assert ind.halted(x, 14)[113:].all()
    assert not ind.halted(x, 14)[14:112].any()


def test_lag_and_log_change_look_back() -> None:
    values = np.arange(6.0)
    np.testing.assert_array_equal(ind.lag(values, 2), [np.nan, np.nan, 0, 1, 2, 3])
    np.testing.assert_array_equal(ind.lag(values, 9), np.full(6, np.nan))
    np.testing.assert_array_equal(ind.log_change(values, 1, 3), [np.nan, np.nan, np.nan, 2, 2, 2])


# --- compiled code that is kept ----------------------------------------------------------------


def double(x: int) -> int:
    return 2 * x


def test_without_a_place_for_compiled_code_it_is_compiled_at_every_start(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(double)
    assert ind.cached(numba.njit(double))(21) == 42
    assert ind.cached(double) is double, "as numba leaves it where NUMBA_DISABLE_JIT is set"


def test_compiled_code_is_kept_where_it_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert ind.cached(numba.njit(double))(21) == 42
    assert list(tmp_path.rglob("*.nbi"))


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"\x00" * len(whole),
        lambda whole: b"<html>the disk is full</html>",
        lambda whole: b"Inumber\n",
        lambda whole: b"cno.such.module\nname\n.",
        lambda whole: pickle.dumps(numba.__version__) + pickle.dumps(None),
    ],
    ids=["empty", "cut by one", "cut in half", "zeros", "text", "no number", "no module", "no pair"],
)
def test_fault_27_kept_code_that_cannot_be_read_is_compiled_and_kept_anew(
    tmp_path, monkeypatch, kind, damage
):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert ind.cached(numba.njit(double))(21) == 42
    (file,) = tmp_path.rglob(f"*.{kind}")
    file.write_bytes(damage(file.read_bytes()))
    assert ind.cached(numba.njit(double))(21) == 42
    again = ind.cached(numba.njit(double))
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1, "what was compiled anew is kept"


def test_no_source_ends_where_compiled_code_cannot_be_kept():
    for path in PROJECT_ROOT.glob("*/*.py"):
        if path.parent.name not in {"benchmarks", "tests"}:
            assert not re.search(r"njit\(.*cache=", path.read_text()), path
