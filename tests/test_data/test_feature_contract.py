"""One contract for every feature; each check is shown a fault that it must catch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import feature_engineer
from data.feature_engineer import (
    CROSS_ASSET,
    FEATURES,
    MARKET_CONTEXT,
    MAX_WARMUP_BARS,
    FeatureRows,
    engineer_features,
    get_feature_columns,
)

Compute = Callable[[pd.DataFrame], pd.DataFrame]
NAMES = get_feature_columns()
SPECS = FEATURES + CROSS_ASSET + MARKET_CONTEXT
ALL_NAMES = get_feature_columns(cross_asset=True, market_context=True)
PRICES = ["Open", "High", "Low", "Close"]
# Neighbours too: a flag that changes rarely must change at one of them.
CUTS = (*range(262, 330), *range(330, 640, 13), 637, 638, 639)


def prefix_violations(compute: Compute, bars: pd.DataFrame, cuts: tuple[int, ...] = CUTS) -> set[str]:
    """Names of the columns that a prefix of the bars gives other bits than all bars do."""
    full = compute(bars)
    found: set[str] = set()
    for cut in cuts:
        part = compute(bars.iloc[:cut])
        same = np.array(part).view(np.int64) == np.array(full.iloc[:cut]).view(np.int64)
        both_nan = np.isnan(part.to_numpy()) & np.isnan(full.iloc[:cut].to_numpy())
        found |= set(full.columns[~(same | both_nan).all(axis=0)])
    return found


def scale_violations(compute: Compute, bars: pd.DataFrame) -> set[str]:
    scaled = bars.copy()
    scaled[[*PRICES, "Volume"]] *= 1000.0
    gap = (compute(scaled) - compute(bars)).abs().max()
    return set(gap.index[~(gap < 1e-9)])


def warmup_violations(compute: Compute, warmup_bars: Mapping[str, int], bars: pd.DataFrame) -> set[str]:
    """Names whose warm-up is not exactly NaN, or after which older history still matters."""
    full = compute(bars)
    first = full.notna().to_numpy().argmax(axis=0)
    found = {name for name, row in zip(full.columns, first, strict=True) if row != warmup_bars[name]}
    for start in (1, 3, 50, 137, 211, 320):
        gap = (compute(bars.iloc[start:]) - full.iloc[start:]).abs().to_numpy()
        for column, name in enumerate(full.columns):
            if not (gap[warmup_bars[name] :, column] < 1e-6).all():
                found.add(name)
    return found


def range_violations(compute: Compute, bars: pd.DataFrame) -> set[str]:
    """Names that are not finite, or not within their bounds, after the warm-up."""
    values = compute(bars).iloc[MAX_WARMUP_BARS:]
    return {
        spec.name
        for spec in SPECS
        if not values[spec.name].between(spec.lower, spec.upper).all()
        or not np.isfinite(values[spec.name]).all()
    }


def return_violations(compute: Compute, bars: pd.DataFrame) -> set[str]:
    """Names that rank the bars as the one-day return does, whatever its form or sign."""
    ranks = compute(bars).iloc[MAX_WARMUP_BARS:].rank()
    close = bars["Close"]
    return set(ranks.columns[ranks.corrwith(close.pct_change().reindex(ranks.index).rank()).abs() > 0.98])


@dataclass(frozen=True)
class AllFeatures:
    """The optional families too; the other series end where the bars end, and may be scaled."""

    market_factor: float = 1.0
    peek_bars: int = 0

    def __call__(self, bars: pd.DataFrame) -> pd.DataFrame:
        vix, market = (
            series.loc[: bars.index[-1]].shift(-self.peek_bars).ffill() for series in _other_series()
        )
        return engineer_features(bars, vix=vix, market=market * self.market_factor)


all_features = AllFeatures()


@cache
def _other_series() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Closes of a ^VIX and of a market on the days of the bars, but for a holiday; the market has a halt."""
    rng = np.random.default_rng(12)
    bars = _bars_with_quirks()
    returns = 0.5 * np.log(bars["Close"]).diff().fillna(0.0) + rng.normal(0, 0.007, len(bars))
    returns.iloc[450:475] = 0.0
    vix = 18 * np.exp(np.cumsum(0.9 * rng.normal(0, 0.06, len(bars)) - 0.02 * np.sin(np.arange(len(bars)))))
    others = pd.DataFrame({"Close": vix}, bars.index), pd.DataFrame({"Close": 300 * np.exp(returns.cumsum())})
    return others[0].drop(bars.index[[290, 291, 511]]), others[1].drop(bars.index[[305, 402]])


