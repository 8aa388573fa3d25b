"""Look at bars, features and target before anything is trained, and say in words what is wrong with them."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import kurtosis, rankdata, skew
from statsmodels.tools.sm_exceptions import SingularMatrixWarning
from statsmodels.tsa.stattools import adfuller

from data.cache_manager import BarCache, cached_features
from data.feature_engineer import engineer_features, feature_set_hash
from data.markets import calendar_for
from data.schema import Bars
from data.target_engineering import DEFAULT_HORIZON_BARS, make_target
from utils.errors import DataError

FloatArray = npt.NDArray[np.float64]
Severity = Literal["ok", "warning", "error"]

MAX_NAMED = 8


class Calendar(Protocol):
    """What the gap check asks of a calendar; see `data.markets.SessionCalendar`."""

    def missing(self, index: pd.DatetimeIndex) -> pd.DatetimeIndex:
        """Return the sessions between the first and the last of ``index`` that it lacks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatorConfig:
    """Limits of the checks.

    Attributes
    ----------
    max_target_tie
        Rank correlation of a feature with the target above which it is too close to be honest.
    max_next_bar_tie, max_next_bar_tie_over_past, times_past_tie
        Rank correlation of a feature's last change with the next bar above which it is implausible: by
        itself, and where it is also so many times the tie with the bar that the feature has just seen.
    noise_z
        All three are widened by so many standard errors of a correlation of noise.
    max_nan_fraction
        Share of missing or infinite values after the warm-up above which a feature is an error.
    max_adf_p
        p-value of the augmented Dickey-Fuller test above which a feature counts as not stationary.
    adf_rows, adf_lags
        Latest rows that the test reads, and its lags.
    max_missing_fraction
        Share of missing sessions above which gaps are an error.
    outlier_z
        Robust z-score of a feature, and of a daily log return, above which a value is an outlier.
    min_rows
        Fewer rows than this are an error: no check could tell anything.
    """

    max_target_tie: float = 0.30
    max_next_bar_tie: float = 0.17
    max_next_bar_tie_over_past: float = 0.10
    times_past_tie: float = 1.5
    noise_z: float = 2.0
    max_nan_fraction: float = 0.01
    max_adf_p: float = 0.05
    adf_rows: int = 2_520
    adf_lags: int = 5
    max_missing_fraction: float = 0.01
    outlier_z: float = 25.0
    min_rows: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Outcome of one check: its name, how bad it is, one sentence, and the figures as plain data."""

    name: str
    severity: Severity
    summary: str
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """Outcome of all checks.

    Attributes
    ----------
    checks
        In the order in which they were made.
    """

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

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        checks = [
            {"name": c.name, "severity": c.severity, "summary": c.summary, "details": dict(c.details)}
            for c in self.checks
        ]
        return {"is_usable": self.is_usable, "checks": checks}


class DataValidator:
    """Checks one symbol's bars and features.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars on ascending sessions.
    features
        Indexed like ``bars``; missing at the start of a column only.
    horizon_bars
        Length of the labels.
    calendar
        For the gap check; None leaves only gaps of more than a week to be seen.
    config
        Limits.

    Raises
    ------
    DataError
        If bars and features have different rows.
    """

    def __init__(
        self,
        bars: pd.DataFrame,
        features: pd.DataFrame,
        *,
        horizon_bars: int = DEFAULT_HORIZON_BARS,
        calendar: Calendar | None = None,
        config: ValidatorConfig | None = None,
    ) -> None:
        if not features.index.equals(bars.index):
            raise DataError(
                f"{len(features)} feature rows do not stand on the {len(bars)} sessions of the bars"
            )
        self.config = config or ValidatorConfig()
        self._index = pd.DatetimeIndex(bars.index)
        self._names = [str(name) for name in features.columns]
        self._features = np.asarray(features, dtype=np.float64)
        self._horizon_bars = horizon_bars
        self._calendar = calendar
        self._log_close = np.log(np.asarray(bars["Close"], dtype=np.float64))
        self._target = np.asarray(make_target(bars, horizon_bars)["target_log"], dtype=np.float64)

    def run_all_validations(self) -> ValidationReport:
        """Make every check."""
        n_rows = len(self._index)
        if n_rows < self.config.min_rows:
            summary = f"{n_rows} rows, at least {self.config.min_rows} are needed to check anything"
            check = Check(name="size", severity="error", summary=summary, details={"n_rows": n_rows})
            return ValidationReport(checks=(check,))
        checks = (
            self.check_missing_values(),
            self.check_leakage(),
            self.check_stationarity(),
            self.check_target(),
            self.check_gaps(),
            self.check_outliers(),
        )
        return ValidationReport(checks=checks)

    def check_leakage(self) -> Check:
        """Look for features that know the future.

        Two tests. A feature must not lie close to the target itself. And the *change* of a feature at the
        close of t may go with the bar that has just ended, as every momentum does, but not with the bar to
        come, be it its direction or its size: that is how a feature looks that was shifted by one bar.
        Volatility is persistent and one-day reversals exist, so only a tie that no real price shows is an
        error. A feature that is slow, or says nothing about prices, can be shifted unseen by this; the
        recomputation on cut history in the tests of the feature registry sees all of them.
        """
        ties = self.leakage_ties()
        config = self.config
        found = {
            name: {key: round(value, 4) for key, value in tie.items()}
            for name, tie in ties.items()
            if tie["target"] > config.max_target_tie + tie["noise"] * self._horizon_bars**0.5
            or tie["next_bar"] > config.max_next_bar_tie + tie["noise"]
            or tie["next_bar"]
            > max(config.max_next_bar_tie_over_past + tie["noise"], config.times_past_tie * tie["past_bar"])
        }
        summary = f"{len(ties)} features know nothing of the next bar that prices do not tell"
        if found:
            summary = f"{_named(found)} know more of the future than any price tells: they look ahead"
        return Check(
            name="leakage",
            severity="error" if found else "ok",
            summary=summary,
            details={"suspicious": found},
        )

    def leakage_ties(self) -> dict[str, dict[str, float]]:
        """Return the figures behind `check_leakage`, by feature.

        Returns
        -------
        dict
            Absolute rank correlations: ``target`` of the feature with the target; ``past_target`` with the
            target of ``horizon_bars`` earlier, known at t; ``next_bar`` and ``past_bar`` of its change with
            the next and the last bar (direction or size, the larger); ``noise``, the margin for chance.
        """
        h = self._horizon_bars
        past_target = np.concatenate([np.full(h, np.nan), self._target[:-h]])
        last = np.diff(self._log_close, prepend=np.nan)
        following = np.append(last[1:], np.nan)
        ties = {}
        for position, name in enumerate(self._names):
            column = np.where(np.isfinite(self._features[:, position]), self._features[:, position], np.nan)
            change = np.diff(column, prepend=np.nan)
            n_known = int(np.isfinite(change).sum())
            ties[name] = {
                "target": _tie(column, self._target),
                "past_target": _tie(column, past_target),
                "next_bar": max(_tie(change, following), _tie(change, np.abs(following))),
                "past_bar": max(_tie(change, last), _tie(change, np.abs(last))),
                "noise": self.config.noise_z / max(n_known, 1) ** 0.5,
            }
        return ties

    def check_missing_values(self) -> Check:
        """Look for values that are missing or infinite after a feature's first one."""
        finite = np.isfinite(self._features)
        first = np.where(finite.any(axis=0), finite.argmax(axis=0), len(finite))
        after = np.arange(len(finite))[:, np.newaxis] >= first
        holes = (after & ~finite).sum(axis=0)
        shares = np.where(first < len(finite), holes / np.maximum(after.sum(axis=0), 1), 1.0)
        found = {name: float(share) for name, share in zip(self._names, shares, strict=True) if share > 0}
        if not found:
            return Check(name="missing values", severity="ok", summary="none after the warm-up", details={})
        bad = max(found.values()) > self.config.max_nan_fraction
        return Check(
            name="missing values",
            severity="error" if bad else "warning",
            summary=f"{_named(found)} miss up to {max(found.values()):.2%} of their values after the warm-up",
            details={"share_missing": found},
        )

    def check_stationarity(self) -> Check:
        """Test each feature for a unit root (augmented Dickey-Fuller); a constant one is named apart."""
        p_values: dict[str, float] = {}
        constant: list[str] = []
        for position, name in enumerate(self._names):
            column = self._features[-self.config.adf_rows :, position]
            column = column[np.isfinite(column)]
            if len(column) < self.config.min_rows or np.ptp(column) <= 1e-12:
                constant.append(name)
                continue
            p_values[name] = adf_p_value(column, self.config.adf_lags)
        wandering = {name: p for name, p in p_values.items() if p > self.config.max_adf_p}
        parts = []
        if wandering:
            parts.append(f"{_named(wandering)} may have a unit root")
        if constant:
            parts.append(f"{_named(constant)} do not vary")
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
            severity="error" if share > self.config.max_missing_fraction else severity,
            summary=f"{len(missing)} sessions missing ({share:.2%}), {len(long)} gaps of more than a week",
            details=details,
        )

    def check_outliers(self) -> Check:
        """Look for daily returns and feature values that are far outside of their usual range."""
        returns = np.diff(self._log_close)
        jumps = np.flatnonzero(np.abs(_robust_z(returns)) > self.config.outlier_z)
        found = {}
        for position, name in enumerate(self._names):
            extreme = int(np.sum(np.abs(_robust_z(self._features[:, position])) > self.config.outlier_z))
            if extreme:
                found[name] = extreme
        days = {f"{self._index[i + 1]:%Y-%m-%d}": round(float(returns[i]), 4) for i in jumps[:MAX_NAMED]}
        parts = [f"{len(jumps)} daily returns"] if len(jumps) else []
        parts += [f"values of {_named(found)}"] if found else []
        return Check(
            name="outliers",
            severity="warning" if parts else "ok",
            summary=f"{' and '.join(parts) or 'none'} beyond {self.config.outlier_z:g} robust deviations",
            details={"jumps_log": days, "features": found},
        )


