"""The automatic quality filter: which synthetic images are kept, judged from synthetic pixels alone.

::

    numbers 0, 1, 2, .. of a class --draw--> blocks of 32 --+--> statistics of the first 512 --> median, spread of the class
                                                            |                                             |
                        what was kept so far (all classes) -+--> blank? saturated? off-manifold? duplicate of a kept one?
                                                                         |no                      |yes
                                                                        kept           the next number takes its place

At most `MOST` times as many are drawn as are wanted; a class that cannot be filled stays smaller, and the archive says so.

Formal guarantees
    No real image, and nothing but generators and seeds, is read: in a private study this is post-processing.
    The verdict on an image follows from the class's generator, the study's seed and the classes before it: the same ones
    give the same archive. All statistics are exact sums of integers, so that threads and block sizes do not matter.
Not covered
    Whether an image is anatomically right (people judge that), and whether it resembles a patient (the sites judge that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["COLUMNS", "LIMITS", "MOST", "REASONS", "Sieve", "Sifted"]

Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float64]

MOST = 2
REFERENCE = 512
LEAST_REFERENCE = 32
GRID = 16
REASONS = ("blank", "saturated", "off-manifold", "duplicate")
COLUMNS = ("contrast", "saturated", "sharpness", "nearest", "oddity")
"""Columns of metadata.csv: standard deviation of the pixels; share of pixels that are black or white; mean difference of
neighbouring pixels; RMS difference, at 16 x 16, from the nearest image kept before; largest robust z-score in the class."""

LIMITS = {"blank": 3.0, "saturated": 0.75, "duplicate": 2.0, "off-manifold": 8.0}
"""Contrast below which an image is blank, share from which it is saturated, RMS difference in grey levels (at full size) below
which it is a duplicate, robust z-score above which it is off-manifold. Measured: docs/archive.md."""

_FLOORS = np.array([2.0, 2.0, 0.5, 2.0])
"""Least spread, in grey levels, that a z-score divides by: brightness, contrast, sharpness, distance from the median image."""


@dataclass(frozen=True)
class Sifted:
    """Image `number` of its class, uint8 [S, S]; `reason` is empty when it is kept; `scores` are the `COLUMNS`."""

    number: int
    pixels: Pixels
    reason: str
    scores: Mapping[str, str]


@dataclass(frozen=True)
class _Statistics:
    """Of n images: float64 [n] each; `sums` float64 [n, 256] are sums of pixels over a grid of 16 x 16 (whole numbers)."""

    brightness: Vector
    contrast: Vector
    saturated: Vector
    sharpness: Vector
    sums: npt.NDArray[np.float64]

    def basics(self, median: Vector, area: int) -> npt.NDArray[np.float64]:
        """What z-scores are taken of, float64 [n, 4]."""
        distance = np.sqrt(((self.sums - median) ** 2).mean(1)) / area
        return np.stack([self.brightness, self.contrast, self.sharpness, distance], 1)


def _measure(images: Pixels) -> _Statistics:
    """Statistics of images uint8 [n, S, S], S a multiple of 16."""
    n, size, _ = images.shape
    whole = images.astype(np.int64)
    total, squares = whole.sum((1, 2)), (whole**2).sum((1, 2))
    pixels = size * size
    steps = np.abs(np.diff(whole, axis=1)).sum((1, 2)) + np.abs(np.diff(whole, axis=2)).sum((1, 2))
    side = size // GRID
    return _Statistics(
        brightness=total / pixels,
        contrast=np.sqrt(np.maximum(pixels * squares - total**2, 0)) / pixels,
        saturated=((images <= 1) | (images >= 254)).sum((1, 2)) / pixels,
        sharpness=steps / (2 * size * (size - 1)),
        sums=whole.reshape(n, GRID, side, GRID, side).sum((2, 4)).reshape(n, GRID * GRID).astype(np.float64),
    )


@dataclass(frozen=True)
class _Reference:
    """Median image, and median and spread (1.4826 MAD) of the basics, over the first images of a class."""

    median: Vector
    centre: Vector
    spread: Vector

    @classmethod
    def of(cls, statistics: _Statistics, area: int) -> _Reference | None:
        """None where too few images are usable to say what is usual."""
        usable = (statistics.contrast >= LIMITS["blank"]) & (statistics.saturated < LIMITS["saturated"])
        if usable.sum() < LEAST_REFERENCE:
            return None
        median = np.median(statistics.sums[usable], 0)
        basics = statistics.basics(median, area)[usable]
        centre = np.median(basics, 0)
        spread = 1.4826 * np.median(np.abs(basics - centre), 0)
        return cls(median, centre, np.maximum(spread, _FLOORS))

    def oddity(self, statistics: _Statistics, area: int) -> Vector:
        """The largest robust z-score of each image, float64 [n]; a distance counts only where it is large."""
        z = (statistics.basics(self.median, area) - self.centre) / self.spread
        z[:, :3] = np.abs(z[:, :3])
        return np.asarray(np.maximum(z.max(1), 0), dtype=np.float64)


@dataclass
class _Kept:
    """The images kept so far, and their grid sums: which one is nearest, and is it a duplicate?"""

    images: list[Pixels] = field(default_factory=list)
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((1024, GRID * GRID)))
    squares: Vector = field(default_factory=lambda: np.empty(1024))

    def add(self, image: Pixels, sums: Vector) -> None:
        count = len(self.images)
        if count == len(self.sums):
            self.sums = np.concatenate([self.sums, np.empty_like(self.sums)])
            self.squares = np.concatenate([self.squares, np.empty_like(self.squares)])
        self.sums[count], self.squares[count] = sums, sums @ sums
        self.images.append(image)

    def distances(self, sums: npt.NDArray[np.float64], start: int = 0) -> npt.NDArray[np.float64]:
        """Squared distances float64 [n, kept from `start` on] between grid sums: whole numbers below 2^53, so exact."""
        own = slice(start, len(self.images))
        squared = (sums**2).sum(1)[:, None] + self.squares[own] - 2 * (sums @ self.sums[own].T)
        return np.asarray(squared, dtype=np.float64)

    def holds_copy(self, image: Pixels, near: npt.NDArray[np.intp]) -> bool:
        """Whether one of the kept images at `near` is the same but for `LIMITS` grey levels (RMS) at full size."""
        limit = LIMITS["duplicate"] ** 2 * image.size
        whole = image.astype(np.int64)
        return any(((whole - self.images[row]) ** 2).sum() < limit for row in near)


class Sieve:
    """The filter of one archive: classes are sifted one after the other, duplicates are found across them."""

    def __init__(self, *, on: bool = True) -> None:
        self._on = on
        self._kept = _Kept()
        self._drawn: dict[str, int] = {}
        self._rejected: dict[str, dict[str, int]] = {}
        self._short: dict[str, int] = {}

    def sift(self, class_name: str, wanted: int, draw: Callable[[int], Pixels]) -> Iterator[Sifted]:
        """Images of a class in the order of their numbers, rejected ones too, until `wanted` are kept.

        `draw(block)` gives images number b block to b block + b - 1, uint8 [b, S, S], b the same for all blocks; a shorter one,
        or an empty one, is the last there is.
        """
        first = [draw(0)]
        size, area = max(1, len(first[0])), (first[0].shape[1] // GRID) ** 2
        while len(first) < -(-min(wanted, REFERENCE) // size) and len(first[-1]) == size:
            first.append(draw(len(first)))
        reference = _Reference.of(_measure(np.concatenate(first)), area)
        tally = self._rejected[class_name] = {}
        kept = number = 0
        while kept < wanted and number < MOST * wanted:
            block = number // size
            images = first[block] if block < len(first) else draw(block)
            if number % size or not len(images):  # the block before was short: there are no more
                break
            for one in self._judge(images[: MOST * wanted - number], number, reference, area):
                number += 1
                if one.reason:
                    tally[one.reason] = tally.get(one.reason, 0) + 1
                kept += not one.reason
                yield one
                if kept == wanted:
                    break
        self._drawn[class_name] = number
        self._short[class_name] = wanted - kept

    def _judge(self, images: Pixels, number: int, reference: _Reference | None, area: int) -> Iterator[Sifted]:
        statistics = _measure(images)
        oddity = np.zeros(len(images)) if reference is None else reference.oddity(statistics, area)
        before = len(self._kept.images)
        distances = self._kept.distances(statistics.sums)
        # a mean over blocks never grows a distance: whoever is far at 16 x 16 is far at full size
        near = (LIMITS["duplicate"] * area) ** 2 * GRID * GRID
        for row, image in enumerate(images):
            fresh = self._kept.distances(statistics.sums[row : row + 1], before)[0]
            squared = np.concatenate([distances[row], fresh])
            reason = ""
            if self._on:
                reason = _fault(statistics, oddity, row)
                if not reason and self._kept.holds_copy(image, np.flatnonzero(squared < near)):
                    reason = "duplicate"
            nearest = np.sqrt(squared.min() / (GRID * GRID)) / area if len(squared) else 255.0
            values = (
                statistics.contrast[row],
                statistics.saturated[row],
                statistics.sharpness[row],
                nearest,
                oddity[row],
            )
            if not reason:
                self._kept.add(image, statistics.sums[row])
            yield Sifted(number + row, image, reason, {k: f"{v:.3f}" for k, v in zip(COLUMNS, values, strict=True)})

    def facts(self) -> dict[str, Any]:
        """For the manifest: what was drawn, what was rejected and why, what is missing; {class: ..} each."""
        return {
            "on": self._on,
            "limits": dict(LIMITS),
            "drawn": dict(self._drawn),
            "rejected": {name: dict(tally) for name, tally in self._rejected.items()},
            "short": {name: count for name, count in self._short.items() if count},
            "statement": "The filter reads synthetic images only: in a private study it is post-processing and costs no budget.",
        }


def _fault(statistics: _Statistics, oddity: Vector, row: int) -> str:
    if statistics.contrast[row] < LIMITS["blank"]:
        return "blank"
    if statistics.saturated[row] >= LIMITS["saturated"]:
        return "saturated"
    return "off-manifold" if oddity[row] > LIMITS["off-manifold"] else ""
