"""Classification scores as sums: each site adds up its own images, the coordinator adds up the sites.

::

    probabilities, labels, patients --score_sums--> ScoreSums --to_arrays--> the wire
    the wire --from_arrays (checks)--> ScoreSums of every site --add--> ScoreSums of all
    ScoreSums --summary--> {"accuracy", "per_class", ... with intervals}

Counts are integers, so the figures of a federation equal those of the pooled images exactly (the loss up to
rounding). A patient is taken to be at one site only.

Intervals treat the patient as the unit: images of one patient are alike, and counting them as independent
makes an interval too narrow. `moments` keeps, over patients, the second moments of the patient's own
confusion matrix; the variance of any ratio of its cells follows from them (Cochran 1977, Sampling Techniques,
3rd ed., eq. 6.9, the ratio estimator).

What leaves a site in these sums: counts, one loss, and a histogram of scores. In a histogram of few images a
single image's score can be read; no image, file name or patient number can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import DataError, FederationError
from xfed.common.intervals import (
    auc_interval,
    design_effect,
    effective_size,
    mean_interval,
    wilson_interval,
)

__all__ = ["BINS", "ScoreSums", "add", "from_arrays", "score_sums", "summary", "to_arrays", "zero"]

BINS = 512
"""Bins of a score histogram, uniform in the logit of the probability, from -12 to 12."""
_LIMIT = 12.0

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoreSums:
    """Sums over images (and patients) from which every score follows; C classes.

    - `confusion` int64 [C, C]: images per (true class, predicted class).
    - `histogram` int64 [C, 2, BINS]: scores of class c, on images of other classes (0) and of class c (1).
    - `loss`: sum of cross-entropies in nats.
    - `moments` int64 [C*C, C*C]: sum over patients of v v^T, v the patient's own confusion matrix by rows.
    - `patients` int64 [2C + 1]: patients in all; with an image of class c; with one of another class than c.
    """

    confusion: Counts
    histogram: Counts
    loss: float
    moments: Counts
    patients: Counts

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return len(self.confusion)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())


def zero(classes: int) -> ScoreSums:
    """The sums over no image: the neutral element of `add`."""
    cells = classes * classes
    return ScoreSums(
        confusion=np.zeros((classes, classes), np.int64),
        histogram=np.zeros((classes, 2, BINS), np.int64),
        loss=0.0,
        moments=np.zeros((cells, cells), np.int64),
        patients=np.zeros(2 * classes + 1, np.int64),
    )


def add(a: ScoreSums, b: ScoreSums) -> ScoreSums:
    """The sums over both, whose patients must differ. Raises `FederationError`."""
    if a.classes != b.classes:
        raise FederationError(
            f"scores over {a.classes} and over {b.classes} classes cannot be added: one plan for all sites"
        )
    return ScoreSums(
        confusion=a.confusion + b.confusion,
        histogram=a.histogram + b.histogram,
        loss=a.loss + b.loss,
        moments=a.moments + b.moments,
        patients=a.patients + b.patients,
    )


def score_sums(
    probabilities: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.integer[Any]],
    patients: npt.NDArray[np.integer[Any]],
) -> ScoreSums:
    """Sums over n images: `probabilities` [n, C], rows add up to 1; `labels` [n] in 0..C-1; `patients` [n].

    The predicted class is the most probable one (the first among equals). Raises `DataError` on anything
    else, a network whose output is not finite included.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels, dtype=np.int64)
    if p.ndim != 2 or y.shape != (len(p),) or np.shape(patients) != (len(p),):
        raise DataError(
            f"scores need probabilities [n, C] with n labels and n patients, not {p.shape}, {y.shape}, "
            f"{np.shape(patients)}"
        )
    n, classes = p.shape
    if n == 0:
        return zero(classes)
    if not np.isfinite(p).all():
        raise DataError("the classifier's output is not finite: it diverged. Lower classifier.learning_rate.")
    if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise DataError("probabilities must be at least 0 and add up to 1 per image: apply softmax first")
    if y.min() < 0 or y.max() >= classes:
        raise DataError(f"a label lies outside 0..{classes - 1}: the store and the classifier have different classes")

    cell = y * classes + p.argmax(axis=1)
    owners, owner = np.unique(patients, return_inverse=True)
    own = np.bincount(owner * classes**2 + cell, minlength=len(owners) * classes**2).reshape(len(owners), classes**2)
    per_class = own.reshape(-1, classes, classes).sum(axis=2)
    others = per_class.sum(axis=1, keepdims=True) - per_class
    tiny = np.finfo(np.float64).tiny
    logit = np.log(np.maximum(p, tiny)) - np.log(np.maximum(1 - p, tiny))
    bins = np.clip((logit + _LIMIT) * (BINS / (2 * _LIMIT)), 0, BINS - 1).astype(np.int64)
    own_class = (y[:, None] == np.arange(classes)).astype(np.int64)
    histogram = np.zeros((classes, 2, BINS), np.int64)
    np.add.at(histogram, (np.broadcast_to(np.arange(classes), (n, classes)), own_class, bins), 1)
    floats = own.astype(np.float64)
    return ScoreSums(
        confusion=np.bincount(cell, minlength=classes**2).reshape(classes, classes).astype(np.int64),
        histogram=histogram,
        loss=float(-np.log(np.maximum(p[np.arange(n), y], 1e-12)).sum()),
        moments=np.rint(floats.T @ floats).astype(np.int64),
        patients=np.concatenate([[len(owners)], (per_class > 0).sum(axis=0), (others > 0).sum(axis=0)]).astype(
            np.int64
        ),
    )


