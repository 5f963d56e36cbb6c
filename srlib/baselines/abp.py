"""Alternating back-propagation (ABP; Han, Lu, Zhu and Wu 2017): Langevin chains that persist from epoch to epoch.

    for t = 0, ..., T - 1:
        1. draw observed examples x_1, ..., x_m
        2. K times, from where the chain of x_i ended in the last epoch (in the first one: from the prior),
               e_i <- e_i + s score(e_i) + sqrt(2 s) eps                                           Eq. (10)
        3. update theta by the gradient of (1/m) sum_i log p_theta(x_i, e_i)                       Eq. (21)

This is Algorithm 1 without its line 2: the chains are not drawn anew. They reach the posterior as training goes on, if it
changes slowly enough, so that the gradient becomes the maximum likelihood gradient, which Eq. (26) only approximates. The
price: a latent kept for every training example, and an inference of test images, which have no chain to go on from, that is
not the one of training (section 2).

Step sizes. The paper used 40 steps, "step size of 0.3" and sigma = 0.3 (section 7.3). We read 0.3 as the delta of Han et
al., who write e + (delta^2 / 2) score + delta eps as the paper's own script does; so s = delta^2 / 2 = 0.045.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..generators import Generator, check_whole, given_or_fresh
from ..inner_loop import Precision
from ..learning import ShortRun
from ..posterior import Posterior
from ..training import History, TrainingPlan, check_training
from ._options import checked_options

if TYPE_CHECKING:
    from ..experiment import Config


class ABP(ShortRun):
    """`ShortRun` with persistent chains in training; all that is not said here is as there.

    The defaults are the paper's for ABP. With the arguments of a `ShortRun` it is that system but for the persistence.

    Parameters
    ----------
    test_steps : Langevin steps from the prior that `infer` makes for an image; None makes `n_steps`, as many as training
        makes at each visit of an example. A training example has been visited once per epoch by the end.
    """

    def __init__(
        self,
        generator: Generator,
        n_steps: int = 40,
        step_size: float = 0.045,
        sigma: float = 0.3,
        sigma_start: float | None = None,
        anneal_fraction: float = 0.5,
        test_steps: int | None = None,
        precision: Precision = "full",
        compile: bool = False,
    ) -> None:
        super().__init__(
            generator, n_steps, step_size, sigma, sigma_start, anneal_fraction, precision=precision, compile=compile
        )
        self.test_steps = n_steps if test_steps is None else test_steps
        check_whole("test_steps", self.test_steps)

    def fit(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator | None = None,
        directory: Path | None = None,
        progress: bool = True,
    ) -> History:
        """Learn from training images [n, C, H, W]; arguments, history and warning as in `ShortRun.fit`.

        The chains [n, d] belong to the training (`own.chains` in its `resume_file`) and are not part of the system.
        """
        check_training(self, images, plan)
        rng = given_or_fresh(rng)
        chains = self.generator.sample_prior(len(images), rng)
        return self._learn(images, plan, rng, directory, progress, chains)

    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Latents [n, d] after `test_steps` steps from the prior: a cold start, for training images too."""
        posterior = Posterior(self.generator, x, self.sigma, mask)
        return self._chain(posterior, self.step_size, rng=rng, n_steps=self.test_steps)


def builder(config: Config) -> Callable[[tuple[int, int, int]], ABP]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit this system.

    K, s, sigma and its annealing are the configuration's own entries, for ABP as for the short run system, so that the same
    configuration with another `system` compares persistent with noise-initialised chains. As the paper ran ABP:
    n_steps: 40, step_size: 0.045, sigma: 0.3, sigma_start: 0.3. options: test_steps.
    """
    options = checked_options(config, {"test_steps": config.n_steps})
    if config.step_size_search != "none":
        raise ValueError(
            f"step_size_search={config.step_size_search!r}: Eq. (20) is the objective of a chain from the prior, ABP's "
            "chains are persistent; use none"
        )

    def build(image_shape: tuple[int, int, int]) -> ABP:
        return ABP(
            config.new_generator(image_shape),
            config.n_steps,
            config.step_size,
            config.sigma,
            config.sigma_start,
            config.anneal_fraction,
            precision=config.precision,
            compile=config.compile,
            **options,
        )

    return build
