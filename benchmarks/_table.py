"""What the benchmarks share: the prices that they read."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from data.data_fetcher import CsvSource, fetch_stock_data, load_panel
from data.schema import Bars
from utils.settings import PROJECT_ROOT

DIRECTORY = PROJECT_ROOT.parent / "shared" / "market"


def load_folder(directory: Path, symbols: Iterable[str], jobs: int = 2) -> dict[str, Bars]:
    """Return the bars of the symbols from their CSV files; what cannot be read ends the benchmark."""
    panel, failures = load_panel(
        list(symbols), partial(fetch_stock_data, source=CsvSource(directory)), jobs=jobs
    )
    for error in failures.values():
        raise error
    return panel
