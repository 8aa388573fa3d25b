import numpy as np
import pandas as pd
import pytest

from data.data_fetcher import CsvSource, fetch_stock_data
from data.indicators import decayed_mean
from inference.intervals import (
    ANCHORS_BARS,
    WEIGHTS,
    calibrate_band,
    forecast_volatility,
    scale_log,
    volatility_features,
)

PRICES = ["Open", "High", "Low", "Close"]


def garch_bars(n: int = 4_000, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Bars of a GARCH(1,1) walk, half its variance overnight; and the volatility of the bar after each."""
    rng = np.random.default_rng(seed)
    fat = rng.standard_t(6, size=(n, 1)) * np.sqrt(4 / 6) / np.sqrt(2)
    # The session is a walk of 40 steps, so that its range says what its variance was.
    session = np.cumsum(rng.standard_normal((n, 40)) / np.sqrt(80), axis=1)
    shocks = np.column_stack([fat, fat + session])
    variance = np.full(n + 1, 1.5e-4)
    for t in range(n):
        variance[t + 1] = 3e-6 + (0.08 * shocks[t, -1] ** 2 + 0.9) * variance[t]
    moves = shocks * np.sqrt(variance[:n, np.newaxis])
    path = moves + np.concatenate([[0.0], np.cumsum(moves[:-1, -1])])[:, np.newaxis]
    prices = np.exp([path[:, 0], path.max(axis=1), path.min(axis=1), path[:, -1]])
    bars = pd.DataFrame(100.0 * prices.T, columns=PRICES, index=pd.bdate_range("2000-01-03", periods=n))
    return bars.assign(Volume=rng.lognormal(14.0, 0.3, n)), np.sqrt(variance[1:])


@pytest.fixture(scope="module")
def garch():
    return garch_bars()


def ahead_log(bars: pd.DataFrame, horizon_bars: int) -> np.ndarray:
    close = np.log(bars["Close"].to_numpy())
    out = np.full(len(close), np.nan)
    out[:-horizon_bars] = close[horizon_bars:] - close[:-horizon_bars]
    return out


def rows_changed_by_the_future(forecast, bars: pd.DataFrame, rows=(0, 1, 30, 300, 700)) -> set[int]:
    full = forecast(bars)
    return {t for t in rows if not np.array_equal(forecast(bars.iloc[: t + 1])[:, t], full[:, t])}


def test_the_scale_at_t_knows_only_bars_up_to_t(make_bars):
    assert rows_changed_by_the_future(forecast_volatility, make_bars(n=800, seed=1)) == set()


@pytest.mark.parametrize("column", [*PRICES, "Volume"])
def test_a_scale_that_looks_ahead_is_caught(make_bars, column: str):
    def peeking(bars):
        late = bars.assign(**{column: bars[column].shift(-1).ffill()})
        late["High"] = late[["High", *PRICES]].max(axis=1)
        late["Low"] = late[["Low", *PRICES]].min(axis=1)
        return forecast_volatility(late)

    assert rows_changed_by_the_future(peeking, make_bars(n=800, seed=1)) >= {30, 300, 700}


@pytest.mark.parametrize("horizon_bars", [1, 5, 20])
def test_bands_cover_four_in_five_in_calm_and_in_storm(garch, horizon_bars: int):
    bars, true_volatility = garch
    scale = scale_log(forecast_volatility(bars), horizon_bars)
    realised = ahead_log(bars, horizon_bars)
    band = calibrate_band(np.zeros(len(bars)), scale, realised, horizon_bars=horizon_bars)
    inside = (realised > band.deciles_z[:, 0] * scale) & (realised < band.deciles_z[:, -1] * scale)
    scored = np.isfinite(realised) & (np.arange(len(bars)) > 300)
    assert np.mean(inside[scored]) == pytest.approx(0.8, abs=0.03)
    wild = true_volatility > np.median(true_volatility[scored])
    for regime in (wild, ~wild):
        assert np.mean(inside[scored & regime]) == pytest.approx(0.8, abs=0.05)


def test_the_scale_follows_the_true_volatility(garch):
    bars, true_volatility = garch
    daily = scale_log(forecast_volatility(bars), 1)
    assert np.corrcoef(np.log(daily[300:]), np.log(true_volatility[300:]))[0, 1] > 0.8
    # The scale of a t with 5 degrees of freedom is .77 of the standard deviation.
    assert np.median(daily[300:] / true_volatility[300:]) == pytest.approx(0.77, abs=0.12)


def test_prices_in_another_currency_have_the_same_scale(make_bars):
    bars = make_bars(n=600, seed=2)
    pence = bars.assign(**{name: bars[name] * 128.0 for name in PRICES})
    np.testing.assert_allclose(
        scale_log(forecast_volatility(pence), 5), scale_log(forecast_volatility(bars), 5), rtol=1e-9
    )


def test_twice_the_returns_have_twice_the_scale(make_bars):
    bars = make_bars(n=600, seed=2)
    wild = bars.assign(**{name: 100.0 * (bars[name] / 100.0) ** 2 for name in PRICES})
    ratio = scale_log(forecast_volatility(wild), 5) / scale_log(forecast_volatility(bars), 5)
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_scale_grows_with_every_bar_to_a_year(make_bars, seed: int):
    bars = make_bars(n=700, seed=seed)
    bars.iloc[-3:, :4] *= 1.0 - 0.1 * seed  # the last days of a crash
    forecast = forecast_volatility(bars)
    path = np.array([scale_log(forecast, k)[-1] for k in range(1, 253)])
    assert np.all(np.diff(path) > 0)
    daily = path / np.sqrt(np.arange(1, 253))
    assert np.all(daily[125:] == pytest.approx(daily[125]))
    assert np.abs(np.diff(np.log(daily))).max() < 0.25


def test_a_storm_is_forecast_to_calm_down(make_bars):
    bars = make_bars(n=900, seed=3, vol=0.01)
    storm = bars.copy()
    returns = np.log(bars["Close"]).diff().fillna(0.0)
    grown = returns.where(np.arange(900) < 880, returns * 5.0)
    level = 100.0 * np.exp(grown.cumsum())
    storm["Close"] = level
    storm["Open"] = level.shift(1).fillna(100.0)
    storm["High"] = storm[["Open", "Close"]].max(axis=1) * 1.001
    storm["Low"] = storm[["Open", "Close"]].min(axis=1) * 0.999
    last = forecast_volatility(storm)[:, -1]
    assert np.all(np.diff(last) < 0)


def test_constant_prices_and_no_volume_have_a_finite_scale():
    index = pd.bdate_range("2020-01-01", periods=300)
    flat = pd.DataFrame(dict.fromkeys(PRICES, 10.0), index=index).assign(Volume=0.0)
    forecast = forecast_volatility(flat)
    assert np.isfinite(forecast).all()
    scale = scale_log(forecast, 5)
    assert np.all((scale > 0) & (scale < 0.01))
    band = calibrate_band(np.zeros(300), scale, ahead_log(flat, 5), horizon_bars=5)
    assert np.isfinite(band.deciles_z).all()


def test_one_bar_is_enough_for_a_guess_and_a_gap_breaks_nothing(make_bars):
    bars = make_bars(n=400, seed=4)
    assert np.isfinite(forecast_volatility(bars.iloc[:1])).all()
    with_gap = bars.drop(bars.index[150:220])
    with_gap.iloc[150:, :4] *= 0.4
    forecast = forecast_volatility(with_gap)
    assert np.isfinite(forecast).all()
    assert scale_log(forecast, 1)[150] > 1.5 * scale_log(forecast, 1)[149]
    assert scale_log(forecast, 1)[-1] < 2.0 * scale_log(forecast, 1)[149]


def test_each_anchor_has_a_weight_for_each_feature(make_bars):
    bars = make_bars(n=100)
    base, features = volatility_features(bars)
    assert features.shape == (100, 7)
    assert [len(row) for row in WEIGHTS] == [7] * len(ANCHORS_BARS)
    by_hand = np.exp(0.5 * (base + features @ np.array(WEIGHTS[2]))) * np.sqrt(20.0)
    np.testing.assert_allclose(scale_log(forecast_volatility(bars), 20), by_hand)


def test_a_decayed_mean_is_that_of_pandas():
    values = np.random.default_rng(0).normal(size=200)
    expected = pd.Series(values).ewm(span=22, adjust=True).mean()
    np.testing.assert_allclose(decayed_mean(values, 22.0), expected, atol=1e-12)


def test_real_prices_are_covered_and_no_row_knows_the_next(market_dir):
    """AAPL's first years have bars without a range and opens that were made up; KO and SPY are calm."""
    source = CsvSource(market_dir)
    for symbol in ("AAPL", "KO", "SPY"):
        bars = fetch_stock_data(symbol, source=source).frame
        assert rows_changed_by_the_future(forecast_volatility, bars, rows=(50, 400, 2_000)) == set()
        forecast = forecast_volatility(bars)
        assert np.isfinite(forecast).all()
        for horizon_bars in (1, 5, 20):
            scale, realised = scale_log(forecast, horizon_bars), ahead_log(bars, horizon_bars)
            band = calibrate_band(np.zeros(len(bars)), scale, realised, horizon_bars=horizon_bars)
            inside = (realised > band.deciles_z[:, 0] * scale) & (realised < band.deciles_z[:, -1] * scale)
            scored = np.isfinite(realised) & np.asarray(bars.index >= "2006")
            assert 0.76 <= np.mean(inside[scored]) <= 0.84
