"""How far off a forecast may be: conformal bands from out-of-sample residuals, and the path of a forecast.

The scale is a volatility known at t; the quantiles are those of the standardised residuals that have been
resolved by t, so a band needs no assumption about the shape of returns.

References
----------
Vovk, Gammerman, Shafer (2005), Algorithmic Learning in a Random World, ch. 4.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

FloatArray = npt.NDArray[np.float64]

WINDOW_ROWS = 1_000
MINIMUM_ROWS = 60
NORMAL_DECILE = 1.2815515655446004


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """Standardised residuals as they were known, bar by bar.

    Attributes
    ----------
    lower_z, upper_z
        10 % and 90 % quantiles of the last `WINDOW_ROWS` residuals resolved by t, (n,), in units of sigma;
        those of the normal distribution while fewer than `MINIMUM_ROWS` are resolved.
    resolved
        Residuals in the order in which they were resolved, (m,).
    count
        How many of them were resolved by t, (n,).
    """

    lower_z: FloatArray
    upper_z: FloatArray
    resolved: FloatArray
    count: npt.NDArray[np.int64]

    def probability_above(self, threshold_z: FloatArray) -> FloatArray:
        """Return the share of the last `WINDOW_ROWS` residuals resolved by t above ``threshold_z``, (n,).

        Laplace's rule keeps the probability off 0 and 1; 0.5 while fewer than `MINIMUM_ROWS` are resolved.
        """
        above = np.full(len(threshold_z), 0.5)
        for row, (count, level) in enumerate(zip(self.count, threshold_z, strict=True)):
            if count >= MINIMUM_ROWS and np.isfinite(level):
                window = self.resolved[max(0, count - WINDOW_ROWS) : count]
                above[row] = (np.count_nonzero(window > level) + 1.0) / (len(window) + 2.0)
        return above


def residual_quantiles(
    mean_log: FloatArray, sigma_log: FloatArray, realised_log: FloatArray, *, horizon_bars: int
) -> Residuals:
    """Follow the quantiles of standardised forecast errors as they were resolved.

    Parameters
    ----------
    mean_log, sigma_log
        Forecast made at t of the h-day log return, and its scale, (n,); NaN where there is none.
    realised_log
        Log return from t to t + h, (n,); NaN in the last h rows. Row t is used from row t + h on.
    horizon_bars
        The h above.
    """
    n_rows = len(mean_log)
    standardised = (realised_log - mean_log) / sigma_log
    known = np.full(n_rows, np.nan)
    known[horizon_bars:] = standardised[: n_rows - horizon_bars] if horizon_bars < n_rows else []
    valid = np.isfinite(known)
    resolved = known[valid]
    count = np.cumsum(valid)
    rolling = pd.Series(resolved).rolling(WINDOW_ROWS, min_periods=MINIMUM_ROWS)

    def at_each_bar(level: float, fallback: float) -> FloatArray:
        quantiles = np.concatenate([[np.nan], np.asarray(rolling.quantile(level), dtype=np.float64)])[count]
        return np.where(np.isfinite(quantiles), quantiles, fallback)

    return Residuals(
        lower_z=at_each_bar(0.1, -NORMAL_DECILE),
        upper_z=at_each_bar(0.9, NORMAL_DECILE),
        resolved=resolved,
        count=count,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastPath:
    """The forecast of the sessions to come.

    Attributes
    ----------
    dates
        Sessions after the last bar, ascending, (k,).
    prices
        Median price at each session's close, (k,).
    returns
        Simple return of the median from the last close to each session, (k,).
    lower, upper
        Prices between which 80 % of the outcomes are expected, (k,).
    """

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
    sigma_log: float,
    lower_z: float,
    upper_z: float,
    horizon_bars: int,
) -> ForecastPath:
    """Spread an h-day forecast over the coming sessions.

    Up to the model's horizon the centre moves in proportion to time; beyond it, at the pace of the no-skill
    forecast, since the model says nothing about those days. The scale grows with the square root of time.

    Parameters
    ----------
    dates
        The sessions to fill, (k,).
    last_close
        Price at the last bar.
    expected_log, baseline_log, sigma_log
        Median h-day log return, that of a model without skill, and the scale.
    lower_z, upper_z
        10 % and 90 % quantiles of standardised residuals.
    horizon_bars
        The h above.
    """
    step = np.arange(1, len(dates) + 1, dtype=np.float64)
    within = np.minimum(step, horizon_bars) / horizon_bars
    beyond = np.maximum(step - horizon_bars, 0.0) / horizon_bars
    centre_log = within * expected_log + beyond * baseline_log
    scale_log = sigma_log * np.sqrt(step / horizon_bars)
    return ForecastPath(
        dates=dates,
        prices=last_close * np.exp(centre_log),
        returns=np.expm1(centre_log),
        lower=last_close * np.exp(centre_log + lower_z * scale_log),
        upper=last_close * np.exp(centre_log + upper_z * scale_log),
    )
