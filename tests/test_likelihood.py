"""log p(x) by annealed importance sampling against closed forms and quadrature."""

import pytest
import torch

import srlib
from srlib.brute_force import short_run_density
from srlib.evaluation.likelihood import annealed_importance_sampling, bidirectional, simulate


@pytest.mark.parametrize("masked", [False, True])
def test_both_sides_meet_at_the_closed_form(linear_posterior, masked):
    prior = linear_posterior(n=4, mask=masked)
    x, e = simulate(prior.generator, 4, prior.sigma, torch.Generator().manual_seed(1))
    posterior = srlib.Posterior(prior.generator, x, prior.sigma, prior.mask)
    below, above = bidirectional(posterior, e, 250, 60, 3, torch.Generator().manual_seed(2))
    exact = srlib.ClosedForm(posterior).log_marginal()
    assert ((below.log_marginal - exact).abs() < 4 * below.standard_error).all()
    assert ((above.log_marginal - exact).abs() < 4 * above.standard_error).all()
    assert (below.standard_error < 0.3).all() and (below.effective_sample_size > 10).all()


def test_few_temperatures_bound_from_below_and_from_above(linear_posterior):
    """With a coarse path the estimates are biased, each to its own side."""
    prior = linear_posterior(n=1, sigma=0.1)
    x, e = simulate(prior.generator, 12, 0.1, torch.Generator().manual_seed(1))
    posterior = srlib.Posterior(prior.generator, x, 0.1)
    below, above = bidirectional(posterior, e, 12, 4, 3, torch.Generator().manual_seed(2))
    exact = srlib.ClosedForm(posterior).log_marginal()
    assert (below.log_marginal - exact).mean() < -1
    assert (above.log_marginal - exact).mean() > 1


def test_a_nonlinear_model_against_quadrature(wave):
    posterior = srlib.Posterior(wave, torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64), sigma=0.3)
    exact = short_run_density(posterior, 0.01, 1, n_points=801).log_marginal
    estimate = annealed_importance_sampling(posterior, 200, 100, 3, torch.Generator().manual_seed(0))
    assert estimate.log_marginal.item() == pytest.approx(exact, abs=4 * estimate.standard_error.item())
    assert estimate.standard_error < 0.1


def test_acceptance_is_tuned(linear_posterior):
    estimate = annealed_importance_sampling(linear_posterior(n=2), 200, 20, 3, torch.Generator().manual_seed(0))
    assert estimate.acceptance.shape == (200,)
    assert 0.45 < estimate.acceptance[50:].mean() < 0.85


@pytest.mark.parametrize("options", [dict(n_chains=1), dict(n_temperatures=0)])
def test_bad_arguments_are_refused(linear_posterior, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        annealed_importance_sampling(linear_posterior(n=1), **options)
