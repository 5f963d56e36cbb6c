"""The ladder VAE: its merge against the product of two Gaussians, its one-layer case against the VAE, its q by hand.

That its bound, density, training and interface are right is asked of all variational auto-encoders in test_vae.py.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import srlib
from srlib.baselines._encoder import BottomUpEncoder
from srlib.baselines.ladder_vae import LadderVAE, merged
from srlib.baselines.vae import VAE


@pytest.fixture
def new_ladder(device):
    def make(latent_dims):
        torch.manual_seed(0)
        g = srlib.TopDownGenerator(latent_dims, (1, 16, 16), channels=6, feature_size=8)
        return LadderVAE(g, BottomUpEncoder(g), sigma=0.3).double().to(device)

    return make


def images(device):
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device) * 2 - 1


def test_the_merge_is_the_product_of_two_gaussians():
    """In z: on a fine grid, where the product is normalised by summing; in e = (z - mu) / sigma as its definition says."""
    z = torch.linspace(-15, 15, 20_001, dtype=torch.float64)
    for mean, std, prior_mean, prior_std in [(0.7, 0.4, -1.0, 1.3), (-2.0, 2.0, 0.5, 0.2), (0.3, 0.05, 0.4, 0.05)]:
        density = (Normal(mean, std).log_prob(z) + Normal(prior_mean, prior_std).log_prob(z)).exp()
        density /= density.sum()
        e = (z - prior_mean) / prior_std
        expected_mean = (density * e).sum()
        expected_std = (density * (e - expected_mean) ** 2).sum().sqrt()
        arguments = (torch.tensor(v, dtype=torch.float64) for v in (mean, std, prior_mean, prior_std))
        found_mean, found_std = merged(*arguments)
        torch.testing.assert_close(found_mean, expected_mean)
        torch.testing.assert_close(found_std, expected_std)


def test_an_image_that_says_nothing_leaves_the_prior():
    mean, prior_mean, prior_std = torch.randn(3), torch.randn(3), torch.rand(3)
    e_mean, e_std = merged(mean, torch.full((3,), 1e8), prior_mean, prior_std)
    assert e_mean.abs().max() < 1e-6 and (e_std - 1).abs().max() < 1e-6


def test_with_one_layer_it_is_the_vae(new_ladder, device):
    ladder, x = new_ladder((4,)), images(device)
    plain = VAE(ladder.generator, ladder.encoder, sigma=0.3)
    draws = [system.draw(x, torch.Generator().manual_seed(0)) for system in (ladder, plain)]
    for name in ("e", "log_q", "kl"):
        assert torch.equal(getattr(draws[0], name), getattr(draws[1], name))
    bounds = [system.elbo(x, 3, torch.Generator().manual_seed(0)) for system in (ladder, plain)]
    torch.testing.assert_close(*bounds, rtol=1e-12, atol=1e-12)


def test_with_three_layers_it_is_not_the_vae(new_ladder, device):
    ladder, x = new_ladder((2, 3, 4)), images(device)
    plain = VAE(ladder.generator, ladder.encoder, sigma=0.3)
    first, second = (system.draw(x, torch.Generator().manual_seed(0)).e for system in (ladder, plain))
    assert (first[:, 2:] - second[:, 2:]).abs().min() > 1e-6


@pytest.mark.parametrize("latent_dims", [(3, 4), (2, 2, 3, 3, 4)])
def test_density_and_divergence_are_those_of_the_z(new_ladder, latent_dims, device):
    """From e alone: the z of the generator, the priors there, their products with the encoder's Gaussians, all in z."""
    system, x = new_ladder(latent_dims), images(device)
    g = system.generator
    with torch.no_grad():
        draw = system.draw(x, torch.Generator().manual_seed(0))
        latents = g.latents(draw.e)
        means, stds = (g.split(statistic) for statistic in system.encoder(x))
        log_q_z, log_scale, kl, features = 0, 0, 0, 0
        for i, z in enumerate(latents):
            q, prior = Normal(means[i], stds[i]), Normal(torch.zeros_like(z), 1.0)
            if i:
                prior = Normal(g.mean[i - 1](features), F.softplus(g.raw_std[i - 1](features)))
                precision = q.scale**-2 + prior.scale**-2
                mean = (q.loc * q.scale**-2 + prior.loc * prior.scale**-2) / precision
                q = Normal(mean, precision**-0.5)
            log_q_z = log_q_z + q.log_prob(z).sum(1)
            log_scale = log_scale + prior.scale.log().expand_as(z).sum(1)
            kl = kl + kl_divergence(q, prior).sum(1)
            features = g.deterministic[i](g.project[i](z)) + features
    torch.testing.assert_close(draw.log_q, log_q_z + log_scale)
    torch.testing.assert_close(draw.kl, kl)
    torch.testing.assert_close(draw.decode(), system.decode(draw.e))


def test_a_certain_encoder_decides_every_z(new_ladder, device):
    """t -> 0: each z_l, also far below, is the encoder's mean, however wrong the prior is about it."""
    system, x = new_ladder((2, 3, 4)), images(device)
    with torch.no_grad():
        for _, raw_std in system.encoder.heads:
            raw_std[-1].weight.zero_()
            raw_std[-1].bias.fill_(math.log(math.expm1(1e-6)))
        latents = system.generator.latents(system.infer(x, rng=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(torch.cat(latents, 1), system.encoder(x)[0], rtol=1e-4, atol=1e-4)
