"""Scores of a classifier in a private study: counts over test patients with noise, and figures with intervals that include it.

::

    site: one image per test patient --count_scores--> confusion, histograms --Mechanism.release (sensitivity sqrt 2)--> the wire
    coordinator: sum over sites --noisy_summary(deviation)--> accuracy, sensitivity, specificity, AUC, each with an interval

A patient adds 1 to one cell of the confusion matrix and 1 / sqrt(C) to one bin of each of the C classes' histograms: sqrt 2 in
all (L2). Noised counts may be negative or fractional; figures are clamped to [0, 1], counts are published as they came.
The interval of a ratio k / n adds the binomial variance and that of the noise in k and n (delta method, Cochran 1977,
section 6.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xfed.common.errors import FederationError

__all__ = ["BINS", "SENSITIVITY", "count_scores", "noisy_summary"]

BINS = 16
"""Bins of a score histogram, uniform in the logit of the probability, from -6 to 6."""
SENSITIVITY = sqrt(2)
_LIMIT = 6.0
_NORMAL = 1.959964
_DRAWS = 200

Array = npt.NDArray[np.float64]


def count_scores(probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    """Un-noised counts, float32: "confusion" [C, C] and "histogram" [C, 2, BINS] of one image per patient.

    `probabilities` [n, C], rows add up to 1; `labels` [n] in 0..C-1. Removing a row changes all of it by `SENSITIVITY` (L2).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    count, classes = p.shape
    confusion = np.zeros((classes, classes))
    histogram = np.zeros((classes, 2, BINS))
    np.add.at(confusion, (labels, p.argmax(axis=1)), 1.0)
    tiny = np.finfo(np.float64).tiny
    logit = np.log(np.maximum(p, tiny)) - np.log(np.maximum(1 - p, tiny))
    bins = np.clip((logit + _LIMIT) * (BINS / (2 * _LIMIT)), 0, BINS - 1).astype(np.int64)
    own = (labels[:, None] == np.arange(classes)).astype(np.int64)
    of_class = np.broadcast_to(np.arange(classes), (count, classes))
    np.add.at(histogram, (of_class, own, bins), 1 / sqrt(classes))
    return {"confusion": torch.from_numpy(confusion).float(), "histogram": torch.from_numpy(histogram).float()}


def noisy_summary(arrays: Mapping[str, npt.NDArray[Any]], classes: Sequence[str], deviation: float) -> dict[str, Any]:
    """As `xfed.common.metrics.summary`, from noised counts: `deviation` is the noise's standard deviation per cell (all sites).

    Where the noise leaves nothing to divide by, a figure is None. Raises `FederationError` on arrays of another form.
    """
    size = len(classes)
    shapes = {"confusion": (size, size), "histogram": (size, 2, BINS)}
    if {name: np.shape(array) for name, array in arrays.items()} != shapes:
        raise FederationError(f"noised scores must be {shapes}; do both sides run one version?")
    confusion, histogram = np.asarray(arrays["confusion"], np.float64), np.asarray(arrays["histogram"], np.float64)
    if not (np.isfinite(confusion).all() and np.isfinite(histogram).all()):
        raise FederationError("noised scores hold NaN or infinity; this answer is not used")
    everything = np.ones((size, size), bool)
    eye = np.eye(size, dtype=bool)
    accuracy, accuracy_interval = _ratio(confusion, eye, everything, deviation)
    per_class: dict[str, dict[str, Any]] = {}
    for c, name in enumerate(classes):
        row = np.zeros((size, size), bool)
        row[c] = True
        rejected = ~row
        rejected[:, c] = False
        recall, recall_interval = _ratio(confusion, row & eye, row, deviation)
        specificity, specificity_interval = _ratio(confusion, rejected, ~row, deviation)
        area, area_interval = _auc(histogram[c] * sqrt(size), deviation * sqrt(size))
        n = max(0, round(float(confusion[c].sum())))
        per_class[name] = {
            "n": n,
            "patients": n,
            "accuracy": recall,
            "accuracy_interval": recall_interval,
            "sensitivity": recall,
            "sensitivity_interval": recall_interval,
            "specificity": specificity,
            "specificity_interval": specificity_interval,
            "auc": area,
            "auc_interval": area_interval,
        }
    found: list[dict[str, Any]] = [entry for entry in per_class.values() if entry["sensitivity"] is not None]
    balanced, balanced_interval = None, None
    if found:
        balanced = float(np.mean([entry["sensitivity"] for entry in found]))
        # variances of independent rows add up
        half = [(entry["sensitivity_interval"][1] - entry["sensitivity_interval"][0]) / 2 for entry in found]
        spread = sqrt(sum(h * h for h in half)) / len(half)
        balanced_interval = [max(0.0, balanced - spread), min(1.0, balanced + spread)]
    areas = [entry["auc"] for entry in per_class.values() if entry["auc"] is not None]
    total = max(0, round(float(confusion.sum())))
    return {
        "n": total,
        "patients": total,
        "confidence": 0.95,
        "accuracy": accuracy,
        "accuracy_interval": accuracy_interval,
        "balanced_accuracy": balanced,
        "balanced_accuracy_interval": balanced_interval,
        "balanced_over": [name for name, entry in per_class.items() if entry["sensitivity"] is not None],
        "auc": float(np.mean(areas)) if areas else None,
        "loss": None,
        "per_class": per_class,
        "confusion": np.maximum(0, np.rint(confusion)).astype(np.int64).tolist(),
        "noise": {"deviation": deviation, "confusion": confusion.tolist()},
    }


def _ratio(
    confusion: Array, k: npt.NDArray[np.bool_], n: npt.NDArray[np.bool_], deviation: float
) -> tuple[float | None, list[float] | None]:
    hits, total = float(confusion[k].sum()), float(confusion[n].sum())
    if total < 1:
        return None, None
    value = min(1.0, max(0.0, hits / total))
    cells, others = int(k.sum()), int(n.sum() - k.sum())
    noise = (deviation / total) ** 2 * (cells * (1 - value) ** 2 + others * value**2)
    # a share near 0 or 1 of few patients is less certain than its plug-in variance says (Agresti and Coull 1998)
    shrunk = (value * total + 2) / (total + 4)
    half = _NORMAL * sqrt(shrunk * (1 - shrunk) / (total + 4) + noise)
    return value, [max(0.0, value - half), min(1.0, value + half)]


def _area(histogram: Array) -> float | None:
    negatives, positives = histogram
    pairs = negatives.sum() * positives.sum()
    if negatives.sum() < 1 or positives.sum() < 1:
        return None
    below = np.cumsum(negatives) - negatives
    return float(min(1.0, max(0.0, (positives * (below + negatives / 2)).sum() / pairs)))


def _auc(histogram: Array, deviation: float) -> tuple[float | None, list[float] | None]:
    """AUC, and an interval from noise drawn again (a fixed stream: it explains public figures) and Hanley and McNeil 1982."""
    area = _area(histogram)
    if area is None:
        return None, None
    rng = np.random.default_rng(1982)
    again = [_area(histogram + deviation * rng.standard_normal(histogram.shape)) for _ in range(_DRAWS)]
    seen = [value for value in again if value is not None]
    if len(seen) < _DRAWS // 2:
        return area, [0.0, 1.0]
    negatives, positives = (max(1.0, float(side.sum())) for side in histogram)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    sampling = (area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)) / (
        positives * negatives
    )
    half = _NORMAL * sqrt(max(0.0, sampling) + float(np.var(seen)))
    return area, [max(0.0, area - half), min(1.0, area + half)]
