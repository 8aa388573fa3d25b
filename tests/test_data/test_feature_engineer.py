"""Features against the plain pandas formulas that the registry states."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import feature_engineer
from data.feature_engineer import (
    FEATURES,
    MAX_WARMUP_BARS,
    SENTIMENT_COLUMNS,
    engineer_features,
    feature_set_hash,
    features_table,
    get_feature_columns,
    main,
    usable_rows,
)

ROOT = Path(__file__).resolve().parents[2]


def _wilder(values: pd.Series, window: int) -> pd.Series:
    return values.ewm(alpha=1 / window, adjust=False).mean()


def _ema(values: pd.Series, window: int) -> pd.Series:
    return values.ewm(span=window, adjust=False).mean()


def formulas(bars: pd.DataFrame) -> dict[str, pd.Series]:
    """The registry's formulas, written as slowly and plainly as can be."""
    o, h, lo, c, v = (bars[name] for name in ("Open", "High", "Low", "Close", "Volume"))
    r = np.log(c).diff()
    s20, s200 = (r.rolling(n).std(ddof=0).clip(lower=5e-4) for n in (20, 200))
    gk = 0.5 * np.log(h / lo) ** 2 - (2 * np.log(2) - 1) * np.log(c / o) ** 2
    tr = np.maximum(h, c.shift()) - np.minimum(lo, c.shift())
    tp = (h + lo + c) / 3
    hh14, ll14 = h.rolling(14).max(), lo.rolling(14).min()
    sma = {n: c.rolling(n).mean() for n in (10, 20, 50, 200)}
    clv = (2 * c - h - lo) / (h - lo)
    gain, loss = c.diff().clip(lower=0), -c.diff().clip(upper=0)
    macd = _ema(c, 12) - _ema(c, 26)
    signal = _ema(macd, 9)
    deviation = c.rolling(20).std(ddof=0)
    stoch_k = ((c - ll14) / (hh14 - ll14)).rolling(3).mean()
    volume_20, volume_5 = v.rolling(20).sum(), v.rolling(5).sum()
    flow, up, down = tp * v, tp.diff() > 0, tp.diff() < 0
    mad = tp.rolling(20).apply(lambda part: np.abs(part - part.mean()).mean(), raw=True)
    ratio = r.rolling(20).std(ddof=0) / r.rolling(200).std(ddof=0)
    velocity = {n: np.log(c / c.shift(n)) / (s20 * np.sqrt(n)) for n in (5, 10, 20)}
    rsi_14 = _wilder(gain, 14) / (_wilder(gain, 14) + _wilder(loss, 14))
    dc = c.diff()
    return {
        "volatility_5d": r.rolling(5).std(ddof=0),
        "volatility_20d": r.rolling(20).std(ddof=0),
        "volatility_ratio": r.rolling(5).std(ddof=0) / r.rolling(20).std(ddof=0),
        "garman_klass": np.sqrt(gk.rolling(20).mean()),
        "parkinson": np.sqrt((np.log(h / lo) ** 2).rolling(20).mean() / (4 * np.log(2))),
        "atr_14": _wilder(tr, 14) / c,
        "atr_ratio_5_20": tr.rolling(5).mean() / tr.rolling(20).mean(),
        "true_range_ratio": tr / tr.rolling(20).mean(),
        "rsi_14": rsi_14,
        "rsi_7": _wilder(gain, 7) / (_wilder(gain, 7) + _wilder(loss, 7)),
        "macd": macd / c,
        "macd_signal": signal / c,
        "macd_histogram": (macd - signal) / c,
        "stoch_k": stoch_k,
        "stoch_d": stoch_k.rolling(3).mean(),
        "williams_r": (c - hh14) / (hh14 - ll14),
        "cci_20": (tp - tp.rolling(20).mean()) / (1.5 * mad),
        "roc_10": c.pct_change(10),
        "roc_20": c.pct_change(20),
        "tsi": _ema(_ema(dc[1:], 25), 13) / _ema(_ema(dc[1:].abs(), 25), 13),
        **{f"sma_distance_{n}": (c / sma[n] - 1) / (s20 * np.sqrt(n)) for n in (10, 20, 50)},
        **{f"ema_distance_{n}": (c / _ema(c, n) - 1) / (s20 * np.sqrt(n)) for n in (10, 20)},
        "price_to_sma": c / sma[200] - 1,
        "sma_cross_20_50": sma[20] / sma[50] - 1,
        "sma_cross_50_200": sma[50] / sma[200] - 1,
        "bollinger_upper": (sma[20] + 2 * deviation) / c - 1,
        "bollinger_lower": (sma[20] - 2 * deviation) / c - 1,
        "bollinger_width": 4 * deviation / sma[20],
        "bollinger_position": (c - sma[20] + 2 * deviation) / (4 * deviation),
        "keltner_upper": (_ema(c, 20) + 2 * _wilder(tr, 10)) / c - 1,
        "keltner_lower": (_ema(c, 20) - 2 * _wilder(tr, 10)) / c - 1,
        "volume_sma_ratio": v / v.rolling(20).mean(),
        "obv_slope": (np.sign(r) * v).rolling(20).sum() / volume_20,
        "vwap_distance": c / (flow.rolling(20).sum() / volume_20) - 1,
        "mfi_14": (flow * up).rolling(14).sum() / (flow * (up | down)).rolling(14).sum(),
        "vpt": (c.pct_change() * v).rolling(20).sum() / volume_20 / s20,
        "accumulation_distribution": (clv * v).rolling(20).sum() / volume_20,
        **{f"velocity_{n}d": value for n, value in velocity.items()},
        "acceleration_5d": velocity[5].diff(5),
        "rsi_velocity_5d": rsi_14.diff(5),
        "volume_velocity_5d": (volume_5 - volume_5.shift(5)) / (volume_5 + volume_5.shift(5)),
        "momentum_60d": np.log(c / c.shift(60)) / (s200 * np.sqrt(60)),
        "momentum_250d": np.log(c.shift(20) / c.shift(250)) / (s200 * np.sqrt(230)),
        "higher_high": (h > h.shift()).rolling(5).mean(),
        "lower_low": (lo < lo.shift()).rolling(5).mean(),
        "gap_up": (o / h.shift() - 1).clip(lower=0) / s20,
        "gap_down": (1 - o / lo.shift()).clip(lower=0) / s20,
        "body_size": (c - o) / (h - lo),
        "inside_bar": ((h <= h.shift()) & (lo >= lo.shift())).astype(float),
        "volatility_regime_low": (ratio < 0.75).astype(float),
        "volatility_regime_normal": ratio.between(0.75, 1.25).astype(float),
        "volatility_regime_high": (ratio > 1.25).astype(float),
        "trend_strength": np.log(c / c.shift(20)).abs() / r.abs().rolling(20).sum(),
        "trend_direction": np.log(c / c.shift(60)) / r.abs().rolling(60).sum(),
        "mean_reversion": -(r * r.shift()).rolling(60).sum() / (r**2).rolling(60).sum(),
        "high_low_range": np.log(h / lo),
        "close_location": clv,
        "intraday_volatility": np.sqrt(gk / gk.rolling(20).mean()),
        "overnight_return": np.log(o / c.shift()),
    }


