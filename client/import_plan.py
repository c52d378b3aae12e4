"""What was asked of an import, and whether a store already answers it.

::

    records + settings + salt --> Request --plan()--> .import/plan.json, store/import.json --> same? other? unfinished?

A plan tells two imports apart without telling anything about patients: settings in plain, files and labels as one keyed hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfed.client.layouts import Labelled, Record
from xfed.client.readiness import Readiness
from xfed.client.store import open_store
from xfed.common.config import Splits
from xfed.common.errors import DataError

__all__ = ["Request", "finished_readiness", "keyed_hash", "reasons"]


def keyed_hash(salt: bytes, kind: str, text: str) -> bytes:
    """HMAC-SHA256 under the salt, 32 bytes; `kind` keeps hashes of different things apart."""
    return hmac.digest(salt, f"{kind}\x1f".encode() + os.fsencode(text), "sha256")


def reasons(records: Iterable[Record]) -> Counter[str]:
    """Records per reason."""
    return Counter(record.reason for record in records)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One import: what to read, what to make of it, and the salt of its hashes."""

    source: Path
    listed: Labelled
    salt: bytes
    size: int
    classes: tuple[str, ...]
    seed: int
    splits: Splits

    def chosen(self) -> list[Record]:
        """Records with a class, in the store's order: by the keyed hash of the relative path."""

        def order(record: Record) -> bytes:
            return keyed_hash(self.salt, "file", record.path.relative_to(self.source).as_posix())

        return sorted((record for record in self.listed.records if record.label is not None), key=order)

    def faults(self) -> list[Record]:
        """Records that somebody should look at."""
        return [record for record in self.listed.records if record.fault]

    def left_out(self) -> Counter[str]:
        """Images that belong to no class of this import, per reason."""
        return reasons(record for record in self.listed.records if record.label is None and not record.fault)

    def plan(self, chosen: Sequence[Record]) -> dict[str, Any]:
        """Plain settings, and a keyed hash over path, size, time, patient and label of every file."""
        digest = hmac.new(self.salt, digestmod="sha256")
        for record in chosen:
            try:
                state = record.path.stat()
                stamp = f"{state.st_size}:{state.st_mtime_ns}"
            except OSError:
                stamp = "unreadable"
            relative = record.path.relative_to(self.source).as_posix()
            for part in (relative, record.patient, str(record.label), str(record.lateral), stamp):
                digest.update(hashlib.sha256(os.fsencode(part)).digest())
        for record in self.faults():
            digest.update(hashlib.sha256(os.fsencode(f"{record.path}\x1f{record.reason}")).digest())
        digest.update(repr(sorted(self.left_out().items())).encode())
        return {
            "schema": 1,
            "size": self.size,
            "classes": list(self.classes),
            "seed": self.seed,
            "splits": self.splits.model_dump(),
            "files": len(chosen),
            "content": digest.hexdigest(),
        }


def finished_readiness(store: Path, plan: dict[str, Any]) -> Readiness | None:
    """Readiness of a store finished under the same plan; None when unfinished. Raises `DataError` on another plan."""
    if not (store / "store.json").exists():
        return None
    open_store(store)
    try:
        earlier = json.loads((store / "import.json").read_text())
        differing = [key for key in plan if earlier[key] != plan[key]]
        readiness = Readiness.from_json(json.loads((store / "readiness.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{store}: the store was not made by an import, or is damaged ({error}). "
            "Choose another --store, or --restart to replace it."
        ) from error
    if differing:
        shown = [f"{key} was {earlier[key]}, now {plan[key]}" for key in differing if key != "content"]
        what = "; ".join(shown) or "the images, their labels or the salt have changed"
        raise DataError(
            f"{store} was imported differently: {what}. Choose another --store, or --restart to replace it."
        )
    return readiness
