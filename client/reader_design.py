"""Which images a reader study shows: real ones of the site's own store among synthetic ones of an archive.

::

    store + archive's folder --draw_design--> Design --write_design--> SITE/reader/<archive>/design.json      (mode 0600)
    Design + store + archive --pictures--> pixels, every synthetic file compared with its digest

Per class as many real images as synthetic ones. Real images: at most one of a patient, of patients held out from training
as long as there are any (test, then validation, then training). The draw comes from a secret seed, so nobody can work out
which image is which without design.json.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.client.store import SPLITS, Store
from xfed.common.durable import write_bytes
from xfed.common.errors import ConfigError, DataError
from xfed.common.randomness import numpy_generator

__all__ = ["Design", "Item", "Synthetic", "draw_design", "open_synthetic", "parse_design", "pictures", "write_design"]

SCHEMA = 1
REAL, SYNTHETIC = "real", "synthetic"
_PREFERENCE = ("test", "validation", "train")


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """An archive's folder as a reader study needs it: `files` file name to (class, SHA-256)."""

    folder: Path
    study: str
    root: str
    image_size: int
    files: dict[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of the study: a row of the store, or a file of the archive. `label` is the class's position."""

    kind: str
    label: int
    row: int | None = None
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is shown. `held_out` counts the real images per split, `notes` say in words what could not be had."""

    seed: int
    created: str
    study: str
    archive_root: str
    store_sha256: str
    image_size: int
    classes: tuple[str, ...]
    confidence: bool
    items: tuple[Item, ...]
    held_out: dict[str, int]
    notes: tuple[str, ...]

    @property
    def truth(self) -> npt.NDArray[np.bool_]:
        """True where an image is synthetic, bool [n]."""
        return np.array([item.kind == SYNTHETIC for item in self.items])

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Position of each image's class, int64 [n]."""
        return np.array([item.label for item in self.items], dtype=np.int64)


def open_synthetic(folder: Path) -> Synthetic:
    """Read an archive's lists. Raises `DataError`. The digest of each image is checked when it is read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        rows = list(csv.DictReader(io.StringIO((folder / "metadata.csv").read_text(encoding="utf-8"))))
        digests = manifest["files"]
        files = {str(row["file_name"]): (str(row["label"]), str(digests[row["file_name"]])) for row in rows}
        study, root, size = str(manifest["study"]), str(manifest["root_sha256"]), int(manifest["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} holds no readable archive ({type(error).__name__}: {error}). Give the folder with manifest.json in it."
        ) from error
    if any(".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() for name in files):
        raise DataError(f"{folder}/metadata.csv names files outside of the archive: do not use it")
    return Synthetic(folder=folder, study=study, root=root, image_size=size, files=files)


def draw_design(store: Store, archive: Synthetic, *, images: int, confidence: bool, seed: int) -> Design:
    """Choose `images` images, half of each kind, equally many of each class. Raises `ConfigError`, `DataError`.

    A class that the store or the archive lacks, or has too few of, has fewer images of both kinds, and a note says so.
    """
    per_class, rest = divmod(images, 2 * len(store.classes))
    if per_class < 1 or rest:
        step = 2 * len(store.classes)
        nearest = max(step, round(images / step) * step)
        raise ConfigError(
            f"--images {images}: half real, half synthetic, equally many of {len(store.classes)} classes: "
            f"it must be a multiple of {step}, for instance {nearest}"
        )
    if archive.image_size != store.size:
        raise DataError(
            f"{archive.folder} holds images of {archive.image_size} px, the store {store.size} px: the size would give the "
            "answer away. Import the store again with --size of the archive."
        )
    rng = numpy_generator(seed, "reader study")
    real = _draw_real(store, per_class, rng)
    items: list[Item] = []
    notes: list[str] = []
    held_out = dict.fromkeys(_PREFERENCE, 0)
    for label, name in enumerate(store.classes):
        files = sorted(file for file, (of, _) in archive.files.items() if of == name)
        count = min(len(real[label]), len(files), per_class)
        if count < per_class:
            notes.append(
                f"{name}: {count} images of each kind instead of {per_class} ({len(real[label])} patients could be shown, the "
                f"archive has {len(files)} images)"
            )
        for row in real[label][:count]:
            held_out[SPLITS[int(store.splits[row])]] += 1
            items.append(Item(kind=REAL, label=label, row=int(row)))
        chosen = rng.permutation(len(files))[:count]
        items += [Item(kind=SYNTHETIC, label=label, file=files[position]) for position in chosen]
    if not items:
        raise DataError("no class has both a real and a synthetic image: is the archive one of this store's classes?")
    if held_out["train"]:
        notes.append(
            f"{held_out['train']} real images are of patients whom the generators were trained on: too few held out"
        )
    return Design(
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        study=archive.study,
        archive_root=archive.root,
        store_sha256=store.digest,
        image_size=store.size,
        classes=store.classes,
        confidence=confidence,
        items=tuple(items[position] for position in rng.permutation(len(items))),
        held_out=held_out,
        notes=tuple(notes),
    )


def _draw_real(store: Store, most: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """Rows per class, at most `most`, at most one of a patient over all classes; the class with fewest patients chooses first."""
    taking_part = store.splits >= 0
    labels = range(len(store.classes))
    patients = {c: len(np.unique(store.patients[taking_part & (store.labels == c)])) for c in labels}
    used: set[int] = set()
    drawn: dict[int, list[int]] = {}
    for label in sorted(labels, key=lambda c: (patients[c], c)):
        drawn[label] = []
        for split in _PREFERENCE:
            for row in rng.permutation(store.rows(split, label)):
                if len(drawn[label]) < most and int(store.patients[row]) not in used:
                    used.add(int(store.patients[row]))
                    drawn[label].append(int(row))
    return drawn


def write_design(folder: Path, design: Design) -> None:
    """Write design.json, readable by its owner only. Raises `StorageError`."""
    text = json.dumps({"schema": SCHEMA, **asdict(design)}, indent=1, ensure_ascii=False) + "\n"
    write_bytes(folder / "design.json", text.encode(), private=True)


def parse_design(data: bytes, where: str) -> Design:
    """The content of design.json. Raises `DataError` when it is damaged."""
    try:
        values = json.loads(data)
        if values.pop("schema") != SCHEMA:
            raise ValueError("another version of xfed wrote it")
        values |= {name: tuple(values[name]) for name in ("classes", "notes")}
        items = tuple(Item(**item) for item in values.pop("items"))
        if any(item.kind not in (REAL, SYNTHETIC) or not 0 <= item.label < len(values["classes"]) for item in items):
            raise ValueError("an image is neither real nor synthetic, or of no class")
        return Design(items=items, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is damaged ({error}): restore it from a backup; no answer can be judged without it"
        ) from error


def pictures(design: Design, store: Store, archive: Synthetic) -> list[npt.NDArray[np.uint8]]:
    """Pixels uint8 [S, S] of every image, in the design's order. Raises `DataError` where store or archive is another one."""
    if store.digest != design.store_sha256:
        raise DataError(
            f"{store.folder} is not the image store that this reader study was drawn from: was it imported again?"
        )
    if archive.root != design.archive_root:
        raise DataError(f"{archive.folder} is not the archive that this reader study was drawn from")
    return [
        np.array(store.images[item.row]) if item.row is not None else _synthetic(archive, str(item.file), store.size)
        for item in design.items
    ]


def _synthetic(archive: Synthetic, name: str, size: int) -> npt.NDArray[np.uint8]:
    path = archive.folder / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != archive.files[name][1]:
            raise ValueError("it is not what the manifest says")
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.array(image)
        if pixels.dtype != np.uint8 or pixels.shape != (size, size):
            raise ValueError(f"it is not a grey image of {size} px")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be shown ({error}): do not use this archive") from error
    return pixels
