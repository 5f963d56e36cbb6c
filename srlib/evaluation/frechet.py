"""Fréchet and kernel distances between two sets of images, both through one function, `evaluate_samples`.

With features f of real images (mean m, covariance C) and of generated ones (m', C'):

    Fréchet  |m - m'|^2 + tr C + tr C' - 2 tr (C C')^{1/2},   tr (C C')^{1/2} = nuclear norm of C^{1/2} C'^{1/2}
             (Dowson & Landau 1982; Heusel et al. 2017), the squared Wasserstein distance of two Gaussians;
    kernel   E k(f_i, f_j) + E k(f'_i, f'_j) - 2 E k(f_i, f'_j), i != j, with k(a, b) = (a . b / dim + 1)^3
             (KID: Binkowski et al. 2018), free of bias at every number of images, so it may be negative.

FID is the first with the features of pytorch-fid's Inception network; on the features of a small network of our own it is
called FD-<name> ("fd_<name>"), never FID. The Fréchet distance is biased upwards by about a / n, hence:

- it is refused for fewer than `IMAGES_PER_DIMENSION` images for each feature dimension, and KID is given alone;
- its limit for infinitely many images is extrapolated linearly in 1 / n (Chong & Forsyth 2020), see `frechet_bias`.

Our networks (`NETWORKS`, those whose file is in weights/) are trained by benchmarks/feature_networks.py; how, on what and
how well stands in the metadata of the file (`network_metadata`). Their features have mean 0 and variance 1 over the
training images.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from .. import checkpoints, distributed
from ..data import to_uint8, to_unit_range
from ..generators import check_rng, check_tensor, check_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

WEIGHTS = Path(__file__).parent / "weights"
# dataset -> the network that judges its images
NETWORKS = {
    "digits": "digits",
    "mnist": "digits",
    "colour_digits": "colour_digits",
    "colour_mnist": "colour_digits",
    "svhn": "svhn",
    "celeba32": "celeba32",
    "celeba64": "celeba64",
}
INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d"  # how the hash of pytorch-fid's weights file begins; the file's name says so

IMAGES_PER_DIMENSION = 10
IMAGES_PER_DIMENSION_OF_PARTS = 4  # in `frechet_bias`, whose parts show the bias: fewer leave the linear regime
UNSCALED = 10.0  # floats beyond this were never scaled to [-1, 1]


class WeightsUnavailable(RuntimeError):
    """A network's weights are not on this machine; the message says how to get them."""


