"""Other series as of the same close: their alignment, what is refused, and the features' plain formulas."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.data_fetcher import CsvSource, fetch_stock_data
from data.feature_engineer import (
    CROSS_ASSET,
    MARKET_CONTEXT,
    MAX_AGE_SESSIONS,
    align_close,
    engineer_features,
    get_feature_columns,
    refuse_earlier_closes,
    warmup_bars,
)
from data.schema import calendar_for
from data.target_engineering import build_dataset
from utils.base import AIStocksError, DataError, UsageError

MakeBars = Callable[..., pd.DataFrame]
NAMES = get_feature_columns(cross_asset=True, market_context=True)[-11:]


def series(closes: list[float], *dates: str) -> pd.DataFrame:
    return pd.DataFrame({"Close": closes}, pd.DatetimeIndex(dates))


def on_days(first: str, count: int) -> pd.DataFrame:
    index = pd.bdate_range(first, periods=count, name="date")
    return pd.DataFrame({"Close": np.arange(1.0, count + 1.0)}, index)


@pytest.fixture
def vix(make_bars: MakeBars) -> pd.DataFrame:
    market = make_bars(n=700, seed=21)
    return market.assign(
        Close=18.0 * (market["Close"] / market["Close"].rolling(60, min_periods=1).mean()) ** -4
    )


# --- the formulas ---------------------------------------------------------------------------------


def formulas(bars: pd.DataFrame, vix: pd.Series, market: pd.Series) -> dict[str, pd.Series]:
    """The optional rows of the registry, written as slowly and plainly as can be."""
    c = bars["Close"]
    x, market = vix.reindex(c.index, method="ffill"), market.reindex(c.index, method="ffill")
    r, m = np.log(c).diff(), np.log(market).diff()
    s20 = r.rolling(20).std(ddof=0).clip(lower=5e-4)
    spread = np.sqrt(252) * r.rolling(20).std(ddof=0) - x / 100
    month = m.rolling(20).std(ddof=0)
    return {
        "vix_level": x / 100,
        "vix_change": np.log(x / x.shift(5)),
        "rv_iv_spread": spread,
        "rv_iv_zscore": (spread - spread.rolling(120).mean()) / spread.rolling(120).std(ddof=0),
        "beta_60d": r.rolling(60).cov(m, ddof=0) / m.rolling(60).var(ddof=0),
        "correlation_60d": r.rolling(60).corr(m),
        "relative_strength_20d": np.log(c / c.shift(20) * market.shift(20) / market) / (s20 * np.sqrt(20)),
        "relative_strength_60d": np.log(c / c.shift(60) * market.shift(60) / market) / (s20 * np.sqrt(60)),
        "relative_volatility_20d": r.rolling(20).std(ddof=0) / month,
        "market_volatility_20d": month,
        "market_velocity_20d": np.log(market / market.shift(20)) / (month.clip(lower=5e-4) * np.sqrt(20)),
    }


@pytest.mark.parametrize("seed", [3, 4])
def test_optional_features_are_their_formulas(seed: int, make_bars: MakeBars, vix: pd.DataFrame) -> None:
    bars, other = make_bars(n=700, seed=seed), make_bars(n=700, seed=seed + 10)
    market = other.assign(Close=np.sqrt(other["Close"] * bars["Close"])).drop(other.index[[100, 333]])
    vix = vix.drop(vix.index[[50, 51, 400]])
    features = engineer_features(bars, vix=vix, market=market)
    expected = formulas(bars, vix["Close"], market["Close"])
    assert list(expected) == NAMES
    for spec in CROSS_ASSET + MARKET_CONTEXT:
        plain = expected[spec.name].clip(spec.lower, spec.upper)
        plain.iloc[: spec.warmup_bars] = np.nan
        pd.testing.assert_series_equal(
            features[spec.name], plain, check_names=False, check_freq=False, rtol=1e-7, atol=1e-9
        )
    assert features["beta_60d"].iloc[60:].mean() > 0.3


def test_a_market_compared_with_itself_says_so(make_bars: MakeBars) -> None:
    bars = make_bars(n=400)
    last = engineer_features(bars, market=bars)[NAMES[4:]].iloc[60:]
    for name in ("beta_60d", "correlation_60d", "relative_volatility_20d"):
        np.testing.assert_allclose(last[name], 1.0, atol=1e-9)
    for name in ("relative_strength_20d", "relative_strength_60d"):
        np.testing.assert_allclose(last[name], 0.0, atol=1e-9)


def test_where_nothing_moves_the_neutral_value_stands(make_bars: MakeBars) -> None:
    bars = make_bars(n=400)
    flat = bars.assign(Close=50.0)
    still = engineer_features(bars, vix=flat, market=flat)[NAMES].iloc[200:]
    assert (still[["vix_change", "beta_60d", "correlation_60d", "market_velocity_20d"]] == 0.0).all(axis=None)
    assert (still["relative_volatility_20d"] == 1.0).all()
    halted = bars.assign(**dict.fromkeys(["Open", "High", "Low", "Close"], 7.1))
    quiet = engineer_features(halted, vix=flat, market=bars)[NAMES].iloc[200:]
    assert (quiet[["rv_iv_zscore", "beta_60d", "correlation_60d", "relative_volatility_20d"]] == 0.0).all(
        axis=None
    )


# --- alignment ------------------------------------------------------------------------------------


def test_a_bar_sees_the_close_of_its_session_and_none_after() -> None:
    bars = on_days("2024-01-01", 5)
    other = series([10.0, 11.0, 12.0], "2024-01-02", "2024-01-04", "2024-01-06")
    np.testing.assert_array_equal(align_close(bars, other, "it"), [np.nan, 10.0, 10.0, 11.0, 11.0])


@given(
    bar_days=st.sets(st.integers(0, 40), min_size=1),
    other_days=st.dictionaries(st.integers(-10, 45), st.one_of(st.none(), st.floats(1.0, 99.0)), min_size=1),
)
@settings(deadline=None, max_examples=80)
def test_alignment_is_that_of_a_naive_loop(bar_days: set[int], other_days: dict[int, float | None]) -> None:
    first = pd.Timestamp("2024-01-01")
    bars = pd.DataFrame(index=pd.DatetimeIndex([first + pd.Timedelta(days=d) for d in sorted(bar_days)]))
    days = sorted(other_days)
    other = series([other_days[d] for d in days], *[str(first + pd.Timedelta(days=d)) for d in days])
    known = {d: close for d, close in other_days.items() if close is not None}
    seen = {day: max((d for d in known if d <= day), default=None) for day in sorted(bar_days)}
    ages = [sum(last < d <= day for d in bar_days) for day, last in seen.items() if last is not None]
    weekdays_before = np.busday_count(
        np.datetime64("2024-01-01") + (seen[min(bar_days)] or 0), np.datetime64("2024-01-01") + min(bar_days)
    )
    if (
        not known
        or max(ages, default=0) > MAX_AGE_SESSIONS
        or weekdays_before > MAX_AGE_SESSIONS - max(ages, default=0)
    ):
        with suppress(DataError):
            align_close(bars, other, "it")
        return
    expected = [np.nan if last is None else known[last] for last in seen.values()]
    np.testing.assert_array_equal(align_close(bars, other, "it"), expected)


def test_missing_closes_count_as_no_session() -> None:
    bars = on_days("2024-01-01", 3)
    other = series([10.0, np.nan, 12.0], "2024-01-01", "2024-01-02", "2024-01-03")
    np.testing.assert_array_equal(align_close(bars, other, "it"), [10.0, 10.0, 12.0])


def test_zones_and_hours_are_dropped_and_the_local_date_stays() -> None:
    bars = on_days("2024-01-01", 5)
    zoned = bars.set_axis((bars.index + pd.Timedelta("20h")).tz_localize("America/New_York"))
    np.testing.assert_array_equal(align_close(bars, zoned, "it"), bars["Close"])
    np.testing.assert_array_equal(align_close(zoned, bars, "it"), bars["Close"])


@pytest.mark.parametrize("missing", range(1, 9))
def test_a_series_is_stale_after_so_many_sessions(missing: int) -> None:
    bars = on_days("2024-01-01", 60)
    for other in (bars.iloc[:-missing], bars.drop(bars.index[20 : 20 + missing])):
        if missing <= MAX_AGE_SESSIONS:
            assert np.isfinite(align_close(bars, other, "it")).all()
        else:
            with pytest.raises(
                DataError, match=f"it has no close for .* more than {MAX_AGE_SESSIONS} sessions old"
            ):
                align_close(bars, other, "it")


def test_a_series_that_ended_before_the_bars_is_stale() -> None:
    bars = on_days("2024-01-01", 5)
    near, far = series([9.0], "2023-12-29"), series([9.0], "2023-12-15")
    np.testing.assert_array_equal(align_close(bars, near, "it"), [9.0] * 5)
    with pytest.raises(DataError, match=r"no close for 2024-01-01: its last one, of 2023-12-15"):
        align_close(bars, far, "it")


def test_the_error_names_the_session_and_what_to_do() -> None:
    bars = on_days("2024-01-01", 20)
    with pytest.raises(
        DataError, match=r"\^VIX has no close for 2024-01-18: its last one, of 2024-01-10, .*fetch"
    ):
        engineer_features(bars.assign(Open=1.0, High=99.0, Low=0.5, Volume=1.0), vix=bars.iloc[:8])


def test_a_series_that_begins_later_lengthens_the_warm_up(make_bars: MakeBars, vix: pd.DataFrame) -> None:
    bars = make_bars(n=700, seed=3)
    late = engineer_features(bars, vix=vix.iloc[300:], market=vix.iloc[200:])
    whole = engineer_features(bars, vix=vix, market=vix)
    for spec in CROSS_ASSET + MARKET_CONTEXT:
        begins = (300 if spec.family == "cross_asset" else 200) + spec.warmup_bars
        assert late[spec.name].iloc[: begins - 20].isna().all() or spec.warmup_bars <= 20, spec.name
        np.testing.assert_array_equal(late[spec.name].iloc[begins:], whole[spec.name].iloc[begins:])
    assert warmup_bars(bars) == warmup_bars(bars, vix=vix, market=vix) == 250
    assert warmup_bars(bars, vix=vix.iloc[300:], market=vix.iloc[200:]) == 300 + 139
    assert warmup_bars(bars, market=vix.iloc[200:]) == 260
    assert warmup_bars(bars.iloc[:100], vix=vix.iloc[300:]) > 100
    assert engineer_features(bars.iloc[:100], vix=vix.iloc[300:])["vix_level"].isna().all()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda other: other.iloc[:0], "has no close at all"),
        (lambda other: other.assign(Close=np.nan), "has no close at all"),
        (lambda other: other.rename(columns={"Close": "close"}), "needs one column Close"),
        (lambda other: pd.concat([other, other], axis=1), "needs one column Close"),
        (lambda other: pd.concat({"^VIX": other}, axis=1).swaplevel(axis=1), "needs one column Close"),
        (lambda other: other.reset_index(drop=True), "needs one column Close over dates"),
        (lambda other: other.set_axis(other.index.where(other.index != other.index[3])), "over dates"),
        (lambda other: pd.concat([other, other.iloc[-1:]]), "doubled or unsorted"),
        (lambda other: other.iloc[::-1], "doubled or unsorted"),
        (lambda other: other.set_axis(other.index - pd.to_timedelta(range(len(other)), "h")), "doubled"),
        (lambda other: other.assign(Close="high"), "not a number"),
        (lambda other: other.assign(Close=0.0), "not positive"),
        (lambda other: other.assign(Close=-1.0), "not positive"),
        (lambda other: other.assign(Close=np.inf), "not positive"),
    ],
)
def test_a_series_that_cannot_be_used_is_refused_in_words(
    spoil: Callable[[pd.DataFrame], pd.DataFrame], words: str, make_bars: MakeBars
) -> None:
    bars = make_bars(n=300)
    for argument in ("vix", "market"):
        with pytest.raises(DataError, match=words):
            engineer_features(bars, **{argument: spoil(bars[["Close"]])})


# --- who closes before New York -------------------------------------------------------------------


def test_symbols_that_close_before_new_york_are_refused() -> None:
    refuse_earlier_closes(["AAPL", "^GSPC", "RY.TO", "BTC-USD", "EURUSD=X", "ES=F"])
    with pytest.raises(UsageError, match=r"^7203.T, VOD.L: the exchange closes before New York"):
        refuse_earlier_closes(["AAPL", "7203.T", "VOD.L"])


@pytest.mark.parametrize("symbol", ["AAPL", "RY.TO", "BTC-USD", "EURUSD=X", "ES=F"])
def test_who_is_let_in_closes_no_earlier(symbol: str) -> None:
    ours, theirs = calendar_for(symbol), calendar_for("AAPL")
    both, mine, york = np.intersect1d(ours.days, theirs.days, return_indices=True)
    recent = both >= np.datetime64("2010-01-01")
    # Half days differ by a few minutes to hours on some exchanges; 16:00 sessions are what counts.
    full = theirs.closes[york] - both.astype("datetime64[s]") >= np.timedelta64(20 * 3600, "s")
    early = ours.closes[mine][recent & full] < theirs.closes[york][recent & full]
    assert early.mean() < 0.01


# --- real series ----------------------------------------------------------------------------------


def test_real_series_give_finite_and_sensible_features(market_dir: Path) -> None:
    source = CsvSource(market_dir)
    frames = {name: fetch_stock_data(name, source=source).frame for name in ("SPY", "VIX", "XLK", "KO")}
    for name, least in (("XLK", 0.7), ("KO", 0.2)):
        bars = frames[name].loc["1993-02-01":]
        features = engineer_features(bars, vix=frames["VIX"], market=frames["SPY"])
        warmup = warmup_bars(bars, vix=frames["VIX"], market=frames["SPY"])
        assert np.isfinite(features.iloc[warmup:]).all(axis=None)
        assert features["beta_60d"].median() > least
        assert features["vix_level"].between(0.08, 0.9).all()
        assert features["rv_iv_zscore"].std() == pytest.approx(1.1, abs=0.4)


def test_no_error_is_anything_but_ours(make_bars: MakeBars) -> None:
    bars = make_bars(n=300)
    for broken in (pd.DataFrame(), pd.DataFrame({"Close": []}), pd.DataFrame({"Close": [None]})):
        for argument in ("vix", "market"):
            for build in (engineer_features, lambda part, **other: build_dataset({"AAPL": part}, 5, **other)):
                with pytest.raises(AIStocksError):
                    build(bars, **{argument: broken})


@pytest.mark.parametrize("dtype", ["float32", "int64", "Float64", "object"])
def test_closes_of_any_numeric_type_are_read(dtype: str, make_bars: MakeBars) -> None:
    bars = make_bars(n=300)
    whole = pd.DataFrame({"Close": bars["Close"].round()})
    got = align_close(bars, whole.astype({"Close": dtype}), "it")
    np.testing.assert_array_equal(got, whole["Close"])


def test_a_missing_close_of_a_nullable_type_is_no_session(make_bars: MakeBars) -> None:
    bars = make_bars(n=10)
    closes = bars["Close"].astype("Float64")
    closes.iloc[4] = pd.NA
    got = align_close(bars, pd.DataFrame({"Close": closes}), "it")
    assert got[4] == got[3] == bars["Close"].iloc[3]
