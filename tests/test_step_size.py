"""The step size as a variational parameter: objective, grid search and descent against closed forms and brute force."""

import math

import pytest
import torch

import srlib
from srlib import entropy, step_size
from srlib.brute_force import regular_axes, short_run_density


class Saturating(srlib.LinearGenerator):
    """g(e) = tanh(W e + b)."""

    def forward(self, e):
        return torch.tanh(super().forward(e))


class TwoLayers(srlib.LinearGenerator):
    """A linear generator whose first 2 latents count as the top layer."""

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        self.latent_dims = (2, weight.shape[1] - 2)

    def split(self, e):
        return (e,)  # what LinearGenerator.forward expects


def curvatures(posterior):
    """Eigenvalues of the precision of p(e|x), ascending: [n, d]."""
    return torch.linalg.eigvalsh(srlib.ClosedForm(posterior).precision)


def copies(posterior, n):
    """The posterior of image 0, n times over: n independent chains."""
    return posterior[torch.zeros(n, dtype=torch.int64)]


def with_generator(posterior, kind):
    """The same images and weights under another generator."""
    g = kind(posterior.generator.weight, posterior.generator.bias).to(posterior.x.device)
    return srlib.Posterior(g, posterior.x, posterior.sigma, posterior.mask)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def best_constant(exact, n_steps):
    """(s, KL) at the minimum of the exact KL, averaged over images: on a grid, then on a fine one around its best point."""
    top = 1.99 / torch.linalg.eigvalsh(exact.precision).max().item()
    grid = torch.logspace(-4, 0, 151, dtype=torch.float64) * top
    for _ in range(2):
        kl = torch.stack([exact.short_run_kl(s.item(), n_steps).mean() for s in grid])
        best = int(kl.argmin())
        around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        found, grid = (grid[best].item(), kl[best].item()), torch.linspace(*around, 51, dtype=torch.float64)
    return found


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["linear_noise", "path_gaussian"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_objective_of_a_linear_model_is_its_kl(linear_posterior, estimator, masked):
    single = linear_posterior(1, masked)
    exact, n_steps = srlib.ClosedForm(single), 8
    s = 1.2 / curvatures(single).max().item()
    values = srlib.kl_objective(copies(single, 500), s, n_steps, estimator, rng=seeded())
    expected = exact.short_run_kl(s, n_steps) - exact.log_marginal()
    assert (values.mean() - expected).abs() < 4 * values.std() / 500**0.5


@pytest.mark.parametrize("estimator", step_size.ESTIMATORS)
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (4,), (2, 1)], ids=["all", "step", "latent", "example"])
def test_gradients_in_s_are_finite_differences_under_common_random_numbers(linear_posterior, estimator, shape):
    posterior = with_generator(linear_posterior(2, mask=True, latents=4), Saturating)
    s = 0.004 * (0.5 + torch.rand(shape, generator=seeded(3), dtype=torch.float64)).to(posterior.x.device)
    direction = torch.randn(shape, generator=seeded(4), dtype=torch.float64).to(s.device)

    def objective(s):
        return srlib.kl_objective(posterior, s, 3, estimator, rng=seeded(), n_noise=3).mean()

    s.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(s), s)
    with torch.no_grad():
        difference = (objective(s + 1e-7 * direction) - objective(s - 1e-7 * direction)) / 2e-7
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", step_size.ESTIMATORS)
def test_given_numbers_are_common_random_numbers(linear_posterior, estimator):
    """initial and noise drawn in the order of the docstring from the same seed, or given: the same values."""
    posterior = linear_posterior(2)
    rng = seeded()
    initial = posterior.generator.sample_prior(2, rng)
    noise = torch.stack([torch.randn(2, 3, generator=rng, dtype=torch.float64) for _ in range(4)]).to(initial.device)
    given = srlib.kl_objective(posterior, 1e-3, 4, estimator, initial, noise, rng, n_noise=2)
    assert torch.equal(given, srlib.kl_objective(posterior, 1e-3, 4, estimator, rng=seeded(), n_noise=2))


