"""Indicators on arrays: rolling windows without cancellation, and TA-Lib with its degenerate cases mended.

Every kernel writes row t from rows 0..t only, in one fixed order of additions, so that the result on a prefix
equals the prefix of the result to the last bit. No kernel uses ``fastmath``, which would void that.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import talib
from numba import njit

FloatArray = npt.NDArray[np.float64]

# A hundredth of a basis point: less is no move and no range, only rounding.
NO_MOVE = 1e-6
# Five basis points a day: a halted stock still has a scale.
MIN_SIGMA_LOG = 5e-4
_GK_BODY = 2.0 * math.log(2.0) - 1.0


@njit(cache=True)
def bar_logs(open_: FloatArray, high: FloatArray, low: FloatArray, close: FloatArray) -> FloatArray:
    """Return the log moves of each bar.

    Parameters
    ----------
    open_, high, low, close
        Prices, shape (n,), positive.

    Returns
    -------
    array of shape (5, n)
        Log close relative to the first close; log return close to close; overnight log return (previous close
        to open); log(high/low); Garman-Klass variance of the session. The returns of the first row are 0.
        Row t is known at the close of t.

    References
    ----------
    Garman, Klass (1980), On the estimation of security price volatilities from historical data.
    """
    n = close.shape[0]
    out = np.zeros((5, n))
    for t in range(n):
        out[0, t] = math.log(close[t] / close[0])
        if t > 0:
            out[1, t] = math.log(close[t] / close[t - 1])
            out[2, t] = math.log(open_[t] / close[t - 1])
        span = math.log(high[t] / low[t])
        body = math.log(close[t] / open_[t])
        out[3, t] = span
        out[4, t] = max(0.5 * span * span - _GK_BODY * body * body, 0.0)
    return out


@njit(cache=True)
def rolling_sum(values: FloatArray, window: int) -> FloatArray:
    """Sum the last ``window`` values without ever subtracting.

    Parameters
    ----------
    values
        Shape (n,), finite.
    window
        Number of bars, at least 1.

    Returns
    -------
    array of shape (n,)
        NaN in the first ``window - 1`` rows. Blocks of ``window`` rows are summed from their ends backwards
        and from their starts forwards, and each window is one of either, so a window of zeros sums to 0
        exactly, whatever came before it.

    References
    ----------
    van Herk (1992), A fast algorithm for local minimum and maximum filters on rectangular and octagonal
    kernels.
    """
    n = values.shape[0]
    out = np.full(n, np.nan)
    tail = np.zeros(window + 1)
    for start in range(0, n, window):
        stop = min(start + window, n)
        head = 0.0
        for t in range(start, stop):
            head += values[t]
            if t >= window - 1:
                out[t] = head + tail[t - start + 1]
        if stop - start == window:
            total = 0.0
            for j in range(window - 1, 0, -1):
                total += values[start + j]
                tail[j] = total
            tail[window] = 0.0
    return out


@njit(cache=True)
def rolling_std(values: FloatArray, window: int) -> FloatArray:
    """Return the population standard deviation of the last ``window`` values, by two passes over each window.

    Parameters
    ----------
    values
        Shape (n,), finite; may have a mean that is large against its deviations, as prices do.
    window
        Number of bars, at least 1.

    Returns
    -------
    array of shape (n,)
        NaN in the first ``window - 1`` rows; exactly 0 where the window is constant.
    """
    n = values.shape[0]
    out = np.full(n, np.nan)
    for t in range(window - 1, n):
        anchor = values[t]
        first = 0.0
        second = 0.0
        for j in range(t - window + 1, t):
            gap = values[j] - anchor
            first += gap
            second += gap * gap
        out[t] = math.sqrt(max(second - first * first / window, 0.0) / window)
    return out


@njit(cache=True)
def guarded_ratio(numerator: FloatArray, denominator: FloatArray, least: float, neutral: float) -> FloatArray:
    """Divide where the denominator exceeds ``least``; elsewhere give ``neutral``.

    Parameters
    ----------
    numerator, denominator
        Shape (n,). NaN in either stays NaN.
    least
        Largest denominator that counts as nothing at all.
    neutral
        The value that says nothing: a halted stock or a bar without volume.

    Returns
    -------
    array of shape (n,)
        The ratio.
    """
    out = np.empty(numerator.shape[0])
    for t in range(out.shape[0]):
        if denominator[t] <= least:
            out[t] = neutral
        else:
            out[t] = numerator[t] / denominator[t]
    return out


@njit(cache=True)
def finish_rows(
    block: FloatArray, lower: FloatArray, upper: FloatArray, warmup_bars: npt.NDArray[np.int64]
) -> None:
    """Blank each row's warm-up and winsorise the rest at fixed bounds, in place.

    Parameters
    ----------
    block
        Shape (p, n): one feature a row. NaN after the warm-up stays NaN, so that a defect shows.
    lower, upper
        Shape (p,): bounds.
    warmup_bars
        Shape (p,): number of leading bars without a value.
    """
    for i in range(block.shape[0]):
        for t in range(min(warmup_bars[i], block.shape[1])):
            block[i, t] = np.nan
        for t in range(warmup_bars[i], block.shape[1]):
            value = block[i, t]
            if value < lower[i]:
                block[i, t] = lower[i]
            elif value > upper[i]:
                block[i, t] = upper[i]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarArrays:
    """A symbol's bars as arrays of shape (n,), with what features share; row t is known at the close of t.

    Attributes
    ----------
    open, high, low, close
        Prices divided by the first close: TA-Lib's absolute thresholds then mean the same for every stock.
    volume
        As it came.
    log_close, ret, overnight, span, gk
        Rows of `bar_logs`.
    true_range
        Of the divided prices; the first bar's is its range.
    sigma_20, sigma_200
        Population standard deviation of ``ret``, at least `MIN_SIGMA_LOG`: fit to divide by.
    """

    open: FloatArray
    high: FloatArray
    low: FloatArray
    close: FloatArray
    volume: FloatArray
    log_close: FloatArray
    ret: FloatArray
    overnight: FloatArray
    span: FloatArray
    gk: FloatArray
    true_range: FloatArray
    sigma_20: FloatArray
    sigma_200: FloatArray


def return_std(ret: FloatArray, window: int) -> FloatArray:
    """Return the population standard deviation of the last ``window`` returns, shape (n,)."""
    mean = rolling_sum(ret, window) / window
    return np.sqrt(np.maximum(rolling_sum(ret * ret, window) / window - mean * mean, 0.0))


def bar_arrays(
    open_: FloatArray, high: FloatArray, low: FloatArray, close: FloatArray, volume: FloatArray
) -> BarArrays:
    """Prepare at least one bar of positive prices; see `BarArrays`."""
    open_, high, low, close = (
        np.ascontiguousarray(prices / close[0]) for prices in (open_, high, low, close)
    )
    log_close, ret, overnight, span, gk = bar_logs(open_, high, low, close)
    true_range = talib.TRANGE(high, low, close)
    true_range[0] = high[0] - low[0]
    return BarArrays(
        open=open_,
        high=high,
        low=low,
        close=close,
        volume=np.ascontiguousarray(volume),
        log_close=log_close,
        ret=ret,
        overnight=overnight,
        span=span,
        gk=gk,
        true_range=true_range,
        sigma_20=np.maximum(return_std(ret, 20), MIN_SIGMA_LOG),
        sigma_200=np.maximum(return_std(ret, 200), MIN_SIGMA_LOG),
    )


def lag(values: FloatArray, bars: int) -> FloatArray:
    """Return the values of ``bars`` rows before, NaN in the first ones."""
    out = np.full(len(values), np.nan)
    out[bars:] = values[: max(len(values) - bars, 0)]
    return out


def log_change(x: BarArrays, bars: int) -> FloatArray:
    """Return log(Close[t] / Close[t - bars]), NaN in the first rows."""
    return x.log_close - lag(x.log_close, bars)


def halted(x: BarArrays, bars: int) -> npt.NDArray[np.bool_]:
    """Return where the close stood still for ``bars`` bars: a smoothed share of nothing says nothing."""
    return rolling_sum(np.abs(x.ret), bars) <= NO_MOVE


def relative_strength(x: BarArrays, window: int) -> FloatArray:
    """Return Wilder's RSI as a fraction; 0.5 where the close stood still (TA-Lib drops to 0 there)."""
    out = talib.RSI(x.close, window) / 100.0
    out[halted(x, window)] = 0.5
    return out


