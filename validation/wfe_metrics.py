"""Statistics of out-of-sample rows: within a fold, across the folds, and across everything that was tried.

Two views of a forecast are kept apart. The *signal* is the model's uncalibrated deviation from the drift, in
units of the volatility known at the time; it shows whether anything was learned. The *forecast* is
calibrated, carries the drift, and is what is served; it shows whether it may be believed.

How much of a good result is owed to trying many things is told by the deflated Sharpe ratio, the probability
of overfitting (PBO), the track record that would be needed, and a log of verdicts. Three things are counted,
and named apart: *trials* are settings that a search compared on training rows; *verdicts* are judgements on
the same prices; *results* are what one could choose a headline from, verdicts times sizing presets.
"""

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, TypeAdapter
from scipy.special import ndtr, ndtri, stdtr

from utils.base import InsufficientDataError, StorageError, UsageError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
# By symbol: the signals of all rows so far, and how far outcomes lay off the drift; both sorted.
Past = dict[str, tuple[list[float], list[float]]]

# Fewer rows of a symbol than this say nothing about a rank correlation.
MIN_ROWS_FOR_IC = 20
# A signal that varies less, in deviations of the target, or has a larger share of one sign, has collapsed.
MIN_SIGNAL_STD, MAX_ONE_SIDED = 0.005, 0.9
MIN_SPREAD_FOR_SLOPE = 0.01
MIN_RETURNS = 30
# Stretches of time of which the probability of overfitting tries every half, so an even number.
PBO_BLOCKS = 10


class ResolvedRows:
    """Rows of a walk-forward record whose outcome is known, in order of time.

    All are (n,) and, but for the codes, in units of the volatility known at the time: ``signal`` (deviation
    from the drift, before calibration), ``outcome``, ``forecast`` (calibrated), ``baseline`` (the drift).
    """

    def __init__(self, record: pd.DataFrame) -> None:
        rows = record[record["realised_log"].notna()].sort_values("date", kind="stable")
        sigma = np.asarray(rows["sigma_log"], dtype=np.float64)
        names = ("realised_log", "predicted_log", "baseline_log")
        scaled = (np.asarray(rows[name], dtype=np.float64) / sigma for name in names)
        self.outcome, self.forecast, self.baseline = scaled
        self.signal = np.asarray(rows["raw_scaled"], dtype=np.float64)
        self.session_code = cast("IntArray", pd.factorize(rows["date"])[0])
        codes, symbols = pd.factorize(rows["symbol"])
        self.symbol_code, self.symbols = cast("IntArray", codes), tuple(symbols)
        self.n_sessions = int(self.session_code.max()) + 1 if len(rows) else 0

    def by_symbol(self) -> list[IntArray]:
        """Return the positions of each symbol's rows."""
        order = np.argsort(self.symbol_code, kind="stable")
        borders = np.flatnonzero(np.diff(self.symbol_code[order])) + 1
        return np.split(order, borders) if len(order) else []

    def ic_by_session(self) -> FloatArray:
        """Spread the information coefficient over sessions, (n_sessions,), so that they can be resampled.

        Its mean is the mean over symbols of each symbol's Spearman correlation of signal and outcome over
        time. Empty when no symbol has `MIN_ROWS_FOR_IC` rows in which both vary.
        """
        return self._ic(lambda rows: _standard_ranks(self.signal[rows]) * _standard_ranks(self.outcome[rows]))

    def causal_ic_by_session(self, past: Past) -> FloatArray:
        """Estimate what `ic_by_session` measures for a part of a record, from ranks as known at each row.

        The signal is ranked by `rank_among_past`; so is how far the outcome lies off the drift, which keeps
        its sign. Rows in ``past`` come before these, which then join them. The products are scaled to 1 for a
        perfect signal, by no mean nor deviation of the part itself: to rank the rows of a year among
        themselves is to know its end, and "far below its mean" shows an IC of .16 on random walks.
        """

        def products(rows: IntArray) -> FloatArray:
            signals, sizes = past.setdefault(self.symbols[self.symbol_code[rows[0]]], ([], []))
            excess = self.outcome[rows] - self.baseline[rows]
            excess_rank = np.sign(excess) * (rank_among_past(np.abs(excess), sizes) + 0.5)
            # Of uniform variables on [-1/2, 1/2] and [-1, 1], 6 is one over the product of deviations.
            return 6.0 * rank_among_past(self.signal[rows], signals) * excess_rank

        return self._ic(products)

    def _ic(self, products: Callable[[IntArray], FloatArray]) -> FloatArray:
        """Spread products of ranks, (k,) for the rows of each symbol, over sessions; see `ic_by_session`."""
        found, n_symbols = np.zeros(len(self.signal)), 0
        for rows in self.by_symbol():
            signal, outcome, own = self.signal[rows], self.outcome[rows], products(rows) / len(rows)
            if len(rows) >= MIN_ROWS_FOR_IC and np.ptp(signal) > 0 and np.ptp(outcome) > 0:
                found[rows] = own
                n_symbols += 1
        return self.sum_by_session(found) * (self.n_sessions / n_symbols) if n_symbols else np.empty(0)

    def sum_by_session(self, values: FloatArray) -> FloatArray:
        """Return the sums of ``values`` (n,) over the rows of each session, (n_sessions,)."""
        sums = np.bincount(self.session_code, weights=values, minlength=self.n_sessions)
        return np.asarray(sums, dtype=np.float64)

    def drift_so_far(self, horizon_bars: int) -> FloatArray:
        """Return the mean outcome per symbol over what was resolved at each row, 0 at first, (n,)."""
        drift = np.zeros(len(self.outcome))
        for own in self.by_symbol():
            n_known = np.maximum(np.arange(len(own)) - horizon_bars + 1, 0)
            total = np.concatenate([[0.0], np.cumsum(self.outcome[own])])[n_known]
            drift[own] = total / np.maximum(n_known, 1)
        return drift

    def level_drift(self) -> FloatArray:
        """Return the drift moved, symbol by symbol, to the mean of the forecasts, (n,).

        The drift is shrunk towards what is believed of all shares: on a series that rose faster a mere
        constant on top of it would remove errors.
        """
        moved = self.baseline.copy()
        for own in self.by_symbol():
            moved[own] += float(np.mean(self.forecast[own] - self.baseline[own]))
        return moved


