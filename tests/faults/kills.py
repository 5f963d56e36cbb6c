"""Runs that are killed and called again until they end, against the same run left alone: nothing may differ but the times.

    python kills.py SEED SYSTEM ...     the long form: every moment of `Moments`, and `RANDOM` moments; prints a JSON line

Each attempt is a fork of this process, so that it takes no longer than the run itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import forks
import numpy as np
import torch
from tqdm import tqdm

from srlib import checkpoints, data, experiment, training
from srlib.data import load

RANDOM = 20
TINY = dict(latent_dims=[2, 3], channels=2, n_steps=2, n_updates=3, batch_size=8, n_samples=20, snapshots=[2])
# what each system has beside its parameters: a searched step size, all numbers of a chain, chains, codes, flags of the actnorms
OWN: dict[str, dict[str, Any]] = {
    "short_run": {"step_size_search": "grid", "every": 2, "search_images": 2},
    "tuned_short_run": {"step_size_search": "descent", "every": 2, "search_images": 2},
    "abp": {},
    "glo": {"latent_dims": [5], "options": {"inference_steps": 2}},
    "glow": {"options": {"depth": 1, "n_levels": 1, "width": 4}},
    "vae": {"latent_dims": [5]},
    "ladder_vae": {},
    "iaf": {"latent_dims": [5]},
}
KEPT = "kept.safetensors"  # the end of the training, which a run removes


def config_of(system: str) -> experiment.Config:
    return experiment.Config.from_dict({"name": system, "system": system, **TINY, **OWN[system]})


@functools.cache
def few_digits() -> data.Dataset:
    """Some of the digits, without labels, which no classifier can be asked about; a run of `TINY` begins a second epoch."""
    digits = load("digits")
    few = (data.Split(part.images[:n]) for part, n in ((digits.train, 20), (digits.validation, 4), (digits.test, 10)))
    return data.Dataset("digits", *few, digits.license, digits.redistributable)


@contextmanager
def small_and_eager(systems: Iterable[str]):
    """Runs see `few_digits`, and save after each update.

    Runs of `systems` find in their forks what they import and what they know of their sources.
    """
    with (
        patch.object(experiment, "load", lambda name: few_digits()),
        patch.object(training, "SECONDS_BETWEEN_SAVES", -1.0),
        forks.known_sources(systems),
        tempfile.TemporaryDirectory() as folder,
    ):
        for system in systems:
            experiment.run(config_of(system), Path(folder) / system, progress=False)
        yield


class Moments:
    """Counts the moments before, in the middle of and after what changes the disk, and kills this process at one of them."""

    def __init__(self, last: int | None) -> None:
        self.passed, self.last = 0, last
        self.replace, self.unlink, self.fdopen = os.replace, os.unlink, os.fdopen
        os.replace = self._around(os.replace)
        os.unlink = self._around(self._removed)
        os.fdopen = self._opened

    def here(self) -> None:
        self.passed += 1
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, call):
        def watched(*arguments, **options):
            self.here()
            call(*arguments, **options)
            self.here()

        return watched

    def _removed(self, path, **options):
        if Path(path).name == training.resume_file("").name:
            self.replace(path, Path(path).with_name(KEPT))
        else:
            self.unlink(path, **options)

    def _opened(self, *arguments, **options):
        file = self.fdopen(*arguments, **options)
        write = file.write

        def halves(content):
            self.here()
            write(content[: len(content) // 2])
            file.flush()
            self.here()
            write(content[len(content) // 2 :])
            file.flush()
            self.here()

        file.write = halves
        return file


def attempt(
    config: experiment.Config, output: Path, last: int | None = None, seconds: float | None = None
) -> int | None:
    """One sitting of the run, killed at the moment `last` or after `seconds`; how many moments it passed if it ended."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            # tqdm's own lock is shared by all forks: one that is killed while it holds it would stop all later ones
            tqdm.set_lock(threading.RLock())
            moments = Moments(last)
            experiment.run(config, output, progress=False)
            os.write(writing, str(moments.passed).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reading) as told:
        passed = told.read()
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{config.name} failed in {output}")
    return int(passed) if passed else None


