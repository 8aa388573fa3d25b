"""Look at bars, features and target before anything is trained, and say in words what is wrong with them."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import kurtosis, rankdata, skew
from statsmodels.tools.sm_exceptions import SingularMatrixWarning
from statsmodels.tsa.stattools import adfuller

from data.cache_manager import BarCache, TableMeta
from data.feature_engineer import SENTIMENT_COLUMNS, engineer_features, feature_set_hash
from data.indicators import FloatArray
from data.schema import BAR_COLUMNS, Bars, SessionCalendar, bars_hash, calendar_for
from data.target_engineering import DEFAULT_HORIZON_BARS, make_target
from utils.base import DataError

logger = logging.getLogger(__name__)

Severity = Literal["ok", "warning", "error"]

MAX_NAMED = 8
# Rank correlation with the target above which a feature is too close to it to be honest.
MAX_TARGET_TIE = 0.30
# That of a feature's last change with the next bar above which it is implausible: by itself, and where it is
# also so many times the tie with the bar that the feature has just seen. All three are widened by so many
# standard errors of a correlation of noise.
MAX_NEXT_BAR_TIE, MAX_NEXT_BAR_TIE_OVER_PAST, TIMES_PAST_TIE, NOISE_Z = 0.17, 0.10, 1.5, 2.0
# Share of values missing after the warm-up, and of sessions missing, above which they are an error.
MAX_NAN_FRACTION = MAX_MISSING_FRACTION = 0.01
# Augmented Dickey-Fuller test: p-value that counts as not stationary, latest rows that are read, lags.
MAX_ADF_P, ADF_ROWS, ADF_LAGS = 0.05, 2_520, 5
# Robust z-score of a feature, and of a daily log return, above which a value is an outlier.
OUTLIER_Z = 25.0
# With fewer rows no check could tell anything.
MIN_ROWS = 100
# Who has had no bar for more sessions will have none any more.
DELISTED_AFTER_SESSIONS = 10
# The least that training learns from. Two years (short of holidays): fewer sessions know the correlation with
# a 5-day return to within 0.1 at best, more than any headline is worth. And two rows of five: else most folds
# would train, and most of the verdict would be earned, on rows that know nothing of the news.
LEAST_SESSIONS, LEAST_SHARE = 480, 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Outcome of one check: its name, how bad it is, one sentence, and the figures as plain data."""

    name: str
    severity: Severity
    summary: str
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """Outcome of all checks, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def is_usable(self) -> bool:
        """Whether no check found an error."""
        return all(check.severity != "error" for check in self.checks)

    def problems(self) -> tuple[str, ...]:
        """Return the sentences of the checks that are not ok."""
        return tuple(f"{check.name}: {check.summary}" for check in self.checks if check.severity != "ok")

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        return "\n".join(f"{c.severity:<8}{c.name:<{width}}  {c.summary}" for c in self.checks)


class DataValidator:
    """Checks one symbol's bars and features.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars on ascending sessions.
    features
        On the same rows; missing at the start of a column only.
    horizon_bars
        Length of the labels.
    calendar
        For the gap check; None leaves only gaps of more than a week to be seen.
    """

    def __init__(
        self,
        bars: pd.DataFrame,
        features: pd.DataFrame,
        *,
        horizon_bars: int = DEFAULT_HORIZON_BARS,
        calendar: SessionCalendar | None = None,
    ) -> None:
        if not features.index.equals(bars.index):
            raise DataError(
                f"{len(features)} feature rows do not stand on the {len(bars)} sessions of the bars"
            )
        self._index = pd.DatetimeIndex(bars.index)
        self._columns = {str(name): np.array(features[name], dtype=np.float64) for name in features.columns}
        self._horizon_bars, self._calendar = horizon_bars, calendar
        self._log_close = np.log(np.asarray(bars["Close"], dtype=np.float64))
        self._target = np.asarray(make_target(bars, horizon_bars)["target_log"], dtype=np.float64)

    def run_all_validations(self) -> ValidationReport:
        """Make every check."""
        if len(self._index) < MIN_ROWS:
            said = f"{len(self._index)} rows, at least {MIN_ROWS} are needed to check anything"
            return ValidationReport(checks=(Check(name="size", severity="error", summary=said, details={}),))
        checks = (
            self.check_missing_values,
            self.check_leakage,
            self.check_stationarity,
            self.check_target,
            self.check_gaps,
            self.check_outliers,
        )
        return ValidationReport(checks=tuple(check() for check in checks))

    def check_leakage(self) -> Check:
        """Look for features that know the future.

        Two tests. A feature must not lie close to the target itself. And the *change* of a feature at the
        close of t may go with the bar that has just ended, as every momentum does, but not with the bar to
        come, be it its direction or its size: that is how a feature looks that was shifted by one bar.
        Volatility is persistent and one-day reversals exist, so only a tie that no real price shows is an
        error. A feature that is slow, or says nothing about prices, can be shifted unseen by this; the
        recomputation on cut history in the tests of the feature registry sees all of them.
        """
        ties, found = self.leakage_ties(), {}
        for name, tie in ties.items():
            over_past = max(MAX_NEXT_BAR_TIE_OVER_PAST + tie["noise"], TIMES_PAST_TIE * tie["past_bar"])
            if (
                tie["target"] > MAX_TARGET_TIE + tie["noise"] * self._horizon_bars**0.5
                or tie["next_bar"] > MAX_NEXT_BAR_TIE + tie["noise"]
                or tie["next_bar"] > over_past
            ):
                found[name] = {key: round(value, 4) for key, value in tie.items()}
        summary = f"{len(ties)} features know nothing of the next bar that prices do not tell"
        if found:
            summary = f"{_named(found)} know more of the future than any price tells: they look ahead"
        severity: Severity = "error" if found else "ok"
        return Check(name="leakage", severity=severity, summary=summary, details={"suspicious": found})

    def leakage_ties(self) -> dict[str, dict[str, float]]:
        """Return the absolute rank correlations behind `check_leakage`, by feature.

        ``target``: of the feature with the target; ``next_bar`` and ``past_bar``: of its change with the next
        and the last bar (direction or size, the larger); ``noise``: the margin for chance.
        """
        last = np.diff(self._log_close, prepend=np.nan)
        following = np.append(last[1:], np.nan)
        ties = {}
        for name, values in self._columns.items():
            column = np.where(np.isfinite(values), values, np.nan)
            change = np.diff(column, prepend=np.nan)
            ties[name] = {
                "target": _tie(column, self._target),
                "next_bar": max(_tie(change, following), _tie(change, np.abs(following))),
                "past_bar": max(_tie(change, last), _tie(change, np.abs(last))),
                "noise": NOISE_Z / max(int(np.isfinite(change).sum()), 1) ** 0.5,
            }
        return ties

    def check_missing_values(self) -> Check:
        """Look for values that are missing or infinite after a feature's first one."""
        found = {}
        for name, values in self._columns.items():
            finite = np.isfinite(values)
            holes = ~finite[int(finite.argmax()) :]
            if holes.any():
                found[name] = float(holes.mean())
        if not found:
            return Check(name="missing values", severity="ok", summary="none after the warm-up", details={})
        most = max(found.values())
        return Check(
            name="missing values",
            severity="error" if most > MAX_NAN_FRACTION else "warning",
            summary=f"{_named(found)} miss up to {most:.2%} of their values after the warm-up",
            details={"share_missing": found},
        )

    def check_stationarity(self) -> Check:
        """Test each feature for a unit root (augmented Dickey-Fuller); a constant one is named apart."""
        p_values: dict[str, float] = {}
        constant: list[str] = []
        for name, values in self._columns.items():
            column = values[-ADF_ROWS:]
            column = column[np.isfinite(column)]
            if len(column) < MIN_ROWS or np.ptp(column) <= 1e-12:
                constant.append(name)
            else:
                p_values[name] = adf_p_value(column, ADF_LAGS)
        wandering = [name for name, p in p_values.items() if p > MAX_ADF_P]
        parts = [f"{_named(wandering)} may have a unit root"] if wandering else []
        parts += [f"{_named(constant)} do not vary"] if constant else []
        return Check(
            name="stationarity",
            severity="warning" if parts else "ok",
            summary="; ".join(parts) or f"all {len(p_values)} features are stationary",
            details={"p_values": p_values, "constant": constant},
        )

    def check_target(self) -> Check:
        """Describe the distribution of the target."""
        known = self._target[np.isfinite(self._target)]
        if not len(known) or np.ptp(known) <= 1e-12 or np.mean(known == 0) > 0.5:
            summary = "the price hardly moves: there is nothing to learn from"
            return Check(name="target", severity="error", summary=summary, details={"n_known": len(known)})
        details = {
            "n_known": len(known),
            "mean_log": float(known.mean()),
            "std_log": float(known.std()),
            "skew": float(skew(known)),
            "kurtosis": float(kurtosis(known, fisher=False)),
            "share_up": float(np.mean(known > 0)),
        }
        lopsided = not 0.35 <= details["share_up"] <= 0.70
        text = f"mean {details['mean_log']:+.4f}, std {details['std_log']:.4f}, {details['share_up']:.0%} up"
        return Check(
            name="target",
            severity="warning" if lopsided or details["kurtosis"] > 50 else "ok",
            summary=f"{self._horizon_bars}-bar log return: {text}, kurtosis {details['kurtosis']:.1f}",
            details=details,
        )

    def check_gaps(self) -> Check:
        """Look for sessions that are missing, and for long stretches without any."""
        missing = self._calendar.missing(self._index) if self._calendar else self._index[:0]
        days = np.diff(self._index.to_numpy().astype("datetime64[D]")).astype(np.int64)
        # The longest regular closure, September 2001, left seven days between two sessions.
        long = np.flatnonzero(days > 7)
        details = {
            "n_missing": len(missing),
            "missing": [f"{day:%Y-%m-%d}" for day in missing[:MAX_NAMED]],
            "long_gaps": [f"{self._index[i]:%Y-%m-%d} + {days[i]} days" for i in long[:MAX_NAMED]],
        }
        share = len(missing) / len(self._index)
        severity: Severity = "warning" if len(missing) or len(long) else "ok"
        return Check(
            name="gaps",
            severity="error" if share > MAX_MISSING_FRACTION else severity,
            summary=f"{len(missing)} sessions missing ({share:.2%}), {len(long)} gaps of more than a week",
            details=details,
        )

    def check_outliers(self) -> Check:
        """Look for daily returns and feature values that are far outside of their usual range."""
        returns = np.diff(self._log_close)
        jumps = np.flatnonzero(np.abs(_robust_z(returns)) > OUTLIER_Z)
        found = {}
        for name, values in self._columns.items():
            if extreme := int(np.sum(np.abs(_robust_z(values)) > OUTLIER_Z)):
                found[name] = extreme
        days = {f"{self._index[i + 1]:%Y-%m-%d}": round(float(returns[i]), 4) for i in jumps[:MAX_NAMED]}
        parts = [f"{len(jumps)} daily returns"] if len(jumps) else []
        parts += [f"values of {_named(found)}"] if found else []
        return Check(
            name="outliers",
            severity="warning" if parts else "ok",
            summary=f"{' and '.join(parts) or 'none'} beyond {OUTLIER_Z:g} robust deviations",
            details={"jumps_log": days, "features": found},
        )


