"""What a layer of latents tells of known factors of an image, and what it does to them (section 5.4, Fig. 5).

    told     1 - sum |y - yhat(z_l)|^2 / sum |y - ybar|^2    over held-out images; y: one factor, as a vector
             (accuracy - chance) / (1 - chance)              for a class; chance: the share of the largest class
    lost     told by all layers - told by all but z_l
    effect   E |f(x) - f(x')|^2 / (2 tr Var f(x)),    x = g(e), x' = g(e with e_l drawn anew), e ~ N(0, I)

Told is 1 where the factor follows from the latents and about 0 where they say nothing of it (guesses on held-out images may be a little
worse than none). yhat is kernel ridge regression, yhat(z) = ybar + k(z)' (K + lambda I)^-1 (Y - ybar), whose residuals without each
image in turn, (y - yhat)_i / (1 - H_ii) with H = K (K + lambda I)^-1, choose lambda and the kernel among the training images alone.

Effect, with f what a reader sees in an image, is the total Sobol' index of the layer (Homma and Saltelli 1996; Jansen 1999): the
share of the variance of f under the prior that is left when all other layers are known. It is 1 for the only layer that matters, the
indices sum to 1 where layers add up, and to more where they interact. Of a class it is the probability that the class
changes over the probability that those of two independent images differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..generators import Generator, check_tensor, check_whole, given_or_fresh
from ..system import System, in_batches
from . import frechet

Kind = Literal["linear", "nonlinear"]
BATCH = 500  # images that are inferred or decoded at once
SCALES = (0.7, 1.5)  # of the Gaussian kernel exp(-|z - z'|^2 / (2 d scale^2)), z standardised
LAMBDAS = tuple(10.0**k for k in (-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4))


@dataclass(frozen=True)
class Factor:
    """A known factor of n images. values: float64 [n, t], numbers with t = 1, angles as (cos, sin), classes as one-hot vectors."""

    values: Tensor
    is_class: bool = False


class LayerShares(NamedTuple):
    """What layers tell of factors, layers from the top one down, factors in their order."""

    of_layer: Tensor  # told by each layer alone [L, F]
    of_all: Tensor  # told by all layers together [F]
    lost: Tensor  # what all layers tell less without this one [L, F]


Reader = Callable[[Tensor], dict[str, Tensor]]


def known_factors(factors: Mapping[str, Tensor], angles: Sequence[str] = ("hue",)) -> dict[str, Factor]:
    """Factors by name, from values [n] such as `Split.factors` holds.

    Whole numbers are classes; of the others, those in `angles` are fractions of a full turn, so that 0 and 1 are the same, and the rest
    are numbers. Raises ValueError for a factor that does not vary, which nothing can tell, and for factors of different lengths.
    """
    if not isinstance(factors, Mapping):
        raise ValueError(f"factors={factors!r} must be a mapping of names to values [n]")
    if isinstance(angles, str) or not isinstance(angles, Sequence):
        raise ValueError(f"angles={angles!r} must be a sequence of names, such as ('hue',)")
    found = {}
    for name, values in factors.items():
        check_tensor(f"factor {name}", values)
        if values.ndim != 1 or len(values) == 0 or (values == values[0]).all():
            raise ValueError(
                f"factor {name} has shape {tuple(values.shape)}; give values [n] of at least two kinds, leave constant factors out"
            )
        if not values.is_floating_point():
            found[name] = Factor((values[:, None] == values.unique()).double(), is_class=True)
        elif name in angles:
            turn = 2 * math.pi * values.double()
            found[name] = Factor(torch.stack([turn.cos(), turn.sin()], 1))
        else:
            found[name] = Factor(values.double()[:, None])
    if len({len(factor.values) for factor in found.values()}) > 1:
        lengths = ", ".join(f"{name} {len(factor.values)}" for name, factor in found.items())
        raise ValueError(f"factors have different lengths: {lengths}; give all for the same images")
    return found


def shuffled(factors: Mapping[str, Factor], rng: torch.Generator | None = None) -> dict[str, Factor]:
    """The same factors given to other images: a control, of which latents tell nothing. Raises ValueError for what is no factors."""
    n = _n_images(factors)
    order = torch.randperm(n, generator=given_or_fresh(rng))
    return {name: Factor(factor.values[order], factor.is_class) for name, factor in factors.items()}


def inferred_layers(
    system: System, images: Tensor, rng: torch.Generator | None = None, noises: bool = False
) -> tuple[Tensor, ...]:
    """The latents (z_L, ..., z_1) that `system.infer` finds for images [n, C, H, W], uint8 or in [-1, 1]: a tuple of [n, d_l].

    noises : the noises (e_L, ..., e_1) of the layers instead, without what z_l has from the layers above it.

    Raises ValueError for what is no system, or no images for it.
    """
    if not hasattr(system, "infer"):
        raise ValueError(f"system={system!r} must be a System, such as srlib.ShortRun")
    rng = given_or_fresh(rng)
    layers = []
    for batch in in_batches(images, BATCH):
        e = system.infer(system.as_input(batch), rng=rng)
        with torch.no_grad():
            layers.append(system.generator.split(e) if noises else system.generator.latents(e))
    return tuple(torch.cat(parts).cpu() for parts in zip(*layers))


def told(
    features: Tensor,
    factors: Mapping[str, Factor],
    kind: Kind = "nonlinear",
    n_folds: int = 4,
    rng: torch.Generator | None = None,
) -> dict[str, float]:
    """What features [n, d] tell of each factor: shares as above, 1 = all, about 0 = nothing.

    Each fold of the images, split at random, is guessed by a `Probe` that was fitted to the others.

    kind : "linear" for a linear probe, "nonlinear" for the best of that and of Gaussian kernels.

    Raises ValueError for arguments that do not fit each other, and for too few images.
    """
    check_whole("n_folds", n_folds, 2)
    n = _n_images(factors)
    _check_features(features, n)
    if n < 2 * n_folds:
        raise ValueError(f"{n} images are too few for n_folds={n_folds}; give at least {2 * n_folds}")
    guesses = {name: torch.empty_like(factor.values) for name, factor in factors.items()}
    means = {name: torch.empty_like(factor.values) for name, factor in factors.items()}
    for fold in torch.randperm(n, generator=given_or_fresh(rng)).tensor_split(n_folds):
        others = torch.ones(n, dtype=torch.bool).index_fill(0, fold, False)
        known = {name: Factor(factor.values[others], factor.is_class) for name, factor in factors.items()}
        probe = Probe(features[others], known, kind)
        for name, values in probe(features[fold]).items():
            guesses[name][fold], means[name][fold] = values, known[name].values.mean(0)
    return {name: _share(factor, guesses[name], means[name]) for name, factor in factors.items()}


def layer_shares(
    layers: Sequence[Tensor], factors: Mapping[str, Factor], kind: Kind = "nonlinear", seed: int = 0
) -> LayerShares:
    """What layers (z_L, ..., z_1), each [n, d_l], tell of the factors: each alone, all together, and what is lost without each.

    All are judged on the same folds of the images, which `seed` decides. Raises ValueError as `told` does, and for a seed that is no
    whole number.
    """
    if isinstance(layers, Tensor) or not isinstance(layers, Sequence) or not layers:
        raise ValueError("there are no layers; give at least one tensor [n, d_l], in a list")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed!r} must be a whole number that torch.Generator takes, such as 0")
    for i, layer in enumerate(layers):
        _check_features(layer, _n_images(factors), name=f"layers[{i}]")

    def shares(chosen: Sequence[Tensor]) -> Tensor:
        if not chosen:
            return torch.zeros(len(factors), dtype=torch.float64)
        found = told(torch.cat([*chosen], 1), factors, kind, rng=torch.Generator().manual_seed(seed))
        return torch.tensor([*found.values()], dtype=torch.float64)

    of_layer = torch.stack([shares([layer]) for layer in layers])
    of_all = shares(layers) if len(layers) > 1 else of_layer[0]
    without = [shares([*layers[:i], *layers[i + 1 :]]) for i in range(len(layers))]
    return LayerShares(of_layer, of_all, of_all - torch.stack(without))


class Probe:
    """Kernel ridge regression of several factors on the same features; calling it guesses those of other images.

    Parameters
    ----------
    features : [n, d] of the images that it learns from, which are standardised.
    factors : of the same images; each has a lambda and, with kind "nonlinear", a kernel of its own.
    kind : as in `told`.
    """

    def __init__(self, features: Tensor, factors: Mapping[str, Factor], kind: Kind = "nonlinear") -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(Kind))}")
        _check_features(features, _n_images(factors))
        features = features.detach().double()
        self._mean, std = features.mean(0), features.std(0)
        self._std = torch.where(std > 0, std, 1.0)  # a latent that is constant stays at 0
        self._features = (features - self._mean) / self._std
        self._factors = factors
        best = dict.fromkeys(factors, math.inf)
        self._scale: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}  # (K + lambda I)^-1 (Y - ybar), as far as the kernel sees it [n, t]
        y = torch.cat([factor.values - factor.values.mean(0) for factor in factors.values()], 1)
        widths = [factor.values.shape[1] for factor in factors.values()]
        for scale in (math.inf, *(SCALES if kind == "nonlinear" else ())):
            eigenvalues, vectors = self._spectrum(scale)
            squares, coefficients = vectors.square(), vectors.T @ y
            for ridge in LAMBDAS:
                shrunk = eigenvalues / (eigenvalues + ridge)
                without_it = (y - vectors @ (shrunk[:, None] * coefficients)) / (1 - squares @ shrunk)[:, None]
                errors = [part.sum().item() for part in without_it.square().split(widths, 1)]
                if any(error < best[name] for name, error in zip(factors, errors)):
                    weights = vectors @ (coefficients / (eigenvalues + ridge)[:, None])
                    for name, error, part in zip(factors, errors, weights.split(widths, 1)):
                        if error < best[name]:
                            best[name], self._scale[name], self._weights[name] = error, scale, part

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """Guesses by name for features [m, d]: [m, t], one-hot vectors for classes."""
        _check_features(features, None, self._features.shape[1])
        z = (features.detach().double() - self._mean) / self._std
        kernels = {scale: _kernel(z, self._features, scale) for scale in set(self._scale.values())}
        found = {}
        for name, factor in self._factors.items():
            values = factor.values.mean(0) + kernels[self._scale[name]] @ self._weights[name]
            if factor.is_class:
                values = torch.nn.functional.one_hot(values.argmax(1), values.shape[1]).double()
            found[name] = values
        return found

    def _spectrum(self, scale: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues [r] and eigenvectors [n, r] of the kernel matrix, but for the eigenvalues 0 of a linear one."""
        if scale < math.inf:
            eigenvalues, vectors = torch.linalg.eigh(_kernel(self._features, self._features, scale))
            return eigenvalues.clamp_min(0), vectors
        vectors, singular, _ = torch.linalg.svd(self._features / self._features.shape[1] ** 0.5, full_matrices=False)
        return singular.square(), vectors