def with_column(
    name: str, column: Callable[[pd.DataFrame, pd.DataFrame], pd.Series], base: Compute = all_features
) -> Compute:
    """Replace one feature by what ``column`` makes of the bars and the true features."""

    def compute(bars: pd.DataFrame) -> pd.DataFrame:
        features = base(bars)
        return features.assign(**{name: column(bars, features).clip(-1e9, 1e9)})

    return compute


@cache
def _bars_with_quirks() -> pd.DataFrame:
    """640 bars with real ranges, some of them halted, some with equal closes, some without volume."""
    rng = np.random.default_rng(11)
    n = 640
    close = np.round(50 * np.exp(np.cumsum(0.015 * rng.standard_t(4, n))), 2)
    close[400:404] = close[400]
    open_ = np.round(np.concatenate([close[:1], close[:-1]]) * np.exp(rng.normal(0, 0.008, n)), 2)
    high = np.maximum(open_, close) + np.round(rng.exponential(0.3, n), 2)
    low = np.minimum(open_, close) - np.round(rng.exponential(0.3, n), 2)
    for row in (300, 301, 402):
        open_[row] = high[row] = low[row] = close[row]
    volume = np.round(rng.lognormal(14, 0.6, n))
    volume[[250, 402, 500]] = 0.0
    columns = {"Open": open_, "High": high, "Low": low, "Close": close, "Volume": volume}
    return pd.DataFrame(columns, index=pd.bdate_range("2010-01-04", periods=n, name="date"))


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return _bars_with_quirks()


@cache
def _prefix(length: int) -> pd.DataFrame:
    return all_features(_bars_with_quirks().iloc[:length])


# --- prefix invariance ----------------------------------------------------------------------------


def test_no_feature_changes_when_bars_are_added(bars: pd.DataFrame) -> None:
    assert prefix_violations(all_features, bars) == set()


def test_no_feature_changes_when_bars_are_added_to_short_histories(bars: pd.DataFrame) -> None:
    assert (
        prefix_violations(all_features, bars, (1, 2, 3, 5, 14, 20, 21, 34, 60, 199, 200, 201, 251)) == set()
    )


# The last row repeats the one before: no NaN gives a mutant away, only its values do.


def test_every_feature_that_looks_one_bar_ahead_is_caught(bars: pd.DataFrame) -> None:
    assert prefix_violations(lambda part: _prefix(len(part)).shift(-1).ffill(), bars) == set(ALL_NAMES)


@pytest.mark.parametrize("name", ["volatility_5d", "inside_bar", "beta_60d"])
def test_a_look_ahead_is_laid_to_the_feature_that_has_it(name: str, bars: pd.DataFrame) -> None:
    def mutant(part: pd.DataFrame) -> pd.DataFrame:
        features = _prefix(len(part))
        return features.assign(**{name: features[name].shift(-1).ffill()})

    assert prefix_violations(mutant, bars) == {name}


def test_another_series_next_close_is_caught(bars: pd.DataFrame) -> None:
    optional = {spec.name for spec in CROSS_ASSET + MARKET_CONTEXT}
    assert prefix_violations(AllFeatures(peek_bars=1), bars) == optional


def test_the_optional_families_leave_the_others_as_they_are(bars: pd.DataFrame) -> None:
    plain = engineer_features(bars)
    assert list(plain.columns) == NAMES
    pd.testing.assert_frame_equal(all_features(bars)[NAMES], plain, check_exact=True)


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 449))
@settings(max_examples=25, deadline=None)
def test_any_prefix_of_any_bars_gives_the_same_bits(
    seed: int, cut: int, make_bars: Callable[..., pd.DataFrame]
) -> None:
    assert prefix_violations(engineer_features, make_bars(n=450, seed=seed), (cut,)) == set()


# --- scale ----------------------------------------------------------------------------------------


def test_no_feature_knows_the_scale_of_prices_and_volumes(bars: pd.DataFrame) -> None:
    assert scale_violations(all_features, bars) == set()


def test_no_feature_knows_the_scale_of_the_market(bars: pd.DataFrame) -> None:
    gap = (AllFeatures(market_factor=1000.0)(bars) - all_features(bars)).abs().max()
    assert (gap < 1e-9).all()


def test_features_of_other_scales_are_caught(bars: pd.DataFrame) -> None:
    in_dollars = with_column("macd", lambda b, f: f["macd"] * b["Close"])
    in_shares = with_column("obv_slope", lambda b, f: f["obv_slope"] * b["Volume"])
    beyond = with_column("relative_volatility_20d", lambda b, f: f["beta_60d"] * b["Close"])
    a_dollar = with_column("higher_high", lambda b, f: (b["High"].diff() > 1.0).astype(float))
    assert scale_violations(in_dollars, bars) == {"macd"}
    assert scale_violations(in_shares, bars) == {"obv_slope"}
    assert scale_violations(a_dollar, bars) == {"higher_high"}
    assert scale_violations(beyond, bars) == {"relative_volatility_20d"}


