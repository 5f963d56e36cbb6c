"""Glow (Kingma and Dhariwal 2018): a normalizing flow, an exact bijection between images and noises.

    e = f(x),    log p(x) = log N(f(x); 0, I) + sum_i log|det dh_i / dh_{i-1}|                     Eqs. (6)-(7)
    actnorm      y = s * (h + b), per channel                        log|det| = H W sum log|s|     Table 1
    1x1 conv     y = W h, at every pixel                             log|det| = H W log|det W|     Eq. (9)
    coupling     y_1 = h_1, y_2 = s(h_1) * h_2 + t(h_1)              log|det| = sum log s(h_1)     Table 1
                 additive: s = 1;  affine: s = sigmoid(r(h_1) + 2)
    split        z_l = mu_l(h) + sigma_l(h) * e_l, h goes on up      log|det| = -sum log sigma_l   Fig. 2(b)
    bits per dimension = E_u[-log2 p(x + u)] / D + log2(255 / 2),    u ~ U[-1/255, 1/255]^D        Eq. (2)

(numbers of equations, tables and figures: of that paper). A level is a squeeze (2x2 pixels become 4 channels), `depth` steps
of actnorm, convolution and coupling, and a split. Seen from above a flow is a top-down model in the sense of Eq. (3) of
the short run paper: a level's latents are Gaussian given those above it, and e are their standard normal noises.

8-bit images u / 127.5 - 1 lie 2/255 apart. Uniform noise over these bins makes them continuous, and by Jensen's inequality
the bits above are no fewer than those of the probabilities of the bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import distributed
from ..generators import Generator, check_whole, given_or_fresh, uniform_like
from ..posterior import check_finite, check_images
from ..system import Source, System, of_numbers
from ..training import History, TrainingLoop, TrainingPlan
from ._options import checked_options

if TYPE_CHECKING:
    from ..experiment import Config

BIN = 2 / 255  # distance of neighbouring 8-bit values on [-1, 1]
CONSTANT = 1e-6  # a channel with a smaller standard deviation is taken for constant
COUPLINGS = ("additive", "affine")

# Section 7.3 of the short run paper: n_levels, width, depth as they stand, learntop = False, flow_coupling = 0.
DEFAULTS = {"n_levels": 3, "depth": 16, "width": 512, "coupling": "additive", "learntop": False}


def builder(config: Config) -> Callable[[tuple[int, int, int]], Glow]:
    """Image shape -> the untrained system. Raises ValueError for options that Glow does not have or cannot use.

    Options, by default those of the paper's run: n_levels, depth, width (of the couplings' networks), coupling ("additive" or
    "affine"), learntop (True: mean and scale of the top latents are learned). The rest of that run is no option: 8 bits,
    Adamax, no augmentation (dal = 0); its batch size of 64 is the configuration's, and learning rates it names none.
    A flow has as many latents as pixels and needs no Langevin steps: latent_dims, channels, feature_size, n_steps,
    step_size, sigma and what belongs to them have no meaning here and are ignored, since matrices of runs give them to all.
    """
    options = checked_options(config, DEFAULTS)

    def build(image_shape: tuple[int, int, int]) -> Glow:
        return Glow(FlowGenerator(image_shape, **options))

    return build


class ActNorm(nn.Module):
    """y = exp(log_scale) * (h + bias), per channel of h [n, c, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))

    @torch.no_grad()
    def initialise(self, h: Tensor) -> None:
        """From now on `h` becomes mean 0 and variance 1 in each channel; constant channels are only shifted."""
        std = h.std((0, 2, 3), correction=0).view(-1, 1, 1)
        self.bias.copy_(-h.mean((0, 2, 3)).view(-1, 1, 1))
        self.log_scale.copy_(-torch.where(std > CONSTANT, std, 1).log())

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return (h + self.bias) * self.log_scale.exp(), (self.log_scale.sum() * h.shape[2:].numel()).expand(len(h))

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale).exp() - self.bias


