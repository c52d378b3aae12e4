"""The patient as the unit: what every patient adds to a score, and how far the score would have come out otherwise.

::

    Outcomes (an arm, one seed) --ratios--> a share per class, as sums over patients
        accuracy, sensitivity: sum w hits / sum w images           AUC: sum w w pairs / (sum w positives x sum w negatives)
    runs of ratios (one per seed) --spread: weights of patients x weights of runs--> replicates --> value, error, freedom
    freedom --two_sided_p, quantile--> Student's t

A resampled patient brings all images, in all arms and seeds, so what makes a patient hard for two arms cancels in their
difference. Training runs are resampled too (Owen 2007, Annals of Applied Statistics 1:386, the pigeonhole bootstrap; it errs on
the wide side), so the noise of training is in the error: in each fold the runs of all seeds, where patients keep their fold over
the seeds (runs of different folds are taken as independent; where a seed leans alike in all of its folds, and strongly, the error
is a little too small), else, and for AUCs, whose pairs cross folds, whole seeds.
Of the n patients of a stratum, and of the n seeds, n - 1 are drawn (Rao and Wu 1988, JASA 83:231): with n draws few patients or
seeds look too certain. Patients are stratified by their rarest class, so that no class vanishes from a replicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, pi, sin, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from xfed.common.errors import DataError

__all__ = [
    "SCORES",
    "Outcomes",
    "Ratio",
    "Spread",
    "lasting_folds",
    "mean_of_known",
    "quantile",
    "rarest_class",
    "ratios",
    "spread",
    "two_sided_p",
]

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]
SCORES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auc": "AUC",
    "sensitivity": "sensitivity",
    "class_auc": "AUC",
}
"""Scores by name. The last two are of one class: ``sensitivity:2`` is that of class 2."""
_FREEDOM = 200


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What one arm made of every test image, all folds of one seed together; n images, m models, C classes.

    - `patients` int64 [n]: numbers that mean the same patient in every arm and seed of one comparison.
    - `labels` int64 [n]: the class's position. `folds` int64 [n]: fold in which the image was tested.
    - `probabilities` float32 [m, n, C]: one model, or one per site for the arm "alone"; a score is the mean over the models.
    """

    patients: Integers
    labels: Integers
    folds: Integers
    probabilities: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shape, n = self.probabilities.shape, len(self.labels)
        if len(shape) != 3 or shape[0] == 0 or shape[1] != n or not len(self.patients) == len(self.folds) == n:
            raise DataError(
                f"outcomes need probabilities [m, n, C] with n patients, labels and folds, not {shape}, "
                f"{len(self.patients)}, {n} and {len(self.folds)}"
            )
        if n == 0:
            raise DataError("outcomes without an image: no fold of this arm and seed was tested; run the study again")
        if not np.isfinite(self.probabilities).all():
            raise DataError("an arm's probabilities are not finite: it diverged. Lower classifier.learning_rate.")
        if self.labels.min() < 0 or self.labels.max() >= shape[2]:
            raise DataError(f"a label lies outside 0..{shape[2] - 1}: the outcomes are of another study's classes")

    def rows(self, chosen: npt.NDArray[np.bool_]) -> Outcomes:
        """The images where `chosen` [n]."""
        return Outcomes(
            patients=self.patients[chosen],
            labels=self.labels[chosen],
            folds=self.folds[chosen],
            probabilities=self.probabilities[:, chosen],
        )


@dataclass(frozen=True)
class Ratio:
    """One share as sums over P patients with weights w: w top / w bottom; an AUC: w top w[holders] / product of w bottoms."""

    top: Floats
    """[P]; or [P, k], for the k patients `holders` with images of the class."""
    bottoms: tuple[Floats, ...]
    holders: Integers | None = None

    def sums(self, weights: Floats) -> Floats:
        """Weights [R, P] to both sums of the share [2, R]."""
        top = weights @ self.top.astype(weights.dtype)
        if self.holders is not None:
            top = np.einsum("rk,rk->r", top, weights[:, self.holders])
        return np.stack([top, np.prod([weights @ each.astype(weights.dtype) for each in self.bottoms], axis=0)])

    def values(self, weights: Floats) -> Floats:
        """Weights [R, P] to shares [R]; NaN where the weights leave nothing to measure on."""
        return _shares(self.sums(weights))

    @property
    def patients(self) -> float:
        """How many patients of equal weight it rests on (Kish 1965): sum(n)^2 / sum(n^2), n images of a patient."""
        return min(float(each.sum() ** 2 / (each**2).sum()) if each.any() else 0.0 for each in self.bottoms)


