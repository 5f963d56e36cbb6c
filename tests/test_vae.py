"""The variational auto-encoders: what all three share, and the bound of the plain one against what is exact."""

import math

import pytest
import torch
from torch import nn

import srlib
from srlib.baselines import iaf, ladder_vae, vae
from srlib.baselines._encoder import BottomUpEncoder
from srlib.checkpoints import CheckpointError
from srlib.experiment import Config
from srlib.training import TrainingLoop

KINDS = {"vae": (vae.VAE, 2), "ladder_vae": (ladder_vae.LadderVAE, 2), "iaf": (iaf.IAF, 3)}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def new_system(device):
    """make(kind, seed, latent_dims, further arguments): a small system whose first weights depend on the seed."""

    def make(kind="vae", seed=0, latent_dims=(3, 5), **options):
        system, n_heads = KINDS[kind]
        torch.manual_seed(seed)
        g = srlib.TopDownGenerator(latent_dims, (1, 16, 16), channels=8, feature_size=8)
        if kind == "iaf":
            options = dict(n_flows=2, hidden=16) | options
        return system(g, BottomUpEncoder(g, n_heads), **(dict(sigma=0.3) | options)).to(device)

    return make


@pytest.fixture
def images():
    """16 images of a white square in a random place, uint8."""
    rng = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 8, (16, 2), generator=rng)
    rows = (torch.arange(16) - corner[:, :1]).clamp(0, 9) % 9 > 0
    columns = (torch.arange(16) - corner[:, 1:]).clamp(0, 9) % 9 > 0
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(torch.uint8) * 255


def generator(seed):
    return torch.Generator().manual_seed(seed)


def fit(system, images, n_updates=12, directory=None, seed=0, **plan):
    plan = srlib.TrainingPlan(n_updates, **(dict(batch_size=6, learning_rates=(1e-3, 5e-4)) | plan))
    return system.fit(images, plan, generator(seed), directory, progress=False)


class LinearEncoder(nn.Module):
    """m(x) = x A' + a and a t that is the same for all x."""

    def __init__(self, matrix, bias, std):
        super().__init__()
        self.matrix, self.bias, self.log_std = (nn.Parameter(p.clone()) for p in (matrix, bias, std.log()))

    def forward(self, x):
        mean = x.flatten(1) @ self.matrix.T + self.bias
        return mean, self.log_std.exp().expand_as(mean)


def linear_vae(posterior):
    """The VAE with the exact posterior mean and the best t of independent latents: 1 / sqrt(P_jj)."""
    g, exact = posterior.generator, srlib.ClosedForm(posterior)
    gain = torch.linalg.solve(exact.precision[0], g.weight.detach().T) / posterior.sigma**2
    std = exact.precision[0].diagonal().rsqrt()
    return vae.VAE(g, LinearEncoder(gain, -gain @ g.bias.detach(), std), posterior.sigma), exact


# The bound against what is exact


def test_with_the_exact_posterior_every_draw_gives_log_p(linear_posterior):
    """Columns of W at right angles: the latents are independent given x."""
    posterior = linear_posterior(n=5)
    with torch.no_grad():
        q, r = torch.linalg.qr(posterior.generator.weight)
        posterior.generator.weight.copy_(q * r.diagonal())
    system, exact = linear_vae(posterior)
    elbo = system.elbo(posterior.x, rng=generator(0))
    torch.testing.assert_close(elbo, exact.log_marginal(), rtol=1e-10, atol=1e-10)


