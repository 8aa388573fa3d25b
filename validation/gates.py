"""The verdict: is there an edge, is there none, or can nobody know yet. Evidence first, the label after it.

A model gets ``edge`` only if all of these hold on out-of-sample rows:

- its signal ranks what followed better than chance, one-sided p of at most .05;
- its positions earned more than the benchmark of equal exposure, one-sided p of at most .10;
- its calibrated forecast has a smaller squared error than its own drift forecast moved to the same mean: a
  forecast that is nearer to what came because it is higher throughout knows nothing.

Both limits are divided by the square of the number of verdicts on the same prices, so that trying seeds is no
way to an edge; one that found an edge hands its share on, see `wfe_metrics.share_of_limits`.

The chance that a model without skill gets ``edge`` is at most 5 %. The first test alone is made for that rate
and the other two lower it. Overlapping labels, slow signals and drift are where such tests usually break.
Measured in 1,000 simulated histories each (5-day labels, GARCH with Student-t shocks and drift, 504 to 3,000
sessions; signals: AR(1) with .98, and "below the 50- or 200-day mean", bought when low):
p_ic <= .05 in 4 to 8 % of them, ``edge`` in 2.1 to 4.4 %; for white noise, yearly levels and momentum about
5 % and below 4 %. The rate is kept because

- a signal is ranked among its own past, not among all rows: ranked in hindsight, "far below its mean" looks
  clever on a random walk (14 % instead of 6 %);
- products of signal and outcome are resampled in blocks of a quarter (longer for long horizons), and the
  statistic is studentised.

An IC above .10, or a hit rate above 57 % that is 2 points above "always up", is no success but the mark of
a leak. The alarm is told first among the reasons and as ``leak_alarm``. The label stays what the tests say,
since a signal may be that strong where it was planted; but what the alarm stands beside is not to be believed
until a person has looked, and ``--strict`` saves none of it.

The classic gates are computed and shown beside, and never change the label: a constant passes some of them.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from evaluation.forward_simulator import MIN_BARS
from evaluation.metrics import Measured
from utils.base import DataError, GateRefusedError
from validation.walk_forward import WalkForwardSummary
from validation.wfe_metrics import (
    MAX_ONE_SIDED,
    MIN_RETURNS,
    MIN_SIGNAL_STD,
    FloatArray,
    ResolvedRows,
    block_bootstrap_p_value,
    calibration_slope,
    deflated_sharpe,
    hit_rate,
    known_mean,
    less,
    minimum_track_record_length,
    probability_of_backtest_overfitting,
    rank_among_past,
    share_up,
    sharpe_moments,
    skill,
)

Label = Literal["edge", "no-edge", "insufficient"]
EvidenceValue = float | int | bool | None

# The defaults are what the stated error rates hold for. Largest p-values of the two tests of a first verdict.
MAX_P_IC, MAX_P_RETURN = 0.05, 0.10
# Sessions with a known outcome, two years, and sessions / horizon below which nobody can know.
MIN_SESSIONS, MIN_INDEPENDENT = 504, 50.0
# Return a year over equal exposure below which nobody would care, whatever its p-value.
MIN_ACTIVE_RETURN = 0.001
# Share of outcomes of exactly zero above which the prices count as constant.
MAX_UNMOVED = 0.5
IMPLAUSIBLE_IC, IMPLAUSIBLE_HITS, IMPLAUSIBLE_OVER_UP = 0.10, 0.57, 0.02
# Outcomes beyond so many volatilities count as this many: one crash must not decide a test of a mean.
OUTCOME_LIMIT_SIGMA = 4.0
SEED, PERIODS_PER_YEAR = 7, 252
# Classic gates (signals: raw, not calibrated): name, figure, the open interval in which it passes, in words.
CLASSIC = (
    ("walk-forward efficiency", "walk_forward_efficiency", 0.40, float("inf"), "> 40%"),
    ("direction accuracy", "direction_accuracy", 0.51, float("inf"), "> 51%"),
    ("signal std", "signal_std", MIN_SIGNAL_STD, float("inf"), f"> {MIN_SIGNAL_STD}"),
    ("share positive", "share_positive", 0.30, 0.70, "30% to 70%"),
)
# Reasons that do not speak against an edge.
DECIDES_NOTHING = re.compile("(?<!not )met: |taken one session later")
UNIVERSE_EVIDENCE = ("ic", "p_ic", "p_return", "active_return_annual", "skill_over_drift", "n_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A classic gate: its value, its threshold in words, whether it passed; None where not computed."""

    name: str
    value: float | None
    threshold: str
    passed: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The label; why, in words, the deciding reasons first; figures by name, None where undefined; gates."""

    label: Label
    reasons: tuple[str, ...]
    evidence: Mapping[str, EvidenceValue]
    gates: tuple[Gate, ...]

    @property
    def bypassed_gates(self) -> tuple[str, ...]:
        """Names of the classic gates that were computed and failed: what is saved bypasses them."""
        return tuple(gate.name for gate in self.gates if gate.passed is False)

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "label": self.label,
            "reasons": list(self.reasons),
            "evidence": dict(self.evidence),
            "gates": [asdict(gate) for gate in self.gates],
            "bypassed_gates": list(self.bypassed_gates),
        }


def judge(
    record: pd.DataFrame,
    *,
    horizon_bars: int,
    strategy_return: FloatArray,
    benchmark_return: FloatArray,
    summary: WalkForwardSummary | None = None,
    n_verdicts: int = 1,
    limits_share: float = 1.0,
    tried_returns: FloatArray | None = None,
    n_resamples: int = 2_000,
) -> Verdict:
    """Weigh the out-of-sample evidence; `DataError` for returns that are not finite, or not of the same bars.

    Parameters
    ----------
    record, horizon_bars, summary
        Walk-forward record of one symbol, or of a panel that is judged as a whole; length of its labels; its
        measures across folds, for the classic gates.
    strategy_return, benchmark_return
        Simple returns per bar, after costs, of the decided positions and of the benchmark with the same
        average exposure, on the same out-of-sample bars, (m,).
    n_verdicts, limits_share
        Verdicts on these prices, this one counted, and what share of a first one's limits they leave to it:
        `wfe_metrics.n_verdicts_of`, `wfe_metrics.share_of_limits`.
    tried_returns
        Returns per bar of alternatives that were looked at, (m, k), for the probability of overfitting.
    n_resamples
        Of the bootstraps.
    """
    strategy, benchmark = _checked(strategy_return, benchmark_return)
    rows = ResolvedRows(record)
    evidence: dict[str, EvidenceValue] = {
        "n_rows": len(rows.outcome),
        "n_sessions": rows.n_sessions,
        "n_independent": rows.n_sessions / horizon_bars,
        **_forecast_evidence(rows, horizon_bars, n_resamples),
        **_return_evidence(strategy, benchmark, horizon_bars, n_verdicts, n_resamples),
        "pbo": None if tried_returns is None else probability_of_backtest_overfitting(tried_returns),
        "walk_forward_efficiency": summary.efficiency if summary else None,
        "limits_share": limits_share,
    }
    evidence["leak_alarm"] = leak_alarm(evidence)
    alarm, missing = _alarm_reasons(evidence), _missing_reasons(rows, horizon_bars)
    failed, held = _edge_reasons(evidence, (MAX_P_IC * limits_share, MAX_P_RETURN * limits_share))
    label: Label = "insufficient" if missing else "no-edge" if failed else "edge"
    return Verdict(
        label=label,
        reasons=(*alarm, *missing, *failed, *held),
        evidence=evidence,
        gates=classic_gates(evidence),
    )


def of_universe(pooled: Verdict, own: Verdict, symbol: str, n_symbols: int) -> Verdict:
    """Return the verdict of a symbol whose model learned from a universe.

    One model was fitted, so one question is asked: has it skill over the universe. What a symbol's own rows
    say is far weaker, is shown beside it, and sets the symbol's calibration; it changes the label where the
    symbol is too short to be judged, and where the model's signal has not gone with the symbol at all.
    """
    ic = cast("float | None", own.evidence["ic"])
    shared = {f"universe_{name}": pooled.evidence[name] for name in UNIVERSE_EVIDENCE}
    shared["leak_alarm"] = bool(own.evidence["leak_alarm"] or pooled.evidence["leak_alarm"])
    label = pooled.label
    if own.label == "insufficient":
        label = "insufficient"
    elif ic is None or ic <= 0.0:
        label = "no-edge"
    return replace(
        own,
        label=label,
        reasons=(
            *(f"{n_symbols} symbols together: {reason}" for reason in pooled.reasons),
            *(f"{symbol} alone ({own.label}): {reason}" for reason in own.reasons),
        ),
        evidence={**own.evidence, **shared},
    )


def refuse_without_edge(symbol: str, verdict: Mapping[str, Any], report: Path | None) -> None:
    """Refuse, as ``--strict`` asks, a `Verdict.as_dict` without an edge, or with one that looks like a leak.

    The `GateRefusedError` names the reasons that decide, and the report.
    """
    alarm = ", beside a leak alarm," if verdict["evidence"]["leak_alarm"] else ""
    if alarm or verdict["label"] != "edge":
        against = "; ".join(text for text in verdict["reasons"] if not DECIDES_NOTHING.search(text))
        told = f"the verdict is {verdict['label']}{alarm} and --strict was given: nothing was saved"
        found = {"verdict": verdict["label"], "reasons": verdict["reasons"], "report": report and str(report)}
        raise GateRefusedError(f"{symbol}: {told}; {against}; report: {report or 'none'}", found)


def _skill_scores(rows: ResolvedRows) -> FloatArray:
    """Return per session how the signal, ranked among its past, went with the outcome, (n_sessions,)."""
    products = np.zeros(len(rows.signal))
    for own in rows.by_symbol():
        outcome = np.clip(rows.outcome[own], -OUTCOME_LIMIT_SIGMA, OUTCOME_LIMIT_SIGMA)
        if np.ptp(rows.signal[own]) > 0:
            products[own] = rank_among_past(rows.signal[own]) * (outcome - outcome.mean())
    return rows.sum_by_session(products)


def _forecast_evidence(rows: ResolvedRows, horizon_bars: int, n_resamples: int) -> dict[str, EvidenceValue]:
    scores, p_ic = rows.ic_by_session(), None
    if len(scores):
        p_ic = block_bootstrap_p_value(_skill_scores(rows), horizon_bars, n_resamples=n_resamples, seed=SEED)
    hits, base = hit_rate(rows.forecast, rows.outcome), share_up(rows.outcome)
    nothing, average = np.zeros(len(rows.outcome)), rows.drift_so_far(horizon_bars)
    return {
        "ic": known_mean(scores),
        "p_ic": p_ic,
        "direction_accuracy": hits,
        "share_up": base,
        "skill_over_zero": skill(rows.forecast, nothing, rows.outcome),
        "skill_over_average": skill(rows.forecast, average, rows.outcome),
        "skill_over_drift": skill(rows.forecast, rows.level_drift(), rows.outcome),
        "hits_over_always_up": less(hits, base),
        "calibration_slope": calibration_slope(rows.forecast, rows.outcome),
        "signal_std": float(rows.signal.std()) if len(rows.signal) else None,
        "share_positive": known_mean(rows.signal > 0),
    }


def _return_evidence(
    strategy: FloatArray, benchmark: FloatArray, horizon_bars: int, n_verdicts: int, n_resamples: int
) -> dict[str, EvidenceValue]:
    active = strategy - benchmark
    whole, apart = sharpe_moments(strategy), sharpe_moments(active)
    return {
        "active_return_annual": float(active.mean()) * PERIODS_PER_YEAR if len(active) else None,
        "p_return": block_bootstrap_p_value(active, horizon_bars, n_resamples=n_resamples, seed=SEED + 1),
        "n_trials": n_verdicts,
        "deflated_sharpe": deflated_sharpe(whole, n_verdicts) if whole else None,
        "deflated_sharpe_active": deflated_sharpe(apart, n_verdicts) if apart else None,
        "minimum_track_record_bars": minimum_track_record_length(whole) if whole else None,
    }


def leak_alarm(evidence: Mapping[str, EvidenceValue]) -> bool:
    """Tell whether the evidence is too good: see the module's docstring."""
    ic, hits, over = (evidence[name] or 0.0 for name in ("ic", "direction_accuracy", "hits_over_always_up"))
    return ic > IMPLAUSIBLE_IC or (hits > IMPLAUSIBLE_HITS and over > IMPLAUSIBLE_OVER_UP)


