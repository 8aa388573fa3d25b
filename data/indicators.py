"""Indicators on arrays: rolling windows without cancellation, and TA-Lib with its degenerate cases mended.

Every kernel writes row t from rows 0..t only, in one fixed order of additions, so that the result on a prefix
equals the prefix of the result to the last bit. No kernel uses ``fastmath``, which would void that. What
numba compiles, of these and of other rooms' kernels, is kept by `cached`.
"""

import logging
import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import talib
from numba import njit

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]

# A hundredth of a basis point: less is no move and no range, only rounding.
NO_MOVE = 1e-6
# Five basis points a day: a halted stock still has a scale.
MIN_SIGMA_LOG = 5e-4
_TILE = 512
_GK_BODY = 2.0 * math.log(2.0) - 1.0
# What numba raises, at every call, where a file of compiled code was emptied, cut off or written over.
UNREADABLE = (
    *(pickle.PickleError, EOFError, MemoryError, ArithmeticError),
    *(AttributeError, ImportError, LookupError, TypeError, ValueError),
)


def cached(compiled: T) -> T:
    """Let a function of numba keep what it compiles; where nothing can be written it compiles at every start.

    numba's own option ends the import there, and each call where a file of its own is damaged: here that
    counts as none. It writes beside the source, or where ``NUMBA_CACHE_DIR`` says.
    """
    # With NUMBA_DISABLE_JIT=1 it is a plain function.
    keep = getattr(compiled, "enable_caching", lambda: None)
    with suppress(RuntimeError):
        keep()
    kept: Any = getattr(compiled, "_cache", None)
    # A name of numba's own: a release that calls it otherwise does as numba does.
    if hasattr(kept, "load_overload"):
        kept.load_overload = _or_nothing(kept.load_overload, kept.flush)
    return compiled


def _or_nothing(load: Callable[..., object], forget_all: Callable[[], None]) -> Callable[..., object]:
    def load_or_forget(*asked: object) -> object:
        try:
            return load(*asked)
        except UNREADABLE as error:
            logging.getLogger(__name__).warning(
                "compiled code is made anew, what was kept is damaged: %r", error
            )
            forget_all()
            return None

    return load_or_forget


@cached
@njit()
def bar_moves(
    open_: FloatArray, high: FloatArray, low: FloatArray, close: FloatArray, out: FloatArray
) -> None:
    """Write the prices by the first close, and the moves of each bar, known at its close.

    ``out`` (11, n): open, high, low, close, typical price, true range, all by the first close; log close; log
    return close to close; overnight log return (previous close to open); log(high/low); Garman-Klass variance
    of the session. The returns of the first row are 0.

    References
    ----------
    Garman, Klass (1980), On the estimation of security price volatilities from historical data.
    """
    for t in range(close.shape[0]):
        o, h, lo, c = open_[t] / close[0], high[t] / close[0], low[t] / close[0], close[t] / close[0]
        before, log_before = (out[3, t - 1], out[6, t - 1]) if t > 0 else (o, math.log(o))
        log_open, log_close = math.log(o), math.log(c)
        span, body = math.log(h / lo), log_close - log_open
        out[0, t], out[1, t], out[2, t], out[3, t] = o, h, lo, c
        out[4, t] = (h + lo + c) / 3.0
        out[5, t] = max(h, before) - min(lo, before)
        out[6, t] = log_close
        out[7, t] = log_close - log_before if t > 0 else 0.0
        out[8, t] = log_open - log_before
        out[9, t] = span
        out[10, t] = max(0.5 * span * span - _GK_BODY * body * body, 0.0)


@cached
@njit()
def bar_flows(moves: FloatArray, volume: FloatArray, out: FloatArray) -> None:
    """Write each bar's volume, weighed in the ways of the volume indicators.

    ``moves`` as `bar_moves` writes. ``out`` (7, n): the volume itself, and times: the sign of the close's
    change (on-balance volume); the simple return (volume price trend); the place of the close in
    the range, -1 to 1 (accumulation and distribution); the typical price; the typical price where it rose,
    and where it fell (money flow). The first bar moves nowhere.
    """
    for t in range(volume.shape[0]):
        last = max(t - 1, 0)
        close, typical, least = moves[3, t], moves[4, t], NO_MOVE * moves[3, t]
        change, rise = close - moves[3, last], typical - moves[4, last]
        spread, money = moves[1, t] - moves[2, t], typical * volume[t]
        out[0, t] = volume[t]
        out[1, t] = (volume[t] if change > 0.0 else -volume[t]) if abs(change) > least else 0.0
        out[2, t] = change / moves[3, last] * volume[t]
        out[3, t] = (2.0 * close - moves[1, t] - moves[2, t]) / spread * volume[t] if spread > least else 0.0
        out[4, t] = money
        out[5, t] = money if rise > least else 0.0
        out[6, t] = money if -rise > least else 0.0


