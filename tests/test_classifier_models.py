"""DCNN and GoogLeNet: the papers' shapes and counts, no buffers, determinism, gradients that arrive."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from xfed.common.dcnn import DCNN, SeededDropout
from xfed.common.googlenet import INCEPTION, GoogLeNet, Inception

SIZES = (32, 64, 128, 256)
MODELS = (DCNN, GoogLeNet)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_the_dcnn_vector_has_4096_entries_at_every_size(size: int) -> None:
    model = DCNN(size, 5, width=8).eval()
    with torch.no_grad():
        features = model.features(torch.rand(2, 1, size, size))
    assert features.shape == (2, 4096)
    assert (features >= 0).all()


@pytest.mark.parametrize(("size", "blocks"), [(32, 3), (64, 4), (128, 5), (256, 6)])
def test_the_dcnn_has_one_five_by_five_block_per_doubling_and_relu_before_the_pool(size: int, blocks: int) -> None:
    kinds = [type(layer) for layer in DCNN(size, 5).blocks]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * blocks
    convolutions = [layer for layer in DCNN(size, 5).blocks if isinstance(layer, nn.Conv2d)]
    assert {layer.kernel_size for layer in convolutions} == {(5, 5)}
    assert convolutions[0].out_channels == 32
    assert convolutions[-1].out_channels == 256


def test_the_dcnn_has_the_parameters_counted_by_hand() -> None:
    convolutions = sum(25 * a * b + b for a, b in [(1, 32), (32, 64), (64, 128), (128, 256)])
    dense = 4096 * 256 + 256 + 256 * 5 + 5
    assert parameters(DCNN(64, 5, width=32)) == convolutions + dense == 2_126_597
    assert parameters(DCNN(64, 5, width=32, norm=True)) == 2_126_597 + 2 * (32 + 64 + 128 + 256)


def test_dcnn_biases_start_at_a_tenth_and_weights_are_normal() -> None:
    model = DCNN(64, 5, generator=seeded())
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer is not model.output:
            assert layer.bias is not None
            assert set(layer.bias.tolist()) == {torch.tensor(0.1).item()}
            expected = math.sqrt(2 / layer.weight[0].numel())
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.15)
    weight = model.hidden.weight.detach().flatten() / math.sqrt(2 / 4096)
    fourth = weight.pow(4).mean().item()
    assert fourth == pytest.approx(3.0, rel=0.02)  # a uniform distribution of the same variance would give 1.8


# Szegedy et al. 2015, Table 1, column "params" in K = 1,024 weights. The printed 463K (4c) and 1072K (5a) contradict the
# channels printed beside them, which give 497.5 and 1018; for these two the sum over the printed channels is expected.
@pytest.mark.parametrize(
    ("name", "narrow", "wide", "thousands"),
    [
        ("3a", 192, 256, 159),
        ("3b", 256, 480, 380),
        ("4a", 480, 512, 364),
        ("4b", 512, 512, 437),
        ("4c", 512, 512, 497.5),
        ("4d", 512, 528, 580),
        ("4e", 528, 832, 840),
        ("5a", 832, 832, 1018),
        ("5b", 832, 1024, 1388),
    ],
)
def test_inception_blocks_have_the_papers_channels_and_counts(
    name: str, narrow: int, wide: int, thousands: float
) -> None:
    block = Inception(narrow, INCEPTION[name])
    weights = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Conv2d))
    assert block.channels == wide
    assert weights / 1024 == pytest.approx(thousands, rel=0.02)


@pytest.mark.parametrize(("size", "last"), [(32, 4), (64, 4), (128, 4), (256, 8)])
def test_googlenet_shapes(size: int, last: int) -> None:
    model = GoogLeNet(size, 5, width=16).eval()
    seen: list[torch.Size] = []
    model.blocks["inception_5b"].register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    with torch.no_grad():
        logits = model(torch.rand(2, 1, size, size))
    assert logits.shape == (2, 5)
    assert seen == [torch.Size([2, 256, last, last])]


def test_googlenet_at_the_papers_width_has_1024_features() -> None:
    model = GoogLeNet(32, 1000)
    assert model.output.weight.shape == (1000, 1024)
    # Table 1: 2.7K for the 7x7 of three input channels; one grey channel needs a third of it
    stem = [layer.weight.numel() for layer in model.stem.modules() if isinstance(layer, nn.Conv2d)]
    assert stem == [64 * 49, 64 * 64, 64 * 192 * 9]
    assert 5_900_000 < parameters(model) - model.output.weight.numel() < 6_050_000


@pytest.mark.parametrize("kind", MODELS)
def test_models_have_float32_parameters_and_no_buffers(kind: type[DCNN] | type[GoogLeNet]) -> None:
    model = kind(32, 5, width=8)
    assert list(model.buffers()) == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any("BatchNorm" in type(layer).__name__ for layer in model.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_the_generator_decides_the_weights(kind: type[DCNN] | type[GoogLeNet]) -> None:
    first, same, other = (kind(32, 5, width=8, generator=seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_gets_a_gradient(kind: type[DCNN] | type[GoogLeNet]) -> None:
    model = kind(32, 5, width=8, dropout=0.0, generator=seeded())
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 1, 32, 32)), torch.arange(8) % 5)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", MODELS)
def test_each_image_is_judged_alone(kind: type[DCNN] | type[GoogLeNet]) -> None:
    model = kind(32, 5, width=8, generator=seeded()).eval()
    images = torch.randn(4, 1, 32, 32, generator=seeded())
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", [0, 16 + 1, 48])
def test_sizes_that_do_not_halve_to_four_are_refused(kind: type[DCNN] | type[GoogLeNet], size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        kind(size, 5)


@pytest.mark.parametrize("kind", MODELS)
def test_images_of_another_size_are_refused(kind: type[DCNN] | type[GoogLeNet]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 1, 32, 32\]"):
        kind(32, 5, width=8)(torch.rand(2, 1, 64, 64))


def test_dropout_keeps_the_mean_and_obeys_its_generator() -> None:
    layer = SeededDropout(0.25).train()
    ones = torch.ones(200, 500)
    layer.generator = seeded(3)
    first = layer(ones)
    layer.generator = seeded(3)
    assert torch.equal(first, layer(ones))
    assert not torch.equal(first, layer(ones))
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert first.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(layer.eval()(ones), ones)
    assert torch.equal(SeededDropout(0.0).train()(ones), ones)
    with pytest.raises(ValueError, match="dropout"):
        SeededDropout(1.0)


def test_models_can_be_copied_with_a_generator_set() -> None:
    model = DCNN(32, 5, width=8)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
