"""What is measured on trained systems for claims: their posteriors, chains, divergences, layers and inpaintings.

Each measurement is a function of the folder of a run, or of several with the same seed, and returns one value per test image, or a
single one; `measured` makes it a quantity of all seeds, in the unit that is named.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .evidence import Evidence, Values, mean_of_factors, mean_over_seeds, measured, share_of_images
from .experiment import verified_metrics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .langevin import Chain
    from .posterior import Posterior
    from .system import System

GRID = tuple(2 ** (i / 2) for i in range(-4, 5))  # times the noise scale of a run
HIDDEN = {"75 % scattered": ("pixels", 0.75), "left half": ("left", 0.5)}  # as in the chapter on inpainting
PER_LATENT = "nats per latent"


@measured("log₁₀")
def smallest_eigenvalue(folder: Path, n_images: int) -> Values:
    """log10 of the smallest |eigenvalue| of dz_K/dz_0 (section 4.2), the product of the steps' Jacobians, by test image.

    It is taken from the largest one of the product of their inverses: in the product itself rounding would hide it.
    """
    import torch

    steps = torch.linalg.inv(_jacobians(folder, n_images)[1].double())
    whole = functools.reduce(lambda before, step: before @ step, steps)
    return (-torch.linalg.eigvals(whole).abs().amax(-1).log10()).tolist()


@measured("share of images", share_of_images)
def folding_share(folder: Path, n_images: int, n_starts: int = 2) -> Values:
    """1 for the test images for which det dF/de_0 has both signs over random starts at the same noise, 0 for the others.

    A continuous one-to-one map has one sign, so that for the former some distinct starts have the same end.
    """
    import torch

    from .entropy import step_jacobians
    from .langevin import short_run

    posterior, system = _posterior(folder, n_images)
    rng = torch.Generator().manual_seed(0)
    starts = system.generator.sample_prior(n_images * n_starts, rng)
    noise = torch.randn(system.n_steps, n_images, starts.shape[1], generator=rng, dtype=starts.dtype)
    copies, noise = posterior.repeated(n_starts), noise.repeat_interleave(n_starts, 1)
    chain = short_run(copies, system.n_steps, system.step_size, starts, noise, keep_trajectory=True)
    signs = torch.linalg.slogdet(step_jacobians(copies, chain))[0].prod(0).unflatten(0, (n_images, n_starts))
    return (signs.amin(1) < signs.amax(1)).double().tolist()


@measured(PER_LATENT)
def excess_of_eq_17(folder: Path, n_images: int) -> Values:
    """E log q_s by Eq. (17) with one draw, minus that which counts the noise's entropy (`linear_noise`), in nats per latent."""
    import torch

    from .evaluation.mismatch import noise_log_dets

    chain, jacobians = _jacobians(folder, n_images)
    # log p(e_0) and the constant of log det S_K have the same mean, that of a Gaussian's entropy
    by_eq_17 = -torch.linalg.slogdet(jacobians)[1].sum(0)
    with_noise = -0.5 * noise_log_dets(jacobians, chain.step_size)[-1]
    return ((by_eq_17 - with_noise) / jacobians.shape[-1]).tolist()


@measured("share of variance")
def start_share(folder: Path, n_images: int, n_draws: int = 12) -> Values:
    """Share of the variance of z_K, summed over latents, that is due to z_0 alone; for each of the first test images.

    All pairs of n_draws starts and n_draws noises; unbiased components of variance of the balanced two-way layout.
    """
    import torch

    from .langevin import short_run
    from .posterior import Posterior

    system, x = _system(folder, n_images)
    rng = torch.Generator().manual_seed(0)
    shares = []
    for image in x:
        starts = system.generator.sample_prior(n_draws, rng).repeat_interleave(n_draws, 0)
        noises = torch.randn(system.n_steps, n_draws, starts.shape[1], generator=rng, dtype=starts.dtype)
        noises = noises.repeat(1, n_draws, 1)
        posterior = Posterior(system.generator, image.expand(len(starts), -1, -1, -1), system.sigma)
        e = short_run(posterior, system.n_steps, system.step_size, starts, noises).final
        shares.append(_start_share(e.reshape(n_draws, n_draws, -1)))
    return shares


@measured("log ratio")
def gradient_to_noise(folder: Path, n_images: int) -> Values:
    """log of the length of the gradient term, s grad log p, over that of the noise, sqrt(2 s d), at the last step, by test image."""
    posterior, chain = _short_run(folder, n_images)
    e = chain.trajectory[-2]
    s = chain.step_size.expand(chain.n_steps, *e.shape)[-1]
    noise = (2 * s).sum(1).sqrt()
    return ((s * posterior.score(e)).norm(dim=1) / noise).log().tolist()


