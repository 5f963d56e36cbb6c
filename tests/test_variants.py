"""Short runs with momentum, tempered sigma and a preconditioner, against `short_run`, `kl_objective` and linear models."""

import math
from dataclasses import replace

import pytest
import torch

import srlib
from srlib.variants import Variant, choose_variant, mean_precision, run_variant, variant_objective

EVERYTHING = Variant(2e-3, ratio=3.0, momentum=0.6, heat=2.0, power=0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def linear():
    """Three images of a linear model whose posterior is long and thin."""
    rng, d = seeded(1), 4
    weight = torch.linalg.qr(torch.randn(9, d, generator=rng, dtype=torch.float64))[0] * torch.tensor(
        [0.1, 0.3, 1, 3.0]
    )
    weight = weight @ torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    g = srlib.LinearGenerator(weight, torch.zeros(9, dtype=torch.float64))
    return srlib.Posterior(g, torch.randn(3, 9, 1, 1, generator=rng, dtype=torch.float64), sigma=0.3)


@pytest.fixture(scope="module")
def nonlinear():
    torch.manual_seed(0)
    g = srlib.TopDownGenerator((2, 3), (1, 12, 12), channels=4, feature_size=6).double()
    return srlib.Posterior(g, torch.rand(3, 1, 12, 12, generator=seeded(), dtype=torch.float64), sigma=0.3)


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_without_momentum_it_is_short_run(nonlinear, ratio):
    variant = Variant(1e-3, ratio=ratio)
    s = variant.step_sizes(5)
    states = run_variant(nonlinear, variant, 5, rng=seeded())
    chain = srlib.short_run(nonlinear, 5, s, rng=seeded(), keep_trajectory=True)
    assert torch.allclose(states, chain.trajectory, rtol=1e-12, atol=1e-12)
    expected = srlib.kl_objective(nonlinear, s, 5, "linear_noise", rng=seeded())
    assert torch.allclose(variant_objective(nonlinear, variant, 5, rng=seeded()), expected, rtol=1e-10)


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("change", [{}, {"momentum": 0.0}, {"heat": 1.0}, {"power": 0.0}, {"momentum": 0.95}])
def test_entropy_of_a_linear_model_is_exact(linear, change, n_steps):
    """e_K is an affine function of standard normal numbers: its covariance is that of the function's matrix."""
    variant, precision = replace(EVERYTHING, **change), torch.tensor([1.0, 2.0, 5.0, 30.0])
    one, d = linear[:1], 4

    def final(numbers):
        given = {"initial": numbers[:d][None], "noise": numbers[d:].view(n_steps, 1, d)}
        return run_variant(one, variant, n_steps, precision, **given)[-1, 0]

    zero, eye = torch.zeros((n_steps + 1) * d, dtype=torch.float64), torch.eye((n_steps + 1) * d, dtype=torch.float64)
    matrix = torch.stack([final(row) - final(zero) for row in eye], 1)
    entropy = 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * matrix @ matrix.T)[1]
    numbers = {"initial": zero[:d][None], "noise": zero[d:].view(n_steps, 1, d)}
    found = variant_objective(one, variant, n_steps, precision, **numbers)
    expected = -entropy - one.log_joint(final(zero)[None])
    assert torch.allclose(found, expected, rtol=1e-10)


def test_many_small_steps_with_momentum_arrive_at_the_posterior(linear):
    exact = srlib.ClosedForm(linear).log_marginal()
    run = Variant(2e-3, momentum=0.9)
    objective = torch.stack([variant_objective(linear, run, 150, rng=seeded(i)) for i in range(10)])
    kl = objective.mean(0) + exact
    error = objective.std(0) / 10**0.5
    assert (kl.abs() < 0.02 + 4 * error).all()
    short = variant_objective(linear, run, 10, rng=seeded()) + exact
    assert short.mean() > 1  # what it would be if nothing were done


def test_momentum_lowers_the_divergence_of_a_thin_posterior(linear):
    many = linear.repeated(12)
    one, _ = choose_variant(many, Variant(1e-3), ["step_size"], 12, rng=seeded())
    two, _ = choose_variant(many, one, ["step_size", "momentum"], 12, rng=seeded())
    assert two.momentum > 0.1
    by_one, by_two = (variant_objective(many, v, 12, rng=seeded(5)) for v in (one, two))
    gain = by_one - by_two
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_the_chosen_step_size_is_the_best_of_the_closed_form(linear):
    many = linear.repeated(60)
    found, objective = choose_variant(many, Variant(3e-4), ["step_size"], 12, rng=seeded())
    exact = srlib.ClosedForm(linear)
    grid = torch.logspace(-4, -1.5, 400, dtype=torch.float64)
    best = min(exact.short_run_kl(s.item(), 12).mean().item() for s in grid)
    assert exact.short_run_kl(found.step_size, 12).mean() < best + 0.05
    assert objective.shape == (len(many),) and objective.isfinite().all()


def test_preconditioning_by_the_exact_precision(linear):
    precision = mean_precision(linear, torch.zeros(3, 4, dtype=torch.float64))
    expected = srlib.ClosedForm(linear).precision[0].diagonal()
    assert torch.allclose(precision, expected)
    s = Variant(1e-3, power=1.0).step_sizes(3, precision)
    assert torch.allclose(s[0, 0] * precision, torch.full((4,), 1e-3, dtype=torch.float64))


def test_heat_is_the_chain_of_a_larger_sigma(linear):
    hot = srlib.Posterior(linear.generator, linear.x, 2 * linear.sigma)
    states = run_variant(linear, Variant(1e-3, heat=2.0), 2, rng=seeded())
    assert torch.allclose(states[1], run_variant(hot, Variant(1e-3), 2, rng=seeded())[1])
    numbers = {"initial": states[0], "noise": torch.stack([torch.zeros_like(states[0]), states[0]])}
    cooled = run_variant(linear, Variant(1e-3, heat=2.0), 2, **numbers)
    warm = run_variant(hot, Variant(1e-3), 1, initial=states[0], noise=torch.zeros_like(states[None, 0]))
    assert torch.allclose(cooled[1], warm[1]) and not torch.allclose(cooled[1], states[1])
    last = run_variant(linear, Variant(1e-3), 1, initial=cooled[1], noise=states[None, 0])
    assert torch.allclose(cooled[2], last[1])  # the last step has sigma itself


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"ratio": -1.0}, "ratio=-1.0"),
        ({"heat": math.inf}, "heat=inf"),
        ({"power": math.nan}, "power=nan"),
    ],
)
def test_numbers_that_make_no_sense_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Variant(**({"step_size": 1e-3} | given))


def test_what_is_missing_or_does_not_fit_is_named(linear):
    with pytest.raises(ValueError, match="power=0.5 needs the precision"):
        run_variant(linear, Variant(1e-3, power=0.5), 2)
    with pytest.raises(ValueError, match="noise is torch.float64"):
        run_variant(linear, Variant(1e-3), 2, noise=torch.zeros(1, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="free=.*must name some of step_size, ratio"):
        choose_variant(linear, Variant(1e-3), ["friction"], 2)
    diverged = variant_objective(linear, Variant(1e6), 200, rng=seeded())
    assert diverged.isinf().all()