def reached(output: Path) -> int:
    """After how many updates a killed run goes on; every file that is there is whole, or this raises what its reader says."""
    for path in output.iterdir():
        if path.name.startswith("."):
            continue  # a temporary file
        if path.suffix == ".json":
            checkpoints.read_json(path)
        elif path.suffix == ".safetensors":
            checkpoints.load(path)
        else:
            experiment.Config.from_yaml(path)
    last = training.resume_file(output)
    return (
        TINY["n_updates"]
        if (output / "metrics.json").exists()
        else checkpoints.load(last)[1]["t"]
        if last.exists()
        else 0
    )


def outcome(output: Path) -> dict[str, Any]:
    """All bits of a finished run but its times."""
    metrics = experiment.verified_metrics(output)
    history = checkpoints.read_json(output / "history.json")["history"]
    state, progress = checkpoints.load(output / KEPT)
    return {
        "files": {path.name: digest(path.read_bytes()) for path in output.glob("*.safetensors") if path.name != KEPT},
        "state": {name: digest(bytes(tensor.view(torch.uint8).numpy() if tensor.ndim else tensor.numpy()))
                  for name, tensor in sorted(state.items())},
        "updates": progress["t"],
        "history": {name: values for name, values in history.items() if "seconds" not in name},
        "metrics": {name: metrics[name] for name in ("config", "scores", "data", "source_hash", "training_hash", "modules")},
        "names": sorted(path.name for path in output.iterdir() if not path.name.startswith(".")),
    }  # fmt: skip


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Different(Exception):
    """A killed run lost something, or ended otherwise than the one left alone."""


def survives(config: experiment.Config, expected: dict[str, Any], folder: Path, sittings: list[dict[str, Any]]) -> int:
    """Sittings that are killed as `attempt` says, and a last one that is not; how many kills there were."""
    output, kills, t = folder / config.name, 0, 0
    for limits in sittings:
        kills += attempt(config, output, **limits) is None
        now = reached(output) if output.exists() else 0
        if now < t:
            raise Different(f"{config.name}: from {t} updates back to {now} in {output} ({sittings})")
        t = now
    attempt(config, output)
    found = outcome(output)
    if different := [name for name, value in expected.items() if found[name] != value]:
        raise Different(f"{config.name}: other {', '.join(different)} in {output} ({sittings})")
    return kills


def left_alone(config: experiment.Config, folder: Path) -> tuple[dict[str, Any], int, float]:
    """The outcome of a run that is not killed, its moments, and its seconds."""
    started = time.monotonic()
    moments = attempt(config, folder / config.name)
    return outcome(folder / config.name), moments, time.monotonic() - started


def every_kill(system: str, seed: int) -> dict[str, int]:
    """Each moment once, then another; and `RANDOM` random times, each in a run of its own."""
    rng, config, counts = np.random.default_rng(seed), config_of(system), {"moments": 0, "random": 0}
    with tempfile.TemporaryDirectory() as folder:
        expected, moments, seconds = left_alone(config, Path(folder))
    plans = [("moments", [{"last": n}, {"last": int(rng.integers(1, moments))}]) for n in range(1, moments + 1)]
    plans += [("random", [{"seconds": t}]) for t in rng.uniform(0, seconds, RANDOM).tolist()]
    for kind, sittings in plans:
        with tempfile.TemporaryDirectory() as folder:
            counts[kind] += survives(config, expected, Path(folder), sittings)
    return counts


def main() -> None:
    torch.set_num_threads(1)
    seed, systems = int(sys.argv[1]), sys.argv[2:]
    with small_and_eager(systems):
        print(json.dumps({system: every_kill(system, seed) for system in systems}))


if __name__ == "__main__":
    main()
