"""What out-of-sample rows say about forecasts: within a fold, and across the folds of a walk-forward.

Two views of a forecast are kept apart. The *signal* is the model's uncalibrated deviation from the drift, in
units of the volatility known at the time; it shows whether anything was learned. The *forecast* is
calibrated, carries the drift, and is what is served; it shows whether it may be believed.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Fewer rows of a symbol than this say nothing about a rank correlation.
MIN_ROWS_FOR_IC = 20
# A signal that varies less, in deviations of the target, or has a larger share of one sign, has collapsed.
MIN_SIGNAL_STD, MAX_ONE_SIDED = 0.005, 0.9
MIN_SPREAD_FOR_SLOPE = 0.01


def ic_by_session(
    signal: FloatArray, outcome: FloatArray, session_code: IntArray, symbol_code: IntArray
) -> FloatArray:
    """Spread the information coefficient over sessions, so that sessions can be resampled.

    Parameters
    ----------
    signal, outcome
        Signal at t and what followed, finite, (n,).
    session_code
        0 to T-1, ascending in time, (n,).
    symbol_code
        Which symbol a row belongs to, (n,).

    Returns
    -------
    array of shape (T,)
        Its mean is the mean over symbols of each symbol's Spearman correlation over time. Empty when no
        symbol has `MIN_ROWS_FOR_IC` rows with a signal and an outcome that vary.
    """
    products = np.zeros(len(signal))
    n_symbols = 0
    order = np.argsort(symbol_code, kind="stable")
    borders = np.flatnonzero(np.diff(symbol_code[order])) + 1
    for rows in np.split(order, borders):
        if len(rows) < MIN_ROWS_FOR_IC or np.ptp(signal[rows]) <= 0 or np.ptp(outcome[rows]) <= 0:
            continue
        products[rows] = _standard_ranks(signal[rows]) * _standard_ranks(outcome[rows]) / len(rows)
        n_symbols += 1
    if not n_symbols:
        return np.empty(0)
    n_sessions = int(session_code.max()) + 1
    by_session = np.bincount(session_code, weights=products, minlength=n_sessions)
    return np.asarray(by_session * (n_sessions / n_symbols), dtype=np.float64)


def _standard_ranks(values: FloatArray) -> FloatArray:
    ranks = rankdata(values)
    return np.asarray((ranks - ranks.mean()) / ranks.std(), dtype=np.float64)


def block_length(n_sessions: int, horizon_bars: int) -> int:
    """Return the length of bootstrap blocks: twice the labels' overlap, and growing with the sample.

    References
    ----------
    Kuensch (1989) and Politis, White (2004): a block grows with the cube root of the sample.
    """
    wanted = max(2 * horizon_bars, round(2 * np.cbrt(n_sessions)))
    return int(max(1, min(wanted, n_sessions // 2)))


def block_bootstrap_means(
    values: FloatArray, block_bars: int, n_resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Return means of circular block bootstrap resamples of ``values``, (n_resamples,).

    A resample is the smallest number of whole blocks that holds at least n values.

    References
    ----------
    Politis, Romano (1992), A circular block-resampling procedure for stationary data.
    """
    return np.asarray(resampled_block_sums(values, block_bars, n_resamples, rng).mean(axis=1) / block_bars)


