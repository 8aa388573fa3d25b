"""Fixtures that every room shares: seeded bars, and the real prices where they are at hand."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import exchange_calendars
import numpy as np
import pandas as pd
import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
MARKET_DIR = PROJECT_ROOT.parent / "shared" / "market"

MakeBars = Callable[..., pd.DataFrame]


@pytest.fixture(scope="session")
def nyse_sessions() -> pd.DatetimeIndex:
    calendar = exchange_calendars.get_calendar("XNYS", start="1990-01-01", end="2026-12-31")
    return calendar.sessions.tz_localize(None)


@pytest.fixture(scope="session")
def make_bars(nyse_sessions: pd.DatetimeIndex) -> MakeBars:
    """Return a maker of seeded OHLCV bars on NYSE sessions, with fat tails and honest ranges."""

    def make(
        n: int = 800, seed: int = 0, drift: float = 0.0003, vol: float = 0.015, start: str = "2005-01-03"
    ) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        index = nyse_sessions[nyse_sessions >= pd.Timestamp(start)][:n]
        if len(index) < n:
            raise ValueError(f"only {len(index)} sessions from {start}, asked for {n}")
        shocks = rng.standard_t(5, size=n) / np.sqrt(5 / 3)
        close = 100.0 * np.exp(np.cumsum(drift + vol * shocks))
        overnight = rng.normal(0.0, vol / 3, size=n)
        open_ = np.concatenate([[100.0], close[:-1]]) * np.exp(overnight)
        up = np.abs(rng.normal(0.0, vol / 2, size=n))
        down = np.abs(rng.normal(0.0, vol / 2, size=n))
        return pd.DataFrame(
            {
                "Open": open_,
                "High": np.maximum(open_, close) * np.exp(up),
                "Low": np.minimum(open_, close) * np.exp(-down),
                "Close": close,
                "Volume": np.round(rng.lognormal(14.0, 0.4, size=n)),
            },
            index=pd.DatetimeIndex(index, name="date"),
        )

    return make


@pytest.fixture(scope="session")
def market_dir() -> Path:
    if not MARKET_DIR.is_dir():
        pytest.skip("real market prices are not at hand (../shared/market is absent)")
    return MARKET_DIR
