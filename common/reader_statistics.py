"""Real or synthetic? What readers' answers say: right or by chance, how well told apart, how far readers agree.

::

    truth, labels, {reader: Reading} --summarise--> {"readers": {name: figures}, "pooled": figures, "agreement": figures}
      counts         --clopper_pearson, binomial_p--> accuracy against chance, sensitivity, specificity, per class
      two rates      --discrimination--> d', criterion
      confidence     --rating_auc--> area under the rating curve
      answers [R, n] --cohen_kappa, fleiss_kappa--> agreement beyond chance

A synthetic image is the signal: sensitivity is the share of synthetic images called synthetic, specificity the share of real
images called real. Half of the images are of each kind, so guessing is right half of the time, whatever a reader prefers to say.
Intervals are of 95%. In pooled figures the image is the unit: several readers of one image are not independent, so counts
are lowered to the number of independent answers they are worth (Korn and Graubard 1998). They hold for these readers, on
images like these; other readers may differ by more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isnan, lgamma, log, log1p, nan, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import DataError
from xfed.common.intervals import auc_interval, design_effect, effective_size, student_quantile

__all__ = [
    "CONFIDENCE",
    "Reading",
    "binomial_p",
    "clopper_pearson",
    "cohen_kappa",
    "discrimination",
    "fleiss_kappa",
    "rating_auc",
    "summarise",
]

CONFIDENCE = 0.95
Interval = tuple[float, float]
Truth = npt.NDArray[np.bool_]
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reader's answers, in the images' common order.

    `called` bool [n]: True where the reader said synthetic. `confidence` int64 [n]: 1 (a guess) to 3 (certain), 0 where none was
    given.
    """

    called: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.int64]


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22), a, b >= 0."""
    if x <= 0 or b == 0:
        return 0.0
    if x >= 1 or a == 0:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_share(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * fraction


def _beta_quantile(share: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(middle, a, b) < share else (low, middle)
    return (low + high) / 2


def clopper_pearson(right: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """The exact interval of a share (Clopper and Pearson 1934); `right` of `n` > 0 need not be whole (effective numbers)."""
    tail = (1 - confidence) / 2
    low = _beta_quantile(tail, right, n - right + 1) if right > 0 else 0.0
    high = _beta_quantile(1 - tail, right + 1, n - right) if right < n else 1.0
    return low, high


def binomial_p(right: float, n: float) -> float:
    """Two-sided exact p-value of `right` of `n` under guessing (one half): twice the smaller tail, at most 1."""
    above = _beta_share(0.5, right, n - right + 1)
    below = _beta_share(0.5, n - right, right + 1)
    return min(1.0, 2 * min(above, below))


def discrimination(hits: float, signals: float, false_alarms: float, noises: float) -> dict[str, Any]:
    """d' and criterion c of the equal-variance normal model, with the log-linear correction (Hautus 1995).

    `hits` of `signals` and `false_alarms` of `noises` were called signal; numbers need not be whole. 1/2 is added to each count
    and 1 to each total, so that no rate is 0 or 1. The variance is that of Gourevitch and Galanter 1967 at the corrected rates.
    """
    rates = (hits + 0.5) / (signals + 1), (false_alarms + 0.5) / (noises + 1)
    z = [_NORMAL.inv_cdf(rate) for rate in rates]
    variance = sum(
        rate * (1 - rate) / (count * _NORMAL.pdf(score) ** 2)
        for rate, score, count in zip(rates, z, (signals, noises), strict=True)
    )
    d, half = z[0] - z[1], _NORMAL.inv_cdf(0.5 + CONFIDENCE / 2) * sqrt(variance)
    return {"d_prime": d, "d_prime_interval": [d - half, d + half], "criterion": -(z[0] + z[1]) / 2}


def rating_auc(scores: npt.NDArray[np.int64], truth: Truth) -> float:
    """Share of pairs (synthetic, real) that `scores` order rightly, ties counting half; nan without both kinds."""
    signal, noise = scores[truth], scores[~truth]
    if not len(signal) or not len(noise):
        return nan
    return float((np.sign(signal[:, None] - noise[None, :]) + 1).mean() / 2)


def cohen_kappa(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Agreement of two readers beyond chance (Cohen 1960); nan where both said one and the same thing throughout."""
    observed = float((a == b).mean())
    expected = float(a.mean() * b.mean() + (~a).mean() * (~b).mean())
    return (observed - expected) / (1 - expected) if expected < 1 else nan


def fleiss_kappa(table: npt.NDArray[Any]) -> float:
    """Agreement of many readers beyond chance (Fleiss 1971); nan where all said one and the same thing throughout.

    `table` [n, K]: how many readers put image i into category k; every row has the same sum, 2 or more.
    """
    raters = int(table[0].sum())
    if raters < 2 or (table.sum(1) != raters).any():
        raise DataError("Fleiss' kappa needs the same number of readers, two or more, for every image")
    shares = table.sum(0) / table.sum()
    observed = float(((table**2).sum(1) - raters).mean() / (raters * (raters - 1)))
    expected = float((shares**2).sum())
    return (observed - expected) / (1 - expected) if expected < 1 - 1e-12 else nan


def _kappa(called: npt.NDArray[np.bool_]) -> float:
    if len(called) == 2:
        return cohen_kappa(called[0], called[1])
    said = called.sum(0)
    return fleiss_kappa(np.stack([len(called) - said, said], axis=1))


