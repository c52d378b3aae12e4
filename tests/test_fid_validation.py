"""The distance rises with every known damage, level by level, in the features that a study judges its archive by."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from xfed.simulations import fid_validation as fv
from xfed.simulations.fid_validation import DISTURBANCES, LEVELS, Disturbed, disturb, validate

CLASSES = ("Normal", "Cardiomegaly")


@pytest.fixture(scope="module")
def measured() -> Disturbed:
    study = fv.study_for(32, CLASSES, 8)
    return validate(study, patients=60, steps=120, device=torch.device("cpu"))


@pytest.mark.parametrize("name", DISTURBANCES)
def test_fid_rises_strictly_with_every_level_of_damage(measured: Disturbed, name: str) -> None:
    mean = measured.fid[list(DISTURBANCES).index(name)].mean(axis=0)
    assert (np.diff(mean) > 0).all(), mean
    assert mean[-1] > 2 * mean[0], "the strongest damage is plain"


@pytest.mark.parametrize("name", DISTURBANCES)
def test_kid_ends_far_above_its_floor(measured: Disturbed, name: str) -> None:
    mean = measured.kid[list(DISTURBANCES).index(name)].mean(axis=0)
    assert mean[-1] > 3 * abs(mean[0])
    assert mean[-1] == mean.max()


@pytest.mark.parametrize("name", DISTURBANCES)
def test_damage_is_nested_repeatable_and_none_at_level_0(name: str) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(60, 200, (20, 32, 32), dtype=np.uint8)
    others = rng.integers(60, 200, (20, 32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(disturb(name, images, 0, others), images)
    before = 0.0
    for level in LEVELS[1:]:
        damaged = disturb(name, images, level, others)
        np.testing.assert_array_equal(damaged, disturb(name, images, level, others))
        assert damaged.shape == images.shape
        assert damaged.dtype == np.uint8
        changed = float(np.mean(damaged != images)) if name in ("rectangles", "other class") else float(level)
        assert changed > before
        before = changed


def test_swirl_turns_the_centre_by_its_angle_and_keeps_grey_levels() -> None:
    size = 64
    x, y = np.meshgrid(np.arange(size) - 31.5, np.arange(size) - 31.5)
    wedge = (np.abs(np.arctan2(y, x)) < 0.15) & (np.hypot(x, y) < 8)
    image = np.where(wedge, 220, 40).astype(np.uint8)[None]
    turned = disturb("swirl", image, 5, image)[0] > 130
    angle = float(np.arctan2(y[turned], x[turned]).mean())
    assert abs(angle) == pytest.approx(fv.SWIRL[5] * np.exp(-0.15), abs=0.12)
    flat = np.full((1, 32, 32), 77, np.uint8)
    np.testing.assert_array_equal(disturb("swirl", flat, 5, flat), flat)


def test_contamination_takes_the_share_it_says() -> None:
    images, others = np.zeros((50, 8, 8), np.uint8), np.ones((50, 8, 8), np.uint8)
    for level, share in enumerate(fv.CONTAMINATION):
        assert disturb("other class", images, level, others).mean() == pytest.approx(share, abs=0.011)


def test_table_and_picture_say_what_was_measured(measured: Disturbed) -> None:
    table = measured.table()
    for row, name in enumerate(DISTURBANCES):
        line = next(line for line in table.splitlines() if line.startswith(f"| {name}"))
        for value in measured.fid[row].mean(axis=0):
            assert f"{value:.2f}" in line
    with Image.open(io.BytesIO(fv.picture(measured))) as picture:
        assert picture.width > 800
    assert measured.shown.shape == (len(DISTURBANCES), len(LEVELS), 32, 32)