def true_strength(x: BarArrays) -> FloatArray:
    """Return Blau's true strength index as a fraction; 0 where the close stood still."""
    change = np.diff(x.close, prepend=x.close[:1])
    smooth, absolute = (talib.EMA(talib.EMA(part, 25), 13) for part in (change, np.abs(change)))
    out = guarded_ratio(smooth, absolute, 0.0, 0.0)
    out[halted(x, 25)] = 0.0
    return out


def stochastic(x: BarArrays, window: int) -> FloatArray:
    """Return where the close lies between the window's extremes, 0 to 1; 0.5 without a range."""
    highest, lowest = talib.MAX(x.high, window), talib.MIN(x.low, window)
    return guarded_ratio((x.close - lowest) / x.close, (highest - lowest) / x.close, NO_MOVE, 0.5)


def commodity_channel(x: BarArrays, window: int) -> FloatArray:
    """Return Lambert's CCI divided by 100; 0 without a range, where TA-Lib divides rounding by rounding."""
    out = talib.CCI(x.high, x.low, x.close, window) / 100.0
    out[talib.MAX(x.high, window) - talib.MIN(x.low, window) <= NO_MOVE * x.close] = 0.0
    return out


def directional(x: BarArrays, window: int) -> tuple[FloatArray, FloatArray]:
    """Return Wilder's ADX as a fraction and (+DI - -DI) / (+DI + -DI); 0 where the price stood still."""
    strength = talib.ADX(x.high, x.low, x.close, window) / 100.0
    plus, minus = (di(x.high, x.low, x.close, window) for di in (talib.PLUS_DI, talib.MINUS_DI))
    spread = guarded_ratio(plus - minus, plus + minus, NO_MOVE, 0.0)
    still = rolling_sum(x.true_range, window) <= NO_MOVE * x.close
    strength[still] = 0.0
    spread[still] = 0.0
    return strength, spread


def money_flow(x: BarArrays, window: int) -> FloatArray:
    """Return the share of the money that flowed on rising typical prices; 0.5 where none flowed.

    TA-Lib's MFI calls a flow below 1 nothing, whatever the currency; this one asks for exactly nothing.
    """
    typical = (x.high + x.low + x.close) / 3.0
    change = np.diff(typical, prepend=typical[:1])
    flow = typical * x.volume
    up = rolling_sum(np.where(change > NO_MOVE * typical, flow, 0.0), window)
    down = rolling_sum(np.where(change < -NO_MOVE * typical, flow, 0.0), window)
    return guarded_ratio(up, up + down, 0.0, 0.5)


def close_location(x: BarArrays) -> FloatArray:
    """Return where the close lies in the bar's range, -1 at the low to 1 at the high; 0 without a range."""
    return guarded_ratio((2.0 * x.close - x.high - x.low) / x.close, (x.high - x.low) / x.close, NO_MOVE, 0.0)
