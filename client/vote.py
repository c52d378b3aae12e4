"""A hospital's vote on the archive: which synthetic images are nearer to a training image than another patient would be.

::

    archive --nearest training image-->  a --+
            --nearest held-out image-->  b --+--> log(a / b), in pixels (xfed.common.nearest) and in a classifier's features
    held-out images (validation and test), against training images and against other held-out patients: the same ratio
        --centre and spread--> the limit that an honest image falls below with a chance of `HONEST` over all sites and both tests
    veto: below a limit, or as good as identical to a training image (pixel distance `IDENTICAL` or less)

Held-out patients were seen by no generator, so their ratios say how near two different patients come at this hospital. What
leaves is a 0 or 1 for each image; no distance does. With fewer than `LEAST` held-out images there is no such limit: then only
what is as good as identical is vetoed, and the vote says that it was not calibrated.

Formal guarantees
    An image drawn like the hospitals' held-out patients is vetoed, by any of them, with a chance of about `HONEST` or less, if
    log ratios have tails no heavier than Student's t with `FREEDOM` degrees (measured: docs/archive-privacy.md).
    The same archive, store and weights give the same vote.
Not covered
    Copies that are rotated, scaled or cut; a feature of a patient in an otherwise new image; a training image of another
    hospital (which votes itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from xfed.client.store import Store
from xfed.common.features import project_features
from xfed.common.intervals import student_quantile
from xfed.common.nearest import nearest

__all__ = ["HONEST", "IDENTICAL", "LEAST", "Vote", "limit_of", "vote"]

HONEST = 0.01
"""Share of honest images that may be vetoed, by all sites and both tests together, as far as `FREEDOM` describes the tails."""
FREEDOM = 8
LEAST = 20
"""Held-out images below which no limit is worth much."""
IDENTICAL = 0.05
"""Pixel distance of copies with a little grain (0.04 at 32 px, 0.01 at 128); two patients: 0.10 and more."""
NARROW = 0.05
"""Least spread of log ratios: a handful of equal ones must not make the limit sharp."""
TINY = 1e-3
CHUNK = 1024

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]
Ratios = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Vote:
    """`vetoed` bool [n], per image of the archive; `calibrated`: enough held-out images to compare with."""

    vetoed: npt.NDArray[np.bool_]
    calibrated: bool


def vote(
    store: Store, images: Images, model: torch.nn.Module, device: torch.device, precision: str, *, sites: int
) -> Vote:
    """The vote on `images` uint8 [n, S, S] of a hospital with `store`, one of `sites`.

    `model` needs a method ``features(images)``; its features are used as in `xfed.common.features`.
    """
    train, held = store.rows("train"), np.flatnonzero(store.splits > 0)
    if not len(train):
        return Vote(np.zeros(len(images), bool), False)
    known = np.asarray(store.images[train])
    to_train = nearest(images, known, device=device).distance
    vetoed = to_train <= IDENTICAL
    if len(held) < LEAST or len(np.unique(store.patients[held])) < 2:
        return Vote(vetoed, False)
    others, patients = np.asarray(store.images[held]), store.patients[held]
    ratios = _log_ratio(to_train, nearest(images, others, device=device).distance)
    own = _log_ratio(
        nearest(others, known, device=device).distance,
        nearest(others, others, owners=(patients, patients), device=device).distance,
    )
    chance = HONEST / (2 * sites)
    vetoed |= ratios < limit_of(own, chance)

    seen, real, new = (project_features(model, batch, device, precision) for batch in (known, others, images))
    scale = float(np.median(_nearest_features(real, seen))) or 1.0
    ratios = _log_ratio(_nearest_features(new, seen) / scale, _nearest_features(new, real) / scale)
    own = _log_ratio(_nearest_features(real, seen) / scale, _nearest_features(real, real, (patients, patients)) / scale)
    return Vote(vetoed | (ratios < limit_of(own, chance)), True)


def limit_of(ratios: Ratios, chance: float) -> float:
    """The log ratio below which another image like these falls with a chance of `chance`: centre - t * spread.

    Centre is the median; spread the standard deviation after cutting back to 3 spreads (by the median deviation), so that
    a held-out image that is in the training images, too, does not widen it; t is Student's, with `FREEDOM` degrees.
    """
    centre = float(np.median(ratios))
    rough = max(NARROW, 1.4826 * float(np.median(np.abs(ratios - centre))))
    cut = np.clip(ratios, centre - 3 * rough, centre + 3 * rough)
    spread = max(NARROW, float(np.sqrt(np.mean((cut - centre) ** 2))))
    return centre - student_quantile(1 - 2 * chance, FREEDOM) * spread * math.sqrt(1 + 1 / len(ratios))


def _log_ratio(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> Ratios:
    ratio: Ratios = np.log((a.astype(np.float64) + TINY) / (b.astype(np.float64) + TINY))
    return ratio


def _nearest_features(
    queries: Features,
    references: Features,
    owners: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
) -> Features:
    """Euclidean distance float64 [n] to the nearest reference that is not the query's own."""
    squares = (references**2).sum(1)
    found = np.empty(len(queries))
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        table = (part**2).sum(1)[:, None] + squares[None] - 2 * part @ references.T
        if owners is not None:
            table[owners[0][start : start + CHUNK, None] == owners[1][None]] = np.inf
        found[start : start + CHUNK] = np.sqrt(np.maximum(table.min(1), 0))
    return found
