"""The features: a registry that says what each one is, and the functions that compute them.

All of them are known at the close of their bar, free of the scale of prices and volumes, bounded by fixed
constants, and finite after the declared warm-up whatever happens: no volume, no range, no move. None is the
one-day return.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd
import talib

from data import indicators as ind
from data.indicators import NO_MOVE, BarArrays, FloatArray
from utils.errors import UsageError

# Raised whenever values change while the words of a formula stay the same; part of the hash.
FEATURE_SET_VERSION = 1
REGIME_LOW, REGIME_HIGH = 0.75, 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """What a feature is.

    Attributes
    ----------
    name, family
        Its column and the family that it is computed with.
    formula
        In the terms of the table's legend.
    warmup_bars
        Number of leading bars without a value; after them it does not depend (within 1e-6) on older history.
    lower, upper
        Fixed bounds; values beyond them are winsorised.
    source
        Where the formula comes from.
    """

    name: str
    family: str
    formula: str
    warmup_bars: int
    lower: float
    upper: float
    source: str


def _family(family: str, *rows: tuple[str, str, int, float, float, str]) -> tuple[FeatureSpec, ...]:
    return tuple(
        FeatureSpec(name=n, family=family, formula=f, warmup_bars=w, lower=low, upper=high, source=source)
        for n, f, w, low, high, source in rows
    )


FEATURES: tuple[FeatureSpec, ...] = (
    *_family(
        "returns_volatility",
        ("volatility_5d", "std(r, 5)", 5, 0.0, 0.25, "daily, population"),
        ("volatility_20d", "std(r, 20)", 20, 0.0, 0.25, "daily, population"),
        ("volatility_ratio", "std(r, 5) / std(r, 20)", 20, 0.0, 2.0, "own"),
        ("garman_klass", "sqrt(mean(gk, 20))", 19, 0.0, 0.25, "Garman, Klass 1980"),
        ("parkinson", "sqrt(mean(log(H/L)^2, 20) / (4 log 2))", 19, 0.0, 0.25, "Parkinson 1980"),
        ("atr_14", "ATR(14) / C", 180, 0.0, 0.5, "Wilder 1978, TA-Lib ATR"),
        ("atr_ratio_5_20", "mean(TR, 5) / mean(TR, 20)", 20, 0.0, 4.0, "own"),
        ("true_range_ratio", "TR / mean(TR, 20)", 20, 0.0, 6.0, "own"),
    ),
    *_family(
        "momentum",
        ("rsi_14", "RSI(C, 14) / 100", 220, 0.0, 1.0, "Wilder 1978, TA-Lib RSI"),
        ("rsi_7", "RSI(C, 7) / 100", 120, 0.0, 1.0, "Wilder 1978, TA-Lib RSI"),
        ("macd", "(EMA(C, 12) - EMA(C, 26)) / C", 230, -0.5, 0.5, "Appel 1979, TA-Lib MACD"),
        ("macd_signal", "EMA(MACD, 9) / C", 230, -0.5, 0.5, "Appel 1979, TA-Lib MACD"),
        ("macd_histogram", "macd - macd_signal", 230, -0.25, 0.25, "Appel 1979, TA-Lib MACD"),
        ("stoch_k", "mean((C - LL14) / (HH14 - LL14), 3)", 15, 0.0, 1.0, "Lane 1984, slow %K"),
        ("stoch_d", "mean(stoch_k, 3)", 17, 0.0, 1.0, "Lane 1984, slow %D"),
        ("williams_r", "(C - HH14) / (HH14 - LL14)", 13, -1.0, 0.0, "Williams 1979"),
        ("cci_20", "CCI(20) / 100", 19, -5.0, 5.0, "Lambert 1980"),
        ("roc_10", "C / C[-10] - 1", 10, -0.9, 2.0, "TA-Lib ROCP"),
        ("roc_20", "C / C[-20] - 1", 20, -0.9, 2.0, "TA-Lib ROCP"),
        ("tsi", "EMA25_13(dC) / EMA25_13(|dC|), EMA13 of EMA25", 240, -1.0, 1.0, "Blau 1991"),
    ),
    *_family(
        "trend",
        ("sma_distance_10", "(C / SMA(C, 10) - 1) / (s20 sqrt(10))", 20, -5.0, 5.0, "own"),
        ("sma_distance_20", "(C / SMA(C, 20) - 1) / (s20 sqrt(20))", 20, -5.0, 5.0, "own"),
        ("sma_distance_50", "(C / SMA(C, 50) - 1) / (s20 sqrt(50))", 49, -5.0, 5.0, "own"),
        ("ema_distance_10", "(C / EMA(C, 10) - 1) / (s20 sqrt(10))", 120, -5.0, 5.0, "own"),
        ("ema_distance_20", "(C / EMA(C, 20) - 1) / (s20 sqrt(20))", 200, -5.0, 5.0, "own"),
        ("price_to_sma", "C / SMA(C, 200) - 1", 199, -0.9, 2.0, "TA-Lib SMA"),
        ("sma_cross_20_50", "SMA(C, 20) / SMA(C, 50) - 1", 49, -0.5, 0.5, "TA-Lib SMA"),
        ("sma_cross_50_200", "SMA(C, 50) / SMA(C, 200) - 1", 199, -0.75, 1.0, "TA-Lib SMA"),
        ("adx_14", "ADX(14) / 100", 240, 0.0, 1.0, "Wilder 1978"),
        ("di_spread_14", "(+DI - -DI) / (+DI + -DI), 14 bars", 220, -1.0, 1.0, "Wilder 1978"),
    ),
    *_family(
        "bands",
        ("bollinger_upper", "(SMA(C, 20) + 2 std(C, 20)) / C - 1", 19, -0.5, 1.0, "Bollinger 2001"),
        ("bollinger_lower", "(SMA(C, 20) - 2 std(C, 20)) / C - 1", 19, -1.0, 0.5, "Bollinger 2001"),
        ("bollinger_width", "4 std(C, 20) / SMA(C, 20)", 19, 0.0, 2.0, "Bollinger 2001"),
        ("bollinger_position", "(C - lower) / (upper - lower)", 19, -1.0, 2.0, "Bollinger 2001, %b"),
        ("keltner_upper", "(EMA(C, 20) + 2 ATR(10)) / C - 1", 200, -0.5, 1.0, "Raschke's Keltner bands"),
        ("keltner_lower", "(EMA(C, 20) - 2 ATR(10)) / C - 1", 200, -1.0, 0.5, "Raschke's Keltner bands"),
    ),
    *_family(
        "volume",
        ("volume_sma_ratio", "V / mean(V, 20)", 19, 0.0, 10.0, "own"),
        ("obv_slope", "sum(sign(r) V, 20) / sum(V, 20)", 20, -1.0, 1.0, "Granville 1963"),
        ("vwap_distance", "C / VWAP(20) - 1", 19, -0.5, 1.0, "own"),
        ("mfi_14", "share of sum(TP V, 14) where TP rose", 14, 0.0, 1.0, "Quong, Soudack 1989"),
        ("vpt", "sum(dC/C[-1] V, 20) / sum(V, 20) / s20", 20, -3.0, 3.0, "volume price trend"),
        ("accumulation_distribution", "sum(CLV V, 20) / sum(V, 20)", 19, -1.0, 1.0, "Chaikin money flow"),
    ),
    *_family(
        "multi_timeframe",
        ("velocity_5d", "log(C / C[-5]) / (s20 sqrt(5))", 20, -5.0, 5.0, "own"),
        ("velocity_10d", "log(C / C[-10]) / (s20 sqrt(10))", 20, -5.0, 5.0, "own"),
        ("velocity_20d", "log(C / C[-20]) / (s20 sqrt(20))", 20, -5.0, 5.0, "own"),
        ("acceleration_5d", "velocity_5d - velocity_5d[-5]", 25, -5.0, 5.0, "own"),
        ("rsi_velocity_5d", "rsi_14 - rsi_14[-5]", 225, -1.0, 1.0, "own"),
        ("volume_velocity_5d", "(v - w) / (v + w), v = sum(V, 5), w = v[-5]", 9, -1.0, 1.0, "own"),
        ("momentum_60d", "log(C / C[-60]) / (s200 sqrt(60))", 200, -5.0, 5.0, "Jegadeesh, Titman 1993"),
        (
            "momentum_250d",
            "log(C[-20] / C[-250]) / (s200 sqrt(230))",
            250,
            -5.0,
            5.0,
            "Jegadeesh, Titman 1993",
        ),
    ),
    *_family(
        "pattern",
        ("higher_high", "share of the last 5 bars with H > H[-1]", 5, 0.0, 1.0, "own"),
        ("lower_low", "share of the last 5 bars with L < L[-1]", 5, 0.0, 1.0, "own"),
        ("gap_up", "max(O / H[-1] - 1, 0) / s20", 20, 0.0, 5.0, "own"),
        ("gap_down", "max(1 - O / L[-1], 0) / s20", 20, 0.0, 5.0, "own"),
        ("body_size", "(C - O) / (H - L)", 0, -1.0, 1.0, "own"),
        ("inside_bar", "H <= H[-1] and L >= L[-1] and H > L", 1, 0.0, 1.0, "own"),
    ),
    *_family(
        "regime",
        ("volatility_regime_low", "std(r, 20) / std(r, 200) < 0.75", 200, 0.0, 1.0, "own"),
        ("volatility_regime_normal", "neither low nor high", 200, 0.0, 1.0, "own"),
        ("volatility_regime_high", "std(r, 20) / std(r, 200) > 1.25", 200, 0.0, 1.0, "own"),
        ("trend_strength", "|log(C / C[-20])| / sum(|r|, 20)", 20, 0.0, 1.0, "Kaufman 1995"),
        ("trend_direction", "log(C / C[-60]) / sum(|r|, 60)", 60, -1.0, 1.0, "Kaufman 1995, signed"),
        ("mean_reversion", "-sum(r r[-1], 60) / sum(r^2, 60)", 61, -1.0, 1.0, "autocorrelation, negated"),
    ),
    *_family(
        "microstructure",
        ("high_low_range", "log(H / L)", 0, 0.0, 0.5, "own"),
        ("close_location", "CLV = (2C - H - L) / (H - L)", 0, -1.0, 1.0, "Chaikin"),
        ("intraday_volatility", "sqrt(gk / mean(gk, 20))", 19, 0.0, 5.0, "Garman, Klass 1980"),
        ("overnight_return", "log(O / C[-1])", 1, -0.25, 0.25, "own"),
    ),
)
MAX_WARMUP_BARS: int = max(spec.warmup_bars for spec in FEATURES)

LEGEND = (
    "O, H, L, C, V: the bar's adjusted prices and its volume; X[-k]: X of k bars before; r = log(C / C[-1]); "
    "TP = (H + L + C) / 3; TR: true range; gk: the session's Garman-Klass variance; dC = C - C[-1]; "
    "s20, s200 = std(r, 20), std(r, 200), at least 0.0005; HH14, LL14: highest high, lowest low of 14 bars. "
    "mean, sum, std: over the last so many bars. Where a denominator is nothing (no volume, no range, no "
    "move) the value is the neutral one: 0, 0.5 of a share, 1 of a ratio. A condition is 1 or 0."
)


class FeatureRows:
    """Rows of a block by the names of the features; what is stored is winsorised, its warm-up blanked.

    Attributes
    ----------
    block
        Shape (features, bars); a row means nothing before it is stored.
    stored
        Names of the features stored so far.
    """

    def __init__(self, n_bars: int) -> None:
        self.block = np.empty((len(FEATURES), n_bars))
        self.stored: set[str] = set()
        self._specs = {spec.name: (spec, row) for spec, row in zip(FEATURES, self.block, strict=True)}

    def __getitem__(self, name: str) -> FloatArray:
        """Return a row that was stored before."""
        return self._specs[name][1]

    def __setitem__(self, name: str, values: FloatArray) -> None:
        """Store a feature while its values are still in the cache of the processor."""
        spec, row = self._specs[name]
        ind.winsorise(values, spec.lower, spec.upper, spec.warmup_bars, row)
        self.stored.add(name)


def _returns_volatility(x: BarArrays, rows: FeatureRows) -> None:
    fast, slow = ind.return_std(x.ret, 5), x.std_20
    rows["volatility_5d"] = fast
    rows["volatility_20d"] = slow
    rows["volatility_ratio"] = ind.guarded_ratio(fast, slow, NO_MOVE, 1.0)
    rows["garman_klass"] = np.sqrt(ind.rolling_sum(x.gk, 20) / 20)
    rows["parkinson"] = np.sqrt(ind.rolling_sum(x.span * x.span, 20) / (80 * np.log(2.0)))
    rows["atr_14"] = talib.ATR(x.high, x.low, x.close, 14) / x.close
    month, week = ind.rolling_sum(x.true_range, 20) / 20, ind.rolling_sum(x.true_range, 5) / 5
    rows["atr_ratio_5_20"] = ind.price_ratio(week, month, x.close, 1.0)
    rows["true_range_ratio"] = ind.price_ratio(x.true_range, month, x.close, 1.0)


def _momentum(x: BarArrays, rows: FeatureRows) -> None:
    rows["rsi_14"] = ind.relative_strength(x, 14)
    rows["rsi_7"] = ind.relative_strength(x, 7)
    lines = talib.MACD(x.close, 12, 26, 9)
    for name, line in zip(("macd", "macd_signal", "macd_histogram"), lines, strict=True):
        rows[name] = line / x.close
    fast_k = ind.stochastic(x, 14)
    rows["williams_r"] = fast_k - 1.0
    fast_k[:13] = 0.0
    slow_k = ind.rolling_sum(fast_k, 3) / 3
    rows["stoch_k"] = slow_k
    rows["stoch_d"] = (slow_k + ind.lag(slow_k, 1) + ind.lag(slow_k, 2)) / 3
    rows["cci_20"] = ind.commodity_channel(x, 20)
    rows["roc_10"] = talib.ROCP(x.close, 10)
    rows["roc_20"] = talib.ROCP(x.close, 20)
    rows["tsi"] = ind.true_strength(x)


def _trend(x: BarArrays, rows: FeatureRows) -> None:
    sma = {bars: talib.SMA(x.close, bars) for bars in (10, 20, 50, 200)}
    for bars in (10, 20, 50):
        rows[f"sma_distance_{bars}"] = (x.close / sma[bars] - 1.0) / (x.sigma_20 * np.sqrt(bars))
    for bars in (10, 20):
        ema = talib.EMA(x.close, bars)
        rows[f"ema_distance_{bars}"] = (x.close / ema - 1.0) / (x.sigma_20 * np.sqrt(bars))
    rows["price_to_sma"] = x.close / sma[200] - 1.0
    rows["sma_cross_20_50"] = sma[20] / sma[50] - 1.0
    rows["sma_cross_50_200"] = sma[50] / sma[200] - 1.0
    rows["adx_14"], rows["di_spread_14"] = ind.directional(x, 14)


def _bands(x: BarArrays, rows: FeatureRows) -> None:
    middle, _, deviation = ind.rolling_deviations(x.close, 20)
    deviation *= 2.0
    rows["bollinger_upper"] = (middle + deviation) / x.close - 1.0
    rows["bollinger_lower"] = (middle - deviation) / x.close - 1.0
    rows["bollinger_width"] = 2.0 * deviation / middle
    rows["bollinger_position"] = 0.5 + 0.5 * ind.price_ratio(x.close - middle, deviation, x.close, 0.0)
    middle, deviation = talib.EMA(x.close, 20), 2.0 * talib.ATR(x.high, x.low, x.close, 10)
    rows["keltner_upper"] = (middle + deviation) / x.close - 1.0
    rows["keltner_lower"] = (middle - deviation) / x.close - 1.0


def _volume(x: BarArrays, rows: FeatureRows) -> None:
    traded = ind.rolling_sum(x.volume, 20)
    rows["volume_sma_ratio"] = ind.guarded_ratio(x.volume, traded / 20, 0.0, 1.0)
    rows["obv_slope"] = ind.guarded_ratio(ind.rolling_sum(x.signed, 20), traded, 0.0, 0.0)
    rows["vwap_distance"] = ind.guarded_ratio(x.close * traded, ind.rolling_sum(x.paid, 20), 0.0, 1.0) - 1.0
    up, down = ind.rolling_sum(x.rising, 14), ind.rolling_sum(x.falling, 14)
    rows["mfi_14"] = ind.guarded_ratio(up, up + down, 0.0, 0.5)
    rows["vpt"] = ind.guarded_ratio(ind.rolling_sum(x.trended, 20), traded * x.sigma_20, 0.0, 0.0)
    rows["accumulation_distribution"] = ind.guarded_ratio(ind.rolling_sum(x.placed, 20), traded, 0.0, 0.0)


def _multi_timeframe(x: BarArrays, rows: FeatureRows) -> None:
    for bars in (5, 10, 20):
        rows[f"velocity_{bars}d"] = ind.log_change(x.log_close, 0, bars) / (x.sigma_20 * np.sqrt(bars))
    rows["acceleration_5d"] = ind.log_change(rows["velocity_5d"], 0, 5)
    rows["rsi_velocity_5d"] = ind.log_change(rows["rsi_14"], 0, 5)
    week = ind.rolling_sum(x.volume, 5)
    before = ind.lag(week, 5)
    rows["volume_velocity_5d"] = ind.guarded_ratio(week - before, week + before, 0.0, 0.0)
    for name, near, far in (("momentum_60d", 0, 60), ("momentum_250d", 20, 250)):
        change = ind.log_change(x.log_close, near, far)
        rows[name] = change / (x.sigma_200 * np.sqrt(far - near))


def _pattern(x: BarArrays, rows: FeatureRows) -> None:
    rows["higher_high"] = ind.rolling_sum(x.higher_high, 5) / 5
    rows["lower_low"] = ind.rolling_sum(x.lower_low, 5) / 5
    rows["gap_up"] = x.gap_up / x.sigma_20
    rows["gap_down"] = x.gap_down / x.sigma_20
    rows["body_size"] = x.body
    rows["inside_bar"] = x.inside


def _regime(x: BarArrays, rows: FeatureRows) -> None:
    ratio = ind.guarded_ratio(x.std_20, x.std_200, NO_MOVE, 1.0)
    low, high = ratio < REGIME_LOW, ratio > REGIME_HIGH
    rows["volatility_regime_low"] = low.astype(np.float64)
    rows["volatility_regime_high"] = high.astype(np.float64)
    rows["volatility_regime_normal"] = (~(low | high)).astype(np.float64)
    path = np.abs(x.ret)
    moves = {bars: ind.log_change(x.log_close, 0, bars) for bars in (20, 60)}
    rows["trend_strength"] = ind.guarded_ratio(np.abs(moves[20]), ind.rolling_sum(path, 20), NO_MOVE, 0.0)
    rows["trend_direction"] = ind.guarded_ratio(moves[60], ind.rolling_sum(path, 60), NO_MOVE, 0.0)
    product = ind.rolling_sum(x.ret * ind.lag(x.ret, 1), 60)
    squares = ind.rolling_sum(x.ret * x.ret, 60)
    rows["mean_reversion"] = ind.guarded_ratio(-product, squares, NO_MOVE**2, 0.0)


def _microstructure(x: BarArrays, rows: FeatureRows) -> None:
    rows["high_low_range"] = x.span
    rows["close_location"] = x.location
    rows["intraday_volatility"] = np.sqrt(
        ind.guarded_ratio(x.gk, ind.rolling_sum(x.gk, 20) / 20, NO_MOVE**2, 1.0)
    )
    rows["overnight_return"] = x.overnight


_PRICE_FAMILIES = (_returns_volatility, _momentum, _trend, _bands, _multi_timeframe, _regime)
_BAR_FAMILIES = (_volume, _pattern, _microstructure)


def engineer_features(bars: pd.DataFrame) -> pd.DataFrame:
    """Compute every feature of the registry.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars of one symbol, ascending; prices positive, nothing missing.

    Returns
    -------
    DataFrame
        Float64, indexed like ``bars``, columns in the registry's order. Row t is known at the close of t and
        is the same, to the last bit, whatever follows it. NaN in the declared warm-ups and nowhere else.
    """
    rows = FeatureRows(len(bars))
    if len(bars):
        ohlcv = ("Open", "High", "Low", "Close", "Volume")
        x = ind.bar_arrays(*(np.array(bars[name], dtype=np.float64) for name in ohlcv))
        for compute in (*_PRICE_FAMILIES, *_BAR_FAMILIES):
            compute(x, rows)
    return pd.DataFrame(rows.block.T, index=bars.index, columns=get_feature_columns(), copy=False)


def get_feature_columns(include_sentiment: bool = False) -> list[str]:  # noqa: FBT001, FBT002
    """Return the names of the features, in order.

    Raises
    ------
    UsageError
        When sentiment is asked for: no sentiment feature is registered.
    """
    if include_sentiment:
        raise UsageError("no sentiment features are registered: call get_feature_columns(False)")
    return [spec.name for spec in FEATURES]


def feature_set_hash() -> str:
    """Return the sha256 of the registry and its version: what a cache or a bundle was made with."""
    content = repr((FEATURE_SET_VERSION, [astuple(spec) for spec in FEATURES]))
    return hashlib.sha256(content.encode()).hexdigest()


def features_table() -> str:
    """Return the registry as a Markdown page; ``docs/features.md`` is this text."""
    lines = [
        "# Features",
        "",
        "Generated by `python -m data.feature_engineer --docs`; do not edit.",
        "",
        f"{len(FEATURES)} columns, warm-up {MAX_WARMUP_BARS} bars. {LEGEND}",
        "",
        "| name | family | formula | warm-up (bars) | bounds | source |",
        "|---|---|---|---|---|---|",
    ]
    for spec in FEATURES:
        formula, bounds = spec.formula.replace("|", "\\|"), f"{spec.lower:g} to {spec.upper:g}"
        cells = (spec.name, spec.family, formula, str(spec.warmup_bars), bounds, spec.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m data.feature_engineer``."""
    parser = argparse.ArgumentParser(prog="python -m data.feature_engineer", description="Name the features.")
    parser.add_argument("--docs", action="store_true", help="print docs/features.md instead of the names")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the names of the features, or their table."""
    arguments = build_parser().parse_args(argv)
    print(features_table() if arguments.docs else "\n".join(get_feature_columns()))  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
