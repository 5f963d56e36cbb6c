"""What the paper claims, and what the runs of a profile say to it: verdicts that are computed, never typed.

A claim (`papermill_runs/claims.yaml`) names a quantity, the runs it is measured on, and the interval in which the paper would have
it. The evidence is an effect with a 95 % interval, over seeds where a run has several, else over images; the verdict compares the two
intervals. A claim may have several cases, such as data sets and numbers of layers, each of which gets its own verdict; it is meant for all of
them.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checkpoints, comparison
from .experiment import verified_metrics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .langevin import Chain
    from .posterior import Posterior
    from .system import System

WHOSE = ("paper", "implied", "ours")  # who says so: the paper; what it says implies; we, who would like to know
ONE_SEED = " for one seed"  # errors over images do not tell how far another training would be
CONFIDENCE = 0.95
LETTERS = {"layers": "L", "n_steps": "K"}
GRID = tuple(2 ** (i / 2) for i in range(-4, 5))  # times the noise scale of a run
HIDDEN = {"75 % scattered": ("pixels", 0.75), "left half": ("left", 0.5)}  # as in the chapter on inpainting
HOLDS, FAILS, INCONCLUSIVE, MIXED = "holds", "fails", "inconclusive", "mixed"
NOT_RUN, DIVERGED, NOT_MEASURABLE = "not run", "diverged", "not measurable"


class Evidence(NamedTuple):
    """An effect and its 95 % interval; of: what the interval is over, such as "3 seeds" or "1000 images"."""

    effect: float
    lower: float
    upper: float
    of: str


@dataclass(frozen=True)
class Case:
    """One measurement of a claim: the names of its runs, and what its quantity takes beside them."""

    runs: tuple[str, ...]
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """An entry of the ledger.

    name : its own; statement : the paper's words, or ours for what it implies; place : where the paper says so; whose : of WHOSE
    quantity : one of `QUANTITIES`; options : what that takes beside the runs
    above, below : the claim holds where the effect is between them
    runs : names of runs with {fields}; cases : field -> values, all combinations of which are looked at; a field that is in no
        name is an option
    foreseen : written before any of the runs that it judges had been made
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
    whose: str = "paper"
    foreseen: bool = False

    def __post_init__(self) -> None:
        if self.whose not in WHOSE:
            raise ValueError(f"claim {self.name}: whose={self.whose!r} must be one of {', '.join(WHOSE)}")
        if not isinstance(self.foreseen, bool):
            raise ValueError(f"claim {self.name}: foreseen={self.foreseen!r} must be true or false")
        if self.quantity not in QUANTITIES:
            raise ValueError(
                f"claim {self.name}: quantity={self.quantity!r} is unknown; there are: {', '.join(QUANTITIES)}"
            )
        if not self.above < self.below or (self.above == -math.inf and self.below == math.inf):
            raise ValueError(
                f"claim {self.name}: nothing is between above={self.above} and below={self.below}, or everything"
            )

    @property
    def unit(self) -> str:
        """What the effect is in."""
        given = UNITS[self.quantity]
        return given or {"mse": "MSE", "fd": "FD", "kid": "KID"}[(self.options or {})["score"]]

    def all_cases(self) -> list[Case]:
        """Every combination of the values in `cases`, one with an empty title where there are none."""
        fields = self.cases or {}
        found = []
        for values in itertools.product(*fields.values()):
            given = dict(zip(fields, values, strict=True))
            told = ", ".join(_title(name, value) for name, value in given.items())
            others = {
                name: value for name, value in given.items() if not any(f"{{{name}}}" in run for run in self.runs)
            }
            found.append(
                Case(tuple(run.format(**given) for run in self.runs), told, {**(self.options or {}), **others})
            )
        return found


class Judged(NamedTuple):
    """A case with its verdict; evidence is None where there is none."""

    case: Case
    verdict: str
    evidence: Evidence | None


