"""The generator and discriminator have the paper's shapes, and nothing that averaging or DP could not bear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xfed.common.dcgan import Discriminator, Generator, draw_latent
from xfed.common.randomness import torch_generator


def _layers(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def test_the_paper_at_256_six_up_convolutions_six_convolutions_4x4x1024() -> None:
    g, d = Generator(256, 32), Discriminator(256, 32)
    assert len(_layers(g, nn.ConvTranspose2d)) == 6
    assert len(_layers(d, nn.Conv2d)) == 6
    assert g.latent == 128
    assert g.project.out_features == 4 * 4 * 1024
    # the measured size of this model (13.3 M on the wire)
    assert sum(p.numel() for p in g.parameters()) == pytest.approx(13.3e6, rel=0.01)
    assert sum(p.numel() for p in d.parameters()) == pytest.approx(11.2e6, rel=0.01)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_shapes_and_range_at_every_size(size: int) -> None:
    g, d = Generator(size, 4), Discriminator(size, 4)
    images = g.calibrate()(draw_latent(3, 128, torch_generator(1, "z")))
    assert images.shape == (3, 1, size, size)
    assert images.abs().max() <= 1
    assert d(images).shape == (3,)


@pytest.mark.parametrize("size", [0, 4, 48, 100])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="image size"):
        Generator(size, 4)


def test_no_buffers_and_no_batch_norm() -> None:
    for module in (Generator(64, 8), Discriminator(64, 8)):
        assert not list(module.buffers())
        assert not _layers(module, nn.BatchNorm2d)


def test_latents_are_uniform_on_minus_one_to_one() -> None:
    z = draw_latent(2000, 128, torch_generator(3, "z"))
    assert z.min() >= -1
    assert z.max() <= 1
    assert z.mean().abs() < 0.01
    assert z.var().item() == pytest.approx(1 / 3, rel=0.02)  # of uniform(-1, 1)


def test_same_stream_same_weights_other_stream_other_weights() -> None:
    def first(name: str) -> torch.Tensor:
        return next(Generator(32, 4, 16, torch_generator(5, name)).parameters()).detach()

    assert torch.equal(first("a"), first("a"))
    assert not torch.equal(first("a"), first("b"))


def test_in_use_an_image_does_not_depend_on_its_neighbours() -> None:
    g = Generator(32, 4, 16, torch_generator(5, "g"))
    z = draw_latent(6, 16, torch_generator(1, "z"))
    in_training = g(z)[:2] - g(z[:2])
    assert in_training.abs().max() > 1e-3  # over the batch it does
    g.calibrate()
    torch.testing.assert_close(g(z)[:2], g(z[:2]), atol=1e-5, rtol=0)


def test_calibration_equals_a_training_pass_over_the_reference_latents_and_follows_the_weights() -> None:
    from xfed.common.dcgan import REFERENCE, REFERENCE_SEED

    g = Generator(32, 4, 16, torch_generator(5, "g"))
    reference = draw_latent(REFERENCE, 16, torch.Generator().manual_seed(REFERENCE_SEED))
    with torch.no_grad():
        expected = g.train()(reference)
        torch.testing.assert_close(g.calibrate()(reference), expected, atol=1e-4, rtol=0)
        before = g(reference)
        g.project.weight.mul_(3.0)
        g.project.bias.add_(1.0)
        stale = g(reference)
        again = g.calibrate()(reference)
    torch.testing.assert_close(again, before, atol=1e-3, rtol=0)  # scale and shift before a norm cancel
    assert (stale - before).abs().max() > 1e-2


def test_use_before_calibration_is_refused() -> None:
    g = Generator(32, 4, 16).eval()
    with pytest.raises(RuntimeError, match="calibrate"):
        g(torch.zeros(2, 16))
