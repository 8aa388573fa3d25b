"""How far a signal may be believed, and how far off a forecast may be: its deciles, and its path.

The scale is a volatility known at t. The shape is that of the standardised residuals resolved by t: a band
needs no assumption about returns. Three things keep it honest where residuals are few or the times change:

- Residuals of overlapping h-day outcomes are worth a h-th of their number. The deciles of the last
  `WINDOW_ROWS` are blended with those of Student's t, which counts as `PRIOR_RESIDUALS` independent ones.
- A finite sample's outer quantiles lie too far inside; levels move outwards by 1 / (independent residuals).
- The width follows the misses of the 80 % band that have come to light (adaptive conformal inference),
  slowly: a faster pace holds every year's coverage closer and costs accuracy.

References
----------
Vovk, Gammerman, Shafer (2005), Algorithmic Learning in a Random World, ch. 4. Gibbs, Candes (2021), Adaptive
conformal inference under distribution shift. Angelopoulos, Candes, Tibshirani (2023), Conformal PID control.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from numba import njit
from scipy.special import stdtrit

from data.indicators import MIN_SIGMA_LOG, bar_moves, cached, decayed_mean
from evaluation.accounting import CostModel
from evaluation.metrics import overlap_error
from inference.position_sizing import win_record

FloatArray = npt.NDArray[np.float64]
FloatMatrix = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
Floats = FloatArray | float

# Fewer independent rows than this say nothing about a slope; a signal is at most doubled.
MIN_INDEPENDENT, MAX_SLOPE = 30, 2.0
# Normal quantile of a one-sided lower bound, 95 %.
CONFIDENCE_Z = 1.645


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What earlier out-of-sample rows say about the raw signal.

    In units of the h-day volatility, the calibrated forecast is ``drift + slope * (raw - raw_mean)``. The
    drift, what training rows and long experience say, is the forecast of a model without skill. The slope of
    realised on raw is shrunk towards zero by its own standard error, within [0, `MAX_SLOPE`]; ``skill_lower``
    is its lower confidence bound over itself, within [0, 1]: at 0 the ``n_rows`` behind it do not rule out no
    skill at all.
    """

    drift: float
    raw_mean: float
    slope: float
    skill_lower: float
    n_rows: int

    def apply(self, raw_scaled: FloatArray) -> FloatArray:
        """Return the calibrated forecast, in units of the h-day volatility, shape (n,)."""
        return self.drift + self.slope * (raw_scaled - self.raw_mean)


def calibrate(
    raw_scaled: FloatArray,
    realised_scaled: FloatArray,
    *,
    drift: float,
    horizon_bars: int,
    session_code: IntArray | None = None,
    prior_slope: float = 0.0,
    prior_std: float = 1.0,
) -> Calibration:
    """Estimate how far the raw signal may be believed, from out-of-sample rows, (n,), known by then.

    The least-squares slope of realised on raw is a normal posterior with prior N(`prior_slope`, `prior_std`),
    clipped into [0, `MAX_SLOPE`]: a few small trees may be too humble. Its standard error sums over the
    symbols of a session (`session_code`, from 0; None where every row is a session of its own), which move
    together, and allows for labels that overlap, see `overlap_error`. ``drift`` is the
    forecast without skill.
    """
    n_rows, slope, lower = len(raw_scaled), prior_slope, 0.0
    code = np.arange(n_rows) if session_code is None else session_code
    n_sessions = int(code.max()) + 1 if n_rows else 0
    raw_mean, spread = (float(np.mean(raw_scaled)), float(np.var(raw_scaled))) if n_rows else (0.0, 0.0)
    if n_sessions / horizon_bars >= MIN_INDEPENDENT and spread > 1e-12:
        centred = raw_scaled - raw_mean
        outcome = realised_scaled - np.mean(realised_scaled)
        own = float(np.mean(centred * outcome)) / spread
        by_session = np.bincount(code, weights=centred * (outcome - own * centred)).astype(np.float64)
        error = overlap_error(by_session, horizon_bars) / (spread * n_rows)
        trust = prior_std**2 / (prior_std**2 + error**2)
        slope = prior_slope + trust * (own - prior_slope)
        lower = (slope - CONFIDENCE_Z * error * np.sqrt(trust)) / slope if slope > 0 else 0.0
    return Calibration(
        drift=drift,
        raw_mean=raw_mean,
        slope=float(np.clip(slope, 0.0, MAX_SLOPE)),
        skill_lower=float(np.clip(lower, 0.0, 1.0)),
        n_rows=n_rows,
    )


