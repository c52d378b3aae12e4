"""What a site computes about the archive in the features of a classifier: sums and scores per class, no image, no single feature.

::

    real images of class c --features--> project to 64 --> two halves by patient --> "c/half0/..." and "c/half1/..."
    synthetic images of c  --features--> project to 64 --> KID, precision, recall, density, coverage    "c/scores"

The projection is a fixed Gaussian matrix (Johnson and Lindenstrauss 1984), the same at every site: a few hundred images cannot
fill a 4,096-dimensional covariance, and its sum would be 134 MB per class on the wire.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.store import Store
from xfed.common.features import SCORES, project_features
from xfed.common.frechet import density_coverage, feature_sums, kid, precision_recall, to_arrays

__all__ = ["measure_archive"]

NEIGHBOURS = 5
MOST = 500


def measure_archive(
    model: torch.nn.Module,
    store: Store,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    device: torch.device,
    precision: str,
) -> dict[str, npt.NDArray[Any]]:
    """Arrays as drawn above; "c/scores" is float64 [1 + len(SCORES)]: images compared (0: too few), then the scores."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for label in range(len(store.classes)):
        rows = np.flatnonzero((store.labels == label) & (store.splits >= 0))
        real = project_features(model, store.images[rows], device, precision)
        odd = store.patients[rows] % 2 == 1
        for half, features in enumerate((real[~odd], real[odd])):
            for key, value in to_arrays(feature_sums(features)).items():
                arrays[f"{label}/half{half}/{key}"] = value
        fake_rows = np.flatnonzero(labels == label)
        count = min(len(rows), len(fake_rows), MOST)
        scores = np.zeros(1 + len(SCORES))
        if count > 2 * NEIGHBOURS:
            fake = project_features(model, images[fake_rows[:count]], device, precision)
            sample = real[:count]
            floor = count // 2
            scores[0] = count
            scores[1:] = (
                kid(sample, fake),
                kid(sample[:floor], sample[floor:]),
                *precision_recall(sample, fake, NEIGHBOURS),
                *density_coverage(sample, fake, NEIGHBOURS),
            )
        arrays[f"{label}/scores"] = scores
    return arrays
