"""How fast the inner loop is: against the plain loop, and against what the machine can do."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import measuring
import torch
from measuring import SIGMA, SMALL, STEP_SIZE, WIDE, Model, Sizes, by_turns
from plain_loop import plain_short_run
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import srlib
from srlib import inner_loop, langevin
from srlib.posterior import frozen

K = 25  # the paper's chain, for which the copy of the weights is made once
NOT_WORTH_IT = 2.0  # bfloat16 that is so many times slower than float32 on a few images is not run on a batch
PROBE_IMAGES = 2
TARGETS = {"float32": 1.4, "bfloat16": 2.5, "fraction_of_peak": 0.6}  # bfloat16: on processors that are made for it
# The library's forms: what `ours` is given. "float32" is the default.
FORMS: dict[str, dict[str, Any]] = {
    "without_frequencies": {"worth": math.inf},
    "float32": {},
    "frequencies_everywhere": {"worth": 1e-9},
    "bfloat16_without_frequencies": {"precision": "bfloat16", "worth": math.inf},
    "bfloat16_with_frequencies": {"precision": "bfloat16", "worth": 3.0},
    "bfloat16": {"precision": "bfloat16"},
}
# Where a score spends its time, by the names of torch's operators; the first that fits counts.
KINDS = {
    "convolutions": r"conv",
    "matrix products": r"mm$|matmul|linear",
    "moving data": r"copy|clone|cat|reshape|contiguous|flip|pad|shuffle|to_|fill|zero|empty|resize",
    "elementwise": r"gelu|tanh|softplus|add|mul|div|sub|neg|sqrt|sum|ones",
}


# --- (a) against the plain loop ---------------------------------------------------------------------------------------


def inner_loops(sizes: Sizes) -> dict[str, Any]:
    """Seconds of both sides and of each equal form, for each model and number of threads; ratios for chains of K steps."""
    settings = [
        measuring.in_child(chains, name, model, sizes, threads)
        for name, model in sizes.models.items()
        for threads in sizes.threads
    ]
    return {
        "targets": TARGETS,
        "made_for_bfloat16": measuring.made_for_bfloat16(),
        "worth": inner_loop.WORTH if math.isfinite(inner_loop.WORTH) else None,
        "batch_size": sizes.batch_size,
        "K": K,
        "settings": settings,
        "ratios": {name: ratios([s for s in settings if s["model"] == name]) for name in sizes.models},
    }


def chains(name: str, model: Model, sizes: Sizes, threads: int) -> dict[str, Any]:
    """Every form of the loop by turns, in this process; and what the copy costs that a chain makes once."""
    torch.set_num_threads(threads)
    posterior, n_steps = measuring.posterior(model, sizes.batch_size), sizes.n_steps[name]
    slower = bfloat16_slower(model)
    forms = {form: given for form, given in FORMS.items() if "precision" not in given or slower < NOT_WORTH_IT}
    sides = {"plain": lambda: plain(posterior, n_steps), "frozen": lambda: frozen_only(posterior, n_steps)}
    sides |= {form: lambda given=given: ours(posterior, n_steps, **given) for form, given in forms.items()}
    times = by_turns(sides, sizes.rounds, sizes.budget)
    copies = by_turns(
        {form: lambda given=given: copy_of(posterior, **given) for form, given in forms.items()},
        sizes.rounds,
        sizes.budget,
    )
    for form, found in times.items():
        once = copies[form]["median"] if form in copies else 0.0
        found["copy"] = once
        found["per_step"] = once / K + max(found["median"] - once, 0.0) / n_steps  # in a chain of K steps
    return {
        "model": name,
        "shape": model._asdict(),
        "threads": threads,
        "timed_steps": n_steps,
        "bfloat16_slower_on_few_images": slower,
        "forms": times,
    }


def ratios(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Times faster than the plain loop: with default settings, and each side with its best number of threads."""
    default = max(settings, key=lambda s: s["threads"])["forms"]
    forms = {form for s in settings for form in s["forms"]}
    best = {
        form: min((s["forms"][form]["per_step"], s["threads"]) for s in settings if form in s["forms"])
        for form in forms
    }
    return {
        "default": default["plain"]["per_step"] / default["float32"]["per_step"],
        "best": {form: best["plain"][0] / seconds for form, (seconds, _) in sorted(best.items())},
        "best_threads": {form: threads for form, (_, threads) in sorted(best.items())},
    }


