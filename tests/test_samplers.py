"""The exact samplers against the closed-form posterior, the rule of Metropolis and Hastings, and their own limits."""

import math

import pytest
import torch

import srlib
from srlib.samplers import evaluate, hmc, hmc_step, long_run, mala


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def repeated(posterior, n_chains):
    """One image, n_chains times."""
    return posterior[torch.zeros(n_chains, dtype=torch.long)]


def largest_eigenvalue(posterior):
    return torch.linalg.eigvalsh(srlib.ClosedForm(posterior).precision).max().item()


def assert_moments(samples, mean, covariance, n_errors=4.5):
    """Independent samples [n, d] have this mean and covariance, within so many standard errors."""
    n = len(samples)
    variance = covariance.diagonal()
    assert (samples.mean(0) - mean).abs().div((variance / n).sqrt()).max() < n_errors
    error = ((covariance**2 + variance[:, None] * variance) / n).sqrt()
    assert (samples.T.cov() - covariance).abs().div(error).max() < n_errors


def exact_draws(posterior, seed=0):
    mean, covariance = srlib.ClosedForm(posterior).posterior_moments()
    noise = torch.randn(mean.shape, generator=rng(seed), dtype=mean.dtype)
    return mean + (torch.linalg.cholesky(covariance) @ noise[:, :, None]).squeeze(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_chains_from_the_prior_reach_the_exact_posterior(linear_posterior, sampler, masked):
    posterior = repeated(linear_posterior(n=1, mask=masked), 5_000)
    s = 1.0 / largest_eigenvalue(posterior[:1])
    if sampler == "mala":
        samples = mala(posterior, 250, s, rng=rng())
    else:
        samples = hmc(posterior, 40, 0.8 * math.sqrt(2 * s), 4, rng=rng())
    mean, covariance = srlib.ClosedForm(posterior[:1]).posterior_moments()
    assert_moments(samples.final, mean[0], covariance[0])
    assert samples.acceptance.mean() > 0.5


@pytest.mark.parametrize("far", [False, True])
def test_long_runs_tune_themselves_to_the_exact_posterior(linear_posterior, far):
    """Annealed from the prior, or from starts far outside it; with a mask."""
    posterior = repeated(linear_posterior(n=1, mask=True), 4_000)
    start = torch.full((4_000, 3), 300.0).double() if far else None
    samples = long_run(posterior, 60, start, rng())
    mean, covariance = srlib.ClosedForm(posterior[:1]).posterior_moments()
    assert_moments(samples.final, mean[0], covariance[0])
    assert_moments(samples.trajectory[1], mean[0], covariance[0])  # what comes first is forgotten
    assert samples.acceptance.mean().item() == pytest.approx(0.86, abs=0.06)
    assert samples.trajectory.shape == (61, 4_000, 3) and torch.equal(samples.trajectory[-1], samples.final)
    if far:
        assert torch.equal(samples.initial, start)


def test_long_runs_find_all_modes(wave):
    """Modes of equal weight at several places, which a chain that is not annealed seldom leaves: against quadrature."""
    x = torch.full((1, 1, 1, 1), 0.6).double()
    e = torch.linspace(-9, 9, 20001).double()
    density = srlib.Posterior(wave, x.repeat_interleave(len(e), 0), 0.05).log_joint(e[:, None]).detach().softmax(0)
    posterior = srlib.Posterior(wave, x.repeat_interleave(2000, 0), 0.05)
    found = long_run(posterior, 100, rng=rng()).final[:, 0]
    for edge in (-3.0, -1.0, 1.0, 2.0):
        share = density[e < edge].sum().item()
        assert abs((found < edge).double().mean().item() - share) < 0.05


@pytest.mark.parametrize("n_leapfrog", [1, 3])
def test_exact_draws_stay_exact_at_a_step_size_that_biases_short_runs(linear_posterior, n_leapfrog):
    """One step from the posterior: the correction keeps its moments; the same step without it does not."""
    posterior = repeated(linear_posterior(n=1), 40_000)
    start, s = exact_draws(posterior), 1.2 / largest_eigenvalue(posterior[:1])
    mean, covariance = srlib.ClosedForm(posterior[:1]).posterior_moments()
    corrected = hmc(posterior, 2, math.sqrt(2 * s), n_leapfrog, start, rng(1))
    assert_moments(corrected.final, mean[0], covariance[0])
    assert corrected.acceptance.mean() < 0.9
    with pytest.raises(AssertionError):
        assert_moments(srlib.short_run(posterior, 2, s, start, rng=rng(1)).final, mean[0], covariance[0])


@pytest.mark.parametrize("masked", [False, True])
def test_mala_follows_the_rule_of_metropolis_and_hastings(small_posterior, masked):
    """Acceptance from the densities of Eq. (10)'s kernel forwards and backwards, score and log density from Posterior."""
    posterior, s = small_posterior(masked), 0.03
    start = srlib.short_run(
        posterior, 200, s / 2, rng=rng(3)
    ).final  # near the posterior: from the prior all are accepted
    noise = torch.randn(start.shape, generator=rng(5), dtype=start.dtype)
    end = srlib.short_run(posterior, 1, s, start, noise[None]).final

    def log_kernel(a, b):
        mean = a + s * posterior.score(a)
        return torch.distributions.Normal(mean, math.sqrt(2 * s)).log_prob(b).sum(1)

    with torch.no_grad():
        log_ratio = (
            posterior.log_joint(end) - posterior.log_joint(start) + log_kernel(end, start) - log_kernel(start, end)
        )
    step = mala(posterior, 1, s, start, rng(5))
    torch.testing.assert_close(step.acceptance, log_ratio.clamp(max=0).exp())
    moved = (step.final != start).any(1)
    torch.testing.assert_close(step.final[moved], end[moved])
    assert 0.01 < step.acceptance.min() < 0.99


@pytest.mark.parametrize("masked", [False, True])
def test_one_evaluation_gives_the_density_and_score_of_the_posterior(small_posterior, masked):
    posterior = small_posterior(masked)
    e = posterior.generator.sample_prior(4, rng())
    state = evaluate(posterior, e)
    log_prior = torch.distributions.Normal(0, 1).log_prob(e).sum(1)
    torch.testing.assert_close(state.log_likelihood + log_prior, posterior.log_joint(e).detach())
    torch.testing.assert_close(state.score(1.0), posterior.score(e))
    torch.testing.assert_close(state.score(0.0), -e)
    assert all(p.requires_grad for p in posterior.generator.parameters())


def test_a_tempered_step_keeps_the_tempered_gaussian(linear_posterior):
    posterior, beta = repeated(linear_posterior(n=1), 40_000), 0.3
    tempered = srlib.Posterior(posterior.generator, posterior.x, posterior.sigma / math.sqrt(beta))
    state = evaluate(posterior, exact_draws(tempered))
    step = torch.tensor(1.2 / math.sqrt(largest_eigenvalue(tempered[:1])), dtype=torch.float64)
    state, _ = hmc_step(posterior, state, beta, step, 3, rng(1))
    mean, covariance = srlib.ClosedForm(tempered[:1]).posterior_moments()
    assert_moments(state.e, mean[0], covariance[0])


def test_mala_accepts_all_small_steps_and_fewer_as_steps_overshoot(linear_posterior):
    posterior = repeated(linear_posterior(n=1), 2_000)
    start, largest = exact_draws(posterior), largest_eigenvalue(posterior[:1])
    rates = [mala(posterior, 5, f / largest, start, rng()).acceptance.mean().item() for f in (1e-4, 0.1, 1.0, 1.9, 4.0)]
    assert rates[0] > 0.9999
    assert rates == sorted(rates, reverse=True)
    assert rates[3] < 0.75 and rates[4] < 0.4


def test_paths_that_leave_all_bounds_are_rejected(small_posterior):
    posterior = small_posterior(masked=False)
    start = posterior.generator.sample_prior(4, rng())
    samples = hmc(posterior, 2, 1e200, 3, start, rng())
    assert torch.equal(samples.final, start)
    assert samples.acceptance.eq(0).all()


def test_the_same_seed_gives_the_same_bits_and_the_trajectory(linear_posterior):
    posterior = linear_posterior(n=3)
    a = hmc(posterior, 6, 0.1, 4, rng=rng(2), keep_trajectory=True)
    b = hmc(posterior, 6, 0.1, 4, rng=rng(2))
    assert torch.equal(a.final, b.final) and torch.equal(a.acceptance, b.acceptance)
    assert a.trajectory.shape == (7, 3, 3) and b.trajectory is None
    assert torch.equal(a.trajectory[0], a.initial) and torch.equal(a.trajectory[-1], a.final)
    assert not torch.equal(a.final, hmc(posterior, 6, 0.1, 4, rng=rng(3)).final)


def test_a_step_size_per_latent_is_exact_too(linear_posterior):
    posterior = repeated(linear_posterior(n=1), 20_000)
    mean, covariance = srlib.ClosedForm(posterior[:1]).posterior_moments()
    scales = 1.0 * covariance[0].diagonal() * torch.tensor([0.3, 1.0, 0.6], dtype=torch.float64)
    assert_moments(mala(posterior, 3, scales, exact_draws(posterior), rng(1)).final, mean[0], covariance[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(n_steps=0, step_size=0.1), "n_steps=0"),
        (dict(n_steps=2, step_size=-0.1), "positive and finite"),
        (dict(n_steps=2, step_size=0.1, n_leapfrog=1.5), "n_leapfrog=1.5"),
        (dict(n_steps=2, step_size=0.1, initial=torch.zeros(2, 2)), "e has shape"),
        (dict(n_steps=2, step_size=0.1, initial=torch.full((3, 3), torch.nan, dtype=torch.float64)), "not finite"),
    ],
)
def test_arguments_that_do_not_fit_are_named(linear_posterior, arguments, message):
    with pytest.raises(ValueError, match=message):
        hmc(linear_posterior(n=3), **arguments)


