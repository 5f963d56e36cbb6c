"""log|det dF/de_0| and the estimators of log q_s(e_K), against closed forms, 50-digit arithmetic and each other."""

import copy
import math
import re
import subprocess
import sys

import mpmath
import pytest
import torch

import srlib
from srlib import entropy, log_determinants


def largest_curvature(posterior):
    return torch.linalg.eigvalsh(srlib.ClosedForm(posterior).precision).max().item()


def step_sizes(shape, largest, n_steps, n, d):
    """At most `largest`, in one of the shapes that `short_run` takes; the first two entries are number and schedule."""
    shapes = {"all": (), "step": (n_steps, 1, 1), "latent": (d,), "example": (n, 1), "every": (n_steps, n, d)}
    rng = torch.Generator().manual_seed(4)
    return largest * (0.4 + 0.6 * torch.rand(shapes[shape], generator=rng, dtype=torch.float64))


def run(posterior, n_steps, step_size, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    return srlib.short_run(posterior, n_steps, step_size, rng=rng, keep_trajectory=True, **options)


def further_noises(chain, n_noise, seed=9):
    rng = torch.Generator().manual_seed(seed)
    shape = (n_noise, *chain.noise.shape)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(chain.final.device)


def copies(posterior, n):
    """The posterior of image 0, n times over: n independent chains."""
    return posterior[torch.zeros(n, dtype=torch.int64)]


class Saturating(srlib.LinearGenerator):
    """g(e) = tanh(W e + b)."""

    def forward(self, e):
        return torch.tanh(super().forward(e))


def saturating_posterior(pixels, latents, scale, sigma, n=1):
    rng = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((pixels, latents), (pixels,)))
    g = Saturating(scale * weight, bias)
    with torch.no_grad():
        noise = torch.randn(n, pixels, 1, 1, generator=rng, dtype=torch.float64)
        return srlib.Posterior(g, g(g.sample_prior(n, rng)) + sigma * noise, sigma)


def linear_of(weight, n=4, sigma=0.1):
    rng = torch.Generator().manual_seed(1)
    g = srlib.LinearGenerator(weight, torch.zeros(len(weight), dtype=weight.dtype))
    with torch.no_grad():
        x = g(g.sample_prior(n, rng))
        return srlib.Posterior(g, x + sigma * torch.randn(x.shape, generator=rng, dtype=x.dtype), sigma)


def product_of_jacobians(posterior, chain):
    """dF/de_0 [n, d, d], step by step: Eq. (12)."""
    h = entropy.hessians(posterior, chain.trajectory[:-1])
    jacobian = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    for h_k, s_k in zip(h, chain.step_size.expand(chain.n_steps, *chain.initial.shape)):
        jacobian = jacobian + s_k[..., None] * h_k @ jacobian
    return jacobian


