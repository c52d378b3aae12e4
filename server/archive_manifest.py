"""What an archive folder holds, and how its list is read: also that of an archive which somebody else sent.

::

    archive/
      images/<class>/<id>.png, metadata.csv    the images and a row for each --root_of--> root_sha256
      datasheet.md, croissant.json,
      passport.html, passport.json             documents, of a released archive
      manifest.json                            `files` and `documents`: name -> SHA-256; root_sha256; all other facts
      manifest.sig.json                        the coordinator's signature under manifest.json

The manifest's keys: schema 2, study, name, software, image_size, classes, counts, planned {class: n}, filter (see
`xfed.server.archive_filter`), generators {class: digest}, seed, privacy (a statement), curation {summary, ..}, root_sha256,
files; where one generator drew all classes also findings {combination: [classes]} and steering (see
`xfed.server.steered_archive`); of a released archive also documents, about (facts for the documents), released (time),
signed_by (fingerprint).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xfed.common.durable import sha256_file, write_text
from xfed.common.errors import CheckpointError

__all__ = [
    "DOCUMENTS",
    "MANIFEST",
    "METADATA",
    "SIGNATURE",
    "OpenArchive",
    "inside",
    "labels_of",
    "open_archive",
    "read_manifest",
    "root_of",
    "write_rows",
]

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig.json"
METADATA = "metadata.csv"
DOCUMENTS = (
    "datasheet.md",
    "croissant.json",
    "passport.html",
    "passport.json",
    "passport-before-curation.html",
    "passport-before-curation.json",
)


def root_of(files: Mapping[str, str]) -> str:
    """One SHA-256 over names and digests of all files: images and metadata.csv, never the documents."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def inside(name: str) -> bool:
    """Whether a name from a manifest stays inside the archive's folder (no .., no absolute path, no backslash)."""
    path = PurePosixPath(name)
    return (
        name == str(path)
        and name not in ("", ".")
        and not path.is_absolute()
        and ".." not in path.parts
        and not any(sign in name for sign in "\\\0\n\r")
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of an archive, its lists of digests checked for form. Raises `CheckpointError`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for key in ("files", "documents"):
            for name, digest in manifest.get(key, {}).items():
                if not isinstance(digest, str) or not inside(name):
                    raise ValueError(f"{key} lists {name!r}")
        if not isinstance(manifest["root_sha256"], str) or not isinstance(manifest["files"], dict):
            raise ValueError("it has no root digest or no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} holds no readable archive manifest ({type(error).__name__}: {error}). "
            "Name the folder that holds manifest.json, or fetch the archive again."
        ) from error
    result: dict[str, Any] = manifest
    return result


@dataclass(frozen=True)
class OpenArchive:
    """An archive whose list was read: `rows` are those of metadata.csv, every one an image in the manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""
        return tuple(self.manifest["classes"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, then the combinations of findings that the archive holds images of."""
        return labels_of(self.manifest)


def labels_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What an image of the archive may be labelled: its classes, then combinations of them (`findings`)."""
    return (*manifest["classes"], *manifest.get("findings", {}))


def open_archive(folder: Path) -> OpenArchive:
    """Read manifest and metadata. Raises `CheckpointError` where the two do not belong together."""
    manifest = read_manifest(folder)
    try:
        with (folder / METADATA).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        classes = set(labels_of(manifest))
        odd = [
            row
            for row in rows
            if row["label"] not in classes or row["file_name"] not in manifest["files"].keys() - {METADATA}
        ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{folder / METADATA} cannot be read ({error}). Fetch the archive again.") from error
    if odd:
        raise CheckpointError(
            f"{folder / METADATA}: {odd[0]['file_name']!r} is no image of the manifest. Fetch it again."
        )
    return OpenArchive(folder, manifest, rows)


def write_rows(folder: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Write metadata.csv atomically; returns its SHA-256. Raises `StorageError`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / METADATA, table.getvalue())
    return sha256_file(folder / METADATA)