class InvertibleConv(nn.Module):
    """y = W h at every pixel of h [n, c, H, W], W [c, c] at first a random rotation.

    W itself is learned, not the factors of its LU decomposition: with c in the tens, slogdet costs nothing beside the
    couplings' networks, and an LU form would fix the permutation and the signs of W for ever.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(channels, channels)))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.linalg.slogdet(self.weight).logabsdet * h.shape[2:].numel()
        return F.conv2d(h, self.weight[:, :, None, None]), log_det.expand(len(h))

    def inverse(self, y: Tensor) -> Tensor:
        return F.conv2d(y, torch.linalg.inv(self.weight)[:, :, None, None])


class Coupling(nn.Module):
    """(h_1, h_2) -> (h_1, s(h_1) * h_2 + t(h_1)), the halves of the channels of h [n, c, H, W].

    s and t come from three convolutions (3x3, 1x1, 3x3). As in the authors' program the hidden ones have actnorm in the
    place of a bias, and s is a sigmoid; the last one starts at zero. Its indicator of the border and its threefold learning
    rate of the scales are left out.
    """

    def __init__(self, channels: int, width: int, affine: bool) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.norm1 = nn.Conv2d(half, width, 3, padding=1, bias=False), ActNorm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 1, bias=False), ActNorm(width)
        self.last = _zero_conv(width, channels if affine else half)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = h.chunk(2, 1)
        shift, log_scale = self._shift_and_log_scale(first)
        return torch.cat([first, second * log_scale.exp() + shift], 1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        first, second = y.chunk(2, 1)
        shift, log_scale = self._shift_and_log_scale(first)
        return torch.cat([first, (second - shift) * (-log_scale).exp()], 1)

    def _shift_and_log_scale(self, first: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.norm1(self.conv1(first))
        hidden, _ = self.norm2(self.conv2(hidden.relu()))
        out = self.last(hidden.relu())
        if out.shape[1] == first.shape[1]:
            return out, torch.zeros_like(out)
        shift, raw_scale = out.chunk(2, 1)
        return shift, F.logsigmoid(raw_scale + 2)


class SplitPrior(nn.Module):
    """z <-> e = (z - mu(h)) / sigma(h), latents of a level to their noises, given what goes on up; both [n, c, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _zero_conv(channels, 2 * channels)

    def forward(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.conv(h).chunk(2, 1)
        return (z - mean) * (-log_std).exp(), -log_std.flatten(1).sum(1)

    def inverse(self, e: Tensor, h: Tensor) -> Tensor:
        mean, log_std = self.conv(h).chunk(2, 1)
        return mean + log_std.exp() * e


class FlowGenerator(Generator):
    """g = f^-1: noises e [n, C*H*W] -> images [n, C, H, W]; `inverse` is f. Levels are latent layers, the top one first.

    Parameters
    ----------
    image_shape : (C, H, W); H and W are halved once per level.
    n_levels, depth : levels, and steps of flow in each.
    width : channels of the hidden layers in the couplings.
    coupling : "additive" or "affine".
    learntop : True: mean and scale of each channel of the top latents are learned, which is one more actnorm. The split
        levels' priors are learned in any case.

    Raises ValueError for sides that cannot be halved `n_levels` times: 28 allows 2, 32 and 64 allow 3.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_levels: int = 3,
        depth: int = 16,
        width: int = 512,
        coupling: str = "additive",
        learntop: bool = False,
    ) -> None:
        for name, value in (("n_levels", n_levels), ("depth", depth), ("width", width)):
            check_whole(name, value)
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling={coupling!r} must be one of {COUPLINGS}")
        if not isinstance(learntop, bool):
            raise ValueError(f"learntop={learntop!r} must be true or false")
        if len(image_shape) != 3:
            raise ValueError(f"image_shape={tuple(image_shape)} must be (C, H, W)")
        channels, *sides = image_shape
        _check_halvings(sides, n_levels)
        shapes = []
        for level in range(1, n_levels + 1):  # a squeeze makes 4 channels of 1, a split keeps half of them
            kept = channels * 2**level * (2 if level == n_levels else 1)
            shapes.append((kept, *(side // 2**level for side in sides)))
        super().__init__([math.prod(shape) for shape in reversed(shapes)], image_shape)
        self.shapes = shapes  # of the latents, in the order in which f splits them off: the top last
        self.levels, self.splits = nn.ModuleList(), nn.ModuleList(SplitPrior(shape[0]) for shape in shapes[:-1])
        for level in range(1, n_levels + 1):
            c = channels * 2 ** (level + 1)
            steps = [(ActNorm(c), InvertibleConv(c), Coupling(c, width, coupling == "affine")) for _ in range(depth)]
            self.levels.append(nn.ModuleList(layer for step in steps for layer in step))
        if learntop:
            self.levels[-1].append(ActNorm(c))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f: images [n, C, H, W] -> noises e [n, d], top first, and log|det df/dx| [n]."""
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape)}, but the flow is one of [n, *{self.image_shape}]")
        h, log_det, noises = x, x.new_zeros(len(x)), []
        for i, level in enumerate(self.levels):
            h = F.pixel_unshuffle(h, 2)
            for layer in level:
                h, change = layer(h)
                log_det = log_det + change
            if i < len(self.splits):
                h, z = h.chunk(2, 1)
                e, change = self.splits[i](z, h)
                noises.append(e)
                log_det = log_det + change
        return torch.cat([e.flatten(1) for e in (h, *reversed(noises))], 1), log_det

    def forward(self, e: Tensor) -> Tensor:
        """The image f^-1(e) [n, C, H, W]; those of unlikely e may leave [-1, 1]."""
        _, x = self._descend(e)
        return x

    def latents(self, e: Tensor) -> tuple[Tensor, ...]:
        latents, _ = self._descend(e)
        return tuple(z.flatten(1) for z in latents)

    def initialise(self, x: Tensor) -> None:
        """Data-dependent initialisation: every actnorm is fitted to what comes to it of the images x [n, C, H, W]."""
        norms = [module for module in self.modules() if isinstance(module, ActNorm)]
        hooks = [norm.register_forward_pre_hook(lambda norm, given: norm.initialise(*given)) for norm in norms]
        with torch.no_grad():
            self.inverse(x)
        for hook in hooks:
            hook.remove()

    def _descend(self, e: Tensor) -> tuple[list[Tensor], Tensor]:
        """The latents, top first, and the image."""
        top, *noises = (part.unflatten(1, shape) for part, shape in zip(self.split(e), reversed(self.shapes)))
        h, latents = top, [top]
        for i in reversed(range(len(self.levels))):
            if i < len(self.splits):
                latents.append(self.splits[i].inverse(noises.pop(0), h))
                h = torch.cat([h, latents[-1]], 1)
            for layer in reversed(self.levels[i]):
                h = layer.inverse(h)
            h = F.pixel_shuffle(h, 2)
        return latents, h


