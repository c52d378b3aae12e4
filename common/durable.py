"""Files that are either whole or absent, whatever kills the process.

::

    bytes --> .name.tmp (fsync) --rename--> name --> fsync(folder)

A reader never sees half a file. A full disk leaves the old file in place and raises `StorageError`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xfed.common.errors import StorageError

__all__ = [
    "append_line",
    "exclusive",
    "link_or_copy",
    "remove_tree",
    "sha256_file",
    "sync_folder",
    "translate_os_errors",
    "write_bytes",
    "write_json",
    "write_text",
]

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a `StorageError` that names `path`."""
    try:
        yield
    except OSError as error:
        # NumPy reports a short write as an OSError without a number
        if error.errno in _STORAGE_ERRNOS or error.errno is None:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}. Free some space or choose another folder, "
                "then run the same command again: it continues from the last whole step."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable: what a rename or a new file needs besides its own fsync."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to `path` atomically and durably, making parent folders. Raises `StorageError`.

    A `private` file can be read by its owner only, from the first byte on (mode 0600).
    """
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # one name per file: what a kill leaves behind, the next writing of the same file overwrites
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            mode = 0o600 if private else 0o666
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line to `path` and fsync it."""
    with translate_os_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, place: Path) -> None:
    """A hard link to a file that nobody changes, or a copy where the disk has no links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def remove_tree(folder: Path) -> None:
    """Delete a folder if it exists."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the only lock on `folder` (`.lock`), so that two runs never share it. Raises `StorageError`."""
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"{folder} is in use by another xfed process. Wait for it, end it, or choose another folder."
            ) from error
        yield