def _alarm_reasons(evidence: Mapping[str, EvidenceValue]) -> tuple[str, ...]:
    ic, hits = (in_words(evidence[name]) for name in ("ic", "direction_accuracy"))
    told = (
        f"LEAK ALARM: IC {ic}, hit rate {hits}: prices do not give this much away, so this is no proof of an "
        "edge; look for a feature that knows the future"
    )
    return (told,) if evidence["leak_alarm"] else ()


def _missing_reasons(rows: ResolvedRows, horizon_bars: int) -> tuple[str, ...]:
    reasons, independent = [], rows.n_sessions / horizon_bars
    if rows.n_sessions < MIN_SESSIONS or independent < MIN_INDEPENDENT:
        reasons.append(
            f"{rows.n_sessions} out-of-sample sessions, {independent:.0f} of them independent: at least "
            f"{MIN_SESSIONS} and {MIN_INDEPENDENT:.0f} are needed to tell"
        )
    if (unmoved := known_mean(rows.outcome == 0) or 0.0) > MAX_UNMOVED:
        reasons.append(f"the price did not move in {unmoved:.0%} of the forecast windows: constant prices")
    return tuple(reasons)


def _edge_reasons(
    evidence: Mapping[str, EvidenceValue], limits: tuple[float, float]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what speaks against an edge and what speaks for it, in words."""
    p_ic, p_return, gained = (evidence[name] for name in ("p_ic", "p_return", "skill_over_drift"))
    annual = evidence["active_return_annual"]
    is_worth_it, share = annual is not None and annual >= MIN_ACTIVE_RETURN, in_words(gained)
    checks = (
        (
            p_ic is not None and p_ic <= limits[0],
            f"IC {in_words(evidence['ic'])} out of sample, p {in_words(p_ic)} (at most {limits[0]:.3g})"
            if p_ic is not None
            else "the signal does not vary, or varies too little to be tested",
        ),
        (
            p_return is not None and p_return <= limits[1] and is_worth_it,
            f"{in_words(annual, '+.2%')} a year over the benchmark of equal exposure (at least "
            f"{MIN_ACTIVE_RETURN:+.2%}), p {in_words(p_return)} (at most {limits[1]:.3g})"
            if p_return is not None
            else "the positions do not differ from the benchmark of equal exposure",
        ),
        (
            gained is not None and gained > 0,
            f"squared error of the drift, at the forecasts' mean, removed: {share} (must be above 0)",
        ),
    )
    failed = tuple(f"not met: {text}" for holds, text in checks if not holds)
    return failed, tuple(f"met: {text}" for holds, text in checks if holds)


def classic_gates(evidence: Mapping[str, EvidenceValue]) -> tuple[Gate, ...]:
    """Return the classic gates, which decide nothing; an undefined value neither passes nor fails."""
    gates = []
    for name, key, above, below, threshold in CLASSIC:
        value = evidence[key]
        passed = None if value is None else above < value < below
        gates.append(Gate(name=name, value=value, threshold=threshold, passed=passed))
    return tuple(gates)


def in_words(value: EvidenceValue, form: str = ".3g") -> str:
    """Return a figure in a given format, or that there is none."""
    return "undefined" if value is None else format(value, form)


def _checked(strategy: FloatArray, benchmark: FloatArray) -> tuple[FloatArray, FloatArray]:
    arrays = np.asarray(strategy, dtype=np.float64), np.asarray(benchmark, dtype=np.float64)
    if arrays[0].shape != arrays[1].shape or arrays[0].ndim != 1:
        raise DataError(f"strategy and benchmark returns have shapes {arrays[0].shape} and {arrays[1].shape}")
    if not (np.isfinite(arrays[0]).all() and np.isfinite(arrays[1]).all()):
        raise DataError("strategy or benchmark returns are not finite: pass the out-of-sample bars only")
    return arrays


def measured_deflated_sharpe(returns: FloatArray, n_results: int) -> Measured:
    """Return the deflated Sharpe ratio, or why there is none."""
    moments = sharpe_moments(returns)
    if moments is None:
        return Measured(None, f"needs {MIN_RETURNS} returns that vary")
    return Measured(deflated_sharpe(moments, n_results))


def measured_track_record(returns: FloatArray) -> Measured:
    """Return how long a record must be for its Sharpe ratio to be above zero, or why there is no length."""
    moments = sharpe_moments(returns)
    bars = None if moments is None else minimum_track_record_length(moments)
    if bars is None:
        return Measured(None, "no length is enough: the Sharpe ratio is not above zero")
    return Measured(bars)


def measured_overfitting(tried: FloatArray) -> Measured:
    """Return the probability of overfitting by choosing among the columns, (n, k), or why there is none."""
    if len(tried) < MIN_BARS:
        return Measured(None, f"needs {MIN_BARS} returns, has {len(tried)}")
    return Measured(probability_of_backtest_overfitting(tried))


def ranks_better_p_value(
    signal: FloatArray, rival: FloatArray, outcome: FloatArray, horizon_bars: int
) -> float | None:
    """Return the one-sided p-value of "the signal goes with the outcome no better than its rival does".

    Both are ranked among their own past; rows are in order of time, finite, outcomes winsorised, (n,).
    """
    ahead = rank_among_past(signal) - rank_among_past(rival)
    return block_bootstrap_p_value(ahead * (outcome - outcome.mean()), horizon_bars)


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
