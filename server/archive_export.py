"""An archive in the layouts that other programs read. It is verified first; a changed one is not exported.

::

    DIR --check_archive--> rows of metadata.csv --read each image once more against its digest-->
        imagefolder   OUT/<class>/*.png                      torchvision.datasets.ImageFolder
        huggingface   OUT/<class>/*.png, metadata.csv        datasets.load_dataset("imagefolder", data_dir=OUT)
        webdataset    OUT/<name>-000000.tar, ..              webdataset.WebDataset (xfed.server.export_webdataset)
        dicom         OUT/<class>/*.dcm                      Secondary Capture, marked synthetic (xfed.server.export_dicom)
      + OUT/README.md: what it is, where it is from, who signed it

OUT is built beside its place and renamed whole: it is all there or it is not there.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from xfed.common.durable import remove_tree, sync_folder, translate_os_errors
from xfed.common.errors import CheckpointError, ConfigError, DataError
from xfed.server.archive_manifest import OpenArchive, open_archive
from xfed.server.archive_signature import check_archive
from xfed.server.export_dicom import dicom_file
from xfed.server.export_webdataset import write_shards

__all__ = ["FORMATS", "Exported", "Format", "building_beside", "export_archive", "open_verified", "picture"]

Format = Literal["imagefolder", "huggingface", "webdataset", "dicom"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Exported:
    """What was written: format, folder, number of images; the archive's root digest and its signer (None: nobody)."""

    format: str
    out: Path
    images: int
    root_sha256: str
    fingerprint: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.__dict__, "out": str(self.out)}


def open_verified(folder: Path, *, unsigned: bool, known_key: str | None) -> tuple[OpenArchive, str | None]:
    """The archive and its signer's fingerprint, after a check of every byte. Raises `CheckpointError` when it was changed."""
    checked = check_archive(folder, unsigned=unsigned, known_key=known_key)
    if checked.problems:
        shown = "\n".join(f"  {problem}" for problem in checked.problems[:20])
        raise CheckpointError(
            f"{folder}: {len(checked.problems)} differences from what was released; do not use it, fetch it again:\n{shown}"
        )
    return open_archive(folder), checked.fingerprint


def picture(archive: OpenArchive, name: str) -> bytes:
    """The bytes of one image. Raises `CheckpointError` when they are not those of the manifest."""
    data = (archive.folder / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != archive.manifest["files"][name]:
        raise CheckpointError(f"{archive.folder / name} was changed while it was read. Fetch the archive again.")
    return data


def building_beside(folder: Path, out: Path) -> Path:
    """An empty folder beside `out`, to be renamed to it. Raises `ConfigError` where `out` is not free or inside the archive."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: there is something already. Choose a new folder.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--out {out}: that is inside the archive, which would not verify any more. Choose another folder."
        )
    building = out.resolve().with_name(f".{out.resolve().name}.building")
    with translate_os_errors(building):
        remove_tree(building)
        building.mkdir(parents=True)
    return building


def export_archive(
    folder: Path,
    out: Path,
    to: Format,
    *,
    unsigned: bool = False,
    known_key: str | None = None,
    burn_in: bool = False,
) -> Exported:
    """Write the archive in `folder` as `to` into the new folder `out`.

    `unsigned`, `known_key`: see `check_archive`. `burn_in` (dicom): write the word SYNTHETIC into the pixels.
    Raises `CheckpointError` (changed), `ConfigError` (`out` is not free; `burn_in` of another format), `DataError` (no image),
    `StorageError`.
    """
    if burn_in and to != "dicom":
        raise ConfigError(f"--burn-in changes pixels: it is for --to dicom only, not {to}")
    archive, fingerprint = open_verified(folder, unsigned=unsigned, known_key=known_key)
    if not archive.rows:
        raise DataError(f"{folder} holds no image: there is nothing to export")
    building = building_beside(folder, out)
    writers: dict[Format, Callable[[OpenArchive, Path], None]] = {
        "imagefolder": _write_folders,
        "huggingface": _write_huggingface,
        "webdataset": _write_webdataset,
        "dicom": partial(_write_dicom, burn_in=burn_in),
    }
    with translate_os_errors(out):
        writers[to](archive, building)
        (building / "README.md").write_text(_readme(archive, to, fingerprint), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        building.rename(out)
        sync_folder(out.resolve().parent)
    return Exported(to, out, len(archive.rows), archive.manifest["root_sha256"], fingerprint)


def _pictures(archive: OpenArchive) -> Iterator[tuple[dict[str, str], bytes]]:
    for row in archive.rows:
        yield dict(row), picture(archive, row["file_name"])


def _write_folders(archive: OpenArchive, out: Path) -> None:
    for row, data in _pictures(archive):
        path = out / row["label"] / Path(row["file_name"]).name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def _write_huggingface(archive: OpenArchive, out: Path) -> None:
    _write_folders(archive, out)
    rows = [{**row, "file_name": f"{row['label']}/{Path(row['file_name']).name}"} for row in archive.rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (out / "metadata.csv").write_text(table.getvalue(), encoding="utf-8")


def _write_webdataset(archive: OpenArchive, out: Path) -> None:
    write_shards(archive.manifest, _shuffled(archive), out)


def _shuffled(archive: OpenArchive) -> Iterator[tuple[dict[str, str], bytes]]:
    """In an order that follows from the root digest alone: readers of shards shuffle only a little, and classes lie together."""
    root = archive.manifest["root_sha256"]

    def place(row: Any) -> bytes:
        return hashlib.sha256(f"{root} {row['file_name']}".encode()).digest()

    for row in sorted(archive.rows, key=place):
        yield dict(row), picture(archive, row["file_name"])


def _write_dicom(archive: OpenArchive, out: Path, *, burn_in: bool) -> None:
    for number, (row, data) in enumerate(_pictures(archive), 1):
        path = out / row["label"] / f"{Path(row['file_name']).stem}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dicom_file(archive.manifest, row, data, number=number, burn_in=burn_in))


def _readme(archive: OpenArchive, to: str, fingerprint: str | None) -> str:
    m = archive.manifest
    counts = "\n".join(f"- {name}: {m['counts'][name]:,}" for name in archive.labels)
    signer = f"signed by `{fingerprint}`" if fingerprint else "not signed by anybody"
    return f"""# {m["name"]}: synthetic X-rays ({to})

**No image here shows a patient.** {m["privacy"]}

{counts}

Exported from the archive with root digest `{m["root_sha256"]}`, {signer}. Compare the fingerprint with the coordinator's.
The archive's own folder holds the datasheet, the passport and every file's digest; this copy is not signed.
Curation: {m["curation"]["summary"]}.
"""
