"""The law of a short run and its KL by brute force, for latents of one or two dimensions.

    q_{k+1}(e') = integral of N(e'; e + s_k score(e), 2 s_k I) q_k(e) de,    q_0 = N(0, I)          Eq. (10)
    KL(q_s || p(e | x)) = E_q log q_s(e) - E_q log p(x, e) + log p(x),       log p(x) = log of the integral of p(x, e) de

on an evenly spaced grid, in float64. Nothing is assumed of the generator: the chain may overshoot, fold, be far from
Gaussian. Sums over an even grid (the trapezoid rule with vanishing ends) of smooth, decaying functions err by about
exp(-2 pi^2 (width / spacing)^2) only, so a grid that resolves the kernel gives all of this to about 1e-6, and one that
does not is refused. In two dimensions the kernel, given the point it comes from, is a product over the two axes, so a
step is one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .generators import check_positive, check_whole
from .langevin import validated_step_size
from .posterior import Posterior

# Mass that may leave the grid, or lie where the grid does not resolve the kernel.
TOLERATED_MASS = 1e-6
# Largest spacing of the grid in standard deviations of what is summed: exp(-2 pi^2 / 1.2^2) is 1e-6.
COARSEST_SPACING = 1.2
# Images that go through the generator at once.
POINTS_AT_ONCE = 8192


@dataclass(frozen=True)
class GridDensity:
    """What `short_run_density` returns; all float64.

    grid : the points [N, d]; N = m or m_1 m_2, the last axis fastest.
    density : q_s at the points, [N]; `posterior_density` p(e | x), likewise.
    volume : of a cell, so that (density * volume).sum() is 1.
    entropy, energy : -E_q log q_s and E_q log p(x, e).
    log_marginal, kl : log p(x), and KL(q_s || p(e | x)) = log_marginal - energy - entropy.
    lost_mass : probability that a chain left the grid, at most 1e-6.
    """

    grid: Tensor
    density: Tensor
    posterior_density: Tensor
    volume: float
    entropy: float
    energy: float
    log_marginal: float
    kl: float
    lost_mass: float


def regular_axes(latent_dim: int, bound: float, n_points: int) -> tuple[Tensor, ...]:
    """The same even grid -bound, ..., bound of n_points for each latent: latent_dim tensors [n_points], float64."""
    check_whole("latent_dim", latent_dim)
    check_positive("bound", bound)
    check_whole("n_points", n_points, 3)
    return (torch.linspace(-bound, bound, n_points, dtype=torch.float64),) * latent_dim


def short_run_density(
    posterior: Posterior, step_size: float | Tensor, n_steps: int, axes: Sequence[Tensor]
) -> GridDensity:
    """q_s of Eq. (10) for one image, on the grid of all pairs of points of `axes`, and its KL (Eq. 18).

    posterior : of one image, under a generator with one or two latents.
    step_size : s as in `short_run`, broadcastable to [K, 1, d].
    axes : d even, increasing grids (`regular_axes`); about 6 standard deviations of the prior each way, wider where
        steps overshoot. 2,000 points are quick in 1-D, 201 x 201 take about 0.1 s a step in 2-D.

    Raises ValueError for more than two latents or one image, for a grid that more than 1e-6 of the mass leaves, and for
    one that does not resolve the kernel; the message says what would.
    """
    check_whole("n_steps", n_steps)
    d = posterior.generator.latent_dim
    if d > 2:
        raise ValueError(f"brute force is for 1 or 2 latents, this generator has {d}; use annealed importance sampling")
    if len(posterior) != 1:
        raise ValueError(f"brute force takes one image at a time, not {len(posterior)}; posterior[:1] is the first")
    axes, spacing = _checked_axes(axes, d)
    sizes, volume = [len(axis) for axis in axes], math.prod(spacing)
    grid = torch.cartesian_prod(*axes).reshape(-1, d)
    log_joint, score = _on_grid(posterior, grid)
    log_marginal = (log_joint.logsumexp(0) + math.log(volume)).item()
    posterior_density = (log_joint - log_marginal).exp()
    edge = _edge(sizes)
    _refuse_lost((posterior_density[edge].sum() * volume).item(), "the posterior", axes)

    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    density = normal.log_prob(grid).sum(1).exp()
    lost = 1 - math.prod((normal.cdf(axis[-1]) - normal.cdf(axis[0])).item() for axis in axes)
    _refuse_lost(lost, "the prior", axes)
    steps = validated_step_size(step_size, (n_steps, 1, d), score).detach().expand(n_steps, 1, d)
    for k, s in enumerate(steps[:, 0]):
        if k == 0 or not torch.equal(s, steps[k - 1, 0]):
            mean, std = grid + s * score, (2 * s).sqrt()
            width = _spacing_in_deviations(mean, std, sizes, spacing)
            staying = _probability_of_staying(mean, std, axes)
            kernels = [
                torch.distributions.Normal(mean[:, i], std[i]).log_prob(axis[:, None]).exp()
                for i, axis in enumerate(axes)
            ]
        mass = density * volume
        _refuse_unresolved(mass, width, min(spacing), k)
        lost += (mass * (1 - staying)).sum().item()
        _refuse_lost(lost, f"the chain, by step {k},", axes)
        density = kernels[0] @ mass if d == 1 else ((kernels[0] * mass) @ kernels[1].T).flatten()

    mass = density * volume
    entropy = -torch.special.xlogy(mass, density).sum().item()
    energy = (mass * log_joint).sum().item()
    kl = log_marginal - energy - entropy
    return GridDensity(grid, density, posterior_density, volume, entropy, energy, log_marginal, kl, lost)


def _on_grid(posterior: Posterior, grid: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, e) [N] and the score [N, d] at the grid's points, float64."""
    log_joint, score = [], []
    for points in grid.to(posterior.x).split(POINTS_AT_ONCE):
        copies = posterior[torch.zeros(len(points), dtype=torch.long)]
        with torch.no_grad():
            log_joint.append(copies.log_joint(points).double())
        score.append(copies.score(points).double())
    return torch.cat(log_joint), torch.cat(score)


