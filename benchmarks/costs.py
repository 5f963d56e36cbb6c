"""What else costs time and memory: log-determinants, larger problems, updates, the other systems, and starting up."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import log_determinants
import measuring
import torch
import tuning
from measuring import SMALL, STEP_SIZE, Model, Sizes, by_turns

import srlib
from srlib import checkpoints, experiment, provenance
from srlib.evaluation.reconstruction import inference_seconds

ROOT = Path(__file__).resolve().parent.parent


# --- (c) log-determinants ---------------------------------------------------------------------------------------------


def log_dets(sizes: Sizes) -> dict[str, Any]:
    """Each method over d and K, by `log_determinants.measure`, each in a process of its own because peak memory never falls."""
    rows = [
        {"d": sum(dims), "K": n_steps, "method": method} | measuring.in_child(one_log_det, dims, n_steps, method)
        for dims, n_steps in sizes.log_dets
        for method in log_determinants.METHODS
    ]
    return {"threads": 1, "chains": log_determinants.N_COST_CHAINS, "rows": rows}


def one_log_det(latent_dims: tuple[int, ...], n_steps: int, method: str) -> dict[str, float]:
    torch.set_num_threads(1)
    return log_determinants.measure(latent_dims, n_steps, method)


# --- (d) scaling ------------------------------------------------------------------------------------------------------


def scaling(sizes: Sizes) -> dict[str, Any]:
    """Chains over batch, width, K and L, everything else as in the small model; and over processes side by side."""
    return {
        "threads": 1,
        "batch_size": sizes.batch_size,
        "shape": sizes.models[SMALL]._asdict(),
        "axes": measuring.in_child(axes, sizes),
        "processes": [
            {"processes": p, "threads": threads, "images_per_second": images_per_second(sizes, p, threads)}
            for p, threads in sorted({(1, 1), *((p, 1) for p in sizes.processes), *((1, t) for t in sizes.threads)})
        ],
    }


def axes(sizes: Sizes) -> dict[str, list[dict[str, float]]]:
    """Axis -> points: value, seconds of a chain, images in it. All points by turns, in this process."""
    torch.set_num_threads(1)
    model, short = sizes.models[SMALL], sizes.chain_lengths[0]
    points = [("batch", n, model, n, short) for n in sizes.batches]
    points += [("width", c, model._replace(channels=c), sizes.batch_size, short) for c in sizes.widths]
    points += [("K", k, model, sizes.batch_size, k) for k in sizes.chain_lengths]
    layer = model.latent_dims[-1]
    points += [("L", n, model._replace(latent_dims=(layer,) * n), sizes.batch_size, short) for n in sizes.layers]
    sides = {}
    for axis, value, own, n_images, n_steps in points:
        posterior = measuring.posterior(own, n_images)
        sides[f"{axis} {value}"] = lambda p=posterior, k=n_steps: srlib.short_run(p, k, STEP_SIZE)
    times = by_turns(sides, sizes.rounds, sizes.budget)
    found: dict[str, list[dict[str, float]]] = {}
    for axis, value, _, n_images, _ in points:
        point = {"value": value, "images": n_images, "seconds": times[f"{axis} {value}"]["median"]}
        found.setdefault(axis, []).append(point)
    return found


def images_per_second(sizes: Sizes, processes: int, threads: int) -> float:
    """Of chains of the small model in so many processes at once, of so many threads each."""
    arguments = (sizes.models[SMALL], sizes.batch_size, sizes.n_steps[SMALL], threads, sizes.running)
    if processes == 1:
        return measuring.in_child(throughput, *arguments)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _share, (context.Barrier(processes),)) as pool:
        waiting = [pool.apply_async(throughput, arguments) for _ in range(processes)]
        return sum(result.get(120.0) for result in waiting)


_together: Barrier | None = None


def _share(barrier: Barrier) -> None:
    global _together
    _together = barrier


def throughput(model: Model, batch_size: int, n_steps: int, threads: int, seconds: float) -> float:
    """Images per second of one process, over at least so many seconds from when all processes are ready."""
    torch.set_num_threads(threads)
    posterior, n_chains = measuring.posterior(model, batch_size), 0
    srlib.short_run(posterior, n_steps, STEP_SIZE)
    if _together is not None:
        _together.wait(60.0)
    started = time.perf_counter()
    while n_chains == 0 or time.perf_counter() - started < seconds:
        srlib.short_run(posterior, n_steps, STEP_SIZE)
        n_chains += 1
    return n_chains * batch_size / (time.perf_counter() - started)


def data_parallel(sizes: Sizes) -> dict[str, Any]:
    """Seconds of learning the small model with batches of one size, by one process and shared by several, of one thread each."""
    model = measuring.FULL.models[SMALL]  # smaller ones do not fit the images
    config = {
        "name": "data_parallel",
        "system": "short_run",
        "dataset": "digits",
        "latent_dims": model.latent_dims,
        "channels": model.channels,
        "feature_size": model.feature_size,
        "n_steps": sizes.chain_lengths[0],  # scoring, which is not timed, has its chains too
        "n_updates": sizes.updates,
        "batch_size": sizes.batch_size,
        "n_samples": 64,  # nobody looks at the scores
    }
    # (a size of batch that so many processes cannot share equally is no configuration)
    numbers = [p for p in sizes.processes if sizes.batch_size % p == 0]
    rows = [{"processes": p, "seconds": seconds_of_training(config, p)} for p in numbers]
    return {"threads": 1} | {name: config[name] for name in ("batch_size", "n_steps", "n_updates")} | {"rows": rows}


def seconds_of_training(config: dict[str, Any], processes: int) -> float:
    together = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "config.yaml", Path(folder) / "run"
        file.write_text(json.dumps(config))  # which is YAML too
        command = [sys.executable, "-m", *together, "srlib.experiment", str(file), "--output", str(output)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{processes} processes: {done.stderr[-2000:]}")
        return checkpoints.read_json(output / "metrics.json")["seconds"]["training"]


# --- memory of an update ----------------------------------------------------------------------------------------------


def memory(sizes: Sizes) -> dict[str, Any]:
    """Peak memory of a process that makes a few, or many, updates of Algorithm 1 with chains of each length, in bytes."""
    few, many = sizes.memory_updates
    wanted = [*((k, few) for k in sizes.chain_lengths), (sizes.chain_lengths[0], many)]
    rows = [{"K": k, "updates": n, "peak": measuring.in_child(updating, sizes, k, n)} for k, n in wanted]
    idle = measuring.in_child(updating, sizes, sizes.chain_lengths[0], 0)
    return {"batch_size": sizes.batch_size, "shape": sizes.models[SMALL]._asdict(), "idle": idle, "rows": rows}


def updating(sizes: Sizes, n_steps: int, n_updates: int) -> int | None:
    """The largest memory of this process once it has made so many updates."""
    torch.set_num_threads(1)
    model = sizes.models[SMALL]
    images = srlib.to_uint8(measuring.posterior(model, 4 * sizes.batch_size).x)
    system = srlib.ShortRun(srlib.TopDownGenerator(*model), n_steps, STEP_SIZE)
    if n_updates:
        plan = srlib.TrainingPlan(n_updates, sizes.batch_size)
        system.fit(images, plan, torch.Generator().manual_seed(0), progress=False)
    return provenance.peak_memory()


# --- (e) inference of every system ------------------------------------------------------------------------------------


def systems(sizes: Sizes) -> dict[str, Any]:
    return {"threads": 1, "batch_size": sizes.inferred, "rows": measuring.in_child(inference, sizes)}


def inference(sizes: Sizes) -> list[dict[str, Any]]:
    """Seconds per image of the systems that the profile `digits` has trained, on validation images; systems by turns."""
    torch.set_num_threads(1)
    images = srlib.load("digits").validation.images[: sizes.inferred]
    rows, trained = [], {}
    for name in sizes.systems:
        run = f"{tuning.ROWS[name]}-seed0"
        trained[name], metrics, _ = experiment.load_run(ROOT / "papermill_runs/digits" / run)
        rows.append({"system": name, "run": run, "layers": layers(metrics["config"])})
    sides = {name: lambda s=system: inference_seconds(s, images, sizes.inferred) for name, system in trained.items()}
    times = by_turns(sides, sizes.rounds, sizes.budget)
    return [row | {"seconds_per_image": times[row["system"]]["median"] / len(images)} for row in rows]


def layers(config: dict[str, Any]) -> int:
    """Layers of latents; Glow, to which its row's latent_dims mean nothing, has levels."""
    return config["options"].get("n_levels") or len(config["latent_dims"])


# --- (f) starting up --------------------------------------------------------------------------------------------------


def starting(sizes: Sizes) -> dict[str, Any]:
    """Seconds of `import torch` and, after it, of `import srlib`; and what benchmarks/timings.py has on file."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import srlib; "
        "print(b - a, time.perf_counter() - b)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(sizes.rounds)
    ]
    torch_seconds, own_seconds = zip(*(map(float, run.split()) for run in runs))
    timings = checkpoints.read_json(ROOT / "benchmarks/timings.json")
    return {
        "import_torch": statistics.median(torch_seconds),
        "import_srlib": statistics.median(own_seconds),
        "timings": {name: timings[name] for name in ("machine", "minutes")},
    }
