"""Exact samplers of p(e | x), to compare short runs with: Metropolis-Hastings corrected Langevin and Hamiltonian steps.

    log p_beta(e) = log p(e) + beta log p(x | e) + const,   beta = 1: the posterior, beta = 0: the prior
    HMC    v ~ N(0, I);  L times: v += eps/2 score(e), e += eps v, v += eps/2 score(e);
           (e, v) is accepted with probability min(1, exp(energy before - energy after)),  energy = |v|^2/2 - log p_beta(e)
    MALA   proposal N(e + s score(e), 2 s I), Eq. (10), accepted by Metropolis and Hastings: HMC with L = 1, eps = sqrt(2 s)

One leapfrog step from e with velocity v ends at e + (eps^2 / 2) score(e) + eps v, and the ratio of proposal densities in
Metropolis and Hastings' rule is what the kinetic energies make of it; so there is one kernel, `hmc_step`, here.
`long_run` finds its own step sizes, for whoever wants the posterior and not the sampler.
Without the correction MALA is the short run of Eq. (10): its rate of rejection at s measures how far short runs overshoot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .generators import check_rng, check_whole, randn_like, uniform_like
from .langevin import validated_step_size
from .posterior import Posterior, frozen

# `long_run`: gradients of a Hamiltonian step, the acceptance that step sizes aim at, how fast they follow it, and the first beta.
LEAPFROG, TARGET_ACCEPTANCE, GAIN, FIRST_BETA = 10, 0.8, 0.5, 1e-3


@dataclass(frozen=True)
class Samples:
    """What `mala` and `hmc` return.

    final, initial : the states after the last step and before the first, [n, d].
    acceptance : the probability of acceptance averaged over the steps, [n] (less noisy than counting acceptances).
    trajectory : all states [n_steps + 1, n, d] where they were asked for, else None.
    """

    final: Tensor
    initial: Tensor
    acceptance: Tensor
    trajectory: Tensor | None


@dataclass(frozen=True)
class State:
    """States e [n, d] with all that tempered densities need there, at every beta.

    log_likelihood : log p(x | e) with all constants, [n], float64 since it is large and differences of it count.
    pull : d/de log p(x | e), [n, d].
    """

    e: Tensor
    log_likelihood: Tensor
    pull: Tensor

    def log_density(self, beta: float) -> Tensor:
        """log p_beta(e) up to a constant: [n], float64."""
        return beta * self.log_likelihood - 0.5 * self.e.double().square().sum(1)

    def score(self, beta: float) -> Tensor:
        """d/de log p_beta(e): [n, d]."""
        return beta * self.pull - self.e


def evaluate(posterior: Posterior, e: Tensor) -> State:
    """log p(x | e) and its gradient at e [n, d], from one pass through the generator, forward and backward."""
    variance = posterior.sigma**2
    with torch.enable_grad(), frozen(posterior.generator):
        e = posterior.validated(e).detach().requires_grad_()
        pull, residual = posterior.pull(e)
    misfit = residual.detach().flatten(1).double().square().sum(1) / variance
    log_likelihood = -0.5 * misfit - 0.5 * posterior.n_observed * math.log(2 * math.pi * variance)
    return State(e.detach(), log_likelihood, pull)


def hmc_step(
    posterior: Posterior,
    state: State,
    beta: float,
    leapfrog_step: Tensor,
    n_leapfrog: int,
    rng: torch.Generator | None = None,
) -> tuple[State, Tensor]:
    """One Hamiltonian step that leaves p_beta invariant, and is reversible: the next state, and p(acceptance) [n].

    leapfrog_step : eps, broadcastable to [n, d]. One per latent is the same as rescaled latents, so it stays exact.

    Costs n_leapfrog evaluations of the generator. A path that left all bounds is rejected, not an error.
    """
    velocity = randn_like(state.e, rng)
    proposal, v = state, velocity
    for _ in range(n_leapfrog):
        v = v + 0.5 * leapfrog_step * proposal.score(beta)
        proposal = evaluate(posterior, proposal.e + leapfrog_step * v)
        v = v + 0.5 * leapfrog_step * proposal.score(beta)
    kinetic = 0.5 * (velocity.double().square() - v.double().square()).sum(1)
    log_ratio = proposal.log_density(beta) - state.log_density(beta) + kinetic
    acceptance = log_ratio.nan_to_num(nan=-math.inf, neginf=-math.inf).clamp(max=0).exp()
    accepted = uniform_like(acceptance, rng) < acceptance
    return _choose(accepted, proposal, state), acceptance


def hmc(
    posterior: Posterior,
    n_steps: int,
    step_size: float | Tensor,
    n_leapfrog: int = 10,
    initial: Tensor | None = None,
    rng: torch.Generator | None = None,
    keep_trajectory: bool = False,
) -> Samples:
    """Hamiltonian Monte Carlo on p(e | x), one chain for each of the n images.

    Parameters
    ----------
    n_steps : number of proposals, of `n_leapfrog` gradients each.
    step_size : eps of a leapfrog step (not the s of Eq. (10): s = eps^2 / 2), broadcastable to [n_steps, n, d].
    initial : first states [n, d]; None draws them from the prior.
    rng : source of the first states, the velocities and the acceptances; the same seed gives the same bits. None:
        torch's global state.
    keep_trajectory : also return all states.

    Paths of a fixed length can be periodic for Gaussian targets (eps n_leapfrog = pi in a latent of variance 1);
    vary `step_size` over the steps where that matters.

    Raises ValueError for arguments that do not fit. Source: Neal 2011, "MCMC using Hamiltonian dynamics".
    """
    check_whole("n_steps", n_steps)
    check_whole("n_leapfrog", n_leapfrog)
    check_rng(rng)
    e = posterior.generator.sample_prior(len(posterior), rng) if initial is None else initial
    e = posterior.validated(e).detach()
    shape = (n_steps, *e.shape)
    steps = validated_step_size(step_size, shape, e).detach().expand(shape)
    state = start = evaluate(posterior, e)
    if not state.log_likelihood.isfinite().all():
        raise ValueError("log p(x | e) is not finite at the initial states; they are NaN or far outside the prior")
    acceptance, trajectory = torch.zeros_like(state.log_likelihood), [e]
    for leapfrog_step in steps:
        state, probability = hmc_step(posterior, state, 1.0, leapfrog_step, n_leapfrog, rng)
        acceptance += probability
        if keep_trajectory:
            trajectory.append(state.e)
    return Samples(state.e, start.e, acceptance / n_steps, torch.stack(trajectory) if keep_trajectory else None)


def mala(
    posterior: Posterior,
    n_steps: int,
    step_size: float | Tensor,
    initial: Tensor | None = None,
    rng: torch.Generator | None = None,
    keep_trajectory: bool = False,
) -> Samples:
    """Metropolis-adjusted Langevin on p(e | x): Eq. (10) with the correction that makes it exact.

    step_size : s of Eq. (10), as in `short_run`; all else as in `hmc`, of which this is the case of one leapfrog step.

    Raises ValueError for arguments that do not fit. Source: Roberts and Tweedie 1996.
    """
    check_whole("n_steps", n_steps)
    shape = (n_steps, len(posterior), posterior.generator.latent_dim)
    validated_step_size(step_size, shape, posterior.x)  # so that s is named, not eps
    leapfrog_step = (2 * torch.as_tensor(step_size, dtype=torch.float64)).sqrt()
    return hmc(posterior, n_steps, leapfrog_step, 1, initial, rng, keep_trajectory)


def long_run(
    posterior: Posterior, n_steps: int, initial: Tensor | None = None, rng: torch.Generator | None = None
) -> Samples:
    """Hamiltonian Monte Carlo that tunes itself, as a reference for short runs: one chain for each of the n images.

    As many steps again, which are forgotten, come first. In them the step size of each chain follows its acceptance, and chains
    from the prior are annealed: beta rises to 1. Then each step shortens eps by a factor from [1/2, 1], so that no path has the
    length of a period.

    initial : first states [n, d], which are not annealed; None draws them from the prior.

    Returns `Samples` with the trajectory of the steps that count, acceptance theirs. Exact in the limit of many steps alone: compare
    runs from different starts. Raises ValueError for arguments that do not fit.
    """
    check_whole("n_steps", n_steps, 2)
    check_rng(rng)
    e = posterior.generator.sample_prior(len(posterior), rng) if initial is None else initial
    state = start = evaluate(posterior, posterior.validated(e).detach())
    betas = torch.logspace(math.log10(FIRST_BETA), 0, n_steps) if initial is None else torch.ones(n_steps)
    log_step = torch.full_like(state.log_likelihood, math.log(1 / LEAPFROG))
    for beta in betas.tolist():
        state, probability = hmc_step(posterior, state, beta, log_step.exp()[:, None].to(state.e), LEAPFROG, rng)
        log_step = log_step + GAIN * (probability - TARGET_ACCEPTANCE)
    shorter = 1 - 0.5 * uniform_like(log_step.expand(n_steps, -1), rng)
    found = hmc(
        posterior, n_steps, (shorter * log_step.exp())[:, :, None], LEAPFROG, state.e, rng, keep_trajectory=True
    )
    return replace(found, initial=start.e)


def _choose(accepted: Tensor, proposal: State, state: State) -> State:
    """The proposal where it was accepted [n], else the state."""
    row = accepted[:, None]
    return State(
        torch.where(row, proposal.e, state.e),
        torch.where(accepted, proposal.log_likelihood, state.log_likelihood),
        torch.where(row, proposal.pull, state.pull),
    )
