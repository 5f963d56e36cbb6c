"""log p(x), bounded from both sides by annealed importance sampling.

    p_t(e) ~ p(e) p(x|e)^beta_t,  0 = beta_0 < ... < beta_T = 1;  e_0 ~ p(e),  e_t ~ HMC leaving p_t invariant     Neal 2001
    log w = sum_t (beta_t - beta_{t-1}) log p(x|e_{t-1}),   E w = p(x),   so E log(mean w) <= log p(x)
    backwards from an exact draw of p(e|x):   E 1/w = 1/p(x),   so E -log(mean 1/w) >= log p(x)      Grosse et al. 2015

Exact draws of the posterior exist where the image was simulated: e ~ p(e), x ~ p(x|e) makes e one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..generators import Generator, randn_like
from ..posterior import Posterior
from ..samplers import hmc_step, state

# The acceptance rate at which HMC explores fastest (Beskos et al. 2013).
TARGET_ACCEPTANCE = 0.65


@dataclass(frozen=True)
class Evidence:
    """An estimate of log p(x) for each image.

    log_marginal, standard_error : [n]; the error is that of the logarithm of the mean weight over chains.
    effective_sample_size : of the chains' weights, [n]; near 1 the estimate rests on one chain.
    acceptance : mean acceptance probability at each temperature, [T].
    """

    log_marginal: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor


def simulate(generator: Generator, n: int, sigma: float, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """n images from the model and the latents that made them, e ~ p(e|x): x [n, C, H, W] and e [n, d]."""
    e = generator.sample_prior(n, rng)
    with torch.no_grad():
        mean = generator(e)
    return mean + sigma * randn_like(mean, rng), e


def annealed_importance_sampling(
    posterior: Posterior,
    n_temperatures: int = 500,
    n_chains: int = 16,
    n_leapfrog: int = 5,
    rng: torch.Generator | None = None,
) -> Evidence:
    """log p(x) from below, on average, for each image of `posterior`.

    n_temperatures : T; beta_t = (t / T)^4, fine where the likelihood first bites.
    n_chains : independent chains for each image.

    The leapfrog steps are tuned in a pilot run with other random numbers and then fixed, so that the weights stay unbiased.
    """
    chains, rng = _repeated(posterior, n_chains, n_temperatures), _seeded(rng)
    betas = torch.linspace(0, 1, n_temperatures + 1, dtype=torch.float64).pow(4).tolist()
    _, _, lengths, _ = _anneal(
        chains, chains.generator.sample_prior(len(chains), rng), betas, n_leapfrog, n_chains, rng
    )
    start = chains.generator.sample_prior(len(chains), rng)
    log_weight, acceptance, _, _ = _anneal(chains, start, betas, n_leapfrog, n_chains, rng, lengths)
    return _evidence(log_weight.reshape(-1, n_chains), acceptance)


def bidirectional(
    posterior: Posterior,
    exact: Tensor,
    n_temperatures: int = 500,
    n_chains: int = 16,
    n_leapfrog: int = 5,
    rng: torch.Generator | None = None,
) -> tuple[Evidence, Evidence]:
    """log p(x) from below and from above, on average, for simulated images (see `simulate`).

    exact : draws e ~ p(e|x), one for each image, [n, d].    Everything else as in `annealed_importance_sampling`.
    """
    chains, rng = _repeated(posterior, n_chains, n_temperatures), _seeded(rng)
    below = annealed_importance_sampling(posterior, n_temperatures, n_chains, n_leapfrog, rng)
    betas = torch.linspace(1, 0, n_temperatures + 1, dtype=torch.float64).pow(4).tolist()
    start = posterior.validated(exact).repeat_interleave(n_chains, 0)
    _, _, lengths, _ = _anneal(chains, start, betas, n_leapfrog, n_chains, rng)
    log_weight, acceptance, _, _ = _anneal(chains, start, betas, n_leapfrog, n_chains, rng, lengths)
    inverse = _evidence(log_weight.reshape(-1, n_chains), acceptance)
    above = Evidence(-inverse.log_marginal, inverse.standard_error, inverse.effective_sample_size, acceptance)
    return below, above


def _anneal(
    posterior: Posterior,
    start: Tensor,
    betas: list[float],
    n_leapfrog: int,
    n_chains: int,
    rng: torch.Generator,
    lengths: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Walk through `betas`: log weights [n], acceptance [T], the leapfrog steps used [n, 1] each, and the last states.

    lengths : leapfrog steps to use; None adapts them, one per image, towards TARGET_ACCEPTANCE.
    """
    now, log_weight, used, acceptance = state(posterior, start), start.new_zeros(len(start)).double(), [], []
    length = torch.full_like(start[:, :1], _first_length(posterior, betas[0]))
    for i, (before, after) in enumerate(zip(betas, betas[1:])):
        log_weight = log_weight + (after - before) * now.log_likelihood.double()
        length = length if lengths is None else lengths[i]
        used.append(length)
        now, probability = hmc_step(posterior, now, length, n_leapfrog, after, rng)
        acceptance.append(probability.mean())
        if lengths is None:
            by_image = probability.reshape(-1, n_chains).mean(1).repeat_interleave(n_chains)[:, None]
            length = length * (0.5 * (by_image - TARGET_ACCEPTANCE)).exp()
    return log_weight, torch.stack(acceptance), used, now.e


def _first_length(posterior: Posterior, beta: float) -> float:
    """A leapfrog step to start the adaptation from: of the width of the prior, or of the pixel noise after the image."""
    return 0.3 if beta == 0 else min(0.3, 0.3 * posterior.sigma)


def _evidence(log_weight: Tensor, acceptance: Tensor) -> Evidence:
    n_chains = log_weight.shape[1]
    estimate = log_weight.logsumexp(1) - math.log(n_chains)
    relative = (log_weight - estimate[:, None]).exp()  # weights over their mean
    return Evidence(estimate, relative.std(1) / n_chains**0.5, n_chains / relative.square().mean(1), acceptance)


def _repeated(posterior: Posterior, n_chains: int, n_temperatures: int) -> Posterior:
    if n_chains < 2 or n_temperatures < 1:
        raise ValueError(f"n_chains={n_chains} must be at least 2 and n_temperatures={n_temperatures} at least 1")
    return posterior[torch.arange(len(posterior), device=posterior.x.device).repeat_interleave(n_chains)]


def _seeded(rng: torch.Generator | None) -> torch.Generator:
    return rng or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
