"""The exact quantities of linear models against independent computations: dense densities, recursion, quadrature."""

import pytest
import torch

import srlib


@pytest.mark.parametrize("masked", [False, True])
def test_posterior_moments_by_conditioning_the_joint_gaussian(linear_posterior, masked):
    """Condition the dense joint of (e, x) on the observed pixels, instead of inverting the precision."""
    posterior = linear_posterior(n=3, mask=masked)
    g, exact = posterior.generator, srlib.ClosedForm(posterior)
    mean, covariance = exact.posterior_moments()
    w, d = g.weight.detach(), g.latent_dim
    for i in range(3):
        pixels = exact.mask[i].bool()
        cov_x = (w @ w.T + posterior.sigma**2 * torch.eye(len(w), dtype=w.dtype, device=w.device))[pixels][:, pixels]
        gain = torch.linalg.solve(cov_x, w[pixels]).T
        difference = posterior.x[i].flatten()[pixels] - g.bias.detach()[pixels]
        torch.testing.assert_close(mean[i], gain @ difference)
        torch.testing.assert_close(covariance[i], torch.eye(d, dtype=w.dtype, device=w.device) - gain @ w[pixels])


@pytest.mark.parametrize("masked", [False, True])
def test_log_marginal_is_the_dense_gaussian_density(linear_posterior, masked):
    posterior = linear_posterior(n=3, mask=masked)
    g, exact = posterior.generator, srlib.ClosedForm(posterior)
    w = g.weight.detach()
    covariance = w @ w.T + posterior.sigma**2 * torch.eye(len(w), dtype=w.dtype, device=w.device)
    for i, log_p in enumerate(exact.log_marginal()):
        pixels = exact.mask[i].bool()
        density = torch.distributions.MultivariateNormal(g.bias.detach()[pixels], covariance[pixels][:, pixels])
        torch.testing.assert_close(log_p, density.log_prob(posterior.x[i].flatten()[pixels]))


def test_short_run_moments_in_the_eigenbasis(linear_posterior):
    """DESIGN's S = A^2K + 2 s sum_{j<K} A^2j with A = I - s P, summed eigenvalue by eigenvalue."""
    posterior = linear_posterior(n=1)
    exact, n_steps = srlib.ClosedForm(posterior), 9
    values, vectors = torch.linalg.eigh(exact.precision[0])
    s = 1.3 / values.max().item()
    a = 1 - s * values
    variance = a ** (2 * n_steps) + 2 * s * sum(a ** (2 * j) for j in range(n_steps))
    mean, covariance = exact.short_run_moments(s, n_steps)
    torch.testing.assert_close(covariance[0], vectors @ torch.diag(variance) @ vectors.T)
    posterior_mean, _ = exact.posterior_moments()
    torch.testing.assert_close(mean[0], vectors @ torch.diag(1 - a**n_steps) @ vectors.T @ posterior_mean[0])


def test_short_run_kl_is_the_kl_of_the_two_gaussians(linear_posterior):
    posterior = linear_posterior(n=2, mask=True)
    exact = srlib.ClosedForm(posterior)
    s = 0.9 / torch.linalg.eigvalsh(exact.precision).max().item()
    q, p = (
        torch.distributions.MultivariateNormal(*m) for m in (exact.short_run_moments(s, 5), exact.posterior_moments())
    )
    torch.testing.assert_close(exact.short_run_kl(s, 5), torch.distributions.kl_divergence(q, p))
    assert (exact.short_run_kl(s, 5) > 0).all()


def test_the_kl_of_an_absurd_step_size_is_huge_and_then_infinite(linear_posterior):
    """Its limit is infinity: the trace grows as s^2K, the log-determinant as log s."""
    exact = srlib.ClosedForm(linear_posterior(n=2))
    kl = torch.stack([exact.short_run_kl(10.0**power, 3) for power in (3, 10, 30, 60, 200)])
    assert (kl.diff(dim=0)[:2] > 0).all() and kl[:3].isfinite().all()
    assert (kl[3:] == torch.inf).all()


def test_long_runs_keep_the_bias_of_the_discretisation(linear_posterior):
    """K to infinity: KL goes to 1/2 sum (r - 1 - log r), r = 1 / (1 - s lambda / 2), not to zero."""
    exact = srlib.ClosedForm(linear_posterior(n=1))
    values = torch.linalg.eigvalsh(exact.precision[0])
    s = 1.0 / values.max().item()
    r = 1 / (1 - s * values / 2)
    torch.testing.assert_close(exact.short_run_kl(s, 20_000)[0], 0.5 * (r - 1 - r.log()).sum())


def test_a_float32_model_is_computed_in_float64(linear_posterior):
    posterior = linear_posterior(n=1)
    single = srlib.LinearGenerator(posterior.generator.weight.float(), posterior.generator.bias.float())
    exact = srlib.ClosedForm(srlib.Posterior(single, posterior.x.float(), posterior.sigma))
    assert exact.log_marginal().dtype == torch.float64


def test_only_linear_generators_have_closed_forms(small_posterior):
    with pytest.raises(ValueError, match="TopDownGenerator"):
        srlib.ClosedForm(small_posterior(masked=False))
