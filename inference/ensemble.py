"""Several models as one forecaster of the volatility-scaled return: weigh, calibrate, learn from both.

A `SimpleEnsemble` joins models of different kinds by what their signals were worth before; a `MetaModel`
learns when to listen to which.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import xgboost
from scipy.optimize import nnls

from data.target_engineering import make_target

FloatArray = npt.NDArray[np.float64]
FloatMatrix = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]
MODEL_NAMES = ("xgb", "lgb")
Method = Literal["simple", "stacking", "xgb-meta"]
GBM_NAME, LSTM_NAME = "gbm", "lstm"
# Fewer independent rows than this say nothing about a slope.
MIN_INDEPENDENT = 30
# A signal is at most doubled.
MAX_SLOPE = 2.0
# How far the slopes of symbols are thought to lie from the pooled one.
SYMBOL_SLOPE_STD = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What earlier out-of-sample rows say about the raw signal.

    In units of the h-day volatility, the calibrated forecast is ``drift + slope * (raw - raw_mean)``. The
    drift, the mean target of the training rows, is the forecast of a model without skill. The slope of
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


def overlap_error(scores: FloatArray, horizon_bars: int) -> float:
    """Return the standard error of the sum of scores, one per session, that come from labels of h bars.

    Newey and West's (1987, Econometrica 55) with 3 (h - 1) lags: how far overlapping labels repeat each other
    depends on how slowly the signal moves.
    """
    lags = min(3 * (horizon_bars - 1), len(scores) - 1)
    variance = float(scores @ scores)
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * float(scores[lag:] @ scores[:-lag])
    return float(np.sqrt(max(variance, 0.0)))


def calibrate(
    raw_scaled: FloatArray,
    realised_scaled: FloatArray,
    *,
    drift: float,
    horizon_bars: int,
    session_code: IntArray | None = None,
    prior_slope: float = 0.0,
    prior_std: float = 1.0,
    confidence_z: float = 1.645,
) -> Calibration:
    """Estimate how far the raw signal may be believed, from out-of-sample rows.

    The least-squares slope of realised on raw is a normal posterior with prior N(`prior_slope`, `prior_std`),
    clipped into [0, `MAX_SLOPE`]: a few small trees may be too humble. Its standard error sums over the
    symbols of a session, which move together, and allows for labels that overlap, see `overlap_error`.

    Parameters
    ----------
    raw_scaled, realised_scaled
        Signal and outcome of the same out-of-sample rows, (n,), both known before the calibration is used.
    drift
        Mean of the scaled target over the training rows.
    session_code
        Number of each row's session, from 0, (n,); None where every row is a session of its own.
    prior_slope, prior_std
        What is thought of the slope before looking: 0 and wide for a model, the pooled slope for a symbol.
    confidence_z
        Normal quantile of the lower bound (1.645 is one-sided 95 %).
    """
    n_rows = len(raw_scaled)
    code = np.arange(n_rows) if session_code is None else session_code
    n_sessions = int(code.max()) + 1 if n_rows else 0
    spread = float(np.var(raw_scaled)) if n_rows else 0.0
    raw_mean = float(np.mean(raw_scaled)) if n_rows else 0.0
    if n_sessions / horizon_bars < MIN_INDEPENDENT or spread <= 1e-12:
        slope = float(np.clip(prior_slope, 0.0, MAX_SLOPE))
        return Calibration(drift=drift, raw_mean=raw_mean, slope=slope, skill_lower=0.0, n_rows=n_rows)
    centred = raw_scaled - raw_mean
    outcome = realised_scaled - np.mean(realised_scaled)
    own = float(np.mean(centred * outcome)) / spread
    by_session = np.bincount(code, weights=centred * (outcome - own * centred)).astype(np.float64)
    error = overlap_error(by_session, horizon_bars) / (spread * n_rows)
    trust = prior_std**2 / (prior_std**2 + error**2)
    slope = prior_slope + trust * (own - prior_slope)
    lower = (slope - confidence_z * error * np.sqrt(trust)) / slope if slope > 0 else 0.0
    return Calibration(
        drift=drift,
        raw_mean=raw_mean,
        slope=float(np.clip(slope, 0.0, MAX_SLOPE)),
        skill_lower=float(np.clip(lower, 0.0, 1.0)),
        n_rows=n_rows,
    )


def calibrate_symbols(
    pooled: Calibration,
    raw_scaled: FloatArray,
    realised_scaled: FloatArray,
    session_code: IntArray,
    symbol: npt.NDArray[np.object_],
    *,
    drifts: Mapping[str, float],
    horizon_bars: int,
) -> dict[str, Calibration]:
    """Calibrate each symbol of a panel by its own out-of-sample rows, shrunk towards the pooled slope.

    A symbol with few rows of its own takes the pooled calibration. Arrays are those of `calibrate`, with the
    symbol of each row; ``drifts`` holds the mean scaled target of each symbol's training rows.
    """
    found = {}
    for name, drift in drifts.items():
        own = np.flatnonzero(symbol == name)
        sessions = np.unique(session_code[own], return_inverse=True)[1] if len(own) else None
        each = calibrate(
            raw_scaled[own],
            realised_scaled[own],
            drift=drift,
            horizon_bars=horizon_bars,
            session_code=sessions,
            prior_slope=pooled.slope,
            prior_std=SYMBOL_SLOPE_STD,
        )
        if each.n_rows / horizon_bars < MIN_INDEPENDENT:
            each = replace(pooled, drift=drift)
        found[name] = each
    return found


# What a member's opinion counts before anything is known of it.
PRIOR = (("gbm", 0.7), ("lstm", 0.3))
# Rows between the end of a label and its first use, so that "before" never rests on one close.
EMBARGO_BARS = 1
# Fewer known rows than this tell nothing.
LEAST_ROWS = 126
# A signal's spread is that of about so many rows: every fit of a model speaks with another voice.
SPREAD_ROWS, LEAST_SPREAD_ROWS = 252, 63
# A signal is made louder or quieter by so much at most; one that spreads less than this says nothing.
MAX_LOUDER, CONSTANT = 10.0, 1e-9
# Signals and outcomes beyond so many spreads count as this many where skill is learned.
OUTCOME_LIMIT_SIGMA = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRows:
    """What the members said of one symbol, session by session, what came, and when that was known.

    Signals (n, k), a column a member, and outcomes (n,) are in units of the h-day volatility, NaN where there
    is none. Only rows that no member was fitted on, ``is_out_of_sample``, are learned from; ``known_from`` is
    the first row that may use each row's outcome.
    """

    signals: FloatArray
    outcome: FloatArray
    is_out_of_sample: BoolArray
    known_from: IntArray
    horizon_bars: int

    def refreshes(self, usable: BoolArray, every: int) -> Iterator[tuple[IntArray, slice]]:
        """Yield, for each stretch of ``every`` rows, the usable rows known before it, and its own.

        Stretches are counted from the first usable row, so that later rows move none of them.
        """
        wanted = usable & self.is_out_of_sample
        learned = wanted & np.isfinite(self.outcome)
        n, begin = len(wanted), 0
        for start in range(int(np.argmax(wanted)) if wanted.any() else n, n, every):
            yield np.flatnonzero(learned & (self.known_from <= start)), slice(begin, start + every)
            begin = start + every
        if begin == 0:
            yield np.empty(0, dtype=np.intp), slice(0, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleEnsemble:
    """Joins members' signals by weights that start at a prior and move by out-of-sample skill alone.

    Every member speaks as loudly as the first one, as known by then, so that a weight is a share of what is
    said. The skills (information coefficients given the others) have a normal prior: the prior weights times
    `typical_ic`, give or take `ic_std`. The weights are the shares of their most likely values that are not
    negative. A member after the first gets exactly zero unless its skill given the others, as seen, lies more
    than one standard error above zero: the simpler forecast stands where no other clearly beats it (Breiman
    and others, 1984, Classification and Regression Trees). Both constants come from 45 series, of .034 on
    average and some .013 apart once the error of each is taken off; .015 counts as much as 4,400 independent
    rows. Weights and calibration are renewed every `refresh_rows` sessions.
    """

    prior: Mapping[str, float] = field(default_factory=lambda: dict(PRIOR))
    typical_ic: float = 0.03
    ic_std: float = 0.015
    refresh_rows: int = 63

    def weigh(self, rows: SignalRows, members: Sequence[str]) -> tuple[FloatArray, FloatArray]:
        """Follow the weights over time; row t uses outcomes that were known before t.

        Returns
        -------
        tuple of arrays
            Weights of ``members`` (n, k), zero for one without a forecast, summing to one where there is any;
            and the joined signal (n,), in the units of the first member that has one.
        """
        spread = spread_of(rows.signals)
        heard = np.isfinite(rows.signals) & ~(spread <= CONSTANT)
        standard = np.where(heard, rows.signals, np.nan) / spread
        prior = np.array([self.prior[name] for name in members])
        weights = np.zeros_like(standard)
        for known, now in rows.refreshes(np.isfinite(standard.sum(axis=1)), self.refresh_rows):
            weights[now] = self._learned(standard[known], rows.outcome[known], prior, rows.horizon_bars)
        # Where only members without weight have a forecast, it is theirs.
        weights = np.where(heard, weights, 0.0)
        alone = weights.sum(axis=1) <= 0
        weights[alone] = np.where(heard[alone], prior, 0.0)
        total = weights.sum(axis=1)
        weights /= np.where(total > 0, total, 1.0)[:, np.newaxis]
        first = spread[np.arange(len(spread)), np.argmax(heard, axis=1)]
        louder = np.clip(first[:, np.newaxis] / np.where(heard, spread, 1.0), 1 / MAX_LOUDER, MAX_LOUDER)
        joined = (weights * np.nan_to_num(louder, nan=1.0) * np.where(heard, rows.signals, 0.0)).sum(axis=1)
        return weights, np.where(total > 0, joined, np.nan)

    def _learned(
        self, standard: FloatArray, outcome: FloatArray, prior: FloatArray, horizon_bars: int
    ) -> FloatArray:
        """Return the weights that known rows call for: signals in their spreads (m, k), what came (m,)."""
        n_rows, share = len(outcome), np.asarray(prior / prior.sum(), dtype=np.float64)
        if n_rows < LEAST_ROWS or outcome.std() <= CONSTANT:
            return share
        limit = OUTCOME_LIMIT_SIGMA
        came = np.asarray(np.clip(outcome - outcome.mean(), -limit, limit), dtype=np.float64)
        came /= came.std()
        said = np.asarray(np.clip(standard - standard.mean(axis=0), -limit, limit), dtype=np.float64)
        scores = said * came[:, np.newaxis]
        errors = [overlap_error(np.ascontiguousarray(one), horizon_bars) / n_rows for one in scores.T]
        # Labels overlap: so many independent rows are these worth.
        worth = 1.0 / max(float(np.mean(np.square(errors))), 1.0 / n_rows)
        trust = self.ic_std**-2
        together, covered = said.T @ said / n_rows, scores.mean(axis=0)
        apart = np.linalg.pinv(together)
        # Skill given the others, by what was seen alone, against its standard error.
        earns = apart @ covered > np.array(errors) * np.sqrt(np.diag(apart))
        earns[0] = True
        precision = worth * together[np.ix_(earns, earns)] + trust * np.eye(int(earns.sum()))
        root = np.linalg.cholesky(precision)
        wanted = (worth * covered + trust * self.typical_ic * share)[earns]
        skills = np.zeros(len(prior))
        skills[earns] = nnls(root.T, np.linalg.solve(root, wanted))[0]
        return np.asarray(skills / skills.sum() if skills.any() else share, dtype=np.float64)

    def calibrate(
        self, rows: SignalRows, raw_scaled: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Follow `calibrate` over time; row t uses outcomes that were known before t.

        Returns slope, mean of the raw signal, and lower bound of the skill as of each row, (n,).
        """
        found = np.zeros((3, len(raw_scaled)))
        for known, now in rows.refreshes(np.isfinite(raw_scaled), self.refresh_rows):
            said, came = raw_scaled[known], rows.outcome[known]
            one = calibrate(said, came, drift=0.0, horizon_bars=rows.horizon_bars)
            found[:, now] = np.array([one.slope, one.raw_mean, one.skill_lower])[:, np.newaxis]
        return found[0], found[1], found[2]


