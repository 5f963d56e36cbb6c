"""ABP: its chains persist and reach the posterior; nothing else about it differs from the short run system."""

from dataclasses import replace

import pytest
import torch

import srlib
from srlib import checkpoints
from srlib.baselines import abp
from srlib.baselines.abp import ABP
from srlib.experiment import Config
from srlib.training import resume_file


@pytest.fixture
def new_system(device):
    """make(seed, options of ABP): a small system whose first weights depend on the seed."""

    def make(seed=0, system=ABP, **options):
        torch.manual_seed(seed)
        g = srlib.TopDownGenerator((3, 5), (1, 16, 16), channels=8, feature_size=8)
        return system(g, **(dict(n_steps=5, step_size=2e-3, sigma=0.3) | options)).to(device)

    return make


def fit(system, images, n_updates=12, directory=None, seed=0, **plan):
    plan = srlib.TrainingPlan(n_updates, **(dict(batch_size=6, learning_rates=(1e-3, 5e-4)) | plan))
    return system.fit(images, plan, torch.Generator().manual_seed(seed), directory, progress=False)


def chains(directory):
    return checkpoints.load(resume_file(directory))[0]["own.chains"]


def test_the_chains_reach_the_exact_posterior_while_the_generator_stands_still(linear_posterior, tmp_path):
    """200 chains of each of 3 images, in batches; K T steps in T epochs, where K steps alone are far from the posterior."""
    n_steps, n_epochs, s = 20, 25, 5e-3
    posterior = linear_posterior(3)
    exact = srlib.ClosedForm(posterior)
    system = ABP(posterior.generator, n_steps, s, posterior.sigma)
    x = posterior.x.repeat_interleave(200, 0)
    fit(system, x, 3 * n_epochs, tmp_path, batch_size=200, learning_rates=(1e-12,))
    e = chains(tmp_path).unflatten(0, (3, 200)).to(x.device)
    mean, covariance = exact.posterior_moments()
    error = (covariance.diagonal(dim1=1, dim2=2) / 200).sqrt()
    assert ((e.mean(1) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(torch.stack([c.T.cov() for c in e]), covariance, rtol=0, atol=0.02)
    cold, _ = exact.short_run_moments(s, n_steps)
    assert ((cold - mean).abs() > 8 * error).any()


def test_its_likelihood_comes_closer_to_the_optimum_than_that_of_equally_short_chains_from_noise(device):
    """Probabilistic PCA (Tipping and Bishop 1999): at known sigma the best W is U (Lambda - sigma^2)^(1/2)."""
    rng = torch.Generator().manual_seed(0)
    sigma, weight = 0.5, torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [0.5, 0], [0, 0.5]], dtype=torch.float64)
    noise = torch.randn(300, 6, generator=rng, dtype=torch.float64)
    x = torch.randn(300, 2, generator=rng, dtype=torch.float64) @ weight.T + sigma * noise
    eigenvalues, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    best = srlib.LinearGenerator(vectors[:, -2:] * (eigenvalues[-2:] - sigma**2).sqrt(), x.mean(0)).to(device)
    x = x[:, :, None, None].to(device)

    def log_likelihood(generator):
        return srlib.ClosedForm(srlib.Posterior(generator, x, sigma)).log_marginal().mean().item()

    missing = {}
    for kind in (ABP, srlib.ShortRun):
        start = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        system = kind(srlib.LinearGenerator(0.3 * start, torch.zeros(6).double()).to(device), 3, 0.02, sigma)
        fit(system, x, 300, batch_size=300, learning_rates=(5e-2, 2e-2, 5e-3))
        missing[kind] = log_likelihood(best) - log_likelihood(system.generator)
    assert 0 < missing[ABP] < 0.02 < 0.2 < missing[srlib.ShortRun]


