"""Sizers see the past only, keep their limits, follow the accountant's equity, and find the way back in."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.accounting import CostModel, account
from inference.position_sizing import (
    DEFAULT_SIZING,
    PRESETS,
    RuleSizer,
    SizingInputs,
    SizingRules,
    make_sizer,
)
from utils.base import DataError, UsageError

COSTS = CostModel()
FREE = CostModel(commission_bps=0.0, slippage_bps=0.0, financing_annual=0.0, borrow_annual=0.0)
# `calibrated` without its limit, so that its rule shows on both sides.
UNBOUND = make_sizer("calibrated", max_long=9.0)
Fold = Callable[[SizingInputs, CostModel], np.ndarray]


def some_inputs(n: int = 600, seed: int = 0, *, vol: float = 0.02, warm_up: int = 30) -> SizingInputs:
    rng = np.random.default_rng(seed)
    returns = rng.standard_t(4, n) * vol / np.sqrt(2.0)
    returns[0] = np.nan
    expected = rng.normal(0.002, 0.006, n)
    expected[:warm_up] = np.nan
    expected[rng.random(n) < 0.02] = np.nan
    return SizingInputs(
        expected_return=expected,
        baseline_return=np.full(n, 0.002),
        sigma=vol * np.sqrt(5.0) * rng.uniform(0.6, 1.6, n),
        p_win=rng.uniform(0.48, 0.6, n),
        payoff_ratio=rng.uniform(0.9, 1.2, n),
        skill_lower=rng.uniform(-0.2, 0.8, n),
        asset_return_simple=np.clip(returns, -0.4, 0.4),
        horizon_bars=5,
    )


def steady(n: int = 400, *, move: float = 0.0, **changes: float) -> SizingInputs:
    """Return inputs that say the same on every bar."""
    said = {
        "expected_return": 0.01,
        "baseline_return": 0.002,
        "sigma": 0.05,
        "p_win": 0.56,
        "payoff_ratio": 1.1,
        "skill_lower": 0.5,
    } | changes
    columns = {name: np.full(n, value) for name, value in said.items()}
    return SizingInputs(**columns, asset_return_simple=np.full(n, move), horizon_bars=5)


def cut(inputs: SizingInputs, n: int) -> SizingInputs:
    columns = {f.name: getattr(inputs, f.name)[:n] for f in fields(inputs) if f.name != "horizon_bars"}
    return SizingInputs(**columns, horizon_bars=inputs.horizon_bars)


def depends_on_the_future(fold: Fold, inputs: SizingInputs) -> bool:
    whole = fold(inputs, COSTS)
    n = len(whole)
    return any(
        not np.array_equal(fold(cut(inputs, k), COSTS), whole[:k]) for k in (1, 2, n // 3, n // 2, n - 1)
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", range(3))
def test_fold_is_prefix_invariant(name: str, seed: int) -> None:
    assert not depends_on_the_future(make_sizer(name).fold, some_inputs(seed=seed))


def test_the_prefix_test_catches_a_peeker() -> None:
    def peeks(inputs: SizingInputs, costs: CostModel) -> np.ndarray:
        known = inputs.expected_return - np.nan_to_num(inputs.expected_return).mean()
        return make_sizer("half-kelly").fold(replace(inputs, expected_return=known), costs)

    def fills_back(inputs: SizingInputs, costs: CostModel) -> np.ndarray:
        tomorrow = np.append(inputs.asset_return_simple[1:], 0.0)
        return make_sizer("half-kelly").fold(replace(inputs, expected_return=tomorrow), costs)

    assert depends_on_the_future(peeks, some_inputs())
    assert depends_on_the_future(fills_back, some_inputs())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("costs", [COSTS, FREE, CostModel(minimum_commission=5.0)])
def test_breaker_follows_the_equity_that_is_booked(name: str, costs: CostModel) -> None:
    inputs = some_inputs(2000, vol=0.03)
    trace = make_sizer(name).trace(inputs, costs)
    ledger = account(trace.target_weight, inputs.asset_return_simple, costs)
    for field in fields(ledger):
        np.testing.assert_array_equal(getattr(trace.ledger, field.name), getattr(ledger, field.name))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    seed=st.integers(0, 10_000),
    vol=st.floats(0.001, 0.08),
    max_long=st.none() | st.floats(0.0, 3.0),
    max_short=st.none() | st.floats(0.0, 1.0),
)
def test_targets_are_finite_and_within_limits(
    name: str, seed: int, vol: float, max_long: float | None, max_short: float | None
) -> None:
    sizer = make_sizer(name, max_long=max_long, max_short=max_short)
    target = sizer.fold(some_inputs(200, seed, vol=vol), COSTS)
    assert np.isfinite(target).all()
    assert target.max() <= sizer.rules.max_long
    assert target.min() >= -sizer.rules.max_short


def test_limits_of_the_presets() -> None:
    limits = {name: (rules.max_long, rules.max_short) for name, rules in PRESETS.items()}
    assert limits == {
        "half-kelly": (1.0, 0.3),
        "long-biased": (1.8, 0.1),
        "calibrated": (1.0, 0.0),
        "passive": (1.0, 0.0),
    }
    assert DEFAULT_SIZING == make_sizer().name == "calibrated"


def test_half_kelly_by_hand() -> None:
    share_at_risk = (0.56 * 1.1 - 0.44) / 1.1 / 2.0
    conviction = min(0.002 / 0.2 * np.sqrt(252 / 5), 1.0)
    target = make_sizer("half-kelly").fold(steady(3, expected_return=0.002, sigma=0.2), FREE)
    np.testing.assert_allclose(target, share_at_risk / 0.2 * conviction)
    short = make_sizer("half-kelly").fold(steady(3, expected_return=-0.002, sigma=0.2), FREE)
    np.testing.assert_allclose(short, -share_at_risk / 0.2 * conviction)


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({"expected_return": 0.03, "sigma": 0.02}, 1.0),
        ({"expected_return": -0.03, "sigma": 0.02}, -0.3),
        ({"expected_return": 0.001}, 0.0),
        ({"expected_return": -0.0009}, 0.0),
        ({"p_win": 0.4}, 0.0),
        ({"p_win": np.nan}, 0.0),
        ({"sigma": np.nan}, 0.0),
    ],
)
def test_half_kelly_at_its_limits(changes: dict[str, float], weight: float) -> None:
    np.testing.assert_array_equal(make_sizer("half-kelly").fold(steady(5, **changes), FREE), weight)


@pytest.mark.parametrize(
    ("expected", "low", "high"), [(0.01, 1.3, 1.8), (0.0005, 1.3, 1.3), (-0.01, -0.1, 0.1)]
)
def test_long_biased_leans_long_and_steps_aside(expected: float, low: float, high: float) -> None:
    target = make_sizer("long-biased").fold(steady(5, expected_return=expected), FREE)
    assert low <= target[0] <= high


def test_calibrated_by_hand() -> None:
    inputs = steady(5, expected_return=0.001, skill_lower=0.25)
    target = make_sizer("calibrated").fold(inputs, FREE)
    np.testing.assert_allclose(target, 1.0 + 3.0 * 0.25 * (0.001 - 0.002) / 0.05**2)


def test_a_promise_counts_only_as_far_as_it_exceeds_one_and_a_half_one_way_costs() -> None:
    sizer = replace(UNBOUND, rules=UNBOUND.rules._replace(no_trade_band_scale=0.0))

    def weight(promise: float) -> float:
        return float(sizer.fold(steady(2, expected_return=0.002 + promise, skill_lower=0.25), COSTS)[0])

    hurdle = 1.5 * COSTS.one_way_rate
    assert weight(hurdle) == weight(-hurdle) == 1.0
    reach = 3.0 * 0.25 / 0.05**2
    assert weight(hurdle + 2e-4) == pytest.approx(1.0 + reach * 2e-4)
    assert weight(-hurdle - 2e-4) == pytest.approx(1.0 - reach * 2e-4)


@pytest.mark.parametrize("skill", [0.0, -0.5, np.nan])
def test_without_skill_calibrated_is_passive_to_the_bit(skill: float) -> None:
    inputs = replace(some_inputs(1500, vol=0.04), skill_lower=np.full(1500, skill))
    for name in ("calibrated", "passive"):
        np.testing.assert_array_equal(make_sizer(name).fold(inputs, COSTS), 1.0)


def test_calibrated_returns_to_passive_when_skill_is_gone() -> None:
    skill = np.concatenate([np.full(300, 0.6), np.zeros(300)])
    target = make_sizer("calibrated").fold(replace(some_inputs(600), skill_lower=skill), COSTS)
    assert np.ptp(target[:300]) > 0.1
    np.testing.assert_array_equal(target[300:], 1.0)


def test_passive_is_always_one() -> None:
    np.testing.assert_array_equal(make_sizer("passive").fold(some_inputs(seed=4), COSTS), 1.0)


def test_bars_without_forecast() -> None:
    inputs = steady(10)
    inputs.expected_return[:3] = np.nan
    inputs.expected_return[6:] = np.nan
    bearish = replace(inputs, baseline_return=inputs.expected_return + 0.01)
    half = make_sizer("half-kelly").fold(inputs, FREE)
    np.testing.assert_array_equal(half[:3], 0.0)
    assert half[3] > 0.0
    np.testing.assert_array_equal(half[3:], half[3])
    calibrated = make_sizer("calibrated").fold(bearish, FREE)
    np.testing.assert_array_equal(calibrated[[0, 1, 2, 6, 7, 8, 9]], 1.0)
    assert calibrated[4] < 1.0
    no_baseline = make_sizer("calibrated").fold(steady(4, baseline_return=np.nan), FREE)
    np.testing.assert_array_equal(no_baseline, 1.0)


def test_no_trade_band_grows_with_costs_and_saves_turnover() -> None:
    inputs = replace(some_inputs(2000), skill_lower=np.full(2000, 0.1))
    sizer = replace(UNBOUND, rules=UNBOUND.rules._replace(cost_hurdle=0.0, kelly_fraction=0.5))
    eager = replace(sizer, rules=sizer.rules._replace(no_trade_band_scale=0.0))

    def turnover(one: RuleSizer, costs: CostModel) -> float:
        return float(account(one.fold(inputs, costs), inputs.asset_return_simple, costs).turnover.sum())

    assert turnover(sizer, COSTS) < 0.8 * turnover(eager, COSTS)
    assert turnover(sizer, replace(COSTS, slippage_bps=30.0)) < turnover(sizer, COSTS)
    np.testing.assert_array_equal(sizer.fold(inputs, FREE), eager.fold(inputs, FREE))


def test_inside_the_band_nothing_is_traded() -> None:
    inputs = steady(60, move=0.001, expected_return=0.003, skill_lower=0.25)
    inputs.expected_return[:10] = np.nan
    inputs.expected_return[20:] += 0.0002
    target = UNBOUND.fold(inputs, COSTS)
    assert np.flatnonzero(account(target, inputs.asset_return_simple, COSTS).turnover).tolist() == [1]


def test_past_the_band_the_position_moves_to_its_edge() -> None:
    inputs = steady(3, expected_return=0.012, skill_lower=0.25)
    inputs.expected_return[0] = np.nan
    target = UNBOUND.fold(inputs, COSTS)
    counted = 0.01 - 1.5 * COSTS.one_way_rate
    assert target[1] == pytest.approx(1.0 + 3.0 * 0.25 * counted / 0.05**2 - np.cbrt(8e-4))


def test_volatility_target_scales_within_bounds() -> None:
    passive = make_sizer("passive")
    rules = passive.rules._replace(volatility_target_annual=0.15, max_long=2.0)
    targeted = replace(passive, rules=rules)

    def weight(annual: float) -> float:
        return float(targeted.fold(steady(2, sigma=annual * np.sqrt(5 / 252)), FREE)[0])

    assert weight(0.15) == pytest.approx(1.0)
    assert weight(0.12) == pytest.approx(1.25)
    assert weight(0.05) == pytest.approx(1.5)
    assert weight(0.90) == pytest.approx(0.5)


def crash(n_after: int, recovery: float) -> SizingInputs:
    """Return a long half-Kelly's nightmare: 30 % down in ten bars, then ``recovery`` a bar."""
    returns = np.concatenate([np.zeros(20), np.full(10, -0.035), np.full(n_after, recovery)])
    said = steady(len(returns), expected_return=0.03, sigma=0.02)
    return replace(said, asset_return_simple=returns)