class Encoder(nn.Module):
    """Images [n, C, S, S] in [-1, 1] -> features [n, dim]: convolutions of stride 2 down to 4x4, one linear map, and a
    normalisation to mean 0 and variance 1, whose statistics are fixed once it is trained."""

    CHANNELS = (24, 48, 64, 64)

    def __init__(self, image_shape: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        width, side, *_ = image_shape
        layers: list[nn.Module] = []
        for channels in self.CHANNELS:
            if side > 4:
                layers += [nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.SiLU()]
                width, side = channels, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, dim))
        self.normalise = nn.BatchNorm1d(dim, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(self.layers(x))


def network_metadata(name: str) -> dict[str, Any]:
    """How the network of a dataset, or of that name, was made: image_shape, dim, config, seed, data, scores."""
    return _network(_network_name(name))[1]


def features(
    name: str,
    images: Tensor,
    inception_weights: Path | str | None = None,
    inception_dim: int = 2048,
    device: str = "cpu",
    batch_size: int = 250,
) -> Tensor:
    """Features float64 [n, f] on the CPU.

    name : a dataset, or "inception" for pytorch-fid's network.
    images : uint8 [n, C, H, W], or floats in [-1, 1], which are rounded to uint8 first: real and generated images pass
        through the same quantisation, as files on a disk would.
    inception_weights : file with pytorch-fid's weights; None looks into torch's hub cache. Nothing is downloaded.
    inception_dim : which of pytorch-fid's layers: 64, 192, 768 or 2048, the layer of FID.

    Raises ValueError for an unknown name, another shape, nan, or floats never scaled; `WeightsUnavailable` for weights
    that are not on this machine.
    """
    check_whole("batch_size", batch_size)
    network_name = _network_name(name)
    images = _quantised(images)
    if network_name == INCEPTION:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images have {images.shape[1]} channels; give 1 or 3")
        network = distributed.from_first(lambda: _inception(inception_weights, inception_dim)).to(device)

        def encode(batch: Tensor) -> Tensor:
            colour = batch.expand(-1, 3, -1, -1).float() / 255  # as torchvision's ToTensor reads a file
            return network(colour)[0].mean((2, 3))  # a layer before the last is averaged over positions, as there
    else:
        network, metadata = distributed.from_first(lambda: _network(network_name))
        if list(images.shape[1:]) != metadata["image_shape"]:
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}; the network {network_name!r} takes "
                f"{tuple(metadata['image_shape'])}"
            )
        network = network.to(device)

        def encode(batch: Tensor) -> Tensor:
            return network(to_unit_range(batch))

    with torch.no_grad():
        return distributed.mapped(lambda batch: encode(batch.to(device)).double().cpu(), images.split(batch_size))


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The Fréchet distance of two sets of features [n, f] and [m, f], with unbiased covariances (np.cov, as in FID).

    Raises ValueError where n or m is less than `IMAGES_PER_DIMENSION` f: the bias would be all that is measured.
    """
    real, generated = _checked(real, generated)
    short = _shortage(real, generated)
    if short:
        raise ValueError(f"{short}; use kernel_distance, which has no bias, or more images")
    return _frechet(*_moments(real), *_moments(generated)).item()


def gaussian_frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """The Fréchet distance of N(mean [f], covariance [f, f]) and another Gaussian; covariances may be singular."""
    given = dict(mean=mean, covariance=covariance, other_mean=other_mean, other_covariance=other_covariance)
    for name, t in given.items():
        check_tensor(name, t)
        if mean.ndim != 1 or t.shape != mean.shape * (2 if "covariance" in name else 1):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} and {name} {tuple(t.shape)}; give means [f], covariances [f, f]"
            )
    return _frechet(*(t.double() for t in given.values())).item()


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """KID of two sets of features [n, f] and [m, f]: the unbiased estimate over all pairs, n and m at least 2."""
    real, generated = _checked(real, generated)
    return _kernel(real, generated, torch.ones(1, len(real)).double(), torch.ones(1, len(generated)).double()).item()


def bootstrap_standard_errors(
    real: Tensor, generated: Tensor, rng: torch.Generator, n_bootstrap: int = 200
) -> tuple[float | None, float]:
    """Standard errors of `frechet_distance` (None where that is refused) and `kernel_distance`, by resampling images.

    Both sets are resampled. An image drawn twice is no pair with itself in KID, so its replicates stay unbiased.
    """
    real, generated = _checked(real, generated)
    check_whole("n_bootstrap", n_bootstrap, 2)
    check_rng(rng)
    w, v = (_resampled(len(x), n_bootstrap, rng) for x in (real, generated))
    kernel = _kernel(real, generated, w, v).std().item()
    if _shortage(real, generated):
        return None, kernel
    return torch.stack(
        [_frechet(*_moments(real, a), *_moments(generated, b)) for a, b in zip(w, v)]
    ).std().item(), kernel


def frechet_bias(real: Tensor, generated: Tensor, rng: torch.Generator, n_halvings: int = 3) -> dict[str, Any]:
    """The Fréchet distance at n, n/2, n/4, ... images, and its limit for infinitely many.

    Both sets are cut at random into c = 1, 2, 4, ... parts of n / c and m / c images and the c distances averaged, so
    that the bias a / n + b / m of both sets grows with c and the line through the values meets c = 0 at the limit.

    Returns {"n_real": [...], "n_generated": [...], "value": [...], "extrapolated": float}; "extrapolated" is None where
    there are too few images for two points. It may be negative for sets of one distribution: it is an unbiased line's end.
    """
    real, generated = _checked(real, generated)
    check_whole("n_halvings", n_halvings)
    check_rng(rng)
    least = IMAGES_PER_DIMENSION_OF_PARTS * real.shape[1]
    order, other_order = (torch.randperm(len(x), generator=rng) for x in (real, generated))
    counts: list[int] = []
    values: list[Tensor] = []
    for c in (2**k for k in range(n_halvings + 1)):
        n, m = len(real) // c, len(generated) // c
        if min(n, m) < least:
            break
        parts = zip(order[: c * n].split(n), other_order[: c * m].split(m))
        distances = [_frechet(*_moments(real[i]), *_moments(generated[j])) for i, j in parts]
        counts.append(c)
        values.append(torch.stack(distances).mean())
    extrapolated = None
    if len(values) > 1:
        line = torch.tensor([[1.0, c] for c in counts], dtype=torch.float64)
        extrapolated = torch.linalg.lstsq(line, torch.stack(values)[:, None]).solution[0, 0].item()
    return {
        "n_real": [len(real) // c for c in counts],
        "n_generated": [len(generated) // c for c in counts],
        "value": [value.item() for value in values],
        "extrapolated": extrapolated,
    }


def evaluate_samples(
    name: str,
    real: Tensor,
    generated: Tensor,
    rng: torch.Generator,
    n_bootstrap: int = 200,
    inception_weights: Path | str | None = None,
    inception_dim: int = 2048,
    device: str = "cpu",
) -> dict[str, Any]:
    """All distances of generated from real images, as plain numbers for metrics.json.

    name : a dataset, for the network of ours that judges it, or "inception" for FID; the images and the rest as in
        `features`; rng draws the bootstrap and the halvings.

    Returns n_real, n_generated, feature_dim, the network's weights by their hash (features_sha256) and, for the network
    `digits`, kid_digits, fd_digits, their standard errors (..._standard_error, bootstrap over images) and
    fd_digits_extrapolated (`frechet_bias`). For Inception they are named kid_inception and fid (at 2048 dimensions,
    "fid_<dim>" at others). Where the images are too few for the dimension there is no Fréchet distance, and
    frechet_refused says why.
    """
    network_name = _network_name(name)
    given = dict(inception_weights=inception_weights, inception_dim=inception_dim, device=device)
    x, y = _checked(features(name, real, **given), features(name, generated, **given))
    return distributed.from_first(
        lambda: _distances(network_name, x, y, rng, n_bootstrap, inception_weights, inception_dim), rng
    )


def _distances(
    network_name: str,
    x: Tensor,
    y: Tensor,
    rng: torch.Generator,
    n_bootstrap: int,
    inception_weights: Path | str | None,
    inception_dim: int,
) -> dict[str, Any]:
    """What `evaluate_samples` returns, from the features of real images x and generated ones y."""
    if network_name == INCEPTION:
        fd = "fid" if inception_dim == 2048 else f"fid_{inception_dim}"
        weights = _inception_file(inception_weights)
    else:
        fd, weights = f"fd_{network_name}", _network_file(network_name)
    kid = f"kid_{network_name}"
    frechet_error, kernel_error = bootstrap_standard_errors(x, y, rng, n_bootstrap)
    scores: dict[str, Any] = {
        "n_real": len(x),
        "n_generated": len(y),
        "feature_dim": x.shape[1],
        "features_sha256": _sha256(weights),
        kid: kernel_distance(x, y),
        f"{kid}_standard_error": kernel_error,
    }
    short = _shortage(x, y)
    if short:
        return scores | {"frechet_refused": short}
    return scores | {
        fd: _pytorch_fid(x, y) if network_name == INCEPTION else frechet_distance(x, y),
        f"{fd}_standard_error": frechet_error,
        f"{fd}_extrapolated": frechet_bias(x, y, rng)["extrapolated"],
    }


def _network_name(name: str) -> str:
    if name == INCEPTION:
        return name
    if name not in tuple(NETWORKS):
        raise ValueError(f"there is no network for {name!r}; there are: {', '.join(NETWORKS)}, {INCEPTION}")
    return NETWORKS[name]


def _network_file(network_name: str) -> Path:
    return WEIGHTS / f"{network_name}.safetensors"


@functools.cache
def _network(network_name: str) -> tuple[nn.Module, dict[str, Any]]:
    if not _network_file(network_name).is_file():
        raise WeightsUnavailable(
            f"the network {network_name!r} is not trained: run python benchmarks/feature_networks.py {network_name}"
        )
    tensors, metadata = checkpoints.load(_network_file(network_name))
    with torch.random.fork_rng(devices=[]):  # the weights that it starts with are replaced
        network = Encoder(tuple(metadata["image_shape"]), metadata["dim"])
    network.load_state_dict(tensors)
    return network.eval(), metadata


def _inception_file(weights: Path | str | None) -> Path:
    """The file with pytorch-fid's weights, which must be the published ones."""
    try:
        from pytorch_fid.inception import FID_WEIGHTS_URL
    except ImportError:
        raise WeightsUnavailable("FID needs pytorch-fid: pip install pytorch-fid") from None
    if weights is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[-1]
        place = (
            f"torch's hub cache, as checkpoints/{path.name}"  # no path of this machine: the reason stays with results
        )
    else:
        path = Path(weights).expanduser()
        place = str(path)
    if not path.is_file():
        raise WeightsUnavailable(
            f"the Inception weights are not at {place}: fetch {FID_WEIGHTS_URL} and put the file there, "
            "or give its path as inception_weights"
        )
    if not _sha256(path).startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{path} is not the file that pytorch-fid publishes (its sha256 must begin with {INCEPTION_SHA256}): "
            f"fetch {FID_WEIGHTS_URL} again; what other weights give may not be called FID"
        )
    return path


