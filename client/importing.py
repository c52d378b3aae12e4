"""A folder of X-rays becomes the site's image store; a killed import goes on where it was.

::

    SOURCE --(layouts)--> records --(keyed hash: patient numbers, order)--> decode in threads --> rows.bin + journal
                                                                                                     |
    store <--(write_store, last: store.json)-- readiness <-- split by patient <----------------------+

    sites/a/
      store/                  finished store, readiness.json, import.json      <- no file name, no patient, no header
      store/.import/          plan.json, rows.bin, journal.jsonl               <- only while an import is under way
      store-salt              32 random bytes, mode 0600: the key of the hashes
      store-quarantine.csv    file names and faults, mode 0600: stays at the site

Formal guarantees
-----------------
Patients are numbered, and rows ordered, by HMAC-SHA256 under the salt, so neither tells anything without it. `store.json` is
written last: a store is finished or it is not there. A fault of one file never ends an import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xfed.client.import_plan import Request, finished_readiness, keyed_hash, reasons
from xfed.client.import_work import Outcome, WorkArea, decode_all
from xfed.client.layouts import Record, read_labels
from xfed.client.private_files import quarantine_path, salt_for, write_quarantine
from xfed.client.readiness import Readiness, measure
from xfed.client.splits import split_patients
from xfed.client.store import write_store
from xfed.common.config import Data
from xfed.common.durable import exclusive, remove_tree, translate_os_errors, write_json
from xfed.common.errors import DataError, StorageError

__all__ = ["ImportReport", "import_folder", "patient_numbers"]

_STORE_FILES = ("store.json", "images.npy", "index.npz", "readiness.json", "import.json")
_OWN_NAMES = {*_STORE_FILES, ".import", ".lock"}


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What came of an import. `fresh` is False when the store was finished before; `quarantine` is None without faults.

    `notes` may name files or labels: they are for the person at the terminal, and are kept nowhere.
    """

    store: Path
    layout: str
    fresh: bool
    readiness: Readiness
    quarantine: Path | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, as `xfed-client import --json` prints them."""
        return {
            "store": str(self.store),
            "layout": self.layout,
            "fresh": self.fresh,
            "quarantine_file": None if self.quarantine is None else str(self.quarantine),
            "notes": list(self.notes),
            "readiness": self.readiness.as_json(),
        }


def patient_numbers(patients: Iterable[str], salt: bytes) -> dict[str, int]:
    """Patient -> 0..P-1 in the order of HMAC-SHA256(salt, patient)."""
    ordered = sorted(set(patients), key=lambda patient: keyed_hash(salt, "patient", patient))
    return {patient: number for number, patient in enumerate(ordered)}


def import_folder(
    source: Path,
    store: Path,
    *,
    size: int,
    classes: Sequence[str],
    data: Data,
    seed: int,
    labels: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
    salt: bytes | None = None,
    restart: bool = False,
    patient_pattern: str | None = None,
) -> ImportReport:
    """Import `source` into `store` (made when absent) and report. `data` names layout, columns, label map and splits.

    `workers` threads decode (0 = one per core). `salt` replaces the site's secret one, which is made on the first
    import; only simulations, whose patients are nobody, may pass a known one. `restart` throws away what `store` held.
    The same call on a finished store changes nothing and is fast; on an unfinished one it goes on.

    Raises `DataError` (no usable image; or `store` was made with other settings), `ConfigError` (layout options),
    `StorageError` (disk full, or another import is at work; what is done so far is kept).
    """
    listed = read_labels(
        source,
        layout=data.layout,
        labels=labels or (source / data.labels if data.labels else None),
        classes=classes,
        image_column=data.image_column,
        patient_column=data.patient_column,
        label_column=data.label_column,
        label_map=data.label_map,
        patient_pattern=patient_pattern,
    )
    store = store.resolve()
    _check_folder(store, source)
    with exclusive(store):
        if restart:
            _clear(store)
        request = Request(
            source=source,
            listed=listed,
            salt=salt_for(store) if salt is None else salt,
            size=size,
            classes=tuple(classes),
            seed=seed,
            splits=data.splits,
        )
        chosen = request.chosen()
        if not chosen:
            _refuse_empty(request, store)
        plan = request.plan(chosen)
        finished = finished_readiness(store, plan)
        if finished is None:
            work = WorkArea.open(store / ".import", plan, size=size)
            paths = [record.path for record in chosen]
            outcomes = decode_all(paths, work, workers=workers or os.cpu_count() or 1, progress=progress)
            readiness = _finish(request, store, plan, list(zip(chosen, outcomes, strict=True)), work)
        else:
            readiness = finished
        remove_tree(store / ".import")
    quarantine = quarantine_path(store)
    return ImportReport(
        store=store,
        layout=listed.layout,
        fresh=finished is None,
        readiness=readiness,
        quarantine=quarantine if quarantine.exists() else None,
        notes=listed.notes,
    )


def _check_folder(store: Path, source: Path) -> None:
    """Refuse to write between somebody's files."""
    if store.is_relative_to(source.resolve()):
        raise DataError(f"{store} lies inside the source {source}. Choose a --store outside of it.")
    if store.exists() and not store.is_dir():
        raise DataError(f"{store} is a file. Choose another --store.")
    if store.is_dir():
        strange = sorted(p.name for p in store.iterdir() if p.name not in _OWN_NAMES and not p.name.endswith(".tmp"))
        if strange:
            raise DataError(
                f"{store} holds other files ({', '.join(strange[:3])}). Choose an empty folder with --store."
            )


