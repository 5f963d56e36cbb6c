"""How fast the inner loop is: against the plain loop, and against what the machine can do."""

from __future__ import annotations

import logging
import math
import re
import statistics
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
# Form -> the one that it is to be compared with.
BUILDS_ON = {
    "frozen": "plain",
    "without_frequencies": "frozen",
    "float32": "without_frequencies",
    "frequencies_everywhere": "float32",
    "bfloat16": "float32",
    "bfloat16_with_frequencies": "bfloat16_without_frequencies",
}
CONTEST = ("plain", "float32", "bfloat16")  # for which something was asked
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
        measuring.in_child(chains, name, model, sizes, threads, limit=300.0 + 5 * sizes.contest_budget)
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
    """Every form of the loop by turns, in this process; and what the copy costs that a chain makes once.

    Forms that are the same code here, because they replace the same layers, are measured once.
    """
    torch.set_num_threads(threads)
    posterior = measuring.posterior(model, sizes.batch_size)
    most = threads == max(sizes.threads)  # fewer have only to show that they are slower, and only in the contest
    n_steps = (sizes.n_steps if most else sizes.n_steps_on_fewer_threads)[name]
    slower = bfloat16_slower(model)
    forms = {form: given for form, given in FORMS.items() if "precision" not in given or slower < NOT_WORTH_IT}
    layers = {form: fourier_layers(copy_of(posterior, **given)) for form, given in forms.items()}
    same_as = same_code(layers)
    timed = {same_as.get(form, form) for form in (FORMS if most else CONTEST)}
    forms = {form: given for form, given in forms.items() if form in timed}
    same_as = {form: first for form, first in same_as.items() if first in timed}
    sides = {"plain": lambda: plain(posterior, n_steps)}
    sides |= {"frozen": lambda: frozen_only(posterior, n_steps)} if most else {}
    sides |= {form: lambda given=given: ours(posterior, n_steps, **given) for form, given in forms.items()}
    budgets = dict.fromkeys(sides, sizes.budget if most else sizes.budget / 3)
    if most:
        budgets |= {same_as.get(form, form): sizes.contest_budget for form in CONTEST}
    times = by_turns(sides, sizes.contest_rounds, budgets)
    copies = by_turns(
        {form: lambda given=given: copy_of(posterior, **given) for form, given in forms.items()},
        sizes.rounds,
        sizes.budget,
    )
    for form, found in times.items():
        found["copy"] = copies[form]["median"] if form in copies else 0.0
    return {
        "model": name,
        "shape": model._asdict(),
        "threads": threads,
        "timed_steps": n_steps,
        "bfloat16_slower_on_few_images": slower,
        "bfloat16_error": score_error(posterior) if slower < NOT_WORTH_IT else None,
        "convolutions": len(inner_loop._convolutions(posterior.generator)),
        "fourier_layers": {form: len(names) for form, names in layers.items()},
        "same_as": same_as,
        "forms": times,
    }


def fourier_layers(fast: srlib.Posterior) -> list[str]:
    """The layers in whose place there are products of Fourier coefficients."""
    return [name for name, layer in fast.generator.named_modules() if isinstance(layer, inner_loop.FourierConvolution)]


def same_code(layers: dict[str, list[str]]) -> dict[str, str]:
    """Form -> the one before it that multiplies in the same type and replaces the same layers, where there is one."""
    codes = {form: (FORMS[form].get("precision"), tuple(names)) for form, names in layers.items()}
    first: dict[Any, str] = {}
    for form, code in codes.items():
        first.setdefault(code, form)
    return {form: first[code] for form, code in codes.items() if first[code] != form}


def score_error(posterior: srlib.Posterior) -> float:
    """How far the scores of a batch in bfloat16 are from those in float32, relative to their size."""
    e = posterior.generator.sample_prior(len(posterior))
    full, half = (inner_loop.accelerated(posterior, precision).score(e) for precision in ("full", "bfloat16"))
    return ((half - full).norm() / full.norm()).item()


def ratios(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Times faster than the plain loop: with default settings, and each side with its best number of threads.

    And, as gains, than the form that each form builds on.
    """
    places: dict[str, dict[int, list[float]]] = {}  # form -> threads -> seconds of a step in each round
    for s in settings:
        for form in [*s["forms"], *s["same_as"]]:
            places.setdefault(form, {})[s["threads"]] = per_step(s, form)
    best = {form: min(at, key=lambda threads: statistics.median(at[threads])) for form, at in places.items()}
    steps = {form: at[best[form]] for form, at in places.items()}
    same_as, most = {k: v for s in settings for k, v in s["same_as"].items()}, max(s["threads"] for s in settings)
    return {
        "default": paired(places["plain"][most], places["float32"][most]),
        "best": {form: paired(steps["plain"], seconds) for form, seconds in sorted(steps.items())},
        "best_threads": dict(sorted(best.items())),
        "gains": {
            form: {"over": other} | paired(steps[other], steps[form])
            for form, other in BUILDS_ON.items()
            if {form, other} <= steps.keys() and same_as.get(form, form) != same_as.get(other, other)
        },
    }


def per_step(setting: dict[str, Any], form: str) -> list[float]:
    """Seconds of a step in each round, in a chain of K steps: with its share of the copy that a chain makes once."""
    found = setting["forms"][setting["same_as"].get(form, form)]
    return [found["copy"] / K + max(s - found["copy"], 0.0) / setting["timed_steps"] for s in found["seconds"]]


def paired(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times longer `slow` took in the rounds that both have: the median, and from low to high an interval for it.

    It is the narrowest between two of the ratios that holds the true median with a probability, `holds`, of at least 0.95
    (Thompson 1936), whatever their distribution; all of them where there are fewer than the six that this takes.
    """
    found = sorted(a / b for a, b in zip(slow, fast))
    n = len(found)
    holds = [1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    k = max((k for k, probability in enumerate(holds) if probability >= 0.95), default=0)
    return {
        "ratio": statistics.median(found),
        "low": found[k],
        "high": found[n - 1 - k],
        "holds": holds[k],
        "rounds": n,
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


def copy_of(posterior: srlib.Posterior, worth: float | None = None, **fast: Any) -> srlib.Posterior:
    with frequencies_worth(worth):
        return inner_loop.accelerated(posterior, **fast)


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
    times = by_turns(forms, sizes.contest_rounds, sizes.budget)
    if said.messages:
        return {"reason": re.sub(r"\S*/", "", said.messages[0])}  # without paths of this machine
    ratio = {form: paired(times["plain"]["seconds"], found["seconds"]) for form, found in times.items()}
    ratio["gain"] = paired(times["float32"]["seconds"], times["compiled"]["seconds"])
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
