"""How far short runs end from the posterior, and how far learning is from the solution of its equation.

    KL(q_k || p(e|x)) = E_{q_k}[log q_k(e) - log p(x, e)] + log p(x),    k = 0, ..., K               Eq. (19); sections 4.1, 4.5
    G = (1/n) sum_i E_{q_s(e_i|x_i)}[d/dtheta log p_theta(x_i, e_i)],    G = 0 at the fixed point    Eq. (26)
    |G|^2 = E [|sum_b g_b|^2 - sum_b |g_b|^2] / (B (B - 1)),    g_b the mean gradient of batch b of B

log q_k is that of `entropy.linear_noise`, log p(x) that of annealed importance sampling. Where steps overshoot the first takes
q_k for wider than it is, and the second is too low on average: both make a divergence look smaller, and both are exact in
the limit for a linear generator. |g_b|^2 holds the noise of a batch; the products of different batches do not.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..entropy import step_jacobians
from ..generators import Generator, check_whole, given_or_fresh
from ..langevin import short_run
from ..posterior import Posterior
from .likelihood import annealed_importance_sampling, tune_annealing

# Annealing: images of the pilot run, temperatures, chains of an image, leapfrog steps of a move.
N_PILOT, N_TEMPERATURES, N_ANNEALED, N_LEAPFROG = 2, 100, 4, 4


def objective_by_steps(
    posterior: Posterior, n_steps: int, step_size: float | Tensor, rng: torch.Generator | None = None
) -> Tensor:
    """log q_k - log p(x, e_k) for k = 0, ..., K along one chain of each image, in nats: [K + 1, n], float64.

    Its mean over chains is KL(q_k || p(e|x)) - log p(x), so that differences in k are those of the divergence, at the same
    e_0 and eps. The last row is `kl_objective` with `linear_noise`.

    step_size : s of Eq. (10), a number or one for each step, [K, 1, 1]. Raises ValueError where latents differ in it.
    """
    chain = short_run(posterior, n_steps, step_size, rng=rng, keep_trajectory=True)
    log_dets = noise_log_dets(step_jacobians(posterior, chain), chain.step_size)
    entropy = 0.5 * (log_dets + chain.initial.shape[1] * math.log(2 * math.pi * math.e))
    with torch.no_grad():
        log_joint = torch.stack([posterior.log_joint(e).double() for e in chain.trajectory])
    return -entropy - log_joint


def noise_log_dets(jacobians: Tensor, step_size: Tensor) -> Tensor:
    """log det S_k for k = 0, ..., K, with S_0 = I and S_{k+1} = A_k S_k A_k' + 2 s_k I: [K + 1, n], float64.

    jacobians : A_k = I + s_k H_k, [K, n, d, d]; step_size : s, [] or [K, 1, 1]. Raises ValueError where latents differ in it.
    """
    if any(size > 1 for size in step_size.shape[-2:]):
        raise ValueError(f"step_size has shape {tuple(step_size.shape)}; give a number, or one per step [K, 1, 1]")
    n_steps, n, d, _ = jacobians.shape
    eye = torch.eye(d, dtype=jacobians.dtype, device=jacobians.device).expand(n, d, d)
    root, log_dets = eye, [torch.zeros_like(eye[:, 0, 0])]  # S_k = root root', and root triangular
    for s, jacobian in zip(step_size.double().flatten().expand(n_steps), jacobians):
        both = torch.cat([jacobian @ root, (2 * s).sqrt() * eye], -1)
        root = torch.linalg.qr(both.mT, mode="r")[1].mT
        log_dets.append(2 * root.diagonal(dim1=1, dim2=2).abs().log().sum(1))
    return torch.stack(log_dets)


def log_marginal(posterior: Posterior, rng: torch.Generator | None = None) -> Tensor:
    """log p(x) of each image in nats, from below: [n], float64. One path of temperatures, tuned on the first images, serves all."""
    rng = given_or_fresh(rng)
    pilot = tune_annealing(posterior[:N_PILOT], N_TEMPERATURES, rng, N_LEAPFROG)
    steps = pilot.leapfrog_step.amin(1, keepdim=True).expand(-1, len(posterior))
    annealing = replace(pilot, leapfrog_step=steps)
    return annealed_importance_sampling(posterior, n_chains=N_ANNEALED, rng=rng, annealing=annealing).estimate


def short_run_divergence(
    posterior: Posterior, n_steps: int, step_size: float | Tensor, n_chains: int = 1, rng: torch.Generator | None = None
) -> Tensor:
    """KL(q_s || p(e|x)) of each image in nats, by `n_chains` short runs and annealed importance sampling: [n], float64."""
    rng = given_or_fresh(rng)
    chains = posterior.repeated(n_chains)
    objective = objective_by_steps(chains, n_steps, step_size, rng)[-1].unflatten(0, (-1, n_chains)).mean(1)
    return objective + log_marginal(posterior, rng)


def mean_gradients(
    generator: Generator,
    images: Tensor,
    sigma: float,
    n_steps: int,
    step_size: float | Tensor,
    n_batches: int,
    rng: torch.Generator | None = None,
) -> Tensor:
    """sigma^2 d/dtheta log p_theta(x, e_K), averaged over each of B batches of `images` [n, C, H, W]: [B, P], float64.

    P counts the parameters. The factor leaves the gradient of -|x - g(e)|^2 / 2, which an annealed sigma does not scale.
    One short run infers e_K of each image, as in line 3 of Algorithm 1; images of [-1, 1].
    """
    check_whole("n_batches", n_batches, 2)
    if len(images) < n_batches:
        raise ValueError(f"{len(images)} images cannot make n_batches={n_batches} batches; give more images")
    rng = given_or_fresh(rng)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    rows = []
    for x in images.tensor_split(n_batches):
        posterior = Posterior(generator, x, sigma)
        e = short_run(posterior, n_steps, step_size, rng=rng).final
        with torch.enable_grad():
            gradient = torch.autograd.grad(posterior.log_joint(e).mean(), parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(gradient, parameters)]
            )
        )
    return sigma**2 * torch.stack(rows).double()


def squared_norm_of_mean(gradients: Tensor) -> Tensor:
    """|G|^2 without the noise of the B batches in gradients [B, P], unbiased, so that it can come out negative: a number."""
    n = len(gradients)
    check_whole("n_batches", n, 2)
    return (gradients.sum(0).square().sum() - gradients.square().sum()) / (n * (n - 1))