def spread_of(signals: FloatArray) -> FloatArray:
    """Return how far each signal has been from zero lately, as known then, (n, k); NaN where unknown."""
    squares = pd.DataFrame(signals**2).ewm(span=SPREAD_ROWS, min_periods=LEAST_SPREAD_ROWS).mean()
    return np.asarray(np.sqrt(squares), dtype=np.float64)


# Bars whose volatility is the storm or calm that a bar is compared with, and those of a trend.
REGIME_BARS, TREND_BARS, LEAST_REGIME_BARS = 1260, 200, 60
MAX_TREND = 3.0
# What the linear meta-learner sees, whose weights are not negative: each member in calm and in storm, and
# what both say. The trees find such products themselves.
META_COLUMNS: dict[str, tuple[str, ...]] = {
    "stacking": ("gbm_calm", "gbm_storm", "lstm_calm", "lstm_storm", "agreed"),
    "xgb-meta": ("gbm", "lstm", "agreed", "storm", "trend"),
}


def meta_features(bars: pd.DataFrame, signals: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Return what meta-learners see of each bar; row t is known at the close of t.

    ``signals`` are raw, in units of the h-day volatility, by member, (n,). ``storm``: rank of the volatility
    among its last `REGIME_BARS`, 0 to 1. ``trend``: distance from the mean of `TREND_BARS` closes, in
    volatilities over as many bars. ``agreed``: what both members say at least, zero where they differ in
    sign.
    """
    gbm, lstm = signals[GBM_NAME], signals[LSTM_NAME]
    sigma_log = make_target(bars, 1)["sigma_log"]
    storm = sigma_log.rolling(REGIME_BARS, min_periods=LEAST_REGIME_BARS).rank(pct=True).fillna(0.5)
    close_log = np.log(bars["Close"])
    distance = close_log - close_log.rolling(TREND_BARS, min_periods=LEAST_REGIME_BARS).mean()
    trend = (distance / (sigma_log * np.sqrt(TREND_BARS))).clip(-MAX_TREND, MAX_TREND).fillna(0.0)
    in_storm = np.asarray(storm, dtype=np.float64)
    common = np.where(np.sign(gbm) == np.sign(lstm), np.minimum(np.abs(gbm), np.abs(lstm)), 0.0)
    return pd.DataFrame(
        {
            "gbm": gbm,
            "lstm": lstm,
            "gbm_calm": gbm * (1.0 - in_storm),
            "gbm_storm": gbm * in_storm,
            "lstm_calm": lstm * (1.0 - in_storm),
            "lstm_storm": lstm * in_storm,
            "agreed": np.sign(gbm) * common,
            "storm": in_storm,
            "trend": np.asarray(trend, dtype=np.float64),
        },
        index=bars.index,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaModel:
    """A fitted meta-learner: from `meta_features` to one signal in units of the h-day volatility.

    It sees `META_COLUMNS` of its method, standardised by ``centre`` and ``scale`` of the rows that it was
    fitted on, (p,); ``stacking`` has ``coefficients``, none negative, and ``xgb-meta`` a ``booster``.
    """

    method: Method
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...] = ()
    booster: xgboost.Booster | None = None

    def predict(self, features: pd.DataFrame) -> FloatArray:
        """Return the signal of rows with both members, (n,)."""
        known = features[list(META_COLUMNS[self.method])].to_numpy(dtype=np.float64)
        standard = (known - np.array(self.centre)) / np.array(self.scale)
        if self.booster is None:
            return np.asarray((standard * np.array(self.coefficients)).sum(axis=1), dtype=np.float64)
        return np.asarray(self.booster.inplace_predict(standard.astype(np.float32)), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """What a meta-learner said out of sample, by session, ascending; its final fit, for the bars after."""

    said: "pd.Series[float]"
    meta: MetaModel

    def signal(self, bars: pd.DataFrame, signals: Mapping[str, FloatArray], simple: FloatArray) -> FloatArray:
        """Return the meta-learner's signal of each bar; the simple ensemble's before its first, (n,)."""
        index = pd.DatetimeIndex(bars.index)
        known = np.array(self.said.reindex(index), dtype=np.float64)
        both = np.isfinite(np.column_stack(list(signals.values()))).all(axis=1)
        after = both & np.asarray(index > self.said.index[-1])
        if after.any():
            known[after] = self.meta.predict(meta_features(bars, signals)[after])
        return np.where(both & np.isfinite(known), known, simple)