def image_reader(dataset: str, images: Tensor, factors: Mapping[str, Factor]) -> Reader:
    """A reader of the factors of images [m, C, H, W], learned from real images [n, C, H, W] whose factors are known.

    It is a `Probe` of the features of the network that judges samples of `dataset` (`frechet.features`), and gives what a probe
    gives. How well it reads is to be told with what it reads (`read_accuracy`).
    """
    probe = Probe(frechet.features(dataset, images), factors)
    return lambda judged: probe(frechet.features(dataset, judged))


def read_accuracy(read: Reader, images: Tensor, factors: Mapping[str, Factor]) -> dict[str, float]:
    """What the reader tells of images [n, C, H, W] that it has not seen, on the scale of `told`.

    Raises ValueError for what is no reader or no factors.
    """
    _check_reader(read)
    _n_images(factors)
    guesses = read(images)
    return {name: _share(factor, guesses[name], factor.values.mean(0)) for name, factor in factors.items()}


def mean_colour(images: Tensor) -> dict[str, Tensor]:
    """A reader that needs no known factors: the mean over the pixels of images [m, C, H, W], uint8 or in [-1, 1].

    "mean colour" [m, C] = "brightness" [m, 1], its mean over the channels, + "chroma" [m, C], the rest. The two are orthogonal, so an
    effect on the mean colour is a mean of the effects on both, weighted by their variances (the brightness counts C times).

    Raises ValueError for what is no images.
    """
    colour = frechet._quantised(images).double().mean((2, 3)) / 127.5 - 1
    brightness = colour.mean(1, keepdim=True)
    return {"mean colour": colour, "brightness": brightness, "chroma": colour - brightness}


