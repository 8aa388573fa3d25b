"""The verdict: is there an edge, is there none, or can nobody know yet. Evidence first, the label after it.

A model gets ``edge`` only if all of these hold on out-of-sample rows:

- its signal ranks what followed better than chance, one-sided p of at most .05;
- its positions earned more than the benchmark of equal exposure, one-sided p of at most .10;
- its calibrated forecast has a smaller squared error than its own drift forecast.

Both limits are divided by the number of tries on the same prices, so that trying seeds is no way to an edge.

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
a leak. It is told loudly, in the reasons and as ``leak_alarm``; it does not change the label, because a leak
and a strong planted signal look the same from here, and a person has to look.

The classic gates are computed and shown beside, and never change the label: a constant passes some of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

import numpy as np
import pandas as pd

from evaluation.forward_simulator import MIN_BARS
from evaluation.metrics import Measured
from utils.errors import DataError
from validation.evidence import (
    MAX_ONE_SIDED,
    MIN_RETURNS,
    MIN_SIGNAL_STD,
    FloatArray,
    IntArray,
    block_bootstrap_p_value,
    calibration_slope,
    deflated_sharpe,
    hit_rate,
    ic_by_session,
    mean_or_none,
    minimum_track_record_length,
    probability_of_backtest_overfitting,
    rank_among_past,
    share_up,
    sharpe_moments,
    skill,
)
from validation.walk_forward import WalkForwardSummary

Label = Literal["edge", "no-edge", "insufficient"]
EvidenceValue = float | int | bool | None

# Outcomes beyond so many volatilities count as this many: one crash must not decide a test of a mean.
OUTCOME_LIMIT_SIGMA = 4.0


UNIVERSE_EVIDENCE = ("ic", "p_ic", "p_return", "active_return_annual", "skill_over_drift", "n_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """Limits of the verdict; the defaults are what the stated error rates hold for.

    Attributes
    ----------
    max_p_ic, max_p_return
        Largest p-values of the two tests.
    min_sessions
        Sessions with a known outcome below which nobody can know (two years).
    min_independent
        Sessions / horizon below which nobody can know: overlapping labels repeat each other.
    min_active_return_annual
        Return over equal exposure below which nobody would care, whatever its p-value: .1 % a year.
    max_unmoved
        Share of outcomes of exactly zero above which the prices count as constant.
    implausible_ic, implausible_hits, implausible_hits_minus_base
        Marks of a leak.
    min_efficiency, min_hits, min_signal_std, positive_low, positive_high
        Classic gates.
    n_resamples, seed
        Of the bootstrap.
    periods_per_year
        For figures per year in the reasons.
    """

    max_p_ic: float = 0.05
    max_p_return: float = 0.10
    min_sessions: int = 504
    min_independent: float = 50.0
    min_active_return_annual: float = 0.001
    max_unmoved: float = 0.5
    implausible_ic: float = 0.10
    implausible_hits: float = 0.57
    implausible_hits_minus_base: float = 0.02
    min_efficiency: float = 0.40
    min_hits: float = 0.51
    min_signal_std: float = 0.005
    positive_low: float = 0.30
    positive_high: float = 0.70
    n_resamples: int = 2_000
    seed: int = 7
    periods_per_year: int = 252


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A classic gate: its value (None is undefined, and fails), its threshold in words, whether it passed."""

    name: str
    value: float | None
    threshold: str
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The label, why, and everything that it rests on.

    Attributes
    ----------
    label
        ``edge``, ``no-edge`` or ``insufficient``.
    reasons
        In words, the deciding ones first.
    evidence
        Figures by name; None where undefined.
    gates
        The classic gates.
    """

    label: Label
    reasons: tuple[str, ...]
    evidence: Mapping[str, EvidenceValue]
    gates: tuple[Gate, ...]

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return {
            "label": self.label,
            "reasons": list(self.reasons),
            "evidence": dict(self.evidence),
            "gates": [asdict(gate) for gate in self.gates],
        }


class _Rows:
    """Resolved rows of a walk-forward record as arrays, in units of the volatility known at the time."""

    def __init__(self, record: pd.DataFrame) -> None:
        rows = record[record["realised_log"].notna()].sort_values("date", kind="stable")
        sigma = np.asarray(rows["sigma_log"], dtype=np.float64)

        def scaled(name: str) -> FloatArray:
            return np.asarray(rows[name], dtype=np.float64) / sigma

        self.signal = np.asarray(rows["raw_scaled"], dtype=np.float64)
        self.outcome = scaled("realised_log")
        self.forecast = scaled("predicted_log")
        self.baseline = scaled("baseline_log")
        self.session_code = cast("IntArray", pd.factorize(rows["date"])[0])
        self.symbol_code = cast("IntArray", pd.factorize(rows["symbol"])[0])
        self.n_sessions = int(self.session_code.max()) + 1 if len(rows) else 0

    def by_symbol(self) -> list[IntArray]:
        order = np.argsort(self.symbol_code, kind="stable")
        borders = np.flatnonzero(np.diff(self.symbol_code[order])) + 1
        return np.split(order, borders) if len(order) else []


def judge(
    record: pd.DataFrame,
    *,
    horizon_bars: int,
    strategy_return: FloatArray,
    benchmark_return: FloatArray,
    summary: WalkForwardSummary | None = None,
    n_trials: int = 1,
    trial_returns: FloatArray | None = None,
    config: GateConfig | None = None,
) -> Verdict:
    """Weigh the out-of-sample evidence.

    Parameters
    ----------
    record
        Walk-forward record (`validation.walk_forward.WalkForwardResult.record`) of one symbol, or of a panel
        that is judged as a whole.
    horizon_bars
        Length of the labels.
    strategy_return, benchmark_return
        Simple returns per bar, after costs, of the decided positions and of the benchmark with the same
        average exposure, on the same out-of-sample bars, (m,).
    summary
        Measures across folds, for the classic gates.
    n_trials
        Verdicts on these prices, this one counted; see `validation.evidence.earlier_runs`.
    trial_returns
        Returns per bar of alternatives that were looked at, (m, k), for the probability of overfitting.
    config
        Limits.

    Raises
    ------
    DataError
        If the returns do not belong together or are not finite.
    """
    config = stricter(config or GateConfig(), n_trials)
    strategy, benchmark = _checked(strategy_return, benchmark_return)
    rows = _Rows(record)
    evidence: dict[str, EvidenceValue] = {
        "n_rows": len(rows.outcome),
        "n_sessions": rows.n_sessions,
        "n_independent": rows.n_sessions / horizon_bars,
        **_forecast_evidence(rows, horizon_bars, config),
        **_return_evidence(strategy, benchmark, horizon_bars, n_trials, config),
        "pbo": None if trial_returns is None else probability_of_backtest_overfitting(trial_returns),
        "walk_forward_efficiency": summary.efficiency if summary else None,
    }
    evidence["leak_alarm"] = leak_alarm(evidence, config)
    missing = _missing_reasons(rows, evidence, config)
    failed, held = _edge_reasons(evidence, config)
    label: Label = "insufficient" if missing else "no-edge" if failed else "edge"
    alarm = (_alarm_reason(evidence),) if evidence["leak_alarm"] else ()
    return Verdict(
        label=label,
        reasons=(*alarm, *missing, *failed, *held),
        evidence=evidence,
        gates=classic_gates(evidence, config),
    )


def of_universe(pooled: Verdict, own: Verdict, symbol: str, n_symbols: int) -> Verdict:
    """Return the verdict of a symbol whose model learned from a universe.

    One model was fitted, so one question is asked: has it skill over the universe. What a symbol's own rows
    say is far weaker, is shown beside it, and sets the symbol's calibration; it changes the label where the
    symbol is too short to be judged, and where the model's signal has not gone with the symbol at all.
    """
    ic = cast("float | None", own.evidence["ic"])
    is_against = ic is None or ic <= 0.0
    label = own.label if own.label == "insufficient" else "no-edge" if is_against else pooled.label
    shared = {f"universe_{name}": pooled.evidence[name] for name in UNIVERSE_EVIDENCE}
    shared["leak_alarm"] = bool(own.evidence["leak_alarm"] or pooled.evidence["leak_alarm"])
    return replace(
        own,
        label=label,
        reasons=(
            *(f"{n_symbols} symbols together: {reason}" for reason in pooled.reasons),
            *(f"{symbol} alone ({own.label}): {reason}" for reason in own.reasons),
        ),
        evidence={**own.evidence, **shared},
    )


def stricter(config: GateConfig, n_trials: int) -> GateConfig:
    """Divide the limits of the p-values by the square of the number of tries on the same prices.

    Divided by the number alone, the limits of all tries together would add up without bound, and whoever
    stops at the first `edge` would find one. The squares add up to 1.64 of the limit of one try.
    """
    if n_trials < 1:
        raise DataError(f"a verdict is one try at least, got {n_trials}")
    share = 1.0 / n_trials**2
    return replace(config, max_p_ic=config.max_p_ic * share, max_p_return=config.max_p_return * share)


def _skill_scores(rows: _Rows) -> FloatArray:
    """Return per session how the signal, ranked among its past, went with the outcome, (n_sessions,)."""
    products = np.zeros(len(rows.signal))
    for own in rows.by_symbol():
        outcome = np.clip(rows.outcome[own], -OUTCOME_LIMIT_SIGMA, OUTCOME_LIMIT_SIGMA)
        if np.ptp(rows.signal[own]) > 0:
            products[own] = rank_among_past(rows.signal[own]) * (outcome - outcome.mean())
    return np.bincount(rows.session_code, weights=products, minlength=rows.n_sessions).astype(np.float64)


def _forecast_evidence(rows: _Rows, horizon_bars: int, config: GateConfig) -> dict[str, EvidenceValue]:
    scores = ic_by_session(rows.signal, rows.outcome, rows.session_code, rows.symbol_code)
    p_ic = None
    if len(scores):
        p_ic = block_bootstrap_p_value(
            _skill_scores(rows), horizon_bars, n_resamples=config.n_resamples, seed=config.seed
        )
    hits, base = hit_rate(rows.forecast, rows.outcome), share_up(rows.outcome)
    n = len(rows.signal)
    return {
        "ic": mean_or_none(scores),
        "p_ic": p_ic,
        "direction_accuracy": hits,
        "share_up": base,
        "skill_over_zero": skill(rows.forecast, np.zeros(n), rows.outcome),
        "skill_over_average": skill(rows.forecast, _drift(rows, horizon_bars), rows.outcome),
        "skill_over_drift": skill(rows.forecast, rows.baseline, rows.outcome),
        "hits_over_always_up": None if hits is None or base is None else hits - base,
        "calibration_slope": calibration_slope(rows.forecast, rows.outcome),
        "signal_std": float(rows.signal.std()) if n else None,
        "share_positive": float(np.mean(rows.signal > 0)) if n else None,
    }


def _drift(rows: _Rows, horizon_bars: int) -> FloatArray:
    """Return the mean outcome per symbol over what was resolved at each row, 0 at first, (n,)."""
    drift = np.zeros(len(rows.outcome))
    for own in rows.by_symbol():
        n_known = np.maximum(np.arange(len(own)) - horizon_bars + 1, 0)
        total = np.concatenate([[0.0], np.cumsum(rows.outcome[own])])[n_known]
        drift[own] = total / np.maximum(n_known, 1)
    return drift


def _return_evidence(
    strategy: FloatArray, benchmark: FloatArray, horizon_bars: int, n_trials: int, config: GateConfig
) -> dict[str, EvidenceValue]:
    active = strategy - benchmark
    p_return = block_bootstrap_p_value(
        active, horizon_bars, n_resamples=config.n_resamples, seed=config.seed + 1
    )
    whole, apart = sharpe_moments(strategy), sharpe_moments(active)
    return {
        "active_return_annual": float(active.mean()) * config.periods_per_year if len(active) else None,
        "p_return": p_return,
        "n_trials": n_trials,
        "deflated_sharpe": deflated_sharpe(whole, n_trials) if whole else None,
        "deflated_sharpe_active": deflated_sharpe(apart, n_trials) if apart else None,
        "minimum_track_record_bars": minimum_track_record_length(whole) if whole else None,
    }


def leak_alarm(evidence: Mapping[str, EvidenceValue], config: GateConfig) -> bool:
    """Tell whether the evidence is too good: see the module's docstring."""
    ic, hits, over = (evidence[name] for name in ("ic", "direction_accuracy", "hits_over_always_up"))
    too_many = hits is not None and over is not None and hits > config.implausible_hits
    return bool(
        (ic is not None and ic > config.implausible_ic)
        or (too_many and cast("float", over) > config.implausible_hits_minus_base)
    )


