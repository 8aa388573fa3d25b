"""The features: a registry that says what each one is, and the functions that compute them.

All of them are known at the close of their bar, free of the scale of prices and volumes, bounded by fixed
constants, and finite after the declared warm-up whatever happens: no volume, no range, no move. None is the
one-day return. Optional families say what other series, aligned by session, had told by the same close.
"""

import argparse
import hashlib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import talib

from data import indicators as ind
from data.indicators import NO_MOVE, BarArrays, FloatArray
from data.schema import ALWAYS, BAR_COLUMNS, WEEKDAYS, bar_dates, calendar_name
from utils.base import DataError, UsageError

# Raised whenever values change while the words of a formula stay the same; part of the hash.
FEATURE_SET_VERSION = 1
REGIME_LOW, REGIME_HIGH = 0.75, 1.25
VIX_SERIES, MARKET_SERIES = "the series of ^VIX", "the market's series"
# Another series' close is too old to stand for a session after so many sessions without one.
MAX_AGE_SESSIONS = 5
# Calendars whose sessions end with New York's (16:00 there) or later on the same date.
_NOT_BEFORE_NEW_YORK = frozenset({"XNYS", "XTSE", "CMES", WEEKDAYS, ALWAYS})


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """What a feature is: column, family that it is computed with, formula in the legend's terms, its source.

    ``warmup_bars`` leading bars have no value, and after them it does not depend (within 1e-6) on older
    history; values beyond ``lower`` and ``upper`` are winsorised.
    """

    name: str
    family: str
    formula: str
    warmup_bars: int
    lower: float
    upper: float
    source: str


_TABLES = tomllib.loads(Path(__file__).with_name("features.toml").read_text(encoding="utf-8"))
_REGISTRY = tuple(
    FeatureSpec(name=n, family=family["name"], formula=f, warmup_bars=w, lower=low, upper=high, source=of)
    for family in _TABLES["family"]
    for n, f, w, low, high, of in family["rows"]
)
# What a feature is called where people read it; how words of the markets sound, -2 to 2.
FEATURE_WORDS: dict[str, str] = _TABLES["words"]
MARKET_WORDS: dict[str, float] = {w: tone["value"] for tone in _TABLES["tone"] for w in tone["words"].split()}
CROSS_ASSET, MARKET_CONTEXT, SENTIMENT = (
    tuple(spec for spec in _REGISTRY if spec.family == family)
    for family in ("cross_asset", "market_context", "sentiment")
)
SENTIMENT_COLUMNS = tuple(spec.name for spec in SENTIMENT)
FEATURES = tuple(spec for spec in _REGISTRY if spec not in CROSS_ASSET + MARKET_CONTEXT + SENTIMENT)
MAX_WARMUP_BARS: int = max(spec.warmup_bars for spec in FEATURES)


class FeatureRows:
    """Rows of ``block``, (features, bars), by the names of the features: winsorised, the warm-up blanked."""

    def __init__(self, n_bars: int, optional: tuple[FeatureSpec, ...] = ()) -> None:
        specs = FEATURES + optional
        self.block = np.empty((len(specs), n_bars))
        self._specs = {spec.name: (spec, row) for spec, row in zip(specs, self.block, strict=True)}

    def __getitem__(self, name: str) -> FloatArray:
        """Return a row that was stored before."""
        return self._specs[name][1]

    def __setitem__(self, name: str, values: FloatArray) -> None:
        """Store a feature while its values are still in the cache of the processor."""
        spec, row = self._specs[name]
        ind.winsorise(values, spec.lower, spec.upper, spec.warmup_bars, row)


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
    month = ind.rolling_sum(x.gk, 20) / 20
    rows["intraday_volatility"] = np.sqrt(ind.guarded_ratio(x.gk, month, NO_MOVE**2, 1.0))
    rows["overnight_return"] = x.overnight


def _std(ret: FloatArray, window: int) -> FloatArray:
    """Return `ind.return_std`, 0 where it is rounding only: nothing to divide by, nothing to multiply."""
    out = ind.return_std(ret, window)
    out[out <= NO_MOVE] = 0.0
    return out


def _cross_asset(x: BarArrays, rows: FeatureRows, vix: FloatArray) -> None:
    """Store the family; ``vix`` as :func:`align_close` gives it."""
    rows["vix_level"] = level = vix / 100.0
    spread = np.sqrt(252.0) * _std(x.ret, 20) - level
    mean, _, deviation = ind.rolling_deviations(spread, 120)
    rows["vix_change"] = ind.log_change(np.log(vix), 0, 5)
    rows["rv_iv_spread"] = spread
    rows["rv_iv_zscore"] = ind.guarded_ratio(spread - mean, deviation, NO_MOVE, 0.0)