def test_the_gap_of_independent_latents_is_the_closed_form(linear_posterior):
    """log p(x) - max ELBO = (sum_j log P_jj - log|P|) / 2 where the posterior N(mu, P^-1) has correlations."""
    posterior = linear_posterior(n=3)
    system, exact = linear_vae(posterior)
    precision = exact.precision[0]
    gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    draws = torch.stack([system.elbo(posterior.x, rng=rng) for rng in [generator(0)] for _ in range(4000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert gap > 10 * error.max()
    assert ((exact.log_marginal() - gap - draws.mean(0)).abs() < 4 * error).all()


def test_a_trained_linear_vae_is_a_factor_model_at_its_optimum(device):
    """Its ELBO is never above the exact log p(x), and ends where probabilistic PCA with this sigma has its maximum."""
    rng, sigma = generator(0), 0.5
    scales = torch.tensor([2.0, 1.5, 1.0])
    x = torch.randn(200, 3, generator=rng) * scales @ torch.linalg.qr(torch.randn(8, 3, generator=rng))[0].T
    x = (x + sigma * torch.randn(200, 8, generator=rng)).double()[:, :, None, None].to(device)
    torch.manual_seed(0)
    g = srlib.LinearGenerator(0.3 * torch.randn(8, 3).double(), torch.zeros(8).double())
    encoder = LinearEncoder(0.3 * torch.randn(3, 8).double(), torch.zeros(3).double(), torch.ones(3).double())
    system = vae.VAE(g, encoder, sigma).to(device)
    history = fit(system, x, 900, batch_size=200, learning_rates=(3e-2, 1e-2, 1e-3), betas=(0.9, 0.99))
    elbo = system.elbo(x, 100, generator(1))
    exact = srlib.ClosedForm(srlib.Posterior(system.generator, x, sigma)).log_marginal()
    flat = x.flatten(1)
    eigenvalues = torch.linalg.eigvalsh((flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat)).flip(0)
    kept = torch.cat([eigenvalues[:3].clamp_min(sigma**2), torch.full_like(eigenvalues[3:], sigma**2)])
    optimum = -0.5 * (8 * math.log(2 * math.pi) + kept.log().sum() + (eigenvalues / kept).sum())
    assert (elbo < exact + 0.1).all() and elbo.mean() < exact.mean() + 1e-3
    assert exact.mean() - elbo.mean() < 0.02 and optimum - exact.mean() < 0.02
    assert exact.mean() < optimum + 1e-9
    assert history["loss"][0] > history["loss"][-1] > -optimum - 0.2


def test_weights_of_draws_average_to_p(new_system, kind, images):
    """E_q[p(x, e) / q(e|x)] = p(x), by a sum over a grid: so log q is the normalised density of the very draws."""
    system = new_system(kind, latent_dims=(1, 1), sigma=3.0).double()
    with torch.no_grad():
        for p in system.parameters():  # nothing at its first value, which may be zero
            p += 0.05 * torch.randn(p.shape, generator=generator(p.numel()), dtype=p.dtype).to(p)
    x = system.as_input(images[:1]) * 0.3
    axis = torch.linspace(-5, 5, 33, dtype=x.dtype, device=x.device)
    grid = torch.cartesian_prod(axis, axis)

    def log_joint(e):
        with torch.no_grad():
            return srlib.Posterior(system.generator, x.expand(len(e), -1, -1, -1), 3.0).log_joint(e)

    log_p = log_joint(grid).logsumexp(0) + 2 * math.log(10 / 32)
    many = x.expand(500, -1, -1, -1)
    with torch.no_grad():
        draw = system.draw(many, generator(0))
    weight = (log_joint(draw.e) - draw.log_q - log_p).exp()
    error = weight.std() / len(weight) ** 0.5
    assert error < 0.1 and abs(weight.mean() - 1) < 4 * error
    elbo = system.elbo(many, rng=generator(0))
    torch.testing.assert_close(elbo, weight.log() + log_p)
    assert elbo.mean() < log_p
    kl = (draw.log_q - vae.log_normal(draw.e)).mean()
    assert (
        abs(draw.kl.mean() - kl) < 4 * (draw.log_q - vae.log_normal(draw.e) - draw.kl).std() / len(weight) ** 0.5 + 1e-9
    )
    torch.testing.assert_close(draw.decode(), system.decode(draw.e))


def test_the_density_and_the_divergence_of_a_gaussian_are_those_of_torch():
    mean, std = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    e, log_q, kl = vae.gaussian(mean, std, generator(0))
    q, prior = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(log_q, q.log_prob(e).sum(1))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior).sum(1))


# Training


def test_a_tiny_set_is_learned_by_heart(new_system, kind, images):
    system = new_system(kind)
    x = system.as_input(images)
    history = fit(system, images, 50, batch_size=16, learning_rates=(4e-3, 2e-3))
    error = (system.reconstruct(x, rng=generator(1)) - x).square().mean()
    best_constant = (x - x.mean(0)).square().mean()
    assert error < 0.4 * best_constant
    assert sum(history["loss"][-10:]) < 0.5 * sum(history["loss"][:10])
    assert set(history) == {"loss", "sigma", "mse", "kl", "warmup"}


def loss_of_first_update(system, images, monkeypatch):
    """The loss that `fit` hands over, with its graph."""
    caught = []
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "update", lambda loop, loss, **monitored: caught.append(loss))
        fit(system, images, 1)
    return caught[0]


