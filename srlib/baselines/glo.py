"""Generative latent optimisation (GLO; Bojanowski, Joulin, Lopez-Paz and Szlam 2018): a free code for every image.

    min over theta and z_1, ..., z_n  of  (1/n) sum_i |x_i - g_theta(e_i)|^2 / D,     e_i = sqrt(d) z_i,     |z_i| <= 1
    z_i <- z_i - rate * d loss / d z_i,    then    z_i <- z_i / max(|z_i|, 1)           with each update of theta

No probability model: no prior, no posterior, no sigma. A Gaussian is fitted to the codes when training has ended, and new
images are decoded from it. Test images have no code, and get one by minimising the same loss with theta held fixed.

What is not in that paper follows the re-implementation that the paper used (its section 7.3 and footnote 4): the codes
start as PCA scores of their images, each then projected onto the ball, and descend with a rate of 10 on a loss that is the
mean over pixels and batch. Three things are ours. Theta is updated as in all systems here, by Adam; there by SGD. Table 4's
generator, whose first weights are made for inputs of unit variance, is given sqrt(d) z, and its last bias starts where images
have their mean colour. Their generator has batch normalisation throughout, to which the scale of z is all the same, and
which keeps its tanh from saturating: without it, the first updates push all pixels towards those of the mostly black digits,
and before the codes tell them apart the tanh is flat and nothing is learned any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..generators import Generator, check_positive, check_whole, given_or_fresh, randn_like
from ..posterior import Posterior, frozen
from ..system import Source, System, of_numbers
from ..training import History, TrainingLoop, TrainingPlan, check_training
from ._options import checked_options

if TYPE_CHECKING:
    from ..experiment import Config

# Images whose PCA scores are computed at once.
PCA_BATCH = 1000
# As far out as a mean colour may put a pixel: tanh still has a tenth of its slope there.
UNSATURATED = 0.95
# The paper's n_pca (section 7.3) and the default of the code it used: the number of images that the PCA is fitted on. It is twice
# the number of pixel values of a 64x64 colour image, as that code was written for, though Table 2 is about 32x32 ones.
N_PCA = 64 * 64 * 3 * 2


class GLO(System):
    """A single-layer generator with a code for each image: latents e [n, d] in the ball of radius sqrt(d), e = sqrt(d) z.

    More layers are refused: the GLO paper knows one, and whether the noises of several layers would share a ball or have one
    each would be a choice of our own, and no baseline.

    Parameters
    ----------
    code_learning_rate : rate of z in training, on the loss above. Plain gradient descent, without moments (SGD there too).
    n_pca : images that the PCA is fitted on, drawn from the training images; all, if there are no more. Every image then
        gets its scores.
    inference_steps, inference_learning_rate : Adam's steps on the latents e of test images, and its rate, which goes linearly
        to 0.
    n_starts : from how many latents that descent starts, for the best end to be kept: the training latents' mean, and
        n_starts - 1 draws from their Gaussian.
    """

    def __init__(
        self,
        generator: Generator,
        code_learning_rate: float = 10.0,
        n_pca: int = N_PCA,
        inference_steps: int = 100,
        inference_learning_rate: float = 0.5,
        n_starts: int = 1,
    ) -> None:
        super().__init__(generator)
        if len(generator.latent_dims) > 1:
            raise ValueError(f"latent_dims={generator.latent_dims}: GLO has one layer; give one number, such as [128]")
        self.code_learning_rate, self.n_pca = code_learning_rate, n_pca
        self.inference_steps, self.inference_learning_rate = inference_steps, inference_learning_rate
        self.n_starts = n_starts
        check_positive("code_learning_rate", code_learning_rate)
        check_whole("n_pca", n_pca)
        check_whole("inference_steps", inference_steps)
        check_positive("inference_learning_rate", inference_learning_rate)
        check_whole("n_starts", n_starts)
        self.register_buffer("code_mean", torch.zeros(generator.latent_dim))
        self.register_buffer("code_scale", torch.eye(generator.latent_dim))

    def fit(
        self,
        images: Tensor,
        plan: TrainingPlan,
        rng: torch.Generator | None = None,
        directory: Path | None = None,
        progress: bool = True,
    ) -> History:
        """Learn from training images [n, C, H, W], n > d; arguments as in `TrainingLoop`.

        Returns the history, one number for each update: loss and mse, which are the same (per pixel, on [-1, 1]), and
        code_norm, the mean of |z| over the batch. The latents [n, d] belong to the training (`own.latents` in its
        `resume_file`); what the system keeps of them is their Gaussian.
        """
        check_training(self, images, plan)
        rng = given_or_fresh(rng)
        latents = self._pca_latents(images, rng)
        self._start_at_the_mean(images)
        n, d = latents.shape
        loop = TrainingLoop(self, images, plan, rng, directory, progress=progress, own={"latents": latents})
        for _, x, index in loop:
            index = index.to(latents.device)
            e = latents[index].requires_grad_()
            loss = (x - self.generator(e)).square().mean()
            loop.update(loss, mse=loss.detach(), code_norm=e.detach().norm(dim=1).mean() / d**0.5)
            # d loss / dz = sqrt(d) d loss / de, and once more sqrt(d) from z to e
            latents[index] = projected(e.detach() - self.code_learning_rate * d * e.grad)
        self.code_mean.copy_(latents.mean(0))
        _, spread, directions = torch.linalg.svd(latents - self.code_mean, full_matrices=False)
        self.code_scale.copy_(directions.T * spread / (n - 1) ** 0.5)
        return loop.finish()

    def infer(self, x: Tensor, mask: Tensor | None = None, rng: torch.Generator | None = None) -> Tensor:
        """Latents [n, d] in the ball that reconstruct x [n, C, H, W] best where the mask says observed.

        Costs n_starts * inference_steps gradients for each image; random only with more starts than one.
        """
        posterior = Posterior(self.generator, x, 1.0, mask)  # for its masked residual; sigma only scales the gradient
        best, least = self._descended(posterior, self.code_mean.expand(len(x), -1))
        for _ in range(self.n_starts - 1):
            e, loss = self._descended(posterior, projected(self._draw(len(x), rng)))
            best = torch.where((loss < least)[:, None], e, best)
            least = torch.minimum(loss, least)
        return of_numbers("latents", best)

    def sample(self, n: int, source: Source = "prior", rng: torch.Generator | None = None) -> Tensor:
        """n new images [n, C, H, W] in [-1, 1].

        source : "prior" decodes draws from the Gaussian of the training latents. GLO has no prior: this Gaussian is what its
            authors and section 7.3 sample from, so it belongs where the other systems' prior samples stand, while N(0, I) is
            no part of GLO. "aggregate" means what it does for all systems, the Gaussian that `fit_aggregate` fitted to
            the latents that `infer` found for the images it was given.
        """
        if source != "prior":
            return super().sample(n, source, rng)
        check_whole("n", n)
        return self.decode(self._draw(n, rng))

    def _draw(self, n: int, rng: torch.Generator | None) -> Tensor:
        return self.code_mean + randn_like(self.code_mean.expand(n, -1), rng) @ self.code_scale.T

    def _descended(self, posterior: Posterior, start: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [n, d] where Adam arrives from `start`, and the sum of squares [n] that is left there."""
        e = start.detach().clone()
        optimizer = torch.optim.Adam([e])
        with frozen(self.generator):
            for k in range(self.inference_steps):
                optimizer.param_groups[0]["lr"] = self.inference_learning_rate * (1 - k / self.inference_steps)
                with torch.enable_grad():
                    gradient = -posterior.pull(e.requires_grad_())[0]
                e.grad = _inward(gradient, e.detach())
                optimizer.step()
                with torch.no_grad():
                    e.copy_(projected(e))
        with torch.no_grad():
            return e.detach(), posterior.residual(e).square().flatten(1).sum(1)

    def _start_at_the_mean(self, images: Tensor) -> None:
        """Of a generator that ends in tanh(o_0(.)), the last bias such that a constant image has the mean colour."""
        if not hasattr(self.generator, "output"):
            return
        total = sum(self.as_input(batch).mean((2, 3)).sum(0) for batch in images.split(PCA_BATCH))
        with torch.no_grad():
            self.generator.output[-1].bias.copy_((total / len(images)).clamp(-UNSATURATED, UNSATURATED).atanh())

    def _pca_latents(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """The PCA scores of all training images, each projected onto the unit ball, times sqrt(d): [n, d]."""
        n, d = len(images), self.generator.latent_dim
        if min(n, self.n_pca) <= d:
            raise ValueError(
                f"{min(n, self.n_pca)} images (there are {n}, n_pca={self.n_pca}) do not have {d} principal components; "
                f"give at least {d + 1}, or latents of fewer dimensions"
            )
        x = self.as_input(images[torch.randperm(n, generator=rng)[: self.n_pca]]).flatten(1)
        with torch.random.fork_rng(devices=[]):  # pca_lowrank starts from random directions of torch's global state
            torch.manual_seed(0)
            _, _, components = torch.pca_lowrank(x.cpu(), min(2 * d, *x.shape), niter=4)
        mean, components = x.mean(0), components[:, :d].to(x.device)
        scores = [(self.as_input(batch).flatten(1) - mean) @ components for batch in images.split(PCA_BATCH)]
        return projected(d**0.5 * torch.cat(scores))


def projected(e: Tensor) -> Tensor:
    """The point nearest to each row of e [n, d] in the ball of radius sqrt(d), which is the unit ball of z = e / sqrt(d)."""
    radius = e.shape[1] ** 0.5
    return e * (radius / e.norm(dim=1, keepdim=True).clamp_min(radius))


def _inward(gradient: Tensor, e: Tensor) -> Tensor:
    """The gradient without what points out of the ball where e is on its sphere: descending along it stays in the ball.

    It is zero at the best e in the ball. The whole gradient is not, and Adam, which divides each coordinate by its own size,
    would leave that e for another place on the sphere.
    """
    radial, square = (gradient * e).sum(1, keepdim=True), e.square().sum(1, keepdim=True)
    on_the_way_out = (radial < 0) & (square > e.shape[1] * (1 - 1e-5))
    return torch.where(on_the_way_out, gradient - radial / square * e, gradient)


def builder(config: Config) -> Callable[[tuple[int, int, int]], GLO]:
    """Image shape -> the untrained system. Raises ValueError for entries of `config` that do not fit this system.

    options: the parameters of `GLO`, by their names. Langevin steps, step sizes and sigma mean nothing to it.
    """
    parameters = list(inspect.signature(GLO).parameters.values())[1:]
    options = checked_options(config, {p.name: p.default for p in parameters})

    def build(image_shape: tuple[int, int, int]) -> GLO:
        return GLO(config.new_generator(image_shape), **options)

    return build
