"""The distance of a copy: against a slow version, what it sees through and what not, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xfed.common import nearest as module
from xfed.common.nearest import SHIFT, distance_matrix, nearest
from xfed.common.randomness import numpy_generator
from xfed.simulations.phantom import phantom_arrays
from xfed.simulations.planted_copies import plant

CLASSES = ("Cardiomegaly", "Normal")


def _phantoms(size: int, count: int = 6, seed: int = 3) -> Any:
    return phantom_arrays(
        classes=CLASSES, patients=dict.fromkeys(CLASSES, count), images_per_patient=1.0, size=size, seed=seed
    )[0]


def _slow(query: Any, reference: Any) -> float:
    """One pair, written down from the module's drawing with plain loops."""

    def pooled(picture: Any, width: int, stride: int) -> Any:
        side = (len(picture) - width) // stride + 1
        return np.array(
            [
                [picture[y * stride : y * stride + width, x * stride : x * stride + width].mean() for x in range(side)]
                for y in range(side)
            ]
        )

    def look(picture: Any) -> Any:
        flat = pooled(pooled(pooled(picture / 255, factor, factor), 3, 1), 3, 2).ravel()
        flat = flat - flat.mean()
        return flat / np.sqrt((flat**2).sum())

    size = len(query)
    factor = size // 32
    margin = factor * int(np.ceil(SHIFT / factor))
    side = size - 2 * margin
    middle = look(query[margin : margin + side, margin : margin + side])
    best = -1.0
    for picture in (reference, reference[:, ::-1]):
        for y in range(margin - SHIFT, margin + SHIFT + 1):
            for x in range(margin - SHIFT, margin + SHIFT + 1):
                best = max(best, float(middle @ look(picture[y : y + side, x : x + side])))
    return float(np.sqrt(2 - 2 * best))


@pytest.mark.parametrize("size", [32, 64])
def test_it_is_the_slow_version(size: int) -> None:
    images = _phantoms(size, 2)
    matrix = distance_matrix(images[:2], images[2:])
    for i, query in enumerate(images[:2]):
        for j, reference in enumerate(images[2:]):
            assert matrix[i, j] == pytest.approx(_slow(query, reference), abs=2e-3)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_copies_are_near_and_other_patients_are_not(size: int) -> None:
    images = _phantoms(size)
    rng = numpy_generator(1, "plant")
    strangers = nearest(images, images, owners=(np.arange(12), np.arange(12))).distance
    for kind in ("exact", "shifted by 1", "shifted by 2", "mirrored"):
        assert nearest(plant(images, rng)[kind], images).distance.max() < 2e-3, kind
    exposed = plant(images, rng)["exposure"]  # pixels are rounded to whole numbers
    assert nearest(exposed, images).distance.max() < 0.05
    assert nearest(plant(images, rng)["grain 5/255"], images).distance.max() < 0.06
    assert strangers.min() > 0.1


def test_a_shift_beyond_the_reach_is_seen_as_another_picture() -> None:
    images = _phantoms(32)
    far = np.roll(images, 5, axis=2)
    assert nearest(far, images).distance.min() > 0.1


def test_a_flat_picture_is_far_from_everything() -> None:
    flat, images = np.full((2, 32, 32), 90, np.uint8), _phantoms(32)
    for matrix in (distance_matrix(flat, images), distance_matrix(images, flat), distance_matrix(flat, flat)):
        np.testing.assert_allclose(matrix, np.sqrt(2), atol=1e-6)


def test_rows_and_owners() -> None:
    images = _phantoms(32)
    found = nearest(images[::-1], images)
    np.testing.assert_array_equal(found.row, np.arange(12)[::-1])
    owners = np.arange(12) // 2
    matrix = distance_matrix(images, images)
    matrix[owners[:, None] == owners[None]] = np.inf
    others = nearest(images, images, owners=(owners, owners))
    np.testing.assert_array_equal(others.row, matrix.argmin(1))
    np.testing.assert_array_equal(others.distance, matrix.min(1))
    alone = nearest(images[:2], images[:2], owners=(np.zeros(2, np.int64), np.zeros(2, np.int64)))
    assert np.isinf(alone.distance).all()
    nobody = nearest(images, images[:0])
    assert np.isinf(nobody.distance).all()
    assert (nobody.row == -1).all()
    assert len(nearest(images[:0], images).row) == 0


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images = _phantoms(32)
    whole = nearest(images, images[3:], owners=(np.arange(12), np.arange(3, 12)))
    monkeypatch.setattr(module, "QUERIES", 5)
    monkeypatch.setattr(module, "WINDOWS", 100)
    parts = nearest(images, images[3:], owners=(np.arange(12), np.arange(3, 12)))
    np.testing.assert_array_equal(parts.row, whole.row)
    np.testing.assert_allclose(parts.distance, whole.distance, atol=1e-4)
