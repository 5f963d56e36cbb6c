"""The entropy of a short run: log|det dF/de_0| and what can be said with it about log q_s(e_K).

    dF/de_0 = (I + D_{K-1} H_{K-1}) ... (I + D_0 H_0),    H_k = d^2/de^2 log p(e|x) at e_k,        Eq. (12)
    log|det dF/de_0| = sum_k log|det(I + D_k^1/2 H_k D_k^1/2)|,    D_k = diag(s_k)                 Eqs. (13), (17)

The estimators are functions (posterior, chain) -> [n] that stand for log q_s(e_K), each chain one draw:

    change_of_variables   log p(e_0) - log|det dF/de_0|                                            Eq. (17), one draw
    equation_17           log mean_j p(e_0) / |det dF(e_0, eps_j)/de_0|                            Eq. (17) as printed
    semi_implicit         log mean_j p(e_0j) / |det dF(e_0j, eps_j)/de_0|,  F(e_0j, eps_j) = e_K   Eqs. (13)-(14)
    linear_noise          -1/2 log det(2 pi e S_K),  S_{k+1} = A_k S_k A_k' + 2 D_k,  A_k = I + D_k H_k,  S_0 = I
    path                  log p(e_0) + sum_k log N(e_{k+1} | e_k) - log B(e_k | e_{k+1})

The first is an upper bound of E log q_s where every step is one-to-one, since conditioning on the noise loses the entropy
that the noise adds; where steps fold, it bounds nothing. Averages over true preimages tighten it (Eq. 14); Eq. (17) as printed keeps
e_0 under every noise, where another e_0 would lead to e_K. `linear_noise` is exact for linear generators and an
approximation elsewhere. `path` is an upper bound always (a reverse process B, here two kinds, in the extended space).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .generators import check_positive, check_tensor, check_whole
from .langevin import Chain, short_run, validated_step_size
from .posterior import PRODUCTS_AT_ONCE, Posterior, basis_vectors, frozen

# States whose Hessians are computed together. Many states with few vectors each are several times faster than few with many.
STATES_AT_ONCE = 64
# An inverse is given up when so many iterations did not halve what an iteration changes: at that rate thousands would follow.
PATIENCE = 100


class NoInverseError(ValueError):
    """A step of the chain could not be gone back. The message names the step, its size and the remedy."""


def stepwise_log_abs_det(posterior: Posterior, chain: Chain, chunk_size: int | None = None) -> Tensor:
    """log|det dF/de_0| of each chain, with its noise held fixed, as a sum of K log-determinants: [n], in float64.

    The default of `log_abs_det_jacobian`, where the other methods are. Differentiable with respect to a `step_size` that
    requires gradients. No more matrices than those of `chunk_size` states are held at once, in the backward pass either.
    """
    chain = with_trajectory(posterior, chain)
    root = step_sizes(chain).sqrt().flatten(0, 1)
    parts = _parts(posterior, chain.trajectory[:-1], chunk_size)
    found = [_LogAbsDet.apply(e, root[cut], part) for cut, e, part in parts]
    return torch.cat(found).reshape(chain.n_steps, -1).sum(0)


def step_jacobians(posterior: Posterior, chain: Chain, chunk_size: int | None = None) -> Tensor:
    """I + D_k^1/2 H_k D_k^1/2 for every step: [K, n, d, d] in float64, symmetric.

    Similar to the Jacobian I + D_k H_k of step k (and equal to it where s_k is one number), so it has the same eigenvalues.
    """
    chain = with_trajectory(posterior, chain)
    return _symmetric(hessians(posterior, chain.trajectory[:-1], chunk_size), step_sizes(chain).sqrt())


def _symmetric(h: Tensor, root: Tensor) -> Tensor:
    """I + D^1/2 H D^1/2 for H [..., d, d] and the root of the step sizes [..., d]."""
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return eye + root[..., :, None] * h * root[..., None, :]


def hessians(posterior: Posterior, states: Tensor, chunk_size: int | None = None) -> Tensor:
    """H = d^2/de^2 log p(e|x) at states [K, n, d] of the n images: [K, n, d, d] in float64.

    Differentiable in the states: the backward pass computes third derivatives, chunk by chunk, so that what they take stays
    bounded by `chunk_size` states (by default STATES_AT_ONCE; by PRODUCTS_AT_ONCE Hessian-vector products where there is a
    gradient).
    """
    found = [_Hessian.apply(e, part) for _, e, part in _parts(posterior, states, chunk_size)]
    return torch.cat(found).double().unflatten(0, states.shape[:2])


def _parts(posterior: Posterior, states: Tensor, chunk_size: int | None) -> Iterator[tuple[slice, Tensor, Posterior]]:
    """The states [K, n, d] as rows [K n, d], cut into chunks: where each stands, its states and their posterior."""
    n_steps, n, d = states.shape
    if chunk_size is None:
        chunk_size = max(1, PRODUCTS_AT_ONCE // d) if states.requires_grad else STATES_AT_ONCE
    check_whole("chunk_size", chunk_size)
    rows, image = states.reshape(-1, d), torch.arange(n, device=states.device).repeat(n_steps)
    for start in range(0, len(rows), chunk_size):
        cut = slice(start, start + chunk_size)
        yield cut, rows[cut], posterior[image[cut]]


class _LogAbsDet(torch.autograd.Function):
    """log|det(I + D^1/2 H(e) D^1/2)| [m] of states e [m, d], root = D^1/2 [m, d]; keeps these two and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, root: Tensor, posterior: Posterior) -> Tensor:
        ctx.posterior = posterior
        ctx.save_for_backward(e, root)
        return torch.linalg.slogdet(_symmetric(posterior.hessian(e).double(), root))[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        e, root = ctx.saved_tensors
        with torch.enable_grad(), frozen(ctx.posterior.generator):
            e, root = e.detach().requires_grad_(), root.detach().requires_grad_()
            h = _hessian_with_graph(ctx.posterior, e)
            log_det = torch.linalg.slogdet(_symmetric(0.5 * (h + h.mT).double(), root))[1]
            return *torch.autograd.grad((weight * log_det).sum(), (e, root), materialize_grads=True), None


class _Hessian(torch.autograd.Function):
    """H(e) of each image; keeps e alone for the backward pass and computes the graph there again."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, posterior: Posterior) -> Tensor:
        ctx.posterior = posterior
        ctx.save_for_backward(e)
        return posterior.hessian(e)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        (e,) = ctx.saved_tensors
        with torch.enable_grad(), frozen(ctx.posterior.generator):
            e = e.detach().requires_grad_()
            h = _hessian_with_graph(ctx.posterior, e)
            # a linear generator's Hessian does not depend on e at all
            if not h.requires_grad:
                return torch.zeros_like(e), None
            return torch.autograd.grad((0.5 * (weight + weight.mT) * h).sum(), e)[0], None


def _hessian_with_graph(posterior: Posterior, e: Tensor) -> Tensor:
    """H(e) [n, d, d] with the graph of its own derivative, symmetric but for rounding."""
    score = posterior.score(e, create_graph=True)
    (h,) = torch.autograd.grad(score, e, basis_vectors(e), create_graph=True, is_grads_batched=True)
    return h.transpose(0, 1)


# --- log q_s(e_K), estimated ------------------------------------------------------------------------------------------


def change_of_variables(posterior: Posterior, chain: Chain, chunk_size: int | None = None) -> Tensor:
    """log p(e_0) - log|det dF/de_0|, the log density of e_K given the noise (Eq. 13) where F is one-to-one: [n]."""
    log_det = stepwise_log_abs_det(posterior, chain, chunk_size)
    return _log_prior(chain.initial) - log_det


def equation_17(posterior: Posterior, chain: Chain, noises: Tensor, chunk_size: int | None = None) -> Tensor:
    """log mean_j p(e_0) / |det dF(e_0, eps_j)/de_0|: the inner average of Eq. (17) as it is printed, [n].

    noises : further draws of eps, [J, K, n, d]; the chain's own is one of the J + 1 in the average.
    """
    noises = _checked_noises(posterior, chain, noises)
    draws = [chain, *(_replayed(posterior, chain, noise) for noise in noises)]
    return _log_mean_exp([change_of_variables(posterior, draw, chunk_size) for draw in draws])


def semi_implicit(posterior: Posterior, chain: Chain, noises: Tensor, chunk_size: int | None = None) -> Tensor:
    """log of the average over noises of q_s(e_K | eps_j), each by Eq. (13) with the preimage of e_K under eps_j: [n].

    An upper bound of log q_s on average, which gets tight as J grows (Yin & Zhou 2018 use it in semi-implicit inference).

    noises : further draws of eps, [J, K, n, d]; the chain's own is one of the J + 1 in the average.

    Raises `NoInverseError` where fixed-point iteration finds no inverse of a step (s too large for the curvature).
    """
    noises = _checked_noises(posterior, chain, noises)
    draws = [chain, *(backwards(posterior, chain.final, chain.step_size, noise) for noise in noises)]
    return _log_mean_exp([change_of_variables(posterior, draw, chunk_size) for draw in draws])


def linear_noise(posterior: Posterior, chain: Chain, chunk_size: int | None = None) -> Tensor:
    """Minus the entropy of N(., S_K), S_{k+1} = A_k S_k A_k' + 2 D_k with A_k = I + D_k H_k, S_0 = I: [n].

    Exact for a linear generator. Elsewhere no bound: it takes the curvature along one chain for that along all.
    """
    check_chain(posterior, chain)
    if chain.noise is None:
        raise ValueError("a deterministic chain has no noise whose entropy counts; use change_of_variables")
    s = step_sizes(chain)
    d = s.shape[-1]
    jacobians = step_jacobians(posterior, chain, chunk_size)
    # S_k = D_k^1/2 R R' D_k^1/2; a QR factorisation keeps R triangular. R is never squared, so that directions that
    # contract keep their digits beside directions that overshoot.
    root = torch.eye(d, dtype=s.dtype, device=s.device).expand(s.shape[1], d, d)
    noise = math.sqrt(2) * torch.eye(d, dtype=s.dtype, device=s.device).expand_as(root)
    previous = torch.ones_like(s[0])
    for s_k, jacobian in zip(s, jacobians):
        in_units = (previous / s_k).sqrt()[..., None] * root  # D_k^-1/2 S_k D_k^-1/2 = in_units in_units'
        stacked = torch.cat([jacobian @ in_units, noise], dim=-1)
        root = torch.linalg.qr(stacked.mT, mode="reduced")[1].mT
        previous = s_k
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + previous.log().sum(-1)
    return -0.5 * (log_det + d * math.log(2 * math.pi * math.e))


def path(posterior: Posterior, chain: Chain) -> Tensor:
    """log p(e_0) + sum_k log N(e_{k+1}; e_k + s_k score(e_k), 2 s_k) - log N(e_k; e_{k+1} + s_k score(e_{k+1}), 2 s_k): [n].

    The reverse process walks the same Langevin step back. On average never below E log q_s, but often far above it,
    and its best s can be far off (annealed importance sampling needs annealed targets to make this tight).
    """
    chain = with_trajectory(posterior, chain)
    states, s = chain.trajectory.double(), step_sizes(chain)
    forward = _log_step_noise(chain)
    scores = torch.stack([posterior.score(e, create_graph=e.requires_grad) for e in chain.trajectory[1:]]).double()
    backward = _log_normal(states[:-1] - states[1:] - s * scores, 2 * s)
    return _log_prior(chain.initial) + (forward - backward).sum(0)


def path_gaussian(posterior: Posterior, chain: Chain, chunk_size: int | None = None) -> Tensor:
    """The bound of `path` with the reverse kernels of the linear dynamics that agrees with the chain around e_{k+1}: [n].

    B(e_k | e_{k+1}, e_K) is what Bayes' rule makes of e_{k+1} = e_k + D_k score(e_k) + noise, linearised at e_{k+1}, and of the
    law N(m_k, S_k) of e_k under the posterior's curvature at e_K. Exact for a linear generator; an upper bound of
    E log q_s elsewhere, because each kernel looks at later states only. Where a step overshoots (eigenvalues of
    I + D H beyond -1 ... 1) the kernels take the end of that interval: a linear chain would leave all bounds there.
    """
    chain = with_trajectory(posterior, chain)
    states, s = chain.trajectory.double(), step_sizes(chain)
    total = _log_prior(chain.initial) + _log_step_noise(chain).sum(0)
    create_graph = chain.trajectory.requires_grad
    scores = torch.stack([posterior.score(e, create_graph=create_graph) for e in chain.trajectory[1:]]).double()
    eye, root = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device), s.sqrt()
    h = hessians(posterior, chain.trajectory[1:], chunk_size)
    clipped = _Clip.apply(eye + root[..., :, None] * h * root[..., None, :])
    dh = root[..., :, None] * (clipped - eye) / root[..., None, :]  # D_k H(e_{k+1}), clipped
    final_h = dh[-1] / s[-1][..., None]
    mean, covariance = torch.zeros_like(states[0]), eye.expand_as(dh[0])  # of e_k, if H were H(e_K) everywhere
    for k in range(chain.n_steps):
        # e_{k+1} = offset + a e_k + noise, from score(e_k) = score(e_{k+1}) + H (e_k - e_{k+1})
        a = eye + dh[k]
        offset = s[k] * scores[k] - _times(dh[k], states[k + 1])
        prior_precision = torch.linalg.inv(covariance)
        weighted = a.mT / (2 * s[k])[..., None, :]
        precision = prior_precision + weighted @ a
        pull = _times(prior_precision, mean) + _times(weighted, states[k + 1] - offset)
        gap = states[k] - torch.linalg.solve(precision, pull)
        distance = (gap * _times(precision, gap)).sum(-1)
        total = total - 0.5 * (torch.linalg.slogdet(precision)[1] - distance - len(eye) * math.log(2 * math.pi))
        forward = eye + s[k][..., None] * final_h
        mean = mean + s[k] * (scores[-1] + _times(final_h, mean - states[-1]))
        covariance = forward @ covariance @ forward.mT + torch.diag_embed(2 * s[k])
    return total


class _Clip(torch.autograd.Function):
    """Symmetric matrices [..., d, d] with their eigenvalues clipped to [-1, 1].

    Its derivative is that of a function of a matrix (Daleckii & Krein 1965), finite where eigenvalues coincide, unlike the
    derivative of eigenvectors.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return (vectors * values.clamp(-1, 1)[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        kept = values.clamp(-1, 1)
        gap = values[..., :, None] - values[..., None, :]
        inside = (values.abs() <= 1).to(values.dtype)[..., None].expand_as(gap)
        slope = torch.where(gap.abs() > 1e-12, (kept[..., :, None] - kept[..., None, :]) / gap, inside)
        return vectors @ (slope * (vectors.mT @ gradient @ vectors)) @ vectors.mT


# --- small parts ------------------------------------------------------------------------------------------------------


def _checked_noises(posterior: Posterior, chain: Chain, noises: Tensor) -> Tensor:
    """noises itself, if it is [J, K, n, d] with the chain's K, n, d and dtype; a ValueError otherwise."""
    check_chain(posterior, chain)
    if chain.noise is None:
        raise ValueError("a deterministic chain has no noise to average over; use change_of_variables")
    shape = (chain.n_steps, *chain.initial.shape)
    check_tensor("noises", noises)
    if noises.ndim != 4 or noises.shape[1:] != shape or noises.dtype != chain.initial.dtype:
        raise ValueError(
            f"noises has shape {tuple(noises.shape)}, {noises.dtype}; this chain needs [J, K, n, d] = "
            f"[J, {', '.join(map(str, shape))}], {chain.initial.dtype}"
        )
    return noises


def backwards(
    posterior: Posterior,
    final: Tensor,
    step_size: float | Tensor,
    noise: Tensor,
    tolerance: float = 1e-10,
    n_max: int = 2000,
) -> Chain:
    """The chain that arrives at `final` [n, d] under `noise` [K, n, d]; its `initial` is F^-1(final, noise).

    Goes back step by step, e = e' - sqrt(2 s) eps - s score(e), by fixed-point iteration, which converges where s is below
    1 / (largest curvature): there every step is one-to-one. Going back stretches what a step contracted, rounding errors
    too, so that all is computed in float64, with a copy of a float32 generator; the chain has the dtype of `final`.
    Differentiable in `final` and `step_size`.

    Raises `NoInverseError` where it does not converge to `tolerance`, relative to the largest latent, in `n_max` iterations,
    or so slowly that it will not.
    """
    check_positive("tolerance", tolerance)
    check_whole("n_max", n_max)
    check_tensor("final", final)
    check_tensor("noise", noise)
    if noise.shape[1:] != posterior.validated(final).shape or not len(noise) or noise.dtype != final.dtype:
        raise ValueError(
            f"noise is {noise.dtype} {tuple(noise.shape)}, to go back from {final.dtype} {tuple(final.shape)} takes "
            f"{final.dtype} [K, {', '.join(map(str, final.shape))}]"
        )
    step_size = validated_step_size(step_size, noise.shape, final)
    differentiable = torch.is_grad_enabled() and (final.requires_grad or step_size.requires_grad)
    exactly, states = _in_double(posterior), [final.double()]
    sizes, noises = step_size.double().expand(noise.shape), noise.double()
    for k in reversed(range(len(noise))):
        arrival = states[-1] - (2 * sizes[k]).sqrt() * noises[k]
        s, target, e = sizes[k].detach(), arrival.detach(), states[-1].detach()
        earlier = math.inf
        for i in range(n_max):
            previous, e = e, target - s * exactly.score(e)
            change = (e - previous).abs().max() / (1 + e.abs().max())
            if not change > tolerance:
                break
            if i % PATIENCE == 0:
                if change > 0.5 * earlier:
                    break
                earlier = change
        if not change <= tolerance:
            raise NoInverseError(
                f"step {k} with step size {s.max():.3g} has no inverse that the iteration finds (last relative change "
                f"{change:.1g}): it is one-to-one only below 1 / (largest curvature); use a smaller step size"
            )
        if differentiable:  # one step of Newton's method, which has the derivatives of the solution
            jacobian = torch.eye(e.shape[1], dtype=e.dtype, device=e.device)
            jacobian = jacobian + s[..., None] * hessians(exactly, e[None])[0]
            misfit = e + sizes[k] * exactly.score(e) - arrival
            e = e - torch.linalg.solve(jacobian, misfit[..., None])[..., 0]
        states.append(e)
    trajectory = torch.stack(states[::-1]).to(final.dtype)
    return Chain(trajectory[-1], trajectory[0], step_size, len(noise), trajectory, noise, None)


def _in_double(posterior: Posterior) -> Posterior:
    """The same posterior computed in float64: itself, or with a copy of its generator."""
    if posterior.x.dtype == torch.float64:
        return posterior
    generator = copy.deepcopy(posterior.generator).double()
    return Posterior(generator, posterior.x.double(), posterior.sigma, posterior.mask)


def with_trajectory(posterior: Posterior, chain: Chain) -> Chain:
    """The chain with all its states; a ValueError if its sizes are not those of `posterior`."""
    check_chain(posterior, chain)
    return chain if chain.trajectory is not None else _replayed(posterior, chain, chain.noise)


def check_chain(posterior: Posterior, chain: Chain) -> None:
    """Raises ValueError unless `chain` is a chain of as many images and latents, and of the dtype, as `posterior` has."""
    if not isinstance(chain, Chain):
        raise ValueError(f"chain is a {type(chain).__name__}; give what `short_run` returns")
    posterior.validated(chain.initial)


def _replayed(posterior: Posterior, chain: Chain, noise: Tensor | None) -> Chain:
    """A chain from the same start with the same step sizes under `noise`, its trajectory kept."""
    return short_run(
        posterior,
        chain.n_steps,
        chain.step_size,
        chain.initial,
        noise,
        deterministic=noise is None,
        rng=torch.Generator(),  # nothing is drawn; without it, torch's global state would move on
        keep_trajectory=True,
    )


def step_sizes(chain: Chain) -> Tensor:
    """s as [K, n, d] in float64."""
    return chain.step_size.double().expand(chain.n_steps, *chain.initial.shape)


def _log_prior(e: Tensor) -> Tensor:
    return -0.5 * (e.double().square().sum(-1) + e.shape[-1] * math.log(2 * math.pi))


def _log_normal(difference: Tensor, variance: Tensor) -> Tensor:
    """log N(difference; 0, diag(variance)), summed over the latents."""
    return -0.5 * (difference.square() / variance + (2 * math.pi * variance).log()).sum(-1)


def _log_step_noise(chain: Chain) -> Tensor:
    """log of the density of each Langevin step, log N(e_{k+1}; e_k + s_k score(e_k), 2 s_k): [K, n]."""
    if chain.noise is None:
        raise ValueError("a deterministic chain has no transition density; run it with noise")
    s = step_sizes(chain)
    return _log_normal((2 * s).sqrt() * chain.noise.double(), 2 * s)


def _log_mean_exp(values: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(values), 0) - math.log(len(values))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """matrices [..., d, d] times vectors [..., d]."""
    return (matrices @ vectors[..., None]).squeeze(-1)
