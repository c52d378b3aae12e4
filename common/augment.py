"""What is done to images before a network sees them: one scale for all, and label-keeping random changes in
training.

::

    uint8 [B, 1, S, S] --/255--> augment (training only) --> standardise --> classifier

What a discriminator sees is another matter: `xfed.common.diffaugment`.

Everything is batched and every random number comes from the generator that is passed in (a CPU generator),
one draw per image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

__all__ = ["augment", "standardise"]

ROTATION = math.radians(10)
SCALE = 0.1
SHIFT = 0.08
GAMMA = 0.25
NOISE = 0.02
ERASE_PROBABILITY = 0.25
ERASE_SIDE = 0.25


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform numbers in [low, high), drawn on the CPU, on the device of `like`."""
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(like.device)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [B, 1, S, S], not {list(images.shape)}")


def standardise(images: Tensor) -> Tensor:
    """Each image to mean 0 and standard deviation 1 (a flat image to zeros), float32, same shape.

    Exposure differs between hospitals and machines; a gain and an offset of the whole image cancel here.
    uint8 and float input of any scale give the same answer.
    """
    images = images.float()
    if images.numel() == 0:
        return images
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
    scaled: Tensor = (images - mean) / torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, torch.inf)
    return scaled


def _boxes(count: int, size: int, share: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """One square of side `share` * S per image, anywhere (also over the edge): bool [B, 1, S, S]."""
    centre = _uniform((2, count, 1), 0, size, generator, like)
    pixels = torch.arange(size, device=like.device) + 0.5
    rows, columns = (centre - pixels).abs() < share * size / 2
    inside: Tensor = rows[:, None, :, None] & columns[:, None, None, :]
    return inside


def augment(images: Tensor, generator: torch.Generator, *, flip: bool = False, strength: float = 1.0) -> Tensor:
    """Random label-keeping changes of images float32 [B, 1, S, S] in [0, 1]; the answer has the same shape
    and range.

    At `strength` 1: rotation within 10 degrees, each axis scaled within 10 %, shifted within 8 %, gamma
    within exp(0.25), noise of sd up to 0.02, and on every fourth image a square of a quarter of the side set
    to the image's mean. All but the square's probability and side grow in proportion to `strength` (0 and up;
    0 leaves images as they are, up to the flip). `flip` mirrors half of the images left to right; a mirrored
    heart is not a healthy one, so it is off unless asked for.
    """
    _check(images)
    if strength < 0:
        raise ValueError(f"strength must be 0 or more, not {strength}")
    count, size = images.shape[0], images.shape[-1]
    u = _uniform((9, count), -1, 1, generator, images)
    angle = u[0] * ROTATION * strength
    across, down = (1 + u[1] * SCALE * strength), (1 + u[2] * SCALE * strength)
    mirror = torch.where(u[8] < 0, -1.0, 1.0) if flip else torch.ones_like(u[8])
    cosine, sine = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            torch.stack([mirror * across * cosine, -down * sine, 2 * SHIFT * strength * u[3]], dim=1),
            torch.stack([mirror * across * sine, down * cosine, 2 * SHIFT * strength * u[4]], dim=1),
        ],
        dim=1,
    )
    grid = affine_grid(theta, [count, 1, size, size], align_corners=False)
    images = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)
    if strength == 0:
        return images
    column = (count, 1, 1, 1)
    images = images ** torch.exp(u[5] * GAMMA * strength).view(column)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    images = (images + noise * (u[6].abs() * NOISE * strength).view(column)).clamp(0, 1)
    boxes = _boxes(count, size, ERASE_SIDE, generator, images) & ((u[7] + 1) / 2 < ERASE_PROBABILITY).view(column)
    return torch.where(boxes, images.mean(dim=(1, 2, 3), keepdim=True), images)
