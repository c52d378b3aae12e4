"""PGGAN's layers against plain ones, growth that changes no picture by itself, and a schedule that only knows the step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from xfed.common.errors import ConfigError
from xfed.common.gan import render
from xfed.common.growing import Place, Schedule, stages_of
from xfed.common.per_patient import check_private
from xfed.common.pggan import (
    Discriminator,
    EqualConv2d,
    EqualLinear,
    Generator,
    batch_deviation,
    channels_for,
    draw_latent,
    enlarge,
    faded,
    pixel_norm,
    shrink,
)
from xfed.common.randomness import torch_generator


def _g(size: int = 32) -> Generator:
    return Generator(size, 1, 16, torch_generator(5, "g"))


def _d(size: int = 32, *, deviation: bool = True) -> Discriminator:
    return Discriminator(size, 1, torch_generator(5, "d"), deviation=deviation)


def _images(size: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, size, size, generator=torch_generator(2, "images", size)) * 2 - 1


def test_an_equalised_convolution_is_a_plain_one_with_scaled_weights_and_its_gradient_is_scaled_too() -> None:
    ours, plain = EqualConv2d(3, 5, 3), nn.Conv2d(3, 5, 3, padding=1)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    scale = math.sqrt(2 / (3 * 9))
    with torch.no_grad():
        plain.weight.copy_(ours.weight * scale)
        plain.bias.copy_(ours.bias)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), plain(x))
    ours(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad * scale, rtol=1e-4, atol=1e-4)


def test_an_equalised_linear_layer_is_a_plain_one_with_scaled_weights() -> None:
    ours, plain = EqualLinear(7, 4, gain=1), nn.Linear(7, 4)
    nn.init.normal_(ours.weight)
    with torch.no_grad():
        plain.weight.copy_(ours.weight / math.sqrt(7))
        plain.bias.zero_()
    x = torch.randn(3, 7)
    torch.testing.assert_close(ours(x), plain(x))


def test_weights_begin_as_standard_normal_and_layers_keep_the_scale_of_what_they_are_given() -> None:
    layer = next(m for m in Generator(32, 8, 16, torch_generator(1, "g")).modules() if isinstance(m, EqualConv2d))
    assert layer.weight.std().item() == pytest.approx(1, rel=0.02)
    assert not layer.bias.any()
    out = layer(torch.randn(4, layer.weight.shape[1], 16, 16))[:, :, 2:-2, 2:-2]
    assert out.std().item() == pytest.approx(math.sqrt(2), rel=0.1)  # the gain, for the half that the activation takes


def test_pixel_norm_gives_each_pixel_a_root_mean_square_of_one() -> None:
    x = torch.randn(3, 6, 4, 4) * torch.rand(3, 1, 4, 4) * 100
    normed = pixel_norm(x)
    torch.testing.assert_close(normed.square().mean(dim=1), torch.ones(3, 4, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed[0, :, 1, 2] / normed[0, 0, 1, 2], x[0, :, 1, 2] / x[0, 0, 1, 2])


def test_batch_deviation_in_closed_form() -> None:
    x = torch.zeros(4, 2, 3, 3)
    x[:2, 0], x[2:, 0] = 1.0, 5.0  # channel 0: half 1, half 5, so 2 everywhere; channel 1: equal, so 0
    out = batch_deviation(x)
    assert out.shape == (4, 3, 3, 3)
    torch.testing.assert_close(out[:, :2], x)
    torch.testing.assert_close(out[:, 2], torch.full((4, 3, 3), 1.0), rtol=0, atol=1e-3)
    assert batch_deviation(torch.ones(5, 2, 3, 3))[:, 2].max() <= 1e-3  # all alike


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_begins_as_the_enlarged_one_before_and_ends_as_itself(stage: int) -> None:
    g, z = _g(), draw_latent(3, 16, torch_generator(1, "z"))
    with torch.no_grad():
        before, begun = g(z, Place(stage - 1)), g(z, Place(stage, 0.0))
        half, whole = g(z, Place(stage, 0.5)), g(z, Place(stage, 1.0))
        torch.testing.assert_close(begun, enlarge(before, Place(stage).size))
        torch.testing.assert_close(half, (begun + whole) / 2)
        assert (begun - whole).abs().max() > 0.1
        g.to_grey[stage - 1].weight.add_(1.0)
        assert torch.equal(g(z, Place(stage, 1.0)), whole)  # nothing of the fading path is left


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_discriminators_stage_begins_with_the_scores_of_the_one_before(stage: int) -> None:
    d, place = _d(), Place(stage)
    images = _images(place.size)
    with torch.no_grad():
        before = d(shrink(images, place.size // 2), Place(stage - 1))
        torch.testing.assert_close(d(images, Place(stage, 0.0)), before)
        whole = d(images, place)
        assert (whole - before).abs().max() > 1e-3
        d.from_grey[stage - 1].weight.add_(1.0)
        assert torch.equal(d(images, place), whole)


def test_layers_of_later_stages_get_no_gradient() -> None:
    g, d = _g(), _d()
    d(g(draw_latent(3, 16, torch_generator(1, "z")), Place(1, 0.5)), Place(1, 0.5)).sum().backward()
    for module in (g, d):
        reached = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        unreached = {name for name, _ in module.named_parameters()} - reached
        assert unreached
        assert all(name.split(".")[1] in {"1", "2", "3"} for name in unreached), unreached
        assert any(name.startswith("blocks.0") for name in reached)
        assert not any(name.startswith("blocks.1") for name in reached)


def test_reals_are_as_coarse_as_the_fakes_still_are() -> None:
    images = _images(32)
    assert torch.equal(faded(images, Place(3)), images)
    assert torch.equal(faded(images, Place(0)), shrink(images, 4))
    torch.testing.assert_close(faded(images, Place(3, 0.0)), enlarge(shrink(images, 16), 32))
    torch.testing.assert_close(
        faded(images, Place(2, 0.25)), 0.75 * enlarge(shrink(images, 8), 16) + 0.25 * shrink(images, 16)
    )
    torch.testing.assert_close(faded(images, Place(2, 0.3)).mean(), images.mean())


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_shapes_at_every_size(size: int) -> None:
    g, d = _g(size), _d(size)
    z = draw_latent(2, 16, torch_generator(1, "z"))
    with torch.no_grad():
        assert g(z).shape == (2, 1, size, size)
        assert d(g(z)).shape == (2,)
    pictures = render(g.calibrate(), z)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (2, size, size)


def test_the_papers_channels() -> None:
    assert channels_for(256, 32) == (512, 512, 512, 256, 128, 64, 32)
    assert channels_for(32, 2) == (32, 32, 32, 16)
    with pytest.raises(ValueError, match="width"):
        channels_for(32, 0)


@pytest.mark.parametrize("size", [4, 16, 48, 512])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="image size"):
        Generator(size, 1)


def test_images_of_another_stage_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 16 px"):
        _d()(_images(32), Place(2))


def test_same_stream_same_weights_other_stream_other_weights() -> None:
    def first(name: str) -> torch.Tensor:
        return next(Generator(32, 1, 16, torch_generator(5, name)).parameters()).detach()

    assert torch.equal(first("a"), first("a"))
    assert not torch.equal(first("a"), first("b"))


def test_latents_lie_on_the_sphere_and_only_their_direction_counts() -> None:
    z = draw_latent(2000, 64, torch_generator(3, "z"))
    torch.testing.assert_close(z.norm(dim=1), torch.full((2000,), 8.0))
    assert z.mean(dim=0).abs().max() < 0.1
    g = Generator(32, 1, 64, torch_generator(5, "g"))
    with torch.no_grad():
        torch.testing.assert_close(g(3 * z[:2]), g(z[:2]), rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_neighbours_and_nothing_has_buffers() -> None:
    g, z = _g().train(), draw_latent(6, 16, torch_generator(1, "z"))
    with torch.no_grad():
        torch.testing.assert_close(g(z)[:2], g(z[:2]), atol=1e-5, rtol=1e-5)
    assert not [*g.buffers(), *_d().buffers()]


def test_a_score_depends_on_the_neighbours_with_the_deviation_only() -> None:
    images = _images(32, 6)
    with torch.no_grad():
        mixing, apart = _d(), _d(deviation=False)
        assert (mixing(images)[:2] - mixing(images[:2])).abs().max() > 1e-4
        torch.testing.assert_close(apart(images)[:2], apart(images[:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deviation", [True, False])
def test_private_training_refuses_the_discriminator(deviation: bool) -> None:
    with pytest.raises(ConfigError, match="cannot be trained privately"):
        check_private(_d(deviation=deviation))


def test_a_schedule_in_numbers() -> None:
    schedule = Schedule(32, (10, 20, 20, 40), fade=0.5)
    assert schedule.total == 90
    assert [schedule.at(step) for step in (0, 9)] == [Place(0), Place(0)]
    assert [schedule.at(step) for step in (10, 15, 20, 29)] == [Place(1, 0.0), Place(1, 0.5), Place(1), Place(1)]
    assert schedule.at(55) == Place(3, 0.25)
    assert schedule.at(89) == schedule.at(10**9) == Place(3)
    assert Schedule(32, (0, 0, 4, 4)).at(0) == Place(2)  # begins at 16 px, with nothing to fade in from
    assert Schedule(32, (1, 1, 1, 1), fade=0).at(1) == Place(1)
    assert [Place(stage).size for stage in range(4)] == [4, 8, 16, 32]


@given(size=st.sampled_from([32, 64, 128, 256]), total=st.integers(200, 10_000), fade=st.floats(0, 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_it_never_shrinks_and_uses_every_step(size: int, total: int, fade: float, data: st.DataObject) -> None:
    schedule = Schedule.spread(size, total, fade, data.draw(st.floats(0.7, 2)))
    assert schedule.total == total
    assert len(schedule.steps) == stages_of(size)
    step = data.draw(st.integers(0, total + 5))
    here, there = schedule.at(step), schedule.at(step + 1)
    assert (here.stage, here.alpha) <= (there.stage, there.alpha)
    assert there.stage - here.stage <= 1
    assert 0 <= here.alpha <= 1


@pytest.mark.parametrize(
    ("steps", "fade"),
    [
        ((1, 1, 1), 0.5),
        ((1, 1, 1, 0), 0.5),
        ((1, 0, 1, 1), 0.5),
        ((0, 0, 0, 0), 0.5),
        ((-1, 1, 1, 1), 0.5),
        ((1, 1, 1, 1), 1.5),
        ((1, 1, 1, 1), math.nan),
    ],
)
def test_impossible_schedules_are_refused(steps: tuple[int, ...], fade: float) -> None:
    with pytest.raises(ValueError, match=r"stages|steps"):
        Schedule(32, steps, fade)


def test_steps_are_counted_from_zero() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        Schedule.spread(32, 100).at(-1)
    with pytest.raises(ValueError, match="growth"):
        Schedule.spread(32, 100, growth=0)
