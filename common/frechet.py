"""How like real images the synthetic ones are, in the features of a network.

::

    features at each site --feature_sums--> sums --add over sites--> frechet_distance (as if pooled)
    features real, fake at one site --> kid, precision_recall, density_coverage (only numbers leave)

Features are float arrays [n, D]. Every figure depends on the network and on n: read it beside its floor, the
same figure between two halves of the real images. All return plain floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import DataError, FederationError

__all__ = [
    "FeatureSums",
    "add",
    "density_coverage",
    "feature_sums",
    "frechet_distance",
    "from_arrays",
    "kid",
    "precision_recall",
    "to_arrays",
    "zero",
]

Features = npt.NDArray[np.floating[Any]]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FeatureSums:
    """`count` of images; `total` float64 [D], sum of features; `outer` float64 [D, D], sum of x x^T."""

    count: int
    total: Matrix
    outer: Matrix


def zero(width: int) -> FeatureSums:
    """The sums over no image with features of `width` numbers: the neutral element of `add`."""
    return FeatureSums(0, np.zeros(width), np.zeros((width, width)))


def add(a: FeatureSums, b: FeatureSums) -> FeatureSums:
    """The sums over both. Raises `FederationError` when the features differ in width."""
    if a.total.shape != b.total.shape:
        raise FederationError(
            f"features of width {a.total.size} and {b.total.size} cannot be added: use one network for all"
        )
    return FeatureSums(a.count + b.count, a.total + b.total, a.outer + b.outer)


def feature_sums(features: Features) -> FeatureSums:
    """Sums of features [n, D], n may be 0. Raises `DataError` when they are not a finite matrix."""
    x = _checked(features)
    return FeatureSums(len(x), x.sum(axis=0), x.T @ x)


def to_arrays(sums: FeatureSums) -> dict[str, Matrix]:
    """The sums as named float64 arrays, for the wire."""
    return {"count": np.array([float(sums.count)]), "total": sums.total, "outer": sums.outer}


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> FeatureSums:
    """The inverse of `to_arrays`. Raises `FederationError` for sums no features can have."""
    names = {"count", "total", "outer"}
    if set(arrays) != names:
        raise FederationError(f"feature sums must carry {sorted(names)}, not {sorted(arrays)}")
    count, total, outer = arrays["count"], arrays["total"], arrays["outer"]
    shapes, width = (count.shape, total.shape, outer.shape), total.size
    if shapes != ((1,), (width,), (width, width)):
        raise FederationError(f"feature sums have shapes {shapes}, which do not fit together")
    if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays.values()):
        raise FederationError("feature sums must be finite float64 numbers; this site's answer is not used")
    n = float(count[0])
    scale = max(1.0, float(np.abs(outer).max(initial=0.0)))
    spread = outer.diagonal() * n - total**2
    empty_but_not = n == 0 and bool(total.any() or outer.any())
    impossible = spread.min(initial=0.0) < -1e-6 * scale * max(n, 1)
    if n < 0 or n > 2**53 or n != int(n) or empty_but_not or impossible:
        raise FederationError("feature sums contradict their count; this site's answer is not used")
    if np.abs(outer - outer.T).max(initial=0.0) > 1e-9 * scale:
        raise FederationError("the sum of outer products is not symmetric; this site's answer is not used")
    return FeatureSums(int(n), total, outer)


def _root(sums: FeatureSums) -> tuple[Matrix, Matrix, float]:
    """Mean [D], the symmetric root of the covariance [D, D], and the covariance's trace."""
    if sums.count < 2:
        raise DataError(f"a Frechet distance needs at least 2 images on each side, not {sums.count}")
    mean = sums.total / sums.count
    covariance = (sums.outer - sums.count * np.outer(mean, mean)) / (sums.count - 1)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    noise = np.finfo(np.float64).eps * len(values) * max(float(values[-1]), 0.0)
    kept = np.where(values > noise, values, 0.0)
    root: Matrix = (vectors * np.sqrt(kept)) @ vectors.T
    return mean, root, float(kept.sum())


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): Dowson and Landau 1982; as FID, Heusel et al. 2017.

    The trace of the root is the sum of singular values of S1^(1/2) S2^(1/2): only symmetric matrices are
    decomposed, so the figure is real and at least 0 also when there are fewer images than features. Raises
    `DataError` below 2 images.

    Guarantees: symmetric; 0 for equal sums; sums over sites give the pooled figure.
    """
    if a.total.shape != b.total.shape:
        raise DataError(f"features of width {a.total.size} and {b.total.size} cannot be compared")
    mean_a, root_a, trace_a = _root(a)
    mean_b, root_b, trace_b = _root(b)
    shared = float(np.linalg.svd(root_a @ root_b, compute_uv=False).sum())
    return max(0.0, float(((mean_a - mean_b) ** 2).sum()) + trace_a + trace_b - 2 * shared)


def kid(x: Features, y: Features) -> float:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    `x` [n, D] and `y` [m, D], n and m at least 2. Near 0 it may be negative. Raises `DataError`.
    """
    a, b = _pair(x, y, 2)
    width = a.shape[1]

    def kernel(left: Matrix, right: Matrix) -> Matrix:
        return np.asarray((left @ right.T / width + 1) ** 3)

    def within(values: Matrix) -> float:
        return float((values.sum() - np.trace(values)) / (len(values) * (len(values) - 1)))

    return within(kernel(a, a)) + within(kernel(b, b)) - 2 * float(kernel(a, b).mean())


