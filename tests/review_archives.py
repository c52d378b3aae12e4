"""Archives for tests of the review page: as a study writes them, as far as a reviewer's page reads them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from xfed.server.archive import slug

CLASSES = ("Cardiomegaly", "Normal", "Pleural Effusion", "Pulmonary Edema", "Pneumothorax")
KINDS = 50  # different pictures; further images repeat them


def write_archive(folder: Path, per_class: int, *, side: int = 32, study: str = "5" * 64) -> list[str]:
    """An archive of `per_class` small images of each of five classes; returns the file names in the order of metadata.csv."""
    random = np.random.default_rng(7)
    pictures = [_picture(random, side) for _ in range(KINDS)]
    rows, files = [], {}
    for label, name in enumerate(CLASSES):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(per_class):
            data = pictures[number % KINDS]
            relative = f"images/{name}/{slug(name)}-{number:06d}.png"
            (folder / relative).write_bytes(data)
            files[relative] = hashlib.sha256(data).hexdigest()
            sharpness = "inf" if number == 0 else f"{number / per_class:.4f}"
            rows.append((relative, name, label, number, "ab" * 32, "true", sharpness))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("file_name", "label", "label_index", "seed", "generator_sha256", "synthetic", "sharpness"))
    writer.writerows(rows)
    (folder / "metadata.csv").write_text(table.getvalue())
    manifest = {"name": "tiny chest", "study": study, "root_sha256": "a" * 64, "classes": CLASSES, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return [row[0] for row in rows]


def _picture(random: np.random.Generator, side: int) -> bytes:
    down, across = np.mgrid[:side, :side] / side - 0.5
    lungs = np.exp(-(((np.abs(across) - 0.2) * 7) ** 2) - ((down + random.normal(0, 0.03)) * 3) ** 2)
    pixels = np.clip(190 - 150 * lungs + random.normal(0, 6, (side, side)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
