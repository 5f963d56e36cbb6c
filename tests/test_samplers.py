"""Exact samplers against the exact posterior of linear models."""

import pytest
import torch

import srlib
from srlib.samplers import hmc, mala


def stiffest(posterior):
    return torch.linalg.eigvalsh(srlib.ClosedForm(posterior[:1]).precision[0]).max().item()


def assert_moments(states, posterior, n_sigma=5):
    """The mean and covariance of states [n, d] are those of the posterior of the first image, within Monte Carlo error."""
    mean, covariance = (moment[0].cpu() for moment in srlib.ClosedForm(posterior[:1]).posterior_moments())
    states, n = states.cpu(), len(states)
    variance = covariance.diagonal()
    assert ((states.mean(0) - mean).abs() < n_sigma * (variance / n).sqrt()).all()
    error = ((variance[:, None] * variance + covariance.square()) / n).sqrt()
    assert ((states.T.cov() - covariance).abs() < n_sigma * error).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_chains_from_the_prior_reach_the_posterior(linear_posterior, sampler, masked):
    one = linear_posterior(n=1, mask=masked)
    posterior, rng = one[torch.zeros(3000, dtype=torch.int64)], torch.Generator().manual_seed(0)
    curvature = stiffest(one)
    if sampler == "mala":
        samples = mala(posterior, 150, 0.6 / curvature, rng=rng)
    else:
        samples = hmc(posterior, 30, 0.7 / curvature**0.5, 6, rng=rng)
    assert 0.5 < samples.acceptance.mean() < 1
    assert_moments(samples.final, posterior)


@pytest.mark.parametrize("step", [0.5, 1.9])
def test_the_posterior_is_invariant_at_any_step_size(linear_posterior, step):
    one, n = linear_posterior(n=1), 5000
    mean, covariance = srlib.ClosedForm(one).posterior_moments()
    normal = torch.randn(n, mean.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(mean)
    exact = mean + normal @ torch.linalg.cholesky(covariance[0]).mT
    posterior = one[torch.zeros(n, dtype=torch.int64)]
    samples = mala(posterior, 5, step / stiffest(one), exact, torch.Generator().manual_seed(0))
    assert not torch.equal(samples.final, exact)
    assert_moments(samples.final, posterior)


def test_acceptance_measures_overshoot(linear_posterior):
    one = linear_posterior(n=1)
    posterior = one[torch.zeros(500, dtype=torch.int64)]
    mean, _ = srlib.ClosedForm(one).posterior_moments()
    rates = [
        mala(posterior, 20, step / stiffest(one), mean.expand(500, -1), torch.Generator().manual_seed(0))
        .acceptance.mean()
        .item()
        for step in (0.01, 0.5, 1.9, 4.0)
    ]
    assert rates[0] > 0.99 and all(slower > faster for slower, faster in zip(rates, rates[1:])) and rates[-1] < 0.4


def test_one_leapfrog_step_is_the_langevin_step_of_short_run(linear_posterior):
    """With a step so small that everything is accepted, MALA and short_run agree given the same noise."""
    posterior = linear_posterior(n=4)
    start = torch.ones_like(posterior.generator.sample_prior(4))
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(5), dtype=start.dtype).to(start)
    samples = mala(posterior, 1, 1e-8, start, torch.Generator().manual_seed(5))
    chain = srlib.short_run(posterior, 1, 1e-8, start, noise[None])
    torch.testing.assert_close(samples.final, chain.final, rtol=1e-12, atol=1e-12)


def test_same_seed_same_bits_and_states_are_kept(linear_posterior):
    posterior = linear_posterior(n=3)
    first, second = (hmc(posterior, 7, 0.1, rng=torch.Generator().manual_seed(1), keep_states=True) for _ in range(2))
    assert torch.equal(first.states, second.states) and torch.equal(first.states[-1], first.final)
    assert first.states.shape == (7, 3, 3)


def test_hopeless_proposals_are_rejected(linear_posterior):
    posterior = linear_posterior(n=3)
    start = posterior.generator.sample_prior(3)
    samples = mala(posterior, 3, 1e300, start)
    assert torch.equal(samples.final, start) and (samples.acceptance == 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: mala(p, 0, 0.1), "n_steps=0"),
        (lambda p: mala(p, 5, -0.1), "step_size=-0.1"),
        (lambda p: hmc(p, 5, 0.0), "length=0.0"),
        (lambda p: hmc(p, 5, 0.1, n_leapfrog=0), "n_leapfrog=0"),
        (lambda p: hmc(p, 5, 0.1, initial=torch.zeros(2, 9)), r"\(2, 9\)"),
    ],
)
def test_bad_arguments_are_refused(linear_posterior, call, message):
    with pytest.raises(ValueError, match=message):
        call(linear_posterior(n=2))
