"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020): real and fake alike, so that nothing leaks into G.

::

    real --+                                   policy "translation": whole pixels within S/8, edges repeated
           +--> differentiable_augment --> D   policy "full": + brightness, contrast, a square of side S/4 blacked out
    fake --+  (gradients flow back to G)       policy "none"

On chest films the translation alone was measured best: exposure is part of what G must learn, and blacked-out squares hide
findings (docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["POLICIES", "differentiable_augment"]

POLICIES = ("translation", "full", "none")
REACH = 8
SQUARE = 4


def differentiable_augment(images: Tensor, rng: torch.Generator, policy: str) -> Tensor:
    """Augment images float32 [B, 1, S, S] in [-1, 1] one by one; values may leave the range. Raises `ValueError`."""
    if policy not in POLICIES:
        raise ValueError(f"augmentation policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return images
    if policy == "full":
        images = _exposure(images, rng)
    images = _translate(images, rng)
    return _black_square(images, rng) if policy == "full" else images


def _uniform(images: Tensor, low: float, high: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(len(images), 1, 1, 1, generator=rng) * (high - low) + low).to(images.device)


def _exposure(images: Tensor, rng: torch.Generator) -> Tensor:
    images = images + _uniform(images, -0.5, 0.5, rng)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * _uniform(images, 0.5, 1.5, rng) + mean


def _translate(images: Tensor, rng: torch.Generator) -> Tensor:
    count, _, size, _ = images.shape
    reach = max(1, size // REACH)
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=rng)
    rows, columns = (torch.arange(size) + shift).clamp(0, size - 1).to(images.device)
    picked = torch.arange(count, device=images.device)[:, None, None]
    return images[picked, 0, rows[:, :, None], columns[:, None, :]][:, None]


def _black_square(images: Tensor, rng: torch.Generator) -> Tensor:
    count, _, size, _ = images.shape
    side = max(1, size // SQUARE)
    corner = torch.randint(0, size - side + 1, (2, count, 1), generator=rng).to(images.device)
    place = torch.arange(size, device=images.device)
    rows, columns = (place >= corner) & (place < corner + side)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], -1.0, images)