def test_gradients_are_those_of_finite_differences(new_system, kind, images, monkeypatch):
    system = new_system(kind).double()
    with torch.no_grad():
        for p in system.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator(p.numel()), dtype=p.dtype).to(p)
    loss_of_first_update(system, images, monkeypatch).backward()
    parameters = list(system.parameters())
    for part in (system.generator, system.encoder, system):
        chosen = {id(p) for p in part.parameters()}
        direction = [
            torch.randn(p.shape, generator=generator(i)).to(p) * (id(p) in chosen) for i, p in enumerate(parameters)
        ]
        slope = sum((p.grad * v).sum() for p, v in zip(parameters, direction)).item()
        ends = []
        for step in (1e-6, -2e-6):  # forwards, and from there as far to the other side
            with torch.no_grad():
                for p, v in zip(parameters, direction):
                    p += step * v
            ends.append(loss_of_first_update(system, images, monkeypatch).item())
        with torch.no_grad():
            for p, v in zip(parameters, direction):
                p += 1e-6 * v
        assert abs(slope) > 1e-2
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)


def test_the_loss_is_the_negative_bound(new_system, kind, images, monkeypatch):
    system = new_system(kind).double()
    order = torch.randperm(len(images), generator=(rng := generator(0)))[:6]
    loss = loss_of_first_update(system, images, monkeypatch)
    x = system.as_input(images[order])
    state = rng.get_state()
    elbo = system.elbo(x, rng=rng).mean()
    rng.set_state(state)
    draw = system.draw(x, rng)
    analytic = (draw.log_q - vae.log_normal(draw.e) - draw.kl).mean()  # the KL in place of its estimate
    torch.testing.assert_close(loss, -elbo - analytic)


def test_sigma_is_annealed_as_in_the_short_run_system_and_the_kl_warms_up(new_system, images):
    schedule = dict(sigma=0.1, sigma_start=0.8, anneal_fraction=0.5)
    history = fit(new_system(**schedule, warmup=0.25), images, n_updates=12)
    twin = srlib.ShortRun(new_system().generator, **schedule)
    assert history["sigma"] == [twin.sigma_at(t / 12) for t in range(12)]
    assert history["warmup"] == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)] + [1.0] * 9
    assert fit(new_system(), images, n_updates=2)["warmup"] == [1, 1]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(new_system, images, kind):
    histories = [fit(new_system(kind), images, 3, seed=seed) for seed in (3, 3, 4)]
    assert histories[0] == histories[1] != histories[2]


def test_a_killed_run_resumes_with_the_same_bits(new_system, kind, images, tmp_path, killed_at):
    schedule = dict(sigma_start=0.6, warmup=0.5)
    whole, resumed = new_system(kind, **schedule), new_system(kind, **schedule)
    history = fit(whole, images, 5)
    with killed_at(3):
        fit(resumed, images, 5, tmp_path)
    fresh = new_system(kind, seed=99, **schedule)
    assert fit(fresh, images, 5, tmp_path, seed=99) == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fresh.state_dict().values()))
    with pytest.raises(CheckpointError, match="its settings differ"):
        fit(new_system(kind, sigma_start=0.6, warmup=0.4), images, 5, tmp_path)


def test_a_whole_update_runs_on_the_meta_device(kind):
    """A tensor made on the CPU by mistake would be an error here."""
    config = Config(name="tiny", system=kind, latent_dims=(2, 3), channels=4)
    with torch.device("meta"):
        system = config.build((1, 28, 28))
    optimizer = torch.optim.Adam(system.parameters())
    x = torch.empty(5, 1, 28, 28, device="meta")
    draw = system.draw(x, generator(0))
    loss = (draw.kl + (x - draw.decode()).square().flatten(1).sum(1)).mean()
    loss.backward()
    optimizer.step()
    assert loss.is_meta and all(p.grad.is_meta for p in system.parameters())
    mask = torch.ones(1, 1, 28, 28, device="meta")
    assert system.infer(x, mask, generator(0)).is_meta and system.elbo(x, 2, generator(0)).is_meta


# The interface