@measured("share told", mean_of_factors)
def layer_lead(folder: Path, factors: Sequence[str], layer: int, n_probed: int) -> Values:
    """What layer z_l tells of known factors, in their mean, minus what the best other layer tells (`evaluation.factors.told`).

    layer : l, from 1, which is the one that is nearest to the image; n_probed : test images whose latents are inferred. Nothing
    where images have no factors.
    """
    shares = _told_by_layers(folder, n_probed)
    means = [statistics.fmean(of_layer[name] for name in factors) for of_layer in shares]
    return [means.pop(len(means) - layer) - max(means)] if means else []


@measured("share told", mean_of_factors)
def layer_contrast(folder: Path, *others: Path, first: str, second: str, n_probed: int) -> Values:
    """How far layers specialise in one factor or another, minus that of other runs; nothing where images have no factors.

    It is the largest c such that one layer's noises tell more of `first` by c than another's, and these more of `second` by c.
    """
    told = [_told_by_layers(run, n_probed) for run in (folder, *others)]
    if not all(told):
        return []
    contrast, *rest = (
        max(min(a[first] - b[first], b[second] - a[second]) for a, b in itertools.permutations(shares, 2))
        for shares in told
    )
    return [contrast - sum(rest)]


@measured("nats")
def largest_rise(folder: Path, n_images: int, n_chains: int = 16) -> Values:
    """Largest change of KL(q_k || p) from one step to the next, in nats: of the step that is the worst on every other image,
    on the images between."""
    import torch

    from .evaluation.mismatch import objective_by_steps

    posterior, system = _posterior(folder, n_images)
    rng = torch.Generator().manual_seed(0)
    changes = objective_by_steps(posterior, system.n_steps, system.step_size, n_chains, rng).diff(dim=0)
    worst = changes[:, ::2].mean(1).argmax()
    return changes[worst, 1::2].tolist()


@measured(PER_LATENT)
def interior_optimum(folder: Path, n_images: int, estimator: str = "linear_noise") -> Values:
    """The objective of Eq. (20) at the better of the two ends of a grid of step sizes, from a quarter of the run's own noise scale to four
    times it, minus that at the best point between them, in nats per latent. Both are chosen on every other image and judged on the others.
    """
    import torch

    from .step_size import TOO_LARGE, kl_objective

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
    return (grid[end, 1::2] - grid[best, 1::2]).tolist()


@measured(PER_LATENT)
def first_divergence(folder: Path, n_images: int) -> Values:
    """KL(q_s || p) at the first snapshot of the training, with the sigma and s in force there, in nats per latent."""
    return _divergences(folder, n_images, _snapshots(folder)[0])


@measured(PER_LATENT)
def change_of_divergence(folder: Path, n_images: int, sigma: str) -> Values:
    """KL(q_s || p) at the last snapshot minus that at the first, in nats per latent, by test image.

    sigma : "in force" at each, or "final", which takes the last one (and the s that belongs to it) for both.
    """
    first, last = (_divergences(folder, n_images, *end) for end in _ends(folder, sigma))
    return [after - before for before, after in zip(first, last)]


@measured(PER_LATENT)
def change_of_energy_gap(folder: Path, n_images: int, sigma: str) -> Values:
    """How much higher -log p(x, e) is where short runs end than in long exact runs, at the last snapshot minus at the first.

    In nats per latent, by test image; sigma as in `change_of_divergence`.
    """
    first, last = (_energy_gaps(folder, n_images, *end)[0] for end in _ends(folder, sigma))
    return [after - before for before, after in zip(first, last)]


@measured(PER_LATENT)
def disagreement_of_long_runs(folder: Path, n_images: int, snapshot: str) -> Values:
    """Mean -log p(x, e) of long runs from the prior minus that of those from the ends of short runs, in nats per latent, by test image.

    snapshot : "first" or "last", with the sigma in force there.
    """
    at = {"first": 0, "last": -1}[snapshot]
    return _energy_gaps(folder, n_images, _snapshots(folder)[at])[1]


@measured(PER_LATENT)
def divergence_difference(ours: Path, theirs: Path, n_images: int) -> Values:
    """KL(q_s || p) of our generator minus that of theirs, with our K, s and sigma for both, in nats per latent, by test image."""
    pair = (_divergences(folder, n_images, steps_of=ours) for folder in (ours, theirs))
    return [our - their for our, their in zip(*pair)]


