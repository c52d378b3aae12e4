"""How near one picture is to another, whatever the exposure, a mirroring and a shift by a pixel or two: the distance of a copy.

::

    images uint8 [n, S, S] --> query: its middle;  reference: its middle under every shift, mirrored or not
    each: --> about 32 x 32 by means over squares, smoothed, every second pixel --> minus its mean, divided by its norm
          --products--> correlation r --> distance sqrt(2 - 2 max r), 0..2

0: the same picture up to brightness, contrast, mirroring and shift; sqrt(2): nothing in common. Smoothing makes copies near
that have lost or gained grain (generated ones have none). Pairs are worked off in blocks: memory does not grow with
their number, and nothing is written to disk. What it does not see through: rotation and scaling by more than about a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["SHIFT", "Nearest", "distance_matrix", "nearest"]

SIDE = 32
SHIFT = 2
"""Pixels, at the images' own size, that a copy may be shifted by in each direction."""
QUERIES = 1024
WINDOWS = 4096
FLAT = 1e-6
"""Least norm, in units of full white, of a picture that shows anything."""

Images = npt.NDArray[np.uint8]
Owners = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Nearest:
    """Per query the `distance` float32 [n] to the nearest reference (infinity: there is none) and its `row` int64 [n] (or -1)."""

    distance: npt.NDArray[np.float32]
    row: npt.NDArray[np.int64]


def nearest(
    queries: Images,
    references: Images,
    *,
    owners: tuple[Owners, Owners] | None = None,
    device: torch.device | None = None,
) -> Nearest:
    """The nearest of `references` uint8 [m, S, S] to each of `queries` uint8 [n, S, S].

    `owners`: of every query and of every reference; references of the query's own owner are not looked at.
    """
    distance = np.full(len(queries), np.inf, np.float32)
    row = np.full(len(queries), -1, np.int64)
    for rows, columns, block in _blocks(queries, references, device):
        if owners is not None:
            block[owners[0][rows, None] == owners[1][None, columns]] = np.inf
        best = block.argmin(1)
        found = block[np.arange(len(block)), best]
        nearer = found < distance[rows]
        distance[rows] = np.where(nearer, found, distance[rows])
        row[rows] = np.where(nearer, best + columns.start, row[rows])
    return Nearest(distance, row)


def distance_matrix(
    queries: Images, references: Images, *, device: torch.device | None = None
) -> npt.NDArray[np.float32]:
    """All distances float32 [n, m]; for few images."""
    matrix = np.zeros((len(queries), len(references)), np.float32)
    for rows, columns, block in _blocks(queries, references, device):
        matrix[rows, columns] = block
    return matrix


def _blocks(
    queries: Images, references: Images, device: torch.device | None
) -> Iterator[tuple[slice, slice, npt.NDArray[np.float32]]]:
    if not len(queries) or not len(references):
        return
    starts = range(0, len(queries), QUERIES)
    middles = [_windows(queries[top : top + QUERIES], 0, device)[:, 0] for top in starts]  # 600 bytes a picture
    step = max(1, WINDOWS // (2 * (2 * SHIFT + 1) ** 2))
    for left in range(0, len(references), step):
        windows = _windows(references[left : left + step], SHIFT, device)
        for top, middle in zip(starts, middles, strict=True):
            best = (middle @ windows.flatten(0, 1).T).view(len(middle), len(windows), -1).amax(2)
            block = (2 - 2 * best).clamp(min=0).sqrt().cpu().numpy()
            yield slice(top, top + len(middle)), slice(left, left + len(windows)), block


def _windows(images: Images, reach: int, device: torch.device | None) -> Tensor:
    """[n, k, d]: the middle under every shift of up to `reach`, of each image and its mirror image; for 0 the image's alone."""
    pixels = torch.from_numpy(np.array(images)).to(device or "cpu").float()[:, None] / 255
    both = torch.cat([pixels, pixels.flip(-1)], 1) if reach else pixels
    factor = max(1, images.shape[-1] // SIDE)
    margin = -(-SHIFT // factor) * factor
    side = images.shape[-1] - 2 * margin
    starts = range(margin - reach, margin + reach + 1)
    shifted = [_smooth(both[:, :, y : y + side, x : x + side], factor) for y in starts for x in starts]
    return _normalised(torch.stack(shifted, 2).flatten(1, 2))


def _smooth(images: Tensor, factor: int) -> Tensor:
    """[n, k, d]: brought to 32 x 32 (less the margin), two means over 3 x 3 pixels, every second pixel."""
    coarse = torch.nn.functional.avg_pool2d(images, factor)
    return torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(coarse, 3, 1), 3, 2).flatten(2)


def _normalised(pixels: Tensor) -> Tensor:
    """Minus the mean, divided by the norm; a flat picture becomes 0, which is sqrt(2) from everything."""
    centred = pixels - pixels.mean(-1, keepdim=True)
    norm = centred.norm(dim=-1, keepdim=True)
    return torch.where(norm > FLAT * pixels.shape[-1] ** 0.5, centred / norm.clamp(min=FLAT), 0.0)
