"""Augmentation before the discriminator: differentiable, one image at a time, and the edges it promises."""

from __future__ import annotations

import pytest
import torch

from xfed.common.diffaugment import POLICIES, differentiable_augment
from xfed.common.randomness import torch_generator


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_flow_and_shapes_stay(policy: str) -> None:
    images = torch.rand(5, 1, 16, 16, requires_grad=True)
    seen = differentiable_augment(images, torch_generator(1, "a"), policy)
    assert seen.shape == images.shape
    seen.sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradient_is_exact(policy: str) -> None:
    """Against finite differences, in float64."""
    images = (torch.rand(3, 1, 8, 8, generator=torch_generator(0, "x"), dtype=torch.float64) * 2 - 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: differentiable_augment(x, torch_generator(4, "a"), policy), (images,))


def test_none_is_the_identity_and_streams_repeat() -> None:
    images = torch.rand(4, 1, 16, 16)
    assert torch.equal(differentiable_augment(images, torch_generator(1, "a"), "none"), images)
    first, again, other = (differentiable_augment(images, torch_generator(s, "a"), "full") for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_translation_moves_whole_pixels_within_an_eighth_and_repeats_edges() -> None:
    ramp = torch.arange(32.0).view(1, 1, 1, 32).expand(400, 1, 32, 32)
    seen = differentiable_augment(ramp, torch_generator(3, "a"), "translation")
    moved = seen[:, 0, 5, 16] - 16
    assert set(moved.int().tolist()) == set(range(-4, 5))
    assert torch.equal(seen, seen.round())
    assert (seen.min(), seen.max()) == (0, 31)
    one = seen[moved == 4][0, 0]
    assert torch.equal(one[:, -4:], torch.full((32, 4), 31.0))


def test_full_changes_exposure_and_hides_a_square() -> None:
    images = torch.full((300, 1, 32, 32), 0.25)
    seen = differentiable_augment(images, torch_generator(4, "a"), "full")
    hidden = (seen == -1).flatten(1).sum(1)
    assert (hidden == 64).all()  # (32 / 4)^2
    shown = seen[:, 0].flatten(1).max(1).values
    assert shown.min() < -0.2
    assert shown.max() > 0.7


def test_brightness_and_contrast_stay_in_their_ranges() -> None:
    half = torch.zeros(500, 1, 16, 16)
    half[..., 8:] = 0.5
    changed = differentiable_augment(half, torch_generator(3, "a"), "full")
    visible = [torch.unique(image[image != -1.0].round(decimals=4)) for image in changed]
    spans = torch.tensor([float(values.max() - values.min()) for values in visible])
    means = torch.tensor([float((values.max() + values.min()) / 2) for values in visible]) - 0.25
    assert spans.max() <= 0.75 + 1e-3
    assert spans[spans > 0].min() >= 0.25 - 1e-3
    assert means.abs().max() <= 0.5 + 1e-3
    assert means.min() < -0.4
    assert means.max() > 0.4


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="translation, full, none"):
        differentiable_augment(torch.rand(1, 1, 8, 8), torch_generator(1, "a"), "flip")
