"""The view of each test image (AP, PA, ...), where the label file has one: the confounder that a study must show.

::

    DATA/labels.csv: image, view --decoded as the import does--> SHA-256 of its pixels --> view
    test rows of the base's stores ------------------------------> SHA-256 of their pixels --> views [n], "" where not known

A store keeps no file name, so an image is found again by its pixels. Only a simulation can: it has the folder and the stores.
The label of a chest film hangs on its view (bedridden patients are filmed at the bedside, AP), so a classifier may read the view
instead of the finding: `view_only` says how far that alone would go, `by_view` what is left within one view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.client.decode import decode
from xfed.client.layouts import find_label_file, read_labels
from xfed.client.tables import read_table
from xfed.common.config import Study
from xfed.common.errors import DataError

__all__ = ["by_view", "table_of", "view_of_pixels", "view_only", "views_of"]

LEAST = 20

Labels = npt.NDArray[np.int64]


def _key(pixels: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def view_of_pixels(data: Path, study: Study) -> dict[str, str]:
    """SHA-256 of an image's pixels at the study's size to its view; empty where the label file has no such column.

    Raises `DataError` when the folder cannot be read.
    """
    column = study.experiment.view_column
    labels = data / study.data.labels if study.data.labels else None
    path = find_label_file(data, labels, required=False) if column else None
    if path is None:
        return {}
    table = read_table(path)
    position = table.find(column)
    if position is None:
        return {}
    listed = read_labels(
        data,
        layout=study.data.layout,
        labels=labels,
        classes=study.classes,
        image_column=study.data.image_column,
        patient_column=study.data.patient_column,
        label_column=study.data.label_column,
        label_map=study.data.label_map,
    )
    of_name = {
        Path(cell.strip()).name: fields[position].strip()
        for _, fields in table.rows
        if position < len(fields)
        for cell in fields
        if cell.strip()
    }
    views = {}
    for record in listed.records:
        if record.label is not None and (view := of_name.get(record.path.name)):
            try:
                views[_key(decode(record.path, study.image_size).pixels)] = view
            except DataError:  # quarantined at the import, too
                continue
    return views


def views_of(images: npt.NDArray[np.uint8], known: Mapping[str, str]) -> list[str]:
    """The view of each of `images` uint8 [n, S, S], "" where none is known."""
    return [known.get(_key(image), "") for image in images]


def table_of(views: Sequence[str], labels: Labels, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Images per class and view."""
    names = sorted({view for view in views if view})
    held = np.array(views)
    return {
        name: {view: int(((labels == label) & (held == view)).sum()) for view in names}
        for label, name in enumerate(classes)
    }


def view_only(views: Sequence[str], labels: Labels, classes: int) -> npt.NDArray[np.float32]:
    """Class probabilities of a reader who sees nothing but the view: the share of each class in it, classes weighted alike.

    float32 [n, C]. It is fitted to the images that it judges: an upper bound on what the view alone can tell.
    """
    held = np.array(views)
    size = np.maximum(np.bincount(labels, minlength=classes), 1)
    told = np.zeros((len(labels), classes), np.float32)
    for view in np.unique(held):
        rows = held == view
        weight = np.bincount(labels[rows], minlength=classes) / size
        told[rows] = weight / weight.sum()
    return told


def by_view(
    views: Sequence[str], labels: Labels, probabilities: npt.NDArray[np.float32], classes: Sequence[str]
) -> dict[str, Any]:
    """Balanced accuracy within each view: {view: {balanced_accuracy, n, classes}}, over classes with 20 images of that view.

    `probabilities` float32 [m, n, C]: the mean over the m models.
    """
    held, result = np.array(views), {}
    right = (probabilities.argmax(2) == labels).mean(0)
    for view in sorted({view for view in views if view}):
        rows = held == view
        counts = np.bincount(labels[rows], minlength=len(classes))
        enough = [label for label in range(len(classes)) if counts[label] >= LEAST]
        shares = [float(right[rows & (labels == label)].mean()) for label in enough]
        result[view] = {
            "balanced_accuracy": float(np.mean(shares)) if len(enough) > 1 else None,
            "n": int(rows.sum()),
            "classes": [classes[label] for label in enough],
        }
    return result
