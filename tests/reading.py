"""A hospital's store and an archive beside it, small enough for a reader study in a test."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from xfed.client.store import write_store

CLASSES = ("Cardiomegaly", "Normal")


def drawn(rng: np.random.Generator, count: int, size: int, bright: int) -> npt.NDArray[np.uint8]:
    """Noise of a brightness that tells the kinds apart: real 60, synthetic 180."""
    return np.clip(rng.normal(bright, 20, (count, size, size)), 0, 255).astype(np.uint8)


def make_site(
    folder: Path, *, patients: int = 40, per_patient: int = 3, size: int = 32, classes: tuple[str, ...] = CLASSES
) -> Path:
    """A site's folder with policy.yaml and a store of `patients` per class: a half trained on, a quarter in each other split."""
    rng = np.random.default_rng(7)
    count = len(classes) * patients * per_patient
    patient = np.repeat(np.arange(len(classes) * patients), per_patient)
    splits = np.array([0, 0, 1, 2], dtype=np.int8)[patient % 4]
    write_store(
        folder / "store",
        classes=classes,
        images=drawn(rng, count, size, 60),
        labels=patient // patients,
        patients=patient,
        splits=splits,
    )
    (folder / "policy.yaml").write_text("allow_non_private: true\n")
    return folder


def make_archive(
    folder: Path, *, per_class: int = 30, size: int = 32, classes: tuple[str, ...] = CLASSES, study: str = "5" * 64
) -> Path:
    """An archive's folder as the coordinator writes it, in what a reader study reads of it."""
    rng = np.random.default_rng(8)
    files, rows = {}, []
    for name in classes:
        (folder / "images" / name).mkdir(parents=True)
        for number, pixels in enumerate(drawn(rng, per_class, size, 180)):
            relative = f"images/{name}/{number:06d}.png"
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            (folder / relative).write_bytes(buffer.getvalue())
            files[relative] = hashlib.sha256(buffer.getvalue()).hexdigest()
            rows.append({"file_name": relative, "label": name, "synthetic": "true"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "label", "synthetic"])
        writer.writeheader()
        writer.writerows(rows)
    root = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    manifest = {"study": study, "root_sha256": root, "image_size": size, "classes": list(classes), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
