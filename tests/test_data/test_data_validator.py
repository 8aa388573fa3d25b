"""The validator: honest bars pass, every planted fault is told, and real prices raise no false alarm."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data import data_validator
from data.cache_manager import BarCache
from data.data_fetcher import SampleSource, fetch_stock_data
from data.data_validator import DataValidator, adf_p_value, cached_features, findings, refuse_delisted
from data.feature_engineer import engineer_features, feature_set_hash
from data.schema import Bars, BarsReport, Provenance, bars_hash, clean_bars
from utils.base import DataError

HORIZON = 5


def honest_features(bars: pd.DataFrame) -> pd.DataFrame:
    """Momentum, distances and volatility: all of them tied to the past, none to the future."""
    close = np.log(bars["Close"])
    daily = close.diff()
    return pd.DataFrame(
        {
            "last_return": daily,
            "momentum_10": close.diff(10),
            "distance_50": close - close.rolling(50).mean(),
            "volatility_20": daily.rolling(20).std(),
            "range": np.log(bars["High"] / bars["Low"]),
            "close_location": (bars["Close"] - bars["Low"]) / (bars["High"] - bars["Low"]),
        }
    )


@pytest.fixture(scope="module")
def bars(make_bars):
    return make_bars(n=1_500, seed=3)


@pytest.fixture(scope="module")
def features(bars):
    return honest_features(bars)


def check_of(report, name):
    return next(check for check in report.checks if check.name == name)


class FakeCalendar:
    def __init__(self, sessions):
        self.sessions = sessions

    def missing(self, index):
        within = self.sessions[(self.sessions >= index[0]) & (self.sessions <= index[-1])]
        return within.difference(index)


def test_honest_bars_and_features_pass(bars, features, nyse_sessions):
    report = DataValidator(bars, features, calendar=FakeCalendar(nyse_sessions)).run_all_validations()
    assert report.is_usable
    assert report.problems() == ()
    assert {check.severity for check in report.checks} == {"ok"}
    assert [check.name for check in report.checks] == [
        "missing values",
        "leakage",
        "stationarity",
        "target",
        "gaps",
        "outliers",
    ]


def test_the_report_prints(bars, features):
    report = DataValidator(bars, features).run_all_validations()
    lines = str(report).splitlines()
    assert len(lines) == len(report.checks)
    assert lines[1].startswith("ok      leakage")
    assert check_of(report, "target").details["share_up"] == pytest.approx(0.55, abs=0.1)


# --- leakage ---


@pytest.mark.parametrize("leaked", ["last_return", "momentum_10", "distance_50", "range", "close_location"])
def test_a_feature_that_looks_one_bar_ahead_is_caught(bars, features, leaked):
    planted = features.assign(**{leaked: features[leaked].shift(-1)})
    report = DataValidator(bars, planted, horizon_bars=HORIZON).run_all_validations()
    assert not report.is_usable
    assert set(check_of(report, "leakage").details["suspicious"]) == {leaked}
    assert leaked in check_of(report, "leakage").summary


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_the_target_among_the_features_is_caught(bars, features, horizon):
    close = np.log(bars["Close"])
    noise = np.random.default_rng(0).normal(0, 0.015 * np.sqrt(horizon / 5), len(bars))
    planted = features.assign(target=close.shift(-horizon) - close + noise)
    report = DataValidator(bars, planted, horizon_bars=horizon).run_all_validations()
    assert set(check_of(report, "leakage").details["suspicious"]) == {"target"}


def test_a_feature_centred_on_the_future_is_caught(bars, features):
    close = np.log(bars["Close"])
    planted = features.assign(smoothed=close.rolling(3, center=True).mean() - close)
    report = DataValidator(bars, planted).run_all_validations()
    assert set(check_of(report, "leakage").details["suspicious"]) == {"smoothed"}


def test_predicting_the_past_label_well_is_no_leak_by_itself(bars, features):
    validator = DataValidator(bars, features.assign(past=np.log(bars["Close"]).diff(HORIZON)))
    tie = validator.leakage_ties()["past"]
    assert tie["past_bar"] > 0.3
    assert tie["next_bar"] < 0.1
    assert validator.check_leakage().severity == "ok"


def test_persistent_volatility_is_no_leak(make_bars):
    rng = np.random.default_rng(5)
    bars = make_bars(n=3_000, seed=5, start="1995-01-03")
    log_volatility = np.zeros(3_000)
    for t in range(1, 3_000):
        log_volatility[t] = 0.97 * log_volatility[t - 1] + 0.12 * rng.normal()
    close = np.exp(np.cumsum(0.012 * np.exp(log_volatility) * rng.normal(size=3_000)))
    clustered = bars.assign(Close=close, Open=close, High=close * 1.002, Low=close * 0.998)
    features = honest_features(clustered)[["last_return", "momentum_10", "distance_50", "volatility_20"]]
    check = DataValidator(clustered, features.assign(size=features["last_return"].abs())).check_leakage()
    assert check.severity == "ok", check


REAL = ("AAPL", "AIG", "EWJ", "F", "IXIC", "MO", "QQQ", "SPY", "VIX", "XLK")


@pytest.mark.parametrize("symbol", REAL)
def test_real_prices_raise_no_false_alarm_and_a_shift_is_caught(market_dir, symbol):
    raw = pd.read_csv(market_dir / f"{symbol}.csv", parse_dates=["Date"], index_col="Date")
    adjusted = raw["Adj Close"] / raw["Close"]
    bars = (
        raw[["Open", "High", "Low", "Close"]].mul(adjusted, axis=0).assign(Volume=raw["Volume"]).iloc[-4_000:]
    )
    features = honest_features(bars).replace([np.inf, -np.inf], np.nan).drop(columns="close_location")
    honest = DataValidator(bars, features).check_leakage()
    assert honest.severity == "ok", honest.summary
    for leaked in ("last_return", "momentum_10", "distance_50"):
        planted = features.assign(**{leaked: features[leaked].shift(-1)})
        found = DataValidator(bars, planted).check_leakage().details["suspicious"]
        assert set(found) == {leaked}


def test_the_registry_raises_no_false_alarm_on_the_calmest_index(market_dir):
    raw = pd.read_csv(market_dir / "SPY.csv", parse_dates=["Date"], index_col="Date")
    bars, _ = clean_bars(raw)
    # The volatility of an index is the most persistent of all: this is where an honest feature looks worst.
    assert DataValidator(bars, engineer_features(bars)).check_leakage().severity == "ok"


# --- the other checks ---


def test_missing_values_count_after_the_warm_up_only(bars, features):
    check = check_of(DataValidator(bars, features).run_all_validations(), "missing values")
    assert check.severity == "ok"
    few = features.copy()
    few.iloc[700:703, 1] = np.nan
    check = check_of(DataValidator(bars, few).run_all_validations(), "missing values")
    assert check.severity == "warning"
    assert list(check.details["share_missing"]) == ["momentum_10"]
    many = few.copy()
    many.iloc[800:900, 2] = np.inf
    assert check_of(DataValidator(bars, many).run_all_validations(), "missing values").severity == "error"
    empty = features.assign(nothing=np.nan)
    report = DataValidator(bars, empty).run_all_validations()
    assert check_of(report, "missing values").details["share_missing"] == {"nothing": 1.0}
    assert not report.is_usable


def test_a_price_among_the_features_wanders(bars, features):
    planted = features.assign(price=np.log(bars["Close"]), fixed=1.0)
    check = DataValidator(bars, planted).check_stationarity()
    assert check.severity == "warning"
    assert check.details["constant"] == ["fixed"]
    assert check.details["p_values"]["price"] > 0.05
    assert check.summary == "price may have a unit root; fixed do not vary"


def test_the_unit_root_test_survives_columns_without_rank():
    spike = np.zeros(500)
    spike[-1] = 1.0
    assert 0.0 <= adf_p_value(spike, 5) <= 1.0
    alternating = np.tile([0.0, 1.0], 250)
    assert 0.0 <= adf_p_value(alternating, 5) <= 1.0
    assert adf_p_value(np.arange(5.0), 5) == 1.0


def test_constant_prices_are_an_error_and_no_crash(bars, features):
    flat = bars.assign(Open=50.0, High=50.0, Low=50.0, Close=50.0)
    report = DataValidator(flat, features.assign(last_return=0.0)).run_all_validations()
    assert check_of(report, "target").severity == "error"
    assert not report.is_usable
    json.dumps([dict(check.details) for check in report.checks], allow_nan=False)


def test_a_price_that_only_rises_is_told(make_bars):
    bars = make_bars(n=800, drift=0.01)
    check = DataValidator(bars, honest_features(bars)).check_target()
    assert check.severity == "warning"
    assert "up" in check.summary


def test_missing_sessions_and_long_gaps_are_told(bars, features, nyse_sessions):
    calendar = FakeCalendar(nyse_sessions)
    few = bars.drop(bars.index[[100, 200, 201]])
    check = DataValidator(few, features.loc[few.index], calendar=calendar).check_gaps()
    assert check.severity == "warning"
    assert check.details["n_missing"] == 3
    assert check.details["missing"][0] == f"{bars.index[100]:%Y-%m-%d}"
    hole = bars.drop(bars.index[300:330])
    check = DataValidator(hole, features.loc[hole.index], calendar=calendar).check_gaps()
    assert check.severity == "error"
    assert len(check.details["long_gaps"]) == 1
    without = DataValidator(hole, features.loc[hole.index]).check_gaps()
    assert without.severity == "warning"


def test_a_forgotten_split_is_an_outlier(bars, features):
    split = bars.copy()
    split.iloc[800:, :4] /= 4
    check = DataValidator(split, features).check_outliers()
    assert check.severity == "warning"
    assert list(check.details["jumps_log"]) == [f"{bars.index[800]:%Y-%m-%d}"]
    wild = features.copy()
    wild.iloc[500, 3] = 9.0
    assert DataValidator(bars, wild).check_outliers().details["features"] == {"volatility_20": 1}


def test_too_few_rows_and_foreign_rows_are_refused(bars, features):
    report = DataValidator(bars.iloc[:60], features.iloc[:60]).run_all_validations()
    assert not report.is_usable
    assert report.problems() == ("size: 60 rows, at least 100 are needed to check anything",)
    with pytest.raises(DataError, match="do not stand on"):
        DataValidator(bars, features.iloc[1:])


def test_long_lists_are_cut_in_sentences_and_whole_in_details(bars, features, monkeypatch):
    monkeypatch.setattr(data_validator, "ADF_ROWS", 600)
    planted = features.assign(**{f"price_{i}": np.log(bars["Close"]) for i in range(12)})
    check = DataValidator(bars, planted).check_stationarity()
    assert check.summary.endswith("and 5 more may have a unit root")
    assert len(check.details["p_values"]) == 18


# --- features kept beside the bars ---


@pytest.fixture
def cache(tmp_path: Path) -> BarCache:
    return BarCache(tmp_path / "cache")


class Engineer:
    """A prefix-invariant engineer that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, bars: pd.DataFrame) -> pd.DataFrame:
        self.calls += 1
        returns = np.log(bars["Close"]).diff()
        return pd.DataFrame({"mean_5": returns.rolling(5).mean(), "range": bars["High"] / bars["Low"] - 1.0})


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
    until, longer = ibm("2010-01-05T23:00"), ibm("2012-01-05T23:00")
    for bars in (until, until, longer):
        kept = cached_features(
            bars, cache, engineer_features, feature_set_hash=feature_set_hash(), horizon_bars=5
        )
        assert bars_hash(kept) == bars_hash(engineer_features(bars.frame))