def _standard_ranks(values: FloatArray) -> FloatArray:
    ranks = pd.Series(values).rank().to_numpy(dtype=np.float64)
    return np.asarray((ranks - ranks.mean()) / (ranks.std() or 1.0), dtype=np.float64)


def block_length(n_sessions: int, horizon_bars: int) -> int:
    """Return the length of bootstrap blocks: twice the labels' overlap, and growing with the sample.

    References: Kuensch (1989); Politis, White (2004): a block grows with the cube root of the sample.
    """
    wanted = max(2 * horizon_bars, round(2 * np.cbrt(n_sessions)))
    return int(max(1, min(wanted, n_sessions // 2)))


def resampled_block_sums(
    values: FloatArray, block_bars: int, n_resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Return the sums of the circular blocks of each resample, (n_resamples, n_blocks).

    A resample has whole blocks, of ``block_bars`` each: Politis, Romano (1992).
    """
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
    resampled and the mean is studentised by the spread of its block sums. Beyond all draws the tail is
    Student's, with a degree of freedom less than there are blocks. Values overlap over ``horizon_bars``. None
    for values that do not vary, or too few for eight blocks. Goetze, Kuensch (1996), Second-order correctness
    of the blockwise bootstrap.
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
    found = mean / max(error, 1e-300)
    reached = int(np.sum(studentised >= found))
    floor = (1 + reached) / (1 + n_resamples)
    # Draws cannot tell what lies beyond them all: there, where many tries ask for more, Student's tail does.
    return floor if reached else min(floor, float(stdtr(len(whole) - 1, -found)))


def rank_among_past(values: FloatArray, past: list[float] | None = None) -> FloatArray:
    """Return the rank of each value among itself and those before it, from -1/2 to 1/2, (n,).

    ``past`` are values before them all, sorted; these are sorted into it.
    """
    ranks, known = np.empty(len(values)), [] if past is None else past
    for position, value in enumerate(values.tolist()):
        low, high = bisect_left(known, value), bisect_right(known, value)
        ranks[position] = ((low + high) / 2 + 0.5) / (len(known) + 1) - 0.5
        known.insert(high, value)
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


def less(first: float | None, second: float | None) -> float | None:
    """Subtract; None where either is missing."""
    return None if first is None or second is None else first - second


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
    """Return the share of the skill shown on known rows that is left on unknown ones (Pardo 2008).

    ``(test_hits - test_base) / (fit_hits - fit_base)``, each a hit rate over that of "always up". None when
    the model had no skill on the rows that it knew.
    """
    return ratio(less(test_hits, test_base), less(fit_hits, fit_base))


def consistency(fold_ics: Sequence[float | None]) -> float | None:
    """Return the share of folds with a positive IC; a fold without one counts as not positive."""
    return None if not fold_ics else float(np.mean([ic is not None and ic > 0 for ic in fold_ics]))


def overfitting_ratio(fit_ics: Sequence[float | None], test_ics: Sequence[float | None]) -> float | None:
    """Return the share of the fitted rows' IC that is lost out of sample: 0 none, 1 all, above 1 reversed."""
    kept = ratio(known_mean(test_ics), known_mean(fit_ics))
    return None if kept is None else 1.0 - kept


def feature_stability(selections: Sequence[Sequence[str]]) -> float | None:
    """Return the mean Jaccard similarity of the folds' feature sets; None for fewer than two folds."""
    sets = [frozenset(selection) for selection in selections]
    if len(sets) < 2:
        return None
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(sets, 2)]))


def known_mean(values: Sequence[float | None] | npt.NDArray[np.generic]) -> float | None:
    """Return the mean of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SharpeMoments:
    """What the uncertainty of a Sharpe ratio depends on: all per bar, a normal variable has kurtosis 3."""

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
    spread = returns - np.mean(returns)
    variance = float(np.mean(spread**2))
    return SharpeMoments(
        sharpe=float(np.mean(returns) / np.std(returns, ddof=1)),
        skew=float(np.mean(spread**3)) / variance**1.5,
        kurtosis=float(np.mean(spread**4)) / variance**2,
        n=len(returns),
    )


def probabilistic_sharpe(moments: SharpeMoments, benchmark_sharpe: float = 0.0) -> float:
    """Return the probability that the true Sharpe ratio exceeds ``benchmark_sharpe`` (per bar).

    References: Bailey, Lopez de Prado (2012), The Sharpe Ratio Efficient Frontier, Journal of Risk 15 (2).
    """
    error = np.sqrt(moments.variance_factor / (moments.n - 1))
    return float(ndtr((moments.sharpe - benchmark_sharpe) / error))


def expected_maximum_sharpe(n_tried: int, variance: float) -> float:
    """Return the best Sharpe ratio that ``n_tried`` strategies without skill are expected to show.

    It is per bar, as is the ``variance`` of their Sharpe ratios. Bailey, Lopez de Prado (2014), The Deflated
    Sharpe Ratio, Journal of Portfolio Management 40 (5), eq. 1.
    """
    if n_tried == 1:
        return 0.0
    upper, further = ndtri(1 - 1 / n_tried), ndtri(1 - 1 / (n_tried * np.e))
    return float(np.sqrt(variance) * ((1 - np.euler_gamma) * upper + np.euler_gamma * further))


def deflated_sharpe(moments: SharpeMoments, n_tried: int, variance: float | None = None) -> float:
    """Return the probability that the Sharpe ratio beats the best of ``n_tried`` strategies without skill.

    The chosen one is counted. ``variance`` is that of their Sharpe ratios, per bar; by default what pure
    noise of this length has, 1 / (n - 1). Bailey, Lopez de Prado (2014), eq. 2.
    """
    spread = 1.0 / (moments.n - 1) if variance is None else variance
    return probabilistic_sharpe(moments, expected_maximum_sharpe(n_tried, spread))


def minimum_track_record_length(moments: SharpeMoments, benchmark_sharpe: float = 0.0) -> float | None:
    """Return how many bars it takes to be 95 % sure that the Sharpe ratio exceeds ``benchmark_sharpe``.

    None when the estimate does not exceed it, whatever the length. Bailey, Lopez de Prado (2012), eq. 11.
    """
    if moments.sharpe <= benchmark_sharpe:
        return None
    distance = float(ndtri(0.95)) / (moments.sharpe - benchmark_sharpe)
    return 1.0 + moments.variance_factor * distance**2


def probability_of_backtest_overfitting(tried_returns: FloatArray) -> float:
    """Return how often the best strategy of one half of time is below the median in the other (CSCV).

    ``tried_returns`` (T, N) are returns per bar of every strategy that was tried; every half of `PBO_BLOCKS`
    is once the half to choose on. 1/2 is what strategies without skill give; near 0 the best is best again,
    near 1 choosing does harm. Bailey, Borwein, Lopez de Prado, Zhu (2017), Journal of Computational Finance
    20 (4). Raises `InsufficientDataError` for fewer than two strategies, or two bars to a block.
    """
    n_bars, n_tried = tried_returns.shape
    if n_tried < 2 or n_bars < 2 * PBO_BLOCKS:
        needed = f"at least 2 and {2 * PBO_BLOCKS} bars are needed"
        raise InsufficientDataError(f"{n_tried} strategies of {n_bars} bars: {needed}")
    size = n_bars // PBO_BLOCKS
    blocks = tried_returns[n_bars - size * PBO_BLOCKS :].reshape(PBO_BLOCKS, size, n_tried)
    sums, squares = blocks.sum(axis=1), (blocks**2).sum(axis=1)
    halves = np.array([*combinations(range(PBO_BLOCKS), PBO_BLOCKS // 2)])
    chosen = np.zeros((len(halves), PBO_BLOCKS))
    np.put_along_axis(chosen, halves, 1.0, axis=1)
    half_bars = size * PBO_BLOCKS // 2
    inside = _sharpes(chosen @ sums, chosen @ squares, half_bars)
    outside = _sharpes((1 - chosen) @ sums, (1 - chosen) @ squares, half_bars)
    best = inside.argmax(axis=1)
    ranks = pd.DataFrame(outside).rank(axis=1).to_numpy()[np.arange(len(best)), best] / (n_tried + 1)
    # On the median counts half: identical strategies say nothing either way.
    return float(np.mean(ranks < 0.5) + 0.5 * np.mean(ranks == 0.5))


def _sharpes(sums: FloatArray, squares: FloatArray, n_bars: int) -> FloatArray:
    mean = sums / n_bars
    spread = np.sqrt(np.maximum(squares / n_bars - mean**2, 0.0))
    return np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run, as far as counting verdicts needs it: a symbol, and a window of prices as ISO dates.

    The ``fingerprint`` hashes data, recipe and seed: a repetition is no further verdict. ``n_trials`` are the
    verdicts that the run could choose from; trials of the search do not count, which test rows have not seen.
    ``at``, ``kind`` and ``settings`` tell when, which kind of model, and what was not left as it comes. A run
    is recorded before it shows anything, and again with the verdict and the share of the limits that it had.
    """

    symbol: str
    first_session: str
    last_session: str
    fingerprint: str
    n_trials: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    at: str = ""
    kind: str = ""
    settings: str = ""
    label: str = ""
    limits_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


def record_run(path: Path, *runs: Run) -> None:
    """Append runs to the log of verdicts, a file of JSON lines; raises `StorageError` if it cannot."""
    lines = "".join(json.dumps(asdict(run), sort_keys=True) + "\n" for run in runs).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, without a buffer: two trainings at once do not mix.
        with path.open("ab+", buffering=0) as log:
            # A line that was torn by a full disk must not take this one with it.
            size = log.seek(0, os.SEEK_END)
            is_torn = size > 0 and os.pread(log.fileno(), 1, size - 1) != b"\n"
            log.write(b"\n" * is_torn + lines)
    except OSError as error:
        raise StorageError(f"cannot write the log of verdicts {path.name}: {error.strerror}") from error


def earlier_runs(path: Path, *runs: Run) -> tuple[Run, ...]:
    """Return the other runs on any of the symbols and an overlapping window, once for each symbol they saw.

    ``runs`` are one run as each symbol of its panel sees it: a look at a panel is a look at all of them.
    A run that has its verdict on a symbol is not moved or changed by repetitions; until then it is told last.
    Lines that are no run are passed over: a torn line must not stop a training. Further fields of a line, as
    a later release may add them, are ignored.
    """
    now = {run.symbol: run for run in runs}
    others: dict[tuple[str, str], Run] = {}
    for past in _read_runs(path):
        run, key = now.get(past.symbol), (past.fingerprint, past.symbol)
        overlaps = run and past.first_session <= run.last_session and past.last_session >= run.first_session
        is_judged = key in others and others[key].label
        if run and overlaps and past.fingerprint != run.fingerprint and not is_judged:
            others.pop(key, None)
            others[key] = past
    return tuple(others.values())


def verdicts_of(path: Path, *runs: Run) -> dict[str, Run]:
    """Return by symbol the first verdict that each of the runs has had, where it is a repetition."""
    told = (past for past in _read_runs(path) if past.label)
    before = {(past.fingerprint, past.symbol): past for past in reversed([*told])}
    keys = {run.symbol: (run.fingerprint, run.symbol) for run in runs}
    return {symbol: before[key] for symbol, key in keys.items() if key in before}


def n_verdicts_of(earlier: Sequence[Run]) -> int:
    """Return how many verdicts the runs could choose from, each run counted once, for whatever symbols."""
    return sum({run.fingerprint: run.n_trials for run in earlier}.values())


def share_of_limits(symbol: str, earlier: Sequence[Run] = (), n_own: int = 1) -> float:
    """Return the share of a first verdict's limits that a verdict on a symbol has after ``earlier`` runs.

    One over the square of the number of verdicts, of which the run itself brings ``n_own``. Divided by the
    number alone, the limits of all verdicts together would add up without bound, and whoever stops at the
    first edge would find one; the squares add up to 1.64 limits. A verdict that found an edge did not use up
    its share: it hands it on to the next one on the same symbol, and to no other. The chance of any false
    edge of a symbol stays below 1.64 limits, in whatever order and however its verdicts depend on each other:
    Tian, Ramdas (2021), Online control of the familywise error rate, Statistical Methods in Medical Research
    30 (4), "online fallback". Never more than one limit here.
    """
    if n_own < 1:
        raise UsageError(f"this verdict is one at least, got {n_own}")
    own = [run for run in earlier if run.symbol == symbol]
    handed_on = own[-1].limits_share if own and own[-1].label == "edge" else 0.0
    return min(1.0, 1.0 / (n_own + n_verdicts_of(earlier)) ** 2 + handed_on / n_own)


def verdicts_on(metadata: Mapping[str, Any], log: Path | None) -> int:
    """Return how many verdicts on a model's prices are recorded by now, its own and later ones included."""
    judged_with = int(metadata["verdict"]["evidence"].get("n_trials") or 1)
    if log is None:
        return judged_with
    data, universe = metadata["data"], metadata.get("universe") or {"data": {}}
    last = {name: seen["last_session"] for name, seen in universe["data"].items()}
    last |= {metadata["symbol"]: data["last_session"]}
    first = data["first_session"]
    # A run without fingerprint is like no other: the model's own is counted where the log has it.
    runs = [Run(symbol=s, first_session=first, last_session=day, fingerprint="") for s, day in last.items()]
    # A model that came from elsewhere brings more verdicts than this log has.
    return max(judged_with, n_verdicts_of(earlier_runs(log, *runs)))


def _read_runs(path: Path) -> Iterator[Run]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"cannot read the log of verdicts {path}, so earlier tries cannot be counted: {error.strerror}"
        ) from error
    # Built here, and not where the module is imported.
    of_a_line = TypeAdapter(Run)
    for line in text.splitlines():
        with suppress(ValueError):
            yield of_a_line.validate_json(line, strict=True)
