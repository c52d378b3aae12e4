"""Files of lines that only grow: locked between processes, each line on disk before its writer goes on.

::

    audit.jsonl, ledger.jsonl <--put-- locked(path) --tail--> last whole line, torn bytes behind it

A power cut leaves whole lines and at most one torn one at the end; what to do with that is the caller's to say.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xfed.common.durable import sync_folder, translate_os_errors

__all__ = ["locked", "put", "tail"]

_BLOCK = 1 << 16


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """A descriptor of the file, made if it is not there (mode 0600), that no other process holds. Raises `StorageError`."""
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fresh:
                sync_folder(path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def put(file: int, data: bytes, at: int) -> None:
    """Write `data` at that offset and fsync it."""
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], at + written)
    os.fsync(file)


def tail(file: int, size: int) -> tuple[bytes, bytes]:
    """The last whole line (b"" if there is none) and the torn bytes behind it, from the end: no matter how long the file is."""
    length = min(size, _BLOCK)
    while True:
        data = os.pread(file, length, size - length)
        if data.count(b"\n") > 1 or length == size:
            whole, newline, torn = data.rpartition(b"\n")
            return whole.rpartition(b"\n")[2] + newline, torn
        length = min(size, 2 * length)
