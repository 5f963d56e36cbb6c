"""The long form of all fault tests, two programs at a time; writes the record of which the book's page on tests tells.

    python everything.py [SEED]     prints the counts; ends with 1 if anything was not survived

`kills` and `readers` are several programs each; the property-based tests of every public function run with many more examples.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import kills
import readers

from srlib import checkpoints, provenance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = ROOT / "benchmarks" / "measured" / "faults.json"
FILES = 110_000  # damaged files in all
COSTLY = {
    "config.yaml": 0.05,
    "image.png": 0.1,
    "image.jpg": 0.1,
    "train_32x32.mat": 0.1,
}  # shares; others have equal ones
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not cuda"]


class Ended(NamedTuple):
    status: int
    output: str


def shares() -> dict[str, int]:
    """Reader -> how many damaged files it gets."""
    rest = (1 - sum(COSTLY.values())) / (len(readers.READERS) - len(COSTLY))
    return {name: round(FILES * COSTLY.get(name, rest)) for name in readers.READERS}


def commands(seed: int, folder: Path) -> dict[str, list[str]]:
    """What is to be run, by a name; the longest first. Each has a folder of its own in `folder`."""

    def program(name: str, *arguments: object) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]

    places = {name: folder / name for name in ("run-all", *readers.READERS)}
    for place in places.values():
        place.mkdir()
    return {
        "run-all": program("run_all", seed, places["run-all"]),
        "properties": [*PYTEST, f"--hypothesis-seed={seed}", "--hypothesis-show-statistics", "tests/test_bad_input.py"],
        **{f"kills {system}": program("kills", seed, system) for system in kills.OWN},
        **{f"reader {n}": program("readers", n, count, seed, places[n]) for n, count in shares().items()},
        "compiler": [*PYTEST, "tests/test_inner_loop.py", "-k", "compiled"],
        "tests": [*PYTEST, "--collect-only", "tests"],
    }


def run(name: str, command: list[str]) -> Ended:
    """One program, until it ends."""
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "long"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    told = "survived" if done.returncode == 0 else "FAILED"
    print(f"{told:8}  {name}  ({time.monotonic() - started:.0f} s)", flush=True)
    return Ended(done.returncode, done.stdout)


def counts(done: dict[str, Ended]) -> dict[str, Any]:
    """What the programs say they did, by the kind of fault."""
    said = {name: ended.output for name, ended in done.items()}
    by_pytest = ("properties", "compiler", "tests")
    last = {name: json.loads(said[name].splitlines()[-1]) for name in said if name not in by_pytest}
    tests = Counter(re.findall(r"^tests/test_(\w+)\.py::", said["tests"], re.M))
    return {
        "kills": {name.removeprefix("kills "): c[name.removeprefix("kills ")] for name, c in last.items() if "kills" in name},
        "run_all": last["run-all"],
        "readers": {name.removeprefix("reader "): c for name, c in last.items() if name.startswith("reader ")},
        "properties": arguments(said["properties"]),
        "tests": dict(sorted(tests.items())),
    }  # fmt: skip


def arguments(said: str) -> dict[str, int]:
    """How many properties there are, and how many choices of arguments, by the words of Hypothesis on each."""
    properties, examples = re.findall(r"^\S+\.py::\S+:$", said, re.M), re.findall(r"- (\d+) passing", said)
    if not properties or len(examples) < len(properties):
        raise ValueError(f"Hypothesis has not told how many examples it tried:\n{said[-2000:]}")
    return {"properties": len(properties), "examples": sum(map(int, examples))}


def commit() -> str:
    """What is tested, for the record."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() if git.returncode == 0 else "unknown"


def summary(found: dict[str, Any], seconds: float) -> str:
    """The counts in a few lines."""
    kills_of, files = found["kills"].values(), found["readers"].values()
    return "\n".join([
        f"runs killed: {sum(c['moments'] for c in kills_of)} times at a chosen moment, {sum(c['random'] for c in kills_of)} at a random one",
        *(f"{fault}: {n} times" for fault, n in found["run_all"].items()),
        f"damaged files: {sum(sum(c.values()) for c in files)}, of which {sum(c.get('read', 0) for c in files)} could be read",
        f"arguments: {found['properties']['examples']} choices, {found['properties']['properties']} properties of the public functions",
        f"nothing lost, no wrong ending, in {seconds / 60:.1f} minutes",
    ])  # fmt: skip


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        work = commands(seed, Path(folder))
        done = dict(zip(work, two.map(run, work, work.values()), strict=True))
    if failed := {name: ended.output for name, ended in done.items() if ended.status}:
        print("\n".join(f"--- {name}\n{output}" for name, output in failed.items()))
        return 1
    found, seconds = counts(done), time.monotonic() - started
    record = {"results": found, "seed": seed, "date": date.today().isoformat(), "seconds": seconds, "commit": commit()}
    checkpoints.write_json(RECORD, record | {"environment": provenance.environment()})
    print(summary(found, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
