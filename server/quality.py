"""How good the archive is, from the sites' sums and the coordinator's own synthetic images.

::

    site: features of real images, in two halves by patient --sums--> + over sites --> real half 0, real half 1
    coordinator: as many synthetic images as half 0 holds --> FID(half 0, synthetic) beside the floor FID(half 0, half 1)
    sites: kid, precision, ... --> mean over sites, weighted by images compared

FID is biased by the number of images, so both figures compare equal numbers. `recognised` is how often the
classifier that saw only real images calls a synthetic image by its class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from xfed.common.classifier import predict
from xfed.common.devices import choose_device
from xfed.common.errors import FederationError
from xfed.common.features import DIMENSIONS, SCORES, project_features
from xfed.common.frechet import FeatureSums, add, feature_sums, frechet_distance, from_arrays, zero
from xfed.common.messages import ArchiveMeasured, MeasureArchive, Reply, Request
from xfed.common.registry import build_classifier
from xfed.common.weights import Weights, load_parameters, under
from xfed.server.run import Run

__all__ = ["archive_quality"]

LEAST = 2
# features of real images without noise would be one more release of a private study; "recognised" needs none
_UNMEASURED: dict[str, Any] = {"fid": None, "fid_floor": None, "images_compared": 0} | dict.fromkeys(SCORES)


def archive_quality(
    run: Run, arm: str, weights: Weights, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Per-class quality and `recognised`, in the eyes of the classifier `weights` of `arm`; None where not measurable."""
    study = run.study
    run.journal.write("phase", phase="quality", round=0, rounds=1)
    model = build_classifier(study)
    load_parameters(model, weights)
    device = choose_device(study.runtime.device)
    model = model.to(device)
    quality = (
        {name: dict(_UNMEASURED) for name in study.classes}
        if study.private
        else _measured(run, arm, weights, model, images, labels)
    )
    predicted = predict(model, images, device=device, precision=study.precision).argmax(1)
    recall = {name: float(np.mean(predicted[labels == label] == label)) for label, name in enumerate(study.classes)}
    run.journal.write("round", phase="quality", round=1, rounds=1)
    return {
        "quality": quality,
        "features": f"{study.classifier.model} of {arm}, projected to {DIMENSIONS} dimensions",
        "recognised": {"by": arm, "balanced_accuracy": float(np.mean(list(recall.values()))), "per_class": recall},
    }


def _measured(
    run: Run,
    arm: str,
    weights: Weights,
    model: torch.nn.Module,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
) -> dict[str, dict[str, Any]]:
    """Distances and scores per class, from the sites' sums."""
    study, device = run.study, choose_device(run.study.runtime.device)
    halves, scores = _ask(run, arm, weights)
    return {
        name: {**_distances(halves[label], images[labels == label], model, device, study.precision), **scores[label]}
        for label, name in enumerate(study.classes)
    }


def _ask(
    run: Run, arm: str, weights: Weights
) -> tuple[list[tuple[FeatureSums, FeatureSums]], list[dict[str, float | None]]]:
    classes = len(run.study.classes)
    halves = [(zero(DIMENSIONS), zero(DIMENSIONS)) for _ in range(classes)]
    totals = np.zeros((classes, 1 + len(SCORES)))

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ArchiveMeasured):
            raise FederationError(f"{site} answered {type(reply).__name__} to MeasureArchive")
        for label in range(classes):
            found = []
            for half in (0, 1):
                sums = from_arrays(under(reply.arrays, f"{label}/half{half}/"))
                found.append(add(halves[label][half], sums))
            halves[label] = (found[0], found[1])
            row = reply.arrays[f"{label}/scores"]
            totals[label, 0] += row[0]
            totals[label, 1:] += row[0] * row[1:]

    request = MeasureArchive(study=run.study.digest, arm=arm, weights=dict(weights))
    run.sum("quality", 1, [request], [run.exchange.sites], fold)
    means: list[dict[str, float | None]] = [
        {key: float(row[1 + i] / row[0]) if row[0] else None for i, key in enumerate(SCORES)} for row in totals
    ]
    return halves, means


def _distances(
    halves: tuple[FeatureSums, FeatureSums],
    fake: npt.NDArray[np.uint8],
    model: torch.nn.Module,
    device: torch.device,
    precision: str,
) -> dict[str, float | int | None]:
    count = min(halves[0].count, halves[1].count, len(fake))
    if count < LEAST:
        return {"fid": None, "fid_floor": None, "images_compared": count}
    synthetic = feature_sums(project_features(model, fake[:count], device, precision))
    return {
        "fid": frechet_distance(halves[0], synthetic),
        "fid_floor": frechet_distance(halves[0], halves[1]),
        "images_compared": count,
    }
