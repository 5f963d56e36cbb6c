"""Table 4 row by row, and the interface of every generator."""

import pytest
import torch

import srlib


def shapes_of_modules(generator, e):
    """The output shape of every named submodule in one forward pass."""
    shapes = {}

    def remember(name):
        return lambda module, inputs, output: shapes.__setitem__(name, list(output.shape))

    handles = [m.register_forward_hook(remember(name)) for name, m in generator.named_modules() if name]
    shapes["x"] = list(generator(e).shape)
    for handle in handles:
        handle.remove()
    return shapes


def test_every_row_of_table_4_has_its_dimensions():
    n, nf = 2, 64
    g = srlib.TopDownGenerator((32, 64, 128), (3, 32, 32), channels=nf, feature_size=16)
    e = g.sample_prior(n)
    shapes = shapes_of_modules(g, e)
    z3, z2, z1 = g.latents(e)
    assert list(z3.shape) == [n, 32]
    assert shapes["project.0"] == [n, nf, 16, 16]  # z3,p
    assert shapes["deterministic.0"] == [n, nf, 16, 16]  # z3,d
    assert shapes["mean.0"] == shapes["raw_std.0"] == list(z2.shape) == [n, 64]
    assert shapes["project.1"] == [n, nf, 16, 16]  # z2,p
    assert shapes["deterministic.1"] == [n, nf, 16, 16]  # z2,d
    assert shapes["mean.1"] == shapes["raw_std.1"] == list(z1.shape) == [n, 128]
    assert shapes["project.2"] == [n, nf, 16, 16]  # z1,p
    assert shapes["deterministic.2"] == [n, nf, 16, 16]  # z1,d
    assert shapes["x"] == [n, 3, 32, 32]


def test_the_rows_of_table_4_are_added_as_printed():
    """z_l = mu_l + sigma_l * eps_l, z_{l,d} = d_l(z_{l,p}) + z_{l+1,d}, x = tanh(o_0(z_{1,d})), computed by hand."""
    g = srlib.TopDownGenerator((3, 4), (1, 16, 16), channels=8, feature_size=8)
    e = g.sample_prior(5)
    e2, e1 = g.split(e)
    h2 = g.deterministic[0](g.project[0](e2))
    std = torch.nn.functional.softplus(g.raw_std[0](h2))
    z1 = g.mean[0](h2) + std * e1
    h1 = g.deterministic[1](g.project[1](z1)) + h2
    assert (std > 0).all()
    torch.testing.assert_close(g.latents(e), (e2, z1))
    torch.testing.assert_close(g(e), torch.tanh(g.output(h1)))


def test_images_depend_on_the_noises_before_any_training():
    """The gain of GELU by quadrature; e neither fades nor saturates the tanh, whatever the number of layers."""
    u = torch.linspace(-12, 12, 100001, dtype=torch.float64)
    density = torch.exp(-u.square() / 2) / (2 * torch.pi) ** 0.5
    mean_square = torch.trapezoid(torch.nn.functional.gelu(u).square() * density, u)
    assert mean_square.rsqrt().item() == pytest.approx(srlib.generators.GELU_GAIN, abs=1e-4)
    torch.manual_seed(0)
    for kind in (srlib.TopDownGenerator, srlib.LadderGenerator):
        for latent_dims in ((32,), (8, 16, 32), (8, 8, 16, 16, 32)):
            x = kind(latent_dims, (1, 28, 28), channels=16, feature_size=7)(torch.randn(100, sum(latent_dims)))
            assert 0.1 < x.std(0).mean() < 0.8


