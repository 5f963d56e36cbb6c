"""The gap between short runs and posteriors, and the residual of Eq. (26), where both are known in closed form."""

import math

import pytest
import torch

import srlib
from srlib import entropy
from srlib.evaluation import mismatch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_divergence_over_k_is_that_of_the_closed_form(linear_posterior):
    """Of many chains the differences in k, and with log p(x) the divergence itself; the step size changes on the way."""
    posterior = linear_posterior(n=2)
    exact = srlib.ClosedForm(posterior)
    s = torch.tensor([0.01, 0.02, 0.01, 0.04]).double()[:, None, None]
    found = mismatch.objective_by_steps(posterior.repeated(3000), 4, s, rng=rng()).unflatten(1, (2, -1))
    prior = exact.log_marginal() - posterior.repeated(3000).log_joint(
        posterior.generator.sample_prior(6000, rng(1))
    ).unflatten(0, (2, -1)).mean(1) - 1.5 * math.log(2 * math.pi * math.e)  # fmt: skip
    expected = torch.stack([prior, *(exact.short_run_kl(s[:k], k) for k in range(1, 5))])
    error = found.std(2) / math.sqrt(3000)
    z = (found.mean(2) + exact.log_marginal() - expected) / error
    assert z[1:].abs().max() < 4 and z[0].abs().max() < 5.6
    assert (error[1:] < 0.1 * expected.diff(dim=0).abs()).all()  # so that a step too many would be seen


def test_every_prefix_of_a_chain_has_its_own_estimate(small_posterior):
    """Row k is what `entropy.linear_noise` says of the first k steps alone."""
    posterior = small_posterior(False)
    found = mismatch.objective_by_steps(posterior, 3, 2e-3, rng=rng())
    numbers = srlib.short_run(posterior, 3, 2e-3, rng=rng())
    for k in (1, 3):
        chain = srlib.short_run(posterior, k, 2e-3, numbers.initial, numbers.noise[:k])
        expected = entropy.linear_noise(posterior, chain) - posterior.log_joint(chain.final).detach()
        torch.testing.assert_close(found[k], expected)


def test_the_divergence_of_a_linear_model(linear_posterior):
    """Chains that overlook a third of the way: several nats of divergence, found within the error over images."""
    posterior = linear_posterior(n=200)
    exact = srlib.ClosedForm(posterior).short_run_kl(0.01, 3)
    error = mismatch.short_run_divergence(posterior, 3, 0.01, rng=rng()) - exact
    assert exact.mean() > 1
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(200) < 0.5 * exact.mean()


def test_the_likelihood_of_a_linear_model_has_no_error(linear_posterior):
    """The Gaussian at the mode is the posterior, so that all weights are p(x); with a mask too."""
    posterior = linear_posterior(n=3, mask=True)
    torch.testing.assert_close(mismatch.log_marginal(posterior, rng()), srlib.ClosedForm(posterior).log_marginal())


def test_the_likelihood_of_a_posterior_with_several_modes(wave):
    """One latent and modes at sin(1.5 e) = x, against quadrature: below, by no more than a far mode that no start found."""
    x = torch.tensor([0.6, -0.3]).double().reshape(2, 1, 1, 1)
    posterior = srlib.Posterior(wave, x, 0.1)
    e = torch.linspace(-9, 9, 20001).double()
    log_joint = srlib.Posterior(wave, x.repeat_interleave(len(e), 0), 0.1).log_joint(e.repeat(2)[:, None]).detach()
    exact = log_joint.view(2, -1).logsumexp(1) + (e[1] - e[0]).log()
    missed = exact - mismatch.log_marginal(posterior, rng())
    assert missed.min() > -0.05 and missed.max() < 0.3


