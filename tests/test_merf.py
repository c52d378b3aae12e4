"""DP-MERF: bounded features, one release, an unbiased distance, and a fit that is post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import tiny
from xfed.common.config import Study
from xfed.common.dcgan import draw_latent
from xfed.common.errors import ConfigError, FederationError
from xfed.common.gan import build_generator
from xfed.common.mechanism import RecordingMechanism, ReplayingMechanism
from xfed.common.merf import (
    LENGTH_SCALES,
    RandomFeatures,
    default_levels,
    distance,
    embedding_sum,
    features_of,
    fit_generator,
    mean_embedding,
)
from xfed.common.randomness import torch_generator
from xfed.common.weights import parameters_of
from xfed.simulations.phantom import phantom_arrays


class Bare:
    """No noise; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float, list[str]]] = []

    def release(self, sums: Mapping[str, Tensor], *, sensitivity: float, sigma: float) -> dict[str, Tensor]:
        self.asked.append((sensitivity, sigma, list(sums)))
        return dict(sums)


def _images(n: int = 30, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)


def _rows(patients: int, images: int = 3) -> list[np.ndarray]:
    return [np.arange(images) + images * patient for patient in range(patients)]


def _study(**merf: Any) -> Study:
    study = tiny()
    changed = study.gan.merf.model_copy(update={"features": 120, "steps": 60, "batch": 16, **merf})
    return study.model_copy(update={"gan": study.gan.model_copy(update={"merf": changed})})


def _sum(rows_of: list[np.ndarray], features: RandomFeatures, images: np.ndarray | None = None) -> np.ndarray:
    return embedding_sum(_images() if images is None else images, rows_of, features, Bare(), 1.0)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([32, 64]),
    half=st.integers(5, 300),
    scale=st.floats(1e-3, 1e3),
    pixels=st.sampled_from(["noise", "black", "white", "edges"]),
)
def test_the_norm_of_a_feature_vector_is_one_and_never_above(
    seed: int, size: int, half: int, scale: float, pixels: str
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, size, size, generator=rng) * 2 - 1
    x = {"noise": x, "black": torch.full_like(x, -1), "white": torch.ones_like(x), "edges": x.sign()}[pixels]
    norms = RandomFeatures(size, 2 * half, scale, seed)(x).double().norm(dim=1)
    assert (norms <= 1).all()
    assert (norms > 0.998).all()


