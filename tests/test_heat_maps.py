"""Heat maps: Grad-CAM in closed form and by finite differences, where a taught classifier looks, and the panels of a report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import tiny
from xfed.common.classifier import prepare
from xfed.common.dcnn import DCNN
from xfed.common.errors import DataError
from xfed.common.googlenet import GoogLeNet
from xfed.common.heat_maps import first_layer, grad_cam, strongest_channels
from xfed.common.registry import build_classifier
from xfed.common.weights import parameters_of
from xfed.server.heat_panels import CHANNELS, MOST_IMAGES, heat_panels
from xfed.simulations.judge import taught_classifier

CPU = torch.device("cpu")


def _images(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, size, size), dtype=np.uint8)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _last_maps(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The maps before the last pooling, computed by hand."""
    if isinstance(model, DCNN):
        return model.blocks[:-1](x)
    assert isinstance(model, GoogLeNet)
    x = model.stem(x)
    for block in model.blocks.values():
        x = block(x)
    return x


def _enlarged(maps: torch.Tensor, size: int) -> np.ndarray:
    large = torch.nn.functional.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[
        :, 0
    ]
    top = large.amax(dim=(1, 2), keepdim=True)
    return torch.where(top > 0, large / top, 0.0).numpy()


def test_behind_mean_pooling_it_is_the_class_activation_map() -> None:
    """Selvaraju et al. 2017, section 3: with mean pooling and one linear layer Grad-CAM is CAM, weights w_k of the class."""
    model, images = GoogLeNet(32, 4, width=8, generator=_seeded(1)), _images(6)
    labels = np.arange(6) % 4
    with torch.no_grad():
        maps = _last_maps(model.eval(), prepare(torch.from_numpy(images)))
        expected = torch.einsum("nk,nkhw->nhw", model.output.weight[labels], maps).relu()
    found = grad_cam(model, images, labels, CPU)
    assert found.shape == images.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _enlarged(expected, 32), atol=1e-5)
    assert found.max(axis=(1, 2)) == pytest.approx(np.where(expected.amax(dim=(1, 2)) > 0, 1, 0))


def test_the_weights_of_the_maps_are_mean_gradients_as_finite_differences_say() -> None:
    model, images = DCNN(16, 3, width=4, generator=_seeded(2)).double().eval(), _images(1, 16)
    label = 1
    x = prepare(torch.from_numpy(images)).double()
    with torch.no_grad():
        maps = _last_maps(model, x)

        def logit(maps: torch.Tensor) -> float:
            hidden = torch.relu(model.hidden(model.blocks[-1](maps).flatten(1)))
            return float(model.output(hidden)[0, label])

        step, weights = 1e-6, torch.zeros(maps.shape[1])
        places = maps.shape[2] * maps.shape[3]
        for k in range(maps.shape[1]):
            # moving a whole map by e changes the logit by e times the sum of its gradient (max-pooling moves with it)
            up, down = maps.clone(), maps.clone()
            up[:, k] += step
            down[:, k] -= step
            weights[k] = (logit(up) - logit(down)) / (2 * step) / places
        expected = torch.einsum("k,nkhw->nhw", weights.double(), maps).relu()
    found = grad_cam(model.float(), images, np.array([label]), CPU)
    np.testing.assert_allclose(found, _enlarged(expected, 16), atol=1e-3)


@pytest.mark.parametrize("make", [DCNN, GoogLeNet])
def test_first_layer_activations_are_those_of_the_layer(make: type[torch.nn.Module]) -> None:
    model, images = make(32, 3, width=8, generator=_seeded(3)), _images(70)
    with torch.no_grad():
        layers = model.blocks[:2] if make is DCNN else model.stem[:1]
        expected = layers(prepare(torch.from_numpy(images)))
    model.train()
    found = first_layer(model, images, CPU)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert model.training, "the mode is kept"
    assert (found >= 0).all()