def test_breaker_caps_after_a_fall_of_15_percent() -> None:
    trace = make_sizer("half-kelly").trace(crash(50, -0.001), FREE)
    first = int(np.argmax(trace.capped))
    before, there = trace.ledger.equity[first - 1] / 10_000.0, trace.ledger.equity[first] / 10_000.0
    assert there < 0.85 <= before
    np.testing.assert_array_equal(trace.target_weight[:first], 1.0)
    np.testing.assert_array_equal(trace.target_weight[trace.capped], 0.25)


def test_breaker_lets_back_in_when_the_market_made_half_of_the_trigger_good() -> None:
    trace = make_sizer("half-kelly").trace(crash(100, 0.005), FREE)
    last = int(np.flatnonzero(trace.capped)[-1])
    rise = trace.ledger.equity[last + 1] / trace.ledger.equity[trace.capped].min() - 1.0
    assert 0.15 / 2 * 0.25 <= rise < 0.15 / 2 * 0.25 + 0.002
    assert last < 30 + 20
    np.testing.assert_array_equal(trace.target_weight[last + 1 :], 1.0)


@pytest.mark.parametrize("recovery", [0.0, -0.0005])
def test_breaker_never_locks_out_forever(recovery: float) -> None:
    sizer = make_sizer("half-kelly")
    trace = sizer.trace(crash(400, recovery), FREE)
    capped = np.flatnonzero(trace.capped)
    assert trace.target_weight[capped[0] + int(sizer.rules.breaker_patience_bars)] == 1.0


