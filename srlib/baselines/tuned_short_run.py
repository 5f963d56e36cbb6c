"""The short run system whose line 5 of Algorithm 1 chooses more than step sizes: any of the numbers of `variants`.

It is no method of the literature, but the paper's with the further hyper-parameters that Eq. (20) can choose: q_s becomes q_{s, a, ...}.
Like the other systems that are compared with the short run it stands in this folder, where `experiment` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..generators import Generator, check_positive, check_whole, given_or_fresh, randn_like
from ..inner_loop import Precision, accelerated
from ..langevin import DIVERGED_RMS, DivergenceError
from ..learning import ShortRun
from ..posterior import Posterior
from ..step_size import LARGEST, StepSizeResult
from ..training import TrainingLoop
from ..variants import _COORDINATES as COORDINATES
from ..variants import Variant, mean_precision, run_variant, variant_objective
from ._options import checked_options

if TYPE_CHECKING:
    from ..experiment import Config

# Where the momentum starts if it is free: without any, more and less of it are the same.
FIRST_MOMENTUM = 0.1
# How far to either side a slope looks, in the coordinates of `variants`: for s and the ratio as far as `StepSizeSearch`.
WIDTHS = {"step_size": 0.35, "ratio": 0.7, "momentum": 0.35, "heat": 0.15, "power": 0.1}
# In widths, that search's too. Of several numbers together: most of them lengthen the steps, and full moves of all would overshoot.
LARGEST_MOVE = 0.5 / 0.35


class TunedShortRun(ShortRun):
    """`ShortRun` with the chains of a `Variant`; every `every` updates its numbers go one step of descent on Eq. (20).

    All that is not said here is as in `ShortRun`. A preconditioner refers to the mean posterior precision of the latents, which is
    measured at each of these updates and scaled to geometric mean 1, so that `step_size` is the mean of the latents' step sizes.

    Parameters
    ----------
    step_size : s at the start and at the final sigma, a number.
    free : the numbers that are learned, of those of `Variant`; the others stay where there is nothing but one step size. The ratio
        needs at least two steps.
    n_images : images of the batch that the objective is measured on, at least 2; a smaller batch is gone through again.

    The history has, for each update of the numbers, chosen_ratio, chosen_momentum, chosen_heat and chosen_power besides.
    """

    OTHERS = ("ratio", "momentum", "heat", "power")

    def __init__(
        self,
        generator: Generator,
        n_steps: int = 25,
        step_size: float = 1.25e-3,
        sigma: float = 0.15,
        sigma_start: float | None = None,
        anneal_fraction: float = 0.5,
        free: Sequence[str] = tuple(WIDTHS),
        n_images: int = 4,
        every: int = 100,
        precision: Precision = "full",
        compile: bool = False,
    ) -> None:
        check_positive("step_size", step_size)
        super().__init__(
            generator, n_steps, step_size, sigma, sigma_start, anneal_fraction, self._move, every, precision, compile
        )
        check_free(free)
        check_whole("n_images", n_images, 2)  # two tell whether they agree
        if n_steps == 1 and "ratio" in free:
            raise ValueError("free has 'ratio', but a chain of n_steps=1 has one step size; leave ratio out")
        self.free, self.n_images = tuple(free), n_images
        self.learned = ", ".join(free)  # as text it is one of the settings by which a training that goes on is known
        first = Variant(1.0, momentum=FIRST_MOMENTUM if "momentum" in free else 0.0)
        others = [getattr(first, name) for name in self.OTHERS]
        self.register_buffer("others", torch.tensor(others, dtype=torch.float64))
        self.register_buffer("latent_precision", torch.ones(generator.latent_dim, dtype=torch.float64))

    def variant(self, step_size: Tensor | None = None) -> Variant:
        """The learned numbers, with `step_size` in the place of the learned one."""
        s = self.step_size if step_size is None else step_size
        return Variant(float(s), **dict(zip(self.OTHERS, self.others.tolist())))

    def settings(self) -> dict[str, float]:
        return super().settings() | dict(zip(self.OTHERS, self.others.tolist()))

    def _chain(
        self,
        posterior: Posterior,
        s: Tensor,
        initial: Tensor | None = None,
        rng: torch.Generator | None = None,
        n_steps: int | None = None,
    ) -> Tensor:
        fast = accelerated(posterior, self.precision, self.compiled)
        variant, n_steps = self.variant(s), n_steps or self.n_steps
        final = run_variant(fast, variant, n_steps, self.latent_precision, initial, rng=rng)[-1]
        if not (final.square().mean(1) < DIVERGED_RMS**2).all():
            raise DivergenceError(f"the chain of {variant} diverged; start from a smaller step size", variant.step_size)
        return final

    def _move(self, posterior: Posterior, s: Tensor, n_steps: int, rng: torch.Generator) -> StepSizeResult:
        """Line 5: all numbers one step, s as the result, which `ShortRun` keeps."""
        few = posterior[torch.arange(self.n_images) % len(posterior)]
        precision = mean_precision(few, self._chain(few, s, rng=rng))
        self.latent_precision.copy_(precision / precision.log().mean().exp())
        moved, tried, values = descend_variant(few, self.variant(s), self.free, n_steps, self.latent_precision, rng)
        self.others.copy_(torch.tensor([getattr(moved, name) for name in self.OTHERS], dtype=torch.float64))
        distributed.agree([self.others, self.latent_precision])
        return StepSizeResult(torch.tensor(moved.step_size, dtype=torch.float64), tried, values)

    def _choose_step_size(self, posterior: Posterior, s: Tensor, loop: TrainingLoop, rng: torch.Generator) -> None:
        super()._choose_step_size(posterior, s, loop, rng)
        loop.record(**{f"chosen_{name}": value for name, value in zip(self.OTHERS, self.others.tolist())})


def descend_variant(
    posterior: Posterior,
    variant: Variant,
    free: Sequence[str],
    n_steps: int = 25,
    precision: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> tuple[Variant, Tensor, Tensor]:
    """One step of stochastic gradient descent on the mean objective of a variant, along each number in `free`.

    The rule of `StepSizeSearch` with "descent": slopes are central differences over WIDTHS under the same random numbers, drawn
    from `rng`, and the step along one of F numbers is mean(slope) / rms(slope) of LARGEST_MOVE / sqrt(F) widths, the moments over
    the images of `posterior`.

    The coordinate of the momentum is even: from 0 it cannot move, and a step that would pass 0 turns there.

    Returns the moved variant; the s of those tried on either side, [2 F]; and their objectives, [2 F, n], inf where chains diverged.
    Raises ValueError for arguments that do not fit, fewer than 2 images among them, and DivergenceError where all chains diverge.
    """
    check_free(free)
    check_whole("n_steps", n_steps)
    if len(posterior) < 2:
        raise ValueError("a slope's length is judged by images that agree or do not; give at least 2")
    rng = given_or_fresh(rng)
    e = posterior.generator.sample_prior(len(posterior), rng)
    numbers = {"initial": e, "noise": torch.stack([randn_like(e, rng) for _ in range(n_steps)])}
    origin = torch.tensor([COORDINATES[name][1](getattr(variant, name)) for name in free], dtype=torch.float64)
    widths = torch.tensor([WIDTHS[name] for name in free], dtype=torch.float64)

    def at(u: Tensor) -> Variant:
        return replace(variant, **{name: COORDINATES[name][0](x) for name, x in zip(free, u.tolist())})

    aside = [at(origin + sign * row) for row in widths.diag() for sign in (-1, 1)]
    values = torch.stack([variant_objective(posterior, one, n_steps, precision, **numbers) for one in aside])
    if not values.isfinite().any():
        raise DivergenceError(
            f"all chains on either side of {variant} diverge; start from a smaller step size", variant.step_size
        )
    below, above = values.nan_to_num(posinf=LARGEST).unflatten(0, (-1, 2)).unbind(1)
    slopes = above - below  # in widths; a step does not depend on their unit
    lengths = slopes.mean(1) / slopes.square().mean(1).sqrt().clamp_min(torch.finfo(slopes.dtype).tiny)
    moved = at(origin - LARGEST_MOVE / math.sqrt(len(free)) * lengths.cpu() * widths)
    return moved, torch.tensor([one.step_size for one in aside], dtype=torch.float64), values


def check_free(free: Sequence[str]) -> None:
    """Raises ValueError unless `free` names some of what can be chosen, each once."""
    known = isinstance(free, list | tuple) and all(isinstance(name, str) and name in WIDTHS for name in free)
    if not known or not free or len({*free}) < len(free):
        raise ValueError(f"free={free!r} must name some of {', '.join(WIDTHS)}, each once")


def builder(config: Config) -> Callable[[tuple[int, int, int]], TunedShortRun]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit this system.

    K, s, sigma, its annealing, `every`, `search_images`, precision and compile are the configuration's own entries. options: free.
    """
    options = checked_options(config, {"free": tuple(WIDTHS)})
    for name, only in (("step_size_search", "descent"), ("estimator", "linear_noise"), ("step_size_share", "all")):
        if (given := getattr(config, name)) != only:
            raise ValueError(f"{name}={given!r}: {config.system} is made for {name}={only!r} alone; give that")

    def build(image_shape: tuple[int, int, int]) -> TunedShortRun:
        return TunedShortRun(
            config.new_generator(image_shape),
            config.n_steps,
            config.step_size,
            config.sigma,
            config.sigma_start,
            config.anneal_fraction,
            n_images=config.search_images,
            every=config.every,
            precision=config.precision,
            compile=config.compile,
            **options,
        )

    return build
