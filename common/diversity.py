"""How different the images of one class are from each other: the mean similarity of random pairs.

::

    images of a class --random pairs--> MS-SSIM of each pair --mean--> one number: 1 is "all alike", lower is more varied

Used so by Odena, Olah and Shlens 2017 (section 4.2) to find generators that draw one picture again and again, and for chest
X-rays by Segal et al. 2021. Read it beside the same number of real images: real chest films are alike too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from xfed.common.errors import DataError

__all__ = ["PAIRS", "ms_ssim", "pair_similarity", "scales_for"]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
PAIRS = 200
BLOCK = 50

Pixels = npt.NDArray[np.uint8]


def scales_for(size: int) -> int:
    """How many of the five scales an image of side `size` has room for: the last must hold the 11 px window.

    5 from 176 px on (256), 4 at 128, 3 at 64, 2 at 32.
    """
    scales = 0
    while scales < len(WEIGHTS) and size // 2**scales >= WINDOW:
        scales += 1
    if not scales:
        raise DataError(f"images of {size} px are smaller than the {WINDOW} px window of MS-SSIM")
    return scales


def _blur_matrix(size: int) -> Tensor:
    """B [size - 10, size] with B x B^T the Gaussian window over an image x, inside it: five times faster than a convolution."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    matrix = torch.zeros(size - WINDOW + 1, size, dtype=torch.float64)
    for row in range(len(matrix)):
        matrix[row, row : row + WINDOW] = window / window.sum()
    return matrix


@torch.no_grad()
def ms_ssim(a: Pixels, b: Pixels) -> npt.NDArray[np.float64]:
    """Multi-scale structural similarity of the pairs a[i], b[i], uint8 [n, S, S] each: float64 [n], in 0..1, 1 if equal.

    Wang, Simoncelli and Bovik 2003, equation 7: contrast and structure at every scale, luminance at the last, Gaussian window
    of 11 px and deviation 1.5 inside the image, halved by 2x2 means. Small images have fewer scales (`scales_for`), whose
    weights are divided by their sum. A negative structure counts as 0. Raises `DataError` on shapes that do not fit.
    """
    if a.shape != b.shape or a.ndim != 3 or a.shape[1] != a.shape[2]:
        raise DataError(f"pairs must be two uint8 [n, S, S] of equal shape, not {a.shape} and {b.shape}")
    scales = scales_for(a.shape[1])
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    x, y = (torch.from_numpy(np.array(images)).double() / 255 for images in (a, b))
    result = torch.ones(len(a), dtype=torch.float64)
    for scale in range(scales):
        blur = _blur_matrix(x.shape[-1])
        mean_x, mean_y, square_x, square_y, product = (blur @ z @ blur.T for z in (x, y, x * x, y * y, x * y))
        var_x, var_y, shared = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
        part = (2 * shared + C2) / (var_x + var_y + C2)
        if scale == scales - 1:
            part = part * (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
        result = result * part.mean(dim=(1, 2)).clamp(min=0) ** float(weights[scale])
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    similarity: npt.NDArray[np.float64] = result.numpy()
    return similarity


def pair_similarity(
    images: Pixels, rng: np.random.Generator, *, groups: npt.NDArray[np.int64] | None = None, pairs: int = PAIRS
) -> float | None:
    """Mean MS-SSIM of `pairs` random pairs of `images` uint8 [n, S, S]; None where there is no pair.

    With `groups` [n] (patients) both images of a pair are of different groups: a patient resembles himself.
    """
    owners = np.arange(len(images)) if groups is None else groups
    if len(np.unique(owners)) < 2:
        return None
    first = rng.integers(len(images), size=pairs)
    second = np.array([rng.choice(np.flatnonzero(owners != owners[row])) for row in first])
    found = [
        ms_ssim(images[first[start : start + BLOCK]], images[second[start : start + BLOCK]])
        for start in range(0, pairs, BLOCK)
    ]
    return float(np.concatenate(found).mean())