def test_breaker_trips_again_from_where_it_released() -> None:
    again = np.concatenate([np.full(40, 0.005), np.full(10, -0.035), np.zeros(5)])
    inputs = crash(len(again), 0.0)
    inputs.asset_return_simple[30:] = again
    capped = make_sizer("half-kelly").trace(inputs, FREE).capped
    assert int((np.diff(capped.astype(int)) == 1).sum()) == 2


def test_breaker_of_calibrated_stops_a_model_that_loses_and_not_a_market_that_falls() -> None:
    wrong = steady(400, move=0.004, expected_return=-0.02, skill_lower=1.0)
    trace = make_sizer("calibrated").trace(wrong, COSTS)
    assert trace.capped.any()
    np.testing.assert_allclose(trace.target_weight[trace.capped], 0.9)
    right = steady(400, move=-0.004, expected_return=-0.02, skill_lower=1.0)
    assert not make_sizer("calibrated").trace(right, COSTS).capped.any()


def test_lost_capital_ends_all_trading() -> None:
    rules = SizingRules(uses_odds=False, neutral=2.0, max_long=2.0)
    inputs = steady(6, skill_lower=0.0)
    inputs.asset_return_simple[2] = -0.9
    target = RuleSizer(name="reckless", rules=rules).fold(inputs, FREE)
    np.testing.assert_array_equal(target[2:], 0.0)