def test_without_rng_torchs_global_seed_decides(linear_posterior):
    posterior, values = linear_posterior(2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(srlib.kl_objective(posterior, 1e-3, 2))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# --- brute force: nonlinear models in one and two dimensions ----------------------------------------------------------


def wave_posterior(wave, x, sigma):
    return srlib.Posterior(wave, torch.full((1, 1, 1, 1), x, dtype=torch.float64), sigma)


def against_brute_force(posterior, s, n_steps, estimator, axes, n_chains):
    """(estimate - exact objective, standard error, exact KL, log p(x))."""
    exact = short_run_density(posterior, s, n_steps, axes)
    values = srlib.kl_objective(copies(posterior, n_chains), s, n_steps, estimator, rng=seeded(), n_noise=20)
    true_value = exact.kl - exact.log_marginal
    return values.mean().item() - true_value, (values.std() / n_chains**0.5).item(), exact.kl, exact.log_marginal


@pytest.mark.parametrize("estimator", ["change_of_variables", "semi_implicit", "path", "path_gaussian"])
@pytest.mark.parametrize("latents", [1, 2])
def test_bounds_hold_where_no_step_folds(wave, linear_posterior, latents, estimator):
    if latents == 1:
        posterior, s, axes = wave_posterior(wave, 0.7, 0.5), 0.05, regular_axes(1, 8.0, 801)
    else:
        posterior = with_generator(linear_posterior(1, latents=2, pixels=3, sigma=0.7), Saturating)
        s, axes = 0.02, regular_axes(2, 7.0, 141)
    gap, error, _, _ = against_brute_force(posterior, s, 5, estimator, axes, 2000)
    assert gap > -4 * error


def test_change_of_variables_falls_below_what_is_possible_where_steps_fold(wave):
    """No objective can be below -log p(x); where steps fold, this one is."""
    posterior, s = wave_posterior(wave, 0.7, 0.3), 0.15
    exact = short_run_density(posterior, s, 10, regular_axes(1, 20.0, 2001))
    values = srlib.kl_objective(copies(posterior, 2000), s, 10, "change_of_variables", rng=seeded())
    assert exact.kl > 0
    assert values.mean() < -exact.log_marginal - 4 * values.std() / 2000**0.5


@pytest.mark.parametrize("estimator", ["path", "path_gaussian"])
def test_the_extended_space_bounds_hold_where_steps_fold(wave, estimator):
    gap, error, _, _ = against_brute_force(
        wave_posterior(wave, 0.7, 0.3), 0.15, 10, estimator, regular_axes(1, 20.0, 2001), 2000
    )
    assert gap > -4 * error


@pytest.mark.parametrize("overshoot", [0.3, 1.6])
def test_the_objective_of_a_linear_model_is_that_of_brute_force(overshoot):
    """With moment-matched numbers, whose quadratic functions have no Monte Carlo error; no closed form is asked."""
    posterior, n_steps = random_model(1, False, seed=0), 6
    s, n_chains = overshoot / curvatures(posterior).max().item(), 2 * (n_steps + 1)
    common = step_size.moment_matched(n_chains, n_steps, 1, seeded())
    found = srlib.grid_search_step_size(posterior, [s], n_steps, n_chains=n_chains, common=common)
    exact = short_run_density(posterior, s, n_steps, regular_axes(1, 8.0, 1601))
    assert found.objective.item() == pytest.approx(exact.kl - exact.log_marginal, abs=1e-6)


def test_linear_noise_of_a_nonlinear_model_is_near_brute_force_at_small_steps(linear_posterior):
    """Entropy and objective to 0.03 nats and 4 standard errors, where the chain has lost 0.1 nats of the prior's entropy."""
    posterior = with_generator(linear_posterior(1, latents=1, pixels=3, sigma=0.7), Saturating)
    s, n_steps, many = 0.01, 8, copies(posterior, 4000)
    exact = short_run_density(posterior, s, n_steps, regular_axes(1, 8.0, 1201))
    assert exact.entropy < 0.5 * math.log(2 * math.pi * math.e) - 0.1
    chain = srlib.short_run(many, n_steps, s, rng=seeded(), keep_trajectory=True)
    entropies = -entropy.linear_noise(many, chain)
    objective = srlib.kl_objective(many, s, n_steps, "linear_noise", rng=seeded())
    for values, expected in ((entropies, exact.entropy), (objective, exact.kl - exact.log_marginal)):
        assert abs(values.mean().item() - expected) < 0.03 + 4 * (values.std() / 4000**0.5).item()


def test_equation_17_lies_above_brute_force_where_no_step_folds(wave):
    """By more than chance: with 20 further draws it keeps what one draw loses, unlike an average over preimages."""
    posterior, axes = wave_posterior(wave, 0.7, 0.5), regular_axes(1, 8.0, 801)
    gap, error, _, _ = against_brute_force(posterior, 0.05, 5, "equation_17", axes, 400)
    one_draw, *_ = against_brute_force(posterior, 0.05, 5, "change_of_variables", axes, 400)
    assert gap > one_draw > 4 * error


def test_optima_of_equation_17_and_semi_implicit_against_brute_force():
    """A linear model: Eq. (17) loses all entropy of the noise and picks too small an s, an average over preimages loses less."""
    posterior, n_steps = random_model(1, False, seed=0), 5
    largest, n_chains = curvatures(posterior).max().item(), 48
    shares = (0.13, 0.2, 0.3, 0.4, 0.55)
    common = step_size.moment_matched(n_chains, n_steps, 1, seeded())
    equation_17, semi_implicit = (
        srlib.grid_search_step_size(
            posterior,
            [share / largest for share in shares],
            n_steps,
            estimator,
            rng=seeded(),
            n_chains=n_chains,
            common=common,
        )
        for estimator in ("equation_17", "semi_implicit")
    )
    densities = [short_run_density(posterior, share / largest, n_steps, regular_axes(1, 8.0, 2001)) for share in shares]
    exact = torch.tensor([density.kl - density.log_marginal for density in densities], dtype=torch.float64)
    # without the noise the entropy is that of the prior, scaled
    without = [0.5 * math.log(2 * math.pi * math.e) + n_steps * math.log(1 - share) for share in shares]
    expected = [-h - density.energy for h, density in zip(without, densities)]
    assert equation_17.objective.tolist() == pytest.approx(expected, abs=1e-6)
    assert (exact < semi_implicit.objective).all() and (semi_implicit.objective < equation_17.objective).all()
    assert equation_17.local_minima == [equation_17.best] and semi_implicit.local_minima == [semi_implicit.best]
    assert equation_17.best < semi_implicit.best <= int(exact.argmin())


# --- grid search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["linear_noise", "path_gaussian", "path", "change_of_variables", "equation_17"])
def test_grid_search_finds_each_estimators_own_optimum(linear_posterior, estimator):
    """Against an independent evaluation of 6 times as many step sizes with the same random numbers."""
    single = linear_posterior(1)
    posterior, n_steps = copies(single, 10), 6
    fine = torch.logspace(-2, 0, 61, dtype=torch.float64) * 1.9 / curvatures(single).max().item()
    coarse = fine[::6]
    rng = seeded()
    found = srlib.grid_search_step_size(posterior, list(coarse), n_steps, estimator, rng=rng)
    means = torch.stack(
        [srlib.kl_objective(posterior, s.item(), n_steps, estimator, rng=seeded()).mean() for s in fine]
    )
    torch.testing.assert_close(found.objective, means[::6])
    assert found.step_size == coarse[means[::6].argmin()]
    assert abs(found.best * 6 - int(means.argmin())) <= 6


def test_change_of_variables_has_a_minimum_between_all_poles_where_the_kl_has_one():
    """Poles of -log|det| at s = 1/lambda: with three distinct lambdas three bounded minima, where the exact KL has one."""
    weight = torch.diag(torch.tensor([3.0, 9.0, 30.0], dtype=torch.float64))
    g = srlib.LinearGenerator(weight, torch.zeros(3, dtype=torch.float64))
    posterior = srlib.Posterior(g, torch.zeros(1, 3, 1, 1, dtype=torch.float64), 1.0)
    poles = 1 / (1 + weight.diagonal() ** 2)
    n_steps, s = 20, torch.logspace(-5, math.log10(1.9 / 901), 150, dtype=torch.float64)
    kl = torch.stack([srlib.ClosedForm(posterior).short_run_kl(v.item(), n_steps)[0] for v in s])
    exact = srlib.StepSizeResult(s[kl.argmin()], s, kl[:, None])
    assert len(exact.local_minima) == 1
    found = srlib.grid_search_step_size(copies(posterior, 20), list(s), n_steps, "change_of_variables", rng=seeded())
    peaks = srlib.StepSizeResult(s[0], s, -found.values).local_minima
    assert len(found.local_minima) >= 2
    assert any(abs(s[i] / poles.min() - 1) < 0.02 for i in peaks)


def test_grid_search_for_each_example_takes_each_images_minimum(linear_posterior):
    posterior = linear_posterior(5)
    candidates = [1e-3, 3e-3, 9e-3]
    found = srlib.grid_search_step_size(posterior, candidates, 5, share="example", rng=seeded())
    assert found.step_size.shape == (5, 1)
    each = torch.stack([srlib.kl_objective(posterior, s, 5, "linear_noise", rng=seeded()) for s in candidates])
    assert found.step_size.flatten().tolist() == [candidates[i] for i in each.argmin(0)]
    srlib.short_run(posterior, 5, found.step_size)


def test_grid_search_among_schedules(linear_posterior):
    posterior = linear_posterior(6)
    schedules = [srlib.geometric_step_sizes(a, b, 4) for a, b in ((1e-4, 1e-4), (1e-2, 3e-3))]
    found = srlib.grid_search_step_size(posterior, schedules, 4, rng=seeded())
    assert found.candidates.shape == (2, 4, 1, 1) and torch.equal(found.step_size.cpu(), schedules[1])


def mixed_posterior():
    """One image seen whole, with a curvature of 978, and one half hidden, with 78."""
    weight = torch.tensor([[30.0], [77.0**0.5]], dtype=torch.float64)
    g = srlib.LinearGenerator(weight, torch.zeros(2, dtype=torch.float64))
    mask = torch.tensor([[1, 1], [0, 1]]).reshape(2, 2, 1, 1)
    return srlib.Posterior(g, torch.ones(2, 2, 1, 1, dtype=torch.float64), 1.0, mask)


@pytest.mark.parametrize("estimator", ["linear_noise", "equation_17", "semi_implicit"])
def test_an_image_whose_chain_diverges_takes_no_candidate_from_the_others(estimator):
    """Each tame image has the values it would have had beside a tame one, under the same random numbers."""
    posterior, tame = mixed_posterior(), torch.tensor([1, 1])
    candidates = [1e-4, 9e-4, 3e-3, 0.02]
    options = dict(n_steps=8, estimator=estimator, share="example", n_chains=3)
    found = srlib.grid_search_step_size(posterior, candidates, rng=seeded(), **options)
    alone = srlib.grid_search_step_size(posterior[tame], candidates, rng=seeded(), **options)
    torch.testing.assert_close(found.values[:, 1], alone.values[:, 1])
    assert found.values[-1, 0] == math.inf and found.values[:2].isfinite().all()
    assert found.step_size[1] == alone.step_size[1] > 1e-3 > found.step_size[0]


def test_a_candidate_for_all_images_is_infinite_if_it_is_for_one():
    posterior = mixed_posterior()
    found = srlib.grid_search_step_size(posterior, [1e-3, 0.02], 8, rng=seeded())
    assert found.objective.isinf().tolist() == [False, True] and found.step_size == 1e-3
    assert found.values[1].isinf().all()


@pytest.mark.parametrize("estimator", ["linear_noise", "semi_implicit"])
def test_candidates_that_diverge_or_have_no_inverse_count_as_infinite(linear_posterior, estimator):
    posterior = linear_posterior(2)
    good, bad = (factor / curvatures(posterior).max().item() for factor in (0.4, 40.0))
    found = srlib.grid_search_step_size(posterior, [bad, good], 30, estimator, rng=seeded())
    assert found.best == 1 and found.step_size == good
    assert found.objective[0] == math.inf and found.objective[1].isfinite()
    assert found.plausible.tolist() == [False, True]


def test_the_result_gives_curve_error_and_what_it_cannot_tell_apart():
    values = torch.tensor([[4.0, 6.0], [1.0, 3.0], [1.5, 2.7], [5.0, 9.0]], dtype=torch.float64)
    result = srlib.StepSizeResult(torch.tensor(2.0), torch.arange(1.0, 5.0), values)
    assert result.objective.tolist() == pytest.approx([5, 2, 2.1, 7]) and result.best == 1
    assert result.standard_error.tolist() == pytest.approx([1, 1, 0.6, 2])
    assert result.plausible.tolist() == [False, True, True, False]
    assert result.local_minima == [1]


@pytest.mark.parametrize(
    "curve, minima",
    [([0, 2, 1, 2, 0], [2]), ([1, 2, 3], []), ([2, 1, 1, 2], []), ([1, 0], []), ([1], []), ([3, 1, 2, 0, 4], [1, 3])],
)
def test_local_minima_have_two_neighbours(curve, minima):
    """An end of the grid, be it the lowest of all, says that the grid is too short and is none."""
    values = torch.tensor(curve, dtype=torch.float64)[:, None]
    assert srlib.StepSizeResult(torch.tensor(1.0), torch.arange(1.0, len(curve) + 1), values).local_minima == minima


def test_one_image_has_an_objective_and_no_error(linear_posterior):
    found = srlib.grid_search_step_size(linear_posterior(1), [1e-3, 2e-3], 3, rng=seeded())
    assert found.standard_error.isnan().all() and found.objective.isfinite().all()
    assert found.plausible[found.best]


# --- descent ----------------------------------------------------------------------------------------------------------


def random_model(latents, masked, seed):
    """The posterior of one image of latents + 4 pixels under a random linear model."""
    rng = seeded(seed)
    weight, bias = torch.randn(latents + 4, latents + 1, generator=rng, dtype=torch.float64).split((latents, 1), 1)
    g = srlib.LinearGenerator(weight, bias[:, 0])
    noise = torch.randn(1, latents + 4, 1, 1, generator=rng, dtype=torch.float64)
    x = (g(g.sample_prior(1, rng)) + 0.5 * noise).detach()
    observed = torch.arange(latents + 4)[None, :, None, None].remainder(3) > 0
    return srlib.Posterior(g, x, 0.5, observed if masked else None)


def test_moment_matched_numbers_have_mean_0_and_covariance_1():
    initial, noise = step_size.moment_matched(36, 5, 3, seeded())
    assert initial.shape == (36, 3) and noise.shape == (5, 36, 3)
    numbers = torch.cat([initial[None], noise]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(numbers.mean(0), torch.zeros(18, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(numbers.T @ numbers / 36, torch.eye(18, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(initial, step_size.moment_matched(36, 5, 3, seeded(1))[0])


@pytest.mark.parametrize("latents, n_steps, masked", [(1, 1, False), (1, 100, False), (4, 9, True), (20, 3, True)])
def test_with_moment_matched_numbers_the_objective_of_a_linear_model_is_its_kl_to_rounding(latents, n_steps, masked):
    single = random_model(latents, masked, seed=latents)
    exact, n_chains = srlib.ClosedForm(single), 2 * (n_steps + 1) * latents
    common = step_size.moment_matched(n_chains, n_steps, latents, seeded())
    candidates = [factor / curvatures(single).max().item() for factor in (0.01, 0.3, 1.0, 1.7, 1.9)]
    found = srlib.grid_search_step_size(single, candidates, n_steps, n_chains=n_chains, common=common)
    expected = torch.cat([exact.short_run_kl(s, n_steps) for s in candidates]) - exact.log_marginal()
    torch.testing.assert_close(found.objective, expected, rtol=1e-9, atol=1e-9 * latents)


@pytest.mark.parametrize(
    "latents, n_steps, masked, n_iterations, start",
    [
        (1, 1, False, 50, 0.05),
        (1, 1, False, 50, 1.8),
        (1, 10, True, 50, 1.8),
        (1, 25, False, 40, 0.05),
        (2, 5, False, 35, 0.05),
        (2, 5, False, 35, 1.8),
        (3, 12, True, 35, 1.8),
        (6, 10, False, 40, 0.05),
        (12, 6, True, 35, 1.8),
        (20, 2, False, 35, 0.05),
        (20, 2, False, 35, 1.8),
        (1, 100, False, 100, 1.8),  # near divergence with many steps: 50 iterations end far off, 100 do not
        # many steps, a few iterations
        (1, 100, False, 20, 0.05),
        (2, 100, True, 12, 0.3),
        (8, 25, True, 8, 0.4),
    ],
)
def test_descent_ends_within_2_percent_of_the_optimum_of_the_exact_kl(latents, n_steps, masked, n_iterations, start):
    """In s as in the KL, from far below and from near divergence; the worst of these is 0.5 % off."""
    single = random_model(latents, masked, seed=100 * latents + n_steps)
    exact, n_chains = srlib.ClosedForm(single), 2 * (n_steps + 1) * latents
    initial = start / curvatures(single).max().item()
    common = step_size.moment_matched(n_chains, n_steps, latents, seeded())
    found = srlib.descend_step_size(
        single, initial, n_steps, n_iterations=n_iterations, n_chains=n_chains, common=common
    )
    best, lowest = best_constant(exact, n_steps)
    assert exact.short_run_kl(initial, n_steps).item() > 1.1 * lowest
    assert exact.short_run_kl(found.step_size, n_steps).item() < 1.02 * lowest
    assert found.step_size.item() == pytest.approx(best, rel=0.02)


def test_descent_with_independent_chains_comes_within_2_percent_too(linear_posterior):
    single, n_steps = linear_posterior(1, latents=3), 10
    exact = srlib.ClosedForm(single)
    found = srlib.descend_step_size(single, 0.05 / curvatures(single).max().item(), n_steps, rng=seeded(), n_chains=600)
    assert exact.short_run_kl(found.step_size, n_steps).item() < 1.02 * best_constant(exact, n_steps)[1]


def test_a_step_size_for_each_image_beats_the_best_for_all_of_them():
    """Two images under one model, one with most of its pixels hidden, whose posterior is flatter."""
    single, n_steps, n_chains = random_model(3, False, seed=1), 6, 60
    mask = torch.ones(2, 7, 1, 1)
    mask[1, 2:] = 0
    pair = srlib.Posterior(single.generator, single.x.expand(2, -1, -1, -1), 0.5, mask)
    exact = srlib.ClosedForm(pair)
    constant, lowest = best_constant(exact, n_steps)
    options = dict(n_steps=n_steps, share="example", n_chains=n_chains)
    descended = srlib.descend_step_size(pair, constant, rng=seeded(), **options)
    candidates = [constant * factor for factor in (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)]
    searched = srlib.grid_search_step_size(pair, candidates, rng=seeded(), **options)
    for found in (descended, searched):
        assert found.step_size.shape == (2, 1) and found.values.shape[1:] == (2,)
        assert exact.short_run_kl(found.step_size, n_steps).mean() < 0.95 * lowest


def test_a_step_size_for_each_step_beats_the_best_constant(linear_posterior):
    single, n_steps = linear_posterior(1), 6
    exact = srlib.ClosedForm(single)
    constant, lowest = best_constant(exact, n_steps)
    found = srlib.descend_step_size(copies(single, 200), constant, n_steps, "step", n_iterations=60, rng=seeded())
    assert found.step_size.shape == (n_steps, 1, 1) and found.candidates.shape[1:] == (n_steps, 1, 1)
    assert exact.short_run_kl(found.step_size, n_steps).item() < 0.95 * lowest


def stiff_top_layer():
    """One image under two layers, of which the top one is much stiffer: one number cannot suit both."""
    weight = torch.diag(torch.tensor([10.0, 10.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    g = TwoLayers(weight, torch.zeros(5, dtype=torch.float64))
    return srlib.Posterior(g, torch.ones(1, 5, 1, 1, dtype=torch.float64), 1.0)


def test_a_step_size_for_each_layer_beats_the_best_constant():
    single, n_steps = stiff_top_layer(), 6
    exact = srlib.ClosedForm(single)
    constant, lowest = best_constant(exact, n_steps)
    found = srlib.descend_step_size(copies(single, 200), constant, n_steps, "layer", n_iterations=40, rng=seeded())
    top, bottom = found.step_size.split((2, 3))
    assert (top == top[0]).all() and (bottom == bottom[0]).all() and bottom[0] > 2 * top[0]
    assert exact.short_run_kl(found.step_size, n_steps).item() < 0.8 * lowest


@pytest.mark.parametrize("share", ["all", "step", "layer", "example"])
def test_a_descent_starts_where_another_ended(share):
    g = TwoLayers(torch.diag(torch.tensor([5.0, 5.0, 1.0], dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    posterior = srlib.Posterior(g, torch.ones(2, 3, 1, 1, dtype=torch.float64), 1.0)
    first = srlib.descend_step_size(posterior, 1e-3, 4, share, n_iterations=3, rng=seeded())
    second = srlib.descend_step_size(posterior, first.step_size, 4, share, n_iterations=1, rng=seeded())
    torch.testing.assert_close(second.candidates[0], first.step_size)
    torch.testing.assert_close(second.values[0], first.values[first.best])


@pytest.mark.parametrize("estimator", ["change_of_variables", "path_gaussian", "semi_implicit", "linear_noise"])
def test_the_best_iterate_is_the_answer(linear_posterior, estimator):
    posterior = linear_posterior(4)
    found = srlib.descend_step_size(posterior, 2e-3, 4, estimator=estimator, n_iterations=6, rng=seeded())
    assert found.values.shape == (7, 4) and found.candidates.shape == (7,)
    assert found.step_size == found.candidates[found.best]
    assert found.objective.min() < found.objective[0]


def test_one_iteration_is_one_step_that_is_taken_if_it_helps(linear_posterior):
    found = srlib.descend_step_size(linear_posterior(4), 1e-3, 4, n_iterations=1, learning_rate=0.1, rng=seeded())
    assert found.step_size.item() == pytest.approx(1e-3 * math.exp(0.1)) and found.best == 1


def test_a_descent_needs_no_gradient_mode(linear_posterior):
    posterior = linear_posterior(2)
    expected = srlib.descend_step_size(posterior, 1e-3, 3, n_iterations=3, rng=seeded())
    with torch.no_grad():
        found = srlib.descend_step_size(posterior, 1e-3, 3, n_iterations=3, rng=seeded())
        assert not torch.is_grad_enabled()
    assert torch.equal(found.candidates, expected.candidates) and torch.equal(found.values, expected.values)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        srlib.descend_step_size(posterior, 1e-3, 3, n_iterations=3, rng=seeded())


def test_step_sizes_and_random_numbers_may_come_from_a_graph(linear_posterior):
    """Nothing is differentiated in what the caller gave, nor does the result hold on to it."""
    posterior, s = linear_posterior(2), torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    common = tuple(2 * noise(*sizes).requires_grad_() for sizes in ((2,), (3, 2)))
    options = dict(n_steps=3, estimator="path", common=common)
    for found in (
        srlib.grid_search_step_size(posterior, [s, 2 * s], **options),
        srlib.descend_step_size(posterior, 2 * s, n_iterations=2, **options),
    ):
        assert not found.values.requires_grad and not found.step_size.requires_grad


def test_descent_comes_back_from_steps_where_the_chain_diverges(linear_posterior):
    posterior = linear_posterior(2)
    start = 0.5 / curvatures(posterior).max().item()
    found = srlib.descend_step_size(posterior, start, 100, learning_rate=4.0, n_iterations=12, rng=seeded())
    assert found.objective.isinf().any()
    assert found.objective[found.best].isfinite() and found.step_size == found.candidates[found.best]
    assert found.objective[found.best] < found.objective[0]


def test_one_wild_chain_does_not_decide_the_direction(monkeypatch, linear_posterior):
    """A chain whose part of the gradient is huge counts CLIP times the median chain's."""
    posterior = linear_posterior(3)
    slopes = torch.tensor([1.0, -2.0, -1e9], dtype=torch.float64).to(posterior.x.device)
    monkeypatch.setattr(step_size, "_objective", lambda p, s, *_, **__: s[:, 0] * slopes)
    one = torch.ones((), dtype=torch.float64, device=posterior.x.device)
    _, gradient = step_size._value_and_gradient(posterior, one, "path", ())
    assert gradient.item() == pytest.approx((1 - 2 - 2 * step_size.CLIP) / 3)


# --- what must not change, and errors ---------------------------------------------------------------------------------


def noise(*sizes):
    """Numbers for 3 latents, of some shape that does not fit."""
    return torch.zeros(*sizes, 3, dtype=torch.float64)


@pytest.mark.parametrize("diverge", [False, True])
def test_the_callers_generator_and_torchs_random_state_are_left_alone(linear_posterior, diverge):
    posterior = linear_posterior(2)
    posterior.generator.bias.requires_grad_(False)
    before, before_rng = [p.clone() for p in posterior.generator.parameters()], torch.get_rng_state()
    if diverge:
        with pytest.raises(srlib.DivergenceError):
            srlib.kl_objective(posterior, 10.0, 50, rng=seeded())
    else:
        for estimator in step_size.ESTIMATORS:
            srlib.kl_objective(posterior, 1e-3, 3, estimator, rng=seeded(), n_noise=1)
        srlib.grid_search_step_size(posterior, [1e-3], 3, rng=seeded())
        srlib.descend_step_size(posterior, 1e-3, 3, n_iterations=2, rng=seeded())
    assert [p.requires_grad for p in posterior.generator.parameters()] == [True, False]
    assert all(p.grad is None for p in posterior.generator.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, posterior.generator.parameters()))
    assert torch.equal(torch.get_rng_state(), before_rng)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: srlib.kl_objective(p, 1e-3, 2, "eq17"), "'eq17' is unknown; there are: change_of_variables"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, "equation_17", n_noise=0), "n_noise=0.*at least 1"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, "semi_implicit", n_noise=0), "n_noise=0"),
        (lambda p: srlib.kl_objective(p, -1e-3, 2), "step_size=-0.001 must be positive"),
        (lambda p: srlib.grid_search_step_size(p, []), "candidates is empty; a usual grid"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3, -1.0]), "must be positive"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3, math.nan]), "candidates hold nan; .* leave it out"),
        (lambda p: srlib.grid_search_step_size(p, 1e-3), r"candidates=0.001 must be a sequence .* \[1e-3"),
        (lambda p: srlib.grid_search_step_size(p, torch.tensor(1e-3)), "candidates=tensor.* must be a sequence"),
        (
            lambda p: srlib.grid_search_step_size(p, [1e-3, torch.ones(25, 1, 1)]),
            r"candidates have shapes \[\(\), \(25, 1, 1\)\]; take numbers only, or",
        ),
        (lambda p: srlib.grid_search_step_size(p, [1e-3], share="step"), "share='step'"),
        (lambda p: srlib.grid_search_step_size(p, [torch.ones(25, 1, 1)], share="example"), "share='example'"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3], estimator="x"), "estimator='x' is unknown"),
        (lambda p: srlib.descend_step_size(p, 1e-3, share="image"), "share='image' is unknown; there are: all, step"),
        (lambda p: srlib.descend_step_size(p, 0.0), "initial=0.0 must be positive"),
        (lambda p: srlib.descend_step_size(p, math.nan), "initial=nan must be positive"),
        (lambda p: srlib.descend_step_size(p, torch.ones(7), share="step"), r"initial has shape \(7,\)"),
        (lambda p: srlib.descend_step_size(p, 1e-3, 2.5, "step"), "n_steps=2.5 must be a whole number"),
        (lambda p: srlib.descend_step_size(p, 1e-3 * torch.arange(1, 4), share="layer"), r"initial has shape \(3,\)"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, noise=noise(3, 2)), r"noise \(eps\) .* \(3, 2, 3\), .* \(2, 2, 3\)"),
        (
            lambda p: srlib.descend_step_size(p, 1e-3, 2, common=noise(2, 2)),
            "common is a Tensor, it must be the pair e_0, eps",
        ),
        (
            lambda p: srlib.descend_step_size(p, 1e-3, 2, common=(noise(2).tolist(), noise(2, 2))),
            r"initial \(e_0\)=\[\[0.0, .* must be a tensor",
        ),
        (
            lambda p: srlib.grid_search_step_size(p, [1e-3], 2, common=(None, noise(2, 2))),
            r"initial \(e_0\)=None must be",
        ),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, initial=noise(2).tolist()), r"initial \(e_0\)=.* must be a tensor"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, noise=math.nan * noise(2, 2)), r"noise \(eps\) holds NaN"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, rng=3), "rng=3 must be a torch.Generator"),
        (lambda p: srlib.kl_objective(p, 1e-3, 2, rng=0), "rng=0 must be a torch.Generator"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3], 2, rng=3), "rng=3 must be a torch.Generator"),
        (lambda p: srlib.descend_step_size(p, 1e-3, 2, rng=3), "rng=3 must be a torch.Generator"),
        (lambda p: step_size.moment_matched(24, 3, 3, 3), "rng=3 must be a torch.Generator"),
        (lambda p: srlib.StepSizeSearch()(p, 1e-3, 3, 3), "rng=3 must be a torch.Generator"),
        (lambda p: srlib.grid_search_step_size(p, [True]), "candidates: True must be a number"),
        (lambda p: srlib.grid_search_step_size(p, [None]), "candidates: None must be a number"),
        (lambda p: srlib.descend_step_size(p, True), "initial: True must be a number"),
        (lambda p: srlib.descend_step_size(p, "1"), "initial: '1' must be a number"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3], 2, common=(noise(2),)), "must be the pair e_0, eps"),
        (
            lambda p: srlib.grid_search_step_size(p, [1e-3], 2, n_chains=2, common=(noise(2), noise(2, 2))),
            r"initial \(e_0\) is torch.float64 \(2, 3\), these chains need torch.float64 \(4, 3\)",
        ),
        (
            lambda p: srlib.descend_step_size(p, 1e-3, 2, common=(noise(2), noise(2, 2).float())),
            r"noise \(eps\) is torch.float32 \(2, 2, 3\), these chains need torch.float64 \(2, 2, 3\)",
        ),
        (lambda p: srlib.descend_step_size(p, 1e-3, n_iterations=0), "n_iterations=0"),
        (lambda p: srlib.descend_step_size(p, 1e-3, learning_rate=0.0), "learning_rate=0.0"),
        (lambda p: srlib.descend_step_size(p, 1e-3, n_chains=0), "n_chains=0 must be a whole number"),
        (lambda p: srlib.grid_search_step_size(p, [1e-3], n_chains=1.5), "n_chains=1.5 must be a whole number"),
        (lambda p: step_size.moment_matched(20, 3, 3), r"n_chains=20 must be even and at least 2 .* = 24"),
        (lambda p: step_size.moment_matched(25, 3, 3), "n_chains=25 must be even"),
        (lambda p: step_size.moment_matched(24.0, 3, 3), "n_chains=24.0 must be a whole number"),
        (lambda p: step_size.moment_matched(24, -1, 3), "n_steps=-1 must be a whole number"),
        (lambda p: step_size.moment_matched(24, 3, 0), "latent_dim=0 must be a whole number"),
        (lambda p: srlib.StepSizeSearch("newton"), "method='newton' is unknown"),
        (lambda p: srlib.StepSizeSearch(estimator="x"), "estimator='x' is unknown"),
        (lambda p: srlib.StepSizeSearch("descent", share="example"), "share='example' is unknown"),
        (lambda p: srlib.StepSizeSearch("grid", share="step"), "share='step' is searched by descent"),
        (lambda p: srlib.StepSizeSearch(n_images=1), "n_images=1"),
        (lambda p: srlib.StepSizeSearch(width=0.0), "width=0.0"),
        (lambda p: srlib.StepSizeSearch(learning_rate=-1.0), "learning_rate=-1.0"),
        (lambda p: srlib.StepSizeSearch(factors=(1.0, -1.0)), "factors"),
        (lambda p: srlib.StepSizeSearch(factors=()), "factors"),
    ],
)
def test_messages_name_the_value_and_the_remedy(linear_posterior, call, message):
    with pytest.raises(ValueError, match=message):
        call(linear_posterior(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: srlib.grid_search_step_size(mixed_posterior(), [0.01, 0.02], 8, share="example"),
            r"from 0.01 to 0.02 gives a finite objective for images \[0\]; try smaller ones",
        ),
        (lambda p: srlib.grid_search_step_size(p, [9.0, 10.0], 50), "from 9 to 10 gives .*; try smaller ones"),
        (lambda p: srlib.descend_step_size(p, 10.0, 50), "not finite at initial=10.0; start from a smaller"),
    ],
)
def test_step_sizes_that_are_all_too_large_are_a_divergence(linear_posterior, call, message):
    with pytest.raises(srlib.DivergenceError, match=message):
        call(linear_posterior(2))


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def images():
    """12 images of a white bar in a random row, uint8."""
    rows = torch.randint(0, 12, (12, 1), generator=seeded())
    bar = (torch.arange(16) - rows).abs() < 3
    return (bar[:, None, :, None].expand(12, 1, 16, 16) * 255).to(torch.uint8)