def _alarm_reason(evidence: Mapping[str, EvidenceValue]) -> str:
    return (
        f"LEAK ALARM: IC {_text(evidence['ic'])}, hit rate {_text(evidence['direction_accuracy'])}: prices "
        "do not give this much away; look for a feature that knows the future before believing any of it"
    )


def _missing_reasons(
    rows: _Rows, evidence: Mapping[str, EvidenceValue], config: GateConfig
) -> tuple[str, ...]:
    reasons = []
    independent = cast("float", evidence["n_independent"])
    if rows.n_sessions < config.min_sessions or independent < config.min_independent:
        reasons.append(
            f"{rows.n_sessions} out-of-sample sessions, {independent:.0f} of them independent: at least "
            f"{config.min_sessions} and {config.min_independent:.0f} are needed to tell"
        )
    unmoved = float(np.mean(rows.outcome == 0)) if len(rows.outcome) else 0.0
    if unmoved > config.max_unmoved:
        reasons.append(f"the price did not move in {unmoved:.0%} of the forecast windows: constant prices")
    return tuple(reasons)


def _edge_reasons(
    evidence: Mapping[str, EvidenceValue], config: GateConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what speaks against an edge and what speaks for it, in words."""
    p_ic, p_return, gained = (evidence[name] for name in ("p_ic", "p_return", "skill_over_drift"))
    annual = evidence["active_return_annual"]
    is_worth_it = annual is not None and annual >= config.min_active_return_annual
    checks = (
        (
            p_ic is not None and p_ic <= config.max_p_ic,
            f"IC {_text(evidence['ic'])} out of sample, p {_text(p_ic)} (at most {config.max_p_ic:.3g})"
            if p_ic is not None
            else "the signal does not vary, or varies too little to be tested",
        ),
        (
            p_return is not None and p_return <= config.max_p_return and is_worth_it,
            f"{_percent(annual)} a year over the benchmark of equal exposure (at least "
            f"{_percent(config.min_active_return_annual)}), p {_text(p_return)} "
            f"(at most {config.max_p_return:.3g})"
            if p_return is not None
            else "the positions do not differ from the benchmark of equal exposure",
        ),
        (
            gained is not None and gained > 0,
            f"share of the drift forecast's squared error that is removed: {_text(gained)} (must be above 0)",
        ),
    )
    failed = tuple(f"not met: {text}" for holds, text in checks if not holds)
    return failed, tuple(f"met: {text}" for holds, text in checks if holds)


def classic_gates(evidence: Mapping[str, EvidenceValue], config: GateConfig) -> tuple[Gate, ...]:
    """Return the classic gates, which are shown and decide nothing; an undefined value fails."""
    efficiency, hits, spread = config.min_efficiency, config.min_hits, config.min_signal_std
    low, high, endless = config.positive_low, config.positive_high, float("inf")
    limits = (
        ("walk-forward efficiency", "walk_forward_efficiency", efficiency, endless, f"> {efficiency:.0%}"),
        ("direction accuracy", "direction_accuracy", hits, endless, f"> {hits:.0%}"),
        ("signal std", "signal_std", spread, endless, f"> {spread}"),
        ("share positive", "share_positive", low, high, f"{low:.0%} to {high:.0%}"),
    )
    gates = []
    for name, key, above, below, threshold in limits:
        value = evidence[key]
        passed = value is not None and above < value < below
        gates.append(Gate(name=name, value=value, threshold=threshold, passed=passed))
    return tuple(gates)


def _percent(value: EvidenceValue) -> str:
    return "undefined" if value is None else f"{value:+.2%}"


def _text(value: EvidenceValue) -> str:
    return "undefined" if value is None else f"{value:.3g}"


def _checked(strategy: FloatArray, benchmark: FloatArray) -> tuple[FloatArray, FloatArray]:
    arrays = np.asarray(strategy, dtype=np.float64), np.asarray(benchmark, dtype=np.float64)
    if arrays[0].shape != arrays[1].shape or arrays[0].ndim != 1:
        raise DataError(f"strategy and benchmark returns have shapes {arrays[0].shape} and {arrays[1].shape}")
    if not (np.isfinite(arrays[0]).all() and np.isfinite(arrays[1]).all()):
        raise DataError("strategy or benchmark returns are not finite: pass the out-of-sample bars only")
    return arrays


def measured_deflated_sharpe(returns: FloatArray, n_tries: int) -> Measured:
    """Return the deflated Sharpe ratio, or why there is none."""
    moments = sharpe_moments(returns)
    if moments is None:
        return Measured(None, "fraction", f"needs {MIN_RETURNS} returns that vary")
    return Measured(deflated_sharpe(moments, n_tries), "fraction")


def measured_track_record(returns: FloatArray) -> Measured:
    """Return how long a record must be for its Sharpe ratio to be above zero, or why there is no length."""
    moments = sharpe_moments(returns)
    bars = None if moments is None else minimum_track_record_length(moments)
    if bars is None:
        return Measured(None, "bars", "no length is enough: the Sharpe ratio is not above zero")
    return Measured(bars, "bars")


def measured_overfitting(tried: FloatArray) -> Measured:
    """Return the probability of overfitting by choosing among the columns, (n, k), or why there is none."""
    if len(tried) < MIN_BARS:
        return Measured(None, "fraction", f"needs {MIN_BARS} returns, has {len(tried)}")
    return Measured(probability_of_backtest_overfitting(tried), "fraction")


def ranks_better_p_value(
    signal: FloatArray, rival: FloatArray, outcome: FloatArray, horizon_bars: int
) -> float | None:
    """Return the one-sided p-value of "the signal goes with the outcome no better than its rival does".

    Both are ranked among their own past, see `rank_among_past`; see `block_bootstrap_p_value` for the rest.

    Parameters
    ----------
    signal, rival, outcome
        Two signals and what came, winsorised, on the same rows in order of time, finite, (n,).
    horizon_bars
        How far an outcome overlaps with later ones.
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