def to_arrays(sums: ScoreSums) -> dict[str, npt.NDArray[Any]]:
    """The sums as named arrays, for the wire."""
    return {
        "confusion": sums.confusion,
        "histogram": sums.histogram,
        "loss": np.array([sums.loss], np.float64),
        "moments": sums.moments,
        "patients": sums.patients,
    }


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> ScoreSums:
    """The inverse of `to_arrays`. Raises `FederationError` for what cannot come from real images."""
    names = {"confusion", "histogram", "loss", "moments", "patients"}
    if set(arrays) != names:
        raise FederationError(
            f"scores must carry {sorted(names)}, not {sorted(arrays)}: do both sides run one version?"
        )
    shape = arrays["confusion"].shape
    classes = shape[0] if len(shape) == 2 else 0
    shapes: dict[str, tuple[int, ...]] = {
        "confusion": (classes, classes),
        "histogram": (classes, 2, BINS),
        "loss": (1,),
        "moments": (classes**2, classes**2),
        "patients": (2 * classes + 1,),
    }
    for name, wanted in shapes.items():
        array = arrays[name]
        kind = np.dtype(np.float64 if name == "loss" else np.int64)
        if not classes or array.shape != wanted or array.dtype != kind:
            raise FederationError(f"scores: {name} is {array.dtype} {array.shape}, expected {kind} {wanted}")
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 2**53:
            raise FederationError(
                f"scores: {name} holds a negative or impossible value; this site's answer is not used"
            )
    sums = ScoreSums(
        confusion=arrays["confusion"],
        histogram=arrays["histogram"],
        loss=float(arrays["loss"][0]),
        moments=arrays["moments"],
        patients=arrays["patients"],
    )
    reason = _contradiction(sums)
    if reason:
        raise FederationError(f"scores contradict themselves: {reason}; this site's answer is not used")
    return sums


def _contradiction(sums: ScoreSums) -> str:
    """What about `sums` cannot be true of any set of images; empty when nothing is."""
    of_class = sums.confusion.sum(axis=1)
    cells = sums.confusion.reshape(-1).astype(np.float64)
    moments = sums.moments.astype(np.float64)
    everyone, with_class, with_other = np.split(sums.patients, [1, sums.classes + 1])
    checks = {
        "the histogram of a class does not hold its images": (sums.histogram[:, 1].sum(axis=1) == of_class).all(),
        "the histogram of the other classes does not hold their images": (
            sums.histogram[:, 0].sum(axis=1) == sums.images - of_class
        ).all(),
        "the patients' moments are not symmetric": (moments == moments.T).all(),
        "the patients' moments are smaller than the counts": (moments.diagonal() >= cells).all(),
        "the patients' moments are larger than the counts allow": (moments <= np.outer(cells, cells)).all(),
        "there are more patients than images": everyone[0] <= sums.images
        and (with_class <= of_class).all()
        and (with_other <= sums.images - of_class).all(),
        "there are images without patients": (everyone[0] > 0) == (sums.images > 0)
        and ((with_class > 0) == (of_class > 0)).all()
        and ((with_other > 0) == (sums.images > of_class)).all(),
        "a loss without images": sums.images > 0 or sums.loss == 0,
    }
    return next((text for text, holds in checks.items() if not holds), "")


def _auc(histogram: Counts) -> float | None:
    """Area under the ROC curve of a histogram [2, BINS]; ties count half. None without both kinds."""
    negatives, positives = histogram.astype(np.float64)
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return None
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


class _Ratio:
    """One ratio k / n of confusion cells, each a mask [C, C]; `patients` people hold the n images."""

    def __init__(self, sums: ScoreSums, k: npt.NDArray[np.bool_], n: npt.NDArray[np.bool_], patients: int) -> None:
        a, b = (weights.reshape(-1).astype(np.float64) for weights in (k, n))
        moments = sums.moments.astype(np.float64)
        self.k, self.n, self.patients = (
            int((sums.confusion * k).sum()),
            int((sums.confusion * n).sum()),
            patients,
        )
        self.kk, self.kn, self.nn = float(a @ moments @ a), float(a @ moments @ b), float(b @ moments @ b)

    @property
    def value(self) -> float | None:
        return self.k / self.n if self.n else None

    def interval(self, confidence: float) -> list[float] | None:
        if not self.n:
            return None
        effect = design_effect(self.k, self.n, self.kk, self.kn, self.nn, self.patients)
        return list(
            wilson_interval(self.k / self.n, effective_size(self.n / effect, self.patients, confidence), confidence)
        )