def _clear(store: Path) -> None:
    for name in _STORE_FILES:  # store.json first: from then on there is no finished store
        (store / name).unlink(missing_ok=True)
    remove_tree(store / ".import")


def _refuse_empty(request: Request, store: Path) -> None:
    """Raise a `DataError` that says where all the images went."""
    file = write_quarantine(store, request.source, request.faults())
    counts = (request.left_out() + reasons(request.faults())).most_common()
    what = "; ".join(f"{count:,}: {reason}" for reason, count in counts) or "no images were found"
    notes = "".join(f"\n{note}" for note in request.listed.notes)
    listed = f" The faults are listed in {file}." if file else ""
    raise DataError(
        f"{request.source}: no image belongs to a class ({', '.join(request.classes)}). {what}.{notes}\n"
        f"Check --classes, --map and --labels.{listed}"
    )


def _finish(
    request: Request,
    store: Path,
    plan: dict[str, Any],
    decoded: Sequence[tuple[Record, Outcome]],
    work: WorkArea,
) -> Readiness:
    """Split, measure, list the faults and write the store."""
    good = [(record, outcome) for record, outcome in decoded if not outcome.error]
    bad = [
        Record(path=record.path, patient="", label=None, reason="cannot be decoded", detail=outcome.error, fault=True)
        for record, outcome in decoded
        if outcome.error
    ]
    faults = [*request.faults(), *bad]
    file = write_quarantine(store, request.source, faults)
    if not good:
        remove_tree(work.folder)
        raise DataError(f"none of {len(decoded):,} images could be read. The faults are listed in {file}.")
    numbers = patient_numbers((record.patient for record, _ in good), request.salt)
    position = {name: label for label, name in enumerate(request.classes)}
    labels = np.array([position[record.label or ""] for record, _ in good], dtype=np.int64)
    patients = np.array([numbers[record.patient] for record, _ in good], dtype=np.int64)
    splits = split_patients(
        labels=labels, patients=patients, splits=request.splits, seed=request.seed, n_classes=len(request.classes)
    )
    images = work.rows(len(good))
    readiness = measure(
        images=images,
        labels=labels,
        patients=patients,
        splits=splits,
        classes=request.classes,
        sizes=[(outcome.height, outcome.width) for _, outcome in good],
        laterals=[record.lateral or outcome.lateral for record, outcome in good],
        left_out=request.left_out(),
        quarantined=reasons(faults),
    )
    try:
        with translate_os_errors(store):
            write_json(store / "readiness.json", readiness.as_json())
            write_json(store / "import.json", plan)
            write_store(store, classes=request.classes, images=images, labels=labels, patients=patients, splits=splits)
    except (OSError, StorageError) as error:
        for name in _STORE_FILES:
            (store / name).unlink(missing_ok=True)
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {store}: {error}. Free some space and run the same command again: nothing is decoded twice."
        ) from error
    return readiness
