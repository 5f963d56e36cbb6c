"""The long form of all fault tests, two programs at a time: counts what was survived and writes counted.json, which the book draws.

    python everything.py [SEED]     ends with 1 at the first thing that was not survived

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kills
import readers

from srlib import checkpoints, provenance

HERE = Path(__file__).parent
COUNTED = HERE / "counted.json"
FILES = 110_000  # damaged files in all
COSTLY = {
    "config.yaml": 0.05,
    "image.png": 0.1,
    "image.jpg": 0.1,
    "train_32x32.mat": 0.1,
}  # their share; the others have equal ones
LONG_PROPERTIES = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--hypothesis-show-statistics", "tests/test_bad_input.py", "-m", "not cuda"]  # fmt: skip


def shares() -> dict[str, int]:
    """Reader -> how many damaged files it gets."""
    rest = (1 - sum(COSTLY.values())) / (len(readers.READERS) - len(COSTLY))
    return {name: round(FILES * COSTLY.get(name, rest)) for name in readers.READERS}


def commands(seed: int, folder: Path) -> dict[str, list[str]]:
    """What is to be run, by a name; the longest first."""
    program = {name: [sys.executable, str(HERE / f"{name}.py")] for name in ("run_all", "kills", "readers")}
    found = {"run-all": [*program["run_all"], str(seed), str(folder / "run-all")], "properties": LONG_PROPERTIES}
    found |= {f"kills {system}": [*program["kills"], str(seed), system] for system in kills.OWN}
    for name, count in shares().items():
        place = folder / name
        place.mkdir()
        found[f"reader {name}"] = [*program["readers"], name, str(count), str(seed), str(place)]
    (folder / "run-all").mkdir()
    return found


def ended(name: str, command: list[str]) -> tuple[int, str, float]:
    """Exit status, output and seconds of one program."""
    started = time.monotonic()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
        "HYPOTHESIS_PROFILE": "long",
    }
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    print(f"{'survived' if done.returncode == 0 else 'FAILED':8}  {name}  ({seconds:.0f} s)", flush=True)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr, seconds


def counted(name: str, output: str) -> Any:
    """What a program that survived says it did."""
    if name == "properties":
        examples = re.findall(r"(\d+) passing examples", output)
        return {"examples": sum(map(int, examples)), "properties": int(re.findall(r"(\d+) passed", output)[0])}
    return json.loads(output.splitlines()[-1])


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        work = commands(seed, Path(folder))
        done = dict(zip(work, two.map(ended, work, work.values())))
    if failed := {name: output for name, (status, output, _) in done.items() if status}:
        for name, output in failed.items():
            print(f"--- {name}\n{output}")
        return 1
    result = {
        "seed": seed,
        "counts": {name: counted(name, output) for name, (_, output, _) in done.items()},
        "seconds": time.monotonic() - started,
        "machine": provenance.environment(),
    }
    checkpoints.write_json(COUNTED, result)
    print(summary(result))
    return 0


def summary(result: dict[str, Any]) -> str:
    """The counts in a few lines."""
    counts = result["counts"]
    killed = {
        kind: sum(c[kind] for name, c in counts.items() if name.startswith("kills")) for kind in ("moments", "random")
    }
    files = {
        kind: sum(c.get(kind, 0) for name, c in counts.items() if name.startswith("reader"))
        for kind in ("read", "refused")
    }
    properties = counts["properties"]
    return "\n".join([
        f"runs killed: {killed['moments']} times at a chosen moment, {killed['random']} at a random one; nothing lost",
        *(f"{fault}: {n} survived" for fault, n in counts["run-all"].items()),
        f"damaged files: {sum(files.values())}, of which {files['refused']} refused, {files['read']} read",
        f"arguments tried: {properties['examples']}, for {properties['properties']} properties of the public functions",
        f"{result['seconds'] / 60:.1f} minutes",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
