"""Replay history bar by bar, as it would have been lived: the slow oracle of the vectorised backtest.

At bar t the simulator holds bars to t only and asks for one weight: nobody can peek at what it does not hold.
It keeps its own books, one `book_bar` at a time, and looks at a return only when its bar has closed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evaluation.accounting import DEFAULT_CAPITAL, Booking, CostModel, Ledger, book_bar
from utils.errors import DataError, InsufficientDataError

_COSTS = ("trade_cost", "financing_cost", "borrow_cost")

Decide = Callable[[pd.DataFrame], float]
"""Takes bars up to and including the last closed one, returns the target weight decided at that close."""

Refit = Callable[[pd.DataFrame], Decide]
"""Takes bars up to and including the last closed one, returns the decision rule learnt from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSimulator:
    """Lives through the last bars of a history.

    Attributes
    ----------
    costs
        What trading and holding cost.
    initial_capital
        Money at the start.
    """

    costs: CostModel
    initial_capital: float = DEFAULT_CAPITAL

    def run(
        self,
        bars: pd.DataFrame,
        decide: Decide,
        *,
        days: int | None = None,
        refit: Refit | None = None,
        refit_every_bars: int | None = None,
    ) -> pd.DataFrame:
        """Reveal one bar after the other.

        Parameters
        ----------
        bars
            Ascending sessions with a ``Close`` column; handed on as they are, cut at the present.
        decide
            Asked at every close, with the bars up to it.
        days
            Number of bars to live through after the first decision; None for all of them.
        refit, refit_every_bars
            Learn the decision rule anew every so many bars, from the bars known then; both or neither.

        Returns
        -------
        DataFrame
            Indexed like the bars lived through, with ``close``, ``target_weight`` (decided at this close),
            ``held_weight`` (earned in this bar), ``equity``, ``net_return``, ``trade_cost``,
            ``financing_cost``, ``borrow_cost``.

        Raises
        ------
        InsufficientDataError
            When there are fewer than 2 bars, or fewer than ``days`` after the first.
        DataError
            When a decision is not a finite number, or only one of the refit arguments is given.
        """
        start = _first_row(len(bars), days)
        if (refit is None) != (refit_every_bars is None) or (
            refit_every_bars is not None and refit_every_bars < 1
        ):
            raise DataError(f"refitting needs a function and an interval above 0, got {refit_every_bars!r}")
        rates, rows = self.costs.rates(), []
        cash, position, target, last_close = self.initial_capital, 0.0, 0.0, np.nan
        for t in range(start, len(bars)):
            known = bars.iloc[: t + 1]
            close = float(known["Close"].iloc[-1])
            before = cash + position
            # Nothing is held into the first bar: it only gives the first decision its close.
            own = close / last_close - 1.0 if t > start else 0.0
            booked = book_bar(cash, position, target, own, rates)
            cash, position, last_close = booked.cash, booked.position, close
            if refit is not None and refit_every_bars and t > start and (t - start) % refit_every_bars == 0:
                decide = refit(known)
            target = float(decide(known))
            if not np.isfinite(target):
                raise DataError(f"the decision of {bars.index[t]} is {target}; must be a finite weight")
            rows.append(_lived(booked, before, close=close, target_weight=target))
        return pd.DataFrame(rows, index=bars.index[start:])


def largest_gap(lived: pd.DataFrame, ledger: Ledger) -> float:
    """Return how far a life as lived is from books of the same bars: the largest difference of any entry.

    Money is measured in initial capitals or, where more, in what the books say.
    """
    gap = 0.0
    for name in ("held_weight", "equity", "net_return", *_COSTS):
        told = np.asarray(getattr(ledger, name), dtype=np.float64)
        unit = ledger.initial_capital if name in {"equity", *_COSTS} else 1.0
        apart = np.abs(np.asarray(lived[name], dtype=np.float64) - told) / np.maximum(np.abs(told), unit)
        gap = max(gap, float(apart.max()))
    return gap


def _lived(booked: Booking, before: float, *, close: float, target_weight: float) -> dict[str, float]:
    """Return the row of a bar that began with equity ``before``."""
    equity = booked.cash + booked.position
    return {
        "close": close,
        "target_weight": target_weight,
        "held_weight": booked.held,
        "equity": equity,
        "net_return": (equity - before) / before if before > 0.0 else 0.0,
        "trade_cost": booked.commission + booked.slippage,
        "financing_cost": booked.financing,
        "borrow_cost": booked.borrow,
    }


def _first_row(n_bars: int, days: int | None) -> int:
    """Return the row of the first decision."""
    wanted = n_bars - 1 if days is None else days
    if wanted < 1 or n_bars < wanted + 1:
        need = max(wanted, 1) + 1
        raise InsufficientDataError(f"living through {wanted} bars needs {need} of them, has {n_bars}")
    return n_bars - wanted - 1
