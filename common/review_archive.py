"""An archive as a reviewer sees it: which images, of which class, with which scores.

::

    RUN or ARCHIVE --manifest.json, metadata.csv--> ReviewArchive: files, labels, scores | DataError
    image --read_image, its SHA-256 as in the manifest?--> bytes | DataError

A score is any column of metadata.csv whose values are all numbers (empty, nan and inf: no value), but for the columns that
only say how an image was made.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xfed.common.errors import DataError

__all__ = ["ReviewArchive", "open_archive"]

_NO_SCORES = frozenset(
    {"file_name", "label", "label_index", "seed", "generator_sha256", "synthetic", "number", "findings", "latent"}
)


@dataclass(frozen=True, kw_only=True)
class ReviewArchive:
    """Images in the order of metadata.csv: `labels` are positions in `classes`, `scores` one value (or None) per image.

    The last `combinations` of the classes are combinations of the others (`xfed.server.steered_archive`).

    `facts`: name, study and root_sha256, what a log of decisions says whose it is; `digests`: SHA-256 (hex) by file name.
    """

    folder: Path
    facts: Mapping[str, str]
    classes: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[int, ...]
    scores: Mapping[str, list[float | None]]
    digests: Mapping[str, str]
    combinations: int = 0

    def check_image(self, path: Path, image: str) -> str:
        """The SHA-256 (hex) of the image's file at `path`. Raises `DataError` when it is not the one of the manifest."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != self.digests[image]:
            raise DataError(
                f"{image} was changed since the archive was made: decide nothing about it, and run xfed-server archive verify "
                f"{self.folder}"
            )
        return digest


def open_archive(folder: Path) -> ReviewArchive:
    """The archive in `folder`, or in the run folder `folder`. Raises `DataError`."""
    place = folder if (folder / "manifest.json").is_file() or not (folder / "archive").is_dir() else folder / "archive"
    try:
        manifest = json.loads((place / "manifest.json").read_bytes())
        facts = {name: str(manifest[name]) for name in ("name", "study", "root_sha256")}
        combinations = tuple(map(str, manifest.get("findings", {})))
        classes, digests = (*map(str, manifest["classes"]), *combinations), dict(manifest["files"])
        with (place / "metadata.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        images = tuple(row["file_name"] for row in rows)
        labels = tuple(classes.index(row["label"]) for row in rows)
        unknown = [image for image in images if image not in digests]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no archive that can be reviewed ({error}). Name a folder with manifest.json, metadata.csv and images/: "
            "DIR/archive of a run, or an archive that was sent"
        ) from error
    if unknown or not images:
        what = f"{unknown[0]} is not in its manifest" if unknown else "it holds no images"
        raise DataError(f"{place} cannot be reviewed: {what}. Run xfed-server archive verify {place}")
    return ReviewArchive(
        folder=place,
        facts=facts,
        classes=classes,
        images=images,
        labels=labels,
        scores=_scores(rows),
        digests=digests,
        combinations=len(combinations),
    )


def _scores(rows: list[dict[str, str]]) -> dict[str, list[float | None]]:
    found = {}
    for name in sorted(rows[0].keys() - _NO_SCORES):
        try:
            numbers = [float(row[name] or "nan") for row in rows]
        except (ValueError, TypeError):
            continue
        if any(map(math.isfinite, numbers)):
            found[name] = [number if math.isfinite(number) else None for number in numbers]
    return found