def as_bars(frame: pd.DataFrame) -> Bars:
    seen = Provenance(
        source="yahoo", fetched_at=datetime(2010, 1, 1, tzinfo=UTC), last_session=frame.index[-1], stale=True
    )
    return Bars(symbol="AAPL", frame=frame, provenance=seen, report=BarsReport())


def test_findings_keep_the_features_and_notice_when_those_of_the_past_change(
    make_bars, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_validator, "adf_p_value", lambda values, lags: 0.0)
    cache, bars = BarCache(tmp_path), make_bars(n=720)
    first = findings(as_bars(bars.iloc[:690]), 5, cache)
    assert findings(as_bars(bars.iloc[:690]), 5) == first
    assert findings(as_bars(bars.iloc[:700]), 5, cache) is not None
    assert "look-ahead" not in caplog.text
    monkeypatch.setattr(
        "data.data_validator.engineer_features", lambda frame: engineer_features(frame) + len(frame)
    )
    findings(as_bars(bars), 5, cache)
    assert "look-ahead" in caplog.text


def test_what_stopped_trading_is_not_trained(make_bars):
    bars = as_bars(make_bars(n=100))
    last = bars.frame.index[-1]
    refuse_delisted(bars, (last + pd.Timedelta(days=10)).tz_localize("UTC").to_pydatetime())
    with pytest.raises(DataError, match=r"no bar since .* delisted .* --source csv:DIR"):
        refuse_delisted(bars, (last + pd.Timedelta(days=30)).tz_localize("UTC").to_pydatetime())
