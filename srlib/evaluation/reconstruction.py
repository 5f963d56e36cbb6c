"""Reconstruction (section 5.2): how close decode(infer(x)) comes to test images, and whether they are still recognised."""

from __future__ import annotations

import torch
from torch import Tensor

from ..system import System


def reconstructions(system: System, images: Tensor, rng: torch.Generator, batch_size: int = 250) -> Tensor:
    """One reconstruction of each image [n, C, H, W] (uint8, or floats in [-1, 1]), as floats on the CPU."""
    return torch.cat([system.reconstruct(system.as_input(batch), rng=rng).cpu() for batch in images.split(batch_size)])


def squared_error(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Mean squared error per pixel of each image: [n], for images in [-1, 1] (a quarter of it on [0, 1])."""
    return (images - reconstructed).square().flatten(1).mean(1)


def recognised(train_images: Tensor, train_labels: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Which images [n, C, H, W] an independent classifier gives their true label: [n] bool, and the fraction.

    The classifier is scikit-learn's support vector machine with a Gaussian kernel, trained here on the training images
    (floats in [-1, 1]); it shares nothing with the systems it judges.
    """
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(train_images.flatten(1).numpy(), train_labels.numpy())
    right = torch.from_numpy(classifier.predict(images.flatten(1).numpy()) == labels.numpy())
    return right, right.double().mean().item()
