"""The files under a source folder, found once, looked up by what a label file calls them.

::

    SOURCE --(walk, hidden names left out)--> relative path -> path, file name -> relative paths --> find(name)

A name from a label file is only ever looked up here: it never becomes part of a path that is opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["SourceFiles", "has_image_name", "list_files"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


def has_image_name(path: Path) -> bool:
    """Whether a file may be an image by its name; DICOM files often have no extension at all."""
    return path.suffix.lower() in (*_SUFFIXES, "")


@dataclass(frozen=True)
class SourceFiles:
    """`paths`: relative path (with ``/``) -> path; `names`: file name -> relative paths."""

    paths: dict[str, Path]
    names: dict[str, list[str]]

    def find(self, name: str) -> tuple[Path | None, str, str]:
        """The file that `name` in a label file means, else None; the reason (a fixed phrase) and its detail.

        `name` may be a relative path, a file name anywhere under the source, or either without its extension.
        """
        text = name.strip().replace("\\", "/")
        pure = PurePosixPath(text)
        if not text:
            return None, "image name is empty", ""
        if pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", text):
            return None, "image path leads out of the source", "write it relative to the source folder"
        for suffix in ("", *_SUFFIXES):
            exact = self.paths.get(f"{pure}{suffix}")
            if exact is not None:
                return exact, "", ""
            hits = [hit for hit in self.names.get(f"{pure.name}{suffix}", []) if f"/{hit}".endswith(f"/{pure}{suffix}")]
            if len(hits) == 1:
                return self.paths[hits[0]], "", ""
            if hits:
                shown = ", ".join(hits[:3]) + (", ..." if len(hits) > 3 else "")
                return None, "file name occurs several times", f"{shown}: write the folder before the name"
        return None, "file is not there", ""


def list_files(source: Path) -> SourceFiles:
    """All files under `source` but hidden ones (names that start with a dot), in a fixed order."""
    paths: dict[str, Path] = {}
    names: dict[str, list[str]] = {}
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            relative = path.relative_to(source).as_posix()
            paths[relative] = path
            names.setdefault(name, []).append(relative)
    return SourceFiles(paths, names)
