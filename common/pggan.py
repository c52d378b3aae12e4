"""PGGAN for square grey images: a generator and a discriminator that grow together from 4 px (Karras et al. 2018).

::

    z [B, L] -> sphere -> 4 x 4 x C0 -> block 1 (doubles) -> ... -> block k -> to_grey[k] -> image [B, 1, S, S], S = 4 * 2^k
    image -> from_grey[k] -> block k (halves) -> ... -> 4 x 4 x C0 -> deviation of the batch -> score [B]
    while stage k fades in, both mix:  alpha * (the path through block k) + (1 - alpha) * (the path of stage k - 1)
    how far both have grown is a Place, which follows from the training step alone (xfed.common.growing)

All layers of all stages exist from the start, and those that the stage does not need take no part and get no gradient: names and
shapes of the weights never change, so averaging, moving averages and checkpoints need not know of stages. The layers of the
coarse stages hold nearly all the weights (Karras et al. 2018, table 2).

G has no statistics over the batch and no buffers: an image depends on its latent alone. D looks at the deviation over the batch
(section 3), which is why it cannot be trained per patient (`xfed.common.pggan_training`, "Why there is no private path").
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu, linear

from xfed.common.growing import BASE, Place, stages_of

__all__ = [
    "Discriminator",
    "EqualConv2d",
    "EqualLinear",
    "Generator",
    "batch_deviation",
    "channels_for",
    "draw_latent",
    "enlarge",
    "faded",
    "pixel_norm",
    "shrink",
]

CHANNELS = (512, 512, 512, 256, 128, 64, 32)
"""Of 4, 8, ... 256 px at width 32."""
LATENT = 512
WIDTH = 32
SLOPE = 0.2
EPSILON = 1e-8


def channels_for(size: int, width: int) -> tuple[int, ...]:
    """Channels at 4, 8, ... `size` px; `width` is the number at 256 px, and 32 gives the table of Segal et al. 2021."""
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    return tuple(width * most // WIDTH for most in CHANNELS[: stages_of(size)])


class EqualConv2d(nn.Module):
    """A convolution that keeps the size, with weights ~ N(0, 1) times `scale` = gain / sqrt(fan-in) (section 4.1)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs * kernel**2)
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, inputs, H, W] to [B, outputs, H, W]."""
        return conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class EqualLinear(nn.Module):
    """A linear layer with weights ~ N(0, 1) times `scale` = gain / sqrt(inputs) (section 4.1)."""

    def __init__(self, inputs: int, outputs: int, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [B, inputs] to [B, outputs]."""
        return linear(x, self.weight * self.scale, self.bias)


def _draw(module: nn.Module, rng: torch.Generator | None) -> None:
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, EqualConv2d | EqualLinear):
                layer.weight.normal_(0.0, 1.0, generator=rng)


def pixel_norm(x: Tensor) -> Tensor:
    """Each pixel's (each row's) vector of channels, dimension 1, brought to a root mean square of 1 (section 4.2)."""
    return x * x.float().square().mean(dim=1, keepdim=True).add(EPSILON).rsqrt().to(x.dtype)