def resampled_block_sums(
    values: FloatArray, block_bars: int, n_resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Return the sums of the blocks of each circular block resample, (n_resamples, n_blocks)."""
    n = len(values)
    n_blocks = -(-n // block_bars)
    cumulated = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[:block_bars]]))])
    starts = rng.integers(0, n, size=(n_resamples, n_blocks))
    return np.asarray(cumulated[starts + block_bars] - cumulated[starts], dtype=np.float64)


def block_bootstrap_p_value(
    values: FloatArray, horizon_bars: int, *, n_resamples: int = 2_000, seed: int = 7
) -> float | None:
    """Return the one-sided p-value of "the mean is not positive", for dependent values in order of time.

    Circular blocks of a quarter (63 values, a twentieth of a short sample, four labels of a long horizon) are
    resampled and the mean is studentised by the spread of its block sums.

    Parameters
    ----------
    values
        In order of time, (n,).
    horizon_bars
        How far a value overlaps with later ones.
    n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    float or None
        None for values that do not vary, or too few for eight blocks.

    References
    ----------
    Politis, Romano (1992); Goetze, Kuensch (1996), Second-order correctness of the blockwise bootstrap.
    """
    n = len(values)
    block = max(4 * horizon_bars if horizon_bars > 15 else 2 * horizon_bars, min(63, n // 20), 1)
    if n // block < 8 or np.std(values) <= 1e-15:
        return None
    whole = values[: n // block * block].reshape(-1, block).sum(axis=1)
    error = float(whole.std(ddof=1)) / np.sqrt(len(whole))
    sums = resampled_block_sums(values, block, n_resamples, np.random.default_rng(seed))
    errors = sums.std(axis=1, ddof=1) / np.sqrt(sums.shape[1])
    mean = float(values.mean()) * block
    studentised = (sums.mean(axis=1) - mean) / np.maximum(errors, 1e-300)
    return float((1 + np.sum(studentised >= mean / max(error, 1e-300))) / (1 + n_resamples))


def rank_among_past(values: FloatArray) -> FloatArray:
    """Return the rank of each value among itself and those before it, from -1/2 to 1/2, (n,)."""
    ranks = np.empty(len(values))
    past: list[float] = []
    for position, value in enumerate(values.tolist()):
        low, high = bisect_left(past, value), bisect_right(past, value)
        ranks[position] = ((low + high) / 2 + 0.5) / (position + 1) - 0.5
        past.insert(high, value)
    return ranks


def skill(forecast: FloatArray, reference: FloatArray, outcome: FloatArray) -> float | None:
    """Return the share of the reference's squared error that the forecast saves; None if it has none."""
    saved = ratio(float(np.sum((outcome - forecast) ** 2)), float(np.sum((outcome - reference) ** 2)))
    return None if saved is None else 1.0 - saved


def hit_rate(forecast: FloatArray, outcome: FloatArray) -> float | None:
    """Return the share of outcomes whose sign was forecast; outcomes of exactly zero are left out."""
    moved = outcome != 0
    if not moved.any():
        return None
    return float(np.mean(np.sign(forecast[moved]) == np.sign(outcome[moved])))


def share_up(outcome: FloatArray) -> float | None:
    """Return the hit rate of "always up"."""
    return hit_rate(np.ones_like(outcome), outcome)


def hit_minus_base(forecast: FloatArray, outcome: FloatArray) -> float | None:
    """Return the hit rate minus that of "always up", which needs no model."""
    hits, base = hit_rate(forecast, outcome), share_up(outcome)
    return None if hits is None or base is None else hits - base


def calibration_slope(forecast: FloatArray, outcome: FloatArray) -> float | None:
    """Return the least-squares slope of outcome on forecast, both in volatilities: 1 is calibrated.

    None where the forecast varies by less than `MIN_SPREAD_FOR_SLOPE`: the slope would be noise over nothing.
    """
    if len(forecast) < MIN_ROWS_FOR_IC or np.std(forecast) <= MIN_SPREAD_FOR_SLOPE:
        return None
    centred = forecast - forecast.mean()
    return float(centred @ (outcome - outcome.mean()) / (centred @ centred))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Divide; None where either is missing or the denominator is not positive."""
    if numerator is None or denominator is None or denominator <= 1e-12:
        return None
    return numerator / denominator


def walk_forward_efficiency(
    test_hits: float | None, test_base: float | None, fit_hits: float | None, fit_base: float | None
) -> float | None:
    """Return the share of the skill shown on known rows that is left on unknown ones.

    ``(test_hits - test_base) / (fit_hits - fit_base)``, each a hit rate over that of "always up".

    Returns
    -------
    float or None
        None when the model had no skill on the rows that it knew: undefined, which a gate counts as failed.

    References
    ----------
    Pardo (2008), The Evaluation and Optimization of Trading Strategies, on walk-forward efficiency.
    """
    if test_hits is None or test_base is None or fit_hits is None or fit_base is None:
        return None
    return ratio(test_hits - test_base, fit_hits - fit_base)


def consistency(fold_ics: Sequence[float | None]) -> float | None:
    """Return the share of folds with a positive IC; a fold without one counts as not positive."""
    return None if not fold_ics else float(np.mean([ic is not None and ic > 0 for ic in fold_ics]))


def overfitting_ratio(fit_ics: Sequence[float | None], test_ics: Sequence[float | None]) -> float | None:
    """Return the share of the fitted rows' IC that is lost out of sample: 0 none, 1 all, above 1 reversed."""
    kept = ratio(mean_known(test_ics), mean_known(fit_ics))
    return None if kept is None else 1.0 - kept


def feature_stability(selections: Sequence[Sequence[str]]) -> float | None:
    """Return the mean Jaccard similarity of the folds' feature sets; None for fewer than two folds."""
    sets = [frozenset(selection) for selection in selections]
    if len(sets) < 2:
        return None
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(sets, 2)]))