def _spacing_in_deviations(mean: Tensor, std: Tensor, sizes: list[int], spacing: list[float]) -> Tensor:
    """How coarse the grid is at each point [N]: its spacing over the width of what is summed over it there.

    As a function of e, N(e'; mean(e), std^2) q(e) varies over std / |d mean / de| and, q being the outcome of such a
    step (or the prior), over std: neighbouring points are sqrt(|difference of means|^2 + spacing^2) / std apart.
    """
    scaled = (mean / std).reshape(*sizes, -1)
    worst = torch.zeros(sizes, dtype=mean.dtype)
    for axis, (size, h) in enumerate(zip(sizes, spacing)):
        gap = scaled.diff(dim=axis).square().sum(-1) + (h / std[axis]) ** 2
        near, far = gap.narrow(axis, 0, 1), gap.narrow(axis, size - 2, 1)
        gap = torch.maximum(torch.cat([near, gap], axis), torch.cat([gap, far], axis))
        worst = torch.maximum(worst, gap.sqrt())
    return worst.flatten()


def _probability_of_staying(mean: Tensor, std: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Probability that one step from each point ends within the grid: [N]."""
    inside = torch.ones(len(mean), dtype=mean.dtype)
    for i, axis in enumerate(axes):
        normal = torch.distributions.Normal(mean[:, i], std[i])
        inside = inside * (normal.cdf(axis[-1]) - normal.cdf(axis[0]))
    return inside


def _edge(sizes: list[int]) -> Tensor:
    """Which points lie on the border of the grid: [N] bool."""
    edge = torch.ones(sizes, dtype=torch.bool)
    edge[tuple(slice(1, -1) for _ in sizes)] = False
    return edge.flatten()


def _checked_axes(axes: Sequence[Tensor], d: int) -> tuple[list[Tensor], list[float]]:
    """The axes in float64 on the CPU, and their spacings."""
    try:
        axes = [torch.as_tensor(axis).detach().double().cpu() for axis in axes]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"axes={axes!r} must be a sequence of {d} tensors [m], as `regular_axes` makes it") from None
    if len(axes) != d or any(axis.ndim != 1 or len(axis) < 3 for axis in axes):
        raise ValueError(f"axes of shapes {[list(a.shape) for a in axes]}: {d} latents need {d} axes [m], m at least 3")
    gaps = [axis.diff() for axis in axes]
    if any(not torch.allclose(gap, gap.mean(), rtol=1e-4) or gap.mean() <= 0 for gap in gaps):
        raise ValueError("axes must increase in even steps; srlib.brute_force.regular_axes makes such")
    return axes, [gap.mean().item() for gap in gaps]


def _refuse_lost(mass: float, what: str, axes: Sequence[Tensor]) -> None:
    if not mass <= TOLERATED_MASS:
        bounds = " x ".join(f"[{axis[0].item():.3g}, {axis[-1].item():.3g}]" for axis in axes)
        raise ValueError(
            f"{mass:.1e} of the mass of {what} leaves the grid {bounds}, at most {TOLERATED_MASS:.0e} may; "
            "widen the grid, or take smaller steps where the chain overshoots"
        )


def _refuse_unresolved(mass: Tensor, width: Tensor, spacing: float, step: int) -> None:
    if mass[width > COARSEST_SPACING].sum() <= TOLERATED_MASS:
        return
    # the coarseness that all but the tolerated mass stays below
    order = width.argsort(descending=True)
    covered = int((mass[order].cumsum(0) <= TOLERATED_MASS).sum())
    needed = spacing * COARSEST_SPACING / width[order][min(covered, len(order) - 1)].item()
    raise ValueError(
        f"the grid, with spacing {spacing:.2g}, does not resolve the kernel of step {step} (its standard deviation is "
        f"sqrt(2 s), and steps spread neighbouring points apart); a spacing of {needed:.1g} or less would"
    )
