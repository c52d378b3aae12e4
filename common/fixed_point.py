"""Numbers as words of a ring, so that sums of masked numbers are sums of numbers: fixed point mod 2^32 and mod 2^64.

::

    site:         {name: array} --pack_weights--> uint32 [n]   rint(w * n_i/N * 2^26)     weights, |w| <= 31
                  {name: array} --pack_sums-----> uint64 [n]   whole numbers as they are; rint(x * 2^24) for the others
                                                     |  masks are added, sites are added, masks cancel (secure_sum)
    coordinator:  uint32 [n] --unpack_weights--> {name: float32 array}, the mean over the sites that answered
                  uint64 [n] --unpack_sums-----> {name: int64 or float64 array}, the sum over the sites that answered

Signed numbers are in two's complement. Nothing is on disk here.

Formal guarantees
    Weights. With n_1 + ... + n_K <= N over K <= 2^26 sites, no sum leaves the ring: a site's word differs from
    w * n_i/N * 2^26 by at most 1/2 (rounding) and 2^-20 (float64), so the sum's magnitude is at most
    31 * 2^26 + K * (1/2 + 2^-20) < 32 * 2^26 = 2^31. (|w| <= 32 would not do: sites that all hold w = 32 add up to 2^31,
    which is -2^31 in the ring.) The mean over the sites that answered, which hold n images, is off by at most
    K * 2^-27 * (1 + 2^-19) * N/n, and half a float32 step of the result.
    Sums. Whole numbers are exact: K sites may each send magnitudes up to 2^62 / K. Other numbers, up to 2^38 / K
    each, are off by at most K * 2^-25 in the sum, and half a float64 step of it.
    NaN, infinity and numbers beyond these limits are refused at the site; nothing is clipped silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import FederationError, RefusedError

__all__ = [
    "SUM_BITS",
    "WEIGHT_BITS",
    "WEIGHT_LIMIT",
    "Entry",
    "Layout",
    "pack_sums",
    "pack_weights",
    "sums_layout",
    "unpack_sums",
    "unpack_weights",
    "weights_layout",
]

WEIGHT_BITS = 26
WEIGHT_LIMIT = 31.0
SUM_BITS = 24
_WHOLE_LIMIT = 2**62
_FLOAT_LIMIT = 2**38
_BLOCK = 1 << 18
"""Words worked on at a time: the float64 in between stays in the cache."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One array of a vector: its `name`, `shape`, and `bits` after the binary point (0 for whole numbers)."""

    name: str
    shape: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        """Number of words."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which arrays a vector holds, in the order of their names. Both sides make it from the same arrays."""

    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Number of words of the whole vector."""
        return sum(entry.size for entry in self.entries)

    def slices(self) -> Iterator[tuple[Entry, slice]]:
        """Each entry with its place in the vector."""
        start = 0
        for entry in self.entries:
            yield entry, slice(start, start + entry.size)
            start += entry.size


def weights_layout(template: Arrays) -> Layout:
    """Layout of float arrays named and shaped as `template` (values are not read). Raises `ValueError` on other types."""
    odd = sorted(name for name, array in template.items() if array.dtype.kind != "f")
    if odd:
        raise ValueError(f"weights must be floating point numbers; these are not: {odd[:5]}")
    return _layout(template, dict.fromkeys(template, WEIGHT_BITS))


def sums_layout(template: Arrays) -> Layout:
    """Layout of statistics named and shaped as `template`: whole numbers or floats, by dtype. Raises `ValueError` on others."""
    odd = sorted(name for name, array in template.items() if array.dtype.kind not in "biuf")
    if odd:
        raise ValueError(f"statistics must be whole or floating point numbers; these are not: {odd[:5]}")
    return _layout(template, {name: SUM_BITS * (array.dtype.kind == "f") for name, array in template.items()})


def _layout(template: Arrays, bits: Mapping[str, int]) -> Layout:
    return Layout(
        entries=tuple(Entry(name=name, shape=template[name].shape, bits=bits[name]) for name in sorted(template))
    )


def pack_weights(layout: Layout, weights: Arrays, images: int, total: int) -> npt.NDArray[np.uint32]:
    """This site's share ``images / total`` of the weights, uint32 [layout.size].

    `weights`: float arrays with names and shapes of `layout`, every value within +-31. `images`: what the site holds,
    0..`total`; `total`: images of all sites together, at least 1. Raises `RefusedError` naming the array or number.
    """
    if not 0 <= images <= total or total < 1:
        raise RefusedError(
            f"secure sum: this site holds {images} images and was told that all sites together hold {total}. "
            "The coordinator must count the sites' images again."
        )
    factor = images / total * 2.0**WEIGHT_BITS
    words = np.empty(layout.size, np.uint32)
    for entry, place in _checked(layout, weights, "f", "f"):
        source, target = weights[entry.name].reshape(-1), words[place]
        for start in range(0, entry.size, _BLOCK):
            block = source[start : start + _BLOCK]
            _check_range(entry.name, block, WEIGHT_LIMIT)
            scaled = block.astype(np.float64)
            scaled *= factor
            np.rint(scaled, out=scaled)
            target[start : start + _BLOCK] = scaled.astype(np.int32).view(np.uint32)
    return words


def unpack_weights(
    layout: Layout, words: npt.NDArray[np.uint32], images: int, total: int
) -> dict[str, npt.NDArray[np.float32]]:
    """The mean weights, from the sum of the shares of sites that hold `images` of `total` images together.

    Raises `FederationError` when `images` is not in 1..`total`, or the vector does not fit `layout`.
    """
    if not 1 <= images <= total:
        raise FederationError(
            f"secure sum: the sites that answered hold {images} images, but it was announced that all sites hold {total}. "
            "Count the sites' images again (Describe), then repeat the round."
        )
    _check_size(layout, words, np.dtype(np.uint32))
    factor = total / images * 2.0**-WEIGHT_BITS
    means = {}
    for entry, place in layout.slices():
        source, target = words[place].view(np.int32), np.empty(entry.size, np.float32)
        for start in range(0, entry.size, _BLOCK):
            target[start : start + _BLOCK] = source[start : start + _BLOCK] * factor
        means[entry.name] = target.reshape(entry.shape)
    return means


def pack_sums(layout: Layout, arrays: Arrays, sites: int) -> npt.NDArray[np.uint64]:
    """This site's statistics, uint64 [layout.size].

    `sites`: how many sites are summed at most, at least 1; whole numbers may be up to 2^62 / sites and others up to
    2^38 / sites in magnitude. Raises `RefusedError` naming the array, `ValueError` on `sites` < 1.
    """
    if sites < 1:
        raise ValueError(f"a sum is over at least one site, not {sites}")
    words = np.empty(layout.size, np.uint64)
    for entry, place in _checked(layout, arrays, "biu", "f"):
        values = arrays[entry.name].reshape(-1)
        if entry.bits:
            _check_range(entry.name, values, _FLOAT_LIMIT / sites)
            # a power of two scales without rounding, and 2^62 has its place in int64
            words[place] = np.rint(values.astype(np.float64) * 2.0**entry.bits).astype(np.int64).view(np.uint64)
        else:
            _check_range(entry.name, values, _WHOLE_LIMIT // sites)
            words[place] = values.astype(np.int64).view(np.uint64)
    return words


def unpack_sums(layout: Layout, words: npt.NDArray[np.uint64]) -> dict[str, npt.NDArray[Any]]:
    """The summed statistics: int64 for whole numbers, float64 for others. Raises `FederationError` on another size."""
    _check_size(layout, words, np.dtype(np.uint64))
    sums: dict[str, npt.NDArray[Any]] = {}
    for entry, place in layout.slices():
        values = words[place].view(np.int64).reshape(entry.shape)
        sums[entry.name] = values * 2.0**-entry.bits if entry.bits else values.copy()
    return sums


def _checked(layout: Layout, arrays: Arrays, whole: str, fractional: str) -> Iterator[tuple[Entry, slice]]:
    """The slices of `layout`, after all of `arrays` was found to fit it; raises `RefusedError`."""
    names = {entry.name for entry in layout.entries}
    if names != arrays.keys():
        raise RefusedError(f"secure sum: these arrays are on one side only: {sorted(names ^ arrays.keys())[:5]}")
    for entry in layout.entries:
        array = arrays[entry.name]
        if array.shape != entry.shape or array.dtype.kind not in (fractional if entry.bits else whole):
            raise RefusedError(
                f"secure sum: {entry.name} is {array.dtype} {array.shape}, expected {entry.shape} of "
                f"{'floating point' if entry.bits else 'whole'} numbers"
            )
    return layout.slices()


def _check_range(name: str, values: npt.NDArray[Any], limit: float) -> None:
    if not values.size:
        return
    # as Python numbers: the magnitude of the least int64 has no place in int64. A NaN is both least and greatest.
    low, high = values.min().item(), values.max().item()
    if not (-limit <= low and high <= limit):
        raise RefusedError(
            f"secure sum: {name} holds values from {low} to {high}; allowed are finite numbers within +-{limit:g}. "
            "Nothing was sent. Did the training diverge?"
        )


def _check_size(layout: Layout, words: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
    if words.dtype != dtype or words.shape != (layout.size,):
        raise FederationError(
            f"secure sum: the vector is {words.dtype} {words.shape}, expected {dtype} ({layout.size},). "
            "Do coordinator and sites run the same version and study?"
        )
