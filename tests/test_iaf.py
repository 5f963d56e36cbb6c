"""The flow: which output depends on which input, its density against autograd and integration, its inverse.

That the bound, training and interface of the system are right is asked of all variational auto-encoders in test_vae.py.
"""

import pytest
import torch
from torch import nn

import srlib
from srlib.baselines.iaf import FIRST_LOGIT, IAF, MADE, Flow
from srlib.baselines.vae import log_normal
from srlib.experiment import Config


def scrambled(module, seed=0, scale=0.5):
    """The module in float64 with every parameter moved by noise: none is at its first value."""
    rng = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=rng, dtype=p.dtype).to(p)
    return module


def numbers(*shape, seed=1, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def jacobians(function, e):
    """d function(e)_i / d e_j for each row of e [n, d]: [n, d, d]."""
    return torch.autograd.functional.jacobian(lambda e: function(e).sum(0), e).movedim(1, 0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("d, hidden", [(6, 6), (6, 40), (5, 7), (2, 3), (1, 4)])
def test_outputs_depend_on_inputs_before_and_on_all_of_them(d, hidden, reverse, device):
    made = scrambled(MADE(d, 3, hidden, reverse)).to(device)
    e, context = numbers(4, d, device=device), numbers(4, 3, seed=2, device=device)
    before = torch.ones(d, d, device=device).tril(-1).bool()
    before = before.T if reverse else before
    for output in (0, 1):
        j = jacobians(lambda e, output=output: made(e, context)[output], e)
        assert torch.equal(j != 0, before.expand_as(j))
        by_context = jacobians(lambda c, output=output: made(e, c)[output], context)
        assert (by_context != 0).all()


def test_fewer_hidden_units_than_latents_lose_dependence_but_never_the_order(device):
    made = scrambled(MADE(8, 3, 3)).to(device)
    context = numbers(4, 3, seed=2, device=device)
    j = jacobians(lambda e: made(e, context)[0], numbers(4, 8, device=device))
    assert (j.triu() == 0).all() and (j.tril() != 0).any()


@pytest.mark.parametrize("n_flows", [1, 2, 3])
def test_the_log_determinant_is_that_of_autograd(n_flows, device):
    flow, e = scrambled(Flow(5, 2, n_flows, 9)).to(device), numbers(6, 5, device=device)
    context = numbers(6, 2, seed=2, device=device)
    log_det = flow(e, context)[1]
    j = jacobians(lambda e: flow(e, context)[0], e)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(j)[1])
    if n_flows == 1:
        assert (j.triu(1) == 0).all()
    else:  # the reverse order of every second step makes every latent depend on every other
        assert (j != 0).all()


def test_the_inverse_undoes_the_flow(device):
    flow, e = scrambled(Flow(7, 2, 4, 16)).to(device), numbers(6, 7, device=device)
    context = numbers(6, 2, seed=2, device=device)
    with torch.no_grad():
        after, log_det = flow(e, context)
        before, log_det_back = flow.inverse(after, context)
    assert (after - e).abs().max() > 0.1
    torch.testing.assert_close(before, e, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det_back, log_det)


def test_the_density_of_two_latents_integrates_to_one(device):
    torch.manual_seed(0)
    flow, context = scrambled(Flow(2, 2, 3, 12)).to(device), numbers(1, 2, seed=2, device=device)
    axis = torch.linspace(-9, 9, 301, dtype=torch.float64, device=device)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        before, log_det = flow.inverse(grid, context.expand(len(grid), -1))
        density = (log_normal(before) - log_det).exp()
    beyond = ~before.isfinite().all(1) | (before.abs() > 1e100).any(1)  # only from there float64 cannot come back
    assert density[~beyond].isfinite().all() and beyond.double().mean() < 0.2
    density = density.masked_fill(beyond, 0)
    assert density.sum() * 0.06**2 == pytest.approx(1, abs=1e-4)
    centre = (density[:, None] * grid).sum(0) * 0.06**2
    with torch.no_grad():
        draws = flow(numbers(20_000, 2, seed=3, device=device), context.expand(20_000, -1))[0]
    assert ((draws.mean(0) - centre).abs() < 4.5 * draws.std(0) / len(draws) ** 0.5).all()


def test_it_begins_as_a_multiplication(device):
    flow, e = Flow(4, 2, 3, 8).double().to(device), numbers(5, 4, device=device)
    gate = torch.tensor(FIRST_LOGIT, dtype=torch.float64).sigmoid().item()
    torch.testing.assert_close(flow(e, numbers(5, 2, device=device))[0], gate**3 * e)


class Constant(nn.Module):
    """m, t and c that are the same for all images."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(mean.clone()), nn.Parameter(std.log())

    def forward(self, x):
        mean, std, context = self.mean, self.log_std.exp(), torch.zeros_like(self.mean)
        return tuple(v.expand(len(x), -1) for v in (mean, std, context))


def test_it_learns_correlations_that_independent_latents_cannot_have(device):
    """One image under a linear model: the bound comes nearer to log p(x) than a Gaussian without correlations can."""
    weight = torch.tensor([[2.0, 1.6], [0.3, 1.0], [1.5, 1.5]], dtype=torch.float64)
    g = srlib.LinearGenerator(weight, torch.zeros(3).double()).to(device).requires_grad_(False)
    x = torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64, device=device)[None, :, None, None]
    exact = srlib.ClosedForm(srlib.Posterior(g, x, 0.7))
    precision, mean = exact.precision[0], exact.posterior_moments()[0][0]
    best_independent = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    torch.manual_seed(0)
    system = IAF(g, Constant(mean, precision.diagonal().rsqrt()), 0.7, n_flows=2, hidden=8).double().to(device)
    plan = srlib.TrainingPlan(400, 256, (2e-2, 5e-3, 1e-3))
    system.fit(x.expand(256, -1, -1, -1), plan, torch.Generator().manual_seed(0), progress=False)
    elbo = system.elbo(x.expand(4000, -1, -1, -1), rng=torch.Generator().manual_seed(1))
    gap, error = exact.log_marginal() - elbo.mean(), elbo.std() / len(elbo) ** 0.5
    assert gap > -4 * error and error < 0.02
    assert gap < 0.2 * best_independent and best_independent > 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_flows": 0}, "n_flows=0"),
        ({"n_flows": 1.5}, "n_flows=1.5"),
        ({"hidden": 0}, "hidden=0"),
        ({"depth": 2}, "iaf has no 'depth'; there are: warmup, n_flows, hidden"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(name="tiny", system="iaf", latent_dims=(2,), channels=4, options=options)