DEGREES_OF_FREEDOM = 5.0
ANCHORS_BARS = (1, 5, 20, 126)
# One row an anchor; of level, volume, week, month, overnight, long run, falls.
WEIGHTS = (
    (-0.4304, 0.3140, 0.1552, 0.4764, -0.1172, 0.0701, 0.5914),
    (-0.5951, 0.1846, -0.0002, 0.3482, -0.1395, 0.1852, 0.6701),
    (-0.5955, 0.0796, -0.1104, 0.4222, -0.1163, 0.2652, 0.5926),
    (-0.6131, 0.0, 0.0, 0.0, 0.0, 0.4441, 0.0),
)
# A quiet bar counts as one of this share of the month's variance: its logarithm would say too much.
LEAST_SHARE = 0.05
MAX_RATIO_LOG, MAX_FALL, MAX_VOLUME_LOG = 1.4, 5.0, 2.0


def volatility_features(bars: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Measure the volatility of each bar's past; row t is known at the close of t.

    Returns
    -------
    base
        Log of the month's daily variance (overnight squared plus Garman-Klass), carried half-way to that of
        close-to-close returns by the ratio that the year had, (n,).
    features
        (n, 7), as in `WEIGHTS`, free of the scale of returns: 1; log volume over its month's mean; mean log
        variance of a week and of a month over the log of the month's mean variance; log overnight over log
        session variance of the month; log variance of five years over the month's; the month's mean return in
        volatilities, downwards positive.
    """
    open_, high, low, close = np.array(bars[["Open", "High", "Low", "Close"]], dtype=np.float64).T.copy()
    moves = np.empty((11, len(bars)))
    bar_moves(open_, high, low, close, moves)
    ret, overnight, session = moves[7], moves[8] * moves[8], moves[10]
    least, ranged = MIN_SIGMA_LOG**2, overnight + session
    month = np.maximum(decayed_mean(ranged, 22.0), least)
    log_month, floor = np.log(month), 0.01 * month
    bar_log = np.log(np.maximum(ranged, LEAST_SHARE * month))
    closes = np.log((decayed_mean(ret * ret, 252.0) + least) / (decayed_mean(ranged, 252.0) + least))
    volume_log = np.log(np.maximum(np.array(bars["Volume"], dtype=np.float64), 1.0))
    falls = np.clip(-ret / np.sqrt(month), -MAX_FALL, MAX_FALL)
    features = np.column_stack(
        [
            np.ones(len(bars)),
            np.clip(volume_log - decayed_mean(volume_log, 22.0), -MAX_VOLUME_LOG, MAX_VOLUME_LOG),
            decayed_mean(bar_log, 5.0) - log_month,
            decayed_mean(bar_log, 22.0) - log_month,
            np.log((decayed_mean(overnight, 22.0) + floor) / (decayed_mean(session, 22.0) + floor)),
            np.log(np.maximum(decayed_mean(ranged, 1260.0), least)) - log_month,
            decayed_mean(falls, 22.0),
        ]
    )
    return log_month + 0.5 * np.clip(closes, -MAX_RATIO_LOG, MAX_RATIO_LOG), features


def forecast_volatility(bars: pd.DataFrame) -> FloatArray:
    """Forecast the log of the variance a bar over the next `ANCHORS_BARS` bars, (4, n), see `scale_log`.

    Row t is known at the close of t, and never NaN; the first month of a history is a guess.
    """
    base, features = volatility_features(bars)
    # Summed feature by feature: a matrix product may add in another order on a prefix.
    daily_variance_log = np.tile(base, (len(ANCHORS_BARS), 1))
    for weights, feature in zip(np.array(WEIGHTS).T, features.T, strict=True):
        daily_variance_log += np.outer(weights, feature)
    return daily_variance_log


def scale_log(daily_variance_log: FloatArray, horizon_bars: int) -> FloatArray:
    """Return the scale of the log return over ``horizon_bars`` bars, (n,), above 0.

    It is that of a t distribution with `DEGREES_OF_FREEDOM`, .77 of its standard deviation.
    """
    place = np.interp(np.log(horizon_bars), np.log(ANCHORS_BARS), np.arange(len(ANCHORS_BARS)))
    low = min(int(place), len(ANCHORS_BARS) - 2)
    part = place - low
    daily = (1.0 - part) * daily_variance_log[low] + part * daily_variance_log[low + 1]
    return np.asarray(np.exp(0.5 * daily) * np.sqrt(horizon_bars), dtype=np.float64)


DECILES = np.arange(1, 10) / 10.0
WINDOW_ROWS = 2_500
PRIOR_RESIDUALS, LEAST_INDEPENDENT, BAND_MISSES = 50.0, 10.0, 0.2
# Change of the log width by a miss at h = 1; by the square root of h less at h bars.
WIDTH_PACE, MAX_WIDTH_LOG = 0.01, 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The distribution of an outcome as it was known, bar by bar; row t known at the close of t.

    ``deciles_z`` are the quantiles .1 to .9 of the outcome's distance from the forecast, in scales, (n, 9),
    never NaN. ``above`` are the probabilities that the outcome exceeds each threshold, (thresholds, n), NaN
    where there is no forecast; a higher threshold is never the likelier one to be exceeded.
    """

    deciles_z: FloatArray
    above: FloatArray


def calibrate_band(
    mean_log: FloatArray,
    scale_log: FloatArray,
    realised_log: FloatArray,
    *,
    horizon_bars: int,
    thresholds_log: tuple[float, ...] = (0.0,),
) -> Calibrated:
    """Follow the distribution of standardised forecast errors as they were resolved.

    Mean and scale are the forecast made at t of the h-day log return, (n,), NaN where there is none. The
    return realised from t to t + h, NaN in the last h rows, is used from row t + h on. ``thresholds_log`` are
    log returns whose exceedance has a probability asked for; 0 for a rise.
    """
    wanted = (np.array(thresholds_log)[:, np.newaxis] - mean_log) / scale_log
    deciles, level, trust, share = _follow(
        (realised_log - mean_log) / scale_log, wanted, stdtrit(DEGREES_OF_FREEDOM, DECILES), horizon_bars
    )
    prior = 1.0 - _student_cdf(level)
    return Calibrated(deciles_z=deciles, above=prior + trust * (share - prior))


def _student_cdf(level: FloatArray) -> FloatArray:
    """Return the distribution function of Student's t for `DEGREES_OF_FREEDOM`, which have a closed form."""
    scaled = level / np.sqrt(DEGREES_OF_FREEDOM)
    inverse = 1.0 / (1.0 + scaled * scaled)
    odd = scaled * inverse * (1.0 + 2.0 / 3.0 * inverse)
    return np.asarray(0.5 + (np.arctan(scaled) + odd) / np.pi, dtype=np.float64)


@cached
@njit()
def _replace(window: FloatArray, count: int, gone: float, come: float) -> None:
    """Put ``come`` among ``count`` ascending values, in place of ``gone`` or, if NaN, the last."""
    place = count - 1 if np.isnan(gone) else np.searchsorted(window[:count], gone)
    # Where it would stand among all; one less if the place that falls vacant lies before that.
    goal = np.searchsorted(window[: count - 1] if np.isnan(gone) else window[:count], come)
    # On slices, whose indices are plainly not negative, the compiler moves memory at once.
    if goal > place:
        goal -= 1
        part = window[place : goal + 1]
        for k in range(part.shape[0] - 1):
            part[k] = part[k + 1]
    else:
        part = window[goal : place + 1]
        for k in range(part.shape[0] - 1, 0, -1):
            part[k] = part[k - 1]
    window[goal] = come


@cached
@njit()
def _quantile(window: FloatArray, count: int, level: float) -> float:
    if count == 0:
        return 0.0
    place = min(max(level, 0.0), 1.0) * (count - 1)
    low = int(place)
    high = min(low + 1, count - 1)
    return float(window[low] + (place - low) * (window[high] - window[low]))


@cached
@njit()
def _follow(
    z: FloatArray, wanted: FloatArray, prior: FloatArray, horizon_bars: int
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Walk over the bars; a row's own outcome is read ``horizon_bars`` rows later.

    Returns the deciles (n, 9); ``wanted`` (k, n) with the widening undone; the trust in residuals (n,); the
    share of residuals above each level (k, n).
    """
    n, window, arrived = z.shape[0], np.empty(WINDOW_ROWS), np.empty(z.shape[0])
    deciles, trust = np.empty((n, 9)), np.empty(n)
    level, share = np.empty(wanted.shape), np.zeros(wanted.shape)
    count, total, width_log = 0, 0, 0.0
    pace = WIDTH_PACE / np.sqrt(horizon_bars)
    for t in range(n):
        known = t - horizon_bars
        if known >= 0 and np.isfinite(z[known]):
            missed = z[known] < deciles[known, 0] or z[known] > deciles[known, 8]
            width_log += pace * ((1.0 if missed else 0.0) - BAND_MISSES)
            width_log = min(max(width_log, -MAX_WIDTH_LOG), MAX_WIDTH_LOG)
            full = count == WINDOW_ROWS
            count += 0 if full else 1
            _replace(window, count, arrived[total - WINDOW_ROWS] if full else np.nan, z[known])
            arrived[total] = z[known]
            total += 1
        independent = count / horizon_bars
        trust[t] = independent / (independent + PRIOR_RESIDUALS)
        outwards = 1.0 / max(independent, LEAST_INDEPENDENT)
        for k in range(9):
            own = _quantile(window, count, DECILES[k] + outwards * (2.0 * DECILES[k] - 1.0))
            deciles[t, k] = prior[k] + trust[t] * (own - prior[k])
        middle, width = deciles[t, 4], np.exp(width_log)
        for k in range(9):
            deciles[t, k] = middle + width * (deciles[t, k] - middle)
        for k in range(wanted.shape[0]):
            level[k, t] = middle + (wanted[k, t] - middle) / width
            if count > 0:
                found = np.searchsorted(window[:count], level[k, t], side="right")
                share[k, t] = (count - found) / count
    return deciles, level, trust, share


def centre_log(
    step_bars: Floats, expected_log: Floats, baseline_log: Floats, *, horizon_bars: int
) -> FloatArray:
    """Return the centre of the log return over ``step_bars`` bars, given that over h bars.

    Up to the model's horizon it moves in proportion to time; beyond, at the pace of the no-skill forecast,
    since the model says nothing about those days.
    """
    within = np.minimum(step_bars, horizon_bars) / horizon_bars
    beyond = np.maximum(np.asarray(step_bars, dtype=np.float64) - horizon_bars, 0.0) / horizon_bars
    return np.asarray(within * expected_log + beyond * baseline_log, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastPath:
    """Median price at each session's close, its simple return from the last close, the 80 % band, (k,)."""

    dates: pd.DatetimeIndex
    prices: FloatArray
    returns: FloatArray
    lower: FloatArray
    upper: FloatArray


def forecast_path(
    *,
    dates: pd.DatetimeIndex,
    last_close: float,
    expected_log: float,
    baseline_log: float,
    edges_log: Mapping[int, tuple[float, float]],
    horizon_bars: int,
    further_log: Mapping[int, float] | None = None,
) -> ForecastPath:
    """Spread an h-day forecast over the coming sessions ``dates``, (k,).

    The centre is `centre_log`, bent so that it passes through ``further_log``, the median log returns over
    further numbers of bars: linear in time between them, at the pace of the no-skill forecast beyond the
    longest. ``edges_log`` maps horizons to the distances, in log returns, of the 80 % band's edges from the
    centre: over the square root of time they are linear in the log of time between those horizons, and
    constant outside.
    """
    step = np.arange(1, len(dates) + 1, dtype=np.float64)
    nodes = np.array(sorted({0, horizon_bars, *(further_log or {})}), dtype=np.float64)
    own, centre = (
        centre_log(bars, expected_log, baseline_log, horizon_bars=horizon_bars) for bars in (nodes, step)
    )
    # Nothing is added at 0 and at h, nor anywhere without further forecasts.
    bent = [(further_log or {}).get(int(bars), at) - at for bars, at in zip(nodes, own, strict=True)]
    centre += np.interp(step, nodes, bent)
    known = np.array(sorted(edges_log), dtype=np.float64)
    daily = np.array([edges_log[int(bars)] for bars in known]) / np.sqrt(known)[:, np.newaxis]
    lower, upper = (np.interp(np.log(step), np.log(known), edge) * np.sqrt(step) for edge in daily.T)
    return ForecastPath(
        dates=dates,
        prices=last_close * np.exp(centre),
        returns=np.expm1(centre),
        lower=last_close * np.exp(centre + lower),
        upper=last_close * np.exp(centre + upper),
    )


def with_bands(frame: pd.DataFrame, bars: pd.DataFrame, horizon_bars: int) -> pd.DataFrame:
    """Add to a centre what follows from it: the band, probabilities, simple returns and the win record.

    The frame is indexed like ``bars`` and holds ``expected_log``, ``baseline_log``, ``sigma_log``, NaN
    without a forecast. What is added at t comes from forecasts that were resolved by t.
    """
    daily_variance_log, close_log = forecast_volatility(bars), np.log(bars["Close"])
    expected, baseline = frame["expected_log"].to_numpy(), frame["baseline_log"].to_numpy()
    sigma_log, round_trip = frame["sigma_log"].to_numpy(), 2.0 * CostModel().one_way_rate
    thresholds = (0.0, float(np.log1p(round_trip)), float(np.log1p(-round_trip)))
    added: dict[str, FloatArray] = {}
    for ahead in sorted({*ANCHORS_BARS, horizon_bars}):
        realised = np.asarray(close_log.shift(-ahead) - close_log, dtype=np.float64)
        centre = centre_log(ahead, expected, baseline, horizon_bars=horizon_bars)
        scale = scale_log(daily_variance_log, ahead)
        asked = thresholds if ahead == horizon_bars else ()
        band = calibrate_band(centre, scale, realised, horizon_bars=ahead, thresholds_log=asked)
        lower_log, upper_log = band.deciles_z[:, 0] * scale, band.deciles_z[:, -1] * scale
        if ahead != horizon_bars:
            added[f"lower_log_{ahead}"], added[f"upper_log_{ahead}"] = lower_log, upper_log
            continue
        added["lower_z"], added["upper_z"] = lower_log / sigma_log, upper_log / sigma_log
        added["lower"], added["upper"] = np.expm1(expected + lower_log), np.expm1(expected + upper_log)
        added["prob_up"], added["prob_gain"] = band.above[0], band.above[1]
        added["prob_loss"] = 1.0 - band.above[2]
        added["p_win"], added["payoff_ratio"] = win_record(expected, realised, horizon_bars=ahead)
    # The mean of a log-normal variable lies above its median; sizing wants the mean.
    added["expected_return"] = np.expm1(expected + sigma_log**2 / 2)
    added["baseline_return"], added["sigma"] = np.expm1(baseline + sigma_log**2 / 2), sigma_log
    # At once: a frame that grows column by column takes longer than all that is computed here.
    return pd.concat([frame, pd.DataFrame(added, index=frame.index)], axis=1)
