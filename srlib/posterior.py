"""The posterior of a generator's latents given an image.

    log p(x, e) = -|e|^2 / 2 - |m * (x - g(e))|^2 / (2 sigma^2) + const                            Eqs. (1)-(3)
    score(e)    = d/de log p(e | x) = -e + J(e)' m * (x - g(e)) / sigma^2,      J = dg/de          Eq. (9)

m is the mask of section 5.3: 1 where a pixel is observed. The normalising constants are kept, because sigma changes in
training and the objective of Eq. (19) must stay comparable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .generators import Generator, check_positive, check_whole

# Hessian-vector products at once. More does not make a CPU faster, and each holds one image's activations.
PRODUCTS_AT_ONCE = 1024


def basis_vectors(e: Tensor) -> Tensor:
    """The d unit vectors for each row of e [n, d]: [d, n, d], to differentiate all coordinates of a batch at once."""
    n, d = e.shape
    return torch.eye(d, dtype=e.dtype, device=e.device)[:, None, :].expand(d, n, d)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `module` asks for gradients: inference stores nothing for them, which is also faster."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


class Posterior:
    """p(e | x) for n images at once: Eqs. (1)-(3), with the mask of section 5.3.

    Parameters
    ----------
    generator : g_theta, with parameters of the same dtype and device as x.
    x : images [n, C, H, W] in [-1, 1].
    sigma : standard deviation of the pixel noise.
    mask : 1 = observed pixel, 0 = hidden; broadcastable to x. None: all pixels are observed. Hidden pixels of x may hold
        anything, NaN included.
    """

    def __init__(self, generator: Generator, x: Tensor, sigma: float, mask: Tensor | None = None) -> None:
        check_images(generator, x)
        check_sigma("sigma", sigma, x.dtype)
        self.generator = generator
        self.sigma = float(sigma)
        self.mask = None if mask is None else _checked_mask(mask, x)
        self.x = x if self.mask is None else torch.where(self.mask > 0, x, torch.zeros_like(x))
        check_finite(self.x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice | Tensor) -> Posterior:
        """The posterior of the selected images."""
        mask = None if self.mask is None else self.mask.expand_as(self.x)[index]
        return Posterior(self.generator, self.x[index], self.sigma, mask)

    def repeated(self, n_chains: int) -> Posterior:
        """Each image `n_chains` times in a row, for as many independent chains: n * n_chains images."""
        check_whole("n_chains", n_chains)
        return self[torch.arange(len(self), device=self.x.device).repeat_interleave(n_chains)]

    @property
    def n_observed(self) -> Tensor | int:
        """D, the number of observed pixel values of each image: [n], or one number without a mask."""
        if self.mask is None:
            return math.prod(self.generator.image_shape)
        return self.mask.expand_as(self.x).flatten(1).sum(1)

    def residual(self, e: Tensor) -> Tensor:
        """m * (x - g(e)): [n, C, H, W]."""
        difference = self.x - self.generator(self.validated(e))
        return difference if self.mask is None else difference * self.mask

    def log_joint(self, e: Tensor, residual: Tensor | None = None) -> Tensor:
        """log p(x, e) [n], with all constants, for e [n, d]. Differentiable in e and in the generator's parameters.

        residual : `self.residual(e)` where it is at hand, which saves computing it again.
        """
        d, n_observed = self.generator.latent_dim, self.n_observed
        e = self.validated(e)
        log_prior = -0.5 * e.square().sum(1) - 0.5 * d * math.log(2 * math.pi)
        residual = self.residual(e) if residual is None else residual
        misfit = residual.square().flatten(1).sum(1) / self.sigma**2
        return log_prior - 0.5 * misfit - 0.5 * n_observed * math.log(2 * math.pi * self.sigma**2)

    def score(self, e: Tensor, create_graph: bool = False, chunk_size: int | None = None) -> Tensor:
        """d/de log p(e | x) at e [n, d]: [n, d], with the generator's parameters frozen.

        create_graph : keep the graph, so that the score can be differentiated again with respect to e.
        chunk_size : work on that many images at a time; bounds the memory, changes nothing else.
        """
        if chunk_size is not None:
            check_whole("chunk_size", chunk_size)
        e = self.validated(e)
        if chunk_size is not None and chunk_size < len(self):
            cuts = [slice(i, i + chunk_size) for i in range(0, len(self), chunk_size)]
            with torch.enable_grad():  # the cuts are part of the graph
                return torch.cat([self[cut].score(e[cut], create_graph) for cut in cuts])
        with torch.enable_grad(), frozen(self.generator):
            if not (create_graph and e.requires_grad):
                e = e.detach().requires_grad_()
            score = self.pull(e, create_graph)[0] - e
        return score if create_graph else score.detach()

    def differentiable_score(self, e: Tensor, chunk_size: int | None = None) -> Tensor:
        """`score`, to be differentiated once: what that takes is computed again then, so that e alone is kept until there."""
        return _Score.apply(e, self, chunk_size)

    def pull(self, e: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """d/de log p(x | e) at e [n, d], which must require gradients: [n, d]; and the residual [n, C, H, W] it comes from."""
        if torch.is_inference_mode_enabled():
            raise ValueError("scores need gradients, which torch.inference_mode forbids; use torch.no_grad")
        image = self.generator(self.validated(e))
        residual = self.x - image if self.mask is None else (self.x - image) * self.mask
        # vector-Jacobian product J' residual: the forward and backward pass of one Langevin step, no loss needed
        (pull,) = torch.autograd.grad(image, e, residual / self.sigma**2, create_graph=create_graph)
        return pull, residual

    def hessian_product(self, e: Tensor, v: Tensor) -> Tensor:
        """H(e) v for v [n, d] or several vectors v [q, n, d] at once, H = d^2/de^2 log p(e | x) at e [n, d].

        One pass forward and backward builds the score's graph, one more backward pass serves all q vectors.
        """
        e = self.validated(e)
        if not isinstance(v, Tensor) or v.shape[-2:] != e.shape or v.ndim > 3 or v.dtype != e.dtype:
            shown = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
            raise ValueError(f"v is {shown}; it must be vectors like e, {e.dtype} {tuple(e.shape)}, or several such")
        with torch.enable_grad(), frozen(self.generator):
            e = e.detach().requires_grad_()
            score = self.score(e, create_graph=True)
            (product,) = torch.autograd.grad(score, e, v, is_grads_batched=v.ndim == 3)
        return product.detach()

    def hessian(self, e: Tensor) -> Tensor:
        """H(e) = d^2/de^2 log p(e | x) at e [n, d]: [n, d, d], symmetric."""
        pieces = basis_vectors(self.validated(e)).split(max(1, PRODUCTS_AT_ONCE // len(e)))
        h = torch.cat([self.hessian_product(e, piece) for piece in pieces]).transpose(0, 1)
        return 0.5 * (h + h.mT)

    def validated(self, e: Tensor) -> Tensor:
        """e itself, if its shape is [n, d]; a ValueError otherwise."""
        if not isinstance(e, Tensor):
            raise ValueError(f"e={e!r} must be a tensor [{len(self)}, {self.generator.latent_dim}]")
        if e.shape != (len(self), self.generator.latent_dim):
            raise ValueError(
                f"e has shape {tuple(e.shape)}, these {len(self)} images need [{len(self)}, {self.generator.latent_dim}]"
            )
        if e.dtype != self.x.dtype:
            raise ValueError(f"e has dtype {e.dtype}, the generator computes in {self.x.dtype}; convert it")
        return e


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, posterior: Posterior, chunk_size: int | None) -> Tensor:
        ctx.posterior, ctx.chunk_size = posterior, chunk_size
        ctx.save_for_backward(e)
        return posterior.score(e, chunk_size=chunk_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        (e,) = ctx.saved_tensors
        size = ctx.chunk_size or len(e)
        cuts = [slice(i, i + size) for i in range(0, len(e), size)]
        return torch.cat([ctx.posterior[cut].hessian_product(e[cut], v[cut]) for cut in cuts]), None, None


def check_sigma(name: str, sigma: float, dtype: torch.dtype) -> None:
    """Raises ValueError unless `sigma` is a positive number whose square is one too."""
    check_positive(name, sigma)
    if not torch.finfo(dtype).tiny <= sigma * sigma <= torch.finfo(dtype).max:
        raise ValueError(f"{name}={sigma!r} is too small or too large for its square to be a number in {dtype}")


def check_images(generator: Generator, x: Tensor) -> None:
    """Raises ValueError unless x is a batch of floating-point images [n, C, H, W] such as `generator` makes, where it computes."""
    if not isinstance(generator, Generator) or not isinstance(x, Tensor):
        raise ValueError(f"give a Generator and a tensor x, not a {type(generator).__name__} and a {type(x).__name__}")
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(generator.image_shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, the generator makes [n, {', '.join(map(str, generator.image_shape))}]"
        )
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; scale it to [-1, 1] as floats (srlib.to_unit_range does)")
    parameter = next(generator.parameters())
    if x.dtype != parameter.dtype:
        raise ValueError(f"x has dtype {x.dtype}, the generator computes in {parameter.dtype}; convert one of them")
    if x.device != parameter.device:
        raise ValueError(f"x is on {x.device}, the generator on {parameter.device}; move one of them")
    if not len(x):
        raise ValueError(f"x has shape {tuple(x.shape)}, without an image; give at least one")


def check_finite(x: Tensor) -> None:
    """Raises ValueError for pixels that are no numbers."""
    if not x.is_meta and not x.isfinite().all():
        raise ValueError("x holds NaN or infinite pixels; hide them with mask = 0 or replace them")


def _checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"mask={mask!r} must be a tensor that broadcasts to x {tuple(x.shape)}")
    if mask.is_meta and not x.is_meta:
        raise ValueError(f"mask is on {mask.device}, which holds no numbers, x on {x.device}")
    mask = mask.to(x.device, x.dtype)  # masks of booleans and of whole numbers too
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to x {tuple(x.shape)}")
    if not mask.is_meta and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must hold 0 (hidden) and 1 (observed) only")
    return mask