def _inception(weights: Path | str | None, dim: int) -> nn.Module:
    """pytorch-fid's InceptionV3, built by itself, but handed the local weights where it would download them."""
    from pytorch_fid import inception

    if dim not in inception.InceptionV3.BLOCK_INDEX_BY_DIM:
        raise ValueError(f"inception_dim={dim!r} must be one of {list(inception.InceptionV3.BLOCK_INDEX_BY_DIM)}")
    state = torch.load(_inception_file(weights), map_location="cpu", weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        return inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dim]]).eval()


def _pytorch_fid(real: Tensor, generated: Tensor) -> float:
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = [m for x in (real.numpy(), generated.numpy()) for m in (x.mean(0), np.cov(x, rowvar=False))]
    return float(calculate_frechet_distance(*moments))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _quantised(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}; give a tensor [n, C, H, W]")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images have shape {tuple(images.shape)}; give [n, C, H, W] with n > 0")
    if images.dtype == torch.uint8:
        return images
    if images.is_floating_point():
        largest = images.abs().max().item()
        if not largest <= UNSCALED:
            raise ValueError(f"images reach {largest:.3g}; scale them to [-1, 1], without nan, or give uint8")
    return to_uint8(images)


def _checked(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("real", real), ("generated", generated)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} features are a {type(x).__name__}; give a tensor [n, f]")
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} features have shape {tuple(x.shape)}; give [n, f] with n > 1")
        if not x.isfinite().all():
            raise ValueError(f"{name} features are not all finite")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, generated {generated.shape[1]}")
    return real.double(), generated.double()