# --- log|det dF/de_0| -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["all", "step", "latent", "example", "every"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_stepwise_is_row_by_row_while_the_jacobian_is_well_conditioned(
    small_posterior, linear_posterior, linear, masked, shape
):
    posterior = linear_posterior(4, masked, pixels=20, latents=12) if linear else small_posterior(masked)
    n_steps, largest = 6, 0.7 / largest_curvature(posterior) if linear else 4e-3
    s = step_sizes(shape, largest, n_steps, 4, 12)
    chain = run(posterior, n_steps, s)
    jacobian = product_of_jacobians(posterior, chain)
    assert torch.linalg.cond(jacobian).max() < 1e6
    stepwise, row_by_row = (srlib.log_abs_det_jacobian(posterior, chain, m) for m in ("stepwise", "row_by_row"))
    assert stepwise.abs().min() > 0.1
    torch.testing.assert_close(stepwise, row_by_row, rtol=1e-8, atol=0)
    torch.testing.assert_close(stepwise, torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind, least, largest", [("linear", 1e5, 1e6), ("saturating", 1e4, 1e6)])
def test_stepwise_is_row_by_row_until_the_condition_number_is_a_million(kind, least, largest):
    """The stiffest directions of the linear model shrink to 2^-20, the others hardly; no warning, and 1e-8 between them."""
    if kind == "linear":
        weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        posterior = linear_of(weight)
        chain = run(posterior, 20, 0.5 / largest_curvature(posterior))
    else:
        posterior = saturating_posterior(pixels=14, latents=10, scale=0.3, sigma=0.5, n=2)
        chain = run(posterior, 40, 0.05)
    jacobian = product_of_jacobians(posterior, chain)
    condition = torch.linalg.cond(jacobian)
    assert least < condition.min() and condition.max() < largest
    stepwise, row_by_row = (srlib.log_abs_det_jacobian(posterior, chain, m) for m in ("stepwise", "row_by_row"))
    torch.testing.assert_close(stepwise, row_by_row, rtol=1e-8, atol=0)
    torch.testing.assert_close(stepwise, torch.linalg.slogdet(jacobian)[1], rtol=1e-8, atol=0)


def test_hessians_of_a_nonlinear_generator_are_finite_differences_of_the_score(small_posterior):
    posterior = small_posterior(masked=True)
    e = run(posterior, 2, 1e-3).trajectory
    h = entropy.hessians(posterior, e)
    step = 1e-5
    for i in (0, 4, 11):
        shift = torch.zeros(12, dtype=torch.float64, device=e.device)
        shift[i] = step
        for k in range(len(e)):
            column = (posterior.score(e[k] + shift) - posterior.score(e[k] - shift)) / (2 * step)
            torch.testing.assert_close(h[k, :, i], column, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("differentiated", [False, True])
def test_memory_of_stepwise_does_not_grow_with_the_chain(differentiated):
    """Eight times the steps take less than a tenth of what their matrices would, chunk by chunk; in a process of its own."""
    program = f"""
import torch, srlib
from srlib import entropy, provenance

class Saturating(srlib.LinearGenerator):
    def forward(self, e):
        return torch.tanh(super().forward(e))

torch.set_num_threads(1)
g = Saturating(0.1 * torch.randn(20, 200, dtype=torch.float64), torch.zeros(20, dtype=torch.float64))
posterior = srlib.Posterior(g, torch.rand(8, 20, 1, 1, dtype=torch.float64), 0.5)

def peak(n_steps):
    s = torch.tensor(0.01, dtype=torch.float64, requires_grad={differentiated})
    chain = srlib.short_run(posterior, n_steps, s, keep_trajectory=True)
    total = entropy.stepwise_log_abs_det(posterior, chain, chunk_size=8).sum()
    if s.requires_grad:
        total.backward()
    return provenance.peak_memory()

few = peak(5)
print(peak(40) - few)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    matrices = 8 * (40 - 5) * 8 * 200**2  # bytes
    assert int(done.stdout) < 0.1 * matrices


def in_50_digits(posterior, chain):
    """Chain and log|det| of one image under `Saturating`, recomputed from the same e_0 and eps, and cond(dF/de_0)."""
    with mpmath.workdps(50):
        g, sigma = posterior.generator, mpmath.mpf(posterior.sigma)
        w, b = mpmath.matrix(g.weight.tolist()), mpmath.matrix(g.bias.tolist())
        x, e = mpmath.matrix(posterior.x.flatten().tolist()), mpmath.matrix(chain.initial[0].tolist())
        s, d, log_det = mpmath.mpf(chain.step_size.item()), len(e), mpmath.mpf(0)
        jacobian = mpmath.eye(d)
        for noise in chain.noise[:, 0].tolist():
            t = (w * e + b).apply(mpmath.tanh)
            slope = t.apply(lambda v: 1 - v**2)
            residual = x - t
            pull = mpmath.matrix([slope[i] * residual[i] for i in range(len(x))])
            bend = mpmath.diag([-(slope[i] ** 2) - 2 * t[i] * slope[i] * residual[i] for i in range(len(x))])
            factor = mpmath.eye(d) + s * (w.T * bend * w / sigma**2 - mpmath.eye(d))
            log_det += mpmath.log(abs(mpmath.det(factor)))
            jacobian = factor * jacobian
            e = e + s * (w.T * pull / sigma**2 - e) + mpmath.sqrt(2 * s) * mpmath.matrix(noise)
        singular = mpmath.svd_r(jacobian, compute_uv=False)
        return [float(v) for v in e], float(log_det), float(max(singular) / min(singular))


def test_stepwise_keeps_its_digits_where_row_by_row_loses_them():
    """d = 10, cond(dF/de_0) > 1e12, against 50 digits: stepwise to 1e-8, row_by_row warns and is wrong by far more."""
    posterior = saturating_posterior(pixels=14, latents=10, scale=0.3, sigma=0.5)
    chain = run(posterior, 60, 0.11)
    final, log_det, condition = in_50_digits(posterior, chain)
    assert condition > 1e12
    assert chain.final[0].tolist() == pytest.approx(final, rel=1e-8)
    assert srlib.log_abs_det_jacobian(posterior, chain).item() == pytest.approx(log_det, rel=1e-8)
    with pytest.warns(RuntimeWarning, match=r"condition number .*stepwise"):
        row_by_row = srlib.log_abs_det_jacobian(posterior, chain, "row_by_row").item()
    assert abs(row_by_row / log_det - 1) > 1e-6


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_the_chunk_size_changes_nothing(small_posterior, chunk_size):
    posterior = small_posterior(masked=True)
    chain = run(posterior, 3, 2e-3)
    expected = srlib.log_abs_det_jacobian(posterior, chain)
    found = srlib.log_abs_det_jacobian(posterior, chain, chunk_size=chunk_size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_chain_without_trajectory_gives_the_same(small_posterior):
    posterior = small_posterior(masked=False)
    rng = torch.Generator().manual_seed(0)
    kept, bare = run(posterior, 3, 2e-3), srlib.short_run(posterior, 3, 2e-3, rng=rng)
    assert bare.trajectory is None
    for function in (srlib.log_abs_det_jacobian, entropy.linear_noise, entropy.path, entropy.path_gaussian):
        assert torch.equal(function(posterior, kept), function(posterior, bare))


@pytest.mark.parametrize("shape", ["all", "step", "latent", "example"])
def test_gradients_in_s_by_both_ways(small_posterior, shape):
    """Third derivatives chunk by chunk, against the graph through the whole chain."""
    posterior, n_steps = small_posterior(masked=True), 3
    s = step_sizes(shape, 4e-3, n_steps, 4, 12).to(posterior.x.device).requires_grad_()
    gradients = []
    for method in ("stepwise", "row_by_row"):
        value = srlib.log_abs_det_jacobian(posterior, run(posterior, n_steps, s), method)
        gradients.append(torch.autograd.grad(value.sum(), s)[0])
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_low_rank_is_within_its_interval_and_close():
    """Of 100 latents, 25 pixels stiffen 25: error below 0.005 d nats with a quarter of the products, and 95 % intervals that hold."""
    posterior = saturating_posterior(pixels=25, latents=100, scale=0.2, sigma=0.15, n=20)
    chain = run(posterior, 5, 2e-3)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    found = srlib.low_rank_log_abs_det(posterior, chain)
    error = (found.value - exact).abs()
    assert 120 <= found.n_products <= 5 * 100 / 4
    assert error.max() < 0.005 * 100
    assert (error <= 1.96 * found.standard_error).sum() >= 17
    assert 1e-6 < found.standard_error.max() < 0.5


def test_low_rank_states_an_error_that_grows_as_products_become_few():
    posterior = saturating_posterior(pixels=60, latents=100, scale=0.2, sigma=0.15, n=20)
    chain = run(posterior, 5, 2e-3)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    errors, covered = [], 0
    for n_products in (100, 200, 350):
        found = srlib.low_rank_log_abs_det(posterior, chain, n_products, n_probes=10)
        error = (found.value - exact).abs()
        assert found.n_products == n_products
        covered += (error <= 1.96 * found.standard_error).sum()
        errors.append(error.square().mean())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert covered >= 0.85 * 60


def test_low_rank_spends_most_on_the_chains_that_need_it():
    """One image of 60 pixels among nine of which 10 are seen: told better than alone, at no more products for each chain."""
    seen = saturating_posterior(pixels=60, latents=100, scale=0.2, sigma=0.15, n=10)
    mask = torch.ones_like(seen.x)
    mask[1:, 10:] = 0
    posterior = srlib.Posterior(seen.generator, seen.x, seen.sigma, mask)
    chain = run(posterior, 5, 2e-3)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    found = srlib.low_rank_log_abs_det(posterior, chain)
    hard = srlib.short_run(posterior[:1], 5, 2e-3, chain.initial[:1], chain.noise[:, :1])
    alone = srlib.low_rank_log_abs_det(posterior[:1], hard)
    assert found.n_products == alone.n_products
    assert found.standard_error[0] < alone.standard_error / 2
    assert ((found.value - exact).abs() <= 3 * found.standard_error + 1e-6).all()


@pytest.mark.parametrize("stiff", [100, 50, 90])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_low_rank_of_few_distinct_eigenvalues_goes_on_when_its_krylov_space_is_spent(share, stiff):
    """W of orthogonal columns of at most two lengths: a Krylov space is spent with its first two blocks."""
    weight = torch.linalg.qr(torch.randn(200, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    weight[:, stiff:] /= 2
    posterior = linear_of(weight)
    chain = run(posterior, 10, share / largest_curvature(posterior))
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    for n_products in (None, 10_000):
        found = srlib.low_rank_log_abs_det(posterior, chain, n_products)
        error = (found.value - exact).abs()
        assert (error <= 3 * found.standard_error).all()
        if stiff == 100:  # nothing is left
            assert error.max() < 1e-9
        elif share < 0.8:  # then the series converges
            assert error.max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("pixels", [150, 400, 2000])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_low_rank_of_a_bulk_of_eigenvalues_is_unbiased_within_its_error(pixels, share):
    """Gaussian W: no direction stands out, so that nearly all is left to the powers of the remainder."""
    rng = torch.Generator().manual_seed(3)
    posterior = linear_of(torch.randn(pixels, 100, generator=rng, dtype=torch.float64) / pixels**0.5)
    chain = run(posterior, 10, share / largest_curvature(posterior))
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    found = [srlib.low_rank_log_abs_det(posterior, chain, rng=torch.Generator().manual_seed(seed)) for seed in range(5)]
    error, stated = (torch.stack(t) for t in ([f.value - exact for f in found], [f.standard_error for f in found]))
    assert (error.abs() <= 1.96 * stated).double().mean() >= 0.9
    assert error.mean().abs() < 0.01 * exact.abs().mean()
    if share < 0.9:  # then the terms left out are small, and the error is that of the traces
        assert stated.max() < 0.01 * exact.abs().mean()
        assert error.mean().abs() < stated.mean() / 5**0.5


@pytest.mark.parametrize("n_steps", [1, 10])
def test_low_rank_with_as_many_probes_as_latents_does_not_claim_too_much(n_steps):
    posterior = saturating_posterior(pixels=40, latents=60, scale=0.2, sigma=0.15, n=10)
    chain = run(posterior, n_steps, 2e-3)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    found = srlib.low_rank_log_abs_det(posterior, chain, n_products=70 * n_steps, n_probes=60)
    assert ((found.value - exact).abs() <= 1.96 * found.standard_error).sum() >= 9


def test_low_rank_knows_that_its_products_are_of_single_precision():
    weight = torch.randn(20, 60, generator=torch.Generator().manual_seed(3)) / 20**0.5
    posterior = linear_of(weight)
    chain = run(posterior, 5, 0.5 / largest_curvature(posterior))
    found = srlib.low_rank_log_abs_det(posterior, chain, n_products=10_000)
    error = (found.value - srlib.log_abs_det_jacobian(posterior, chain)).abs()
    assert error.max() > 1e-14 and (error <= 1.96 * found.standard_error).all()


def test_low_rank_refuses_a_step_at_which_nothing_is_left_to_expand_around():
    posterior = linear_of(torch.full((5, 30), 1e-3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mean\(step_size\)\|=0 of a step .* method=\"stepwise\""):
        srlib.low_rank_log_abs_det(posterior, run(posterior, 2, 1.0))


def test_low_rank_learns_from_the_near_steps(monkeypatch):
    """With the same products the error is less than half of what each step alone would have, and the interval says so."""
    posterior = saturating_posterior(pixels=60, latents=100, scale=0.2, sigma=0.15, n=20)
    chain = run(posterior, 5, 5e-4)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    errors, intervals = [], []
    for reach in (log_determinants.REACH, 0):
        monkeypatch.setattr(log_determinants, "REACH", reach)
        found = srlib.low_rank_log_abs_det(posterior, chain, n_probes=10)
        errors.append((found.value - exact).square().mean().sqrt())
        intervals.append(1.96 * found.standard_error)
        assert ((found.value - exact).abs() <= intervals[-1]).sum() >= 17
    assert errors[0] < errors[1] / 2
    assert intervals[0].mean() < 0.6 * intervals[1].mean()


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("shape", ["all", "step", "latent", "example", "every"])
def test_low_rank_is_exact_when_the_rest_is_a_multiple_of_the_identity(linear_posterior, shape, block_size):
    """5 pixels stiffen 5 directions of 20; the other eigenvalues are 1 - s, and all agree where s is one number for each state."""
    posterior = linear_posterior(2, pixels=5, latents=20)
    s = step_sizes(shape, 1.5 / largest_curvature(posterior), 4, 2, 20)
    chain = run(posterior, 4, s)
    exact = srlib.log_abs_det_jacobian(posterior, chain)
    found = srlib.low_rank_log_abs_det(posterior, chain, 4 * (4 + 12), block_size=block_size)
    tolerance = 0.01 if shape in ("latent", "every") else 1e-7
    torch.testing.assert_close(found.value, exact, rtol=0, atol=tolerance)


def test_low_rank_spends_no_more_than_the_matrices_have(linear_posterior):
    posterior = linear_posterior(2, pixels=5, latents=20)
    chain = run(posterior, 3, 1e-3)
    found = srlib.low_rank_log_abs_det(posterior, chain, n_products=10_000)
    torch.testing.assert_close(found.value, srlib.log_abs_det_jacobian(posterior, chain), rtol=0, atol=1e-7)


@pytest.mark.parametrize("latents", [1, 3, 12, 23])
def test_low_rank_of_few_latents_is_exact(linear_posterior, latents):
    posterior = linear_posterior(2, pixels=5, latents=latents)
    chain = run(posterior, 2, 1e-3)
    found, exact = (srlib.log_abs_det_jacobian(posterior, chain, m) for m in ("low_rank", "stepwise"))
    assert torch.equal(found, exact)


def test_low_rank_of_more_latents_is_the_estimate(linear_posterior):
    posterior = linear_posterior(2, pixels=5, latents=24)
    chain = run(posterior, 2, 1e-3)
    found, exact = (srlib.log_abs_det_jacobian(posterior, chain, m) for m in ("low_rank", "stepwise"))
    assert torch.equal(found, srlib.low_rank_log_abs_det(posterior, chain).value) and not torch.equal(found, exact)


def test_a_nan_stays_a_nan_for_the_methods_to_see(linear_posterior):
    """No method hides an eigenvalue of 0: at s = 1/lambda the Jacobian is singular and log|det| is -inf."""
    posterior = linear_posterior(1, pixels=1, latents=1)
    chain = run(posterior, 1, 1 / largest_curvature(posterior))
    assert srlib.log_abs_det_jacobian(posterior, chain) < -25
    assert entropy.linear_noise(posterior, chain).isfinite().all()


# --- the estimators of log q_s(e_K) ----------------------------------------------------------------------------------

# latents d, pixels, K, s lambda_max, shape of s, masked
LINEAR = [
    (1, 3, 1, 0.5, "all", False),
    (1, 2, 100, 1.9, "all", True),
    (2, 9, 17, 1.3, "step", True),
    (5, 4, 40, 1.9, "latent", False),
    (8, 20, 25, 1.6, "every", True),
    (12, 30, 60, 0.9, "example", True),
    (20, 12, 100, 1.9, "all", False),
    (20, 40, 100, 1.9, "every", True),
]


def linear_case(linear_posterior, latents, pixels, n_steps, overshoot, shape, masked, n=2):
    posterior = linear_posterior(n, masked, pixels=pixels, latents=latents)
    largest = overshoot / largest_curvature(posterior)
    # the largest entry of a number is the number itself
    s = largest if shape == "all" else step_sizes(shape, largest, n_steps, n, latents)
    return posterior, srlib.ClosedForm(posterior), s


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_noise_is_exact_for_linear_models(linear_posterior, case):
    posterior, exact, s = linear_case(linear_posterior, *case)
    d, n_steps = case[0], case[2]
    _, covariance = exact.short_run_moments(s, n_steps)
    expected = 0.5 * (torch.linalg.slogdet(covariance)[1] + d * math.log(2 * math.pi * math.e))
    found = -entropy.linear_noise(posterior, run(posterior, n_steps, s))
    assert (found - expected).abs().max() < 1e-10 * d


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_path_gaussian_is_log_q_itself_for_linear_models(linear_posterior, case):
    """Chain by chain, the density of N(m_K, S_K) at e_K: with the exact reverse kernels nothing random is left."""
    posterior, exact, s = linear_case(linear_posterior, *case)
    chain = run(posterior, case[2], s)
    q = torch.distributions.MultivariateNormal(*exact.short_run_moments(s, case[2]))
    torch.testing.assert_close(entropy.path_gaussian(posterior, chain), q.log_prob(chain.final), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_energies_of_chains_are_those_of_the_closed_form(linear_posterior, case):
    """E_q[-log p(x, e)] = KL(q || p(e|x)) + H(q) - log p(x)."""
    latents, _, n_steps, _, shape, _ = case
    posterior, exact, s = linear_case(linear_posterior, *case)
    _, covariance = exact.short_run_moments(s, n_steps)
    entropies = 0.5 * (torch.linalg.slogdet(covariance)[1] + latents * math.log(2 * math.pi * math.e))
    expected = (exact.short_run_kl(s, n_steps) + entropies - exact.log_marginal())[0]
    own = s[:, :1] if shape == "every" else s[0] if shape == "example" else s  # image 0 alone
    many = copies(posterior, 2000)
    energy = -many.log_joint(run(many, n_steps, own).final).detach()
    assert (energy.mean() - expected).abs() < 4 * energy.std() / 2000**0.5


@pytest.mark.parametrize("case", [c for c in LINEAR if c[4] not in ("every", "example")], ids=str)
@pytest.mark.parametrize("estimator", ["change_of_variables", "path"])
def test_one_draw_bounds_are_never_below_the_exact_value(linear_posterior, case, estimator):
    """E log q_s is the value at which they stop; taken chain by chain, so that the energy adds no noise."""
    n_steps = case[2]
    posterior, exact, s = linear_case(linear_posterior, *case)
    many = copies(posterior, 200 if estimator == "path" else 20)
    chain = run(many, n_steps, s)
    excess = getattr(entropy, estimator)(many, chain) - log_q(exact, chain)
    assert excess.mean() > -4 * excess.std() / len(excess) ** 0.5


def log_q(exact, chain):
    """The exact log q_s(e_K) of image 0."""
    mean, covariance = exact.short_run_moments(chain.step_size, chain.n_steps)
    return torch.distributions.MultivariateNormal(mean[0], covariance[0]).log_prob(chain.final)


def test_semi_implicit_lies_between_the_exact_value_and_change_of_variables(linear_posterior):
    n_steps = 5
    single = linear_posterior(1, mask=True, latents=2)
    many = copies(single, 100)
    chain = run(many, n_steps, 0.5 / largest_curvature(single))
    noises, exact = further_noises(chain, 40), log_q(srlib.ClosedForm(single), chain)
    one = entropy.change_of_variables(many, chain) - exact
    few = entropy.semi_implicit(many, chain, noises[:4]) - exact
    more = entropy.semi_implicit(many, chain, noises) - exact
    assert one.mean() > few.mean() > more.mean()
    assert -4 * more.std() / 10 < more.mean() < 0.6 * one.mean()


@pytest.mark.parametrize("masked", [False, True])
def test_backwards_finds_the_start_of_the_chain(small_posterior, masked):
    posterior = small_posterior(masked)
    chain = run(posterior, 4, 1e-3)
    back = entropy.backwards(posterior, chain.final, chain.step_size, chain.noise)
    torch.testing.assert_close(back.trajectory, chain.trajectory, rtol=1e-7, atol=1e-7)
    assert torch.equal(back.final, chain.final)
    other = entropy.backwards(posterior, chain.final, chain.step_size, chain.noise.flip(0))
    replayed = srlib.short_run(posterior, 4, chain.step_size, other.initial, chain.noise.flip(0))
    torch.testing.assert_close(replayed.final, chain.final, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(other.initial, chain.initial)


def in_single(posterior):
    """The same images, weights and mask in float32."""
    mask = None if posterior.mask is None else posterior.mask.float()
    return srlib.Posterior(copy.deepcopy(posterior.generator).float(), posterior.x.float(), posterior.sigma, mask)


def in_double(posterior):
    """The float32 numbers of a posterior, computed with in float64."""
    mask = None if posterior.mask is None else posterior.mask.double()
    return srlib.Posterior(copy.deepcopy(posterior.generator).double(), posterior.x.double(), posterior.sigma, mask)


@pytest.mark.parametrize("n_steps, s, stretch", [(3, 2e-3, 1.0), (40, 0.02, 10.0)], ids=["top-down", "stiff"])
def test_semi_implicit_of_a_float32_system_is_that_of_the_same_weights_in_float64(small_posterior, n_steps, s, stretch):
    """The second where going back stretches rounding errors, so that float32 would not do on the way."""
    stiff = saturating_posterior(pixels=6, latents=3, scale=0.5, sigma=0.3, n=4)
    single = in_single(small_posterior(True) if stretch == 1 else stiff)
    double = in_double(single)
    chain = run(single, n_steps, s)
    noises = further_noises(chain, 3).float()
    exact_chain = srlib.short_run(
        double, n_steps, chain.step_size.double(), chain.initial.double(), chain.noise.double()
    )
    back = entropy.backwards(single, chain.final, chain.step_size, noises[0])
    exact = entropy.backwards(double, chain.final.double(), chain.step_size.double(), noises[0].double())
    smallest = torch.linalg.eigvalsh(entropy.step_jacobians(double, exact)).abs().amin(-1)
    assert (1 / smallest).prod(0).max() > stretch
    assert back.initial.dtype == torch.float32 and torch.equal(back.final, chain.final)
    torch.testing.assert_close(back.trajectory.double(), exact.trajectory, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        entropy.semi_implicit(single, chain, noises),
        entropy.semi_implicit(double, exact_chain, noises.double()),
        rtol=0,
        atol=1e-5,
    )


def test_a_gradient_in_s_of_a_float32_system_comes_through_the_way_back():
    single, gradients = in_single(saturating_posterior(pixels=6, latents=3, scale=0.5, sigma=0.3, n=4)), []
    first = run(single, 3, 1e-2)
    for posterior, dtype in ((single, torch.float32), (in_double(single), torch.float64)):
        s = torch.tensor(1e-2, dtype=dtype, requires_grad=True)
        chain = srlib.short_run(posterior, 3, s, first.initial.to(dtype), first.noise.to(dtype))
        value = entropy.semi_implicit(posterior, chain, further_noises(first, 2).to(dtype))
        gradients.append(torch.autograd.grad(value.sum(), s)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


def test_backwards_refuses_steps_without_an_inverse(linear_posterior):
    posterior = linear_posterior(1)
    chain = run(posterior, 3, 1.5 / largest_curvature(posterior))
    with pytest.raises(ValueError, match=r"step 2 with step size .* smaller step size"):
        entropy.backwards(posterior, chain.final, chain.step_size, chain.noise)


def test_an_inverse_that_does_not_come_closer_is_given_up_soon(monkeypatch):
    """tanh keeps the iteration in bounds, where it would go round for ever."""
    posterior, scores, score = saturating_posterior(6, 2, scale=1.0, sigma=0.3), [], srlib.Posterior.score
    chain = run(posterior, 1, 0.1)
    monkeypatch.setattr(srlib.Posterior, "score", lambda self, e: scores.append(e) or score(self, e))
    with pytest.raises(entropy.NoInverseError, match="no inverse that the iteration finds"):
        entropy.backwards(posterior, chain.final, chain.step_size, chain.noise)
    assert entropy.PATIENCE < len(scores) <= 2 * entropy.PATIENCE


def test_equation_17_as_printed_loosens_with_more_draws():
    """The same e_0 under other noises is no preimage of e_K: each value is the log of a mean that grows with its tail."""
    posterior = copies(saturating_posterior(pixels=6, latents=2, scale=1.0, sigma=0.3), 800)
    chain = run(posterior, 10, 0.02)
    noises = further_noises(chain, 20)
    one = entropy.change_of_variables(posterior, chain)
    few = entropy.equation_17(posterior, chain, noises[:3])
    more = entropy.equation_17(posterior, chain, noises)
    for looser, tighter in ((few, one), (more, few)):
        excess = looser - tighter
        assert excess.mean() > 4 * excess.std() / len(excess) ** 0.5


def test_equation_17_is_an_average_of_densities(small_posterior):
    posterior = small_posterior(masked=False)
    chain = run(posterior, 2, 4e-3)
    noise = further_noises(chain, 1)
    other = srlib.short_run(posterior, 2, 4e-3, chain.initial, noise[0], keep_trajectory=True)
    densities = [entropy.change_of_variables(posterior, c).exp() for c in (chain, other)]
    torch.testing.assert_close(entropy.equation_17(posterior, chain, noise), (sum(densities) / 2).log())


@pytest.mark.parametrize("overshoot", [0.5, 3.0, 20.0])
def test_linear_noise_stays_finite_over_200_overshooting_steps(overshoot):
    """tanh keeps the chain in bounds where |1 - s lambda| is far above 1; S_K itself would leave float64's range."""
    posterior = saturating_posterior(pixels=6, latents=4, scale=1.0, sigma=0.3)
    s = overshoot * 0.3**2 / 6
    chain = run(posterior, 200, s)
    assert entropy.linear_noise(posterior, chain).isfinite().all()


def test_linear_noise_does_not_square_what_overshoots():
    """A direction that contracts by 1e-9 a step beside one that grows by 3: its variance 2 s is kept to 1e-9."""
    weight = torch.diag(torch.tensor([math.sqrt(39), math.sqrt(8.999999)], dtype=torch.float64))
    g = srlib.LinearGenerator(weight, torch.zeros(2, dtype=torch.float64))
    posterior = srlib.Posterior(g, torch.zeros(1, 2, 1, 1, dtype=torch.float64), 1.0)
    factors, s, n_steps = torch.tensor([-3.0, 1e-7], dtype=torch.float64), 0.1, 5
    chain = run(posterior, n_steps, s)
    variance = factors ** (2 * n_steps) + 2 * s * sum(factors ** (2 * j) for j in range(n_steps))
    expected = 0.5 * (variance.log().sum() + 2 * math.log(2 * math.pi * math.e))
    assert -entropy.linear_noise(posterior, chain).item() == pytest.approx(expected.item(), abs=1e-9)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_named(linear_posterior):
    posterior = linear_posterior(1)
    with pytest.raises(ValueError, match=r"'exact' is unknown; there are: stepwise, row_by_row, low_rank"):
        srlib.log_abs_det_jacobian(posterior, run(posterior, 2, 1e-2), "exact")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_probes=1), "n_probes=1 must lie within 2 ... 3"),
        (dict(n_probes=4), "n_probes=4"),
        (dict(n_probes=2, block_size=2), "block_size=2 within 1 ... 1"),
        (dict(n_probes=2, block_size=0), "block_size=0"),
        (dict(n_probes=2, block_size=1, n_products=5), "n_products=5 is too few: 2 steps with 2 probes .* take 6"),
    ],
)
def test_low_rank_names_what_does_not_fit(linear_posterior, options, message):
    posterior = linear_posterior(1)
    with pytest.raises(ValueError, match=message):
        srlib.low_rank_log_abs_det(posterior, run(posterior, 2, 1e-2), **options)


