"""An archive's figures of one class from sums over sites: what the coordinator, and anybody with the sums, computes.

::

    a site's arrays ("half0/...", "kernel0/...", "scores") --add_site--> sums over sites
    the sums + features of synthetic images --class_figures--> FID, KID, their floors, the sites' mean scores

FID is biased by the numbers of images: `thinning` says how often the second half of the real images is halved, so that it has no
more of them than the archive, and both figures compare the first half with equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError
from xfed.common.features import DIMENSIONS, KERNEL_DIMENSIONS, SCORES
from xfed.common.frechet import FeatureSums, add, feature_sums, frechet_distance, from_arrays, zero
from xfed.common.kernel_sums import (
    KernelSums,
    add_kernel,
    kernel_distance,
    kernel_from_arrays,
    kernel_sums,
    kernel_zero,
)
from xfed.common.weights import under

__all__ = ["MOST_THINNING", "SUMS_FILE", "RealSums", "add_site", "class_figures", "scale_of", "thinning"]

LEAST = 2
SUMS_FILE = "sums of features of real images"
"""The kind of a file of sums that a hospital wrote by hand (`xfed-client score --sums`)."""
MOST_THINNING = 6
UNEVEN = 0.08
"""By how much of a class the halves by patient may differ from a half of its images."""


@dataclass(frozen=True)
class RealSums:
    """One class over all sites: both halves for FID and for KID, and the sites' scores times images [1 + len(SCORES)]."""

    halves: tuple[FeatureSums, FeatureSums]
    kernels: tuple[KernelSums, KernelSums]
    scores: npt.NDArray[np.float64]

    @classmethod
    def nothing(cls) -> RealSums:
        """The sums over no site."""
        half, kernel = zero(DIMENSIONS), kernel_zero(KERNEL_DIMENSIONS)
        return cls((half, half), (kernel, kernel), np.zeros(1 + len(SCORES)))


def add_site(total: RealSums, arrays: Mapping[str, npt.NDArray[Any]]) -> RealSums:
    """`total` and one site's answer about one class ("half0/...", "kernel0/...", "scores"). Raises `FederationError`."""
    row = arrays.get("scores", np.zeros(0))
    if row.shape != total.scores.shape or not np.isfinite(row).all() or row[0] < 0:
        raise FederationError(f"a site sent scores of shape {row.shape}, expected {total.scores.shape} finite numbers")
    halves = tuple(add(total.halves[half], from_arrays(under(arrays, f"half{half}/"))) for half in (0, 1))
    kernels = tuple(
        add_kernel(total.kernels[half], kernel_from_arrays(under(arrays, f"kernel{half}/"))) for half in (0, 1)
    )
    weighted = np.append(row[:1], row[0] * row[1:])
    return RealSums((halves[0], halves[1]), (kernels[0], kernels[1]), total.scores + weighted)


def scale_of(fakes: list[npt.NDArray[np.float64]]) -> float:
    """Root mean square of the synthetic images' features: KID is then free of the classifier's own scale."""
    features = np.concatenate(fakes)[:, :KERNEL_DIMENSIONS]
    return float(np.clip(np.sqrt((features**2).mean()), 2.0**-20, 2.0**20)) if len(features) else 1.0


def thinning(real: npt.NDArray[np.int64], synthetic: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often the second half of each class is halved, so that it has no more images than the archive, int64 [C]."""
    half = real * (0.5 + UNEVEN)
    times = np.ceil(np.log2(np.maximum(half, 1) / np.maximum(synthetic, 1)))
    result: npt.NDArray[np.int64] = np.clip(times, 0, MOST_THINNING).astype(np.int64)
    return result


def class_figures(real: RealSums, fake: npt.NDArray[np.float64], scale: float) -> dict[str, Any]:
    """Distances, floors, scores and the numbers of images behind them, of one class with synthetic features [n, 64]."""
    first, second = real.halves
    fake = fake[: second.count]
    weight = real.scores[0]
    result: dict[str, Any] = {
        key: float(value / weight) if weight else None for key, value in zip(SCORES, real.scores[1:], strict=True)
    }
    result |= {
        "fid": None,
        "fid_floor": None,
        "images_compared": len(fake),
        "images_real": first.count,
        "images_floor": second.count,
        "equal_numbers": len(fake) == second.count,
        "kid_pooled": False,
    }
    if min(first.count, second.count, len(fake)) < LEAST:
        return result
    result["fid"] = frechet_distance(first, feature_sums(fake))
    result["fid_floor"] = frechet_distance(first, second)
    if real.kernels[0].count == first.count:  # every site that holds the class gave its sums, of both halves
        own = kernel_sums(fake[:, :KERNEL_DIMENSIONS], scale)
        result["kid"] = kernel_distance(real.kernels[0], own)
        result["kid_floor"] = kernel_distance(*real.kernels)
        result["kid_pooled"] = True
    return result
