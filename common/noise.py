"""Gaussian noise that nobody can foretell, repeat, or read data out of: the only source of privacy noise.

::

    os.urandom --32 bytes, once per release--> ChaCha20 key, block number in the nonce --> 64-bit words
    words --53 bits--> uniforms --Box-Muller, float64--> deviation * normal --round--> grid, int64 --+-- + --> float32
                 `--11 bits--> dither, -1024..1023 grid steps, int64 --------------------------------|
    un-noised sums, float32 --round--> grid, int64 --------------------------------------------------'

Formal guarantees
- No seed. A key is drawn from the operating system for every release, is used for that release alone, and is written nowhere:
  so nothing repeats after a restart, a fork, a copy of the process, or in another thread.
- The result is a whole number of grid steps whatever the data are: the sums are rounded to the grid, the noise is rounded to the
  grid by itself, and the two are added as integers. Adding float noise to float sums gives other sets of possible results for
  other sums, and that tells neighbours apart (Mironov 2012, "On significance of the least significant bits").
- For integers X and any real N, ``X + round(N) = round(X + N)``: the result is post-processing of the Gaussian mechanism on the
  rounded sums. Rounding moves an entry by half a step, so it adds ``sqrt(entries) * grid`` to the sensitivity; `grid_for`
  keeps that below `GRID_LOSS` of it. The dither and the conversion to float32 are post-processing too.
- Float64 normals are not real numbers: `log` and `cos` err by about 2^-53, and a bound between two grid steps moves by as much.
  The dither joins 2,048 neighbouring steps, inside of which the errors cancel: the probability of a result is that of the ideal
  mechanism to about 2^-30. Where 53 bits are too coarse (radii near 0, far tails), 53 more are drawn.
- Not covered: how long it takes, what else can be read from the memory of this process, a broken `os.urandom`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from xfed.common.errors import FederationError

__all__ = ["GRID_LOSS", "add_gaussian", "grid_for", "secret_words"]

GRID_LOSS = 1e-6
"""Rounding to the grid adds less than this part of the sensitivity to it."""

# values per turn: all buffers of a turn stay in a core's second-level cache
_CHUNK = 1 << 15
_UNIFORM_BITS = 53
_DITHER_BITS = 64 - _UNIFORM_BITS
_RARE = 1 << 33
_LARGEST_SUM = 2.0**62
_LARGEST_NOISE = 2.0**52

Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


class _KeyStream:
    """ChaCha20 under a key of its own. It lives for one call, and can be neither copied nor pickled."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._block = 0

    def fill(self, words: Words) -> None:
        """Overwrite `words` [n] with secret uniform ones."""
        # OpenSSL's layout: 64-bit counter of 64-byte blocks, then 64 bits that are ours: no position is used twice
        nonce = bytes(8) + self._block.to_bytes(8, "little")
        self._block += 1
        target = words.data.cast("B")
        Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor().update_into(bytes(len(target)), target)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a key stream cannot be copied or pickled: its noise would come twice")


def secret_words(count: int) -> Words:
    """`count` secret words, uint64 [count], uniform; another key for every call."""
    words = np.empty(count, dtype=np.uint64)
    if count:
        _KeyStream().fill(words)
    return words


def grid_for(sensitivity: float, entries: int) -> float:
    """Grid step for `entries` sums of L2 `sensitivity`: a power of two.

    It is the largest with ``sqrt(entries) * step < GRID_LOSS * sensitivity``. Raises `ValueError` when the sensitivity is
    not a finite number above 0.
    """
    if not 0 < sensitivity < math.inf:
        raise ValueError(f"sensitivity must be a finite number above 0, not {sensitivity}")
    return 2.0 ** (math.ceil(math.log2(GRID_LOSS * sensitivity / math.sqrt(max(entries, 1)))) - 1)


def _normals(stream: _KeyStream, words: Words, normals: Floats) -> None:
    """Overwrite `normals` [n], n even, with standard normals (Box and Muller 1958).

    `words` [n] are overwritten too; their low 11 bits are not used here.
    """
    stream.fill(words)
    half = len(words) // 2
    whole = (words >> np.uint64(_DITHER_BITS)).view(np.int64)
    radii, angles = normals[:half], normals[half:]
    np.add(whole[:half], 0.5, out=radii)
    radii *= 2.0**-_UNIFORM_BITS
    np.log(radii, out=radii)
    _refine(stream, whole[:half], radii)
    radii *= -2
    np.sqrt(radii, out=radii)
    np.multiply(whole[half:], 2 * math.pi * 2.0**-_UNIFORM_BITS, out=angles)
    cosines = np.cos(angles)
    np.sin(angles, out=angles)
    angles *= radii
    radii *= cosines


def _refine(stream: _KeyStream, whole: npt.NDArray[np.int64], logarithms: Floats) -> None:
    """Redo the logarithms of uniforms within 2^-20 of 0 or 1 with 53 more bits."""
    last = (1 << _UNIFORM_BITS) - 1
    for rows, steps in (
        (low := np.flatnonzero(whole < _RARE), whole[low]),
        (high := np.flatnonzero(whole > last - _RARE), last - whole[high]),
    ):
        if len(rows) == 0:
            continue
        more = np.empty(len(rows), dtype=np.uint64)
        stream.fill(more)
        fraction = ((more >> np.uint64(_DITHER_BITS)).astype(np.float64) + 0.5) * 2.0**-_UNIFORM_BITS
        fine = (steps + fraction) * 2.0**-_UNIFORM_BITS
        logarithms[rows] = np.log(fine) if rows is low else np.log1p(-fine)


def add_gaussian(sums: npt.NDArray[np.float32], *, deviation: float, grid: float) -> npt.NDArray[np.float32]:
    """`sums` float32 [n], rounded to `grid`, plus normals of `deviation`, rounded to `grid`; a new array.

    Raises `FederationError` when a sum is not finite, `ValueError` when the deviation is not a finite number above 0 or
    more than 2^52 grid steps.
    """
    if not 0 < deviation < math.inf:
        raise ValueError(f"deviation must be a finite number above 0, not {deviation}")
    if not deviation / grid < _LARGEST_NOISE:
        raise ValueError(f"a deviation of {deviation:g} is more than 2^52 steps of the grid {grid:g}")
    stream = _KeyStream()
    result = np.empty(len(sums), dtype=np.float32)
    words = np.empty(_CHUNK, dtype=np.uint64)
    normals = np.empty(_CHUNK, dtype=np.float64)
    scaled = np.empty(_CHUNK, dtype=np.float64)
    units = np.empty(_CHUNK, dtype=np.int64)
    low_bits = np.uint64((1 << _DITHER_BITS) - 1)
    for start in range(0, len(sums), _CHUNK):
        count = min(_CHUNK, len(sums) - start)
        even = count + count % 2
        _normals(stream, words[:even], normals[:even])
        noise, total, left = normals[:count], scaled[:count], units[:count]
        noise *= deviation / grid
        np.rint(noise, out=noise)
        np.copyto(left, noise, casting="unsafe")
        np.multiply(sums[start : start + count], 1 / grid, out=total, dtype=np.float64)
        np.rint(total, out=total)
        if not np.abs(total).max() < _LARGEST_SUM:
            raise FederationError(
                "a sum over patients is not finite, so nothing was released. The weights have diverged: lower the learning "
                "rate of this phase and start the study again."
            )
        left += total.astype(np.int64)
        words &= low_bits
        left += words[:count].view(np.int64)
        left -= 1 << (_DITHER_BITS - 1)
        np.multiply(left, grid, out=total)
        result[start : start + count] = total
    return result