# --- warm-up --------------------------------------------------------------------------------------


def _declared() -> dict[str, int]:
    return {spec.name: spec.warmup_bars for spec in SPECS}


def test_declared_warm_ups_are_true(bars: pd.DataFrame, make_bars: Callable[..., pd.DataFrame]) -> None:
    assert warmup_violations(all_features, _declared(), bars) == set()
    assert warmup_violations(engineer_features, _declared(), make_bars(n=900, seed=3)) == set()


def test_an_optional_warm_up_declared_too_short_is_caught(
    bars: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tuple(
        replace(spec, warmup_bars=40) if spec.name == "beta_60d" else spec for spec in MARKET_CONTEXT
    )
    monkeypatch.setattr(feature_engineer, "MARKET_CONTEXT", short)
    assert warmup_violations(all_features, _declared() | {"beta_60d": 40}, bars) == {"beta_60d"}


@pytest.mark.parametrize(
    "name", ["rsi_14", "macd", "tsi", "adx_14", "atr_14", "price_to_sma", "momentum_250d"]
)
def test_a_warm_up_declared_too_short_is_caught(
    name: str, bars: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tuple(replace(spec, warmup_bars=60) if spec.name == name else spec for spec in FEATURES)
    monkeypatch.setattr(feature_engineer, "FEATURES", short)
    declared = {spec.name: spec.warmup_bars for spec in short}
    assert warmup_violations(engineer_features, declared, bars) == {name}


def test_a_feature_that_carries_its_whole_history_is_caught(bars: pd.DataFrame) -> None:
    cumulative = with_column(
        "obv_slope", lambda b, f: f["obv_slope"] * 0 + np.sign(b["Close"].diff()).cumsum() / 99
    )
    assert warmup_violations(cumulative, _declared(), bars) == {"obv_slope"}


# --- faults ---------------------------------------------------------------------------------------


def _flat(bars: pd.DataFrame, rows: slice) -> pd.DataFrame:
    flat = bars.copy()
    flat.iloc[rows, flat.columns.get_indexer(PRICES)] = float(bars["Close"].iloc[rows.start or 0])
    flat.iloc[rows, flat.columns.get_loc("Volume")] = 0.0
    return flat


def _faults() -> Iterator[tuple[str, pd.DataFrame]]:
    bars = _bars_with_quirks()
    yield "no volume", bars.assign(Volume=0.0)
    yield "volume of one bar in fifty", bars.assign(Volume=np.where(np.arange(len(bars)) % 50, 0.0, 1e6))
    yield "constant prices", _flat(bars, slice(0, None))
    yield "constant prices that binary fractions cannot hold", _flat(bars, slice(0, None)) * 0.1
    yield "constant prices with volume", _flat(bars, slice(0, None)).assign(Volume=5e5)
    yield "halted to the end", _flat(bars, slice(280, None))
    yield "halted for a year", _flat(bars, slice(300, 552))
    yield "halted, then a jump", _flat(bars, slice(0, 400))
    yield "one price a bar", bars.assign(Open=bars["Close"], High=bars["Close"], Low=bars["Close"])
    growth = pd.Series(10 * 1.001 ** np.arange(len(bars)), bars.index)
    yield "growth without a ripple", bars.assign(Open=growth, High=growth, Low=growth, Close=growth)
    crash = np.where(np.arange(len(bars)) < 400, 1.0, 1e-3)
    yield "a crash to a thousandth", bars.assign(**{name: bars[name] * crash for name in PRICES})
    yield "a thousandfold jump", bars.assign(**{name: bars[name] / crash for name in PRICES})
    yield "prices of a ten-thousandth", bars.assign(**{name: bars[name] * 1e-4 for name in PRICES})
    yield "huge volume", bars.assign(Volume=bars["Volume"] * 1e9)


@pytest.mark.parametrize(("fault", "broken"), list(_faults()), ids=[fault for fault, _ in _faults()])
def test_features_stay_finite_and_bounded(fault: str, broken: pd.DataFrame) -> None:
    assert range_violations(all_features, broken) == set()
    assert scale_violations(all_features, broken) == set()


@pytest.mark.parametrize(("fault", "broken"), list(_faults()), ids=[fault for fault, _ in _faults()])
def test_faults_do_not_make_prefixes_differ(fault: str, broken: pd.DataFrame) -> None:
    assert prefix_violations(all_features, broken, (270, 303, 401, 553, 600)) == set()


def test_features_that_break_on_a_fault_are_caught(bars: pd.DataFrame) -> None:
    silent = bars.assign(Volume=0.0)
    undefined = with_column("volume_sma_ratio", lambda b, f: b["Volume"] / b["Volume"].rolling(20).mean())
    unbounded = with_column("roc_20", lambda b, f: b["Close"])
    assert range_violations(undefined, silent) == {"volume_sma_ratio"}
    assert range_violations(unbounded, bars) == {"roc_20"}
    unguarded = with_column("beta_60d", lambda b, f: f["vix_level"] / 0.0)
    assert range_violations(unguarded, bars) == {"beta_60d"}


def test_a_halted_stock_says_nothing() -> None:
    last = engineer_features(_flat(_bars_with_quirks(), slice(280, None))).iloc[-1]
    ones = {
        "volatility_ratio",
        "atr_ratio_5_20",
        "true_range_ratio",
        "volume_sma_ratio",
        "intraday_volatility",
    }
    halves = {"rsi_14", "rsi_7", "stoch_k", "stoch_d", "bollinger_position", "mfi_14"}
    neutral = dict.fromkeys(ones, 1.0) | dict.fromkeys(halves, 0.5) | {"williams_r": -0.5}
    # 360 bars without a move against 200 before them: all that remains calm is calm.
    neutral["volatility_regime_normal"] = 1.0
    for name, value in last.items():
        assert value == pytest.approx(neutral.get(name, 0.0), abs=1e-6), name


# --- what a feature must not be -------------------------------------------------------------------


def test_no_feature_is_the_one_day_return(make_bars: Callable[..., pd.DataFrame]) -> None:
    assert return_violations(engineer_features, make_bars(n=900, seed=5)) == set()
    assert return_violations(all_features, _bars_with_quirks()) == set()


@pytest.mark.parametrize(
    "disguise",
    [
        lambda b, f: b["Close"].pct_change(),
        lambda b, f: np.log(b["Close"]).diff(),
        lambda b, f: -b["Close"].diff() / b["Close"],
        lambda b, f: np.tanh(50 * b["Close"].pct_change()),
    ],
)
def test_the_one_day_return_in_disguise_is_caught(
    disguise: Callable[[pd.DataFrame, pd.DataFrame], pd.Series], make_bars: Callable[..., pd.DataFrame]
) -> None:
    disguised = with_column("roc_10", disguise, engineer_features)
    assert return_violations(disguised, make_bars(n=900, seed=5)) == {"roc_10"}


# --- the registry ---------------------------------------------------------------------------------


def test_the_registry_has_the_families_of_the_design() -> None:
    families = pd.Series([spec.family for spec in FEATURES]).value_counts().to_dict()
    assert families == {
        "returns_volatility": 8,
        "momentum": 12,
        "trend": 10,
        "bands": 6,
        "volume": 6,
        "multi_timeframe": 8,
        "pattern": 6,
        "regime": 6,
        "microstructure": 4,
    }
    assert (len(CROSS_ASSET), len(MARKET_CONTEXT)) == (4, 7)
    assert len(set(ALL_NAMES)) == len(ALL_NAMES) == len(NAMES) + 11
    assert 60 <= len(NAMES) <= 80


def test_every_registered_feature_is_computed_and_nothing_else(
    bars: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[set[str]] = []

    class Watched(FeatureRows):
        def __init__(self, n_bars: int, optional: tuple[feature_engineer.FeatureSpec, ...]) -> None:
            super().__init__(n_bars, optional)
            made.append(set())

        def __setitem__(self, name: str, values: np.ndarray) -> None:
            super().__setitem__(name, values)
            made[-1].add(name)

    monkeypatch.setattr(feature_engineer, "FeatureRows", Watched)
    assert list(engineer_features(bars).columns) == NAMES
    assert list(all_features(bars).columns) == ALL_NAMES
    assert made == [set(NAMES), set(ALL_NAMES)]


@pytest.mark.parametrize("spec", SPECS, ids=ALL_NAMES)
def test_every_feature_says_what_it_is(spec: feature_engineer.FeatureSpec, bars: pd.DataFrame) -> None:
    assert spec.formula
    assert spec.source
    assert 0 <= spec.warmup_bars <= MAX_WARMUP_BARS
    assert spec.lower < spec.upper
    values = _prefix(len(bars))[spec.name].iloc[MAX_WARMUP_BARS:]
    assert values.min() < values.max(), "a constant is no feature"
    at_a_bound = ((values <= spec.lower) | (values >= spec.upper)).mean()
    assert at_a_bound < 0.05 or values.nunique() <= 6 or spec.name.startswith("gap"), (
        "the bounds cut away what varies"
    )