def _shares(sums: Floats) -> Floats:
    top, bottom = sums
    shares: Floats = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
    return shares


def ratios(outcomes: Outcomes, score: str, people: Integers) -> list[Ratio]:
    """The shares whose mean is the score, one or one per class, of the patients `people` (sorted)."""
    name, _, chosen = score.partition(":")
    classes = outcomes.probabilities.shape[2]
    of_class = name in ("sensitivity", "class_auc")
    if name not in SCORES or bool(chosen) != of_class or (of_class and chosen not in map(str, range(classes))):
        raise ValueError(
            f"no score is called {score!r}; there are {', '.join(SCORES)}, the last two with :0 to :{classes - 1}"
        )
    owner = np.searchsorted(people, outcomes.patients)
    wanted = [int(chosen)] if of_class else list(range(classes))
    if name in ("auc", "class_auc"):
        return [_pairs(outcomes, owner, len(people), c) for c in wanted]
    hits = (outcomes.probabilities.argmax(axis=2) == outcomes.labels).mean(axis=0)
    groups = [np.ones(len(hits), np.bool_)] if name == "accuracy" else [outcomes.labels == c for c in wanted]
    return [
        Ratio(
            top=np.bincount(owner[rows], hits[rows], len(people)).astype(np.float64),
            bottoms=(np.bincount(owner[rows], minlength=len(people)).astype(np.float64),),
        )
        for rows in groups
    ]


def _pairs(outcomes: Outcomes, owner: npt.NDArray[np.intp], people: int, c: int) -> Ratio:
    """Pairs in which the image of class c has the higher score (equal ones count half), by the two images' patients."""
    own = outcomes.labels == c
    bottoms = tuple(np.bincount(owner[rows], minlength=people).astype(np.float64) for rows in (own, ~own))
    holders = np.flatnonzero(bottoms[0])
    top = np.zeros((people, len(holders)))
    for probabilities in outcomes.probabilities[:, :, c]:
        others = probabilities[~own]
        for column, holder in enumerate(holders):
            mine = probabilities[own & (owner == holder), None]
            above = (mine > others).sum(axis=0) + 0.5 * (mine == others).sum(axis=0)
            top[:, column] += np.bincount(owner[~own], above, people)
    return Ratio(top=top / len(outcomes.probabilities), bottoms=bottoms, holders=holders)


def mean_of_known(values: Floats, axis: int = 0) -> Floats:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _shares(np.stack([np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)]))


def rarest_class(runs: Sequence[Outcomes], people: Integers) -> Integers:
    """Each patient's rarest class by number of patients, as its rank; a stratum of one patient joins the next."""
    classes = runs[0].probabilities.shape[2]
    held = np.zeros((len(people), classes), np.bool_)
    for run in runs:
        held[np.searchsorted(people, run.patients), run.labels] = True
    rank = np.argsort(np.argsort(held.sum(axis=0), kind="stable"), kind="stable")
    strata: Integers = np.where(held, rank, classes).min(axis=1)
    for each in range(classes):
        if (strata == each).sum() == 1 < len(strata):
            others = strata[strata != each]
            strata[strata == each] = min(others[others > each], default=max(others))
    return strata


def _draw(rng: np.random.Generator, replicates: int, n: int) -> Floats:
    """How often each of `n` is drawn, [replicates, n]: n - 1 draws with replacement, scaled to n (Rao and Wu 1988)."""
    if n == 1:
        return np.ones((replicates, 1))
    drawn = rng.integers(0, n, (replicates, n - 1)) + n * np.arange(replicates)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=replicates * n).reshape(replicates, n) * (n / (n - 1))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The mean of some shares over seeds, its standard error and degrees of freedom; `sizes`: patients behind each share."""

    value: float
    error: float
    freedom: int
    sizes: Floats


def lasting_folds(runs: Sequence[Outcomes], people: Integers) -> Integers:
    """Each patient's fold, numbered from 0, where it is the same in all runs; else 0 for all."""
    folds = np.zeros(len(people), np.int64)
    for run in reversed(runs):
        folds[np.searchsorted(people, run.patients)] = run.folds
    if any((folds[np.searchsorted(people, run.patients)] != run.folds).any() for run in runs):
        return np.zeros(len(people), np.int64)
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)


