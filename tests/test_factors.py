"""What layers tell of factors, against laws whose shares and effects are known."""

import math

import pytest
import torch

import srlib
from srlib.evaluation import factors as module
from srlib.evaluation.factors import (
    Factor,
    Probe,
    image_reader,
    inferred_layers,
    known_factors,
    layer_effects,
    layer_shares,
    mean_colour,
    read_accuracy,
    shuffled,
    told,
)

N = 400


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture
def factors():
    turn, size = torch.rand(N, generator=rng(1)), torch.rand(N, generator=rng(2))
    return known_factors({"hue": turn, "size": size, "digit": torch.randint(4, (N,), generator=rng(3))})


# Factors


def test_an_angle_is_a_circle_and_whole_numbers_are_classes():
    found = known_factors({"hue": torch.tensor([0.0, 1.0, 0.25]), "digit": torch.tensor([7, 3, 7])})
    assert torch.allclose(found["hue"].values, torch.tensor([[1, 0], [1, 0], [0, 1]]).double(), atol=1e-12)
    assert not found["hue"].is_class and found["digit"].is_class
    assert found["digit"].values.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert known_factors({"hue": torch.tensor([0.0, 1.0])}, angles=())["hue"].values.tolist() == [[0], [1]]


def test_the_factors_of_colour_digits_are_of_these_kinds():
    found = known_factors(srlib.load("colour_digits").test.factors)
    shapes = {name: (factor.values.shape[1], factor.is_class) for name, factor in found.items()}
    numbers = dict.fromkeys(("size", "slant", "shift_x", "shift_y"), (1, False))
    assert shapes == {"hue": (2, False), **numbers, "digit": (10, True)}


# Told


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_latents_that_are_the_factors_tell_all_of_them(factors, kind):
    latents = torch.cat([factor.values for factor in factors.values()], 1) @ normal(7, 9)
    assert min(told(latents, factors, kind).values()) > 0.99


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_noise_and_the_factors_of_other_images_tell_nothing(factors, kind):
    latents = torch.cat([factor.values for factor in factors.values()], 1)
    for found in (told(normal(N, 6), factors, kind), told(latents, shuffled(factors, rng(5)), kind)):
        assert max(map(abs, found.values())) < 0.12  # four standard errors of the accuracy, chance being a quarter


def test_the_share_of_a_linear_gaussian_factor_is_its_squared_correlation():
    """y = a'z + noise of standard deviation 1, z ~ N(0, I): told by z is |a|^2 / (|a|^2 + 1), by one z_i less."""
    z, a, n = normal(2000, 3), torch.tensor([1.0, 0.5, 0.0]).double(), 2000
    known = {"y": Factor((z @ a + normal(n, seed=1))[:, None])}
    assert told(z, known, "linear")["y"] == pytest.approx(1.25 / 2.25, abs=0.04)
    assert told(z[:N], {"y": Factor(known["y"].values[:N])})["y"] == pytest.approx(1.25 / 2.25, abs=0.1)
    found = layer_shares([z[:, :1], z[:, 1:2], z[:, 2:]], known, "linear")
    assert found.of_layer[:, 0].tolist() == pytest.approx([1 / 2.25, 0.25 / 2.25, 0], abs=0.04)
    assert found.of_all.item() == pytest.approx(1.25 / 2.25, abs=0.04)
    assert found.lost[:, 0].tolist() == pytest.approx([1 / 2.25, 0.25 / 2.25, 0], abs=0.02)


def test_no_image_is_guessed_by_a_probe_that_has_seen_it(factors, monkeypatch):
    guessed = []

    class Watched(Probe):
        def __init__(self, features, known, kind):
            super().__init__(features, known, kind)
            self.seen = set(features[:, 0].tolist())
            assert len(features) == len(known["size"].values)

        def __call__(self, features):
            assert not self.seen & set(features[:, 0].tolist())
            guessed.extend(features[:, 0].tolist())
            return super().__call__(features)

    monkeypatch.setattr(module, "Probe", Watched)
    told(torch.arange(N)[:, None].double(), factors, "linear")
    assert sorted(guessed) == list(range(N))


def test_what_two_layers_both_hold_is_lost_with_neither():
    z = normal(N, 2)
    found = layer_shares([z, z.flip(1)], {"y": Factor(z[:, :1])})
    assert found.of_layer.min() > 0.99 and found.lost.abs().max() < 0.01
    alone = layer_shares([z], {"y": Factor(z[:, :1])})
    assert torch.equal(alone.of_layer[0], alone.of_all) and torch.equal(alone.lost[0], alone.of_all)


def test_only_a_nonlinear_probe_sees_what_is_not_linear():
    """The squared radius, and on which of four quadrants' diagonals z lies (exclusive or)."""
    z = normal(N, 2)
    known = {
        "radius": Factor(z.square().sum(1, keepdim=True)),
        **known_factors({"diagonal": (z.prod(1) > 0).long()}),
    }
    linear, nonlinear = told(z, known, "linear"), told(z, known)
    assert max(linear.values()) < 0.2 and min(nonlinear.values()) > 0.75


