"""Reconstruction (section 5.2): how close decode(infer(x)) comes to test images, and whether they are still recognised."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import distributed
from ..generators import check_tensor
from ..system import System, in_batches


def reconstructions(system: System, images: Tensor, rng: torch.Generator, batch_size: int = 250) -> Tensor:
    """One reconstruction of each image [n, C, H, W] (uint8, or floats in [-1, 1]), as floats on the CPU."""

    def reconstructed(batch: Tensor) -> Tensor:
        return system.reconstruct(system.as_input(batch), rng=rng).cpu()

    return distributed.mapped(reconstructed, in_batches(images, batch_size))


def inference_seconds(system: System, images: Tensor, batch_size: int = 100) -> float:
    """Wall seconds per image of `infer` for images [n, C, H, W] in batches: the median over at most five batches."""
    timed, rng = [], torch.Generator()  # without it, torch's global state would move on
    for batch in in_batches(images, batch_size)[:5]:
        x, started = system.as_input(batch), time.perf_counter()
        system.infer(x, rng=rng).sum().item()  # .item(): a GPU has then finished
        timed.append((time.perf_counter() - started) / len(batch))
    return statistics.median(timed)


def squared_error(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Mean squared error per pixel of each image: [n], for images in [-1, 1] (a quarter of it on [0, 1])."""
    check_tensor("images", images)
    check_tensor("reconstructed", reconstructed)
    if images.shape != reconstructed.shape or not (images.is_floating_point() and reconstructed.is_floating_point()):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)} and reconstructed {reconstructed.dtype} "
            f"{tuple(reconstructed.shape)}; both must be floats of one shape"
        )
    return (images - reconstructed).square().flatten(1).mean(1)


def recogniser(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """An independent classifier of images [n, C, H, W] (floats in [-1, 1]), trained here: images -> labels [n].

    It is scikit-learn's support vector machine with a Gaussian kernel, which shares nothing with the systems it judges.
    """
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(images.flatten(1).numpy(), labels.numpy())
    return lambda judged: torch.from_numpy(classifier.predict(judged.flatten(1).numpy()))
