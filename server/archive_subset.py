"""An archive less some of its images, in its place: rebuilt beside it, then swapped; and what was left out, kept apart.

::

    run/archive/ --set_aside--> run/withheld/    images left out, metadata.csv and manifest.json as delivered   (never released)
                 --without----> run/.archive.without/ (manifest.json last)
                                archive/ renamed to .archive.before/, .archive.without/ to archive/, .archive.before/ removed
    both         --delivered--> the archive as the sites received it: its manifest, images, labels

After a kill `recover` finishes or undoes the swap: a rebuilt folder with a manifest is whole and takes the place, anything else
of it is removed. Every step done again changes nothing, so the same command goes on from any of them. Images are hard
links where the disk has them (nothing writes into an image), so ten thousand take no room and a second or two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.common.durable import link_or_copy, remove_tree, sync_folder, translate_os_errors, write_bytes, write_json
from xfed.server.archive_manifest import (
    MANIFEST,
    METADATA,
    OpenArchive,
    open_archive,
    read_manifest,
    root_of,
    write_rows,
)

__all__ = ["delivered", "delivered_manifest", "recover", "set_aside", "without"]

WITHHELD = "withheld"
_OF_A_RELEASE = ("documents", "about", "released", "released_root_sha256", "signed_by")


def recover(folder: Path) -> None:
    """Finish or undo a swap of archive `folder` that was cut short. Raises `StorageError`."""
    building, before = _building(folder), _before(folder)
    with translate_os_errors(folder):
        if not folder.exists() and (building / MANIFEST).is_file():
            building.rename(folder)
        elif not folder.exists() and before.exists():
            before.rename(folder)
        remove_tree(building)
        remove_tree(before)


def without(folder: Path, rejected: Collection[str], why: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite archive `folder` without the images named in `rejected`, with `why` in its manifest; returns that.

    Names are those of metadata.csv; one that is not there is left out already. Documents and signature of an earlier
    release do not outlive a removal. `delivered_root_sha256` keeps the root of before the first one. Raises `CheckpointError`
    (no readable archive), `StorageError`.
    """
    recover(folder)
    archive = open_archive(folder)
    rows = [row for row in archive.rows if row["file_name"] not in rejected]
    if len(rows) == len(archive.rows):
        manifest = {**archive.manifest, **why}
        if manifest != archive.manifest:
            write_json(folder / MANIFEST, manifest)
        return manifest
    building = _building(folder)
    with translate_os_errors(folder):
        files = _linked(archive, rows, building)
        counts = Counter(row["label"] for row in rows)
        manifest = {
            **{name: value for name, value in archive.manifest.items() if name not in (*_OF_A_RELEASE, "files")},
            **why,
            "counts": {name: counts[name] for name in archive.labels},
            "delivered_root_sha256": archive.manifest.get("delivered_root_sha256", archive.manifest["root_sha256"]),
            "root_sha256": root_of(files),
            "files": files,
        }
        write_json(building / MANIFEST, manifest)
        folder.rename(_before(folder))
        building.rename(folder)
        sync_folder(folder.parent)
        remove_tree(_before(folder))
    return manifest


def _building(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.without")


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def _linked(archive: OpenArchive, rows: list[Mapping[str, str]], building: Path) -> dict[str, str]:
    """Images and metadata of `rows` in `building`; name to SHA-256."""
    for name in archive.labels:
        (building / "images" / name).mkdir(parents=True)
    for row in rows:
        link_or_copy(archive.folder / row["file_name"], building / row["file_name"])
    files = {row["file_name"]: archive.manifest["files"][row["file_name"]] for row in rows}
    files[METADATA] = write_rows(building, rows, list(archive.rows[0]))
    return files


def set_aside(run_folder: Path, rejected: Collection[str]) -> None:
    """Keep `rejected` images, and metadata and manifest as delivered, in withheld/, unless it is there. Raises `StorageError`."""
    place = run_folder / WITHHELD
    if place.exists() or not rejected:
        return
    archive, building = run_folder / "archive", run_folder / f".{WITHHELD}.building"
    remove_tree(building)
    with translate_os_errors(building):
        building.mkdir(mode=0o700)
        for name in (*sorted(rejected), METADATA, MANIFEST):
            write_bytes(building / name, (archive / name).read_bytes(), private=True)
        building.rename(place)
        sync_folder(run_folder)


def delivered_manifest(run_folder: Path) -> dict[str, Any]:
    """The manifest of the archive as the sites received it. Raises `CheckpointError`."""
    place = run_folder / WITHHELD
    return read_manifest(place if place.exists() else run_folder / "archive")


def delivered(
    run_folder: Path, classes: tuple[str, ...]
) -> tuple[list[str], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Names, images uint8 [n, S, S] and labels int64 [n] as delivered, in the order of the metadata. Raises `CheckpointError`."""
    place, archive = run_folder / WITHHELD, run_folder / "archive"
    rows = open_archive(place if place.exists() else archive).rows
    images = []
    for row in rows:
        own = place / row["file_name"]
        with Image.open(own if own.is_file() else archive / row["file_name"]) as image:
            images.append(np.asarray(image))
    labels = np.array([classes.index(row["label"]) for row in rows], dtype=np.int64)
    return [row["file_name"] for row in rows], np.stack(images), labels
