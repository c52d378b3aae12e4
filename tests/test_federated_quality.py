"""The archive's figures over three sites: equal to those of the pooled images, openly and through a secure sum's fixed point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny
from xfed.client.measures import measure_archive, real_sums, site_scores
from xfed.client.store import Store
from xfed.common import messages as m
from xfed.common.archive_figures import MOST_THINNING, RealSums, add_site, class_figures, thinning
from xfed.common.errors import DataError, FederationError
from xfed.common.features import DIMENSIONS, KERNEL_DIMENSIONS, SCORES, project_features
from xfed.common.fixed_point import SUM_BITS
from xfed.common.frechet import feature_sums, frechet_distance, kid
from xfed.common.kernel_sums import (
    LEAST,
    add_kernel,
    kernel_distance,
    kernel_from_arrays,
    kernel_sums,
    kernel_to_arrays,
    kernel_zero,
)
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.common.summable import from_vectors, to_vectors
from xfed.common.weights import under
from xfed.simulations.phantom import phantom_arrays

CPU = torch.device("cpu")
THINNING = (1, 0)
CLASSES = ("Normal", "Cardiomegaly")
STUDY = tiny(classes=list(CLASSES), data={"phantom": {"patients": {}}}, sites={"count": 3})


def _store(seed: int, each: int) -> Store:
    images, labels, patients = phantom_arrays(
        classes=CLASSES, patients=dict.fromkeys(CLASSES, each), images_per_patient=1.3, size=32, seed=seed
    )
    splits = (np.arange(len(labels)) % 3).astype(np.int8)
    return Store(
        folder=Path(), classes=CLASSES, images=images, labels=labels, patients=patients, splits=splits, digest=""
    )


def _answer(model: torch.nn.Module, store: Store, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    thinning = np.array(THINNING)
    return measure_archive(model, store, images, labels, device=CPU, precision="float32", scale=2.0, thinning=thinning)


@pytest.fixture(scope="module")
def federation() -> dict[str, Any]:
    """Three sites' stores, an archive, a classifier, and what each site answers."""
    stores = [_store(seed, each) for seed, each in ((1, 110), (2, 130), (3, 95))]
    images, labels, _ = phantom_arrays(
        classes=CLASSES, patients=dict.fromkeys(CLASSES, 150), images_per_patient=1.0, size=32, seed=9
    )
    rng = np.random.default_rng(0)
    images = np.clip(images + rng.normal(scale=50, size=images.shape), 0, 255).astype(np.uint8)
    model = build_classifier(STUDY, torch_generator(1, "judge"))
    answers = [_answer(model, store, images, labels) for store in stores]
    return {"stores": stores, "images": images, "labels": labels, "model": model, "answers": answers, "scale": 2.0}


def _features(federation: dict[str, Any], images: np.ndarray) -> np.ndarray:
    return project_features(federation["model"], images, CPU, "float32")


