"""The scale of a forecast band: how far the log return over the next h bars is likely to stray.

A daily log variance is forecast for four horizons and is linear in the log of the horizon between them, so
that every horizon from one bar to a year has its own scale. The weights are the same for every symbol: what
volatility does next is much alike for all assets, and one history is too short to tell it apart. They were
fitted by maximum likelihood of Student's t (`DEGREES_OF_FREEDOM`) on rows before 2006 of 44 US series;
``python benchmarks/interval_quality.py --fit`` prints them, and scores bands on the years after.

References
----------
Corsi (2009), A simple approximate long-memory model of realized volatility. Garman, Klass (1980). Bollerslev,
Hood, Huss, Pedersen (2018), Risk everywhere: modeling and managing volatility (pooled weights, anchored at a
long-run level).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from numba import njit

from data.indicators import MIN_SIGMA_LOG, bar_moves

FloatArray = npt.NDArray[np.float64]

DEGREES_OF_FREEDOM = 5.0
ANCHORS_BARS = (1, 5, 20, 126)
FEATURES = ("level", "volume", "week", "month", "overnight", "long_run", "falls")
# One row an anchor, one column a feature.
WEIGHTS = (
    (-0.4304, 0.3140, 0.1552, 0.4764, -0.1172, 0.0701, 0.5914),
    (-0.5951, 0.1846, -0.0002, 0.3482, -0.1395, 0.1852, 0.6701),
    (-0.5955, 0.0796, -0.1104, 0.4222, -0.1163, 0.2652, 0.5926),
    (-0.6131, 0.0, 0.0, 0.0, 0.0, 0.4441, 0.0),
)
# A quiet bar counts as one of this share of the month's variance: its logarithm would say too much.
LEAST_SHARE = 0.05
MAX_RATIO_LOG, MAX_FALL, MAX_VOLUME_LOG = 1.4, 5.0, 2.0


@njit(cache=True)
def decayed_mean(values: FloatArray, span_bars: float) -> FloatArray:
    """Return the exponential mean of the values up to each row, divided by its weights, (n,)."""
    alpha = 2.0 / (span_bars + 1.0)
    out = np.empty(values.shape[0])
    mean, weight = 0.0, 0.0
    for t in range(values.shape[0]):
        weight = 1.0 - (1.0 - weight) * (1.0 - alpha)
        mean += alpha / weight * (values[t] - mean)
        out[t] = mean
    return out


def volatility_features(bars: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Measure the volatility of each bar's past.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars.

    Returns
    -------
    base
        Log of the month's daily variance (overnight squared plus Garman-Klass), carried half-way to that of
        close-to-close returns by the ratio that the year had, (n,).
    features
        In the order of `FEATURES`, (n, 7), free of the scale of returns: 1; log volume over its month's mean;
        mean log variance of a week and of a month over the log of the month's mean variance; log overnight
        over log session variance of the month; log variance of five years over the month's; the month's mean
        return in volatilities, downwards positive. Row t is known at the close of t.
    """
    prices = [np.array(bars[name], dtype=np.float64) for name in ("Open", "High", "Low", "Close")]
    moves = np.empty((11, len(bars)))
    bar_moves(prices[0], prices[1], prices[2], prices[3], moves)
    ret, overnight, session = moves[7], moves[8] * moves[8], moves[10]
    least = MIN_SIGMA_LOG**2
    ranged = overnight + session
    month = np.maximum(decayed_mean(ranged, 22.0), least)
    log_month = np.log(month)
    bar_log = np.log(np.maximum(ranged, LEAST_SHARE * month))
    closes = _log_ratio(decayed_mean(ret * ret, 252.0), decayed_mean(ranged, 252.0), least)
    volume_log = np.log(np.maximum(np.array(bars["Volume"], dtype=np.float64), 1.0))
    falls = np.clip(-ret / np.sqrt(month), -MAX_FALL, MAX_FALL)
    features = np.column_stack(
        [
            np.ones(len(bars)),
            np.clip(volume_log - decayed_mean(volume_log, 22.0), -MAX_VOLUME_LOG, MAX_VOLUME_LOG),
            decayed_mean(bar_log, 5.0) - log_month,
            decayed_mean(bar_log, 22.0) - log_month,
            _log_ratio(decayed_mean(overnight, 22.0), decayed_mean(session, 22.0), 0.01 * month),
            np.log(np.maximum(decayed_mean(ranged, 1260.0), least)) - log_month,
            decayed_mean(falls, 22.0),
        ]
    )
    return log_month + 0.5 * np.clip(closes, -MAX_RATIO_LOG, MAX_RATIO_LOG), features


def _log_ratio(above: FloatArray, below: FloatArray, least: FloatArray | float) -> FloatArray:
    """Return the log of a ratio of variances, which both have a floor, (n,)."""
    return np.asarray(np.log((above + least) / (below + least)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolatilityForecast:
    """Scales of the log return over the bars to come, for every horizon.

    Attributes
    ----------
    daily_variance_log
        Log of the variance a bar over the next `ANCHORS_BARS` bars, (4, n); row t known at the close of t.
    """

    daily_variance_log: FloatArray

    def scale_log(self, horizon_bars: int) -> FloatArray:
        """Return the scale of the log return over ``horizon_bars`` bars, (n,), above 0.

        It is that of a t distribution with `DEGREES_OF_FREEDOM`, .77 of its standard deviation.
        """
        place = np.interp(np.log(horizon_bars), np.log(ANCHORS_BARS), np.arange(len(ANCHORS_BARS)))
        low = min(int(place), len(ANCHORS_BARS) - 2)
        part = place - low
        daily = (1.0 - part) * self.daily_variance_log[low] + part * self.daily_variance_log[low + 1]
        return np.asarray(np.exp(0.5 * daily) * np.sqrt(horizon_bars), dtype=np.float64)


def forecast_volatility(bars: pd.DataFrame) -> VolatilityForecast:
    """Forecast the scale of log returns from each bar on.

    Parameters
    ----------
    bars
        Adjusted OHLCV bars, ascending; never NaN. The first month of a history is a guess.

    Returns
    -------
    VolatilityForecast
        Finite on every row; row t depends on bars up to t only.
    """
    base, features = volatility_features(bars)
    # Summed feature by feature: a matrix product may add in another order on a prefix.
    daily = np.repeat(base[np.newaxis, :], len(ANCHORS_BARS), axis=0)
    for column in range(len(FEATURES)):
        daily += np.array([row[column] for row in WEIGHTS])[:, np.newaxis] * features[:, column]
    return VolatilityForecast(daily_variance_log=daily)