def _market_context(x: BarArrays, rows: FeatureRows, market: FloatArray) -> None:
    """Store the family; ``market`` as :func:`align_close` gives it."""
    log_market = np.log(market)
    ret = ind.log_change(log_market, 0, 1)
    own, theirs, month = _std(x.ret, 60), _std(ret, 60), _std(ret, 20)
    means = ind.rolling_sum(x.ret, 60) * ind.rolling_sum(ret, 60) / 3600
    covariance = ind.rolling_sum(x.ret * ret, 60) / 60 - means
    rows["beta_60d"] = ind.guarded_ratio(covariance, theirs * theirs, 0.0, 0.0)
    rows["correlation_60d"] = ind.guarded_ratio(covariance, own * theirs, 0.0, 0.0)
    for n in (20, 60):
        ahead = ind.log_change(x.log_close, 0, n) - ind.log_change(log_market, 0, n)
        rows[f"relative_strength_{n}d"] = ahead / (x.sigma_20 * np.sqrt(n))
    rows["relative_volatility_20d"] = ind.guarded_ratio(_std(x.ret, 20), month, 0.0, 1.0)
    rows["market_volatility_20d"] = month
    month_sigma = np.maximum(month, ind.MIN_SIGMA_LOG)
    rows["market_velocity_20d"] = ind.log_change(log_market, 0, 20) / (month_sigma * np.sqrt(20))


def refuse_earlier_closes(symbols: Iterable[str]) -> None:
    """Refuse symbols that close before New York, by a ``UsageError``: that close would be their future."""
    if early := [symbol for symbol in symbols if calendar_name(symbol) not in _NOT_BEFORE_NEW_YORK]:
        raise UsageError(
            f"{', '.join(early)}: the exchange closes before New York, where the day's ^VIX and market are "
            "not known yet; train without them"
        )


def _closes(other: pd.DataFrame, name: str) -> "pd.Series[float]":
    """Return the closes of another series by session, without the rows that have no close."""
    is_dated = isinstance(other.index, pd.DatetimeIndex) and not other.index.hasnans
    if list(other.columns).count("Close") != 1 or not is_dated:
        raise DataError(f"{name} needs one column Close over dates: pass bars")
    try:
        close = other["Close"].astype(np.float64).set_axis(bar_dates(other))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} holds something that is not a number: {error}") from error
    if not (close.index.is_unique and close.index.is_monotonic_increasing):
        raise DataError(f"{name} has doubled or unsorted sessions: pass bars that `clean_bars` has mended")
    if (close := close.dropna()).empty:
        raise DataError(f"{name} has no close at all: fetch it again")
    if not (np.isfinite(close) & (close > 0.0)).all():
        raise DataError(f"{name} has closes that are not positive numbers: fetch it again")
    return close


def align_close(bars: pd.DataFrame, other: pd.DataFrame, name: str) -> FloatArray:
    """Return another series' close as of each bar's close; ``name`` is what errors call the series.

    Row t of (n,) is the last close at or before session t; NaN before the series begins. Raises ``DataError``
    if that close is more than `MAX_AGE_SESSIONS` sessions old, or the series cannot be used.
    """
    close = _closes(other, name)
    sessions, theirs = (np.asarray(i, dtype="datetime64[D]") for i in (bar_dates(bars), close.index))
    last = np.searchsorted(theirs, sessions, side="right") - 1
    seen = theirs[np.maximum(last, 0)]
    age = np.arange(len(sessions)) - np.searchsorted(sessions, seen, side="right") + 1
    # Before the first bar there are no sessions to count: weekdays stand for them.
    age += np.maximum(np.busday_count(seen, sessions[:1]) - 1, 0)
    if (old := (last >= 0) & (age > MAX_AGE_SESSIONS)).any():
        row = int(np.argmax(old))
        raise DataError(
            f"{name} has no close for {sessions[row]}: its last one, of {seen[row]}, is more than "
            f"{MAX_AGE_SESSIONS} sessions old; fetch it again, or end the bars there"
        )
    return np.where(last >= 0, np.asarray(close)[last], np.nan)


# In this order: a feature may be made of one that was stored before.
_FAMILIES = (
    _returns_volatility, _momentum, _trend, _bands, _multi_timeframe, _regime,
    _volume, _pattern, _microstructure,
)  # fmt: skip


