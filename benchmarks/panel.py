"""Time and memory of loading the series of a folder and building one panel of them.

::

    python benchmarks/panel.py [--quick] [--json] [--directory DIR]

One series goes first, so that imports, calendars and compiled kernels, which a process pays once, are told
apart in the notes. Memory is that of the whole process at its peak.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _table import DIRECTORY, load_folder

from data.target_engineering import build_dataset

LIMIT_S = 4.0
LIMIT_GIB = 1.5
JOBS = 2


def one_pass(directory: Path, symbols: Sequence[str]) -> tuple[float, float, int]:
    """Return seconds of loading, seconds of building, and rows of the panel."""
    start = time.perf_counter()
    panel = load_folder(directory, symbols, jobs=JOBS)
    loaded = time.perf_counter()
    dataset = build_dataset({symbol: bars.frame for symbol, bars in panel.items()})
    return loaded - start, time.perf_counter() - loaded, len(dataset.date)


def measure(directory: Path, *, quick: bool) -> dict[str, Any]:
    """Take the times and compare them with their limits."""
    # An index of volatility is no asset: 45 of the 46 series make the panel.
    symbols = sorted(path.stem for path in directory.glob("*.csv") if path.stem != "VIX")
    once = one_pass(directory, symbols[:1])
    passes = [one_pass(directory, symbols) for _ in range(1 if quick else 3)]
    load_s, build_s, rows = min(passes, key=lambda one: one[0] + one[1])
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return {
        "bars": {
            "panel_s": _bar(load_s + build_s, LIMIT_S),
            "panel_peak_gib": _bar(peak_gib, LIMIT_GIB),
        },
        "notes": {
            "series": len(symbols),
            "rows": rows,
            "load_s": load_s,
            "build_s": build_s,
            "once_per_process_s": once[0] + once[1],
            "jobs": JOBS,
        },
    }


def _bar(value: float, limit: float) -> dict[str, Any]:
    return {"value": round(value, 4), "limit": limit, "ok": value <= limit}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--quick", action="store_true", help="one pass only")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="folder of CSV files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; exit 1 when a limit is missed."""
    arguments = build_parser().parse_args(argv)
    if not arguments.directory.is_dir():
        print(f"skipped: there is no folder {arguments.directory.name} of prices")
        if arguments.json:
            print(json.dumps({"bars": {}, "notes": {"skipped": "no prices at hand"}}))
        return 0
    result = measure(arguments.directory, quick=arguments.quick)
    for name, bar in result["bars"].items():
        print(f"{name:<20}{bar['value']:8.3f}  limit {bar['limit']:g}  {'ok' if bar['ok'] else 'MISSED'}")
    for name, note in result["notes"].items():
        print(f"{name}: {note}")
    if arguments.json:
        print(json.dumps(result))
    return 0 if all(bar["ok"] for bar in result["bars"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
