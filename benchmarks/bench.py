"""All measurements of speed and memory: `make bench`, under 10 minutes.

    python benchmarks/bench.py [--only PART ...] [--tiny]

Each part writes benchmarks/measured/PART.json as soon as it has ended, sealed, with machine, date and load; a part that
fails leaves the others, and its own last result, as they are. --tiny shows in seconds that everything runs, and writes to
benchmarks/results/, which git ignores. The page book/benchmarks.md draws what is there.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import costs
import speed
from measuring import FULL, TINY, Sizes

from srlib import checkpoints, provenance

HERE = Path(__file__).resolve().parent
PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "inner_loop": speed.inner_loops,
    "compile": speed.compiling,
    "peak": speed.against_peak,
    "log_dets": costs.log_dets,
    "scaling": costs.scaling,
    "memory": costs.memory,
    "systems": costs.systems,
    "starting": costs.starting,
}


def run(names: Iterable[str], sizes: Sizes, folder: Path) -> list[str]:
    """Measure these parts, one after the other; returns the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        load, started = speed.load(), time.monotonic()
        try:
            results = PARTS[name](sizes)
        except Exception:  # whatever it is, the other parts are to be measured
            traceback.print_exc()
            failed.append(name)
            continue
        about = {
            "date": datetime.date.today().isoformat(),
            "seconds": time.monotonic() - started,
            "load": load,
            "environment": provenance.environment(),
        }
        checkpoints.write_json(folder / f"{name}.json", about | {"results": results})
        print(f"{name}: {about['seconds']:.0f} s", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    folder = HERE / ("results/tiny" if given.tiny else "measured")
    if failed := run(given.only, TINY if given.tiny else FULL, folder):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
