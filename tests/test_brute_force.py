"""q_s on a grid against closed forms and chains."""

import pytest
import torch

import srlib
from srlib.brute_force import short_run_density


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("per_step", [False, True])
def test_a_linear_model(linear_posterior, latents, per_step):
    posterior = linear_posterior(n=1, latents=latents, pixels=3, sigma=0.8)
    exact = srlib.ClosedForm(posterior)
    step = 0.7 / torch.linalg.eigvalsh(exact.precision[0]).max().item()
    s = step * torch.linspace(0.5, 2.0, 4, dtype=torch.float64)[:, None, None] if per_step else step
    grid = short_run_density(posterior, s, 4, side=7.0, n_points=121)
    assert grid.kl == pytest.approx(exact.short_run_kl(s, 4).item(), abs=1e-9)
    assert grid.log_marginal == pytest.approx(exact.log_marginal().item(), abs=1e-9)
    mean, covariance = exact.short_run_moments(s, 4)
    cell = (grid.axis[1] - grid.axis[0]).item() ** latents
    weights = (grid.density * cell)[:, None]
    found = (weights * grid.points).sum(0)
    torch.testing.assert_close(found, mean[0], atol=1e-9, rtol=0)
    centred = grid.points - found
    torch.testing.assert_close(centred.T @ (weights * centred), covariance[0], atol=1e-9, rtol=0)
    assert (grid.posterior.sum() * cell).item() == pytest.approx(1)


def test_a_nonlinear_model_against_chains(wave):
    x = torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64)
    grid = short_run_density(srlib.Posterior(wave, x, 0.4), 0.05, 8)
    chains = srlib.Posterior(wave, x.expand(40_000, -1, -1, -1), 0.4)
    ends = srlib.short_run(chains, 8, 0.05, rng=torch.Generator().manual_seed(0)).final[:, 0]
    counts = torch.histc(ends, 30, -3, 3) / len(ends)
    cell = (grid.axis[1] - grid.axis[0]).item()
    cumulative = grid.density.cumsum(0) * cell
    edges = torch.linspace(-3, 3, 31, dtype=torch.float64)
    # the cumulative Riemann sum at index i belongs to the right edge of cell i
    index = torch.searchsorted(grid.axis + cell / 2, edges).clamp(1, len(grid.axis) - 1)
    right, left = grid.axis[index] + cell / 2, grid.axis[index - 1] + cell / 2
    at_edges = torch.lerp(cumulative[index - 1], cumulative[index], (edges - left) / (right - left))
    expected = at_edges.diff()
    assert ((counts - expected).abs() < 5 * (expected / len(ends)).sqrt() + 1e-4).all()


def test_divergence_is_never_negative(wave):
    posterior = srlib.Posterior(wave, torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64), 0.4)
    assert all(short_run_density(posterior, s, 5).kl > 0 for s in (0.01, 0.05, 0.1))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(step_size=1e-6), "n_points="),
        (dict(step_size=0.05, side=1.5), "larger side"),
        (dict(step_size=-1.0), "step_size=-1.0"),
    ],
)
def test_a_grid_that_does_not_serve_is_refused(wave, options, message):
    posterior = srlib.Posterior(wave, torch.full((1, 1, 1, 1), 0.6, dtype=torch.float64), 0.4)
    with pytest.raises(ValueError, match=message):
        short_run_density(posterior, n_steps=5, **options)


def test_three_latents_are_too_many(linear_posterior):
    with pytest.raises(ValueError, match="1 or 2 latents"):
        short_run_density(linear_posterior(n=1), 0.01, 2)