def test_inner_products_are_the_gaussian_kernel() -> None:
    """Rahimi and Recht 2007: with many features, within three standard errors of exp(-|x - y|^2 / (2 l^2))."""
    rng = torch.Generator().manual_seed(3)
    x = torch.rand(2, 1, 32, 32, generator=rng) - 0.5
    for level in (8, 32):
        phi = RandomFeatures(32, 40_000, 0.7, 5, levels=[level])(x)
        pooled = torch.nn.functional.avg_pool2d(x, 32 // level)
        length = LENGTH_SCALES[level] * 0.7
        kernel = float(torch.exp(-(pooled[0] - pooled[1]).square().sum() / (2 * length**2)))
        assert float(phi[0] @ phi[1]) / 0.999**2 == pytest.approx(kernel, abs=3 / 200)
        assert 0.05 < kernel < 0.98


def test_the_length_scales_are_those_of_phantoms() -> None:
    """Stored constants against a small sample of phantoms of two sizes; 10 % for the sample."""
    for size in (32, 64):
        images, _, _ = phantom_arrays(
            classes=["Normal", "Cardiomegaly", "Pneumothorax"],
            patients={"Normal": 20, "Cardiomegaly": 20, "Pneumothorax": 20},
            images_per_patient=1.0,
            size=size,
            seed=1,
        )
        x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
        for level in default_levels(size):
            found = float(torch.pdist(torch.nn.functional.avg_pool2d(x, size // level).flatten(1)).median())
            assert found == pytest.approx(LENGTH_SCALES[level], rel=0.1)


@pytest.mark.parametrize(
    ("size", "features", "scale", "levels"),
    [
        *((32, 7, 1.0, None), (32, 2, 1.0, None), (32, 100, 0.0, None), (32, 100, np.inf, None)),
        *((32, 100, 1.0, [64]), (32, 100, 1.0, [12]), (32, 100, 1.0, []), (32, 100, 1.0, [8, 8])),
    ],
)
def test_features_that_cannot_be_are_refused(size: int, features: int, scale: float, levels: Any) -> None:
    with pytest.raises(ConfigError, match=r"levels|features|length_scale"):
        RandomFeatures(size, features, scale, 1, levels)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be"):
        RandomFeatures(32, 100, 1.0, 1)(torch.zeros(2, 1, 64, 64))


def test_the_sum_is_of_each_patients_mean() -> None:
    """Against a loop over patients, with unlike numbers of images and more rows than one pass takes."""
    images = _images(700)
    rows_of = [np.array([0]), np.array([4, 2, 9]), np.arange(100, 700)]
    features = RandomFeatures(32, 100, 1.0, 1)
    x = torch.from_numpy(images).float()[:, None] / 127.5 - 1
    expected = sum(features(x[torch.from_numpy(rows)]).double().mean(0) for rows in rows_of)
    np.testing.assert_allclose(_sum(rows_of, features, images), expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(patients=st.integers(1, 10), data=st.data())
def test_one_patient_moves_the_sum_by_one_at_most(patients: int, data: st.DataObject) -> None:
    images = data.draw(st.integers(1, 3))
    rows_of, features = _rows(patients, images), RandomFeatures(32, 200, data.draw(st.floats(0.1, 10)), 1)
    gone = data.draw(st.integers(0, patients - 1))
    without = [rows for number, rows in enumerate(rows_of) if number != gone]
    moved = np.linalg.norm(_sum(rows_of, features).astype(float) - _sum(without, features).astype(float))
    assert moved <= 1
    if images == 1:
        assert moved > 0.99, "the bound is tight for a patient with one image"


@pytest.mark.parametrize("patients", [0, 1, 10])
def test_there_is_one_release_with_the_claimed_noise(patients: int) -> None:
    mechanism = Bare()
    noisy = embedding_sum(_images(), _rows(patients), RandomFeatures(32, 100, 1.0, 1), mechanism, 2.5)  # type: ignore[arg-type]
    assert mechanism.asked == [(1.0, 2.5, ["embedding"])]
    assert noisy.shape == (100,)
    assert noisy.dtype == np.float32


def test_the_noise_has_the_size_that_was_asked_for() -> None:
    noisy = embedding_sum(_images(), [], RandomFeatures(32, 20_000, 1.0, 1), RecordingMechanism(), 3.0)
    assert 2.9 < noisy.std() < 3.1


def test_a_patient_without_an_image_is_refused_before_a_release() -> None:
    mechanism = Bare()
    with pytest.raises(ValueError, match="without an image"):
        embedding_sum(_images(), [np.array([], dtype=np.int64)], RandomFeatures(32, 100, 1.0, 1), mechanism, 1.0)  # type: ignore[arg-type]
    assert not mechanism.asked


def test_sites_together_give_what_one_site_with_all_patients_gives() -> None:
    features, rows_of = RandomFeatures(32, 100, 1.0, 1), _rows(10)
    apart = mean_embedding([_sum(rows_of[:3], features), _sum(rows_of[3:], features)], [3, 7])
    np.testing.assert_allclose(apart, mean_embedding([_sum(rows_of, features)], [10]), atol=1e-6)


@pytest.mark.parametrize(
    ("sums", "declared"),
    [
        ([], []),
        ([np.zeros(3)], [1, 2]),
        ([np.zeros(3), np.zeros(4)], [1, 2]),
        ([np.zeros(3)], [0]),
        ([np.full(3, np.nan)], [2]),
    ],
)
def test_sums_that_do_not_fit_are_refused(sums: list[np.ndarray], declared: list[int]) -> None:
    with pytest.raises(FederationError, match="embedding"):
        mean_embedding(sums, declared)


def test_the_distance_has_no_bias_by_the_number_of_images() -> None:
    """Its mean over batches of 3 equals the closed form on a finite population; that of the plain square does not."""
    rng = np.random.default_rng(0)
    population = torch.from_numpy(rng.normal(size=(5, 8)))
    target = torch.from_numpy(rng.normal(size=8))
    mean = population.mean(0)
    truth = float(mean @ mean - 2 * mean @ target)
    batches = torch.cartesian_prod(*[torch.arange(5)] * 3)
    ours = float(torch.stack([distance(population[batch], target) for batch in batches]).mean())
    plain = [population[b].mean(0).square().sum() - 2 * population[b].mean(0) @ target for b in batches]
    assert ours == pytest.approx(truth, abs=1e-9)
    assert float(torch.stack(plain).mean()) > truth + 0.1


def _target(study: Study) -> np.ndarray:
    images, _, _ = phantom_arrays(classes=["Normal"], patients={"Normal": 24}, images_per_patient=1.0, size=32, seed=1)
    return mean_embedding([_sum(_rows(24, 1), features_of(study), images)], [24])


def _distance_of(study: Study, weights: Any, target: np.ndarray) -> float:
    generator = build_generator(study)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
        images = generator.calibrate()(draw_latent(256, study.gan.latent, torch_generator(9)))
        return float((features_of(study)(images).mean(0) - torch.from_numpy(target)).square().sum())


def test_the_fit_brings_the_images_to_the_embedding_and_is_the_same_every_time() -> None:
    study = _study()
    target, start = _target(study), parameters_of(build_generator(study, ("g",)))
    fitted, again = (fit_generator(study, "Normal", target, start) for _ in range(2))
    assert all(np.array_equal(fitted.weights[name], again.weights[name]) for name in start)
    assert fitted.losses == again.losses
    assert len(fitted.losses) == 2
    assert fitted.losses[-1] < fitted.losses[0]
    assert _distance_of(study, fitted.weights, target) < 0.5 * _distance_of(study, start, target)
    other = fit_generator(study, "Cardiomegaly", target, start)
    assert any(not np.array_equal(fitted.weights[name], other.weights[name]) for name in start)


@pytest.mark.parametrize("pair", range(20))
def test_nothing_but_the_release_tells_of_a_patient(pair: int) -> None:
    """Message and fitted weights of 10 patients and of 9, the release replaced by that of the first."""
    study = _study(steps=2, features=60)
    features, start = features_of(study), parameters_of(build_generator(study, ("g",)))
    less = [rows for number, rows in enumerate(_rows(10)) if number != pair % 10]
    recorder = RecordingMechanism()

    def play(rows_of: list[np.ndarray], mechanism: Any) -> dict[str, bytes]:
        noisy = embedding_sum(_images(), rows_of, features, mechanism, 1.0 + pair / 10)
        fitted = fit_generator(study, "Normal", mean_embedding([noisy], [10]), start)
        return {"message": noisy.tobytes()} | {name: value.tobytes() for name, value in fitted.weights.items()}

    assert play(_rows(10), recorder) == play(less, ReplayingMechanism(recorder.outputs))


@pytest.mark.parametrize("target", [np.zeros(118, dtype=np.float32), np.full(120, np.inf, dtype=np.float32)])
def test_a_target_that_does_not_fit_is_refused(target: np.ndarray) -> None:
    study = _study()
    with pytest.raises(FederationError, match="embedding"):
        fit_generator(study, "Normal", target, parameters_of(build_generator(study, ("g",))))


def test_all_sites_of_a_study_have_the_same_features_and_other_studies_others() -> None:
    x = torch.from_numpy(_images(2)).float()[:, None] / 127.5 - 1
    study = _study()
    assert torch.equal(features_of(study)(x), features_of(study)(x))
    assert not torch.equal(features_of(study)(x), features_of(study.model_copy(update={"seed": 5}))(x))