def cached_features(
    bars: Bars,
    cache: BarCache,
    engineer: Callable[[pd.DataFrame], pd.DataFrame],
    *,
    feature_set_hash: str,
    horizon_bars: int | None = None,
) -> pd.DataFrame:
    """Return ``engineer(bars.frame)``, from disk where bars, feature set and horizon are the stored ones.

    After new bars the features are computed in full and compared with the stored rows to the last bit: a
    difference is logged as what it is, a feature that reads later bars.

    It is a check of the past and a record, not a shortcut: reading the features back, with their checksums,
    takes longer than to compute them. The key knows nothing of the optional families' series.
    """
    symbol, source = bars.symbol, bars.provenance.source
    key = bars_hash(bars.frame)
    made_with = (feature_set_hash, horizon_bars)
    with cache.locked(symbol, source):
        stored = cache.recover("features", symbol, source)
        if stored and (stored.meta.feature_set_hash, stored.meta.target_horizon_bars) != made_with:
            stored = None
        if stored and stored.meta.bars_hash == key:
            return stored.frame
        frame = engineer(bars.frame)
        rows = stored.meta.rows if stored else 0
        same_past = stored is not None and stored.meta.bars_hash == bars_hash(bars.frame.iloc[:rows])
        if stored and same_past and bars_hash(stored.frame) != bars_hash(frame.iloc[:rows]):
            logger.warning("%s: features of past bars changed when bars were added: a look-ahead", symbol)
        meta = TableMeta(
            symbol=symbol,
            source=source,
            last_session=frame.index[-1].date(),
            fetched_at=bars.provenance.fetched_at,
            bars_hash=key,
            feature_set_hash=feature_set_hash,
            target_horizon_bars=horizon_bars,
        )
        cache.store("features", frame, meta)
        return frame