def findings(bars: Bars, horizon_bars: int, cache: BarCache | None = None) -> tuple[str, ...]:
    """Return what the data validator has to say about prices and features, in words.

    Parameters
    ----------
    bars
        Prices of the symbol.
    horizon_bars
        Length of the labels.
    cache
        Where features are kept; with it, those of past bars are also compared with what they were last time.
    """
    if cache is None:
        features = engineer_features(bars.frame)
    else:
        features = cached_features(
            bars, cache, engineer_features, feature_set_hash=feature_set_hash(), horizon_bars=horizon_bars
        )
    calendar = calendar_for(bars.symbol)
    validator = DataValidator(bars.frame, features, horizon_bars=horizon_bars, calendar=calendar)
    return validator.run_all_validations().problems()


def adf_p_value(values: FloatArray, lags: int) -> float:
    """Return the p-value of the augmented Dickey-Fuller test; a small one speaks against a unit root."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SingularMatrixWarning)
            result = adfuller(values, maxlag=lags, regression="c", autolag=None, result_object=False)
    except (ValueError, np.linalg.LinAlgError, SingularMatrixWarning):
        # A column of a few distinct values can leave the regression without rank: nothing is known about it.
        return 1.0
    p_value = float(result[1])
    return p_value if np.isfinite(p_value) else 1.0


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
