"""How much of a good result is owed to trying many things: deflated Sharpe, PBO, track record, trials."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import kurtosis, norm, rankdata, skew

from utils.errors import InsufficientDataError, StorageError, UsageError

FloatArray = npt.NDArray[np.float64]

MIN_RETURNS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SharpeMoments:
    """What the uncertainty of a Sharpe ratio depends on.

    Attributes
    ----------
    sharpe
        Mean over standard deviation of the returns, per bar (not annualised).
    skew, kurtosis
        Of the returns; a normal variable has kurtosis 3.
    n
        Number of returns.
    """

    sharpe: float
    skew: float
    kurtosis: float
    n: int

    @property
    def variance_factor(self) -> float:
        """Variance of the estimated Sharpe ratio times (n - 1); at least a tiny positive number."""
        return max(1.0 - self.skew * self.sharpe + (self.kurtosis - 1.0) / 4.0 * self.sharpe**2, 1e-12)


def sharpe_moments(returns: FloatArray) -> SharpeMoments | None:
    """Measure returns per bar, (n,); None for fewer than `MIN_RETURNS` or returns that do not vary."""
    if len(returns) < MIN_RETURNS or np.std(returns) <= 1e-12:
        return None
    return SharpeMoments(
        sharpe=float(np.mean(returns) / np.std(returns, ddof=1)),
        skew=float(skew(returns)),
        kurtosis=float(kurtosis(returns, fisher=False)),
        n=len(returns),
    )


def probabilistic_sharpe(moments: SharpeMoments, benchmark_sharpe: float = 0.0) -> float:
    """Return the probability that the true Sharpe ratio exceeds ``benchmark_sharpe`` (per bar).

    References
    ----------
    Bailey, Lopez de Prado (2012), The Sharpe Ratio Efficient Frontier, Journal of Risk 15 (2).
    """
    error = np.sqrt(moments.variance_factor / (moments.n - 1))
    return float(norm.cdf((moments.sharpe - benchmark_sharpe) / error))


def expected_maximum_sharpe(n_trials: int, trial_variance: float) -> float:
    """Return the best Sharpe ratio, per bar, that ``n_trials`` strategies without skill are expected to show.

    Parameters
    ----------
    n_trials
        Number of independent trials; one trial has nothing to choose from and expects 0.
    trial_variance
        Variance of the Sharpe ratios across trials, per bar.

    References
    ----------
    Bailey, Lopez de Prado (2014), The Deflated Sharpe Ratio, Journal of Portfolio Management 40 (5), eq. 1.
    """
    if n_trials < 1:
        raise UsageError(f"n_trials is {n_trials}, at least the one trial at hand counts")
    if n_trials == 1:
        return 0.0
    euler = float(np.euler_gamma)
    upper, further = norm.ppf(1 - 1 / n_trials), norm.ppf(1 - 1 / (n_trials * np.e))
    return float(np.sqrt(trial_variance) * ((1 - euler) * upper + euler * further))


def deflated_sharpe(moments: SharpeMoments, n_trials: int, trial_variance: float | None = None) -> float:
    """Return the probability that the Sharpe ratio beats the best of ``n_trials`` strategies without skill.

    Parameters
    ----------
    moments
        Of the chosen strategy.
    n_trials
        How many were tried, the chosen one counted.
    trial_variance
        Variance of their Sharpe ratios, per bar; by default what pure noise of this length has, 1 / (n - 1).

    References
    ----------
    Bailey, Lopez de Prado (2014), The Deflated Sharpe Ratio, eq. 2.
    """
    variance = 1.0 / (moments.n - 1) if trial_variance is None else trial_variance
    return probabilistic_sharpe(moments, expected_maximum_sharpe(n_trials, variance))


def minimum_track_record_length(
    moments: SharpeMoments, benchmark_sharpe: float = 0.0, confidence: float = 0.95
) -> float | None:
    """Return how many bars it takes to be sure that the Sharpe ratio exceeds ``benchmark_sharpe``.

    Returns
    -------
    float or None
        Number of bars; None when the estimate does not exceed the benchmark, whatever the length.

    References
    ----------
    Bailey, Lopez de Prado (2012), The Sharpe Ratio Efficient Frontier, eq. 11.
    """
    if moments.sharpe <= benchmark_sharpe:
        return None
    distance = float(norm.ppf(confidence)) / (moments.sharpe - benchmark_sharpe)
    return 1.0 + moments.variance_factor * distance**2


def probability_of_backtest_overfitting(trial_returns: FloatArray, n_blocks: int = 10) -> float:
    """Return how often the best of the trials in one half of time is below the median in the other (CSCV).

    Parameters
    ----------
    trial_returns
        Returns per bar of every trial, on the same bars, (T, N); finite.
    n_blocks
        Even number of consecutive blocks; every half of them is once the half to choose on.

    Returns
    -------
    float
        1/2 is what trials without skill give; near 0 the best is best again, near 1 choosing does harm.

    Raises
    ------
    InsufficientDataError
        If there are fewer than two trials, or fewer than two bars to a block.

    References
    ----------
    Bailey, Borwein, Lopez de Prado, Zhu (2017), The Probability of Backtest Overfitting, Journal of
    Computational Finance 20 (4).
    """
    n_bars, n_trials = trial_returns.shape
    if n_blocks % 2 or n_blocks < 2:
        raise UsageError(f"n_blocks is {n_blocks}, it must be even")
    if n_trials < 2 or n_bars < 2 * n_blocks:
        raise InsufficientDataError(
            f"{n_trials} trials of {n_bars} bars: at least 2 trials and {2 * n_blocks} bars are needed"
        )
    size = n_bars // n_blocks
    blocks = trial_returns[n_bars - size * n_blocks :].reshape(n_blocks, size, n_trials)
    sums, squares = blocks.sum(axis=1), (blocks**2).sum(axis=1)
    chosen = np.zeros((_half_count(n_blocks), n_blocks))
    for row, half in enumerate(combinations(range(n_blocks), n_blocks // 2)):
        chosen[row, list(half)] = 1.0
    half_bars = size * n_blocks // 2
    inside = _sharpes(chosen @ sums, chosen @ squares, half_bars)
    outside = _sharpes((1 - chosen) @ sums, (1 - chosen) @ squares, half_bars)
    best = inside.argmax(axis=1)
    ranks = rankdata(outside, axis=1)[np.arange(len(best)), best] / (n_trials + 1)
    # On the median counts half: identical trials say nothing either way.
    return float(np.mean(ranks < 0.5) + 0.5 * np.mean(ranks == 0.5))


def _half_count(n_blocks: int) -> int:
    return sum(1 for _ in combinations(range(n_blocks), n_blocks // 2))


def _sharpes(sums: FloatArray, squares: FloatArray, n_bars: int) -> FloatArray:
    mean = sums / n_bars
    spread = np.sqrt(np.maximum(squares / n_bars - mean**2, 0.0))
    return np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run, as far as counting trials needs it.

    Attributes
    ----------
    symbol
        What it was trained for.
    first_session, last_session
        The window of prices that it looked at, as ISO dates.
    fingerprint
        Hash of data, recipe and seed; a repetition of the same run is no further trial.
    n_trials
        Verdicts that the run could choose from; 1 for a recipe that is fixed before it is judged. Settings
        tried inside the folds do not count: the out-of-sample rows have not seen them.
    """

    symbol: str
    first_session: str
    last_session: str
    fingerprint: str
    n_trials: int = 1


def record_run(path: Path, *runs: Run) -> None:
    """Append runs to the log of trials, a file of JSON lines.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    lines = "".join(json.dumps(asdict(run), sort_keys=True) + "\n" for run in runs).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: two trainings at once do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write the log of trials {path.name}: {error.strerror}") from error


def count_trials(path: Path, *runs: Run) -> int:
    """Return how many trials were made on any of the symbols and an overlapping window, this one included.

    ``runs`` are one run as each symbol of its panel sees it: a look at a panel is a look at all of them.
    Lines that cannot be read are passed over: a torn line must not stop a training.
    """
    now = {run.symbol: run for run in runs}
    others = {
        past.fingerprint: past.n_trials
        for past in _read_runs(path)
        if (run := now.get(past.symbol)) is not None
        and past.first_session <= run.last_session
        and past.last_session >= run.first_session
        and past.fingerprint != run.fingerprint
    }
    return runs[0].n_trials + sum(others.values())


def _read_runs(path: Path) -> Iterator[Run]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield Run(**json.loads(line))
        except (ValueError, TypeError):
            continue