def mean_or_none(values: FloatArray) -> float | None:
    """Return the mean, or None of nothing."""
    return float(values.mean()) if len(values) else None


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldMeasures:
    """The measures of one fold that the summary across folds reads.

    Attributes
    ----------
    ic, fit_ic
        Information coefficient on test rows and on the last rows that the model was fitted on.
    test_hits, test_base, fit_hits, fit_base
        Hit rates of the uncalibrated forecast, and of "always up", on the same two sets of rows.
    signal_std
        Standard deviation of the signal on test rows, in units of the volatility.
    share_positive
        Share of test rows with a signal above the drift.
    selected_features
        What the fold's model uses.
    """

    ic: float | None
    fit_ic: float | None
    test_hits: float | None
    test_base: float | None
    fit_hits: float | None
    fit_base: float | None
    signal_std: float | None
    share_positive: float | None
    selected_features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkForwardSummary:
    """Measures across folds; None where undefined.

    Attributes
    ----------
    efficiency
        See `walk_forward_efficiency`, of the hit rates averaged over folds.
    consistency
        See `consistency`.
    overfitting_ratio
        See `overfitting_ratio`.
    feature_stability
        See `feature_stability`.
    collapsed_folds
        Share of folds whose signal hardly varies (variance collapse).
    one_sided_folds
        Share of folds whose signal has one sign on most rows (sign imbalance).
    """

    efficiency: float | None
    consistency: float | None
    overfitting_ratio: float | None
    feature_stability: float | None
    collapsed_folds: float | None
    one_sided_folds: float | None


def summarise_folds(
    folds: Sequence[FoldMeasures],
    *,
    min_signal_std: float = MIN_SIGNAL_STD,
    max_one_sided: float = MAX_ONE_SIDED,
) -> WalkForwardSummary:
    """Summarise the folds of a walk-forward.

    Parameters
    ----------
    folds
        Their measures.
    min_signal_std
        A fold with a smaller standard deviation of the signal, in volatilities, has collapsed.
    max_one_sided
        A fold with a larger share of one sign is one-sided.
    """
    tested = [fold for fold in folds if fold.test_hits is not None]
    shares = [fold.share_positive for fold in folds if fold.share_positive is not None]
    spreads = [fold.signal_std for fold in folds if fold.signal_std is not None]
    return WalkForwardSummary(
        efficiency=walk_forward_efficiency(
            mean_known([fold.test_hits for fold in tested]),
            mean_known([fold.test_base for fold in tested]),
            mean_known([fold.fit_hits for fold in tested]),
            mean_known([fold.fit_base for fold in tested]),
        ),
        consistency=consistency([fold.ic for fold in tested]),
        overfitting_ratio=overfitting_ratio([fold.fit_ic for fold in tested], [fold.ic for fold in tested]),
        feature_stability=feature_stability([fold.selected_features for fold in folds]),
        collapsed_folds=mean_known([float(spread < min_signal_std) for spread in spreads]),
        one_sided_folds=mean_known([float(max(share, 1 - share) > max_one_sided) for share in shares]),
    )


def collapse_of(signal: FloatArray) -> str | None:
    """Say in words how a signal in deviations of the target has collapsed; None when it has not.

    Its mean is nobody's forecast, since calibration takes it off: the share of one sign is counted about it.
    """
    spread = float(signal.std())
    if not spread >= MIN_SIGNAL_STD:
        return f"its signal deviates by {spread:.2g} of the target's deviation, less than {MIN_SIGNAL_STD}"
    rising = float(np.mean(signal > signal.mean()))
    if max(rising, 1 - rising) > MAX_ONE_SIDED:
        return f"{max(rising, 1 - rising):.0%} of its signal lie on one side of its mean"
    return None
