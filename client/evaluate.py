"""A hospital scores a released classifier on a folder of its own: nothing is stored, nothing leaves.

::

    classifier-DS3.safetensors --load_classifier--> model, classes, image size
    images + labels --read_labels--> decode (as the import does) --> predict --> score_sums --> summary: one arm's object
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.client.decode import decode_image
from xfed.client.layouts import Record, read_labels
from xfed.common.classifier import predict
from xfed.common.config import Data
from xfed.common.devices import choose_device, memory_format
from xfed.common.errors import DataError
from xfed.common.metrics import score_sums, summary
from xfed.common.registry import load_classifier
from xfed.common.weights import digest_of, parameters_of

__all__ = ["evaluate_folder"]

PRECISION = "float32"


def evaluate_folder(
    model: Path,
    source: Path,
    *,
    labels: Path | None = None,
    data: Data,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the classifier file `model` on all labelled images under `source`; patients are the unit of the intervals.

    Returns an arm's object as in report.json, with "model" (file, digest), "left_out" (reason -> images without a usable label)
    and "unreadable" (reason -> images). Raises `DataError` when no image can be scored, `CheckpointError` for a bad model file.
    """
    where = choose_device(device)
    released = load_classifier(model)
    labelled = read_labels(
        source,
        layout=data.layout,
        labels=labels,
        classes=released.classes,
        image_column=data.image_column,
        patient_column=data.patient_column,
        label_column=data.label_column,
        label_map=data.label_map,
    )
    wanted = [record for record in labelled.records if record.label is not None]
    left_out = Counter(record.reason for record in labelled.records if record.label is None)
    images, kept, unreadable = _decode(wanted, released.image_size, progress)
    if not kept:
        raise DataError(
            f"{source}: none of its {len(labelled.records)} images can be scored "
            f"(without a usable label: {dict(left_out)}; unreadable: {dict(unreadable)})"
        )
    truth = np.array([released.classes.index(record.label or "") for record in kept], dtype=np.int64)
    _, patients = np.unique([record.patient for record in kept], return_inverse=True)
    network = released.model.to(where, memory_format=memory_format(where))  # type: ignore[call-overload]
    probabilities = predict(network, images, device=where, precision=PRECISION)
    return {
        **summary(score_sums(probabilities, truth, patients.astype(np.int64)), released.classes),
        "model": {
            "file": model.name,
            "arm": released.facts.get("arm"),
            "study": released.facts.get("study"),
            "weights_sha256": digest_of(parameters_of(released.model)),
        },
        "layout": labelled.layout,
        "left_out": dict(left_out),
        "unreadable": dict(unreadable),
    }


def _decode(
    records: list[Record], size: int, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.uint8], list[Record], Counter[str]]:
    """Images uint8 [n, size, size] of the readable records, those records, and why the others are not."""

    def attempt(record: Record) -> npt.NDArray[np.uint8] | str:
        try:
            return decode_image(record.path, size)
        except DataError as error:
            return str(error).removeprefix(f"{record.path}: ")

    images, kept = [], []
    unreadable: Counter[str] = Counter()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, (record, result) in enumerate(zip(records, pool.map(attempt, records), strict=True), start=1):
            if isinstance(result, str):
                unreadable[result] += 1
            else:
                images.append(result)
                kept.append(record)
            if progress is not None:
                progress(done, len(records))
    return np.stack(images) if images else np.zeros((0, size, size), np.uint8), kept, unreadable
