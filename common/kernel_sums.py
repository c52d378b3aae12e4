"""The kernel distance (KID) as if all images were in one place, from sums that sites can send.

::

    features [n, D] --/ scale--> u = (x / sqrt(D), 1) --monomials u_i u_j u_k, i <= j <= k--> sum over images [C(D + 3, 3)]
                                                        and the sum of k(x, x): one number
    sums of sites --add--> sums --kernel_distance--> the unbiased KID of the pooled images

The kernel (x.y / D + 1)^3 = (u.v)^3 is a dot product of weighted monomials of degree 3 in D + 1 numbers, so a mean over
pairs of images is a product of two sums (Binkowski et al. 2018, section 4, for the kernel and the estimator). At D = 16 the sum
has 969 numbers, at D = 64 it would have 47,905: hence few dimensions. Sums of third order say more about single images than
means and covariances do: over few images they could be solved for each image's features. A site gives them only from
`LEAST` images on: below it the numbers sent (2,961 with the covariance of all 64 dimensions) are as many as those looked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import DataError, FederationError

__all__ = [
    "LEAST",
    "KernelSums",
    "add_kernel",
    "kernel_distance",
    "kernel_from_arrays",
    "kernel_sums",
    "kernel_to_arrays",
    "kernel_zero",
]

LEAST = 48
BLOCK = 256

Features = npt.NDArray[np.floating[Any]]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KernelSums:
    """`count` of images; `total` float64 [C(D + 3, 3)], sum of the kernel's own features; `own`, sum of k(x, x)."""

    count: int
    total: Vector
    own: float


@lru_cache(maxsize=4)
def _monomials(width: int) -> tuple[npt.NDArray[np.int64], Vector]:
    """Positions [M, 3] in u, and the root of how many of the 27 products u_i u_j u_k are this one [M]."""
    triples = list(combinations_with_replacement(range(width + 1), 3))
    times = [6 / math.prod(math.factorial(triple.count(i)) for i in set(triple)) for triple in triples]
    return np.array(triples, dtype=np.int64), np.sqrt(np.array(times))


def kernel_zero(width: int) -> KernelSums:
    """The sums over no image with features of `width` numbers: the neutral element of `add_kernel`."""
    return KernelSums(0, np.zeros(math.comb(width + 3, 3)), 0.0)


def add_kernel(a: KernelSums, b: KernelSums) -> KernelSums:
    """The sums over both. Raises `FederationError` when the features differ in width."""
    if a.total.shape != b.total.shape:
        raise FederationError(f"kernel sums of {a.total.size} and {b.total.size} numbers cannot be added")
    return KernelSums(a.count + b.count, a.total + b.total, a.own + b.own)


def kernel_sums(features: Features, scale: float = 1.0) -> KernelSums:
    """Sums of `features` [n, D] divided by `scale`, n may be 0. Raises `DataError` when they are not a finite matrix."""
    x = np.asarray(features, dtype=np.float64) / scale
    if x.ndim != 2 or not x.shape[1] or not np.isfinite(x).all():
        raise DataError(f"features must be a finite matrix [n, D], not {x.shape}; did the network diverge?")
    triples, weights = _monomials(x.shape[1])
    u = np.concatenate([x / math.sqrt(x.shape[1]), np.ones((len(x), 1))], axis=1)
    total = np.zeros(len(triples))
    for start in range(0, len(u), BLOCK):
        block = u[start : start + BLOCK]
        total += np.einsum("nm,nm,nm->m", *(block[:, triples[:, place]] for place in range(3)))
    return KernelSums(len(x), total * weights, float(((u**2).sum(axis=1) ** 3).sum()))


def kernel_to_arrays(sums: KernelSums) -> dict[str, Vector]:
    """The sums as named float64 arrays, for the wire."""
    return {"count": np.array([float(sums.count)]), "total": sums.total, "own": np.array([sums.own])}


def kernel_from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> KernelSums:
    """The inverse of `kernel_to_arrays`. Raises `FederationError` for sums no features can have."""
    names = {"count", "total", "own"}
    if set(arrays) != names:
        raise FederationError(f"kernel sums must carry {sorted(names)}, not {sorted(arrays)}")
    count, total, own = arrays["count"], arrays["total"], arrays["own"]
    if count.shape != (1,) or own.shape != (1,) or total.ndim != 1 or not total.size:
        raise FederationError(f"kernel sums have shapes {count.shape}, {total.shape}, {own.shape}; not used")
    if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in arrays.values()):
        raise FederationError("kernel sums must be finite float64 numbers; this site's answer is not used")
    n, trace = float(count[0]), float(own[0])
    # the last monomial is 1 for every image; k(x, x) >= 1; and |sum|^2 <= n sum of squares
    slack = 1e-6 * max(1.0, n)
    impossible = abs(float(total[-1]) - n) > slack or trace < n - slack or total @ total > (n + slack) * (trace + slack)
    if n < 0 or n > 2**53 or n != int(n) or impossible:
        raise FederationError("kernel sums contradict their count; this site's answer is not used")
    return KernelSums(int(n), total, trace)


def kernel_distance(a: KernelSums, b: KernelSums) -> float:
    """The unbiased MMD^2 of the kernel (x.y / D + 1)^3, as `xfed.common.frechet.kid`; near 0 it may be negative.

    Raises `DataError` below 2 images on a side, or when the features differ in width.

    Guarantees: symmetric; sums over sites give the pooled figure; equal to `kid` on the same images.
    """
    if a.total.shape != b.total.shape:
        raise DataError(f"kernel sums of {a.total.size} and {b.total.size} numbers cannot be compared")
    if min(a.count, b.count) < 2:
        raise DataError(f"a kernel distance needs at least 2 images on each side, not {a.count} and {b.count}")

    def within(sums: KernelSums) -> float:
        return float(sums.total @ sums.total - sums.own) / (sums.count * (sums.count - 1))

    return within(a) + within(b) - 2 * float(a.total @ b.total) / (a.count * b.count)
