"""What the benchmarks share: their flags, the prices that they read, and figures beside their limits."""

import argparse
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.data_fetcher import CsvSource, fetch_stock_data
from data.schema import Bars
from data.target_engineering import load_panel
from utils.base import PROJECT_ROOT

DIRECTORY = PROJECT_ROOT.parent / "shared" / "market"
# A figure with its limit in words, and whether it is met.
Bar = dict[str, Any]


def parser_of(doc: str | None, *, reads_prices: bool = False) -> argparse.ArgumentParser:
    """Return a parser named by the first line of a benchmark; a missing folder of prices exits with 2."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    if reads_prices:
        # As text, so that it is checked like one that was given.
        parser.add_argument("--directory", type=_folder, default=str(DIRECTORY), help="folder of CSV files")
    return parser


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"no folder {text}: name one of CSV files in Yahoo's columns")
    return Path(text)


def symbols_in(directory: Path, without: Iterable[str] = ("VIX",)) -> list[str]:
    """Return the symbols of a folder; an index of volatility is no asset."""
    return sorted(path.stem for path in directory.glob("*.csv") if path.stem not in set(without))


def load_folder(directory: Path, symbols: Iterable[str], jobs: int = 2) -> dict[str, Bars]:
    """Return the bars of the symbols from their CSV files; what cannot be read ends the benchmark."""
    read = partial(fetch_stock_data, source=CsvSource(directory))
    panel, failures = load_panel(list(symbols), read, jobs=jobs)
    for error in failures.values():
        raise error
    return panel


def at_most(value: float, limit: float) -> Bar:
    """Return a figure that must not pass its limit."""
    return {"value": round(value, 4), "limit": f"at most {limit:g}", "ok": bool(value <= limit)}


def at_least(value: float, limit: float) -> Bar:
    """Return a figure that must reach its limit."""
    return {"value": round(value, 4), "limit": f"at least {limit:g}", "ok": bool(value >= limit)}


def within(value: float, limits: tuple[float, float]) -> Bar:
    """Return a figure that must lie between two limits, both included."""
    low, high = limits
    return {"value": round(value, 4), "limit": f"{low:g} to {high:g}", "ok": bool(low <= value <= high)}


def seen(value: float) -> Bar:
    """Return a figure that has no limit."""
    return {"value": round(value, 4), "limit": "", "ok": True}


def print_bar(name: str, bar: Bar) -> None:
    """Print one figure beside its limit."""
    met = "" if not bar["limit"] else "ok" if bar["ok"] else "MISSED"
    print(f"{name:<38}{bar['value']:10.4f}  {bar['limit']:<16}{met}", flush=True)


def show(result: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> int:
    """Print ``milliseconds``, ``bars`` and ``notes``; return the exit code."""
    for name, value in result.get("milliseconds", {}).items():
        print(f"{name:<38}{value:10.4f} ms")
    for name, bar in result["bars"].items():
        print_bar(name, bar)
    for name, note in result["notes"].items():
        print(f"{name}: {note}")
    return finish(result, result["bars"].values(), as_json=as_json)


def finish(found: object, bars: Iterable[Bar], *, as_json: bool) -> int:
    """Print what was found as JSON where that is wanted; return 1 when a limit was missed, else 0."""
    if as_json:
        print(json.dumps(found))
    return 0 if all(bar["ok"] for bar in bars) else 1