def engineer_features(
    bars: pd.DataFrame, *, vix: pd.DataFrame | None = None, market: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Compute every feature of the registry: float64, indexed like ``bars``, in the registry's order.

    Row t is known at the close of t, the same to the last bit whatever follows. NaN in the declared warm-ups
    and nowhere else; that of an optional family counts from the first session of its series where that
    begins later. Raises ``DataError`` as `align_close` does, when ``vix`` or ``market`` cannot be used.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars of one symbol, ascending; prices positive, nothing missing. What headlines
        say is appended, too, where `data.data_fetcher` has put it beside them.
    vix, market
        Bars of ^VIX and of the market (only ``Close`` is read); each appends its optional family. They must
        have closed by the close of the bars: see `refuse_earlier_closes`.
    """
    optional = _optional(vix is not None, market is not None, has_sentiment(bars))
    rows = FeatureRows(len(bars), optional)
    if len(bars):
        x = ind.bar_arrays(*(np.array(bars[name], dtype=np.float64) for name in BAR_COLUMNS))
        for compute in _FAMILIES:
            compute(x, rows)
        if vix is not None:
            _cross_asset(x, rows, align_close(bars, vix, VIX_SERIES))
        if market is not None:
            _market_context(x, rows, align_close(bars, market, MARKET_SERIES))
        for name in SENTIMENT_COLUMNS if has_sentiment(bars) else ():
            rows[name] = np.array(bars[name])
    columns = [spec.name for spec in FEATURES + optional]
    return pd.DataFrame(rows.block.T, index=bars.index, columns=columns, copy=False)


def has_sentiment(table: pd.DataFrame) -> bool:
    """Tell whether what headlines say is among the columns."""
    return set(SENTIMENT_COLUMNS) <= set(table.columns)


def usable_rows(features: npt.NDArray[np.floating], columns: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which rows are complete, (n,). Headlines may lack: NaN is what trees learn of it."""
    needed = [name not in SENTIMENT_COLUMNS for name in columns]
    return np.asarray(np.isfinite(features[:, needed]).all(axis=1), dtype=np.bool_)


def _optional(*asked: bool) -> tuple[FeatureSpec, ...]:
    families = zip(asked, (CROSS_ASSET, MARKET_CONTEXT, SENTIMENT), strict=True)
    return tuple(spec for is_asked, specs in families if is_asked for spec in specs)


def warmup_bars(
    bars: pd.DataFrame, *, vix: pd.DataFrame | None = None, market: pd.DataFrame | None = None
) -> int:
    """Return how many leading rows of :func:`engineer_features` to leave out; maybe more than there are."""
    needed = MAX_WARMUP_BARS
    for other, name, specs in ((vix, VIX_SERIES, CROSS_ASSET), (market, MARKET_SERIES, MARKET_CONTEXT)):
        if other is not None:
            before = int(np.count_nonzero(bar_dates(bars) < _closes(other, name).index[0]))
            needed = max(needed, before + max(spec.warmup_bars for spec in specs))
    return needed


def get_feature_columns(
    include_sentiment: bool = False,  # noqa: FBT001, FBT002
    *,
    cross_asset: bool = False,
    market_context: bool = False,
) -> list[str]:
    """Return the names of the features, in order; the optional families only if asked for."""
    return [spec.name for spec in FEATURES + _optional(cross_asset, market_context, include_sentiment)]


def feature_set_hash(*, cross_asset: bool = False, market_context: bool = False) -> str:
    """Return the sha256 of the registry and its version: what a cache or a bundle was made with."""
    specs = FEATURES + _optional(cross_asset, market_context, False)  # noqa: FBT003
    content = repr((FEATURE_SET_VERSION, [astuple(spec) for spec in specs]))
    return hashlib.sha256(content.encode()).hexdigest()


def _rows_of(specs: tuple[FeatureSpec, ...]) -> str:
    rows = ((s, s.formula.replace("|", "\\|")) for s in specs)
    return "\n".join(
        f"| {s.name} | {s.family} | {formula} | {s.warmup_bars} | {s.lower:g} to {s.upper:g} | {s.source} |"
        for s, formula in rows
    )


def features_table() -> str:
    """Return the registry as a Markdown page; ``docs/features.md`` is this text."""
    figures = {"n": len(FEATURES), "warmup_bars": MAX_WARMUP_BARS, "max_age": MAX_AGE_SESSIONS}
    optional = _rows_of(CROSS_ASSET + MARKET_CONTEXT + SENTIMENT)
    return str(_TABLES["page"].format(**figures, always=_rows_of(FEATURES), if_asked=optional))


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
