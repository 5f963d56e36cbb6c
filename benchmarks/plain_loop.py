"""Short run inference as a research script writes it: what the library's inner loop is measured against. Frozen; not to be tuned.

    z <- z - (delta^2 / 2) dU/dz + delta * noise,    U(z) = |x - g(z)|^2 / (2 sigma^2) + |z|^2 / 2         Algorithm 1, line 3

One tensor for each latent layer, an energy summed over the batch, parameters that require gradients as in training, and the
graph retained in every step. A test holds its chains to those of `srlib.short_run`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def plain_short_run(
    generator: nn.Module, x: Tensor, zs: Sequence[Tensor], n_steps: int, delta: float, sigma: float
) -> list[Tensor]:
    """zs, one [n, d_l] for each layer with the top layer first, after `n_steps` steps for images x [n, C, H, W]."""
    zs = [z.clone().requires_grad_() for z in zs]
    for _ in range(n_steps):
        image = generator(torch.cat(zs, 1))
        energy = ((x - image) ** 2).sum() / (2 * sigma**2) + sum((z**2).sum() / 2 for z in zs)
        gradients = torch.autograd.grad(energy, zs, retain_graph=True)
        for z, gradient in zip(zs, gradients):
            z.data = z.data - delta**2 / 2 * gradient + delta * torch.randn_like(z)
    return [z.detach() for z in zs]
