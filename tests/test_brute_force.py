"""Densities on a grid against closed forms, and against chains where the generator folds."""

import math

import pytest
import torch
from torch import nn

import srlib
from srlib.brute_force import regular_axes, short_run_density
from srlib.generators import Generator


class Wave(Generator):
    """g(e) = sin(frequency e_1 + phases): not one-to-one, so the posterior has several modes and steps fold."""

    def __init__(self, frequency=2.0, pixels=3, latents=1):
        super().__init__((latents,), (pixels, 1, 1))
        self.frequency = nn.Parameter(torch.tensor(frequency, dtype=torch.float64))
        self.register_buffer("phases", torch.linspace(0, 1, pixels, dtype=torch.float64))

    def forward(self, e):
        return torch.sin(self.frequency * e.sum(1, keepdim=True) + self.phases)[:, :, None, None]


def wave_posterior(sigma=0.4):
    g = Wave()
    with torch.no_grad():
        return srlib.Posterior(g, g(torch.tensor([[0.9]], dtype=torch.float64)), sigma)


def moments(result):
    mass = (result.density * result.volume)[:, None]
    mean = (mass * result.grid).sum(0)
    return mean, (mass * (result.grid - mean)).T @ (result.grid - mean)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overshoot", [0.3, 1.6])
@pytest.mark.parametrize("latents", [1, 2])
def test_linear_models_agree_with_their_closed_forms(linear_posterior, latents, overshoot, masked):
    posterior = linear_posterior(n=1, latents=latents, mask=masked, pixels=4, sigma=1.0)
    exact = srlib.ClosedForm(posterior)
    s = overshoot / torch.linalg.eigvalsh(exact.precision).max().item()
    result = short_run_density(posterior, s, 6, regular_axes(latents, 7.0, 401 if latents == 1 else 121))
    assert result.kl == pytest.approx(exact.short_run_kl(s, 6).item(), abs=2e-5)
    assert result.log_marginal == pytest.approx(exact.log_marginal().item(), abs=1e-6)
    mean, covariance = exact.short_run_moments(s, 6)
    torch.testing.assert_close(moments(result), (mean[0], covariance[0]), atol=2e-5, rtol=0)
    assert result.entropy == pytest.approx(
        torch.distributions.MultivariateNormal(mean[0], covariance[0]).entropy().item(), abs=2e-5
    )
    assert (result.posterior_density * result.volume).sum().item() == pytest.approx(1.0)
    assert 0 <= result.lost_mass < 1e-6


@pytest.mark.parametrize("per", ["step", "latent", "both"])
def test_step_sizes_per_step_and_per_latent(linear_posterior, per):
    posterior = linear_posterior(n=1, latents=2, pixels=4, sigma=1.0)
    exact = srlib.ClosedForm(posterior)
    s = 0.8 / torch.linalg.eigvalsh(exact.precision).max().item()
    steps = s * torch.tensor([1.0, 0.6, 0.6, 0.4], dtype=torch.float64)[:, None, None]
    latents = torch.tensor([0.5, 1.0], dtype=torch.float64)
    step_size = {"step": steps, "latent": s * latents, "both": steps * latents}[per]
    result = short_run_density(posterior, step_size, 4, regular_axes(2, 6.5, 151))
    assert result.kl == pytest.approx(exact.short_run_kl(step_size, 4).item(), abs=2e-5)


