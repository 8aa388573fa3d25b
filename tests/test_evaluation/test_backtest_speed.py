"""The sweep that is timed does what the sizers do one by one; a sweep that does not is refused."""

import numpy as np
import pytest

from benchmarks import backtest as bench
from inference.position_sizing import RuleSizer, SizingInputs


@pytest.fixture(scope="module")
def inputs() -> SizingInputs:
    return bench.inputs_of(bench.closes()[-900:])


def test_the_sweep_is_the_sizers_own_fold(inputs: SizingInputs) -> None:
    bench.assert_same_sweep(bench.parameter_sets(4), inputs)


def test_the_plain_loop_books_the_same(inputs: SizingInputs) -> None:
    sizer, out = bench.make_sizer("half-kelly"), (np.empty(900), np.empty(900))
    columns = (inputs.expected_return, inputs.sigma, inputs.p_win, inputs.payoff_ratio)
    bench.plain_loop(columns, inputs.asset_return_simple, out)
    bench.assert_same_books(sizer, inputs, out)
    out[1][-1] *= 1.001
    with pytest.raises(AssertionError):
        bench.assert_same_books(sizer, inputs, out)


def test_a_sweep_of_other_sets_is_refused(inputs: SizingInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.sweep

    def other(sizers: list[RuleSizer], rows: SizingInputs) -> tuple[np.ndarray, np.ndarray]:
        meeker = [RuleSizer(name="meek", rules=s.rules._replace(kelly_fraction=0.1)) for s in sizers]
        return honest(meeker, rows)

    monkeypatch.setattr(bench, "sweep", other)
    with pytest.raises(AssertionError):
        bench.assert_same_sweep(bench.parameter_sets(2), inputs)
