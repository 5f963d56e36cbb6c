"""The short run system as a configuration describes it: what `experiment` asks of the module of every system."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .generators import check_positive
from .learning import ShortRun
from .step_size import StepSizeSearch

if TYPE_CHECKING:
    from .experiment import Config


def builder(config: Config) -> Callable[[tuple[int, int, int]], ShortRun]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit this system."""
    if config.options:
        raise ValueError(f"options={config.options}: the short run system has none, its entries stand by themselves")
    method = "grid" if config.step_size_search == "none" else config.step_size_search
    check_positive("step_size", config.step_size)
    share = config.step_size_share
    search = StepSizeSearch(method, config.estimator, config.search_images, share=share)  # checked in any case
    if config.step_size_search == "none" and share != "all":
        raise ValueError(f"step_size_share={share!r} is learned by step_size_search=descent, which is none")

    def build(image_shape: tuple[int, int, int]) -> ShortRun:
        n_steps, d = config.n_steps, sum(config.latent_dims)
        shape = {"all": (), "step": (n_steps, 1, 1), "layer": (d,), "step_and_layer": (n_steps, 1, d)}[share]
        return ShortRun(
            config.new_generator(image_shape),
            config.n_steps,
            config.step_size if share == "all" else torch.full(shape, config.step_size),
            config.sigma,
            config.sigma_start,
            config.anneal_fraction,
            None if config.step_size_search == "none" else search,
            config.every,
            config.precision,
            config.compile,
        )

    return build