class Glow(System):
    """A flow learned by maximum likelihood.

    Its reconstructions are exact up to rounding, because it is a bijection with as many latents as pixels: their squared
    error is no evidence of anything. What speaks for or against a flow is its bits per dimension and its samples.
    The Gaussian of the inferred latents has a diagonal covariance: a full one would have (C*H*W)^2 numbers.
    """

    generator: FlowGenerator

    def __init__(self, generator: FlowGenerator) -> None:
        with torch.device("meta"):  # the base class has a d x d matrix, which is replaced before it takes memory
            super().__init__(generator)
        self.register_buffer("aggregate_mean", torch.zeros(generator.latent_dim))
        self.register_buffer("aggregate_scale", torch.ones(generator.latent_dim))
        self.register_buffer("aggregate_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            "initialised", torch.zeros((), dtype=torch.bool)
        )  # in the state: once, however often resumed

    def fit(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator | None = None,
        directory: Path | None = None,
        progress: bool = True,
    ) -> History:
        """Maximum likelihood by Adamax on 8-bit images [n, C, H, W]; arguments as in `TrainingLoop`.

        The first batch initialises the actnorms. Returns the history: loss, the bits per dimension of each batch.
        """
        rng = given_or_fresh(rng)
        optimizer = torch.optim.Adamax
        loop = TrainingLoop(self, images, plan, rng, directory, progress=progress, optimizer_type=optimizer)
        for _, x, _ in loop:
            if not self.initialised:
                self.generator.initialise(distributed.gathered(dequantised(x, rng)))
                distributed.agree(self.generator.parameters())
                self.initialised.fill_(True)
            loop.update(self.bits_per_dimension(x, rng).mean())
        return loop.finish()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [n] in nats: the density, on [-1, 1], of images x [n, C, H, W] as they are (Eq. 7)."""
        e, log_det = self.generator.inverse(x)
        return log_det - (e.square() + math.log(2 * math.pi)).sum(1) / 2

    def bits_per_dimension(self, x: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """[n], from one draw of the dequantising noise, for 8-bit images x [n, C, H, W] scaled to [-1, 1] (Eq. 2)."""
        return -self.log_prob(dequantised(x, rng)) / (x[0].numel() * math.log(2)) - math.log2(BIN)

    @torch.no_grad()
    def likelihood(self, x: Tensor, rng: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"bits_per_dimension": self.bits_per_dimension(x, rng)}

    @torch.no_grad()
    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """e = f(x) [n, C*H*W] for images x [n, C, H, W]: exact, without chance. Raises ValueError for a mask."""
        if mask is not None:
            raise ValueError(
                "mask: a flow's f(x) needs every pixel, and what hidden pixels could be is not to be had from it in closed "
                "form; give whole images"
            )
        check_images(self.generator, x)
        check_finite(x)
        return of_numbers("latents", self.generator.inverse(x)[0])

    def decode(self, e: Tensor) -> Tensor:
        """f^-1(e) [n, C, H, W], clipped to [-1, 1] (which changes no image that was in it)."""
        return super().decode(e).clamp(-1, 1)

    def sample(self, n: int, source: Source = "prior", rng: torch.Generator | None = None) -> Tensor:
        """n new images [n, C, H, W] in [-1, 1]; `source` as in `System.sample`."""
        if source != "aggregate" or not self.aggregate_count:
            return super().sample(n, source, rng)
        return self.decode(self.aggregate_mean + self.aggregate_scale * self.generator.sample_prior(n, rng))

    def fit_aggregate(self, images: Tensor, batch_size: int = 100, rng: torch.Generator | None = None) -> Tensor:
        """Fit mean and standard deviation of each latent inferred from `images`; returns these latents [n, C*H*W]."""
        check_whole("batch_size", batch_size)
        if len(images) < 2:
            raise ValueError(f"{len(images)} images cannot fix a variance; give at least 2")
        e = distributed.mapped(lambda batch: self.infer(self.as_input(batch)), images.split(batch_size))
        self.aggregate_mean.copy_(e.mean(0))
        self.aggregate_scale.copy_(e.std(0))
        self.aggregate_count.fill_(len(images))
        return e


def dequantised(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """8-bit images x, scaled to [-1, 1], plus noise that is uniform over the bin around each value."""
    return x + BIN * (uniform_like(x, rng) - 0.5)


def _zero_conv(channels: int, out: int) -> nn.Conv2d:
    """A 3x3 convolution that starts at zero."""
    conv = nn.Conv2d(channels, out, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def _check_halvings(sides: list[int], n_levels: int) -> None:
    common = math.gcd(*sides)
    possible = (common & -common).bit_length() - 1  # how often 2 divides both
    if n_levels > possible:
        remedy = f"use n_levels of at most {possible}" if possible else "pad the images to even sides"
        raise ValueError(
            f"n_levels={n_levels}: each halves the sides {sides[0]} and {sides[1]}, which can be done {possible} times; {remedy}"
        )
