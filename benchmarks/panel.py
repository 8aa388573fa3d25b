"""Time and memory of loading the series of a folder and building one panel of them.

::

    python benchmarks/panel.py [--quick] [--json] [--directory DIR]

One series goes first, so that imports, calendars and compiled kernels, which a process pays once, are told
apart in the notes. Memory is that of the whole process at its peak.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _table import at_most, load_folder, parser_of, show, symbols_in

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
    symbols = symbols_in(directory)
    once = one_pass(directory, symbols[:1])
    passes = [one_pass(directory, symbols) for _ in range(1 if quick else 3)]
    load_s, build_s, rows = min(passes, key=lambda one: one[0] + one[1])
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return {
        "bars": {
            "panel_s": at_most(load_s + build_s, LIMIT_S),
            "panel_peak_gib": at_most(peak_gib, LIMIT_GIB),
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(__doc__, reads_prices=True)
    parser.add_argument("--quick", action="store_true", help="one pass only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times; exit 1 when a limit is missed."""
    arguments = build_parser().parse_args(argv)
    return show(measure(arguments.directory, quick=arguments.quick), as_json=arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