def _pooled(federation: dict[str, Any], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of all sites' real images of a class, in the two halves, the second one whole."""
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for store in federation["stores"]:
        for half in (0, 1):
            halves[half].append(store.images[(store.labels == label) & (store.patients % 2 == half)])
    first, second = (_features(federation, np.concatenate(parts)) for parts in halves)
    return first, second


def _thinned(federation: dict[str, Any], label: int) -> np.ndarray:
    """Features of every 2nd (label 0) or every image (label 1) of the second half at each site."""
    parts = [
        store.images[(store.labels == label) & (store.patients % 2 == 1)][:: 2 ** THINNING[label]]
        for store in federation["stores"]
    ]
    return _features(federation, np.concatenate(parts))


def _added(answers: list[dict[str, Any]], label: int) -> RealSums:
    total = RealSums.nothing()
    for arrays in answers:
        total = add_site(total, under(arrays, f"{label}/"))
    return total


def _summed_securely(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The sites' answers as ring elements, added, and taken apart again: a secure sum without its masks."""
    request = m.MeasureArchive(study=STUDY.digest, arm="DS1", scale=2.0, thinning={}, weights={})
    words = [
        to_vectors(request, m.ArchiveMeasured(site=f"site-{i}", arrays=arrays), len(CLASSES), 3)
        for i, arrays in enumerate(answers)
    ]
    summed = np.sum([small for _, small in words], axis=0, dtype=np.uint64)
    reply = from_vectors(request, (np.empty(0, np.uint32), summed), len(CLASSES))
    assert isinstance(reply, m.ArchiveMeasured)
    return dict(reply.arrays)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("secure", [False, True], ids=["open", "secure"])
def test_three_sites_give_the_pooled_figures_to_one_in_a_million(
    federation: dict[str, Any], label: int, secure: bool
) -> None:
    answers = federation["answers"]
    total = _added([_summed_securely(answers)] if secure else answers, label)
    fake = _features(federation, federation["images"][federation["labels"] == label])
    first, second = _pooled(federation, label)
    found = class_figures(total, fake, federation["scale"])
    thin = _thinned(federation, label)
    used = fake[: len(thin)]
    assert (found["images_real"], found["images_floor"]) == (len(first), len(thin))
    assert found["images_compared"] == len(used) == min(len(thin), 150)
    assert found["equal_numbers"] == (THINNING[label] == 1), "the archive has 150 images"
    a, b, c = feature_sums(first), feature_sums(thin), feature_sums(used)
    narrow = [part[:, :KERNEL_DIMENSIONS] / federation["scale"] for part in (first, second, used)]
    expected = {
        "fid": frechet_distance(a, c),
        "fid_floor": frechet_distance(a, b),
        "kid": kid(narrow[0], narrow[2]),
        "kid_floor": kid(narrow[0], narrow[1]),
    }
    assert found["kid_pooled"]
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert found["fid"] > 2 * found["fid_floor"] > 0, "noise is seen"
    assert found["kid"] > 0
    # fixed point: an entry of the sums is off by at most 3 sites * 2^-25
    off = np.abs(total.halves[0].outer - a.outer).max()
    assert off <= 3 * 2.0 ** -(SUM_BITS + 1) + 1e-9 * np.abs(a.outer).max()
    assert (off > 1e-9) == secure


def test_scores_over_sites_are_weighted_by_images_openly_and_securely(federation: dict[str, Any]) -> None:
    rows = np.array([arrays["0/scores"] for arrays in federation["answers"]])
    assert len({row[0] for row in rows}) == 3, "sites of different sizes"
    means = (rows[:, :1] * rows[:, 1:]).sum(axis=0) / rows[:, 0].sum()
    for answers in (federation["answers"], [_summed_securely(federation["answers"])]):
        total = _added(answers, 0)
        np.testing.assert_allclose(total.scores[1:] / total.scores[0], means, rtol=1e-6, atol=1e-7)
        figures = class_figures(total, np.zeros((0, DIMENSIONS)), 1.0)
        assert figures["coverage"] == pytest.approx(means[SCORES.index("coverage")], abs=1e-6)
        assert 0 < figures["ms_ssim_real"] < 1
        assert figures["fid"] is None
        assert not figures["equal_numbers"]


def test_a_site_with_few_images_sends_no_third_order_sums_and_the_report_says_whose_figure_it_is() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=(2 * LEAST - 2, DIMENSIONS)), rng.normal(size=(2 * LEAST, DIMENSIONS))
    fake = rng.normal(size=(200, DIMENSIONS)) + 0.4
    total = RealSums.nothing()
    for real in (many, few):
        halves = np.arange(len(real))
        arrays = real_sums(real, halves, 1.0)
        assert arrays["half0/count"] == len(real) // 2
        assert bool(arrays["kernel0/count"].any()) == (len(real) // 2 >= LEAST)
        assert bool(arrays["kernel1/total"].any()) == (len(real) // 2 >= LEAST)
        total = add_site(total, arrays | {"scores": site_scores(real, fake, 1.0, 0.5)})
    found = class_figures(total, fake, 1.0)
    assert not found["kid_pooled"]
    own = [kid(real[:, :KERNEL_DIMENSIONS], fake[: len(real), :KERNEL_DIMENSIONS]) for real in (many, few)]
    assert found["kid"] == pytest.approx(np.average(own, weights=[len(many), len(few)]))
    assert found["fid"] is not None


def test_the_second_half_is_thinned_until_the_archive_has_as_many_images() -> None:
    real, synthetic = np.array([1000, 400, 130, 100, 0, 9]), np.array([64, 200, 64, 64, 10, 0])
    times = thinning(real, synthetic)
    assert times.tolist() == [4, 1, 1, 0, 0, 3]
    assert (real * 0.58 / 2**times <= np.maximum(synthetic, 1)).all()
    assert thinning(np.array([10**6]), np.array([1])).tolist() == [MOST_THINNING]


def test_both_halves_give_third_order_sums_or_none_does() -> None:
    real = np.random.default_rng(4).normal(size=(3 * LEAST, DIMENSIONS))
    patients = np.where(np.arange(len(real)) < LEAST - 1, 1, 2)
    arrays = real_sums(real, patients, 1.0)
    assert not arrays["kernel0/total"].any()
    assert not arrays["kernel1/total"].any()
    patients[LEAST - 1] = 1
    arrays = real_sums(real, patients, 1.0, times=3)
    assert arrays["kernel0/count"] == 2 * LEAST
    assert arrays["kernel1/count"] == LEAST, "KID is not thinned"
    assert arrays["half1/count"] == LEAST / 8


def test_below_the_least_the_numbers_sent_would_be_as_many_as_those_looked_for() -> None:
    covariance = DIMENSIONS * (DIMENSIONS + 1) // 2 + DIMENSIONS
    cubic = KERNEL_DIMENSIONS * (KERNEL_DIMENSIONS + 1) * (KERNEL_DIMENSIONS + 2) // 6
    assert kernel_zero(KERNEL_DIMENSIONS).total.size == 969
    sent = covariance + cubic + 1
    assert sent == 2961
    assert (LEAST - 2) * DIMENSIONS < sent < LEAST * DIMENSIONS


def test_too_few_images_or_one_patient_give_no_score() -> None:
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(30, DIMENSIONS)), rng.normal(size=(30, DIMENSIONS))
    assert not site_scores(real[:10], fake, 1.0, 0.5).any()
    assert site_scores(real[:11], fake, 1.0, 0.5)[0] == 11
    assert not site_scores(real, fake, 1.0, None).any()
    nothing = class_figures(RealSums.nothing(), fake, 1.0)
    assert all(nothing[key] is None for key in ("fid", "fid_floor", *SCORES))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 6), sites=st.integers(1, 4), scale=st.sampled_from([0.5, 1.0, 9.0])
)
def test_kernel_sums_over_sites_are_the_kernel_distance_of_all_pairs(
    seed: int, width: int, sites: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(23, width)), rng.normal(size=(17, width)) + 0.3
    total = kernel_zero(width)
    for part in np.array_split(x, sites):
        total = add_kernel(total, kernel_from_arrays(kernel_to_arrays(kernel_sums(part, scale))))
    assert kernel_distance(total, kernel_sums(y, scale)) == pytest.approx(kid(x / scale, y / scale), rel=1e-6, abs=1e-9)
    other = kernel_distance(kernel_sums(y, scale), total)
    assert other == pytest.approx(kernel_distance(total, kernel_sums(y, scale)), rel=1e-12, abs=1e-12)


