"""What a site computes about the archive in the features of a classifier: sums and scores per class, no image, no single feature.

::

    real images of class c --features--> project to 64 --> two halves by patient --> sums for FID   "c/half0/..." and 1
                                              first 16 --> the same halves --------> sums for KID   "c/kernel0/..." and 1
    synthetic images of c  --features--> project to 64 --> precision, recall, density, coverage; KID of this site;
    pairs of real images of two patients ----------------> their similarity (MS-SSIM)               all in "c/scores"

The projection is a fixed Gaussian matrix (Johnson and Lindenstrauss 1984), the same at every site: a few hundred images cannot
fill a 4,096-dimensional covariance, and its sum would be 134 MB per class on the wire. The sums for KID are zero where one of
the halves has fewer than `kernel_sums.LEAST` images (why: there). Neighbours across sites would need single features to leave, so
precision, recall, density and coverage stay figures of one site.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.store import Store
from xfed.common.diversity import pair_similarity
from xfed.common.features import KERNEL_DIMENSIONS, SCORES, project_features
from xfed.common.frechet import density_coverage, feature_sums, kid, precision_recall, to_arrays
from xfed.common.kernel_sums import LEAST, kernel_sums, kernel_to_arrays
from xfed.common.randomness import numpy_generator

__all__ = ["measure_archive", "real_sums", "site_scores"]

NEIGHBOURS = 5
MOST = 500

Features = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[Any]]


def measure_archive(
    model: torch.nn.Module,
    store: Store,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    *,
    device: torch.device,
    precision: str,
    scale: float,
    thinning: npt.NDArray[np.int64],
) -> Arrays:
    """Arrays as drawn above; "c/scores" is float64 [1 + len(SCORES)]: images compared (0: too few), then the scores.

    `scale` divides the features that KID sees, so that its cubes keep to a few digits; of class c's second half every
    2^thinning[c]-th image counts for FID. Both are the coordinator's, from the archive and from counts alone.
    """
    arrays: Arrays = {}
    for label in range(len(store.classes)):
        rows = np.flatnonzero((store.labels == label) & (store.splits >= 0))
        patients = store.patients[rows]
        real = project_features(model, store.images[rows], device, precision)
        fakes = images[labels == label][:MOST]
        fake = project_features(model, fakes, device, precision)
        similarity = pair_similarity(store.images[rows], numpy_generator(0, "pairs of real images"), groups=patients)
        scores = site_scores(real, fake, scale, similarity)
        part = real_sums(real, patients, scale, int(thinning[label])) | {"scores": scores}
        arrays |= {f"{label}/{key}": value for key, value in part.items()}
    return arrays


def real_sums(real: Features, patients: npt.NDArray[np.int64], scale: float, times: int = 0) -> Arrays:
    """Sums over the halves (patients of even and of odd number) of `real` [n, 64]: "half0/...", "kernel0/...", and of 1.

    The second half for FID is every 2^times-th image of it. KID needs no equal numbers: its sums are over whole halves.
    """
    arrays: Arrays = {}
    odd = patients % 2 == 1
    halves = real[~odd], real[odd]
    kept = slice(None) if min(map(len, halves)) >= LEAST else slice(0)
    for half, features in enumerate(halves):
        thinned = features[:: 2**times] if half else features
        for name, sums in (
            ("half", to_arrays(feature_sums(thinned))),
            ("kernel", kernel_to_arrays(kernel_sums(features[kept, :KERNEL_DIMENSIONS], scale))),
        ):
            arrays |= {f"{name}{half}/{key}": value for key, value in sums.items()}
    return arrays


def site_scores(real: Features, fake: Features, scale: float, similarity: float | None) -> Features:
    """Float64 [1 + len(SCORES)]: images compared on each side, at most `MOST`, then the scores.

    All 0 where there are too few images, or no two patients whose `similarity` could be measured.
    """
    count = min(len(real), len(fake), MOST)
    scores = np.zeros(1 + len(SCORES))
    if count > 2 * NEIGHBOURS and similarity is not None:
        real, fake = real[:count], fake[:count]
        floor, narrow = count // 2, slice(None, KERNEL_DIMENSIONS)
        scores[0] = count
        scores[1:] = (
            kid(real[:, narrow] / scale, fake[:, narrow] / scale),
            kid(real[:floor, narrow] / scale, real[floor:, narrow] / scale),
            *precision_recall(real, fake, NEIGHBOURS),
            *density_coverage(real, fake, NEIGHBOURS),
            similarity,
        )
    return scores