def load_claims(path: Path) -> list[Claim]:
    """The ledger. Raises ValueError for a file that is no list, and an entry that is unknown, missing or twice there."""
    claims = []
    for entry in comparison.entries(path):
        try:
            if isinstance(entry["runs"], str):
                raise TypeError("runs must be a list of names")
            claims.append(Claim(**entry | {"runs": tuple(entry["runs"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: the claim {entry!r} is not complete, or has unknown entries: {error}") from error
    names = [claim.name for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: more than one claim has the name {', '.join(twice)}")
    return claims


def judge(claim: Claim, results: Path, n_images: float = math.inf) -> list[Judged]:
    """The verdict on each case, from the runs in the folder `results` of a profile; for a preview, on `n_images` images at most.

    Raises ValueError for what is no claim or no folder.
    """
    if not isinstance(claim, Claim) or not isinstance(results, Path):
        raise ValueError(f"claim={claim!r} must be a Claim, and results={results!r} a pathlib.Path")
    judged = []
    for case in claim.all_cases():
        runs = [_seeds(results, name) for name in case.runs]
        if all(runs):
            options = {**case.options}
            if options.get("n_images", 0) > n_images:
                options["n_images"] = n_images
            evidence = QUANTITIES[claim.quantity](*runs, **options)
            if lost := sum(len([*results.glob(f"{name}-seed*/diverged.json")]) for name in case.runs):
                evidence = evidence._replace(of=f"{evidence.of} ({lost} diverged)")
            found = verdict(evidence, claim.above, claim.below)
            one_seed = evidence.of.startswith("1 seed") and found in (HOLDS, FAILS)
            judged.append(Judged(case, found + ONE_SEED if one_seed else found, evidence))
        else:
            missing = [name for name, found in zip(case.runs, runs, strict=True) if not found]
            lost = all(any(results.glob(f"{name}-seed*/diverged.json")) for name in missing)
            judged.append(Judged(case, DIVERGED if lost else NOT_RUN, None))
    return judged


def verdict(evidence: Evidence, above: float, below: float) -> str:
    """Whether the whole interval of the evidence is between `above` and `below`, all outside on one side, or neither.

    What the runs do not tell, such as of known factors where the images have none, has no effect and is not measurable. Raises ValueError for bounds, or ends of the interval, in the wrong order.
    """
    if not isinstance(evidence, Evidence) or evidence.lower > evidence.upper:
        raise ValueError(f"evidence={evidence!r} must be an Evidence with lower <= upper")
    for name, bound in (("above", above), ("below", below)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise ValueError(f"{name}={bound!r} must be a number, infinite for no bound")
    if not above < below:
        raise ValueError(f"nothing is between above={above} and below={below}; give the lower bound as above")
    if math.isnan(evidence.effect):
        return NOT_MEASURABLE
    if above < evidence.lower and evidence.upper < below:
        return HOLDS
    return FAILS if evidence.upper <= above or evidence.lower >= below else INCONCLUSIVE


def overall(judged: Sequence[Judged]) -> str:
    """The verdict on all cases that were run and measured: it holds where all do, fails where one does and none holds, is mixed where both happen.

    Otherwise it is inconclusive, however many cases hold. It is "for one seed" where it rests on such a case.
    Raises ValueError where there are no cases.
    """
    if not judged:
        raise ValueError(f"judged={judged!r} has no cases; give at least one, as `judge` does")
    run = [case.verdict for case in judged if case.verdict not in (NOT_RUN, DIVERGED, NOT_MEASURABLE)]
    if not run:
        return min(case.verdict for case in judged)
    held, failed = ([found for found in run if found.removesuffix(ONE_SEED) == word] for word in (HOLDS, FAILS))
    if failed:
        weak = any(all(found.endswith(ONE_SEED) for found in side) for side in (held, failed) if side)
        return (MIXED if held else FAILS) + ONE_SEED * weak
    if len(held) == len(run):
        return HOLDS + ONE_SEED * any(found.endswith(ONE_SEED) for found in held)
    return INCONCLUSIVE


# --- quantities: functions of runs, each of which is a mapping of seeds to folders ----------------------------

Seeds = Mapping[int, Path]
NO_COMMON_SEED = Evidence(math.nan, -math.inf, math.inf, "no common seed")
NO_FACTORS = Evidence(math.nan, -math.inf, math.inf, "images without known factors")


def score_difference(ours: Seeds, *theirs: Seeds, score: str, source: str = "prior") -> Evidence:
    """Our score minus theirs, or minus the lowest of theirs where there are several (which is chosen in their favour).

    score : "mse", or "fd" or "kid" of samples from `source`, "prior" or "aggregate". The difference and its interval are those of
    `comparison.gap`, as in the chapters.
    """
    read = comparison.squared_error if score == "mse" else comparison.distance(score, source)
    first, *others = (
        comparison.mean_score({seed: read(verified_metrics(folder)) for seed, folder in seeds.items()})
        for seeds in (ours, *theirs)
    )
    others = [found for found in others if found is not None]
    if first is None or not others:
        return Evidence(math.nan, -math.inf, math.inf, "no scores")
    best = min(others, key=lambda found: found.value)
    gap, n_pairs = comparison.gap(first, best), len(first.by_seed.keys() & best.by_seed.keys())
    half = gap.decisive * gap.standard_error
    fewer, more = sorted((first.n_seeds, best.n_seeds))
    unpaired = "1 seed, over images" if more == 1 else f"{fewer} seed{'s' * (fewer > 1)} against {more}"
    of = f"{n_pairs} seeds" if n_pairs > 1 else unpaired
    return Evidence(gap.value, gap.value - half, gap.value + half, of)


def end_of_search(runs: Seeds, *others: Seeds, reference: float = 1.0) -> Evidence:
    """log of the noise scale delta = sqrt(2 s) at the end of training over `reference`, or over that of other runs, seed by seed."""

    def ends(seeds: Seeds) -> dict[int, float]:
        return {seed: verified_metrics(folder)["scores"]["noise_scale"] for seed, folder in seeds.items()}

    first = ends(runs)
    others_ends = [ends(other) for other in others]
    both = sorted(first.keys() & (others_ends[0].keys() if others else first.keys()))
    if not both:
        return NO_COMMON_SEED
    return over([math.log(first[s] / (others_ends[0][s] if others else reference)) for s in both], "seeds")


def spread_of_ends(runs: Seeds) -> Evidence:
    """Standard deviation over seeds of log delta at the end of training; its interval is that of normal samples (chi square)."""
    from scipy.stats import chi2

    ends = [math.log(verified_metrics(folder)["scores"]["noise_scale"]) for folder in runs.values()]
    if len(ends) < 2:
        return Evidence(math.nan, -math.inf, math.inf, "1 seed")
    spread, free = statistics.stdev(ends), len(ends) - 1
    if spread == 0:  # the same point of a grid for all seeds: they differ by less than the grid can tell
        return Evidence(0.0, 0.0, math.inf, f"{len(ends)} seeds")
    lower, upper = (spread * math.sqrt(free / chi2.ppf(q, free)) for q in (0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2))
    return Evidence(spread, lower, upper, f"{len(ends)} seeds")


def late_change(runs: Seeds, after: float = 0.5) -> Evidence:
    """Largest minus smallest log delta after a fraction of the training, its end included; s is taken relative to sigma^2, with which
    it anneals."""
    changes = []
    for folder in runs.values():
        history = checkpoints.read_json(folder / "history.json")["history"]
        delta = [math.sqrt(2 * s) for s in history["step_size"]]
        sigma = history["sigma"]
        # s may have been updated once more, after the last update of theta
        end = verified_metrics(folder)["scores"]["noise_scale"]
        relative = [math.log(d / v) for d, v in zip([*delta, end], [*sigma, sigma[-1]], strict=True)]
        late = relative[round(after * (len(delta) - 1)) :]
        changes.append(max(late) - min(late))
    return over(changes, "seeds")


def search_share(runs: Seeds) -> Evidence:
    """Share of the seconds of training that the updates of the step size took."""
    spent = [verified_metrics(folder)["seconds"] for folder in runs.values()]
    return over([seconds["step_size_search"] / seconds["training"] for seconds in spent], "seeds")


def smallest_eigenvalue(runs: Seeds, n_images: int) -> Evidence:
    """log10 of the smallest |eigenvalue| of dz_K/dz_0 (section 4.2), the product of the steps' Jacobians, by test image.

    It is taken from the largest one of the product of their inverses: in the product itself rounding would hide it.
    """
    import torch

    values = []
    for folder in runs.values():
        steps = torch.linalg.inv(_jacobians(folder, n_images)[1].double())
        whole = functools.reduce(lambda before, step: before @ step, steps)
        values.append((-torch.linalg.eigvals(whole).abs().amax(-1).log10()).tolist())
    return _over_seeds(values)


def folding_share(runs: Seeds, n_images: int, n_starts: int = 2) -> Evidence:
    """Share of the test images for which det dF/de_0 has both signs over random starts, at the same noise, in any of the trainings.

    A continuous one-to-one map has one sign, so that for these images some distinct starts have the same end. The interval of
    a share is that of Clopper and Pearson, over images: all trainings see the same ones.
    """
    import torch
    from scipy.stats import beta

    from .entropy import step_jacobians
    from .langevin import short_run

    folds = torch.zeros(n_images, dtype=torch.bool)
    for folder in runs.values():
        posterior, system = _posterior(folder, n_images)
        rng = torch.Generator().manual_seed(0)
        starts = system.generator.sample_prior(n_images * n_starts, rng)
        noise = torch.randn(system.n_steps, n_images, starts.shape[1], generator=rng, dtype=starts.dtype)
        copies, noise = posterior.repeated(n_starts), noise.repeat_interleave(n_starts, 1)
        chain = short_run(copies, system.n_steps, system.step_size, starts, noise, keep_trajectory=True)
        signs = torch.linalg.slogdet(step_jacobians(copies, chain))[0].prod(0).unflatten(0, (n_images, n_starts))
        folds |= signs.amin(1) < signs.amax(1)
    n, found = n_images, int(folds.sum())
    lower, upper = (
        beta.ppf(0.5 - CONFIDENCE / 2, found, n - found + 1),
        beta.ppf(0.5 + CONFIDENCE / 2, found + 1, n - found),
    )
    of = f"{n} images, {len(runs)} seeds" if len(runs) > 1 else "1 seed, over images"
    return Evidence(found / n, float(lower) if found else 0.0, float(upper) if found < n else 1.0, of)


def excess_of_eq_17(runs: Seeds, n_images: int) -> Evidence:
    """E log q_s by Eq. (17) with one draw, minus that which counts the noise's entropy (`linear_noise`), in nats per latent."""
    import torch

    from .evaluation.mismatch import noise_log_dets

    values = []
    for folder in runs.values():
        chain, jacobians = _jacobians(folder, n_images)
        # log p(e_0) and the constant of log det S_K have the same mean, that of a Gaussian's entropy
        by_eq_17 = -torch.linalg.slogdet(jacobians)[1].sum(0)
        with_noise = -0.5 * noise_log_dets(jacobians, chain.step_size)[-1]
        values.append(((by_eq_17 - with_noise) / jacobians.shape[-1]).tolist())
    return _over_seeds(values)


def start_share(runs: Seeds, n_images: int, n_draws: int = 12) -> Evidence:
    """Share of the variance of z_K, summed over latents, that is due to z_0 alone; for each of the first test images.

    All pairs of n_draws starts and n_draws noises; unbiased components of variance of the balanced two-way layout.
    """
    import torch

    from .langevin import short_run
    from .posterior import Posterior

    values: list[list[float]] = []
    for folder in runs.values():
        system, x = _system(folder, n_images)
        rng = torch.Generator().manual_seed(0)
        values.append([])
        for image in x:
            starts = system.generator.sample_prior(n_draws, rng).repeat_interleave(n_draws, 0)
            noises = torch.randn(system.n_steps, n_draws, starts.shape[1], generator=rng, dtype=starts.dtype)
            noises = noises.repeat(1, n_draws, 1)
            posterior = Posterior(system.generator, image.expand(len(starts), -1, -1, -1), system.sigma)
            e = short_run(posterior, system.n_steps, system.step_size, starts, noises).final
            values[-1].append(_start_share(e.reshape(n_draws, n_draws, -1)))
    return _over_seeds(values)


def gradient_to_noise(runs: Seeds, n_images: int) -> Evidence:
    """log of the length of the gradient term, s grad log p, over that of the noise, sqrt(2 s d), at the last step, by test image."""
    values = []
    for folder in runs.values():
        posterior, chain = _short_run(folder, n_images)
        e = chain.trajectory[-2]
        s = chain.step_size.expand(chain.n_steps, *e.shape)[-1]
        noise = (2 * s).sum(1).sqrt()
        values.append(((s * posterior.score(e)).norm(dim=1) / noise).log().tolist())
    return _over_seeds(values)


def layer_lead(runs: Seeds, factors: Sequence[str], layer: int, n_probed: int) -> Evidence:
    """What layer z_l tells of known factors, in their mean, minus what the best other layer tells (`evaluation.factors.told`); by seed.

    layer : l, from 1, which is the one that is nearest to the image; n_probed : test images whose latents are inferred.
    """
    leads = []
    for folder in runs.values():
        shares = _told_by_layers(folder, n_probed)
        if not shares:
            return NO_FACTORS
        means = [statistics.fmean(of_layer[name] for name in factors) for of_layer in shares]
        own = means.pop(len(means) - layer)
        leads.append(own - max(means))
    return over(leads, "seeds")


def layer_contrast(runs: Seeds, *others: Seeds, first: str, second: str, n_probed: int) -> Evidence:
    """How far layers specialise in one factor or another; minus that of other runs where there are any, seed by seed.

    It is the largest c such that one layer's noises tell more of `first` by c than another's, and these more of `second` by c.
    """

    def contrast(folder: Path) -> float:
        shares = _told_by_layers(folder, n_probed)
        pairs = itertools.permutations(shares, 2)
        return max(min(a[first] - b[first], b[second] - a[second]) for a, b in pairs)

    if not all(_told_by_layers(folder, n_probed) for seeds in (runs, *others) for folder in seeds.values()):
        return NO_FACTORS
    found = [{seed: contrast(folder) for seed, folder in seeds.items()} for seeds in (runs, *others)]
    both = [seed for seed in found[0] if all(seed in other for other in found)]
    if not both:
        return NO_COMMON_SEED
    return over([found[0][seed] - sum(other[seed] for other in found[1:]) for seed in both], "seeds")


def largest_rise(runs: Seeds, n_images: int, n_chains: int = 16) -> Evidence:
    """Largest change of KL(q_k || p) from one step to the next, in nats: of the step that is the worst on every other image,
    on the images between."""
    import torch

    from .evaluation.mismatch import objective_by_steps

    values = []
    for folder in runs.values():
        posterior, system = _posterior(folder, n_images)
        rng = torch.Generator().manual_seed(0)
        changes = objective_by_steps(posterior, system.n_steps, system.step_size, n_chains, rng).diff(dim=0)
        worst = changes[:, ::2].mean(1).argmax()
        values.append(changes[worst, 1::2].tolist())
    return _over_seeds(values)


def interior_optimum(runs: Seeds, n_images: int, estimator: str = "linear_noise") -> Evidence:
    """The objective of Eq. (20) at the better of the two ends of a grid of step sizes, from a quarter of the run's own noise scale to four
    times it, minus that at the best point between them, in nats per latent. Both are chosen on every other image and judged on the others.
    """
    import torch

    from .step_size import TOO_LARGE, kl_objective

    values = []
    for folder in runs.values():
        posterior, system = _posterior(folder, n_images)
        objectives = []
        for factor in GRID:
            rng = torch.Generator().manual_seed(0)
            try:
                found = kl_objective(posterior, factor**2 * system.step_size, system.n_steps, estimator, rng=rng)
            except TOO_LARGE:
                found = torch.full((len(posterior),), math.inf, dtype=torch.float64)
            objectives.append(found.detach() / system.generator.latent_dim)
        grid = torch.stack(objectives)
        chosen = grid[:, ::2].mean(1)
        best, end = 1 + chosen[1:-1].argmin(), (len(GRID) - 1) * chosen[[0, -1]].argmin()
        values.append((grid[end, 1::2] - grid[best, 1::2]).tolist())
    return _over_seeds(values)


def first_divergence(runs: Seeds, n_images: int) -> Evidence:
    """KL(q_s || p) at the first snapshot of the training, with the sigma and s in force there, in nats per latent."""
    return _over_seeds([_divergences(folder, n_images, _snapshots(folder)[0]) for folder in runs.values()])


def change_of_divergence(runs: Seeds, n_images: int, sigma: str) -> Evidence:
    """KL(q_s || p) at the last snapshot minus that at the first, in nats per latent, by test image.

    sigma : "in force" at each, or "final", which takes the last one (and the s that belongs to it) for both.
    """
    values = []
    for folder in runs.values():
        first, last = (_divergences(folder, n_images, *end) for end in _ends(folder, sigma))
        values.append([after - before for before, after in zip(first, last)])
    return _over_seeds(values)


def change_of_energy_gap(runs: Seeds, n_images: int, sigma: str) -> Evidence:
    """How much higher -log p(x, e) is where short runs end than in long exact runs, at the last snapshot minus at the first.

    In nats per latent, by test image; sigma as in `change_of_divergence`.
    """
    values = []
    for folder in runs.values():
        first, last = (_energy_gaps(folder, n_images, *end)[0] for end in _ends(folder, sigma))
        values.append([after - before for before, after in zip(first, last)])
    return _over_seeds(values)


def disagreement_of_long_runs(runs: Seeds, n_images: int, snapshot: str) -> Evidence:
    """Mean -log p(x, e) of long runs from the prior minus that of those from the ends of short runs, in nats per latent, by test image.

    snapshot : "first" or "last", with the sigma in force there.
    """
    at = {"first": 0, "last": -1}[snapshot]
    return _over_seeds([_energy_gaps(folder, n_images, _snapshots(folder)[at])[1] for folder in runs.values()])


def divergence_difference(ours: Seeds, theirs: Seeds, n_images: int) -> Evidence:
    """KL(q_s || p) of our generator minus that of theirs, with our K, s and sigma for both, in nats per latent, by test image."""
    values = []
    for seed in sorted(ours.keys() & theirs.keys()):
        pair = (_divergences(folder, n_images, steps_of=ours[seed]) for folder in (ours[seed], theirs[seed]))
        values.append([our - their for our, their in zip(*pair)])
    return _over_seeds(values)


def residual_left(runs: Seeds, n_images: int, n_batches: int = 20) -> Evidence:
    """Squared norm of the left-hand side of Eq. (26) at the last snapshot over that at the first, on training images.

    Both times sigma^2, which is annealed, and without the noise of images and chains.
    """
    import torch

    from .evaluation.mismatch import mean_gradients, squared_norm_of_mean

    ratios = []
    for folder in runs.values():
        norms = []
        for update in (_snapshots(folder)[0], _snapshots(folder)[-1]):
            system, x = _system(folder, n_images, update, "train")
            sigma, s = _in_force(folder, system, update)
            rng = torch.Generator().manual_seed(0)
            gradients = mean_gradients(system.generator, x, sigma, system.n_steps, s, min(n_batches, n_images), rng)
            norms.append(squared_norm_of_mean(gradients).item())
        ratios.append(norms[1] / norms[0])
    return over(ratios, "seeds")


def inpainting_difference(ours: Seeds, theirs: Seeds, n_images: int, hidden: str) -> Evidence:
    """Our mean squared error per hidden pixel of one inpainting minus theirs, by test image. hidden : one of HIDDEN."""
    from .evaluation.inpainting import hidden_squared_error

    values = []
    for seed in sorted(ours.keys() & theirs.keys()):
        errors = []
        for folder in (ours[seed], theirs[seed]):
            x, mask, draws = _inpainted(folder, n_images, hidden, 1)
            errors.append(hidden_squared_error(x, draws[0], mask))
        values.append((errors[0] - errors[1]).tolist())
    return _over_seeds(values)


def inpainting_against_fill(runs: Seeds, n_images: int, hidden: str, fill: str) -> Evidence:
    """Our mean squared error per hidden pixel minus that of pixels taken from training images, by test image.

    Like is compared with like: one inpainting with one image, the mean of several with a mean.

    hidden : one of HIDDEN; fill : the "mean" training image, or the one that is "nearest" where pixels are observed.
    """
    from .data import load, to_unit_range
    from .evaluation.inpainting import hidden_squared_error, mean_fill, nearest_fill

    take_from, n_draws = {"mean": (mean_fill, 8), "nearest": (nearest_fill, 1)}[fill]
    values = []
    for folder in runs.values():
        x, mask, draws = _inpainted(folder, n_images, hidden, n_draws)
        training = to_unit_range(load(verified_metrics(folder)["config"]["dataset"]).train.images)
        ours, theirs = draws.mean(0), take_from(x, mask, training)
        values.append((hidden_squared_error(x, ours, mask) - hidden_squared_error(x, theirs, mask)).tolist())
    return _over_seeds(values)


QUANTITIES: dict[str, Callable[..., Evidence]] = {
    f.__name__: f
    for f in (
        score_difference, end_of_search, spread_of_ends, late_change, search_share, smallest_eigenvalue, folding_share, excess_of_eq_17, start_share,
        gradient_to_noise, largest_rise, first_divergence, change_of_divergence, change_of_energy_gap, disagreement_of_long_runs, divergence_difference, residual_left, inpainting_difference,
        inpainting_against_fill, interior_optimum,
        layer_lead, layer_contrast,
    )
}  # fmt: skip
UNITS = dict.fromkeys(QUANTITIES, "") | {
    "end_of_search": "log δ", "spread_of_ends": "log δ", "late_change": "log δ", "search_share": "share of time", "smallest_eigenvalue": "log₁₀", "folding_share": "share of images",
    "excess_of_eq_17": "nats per latent", "start_share": "share of variance", "gradient_to_noise": "log ratio", "largest_rise": "nats",
    "first_divergence": "nats per latent", "change_of_divergence": "nats per latent", "divergence_difference": "nats per latent",
    "change_of_energy_gap": "nats per latent", "disagreement_of_long_runs": "nats per latent",
    "residual_left": "ratio", "inpainting_difference": "MSE", "inpainting_against_fill": "MSE", "interior_optimum": "nats per latent", "layer_lead": "share told", "layer_contrast": "share told",
}  # fmt: skip


def over(values: Sequence[float], of: str) -> Evidence:
    """The mean of independent values with Student's interval, infinite where they show no spread. of: such as "seeds".

    Raises ValueError unless there is a value, and all are finite numbers.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"values={values!r} must be a sequence of at least one number")
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v)]:
        raise ValueError(f"values hold {wrong[0]!r}; leave out what is no finite number")
    n = len(values)
    # the same point of a grid for all seeds, but for rounding, says nothing about the next one
    if n == 1 or max(values) - min(values) <= 1e-9 * max(map(abs, values)):
        return Evidence(values[0], -math.inf, math.inf, f"{n} {of if n > 1 else of.removesuffix('s')}")
    return _interval(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n), n - 1, f"{n} {of}")


def _over_seeds(values: Sequence[Sequence[float]]) -> Evidence:
    """The mean over seeds of their means over images; of one seed, whose interval is over images."""
    if not values:
        return NO_COMMON_SEED
    if len(values) > 1:
        return over([statistics.fmean(of_seed) for of_seed in values], "seeds")
    return over(values[0], "images")._replace(of="1 seed, over images")


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


def _system(folder: Path, n_images: int, snapshot: int | None = None, split: str = "test") -> tuple[System, Tensor]:
    """The system of a run, trained or as it was at a snapshot, and the first images of a split of its data."""
    from .data import load, to_unit_range
    from .experiment import load_run

    system, metrics, _ = load_run(folder, snapshot=snapshot)
    return system, to_unit_range(getattr(load(metrics["config"]["dataset"]), split).images[:n_images])


def _snapshots(folder: Path) -> list[int]:
    return sorted(verified_metrics(folder)["config"]["snapshots"])


def _ends(folder: Path, sigma: str) -> list[tuple[int, bool]]:
    """The first and the last snapshot, and whether the final sigma is to replace that in force; after the last update they are the same."""
    updates, n_updates = _snapshots(folder), verified_metrics(folder)["config"]["n_updates"]
    return [(update, sigma == "final" and update < n_updates) for update in (updates[0], updates[-1])]


def _in_force(folder: Path, system: System, update: int) -> tuple[float, Tensor]:
    """sigma and s after so many updates of a training with one s."""
    sigma = system.sigma_at(update / verified_metrics(folder)["config"]["n_updates"])
    return sigma, system.step_size * (sigma / system.sigma) ** 2


def _posterior(folder: Path, n_images: int) -> tuple[Posterior, System]:
    """The posterior of the first test images, and the trained system."""
    from .posterior import Posterior

    system, x = _system(folder, n_images)
    return Posterior(system.generator, x, system.sigma), system


def _short_run(folder: Path, n_images: int) -> tuple[Posterior, Chain]:
    """The posterior of the first test images, and a short run with its trajectory."""
    import torch

    from .langevin import short_run

    posterior, system = _posterior(folder, n_images)
    rng = torch.Generator().manual_seed(0)
    return posterior, short_run(posterior, system.n_steps, system.step_size, rng=rng, keep_trajectory=True)


def _inpainted(folder: Path, n_images: int, hidden: str, n_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first test images, which of their pixels are observed, and inpaintings of each [n_draws, n, C, H, W]."""
    import torch

    from .evaluation.inpainting import inpaintings, observed_mask

    system, x = _system(folder, n_images)
    kind, rate = HIDDEN[hidden]
    rng = torch.Generator().manual_seed(0)
    mask = observed_mask(kind, n_images, tuple(x.shape[1:]), rate, rng)
    return x, mask, inpaintings(system, x, mask, n_draws, rng)


@functools.cache
def _told_by_layers(folder: Path, n_images: int) -> list[dict[str, float]]:
    """What the noises of each layer (those of a ladder generator are its latents) tell of the factors of test images, top layer first.

    Nothing where the data set has no factors.
    """
    import torch

    from .data import load
    from .evaluation.factors import inferred_layers, known_factors, told

    test = load(verified_metrics(folder)["config"]["dataset"]).test
    if not test.factors:
        return []
    system, x = _system(folder, n_images)
    factors = known_factors({name: values[:n_images] for name, values in test.factors.items()})
    layers = inferred_layers(system, x, torch.Generator().manual_seed(0), noises=True)
    return [told(layer, factors, rng=torch.Generator().manual_seed(0)) for layer in layers]


@functools.lru_cache(maxsize=4)
def _jacobians(folder: Path, n_images: int) -> tuple[Chain, Tensor]:
    """A short run for each of the first test images, and the Jacobians [K, n, d, d] of its steps."""
    from .entropy import step_jacobians

    posterior, chain = _short_run(folder, n_images)
    return chain, step_jacobians(posterior, chain)


@functools.lru_cache(maxsize=64)
def _divergences(
    folder: Path, n_images: int, update: int | None = None, final: bool = False, steps_of: Path | None = None
) -> list[float]:
    """KL(q_s || p) per latent for the first test images: of the generator of a run, after so many updates.

    final : with the final sigma and s, and not those in force; steps_of : with K, sigma and s of that run.
    """
    from .evaluation.mismatch import short_run_divergence

    posterior, n_steps, s, rng = _inference(folder, n_images, update, final, steps_of)
    found = short_run_divergence(posterior, n_steps, s, rng=rng)
    return (found / posterior.generator.latent_dim).tolist()


@functools.lru_cache(maxsize=64)
def _energy_gaps(folder: Path, n_images: int, update: int, final: bool = False) -> tuple[list[float], list[float]]:
    """For the first test images after so many updates, per latent: the energy gap of short runs, and the disagreement of long runs."""
    from .evaluation.mismatch import energy_gap

    posterior, n_steps, s, rng = _inference(folder, n_images, update, final)
    found = energy_gap(posterior, n_steps, s, rng=rng)
    gap, disagreement = (
        (values / posterior.generator.latent_dim).tolist() for values in (found.gap, found.disagreement)
    )
    return gap, disagreement


def _inference(
    folder: Path, n_images: int, update: int | None = None, final: bool = False, steps_of: Path | None = None
) -> tuple[Posterior, int, Tensor, torch.Generator]:
    """Posterior, K and s of short runs on the first test images, as in `_divergences`, and the random numbers for all of it."""
    import torch

    from .posterior import Posterior

    system, x = _system(folder, n_images, update)
    dynamics = system if steps_of in (None, folder) else _system(steps_of, 1)[0]
    in_force = update is not None and not final
    sigma, s = _in_force(folder, system, update) if in_force else (dynamics.sigma, dynamics.step_size)
    return Posterior(system.generator, x, sigma), dynamics.n_steps, s, torch.Generator().manual_seed(0)


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
