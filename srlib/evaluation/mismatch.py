"""How far short runs end from the posterior, and how far learning is from the solution of its equation.

    KL(q_k || p(e|x)) = E_{q_k}[log q_k(e) - log p(x, e)] + log p(x),    k = 0, ..., K               Eq. (19); sections 4.1, 4.5
    G = (1/n) sum_i E_{q_s(e_i|x_i)}[d/dtheta log p_theta(x_i, e_i)],    G = 0 at the fixed point    Eq. (26)
    |G|^2 = E [|sum_b g_b|^2 - sum_b |g_b|^2] / (B (B - 1)),    g_b the mean gradient of batch b of B

log q_k is that of `entropy.linear_noise`; log p(x) is importance sampling from Gaussians at modes of the posterior. Where
steps overshoot the first takes q_k for wider than it is, and the second is too low on average: both make a divergence look
smaller, and both are exact for a linear generator. |g_b|^2 holds the noise of a batch; products of different batches do not.

    KL(q_s || p(e|x)) = U(q_s) - U(p(e|x)) - [H(q_s) - H(p(e|x))],    U(q) = E_q[-log p(x, e)], H the entropy

`energy_gap` is the difference of the U alone, which takes neither of the two estimates: that of the posterior comes from long runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..entropy import step_jacobians
from ..generators import Generator, check_tensor, check_whole, given_or_fresh
from ..langevin import short_run, validated_step_size
from ..posterior import Posterior, check_images
from ..samplers import long_run

# Starts of the ascent to modes, its steps and learning rate, and draws from the Gaussian at each mode.
N_STARTS, N_ASCENT, RATE, N_DRAWS = 8, 300, 0.1, 100


def objective_by_steps(
    posterior: Posterior, n_steps: int, step_size: float | Tensor, n_chains: int = 1, rng: torch.Generator | None = None
) -> Tensor:
    """log q_k - log p(x, e_k) for k = 0, ..., K along chains of each image, in nats: [K + 1, n], float64.

    Its mean is KL(q_k || p(e|x)) - log p(x), so that differences in k are those of the divergence, at the same e_0 and eps.
    With one chain the last row is `kl_objective` with `linear_noise`.

    step_size : s of Eq. (10), a number or one for each step, [K, 1, 1]. Raises ValueError where latents differ in it, and for other
        arguments that do not fit; `DivergenceError` for chains that left all bounds.
    n_chains : of an image, over which log p(x, e_k) is averaged, where nearly all of the noise is; log q_k is that of the first.
    """
    _check_posterior(posterior)
    copies = posterior.repeated(n_chains)
    chains = short_run(copies, n_steps, step_size, rng=rng, keep_trajectory=True)
    first = replace(
        chains,
        final=chains.final[::n_chains],
        initial=chains.initial[::n_chains],
        trajectory=chains.trajectory[:, ::n_chains],
    )
    log_dets = noise_log_dets(step_jacobians(posterior, first), chains.step_size)
    entropy = 0.5 * (log_dets + chains.initial.shape[1] * math.log(2 * math.pi * math.e))
    with torch.no_grad():
        log_joint = torch.stack([copies.log_joint(e).double() for e in chains.trajectory])
    return -entropy - log_joint.unflatten(1, (-1, n_chains)).mean(2)


def noise_log_dets(jacobians: Tensor, step_size: float | Tensor) -> Tensor:
    """log det S_k for k = 0, ..., K, with S_0 = I and S_{k+1} = A_k S_k A_k' + 2 s_k I: [K + 1, n], float64.

    jacobians : A_k = I + s_k H_k, [K, n, d, d]; step_size : s, a number, [] or [K, 1, 1]. Raises ValueError where latents differ in
        it, and for what does not fit.
    """
    check_tensor("jacobians", jacobians)
    if jacobians.ndim != 4 or jacobians.shape[-1] != jacobians.shape[-2] or not jacobians.is_floating_point():
        raise ValueError(f"jacobians are {jacobians.dtype} {tuple(jacobians.shape)}; give floats [K, n, d, d]")
    if isinstance(step_size, Tensor) and any(size > 1 for size in step_size.shape[-2:]):
        raise ValueError(f"step_size has shape {tuple(step_size.shape)}; give a number, or one per step [K, 1, 1]")
    n_steps, n, d, _ = jacobians.shape
    s = validated_step_size(step_size, (n_steps, n, d), jacobians.double())
    eye = torch.eye(d, dtype=jacobians.dtype, device=jacobians.device).expand(n, d, d)
    root, log_dets = eye, [torch.zeros_like(eye[:, 0, 0])]  # S_k = root root', and root triangular
    for s_k, jacobian in zip(s.flatten().expand(n_steps), jacobians):
        both = torch.cat([jacobian @ root, (2 * s_k).sqrt() * eye], -1)
        root = torch.linalg.qr(both.mT, mode="r")[1].mT
        log_dets.append(2 * root.diagonal(dim1=1, dim2=2).abs().log().sum(1))
    return torch.stack(log_dets)


def log_marginal(posterior: Posterior, rng: torch.Generator | None = None) -> Tensor:
    """log p(x) of each image in nats, from below on average: [n], float64.

    log of the mean of p(x, e) / r(e), e ~ r: the even mixture of N(mode, |H|^-1) at the modes to which Adam, and a step of
    Newton's method where that is higher still, climb from the prior; H = d^2/de^2 log p(e|x) there, with curvatures below
    the prior's raised to it (Laplace's method). The mean is p(x) whatever the modes are. Raises ValueError unless `posterior` is a `Posterior`.
    """
    _check_posterior(posterior)
    rng = given_or_fresh(rng)
    n, d = len(posterior), posterior.generator.latent_dim
    copies = posterior.repeated(N_STARTS)
    ends = _ascended(copies, posterior.generator.sample_prior(len(copies), rng))
    values, vectors = torch.linalg.eigh(-copies.hessian(ends).double())
    values = values.abs().clamp_min(1.0)
    newton = (vectors @ ((vectors.mT @ copies.score(ends).double()[:, :, None]) / values[:, :, None]))[:, :, 0]
    with torch.no_grad():
        higher = copies.log_joint(ends + newton.to(ends.dtype)) > copies.log_joint(ends)
    modes = (ends.double() + newton * higher[:, None]).unflatten(0, (n, -1))  # [n, M, d]
    root, vectors = values.sqrt().unflatten(0, (n, -1)), vectors.unflatten(0, (n, -1))
    normal = torch.randn(n, N_STARTS, N_DRAWS, d, generator=rng, dtype=torch.float64).to(root.device)
    draws = (modes[:, :, None] + (normal / root[:, :, None]) @ vectors.mT).flatten(1, 2)  # [n, M N_DRAWS, d]
    apart = ((draws[:, None] - modes[:, :, None]) @ vectors) * root[
        :, :, None
    ]  # [n, M, M N_DRAWS, d], each in units of each
    log_r = root.log().sum(2)[:, :, None] - 0.5 * apart.square().sum(3) - 0.5 * d * math.log(2 * math.pi)
    log_r = log_r.logsumexp(1) - math.log(N_STARTS)
    with torch.no_grad():
        log_joint = posterior.repeated(draws.shape[1]).log_joint(draws.flatten(0, 1).to(ends.dtype)).double()
    return (log_joint.view_as(log_r) - log_r).logsumexp(1) - math.log(draws.shape[1])


def _ascended(posterior: Posterior, e: Tensor) -> Tensor:
    """e [n, d] after N_ASCENT steps of Adam up log p(e|x), the last ones the smallest."""
    e = e.clone()
    adam = torch.optim.Adam([e], lr=RATE, betas=(0.8, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, N_ASCENT)
    for _ in range(N_ASCENT):
        e.grad = -posterior.score(e)
        adam.step()
        decay.step()
    return e


def short_run_divergence(
    posterior: Posterior,
    n_steps: int,
    step_size: float | Tensor,
    n_chains: int = 16,
    rng: torch.Generator | None = None,
) -> Tensor:
    """KL(q_s || p(e|x)) of each image in nats, by `n_chains` short runs and `log_marginal`: [n], float64.

    Raises as `objective_by_steps` does.
    """
    rng = given_or_fresh(rng)
    return objective_by_steps(posterior, n_steps, step_size, n_chains, rng)[-1] + log_marginal(posterior, rng)


@dataclass(frozen=True)
class EnergyGap:
    """Means of -log p(x, e) over chains of each image, in nats, compared: [n], float64.

    gap : of the ends of short runs, minus that of long runs. Positive where short runs stop too early or overshoot.
    disagreement : of the long runs from the prior, minus that of those from the ends of the short runs: 0 but for noise where long
        runs are long enough to serve as a reference.
    acceptance : of the long runs.
    """

    gap: Tensor
    disagreement: Tensor
    acceptance: Tensor


def energy_gap(
    posterior: Posterior,
    n_steps: int,
    step_size: float | Tensor,
    n_chains: int = 8,
    n_long: int = 150,
    rng: torch.Generator | None = None,
) -> EnergyGap:
    """How much higher the energy -log p(x, e) is where short runs end than in the posterior, by long runs of Hamiltonian steps.

    n_chains : short runs of an image; as many long ones start from the prior, and as many from the ends of the short ones.
    n_long : Hamiltonian steps of a long run that count (`samplers.long_run`).

    Raises ValueError for arguments that do not fit, `DivergenceError` for short runs that left all bounds.
    """
    _check_posterior(posterior)
    check_whole("n_chains", n_chains)
    check_whole("n_long", n_long, 2)
    rng, copies = given_or_fresh(rng), posterior.repeated(n_chains)
    ends = short_run(copies, n_steps, step_size, rng=rng).final
    long = [long_run(copies, n_long, initial, rng) for initial in (None, ends)]

    @torch.no_grad()
    def energy(states: Tensor) -> Tensor:
        found = torch.stack([-copies.log_joint(e).double() for e in states])
        return found.mean(0).unflatten(0, (-1, n_chains)).mean(1)

    short, from_prior, from_ends = energy(ends[None]), *(energy(run.trajectory[1:]) for run in long)
    acceptance = sum(run.acceptance for run in long).unflatten(0, (-1, n_chains)).mean(1) / 2
    return EnergyGap(short - (from_prior + from_ends) / 2, from_prior - from_ends, acceptance)


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
    Raises ValueError for arguments that do not fit, `DivergenceError` for chains that left all bounds.
    """
    check_whole("n_batches", n_batches, 2)
    check_images(generator, images)
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
    """|G|^2 without the noise of the B batches in gradients [B, P], unbiased, so that it can come out negative: a number.

    Raises ValueError for a single batch, and for what is no such gradients.
    """
    check_tensor("gradients", gradients)
    if gradients.ndim != 2 or not gradients.is_floating_point():
        raise ValueError(f"gradients are {gradients.dtype} {tuple(gradients.shape)}; give floats [B, P]")
    if (n := len(gradients)) < 2:
        raise ValueError(f"gradients have shape {tuple(gradients.shape)}; give n_batches of at least 2")
    return (gradients.sum(0).square().sum() - gradients.square().sum()) / (n * (n - 1))


def _check_posterior(posterior: Posterior) -> None:
    if not isinstance(posterior, Posterior):
        raise ValueError(f"posterior={posterior!r} must be a Posterior")
