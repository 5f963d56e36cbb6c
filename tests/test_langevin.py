"""Short runs against the exact moments of linear models, and everything `short_run` promises."""

import math

import pytest
import torch

import srlib
from srlib.langevin import DivergenceError

CHAINS = 20_000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_steps, relative_step", [(1, 0.5), (3, 0.3), (10, 1.6), (40, 0.1)])
def test_moments_of_many_chains_are_those_of_the_closed_form(linear_posterior, masked, n_steps, relative_step):
    single = linear_posterior(n=1, mask=masked)
    exact = srlib.ClosedForm(single)
    step_size = relative_step / torch.linalg.eigvalsh(exact.precision).max().item()
    posterior = single[torch.zeros(CHAINS, dtype=torch.int64)]
    e = srlib.short_run(posterior, n_steps, step_size, rng=torch.Generator().manual_seed(0)).final
    assert_moments(e, *(moment[0] for moment in exact.short_run_moments(step_size, n_steps)))


def test_a_step_size_per_step_and_latent(linear_posterior):
    single = linear_posterior(n=1, mask=True)
    exact, n_steps, d = srlib.ClosedForm(single), 6, single.generator.latent_dim
    largest = 1 / torch.linalg.eigvalsh(exact.precision).max()
    relative = torch.rand(n_steps, 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step_size = largest * relative.to(largest.device)
    posterior = single[torch.zeros(CHAINS, dtype=torch.int64)]
    e = srlib.short_run(posterior, n_steps, step_size, rng=torch.Generator().manual_seed(1)).final
    assert_moments(e, *(moment[0] for moment in exact.short_run_moments(step_size, n_steps)))


def test_many_small_steps_give_the_posterior(linear_posterior):
    single = linear_posterior(n=1, mask=True)
    exact = srlib.ClosedForm(single)
    step_size, n_steps = 0.02 / torch.linalg.eigvalsh(exact.precision).max().item(), 2000
    assert exact.short_run_kl(step_size, n_steps) < 1e-3 < exact.short_run_kl(step_size, 50)
    posterior = single[torch.zeros(4000, dtype=torch.int64)]
    e = srlib.short_run(posterior, n_steps, step_size, rng=torch.Generator().manual_seed(0)).final
    assert_moments(e, *(moment[0] for moment in exact.posterior_moments()))


def assert_moments(e, mean, covariance):
    """Sample mean and covariance of e [n, d] within 4.5 standard errors of a Gaussian's."""
    n, variance = len(e), covariance.diagonal()
    assert ((e.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert ((e.T.cov() - covariance).abs() < 4.5 * error).all()


def test_one_step_is_equation_10(small_posterior):
    posterior = small_posterior(masked=True)
    initial = posterior.generator.sample_prior(len(posterior))
    noise = torch.randn_like(initial)[None]
    s = 2e-3
    expected = initial + s * posterior.score(initial) + math.sqrt(2 * s) * noise[0]
    torch.testing.assert_close(srlib.short_run(posterior, 1, s, initial, noise).final, expected)
    without = srlib.short_run(posterior, 1, s, initial, deterministic=True)
    torch.testing.assert_close(without.final, initial + s * posterior.score(initial))
    assert without.noise is None


def test_trajectory_noise_and_seed_repeat_the_chain(small_posterior):
    posterior = small_posterior(masked=False)
    run = dict(n_steps=7, step_size=1e-3)
    chain = srlib.short_run(posterior, **run, rng=torch.Generator().manual_seed(5), keep_trajectory=True)
    assert chain.trajectory.shape == (8, len(posterior), 12)
    assert torch.equal(chain.trajectory[0], chain.initial) and torch.equal(chain.trajectory[-1], chain.final)
    again = srlib.short_run(posterior, **run, rng=torch.Generator().manual_seed(5))
    assert torch.equal(again.final, chain.final) and again.trajectory is None
    replayed = srlib.short_run(posterior, **run, initial=again.initial, noise=again.noise)
    assert torch.equal(replayed.final, chain.final)
    chunked = srlib.short_run(posterior, **run, rng=torch.Generator().manual_seed(5), chunk_size=2)
    torch.testing.assert_close(chunked.final, chain.final)


def test_noise_drawn_after_a_given_start_is_replayed(small_posterior):
    posterior = small_posterior(masked=False)
    start = posterior.generator.sample_prior(len(posterior))
    chain = srlib.short_run(posterior, 4, 1e-3, start, rng=torch.Generator().manual_seed(2))
    assert torch.equal(srlib.short_run(posterior, 4, 1e-3, start, chain.noise).final, chain.final)


def test_without_rng_torchs_global_seed_decides(small_posterior):
    posterior = small_posterior(masked=False)
    finals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        finals.append(srlib.short_run(posterior, 3, 1e-3).final)
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


def test_the_chain_can_be_differentiated_by_step_size_and_start(small_posterior):
    posterior = small_posterior(masked=True)
    n, rng = len(posterior), torch.Generator().manual_seed(0)
    initial = posterior.generator.sample_prior(n, rng).requires_grad_()
    noise = torch.randn(3, n, 12, generator=rng, dtype=torch.float64).to(initial.device)
    s = torch.tensor(1e-3, dtype=torch.float64, device=initial.device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, e: srlib.short_run(posterior, 3, s, e, noise).final, (s, initial))
    assert not srlib.short_run(posterior, 3, 1e-3, initial.detach(), noise).final.requires_grad


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(step_size=0.0), "step_size=0.0 must be positive"),
        (dict(step_size=-1e-3), "step_size=-0.001 must be positive"),
        (dict(step_size=math.nan), "step_size=nan"),
        (dict(step_size=torch.ones(3)), r"does not broadcast to \[K, n, d\] = \[5, 4, 12\]"),
        (dict(step_size=torch.ones(4, 1, 1)), r"one per step is \[5, 1, 1\]"),
        (dict(n_steps=0), "n_steps=0"),
        (dict(n_steps=2.5), "n_steps=2.5"),
        (dict(step_size="0.1"), "step_size='0.1' must be a number or a tensor"),
        (dict(step_size=True), "step_size=True"),
        (dict(noise=torch.zeros(4, 4, 12).double()), r"noise is torch.float64 \(4, 4, 12\), this chain needs"),
        (dict(noise=torch.zeros(5, 4, 12)), "noise is torch.float32"),
        (dict(noise=torch.full((5, 4, 12), math.nan).double()), "noise holds NaN"),
        (dict(initial=torch.zeros(3, 12).double()), r"e has shape \(3, 12\)"),
        (dict(initial=torch.zeros(4, 12)), "e has dtype torch.float32, the generator computes in torch.float64"),
        (dict(initial=torch.full((4, 12), math.inf).double()), "initial holds NaN or infinite"),
        (dict(chunk_size=0), "chunk_size=0"),
        (dict(deterministic=True, noise=torch.zeros(5, 4, 12)), "deterministic"),
    ],
)
def test_bad_input_is_refused(small_posterior, arguments, message):
    with pytest.raises(ValueError, match=message):
        srlib.short_run(small_posterior(masked=False), **(dict(n_steps=5, step_size=1e-3) | arguments))