def test_two_epochs_are_equation_21_on_chains_that_go_on(new_system, images, tmp_path):
    """By hand, from the same random numbers; sigma anneals, s follows its square."""
    options = dict(sigma=0.2, sigma_start=0.4, anneal_fraction=1.0)
    system, twin = new_system(**options), new_system(**options)
    fit(system, images, 2, tmp_path, batch_size=16, learning_rates=(1e-3,))
    rng = torch.Generator().manual_seed(0)
    e = twin.generator.sample_prior(16, rng)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for sigma in (0.4, 0.4 * 0.5**0.5):
        order = torch.randperm(16, generator=rng)
        posterior = srlib.Posterior(twin.generator, twin.as_input(images[order]), sigma)
        e[order] = srlib.short_run(posterior, 5, 2e-3 * (sigma / 0.2) ** 2, e[order], rng=rng).final
        optimizer.zero_grad()
        ((posterior.x - twin.generator(e[order])).square().flatten(1).sum(1).mean() / (2 * sigma**2)).backward()
        optimizer.step()
    torch.testing.assert_close(chains(tmp_path), e.cpu(), rtol=1e-4, atol=1e-5)
    for ours, by_hand in zip(system.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)


def test_chains_move_when_their_examples_are_visited(new_system, images, tmp_path):
    fit(new_system(), images, 2, tmp_path)  # two batches of 6 among 16 images
    start = new_system().generator.sample_prior(16, torch.Generator().manual_seed(0)).cpu()
    assert (chains(tmp_path) != start).any(1).sum() == 12


def test_a_tiny_set_is_learned_by_heart(new_system, images):
    system = new_system(step_size=6e-3)
    x = system.as_input(images)
    history = fit(system, images, 60, batch_size=16, learning_rates=(4e-3, 2e-3))
    best_constant = (x - x.mean(0)).square().mean()
    assert history["mse"][-1] < 0.4 * best_constant
    assert set(history) == {"loss", "step_size", "sigma", "mse", "spread"}


@pytest.mark.parametrize("t", [1, 5])
def test_a_killed_run_resumes_with_the_same_bits(new_system, images, tmp_path, killed_at, t):
    whole, fresh = new_system(), new_system(seed=99)
    history = fit(whole, images, 6, tmp_path / "whole")
    with killed_at(t):
        fit(new_system(), images, 6, tmp_path / "killed")
    assert fit(fresh, images, 6, tmp_path / "killed", seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    assert torch.equal(chains(tmp_path / "whole"), chains(tmp_path / "killed"))


def test_test_images_start_from_noise_like_a_short_run_of_test_steps(new_system, images):
    x = new_system().as_input(images)
    short_run = new_system(system=srlib.ShortRun, n_steps=9)
    for system, same in ((new_system(test_steps=9), True), (new_system(), False)):
        e, expected = (s.infer(x, rng=torch.Generator().manual_seed(0)) for s in (system, short_run))
        assert torch.equal(e, expected) is same
    system.fit_aggregate(images)
    assert system.sample(3).shape == system.sample(3, "aggregate").shape == (3, 1, 16, 16)


def test_a_configuration_differs_from_the_short_run_system_in_one_entry():
    short_run = Config("a", latent_dims=(2, 3), channels=4, n_steps=7, step_size=2e-3, sigma=0.2, sigma_start=0.5)
    ours, theirs = (c.build((1, 28, 28)) for c in (replace(short_run, system="abp"), short_run))
    assert type(ours) is ABP and ours.test_steps == 7
    for name in ("n_steps", "step_size", "sigma", "sigma_start", "anneal_fraction"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_the_defaults_are_the_papers(new_system):
    system = ABP(new_system().generator)
    assert (system.n_steps, system.sigma, system.sigma_at(0.0)) == (40, 0.3, 0.3)
    assert system.settings()["noise_scale"] == pytest.approx(0.3)


def test_what_does_not_fit_is_refused(new_system, images):
    config = Config("a", system="abp", latent_dims=(2,), channels=4, options={"test_steps": 3})
    assert abp.builder(config)((1, 28, 28)).test_steps == 3
    with pytest.raises(ValueError, match="'steps'.*test_steps"):
        replace(config, options={"steps": 3})
    with pytest.raises(ValueError, match="step_size_search='grid'.*use none"):
        replace(config, step_size_search="grid")
    with pytest.raises(ValueError, match="test_steps=0"):
        replace(config, options={"test_steps": 0})
    with pytest.raises(ValueError, match="batches of 1 image"):
        fit(new_system(), images[:1])
    with pytest.raises(ValueError, match="give .* n > 0"):
        fit(new_system(), images[:0])