def plain(posterior: srlib.Posterior, n_steps: int) -> None:
    g = posterior.generator
    delta = srlib.noise_scale_from_step_size(STEP_SIZE)
    plain_short_run(g, posterior.x, g.split(g.sample_prior(len(posterior))), n_steps, delta, SIGMA)


def frozen_only(posterior: srlib.Posterior, n_steps: int) -> None:
    """`short_run` without its copy of the generator: the weights are frozen, and nothing else."""
    with mock.patch.object(langevin, "accelerated", lambda posterior, *_: posterior):
        srlib.short_run(posterior, n_steps, STEP_SIZE)


def ours(posterior: srlib.Posterior, n_steps: int, worth: float | None = None, **fast: Any) -> None:
    with frequencies_worth(worth):
        srlib.short_run(posterior, n_steps, STEP_SIZE, **fast)


def copy_of(posterior: srlib.Posterior, worth: float | None = None, **fast: Any) -> None:
    with frequencies_worth(worth):
        inner_loop.accelerated(posterior, **fast)


def frequencies_worth(worth: float | None) -> AbstractContextManager[Any]:
    """For a while the library takes frequencies where they save `worth` times the multiplications; None: as it would."""
    return nullcontext() if worth is None else mock.patch.multiple(inner_loop, WORTH=worth, WORTH_IN_BFLOAT16=worth)


def bfloat16_slower(model: Model) -> float:
    """How many times longer a score of a few images takes in bfloat16; large where the processor has to imitate it."""
    posterior = measuring.posterior(model, PROBE_IMAGES)
    e = posterior.generator.sample_prior(PROBE_IMAGES)
    full, half = (inner_loop.accelerated(posterior, precision) for precision in ("full", "bfloat16"))
    times = by_turns({"full": lambda: full.score(e), "half": lambda: half.score(e)}, 3, 2.0)
    return times["half"]["median"] / times["full"]["median"]


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiling(sizes: Sizes) -> dict[str, Any]:
    """The small model alone: a wide one spends its time in products, which compiling leaves as they are."""
    try:
        return measuring.in_child(compiled, sizes, max(sizes.threads), limit=200.0)
    except TimeoutError as error:
        return {"reason": str(error)}


def compiled(sizes: Sizes, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    posterior, n_steps = measuring.posterior(sizes.models[SMALL], sizes.batch_size), sizes.n_steps[SMALL]
    said = _Kept()
    logging.getLogger(inner_loop.__name__).addHandler(said)
    forms = {
        "plain": lambda: plain(posterior, n_steps),
        "float32": lambda: ours(posterior, n_steps),
        "compiled": lambda: ours(posterior, n_steps, compile=True),
    }
    times = by_turns(forms, sizes.rounds, sizes.budget)
    if said.messages:
        return {"reason": re.sub(r"\S*/", "", said.messages[0])}  # without paths of this machine
    ratio = {form: times["plain"]["median"] / found["median"] for form, found in times.items()}
    return {"threads": threads, "timed_steps": n_steps, "forms": times, "ratios": ratio}


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().splitlines()[0])


# --- (b) against the machine ------------------------------------------------------------------------------------------


def against_peak(sizes: Sizes) -> dict[str, Any]:
    """Fractions of the measured matrix-product peak, and where the rest of the time goes."""
    settings = [measuring.in_child(fractions, sizes, threads) for threads in sizes.threads]
    return {
        "target": TARGETS["fraction_of_peak"],
        "made_for_bfloat16": measuring.made_for_bfloat16(),
        "batch_size": sizes.batch_size,
        "settings": settings,
    }