def findings(bars: Bars, horizon_bars: int, cache: BarCache | None = None) -> tuple[str, ...]:
    """Return what the data validator has to say about prices and features, in words.

    With a cache, features of past bars are also compared with what they were last time.
    """
    # What headlines say is no price, and may lack.
    bars = replace(bars, frame=bars.frame.loc[:, list(BAR_COLUMNS)])
    if cache is None:
        features = engineer_features(bars.frame)
    else:
        features = cached_features(
            bars, cache, engineer_features, feature_set_hash=feature_set_hash(), horizon_bars=horizon_bars
        )
    calendar = calendar_for(bars.symbol)
    validator = DataValidator(bars.frame, features, horizon_bars=horizon_bars, calendar=calendar)
    why = bars.sentiment.get("reason")
    lacking = () if why is None else (f"trained without headlines: {why}",)
    return (*validator.run_all_validations().problems(), *lacking)


def adf_p_value(values: FloatArray, lags: int) -> float:
    """Return the p-value of the augmented Dickey-Fuller test; a small one speaks against a unit root."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SingularMatrixWarning)
            result = adfuller(values, maxlag=lags, regression="c", autolag=None, result_object=False)
    except (ValueError, np.linalg.LinAlgError, SingularMatrixWarning):
        # A column of a few distinct values can leave the regression without rank: nothing is known about it.
        return 1.0
    return float(np.nan_to_num(result[1], nan=1.0, posinf=1.0, neginf=1.0))


def _tie(left: FloatArray, right: FloatArray) -> float:
    """Return the absolute rank correlation where both are finite; 0 where one does not vary."""
    known = np.isfinite(left) & np.isfinite(right)
    if known.sum() < 30 or np.ptp(left[known]) <= 0 or np.ptp(right[known]) <= 0:
        return 0.0
    return float(abs(np.corrcoef(rankdata(left[known]), rankdata(right[known]))[0, 1]))


def _robust_z(values: FloatArray) -> FloatArray:
    """Return deviations from the median in units of 1.48 median absolute deviations, or zeros."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros_like(values)
    centre = np.median(known)
    spread = 1.4826 * float(np.median(np.abs(known - centre)))
    return np.nan_to_num((values - centre) / spread) if spread > 1e-12 else np.zeros_like(values)


