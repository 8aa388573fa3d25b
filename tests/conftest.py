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


@pytest.fixture(scope="session")
def make_planted(make_bars: MakeBars) -> MakeBars:
    """Return a maker of bars whose volume of today says something about the return of tomorrow.

    ``ic`` is the correlation of the planted signal with the next day's return; 0 plants nothing.
    """

    def make(
        n: int = 2_000, seed: int = 0, ic: float = 0.3, drift: float = 0.0003, vol: float = 0.012
    ) -> pd.DataFrame:
        bars = make_bars(n=n, seed=seed, drift=drift, vol=vol * np.sqrt(1.0 - ic**2), start="1995-01-03")
        rng = np.random.default_rng([seed, 1])
        signal = np.zeros(n)
        for t in range(1, n):
            signal[t] = 0.8 * signal[t - 1] + 0.6 * rng.normal()
        lifted = np.exp(np.cumsum(vol * ic * np.concatenate([[0.0], signal[:-1]])))
        prices = {name: bars[name] * lifted for name in ("Open", "High", "Low", "Close")}
        volume = np.round(np.exp(14.0 + 0.5 * signal + 0.1 * rng.normal(size=n)))
        return bars.assign(**prices, Volume=volume)

    return make


@pytest.fixture(scope="session")
def csv_dir(tmp_path_factory: pytest.TempPathFactory, make_planted: MakeBars) -> Path:
    """A folder in Yahoo's columns: NOISE, a random walk, and SIGNAL, with a planted edge."""
    folder = tmp_path_factory.mktemp("prices")
    for name, ic in (("NOISE", 0.0), ("SIGNAL", 0.3)):
        bars = make_planted(seed=3, ic=ic)
        bars.assign(**{"Adj Close": bars["Close"]}).to_csv(folder / f"{name}.csv", index_label="Date")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    csv_dir: Path,
) -> Path:
    """A folder of saved models with SIGNAL and NOISE, trained for one day ahead by the real command line."""
    from training.train_gbm import main

    models = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AI_STOCKS_MODELS_DIR", str(models))
        patch.setenv("AI_STOCKS_LOGS_DIR", str(models / "logs"))
        patch.setenv("AI_STOCKS_CACHE_DIR", str(models / "cache"))
        patch.setenv("AI_STOCKS_SOURCE", f"csv:{csv_dir}")
        assert main(["SIGNAL", "NOISE", "--target-horizon", "1", "--n-trials", "4", "--json"]) == 0
    return models