def fractions(sizes: Sizes, threads: int) -> dict[str, Any]:
    """The peak of products and of convolutions, and the score of the wide model, by turns in this process."""
    torch.set_num_threads(threads)
    posterior = measuring.posterior(sizes.models[WIDE], sizes.batch_size)
    e = posterior.generator.sample_prior(len(posterior))
    conv = max((m for m in posterior.generator.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    found: dict[str, Any] = {"threads": threads, "bfloat16_slower_on_few_images": bfloat16_slower(sizes.models[WIDE])}
    for name, precision, dtype in (("float32", "full", torch.float32), ("bfloat16", "bfloat16", torch.bfloat16)):
        if name == "bfloat16" and found["bfloat16_slower_on_few_images"] >= NOT_WORTH_IT:
            continue
        fast = inner_loop.accelerated(posterior, precision)
        sides: dict[str, Callable[[], Any]] = {"score": lambda fast=fast: fast.score(e)}
        operands = {n: torch.randn(n, n).to(dtype) for n in sizes.matrices}
        sides |= {str(n): lambda a=a: torch.mm(a, a) for n, a in operands.items()}
        images, kernel = images_and_kernel(conv, sizes.models[WIDE].feature_size, sizes.batch_size, dtype)
        sides["convolution"] = lambda images=images, kernel=kernel: nn.functional.conv2d(images, kernel)
        times = by_turns(sides, sizes.rounds, sizes.budget)
        rates = {str(n): 2 * n**3 / min(times[str(n)]["seconds"]) for n in sizes.matrices}
        out = sizes.models[WIDE].feature_size - conv.kernel_size[0] + 1
        rates["convolution"] = 2 * sizes.batch_size * out**2 * kernel.numel() / min(times["convolution"]["seconds"])
        found[name] = of_peak(
            operations(posterior, e), operations(fast, e), times["score"]["median"], max(rates.values())
        )
        found[name]["rates"] = rates
        found[name]["profile"] = shares(lambda fast=fast: fast.score(e))
    return found


def images_and_kernel(conv: nn.Conv2d, side: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of the convolution, in the order in memory that suits it best."""
    images, kernel = torch.randn(n, conv.in_channels, side, side), torch.randn(conv.weight.shape)
    return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (images, kernel))


def of_peak(direct: int, done: int, seconds: float, peak: float) -> dict[str, float]:
    """useful: by the operations of the direct form of all layers. done: by those of the form that was computed.

    useful may exceed done, even 1: a convolution as products of Fourier coefficients reaches the same result with fewer operations.
    """
    return {
        "direct_operations": direct,
        "done_operations": done,
        "seconds": seconds,
        "peak_operations_per_second": peak,
        "useful": direct / seconds / peak,
        "done": done / seconds / peak,
    }


def operations(posterior: srlib.Posterior, e: torch.Tensor) -> int:
    """Multiplications and additions in the products and convolutions of one score; forward, and backward to e alone.

    Products with the zeros of a padding do not count: the result does not need them, and the peak is of a convolution without.
    """
    e = 1.0 * e.detach().requires_grad_()  # the counter takes no leaf
    aten = torch.ops.aten
    counted = {
        aten.convolution: lambda x, w, *given, out_shape: products(x, out_shape, w, *given[1:5]),
        aten.convolution_backward: lambda grad, x, w, *given, out_shape: products(x, grad, w, *given[1:5]),
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, frozen(posterior.generator):
        posterior.pull(e)
    return counter.get_total_flops()


def products(
    x: Sequence[int], y: Sequence[int], w: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool,
) -> int:  # fmt: skip
    """Operations of a convolution, from the shapes of input, output and kernel: 2 for each weight, place and pixel it meets."""
    sides = zip((y if transposed else x)[2:], w[2:], stride, padding, dilation, strict=True)  # those without padding
    places = (nn.functional.conv1d(torch.ones(1, 1, n), torch.ones(1, 1, k), None, *how).sum() for n, k, *how in sides)
    return 2 * x[0] * w[0] * w[1] * math.prod(int(n) for n in places)


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """Kind of work -> share of the processor time of `call`."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    sums = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "everything else")
        sums[kind] += event.self_cpu_time_total
    total = sum(sums.values())
    return {kind: value / total for kind, value in sums.items()}


def load() -> float | None:
    """Processes that wanted a core over the last minute; what a quiet machine has is near 0."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
