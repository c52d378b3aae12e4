"""Augmentation: the same numbers for the same generator, labels kept, every stated bound held, gradients
exact.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xfed.common.augment import augment, standardise


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramps(count: int = 4, size: int = 32) -> torch.Tensor:
    """Smooth images in [0.2, 0.8] that differ from left to right and from top to bottom."""
    line = torch.linspace(0, 1, size)
    image = 0.2 + 0.2 * line[None, :] + 0.4 * line[:, None]
    return image.expand(count, 1, size, size).clone()


def test_standardise_agrees_with_numpy() -> None:
    images = torch.rand(3, 1, 16, 16, generator=seeded()) * torch.tensor([0.1, 1.0, 255.0]).view(3, 1, 1, 1)
    array = images.numpy().astype(np.float64)
    expected = (array - array.mean((1, 2, 3), keepdims=True)) / array.std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(standardise(images).numpy(), expected, atol=2e-5)


def test_standardise_cancels_gain_and_offset_and_number_format() -> None:
    whole = torch.randint(0, 100, (5, 1, 16, 16), generator=seeded(), dtype=torch.uint8)
    base = standardise(whole)
    torch.testing.assert_close(standardise(whole.float() / 255), base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(standardise(2 * whole + 40), base, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(standardise(base), base, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(standardise(whole.float() ** 2), base, atol=0.05)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_flat_image_becomes_zeros(value: int) -> None:
    for flat in (torch.full((2, 1, 64, 64), value, dtype=torch.uint8), torch.full((2, 1, 64, 64), value / 255)):
        assert torch.equal(standardise(flat), torch.zeros(2, 1, 64, 64))


def test_augment_is_a_function_of_its_generator() -> None:
    images = torch.rand(6, 1, 32, 32, generator=seeded())
    before = images.clone()
    first = augment(images, seeded(5))
    assert torch.equal(first, augment(images, seeded(5)))
    assert not torch.equal(first, augment(images, seeded(6)))
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.isfinite(first).all()


def test_augment_draws_for_each_image_alone() -> None:
    changed = augment(ramps(8), seeded())
    for one in range(8):
        for other in range(one):
            assert not torch.allclose(changed[one], changed[other], atol=1e-3)


def test_augment_leaves_global_randomness_alone() -> None:
    state = torch.get_rng_state()
    augment(ramps(), seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_strength_zero_is_the_identity_and_more_is_more() -> None:
    images = torch.rand(16, 1, 32, 32, generator=seeded())
    torch.testing.assert_close(augment(images, seeded(), strength=0.0), images, atol=1e-5, rtol=0)
    smooth = ramps(64)
    change = [(augment(smooth, seeded(), strength=strength) - smooth).abs().mean() for strength in (0.1, 0.5, 1.0)]
    assert change[0] < change[1] < change[2]
    with pytest.raises(ValueError, match="strength"):
        augment(images, seeded(), strength=-0.1)


def test_the_flip_mirrors_half_of_the_images_exactly() -> None:
    images = torch.rand(400, 1, 16, 16, generator=seeded())
    flipped = augment(images, seeded(3), flip=True, strength=0.0)
    mirrored = torch.tensor([torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, images, strict=True)])
    kept = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert 140 < int(mirrored.sum()) < 260


def centre_of_mass(images: torch.Tensor) -> torch.Tensor:
    """Pixels from the middle, [B, 2] as (row, column)."""
    size = images.shape[-1]
    place = torch.arange(size) - (size - 1) / 2
    mass = images.sum(dim=(1, 2, 3))
    rows = (images.sum(dim=3)[:, 0] * place).sum(dim=1) / mass
    columns = (images.sum(dim=2)[:, 0] * place).sum(dim=1) / mass
    return torch.stack([rows, columns], dim=1)


def test_shifts_stay_within_eight_percent_and_go_all_ways() -> None:
    size = 64
    disc = torch.zeros(300, 1, size, size)
    disc[:, :, 28:36, 28:36] = 1.0
    moved = augment(disc, seeded(2))
    bright = torch.where(moved > 0.5, 1.0, 0.0)
    seen = bright.sum(dim=(1, 2, 3)) > 30  # the others lie under the erased square
    offset = centre_of_mass(bright[seen])
    assert offset.abs().max() < 0.08 * size / 0.9 + 1.5
    for axis in (0, 1):
        assert offset[:, axis].min() < -2
        assert offset[:, axis].max() > 2
        assert abs(float(offset[:, axis].mean())) < 0.6


def test_about_a_quarter_of_the_images_lose_a_square() -> None:
    white = torch.ones(800, 1, 32, 32)
    white[:, :, :8] = 0.0  # the mean is not white
    changed = augment(white, seeded(9))
    # a square of 8 x 8 pixels at the mean, cut short where it reaches over the edge
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    share = ((changed - mean).abs() < 0.02).sum(dim=(1, 2, 3))
    assert 0.15 < float((share >= 20).float().mean()) < 0.35


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 3, 16, 16), (2, 1, 16, 8)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 1, S, S\]"):
        augment(torch.zeros(shape), seeded())