def test_the_energy_gap_of_a_linear_model(linear_posterior):
    """Its difference from the divergence is that of the entropies, where short runs stop early and where they overshoot."""
    posterior = linear_posterior(n=2)
    exact = srlib.ClosedForm(posterior)
    for n_steps, s in ((3, 0.01), (40, 1.7 / torch.linalg.eigvalsh(exact.precision).max().item())):
        entropies = [
            torch.logdet(S) / 2 for S in (exact.short_run_moments(s, n_steps)[1], exact.posterior_moments()[1])
        ]
        expected = exact.short_run_kl(s, n_steps) + entropies[0] - entropies[1]
        found = mismatch.energy_gap(posterior.repeated(10), n_steps, s, 200, 40, rng())
        error = found.gap.unflatten(0, (2, -1)) - expected[:, None]
        assert (error.mean(1).abs() < 4.8 * error.std(1) / math.sqrt(10)).all()
        assert (error.std(1) / math.sqrt(10) < 0.1 * expected).all()
        apart = found.disagreement.unflatten(0, (2, -1))
        assert (apart.mean(1).abs() < 4.8 * apart.std(1) / math.sqrt(10)).all() and apart.std() < 0.3
        assert found.acceptance.shape == (20,) and 0.7 < found.acceptance.mean() < 0.99


def exact_residual(generator, images, sigma, n_steps, s):
    """|E sigma^2 d/dW log p|^2 of a linear model, bias included: sum of (x - b - W m) m' - W S, and of x - b - W m."""
    posterior = srlib.Posterior(generator, images, sigma)
    m, S = srlib.ClosedForm(posterior).short_run_moments(s, n_steps)
    rest = images.flatten(1) - generator.bias - m @ generator.weight.T
    by_weight = (rest[:, :, None] * m[:, None, :] - generator.weight @ S).mean(0)
    return (by_weight.square().sum() + rest.mean(0).square().sum()).item()


def test_the_residual_of_a_linear_model(linear_posterior):
    """Unbiased: batches of the same 8 images, whose chains alone differ. Noise is larger than what is looked for."""
    posterior = linear_posterior(n=8)
    generator, images = posterior.generator, posterior.x
    expected = exact_residual(generator, images, 0.5, 4, 0.02)
    draws, noisy = [], []
    for i in range(60):
        found = mismatch.mean_gradients(generator, images.repeat(10, 1, 1, 1), 0.5, 4, 0.02, 10, rng(i))
        draws.append(mismatch.squared_norm_of_mean(found))
        noisy.append(found[0].square().sum())
    draws = torch.stack(draws)
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(60) < 0.2 * expected
    assert torch.stack(noisy).mean() > 1.5 * expected


def test_the_noise_of_batches_does_not_count():
    """Gradients of mean 0 and length sqrt(500): the mean of their squares is 500, that of products of two of them 0."""
    gradients = torch.randn(30, 500, generator=rng(), dtype=torch.float64)
    assert abs(mismatch.squared_norm_of_mean(gradients)) < 5
    assert mismatch.squared_norm_of_mean(gradients + 2.0).item() == pytest.approx(2000, rel=0.05)


def test_what_does_not_fit_is_refused(linear_posterior):
    posterior = linear_posterior(n=3)
    with pytest.raises(ValueError, match="one per step"):
        mismatch.objective_by_steps(posterior, 2, torch.full((3,), 0.01).double())
    with pytest.raises(ValueError, match="3 images cannot make n_batches=4"):
        mismatch.mean_gradients(posterior.generator, posterior.x, 0.5, 2, 0.01, 4)
    with pytest.raises(ValueError, match="n_batches"):
        mismatch.squared_norm_of_mean(torch.ones(1, 3))
    with pytest.raises(ValueError, match="gradients holds NaN"):
        mismatch.squared_norm_of_mean(torch.full((2, 3), math.nan))
    with pytest.raises(ValueError, match="give floats \\[B, P\\]"):
        mismatch.squared_norm_of_mean(torch.ones(3))
    for call in (
        mismatch.log_marginal,
        lambda p: mismatch.objective_by_steps(p, 2, 0.01),
        lambda p: mismatch.short_run_divergence(p, 2, 0.01),
        lambda p: mismatch.energy_gap(p, 2, 0.01),
    ):
        with pytest.raises(ValueError, match="posterior=None must be a Posterior"):
            call(None)
    jacobians = torch.eye(3).double().expand(2, 1, 3, 3)
    for bad in (jacobians[0], jacobians[..., :2], jacobians.long()):
        with pytest.raises(ValueError, match="jacobians are"):
            mismatch.noise_log_dets(bad, torch.tensor(0.1))
    for bad in (0.0, math.nan, "0.1", torch.full((3, 1, 1), 0.1), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="step_size"):
            mismatch.noise_log_dets(jacobians, bad)
    expected = mismatch.noise_log_dets(jacobians, torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(mismatch.noise_log_dets(jacobians, 0.1), expected)