def test_kernel_sums_of_blocks_are_those_of_one_pass() -> None:
    x = np.random.default_rng(3).normal(size=(600, 3))
    whole = kernel_sums(x)
    parts = [kernel_sums(part) for part in (x[:1], x[1:256], x[256:])]
    np.testing.assert_allclose(sum(part.total for part in parts), whole.total, rtol=1e-12)
    assert whole.count == 600
    assert whole.own == pytest.approx(sum((float(row @ row) / 3 + 1) ** 3 for row in x))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("count", np.array([-1.0]), "contradict"),
        ("count", np.array([12.0]), "contradict"),
        ("count", np.array([9.5]), "contradict"),
        ("count", np.array([10]), "float64"),
        ("own", np.array([3.0]), "contradict"),
        ("own", np.array([np.nan]), "finite"),
        ("own", np.zeros(2), "shapes"),
        ("total", np.full(20, 1e3), "contradict"),
        ("total", np.full(20, np.inf), "finite"),
        ("total", np.zeros((4, 5)), "shapes"),
    ],
)
def test_kernel_sums_that_no_features_have_are_refused(name: str, value: np.ndarray, reason: str) -> None:
    arrays: dict[str, Any] = dict(kernel_to_arrays(kernel_sums(np.random.default_rng(0).normal(size=(10, 3)))))
    kernel_from_arrays(arrays)
    with pytest.raises(FederationError, match=reason):
        kernel_from_arrays(arrays | {name: value})


def test_a_score_row_of_another_form_is_refused() -> None:
    real = np.random.default_rng(0).normal(size=(20, DIMENSIONS))
    arrays = real_sums(real, np.arange(20), 1.0)
    for row in (np.zeros(3), np.full(1 + len(SCORES), np.nan)):
        with pytest.raises(FederationError, match="scores of shape"):
            add_site(RealSums.nothing(), arrays | {"scores": row})
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(kernel_sums(real[:1]), kernel_sums(real))
    with pytest.raises(FederationError, match="cannot be added"):
        add_kernel(kernel_zero(3), kernel_zero(4))
    with pytest.raises(DataError, match="finite matrix"):
        kernel_sums(real * np.nan)