@pytest.mark.parametrize("name", ["dcnn", "googlenet"])
def test_a_classifier_taught_to_tell_stripes_apart_is_shown_to_look_at_them(name: str) -> None:
    study = tiny(classifier={"model": name, "width": 8, "augment": False, "dropout": 0.0, "label_smoothing": 0.0})
    rng = np.random.default_rng(5)
    stripes = np.zeros((8, 8))
    stripes[:, ::2] = 150

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images = rng.normal(90, 10, (n, 32, 32))
        labels, places = rng.integers(0, 2, n), rng.integers(2, 22, (n, 2))
        for image, label, (row, column) in zip(images, labels, places, strict=True):
            image[row : row + 8, column : column + 8] += stripes if label else stripes.T
        return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64), places

    images, labels, _ = drawn(300)
    model = taught_classifier(study, images, labels, steps=60, start=_seeded(4), draws=_seeded(5))
    fresh, truth, places = drawn(60)
    heat = grad_cam(model, fresh, truth, CPU)
    # one cell of the last maps is 4 px (dcnn) or 8 px (googlenet)
    near = 0
    for one, (row, column) in zip(heat, places, strict=True):
        peak = np.unravel_index(one.argmax(), one.shape)
        near += row - 4 <= peak[0] < row + 12 and column - 4 <= peak[1] < column + 12
    assert near >= 0.85 * len(fresh), f"{near} of {len(fresh)}"
    other = np.roll(places, 1, axis=0)
    chance = sum(
        bool(row - 4 <= np.unravel_index(one.argmax(), one.shape)[0] < row + 12)
        for one, (row, _) in zip(heat, other, strict=True)
    )
    assert chance < 0.75 * len(fresh), "the places of other images are not hot"


def test_what_cannot_be_looked_at_is_refused() -> None:
    with pytest.raises(DataError, match="not for Linear"):
        first_layer(torch.nn.Linear(2, 2), _images(1), CPU)
    with pytest.raises(DataError, match="at least one"):
        first_layer(DCNN(32, 3, width=4), _images(0), CPU)
    assert grad_cam(DCNN(32, 3, width=4), _images(0), np.zeros(0, np.int64), CPU).shape == (0, 32, 32)


def test_the_strongest_channels_vary_most_over_all_kinds_of_images() -> None:
    maps = np.zeros((2, 5, 4, 4), np.float32)
    maps[:, 3, 0, 0], maps[:, 1, 0, 0], maps[:, 4] = 9, 5, 100
    assert strongest_channels([maps, np.zeros((0, 5, 4, 4), np.float32), maps], 2).tolist() == [3, 1]


def test_panels_share_channels_and_scale_and_leave_black_images_black() -> None:
    study = tiny()
    weights = parameters_of(build_classifier(study, _seeded(6)))
    synthetic = _images(18).reshape(3, 6, 32, 32).copy()
    real = 255 - synthetic
    synthetic[2] = 0
    panels = heat_panels(study, weights, {"real": real, "synthetic": synthetic, "progress": synthetic[None, :, 0]})
    assert set(panels) == {"cam_real", "cam_synthetic", "first_real", "first_synthetic"}
    assert panels["cam_real"].shape == (3, MOST_IMAGES, 32, 32)
    channels = min(CHANNELS, study.classifier.width)
    assert panels["first_real"].shape[:2] == (3, channels)
    assert all(array.dtype == np.uint8 for array in panels.values())
    assert not panels["cam_synthetic"][2].any()
    assert not panels["first_synthetic"][2].any()
    both = np.maximum(panels["first_real"].max(axis=(0, 2, 3)), panels["first_synthetic"].max(axis=(0, 2, 3)))
    assert (both[both > 0] == 255).all()
    alone = heat_panels(study, weights, {"synthetic": synthetic})
    assert set(alone) == {"cam_synthetic", "first_synthetic"}
    np.testing.assert_array_equal(alone["cam_synthetic"], panels["cam_synthetic"])
    assert heat_panels(study, weights, {}) == {}