def batch_deviation(x: Tensor) -> Tensor:
    """`x` [B, C, H, W] with one more channel: the standard deviation over the batch, averaged over channels and pixels."""
    spread = x.float().var(dim=0, unbiased=False).add(EPSILON).sqrt().mean()
    return torch.cat([x, spread.to(x.dtype).expand(len(x), 1, *x.shape[2:])], dim=1)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images [B, 1, s, s] repeated to `size` px, a multiple of s."""
    return images if images.shape[-1] == size else interpolate(images, size=(size, size), mode="nearest")


def shrink(images: Tensor, size: int) -> Tensor:
    """Images [B, 1, s, s] averaged to `size` px, a divisor of s."""
    return images if images.shape[-1] == size else avg_pool2d(images, images.shape[-1] // size)


def faded(images: Tensor, place: Place) -> Tensor:
    """Real images float32 [B, 1, S, S] as D sees them at `place`: at its size, and as coarse as the fakes still are."""
    images = shrink(images, place.size)
    if place.alpha >= 1 or place.stage == 0:
        return images
    return torch.lerp(enlarge(shrink(images, place.size // 2), place.size), images, place.alpha)


def _activated(x: Tensor) -> Tensor:
    return leaky_relu(x, SLOPE)


class _GeneratorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualConv2d(inputs, outputs, 3)
        self.second = EqualConv2d(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(_activated(self.first(enlarge(x, 2 * x.shape[-1]))))
        return pixel_norm(_activated(self.second(x)))


class Generator(nn.Module):
    """G: latents [B, latent] to images float32 [B, 1, S, S]; about [-1, 1], but linear at the end, so they may leave it."""

    def __init__(
        self, size: int, width: int = WIDTH, latent: int = LATENT, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        channels = channels_for(size, width)
        self.latent = latent
        self.top = channels[0]
        # a quarter of the usual gain, as the authors have it: the norm behind takes it out again, and the rate is a quarter
        self.project = EqualLinear(latent, self.top * BASE**2, gain=math.sqrt(2) / 4)
        self.first = EqualConv2d(self.top, self.top, 3)
        pairs = pairwise(channels)
        self.blocks = nn.ModuleList(_GeneratorBlock(wide, narrow) for wide, narrow in pairs)
        self.to_grey = nn.ModuleList(EqualConv2d(wide, 1, 1, gain=1) for wide in channels)
        _draw(self, generator)

    def forward(self, z: Tensor, place: Place | None = None) -> Tensor:
        """Images of latents float32 [B, latent] at `place`, by default fully grown. Only the direction of z counts."""
        place = place or Place(len(self.blocks))
        x = self.project(pixel_norm(z)).view(-1, self.top, BASE, BASE)
        x = pixel_norm(_activated(self.first(pixel_norm(_activated(x)))))
        before = x
        for block in self.blocks[: place.stage]:
            before, x = x, block(x)
        images: Tensor = self.to_grey[place.stage](x)
        if place.alpha >= 1 or place.stage == 0:
            return images
        return torch.lerp(enlarge(self.to_grey[place.stage - 1](before), place.size), images, place.alpha)

    def calibrate(self) -> Generator:
        """Make ready for use: evaluation mode. There is nothing to calibrate; the DCGAN has the same method."""
        return self.eval()


class _DiscriminatorBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualConv2d(inputs, inputs, 3)
        self.second = EqualConv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(_activated(self.second(_activated(self.first(x)))), 2)


class Discriminator(nn.Module):
    """D: images [B, 1, S, S] to one score each, [B]; higher means more like a real one.

    With `deviation` D sees how much the images of the batch differ, so give it reals and fakes in batches of their own. Without,
    an image's score depends on that image alone.
    """

    def __init__(
        self, size: int, width: int = WIDTH, generator: torch.Generator | None = None, *, deviation: bool = True
    ) -> None:
        super().__init__()
        channels = channels_for(size, width)
        self.deviation = deviation
        self.from_grey = nn.ModuleList(EqualConv2d(1, wide, 1) for wide in channels)
        pairs = pairwise(channels)
        self.blocks = nn.ModuleList(_DiscriminatorBlock(narrow, wide) for wide, narrow in pairs)
        self.last = EqualConv2d(channels[0] + deviation, channels[0], 3)
        self.hidden = EqualLinear(channels[0] * BASE**2, channels[0])
        self.score = EqualLinear(channels[0], 1, gain=1)
        _draw(self, generator)

    def forward(self, images: Tensor, place: Place | None = None) -> Tensor:
        """One score per image; images must have the size of `place`, by default fully grown. Raises `ValueError`."""
        place = place or Place(len(self.blocks))
        if images.shape[1:] != (1, place.size, place.size):
            raise ValueError(f"images at stage {place.stage} must be {place.size} px, not {list(images.shape)}")
        x = _activated(self.from_grey[place.stage](images))
        for stage in range(place.stage, 0, -1):
            x = self.blocks[stage - 1](x)
            if stage == place.stage and place.alpha < 1:
                coarse = _activated(self.from_grey[stage - 1](avg_pool2d(images, 2)))
                x = torch.lerp(coarse.to(x.dtype), x, place.alpha)
        if self.deviation:
            x = batch_deviation(x)
        x = _activated(self.last(x)).flatten(1)
        scores: Tensor = self.score(_activated(self.hidden(x))).squeeze(1)
        return scores


def draw_latent(count: int, latent: int, generator: torch.Generator) -> Tensor:
    """z uniform on the sphere of radius sqrt(latent), float32 [count, latent] (Karras et al. 2018, section 5)."""
    return pixel_norm(torch.randn(count, latent, generator=generator))