def spread(
    runs: Sequence[Sequence[Ratio]], strata: Integers, folds: Integers, score: str, replicates: int, seed: int
) -> Spread:
    """The pigeonhole bootstrap of runs (one per seed) of ratios over the patients of `strata` [P] and `folds` [P].

    The freedom joins each share's patients with each fold's runs (Satterthwaite 1946). Raises `DataError` where there is nothing
    to measure on.
    """
    points = np.array([[ratio.values(np.ones((1, len(strata))))[0] for ratio in run] for run in runs])
    known = np.flatnonzero(~np.isnan(points).all(axis=0))
    per_seed = mean_of_known(points, axis=1)
    if np.isnan(per_seed).any() or len(strata) < 2:
        raise DataError(f"{score} cannot be measured on the test images of {len(strata)} patients: leave it out")
    runs, seeds = [[run[int(k)] for k in known] for run in runs], len(runs)
    pairs = runs[0][0].holders is not None
    groups = np.zeros_like(folds) if pairs else folds
    rng = np.random.default_rng(seed)
    weights = np.empty((replicates, len(strata)), np.float32)
    for each in np.unique(strata):
        weights[:, strata == each] = _draw(rng, replicates, int((strata == each).sum()))
    of_runs = np.stack([_draw(rng, replicates, seeds) for _ in range(groups.max() + 1)]).astype(np.float32)
    of_patients, both = np.zeros((2, 2, len(known), replicates))
    for number, run in enumerate(runs):
        lot = of_runs[groups, :, number].T
        plain = np.stack([ratio.sums(weights) for ratio in run], axis=1)
        of_patients += plain
        both += plain * lot[:, 0] if pairs else np.stack([ratio.sums(weights * lot) for ratio in run], axis=1)

    sizes = np.array([[ratio.patients for ratio in run] for run in runs]).max(axis=0)
    terms = [
        *zip(np.nanvar(_shares(of_patients), axis=1, ddof=1) / len(known) ** 2, np.maximum(sizes - 1, 1), strict=True)
    ]
    if seeds > 1:
        parts = per_seed[None] if pairs else _parts(runs, groups)
        terms += [(part / seeds, seeds - 1) for part in parts.var(axis=1, ddof=1)]
    squares = sum(part**2 / free for part, free in terms)
    freedom = sum(part for part, _ in terms) ** 2 / squares if squares > 0 else sizes.min() - 1
    return Spread(
        value=float(per_seed.mean()),
        error=float(np.nanstd(mean_of_known(_shares(both)), ddof=1)),
        freedom=int(max(freedom, 1)),
        sizes=sizes,
    )


def _parts(runs: Sequence[Sequence[Ratio]], groups: Integers) -> Floats:
    """What each fold adds to the score in each seed, [F, S]."""
    shares = np.array([np.mean([r.top / max(r.bottoms[0].sum(), 1) for r in run], axis=0) for run in runs])
    return np.stack([shares[:, groups == each].sum(axis=1) for each in range(groups.max() + 1)])


def two_sided_p(t: float, freedom: int) -> float:
    """Two-sided p-value of Student's t (Abramowitz and Stegun 1964, eq. 26.7.3-4); `freedom` from 200 on is taken as 200."""
    freedom = min(freedom, _FREEDOM)
    angle = atan(abs(t) / sqrt(freedom))
    odd, factor = freedom % 2, cos(angle) ** 2
    term, total = cos(angle) if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= factor * k / (k + 1)
    inside = 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
    return max(0.0, 1 - inside)


def quantile(alpha: float, freedom: int) -> float:
    """The t whose two-sided p-value is `alpha`."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > alpha:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > alpha else (low, middle)
    return high