def test_divergence_names_the_step_the_step_size_and_a_smaller_one(linear_posterior):
    posterior = linear_posterior(n=2)
    largest = torch.linalg.eigvalsh(srlib.ClosedForm(posterior).precision).max().item()
    with pytest.raises(DivergenceError, match=r"diverged at step k = \d+ of K = 200 with step size .* try ") as caught:
        srlib.short_run(posterior, 200, 4 / largest)
    proposed = float(str(caught.value).split("try ")[1].split(". ")[0])
    assert proposed < 2 / largest
    srlib.short_run(posterior, 200, proposed)


def test_weights_that_left_all_bounds_are_not_blamed_on_the_step_size(small_posterior):
    posterior = small_posterior(masked=False)
    with torch.no_grad():
        posterior.generator.output[-1].bias.fill_(math.nan)
    with pytest.raises(DivergenceError, match="weights have left all bounds") as caught:
        srlib.short_run(posterior, 2, 1e-3)
    assert math.isnan(caught.value.step_size)


def test_inference_mode_is_refused_with_the_way_out(small_posterior):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        srlib.short_run(small_posterior(masked=False), 2, 1e-3)


def test_step_size_conventions():
    assert srlib.step_size_from_noise_scale(0.05) == pytest.approx(0.00125)
    assert srlib.noise_scale_from_step_size(0.00125) == pytest.approx(0.05)
    sizes = srlib.geometric_step_sizes(4e-3, 1e-3, 5)
    assert sizes.shape == (5, 1, 1)
    torch.testing.assert_close(sizes[1:] / sizes[:-1], torch.full((4, 1, 1), 0.25**0.25, dtype=torch.float64))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be a positive, finite number"):
            srlib.step_size_from_noise_scale(bad)
        with pytest.raises(ValueError, match="must be a positive, finite number"):
            srlib.noise_scale_from_step_size(bad)
        with pytest.raises(ValueError, match="must be a positive, finite number"):
            srlib.geometric_step_sizes(bad, 1e-3, 5)


def test_a_whole_update_runs_on_the_meta_device():
    """Inference, gradients and Adam without data: a tensor made on the CPU by mistake would be an error here."""
    g = srlib.TopDownGenerator((2, 3), (1, 16, 16), 4, 8).to("meta")
    optimizer = torch.optim.Adam(g.parameters())
    x = torch.empty(5, 1, 16, 16, device="meta")
    mask = torch.ones(1, 1, 16, 16, device="meta")
    for posterior in (srlib.Posterior(g, x, 0.15), srlib.Posterior(g, x, 0.15, mask)):
        chain = srlib.short_run(posterior, 3, 1e-3, rng=torch.Generator().manual_seed(0), keep_trajectory=True)
        loss = -posterior.log_joint(chain.final).mean()
        loss.backward()
        optimizer.step()
        assert chain.trajectory.is_meta and chain.noise.is_meta and loss.is_meta
        assert all(p.grad.is_meta for p in g.parameters())