def fit(images, search, n_updates=6, seed=0, directory=None):
    torch.manual_seed(seed)
    g = srlib.TopDownGenerator((2, 3), (1, 16, 16), channels=4, feature_size=8)
    system = srlib.ShortRun(g, n_steps=3, step_size=2e-3, sigma=0.3, sigma_start=0.5, update_step_size=search, every=2)
    plan = srlib.TrainingPlan(n_updates, batch_size=4, learning_rates=(1e-3,))
    return system, system.fit(images, plan, seeded(seed), directory, progress=False)


SEARCHES = [srlib.StepSizeSearch("grid"), srlib.StepSizeSearch("descent", n_images=6)]


@pytest.mark.parametrize("start", [1 / 5, 3])
@pytest.mark.parametrize("latents, n_steps", [(2, 5), (3, 10)])
def test_repeated_descents_with_fresh_numbers_arrive_at_the_optimum_and_stay(latents, n_steps, start):
    """20 updates on 128 chains each. None is accepted or rejected, so s keeps moving a little, around the optimum."""
    single = random_model(latents, False, seed=latents)
    optimum, _ = best_constant(srlib.ClosedForm(single), n_steps)
    s, search, path = start * optimum, srlib.StepSizeSearch("descent", n_images=128), []
    for i in range(20):
        s = search(single, s, n_steps, seeded(i)).step_size.item()
        path.append(s)
    last = torch.tensor(path[12:])
    assert last.log().mean().exp().item() == pytest.approx(optimum, rel=0.15)
    assert (last / optimum).log().abs().max() < 0.25


