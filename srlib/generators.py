"""Top-down generators g_theta: noise in, image out.

    z_L = e_L,    z_l = mu_l(h_l) + sigma_l(h_l) * e_l,    h_l = d_l(p_l(z_{l+1})) + h_{l+1}       Eq. (3), Table 4
    x   = tanh(o_0(h_0)) + noise of standard deviation sigma                                       Eqs. (1)-(2)

A generator takes the standard-normal noises of all layers at once, e = (e_L, ..., e_1), top layer first ("non-centred"
latents): given e, the latents z_l and the image are deterministic, so Eqs. (9)-(20) hold with z replaced by e.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import distributed

# 1 / sqrt(E gelu(u)^2) for u ~ N(0, 1): weights that are this much larger give signals back what GELU takes.
GELU_GAIN = 1.5335


def randn_like(tensor: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Standard normal noise with the shape, dtype and device of `tensor`.

    It is drawn where `rng` lives and then moved, so that one CPU generator gives the same bits on every device, and for the
    whole of a batch that several processes share, so that its images meet the same numbers in any number of processes.
    """
    return _drawn_like(tensor, rng, torch.randn)


def uniform_like(tensor: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Uniform numbers on [0, 1) like `tensor`, drawn as `randn_like` draws."""
    return _drawn_like(tensor, rng, torch.rand)


def _drawn_like(tensor: Tensor, rng: torch.Generator | None, draw: Callable[..., Tensor]) -> Tensor:
    check_rng(rng)
    given = dict(generator=rng, device=tensor.device if rng is None else rng.device, dtype=tensor.dtype)
    return distributed.drawn(lambda shape: draw(shape, **given), tensor.shape).to(tensor.device)


def given_or_fresh(rng: torch.Generator | None) -> torch.Generator:
    """`rng`, or for None a CPU generator that is seeded from torch's global state."""
    check_rng(rng)
    return rng or torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def check_rng(rng: torch.Generator | None) -> None:
    """Raises ValueError unless `rng` is a random generator of torch, or None."""
    if rng is not None and not isinstance(rng, torch.Generator):
        raise ValueError(f"rng={rng!r} must be a torch.Generator, such as torch.Generator().manual_seed(0), or None")


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number from `least` to 2^31 - 1, beyond which no count makes sense."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
    if value >= 2**31:
        raise ValueError(f"{name} must be a whole number below 2^31")  # longer ones may be too long to print


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be a positive, finite number")


def check_tensor(name: str, value: Tensor) -> None:
    """Raises ValueError unless `value` is a tensor without NaN and infinite numbers."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}={value!r} must be a tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} is a sparse tensor, {value.layout}; give {name}.to_dense()")
    if not value.is_meta and not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite numbers")


class Generator(nn.Module):
    """What every generator shares: the sizes of its latent layers and its images.

    Parameters
    ----------
    latent_dims : sizes (d_L, ..., d_1) of the latent layers, from the top layer L down to layer 1.
    image_shape : (C, H, W) of one image.
    """

    def __init__(self, latent_dims: Sequence[int], image_shape: Sequence[int]) -> None:
        super().__init__()
        self.latent_dims = _sizes("latent_dims", latent_dims)
        self.image_shape = _sizes("image_shape", image_shape)
        if len(self.image_shape) != 3:
            raise ValueError(f"image_shape={self.image_shape} must be (C, H, W)")

    @property
    def latent_dim(self) -> int:
        """d = d_L + ... + d_1, the length of e."""
        return sum(self.latent_dims)

    def split(self, e: Tensor) -> tuple[Tensor, ...]:
        """The noises e [n, d] layer by layer, top first: a tuple of [n, d_l]. Works on anything of this dtype with d columns."""
        if not isinstance(e, Tensor):
            raise ValueError(f"e={e!r} must be a tensor [n, {self.latent_dim}]")
        if e.ndim != 2 or e.shape[-1] != self.latent_dim:
            raise ValueError(
                f"e has shape {tuple(e.shape)}, but latent_dims={self.latent_dims} needs [n, {self.latent_dim}]"
            )
        if e.dtype != (dtype := next(self.parameters()).dtype):
            raise ValueError(f"e has dtype {e.dtype}, the generator computes in {dtype}; convert it")
        return e.split(self.latent_dims, dim=-1)

    def latents(self, e: Tensor) -> tuple[Tensor, ...]:
        """The latents (z_L, ..., z_1) that the noises e [n, d] stand for: a tuple of [n, d_l]."""
        raise NotImplementedError

    def sample_prior(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """n draws of e ~ N(0, I): [n, d], with the dtype and on the device of the parameters."""
        check_whole("n", n)
        parameter = next(self.parameters())
        return randn_like(parameter.new_empty(n, self.latent_dim), rng)


class TopDownGenerator(Generator):
    """The multi-layer generator of Table 4.

    Parameters
    ----------
    latent_dims : (d_L, ..., d_1), top layer first; (32, 64, 128) in Table 4.
    image_shape : (C, H, W) with H = W; (3, 32, 32) in Table 4.
    channels : n_f, the width of every feature map; 64 in Table 4.
    feature_size : side of the feature maps; 16 in Table 4. The image side must be `feature_size` times a power of two:
        the output block o_0 has that many stride-2 transposed convolutions.

    Table 4 leaves kernel sizes and the activations around p_l, mu_l and sigma_l open; they are those of the authors'
    released script (5x5 and 3x3 in d_l, 5x5 in p_l, mu_l and sigma_l, GELU). Two things differ from that script and
    follow Table 4: sigma_l = softplus(.) is a standard deviation (there it is used as a log-variance, so that the
    standard deviation is never below 1), and there is no further deterministic block before o_0.

    Weights start as `keep_signal` says. With torch's default initialisation, or plain Xavier, e fades by about half in every layer
    with GELU, since gelu(u) is about u / 2 for small u: images hardly depend on e, nothing can be inferred, and learning
    ends in a constant image.
    """

    def __init__(
        self, latent_dims: Sequence[int], image_shape: Sequence[int], channels: int = 64, feature_size: int = 16
    ) -> None:
        super().__init__(latent_dims, image_shape)
        self.channels, self.feature_size = _checked_widths(self.image_shape, channels, feature_size)
        layers = range(len(self.latent_dims))
        self.project = nn.ModuleList(Projection(self.latent_dims[i], channels, feature_size) for i in layers)
        self.deterministic = nn.ModuleList(DeterministicBlock(channels) for _ in layers)
        self.mean = nn.ModuleList(statistic_head(channels, d, feature_size) for d in self.latent_dims[1:])
        self.raw_std = nn.ModuleList(statistic_head(channels, d, feature_size) for d in self.latent_dims[1:])
        self.output = output_block(self.image_shape, channels, feature_size)
        self.apply(keep_signal)

    def forward(self, e: Tensor) -> Tensor:
        """e [n, d] -> the mean image g(e) [n, C, H, W] in [-1, 1]."""
        _, features = self._descend(e)
        return torch.tanh(self.output(features))

    def latents(self, e: Tensor) -> tuple[Tensor, ...]:
        latents, _ = self._descend(e)
        return latents

    def _descend(self, e: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """All z_l and the last feature map, going down Table 4 row by row."""
        top, *noises = self.split(e)
        latents = [top]
        features = self.deterministic[0](self.project[0](top))
        for i, noise in enumerate(noises):
            latents.append(self.mean[i](features) + F.softplus(self.raw_std[i](features)) * noise)
            features = self.deterministic[i + 1](self.project[i + 1](latents[-1])) + features
        return tuple(latents), features


class LadderGenerator(Generator):
    """The three-layer model of section 5.4 with any number of layers, parameterised after Zhao, Song and Ermon (2017).

        h_L = d_L(p_L(z_L)),    h_l = d_l(r_l([h_{l+1}, p_l(z_l)])),    x = tanh(o_0(h_1))

    All z_l are independent N(0, I), so e = z: a layer's latents do not depend on those above. What a layer can say is
    limited by how many blocks are left below it, which can make the layers of this model differ. p_l, d_l and o_0 are
    those of Table 4; r_l is a 1x1 convolution, from 2 * channels to channels. Parameters as in `TopDownGenerator`.
    """

    def __init__(
        self, latent_dims: Sequence[int], image_shape: Sequence[int], channels: int = 64, feature_size: int = 16
    ) -> None:
        super().__init__(latent_dims, image_shape)
        self.channels, self.feature_size = _checked_widths(self.image_shape, channels, feature_size)
        self.project = nn.ModuleList(Projection(d, channels, feature_size) for d in self.latent_dims)
        self.merge = nn.ModuleList(nn.Conv2d(2 * channels, channels, 1) for _ in self.latent_dims[1:])
        self.deterministic = nn.ModuleList(DeterministicBlock(channels) for _ in self.latent_dims)
        self.output = output_block(self.image_shape, channels, feature_size)
        self.apply(keep_signal)

    def forward(self, e: Tensor) -> Tensor:
        """e [n, d] -> the mean image g(e) [n, C, H, W] in [-1, 1]."""
        top, *others = (project(z) for project, z in zip(self.project, self.split(e)))
        features = self.deterministic[0](top)
        for merge, deterministic, projected in zip(self.merge, self.deterministic[1:], others):
            features = deterministic(merge(torch.cat([features, projected], 1)))
        return torch.tanh(self.output(features))

    def latents(self, e: Tensor) -> tuple[Tensor, ...]:
        return self.split(e)


class LinearGenerator(Generator):
    """lin(e) = e W' + b, the model whose posterior, short run distribution and likelihood are exact (`ClosedForm`).

    Parameters
    ----------
    weight : W [D, d].
    bias : b [D].
    image_shape : (C, H, W) with C * H * W = D; by default (D, 1, 1).
    """

    def __init__(self, weight: Tensor, bias: Tensor, image_shape: Sequence[int] | None = None) -> None:
        check_tensor("weight", weight)
        check_tensor("bias", bias)
        if weight.ndim != 2 or not weight.numel() or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit: weight is [D, d] and bias [D]"
            )
        if not weight.is_floating_point() or weight.dtype != bias.dtype:
            raise ValueError(f"weight is {weight.dtype} and bias {bias.dtype}; give floats of one type")
        super().__init__((weight.shape[1],), image_shape or (weight.shape[0], 1, 1))
        if math.prod(self.image_shape) != weight.shape[0]:
            raise ValueError(f"image_shape={self.image_shape} does not hold D={weight.shape[0]} pixels")
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, e: Tensor) -> Tensor:
        (e,) = self.split(e)
        return F.linear(e, self.weight, self.bias).reshape(-1, *self.image_shape)

    def latents(self, e: Tensor) -> tuple[Tensor, ...]:
        return self.split(e)


class Projection(nn.Module):
    """p_l: [n, d_l] -> [n, channels, feature_size, feature_size], a linear layer and a transposed convolution."""

    seed_channels = 4

    def __init__(self, latent_dim: int, channels: int, feature_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(latent_dim, self.seed_channels * feature_size**2)
        self.conv = nn.ConvTranspose2d(self.seed_channels, channels, 5, padding=2)
        self.seed_shape = (self.seed_channels, feature_size, feature_size)

    def forward(self, z: Tensor) -> Tensor:
        seed = F.gelu(self.linear(z)).unflatten(1, self.seed_shape)
        return F.gelu(self.conv(seed))


class DeterministicBlock(nn.Module):
    """d_l: two convolutions with GELU and a skip connection; keeps [n, channels, feature_size, feature_size]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 5, padding=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.gelu(self.conv2(F.gelu(self.conv1(h))))


def statistic_head(channels: int, latent_dim: int, feature_size: int) -> nn.Sequential:
    """mu_l or the pre-activation of sigma_l: a 5x5 convolution without padding and a linear layer, to [n, d_l]."""
    conv = nn.Conv2d(channels, latent_dim, 5)
    # flattened before GELU, not after: its backward pass then meets values and gradients in one order in memory
    return nn.Sequential(conv, nn.Flatten(), nn.GELU(), nn.Linear(latent_dim * (feature_size - 4) ** 2, latent_dim))


def output_block(image_shape: tuple[int, ...], channels: int, feature_size: int) -> nn.Sequential:
    """o_0: [n, channels, feature_size, feature_size] -> [n, C, H, W], each layer doubling the sides.

    Raises ValueError for a `feature_size` that is not the image side over a power of two.
    """
    widths = [channels] * _doublings(image_shape, feature_size) + [image_shape[0]]
    up = [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*[part for conv in up[:-1] for part in (conv, nn.GELU())], up[-1])


def keep_signal(module: nn.Module) -> None:
    """First values of a layer with weights, for `nn.Module.apply`: Xavier-normal times GELU_GAIN, and zero biases.

    A transposed convolution of stride r gets r times more: each of its outputs sees one in r^2 of the kernel's entries.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        stride = module.stride[0] if isinstance(module, nn.ConvTranspose2d) else 1
        if not module.weight.is_meta:  # nothing to draw there, for which torch would load its compiler: seconds
            nn.init.xavier_normal_(module.weight, GELU_GAIN * stride)
        nn.init.zeros_(module.bias)


def _sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{name}={values!r} must consist of positive whole numbers")
    sizes = tuple(values)
    for size in sizes:
        check_whole(name, size)
    return sizes


def _checked_widths(image_shape: tuple[int, ...], channels: int, feature_size: int) -> tuple[int, int]:
    check_whole("channels", channels)
    check_whole("feature_size", feature_size)
    _doublings(image_shape, feature_size)
    return channels, feature_size


def _doublings(image_shape: tuple[int, ...], feature_size: int) -> int:
    if len(image_shape) != 3 or image_shape[1] != image_shape[2]:
        raise ValueError(f"image_shape={image_shape} must be (C, H, W) with H = W")
    if feature_size < 5:
        raise ValueError(f"feature_size={feature_size} is too small: the 5x5 convolutions of mu_l, sigma_l need 5")
    ratio = image_shape[1] / feature_size
    if ratio < 2 or not math.log2(ratio).is_integer():
        fitting = [image_shape[1] // 2**k for k in range(1, 8) if image_shape[1] % 2**k == 0]
        raise ValueError(
            f"image side {image_shape[1]} is not feature_size={feature_size} times 2, 4, 8, ...; "
            f"feature sizes that fit: {[f for f in fitting if f >= 5]}"
        )
    return int(math.log2(ratio))
