"""How good the archive is, from the sites' sums and the coordinator's own synthetic images.

::

    site: features of real images, in two halves by patient --sums--> + over sites --> real half 0, real half 1
          (of half 1 every 2nd, 4th, .. image, where the archive has fewer images of the class than it)
    coordinator: as many synthetic images as half 1 holds --> FID(half 0, synthetic) beside the floor FID(half 0, half 1)
                 likewise KID, where every site could give its sums; else the mean of the sites' own figures
    sites: precision, recall, ... --> mean over sites, weighted by images compared
    coordinator: similarity of pairs of synthetic images (MS-SSIM); the sites' real pairs beside it

FID is biased by the numbers of images, so both figures compare half 0 with equal numbers; where that failed (a class held by
one patient, say), `equal_numbers` is false. `recognised` is how often the classifier that saw only real images calls a
synthetic image by its class (train on real, test on synthetic: TRTS).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.archive_figures import RealSums, add_site, class_figures, scale_of, thinning
from xfed.common.classifier import predict
from xfed.common.devices import choose_device
from xfed.common.diversity import pair_similarity
from xfed.common.errors import FederationError
from xfed.common.features import DIMENSIONS, SCORES, project_features
from xfed.common.messages import ArchiveMeasured, MeasureArchive, Reply, Request
from xfed.common.randomness import numpy_generator
from xfed.common.registry import build_classifier
from xfed.common.weights import Weights, load_parameters, under
from xfed.server.run import Run

__all__ = ["archive_quality"]

_NUMBERS = ("images_compared", "images_real", "images_floor", "equal_numbers", "kid_pooled")
# features of real images without noise would be one more release of a private study; "recognised" needs none
_UNMEASURED: dict[str, Any] = dict.fromkeys(("fid", "fid_floor", *_NUMBERS, *SCORES))
LEFT_OUT_PRIVATE = (
    "left out: this study is private, and features of real images without noise would be one more release that its budget "
    "does not plan"
)


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
    found: dict[str, dict[str, Any]] = {name: dict(_UNMEASURED) for name in study.classes}
    if not study.private:
        fakes = [project_features(model, images[labels == c], device, study.precision) for c in range(len(found))]
        scale = scale_of(fakes)
        times = thinning(run.census.counts.sum(axis=0), np.bincount(labels, minlength=len(found)))
        for name, fake, real in zip(study.classes, fakes, _ask(run, arm, weights, scale, times), strict=True):
            found[name] |= class_figures(real, fake, scale)
    for label, name in enumerate(study.classes):
        rng = numpy_generator(study.seed, "pairs of synthetic images", name)
        found[name]["ms_ssim"] = pair_similarity(images[labels == label], rng)
    predicted = predict(model, images, device=device, precision=study.precision).argmax(1)
    recall = {  # a class of which the filter left nothing has none
        name: float(np.mean(predicted[labels == label] == label))
        for label, name in enumerate(study.classes)
        if (labels == label).any()
    }
    run.journal.write("round", phase="quality", round=1, rounds=1)
    return {
        "quality": found,
        "left_out": LEFT_OUT_PRIVATE if study.private else None,
        "features": f"{study.classifier.model} of {arm}, projected to {DIMENSIONS} dimensions",
        "recognised": {"by": arm, "balanced_accuracy": float(np.mean(list(recall.values()))), "per_class": recall},
    }


def _ask(run: Run, arm: str, weights: Weights, scale: float, times: npt.NDArray[np.int64]) -> list[RealSums]:
    classes = len(run.study.classes)
    totals = [RealSums.nothing()] * classes

    def fold(site: str, request: Request, reply: Reply) -> None:
        if not isinstance(reply, ArchiveMeasured):
            raise FederationError(f"{site} answered {type(reply).__name__} to MeasureArchive")
        # all or nothing: a class that cannot be used leaves the site's other classes out too
        totals[:] = [add_site(totals[label], under(reply.arrays, f"{label}/")) for label in range(classes)]

    request = MeasureArchive(
        study=run.study.digest, arm=arm, scale=scale, thinning={"times": times}, weights=dict(weights)
    )
    run.sum("quality", 1, [request], [run.exchange.sites], fold)
    return totals
