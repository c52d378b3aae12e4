"""The two files beside a store that never leave the site: the salt of its hashes, and the list of faulty files.

::

    <store>-salt            32 random bytes, mode 0600     patient id --HMAC--> order of patient numbers
    <store>-quarantine.csv  file, reason, detail, 0600     for whoever repairs the export
"""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Sequence
from pathlib import Path

from xfed.client.layouts import Record
from xfed.common.durable import write_bytes
from xfed.common.errors import DataError

__all__ = ["quarantine_path", "salt_for", "write_quarantine"]

_SALT_BYTES = 32


def quarantine_path(store: Path) -> Path:
    """Where the faulty files of `store` are listed."""
    return store.with_name(f"{store.name}-quarantine.csv")


def salt_for(store: Path) -> bytes:
    """The store's secret salt, made on first use. Raises `DataError` when the file is not one."""
    path = store.with_name(f"{store.name}-salt")
    if not path.exists():
        write_bytes(path, secrets.token_bytes(_SALT_BYTES), private=True)
    salt = path.read_bytes()
    if len(salt) != _SALT_BYTES:
        raise DataError(
            f"{path} has {len(salt)} bytes, a salt has {_SALT_BYTES}. Restore it from a backup, or delete it and "
            "import with --restart."
        )
    return salt


def write_quarantine(store: Path, source: Path, records: Sequence[Record]) -> Path | None:
    """List faulty records beside `store`; without any, remove an earlier list and return None."""
    path = quarantine_path(store)
    if not records:
        path.unlink(missing_ok=True)
        return None
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "reason", "detail"])
    for record in records:
        inside = record.path.is_relative_to(source)
        file = record.path.relative_to(source).as_posix() if inside else str(record.path)
        writer.writerow([file, record.reason, record.detail])
    write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"), private=True)
    return path