def _shortage(real: Tensor, generated: Tensor) -> str:
    """Why the Fréchet distance of these features is refused; empty where it is not."""
    n, dim = min(len(real), len(generated)), real.shape[1]
    if n >= IMAGES_PER_DIMENSION * dim:
        return ""
    return f"{n} images are too few for {dim} feature dimensions: {IMAGES_PER_DIMENSION * dim} are needed"


def _resampled(n: int, n_bootstrap: int, rng: torch.Generator) -> Tensor:
    """How often each of n images is drawn, in each of the bootstrap's samples: [n_bootstrap, n]."""
    drawn = torch.randint(n, (n_bootstrap, n), generator=rng)
    return torch.zeros(n_bootstrap, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [f] and unbiased covariance [f, f] of x [n, f], each row counted `weights` [n] times."""
    weights = x.new_ones(len(x)) if weights is None else weights
    n = weights.sum()
    mean = weights @ x / n
    centred = (x - mean) * weights.sqrt()[:, None]
    return mean, centred.T @ centred / (n - 1)


def _frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """The nuclear norm, unlike the eigenvalues of C C', loses no digits where the covariances are singular."""
    fidelity = torch.linalg.matrix_norm(_root(covariance) @ _root(other_covariance), "nuc")
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * fidelity
    return distance.clamp(min=0)  # rounding alone makes it negative


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix, whose eigenvalues below 0 are rounding errors."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _kernel(real: Tensor, generated: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """KID [B] with image counts w [B, n] and v [B, m]: pairs of one image with itself are left out.

    sum_{i != j} w_i w_j k_ij / ((sum w)^2 - sum w^2) + the same with v - 2 sum w_i v_j k_ij / (sum w sum v)
    """
    dim = real.shape[1]

    def sums(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sum(((a[:, i] @ ((x[i] @ y.T / dim + 1) ** 3)) * b).sum(1) for i in _rows(len(x)))

    def within(x: Tensor, a: Tensor) -> Tensor:
        itself = a.square() @ (x.square().sum(1) / dim + 1) ** 3
        return (sums(x, x, a, a) - itself) / (a.sum(1).square() - a.square().sum(1))

    between = sums(real, generated, w, v) / (w.sum(1) * v.sum(1))
    return within(real, w) + within(generated, v) - 2 * between


def _rows(n: int) -> Iterator[slice]:
    """Blocks of rows: the kernel matrix of 40,000 images would not fit."""
    return (slice(i, i + 1000) for i in range(0, n, 1000))