def _named(names: Mapping[str, object] | list[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return ", ".join(listed[:MAX_NAMED]) + more


def refuse_delisted(bars: Bars, now: datetime) -> None:
    """Refuse bars of a live source that ended long ago, by a ``DataError``: nothing is left to forecast."""
    calendar, last = calendar_for(bars.symbol), bars.provenance.last_session
    missed = calendar.sessions_between(last, calendar.last_closed_session(now))
    if missed > DELISTED_AFTER_SESSIONS:
        raise DataError(
            f"{bars.symbol} has had no bar since {last:%Y-%m-%d}, {missed} sessions ago: it was delisted or "
            "renamed; save its prices as a file and train with --source csv:DIR to study it all the same"
        )


def with_enough_headlines(bars: Bars, warmup_bars: int) -> Bars:
    """Return bars to train on, without the columns and with the reason where too few rows have them."""
    if bars.sentiment and not bars.sentiment["used"]:
        return bars
    reason = "AI_STOCKS_NEWS names no source of headlines"
    if bars.sentiment:
        covered = bars.frame["sentiment_5d"].iloc[warmup_bars:].notna()
        if covered.sum() >= max(LEAST_SESSIONS, LEAST_SHARE * len(covered)):
            return bars
        reason = (
            f"{bars.sentiment['source']} has headlines for {covered.sum():,} of {len(covered):,} training "
            f"sessions, and {LEAST_SESSIONS} and {LEAST_SHARE:.0%} are the least: add some, or leave earlier "
            "prices out"
        )
    logger.warning("%s: trains without headlines: %s", bars.symbol, reason)
    frame = bars.frame.drop(columns=list(SENTIMENT_COLUMNS), errors="ignore")
    return replace(bars, frame=frame, sentiment={**bars.sentiment, "used": False, "reason": reason})
