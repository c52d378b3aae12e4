"""Confidence intervals for ratios whose unit is the patient, not the image.

::

    k, n and patients' second moments --design_effect--> effective n --wilson_interval--> [low, high]
    per-class intervals --mean_interval--> balanced accuracy
    two arms' intervals --difference_interval--> DS3 - DS1

All functions take plain numbers; scores lie in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, sqrt
from statistics import NormalDist

__all__ = [
    "auc_interval",
    "design_effect",
    "difference_interval",
    "effective_size",
    "mean_interval",
    "student_quantile",
    "wilson_interval",
]

Interval = tuple[float, float]


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def student_quantile(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t (Abramowitz and Stegun 1964, eq. 26.7.5).

    `freedom` is taken as 3 at the least: below, the expansion does not hold, and no interval is worth much.
    anyway.
    """
    z, v = _z(confidence), float(max(freedom, 3))
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def design_effect(k: int, n: int, kk: float, kn: float, nn: float, patients: int) -> float:
    """Variance of the ratio k / n over patients, divided by that of n independent images; at least 1.

    `kk`, `kn`, `nn` are the sums over patients of k_i^2, k_i n_i, n_i^2 (n >= 1). Where all images are right
    or all are wrong, or there is one patient, the data say nothing about how alike a patient's images are;
    then they are taken as wholly alike, Kish's sum(n_i^2) / sum(n_i).
    """
    alike = max(1.0, nn / n)
    p = k / n
    if not 0 < k < n or patients < 2:
        return alike
    residual = kk - 2 * p * kn + p * p * nn
    variance = max(residual, 0.0) / n**2 * patients / (patients - 1)
    return max(1.0, variance / (p * (1 - p) / n))


def effective_size(size: float, patients: int, confidence: float) -> float:
    """`size` lowered for a variance estimated from few patients (Korn and Graubard 1998, section 2)."""
    return size * (_z(confidence) / student_quantile(confidence, patients - 1)) ** 2


def wilson_interval(p: float, n: float, confidence: float) -> Interval:
    """Wilson's 1927 score interval for a share `p` of `n` (effective, not always whole) trials."""
    z = _z(confidence)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def auc_interval(area: float, positives: float, negatives: float, confidence: float) -> Interval:
    """Hanley and McNeil 1982 (eq. 1-2) on the logit scale, at effective numbers of images; contains `area`.

    The area is drawn towards 1/2 by one image of the rarer kind, so that a perfect separation of a few images
    does not claim certainty. The effective numbers treat one patient's images as wholly alike: the interval
    errs on the wide side.
    """
    fewer = min(positives, negatives)
    a = (area * fewer + 0.5) / (fewer + 1)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    spread = a * (1 - a) + max(positives - 1, 0) * (q1 - a * a) + max(negatives - 1, 0) * (q2 - a * a)
    half = _z(confidence) * sqrt(max(spread, 0) / (positives * negatives)) / (a * (1 - a))
    centre = log(a / (1 - a))

    def share(logit: float) -> float:
        return 1 / (1 + exp(-logit)) if logit >= 0 else exp(logit) / (1 + exp(logit))

    return min(area, share(centre - half)), max(area, share(centre + half))


def mean_interval(values: Sequence[float], intervals: Sequence[Sequence[float]], widen: float = 1.0) -> Interval:
    """Interval of the mean of estimates from their own intervals (Zou and Donner 2008, Stat. Med. 27: MOVER).

    The estimates are taken as independent; `widen` (at least 1) multiplies both arms when they are not. It
    keeps its width where an estimate is 0 or 1, which a variance formula would not.
    """
    centre = sum(values) / len(values)
    down = sqrt(sum((value - span[0]) ** 2 for value, span in zip(values, intervals, strict=True))) / len(values)
    up = sqrt(sum((span[1] - value) ** 2 for value, span in zip(values, intervals, strict=True))) / len(values)
    return max(0.0, centre - widen * down), min(1.0, centre + widen * up)


def difference_interval(a: float, a_span: Sequence[float], b: float, b_span: Sequence[float]) -> Interval:
    """Interval of a - b from both intervals (Newcombe 1998, Stat. Med. 17:873, method 10).

    It takes the two as independent. Two classifiers scored on the same patients agree on the easy and on the
    hard ones, so the true interval is as a rule narrower: an interval without 0 can be relied on, one with 0
    may hide a small difference.
    """
    down = sqrt((a - a_span[0]) ** 2 + (b_span[1] - b) ** 2)
    up = sqrt((a_span[1] - a) ** 2 + (b - b_span[0]) ** 2)
    return max(-1.0, a - b - down), min(1.0, a - b + up)