def _covariance_factor(sums: ScoreSums, present: Sequence[int]) -> float:
    """Widening (at least 1) of the mean recall's interval for patients with images of several classes."""
    moments = sums.moments.astype(np.float64)
    gradients = []
    for c in present:
        recall = sums.confusion[c, c] / sums.confusion[c].sum()
        gradient = np.zeros_like(sums.confusion, dtype=np.float64)
        gradient[c] = -recall / sums.confusion[c].sum()
        gradient[c, c] += 1 / sums.confusion[c].sum()
        gradients.append(gradient.reshape(-1))
    alone = sum(float(g @ moments @ g) for g in gradients)
    together = sum(gradients)
    return sqrt(max(1.0, float(together @ moments @ together) / alone)) if alone > 1e-12 else 1.0


def summary(sums: ScoreSums, classes: Sequence[str], confidence: float = 0.95) -> dict[str, Any]:
    """Every score with its interval, as plain values for JSON (None where there is nothing to measure on).

    Keys: n, patients, confidence, accuracy, balanced_accuracy, auc (mean over classes, each against the
    rest), loss (mean cross-entropy, nats), balanced_over (the classes with images: the mean recall is over
    these), confusion (rows: true class), per_class {class: accuracy, sensitivity, specificity, auc, n,
    patients}, and `<score>_interval` [low, high]. A class's `accuracy` is the share of its images that were
    recognised, as in Salehinejad et al. 2018, Table 1; that is its `sensitivity`, and both are given.

    Guarantees: a score lies inside its interval, and an interval inside [0, 1]. Ratios: Wilson's interval at
    the effective number of images (`xfed.common.intervals`). Balanced accuracy: the classes' intervals
    combined (`mean_interval`), widened when patients appear in several classes. AUC: Hanley and McNeil 1982
    with the effective numbers of images. Not covered: that the test patients are like tomorrow's, wrong
    labels, and choosing among many models.
    """
    if len(classes) != sums.classes:
        raise FederationError(f"scores over {sums.classes} classes, but the plan names {len(classes)}")
    if not (0 < confidence < 1 and isfinite(confidence)):
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence!r}")
    count, n = sums.classes, sums.images
    everything = np.ones((count, count), np.bool_)
    overall = _Ratio(sums, np.eye(count, dtype=np.bool_), everything, int(sums.patients[0]))
    per_class: dict[str, dict[str, Any]] = {}
    for c, name in enumerate(classes):
        row = np.zeros((count, count), np.bool_)
        row[c] = True
        hit = np.zeros_like(row)
        hit[c, c] = True
        rejected = ~row
        rejected[:, c] = False
        recall = _Ratio(sums, hit, row, int(sums.patients[1 + c]))
        specificity = _Ratio(sums, rejected, ~row, int(sums.patients[1 + count + c]))
        area = _auc(sums.histogram[c])
        span = None
        if area is not None:
            span = list(auc_interval(area, recall.n**2 / recall.nn, specificity.n**2 / specificity.nn, confidence))
        sensitivity_interval = recall.interval(confidence)
        per_class[name] = {
            "n": recall.n,
            "patients": recall.patients,
            "accuracy": recall.value,
            "accuracy_interval": sensitivity_interval,
            "sensitivity": recall.value,
            "sensitivity_interval": sensitivity_interval,
            "specificity": specificity.value,
            "specificity_interval": specificity.interval(confidence),
            "auc": area,
            "auc_interval": span,
        }
    present = [c for c in range(count) if sums.confusion[c].sum()]
    found = [per_class[classes[c]] for c in present]
    areas = [entry["auc"] for entry in found if entry["auc"] is not None]
    balanced, balanced_interval = None, None
    if found:
        recalls = [entry["sensitivity"] for entry in found]
        balanced = sum(recalls) / len(recalls)
        spans = [entry["sensitivity_interval"] for entry in found]
        balanced_interval = list(mean_interval(recalls, spans, _covariance_factor(sums, present)))
    return {
        "n": n,
        "patients": int(sums.patients[0]),
        "confidence": confidence,
        "accuracy": overall.value,
        "accuracy_interval": overall.interval(confidence),
        "balanced_accuracy": balanced,
        "balanced_accuracy_interval": balanced_interval,
        "balanced_over": [classes[c] for c in present],
        "auc": sum(areas) / len(areas) if areas else None,
        "loss": sums.loss / n if n else None,
        "per_class": per_class,
        "confusion": sums.confusion.tolist(),
    }