def test_the_ladder_generator_joins_its_layers_as_written():
    """h_L = d_L(p_L(z_L)), h_l = d_l(r_l([h_{l+1}, p_l(z_l)])), x = tanh(o_0(h_1)), computed by hand."""
    g = srlib.LadderGenerator((3, 4), (1, 16, 16), channels=8, feature_size=8)
    z2, z1 = g.split(e := g.sample_prior(5))
    h2 = g.deterministic[0](g.project[0](z2))
    weight, bias = g.merge[0].weight[:, :, 0, 0], g.merge[0].bias
    joined = torch.cat([h2, g.project[1](z1)], 1)
    h1 = g.deterministic[1](torch.einsum("oc,nchw->nohw", weight, joined) + bias[:, None, None])
    torch.testing.assert_close(g(e), torch.tanh(g.output(h1)))
    assert all(torch.equal(a, b) for a, b in zip(g.latents(e), (z2, z1)))
    assert g(g.sample_prior(3)).shape == (3, 1, 16, 16)
    spread = [g(torch.where(torch.arange(7) < 3, a, b) * torch.randn(50, 7)).std(0).mean() for a, b in ((1, 0), (0, 1))]
    assert min(spread) > 0.01  # every layer reaches the image
    with pytest.raises(ValueError, match="feature_size=7"):
        srlib.LadderGenerator((3, 4), (1, 16, 16), channels=8, feature_size=7)


@pytest.mark.parametrize("latent_dims", [(8,), (4, 5, 6), (4, 4, 4, 6, 8)])
@pytest.mark.parametrize(
    "image_shape, feature_size", [((1, 28, 28), 7), ((1, 28, 28), 14), ((3, 32, 32), 8), ((3, 64, 64), 16)]
)
@pytest.mark.parametrize("channels", [4, 12])
def test_shapes_over_layers_sizes_and_channels(latent_dims, image_shape, feature_size, channels, device):
    g = srlib.TopDownGenerator(latent_dims, image_shape, channels, feature_size).to(device)
    e = g.sample_prior(3)
    assert e.shape == (3, g.latent_dim) and g.latent_dim == sum(latent_dims)
    x = g(e)
    assert x.shape == (3, *image_shape) and x.abs().max() <= 1
    assert [z.shape for z in g.latents(e)] == [(3, d) for d in latent_dims]
    assert torch.equal(torch.cat(g.split(e), 1), e)


def test_every_layer_reaches_the_image_and_every_parameter_gets_a_gradient():
    g = srlib.TopDownGenerator((4, 5, 6), (1, 28, 28), channels=8, feature_size=7)
    e = g.sample_prior(4).requires_grad_()
    g(e).square().sum().backward()
    assert all(part.abs().max() > 0 for part in g.split(e.grad))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in g.parameters())


def test_the_first_images_of_five_layers_depend_on_the_latents():
    """The pitfall of torch's default initialisation: a constant image, from which nothing can be inferred."""
    torch.manual_seed(0)
    g = srlib.TopDownGenerator((64, 64, 64, 96, 128), (3, 32, 32), channels=16, feature_size=8)
    spread = g(g.sample_prior(64)).std(0).mean()
    for module in g.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert spread > 3 * g(g.sample_prior(64)).std(0).mean()


def test_one_seed_gives_the_same_prior_samples():
    g = srlib.TopDownGenerator((2, 3), (1, 16, 16), 4, 8)
    first, second = (g.sample_prior(4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, g.sample_prior(4, torch.Generator().manual_seed(8)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(latent_dims=(), image_shape=(1, 28, 28)), "latent_dims"),
        (dict(latent_dims=(4, 0), image_shape=(1, 28, 28)), "latent_dims"),
        (dict(latent_dims=(4.5,), image_shape=(1, 28, 28)), "latent_dims"),
        (dict(latent_dims=(4,), image_shape=(1, 28, 32)), "H = W"),
        (dict(latent_dims=(4,), image_shape=(1, 28, 28), feature_size=9), r"\[14, 7\]"),
        (dict(latent_dims=(4,), image_shape=(1, 28, 28), feature_size=28), "times 2, 4, 8"),
        (dict(latent_dims=(4,), image_shape=(1, 16, 16), feature_size=4), "feature_size=4 is too small"),
        (dict(latent_dims=(4,), image_shape=(1, 28, 28), feature_size=7, channels=0), "channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        srlib.TopDownGenerator(**arguments)


def test_linear_generator_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"weight \(4, 2\) and bias \(3,\)"):
        srlib.LinearGenerator(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="D=4"):
        srlib.LinearGenerator(torch.zeros(4, 2), torch.zeros(4), (1, 3, 3))
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        srlib.LinearGenerator(torch.zeros(4, 2), torch.zeros(4))(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="n=0"):
        srlib.LinearGenerator(torch.zeros(4, 2), torch.zeros(4)).sample_prior(0)
