"""The inference network that the variational auto-encoders share: the generator of Table 4, run upwards.

    h_0 = o(x),    h_l = d_l(h_{l-1}),    statistics of layer l = heads of h_l,    l = 1, ..., L

o mirrors o_0 (a stride-2 convolution where o_0 has a stride-2 transposed one), d_l and the heads are those of the generator,
with its channels and its weights' first values; the pass is deterministic and meets layer 1 first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generators import DeterministicBlock, TopDownGenerator, keep_signal, statistic_head


class BottomUpEncoder(nn.Module):
    """Images [n, C, H, W] -> (mean, standard deviation, ...), each [n, d] with the top layer first, as e has it.

    Parameters
    ----------
    generator : whose sizes are mirrored; it is not kept.
    n_heads : how many statistics of each latent there are; the second alone is made positive.
    """

    def __init__(self, generator: TopDownGenerator, n_heads: int = 2) -> None:
        super().__init__()
        channels, feature_size = generator.channels, generator.feature_size
        n_halvings = (generator.image_shape[1] // feature_size).bit_length() - 1
        widths = [generator.image_shape[0]] + [channels] * n_halvings
        down = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:])]
        self.input = nn.Sequential(*[part for conv in down for part in (conv, nn.GELU())])
        upwards = generator.latent_dims[::-1]
        self.deterministic = nn.ModuleList(DeterministicBlock(channels) for _ in upwards)
        self.heads = nn.ModuleList(
            nn.ModuleList(statistic_head(channels, d, feature_size) for _ in range(n_heads)) for d in upwards
        )
        self.apply(keep_signal)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features, layers = self.input(x), []
        for deterministic, heads in zip(self.deterministic, self.heads):
            features = deterministic(features)
            layers.append([head(features) for head in heads])
        mean, raw_std, *others = (torch.cat(statistic, 1) for statistic in zip(*layers[::-1]))
        return mean, F.softplus(raw_std), *others
