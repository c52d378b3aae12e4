"""Likeness figures: closed forms, scipy's matrix root, slow loops, federated against pooled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from xfed.common.errors import DataError, FederationError
from xfed.common.frechet import (
    FeatureSums,
    add,
    density_coverage,
    feature_sums,
    frechet_distance,
    from_arrays,
    kid,
    precision_recall,
    to_arrays,
    zero,
)


def _features(seed: int, n: int, width: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + shift


def _by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = sqrtm(s1 @ s2).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root))


def test_frechet_against_scipys_matrix_root():
    x, y = _features(1, 300, 12), _features(2, 250, 12, shift=0.5)
    assert frechet_distance(feature_sums(x), feature_sums(y)) == pytest.approx(_by_sqrtm(x, y), rel=1e-9)


def test_frechet_of_diagonal_gaussians_in_closed_form():
    m1, m2 = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    d1, d2 = np.array([1.0, 4.0, 0.25]), np.array([2.25, 1.0, 0.25])

    def exact(mean, variance, n=100):
        outer = (n - 1) * np.diag(variance) + n * np.outer(mean, mean)
        return FeatureSums(n, n * mean, outer)

    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(exact(m1, d1), exact(m2, d2)) == pytest.approx(expected, rel=1e-12)


def test_frechet_with_fewer_images_than_features_is_finite_symmetric_and_zero_on_itself():
    a, b = feature_sums(_features(3, 20, 64)), feature_sums(_features(4, 25, 64))
    scale = np.trace(a.outer) / a.count
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), sites=st.integers(1, 5), shift=st.sampled_from([0.0, 100.0]))
def test_a_federations_figure_equals_the_pooled_one(seed, sites, shift):
    x, y = _features(seed, 60, 6, shift), _features(seed + 1, 40, 6, shift)
    total = zero(6)
    for part in np.array_split(x, sites):
        total = add(total, from_arrays(to_arrays(feature_sums(part))))
    pooled, other = feature_sums(x), feature_sums(y)
    assert total.count == pooled.count
    assert frechet_distance(total, other) == pytest.approx(frechet_distance(pooled, other), rel=1e-6, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 10))
def test_frechet_scales_with_the_square_of_the_features(seed, factor):
    x, y = _features(seed, 40, 5), _features(seed + 1, 40, 5)
    once = frechet_distance(feature_sums(x), feature_sums(y))
    assert once >= 0
    assert frechet_distance(feature_sums(factor * x), feature_sums(factor * y)) == pytest.approx(
        factor**2 * once, rel=1e-6
    )


def test_kid_against_a_loop_and_unbiased_at_zero():
    x, y = _features(5, 9, 4), _features(6, 7, 4, 0.3)

    def kernel(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)

    rng = np.random.default_rng(0)
    same = [kid(rng.normal(size=(20, 3)), rng.normal(size=(20, 3))) for _ in range(800)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * error
    assert min(same) < 0
    shifted = [kid(rng.normal(size=(20, 3)), rng.normal(size=(20, 3)) + 0.5) for _ in range(200)]
    assert np.mean(shifted) > 10 * error


def _loop_radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(float(np.linalg.norm(points[i] - other)) for j, other in enumerate(points) if j != i)[k - 1]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_coverage_against_loops(k):
    real, fake = _features(7, 30, 3), _features(7, 26, 3, 0.8)[:, ::-1] * 0.9
    near = [[float(np.linalg.norm(r - f)) for f in fake] for r in real]
    real_radius = [_loop_radius(real, i, k) for i in range(len(real))]
    fake_radius = [_loop_radius(fake, j, k) for j in range(len(fake))]
    precision = np.mean([any(near[i][j] <= real_radius[i] for i in range(30)) for j in range(26)])
    recall = np.mean([any(near[i][j] <= fake_radius[j] for j in range(26)) for i in range(30)])
    density = sum(near[i][j] < real_radius[i] for i in range(30) for j in range(26)) / (k * 26)
    coverage = np.mean([min(near[i]) < real_radius[i] for i in range(30)])
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall))
    assert density_coverage(real, fake, k) == pytest.approx((density, coverage))
    assert 0 < precision < 1
    assert 0 < coverage < 1


def test_likeness_tells_good_broad_and_collapsed_generators_apart():
    rng = np.random.default_rng(11)
    real, good = rng.normal(size=(300, 4)), rng.normal(size=(300, 4))
    collapsed, far = 0.01 * rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 30
    assert min(precision_recall(real, good)) > 0.8
    assert precision_recall(real, collapsed)[0] == 1
    assert precision_recall(real, collapsed)[1] < 0.05
    assert precision_recall(real, far) == (0, 0)
    density, coverage = density_coverage(real, good)
    assert density == pytest.approx(1, abs=0.15)
    assert coverage > 0.9
    assert density_coverage(real, collapsed)[1] < 0.3
    assert density_coverage(real, far) == (0, 0)


def test_a_large_common_offset_changes_no_neighbour():
    real, fake = _features(1, 40, 5), _features(2, 40, 5)
    assert precision_recall(real + 1e4, fake + 1e4) == precision_recall(real, fake)
    assert density_coverage(real + 1e4, fake + 1e4) == density_coverage(real, fake)


def test_too_few_images_and_broken_features_are_refused():
    x = _features(0, 10, 3)
    with pytest.raises(DataError, match="at least 2 images"):
        frechet_distance(feature_sums(x[:1]), feature_sums(x))
    with pytest.raises(DataError, match="width"):
        frechet_distance(feature_sums(x), feature_sums(x[:, :2]))
    with pytest.raises(DataError, match="6 images"):
        precision_recall(x, x[:5])
    with pytest.raises(DataError, match="width"):
        kid(x, x[:, :2])
    for bad in (x * np.nan, x[0]):
        with pytest.raises(DataError, match="finite matrix"):
            feature_sums(bad)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("count", np.array([-1.0]), "contradict"),
        ("count", np.array([0.0]), "contradict"),
        ("count", np.array([1.0]), "contradict"),
        ("count", np.array([10]), "float64"),
        ("count", np.array([9.5]), "contradict"),
        ("count", np.array([10.0, 1.0]), "shapes"),
        ("total", np.full(3, np.inf), "finite"),
        ("total", np.zeros(2), "shapes"),
        ("outer", np.arange(9.0).reshape(3, 3) + 100 * np.eye(3), "symmetric"),
    ],
)
def test_nonsense_from_a_site_is_refused(name, value, reason):
    arrays = to_arrays(feature_sums(_features(0, 10, 3)))
    arrays[name] = value
    with pytest.raises(FederationError, match=reason):
        from_arrays(arrays)


def test_missing_arrays_are_refused():
    with pytest.raises(FederationError, match="must carry"):
        from_arrays({"count": np.array([1])})
    with pytest.raises(FederationError, match="one network"):
        add(zero(2), zero(3))
