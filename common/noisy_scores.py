"""Scores of a classifier in a private study: counts over test patients with noise, and figures with intervals that include it.

::

    site: one image per test patient --count_scores--> confusion, histograms --Mechanism.release (sensitivity sqrt 2)--> the wire
    coordinator: sum over sites --noisy_summary(expected, deviation)--> accuracy, sensitivity, specificity, AUC, with intervals

A patient adds 1 to one cell of the confusion matrix and 1 / sqrt(C) to one bin of each of the C classes' histograms: sqrt 2 in
all (L2). Noised counts may be negative or fractional; figures are clamped to [0, 1], counts are published as they came.

How many patients of a class were tested is known twice: from the noised row, and in public, as the declared training patients and
the test share let expect. The two are weighed by their variances (Cochran 1977, section 5.5), which helps most where noise is
larger than a class. The interval of a ratio k / n adds the binomial variance and that of k and n (delta method, section 6.4).
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


def noisy_summary(
    arrays: Mapping[str, npt.NDArray[Any]], classes: Sequence[str], expected: Sequence[float], deviation: float
) -> dict[str, Any]:
    """As `xfed.common.metrics.summary`, from noised counts: `deviation` is the noise's standard deviation per cell (all sites).

    `expected`: test patients per class that public figures let expect. Where nothing is left to divide by, a figure is None.
    Raises `FederationError` on arrays of another form.
    """
    size = len(classes)
    shapes = {"confusion": (size, size), "histogram": (size, 2, BINS)}
    if {name: np.shape(array) for name, array in arrays.items()} != shapes:
        raise FederationError(f"noised scores must be {shapes}; do both sides run one version?")
    confusion, histogram = np.asarray(arrays["confusion"], np.float64), np.asarray(arrays["histogram"], np.float64)
    if not (np.isfinite(confusion).all() and np.isfinite(histogram).all()):
        raise FederationError("noised scores hold NaN or infinity; this answer is not used")
    rows = [_patients(confusion[c], expected[c], deviation) for c in range(size)]
    correct = np.eye(size, dtype=bool)
    accuracy, half = _ratio(confusion[correct], rows, deviation)
    per_class: dict[str, dict[str, Any]] = {}
    halves: list[float] = []
    for c, name in enumerate(classes):
        rejected = np.ones((size, size), bool)
        rejected[c] = rejected[:, c] = False
        recall, own = _ratio(confusion[c, c : c + 1], rows[c : c + 1], deviation)
        specificity, others = _ratio(confusion[rejected], [*rows[:c], *rows[c + 1 :]], deviation)
        area, area_interval = _auc(histogram[c] * sqrt(size), deviation * sqrt(size))
        n = max(0, round(rows[c][0]))
        halves += [own] if recall is not None else []
        per_class[name] = {
            "n": n,
            "patients": n,
            "accuracy": recall,
            "accuracy_interval": _interval(recall, own),
            "sensitivity": recall,
            "sensitivity_interval": _interval(recall, own),
            "specificity": specificity,
            "specificity_interval": _interval(specificity, others),
            "auc": area,
            "auc_interval": area_interval,
        }
    found = [entry["sensitivity"] for entry in per_class.values() if entry["sensitivity"] is not None]
    balanced = float(np.mean(found)) if found else None
    # variances of independent rows add up
    spread = sqrt(sum(h * h for h in halves)) / max(1, len(halves))
    areas = [entry["auc"] for entry in per_class.values()]
    total = sum(entry["n"] for entry in per_class.values())
    return {
        "n": total,
        "patients": total,
        "confidence": 0.95,
        "accuracy": accuracy,
        "accuracy_interval": _interval(accuracy, half),
        "balanced_accuracy": balanced,
        "balanced_accuracy_interval": _interval(balanced, spread),
        "balanced_over": [name for name, entry in per_class.items() if entry["sensitivity"] is not None],
        "auc": None if None in areas else float(np.mean(areas)),
        "loss": None,
        "per_class": per_class,
        "confusion": np.maximum(0, np.rint(confusion)).astype(np.int64).tolist(),
        "noise": {"deviation": deviation, "confusion": confusion.tolist(), "expected": [float(n) for n in expected]},
    }


def _patients(row: Array, expected: float, deviation: float) -> tuple[float, float]:
    """Tested patients of a class, and the variance of that figure: the noised row and the expectation, weighed."""
    noise, chance = len(row) * deviation**2, max(expected, 1.0)  # each patient falls to the test by their own hash
    if noise == 0:
        return float(row.sum()), 0.0
    return (float(row.sum()) * chance + expected * noise) / (noise + chance), noise * chance / (noise + chance)


def _ratio(hits: Array, rows: Sequence[tuple[float, float]], deviation: float) -> tuple[float | None, float]:
    """Share of hits among the patients of `rows`, clamped to [0, 1], and half the width of its interval."""
    total, variance = sum(n for n, _ in rows), sum(v for _, v in rows)
    if total < 1:
        return None, 1.0
    value = min(1.0, max(0.0, float(hits.sum()) / total))
    noise = (len(hits) * deviation**2 + value**2 * variance) / total**2
    # a share near 0 or 1 of few patients is less certain than its plug-in variance says (Agresti and Coull 1998)
    shrunk = (value * total + 2) / (total + 4)
    return value, _NORMAL * sqrt(shrunk * (1 - shrunk) / (total + 4) + noise)


def _interval(value: float | None, half: float) -> list[float] | None:
    return None if value is None else [max(0.0, value - half), min(1.0, value + half)]


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