def test_a_step_of_descent_is_whole_where_chains_agree_and_short_where_they_do_not(monkeypatch, linear_posterior):
    """Where a chain diverged above s, or one is far beyond all others, too."""
    search = srlib.StepSizeSearch("descent", learning_rate=0.5)
    posterior = linear_posterior(4)

    def step(slopes):
        slopes = torch.tensor(slopes, dtype=torch.float64, device=posterior.x.device)
        monkeypatch.setattr(step_size, "_objective", lambda p, s, *_, **__: s.log() * slopes)
        return math.log(search(posterior, 1e-3, 3, seeded()).step_size.item() / 1e-3)

    assert step([-2.0, -2.0, -2.0, -2.0]) == pytest.approx(0.5)
    assert step([1.0, -1.0, 1.0, -1.0]) == pytest.approx(0.0, abs=1e-9)
    assert step([1e9, -1.0, -1.0, -1.0]) == pytest.approx(-0.25, rel=1e-6)


def test_descent_goes_down_where_the_larger_step_size_diverges(linear_posterior):
    posterior, search = linear_posterior(2), srlib.StepSizeSearch("descent", learning_rate=0.5)
    above = 0.0
    s = 1.0 / curvatures(posterior).max().item()
    while math.isfinite(above):
        s *= 1.2
        around = [s * math.exp(-0.35), s * math.exp(0.35)]
        above = srlib.grid_search_step_size(posterior, around, 50, rng=seeded()).objective[1].item()
    found = search(posterior, torch.tensor(s), 50, seeded())
    assert found.objective[1].isinf() and found.objective[0].isfinite()
    assert found.step_size.item() == pytest.approx(s * math.exp(-0.5), rel=1e-6)