@cached
@njit()
def bar_shapes(moves: FloatArray, out: FloatArray) -> None:
    """Write how each bar looks beside the one before.

    ``moves`` as `bar_moves` writes. ``out`` (7, n): 1 where the high is higher; 1 where the low is lower; gap
    above the high, gap below the low, as fractions; body by range; 1 where it lies inside the one before;
    place of the close in the range, -1 to 1. Without a range, and in the first row without a bar before: 0.
    """
    for t in range(moves.shape[1]):
        last = max(t - 1, 0)
        open_, high, low, close = moves[0, t], moves[1, t], moves[2, t], moves[3, t]
        least, spread = NO_MOVE * close, high - low
        higher, lower = high - moves[1, last] > least, moves[2, last] - low > least
        out[0, t] = higher
        out[1, t] = lower
        out[2, t] = max(open_ / moves[1, last] - 1.0, 0.0)
        out[3, t] = max(1.0 - open_ / moves[2, last], 0.0)
        out[4, t] = (close - open_) / spread if spread > least else 0.0
        out[5, t] = t > 0 and spread > least and not higher and not lower
        out[6, t] = (2.0 * close - high - low) / spread if spread > least else 0.0


@cached
@njit()
def rolling_sum(values: FloatArray, window: int) -> FloatArray:
    """Sum the last ``window`` values without ever subtracting.

    NaN in the first ``window - 1`` rows. Blocks of ``window`` rows are summed from their ends backwards and
    from their starts forwards, and each window is one of either (van Herk, 1992): a window of zeros sums to 0
    exactly, whatever came before it.
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


@cached
@njit()
def rolling_deviations(values: FloatArray, window: int) -> FloatArray:
    """Return how far the last ``window`` values lie from their mean, by two passes over each window.

    Shape (3, n): mean, mean absolute deviation, population standard deviation; NaN in the first
    ``window - 1`` rows. The mean may be large against the deviations, as that of prices is.
    """
    n = values.shape[0]
    out = np.full((3, n), np.nan)
    mean, absolute, squared = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for start in range(window - 1, n, _TILE):
        # Windows side by side in the inner loop: each keeps its order of additions, and they run in parallel.
        many = min(_TILE, n - start)
        mean[:many] = 0.0
        absolute[:many] = 0.0
        squared[:many] = 0.0
        for back in range(window):
            part = values[start - back : start - back + many]
            for k in range(many):
                mean[k] += part[k]
        for k in range(many):
            mean[k] /= window
        for back in range(window):
            part = values[start - back : start - back + many]
            for k in range(many):
                gap = part[k] - mean[k]
                absolute[k] += abs(gap)
                squared[k] += gap * gap
        for k in range(many):
            out[0, start + k] = mean[k]
            out[1, start + k] = absolute[k] / window
            out[2, start + k] = math.sqrt(squared[k] / window)
    return out


@cached
@njit()
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


@cached
@njit()
def guarded_ratio(numerator: FloatArray, denominator: FloatArray, least: float, neutral: float) -> FloatArray:
    """Divide where the denominator exceeds ``least``; elsewhere ``neutral``. NaN stays NaN."""
    out = np.empty(numerator.shape[0])
    for t in range(out.shape[0]):
        out[t] = neutral if denominator[t] <= least else numerator[t] / denominator[t]
    return out


@cached
@njit()
def price_ratio(above: FloatArray, below: FloatArray, price: FloatArray, neutral: float) -> FloatArray:
    """Divide one price difference by another; ``neutral`` where that is no move. NaN stays NaN."""
    out = np.empty(above.shape[0])
    for t in range(out.shape[0]):
        out[t] = neutral if below[t] <= NO_MOVE * price[t] else above[t] / below[t]
    return out


@cached
@njit()
def log_change(log_close: FloatArray, near: int, far: int) -> FloatArray:
    """Return log(Close[t - near] / Close[t - far]), shape (n,), NaN in the first ``far`` rows."""
    out = np.full(log_close.shape[0], np.nan)
    for t in range(far, out.shape[0]):
        out[t] = log_close[t - near] - log_close[t - far]
    return out


@cached
@njit()
def directional_index(high: FloatArray, low: FloatArray, window: int) -> FloatArray:
    """Return Wilder's (1978) ADX as a fraction, and (+DI - -DI) / (+DI + -DI), shape (2, n).

    A bar that rises above and falls below the one before by the same amount, within rounding, moves in no
    direction. TA-Lib compares exactly, and on adjusted prices rounding then decides.
    """
    n = high.shape[0]
    out = np.zeros((2, n))
    plus = 0.0
    minus = 0.0
    for t in range(1, n):
        up = high[t] - high[t - 1]
        down = low[t - 1] - low[t]
        least = NO_MOVE * high[t]
        plus += ((up if up > max(down, 0.0) + least else 0.0) - plus) / window
        minus += ((down if down > max(up, 0.0) + least else 0.0) - minus) / window
        if plus + minus > 0.0:
            out[1, t] = (plus - minus) / (plus + minus)
        out[0, t] = out[0, t - 1] + (abs(out[1, t]) - out[0, t - 1]) / window
    return out


@cached
@njit()
def winsorise(values: FloatArray, lower: float, upper: float, warmup_bars: int, out: FloatArray) -> None:
    """Write values kept within the bounds, shape (n,), NaN in the warm-up.

    NaN after the warm-up stays NaN, so that a defect shows.
    """
    for t in range(values.shape[0]):
        # Not max and min, which would turn a NaN into a bound.
        value = lower if values[t] < lower else values[t]  # noqa: FURB136
        out[t] = upper if value > upper else value  # noqa: FURB136
    out[:warmup_bars] = np.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class BarArrays:
    """A symbol's bars as arrays of shape (n,), with what features share; row t is known at the close of t.

    In this order the rows of `bar_moves` (by the first close: TA-Lib's absolute thresholds then mean the same
    for every stock), `bar_flows` and `bar_shapes`; then the standard deviations (population) of ``ret``, and
    the same, at least `MIN_SIGMA_LOG`: fit to divide by.
    """

    open: FloatArray
    high: FloatArray
    low: FloatArray
    close: FloatArray
    typical: FloatArray
    true_range: FloatArray
    log_close: FloatArray
    ret: FloatArray
    overnight: FloatArray
    span: FloatArray
    gk: FloatArray
    volume: FloatArray
    signed: FloatArray
    trended: FloatArray
    placed: FloatArray
    paid: FloatArray
    rising: FloatArray
    falling: FloatArray
    higher_high: FloatArray
    lower_low: FloatArray
    gap_up: FloatArray
    gap_down: FloatArray
    body: FloatArray
    inside: FloatArray
    location: FloatArray
    std_20: FloatArray
    std_200: FloatArray
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
    # One block for all of them: many small ones would go back to the system, and come back page by page.
    names = [field.name for field in fields(BarArrays)]
    block = np.empty((len(names), len(close)))
    moves = block[:11]
    bar_moves(open_, high, low, close, moves)
    bar_flows(moves, volume, block[11:18])
    bar_shapes(moves, block[18:25])
    for row, window in ((25, 20), (26, 200)):
        block[row] = return_std(moves[7], window)
        np.maximum(block[row], MIN_SIGMA_LOG, out=block[row + 2])
    return BarArrays(**dict(zip(names, block, strict=True)))


def lag(values: FloatArray, bars: int) -> FloatArray:
    """Return the values of ``bars`` rows before, NaN in the first ones."""
    out = np.full(len(values), np.nan)
    out[bars:] = values[: max(len(values) - bars, 0)]
    return out


def halted(x: BarArrays, bars: int) -> npt.NDArray[np.bool_]:
    """Return where the close stood still for ``bars`` bars: a smoothed share of nothing says nothing."""
    return rolling_sum(np.abs(x.ret), bars) <= NO_MOVE


def relative_strength(x: BarArrays, window: int) -> FloatArray:
    """Return Wilder's RSI as a fraction; 0.5 where the close stood still, not the last value."""
    out = talib.RSI(x.close, window) / 100.0
    np.copyto(out, 0.5, where=halted(x, window))
    return out


