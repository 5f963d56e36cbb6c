"""All measurements of speed and memory: `make bench`, under 10 minutes.

    python benchmarks/bench.py [--only PART ...] [--rounds N] [--tiny]

Each part writes benchmarks/measured/PART.json as soon as it has ended, sealed, with date, machine and what else it did; a part that
fails leaves the others, and its own last result, as they are. --rounds makes the contests of inner_loop and compile longer, for a noisy machine
(their intervals take the rounds for independent, which they are not where the machine is slow for minutes). --tiny shows in seconds that everything runs, and writes to
benchmarks/results/, which git ignores. The page book/benchmarks.md draws what is there.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import costs
import measuring
import speed
from measuring import FULL, TINY, Sizes

HERE = Path(__file__).resolve().parent
PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "inner_loop": speed.inner_loops,
    "compile": speed.compiling,
    "peak": speed.against_peak,
    "log_dets": costs.log_dets,
    "scaling": costs.scaling,
    "data_parallel": costs.data_parallel,
    "memory": costs.memory,
    "systems": costs.systems,
    "starting": costs.starting,
}


def run(names: Iterable[str], sizes: Sizes, folder: Path) -> list[str]:
    """Measure these parts, one after the other; returns the names of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        try:
            seconds = measuring.record(folder / f"{name}.json", lambda name=name: PARTS[name](sizes))
            print(f"{name}: {seconds:.0f} s", flush=True)
        except Exception:  # whatever it is, the other parts are to be measured
            traceback.print_exc()
            failed.append(name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, metavar="N", help=f"of the contests, {FULL.contest_rounds}")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    folder = HERE / ("results/tiny" if given.tiny else "measured")
    if given.rounds is not None and (given.rounds < 6 or given.tiny):
        parser.error(f"--rounds {given.rounds}: an interval takes at least 6, and --tiny has its own")
    rounds = given.rounds or FULL.contest_rounds
    budget = FULL.contest_budget * rounds / FULL.contest_rounds
    full = replace(FULL, contest_rounds=rounds, contest_budget=budget)
    if failed := run(given.only, TINY if given.tiny else full, folder):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
