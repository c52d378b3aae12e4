"""DCGAN for one class of square grey images (Salehinejad et al. 2018, section 2.1; Radford et al. 2016).

::

    z [B, 128] uniform(-1, 1) -> linear -> 4 x 4 x top -> up-convolutions (doubling) -> tanh -> image [B, 1, S, S] in [-1, 1]
    image [B, 1, S, S]        -> convolutions (halving) -> 4 x 4 x top -> linear -> logit [B]

There is one up-convolution per doubling: six at 256 px, as in the paper, four at 64 px. ``top = width * 2^(doublings - 1)``,
so width 32 at 256 px gives the paper's 4x4x1024.

D has no normalisation: real images flow through it, and one patient must not change another's gradient. G sees latents only, so
it may normalise over the batch, which keeps its images apart from each other (measured: docs/experiments.md). But running
statistics would be buffers that averaging spoils. So G has none: for use, `Generator.calibrate` takes the statistics
from a fixed reference batch of latents (Salimans et al. 2016, virtual batch normalisation). They follow from the weights alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

__all__ = ["Discriminator", "Generator", "ReferenceNorm", "draw_latent"]

BASE = 4
KERNEL = 4
REFERENCE = 256
REFERENCE_SEED = 20101103


def _doublings(size: int) -> int:
    doublings = round(math.log2(max(size, 1) / BASE))
    if doublings < 1 or BASE * 2**doublings != size:
        raise ValueError(f"image size must be 8, 16, 32, 64, 128 or 256, not {size}")
    return doublings


def _initialise_generator(module: nn.Module, rng: torch.Generator | None) -> None:
    """Weights ~ N(0, 0.02), biases 0 (Radford et al. 2016, section 4); the norms behind them set the scale."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.ConvTranspose2d | nn.Linear):
                layer.weight.normal_(0.0, 0.02, generator=rng)
                if layer.bias is not None:
                    layer.bias.zero_()


def _initialise_discriminator(module: nn.Module, rng: torch.Generator | None) -> None:
    """Weights ~ N(0, 2 / fan-in) (He et al. 2015, section 2.2), biases 0.

    Without norms N(0, 0.02) loses the signal layer by layer, and D hardly learns: a Frechet distance of 9.3 instead of 2.0 after
    400 steps (docs/experiments.md).
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gain = 2 if isinstance(layer, nn.Conv2d) else 1
                layer.weight.normal_(0.0, math.sqrt(gain / layer.weight[0].numel()), generator=rng)
                if layer.bias is not None:
                    layer.bias.zero_()


class ReferenceNorm(nn.Module):
    """Normalisation over the batch in training; in use, with the statistics of the reference batch it was calibrated on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.recording = False
        self.statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x` [B, channels, H, W]. Raises `RuntimeError` in use before calibration."""
        if self.recording:
            self.statistics = (x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False))
        elif not self.training:
            if self.statistics is None:
                raise RuntimeError("call Generator.calibrate() after loading weights, before drawing images")
            return batch_norm(x, *self.statistics, self.weight, self.bias, training=False)
        return batch_norm(x, None, None, self.weight, self.bias, training=True)


class Generator(nn.Module):
    """G: latent [B, latent] to images float32 [B, 1, size, size] in [-1, 1]."""

    def __init__(self, size: int, width: int, latent: int = 128, generator: torch.Generator | None = None) -> None:
        super().__init__()
        doublings = _doublings(size)
        channels = [width * 2**step for step in reversed(range(doublings))]
        self.latent = latent
        self.top = channels[0]
        self.project = nn.Linear(latent, self.top * BASE * BASE)
        self.first_norm = ReferenceNorm(self.top)
        blocks: list[nn.Module] = []
        for wide, narrow in pairwise(channels):
            blocks.append(nn.ConvTranspose2d(wide, narrow, KERNEL, stride=2, padding=1, bias=False))
            blocks.append(ReferenceNorm(narrow))
            blocks.append(nn.ReLU())
        blocks.append(nn.ConvTranspose2d(channels[-1], 1, KERNEL, stride=2, padding=1))
        self.blocks = nn.Sequential(*blocks)
        _initialise_generator(self, generator)

    def forward(self, z: Tensor) -> Tensor:
        """Images of latents float32 [B, latent]."""
        x = self.project(z).view(-1, self.top, BASE, BASE)
        x = torch.relu(self.first_norm(x))
        return torch.tanh(self.blocks(x))

    @torch.no_grad()
    def calibrate(self) -> Generator:
        """Make ready for use: evaluation mode, statistics from the reference latents. Call after every change of weights."""
        norms = [layer for layer in self.modules() if isinstance(layer, ReferenceNorm)]
        for norm in norms:
            norm.recording = True
        reference = draw_latent(REFERENCE, self.latent, torch.Generator().manual_seed(REFERENCE_SEED))
        self(reference.to(self.project.weight.device))
        for norm in norms:
            norm.recording = False
        return self.eval()


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
        _initialise_discriminator(self, generator)

    def forward(self, images: Tensor) -> Tensor:
        """One logit per image."""
        logits: Tensor = self.logit(self.blocks(images).flatten(1)).squeeze(1)
        return logits


def draw_latent(count: int, latent: int, generator: torch.Generator) -> Tensor:
    """z ~ uniform(-1, 1), float32 [count, latent] (paper, section 2.1)."""
    return torch.rand(count, latent, generator=generator) * 2 - 1
