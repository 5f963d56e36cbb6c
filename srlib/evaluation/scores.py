"""All scores of a trained system, as they stand in a run's metrics.json."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import distributed
from ..data import Dataset, Split, to_unit_range
from ..system import Source, System
from ..training import stream
from .frechet import INCEPTION, WeightsUnavailable, evaluate_samples
from .reconstruction import recogniser, reconstructions, squared_error

EvaluationSplit = Literal["test", "validation"]
BATCH = 250
RECOGNISER_IMAGES = 10_000  # its support vectors grow with the images, and it learns little from more


def evaluate(
    system: System, dataset: Dataset, split: EvaluationSplit, seed: int, n_samples: int = 5000
) -> dict[str, Any]:
    """The scores of a trained system: per-pixel MSE on [-1, 1] of the images of one split and, with labels, how many of their
    reconstructions are recognised; what it knows of their likelihood; and the distances of n_samples images, from the prior and
    from the aggregate posterior, from as many training images (`evaluate_samples`)."""
    held_out: Split = getattr(dataset, split)
    rng = torch.Generator().manual_seed(stream(seed, "reconstructions"))
    images, reconstructed = to_unit_range(held_out.images), reconstructions(system, held_out.images, rng)
    errors = squared_error(images, reconstructed)
    scores: dict[str, Any] = {
        "split": split,
        "n_images": len(errors),
        "mse": errors.mean().item(),
        "mse_standard_error": errors.std().item() / len(errors) ** 0.5,
        **system.settings(),
    }
    if held_out.labels is not None:
        judged = {"recognised_originals": images, "recognised_reconstructions": reconstructed}
        scores |= distributed.from_first(lambda: _recognised(judged, held_out.labels, dataset.train))
    rng = torch.Generator().manual_seed(stream(seed, "samples"))
    parts: dict[str, list[Tensor]] = {}
    for batch in held_out.images.split(BATCH):
        with distributed.sharing(len(batch)) as rows:
            for name, values in system.likelihood(system.as_input(batch[rows]), rng).items():
                parts.setdefault(name, []).append(distributed.gathered(values))
    scores |= {name: torch.cat(values).mean().item() for name, values in parts.items()}
    real, device = dataset.train.images[:n_samples], str(next(system.parameters()).device)
    for source in get_args(Source):
        generated = distributed.mapped(
            lambda x, source=source: system.sample(len(x), source, rng).cpu(), real.split(BATCH)
        )
        for key, network in ((f"samples_{source}", dataset.name), (f"samples_{source}_{INCEPTION}", INCEPTION)):
            try:
                scores[key] = evaluate_samples(network, real, generated, rng, device=device)
            except WeightsUnavailable as error:
                scores[key] = {"not_run": str(error)}
    return scores


def _recognised(judged: dict[str, Tensor], labels: Tensor, train: Split) -> dict[str, float]:
    """Which fraction of each of these sets of images a classifier gives their labels."""
    classify = recogniser(to_unit_range(train.images[:RECOGNISER_IMAGES]), train.labels[:RECOGNISER_IMAGES])
    return {name: (classify(images) == labels).double().mean().item() for name, images in judged.items()}
