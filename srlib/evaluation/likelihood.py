"""log p(x) between two stochastic bounds: annealed importance sampling, forwards and in reverse.

    log p_t(e) = log p(e) + beta_t log p(x | e) + const,    0 = beta_0 < ... < beta_T = 1
    forward    e_0 ~ p(e),       e_t by a step that keeps p_t,        w  = prod_t p(x | e_{t-1})^(beta_t - beta_{t-1})
    reverse    e_T ~ p(e | x),   e_{t-1} by a step that keeps p_{t-1},  1/w' = prod_t p(x | e_t)^-(beta_t - beta_{t-1})
    E w = p(x),    E 1/w' = 1 / p(x),    so that  E log mean w <= log p(x) <= E [-log mean 1/w']

The steps are Hamiltonian (`samplers.hmc_step`). Temperatures and step sizes are tuned on a pilot run with random numbers
of its own and then fixed, so both expectations are exact. An exact draw from p(e | x) is at hand for simulated images
only: e ~ p(e), x ~ p(x | e), which is a draw of e from p(e | x) as well (`simulate`).

Sources: Neal 2001 (annealed importance sampling); Grosse, Ghahramani and Adams 2015 (the reverse chain, "bidirectional Monte Carlo").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..generators import Generator, check_positive, check_tensor, check_whole, randn_like, uniform_like
from ..posterior import Posterior
from ..samplers import State, evaluate, hmc_step

# Pilot: temperatures are this many standard deviations of log p(x | e) apart, each with so many steps to tune by.
PILOT_SPACING, PILOT_STEPS = 1.0, 4
PILOT_CHAINS, PILOT_LIMIT = 8, 2000
# Acceptance that the step sizes aim at, and how fast they follow it.
TARGET_ACCEPTANCE, GAIN = 0.8, 0.5


@dataclass(frozen=True)
class Annealing:
    """A path from prior to posterior, fixed before it is used.

    beta : beta_0 = 0, ..., beta_T = 1, [T + 1], float64.
    leapfrog_step : eps at beta_1, ..., beta_T for each image, [T, n].
    n_leapfrog : leapfrog steps of one Hamiltonian step.
    """

    beta: Tensor
    leapfrog_step: Tensor
    n_leapfrog: int


@dataclass(frozen=True)
class LikelihoodEstimate:
    """log p(x) of n images from C chains each; all float64.

    estimate : log p(x), [n]. Too low on average from a forward run, too high from a reverse run.
    standard_error : its Monte Carlo standard error, [n]: the relative one of the mean weight over the C chains. Itself an
        estimate from the same weights, so too small where `effective_sample_size` is close to 1.
    effective_sample_size : 1 / sum of squared normalised weights, between 1 and C, [n].
    acceptance : at each temperature between prior and posterior, averaged over chains, [T - 1, n], in the order of beta.
    log_weights : log w (forward) or log w' (reverse) of each chain, [n, C].
    """

    estimate: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Bounds:
    """What `bidirectional` returns: log p(x) lies between `lower.estimate` and `upper.estimate`, but for noise."""

    lower: LikelihoodEstimate
    upper: LikelihoodEstimate

    @property
    def gap(self) -> Tensor:
        """upper - lower, [n]: its mean bounds the mean error of either side."""
        return self.upper.estimate - self.lower.estimate


def annealed_importance_sampling(
    posterior: Posterior,
    n_temperatures: int = 500,
    n_chains: int = 16,
    rng: torch.Generator | None = None,
    n_leapfrog: int = 10,
    annealing: Annealing | None = None,
) -> LikelihoodEstimate:
    """log p(x) of each image over its observed pixels, by annealed importance sampling from prior to posterior.

    Parameters
    ----------
    n_temperatures : T. The bias falls as 1/T; T should be several times the path's length (`tune_annealing`).
    n_chains : C independent chains for each image, at least 2.
    rng : source of the pilot run's and then this run's random numbers; the same seed gives the same bits.
    n_leapfrog : gradients of one Hamiltonian step; the cost is about T n C n_leapfrog of them.
    annealing : from `tune_annealing`; None tunes one. It replaces `n_temperatures` and `n_leapfrog`.

    Raises ValueError for arguments that do not fit.
    """
    check_whole("n_chains", n_chains, 2)
    if annealing is None:
        annealing = tune_annealing(posterior, n_temperatures, rng, n_leapfrog)
    _check_annealing(annealing, posterior)
    copies = posterior.repeated(n_chains)
    state = evaluate(copies, copies.generator.sample_prior(len(copies), rng))
    beta, increments = annealing.beta.tolist(), annealing.beta.diff().tolist()
    log_weights, acceptance = increments[0] * state.log_likelihood, []
    for t, increment in enumerate(increments[1:], start=1):
        state, probability = _move(copies, state, beta[t], annealing.leapfrog_step[t - 1], annealing.n_leapfrog, rng)
        log_weights = log_weights + increment * state.log_likelihood
        acceptance.append(probability)
    return _estimate(log_weights.unflatten(0, (-1, n_chains)), acceptance)


def reverse_annealed_importance_sampling(
    posterior: Posterior,
    exact_sample: Tensor,
    annealing: Annealing,
    n_chains: int = 16,
    rng: torch.Generator | None = None,
) -> LikelihoodEstimate:
    """log p(x) from above, by chains that leave an exact draw e ~ p(e | x) [n, d] for the prior.

    All C chains of an image start at its one exact draw. That keeps the bound, but `standard_error` is then given that
    draw: only averages over images have an error that spread over the images shows.
    """
    check_whole("n_chains", n_chains, 2)
    _check_annealing(annealing, posterior)
    check_tensor("exact_sample", exact_sample)
    start = posterior.validated(exact_sample).detach().repeat_interleave(n_chains, 0)
    copies = posterior.repeated(n_chains)
    state = evaluate(copies, start)
    beta, increments = annealing.beta.tolist(), annealing.beta.diff().tolist()
    log_weights, acceptance = increments[-1] * state.log_likelihood, []
    for t in range(len(increments) - 1, 0, -1):
        state, probability = _move(copies, state, beta[t], annealing.leapfrog_step[t - 1], annealing.n_leapfrog, rng)
        log_weights = log_weights + increments[t - 1] * state.log_likelihood
        acceptance.append(probability)
    inverse = _estimate(-log_weights.unflatten(0, (-1, n_chains)), acceptance[::-1])
    return LikelihoodEstimate(
        -inverse.estimate,
        inverse.standard_error,
        inverse.effective_sample_size,
        inverse.acceptance,
        -inverse.log_weights,
    )


def bidirectional(
    posterior: Posterior,
    exact_sample: Tensor,
    n_temperatures: int = 500,
    n_chains: int = 16,
    rng: torch.Generator | None = None,
    n_leapfrog: int = 10,
) -> Bounds:
    """log p(x) from both sides: forward and reverse annealed importance sampling along one tuned path.

    posterior, exact_sample : simulated images and the latents [n, d] that made them, as from `simulate`.

    The rest as in `annealed_importance_sampling`. For real images only the lower side exists; the gap on images that the
    model itself made says how far to trust it there (Wu et al. 2017).
    """
    annealing = tune_annealing(posterior, n_temperatures, rng, n_leapfrog)
    lower = annealed_importance_sampling(posterior, n_chains=n_chains, rng=rng, annealing=annealing)
    return Bounds(lower, reverse_annealed_importance_sampling(posterior, exact_sample, annealing, n_chains, rng))


def simulate(
    generator: Generator, n: int, sigma: float, rng: torch.Generator | None = None, mask: Tensor | None = None
) -> tuple[Posterior, Tensor]:
    """n images x ~ p(x | e), e ~ p(e): their posterior, and e [n, d], an exact draw from it."""
    check_positive("sigma", sigma)
    e = generator.sample_prior(n, rng)
    with torch.no_grad():
        image = generator(e)
    return Posterior(generator, image + sigma * randn_like(image, rng), sigma, mask), e


def tune_annealing(
    posterior: Posterior, n_temperatures: int = 500, rng: torch.Generator | None = None, n_leapfrog: int = 10
) -> Annealing:
    """Temperatures and step sizes for these images, from a short pilot run.

    The pilot goes up in beta so that log w of one temperature spreads by `PILOT_SPACING` over the chains of an image
    (root mean square over images): equal steps of that length, int sd_beta(log p(x|e)) dbeta, make the variance of the
    weights smallest. The T temperatures lie evenly along that length (Gelman and Meng 1998). The step size of each image
    follows its acceptance; between the pilot's temperatures it is interpolated.
    """
    check_whole("n_temperatures", n_temperatures, 2)
    check_whole("n_leapfrog", n_leapfrog, 1)
    copies = posterior.repeated(PILOT_CHAINS)
    state = evaluate(copies, copies.generator.sample_prior(len(copies), rng))
    # at beta = 0 the target is N(0, I): paths of 1 to 2, about a quarter of the period 2 pi, forget where they began
    log_step = torch.full((len(posterior),), math.log(2.0 / n_leapfrog), dtype=torch.float64, device=state.e.device)
    betas, log_steps = [0.0], [log_step]
    while betas[-1] < 1:
        if len(betas) > PILOT_LIMIT:
            raise ValueError(
                f"after {PILOT_LIMIT} pilot temperatures beta is {betas[-1]:.2g}: log p(x|e) varies too much for "
                f"annealing; is sigma={posterior.sigma} the model's?"
            )
        spread = state.log_likelihood.unflatten(0, (-1, PILOT_CHAINS)).var(1).mean().sqrt().item()
        betas.append(min(1.0, betas[-1] + PILOT_SPACING / max(spread, 1e-12)))
        at_this_beta = []
        for _ in range(PILOT_STEPS):
            state, probability = _move(copies, state, betas[-1], log_step.exp(), n_leapfrog, rng)
            log_step = (log_step + GAIN * (probability - TARGET_ACCEPTANCE)).clamp(max=log_steps[0])
            at_this_beta.append(log_step)
        log_steps.append(torch.stack(at_this_beta).mean(0))
    # evenly spaced in length, at which the pilot's temperatures lie 0, 1, 2, ..., T pilot spacings along
    position = torch.linspace(0, len(betas) - 1, n_temperatures + 1, dtype=torch.float64)
    beta = _interpolated(position, torch.tensor(betas, dtype=torch.float64)[:, None])[:, 0]
    beta[0], beta[-1] = 0.0, 1.0
    return Annealing(beta, _interpolated(position, torch.stack(log_steps))[1:].exp(), n_leapfrog)


def _check_annealing(annealing: Annealing, posterior: Posterior) -> None:
    """Its step sizes belong to the images it was tuned on, in their order."""
    if not isinstance(annealing, Annealing):
        raise ValueError(f"annealing is a {type(annealing).__name__}; give what tune_annealing returns")
    n = annealing.leapfrog_step.shape[1]
    if n != len(posterior):
        raise ValueError(
            f"annealing was tuned on {n} images and the posterior has {len(posterior)}; tune it on these with tune_annealing"
        )


def _interpolated(position: Tensor, values: Tensor) -> Tensor:
    """Rows of values [m, n] at positions between 0 and m - 1, linearly: [len(position), n]."""
    position = position.to(values.device)
    below = position.floor().long().clamp(max=len(values) - 2)
    fraction = (position - below)[:, None]
    return (1 - fraction) * values[below] + fraction * values[below + 1]


def _move(
    copies: Posterior, state: State, beta: float, leapfrog_step: Tensor, n_leapfrog: int, rng: torch.Generator | None
) -> tuple[State, Tensor]:
    """A step that keeps p_beta, with eps [n] of each image, and its acceptance averaged over the image's chains [n].

    Each chain shortens its eps by a factor drawn from [1/2, 1] first: paths of one length would come back to where they
    began in those directions whose period they fit, and never mix there.
    """
    n_chains = len(copies) // len(leapfrog_step)
    step = leapfrog_step.repeat_interleave(n_chains) * (1 - 0.5 * uniform_like(state.log_likelihood, rng))
    state, probability = hmc_step(copies, state, beta, step[:, None].to(state.e), n_leapfrog, rng)
    return state, probability.unflatten(0, (-1, n_chains)).mean(1)


def _estimate(log_weights: Tensor, acceptance: list[Tensor]) -> LikelihoodEstimate:
    """The log of the mean weight of each image, for log weights [n, C]."""
    n_chains = log_weights.shape[1]
    normalised = log_weights.softmax(1)
    variance = (normalised - 1 / n_chains).square().sum(1) * n_chains / (n_chains - 1)
    return LikelihoodEstimate(
        log_weights.logsumexp(1) - math.log(n_chains),
        variance.sqrt(),
        1 / normalised.square().sum(1),
        torch.stack(acceptance),
        log_weights,
    )