@pytest.mark.parametrize(
    "estimator, message",
    [
        ("linear_noise", "use change_of_variables"),
        ("path", "run it with noise"),
        ("path_gaussian", "run it with noise"),
    ],
)
def test_deterministic_chains_have_no_noise_to_count(linear_posterior, estimator, message):
    posterior = linear_posterior(1)
    chain = run(posterior, 2, 1e-2, deterministic=True)
    with pytest.raises(ValueError, match=message):
        getattr(entropy, estimator)(posterior, chain)
    assert entropy.change_of_variables(posterior, chain).isfinite().all()


@pytest.mark.parametrize("estimator", ["semi_implicit", "equation_17"])
def test_deterministic_chains_have_no_noise_to_average_over(linear_posterior, estimator):
    posterior = linear_posterior(1)
    chain = run(posterior, 2, 1e-2, deterministic=True)
    noises = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="no noise to average over; use change_of_variables"):
        getattr(entropy, estimator)(posterior, chain, noises)


@pytest.mark.parametrize("estimator", ["semi_implicit", "equation_17"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda noises: noises.float(), "torch.float32; this chain needs .* torch.float64"),
        (lambda noises: noises.tolist(), "noises=.* must be a tensor"),
        (lambda noises: noises * math.inf, "noises holds NaN or infinite"),
    ],
)
def test_further_noises_are_of_the_chains_kind(linear_posterior, estimator, change, message):
    posterior = linear_posterior(1)
    chain = run(posterior, 2, 1e-3)
    with pytest.raises(ValueError, match=message):
        getattr(entropy, estimator)(posterior, chain, change(further_noises(chain, 2)))


