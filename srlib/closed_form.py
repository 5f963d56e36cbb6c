"""Everything that is exact for a linear generator g(e) = W e + b.

    p(e | x) = N(mu, P^-1),       P = I + W' M W / sigma^2,       P mu = W' M (x - b) / sigma^2,   M = diag(mask)
    q_s      = N(m_K, S_K),       m_{k+1} = m_k + D_k P (mu - m_k),       m_0 = 0,
                                  S_{k+1} = (I - D_k P) S_k (I - D_k P)' + 2 D_k,   S_0 = I,       Eq. (10)
    log p(x) = log N(x; b, W W' + sigma^2 I) over the observed pixels

with D_k = diag(s_k). All of it is computed in float64, whatever the generator's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .generators import LinearGenerator, check_whole
from .langevin import validated_step_size
from .posterior import Posterior


class ClosedForm:
    """The exact posterior, short run distribution and likelihood of a `Posterior` over a `LinearGenerator`."""

    def __init__(self, posterior: Posterior) -> None:
        generator = posterior.generator
        if not isinstance(generator, LinearGenerator):
            raise ValueError(f"closed forms exist for a LinearGenerator, not for a {type(generator).__name__}")
        n, self.variance = len(posterior), posterior.sigma**2
        x = posterior.x.detach().double().reshape(n, -1)
        self.mask = torch.ones_like(x)
        if posterior.mask is not None:
            self.mask = posterior.mask.double().expand_as(posterior.x).reshape(n, -1)
        self.weight, bias = generator.weight.detach().double(), generator.bias.detach().double()
        self.difference = self.mask * (x - bias)
        eye = torch.eye(generator.latent_dim, dtype=torch.float64, device=x.device)
        observed_weight = self.mask[:, :, None] * self.weight  # [n, D, d]
        self.precision = eye + self.weight.T @ observed_weight / self.variance  # P [n, d, d]
        self.shift = self.difference @ self.weight / self.variance  # P mu [n, d]

    def posterior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean [n, d] and covariance [n, d, d] of p(e | x)."""
        covariance = torch.linalg.inv(self.precision)
        return torch.linalg.solve(self.precision, self.shift), 0.5 * (covariance + covariance.mT)

    def short_run_moments(self, step_size: float | Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
        """Mean [n, d] and covariance [n, d, d] of q_s, the law of e_K under Eq. (10); step_size as in `short_run`."""
        check_whole("n_steps", n_steps)
        n, d = self.shift.shape
        steps = validated_step_size(step_size, (n_steps, n, d), self.shift).expand(n_steps, n, d)
        eye = torch.eye(d, dtype=torch.float64, device=self.shift.device)
        mean, covariance = torch.zeros_like(self.shift), eye.expand(n, d, d)
        for s in steps:
            drift = self.shift - (self.precision @ mean[:, :, None]).squeeze(2)
            factor = eye - s[:, :, None] * self.precision
            mean = mean + s * drift
            covariance = factor @ covariance @ factor.mT + torch.diag_embed(2 * s)
        return mean, 0.5 * (covariance + covariance.mT)

    def short_run_kl(self, step_size: float | Tensor, n_steps: int) -> Tensor:
        """KL(q_s || p(e | x)) of Eq. (18): [n]; inf where overshooting steps take the moments beyond float64."""
        mean, covariance = self.short_run_moments(step_size, n_steps)
        gap = mean - torch.linalg.solve(self.precision, self.shift)
        trace = (self.precision * covariance).sum((1, 2))
        distance = torch.einsum("ni,nij,nj->n", gap, self.precision, gap)
        log_dets = torch.linalg.slogdet(covariance)[1] + torch.linalg.slogdet(self.precision)[1]
        kl = 0.5 * (trace + distance - self.shift.shape[1] - log_dets)
        return torch.where((trace + distance).isfinite(), kl, math.inf)  # beside them the logarithm counts for nothing

    def log_marginal(self) -> Tensor:
        """log p(x) over the observed pixels: [n]. Uses the d x d forms of determinant and inverse (Woodbury)."""
        n_observed = self.mask.sum(1)
        log_det = torch.linalg.slogdet(self.precision)[1] + n_observed * math.log(self.variance)
        explained = (self.shift * torch.linalg.solve(self.precision, self.shift)).sum(1)
        misfit = self.difference.square().sum(1) / self.variance - explained
        return -0.5 * (misfit + log_det + n_observed * math.log(2 * math.pi))