def true_strength(x: BarArrays) -> FloatArray:
    """Return Blau's true strength index as a fraction; 0 where the close stood still."""
    change = np.diff(x.close, prepend=x.close[:1])
    smooth, absolute = (talib.EMA(talib.EMA(part, 25), 13) for part in (change, np.abs(change)))
    out = guarded_ratio(smooth, absolute, 0.0, 0.0)
    np.copyto(out, 0.0, where=halted(x, 25))
    return out


def stochastic(x: BarArrays, window: int) -> FloatArray:
    """Return where the close lies between the window's extremes, 0 to 1; 0.5 without a range."""
    highest, lowest = talib.MAX(x.high, window), talib.MIN(x.low, window)
    return price_ratio(x.close - lowest, highest - lowest, x.close, 0.5)


def commodity_channel(x: BarArrays, window: int) -> FloatArray:
    """Return Lambert's CCI divided by 100; 0 without a range."""
    mean, absolute, _ = rolling_deviations(x.typical, window)
    return price_ratio(x.typical - mean, 1.5 * absolute, x.typical, 0.0)


def directional(x: BarArrays, window: int) -> tuple[FloatArray, FloatArray]:
    """Return Wilder's ADX as a fraction and (+DI - -DI) / (+DI + -DI); 0 where the price stood still."""
    strength, spread = directional_index(x.high, x.low, window)
    still = rolling_sum(x.true_range, window) <= NO_MOVE * x.close
    np.copyto(strength, 0.0, where=still)
    np.copyto(spread, 0.0, where=still)
    return strength, spread
