"""A dry run of the paper's run matrix: every row of papermill_runs/paper.yaml at its full size, for 2 updates.

    SRLIB_DATA=... python benchmarks/dry_run.py [NAME ...]

trains, reconstructs and samples with the rows named, or with those that benchmarks/dry_run.json does not have as they are
today: on one thread, on a few images of their dataset, each in a process of its own. The pipeline multiplies the seconds of an
update by the number of updates, which estimates what a row takes on one core. A row that searches its step size does so once, after
the last update; of this search an update is given its part, one in `every`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from srlib import checkpoints, data, provenance
from srlib.experiment import Config

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/dry_run.json"
N_UPDATES = 2  # the first at sigma_start, the second at sigma
N_IMAGES = 256  # to train on: more than there are latents, as GLO's PCA needs
# Batch sizes of rows that are too slow. The seconds of such a row are those of its own batch size, by proportion, which is
# rather too many: smaller batches take longer per image.
SMALLER = {"short_run-celeba32-L5-K400": 20}

sys.path.insert(0, str(ROOT / "papermill_runs"))
import pipeline  # noqa: E402


def rows() -> dict[str, Config]:
    """The configurations of the paper's matrix by their names."""
    return {job.config.name: job.config for job in pipeline.load_profile("paper").runs}


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, whose calls add their CPU seconds to the list."""

    def call(*arguments: Any) -> Any:
        started = time.process_time()
        found = function(*arguments)
        seconds.append(time.process_time() - started)
        return found

    return call


def measure(config: Config) -> dict[str, Any]:
    """2 updates of a row, 2 reconstructions and 2 samples: the CPU seconds of an update, the peak memory of the process."""
    torch.set_num_threads(1)
    dataset = data.load(config.dataset)
    images = dataset.train.images[:N_IMAGES]
    system = config.build(dataset.image_shape)
    batch_size = SMALLER.get(config.name, config.batch_size)
    plan = replace(config.plan(), n_updates=N_UPDATES, batch_size=batch_size)
    searches: list[float] = []
    if config.step_size_search != "none":
        system.every, system.update_step_size = N_UPDATES, timed(system.update_step_size, searches)
    rng, started = torch.Generator().manual_seed(config.seed), time.process_time()
    system.fit(images, plan, rng, progress=False)
    seconds = (time.process_time() - started - sum(searches)) / N_UPDATES
    x = system.as_input(images[:2])
    for made in (system.reconstruct(x, rng=rng), system.sample(2, rng=rng)):
        if made.shape != x.shape or not made.isfinite().all():
            raise ArithmeticError(f"{config.name} makes images {tuple(made.shape)} with values that are not finite")
    return {
        "config": pipeline.row_hash(config),
        "batch_size": config.batch_size,
        "measured_with_batch_size": batch_size,
        "seconds_per_update": seconds * config.batch_size / batch_size + sum(searches) / config.every,
        **({"seconds_per_search": sum(searches)} if searches else {}),
        "peak_memory": provenance.peak_memory(),  # bytes, of the process
        "processor": provenance.environment()["processor"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to run again")
    names, wanted = parser.parse_args().names, rows()
    record = checkpoints.read_json(RESULT)["rows"] if RESULT.exists() else {}
    hashes = {name: pipeline.row_hash(config) for name, config in wanted.items()}
    record = {name: row for name, row in record.items() if row["config"] == hashes.get(name)}
    missing = [config for name, config in wanted.items() if name not in record or name in names]
    # a process for each row, whose peak memory is then its own
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for config, row in zip(missing, pool.imap(measure, missing)):
            record[config.name] = row
            checkpoints.write_json(RESULT, {"rows": {name: record[name] for name in wanted if name in record}})
            gigabytes = (row["peak_memory"] or 0) / 1e9
            print(f"{config.name}: {row['seconds_per_update']:.2f} s per update, {gigabytes:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
