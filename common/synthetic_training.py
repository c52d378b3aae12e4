"""The study's classifier trained on synthetic images alone: what the archive teaches by itself (train on synthetic, TSTR).

::

    archive images, labels --sampled by class--> train_round x CHUNKS, learning rate falling --> weights
    start: the same weights as every arm of the study, so that arms differ in their images alone

No real image is read: in a private study this is post-processing of the generators. Source: Esteban, Hyland and
Raetsch 2017, section 4 (TSTR); the schedule is that of Salehinejad et al. 2018, section 3.2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from xfed.common.classifier import sigmoid_decay, train_round
from xfed.common.config import Study
from xfed.common.errors import DataError
from xfed.common.randomness import torch_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import Weights, parameters_of

__all__ = ["STEPS", "SYNTHETIC_ARM", "train_on_synthetic"]

STEPS = 400
SYNTHETIC_ARM = "TSTR"
CHUNKS = 10


def train_on_synthetic(
    study: Study,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    *,
    steps: int = STEPS,
    purpose: str,
    device: torch.device,
) -> Weights:
    """Weights after `steps` batches of `images` uint8 [n, S, S] with `labels` int64 [n] in 0..C-1.

    The study's classifier and settings, but classes are always drawn equally often (no image here carries a patient, so
    what forbids it in a private study does not hold). `purpose` names the random stream; equal arguments give equal bits
    on the same processor, thread count and precision. Raises `DataError` on images that do not fit the study,
    `FederationError` when the loss is no longer finite.
    """
    side = study.image_size
    if images.shape != (len(labels), side, side) or not len(labels):
        raise DataError(
            f"synthetic images of shape {images.shape} with {len(labels)} labels; expected [n, {side}, {side}] and n labels, "
            "n at least 1. Is this the study's archive?"
        )
    if labels.min() < 0 or labels.max() >= len(study.classes):
        raise DataError(f"labels {labels.min()}..{labels.max()}; the study has classes 0..{len(study.classes) - 1}")
    settings = study.classifier.model_copy(update={"balance": "sampling"})
    model = build_classifier(study, torch_generator(study.seed, "classifier"))
    none = np.zeros((0, side, side), np.uint8), np.zeros(0, np.int64)
    chunks = min(CHUNKS, steps)
    for chunk in range(chunks):
        train_round(
            model,
            *none,
            images,
            labels,
            settings=settings,
            learning_rate=sigmoid_decay(settings.learning_rate, chunk, chunks),
            steps=(chunk + 1) * steps // chunks - chunk * steps // chunks,
            generator=torch_generator(study.seed, "synthetic only", purpose, chunk),
            precision=study.precision,
            device=device,
        )
    return parameters_of(model)
