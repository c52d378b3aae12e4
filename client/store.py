"""A site's image store: decoded grey pixels, ready to train on, with no identity in it.

::

    store/
      store.json    schema, size, classes, count, digest of the pixels     <- written last: its presence is the commit
      images.npy    uint8 [n, size, size], memory-mapped
      index.npz     labels int64 [n] (position in `classes`), patients int64 [n] (0..P-1, in hash order),
                    splits int8 [n] (0 train, 1 validation, 2 test)

Patients are numbers without meaning outside the store; file names, dates and DICOM headers never enter it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xfed.common.durable import translate_os_errors, write_bytes, write_json
from xfed.common.errors import DataError

__all__ = ["SPLITS", "Store", "open_store", "write_store"]

SCHEMA = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store. `images` is a read-only memory map uint8 [n, size, size]; the rest as in the module docstring."""

    folder: Path
    classes: tuple[str, ...]
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    patients: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int8]
    digest: str

    @property
    def size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.images.shape[-1])

    def rows(self, split: str, label: int | None = None) -> npt.NDArray[np.int64]:
        """Row numbers of one split ("train", "validation", "test"), optionally of one class position."""
        chosen = self.splits == SPLITS.index(split)
        if label is not None:
            chosen &= self.labels == label
        return np.flatnonzero(chosen).astype(np.int64)

    def counts(self) -> npt.NDArray[np.int64]:
        """Images per split and class, int64 [3, C]; images in no split (-1) do not count."""
        table = np.zeros((len(SPLITS), len(self.classes)), dtype=np.int64)
        taking_part = self.splits >= 0
        np.add.at(table, (self.splits[taking_part].astype(np.int64), self.labels[taking_part]), 1)
        return table


def write_store(
    folder: Path,
    *,
    classes: tuple[str, ...],
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    patients: npt.NDArray[np.int64],
    splits: npt.NDArray[np.int8],
) -> Store:
    """Write a whole store and open it. `images` uint8 [n, s, s]; the other arrays have length n. Raises `DataError`."""
    n = len(images)
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise DataError(f"{folder}: images must be uint8 [n, size, size], not {images.dtype} {images.shape}")
    if not (len(labels) == len(patients) == len(splits) == n):
        raise DataError(
            f"{folder}: {n} images but {len(labels)} labels, {len(patients)} patients, {len(splits)} splits"
        )
    if n and not (labels.min() >= 0 and labels.max() < len(classes)):
        raise DataError(f"{folder}: a label lies outside 0..{len(classes) - 1}")
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "store.json").unlink(missing_ok=True)
        np.save(folder / "images.npy", np.ascontiguousarray(images))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        labels=labels.astype(np.int64),
        patients=patients.astype(np.int64),
        splits=splits.astype(np.int8),
    )
    write_bytes(folder / "index.npz", buffer.getvalue())
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    write_json(
        folder / "store.json",
        {
            "schema": SCHEMA,
            "classes": list(classes),
            "size": int(images.shape[-1]),
            "count": n,
            "pixels_sha256": digest,
        },
    )
    return open_store(folder)


def open_store(folder: Path) -> Store:
    """Open a store for reading. Raises `DataError` when there is none, or when its parts disagree."""
    header_path = folder / "store.json"
    if not header_path.is_file():
        raise DataError(
            f"{folder} holds no finished image store. Make one with: xfed-client import SOURCE --store {folder}"
        )
    try:
        header = json.loads(header_path.read_text())
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        with np.load(io.BytesIO((folder / "index.npz").read_bytes()), allow_pickle=False) as index:
            labels, patients, splits = index["labels"], index["patients"], index["splits"]
        schema, count = header["schema"], header["count"]
        classes, digest = tuple(header["classes"]), str(header["pixels_sha256"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{folder}: the image store is damaged ({error}). Delete the folder and import again."
        ) from error
    if schema != SCHEMA:
        raise DataError(f"{folder}: store schema {schema}, this xfed reads {SCHEMA}. Import again.")
    if not (count == len(images) == len(labels) == len(patients) == len(splits)):
        raise DataError(f"{folder}: the image store's files disagree in length. Delete the folder and import again.")
    return Store(
        folder=folder,
        classes=classes,
        images=images,
        labels=labels,
        patients=patients,
        splits=splits,
        digest=digest,
    )