def test_repeated_descents_find_a_schedule_that_beats_the_best_constant():
    """Of all schedules with a constant ratio the best is found by brute force, from the exact KL."""
    single, n_steps = random_model(2, False, seed=0), 4
    exact = srlib.ClosedForm(single)
    constant, lowest = best_constant(exact, n_steps)
    factors = [2.0 ** (i / 4) for i in range(-8, 9)]
    schedules = [srlib.geometric_step_sizes(constant * a, constant * b, n_steps) for a in factors for b in factors]
    best = min(exact.short_run_kl(s, n_steps).item() for s in schedules)
    assert best < 0.9 * lowest
    search = srlib.StepSizeSearch("descent", n_images=256, share="step", learning_rate=0.3)
    s, path = torch.full((n_steps, 1, 1), constant, dtype=torch.float64), []
    for i in range(24):
        s = search(single, s, n_steps, seeded(i)).step_size
        path.append(exact.short_run_kl(s, n_steps).item())
    ratios = s.flatten()[1:] / s.flatten()[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    assert sum(path[-8:]) / 8 < best + 0.35 * (lowest - best)


def test_repeated_descents_find_a_step_size_for_each_layer():
    single, n_steps = stiff_top_layer(), 6
    exact = srlib.ClosedForm(single)
    constant, lowest = best_constant(exact, n_steps)
    search = srlib.StepSizeSearch("descent", n_images=128, share="layer")
    s = torch.full((5,), constant, dtype=torch.float64)
    for i in range(12):
        s = search(single, s, n_steps, seeded(i)).step_size
    top, bottom = s.split((2, 3))
    assert (top == top[0]).all() and (bottom == bottom[0]).all() and bottom[0] > 2 * top[0]
    assert exact.short_run_kl(s, n_steps).item() < 0.85 * lowest


@pytest.mark.parametrize("share, shape", [("step", (3, 1, 1)), ("layer", (3,)), ("step_and_layer", (3, 1, 3))])
def test_training_learns_a_schedule(images, share, shape):
    search = srlib.StepSizeSearch("descent", n_images=4, share=share)
    g = srlib.TopDownGenerator((1, 2), (1, 16, 16), channels=2, feature_size=8)
    system = srlib.ShortRun(g, 3, torch.full(shape, 1e-4), update_step_size=search, every=2)
    history = system.fit(images, srlib.TrainingPlan(4, 4, (1e-3,)), seeded(), progress=False)
    assert system.step_size.shape == shape and len(set(system.step_size.flatten().tolist())) > 1
    chosen = [history[f"chosen_step_size_{i}"][-1] for i in range(system.step_size.numel())]
    assert chosen == pytest.approx(system.step_size.flatten().tolist(), rel=1e-5)
    mean = math.exp(sum(math.log(s) for s in chosen) / len(chosen))
    assert (
        history["chosen_step_size"][-1]
        == pytest.approx(mean)
        == pytest.approx(system.settings()["step_size"], rel=1e-5)
    )


@pytest.mark.parametrize("search", SEARCHES, ids=["grid", "descent"])
def test_training_updates_s_and_keeps_what_it_chose(images, search):
    system, history = fit(images, search)
    assert history["chosen_at"] == [2, 4, 6]
    for name in ("chosen_step_size", "objective", "objective_standard_error", "search_seconds"):
        assert len(history[name]) == 3 and all(math.isfinite(v) for v in history[name])
    assert len(history["step_size"]) == 6
    in_units = [s / sigma**2 for s, sigma in zip(history["step_size"], history["sigma"])]
    assert in_units[0] == pytest.approx(in_units[1], rel=1e-5)
    assert any(abs(u / in_units[0] - 1) > 0.01 for u in in_units[2:])
    assert system.step_size.item() == pytest.approx(history["chosen_step_size"][-1], rel=1e-5)


@pytest.mark.parametrize("search", SEARCHES, ids=["grid", "descent"])
def test_a_training_that_chooses_s_repeats_itself(images, search):
    (first, a), (second, b), (_, c) = (fit(images, search, seed=seed) for seed in (0, 0, 1))
    for name in a.keys() - {"search_seconds"}:
        assert a[name] == b[name]
    assert a["chosen_step_size"] != c["chosen_step_size"] or a["loss"] != c["loss"]
    assert all(torch.equal(v, w) for v, w in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("t", [2, 5])
@pytest.mark.parametrize("search", SEARCHES, ids=["grid", "descent"])
def test_a_killed_training_that_chooses_s_resumes_with_the_same_bits(images, tmp_path, killed_at, search, t):
    whole, history = fit(images, search)
    with killed_at(t):
        fit(images, search, directory=tmp_path)
    resumed, continued = fit(images, search, seed=0, directory=tmp_path)
    for name in history.keys() - {"search_seconds"}:
        assert continued[name] == history[name]
    assert all(torch.equal(v, w) for v, w in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_a_search_that_finds_no_step_size_is_a_divergence_of_its_update(images):
    """As a result it is recorded, unlike a mistake in the arguments."""

    def search(*_):
        raise srlib.DivergenceError("no candidate")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = srlib.TopDownGenerator((2,), (1, 16, 16), 2, 8)
    system = srlib.ShortRun(generator, n_steps=2, step_size=1e-3, sigma=0.5, update_step_size=search, every=2)
    with pytest.raises(srlib.DivergenceError, match="update 1: the search of the step size failed: no candidate"):
        system.fit(images, srlib.TrainingPlan(2, 4), seeded(), progress=False)
