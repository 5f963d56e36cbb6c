"""What the paper claims, and what the runs of a profile say to it: verdicts that are computed, never typed.

A claim (`papermill_runs/claims.yaml`) names a quantity, the runs it is measured on, and the interval in which the paper would have
it. The evidence is an effect with a 95 % interval, over seeds where a run has several, else over images; the verdict compares the two
intervals. A claim may have several cases, such as data sets and numbers of layers, each of which gets its own verdict.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checkpoints, comparison
from .experiment import verified_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from .langevin import Chain
    from .posterior import Posterior
    from .system import System

ONE_SEED = " for one seed"  # errors over images do not tell how far another training would be
CONFIDENCE = 0.95
LETTERS = {"layers": "L", "n_steps": "K"}
HOLDS, FAILS, INCONCLUSIVE, NOT_RUN, DIVERGED, MIXED = "holds", "fails", "inconclusive", "not run", "diverged", "mixed"


class Evidence(NamedTuple):
    """An effect and its 95 % interval; of: what the interval is over, such as "3 seeds" or "1000 images"."""

    effect: float
    lower: float
    upper: float
    of: str


@dataclass(frozen=True)
class Case:
    """One measurement of a claim: what is filled into the names of its runs."""

    runs: tuple[str, ...]
    title: str


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger.

    name : its own; statement : the paper's words, or ours for what it implies; place : where the paper says so
    quantity : one of `QUANTITIES`; options : what that takes beside the runs
    above, below : the claim holds where the effect is between them
    runs : names of runs with {fields}; cases : field -> values, all combinations of which are looked at
    chapter : where the book looks at it more closely
    """

    name: str
    statement: str
    place: str
    quantity: str
    runs: tuple[str, ...]
    chapter: str
    above: float = -math.inf
    below: float = math.inf
    options: Mapping[str, Any] | None = None
    cases: Mapping[str, Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ValueError(
                f"claim {self.name}: quantity={self.quantity!r} is unknown; there are: {', '.join(QUANTITIES)}"
            )
        if not self.above < self.below or (self.above == -math.inf and self.below == math.inf):
            raise ValueError(
                f"claim {self.name}: nothing is between above={self.above} and below={self.below}, or everything"
            )

    def all_cases(self) -> list[Case]:
        """Every combination of the values in `cases`, one with an empty title where there are none."""
        fields = self.cases or {}
        found = []
        for values in itertools.product(*fields.values()):
            given = dict(zip(fields, values, strict=True))
            told = [_title(field, value) for field, value in given.items()]
            found.append(Case(tuple(run.format(**given) for run in self.runs), ", ".join(told)))
        return found


class Judged(NamedTuple):
    """A case with its verdict; evidence is None where there is none."""

    case: Case
    verdict: str
    evidence: Evidence | None


def load_claims(path: Path) -> list[Claim]:
    """The ledger. ValueError: an entry that is unknown, missing or twice there."""
    claims = []
    for entry in checkpoints.read_yaml(path):
        try:
            claims.append(Claim(**entry | {"runs": tuple(entry["runs"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: the claim {entry!r} is not complete, or has unknown entries: {error}") from error
    names = [claim.name for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: more than one claim has the name {', '.join(twice)}")
    return claims


def judge(claim: Claim, results: Path) -> list[Judged]:
    """The verdict on each case, from the runs in the folder `results` of a profile."""
    judged = []
    for case in claim.all_cases():
        runs = [_seeds(results, name) for name in case.runs]
        if all(runs):
            evidence = QUANTITIES[claim.quantity](*runs, **claim.options or {})
            found = verdict(evidence, claim.above, claim.below)
            one_seed = evidence.of.startswith("1 seed") and found in (HOLDS, FAILS)
            judged.append(Judged(case, found + ONE_SEED if one_seed else found, evidence))
        else:
            missing = [name for name, found in zip(case.runs, runs, strict=True) if not found]
            lost = all(any(results.glob(f"{name}-seed*/diverged.json")) for name in missing)
            judged.append(Judged(case, DIVERGED if lost else NOT_RUN, None))
    return judged


def verdict(evidence: Evidence, above: float, below: float) -> str:
    """Whether the whole interval of the evidence is between `above` and `below`, all outside on one side, or neither."""
    if above < evidence.lower and evidence.upper < below:
        return HOLDS
    return FAILS if evidence.upper <= above or evidence.lower >= below else INCONCLUSIVE


def overall(judged: Sequence[Judged]) -> str:
    """The verdict on all cases: that of those that are decided, if they agree; first those with several seeds are asked."""
    found = {case.verdict for case in judged}
    for end in ("", ONE_SEED):
        decided = found & {HOLDS + end, FAILS + end}
        if decided:
            return decided.pop() if len(decided) == 1 else MIXED + end
    return INCONCLUSIVE if INCONCLUSIVE in found else min(found)


# --- quantities: functions of runs, each of which is a mapping of seeds to folders ----------------------------

Seeds = Mapping[int, Path]


def score_difference(ours: Seeds, *theirs: Seeds, score: str, source: str = "prior") -> Evidence:
    """Our score minus theirs, or minus the lowest of theirs where there are several (which is chosen in their favour).

    score : "mse", or "fd" or "kid" of samples from `source`, "prior" or "aggregate". Seeds that both have are paired; with one seed
    the two errors over images are added as if they were independent, which is on the safe side for the same images.
    """
    read = comparison.squared_error if score == "mse" else comparison.distance(score, source)

    def scores(seeds: Seeds) -> dict[int, tuple[float, float | None]]:
        found = {seed: read(verified_metrics(folder)) for seed, folder in seeds.items()}
        return {seed: pair for seed, pair in found.items() if pair is not None}

    first, others = scores(ours), [found for found in map(scores, theirs) if found]
    if not first or not others:
        return Evidence(math.nan, -math.inf, math.inf, "no scores")
    best = min(others, key=lambda found: statistics.mean(value for value, _ in found.values()))
    both = sorted(first.keys() & best.keys())
    if not both:
        return Evidence(math.nan, -math.inf, math.inf, "no common seed")
    differences = [first[seed][0] - best[seed][0] for seed in both]
    if len(both) > 1:
        return over(differences, "seeds")
    error = math.hypot(*(pair[both[0]][1] or 0.0 for pair in (first, best)))
    return _interval(differences[0], error, math.inf, "1 seed, over images")


def end_of_search(runs: Seeds, *others: Seeds, reference: float = 1.0) -> Evidence:
    """log of the noise scale delta = sqrt(2 s) at the end of training over `reference`, or over that of other runs, seed by seed."""

    def ends(seeds: Seeds) -> dict[int, float]:
        return {seed: verified_metrics(folder)["scores"]["noise_scale"] for seed, folder in seeds.items()}

    first = ends(runs)
    others_ends = [ends(other) for other in others]
    both = sorted(first.keys() & (others_ends[0].keys() if others else first.keys()))
    return over([math.log(first[s] / (others_ends[0][s] if others else reference)) for s in both], "seeds")


def spread_of_ends(runs: Seeds) -> Evidence:
    """Standard deviation over seeds of log delta at the end of training; its interval is that of normal samples (chi square)."""
    from scipy.stats import chi2

    ends = [math.log(verified_metrics(folder)["scores"]["noise_scale"]) for folder in runs.values()]
    if len(ends) < 2:
        return Evidence(math.nan, -math.inf, math.inf, "1 seed")
    spread, free = statistics.stdev(ends), len(ends) - 1
    lower, upper = (spread * math.sqrt(free / chi2.ppf(q, free)) for q in (0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2))
    return Evidence(spread, lower, upper, f"{len(ends)} seeds")


def late_change(runs: Seeds, after: float = 0.5) -> Evidence:
    """|log delta(end) - log delta(after)|, after: a fraction of the training; s is taken relative to sigma^2, with which it anneals."""
    changes = []
    for folder in runs.values():
        history = checkpoints.read_json(folder / "history.json")["history"]
        relative = [
            0.5 * math.log(s / sigma**2) for s, sigma in zip(history["step_size"], history["sigma"], strict=True)
        ]
        changes.append(abs(relative[-1] - relative[round(after * (len(relative) - 1))]))
    return over(changes, "seeds")


def smallest_eigenvalue(runs: Seeds, n_images: int) -> Evidence:
    """Smallest |eigenvalue| of dz_K/dz_0 (section 4.2), the product of the steps' Jacobians, for each of the first test images."""
    import torch

    from .entropy import step_jacobians

    values: list[float] = []
    for folder in runs.values():
        posterior, chain = _short_run(folder, n_images)
        whole = functools.reduce(lambda before, step: step @ before, step_jacobians(posterior, chain))
        values += torch.linalg.eigvals(whole).abs().amin(-1).tolist()
    return over(values, "images")


def start_share(runs: Seeds, n_images: int, n_draws: int = 12) -> Evidence:
    """Share of the variance of z_K, summed over latents, that is due to z_0 alone; for each of the first test images.

    All pairs of n_draws starts and n_draws noises; unbiased components of variance of the balanced two-way layout.
    """
    import torch

    from .langevin import short_run
    from .posterior import Posterior

    values = []
    for folder in runs.values():
        system, x = _system(folder, n_images)
        rng = torch.Generator().manual_seed(0)
        for image in x:
            starts = system.generator.sample_prior(n_draws, rng).repeat_interleave(n_draws, 0)
            noises = torch.randn(system.n_steps, n_draws, starts.shape[1], generator=rng, dtype=starts.dtype)
            noises = noises.repeat(1, n_draws, 1)
            posterior = Posterior(system.generator, image.expand(len(starts), -1, -1, -1), system.sigma)
            e = short_run(posterior, system.n_steps, system.step_size, starts, noises).final
            values.append(_start_share(e.reshape(n_draws, n_draws, -1)))
    return over(values, "images")


def gradient_to_noise(runs: Seeds, n_images: int) -> Evidence:
    """log of the length of the gradient term, s grad log p, over that of the noise, sqrt(2 s d), at the last step, by test image."""
    values: list[float] = []
    for folder in runs.values():
        posterior, chain = _short_run(folder, n_images)
        e = chain.trajectory[-2]
        s = chain.step_size.expand(chain.n_steps, *e.shape)[-1]
        noise = (2 * s).sum(1).sqrt()
        values += ((s * posterior.score(e)).norm(dim=1) / noise).log().tolist()
    return over(values, "images")


def layer_lead(runs: Seeds, factors: Sequence[str], layer: int, n_images: int) -> Evidence:
    """What layer z_l tells of known factors, in their mean, minus what the best other layer tells (`evaluation.factors.told`); by seed.

    layer : l, from 1, which is the one that is nearest to the image; n_images : test images whose latents are inferred.
    """
    leads = []
    for folder in runs.values():
        shares = _told_by_layers(folder, n_images)
        means = [statistics.fmean(of_layer[name] for name in factors) for of_layer in shares]
        own = means.pop(len(means) - layer)
        leads.append(own - max(means))
    return over(leads, "seeds")


def layer_contrast(runs: Seeds, *others: Seeds, first: str, second: str, n_images: int) -> Evidence:
    """How far layers specialise in one factor or another; minus that of other runs where there are any, seed by seed.

    It is the largest c such that one layer's noises tell more of `first` by c than another's, and these more of `second` by c.
    """

    def contrast(folder: Path) -> float:
        shares = _told_by_layers(folder, n_images)
        pairs = itertools.permutations(shares, 2)
        return max(min(a[first] - b[first], b[second] - a[second]) for a, b in pairs)

    found = [{seed: contrast(folder) for seed, folder in seeds.items()} for seeds in (runs, *others)]
    both = [seed for seed in found[0] if all(seed in other for other in found)]
    if not both:
        return Evidence(math.nan, -math.inf, math.inf, "no common seed")
    return over([found[0][seed] - sum(other[seed] for other in found[1:]) for seed in both], "seeds")


QUANTITIES: dict[str, Callable[..., Evidence]] = {
    f.__name__: f
    for f in (score_difference, end_of_search, spread_of_ends, late_change, smallest_eigenvalue, start_share, gradient_to_noise,
              layer_lead, layer_contrast)
}  # fmt: skip


def over(values: Sequence[float], of: str) -> Evidence:
    """The mean of independent values with Student's interval, infinite where they show no spread. of: such as "seeds"."""
    n = len(values)
    if n == 1 or len(set(values)) == 1:  # the same point of a grid for all seeds says nothing about the next one
        return Evidence(values[0], -math.inf, math.inf, f"{n} {of if n > 1 else of.removesuffix('s')}")
    return _interval(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n), n - 1, f"{n} {of}")


def _interval(effect: float, standard_error: float, freedom: float, of: str) -> Evidence:
    from scipy.stats import norm, t

    law = t(freedom) if freedom < math.inf else norm()
    half = standard_error * float(law.ppf(0.5 + CONFIDENCE / 2))
    return Evidence(effect, effect - half, effect + half, of)


def _seeds(results: Path, name: str) -> dict[int, Path]:
    """Seed -> folder of the finished runs with this name."""
    found = {
        int(path.parent.name.rpartition("-seed")[2]): path.parent for path in results.glob(f"{name}-seed*/metrics.json")
    }
    return dict(sorted(found.items()))


def _system(folder: Path, n_images: int) -> tuple[System, Tensor]:
    """The trained system of a run, and the first test images of its data."""
    from .data import load, to_unit_range
    from .experiment import load_run

    system, metrics, _ = load_run(folder)
    return system, to_unit_range(load(metrics["config"]["dataset"]).test.images[:n_images])


def _short_run(folder: Path, n_images: int) -> tuple[Posterior, Chain]:
    """The posterior of the first test images, and a short run with its trajectory."""
    import torch

    from .langevin import short_run
    from .posterior import Posterior

    system, x = _system(folder, n_images)
    posterior = Posterior(system.generator, x, system.sigma)
    rng = torch.Generator().manual_seed(0)
    return posterior, short_run(posterior, system.n_steps, system.step_size, rng=rng, keep_trajectory=True)


@functools.cache
def _told_by_layers(folder: Path, n_images: int) -> list[dict[str, float]]:
    """What the noises of each layer (those of a ladder generator are its latents) tell of the factors of test images, top layer first."""
    import torch

    from .data import load
    from .evaluation.factors import inferred_layers, known_factors, told

    system, x = _system(folder, n_images)
    test = load(verified_metrics(folder)["config"]["dataset"]).test
    factors = known_factors({name: values[:n_images] for name, values in test.factors.items()})
    layers = inferred_layers(system, x, torch.Generator().manual_seed(0), noises=True)
    return [told(layer, factors, rng=torch.Generator().manual_seed(0)) for layer in layers]


def _start_share(e: Tensor) -> float:
    """Share of the variance of e [starts, noises, d] that is due to the starts alone."""
    n_starts, n_noises, _ = e.shape
    by_start, by_noise = e.mean(1, keepdim=True), e.mean(0, keepdim=True)
    rest = e - by_start - by_noise + e.mean((0, 1), keepdim=True)
    both = rest.square().sum() / ((n_starts - 1) * (n_noises - 1))
    start = by_start.var(0).sum() - both / n_noises
    noise = by_noise.var(1).sum() - both / n_starts
    return (start / (start + noise + both)).item()


def _title(field: str, value: object) -> str:
    return (
        comparison.DATASETS.get(str(value), str(value))
        if field == "dataset"
        else f"{LETTERS.get(field, field)} = {value}"
    )
