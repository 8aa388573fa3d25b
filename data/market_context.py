"""What other series say of a stock's bar: their close as of its close, and the features made of it.

Both families are optional, see ``data.feature_engineer``. A row may use what had traded by the close of its
bar and nothing else: the other series is aligned by session, never by what follows, and symbols whose
exchange closes before New York are refused.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from data import indicators as ind
from data.calendars import ALWAYS, WEEKDAYS, calendar_name
from data.indicators import NO_MOVE, BarArrays, FloatArray
from data.schema import bar_dates
from utils.errors import DataError, UsageError

# Another series' close is too old to stand for a session after so many sessions without one.
MAX_AGE_SESSIONS = 5
# Calendars whose sessions end with New York's (16:00 there) or later on the same date.
_NOT_BEFORE_NEW_YORK = frozenset({"XNYS", "XTSE", "CMES", WEEKDAYS, ALWAYS})
_SESSIONS_PER_YEAR = 252.0


def refuse_earlier_closes(symbols: Iterable[str]) -> None:
    """Refuse symbols that close before New York: the other series' close of that date is their future.

    Raises
    ------
    UsageError
        Naming them.
    """
    early = [symbol for symbol in symbols if calendar_name(symbol) not in _NOT_BEFORE_NEW_YORK]
    if early:
        raise UsageError(
            f"{', '.join(early)}: the exchange closes before New York, where the day's ^VIX and market are "
            "not known yet; train without them"
        )


def closes(other: pd.DataFrame, name: str) -> tuple[pd.DatetimeIndex, FloatArray]:
    """Return the sessions and closes of another series, without the rows that have no close.

    Parameters
    ----------
    other
        Bars of the other series, ascending, with a column ``Close``.
    name
        What to call the series in an error.

    Raises
    ------
    DataError
        If that is not what it is, or nothing is left.
    """
    is_dated = isinstance(other.index, pd.DatetimeIndex) and not other.index.hasnans
    if list(other.columns).count("Close") != 1 or not is_dated:
        raise DataError(f"{name} needs one column Close over dates: pass bars")
    dates = bar_dates(other)
    if not dates.is_unique or not dates.is_monotonic_increasing:
        raise DataError(f"{name} has doubled or unsorted sessions: pass bars that `clean_bars` has mended")
    try:
        close = np.asarray(other["Close"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} holds something that is not a number: {error}") from error
    known = ~np.isnan(close)
    if not known.any():
        raise DataError(f"{name} has no close at all: fetch it again")
    if not (np.isfinite(close[known]) & (close[known] > 0.0)).all():
        raise DataError(f"{name} has closes that are not positive numbers: fetch it again")
    return dates[known], close[known]


def align_close(bars: pd.DataFrame, other: pd.DataFrame, name: str) -> FloatArray:
    """Return another series' close as of each bar's close.

    Parameters
    ----------
    bars
        The symbol's bars, ascending.
    other, name
        As for :func:`closes`.

    Returns
    -------
    array of shape (n,)
        Row t is the last close at or before session t; NaN before the series begins.

    Raises
    ------
    DataError
        If that close is more than `MAX_AGE_SESSIONS` sessions old, or the series cannot be used.
    """
    dates, close = closes(other, name)
    sessions, theirs = (np.asarray(index, dtype="datetime64[D]") for index in (bar_dates(bars), dates))
    out = np.full(len(sessions), np.nan)
    last = np.searchsorted(theirs, sessions, side="right") - 1
    begun = np.flatnonzero(last >= 0)
    if not len(begun):
        return out
    seen = theirs[last[begun]]
    out[begun] = close[last[begun]]
    age = begun - np.searchsorted(sessions, seen, side="right") + 1
    # Before the first bar there are no sessions to count: weekdays stand for them.
    age += np.maximum(np.busday_count(seen, sessions[0]) - 1, 0)
    if (age > MAX_AGE_SESSIONS).any():
        row = int(np.argmax(age > MAX_AGE_SESSIONS))
        raise DataError(
            f"{name} has no close for {sessions[begun[row]]}: its last one, of {seen[row]}, is more than "
            f"{MAX_AGE_SESSIONS} sessions old; fetch it again, or end the bars there"
        )
    return out


def first_row(bars: pd.DataFrame, other: pd.DataFrame, name: str) -> int:
    """Return the position of the first bar at whose close the other series has one; ``len(bars)`` if none."""
    first = closes(other, name)[0][0]
    return int(np.count_nonzero(np.asarray(bar_dates(bars) < first)))


def _std(ret: FloatArray, window: int) -> FloatArray:
    """Return `ind.return_std`, 0 where it is rounding only: nothing to divide by, nothing to multiply."""
    out = ind.return_std(ret, window)
    out[out <= NO_MOVE] = 0.0
    return out


def cross_asset_rows(x: BarArrays, vix: FloatArray) -> dict[str, FloatArray]:
    """Return the features of the family by name; ``vix`` as :func:`align_close` gives it."""
    level = vix / 100.0
    spread = np.sqrt(_SESSIONS_PER_YEAR) * _std(x.ret, 20) - level
    mean, _, deviation = ind.rolling_deviations(spread, 120)
    return {
        "vix_level": level,
        "vix_change": ind.log_change(np.log(vix), 0, 5),
        "rv_iv_spread": spread,
        "rv_iv_zscore": ind.guarded_ratio(spread - mean, deviation, NO_MOVE, 0.0),
    }


def market_rows(x: BarArrays, market: FloatArray) -> dict[str, FloatArray]:
    """Return the features of the family by name; ``market`` as :func:`align_close` gives it."""
    log_market = np.log(market)
    ret = ind.log_change(log_market, 0, 1)
    own, theirs, month = _std(x.ret, 60), _std(ret, 60), _std(ret, 20)
    means = ind.rolling_sum(x.ret, 60) * ind.rolling_sum(ret, 60) / 3600
    covariance = ind.rolling_sum(x.ret * ret, 60) / 60 - means
    ahead = {
        bars: ind.log_change(x.log_close, 0, bars) - ind.log_change(log_market, 0, bars) for bars in (20, 60)
    }
    month_sigma = np.maximum(month, ind.MIN_SIGMA_LOG)
    return {
        "beta_60d": ind.guarded_ratio(covariance, theirs * theirs, 0.0, 0.0),
        "correlation_60d": ind.guarded_ratio(covariance, own * theirs, 0.0, 0.0),
        "relative_strength_20d": ahead[20] / (x.sigma_20 * np.sqrt(20)),
        "relative_strength_60d": ahead[60] / (x.sigma_20 * np.sqrt(60)),
        "relative_volatility_20d": ind.guarded_ratio(_std(x.ret, 20), month, 0.0, 1.0),
        "market_volatility_20d": month,
        "market_velocity_20d": ind.log_change(log_market, 0, 20) / (month_sigma * np.sqrt(20)),
    }
