"""Algorithm 1: learning with short run MCMC.

    for t = 0, ..., T - 1:                                                                         Algorithm 1
        1. draw observed examples x_1, ..., x_m
        2. draw latents e_{i,0} ~ p(e)
        3. infer e_{i,K} by K steps of Eq. (10) with step size s
        4. update theta by the gradient of (1/m) sum_i log p_theta(x_i, e_{i,K})                   Eq. (21)
        5. every T_s iterations, update s by minimising Eq. (20)

Line 5 stands after line 4, as in the paper's box (its section 4.4 puts it first): the new s is then chosen for the generator
that it will be used with. Over a run the two orders differ by where s is updated for the first time.

At the fixed point the expectation of that gradient under q_s vanishes (Eq. 26): a perturbation of the maximum likelihood
equation, in which the posterior stands in the place of q_s.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import distributed
from .generators import Generator, check_positive, check_whole, given_or_fresh
from .inner_loop import Precision, check_fast
from .langevin import DivergenceError, noise_scale_from_step_size, short_run, validated_step_size
from .posterior import Posterior
from .step_size import StepSizeResult
from .system import NoisySystem
from .training import History, TrainingLoop, TrainingPlan, check_training

# Reconstructions that vary this little, relative to the images, come from a generator that ignores its latents.
COLLAPSED_SPREAD = 0.01

# Given the posterior of the current batch, the step size s, K and a random generator: the new s. `StepSizeSearch` is one.
StepSizeUpdate = Callable[[Posterior, Tensor, int, torch.Generator], StepSizeResult]


class ShortRun(NoisySystem):
    """The paper's system: a top-down generator and noise-initialised short run inference.

    Parameters
    ----------
    n_steps : K.
    step_size : s of Eq. (10) once sigma has arrived at its final value; a number, or a tensor that broadcasts to [K, n, d] for
        all n, such as `geometric_step_sizes`.
    sigma, sigma_start, anneal_fraction : as in `NoisySystem`. The stiffness of the posterior grows as 1 / sigma^2, so s
        follows sigma^2 while it is annealed.
    update_step_size, every : line 5 of Algorithm 1, called every T_s = `every` updates; None keeps s fixed.
    precision, compile : how the chains compute their scores, see `inner_loop.accelerated`.
    """

    def __init__(
        self,
        generator: Generator,
        n_steps: int = 25,
        step_size: float | Tensor = 1.25e-3,
        sigma: float = 0.15,
        sigma_start: float | None = None,
        anneal_fraction: float = 0.5,
        update_step_size: StepSizeUpdate | None = None,
        every: int = 100,
        precision: Precision = "full",
        compile: bool = False,
    ) -> None:
        super().__init__(generator, sigma, sigma_start, anneal_fraction)
        self.n_steps, self.update_step_size, self.every = n_steps, update_step_size, every
        check_whole("n_steps", n_steps)
        check_whole("every", every)
        check_fast(precision, compile)
        self.precision, self.compiled = precision, compile
        if not isinstance(step_size, Tensor):
            check_positive("step_size", step_size)
        like = torch.empty((), device=next(generator.parameters()).device)
        s = validated_step_size(step_size, (n_steps, 1, generator.latent_dim), like)
        if update_step_size is not None and not callable(update_step_size):
            raise ValueError(f"update_step_size={update_step_size!r} must be callable, such as a StepSizeSearch")
        self.register_buffer("step_size", s.detach().clone())
        # as text it is one of the settings by which a training that goes on is known, wherever s has moved since
        known = isinstance(step_size, Tensor) and not step_size.is_meta
        self.first_step_size = str(step_size.tolist() if known else step_size)

    def fit(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator | None = None,
        directory: Path | None = None,
        progress: bool = True,
    ) -> History:
        """Algorithm 1 on training images [n, C, H, W]; arguments as in `TrainingLoop`.

        Returns the history, one number for each update: loss (the negative of Eq. 22's objective, per image), step_size,
        sigma, mse (per pixel, on [-1, 1]) and spread (how much the reconstructions vary over a batch, 1 = as the images); and
        one number for each update of s: chosen_step_size, chosen_at (updates made before), objective (Eq. 20 without
        log p(x), the lowest of those tried) with objective_standard_error, and search_seconds. Of several step sizes these are the
        geometric means; the chosen ones are there one by one too, as chosen_step_size_0, ....
        Warns if the generator has collapsed to a constant image.
        """
        return self._learn(images, plan, given_or_fresh(rng), directory, progress)

    def _learn(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator,
        directory: Path | None,
        progress: bool,
        chains: Tensor | None = None,
    ) -> History:
        """`fit`; with `chains` [n, d], one for each image, line 2 is to go on from there (`baselines.abp`)."""
        check_training(self, images, plan)
        if min(plan.batch_size, len(images)) == 1:
            raise ValueError("batches of 1 image: whether the generator collapses is seen from 2 images on; use more")
        if self.update_step_size is not None and self.every > plan.n_updates:
            raise ValueError(
                f"every={self.every}: s would never be updated in n_updates={plan.n_updates} updates; make every smaller"
            )
        own = {} if chains is None else {"chains": chains}
        loop = TrainingLoop(self, images, plan, rng, directory, progress=progress, own=own)
        for t, x, index in loop:  # 1. draw observed examples
            sigma = self.sigma_at(t / plan.n_updates)
            s = self.step_size * (sigma / self.sigma) ** 2
            posterior = Posterior(self.generator, x, sigma)
            index = index.to(x.device)  # 2. draw latents from the prior
            initial = self.generator.sample_prior(len(x), rng) if chains is None else chains[index]
            inferred = self._run(posterior, s, initial, rng, t)  # 3. K steps of Eq. (10)
            if chains is not None:
                chains[index] = inferred
            residual = posterior.residual(inferred)
            loss = -posterior.log_joint(inferred, residual).mean()  # 4. update theta by Eq. (21)
            made, images_of_all = (distributed.gathered(part) for part in (x - residual.detach(), x))
            spread = made.std(0).mean() / images_of_all.std(0).mean().clamp_min(torch.finfo(x.dtype).eps)
            loop.update(loss, step_size=_mean(s), sigma=sigma, mse=residual.detach().square().mean(), spread=spread)
            if self.update_step_size is not None and (t + 1) % self.every == 0:  # 5. update s by Eq. (20)
                self._choose_step_size(posterior, s, loop, rng)
        return _without_collapse(loop.finish())

    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Latents e_K [n, d] of one short run from noise, with the learned step size and the final sigma."""
        return self._chain(Posterior(self.generator, x, self.sigma, mask), self.step_size, rng=rng)

    def settings(self) -> dict[str, float]:
        s = _mean(self.step_size)
        return {"step_size": s, "noise_scale": noise_scale_from_step_size(s)}

    def _chain(
        self,
        posterior: Posterior,
        s: Tensor,
        initial: Tensor | None = None,
        rng: torch.Generator | None = None,
        n_steps: int | None = None,
    ) -> Tensor:
        """e_K of this system's K steps, or of `n_steps`, computed in this system's way."""
        fast = {"precision": self.precision, "compile": self.compiled}
        return short_run(posterior, n_steps or self.n_steps, s, initial, rng=rng, **fast).final

    def _run(self, posterior: Posterior, s: Tensor, initial: Tensor, rng: torch.Generator, t: int) -> Tensor:
        """e_K of the chains, and a divergence in terms of the step size that was asked for: that at the final sigma."""
        try:
            return self._chain(posterior, s, initial, rng)
        except DivergenceError as error:
            asked = float(self.step_size.max())
            if not error.step_size > 0:
                raise DivergenceError(f"update {t}: {error}") from error
            remedy = f"try step_size={asked / 10:.1g}"
            if self.update_step_size is not None:
                remedy += (
                    ", or a search that measures on more images or is made less often: s is what the last one chose"
                )
            raise DivergenceError(
                f"update {t}: the chains diverged with step_size={asked:.3g} (which is s = {float(s.max()):.3g} at sigma = "
                f"{posterior.sigma:.3g}, since s follows sigma^2); {remedy}",
                asked,
            ) from error

    def _choose_step_size(self, posterior: Posterior, s: Tensor, loop: TrainingLoop, rng: torch.Generator) -> None:
        started = time.perf_counter()
        with distributed.whole(posterior.x) as x:
            try:
                result = self.update_step_size(Posterior(self.generator, x, posterior.sigma), s, self.n_steps, rng)
            except DivergenceError as error:
                raise DivergenceError(f"update {loop.t}: the search of the step size failed: {error}") from error
        if result.step_size.shape != self.step_size.shape:
            raise ValueError(
                f"update_step_size chose a step size of shape {tuple(result.step_size.shape)}, the system was made with one of "
                f"shape {tuple(self.step_size.shape)}; give it a step_size of the shape that is to be learned"
            )
        if not ((result.step_size > 0) & (result.step_size < math.inf)).all():
            raise ValueError(
                f"update_step_size chose s = {result.step_size.tolist()} after update {loop.t}; it must be positive"
            )
        self.step_size.copy_(result.step_size * (self.sigma / posterior.sigma) ** 2)
        distributed.agree([self.step_size])
        several = result.step_size.flatten().tolist() if result.step_size.ndim else []
        loop.record(
            chosen_at=loop.t + 1,
            chosen_step_size=_mean(result.step_size),
            **{f"chosen_step_size_{i}": s_i for i, s_i in enumerate(several)},
            objective=result.objective[result.best],
            objective_standard_error=result.standard_error[result.best],
            search_seconds=time.perf_counter() - started,
        )


def _mean(s: Tensor) -> float:
    """The geometric mean of one or several step sizes."""
    return s.item() if s.numel() == 1 else s.log().mean().exp().item()


def _without_collapse(history: History) -> History:
    recent = history["spread"][-100:]
    if sum(recent) / len(recent) < COLLAPSED_SPREAD:
        warnings.warn(
            f"the generator has collapsed: over the last {len(recent)} updates its images vary {max(recent):.1e} times as "
            "much as the training images; try a smaller learning rate, a larger sigma_start or fewer layers",
            RuntimeWarning,
            stacklevel=3,
        )
    return history
