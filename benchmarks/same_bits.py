"""Whether today's sources train the same bits as those of another commit; if they do, what was trained with those counts as current.

    python benchmarks/same_bits.py COMMIT

A run is out of date as soon as a line of code has changed that it can reach, be it only that of an error message. This program
trains each row of the `digits` matrix that has a finished run for a few updates with both sources, scores it, and compares
weights, histories and scores bit for bit. The finished runs of all systems that agree are marked as current; their metrics
keep, as "same_bits", which sources they were trained with and what was compared. So are those of the matrices `reference`,
`confirmation` and `confirmation-reference`, by the same evidence: they are of the same systems, on other images or with other seeds. What agreed stands in same_bits.json: with
unchanged sources the program can be called again, to mark further finished runs of the rows that were compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from srlib import checkpoints, experiment, provenance

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "same_bits.json"
N_UPDATES = 3


def shortened(config: dict[str, Any]) -> dict[str, Any]:
    """The same run with few updates, a search of the step size among them if it has any, and few samples."""
    search = {"every": 2} if config["step_size_search"] != "none" else {}
    return {**config, **search, "n_updates": N_UPDATES, "snapshots": [], "n_samples": sum(config["latent_dims"]) + 100}


def rows(configs: Iterable[experiment.Config]) -> list[dict[str, Any]]:
    """The rows of a matrix, shortened; those that are then the same but for name and seed are one."""
    different: dict[str, dict[str, Any]] = {}
    for config in configs:
        row = shortened(json.loads(json.dumps(asdict(config))))
        different.setdefault(json.dumps({**row, "name": "", "seed": 0}), row)
    return list(different.values())


def train(given: Path) -> None:
    """In a process of its own: train the rows in the file `given`, with the sources that Python finds; a line for each row."""
    if not Path(experiment.__file__).is_relative_to(Path.cwd()):
        raise RuntimeError(f"{experiment.__file__} is not of the sources in {Path.cwd()}")
    for row in json.loads(given.read_text()):
        with tempfile.TemporaryDirectory() as folder:
            try:
                metrics = experiment.run(experiment.Config.from_dict(row), folder, progress=False)
            except (ArithmeticError, ValueError) as error:
                print(json.dumps({"row": row["name"], "system": row["system"], "error": str(error)}), flush=True)
                continue
            tensors, _ = checkpoints.load(Path(folder) / "model.safetensors")
            history = checkpoints.read_json(Path(folder) / "history.json")["history"]
        weights = {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}
        curves = {name: values for name, values in history.items() if "seconds" not in name}
        found = {"weights": weights, "history": curves, "scores": metrics["scores"]}
        hashes = {name: metrics[name] for name in ("source_hash", "training_hash")}
        told = {"row": row["name"], "system": row["system"], **hashes, "bits": checkpoints.checksum(found)}
        print(json.dumps(told), flush=True)


def trained(sources: Path, given: Path) -> list[dict[str, Any]]:
    """What `train` says with the sources in the folder `sources`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--train", str(given)]
    environment = {**os.environ, "PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=sources)
    if done.returncode:
        raise RuntimeError(f"training with {sources} failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def agreeing(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """System -> its hashes with both sources and how many rows were compared; systems with another bit in a row are left out."""
    names = ("source_hash", "training_hash")
    systems: dict[str, dict[str, Any]] = {}
    for before, after in zip(old, new, strict=True):
        found = systems.setdefault(before["system"], {"same": True, "rows": 0})
        found["same"] &= before.get("bits", before.get("error")) == after.get("bits", after.get("error"))
        found["rows"] += 1
        if "bits" in before and "bits" in after:
            found |= {"old": {name: before[name] for name in names}, "new": {name: after[name] for name in names}}
    return {system: found for system, found in systems.items() if found["same"] and "old" in found}


def compared(commit: str, configs: Iterable[experiment.Config]) -> dict[str, dict[str, Any]]:
    """`agreeing` for the sources of `commit` and today's, from the record if that is of these."""
    record, wanted = checkpoints.read_json(RECORD) if RECORD.exists() else {}, rows(configs)
    today = {system: provenance.source_hash(experiment.modules(system)) for system in experiment.SYSTEMS}
    names = sorted(checkpoints.checksum({**row, "name": "", "seed": 0}) for row in wanted)
    if record.get("commit") == commit and record["today"] == today and {*names} <= {*record["compared"]}:
        return record["systems"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as two:
        given, older = Path(folder) / "rows.json", Path(folder) / "sources"
        given.write_text(json.dumps(wanted))
        _git("worktree", "add", "--detach", str(older), commit)
        try:
            old, new = two.map(trained, (older, ROOT), (given, given))
        finally:
            _git("worktree", "remove", "--force", str(older))
    systems = agreeing(old, new)
    about = {
        "commit": commit,
        "today": today,
        "updates": N_UPDATES,
        "date": date.today().isoformat(),
        "compared": names,
    }
    checkpoints.write_json(RECORD, {**about, "systems": systems, "environment": provenance.environment()})
    return systems


def mark(folder: Path, found: dict[str, Any], commit: str) -> bool:
    """Make the run in `folder` count as one of today's sources if it is one of those of `commit`; whether it was."""
    metrics = checkpoints.read_json(folder / "metrics.json")
    old, new = found["old"], found["new"]
    if metrics["training_hash"] != old["training_hash"] or metrics["source_hash"] != old["source_hash"]:
        return False
    about = {"commit": commit, "rows": found["rows"], "updates": N_UPDATES, "date": date.today().isoformat()}
    metrics["same_bits"] = [*metrics.get("same_bits", []), {**old, **about}]
    metrics |= new
    metrics.pop("checksum")
    checkpoints.write_json(folder / "metrics.json", metrics)
    return True


def main(commit: str) -> int:
    sys.path.insert(0, str(ROOT / "papermill_runs"))
    import pipeline  # not in the processes of `train`, whose sources may be others

    profiles = [
        pipeline.load_profile(name) for name in ("digits", "reference", "confirmation", "confirmation-reference")
    ]
    name = _git("rev-parse", commit)
    same = compared(name, [job.config for job in profiles[0].runs if job.output.with_name("metrics.json").exists()])
    for system in experiment.SYSTEMS:
        told = f"{same[system]['rows']} rows agree in every bit" if system in same else "OTHER BITS"
        print(f"{system}: {told}")
    marked = []
    for profile in profiles:
        for job in profile.runs:
            metrics = job.output.with_name("metrics.json")
            if job.config.system not in same or not (metrics.exists() and job.result.exists()):
                continue
            if mark(metrics.parent, same[job.config.system], name):
                # what the notebook shows are the run's own files, which have not changed
                result = checkpoints.read_json(job.result)
                result.pop("checksum")
                checkpoints.write_json(job.result, {**result, "key": pipeline.key(job, profile)})
                marked.append(job.name)
    print(f"{len(marked)} runs of {name[:12]} are marked as current")
    return 0 if same.keys() == experiment.SYSTEMS.keys() else 1


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(__doc__)
