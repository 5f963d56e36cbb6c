"""q_s by brute force, for one or two latents: its density on a grid, propagated through the exact transition kernel.

    q_0 = N(0, I),    q_{k+1}(e') = integral of N(e'; e + s_k score(e), 2 s_k) q_k(e) de              Eq. (10)

The kernel's coordinates are independent given e, so in two dimensions the integral is one matrix product per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .langevin import validated_step_size
from .posterior import Posterior

# Mass that may leave the grid before the answer is refused.
TOLERATED_LOSS = 1e-6


@dataclass(frozen=True)
class GridDensity:
    """What `short_run_density` returns.

    axis : the grid points of each coordinate [N].
    points : all grid points [N^d, d].
    density, posterior : q_s and p(e|x) at the points, [N^d].
    entropy : -E_q log q_s.    energy : -E_q log p(x, e).    log_marginal : log p(x), by quadrature.
    """

    axis: Tensor
    points: Tensor
    density: Tensor
    posterior: Tensor
    entropy: float
    energy: float
    log_marginal: float

    @property
    def kl(self) -> float:
        """KL(q_s || p(e|x)), Eq. (18)."""
        return self.energy - self.entropy + self.log_marginal


def short_run_density(
    posterior: Posterior, step_size: float | Tensor, n_steps: int, side: float = 8.0, n_points: int = 401
) -> GridDensity:
    """The exact law of e_K for the one image of `posterior`, on n_points^d points in [-side, side]^d, in float64.

    step_size : as in `short_run`.

    Raises ValueError for more than one image or two latents, for a grid too coarse for the kernel, and for one that q_s leaves.
    """
    d = posterior.generator.latent_dim
    if len(posterior) != 1 or d > 2:
        raise ValueError(f"brute force takes 1 image and 1 or 2 latents, not {len(posterior)} and {d}")
    axis = torch.linspace(-side, side, n_points, dtype=torch.float64)
    spacing = (axis[1] - axis[0]).item()
    s = validated_step_size(step_size, (n_steps, 1, d), axis).expand(n_steps, 1, d)[:, 0]
    if (2 * s.min()).sqrt() < spacing:
        needed = math.ceil(2 * side / (2 * s.min().item()) ** 0.5) + 1
        raise ValueError(f"the kernel is narrower than the grid's spacing {spacing:.3g}; use n_points={needed} or more")
    points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    images = posterior[torch.zeros(len(points), dtype=torch.int64)]
    e = points.to(posterior.x.dtype)
    score = images.score(e).double()
    cell = spacing**d
    density = (-0.5 * points.square().sum(1)).exp() / (2 * math.pi) ** (d / 2)
    for s_k in s:
        kernels = []
        for i in range(d):
            gap = axis[None, :] - (points[:, i] + s_k[i] * score[:, i])[:, None]
            kernels.append((-(gap.square()) / (4 * s_k[i])).exp() / (4 * math.pi * s_k[i]).sqrt())
        weighted = (density * cell)[:, None] * kernels[0]  # [N^d, N]
        density = weighted.sum(0) if d == 1 else (weighted.T @ kernels[1]).flatten()
        if (lost := abs(1 - density.sum().item() * cell)) > TOLERATED_LOSS:
            raise ValueError(f"{lost:.1e} of the mass has left the grid [-{side}, {side}]^{d}; use a larger side")
    with torch.no_grad():
        log_joint = images.log_joint(e).double()
    log_marginal = log_joint.logsumexp(0) + math.log(cell)
    entropy = -torch.special.xlogy(density, density).sum() * cell
    energy = -(density * log_joint).sum() * cell
    posterior_density = (log_joint - log_marginal).exp()
    return GridDensity(axis, points, density, posterior_density, entropy.item(), energy.item(), log_marginal.item())
