"""The minutes that the README promises.

    python benchmarks/timings.py

makes a fresh clone of the last commit, times `make setup`, `make run-all`, `make test` and `make book` there, and writes
benchmarks/timings.json. A test holds the README to that file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from srlib import checkpoints, provenance

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("setup", "run-all", "test", "book")


def main() -> None:
    minutes = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "srlib"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for command in COMMANDS:
            started = time.monotonic()
            subprocess.run(["make", command, f"PYTHON={sys.executable}"], cwd=clone, check=True)
            minutes[f"make {command}"] = round((time.monotonic() - started) / 60, 2)
    machine = {name: provenance.environment()[name] for name in ("processor", "cores")}
    record = {"machine": machine, "minutes": minutes}
    checkpoints.write_json(ROOT / "benchmarks/timings.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
