"""Exact samplers of the posterior, as references for short runs: HMC, and MALA as HMC with one leapfrog step.

    e' = leapfrog from (e, p), p ~ N(0, I), accepted with probability min(1, exp(H(e, p) - H(e', p')))     Neal 2011
    MALA: e' = e + s score(e) + sqrt(2 s) p, the Langevin step of Eq. (10) with the same test     Roberts & Tweedie 1996

A leapfrog step of length eps is a Langevin step with s = eps^2 / 2. MALA's acceptance rate at the s of a short run therefore
measures how far that s overshoots: the short run takes every one of these steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .generators import randn_like
from .posterior import Posterior, frozen

# Changes of the energy by more than this are divergences; such proposals are never accepted anyway.
HOPELESS = 1e3


@dataclass(frozen=True)
class Samples:
    """What `hmc` and `mala` return.

    final : the last states [n, d].
    acceptance : mean acceptance probability of each chain [n].
    states : all states after the initial one, [n_steps, n, d], where they were asked for, else None.
    """

    final: Tensor
    acceptance: Tensor
    states: Tensor | None


@dataclass(frozen=True)
class State:
    """A point e [n, d] with log p(x|e) [n] and its gradient [n, d]: all that any temperature needs."""

    e: Tensor
    log_likelihood: Tensor
    pull: Tensor

    def log_density(self, beta: float) -> Tensor:
        """log p(e) + beta log p(x|e), up to the constant of the prior: [n]."""
        return beta * self.log_likelihood - 0.5 * self.e.square().sum(1)

    def score(self, beta: float) -> Tensor:
        """Gradient of `log_density`: [n, d]."""
        return beta * self.pull - self.e


def state(posterior: Posterior, e: Tensor) -> State:
    """Value and gradient of the log likelihood at e [n, d] by one pass forward and one backward."""
    with torch.enable_grad(), frozen(posterior.generator):
        e = e.detach().requires_grad_()
        residual = posterior.residual(e)
        misfit = residual.square().flatten(1).sum(1) / posterior.sigma**2
        constant = posterior.n_observed * math.log(2 * math.pi * posterior.sigma**2)
        log_likelihood = -0.5 * (misfit + constant)
        (pull,) = torch.autograd.grad(log_likelihood.sum(), e)
    return State(e.detach(), log_likelihood.detach(), pull)


def hmc_step(
    posterior: Posterior, now: State, length: float | Tensor, n_leapfrog: int, beta: float, rng: torch.Generator
) -> tuple[State, Tensor]:
    """One HMC transition that leaves p(e) p(x|e)^beta invariant: the new state and the acceptance probabilities [n].

    length : leapfrog step, a number or one per chain [n, 1]. It is varied by up to a fifth from chain to chain, so that no
        direction returns to its start every time (Neal 2011, section 3.2); a single step, MALA's, keeps its length.
    """
    momentum = randn_like(now.e, rng)
    if n_leapfrog > 1:
        vary = torch.rand(len(now.e), 1, generator=rng, dtype=torch.float64).to(now.e)
        length = length * (0.8 + 0.4 * vary)
    energy = 0.5 * momentum.square().sum(1) - now.log_density(beta)
    new = now
    for _ in range(n_leapfrog):
        momentum = momentum + 0.5 * length * new.score(beta)
        new = state(posterior, new.e + length * momentum)
        momentum = momentum + 0.5 * length * new.score(beta)
    change = 0.5 * momentum.square().sum(1) - new.log_density(beta) - energy
    # nan, from a trajectory that left all bounds, counts as rejected
    probability = torch.nan_to_num((-change).clamp(max=0, min=-HOPELESS).exp(), nan=0.0)
    uniform = torch.rand(len(now.e), generator=rng, dtype=torch.float64).to(now.e.device)
    accepted = uniform < probability
    kept = State(
        torch.where(accepted[:, None], new.e, now.e),
        torch.where(accepted, new.log_likelihood, now.log_likelihood),
        torch.where(accepted[:, None], new.pull, now.pull),
    )
    return kept, probability


def hmc(
    posterior: Posterior,
    n_steps: int,
    length: float | Tensor,
    n_leapfrog: int = 10,
    initial: Tensor | None = None,
    rng: torch.Generator | None = None,
    keep_states: bool = False,
) -> Samples:
    """n_steps transitions of Hamiltonian Monte Carlo on p(e|x), one chain for each image.

    length : leapfrog step, a number or one per chain [n, 1].
    initial : start [n, d]; None draws it from the prior.

    Raises ValueError for numbers that are not positive and shapes that do not fit.
    """
    if n_steps < 1 or n_leapfrog < 1:
        raise ValueError(f"n_steps={n_steps} and n_leapfrog={n_leapfrog} must be at least 1")
    if not (torch.as_tensor(length) > 0).all():
        raise ValueError(f"length={length} must be positive")
    rng = rng or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    e = posterior.generator.sample_prior(len(posterior), rng) if initial is None else posterior.validated(initial)
    now, acceptance, states = state(posterior, e), torch.zeros_like(e[:, 0]), []
    for _ in range(n_steps):
        now, probability = hmc_step(posterior, now, length, n_leapfrog, 1.0, rng)
        acceptance = acceptance + probability / n_steps
        if keep_states:
            states.append(now.e)
    return Samples(now.e, acceptance, torch.stack(states) if keep_states else None)


def mala(
    posterior: Posterior,
    n_steps: int,
    step_size: float | Tensor,
    initial: Tensor | None = None,
    rng: torch.Generator | None = None,
    keep_states: bool = False,
) -> Samples:
    """n_steps Metropolis-adjusted Langevin steps: `short_run` with an acceptance test after every step.

    step_size : the s of Eq. (10), a number or one per chain [n, 1].    Everything else as in `hmc`.
    """
    s = torch.as_tensor(step_size, dtype=posterior.x.dtype, device=posterior.x.device)
    if not (s > 0).all():
        raise ValueError(f"step_size={step_size} must be positive; a usual value is 1.25e-3")
    return hmc(posterior, n_steps, (2 * s).sqrt(), 1, initial, rng, keep_states)