def precision_recall(real: Features, fake: Features, k: int = 5) -> tuple[float, float]:
    """Share of fakes among the reals, and of reals among the fakes (Kynkaanniemi et al. 2019, eq. 1-2).

    "Among" is: within the distance from some point of the other set to its k-th nearest neighbour in its own
    set. Needs k + 1 images on each side. Raises `DataError`.
    """
    x, y = _pair(real, fake, k + 1)
    between = _distances(x, y)
    precision = (between <= _radii(x, k)[:, None]).any(axis=0).mean()
    recall = (between <= _radii(y, k)[None, :]).any(axis=1).mean()
    return float(precision), float(recall)


def density_coverage(real: Features, fake: Features, k: int = 5) -> tuple[float, float]:
    """How densely fakes lie among reals (about 1 is ideal), and the share of reals with a fake near (0..1).

    Naeem et al. 2020, eq. 5-6: both use only the reals' neighbourhoods, so odd fakes cannot inflate them.
    Needs k + 1 real images and k + 1 fakes. Raises `DataError`.
    """
    x, y = _pair(real, fake, k + 1)
    inside = _distances(x, y) < _radii(x, k)[:, None]
    return float(inside.sum(axis=0).mean() / k), float(inside.any(axis=1).mean())


def _distances(x: Matrix, y: Matrix) -> Matrix:
    """Squared Euclidean distances [n, m], centred first so that large means cost no precision."""
    centre = x.mean(axis=0)
    x, y = x - centre, y - centre
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2 * (x @ y.T)
    floored: Matrix = np.maximum(squares, 0.0)
    return floored


def _radii(x: Matrix, k: int) -> Matrix:
    """Squared distance from each point to its k-th nearest other point."""
    distances = _distances(x, x)
    np.fill_diagonal(distances, np.inf)
    nearest: Matrix = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return nearest


def _checked(features: Features) -> Matrix:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.shape[1] or not np.isfinite(x).all():
        raise DataError(f"features must be a finite matrix [n, D], not {x.shape}; did the network diverge?")
    return x


def _pair(x: Features, y: Features, least: int) -> tuple[Matrix, Matrix]:
    a, b = _checked(x), _checked(y)
    if a.shape[1] != b.shape[1]:
        raise DataError(f"features of width {a.shape[1]} and {b.shape[1]} cannot be compared")
    if least < 2 or min(len(a), len(b)) < least:
        raise DataError(f"at least {max(least, 2)} images are needed on each side, not {len(a)} and {len(b)}")
    return a, b