def test_config_id_follows_content() -> None:
    ids = {make_sizer(name).config_id for name in PRESETS}
    assert len(ids) == len(PRESETS)
    assert make_sizer("calibrated").config_id == make_sizer("calibrated").config_id
    assert make_sizer("calibrated", max_long=2).config_id == make_sizer("calibrated", max_long=2.0).config_id
    assert make_sizer("calibrated", max_long=2.0).config_id != make_sizer("calibrated").config_id


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="half-kelly, long-biased, calibrated, passive"):
        make_sizer("martingale")


@pytest.mark.parametrize("limit", [-0.1, np.nan, np.inf])
def test_impossible_limits_are_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="max_long"):
        make_sizer("passive", max_long=limit)
    with pytest.raises(UsageError, match="max_short"):
        make_sizer("passive", max_short=limit)


@pytest.mark.parametrize("changes", [{"breaker_drawdown": 0.0}, {"breaker_cap": 0.0}])
def test_a_breaker_without_way_back_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="way back"):
        RuleSizer(name="stuck", rules=PRESETS["half-kelly"]._replace(**changes))


def test_unusable_inputs_are_refused() -> None:
    sizer, inputs = make_sizer(), steady(5)
    with pytest.raises(DataError, match="sigma has shape"):
        sizer.fold(replace(inputs, sigma=np.ones(4)), FREE)
    for name in ("expected_return", "baseline_return", "sigma", "p_win", "payoff_ratio", "skill_lower"):
        column = getattr(inputs, name).copy()
        column[3] = np.inf
        with pytest.raises(DataError, match=f"row 3 cannot be used.*{name}.: inf"):
            sizer.fold(replace(inputs, **{name: column}), FREE)
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(DataError, match="row 1 cannot be used"):
            sizer.fold(replace(inputs, asset_return_simple=np.full(5, bad)), FREE)
    with pytest.raises(UsageError, match="horizon_bars"):
        sizer.fold(replace(inputs, horizon_bars=0), FREE)
