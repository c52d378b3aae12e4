"""Features of images in a classifier's eyes, projected to few dimensions by a matrix that every site shares.

::

    images uint8 [n, S, S] --classifier.features--> float32 [n, F] --fixed Gaussian projection--> float64 [n, 64]
                                                                            the first 16 of them: for KID (kernel_sums)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from xfed.common.classifier import prepare
from xfed.common.devices import autocast
from xfed.common.randomness import torch_generator

__all__ = ["DIMENSIONS", "KERNEL_DIMENSIONS", "SCORES", "project", "project_features"]

DIMENSIONS = 64
KERNEL_DIMENSIONS = 16
BATCH = 256
SCORES = ("kid", "kid_floor", "precision", "recall", "density", "coverage", "ms_ssim_real")
"""What a site says of each class beside its sums: means over its own images."""


@torch.no_grad()
def project_features(
    model: torch.nn.Module, images: npt.NDArray[np.uint8], device: torch.device, precision: str
) -> npt.NDArray[np.float64]:
    """Projected features float64 [n, 64] of `images` uint8 [n, S, S]; `model` needs a method ``features(images)``."""
    model.eval()
    parts = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.array(images[start : start + BATCH])).to(device)
        with autocast(device, precision):
            parts.append(model.features(prepare(batch)).float().cpu())  # type: ignore[operator]
    if not parts:
        return np.zeros((0, DIMENSIONS))
    return project(torch.cat(parts))


def project(features: torch.Tensor) -> npt.NDArray[np.float64]:
    """Features [n, F] of any network to float64 [n, 64] by the fixed matrix (Johnson and Lindenstrauss 1984)."""
    matrix = torch.randn(features.shape[1], DIMENSIONS, generator=torch_generator(0, "feature projection"))
    projected: npt.NDArray[np.float64] = (features.double() @ matrix.double() / math.sqrt(features.shape[1])).numpy()
    return projected
