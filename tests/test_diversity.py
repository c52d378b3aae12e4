"""MS-SSIM against a slow version written from the paper, its known properties, and what it says of collapsed generators."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import convolve

from xfed.common.diversity import ms_ssim, pair_similarity, scales_for
from xfed.common.errors import DataError
from xfed.simulations.phantom import phantom_arrays

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def _phantoms(each: int, size: int = 64, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    images, _, patients = phantom_arrays(
        classes=("Normal",), patients={"Normal": each}, images_per_patient=1.0, size=size, seed=seed
    )
    return images, patients


def _slow(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """Wang, Simoncelli and Bovik 2003, equations 1 to 7, one pair, a two-dimensional window moved over the whole image."""
    axis = np.arange(11) - 5.0
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def local(x: np.ndarray) -> np.ndarray:
        return convolve(x, window, mode="constant")[5:-5, 5:-5]

    x, y = a.astype(float), b.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    exponents = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    result = 1.0
    for scale in range(scales):
        mx, my = local(x), local(y)
        sx, sy, sxy = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
        contrast_structure = (2 * sxy + c2) / (sx + sy + c2)
        luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
        term = (luminance * contrast_structure if scale == scales - 1 else contrast_structure).mean()
        result *= max(term, 0.0) ** exponents[scale]
        x, y = (z.reshape(len(z) // 2, 2, len(z) // 2, 2).mean(axis=(1, 3)) for z in (x, y))
    return float(result)


@pytest.mark.parametrize(("size", "scales"), [(32, 2), (64, 3), (128, 4), (256, 5)])
def test_it_equals_the_slow_version_at_every_size(size: int, scales: int) -> None:
    images, _ = _phantoms(4, size)
    noisy = np.clip(images + np.random.default_rng(0).normal(scale=20, size=images.shape), 0, 255).astype(np.uint8)
    assert scales_for(size) == scales
    for pair in ((images[:2], images[2:4]), (images[:2], noisy[:2]), (images[:2], 255 - images[:2])):
        expected = [_slow(x, y, scales) for x, y in zip(*pair, strict=True)]
        assert ms_ssim(*pair) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_pair_of_flat_images_in_closed_form() -> None:
    a, b = np.full((1, 32, 32), 100, np.uint8), np.full((1, 32, 32), 180, np.uint8)
    x, y, c1 = 100 / 255, 180 / 255, 0.01**2
    luminance = (2 * x * y + c1) / (x * x + y * y + c1)
    assert ms_ssim(a, b)[0] == pytest.approx(luminance ** (0.2856 / (0.0448 + 0.2856)), rel=1e-9)


def test_equal_images_are_1_order_does_not_matter_and_more_noise_is_less_alike() -> None:
    images, _ = _phantoms(3)
    assert ms_ssim(images, images) == pytest.approx(1, abs=1e-12)
    assert ms_ssim(images, images[::-1]) == pytest.approx(ms_ssim(images[::-1], images))
    rng = np.random.default_rng(1)
    found = [
        float(ms_ssim(images, np.clip(images + rng.normal(scale=s, size=images.shape), 0, 255).astype(np.uint8)).mean())
        for s in (2, 8, 20, 50, 120)
    ]
    assert found == sorted(found, reverse=True)
    assert 0 <= found[-1] < 0.6 < 0.99 < found[0] < 1


def test_collapsed_generators_are_told_from_varied_ones() -> None:
    varied, _ = _phantoms(60)
    rng = np.random.default_rng(2)
    few = varied[rng.integers(3, size=60)]
    one = np.repeat(varied[:1], 60, axis=0)
    noise = rng.integers(0, 256, varied.shape, dtype=np.uint8)

    def alike(images: np.ndarray) -> float:
        found = pair_similarity(images, np.random.default_rng(0))
        assert found is not None
        return found

    assert alike(one) == pytest.approx(1)
    assert alike(noise) < 0.1
    assert alike(noise) < alike(varied) < alike(few) < alike(one)
    assert alike(few) > alike(varied) + 0.05


def test_pairs_are_of_two_patients_random_and_repeatable() -> None:
    images, _ = _phantoms(2)
    both = np.repeat(images, 5, axis=0)
    patients = np.repeat([7, 9], 5)
    across = pair_similarity(both, np.random.default_rng(0), groups=patients)
    assert across == pytest.approx(float(ms_ssim(images[:1], images[1:])[0]))
    assert pair_similarity(both, np.random.default_rng(0)) > across
    assert pair_similarity(both, np.random.default_rng(0), groups=np.zeros(10, np.int64)) is None
    assert pair_similarity(images[:1], np.random.default_rng(0)) is None
    more, _ = _phantoms(30)
    first, again, other = (pair_similarity(more, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert math.isclose(first or 0, other or 0, abs_tol=0.05)


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((2, 32, 32), np.uint8)
    for a, b in ((x, x[:1]), (x[0], x[0]), (x[:, :16], x[:, :16])):
        with pytest.raises(DataError, match="pairs must be"):
            ms_ssim(a, b)
    with pytest.raises(DataError, match="smaller than the 11 px window"):
        ms_ssim(x[:, :8, :8], x[:, :8, :8])