def test_long_runs_name_what_does_not_fit(linear_posterior):
    for arguments, message in (
        (dict(n_steps=1), "n_steps=1"),
        (dict(n_steps=4, initial=torch.zeros(2, 2)), "e has shape"),
        (dict(n_steps=4, rng=3), "rng=3 must be a torch.Generator"),
    ):
        with pytest.raises(ValueError, match=message):
            long_run(linear_posterior(n=3), **arguments)


def test_mala_rejects_a_negative_step_size(linear_posterior):
    with pytest.raises(ValueError, match="positive and finite"):
        mala(linear_posterior(n=3), 2, -0.1)


@pytest.mark.parametrize("sampler", [mala, hmc])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(step_size=True), "step_size=True must be a number"),
        (dict(step_size=torch.tensor(True)), r"step_size=tensor\(True\) must be a number"),
        (dict(step_size=-1), "step_size=-1 must be positive"),
        (dict(step_size=math.nan), "step_size=nan must be positive"),
        (dict(step_size="0.1"), "step_size='0.1' must be a number"),
        (dict(step_size=torch.full((4,), 0.1)), r"step_size has shape \(4,\)"),
        (dict(n_steps=True), "n_steps=True must be a whole number"),
        (dict(rng=3), "rng=3 must be a torch.Generator"),
        (dict(initial=[[0.0] * 3] * 3), r"e=\[\[0.0, .* must be a tensor \[3, 3\]"),
    ],
)
def test_both_samplers_name_the_value_that_does_not_fit(linear_posterior, sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler(linear_posterior(n=3), **(dict(n_steps=2, step_size=0.1) | arguments))