@pytest.mark.parametrize("latent_dims", [(4,), (2, 3, 4), (2, 2, 3, 3, 4)])
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 56, 56)])
def test_shapes(kind, latent_dims, image_shape):
    config = Config(name="tiny", system=kind, latent_dims=latent_dims, channels=4)
    system, x = config.build(image_shape), torch.zeros(3, *image_shape)
    e = system.infer(x, rng=generator(0))
    assert e.shape == (3, sum(latent_dims)) and not e.requires_grad
    assert system.reconstruct(x).shape == system.sample(3).shape == x.shape
    assert system.elbo(x).shape == (3,)
    assert torch.equal(e, system.infer(x, rng=generator(0))) and not torch.equal(e, system.infer(x, rng=generator(1)))


def test_every_weight_of_the_encoder_is_used(new_system, kind, images):
    system = new_system(kind)
    draw = system.draw(system.as_input(images))
    (draw.kl.sum() + draw.decode().square().sum()).backward()
    if kind == "iaf":  # the flow starts without context: its last layers are zero
        assert all(p.grad.abs().sum() > 0 for made in system.flow.steps for p in made.shift.parameters())
    else:
        assert all(p.grad.abs().sum() > 0 for p in system.parameters())


def test_each_layer_has_its_own_statistics(new_system):
    """The encoder's columns are in the order of e: with the top head silenced, the top layer's means are zero."""
    encoder = new_system(latent_dims=(3, 5)).encoder
    with torch.no_grad():
        encoder.heads[1][0][-1].weight.zero_()  # heads go upwards: [1] is the top layer, [0] its mean
    mean, std = encoder(torch.randn(2, 1, 16, 16).to(next(encoder.parameters())))
    assert (mean[:, :3] == 0).all() and (mean[:, 3:] != 0).all() and (std > 0).all()


def test_inpainting_never_looks_at_hidden_pixels(new_system, kind, images):
    system = new_system(kind)
    x = system.as_input(images)
    mask = torch.ones_like(x[:1])
    mask[..., 8:] = 0
    changed = torch.where(mask > 0, x, torch.full_like(x, math.nan))
    first, second = (system.reconstruct(y, mask, generator(0)) for y in (x, changed))
    assert torch.equal(first, second)
    assert not torch.equal(first, system.reconstruct(x, rng=generator(0)))


def test_imputation_finds_the_mean_of_the_posterior_given_what_is_observed(linear_posterior):
    single = linear_posterior(n=1)
    system, _ = linear_vae(single)
    mask = torch.ones_like(single.x)
    mask[:, 3] = 0
    exact = srlib.ClosedForm(srlib.Posterior(system.generator, single.x, single.sigma, mask))
    e = system.infer(single.x.expand(20_000, -1, -1, -1), mask, generator(0))
    error = e.std(0) / len(e) ** 0.5
    mean = exact.posterior_moments()[0][0]
    assert ((e.mean(0) - mean).abs() < 4.5 * error).all()
    unmasked = srlib.ClosedForm(single).posterior_moments()[0][0]
    assert ((e.mean(0) - unmasked).abs() > 9 * error).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sigma=0.3, sigma_start=0.1), "sigma_start"),
        (dict(sigma=-1.0), "sigma"),
        (dict(anneal_fraction=1.5), "anneal_fraction=1.5"),
        (dict(warmup=-0.1), r"warmup=-0.1 must lie in \[0, 1\]"),
        (dict(warmup="half"), "warmup='half'"),
        (dict(warmup=math.nan), "warmup=nan"),
    ],
)
def test_bad_options_are_refused(new_system, kind, options, message):
    with pytest.raises(ValueError, match=message):
        new_system(kind, **options)


def test_bad_entries_of_a_configuration_are_refused(new_system, kind, images):
    config = dict(name="tiny", system=kind, latent_dims=[2, 3], channels=4)
    with pytest.raises(ValueError, match=f"{kind} has no 'warm_up'; there are: warmup"):
        Config.from_dict(config | {"options": {"warm_up": 0.5}})
    with pytest.raises(ValueError, match="warmup=2"):
        Config.from_dict(config | {"options": {"warmup": 2}})
    with pytest.raises(ValueError, match="step_size_search='grid': "):
        Config.from_dict(config | {"step_size_search": "grid"})
    system = new_system(kind)
    with pytest.raises(ValueError, match="n_samples=0"):
        system.elbo(system.as_input(images), 0)
    with pytest.raises(ValueError, match="x has shape"):
        system.elbo(torch.zeros(2, 1, 8, 8))