def _jackknife(n: int, measure: Callable[[npt.NDArray[np.int64]], float], low: float) -> dict[str, Any]:
    """`measure` of all n images, with the interval of its pseudo-values, one image left out at a time (Tukey 1958).

    Kept within `low` and 1; None where the measure, or one with an image left out, is undefined.
    """
    every = np.arange(n)
    value = measure(every)
    if isnan(value):
        return {"value": None, "interval": None}
    pseudo = np.array([n * value - (n - 1) * measure(np.delete(every, i)) for i in range(n)])
    if np.isnan(pseudo).any():
        return {"value": value, "interval": None}
    half = student_quantile(CONFIDENCE, n - 1) * float(pseudo.std(ddof=1)) / sqrt(n)
    return {"value": value, "interval": [max(low, value - half), min(1.0, value + half)]}


def _effective(counts: npt.NDArray[np.int64], raters: int) -> tuple[float, float]:
    """(k, n) of independent answers that `counts` [images], each of 0..raters, are worth; of one reader, all."""
    n, k = len(counts) * raters, int(counts.sum())
    if raters == 1 or not n:
        return float(k), float(n)
    alike = design_effect(k, n, float((counts**2).sum()), float(k * raters), float(n * raters), len(counts))
    size = min(float(n), effective_size(n / alike, len(counts), CONFIDENCE))
    return k / n * size, size


def _share(name: str, counts: npt.NDArray[np.int64], raters: int, *, against_chance: bool = False) -> dict[str, Any]:
    if not len(counts):
        return {name: None, f"{name}_interval": None}
    k, n = _effective(counts, raters)
    facts: dict[str, Any] = {
        name: int(counts.sum()) / (len(counts) * raters),
        f"{name}_interval": list(clopper_pearson(k, n)),
    }
    if against_chance:
        facts["p_value"] = binomial_p(k, n)
    return facts


def _figures(
    truth: Truth, labels: npt.NDArray[np.int64], classes: Sequence[str], called: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """All figures but the area, of `called` bool [R, n] (one reader, or several pooled)."""
    raters = len(called)
    right = (called == truth).sum(0)
    said = called.sum(0)

    def counts(chosen: Truth) -> dict[str, Any]:
        return {
            kind: {"n": int((chosen & of).sum()) * raters, "called_synthetic": int(said[chosen & of].sum())}
            for kind, of in (("real", ~truth), ("synthetic", truth))
        }

    per_class = {}
    for label, name in enumerate(classes):
        chosen = labels == label
        per_class[name] = {**counts(chosen), **_share("accuracy", right[chosen], raters, against_chance=True)}
    hits, signals = _effective(said[truth], raters)
    alarms, noises = _effective(said[~truth], raters)
    return {
        "n": len(truth) * raters,
        "correct": int(right.sum()),
        **counts(np.ones_like(truth)),
        **_share("accuracy", right, raters, against_chance=True),
        **_share("sensitivity", said[truth], raters),
        **_share("specificity", raters - said[~truth], raters),
        **discrimination(hits, signals, alarms, noises),
        "per_class": per_class,
    }


def _area(truth: Truth, readings: Sequence[Reading]) -> dict[str, Any]:
    """The area under the rating curve, the mean over readers; None unless every answer carries a confidence."""
    if any((reading.confidence == 0).any() for reading in readings) or truth.all() or not truth.any():
        return {"auc": None, "auc_interval": None}
    scores = [np.where(each.called, each.confidence, -each.confidence) for each in readings]
    if len(scores) == 1:
        area = rating_auc(scores[0], truth)
        return {
            "auc": area,
            "auc_interval": list(auc_interval(area, int(truth.sum()), int((~truth).sum()), CONFIDENCE)),
        }

    def mean(rows: npt.NDArray[np.int64]) -> float:
        return float(np.mean([rating_auc(each[rows], truth[rows]) for each in scores]))

    # readers and images at once: pseudo-values over images, as Dorfman, Berbaum and Metz 1992 take them, readers fixed
    found = _jackknife(len(truth), mean, 0.0)
    return {"auc": found["value"], "auc_interval": found["interval"]}


def summarise(
    truth: Truth, labels: npt.NDArray[np.int64], classes: Sequence[str], readings: Mapping[str, Reading]
) -> dict[str, Any]:
    """All figures of a reader study. Raises `DataError` without readers, images of both kinds, or with answers missing.

    `truth` bool [n]: True for a synthetic image; `labels` int64 [n]: position in `classes`.
    """
    if not readings or truth.all() or not truth.any():
        raise DataError("a reader study needs a reader who has finished, real images and synthetic ones")
    if any(len(each.called) != len(truth) or len(each.confidence) != len(truth) for each in readings.values()):
        raise DataError("every reader must have answered every image of the study")
    called = np.stack([each.called for each in readings.values()])
    every = list(readings.values())
    agreement: dict[str, Any] = {"readers": len(every), "method": None, "kappa": None, "kappa_interval": None}
    if len(every) > 1:
        found = _jackknife(len(truth), lambda rows: _kappa(called[:, rows]), -1.0)
        pairs = len(every) * (len(every) - 1)
        said = called.sum(0)
        alike = (said * (said - 1) + (len(every) - said) * (len(every) - said - 1)) / pairs
        agreement |= {
            "method": "Cohen 1960" if len(every) == 2 else "Fleiss 1971",
            "kappa": found["value"],
            "kappa_interval": found["interval"],
            "observed": float(alike.mean()),
        }
    return {
        "chance": 0.5,
        "confidence_level": CONFIDENCE,
        "readers": {
            name: {**_figures(truth, labels, classes, each.called[None]), **_area(truth, [each])}
            for name, each in readings.items()
        },
        "pooled": {"readers": len(every), **_figures(truth, labels, classes, called), **_area(truth, every)},
        "agreement": agreement,
    }