def layer_effects(
    generator: Generator, read: Reader, n: int, rng: torch.Generator | None = None
) -> dict[str, list[float]]:
    """The effect of each layer on what `read` reads in images g(e), e ~ N(0, I): name -> a number per layer, top layer first.

    n : images that are drawn, and drawn again with one layer changed. nan for a factor that does not vary among them.

    Raises ValueError for what is no generator or no reader, and for fewer than 2 images.
    """
    check_whole("n", n, 2)
    if not isinstance(generator, Generator):
        raise ValueError(f"generator={generator!r} must be a Generator, such as srlib.TopDownGenerator")
    _check_reader(read)
    rng = given_or_fresh(rng)
    first, other = (generator.split(generator.sample_prior(n, rng)) for _ in range(2))

    def reading(layers: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return read(torch.cat([generator(e) for e in torch.cat([*layers], 1).split(BATCH)]))

    before = reading(first)
    effects: dict[str, list[float]] = {name: [] for name in before}
    for i in range(len(first)):
        after = reading([*first[:i], other[i], *first[i + 1 :]])
        for name, values in before.items():
            change = (after[name] - values).square().sum(1).mean()
            effects[name].append((change / (2 * values.var(0).sum())).item())
    return effects


def _kernel(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """k(a_i, b_j) of standardised a [n, d] and b [m, d]: a . b / d for scale = inf, else Gaussian."""
    d = a.shape[1]
    if scale == math.inf:
        return a @ b.T / d
    return torch.exp(-torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").square() / (2 * d * scale**2))


def _share(factor: Factor, guesses: Tensor, means: Tensor) -> float:
    """The share above of factor.values [n, t]; means: what would be guessed without any features, [n, t] or [t]."""
    y = factor.values
    if factor.is_class:
        right = (guesses.argmax(1) == y.argmax(1)).double().mean().item()
        chance = y.mean(0).max().item()
        return (right - chance) / (1 - chance)
    return 1 - ((y - guesses).square().sum() / (y - means).square().sum()).item()


def _check_reader(read: Reader) -> None:
    if not callable(read):
        raise ValueError(f"read={read!r} must be a function of images, such as `image_reader` makes")


def _n_images(factors: Mapping[str, Factor]) -> int:
    if not isinstance(factors, Mapping) or not all(isinstance(factor, Factor) for factor in factors.values()):
        raise ValueError(f"factors={factors!r} must be a mapping of names to Factors; `known_factors` makes them")
    for name, factor in factors.items():
        check_tensor(f"factor {name}", factor.values)
        if factor.values.ndim != 2 or factor.values.dtype != torch.float64:
            raise ValueError(
                f"factor {name} is {factor.values.dtype} {tuple(factor.values.shape)}; give float64 [n, t], as `known_factors` does"
            )
    lengths = {len(factor.values) for factor in factors.values()}
    if len(lengths) != 1:
        raise ValueError(f"factors of {sorted(lengths)} images; give at least one factor, and all for the same images")
    return lengths.pop()


def _check_features(features: Tensor, n: int | None, d: int | None = None, name: str = "features") -> None:
    check_tensor(name, features)
    n = len(features) if n is None and features.ndim else n
    if features.ndim != 2 or len(features) != n or not features.shape[1] or (d is not None and features.shape[1] != d):
        raise ValueError(
            f"{name} have shape {tuple(features.shape)}; give [{n}, {d or 'd'}], one row per image of the factors"
        )