@pytest.mark.parametrize("estimator", ["change_of_variables", "linear_noise", "path", "path_gaussian"])
def test_what_is_no_chain_of_these_images_is_refused_by_every_estimator(linear_posterior, estimator):
    posterior, function = linear_posterior(2), getattr(entropy, estimator)
    with pytest.raises(ValueError, match=r"e has shape \(3, 3\), these 2 images need \[2, 3\]"):
        function(posterior, run(linear_posterior(3), 2, 1e-3))
    with pytest.raises(ValueError, match="chain is a Tensor; give what `short_run` returns"):
        function(posterior, run(posterior, 2, 1e-3).final)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(final=torch.zeros(3, 3).double()), r"e has shape \(3, 3\), these 2 images"),
        (dict(noise=torch.zeros(2, 3, 3).double()), r"noise is torch.float64 \(2, 3, 3\), to go back from"),
        (dict(noise=torch.zeros(2, 2, 3)), "noise is torch.float32"),
        (dict(noise=torch.zeros(0, 2, 3).double()), r"noise is torch.float64 \(0, 2, 3\)"),
        (dict(step_size=-1.0), "step_size=-1.0 must be positive"),
        (dict(tolerance=0.0), "tolerance=0.0"),
        (dict(n_max=0), "n_max=0"),
    ],
)
def test_backwards_names_what_does_not_fit(linear_posterior, change, message):
    posterior = linear_posterior(2)
    chain = run(posterior, 2, 1e-3)
    arguments = dict(final=chain.final, step_size=1e-3, noise=chain.noise) | change
    with pytest.raises(ValueError, match=message):
        entropy.backwards(posterior, **arguments)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_size_holds_at_least_one_state(linear_posterior, chunk_size):
    posterior = linear_posterior(1)
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}"):
        srlib.log_abs_det_jacobian(posterior, run(posterior, 2, 1e-2), chunk_size=chunk_size)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("method", ["stepwise", "row_by_row", "low_rank"])
@pytest.mark.parametrize("latents", [3, 30])
def test_a_chain_of_other_images_is_refused(linear_posterior, method, n, latents):
    posterior, other = linear_posterior(2, latents=latents), linear_posterior(n, latents=latents)
    with pytest.raises(ValueError, match=rf"e has shape \({n}, {latents}\), these 2 images need \[2, {latents}\]"):
        srlib.log_abs_det_jacobian(posterior, run(other, 2, 1e-3), method)


@pytest.mark.parametrize("shape", [(2, 3, 3), (5, 4, 2, 3), (5, 2, 2, 3), (5, 3, 1, 3), (5, 3, 2, 4)])
@pytest.mark.parametrize("estimator", ["semi_implicit", "equation_17"])
def test_further_noises_have_the_length_of_the_chain(linear_posterior, estimator, shape):
    posterior = linear_posterior(2)
    noises = torch.zeros(shape, dtype=torch.float64, device=posterior.x.device)
    with pytest.raises(ValueError, match=rf"noises has shape {re.escape(str(shape))}, .* \[J, 3, 2, 3\]"):
        getattr(entropy, estimator)(posterior, run(posterior, 3, 1e-3), noises)
