"""What a site should know about its images before it joins: counts, balance, duplicates, suspects, with remedies.

::

    pixels (memory-mapped, block by block) --> hash, spread, brightness, symmetry --+
    labels, patients, splits ----------------> counts ------------------------------+--> Readiness --> readiness.json
    reasons from the import -----------------> left out, quarantined ---------------+              --> table

Only counts and fixed phrases are in it: no file name, no patient. It stays at the site all the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.client.store import SPLITS

__all__ = ["Readiness", "inverted_score", "measure", "symmetry"]

_BLOCK = 4096  # images held in memory at once while measuring
_BLANK = 4.0  # standard deviation in grey levels; real radiographs have 18 and more
_INVERTED = -0.5
_LATERAL = -0.3
_SIZES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Counts of one store. `images[c][s]` and `patients[c][s]` by class and split; the rest by its name.

    `balance` is the largest class's images over the smallest's (None when a class is empty). `duplicates`: images that repeat
    an earlier one pixel by pixel, groups of equal images, and groups that span several patients, classes or splits.
    """

    classes: tuple[str, ...]
    size: int
    total_images: int
    total_patients: int
    images: dict[str, dict[str, int]]
    patients: dict[str, dict[str, int]]
    balance: float | None
    duplicates: dict[str, int]
    suspects: dict[str, int]
    original_sizes: dict[str, int]
    left_out: dict[str, int]
    quarantined: dict[str, int]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `readiness.json`."""
        return {"schema": 1, **asdict(self), "classes": list(self.classes), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Readiness:
        """The inverse of `as_json`. Raises KeyError or TypeError on other values."""
        plain = {key: value for key, value in values.items() if key != "schema"}
        return cls(**{**plain, "classes": tuple(values["classes"]), "warnings": tuple(values["warnings"])})


def _mean(images: npt.NDArray[np.float32], y0: float, y1: float, x0: float, x1: float) -> npt.NDArray[np.float32]:
    side = images.shape[-1]
    block = images[:, int(y0 * side) : int(y1 * side) + 1, int(x0 * side) : int(x1 * side) + 1]
    return np.asarray(block.mean(axis=(1, 2)), dtype=np.float32)


def inverted_score(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """How much each of [n, s, s] looks like bone-white: below -0.5 it is probably shown negative. Antisymmetric.

    In standard deviations of the image: mediastinum over lungs, plus half of the whole image over its upper corners.
    Chosen on 3,250 frontal images of ChestX-ray14: it flagged 0.03 % of them, and 98 % of their negatives.
    """
    grey = images.astype(np.float32)
    lungs = (_mean(grey, 0.25, 0.6, 0.18, 0.38) + _mean(grey, 0.25, 0.6, 0.62, 0.82)) / 2
    corners = (_mean(grey, 0, 0.08, 0, 0.12) + _mean(grey, 0, 0.08, 0.88, 1)) / 2
    middle = _mean(grey, 0.25, 0.7, 0.44, 0.56)
    spread = grey.std(axis=(1, 2)) + 1e-6
    return np.asarray((middle - lungs + 0.5 * (grey.mean(axis=(1, 2)) - corners)) / spread, dtype=np.float32)


def symmetry(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Best correlation of each image's column means with their mirror image, the axis within 1/16 of the centre; -1..1.

    Frontal views are near 1. Of 3,250 frontal images of ChestX-ray14 1 % lie below -0.3, the limit used here.
    """
    columns = images.mean(axis=1, dtype=np.float32)
    side = columns.shape[1]
    best = np.full(len(images), -1, dtype=np.float32)
    for shift in range(-(side // 8), side // 8 + 1):
        part = columns[:, max(0, shift) : min(side, side + shift)]
        part = part - part.mean(axis=1, keepdims=True)
        power = (part * part).sum(axis=1)
        cross = (part * part[:, ::-1]).sum(axis=1)
        # a profile without any structure has nothing to compare: it counts as symmetric
        best = np.maximum(best, np.where(power > 1e-3, cross / np.maximum(power, 1e-3), 1))
    return best


def _by_split(
    rows: npt.NDArray[np.bool_], splits: npt.NDArray[np.int8], patients: npt.NDArray[np.int64]
) -> tuple[dict[str, int], dict[str, int]]:
    images = {name: int((rows & (splits == s)).sum()) for s, name in enumerate(SPLITS)}
    people = {name: len(np.unique(patients[rows & (splits == s)])) for s, name in enumerate(SPLITS)}
    return images, people


def _duplicates(groups: Sequence[Sequence[int]], **keys: npt.NDArray[Any]) -> dict[str, int]:
    found = {"images": sum(len(rows) - 1 for rows in groups), "groups": len(groups)}
    for name, values in keys.items():
        found[f"groups_across_{name}"] = sum(1 for rows in groups if len(set(values[list(rows)].tolist())) > 1)
    return found


def measure(
    *,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    patients: npt.NDArray[np.int64],
    splits: npt.NDArray[np.int8],
    classes: tuple[str, ...],
    sizes: Sequence[tuple[int, int]],
    laterals: Sequence[bool],
    left_out: Mapping[str, int],
    quarantined: Mapping[str, int],
) -> Readiness:
    """Measure a store's arrays. `sizes` (height, width) of the originals and `laterals` (header says so), both of length n."""
    hashes: dict[bytes, list[int]] = defaultdict(list)
    blank = inverted = lateral = 0
    for start in range(0, len(images), _BLOCK):
        block = np.asarray(images[start : start + _BLOCK])
        for row, image in enumerate(block, start):
            hashes[hashlib.sha256(image.data).digest()].append(row)
        empty = block.std(axis=(1, 2), dtype=np.float32) < _BLANK
        blank += int(empty.sum())
        inverted += int((~empty & (inverted_score(block) < _INVERTED)).sum())
        told = np.asarray(laterals[start : start + _BLOCK], dtype=bool)
        lateral += int((told | (~empty & (symmetry(block) < _LATERAL))).sum())
    counted = {name: _by_split(labels == c, splits, patients) for c, name in enumerate(classes)}
    totals = [sum(counted[name][0].values()) for name in classes]
    frequent = Counter(f"{width}x{height}" for height, width in sizes).most_common()
    shown = dict(frequent[:_SIZES_SHOWN])
    if rest := sum(count for _, count in frequent[_SIZES_SHOWN:]):
        shown["other"] = rest
    duplicates = _duplicates(
        [rows for rows in hashes.values() if len(rows) > 1], patients=patients, classes=labels, splits=splits
    )
    suspects = {"blank": blank, "inverted": inverted, "lateral": lateral}
    size = int(images.shape[-1])
    small = sum(1 for height, width in sizes if max(height, width) < size)
    return Readiness(
        classes=classes,
        size=size,
        total_images=len(images),
        total_patients=len(np.unique(patients)),
        images={name: counted[name][0] for name in classes},
        patients={name: counted[name][1] for name in classes},
        balance=max(totals) / min(totals) if min(totals) else None,
        duplicates=duplicates,
        suspects=suspects,
        original_sizes=shown,
        left_out=dict(left_out),
        quarantined=dict(quarantined),
        warnings=tuple(_warnings(counted, totals, duplicates, suspects, small, sum(quarantined.values()), size)),
    )


def _warnings(
    counted: Mapping[str, tuple[dict[str, int], dict[str, int]]],
    totals: Sequence[int],
    duplicates: Mapping[str, int],
    suspects: Mapping[str, int],
    small: int,
    quarantined: int,
    size: int,
) -> list[str]:
    """One sentence with a remedy for everything that needs somebody's eye; an empty list is a clean bill."""
    found = []
    for name, (images, _) in counted.items():
        if not sum(images.values()):
            found.append(f"class {name} has no images: this site takes no part in it (or map its label with --map)")
        elif missing := [split for split, count in images.items() if not count]:
            found.append(f"class {name} has no patients in {' or '.join(missing)}: it needs at least 3 patients")
    if min(totals) and max(totals) / min(totals) > 10:
        found.append(f"the largest class has {max(totals) / min(totals):.0f} times the images of the smallest")
    if duplicates["groups_across_splits"]:
        found.append(
            f"{duplicates['groups_across_splits']} groups of identical images span several splits, so the test is not fair: "
            "give those images one patient id"
        )
    if duplicates["groups_across_patients"]:
        found.append(
            f"{duplicates['groups_across_patients']} groups of identical images belong to different patients: "
            "check the patient column"
        )
    if duplicates["groups_across_classes"]:
        found.append(
            f"{duplicates['groups_across_classes']} groups of identical images have different labels: check them"
        )
    if suspects["blank"]:
        found.append(f"{suspects['blank']} images are blank: remove them from the label file and import again")
    if suspects["inverted"]:
        found.append(f"{suspects['inverted']} images look inverted (dark bones): export them as MONOCHROME2 or DICOM")
    if suspects["lateral"]:
        found.append(f"{suspects['lateral']} images may be side views: keep frontal views only")
    if small:
        found.append(f"{small} originals are smaller than {size} pixels and were enlarged: choose a smaller --size")
    if quarantined:
        found.append(
            f"{quarantined} files are in quarantine: the reasons stand in the quarantine file beside the store"
        )
    return found