def test_a_turn_across_zero_is_no_jump():
    """The latents have the angle as cosine and sine, and half of the images are close to 0 = 1."""
    turn = torch.cat([torch.rand(N // 2, generator=rng()), 0.04 * torch.rand(N // 2, generator=rng(1)) - 0.02])
    latents = torch.stack([(2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()], 1)
    assert told(latents, known_factors({"hue": turn.remainder(1)}), "linear")["hue"] > 0.999
    as_number = known_factors({"hue": turn.remainder(1)}, angles=())
    assert told(latents, as_number, "linear")["hue"] < 0.95


def test_the_chance_of_an_uneven_class_counts_for_nothing():
    """Nine in ten are of one class, which is what a probe of noise guesses."""
    known = known_factors({"rare": (torch.arange(N) % 10 == 0).long()})
    assert told(normal(N, 3), known)["rare"] == pytest.approx(0, abs=0.05)


def test_scales_shifts_and_constant_latents_change_nothing(factors):
    z = torch.cat([factor.values for factor in factors.values()], 1) + normal(N, 7)
    plain = told(z, factors, rng=rng())
    changed = told(1e3 * z + 40, factors, rng=rng())
    assert changed == pytest.approx(plain, abs=1e-6)
    assert told(torch.ones(N, 2), factors)["size"] == pytest.approx(0, abs=0.05)


def test_residuals_without_each_image_are_those_of_fits_without_it():
    """The lambda that is chosen is the best of n fits that each leave one image out."""
    z = normal(12, 2)
    y = (z[:, :1] + 0.7 * normal(12, 1, seed=1)) * 3
    standardised = (z - z.mean(0)) / z.std(0)
    kernel, centred = standardised @ standardised.T / 2, y - y.mean(0)

    def without_each(ridge):
        total = 0.0
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            weights = torch.linalg.solve(kernel[rest][:, rest] + ridge * torch.eye(11).double(), centred[rest])
            total += (centred[i] - kernel[i, rest] @ weights).square().item()
        return total

    best = min(module.LAMBDAS, key=without_each)
    expected = y.mean(0) + kernel @ torch.linalg.solve(kernel + best * torch.eye(12).double(), centred)
    assert best not in (module.LAMBDAS[0], module.LAMBDAS[-1])
    assert torch.allclose(Probe(z, {"y": Factor(y)}, "linear")(z)["y"], expected)


# Layers of a system


def test_layers_are_those_that_the_system_infers(small_posterior):
    posterior = small_posterior(False)
    system = srlib.ShortRun(posterior.generator, n_steps=3, step_size=1e-3, sigma=0.3)
    e = system.infer(posterior.x, rng=rng())
    noises = inferred_layers(system, posterior.x, rng(), noises=True)
    assert [layer.shape for layer in noises] == [(4, 5), (4, 7)]
    assert torch.equal(torch.cat(noises, 1), e.cpu())
    with torch.no_grad():
        expected = posterior.generator.latents(e)
    for layer, z in zip(inferred_layers(system, posterior.x, rng()), expected):
        assert torch.equal(layer, z.cpu())


# Effects


class Stack(srlib.Generator):
    """Images of three pixels, (2 a + b, a b, b) for layers a and b of one latent each."""

    def __init__(self):
        super().__init__((1, 1), (3, 1, 1))
        self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, e):
        a, b = self.split(e)
        return torch.cat([2 * a + b, a * b, self.one * b], 1)[:, :, None, None]


def test_effects_are_the_total_indices_of_sobol():
    """Of 2 a + b: 4/5 and 1/5; of a product of independent zero-mean factors all is interaction: 1 and 1; of b: 0 and 1.

    A class that is the sign of b flips with probability 1/2 when b is drawn anew, as for two independent images.
    """

    def read(images):
        sign = (images[:, 2, 0] > 0).long()
        classes = torch.nn.functional.one_hot(sign[:, 0], 2).double()
        return {"sum": images[:, 0, 0], "product": images[:, 1, 0], "b": images[:, 2, 0], "sign": classes}

    found = layer_effects(Stack(), read, 20000, rng())
    expected = {"sum": [0.8, 0.2], "product": [1, 1], "b": [0, 1], "sign": [0, 1]}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=0.08 if name == "product" else 0.03), name


def test_what_never_varies_has_no_effect_to_tell():
    found = layer_effects(Stack(), lambda images: {"nothing": torch.ones(len(images), 1)}, 10)
    assert all(map(math.isnan, found["nothing"]))


def test_the_mean_colour_is_brightness_and_chroma():
    """Two pixels (255, 0, 0) and (0, 0, 0) have the mean (0, -1, -1), the brightness -2/3 and the chroma (2, -1, -1) / 3."""
    images = torch.zeros(1, 3, 1, 2, dtype=torch.uint8)
    images[0, 0, 0, 0] = 255
    found = {name: values.tolist() for name, values in mean_colour(images).items()}
    assert found["mean colour"] == [pytest.approx([0, -1, -1])]
    assert found["brightness"] == [pytest.approx([-2 / 3])]
    assert found["chroma"] == [pytest.approx([2 / 3, -1 / 3, -1 / 3])]
    assert mean_colour(srlib.to_unit_range(images))["chroma"].tolist() == found["chroma"]


class Coloured(srlib.Generator):
    """Images of two pixels with the mean (b + a, b, b - a), for layers a (chroma) and b (brightness) of one latent each."""

    def __init__(self):
        super().__init__((1, 1), (3, 1, 2))
        self.scale = torch.nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

    def forward(self, e):
        a, b = (self.scale * layer for layer in self.split(e))
        mean = torch.cat([b + a, b, b - a], 1)[:, :, None, None]
        return torch.cat([3 * mean, -mean], 3)  # what pixels do around their mean does not count


def test_effects_on_the_mean_colour_are_those_on_its_parts_by_their_variances():
    """|mean colour|^2 = 3 b^2 + 2 a^2: of its variance layer a has 2/5, of the chroma's all, of the brightness's none."""
    found = layer_effects(Coloured(), mean_colour, 20000, rng())
    expected = {"mean colour": [0.4, 0.6], "brightness": [0, 1], "chroma": [1, 0]}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=0.03), name


def test_a_reader_reads_images_that_it_has_not_seen():
    data = srlib.load("colour_digits")
    known = known_factors({name: values[:300] for name, values in data.train.factors.items()})
    read = image_reader("colour_digits", data.train.images[:300], known)
    test = known_factors({name: values[:200] for name, values in data.test.factors.items()})
    found = read_accuracy(read, data.test.images[:200], test)
    assert found["hue"] > 0.9 and found["digit"] > 0.8 and min(found.values()) > 0.6
    assert max(read_accuracy(read, data.test.images[:200], shuffled(test, rng())).values()) < 0.2


# Refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: known_factors({"hue": torch.ones(5)}), "factor hue .* leave constant factors out"),
        (lambda f: known_factors({"hue": torch.rand(5, 2)}), "factor hue has shape \\(5, 2\\)"),
        (lambda f: known_factors({"hue": torch.tensor([0.0, math.nan])}), "factor hue holds NaN"),
        (lambda f: told(normal(N - 1, 2), f), "shape \\(399, 2\\); give \\[400, d\\]"),
        (lambda f: told(normal(N, 0), f), "shape \\(400, 0\\)"),
        (lambda f: told(normal(N, 2).log(), f), "features holds NaN"),
        (lambda f: told(normal(N, 2), {}), "give at least one factor"),
        (lambda f: told(normal(N, 2), f | {"short": Factor(normal(9, 1))}), "factors of \\[9, 400\\] images"),
        (lambda f: told(normal(N, 2), f, "quadratic"), "kind='quadratic' must be one of linear, nonlinear"),
        (lambda f: told(normal(N, 2), f, n_folds=1), "n_folds=1"),
        (lambda f: told(normal(N, 2), f, n_folds=300), "400 images are too few for n_folds=300"),
        (lambda f: told(normal(N, 2), f, rng=3), "rng=3"),
        (lambda f: known_factors({"a": torch.rand(10), "b": torch.rand(9)}), "different lengths: a 10, b 9"),
        (lambda f: known_factors(3), "factors=3 must be a mapping"),
        (lambda f: known_factors({"hue": torch.rand(5)}, "hue"), "angles='hue' must be a sequence"),
        (lambda f: shuffled({"a": torch.rand(5)}), "must be a mapping of names to Factors"),
        (lambda f: told(normal(N, 2), {"a": Factor(torch.rand(N, 1))}), "factor a is torch.float32 \\(400, 1\\)"),
        (lambda f: layer_shares([], f), "there are no layers"),
        (lambda f: layer_shares(normal(1, N, 2), f), "there are no layers"),
        (lambda f: layer_shares([normal(N, 2)], f, seed="a"), "seed='a'"),
        (lambda f: Probe(normal(N, 2), f)(None), "features=None"),
        (lambda f: Probe(normal(N, 2), f)(torch.ones(())), "features have shape \\(\\)"),
        (lambda f: inferred_layers(None, torch.zeros(1, 1, 2, 2)), "system=None"),
        (lambda f: read_accuracy(None, torch.zeros(1, 1, 2, 2), f), "read=None"),
        (lambda f: layer_effects(None, len, 2), "generator=None"),
        (lambda f: mean_colour(torch.zeros(3, 2, 2)), "images"),
        (lambda f: layer_effects(Stack(), None, 2), "read=None"),
        (lambda f: Probe(normal(N, 2), f)(normal(5, 3)), "shape \\(5, 3\\); give \\[5, 2\\]"),
        (lambda f: layer_effects(Stack(), None, 1), "n=1"),
        (lambda f: image_reader("cats", torch.zeros(N, 3, 32, 32), f), "cats"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(factors, call, message):
    with pytest.raises(ValueError, match=message):
        call(factors)
