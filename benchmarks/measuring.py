"""What all parts of the benchmark share: sizes, models, processes of their own, and times taken by turns."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import srlib
from srlib import checkpoints, provenance

SIGMA = 0.15
STEP_SIZE = 1e-5  # the weights are those a model starts with; at this size no chain of it leaves all bounds


class Model(NamedTuple):
    latent_dims: tuple[int, ...]
    image_shape: tuple[int, int, int]
    channels: int
    feature_size: int


@dataclass(frozen=True)
class Sizes:
    """How much is measured. rounds: how often everything is timed, by turns; the median counts."""

    models: dict[str, Model]
    n_steps: dict[str, int]  # of a timed chain, for each model
    n_steps_on_fewer_threads: dict[str, int]  # which have only to show that more threads are better
    batch_size: int
    rounds: int
    threads: tuple[int, ...]
    budget: float  # seconds after which a side is not timed again
    contest_rounds: int  # those of the inner loop, where a few per cent decide
    contest_budget: float  # of those sides for which something was asked
    matrices: tuple[int, ...]  # sides of the matrices whose product shows the peak
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    chain_lengths: tuple[int, ...]
    layers: tuple[int, ...]
    processes: tuple[int, ...]
    running: float  # seconds for which processes side by side are counted
    updates: int  # of learning by one process and by several together
    memory_updates: tuple[int, ...]
    log_dets: tuple[tuple[tuple[int, ...], int], ...]  # latent_dims, K
    systems: tuple[str, ...]
    inferred: int  # images in a batch of inference


WIDE, SMALL = "wide", "small"
CORES = torch.get_num_threads()  # as torch would have it by default
FULL = Sizes(
    models={
        WIDE: Model((64, 64, 64, 96, 128), (3, 32, 32), 64, 16),  # Table 4 with the latents of the authors' script
        SMALL: Model((8, 16, 32), (1, 28, 28), 16, 7),  # the profile `digits`
    },
    n_steps={WIDE: 4, SMALL: 25},  # steps of the wide model are slow, and more rounds tell more than more steps
    n_steps_on_fewer_threads={WIDE: 3, SMALL: 25},
    batch_size=64,
    rounds=3,
    threads=tuple(sorted({1, CORES})),
    budget=6.0,
    contest_rounds=18,
    contest_budget=60.0,
    matrices=(1024, 2048),
    batches=(1, 4, 16, 64, 256),
    widths=(8, 16, 32, 64),
    chain_lengths=(5, 25, 100),
    layers=(1, 2, 3, 4, 5),
    processes=tuple(sorted({1, CORES})),
    running=5.0,
    updates=40,
    memory_updates=(2, 100),
    log_dets=(((8, 16, 32), 10), ((8, 16, 32), 25), ((16, 32, 48, 64), 10), ((64, 64, 64, 96, 128), 2)),
    systems=("short_run", "ladder_vae", "vae", "iaf", "abp", "glo", "glow"),
    inferred=100,
)
TINY = Sizes(
    models={WIDE: Model((2, 3), (3, 10, 10), 6, 5), SMALL: Model((2, 3), (1, 10, 10), 4, 5)},
    n_steps={WIDE: 1, SMALL: 2},
    n_steps_on_fewer_threads={WIDE: 1, SMALL: 2},
    batch_size=3,
    rounds=1,
    threads=(1,),
    budget=1.0,
    contest_rounds=1,
    contest_budget=1.0,
    matrices=(16,),
    batches=(1, 2),
    widths=(4, 8),
    chain_lengths=(1, 2),
    layers=(1, 2),
    processes=(1,),
    running=0.01,
    updates=1,
    memory_updates=(1, 2),
    log_dets=(((8, 16), 1),),  # fewer latents are too few for low_rank
    systems=("vae",),
    inferred=4,
)


def posterior(model: Model, batch_size: int) -> srlib.Posterior:
    """The posterior of images that the model itself has drawn, with the weights it starts with."""
    torch.manual_seed(0)
    g = srlib.TopDownGenerator(*model)
    with torch.no_grad():
        return srlib.Posterior(g, g(g.sample_prior(batch_size)), SIGMA)


def in_child(function: Callable[..., Any], *arguments: Any, limit: float = 300.0) -> Any:
    """function(*arguments) in a process of its own, which no other measurement has warmed up; TimeoutError after `limit` s."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(function, arguments).get(limit)
        except multiprocessing.TimeoutError:  # which is not Python's own
            raise TimeoutError(f"{function.__name__} took more than {limit:g} seconds") from None


def by_turns(
    sides: dict[str, Callable[[], Any]], rounds: int, budget: float | Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Name -> warm_up, the seconds of the first call, and seconds: those of `rounds` further calls.

    All sides are timed in turn, so that what else the machine does meets all of them. One that has taken `budget` seconds,
    which may be its own, is not called again.
    """
    budgets = budget if isinstance(budget, Mapping) else dict.fromkeys(sides, budget)
    found = {name: {"warm_up": seconds_of(side), "seconds": []} for name, side in sides.items()}
    for _ in range(rounds):
        for name, side in sides.items():
            if sum(found[name]["seconds"]) <= budgets[name]:
                found[name]["seconds"].append(seconds_of(side))
    return {name: times | {"median": statistics.median(times["seconds"])} for name, times in found.items()}


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def made_for_bfloat16() -> bool | None:
    """Whether the processor multiplies in bfloat16 (avx512_bf16 or amx_bf16); None where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()))


def record(path: Path, measure: Callable[[], dict[str, Any]]) -> float:
    """Writes what `measure` returns to `path`, sealed, with date, machine and what else it did meanwhile; returns the seconds.

    others: the cores that other programs, or other guests of the same machine, kept busy on average; None where the system does not tell.
    """
    before, started = seconds_of_others(), time.monotonic()
    results = measure()
    seconds, after = time.monotonic() - started, seconds_of_others()
    about = {
        "date": datetime.date.today().isoformat(),
        "seconds": seconds,
        "others": None if before is None or after is None else max(after - before, 0.0) / seconds,
        "environment": provenance.environment(),
    }
    checkpoints.write_json(path, about | {"results": results})
    return seconds


def seconds_of_others() -> float | None:
    """The processor time that this process and the children it has waited for did not take, of all that was taken since the start."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    taken = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return taken - sum(os.times()[:4])
