"""DCGAN for one class of square grey images (Salehinejad et al. 2018, section 2.1; Radford et al. 2016).

::

    z [B, 128] uniform(-1, 1) -> linear -> 4 x 4 x top -> up-convolutions (doubling) -> tanh -> image [B, 1, S, S] in [-1, 1]
    image [B, 1, S, S]        -> convolutions (halving) -> 4 x 4 x top -> linear -> logit [B]

There is one up-convolution per doubling: six at 256 px, as in the paper, four at 64 px. ``top = width * 2^(doublings - 1)``,
so width 32 at 256 px gives the paper's 4x4x1024. No BatchNorm anywhere: GroupNorm in G, none in D (PRIVACY, "Models"), so there
are no buffers to average and D is ready for per-patient clipping.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Discriminator", "Generator", "draw_latent"]

BASE = 4
KERNEL = 4


def _doublings(size: int) -> int:
    doublings = round(math.log2(max(size, 1) / BASE))
    if doublings < 1 or BASE * 2**doublings != size:
        raise ValueError(f"image size must be 8, 16, 32, 64, 128 or 256, not {size}")
    return doublings


def _initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Weights ~ N(0, 0.02), biases 0 (Radford et al. 2016, section 4)."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                layer.weight.normal_(0.0, 0.02, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()


class Generator(nn.Module):
    """G: latent [B, latent] to images float32 [B, 1, size, size] in [-1, 1]."""

    def __init__(self, size: int, width: int, latent: int = 128, generator: torch.Generator | None = None) -> None:
        super().__init__()
        doublings = _doublings(size)
        channels = [width * 2**step for step in reversed(range(doublings))]
        self.latent = latent
        self.top = channels[0]
        self.project = nn.Linear(latent, self.top * BASE * BASE)
        self.first_norm = nn.GroupNorm(min(8, self.top), self.top)
        blocks: list[nn.Module] = []
        for wide, narrow in pairwise(channels):
            blocks.append(nn.ConvTranspose2d(wide, narrow, KERNEL, stride=2, padding=1, bias=False))
            blocks.append(nn.GroupNorm(min(8, narrow), narrow))
            blocks.append(nn.ReLU())
        blocks.append(nn.ConvTranspose2d(channels[-1], 1, KERNEL, stride=2, padding=1))
        self.blocks = nn.Sequential(*blocks)
        _initialise(self, generator)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents float32 [B, latent]."""
        x = self.project(z).view(-1, self.top, BASE, BASE)
        x = torch.relu(self.first_norm(x))
        return torch.tanh(self.blocks(x))


class Discriminator(nn.Module):
    """D: images [B, 1, size, size] to one logit each, [B]; positive means real."""

    def __init__(self, size: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        channels = [1, *(width * 2**step for step in range(_doublings(size)))]
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(channels):
            blocks.append(nn.Conv2d(narrow, wide, KERNEL, stride=2, padding=1))
            blocks.append(nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(*blocks)
        self.logit = nn.Linear(channels[-1] * BASE * BASE, 1)
        _initialise(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """One logit per image."""
        logits: Tensor = self.logit(self.blocks(images).flatten(1)).squeeze(1)
        return logits


def draw_latent(count: int, latent: int, generator: torch.Generator) -> Tensor:
    """z ~ uniform(-1, 1), float32 [count, latent] (paper, section 2.1)."""
    return torch.rand(count, latent, generator=generator) * 2 - 1