def test_chains_of_a_folding_generator_fall_where_the_density_is():
    """Each bin's count within its binomial error, where no Gaussian fits and steps fold (|1 + s H| up to 5)."""
    posterior, s, n_steps, n_chains = wave_posterior(), 0.08, 5, 200_000
    result = short_run_density(posterior, s, n_steps, regular_axes(1, 16.0, 2001))
    copies = posterior[torch.zeros(n_chains, dtype=torch.long)]
    chain = srlib.short_run(copies, n_steps, s, rng=torch.Generator().manual_seed(0))
    bins = torch.linspace(-4, 4, 51, dtype=torch.float64)
    counts = torch.histogram(chain.final.flatten(), bins).hist
    cumulative = torch.cat([torch.zeros(1), (result.density * result.volume).cumsum(0)])
    # the grid's points are the centres of its cells; the bins' edges lie on points, so halves are shared
    at_edges = cumulative[:-1] + 0.5 * result.density * result.volume
    index = ((bins + 16.0) / 0.016).round().long()
    p = at_edges[index].diff()
    z = (counts - n_chains * p) / (n_chains * p * (1 - p)).sqrt()
    assert z.abs().max() < 4.5
    assert z.square().mean() < 2.0
    energy = copies.log_joint(chain.final).detach()
    assert (energy.mean() - result.energy).abs() < 4.5 * energy.std() / math.sqrt(n_chains)


def test_the_result_does_not_depend_on_the_grid():
    coarse, fine = (
        short_run_density(wave_posterior(), 0.05, 10, regular_axes(1, b, m)) for b, m in ((7, 400), (9, 1500))
    )
    for name in ("kl", "entropy", "energy", "log_marginal"):
        assert getattr(coarse, name) == pytest.approx(getattr(fine, name), abs=1e-5)
    assert coarse.kl > 0


def test_two_latents_of_which_only_the_sum_matters():
    """Rotated by 45 degrees, the model is one-dimensional times a prior: log p(x) is that of frequency sqrt(2)."""
    x = wave_posterior().x
    two = short_run_density(srlib.Posterior(Wave(2.0, latents=2), x, 0.4), 0.02, 3, regular_axes(2, 7.0, 251))
    one = short_run_density(srlib.Posterior(Wave(2.0 * math.sqrt(2)), x, 0.4), 0.02, 3, regular_axes(1, 8.0, 801))
    assert two.log_marginal == pytest.approx(one.log_marginal, abs=1e-5)
    # the direction that x does not see starts at its target N(0, 1); its variance grows as in the closed form
    variance = 1.0
    for _ in range(3):
        variance = 0.98**2 * variance + 0.04
    assert two.kl == pytest.approx(one.kl + 0.5 * (variance - 1 - math.log(variance)), abs=1e-5)


@pytest.mark.parametrize(
    "step_size, bound, n_points, message",
    [
        (0.05, 3.0, 801, r"leaves the grid \[-3, 3\]"),
        (0.9, 6.0, 801, r"chain, by step \d+, leaves the grid"),
        (0.05, 7.0, 101, "does not resolve the kernel of step 0"),
    ],
)
def test_grids_that_do_not_fit_are_refused_with_the_remedy(step_size, bound, n_points, message):
    with pytest.raises(ValueError, match=message):
        short_run_density(wave_posterior(), step_size, 10, regular_axes(1, bound, n_points))


def test_the_spacing_that_the_message_asks_for_is_enough():
    with pytest.raises(ValueError, match="or less would") as refusal:
        short_run_density(wave_posterior(), 0.02, 8, regular_axes(1, 7.0, 41))
    spacing = float(str(refusal.value).split("a spacing of ")[1].split()[0])
    short_run_density(wave_posterior(), 0.02, 8, regular_axes(1, 7.0, math.ceil(14 / (0.9 * spacing))))


def test_arguments_that_do_not_fit_are_named(linear_posterior):
    with pytest.raises(ValueError, match="1 or 2 latents"):
        short_run_density(linear_posterior(n=1), 0.1, 2, regular_axes(3, 6.0, 50))
    with pytest.raises(ValueError, match="one image at a time"):
        short_run_density(linear_posterior(n=2, latents=1), 0.1, 2, regular_axes(1, 6.0, 50))
    with pytest.raises(ValueError, match="need 1 axes"):
        short_run_density(wave_posterior(), 0.1, 2, regular_axes(2, 6.0, 50))
    with pytest.raises(ValueError, match="even steps"):
        short_run_density(wave_posterior(), 0.1, 2, (torch.logspace(0, 1, 50),))
