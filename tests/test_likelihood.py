"""Annealed importance sampling against exact likelihoods: closed forms, quadrature, and each other from both sides."""

import math

import pytest
import torch
from torch import nn

import srlib
from srlib.evaluation.likelihood import (
    annealed_importance_sampling,
    bidirectional,
    reverse_annealed_importance_sampling,
    simulate,
    tune_annealing,
)
from srlib.generators import Generator


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Fold(Generator):
    """g(e) = tanh(a e^2) in every pixel: the posterior of one latent has two modes."""

    def __init__(self):
        super().__init__((1,), (2, 1, 1))
        self.scale = nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64))

    def forward(self, e):
        return torch.tanh(self.scale * e.square())[:, :, None, None]


@pytest.mark.parametrize("masked", [False, True])
def test_linear_models_agree_with_the_closed_form(linear_posterior, masked):
    """Images of different curvature and fit, each within its own standard error; errors are as large as they say."""
    posterior = linear_posterior(n=8, mask=masked)
    exact = srlib.ClosedForm(posterior).log_marginal()
    result = annealed_importance_sampling(posterior, n_temperatures=150, n_chains=64, rng=rng(), n_leapfrog=5)
    z = (result.estimate - exact) / result.standard_error
    assert result.standard_error.max() < 0.15
    assert z.abs().max() < 4
    assert 0.2 < z.square().mean() < 3
    assert result.acceptance.shape == (149, 8)
    assert result.acceptance.mean() > 0.6 and result.acceptance.min() > 0.3
    assert (result.effective_sample_size > 8).all() and (result.effective_sample_size <= 64).all()


@pytest.mark.parametrize("masked", [False, True])
def test_both_sides_bracket_the_exact_likelihood(linear_posterior, masked):
    """Two chains and few temperatures: each side is biased, away from the truth and in its own direction."""
    g = linear_posterior(n=1).generator
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1.0], dtype=torch.float64)[None, :, None, None] if masked else None
    posterior, e = simulate(g, 400, 0.5, rng(1), mask)
    exact = srlib.ClosedForm(posterior).log_marginal()
    bounds = bidirectional(posterior, e, n_temperatures=8, n_chains=2, rng=rng(), n_leapfrog=4)
    for error, side in ((bounds.lower.estimate - exact, -1), (bounds.upper.estimate - exact, 1)):
        assert side * error.mean() / (error.std() / math.sqrt(len(error))) > 4
    # a longer path brings both close
    close = bidirectional(posterior[:100], e[:100], n_temperatures=150, n_chains=8, rng=rng(), n_leapfrog=4)
    assert close.gap.mean() < 0.2 * bounds.gap.mean()
    assert (close.lower.estimate - exact[:100]).mean().abs() < 0.1
    assert (close.upper.estimate - exact[:100]).mean().abs() < 0.1


def test_mean_weights_are_unbiased_on_both_sides_whatever_the_path(linear_posterior):
    """E w / p(x) = 1 and E p(x) / w' = 1 on a rough path of 12 temperatures: no bias from tuning or from poor steps."""
    g = linear_posterior(n=1).generator
    posterior, e = simulate(g, 4000, 2.0, rng(1))
    exact = srlib.ClosedForm(posterior).log_marginal()[:, None]
    annealing = tune_annealing(posterior[:20], 12, rng(2), n_leapfrog=3)
    annealing = type(annealing)(annealing.beta, annealing.leapfrog_step.mean(1, keepdim=True).expand(-1, 4000), 3)
    forward = annealed_importance_sampling(posterior, n_chains=2, rng=rng(3), annealing=annealing).log_weights - exact
    reverse = reverse_annealed_importance_sampling(posterior, e, annealing, 2, rng(4)).log_weights - exact
    for ratio in (forward.exp().mean(1), (-reverse).exp().mean(1)):
        assert (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(len(ratio))
        assert ratio.std() / math.sqrt(len(ratio)) < 0.03


def test_a_bimodal_posterior_agrees_with_quadrature():
    posterior, e = simulate(Fold(), 6, 0.2, rng(1))
    points = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    with torch.no_grad():
        images = posterior.generator(points[:, None])
        misfit = (posterior.x[:, None] - images).flatten(2).square().sum(2) / 0.04
    log_joint = -0.5 * (misfit + points**2 + math.log(2 * math.pi) + 2 * math.log(2 * math.pi * 0.04))
    exact = log_joint.logsumexp(1) + math.log(16 / 4000)
    bounds = bidirectional(posterior, e, n_temperatures=80, n_chains=64, rng=rng(), n_leapfrog=5)
    for side in (bounds.lower, bounds.upper):
        z = (side.estimate - exact) / side.standard_error
        assert z.abs().max() < 4
        assert side.standard_error.max() < 0.2


def test_the_path_is_tuned_to_the_images(linear_posterior):
    posterior = linear_posterior(n=5)
    annealing = tune_annealing(posterior, 40, rng(), n_leapfrog=5)
    assert annealing.beta[0] == 0 and annealing.beta[-1] == 1
    assert (annealing.beta.diff() > 0).all()
    assert annealing.beta[20] < 0.2  # the likelihood decides most where it is still weak
    assert annealing.leapfrog_step.shape == (40, 5)
    assert annealing.leapfrog_step[-1].mean() < 0.7 * annealing.leapfrog_step[0].mean()


def test_a_multilayer_generator_in_single_precision_is_bracketed(small_posterior):
    posterior, e = simulate(small_posterior(False).generator.float(), 3, 0.3, rng(1))
    bounds = bidirectional(posterior, e, n_temperatures=60, n_chains=4, rng=rng(), n_leapfrog=4)
    assert bounds.lower.estimate.dtype == torch.float64
    error = (bounds.lower.standard_error**2 + bounds.upper.standard_error**2).sqrt()
    assert (bounds.gap > -4 * error - 0.01).all()
    assert bounds.gap.mean() < 3


def test_the_same_seed_gives_the_same_bits(linear_posterior):
    a, b, c = (annealed_importance_sampling(linear_posterior(n=2), 10, 3, rng(s), 3).estimate for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(n_temperatures=1), "n_temperatures=1"),
        (dict(n_chains=1), "n_chains=1"),
        (dict(n_leapfrog=0), "n_leapfrog"),
    ],
)
def test_arguments_that_do_not_fit_are_named(linear_posterior, arguments, message):
    with pytest.raises(ValueError, match=message):
        annealed_importance_sampling(linear_posterior(n=1), **arguments)


def test_the_exact_sample_must_fit_the_images(linear_posterior):
    with pytest.raises(ValueError, match="e has shape"):
        bidirectional(linear_posterior(n=2), torch.zeros(1, 3, dtype=torch.float64), 4, 2, rng())


def test_an_annealing_of_other_images_is_refused(linear_posterior):
    annealing = tune_annealing(linear_posterior(n=2), 4, rng())
    three = linear_posterior(n=3)
    with pytest.raises(ValueError, match="tuned on 2 images and the posterior has 3"):
        annealed_importance_sampling(three, n_chains=2, rng=rng(), annealing=annealing)
    with pytest.raises(ValueError, match="tuned on 2 images and the posterior has 3"):
        reverse_annealed_importance_sampling(three, torch.zeros(3, 3, dtype=torch.float64), annealing, 2, rng())
