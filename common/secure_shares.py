"""Shamir's shares for secure sums among a hundred sites, in the form that Flower's have on the wire.

::

    secret bytes --split(t, n)--> n shares; any t of them --join--> secret bytes; fewer say nothing (Shamir 1979)
    a share: its index 1..n (4 bytes, little-endian), then 16 bytes per block of the padded secret (PKCS#7)

Each block of 16 bytes (big-endian) is a polynomial over GF(2) modulo x^128 + x^7 + x^2 + x + 1, and the constant term of a random
polynomial over that field, whose value at i is share i. All blocks of a secret lie in one whole number, 256 bits apart, so
that a product with a public factor is a few shifts for all of them; the factors of `join` depend on the indices alone, and are
worked out once for all secrets. Flower's own functions take every block and secret by itself, 20 to 100 times as long with
100 sites (docs/benchmarks.md, "Scale"); the tests hold both against each other.

Control flow depends on indices, thresholds and lengths, which everybody knows, and never on a secret or a share, but for the
padding that `join` checks in what it gives back. Python's whole numbers promise no constant time beyond that.
"""

from __future__ import annotations

import os
from functools import lru_cache

__all__ = ["join", "share_bytes", "share_index", "split"]

_BLOCK = 16
_INDEX_BYTES = 4
_LOW = 2**128 - 1


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """`count` shares of `secret`, of which any `threshold` (1..count) give it back. Raises `ValueError` on other numbers."""
    if not 1 <= threshold <= count:
        raise ValueError(f"{threshold} of {count} shares cannot be what gives a secret back")
    padding = _BLOCK - len(secret) % _BLOCK
    blocks = len(secret) // _BLOCK + 1
    coefficients = [_packed(os.urandom(_BLOCK * blocks)) for _ in range(threshold - 1)]
    constant = _packed(secret + bytes([padding]) * padding)
    shares = []
    for index in range(1, count + 1):
        value = 0
        for coefficient in (*coefficients, constant):
            value = _reduced(_product(value, index), blocks) ^ coefficient
        shares.append(index.to_bytes(_INDEX_BYTES, "little") + _unpacked(value, blocks))
    return shares


def join(shares: list[bytes]) -> bytes:
    """The secret, from exactly the threshold of shares. Raises `ValueError` when they plainly do not belong together.

    Wrong shares may also give wrong bytes: compare with something that was announced before.
    """
    sizes = {len(share) for share in shares}
    if len(sizes) != 1 or (size := sizes.pop() - _INDEX_BYTES) < _BLOCK or size % _BLOCK:
        raise ValueError("these shares are not of one secret: their lengths differ, or are none of a share")
    blocks, total = size // _BLOCK, 0
    for share, weight in zip(shares, _weights(tuple(map(share_index, shares))), strict=True):
        total ^= _product(_packed(share[_INDEX_BYTES:]), weight)
    padded = _unpacked(_reduced(total, blocks), blocks)
    padding = padded[-1]
    if not 1 <= padding <= _BLOCK or padded[-padding:] != bytes([padding]) * padding:
        raise ValueError("these shares are not of one secret")
    return padded[:-padding]


def share_bytes(secret_bytes: int) -> int:
    """Bytes of one share of a secret of so many bytes: 4 for its index, then the secret padded to blocks of 16."""
    return _INDEX_BYTES + (secret_bytes // _BLOCK + 1) * _BLOCK


def share_index(share: bytes) -> int:
    """Which share this is: 1..count, in the order of `split`."""
    return int.from_bytes(share[:_INDEX_BYTES], "little")


def _packed(blocks: bytes) -> int:
    """Blocks of 16 bytes as one number, 256 bits apart."""
    return int.from_bytes(
        b"".join(bytes(_BLOCK) + blocks[start : start + _BLOCK] for start in range(0, len(blocks), _BLOCK)), "big"
    )


def _unpacked(value: int, blocks: int) -> bytes:
    """The inverse of `_packed`."""
    wide = value.to_bytes(2 * _BLOCK * blocks, "big")
    return b"".join(wide[start + _BLOCK : start + 2 * _BLOCK] for start in range(0, len(wide), 2 * _BLOCK))


def _product(value: int, factor: int) -> int:
    """Each block of `value` times the public `factor` (below 2^128) over GF(2), not reduced: at most 255 bits per block."""
    product = 0
    while factor:
        if factor & 1:
            product ^= value
        value <<= 1
        factor >>= 1
    return product


@lru_cache(maxsize=8)
def _low_halves(blocks: int) -> int:
    return sum(_LOW << 256 * block for block in range(blocks))


def _reduced(value: int, blocks: int) -> int:
    """Each block of 255 bits modulo x^128 + x^7 + x^2 + x + 1; the second fold takes what the first put above 128 bits."""
    low = _low_halves(blocks)
    for _ in range(2):
        high = value >> 128 & low
        value = (value & low) ^ high ^ high << 1 ^ high << 2 ^ high << 7
    return value


@lru_cache(maxsize=256)
def _weights(indices: tuple[int, ...]) -> tuple[int, ...]:
    """What each share counts in the value at 0 (Lagrange): the product over m != j of x_m / (x_j - x_m)."""
    if len(set(indices)) != len(indices) or 0 in indices:
        raise ValueError(f"shares have indices from 1 on, each once, not {indices}")
    every = 1
    for index in indices:
        every = _times(every, index)
    below = []
    for index in indices:
        product = index
        for other in indices:
            if other != index:
                product = _times(product, index ^ other)
        below.append(product)
    return tuple(_times(every, inverse) for inverse in _inverses(below))


def _times(a: int, b: int) -> int:
    return _reduced(_product(a, b), 1)


def _inverses(elements: list[int]) -> list[int]:
    """Inverses of elements that are not 0, by one inversion of their product (Montgomery 1987)."""
    products = [1]
    for element in elements:
        products.append(_times(products[-1], element))
    inverse, square = 1, products[-1]
    for _ in range(127):  # a^(2^128 - 2) = the product of a^2, a^4, ..., a^(2^127)
        square = _times(square, square)
        inverse = _times(inverse, square)
    results = []
    for element, before in zip(reversed(elements), reversed(products[:-1]), strict=True):
        results.append(_times(inverse, before))
        inverse = _times(inverse, element)
    return results[::-1]