def test_features_are_their_formulas(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars = make_bars(n=800, seed=9)
    features, expected = engineer_features(bars), formulas(bars)
    # ADX and the DI spread have TA-Lib as their oracle in test_indicators.
    assert set(features.columns) - set(expected) == {"adx_14", "di_spread_14"}
    for spec in FEATURES:
        if spec.name not in expected:
            continue
        plain = expected[spec.name].clip(spec.lower, spec.upper).iloc[MAX_WARMUP_BARS:]
        gap = (features[spec.name].iloc[MAX_WARMUP_BARS:] - plain).abs().max()
        assert gap < 2e-6, f"{spec.name} differs from its formula by {gap}"


def test_the_frame_is_the_bars_index_and_the_registrys_columns(
    make_bars: Callable[..., pd.DataFrame],
) -> None:
    bars = make_bars(n=300)
    before = bars.copy()
    features = engineer_features(bars)
    pd.testing.assert_frame_equal(bars, before)
    pd.testing.assert_index_equal(features.index, bars.index)
    assert list(features.columns) == get_feature_columns() == get_feature_columns(False)
    assert (features.dtypes == np.float64).all()


@pytest.mark.parametrize("length", [0, 1, 2, 10, 100, MAX_WARMUP_BARS])
def test_short_histories_give_missing_values_and_no_error(
    length: int, make_bars: Callable[..., pd.DataFrame]
) -> None:
    bars = make_bars(n=300).iloc[:length]
    features = engineer_features(bars)
    assert features.shape == (length, len(FEATURES))
    warmup = np.array([spec.warmup_bars for spec in FEATURES])
    expected = np.arange(length)[:, None] < warmup
    np.testing.assert_array_equal(features.isna().to_numpy(), expected)


def test_whole_numbers_in_the_volume_are_fine(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars = make_bars(n=300)
    whole = bars.assign(Volume=bars["Volume"].astype("int64"))
    pd.testing.assert_frame_equal(engineer_features(whole), engineer_features(bars))


def test_headlines_stand_where_they_are_beside_the_prices(make_bars: Callable[..., pd.DataFrame]) -> None:
    bars = make_bars(n=300)
    said = pd.DataFrame({name: np.linspace(-5.0, 5.0, 300) for name in SENTIMENT_COLUMNS}, bars.index)
    said.iloc[270:290] = np.nan
    both = engineer_features(bars.join(said))
    assert list(both.columns) == get_feature_columns(include_sentiment=True)
    pd.testing.assert_frame_equal(both[get_feature_columns()], engineer_features(bars))
    expected = said.clip(-1.0, 1.0).assign(news_volume_5d=said["news_volume_5d"].clip(-3.0, 3.0).iloc[59:])
    pd.testing.assert_frame_equal(both[list(SENTIMENT_COLUMNS)], expected)
    # Where nothing is known of the news, a row is still a row; where a price's feature lacks, it is none.
    usable = usable_rows(both.to_numpy(), list(both.columns))
    assert usable.tolist() == [row >= MAX_WARMUP_BARS for row in range(300)]


def test_the_hash_follows_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    before = feature_set_hash()
    assert before == feature_set_hash()
    monkeypatch.setattr(feature_engineer, "FEATURE_SET_VERSION", 10_000)
    assert feature_set_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(feature_engineer, "FEATURES", FEATURES[1:])
    assert feature_set_hash() != before


def test_the_hash_knows_the_optional_families() -> None:
    flags = [{"cross_asset": a, "market_context": b} for a in (False, True) for b in (False, True)]
    assert len({feature_set_hash(**flag) for flag in flags}) == 4
    assert feature_set_hash() == feature_set_hash(cross_asset=False)
    # What bundles and caches were made with before the registry moved to a file.
    assert feature_set_hash() == HASH


# Sums of means of one seeded history. When they change, raise FEATURE_SET_VERSION: bundles and caches made
# with the old values must not pass for new ones.
HASH = "84566753803134158696160eb31181309fd6391c779e028f9b2cacbee5a57737"
GOLDEN = {1: {"all": 11.538311, "absolute": 21.327243}}


def test_values_do_not_change_without_a_new_version(make_bars: Callable[..., pd.DataFrame]) -> None:
    values = engineer_features(make_bars(n=600, seed=1)).iloc[MAX_WARMUP_BARS:]
    golden = {"all": float(values.mean().sum()), "absolute": float(values.abs().mean().sum())}
    assert golden == pytest.approx(GOLDEN[feature_engineer.FEATURE_SET_VERSION], abs=1e-5)


def test_the_page_is_the_generated_one() -> None:
    assert (ROOT / "docs" / "features.md").read_text(encoding="utf-8") == features_table() + "\n"


def test_the_page_lists_every_feature_and_splits_no_cell() -> None:
    rows = [line for line in features_table().splitlines() if line.startswith("| ")][1:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if not row.startswith("| name |")]
    assert names == get_feature_columns(True, cross_asset=True, market_context=True)
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}


def test_the_command_prints_names_or_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.split() == get_feature_columns()
    assert main(["--docs"]) == 0
    assert capsys.readouterr().out == features_table() + "\n"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["feature_engineer"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("data.feature_engineer", run_name="__main__")
    assert capsys.readouterr().out.split() == get_feature_columns()


def test_real_bars_give_finite_features_free_of_scale(market_dir: Path) -> None:
    for symbol in ("AAPL", "VIX", "KO", "AIG"):
        raw = pd.read_csv(market_dir / f"{symbol}.csv", index_col="Date", parse_dates=True)
        factor = raw["Adj Close"] / raw["Close"]
        bars = (
            raw[["Open", "High", "Low", "Close"]]
            .mul(factor, axis=0)
            .assign(Volume=raw["Volume"].astype(float))
        )
        features = engineer_features(bars)
        assert np.isfinite(features.iloc[MAX_WARMUP_BARS:]).all(axis=None), symbol
        assert (engineer_features(bars * 1000) - features).abs().max().max() < 1e-9, symbol
