"""log p(x, e), its score and Hessian: against finite differences, closed forms and the paper's identity (5)-(7)."""

import math

import pytest
import torch

import srlib


def test_log_joint_is_the_log_density_with_all_constants(linear_posterior):
    posterior = linear_posterior(n=3, mask=True)
    e = posterior.generator.sample_prior(3)
    prior = torch.distributions.Normal(0, 1).log_prob(e).sum(1)
    pixels = torch.distributions.Normal(posterior.generator(e), posterior.sigma).log_prob(posterior.x)
    expected = prior + (pixels * posterior.mask).flatten(1).sum(1)
    torch.testing.assert_close(posterior.log_joint(e), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_score_equals_autograd_and_finite_differences(small_posterior, masked):
    posterior = small_posterior(masked)
    e = posterior.generator.sample_prior(len(posterior)).requires_grad_()
    (autograd,) = torch.autograd.grad(posterior.log_joint(e).sum(), e)
    torch.testing.assert_close(posterior.score(e), autograd)
    h, e = 1e-5, e.detach()
    for j in range(0, e.shape[1], 3):
        step = torch.zeros_like(e)
        step[:, j] = h
        slope = (posterior.log_joint(e + step) - posterior.log_joint(e - step)) / (2 * h)
        torch.testing.assert_close(posterior.score(e)[:, j], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_hessian_equals_the_derivative_of_the_score(small_posterior, masked):
    posterior = small_posterior(masked)
    e = posterior.generator.sample_prior(len(posterior))
    hessian = posterior.hessian(e)
    assert torch.equal(hessian, hessian.mT)
    h = 1e-5
    for j in range(0, e.shape[1], 3):
        step = torch.zeros_like(e)
        step[:, j] = h
        column = (posterior.score(e + step) - posterior.score(e - step)) / (2 * h)
        torch.testing.assert_close(hessian[:, :, j], column, rtol=1e-4, atol=1e-4)
    v = torch.randn_like(e)
    torch.testing.assert_close(posterior.hessian_product(e, v), (hessian @ v[:, :, None]).squeeze(2))


def test_hessian_of_a_linear_model_is_minus_its_precision(linear_posterior):
    posterior = linear_posterior(n=2, mask=True)
    exact = srlib.ClosedForm(posterior)
    torch.testing.assert_close(posterior.hessian(posterior.generator.sample_prior(2)), -exact.precision)


def test_score_in_chunks_is_the_same_score(small_posterior):
    posterior = small_posterior(masked=True)
    e = posterior.generator.sample_prior(len(posterior))
    torch.testing.assert_close(posterior.score(e, chunk_size=2), posterior.score(e))


def test_inference_leaves_gradients_and_flags_as_they_were(small_posterior):
    posterior = small_posterior(masked=False)
    parameters = list(posterior.generator.parameters())
    parameters[0].requires_grad_(False)
    with torch.no_grad():
        posterior.score(posterior.generator.sample_prior(len(posterior)))
    assert all(p.grad is None for p in parameters)
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)


def test_hidden_pixels_do_not_matter_and_may_be_anything(small_posterior):
    posterior = small_posterior(masked=True)
    e = posterior.generator.sample_prior(len(posterior))
    garbage = posterior.x.masked_fill(posterior.mask.expand_as(posterior.x) == 0, math.nan)
    other = srlib.Posterior(posterior.generator, garbage, posterior.sigma, posterior.mask)
    assert torch.equal(posterior.score(e), other.score(e))
    assert torch.equal(posterior.log_joint(e), other.log_joint(e))


def test_gradient_identity_of_equations_5_to_7(linear_posterior):
    """d log p(x) / d theta, by autograd through the closed form, equals the posterior mean of d log p(x, e) / d theta."""
    posterior = linear_posterior(n=1, mask=True)
    g, exact = posterior.generator, srlib.ClosedForm(posterior)
    n = 200_000
    mean, covariance = exact.posterior_moments()
    e = mean + mean.new_empty(n, g.latent_dim).normal_() @ torch.linalg.cholesky(covariance[0]).T
    residual = (posterior.x - g(e)).flatten(1) * posterior.mask.flatten(1) / posterior.sigma**2
    per_sample = torch.einsum("ni,nj->nij", residual, e)  # d log p(x, e) / d W of each draw

    pixels = posterior.mask[0].flatten().bool()
    weight, bias = g.weight.detach().clone().requires_grad_(), g.bias.detach().clone().requires_grad_()
    covariance_x = weight @ weight.T + posterior.sigma**2 * torch.eye(
        len(bias), dtype=weight.dtype, device=weight.device
    )
    marginal = torch.distributions.MultivariateNormal(bias[pixels], covariance_x[pixels][:, pixels])
    log_p = marginal.log_prob(posterior.x.flatten()[pixels])
    torch.testing.assert_close(log_p, exact.log_marginal()[0])
    by_weight, by_bias = torch.autograd.grad(log_p, (weight, bias))
    for expected, draws in [(by_weight, per_sample), (by_bias, residual)]:
        error = draws.std(0) / n**0.5
        assert ((draws.mean(0) - expected).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 1, 28, 28)), r"x has shape \(2, 1, 28, 28\)"),
        (dict(x=torch.zeros(2, 1, 16, 16, dtype=torch.uint8)), "scale it to"),
        (dict(x=torch.full((2, 1, 16, 16), math.nan)), "NaN"),
        (dict(sigma=0.0), "sigma=0"),
        (dict(sigma=math.inf), "sigma=inf"),
        (dict(mask=torch.ones(3, 1, 16, 16)), r"mask has shape \(3, 1, 16, 16\)"),
        (dict(mask=torch.ones(1, 8)), "does not broadcast"),
        (dict(mask=torch.full((1, 1, 16, 16), 0.5)), "0 .hidden. and 1 .observed."),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = dict(x=torch.zeros(2, 1, 16, 16), sigma=0.15, mask=None) | change
    with pytest.raises(ValueError, match=message):
        srlib.Posterior(srlib.TopDownGenerator((2, 3), (1, 16, 16), 4, 8), **arguments)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_a_score_in_chunks_keeps_its_graph_without_gradient_mode(small_posterior, chunk_size):
    posterior = small_posterior(masked=False)
    e = posterior.generator.sample_prior(4, torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        score = posterior.score(e, create_graph=True, chunk_size=chunk_size)
    (slope,) = torch.autograd.grad(score.sum(), e)
    torch.testing.assert_close(slope, posterior.hessian(e).sum(1))


def test_latents_of_another_shape_are_refused(small_posterior):
    posterior = small_posterior(masked=False)
    with pytest.raises(ValueError, match=r"need \[\d, 12\]"):
        posterior.score(torch.zeros(len(posterior), 7, dtype=torch.float64))


def test_a_mask_of_booleans_is_a_mask(small_posterior):
    posterior = small_posterior(masked=True)
    same = srlib.Posterior(posterior.generator, posterior.x, posterior.sigma, posterior.mask.bool())
    e = posterior.generator.sample_prior(4, torch.Generator().manual_seed(0))
    assert torch.equal(same.log_joint(e), posterior.log_joint(e))