@measured("ratio", mean_over_seeds)
def residual_left(folder: Path, n_images: int, n_batches: int = 20) -> Values:
    """Squared norm of the left-hand side of Eq. (26) at the last snapshot over that at the first, on training images.

    Both times sigma^2, which is annealed, and without the noise of images and chains.
    """
    import torch

    from .evaluation.mismatch import mean_gradients, squared_norm_of_mean

    norms = []
    for update in (_snapshots(folder)[0], _snapshots(folder)[-1]):
        system, x = _system(folder, n_images, update, "train")
        sigma, s = _in_force(folder, system, update)
        rng = torch.Generator().manual_seed(0)
        gradients = mean_gradients(system.generator, x, sigma, system.n_steps, s, min(n_batches, n_images), rng)
        norms.append(squared_norm_of_mean(gradients).item())
    return [norms[1] / norms[0]]


@measured("MSE")
def inpainting_difference(ours: Path, theirs: Path, n_images: int, hidden: str) -> Values:
    """Our mean squared error per hidden pixel of one inpainting minus theirs, by test image. hidden : one of HIDDEN."""
    from .evaluation.inpainting import hidden_squared_error

    errors = []
    for folder in (ours, theirs):
        x, mask, draws = _inpainted(folder, n_images, hidden, 1)
        errors.append(hidden_squared_error(x, draws[0], mask))
    return (errors[0] - errors[1]).tolist()


@measured("MSE")
def inpainting_against_fill(folder: Path, n_images: int, hidden: str, fill: str) -> Values:
    """Our mean squared error per hidden pixel minus that of pixels taken from training images, by test image.

    Like is compared with like: one inpainting with one image, the mean of several with a mean.

    hidden : one of HIDDEN; fill : the "mean" training image, or the one that is "nearest" where pixels are observed.
    """
    from .data import load, to_unit_range
    from .evaluation.inpainting import hidden_squared_error, mean_fill, nearest_fill

    take_from, n_draws = {"mean": (mean_fill, 8), "nearest": (nearest_fill, 1)}[fill]
    x, mask, draws = _inpainted(folder, n_images, hidden, n_draws)
    training = to_unit_range(load(verified_metrics(folder)["config"]["dataset"]).train.images)
    ours, theirs = draws.mean(0), take_from(x, mask, training)
    return (hidden_squared_error(x, ours, mask) - hidden_squared_error(x, theirs, mask)).tolist()


@measured("MSE")
def tuned_difference(short: Path, long: Path, n_images: int, n_evaluations: int, n_chosen: int = 8) -> Values:
    """The squared error of inference by a `Variant` with all its numbers chosen for the first run's model and K, minus the second run's own.

    They are chosen by the KL divergence on `n_chosen` training images: the step size, then all of them from there, with
    `n_evaluations` each at most (`variants.choose_variant`). Errors are of test images.
    """
    import torch

    from .variants import Variant, choose_variant, mean_precision, run_variant

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    few, system = _posterior(short, min(n_chosen, n_images), "train")
    precision = mean_precision(few, system.infer(few.x, rng=seeded(0)))
    variant = Variant(float(system.step_size))
    for free in (("step_size",), ("step_size", "ratio", "momentum", "heat", "power")):
        variant, _ = choose_variant(few, variant, free, system.n_steps, precision, seeded(2), n_evaluations)
    posterior, _ = _posterior(short, n_images)
    tuned = run_variant(posterior, variant, system.n_steps, precision, rng=seeded(1))[-1]
    others, longer = _posterior(long, n_images)
    own = longer.infer(others.x, rng=seeded(1))
    ours, theirs = (p.residual(e).square().flatten(1).mean(1) for p, e in ((posterior, tuned), (others, own)))
    return (ours - theirs).tolist()


MEASURED: dict[str, Callable[..., Evidence]] = {
    f.__name__: f
    for f in (
        smallest_eigenvalue, folding_share, excess_of_eq_17, start_share, gradient_to_noise, layer_lead, layer_contrast, largest_rise,
        interior_optimum, first_divergence, change_of_divergence, change_of_energy_gap, disagreement_of_long_runs,
        divergence_difference, residual_left, inpainting_difference, inpainting_against_fill, tuned_difference,
    )
}  # fmt: skip


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


def _posterior(folder: Path, n_images: int, split: str = "test") -> tuple[Posterior, System]:
    """The posterior of the first images of a split, and the trained system."""
    from .posterior import Posterior

    system, x = _system(folder, n_images, split=split)
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
    mask = observed_mask(kind, len(x), tuple(x.shape[1:]), rate, rng)
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
